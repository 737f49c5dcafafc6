"""What the results of ``benchmarks.kernels`` come to: the table, and the figures over many shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.attention_systems import INVARIANT, OURS

BANDWIDTH_CLASSES = ((512e6, math.inf), (128e6, 512e6), (64e6, 128e6), (0.0, 64e6))  # bytes that a shape moves

SECTIONS = (("decode",), ("prefill",), ("latent",), ("append", "rope_append"))  # a table for each

Row = dict[str, Any]


def microseconds(row: Row, system: str) -> float | None:
    found = row["systems"].get(system, {}).get("us")
    return None if found is None else float(found)


def best_peer(row: Row) -> tuple[str, float] | None:
    peers = {name: microseconds(row, name) for name in row["systems"] if not name.startswith(OURS)}
    timed = [(us, name) for name, us in peers.items() if us is not None]
    return (min(timed)[1], min(timed)[0]) if timed else None


def ratio(row: Row) -> float | None:
    """How many times as fast as the best peer ours is."""
    ours, peer = microseconds(row, OURS), best_peer(row)
    return None if ours is None or peer is None else peer[1] / ours


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def rate(row: Row, us: float) -> str:
    """TFLOP/s where arithmetic bounds the shape, GB/s elsewhere."""
    return (
        f"{row['flops'] / us / 1e6:.0f} TFLOP/s" if row["bound"] == "compute" else f"{row['bytes'] / us / 1e3:.0f} GB/s"
    )


def table(document: dict[str, Any], kinds: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for the shapes of these kinds. A dash: see the reasons in the JSON."""
    rows = [row for row in document["rows"] if row["kind"] in kinds]
    peers = [name for name in document["systems"] if any(microseconds(row, name) is not None for row in rows)]
    peers = [name for name in peers if name != OURS]
    with_peers = any(best_peer(row) is not None for row in rows)
    headings = ["shape", "batch", "limit, us", "ours, us", "rate", "of limit", "plan, us"]
    headings += (["best peer", "ours is"] if with_peers else []) + [f"{name}, us" for name in peers]
    lines = []
    for row in rows:
        ours, peer = microseconds(row, OURS), best_peer(row)
        plan = row["systems"].get(OURS, {}).get("plan_us")
        cells = [f"{row['name']}, {row['heads']}{variant(row)}", row["label"], number(row["limit_us"]), number(ours)]
        cells += ["-", "-"] if ours is None else [rate(row, ours), f"{row['limit_us'] / ours:.0%}"]
        cells.append(number(plan))
        if with_peers:
            times = ratio(row)
            cells += [peer[0] if peer else "-", "-" if times is None else f"{times:.2f}x"]
        lines.append(cells + [number(microseconds(row, name)) for name in peers])
    return headings, lines


