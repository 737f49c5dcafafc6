"""How attention work is cut: tiles of query rows, items of KV tokens, and the launch that runs them.

Pure functions of host integers, so that they can be tested anywhere and never cost a synchronization. The vocabulary:

- a *tile* is up to ``queries_per_tile`` consecutive query tokens of one sequence with all query heads of one KV head:
the
  rows of one tensor-core product;
- an *item* is one tile against one *chunk* of the keys it can see. Items are what a plan lists and what a thread
block runs;
- a tile of several items is *split*: its items write fp32 partials into *slots*, and a *merge* adds them up.

The chunk length is chosen on the device (it depends on the lengths); its bounds here make every buffer's size a
function of shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MIN_CHUNK = 128  # keys; a shorter chunk costs more in its launch and merge than it saves
CHUNK_ALIGNMENT = 128  # keys; a multiple of every BLOCK_N, so that only a chunk's last tile is ragged
MAX_HEAD_SIZE = 256  # largest head that the Triton kernel holds in registers


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; also for symbolic sizes."""
    return (a + b - 1) // b


@dataclass(frozen=True)
class AttentionTiling:
    """Tile shape and buffer bounds of one attention geometry."""

    rows: int  # rows of a tile: a power of two >= 16
    queries_per_tile: int
    tiles_per_sequence: int
    target_items: int  # items per KV head that fill the device
    max_items: int
    max_slots: int
    max_merges: int


def choose_tiling(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    max_query_len: int,
    max_seq_len: int,
    num_seqs: int,
    programs: int,
) -> AttentionTiling:
    """Choose the tile of a geometry. ``programs`` is how many thread blocks the device runs at once."""
    group = num_heads // num_kv_heads
    largest = 128 if head_size <= 128 else 64
    rows = max(16, next_power_of_2(group))
    while rows < largest and rows < max_query_len * group:
        rows *= 2
    queries_per_tile = rows // group
    tiles_per_sequence = ceil_div(max_query_len, queries_per_tile)
    max_tiles = num_seqs * tiles_per_sequence
    target_items = ceil_div(programs, num_kv_heads)
    # A chunk holds at least total / target_items keys, so cutting adds at most target_items items, and a split tile
    # (of two or more chunks) has at most twice as many chunks as it has whole ones.
    can_split = max_seq_len > MIN_CHUNK
    return AttentionTiling(
        rows=rows,
        queries_per_tile=queries_per_tile,
        tiles_per_sequence=tiles_per_sequence,
        target_items=target_items,
        max_items=max_tiles + (target_items if can_split else 0),
        max_slots=2 * target_items if can_split else 0,
        max_merges=target_items if can_split else 0,
    )


@dataclass(frozen=True)
class AttentionLaunch:
    """Compile-time choices of the attention kernel for one tiling, dtype and device."""

    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1024)
def choose_launch(*, rows: int, head_size: int, itemsize: int, shared_memory: int) -> AttentionLaunch:
    """Choose keys per iteration, warps and pipeline depth to fit in ``shared_memory`` bytes per thread block."""
    padded = max(16, next_power_of_2(head_size))
    if itemsize == 4:  # IEEE fp32 dots run on the FMA units and keep both operands in registers
        return AttentionLaunch(block_n=16 if padded > 128 else 32, num_warps=4 if rows <= 16 else 8, num_stages=1)
    block_n = 64 if padded <= 128 else 32
    num_warps = 4 if rows <= 64 else 8
    tile_bytes = block_n * padded * 2 * itemsize  # one stage of K and V
    resident = rows * (padded + block_n) * itemsize  # the query tile, and the probabilities between the two products
    fitting = (shared_memory - resident) // tile_bytes
    return AttentionLaunch(
        block_n=block_n, num_warps=num_warps, num_stages=max(1, min(4 if rows <= 16 else 3, fitting))
    )
