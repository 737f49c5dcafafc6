"""Who is next in line, as data: ``QueueOrder`` is the axes, ``ORDERS`` the named rows. Any goes with any policy.

``make_queue`` turns a row into the queue that the scheduler takes from (waiting_queue.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_type_hints

from pagedattn.engine.length_predictor import LengthPredictor, expected_output_tokens
from pagedattn.engine.request import Request
from pagedattn.engine.waiting_queue import (
    INPUT_TOKEN_COST,
    OUTPUT_TOKEN_COST,
    BoundedWaitQueue,
    FairQueue,
    KeyedQueue,
    PrefixQueue,
    TieredQueue,
    WaitingQueue,
)


@dataclass(frozen=True)
class QueueOrder:
    """The axes of an order.

    ``by``: "arrival"; "priority", the lowest first; "length", the least work first; "deadline", the earliest first;
    "client": the client that got the least service, by virtual token counters; "prefix": who shares the beginning of
    its prompt with the request that joined last.
    ``ageing``: how fast waiting makes up for being less important or longer, per second: in units of priority, or of
    work (tokens, an output token counting twice). A gap of d is overtaken after d / ageing seconds. 0 is never.
    ``tiers``: priorities are kept apart: a request joins when none with a lower priority waits; ``by`` holds within.
    ``max_wait``: seconds after which a request counts as overdue: every fourth that joins is the longest overdue one,
    whatever else the order says. None is never.
    ``client_weights``: shares of service under "client"; a client that is not named has 1.
    ``prefix_tokens``: under "prefix", prompts are alike when so many of their first tokens are.
    ``assumed_timeout``: under "deadline", seconds from arrival within which a request without one is wanted.
    """

    by: Literal["arrival", "priority", "length", "deadline", "client", "prefix"]
    ageing: float = 0.0
    tiers: bool = False
    max_wait: float | None = None
    client_weights: Mapping[str, float] = field(default_factory=dict)
    prefix_tokens: int = 64
    assumed_timeout: float = 60.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (item.name for item in fields(self)):
            value, allowed = getattr(self, name), get_args(hints[name])
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")
        if not (math.isfinite(self.ageing) and self.ageing >= 0):
            raise ValueError(f"ageing={self.ageing} is not allowed: it must be a finite number >= 0")
        if self.ageing and self.by not in ("priority", "length"):
            raise ValueError(f"ageing={self.ageing} is not allowed with by={self.by!r}, which does not age")
        if self.tiers and self.by == "priority":
            raise ValueError("tiers=True is not allowed with by='priority': all in a tier have the same")
        if self.max_wait is not None and not self.max_wait >= 0:
            raise ValueError(f"max_wait={self.max_wait} is not allowed: it must be >= 0 or None")
        for client_id, weight in self.client_weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"client_weights[{client_id!r}]={weight} is not allowed: it must be a number > 0")
        if self.prefix_tokens < 1:
            raise ValueError(f"prefix_tokens={self.prefix_tokens} is not allowed: it must be >= 1")
        if not (math.isfinite(self.assumed_timeout) and self.assumed_timeout > 0):
            raise ValueError(f"assumed_timeout={self.assumed_timeout} is not allowed: it must be a finite number > 0")


ORDERS: dict[str, QueueOrder] = {
    "fcfs": QueueOrder(by="arrival"),
    "priority": QueueOrder(by="priority", ageing=0.1),
    "sjf": QueueOrder(by="length", ageing=20.0),
    "fair": QueueOrder(by="client"),
    "prefix": QueueOrder(by="prefix", max_wait=2.0),
    "deadline": QueueOrder(by="deadline"),
    "priority-fair": QueueOrder(by="client", tiers=True, max_wait=30.0),
}


def resolve_order(order: str | QueueOrder) -> QueueOrder:
    """A row of ``ORDERS`` by name, or the order itself. Raises ValueError that lists the names."""
    if isinstance(order, QueueOrder):
        return order
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not known: it must be one of {', '.join(ORDERS)}")
    return ORDERS[order]


def make_queue(order: QueueOrder, predictor: LengthPredictor) -> WaitingQueue:
    """The queue of an order; ``predictor`` is asked under "length" for requests that do not say their own."""

    def tier() -> WaitingQueue:
        if order.by == "client":
            return FairQueue(order.client_weights)
        if order.by == "prefix":
            return PrefixQueue(order.prefix_tokens)
        return KeyedQueue(_key(order, predictor), ranks_victims=order.by == "priority")

    queue: WaitingQueue = TieredQueue(tier) if order.tiers else tier()
    return queue if order.max_wait is None else BoundedWaitQueue(queue, order.max_wait)


def _key(order: QueueOrder, predictor: LengthPredictor) -> Callable[[Request], float]:
    """What the smallest of goes first. Ordering by x - ageing * waited is ordering by x + ageing * the time of arrival,
    which never changes, so that a heap holds it."""
    ageing = order.ageing

    def priority(request: Request) -> float:
        return request.scheduling.priority + ageing * request.queue_time

    def length(request: Request) -> float:
        work = INPUT_TOKEN_COST * request.num_prompt_tokens
        work += OUTPUT_TOKEN_COST * expected_output_tokens(request, predictor)
        return work + ageing * request.queue_time

    def deadline(request: Request) -> float:
        at = request.next_deadline
        return request.queue_time + order.assumed_timeout if at is None else at

    def arrival(request: Request) -> float:
        return request.queue_time

    return {"priority": priority, "length": length, "deadline": deadline}.get(order.by, arrival)
