"""How attention work is cut: tiles of query rows, items of KV tokens, and the launch that runs them.

Pure functions of host integers, so that they can be tested anywhere and never cost a synchronization. The vocabulary:

- a *tile* is up to ``queries_per_tile`` consecutive query tokens of one sequence with ``heads_per_tile`` of the query
  heads of one KV head: the rows of one tensor-core product. A *head tile* is such a set of heads; there are
  ``head_tiles``, one for each KV head unless more query heads share it than fit in a product;
- an *item* is one tile against some of the keys it can see. Items are what a plan lists and what a thread block runs,
  once for each head tile;
- a tile of several items is *split*: its items write fp32 partials into *slots*, and a *merge* adds them up.

The items' length is chosen on the device (it depends on the lengths); its bounds here make every buffer's size a
function of shapes alone.

A batch-invariant plan reduces every row in one order whatever surrounds it: keys are taken in *chunks* that lie at
fixed positions of the sequence (``chunk_of``), each chunk gives a partial, and partials are added up from the first
on, in registers where one item has several chunks, by the merge where the tile is split. Chunks are longer far into a
sequence, so that long sequences do not leave many partials.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MIN_CHUNK = 128  # keys; a shorter item costs more in its launch and merge than it saves
CHUNK_ALIGNMENT = 128  # keys; a multiple of every BLOCK_N, so that only an item's last iteration is ragged
FINE_CHUNK = 256  # keys of a batch-invariant chunk below COARSE_FROM
COARSE_CHUNK = 2048  # and from there on
COARSE_FROM = 8192
INVARIANT_ROWS = 64
INVARIANT_PARTIAL_BYTES = 1 << 26  # of partials that a batch-invariant plan may spend beyond one split tile
MAX_ROWS = {128: 128, 256: 64, 576: 32}  # rows of a tile by the largest head size they are for


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; also for symbolic sizes."""
    return (a + b - 1) // b


def chunk_of(position: int) -> int:
    """Index of the batch-invariant chunk that a key position lies in."""
    if position < COARSE_FROM:
        return position // FINE_CHUNK
    return COARSE_FROM // FINE_CHUNK + (position - COARSE_FROM) // COARSE_CHUNK


def max_chunks(max_seq_len: int) -> int:
    """Upper bound on a sequence's batch-invariant chunks; also for symbolic sizes, hence no branch."""
    return min(ceil_div(max_seq_len, FINE_CHUNK), COARSE_FROM // FINE_CHUNK + ceil_div(max_seq_len, COARSE_CHUNK))


@dataclass(frozen=True)
class AttentionTiling:
    """Tile shape and buffer bounds of one attention geometry."""

    rows: int  # of a tile: a power of two >= 16
    heads_per_tile: int
    head_tiles: int
    queries_per_tile: int
    tiles_per_sequence: int
    target_items: int  # items per head tile that fill the device
    max_items: int
    max_slots: int  # per head tile
    max_merges: int
    slot_rows: int  # rows of a slot: those of a tile that can be used
    batch_invariant: bool

    @property
    def num_counts(self) -> int:
        """Elements of a plan's counts."""
        return 4 + self.max_merges * self.head_tiles


def choose_tiling(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    head_size_v: int,
    max_query_len: int,
    max_seq_len: int,
    num_seqs: int,
    programs: int,
    batch_invariant: bool = False,
) -> AttentionTiling:
    """Choose the tile of a geometry. ``programs`` is how many thread blocks the device runs at once."""
    group = num_heads // num_kv_heads
    largest_head = max(head_size, head_size_v)
    largest = next(rows for size, rows in MAX_ROWS.items() if largest_head <= size)
    if batch_invariant:  # one shape of product for every query length: another shape may sum in another order
        largest = min(largest, INVARIANT_ROWS)
    tiles_per_kv_head = ceil_div(group, largest)
    heads_per_tile = ceil_div(group, tiles_per_kv_head)
    head_tiles = num_kv_heads * tiles_per_kv_head
    rows = max(16, next_power_of_2(heads_per_tile))
    while rows < largest and (batch_invariant or rows < max_query_len * heads_per_tile):
        rows *= 2
    queries_per_tile = rows // heads_per_tile
    tiles_per_sequence = ceil_div(max_query_len, queries_per_tile)
    max_tiles = num_seqs * tiles_per_sequence
    target_items = ceil_div(programs, head_tiles)
    slot_rows = min(rows, max_query_len * heads_per_tile)
    # An item has at least total / target_items keys, so cutting adds at most target_items items, and a split tile
    # (of two or more items) has at most twice as many items as it has whole ones. A batch-invariant item ends where a
    # chunk does, so a window adds another to each split tile, of which there are at most target_items.
    max_slots = 2 * target_items
    if batch_invariant:  # a slot for each chunk; tiles for which none are left are not split
        chunks = max_chunks(max_seq_len)
        afforded = INVARIANT_PARTIAL_BYTES // (head_tiles * rows * head_size_v * 4)
        max_slots = chunks + min(afforded, target_items * chunks)
    can_split = max_seq_len > (FINE_CHUNK if batch_invariant else MIN_CHUNK)
    return AttentionTiling(
        rows=rows,
        heads_per_tile=heads_per_tile,
        head_tiles=head_tiles,
        queries_per_tile=queries_per_tile,
        tiles_per_sequence=tiles_per_sequence,
        target_items=target_items,
        max_items=max_tiles + (target_items * (2 if batch_invariant else 1) if can_split else 0),
        max_slots=max_slots if can_split else 0,
        max_merges=target_items if can_split else 0,
        slot_rows=slot_rows,
        batch_invariant=batch_invariant,
    )


@dataclass(frozen=True)
class AttentionLaunch:
    """Compile-time choices of the attention kernel for one tiling, dtype and device."""

    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def choose_launch(
    *, rows: int, head_size: int, head_size_v: int, itemsize: int, cache_itemsize: float, shared_memory: int
) -> AttentionLaunch:
    """Choose keys per iteration, warps and pipeline depth to fit in ``shared_memory`` bytes per thread block.

    ``itemsize``: bytes of an element that is multiplied; ``cache_itemsize``: as stored, 0.5 for int4.
    """
    padded = sum(max(16, next_power_of_2(size)) for size in (head_size, head_size_v))
    if head_size == 576:  # 512 and 64 apart
        padded = 576 + max(16, next_power_of_2(head_size_v))
    if itemsize == 4:  # IEEE fp32 dots run on the FMA units and keep both operands in registers
        return AttentionLaunch(block_n=16 if padded > 256 else 32, num_warps=4 if rows <= 16 else 8, num_stages=1)
    block_n = 64 if padded <= 256 else 32
    num_warps = 4 if rows <= 64 and padded <= 512 else 8
    stage = int(block_n * padded * cache_itemsize)  # one stage of K and V
    resident = rows * (padded + block_n) * itemsize  # the query tile, the probabilities between the two products
    if cache_itemsize != itemsize:
        resident += block_n * padded * itemsize  # what is multiplied is not what was loaded
    fitting = (shared_memory - resident) // stage
    return AttentionLaunch(
        block_n=block_n, num_warps=num_warps, num_stages=max(1, min(4 if rows <= 16 else 3, fitting))
    )
