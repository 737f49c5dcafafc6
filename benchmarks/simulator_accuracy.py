"""The simulator against the real engine: the same traces, throughput and latencies side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.simulator_accuracy [--rounds 3] [--json OUT] [--machine-output OUT]

The step times are fitted in the same session as ``benchmarks.step_time`` does it, on other traces than these, in turn
with them: so a machine that is slower today than it was is no error of the simulator. Arrivals make it harder than
it looks: where a queue builds up, a step that is off by a little moves everything behind it. Of the real engine each
figure is the median of the rounds; time is the CPU time of its one thread (``benchmarks.real_engine``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import about_machine
from benchmarks.real_engine import run_real
from benchmarks.step_time import as_document as step_time_document
from benchmarks.step_time import measure_once
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.llm import LLM
from pagedattn.engine.simulation.machine import Machine, load_machine, parse_machine
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel, SimulationResult
from pagedattn.engine.simulation.router import RoundRobin
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.traces import Lengths, TraceRequest, generate
from pagedattn.engine.weights import load_model

LEVEL = ServiceLevel(ttft=2.0, seconds_per_token=0.25)
TOLERANCE = 0.1


@dataclass(frozen=True)
class Workload:
    """``num_blocks``: of the KV cache; few of them bring preemptions about."""

    name: str
    lengths: Lengths
    num_requests: int
    arrivals: str
    rate: float
    num_blocks: int = 1024
    policy: str = "default"

    def trace(self) -> list[TraceRequest]:
        return generate(self.lengths, self.num_requests, arrivals=self.arrivals, rate=self.rate, seed=17)


WORKLOADS = (
    Workload("exponential answers, Poisson", Lengths((16, 256), 32.0, "exponential", 128), 40, "poisson", 0.9),
    Workload("long prompts, bursty", Lengths((256, 1024), 12.0, "exponential", 64), 24, "bursty", 0.2),
    Workload(
        "heavy-tailed answers at once, little memory",
        Lengths((16, 128), 32.0, "lognormal", 256),
        32,
        "at-once",
        1.0,
        num_blocks=48,
        policy="vllm",
    ),
)


def figures(result: SimulationResult) -> dict[str, float]:
    assert result.latency is not None
    assert result.ttft is not None
    return {
        "tokens_per_second": result.tokens_per_second,
        "latency_p50": result.latency.p50,
        "latency_p99": result.latency.p99,
        "ttft_p50": result.ttft.p50,
        "ttft_p99": result.ttft.p99,
        "num_preemptions": result.num_preemptions,
        "num_steps": result.num_steps,
    }


def config_of(workload: Workload, machine: Machine) -> dict[str, Any]:
    return {
        "num_blocks": workload.num_blocks,
        "block_size": machine.block_size,
        "max_num_seqs": machine.max_num_seqs,
        "max_num_batched_tokens": machine.max_num_batched_tokens,
        "policy": workload.policy,
    }


def compare(workload: Workload, machine: Machine, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One row: what the simulator says, the rounds of the real engine, and how far off their median it is."""
    trace = workload.trace()
    recorder = Recorder()
    config = EngineConfig(max_model_len=workload.num_blocks * machine.block_size, **config_of(workload, machine))
    simulate(trace, config, machine.step_time, recorder=recorder, router=RoundRobin())
    simulated = figures(recorder.result(LEVEL))
    real = {name: statistics.median(one[name] for one in rounds) for name in simulated}
    errors = {
        name: simulated[name] / real[name] - 1
        for name in ("tokens_per_second", "latency_p50", "latency_p99", "ttft_p50", "ttft_p99")
    }
    return {
        "workload": {**asdict(workload), "num_output_tokens": sum(one.num_output_tokens for one in trace)},
        "simulated": simulated,
        "real": real,
        "rounds": list(rounds),
        "relative_errors": errors,
    }


def benchmark(num_rounds: int, note: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results, and the machine that was fitted for them."""
    loaded = load_model("smollm2-135m-instruct", device="cpu")
    about = about_machine(loaded.decoder.device)
    sizes = load_machine("smollm2-cpu")
    run_real(
        LLM(loaded, num_blocks=64, async_scheduling=False), WORKLOADS[0].trace()[:1], Recorder()
    )  # memory and threads are there
    calibration = []
    rounds: list[list[dict[str, float]]] = [[] for _ in WORKLOADS]
    for number in range(num_rounds):
        calibration.append(measure_once(loaded))
        for workload, done in zip(WORKLOADS, rounds, strict=True):
            recorder = Recorder()
            run_real(LLM(loaded, async_scheduling=False, **config_of(workload, sizes)), workload.trace(), recorder)
            done.append(figures(recorder.result(LEVEL)))
        note(f"round {number + 1} of {num_rounds}")
    fitted = step_time_document(calibration, loaded)
    machine = parse_machine("smollm2-cpu", fitted)
    rows = [compare(workload, machine, done) for workload, done in zip(WORKLOADS, rounds, strict=True)]
    for row in rows:
        errors = ", ".join(f"{name} {error:+.1%}" for name, error in row["relative_errors"].items())
        note(f"{row['workload']['name']}: {errors}")
    document = {
        "benchmark": "simulator-accuracy",
        **about,
        "model": loaded.name,
        "machine": machine.about,
        "num_rounds": num_rounds,
        "rows": rows,
    }
    return document, fitted


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when throughput or latency is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--machine-output", type=Path, help="also write the machine that was fitted to this file")
    parsed = parser.parse_args(arguments)
    document, fitted = benchmark(parsed.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    if parsed.machine_output:
        parsed.machine_output.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    if parsed.json:
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    off = [
        f"{row['workload']['name']}: {name} is off by {row['relative_errors'][name]:+.1%}"
        for row in document["rows"]
        for name in ("tokens_per_second", "latency_p50", "latency_p99")
        if abs(row["relative_errors"][name]) > TOLERANCE
    ]
    for line in off:
        print(f"benchmarks.simulator_accuracy: {line}", file=sys.stderr)
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
