"""Plays timed arrivals against an engine, in real time, and records what each step did.

``replay`` is what the demo compares policies with: the same ``Arrival`` list, the same model, one engine per policy.
Times are seconds since the replay began. Latencies count from the scheduled arrival, not from the moment the loop came
round to look at it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import BlockUsage
from pagedattn.engine.stats import Distribution

if TYPE_CHECKING:
    from pagedattn.engine.engine import Engine


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, what it asks, and how."""

    time: float
    question: str
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass
class Answer:
    """What became of one arrival; times are None until they happen."""

    arrival: Arrival
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """One engine step. ``active`` maps batch slots to the arrivals computed there; ``held`` are slots that a sequence
    which had finished before still occupies. ``num_tokens`` were computed for sequences, ``num_sampled`` came out.
    """

    start: float
    end: float
    active: dict[int, int]
    held: dict[int, int]
    num_waiting: int
    num_tokens: int
    num_sampled: int
    num_padding_tokens: int
    num_preempted: int
    usage: BlockUsage


@dataclass
class Replay:
    """A run under one policy, filled as it goes."""

    policy: str
    max_num_seqs: int
    block_size: int
    num_blocks: int
    answers: list[Answer]
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def num_finished(self) -> int:
        return sum(answer.finished_time is not None for answer in self.answers)

    @property
    def num_generated_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


@dataclass(frozen=True)
class Summary:
    """A replay in figures.

    ``slot_utilization``: the share of batch slots, over the time that steps ran, in which an unfinished sequence was
    computed. ``kv_utilization``: the share of the token slots in allocated blocks that hold a token of a running
    sequence, over the same time. ``padding_share``: rows computed for nobody, of all rows.
    """

    policy: str
    num_requests: int
    num_failed: int
    num_generated_tokens: int
    seconds: float
    tokens_per_second: float
    ttft: Distribution
    latency: Distribution
    slot_utilization: float
    kv_utilization: float
    padding_share: float
    max_wasted_slots: int
    block_size: int
    num_preemptions: int
    num_steps: int


class Slots:
    """Gives each sequence a batch slot, the lowest free one, for as long as it is in the batch."""

    def __init__(self) -> None:
        self.slot_of: dict[int, int] = {}

    def assign(self, present: Sequence[int]) -> None:
        self.slot_of = {index: slot for index, slot in self.slot_of.items() if index in present}
        for index in present:
            if index not in self.slot_of:
                taken = set(self.slot_of.values())
                self.slot_of[index] = next(slot for slot in range(len(taken) + 1) if slot not in taken)


def replay(
    engine: Engine, policy: str, arrivals: Sequence[Arrival], on_step: Callable[[Replay], None] | None = None
) -> Replay:
    """Runs ``arrivals`` (sorted by time) through ``engine`` to the end; returns the record.

    ``on_step`` sees the record after every step. Raises RuntimeError when a policy that reserves KV step by step leaves
    a sequence a whole block unfilled.
    """
    config = engine.config
    answers = [Answer(arrival) for arrival in arrivals]
    run = Replay(policy, config.max_num_seqs, config.block_size, config.num_blocks, answers)
    slots = Slots()
    origin = time.perf_counter()
    num_arrived = 0
    while num_arrived < len(arrivals) or engine.has_unfinished:
        now = time.perf_counter() - origin
        while num_arrived < len(arrivals) and arrivals[num_arrived].time <= now:
            arrival = arrivals[num_arrived]
            engine.add_request(arrival.prompt_token_ids, arrival.params, request_id=str(num_arrived))
            num_arrived += 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, arrivals[num_arrived].time - now))
            continue
        run.steps.append(_step(engine, run, slots, origin))
        _check_waste(engine, run)
        if on_step is not None:
            on_step(run)
    return run


def _step(engine: Engine, run: Replay, slots: Slots, origin: float) -> StepRecord:
    num_generated_before = run.num_generated_tokens
    held = [int(request.request_id) for request in engine.scheduler.lingering]
    start = time.perf_counter() - origin
    result = engine.step()
    end = time.perf_counter() - origin
    for output in result.outputs:
        answer = run.answers[int(output.request_id)]
        choice = output.outputs[0]
        answer.text, answer.num_tokens, answer.finish_reason = choice.text, len(choice.token_ids), choice.finish_reason
        answer.error = output.error
        if answer.first_token_time is None and choice.token_ids:
            answer.first_token_time = end
        if output.finished:
            answer.finished_time = end
    computed = sorted(int(request_id) for request_id in result.num_scheduled_tokens)
    slots.assign([*computed, *held])
    usage = result.usage
    assert usage is not None, "a step with unfinished requests reports the blocks it had"
    return StepRecord(
        start=start,
        end=end,
        active={slots.slot_of[index]: index for index in computed},
        held={slots.slot_of[index]: index for index in held},
        num_waiting=len(engine.scheduler.waiting),
        num_tokens=result.num_tokens,
        num_sampled=run.num_generated_tokens - num_generated_before,
        num_padding_tokens=result.num_padding_tokens,
        num_preempted=len(result.preempted),
        usage=usage,
    )


def _check_waste(engine: Engine, run: Replay) -> None:
    wasted = run.steps[-1].usage.max_wasted_slots
    if engine.scheduler.policy.reserve == "step" and wasted >= run.block_size:
        raise RuntimeError(
            f"step {len(run.steps)} under policy {run.policy!r} left {wasted} KV slots of one sequence unfilled; "
            f"blocks hold {run.block_size}, so at most {run.block_size - 1} may be"
        )


def summarize(run: Replay) -> Summary:
    """The figures of a finished replay. Raises ValueError when no request got an answer."""
    answers = run.answers
    ttft = Distribution.of(a.first_token_time - a.arrival.time for a in answers if a.first_token_time is not None)
    latency = Distribution.of(
        a.finished_time - a.arrival.time for a in answers if a.finished_time is not None and a.num_tokens
    )
    if ttft is None or latency is None:
        raise ValueError(f"no request got an answer under policy {run.policy!r}")
    seconds = run.steps[-1].end
    durations = np.array([step.end - step.start for step in run.steps])
    active = np.array([len(step.active) for step in run.steps])
    filled_slots = np.array([step.usage.num_filled_slots for step in run.steps])
    allocated_slots = np.array([step.usage.num_allocated_slots for step in run.steps])
    num_rows = sum(step.num_tokens + step.num_padding_tokens for step in run.steps)
    return Summary(
        policy=run.policy,
        num_requests=len(run.answers),
        num_failed=sum(answer.finish_reason not in ("stop", "length") for answer in run.answers),
        num_generated_tokens=run.num_generated_tokens,
        seconds=seconds,
        tokens_per_second=run.num_generated_tokens / seconds,
        ttft=ttft,
        latency=latency,
        slot_utilization=float((durations * active).sum() / (durations.sum() * run.max_num_seqs)),
        kv_utilization=float((durations * filled_slots).sum() / max(1e-9, float((durations * allocated_slots).sum()))),
        padding_share=sum(step.num_padding_tokens for step in run.steps) / num_rows,
        max_wasted_slots=max(step.usage.max_wasted_slots for step in run.steps),
        block_size=run.block_size,
        num_preemptions=sum(step.num_preempted for step in run.steps),
        num_steps=len(run.steps),
    )
