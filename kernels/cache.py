"""Writing paged KV caches in Triton: one launch rotates queries and keys, quantizes, and stores keys and values.

Memory: key and value [T, Hkv, D]; query [T, Hq, D]; caches [N, S, Hkv, D] with any strides; slot_mapping int64 [T],
block * S + offset, -1 skips; cos_sin [P, rotary_dim], cosines in its first half. A program takes a few heads of one
token: of its key and value, or of its query. The kernel moves bytes and waits for memory, so a program asks for all
that it needs before it waits for any of it. Left alone the compiler waits for slot and position first, to compute
addresses; so they are loaded last, between barriers, which no load passes. The
barrier also keeps the loads of a query before its stores, so rotating in place is safe. fp8 is made by bit arithmetic:
not every chip, nor the interpreter, converts to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.overlap import let_next_start, overlaps, wait_for_previous
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
def load_angles(cos_sin_ptr, pair, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines of pairs [1, N] as [HEADS, N]; 1 and 0 past the last, which rotate nothing.

    Loaded for each head: of one row the compiler would spread every element to another thread, and shuffle the heads.
    """
    pair = tl.broadcast_to(pair, (HEADS, pair.shape[1]))
    exists = pair < PAIRS
    cos = tl.load(cos_sin_ptr + pair, mask=exists, other=1.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + PAIRS + pair, mask=exists, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def rotate(first, second, cos, sin):
    """Rotate pairs in fp32, back to their dtype."""
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * cos - y * sin).to(first.dtype), (y * cos + x * sin).to(first.dtype)


