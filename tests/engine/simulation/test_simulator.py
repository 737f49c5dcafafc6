"""The simulator against the real engine step by step, and what must hold for any trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.orders import ORDERS
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import Scheduler, StepPlan
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel, SimulationResult
from pagedattn.engine.simulation.router import ROUTERS, RoundRobin, Router
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.step_time import FixedRate, StepWork
from pagedattn.engine.simulation.traces import TraceRequest, generate
from tests.engine.fake_model import fake_engine

ONE_SECOND = FixedRate(1.0)
ANY_LEVEL = ServiceLevel(1e9, 1e9)


class PlanLog(Recorder):
    """Also keeps each step as (start, [(request, first token, tokens)], padding, preempted)."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[object] = []

    def step(
        self,
        replica: int,
        scheduler: Scheduler,
        plan: StepPlan,
        work: StepWork,
        usage: object,
        start: float,
        end: float,
    ) -> None:
        super().step(replica, scheduler, plan, work, usage, start, end)
        scheduler.check_integrity()
        self.plans.append(describe(plan))


def describe(plan: StepPlan) -> object:
    return (
        [(item.request.request_id, item.num_computed_tokens, item.num_tokens) for item in plan.scheduled],
        plan.num_padding_tokens,
        [request.request_id for request in plan.preempted],
    )


def config(**fields: object) -> EngineConfig:
    return EngineConfig(**{"num_blocks": 64, "block_size": 4, "max_model_len": 256, "max_num_seqs": 6, **fields})


def run(
    trace: Sequence[TraceRequest],
    engine_config: EngineConfig,
    recorder: Recorder | None = None,
    router: Router | None = None,
    num_replicas: int = 1,
) -> tuple[Recorder, SimulationResult]:
    recorder = recorder or Recorder()
    router = router or RoundRobin()
    simulate(trace, engine_config, ONE_SECOND, recorder=recorder, router=router, num_replicas=num_replicas)
    return recorder, recorder.result(ANY_LEVEL)


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_those_of_the_engine(policy: str) -> None:
    """Same requests, same clock: the engine with a model schedules, step by step, what the simulator does."""
    random = np.random.default_rng(5)
    arrivals = np.cumsum(random.integers(0, 4, 24)).tolist()
    prompts, outputs = random.integers(1, 50, 24).tolist(), random.integers(1, 40, 24).tolist()
    trace = [  # every third begins as others do
        TraceRequest(float(at), prompt, output, output, prefix_ids=(number % 2,) if number % 3 == 0 else ())
        for number, (at, prompt, output) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]
    sizes = {"num_blocks": 34, "max_num_batched_tokens": 24, "policy": policy}
    log = PlanLog()
    run(trace, config(**sizes), log)

    engine = fake_engine(max_num_seqs=6, **sizes)
    now = 0.0
    engine.clock = lambda: now
    plans: list[object] = []
    schedule = engine.scheduler.schedule

    def observed(now: float) -> StepPlan:
        plan = schedule(now)
        plans.append(describe(plan))
        return plan

    engine.scheduler.schedule = observed  # type: ignore[method-assign]
    waiting = list(enumerate(trace))
    while waiting or engine.has_unfinished:
        while waiting and waiting[0][1].arrival_time <= now:
            number, traced = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=traced.max_tokens, ignore_eos=True)
            prompt = {"prompt_token_ids": traced.prompt_token_ids(number)}
            engine.add_request(prompt, params, request_id=str(number), arrival_time=traced.arrival_time)
        if engine.has_unfinished:
            engine.step()
        now += 1.0
    assert log.plans == plans
    assert len(plans) > 40


