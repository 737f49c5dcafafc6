"""``Monitor``: what an engine did between two times, as a line of the log and as alerts. No clock of its own.

A snapshot costs what ``Engine.stats`` does, and is made once an interval; between two, and when all is off, a step pays
a comparison.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from pagedattn.engine.stats import NORMAL, Distribution, EngineStats

logger = logging.getLogger("pagedattn")

Metric = Literal[
    "num_waiting",
    "num_waiting_tokens",
    "queue_growth",
    "kv_cache_usage",
    "ttft_p50",
    "ttft_p95",
    "ttft_p99",
    "inter_token_latency_p50",
    "inter_token_latency_p95",
    "inter_token_latency_p99",
    "latency_p50",
    "latency_p95",
    "latency_p99",
]
METRICS: tuple[str, ...] = get_args(Metric)

# Makes a snapshot whose distributions cover what came since an earlier one, None for the latest of all.
Snapshot = Callable[[EngineStats | None], EngineStats]


@dataclass(frozen=True, slots=True)
class IntervalStats:
    """What happened in ``seconds`` seconds. ``after``'s distributions cover those alone."""

    seconds: float
    before: EngineStats
    after: EngineStats

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens of the sequences that started, the cached ones included."""
        return (self.after.prefix_cache_queries - self.before.prefix_cache_queries) / self.seconds

    @property
    def generated_tokens_per_second(self) -> float:
        return (self.after.num_generated_tokens - self.before.num_generated_tokens) / self.seconds

    @property
    def queue_growth(self) -> float:
        """Sequences a second; negative when the queue drains."""
        return (self.after.num_waiting - self.before.num_waiting) / self.seconds

    @property
    def num_preemptions(self) -> int:
        return self.after.num_preemptions - self.before.num_preemptions

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Share of the prompt tokens that were cached, 0 to 1; None when no sequence started."""
        queries = self.after.prefix_cache_queries - self.before.prefix_cache_queries
        return (self.after.prefix_cache_hits - self.before.prefix_cache_hits) / queries if queries else None

    @property
    def is_idle(self) -> bool:
        """Nothing was computed, and nobody waits for it."""
        has_requests = bool(self.after.num_running or self.after.num_waiting)
        return self.after.num_steps == self.before.num_steps and not has_requests

    def value(self, metric: Metric) -> float | None:
        """None when nothing was measured although there were requests; an idle engine has no latency, which is 0."""
        if metric == "queue_growth":
            return self.queue_growth
        name, _, percentile = metric.rpartition("_p")
        if not name or not percentile.isdigit():
            return float(getattr(self.after, metric))
        distribution: Distribution | None = getattr(self.after, name)
        if distribution is None:
            return 0.0 if self.is_idle else None
        return float(getattr(distribution, f"p{percentile}"))

    def __str__(self) -> str:
        after = self.after
        slots = "-" if after.kv_utilization is None else f"{after.kv_utilization:.1%}"
        hits = "-" if self.prefix_cache_hit_rate is None else f"{self.prefix_cache_hit_rate:.1%}"
        state = "" if after.degradation == NORMAL else f"; degraded: {after.degradation}"
        return (
            f"{self.seconds:.1f} s: {after.num_running} running, {after.num_waiting} waiting "
            f"({after.num_waiting_tokens} tokens); "
            f"KV blocks {after.kv_cache_usage:.1%} used, their slots {slots} filled; "
            f"tokens/s {self.prompt_tokens_per_second:.1f} prompt, {self.generated_tokens_per_second:.1f} generated; "
            f"p50/p95/p99 ms of TTFT {_milliseconds(after.ttft)}, "
            f"inter-token {_milliseconds(after.inter_token_latency)}, total {_milliseconds(after.latency)}; "
            f"{self.num_preemptions} preemptions; prefix-cache hits {hits}{state}"
        )


def _milliseconds(distribution: Distribution | None) -> str:
    if distribution is None:
        return "-"
    return "/".join(f"{1000 * value:.1f}" for value in (distribution.p50, distribution.p95, distribution.p99))


