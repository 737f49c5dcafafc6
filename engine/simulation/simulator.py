"""``simulate``: traces through replicas of the engine's own scheduler and block manager, with time as a number.

A replica does what ``Engine.step`` does: schedule, then, when the step's time has passed, give each request its token,
advance, and let those go that end. Only the forward pass is replaced, by a step-time model, and the tokens say nothing.
Requests that arrive while a step runs wait for the next one; of an arrival and a step's end at the same time the
arrival comes first. Nothing is random here: the same trace gives the same result.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.outputs import RequestMetrics
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError, Scheduler, StepPlan
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.simulation.recorder import Recorder
from pagedattn.engine.simulation.router import Router
from pagedattn.engine.simulation.step_time import StepTimeModel, StepWork
from pagedattn.engine.simulation.traces import TraceRequest

END_TOKENS = frozenset({0})  # there is one, so that no answer's length is known beforehand


class SimulatedRequest(Request):
    """A request that knows, and does not tell the scheduler, how long its answer will be."""

    def __init__(self, number: int, traced: TraceRequest, params: SamplingParams, scheduling: SchedulingParams) -> None:
        super().__init__(
            str(number),
            traced.prompt_token_ids(number),
            params,
            max_num_tokens=traced.num_prompt_tokens + traced.max_tokens,
            arrival_time=traced.arrival_time,
            stop_token_ids=END_TOKENS,
            scheduling=scheduling,
        )
        self.number = number
        self.answer_token_id = traced.answer_token_id(number)
        self.final_num_tokens = traced.num_prompt_tokens + traced.num_output_tokens
        self.last_token_time: float | None = None


class Replica:
    """One engine: ``add`` at any time; ``begin_step`` and ``end_step`` in turn while it has unfinished requests."""

    def __init__(self, index: int, scheduler: Scheduler, step_time: StepTimeModel, recorder: Recorder) -> None:
        self.index = index
        self.scheduler = scheduler
        self.num_unfinished = 0
        self.num_prompt_tokens = 0  # of unfinished requests
        self.is_awake = False  # it has an event to come: a step's end, or its first step after an idle time
        self._step_time = step_time
        self._recorder = recorder
        self._plan: StepPlan | None = None
        self._step_start = self._step_end = 0.0

    def add(self, request: SimulatedRequest) -> None:
        self.scheduler.add(request)
        self.num_unfinished += 1
        self.num_prompt_tokens += request.num_prompt_tokens

    def begin_step(self, now: float) -> float:
        """Schedule a step; returns when it ends."""
        plan = self.scheduler.schedule(now)
        if not plan.requests:
            raise RuntimeError(f"replica {self.index} has {self.num_unfinished} requests and schedules none at {now}")
        work = StepWork.of(plan)
        self._plan, self._step_start = plan, now
        self._step_end = now + self._step_time.seconds(work)
        recorder = self._recorder
        usage = self.scheduler.block_usage(plan) if recorder.wants_usage(self.index, now) else None
        recorder.step(self.index, self.scheduler, plan, work, usage, now, self._step_end)
        return self._step_end

    def end_step(self) -> None:
        """Hand out the tokens of the step that ran, if one did."""
        plan, scheduler, recorder, now = self._plan, self.scheduler, self._recorder, self._step_end
        if plan is None:
            return
        self._plan = None
        num_steady, start, advance = 0, self._step_start, scheduler.advance
        for row in plan.rows():
            request, _, _, needs_sample = row
            if not needs_sample:
                advance(row)
                continue
            assert isinstance(request, SimulatedRequest)
            request.token_ids.append(request.answer_token_id)
            advance(row)
            last_time = request.last_token_time
            if last_time == start:
                num_steady += 1
            elif last_time is not None:
                recorder.token_gap(now - last_time)
            else:
                request.first_token_time = now
            request.last_token_time = now
            if len(request.token_ids) >= request.final_num_tokens:
                self._finish(request, now)
        recorder.token_gap(now - start, num_steady)

    def _finish(self, request: SimulatedRequest, now: float) -> None:
        self.scheduler.finish(request)
        times = RequestMetrics(
            request.arrival_time, request.first_scheduled_time, request.first_token_time, now, request.num_preemptions
        )
        self._recorder.finish(request.number, times, request.num_output_tokens)
        self.num_unfinished -= 1
        self.num_prompt_tokens -= request.num_prompt_tokens


def make_scheduler(config: EngineConfig) -> Scheduler:
    block_manager = BlockManager(
        config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    return Scheduler.from_config(config, block_manager)


def simulate(
    trace: Iterable[TraceRequest],
    config: EngineConfig,
    step_time: StepTimeModel,
    *,
    recorder: Recorder,
    router: Router,
    num_replicas: int = 1,
) -> None:
    """Run ``trace``, sorted by arrival, to its end on ``num_replicas`` engines of ``config``; ``recorder`` gets it all.

    Requests are made when they arrive and let go when they end, so that millions fit into memory.
    """
    if num_replicas < 1:
        raise ValueError(f"num_replicas={num_replicas} is not allowed: it must be >= 1")
    replicas = [Replica(index, make_scheduler(config), step_time, recorder) for index in range(num_replicas)]
    events: list[tuple[float, int]] = []
    params_by_limit: dict[int, SamplingParams] = {}
    scheduling_by_client: dict[str, SchedulingParams] = {}
    previous_arrival = 0.0
    for number, traced in enumerate(trace):
        arrival = traced.arrival_time
        if arrival < previous_arrival:
            raise ValueError(f"request {number} arrives at {arrival}, before the one in front of it")
        previous_arrival = arrival
        _run_until(arrival, replicas, events)
        if traced.max_tokens not in params_by_limit:
            params_by_limit[traced.max_tokens] = SamplingParams(max_tokens=traced.max_tokens)
        if traced.client_id not in scheduling_by_client:
            scheduling_by_client[traced.client_id] = SchedulingParams(client_id=traced.client_id)
        replica = replicas[router.choose(traced, replicas)]
        recorder.arrive(traced, replica.index)
        try:  # before its tokens are made: a trace may have prompts of any length
            replica.scheduler.check_fits(traced.num_prompt_tokens, traced.num_prompt_tokens + traced.max_tokens)
        except RequestRejectedError:
            recorder.reject()
            continue
        replica.add(
            SimulatedRequest(number, traced, params_by_limit[traced.max_tokens], scheduling_by_client[traced.client_id])
        )
        if not replica.is_awake:
            # Its step begins later: others that arrive at the same time belong into it.
            replica.is_awake = True
            heapq.heappush(events, (arrival, replica.index))
    _run_until(float("inf"), replicas, events)
    for replica in replicas:
        replica.scheduler.check_integrity()
        recorder.close(replica.scheduler)


def _run_until(arrival: float, replicas: Sequence[Replica], events: list[tuple[float, int]]) -> None:
    """Everything that happens before ``arrival``: steps that end, and those that follow them."""
    while events and events[0][0] < arrival:
        now, index = events[0]
        replica = replicas[index]
        replica.end_step()
        if replica.num_unfinished:
            heapq.heapreplace(events, (replica.begin_step(now), index))
        else:
            heapq.heappop(events)
            replica.is_awake = False
