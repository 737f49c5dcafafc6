"""A request that decodes is not looked at where nothing can change: what is planned is the same as if it were."""

from __future__ import annotations

import random
from functools import partial

import pytest

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.orders import ORDERS
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.prefix_finder import BlockHolder
from pagedattn.engine.request import Request
from tests.engine.scheduler_run import SchedulerRun, make_request, make_run
from tests.engine.test_fruitless_join import play_with_each

WINDOWS = ((None,), (5,), (None, 3), (4, None, 9))


def never_steady(manager: BlockManager, holder: BlockHolder) -> int:
    return 0


@pytest.mark.parametrize("order", ["fcfs", "priority-fair"])
@pytest.mark.parametrize("policy", POLICIES)
def test_plans_are_those_of_a_scheduler_that_looks_at_everyone(
    policy: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady_until, num_steady = BlockManager.steady_until, 0

    def count(manager: BlockManager, holder: BlockHolder) -> int:
        nonlocal num_steady
        until = steady_until(manager, holder)
        num_steady += until > holder.num_computed_tokens + 1
        return until

    def new_run(rng: random.Random, windows: tuple[int | None, ...]) -> SchedulerRun:
        return make_run(
            POLICIES[policy],
            ORDERS[order],
            num_blocks=len(windows) * rng.randint(12, 48),
            block_size=rng.choice([2, 3, 8]),
            max_num_seqs=rng.choice([4, 12]),
            max_num_batched_tokens=rng.choice([8, 24]),
            windows=windows,
            enable_prefix_caching=rng.random() < 0.7,
            num_host_blocks=rng.choice([0, 20]),
        )

    for seed, windows in enumerate(WINDOWS):
        make, methods = partial(new_run, windows=windows), (count, never_steady)
        steady, looked_at = (
            (history, run.scheduler.block_manager.num_changes)
            for history, run in play_with_each(monkeypatch, BlockManager, "steady_until", methods, make, seed)
        )
        assert steady == looked_at
    assert num_steady > 20, "hardly anybody was steady"


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("windows", WINDOWS)
def test_nothing_is_to_be_done_before_the_end_of_the_steady_tokens_and_something_at_it(
    windows: tuple[int | None, ...], enable_prefix_caching: bool
) -> None:
    manager = BlockManager(200, 4, windows=windows, enable_prefix_caching=enable_prefix_caching)
    request = make_request("a", 6, 60)
    manager.ensure(request, 30)
    request.num_computed_tokens = 6
    manager.commit(request)
    ends = []
    while request.num_computed_tokens < 40:
        num_computed, until = request.num_computed_tokens, manager.steady_until(request)
        has_blocks = manager.ensure(request, num_computed + 1)
        assert has_blocks
        state = observed(manager, request)
        request.token_ids.append(2)
        request.num_computed_tokens += 1
        manager.commit(request)
        is_quiet = observed(manager, request) == state
        if num_computed + 1 < until:
            assert is_quiet
            assert until == manager.steady_until(request)
        elif num_computed + 1 == until and not is_quiet:
            ends.append(until)
    assert len(ends) >= (2 if enable_prefix_caching or any(windows) else 0)
    request.siblings = [make_request("b", 6, 60)]
    assert manager.steady_until(request) == 0


def observed(manager: BlockManager, request: Request) -> tuple[object, ...]:
    """What ``commit`` and ``ensure`` change."""
    return request.block_ids.copy(), manager.num_free, manager.num_changes, len(manager._pool.tree.nodes)
