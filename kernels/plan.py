"""The attention plan on the device: one small launch a step, no synchronization, safe in a CUDA graph.

Every program sees all sequences as the lanes of one vector, computes the same prefix sums, and writes every
``num_programs``-th item of each sequence, so programs need nothing from each other. Layout of what it writes:
``kernels/plan_reference.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher
from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    COARSE_CHUNK,
    COARSE_FROM,
    FINE_CHUNK,
    MIN_CHUNK,
    AttentionTiling,
    next_power_of_2,
)


@triton.jit
def chunk_of(position, FINE: tl.constexpr, COARSE: tl.constexpr, FROM: tl.constexpr):
    """Index of the batch-invariant chunk that key positions lie in."""
    return tl.where(position < FROM, position // FINE, FROM // FINE + (position - FROM) // COARSE)


@triton.jit
def chunk_begin(index, FINE: tl.constexpr, COARSE: tl.constexpr, FROM: tl.constexpr):
    """First key position of batch-invariant chunks."""
    return tl.where(index < FROM // FINE, index * FINE, FROM + (index - FROM // FINE) * COARSE)


@triton.jit
def part_of(position, chunk, COARSE: tl.constexpr, FROM: tl.constexpr):
    """Index of the batch-invariant item that key positions lie in."""
    further = FROM // chunk + (position - FROM) // COARSE
    return tl.where((chunk >= COARSE) | (position < FROM), position // chunk, further)


@triton.jit
def part_begin(index, chunk, COARSE: tl.constexpr, FROM: tl.constexpr):
    """First key position of batch-invariant items."""
    further = FROM + (index - FROM // chunk) * COARSE
    return tl.where((chunk >= COARSE) | (index <= FROM // chunk), index * chunk, further)


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "sliding_window",
        "target_items",
        "max_items",
        "max_slots",
        "max_merges",
        "num_arrivals",
        "num_programs",
    ]
)
def plan_attention_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    items_ptr,
    merges_ptr,
    counts_ptr,
    num_seqs,
    sliding_window,
    target_items,
    max_items,
    max_slots,
    max_merges,
    num_arrivals,
    num_programs,
    QUERIES_PER_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_ALIGNMENT: tl.constexpr,
    FINE: tl.constexpr,
    COARSE: tl.constexpr,
    FROM: tl.constexpr,
    NUM_LANES: tl.constexpr,
):
    sequence = tl.arange(0, NUM_LANES)
    exists = sequence < num_seqs
    seq_len = tl.load(seq_lens_ptr + sequence, mask=exists, other=0)
    begin = tl.load(query_start_loc_ptr + sequence, mask=exists, other=0)
    end = tl.load(query_start_loc_ptr + sequence + 1, mask=exists, other=0)
    query_len = end - begin
    origin = seq_len - query_len
    tiles = tl.cdiv(query_len, QUERIES_PER_TILE)
    span = seq_len
    if HAS_WINDOW:
        span = tl.minimum(seq_len - tl.maximum(origin - sliding_window + 1, 0), 2 * sliding_window + QUERIES_PER_TILE)
    share = tl.cdiv(tl.sum(tiles.to(tl.int64) * span), target_items).to(tl.int32)

    if BATCH_INVARIANT:
        chunk = share * 0 + FINE
        while chunk < share:
            chunk *= 2
        last_key = tl.maximum(seq_len - 1, 0)
        parts = part_of(last_key, chunk, COARSE, FROM) + 1
        slots = chunk_of(last_key, FINE, COARSE, FROM) + 1
        if HAS_WINDOW:
            parts = tl.minimum(parts, tl.cdiv(span, chunk) + 1)
            slots = tl.minimum(slots, tl.cdiv(span, FINE) + 1)
        wants_split = (parts > 1) & (span > share)
        wanted = tl.where(wants_split, tiles * slots, 0)
        first_slot = tl.cumsum(wanted) - wanted
        is_split = wants_split & (first_slot + wanted <= max_slots)
    else:
        chunk = tl.maximum(tl.cdiv(share, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT, MIN_CHUNK)
        parts = tl.maximum(tl.cdiv(span, chunk), 1)
        slots = parts
        is_split = parts > 1
        wanted = tl.where(is_split, tiles * slots, 0)
        first_slot = tl.cumsum(wanted) - wanted
    items_per_tile = tl.where(is_split, parts, 1)
    items = tiles * items_per_tile
    merges = tl.where(is_split, tiles, 0)
    first_item = tl.cumsum(items) - items
    first_merge = tl.cumsum(merges) - merges

    program = tl.program_id(0)
    if program == 0:
        tl.store(counts_ptr, tl.minimum(tl.sum(items), max_items))
        tl.store(counts_ptr + 1, tl.minimum(tl.sum(merges), max_merges))
        tl.store(counts_ptr + 2, tl.load(query_start_loc_ptr + num_seqs))
        tl.store(counts_ptr + 3, chunk)
        for start in tl.range(0, num_arrivals, NUM_LANES):
            tl.store(counts_ptr + 4 + start + sequence, 0, mask=start + sequence < num_arrivals)

    index = program
    most_items = tl.max(items)
    while index < most_items:
        tile = index // items_per_tile
        part = index % items_per_tile
        first_query = tile * QUERIES_PER_TILE
        queries = tl.minimum(QUERIES_PER_TILE, query_len - first_query)
        position = origin + first_query
        first_key = tl.zeros_like(seq_len)
        end_key = seq_len
        if HAS_WINDOW:
            first_key = tl.maximum(position - sliding_window + 1, 0)
            end_key = tl.minimum(seq_len, position + queries - 1 + sliding_window)
        first_of_tile = first_slot + tile * slots
        if BATCH_INVARIANT:
            wanted_part = part_of(first_key, chunk, COARSE, FROM) + part
            key = tl.maximum(first_key, part_begin(wanted_part, chunk, COARSE, FROM))
            part_end = part_begin(wanted_part + 1, chunk, COARSE, FROM)
            first_chunk = chunk_of(first_key, FINE, COARSE, FROM)
            slot = first_of_tile + chunk_of(key, FINE, COARSE, FROM) - first_chunk
            used_slots = chunk_of(tl.maximum(end_key - 1, 0), FINE, COARSE, FROM) - first_chunk + 1
            used_slots = tl.where(end_key > first_key, used_slots, 0)  # rows before the sequence see nothing
        else:
            key = first_key + part * chunk
            part_end = key + chunk
            slot = first_of_tile + part
            used_slots = slots
        merge = first_merge + tile
        item = first_item + index
        writes = (index < items) & (item < max_items)
        item_ptr = items_ptr + item * 8
        tl.store(item_ptr, sequence, mask=writes)
        tl.store(item_ptr + 1, begin + first_query, mask=writes)
        tl.store(item_ptr + 2, queries, mask=writes)
        tl.store(item_ptr + 3, position, mask=writes)
        tl.store(item_ptr + 4, tl.where(is_split, key, first_key), mask=writes)
        tl.store(item_ptr + 5, tl.where(is_split, tl.minimum(end_key, part_end), end_key), mask=writes)
        tl.store(item_ptr + 6, tl.where(is_split, slot, -1), mask=writes)
        tl.store(item_ptr + 7, tl.where(is_split, merge, -1), mask=writes)
        writes = (index < items) & is_split & (part == 0) & (merge < max_merges)
        merge_ptr = merges_ptr + merge * 4
        tl.store(merge_ptr, first_of_tile, mask=writes)
        tl.store(merge_ptr + 1, used_slots, mask=writes)
        tl.store(merge_ptr + 2, parts, mask=writes)
        tl.store(merge_ptr + 3, 0, mask=writes)
        index += num_programs


def plan_attention(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    items: Tensor,
    merges: Tensor,
    counts: Tensor,
    *,
    tiling: AttentionTiling,
    sliding_window: int | None,
) -> None:
    """Write the plan of seq_lens int32 [B] and query_start_loc int32 [B + 1] into items, merges and counts."""
    num_seqs = seq_lens.shape[0]
    # The longer a sequence's list may be, the more programs share it.
    programs = min(32, max(1, tiling.max_items // max(1, num_seqs)))
    lanes = max(16, next_power_of_2(max(1, num_seqs)))
    constants = (
        tiling.queries_per_tile, sliding_window is not None, tiling.batch_invariant,
        MIN_CHUNK, CHUNK_ALIGNMENT, FINE_CHUNK, COARSE_CHUNK, COARSE_FROM, lanes,
    )  # fmt: skip
    launch = launch_plan.prepare(
        constants,
        (programs, 1),
        seq_lens.device,
        (
            num_seqs, sliding_window or 0, tiling.target_items, tiling.max_items, tiling.max_slots,
            tiling.max_merges, counts.shape[0] - 4, programs, *constants,
        ),
        num_warps=4,
    )  # fmt: skip
    launch((seq_lens, query_start_loc, items, merges, counts))


launch_plan = Launcher(plan_attention_kernel)
