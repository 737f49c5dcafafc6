from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.batch_state import BatchState
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import SamplingTensors
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_plan import ScheduledRequest, StepPlan
from tests.device import DEVICE


def make_state(
    *, block_size: int = 4, max_num_seqs: int = 8, max_model_len: int = 400, num_groups: int = 1
) -> BatchState:
    return BatchState(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        num_groups=num_groups,
        null_block=99,
        device=DEVICE,
    )


def make_request(token_ids: list[int], block_ids: list[int], num_computed: int = 0, **params: Any) -> Request:
    request = Request(f"r{token_ids[0]}", token_ids, SamplingParams(**params), max_num_tokens=4000, seed=5)
    request.block_ids = block_ids
    request.num_computed_tokens = num_computed
    return request


def item(request: Request, num_tokens: int) -> ScheduledRequest:
    is_last = num_tokens == request.num_uncomputed_tokens
    return ScheduledRequest(request, request.num_computed_tokens, num_tokens, is_last)


class Steps:
    """Steps of a state without a model: each sample is ``sampled`` plus its number, known at once."""

    def __init__(self, state: BatchState, sampled: int = 1000) -> None:
        self.state = state
        self.sampled = sampled

    def run(self, *items: ScheduledRequest, num_padding: int = 0) -> tuple[BatchTensors, SamplingTensors]:
        staged = self.state.stage(StepPlan.of(items, num_padding_tokens=num_padding))
        batch, sampling = self.state.prepare(staged, staged.max_seq_len)
        token_ids = self.sampled + torch.arange(len(sampling.seed), device=DEVICE)
        self.state.accept(token_ids, staged.num_rows, staged.sample_rows)
        samples = iter(staged.sample_indices)
        for request, start, num_tokens, needs_sample in items:
            request.num_computed_tokens = start + num_tokens
            if needs_sample:
                request.token_ids.append(self.sampled + next(samples))
        self.state.check_integrity()
        return batch, sampling


def test_decode_prefill_and_chunk_in_one_batch() -> None:
    decode = make_request([10, 11, 12, 13, 14], [7, 2], 4)
    prefill = make_request([20, 21, 22], [5])
    chunk = make_request([30, 31, 32, 33, 34, 35, 36, 37], [9, 1, 8], 3)  # a block beyond it is held already
    batch, sampling = Steps(make_state()).run(item(decode, 1), item(prefill, 3), item(chunk, 3))
    assert batch.input_ids.tolist() == [14, 20, 21, 22, 33, 34, 35]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [[2 * 4, 20, 21, 22, 9 * 4 + 3, 4, 5]]
    assert batch.block_table[0, 0, :2].tolist() == [7, 2]
    assert batch.block_table[0, 2, :3].tolist() == [9, 1, 8]
    assert batch.seq_lens.tolist() == [5, 3, 6]
    assert batch.query_start_loc.tolist() == [0, 1, 4, 7]
    assert batch.logits_indices.tolist() == [0, 3]
    assert (batch.max_query_len, batch.max_seq_len) == (3, 6)
    assert len(sampling.seed) == 2


def test_dtypes() -> None:
    batch: Any
    for num_tokens in (1, 2):
        request = make_request([1, 2], [0], 2 - num_tokens)
        batch, _ = Steps(make_state()).run(item(request, num_tokens))
        for name in ("input_ids", "positions", "slot_mapping", "logits_indices"):
            assert getattr(batch, name).dtype == torch.int64, name
        for name in ("block_table", "seq_lens", "query_start_loc"):
            assert getattr(batch, name).dtype == torch.int32, name


def test_padding_rows_come_last_and_write_nowhere() -> None:
    batch, _ = Steps(make_state()).run(item(make_request([1, 2], [3]), 2), num_padding=3)
    assert batch.input_ids.tolist() == [1, 2, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 0, 0, 0]
    assert batch.slot_mapping.tolist() == [[12, 13, -1, -1, -1]]
    assert batch.query_start_loc.tolist() == [0, 2]
    assert batch.logits_indices.tolist() == [1]


