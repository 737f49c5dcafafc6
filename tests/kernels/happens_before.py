"""Races in shared memory, found by happens-before (vector clocks) while the Gluon interpreter runs a thread block.

An access raises ``RaceError`` where no order holds it against those before it, whether or not chance brought about the
wrong one. Agents are the block's threads (its own and one a partition) and its barriers; each counts its epochs. What
is ordered before a thread's next step is, of each agent, the epochs up to one:

- who waits for a barrier's phase learns what those who arrived in it knew;
- a copy is a write by the barrier that is told of its end, in the epoch of that phase, from when it is asked for: only
  who waited for the phase is behind it, not even who asked for it;
- a product reads its operands until it is waited for: they must be complete when it starts, and their reader is done
  at the wait;
- stores, and copies made by threads, are seen by products and by the copy engine behind ``fence_async_shared`` alone,
  which may stand at either end of the way from one to the other.

A partition counts as one thread: nothing is found out about the order of its warps (Triton's own barriers, and
``synchronize``), nor about global memory.

Vector clocks with the last write and reads of each place: FastTrack (Flanagan and Freund, 2009).
"""

from __future__ import annotations

import linecache
import threading
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

THREADS = 5  # of a block: its own, then one a partition
AGENTS = 256  # threads, then barriers
ORDERED, FENCED = range(2)  # what is ordered before; that of it which products and the copy engine see
UNTOLD = (1 << 22) * AGENTS + AGENTS - 1  # a write whose end no barrier has been told of

Known = NDArray[np.int32]  # [ORDERED and FENCED, AGENTS]: the last epoch of each


class RaceError(Exception):
    """Two accesses that nothing orders."""


def nothing() -> Known:
    return np.zeros((2, AGENTS), np.int32)


class Order:
    """The agents of a thread block, and one lock for all that they share."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.histories: list[History] = []
        self._names = dict.fromkeys(range(THREADS), "")

    def start(self, thread: int, name: str, known: Known) -> Clock:
        assert thread < THREADS, "more partitions than THREADS allows"
        self._names[thread] = name
        return Clock(thread, known)

    def add_barrier(self, name: str) -> int:
        agent = len(self._names)
        assert agent < AGENTS - 1, "more barriers than AGENTS allows"
        self._names[agent] = f"a copy that tells {name}"
        return agent

    def name(self, agent: int) -> str:
        return self._names.get(agent, "a copy that tells no barrier")

    def end(self, clock: Clock) -> None:
        """The block ends: its memory is no longer its own."""
        for history in self.histories:
            history.check_writes(clock.known[ORDERED], "the block ends")


class Clock:
    """What one thread knows."""

    def __init__(self, agent: int, known: Known) -> None:
        self.agent, self.known = agent, known.copy()
        self.known[ORDERED, agent] += 1

    @property
    def epoch(self) -> int:
        return int(self.known[ORDERED, self.agent])

    def tell(self) -> Known:
        """What others learn of this moment. What the thread does later is told apart from it."""
        told = self.known.copy()
        self.known[ORDERED, self.agent] += 1
        return told

    def learn(self, known: Known) -> None:
        np.maximum(self.known, known, out=self.known)

    def fence(self) -> None:
        self.known[FENCED] = self.tell()[ORDERED]


class History:
    """Of each element of shared memory: the last write (epoch * AGENTS + agent), and each thread's last read since."""

    def __init__(self, order: Order, name: str, cells: Tensor) -> None:
        self.order, self.name, self.cells = order, name, cells  # int32 [1 + THREADS, ...]

    @classmethod
    def of(cls, order: Order, name: str, shape: list[int]) -> History:
        history = cls(order, name, torch.zeros(1 + THREADS, *shape, dtype=torch.int32))
        order.histories.append(history)
        return history

    def read(self, clock: Clock, known: NDArray[np.int32]) -> None:
        """A read by a thread, with what was known as it began."""
        with self.order.condition:
            reader = self.order.name(clock.agent)
            if not self.check_writes(known, f"{reader} reads it"):
                raise RaceError(f"{reader} reads {self.name}, which nobody has written")
            self.cells.numpy()[1 + clock.agent] = clock.epoch

    def write(self, clock: Clock, what: int, agent: int, epoch: int) -> None:
        """A write by an agent, begun by a thread. ``what``: ORDERED, or FENCED if the copy engine is who writes."""
        with self.order.condition:
            writer = self.order.name(clock.agent)
            self.check_writes(clock.known[what], f"{writer} writes it")
            cells = self.cells.numpy()  # operators on these cost half of torch's
            last_reads = cells[1:].max(axis=tuple(range(1, cells.ndim)))
            late = last_reads > clock.known[ORDERED, :THREADS]
            if late.any():
                reader = self.order.name(int(late.argmax()))
                raise RaceError(f"{writer} writes {self.name}, which {reader} may still read")
            cells[0] = epoch * AGENTS + agent
            if last_reads.any():
                cells[1:] = 0

    def tell(self, agent: int, epoch: int) -> None:
        """A barrier is told of the end of writes that none had been told of."""
        with self.order.condition:
            self.cells.numpy()[0] = epoch * AGENTS + agent

    def check_writes(self, known: NDArray[np.int32], then: str) -> bool:
        """That all are ordered before what follows. Returns whether each element has been written."""
        writes = self.cells.numpy()[0]
        first, last = writes.min(), writes.max()
        if first == last:  # as a rule: one to look up
            writes = writes.flat[:1]
        late = writes[known[writes % AGENTS] < writes // AGENTS]
        if late.size:
            raise RaceError(
                f"{self.name} is written by {self.order.name(int(late[0]) % AGENTS)}, unordered, and {then}"
            )
        return bool(first)


def assigned(frame: FrameType) -> str:
    """The name that a frame is about to give a value."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).partition("=")[0].strip()
