"""The pictures of a simulation: latency against load, batch slots, KV blocks and the service of each client over time.

Each function writes one PNG. They need matplotlib (the demo extra).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedattn.engine.simulation.recorder import Recorder, SimulationResult
from pagedattn.engine.stats import Distribution
from pagedattn.engine.timeline import draw_slots, label_time, new_figure

DPI = 130
MAX_GANTT_SLOTS = 32
QUANTITIES = (
    ("ttft", "time to first token"),
    ("inter_token_latency", "between two tokens"),
    ("latency", "arrival to last token"),
)


@dataclass(frozen=True)
class Simulated:
    """One run: its name (policy and order), the load it had, what it recorded and its figures."""

    name: str
    load: float
    num_blocks: int
    block_size: int
    max_num_seqs: int
    recorder: Recorder
    result: SimulationResult


def draw_latency_against_load(runs: Sequence[Simulated], path: Path) -> None:
    """Percentiles over the requests that arrive in a second; one colour per name."""
    figure = new_figure(13, 4.6)
    panels = figure.subplots(1, len(QUANTITIES))
    names = list(dict.fromkeys(run.name for run in runs))
    for panel, (field, title) in zip(panels, QUANTITIES, strict=True):
        for number, name in enumerate(names):
            points = sorted((_offered(run), getattr(run.result, field)) for run in runs if run.name == name)
            known = [(rate, times) for rate, times in points if isinstance(times, Distribution)]
            for percentile, style in (("p50", "--"), ("p99", "-")):
                panel.plot(
                    [rate for rate, _ in known],
                    [getattr(times, percentile) for _, times in known],
                    style,
                    color=f"C{number % 10}",
                    marker="osv^D"[number // 10 % 5],
                    markersize=4,
                    label=name if percentile == "p99" else None,
                )
        panel.set_yscale("log")
        panel.set_title(f"{title}: p99 solid, p50 dashed", fontsize=10)
        panel.set_xlabel("requests arriving in a second")
        panel.set_ylabel("seconds")
        panel.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=DPI)


def _offered(run: Simulated) -> float:
    arrivals = run.recorder.arrival_times
    return len(arrivals) / max(arrivals[-1], 1e-9)


def draw_gantt(runs: Sequence[Simulated], path: Path) -> None:
    """Who held which batch slot of the first replica in its first steps; the same stretch of time for all runs."""
    figure = new_figure(12, 1.2 + 2.6 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    end = min(run.recorder.steps[-1].end for run in runs)
    for panel, run in zip(panels, runs, strict=True):
        num_slots = min(run.max_num_seqs, MAX_GANTT_SLOTS)
        shown = "" if num_slots == run.max_num_seqs else f", {num_slots} of {run.max_num_seqs} slots"
        draw_slots(panel, run.recorder.steps, num_slots, f"{run.name}{shown}")
    label_time(panels[-1])
    panels[-1].set_xlim(0, end)
    figure.savefig(path, dpi=DPI)


def draw_blocks(runs: Sequence[Simulated], path: Path) -> None:
    """Blocks of the first replica that are allocated, those that the tokens in them would need, and its queue."""
    figure = new_figure(12, 1.0 + 2.2 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, run in zip(panels, runs, strict=True):
        samples = [sample for sample in run.recorder.samples if sample.replica == 0]
        times = [sample.time for sample in samples]
        panel.fill_between(
            times, [one.num_used_blocks for one in samples], step="post", color="0.8", label="blocks allocated"
        )
        filled = [one.num_filled_slots / run.block_size for one in samples]
        panel.fill_between(times, filled, step="post", color="C0", alpha=0.8, label="blocks' worth of tokens")
        panel.axhline(run.num_blocks, color="black", lw=0.8, ls=":", label="all blocks")
        panel.set_title(run.name, loc="left", fontsize=10)
        panel.set_ylabel("KV blocks")
        queue = panel.twinx()
        queue.plot(
            times,
            [one.num_waiting for one in samples],
            color="C3",
            lw=0.9,
            drawstyle="steps-post",
            label="requests waiting",
        )
        queue.set_ylabel("waiting", color="C3")
        queue.set_ylim(0, max([10, *queue.lines[0].get_ydata()]) * 1.05)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(left=0)
    handles = [*panels[0].get_legend_handles_labels()[0], queue.lines[0]]
    figure.legend(handles, [one.get_label() for one in handles], loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=DPI)


def draw_service(runs: Sequence[Simulated], path: Path) -> None:
    """Tokens a second computed for each client, over all replicas, in windows of a fortieth of the run."""
    figure = new_figure(12, 1.0 + 2.2 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, run in zip(panels, runs, strict=True):
        samples = run.recorder.samples
        windows = max(1, len(samples) // 40)
        marks = samples[::windows]
        for client in sorted(set(run.recorder.clients)):
            rates = [
                (after.service.get(client, 0) - before.service.get(client, 0)) / max(after.time - before.time, 1e-9)
                for before, after in itertools.pairwise(marks)
            ]
            panel.stairs(rates, [mark.time for mark in marks], label=client or "all", lw=1.3)
        panel.set_title(run.name, loc="left", fontsize=10)
        panel.set_ylabel("tokens/s")
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(left=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=DPI)