lengths = st.tuples(st.integers(0, 6), st.integers(1, 60), st.integers(1, 40), st.integers(0, 60), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(lengths, min_size=1, max_size=25),
    policy=st.sampled_from(sorted(POLICIES)),
    order=st.sampled_from(sorted(ORDERS)),
    num_replicas=st.integers(1, 3),
    router=st.sampled_from(sorted(ROUTERS)),
)
def test_every_request_ends_with_its_tokens(
    rows: list[tuple[int, ...]], policy: str, order: str, num_replicas: int, router: str
) -> None:
    now = 0.0
    trace = []
    for gap, prompt, output, extra, client in rows:
        now += gap / 2
        trace.append(TraceRequest(now, prompt, output, output + extra, f"client-{client}", tuple(range(client))))
    engine_config = config(policy=policy, order=order, num_blocks=41, max_num_batched_tokens=32)
    log = PlanLog()
    recorder, result = run(trace, engine_config, log, ROUTERS[router](), num_replicas)
    assert result.num_finished == result.num_requests == len(trace)
    assert list(recorder.num_output_tokens) == [traced.num_output_tokens for traced in trace]
    arrival, scheduled, first, last = (
        np.array(times)
        for times in (
            recorder.arrival_times,
            recorder.first_scheduled_times,
            recorder.first_token_times,
            recorder.finished_times,
        )
    )
    assert (arrival <= scheduled).all()
    assert (scheduled < first).all()
    # A token takes a step at least, and a step a second.
    assert (last - first >= np.array(recorder.num_output_tokens) - 1 - 1e-9).all()
    assert 0 < result.slot_utilization <= 1
    assert 0 < result.kv_utilization <= 1
    num_gaps = result.inter_token_latency.count if result.inter_token_latency else 0
    assert num_gaps == sum(traced.num_output_tokens - 1 for traced in trace)
    assert sum(recorder.num_request_preemptions) == result.num_preemptions
    again = PlanLog()
    run(trace, engine_config, again, ROUTERS[router](), num_replicas)
    assert again.plans == log.plans, "the same trace gives the same steps"
    assert again.finished_times == recorder.finished_times


def test_requests_that_arrive_together_start_together() -> None:
    trace = [TraceRequest(at, 4, 2, 2) for at in (0.0, 0.0, 0.5, 0.5)]
    recorder, _ = run(trace, config())
    assert list(recorder.first_scheduled_times) == [0.0, 0.0, 1.0, 1.0]
    assert list(recorder.first_token_times) == [1.0, 1.0, 2.0, 2.0]
    assert list(recorder.finished_times) == [2.0, 2.0, 3.0, 3.0]


def test_an_arrival_at_a_steps_end_is_in_the_next_step() -> None:
    trace = [TraceRequest(at, 4, 3, 3) for at in (0.0, 1.0)]
    recorder, _ = run(trace, config())
    assert list(recorder.first_scheduled_times) == [0.0, 1.0]


def test_an_idle_replica_starts_when_somebody_comes() -> None:
    trace = [TraceRequest(at, 4, 1, 1) for at in (0.25, 7.75)]
    recorder, result = run(trace, config())
    assert list(recorder.finished_times) == [1.25, 8.75]
    assert result.slot_utilization == pytest.approx(1 / 6), "only the time that steps ran counts"


def test_what_can_never_fit_is_rejected_alone() -> None:
    trace = [TraceRequest(0.0, 4, 2, 2), TraceRequest(0.0, 4, 2, 4096), TraceRequest(0.0, 4, 2, 2)]
    recorder, result = run(trace, config())
    assert (result.num_requests, result.num_finished, result.num_rejected) == (3, 2, 1)
    assert np.isnan(recorder.finished_times[1])
    assert result.goodput == pytest.approx(2 / result.seconds)


def test_figures_of_a_known_run() -> None:
    """Two requests of 4 prompt tokens, 3 and 1 output tokens, in steps of a second."""
    trace = [TraceRequest(0.0, 4, 3, 8), TraceRequest(0.5, 4, 1, 8)]
    recorder, _ = run(trace, config(max_num_seqs=2))
    result = recorder.result(ServiceLevel(ttft=1.2, seconds_per_token=1.0))
    assert result.seconds == 3.0
    assert result.num_output_tokens == 4
    assert result.tokens_per_second == pytest.approx(4 / 3)
    assert result.goodput == pytest.approx(1 / 3), "the second waits for 1.5 s"
    assert result.ttft is not None
    assert result.ttft.mean == pytest.approx((1.0 + 1.5) / 2)
    assert result.inter_token_latency is not None
    assert (result.inter_token_latency.count, result.inter_token_latency.p99) == (2, 1.0)
    assert result.slot_utilization == pytest.approx(4 / 6)
    # Blocks of 4 slots: 4 tokens in 1 block; 5 in 2 and 4 in 1; 6 in 2.
    assert result.kv_utilization == pytest.approx((4 + 9 + 6) / (4 + 12 + 8))
    assert result.kv_usage == pytest.approx((1 + 3 + 2) / (3 * 64))


