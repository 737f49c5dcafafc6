"""``FruitlessJoin``: an attempt of waiting requests to join that came to nothing, so that it is not made again in vain.

An attempt gives blocks to those who are next, and takes them back when they are too few for the policy, or the first
does not fit. Under a policy that wants many newcomers at once that would be done at nearly every step.
"""

from __future__ import annotations

from typing import NamedTuple

from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import WaitingQueue


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
