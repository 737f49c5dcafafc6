"""``EngineStats``: a typed snapshot of the engine, and the counters behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pagedattn.engine.degradation import Ladder
    from pagedattn.engine.scheduler import Scheduler

# Percentiles are over this many latest values, so that a server's memory stays bounded.
WINDOW = 16_384
# The state of an engine that gives up nothing (degradation.py).
NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of ``count`` durations, in seconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float

    @staticmethod
    def of(values: Iterable[float]) -> Distribution | None:
        """None where there are no values."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return None
        p50, p95, p99 = np.percentile(array, [50, 95, 99]).tolist()
        return Distribution(int(array.size), float(array.mean()), p50, p95, p99)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot between two steps.

    A slot holds one token's keys and values; "filled" slots hold a token of an unfinished request, the rest of the
    allocated ones are wasted. Distributions cover the latest requests and tokens, or those since an earlier snapshot;
    None when there are none.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # of them: prompts, and what preempted ones had generated
    num_blocks: int
    num_used_blocks: int
    num_allocated_slots: int
    num_filled_slots: int
    max_wasted_slots: int  # the most that one sequence holds and does not use
    num_steps: int
    num_prompt_tokens: int  # of requests that were added
    num_generated_tokens: int
    num_computed_tokens: int  # rows of sequences: prompts, decodes, and what preemptions computed again
    num_padding_tokens: int  # rows that belong to no sequence
    num_preemptions: int
    num_finished: int  # ended by a stop or their length
    num_failed: int
    num_aborted: int
    num_dropped: int  # could not meet their deadline
    num_shed: int  # dropped under pressure
    num_first_tokens: int  # requests that got one
    num_inter_token_latencies: int
    num_swaps: int  # preemptions that kept a request's tokens in host memory
    prefix_cache_queries: int  # prompt tokens of sequences that started
    prefix_cache_hits: int  # those of them that were in the cache
    degradation: str  # the rung of the ladder that the engine is on, or "normal"
    num_degradation_changes: int
    ttft: Distribution | None  # arrival to first token
    latency: Distribution | None  # arrival to the end, of finished requests
    inter_token_latency: Distribution | None  # between two tokens of a request

    @property
    def kv_cache_usage(self) -> float:
        """Used blocks of all blocks, 0 to 1."""
        return self.num_used_blocks / self.num_blocks

    @property
    def kv_utilization(self) -> float | None:
        """Filled slots of allocated slots, 0 to 1; None when none is allocated."""
        return self.num_filled_slots / self.num_allocated_slots if self.num_allocated_slots else None


class Durations:
    """The latest ones in seconds, and how many there ever were."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def append(self, seconds: float, count: int = 1) -> None:
        """``count`` durations that are equal."""
        if count == 1:
            self._latest.append(seconds)
        else:
            self._latest.extend([seconds] * min(count, WINDOW))
        self.count += count

    def distribution(self, num_before: int = 0) -> Distribution | None:
        """Of all but the first ``num_before``, as far as they are kept."""
        latest = self._latest
        return Distribution.of(list(latest)[max(len(latest) - (self.count - num_before), 0) :])


class StatsRecorder:
    """The counters that no other object holds."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_computed_tokens = 0
        self.num_padding_tokens = 0
        self.num_preemptions = 0
        self.num_finished = 0
        self.num_failed = 0
        self.num_aborted = 0
        self.num_dropped = 0
        self.num_shed = 0
        self.ttfts = Durations()
        self.latencies = Durations()  # one for each of num_finished
        self.inter_token_latencies = Durations()

    def snapshot(self, scheduler: Scheduler, ladder: Ladder, since: EngineStats | None = None) -> EngineStats:
        """With what the others know. ``since``: distributions cover what came after that one."""
        usage = scheduler.block_usage()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_blocks=usage.num_blocks,
            num_used_blocks=usage.num_used_blocks,
            num_allocated_slots=usage.num_allocated_slots,
            num_filled_slots=usage.num_filled_slots,
            max_wasted_slots=usage.max_wasted_slots,
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_padding_tokens=self.num_padding_tokens,
            num_preemptions=self.num_preemptions,
            num_finished=self.num_finished,
            num_failed=self.num_failed,
            num_aborted=self.num_aborted,
            num_dropped=self.num_dropped,
            num_shed=self.num_shed,
            num_first_tokens=self.ttfts.count,
            num_inter_token_latencies=self.inter_token_latencies.count,
            num_swaps=scheduler.block_manager.num_swapped_out,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            degradation=ladder.state,
            num_degradation_changes=ladder.num_changes,
            ttft=self.ttfts.distribution(since.num_first_tokens if since else 0),
            latency=self.latencies.distribution(since.num_finished if since else 0),
            inter_token_latency=self.inter_token_latencies.distribution(
                since.num_inter_token_latencies if since else 0
            ),
        )
