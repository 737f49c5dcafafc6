"""How attention work is cut: tiles of query rows, items of KV tokens, and the launch that runs them.

Pure functions of host integers, so that they can be tested anywhere and never cost a synchronization. The vocabulary:

- a *tile* is up to ``queries_per_tile`` consecutive query tokens of one sequence with ``heads_per_tile`` of the query
  heads of one KV head: the rows of one tensor-core product. A *head tile* is such a set of heads; there are
  ``head_tiles``, one for each KV head unless more query heads share it than fit in a product;
- an *item* is one tile against some of the keys it can see. Items are what a plan lists and what a thread block runs,
  once for each head tile;
- a tile of several items is *split*: its items write fp32 partials into *slots*, and the last of them to end adds up
  the slots;
- a *worker* is a thread block that walks a chain of items. Where every sequence's query tokens fit in one tile (decode,
  verification of drafts), the keys of all tiles are laid end to end and cut into equal *shares*, one for each worker
  (stream-K: Osama et al., 2023), so that all end at once whatever the lengths. Elsewhere each item has a thread block
  of its own.

The length of items and shares is chosen on the device (it depends on the lengths); its bounds here make every buffer's
size a function of shapes alone.

A batch-invariant plan reduces every row in one order whatever surrounds it. Keys are taken in *chunks* that lie at
fixed positions of the sequence (``chunk_of``), each chunk gives a partial, and a row's result is the left fold of its
partials, from the first chunk on. The item with which a tile begins folds in registers, and leaves one slot if the
tile goes on elsewhere; an item that continues a tile leaves a slot for each of its chunks; the merge folds the slots in
their order. Chunks are longer far into a sequence, so that long sequences do not leave many slots. Shares end where
chunks begin. Tiles have one number of rows for every query length, and workers walk prefills too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

LOG2E = 1.4426950408889634
ITEM_FIELDS = 12
SHARE_UNIT = 16  # keys; shares end where pages of so many begin
MIN_SHARE = 64  # keys
MIN_CHUNK = 128  # keys; a shorter item costs more in its launch and merge than it saves
CHUNK_ALIGNMENT = 128  # keys; a multiple of every BLOCK_N, so that only an item's last iteration is ragged
FINE_CHUNK = 64  # keys of a batch-invariant chunk below MIDDLE_FROM: a tile of Hopper's kernel
MIDDLE_CHUNK = 256  # below COARSE_FROM
COARSE_CHUNK = 1024  # and from there on
MIDDLE_FROM = 1024
COARSE_FROM = 8192
INVARIANT_ROWS = 32  # the columns that Hopper's decode kernel has registers for
INVARIANT_PARTIAL_BYTES = 1 << 26  # of partials that a batch-invariant plan may spend beyond one split tile
MAX_SORTED = 256  # sequences whose items a plan puts in order of length; more balance by their number
MAX_ROWS = {128: 128, 256: 64, 576: 32}  # rows of a tile by the largest head size they are for
LARGE_MAX_ROWS = {256: 128, 576: 32}  # the same where a thread block may use LARGE_SHARED_MEMORY bytes
LARGE_SHARED_MEMORY = 229_376
MAX_WALKED_ROWS = 64  # of tiles that workers walk


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; also for symbolic sizes."""
    return (a + b - 1) // b


def part_of(position: int, size: int) -> int:
    """Index of the part that a key position lies in: whole chunks of together ``size`` keys, a power of two, or one
    chunk where that is longer."""
    if size >= COARSE_CHUNK or position < MIDDLE_FROM:
        return position // size
    middle = max(size, MIDDLE_CHUNK)
    if position < COARSE_FROM:
        return MIDDLE_FROM // size + (position - MIDDLE_FROM) // middle
    return MIDDLE_FROM // size + (COARSE_FROM - MIDDLE_FROM) // middle + (position - COARSE_FROM) // COARSE_CHUNK


