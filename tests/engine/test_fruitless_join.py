"""A fruitless attempt to join is remembered: what is planned is the same as if it were made again at every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.fruitless_join import FruitlessJoin, JoinState, WaitingNeeds
from pagedattn.engine.orders import ORDERS, QueueOrder
from pagedattn.engine.policy import POLICIES, BatchingPolicy
from pagedattn.engine.request import Request
from pagedattn.engine.scheduler import Scheduler
from pagedattn.engine.step_draft import StepDraft
from pagedattn.engine.step_plan import StepPlan
from pagedattn.engine.waiting_queue import WaitingQueue
from tests.engine.scheduler_run import SchedulerRun, make_request, make_run
from tests.engine.test_orders import queue_of

GATED_POLICIES: dict[str, BatchingPolicy] = {
    "tgi-unchunked": POLICIES["tgi-unchunked"],
    "default": POLICIES["default"],
    "transformers": POLICIES["transformers"],
    "overtaking": replace(POLICIES["tgi-unchunked"], overtake_window=3, max_overtakes=4),
    "preempting": replace(
        POLICIES["default"], order="waiting_first", join_ratio=0.5, join_patience=6, preempt_by="swap"
    ),
    "after decodes": replace(POLICIES["default"], join_ratio=0.6, join_patience=9, headroom_blocks=0),
}
STEPS = 250


def new_run(policy: BatchingPolicy, order: QueueOrder, rng: random.Random) -> SchedulerRun:
    return make_run(
        policy,
        order,
        num_blocks=rng.randint(12, 48),
        block_size=rng.choice([1, 2, 4]),
        max_num_seqs=rng.choice([4, 12, 24]),
        max_num_batched_tokens=rng.choice([8, 24, 48]),
        enable_prefix_caching=rng.random() < 0.7,
        num_host_blocks=rng.choice([0, 20]),
    )


def play(run: SchedulerRun, rng: random.Random) -> list[object]:
    """Random arrivals, forks and cancellations; returns what each step planned."""
    history: list[object] = []
    num_added = 0
    for _ in range(STEPS):
        if rng.random() < 0.3 and len(run.scheduler.waiting) < 30:
            siblings: list[Request] = []
            num_prompt, prefix = rng.randint(1, 24), rng.randint(1, 3)
            scheduling = {"priority": rng.randint(0, 2), "client_id": rng.choice("abc")}
            timeout = rng.choice([None, None, rng.randint(3, 60)])
            for _ in range(rng.choice([1, 1, 2, 3])):
                max_tokens = rng.randint(1, 20)
                request = make_request(
                    str(num_added), num_prompt, max_tokens, arrival_time=run.now, prefix=prefix, timeout=timeout,
                    **scheduling,
                )  # fmt: skip
                num_added += 1
                if request.max_cached_tokens <= run.scheduler.block_manager.capacity:
                    siblings.append(request)
            for request in siblings if rng.random() < 0.4 else ():
                request.siblings = [other for other in siblings if other is not request]
            for request in siblings:
                run.add(request)
        if rng.random() < 0.03:
            present = sorted((*run.scheduler.waiting, *run.scheduler.running), key=lambda one: int(one.request_id))
            if present:
                run.cancel(rng.choice(present))
        if run.scheduler.has_unfinished:
            history.append(summary(run.step()))
            run.scheduler.check_integrity()
            history.append(sorted((one.request_id, one.num_overtaken) for one in run.scheduler.waiting))
    return history


def play_with_each(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    methods: Sequence[Callable[..., object]],
    new_run: Callable[[random.Random], SchedulerRun],
    seed: int,
) -> list[tuple[list[object], SchedulerRun]]:
    """The same work with each method in the place of ``owner.name``: what happened, and the run behind it."""
    played = []
    for method in methods:
        monkeypatch.setattr(owner, name, method)
        rng = random.Random(seed)
        run = new_run(rng)
        played.append((play(run, rng), run))
    return played


def summary(plan: StepPlan) -> object:
    return (
        [(item.request.request_id, item.num_computed_tokens, item.num_tokens) for item in plan.scheduled],
        [request.request_id for request in plan.preempted],
        [request.request_id for request in plan.dropped],
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", GATED_POLICIES)
def test_a_remembered_attempt_is_what_another_would_be(
    policy: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    would_repeat, num_repeats = FruitlessJoin.would_repeat, 0

    def count(self: FruitlessJoin, state: JoinState, waiting: WaitingQueue, now: float) -> bool:
        nonlocal num_repeats
        repeats = would_repeat(self, state, waiting, now)
        num_repeats += repeats
        return repeats

    for seed in range(2):
        (remembered, _), (attempted, _) = play_with_each(
            monkeypatch, FruitlessJoin, "would_repeat", (count, lambda *_: False),
            lambda rng: new_run(GATED_POLICIES[policy], ORDERS[order], rng), seed,
        )  # fmt: skip
        assert remembered == attempted
    assert num_repeats, "no attempt was remembered"


@pytest.mark.parametrize("order", ["fcfs", "fair", "priority-fair"])
@pytest.mark.parametrize("policy", ["tgi-unchunked", "overtaking", "preempting", "after decodes"])
def test_what_the_budget_can_not_do_for_so_many_would_come_to_nothing(
    policy: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    most_joins, num_ruled_out = Scheduler._most_joins, 0

    def count(scheduler: Scheduler, step: StepDraft) -> int:
        nonlocal num_ruled_out
        most = most_joins(scheduler, step)
        num_ruled_out += most < len(scheduler.waiting)
        return most

    def unbounded(scheduler: Scheduler, step: StepDraft) -> int:
        return len(scheduler.waiting)

    monkeypatch.setattr(FruitlessJoin, "would_repeat", lambda *_: False)

    def new_run(rng: random.Random, enable_prefix_caching: bool) -> SchedulerRun:
        return make_run(
            GATED_POLICIES[policy],
            ORDERS[order],
            num_blocks=rng.randint(12, 90),
            block_size=rng.choice([1, 2, 4]),
            max_num_seqs=24,
            max_num_batched_tokens=rng.choice([8, 24, 48]),
            enable_prefix_caching=enable_prefix_caching,
            num_host_blocks=rng.choice([0, 20]),
        )

    for seed in range(6):
        make = partial(new_run, enable_prefix_caching=seed % 2 == 1)
        methods = (count, unbounded)
        (ruled_out, _), (attempted, _) = play_with_each(monkeypatch, Scheduler, "_most_joins", methods, make, seed)
        assert ruled_out == attempted
    assert num_ruled_out, "nothing was ruled out"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 4000), st.data())
def test_the_most_that_can_join_is_never_too_few_and_not_far_too_many(
    needs: list[int], budget: int, data: st.DataObject
) -> None:
    requests = [make_request(str(index), need, 1) for index, need in enumerate(needs)]
    waiting = WaitingNeeds()
    for request, need in zip(requests, needs, strict=True):
        waiting.add(request, need)
    for index in sorted(data.draw(st.sets(st.integers(0, len(needs) - 1))), reverse=True):
        waiting.remove(requests.pop(index))
        needs.pop(index)
    waiting.check_integrity(requests)

    def most(budget: int) -> int:
        return sum(total <= budget for total in accumulate(sorted(needs)))

    assert most(budget) <= waiting.most_within(budget) <= most(2 * budget)


@pytest.mark.parametrize("order", ORDERS)
def test_joinings_that_are_withdrawn_change_nobodys_turn(order: str) -> None:
    queue = queue_of(
        ORDERS[order],
        [
            make_request(
                str(index),
                2 + index % 5,
                3,
                arrival_time=index,
                prefix=index % 3,
                priority=index % 2,
                client_id=str(index % 4),
            )
            for index in range(20)
        ],
    )

    def join(count: int) -> list[Request]:
        requests = []
        for _ in range(count):
            requests.append(queue.take(100.0))
            queue.joined(requests[-1])
        return requests

    join(3)
    attempts = []
    for count in (2, 7, 7):
        set_turn_back = queue.mark_turn()
        attempts.append(join(count))
        for request in reversed(attempts[-1]):
            queue.withdrawn(request)
            queue.put_back(request)
        set_turn_back()
    assert attempts[0] == attempts[1][:2]
    assert attempts[1] == attempts[2] == join(7)


def waiting_for_a_prefix(
    windows: tuple[int | None, ...] = (None,), num_blocks: int = 12
) -> tuple[BlockManager, Request, Request]:
    """Somebody who has a prompt of four blocks of four tokens to compute, and who waits for the same and a little."""
    manager = BlockManager(num_blocks, 4, windows=windows, enable_prefix_caching=True)
    computing, waiting = make_request("computing", 16, 20), make_request("waiting", 18, 3)
    manager.ensure(computing, 16)
    manager.take_transfers()
    manager.expect(waiting)
    return manager, computing, waiting


def compute(manager: BlockManager, request: Request, num_tokens: int) -> None:
    request.num_computed_tokens += num_tokens
    manager.commit(request)


def test_what_a_waiting_request_could_find_is_noticed_and_nothing_else() -> None:
    manager, computing, waiting = waiting_for_a_prefix()
    stranger = make_request("stranger", 8, 20, prefix=7)
    manager.ensure(stranger, 8)
    for _ in range(4):
        before = manager.num_changes
        found = manager.find_prefix(waiting, may_wait=False)
        compute(manager, stranger, 2)
        assert manager.num_changes == before
        compute(manager, computing, 4)
        assert manager.find_prefix(waiting, may_wait=False) != found
        assert manager.num_changes != before
    before = manager.num_changes
    compute(manager, computing, 0)
    assert manager.num_changes == before


def test_that_nobody_computes_a_wanted_block_any_more_is_noticed() -> None:
    manager, computing, waiting = waiting_for_a_prefix()
    compute(manager, computing, 4)
    assert manager.find_prefix(waiting) is None
    before = manager.num_changes
    manager.disown(computing)
    compute(manager, computing, 4)
    assert manager.find_prefix(waiting) is not None
    assert manager.num_changes != before


def test_the_eviction_of_a_wanted_block_is_noticed() -> None:
    manager, computing, waiting = waiting_for_a_prefix(num_blocks=6)
    compute(manager, computing, 16)
    manager.free(computing)
    stranger = make_request("stranger", 20, 4, prefix=7)
    assert manager.ensure(stranger, 8)
    before, found = manager.num_changes, manager.find_prefix(waiting)
    assert found is not None
    assert found.num_tokens == 16
    assert manager.ensure(stranger, 12)
    assert manager.find_prefix(waiting) != found
    assert manager.num_changes != before


def test_a_block_that_leaves_a_window_is_noticed() -> None:
    manager, computing, waiting = waiting_for_a_prefix(windows=(None, 5), num_blocks=24)
    compute(manager, computing, 16)
    manager.ensure(computing, 20)
    computing.token_ids += [2] * 4
    before, num_free = manager.num_changes, manager.num_free
    found = manager.find_prefix(waiting)
    compute(manager, computing, 1)
    assert manager.num_free == num_free  # nothing left the window with that one
    assert manager.num_changes == before
    compute(manager, computing, 3)
    assert manager.num_free > num_free
    assert manager.find_prefix(waiting) != found  # one block of it is free now, and would have to be taken
    assert manager.num_changes != before


def test_a_prompt_that_a_sibling_has_computed_is_noticed() -> None:
    manager = BlockManager(24, 4)
    one, other = make_request("one", 10, 20), make_request("other", 10, 20)
    one.siblings, other.siblings = [other], [one]
    manager.ensure(one, 12)
    manager.take_transfers()
    compute(manager, one, 5)
    assert manager.find_prefix(other) is None
    before = manager.num_changes
    compute(manager, one, 5)
    assert manager.find_prefix(other) is not None
    assert manager.num_changes != before
