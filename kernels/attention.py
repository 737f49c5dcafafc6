"""Paged attention in Triton: one launch for decodes, prefill chunks and any mixture of them.

Memory: query [T, Hq, D]; key_cache [N, S, Hkv, D]; value_cache [N, S, Hkv, D]; block_table [B, max_blocks]; items,
merges and counts as ``kernels/plan_reference.py`` describes. A program runs one item for one KV head: its tile's
query tokens times the GROUP query heads that share the KV head are the rows of the products, laid token by token, so
row r is query token r // GROUP and head r % GROUP. Split tiles leave normalized fp32 partials [slots, Hkv, ROWS, D]
and their log2-sum-exp.

Online softmax: Milakov and Gimelshein, 2018. Tiling: FlashAttention-2 (Dao, 2023). Splitting keys: Flash-Decoding
(Dao et al., 2023). Block tables: PagedAttention (Kwon et al., SOSP 2023).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher
from pagedattn.kernels.tiling import MAX_HEAD_SIZE, AttentionTiling, choose_launch, next_power_of_2

LOG2E = 1.4426950408889634
INTERPRETER_SHARED_MEMORY = 1 << 16


@triton.jit
def load_pages(table_ptr, position, end_key, BLOCK_SIZE: tl.constexpr):
    """Block ids of key positions [BLOCK_N] as int64; 0 from end_key on."""
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end_key, other=0).to(tl.int64)


@triton.jit
def attend_keys(
    query,
    accumulator,
    maximum,
    denominator,
    query_position,
    table_ptr,
    key_ptr,
    value_ptr,
    stride_key_block,
    stride_key_slot,
    stride_value_block,
    stride_value_slot,
    begin,
    end,
    end_key,
    scale_log2,
    sliding_window,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold keys begin..end into the running softmax of a tile. Without MASKED every row sees every one of them."""
    offset = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    dim_exists = dim < HEAD_DIM
    pages = load_pages(table_ptr, begin + offset, end_key, BLOCK_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        position = start + offset
        slot = position % BLOCK_SIZE
        key_offset = pages * stride_key_block + slot * stride_key_slot
        value_offset = pages * stride_value_block + slot * stride_value_slot
        # The next iteration's pages are fetched here, so that no load of keys waits for the table.
        pages = load_pages(table_ptr, position + BLOCK_N, end_key, BLOCK_SIZE)
        key_ptrs = key_ptr + key_offset[None, :] + dim[:, None]
        value_ptrs = value_ptr + value_offset[:, None] + dim[None, :]
        if MASKED:
            inside = position < end_key
            key = tl.load(key_ptrs, mask=inside[None, :] & dim_exists[:, None], other=0.0)
            value = tl.load(value_ptrs, mask=inside[:, None] & dim_exists[None, :], other=0.0)
        elif HEAD_DIM == HEAD_DIM_PADDED:
            key = tl.load(key_ptrs)
            value = tl.load(value_ptrs)
        else:
            key = tl.load(key_ptrs, mask=dim_exists[:, None], other=0.0)
            value = tl.load(value_ptrs, mask=dim_exists[None, :], other=0.0)

        logits = tl.dot(query, key, input_precision="ieee") * scale_log2
        if MASKED:
            distance = query_position[:, None] - position[None, :]
            visible = inside[None, :] & (query_position >= 0)[:, None]
            if CAUSAL:
                visible = visible & (distance >= 0)
            if HAS_WINDOW:
                visible = visible & (tl.abs(distance) < sliding_window)
            logits = tl.where(visible, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        shift = new_maximum
        if MASKED:
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probabilities = tl.exp2(logits - shift[:, None])
        correction = tl.exp2(maximum - shift)
        denominator = denominator * correction + tl.sum(probabilities, axis=1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision="ieee")
        maximum = new_maximum
    return accumulator, maximum, denominator


@triton.jit
def finish_softmax(accumulator, maximum, denominator):
    """Normalized result [ROWS, D] and log2-sum-exp [ROWS]; 0 and -inf where nothing was visible."""
    denominator = tl.where(denominator == 0.0, 1.0, denominator)
    return accumulator / denominator[:, None], maximum + tl.log2(denominator)


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
    """Write result [ROWS, D] and lse [ROWS] to rows (row_token, row_head) of out and lse."""
    dim = tl.arange(0, HEAD_DIM_PADDED)
    row_offset = row_token.to(tl.int64) * stride_out_token + row_head * stride_out_head
    mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_ptr + row_offset[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
    if RETURN_LSE:
        tl.store(lse_ptr + row_token.to(tl.int64) * num_heads + row_head, lse, mask=row_exists)


@triton.jit
def merge_partials(
    partial_out_ptr,
    partial_lse_ptr,
    first_slot,
    num_slots,
    kv_head,
    num_kv_heads,
    row_exists,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add up the slots of a split tile for one KV head, in the order of its chunks."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    accumulator = tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    denominator = tl.zeros([ROWS], dtype=tl.float32)
    for index in tl.range(0, num_slots):
        partial_row = ((first_slot + index) * num_kv_heads + kv_head) * ROWS + row
        # Other multiprocessors wrote these: read past this one's first-level cache.
        lse = tl.load(partial_lse_ptr + partial_row, mask=row_exists, other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partial_out_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :]
        partial = tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, lse)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        correction = tl.exp2(maximum - shift)
        weight = tl.exp2(lse - shift)
        accumulator = accumulator * correction[:, None] + partial * weight[:, None]
        denominator = denominator * correction + weight
        maximum = new_maximum
    return finish_softmax(accumulator, maximum, denominator)


@triton.jit(
    do_not_specialize=["partial_lse_offset", "scale_log2", "sliding_window", "num_tokens"],
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
    merges_ptr,
    counts_ptr,
    partial_lse_offset,
    scale_log2,
    sliding_window,
    num_tokens,
    num_kv_heads,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES_PER_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    item = program // num_kv_heads
    num_items = tl.load(counts_ptr)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    row_query = row // GROUP
    row_head = kv_head * GROUP + row % GROUP
    num_heads = num_kv_heads * GROUP

    if item >= num_items:  # programs past the list write the rows that belong to no sequence
        row_token = tl.load(counts_ptr + 2) + (item - num_items) * QUERIES_PER_TILE + row_query
        zeros = tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)
        row_exists = (row_query < QUERIES_PER_TILE) & (row_token < num_tokens)
        empty = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        write_rows(
            out_ptr, lse_ptr, zeros, empty, row_token, row_head, row_exists, num_heads,
            stride_out_token, stride_out_head, HEAD_DIM, HEAD_DIM_PADDED, RETURN_LSE,
        )  # fmt: skip
    else:
        item_ptr = items_ptr + item * 8
        sequence = tl.load(item_ptr)
        first_row = tl.load(item_ptr + 1)
        queries = tl.load(item_ptr + 2)
        first_position = tl.load(item_ptr + 3)
        begin = tl.load(item_ptr + 4)
        end = tl.load(item_ptr + 5)
        slot = tl.load(item_ptr + 6)
        last_position = first_position + queries - 1
        if CAUSAL:
            end = tl.minimum(end, last_position + 1)

        row_exists = row_query < queries
        row_token = first_row + row_query
        query_offset = row_token.to(tl.int64) * stride_query_token + row_head * stride_query_head
        query_mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
        query = tl.load(query_ptr + query_offset[:, None] + dim[None, :], mask=query_mask, other=0.0)
        query_position = first_position + row_query
        accumulator = tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)
        maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        denominator = tl.zeros([ROWS], dtype=tl.float32)

        # Keys that every row sees need no mask: they lie between the window of the last query and the first query.
        whole_end = end
        if CAUSAL:
            whole_end = tl.minimum(end, first_position + 1)
        if HAS_WINDOW and not CAUSAL:
            whole_end = tl.minimum(end, first_position + sliding_window)
        whole_begin = begin
        if HAS_WINDOW:
            ahead = tl.maximum(last_position - sliding_window + 1 - begin, 0)
            whole_begin = begin + tl.cdiv(ahead, BLOCK_N) * BLOCK_N
        if first_position < 0:  # rows before the sequence see nothing: mask them
            whole_end = begin
        whole_end = whole_begin + tl.maximum(whole_end - whole_begin, 0) // BLOCK_N * BLOCK_N

        table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table_sequence
        key_ptr += kv_head.to(tl.int64) * stride_key_head
        value_ptr += kv_head.to(tl.int64) * stride_value_head
        if HAS_WINDOW:
            accumulator, maximum, denominator = attend_keys(
                query, accumulator, maximum, denominator, query_position, table_ptr, key_ptr, value_ptr,
                stride_key_block, stride_key_slot, stride_value_block, stride_value_slot,
                begin, tl.minimum(whole_begin, end), end, scale_log2, sliding_window,
                HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, BLOCK_N, CAUSAL, HAS_WINDOW, MASKED=True,
            )  # fmt: skip
        accumulator, maximum, denominator = attend_keys(
            query, accumulator, maximum, denominator, query_position, table_ptr, key_ptr, value_ptr,
            stride_key_block, stride_key_slot, stride_value_block, stride_value_slot,
            whole_begin, whole_end, end, scale_log2, sliding_window,
            HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, BLOCK_N, CAUSAL, HAS_WINDOW, MASKED=False,
        )  # fmt: skip
        accumulator, maximum, denominator = attend_keys(
            query, accumulator, maximum, denominator, query_position, table_ptr, key_ptr, value_ptr,
            stride_key_block, stride_key_slot, stride_value_block, stride_value_slot,
            whole_end, end, end, scale_log2, sliding_window,
            HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, BLOCK_N, CAUSAL, HAS_WINDOW, MASKED=True,
        )  # fmt: skip

        result, lse_log2 = finish_softmax(accumulator, maximum, denominator)
        is_last = slot < 0  # the only item of its tile, or the one that finds all others done
        if slot >= 0:
            partial_lse_ptr = partials_ptr + partial_lse_offset
            partial_row = (slot.to(tl.int64) * num_kv_heads + kv_head) * ROWS + row
            mask = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
            tl.store(partials_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :], result, mask=mask)
            tl.store(partial_lse_ptr + partial_row, lse_log2, mask=row_exists)
            tl.debug_barrier()  # all threads have stored before one of them says so
            merge = tl.load(item_ptr + 7)
            first_slot = tl.load(merges_ptr + merge * 2).to(tl.int64)
            num_slots = tl.load(merges_ptr + merge * 2 + 1)
            arrivals_ptr = counts_ptr + 4 + merge * num_kv_heads + kv_head
            is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_slots - 1
            if is_last:
                tl.store(arrivals_ptr, 0)  # as the next layer expects it
                result, lse_log2 = merge_partials(
                    partials_ptr, partial_lse_ptr, first_slot, num_slots, kv_head, num_kv_heads, row_exists,
                    HEAD_DIM, HEAD_DIM_PADDED, ROWS,
                )  # fmt: skip
        if is_last:
            write_rows(
                out_ptr, lse_ptr, result, lse_log2 * 0.6931471805599453, row_token, row_head, row_exists, num_heads,
                stride_out_token, stride_out_head, HEAD_DIM, HEAD_DIM_PADDED, RETURN_LSE,
            )  # fmt: skip


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one thread block may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    plan_items: Tensor,
    merges: Tensor,
    counts: Tensor,
    *,
    tiling: AttentionTiling,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Write attention into ``out`` [T, Hq, D] and its log-sum-exp into ``lse`` (fp32 [T, Hq]; None: not wanted)."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[2]
    group = num_heads // num_kv_heads
    launch = choose_launch(
        rows=tiling.rows, head_size=head_size, itemsize=query.element_size(), shared_memory=shared_memory(query.device)
    )
    padded = max(16, next_power_of_2(head_size))
    # Every sequence has at most one ragged tile, and so has the padding behind the last sequence.
    num_seqs = block_table.shape[0]
    all_tiles = num_seqs * tiling.tiles_per_sequence
    items = min(all_tiles, num_tokens // tiling.queries_per_tile + num_seqs) + tiling.max_items - all_tiles
    items += num_tokens // tiling.queries_per_tile + 1
    partial_rows = tiling.max_slots * num_kv_heads * tiling.rows
    partials = out.new_empty(partial_rows * (head_size + 1), dtype=torch.float32)
    strides = (
        *out.stride()[:2], *query.stride()[:2],
        *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
    )  # fmt: skip
    constants = (
        group, head_size, padded, key_cache.shape[1], tiling.rows, tiling.queries_per_tile, launch.block_n,
        causal, sliding_window is not None, lse is not None,
    )  # fmt: skip
    launch_attention(
        (query.dtype, num_kv_heads, strides, constants),
        (items * num_kv_heads, 1),
        (out, lse, partials, query, key_cache, value_cache, block_table, plan_items, merges, counts),
        query.device,
        (
            partial_rows * head_size,
            scale * LOG2E,
            sliding_window or 0,
            num_tokens,
            num_kv_heads,
            *strides,
            *constants,
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


launch_attention = Launcher(paged_attention_kernel)


def unsupported(query: Tensor, key_cache: Tensor, value_cache: Tensor, **given: object) -> str:
    """The first feature that these kernels do not have yet, or nothing. ``given`` maps optional arguments to values."""
    for name, value in given.items():
        if value is not None:
            return name
    head_size, head_size_v = query.shape[2], value_cache.shape[3]
    if head_size > MAX_HEAD_SIZE:
        return f"head_size {head_size} > {MAX_HEAD_SIZE}"
    if key_cache.dtype != query.dtype:
        return f"a {key_cache.dtype} cache with a {query.dtype} query"
    if head_size_v != head_size:
        return f"head_size_v {head_size_v} != head_size {head_size}"
    return ""
