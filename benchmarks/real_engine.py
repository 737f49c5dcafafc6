"""The real engine on a simulator's trace, recorded as the simulator records itself, on a clock that waits for nobody.

The clock is this process' CPU time, with the time in which the engine had nothing to do put in between as a number. On
one thread (``OMP_NUM_THREADS=1``) that is the time on a machine of one's own, also where others want the cores; what
they do to caches and memory bandwidth is still in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pagedattn.engine.llm import LLM
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.simulation.recorder import Recorder
from pagedattn.engine.simulation.step_time import StepWork
from pagedattn.engine.simulation.traces import TraceRequest
from pagedattn.engine.step_plan import StepPlan


class WorkClock:
    """Seconds of CPU time since it was made, and those that were skipped."""

    def __init__(self) -> None:
        self._origin = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self._origin

    def skip_to(self, moment: float) -> None:
        self._origin -= max(0.0, moment - self())


@dataclass(frozen=True)
class TimedStep:
    work: StepWork
    seconds: float


def run_real(llm: LLM, trace: Sequence[TraceRequest], recorder: Recorder) -> list[TimedStep]:
    """Answer ``trace`` with the engine of ``llm``, which must be idle. Raises RuntimeError when a request fails.

    A request ends at the length that the trace says by being aborted there, so that the scheduler sees the larger
    ``max_tokens`` of the trace, as it does when a model ends an answer early.
    """
    assert torch.get_num_threads() == 1, "the clock counts CPU time: set OMP_NUM_THREADS=1"
    engine = llm.engine
    assert not engine.config.async_scheduling, "steps are timed one by one: async_scheduling must be off"
    clock = WorkClock()
    engine.clock = clock
    plans: list[StepPlan] = []
    schedule = engine.scheduler.schedule

    def observed(now: float) -> StepPlan:
        plans.append(schedule(now))
        return plans[-1]

    engine.scheduler.schedule = observed  # type: ignore[method-assign]
    steps: list[TimedStep] = []
    first_token_times: dict[int, float] = {}
    last_token_times: dict[int, float] = {}
    num_arrived = 0
    try:
        while num_arrived < len(trace) or engine.has_unfinished:
            if not engine.has_unfinished:
                clock.skip_to(trace[num_arrived].arrival_time)
            now = clock()
            while num_arrived < len(trace) and trace[num_arrived].arrival_time <= now:
                _add(llm, num_arrived, trace[num_arrived], recorder)
                num_arrived += 1
            result = engine.step()
            end = clock()
            if result.error is not None:
                raise RuntimeError(f"the engine failed: {result.error}")
            plan = plans[-1]
            work = StepWork.of(plan)
            recorder.step(0, engine.scheduler, plan, work, result.usage, now, end)
            steps.append(TimedStep(work, end - now))
            for output in result.outputs:
                completion, number = output.outputs[0], int(output.request_id)
                if completion.finish_reason == "abort":
                    continue
                num_tokens = len(completion.token_ids)
                first_token_times.setdefault(number, end)
                if number in last_token_times:
                    recorder.token_gap(end - last_token_times[number])
                last_token_times[number] = end
                if num_tokens == trace[number].num_output_tokens:
                    engine.abort(output.request_id)  # nothing to do where its limit has ended it
                    times = replace(output.metrics, first_token_time=first_token_times[number], finished_time=end)
                    recorder.finish(number, times, num_tokens)
        engine.step()  # hands out what was aborted last
        recorder.close(engine.scheduler)
    finally:
        engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    return steps


def _add(llm: LLM, number: int, traced: TraceRequest, recorder: Recorder) -> None:
    recorder.arrive(traced)
    llm.engine.add_request(
        {"prompt_token_ids": traced.prompt_token_ids(number)},
        SamplingParams(temperature=0.0, max_tokens=traced.max_tokens, ignore_eos=True),
        request_id=str(number),
        arrival_time=traced.arrival_time,
        scheduling_params=SchedulingParams(client_id=traced.client_id),
    )
