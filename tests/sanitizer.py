"""Run kernel tests under compute-sanitizer, and show that each of its tools catches a planted fault.

    python -m tests.sanitizer [memcheck] [racecheck] [initcheck] [--processes N] [--every N] [--only TEXT] [--logs DIR]

Without names: all three. A subset of the kernel tests that launches every kernel in each of its forms. torch's
allocator hands out slices of large blocks, which hides accesses out of bounds, so its caching is turned off. Cases are
small, and are compared with results of a CPU: a sanitizer slows every access. The tests are dealt out to processes,
each under a sanitizer of its own. ``--every 3`` takes a third of each test's cases, ``--only`` those whose id has a
text. What the processes say is in ``--logs``.

racecheck credits an arrival at an mbarrier to the arriving thread alone, not to those that a barrier ordered before it,
as Gluon's partitions do it. So it reports even the correct handover of ``tests.planted_fault``, and kernels with such
handovers are left out of it: races in them are looked for where a CPU runs them, in
``tests/kernels/gluon_interpreter.py``. Should the handover pass one day, this fails, and that exclusion is to end.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

FAULTS = {"memcheck": "bounds", "racecheck": "race", "initcheck": "uninitialized"}
CAUGHT = 9
LEAST_CASES = 4  # of a test
EXCLUDED = {"racecheck": ("hopper_decode_kernel", "hopper_prefill_kernel")}
SUBSET = (
    "tests/kernels/test_cache.py::test_append",
    "tests/kernels/test_cache.py::test_rope_append",
    "tests/kernels/test_cache.py::test_quantized_rope_append",
    "tests/kernels/test_cache.py::test_rotary_dims_that_are_no_powers_of_two",
    "tests/kernels/test_cache.py::test_copy_between_host_and_device_of_other_layouts",
    "tests/kernels/test_cache.py::test_gather_reads_what_append_wrote",
    "tests/kernels/test_cache.py::test_copy_reads_before_it_writes",
    "tests/kernels/test_cache.py::test_merge_of_parts_is_the_whole",
    "tests/kernels/test_plan.py::test_op_writes_what_the_reference_writes",
    "tests/kernels/test_attention.py::test_long_sequence_among_short_ones_is_split",
    *(f"tests/kernels/test_attention.py::test_drawn_configurations[{number}]" for number in range(24)),
    *(f"tests/kernels/test_hopper_decode.py::test_drawn_on_hopper[{number}]" for number in range(12)),
    *(f"tests/kernels/test_hopper_prefill.py::test_drawn_on_hopper[{number}]" for number in range(8)),
    *(f"tests/kernels/test_hopper_linear.py::test_drawn_on_hopper[{number}]" for number in range(8)),
    "tests/kernels/test_batch_invariance.py::test_hopper",
    "tests/kernels/test_layers.py::test_norm",
    "tests/kernels/test_layers.py::test_add_and_norm",
    "tests/kernels/test_layers.py::test_query_key_norm",
    "tests/kernels/test_layers.py::test_gated_activation",
    "tests/kernels/test_layers.py::test_norm_and_product",
    "tests/kernels/test_layers.py::test_product_added_to_the_residual",
    "tests/kernels/test_invariant_linear.py::test_neither_other_rows_nor_the_place_among_them_show",
    "tests/kernels/test_sampling.py::test_tokens_equal_the_references",
    "tests/kernels/test_batch_state.py::test_words_are_updated",
    "tests/kernels/test_batch_state.py::test_rows_are_moved_whole",
    "tests/kernels/test_batch_state.py::test_inputs_of_a_decode",
    "tests/kernels/test_batch_state.py::test_inputs_of_any_mixture",
    "tests/kernels/test_batch_state.py::test_accepted_tokens_are_the_last",
)
PYTEST = ("pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short")


def environment() -> dict[str, str]:
    """Of the tests: under it cases are small."""
    return {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PAGEDATTN_SANITIZED": "1",
        "PAGEDATTN_DRAWS": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(tool: str, module: Sequence[str], log: Path) -> int:
    """The exit code of a module's run under a tool: ``CAUGHT`` where that found something."""
    excluded = [option for kernel in EXCLUDED.get(tool, ()) for option in ("--kernel-name-exclude", f"kns={kernel}")]
    options = ("--tool", tool, "--error-exitcode", str(CAUGHT), *excluded)
    command = ("compute-sanitizer", *options, sys.executable, "-m", *module)
    with log.open("wb") as file:
        code = subprocess.run(command, env=environment(), check=False, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"{log}: exit {code}", flush=True)
    return code


def collect(every: int, only: str = "") -> list[str]:
    """The subset's tests, one in ``every`` of their cases. Raises CalledProcessError when there are none."""
    command = (sys.executable, "-m", *PYTEST, "-q", "--collect-only", *SUBSET)
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout
    cases = (line for line in listed.splitlines() if "::" in line and only in line)
    return [
        case for name, test in groupby(cases, lambda case: case.partition("[")[0]) for case in some(name, test, every)
    ]


def some(name: str, cases: Iterable[str], every: int) -> list[str]:
    """One in ``every`` of a test's cases, but no fewer than LEAST_CASES: drawn, for a stride would always meet the same
    dtype. The same ones each time."""
    cases = list(cases)
    count = max(-(-len(cases) // every), min(LEAST_CASES, len(cases)))
    chosen = set(random.Random(name).sample(cases, count))
    return [case for case in cases if case in chosen]


def main(tools: Sequence[str], num_processes: int, every: int, only: str, logs: Path) -> int:
    tests = collect(every, only)
    if not tests:
        raise SystemExit(f"--only {only}: no test of the subset has it in its id")
    num_parts = min(len(tests), max(1, num_processes // len(tools)))
    parts = [(*PYTEST, "-v", *tests[first::num_parts]) for first in range(num_parts)]
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_processes) as pool:
        planted = {
            tool: pool.submit(run, tool, ("tests.planted_fault", FAULTS[tool]), logs / f"{tool}-planted.log")
            for tool in tools
        }
        handovers = {
            tool: pool.submit(run, tool, ("tests.planted_fault", "handover"), logs / f"{tool}-handover.log")
            for tool in tools
            if tool in EXCLUDED
        }
        clean = {
            tool: [pool.submit(run, tool, part, logs / f"{tool}-{number}.log") for number, part in enumerate(parts)]
            for tool in tools
        }
    is_good = True
    for tool in tools:
        codes, caught = [future.result() for future in clean[tool]], planted[tool].result()
        is_good = is_good and not any(codes) and caught == CAUGHT
        print(
            f"{tool}: {len(tests)} kernel tests, exit codes {codes} (0: clean); "
            f"planted fault exit {caught} ({CAUGHT}: caught)",
            flush=True,
        )
    for tool, handover in handovers.items():
        is_good = is_good and handover.result() == CAUGHT
        print(f"{tool}: without {', '.join(EXCLUDED[tool])}; correct handover exit {handover.result()}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tools", nargs="*", metavar="tool", help=f"of {', '.join(FAULTS)}; all when none is named")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time, of all tools together")
    parser.add_argument("--every", type=int, default=1, help="take one in so many cases of each test")
    parser.add_argument("--only", default="", metavar="TEXT", help="take the tests whose id has this in it")
    parser.add_argument("--logs", type=Path, help="where the processes' output goes (default: a temporary directory)")
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - set(FAULTS):
        parser.error(f"unknown tool {', '.join(sorted(unknown))}")
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="sanitizer-"))
    raise SystemExit(main(arguments.tools or list(FAULTS), arguments.processes, arguments.every, arguments.only, logs))
