"""The state of a batch that stays on the device from step to step: a few small launches a step, safe in CUDA graphs.

What each must do, and the memory layout: ``kernels/batch_state_reference.py``. A row's tokens are few in a decode and
many in a prefill, so ``prepare_inputs`` has a program for each row and chunk of tokens, and one more for the padding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.batch_state_reference import Field, StepInputs
from pagedattn.kernels.launcher import Launcher

LAST_TOKEN = tl.constexpr(int(Field.LAST_TOKEN))
NUM_COMPUTED = tl.constexpr(int(Field.NUM_COMPUTED))
QUERY_LEN = tl.constexpr(int(Field.QUERY_LEN))
NUM_DRAWN = tl.constexpr(int(Field.NUM_DRAWN))
SEED_LOW = tl.constexpr(int(Field.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Field.SEED_HIGH))
TOP_K = tl.constexpr(int(Field.TOP_K))
TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
TOP_P = tl.constexpr(int(Field.TOP_P))
MIN_P = tl.constexpr(int(Field.MIN_P))

CHUNK = 1024  # words that a program takes
DECODE_CHUNK, PREFILL_CHUNK = 32, 256  # tokens of a row that a program takes at a time


@triton.jit(do_not_specialize=["num_updates"])
def update_words_kernel(words_ptr, updates_ptr, num_updates, CHUNK: tl.constexpr):
    update = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    exists = update < num_updates
    index = tl.load(updates_ptr + update, mask=exists, other=0)
    value = tl.load(updates_ptr + num_updates + update, mask=exists, other=0)
    tl.store(words_ptr + index, value, mask=exists)


@triton.jit(do_not_specialize=["num_moves", "num_rows", "table_width"])
def move_rows_kernel(
    fields_ptr,
    table_ptr,
    moves_ptr,
    num_moves,
    num_rows,
    table_width,
    NUM_FIELDS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program has a chunk of a move's blocks; the first also its fields."""
    move, chunk = tl.program_id(0), tl.program_id(1)
    source = tl.load(moves_ptr + move).to(tl.int64)
    destination = tl.load(moves_ptr + num_moves + move).to(tl.int64)
    if chunk == 0:
        for field in tl.static_range(NUM_FIELDS):
            tl.store(fields_ptr + field * num_rows + destination, tl.load(fields_ptr + field * num_rows + source))
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = column < table_width
    for group in tl.static_range(NUM_GROUPS):
        group_ptr = table_ptr + group * num_rows.to(tl.int64) * table_width
        blocks = tl.load(group_ptr + source * table_width + column, mask=exists)
        tl.store(group_ptr + destination * table_width + column, blocks, mask=exists)


