"""Paged attention in torch: what the Triton kernel must compute, and the serving path of machines without a GPU.

Query tokens are cut into tiles, tiles of equal shape and similar length are stacked into groups, and a group walks
over its keys a chunk at a time with an online softmax (Milakov and Gimelshein, 2018). Working memory is bounded by
``GATHERED`` and ``LOGITS`` elements whatever the lengths; a batch of one long and many short sequences is never
padded to the long one.

Layouts: query [T, Hq, D]; key_cache [N, S, Hkv, D]; value_cache [N, S, Hkv, Dv]; block_table [B, max_blocks].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedattn.kernels.quantization import dequantize

GATHERED = 1 << 18  # elements of a group's keys and values together at a time: they stay in a core's cache
LOGITS = 1 << 20  # elements of a group's logits at a time
MAX_TILE_QUERIES = 128
PADDING_RATIO = 1.5  # a group's longest span may make it this much larger than the sum of its spans


@dataclass(frozen=True)
class Tile:
    """Up to MAX_TILE_QUERIES consecutive query tokens of one sequence, and the keys that any of them can see."""

    sequence: int
    row: int  # of its first query in the batch
    queries: int
    position: int  # of its first query in the sequence
    origin: int  # position of the sequence's first query token
    first_key: int
    end_key: int


class Group:
    """Tiles of equal query count that are computed together, as columns. G tiles of Q queries."""

    def __init__(self, tiles: list[Tile], block_size: int, device: torch.device) -> None:
        self.queries = tiles[0].queries
        self.spans = [(tile.first_key, tile.end_key) for tile in tiles]
        self.first_blocks = [tile.first_key // block_size for tile in tiles]
        self.num_blocks = max(
            -(-tile.end_key // block_size) - first for tile, first in zip(tiles, self.first_blocks, strict=True)
        )
        columns = [[t.sequence, t.row, t.position, t.origin, t.first_key, t.end_key] for t in tiles]
        self.sequence, row, position, origin, first_key, end_key = torch.tensor(columns, device=device).unbind(1)
        steps = torch.arange(self.queries, device=device)
        self.rows = row[:, None] + steps  # [G, Q]
        self.query_position = (position[:, None] + steps)[:, :, None]  # [G, Q, 1]
        self.origin, self.first_key, self.end_key = (
            c[:, None, None] for c in (origin, first_key, end_key)
        )  # [G, 1, 1]

    def table(self, block_table: Tensor, start: int, count: int, block_size: int) -> Tensor:
        """Ids of each tile's blocks start..start + count, [G, count]; blocks that it does not reach read as block 0."""
        index = self.first_key[:, 0] // block_size + torch.arange(start, start + count, device=block_table.device)
        needed = index * block_size < self.end_key[:, 0]
        ids = block_table[self.sequence[:, None], index.clamp_max(block_table.shape[1] - 1)]
        return ids.long().masked_fill_(~needed, 0)


