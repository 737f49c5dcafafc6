"""The attention plan in plain Python: what the plan kernel must write. See ``kernels/tiling.py`` for the vocabulary.

A plan is three int32 tensors:

- items [max_items, 8]: sequence, first row in the batch, queries, position of the first query, first key, end key,
  first slot and merge (-1: the tile is not split, its item writes the output);
- merges [max_merges, 4]: first slot, number of slots, number of items, 0;
- counts [4 + max_merges * head_tiles]: items, merges, rows that belong to a sequence, keys of an item; then, for each
  merge and head tile, how many of its items are done: 0 between two launches.
"""

from __future__ import annotations

from torch import Tensor

from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    COARSE_CHUNK,
    COARSE_FROM,
    FINE_CHUNK,
    MIN_CHUNK,
    AttentionTiling,
    ceil_div,
    chunk_of,
)


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
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    sequences = list(zip(range(len(lengths)), lengths, starts[:-1], starts[1:], strict=True))
    per_tile = tiling.queries_per_tile
    spans = [_span(length, end - begin, per_tile, sliding_window) for _, length, begin, end in sequences]
    total = sum(
        ceil_div(end - begin, per_tile) * span for (_, _, begin, end), span in zip(sequences, spans, strict=True)
    )
    share = ceil_div(total, tiling.target_items)
    chunk = max(MIN_CHUNK, ceil_div(share, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT)
    if tiling.batch_invariant:
        chunk = FINE_CHUNK
        while chunk < share:
            chunk *= 2
    item_rows: list[list[int]] = []
    merge_rows: list[list[int]] = []
    slots = 0
    for (sequence, length, begin, end), span in zip(sequences, spans, strict=True):
        tiles = ceil_div(end - begin, per_tile)
        parts, num_slots = _parts(length, span, chunk, tiling.batch_invariant, sliding_window)
        split = parts > 1 and (not tiling.batch_invariant or span > share)
        # Sequences are given slots in order; one that does not find enough is not split, nor counted.
        first_slot, slots = slots, slots + (tiles * num_slots if split else 0)
        if tiling.batch_invariant and slots > tiling.max_slots:
            split = False
        for tile in range(tiles):
            row = begin + tile * per_tile
            queries = min(per_tile, end - row)
            position = length - (end - row)
            first_key, end_key = 0, length
            if sliding_window is not None:
                first_key = max(0, position - sliding_window + 1)
                end_key = min(length, position + queries - 1 + sliding_window)
            for part in range(parts if split else 1):
                key, part_end = first_key, end_key
                slot = first_slot + tile * num_slots if split else -1
                if split and tiling.batch_invariant:
                    index = _part_of(first_key, chunk) + part
                    key, part_end = max(first_key, _part_begin(index, chunk)), _part_begin(index + 1, chunk)
                    slot += chunk_of(key) - chunk_of(first_key)
                elif split:
                    key, part_end = first_key + part * chunk, first_key + (part + 1) * chunk
                    slot += part
                merge = len(merge_rows) if split else -1
                item_rows.append([sequence, row, queries, position, key, min(end_key, part_end), slot, merge])
            if split:
                used = num_slots
                if tiling.batch_invariant:
                    used = chunk_of(end_key - 1) - chunk_of(first_key) + 1 if end_key > first_key else 0
                merge_rows.append([first_slot + tile * num_slots, used, parts, 0])
    for rows, out in ((item_rows, items), (merge_rows, merges)):
        if rows:
            out[: len(rows)] = out.new_tensor(rows)[: len(out)]
    counts[:4] = counts.new_tensor([len(item_rows), len(merge_rows), starts[-1], chunk])
    counts[4:] = 0


def _span(seq_len: int, query_len: int, queries_per_tile: int, sliding_window: int | None) -> int:
    """Upper bound on the keys that a tile of the sequence can see."""
    if sliding_window is None:
        return seq_len
    first_key = max(0, seq_len - query_len - sliding_window + 1)
    return min(seq_len - first_key, 2 * sliding_window + queries_per_tile)


def _parts(seq_len: int, span: int, chunk: int, batch_invariant: bool, sliding_window: int | None) -> tuple[int, int]:
    """How many items and slots each tile of a sequence has when it is split."""
    if not batch_invariant:
        parts = max(1, ceil_div(span, chunk))
        return parts, parts
    parts = _part_of(max(seq_len - 1, 0), chunk) + 1
    slots = chunk_of(max(seq_len - 1, 0)) + 1
    if sliding_window is not None:
        parts = min(parts, ceil_div(span, chunk) + 1)
        slots = min(slots, ceil_div(span, FINE_CHUNK) + 1)
    return parts, slots


def _part_of(position: int, chunk: int) -> int:
    """Index of the batch-invariant item that a key position lies in: ``chunk`` keys, but whole chunks of the order."""
    if chunk >= COARSE_CHUNK or position < COARSE_FROM:
        return position // chunk
    return COARSE_FROM // chunk + (position - COARSE_FROM) // COARSE_CHUNK


def _part_begin(index: int, chunk: int) -> int:
    """First key position of a batch-invariant item."""
    if chunk >= COARSE_CHUNK or index <= COARSE_FROM // chunk:
        return index * chunk
    return COARSE_FROM + (index - COARSE_FROM // chunk) * COARSE_CHUNK