@triton.jit
def prepare_sample(
    fields_ptr, sample_rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, sample,
    max_rows, HAS_SAMPLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Gather one sample's parameters from its row."""
    row_ptr = fields_ptr + sample
    if HAS_SAMPLE_ROWS:
        row_ptr = fields_ptr + tl.maximum(tl.load(sample_rows_ptr + sample), 0)
    tl.store(temperature_ptr + sample, tl.load(row_ptr + TEMPERATURE * max_rows).to(tl.float32, bitcast=True))
    tl.store(top_k_ptr + sample, tl.load(row_ptr + TOP_K * max_rows))
    tl.store(top_p_ptr + sample, tl.load(row_ptr + TOP_P * max_rows).to(tl.float32, bitcast=True))
    tl.store(min_p_ptr + sample, tl.load(row_ptr + MIN_P * max_rows).to(tl.float32, bitcast=True))
    low = tl.load(row_ptr + SEED_LOW * max_rows).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(row_ptr + SEED_HIGH * max_rows).to(tl.int64) << 32
    tl.store(seed_ptr + sample, high | low)
    tl.store(position_ptr + sample, tl.load(row_ptr + NUM_DRAWN * max_rows).to(tl.int64))


@triton.jit(
    do_not_specialize=["num_rows", "max_rows", "num_tokens", "num_samples", "table_width", "stride_slot_group"],
)
def prepare_inputs_kernel(
    fields_ptr,
    table_ptr,
    query_start_loc_ptr,
    token_ids_ptr,
    sample_rows_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    num_rows,
    max_rows,
    num_tokens,
    num_samples,
    table_width,
    stride_slot_group,
    BLOCK_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_TOKEN_IDS: tl.constexpr,
    HAS_SAMPLE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    is_row = row < num_rows  # the program behind the last row has the padding
    first = tl.load(query_start_loc_ptr + row)
    end = tl.load(query_start_loc_ptr + tl.minimum(row + 1, num_rows))
    end = tl.where(is_row, end, num_tokens)
    row_ptr = fields_ptr + tl.minimum(row, max_rows - 1)
    is_active = tl.where(is_row, tl.load(row_ptr + QUERY_LEN * max_rows), 0) > 0
    real_end = tl.where(is_active, end, first)
    start = tl.load(row_ptr + NUM_COMPUTED * max_rows)
    last_token = tl.maximum(tl.load(row_ptr + LAST_TOKEN * max_rows), 0)

    offset = chunk * CHUNK + tl.arange(0, CHUNK)
    while chunk * CHUNK < end - first:
        token = first + offset
        exists = token < end
        ids = tl.zeros_like(offset) + last_token
        if HAS_TOKEN_IDS:
            given = tl.load(token_ids_ptr + token, mask=exists, other=0)
            ids = tl.where(given < 0, ids, given)
        position = tl.where(is_active, start + offset, 0)
        tl.store(input_ids_ptr + token, tl.where(is_active, ids, 0).to(tl.int64), mask=exists)
        tl.store(positions_ptr + token, position.to(tl.int64), mask=exists)
        for group in tl.static_range(NUM_GROUPS):
            blocks_ptr = table_ptr + (group * max_rows + row).to(tl.int64) * table_width
            block = tl.load(blocks_ptr + position // BLOCK_SIZE, mask=token < real_end, other=0).to(tl.int64)
            slot = tl.where(is_active, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
            tl.store(slot_mapping_ptr + group * stride_slot_group + token, slot, mask=exists)
        chunk += tl.num_programs(1)
        offset += tl.num_programs(1) * CHUNK
    if tl.program_id(1) == 0:
        if is_row:
            tl.store(seq_lens_ptr + row, tl.where(is_active, start + end - first, 0))
        if row < num_samples:
            prepare_sample(
                fields_ptr, sample_rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
                row, max_rows, HAS_SAMPLE_ROWS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "max_rows", "num_samples"])
def accept_tokens_kernel(
    fields_ptr,
    token_ids_ptr,
    sample_rows_ptr,
    num_rows,
    max_rows,
    num_samples,
    HAS_SAMPLE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_row = row < num_rows
    query_len = tl.load(fields_ptr + QUERY_LEN * max_rows + row, mask=is_row, other=0)
    computed_ptr = fields_ptr + NUM_COMPUTED * max_rows + row
    tl.store(computed_ptr, tl.load(computed_ptr, mask=is_row, other=0) + query_len, mask=is_row)
    exists = row < num_samples  # and from here on it is a sample's number
    token = tl.load(token_ids_ptr + row, mask=exists, other=0).to(tl.int32)
    sampled = row
    if HAS_SAMPLE_ROWS:
        sampled = tl.load(sample_rows_ptr + row, mask=exists, other=-1)
        exists = sampled >= 0
    else:
        exists = exists & (query_len > 0)
    tl.store(fields_ptr + LAST_TOKEN * max_rows + sampled, token, mask=exists)
    drawn_ptr = fields_ptr + NUM_DRAWN * max_rows + sampled
    tl.store(drawn_ptr, tl.load(drawn_ptr, mask=exists, other=0) + 1, mask=exists)


# --- launching --------------------------------------------------------------------------------------------------------


def update_words(words: Tensor, updates: Tensor) -> None:
    """words[updates[0]] = updates[1]; words int32 [N], updates int32 [2, P], no index twice."""
    num_updates = updates.shape[1]
    programs = (-(-num_updates // CHUNK), 1)
    launch_update.prepare((CHUNK,), programs, words.device, (num_updates, CHUNK), num_warps=4)((words, updates))


def move_rows(fields: Tensor, block_table: Tensor, moves: Tensor) -> None:
    """Copy rows moves[0] to rows moves[1] (int32 [2, M]); no row is in both."""
    num_groups, max_rows, table_width = block_table.shape
    constants = (fields.shape[0], num_groups, CHUNK)
    programs = (moves.shape[1], -(-table_width // CHUNK))
    sizes = (moves.shape[1], max_rows, table_width, *constants)
    launch_move.prepare(constants, programs, fields.device, sizes, num_warps=4)((fields, block_table, moves))


def prepare_inputs(
    fields: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    token_ids: Tensor | None,
    sample_rows: Tensor | None,
    inputs: StepInputs,
    *,
    block_size: int,
) -> None:
    """Write a step's inputs; arguments as the reference has them."""
    num_groups, max_rows, table_width = block_table.shape
    num_rows, num_tokens = inputs.seq_lens.shape[0], inputs.input_ids.shape[0]
    chunk = DECODE_CHUNK if token_ids is None else PREFILL_CHUNK
    chunks = 1 if token_ids is None else min(16, max(1, -(-num_tokens // chunk)))
    constants = (block_size, num_groups, token_ids is not None, sample_rows is not None, chunk)
    sizes = (num_rows, max_rows, num_tokens, inputs.top_k.shape[0], table_width, inputs.slot_mapping.stride(0))
    launch = launch_prepare.prepare(constants, (num_rows + 1, chunks), fields.device, (*sizes, *constants), num_warps=1)
    launch((fields, block_table, query_start_loc, token_ids, sample_rows, *inputs))


def accept_tokens(fields: Tensor, token_ids: Tensor, sample_rows: Tensor | None, *, num_rows: int) -> None:
    """The step ran: its tokens are computed, and token_ids (int64 [L]) are the last ones of their rows."""
    constants = (sample_rows is not None, CHUNK // 4)
    programs = (max(1, -(-max(num_rows, token_ids.shape[0]) // (CHUNK // 4))), 1)
    sizes = (num_rows, fields.shape[1], token_ids.shape[0], *constants)
    launch_accept.prepare(constants, programs, fields.device, sizes, num_warps=4)((fields, token_ids, sample_rows))


launch_update = Launcher(update_words_kernel)
launch_move = Launcher(move_rows_kernel)
launch_prepare = Launcher(prepare_inputs_kernel)
launch_accept = Launcher(accept_tokens_kernel)
