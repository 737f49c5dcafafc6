"""Writing paged KV caches in Triton: one launch rotates queries and keys, quantizes, and stores keys and values.

Memory: key and value [T, Hkv, D]; query [T, Hq, D]; caches [N, S, Hkv, D] with any strides; slot_mapping int64 [T],
block * S + offset, -1 skips; cos_sin [P, rotary_dim], cosines in its first half. A program takes one token and either
all of its KV heads (second grid axis 0) or its query heads (1). A pair of a query is loaded and stored by one thread,
so rotating in place is safe. fp8 is made by bit arithmetic: not every chip, nor the interpreter, converts to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.quantization import LARGEST, scale_mode, token_strides
from pagedattn.kernels.tiling import next_power_of_2

FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8", torch.uint8: "int4"}


@triton.jit
def round_to_even(x):
    """Nearest integer, ties to even, of |x| < 2**22: adding 1.5 * 2**23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """fp32 as an 8-bit float with MANTISSA bits and an exponent bias, nearest even, saturated, as uint8."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    PER_SUBNORMAL: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    bits += ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
    normal = (bits >> DROPPED) - ((127 - BIAS) << MANTISSA)
    subnormal = round_to_even(magnitude * PER_SUBNORMAL).to(tl.int32)
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def encode_integer(x, LARGEST: tl.constexpr):
    """fp32 as a symmetric integer, nearest even, saturated, as int32; NaN as 0."""
    x = tl.where(x != x, 0.0, x)
    return round_to_even(tl.minimum(tl.maximum(x, -LARGEST), LARGEST)).to(tl.int32)


@triton.jit
def load_heads(
    source_ptr, stride_head, head, dim, cos_sin_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Elements dim [1, D] of heads [H, 1], the first ROTARY_DIM of each rotated in fp32, in the source's dtype."""
    source_ptr += head * stride_head
    exists = (head < NUM_HEADS) & (dim < HEAD_DIM)
    values = tl.load(source_ptr + dim, mask=exists, other=0.0)
    if ROTARY_DIM > 0:
        PAIRS: tl.constexpr = ROTARY_DIM // 2
        rotates = dim < ROTARY_DIM
        if INTERLEAVED:
            is_first = dim % 2 == 0
            pair = dim // 2
            partner = tl.where(is_first, dim + 1, dim - 1)
        else:
            is_first = dim < PAIRS
            pair = tl.where(is_first, dim, dim - PAIRS)
            partner = tl.where(is_first, dim + PAIRS, dim - PAIRS)
        cos = tl.load(cos_sin_ptr + pair, mask=rotates, other=1.0).to(tl.float32)
        sin = tl.load(cos_sin_ptr + PAIRS + pair, mask=rotates, other=0.0).to(tl.float32)
        other = tl.load(source_ptr + partner, mask=exists & rotates, other=0.0).to(tl.float32)
        rotated = values.to(tl.float32) * cos + tl.where(is_first, -other, other) * sin
        values = tl.where(rotates, rotated.to(values.dtype), values)
    return values


