"""The queues behind the orders: who waits and who is next. Every operation costs O(log waiting), amortized.

``add`` is for a request that comes, ``put_back`` for one that was taken and could not stay, or lost its blocks: it goes
where its ``queue_time`` and ``queue_number`` put it. Heaps delete lazily: an entry that is no longer the request's
latest is skipped when it comes up, and a heap that is mostly such entries is rebuilt.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

from pagedattn.engine.request import Request

# An output token costs a whole step of the request's, an input token a share of one: the weights of the OSDI'24 paper.
INPUT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0
OVERDUE_EVERY = 4
_MAX_IDLE_CLIENTS = 1024


class WaitingQueue(ABC):
    """What the scheduler needs of a queue. Iteration is in no particular order."""

    @abstractmethod
    def add(self, request: Request) -> None: ...

    @abstractmethod
    def put_back(self, request: Request) -> None: ...

    @abstractmethod
    def take(self, now: float) -> Request:
        """Remove who is next. There must be one."""

    @abstractmethod
    def remove(self, request: Request) -> bool:
        """False when it does not wait here."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Request]: ...

    def mark_turn(self) -> Callable[[], None]:
        """Returns what sets back whose turn it is, as joinings from now on change it; accounts aside."""
        return lambda: None

    @property
    def ranks_victims(self) -> bool:
        """Whether ``rank`` says who should give up its blocks first; else the one that started last does."""
        return False

    def rank(self, request: Request) -> float:
        """The higher, the sooner it is preempted."""
        raise NotImplementedError

    @property
    def accounts(self) -> bool:
        """Whether ``joined`` and ``served`` matter."""
        return False

    def joined(self, request: Request) -> None:  # noqa: B027  most orders do not keep accounts
        """The request, taken before, runs now."""

    def withdrawn(self, request: Request) -> None:  # noqa: B027  most orders do not keep accounts
        """The request joined, but before a step had it, its joining was undone; ``put_back`` follows."""

    def served(self, request: Request) -> None:  # noqa: B027  most orders do not keep accounts
        """The request got an output token."""


class KeyedQueue(WaitingQueue):
    """The smallest key first, then who came first. A request's key must not change while it waits."""

    def __init__(self, key: Callable[[Request], float], *, ranks_victims: bool = False) -> None:
        self._key = key
        self._ranks_victims = ranks_victims
        self._heap: list[tuple[float, int, int, Request]] = []
        self._entries: dict[Request, int] = {}  # the number of each request's entry
        self._num_entries = 0

    def add(self, request: Request) -> None:
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        key = self._key(request)  # before anything is changed: a predictor may raise
        self._num_entries += 1
        self._entries[request] = self._num_entries
        heapq.heappush(self._heap, (key, request.queue_number, self._num_entries, request))

    def take(self, now: float) -> Request:
        self._drop_dead()
        request = heapq.heappop(self._heap)[3]
        del self._entries[request]
        return request

    def peek(self) -> Request:
        """Who is next. There must be one."""
        self._drop_dead()
        return self._heap[0][3]

    def smallest_key(self) -> float:
        """The key of who is next, as it was when the request came. There must be one."""
        self._drop_dead()
        return self._heap[0][0]

    def remove(self, request: Request) -> bool:
        if self._entries.pop(request, None) is None:
            return False
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)
        return True

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._entries)

    def __contains__(self, request: object) -> bool:
        return request in self._entries

    @property
    def ranks_victims(self) -> bool:
        return self._ranks_victims

    def rank(self, request: Request) -> float:
        return self._key(request)

    def _drop_dead(self) -> None:
        heap, entries = self._heap, self._entries
        while entries.get(heap[0][3]) != heap[0][2]:
            heapq.heappop(heap)


def _by_arrival(request: Request) -> float:
    return request.queue_time