@triton.jit
def load_heads(
    source_ptr, stride_head, head, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """Heads [HEADS, 1] as [HEADS, DIM_PADDED], zero where there is nothing."""
    dim = tl.arange(0, DIM_PADDED)[None, :]
    return tl.load(source_ptr + head * stride_head + dim, mask=(head < NUM_HEADS) & (dim < HEAD_DIM), other=0.0)


@triton.jit
def load_partners(
    source_ptr, stride_head, head, NUM_HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr
):
    """What each of the first ROTARY_DIM elements is rotated with, if the halves of a pair lie ROTARY_DIM / 2 apart."""
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    dim = tl.arange(0, DIM_PADDED)[None, :]
    partner = tl.where(dim < PAIRS, dim + PAIRS, dim - PAIRS)
    mask = (head < NUM_HEADS) & (dim < ROTARY_DIM)
    return tl.load(source_ptr + head * stride_head + partner, mask=mask, other=0.0)


@triton.jit
def rotate_halves(
    values, partners, cos_sin_ptr, HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr
):
    """Rotate the first ROTARY_DIM elements of [HEADS, DIM_PADDED], pairs of which lie ROTARY_DIM / 2 apart."""
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    dim = tl.arange(0, DIM_PADDED)[None, :]
    is_first = dim < PAIRS
    cos, sin = load_angles(cos_sin_ptr, tl.where(is_first, dim, dim - PAIRS), HEADS, PAIRS)
    rotated, _ = rotate(values, partners, cos, tl.where(is_first, sin, -sin))
    return tl.where(dim < ROTARY_DIM, rotated, values)


@triton.jit
def rotate_neighbours(values, cos_sin_ptr, HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """Rotate the first ROTARY_DIM elements of [HEADS, DIM_PADDED], pairs of which are neighbours."""
    first, second = tl.split(tl.reshape(values, (HEADS, DIM_PADDED // 2, 2)))
    cos, sin = load_angles(cos_sin_ptr, tl.arange(0, DIM_PADDED // 2)[None, :], HEADS, ROTARY_DIM // 2)
    first, second = rotate(first, second, cos, sin)
    rotated = tl.reshape(tl.join(first, second), (HEADS, DIM_PADDED))
    return tl.where(tl.arange(0, DIM_PADDED)[None, :] < ROTARY_DIM, rotated, values)


@triton.jit
def rotate_in_place(
    source_ptr, stride_head, head, cos_sin_ptr, stride_cos_sin, position_ptr,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, PAIRS_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROTARY_DIM elements of heads [HEADS, 1]."""
    PAIRS: tl.constexpr = ROTARY_DIM // 2
    source_ptr += head * stride_head
    if INTERLEAVED:
        dim = tl.arange(0, 2 * PAIRS_PADDED)[None, :]
        mask = (head < NUM_HEADS) & (dim < ROTARY_DIM)
        values = tl.load(source_ptr + dim, mask=mask, other=0.0)
        tl.debug_barrier()
        cos_sin_ptr += tl.load(position_ptr) * stride_cos_sin
        rotated = rotate_neighbours(values, cos_sin_ptr, HEADS, 2 * PAIRS_PADDED, ROTARY_DIM)
        tl.store(source_ptr + dim, rotated, mask=mask)
    else:
        pair = tl.arange(0, PAIRS_PADDED)[None, :]
        mask = (head < NUM_HEADS) & (pair < PAIRS)
        first = tl.load(source_ptr + pair, mask=mask, other=0.0)
        second = tl.load(source_ptr + PAIRS + pair, mask=mask, other=0.0)
        tl.debug_barrier()
        cos_sin_ptr += tl.load(position_ptr) * stride_cos_sin
        cos, sin = load_angles(cos_sin_ptr, pair, HEADS, PAIRS)
        first, second = rotate(first, second, cos, sin)
        tl.store(source_ptr + pair, first, mask=mask)
        tl.store(source_ptr + PAIRS + pair, second, mask=mask)


@triton.jit
def store_heads(
    values, cache_ptr, stride_cache_head, scale_ptr, stride_scale_head, head, num_stored,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Store the first num_stored heads in their slot, scaled and quantized, and the scale if each token has its own."""
    dim = tl.arange(0, DIM_PADDED)[None, :]
    is_stored = head < num_stored
    mask = is_stored & (dim < HEAD_DIM)
    cache_ptr += head * stride_cache_head
    if FORMAT == "cast":
        tl.store(cache_ptr + dim, values, mask=mask)
    else:
        values = values.to(tl.float32)
        if SCALE == 1:
            scale = tl.load(scale_ptr + head * 0)
        elif SCALE == 2:
            scale = tl.load(scale_ptr + head, mask=head < NUM_HEADS, other=1.0)
        else:
            largest = tl.max(tl.abs(values), axis=1, keep_dims=True)
            scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
            scale = tl.where(scale > 0.0, scale, 1.0)
            tl.store(scale_ptr + head * stride_scale_head, scale, mask=is_stored)
        values = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
        if FORMAT == "e4m3":
            tl.store(cache_ptr + dim, encode_float8(values, 3, 7, LARGEST), mask=mask)
        elif FORMAT == "e5m2":
            tl.store(cache_ptr + dim, encode_float8(values, 2, 15, LARGEST), mask=mask)
        elif FORMAT == "int8":
            tl.store(cache_ptr + dim, encode_integer(values, LARGEST).to(tl.int8), mask=mask)
        else:
            nibbles = tl.reshape(encode_integer(values, LARGEST) & 15, (HEADS, DIM_PADDED // 2, 2))
            low, high = tl.split(nibbles)
            byte = tl.arange(0, DIM_PADDED // 2)[None, :]
            tl.store(cache_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=is_stored & (byte < HEAD_DIM // 2))


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
    HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_PROGRAMS: tl.constexpr,
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
    OVERLAP: tl.constexpr,
):
    """HEADS and KV_HEADS: of a program. A token's first KV_PROGRAMS take its keys and values, the others its query."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < KV_PROGRAMS:
        head = (part * KV_HEADS + tl.arange(0, KV_HEADS))[:, None].to(tl.int64)
        key_ptr += token * stride_key_token
        value_ptr += token * stride_value_token
        value = load_heads(value_ptr, stride_value_head, head, NUM_KV_HEADS, HEAD_DIM_V, VALUE_PADDED)
        key = load_heads(key_ptr, stride_key_head, head, NUM_KV_HEADS, HEAD_DIM, KEY_PADDED)
        partners = key
        if ROTARY_DIM > 0 and not INTERLEAVED:
            partners = load_partners(key_ptr, stride_key_head, head, NUM_KV_HEADS, KEY_PADDED, ROTARY_DIM)
        tl.debug_barrier()
        index = tl.load(slot_mapping_ptr + token)
        if ROTARY_DIM > 0:
            cos_sin_ptr += tl.load(positions_ptr + token) * stride_cos_sin
            tl.debug_barrier()
            if INTERLEAVED:
                key = rotate_neighbours(key, cos_sin_ptr, KV_HEADS, KEY_PADDED, ROTARY_DIM)
            else:
                key = rotate_halves(key, partners, cos_sin_ptr, KV_HEADS, KEY_PADDED, ROTARY_DIM)
        num_stored = tl.where(index >= 0, NUM_KV_HEADS, 0)
        block = index // BLOCK_SIZE
        slot = index % BLOCK_SIZE
        if K_SCALE == 3:
            k_scale_ptr += block * stride_k_scale_block + slot * stride_k_scale_slot
        if V_SCALE == 3:
            v_scale_ptr += block * stride_v_scale_block + slot * stride_v_scale_slot
        store_heads(
            key, key_cache_ptr + block * stride_key_cache_block + slot * stride_key_cache_slot, stride_key_cache_head,
            k_scale_ptr, stride_k_scale_head, head, num_stored,
            NUM_KV_HEADS, KV_HEADS, HEAD_DIM, KEY_PADDED, FORMAT, LARGEST, K_SCALE,
        )  # fmt: skip
        store_heads(
            value, value_cache_ptr + block * stride_value_cache_block + slot * stride_value_cache_slot,
            stride_value_cache_head, v_scale_ptr, stride_v_scale_head, head, num_stored,
            NUM_KV_HEADS, KV_HEADS, HEAD_DIM_V, VALUE_PADDED, FORMAT, LARGEST, V_SCALE,
        )  # fmt: skip
    else:
        if ROTARY_DIM > 0:
            query_head = ((part - KV_PROGRAMS) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
            rotate_in_place(
                query_ptr + token * stride_query_token, stride_query_head, query_head,
                cos_sin_ptr, stride_cos_sin, positions_ptr + token,
                NUM_HEADS, HEADS, PAIRS_PADDED, ROTARY_DIM, INTERLEAVED,
            )  # fmt: skip


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AppendLaunch:
    """How many heads of a token one program takes, and with how many warps."""

    heads: int
    kv_heads: int
    num_warps: int


FEW_ELEMENTS, MANY_ELEMENTS = 1024, 4096  # of a program; 8 and 32 for each of its threads
MANY_TOKENS = 1024


def choose_append_launch(num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int) -> AppendLaunch:
    """Few tokens are spread over many programs, so that all bytes are asked for at once; many need no such care."""
    elements = FEW_ELEMENTS if num_tokens < MANY_TOKENS else MANY_ELEMENTS
    most = max(1, elements // next_power_of_2(head_size))
    heads, kv_heads = next_power_of_2(num_heads), next_power_of_2(num_kv_heads)
    return AppendLaunch(min(heads, most), min(kv_heads, most), 4)


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
        strides = (
            *query_strides, *key.stride()[:2], *value.stride()[:2], stride_cos_sin,
            *key_cache.stride()[:3], *value_cache.stride()[:3], *token_strides(k_scale), *token_strides(v_scale),
        )  # fmt: skip
        launch = choose_append_launch(num_tokens, num_heads, num_kv_heads, max(head_size, head_size_v))
        kv_programs = -(-num_kv_heads // launch.kv_heads)
        query_programs = 0 if query is None else -(-num_heads // launch.heads)
        overlap = overlaps(key.device)
        constants = (
            key_cache.shape[1],
            num_heads, launch.heads, num_kv_heads, launch.kv_heads, kv_programs,
            head_size, next_power_of_2(head_size), head_size_v, next_power_of_2(head_size_v),
            rotary_dim, next_power_of_2(max(1, rotary_dim // 2)), interleaved,
            cache_format, LARGEST.get(key_cache.dtype, 0.0), scale_mode(k_scale), scale_mode(v_scale),
            overlap,
        )  # fmt: skip
        self._launch = launch_append.prepare(
            (key.dtype, key_cache.dtype, specialized(strides), constants),
            (num_tokens, kv_programs + query_programs),
            key.device,
            (*strides, *constants),
            sees_bits=True,  # fp8 is made by bit arithmetic
            num_warps=launch.num_warps,
            launch_pdl=overlap,
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
