"""Run the kernel tests under compute-sanitizer's memcheck, and show that the same command catches a planted fault.

    python -m tests.sanitizer [pytest arguments]

torch's allocator hands out slices of large blocks, which hides accesses out of bounds, so its caching is turned off.
"""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m")


def run(*module: str) -> int:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print("$ PYTORCH_NO_CUDA_MEMORY_CACHING=1", *COMMAND[:-2], "python -m", *module, flush=True)
    return subprocess.run([*COMMAND, *module], env=environment, check=False).returncode


def main() -> int:
    tests = sys.argv[1:] or [
        "tests/kernels/test_attention.py",
        "tests/kernels/test_cache.py",
        "tests/kernels/test_plan.py",
    ]
    clean = run("pytest", "-q", "-p", "no:cacheprovider", *tests)
    planted = run("tests.planted_fault")
    print(f"kernel tests: exit {clean} (0: clean); planted fault: exit {planted} (9: caught)")
    return 0 if clean == 0 and planted == 9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
