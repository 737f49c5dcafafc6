"""Which replica a request goes to: a ``Router`` is asked once, when the request arrives.

A router sees what a load balancer in front of the engines sees: how many requests each has not finished, and the new
prompt. It does not see the answer's length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from pagedattn.engine.simulation.traces import TraceRequest


class Load(Protocol):
    """What a router may know of a replica."""

    num_unfinished: int
    num_prompt_tokens: int  # of unfinished requests


class Router(Protocol):
    def choose(self, request: TraceRequest, replicas: Sequence[Load]) -> int:
        """The index of the replica that gets ``request``."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: TraceRequest, replicas: Sequence[Load]) -> int:
        index = self._next % len(replicas)
        self._next = index + 1
        return index


class LeastLoaded:
    """The replica with the fewest unfinished requests; of these the one with the fewest prompt tokens in them."""

    def choose(self, request: TraceRequest, replicas: Sequence[Load]) -> int:
        return min(
            range(len(replicas)), key=lambda index: (replicas[index].num_unfinished, replicas[index].num_prompt_tokens)
        )


class PrefixAffinity:
    """The replica that has seen the longest part of the prompt, as long as it is not much busier than the others.

    "Much" is more than ``max_imbalance`` times the least busy replica's unfinished requests and ``slack`` more; then,
    and where no replica knows the prompt's first chunk, it is the least loaded. Each replica's latest ``capacity``
    chunks are remembered, whether they still are in its cache or not: a router cannot know.
    """

    def __init__(self, max_imbalance: float = 1.5, slack: int = 8, capacity: int = 4096) -> None:
        if max_imbalance < 1 or slack < 0 or capacity < 1:
            raise ValueError(
                f"max_imbalance={max_imbalance}, slack={slack}, capacity={capacity} are not allowed: they must be "
                ">= 1, >= 0 and >= 1"
            )
        self._max_imbalance = max_imbalance
        self._slack = slack
        self._capacity = capacity
        self._least_loaded = LeastLoaded()
        self._seen: list[OrderedDict[int, None]] = []

    def choose(self, request: TraceRequest, replicas: Sequence[Load]) -> int:
        while len(self._seen) < len(replicas):
            self._seen.append(OrderedDict())
        least = self._least_loaded.choose(request, replicas)
        index = least
        if request.prefix_ids:
            limit = replicas[least].num_unfinished * self._max_imbalance + self._slack
            candidates = [i for i in range(len(replicas)) if replicas[i].num_unfinished <= limit]
            best = max(candidates, key=lambda i: (self._num_known(i, request.prefix_ids), -replicas[i].num_unfinished))
            index = best if self._num_known(best, request.prefix_ids) else least
            self._remember(index, request.prefix_ids)
        return index

    def _num_known(self, index: int, prefix_ids: Sequence[int]) -> int:
        seen = self._seen[index]
        return next((number for number, prefix_id in enumerate(prefix_ids) if prefix_id not in seen), len(prefix_ids))

    def _remember(self, index: int, prefix_ids: Sequence[int]) -> None:
        seen = self._seen[index]
        for prefix_id in reversed(prefix_ids):  # a chunk is of use only with those in front of it: they go last
            seen[prefix_id] = None
            seen.move_to_end(prefix_id)
        while len(seen) > self._capacity:
            seen.popitem(last=False)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-affinity": PrefixAffinity,
}


def make_router(name: str) -> Router:
    if name not in ROUTERS:
        raise ValueError(f"router={name!r} is not known: it must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
