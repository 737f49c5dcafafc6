from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.policy import POLICIES, BatchingPolicy, resolve_policy
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError, Scheduler, StepPlan

# Rows that POLICIES does not have, so that every value of every axis is run.
PROMPT_RESERVING = replace(POLICIES["default"], reserve="sequence", headroom_blocks=0)
CONTINUOUS_RESERVING = replace(
    POLICIES["default"], reserve="max_tokens", must_fit="max_tokens", when_full="never", prefill="whole"
)
PREFILL_FIRST = replace(POLICIES["default"], order="waiting_first")
UNPADDED_STATIC = replace(POLICIES["static"], pad=False)
ALL_POLICIES = [*POLICIES.values(), PROMPT_RESERVING, CONTINUOUS_RESERVING, PREFILL_FIRST, UNPADDED_STATIC]


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [1] * num_prompt, params, max_num_tokens=num_prompt + max_tokens)


def make_scheduler(
    policy: str | BatchingPolicy = "default",
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        resolve_policy(policy),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def complete(scheduler: Scheduler, plan: StepPlan) -> list[Request]:
    """What the engine does after a step, with a token that never stops; returns who ended."""
    ended = []
    for item in plan.scheduled:
        if item.needs_sample:
            item.request.token_ids.append(2)
        scheduler.advance(item)
        if item.request.num_tokens >= item.request.max_num_tokens:
            scheduler.finish(item.request)
            ended.append(item.request)
    return ended


def counts(plan: StepPlan) -> dict[str, int]:
    return {item.request.request_id: item.num_tokens for item in plan.scheduled}


def line(scheduler: Scheduler) -> list[str]:
    """Who waits, first come first."""
    waiting = sorted(scheduler.waiting, key=lambda request: (request.queue_time, request.queue_number))
    return [request.request_id for request in waiting]


def test_decodes_first_then_prefill_chunks_fill_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    for name, num_prompt in (("a", 4), ("b", 13), ("c", 2)):
        scheduler.add(make_request(name, num_prompt, 20))
    seen = []
    for _ in range(4):
        plan = scheduler.schedule(0.0)
        seen.append(counts(plan))
        complete(scheduler, plan)
    assert seen == [{"a": 4, "b": 6}, {"a": 1, "b": 7, "c": 2}, {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}]


def test_a_chunk_is_not_sampled_from() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    scheduler.add(make_request("a", 8, 4))
    first = scheduler.schedule(0.0)
    assert first.sampled_requests == []
    complete(scheduler, first)
    second = scheduler.schedule(0.0)
    assert [request.request_id for request in second.sampled_requests] == ["a"]
    assert counts(second) == {"a": 3}


def test_preemption_takes_the_last_started_and_recomputes_it_first() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    for name in "abc":
        scheduler.add(make_request(name, 2, 8))
    preempted: list[str] = []
    resumed: dict[str, int] = {}
    order_of_end: list[str] = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule(0.0)
        if plan.preempted:
            preempted += [request.request_id for request in plan.preempted]
            assert all(item.request.num_preemptions == 0 for item in plan.scheduled[:1])
        for item in plan.scheduled:
            if item.request.num_preemptions and item.num_computed_tokens == 0:
                resumed[item.request.request_id] = item.num_tokens
        order_of_end += [request.request_id for request in complete(scheduler, plan)]
        scheduler.check_integrity()
    assert preempted
    assert "a" not in preempted
    assert order_of_end[0] == "a"
    assert set(resumed) == set(preempted)
    assert max(resumed.values()) > 2  # prompt and generated tokens are computed again, none is forgotten


def test_nobody_joins_in_a_step_that_preempted() -> None:
    """The blocks that the victim gave up would let a short request in, which would be the next victim."""
    scheduler = make_scheduler(replace(POLICIES["default"], headroom_blocks=0), num_blocks=6, block_size=2)
    for name, num_prompt in (("a", 4), ("b", 8), ("c", 1)):
        scheduler.add(make_request(name, num_prompt, 2))
    first = scheduler.schedule(0.0)
    assert counts(first) == {"a": 4, "b": 8}
    complete(scheduler, first)
    second = scheduler.schedule(1.0)
    assert [request.request_id for request in second.preempted] == ["b"]
    assert counts(second) == {"a": 1}
    assert scheduler.block_manager.num_free == 3
    assert line(scheduler) == ["b", "c"]


def test_headroom_keeps_who_joins_from_being_preempted_at_once() -> None:
    """With a free block per running request left, the next step of all of them fits."""
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 4, 4))
    scheduler.add(make_request("b", 4, 2))
    scheduler.add(make_request("c", 2, 2))
    assert list(counts(scheduler.schedule(0.0))) == ["a", "b"]  # c's block is there, but a and b may need one each


def test_static_reserves_pads_and_runs_until_the_last_ends() -> None:
    scheduler = make_scheduler("static", num_blocks=64, max_num_seqs=2, max_num_batched_tokens=4)
    for name, num_prompt, max_tokens in (("a", 3, 1), ("b", 9, 3), ("c", 2, 2)):
        scheduler.add(make_request(name, num_prompt, max_tokens))
    prefill = scheduler.schedule(0.0)
    assert counts(prefill) == {"a": 3, "b": 9}  # whole, though the budget is 4
    assert prefill.num_padding_tokens == 2 * 9 - 12
    assert scheduler.block_manager.num_used == 1 + 3  # prompt and generation, but for the last token
    assert [request.request_id for request in complete(scheduler, prefill)] == ["a"]
    for _ in range(2):
        assert scheduler.block_manager.num_used == 4  # a's blocks are held until b ends
        decode = scheduler.schedule(0.0)
        assert counts(decode) == {"b": 1}
        assert decode.num_padding_tokens == 1
        complete(scheduler, decode)
    assert scheduler.block_manager.num_used == 0
    assert counts(scheduler.schedule(0.0)) == {"c": 2}


