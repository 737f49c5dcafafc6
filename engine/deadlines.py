"""``DeadlineWatch``: who can no longer meet a deadline, by the steps seen so far. Time is passed in."""

from __future__ import annotations

import math

from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import KeyedQueue

# How fast a step can be: a faster one counts at once, slower ones slowly, so that nobody is dropped for one slow step.
_STEP_TIME_GROWTH = 1.02


class DeadlineWatch:
    """Of the requests added, those that would miss a deadline even if they were in every step from now on, each as
    fast as the fastest lately. Looking costs O(log) for each request that is looked at, and few are in a step."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens
        self._queue = KeyedQueue(self._next_check)
        self._now = 0.0
        self._last_step_time: float | None = None  # None: nothing was computed
        self._step_seconds = 0.0  # of the fastest steps lately

    def add(self, request: Request) -> None:
        if request.next_deadline is not None:
            self._queue.add(request)

    def remove(self, request: Request) -> None:
        """Nothing to do when the request has no deadline."""
        self._queue.remove(request)

    def start_step(self, now: float) -> list[Request]:
        """A step begins: those that are late, who are watched no longer."""
        self._note_step_time(now)
        late = []
        while self._queue and self._queue.smallest_key() <= now:
            request = self._queue.take(now)
            if self._latest_start(request) > now:
                self._queue.put_back(request)
            else:
                late.append(request)
        return late

    def end_step(self, now: float, *, is_empty: bool) -> None:
        self._last_step_time = None if is_empty else now

    def _latest_start(self, request: Request) -> float:
        """When the request has to be in every step from then on to meet its deadlines, as far as we know."""
        num_steps = -(-request.num_uncomputed_tokens // self._max_num_batched_tokens)
        latest = math.inf
        if request.first_token_deadline is not None and not request.num_output_tokens:
            latest = request.first_token_deadline - num_steps * self._step_seconds
        if request.deadline is not None:
            num_steps += max(request.min_num_tokens - request.num_tokens - 1, 0)
            latest = min(latest, request.deadline - num_steps * self._step_seconds)
        return latest

    def _next_check(self, request: Request) -> float:
        """Half way to its latest start: steps may turn out slower than they were."""
        latest = self._latest_start(request)
        return latest if latest - self._now <= self._step_seconds else (self._now + latest) / 2

    def _note_step_time(self, now: float) -> None:
        self._now = now
        if self._last_step_time is not None:
            seconds = now - self._last_step_time
            self._step_seconds = min(seconds, self._step_seconds * _STEP_TIME_GROWTH) if self._step_seconds else seconds
