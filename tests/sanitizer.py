"""Run kernel tests under compute-sanitizer's memcheck, and show that the same command catches a planted fault.

    python -m tests.sanitizer [pytest arguments]

Without arguments: a subset of the kernel tests that launches every kernel. torch's allocator hands out slices of large
blocks, which hides accesses out of bounds, so its caching is turned off.
"""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
SUBSET = (
    "tests/kernels/test_cache.py",
    "tests/kernels/test_plan.py::test_op_writes_what_the_reference_writes",
    "tests/kernels/test_attention.py::test_long_sequence_among_short_ones_is_split",
    *(f"tests/kernels/test_attention.py::test_drawn_configurations[{seed}]" for seed in range(24)),
)


def run(*module: str) -> int:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print("$ PYTORCH_NO_CUDA_MEMORY_CACHING=1", *COMMAND, "python -m", *module[:8], flush=True)
    return subprocess.run([*COMMAND, sys.executable, "-m", *module], env=environment, check=False).returncode


def main() -> int:
    clean = run("pytest", "-q", "-p", "no:cacheprovider", *(sys.argv[1:] or SUBSET))
    planted = run("tests.planted_fault")
    print(f"kernel tests: exit {clean} (0: clean); planted fault: exit {planted} (9: caught)")
    return 0 if clean == 0 and planted == 9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
