"""The attention plan in plain Python: what the plan kernel must write. See ``kernels/tiling.py`` for the vocabulary.

A plan is two int32 tensors:

- items [max_items, ITEM_FIELDS]: sequence, first row in the batch, queries, position of the first query, first key, end
  key, slot (-1: the tile is not split, its item writes the output), the tile's first slot, its slots, its items, the
  next item of the same worker (-1: none), position of the sequence's first query token;
- counts [4 + max_slots * head_tiles]: items (workers if there are), rows that belong to a sequence, keys of an item or
  share, how many units a launch has taken off the list; then, for each tile's first slot and head tile, how many of its
  items are done. These and the former are 0 between two launches.

Where workers walk, item w is worker w's first (without queries and keys where it has none); the first item of tile t,
unless it is a worker's first, is behind these at workers + t. Slot 2w is that of the tile which worker w continues,
slot 2w + 1 that of the one which it begins and does not end. Elsewhere a tile's slots are consecutive, and items are
about the longest first: those of the sequence with the longest ones, from its last tile on, then the next sequence's.
A sequence's are together because they read the same keys, which the second-level cache may hold for that long.
"""

from __future__ import annotations

from torch import Tensor

from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    COARSE_CHUNK,
    COARSE_FROM,
    FINE_CHUNK,
    MAX_SORTED,
    MIN_CHUNK,
    MIN_SHARE,
    SHARE_UNIT,
    AttentionTiling,
    ceil_div,
    chunk_of,
)


def plan_attention(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    items: Tensor,
    counts: Tensor,
    *,
    tiling: AttentionTiling,
    sliding_window: int | None,
) -> None:
    """Write the plan of seq_lens int32 [B] and query_start_loc int32 [B + 1] into items and counts."""
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    sequences = list(zip(range(len(lengths)), lengths, starts[:-1], starts[1:], strict=True))
    make = _walks if tiling.workers else _items
    rows, keys = make(sequences, tiling, sliding_window)
    if rows:
        items[: len(rows)] = items.new_tensor(rows)[: len(items)]
    counts[:4] = counts.new_tensor([tiling.workers or len(rows), starts[-1], keys, 0])
    counts[4:] = 0


Sequences = list[tuple[int, int, int, int]]  # index, length, first and end row


def _walks(sequences: Sequences, tiling: AttentionTiling, sliding_window: int | None) -> tuple[list[list[int]], int]:
    """Items of workers that walk, and the keys of a share."""
    tiles = []  # sequence, first row, queries, position, first key, length, first unit, begin and end in the line
    line = 0
    for sequence, length, begin, end in sequences:
        if begin == end:
            continue
        position = length - (end - begin)
        first_key = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        unit = first_key // SHARE_UNIT
        units = max(1, ceil_div(length, SHARE_UNIT) - unit)
        tiles.append((sequence, begin, end - begin, position, first_key, length, unit, line, line + units))
        line += units
    share = max(MIN_SHARE // SHARE_UNIT, ceil_div(line, tiling.workers))
    unused = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, -1, 0]
    rows = [unused] * (tiling.workers + len(tiles))
    for number, (sequence, row, queries, position, first_key, length, unit, start, stop) in enumerate(tiles):
        workers = range(start // share, (stop - 1) // share + 1)
        first_slot = 2 * workers[0] + (start % share > 0)
        for worker in workers:
            begin, end = max(start, worker * share), min(stop, (worker + 1) * share)
            begins_share = begin == worker * share
            is_followed = end == stop and end % share > 0 and number + 1 < len(tiles)
            rows[worker if begins_share else tiling.workers + number] = [
                sequence, row, queries, position,
                first_key if begin == start else (unit + begin - start) * SHARE_UNIT,
                min(length, (unit + end - start) * SHARE_UNIT),
                2 * worker + (not begins_share) if len(workers) > 1 else -1, first_slot, len(workers), len(workers),
                tiling.workers + number + 1 if is_followed else -1,
                position,
            ]  # fmt: skip
    return rows, share * SHARE_UNIT


def _items(sequences: Sequences, tiling: AttentionTiling, sliding_window: int | None) -> tuple[list[list[int]], int]:
    """Items that each have a thread block, and the keys of one."""
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
    lists: list[tuple[int, list[list[int]]]] = []  # items by their length
    slots = 0
    for (sequence, length, begin, end), span in zip(sequences, spans, strict=True):
        tiles = ceil_div(end - begin, per_tile)
        parts, num_slots = _parts(length, span, chunk, tiling.batch_invariant, sliding_window)
        split = parts > 1 and (not tiling.batch_invariant or span > share)
        # Sequences are given slots in order; one that does not find enough is not split, nor counted.
        first_slot, slots = slots, slots + (tiles * num_slots if split else 0)
        if tiling.batch_invariant and slots > tiling.max_slots:
            split = False
        rows: list[list[int]] = []
        lists.append((min(span, chunk) if split else span, rows))
        for tile in reversed(range(tiles)):
            row = begin + tile * per_tile
            queries = min(per_tile, end - row)
            position = length - (end - row)
            first_key, end_key = 0, length
            if sliding_window is not None:
                first_key = max(0, position - sliding_window + 1)
                end_key = min(length, position + queries - 1 + sliding_window)
            first_of_tile, used = first_slot + tile * num_slots, num_slots
            if split and tiling.batch_invariant:
                used = chunk_of(end_key - 1) - chunk_of(first_key) + 1 if end_key > first_key else 0
            for part in range(parts if split else 1):
                key, part_end, slot = first_key, end_key, first_of_tile
                if split and tiling.batch_invariant:
                    index = _part_of(first_key, chunk) + part
                    key, part_end = max(first_key, _part_begin(index, chunk)), _part_begin(index + 1, chunk)
                    slot += chunk_of(key) - chunk_of(first_key)
                elif split:
                    key, part_end = first_key + part * chunk, first_key + (part + 1) * chunk
                    slot += part
                rows.append(
                    [
                        sequence, row, queries, position, key, min(end_key, part_end),
                        *((slot, first_of_tile, used, parts) if split else (-1, 0, 0, 0)),
                        -1, length - (end - begin),
                    ]
                )  # fmt: skip
    if len(sequences) <= MAX_SORTED:
        lists.sort(key=lambda one: -one[0])
    return [row for _, rows in lists for row in rows], chunk


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
