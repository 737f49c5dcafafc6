"""``PrefixFinder``: what of a request need not be computed, because somebody has computed it. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pagedattn.engine.block_pool import BlockPool
from pagedattn.engine.prefix_tree import NO_BLOCK, PrefixHashes, PrefixNode
from pagedattn.engine.swap_space import SwapSpace

# Of a sibling: it holds no blocks; its prompt is being computed, or copied in; it can be forked from.
Readiness = Literal["absent", "computing", "ready"]


class BlockHolder(Protocol):
    """What the block manager needs of a request."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    cache_salt: str
    block_ids: list[int]  # the block manager alone changes these two
    prefix_hashes: PrefixHashes | None

    @property
    def siblings(self) -> Sequence[BlockHolder]:
        """Requests of the same prompt, which fork from each other."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The first ``num_tokens`` tokens of a request, which need not be computed, and where they are.

    ``block_ids`` are shared as they are. An entry that is NO_BLOCK gets a block filled from another request's
    (``copied``, by index) or from host memory (``restored``), or has left the window. ``num_taken``: the free blocks
    that this uses up.
    """

    num_tokens: int = 0
    block_ids: Sequence[int] = ()
    copied: dict[int, int] = field(default_factory=dict)
    restored: dict[int, int] = field(default_factory=dict)
    num_taken: int = 0


NOTHING_CACHED = CachedPrefix()


def first_seen_block(window: int | None, block_size: int, num_tokens: int) -> int:
    """The first block that the token after ``num_tokens`` tokens, or a later one, can see."""
    return 0 if window is None else max(0, num_tokens - window + 1) // block_size


def num_shareable_blocks(holder: BlockHolder, block_size: int) -> int:
    """Blocks that it can take from others: the last token is always computed."""
    return (len(holder.token_ids) - 1) // block_size


def hashes_of(holder: BlockHolder, block_size: int) -> PrefixHashes:
    """Of all full blocks of its tokens as they are now."""
    if holder.prefix_hashes is None:
        holder.prefix_hashes = PrefixHashes(block_size, holder.cache_salt)
    holder.prefix_hashes.extend(holder.token_ids)
    return holder.prefix_hashes


