from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedattn.engine.batch import prepare_batch
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_plan import ScheduledRequest, StepPlan


def scheduled(token_ids: list[int], num_computed: int, num_tokens: int, block_ids: list[int]) -> ScheduledRequest:
    request = Request("r", token_ids, SamplingParams(), max_num_tokens=100)
    request.block_ids = block_ids
    request.num_computed_tokens = num_computed
    return ScheduledRequest(request, num_computed, num_tokens, num_computed + num_tokens == len(token_ids))


def test_decode_prefill_and_chunk_in_one_batch() -> None:
    plan = StepPlan(
        (
            scheduled([10, 11, 12, 13, 14], 4, 1, [7, 2]),  # a decode
            scheduled([20, 21, 22], 0, 3, [5]),  # a whole prefill
            scheduled([30, 31, 32, 33, 34, 35, 36, 37], 3, 3, [9, 1, 8]),  # a chunk; a block beyond it is held already
        )
    )
    batch = prepare_batch(plan, block_size=4, device="cpu")
    assert batch.input_ids.tolist() == [14, 20, 21, 22, 33, 34, 35]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [[2 * 4, 20, 21, 22, 9 * 4 + 3, 4, 5]]
    assert batch.block_table.tolist() == [[[7, 2], [5, 0], [9, 1]]]
    assert batch.seq_lens.tolist() == [5, 3, 6]
    assert batch.query_start_loc.tolist() == [0, 1, 4, 7]
    assert batch.logits_indices.tolist() == [0, 3]
    assert (batch.max_query_len, batch.max_seq_len) == (3, 6)


def test_dtypes() -> None:
    batch: Any = prepare_batch(StepPlan((scheduled([1, 2], 0, 2, [0]),)), 16, "cpu")
    for name in ("input_ids", "positions", "slot_mapping", "logits_indices"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("block_table", "seq_lens", "query_start_loc"):
        assert getattr(batch, name).dtype == torch.int32, name


def test_padding_rows_come_last_and_write_nowhere() -> None:
    plan = StepPlan((scheduled([1, 2], 0, 2, [3]),), num_padding_tokens=3)
    batch = prepare_batch(plan, block_size=4, device="cpu")
    assert batch.input_ids.tolist() == [1, 2, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 0, 0, 0]
    assert batch.slot_mapping.tolist() == [[12, 13, -1, -1, -1]]
    assert batch.query_start_loc.tolist() == [0, 2]
    assert batch.logits_indices.tolist() == [1]


def test_slots_beyond_int32() -> None:
    block_id = 2**31 - 1
    batch = prepare_batch(StepPlan((scheduled([1], 0, 1, [block_id]),)), block_size=16, device="cpu")
    assert batch.slot_mapping.tolist() == [[block_id * 16]]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_token_has_the_slot_of_its_position(block_size: int) -> None:
    num_tokens = 37
    block_ids = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()[: -(-num_tokens // block_size)]
    batch = prepare_batch(StepPlan((scheduled(list(range(num_tokens)), 5, 30, block_ids),)), block_size, "cpu")
    expected = [block_ids[p // block_size] * block_size + p % block_size for p in range(5, 35)]
    assert batch.slot_mapping.tolist() == [expected]
    assert batch.logits_indices.numel() == 0