def part_begin(index: int, size: int) -> int:
    """First key position of a part."""
    first_middle = MIDDLE_FROM // size
    if size >= COARSE_CHUNK or index <= first_middle:
        return index * size
    middle = max(size, MIDDLE_CHUNK)
    first_coarse = first_middle + (COARSE_FROM - MIDDLE_FROM) // middle
    if index <= first_coarse:
        return MIDDLE_FROM + (index - first_middle) * middle
    return COARSE_FROM + (index - first_coarse) * COARSE_CHUNK


def chunk_of(position: int) -> int:
    """Index of the batch-invariant chunk that a key position lies in."""
    return part_of(position, FINE_CHUNK)


def chunk_begin(index: int) -> int:
    """First key position of a batch-invariant chunk."""
    return part_begin(index, FINE_CHUNK)


def max_chunks(max_seq_len: int) -> int:
    """Upper bound on a sequence's batch-invariant chunks; also for symbolic sizes, hence no branch."""
    near = ceil_div(max_seq_len, FINE_CHUNK)
    middle = chunk_of(MIDDLE_FROM) + ceil_div(max_seq_len, MIDDLE_CHUNK)
    return min(near, middle, chunk_of(COARSE_FROM) + ceil_div(max_seq_len, COARSE_CHUNK))


def round_workers(workers: int) -> int:
    """A little fewer, where that makes a round number: batches often are round, and then fewer sequences are cut."""
    for unit in (32, 16, 8):
        rounded = workers // unit * unit
        if rounded * 25 >= workers * 24:
            return rounded
    return workers


@dataclass(frozen=True)
class AttentionTiling:
    """Tile shape and buffer bounds of one attention geometry."""

    rows: int  # of a tile: a power of two >= 16
    heads_per_tile: int
    head_tiles: int
    queries_per_tile: int
    tiles_per_sequence: int
    workers: int  # per head tile; 0: every item has its own thread block
    target_items: int  # items per head tile that fill the device
    max_items: int
    max_slots: int  # per head tile
    slot_rows: int  # rows of a slot: those of a tile that can be used
    batch_invariant: bool

    @property
    def has_shares(self) -> bool:
        """Whether the keys of all tiles are laid end to end and cut among the workers."""
        return self.workers > 0 and self.tiles_per_sequence <= 1

    @property
    def num_counts(self) -> int:
        """Elements of a plan's counts."""
        return 4 + self.max_slots * self.head_tiles