class PrefixFinder:
    """``computing``: who computes the full block of a digest at present."""

    def __init__(
        self,
        pool: BlockPool,
        swap_space: SwapSpace,
        computing: Mapping[bytes, str],
        *,
        block_size: int,
        windows: Sequence[int | None],
        enable_prefix_caching: bool,
    ) -> None:
        self._pool = pool
        self._swap_space = swap_space
        self._computing = computing
        self._block_size = block_size
        self._windows = tuple(windows)
        self._num_groups = len(self._windows)
        self._has_windows = any(window is not None for window in windows)
        self._enable_prefix_caching = enable_prefix_caching

    def find(
        self, holder: BlockHolder, readiness: Callable[[BlockHolder], Readiness], *, may_wait: bool
    ) -> CachedPrefix | None:
        """None while somebody computes what the request would compute next, if it ``may_wait`` for it."""
        if holder.request_id in self._swap_space:
            return self._find_swapped(holder)
        forked = self._find_forked(holder, readiness)
        if forked is None and not may_wait:
            forked = NOTHING_CACHED
        if forked is None or not self._enable_prefix_caching:
            return forked
        hashes, num_shareable = hashes_of(holder, self._block_size), num_shareable_blocks(holder, self._block_size)
        path = self._pool.tree.walk(hashes, num_shareable)
        num_hit = self._longest_hit(path)
        if forked.num_tokens and forked.num_tokens >= num_hit * self._block_size:
            return forked
        if may_wait and num_hit < num_shareable and hashes.digests[num_hit] in self._computing:
            return None
        return self._shared(num_hit * self._block_size, [id_ for node in path[:num_hit] for id_ in node.block_ids])

    def _longest_hit(self, path: Sequence[PrefixNode]) -> int:
        """How many of the path's blocks can be taken: the most for which each group has all that it still sees."""
        if not self._has_windows:
            return next((index for index, node in enumerate(path) if NO_BLOCK in node.block_ids), len(path))
        best, cached_since = 0, [0] * self._num_groups
        for index, node in enumerate(path):
            num_tokens = (index + 1) * self._block_size
            for group, block_id in enumerate(node.block_ids):
                if block_id == NO_BLOCK:
                    cached_since[group] = index + 1
            if all(since <= self._first_seen(group, num_tokens) for group, since in enumerate(cached_since)):
                best = index + 1
        return best

    def _shared(self, num_tokens: int, block_ids: list[int], copied: dict[int, int] | None = None) -> CachedPrefix:
        """The prefix in these blocks, without those that the groups' windows have left."""
        if self._has_windows:
            for group in range(self._num_groups):
                for index in range(self._first_seen(group, num_tokens)):
                    block_ids[index * self._num_groups + group] = NO_BLOCK
        return CachedPrefix(num_tokens, block_ids, copied or {}, {}, self._num_revived(block_ids) + len(copied or ()))

    def _num_revived(self, block_ids: Sequence[int]) -> int:
        num_holders = self._pool.num_holders
        return sum(block_id != NO_BLOCK and not num_holders[block_id] for block_id in block_ids)

    def _find_forked(self, holder: BlockHolder, readiness: Callable[[BlockHolder], Readiness]) -> CachedPrefix | None:
        """The prompt as a sibling has it; nothing without one that has; None while one computes it.

        Full blocks are shared. Of the last one the request gets a copy: it writes there at once.
        """
        num_tokens = min(holder.num_prompt_tokens, len(holder.token_ids) - 1)
        is_computed = True
        for sibling in holder.siblings:
            state = readiness(sibling)
            if state != "ready":
                is_computed = is_computed and state == "absent"
                continue
            block_ids = sibling.block_ids[: -(-num_tokens // self._block_size) * self._num_groups]
            if self._has_windows and not self._sees_all(block_ids, num_tokens):
                continue
            copied = {}
            if num_tokens % self._block_size:
                first = (num_tokens // self._block_size) * self._num_groups
                copied = dict(enumerate(block_ids[first:], first))
                block_ids[first:] = [NO_BLOCK] * self._num_groups
            return self._shared(num_tokens, block_ids, copied)
        return NOTHING_CACHED if is_computed else None

    def _sees_all(self, block_ids: Sequence[int], num_tokens: int) -> bool:
        """Whether the blocks that the token after ``num_tokens`` tokens sees are there in every group."""
        return all(
            NO_BLOCK not in block_ids[group :: self._num_groups][self._first_seen(group, num_tokens) :]
            for group in range(self._num_groups)
        )

    def _find_swapped(self, holder: BlockHolder) -> CachedPrefix:
        """All that was computed, from host memory, but for what is still in the cache."""
        path: list[PrefixNode] = []
        if self._enable_prefix_caching:
            num_full = holder.num_computed_tokens // self._block_size
            path = self._pool.tree.walk(hashes_of(holder, self._block_size), num_full)
        block_ids, restored = [], {}
        for index, host_id in enumerate(self._swap_space.table(holder.request_id)):
            block, group = divmod(index, self._num_groups)
            is_wanted = host_id != NO_BLOCK
            block_ids.append(path[block].block_ids[group] if is_wanted and block < len(path) else NO_BLOCK)
            if is_wanted and block_ids[-1] == NO_BLOCK:
                restored[index] = host_id
        num_taken = self._num_revived(block_ids) + len(restored)
        return CachedPrefix(holder.num_computed_tokens, block_ids, {}, restored, num_taken)

    def _first_seen(self, group: int, num_tokens: int) -> int:
        return first_seen_block(self._windows[group], self._block_size, num_tokens)
