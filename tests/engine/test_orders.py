"""What the orders guarantee, on a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.engine.length_predictor import MeanLengthPredictor
from pagedattn.engine.orders import ORDERS, QueueOrder, make_queue, resolve_order
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import INPUT_TOKEN_COST, OUTPUT_TOKEN_COST, FairQueue, WaitingQueue
from tests.engine.scheduler_run import SchedulerRun, make_request, make_run


def queue_of(order: QueueOrder, requests: Iterable[Request]) -> WaitingQueue:
    queue = make_queue(order, MeanLengthPredictor())
    for number, request in enumerate(requests):
        request.queue_number = number
        queue.add(request)
    return queue


def drain(queue: WaitingQueue, now: float = 0.0) -> list[str]:
    names = []
    while queue:
        request = queue.take(now)
        queue.joined(request)
        names.append(request.request_id)
    return names


def play(run: SchedulerRun, arrivals: Sequence[Request], on_step: Callable[[], None] | None = None) -> SchedulerRun:
    """Run ``arrivals``, sorted by time, to the end."""
    index = 0
    while index < len(arrivals) or run.scheduler.has_unfinished:
        while index < len(arrivals) and arrivals[index].arrival_time <= run.now:
            run.add(arrivals[index])
            index += 1
        if not run.scheduler.has_unfinished:
            run.now = arrivals[index].arrival_time
            continue
        run.step()
        if on_step is not None:
            on_step()
    return run


def test_fcfs_goes_by_the_time_of_arrival() -> None:
    requests = [make_request(name, 1, 1, arrival_time=at) for name, at in (("late", 2.0), ("b", 1.0), ("a", 1.0))]
    assert drain(queue_of(ORDERS["fcfs"], requests)) == ["b", "a", "late"]


def test_priority_gap_is_overtaken_after_gap_over_ageing_seconds() -> None:
    order = QueueOrder(by="priority", ageing=0.5)
    for wait, expected in ((9.9, ["urgent", "old"]), (10.1, ["old", "urgent"])):  # a gap of 5 at 0.5 a second
        old = make_request("old", 1, 1, arrival_time=100.0, priority=6)
        urgent = make_request("urgent", 1, 1, arrival_time=100.0 + wait, priority=1)
        assert drain(queue_of(order, [old, urgent])) == expected
    strict = QueueOrder(by="priority")
    old, urgent = make_request("old", 1, 1, priority=6), make_request("urgent", 1, 1, arrival_time=1e9, priority=1)
    assert drain(queue_of(strict, [old, urgent])) == ["urgent", "old"]


def test_priority_gap_is_overtaken_in_the_scheduler() -> None:
    """Urgent requests that never let up delay an unimportant one by d / a seconds and by what runs, not more."""
    gap, ageing = 4, 0.1
    run = make_run(POLICIES["default"], QueueOrder(by="priority", ageing=ageing), max_num_seqs=1, step_seconds=0.5)
    slow = make_request("slow", 1, 4, arrival_time=3.0, priority=gap)
    # One after the other: each takes 4 steps, and the next one is always there.
    urgent = [make_request(f"urgent {i}", 1, 4, arrival_time=2.0 * i, priority=0) for i in range(60)]
    play(run, sorted([slow, *urgent], key=lambda request: request.arrival_time))
    assert slow.first_scheduled_time is not None
    waited = slow.first_scheduled_time - slow.arrival_time
    assert gap / ageing - 2.0 <= waited <= gap / ageing + 2.0


def test_shortest_first_knows_what_the_client_said_or_what_it_learned() -> None:
    order = QueueOrder(by="length")
    given_lengths = [make_request("long", 10, 100, expected_output_tokens=90), make_request("short", 10, 100)]
    given_lengths[1].scheduling = replace(given_lengths[1].scheduling, expected_output_tokens=5)
    assert drain(queue_of(order, given_lengths)) == ["short", "long"]

    predictor = MeanLengthPredictor()
    for _ in range(20):
        for client, length in (("essays", 80), ("labels", 2)):
            ended = make_request("ended", 10, 100, client_id=client)
            ended.token_ids += [2] * length
            predictor.observe(ended)
    queue = make_queue(order, predictor)
    for name, client in (("an essay", "essays"), ("a label", "labels")):
        queue.add(make_request(name, 10, 100, client_id=client))
    assert drain(queue) == ["a label", "an essay"]
    assert abs(predictor.predict(make_request("new", 10, 100, client_id="essays")) - 80) < 10
    assert abs(predictor.predict(make_request("new", 10, 100, client_id="unknown")) - 41) < 10
    assert predictor.predict(make_request("bounded", 10, 7, client_id="essays")) == 7


def test_the_predictor_follows_a_workload_that_changes_and_forgets_clients() -> None:
    predictor = MeanLengthPredictor()
    for length in (10,) * 300 + (200,) * 300:
        ended = make_request("ended", 1, 500, client_id="a")
        ended.token_ids += [2] * length
        predictor.observe(ended)
    assert predictor.predict(make_request("new", 1, 500, client_id="a")) > 190
    for number in range(10_000):
        ended = make_request("ended", 1, 500, client_id=f"passing {number}")
        ended.token_ids += [2]
        predictor.observe(ended)
    assert len(predictor._groups) <= 4096


def mixed_lengths(seed: int, count: int, rate: float) -> list[Request]:
    rng = random.Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate)
        length = min(1 + int(rng.expovariate(1 / 12)), 120)
        requests.append(
            make_request(str(number), rng.randint(1, 20), length, arrival_time=now, expected_output_tokens=length)
        )
    return requests


def mean_latency(order: QueueOrder, requests: Sequence[Request]) -> float:
    run = play(make_run(POLICIES["default"], order, num_blocks=400, max_num_seqs=4), requests)
    latencies = [request.finished_time - request.arrival_time for request in run.ended if request.finished_time]
    assert len(latencies) == len(requests)
    return sum(latencies) / len(latencies)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.2, 0.35, 1.0], ids=["light", "busy", "overloaded"])
def test_shortest_first_has_no_greater_mean_latency_than_fcfs(seed: int, rate: float) -> None:
    """With known lengths, on the same trace; ageing costs some of it, and what remains is still no worse."""
    fcfs = mean_latency(ORDERS["fcfs"], mixed_lengths(seed, 300, rate))
    assert mean_latency(QueueOrder(by="length"), mixed_lengths(seed, 300, rate)) <= fcfs
    assert mean_latency(QueueOrder(by="length", ageing=0.5), mixed_lengths(seed, 300, rate)) <= fcfs


def test_ageing_bounds_the_wait_of_a_long_request_under_a_stream_of_short_ones() -> None:
    ageing, long_work, short_work = 2.0, 1 * INPUT_TOKEN_COST + 100 * OUTPUT_TOKEN_COST, 1 + 2 * OUTPUT_TOKEN_COST
    waits = {}
    for name, order in (("ageing", QueueOrder(by="length", ageing=ageing)), ("none", QueueOrder(by="length"))):
        run = make_run(POLICIES["default"], order, max_num_seqs=1)
        long = make_request("long", 1, 100, arrival_time=1.0, expected_output_tokens=100)
        short = [make_request(f"short {i}", 1, 2, arrival_time=2.0 * i, expected_output_tokens=2) for i in range(400)]
        play(run, sorted([long, *short], key=lambda request: request.arrival_time))
        assert long.first_scheduled_time is not None
        waits[name] = long.first_scheduled_time - long.arrival_time
    assert waits["ageing"] <= (long_work - short_work) / ageing + 2.0
    assert waits["none"] >= 790, "without ageing it waits until the stream ends"


def two_clients(run: SchedulerRun, weights: tuple[float, float]) -> tuple[float, float]:
    """Both clients are backlogged from the start: one with a flood of short requests, one with long ones. Returns the
    greatest difference of their services over weights while both were, and what the theorem allows."""
    flood = [make_request(f"f{i}", 8, 4, client_id="flood", arrival_time=0.0) for i in range(3000)]
    steady = [make_request(f"s{i}", 30, 40, client_id="steady", arrival_time=0.0) for i in range(60)]
    left = {"flood": len(flood), "steady": len(steady)}
    service = {"flood": 0.0, "steady": 0.0}
    worst = 0.0
    for request in (*flood, *steady):  # the flood is ahead of everything in order of arrival
        run.add(request)
    started: set[str] = set()
    max_running_tokens = run.scheduler.block_manager.capacity
    while min(left.values()) > 0:
        for item in run.step().scheduled:
            client = item.request.scheduling.client_id
            weight = weights[client == "steady"]
            if item.request.request_id not in started:
                started.add(item.request.request_id)
                left[client] -= 1
                service[client] += INPUT_TOKEN_COST * item.request.num_prompt_tokens / weight
            if item.needs_sample:
                service[client] += OUTPUT_TOKEN_COST / weight
        if min(left.values()) > 0:
            worst = max(worst, abs(service["flood"] - service["steady"]))
    bound = 2 * max(INPUT_TOKEN_COST * 30, OUTPUT_TOKEN_COST * max_running_tokens) / min(weights)
    return worst, bound


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_fair_bounds_the_difference_of_backlogged_clients_and_fcfs_does_not(
    policy: str, weights: tuple[float, float]
) -> None:
    """Theorem 4.4 of the OSDI'24 paper, with M the tokens that the cache holds: 2 max(w_p L_input, w_q M)."""
    order = replace(ORDERS["fair"], client_weights={"flood": weights[0], "steady": weights[1]})
    sizes = {"num_blocks": 40, "block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    worst, bound = two_clients(make_run(POLICIES[policy], order, **sizes), weights)
    assert worst <= bound
    fcfs_worst, _ = two_clients(make_run(POLICIES[policy], ORDERS["fcfs"], **sizes), weights)
    assert fcfs_worst > 2 * bound, "the trace would show nothing"


def test_fair_charges_a_prompt_once_and_recomputing_to_nobody() -> None:
    run = make_run(POLICIES["vllm"], ORDERS["fair"], num_blocks=6, block_size=2)
    queue = run.scheduler.waiting
    assert isinstance(queue, FairQueue)
    for name in ("a", "b", "c"):
        run.add(make_request(name, 2, 8, client_id=name))
    while run.scheduler.has_unfinished:
        run.step()
    assert run.num_preemptions > 0
    assert {queue.counter(name) for name in "abc"} == {2 * INPUT_TOKEN_COST + 8 * OUTPUT_TOKEN_COST}


def test_fair_lifts_a_client_that_comes_back() -> None:
    queue = FairQueue({})
    for client, served in (("busy", 50), ("other", 80)):
        queue.add(make_request(client, 10, 1, client_id=client))
        for _ in range(served):
            queue.served(make_request(client, 10, 1, client_id=client))
    queue.add(make_request("idle so far", 10, 1, client_id="idle"))
    assert queue.counter("idle") == queue.counter("busy") == 50 * OUTPUT_TOKEN_COST
    assert len(drain(queue)) == 3
    queue.add(make_request("after all left", 10, 1, client_id="new"))
    assert queue.counter("new") > 0, "as much as the last one to leave had had"


def test_fair_does_not_lift_a_client_whose_request_is_put_back() -> None:
    """Else who does not fit would be made to pay for it."""
    queue = FairQueue({})
    small, big = make_request("small", 1, 1, client_id="a"), make_request("big", 90, 1, client_id="b")
    queue.add(small)
    queue.add(big)
    for _ in range(20):
        queue.served(small)
    request = queue.take(0.0)
    assert request is big
    queue.put_back(big)
    assert queue.counter("b") == 0
    assert queue.take(0.0) is big


def test_fair_forgets_clients_that_have_nothing_to_remember() -> None:
    queue = FairQueue({})
    for number in range(20_000):
        request = make_request("x", 1, 1, client_id=f"passing {number}")
        stays = make_request("y", 1, 1, client_id="stays")
        queue.add(request)
        queue.add(stays)
        drain(queue)
    assert len(queue._counters) < 3000
    assert len(queue._heap) < 10


@pytest.mark.parametrize("weights", [{}, {"a": 4.0, "b": 0.5}])
def test_fair_always_takes_from_who_had_the_least(weights: dict[str, float]) -> None:
    """Whoever came, left, joined for good or for a moment, was served or came back."""
    for seed in range(200):
        rng = random.Random(seed)
        queue = FairQueue(weights)
        waiting: list[Request] = []
        running: list[Request] = []
        joined: list[Request] = []  # for a moment: before anything else happens they are withdrawn
        for number in range(100):
            operation = rng.choice("aaattttttssspr")
            while operation != "t" and joined:
                queue.withdrawn(joined[-1])
                queue.put_back(joined[-1])
                waiting.append(joined.pop())
            if operation == "a":
                request = make_request(
                    str(number), rng.randint(1, 50), 5, client_id=rng.choice("abcdef"), arrival_time=number
                )
                queue.add(request)
                waiting.append(request)
            elif operation == "t" and waiting:
                least = min(queue.counter(one.scheduling.client_id) for one in waiting)
                request = queue.take(0.0)
                assert queue.counter(request.scheduling.client_id) == least
                stays = rng.choice(["does not fit", "for a moment", "for a moment", "joins"])
                if stays != "does not fit":
                    queue.joined(request)
                if stays == "does not fit":
                    queue.put_back(request)
                    continue
                waiting.remove(request)
                (running if stays == "joins" else joined).append(request)
            elif operation == "s" and running:
                queue.served(rng.choice(running))
            elif operation == "p" and running:
                request = running.pop(rng.randrange(len(running)))
                request.num_preemptions += 1
                queue.put_back(request)
                waiting.append(request)
            elif operation == "r" and waiting:
                queue.remove(waiting.pop(rng.randrange(len(waiting))))


def test_prefix_keeps_alike_prompts_together_within_the_bound() -> None:
    requests = [
        make_request(f"{prefix}{i}", 80, 4, arrival_time=float(i), prefix=prefix) for i in range(6) for prefix in (1, 2)
    ]
    order = QueueOrder(by="prefix")
    assert drain(queue_of(order, requests)) == [f"1{i}" for i in range(6)] + [f"2{i}" for i in range(6)]
    bounded = queue_of(replace(order, max_wait=1.5), requests)
    names = drain(bounded, now=6.0)
    assert names[:5] == ["10", "11", "12", "13", "20"], "every fourth is the longest overdue one"


def test_deadline_goes_by_what_is_due_next() -> None:
    requests = [
        make_request("whenever", 1, 1, arrival_time=0.0),
        make_request("end in 90", 1, 1, arrival_time=0.0, timeout=90.0),
        make_request("first token in 10", 1, 1, arrival_time=20.0, first_token_timeout=10.0, timeout=300.0),
    ]
    assert drain(queue_of(ORDERS["deadline"], requests)) == ["first token in 10", "whenever", "end in 90"]


def test_deadline_order_meets_more_deadlines_than_fcfs() -> None:
    def missed(order: QueueOrder) -> int:
        rng = random.Random(3)
        requests, now = [], 0.0
        for number in range(400):
            now += rng.expovariate(0.3)
            timeout = rng.choice((30.0, 400.0))
            requests.append(make_request(str(number), 8, 10, arrival_time=now, timeout=timeout))
        return len(play(make_run(POLICIES["default"], order, max_num_seqs=3), requests).dropped)

    assert missed(ORDERS["deadline"]) < missed(ORDERS["fcfs"]) / 2


def test_tiers_come_before_fairness_and_fairness_within_tiers() -> None:
    requests = [
        make_request(f"{tier}{client}{i}", 10, 1, priority=tier, client_id=client)
        for tier in (1, 0)
        for client in "ab"
        for i in range(2)
    ]
    assert drain(queue_of(replace(ORDERS["priority-fair"], max_wait=None), requests)) == [
        "0a0",
        "0b0",
        "0a1",
        "0b1",
        "1a0",
        "1b0",
        "1a1",
        "1b1",
    ]


NUM_REQUESTS = 100_000


@pytest.fixture(scope="module")
def longest_fcfs_wait() -> float:
    return longest_wait(ORDERS["fcfs"])


def longest_wait(order: QueueOrder) -> float:
    """Of 100,000 requests that come in bursts, somewhat faster than they can be served, of clients of unequal appetite.

    The budget is never short, so that every order gets as much done in a step."""
    rng = random.Random(11)
    run = make_run(
        POLICIES["default"], order, num_blocks=512, max_num_seqs=32, max_num_batched_tokens=1024, step_seconds=0.05
    )
    num_added, longest, next_arrival = 0, 0.0, 0.0
    while num_added < NUM_REQUESTS or run.scheduler.has_unfinished:
        while num_added < NUM_REQUESTS and next_arrival <= run.now:
            for _ in range(rng.randint(1, 40)):
                run.add(
                    make_request(
                        str(num_added),
                        rng.choice((1, 2, 4, 32)),
                        rng.choice((1, 1, 2, 8)),
                        arrival_time=next_arrival,
                        prefix=rng.choice((3, 3, 3, 3, 4, 5)),
                        priority=rng.choice((0, 0, 0, 1, 5)),
                        client_id=rng.choice("aaaaaabbc"),
                    )
                )
                num_added += 1
            next_arrival += rng.expovariate(10.6)
        if run.scheduler.has_unfinished:
            for item in run.step().scheduled:
                if item.num_computed_tokens == 0:
                    longest = max(longest, run.now - item.request.arrival_time)
        else:
            run.now = next_arrival
        run.ended.clear()
    assert num_added >= NUM_REQUESTS
    assert not run.dropped
    return longest


# How much longer than under fcfs anybody may wait: a key that ages lets those pass who come within its greatest
# difference over the ageing; an overdue request has 4 joins for each that it would have had; a client has its third.
EXTRA_WAITS: dict[str, Callable[[float], float]] = {
    "priority": lambda fcfs: 5 / 0.1,
    "sjf": lambda fcfs: (31 * INPUT_TOKEN_COST + 7 * OUTPUT_TOKEN_COST) / 20.0,
    "deadline": lambda fcfs: 0.0,
    "prefix": lambda fcfs: 2.0 + 3 * fcfs,
    "priority-fair": lambda fcfs: 30.0 + 3 * fcfs,
    "fair": lambda fcfs: 2 * fcfs,
}


def longest_allowed_wait(name: str, longest_fcfs_wait: float) -> float:
    return longest_fcfs_wait + EXTRA_WAITS[name](longest_fcfs_wait) + 1.0


@pytest.mark.xdist_group("starvation")  # they share the fixture
@pytest.mark.parametrize("name", EXTRA_WAITS)
def test_nobody_starves_in_a_hundred_thousand_requests(name: str, longest_fcfs_wait: float) -> None:
    assert longest_wait(ORDERS[name]) <= longest_allowed_wait(name, longest_fcfs_wait)


@pytest.mark.xdist_group("starvation")
@pytest.mark.parametrize("name", ["priority", "sjf", "priority-fair"])
def test_without_its_bound_an_order_starves_somebody(name: str, longest_fcfs_wait: float) -> None:
    """So the trace is one on which the test above can fail."""
    unbounded = replace(ORDERS[name], ageing=0.0, max_wait=None)
    assert longest_wait(unbounded) > longest_allowed_wait(name, longest_fcfs_wait)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(ORDERS)),
    operations=st.lists(st.tuples(st.sampled_from("aatpr"), st.integers(0, 5), st.integers(-1, 1)), max_size=60),
)
def test_a_queue_holds_who_was_added_and_not_taken(name: str, operations: list[tuple[str, int, int]]) -> None:
    queue = make_queue(ORDERS[name], MeanLengthPredictor())
    waiting: list[Request] = []
    taken: list[Request] = []
    for number, (operation, value, priority) in enumerate(operations):
        if operation == "a":
            request = make_request(
                str(number), 1 + value, 4, arrival_time=float(number), priority=priority, client_id=str(value)
            )
            request.queue_number = number
            queue.add(request)
            waiting.append(request)
        elif operation == "t" and waiting:
            request = queue.take(float(number))
            waiting.remove(request)
            taken.append(request)
            if value:
                queue.joined(request)
        elif operation == "p" and taken:
            request = taken.pop(value % len(taken))
            queue.put_back(request)
            waiting.append(request)
        elif operation == "r" and waiting:
            request = waiting.pop(value % len(waiting))
            assert queue.remove(request)
            assert not queue.remove(request)
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
    assert {queue.take(1e9) for _ in list(waiting)} == set(waiting)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "luck"}, "by='luck'"),
        ({"ageing": 1.0}, "ageing=1.0 is not allowed with by='arrival'"),
        ({"ageing": float("nan"), "by": "priority"}, "ageing=nan"),
        ({"tiers": True, "by": "priority"}, "tiers=True"),
        ({"max_wait": -1.0}, "max_wait=-1.0"),
        ({"client_weights": {"a": 0.0}}, r"client_weights\['a'\]=0.0"),
        ({"prefix_tokens": 0}, "prefix_tokens=0"),
        ({"assumed_timeout": 0.0}, "assumed_timeout=0.0"),
    ],
)
def test_orders_are_validated(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ORDERS["fcfs"], **change)


def test_unknown_order_lists_the_known() -> None:
    with pytest.raises(ValueError, match="order='lifo' is not known: it must be one of fcfs, priority, sjf, fair"):
        resolve_order("lifo")
