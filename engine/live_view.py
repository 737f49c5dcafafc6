"""What the demo shows while it runs: a live screen in a terminal, a line every two seconds elsewhere.

Both are context managers that are called with the ``Replay`` after each step, and write to stderr.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from pagedattn.engine.replay import Replay

if TYPE_CHECKING:
    from rich.console import Group

LINE_SECONDS = 2.0
SCREEN_SECONDS = 0.1
RATE_WINDOW_SECONDS = 3.0
BAR_WIDTH = 40


class View(AbstractContextManager["View"], Protocol):
    def __call__(self, run: Replay) -> None: ...


def make_view() -> View:
    """The live screen where stdout and stderr are a terminal and rich is installed, else plain lines."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        try:
            return RichView()
        except ImportError:
            return PlainView()
    return PlainView()


def recent_rate(run: Replay) -> float:
    """Tokens a second that came out in the last few seconds: one for each sequence that decoded."""
    end = run.steps[-1].end
    since = max(0.0, end - RATE_WINDOW_SECONDS)
    num_sampled = 0
    for step in reversed(run.steps):
        if step.end < since:
            break
        num_sampled += step.num_sampled
    return num_sampled / max(end - since, 1e-9)


class PlainView:
    """One line every ``LINE_SECONDS``."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, run: Replay) -> None:
        now = time.monotonic()
        if now - self._last < LINE_SECONDS and run.num_finished < len(run.answers):
            return
        self._last = now
        step = run.steps[-1]
        print(
            f"[{run.policy}] {step.end:5.1f} s  running {len(step.active)}  waiting {step.num_waiting}  "
            f"done {run.num_finished}/{len(run.answers)}  blocks {step.usage.num_used_blocks}/{run.num_blocks}  "
            f"{recent_rate(run):.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )


class RichView:
    """A screen with the queue, the blocks and the answers as they come. Raises ImportError without rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # Drawn from this thread only: the record changes between steps.
        self._live = Live(console=Console(stderr=True), auto_refresh=False, vertical_overflow="crop")
        self._last = float("-inf")

    def __enter__(self) -> RichView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, run: Replay) -> None:
        now = time.monotonic()
        if now - self._last >= SCREEN_SECONDS or run.num_finished == len(run.answers):
            self._last = now
            self._live.update(self._screen(run), refresh=True)

    def _screen(self, run: Replay) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        step = run.steps[-1]
        filled = round(BAR_WIDTH * step.usage.num_used_blocks / run.num_blocks)
        head = Text.assemble(
            (f"policy {run.policy}", "bold"),
            f"   {step.end:.1f} s   {recent_rate(run):.0f} tokens/s   ",
            f"{run.num_finished}/{len(run.answers)} answered   ",
            (f"{step.num_waiting} waiting", "yellow" if step.num_waiting else "dim"),
        )
        blocks = Text.assemble(
            "KV blocks ",
            ("█" * filled, "green"),
            ("░" * (BAR_WIDTH - filled), "dim"),
            f" {step.usage.num_used_blocks}/{run.num_blocks}",
        )
        table = Table(box=None, padding=(0, 1), expand=True, show_edge=False)
        table.add_column("slot", justify="right", width=4)
        table.add_column("request", justify="right", width=7)
        table.add_column("tokens", justify="right", width=6)
        table.add_column("question", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("answer", ratio=3, no_wrap=True, overflow="ellipsis")
        occupied = {**step.held, **step.active}
        for slot in range(run.max_num_seqs):
            if slot not in occupied:
                table.add_row(str(slot), "", "", "", "")
                continue
            answer = run.answers[occupied[slot]]
            style = "" if slot in step.active else "dim strike"
            question, tail = (" ".join(text.split()) for text in (answer.arrival.question, answer.text[-120:]))
            table.add_row(
                str(slot), str(occupied[slot]), str(answer.num_tokens), Text(question), Text(tail[-70:]), style=style
            )
        return Group(head, blocks, table)
