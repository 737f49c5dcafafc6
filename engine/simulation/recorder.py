"""What a simulation remembers, and its figures: ``Recorder`` collects, ``SimulationResult`` is what comes out."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedattn.engine.outputs import RequestMetrics
from pagedattn.engine.replay import Slots, StepRecord
from pagedattn.engine.scheduler import BlockUsage, Scheduler, StepPlan
from pagedattn.engine.simulation.step_time import StepWork
from pagedattn.engine.simulation.traces import TraceRequest
from pagedattn.engine.stats import Distribution

NEVER = float("nan")


@dataclass(frozen=True)
class ServiceLevel:
    """A request counts as served well when its first token comes within ``ttft`` seconds, and the others on average
    within ``seconds_per_token`` of the one before.
    """

    ttft: float
    seconds_per_token: float

    def __post_init__(self) -> None:
        for name in ("ttft", "seconds_per_token"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it must be > 0")


@dataclass(frozen=True)
class SimulationResult:
    """A simulation in figures; times are in seconds.

    ``goodput``: requests a second that were served as the ``ServiceLevel`` wants it. ``slot_utilization``: the share of
    batch slots, over the time that steps ran, in which a sequence was computed. ``kv_usage``: allocated blocks of all
    blocks, and ``kv_utilization``: of the token slots in them those that hold a token of an unfinished request, over
    the same time. ``padding_share``: rows computed for nobody, of all rows. ``prefix_hit_share``: of all prompt tokens,
    those that were in the cache when their request started. Distributions are None where there is no value.
    """

    num_requests: int
    num_finished: int
    num_rejected: int
    seconds: float
    num_output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    goodput: float
    ttft: Distribution | None
    inter_token_latency: Distribution | None
    latency: Distribution | None
    slot_utilization: float
    kv_usage: float
    kv_utilization: float
    padding_share: float
    prefix_hit_share: float
    num_preemptions: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A replica at one moment. ``service``: tokens computed so far for each client, over all replicas."""

    time: float
    replica: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_filled_slots: int
    service: dict[str, int]


