"""The attention plan on the device: one small launch a step, no synchronization, safe in a CUDA graph.

Every program sees all sequences as the lanes of one vector, computes the same prefix sums, and writes every
``num_programs``-th item of each sequence, so programs need nothing from each other. What is written, and its layout:
``kernels/plan_reference.py``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels import tiling as tilings
from pagedattn.kernels.launcher import Launcher
from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    ITEM_FIELDS,
    MAX_SORTED,
    MIN_CHUNK,
    MIN_SHARE,
    SHARE_UNIT,
    AttentionTiling,
    ceil_div,
    next_power_of_2,
)

FINE_CHUNK = tl.constexpr(tilings.FINE_CHUNK)
MIDDLE_CHUNK = tl.constexpr(tilings.MIDDLE_CHUNK)
COARSE_CHUNK = tl.constexpr(tilings.COARSE_CHUNK)
MIDDLE_FROM = tl.constexpr(tilings.MIDDLE_FROM)
COARSE_FROM = tl.constexpr(tilings.COARSE_FROM)


@triton.jit
def part_of(position, size):
    """Index of the batch-invariant part of ``size`` keys that key positions lie in."""
    middle_size = tl.maximum(size, MIDDLE_CHUNK)
    first_middle = MIDDLE_FROM // size
    middle = first_middle + (position - MIDDLE_FROM) // middle_size
    first_coarse = first_middle + (COARSE_FROM - MIDDLE_FROM) // middle_size
    coarse = first_coarse + (position - COARSE_FROM) // COARSE_CHUNK
    further = tl.where(position < COARSE_FROM, middle, coarse)
    return tl.where((position < MIDDLE_FROM) | (size >= COARSE_CHUNK), position // size, further)


@triton.jit
def part_begin(index, size):
    """First key position of batch-invariant parts."""
    middle_size = tl.maximum(size, MIDDLE_CHUNK)
    first_middle = MIDDLE_FROM // size
    middle = MIDDLE_FROM + (index - first_middle) * middle_size
    first_coarse = first_middle + (COARSE_FROM - MIDDLE_FROM) // middle_size
    coarse = COARSE_FROM + (index - first_coarse) * COARSE_CHUNK
    further = tl.where(index <= first_coarse, middle, coarse)
    return tl.where((index <= first_middle) | (size >= COARSE_CHUNK), index * size, further)


@triton.jit
def chunk_of(position):
    """Index of the batch-invariant chunk that key positions lie in."""
    return part_of(position, FINE_CHUNK)


@triton.jit
def chunk_begin(index):
    """First key position of batch-invariant chunks."""
    return part_begin(index, FINE_CHUNK)


@triton.jit
def store_item(
    items_ptr, item, writes, sequence, row, queries, position, begin, end, slot, first_slot, num_slots, num_parts,
    next_item, origin, FIELDS: tl.constexpr,
):  # fmt: skip
    """Write the fields of items [LANES]."""
    item_ptr = items_ptr + item * FIELDS
    tl.store(item_ptr, sequence, mask=writes)
    tl.store(item_ptr + 1, row, mask=writes)
    tl.store(item_ptr + 2, queries, mask=writes)
    tl.store(item_ptr + 3, position, mask=writes)
    tl.store(item_ptr + 4, begin, mask=writes)
    tl.store(item_ptr + 5, end, mask=writes)
    tl.store(item_ptr + 6, slot, mask=writes)
    tl.store(item_ptr + 7, first_slot, mask=writes)
    tl.store(item_ptr + 8, num_slots, mask=writes)
    tl.store(item_ptr + 9, num_parts, mask=writes)
    tl.store(item_ptr + 10, next_item, mask=writes)
    tl.store(item_ptr + 11, origin, mask=writes)


@triton.jit
def store_counts(counts_ptr, num_items, num_rows, keys, num_arrivals, program, num_programs, LANES: tl.constexpr):
    """Write the counts, and 0 for every tile's items that are done."""
    lane = tl.arange(0, LANES)
    if program == 0:
        tl.store(counts_ptr, num_items)
        tl.store(counts_ptr + 1, num_rows)
        tl.store(counts_ptr + 2, keys)
        tl.store(counts_ptr + 3, 0)
    for start in tl.range(program * LANES, num_arrivals, num_programs * LANES):
        tl.store(counts_ptr + 4 + start + lane, 0, mask=start + lane < num_arrivals)


