from __future__ import annotations

from dataclasses import replace

import pytest

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.orders import resolve_order
from pagedattn.engine.policy import POLICIES, BatchingPolicy, resolve_policy
from pagedattn.engine.request import Request
from pagedattn.engine.scheduler import RequestRejectedError, Scheduler, StepPlan
from pagedattn.engine.waiting_queue import FairQueue
from tests.engine.scheduler_run import SchedulerRun, make_request


def make_scheduler(
    policy: str | BatchingPolicy = "default",
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    order: str = "fcfs",
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        resolve_policy(policy),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        order=resolve_order(order),
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
    """With free blocks for each running request left, the next steps of all of them fit."""
    scheduler = make_scheduler(num_blocks=6, block_size=2, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 4, 4))
    scheduler.add(make_request("b", 4, 2))
    scheduler.add(make_request("c", 2, 2))
    assert list(counts(scheduler.schedule(0.0))) == ["a", "b"]  # c's block is there, but a and b may need it


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


def run_counts(scheduler: Scheduler, num_steps: int) -> list[dict[str, int]]:
    """What each of the next steps gives to whom."""
    run = SchedulerRun(scheduler)
    return [counts(run.step()) for _ in range(num_steps)]


def test_orca_mixes_whole_prompts_with_decodes_and_reserves_all() -> None:
    scheduler = make_scheduler("orca", num_blocks=10, max_num_batched_tokens=4)
    scheduler.add(make_request("a", 9, 8))
    assert run_counts(scheduler, 1) == [{"a": 9}]
    assert scheduler.block_manager.num_used == 4
    scheduler.add(make_request("b", 6, 19))
    scheduler.add(make_request("c", 1, 2))
    assert run_counts(scheduler, 2) == [{"a": 1, "b": 6}, {"a": 1, "b": 1}]  # c waits for its block


def test_vllm_takes_the_budget_in_the_order_of_starting_and_the_default_decodes_first() -> None:
    """A preempted request that computes its tokens again holds up those that started after it, or not."""
    for policy, expected in (("vllm", {"a": 10}), ("default", {"a": 9, "b": 1})):
        scheduler = make_scheduler(policy, max_num_batched_tokens=10)
        scheduler.add(make_request("a", 40, 4))
        run_counts(scheduler, 2)
        late = make_request("b", 1, 8)
        scheduler.add(late)
        scheduler.waiting.remove(late)
        assert scheduler.block_manager.ensure(late, 1)
        scheduler.running.append(late)
        assert counts(scheduler.schedule(9.0)) == expected


def test_prompts_get_no_more_than_their_limit_while_somebody_decodes() -> None:
    policy = replace(POLICIES["default"], prefill_limit=10)
    scheduler = make_scheduler(policy, max_num_batched_tokens=32)
    for name in ("a", "b"):
        scheduler.add(make_request(name, 4, 50))
    scheduler.add(make_request("prompt", 40, 3))
    assert run_counts(scheduler, 3) == [
        {"a": 4, "b": 4, "prompt": 24},  # nobody is held up: the whole budget
        {"a": 1, "b": 1, "prompt": 10},
        {"a": 1, "b": 1, "prompt": 6},
    ]
    scheduler.add(make_request("first", 30, 3))
    scheduler.add(make_request("second", 30, 3))
    scheduler.prompt_share = 0.5  # under pressure, of what there is for prompts
    assert run_counts(scheduler, 1) == [{"a": 1, "b": 1, "prompt": 1, "first": 5}]
    for request in [one for one in scheduler.running if one.num_uncomputed_tokens == 1]:
        scheduler.finish(request)
    assert run_counts(scheduler, 1) == [{"first": 16}]


def test_watermark_keeps_blocks_free_for_those_that_run() -> None:
    policy = replace(POLICIES["vllm"], watermark=0.25)
    scheduler = make_scheduler(policy, num_blocks=8, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 28, 2))  # 7 of 8 blocks: alone it may
    assert run_counts(scheduler, 1) == [{"a": 28}]
    scheduler = make_scheduler(policy, num_blocks=8, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 16, 2))
    scheduler.add(make_request("b", 12, 2))
    scheduler.add(make_request("c", 8, 2))
    assert run_counts(scheduler, 1) == [{"a": 16}]  # 3 more would leave 1, and 2 have to stay; c is behind b


def test_trtllm_cuts_chunks_at_blocks() -> None:
    scheduler = make_scheduler("trtllm-no-evict", max_num_batched_tokens=11)
    scheduler.add(make_request("a", 1, 8))
    scheduler.add(make_request("b", 20, 8))
    assert run_counts(scheduler, 3) == [{"a": 1, "b": 8}, {"a": 1, "b": 8}, {"a": 1, "b": 4}]


def test_equal_chunks_progress_alike_and_short_prompts_end_early() -> None:
    policy = replace(POLICIES["trtllm-no-evict"], prefill="equal_chunks")
    scheduler = make_scheduler(policy, max_num_batched_tokens=32)
    for name, num_prompt in (("a", 40), ("b", 6), ("c", 40)):
        scheduler.add(make_request(name, num_prompt, 4))
    # 32 - 6 for two: 13 each is 12 in blocks of 4; the 2 that are left are no block
    assert run_counts(scheduler, 2) == [{"a": 12, "b": 6, "c": 12}, {"b": 1, "a": 16, "c": 12}]