def test_slots_beyond_int32() -> None:
    block_id = 2**31 - 1
    batch, _ = Steps(make_state(block_size=16)).run(item(make_request([1], [block_id]), 1))
    assert batch.slot_mapping.tolist() == [[block_id * 16]]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_token_has_the_slot_of_its_position(block_size: int) -> None:
    num_tokens = 37
    block_ids = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()[: -(-num_tokens // block_size)]
    request = make_request(list(range(num_tokens)), block_ids, 5)
    batch, _ = Steps(make_state(block_size=block_size)).run(item(request, 30))
    expected = [block_ids[p // block_size] * block_size + p % block_size for p in range(5, 35)]
    assert batch.slot_mapping.tolist() == [expected]
    assert batch.logits_indices.numel() == 0


def test_decodes_go_on_from_what_was_sampled() -> None:
    """Prompt, then decodes over a block's end: the host sends blocks, and no token."""
    request, other = make_request([1, 2, 3], [6]), make_request([4, 5], [8])
    steps = Steps(make_state())
    steps.run(item(request, 3), item(other, 2))
    steps.sampled = 2000
    batch, _ = steps.run(item(request, 1), item(other, 1))
    assert batch.input_ids.tolist() == [1000, 1001]
    assert batch.positions.tolist() == [3, 2]
    request.block_ids.append(9)
    batch, sampling = steps.run(item(request, 1), item(other, 1))
    assert batch.input_ids.tolist() == [2000, 2001]
    assert batch.slot_mapping.tolist() == [[9 * 4, 8 * 4 + 3]]
    assert batch.seq_lens.tolist() == [5, 4]
    assert sampling.position.tolist() == [2, 2]


def test_pending_tokens_are_read_on_the_device() -> None:
    request, late = make_request([1, 2], [6]), make_request([7, 8, 9], [5])
    state = make_state()
    staged = state.stage(StepPlan.of([item(request, 2)]))
    state.prepare(staged, 400)
    state.accept(torch.tensor([500], device=DEVICE), 1, staged.sample_rows)
    request.num_computed_tokens, request.num_pending_tokens = 2, 1
    batch, _ = state.prepare(state.stage(StepPlan.of([item(late, 3), item(request, 1)])), 400)
    assert batch.input_ids.tolist() == [500, 7, 8, 9]
    assert batch.query_start_loc.tolist() == [0, 1, 4]
    with pytest.raises(AssertionError, match="its last token is not known"):
        make_state().stage(StepPlan.of([item(request, 1)]))


def test_rows_stay_dense_as_requests_come_and_go() -> None:
    requests = [make_request([10 * index, 1], [index], 1, seed=index) for index in range(7)]
    steps = Steps(make_state(max_num_seqs=7))
    steps.run(*(item(request, 1) for request in requests))
    for leaving in (1, 3, 6):
        requests[leaving].block_ids = []
    newcomer = make_request([77, 78], [40])
    left = [requests[index] for index in (5, 0, 2, 4)]
    batch, _ = steps.run(*(item(request, 1) for request in left), item(newcomer, 2))
    assert steps.state.num_rows == 5
    slots = {0: 2, 2: 10, 4: 18, 5: 22}
    assert sorted(batch.slot_mapping[0].tolist()) == sorted([*slots.values(), 160, 161])
    batch, _ = steps.run(*(item(request, 1) for request in [newcomer, *left]))
    expected = {request.block_ids[0] * 4 + request.num_computed_tokens - 1 for request in [newcomer, *left]}
    assert set(batch.slot_mapping[0].tolist()) == expected


def test_a_request_that_sits_out_keeps_its_row() -> None:
    first, second = make_request([1, 2], [6], 1), make_request([3, 4], [7], 1)
    steps = Steps(make_state())
    steps.run(item(first, 1), item(second, 1))
    batch, sampling = steps.run(item(second, 1))
    assert batch.seq_lens.tolist() == [0, 3]
    assert batch.slot_mapping.tolist() == [[-1, 30]]
    prefill = make_request([5, 6, 7], [9])
    batch, sampling = steps.run(item(prefill, 3))
    assert batch.query_start_loc.tolist() == [0, 0, 0, 3]
    assert batch.logits_indices.tolist() == [2]
    assert len(sampling.seed) == 1
    batch, _ = steps.run(item(first, 1), item(second, 1), item(prefill, 1))
    assert batch.input_ids.tolist() == [1000, 1001, 1000]  # each the number of its sample, then


def test_sampling_parameters_go_over_as_they_are() -> None:
    request = make_request([1], [0], temperature=0.7, top_k=12, top_p=0.9, min_p=0.05)
    request.seed = 2**64 - 3
    greedy = make_request([2], [1], temperature=1e-9, top_p=0.5)
    greedy.seed = -(2**63)
    _, sampling = Steps(make_state()).run(item(request, 1), item(greedy, 1))
    assert sampling.temperature.tolist() == pytest.approx([0.7, 0.0])
    assert sampling.top_k.tolist() == [12, 0]
    assert sampling.top_p.tolist() == pytest.approx([0.9, 0.5])
    assert sampling.min_p.tolist() == pytest.approx([0.05, 0.0])
    assert sampling.seed.tolist() == [-3, -(2**63)]
    assert sampling.position.tolist() == [0, 0]


def test_groups_have_tables_of_their_own_and_left_blocks_are_null() -> None:
    request = make_request(list(range(9)), [1, 2, 3, -1, 5, 6], 8)
    batch, _ = Steps(make_state(num_groups=2)).run(item(request, 1))
    assert batch.block_table[:, 0, :3].tolist() == [[1, 3, 5], [2, 99, 6]]
    assert batch.slot_mapping.tolist() == [[20], [24]]


def test_a_forgotten_state_is_sent_anew() -> None:
    request, other = make_request([1, 2], [6], 1), make_request([3, 4], [7], 1)
    steps = Steps(make_state())
    steps.run(item(request, 1), item(other, 1))
    steps.state.forget()
    batch, _ = steps.run(item(other, 1))
    assert batch.input_ids.tolist() == [1001]
    assert batch.slot_mapping.tolist() == [[30]]


def test_more_words_than_the_buffers_hold() -> None:
    request = make_request(list(range(70_000)), list(range(70_000)))
    request.max_num_tokens = 80_000
    batch, _ = Steps(make_state(block_size=1, max_num_seqs=1, max_model_len=80_000)).run(item(request, 69_999))
    assert torch.equal(batch.slot_mapping[0], torch.arange(69_999, device=DEVICE))
    assert torch.equal(batch.input_ids, batch.positions)