class FairQueue(WaitingQueue):
    """Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).

    A client's counter is the service it got, over its weight: its prompt's tokens when a request joins, each output
    token when it comes. The client with the smallest counter is next, first come first served within. A client that had
    nobody waiting is lifted to the smallest counter of those that have, or of who left last, so that nobody saves up
    service by staying away. A prompt is charged once: what a preemption computes again is the engine's own cost.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, KeyedQueue] = {}  # of clients that have somebody waiting
        self._heap: list[tuple[float, str]] = []
        # Of each client's live entry in the heap, the counter: it may be out of date, and is then too low.
        self._entries: dict[str, float] = {}
        self._last_to_leave = ""
        self._num_requests = 0

    def add(self, request: Request) -> None:
        client_id = request.scheduling.client_id
        if client_id not in self._waiting:
            floor = self._floor()
            self._counters[client_id] = max(self._counters.get(client_id, 0.0), floor)
            if len(self._counters) > 2 * len(self._waiting) + _MAX_IDLE_CLIENTS:
                self._forget_idle(floor)
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        client_id = request.scheduling.client_id
        queue = self._waiting.get(client_id)
        if queue is None:
            self._counters.setdefault(client_id, self._floor())
            queue = self._waiting[client_id] = KeyedQueue(_by_arrival)
        queue.put_back(request)
        self._num_requests += 1
        if client_id not in self._entries:
            self._push(client_id)

    def take(self, now: float) -> Request:
        client_id = self._next_client()
        queue = self._waiting[client_id]
        request = queue.take(now)
        self._left(client_id, queue)
        return request

    def remove(self, request: Request) -> bool:
        client_id = request.scheduling.client_id
        queue = self._waiting.get(client_id)
        if queue is None or not queue.remove(request):
            return False
        self._left(client_id, queue)
        return True

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        for queue in self._waiting.values():
            yield from queue

    @property
    def accounts(self) -> bool:
        return True

    def joined(self, request: Request) -> None:
        if not request.is_billed:
            request.is_billed = True
            self._charge(request.scheduling.client_id, INPUT_TOKEN_COST * request.num_prompt_tokens)

    def withdrawn(self, request: Request) -> None:
        if not request.num_preemptions:  # else an earlier joining was charged, which had its step
            request.is_billed = False
            client_id = request.scheduling.client_id
            self._charge(client_id, -INPUT_TOKEN_COST * request.num_prompt_tokens)
            if self._entries.get(client_id, -math.inf) > self.counter(client_id):
                self._push(client_id)

    def served(self, request: Request) -> None:
        self._charge(request.scheduling.client_id, OUTPUT_TOKEN_COST)

    def counter(self, client_id: str) -> float:
        """The client's service over its weight; 0 for one that is not known."""
        return self._counters.get(client_id, 0.0)

    def _charge(self, client_id: str, cost: float) -> None:
        counter = self._counters.get(client_id)
        if counter is None:  # forgotten as no more than the others', while a request of its ran
            counter = self._floor()
        self._counters[client_id] = counter + cost / self._weights.get(client_id, 1.0)

    def _next_client(self) -> str:
        heap, counters = self._heap, self._counters
        while True:
            counter, client_id = heap[0]
            if counter != self._entries.get(client_id):
                heapq.heappop(heap)
            elif client_id not in self._waiting:
                heapq.heappop(heap)
                del self._entries[client_id]
            elif counter != counters[client_id]:
                self._entries[client_id] = counters[client_id]
                heapq.heapreplace(heap, (counters[client_id], client_id))
            else:
                return client_id

    def _push(self, client_id: str) -> None:
        self._entries[client_id] = self._counters[client_id]
        heapq.heappush(self._heap, (self._counters[client_id], client_id))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(counter, client_id) for client_id, counter in self._entries.items()]
            heapq.heapify(self._heap)

    def _left(self, client_id: str, queue: KeyedQueue) -> None:
        self._num_requests -= 1
        if not queue:
            del self._waiting[client_id]
            self._last_to_leave = client_id

    def _floor(self) -> float:
        """What a client that comes back has had at least."""
        return self.counter(self._next_client() if self._waiting else self._last_to_leave)

    def _forget_idle(self, floor: float) -> None:
        """Counters at or below the floor say nothing: their clients would be lifted to it."""
        self._counters = {
            client_id: counter
            for client_id, counter in self._counters.items()
            if counter > floor or client_id in self._waiting
        }


