"""The fit of the simulator's step-time model, and the real engine driven by a trace."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.real_engine import TimedStep, WorkClock, run_real
from benchmarks.step_time import ROW_KNOTS, errors, fit, non_negative_least_squares
from pagedattn.engine.llm import LLM
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel
from pagedattn.engine.simulation.step_time import Fitted, StepWork
from pagedattn.engine.simulation.traces import TraceRequest

TRUE = Fitted(5e-4, 1e-4, 2e-5, 1e-6, ROW_KNOTS, tuple(0.05 + 0.002 * knot + 0.01 * (knot == 3) for knot in ROW_KNOTS))


def works() -> list[StepWork]:
    random = np.random.default_rng(0)
    found = []
    for rows in [*ROW_KNOTS, *random.integers(1, 300, 200).tolist()]:
        seqs = int(random.integers(1, min(rows, 16) + 1))
        context = rows + int(random.integers(0, 4000))
        found.append(
            StepWork(seqs, rows, int(random.integers(0, seqs + 1)), context, rows * int(random.integers(1, 900)))
        )
    return found


def test_a_fit_finds_the_coefficients_behind_the_times() -> None:
    steps = [TimedStep(work, TRUE.seconds(work)) for work in works()]
    found = fit(steps)
    for name, value in asdict(TRUE).items():
        assert asdict(found)[name] == pytest.approx(value, rel=1e-3), name
    assert errors(found, steps)["p95_relative"] < 1e-6


def test_an_error_is_reported_as_it_is() -> None:
    steps = [TimedStep(work, TRUE.seconds(work) * (1.1 if index % 2 else 0.9)) for index, work in enumerate(works())]
    found = errors(TRUE, steps)
    assert found["median_relative"] == pytest.approx(0.1, abs=0.015)
    assert abs(found["total_relative"]) < 0.05
    assert found["num_steps"] == len(steps)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(3, 30), num_columns=st.integers(1, 8))
def test_least_squares_meets_the_conditions_of_an_optimum(seed: int, num_rows: int, num_columns: int) -> None:
    """Karush-Kuhn-Tucker: no coefficient below 0, no gradient that more of a coefficient would follow."""
    random = np.random.default_rng(seed)
    matrix, target = random.normal(size=(num_rows, num_columns)), random.normal(size=num_rows)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert gradient.max() < 1e-7
    assert abs(gradient @ x) < 1e-7


def test_columns_without_any_value_get_nothing() -> None:
    matrix = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert non_negative_least_squares(matrix, np.array([2.0, 4.0])).tolist() == pytest.approx([2.0, 0.0])


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("policy", ["default", "static"])
def test_the_real_engine_ends_each_answer_where_the_trace_says(policy: str) -> None:
    llm = LLM("random", device="cpu", policy=policy, max_num_seqs=3, num_blocks=64, max_model_len=256)
    trace = [TraceRequest(at, 5 + at, 1 + at * 2, 40) for at in range(6)]
    recorder = Recorder()
    steps = run_real(llm, trace, recorder)
    result = recorder.result(ServiceLevel(1e9, 1e9))
    assert list(recorder.num_output_tokens) == [one.num_output_tokens for one in trace]
    assert result.num_finished == len(trace)
    assert result.seconds > 5.0, "the time in which nobody asked is in it"
    assert sum(step.seconds for step in steps) < result.seconds
    assert sum(step.work.num_sampled for step in steps) == sum(one.num_output_tokens for one in trace)
    assert not llm.engine.has_unfinished
    llm.engine.check_integrity()
    assert llm.engine.block_manager.num_used == 0


def test_a_clock_of_work_skips_and_never_goes_back() -> None:
    clock = WorkClock()
    clock.skip_to(100.0)
    now = clock()
    assert 100.0 <= now < 101.0
    clock.skip_to(50.0)
    assert clock() >= now
