from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pagedattn.engine.block_manager import BlockManager


@dataclass
class Holder:
    request_id: str
    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0


class BlockManagerMachine(RuleBasedStateMachine):
    """Against a model that only counts: who asked for how many tokens."""

    NUM_BLOCKS, BLOCK_SIZE = 12, 4
    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.NUM_BLOCKS, self.BLOCK_SIZE)
        self.known: list[Holder] = []

    def blocks_needed(self, num_tokens: int) -> int:
        return (num_tokens + self.BLOCK_SIZE - 1) // self.BLOCK_SIZE

    @rule(target=holders)
    def arrive(self) -> Holder:
        holder = Holder(f"request-{len(self.known)}")
        self.known.append(holder)
        return holder

    @rule(holder=holders, num_more=st.integers(0, 30))
    def grow(self, holder: Holder, num_more: int) -> None:
        before, num_free = list(holder.block_ids), self.manager.num_free
        wanted = holder.num_tokens + num_more
        fits = self.blocks_needed(wanted) - len(before) <= num_free
        assert self.manager.ensure(holder, wanted) == fits
        if fits:
            holder.num_tokens = wanted
            assert holder.block_ids[: len(before)] == before
            assert len(holder.block_ids) == self.blocks_needed(wanted)
        else:
            assert holder.block_ids == before
            assert self.manager.num_free == num_free

    @rule(holder=holders, num_tokens=st.integers(0, 10))
    def ask_for_less(self, holder: Holder, num_tokens: int) -> None:
        before = list(holder.block_ids)
        assert self.manager.ensure(holder, min(num_tokens, holder.num_tokens))
        assert holder.block_ids == before

    @rule(holder=consumes(holders))
    def leave(self, holder: Holder) -> None:
        self.manager.free(holder)
        holder.num_tokens = 0
        assert holder.block_ids == []

    @rule(holder=holders)
    def leave_twice(self, holder: Holder) -> None:
        self.manager.free(holder)
        self.manager.free(holder)
        holder.num_tokens = 0

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity()
        num_held = sum(self.blocks_needed(holder.num_tokens) for holder in self.known)
        assert self.manager.num_used == num_held
        assert self.manager.num_free == self.NUM_BLOCKS - num_held


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(4, 16).blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_bad_sizes(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        BlockManager(num_blocks, block_size)


def _held_and_free(manager: BlockManager, holder: Holder) -> None:
    manager._free_ids[-1] = holder.block_ids[0]


def _leaked(manager: BlockManager, holder: Holder) -> None:
    holder.block_ids.pop()


def _shared(manager: BlockManager, holder: Holder) -> None:
    holder.block_ids[1] = holder.block_ids[0]


def _foreign(manager: BlockManager, holder: Holder) -> None:
    holder.block_ids[0] = manager.num_blocks


@pytest.mark.parametrize("damage", [_held_and_free, _leaked, _shared, _foreign])
def test_check_integrity_sees_damage(damage: object) -> None:
    manager, holder = BlockManager(8, 4), Holder("a")
    assert manager.ensure(holder, 12)
    manager.check_integrity()
    damage(manager, holder)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        manager.check_integrity()
