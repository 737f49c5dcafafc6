"""Paged attention in Triton: one launch for decodes, prefill chunks and any mixture of them.

Memory: query [T, Hq, D]; key_cache [N, S, Hkv, D]; value_cache [N, S, Hkv, Dv] (int4: D / 2 bytes, low nibble the even
element); block_table [B, max_blocks]; items and counts as ``kernels/plan_reference.py`` describes. A program runs one
item, or a worker's chain of them, for one head tile: the item's query tokens times HEADS of the query heads that share
a KV head are the rows of the products, laid token by token, so row r is query token r // HEADS and head r % HEADS of
the head tile. Split tiles leave normalized fp32 partials [slots, head_tiles, slot_rows, Dv] and their log2-sum-exp; in
a batch-invariant plan they are as the running softmax had them, with maximum and denominator apart.

Keys are computed with as they are stored: a scale per tensor or head joins the logits' scale, one per token the logits'
columns. Values' scales per tensor or head join the result; with one per token, values are scaled before the product.

Online softmax: Milakov and Gimelshein, 2018. Tiling: FlashAttention-2 (Dao, 2023). Splitting keys: Flash-Decoding
(Dao et al., 2023). Block tables: PagedAttention (Kwon et al., SOSP 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import ALIGNMENT, Launcher, specialized
from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.overlap import is_hopper
from pagedattn.kernels.plan import chunk_begin, chunk_of
from pagedattn.kernels.quantization import TOKEN_SCALE, scale_mode, token_strides
from pagedattn.kernels.tiling import (
    ITEM_FIELDS,
    AttentionTiling,
    CacheRows,
    choose_hopper_decode,
    choose_hopper_prefill,
    choose_launch,
    next_power_of_2,
)

INTERPRETER_SHARED_MEMORY = 1 << 16


# --- reading the cache ------------------------------------------------------------------------------------------------


@triton.jit
def load_pages(table_ptr, position, first_key, end_key, BLOCK_SIZE: tl.constexpr):
    """Block ids of key positions [BLOCK_N]; 0 outside first_key..end_key. To widen them is to wait for them."""
    inside = (position >= first_key) & (position < end_key)
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0)


@triton.jit
def load_stored(ptrs, inside, exists, IS_MASKED: tl.constexpr, IS_PADDED: tl.constexpr):
    """Load [BLOCK_N, DIM], masking rows and columns only where some may be missing."""
    if IS_MASKED:
        stored = tl.load(ptrs, mask=inside[:, None] & exists[None, :], other=0.0)
    elif IS_PADDED:
        stored = tl.load(ptrs, mask=exists[None, :], other=0.0)
    else:
        stored = tl.load(ptrs)
    return stored


@triton.jit
def load_tokens(
    cache_ptr,
    offset,
    inside,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Stored numbers of tokens at ``offset`` [BLOCK_N] as DTYPE [BLOCK_N, DIM_PADDED], 0 past DIM; FORMAT as stored."""
    if FORMAT == "int4":
        byte = tl.arange(0, DIM_PADDED // 2)
        ptrs = cache_ptr + offset[:, None] + byte[None, :]
        packed = load_stored(ptrs, inside, byte < DIM // 2, IS_MASKED, DIM != DIM_PADDED).to(tl.int32)
        low = (packed << 28) >> 28
        high = (packed << 24) >> 28
        values = tl.interleave(low.to(DTYPE), high.to(DTYPE))
    else:
        dim = tl.arange(0, DIM_PADDED)
        ptrs = cache_ptr + offset[:, None] + dim[None, :]
        stored = load_stored(ptrs, inside, dim < DIM, IS_MASKED, DIM != DIM_PADDED)
        values = decode_e4m3(stored).to(DTYPE) if FORMAT == "e4m3 bits" else stored.to(DTYPE)
    return values


@triton.jit
def decode_e4m3(stored):
    """uint8 bits of e4m3 as fp16, where the chip has no such conversion: its exponent is fp16's, less 8."""
    bits = stored.to(tl.uint16)
    halves = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    halves = tl.where((bits & 0x7F) == 0x7F, 0x7E00, halves)
    return halves.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def load_scale(scale_ptr, kv_head, MODE: tl.constexpr):
    """A scale that all tokens share, 1 where there is none or each token has its own."""
    if MODE == 1:
        scale = tl.load(scale_ptr)
    elif MODE == 2:
        scale = tl.load(scale_ptr + kv_head)
    else:
        scale = 1.0
    return scale


# --- softmax ----------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Within 2e-7 everywhere, and relatively so near 0, where 1 - 2 / (exp(2x) + 1) would cancel.

    The minimax polynomial is that of Cephes (Moshier, 1989).
    """
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(square < 0.390625, near, far)


@triton.jit
def multiply_by_keys(query, key, DIM: tl.constexpr):
    """Logits [ROWS, BLOCK_N]. In fp32, products are added up 32 at a time, and then these sums: added up one after the
    other, each would be rounded by the size of all that came before it."""
    if query.dtype == tl.float32 and DIM > 32:
        query_parts = tl.permute(tl.reshape(query, [query.shape[0], DIM // 32, 32]), (1, 0, 2))
        key_parts = tl.permute(tl.reshape(key, [key.shape[0], DIM // 32, 32]), (1, 2, 0))
        logits = tl.sum(tl.dot(query_parts, key_parts, input_precision="ieee"), axis=0)
    else:
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
    return logits


@triton.jit
def finite_shift(maximum):
    """What to subtract before exponentiating: the maximum, 0 where that is -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def finish_softmax(accumulator, maximum, denominator):
    """Normalized result [ROWS, D] and log2-sum-exp [ROWS]; 0 and -inf where nothing was visible."""
    denominator = tl.where(denominator == 0.0, 1.0, denominator)
    return accumulator / denominator[:, None], maximum + tl.log2(denominator)


@triton.jit
def add_partial(accumulator, maximum, denominator, partial, partial_maximum, partial_denominator):
    """Add a partial [ROWS, D] to a running sum of partials. A normalized one has its log2-sum-exp and 1."""
    new_maximum = tl.maximum(maximum, partial_maximum)
    shift = finite_shift(new_maximum)
    correction = tl.exp2(maximum - shift)
    weight = tl.exp2(partial_maximum - shift)
    accumulator = accumulator * correction[:, None] + partial * weight[:, None]
    return accumulator, new_maximum, denominator * correction + partial_denominator * weight


@triton.jit
def add_sink(result, lse, sink):
    """One logit more, of a value 0, in the denominator of a normalized result."""
    maximum = tl.maximum(lse, sink)
    shift = finite_shift(maximum)
    weight = tl.exp2(lse - shift)
    denominator = weight + tl.exp2(sink - shift)
    denominator = tl.where(denominator == 0.0, 1.0, denominator)
    return result * (weight / denominator)[:, None], maximum + tl.log2(denominator)


@triton.jit
def attend_keys(
    query,
    query_rest,
    accumulator,
    maximum,
    denominator,
    query_position,
    slope_log2,
    tree_row_ptr,
    table_ptr,
    keys,
    values,
    begin,
    end,
    visible,
    factors,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    FEATURES: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Fold keys begin..end into the running softmax of a tile. Without IS_MASKED every row sees every one of them.

    keys, values: (pointer, strides of block and slot, scale pointer, its strides). visible: (first key, end key,
    position of the first query token, window, attention chunk). factors: (logit scale, softcap * log2(e)).
    KEYS, VALUES: (DIM, DIM_PADDED, REST, FORMAT, scale mode). FEATURES: (window, chunk, softcap, ALiBi, tree).
    """
    key_ptr, stride_key_block, stride_key_slot, k_scale_ptr, stride_k_scale_block, stride_k_scale_slot = keys
    value_ptr, stride_value_block, stride_value_slot, v_scale_ptr, stride_v_scale_block, stride_v_scale_slot = values
    KEY_DIM: tl.constexpr = KEYS[0]
    KEY_PADDED: tl.constexpr = KEYS[1]
    KEY_REST: tl.constexpr = KEYS[2]
    KEY_FORMAT: tl.constexpr = KEYS[3]
    K_SCALE: tl.constexpr = KEYS[4]
    VALUE_DIM: tl.constexpr = VALUES[0]
    VALUE_PADDED: tl.constexpr = VALUES[1]
    VALUE_FORMAT: tl.constexpr = VALUES[3]
    V_SCALE: tl.constexpr = VALUES[4]
    first_key, end_key, origin, sliding_window, attention_chunk = visible
    logit_scale, softcap_log2 = factors
    HAS_WINDOW: tl.constexpr = FEATURES[0]
    HAS_CHUNK: tl.constexpr = FEATURES[1]
    HAS_SOFTCAP: tl.constexpr = FEATURES[2]
    HAS_ALIBI: tl.constexpr = FEATURES[3]
    HAS_TREE: tl.constexpr = FEATURES[4]
    DTYPE: tl.constexpr = query.dtype

    offset = tl.arange(0, BLOCK_N)
    pages = load_pages(table_ptr, begin + offset, first_key, end_key, BLOCK_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        position = start + offset
        slot = position % BLOCK_SIZE
        block = pages.to(tl.int64)
        key_offset = block * stride_key_block + slot * stride_key_slot
        value_offset = block * stride_value_block + slot * stride_value_slot
        if K_SCALE == 3:
            k_scale_ptrs = k_scale_ptr + block * stride_k_scale_block + slot * stride_k_scale_slot
        if V_SCALE == 3:
            v_scale_ptrs = v_scale_ptr + block * stride_v_scale_block + slot * stride_v_scale_slot
        # The next iteration's pages are fetched here, so that no load of keys waits for the table.
        pages = load_pages(table_ptr, position + BLOCK_N, first_key, end_key, BLOCK_SIZE)
        inside = (position >= first_key) & (position < end_key)
        key = load_tokens(key_ptr, key_offset, inside, KEY_DIM, KEY_PADDED, KEY_FORMAT, IS_MASKED, DTYPE)
        logits = multiply_by_keys(query, key, KEY_PADDED)
        if KEY_REST > 0:
            rest_ptr = key_ptr + (KEY_DIM // 2 if KEY_FORMAT == "int4" else KEY_DIM)
            rest = load_tokens(rest_ptr, key_offset, inside, KEY_REST, KEY_REST, KEY_FORMAT, IS_MASKED, DTYPE)
            logits += multiply_by_keys(query_rest, rest, KEY_REST)
        value = load_tokens(value_ptr, value_offset, inside, VALUE_DIM, VALUE_PADDED, VALUE_FORMAT, IS_MASKED, DTYPE)
        if V_SCALE == 3:
            # Not into the probabilities: what is multiplied there is rounded once more.
            v_scale = tl.load(v_scale_ptrs, mask=inside, other=0.0)
            value = (value.to(tl.float32) * v_scale[:, None]).to(DTYPE)

        if K_SCALE == 3:
            logits *= tl.load(k_scale_ptrs, mask=inside, other=0.0)[None, :]
        logits *= logit_scale
        if HAS_SOFTCAP:
            logits = tanh(logits) * softcap_log2
        distance = query_position[:, None] - position[None, :]
        if HAS_ALIBI:
            logits -= slope_log2[:, None] * tl.abs(distance).to(tl.float32)
        if IS_MASKED:
            sees = inside[None, :] & (query_position >= 0)[:, None]
            if CAUSAL:
                sees = sees & (distance >= 0)
            if HAS_WINDOW:
                sees = sees & (tl.abs(distance) < sliding_window)
            if HAS_CHUNK:
                # Positions below 0 are masked anyway.
                query_chunk = tl.maximum(query_position, 0) // attention_chunk
                sees = sees & (query_chunk[:, None] == (position // attention_chunk)[None, :])
            if HAS_TREE:
                column = (position - origin)[None, :]
                in_tree = sees & (column >= 0)
                picked = tl.load(tree_row_ptr[:, None] + column, mask=in_tree, other=0)
                sees = sees & ((column < 0) | (picked != 0))
            logits = tl.where(sees, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        shift = finite_shift(new_maximum) if IS_MASKED else new_maximum
        probabilities = tl.exp2(logits - shift[:, None])
        correction = tl.exp2(maximum - shift)
        denominator = denominator * correction + tl.sum(probabilities, axis=1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(probabilities.to(DTYPE), value, accumulator, input_precision="ieee")
        maximum = new_maximum
    return accumulator, maximum, denominator


@triton.jit
def attend_span(
    query,
    query_rest,
    query_position,
    slope_log2,
    tree_row_ptr,
    table_ptr,
    keys,
    values,
    begin,
    end,
    first_position,
    last_position,
    origin,
    limits,
    factors,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    FEATURES: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Attention of a tile over its keys begin..end: accumulator [ROWS, Dv], maximum and denominator [ROWS].

    Keys that every row sees need no mask. IS_ALIGNED: iterations begin at multiples of BLOCK_N of the sequence.
    """
    HAS_WINDOW: tl.constexpr = FEATURES[0]
    HAS_CHUNK: tl.constexpr = FEATURES[1]
    HAS_TREE: tl.constexpr = FEATURES[4]
    VALUE_PADDED: tl.constexpr = VALUES[1]
    sliding_window, attention_chunk = limits
    accumulator = tl.zeros([ROWS, VALUE_PADDED], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    denominator = tl.zeros([ROWS], dtype=tl.float32)

    whole_begin = begin  # the keys between these two are seen by all rows
    whole_end = end
    if CAUSAL:
        whole_end = tl.minimum(whole_end, first_position + 1)
    if HAS_TREE:
        whole_end = tl.minimum(whole_end, origin)
    if HAS_WINDOW:
        whole_begin = tl.maximum(whole_begin, last_position - sliding_window + 1)
        if not CAUSAL:
            whole_end = tl.minimum(whole_end, first_position + sliding_window)
    if HAS_CHUNK:
        whole_begin = tl.maximum(whole_begin, tl.maximum(last_position, 0) // attention_chunk * attention_chunk)
        whole_end = tl.minimum(whole_end, (tl.maximum(first_position, 0) // attention_chunk + 1) * attention_chunk)
    if first_position < 0:  # rows before the sequence see nothing: mask them
        whole_end = begin
    start = begin // BLOCK_N * BLOCK_N if IS_ALIGNED else begin
    whole_begin = start + tl.cdiv(whole_begin - start, BLOCK_N) * BLOCK_N
    whole_end = whole_begin + tl.maximum(whole_end - whole_begin, 0) // BLOCK_N * BLOCK_N

    visible = (begin, end, origin, sliding_window, attention_chunk)
    if HAS_WINDOW or HAS_CHUNK:
        accumulator, maximum, denominator = attend_keys(
            query, query_rest, accumulator, maximum, denominator, query_position, slope_log2, tree_row_ptr, table_ptr,
            keys, values, start, tl.minimum(whole_begin, end), visible, factors,
            KEYS, VALUES, BLOCK_SIZE, BLOCK_N, CAUSAL, FEATURES, IS_MASKED=True,
        )  # fmt: skip
    accumulator, maximum, denominator = attend_keys(
        query, query_rest, accumulator, maximum, denominator, query_position, slope_log2, tree_row_ptr, table_ptr,
        keys, values, whole_begin, whole_end, visible, factors,
        KEYS, VALUES, BLOCK_SIZE, BLOCK_N, CAUSAL, FEATURES, IS_MASKED=False,
    )  # fmt: skip
    accumulator, maximum, denominator = attend_keys(
        query, query_rest, accumulator, maximum, denominator, query_position, slope_log2, tree_row_ptr, table_ptr,
        keys, values, whole_end, end, visible, factors,
        KEYS, VALUES, BLOCK_SIZE, BLOCK_N, CAUSAL, FEATURES, IS_MASKED=True,
    )  # fmt: skip
    return accumulator, maximum, denominator


# --- writing ----------------------------------------------------------------------------------------------------------


@triton.jit
def write_rows(
    out_ptr,
    lse_ptr,
    result,
    lse,
    row_token,
    row_head,
    row_exists,
    num_heads,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Write result [ROWS, Dv] and lse [ROWS] to rows (row_token, row_head) of out and lse."""
    dim = tl.arange(0, HEAD_DIM_PADDED)
    row_offset = row_token.to(tl.int64) * stride_out_token + row_head.to(tl.int64) * stride_out_head
    mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_ptr + row_offset[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
    if RETURN_LSE:
        tl.store(lse_ptr + row_token.to(tl.int64) * num_heads + row_head, lse, mask=row_exists)


@triton.jit
def store_partial(
    partials_ptr,
    partial_lse_offset,
    partial,
    maximum,
    denominator,
    slot,
    head_tile,
    num_head_tiles,
    slot_rows,
    row_exists,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
):
    """Store one slot of a split tile for one head tile. A normalized partial's maximum is its log2-sum-exp."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    partial_row = (slot.to(tl.int64) * num_head_tiles + head_tile) * slot_rows + row
    mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partials_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :], partial, mask=mask)
    tl.store(partials_ptr + partial_lse_offset + partial_row, maximum, mask=row_exists)
    if BATCH_INVARIANT:  # denominators lie behind the maxima
        denominators_ptr = partials_ptr + partial_lse_offset + partial_lse_offset // HEAD_DIM
        tl.store(denominators_ptr + partial_row, denominator, mask=row_exists)


@triton.jit
def merge_partials(
    partials_ptr,
    partial_lse_offset,
    first_slot,
    num_slots,
    head_tile,
    num_head_tiles,
    slot_rows,
    row_exists,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WALKS: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
):
    """Add up the slots of a split tile for one head tile, in the order of its keys."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    accumulator = tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    denominator = tl.zeros([ROWS], dtype=tl.float32)
    lse_ptr = partials_ptr + partial_lse_offset
    for index in tl.range(0, num_slots):
        slot = first_slot + index
        if WALKS and not BATCH_INVARIANT:  # workers that follow each other continue the tile, each into its even slot
            slot = tl.where(index == 0, first_slot, 2 * (first_slot // 2 + index))
        partial_row = (slot.to(tl.int64) * num_head_tiles + head_tile) * slot_rows + row
        # Other multiprocessors wrote these: read past this one's first-level cache.
        lse = tl.load(lse_ptr + partial_row, mask=row_exists, other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partials_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :]
        partial = tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        weight = 1.0
        if BATCH_INVARIANT:
            weight_ptr = lse_ptr + partial_lse_offset // HEAD_DIM
            weight = tl.load(weight_ptr + partial_row, mask=row_exists, other=0.0, cache_modifier=".cg")
        accumulator, maximum, denominator = add_partial(accumulator, maximum, denominator, partial, lse, weight)
    return finish_softmax(accumulator, maximum, denominator)


@triton.jit(
    do_not_specialize=[
        "partial_lse_offset",
        "logit_scale",
        "softcap_log2",
        "sliding_window",
        "attention_chunk",
        "num_tokens",
        "num_workers",
        "slot_rows",
    ],
)
def paged_attention_kernel(
    out_ptr,
    lse_ptr,
    partials_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    items_ptr,
    counts_ptr,
    alibi_slopes_ptr,
    sinks_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    tree_mask_ptr,
    partial_lse_offset,
    logit_scale,
    softcap_log2,
    sliding_window,
    attention_chunk,
    num_tokens,
    num_workers,
    num_kv_heads,
    slot_rows,
    stride_out_token,
    stride_out_head,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_slot,
    stride_key_head,
    stride_value_block,
    stride_value_slot,
    stride_value_head,
    stride_table_sequence,
    stride_k_scale_block,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_v_scale_block,
    stride_v_scale_slot,
    stride_v_scale_head,
    stride_tree_token,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    FORMAT: tl.constexpr,
    QUERY_FORMAT: tl.constexpr,
    Q_SCALE: tl.constexpr,
    K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES_PER_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    WALKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    TILES_PER_KV_HEAD: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    FEATURES: tl.constexpr = (HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, HAS_ALIBI, HAS_TREE)
    KEYS: tl.constexpr = (KEY_DIM, KEY_PADDED, KEY_REST, FORMAT, K_SCALE)
    VALUES: tl.constexpr = (VALUE_DIM, VALUE_PADDED, 0, FORMAT, V_SCALE)
    num_head_tiles = num_kv_heads * TILES_PER_KV_HEAD
    num_heads = num_kv_heads * GROUP
    program = tl.program_id(0)
    head_tile = program % num_head_tiles
    item = program // num_head_tiles
    kv_head = head_tile // TILES_PER_KV_HEAD
    first_head = (head_tile % TILES_PER_KV_HEAD) * HEADS  # in the group
    row = tl.arange(0, ROWS)
    row_query = row // HEADS
    row_head = kv_head * GROUP + first_head + row % HEADS
    in_tile = (row_query < QUERIES_PER_TILE) & (first_head + row % HEADS < GROUP)
    kv_head_64 = kv_head.to(tl.int64)
    logit_scale *= load_scale(q_scale_ptr, kv_head, Q_SCALE) * load_scale(k_scale_ptr, kv_head, K_SCALE)
    if K_SCALE == 3:
        k_scale_ptr += kv_head_64 * stride_k_scale_head
    if V_SCALE == 3:
        v_scale_ptr += kv_head_64 * stride_v_scale_head
    keys = (
        key_ptr + kv_head_64 * stride_key_head, stride_key_block, stride_key_slot,
        k_scale_ptr, stride_k_scale_block, stride_k_scale_slot,
    )  # fmt: skip
    values = (
        value_ptr + kv_head_64 * stride_value_head, stride_value_block, stride_value_slot,
        v_scale_ptr, stride_v_scale_block, stride_v_scale_slot,
    )  # fmt: skip
    limits = (sliding_window, attention_chunk)
    factors = (logit_scale, softcap_log2)

    padding_tile = item
    if not WALKS:  # programs past the list write the rows that belong to no sequence
        padding_tile -= tl.load(counts_ptr)
        item = tl.where(padding_tile < 0, item, -1)

    while item >= 0:
        item_ptr = items_ptr + item * FIELDS
        sequence = tl.load(item_ptr)
        first_row = tl.load(item_ptr + 1)
        queries = tl.load(item_ptr + 2)
        first_position = tl.load(item_ptr + 3)
        begin = tl.load(item_ptr + 4)
        planned_end = tl.load(item_ptr + 5)
        slot = tl.load(item_ptr + 6)
        first_slot = tl.load(item_ptr + 7)
        num_slots = tl.load(item_ptr + 8)
        awaited = tl.load(item_ptr + 9)
        next_item = tl.load(item_ptr + 10)
        origin = tl.load(item_ptr + 11)
        last_position = first_position + queries - 1
        row_exists = in_tile & (row_query < queries)
        row_token = first_row + row_query
        query_position = first_position + row_query

        query_offset = row_token.to(tl.int64) * stride_query_token + row_head.to(tl.int64) * stride_query_head
        dim = tl.arange(0, KEY_PADDED)
        mask = row_exists[:, None] & (dim < KEY_DIM)[None, :]
        query = tl.load(query_ptr + query_offset[:, None] + dim[None, :], mask=mask, other=0.0)
        query = decode_e4m3(query).to(DTYPE) if QUERY_FORMAT == "e4m3 bits" else query.to(DTYPE)
        query_rest = query
        if KEY_REST > 0:
            dim_rest = KEY_DIM + tl.arange(0, KEY_REST)
            rest_ptrs = query_ptr + query_offset[:, None] + dim_rest[None, :]
            query_rest = tl.load(rest_ptrs, mask=row_exists[:, None], other=0.0)
            query_rest = decode_e4m3(query_rest) if QUERY_FORMAT == "e4m3 bits" else query_rest
            query_rest = query_rest.to(DTYPE)
        slope_log2 = query_position.to(tl.float32)
        if HAS_ALIBI:
            slope_log2 = tl.load(alibi_slopes_ptr + row_head, mask=row_exists, other=0.0) * 1.4426950408889634
        tree_row_ptr = tree_mask_ptr
        if HAS_TREE:
            tree_row_ptr += tl.where(row_exists, row_token, first_row).to(tl.int64) * stride_tree_token
        table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table_sequence

        planned_begin = begin
        end = planned_end
        if CAUSAL:
            end = tl.minimum(end, last_position + 1)
        if HAS_CHUNK:
            begin = tl.maximum(begin, tl.maximum(first_position, 0) // attention_chunk * attention_chunk)
            end = tl.minimum(end, (tl.maximum(last_position, 0) // attention_chunk + 1) * attention_chunk)

        arrived = 1
        if BATCH_INVARIANT:
            # One partial for each chunk of the sequence, folded from the first on: here as far as nothing is ahead of
            # this item, and by the merge.
            folds = slot <= first_slot  # an unsplit tile's slot is -1
            accumulator = tl.zeros([ROWS, VALUE_PADDED], dtype=tl.float32)
            maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
            denominator = tl.zeros([ROWS], dtype=tl.float32)
            first_chunk = chunk_of(planned_begin)
            chunk = first_chunk
            walked_end = end if folds else planned_end  # every slot is written, also of keys that no row sees
            while chunk_begin(chunk) < walked_end:
                partial, partial_maximum, partial_denominator = attend_span(
                    query, query_rest, query_position, slope_log2, tree_row_ptr, table_ptr, keys, values,
                    tl.maximum(begin, chunk_begin(chunk)), tl.minimum(end, chunk_begin(chunk + 1)),
                    first_position, last_position, origin, limits, factors,
                    KEYS, VALUES, ROWS, BLOCK_SIZE, BLOCK_N, CAUSAL, FEATURES, IS_ALIGNED=True,
                )  # fmt: skip
                if folds:
                    accumulator, maximum, denominator = add_partial(
                        accumulator, maximum, denominator, partial, partial_maximum, partial_denominator
                    )
                else:
                    store_partial(
                        partials_ptr, partial_lse_offset, partial, partial_maximum, partial_denominator,
                        slot + chunk - first_chunk, head_tile, num_head_tiles, slot_rows, row_exists,
                        VALUE_DIM, VALUE_PADDED, ROWS, BATCH_INVARIANT,
                    )  # fmt: skip
                chunk += 1
            if (slot >= 0) & folds:
                store_partial(
                    partials_ptr, partial_lse_offset, accumulator, maximum, denominator, slot,
                    head_tile, num_head_tiles, slot_rows, row_exists, VALUE_DIM, VALUE_PADDED, ROWS, BATCH_INVARIANT,
                )  # fmt: skip
            arrived = tl.where(folds, 1, chunk - first_chunk)
            result, lse_log2 = finish_softmax(accumulator, maximum, denominator)
        else:
            accumulator, maximum, denominator = attend_span(
                query, query_rest, query_position, slope_log2, tree_row_ptr, table_ptr, keys, values,
                begin, end, first_position, last_position, origin, limits, factors,
                KEYS, VALUES, ROWS, BLOCK_SIZE, BLOCK_N, CAUSAL, FEATURES, IS_ALIGNED=False,
            )  # fmt: skip
            result, lse_log2 = finish_softmax(accumulator, maximum, denominator)
            if slot >= 0:
                store_partial(
                    partials_ptr, partial_lse_offset, result, lse_log2, denominator, slot,
                    head_tile, num_head_tiles, slot_rows, row_exists, VALUE_DIM, VALUE_PADDED, ROWS, BATCH_INVARIANT,
                )  # fmt: skip

        is_last = slot < 0  # the only item of its tile, or the one that finds all others done
        if slot >= 0:
            tl.debug_barrier()  # all threads have stored before one of them says so
            arrivals_ptr = counts_ptr + 4 + first_slot * num_head_tiles + head_tile
            is_last = tl.atomic_add(arrivals_ptr, arrived, sem="acq_rel") == awaited - arrived
            if BATCH_INVARIANT:
                is_last = is_last & (arrived > 0)  # who has nothing to add may come after the last
            if is_last:
                tl.store(arrivals_ptr, 0)  # as the next layer expects it
                result, lse_log2 = merge_partials(
                    partials_ptr, partial_lse_offset, first_slot, num_slots,
                    head_tile, num_head_tiles, slot_rows, row_exists, VALUE_DIM, VALUE_PADDED, ROWS, WALKS,
                    BATCH_INVARIANT,
                )  # fmt: skip
        if is_last:
            result *= load_scale(v_scale_ptr, kv_head, V_SCALE)
            if HAS_SINKS:
                has_sink = row_exists & (query_position >= 0)
                sink = tl.load(sinks_ptr + row_head, mask=has_sink, other=float("-inf")) * 1.4426950408889634
                result, lse_log2 = add_sink(result, lse_log2, sink)
            write_rows(
                out_ptr, lse_ptr, result, lse_log2 * 0.6931471805599453, row_token, row_head, row_exists, num_heads,
                stride_out_token, stride_out_head, VALUE_DIM, VALUE_PADDED, RETURN_LSE,
            )  # fmt: skip
        item = next_item

    first_padding = tl.load(counts_ptr + 1) + padding_tile * QUERIES_PER_TILE
    if padding_tile >= 0:
        while first_padding < num_tokens:
            row_token = first_padding + row_query
            zeros = tl.zeros([ROWS, VALUE_PADDED], dtype=tl.float32)
            empty = tl.full([ROWS], float("-inf"), dtype=tl.float32)
            write_rows(
                out_ptr, lse_ptr, zeros, empty, row_token, row_head, in_tile & (row_token < num_tokens), num_heads,
                stride_out_token, stride_out_head, VALUE_DIM, VALUE_PADDED, RETURN_LSE,
            )  # fmt: skip
            first_padding += num_workers * QUERIES_PER_TILE


# --- launching --------------------------------------------------------------------------------------------------------


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one thread block may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@lru_cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether the chip converts e4m3 itself: from Ada (8.9) on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def storage_format(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernel has to read elements of a dtype: a FORMAT of ``load_tokens``."""
    if dtype == torch.uint8:
        return "int4"
    if dtype == torch.float8_e4m3fn and not converts_e4m3(device):
        return "e4m3 bits"
    return "cast"


@dataclass(frozen=True)
class HeadSizes:
    """How the kernel holds heads: in powers of two, of which 576 is two."""

    key: int
    key_padded: int
    key_rest: int
    value: int
    value_padded: int

    @classmethod
    def of(cls, head_size: int, head_size_v: int, is_int4: bool) -> HeadSizes:
        """Of int4, heads are held as at least 32: Triton 3.6 unpacks tiles of 8 bytes a row wrongly."""
        rest = 64 if head_size == 576 else 0
        key, least = head_size - rest, 32 if is_int4 else 16
        return cls(key, max(least, next_power_of_2(key)), rest, head_size_v, max(least, next_power_of_2(head_size_v)))


def cache_itemsize(cache: Tensor) -> float:
    """Bytes of an element of a head, as stored."""
    return 0.5 if cache.dtype == torch.uint8 else cache.element_size()


HALF_DTYPES = (torch.float16, torch.bfloat16)


def prepare_hopper(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    tiling: AttentionTiling,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
) -> Any:
    """The Hopper kernel's launch, where there is that chip and a kernel of its own for such a call; else None."""
    if not is_hopper(query.device):
        return None
    if options.tree_mask is not None or options.q_scale is not None or query.dtype not in HALF_DTYPES:
        return None
    key_rows = CacheRows.of(key_cache.shape, key_cache.stride(), key_cache.element_size())
    value_rows = CacheRows.of(value_cache.shape, value_cache.stride(), value_cache.element_size())
    decode = choose_hopper_decode(
        tiling=tiling,
        head_size=query.shape[2],
        head_size_v=out.shape[2],
        cache_itemsize=cache_itemsize(key_cache),
        block_size=key_cache.shape[1],
        key_rows=key_rows,
        value_rows=value_rows,
        has_token_scales=TOKEN_SCALE in (scale_mode(options.k_scale), scale_mode(options.v_scale)),
    )
    if decode is not None:
        from pagedattn.kernels.hopper_decode import PreparedHopperDecode

        return PreparedHopperDecode(query, key_cache, block_table, tiling, decode, options, out, lse)
    has_scales = options.k_scale is not None or options.v_scale is not None
    is_aligned = all(stride * query.element_size() % ALIGNMENT == 0 for stride in query.stride()[:2])
    if {key_cache.dtype, out.dtype} != {query.dtype} or has_scales or not options.scale > 0 or not is_aligned:
        return None
    prefill = choose_hopper_prefill(
        tiling=tiling,
        head_size=query.shape[2],
        head_size_v=out.shape[2],
        block_size=key_cache.shape[1],
        key_rows=key_rows,
        value_rows=value_rows,
        multiprocessors=torch.cuda.get_device_properties(query.device).multi_processor_count,
    )
    if prefill is None:
        return None
    from pagedattn.kernels.hopper_prefill import PreparedHopperPrefill

    return PreparedHopperPrefill(query, key_cache, block_table, tiling, prefill, options, out, lse)


def workspace(elements: int, device: torch.device, workspaces: dict[int, Tensor] | None) -> Tensor:
    """fp32 [elements], whose content is nobody's."""
    if workspaces is None:
        return torch.empty(elements, dtype=torch.float32, device=device)
    found = workspaces.get(elements)
    if found is None:
        found = workspaces[elements] = torch.empty(elements, dtype=torch.float32, device=device)
    return found


class PreparedAttention:
    """All of a call that follows from shapes, strides, dtypes and host numbers, for any tensors that share them."""

    __slots__ = ("_copies_query", "_hopper", "_launch", "_partial_elements", "_reads_bits")

    def __init__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        tiling: AttentionTiling,
        options: AttentionOptions,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        device = query.device
        num_tokens, num_heads, head_size = query.shape
        num_kv_heads, head_size_v = key_cache.shape[2], out.shape[2]
        self._hopper = prepare_hopper(query, key_cache, value_cache, block_table, tiling, options, out, lse)
        self._copies_query = self._hopper is not None and tiling.batch_invariant
        heads = HeadSizes.of(head_size, head_size_v, key_cache.dtype == torch.uint8)
        launch = choose_launch(
            rows=tiling.rows,
            head_size=head_size,
            head_size_v=head_size_v,
            itemsize=out.element_size(),
            cache_itemsize=cache_itemsize(key_cache),
            shared_memory=shared_memory(device),
        )
        programs = tiling.workers
        if not programs:  # every sequence has at most one ragged tile, and so has the padding behind the last sequence
            num_seqs = block_table.shape[0]
            all_tiles = num_seqs * tiling.tiles_per_sequence
            programs = min(all_tiles, num_tokens // tiling.queries_per_tile + num_seqs) + tiling.max_items - all_tiles
            programs += num_tokens // tiling.queries_per_tile + 1
        partial_rows = tiling.max_slots * tiling.head_tiles * tiling.slot_rows
        self._partial_elements = partial_rows * (head_size_v + (2 if tiling.batch_invariant else 1))
        tree_mask = options.tree_mask
        strides = (
            *out.stride()[:2], *query.stride()[:2],
            *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
            *token_strides(options.k_scale), *token_strides(options.v_scale),
            0 if tree_mask is None else tree_mask.stride(0),
        )  # fmt: skip
        kv_format, query_format = storage_format(key_cache.dtype, device), storage_format(query.dtype, device)
        self._reads_bits = "e4m3 bits" in (kv_format, query_format)
        constants = (
            num_heads // num_kv_heads, tiling.heads_per_tile,
            heads.key, heads.key_padded, heads.key_rest, heads.value, heads.value_padded,
            kv_format, query_format,
            scale_mode(options.q_scale), scale_mode(options.k_scale), scale_mode(options.v_scale),
            key_cache.shape[1], tiling.rows, tiling.queries_per_tile, launch.block_n,
            options.causal and tree_mask is None, options.sliding_window is not None,
            options.attention_chunk is not None, options.softcap is not None, options.alibi_slopes is not None,
            options.sinks is not None, tree_mask is not None,
            tiling.batch_invariant, tiling.workers > 0, lse is not None, ITEM_FIELDS,
        )  # fmt: skip
        self._launch = launch_attention.prepare(
            (query.dtype, key_cache.dtype, out.dtype, specialized((num_kv_heads, *strides)), constants),
            (programs * tiling.head_tiles, 1),
            device,
            (
                partial_rows * head_size_v,
                *options.numbers,
                num_tokens,
                programs,
                num_kv_heads,
                tiling.slot_rows,
                *strides,
                *constants,
            ),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            # Masked and unmasked iterations must round alike, or where a mask begins would show in the result.
            enable_fp_fusion=False,
        )

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        plan: tuple[Tensor, Tensor] | list[Tensor],
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        q_scale: Tensor | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        tree_mask: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        workspaces: dict[int, Tensor] | None = None,
    ) -> None:
        """Write attention into ``out`` [T, Hq, Dv] and its log-sum-exp into ``lse`` (fp32 [T, Hq]).

        ``workspaces``: fp32 tensors by number of elements, of calls that do not overlap; what is missing is added.
        """
        partials = workspace(self._partial_elements, query.device, workspaces)
        if self._copies_query and query.data_ptr() % ALIGNMENT:  # the other kernel would sum in another order
            query = torch.empty_strided(query.shape, query.stride(), dtype=query.dtype, device=query.device).copy_(
                query
            )
        addresses = query.data_ptr() | key_cache.data_ptr() | value_cache.data_ptr()
        if self._hopper is not None and not addresses % ALIGNMENT:
            self._hopper(
                query, key_cache, value_cache, block_table, plan, alibi_slopes, sinks, k_scale, v_scale,
                partials, out, lse,
            )  # fmt: skip
            return
        if self._reads_bits:
            query, key_cache, value_cache = (
                tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
                for tensor in (query, key_cache, value_cache)
            )
        if tree_mask is not None:
            tree_mask = tree_mask.view(torch.uint8)
        items, counts = plan
        self._launch(
            (
                out, lse, partials, query, key_cache, value_cache, block_table, items, counts,
                alibi_slopes, sinks, q_scale, k_scale, v_scale, tree_mask,
            )
        )  # fmt: skip


launch_attention = Launcher(paged_attention_kernel)