@triton.jit
def assign_slots(wanted, max_slots):
    """First slot of each tile [LANES] that wants some, and whether it gets them: in order, as far as there are any."""
    first_slot = tl.cumsum(wanted) - wanted
    return first_slot, (wanted > 0) & (first_slot + wanted <= max_slots)


@triton.jit(
    do_not_specialize=["num_seqs", "sliding_window", "workers", "max_slots", "num_arrivals", "num_programs"],
)
def plan_walks_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    items_ptr,
    counts_ptr,
    num_seqs,
    sliding_window,
    workers,
    max_slots,
    num_arrivals,
    num_programs,
    HAS_WINDOW: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    MIN_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    NUM_LANES: tl.constexpr,
):
    sequence = tl.arange(0, NUM_LANES)
    program = tl.program_id(0)
    exists = sequence < num_seqs
    seq_len = tl.load(seq_lens_ptr + sequence, mask=exists, other=0)
    row = tl.load(query_start_loc_ptr + sequence, mask=exists, other=0)
    queries = tl.load(query_start_loc_ptr + sequence + 1, mask=exists, other=0) - row
    num_rows = tl.load(query_start_loc_ptr + num_seqs)
    is_tile = queries > 0
    position = seq_len - queries
    first_key = tl.zeros_like(seq_len)
    if HAS_WINDOW:
        first_key = tl.maximum(position - sliding_window + 1, 0)
    first_unit = first_key // UNIT
    units = tl.where(is_tile, tl.maximum(tl.cdiv(seq_len, UNIT) - first_unit, 1), 0)
    stop = tl.cumsum(units)
    start = stop - units
    tile = tl.cumsum(is_tile.to(tl.int32)) - 1
    line = tl.sum(units)
    share = tl.maximum(tl.cdiv(line, workers), MIN_UNITS)
    first_worker = start // share
    parts = tl.where(is_tile, (stop - 1) // share - first_worker + 1, 0)
    if BATCH_INVARIANT:  # a share ends where the chunk begins in which it would end
        first_chunk = chunk_of(first_key)
        end_chunk = chunk_of(tl.maximum(seq_len - 1, first_key)) + 1
        end_of_first = start + chunk_begin(first_chunk + 1) // UNIT - first_unit
        owner = (tl.minimum(end_of_first, stop) - 1) // share  # who begins the tile
        continued_from = chunk_of((first_unit + (owner + 1) * share - start) * UNIT)
        is_continued = is_tile & ((owner + 1) * share < stop)
        num_slots = tl.where(is_continued, end_chunk - continued_from + 1, 0)
        first_slot, is_split = assign_slots(num_slots, max_slots)
    else:
        is_split = parts > 1
        num_slots = parts
        first_slot = 2 * first_worker + (start % share > 0).to(tl.int32)

    store_counts(counts_ptr, workers, num_rows, share * UNIT, num_arrivals, program, num_programs, NUM_LANES)
    first_lane = program * NUM_LANES
    while first_lane < workers:  # those whose share is beyond the end of the line
        idle_worker = first_lane + sequence
        is_idle = (idle_worker < workers) & (idle_worker * share >= line)
        nothing = tl.zeros_like(idle_worker)
        store_item(
            items_ptr, idle_worker, is_idle, nothing, nothing, nothing, nothing, nothing, nothing, nothing - 1, nothing,
            nothing, nothing, nothing - 1, nothing, FIELDS,
        )  # fmt: skip
        first_lane += num_programs * NUM_LANES
    part = program
    most_parts = tl.max(parts)
    while part < most_parts:
        worker = first_worker + part
        begin = tl.maximum(start, worker * share)
        end = tl.minimum(stop, (worker + 1) * share)
        begins_share = begin == worker * share
        is_followed = (end == stop) & (end % share > 0) & (end < line)
        item_queries = queries
        key = tl.where(begin == start, first_key, (first_unit + begin - start) * UNIT)
        end_key = tl.minimum(seq_len, (first_unit + end - start) * UNIT)
        slot = 2 * worker + tl.where(begins_share, 0, 1)
        if BATCH_INVARIANT:
            chunk = chunk_of((first_unit + begin - start) * UNIT)
            next_chunk = tl.where(end == stop, end_chunk, chunk_of((first_unit + end - start) * UNIT))
            chunk = tl.where(is_split, chunk, tl.where(worker == owner, first_chunk, end_chunk))
            next_chunk = tl.where(is_split, next_chunk, end_chunk)
            item_queries = tl.where(chunk < next_chunk, queries, 0)  # a share may be left without any of the tile
            key = tl.maximum(first_key, chunk_begin(chunk))
            end_key = tl.minimum(seq_len, chunk_begin(next_chunk))
            slot = first_slot + tl.where(worker == owner, 0, chunk - continued_from + 1)
        store_item(
            items_ptr, tl.where(begins_share, worker, workers + tile), part < parts, sequence, row, item_queries,
            position, key, end_key, tl.where(is_split & (item_queries > 0), slot, -1),
            first_slot, num_slots, num_slots, tl.where(is_followed, workers + tile + 1, -1), position, FIELDS,
        )  # fmt: skip
        part += num_programs


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "sliding_window",
        "workers",
        "target_items",
        "max_items",
        "max_slots",
        "num_arrivals",
        "num_programs",
    ]
)
def plan_items_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    items_ptr,
    counts_ptr,
    num_seqs,
    sliding_window,
    workers,
    target_items,
    max_items,
    max_slots,
    num_arrivals,
    num_programs,
    QUERIES_PER_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    SORTED: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_ALIGNMENT: tl.constexpr,
    FIELDS: tl.constexpr,
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
        chunk = share * 0 + MIDDLE_CHUNK
        while chunk < share:
            chunk *= 2
        last_key = tl.maximum(seq_len - 1, 0)
        parts = part_of(last_key, chunk) + 1
        slots = chunk_of(last_key) + 1
        if HAS_WINDOW:
            parts = tl.minimum(parts, tl.cdiv(span, chunk) + 1)
            slots = tl.minimum(slots, tl.cdiv(span, FINE_CHUNK) + 1)
        wanted = tl.where((parts > 1) & (span > share), tiles * slots, 0)
        first_slot, is_split = assign_slots(wanted, max_slots)
    else:
        chunk = tl.maximum(tl.cdiv(share, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT, MIN_CHUNK)
        parts = tl.maximum(tl.cdiv(span, chunk), 1)
        slots = parts
        is_split = parts > 1
        wanted = tl.where(is_split, tiles * slots, 0)
        first_slot = tl.cumsum(wanted) - wanted
    items_per_tile = tl.where(is_split, parts, 1)
    items = tiles * items_per_tile
    if SORTED:  # the sequence with the longest items first
        longest = tl.where(is_split, tl.minimum(span, chunk), span)
        precedes = (longest[None, :] > longest[:, None]) | (
            (longest[None, :] == longest[:, None]) & (sequence[None, :] < sequence[:, None])
        )
        first_item = tl.sum(tl.where(precedes, items[None, :], 0), axis=1)
    else:
        first_item = tl.cumsum(items) - items

    program = tl.program_id(0)
    num_items, num_rows = tl.minimum(tl.sum(items), max_items), tl.load(query_start_loc_ptr + num_seqs)
    num_firsts = num_items  # a thread block's first item
    if BATCH_INVARIANT:
        num_firsts = workers
        first_lane = program * NUM_LANES
        while first_lane < workers:  # those for whom the list is too short
            idle_worker = first_lane + sequence
            is_idle = (idle_worker < workers) & (idle_worker >= num_items)
            nothing = tl.zeros_like(idle_worker)
            store_item(
                items_ptr, idle_worker, is_idle, nothing, nothing, nothing, nothing, nothing, nothing, nothing - 1,
                nothing, nothing, nothing, nothing - 1, nothing, FIELDS,
            )  # fmt: skip
            first_lane += num_programs * NUM_LANES
    store_counts(counts_ptr, num_firsts, num_rows, chunk, num_arrivals, program, num_programs, NUM_LANES)
    index = program
    most_items = tl.max(items)
    while index < most_items:
        tile = tiles - 1 - index // items_per_tile
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
        item = first_item + index
        next_item = -1
        if BATCH_INVARIANT:
            first_part = part_of(first_key, chunk)
            key = tl.maximum(first_key, part_begin(first_part + part, chunk))
            part_end = part_begin(first_part + part + 1, chunk)
            # The tile's first slot stands for all chunks of its first item.
            last_folded = chunk_of(tl.maximum(tl.minimum(end_key, part_begin(first_part + 1, chunk)) - 1, first_key))
            slot = first_of_tile + tl.where(part == 0, 0, chunk_of(key) - last_folded)
            used_slots = tl.maximum(chunk_of(tl.maximum(end_key - 1, 0)) - last_folded, 0) + 1
            awaited = used_slots
            next_item = tl.where(item + workers < num_items, item + workers, -1)
        else:
            key = first_key + part * chunk
            part_end = key + chunk
            slot = first_of_tile + part
            used_slots = slots
            awaited = parts
        store_item(
            items_ptr, item, (index < items) & (item < max_items), sequence, begin + first_query, queries, position,
            tl.where(is_split, key, first_key), tl.where(is_split, tl.minimum(end_key, part_end), end_key),
            tl.where(is_split, slot, -1), tl.where(is_split, first_of_tile, 0), tl.where(is_split, used_slots, 0),
            tl.where(is_split, awaited, 0), next_item, origin, FIELDS,
        )  # fmt: skip
        index += num_programs


class PreparedPlan:
    """The launch that plans ``num_seqs`` sequences, for any tensors of that many."""

    __slots__ = ("_launch",)

    def __init__(
        self, tiling: AttentionTiling, num_seqs: int, sliding_window: int | None, device: torch.device
    ) -> None:
        num_arrivals = tiling.num_counts - 4
        lanes = max(16, next_power_of_2(max(1, num_seqs)))
        # The longer a sequence's list may be, the more programs share it; and many counters are many stores.
        programs = min(32, max(1, tiling.max_items // max(1, num_seqs)))
        if tiling.batch_invariant:
            programs = max(programs, min(64, ceil_div(num_arrivals, 8 * lanes)))
        has_window, window = sliding_window is not None, sliding_window or 0
        if tiling.has_shares:
            unit = tilings.FINE_CHUNK if tiling.batch_invariant else SHARE_UNIT
            constants: tuple[int | bool, ...] = (
                has_window, tiling.batch_invariant, MIN_SHARE // unit, unit, ITEM_FIELDS, lanes,
            )  # fmt: skip
            sizes: tuple[int, ...] = (num_seqs, window, tiling.workers, tiling.max_slots, num_arrivals, programs)
            launcher = launch_walks
        else:
            constants = (
                tiling.queries_per_tile, has_window, tiling.batch_invariant, num_seqs <= MAX_SORTED,
                MIN_CHUNK, CHUNK_ALIGNMENT, ITEM_FIELDS, lanes,
            )  # fmt: skip
            sizes = (
                num_seqs, window, tiling.workers, tiling.target_items, tiling.max_items, tiling.max_slots,
                num_arrivals, programs,
            )  # fmt: skip
            launcher = launch_items
        self._launch = launcher.prepare(constants, (programs, 1), device, (*sizes, *constants), num_warps=4)

    def __call__(self, seq_lens: Tensor, query_start_loc: Tensor, items: Tensor, counts: Tensor) -> None:
        """Write the plan of seq_lens int32 [B] and query_start_loc int32 [B + 1] into items and counts."""
        self._launch((seq_lens, query_start_loc, items, counts))


launch_walks = Launcher(plan_walks_kernel)
launch_items = Launcher(plan_items_kernel)
prepare_plan = lru_cache(maxsize=4096)(PreparedPlan)
