"""How checkpoints spell the decoder's weights: one table per format, to the names of ``Decoder.weight_slots``."""

from __future__ import annotations

import re
from collections.abc import Mapping

HUGGING_FACE_NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}
HUGGING_FACE_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "query",
    "self_attn.k_proj.weight": "key",
    "self_attn.v_proj.weight": "value",
    "self_attn.o_proj.weight": "output",
    "self_attn.q_proj.bias": "query_bias",
    "self_attn.k_proj.bias": "key_bias",
    "self_attn.v_proj.bias": "value_bias",
    "self_attn.o_proj.bias": "output_bias",
    "self_attn.q_norm.weight": "query_norm",
    "self_attn.k_norm.weight": "key_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
GGUF_NAMES = {"token_embd.weight": "embedding", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
GGUF_LAYER_NAMES = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "query",
    "attn_k.weight": "key",
    "attn_v.weight": "value",
    "attn_output.weight": "output",
    "attn_q.bias": "query_bias",
    "attn_k.bias": "key_bias",
    "attn_v.bias": "value_bias",
    "attn_output.bias": "output_bias",
    "attn_q_norm.weight": "query_norm",
    "attn_k_norm.weight": "key_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}


def from_hugging_face(spelled: str) -> str:
    """The decoder's name for a weight of a Hugging Face checkpoint; an unknown one keeps its own, for messages."""
    return _decoder_name(spelled, HUGGING_FACE_NAMES, r"model\.layers\.(\d+)\.(.+)", HUGGING_FACE_LAYER_NAMES)


def from_gguf(spelled: str) -> str:
    """As ``from_hugging_face``, for a GGUF file."""
    return _decoder_name(spelled, GGUF_NAMES, r"blk\.(\d+)\.(.+)", GGUF_LAYER_NAMES)


def _decoder_name(spelled: str, names: Mapping[str, str], layer_pattern: str, layer_names: Mapping[str, str]) -> str:
    layer = re.fullmatch(layer_pattern, spelled)
    if layer is None:
        return names.get(spelled, spelled)
    name = layer_names.get(layer[2])
    return spelled if name is None else f"layers.{layer[1]}.{name}"
