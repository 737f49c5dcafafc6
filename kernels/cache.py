"""Writing paged KV caches in Triton: one launch rotates queries and keys and stores keys and values.

Memory: key and value [T, Hkv, D]; query [T, Hq, D]; caches [N, S, Hkv, D] with any strides; slot_mapping int64 [T],
block * S + offset, -1 skips; cos_sin [P, rotary_dim], cosines in its first half. A program takes one token and either
all of its KV heads (second grid axis 0) or its query heads (1). A rotated pair is loaded and stored by one thread, so
rotating in place is safe.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher
from pagedattn.kernels.tiling import next_power_of_2


@triton.jit
def copy_heads(
    source_ptr, destination_ptr, stride_source_head, stride_destination_head,
    FIRST: tl.constexpr, END: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM_PADDED:
    tl.constexpr,
):  # fmt: skip
    """Copy elements FIRST..END of every head."""
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = FIRST + tl.arange(0, DIM_PADDED)[None, :]
    mask = (head < NUM_HEADS) & (dim < END)
    values = tl.load(source_ptr + head * stride_source_head + dim, mask=mask, other=0.0)
    tl.store(destination_ptr + head * stride_destination_head + dim, values, mask=mask)


@triton.jit
def rotate_heads(
    source_ptr, destination_ptr, stride_source_head, stride_destination_head, cos_sin_ptr,
    ROTARY_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROTARY_DIM elements of every head, in fp32."""
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    head = tl.arange(0, HEADS_PADDED)[:, None]
    pair = tl.arange(0, PAIRS_PADDED)
    exists = pair < PAIRS
    cos = tl.load(cos_sin_ptr + pair, mask=exists, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + PAIRS + pair, mask=exists, other=0.0).to(tl.float32)[None, :]
    first_dim = pair * 2 if INTERLEAVED else pair
    second_dim = first_dim + (1 if INTERLEAVED else PAIRS)
    mask = (head < NUM_HEADS) & exists[None, :]
    source = source_ptr + head * stride_source_head
    first = tl.load(source + first_dim[None, :], mask=mask, other=0.0)
    second = tl.load(source + second_dim[None, :], mask=mask, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    destination = destination_ptr + head * stride_destination_head
    tl.store(destination + first_dim[None, :], (x * cos - y * sin).to(first.dtype), mask=mask)
    tl.store(destination + second_dim[None, :], (y * cos + x * sin).to(first.dtype), mask=mask)


@triton.jit
def append_kv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_sin_ptr,
    positions_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_cos_sin,
    stride_key_cache_block,
    stride_key_cache_slot,
    stride_key_cache_head,
    stride_value_cache_block,
    stride_value_cache_slot,
    stride_value_cache_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if ROTARY_DIM > 0:
        cos_sin_ptr += tl.load(positions_ptr + token).to(tl.int64) * stride_cos_sin
    if tl.program_id(1) == 1:
        if ROTARY_DIM > 0:
            query_ptr += token * stride_query_token
            rotate_heads(
                query_ptr, query_ptr, stride_query_head, stride_query_head, cos_sin_ptr,
                ROTARY_DIM, NUM_HEADS, HEADS_PADDED, PAIRS_PADDED, INTERLEAVED,
            )  # fmt: skip
    else:
        index = tl.load(slot_mapping_ptr + token)
        if index >= 0:
            block = index // BLOCK_SIZE
            slot = index % BLOCK_SIZE
            key_cache_ptr += block * stride_key_cache_block + slot * stride_key_cache_slot
            value_cache_ptr += block * stride_value_cache_block + slot * stride_value_cache_slot
            key_ptr += token * stride_key_token
            value_ptr += token * stride_value_token
            copy_heads(
                value_ptr, value_cache_ptr, stride_value_head, stride_value_cache_head,
                0, HEAD_DIM_V, NUM_KV_HEADS, KV_HEADS_PADDED, HEAD_DIM_V_PADDED,
            )  # fmt: skip
            if ROTARY_DIM > 0:
                rotate_heads(
                    key_ptr, key_cache_ptr, stride_key_head, stride_key_cache_head, cos_sin_ptr,
                    ROTARY_DIM, NUM_KV_HEADS, KV_HEADS_PADDED, PAIRS_PADDED, INTERLEAVED,
                )  # fmt: skip
            if ROTARY_DIM < HEAD_DIM:
                copy_heads(
                    key_ptr, key_cache_ptr, stride_key_head, stride_key_cache_head,
                    ROTARY_DIM, HEAD_DIM, NUM_KV_HEADS, KV_HEADS_PADDED, REST_PADDED,
                )  # fmt: skip


def append_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot."""
    _launch(None, key, value, None, None, key_cache, value_cache, slot_mapping, interleaved=False)


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
) -> None:
    """Rotate query in place, and append the rotated key and the value."""
    _launch(query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, interleaved=interleaved)


def _launch(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool,
) -> None:
    num_tokens, num_kv_heads, head_size = key.shape
    rotary_dim, stride_cos_sin, num_heads = 0, 0, 1
    query_strides: tuple[int, ...] = (0, 0)
    if query is not None and cos_sin is not None:
        query_strides, num_heads = query.stride()[:2], query.shape[1]
        stride_cos_sin, rotary_dim = cos_sin.stride(0), cos_sin.shape[1]
    strides = (
        *query_strides, *key.stride()[:2], *value.stride()[:2], stride_cos_sin,
        *key_cache.stride()[:3], *value_cache.stride()[:3],
    )  # fmt: skip
    constants = (
        key_cache.shape[1],
        num_heads, next_power_of_2(num_heads), num_kv_heads, next_power_of_2(num_kv_heads),
        head_size, value.shape[2], next_power_of_2(value.shape[2]),
        rotary_dim, next_power_of_2(max(1, rotary_dim // 2)), next_power_of_2(max(1, head_size - rotary_dim)),
        interleaved,
    )  # fmt: skip
    launch_append(
        (key.dtype, strides, constants),
        (num_tokens, 1 if query is None else 2),
        (query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping),
        key.device,
        (*strides, *constants),
        num_warps=4,
    )


launch_append = Launcher(append_kv_kernel)


def unsupported(key: Tensor, key_cache: Tensor) -> str:
    """The first feature that these kernels do not have yet, or nothing."""
    return "" if key_cache.dtype == key.dtype else f"a {key_cache.dtype} cache"