class Recorder:
    """Every request's times; sums over the steps; and, where asked for, samples and step records to draw.

    ``sample_seconds``: a sample of each replica at most this often, None for no samples. ``max_step_records``: so many
    steps of replica 0 are kept whole. ``usage_every``: the blocks are looked at in one of so many steps.
    """

    def __init__(self, *, sample_seconds: float | None = None, max_step_records: int = 0, usage_every: int = 1) -> None:
        if usage_every < 1:
            raise ValueError(f"usage_every={usage_every} is not allowed: it must be >= 1")
        self.arrival_times = array("d")
        self.first_scheduled_times = array("d")
        self.first_token_times = array("d")
        self.finished_times = array("d")
        self.num_prompt_tokens = array("q")
        self.num_output_tokens = array("q")
        self.num_request_preemptions = array("q")
        self.replicas = array("q")
        self.clients: list[str] = []
        self.samples: list[Sample] = []
        self.steps: list[StepRecord] = []
        self._sample_seconds = sample_seconds
        self._max_step_records = max_step_records
        self._usage_every = usage_every
        self._next_samples: dict[int, float] = {}
        self._service: Counter[str] = Counter()
        self._slots = Slots()
        self._gaps, self._gap_counts = array("d"), array("q")
        self._num_rejected = self._num_steps = self._num_preemptions = self._num_padding = self._num_rows = 0
        self._num_prefix_queries = self._num_prefix_hits = 0
        self._slot_seconds = self._max_slot_seconds = 0.0
        self._usage_seconds = self._used_share_seconds = self._filled_seconds = self._allocated_seconds = 0.0

    def arrive(self, traced: TraceRequest, replica: int = 0) -> None:
        """The next request, in the order of their numbers."""
        self.arrival_times.append(traced.arrival_time)
        self.num_prompt_tokens.append(traced.num_prompt_tokens)
        self.clients.append(traced.client_id)
        self.replicas.append(replica)
        for times in (self.first_scheduled_times, self.first_token_times, self.finished_times):
            times.append(NEVER)
        self.num_output_tokens.append(0)
        self.num_request_preemptions.append(0)

    def reject(self) -> None:
        """The request that arrived last can never fit."""
        self._num_rejected += 1

    def wants_usage(self, replica: int, now: float) -> bool:
        """Whether ``step`` needs the blocks of a step that begins now; counting them takes a while."""
        return (
            self._num_steps % self._usage_every == 0
            or self._is_sample_due(replica, now)
            or (replica == 0 and len(self.steps) < self._max_step_records)
        )

    def step(
        self,
        replica: int,
        scheduler: Scheduler,
        plan: StepPlan,
        work: StepWork,
        usage: BlockUsage | None,
        start: float,
        end: float,
    ) -> None:
        seconds = end - start
        if usage is not None:
            self._usage_seconds += seconds
            self._used_share_seconds += seconds * usage.num_used_blocks / usage.num_blocks
            self._filled_seconds += seconds * usage.num_filled_slots
            self._allocated_seconds += seconds * usage.num_allocated_slots
        self._num_steps += 1
        self._num_preemptions += len(plan.preempted)
        self._num_padding += plan.num_padding_tokens
        self._num_rows += work.num_rows
        self._slot_seconds += seconds * work.num_seqs
        self._max_slot_seconds += seconds * scheduler.max_num_seqs
        if self._sample_seconds is not None:
            for request, _, num_tokens, _ in plan.rows():
                self._service[self.clients[int(request.request_id)]] += num_tokens
        if usage is not None and self._is_sample_due(replica, start):
            self._sample(replica, scheduler, plan, usage, start)
        if usage is not None and replica == 0 and len(self.steps) < self._max_step_records:
            self._record_step(scheduler, plan, usage, start, end)

    def _is_sample_due(self, replica: int, now: float) -> bool:
        return self._sample_seconds is not None and now >= self._next_samples.get(replica, 0.0)

    def _sample(self, replica: int, scheduler: Scheduler, plan: StepPlan, usage: BlockUsage, now: float) -> None:
        assert self._sample_seconds is not None
        self._next_samples[replica] = now + self._sample_seconds
        self.samples.append(
            Sample(
                now,
                replica,
                plan.num_seqs,
                len(scheduler.waiting),
                usage.num_used_blocks,
                usage.num_filled_slots,
                dict(self._service),
            )
        )

    def _record_step(self, scheduler: Scheduler, plan: StepPlan, usage: BlockUsage, start: float, end: float) -> None:
        held = [int(request.request_id) for request in scheduler.lingering]
        computed = [int(request.request_id) for request in plan.requests]
        self._slots.assign([*computed, *held])
        slot_of = self._slots.slot_of
        self.steps.append(
            StepRecord(
                start=start,
                end=end,
                active={slot_of[number]: number for number in computed},
                held={slot_of[number]: number for number in held},
                num_waiting=len(scheduler.waiting),
                num_tokens=plan.num_tokens,
                num_sampled=len(plan.sampled_requests),
                num_padding_tokens=plan.num_padding_tokens,
                num_preempted=len(plan.preempted),
                usage=usage,
            )
        )

    def token_gap(self, seconds: float, count: int = 1) -> None:
        """``count`` tokens came ``seconds`` after the ones before them."""
        if count:
            self._gaps.append(seconds)
            self._gap_counts.append(count)

    def finish(self, number: int, times: RequestMetrics, num_output_tokens: int) -> None:
        """The ``number``-th request has its last token."""
        assert times.first_scheduled_time is not None
        assert times.first_token_time is not None
        assert times.finished_time is not None
        self.first_scheduled_times[number] = times.first_scheduled_time
        self.first_token_times[number] = times.first_token_time
        self.finished_times[number] = times.finished_time
        self.num_output_tokens[number] = num_output_tokens
        self.num_request_preemptions[number] = times.num_preemptions

    def close(self, scheduler: Scheduler) -> None:
        """A replica has done all its work."""
        self._num_prefix_queries += scheduler.prefix_cache_queries
        self._num_prefix_hits += scheduler.prefix_cache_hits

    def served_well(self, level: ServiceLevel) -> NDArray[np.bool_]:
        """Of each request whether it was; one that did not finish was not."""
        arrival, first, last = map(np.asarray, (self.arrival_times, self.first_token_times, self.finished_times))
        num_gaps = np.maximum(np.asarray(self.num_output_tokens) - 1, 1)
        well: NDArray[np.bool_] = (first - arrival <= level.ttft) & (
            (last - first) / num_gaps <= level.seconds_per_token
        )
        return well

    def result(self, level: ServiceLevel) -> SimulationResult:
        arrival, first, last = map(np.asarray, (self.arrival_times, self.first_token_times, self.finished_times))
        finished = ~np.isnan(last)
        seconds = float(last[finished].max()) if finished.any() else 0.0
        num_output_tokens = sum(self.num_output_tokens)

        def per_second(count: float) -> float:
            return float(count) / seconds if seconds else 0.0

        return SimulationResult(
            num_requests=len(arrival),
            num_finished=int(finished.sum()),
            num_rejected=self._num_rejected,
            seconds=seconds,
            num_output_tokens=num_output_tokens,
            tokens_per_second=per_second(num_output_tokens),
            requests_per_second=per_second(finished.sum()),
            goodput=per_second(self.served_well(level).sum()),
            ttft=Distribution.of((first - arrival)[finished]),
            inter_token_latency=_weighted(np.asarray(self._gaps), np.asarray(self._gap_counts)),
            latency=Distribution.of((last - arrival)[finished]),
            slot_utilization=self._slot_seconds / max(self._max_slot_seconds, 1e-12),
            kv_usage=self._used_share_seconds / max(self._usage_seconds, 1e-12),
            kv_utilization=self._filled_seconds / max(self._allocated_seconds, 1e-12),
            padding_share=self._num_padding / max(self._num_rows, 1),
            prefix_hit_share=self._num_prefix_hits / max(self._num_prefix_queries, 1),
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
        )


def _weighted(values: NDArray[np.float64], counts: NDArray[np.int64]) -> Distribution | None:
    """The distribution of values that came ``counts`` times each."""
    if not values.size:
        return None
    p50, p95, p99 = np.percentile(values, [50, 95, 99], weights=counts, method="inverted_cdf").tolist()
    return Distribution(int(counts.sum()), float(np.average(values, weights=counts)), p50, p95, p99)
