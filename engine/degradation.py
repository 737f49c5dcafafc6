"""``Ladder``: what the engine gives up under pressure, one rung after the other, and takes back. No clock of its own.

On a rung, all below it act too. From each the engine climbs when the next one's condition begins to hold, and goes back
when its own has ended; one rung at a look, so that what a rung did shows before the next is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagedattn.engine.monitor import Condition, Latch, Metric
from pagedattn.engine.stats import NORMAL


@dataclass(frozen=True)
class SmallerChunks:
    """Prompts get ``share`` of the tokens that the policy has for them, so that steps are shorter and who decodes is
    served faster."""

    share: float = 0.25

    def __post_init__(self) -> None:
        is_number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not is_number or not 0.0 < self.share < 1.0:
            raise ValueError(f"share={self.share!r} is not allowed: it must be a number in (0, 1)")


@dataclass(frozen=True)
class ShedLowest:
    """Of who waits and never ran, the lowest tier is dropped, one tier at a look: the highest ``priority`` number.

    Those of ``protected_priority`` and before stay.
    """

    protected_priority: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.protected_priority, bool) or not isinstance(self.protected_priority, int):
            raise ValueError(f"protected_priority={self.protected_priority!r} is not allowed: it must be an int")


@dataclass(frozen=True)
class Rung:
    """A state of the engine: its ``name``, when it is entered and left, and what it does."""

    name: str
    condition: Condition
    action: SmallerChunks | ShedLowest

    def __post_init__(self) -> None:
        if not self.name or self.name == NORMAL:
            raise ValueError(f"name={self.name!r} is not allowed: it must not be empty or {NORMAL!r}")


class Ladder:
    """``level`` rungs are taken; 0 is normal."""

    def __init__(self, rungs: tuple[Rung, ...]) -> None:
        self.rungs = rungs
        self.level = 0
        self.num_changes = 0
        self._latches = [Latch(rung.condition) for rung in rungs]

    @property
    def state(self) -> str:
        return self.rungs[self.level - 1].name if self.level else NORMAL

    def update(self, now: float, value: Callable[[Metric], float | None]) -> bool:
        """Take a rung, or give one back; whether one was. ``value`` measures a metric."""
        if self.level and self._has_changed(self.level - 1, now, value):
            self._move(-1)
            return True
        if self.level < len(self.rungs) and self._has_changed(self.level, now, value):
            self._move(1)
            return True
        return False

    @property
    def prompt_share(self) -> float:
        """Of the tokens that a step has for prompts."""
        shares = [rung.action.share for rung in self._taken if isinstance(rung.action, SmallerChunks)]
        return min(shares, default=1.0)

    @property
    def protected_priority(self) -> int | None:
        """Who is behind it is shed, None when nobody is."""
        protected = [rung.action.protected_priority for rung in self._taken if isinstance(rung.action, ShedLowest)]
        return min(protected, default=None)

    @property
    def _taken(self) -> tuple[Rung, ...]:
        return self.rungs[: self.level]

    def _has_changed(self, index: int, now: float, value: Callable[[Metric], float | None]) -> bool:
        return self._latches[index].update(now, value(self.rungs[index].condition.metric))

    def _move(self, direction: int) -> None:
        self.level += direction
        self.num_changes += 1
        for latch in self._latches:
            latch.forget()
