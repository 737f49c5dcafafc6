"""The attention plan in plain Python: what the plan kernel must write. See ``kernels/tiling.py`` for the vocabulary.

A plan is two int32 tensors:

- items [max_items, ITEM_FIELDS]: sequence, first row in the batch, queries, position of the first query, first key, end
  key, slot (-1: the tile is not split, its item writes the output), the tile's first slot, its slots, the arrivals that
  its merge awaits, the next item of the same worker (-1: none), position of the sequence's first query token;
- counts [4 + max_slots * head_tiles]: items (workers if there are), rows that belong to a sequence, keys of an item or
  share, how many units a launch has taken off the list; then, for each tile's first slot and head tile, how many have
  arrived. These and the former are 0 between two launches.

Where workers walk shares, item w is worker w's first (without queries and keys where it has none); the first item of
tile t, unless it is a worker's first, is behind these at workers + t. Slot 2w is that of the tile which worker w
continues, slot 2w + 1 that of the one which it begins and does not end. Elsewhere a tile's slots are consecutive, and
items are about the longest first: those of the sequence with the longest ones, from its last tile on, then the next
sequence's. A sequence's are together because they read the same keys, which the second-level cache may hold for that
long.

Each item arrives once. In a batch-invariant plan a tile's slots are consecutive, and it is slots that arrive: one of
the item that begins the tile, one for each chunk of those that continue it. Such an item may be without queries where
its share was left none of the tile. Items that are listed (several tiles a sequence) are dealt to the workers in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    FINE_CHUNK,
    MAX_SORTED,
    MIDDLE_CHUNK,
    MIN_CHUNK,
    MIN_SHARE,
    SHARE_UNIT,
    AttentionTiling,
    ceil_div,
    chunk_begin,
    chunk_of,
    part_begin,
    part_of,
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
    make = _shares if tiling.has_shares else _items
    rows, keys = make(sequences, tiling, sliding_window)
    if rows:
        items[: len(rows)] = items.new_tensor(rows)[: len(items)]
    counts[:4] = counts.new_tensor([tiling.workers or len(rows), starts[-1], keys, 0])
    counts[4:] = 0


UNUSED = (0, 0, 0, 0, 0, 0, -1, 0, 0, 0, -1, 0)
Sequences = list[tuple[int, int, int, int]]  # index, length, first and end row


@dataclass(frozen=True)
class _Tile:
    """A sequence's only tile, in the line of all keys."""

    sequence: int
    row: int
    queries: int
    position: int
    first_key: int
    length: int
    unit: int  # keys
    start: int  # units of the line
    stop: int

    def key_at(self, place: int) -> int:
        """Position of the key at which a unit of the line begins."""
        return (self.first_key // self.unit + place - self.start) * self.unit


Part = tuple[int, int, int, int]  # queries, first and end key, slot


def _shares(sequences: Sequences, tiling: AttentionTiling, sliding_window: int | None) -> tuple[list[list[int]], int]:
    """Items of workers that have a share each, and the keys of a share."""
    unit = FINE_CHUNK if tiling.batch_invariant else SHARE_UNIT
    tiles: list[_Tile] = []
    line = 0
    for sequence, length, begin, end in sequences:
        if begin == end:
            continue
        position = length - (end - begin)
        first_key = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        units = max(1, ceil_div(length, unit) - first_key // unit)
        tiles.append(_Tile(sequence, begin, end - begin, position, first_key, length, unit, line, line + units))
        line += units
    share = max(MIN_SHARE // unit, ceil_div(line, tiling.workers))
    rows = [list(UNUSED)] * (tiling.workers + len(tiles))
    taken = 0  # slots, by tiles that want some
    for number, tile in enumerate(tiles):
        workers = range(tile.start // share, (tile.stop - 1) // share + 1)
        if tiling.batch_invariant:
            parts, first_slot, num_slots = _chunked_parts(tile, workers, share, taken, tiling.max_slots)
            taken = first_slot + num_slots
        else:
            parts, num_slots = _equal_parts(tile, workers, share), len(workers)
            first_slot = 2 * workers[0] + (tile.start % share > 0)
        for worker, (queries, key, end_key, slot) in zip(workers, parts, strict=True):
            end = min(tile.stop, (worker + 1) * share)
            is_followed = end == tile.stop and end % share > 0 and number + 1 < len(tiles)
            rows[worker if tile.start <= worker * share else tiling.workers + number] = [
                tile.sequence, tile.row, queries, tile.position, key, end_key, slot, first_slot, num_slots, num_slots,
                tiling.workers + number + 1 if is_followed else -1, tile.position,
            ]  # fmt: skip
    return rows, share * unit


def _equal_parts(tile: _Tile, workers: range, share: int) -> list[Part]:
    parts = []
    for worker in workers:
        begin, end = max(tile.start, worker * share), min(tile.stop, (worker + 1) * share)
        key = tile.first_key if begin == tile.start else tile.key_at(begin)
        slot = 2 * worker + (begin != worker * share) if len(workers) > 1 else -1
        parts.append((tile.queries, key, min(tile.length, tile.key_at(end)), slot))
    return parts


def _chunked_parts(
    tile: _Tile, workers: range, share: int, first_slot: int, max_slots: int
) -> tuple[list[Part], int, int]:
    """What each worker has of a tile, the tile's first slot and its slots: a chunk is the last worker's that a share's
    begin within it would give it to, and all of them are the first one's where there are not slots enough."""
    chunks = range(chunk_of(tile.first_key), chunk_of(max(tile.length - 1, tile.first_key)) + 1)
    taker = {}
    for chunk in chunks:
        end = tile.start + (chunk_begin(chunk + 1) - tile.key_at(tile.start)) // tile.unit
        taker[chunk] = (min(tile.stop, end) - 1) // share
    owner = taker[chunks[0]]
    continued = [chunk for chunk in chunks if taker[chunk] != owner]
    num_slots = len(continued) + 1 if continued else 0
    is_split = num_slots > 0 and first_slot + num_slots <= max_slots
    parts = []
    for worker in workers:
        own = [chunk for chunk in chunks if (taker[chunk] if is_split else owner) == worker]
        if not own:
            parts.append((0, 0, 0, -1))
            continue
        slot = -1
        if is_split:
            slot = first_slot + (0 if worker == owner else own[0] - continued[0] + 1)
        key, end_key = max(tile.first_key, chunk_begin(own[0])), min(tile.length, chunk_begin(own[-1] + 1))
        parts.append((tile.queries, key, end_key, slot))
    return parts, first_slot, num_slots


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
        chunk = MIDDLE_CHUNK
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
            first_of_tile, used, awaited = first_slot + tile * num_slots, num_slots, parts
            if split and tiling.batch_invariant:
                first_end = min(end_key, part_begin(part_of(first_key, chunk) + 1, chunk))
                last_folded = chunk_of(max(first_end - 1, first_key))
                used = awaited = max(chunk_of(max(end_key - 1, 0)) - last_folded, 0) + 1
            for part in range(parts if split else 1):
                key, part_end, slot = first_key, end_key, first_of_tile
                if split and tiling.batch_invariant:
                    index = part_of(first_key, chunk) + part
                    key, part_end = max(first_key, part_begin(index, chunk)), part_begin(index + 1, chunk)
                    slot += chunk_of(key) - last_folded if part else 0
                elif split:
                    key, part_end = first_key + part * chunk, first_key + (part + 1) * chunk
                    slot += part
                rows.append(
                    [
                        sequence, row, queries, position, key, min(end_key, part_end),
                        *((slot, first_of_tile, used, awaited) if split else (-1, 0, 0, 0)),
                        -1, length - (end - begin),
                    ]
                )  # fmt: skip
    if len(sequences) <= MAX_SORTED:
        lists.sort(key=lambda one: -one[0])
    listed = [row for _, rows in lists for row in rows]
    if tiling.batch_invariant:
        for index, item in enumerate(listed):
            item[10] = index + tiling.workers if index + tiling.workers < len(listed) else -1
        listed += [list(UNUSED)] * (tiling.workers - len(listed))
    return listed, chunk


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
    parts = part_of(max(seq_len - 1, 0), chunk) + 1
    slots = chunk_of(max(seq_len - 1, 0)) + 1
    if sliding_window is not None:
        parts = min(parts, ceil_div(span, chunk) + 1)
        slots = min(slots, ceil_div(span, FINE_CHUNK) + 1)
    return parts, slots
