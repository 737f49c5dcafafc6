"""All shapes of ``benchmarks.kernels`` against the limits of the device, as a picture.

    python -m benchmarks.roofline RESULTS.json OUT.png

Left: the roofline, FLOP per byte against FLOP per second, ours and the best peer of each shape. Right: for the shapes
that bytes bound, the share of the measured bandwidth, which a logarithmic axis hides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention_systems import OURS
from benchmarks.kernel_summary import best_peer, microseconds
from benchmarks.shapes import KINDS

COLORS = {"decode": "tab:blue", "prefill": "tab:red", "latent": "tab:green"}


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings, rows = document["ceilings"], document["rows"]
    figure, (roofline, bandwidth) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    attention = [row for row in rows if row["flops"]]
    intensities = [row["flops"] / row["bytes"] for row in attention] or [1.0, 1000.0]
    edge = ceilings["matmul_flops"] / ceilings["read_bytes"]
    line = sorted({min(intensities) / 2, edge, max(*intensities, edge) * 2})
    roof = [min(x * ceilings["read_bytes"], ceilings["matmul_flops"]) / 1e12 for x in line]
    roofline.plot(line, roof, color="black", linewidth=1, label="limit, as measured")
    for kind, color in COLORS.items():
        _scatter_rates(roofline, [row for row in attention if row["kind"] == kind], kind, color)
    roofline.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=document["device"])
    roofline.legend(fontsize="small")
    for kind in KINDS:
        bound = [row for row in rows if row["kind"] == kind and row["bound"] == "bytes" and microseconds(row, OURS)]
        if not bound:
            continue
        shares = [100 * row["limit_us"] / row["systems"][OURS]["us"] for row in bound]
        bandwidth.scatter([row["bytes"] / 1e6 for row in bound], shares, s=18, label=f"ours, {kind}")
    peers = [(row, peer[1]) for row in attention if row["bound"] == "bytes" and (peer := best_peer(row)) is not None]
    bandwidth.scatter(
        [row["bytes"] / 1e6 for row, _ in peers],
        [100 * row["limit_us"] / us for row, us in peers],
        s=18, marker="x", color="gray", label="best peer",
    )  # fmt: skip
    bandwidth.axhline(100, color="black", linewidth=1)
    bandwidth.set(xscale="log", ylim=(0, 105), xlabel="MB moved", ylabel="% of the measured bandwidth")
    bandwidth.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _scatter_rates(axes: Any, rows: list[dict[str, Any]], kind: str, color: str) -> None:
    ours = [(row, us) for row in rows if (us := microseconds(row, OURS)) is not None]
    peers = [(row, found[1]) for row in rows if (found := best_peer(row)) is not None]
    for points, marker, name in ((ours, "o", "ours"), (peers, "x", "best peer")):
        axes.scatter(
            [row["flops"] / row["bytes"] for row, _ in points],
            [row["flops"] / us / 1e6 for row, us in points],
            s=18, marker=marker, color=color, label=f"{name}, {kind}",
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what benchmarks.kernels --json wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parsed = parser.parse_args(arguments)
    draw(json.loads(parsed.results.read_text(encoding="utf-8")), parsed.picture)


if __name__ == "__main__":
    main()
