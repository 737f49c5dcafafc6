"""``BlockManager``: which KV-cache block belongs to whom. Imports no torch.

The cache is ``num_blocks`` blocks of ``block_size`` token slots. With layers of several kinds (layer_groups.py) each of
``G`` groups has a block of its own for the same tokens, all from one pool: a holder's ``block_ids[j * G + g]`` is where
group g keeps its tokens from j * block_size on, or NO_BLOCK where the group's window has left them behind.

``find_prefix`` and ``admit`` give a request what is there (cached by its hash chain, a sibling's, or its own in host
memory), ``ensure`` gives it empty blocks, ``preempt`` and ``free`` take all back. ``commit`` tells which tokens are
computed, so that others can share them. What says no has changed nothing.

What must be copied before the next step runs is collected, and handed out by ``take_transfers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedattn.engine.block_pool import BlockPool
from pagedattn.engine.layer_groups import peak_blocks
from pagedattn.engine.prefix_finder import (
    NOTHING_CACHED,
    BlockHolder,
    CachedPrefix,
    PrefixFinder,
    Readiness,
    first_seen_block,
    hashes_of,
    num_shareable_blocks,
)
from pagedattn.engine.prefix_tree import NO_BLOCK, PrefixNode
from pagedattn.engine.swap_space import PreemptionKind, SwapSpace


@dataclass(frozen=True, slots=True)
class BlockTransfers:
    """Copies of whole blocks, pairs of (source, destination), to be made in this order before a step."""

    swap_out: tuple[tuple[int, int], ...] = ()  # device to host
    copy: tuple[tuple[int, int], ...] = ()  # device to device; all are read before any is written
    swap_in: tuple[tuple[int, int], ...] = ()  # host to device

    def __bool__(self) -> bool:
        return bool(self.swap_out or self.copy or self.swap_in)


@dataclass(slots=True)
class _Holding:
    holder: BlockHolder
    admitted_in: int  # number of the schedule
    first_seen: list[int]  # of each group, the first block that its window has not left behind
    node: PrefixNode | None = None  # of the last block that others can share
    num_shareable: int = 0  # blocks up to it
    may_share_more: bool = True
    computes: bytes | None = None  # digest of the full block that it computes next


class BlockManager:
    """``windows``: each group's sliding window, None for full attention. ``swap_space``: None has no room."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        windows: Sequence[int | None] = (None,),
        enable_prefix_caching: bool = False,
        swap_space: SwapSpace | None = None,
    ) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("len(windows)", len(windows))):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.num_groups = len(windows)
        self.enable_prefix_caching = enable_prefix_caching
        self.swap_space = SwapSpace() if swap_space is None else swap_space
        self.num_swapped_out = 0  # preemptions
        self._has_windows = any(window is not None for window in windows)
        self._pool = BlockPool(num_blocks, self.num_groups)
        self._holdings: dict[str, _Holding] = {}
        self._computing: dict[bytes, str] = {}  # who computes the full block of a digest
        self._finder = PrefixFinder(
            self._pool,
            self.swap_space,
            self._computing,
            block_size=block_size,
            windows=self.windows,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._expected: dict[str, list[bytes]] = {}  # digests that a waiting request will look for
        self._num_schedules = 0
        self._swap_outs: list[tuple[int, int]] = []
        self._copies: dict[int, int] = {}  # source by destination
        self._swap_ins: dict[int, int] = {}
        self._restored: list[str] = []  # requests whose host blocks are free once they are copied back

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those included whose tokens are cached."""
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self._pool.num_used

    @property
    def num_changes(self) -> int:
        """As long as it stays, with nobody admitted, preempted or freed, ``find_prefix`` says of those who wait what it
        said."""
        return self._pool.num_changes

    def least_uncomputed(self, holder: BlockHolder, num_tokens: int) -> int:
        """Of ``num_tokens`` tokens of one who waits, how many it has to compute at least, as long as
        ``finds_nothing_cached``."""
        may_find = holder.siblings or holder.request_id in self.swap_space
        return 1 if may_find else num_tokens

    @property
    def finds_nothing_cached(self) -> bool:
        """No waiting request has the first block of its tokens, or any other, in the prefix cache."""
        return not self._pool.num_found

    @property
    def capacity(self) -> int:
        """Tokens that all blocks together hold."""
        return self.num_blocks // self.num_groups * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens in all groups."""
        return -(-num_tokens // self.block_size) * self.num_groups

    def peak_blocks(self, num_tokens: int, max_step_tokens: int) -> int:
        """The most blocks that a request of ``num_tokens`` tokens holds, computed ``max_step_tokens`` at a time."""
        return peak_blocks(self.windows, self.block_size, num_tokens, max_step_tokens)

    def num_missing(self, prefix: CachedPrefix, num_tokens: int, max_step_tokens: int) -> int:
        """The free blocks that a request with this prefix comes to need until ``num_tokens`` tokens are computed."""
        missing = prefix.num_taken + max(0, self.blocks_for(num_tokens) - len(prefix.block_ids))
        return min(missing, self.peak_blocks(num_tokens, max_step_tokens)) if self._has_windows else missing

    def num_unfilled_slots(self, holder: BlockHolder, num_tokens: int) -> int:
        """Slots in the holder's blocks beyond its first ``num_tokens`` tokens."""
        return len(holder.block_ids) * self.block_size - num_tokens * self.num_groups

    def expect(self, holder: BlockHolder) -> None:
        """The request waits: its tokens are hashed, and what is cached of them is evicted last."""
        if not self.enable_prefix_caching or holder.request_id in self._expected:
            return
        wanted = hashes_of(holder, self.block_size).digests[: num_shareable_blocks(holder, self.block_size)]
        self._expected[holder.request_id] = wanted
        self._pool.want(wanted)

    def find_prefix(self, holder: BlockHolder, *, may_wait: bool = True) -> CachedPrefix | None:
        """What of the request need not be computed; None while somebody computes what it would compute next, unless it
        may not wait for that.

        The last token is always computed, as its logits are what is asked for. Nobody waits in vain: who computes runs,
        and when it stops for any reason the next one takes its place.
        """
        return self._finder.find(holder, self._readiness, may_wait=may_wait)

    def admit(self, holder: BlockHolder, prefix: CachedPrefix, num_tokens: int) -> bool:
        """Give a request its prefix, as ``find_prefix`` has just found it, and blocks for ``num_tokens`` tokens, the
        prefix's included. False, and no change, when too few are free."""
        num_empty = max(0, self.blocks_for(num_tokens) - len(prefix.block_ids))
        if prefix.num_taken + num_empty > self.num_free:
            return False
        assert not holder.block_ids, f"{holder.request_id} is admitted and holds blocks"
        self._unexpect(holder)
        pool, ids = self._pool, holder.block_ids
        for block_id in prefix.block_ids:
            if block_id != NO_BLOCK:
                pool.share(block_id)
        ids.extend(prefix.block_ids)
        for sources, pending in ((prefix.copied, self._copies), (prefix.restored, self._swap_ins)):
            for index, source in sources.items():
                [ids[index]] = pool.allocate(1)
                pending[ids[index]] = source
        if holder.request_id in self.swap_space:
            self._restored.append(holder.request_id)
        ids += pool.allocate(num_empty)
        first_seen = [first_seen_block(window, self.block_size, prefix.num_tokens) for window in self.windows]
        holding = self._holdings[holder.request_id] = _Holding(holder, self._num_schedules, first_seen)
        if self.enable_prefix_caching:
            path = pool.tree.walk(hashes_of(holder, self.block_size), prefix.num_tokens // self.block_size)
            holding.num_shareable = len(path)
            self._move_to(holding, path[-1] if path else None)
            self._announce(holding)
        return True

    def ensure(self, holder: BlockHolder, num_tokens: int) -> bool:
        """Make ``holder`` hold blocks for ``num_tokens`` tokens; False, and no change, when too few are free."""
        num_missing = -(-num_tokens // self.block_size) * self.num_groups - len(holder.block_ids)
        if num_missing <= 0:
            return True
        if holder.request_id not in self._holdings:
            return self.admit(holder, NOTHING_CACHED, num_tokens)
        if num_missing > self.num_free:
            return False
        holder.block_ids += self._pool.allocate(num_missing)
        return True

    def steady_until(self, holder: BlockHolder) -> int:
        """The number of computed tokens at which ``ensure`` or ``commit`` has something to do for it again, when it
        comes to it one by one."""
        if holder.siblings:  # each of its tokens is a change
            return 0
        block_size, num_computed = self.block_size, holder.num_computed_tokens
        until = len(holder.block_ids) // self.num_groups * block_size
        if self.enable_prefix_caching:
            until = min(until, (num_computed // block_size + 1) * block_size)
        for window in self.windows if self._has_windows else ():
            if window is not None:
                num_unseen = first_seen_block(window, block_size, num_computed)
                until = min(until, (num_unseen + 1) * block_size + window - 1)
        return until

    def commit(self, holder: BlockHolder) -> None:
        """More tokens are computed or known: full blocks of known ones can be shared, and what no later token sees is
        free."""
        holding = self._holdings[holder.request_id]
        if self.enable_prefix_caching and _num_full_blocks(holder, self.block_size) > holding.num_shareable:
            self._share_computed(holding)
        if self._has_windows:
            self._release_unseen(holding)
        if holder.siblings:  # they fork from it once its prompt is computed, and as long as windows see the prompt
            self._pool.num_changes += 1

    def preempt(self, holder: BlockHolder, kind: PreemptionKind = "recompute") -> bool:
        """Take back all blocks of a running request. True: its tokens are kept in host memory; False: they are gone."""
        holding = self._holdings[holder.request_id]
        keeps = holder.request_id in self._restored
        if keeps:  # it came back in this very schedule: nothing has been copied yet
            self._restored.remove(holder.request_id)
        elif holding.admitted_in != self._num_schedules and self._prefers_swap(holder, kind):
            stored = self.swap_space.store(
                holder.request_id, holder.block_ids[: self.blocks_for(holder.num_computed_tokens)]
            )
            keeps = stored is not None
            self._swap_outs += stored or ()
            self.num_swapped_out += keeps
        self._release_all(holding)
        return keeps

    def discard_swapped(self, holder: BlockHolder) -> None:
        """What a swapped request has in host memory is not to be trusted: it starts again."""
        if holder.request_id in self.swap_space:
            self.swap_space.free(holder.request_id)
            holder.num_computed_tokens = 0
            self._pool.num_changes += 1

    def disown(self, holder: BlockHolder) -> None:
        """Nobody may share what the request has computed: it is not to be trusted."""
        holding = self._holdings.get(holder.request_id)
        if holding is not None:
            holding.may_share_more = False
            node = holding.node
        else:  # preempted
            path = self._pool.tree.walk(hashes_of(holder, self.block_size), len(holder.token_ids))
            node = path[-1] if path else None
        while node is not None:
            self._pool.uncache([block_id for block_id in node.block_ids if block_id != NO_BLOCK])
            node = node.parent

    def free(self, holder: BlockHolder) -> None:
        """The request is gone, wherever it was; nothing to do when it is unknown."""
        holding = self._holdings.get(holder.request_id)
        if holding is not None:
            self._release_all(holding)
        self._unexpect(holder)
        self.swap_space.free(holder.request_id)

    def take_transfers(self) -> BlockTransfers:
        """What must be copied before the step that was scheduled. Ends a schedule."""
        transfers = BlockTransfers(
            tuple(self._swap_outs),
            tuple((source, block_id) for block_id, source in self._copies.items()),
            tuple((host_id, block_id) for block_id, host_id in self._swap_ins.items()),
        )
        for request_id in self._restored:
            self.swap_space.free(request_id)
        for pending in (self._swap_outs, self._copies, self._swap_ins, self._restored):
            pending.clear()
        self._num_schedules += 1
        return transfers

    def reset_prefix_cache(self) -> None:
        """Forget what free blocks have cached."""
        self._pool.uncache_free()

    def check_integrity(self) -> None:
        """Every block is free, or held by as many as hold it. Raises AssertionError with what is wrong."""
        self._pool.check_integrity()
        self.swap_space.check_integrity()
        num_holders = [0] * self.num_blocks
        for request_id, holding in self._holdings.items():
            holder = holding.holder
            assert holder.request_id == request_id, f"holder {request_id} is filed under another name"
            assert len(holder.block_ids) % self.num_groups == 0, f"{request_id} has unequal groups"
            held = [block_id for block_id in holder.block_ids if block_id != NO_BLOCK]
            assert len(set(held)) == len(held), f"{request_id} holds a block twice"
            for block_id in held:
                num_holders[block_id] += 1
            assert request_id not in self._expected, f"{request_id} holds blocks and waits"
        assert num_holders == self._pool.num_holders, "a block's holders are miscounted"
        assert set(self._computing.values()) <= set(self._holdings), "a block is computed by nobody"
        for block_id in [*self._copies, *self._swap_ins]:
            assert num_holders[block_id] == 1, (
                f"block {block_id} is to be filled and has {num_holders[block_id]} holders"
            )

    def _readiness(self, sibling: BlockHolder) -> Readiness:
        holding = self._holdings.get(sibling.request_id)
        if holding is None or holding.holder is not sibling:  # it ended, and another request has its name
            return "absent"
        # One that has just come back has blocks that are still to be filled.
        is_filled = holding.admitted_in != self._num_schedules
        return "ready" if is_filled and sibling.num_computed_tokens >= sibling.num_prompt_tokens else "computing"

    def _prefers_swap(self, holder: BlockHolder, kind: PreemptionKind) -> bool:
        """Tokens in blocks that others hold too are still there when the victim returns: only the rest is lost."""
        num_tokens, num_kept, num_groups = holder.num_computed_tokens, 0, self.num_groups
        if kind != "cheapest" or self.swap_space.costs is None or not num_tokens:
            return kind == "swap" and num_tokens > 0
        num_holders = self._pool.num_holders
        for start in range(0, self.blocks_for(num_tokens), num_groups):
            if any(num_holders[block_id] < 2 for block_id in holder.block_ids[start : start + num_groups]):
                break
            num_kept += self.block_size
        costs = self.swap_space.costs
        return costs.swap(num_tokens) < costs.recompute(max(0, num_tokens - num_kept))

    def _share_computed(self, holding: _Holding) -> None:
        """Full blocks that are computed now can be found by their hash."""
        holder, tree = holding.holder, self._pool.tree
        hashes = hashes_of(holder, self.block_size)
        num_full = _num_full_blocks(holder, self.block_size)
        self._pool.note_change(holding.computes)
        while holding.may_share_more and holding.num_shareable < num_full:
            index = holding.num_shareable
            node = tree.child(holding.node, hashes.digests[index], hashes.contents[index])
            if node is None:  # other tokens have this digest
                holding.may_share_more = False
                break
            first = index * self.num_groups
            for group, block_id in enumerate(holder.block_ids[first : first + self.num_groups]):
                if block_id != NO_BLOCK:
                    self._pool.cache(block_id, node, group)
            holding.num_shareable += 1
            self._pool.note_change(node.digest)
            self._move_to(holding, node)
        self._announce(holding)

    def _move_to(self, holding: _Holding, node: PrefixNode | None) -> None:
        """The node that the request extends stays in the tree, cached or not."""
        previous, holding.node = holding.node, node
        if node is not None:
            node.num_dependents += 1
        if previous is not None:
            previous.num_dependents -= 1
            self._pool.tree.prune(previous)

    def _announce(self, holding: _Holding) -> None:
        """Whoever comes to the same block waits for the one who computes it."""
        request_id, digest = holding.holder.request_id, None
        if holding.may_share_more and holding.num_shareable < len(hashes_of(holding.holder, self.block_size).digests):
            digest = hashes_of(holding.holder, self.block_size).digests[holding.num_shareable]
        if holding.computes is not None and self._computing.get(holding.computes) == request_id:
            del self._computing[holding.computes]
        if digest is not None:
            self._computing.setdefault(digest, request_id)
        holding.computes = digest

    def _release_unseen(self, holding: _Holding) -> None:
        holder = holding.holder
        for group, first in enumerate(holding.first_seen):
            holding.first_seen[group] = first_seen_block(
                self.windows[group], self.block_size, holder.num_computed_tokens
            )
            for index in range(first, holding.first_seen[group]):
                place = index * self.num_groups + group
                block_id, holder.block_ids[place] = holder.block_ids[place], NO_BLOCK
                if block_id != NO_BLOCK:
                    self._release([block_id])
                    self._pool.num_changes += 1

    def _release(self, block_ids: Sequence[int]) -> None:
        self._pool.release(block_ids)
        if self._copies or self._swap_ins:  # what was to be copied into a block that is free now
            for block_id in block_ids:
                if not self._pool.num_holders[block_id]:
                    self._copies.pop(block_id, None)
                    self._swap_ins.pop(block_id, None)

    def _release_all(self, holding: _Holding) -> None:
        """From the last block on, so that of what stays cached the end is evicted before what leads to it."""
        holder = holding.holder
        holding.may_share_more = False
        self._announce(holding)
        held = holder.block_ids[::-1]
        self._release([block_id for block_id in held if block_id != NO_BLOCK] if self._has_windows else held)
        holder.block_ids.clear()
        self._move_to(holding, None)
        del self._holdings[holder.request_id]

    def _unexpect(self, holder: BlockHolder) -> None:
        self._pool.unwant(self._expected.pop(holder.request_id, ()))


def _num_full_blocks(holder: BlockHolder, block_size: int) -> int:
    """Blocks whose tokens are all computed and known. Of a token that is pending it is only known where it will be."""
    return min(holder.num_computed_tokens, len(holder.token_ids)) // block_size
