"""The attention plan in plain Python: what the plan kernel must write. See ``kernels/tiling.py`` for the vocabulary.

A plan is three int32 tensors:

- items [max_items, 8]: sequence, first row in the batch, queries, position of the first query, first key, end key,
  slot and merge (-1: the tile is not split, its item writes the output);
- merges [max_merges, 2]: first slot, number of slots;
- counts [4 + max_merges * Hkv]: items, merges, rows that belong to a sequence, chunk length; then, for each merge and
KV
  head, how many of its items are done: 0 between two launches.
"""

from __future__ import annotations

from torch import Tensor

from pagedattn.kernels.tiling import CHUNK_ALIGNMENT, MIN_CHUNK, AttentionTiling, ceil_div


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
    chunk = max(MIN_CHUNK, ceil_div(ceil_div(total, tiling.target_items), CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT)
    item_rows: list[list[int]] = []
    merge_rows: list[list[int]] = []
    slots = 0
    for (sequence, length, begin, end), span in zip(sequences, spans, strict=True):
        chunks = max(1, ceil_div(span, chunk))
        for row in range(begin, end, per_tile):
            queries = min(per_tile, end - row)
            position = length - (end - row)
            first_key, end_key = 0, length
            if sliding_window is not None:
                first_key = max(0, position - sliding_window + 1)
                end_key = min(length, position + queries - 1 + sliding_window)
            for index in range(chunks):
                key = first_key + index * chunk
                slot = slots + index if chunks > 1 else -1
                merge = len(merge_rows) if chunks > 1 else -1
                item_rows.append([sequence, row, queries, position, key, min(end_key, key + chunk), slot, merge])
            if chunks > 1:
                merge_rows.append([slots, chunks])
                slots += chunks
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
