"""Where the warps of our attention kernels stand, instruction by instruction, from a profile of Nsight Compute.

    ncu --profile-from-start off --clock-control none --set full --kernel-name regex:hopper_prefill -f -o PROFILE \\
        python -m benchmarks.hot_spots --launch '32/8 d128 . 16 x 1k'
    ncu --import PROFILE.ncu-rep --page source --csv > PROFILE.csv
    python -m benchmarks.hot_spots PROFILE.csv

The first runs our attention on each shape of ``benchmarks.kernels`` whose key the pattern is found in: a few times, and
then once with the profiler on. The last prints, for each kernel: how its instructions that reach memory are encoded and
how often warps executed them (a store of two bytes where sixteen would do is seen at once), and at which instructions
the profiler found its warps most often, with the reasons for which they stood there.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.attention_systems import Ours
from benchmarks.kernels import DEFAULT_SHAPES, choose_shapes
from benchmarks.workload import Arena, AttentionInputs

MEMORY = ("LD", "ST", "UTMA", "ATOM", "RED.")  # of SASS
EXECUTED, SAMPLES, SOURCE = "Instructions Executed", "# Samples", "Source"

Instruction = dict[str, str]


def launch(files: Sequence[Path], pattern: str, device: torch.device) -> None:
    """Run our attention on the shapes that the pattern is found in, with the profiler on for the last of three runs."""
    chosen = [shape for shape in choose_shapes(files, pattern) if not shape.is_append]
    arena = Arena(chosen, device)
    for shape in chosen:
        print(shape.key, flush=True)
        prepared = Ours().prepare(AttentionInputs(shape, arena))
        for is_profiled in (False, False, True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                if is_profiled:
                    torch.cuda.profiler.start()
            prepared.launch(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()


def read_kernels(lines: Iterable[str]) -> list[tuple[str, list[Instruction]]]:
    """The kernels of a source page in CSV, by name, and their instructions with Nsight Compute's columns.

    Raises:
        ValueError: for lines that are no such page.
    """
    kernels: list[tuple[str, list[Instruction]]] = []
    headings: list[str] = []
    for row in csv.reader(lines):
        if row and row[0] == "Kernel Name":
            kernels.append((row[1], []))
        elif row and row[0] == "Address":
            headings = row
        elif row and kernels:
            kernels[-1][1].append(dict(zip(headings, row, strict=False)))
    if not kernels or not {EXECUTED, SAMPLES, SOURCE} <= set(headings):
        raise ValueError("no source page: make it with `ncu --import PROFILE --page source --csv`")
    return kernels


def opcode(instruction: Instruction) -> str:
    """The operation without its predicate and operands."""
    words = instruction[SOURCE].split()
    words = words[1:] if words and words[0].startswith("@") else words
    return words[0] if words else ""


def summary(name: str, instructions: Sequence[Instruction], count: int) -> str:
    """What is printed of a kernel."""
    total = sum(int(one[SAMPLES]) for one in instructions)
    encoded, executed = Counter[str](), Counter[str]()
    for one in instructions:
        if opcode(one).startswith(MEMORY):
            encoded[opcode(one)] += 1
            executed[opcode(one)] += int(one[EXECUTED])
    lines = [f"{name}: {len(instructions)} instructions, {total} samples", f"{'memory':<32}{'code':>8}{'executed':>12}"]
    lines += [f"{kind:<32}{encoded[kind]:>8}{times:>12}" for kind, times in executed.most_common()]
    lines.append(f"{'line':>6}{'samples':>9}{'executed':>11}  instruction; where its warps stood")
    hottest = sorted(range(len(instructions)), key=lambda place: -int(instructions[place][SAMPLES]))[:count]
    for place in sorted(hottest):
        one = instructions[place]
        stalls = Counter(
            {
                column.removeprefix("stall_"): int(value)
                for column, value in one.items()
                if re.fullmatch(r"stall_\w+", column)
            }
        )
        reasons = ", ".join(f"{reason} {times}" for reason, times in stalls.most_common(2) if times)
        lines.append(f"{place:>6}{one[SAMPLES]:>9}{one[EXECUTED]:>11}  {one[SOURCE].strip()[:60]}; {reasons}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="a source page in CSV, to be summed up")
    parser.add_argument("--launch", metavar="REGEX", help="run our attention on the shapes whose key this is found in")
    parser.add_argument("--shapes", type=Path, nargs="+", default=list(DEFAULT_SHAPES), help="files of shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=30, help="of instructions to print (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if (parsed.page is None) == (parsed.launch is None):
        parser.error("either a page or --launch must be given")
    try:
        if parsed.launch is not None:
            launch(parsed.shapes, parsed.launch, torch.device(parsed.device))
        else:
            with parsed.page.open(encoding="utf-8") as lines:
                for name, instructions in read_kernels(lines):
                    print(summary(name, instructions, parsed.count))
    except (OSError, ValueError) as error:
        print(f"benchmarks.hot_spots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
