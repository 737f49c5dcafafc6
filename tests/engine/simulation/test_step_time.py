"""What is in a step, what it costs under each model, and the machines that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.simulation.machine import load_machine, machine_names, parse_machine
from pagedattn.engine.simulation.step_time import Fitted, FixedRate, Roofline, StepWork, locate
from pagedattn.engine.step_plan import ScheduledRequest, StepPlan

FITTED = Fitted(
    seconds_per_seq=0.5,
    seconds_per_sample=0.25,
    seconds_per_context_token=0.125,
    seconds_per_pair=0.0625,
    row_knots=(1, 3, 7),
    seconds_at_knots=(10.0, 30.0, 20.0),
)


def test_work_of_a_plan() -> None:
    request = Request("a", [1] * 9, SamplingParams(), max_num_tokens=20)
    plan = StepPlan.of(
        (
            ScheduledRequest(request, 8, 1, True),  # a decode: 9 keys
            ScheduledRequest(request, 2, 3, False),  # a chunk: 3 + 4 + 5 pairs
        ),
        num_padding_tokens=2,
    )
    expected = StepWork(num_seqs=2, num_rows=6, num_sampled=1, num_context_tokens=14, num_pairs=21)
    assert StepWork.of(plan) == expected


@pytest.mark.parametrize(("num_rows", "seconds"), [(1, 10.0), (2, 20.0), (3, 30.0), (5, 25.0), (7, 20.0), (9, 15.0)])
def test_rows_cost_what_lies_between_the_knots(num_rows: int, seconds: float) -> None:
    assert FITTED.seconds(StepWork(0, num_rows, 0, 0, 0)) == seconds


def test_a_fitted_step_is_a_sum() -> None:
    assert FITTED.seconds(StepWork(2, 3, 4, 8, 16)) == 30.0 + 1.0 + 1.0 + 1.0 + 1.0
    assert FITTED.seconds(StepWork(0, 100, 0, 0, 0)) == 0.0, "a line that falls past the last knot ends at 0"


def test_locate_is_monotone() -> None:
    places = [locate(number, (1, 3, 7)) for number in range(1, 12)]
    assert [index + min(share, 1.0) for index, share in places] == sorted(
        index + min(share, 1.0) for index, share in places
    )
    assert locate(7, (1, 3, 7)) == (1, 1.0)


def test_a_roofline_is_the_longer_of_two_times() -> None:
    model = Roofline(
        overhead_seconds=1.0,
        overhead_seconds_per_seq=0.5,
        weight_bytes=100.0,
        kv_bytes_per_token=2.0,
        flops_per_row=10.0,
        flops_per_sample=5.0,
        flops_per_pair=1.0,
        bytes_per_second=10.0,
        flops_per_second=10.0,
    )
    # Weights 10 s, against rows and samples 1.5 s; keys and values 2 s, against pairs 1 s.
    assert model.seconds(StepWork(1, 1, 1, 10, 10)) == 1.0 + 0.5 + 10.0 + 2.0
    # Rows 20 s; pairs 30 s.
    assert model.seconds(StepWork(1, 20, 0, 10, 300)) == 1.0 + 0.5 + 20.0 + 30.0


def test_a_fixed_rate_is_the_same_for_all() -> None:
    assert (
        FixedRate(40.0).seconds(StepWork(1, 1, 1, 1, 1)) == FixedRate(40.0).seconds(StepWork(9, 9, 9, 9, 9)) == 1 / 40
    )


def test_the_analytic_h100_is_where_physics_puts_it() -> None:
    """One sequence: 15 GB of weights at 2.68 TB/s are 5.6 ms; 8192 rows at 593 TFLOP/s are 0.19 s."""
    machine = load_machine("h100-8b")
    assert machine.step_time.seconds(StepWork(1, 1, 1, 1, 1)) == pytest.approx(0.0056 + 0.001, rel=0.02)
    prefill = machine.step_time.seconds(StepWork(1, 8192, 1, 8192, 8192 * 8193 // 2))
    assert prefill == pytest.approx(8192 * 13.96e9 / 593e12 + 8192**2 / 2 * 524288 / 593e12 + 0.001, rel=0.02)


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_loads_and_says_where_it_is_from(name: str) -> None:
    machine = load_machine(name)
    assert len(machine.about) > 40
    assert machine.step_time.seconds(StepWork(1, 1, 1, 10, 10)) > 0
    larger = machine.step_time.seconds(StepWork(16, 256, 16, 4096, 20_000))
    assert larger >= machine.step_time.seconds(StepWork(1, 1, 1, 10, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "kind='guess' is not known: it must be one of fixed-rate, roofline, fitted"),
        ({"step_time": {"tokens_per_second": 0}}, "tokens_per_second=0 is not allowed: it must be > 0"),
        ({"step_time": {"tokens_per_second": -1}}, "tokens_per_second=-1 is not allowed"),
        ({"step_time": {"tokens": 1}}, "step_time has tokens: allowed are tokens_per_second"),
        ({"step_time": {}}, "missing 1 required positional argument"),
    ],
)
def test_a_bad_machine_says_what_is_wrong(change: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {
        "about": "a test",
        "kind": "fixed-rate",
        "step_time": {"tokens_per_second": 1},
        "num_blocks": 1,
        "block_size": 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 1,
    }
    assert parse_machine("good", good).step_time == FixedRate(1)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**good, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"machine .*bad\.json: .*") as error:
        load_machine(str(path))
    assert message in str(error.value)


def test_a_machine_without_a_size_says_which(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"about": "a test", "kind": "fixed-rate", "step_time": {"tokens_per_second": 1}}')
    with pytest.raises(ValueError, match="'num_blocks' is missing"):
        load_machine(str(path))
    with pytest.raises(ValueError, match=r"machine 'tpu' is not known: it must be a \.json file or one of h100-8b"):
        load_machine("tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_knots": (1, 1, 7)}, "it must be two or more that increase"),
        ({"row_knots": (1,), "seconds_at_knots": (1.0,)}, "it must be two or more that increase"),
        ({"seconds_at_knots": (1.0,)}, "seconds_at_knots has 1 entries"),
        ({"seconds_per_pair": float("nan")}, "seconds_per_pair=nan is not allowed"),
        ({"seconds_at_knots": (1.0, -1.0, 1.0)}, "must be finite numbers >= 0"),
    ],
)
def test_bad_coefficients_are_refused(change: dict[str, object], message: str) -> None:
    from dataclasses import asdict

    with pytest.raises(ValueError, match=message):
        Fitted(**{**asdict(FITTED), **change})
