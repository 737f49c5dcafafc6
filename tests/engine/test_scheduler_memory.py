"""The scheduler over a model of the memory: windows, shared prefixes, salts, forks, swaps, preemptions, cancellations
and failing steps together, under every policy, and each token that is computed sees what it should.

``python -m tests.engine.test_scheduler_memory 0 1000`` plays more histories.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import get_args

import pytest

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.orders import ORDERS
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.request import Request
from pagedattn.engine.scheduler import RequestRejectedError, Scheduler
from pagedattn.engine.step_plan import StepPlan
from pagedattn.engine.swap_space import PreemptionCosts, PreemptionKind, SwapSpace
from tests.engine.scheduler_run import make_request
from tests.engine.test_block_manager import Memory
from tests.engine.test_scheduler_machine import MORE_POLICIES

ALL_POLICIES = {**POLICIES, **MORE_POLICIES}
WINDOWS = [(None,), (None, 5), (3, None, 7), (4,), (1,), (2, 9), (None, None, 6)]
COSTS = PreemptionCosts((1, 16), (0.0, 15.0), (3.0, 7.0))
STEPS = 200


class History:
    def __init__(self, policy: str, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        windows = rng.choice(WINDOWS)
        self.manager = BlockManager(
            rng.randint(4, 40) * len(windows),
            rng.choice([1, 2, 3, 4, 8]),
            windows=windows,
            enable_prefix_caching=rng.random() < 0.75,
            swap_space=SwapSpace(rng.choice([0, 3, 10, 100]), COSTS),
        )
        self.scheduler = Scheduler(
            self.manager,
            replace(ALL_POLICIES[policy], preempt_by=rng.choice(get_args(PreemptionKind))),
            max_num_seqs=rng.randint(1, 10),
            max_num_batched_tokens=rng.randint(1, 24),
            order=ORDERS[rng.choice(list(ORDERS))],
        )
        self.memory = Memory(self.manager)
        self.unfinished: list[Request] = []
        self.num_made = 0
        self.now = 0.0

    def play(self) -> int:
        num_steps = 0
        while num_steps < STEPS or self.scheduler.has_unfinished:
            if num_steps < STEPS:
                self.disturb()
            num_steps += 1
            assert num_steps < 100 * STEPS, "some requests never end"
            if self.scheduler.has_unfinished:
                self.step()
        self.check_nothing_is_left()
        return num_steps

    def disturb(self) -> None:
        rng = self.rng
        if rng.random() < 0.35 and len(self.unfinished) < 30:
            self.arrive()
        if rng.random() < 0.08 and self.unfinished:
            self.end(rng.choice(self.unfinished))
        if rng.random() < 0.03:
            self.scheduler.prompt_share = rng.choice([1.0, 0.1, 0.5])
        if rng.random() < 0.02:
            self.manager.reset_prefix_cache()

    def arrive(self) -> None:
        rng = self.rng
        letters = rng.choice([1, 1, 1, 2, 3])
        prompt = [rng.randint(1, letters) for _ in range(rng.randint(1, 30))]
        max_tokens, salt = rng.randint(1, 16), rng.choice(["", "", "tenant"])
        scheduling = {
            "priority": rng.randint(-1, 2),
            "client_id": rng.choice("abc"),
            "timeout": rng.choice([None, None, None, rng.randint(2, 60)]),
            "first_token_timeout": rng.choice([None, None, rng.randint(1, 20)]),
        }
        together = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            request = make_request(str(self.num_made), len(prompt), max_tokens, arrival_time=self.now, **scheduling)
            request.token_ids[:] = prompt
            request.cache_salt = salt
            together.append(request)
            self.num_made += 1
        for request in together:
            request.siblings = [other for other in together if other is not request]
            try:
                self.scheduler.add(request)
            except RequestRejectedError:
                continue
            self.unfinished.append(request)

    def step(self) -> None:
        plan = self.scheduler.schedule(self.now)
        self.now += self.rng.choice([0.5, 1.0, 2.0])
        self.scheduler.check_integrity()
        for request in plan.dropped:
            self.unfinished.remove(request)
        assert plan.scheduled or not self.scheduler.has_unfinished, "a step with unfinished requests computes something"
        if self.rng.random() < 0.02:
            self.fail(plan)
            return
        self.memory.apply(plan.transfers)
        spans = [(item.request, item.num_computed_tokens, item.num_tokens) for item in plan.scheduled]
        for request, start, count in spans:
            self.memory.write(request, start, start + count)
        for request, start, count in spans:
            self.memory.check_visible(request, start, start + count)
        for item in plan.scheduled:
            request = item.request
            if item.needs_sample:
                request.token_ids.append(self.rng.randint(1, 3))
            self.scheduler.advance(item)
            if item.needs_sample and self.rng.random() < 0.01:
                self.manager.disown(request)
            if request.num_tokens >= request.max_num_tokens:
                self.end(request)
        self.scheduler.check_integrity()

    def fail(self, plan: StepPlan) -> None:
        """What ``Engine`` does when a step raises: not even the transfers can be relied upon."""
        for item in plan.scheduled:
            self.end(item.request)
        for request in plan.preempted:
            self.manager.discard_swapped(request)

    def end(self, request: Request) -> None:
        self.scheduler.finish(request, is_complete=request.num_tokens >= request.max_num_tokens)
        self.unfinished.remove(request)

    def check_nothing_is_left(self) -> None:
        manager, scheduler = self.manager, self.scheduler
        scheduler.check_integrity()
        assert not self.unfinished
        assert scheduler.num_waiting_tokens == 0
        assert manager.num_used == manager.swap_space.num_used == 0
        manager.reset_prefix_cache()
        assert not manager._pool.tree.nodes, "nodes of nobody are kept"
        assert not manager._pool._num_wanting, "blocks are kept for nobody"
        assert not manager._computing, "a block is computed by nobody"
        assert not scheduler._deadlines._queue, "the deadlines of nobody are watched"


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_every_token_sees_what_it_should(policy: str) -> None:
    for seed in range(3):
        History(policy, seed).play()


def main() -> None:
    num_steps = 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        num_steps += sum(History(policy, seed).play() for policy in ALL_POLICIES)
    print(f"{num_steps} steps")


if __name__ == "__main__":
    main()
