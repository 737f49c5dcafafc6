"""GGUF checkpoints: config, tokenizer and weights from one file.

Contract: ``GgufCheckpoint(path)`` reads config and tokenizer from the metadata and ``weights()`` streams the
dequantized tensors under the decoder's names, rows in the decoder's order. Anything wrong is one ``ValueError`` that
names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pagedattn.engine.checkpoint_names import from_gguf
from pagedattn.engine.gguf_file import GgufFile
from pagedattn.engine.hugging_face import yarn_attention_factor
from pagedattn.engine.model import ARCHITECTURES, ModelConfig, RopeConfig
from pagedattn.engine.tokenizer import Tokenizer

# Llama 3's stretched frequencies: part of the config, not a weight.
ROPE_DIVISORS = "rope_freqs.weight"


class GgufCheckpoint:
    """A GGUF file: config, tokenizer and weights in one."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        try:
            self.config = config_from_gguf(self._file)
            self.tokenizer = Tokenizer.from_gguf(self._file.metadata, eos_token_ids=self.config.eos_token_ids)
        except KeyError as error:
            raise ValueError(f"{path}: the metadata key {error} is missing") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{path}: {error}") from error

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        # llama.cpp interleaves each head's two rotation halves, in the architecture it calls llama (Mistral's too).
        interleaved_heads = {}
        if self._file.metadata["general.architecture"] == "llama":
            interleaved_heads = {"query": self.config.num_heads, "key": self.config.num_kv_heads}
        for spelled in self._file.tensors:
            if spelled == ROPE_DIVISORS:
                continue
            name = from_gguf(spelled)
            weight = self._file.tensor(spelled)
            num_heads = interleaved_heads.get(name.rsplit(".", 1)[-1].removesuffix("_bias"))
            yield name, weight if num_heads is None else _split_rotation_halves(weight, num_heads)


def _split_rotation_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...), x and y being rotated together."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The metadata of a GGUF file as a ``ModelConfig``.

    Raises:
        KeyError, ValueError: a key is missing or its value is not supported.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"the model is split over {metadata['split.count']} files; merge them with llama-gguf-split")
    if metadata.get(f"{architecture}.expert_count", 0) > 0:
        raise ValueError("mixture-of-experts models are not supported")

    def get(key: str, *default: Any) -> Any:
        key = f"{architecture}.{key}"
        return metadata.get(key, *default) if default else metadata[key]

    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    head_size = get("attention.key_length", None) or hidden_size // num_heads
    embedding = file.tensors.get("token_embd.weight")
    eos_keys = ("eos", "eot", "eom")
    eos_token_ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in eos_keys)
    return ModelConfig(
        vocab_size=embedding.shape[0] if embedding else len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_size=head_size,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=get("context_length"),
        rope=_rope_from_gguf(file, get, head_size),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        eos_token_ids=tuple(dict.fromkeys(token for token in eos_token_ids if token is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        dtype=file.compute_dtype,
        sliding_window=get("attention.sliding_window", None) or None,
    )


def _rope_from_gguf(file: GgufFile, get: Callable[..., Any], head_size: int) -> RopeConfig:
    base = RopeConfig(theta=get("rope.freq_base", 10_000.0), rotary_dim=get("rope.dimension_count", None) or head_size)
    if ROPE_DIVISORS in file.tensors:
        divisors = file.tensor(ROPE_DIVISORS)
        return replace(base, scaling="per_frequency", frequency_divisors=tuple(divisors.tolist()))
    scaling = get("rope.scaling.type", "none")
    if scaling == "none":
        return base
    if scaling not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {scaling!r}; supported: 'none', 'linear', 'yarn'")
    factor = get("rope.scaling.factor")
    return replace(
        base,
        scaling=scaling,
        factor=factor,
        attention_factor=yarn_attention_factor({}, factor) if scaling == "yarn" else 1.0,
        original_max_position_embeddings=get("rope.scaling.original_context_length", get("context_length")),
    )
