"""Paged attention for Hopper, in Gluon: prefill and mixed batches, at the speed of the tensor cores.

Memory and plan are those of ``kernels/attention.py``, and so are rows, slots and partials. Thread blocks are as many as
multiprocessors. Each takes *units* (an item of the plan for one head tile) off the plan's list as it becomes free, the
longest first, and has four partitions:

- the scheduler, one warp, takes the units, tells the others about them through shared memory, and brings the query rows
  while the unit before is computed;
- the producer, one warp, reads the block table 32 pages at a time, ahead of need, and asks the copy engine (TMA) for
  each page of keys and of values; it runs ahead over the ends of units. Pages past the end of the keys lie outside of
  the tensor that the copy engine knows, which gives zeros; the rest of the last one it clears itself (0 * NaN is NaN);
- two consumers, a warp group each, compute 64 rows of the tile each: S = Q K^T of one tile of keys and O += P V of the
  tile before it, with P in registers, are under way together, and the softmax of the former is computed meanwhile.
  Where one consumer waits, the other one's products keep the tensor cores busy.

A decode's tile has few rows and is bound by the bytes of its keys, which arrive at the memory's speed here as well,
while other multiprocessors work on tiles bound by arithmetic. So one launch serves a mixed batch.

Which keys a row sees is an interval, ``lower``..``upper``, whatever causality, window and chunk it comes from; tiles
that lie inside of every row's interval are not masked.

Warp specialization and the order of products: FlashAttention-3 (Shah et al., 2024).
"""

from __future__ import annotations

import math

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pagedattn.kernels.hopper_decode import (
    LANES,
    CacheDescriptors,
    add_sink,
    fetch,
    finite_shift,
    load_blocks,
    pick,
    synchronize,
    tanh,
    visible_span,
    wait_for_launches_before,
)
from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.tiling import ITEM_FIELDS, AttentionTiling, HopperPrefillLaunch

# Names of Triton 3.6 that later versions have changed.
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
OUTSIDE = gl.constexpr(-(1 << 30))  # a row that no cache has
VECTOR = 8  # elements of a result that a thread stores at a time: 16 bytes


# --- units ------------------------------------------------------------------------------------------------------------

# What partitions are told of a unit, through shared memory.
SEQUENCE, FIRST_ROW, QUERIES, POSITION, BEGIN, END, KNOWN_END, SLOT, FIRST_SLOT, NUM_SLOTS, HEAD_TILE = (
    gl.constexpr(number) for number in range(11)
)
UNIT_FIELDS = gl.constexpr(11)
UNITS = gl.constexpr(4)  # that may be known at a time


@gluon.jit
def tell(units, turn, field: gl.constexpr, value):
    """Set a field of a worker's unit."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = units.index(turn % UNITS * UNIT_FIELDS + field)
    place.store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def told(units, turn, field: gl.constexpr):
    """A field of a worker's unit."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(units.index(turn % UNITS * UNIT_FIELDS + field).load(LAYOUT), 0)


@gluon.jit
def heads_of(head_tile, GROUP: gl.constexpr, HEADS: gl.constexpr):
    """First query head of a head tile, and how many it has."""
    TILES_PER_KV_HEAD: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    first = head_tile % TILES_PER_KV_HEAD * HEADS
    return head_tile // TILES_PER_KV_HEAD * GROUP + first, gl.minimum(HEADS, GROUP - first)


