"""Who can no longer meet a deadline is dropped early, and nobody who still can."""

from __future__ import annotations

import math

import pytest

from pagedattn.engine.orders import ORDERS
from pagedattn.engine.policy import POLICIES
from tests.engine.scheduler_run import SchedulerRun, make_request, make_run
from tests.engine.test_scheduler import make_scheduler


def run_to_end(run: SchedulerRun) -> None:
    while run.scheduler.has_unfinished:
        run.step()
        run.scheduler.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_deadlines_drop_what_can_not_meet_them_and_nothing_else(policy: str) -> None:
    scheduler = make_scheduler(policy, num_blocks=32, max_num_seqs=2, max_num_batched_tokens=8)
    run = SchedulerRun(scheduler, step_seconds=0.5)
    for name in ("a", "b"):
        run.add(make_request(name, 4, 20))
    run.step()
    run.step()
    run.add(make_request("impossible", 4, 20, arrival_time=run.now, timeout=5.0))  # 20 steps take 10 s
    run.add(make_request("possible", 4, 4, arrival_time=run.now, first_token_timeout=40.0, timeout=60.0))
    run.add(make_request("starves", 4, 2, arrival_time=run.now, first_token_timeout=3.0))
    run_to_end(run)
    assert [request.request_id for request in run.dropped] == ["impossible", "starves"]
    assert {request.request_id for request in run.ended} == {"a", "b", "possible"}
    for request in run.dropped:
        assert request.num_computed_tokens == 0


@pytest.mark.parametrize(("policy", "num_steps"), [("orca", 1), ("tgi-unchunked", 1), ("vllm", 5), ("default", 5)])
def test_a_prompt_that_is_computed_whole_takes_one_step(policy: str, num_steps: int) -> None:
    run = SchedulerRun(make_scheduler(policy, num_blocks=32, max_num_batched_tokens=8))
    run.add(make_request("knows how long a step takes", 4, 3))
    run_to_end(run)
    for timeout in (num_steps - 0.5, num_steps + 0.5):
        run.add(make_request("40 tokens", 40, 1, arrival_time=run.now, timeout=timeout))
        run_to_end(run)
    assert [request.scheduling.timeout for request in run.dropped] == [num_steps - 0.5]
    assert run.ended[-1].finished_time == run.now
    assert run.now - run.ended[-1].arrival_time == num_steps


def test_what_is_cached_takes_no_steps() -> None:
    run = make_run(POLICIES["default"], ORDERS["fcfs"], max_num_batched_tokens=8, enable_prefix_caching=True)
    for name in ("computes", "finds it"):  # 5 steps for the prompt; 1 for what is left of it
        run.add(make_request(name, 40, 1, arrival_time=run.now, timeout=None if name == "computes" else 1.5))
        run_to_end(run)
    assert [request.request_id for request in run.ended] == ["computes", "finds it"]


def test_what_a_sibling_computes_takes_no_steps_of_its_own() -> None:
    run = make_run(POLICIES["default"], ORDERS["fcfs"], max_num_batched_tokens=8)
    run.add(make_request("knows how long a step takes", 4, 3))
    run_to_end(run)
    siblings = [make_request(name, 40, 4, arrival_time=run.now, first_token_timeout=6.5) for name in ("a", "a#1")]
    for index, request in enumerate(siblings):
        request.siblings = [siblings[1 - index]]
        run.add(request)
    run_to_end(run)
    assert run.dropped == []
    start = siblings[0].arrival_time
    assert [request.first_token_time for request in siblings] == [start + 5.0, start + 6.0]


@pytest.mark.timeout(10)
def test_a_deadline_right_after_now_is_looked_at_once() -> None:
    """There is no time between the two to look again."""
    scheduler = make_scheduler(num_blocks=32)
    request = make_request("a", 4, 20, arrival_time=0.0, timeout=math.nextafter(1.0, 2.0))
    scheduler.add(request)
    scheduler.schedule(1.0)
    assert scheduler.schedule(2.0).dropped == (request,)


def test_a_running_request_is_dropped_when_its_deadline_goes() -> None:
    scheduler = make_scheduler(num_blocks=32)
    run = SchedulerRun(scheduler)
    request = make_request("a", 4, 20, timeout=25.0)
    run.add(request)
    while not run.dropped:
        run.step()
        if run.num_steps == 6:
            run.step_seconds = 4.0  # from here on it can not be done
    assert 4 < request.num_output_tokens < 20
    assert run.now < 25.0, "it is dropped before its time is up"
    assert scheduler.block_manager.num_used == 0
    assert not scheduler.has_unfinished
