"""The batch's state on the device against plain Python, one element at a time."""

from __future__ import annotations

import random
import re
import struct
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedattn import batch_ops
from pagedattn.kernels.batch_state_reference import NUM_FIELDS, Field, StepInputs
from tests.device import DEVICE, IS_CUDA

BLOCK_SIZE = 4


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bits(value: float) -> int:
    return int(struct.unpack("i", struct.pack("f", value))[0])


class State:
    """Rows with random numbers, as tensors and as lists."""

    def __init__(self, max_rows: int, num_groups: int, table_width: int, seed: int = 0) -> None:
        self.random = generator = random.Random(seed)
        self.rows = [
            {
                Field.LAST_TOKEN: generator.randrange(-1, 1000),
                Field.NUM_COMPUTED: generator.randrange(0, (table_width - 4) * BLOCK_SIZE),
                Field.QUERY_LEN: generator.choice([0, 1, 1, 3, 13]),
                Field.NUM_DRAWN: generator.randrange(1000),
                Field.SEED_LOW: generator.randrange(-(2**31), 2**31),
                Field.SEED_HIGH: generator.randrange(-(2**31), 2**31),
                Field.TOP_K: generator.randrange(-1, 50),
                Field.TEMPERATURE: bits(generator.random() * 2),
                Field.TOP_P: bits(generator.random()),
                Field.MIN_P: bits(generator.random()),
            }
            for _ in range(max_rows)
        ]
        self.tables = [
            [[generator.randrange(2**31) for _ in range(table_width)] for _ in range(max_rows)]
            for _ in range(num_groups)
        ]
        self.words = torch.zeros(NUM_FIELDS * max_rows + num_groups * max_rows * table_width, dtype=torch.int32)
        self.words = self.words.to(DEVICE)
        self.fields = self.words[: NUM_FIELDS * max_rows].view(NUM_FIELDS, max_rows)
        self.block_table = self.words[NUM_FIELDS * max_rows :].view(num_groups, max_rows, table_width)
        self.fields.copy_(int32(self.listed_fields()))
        self.block_table.copy_(int32(self.tables))

    def listed_fields(self) -> list[list[int]]:
        return [[row[field] for row in self.rows] for field in Field]

    def check(self) -> None:
        assert self.fields.tolist() == self.listed_fields()
        assert self.block_table.tolist() == self.tables


def poisoned(num_groups: int, num_tokens: int, num_rows: int, num_samples: int) -> StepInputs:
    """Inputs where what is not written shows; the mapping's groups are not next to each other."""
    input_ids, positions = torch.full((2, num_tokens), -7, dtype=torch.int64, device=DEVICE)
    slots = torch.full((num_groups, num_tokens + 5), -7, dtype=torch.int64, device=DEVICE)[:, :num_tokens]
    temperature, top_p, min_p = torch.full((3, num_samples), torch.nan, device=DEVICE)
    seed, position = torch.full((2, num_samples), -7, dtype=torch.int64, device=DEVICE)
    seq_lens, top_k = int32([-7] * num_rows), int32([-7] * num_samples)
    return StepInputs(input_ids, positions, slots, seq_lens, temperature, top_k, top_p, min_p, seed, position)


def check_samples(inputs: StepInputs, rows: list[dict[Field, int]]) -> None:
    for values, field in (
        (inputs.temperature, Field.TEMPERATURE),
        (inputs.top_p, Field.TOP_P),
        (inputs.min_p, Field.MIN_P),
    ):
        assert values.view(torch.int32).tolist() == [row[field] for row in rows]
    assert inputs.top_k.tolist() == [row[Field.TOP_K] for row in rows]
    assert inputs.seed.tolist() == [(row[Field.SEED_HIGH] << 32) + row[Field.SEED_LOW] % 2**32 for row in rows]
    assert inputs.position.tolist() == [row[Field.NUM_DRAWN] for row in rows]


