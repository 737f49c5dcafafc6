"""``BlockPool``: each block's number of holders, what it has cached, and in which order free blocks are given out.

A free block may still hold tokens that another request can use. So blocks without such tokens are given out first, then
the cached ones that were freed longest ago, and last of all those that a waiting request is known to want.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from pagedattn.engine.prefix_tree import NO_BLOCK, PrefixNode, PrefixTree


class BlockPool:
    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self.tree = PrefixTree(num_groups)
        self.num_holders = [0] * num_blocks
        self._nodes: list[PrefixNode | None] = [None] * num_blocks
        # A stack: what was freed last is reused first, while a CPU's cache still holds it. The lowest ids come first.
        self._empty_ids = list(range(num_blocks - 1, -1, -1))
        self._cached_ids: OrderedDict[int, None] = OrderedDict()  # the one freed longest ago first
        self._wanted_ids: OrderedDict[int, None] = OrderedDict()  # likewise; cached, and a waiting request wants them
        self._num_wanting: dict[bytes, int] = {}  # waiting requests by the digest of a block that they will need
        self.num_found = 0  # blocks that waiting requests want and that are cached
        self.num_changes = 0  # of what waiting requests could find: grows when it may be another

    @property
    def num_free(self) -> int:
        return len(self._empty_ids) + len(self._cached_ids) + len(self._wanted_ids)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """So many free blocks, each for one holder and with nothing cached. There must be as many."""
        empty_ids = self._empty_ids
        num_left = max(0, len(empty_ids) - count)
        block_ids = empty_ids[num_left:]
        block_ids.reverse()
        del empty_ids[num_left:]
        while len(block_ids) < count:
            block_id, _ = (self._cached_ids or self._wanted_ids).popitem(last=False)
            self._forget_node(block_id)
            block_ids.append(block_id)
        for block_id in block_ids:
            self.num_holders[block_id] = 1
        return block_ids

    def share(self, block_id: int) -> None:
        """One holder more for a block that is held, or free and cached."""
        if self.num_holders[block_id] == 0:
            node = self._nodes[block_id]
            assert node is not None, f"block {block_id} is free and holds nothing to share"
            del self._free_list(node)[block_id]
        self.num_holders[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """One holder less for each, in this order."""
        num_holders, nodes, empty_ids = self.num_holders, self._nodes, self._empty_ids
        for block_id in block_ids:
            num_holders[block_id] -= 1
            if num_holders[block_id]:
                continue
            node = nodes[block_id]
            if node is None:
                empty_ids.append(block_id)
            else:
                self._free_list(node)[block_id] = None

    def cache(self, block_id: int, node: PrefixNode, group: int) -> None:
        """The block holds the node's tokens from now on, unless another block of the group does already."""
        if node.block_ids[group] == NO_BLOCK and self._nodes[block_id] is None:
            self.num_found += not node.has_block and node.digest in self._num_wanting
            node.block_ids[group] = block_id
            self._nodes[block_id] = node

    def uncache(self, block_ids: Iterable[int]) -> None:
        """Nobody else may use what these blocks hold."""
        for block_id in block_ids:
            node = self._nodes[block_id]
            if node is None:
                continue
            if self.num_holders[block_id] == 0:
                del self._free_list(node)[block_id]
                self._empty_ids.append(block_id)
            self._forget_node(block_id)

    def uncache_free(self) -> None:
        """Nobody may use what free blocks hold."""
        self.uncache([*self._cached_ids, *self._wanted_ids])

    def want(self, digests: Iterable[bytes]) -> None:
        """A waiting request will need the blocks of these digests."""
        for digest in digests:
            count = self._num_wanting.get(digest, 0)
            self._num_wanting[digest] = count + 1
            if count == 0:
                self._move(digest, self._cached_ids, self._wanted_ids)
                self.num_found += self._is_cached(digest)

    def unwant(self, digests: Iterable[bytes]) -> None:
        """Takes one ``want`` of the same digests back."""
        for digest in digests:
            self._num_wanting[digest] -= 1
            if self._num_wanting[digest] == 0:
                del self._num_wanting[digest]
                self._move(digest, self._wanted_ids, self._cached_ids)
                self.num_found -= self._is_cached(digest)

    def note_change(self, digest: bytes | None) -> None:
        """The block of this digest came, went, or is computed by somebody else or nobody now."""
        self.num_changes += digest in self._num_wanting

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is lost, counted twice, or in the wrong list."""
        self.tree.check_integrity()
        free_ids = [*self._empty_ids, *self._cached_ids, *self._wanted_ids]
        assert len(set(free_ids)) == len(free_ids), "a block is free twice"
        held = [block_id for block_id, count in enumerate(self.num_holders) if count]
        assert all(count >= 0 for count in self.num_holders), "a block was released more often than held"
        assert sorted(free_ids + held) == list(range(self.num_blocks)), "a block is lost, or held and free"
        for block_id in self._empty_ids:
            assert self._nodes[block_id] is None, f"block {block_id} is free as empty and holds cached tokens"
        for free_list in (self._cached_ids, self._wanted_ids):
            for block_id in free_list:
                node = self._nodes[block_id]
                assert node is not None, f"block {block_id} is free as cached and holds nothing"
                assert self._free_list(node) is free_list, f"block {block_id} is in the wrong free list"
        cached = {(block_id, id(node)) for block_id, node in enumerate(self._nodes) if node is not None}
        known = {
            (block_id, id(node)) for node in self.tree.nodes.values() for block_id in node.block_ids if block_id >= 0
        }
        assert cached == known, "the tree and the blocks disagree on what is cached"
        num_found = sum(map(self._is_cached, self._num_wanting))
        assert num_found == self.num_found, f"{self.num_found} wanted blocks said to be cached, {num_found} are"

    def _free_list(self, node: PrefixNode) -> OrderedDict[int, None]:
        return self._wanted_ids if node.digest in self._num_wanting else self._cached_ids

    def _is_cached(self, digest: bytes) -> bool:
        node = self.tree.nodes.get(digest)
        return node is not None and node.has_block

    def _forget_node(self, block_id: int) -> None:
        node = self._nodes[block_id]
        assert node is not None
        node.block_ids[node.block_ids.index(block_id)] = NO_BLOCK
        self._nodes[block_id] = None
        self.num_found -= not node.has_block and node.digest in self._num_wanting
        self.note_change(node.digest)
        self.tree.prune(node)

    def _move(self, digest: bytes, source: OrderedDict[int, None], target: OrderedDict[int, None]) -> None:
        node = self.tree.nodes.get(digest)
        for block_id in node.block_ids if node is not None else ():
            if block_id in source:
                del source[block_id]
                target[block_id] = None
