"""Random arrivals, lengths, priorities, deadlines and cancellations, under every policy and every order.

``python -m tests.engine.test_scheduler_machine --seed 7 --examples 1000`` runs longer and counts its steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pagedattn.engine.orders import ORDERS, QueueOrder
from pagedattn.engine.policy import POLICIES, BatchingPolicy
from pagedattn.engine.request import Request
from pagedattn.engine.scheduler import RequestRejectedError
from tests.engine.scheduler_run import make_request, make_run

# Rows that POLICIES does not have, so that every value of every axis is run.
MORE_POLICIES: dict[str, BatchingPolicy] = {
    "sequence reserved": replace(POLICIES["default"], reserve="sequence", headroom_blocks=0),
    "whole and continuous": replace(
        POLICIES["default"],
        reserve="max_tokens",
        must_fit="max_tokens",
        when_full="never",
        prefill="whole",
        prefill_limit=None,
    ),
    "prefill first": replace(POLICIES["default"], order="waiting_first"),
    "static, not padded": replace(POLICIES["static"], pad=False),
    "equal chunks": replace(POLICIES["trtllm-no-evict"], prefill="equal_chunks"),
    "equal chunks, preempting": replace(POLICIES["trtllm-max-utilization"], prefill="equal_chunks"),
    "starved, to the tail": replace(POLICIES["transformers"], requeue="tail", join_after_preemption="next_step"),
    "few prompt tokens": replace(POLICIES["default"], prefill_limit=3),
    "gated and preempting": replace(
        POLICIES["tgi-unchunked"], reserve="sequence", must_fit="sequence", when_full="preempt_last"
    ),
}
STEPS_PER_CASE = 300  # (10 policies x 7 orders + 9 policies) x 300 > 20,000
EXAMPLES_PER_CASE = 22


class SchedulerMachine(RuleBasedStateMachine):
    policy: BatchingPolicy
    order: QueueOrder
    num_steps_of_all = 0

    @initialize(
        num_blocks=st.integers(1, 40),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 12),
        max_num_batched_tokens=st.integers(1, 30),
        enable_prefix_caching=st.booleans(),
        num_host_blocks=st.sampled_from([0, 0, 8, 60]),
    )
    def start(self, **sizes: int) -> None:
        self.run = make_run(self.policy, self.order, **sizes)
        self.unfinished = 0
        self.num_added = 0

    @rule(
        num_prompt=st.integers(1, 24),
        max_tokens=st.integers(1, 20),
        count=st.integers(1, 6),
        priority=st.integers(-1, 2),
        client=st.sampled_from("abc"),
        prefix=st.integers(1, 3),
        expected=st.none() | st.integers(1, 30),
        are_siblings=st.booleans(),
        timeouts=st.just((None, None)) | st.tuples(st.none() | st.integers(1, 60), st.none() | st.integers(1, 60)),
    )
    def arrive(
        self,
        num_prompt: int,
        max_tokens: int,
        count: int,
        priority: int,
        client: str,
        prefix: int,
        expected: int | None,
        are_siblings: bool,
        timeouts: tuple[int | None, int | None],
    ) -> None:
        together: list[Request] = []
        for _ in range(count):
            request = make_request(
                str(self.num_added),
                num_prompt,
                max_tokens,
                arrival_time=self.run.now,
                prefix=prefix,
                priority=priority,
                client_id=client,
                expected_output_tokens=expected,
                first_token_timeout=timeouts[0],
                timeout=timeouts[1],
            )
            self.num_added += 1
            together.append(request)
            if request.max_cached_tokens > self.run.scheduler.block_manager.capacity:
                with pytest.raises(RequestRejectedError):
                    self.run.add(request)
            else:
                self.run.add(request)
                self.unfinished += 1
        for request in together if are_siblings else ():
            request.siblings = [other for other in together if other is not request]

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.run.scheduler.has_unfinished:
                self.advance()

    @rule(seconds=st.integers(1, 20))
    def idle(self, seconds: int) -> None:
        self.run.now += seconds

    @rule(index=st.integers(0, 1000))
    def cancel(self, index: int) -> None:
        scheduler = self.run.scheduler
        present = sorted((*scheduler.waiting, *scheduler.running), key=lambda request: int(request.request_id))
        if present:
            self.run.cancel(present[index % len(present)])
            self.unfinished -= 1

    @invariant()
    def nobody_is_lost(self) -> None:
        scheduler = self.run.scheduler
        scheduler.check_integrity()
        assert len(scheduler.waiting) + len(scheduler.running) == self.unfinished

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        # Somebody computes a token in every step; nobody computes more than all do one after the other, each preempted
        # at most once for each token of those before it.
        scheduler = self.run.scheduler
        everybody = (*scheduler.waiting, *scheduler.running)
        work = sum(request.max_num_tokens for request in everybody)
        for _ in range(work * (len(everybody) + 1) + 1):
            if not scheduler.has_unfinished:
                break
            self.advance()
        assert not scheduler.has_unfinished, "some requests never end"
        assert scheduler.block_manager.num_used == scheduler.block_manager.swap_space.num_used == 0
        assert self.unfinished == 0

    def advance(self) -> None:
        num_gone = len(self.run.ended) + len(self.run.dropped)
        self.run.checked_step()
        self.unfinished -= len(self.run.ended) + len(self.run.dropped) - num_gone
        type(self).num_steps_of_all += 1


def run_machine(policy: BatchingPolicy, order: QueueOrder, num_examples: int, seed: int | None = None) -> int:
    """Returns how many steps it scheduled."""

    class Machine(SchedulerMachine):
        pass

    Machine.policy, Machine.order = policy, order
    run_state_machine_as_test(
        Machine if seed is None else hypothesis.seed(seed)(Machine),
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=seed is None,
            database=None,
            report_multiple_bugs=False,
            # Shrinking takes minutes: by hand, a failing case becomes a short one.
            phases=[Phase.generate] if seed is None else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Machine.num_steps_of_all


CASES = [
    *(pytest.param(POLICIES[p], ORDERS[o], id=f"{p}-{o}") for p in POLICIES for o in ORDERS),
    *(pytest.param(policy, ORDERS["fcfs"], id=name) for name, policy in MORE_POLICIES.items()),
]


@pytest.mark.parametrize(("policy", "order"), CASES)
def test_every_policy_keeps_its_promises_under_every_order(policy: BatchingPolicy, order: QueueOrder) -> None:
    assert run_machine(policy, order, EXAMPLES_PER_CASE) >= STEPS_PER_CASE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=200, help="for each policy and order (default: %(default)s)")
    options = parser.parse_args()
    num_steps = 0
    for case in CASES:
        policy, order = case.values
        num_steps += run_machine(policy, order, options.examples, options.seed)
        print(f"{case.id}: ok, {num_steps} steps so far", flush=True)
    print(f"seed {options.seed}: {num_steps} steps in {len(CASES)} cases of {options.examples} examples")


if __name__ == "__main__":
    main()