def test_usage_of_a_padded_batch_counts_ended_rows_as_waste() -> None:
    scheduler = make_scheduler("static", block_size=4)
    scheduler.add(make_request("a", 7, 1))
    scheduler.add(make_request("b", 4, 5))
    plan = scheduler.schedule(0.0)
    before = scheduler.block_usage(plan)
    assert (before.num_filled_slots, before.num_allocated_slots, before.max_wasted_slots) == (11, 16, 4)
    complete(scheduler, plan)
    after = scheduler.block_usage()
    assert (after.num_filled_slots, after.num_allocated_slots, after.max_wasted_slots) == (4, 16, 8)


def test_a_request_that_can_never_fit_is_rejected_with_the_reason() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    scheduler.add(make_request("fits", 8, 5))  # 12 slots: the last token is not stored
    with pytest.raises(RequestRejectedError, match="4 KV blocks; there are 3 of 4 tokens"):
        scheduler.add(make_request("too long", 8, 6))
    assert line(scheduler) == ["fits"]


def test_first_scheduled_time_is_kept_over_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    requests = [make_request("a", 2, 6), make_request("b", 2, 6)]
    for request in requests:
        scheduler.add(request)
    now = 0.0
    while scheduler.has_unfinished:
        now += 1.0
        complete(scheduler, scheduler.schedule(now))
    assert requests[1].num_preemptions > 0
    assert [request.first_scheduled_time for request in requests] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reserve": "everything"}, "reserve='everything'"),
        ({"when_full": "never"}, "when_full='never'"),
        ({"pad": True}, "pad=True"),
        ({"headroom_blocks": -1}, "headroom_blocks=-1"),
    ],
)
def test_policies_are_validated(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(POLICIES["default"], **change)


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(ValueError, match="policy='statik' is not known: it must be one of default, static"):
        resolve_policy("statik")


@dataclass
class Arrival:
    step: int
    num_prompt: int
    max_tokens: int
    abort_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        num_prompt=st.integers(1, 24),
        max_tokens=st.integers(1, 20),
        abort_after=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=250, deadline=None)
@given(
    arrivals=arrivals,
    policy=st.sampled_from(ALL_POLICIES),
    num_blocks=st.integers(1, 24),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 30),
)
def test_any_schedule_keeps_its_promises(
    arrivals: Sequence[Arrival],
    policy: BatchingPolicy,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> None:
    scheduler = make_scheduler(
        policy,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    ended: list[Request] = []
    expected = 0
    aborts: dict[int, list[Request]] = {}
    last_arrival = max(arrival.step for arrival in arrivals)
    # Every step computes a token of the first running request; nobody computes more than all do one after the other,
    # each preempted at most once for each token of those before it.
    work = sum(arrival.num_prompt + arrival.max_tokens for arrival in arrivals)
    for step in range(last_arrival + work * (len(arrivals) + 1) + 2):
        for index, arrival in enumerate(arrivals):
            if arrival.step != step:
                continue
            request = make_request(str(index), arrival.num_prompt, arrival.max_tokens)
            if request.max_cached_tokens > scheduler.block_manager.capacity:
                with pytest.raises(RequestRejectedError):
                    scheduler.add(request)
                continue
            scheduler.add(request)
            expected += 1
            if arrival.abort_after is not None:
                aborts.setdefault(step + arrival.abort_after, []).append(request)
        for request in aborts.get(step, []):
            if request not in ended:
                scheduler.finish(request)
                ended.append(request)
                scheduler.check_integrity()
        if not scheduler.has_unfinished:
            if step > last_arrival:
                break
            continue
        running_before = list(scheduler.running)
        plan = scheduler.schedule(float(step))
        scheduler.check_integrity()
        check_plan(scheduler, plan, running_before)
        ended += complete(scheduler, plan)
        scheduler.check_integrity()
    assert len(ended) == expected
    assert scheduler.block_manager.num_used == 0


def check_plan(scheduler: Scheduler, plan: StepPlan, running_before: Sequence[Request]) -> None:
    policy = scheduler.policy
    assert plan.scheduled, "a step with unfinished requests computes something"
    assert len({item.request for item in plan.scheduled}) == plan.num_seqs <= scheduler.max_num_seqs
    if not policy.is_whole:
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
    if policy.order == "running_first" and running_before:
        assert plan.scheduled[0].request is running_before[0]
        if plan.preempted:
            assert set(scheduler.running) <= set(running_before), "nobody joins in a step that preempted"
    if policy.when_full == "never":
        assert not plan.preempted
    if policy.pad:
        num_rows = len(scheduler.running) + len(scheduler.lingering)
        assert (plan.num_tokens + plan.num_padding_tokens) % num_rows == 0
    else:
        assert plan.num_padding_tokens == 0
        assert not scheduler.lingering
    for item in plan.scheduled:
        request = item.request
        assert 1 <= item.num_tokens <= request.num_uncomputed_tokens
        assert request not in plan.preempted
        assert item.needs_sample == (item.num_tokens == request.num_uncomputed_tokens)
        num_slots = len(request.block_ids) * scheduler.block_manager.block_size
        wasted = num_slots - item.num_computed_tokens - item.num_tokens
        assert wasted >= 0
        if policy.reserve == "step":
            assert wasted < scheduler.block_manager.block_size
    for request in plan.preempted:
        assert request.num_computed_tokens == 0
    if policy == POLICIES["default"]:  # decodes never wait for prefills: all that run are in the step
        assert {item.request for item in plan.scheduled} == set(scheduler.running)