def check_tokens(
    state: State, inputs: StepInputs, query_start_loc: list[int], token_ids: list[int] | None, num_tokens: int
) -> None:
    """Ids, positions, slots and lengths of all rows, and padding behind them."""
    num_groups = len(state.tables)
    ids, positions, slots, seq_lens = [0] * num_tokens, [0] * num_tokens, [[-1] * num_tokens for _ in state.tables], []
    for index, (first, end) in enumerate(pairwise(query_start_loc)):
        row = state.rows[index]
        if not row[Field.QUERY_LEN]:
            seq_lens.append(0)
            continue
        seq_lens.append(row[Field.NUM_COMPUTED] + end - first)
        for token in range(first, end):
            given = -1 if token_ids is None else token_ids[token]
            ids[token] = max(row[Field.LAST_TOKEN], 0) if given < 0 else given
            positions[token] = row[Field.NUM_COMPUTED] + token - first
            block, offset = divmod(positions[token], BLOCK_SIZE)
            for group in range(num_groups):
                slots[group][token] = state.tables[group][index][block] * BLOCK_SIZE + offset
    assert inputs.input_ids.tolist() == ids
    assert inputs.positions.tolist() == positions
    assert inputs.slot_mapping.tolist() == slots
    assert inputs.seq_lens.tolist() == seq_lens


def test_words_are_updated() -> None:
    words = int32(list(range(3000)))
    expected = words.tolist()
    indices = random.Random(0).sample(range(3000), 1500)
    updates = int32([indices, [-index for index in indices]])
    batch_ops.update_words(words, updates)
    for index in indices:
        expected[index] = -index
    assert words.tolist() == expected
    batch_ops.update_words(words, updates[:, :0].contiguous())
    assert words.tolist() == expected


@pytest.mark.parametrize("table_width", [1, 7, 1500])
def test_rows_are_moved_whole(table_width: int) -> None:
    state = State(max_rows=9, num_groups=2, table_width=max(table_width, 5))
    batch_ops.move_rows(state.fields, state.block_table, int32([[8, 6], [0, 3]]))
    for source, destination in ((8, 0), (6, 3)):
        state.rows[destination] = state.rows[source]
        for table in state.tables:
            table[destination] = table[source]
    state.check()


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("num_rows", [1, 6, 40])
def test_inputs_of_a_decode(num_rows: int, num_groups: int) -> None:
    """Each row has a token; those that sit the step out have padding."""
    state = State(max_rows=40, num_groups=num_groups, table_width=30, seed=num_rows)
    for row in state.rows:
        row[Field.QUERY_LEN] = min(row[Field.QUERY_LEN], 1)
    state.fields.copy_(int32(state.listed_fields()))
    inputs = poisoned(num_groups, num_rows, num_rows, num_rows)
    starts = list(range(num_rows + 1))
    batch_ops.prepare_inputs(state.fields, state.block_table, int32(starts), inputs, block_size=BLOCK_SIZE)
    check_tokens(state, inputs, starts, None, num_rows)
    check_samples(inputs, state.rows[:num_rows])
    state.check()


@pytest.mark.parametrize("num_padding", [0, 3, 40])
@pytest.mark.parametrize("longest", [13, 700])
def test_inputs_of_any_mixture(longest: int, num_padding: int) -> None:
    num_rows = 8
    state = State(max_rows=10, num_groups=2, table_width=400, seed=num_padding)
    state.rows[2][Field.QUERY_LEN], state.rows[3][Field.QUERY_LEN] = longest, 0
    state.rows[2][Field.NUM_COMPUTED] = 5
    state.fields.copy_(int32(state.listed_fields()))
    starts = [0]
    for row in state.rows[:num_rows]:
        starts.append(starts[-1] + row[Field.QUERY_LEN])
    num_tokens = starts[-1] + num_padding
    token_ids = [state.random.randrange(-1, 500) for _ in range(num_tokens)]
    sample_rows = [index for index, row in enumerate(state.rows[:num_rows]) if row[Field.QUERY_LEN]][2:]
    sample_rows += [-1] * min(2, num_padding)  # nobody's, which look like anybody's
    inputs = poisoned(2, num_tokens, num_rows, len(sample_rows))
    batch_ops.prepare_inputs(
        state.fields,
        state.block_table,
        int32(starts),
        inputs,
        block_size=BLOCK_SIZE,
        token_ids=int32(token_ids),
        sample_rows=int32(sample_rows),
    )
    check_tokens(state, inputs, starts, token_ids, num_tokens)
    check_samples(inputs, [state.rows[max(index, 0)] for index in sample_rows])
    state.check()


