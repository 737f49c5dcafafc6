"""Batching presets on workloads: throughput, goodput, latencies, use of slots and memory, in one table.

    python -m benchmarks.scheduling [--json OUT]             simulated: an 8B model on an H100, analytic step times
    OMP_NUM_THREADS=1 python -m benchmarks.scheduling --real [--json OUT]     measured: SmolLM2 on one CPU thread

All presets get the same requests at the same times, the same blocks, batch size and token budget; queues are first
come, first served. Clients allow more tokens than they get (the workload's ``max_tokens``), as they do: presets that
reserve for all of them pay for it. What bounds them all: a decode step reads the weights once, so tokens per second
grow with the sequences in a batch, which memory and arrivals limit; a prompt's rows take time from everybody else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import about_machine
from benchmarks.real_engine import run_real
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.llm import LLM
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.simulation.machine import Machine, load_machine
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel, SimulationResult
from pagedattn.engine.simulation.router import RoundRobin
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.traces import WORKLOADS, Lengths, TraceRequest, generate
from pagedattn.engine.weights import load_model

UNLIMITED = 1 << 30
SEED = 3


@dataclass(frozen=True)
class Cell:
    """A workload as it is run: its lengths, how many requests, and how fast they come."""

    name: str
    lengths: Lengths
    num_requests: int
    rate: float
    arrivals: str = "poisson"

    def trace(self) -> list[TraceRequest]:
        return generate(self.lengths, self.num_requests, arrivals=self.arrivals, rate=self.rate, seed=SEED)


# At these rates dozens to hundreds run and "default" hardly waits; over-saturation is what nobody keeps up with.
SIMULATED = (
    Cell("low-variance lengths", WORKLOADS["low-variance"], 3000, 110.0),
    Cell("exponential lengths", WORKLOADS["exp"], 3000, 105.0),
    Cell("heavy-tailed lengths", WORKLOADS["heavy-tailed"], 3000, 30.0),
    Cell("shared prefixes", WORKLOADS["shared-prefix"], 2000, 42.0),
    Cell("long prompts, short answers", WORKLOADS["long-prompt"], 600, 3.5),
    Cell("over-saturation, heavy-tailed", WORKLOADS["heavy-tailed"], 3000, 70.0),
)
SIMULATED_LEVEL = ServiceLevel(ttft=2.0, seconds_per_token=0.05)
# The same in small: prompts and answers that one CPU thread gets through, and as little memory.
REAL = (
    Cell("low-variance lengths", Lengths((16, 96), 16.0, "uniform", 96), 12, 2.0),
    Cell("exponential lengths", Lengths((16, 96), 16.0, "exponential", 96), 12, 2.0),
    Cell("heavy-tailed lengths", Lengths((16, 128), 16.0, "lognormal", 192), 12, 1.5),
    Cell("shared prefixes", Lengths((8, 32), 12.0, "exponential", 64, num_prefixes=2, shared_chunks=1), 10, 1.0),
    Cell("long prompts, short answers", Lengths((256, 512), 4.0, "exponential", 32), 8, 0.6),
    Cell("over-saturation, heavy-tailed", Lengths((16, 128), 16.0, "lognormal", 192), 16, 8.0),
)
REAL_LEVEL = ServiceLevel(ttft=4.0, seconds_per_token=0.4)
REAL_NUM_BLOCKS = 96
# Smaller differences are not called a loss: simulated runs repeat exactly, measured ones do not.
SIMULATED_NOISE, REAL_NOISE = 0.01, 0.1
TEXTBOOK_BATCHES = (8, 32, 128)


def simulated(cell: Cell, policy: str, machine: Machine) -> SimulationResult:
    config = EngineConfig(
        num_blocks=machine.num_blocks,
        max_model_len=UNLIMITED,
        block_size=machine.block_size,
        max_num_seqs=machine.max_num_seqs,
        max_num_batched_tokens=machine.max_num_batched_tokens,
        policy=policy,
    )
    recorder = Recorder()
    simulate(cell.trace(), config, machine.step_time, recorder=recorder, router=RoundRobin())
    return recorder.result(SIMULATED_LEVEL)


def run_cells(
    cells: Sequence[Cell], run: Callable[[Cell, str], SimulationResult], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every preset on every workload."""
    found = []
    for cell in cells:
        trace = cell.trace()
        start = time.monotonic()
        rows = []
        for policy in POLICIES:
            result = run(cell, policy)
            if result.num_finished + result.num_rejected != len(trace):
                raise RuntimeError(f"{policy} on {cell.name}: {result.num_finished} of {len(trace)} requests ended")
            rows.append({"policy": policy, **asdict(result)})
        note(f"{cell.name}: {len(rows)} presets, {time.monotonic() - start:.0f} s")
        about = {
            "num_prompt_tokens": sum(request.num_prompt_tokens for request in trace),
            "num_output_tokens": sum(request.num_output_tokens for request in trace),
        }
        found.append({**asdict(cell), **about, "rows": rows})
    return found


