"""``DeadlineWatch``: who can no longer meet a deadline, by the steps seen so far. Time is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable

from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import KeyedQueue

# How fast a step can be: a faster one counts at once, slower ones slowly, so that nobody is dropped for one slow step.
_STEP_TIME_GROWTH = 1.02


class DeadlineWatch:
    """Of the requests added, those that would miss a deadline even if they were in every step from now on, each as
    fast as the fastest lately. ``fewest_steps``: until a request's next token, whatever happens. A request is looked at
    O(log) times."""

    def __init__(self, fewest_steps: Callable[[Request], int]) -> None:
        self._fewest_steps = fewest_steps
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
        num_steps = self._fewest_steps(request)
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
        half_way = (self._now + latest) / 2
        # Of two times with none between them that would be now, over and over.
        return half_way if latest - self._now > self._step_seconds and half_way > self._now else latest

    def _note_step_time(self, now: float) -> None:
        self._now = now
        if self._last_step_time is not None:
            seconds = max(now - self._last_step_time, 0.0)
            self._step_seconds = min(seconds, self._step_seconds * _STEP_TIME_GROWTH) if self._step_seconds else seconds
