"""The benchmark of presets on workloads, its tables, and the simulator's speed, in small."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks import scheduling, scheduling_report, simulator_accuracy, simulator_speed
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.simulation.machine import load_machine
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.stats import Distribution


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    machine = load_machine("h100-8b")
    cells = [replace(cell, num_requests=25) for cell in scheduling.SIMULATED]
    workloads = scheduling.run_cells(cells, lambda cell, policy: scheduling.simulated(cell, policy, machine), print)
    sizes = {name: getattr(machine, name) for name in ("num_blocks", "block_size", "max_num_seqs")}
    return {
        "machine": machine.about,
        "sizes": {**sizes, "max_num_batched_tokens": machine.max_num_batched_tokens},
        "service_level": asdict(scheduling.SIMULATED_LEVEL),
        "noise": scheduling.SIMULATED_NOISE,
        "workloads": workloads,
    }


def test_every_preset_answers_every_workload(document: dict[str, Any]) -> None:
    assert len(document["workloads"]) == 6
    for workload in document["workloads"]:
        assert [row["policy"] for row in workload["rows"]] == list(POLICIES)
        assert {row["num_finished"] for row in workload["rows"]} == {25}
        assert {row["num_output_tokens"] for row in workload["rows"]} == {workload["num_output_tokens"]}


def test_tables_have_a_row_for_each_preset(document: dict[str, Any]) -> None:
    text = scheduling_report.tables(document)
    for workload in document["workloads"]:
        assert f"**{workload['name'].capitalize()}**: 25 requests" in text
    for policy in POLICIES:
        assert text.count(f"| `{policy}` |") == 6
    assert text.count("`default` loses in") + text.count("`default` is the best") == 6
    assert scheduling_report.summary(document).count("\n| ") == 8  # heading, rule and workloads


def row(policy: str, tokens_per_second: float, goodput: float, seconds: float) -> dict[str, Any]:
    times = asdict(Distribution(1, seconds, seconds, seconds, seconds))
    fields = dict.fromkeys(scheduling_report.TIMES, times)
    return {"policy": policy, "tokens_per_second": tokens_per_second, "goodput": goodput, **fields}


def test_losses_are_named() -> None:
    ours = row("default", 100.0, 10.0, 1.0)
    nothing = scheduling_report.losses([ours, row("orca", 100.9, 10.05, 0.995)], 0.01)
    assert nothing == "`default` is the best, or within 1% of it, in every column."
    found = scheduling_report.losses([ours, row("orca", 120.0, 9.0, 1.0), row("vllm", 90.0, 9.0, 0.5)], 0.01)
    assert found.startswith("`default` loses in tokens/s (`orca`: 120.00, 20% better), TTFT p50 (`vllm`: 0.500 s, 100%")
    assert "goodput" not in found
    assert "tokens/s" not in scheduling_report.losses([ours, row("orca", 120.0, 9.0, 1.0)], 0.2)
    without = {**row("orca", 100.0, 10.0, 1.0), "inter_token_latency": None}
    assert scheduling_report.losses([ours, without], 0.01) == nothing


def test_a_request_that_is_lost_stops_the_benchmark() -> None:
    machine = load_machine("h100-8b")

    def losing(cell: scheduling.Cell, policy: str) -> Any:
        return replace(scheduling.simulated(cell, policy, machine), num_finished=3)

    with pytest.raises(RuntimeError, match="default on low-variance lengths: 3 of 5 requests ended"):
        scheduling.run_cells([replace(scheduling.SIMULATED[0], num_requests=5)], losing, print)


def test_the_speed_benchmark_counts_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    found = simulator_speed.measure(30, with_prefix_caching=False)
    assert found["result"]["num_finished"] == 30
    assert found["cpu_seconds"] > 0

    def short(trace: Any, *arguments: Any, **options: Any) -> None:
        simulate(list(trace)[:-1], *arguments, **options)

    monkeypatch.setattr(simulator_speed, "simulate", short)
    with pytest.raises(RuntimeError, match="29 requests ended"):
        simulator_speed.measure(30, with_prefix_caching=False)


def test_an_error_is_that_of_the_median() -> None:
    machine = load_machine("smollm2-cpu")
    workload = replace(simulator_accuracy.WORKLOADS[0], num_requests=3)
    exact = simulator_accuracy.compare(workload, machine, [defaultdict(lambda: 1.0)])["simulated"]
    rounds = [{name: value * factor for name, value in exact.items()} for factor in (0.5, 1.25, 2.0)]
    found = simulator_accuracy.compare(workload, machine, rounds)
    assert found["relative_errors"]["tokens_per_second"] == pytest.approx(1 / 1.25 - 1)
    assert found["relative_errors"]["latency_p99"] == pytest.approx(1 / 1.25 - 1)
