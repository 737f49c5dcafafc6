"""Run kernel tests under compute-sanitizer, and show that each of its tools catches a planted fault.

    python -m tests.sanitizer [memcheck] [racecheck] [initcheck]

Without arguments: all three. A subset of the kernel tests that launches every kernel in each of its forms. torch's
allocator hands out slices of large blocks, which hides accesses out of bounds, so its caching is turned off.
"""

from __future__ import annotations

import os
import subprocess
import sys

FAULTS = {"memcheck": "bounds", "racecheck": "race", "initcheck": "uninitialized"}
CAUGHT = 9
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
)


def run(tool: str, *module: str) -> int:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(CAUGHT), sys.executable, "-m", *module)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PAGEDATTN_DRAWS": "1"}
    print("$ PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command[:9], flush=True)
    return subprocess.run(command, env=environment, check=False).returncode


def main(tools: list[str]) -> int:
    outcomes = []
    for tool in tools or FAULTS:
        clean = run(tool, "pytest", "-q", "-p", "no:cacheprovider", *SUBSET)
        planted = run(tool, "tests.planted_fault", FAULTS[tool])
        outcomes.append(clean == 0 and planted == CAUGHT)
        print(
            f"{tool}: kernel tests exit {clean} (0: clean); planted fault exit {planted} ({CAUGHT}: caught)", flush=True
        )
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