def test_trtllm_max_utilization_pauses_the_last_started() -> None:
    scheduler = make_scheduler("trtllm-max-utilization", num_blocks=4, block_size=2)
    for name in "ab":
        scheduler.add(make_request(name, 4, 5))
    run = SchedulerRun(scheduler)
    assert counts(run.step()) == {"a": 4, "b": 4}
    plan = run.step()
    assert (counts(plan), [request.request_id for request in plan.preempted]) == ({"a": 1}, ["b"])
    while scheduler.has_unfinished:
        run.step()
    assert [request.request_id for request in run.ended] == ["a", "b"]


def test_tgi_fills_the_budget_exactly_with_the_last_prompt() -> None:
    scheduler = make_scheduler("tgi", max_num_batched_tokens=10)
    for name, num_prompt in (("a", 4), ("b", 4), ("c", 9)):
        scheduler.add(make_request(name, num_prompt, 3))
    assert run_counts(scheduler, 2) == [{"a": 4, "b": 4, "c": 2}, {"a": 1, "b": 1, "c": 7}]
    assert scheduler.block_manager.num_used == 2 + 2 + 3  # prompt and generation but for the last token


def test_tgi_unchunked_stops_decodes_for_enough_newcomers_or_after_patience() -> None:
    scheduler = make_scheduler("tgi-unchunked", num_blocks=400, max_num_seqs=32, max_num_batched_tokens=16)
    for index in range(8):
        scheduler.add(make_request(f"old {index}", 2, 60))
    old = {f"old {index}": 1 for index in range(8)}
    assert run_counts(scheduler, 2) == [dict.fromkeys(old, 2), old]
    scheduler.add(make_request("one", 5, 60))
    assert run_counts(scheduler, 1) == [old]  # 1 < 0.3 x 8 rounded down
    scheduler.add(make_request("two", 12, 60))
    assert run_counts(scheduler, 1) == [old]  # two wait, but only one fits the budget of 16
    assert line(scheduler) == ["one", "two"]
    scheduler.check_integrity()  # that one had joined for a moment left no trace
    scheduler.add(make_request("three", 4, 60))
    steps = run_counts(scheduler, 17)
    assert steps[:-1] == [old] * 16
    assert steps[-1] == {"one": 5}  # the 20th since the last joined: no more waiting for company


def test_splitfuse_sits_out_and_requeues_at_the_tail_only_when_nobody_can_go_on() -> None:
    scheduler = make_scheduler("splitfuse", num_blocks=4, block_size=2)
    for name in "ab":
        scheduler.add(make_request(name, 3, 6))
    run = SchedulerRun(scheduler)
    assert [counts(run.step()) for _ in range(2)] == [{"a": 3, "b": 3}, {"a": 1, "b": 1}]
    scheduler.add(make_request("c", 3, 2, arrival_time=run.now))
    plan = run.step()  # neither finds a fifth block: the newest gives up its own
    assert ([request.request_id for request in plan.preempted], counts(plan)) == (["b"], {"a": 1})
    assert line(scheduler) == ["c", "b"]
    while scheduler.has_unfinished:
        run.step()
    assert [request.request_id for request in run.ended] == ["a", "c", "b"]


def test_transformers_stops_prefills_below_its_margin() -> None:
    scheduler = make_scheduler("transformers", num_blocks=23, max_num_batched_tokens=64)
    scheduler.add(make_request("a", 60, 5))
    scheduler.add(make_request("b", 12, 5))
    scheduler.add(make_request("c", 2, 5))
    assert run_counts(scheduler, 1) == [{"a": 60, "b": 4}]
    scheduler.add(make_request("d", 2, 5))
    assert run_counts(scheduler, 2) == [{"a": 1, "b": 8, "c": 2, "d": 2}, {"a": 1, "b": 1, "c": 1, "d": 1}]
    scheduler.add(make_request("e", 2, 5))
    assert scheduler.block_manager.num_free < 3  # 15% of 23
    assert run_counts(scheduler, 1) == [{"a": 1, "b": 1, "c": 1, "d": 1}]


def test_transformers_takes_blocks_from_starved_requests_only_and_closes_the_door() -> None:
    scheduler = make_scheduler("transformers", num_blocks=4, block_size=2)
    for name, max_tokens in (("a", 3), ("b", 5)):
        scheduler.add(make_request(name, 4, max_tokens))
    run = SchedulerRun(scheduler)
    assert counts(run.step()) == {"a": 4, "b": 4}
    scheduler.add(make_request("c", 1, 1))
    plan = run.step()
    assert (counts(plan), [request.request_id for request in plan.preempted]) == ({"a": 1}, ["b"])
    assert scheduler.block_manager.num_free == 1
    assert counts(run.step()) == {"a": 1}  # c would fit, but nobody joins before one has ended
    assert set(counts(run.step())) == {"b", "c"}

    scheduler = make_scheduler("transformers", num_blocks=6, block_size=2)
    for name, max_tokens in (("a", 3), ("b", 8), ("c", 6)):
        scheduler.add(make_request(name, 4, max_tokens))
    run = SchedulerRun(scheduler)
    seen = [set(counts(run.step()))]
    scheduler.add(make_request("d", 1, 2, arrival_time=1.0))
    seen += [set(counts(run.step())) for _ in range(3)]
    assert seen == [set("abc"), set("ab"), set("ab"), set("bd")]  # a has ended, and c is still too large


