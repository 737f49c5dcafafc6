"""Runs the test suite in its three levels: ``python -m tests [pytest options]``.

1. CPU: the pure-torch references and the engine on them.
2. Interpreter: the Triton kernels on CPU tensors (``TRITON_INTERPRET=1`` has to be set before torch is imported,
   hence a process of its own).
3. GPU: the tests marked ``gpu``, where there is a CUDA device.

Options are passed on to each pytest. The exit status is 1 if any level failed, or if options selected no test at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Level:
    title: str
    pytest_arguments: tuple[str, ...]
    interpret: bool = False


LEVELS = (
    Level("CPU: references and engine", ("-m", "not gpu and not interpret", "tests")),
    Level(
        "Triton kernels, interpreted",
        ("-m", "not gpu", "--ignore", "tests/kernels/test_compile.py", "tests/kernels", "tests/pagedattn"),
        interpret=True,
    ),
    Level("GPU", ("-m", "gpu", "tests")),
)
OUTCOMES: dict[int, str] = {pytest.ExitCode.OK: "passed", pytest.ExitCode.NO_TESTS_COLLECTED: "no tests selected"}


def run_level(level: Level, options: list[str]) -> int:
    """Runs one level in a process of its own; returns pytest's exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Threads that spin at OpenMP's barriers are many times slower as soon as the machine has other work as well.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if level.interpret:
        environment["TRITON_INTERPRET"] = "1"
    # One process a core, each with one thread; tests that share an expensive fixture stay in one process.
    environment.setdefault("OMP_NUM_THREADS", "1")
    spread = () if level.title == "GPU" else ("--numprocesses", "auto", "--dist", "loadgroup")
    command = [sys.executable, "-m", "pytest", *spread, *level.pytest_arguments, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main(options: list[str]) -> int:
    summary = []
    results = []
    for number, level in enumerate(LEVELS, start=1):
        heading = f"level {number} of {len(LEVELS)}: {level.title}"
        if level.title == "GPU" and not torch.cuda.is_available():
            summary.append(f"{heading}: not run, no CUDA device")
            continue
        print(f"\n{'#' * 8} {heading} {'#' * 8}", flush=True)
        start = time.monotonic()
        result = run_level(level, options)
        results.append(result)
        if result == pytest.ExitCode.INTERRUPTED:
            return 130
        outcome = OUTCOMES.get(result, "FAILED")
        summary.append(f"{heading}: {outcome} ({time.monotonic() - start:.0f} s)")
    print("\n" + "\n".join(summary), flush=True)
    # Without options an empty level means that tests were lost; with them it only means that none matched there.
    allowed = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED} if options else {pytest.ExitCode.OK}
    return 0 if pytest.ExitCode.OK in results and allowed.issuperset(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