def choose_tiling(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    head_size_v: int,
    max_query_len: int,
    max_seq_len: int,
    num_seqs: int,
    multiprocessors: int,
    shared_memory: int = 0,
    batch_invariant: bool = False,
) -> AttentionTiling:
    """Choose the tile of a geometry on a device. ``shared_memory``: bytes that a thread block may use there."""
    group = num_heads // num_kv_heads
    largest_head = max(head_size, head_size_v)
    max_rows = LARGE_MAX_ROWS if shared_memory >= LARGE_SHARED_MEMORY else MAX_ROWS
    largest = next(rows for size, rows in max_rows.items() if largest_head <= size)
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
    slot_rows = min(rows, max_query_len * heads_per_tile)
    # Large heads fill a multiprocessor's shared memory with one thread block.
    resident = max(1, multiprocessors * (2 if largest_head <= 128 else 1) // head_tiles)
    workers = target_items = max_slots = 0
    if batch_invariant:
        workers = target_items = round_workers(resident)
        # In a list as below; but an item ends where a chunk does, so a window adds another to each split tile.
        max_items = workers + num_seqs if tiles_per_sequence <= 1 else max_tiles + 2 * workers
        if max_seq_len > FINE_CHUNK:  # a slot for each chunk; tiles for which none are left are not split
            chunks = max_chunks(max_seq_len)
            afforded = INVARIANT_PARTIAL_BYTES // (head_tiles * slot_rows * head_size_v * 4)
            max_slots = chunks + min(afforded, workers * chunks)
    elif tiles_per_sequence <= 1 and rows <= MAX_WALKED_ROWS:
        workers = target_items = round_workers(resident)
        max_items = workers + num_seqs  # a worker's first item, and the first item of each tile
        max_slots = 2 * workers  # a worker ends one split tile and begins another
    else:
        target_items = ceil_div(2 * multiprocessors, head_tiles)
        max_items = max_tiles
        if max_seq_len > MIN_CHUNK:
            # An item has at least total / target_items keys, so cutting adds at most target_items items, and a split
            # tile (of two or more items) has at most twice as many items as it has whole ones.
            max_items += target_items
            max_slots = 2 * target_items
    return AttentionTiling(
        rows=rows,
        heads_per_tile=heads_per_tile,
        head_tiles=head_tiles,
        queries_per_tile=queries_per_tile,
        tiles_per_sequence=tiles_per_sequence,
        workers=workers,
        target_items=target_items,
        max_items=max_items,
        max_slots=max_slots,
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


# --- Hopper -----------------------------------------------------------------------------------------------------------

HOPPER_HEAD_SIZES = (64, 128, 256)
HOPPER_BLOCK_N = 64  # keys of a tile: the rows of one warp-group product
HOPPER_SHARED_MEMORY = 232_448  # bytes that one thread block may use
HOPPER_HALF_SHARED_MEMORY = 115_712  # that each of two on a multiprocessor may use
HOPPER_IN_FLIGHT = 131_072  # bytes that a multiprocessor asks for at a time: more only disorders the memory's queues
HOPPER_MAX_COLUMNS = 32  # more would not fit in the registers of one warp group
MIN_PAGE = 8  # slots: swizzled tiles are made of eight rows


@dataclass(frozen=True)
class CacheRows:
    """A cache [N, S, Hkv, D] as rows of one matrix: slot s of block b and head h is row b * block_rows + h * head_rows
    + s, from column h * head_columns on."""

    block_rows: int
    head_rows: int
    head_columns: int
    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> CacheRows | None:
        """None where the strides allow no such matrix, or not one for the copy engine."""
        blocks, block_size, heads, head_size = shape
        stride_block, stride_slot, stride_head, _ = strides
        stride_block, stride_head = stride_block if blocks > 1 else 0, stride_head if heads > 1 else 0
        if stride_slot < 1 or stride_slot * itemsize % 16 or stride_block % stride_slot:
            return None
        head_rows = head_columns = 0
        if stride_head % stride_slot == 0:
            head_rows = stride_head // stride_slot
        elif (heads - 1) * stride_head + head_size <= stride_slot:
            head_columns = stride_head
        else:
            return None
        block_rows = stride_block // stride_slot
        num_rows = (blocks - 1) * block_rows + (heads - 1) * head_rows + block_size
        num_columns = (heads - 1) * head_columns + head_size
        fits = 0 <= num_rows < 1 << 31 and block_rows >= 0 and head_rows >= 0 and num_columns <= stride_slot
        return cls(block_rows, head_rows, head_columns, num_rows, num_columns) if fits else None


@dataclass(frozen=True)
class HopperDecodeLaunch:
    """Compile-time choices of ``kernels/hopper_decode.py``, and the caches as it sees them."""

    columns: int
    page: int  # slots that the copy engine fetches at a time
    block_n: int
    stages: int
    slots: int  # partials that a merge reads at a time
    slot_rows: int  # a power of two
    max_registers: int | None  # of a thread, so that two thread blocks fit
    key_rows: CacheRows
    value_rows: CacheRows


def choose_hopper_decode(
    *,
    tiling: AttentionTiling,
    head_size: int,
    head_size_v: int,
    cache_itemsize: float,
    block_size: int,
    key_rows: CacheRows | None,
    value_rows: CacheRows | None,
    has_token_scales: bool = False,
) -> HopperDecodeLaunch | None:
    """The launch of the Hopper kernel; None where it has none and the portable kernel serves.

    ``cache_itemsize``: bytes of an element as stored, 0.5 for int4.
    """
    page = min(block_size & -block_size, HOPPER_BLOCK_N)
    is_served = tiling.workers > 0 and head_size == head_size_v and head_size in HOPPER_HEAD_SIZES
    # Halves of an int4 tile are tiles of whole swizzles.
    if not is_served or page < MIN_PAGE or (cache_itemsize < 1 and head_size < 128) or cache_itemsize > 2:
        return None
    slot_rows = next_power_of_2(tiling.slot_rows)
    columns = max(8, slot_rows)
    if columns > HOPPER_MAX_COLUMNS or key_rows is None or value_rows is None:
        return None
    if cache_itemsize == 2 and has_token_scales:  # its products read such tiles as they are
        return None
    is_half = head_size <= 128  # of a multiprocessor
    available = HOPPER_HALF_SHARED_MEMORY if is_half else HOPPER_SHARED_MEMORY
    available -= columns * (head_size + HOPPER_BLOCK_N) * 2 + 4096  # query, probabilities; barriers and reductions
    if tiling.batch_invariant:
        available -= columns * (head_size + 2) * 4  # the sum of chunks
    if cache_itemsize < 2:
        available -= 2 * HOPPER_BLOCK_N * head_size * 2  # the tiles of keys and values that were dequantized
    stage = int(2 * HOPPER_BLOCK_N * head_size * cache_itemsize)
    in_flight = HOPPER_IN_FLIGHT // (2 if is_half else 1)
    stages = min(available // stage, max(2, in_flight // stage))
    if stages < 2:
        return None
    # A prefill's batch-invariant merge would spill.
    merged_elements = 4096 if tiling.batch_invariant and slot_rows > 8 else 8192
    return HopperDecodeLaunch(
        columns=columns,
        page=page,
        block_n=HOPPER_BLOCK_N,
        stages=stages,
        slots=max(1, min(16, merged_elements // (slot_rows * head_size))),
        slot_rows=slot_rows,
        max_registers=128 if is_half else None,
        key_rows=key_rows,
        value_rows=value_rows,
    )


HOPPER_PREFILL_ROWS = 128  # two consumers of 64


@dataclass(frozen=True)
class HopperPrefillLaunch:
    """Compile-time choices of ``kernels/hopper_prefill.py``, and the caches as it sees them."""

    page: int  # slots that the copy engine fetches at a time
    block_n: int
    stages: int
    query_tiles: int  # kept at a time: with two, a tile's queries come while the tile before is computed
    workers: int
    key_rows: CacheRows
    value_rows: CacheRows


def choose_hopper_prefill(
    *,
    tiling: AttentionTiling,
    head_size: int,
    head_size_v: int,
    block_size: int,
    key_rows: CacheRows | None,
    value_rows: CacheRows | None,
    multiprocessors: int,
) -> HopperPrefillLaunch | None:
    """The launch of the Hopper kernel for 16-bit caches; None where it has none and the portable kernel serves."""
    page = block_size & -block_size
    is_served = tiling.workers == 0 and not tiling.batch_invariant and tiling.rows == HOPPER_PREFILL_ROWS
    if not is_served or head_size != head_size_v or head_size not in HOPPER_HEAD_SIZES or page < MIN_PAGE:
        return None
    if key_rows is None or value_rows is None:
        return None
    block_n = 64 if head_size == 256 else 128
    query_tiles = 1 if head_size == 256 else 2
    available = HOPPER_SHARED_MEMORY - query_tiles * tiling.rows * head_size * 2 - 4096
    return HopperPrefillLaunch(
        page=min(page, block_n),
        block_n=block_n,
        stages=min(4, available // (2 * block_n * head_size * 2)),
        query_tiles=query_tiles,
        workers=multiprocessors,
        key_rows=key_rows,
        value_rows=value_rows,
    )
