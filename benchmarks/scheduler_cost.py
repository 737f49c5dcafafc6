"""Time of one ``Scheduler.schedule()``, in microseconds: what the scheduler adds to every step.

    python -m benchmarks.scheduler_cost [--policies default,vllm] [--orders fcfs,fair] [--running 256] [--waiting 10000]

Pure Python on one core, so what bounds it is the number of requests in the step. A third as many requests end as there
are steps, so that others join; "tight" has too few blocks for all that may run, so that each step also looks for one
that fits. Medians over the steps. Then what a long prompt whose prefix is in the cache costs as it comes: hashing its
blocks and finding them. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.orders import ORDERS, resolve_order
from pagedattn.engine.policy import POLICIES, resolve_policy
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import Scheduler
from pagedattn.engine.scheduling_params import SchedulingParams

WARM_UP_STEPS, TIMED_STEPS = 60, 200
BLOCK_SIZE, MAX_TOKENS, BUDGET = 16, 1000, 2048
PARAMS = SamplingParams(max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Cost:
    policy: str
    order: str
    memory: str
    num_waiting: int
    num_seqs: int
    median_us: float
    p99_us: float


def measure(policy: str, order: str, *, num_running: int, num_waiting: int, is_tight: bool = False) -> Cost:
    blocks_per_request = 8 if is_tight else 70
    scheduler = Scheduler(
        BlockManager(max(num_running * blocks_per_request, 80), BLOCK_SIZE),
        resolve_policy(policy),
        max_num_seqs=num_running * (2 if is_tight else 1),
        max_num_batched_tokens=BUDGET,
        order=resolve_order(order),
    )
    for index in range(num_running + num_waiting):
        scheduler.add(_request(index))
    times: list[float] = []
    num_seqs = 0
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        start = time.perf_counter_ns()
        plan = scheduler.schedule(100.0 + 0.02 * step)
        if step >= WARM_UP_STEPS:
            times.append((time.perf_counter_ns() - start) / 1e3)
            num_seqs = max(num_seqs, plan.num_seqs)
        for item in plan.scheduled:
            if item.needs_sample:
                item.request.token_ids.append(1)
            scheduler.advance(item)
        if step % 3 == 0 and len(scheduler.running) > 1:
            scheduler.finish(scheduler.running[step % len(scheduler.running)])
    times.sort()
    memory = "tight" if is_tight else "ample"
    p99 = times[int(0.99 * len(times))]
    return Cost(policy, order, memory, num_waiting, num_seqs, statistics.median(times), p99)


@dataclass(frozen=True)
class PrefixCost:
    num_tokens: int
    hashing_us: float
    matching_us: float


def measure_prefix(num_tokens: int) -> PrefixCost:
    """A prompt that an earlier one has left in the cache: processor time, medians of 15."""
    generator = random.Random(0)
    token_ids = [generator.randrange(50_000) for _ in range(num_tokens)]
    manager = BlockManager(2 * -(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, enable_prefix_caching=True)
    first = _request(0, token_ids)
    manager.expect(first)
    prefix = manager.find_prefix(first)
    assert prefix is not None
    assert manager.admit(first, prefix, num_tokens)
    first.num_computed_tokens = num_tokens
    manager.commit(first)
    hashing, matching = [], []
    for index in range(1, 16):
        request = _request(index, token_ids)
        start = time.thread_time()
        manager.expect(request)
        hashed_at = time.thread_time()
        manager.find_prefix(request)
        matching.append((time.thread_time() - hashed_at) * 1e6)
        hashing.append((hashed_at - start) * 1e6)
        manager.free(request)
    return PrefixCost(num_tokens, statistics.median(hashing), statistics.median(matching))


def _request(index: int, token_ids: list[int] | None = None) -> Request:
    token_ids = [1] * (100 + index % 50) if token_ids is None else token_ids
    num_prompt = len(token_ids)
    return Request(
        str(index),
        token_ids,
        PARAMS,
        max_num_tokens=num_prompt + MAX_TOKENS,
        arrival_time=1e-3 * index,
        scheduling=SchedulingParams(priority=index % 3, client_id=str(index % 50)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--prefix-tokens", type=int, default=32_768, help="of the long prompt (default: %(default)s)")
    options = parser.parse_args(arguments)
    costs = []
    print(f"{'policy':<24}{'order':<15}{'memory':<8}{'waiting':>8}{'in step':>9}{'median us':>11}{'p99 us':>9}")
    for policy in options.policies.split(","):
        for order in options.orders.split(","):
            for is_tight, num_waiting in ((False, options.waiting), (False, 100), (True, options.waiting)):
                cost = measure(policy, order, num_running=options.running, num_waiting=num_waiting, is_tight=is_tight)
                costs.append(cost)
                print(
                    f"{cost.policy:<24}{cost.order:<15}{cost.memory:<8}{cost.num_waiting:>8}{cost.num_seqs:>9}"
                    f"{cost.median_us:>11.0f}{cost.p99_us:>9.0f}",
                    flush=True,
                )
    prefix = measure_prefix(options.prefix_tokens)
    print(
        f"prompt of {prefix.num_tokens} tokens: {prefix.hashing_us:.0f} us to hash, {prefix.matching_us:.0f} to match"
    )
    print(json.dumps({"costs": [asdict(cost) for cost in costs], "prefix": asdict(prefix)}))


if __name__ == "__main__":
    main()
