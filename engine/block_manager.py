"""``BlockManager``: which KV-cache block belongs to whom. Imports no torch.

The cache is ``num_blocks`` blocks of ``block_size`` token slots. A block is either free or in the ``block_ids`` of
exactly one holder. ``ensure`` gives a holder enough blocks for a number of tokens or, when there are too few, changes
nothing.
"""

from __future__ import annotations

from typing import Protocol


class BlockHolder(Protocol):
    """What the block manager needs of a request."""

    request_id: str
    block_ids: list[int]


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} is not allowed: it must be >= 1")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} is not allowed: it must be >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: what was freed last is reused first, while a CPU's cache still holds it. The lowest ids come first.
        self._free_ids = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[str, BlockHolder] = {}

    @property
    def num_free(self) -> int:
        return len(self._free_ids)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free_ids)

    @property
    def capacity(self) -> int:
        """Token slots in all blocks together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def ensure(self, holder: BlockHolder, num_tokens: int) -> bool:
        """Make ``holder`` hold blocks for ``num_tokens`` tokens; False, and no change, when too few are free."""
        num_missing = self.blocks_for(num_tokens) - len(holder.block_ids)
        if num_missing <= 0:
            return True
        if num_missing > len(self._free_ids):
            return False
        self._holders[holder.request_id] = holder
        holder.block_ids.extend(reversed(self._free_ids[-num_missing:]))
        del self._free_ids[-num_missing:]
        return True

    def free(self, holder: BlockHolder) -> None:
        """Take back all blocks of ``holder``; nothing to do when it has none."""
        if self._holders.pop(holder.request_id, None) is None:
            return
        self._free_ids.extend(reversed(holder.block_ids))
        holder.block_ids.clear()

    def check_integrity(self) -> None:
        """Every block is free or held, once. Raises AssertionError with what is wrong."""
        held_ids = [block_id for holder in self._holders.values() for block_id in holder.block_ids]
        everything = self._free_ids + held_ids
        assert len(everything) == self.num_blocks, f"{len(everything)} blocks of {self.num_blocks} are accounted for"
        distinct = set(everything)
        assert len(distinct) == len(everything), "a block is held twice, or held and free"
        assert distinct == set(range(self.num_blocks)), "a block id is out of range"
        for request_id, holder in self._holders.items():
            assert holder.request_id == request_id, f"holder {request_id} is filed under another name"
            assert holder.block_ids, f"holder {request_id} is known but holds no block"
