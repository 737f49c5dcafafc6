"""Paged attention for Hopper, in Gluon: what workers walk (decode, verification of drafts), at the speed of memory.

Memory and plan are those of ``kernels/attention.py``, and so are slots, partials and the order of merging. A worker is
one thread block of two partitions that share a ring of STAGES tiles of keys and values in shared memory:

- the producer, one warp, reads the block table 32 pages at a time, ahead of need, and asks the copy engine (TMA) for
  each page; it runs ahead over the ends of items, so the ring never drains between two of them;
- the consumer, one warp group, computes with swapped operands, so that keys are the rows of the products and few query
  rows cost nothing: S^T [BLOCK_N, COLUMNS] = K Q^T, then O^T [D, COLUMNS] += V^T P^T. A column is a query token and a
  head: column c is query token c // HEADS and head c % HEADS of the head tile.

Quantized caches travel as they are stored; the consumer makes fp16 tiles of them, which hold every stored number
exactly. Queries then are fp16 too, each over a power of two of its own so that none overflows, which joins the logits'
scale with those of queries and keys; a scale per token joins the logits' rows, and values are multiplied by theirs.
int4 pairs come apart as even elements, then odd ones, so queries and results take their dimensions in that order.

Pages of at least 8 slots come by TMA, which reads what it is told as rows of one two-dimensional tensor: row
block * BLOCK_ROWS + head * HEAD_ROWS + slot, from column head * HEAD_COLUMNS on.

Warp specialization and swapped products for decode: FlashMLA (DeepSeek, 2025), FlashAttention-3 (Shah et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pagedattn.kernels import tiling as tilings
from pagedattn.kernels.launcher import Descriptors, Launcher, specialized
from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.quantization import scale_mode, token_strides
from pagedattn.kernels.tiling import ITEM_FIELDS, AttentionTiling, CacheRows, HopperDecodeLaunch

LANES = gl.constexpr(32)
FINE_CHUNK = gl.constexpr(tilings.FINE_CHUNK)
MIDDLE_CHUNK = gl.constexpr(tilings.MIDDLE_CHUNK)
COARSE_CHUNK = gl.constexpr(tilings.COARSE_CHUNK)
MIDDLE_FROM = gl.constexpr(tilings.MIDDLE_FROM)
COARSE_FROM = gl.constexpr(tilings.COARSE_FROM)
# Names of Triton 3.6 that later versions have changed.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def warm_copy_engine(
    key_descriptor, value_descriptor, keys, values, barrier, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr
):  # fmt: skip
    """Fetch pages that nobody reads, so that the copy engine has both descriptors when it is first needed."""
    mbarrier.expect(barrier, 2 * PAGE_BYTES)
    fetch(key_descriptor, [0, 0], barrier, keys.slice(0, PAGE))
    fetch(value_descriptor, [0, 0], barrier, values.slice(0, PAGE))


@gluon.jit
def wait_for_launches_before():
    """Programmatic dependent launch: this kernel may start early, but reads nothing before those ahead have ended."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def visible_span(item_ptr, attention_chunk, sliding_window, CAUSAL: gl.constexpr, HAS_CHUNK: gl.constexpr):
    """First and end key of an item that any of its queries sees; both 0 if there is none.

    Who walks the span from the page in which it begins must find nothing either: begin may lie behind end.
    """
    queries = gl.load(item_ptr + 2)
    first_position = gl.load(item_ptr + 3)
    begin = gl.load(item_ptr + 4)
    end = gl.load(item_ptr + 5)
    last_position = first_position + queries - 1
    if CAUSAL:
        end = gl.minimum(end, last_position + 1)
    if HAS_CHUNK:
        begin = gl.maximum(begin, gl.maximum(first_position, 0) // attention_chunk * attention_chunk)
        end = gl.minimum(end, (gl.maximum(last_position, 0) // attention_chunk + 1) * attention_chunk)
    is_seen = begin < end
    return gl.where(is_seen, begin, 0), gl.where(is_seen, end, 0)


# --- producer ---------------------------------------------------------------------------------------------------------


@gluon.jit
def next_pages(page, last_page, first_page, BATCH_INVARIANT: gl.constexpr):
    """The LANES pages from ``page`` on, the last one repeated past the end, the first one before the begin."""
    lane = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
    pages = gl.minimum(page + lane, last_page)
    if BATCH_INVARIANT:  # elsewhere nobody asks for pages before the first
        pages = gl.maximum(pages, first_page)
    return pages


@gluon.jit
def load_blocks(
    table_ptr, page, last_page, PAGES_PER_BLOCK: gl.constexpr, first_page=0, BATCH_INVARIANT: gl.constexpr = False
):
    """Block ids of the next pages."""
    return gl.load(table_ptr + next_pages(page, last_page, first_page, BATCH_INVARIANT) // PAGES_PER_BLOCK)


@gluon.jit
def page_rows(
    blocks, page, last_page, block_rows, PAGE: gl.constexpr, PAGES_PER_BLOCK: gl.constexpr,
    first_page=0, BATCH_INVARIANT: gl.constexpr = False,
):  # fmt: skip
    """Rows at which the pages of ``load_blocks`` begin."""
    page = next_pages(page, last_page, first_page, BATCH_INVARIANT)
    return blocks * block_rows + (page % PAGES_PER_BLOCK) * PAGE


@gluon.jit
def pick(values, index):
    """Element ``index`` of a warp's LANES values."""
    lane = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
    return gl.sum(gl.where(lane == index, values, 0), 0)


@gluon.jit
def produce(
    key_descriptor, value_descriptor, block_table_ptr, items_ptr, item, stride_table_sequence,
    key_block_rows, value_block_rows, key_row, key_column, value_row, value_column, attention_chunk, sliding_window,
    keys, values, keys_full, values_full, tile_empty, warmed,
    BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, TILE_BYTES: gl.constexpr,
    SAME_ROWS: gl.constexpr, CAUSAL: gl.constexpr, HAS_CHUNK: gl.constexpr, STAGES: gl.constexpr,
    FIELDS: gl.constexpr, BATCH_INVARIANT: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles of a worker's items."""
    PAGES: gl.constexpr = BLOCK_N // PAGE
    PAGES_PER_BLOCK: gl.constexpr = BLOCK_SIZE // PAGE
    stage = 0
    phase = 1
    while item >= 0:
        item_ptr = items_ptr + item * FIELDS
        sequence = gl.load(item_ptr)
        item = gl.load(item_ptr + 10)
        begin, end = visible_span(item_ptr, attention_chunk, sliding_window, CAUSAL, HAS_CHUNK)
        if begin < end:
            table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table_sequence
            first_page = begin // PAGE
            last_page = (end - 1) // PAGE
            page = first_page
            if BATCH_INVARIANT:  # tiles begin at their multiples, whatever the first key in sight
                page = begin // BLOCK_N * PAGES
            blocks = load_blocks(table_ptr, page, last_page, PAGES_PER_BLOCK, first_page, BATCH_INVARIANT)
            while page <= last_page:
                key_rows = page_rows(
                    blocks, page, last_page, key_block_rows, PAGE, PAGES_PER_BLOCK, first_page, BATCH_INVARIANT
                )
                value_rows = key_rows
                if not SAME_ROWS:
                    value_rows = page_rows(
                        blocks, page, last_page, value_block_rows, PAGE, PAGES_PER_BLOCK, first_page, BATCH_INVARIANT
                    )
                if page + LANES <= last_page:  # these arrive while the copies of the pages before them are asked for
                    blocks = load_blocks(
                        table_ptr, page + LANES, last_page, PAGES_PER_BLOCK, first_page, BATCH_INVARIANT
                    )
                index = 0
                while (index < LANES) & (page + index <= last_page):
                    mbarrier.wait(tile_empty.index(stage), phase)
                    if stage == STAGES - 1:
                        mbarrier.wait(warmed, 0)
                    mbarrier.expect(keys_full.index(stage), TILE_BYTES)
                    for number in gl.static_range(PAGES):
                        fetch(
                            key_descriptor, [key_row + pick(key_rows, index + number), key_column],
                            keys_full.index(stage), keys.index(stage).slice(number * PAGE, PAGE),
                        )  # fmt: skip
                    mbarrier.expect(values_full.index(stage), TILE_BYTES)
                    for number in gl.static_range(PAGES):
                        fetch(
                            value_descriptor, [value_row + pick(value_rows, index + number), value_column],
                            values_full.index(stage), values.index(stage).slice(number * PAGE, PAGE),
                        )  # fmt: skip
                    index += PAGES
                    stage += 1
                    if stage == STAGES:
                        stage = 0
                        phase ^= 1
                page += LANES


# --- batch-invariant sums ---------------------------------------------------------------------------------------------


@gluon.jit
def chunk_of(position):
    """Index of the batch-invariant chunk that a key position lies in: ``kernels.tiling.chunk_of``."""
    first_middle = MIDDLE_FROM // FINE_CHUNK
    first_coarse = first_middle + (COARSE_FROM - MIDDLE_FROM) // MIDDLE_CHUNK
    middle = first_middle + (position - MIDDLE_FROM) // MIDDLE_CHUNK
    coarse = first_coarse + (position - COARSE_FROM) // COARSE_CHUNK
    return gl.where(position < MIDDLE_FROM, position // FINE_CHUNK, gl.where(position < COARSE_FROM, middle, coarse))


@gluon.jit
def fold_factors(maximum, next_maximum):
    """The maximum of two partials, and what each is multiplied by when they are added up."""
    new_maximum = gl.maximum(maximum, next_maximum)
    shift = finite_shift(new_maximum)
    return new_maximum, gl.exp2(maximum - shift), gl.exp2(next_maximum - shift)


@gluon.jit
def fold_chunk(
    partial, maximum, denominator, total_tile, maximum_tile, denominator_tile, num_folded, has_more,
    LAYOUT: gl.constexpr
):  # fmt: skip
    """Add a chunk's partial [D, COLUMNS] to those before it, which lie in total_tile, maximum_tile and denominator_tile
    unless it is the first one, and stay there if it is not the last. Returns the sum."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    total = gl.zeros(partial.shape, gl.float32, LAYOUT)
    total_maximum = gl.full(maximum.shape, float("-inf"), gl.float32, COLUMN)
    total_denominator = gl.zeros(maximum.shape, gl.float32, COLUMN)
    if num_folded > 0:
        total = total_tile.load(LAYOUT)
        total_maximum = maximum_tile.load(COLUMN)
        total_denominator = denominator_tile.load(COLUMN)
    maximum, correction, factor = fold_factors(total_maximum, maximum)
    denominator = gl.fma(total_denominator, correction, denominator * factor)
    total = gl.fma(total, correction[None, :], partial * factor[None, :])
    if has_more:
        synchronize()  # all threads have read
        total_tile.store(total)
        maximum_tile.store(maximum)
        denominator_tile.store(denominator)
    return total, maximum, denominator


@gluon.jit
def store_partial(
    partials_ptr, partial_lse_offset, partial, maximum, denominator, slot, head_tile, num_head_tiles, slot_rows,
    exists, HEAD_DIM: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """Store one slot of a split tile for one head tile: a partial [D, COLUMNS] as it is summed up."""
    column = gl.arange(0, exists.shape[0], gl.SliceLayout(0, PRODUCT))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, PRODUCT))
    partial_row = (slot * num_head_tiles + head_tile) * slot_rows + column
    gl.store(partials_ptr + partial_row[None, :] * HEAD_DIM + dim[:, None], partial, mask=exists[None, :])
    maxima_ptr = partials_ptr + partial_lse_offset
    gl.store(maxima_ptr + partial_row, maximum, mask=exists)
    gl.store(maxima_ptr + partial_lse_offset // HEAD_DIM + partial_row, denominator, mask=exists)


@gluon.jit
def store_unseen(
    partials_ptr, partial_lse_offset, item_ptr, begin, end, slot, first_chunk, head_tile, num_head_tiles, slot_rows,
    exists, HEAD_DIM: gl.constexpr, PRODUCT: gl.constexpr,
):  # fmt: skip
    """Store partials of nothing for an item's chunks outside of what its rows see, begin..end. Returns how many chunks
    the item has."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    nothing = gl.zeros([HEAD_DIM, exists.shape[0]], gl.float32, PRODUCT)
    maximum = gl.full([exists.shape[0]], float("-inf"), gl.float32, COLUMN)
    denominator = gl.zeros([exists.shape[0]], gl.float32, COLUMN)
    end_key = gl.load(item_ptr + 5)
    end_chunk = gl.where(gl.load(item_ptr + 4) < end_key, chunk_of(gl.maximum(end_key - 1, 0)) + 1, first_chunk)
    is_seen = begin < end
    first_seen = chunk_of(begin)
    last_seen = chunk_of(gl.maximum(end - 1, 0))
    chunk = first_chunk
    while chunk < end_chunk:
        if (chunk < first_seen) | (chunk > last_seen) | (not is_seen):
            store_partial(
                partials_ptr, partial_lse_offset, nothing, maximum, denominator, slot + chunk - first_chunk, head_tile,
                num_head_tiles, slot_rows, exists, HEAD_DIM, PRODUCT,
            )  # fmt: skip
        chunk += 1
    return end_chunk - first_chunk


@gluon.jit
def fold_partials(
    partials_ptr, partial_lse_offset, first_slot, num_slots, head_tile, num_head_tiles, slot_rows, row_exists,
    HEAD_DIM: gl.constexpr, SLOTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As ``merge_partials``, one slot after the other, by the operations with which ``consume`` folds chunks.

    SLOTS at a time do not wait for each other's loads.
    """
    RESULT: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # [ROWS, D]
    ROW: gl.constexpr = gl.SliceLayout(1, RESULT)
    ROWS: gl.constexpr = row_exists.shape[0]
    row = gl.arange(0, ROWS, ROW)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, RESULT))
    exists = gl.convert_layout(row_exists, ROW)
    maxima_ptr = partials_ptr + partial_lse_offset
    denominators_ptr = maxima_ptr + partial_lse_offset // HEAD_DIM
    maximum = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    denominator = gl.zeros([ROWS], gl.float32, ROW)
    result = gl.zeros([ROWS, HEAD_DIM], gl.float32, RESULT)
    start = 0
    while start < num_slots:
        for number in gl.static_range(SLOTS):
            slot = first_slot + start + number
            mask = exists & (start + number < num_slots)
            partial_row = (slot * num_head_tiles + head_tile) * slot_rows + row
            # Other multiprocessors wrote these: read past this one's first-level cache.
            next_maximum = gl.load(maxima_ptr + partial_row, mask=mask, other=float("-inf"), cache_modifier=".cg")
            weight = gl.load(denominators_ptr + partial_row, mask=mask, other=0.0, cache_modifier=".cg")
            partial_ptrs = partials_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :]
            partial = gl.load(partial_ptrs, mask=mask[:, None], other=0.0, cache_modifier=".cg")
            maximum, correction, factor = fold_factors(maximum, next_maximum)
            denominator = gl.fma(denominator, correction, weight * factor)
            result = gl.fma(result, correction[:, None], partial * factor[:, None])
        start += SLOTS
    denominator = gl.where(denominator == 0.0, 1.0, denominator)
    return result * (1.0 / denominator)[:, None], maximum + gl.log2(denominator)


# --- consumer ---------------------------------------------------------------------------------------------------------


@gluon.jit
def tanh(x):
    """As ``kernels.attention.tanh``."""
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (gl.exp2(x * 2.8853900817779268) + 1.0)
    return gl.where(square < 0.390625, near, far)


@gluon.jit
def element_of(dim, HEAD_DIM: gl.constexpr, FORMAT: gl.constexpr):
    """Which element of a head a tile's column is."""
    element = dim
    if FORMAT == "int4":
        element = gl.where(dim < HEAD_DIM // 2, 2 * dim, 2 * dim - HEAD_DIM + 1)
    return element


@gluon.jit
def finite_shift(maximum):
    """What to subtract before exponentiating: the maximum, 0 where that is -inf."""
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def add_sink(lse, sink):
    """Weight of a result, and log2-sum-exp with one logit more of a value 0."""
    maximum = gl.maximum(lse, sink)
    shift = finite_shift(maximum)
    weight = gl.exp2(lse - shift)
    denominator = weight + gl.exp2(sink - shift)
    denominator = gl.where(denominator == 0.0, 1.0, denominator)
    return weight / denominator, maximum + gl.log2(denominator)


@gluon.jit
def int8_numbers(packed):
    """int8 as fp16: a byte in the low bits of 1024.0 is that much more than 1024."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 numbers, low, high, bias;
        xor.b32 numbers, $2, 0x80808080;
        prmt.b32 low, numbers, 0x64646464, 0x4140;
        prmt.b32 high, numbers, 0x64646464, 0x4342;
        mov.b32 bias, 0x64806480;
        sub.f16x2 $0, low, bias;
        sub.f16x2 $1, high, bias;
        }
        """,
        "=r,=r,r", [packed], dtype=gl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def int4_numbers(packed):
    """Low and high halves of bytes as fp16: added to 1024.0 like ``int8_numbers``, plus 8."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 even, odd, part0, part1, part2, part3, bias;
        lop3.b32 even, $4, 0x0f0f0f0f, 0x08080808, 0x6a;
        shr.u32 odd, $4, 4;
        lop3.b32 odd, odd, 0x0f0f0f0f, 0x08080808, 0x6a;
        mov.b32 bias, 0x64086408;
        prmt.b32 part0, even, 0x64646464, 0x4140;
        prmt.b32 part1, even, 0x64646464, 0x4342;
        prmt.b32 part2, odd, 0x64646464, 0x4140;
        prmt.b32 part3, odd, 0x64646464, 0x4342;
        sub.f16x2 $0, part0, bias;
        sub.f16x2 $1, part1, bias;
        sub.f16x2 $2, part2, bias;
        sub.f16x2 $3, part3, bias;
        }
        """,
        "=r,=r,=r,=r,r", [packed], dtype=(gl.float16, gl.float16), is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def dequantize(stored, tile, scale, FORMAT: gl.constexpr, HAS_SCALE: gl.constexpr, LAYOUT: gl.constexpr):
    """Write a stored tile [BLOCK_N, D] (int4: [BLOCK_N, D / 2]) as fp16, times scale [BLOCK_N] if it has one."""
    numbers = stored.load(LAYOUT)
    if FORMAT == "int4":
        HALF: gl.constexpr = stored.shape[1]
        even, odd = int4_numbers(numbers)
        if HAS_SCALE:
            even = (even.to(gl.float32) * scale[:, None]).to(gl.float16)
            odd = (odd.to(gl.float32) * scale[:, None]).to(gl.float16)
        tile.slice(0, HALF, dim=1).store(even)
        tile.slice(HALF, HALF, dim=1).store(odd)
    else:
        values = numbers.to(gl.float16) if FORMAT == "float8" else int8_numbers(numbers)
        if HAS_SCALE:
            values = (values.to(gl.float32) * scale[:, None]).to(gl.float16)
        tile.store(values)


@gluon.jit
def load_token_scales(
    k_scale_ptr, v_scale_ptr, blocks, position, end, exists,
    stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
    K_SCALE: gl.constexpr, V_SCALE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Scales of keys and values whose blocks are known; those behind the end are the last one's."""
    slot = gl.maximum(gl.minimum(position, end - 1), 0) % BLOCK_SIZE
    key_scale = 1.0
    value_scale = 1.0
    if K_SCALE == 3:
        key_scale = gl.load(k_scale_ptr + blocks.to(gl.int64) * stride_k_block + slot * stride_k_slot, mask=exists)
    if V_SCALE == 3:
        value_scale = gl.load(v_scale_ptr + blocks.to(gl.int64) * stride_v_block + slot * stride_v_slot, mask=exists)
    return key_scale, value_scale


@gluon.jit
def load_shared_scale(scale_ptr, kv_head, MODE: gl.constexpr):
    """A scale that all tokens share, 1 where there is none or each token has its own."""
    scale = 1.0
    if MODE == 1:
        scale = gl.load(scale_ptr)
    elif MODE == 2:
        scale = gl.load(scale_ptr + kv_head)
    return scale


@gluon.jit
def clear_rows(tile, first_key, begin, end, LAYOUT: gl.constexpr):
    """Zero the values outside begin..end: nothing is known of them, and 0 * NaN is NaN."""
    position = first_key + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    values = tile.load(LAYOUT)
    tile.store(gl.where(((position >= begin) & (position < end))[:, None], values, 0.0).to(tile.dtype))
    fence_async_shared()
    synchronize()


@gluon.jit
def merge_partials(
    partials_ptr, partial_lse_ptr, first_slot, num_slots, head_tile, num_head_tiles, slot_rows, row_exists,
    HEAD_DIM: gl.constexpr, SLOTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add up the slots of a split tile for one head tile: normalized [ROWS, D] and log2-sum-exp [ROWS].

    LAYOUT [SLOTS, ROWS, D] keeps an element's slots in one thread: no two threads need to talk.
    """
    BY_SLOT: gl.constexpr = gl.SliceLayout(2, LAYOUT)  # [SLOTS, ROWS]
    RESULT: gl.constexpr = gl.SliceLayout(0, LAYOUT)  # [ROWS, D]
    ROWS: gl.constexpr = row_exists.shape[0]
    number = gl.arange(0, SLOTS, gl.SliceLayout(1, BY_SLOT))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, BY_SLOT))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    exists = gl.convert_layout(row_exists, gl.SliceLayout(0, BY_SLOT))
    maximum = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, BY_SLOT))
    denominator = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, BY_SLOT))
    result = gl.zeros([ROWS, HEAD_DIM], gl.float32, RESULT)
    start = 0
    while start < num_slots:
        index = start + number
        slot = gl.where(index == 0, first_slot, 2 * (first_slot // 2 + index))
        mask = (index < num_slots)[:, None] & exists[None, :]
        partial_row = (slot * num_head_tiles + head_tile)[:, None] * slot_rows + row[None, :]
        # Other multiprocessors wrote these: read past this one's first-level cache.
        lse = gl.load(partial_lse_ptr + partial_row, mask=mask, other=float("-inf"), cache_modifier=".cg")
        partial_ptrs = partials_ptr + partial_row[:, :, None] * HEAD_DIM + dim[None, None, :]
        partial = gl.load(partial_ptrs, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        new_maximum = gl.maximum(maximum, gl.max(lse, 0))
        shift = finite_shift(new_maximum)
        weight = gl.exp2(lse - shift[None, :])
        correction = gl.exp2(maximum - shift)
        denominator = denominator * correction + gl.sum(weight, 0)
        result = result * gl.convert_layout(correction, gl.SliceLayout(1, RESULT))[:, None]
        result += gl.sum(partial * weight[:, :, None], 0)
        maximum = new_maximum
        start += SLOTS
    denominator = gl.where(denominator == 0.0, 1.0, denominator)
    result = result / gl.convert_layout(denominator, gl.SliceLayout(1, RESULT))[:, None]
    return result, gl.convert_layout(maximum + gl.log2(denominator), gl.SliceLayout(1, RESULT))


@gluon.jit
def consume(
    out_ptr, lse_ptr, partials_ptr, query_ptr, block_table_ptr, items_ptr, counts_ptr, alibi_slopes_ptr, sinks_ptr,
    k_scale_ptr, v_scale_ptr, partial_lse_offset, logit_scale, softcap_log2, sliding_window, attention_chunk,
    num_tokens, num_workers, num_heads,
    head_tile, num_head_tiles, kv_head, first_head, heads_left, slot_rows, item,
    stride_out_token, stride_out_head, stride_query_token, stride_query_head, stride_table_sequence,
    stride_k_scale_block, stride_k_scale_slot, stride_v_scale_block, stride_v_scale_slot,
    keys, values, key_tile, value_tile, query_tile, probability_tile,
    total_tile, maximum_tile, denominator_tile,
    keys_full, values_full, tile_empty,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, QUERIES_PER_TILE: gl.constexpr,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, SLOT_ROWS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CHUNK: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr, HAS_SINKS: gl.constexpr, RETURN_LSE: gl.constexpr,
    FORMAT: gl.constexpr, K_SCALE: gl.constexpr, V_SCALE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, FIELDS: gl.constexpr, BATCH_INVARIANT: gl.constexpr,
):  # fmt: skip
    """Attention of a worker's items over the tiles in the ring."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])  # of S^T and of O^T
    COLUMN: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    ROW: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    MERGE_LANES: gl.constexpr = 32 if HEAD_DIM >= 128 else HEAD_DIM // 4
    MERGE: gl.constexpr = gl.BlockedLayout([SLOTS, 1, 4], [1, 32 // MERGE_LANES, MERGE_LANES], [1, 4, 1], [2, 1, 0])
    MERGED_ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, MERGE))
    STORED_DIM: gl.constexpr = keys.shape[2]
    STORED: gl.constexpr = gl.BlockedLayout([1, 16], [512 // STORED_DIM, STORED_DIM // 16], [4, 1], [1, 0])
    STORED_ROW: gl.constexpr = gl.SliceLayout(1, STORED)
    DTYPE: gl.constexpr = query_tile.dtype
    IS_QUANTIZED: gl.constexpr = FORMAT != "same"
    ALIGNMENT: gl.constexpr = BLOCK_N if BATCH_INVARIANT else PAGE  # keys; at whose multiples tiles begin
    shared_scale = load_shared_scale(k_scale_ptr, kv_head, K_SCALE)
    result_scale = load_shared_scale(v_scale_ptr, kv_head, V_SCALE)
    column = gl.arange(0, COLUMNS, COLUMN)
    column_query = column // HEADS
    column_head = first_head + column % HEADS
    in_tile = (column_query < QUERIES_PER_TILE) & (column % HEADS < heads_left)
    dim = gl.arange(0, HEAD_DIM, ROW)
    out_dim = element_of(dim, HEAD_DIM, FORMAT)
    copy_row = gl.arange(0, COLUMNS, gl.SliceLayout(1, COPY))
    copy_query = copy_row // HEADS
    copy_in_tile = (copy_query < QUERIES_PER_TILE) & (copy_row % HEADS < heads_left)
    copy_dim = element_of(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPY)), HEAD_DIM, FORMAT)
    merged_row = gl.arange(0, SLOT_ROWS, MERGED_ROW)
    merged_dim = element_of(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(0, MERGE))), HEAD_DIM, FORMAT)
    merged_in_tile = (merged_row // HEADS < QUERIES_PER_TILE) & (merged_row % HEADS < heads_left)
    padding_tile = item
    stage = 0
    phase = 0
    while item >= 0:
        item_ptr = items_ptr + item * FIELDS
        sequence = gl.load(item_ptr)
        first_row = gl.load(item_ptr + 1)
        queries = gl.load(item_ptr + 2)
        first_position = gl.load(item_ptr + 3)
        slot = gl.load(item_ptr + 6)
        first_slot = gl.load(item_ptr + 7)
        num_slots = gl.load(item_ptr + 8)
        item = gl.load(item_ptr + 10)
        begin, end = visible_span(item_ptr, attention_chunk, sliding_window, CAUSAL, HAS_CHUNK)
        query_offset = (first_row + copy_query).to(gl.int64) * stride_query_token
        query_offset += (first_head + copy_row % HEADS).to(gl.int64) * stride_query_head
        query = gl.load(
            query_ptr + query_offset[:, None] + copy_dim[None, :],
            mask=(copy_in_tile & (copy_query < queries))[:, None], other=0.0,
        )  # fmt: skip
        column_scale = gl.full([COLUMNS], logit_scale * shared_scale, gl.float32, COLUMN)
        if IS_QUANTIZED:
            query = query.to(gl.float32)
            largest = gl.max(gl.abs(query), 1)
            power = gl.exp2(gl.floor(gl.log2(gl.where(largest > 0.0, largest, 1.0))))
            query = query / power[:, None]
            column_scale *= gl.convert_layout(power, COLUMN)
        query_tile.store(query.to(DTYPE))
        fence_async_shared()
        synchronize()
        column_exists = in_tile & (column_query < queries)
        query_position = first_position + column_query
        if HAS_ALIBI:
            slope_log2 = gl.load(alibi_slopes_ptr + column_head, mask=column_exists, other=0.0) * 1.4426950408889634
        maximum = gl.full([COLUMNS], float("-inf"), gl.float32, COLUMN)
        weights = gl.zeros([BLOCK_N, COLUMNS], gl.float32, PRODUCT)  # denominators, by the thread that has them
        accumulator = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, PRODUCT)
        if BATCH_INVARIANT:
            # What is summed up above is a chunk's partial. An item with which a tile begins folds its chunks into
            # totals, which wait in shared memory for want of registers; others store each.
            folds = slot <= first_slot  # an unsplit tile's slot is -1
            num_folded = 0
            sum_of_weights = gl.zeros([COLUMNS], gl.float32, COLUMN)
            first_chunk = chunk_of(gl.load(item_ptr + 4))
        start = begin // ALIGNMENT * ALIGNMENT
        table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table_sequence
        position = start + gl.arange(0, BLOCK_N, ROW)
        if K_SCALE == 3 or V_SCALE == 3:
            # A tile's scales are asked for while the tile before it is computed with, and their blocks one earlier.
            seen = gl.maximum(position, begin) if BATCH_INVARIANT else position  # blocks before begin's may be gone
            blocks = gl.load(table_ptr + gl.minimum(seen, end - 1) // BLOCK_SIZE, mask=begin < end, other=0)
            next_blocks = gl.load(
                table_ptr + gl.minimum(position + BLOCK_N, end - 1) // BLOCK_SIZE, mask=begin < end, other=0
            )
            key_scale, value_scale = load_token_scales(
                k_scale_ptr, v_scale_ptr, blocks, position, end, begin < end,
                stride_k_scale_block, stride_k_scale_slot, stride_v_scale_block, stride_v_scale_slot,
                K_SCALE, V_SCALE, BLOCK_SIZE,
            )  # fmt: skip
        if IS_QUANTIZED and start < end:
            mbarrier.wait(keys_full.index(stage), phase)
            dequantize(keys.index(stage), key_tile, 1.0, FORMAT, False, STORED)
            fence_async_shared()
            synchronize()
        while start < end:
            position = start + gl.arange(0, BLOCK_N, ROW)
            if K_SCALE == 3 or V_SCALE == 3:
                next_key_scale, next_value_scale = load_token_scales(
                    k_scale_ptr, v_scale_ptr, next_blocks, position + BLOCK_N, end, True,
                    stride_k_scale_block, stride_k_scale_slot, stride_v_scale_block, stride_v_scale_slot,
                    K_SCALE, V_SCALE, BLOCK_SIZE,
                )  # fmt: skip
                next_blocks = gl.load(table_ptr + gl.minimum(position + 2 * BLOCK_N, end - 1) // BLOCK_SIZE)
            logits = gl.zeros([BLOCK_N, COLUMNS], gl.float32, PRODUCT)
            if IS_QUANTIZED:
                # Each product runs while the other operand's next tile is dequantized.
                logits_token = warpgroup_mma(key_tile, query_tile.permute((1, 0)), logits, use_acc=False, is_async=True)
                mbarrier.wait(values_full.index(stage), phase)
                if V_SCALE == 3:  # not into the probabilities: with few keys in sight their rounding would show
                    stored_scale = gl.convert_layout(value_scale, STORED_ROW)
                    dequantize(values.index(stage), value_tile, stored_scale, FORMAT, True, STORED)
                else:
                    dequantize(values.index(stage), value_tile, 1.0, FORMAT, False, STORED)
                logits = warpgroup_mma_wait(0, deps=[logits_token])
            else:
                mbarrier.wait(keys_full.index(stage), phase)
                logits = warpgroup_mma(keys.index(stage), query_tile.permute((1, 0)), logits, use_acc=False)
            logits *= column_scale[None, :]
            if K_SCALE == 3:
                logits *= key_scale[:, None]
            if HAS_SOFTCAP:
                logits = tanh(logits) * softcap_log2
            distance = query_position[None, :] - position[:, None]
            if HAS_ALIBI:
                logits -= slope_log2[None, :] * gl.abs(distance).to(gl.float32)
            sees = ((position >= begin) & (position < end))[:, None] & (query_position >= 0)[None, :]
            if CAUSAL:
                sees = sees & (distance >= 0)
            if HAS_WINDOW:
                sees = sees & (gl.abs(distance) < sliding_window)
            if HAS_CHUNK:
                query_chunk = gl.maximum(query_position, 0) // attention_chunk
                sees = sees & (query_chunk[None, :] == (position // attention_chunk)[:, None])
            logits = gl.where(sees, logits, float("-inf"))
            new_maximum = gl.maximum(maximum, gl.max(logits, 0))
            shift = finite_shift(new_maximum)
            probabilities = gl.exp2(logits - shift[None, :])
            correction = gl.exp2(maximum - shift)
            weights = weights * correction[None, :] + probabilities
            accumulator *= correction[None, :]
            maximum = new_maximum
            probability_tile.store(gl.permute(probabilities.to(DTYPE), (1, 0)))
            fence_async_shared()
            synchronize()
            is_ragged = (start < begin) | (start + BLOCK_N > end)
            next_stage = stage + 1
            next_phase = phase
            if next_stage == STAGES:
                next_stage = 0
                next_phase ^= 1
            start += BLOCK_N
            if IS_QUANTIZED:
                mbarrier.arrive(tile_empty.index(stage), count=1)
                if is_ragged:
                    clear_rows(value_tile, start - BLOCK_N, begin, end, COPY)
                result_token = warpgroup_mma(
                    value_tile.permute((1, 0)), probability_tile.permute((1, 0)), accumulator, is_async=True
                )
                if start < end:
                    mbarrier.wait(keys_full.index(next_stage), next_phase)
                    dequantize(keys.index(next_stage), key_tile, 1.0, FORMAT, False, STORED)
                    fence_async_shared()
                accumulator = warpgroup_mma_wait(0, deps=[result_token])
                synchronize()  # all warps have read the values and written the keys
            else:
                mbarrier.wait(values_full.index(stage), phase)
                if is_ragged:
                    clear_rows(values.index(stage), start - BLOCK_N, begin, end, COPY)
                accumulator = warpgroup_mma(
                    values.index(stage).permute((1, 0)), probability_tile.permute((1, 0)), accumulator
                )
                synchronize()  # all warps have read the tile
                mbarrier.arrive(tile_empty.index(stage), count=1)
            if K_SCALE == 3 or V_SCALE == 3:
                key_scale, value_scale = next_key_scale, next_value_scale
            stage, phase = next_stage, next_phase
            if BATCH_INVARIANT:
                chunk = chunk_of(start - BLOCK_N)
                if (start >= end) | (chunk_of(start) > chunk):
                    sum_of_weights = gl.sum(weights, 0)
                    if folds:
                        accumulator, maximum, sum_of_weights = fold_chunk(
                            accumulator,
                            maximum,
                            sum_of_weights,
                            total_tile,
                            maximum_tile,
                            denominator_tile,
                            num_folded,
                            start < end,
                            PRODUCT,
                        )
                        num_folded += 1
                    else:
                        store_partial(
                            partials_ptr, partial_lse_offset, accumulator, maximum, sum_of_weights,
                            slot + chunk - first_chunk, head_tile, num_head_tiles, slot_rows, column_exists,
                            HEAD_DIM, PRODUCT,
                        )  # fmt: skip
                    if start < end:  # else this is the result
                        maximum = gl.full([COLUMNS], float("-inf"), gl.float32, COLUMN)
                        weights = gl.zeros([BLOCK_N, COLUMNS], gl.float32, PRODUCT)
                        accumulator = gl.zeros([HEAD_DIM, COLUMNS], gl.float32, PRODUCT)
        denominator = sum_of_weights if BATCH_INVARIANT else gl.sum(weights, 0)
        denominator = gl.where(denominator == 0.0, 1.0, denominator)
        result = accumulator * (1.0 / denominator)[None, :]
        lse = maximum + gl.log2(denominator)
        if slot < 0:
            row_token = (first_row + column_query).to(gl.int64)
            if HAS_SINKS:
                has_sink = column_exists & (query_position >= 0)
                sink = gl.load(sinks_ptr + column_head, mask=has_sink, other=float("-inf")) * 1.4426950408889634
                weight, lse = add_sink(lse, sink)
                result *= weight[None, :]
            result *= result_scale
            out_offset = row_token * stride_out_token + column_head.to(gl.int64) * stride_out_head
            gl.store(
                out_ptr + out_offset[None, :] + out_dim[:, None], result.to(out_ptr.dtype.element_ty),
                mask=column_exists[None, :],
            )  # fmt: skip
            if RETURN_LSE:
                lse_ptrs = lse_ptr + row_token * num_heads + column_head
                gl.store(lse_ptrs, lse * 0.6931471805599453, mask=column_exists)
        else:
            arrived = 1
            if BATCH_INVARIANT:
                if folds:
                    store_partial(
                        partials_ptr, partial_lse_offset, accumulator, maximum, sum_of_weights, slot, head_tile,
                        num_head_tiles, slot_rows, column_exists, HEAD_DIM, PRODUCT,
                    )  # fmt: skip
                else:
                    arrived = store_unseen(
                        partials_ptr, partial_lse_offset, item_ptr, begin, end, slot, first_chunk, head_tile,
                        num_head_tiles, slot_rows, column_exists, HEAD_DIM, PRODUCT,
                    )  # fmt: skip
            else:
                partial_row = (slot * num_head_tiles + head_tile) * slot_rows + column
                gl.store(
                    partials_ptr + partial_row[None, :] * HEAD_DIM + dim[:, None], result, mask=column_exists[None, :]
                )
                gl.store(partials_ptr + partial_lse_offset + partial_row, lse, mask=column_exists)
            synchronize()  # all threads have stored before one of them says so
            arrivals_ptr = counts_ptr + 4 + first_slot * num_head_tiles + head_tile
            is_last = gl.atomic_add(arrivals_ptr, arrived, sem="acq_rel") == num_slots - arrived
            if BATCH_INVARIANT:
                is_last = is_last & (arrived > 0)  # who has nothing to add may come after the last
            if is_last:
                gl.store(arrivals_ptr, 0)  # as the next layer expects it
                merged_exists = merged_in_tile & (merged_row // HEADS < queries)
                if BATCH_INVARIANT:
                    merged, merged_lse = fold_partials(
                        partials_ptr, partial_lse_offset, first_slot, num_slots, head_tile, num_head_tiles,
                        slot_rows, merged_exists, HEAD_DIM, SLOTS, MERGE,
                    )  # fmt: skip
                else:
                    merged, merged_lse = merge_partials(
                        partials_ptr, partials_ptr + partial_lse_offset, first_slot, num_slots, head_tile,
                        num_head_tiles, slot_rows, merged_exists, HEAD_DIM, SLOTS, MERGE,
                    )  # fmt: skip
                merged_token = (first_row + merged_row // HEADS).to(gl.int64)
                merged_head = first_head + merged_row % HEADS
                if HAS_SINKS:
                    merged_has_sink = merged_exists & (first_position + merged_row // HEADS >= 0)
                    merged_sink = (
                        gl.load(sinks_ptr + merged_head, mask=merged_has_sink, other=float("-inf")) * 1.4426950408889634
                    )
                    merged_weight, merged_lse = add_sink(merged_lse, merged_sink)
                    merged *= merged_weight[:, None]
                merged *= result_scale
                merged_offset = merged_token * stride_out_token + merged_head.to(gl.int64) * stride_out_head
                gl.store(
                    out_ptr + merged_offset[:, None] + merged_dim[None, :], merged.to(out_ptr.dtype.element_ty),
                    mask=merged_exists[:, None],
                )  # fmt: skip
                if RETURN_LSE:
                    merged_lse_ptrs = lse_ptr + merged_token * num_heads + merged_head
                    gl.store(merged_lse_ptrs, merged_lse * 0.6931471805599453, mask=merged_exists)

    token = gl.load(counts_ptr + 1) + padding_tile * QUERIES_PER_TILE
    while token < num_tokens:  # rows that belong to no sequence
        row_token = (token + column_query).to(gl.int64)
        exists = in_tile & (row_token < num_tokens)
        out_offset = row_token * stride_out_token + column_head.to(gl.int64) * stride_out_head
        zeros = gl.zeros([HEAD_DIM, COLUMNS], out_ptr.dtype.element_ty, PRODUCT)
        gl.store(out_ptr + out_offset[None, :] + dim[:, None], zeros, mask=exists[None, :])
        if RETURN_LSE:
            empty = gl.full([COLUMNS], float("-inf"), gl.float32, COLUMN)
            gl.store(lse_ptr + row_token * num_heads + column_head, empty, mask=exists)
        token += num_workers * QUERIES_PER_TILE


# --- kernel -----------------------------------------------------------------------------------------------------------


@gluon.jit(
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
def hopper_decode_kernel(
    key_descriptor,
    value_descriptor,
    out_ptr,
    lse_ptr,
    partials_ptr,
    query_ptr,
    block_table_ptr,
    items_ptr,
    counts_ptr,
    alibi_slopes_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
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
    stride_table_sequence,
    key_block_rows,
    key_head_rows,
    key_head_columns,
    value_block_rows,
    value_head_rows,
    value_head_columns,
    stride_k_scale_block,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_v_scale_block,
    stride_v_scale_slot,
    stride_v_scale_head,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    QUERIES_PER_TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
    SLOT_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    SAME_ROWS: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    HAS_CHUNK: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    RETURN_LSE: gl.constexpr,
    FORMAT: gl.constexpr,
    K_SCALE: gl.constexpr,
    V_SCALE: gl.constexpr,
    FIELDS: gl.constexpr,
    BATCH_INVARIANT: gl.constexpr,
):
    TILES_PER_KV_HEAD: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    STORED_TYPE: gl.constexpr = key_descriptor.dtype
    STORED_DIM: gl.constexpr = HEAD_DIM // 2 if FORMAT == "int4" else HEAD_DIM
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty if FORMAT == "same" else gl.float16
    num_head_tiles = num_kv_heads * TILES_PER_KV_HEAD
    head_tile = gl.program_id(0) % num_head_tiles
    worker = gl.program_id(0) // num_head_tiles
    kv_head = head_tile // TILES_PER_KV_HEAD
    head_of_group = (head_tile % TILES_PER_KV_HEAD) * HEADS
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(STORED_TYPE, [STAGES, BLOCK_N, STORED_DIM], key_descriptor.layout)
    values = gl.allocate_shared_memory(STORED_TYPE, [STAGES, BLOCK_N, STORED_DIM], value_descriptor.layout)
    key_tile = keys.index(0)  # what is multiplied of quantized caches; else nothing uses these two
    value_tile = keys.index(0)
    if FORMAT != "same":
        key_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], swizzled)
        value_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], swizzled)
        if K_SCALE == 3:
            k_scale_ptr += kv_head.to(gl.int64) * stride_k_scale_head
        if V_SCALE == 3:
            v_scale_ptr += kv_head.to(gl.int64) * stride_v_scale_head
    query_tile = gl.allocate_shared_memory(DTYPE, [COLUMNS, HEAD_DIM], swizzled)
    probability_tile = gl.allocate_shared_memory(DTYPE, [COLUMNS, BLOCK_N], swizzled)
    total_tile = keys.index(0)  # of batch-invariant plans
    maximum_tile = keys.index(0)
    denominator_tile = keys.index(0)
    if BATCH_INVARIANT:
        # Rows side by side as the products' threads have them, without conflicts of banks.
        total_tile = gl.allocate_shared_memory(
            gl.float32, [HEAD_DIM, COLUMNS], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
        )
        maximum_tile = gl.allocate_shared_memory(gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        denominator_tile = gl.allocate_shared_memory(gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(tile_empty.index(stage), count=1)
    warmed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(warmed, count=1)
    # Into the stage that is filled last; the producer waits for it there.
    warm_copy_engine(
        key_descriptor, value_descriptor, keys.index(STAGES - 1), values.index(STAGES - 1), warmed,
        PAGE, PAGE * STORED_DIM * STORED_TYPE.primitive_bitwidth // 8,
    )  # fmt: skip
    wait_for_launches_before()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_ptr, lse_ptr, partials_ptr, query_ptr, block_table_ptr, items_ptr, counts_ptr, alibi_slopes_ptr,
                    sinks_ptr, k_scale_ptr, v_scale_ptr,
                    partial_lse_offset, logit_scale, softcap_log2, sliding_window, attention_chunk, num_tokens,
                    num_workers, num_kv_heads * GROUP, head_tile, num_head_tiles, kv_head,
                    kv_head * GROUP + head_of_group, GROUP - head_of_group, slot_rows, worker,
                    stride_out_token, stride_out_head, stride_query_token, stride_query_head, stride_table_sequence,
                    stride_k_scale_block, stride_k_scale_slot, stride_v_scale_block, stride_v_scale_slot,
                    keys, values, key_tile, value_tile, query_tile, probability_tile,
                    total_tile, maximum_tile, denominator_tile,
                    keys_full, values_full, tile_empty,
                    HEADS, HEAD_DIM, COLUMNS, QUERIES_PER_TILE, PAGE, BLOCK_N, SLOTS, SLOT_ROWS, STAGES,
                    CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, HAS_ALIBI, HAS_SINKS, RETURN_LSE,
                    FORMAT, K_SCALE, V_SCALE, BLOCK_SIZE, FIELDS, BATCH_INVARIANT,
                ),
            ),
            (
                produce,
                (
                    key_descriptor, value_descriptor, block_table_ptr, items_ptr, worker, stride_table_sequence,
                    key_block_rows, value_block_rows, kv_head * key_head_rows, kv_head * key_head_columns,
                    kv_head * value_head_rows, kv_head * value_head_columns, attention_chunk, sliding_window,
                    keys, values, keys_full, values_full, tile_empty, warmed,
                    BLOCK_SIZE, PAGE, BLOCK_N, BLOCK_N * STORED_DIM * STORED_TYPE.primitive_bitwidth // 8,
                    SAME_ROWS, CAUSAL, HAS_CHUNK, STAGES, FIELDS, BATCH_INVARIANT,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
    mbarrier.wait(warmed, 0)  # shared memory is not given up while something may still be written there


# --- launching --------------------------------------------------------------------------------------------------------


class PreparedHopperDecode:
    """All of a call that follows from shapes, strides, dtypes and host numbers, for any tensors that share them."""

    __slots__ = ("_descriptors", "_launch")

    def __init__(
        self,
        query: Tensor,
        key_cache: Tensor,
        block_table: Tensor,
        tiling: AttentionTiling,
        hopper: HopperDecodeLaunch,
        options: AttentionOptions,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        num_kv_heads = key_cache.shape[2]
        partial_rows = tiling.max_slots * tiling.head_tiles * tiling.slot_rows
        key_rows, value_rows = hopper.key_rows, hopper.value_rows
        self._descriptors = CacheDescriptors(key_rows, value_rows, hopper.page)
        strides = (
            *out.stride()[:2], *query.stride()[:2], block_table.stride(0),
            key_rows.block_rows, key_rows.head_rows, key_rows.head_columns,
            value_rows.block_rows, value_rows.head_rows, value_rows.head_columns,
            *token_strides(options.k_scale), *token_strides(options.v_scale),
        )  # fmt: skip
        constants = (
            num_heads // num_kv_heads, tiling.heads_per_tile, head_size, hopper.columns,
            tiling.slot_rows // tiling.heads_per_tile,
            key_cache.shape[1], hopper.page, hopper.block_n, hopper.slots, hopper.slot_rows, hopper.stages,
            key_rows.block_rows == value_rows.block_rows,
            options.causal, options.sliding_window is not None, options.attention_chunk is not None,
            options.softcap is not None, options.alibi_slopes is not None, options.sinks is not None, lse is not None,
            FORMATS.get(key_cache.dtype, "same"), scale_mode(options.k_scale), scale_mode(options.v_scale), ITEM_FIELDS,
            tiling.batch_invariant,
        )  # fmt: skip
        compiler_options: dict[str, Any] = {} if hopper.max_registers is None else {"maxnreg": hopper.max_registers}
        self._launch = launch_hopper_decode.prepare(
            (query.dtype, key_cache.dtype, out.dtype, specialized((num_kv_heads, *strides)), constants),
            (tiling.workers * tiling.head_tiles, 1),
            query.device,
            (
                partial_rows * head_size,
                *options.numbers,
                num_tokens,
                tiling.workers,
                num_kv_heads,
                tiling.slot_rows,
                *strides,
                *constants,
            ),
            num_warps=4,
            launch_pdl=True,
            # Every variant of a batch-invariant kernel must round alike.
            enable_fp_fusion=not tiling.batch_invariant,
            **compiler_options,
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
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        partials: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """Write attention into ``out`` [T, Hq, D] and its log-sum-exp into ``lse`` (fp32 [T, Hq])."""
        items, counts = plan
        self._launch(
            (out, lse, partials, query, block_table, items, counts, alibi_slopes, sinks, k_scale, v_scale),
            self._descriptors(key_cache, value_cache),
        )


class CacheDescriptors:
    """Descriptors of layers' caches, which differ in their addresses alone."""

    __slots__ = ("_found", "_key_rows", "_page", "_value_rows")

    def __init__(self, key_rows: CacheRows, value_rows: CacheRows, page: int) -> None:
        self._key_rows, self._value_rows, self._page = key_rows, value_rows, page
        self._found: dict[tuple[int, int], Descriptors] = {}

    def __call__(self, key_cache: Tensor, value_cache: Tensor) -> Descriptors:
        addresses = (key_cache.data_ptr(), value_cache.data_ptr())
        found = self._found.get(addresses)
        if found is None:
            if len(self._found) >= MAX_DESCRIBED:
                self._found.clear()
            found = Descriptors(
                describe(key_cache, self._key_rows, self._page),
                describe(value_cache, self._value_rows, self._page),
            )
            self._found[addresses] = found
        return found


MAX_DESCRIBED = 1024  # layers


@dataclass(frozen=True)
class Address:
    """What a descriptor needs of a tensor, without keeping its memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def describe(cache: Tensor, rows: CacheRows, page: int) -> Any:
    """What the copy engine needs to know of a cache to fetch its pages."""
    layout = swizzled_layout(cache.shape[3] * cache.element_size(), cache.element_size() * 8)
    return TensorDescriptor(
        Address(cache.data_ptr(), cache.dtype),
        [rows.num_rows, rows.num_columns],
        [cache.stride(1), 1],
        [page, cache.shape[3]],
        layout,
    )


@lru_cache
def swizzled_layout(row_bytes: int, element_bits: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=element_bits, rank=2)


FORMATS = {torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8", torch.int8: "int8", torch.uint8: "int4"}
launch_hopper_decode = Launcher(hopper_decode_kernel)
