"""Attempts of waiting requests to join that come to nothing, so that they are not made in vain.

An attempt gives blocks to those who are next, and takes them back when they are too few for the policy, or the first
does not fit. Under a policy that wants many newcomers at once that would be done at nearly every step. ``WaitingNeeds``
tells beforehand that the budget can not do for so many, whoever they are; ``FruitlessJoin`` remembers an attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import WaitingQueue


class WaitingNeeds:
    """Of those who wait, how many need how many tokens, up to a factor of two."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # by the least power of two that is more than they need
        self._bits: dict[Request, int] = {}

    def add(self, request: Request, num_tokens: int) -> None:
        """It would take at least ``num_tokens`` of a step's budget."""
        bits = self._bits[request] = num_tokens.bit_length()
        self._counts[bits] = self._counts.get(bits, 0) + 1

    def remove(self, request: Request) -> None:
        self._counts[self._bits.pop(request)] -= 1

    def most_within(self, budget: int) -> int:
        """At most so many of them can have what they need."""
        most = 0
        for bits in sorted(self._counts):
            num_tokens = 1 << bits >> 1
            if self._counts[bits] * num_tokens > budget:
                return most + budget // num_tokens
            most += self._counts[bits]
            budget -= self._counts[bits] * num_tokens
        return most

    def check_integrity(self, waiting: Collection[Request]) -> None:
        """They are counted, and nobody else. Raises AssertionError."""
        assert set(self._bits) == set(waiting), "who waits and whose needs are known are not the same"
        counts = {bits: count for bits, count in self._counts.items() if count}
        assert counts == Counter(self._bits.values()), "needs are miscounted"


class JoinState(NamedTuple):
    """All that decides who can join, but for who waits, who runs, and in which order they are looked at."""

    min_joins: int
    token_budget: int
    num_promised_tokens: int
    has_uncut: bool
    has_tokens: bool
    may_prefill: bool
    num_free_blocks: int
    num_prefix_changes: int


class FruitlessJoin(NamedTuple):
    """``looked_at``: in order, and whether each joined for the moment. To be forgotten when anybody comes or goes."""

    state: JoinState
    looked_at: tuple[tuple[Request, bool], ...]

    def would_repeat(self, state: JoinState, waiting: WaitingQueue, now: float) -> bool:
        """Whether an attempt in this state would come to nothing again: all is as it was, and the same are next.

        Who is next is asked of the queue, as it may depend on the time and on what was served since.
        """
        if state != self.state:
            return False
        set_turn_back = waiting.mark_turn()
        taken: list[Request] = []
        joined: list[Request] = []
        for request, has_joined in self.looked_at:
            taken.append(waiting.take(now))
            if taken[-1] is not request:
                break
            if has_joined:
                waiting.joined(request)
                joined.append(request)
        for request in reversed(joined):
            waiting.withdrawn(request)
        for request in taken:
            waiting.put_back(request)
        set_turn_back()
        return all(one is request for one, (request, _) in zip(taken, self.looked_at, strict=False))