def test_an_order_by_priority_chooses_the_victim() -> None:
    for order, victims in (("fcfs", {"c"}), ("priority", {"b"}), ("priority-fair", {"b"})):
        scheduler = make_scheduler("vllm", num_blocks=7, block_size=2, order=order)
        for name, priority in (("a", 1), ("b", 2), ("c", 0)):
            scheduler.add(make_request(name, 4, 3, priority=priority))
        run = SchedulerRun(scheduler)
        plans = [run.step() for _ in range(2)]
        assert {request.request_id for request in plans[1].preempted} == victims
        assert set(counts(plans[1])) == set("abc") - victims


def test_who_joined_for_a_moment_is_not_charged() -> None:
    scheduler = make_scheduler(
        "tgi-unchunked", num_blocks=400, max_num_seqs=32, max_num_batched_tokens=16, order="fair"
    )
    for index in range(8):
        scheduler.add(make_request(f"old {index}", 2, 60, client_id="old"))
    run_counts(scheduler, 1)
    queue = scheduler.waiting
    assert isinstance(queue, FairQueue)
    scheduler.add(make_request("one", 5, 60, client_id="new"))
    scheduler.add(make_request("two", 12, 60, client_id="new"))
    counter = queue.counter("new")
    run_counts(scheduler, 3)
    assert len(scheduler.running) == 8, "one fits and two do not, which is too few to stop eight"
    assert queue.counter("new") == counter


def test_small_requests_pass_one_that_does_not_fit_but_not_forever() -> None:
    policy = replace(POLICIES["default"], overtake_window=2, max_overtakes=3, headroom_blocks=0)
    scheduler = make_scheduler(policy, num_blocks=8, max_num_seqs=32)
    run = SchedulerRun(scheduler)
    scheduler.add(make_request("runs", 12, 17))
    run.step()
    big = make_request("big", 24, 2)
    scheduler.add(big)
    for index in range(6):
        scheduler.add(make_request(f"small {index}", 1, 2))
    assert set(counts(run.step())) == {"runs", "small 0", "small 1", "small 2"}
    assert big.num_overtaken == 3
    ended: list[str] = []
    while big.num_computed_tokens == 0:
        ended += [request.request_id for request in run.ended]
        run.step()
    assert not any(name in ended for name in ("small 3", "small 4", "small 5"))
    assert big.num_overtaken == 3


def test_a_queue_without_a_window_stops_at_the_first_that_does_not_fit() -> None:
    scheduler = make_scheduler("vllm", num_blocks=8)
    scheduler.add(make_request("runs", 12, 17))
    scheduler.add(make_request("big", 24, 2))
    scheduler.add(make_request("small", 1, 2))
    assert run_counts(scheduler, 1) == [{"runs": 12}]


def test_a_step_looks_at_no_more_requests_than_join_and_may_be_passed() -> None:
    """So its cost does not grow with the queue."""
    scheduler = make_scheduler("default", num_blocks=64, max_num_seqs=64, max_num_batched_tokens=512)
    for index in range(2000):
        scheduler.add(make_request(str(index), 40, 40))
    taken = 0
    take = scheduler.waiting.take

    def counted(now: float) -> Request:
        nonlocal taken
        taken += 1
        return take(now)

    scheduler.waiting.take = counted  # type: ignore[method-assign]
    for _ in range(300):
        taken, before = 0, len(scheduler.running)
        plan = scheduler.schedule(0.0)
        assert taken <= max(len(scheduler.running) - before, 0) + scheduler.policy.overtake_window + 1
        complete(scheduler, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reserve": "everything"}, "reserve='everything'"),
        ({"reserve": "max_tokens"}, "reserve='max_tokens' is not allowed with must_fit='sequence'"),
        ({"when_full": "never"}, "when_full='never'"),
        ({"pad": True}, "pad=True"),
        ({"mix": False}, "mix=False"),
        ({"prefill": "equal_chunks"}, "prefill='equal_chunks'"),
        ({"headroom_blocks": -1}, "headroom_blocks=-1"),
        ({"max_overtakes": -1}, "max_overtakes=-1"),
        ({"watermark": 1.0}, "watermark=1.0"),
        ({"prefill_limit": 0}, "prefill_limit=0"),
        ({"prefill": "whole"}, "prefill_limit=2048 is not allowed with prefill='whole'"),
    ],
)
def test_policies_are_validated(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(POLICIES["default"], **change)


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(ValueError, match="policy='statik' is not known: it must be one of default, static, orca"):
        resolve_policy("statik")
