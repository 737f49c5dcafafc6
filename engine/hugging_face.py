"""Hugging Face model directories: config.json, tokenizer.json and safetensors, written by transformers 4 or 5.

Contract: ``HuggingFaceCheckpoint(directory)`` reads config and tokenizer and ``weights()`` streams the tensors under
the decoder's names. Nothing is unpickled and no code from the directory runs. What is missing, corrupt or not supported
is one ``ValueError`` that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedattn.engine.checkpoint_names import from_hugging_face
from pagedattn.engine.model import ARCHITECTURES, ModelConfig, RopeConfig
from pagedattn.engine.tokenizer import Tokenizer, read_json_object

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class HuggingFaceCheckpoint:
    """A directory with config.json, tokenizer.json and *.safetensors."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        settings = read_json_object(directory / "config.json")
        config = config_from_hugging_face(settings, directory / "config.json")
        generation_path = directory / "generation_config.json"
        if generation_path.is_file():
            generation = read_json_object(generation_path)
            config = replace(config, eos_token_ids=_token_ids(generation.get("eos_token_id")) or config.eos_token_ids)
        self.tokenizer = Tokenizer.from_directory(directory, eos_token_ids=config.eos_token_ids)
        self.config = replace(config, eos_token_ids=self.tokenizer.eos_token_ids)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        try:
            import safetensors
        except ImportError as error:
            raise ImportError("reading *.safetensors needs safetensors: pip install 'pagedattn[models]'") from error
        for path in self._files():
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    for spelled in file.keys():  # noqa: SIM118  # not a mapping
                        name = from_hugging_face(spelled)
                        if self._is_redundant(name):
                            continue
                        yield name, file.get_tensor(spelled)
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from error

    def _is_redundant(self, name: str) -> bool:
        """Copies that some checkpoints carry of what follows from the config."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head" and self.config.tie_word_embeddings)

    def _files(self) -> list[Path]:
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no weight_map")
            names = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError(f"{index} names files outside its directory")
            files = [self._directory / name for name in names]
            for path in files:
                if not path.is_file():
                    raise ValueError(f"{path} is missing; {index.name} lists it")
            return files
        files = sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self._directory} has no *.safetensors; other weight formats (pickles) are not read")
        return files


def config_from_hugging_face(settings: Mapping[str, Any], path: Path) -> ModelConfig:
    """A ``config.json`` (of transformers 4 or 5) as a ``ModelConfig``; ``path`` is for messages."""
    architecture = settings.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    for field, allowed in (("hidden_act", ("silu",)), ("mlp_bias", (False,)), ("quantization_config", (None,))):
        if settings.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {field} is {settings[field]!r:.60}; supported: {allowed[0]!r}")
    try:
        num_heads = settings["num_attention_heads"]
        head_size = settings.get("head_dim") or settings["hidden_size"] // num_heads
        has_bias = architecture != "qwen2" and bool(settings.get("attention_bias", False))
        return ModelConfig(
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["intermediate_size"],
            num_layers=settings["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=settings.get("num_key_value_heads") or num_heads,
            head_size=head_size,
            rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
            max_position_embeddings=settings["max_position_embeddings"],
            rope=_rope_from_hugging_face(settings, head_size),
            tie_word_embeddings=settings.get("tie_word_embeddings", False),
            attention_bias=has_bias or architecture == "qwen2",
            attention_output_bias=has_bias,
            qk_norm=architecture == "qwen3",
            eos_token_ids=_token_ids(settings.get("eos_token_id")),
            bos_token_id=settings.get("bos_token_id"),
            dtype=DTYPES.get(str(settings.get("dtype") or settings.get("torch_dtype")), torch.float32),
            sliding_window=_sliding_window(architecture, settings),
        )
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error


def _rope_from_hugging_face(settings: Mapping[str, Any], head_size: int) -> RopeConfig:
    # transformers 5 writes one object; 4 wrote the base beside it and the object only if there is a scaling.
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    base = RopeConfig(
        theta=float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
        rotary_dim=int(head_size * (rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0)),
    )
    if scaling == "default":
        return base
    if scaling not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type is {scaling!r}; supported: 'default', 'linear', 'llama3', 'yarn'")
    trained = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    factor = rope.get("factor") or settings["max_position_embeddings"] / trained
    return replace(
        base,
        scaling=scaling,
        factor=factor,
        low_freq_factor=rope.get("low_freq_factor", base.low_freq_factor),
        high_freq_factor=rope.get("high_freq_factor", base.high_freq_factor),
        beta_fast=rope.get("beta_fast") or base.beta_fast,
        beta_slow=rope.get("beta_slow") or base.beta_slow,
        truncate=rope.get("truncate", True),
        attention_factor=yarn_attention_factor(rope, factor) if scaling == "yarn" else 1.0,
        original_max_position_embeddings=trained,
    )


def yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """How much longer queries and keys become; arXiv:2309.00071 eq. 22, with DeepSeek's two-sided form."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def _sliding_window(architecture: str, settings: Mapping[str, Any]) -> int | tuple[int | None, ...] | None:
    if architecture == "mistral":
        return settings.get("sliding_window", 4096)  # transformers' default where the file is silent
    if architecture not in ("qwen2", "qwen3") or not settings.get("use_sliding_window", False):
        return None
    num_layers = settings["num_hidden_layers"]
    first_windowed = settings.get("max_window_layers", 28)
    layer_types = settings.get("layer_types") or [
        "sliding_attention" if layer >= first_windowed else "full_attention" for layer in range(num_layers)
    ]
    unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types has {unknown[0]!r}; supported: 'sliding_attention', 'full_attention'")
    window = settings.get("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _token_ids(value: Any) -> tuple[int, ...]:
    """One id, several or none, as ``eos_token_id`` is written."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id is {value!r}; it must be an integer or a list of them")
    return ids
