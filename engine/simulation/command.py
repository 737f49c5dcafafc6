"""``pagedattn simulate``: traces through simulated replicas under several policies, orders and loads, compared."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagedattn._version import __version__
from pagedattn.engine.cli_options import status
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.simulation.machine import Machine, load_machine
from pagedattn.engine.simulation.plots import (
    Simulated,
    draw_blocks,
    draw_gantt,
    draw_latency_against_load,
    draw_service,
)
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel, SimulationResult
from pagedattn.engine.simulation.router import make_router
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.trace_files import read_trace
from pagedattn.engine.simulation.traces import TraceRequest, at_load, generate
from pagedattn.engine.stats import Distribution
from pagedattn.engine.timeline import require_matplotlib

DEFAULT_NUM_REQUESTS = 1000
NUM_SAMPLES = 400  # of each replica, over the time in which requests arrive
NUM_DRAWN_STEPS = 200
MAX_PANELS = 6
SIZES = ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
UNLIMITED = 1 << 30


def run_simulate(arguments: argparse.Namespace) -> int:
    policies, orders, loads = _names(arguments.policy), _names(arguments.order), _loads(arguments.load)
    level = ServiceLevel(arguments.ttft_slo, arguments.token_slo)
    make_router(arguments.router)
    machine = load_machine(arguments.machine)
    given = {name: value for name in SIZES if (value := getattr(arguments, name)) is not None}
    sizes = {**{name: getattr(machine, name) for name in SIZES}, **given}
    configs = {
        policy if len(orders) == 1 else f"{policy}, {order}": EngineConfig(
            max_model_len=UNLIMITED, policy=policy, order=order, **sizes
        )
        for policy in policies
        for order in orders
    }
    trace = _trace(arguments)
    if arguments.replicas < 1:
        raise ValueError(f"--replicas {arguments.replicas} is not allowed: it must be >= 1")
    if arguments.output_dir is not None:
        require_matplotlib()
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    runs = []
    for load in loads:
        loaded_trace = at_load(trace, load)
        for name, config in configs.items():
            runs.append(_run(name, load, loaded_trace, config, machine, level, arguments))
    document = as_document(arguments, machine, sizes, trace, runs)
    if arguments.output_dir is not None:
        _write(Path(arguments.output_dir), document, runs)
    print(json.dumps(document, indent=1) if arguments.json else report(machine, runs))
    return 0


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--load {text} is not allowed: it must be numbers with commas between them") from None
    if not all(math.isfinite(load) and load > 0 for load in loads):
        raise ValueError(f"--load {text} is not allowed: each must be a finite number > 0")
    return loads


def _trace(arguments: argparse.Namespace) -> list[TraceRequest]:
    if arguments.trace is None:
        return generate(
            arguments.workload,
            DEFAULT_NUM_REQUESTS if arguments.num_requests is None else arguments.num_requests,
            arrivals=arguments.arrivals,
            rate=arguments.rate,
            burstiness=arguments.burstiness,
            seed=arguments.seed,
            max_tokens="exact" if arguments.exact_max_tokens else arguments.max_tokens,
        )
    found = read_trace(Path(arguments.trace), limit=arguments.num_requests, max_tokens=arguments.max_tokens)
    skipped = f", {found.num_skipped} without a prompt or an answer left out" if found.num_skipped else ""
    status(f"{arguments.trace}: {found.format} format, {len(found.requests)} requests{skipped}")
    return found.requests


def _run(
    name: str,
    load: float,
    trace: Sequence[TraceRequest],
    config: EngineConfig,
    machine: Machine,
    level: ServiceLevel,
    arguments: argparse.Namespace,
) -> Simulated:
    status(f"{name}, load {load:g}: {len(trace)} requests over {trace[-1].arrival_time:.0f} s")
    recorder = Recorder()
    if arguments.output_dir is not None:
        interval = trace[-1].arrival_time / NUM_SAMPLES
        recorder = Recorder(sample_seconds=interval, max_step_records=NUM_DRAWN_STEPS)
    router = make_router(arguments.router)
    simulate(trace, config, machine.step_time, recorder=recorder, router=router, num_replicas=arguments.replicas)
    return Simulated(
        name, load, config.num_blocks, config.block_size, config.max_num_seqs, recorder, recorder.result(level)
    )


def _write(folder: Path, document: dict[str, Any], runs: Sequence[Simulated]) -> None:
    """The results, and a picture of each kind; those over time are of the last load."""
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shown = [run for run in runs if run.load == runs[-1].load and run.recorder.steps][:MAX_PANELS]
    if len({run.load for run in runs}) > 1:
        draw_latency_against_load(runs, folder / "latency.png")
    if shown:
        draw_gantt(shown, folder / "slots.png")
        draw_blocks(shown, folder / "blocks.png")
        draw_service(shown, folder / "service.png")
    status(f"results and pictures: {folder}")


def as_document(
    arguments: argparse.Namespace,
    machine: Machine,
    sizes: dict[str, int],
    trace: Sequence[TraceRequest],
    runs: Sequence[Simulated],
) -> dict[str, Any]:
    """The results as plain data: what was simulated on what, and every run's figures."""
    return {
        "pagedattn": __version__,
        "machine": {"name": machine.name, "about": machine.about, **sizes},
        "trace": {
            "source": arguments.trace or f"{arguments.workload}, {arguments.arrivals} arrivals",
            "seed": None if arguments.trace else arguments.seed,
            "num_requests": len(trace),
            "num_prompt_tokens": sum(request.num_prompt_tokens for request in trace),
            "num_output_tokens": sum(request.num_output_tokens for request in trace),
            "seconds": trace[-1].arrival_time,
        },
        "order": arguments.order,
        "num_replicas": arguments.replicas,
        "router": arguments.router,
        "service_level": {"ttft": arguments.ttft_slo, "seconds_per_token": arguments.token_slo},
        "runs": [{"name": run.name, "load": run.load, **dataclasses.asdict(run.result)} for run in runs],
    }


HEADINGS = (
    "tokens/s",
    "goodput/s",
    "TTFT p50",
    "p99",
    "token p50",
    "p99",
    "latency p50",
    "p99",
    "slots",
    "KV",
    "preempted",
)


def cells(result: SimulationResult) -> list[str]:
    """A run in the columns of ``HEADINGS``; times in seconds."""

    def times(of: Distribution | None, digits: int) -> list[str]:
        return ["-", "-"] if of is None else [f"{of.p50:.{digits}f}", f"{of.p99:.{digits}f}"]

    return [
        f"{result.tokens_per_second:.0f}",
        f"{result.goodput:.2f}",
        *times(result.ttft, 2),
        *times(result.inter_token_latency, 3),
        *times(result.latency, 2),
        f"{result.slot_utilization:.0%}",
        f"{result.kv_usage:.0%}",
        str(result.num_preemptions),
    ]


def report(machine: Machine, runs: Sequence[Simulated]) -> str:
    """A table for the terminal."""
    names = [f"{run.name} at {run.load:g}" for run in runs]
    width = max(map(len, names))
    lines = [f"{machine.name}: {machine.about}", "", f"{'':<{width}}" + "".join(f"{head:>12}" for head in HEADINGS)]
    for name, run in zip(names, runs, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells(run.result)))
        if run.result.num_rejected:
            lines.append(f"{'':<{width}}  {run.result.num_rejected} requests rejected: they can never fit")
    return "\n".join(lines)