def variant(row: Row) -> str:
    """What sets a shape apart from the plain bf16 one with pages of 16."""
    parts = [f"page {row['block_size']}"] if row["block_size"] != 16 else []
    if row["cache_dtype"] != "bf16":
        parts.append(f"{row['cache_dtype']} per {row['scales']}")
    return "".join(f", {part}" for part in parts)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Over the shapes of each file and kind, and between shapes that differ in one thing. None: not measured."""
    groups = sorted({(file, row["kind"]) for row in rows for file in row["files"]})
    return {
        "against_peers": {f"{file} {kind}": _against_peers(rows, file, kind) for file, kind in groups},
        "of_bandwidth": _of_bandwidth(rows),
        "batch_invariant_cost": _batch_invariant_cost(rows),
        "quantized_speedup": _quantized_speedup(rows),
        "page_size_spread": _page_size_spread(rows),
        "ragged_over_uniform": _ragged_over_uniform(rows),
    }


def _against_peers(rows: list[Row], file: str, kind: str) -> dict[str, Any]:
    chosen = [row for row in rows if row["kind"] == kind and file in row["files"]]
    ratios = {row["key"]: ratio(row) for row in chosen}
    timed = {key: value for key, value in ratios.items() if value is not None}
    efficiency = [row["limit_us"] / ours for row in chosen if (ours := microseconds(row, OURS)) is not None]
    found: dict[str, Any] = {
        "shapes": len(chosen),
        "of_limit": geometric_mean(efficiency),
        "ratio": geometric_mean(timed.values()),
        "worst": min(timed, key=timed.__getitem__) if timed else None,
        "worst_ratio": min(timed.values(), default=None),
    }
    names = {name for row in chosen for name in row["systems"] if not name.startswith(OURS)}
    for name in sorted(names):
        pairs = [(microseconds(row, name), microseconds(row, OURS)) for row in chosen]
        both = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
        found[f"ratio to {name}"] = geometric_mean(both)
    return found


def _of_bandwidth(rows: list[Row]) -> dict[str, float | None]:
    """The least share of the read bandwidth among decodes of each class of bytes."""
    found = {}
    for low, high in BANDWIDTH_CLASSES:
        shares = [
            row["limit_us"] / ours
            for row in rows
            if row["kind"] == "decode" and low <= row["bytes"] < high and (ours := microseconds(row, OURS)) is not None
        ]
        name = f">= {low / 1e6:.0f} MB" if high == math.inf else f"{low / 1e6:.0f}-{high / 1e6:.0f} MB"
        found[name] = min(shares, default=None)
    return found


def _batch_invariant_cost(rows: list[Row]) -> float | None:
    pairs = [(microseconds(row, INVARIANT), microseconds(row, OURS)) for row in rows if row["kind"] == "decode"]
    return geometric_mean([slow / fast for slow, fast in pairs if slow is not None and fast is not None])


def _alike(rows: list[Row], row: Row, differs: Callable[[Row], bool], but: set[str]) -> Row | None:
    """A timed row that equals ``row`` in its geometry and lengths, save for the fields in ``but``."""
    fields = (
        "kind",
        "heads",
        "query_lens",
        "seq_lens",
        "sliding_window",
        "softcap",
        "sinks",
        "block_size",
        "cache_dtype",
    )
    wanted = {field: row[field] for field in fields if field not in but}
    for other in rows:
        same = all(other[field] == value for field, value in wanted.items())
        if same and differs(other) and microseconds(other, OURS) is not None:
            return other
    return None


def _quantized_speedup(rows: list[Row]) -> dict[str, float]:
    """How many times as fast as the same shape with a bf16 cache a quantized one is."""
    found = {}
    for row in rows:
        ours = microseconds(row, OURS)
        if row["cache_dtype"] != "bf16" and ours is not None:
            plain = _alike(rows, row, lambda other: other["cache_dtype"] == "bf16", {"cache_dtype"})
            if plain is not None:
                found[row["key"]] = plain["systems"][OURS]["us"] / ours
    return found


def _page_size_spread(rows: list[Row]) -> float | None:
    """Slowest over fastest page size of a shape that is there with several, less 1; the worst such shape."""
    spreads = []
    for row in rows:
        ours = microseconds(row, OURS)
        other = _alike(rows, row, lambda other: other["block_size"] != row["block_size"], {"block_size"})  # noqa: B023
        if ours is not None and other is not None:
            spreads.append(abs(math.log(ours / other["systems"][OURS]["us"])))
    return math.exp(max(spreads)) - 1 if spreads else None


def _ragged_over_uniform(rows: list[Row]) -> dict[str, float]:
    """Time over limit of each ragged decode, over that of the uniform batch of about as many bytes and equal heads."""
    found = {}
    for row in rows:
        ours = microseconds(row, OURS)
        if row["kind"] != "decode" or len(set(row["seq_lens"])) == 1 or ours is None:
            continue
        uniform = [
            other
            for other in rows
            if other["kind"] == "decode" and len(set(other["seq_lens"])) == 1 and other["heads"] == row["heads"]
            and other["sliding_window"] is None and other["cache_dtype"] == "bf16" and microseconds(other, OURS)
        ]  # fmt: skip
        if uniform:
            nearest = min(uniform, key=lambda other: abs(math.log(other["bytes"] / row["bytes"])))
            found[row["key"]] = ours / row["limit_us"] * nearest["limit_us"] / nearest["systems"][OURS]["us"]
    return found