@pytest.mark.parametrize("is_decode", [True, False])
def test_accepted_tokens_are_the_last(is_decode: bool) -> None:
    num_rows = 300
    state = State(max_rows=310, num_groups=1, table_width=9)
    sampled = list(range(num_rows)) if is_decode else [index if index % 3 else -1 for index in range(num_rows)]
    tokens = [state.random.randrange(-1, 1000) for _ in sampled]
    batch_ops.accept_tokens(
        state.fields,
        torch.tensor(tokens, device=DEVICE),
        num_rows=num_rows,
        sample_rows=None if is_decode else int32(sampled),
    )
    for index, token in zip(sampled, tokens, strict=True):
        if state.rows[index][Field.QUERY_LEN] if is_decode else index >= 0:
            state.rows[index][Field.LAST_TOKEN] = token
            state.rows[index][Field.NUM_DRAWN] += 1
    for row in state.rows[:num_rows]:
        row[Field.NUM_COMPUTED] += row[Field.QUERY_LEN]
    state.check()


def test_bad_arguments_name_themselves() -> None:
    state = State(max_rows=4, num_groups=1, table_width=8)
    inputs = poisoned(1, 2, 2, 2)
    fields, table = state.fields, state.block_table
    with pytest.raises(ValueError, match=re.escape("updates: ")):
        batch_ops.update_words(state.words, int32([[1, 2]]))
    with pytest.raises(ValueError, match=re.escape("block_table: ")):
        batch_ops.move_rows(fields, table[:, :3], int32([[1], [2]]))
    with pytest.raises(ValueError, match=re.escape("query_start_loc: ")):
        batch_ops.prepare_inputs(fields, table, int32([0, 1]), inputs, block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match=re.escape("token_ids: ")):
        batch_ops.prepare_inputs(fields, table, int32([0, 1, 2]), poisoned(1, 5, 2, 2), block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match=re.escape("num_rows: ")):
        batch_ops.accept_tokens(fields, torch.zeros(3, dtype=torch.int64, device=DEVICE), num_rows=2)
    with pytest.raises(ValueError, match=re.escape("block_size: got 0")):
        batch_ops.prepare_inputs(fields, table, int32([0, 1, 2]), inputs, block_size=0)


def test_opcheck() -> None:
    state = State(max_rows=4, num_groups=1, table_width=8)
    for row in state.rows:
        row[Field.QUERY_LEN] = 1
    state.fields.copy_(int32(state.listed_fields()))
    inputs = poisoned(1, 2, 2, 2)
    for values in (inputs.temperature, inputs.top_p, inputs.min_p):
        values.zero_()  # opcheck compares with ==
    ops = torch.ops.pagedattn
    torch.library.opcheck(ops.update_words.default, (state.words, int32([[1], [2]])))
    torch.library.opcheck(ops.move_rows.default, (state.fields, state.block_table, int32([[3], [1]])))
    starts = int32([0, 1, 2])
    arguments = (state.fields, state.block_table, starts, None, None, *inputs, BLOCK_SIZE)
    torch.library.opcheck(ops.prepare_inputs.default, arguments)
    tokens = torch.tensor([1, 2], device=DEVICE)
    torch.library.opcheck(ops.accept_tokens.default, (state.fields, tokens, None, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="needs a CUDA device")
def test_a_graph_of_decodes_goes_on_by_itself() -> None:
    """Replayed, a step reads what the one before accepted."""
    state = State(max_rows=4, num_groups=1, table_width=50)
    for row in state.rows:
        row[Field.QUERY_LEN], row[Field.NUM_COMPUTED], row[Field.LAST_TOKEN] = 1, 10, 5
    state.fields.copy_(int32(state.listed_fields()))
    inputs, starts = poisoned(1, 4, 4, 4), int32(range(5))

    def step() -> None:
        batch_ops.prepare_inputs(state.fields, state.block_table, starts, inputs, block_size=BLOCK_SIZE)
        batch_ops.accept_tokens(state.fields, inputs.input_ids + inputs.positions, num_rows=4)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    assert inputs.positions.tolist() == [13] * 4
    assert inputs.input_ids.tolist() == [5 + 10 + 11 + 12] * 4
