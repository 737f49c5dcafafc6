"""Tokens per second of whole engines on one trace: ours, its static baseline, and transformers' two ways to generate.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.engine --device cpu [--json OUT]
    python -m benchmarks.engine --device cuda --trace uniform,exp --model 135m,8b    # benchmarks/throughput.py

What bounds it: a decode step reads every weight once, whatever the batch (SmolLM2 in fp32: 538 MB), and its sequences'
keys and values (46 KB a token); a CPU adds 0.27 GFLOP for each row. So rows are cheap until the arithmetic takes as
long as the read, and tokens per second follow the rows that are *wanted*. A padded batch of B runs until its longest
request ends: for exponential lengths it computes E[max] / mean = H_B times the wanted rows (2.7 at 8, 4.1 at 32), and
less when sorted by length. Continuous batching computes none of these, but ends with a tail in which few requests are
left; no system on this trace can be faster than the longest request alone.

All systems share one copy of the weights, the process and its threads, and are run in turn (A B C D, A B C D, ...).
Baselines whose batch size matters are first tried with several, on the same requests with shorter outputs, and are
measured with their best and with ours. Greedy tokens must agree: where two systems part, transformers' logits at that
position must be a tie within rounding, or the benchmark exits with status 1 and reports nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import throughput
from benchmarks.systems import ContinuousGenerate, PaddedGenerate, Paged, Run, System, as_transformers
from benchmarks.traces import Trace, digest, make_trace
from pagedattn.engine.llm import DEFAULT_BATCHED_TOKENS
from pagedattn.engine.model_store import ModelStoreError
from pagedattn.engine.stats import Distribution
from pagedattn.engine.weights import LoadedModel, load_model

DEFAULT_MODELS = {"cpu": "smollm2-135m-instruct", "cuda": "random-135m"}
# Two tokens whose logits are this close are a tie: the sums behind them were rounded in another order.
TIE_LOGITS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class DifferentTokensError(RuntimeError):
    """A system's greedy tokens are wrong."""


@dataclass(frozen=True)
class Tie:
    """Where a request's tokens part from ours, and how far apart the two tokens' logits are in transformers."""

    system: str
    request: int
    position: int
    logit_gap: float


