"""Kernel times of ours and of every peer that can be imported, in one process: attention and cache appends.

    python -m benchmarks.kernels [--shapes FILE ...] [--peers all] [--only REGEX] [--json OUT]

Decode attention is bound by the bytes of the visible keys and values over the read bandwidth, prefill by the
arithmetic of its visible (query, key) pairs, an append by a copy of its rows; the three ceilings are measured first.
Every launch reads pages of its own, dealt out in random order, so that the L2 cache is cold; launches are timed on the
device, in CUDA graphs (``benchmarks/device_timing.py``). Plans and metadata are made before, and timed apart.

A result is checked against fp64 before it is timed, and what the timed graph wrote is checked again after; a wrong one
is not reported. A peer that cannot do a shape is a dash, with its reason in the JSON. With ``--device cpu`` ours is the
torch reference, and the times are those of the host: that tries the code, on shapes that are small.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pagedattn
from benchmarks.attention_systems import OURS, Ours, System, UnsupportedError, first_line
from benchmarks.device_timing import Ceilings, measure_ceilings, time_launches
from benchmarks.kernel_summary import SECTIONS, number, summarize, table
from benchmarks.peers import PEERS, load_peers
from benchmarks.shapes import Shape, load_shapes
from benchmarks.workload import AppendInputs, Arena, AttentionInputs, WrongResultError

FOLDER = Path(__file__).parent
PLAN_SECONDS = 5e-6  # about what a plan takes
DEFAULT_SHAPES = (FOLDER / "canonical_shapes.json", FOLDER / "known_shapes.json")


class DeviceLostError(Exception):
    """The device answers nothing any more."""


def measure_attention(system: System, inputs: AttentionInputs, expected: float, seconds: float) -> dict[str, Any]:
    """Check and time a system. Raises UnsupportedError, WrongResultError, or what the system raises."""
    prepared = system.prepare(inputs)
    ends = {0, inputs.copies - 1}

    def run_and_check(run: Callable[[], float]) -> tuple[float, float]:
        inputs.outs.fill_(float("nan"))
        found = run()
        return found, max(inputs.check(copy, inputs.outs[copy], prepared.tolerance) for copy in ends)

    def each_copy_once() -> float:
        for copy in range(inputs.copies):
            prepared.launch(copy)
        return 0.0

    run_and_check(each_copy_once)
    found, error = run_and_check(
        lambda: time_launches(prepared.launch, inputs.copies, expected, seconds, inputs.device)
    )
    result: dict[str, Any] = {"us": found * 1e6, "error": error}
    plan = prepared.plan
    if plan is not None:  # of interest, but no reason to lose what was measured
        device = torch.device("cpu") if prepared.plans_on_host else inputs.device
        planned = guarded(lambda: {"us": time_launches(plan, 1, PLAN_SECONDS, seconds / 5, device) * 1e6})
        result |= {f"plan_{name}": value for name, value in planned.items()}
        result["plans_on_host"] = prepared.plans_on_host
    return result | ({"note": prepared.note} if prepared.note else {})


def append_launch(inputs: AppendInputs) -> Callable[[int], object]:
    """Our append of the shape's kind, of the copy of an index."""

    def append(copy: int) -> None:
        caches = (inputs.key_cache, inputs.value_cache, inputs.slot_mappings[copy])
        pagedattn.append_kv(inputs.keys[copy], inputs.values[copy], *caches)

    def rope_append(copy: int) -> None:
        caches = (inputs.key_cache, inputs.value_cache, inputs.slot_mappings[copy])
        rows = (inputs.queries[copy], inputs.keys[copy], inputs.values[copy])
        pagedattn.rope_append_kv(*rows, inputs.cos_sin, inputs.positions, *caches)

    return rope_append if inputs.shape.kind == "rope_append" else append


def measure_append(inputs: AppendInputs, expected: float, seconds: float) -> dict[str, Any]:
    """Check and time our appends."""
    launch, before = append_launch(inputs), inputs.queries[0].clone()
    for copy in range(inputs.copies):
        launch(copy)
    error = inputs.check(0, before)
    return {"us": time_launches(launch, inputs.copies, expected, seconds, inputs.device) * 1e6, "error": error}


def guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement, or why there is none: whatever a peer raises must not end the run."""
    try:
        return measure()
    except UnsupportedError as error:
        return {"reason": str(error)}
    except WrongResultError as error:
        return {"reason": f"wrong result: {error}", "wrong": True}
    except Exception as error:  # noqa: BLE001
        reason = first_line(error)
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"{reason}; then {first_line(error)}") from None
    return {"reason": reason, "failed": True}


def measure_shape(
    shape: Shape, systems: Sequence[System], arena: Arena, ceilings: Ceilings, seconds: float
) -> dict[str, Any]:
    """All systems on a shape, as a row of the results."""
    flops_of_bf16 = shape.flops / (2 if shape.query_dtype == "fp8" else 1)  # tensor cores double their rate
    expected = ceilings.limit(shape.bytes, flops_of_bf16, is_copy=shape.is_append)
    row: dict[str, Any] = {
        "key": shape.key,
        **dataclasses.asdict(shape),
        "heads": shape.heads,
        "label": shape.label,
        "bytes": shape.bytes,
        "flops": shape.flops,
        "limit_us": expected * 1e6,
        "bound": "compute" if ceilings.limit(0, flops_of_bf16) == expected else "bytes",
        "systems": {},
    }
    row["query_lens"], row["seq_lens"] = list(shape.query_lens), list(shape.seq_lens)  # as JSON gives them back
    if shape.is_append:
        row["systems"][OURS] = guarded(lambda: measure_append(AppendInputs(shape, arena), expected, seconds))
        return row
    inputs = AttentionInputs(shape, arena)
    for system in systems:
        row["systems"][system.name] = guarded(lambda: measure_attention(system, inputs, expected, seconds))  # noqa: B023
    return row


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for cells in (headings, ["-" * width for width in widths], *rows):
        aligned = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(aligned).rstrip())


def print_results(document: dict[str, Any]) -> None:
    print("not measured:")
    for name, reason in document["missing"].items():
        print(f"  {name}: {reason}")
    shapes: dict[tuple[str, str], list[str]] = {}
    for row in document["rows"]:
        for name, found in row["systems"].items():
            if "reason" in found:
                shapes.setdefault((name, found["reason"]), []).append(row["key"])
    for (name, reason), keys in shapes.items():
        print(f"  {name}: {reason}: {keys[0]}" + f" and {len(keys) - 1} more" * (len(keys) > 1))
    for kinds in SECTIONS:
        headings, rows = table(document, kinds)
        if rows:
            print(f"\n{' and '.join(kinds)}")
            print_table(headings, rows)
    print("\nsummary:")
    for name, figure in document["summary"].items():
        entries = figure.items() if isinstance(figure, dict) else [("", figure)]
        for key, value in entries:
            print(f"  {name} {key}: {_rounded(value)}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, nargs="+", default=list(DEFAULT_SHAPES), help="files of shapes")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {', '.join(PEERS)}, with commas between")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure the shapes whose key this is found in")
    parser.add_argument("--seconds", type=float, default=0.15, help="of timing for each shape and system")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all results to this file, after every shape")
    return parser.parse_args(arguments)


def choose_shapes(files: Sequence[Path], pattern: str) -> dict[Shape, list[str]]:
    """The shapes that are asked for, and the names of the files that each is in."""
    in_files = {path.stem: load_shapes([path]) for path in files}
    chosen = [shape for shape in load_shapes(files) if re.search(pattern, shape.key)]
    if not chosen:
        raise ValueError(f"only: got {pattern!r}; must be found in the key of a shape")
    return {shape: [stem for stem, shapes in in_files.items() if shape in shapes] for shape in chosen}


def run(parsed: argparse.Namespace) -> int:
    device = torch.device(parsed.device)
    chosen = choose_shapes(parsed.shapes, parsed.only)
    names = list(PEERS) if parsed.peers == "all" else [] if parsed.peers == "none" else parsed.peers.split(",")
    peers, missing = load_peers(names)
    systems: list[System] = [Ours(), Ours(batch_invariant=True), *peers]
    started = time.perf_counter()
    arena = Arena(list(chosen), device)
    ceilings = measure_ceilings(arena.keys)
    document: dict[str, Any] = {
        "benchmark": "kernels",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton_version()},
        "ceilings": dataclasses.asdict(ceilings),
        "systems": {system.name: system.version for system in systems},
        "missing": missing,
        "rows": [],
    }
    lost = None
    for shape, files in chosen.items():
        begun = time.perf_counter()
        try:
            row = measure_shape(shape, systems, arena, ceilings, parsed.seconds)
        except DeviceLostError as error:
            lost = f"{shape.key}: {error}"
            break
        document["rows"].append(row | {"files": files})
        document["seconds"] = time.perf_counter() - started
        document["summary"] = summarize(document["rows"])
        if parsed.json:
            parsed.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        ours = row["systems"][OURS]
        took = time.perf_counter() - begun
        print(
            f"{shape.key}: {number(ours.get('us'))} us of {number(row['limit_us'])}, in {took:.1f} s", file=sys.stderr
        )
    if document["rows"]:
        print_results(document)
        print(json.dumps({name: value for name, value in document.items() if name != "rows"}))
    bad = [
        f"{row['key']}: {found['reason']}"
        for row in document["rows"]
        for found in [row["systems"][OURS]]
        if "us" not in found
    ]
    for line in bad + ([f"the device is lost: {lost}"] if lost else []):
        print(line, file=sys.stderr)
    return int(bool(bad or lost))


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "-"
    return str(triton.__version__)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    try:
        with torch.inference_mode():
            return run(parsed)
    except (ValueError, OSError) as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