@pytest.mark.parametrize("batch_size", [8, 32])
def test_static_against_continuous_as_in_the_textbook(batch_size: int) -> None:
    """At a fixed rate, static batching computes the longest of each batch: for exponential lengths a batch of B takes
    H_B times the mean, and continuous batching is so much faster, apart from the tail where requests run out.
    """
    trace = generate("exp", 60 * batch_size, arrivals="at-once", max_tokens="exact", seed=1)
    trace = [replace(request, num_prompt_tokens=1) for request in trace]
    outputs = [request.num_output_tokens for request in trace]
    sizes = {"num_blocks": 100_000, "max_num_seqs": batch_size, "max_num_batched_tokens": 4096}
    seconds = {
        policy: run(trace, config(policy=policy, **sizes), Recorder(usage_every=1000))[1].seconds
        for policy in ("static", "default")
    }
    batches = [outputs[first : first + batch_size] for first in range(0, len(outputs), batch_size)]
    assert seconds["static"] == sum(map(max, batches))
    ideal = sum(outputs) / batch_size
    assert ideal <= seconds["default"] <= ideal + max(outputs)
    harmonic = sum(1 / number for number in range(1, batch_size + 1))
    assert seconds["static"] / ideal == pytest.approx(harmonic, rel=0.05)


def test_shared_prompts_are_computed_once() -> None:
    """Of three prompts of 40 tokens that begin alike, two find the full blocks of the first."""
    trace = [TraceRequest(float(at), 40, 2, 2, prefix_ids=(7,)) for at in (0, 5, 10)]
    _, result = run(trace, config())
    assert result.prefix_hit_share == pytest.approx(2 * 36 / 120), "the last block is computed for its logits"
    _, result = run(trace, config(enable_prefix_caching=False))
    assert result.prefix_hit_share == 0


def test_blocks_that_ended_rows_share_are_wasted_once() -> None:
    """A padded batch of four equal prompts: three end early, and what they share with the fourth is still in use."""
    trace = [TraceRequest(0.0, 40, 2, 2, prefix_ids=(7,))]
    trace += [TraceRequest(5.0, 40, output, output, prefix_ids=(7,)) for output in (1, 1, 1, 40)]
    recorder, result = run(trace, config(policy="static"), Recorder(max_step_records=100))
    usages = [step.usage for step in recorder.steps if step.held]
    assert len(usages) == 39
    # Nine shared blocks, and of each row its own: one of the three that ended, eleven of the one that goes on.
    assert {usage.num_used_blocks for usage in usages} == {9 + 3 * 1 + 11}
    assert [usage.num_filled_slots for usage in usages] == list(range(41, 80))
    assert 0 < result.kv_utilization < 1


def test_a_trace_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="request 1 arrives at 1"):
        run([TraceRequest(2.0, 4, 2, 2), TraceRequest(1.0, 4, 2, 2)], config())
    with pytest.raises(ValueError, match="num_replicas=0 is not allowed"):
        run([], config(), num_replicas=0)


def test_an_empty_trace_has_no_times() -> None:
    result = run([], config())[1]
    assert (result.num_requests, result.seconds, result.ttft, result.inter_token_latency) == (0, 0.0, None, None)


def test_samples_follow_the_run() -> None:
    trace = [TraceRequest(0.0, 4, 10, 10, f"client-{number % 2}") for number in range(8)]
    recorder, _ = run(trace, config(max_num_seqs=4), Recorder(sample_seconds=2.0, max_step_records=5))
    assert [sample.time for sample in recorder.samples] == [float(at) for at in range(0, 20, 2)]
    assert recorder.samples[0].num_running == 4
    assert recorder.samples[0].num_waiting == 4
    computed = 8 * (4 + 10 - 1)  # the last token is never computed
    step = 4  # one for each of the last four, in the step after the last sample
    assert sum(recorder.samples[-1].service.values()) == computed - step
    assert recorder.samples[-1].service["client-0"] == recorder.samples[-1].service["client-1"]
    assert len(recorder.steps) == 5
    assert recorder.steps[0].active == {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize(("field", "value"), [("ttft", 0.0), ("seconds_per_token", -1.0), ("ttft", float("nan"))])
def test_a_service_level_is_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed"):
        ServiceLevel(**{"ttft": 1.0, "seconds_per_token": 1.0, field: value})