@dataclass(frozen=True)
class Masking:
    """Everything that changes a logit after the dot product. Shapes and meaning as in ``pagedattn.paged_attention``."""

    causal: bool = True
    sliding_window: int | None = None
    attention_chunk: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    masking: Masking,
    out: Tensor,
    lse: Tensor | None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write attention into ``out`` [T, Hq, Dv] and its log-sum-exp into ``lse`` (fp32 [T, Hq]; None: not wanted)."""
    if q_scale is not None and q_scale.dim() == 1:
        q_scale = q_scale.repeat_interleave(query.shape[1] // key_cache.shape[2])
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))
    num_heads, num_kv_heads, block_size = query.shape[1], key_cache.shape[2], key_cache.shape[1]
    kv_elements = num_kv_heads * (query.shape[2] + out.shape[2])  # per key
    tile_queries = max(1, min(MAX_TILE_QUERIES, LOGITS // (512 * num_heads)))
    tiles = _cut_tiles(seq_lens.tolist(), query_start_loc.tolist(), tile_queries, masking)
    for group in _group_tiles(tiles, block_size, kv_elements, num_heads):
        columns = Group(group, block_size, query.device)
        group_query = dequantize(query[columns.rows], q_scale) * scale
        result, result_lse = _attend(
            group_query, key_cache, value_cache, block_table, columns, masking, k_scale, v_scale
        )
        out[columns.rows] = result.to(out.dtype)
        if lse is not None:
            lse[columns.rows] = result_lse


def _cut_tiles(seq_lens: list[int], query_start_loc: list[int], tile_queries: int, masking: Masking) -> list[Tile]:
    tiles = []
    window, chunk = masking.sliding_window, masking.attention_chunk
    for sequence, seq_len in enumerate(seq_lens):
        begin, end = query_start_loc[sequence], query_start_loc[sequence + 1]
        origin = seq_len - (end - begin)
        for row in range(begin + max(0, -origin), end, tile_queries):  # positions below 0 have no result
            queries = min(tile_queries, end - row)
            position = origin + row - begin
            last = position + queries - 1
            first_key, end_key = 0, seq_len
            if window is not None:
                first_key, end_key = max(0, position - window + 1), min(seq_len, last + window)
            if chunk is not None:
                first_key, end_key = (
                    max(first_key, position // chunk * chunk),
                    min(end_key, (last // chunk + 1) * chunk),
                )
            if masking.causal and masking.tree_mask is None:
                end_key = min(end_key, last + 1)
            tiles.append(Tile(sequence, row, queries, position, origin, first_key, end_key))
    return tiles


def _group_tiles(tiles: list[Tile], block_size: int, kv_elements: int, num_heads: int) -> Iterator[list[Tile]]:
    """Stack tiles of equal query count and similar span, as long as one block of each fits."""
    group: list[Tile] = []
    total = 0
    for tile in sorted(tiles, key=lambda tile: (tile.queries, tile.end_key - tile.first_key)):
        span = tile.end_key - tile.first_key + block_size
        count = len(group) + 1
        stacks = count * span <= PADDING_RATIO * (total + span)
        keys = count * block_size
        fits = keys * kv_elements <= GATHERED and keys * num_heads * tile.queries <= LOGITS
        if group and not (stacks and fits and tile.queries == group[0].queries):
            yield group
            group, total = [], 0
        group.append(tile)
        total += span
    if group:
        yield group


def _attend(
    query: Tensor,  # fp32 [G, Q, Hq, D], scaled
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    group: Group,
    masking: Masking,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of a group of G tiles: fp32 [G, Q, Hq, Dv] and its log-sum-exp [G, Q, Hq]."""
    tiles, queries, num_heads, head_size = query.shape
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    head_size_v = value_cache.shape[3] * (2 if value_cache.dtype == torch.uint8 else 1)
    heads_per_kv = num_heads // num_kv_heads
    rows = queries * heads_per_kv
    # [Hkv, G, Q * heads_per_kv, D]: the queries of one KV head are the rows of one batched product.
    query = query.view(tiles, queries, num_kv_heads, heads_per_kv, head_size).permute(2, 0, 1, 3, 4)
    query = query.reshape(num_kv_heads, tiles, rows, head_size)
    maximum = query.new_full((num_kv_heads, tiles, rows), float("-inf"))
    denominator = torch.zeros_like(maximum)
    accumulator = query.new_zeros(num_kv_heads, tiles, rows, head_size_v)

    at_once = min(GATHERED // (num_kv_heads * (head_size + head_size_v)), LOGITS // (num_heads * queries)) // tiles
    chunk = max(1, at_once // block_size)  # blocks of each tile at once
    for start in range(0, group.num_blocks, chunk):
        count = min(chunk, group.num_blocks - start)
        table = group.table(block_table, start, count, block_size)
        keys = _gather(key_cache, table, k_scale)
        values = _gather(value_cache, table, v_scale)
        for index, (first_key, end_key) in enumerate(group.spans):
            # Slots that no query of the tile sees may hold anything, and 0 * NaN is NaN.
            begin = (group.first_blocks[index] + start) * block_size
            if begin < first_key:
                values[index, : first_key - begin] = 0
            if begin + values.shape[1] > end_key:
                values[index, max(0, end_key - begin) :] = 0
        logits = query.new_empty(num_kv_heads, tiles, rows, keys.shape[1])
        for head in range(num_kv_heads):
            torch.bmm(query[head], keys[:, :, head].transpose(1, 2), out=logits[head])
        key_position = (group.first_key // block_size + start) * block_size
        key_position = key_position + torch.arange(keys.shape[1], device=query.device)  # [G, 1, C]
        _apply_masking(logits.view(num_kv_heads, tiles, queries, heads_per_kv, -1), key_position, group, masking)
        new_maximum = torch.maximum(maximum, logits.amax(-1))
        shift = new_maximum.masked_fill(new_maximum == float("-inf"), 0.0)
        probabilities = logits.sub_(shift[..., None]).exp_()
        correction = torch.exp(maximum - shift)
        denominator = denominator.mul_(correction).add_(probabilities.sum(-1))
        accumulator.mul_(correction[..., None])
        for head in range(num_kv_heads):
            accumulator[head].baddbmm_(probabilities[head], values[:, :, head])
        maximum = new_maximum
    return _finish(maximum, denominator, accumulator, queries, masking.sinks)


def _apply_masking(logits: Tensor, key_position: Tensor, group: Group, masking: Masking) -> None:
    """Softcap, bias and mask logits [Hkv, G, Q, heads_per_kv, C] in place. key_position: [G, 1, C]."""
    if masking.softcap is not None:
        logits.div_(masking.softcap).tanh_().mul_(masking.softcap)
    distance = group.query_position - key_position  # [G, Q, C]
    if masking.alibi_slopes is not None:
        logits.sub_(masking.alibi_slopes.view(logits.shape[0], 1, 1, -1, 1) * distance.abs()[:, :, None])
    visible = (key_position >= group.first_key) & (key_position < group.end_key)
    if masking.tree_mask is not None:
        visible = visible & _tree_visible(key_position - group.origin, masking.tree_mask[group.rows])
    elif masking.causal and group.queries > 1:  # a lone query sees all of its tile's span
        visible = visible & (distance >= 0)
    if masking.sliding_window is not None:
        visible = visible & (distance.abs() < masking.sliding_window)
    if masking.attention_chunk is not None:
        query_chunk = group.query_position // masking.attention_chunk
        visible = visible & (query_chunk == key_position // masking.attention_chunk)
    logits.masked_fill_(~visible[:, :, None], float("-inf"))


def _tree_visible(column: Tensor, mask: Tensor) -> Tensor:
    """Keys before the sequence's query tokens (column < 0) are seen, query tokens where mask [G, Q, columns] says."""
    inside = (column >= 0) & (column < mask.shape[-1])
    picked = torch.gather(mask, 2, column.clamp(0, mask.shape[-1] - 1).expand(-1, mask.shape[1], -1))
    return (column < 0) | (inside & picked)


def _finish(
    maximum: Tensor, denominator: Tensor, accumulator: Tensor, queries: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Normalize [Hkv, G, rows(, Dv)] and restore [G, Q, Hq(, Dv)]."""
    num_kv_heads, tiles, rows, _head_size_v = accumulator.shape
    if sinks is not None:
        sink = sinks.view(num_kv_heads, 1, 1, rows // queries).expand(-1, tiles, queries, -1).reshape(maximum.shape)
        total = torch.maximum(maximum, sink)
        shift = total.masked_fill(total == float("-inf"), 0.0)
        correction = torch.exp(maximum - shift)
        denominator = denominator * correction + torch.exp(sink - shift)
        accumulator = accumulator * correction[..., None]
        maximum = total
    lse = maximum + denominator.log()  # -inf + -inf where nothing was visible
    result = accumulator / denominator.masked_fill(denominator == 0, 1.0)[..., None]

    def restore(tensor: Tensor) -> Tensor:
        tensor = tensor.view(num_kv_heads, tiles, queries, rows // queries, -1)
        return tensor.permute(1, 2, 0, 3, 4).reshape(tiles, queries, -1, tensor.shape[-1])

    return restore(result), restore(lse)[..., 0]


def _gather(cache: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    """Blocks [G, count] of a cache as fp32 [G, count * S, Hkv, D], dequantized; freshly allocated."""
    ids = table.flatten()
    shape = (table.shape[0], -1, *cache.shape[2:])
    if scale is not None and scale.dim() == 3:
        scale = scale.index_select(0, ids).view(*shape[:3])
    return dequantize(cache.index_select(0, ids).view(shape), scale)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: [T, Hq, Dv] and fp32 [T, Hq]."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = (torch.exp(part - safe)[..., None] for part in (lse_a, lse_b))
    return (out_a.float() * weight_a + out_b.float() * weight_b).to(out_a.dtype), lse
