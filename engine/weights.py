"""From a model's name to a decoder that runs, with its tokenizer: ``load_model``.

Contract: a name is resolved to files by ``pagedattn.engine.model_store``; a directory is read by
``pagedattn.engine.hugging_face``, a GGUF file by ``pagedattn.engine.gguf_checkpoint``; models with random weights need
no files. Tensors are streamed into the decoder one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pagedattn.engine import model_store
from pagedattn.engine.gguf_checkpoint import GgufCheckpoint
from pagedattn.engine.hugging_face import DTYPES, HuggingFaceCheckpoint
from pagedattn.engine.model import Decoder, ModelConfig, RopeConfig
from pagedattn.engine.tokenizer import Tokenizer

RANDOM_MODELS = {
    "random": ModelConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        rope=RopeConfig(theta=10_000.0, rotary_dim=16),
    ),
    "random-135m": ModelConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=100_000.0, rotary_dim=64),
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    ),
    "random-8b": ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        rope=RopeConfig(
            theta=500_000.0,
            rotary_dim=128,
            scaling="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        dtype=torch.bfloat16,
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights in place, and the tokenizer that belongs to it."""

    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer
    name: str


def load_model(
    path_or_name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    max_model_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model, downloading it first if it is a registered name or hub id that is not cached.

    Args:
        path_or_name: a directory, a GGUF file, a hub id ("owner/name") or a name in ``model_store.MODELS``.
        dtype: "float32", "float16", "bfloat16", such a torch dtype, or "auto": fp32 on a CPU, elsewhere the
            checkpoint's (bf16 for a quantized one).
        device: None takes "cuda" if there is one, else "cpu".
        max_model_len: the longest sequence that will be run; None: as many tokens as the model has positions.
        progress: called with (bytes done, bytes in total) while a registered model downloads.

    Raises:
        ValueError: a bad argument, an unsupported architecture, or a file that is missing, corrupt or foreign.
        ModelStoreError: the model is unknown or cannot be fetched.
    """
    name = str(path_or_name)
    target = _parse_device(device)
    requested = _parse_dtype(dtype)
    if name in RANDOM_MODELS:
        return random_model(RANDOM_MODELS[name], dtype, target, max_model_len, name=name)

    path = model_store.resolve(name, progress=progress)
    checkpoint = GgufCheckpoint(path) if path.is_file() else HuggingFaceCheckpoint(path)
    config = checkpoint.config
    decoder = Decoder(config, _resolve_dtype(requested, config, target), target, max_model_len)
    try:
        decoder.load_weights(checkpoint.weights())
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    return LoadedModel(config, decoder, checkpoint.tokenizer, name)


def random_model(
    config: ModelConfig,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    max_model_len: int | None = None,
    *,
    name: str = "random",
) -> LoadedModel:
    """A model of any shape with random weights, made on the device, and a tokenizer of bytes: to measure with.

    Arguments and errors as for ``load_model``; the vocabulary must have room for the 256 bytes and three ids more.
    """
    target = _parse_device(device)
    tokenizer = Tokenizer.byte_level(config.vocab_size)
    config = replace(config, eos_token_ids=tokenizer.eos_token_ids, bos_token_id=tokenizer.bos_token_id)
    decoder = Decoder(config, _resolve_dtype(_parse_dtype(dtype), config, target), target, max_model_len)
    fill_with_random_weights(decoder, seed=0)
    return LoadedModel(config, decoder, tokenizer, name)


@torch.inference_mode()
def fill_with_random_weights(decoder: Decoder, seed: int) -> None:
    """Normal weights, scaled so that activations and logits keep a standard deviation of about 1.

    The same seed gives the same weights, rounded, in every dtype on the same kind of device.
    """
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for weight in decoder.weight_slots().values():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            weight.copy_(drawn.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator))


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None stands for "auto"."""
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; it must be 'auto', {', '.join(map(repr, DTYPES))}")
    return found


def _resolve_dtype(requested: torch.dtype | None, config: ModelConfig, device: torch.device) -> torch.dtype:
    return requested or (torch.float32 if device.type == "cpu" else config.dtype)


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:<index>'") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:<index>'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return target
