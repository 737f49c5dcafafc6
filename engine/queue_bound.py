"""``QueueBound``: how many may wait, and when one that finds the queue full should come again. No clock of its own."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

RATE_WINDOW_SECONDS = 30.0
_SAMPLE_SPACING_SECONDS = 1.0
# What is said while nobody knows how fast the queue drains, and the most that is ever said.
DEFAULT_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


class QueueFullError(RuntimeError):
    """The request found the queue full, and left nothing behind. ``retry_after``: seconds until there may be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(f"{message}; retry after {retry_after:.3g} s")
        self.retry_after = retry_after


class QueueSize(NamedTuple):
    """Sequences, and their tokens: a prompt's, and what a preempted one had generated."""

    num_seqs: int
    num_tokens: int


class _Sample(NamedTuple):
    time: float
    left: QueueSize  # who had left the queue by then


class QueueBound:
    """At most ``max_requests`` sequences and ``max_tokens`` tokens wait; None is no bound.

    An empty queue takes any one request, so that none is refused for ever. How fast the queue drains is taken from the
    last 30 seconds in which it was not empty; who is preempted counts as coming back.
    """

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        self._max_requests = math.inf if max_requests is None else max_requests
        self._max_tokens = math.inf if max_tokens is None else max_tokens
        self._accepted = QueueSize(0, 0)
        self._samples: deque[_Sample] = deque()

    @property
    def is_bounded(self) -> bool:
        return min(self._max_requests, self._max_tokens) < math.inf

    def check(self, now: float, waiting: QueueSize, request: QueueSize) -> None:
        """Raises QueueFullError when ``request`` has no room behind those who wait."""
        missing_seqs = waiting.num_seqs + request.num_seqs - self._max_requests
        missing_tokens = waiting.num_tokens + request.num_tokens - self._max_tokens
        if not waiting.num_seqs or max(missing_seqs, missing_tokens) <= 0:
            return
        message = (
            f"the queue is full: {waiting.num_seqs} requests of {waiting.num_tokens} tokens wait, and with "
            f"{request.num_seqs} of {request.num_tokens} more there would be more than "
        )
        if missing_seqs > 0:
            message += f"max_waiting_requests={self._max_requests}"
        else:
            message += f"max_waiting_tokens={self._max_tokens}"
        # No more than all of them can leave: a request over the bound by itself fits when the queue is empty.
        missing_seqs = min(missing_seqs, waiting.num_seqs)
        missing_tokens = min(missing_tokens, waiting.num_tokens)
        raise QueueFullError(message, self._seconds_until_left(now, waiting, missing_seqs, missing_tokens))

    def accept(self, request: QueueSize) -> None:
        """The request waits now."""
        self._accepted = _sum(self._accepted, request)

    def observe(self, now: float, waiting: QueueSize) -> None:
        """A step has taken from the queue whom it could."""
        if not waiting.num_seqs:  # how fast it drained says nothing any more: it had nobody to give
            self._samples.clear()
            return
        samples = self._samples
        if samples and now - samples[-1].time < _SAMPLE_SPACING_SECONDS:
            return
        samples.append(_Sample(now, _difference(self._accepted, waiting)))
        while len(samples) > 1 and samples[1].time <= now - RATE_WINDOW_SECONDS:
            samples.popleft()

    def _seconds_until_left(self, now: float, waiting: QueueSize, num_seqs: float, num_tokens: float) -> float:
        if not self._samples or now <= self._samples[0].time:
            return DEFAULT_RETRY_SECONDS
        first = self._samples[0]
        left = _difference(_difference(self._accepted, waiting), first.left)
        seconds = 0.0
        for num_missing, num_left in ((num_seqs, left.num_seqs), (num_tokens, left.num_tokens)):
            if num_missing <= 0:
                continue
            if num_left <= 0:
                return MAX_RETRY_SECONDS
            seconds = max(seconds, num_missing * (now - first.time) / num_left)
        return min(seconds, MAX_RETRY_SECONDS)


def _sum(one: QueueSize, other: QueueSize) -> QueueSize:
    return QueueSize(one.num_seqs + other.num_seqs, one.num_tokens + other.num_tokens)


def _difference(one: QueueSize, other: QueueSize) -> QueueSize:
    return QueueSize(one.num_seqs - other.num_seqs, one.num_tokens - other.num_tokens)
