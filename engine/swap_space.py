"""Blocks in host memory for preempted requests, and when moving there is cheaper than computing again. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pagedattn.engine.prefix_tree import NO_BLOCK

# What happens to a victim's tokens: computed again, kept in host memory while there is room, or what costs less.
PreemptionKind = Literal["recompute", "swap", "cheapest"]


@dataclass(frozen=True, slots=True)
class PreemptionCosts:
    """Seconds that a preempted request of ``lengths[i]`` tokens in the cache costs, measured on the device.

    ``recompute_seconds``: what a step takes longer for computing the tokens again; ``swap_seconds``: copying the blocks
    out and back. Between the lengths the costs are interpolated, beyond them they grow as between the last two.
    """

    lengths: tuple[int, ...]
    recompute_seconds: tuple[float, ...]
    swap_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) < 2 or self.lengths[0] < 1 or any(b <= a for a, b in pairwise(self.lengths)):
            raise ValueError(f"lengths={self.lengths} is not allowed: at least two, >= 1 and ascending")
        for name in ("recompute_seconds", "swap_seconds"):
            seconds = getattr(self, name)
            if len(seconds) != len(self.lengths) or not all(math.isfinite(value) and value >= 0 for value in seconds):
                raise ValueError(f"{name}={seconds} is not allowed: one finite number >= 0 for each of lengths")

    def recompute(self, num_tokens: int) -> float:
        return self._interpolate(self.recompute_seconds, num_tokens)

    def swap(self, num_tokens: int) -> float:
        return self._interpolate(self.swap_seconds, num_tokens)

    def crossover(self, max_num_tokens: int) -> int | None:
        """The shortest length from which on swapping is cheaper up to ``max_num_tokens``; None when it never is."""
        dearer = [length for length in range(1, max_num_tokens + 1) if self.swap(length) >= self.recompute(length)]
        shortest = dearer[-1] + 1 if dearer else 1
        return shortest if shortest <= max_num_tokens else None

    def _interpolate(self, seconds: Sequence[float], num_tokens: int) -> float:
        right = min(max(bisect_left(self.lengths, num_tokens), 1), len(self.lengths) - 1)
        left = right - 1
        share = (num_tokens - self.lengths[left]) / (self.lengths[right] - self.lengths[left])
        return max(0.0, seconds[left] + share * (seconds[right] - seconds[left]))


class SwapSpace:
    """``num_blocks`` blocks of host memory, and whose tokens are in them. ``costs`` None: swapping is never cheaper."""

    def __init__(self, num_blocks: int = 0, costs: PreemptionCosts | None = None) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} is not allowed: it must be >= 0")
        self.num_blocks = num_blocks
        self.costs = costs
        # The lowest ids come first, in ascending runs: a run of blocks is one copy.
        self._free_ids = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free_ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tables

    def table(self, request_id: str) -> list[int]:
        """The request's host blocks in the places of its device blocks; NO_BLOCK where it had none."""
        return self._tables[request_id]

    def store(self, request_id: str, block_ids: Sequence[int]) -> list[tuple[int, int]] | None:
        """Host blocks for device blocks: pairs (device, host) to copy. None, and no change, when too few are free."""
        num_blocks = sum(block_id != NO_BLOCK for block_id in block_ids)
        if num_blocks > len(self._free_ids):
            return None
        table = [NO_BLOCK if block_id == NO_BLOCK else self._free_ids.pop() for block_id in block_ids]
        self._tables[request_id] = table
        return [(block_id, host_id) for block_id, host_id in zip(block_ids, table, strict=True) if host_id != NO_BLOCK]

    def free(self, request_id: str) -> None:
        """Take back the request's host blocks; nothing to do when it has none."""
        table = self._tables.pop(request_id, ())
        self._free_ids.extend(host_id for host_id in reversed(table) if host_id != NO_BLOCK)

    def check_integrity(self) -> None:
        """Every host block is free or one request's, once. Raises AssertionError."""
        held = [host_id for table in self._tables.values() for host_id in table if host_id != NO_BLOCK]
        assert sorted(self._free_ids + held) == list(range(self.num_blocks)), "host blocks are lost or held twice"