def textbook() -> list[dict[str, float]]:
    """Static against continuous batching when a step takes the same time whatever is in it, all requests there."""
    machine = load_machine("textbook")
    rows = []
    for batch_size in TEXTBOOK_BATCHES:
        trace = generate("exp", 50 * batch_size, arrivals="at-once", max_tokens="exact", seed=SEED)
        trace = [replace(request, num_prompt_tokens=1) for request in trace]
        rates = {}
        for policy in ("static", "default"):
            recorder = Recorder(usage_every=1000)
            config = EngineConfig(machine.num_blocks, UNLIMITED, machine.block_size, batch_size, 1 << 20, policy=policy)
            simulate(trace, config, machine.step_time, recorder=recorder, router=RoundRobin())
            rates[policy] = recorder.result(SIMULATED_LEVEL).tokens_per_second
        harmonic = sum(1 / number for number in range(1, batch_size + 1))
        ratio = rates["default"] / rates["static"]
        rows.append({"batch_size": batch_size, **rates, "ratio": ratio, "harmonic_number": harmonic})
    return rows


def benchmark_simulated(note: Callable[[str], None]) -> dict[str, Any]:
    machine = load_machine("h100-8b")
    rows = run_cells(SIMULATED, lambda cell, policy: simulated(cell, policy, machine), note)
    return {
        "benchmark": "scheduling",
        "machine": machine.about,
        "sizes": {
            name: getattr(machine, name)
            for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
        },
        "service_level": asdict(SIMULATED_LEVEL),
        "noise": SIMULATED_NOISE,
        "workloads": rows,
        "textbook": textbook(),
    }


def benchmark_real(note: Callable[[str], None]) -> dict[str, Any]:
    loaded = load_model("smollm2-135m-instruct", device="cpu")
    about = about_machine(torch.device("cpu"))
    sizes: dict[str, Any] = {
        "num_blocks": REAL_NUM_BLOCKS,
        "block_size": 16,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
    }

    def run(cell: Cell, policy: str) -> SimulationResult:
        recorder = Recorder()
        run_real(LLM(loaded, policy=policy, async_scheduling=False, **sizes), cell.trace(), recorder)
        return recorder.result(REAL_LEVEL)

    run(replace(REAL[0], num_requests=1), "default")  # memory and threads are there
    return {
        "benchmark": "scheduling",
        **about,
        "machine": f"{loaded.name} in float32 on one thread of {about['device']}, CPU time, {about['date']}.",
        "sizes": sizes,
        "service_level": asdict(REAL_LEVEL),
        "noise": REAL_NOISE,
        "workloads": run_cells(REAL, run, note),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="run the engine on this CPU instead of the simulator")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parsed = parser.parse_args(arguments)
    benchmark = benchmark_real if parsed.real else benchmark_simulated
    document = benchmark(lambda line: print(line, file=sys.stderr, flush=True))
    if parsed.json:
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
