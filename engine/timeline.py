"""Draws who occupied which batch slot when: one panel per policy, one row per slot, one colour per request.

Hatched stretches are slots that a finished sequence still held because its batch had not ended; white is an empty slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagedattn.engine.replay import Replay, StepRecord, summarize

Span = tuple[float, float]


def spans(steps: Sequence[StepRecord], *, held: bool) -> dict[tuple[int, int], list[Span]]:
    """(start, duration) of each stretch of steps in which a (slot, request) pair was active, or held."""
    result: dict[tuple[int, int], list[Span]] = {}
    open_since: dict[tuple[int, int], Span] = {}
    for step in steps:
        present = set((step.held if held else step.active).items())
        for pair in set(open_since) - present:
            start, end = open_since.pop(pair)
            result.setdefault(pair, []).append((start, end - start))
        for pair in present:
            open_since[pair] = (open_since.get(pair, (step.start, step.end))[0], step.end)
    for pair, (start, end) in open_since.items():
        result.setdefault(pair, []).append((start, end - start))
    return result


def draw_timeline(runs: Sequence[Replay], path: Path) -> None:
    """Writes a PNG of ``runs``, one above the other on the same time axis. Needs matplotlib (the demo extra)."""
    figure = new_figure(12, 1.2 + 2.4 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for panel, run in zip(panels, runs, strict=True):
        summary = summarize(run)
        title = (
            f"policy {run.policy}: {summary.seconds:.1f} s, {summary.tokens_per_second:.0f} tokens/s, "
            f"slots used {summary.slot_utilization:.0%}"
        )
        draw_slots(panel, run.steps, run.max_num_seqs, title)
    label_time(panels[-1])
    figure.savefig(path, dpi=130)


def require_matplotlib() -> None:
    """Raises ImportError that says what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'pagedattn[demo]'") from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. The object interface, not pyplot: no window system is touched."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_slots(panel: Any, steps: Sequence[StepRecord], num_slots: int, title: str) -> None:
    """Who held which of ``num_slots`` batch slots in ``steps``."""
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for (slot, request), stretches in spans(steps, held=False).items():
        panel.broken_barh(
            stretches, (slot - 0.42, 0.84), facecolor=colours[request % len(colours)], edgecolor="black", lw=0.3
        )
        for start, duration in stretches:
            panel.text(start + duration / 2, slot, str(request), ha="center", va="center", fontsize=6, clip_on=True)
    for (slot, _), stretches in spans(steps, held=True).items():
        panel.broken_barh(stretches, (slot - 0.42, 0.84), facecolor="0.93", edgecolor="0.6", hatch="////", lw=0)
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_ylim(num_slots - 0.4, -0.6)
    panel.set_yticks(range(0, num_slots, max(1, num_slots // 8)))
    panel.set_ylabel("batch slot")


def label_time(panel: Any) -> None:
    panel.set_xlim(left=0)
    panel.set_xlabel("seconds (colour and number: request; hatched: held by a finished sequence)")