@triton.jit
def rotate_in_place(
    source_ptr, stride_head, cos_sin_ptr,
    ROTARY_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROTARY_DIM elements of every head, in fp32."""
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    head = tl.arange(0, HEADS_PADDED)[:, None].to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)
    exists = pair < PAIRS
    cos = tl.load(cos_sin_ptr + pair, mask=exists, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + PAIRS + pair, mask=exists, other=0.0).to(tl.float32)[None, :]
    first_dim = pair * 2 if INTERLEAVED else pair
    second_dim = first_dim + (1 if INTERLEAVED else PAIRS)
    mask = (head < NUM_HEADS) & exists[None, :]
    source_ptr += head * stride_head
    first = tl.load(source_ptr + first_dim[None, :], mask=mask, other=0.0)
    second = tl.load(source_ptr + second_dim[None, :], mask=mask, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    tl.store(source_ptr + first_dim[None, :], (x * cos - y * sin).to(first.dtype), mask=mask)
    tl.store(source_ptr + second_dim[None, :], (y * cos + x * sin).to(first.dtype), mask=mask)


@triton.jit
def store_token(
    source_ptr, stride_head, cos_sin_ptr,
    cache_ptr, stride_cache_head, scale_ptr, stride_scale_head,
    NUM_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Store a token's heads in its slot: rotated, scaled and quantized, with the scale if each token has its own."""
    head = tl.arange(0, HEADS_PADDED)[:, None].to(tl.int64)
    # Of int4, even and odd elements go into the low and high halves of the bytes.
    dim = tl.arange(0, DIM_PADDED)[None, :] * (2 if FORMAT == "int4" else 1)
    even = load_heads(source_ptr, stride_head, head, dim, cos_sin_ptr, NUM_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    exists = (head < NUM_HEADS) & (dim < HEAD_DIM)
    if FORMAT == "cast":
        tl.store(cache_ptr + head * stride_cache_head + dim, even, mask=exists)
    else:
        even = even.to(tl.float32)
        odd = even
        if FORMAT == "int4":
            odd = load_heads(
                source_ptr, stride_head, head, dim + 1, cos_sin_ptr, NUM_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED
            ).to(tl.float32)
        if SCALE == 1:
            scale = tl.load(scale_ptr + head * 0)
        elif SCALE == 2:
            scale = tl.load(scale_ptr + head, mask=head < NUM_HEADS, other=1.0)
        else:
            largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1, keep_dims=True)
            scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
            scale = tl.where(scale > 0.0, scale, 1.0)
            tl.store(scale_ptr + head * stride_scale_head, scale, mask=head < NUM_HEADS)
        even = tl.div_rn(even, tl.broadcast_to(scale, even.shape))
        cache_ptr += head * stride_cache_head
        if FORMAT == "e4m3":
            tl.store(cache_ptr + dim, encode_float8(even, 3, 7, LARGEST), mask=exists)
        elif FORMAT == "e5m2":
            tl.store(cache_ptr + dim, encode_float8(even, 2, 15, LARGEST), mask=exists)
        elif FORMAT == "int8":
            tl.store(cache_ptr + dim, encode_integer(even, LARGEST).to(tl.int8), mask=exists)
        else:
            odd = tl.div_rn(odd, tl.broadcast_to(scale, odd.shape))
            packed = (encode_integer(even, LARGEST) & 15) | ((encode_integer(odd, LARGEST) & 15) << 4)
            tl.store(cache_ptr + dim // 2, packed.to(tl.uint8), mask=exists)


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
    k_scale_ptr,
    v_scale_ptr,
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
    stride_k_scale_block,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_v_scale_block,
    stride_v_scale_slot,
    stride_v_scale_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if ROTARY_DIM > 0:
        cos_sin_ptr += tl.load(positions_ptr + token).to(tl.int64) * stride_cos_sin
    if tl.program_id(1) == 1:
        if ROTARY_DIM > 0:
            rotate_in_place(
                query_ptr + token * stride_query_token, stride_query_head, cos_sin_ptr,
                ROTARY_DIM, NUM_HEADS, HEADS_PADDED, PAIRS_PADDED, INTERLEAVED,
            )  # fmt: skip
    else:
        index = tl.load(slot_mapping_ptr + token)
        if index >= 0:
            block = index // BLOCK_SIZE
            slot = index % BLOCK_SIZE
            key_cache_ptr += block * stride_key_cache_block + slot * stride_key_cache_slot
            value_cache_ptr += block * stride_value_cache_block + slot * stride_value_cache_slot
            if K_SCALE == 3:
                k_scale_ptr += block * stride_k_scale_block + slot * stride_k_scale_slot
            if V_SCALE == 3:
                v_scale_ptr += block * stride_v_scale_block + slot * stride_v_scale_slot
            store_token(
                key_ptr + token * stride_key_token, stride_key_head, cos_sin_ptr,
                key_cache_ptr, stride_key_cache_head, k_scale_ptr, stride_k_scale_head,
                NUM_KV_HEADS, KV_HEADS_PADDED, HEAD_DIM, KEY_PADDED, ROTARY_DIM, INTERLEAVED, FORMAT, LARGEST, K_SCALE,
            )  # fmt: skip
            store_token(
                value_ptr + token * stride_value_token, stride_value_head, cos_sin_ptr,
                value_cache_ptr, stride_value_cache_head, v_scale_ptr, stride_v_scale_head,
                NUM_KV_HEADS, KV_HEADS_PADDED, HEAD_DIM_V, VALUE_PADDED, 0, False, FORMAT, LARGEST, V_SCALE,
            )  # fmt: skip


class PreparedAppend:
    """All of an append that follows from shapes, strides and dtypes, for any tensors that share them."""

    __slots__ = ("_launch",)

    def __init__(
        self,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        cos_sin: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        interleaved: bool = False,
    ) -> None:
        num_tokens, num_kv_heads, head_size = key.shape
        head_size_v = value.shape[2]
        rotary_dim, stride_cos_sin, num_heads = 0, 0, 1
        query_strides: tuple[int, ...] = (0, 0)
        if query is not None and cos_sin is not None:
            query_strides, num_heads = query.stride()[:2], query.shape[1]
            stride_cos_sin, rotary_dim = cos_sin.stride(0), cos_sin.shape[1]
        cache_format = FORMATS.get(key_cache.dtype, "cast")
        per_element = 2 if cache_format == "int4" else 1
        strides = (
            *query_strides, *key.stride()[:2], *value.stride()[:2], stride_cos_sin,
            *key_cache.stride()[:3], *value_cache.stride()[:3], *token_strides(k_scale), *token_strides(v_scale),
        )  # fmt: skip
        constants = (
            key_cache.shape[1],
            num_heads, next_power_of_2(num_heads), num_kv_heads, next_power_of_2(num_kv_heads),
            head_size, next_power_of_2(head_size // per_element),
            head_size_v, next_power_of_2(head_size_v // per_element),
            rotary_dim, next_power_of_2(max(1, rotary_dim // 2)), interleaved,
            cache_format, LARGEST.get(key_cache.dtype, 0.0), scale_mode(k_scale), scale_mode(v_scale),
        )  # fmt: skip
        self._launch = launch_append.prepare(
            (key.dtype, key_cache.dtype, specialized(strides), constants),
            (num_tokens, 1 if query is None else 2),
            key.device,
            (*strides, *constants),
            sees_bits=True,  # fp8 is made by bit arithmetic
            num_warps=4,
            enable_fp_fusion=False,  # rotated keys are rounded as the reference rounds them, and so are their scales
        )

    def __call__(
        self,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        cos_sin: Tensor | None,
        positions: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:
        """Rotate query in place if there is one, and store each token's key and value in its slot."""
        self._launch((query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, k_scale, v_scale))


launch_append = Launcher(append_kv_kernel)