class PrefixQueue(WaitingQueue):
    """Requests whose prompts begin alike, one after the other, then those of whoever has waited longest."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._everyone = KeyedQueue(_by_arrival)
        self._groups: dict[tuple[int, ...], KeyedQueue] = {}
        self._current: tuple[int, ...] = ()

    def add(self, request: Request) -> None:
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        self._everyone.put_back(request)
        prefix = self._prefix(request)
        if prefix not in self._groups:
            self._groups[prefix] = KeyedQueue(_by_arrival)
        self._groups[prefix].put_back(request)

    def take(self, now: float) -> Request:
        group = self._groups.get(self._current)
        request = (self._everyone if group is None else group).peek()
        self.remove(request)
        return request

    def remove(self, request: Request) -> bool:
        if not self._everyone.remove(request):
            return False
        prefix = self._prefix(request)
        group = self._groups[prefix]
        group.remove(request)
        if not group:
            del self._groups[prefix]
        return True

    def __len__(self) -> int:
        return len(self._everyone)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._everyone)

    def mark_turn(self) -> Callable[[], None]:
        current = self._current

        def set_back() -> None:
            self._current = current

        return set_back

    def joined(self, request: Request) -> None:
        self._current = self._prefix(request)

    def _prefix(self, request: Request) -> tuple[int, ...]:
        return tuple(request.token_ids[: min(self._num_tokens, request.num_prompt_tokens)])


class TieredQueue(WaitingQueue):
    """One queue for each priority; who waits in a lower one is next."""

    def __init__(self, make_tier: Callable[[], WaitingQueue]) -> None:
        self._make_tier = make_tier
        self._tiers: dict[int, WaitingQueue] = {}
        self._occupied: list[int] = []  # a heap of the priorities that may have somebody
        self._in_heap: set[int] = set()
        self._num_requests = 0

    def add(self, request: Request) -> None:
        self._tier_to_fill(request).add(request)
        self._num_requests += 1

    def put_back(self, request: Request) -> None:
        self._tier_to_fill(request).put_back(request)
        self._num_requests += 1

    def take(self, now: float) -> Request:
        while not self._tiers[self._occupied[0]]:
            self._in_heap.remove(heapq.heappop(self._occupied))
        self._num_requests -= 1
        return self._tiers[self._occupied[0]].take(now)

    def remove(self, request: Request) -> bool:
        tier = self._tiers.get(request.scheduling.priority)
        if tier is None or not tier.remove(request):
            return False
        self._num_requests -= 1
        return True

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        for tier in self._tiers.values():
            yield from tier

    def mark_turn(self) -> Callable[[], None]:
        marks = [self._tiers[priority].mark_turn() for priority in self._occupied]

        def set_back() -> None:
            for mark in marks:
                mark()

        return set_back

    @property
    def ranks_victims(self) -> bool:
        return True

    def rank(self, request: Request) -> float:
        return request.scheduling.priority

    @property
    def accounts(self) -> bool:
        return any(tier.accounts for tier in self._tiers.values())

    def joined(self, request: Request) -> None:
        self._tiers[request.scheduling.priority].joined(request)

    def withdrawn(self, request: Request) -> None:
        self._tiers[request.scheduling.priority].withdrawn(request)

    def served(self, request: Request) -> None:
        self._tiers[request.scheduling.priority].served(request)

    def _tier_to_fill(self, request: Request) -> WaitingQueue:
        priority = request.scheduling.priority
        tier = self._tiers.get(priority)
        if tier is None:
            tier = self._tiers[priority] = self._make_tier()
        if priority not in self._in_heap:
            self._in_heap.add(priority)
            heapq.heappush(self._occupied, priority)
        return tier


class BoundedWaitQueue(WaitingQueue):
    """Another queue, but every fourth request that is taken is the one that has waited longest, once that is overdue.

    So a request with n ahead of it in order of arrival joins at the latest as the 4 (n + 1)th after it became overdue,
    whatever the order behind.
    """

    def __init__(self, inner: WaitingQueue, max_wait: float) -> None:
        self._inner = inner
        self._max_wait = max_wait
        self._by_arrival = KeyedQueue(_by_arrival)
        self._num_since_overdue = 0

    def add(self, request: Request) -> None:
        self._inner.add(request)
        self._by_arrival.add(request)

    def put_back(self, request: Request) -> None:
        self._inner.put_back(request)
        self._by_arrival.put_back(request)

    def take(self, now: float) -> Request:
        if self._num_since_overdue + 1 >= OVERDUE_EVERY:
            request = self._by_arrival.peek()
            if now - request.queue_time > self._max_wait:
                self.remove(request)
                return request
        request = self._inner.take(now)
        self._by_arrival.remove(request)
        return request

    def remove(self, request: Request) -> bool:
        return self._by_arrival.remove(request) and self._inner.remove(request)

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_arrival)

    @property
    def ranks_victims(self) -> bool:
        return self._inner.ranks_victims

    def rank(self, request: Request) -> float:
        return self._inner.rank(request)

    @property
    def accounts(self) -> bool:
        return self._inner.accounts

    def mark_turn(self) -> Callable[[], None]:
        num_since_overdue, set_inner_back = self._num_since_overdue, self._inner.mark_turn()

        def set_back() -> None:
            self._num_since_overdue = num_since_overdue
            set_inner_back()

        return set_back

    def joined(self, request: Request) -> None:
        # Who was overdue is not told apart from who was next anyway: both count as the longest overdue when they are.
        overdue_first = not self._by_arrival or request.queue_time <= self._by_arrival.peek().queue_time
        self._num_since_overdue = 0 if overdue_first else self._num_since_overdue + 1
        self._inner.joined(request)

    def withdrawn(self, request: Request) -> None:
        self._inner.withdrawn(request)

    def served(self, request: Request) -> None:
        self._inner.served(request)
