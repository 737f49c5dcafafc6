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
from pagedattn.kernels.tiling import CHUNK_ALIGNMENT, MIN_CHUNK, AttentionTiling, next_power_of_2


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "sliding_window",
        "target_items",
        "max_items",
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
    max_merges,
    num_arrivals,
    num_programs,
    QUERIES_PER_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CHUNK_ALIGNMENT: tl.constexpr,
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
    total = tl.sum(tiles.to(tl.int64) * span)
    share = tl.cdiv(tl.cdiv(total, target_items), CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    chunk = tl.maximum(share, MIN_CHUNK).to(tl.int32)

    chunks = tl.maximum(tl.cdiv(span, chunk), 1)
    is_split = chunks > 1
    items = tiles * chunks
    slots = tl.where(is_split, items, 0)
    merges = tl.where(is_split, tiles, 0)
    first_item = tl.cumsum(items) - items
    first_slot = tl.cumsum(slots) - slots
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
        tile = index // chunks
        part = index % chunks
        first_query = tile * QUERIES_PER_TILE
        queries = tl.minimum(QUERIES_PER_TILE, query_len - first_query)
        position = origin + first_query
        first_key = tl.zeros_like(seq_len)
        end_key = seq_len
        if HAS_WINDOW:
            first_key = tl.maximum(position - sliding_window + 1, 0)
            end_key = tl.minimum(seq_len, position + queries - 1 + sliding_window)
        key = first_key + part * chunk
        item = first_item + index
        writes = (index < items) & (item < max_items)
        item_ptr = items_ptr + item * 8
        tl.store(item_ptr, sequence, mask=writes)
        tl.store(item_ptr + 1, begin + first_query, mask=writes)
        tl.store(item_ptr + 2, queries, mask=writes)
        tl.store(item_ptr + 3, position, mask=writes)
        tl.store(item_ptr + 4, key, mask=writes)
        tl.store(item_ptr + 5, tl.minimum(end_key, key + chunk), mask=writes)
        tl.store(item_ptr + 6, tl.where(is_split, first_slot + index, -1), mask=writes)
        merge = first_merge + tile
        tl.store(item_ptr + 7, tl.where(is_split, merge, -1), mask=writes)
        writes = (index < items) & is_split & (part == 0) & (merge < max_merges)
        tl.store(merges_ptr + merge * 2, first_slot + index, mask=writes)
        tl.store(merges_ptr + merge * 2 + 1, chunks, mask=writes)
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
    programs = min(
        32, max(1, tiling.max_items // max(1, num_seqs))
    )  # the longer a sequence's list may be, the more share it
    lanes = max(16, next_power_of_2(max(1, num_seqs)))
    constants = (tiling.queries_per_tile, sliding_window is not None, MIN_CHUNK, CHUNK_ALIGNMENT, lanes)
    launch_plan(
        constants,
        (programs, 1),
        (seq_lens, query_start_loc, items, merges, counts),
        seq_lens.device,
        (
            num_seqs, sliding_window or 0, tiling.target_items,
            items.shape[0], merges.shape[0], counts.shape[0] - 4, programs, *constants,
        ),
        num_warps=4,
    )  # fmt: skip


launch_plan = Launcher(plan_attention_kernel)
