"""The simulator against the real engine: the same traces, throughput and latencies side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.simulator_accuracy [--rounds 3] [--json OUT]

The machine is the one that ``benchmarks.step_time`` has fitted, on other traces than these. Arrivals make it harder
than it looks: where a queue builds up, a step that is off by a little moves everything behind it. Of the real engine
each figure is the median of the rounds; time is the CPU time of its one thread (``benchmarks.real_engine``).
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
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.llm import LLM
from pagedattn.engine.simulation.machine import Machine, load_machine
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel, SimulationResult
from pagedattn.engine.simulation.router import RoundRobin
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.traces import Lengths, TraceRequest, generate
from pagedattn.engine.weights import LoadedModel, load_model

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


def compare(workload: Workload, loaded: LoadedModel, machine: Machine, num_rounds: int) -> dict[str, Any]:
    """One row: what the simulator says, the rounds of the real engine, and how far off the median is."""
    trace = workload.trace()
    sizes: dict[str, Any] = {
        "num_blocks": workload.num_blocks,
        "block_size": machine.block_size,
        "max_num_seqs": machine.max_num_seqs,
        "max_num_batched_tokens": machine.max_num_batched_tokens,
        "policy": workload.policy,
    }
    recorder = Recorder()
    config = EngineConfig(max_model_len=workload.num_blocks * machine.block_size, **sizes)
    simulate(trace, config, machine.step_time, recorder=recorder, router=RoundRobin())
    simulated = figures(recorder.result(LEVEL))
    rounds = []
    for _ in range(num_rounds):
        recorder = Recorder()
        run_real(LLM(loaded, **sizes), trace, recorder)
        rounds.append(figures(recorder.result(LEVEL)))
    real = {name: statistics.median(one[name] for one in rounds) for name in simulated}
    errors = {
        name: simulated[name] / real[name] - 1
        for name in ("tokens_per_second", "latency_p50", "latency_p99", "ttft_p50", "ttft_p99")
    }
    return {
        "workload": {**asdict(workload), "num_output_tokens": sum(one.num_output_tokens for one in trace)},
        "simulated": simulated,
        "real": real,
        "rounds": rounds,
        "relative_errors": errors,
    }


def benchmark(num_rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    machine = load_machine("smollm2-cpu")
    loaded = load_model("smollm2-135m-instruct", device="cpu")
    about = about_machine(loaded.decoder.device)
    run_real(LLM(loaded, num_blocks=64), WORKLOADS[0].trace()[:1], Recorder())  # memory and threads are there
    rows = []
    for workload in WORKLOADS:
        rows.append(compare(workload, loaded, machine, num_rounds))
        errors = ", ".join(f"{name} {error:+.1%}" for name, error in rows[-1]["relative_errors"].items())
        note(f"{workload.name}: {errors}")
    return {
        "benchmark": "simulator-accuracy",
        **about,
        "model": loaded.name,
        "machine": machine.about,
        "num_rounds": num_rounds,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when throughput or latency is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parsed = parser.parse_args(arguments)
    document = benchmark(parsed.rounds, lambda line: print(line, file=sys.stderr, flush=True))
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
