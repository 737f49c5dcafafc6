"""A Llama-family decoder on ``pagedattn`` ops: config, weights, forward pass; one file, top to bottom.

Contract: ``Decoder.forward(batch, cache)`` takes the tokens of one step, any mix of prefills, chunks and decodes packed
into one row each, writes their keys and values into the paged cache and returns the logits of the rows that were asked
for. There is no other path: a prompt's first token already goes through the paged cache.

Llama, SmolLM, Mistral, Qwen2 and Qwen3 are configurations of it. How checkpoints spell the weights is
``pagedattn.engine.weights``'s concern; here each weight has one name (``Decoder.weight_slots``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedattn import layer_ops, ops
from pagedattn.engine.kv_cache import KVCache, LayerCache

if TYPE_CHECKING:
    from pagedattn.engine.batch import BatchTensors

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # as checkpoints name them
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "per_frequency")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which dimensions turn how fast, and how the frequencies were stretched.

    ``scaling`` is one of ``ROPE_SCALINGS``: "linear" divides every frequency by ``factor``; "llama3" only the slow ones
    (Llama 3.1); "yarn" ramps between the two and scales the attention by ``attention_factor`` (arXiv:2309.00071);
    "per_frequency" divides frequency i by ``frequency_divisors[i]``, the form in which GGUF files carry Llama 3's.
    """

    theta: float
    rotary_dim: int
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    original_max_position_embeddings: int = 0  # positions trained before the stretch
    frequency_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling is {self.scaling!r}; supported: {', '.join(ROPE_SCALINGS)}")
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rope rotary_dim is {self.rotary_dim}; it must be positive and even")
        for name in ("theta", "factor", "attention_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"rope {name} is {value}; it must be positive and finite")
        if self.scaling in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise ValueError(f"rope scaling {self.scaling!r} needs original_max_position_embeddings")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "they must be positive and ascending"
            )
        if self.scaling == "per_frequency" and len(self.frequency_divisors) != self.rotary_dim // 2:
            raise ValueError(
                f"rope frequency_divisors has {len(self.frequency_divisors)} entries; "
                f"rotary_dim {self.rotary_dim} needs {self.rotary_dim // 2}"
            )

    def inverse_frequencies(self) -> Tensor:
        """Radians per position: fp32 ``[rotary_dim / 2]``, on the CPU."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim
        frequencies = 1.0 / (self.theta**exponents)
        match self.scaling:
            case "linear":
                return frequencies / self.factor
            case "per_frequency":
                return frequencies / torch.tensor(self.frequency_divisors, dtype=torch.float32)
            case "llama3":
                return torch.lerp(frequencies / self.factor, frequencies, self._llama3_kept_share(frequencies))
            case "yarn":
                return torch.lerp(frequencies / self.factor, frequencies, self._yarn_kept_share())
        return frequencies

    def _llama3_kept_share(self, frequencies: Tensor) -> Tensor:
        """1 where a frequency stays as trained, 0 where it is divided by ``factor``: by turns per trained context."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def _yarn_kept_share(self) -> Tensor:
        """As ``_llama3_kept_share``, but a ramp over the dimension's index between two numbers of turns."""

        def dimension_at(turns: float) -> float:
            wavelengths = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return self.rotary_dim * math.log(wavelengths) / (2 * math.log(self.theta))

        low, high = dimension_at(self.beta_fast), dimension_at(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        indices = torch.arange(self.rotary_dim // 2, dtype=torch.float32)
        return 1 - ((indices - low) / (high - low)).clamp(0, 1)

    def cos_sin_table(self, max_position: int, device: torch.device) -> Tensor:
        """fp32 ``[max_position, rotary_dim]``: the first half of each row holds cosines, the second sines."""
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, self.inverse_frequencies())
        return (torch.cat([angles.cos(), angles.sin()], dim=-1) * self.attention_factor).to(device)


@dataclass(frozen=True)
class ModelConfig:
    """The shape and arithmetic of a decoder. ``dtype`` is the checkpoint's; a decoder may run in another."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections (Qwen2)
    attention_output_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head before the rotation (Qwen3)
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: torch.dtype = torch.float32
    # w: a query sees its own position and the w - 1 before it; one for all layers, or one for each
    sliding_window: int | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_size", "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_size % 8:
            raise ValueError(f"head_size is {self.head_size}; it must be a multiple of 8")
        if self.rope.rotary_dim > self.head_size:
            raise ValueError(
                f"rope rotary_dim is {self.rope.rotary_dim}; it must be at most head_size {self.head_size}"
            )
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}; it must be positive and finite")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(f"sliding_window has {len(self.layer_windows)} entries for {self.num_layers} layers")
        for window in self.layer_windows:
            if window is not None and window < 1:
                raise ValueError(f"sliding_window is {window}; it must be None or at least 1")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window, None for full attention."""
        if isinstance(self.sliding_window, tuple):
            return self.sliding_window
        return (self.sliding_window,) * self.num_layers


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights, ``[out_features, in_features]``; projections with the same input are one matrix."""

    attention_norm: Tensor  # [hidden]
    query_key_value: Tensor  # [(Hq + 2 Hkv) * D, hidden]
    query_key_value_bias: Tensor | None  # [(Hq + 2 Hkv) * D]
    query_norm: Tensor | None  # [D]
    key_norm: Tensor | None  # [D]
    output: Tensor  # [hidden, Hq * D]
    output_bias: Tensor | None  # [hidden]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]

    @classmethod
    def allocate(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DecoderLayer:
        """A layer with every weight uninitialised."""

        def empty(*shape: int, exists: bool = True) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if exists else None

        hidden, head_size = config.hidden_size, config.head_size
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_size
        shapes = {
            "attention_norm": empty(hidden),
            "query_key_value": empty(qkv_size, hidden),
            "query_key_value_bias": empty(qkv_size, exists=config.attention_bias),
            "query_norm": empty(head_size, exists=config.qk_norm),
            "key_norm": empty(head_size, exists=config.qk_norm),
            "output": empty(hidden, config.num_heads * head_size),
            "output_bias": empty(hidden, exists=config.attention_output_bias),
            "mlp_norm": empty(hidden),
            "gate_up": empty(2 * config.intermediate_size, hidden),
            "down": empty(hidden, config.intermediate_size),
        }
        return cls(**shapes)  # type: ignore[arg-type]  # which are None follows from the config

    def weight_slots(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Every checkpoint weight of the layer by name, as the view that it is loaded into."""
        heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        for name, weight in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if weight is None:
                continue
            if name.startswith("query_key_value"):
                suffix = name.removeprefix("query_key_value")
                for part, rows in zip(
                    ("query", "key", "value"), weight.split([heads, kv_heads, kv_heads]), strict=True
                ):
                    yield part + suffix, rows
            elif name == "gate_up":
                yield from zip(("gate", "up"), weight.chunk(2), strict=True)
            else:
                yield name, weight


Plans = dict[int | None, ops.AttentionPlan]  # by the layers' window


class Decoder:
    """The decoder: embedding, layers, final norm, output projection.

    Weights are uninitialised until ``load_weights``. Call ``forward`` under ``torch.inference_mode()``.
    ``max_model_len`` bounds the positions that will be used (default: all that the model has).
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, max_model_len: int | None = None
    ) -> None:
        max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
        if not 1 <= max_model_len <= config.max_position_embeddings:
            raise ValueError(
                f"max_model_len is {max_model_len}; "
                f"it must be between 1 and the model's max_position_embeddings, {config.max_position_embeddings}"
            )
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_model_len = max_model_len
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=self.device)
        self.layers = [DecoderLayer.allocate(config, dtype, self.device) for _ in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, dtype=dtype, device=self.device)
        self.lm_head = self.embedding if config.tie_word_embeddings else torch.empty_like(self.embedding)
        self.cos_sin = config.rope.cos_sin_table(max_model_len, self.device)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the layers' products for one token, attention left out."""
        products = ("query_key_value", "output", "gate_up", "down")
        return 2 * sum(getattr(layer, name).numel() for layer in self.layers for name in products)

    def plan(self, batch: BatchTensors, cache: KVCache, out: Plans | None = None) -> Plans:
        """Cut up the step's attention, once for all layers that see alike. ``out``: plans to rewrite in place."""
        config = self.config
        return {
            window: ops.plan_attention(
                batch.seq_lens,
                batch.query_start_loc,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                block_size=cache.block_size,
                max_query_len=batch.max_query_len,
                max_seq_len=batch.max_seq_len,
                sliding_window=window,
                batch_invariant=batch.batch_invariant,
                out=None if out is None else out[window],
            )
            for window in dict.fromkeys(cache.groups.windows)
        }

    def forward(self, batch: BatchTensors, cache: KVCache, plans: Plans | None = None) -> Tensor:
        """Run one step. On a GPU it only enqueues work, all of it from shapes and host integers, as a CUDA graph needs.

        Args:
            batch: ``T`` tokens of ``B`` sequences; rows past ``query_start_loc[B]`` are padding (slot -1).
            cache: where the step's keys and values go and the earlier ones are; on the decoder's device, of its dtype
                or quantized.
            plans: what ``plan`` made of this batch; None makes them.

        Returns:
            ``[L, vocab_size]`` in the decoder's dtype, the logits of the rows ``batch.logits_indices``.
        """
        if plans is None:
            plans = self.plan(batch, cache)
        hidden = F.embedding(batch.input_ids, self.embedding)  # [T, hidden], the residual stream, updated in place
        for layer, layer_cache, group in zip(self.layers, cache.layers, cache.groups.group_of_layer, strict=True):
            window = cache.groups.windows[group]
            self._add_attention(hidden, layer, batch, group, window, plans[window], layer_cache)
            self._add_mlp(hidden, layer, batch.batch_invariant)
        last = hidden.index_select(0, batch.logits_indices)
        return layer_ops.norm_linear(
            last, self.final_norm, self.config.rms_norm_eps, self.lm_head, batch_invariant=batch.batch_invariant
        )

    def _add_attention(
        self,
        hidden: Tensor,
        layer: DecoderLayer,
        batch: BatchTensors,
        group: int,
        sliding_window: int | None,
        plan: ops.AttentionPlan,
        cache: LayerCache,
    ) -> None:
        config = self.config
        heads = layer_ops.norm_linear(
            hidden,
            layer.attention_norm,
            config.rms_norm_eps,
            layer.query_key_value,
            layer.query_key_value_bias,
            batch_invariant=batch.batch_invariant,
        )
        heads = heads.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_size)
        query, key, value = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            layer_ops.query_key_norm(query, key, layer.query_norm, layer.key_norm, config.rms_norm_eps)
        ops.rope_append_kv(
            query,
            key,
            value,
            self.cos_sin,
            batch.positions,
            cache.key,
            cache.value,
            batch.slot_mapping[group],
            rotary_dim=config.rope.rotary_dim,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        attended = ops.paged_attention(
            query,
            cache.key,
            cache.value,
            batch.block_table[group],
            batch.seq_lens,
            batch.query_start_loc,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            sliding_window=sliding_window,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            plan=plan,
        )
        layer_ops.add_linear(
            hidden, attended.flatten(1), layer.output, layer.output_bias, batch_invariant=batch.batch_invariant
        )

    def _add_mlp(self, hidden: Tensor, layer: DecoderLayer, batch_invariant: bool) -> None:
        gated = layer_ops.norm_linear(
            hidden,
            layer.mlp_norm,
            self.config.rms_norm_eps,
            layer.gate_up,
            gated=True,
            batch_invariant=batch_invariant,
        )
        layer_ops.add_linear(hidden, gated, layer.down, batch_invariant=batch_invariant)

    def weight_slots(self) -> dict[str, Tensor]:
        """Every weight that a checkpoint must bring, by name, as the tensor that it is loaded into."""
        slots = {"embedding": self.embedding, "final_norm": self.final_norm}
        if not self.config.tie_word_embeddings:
            slots["lm_head"] = self.lm_head
        for index, layer in enumerate(self.layers):
            slots.update((f"layers.{index}.{name}", weight) for name, weight in layer.weight_slots(self.config))
        return slots

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill every weight, one tensor at a time, converting to the decoder's dtype and device.

        Raises:
            ValueError: a weight is missing, given twice, of another shape, or not part of this model; it is named.
        """
        slots = self.weight_slots()
        missing = dict.fromkeys(slots)
        for name, weight in weights:
            if name not in slots:
                raise ValueError(f"unexpected weight {name!r}; this model has no such weight")
            if name not in missing:
                raise ValueError(f"weight {name!r} comes twice")
            if weight.shape != slots[name].shape:
                raise ValueError(f"weight {name!r} has shape {[*weight.shape]}; expected {[*slots[name].shape]}")
            slots[name].copy_(weight)
            del missing[name]
        if missing:
            first = ", ".join(list(missing)[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"missing weights: {first}{more}")