@dataclass(frozen=True)
class Condition:
    """Holds from when ``metric`` has been at ``enter`` or above for ``hold`` seconds until it has been at ``leave`` or
    below for as long. Latencies are in seconds, ``queue_growth`` in sequences a second, ``kv_cache_usage`` 0 to 1.
    """

    metric: Metric
    enter: float
    leave: float
    hold: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r} is not known: it must be one of {', '.join(METRICS)}")
        for name in ("enter", "leave", "hold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number")
        if self.leave >= self.enter:
            raise ValueError(f"leave={self.leave} is not allowed: it must be < enter={self.enter}")
        if self.hold < 0:
            raise ValueError(f"hold={self.hold} is not allowed: it must be >= 0")


class Latch:
    """Whether a condition holds, with its hysteresis."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.holds = False
        self._crossed_at: float | None = None

    def update(self, now: float, value: float | None) -> bool:
        """Whether that changed. A value that was not measured changes nothing."""
        if value is None:
            return False
        condition = self.condition
        has_crossed = value <= condition.leave if self.holds else value >= condition.enter
        if not has_crossed:
            self._crossed_at = None
            return False
        if self._crossed_at is None:
            self._crossed_at = now
        if now - self._crossed_at < condition.hold:
            return False
        self.holds = not self.holds
        self._crossed_at = None
        return True

    def forget(self) -> None:
        """How long it has been past a threshold counts no more."""
        self._crossed_at = None


@dataclass(frozen=True)
class AlertRule:
    """``name`` is told when ``condition`` begins to hold and when it ends, once each."""

    name: str
    condition: Condition


@dataclass(frozen=True, slots=True)
class Alert:
    """``is_active``: the rule's condition holds from now on; else it has ended. ``value`` is its metric's."""

    rule: AlertRule
    is_active: bool
    time: float
    value: float

    def __str__(self) -> str:
        condition = self.rule.condition
        if self.is_active:
            return f"{self.rule.name}: {condition.metric} is {self.value:.4g}, at or above {condition.enter:.4g}"
        return f"{self.rule.name} is over: {condition.metric} is {self.value:.4g}, at or below {condition.leave:.4g}"


class _Interval:
    """From ``before`` on, closed after ``seconds`` at the earliest: steps decide when somebody looks."""

    def __init__(self, seconds: float | None, now: float, before: EngineStats) -> None:
        self._seconds = seconds
        self._start = now
        self._before = before
        self.due = math.inf if seconds is None else now + seconds

    def close(self, now: float, snapshot: Snapshot) -> IntervalStats:
        assert self._seconds is not None, "this interval never ends"
        interval = IntervalStats(now - self._start, self._before, snapshot(self._before))
        self._start, self._before, self.due = now, interval.after, now + self._seconds
        return interval


class Monitor:
    """Writes a line every ``log_interval`` seconds and measures every ``check_interval``; None is never."""

    def __init__(
        self,
        now: float,
        stats: EngineStats,
        *,
        log_interval: float | None,
        check_interval: float | None,
        alerts: tuple[AlertRule, ...],
    ) -> None:
        self._log = _Interval(log_interval, now, stats)
        self._check = _Interval(check_interval, now, stats)
        self._alerts = [(rule, Latch(rule.condition)) for rule in alerts]

    def log_if_due(self, now: float, snapshot: Snapshot) -> IntervalStats | None:
        """Writes the line, unless nothing happened; returns what it says."""
        if now < self._log.due:
            return None
        interval = self._log.close(now, snapshot)
        if not interval.is_idle:
            logger.info("%s", interval)
        return interval

    def measure_if_due(self, now: float, snapshot: Snapshot) -> IntervalStats | None:
        """What the interval had that is over now, None within one."""
        return self._check.close(now, snapshot) if now >= self._check.due else None

    def alerts_of(self, now: float, interval: IntervalStats) -> list[Alert]:
        """The alerts that begin or end with this interval, in the order of the rules."""
        changed = []
        for rule, latch in self._alerts:
            value = interval.value(rule.condition.metric)
            if value is not None and latch.update(now, value):
                changed.append(Alert(rule, latch.holds, now, value))
        return changed


def notify(alerts: list[Alert], on_alert: Callable[[Alert], None] | None) -> None:
    """Logs each and hands it out; what a callback raises is logged, and stops neither the others nor the engine."""
    for alert in alerts:
        logger.log(logging.WARNING if alert.is_active else logging.INFO, "%s", alert)
        if on_alert is None:
            continue
        try:
            on_alert(alert)
        except Exception:
            logger.exception("the callback for the alert %r failed", alert.rule.name)
