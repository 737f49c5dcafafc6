"""Paged attention in torch: what the Triton kernel must compute, and the serving path of machines without a GPU.

Query tokens are cut into tiles; tiles of equal query count and similar span are stacked into groups; a group gathers
its keys and values a chunk at a time, attends to each chunk with one fused call, and merges the chunks by their
log-sum-exp. Working memory is bounded by ``GATHERED`` and ``LOGITS`` elements whatever the lengths; a batch of one long
and many short sequences is never padded to the long one. How a batch is cut follows from its lengths alone and is
remembered, up to ``REMEMBERED`` bytes, so that a model's layers share it.

In batch-invariant mode tiles and chunks lie at fixed positions of the sequence and are padded to one size, so that the
fused call, which computes each tile and head by itself, does the same for a row whatever surrounds it.

Layouts: query [T, Hq, D]; key_cache [N, S, Hkv, D]; value_cache [N, S, Hkv, Dv]; block_table [B, max_blocks].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.quantization import dequantize

GATHERED = 1 << 20  # elements of a group's keys and values together at a time
LOGITS = 1 << 20  # elements of a group's mask, or logits, at a time
MAX_TILE_QUERIES = 256
PADDING = 1 << 17  # elements of padding that cost less than one more group
REMEMBERED = 1 << 26  # bytes of a batch's groups that are kept for its next layers
REMEMBERED_BATCHES = 4
INVARIANT_QUERIES = 16  # of a batch-invariant tile
INVARIANT_KEYS = 256  # of a batch-invariant chunk
INFINITY = float("inf")


@dataclass(frozen=True)
class Visibility:
    """What of the options decides which keys a query sees from positions alone."""

    causal: bool
    sliding_window: int | None
    attention_chunk: int | None


@dataclass(frozen=True)
class Tile:
    """Some consecutive query tokens of one sequence, and the keys that any of them can see."""

    sequence: int
    row: int  # of its first query in the batch
    queries: int
    position: int  # of its first query in the sequence
    origin: int  # position of the sequence's first query token
    first_key: int
    end_key: int

    @property
    def span(self) -> int:
        return self.end_key - self.first_key

    @property
    def num_chunks(self) -> int:
        """Batch-invariant chunks that it sees some of."""
        return -(-self.end_key // INVARIANT_KEYS) - self.first_key // INVARIANT_KEYS


@dataclass(frozen=True)
class Chunk:
    """C consecutive keys of each tile of a group; where a tile has fewer, its last key again, masked."""

    position: Tensor  # int64 [G, C], of the keys
    block: Tensor  # int64 [G, C], columns of the block table
    slot: Tensor  # int64 [G, C], in the block
    mask: Tensor | None  # fp32 [G, 1, Q or 1, C], 0 or -inf; None: all is seen
    blind: Tensor | None  # bool [G, 1, Q or 1]: queries that see none of the chunk; None: there are none

    @property
    def num_bytes(self) -> int:
        tensors = (self.position, self.block, self.slot, self.mask, self.blind)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Group:
    """G tiles of Q queries that are computed together."""

    queries: int
    sequence: Tensor  # int64 [G, 1]
    rows: Tensor  # int64 [G * Q], of the batch; where a batch-invariant tile has none, one of its others
    kept: Tensor | None  # int64, which of the rows are results; None: all
    written: Tensor  # int64, the rows of the results
    query_position: Tensor  # int64 [G, Q, 1]
    origin: Tensor  # int64 [G, 1, 1]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return 4 * self.rows.nbytes + sum(chunk.num_bytes for chunk in self.chunks)


class Batch:
    """A batch cut into groups. They are made one at a time, and kept while all of them together are small."""

    def __init__(self, parts: list[list[Tile]], make_group: Callable[[list[Tile]], Group]) -> None:
        self.num_results = sum(tile.queries for part in parts for tile in part)
        self.num_kept_bytes = 0
        self._parts = parts
        self._make_group = make_group
        self._kept: dict[int, Group] = {}

    def __iter__(self) -> Iterator[Group]:
        for number, part in enumerate(self._parts):
            group = self._kept.get(number)
            if group is None:
                group = self._make_group(part)
                if self.num_kept_bytes + group.num_bytes <= REMEMBERED:
                    self.num_kept_bytes += group.num_bytes
                    self._kept[number] = group
            yield group


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
    batch_invariant: bool = False,
) -> None:
    """Write attention into ``out`` [T, Hq, Dv] and its log-sum-exp into ``lse`` (fp32 [T, Hq]; None: not wanted)."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, head_size_v = key_cache.shape[2], out.shape[2]
    q_scale = options.q_scale
    if q_scale is not None and q_scale.dim() == 1:
        q_scale = q_scale.repeat_interleave(num_heads // num_kv_heads)
    batch = cut_batch(
        tuple(seq_lens.tolist()),
        tuple(query_start_loc.tolist()),
        key_cache.shape[1],
        num_heads,
        num_kv_heads * (head_size + head_size_v),
        Visibility(options.causal and options.tree_mask is None, options.sliding_window, options.attention_chunk),
        batch_invariant,
    )
    if batch.num_results < num_tokens:  # padding, and positions below 0
        out.zero_()
        if lse is not None:
            lse.fill_(-INFINITY)
    for group in batch:
        # Of a lone query token, the heads that share a KV head are the rows of one product; of several, the tokens are.
        heads = (num_kv_heads, num_heads // num_kv_heads) if group.queries == 1 else (group.queries, num_heads)
        group_query = dequantize(query.index_select(0, group.rows), q_scale).view(-1, *heads, head_size)
        if group.queries > 1:
            group_query = group_query.transpose(1, 2)
        result, result_lse = _attend(group_query, key_cache, value_cache, block_table, group, options)
        if options.sinks is not None:
            sinks = options.sinks.view(heads) if group.queries == 1 else options.sinks[:, None]
            result, result_lse = _add_sink(result, result_lse, sinks)
        if group.queries > 1:
            result, result_lse = result.transpose(1, 2), result_lse.transpose(1, 2)
        result, result_lse = result.reshape(-1, num_heads, head_size_v), result_lse.reshape(-1, num_heads)
        if group.kept is not None:
            result, result_lse = result[group.kept], result_lse[group.kept]
        out.index_copy_(0, group.written, result.to(out.dtype))
        if lse is not None:
            lse.index_copy_(0, group.written, result_lse)


@lru_cache(maxsize=REMEMBERED_BATCHES)
def cut_batch(
    seq_lens: tuple[int, ...],
    query_start_loc: tuple[int, ...],
    block_size: int,
    num_heads: int,
    kv_elements: int,
    visibility: Visibility,
    batch_invariant: bool = False,
) -> Batch:
    """Cut a batch into groups. ``kv_elements``: elements of one key and its value, over all KV heads."""
    tile_queries = max(1, min(MAX_TILE_QUERIES, LOGITS // (512 * num_heads)))
    if batch_invariant:
        tile_queries = INVARIANT_QUERIES
    cut = _cut_tiles(seq_lens, query_start_loc, tile_queries, visibility, batch_invariant)
    tiles = [tile for tile in cut if tile.span > 0]
    if batch_invariant:
        size = INVARIANT_KEYS * max(kv_elements, num_heads * INVARIANT_QUERIES * GATHERED // LOGITS)
        tiles.sort(key=lambda tile: tile.num_chunks)
        count = max(1, GATHERED // size)
        parts = [tiles[first : first + count] for first in range(0, len(tiles), count)]
        return Batch(parts, lambda part: _make_invariant_group(part, block_size, visibility))
    parts = list(_group_tiles(tiles, num_heads, kv_elements))
    return Batch(parts, lambda part: _make_group(part, block_size, num_heads, kv_elements, visibility))


def _cut_tiles(
    seq_lens: tuple[int, ...],
    query_start_loc: tuple[int, ...],
    tile_queries: int,
    visibility: Visibility,
    is_aligned: bool,
) -> Iterator[Tile]:
    """Tiles of up to ``tile_queries``; if aligned they end where the position is a multiple of it."""
    window, chunk = visibility.sliding_window, visibility.attention_chunk
    for sequence, (seq_len, (begin, end)) in enumerate(zip(seq_lens, itertools.pairwise(query_start_loc), strict=True)):
        origin = seq_len - (end - begin)
        row = begin + max(0, -origin)  # positions below 0 have no result
        while row < end:
            position = origin + row - begin
            queries = min(tile_queries - (position % tile_queries if is_aligned else 0), end - row)
            last = position + queries - 1
            first_key, end_key = 0, seq_len
            if window is not None:
                first_key, end_key = max(0, position - window + 1), min(seq_len, last + window)
            if chunk is not None:
                first_key = max(first_key, position // chunk * chunk)
                end_key = min(end_key, (last // chunk + 1) * chunk)
            if visibility.causal:
                end_key = min(end_key, last + 1)
            yield Tile(sequence, row, queries, position, origin, first_key, end_key)
            row += queries


def _group_tiles(tiles: list[Tile], num_heads: int, kv_elements: int) -> Iterator[list[Tile]]:
    """Stack tiles of equal query count, as long as what is gathered stays small and little of it is padding."""
    group: list[Tile] = []
    total = 0
    for tile in sorted(tiles, key=lambda tile: (tile.queries, tile.span)):
        count = len(group) + 1
        keys = count * tile.span
        stacks = (keys - total - tile.span) * kv_elements <= max(PADDING, keys * kv_elements // 8)
        fits = keys * kv_elements <= GATHERED and keys * num_heads * tile.queries <= LOGITS
        if group and not (stacks and fits and tile.queries == group[0].queries):
            yield group
            group, total = [], 0
        group.append(tile)
        total += tile.span
    if group:
        yield group


def _columns(tiles: list[Tile]) -> Tensor:
    """sequence, row, position, origin, first_key and end_key of tiles: int64 [6, G, 1]."""
    columns = [[t.sequence, t.row, t.position, t.origin, t.first_key, t.end_key] for t in tiles]
    return torch.tensor(columns).T[:, :, None]


def _make_group(tiles: list[Tile], block_size: int, num_heads: int, kv_elements: int, visibility: Visibility) -> Group:
    sequence, row, position, origin, first_key, end_key = _columns(tiles)
    queries = tiles[0].queries
    steps = torch.arange(queries)
    query_position = (position + steps)[:, :, None]
    span = max(tile.span for tile in tiles)
    size = max(1, min(GATHERED // kv_elements, LOGITS // (num_heads * queries)) // len(tiles))  # keys at a time
    chunks = tuple(
        _make_chunk(
            first_key + torch.arange(start, min(start + size, span)), first_key, end_key, query_position, block_size,
            visibility,
        )
        for start in range(0, span, size)
    )  # fmt: skip
    rows = (row + steps).flatten()
    return Group(queries, sequence, rows, None, rows, query_position, origin[:, :, None], chunks)


def _make_invariant_group(tiles: list[Tile], block_size: int, visibility: Visibility) -> Group:
    sequence, row, position, origin, first_key, end_key = _columns(tiles)
    steps = torch.arange(INVARIANT_QUERIES)
    aligned = position // INVARIANT_QUERIES * INVARIANT_QUERIES
    query_position = (aligned + steps)[:, :, None]
    index = aligned + steps - position  # of each row in its tile, outside 0..queries where it has none
    queries = torch.tensor([[tile.queries] for tile in tiles])
    exists = ((index >= 0) & (index < queries)).flatten()
    rows = (row + index.clamp_min(0).minimum(queries - 1)).flatten()
    first_chunk = first_key // INVARIANT_KEYS
    chunks = tuple(
        _make_chunk(
            (first_chunk + number) * INVARIANT_KEYS + torch.arange(INVARIANT_KEYS), first_key, end_key,
            query_position, block_size, visibility,
        )
        for number in range(max(tile.num_chunks for tile in tiles))
    )  # fmt: skip
    kept = exists.nonzero()[:, 0]
    return Group(INVARIANT_QUERIES, sequence, rows, kept, rows[kept], query_position, origin[:, :, None], chunks)


def _make_chunk(
    wanted: Tensor,  # int64 [G, C], positions of keys
    first_key: Tensor,
    end_key: Tensor,
    query_position: Tensor,
    block_size: int,
    visibility: Visibility,
) -> Chunk:
    key_position = torch.minimum(torch.maximum(wanted, first_key), end_key - 1)
    visible = (wanted == key_position)[:, None, :]
    if query_position.shape[1] > 1 or visibility.sliding_window is not None or visibility.attention_chunk is not None:
        visible = visible & _sees(query_position, wanted[:, None, :], visibility)
    mask = blind = None
    if not visible.all():
        mask = torch.zeros(visible.shape, dtype=torch.float32).masked_fill_(~visible, -INFINITY)[:, None]
        blind = ~visible.any(-1)[:, None]
    return Chunk(
        key_position,
        key_position // block_size,
        key_position % block_size,
        mask,
        blind if blind is not None and blind.any() else None,
    )


def _sees(query_position: Tensor, key_position: Tensor, visibility: Visibility) -> Tensor:
    """Which keys [G, 1, C] the queries [G, Q, 1] see: bool [G, Q, C]."""
    distance = query_position - key_position
    visible = distance >= 0 if visibility.causal else torch.ones_like(distance, dtype=torch.bool)
    if visibility.sliding_window is not None:
        visible &= distance.abs() < visibility.sliding_window
    if visibility.attention_chunk is not None:
        visible &= query_position // visibility.attention_chunk == key_position // visibility.attention_chunk
    return visible


def _attend(
    query: Tensor,  # fp32 [G, H, Q, D]: H = Hq, or for lone query tokens H = Hkv and Q = Hq / Hkv
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    group: Group,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of a group: fp32 [G, H, Q, Dv] and its log-sum-exp [G, H, Q]."""
    state: tuple[Tensor, Tensor] | None = None
    for chunk in group.chunks:
        block = block_table[group.sequence, chunk.block]
        keys = _gather(key_cache, block, chunk.slot, options.k_scale)
        values = _gather(value_cache, block, chunk.slot, options.v_scale)
        mask, blind = chunk.mask, chunk.blind
        if options.tree_mask is not None:
            seen = _sees_in_tree(chunk.position[:, None] - group.origin, options.tree_mask[group.rows], group.queries)
            tree = torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, -INFINITY)[:, None]
            mask = tree if mask is None else mask + tree
            blind = mask.isneginf().all(-1)
        if options.alibi_slopes is not None:
            distance = (group.query_position - chunk.position[:, None]).abs()[:, None]  # [G, 1, Q, C]
            slopes = options.alibi_slopes
            slopes = slopes.view(1, *query.shape[1:3], 1) if group.queries == 1 else slopes[:, None, None]
            mask = -slopes * distance if mask is None else mask - slopes * distance
        part = _attend_chunk(query, keys, values, mask, options.scale, options.softcap)
        if blind is not None:
            part[1].masked_fill_(blind, -INFINITY)
        state = part if state is None else merge_states(*state, *part)
    assert state is not None, "a tile without keys is in no group"
    return state


def _attend_chunk(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """[G, H, Q, D] over keys and values [G, Hkv, C, D] with an additive mask: attention and its log-sum-exp [G, H, Q].

    Where the mask is all -inf the output is 0 and the log-sum-exp is of no use.
    """
    if softcap is None and keys.shape[3] == values.shape[3]:
        # What F.scaled_dot_product_attention runs on a CPU, called here for its second result.
        if mask is not None and mask.shape[1] > 1:
            mask = mask.expand(*query.shape[:3], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
    sharing = query.shape[1] // keys.shape[1]
    rows = query.unflatten(1, (-1, sharing)).flatten(2, 3)
    logits = torch.matmul(rows, keys.transpose(2, 3)).view(*query.shape[:3], -1).mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        logits.add_(mask)
    lse = torch.logsumexp(logits, -1)
    shift = lse.masked_fill(lse == -INFINITY, 0.0)
    probabilities = logits.sub_(shift[..., None]).exp_().view(*rows.shape[:3], -1)
    return torch.matmul(probabilities, values).view(*query.shape[:3], -1), lse


def _sees_in_tree(column: Tensor, tree_mask: Tensor, queries: int) -> Tensor:
    """Keys before the sequence's query tokens (column [G, 1, C] < 0) are seen, query tokens where the mask says."""
    tree_mask = tree_mask.view(-1, queries, tree_mask.shape[-1])
    inside = (column >= 0) & (column < tree_mask.shape[-1])
    picked = torch.gather(tree_mask, 2, column.clamp(0, tree_mask.shape[-1] - 1).expand(-1, queries, -1))
    return (column < 0) | (inside & picked)


def _gather(cache: Tensor, block: Tensor, slot: Tensor, scale: Tensor | None) -> Tensor:
    """Tokens [G, C] of a cache as fp32 [G, Hkv, C, D], dequantized; freshly allocated."""
    if cache.stride(2) == cache.shape[3] and cache.stride(0) % cache.stride(1) == 0:
        # Slots lie at equal distances, whatever is between them: a token is one row of one matrix.
        blocks, block_size = cache.shape[:2]
        pitch = cache.stride(0) // cache.stride(1)
        rows = cache.as_strided(((blocks - 1) * pitch + block_size, *cache.shape[2:]), cache.stride()[1:])
        tokens = rows.index_select(0, (block.long() * pitch + slot).flatten()).view(*block.shape, *cache.shape[2:])
    else:
        tokens = cache[block.long(), slot]
    if scale is not None and scale.dim() == 3:
        scale = scale[block.long(), slot]
    return dequantize(tokens, scale).transpose(1, 2)


def _add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One logit more in the denominator: out [G, H, Q, Dv], lse [G, H, Q], sinks broadcast to lse."""
    total = _add_logs(lse, sinks.expand_as(lse))
    return out * torch.exp(lse - total)[..., None].nan_to_num(0.0), total


def _add_logs(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)). ``torch.logaddexp`` computes the last few elements of a tensor otherwise than the others,
    and which are the last depends on the batch."""
    largest = torch.maximum(a, b)
    shift = largest.masked_fill(largest == -INFINITY, 0.0)
    return largest + torch.log(torch.exp(a - shift) + torch.exp(b - shift))


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: fp32 [..., Dv] and [...]."""
    lse = _add_logs(lse_a, lse_b)
    safe = lse.masked_fill(lse == -INFINITY, 0.0)
    weight_a, weight_b = (torch.exp(part - safe)[..., None] for part in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_states`` of [T, Hq, Dv] in any floating dtype."""
    out, lse = merge_states(out_a.float(), lse_a, out_b.float(), lse_b)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()
