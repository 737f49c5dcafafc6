"""Writing, reading and copying paged KV caches in torch: what the Triton kernels must do, and the path of CPU tensors.

Layouts: key and value [T, Hkv, D]; caches [N, S, Hkv, D] of any strides; slot_mapping int64 [T], block * S + offset,
-1 skips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedattn.kernels.quantization import LARGEST, dequantize, quantize, token_scale


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Store each token's key and value in its slot, quantized if the caches are; [N, S, Hkv] scales are written."""
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    block_size = key_cache.shape[1]
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    for tensor, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        used = scale
        if scale is not None and scale.dim() == 3:
            used = token_scale(tensor, cache.dtype)
            scale[slots] = used.to(scale.dtype)
        cache[slots] = quantize(tensor, cache.dtype, used)


def rotate(tensor: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., 2021) of [T, H, D] by the tokens' rows of cos_sin [T, rotary_dim], in fp32."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.float()[:, None].chunk(2, dim=-1)
    rotated = tensor[..., :rotary_dim].float()
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    rotated = rotated.to(tensor.dtype)
    return rotated if rotary_dim == tensor.shape[-1] else torch.cat((rotated, tensor[..., rotary_dim:]), dim=-1)


def rope_append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate query in place, and append the rotated key and the value."""
    rows = cos_sin[positions]
    query.copy_(rotate(query, rows, interleaved))
    append_kv(
        rotate(key, rows, interleaved), value, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def copy_blocks(src_key: Tensor, src_value: Tensor, dst_key: Tensor, dst_value: Tensor, block_mapping: Tensor) -> None:
    """Copy blocks block_mapping[:, 0] of the sources to blocks block_mapping[:, 1]; reads come before writes."""
    # Keys and values may share memory, as in latent attention: both are read first.
    read = [source[block_mapping[:, 0].to(source.device)] for source in (src_key, src_value)]
    for blocks, destination in zip(read, (dst_key, dst_value), strict=True):
        destination[block_mapping[:, 1].to(destination.device)] = blocks.to(destination.device)


def gather_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Each sequence's keys and values side by side: two [B, max_seq_len, Hkv, D], zero past each length."""
    block_size = key_cache.shape[1]
    position = torch.arange(max_seq_len, device=key_cache.device)
    inside = position < seq_lens[:, None]
    if not key_cache.shape[0] or not block_table.shape[1]:
        ids = torch.zeros_like(inside, dtype=torch.int64)
    else:
        ids = (
            block_table[:, (position // block_size).clamp_max(block_table.shape[1] - 1)].long().masked_fill(~inside, 0)
        )

    def read(cache: Tensor, scale: Tensor | None) -> Tensor:
        if not cache.shape[0]:
            return torch.zeros(*inside.shape, *cache.shape[2:], dtype=dtype, device=cache.device)
        slots = (ids, (position % block_size).expand_as(ids))
        stored, used = cache[slots], scale[slots] if scale is not None and scale.dim() == 3 else scale
        quantized = cache.dtype in LARGEST
        values = dequantize(stored, used).to(dtype) if quantized or used is not None else stored.to(dtype)
        return values.masked_fill_(~inside[..., None, None], 0)

    return read(key_cache, k_scale), read(value_cache, v_scale)