@gluon.jit
def schedule(
    query_ptr, items_ptr, counts_ptr, num_workers, num_head_tiles, attention_chunk, sliding_window,
    stride_query_token, stride_query_head, units, units_full, units_empty, queries, queries_full, queries_empty,
    GROUP: gl.constexpr, HEADS: gl.constexpr, CAUSAL: gl.constexpr, HAS_CHUNK: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """Take units off the list, tell the other partitions, and bring the query rows while the unit before is computed.

    Rows that a tile does not have are copies of others.
    """
    TILES: gl.constexpr = queries.shape[0] // 2
    ROWS: gl.constexpr = queries.shape[1]
    HEAD_DIM: gl.constexpr = queries.shape[2]
    # Two lanes fetch 32 bytes of a row, the least that memory gives; few rows in a thread are few divisions.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPY))
    num_units = gl.load(counts_ptr) * num_head_tiles
    turn = 0
    unit = gl.program_id(0)
    while unit < num_units:
        item_ptr = items_ptr + (unit // num_head_tiles) * FIELDS
        head_tile = unit % num_head_tiles
        first_row = gl.load(item_ptr + 1)
        num_queries = gl.load(item_ptr + 2)
        begin, end = visible_span(item_ptr, attention_chunk, sliding_window, CAUSAL, HAS_CHUNK)
        mbarrier.wait(units_empty.index(turn % UNITS), turn // UNITS % 2 ^ 1)
        tell(units, turn, SEQUENCE, gl.load(item_ptr))
        tell(units, turn, FIRST_ROW, first_row)
        tell(units, turn, QUERIES, num_queries)
        tell(units, turn, POSITION, gl.load(item_ptr + 3))
        tell(units, turn, BEGIN, begin)
        tell(units, turn, END, end)
        tell(units, turn, KNOWN_END, gl.load(item_ptr + 5))
        tell(units, turn, SLOT, gl.load(item_ptr + 6))
        tell(units, turn, FIRST_SLOT, gl.load(item_ptr + 7))
        tell(units, turn, NUM_SLOTS, gl.load(item_ptr + 8))
        tell(units, turn, HEAD_TILE, head_tile)
        synchronize()
        mbarrier.arrive(units_full.index(turn % UNITS), count=1)

        first_head, num_heads_here = heads_of(head_tile, GROUP, HEADS)
        place = turn % TILES
        if TILES == 1:
            mbarrier.wait(queries_empty.index(0), turn % 2 ^ 1)
        for half in gl.static_range(2):
            number = half * ROWS + row
            token = (first_row + gl.minimum(number // HEADS, num_queries - 1)).to(gl.int64)
            head = (first_head + gl.minimum(number % HEADS, num_heads_here - 1)).to(gl.int64)
            offset = token * stride_query_token + head * stride_query_head
            copy(queries.index(2 * place + half), query_ptr + offset[:, None] + dim[None, :])
        async_copy.mbarrier_arrive(queries_full.index(place), increment_count=False)
        turn += 1
        if TILES > 1:  # no unit is taken before there is room for its queries: others may begin it sooner
            mbarrier.wait(queries_empty.index(turn % TILES), turn // TILES % 2 ^ 1)
        taken = gl.atomic_add(counts_ptr + 3, 1, sem="relaxed")
        if taken == num_units - 1:  # each unit that is done takes one number, so this is the last
            gl.store(counts_ptr + 3, 0)  # as the next layer expects it
        unit = num_workers + taken
    mbarrier.wait(units_empty.index(turn % UNITS), turn // UNITS % 2 ^ 1)
    tell(units, turn, QUERIES, 0)  # no more
    synchronize()
    mbarrier.arrive(units_full.index(turn % UNITS), count=1)


# --- producer ---------------------------------------------------------------------------------------------------------


@gluon.jit
def page_rows(blocks, first_page, end, block_rows, PAGE: gl.constexpr, PAGES_PER_BLOCK: gl.constexpr):
    """Rows at which the pages of ``load_blocks`` begin; OUTSIDE where they have no key before ``end``."""
    page = first_page + gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
    return gl.where(page * PAGE < end, blocks * block_rows + (page % PAGES_PER_BLOCK) * PAGE, OUTSIDE)


@gluon.jit
def clear_rows(tile, first_key, begin, end):
    """Zero the rows of a tile outside begin..end: nothing is known of them."""
    HEAD_DIM: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    for number in gl.static_range(tile.shape[0] // 8):
        key = first_key + number * 8
        if (key < begin) | (key + 8 > end):
            rows = tile.slice(number * 8, 8)
            position = key + gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
            inside = ((position >= begin) & (position < end))[:, None]
            rows.store(gl.where(inside, rows.load(LAYOUT), 0.0).to(tile.dtype))
    fence_async_shared()
    synchronize()


@gluon.jit
def produce(
    key_descriptor, value_descriptor, block_table_ptr, stride_table_sequence,
    key_block_rows, key_head_rows, key_head_columns, value_block_rows, value_head_rows, value_head_columns,
    units, units_full, units_empty, keys, values, keys_full, values_full, keys_empty, values_empty, values_landed,
    TILES_PER_KV_HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr, SAME_ROWS: gl.constexpr,
):  # fmt: skip
    """Fill the rings of keys and values with the tiles of a worker's units."""
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    PAGES: gl.constexpr = BLOCK_N // PAGE
    PAGES_PER_BLOCK: gl.constexpr = BLOCK_SIZE // PAGE
    TILE_BYTES: gl.constexpr = BLOCK_N * keys.shape[2] * keys.dtype.primitive_bitwidth // 8
    turn = 0
    stage = 0
    phase = 1
    landed_phase = 0
    mbarrier.wait(units_full.index(0), 0)
    while told(units, turn, QUERIES) > 0:
        sequence = told(units, turn, SEQUENCE)
        begin = told(units, turn, BEGIN)
        end = told(units, turn, END)
        known_end = told(units, turn, KNOWN_END)
        kv_head = told(units, turn, HEAD_TILE) // TILES_PER_KV_HEAD
        mbarrier.arrive(units_empty.index(turn % UNITS), count=1)
        turn += 1
        key_row = kv_head * key_head_rows
        key_column = kv_head * key_head_columns
        value_row = kv_head * value_head_rows
        value_column = kv_head * value_head_columns
        table_ptr = block_table_ptr + sequence.to(gl.int64) * stride_table_sequence
        page = begin // PAGE
        last_page = (gl.maximum(end, begin + 1) - 1) // PAGE
        start = page * PAGE
        blocks = gl.zeros([LANES], gl.int32, gl.BlockedLayout([1], [LANES], [1], [0]))
        if begin < end:  # else the tile is fetched from outside
            blocks = load_blocks(table_ptr, page, last_page, PAGES_PER_BLOCK)
        while page <= last_page:
            key_rows = page_rows(blocks, page, end, key_block_rows, PAGE, PAGES_PER_BLOCK)
            value_rows = key_rows
            if not SAME_ROWS:
                value_rows = page_rows(blocks, page, end, value_block_rows, PAGE, PAGES_PER_BLOCK)
            if page + LANES <= last_page:  # these arrive while the copies of the pages before them are asked for
                blocks = load_blocks(table_ptr, page + LANES, last_page, PAGES_PER_BLOCK)
            index = 0
            while (index < LANES) & (page + index <= last_page):
                mbarrier.wait(keys_empty.index(stage), phase)
                mbarrier.expect(keys_full.index(stage), TILE_BYTES)
                for number in gl.static_range(PAGES):
                    fetch(
                        key_descriptor, [key_row + pick(key_rows, index + number), key_column],
                        keys_full.index(stage), keys.index(stage).slice(number * PAGE, PAGE),
                    )  # fmt: skip
                mbarrier.wait(values_empty.index(stage), phase)
                is_ragged = (start < begin) | (start + BLOCK_N > known_end)
                if is_ragged:
                    mbarrier.expect(values_landed, TILE_BYTES)
                    for number in gl.static_range(PAGES):
                        fetch(
                            value_descriptor, [value_row + pick(value_rows, index + number), value_column],
                            values_landed, values.index(stage).slice(number * PAGE, PAGE),
                        )  # fmt: skip
                    mbarrier.wait(values_landed, landed_phase)
                    landed_phase ^= 1
                    clear_rows(values.index(stage), start, begin, known_end)
                    mbarrier.arrive(values_full.index(stage), count=1)
                else:
                    mbarrier.expect(values_full.index(stage), TILE_BYTES)
                    for number in gl.static_range(PAGES):
                        fetch(
                            value_descriptor, [value_row + pick(value_rows, index + number), value_column],
                            values_full.index(stage), values.index(stage).slice(number * PAGE, PAGE),
                        )  # fmt: skip
                index += PAGES
                start += BLOCK_N
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            page += LANES
        mbarrier.wait(units_full.index(turn % UNITS), turn // UNITS % 2)


# --- consumers --------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def store_layout(head_dim):
    """A result's rows in the warps that have them, but 16 bytes of a row in a thread: four lanes exchange theirs."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 32 << bit] for bit in range(head_dim.bit_length() - 6)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, head_dim])


@gluon.jit
def here(value):
    """A number that the compiler thinks is made here, or what follows from it would be kept ready through all loops."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def softmax_tile(
    logits, maximum, denominator, start, whole_begin, whole_end, lower, upper, query_position, slope_log2,
    logit_scale, softcap_log2,
    HAS_LOWER: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_ALIBI: gl.constexpr,
):  # fmt: skip
    """Probabilities of a tile, the new maximum and denominator, and what the result so far is to be multiplied by.

    Maxima are of logits as they are before logit_scale is applied, unless softcap or ALiBi want it applied first.
    """
    BLOCK_N: gl.constexpr = logits.shape[1]
    factor = logit_scale
    position = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, logits.type.layout))
    if HAS_SOFTCAP or HAS_ALIBI:
        logits *= logit_scale
        factor = 1.0
    if HAS_SOFTCAP:
        logits = tanh(logits) * softcap_log2
    if HAS_ALIBI:
        distance = query_position[:, None] - position[None, :]
        logits -= slope_log2[:, None] * gl.abs(distance).to(gl.float32)
    if (start < whole_begin) | (start + BLOCK_N > whole_end):
        sees = position[None, :] <= upper[:, None]
        if HAS_LOWER:
            sees = sees & (position[None, :] >= lower[:, None])
        logits = gl.where(sees, logits, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(logits, 1))
    shift = finite_shift(new_maximum * factor)
    probabilities = gl.exp2(logits * factor - shift[:, None])
    correction = gl.exp2(maximum * factor - shift)
    denominator = denominator * correction + gl.sum(probabilities, 1)
    return probabilities, new_maximum, denominator, correction


@gluon.jit
def pass_units(
    turn, stage, phase, first_query, units, units_full, units_empty, queries_full, queries_empty,
    keys_full, values_full, keys_empty, values_empty,
    QUERY_TILES: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Say of units whose rows all belong to the other consumer that this one is done with them: which unit is next, and
    where in the rings its tiles are."""
    num_queries = told(units, turn, QUERIES)
    while (num_queries > 0) & (num_queries <= first_query):
        begin = told(units, turn, BEGIN)
        span = told(units, turn, END) - begin // PAGE * PAGE
        query_tile = turn % QUERY_TILES
        mbarrier.wait(queries_full.index(query_tile), turn // QUERY_TILES % 2)  # or one before would be counted twice
        mbarrier.arrive(queries_empty.index(query_tile), count=1)
        mbarrier.arrive(units_empty.index(turn % UNITS), count=1)
        tile = 0
        while tile < gl.maximum(1, (span + BLOCK_N - 1) // BLOCK_N):
            mbarrier.wait(keys_full.index(stage), phase)
            mbarrier.arrive(keys_empty.index(stage), count=1)
            mbarrier.wait(values_full.index(stage), phase)
            mbarrier.arrive(values_empty.index(stage), count=1)
            tile += 1
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        turn += 1
        mbarrier.wait(units_full.index(turn % UNITS), turn // UNITS % 2)
        num_queries = told(units, turn, QUERIES)
    return turn, stage, phase


@gluon.jit
def consume(
    out_ptr, lse_ptr, partials_ptr, counts_ptr, alibi_slopes_ptr, sinks_ptr,
    partial_lse_offset, logit_scale, softcap_log2, sliding_window, attention_chunk, num_tokens, num_workers,
    num_heads, num_head_tiles, slot_rows, stride_out_token, stride_out_head,
    units, units_full, units_empty, queries, keys, values,
    queries_full, keys_full, values_full, queries_empty, keys_empty, values_empty,
    HALF: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, QUERIES_PER_TILE: gl.constexpr, PAGE: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CHUNK: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr, HAS_SINKS: gl.constexpr, RETURN_LSE: gl.constexpr, OUT_MULTIPLE: gl.constexpr,
):  # fmt: skip
    """Attention of one half of the rows of a worker's units over the tiles in the rings."""
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    QUERY_TILES: gl.constexpr = queries.shape[0] // 2
    ROWS: gl.constexpr = queries.shape[1]
    DTYPE: gl.constexpr = queries.dtype
    HAS_LOWER: gl.constexpr = HAS_WINDOW or HAS_CHUNK
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    RESULT_ROW: gl.constexpr = gl.SliceLayout(1, RESULT)
    STORE: gl.constexpr = store_layout(HEAD_DIM)
    STORE_ROW: gl.constexpr = gl.SliceLayout(1, STORE)
    store_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, STORE))
    row = HALF * ROWS + gl.arange(0, ROWS, ROW)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, RESULT))
    stage = 0
    phase = 0
    turn = 0
    mbarrier.wait(units_full.index(0), 0)
    if HALF == 1:
        turn, stage, phase = pass_units(
            turn, stage, phase, ROWS // HEADS, units, units_full, units_empty, queries_full, queries_empty,
            keys_full, values_full, keys_empty, values_empty, QUERY_TILES, STAGES, PAGE, BLOCK_N,
        )  # fmt: skip
    while told(units, turn, QUERIES) > 0:
        query_tile = turn % QUERY_TILES
        query_rows = queries.index(2 * query_tile + HALF)
        mbarrier.wait(queries_full.index(query_tile), turn // QUERY_TILES % 2)
        fence_async_shared()
        mbarrier.wait(keys_full.index(stage), phase)
        logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
        logits_token = warpgroup_mma(
            query_rows, keys.index(stage).permute((1, 0)), logits, use_acc=False, is_async=True
        )
        num_queries = told(units, turn, QUERIES)
        first_position = told(units, turn, POSITION)
        begin = told(units, turn, BEGIN)
        end = told(units, turn, END)
        row_query = row // HEADS
        query_position = first_position + row_query
        upper = gl.full([ROWS], end - 1, gl.int32, ROW)
        lower = gl.full([ROWS], begin, gl.int32, ROW)
        first_here = first_position + HALF * ROWS // HEADS  # positions of the first and last query of this half
        last_here = first_position + gl.minimum((HALF * ROWS + ROWS - 1) // HEADS, num_queries - 1)
        whole_begin = begin
        whole_end = end
        if CAUSAL:
            upper = gl.minimum(upper, query_position)
            whole_end = gl.minimum(whole_end, first_here + 1)
        else:
            upper = gl.where(query_position >= 0, upper, -1)
        if HAS_WINDOW:
            lower = gl.maximum(lower, query_position - sliding_window + 1)
            whole_begin = gl.maximum(whole_begin, last_here - sliding_window + 1)
            if not CAUSAL:
                upper = gl.minimum(upper, query_position + sliding_window - 1)
                whole_end = gl.minimum(whole_end, first_here + sliding_window)
        if HAS_CHUNK:
            chunk_begin = gl.maximum(query_position, 0) // attention_chunk * attention_chunk
            lower = gl.maximum(lower, chunk_begin)
            upper = gl.minimum(upper, chunk_begin + attention_chunk - 1)
            whole_begin = gl.maximum(whole_begin, gl.maximum(last_here, 0) // attention_chunk * attention_chunk)
            whole_end = gl.minimum(whole_end, (gl.maximum(first_here, 0) // attention_chunk + 1) * attention_chunk)
        whole_end = gl.where(first_here < 0, begin, whole_end)  # rows before the sequence see nothing
        slope_log2 = logit_scale
        if HAS_ALIBI:
            first_head, num_heads_here = heads_of(told(units, turn, HEAD_TILE), GROUP, HEADS)
            row_exists = (row_query < num_queries) & (row % HEADS < num_heads_here)
            slope_log2 = gl.load(alibi_slopes_ptr + first_head + row % HEADS, mask=row_exists, other=0.0)
            slope_log2 *= 1.4426950408889634

        maximum = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        denominator = gl.zeros([ROWS], gl.float32, ROW)
        result = gl.zeros([ROWS, HEAD_DIM], gl.float32, RESULT)
        start = begin // PAGE * PAGE
        num_tiles = gl.maximum(1, (end - start + BLOCK_N - 1) // BLOCK_N)

        logits = warpgroup_mma_wait(0, deps=[logits_token])
        mbarrier.arrive(keys_empty.index(stage), count=1)
        if num_tiles == 1:
            mbarrier.arrive(queries_empty.index(query_tile), count=1)
        probabilities, maximum, denominator, correction = softmax_tile(
            logits, maximum, denominator, start, whole_begin, whole_end, lower, upper, query_position, slope_log2,
            logit_scale, softcap_log2, HAS_LOWER, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip
        operand = gl.convert_layout(probabilities.to(DTYPE), OPERAND)
        tile = 1
        while tile < num_tiles:
            start += BLOCK_N
            tile += 1
            last_stage = stage
            last_phase = phase
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            mbarrier.wait(keys_full.index(stage), phase)
            logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
            logits_token = warpgroup_mma(
                query_rows, keys.index(stage).permute((1, 0)), logits, use_acc=False, is_async=True
            )
            mbarrier.wait(values_full.index(last_stage), last_phase)
            result_token = warpgroup_mma(operand, values.index(last_stage), result, is_async=True)
            logits = warpgroup_mma_wait(1, deps=[logits_token])
            mbarrier.arrive(keys_empty.index(stage), count=1)
            if tile == num_tiles:
                mbarrier.arrive(queries_empty.index(query_tile), count=1)
            probabilities, maximum, denominator, correction = softmax_tile(
                logits, maximum, denominator, start, whole_begin, whole_end, lower, upper, query_position, slope_log2,
                logit_scale, softcap_log2, HAS_LOWER, HAS_SOFTCAP, HAS_ALIBI,
            )  # fmt: skip
            result = warpgroup_mma_wait(0, deps=[result_token])
            mbarrier.arrive(values_empty.index(last_stage), count=1)
            result *= gl.convert_layout(correction, RESULT_ROW)[:, None]
            operand = gl.convert_layout(probabilities.to(DTYPE), OPERAND)
        mbarrier.wait(values_full.index(stage), phase)
        result = warpgroup_mma(operand, values.index(stage), result)
        mbarrier.arrive(values_empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1

        factor = logit_scale
        if HAS_SOFTCAP or HAS_ALIBI:
            factor = 1.0
        # Told again rather than kept in registers, of which the loop leaves none.
        row_query = row // HEADS
        num_queries = told(units, turn, QUERIES)
        first_row = told(units, turn, FIRST_ROW)
        slot = told(units, turn, SLOT)
        head_tile = told(units, turn, HEAD_TILE)
        first_head, num_heads_here = heads_of(head_tile, GROUP, HEADS)
        exists = (row_query < num_queries) & (row_query < QUERIES_PER_TILE) & (row % HEADS < num_heads_here)
        denominator = gl.where(denominator == 0.0, 1.0, denominator)
        lse = maximum * factor + gl.log2(denominator)
        weight = 1.0 / denominator
        is_last = slot < 0
        if slot >= 0:
            result *= gl.convert_layout(weight, RESULT_ROW)[:, None]
            first_slot = told(units, turn, FIRST_SLOT)
            num_slots = told(units, turn, NUM_SLOTS)
            head_tiles = here(num_head_tiles)
            partial_lse_ptr = partials_ptr + here(partial_lse_offset)
            store_partial(
                partials_ptr, partial_lse_ptr, result, lse, slot * head_tiles + head_tile, here(slot_rows), row, exists
            )
            synchronize()  # all threads have stored before one of them says so
            arrivals_ptr = counts_ptr + here(4 + (first_slot + HALF) * head_tiles + head_tile)
            is_last = gl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_slots - 1
            if is_last:
                gl.store(arrivals_ptr, 0)  # as the next layer expects it
                result, lse = merge_partials(
                    partials_ptr, partial_lse_ptr, first_slot, num_slots, head_tile, head_tiles, here(slot_rows), row,
                    exists, RESULT,
                )  # fmt: skip
                weight = gl.full([ROWS], 1.0, gl.float32, ROW)
        if is_last:
            if HAS_SINKS:
                has_sink = exists & (told(units, turn, POSITION) + row_query >= 0)
                sink = gl.load(sinks_ptr + first_head + row % HEADS, mask=has_sink, other=float("-inf"))
                sink_weight, lse = add_sink(lse, sink * 1.4426950408889634)
                weight *= sink_weight
            result *= gl.convert_layout(weight, RESULT_ROW)[:, None]
            row_token = (first_row + row_query).to(gl.int64)
            row_head = first_head + row % HEADS
            # What strides are multiples of has to be seen here, or elements are stored one by one.
            token_stride = here(stride_out_token // OUT_MULTIPLE) * OUT_MULTIPLE
            head_stride = here(stride_out_head // OUT_MULTIPLE) * OUT_MULTIPLE
            out_offset = row_token * token_stride + row_head.to(gl.int64) * head_stride
            out_ptrs = out_ptr + gl.convert_layout(out_offset, STORE_ROW)[:, None] + store_dim[None, :]
            stored = gl.convert_layout(result.to(DTYPE), STORE)
            gl.store(out_ptrs, stored, mask=gl.convert_layout(exists, STORE_ROW)[:, None])
            if RETURN_LSE:
                gl.store(lse_ptr + row_token * num_heads + row_head, lse * 0.6931471805599453, mask=exists)
        mbarrier.arrive(units_empty.index(turn % UNITS), count=1)
        turn += 1
        mbarrier.wait(units_full.index(turn % UNITS), turn // UNITS % 2)
        if HALF == 1:
            turn, stage, phase = pass_units(
                turn, stage, phase, ROWS // HEADS, units, units_full, units_empty, queries_full, queries_empty,
                keys_full, values_full, keys_empty, values_empty, QUERY_TILES, STAGES, PAGE, BLOCK_N,
            )  # fmt: skip
    write_padding(
        out_ptr, lse_ptr, gl.load(counts_ptr + here(1)), num_tokens, num_heads, num_workers, stride_out_token,
        stride_out_head, gl.convert_layout(row, RESULT_ROW), dim, RETURN_LSE, RESULT,
    )  # fmt: skip


@gluon.jit
def store_partial(partials_ptr, partial_lse_ptr, result, lse, tile, slot_rows, row, exists):
    """Store one half of a slot of a split tile."""
    dim = gl.arange(0, result.shape[1], gl.SliceLayout(0, result.type.layout))
    partial_row = tile.to(gl.int64) * slot_rows + row
    RESULT_ROW: gl.constexpr = gl.SliceLayout(1, result.type.layout)
    partial_ptrs = partials_ptr + gl.convert_layout(partial_row, RESULT_ROW)[:, None] * result.shape[1] + dim[None, :]
    gl.store(partial_ptrs, result, mask=gl.convert_layout(exists, RESULT_ROW)[:, None])
    gl.store(partial_lse_ptr + partial_row, lse, mask=exists)


@gluon.jit
def merge_partials(
    partials_ptr, partial_lse_ptr, first_slot, num_slots, head_tile, num_head_tiles, slot_rows, row, exists,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add up one half of the slots of a split tile in the order of its keys: normalized [ROWS, D] and log2-sum-exp."""
    HEAD_DIM: gl.constexpr = LAYOUT.instr_shape[1]
    RESULT_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ROWS: gl.constexpr = row.shape[0]
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    result_row = gl.convert_layout(row, RESULT_ROW)
    result_exists = gl.convert_layout(exists, RESULT_ROW)[:, None]
    maximum = gl.full([ROWS], float("-inf"), gl.float32, RESULT_ROW)
    denominator = gl.zeros([ROWS], gl.float32, RESULT_ROW)
    result = gl.zeros([ROWS, HEAD_DIM], gl.float32, LAYOUT)
    index = 0
    while index < num_slots:
        partial_row = ((first_slot + index).to(gl.int64) * num_head_tiles + head_tile) * slot_rows + result_row
        # Other multiprocessors wrote these: read past this one's first-level cache.
        lse = gl.load(
            partial_lse_ptr + partial_row, mask=gl.convert_layout(exists, RESULT_ROW), other=float("-inf"),
            cache_modifier=".cg",
        )  # fmt: skip
        partial_ptrs = partials_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :]
        partial = gl.load(partial_ptrs, mask=result_exists, other=0.0, cache_modifier=".cg")
        new_maximum = gl.maximum(maximum, lse)
        shift = finite_shift(new_maximum)
        correction = gl.exp2(maximum - shift)
        weight = gl.exp2(lse - shift)
        result = result * correction[:, None] + partial * weight[:, None]
        denominator = denominator * correction + weight
        maximum = new_maximum
        index += 1
    denominator = gl.where(denominator == 0.0, 1.0, denominator)
    lse = maximum + gl.log2(denominator)
    return result * (1.0 / denominator)[:, None], gl.convert_layout(lse, row.type.layout)


@gluon.jit
def write_padding(
    out_ptr, lse_ptr, first_token, num_tokens, num_heads, num_workers, stride_out_token, stride_out_head,
    row, dim, RETURN_LSE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write 0 and -inf to the rows that belong to no sequence."""
    ROWS: gl.constexpr = 2 * row.shape[0]
    first = gl.program_id(0) * ROWS
    num_rows = (num_tokens - first_token) * num_heads
    while first < num_rows:
        number = first + row
        token = (first_token + number // num_heads).to(gl.int64)
        head = number % num_heads
        offset = token * stride_out_token + head.to(gl.int64) * stride_out_head
        zeros = gl.zeros([row.shape[0], dim.shape[0]], out_ptr.dtype.element_ty, LAYOUT)
        gl.store(out_ptr + offset[:, None] + dim[None, :], zeros, mask=(number < num_rows)[:, None])
        if RETURN_LSE:
            empty = gl.full([row.shape[0]], float("-inf"), gl.float32, row.type.layout)
            gl.store(lse_ptr + token * num_heads + head, empty, mask=number < num_rows)
        first += num_workers * ROWS


# --- kernel -----------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "partial_lse_offset",
        "logit_scale",
        "softcap_log2",
        "sliding_window",
        "attention_chunk",
        "num_tokens",
        "num_workers",
        "slot_rows",
    ],
)
def hopper_prefill_kernel(
    key_descriptor,
    value_descriptor,
    out_ptr,
    lse_ptr,
    partials_ptr,
    query_ptr,
    block_table_ptr,
    items_ptr,
    counts_ptr,
    alibi_slopes_ptr,
    sinks_ptr,
    partial_lse_offset,
    logit_scale,
    softcap_log2,
    sliding_window,
    attention_chunk,
    num_tokens,
    num_workers,
    num_kv_heads,
    slot_rows,
    stride_out_token,
    stride_out_head,
    stride_query_token,
    stride_query_head,
    stride_table_sequence,
    key_block_rows,
    key_head_rows,
    key_head_columns,
    value_block_rows,
    value_head_rows,
    value_head_columns,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    QUERIES_PER_TILE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    QUERY_TILES: gl.constexpr,
    SAME_ROWS: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    HAS_CHUNK: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    RETURN_LSE: gl.constexpr,
    OUT_MULTIPLE: gl.constexpr,
    FIELDS: gl.constexpr,
):
    DTYPE: gl.constexpr = key_descriptor.dtype
    TILES_PER_KV_HEAD: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    HALF_ROWS: gl.constexpr = ROWS // 2
    # Of a thread: twice the consumers' and once the others' make 504. Long rows take the scheduler more to address.
    CONSUMER_REGISTERS: gl.constexpr = 216 if HEAD_DIM == 256 else 224
    OTHER_REGISTERS: gl.constexpr = 72 if HEAD_DIM == 256 else 56
    num_head_tiles = num_kv_heads * TILES_PER_KV_HEAD
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(DTYPE, [2 * QUERY_TILES, HALF_ROWS, HEAD_DIM], swizzled)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], key_descriptor.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], value_descriptor.layout)
    ordered: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    units = gl.allocate_shared_memory(gl.int32, [UNITS * UNIT_FIELDS, 1], ordered)
    units_full = gl.allocate_shared_memory(gl.int64, [UNITS, 1], mbarrier.MBarrierLayout())
    units_empty = gl.allocate_shared_memory(gl.int64, [UNITS, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(UNITS):
        mbarrier.init(units_full.index(number), count=1)
        mbarrier.init(units_empty.index(number), count=3)
    queries_full = gl.allocate_shared_memory(gl.int64, [QUERY_TILES, 1], mbarrier.MBarrierLayout())
    queries_empty = gl.allocate_shared_memory(gl.int64, [QUERY_TILES, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    for tile in gl.static_range(QUERY_TILES):
        mbarrier.init(queries_full.index(tile), count=LANES)
        mbarrier.init(queries_empty.index(tile), count=2)
    mbarrier.init(values_landed, count=1)
    wait_for_launches_before()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_ptr, lse_ptr, partials_ptr, counts_ptr, alibi_slopes_ptr, sinks_ptr,
                    partial_lse_offset, logit_scale, softcap_log2, sliding_window, attention_chunk, num_tokens,
                    num_workers, num_kv_heads * GROUP, num_head_tiles, slot_rows, stride_out_token, stride_out_head,
                    units, units_full, units_empty, queries, keys, values,
                    queries_full, keys_full, values_full, queries_empty, keys_empty, values_empty,
                    0, GROUP, HEADS, QUERIES_PER_TILE, PAGE, CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, HAS_ALIBI,
                    HAS_SINKS, RETURN_LSE, OUT_MULTIPLE,
                ),
            ),
            (
                consume,
                (
                    out_ptr, lse_ptr, partials_ptr, counts_ptr, alibi_slopes_ptr, sinks_ptr,
                    partial_lse_offset, logit_scale, softcap_log2, sliding_window, attention_chunk, num_tokens,
                    num_workers, num_kv_heads * GROUP, num_head_tiles, slot_rows, stride_out_token, stride_out_head,
                    units, units_full, units_empty, queries, keys, values,
                    queries_full, keys_full, values_full, queries_empty, keys_empty, values_empty,
                    1, GROUP, HEADS, QUERIES_PER_TILE, PAGE, CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, HAS_ALIBI,
                    HAS_SINKS, RETURN_LSE, OUT_MULTIPLE,
                ),
            ),
            (
                produce,
                (
                    key_descriptor, value_descriptor, block_table_ptr, stride_table_sequence,
                    key_block_rows, key_head_rows, key_head_columns,
                    value_block_rows, value_head_rows, value_head_columns,
                    units, units_full, units_empty, keys, values,
                    keys_full, values_full, keys_empty, values_empty, values_landed,
                    TILES_PER_KV_HEAD, BLOCK_SIZE, PAGE, SAME_ROWS,
                ),
            ),
            (
                schedule,
                (
                    query_ptr, items_ptr, counts_ptr, num_workers, num_head_tiles, attention_chunk, sliding_window,
                    stride_query_token, stride_query_head, units, units_full, units_empty,
                    queries, queries_full, queries_empty, GROUP, HEADS, CAUSAL, HAS_CHUNK, FIELDS,
                ),
            ),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


# --- launching --------------------------------------------------------------------------------------------------------


class PreparedHopperPrefill:
    """All of a call that follows from shapes, strides, dtypes and host numbers, for any tensors that share them."""

    __slots__ = ("_descriptors", "_launch")

    def __init__(
        self,
        query: Tensor,
        key_cache: Tensor,
        block_table: Tensor,
        tiling: AttentionTiling,
        hopper: HopperPrefillLaunch,
        options: AttentionOptions,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        num_kv_heads = key_cache.shape[2]
        partial_rows = tiling.max_slots * tiling.head_tiles * tiling.slot_rows
        key_rows, value_rows = hopper.key_rows, hopper.value_rows
        self._descriptors = CacheDescriptors(key_rows, value_rows, hopper.page)
        strides = (
            *out.stride()[:2], *query.stride()[:2], block_table.stride(0),
            key_rows.block_rows, key_rows.head_rows, key_rows.head_columns,
            value_rows.block_rows, value_rows.head_rows, value_rows.head_columns,
        )  # fmt: skip
        constants = (
            num_heads // num_kv_heads, tiling.heads_per_tile, head_size, tiling.rows, tiling.queries_per_tile,
            key_cache.shape[1], hopper.page, hopper.block_n, hopper.stages, hopper.query_tiles,
            key_rows.block_rows == value_rows.block_rows,
            options.causal, options.sliding_window is not None, options.attention_chunk is not None,
            options.softcap is not None, options.alibi_slopes is not None, options.sinks is not None, lse is not None,
            math.gcd(VECTOR, *out.stride()[:2]), ITEM_FIELDS,
        )  # fmt: skip
        self._launch = launch_hopper_prefill.prepare(
            (query.dtype, specialized((num_kv_heads, *strides)), constants),
            (hopper.workers, 1),
            query.device,
            (
                partial_rows * head_size,
                *options.numbers,
                num_tokens,
                hopper.workers,
                num_kv_heads,
                tiling.slot_rows,
                *strides,
                *constants,
            ),
            num_warps=4,
            launch_pdl=True,
            enable_fp_fusion=True,
        )

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        plan: tuple[Tensor, Tensor] | list[Tensor],
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        partials: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """Write attention into ``out`` [T, Hq, D] and its log-sum-exp into ``lse`` (fp32 [T, Hq])."""
        items, counts = plan
        self._launch(
            (out, lse, partials, query, block_table, items, counts, alibi_slopes, sinks),
            self._descriptors(key_cache, value_cache),
        )


launch_hopper_prefill = Launcher(hopper_prefill_kernel)