@dataclass(frozen=True)
class Result:
    """A system's rounds. ``num_same``: requests whose tokens are ours in every round."""

    system: System
    rounds: list[Run]
    num_same: int

    @property
    def median(self) -> Run:
        """The round of median duration (of an even number, the slower of the two)."""
        return sorted(self.rounds, key=lambda run: run.seconds)[len(self.rounds) // 2]

    def rates(self, num_tokens: int) -> list[float]:
        return [num_tokens / run.seconds for run in self.rounds]


def shortened(trace: Trace, scale: float) -> Trace:
    """The same requests with outputs of ``scale`` times the length, at least one token."""
    return [(prompt, max(1, round(length * scale))) for prompt, length in trace]


def make_systems(
    loaded: LoadedModel, model: Any, trace: Trace, batch_size: int, batch_sizes: Sequence[int]
) -> tuple[list[list[System]], list[System]]:
    """Groups of which the best member is looked for, one batch size each; and the systems without a choice."""
    tokens = DEFAULT_BATCHED_TOKENS["cuda" if loaded.decoder.device.type == "cuda" else "cpu"]
    groups: list[list[System]] = [
        [Paged(loaded, "static", size, trace) for size in batch_sizes],
        [PaddedGenerate(model, "in order of arrival", size) for size in batch_sizes],
        [PaddedGenerate(model, "sorted by length", size) for size in batch_sizes],
    ]
    return groups, [Paged(loaded, "default", batch_size, trace), ContinuousGenerate(model, batch_size, trace, tokens)]


def choose(
    groups: Sequence[Sequence[System]], trace: Trace, batch_size: int, note: Callable[[str], None]
) -> tuple[list[System], list[dict[str, Any]]]:
    """Of each group the member that is fastest on ``trace`` and the one with our batch size; and what each took."""
    chosen: list[System] = []
    trials = []
    for group in groups:
        seconds = {}
        for system in group:
            seconds[system] = system.run(trace).seconds
            note(f"trial: {_label(system)}: {seconds[system]:.1f} s")
            trials.append({"system": system.name, "batch_size": system.batch_size, "seconds": seconds[system]})
        best = min(seconds, key=lambda system: seconds[system])
        chosen += [system for system in group if system is best or system.batch_size == batch_size]
    return chosen, trials


def measure(
    systems: Sequence[System], trace: Trace, num_rounds: int, note: Callable[[str], None]
) -> tuple[dict[System, list[Run]], dict[System, str]]:
    """``num_rounds`` runs of every system, interleaved; a system that raises is left out, with the reason."""
    runs: dict[System, list[Run]] = {system: [] for system in systems}
    failures: dict[System, str] = {}
    num_tokens = sum(length for _, length in trace)
    for number in range(num_rounds):
        for system in systems:
            if system in failures:
                continue
            try:
                run = system.run(trace)
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                if isinstance(system, Paged):
                    raise
                failures[system] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                note(f"round {number + 1}: {_label(system)}: {failures[system]}")
                continue
            runs[system].append(run)
            note(f"round {number + 1}: {_label(system)}: {run.seconds:.1f} s, {num_tokens / run.seconds:.1f} tokens/s")
    return {system: done for system, done in runs.items() if system not in failures}, failures


def compare_tokens(
    trace: Trace,
    runs: dict[System, list[Run]],
    ours: list[list[int]],
    logits_after: Callable[[list[int]], torch.Tensor],
) -> tuple[list[Result], list[Tie]]:
    """Hold every run's tokens against ``ours``. ``logits_after``: transformers' logits that follow some tokens.

    Raises DifferentTokensError when a request has too few tokens, or parts from ours other than at a tie.
    """
    results, ties = [], []
    known: dict[tuple[int, int, frozenset[int]], float] = {}
    for system, done in runs.items():
        different: set[int] = set()
        for run in done:
            for index, ((prompt, length), theirs) in enumerate(zip(trace, run.tokens, strict=True)):
                if len(theirs) != length:
                    raise DifferentTokensError(f"{system.name}: request {index} has {len(theirs)} tokens, not {length}")
                position = next((i for i in range(length) if theirs[i] != ours[index][i]), None)
                if position is None:
                    continue
                pair = (theirs[position], ours[index][position])
                key = (index, position, frozenset(pair))
                if key not in known:
                    known[key] = _behind_best(logits_after(prompt + ours[index][:position]), pair)
                if index not in different:
                    ties.append(Tie(_label(system), index, position, known[key]))
                different.add(index)
        results.append(Result(system, done, len(trace) - len(different)))
    return results, ties


def _behind_best(logits: torch.Tensor, pair: tuple[int, int]) -> float:
    """How far the worse of two tokens is behind the best one. Raises DifferentTokensError when that is no tie."""
    gap = float(logits.float().max() - logits.float()[list(pair)].min())
    if gap > TIE_LOGITS[logits.dtype]:
        raise DifferentTokensError(
            f"greedy tokens {pair[0]} and {pair[1]} differ and are no tie: one is {gap:.2e} behind the best logit, and "
            f"{TIE_LOGITS[logits.dtype]:.0e} are allowed in {logits.dtype}"
        )
    return gap


def as_document(
    results: Sequence[Result], failures: dict[System, str], ties: Sequence[Tie], trace: Trace, about: dict[str, Any]
) -> dict[str, Any]:
    """The results as plain data; ``ratio`` is our median rate over the system's."""
    num_tokens = sum(length for _, length in trace)
    (ours,) = [result for result in results if isinstance(result.system, Paged) and "default" in result.system.name]
    our_rate = statistics.median(ours.rates(num_tokens))
    rows: list[dict[str, Any]] = []
    for result in results:
        rates, run = result.rates(num_tokens), result.median
        latency = Distribution.of(run.latencies)
        assert latency is not None, "a trace has requests"
        rows.append(
            {
                "system": result.system.name,
                "batch_size": result.system.batch_size,
                "tokens_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
                "seconds": statistics.median(run.seconds for run in result.rounds),
                "ratio": our_rate / statistics.median(rates),
                "latency_seconds": {name: getattr(latency, name) for name in ("mean", "p50", "p95", "p99")},
                "slot_utilization": run.slot_utilization,
                "kv_utilization": run.kv_utilization,
                "num_same_tokens": result.num_same,
                "rounds": [{"seconds": run.seconds, "latencies": run.latencies} for run in result.rounds],
            }
        )
    for system, reason in failures.items():
        rows.append({"system": system.name, "batch_size": system.batch_size, "failure": reason})
    return {"benchmark": "engine", **about, "systems": rows, "ties": [asdict(tie) for tie in ties]}


def about_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("pagedattn", "torch", "triton", "transformers", "numpy")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load_average_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str | None:
    if package == "pagedattn":
        from pagedattn import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _label(system: System) -> str:
    return f"{system.name}, batch {system.batch_size}"


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, for a terminal and for Markdown."""
    headings = ["system", "batch", "tokens/s (min-max)", "wall, s", "ours is", "latency mean / p50 / p95 / p99, s"]
    headings += ["slots used", "KV used", "same tokens"]
    rows = []
    for row in document["systems"]:
        cells = [row["system"], str(row["batch_size"])]
        if "failure" in row:
            rows.append([*cells, "-", "-", "-", "-", "-", "-", row["failure"]])
            continue
        rate, latency = row["tokens_per_second"], row["latency_seconds"]
        cells += [f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})", f"{row['seconds']:.1f}"]
        cells += [f"{row['ratio']:.2f}x", " / ".join(f"{latency[name]:.1f}" for name in latency)]
        cells += ["-" if row[name] is None else f"{row[name]:.0%}" for name in ("slot_utilization", "kv_utilization")]
        rows.append([*cells, f"{row['num_same_tokens']} of {document['trace']['num_requests']}"])
    return headings, rows


def print_table(document: dict[str, Any]) -> None:
    """With rich where it is installed."""
    headings, rows = table(document)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in (headings, *rows):
            print(" | ".join(row))
    else:
        grid = Table(*headings)
        for row in rows:
            grid.add_row(*row)
        console = Console()
        # A file or a pipe has no width, for which rich takes 80 columns.
        console.print(grid, width=None if console.is_terminal else 1000, soft_wrap=not console.is_terminal)
    for tie in document["ties"]:
        print("{system}: request {request} parts at token {position}, a tie: {logit_gap:.1e}".format(**tie))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--model",
        help="default: smollm2-135m-instruct on cpu, random-135m on cuda; a plain Llama. With --trace: 135m,8b",
    )
    parser.add_argument("--dtype", default="auto", help="auto: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--num-requests", type=int, help="default: 32; with --trace 256")
    parser.add_argument(
        "--trace",
        help="uniform, exp or both with a comma: output tokens per second on a GPU (benchmarks/throughput.py)",
    )
    parser.add_argument("--workload", choices=("exp", "uniform"), default="exp")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--output-scale", type=float, default=1.0, help="multiplies every output length (default: 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=32, help="our batch size")
    parser.add_argument("--batch-sizes", default="4,8,16,32", help="tried for the baselines (default: 4,8,16,32)")
    parser.add_argument(
        "--trial-scale", type=float, default=0.25, help="output lengths of those trials (default: 0.25)"
    )
    parser.add_argument("--json", type=Path, help="also write the results, every round of them, to this file")
    parsed = parser.parse_args(arguments)
    if parsed.num_requests is None:
        parsed.num_requests = 32 if parsed.trace is None else 256
    return parsed


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the document. Raises DifferentTokensError."""

    def note(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    device = torch.device(arguments.device)
    about = about_machine(device)
    loaded = load_model(arguments.model or DEFAULT_MODELS[device.type], arguments.dtype, device)
    model = as_transformers(loaded)
    vocab_size = loaded.config.vocab_size
    trace = make_trace(arguments.workload, arguments.num_requests, vocab_size, arguments.seed)
    full_digest, trace = digest(trace), shortened(trace, arguments.output_scale)
    batch_sizes = sorted({*map(int, arguments.batch_sizes.split(",")), arguments.max_num_seqs})
    groups, systems = make_systems(loaded, model, trace, arguments.max_num_seqs, batch_sizes)
    for system in (*systems, groups[1][0]):  # memory, threads and kernels are there before any clock starts
        measure([system], shortened(trace[:4], 4 / max(length for _, length in trace)), 1, lambda _: None)
    chosen, trials = choose(groups, shortened(trace, arguments.trial_scale), arguments.max_num_seqs, note)
    runs, failures = measure([systems[0], *chosen, systems[1]], trace, arguments.rounds, note)

    @torch.inference_mode()
    def logits_after(token_ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([token_ids], device=device)).logits[0, -1]
        return logits

    results, ties = compare_tokens(trace, runs, runs[systems[0]][0].tokens, logits_after)
    lengths = np.array([length for _, length in trace])
    about |= {
        "model": loaded.name,
        "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
        "trace": {
            "workload": arguments.workload,
            "seed": arguments.seed,
            "digest": full_digest,
            "output_scale": arguments.output_scale,
            "num_requests": len(trace),
            "num_prompt_tokens": sum(len(prompt) for prompt, _ in trace),
            "num_output_tokens": int(lengths.sum()),
            "longest_output": int(lengths.max()),
        },
        "num_rounds": arguments.rounds,
        "trials": {"output_scale": arguments.output_scale * arguments.trial_scale, "runs": trials},
    }
    return as_document(results, failures, ties, trace, about)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        if parsed.trace is None:
            document = benchmark(parsed)
            print_table(document)
        else:
            document = {**about_machine(torch.device(parsed.device)), **throughput.benchmark(parsed)}
    except (DifferentTokensError, throughput.WrongCountError, ModelStoreError, ValueError) as error:
        print(f"benchmarks.engine: {error}", file=sys.stderr)
        return 2 if isinstance(error, ModelStoreError | ValueError) else 1
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    rows = "systems" if parsed.trace is None else "rows"
    print(json.dumps({**document, rows: [{**row, "rounds": None} for row in document[rows]]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
