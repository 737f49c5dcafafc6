"""Tiny checkpoints for tests: transformers models with random weights, saved as users would find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from pagedattn.engine.tokenizer import Tokenizer, byte_characters

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim differs from hidden_size on purpose
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far enough apart that an error shows
    "tie_word_embeddings": False,
    "eos_token_id": 258,
    "bos_token_id": 256,
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def make_model(architecture: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A transformers model with random weights, norms and biases included, in fp32."""
    torch.manual_seed(0)
    settings = {**SHAPE, **overrides}
    if architecture == "qwen2":
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.eval()


def save_directory(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    """As ``save_pretrained`` leaves it, with a byte-level tokenizer."""
    model.save_pretrained(directory, **options)
    Tokenizer.byte_level(model.config.vocab_size).backend.save(str(directory / "tokenizer.json"))
    return directory


def save_gguf(
    model: transformers.PreTrainedModel, path: Path, quantize: gguf.GGMLQuantizationType | None = None, **options: Any
) -> Path:
    """As llama.cpp's converter writes a Llama: rows of query and key heads interleaved. ``options`` are metadata."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in options.items():
        writer.add_key_value(f"llama.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    write_vocabulary(writer, config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        spelled = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert spelled is not None, name
        values = weight.numpy()
        for part, num_heads in heads.items():
            if part in spelled:
                halves = values.reshape(num_heads, 2, config.head_dim // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if quantize is not None and values.ndim == 2:
            writer.add_tensor(spelled, gguf.quants.quantize(values, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(spelled, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Every byte, ``<|im_start|>`` and ``<|im_end|>`` as control tokens, and fillers."""
    tokens = [*byte_characters(), "<|im_start|>", "<|im_end|>"]
    types = [1] * 256 + [3, 3]
    for index in range(len(tokens), vocab_size):
        tokens.append(f"<{index}>")
        types.append(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
