"""The block manager against a model of the memory: every slot knows which tokens its keys and values come from."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from hashlib import sha256
from typing import get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedattn.engine import prefix_tree
from pagedattn.engine.block_manager import BlockManager, BlockTransfers
from pagedattn.engine.prefix_tree import NO_BLOCK
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.swap_space import PreemptionCosts, PreemptionKind, SwapSpace

Content = tuple[int, str, tuple[int, ...]]  # group, salt, and all tokens up to the slot's: what attention would read


def make_request(name: str, token_ids: list[int], salt: str = "", max_tokens: int = 50) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, token_ids, params, max_num_tokens=len(token_ids) + max_tokens, cache_salt=salt)


@dataclass
class Memory:
    """Device and host blocks, slot by slot, and what the manager's transfers and a step's tokens do to them."""

    manager: BlockManager
    device: dict[int, list[Content | None]] = field(default_factory=dict)
    host: dict[int, list[Content | None]] = field(default_factory=dict)

    def apply(self, transfers: BlockTransfers) -> None:
        empty: list[Content | None] = [None] * self.manager.block_size
        for source, host_id in transfers.swap_out:
            self.host[host_id] = list(self.device.get(source, empty))
        read = [(list(self.device.get(source, empty)), destination) for source, destination in transfers.copy]
        for blocks, destination in read:
            self.device[destination] = blocks
        for host_id, destination in transfers.swap_in:
            self.device[destination] = list(self.host[host_id])
        destinations = [pair[1] for pair in (*transfers.copy, *transfers.swap_in)]
        assert len(set(destinations)) == len(destinations), "a block is filled from two sources"

    def content(self, request: Request, position: int, group: int) -> Content:
        # A window's layers read through all layers below, so their values depend on every token before them.
        return (group, request.cache_salt, tuple(request.token_ids[: position + 1]))

    def write(self, request: Request, start: int, end: int) -> None:
        size, num_groups = self.manager.block_size, self.manager.num_groups
        for position in range(start, end):
            for group in range(num_groups):
                block_id = request.block_ids[position // size * num_groups + group]
                assert block_id != NO_BLOCK, "a token has no slot"
                assert self.manager._pool.num_holders[block_id] == 1, "a shared block is written to"
                slots = self.device.setdefault(block_id, [None] * size)
                slots[position % size] = self.content(request, position, group)

    def check_visible(self, request: Request, start: int, end: int) -> None:
        """All that the tokens from ``start`` to ``end`` attend to is what it should be."""
        size, num_groups = self.manager.block_size, self.manager.num_groups
        for group, window in enumerate(self.manager.windows):
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, end):
                block_id = request.block_ids[position // size * num_groups + group]
                assert block_id != NO_BLOCK, f"{request} sees position {position} of group {group}, which is gone"
                found = self.device[block_id][position % size]
                assert found == self.content(request, position, group), f"{request} reads another's tokens"


WINDOWS: list[tuple[int | None, ...]] = [(None,), (5,), (None, 4), (None, 1, 7)]
COSTS = PreemptionCosts((1, 10), (0.0, 9.0), (2.0, 4.0))  # swapping is cheaper from 4 tokens on


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 30),
        block_size=st.integers(1, 4),
        windows=st.sampled_from(WINDOWS),
        caching=st.booleans(),
        num_host_blocks=st.sampled_from([0, 6, 60]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int | None, ...],
        caching: bool,
        num_host_blocks: int,
    ) -> None:
        self.manager = BlockManager(
            num_blocks * len(windows),
            block_size,
            windows=windows,
            enable_prefix_caching=caching,
            swap_space=SwapSpace(num_host_blocks, COSTS),
        )
        self.memory = Memory(self.manager)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: set[str] = set()
        self.num_made = 0
        self.random = random.Random(0)

    def make(self, token_ids: list[int], salt: str) -> Request:
        self.num_made += 1
        return make_request(str(self.num_made), token_ids, salt)

    @rule(
        family=st.integers(0, 1),
        num_common=st.integers(0, 12),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        salt=st.sampled_from(["", "", "tenant"]),
        num_siblings=st.integers(0, 2),
    )
    def arrive(self, family: int, num_common: int, tail: list[int], salt: str, num_siblings: int) -> None:
        token_ids = [7 + family] * num_common + tail
        together = [self.make(token_ids, salt) for _ in range(num_siblings + 1)]
        for request in together:
            request.siblings = [other for other in together if other is not request]
            self.waiting.append(request)
            self.manager.expect(request)

    @rule(seed=st.integers(0, 2**32), num_steps=st.integers(1, 8))
    def run(self, seed: int, num_steps: int) -> None:
        self.random = random.Random(seed)
        for _ in range(num_steps):
            self.step()
            self.is_whole()

    def step(self) -> None:
        """A schedule of any kind: some continue, some join, some are preempted; then it runs, or fails."""
        planned: dict[Request, tuple[int, int]] = {}
        gone: list[Request] = []
        for request in list(self.running):
            if request not in self.running or self.random.random() < 0.1:
                continue
            count = self.random.randint(1, request.num_tokens - request.num_computed_tokens)
            while request in self.running and not self.manager.ensure(request, request.num_computed_tokens + count):
                gone.append(self.preempt(self.random.choice(self.running), planned))
            if request in self.running:
                planned[request] = (request.num_computed_tokens, count)
        for request in list(self.waiting):
            if request not in gone and self.random.random() < 0.7:
                self.admit(request, planned)
        # Above all those that have just joined, and whose blocks are not filled yet.
        unlucky = [
            request
            for request in self.running
            if self.random.random() < (0.2 if request in planned and planned[request][1] == 1 else 0.05)
        ]
        gone += [self.preempt(victim, planned) for victim in unlucky]
        self.manager.check_integrity()
        transfers = self.manager.take_transfers()
        if self.random.random() < 0.05:
            self.fail(planned, gone)
            return
        self.memory.apply(transfers)
        for request, (start, count) in planned.items():
            self.memory.write(request, start, start + count)
        for request, (start, count) in planned.items():
            self.memory.check_visible(request, start, start + count)
        for request, (start, count) in planned.items():
            if start + count == request.num_tokens:
                request.token_ids.append(self.random.randrange(3))
            request.num_computed_tokens = start + count
            self.manager.commit(request)
            if request.num_tokens >= 30 or self.random.random() < 0.05:
                self.leave(request)

    def admit(self, request: Request, planned: dict[Request, tuple[int, int]]) -> None:
        num_free = self.manager.num_free
        prefix = self.manager.find_prefix(request)
        if prefix is None:
            assert self.running, "a request waits for nobody"
            return
        assert prefix.num_tokens < request.num_tokens, "the last token is not computed"
        if request.request_id in self.swapped:
            assert prefix.num_tokens == request.num_computed_tokens > 0
        count = self.random.randint(1, request.num_tokens - prefix.num_tokens)
        if not self.manager.admit(request, prefix, prefix.num_tokens + count):
            assert self.manager.num_free == num_free
            assert not request.block_ids
            return
        self.swapped.discard(request.request_id)
        request.num_computed_tokens = prefix.num_tokens
        self.waiting.remove(request)
        self.running.append(request)
        planned[request] = (prefix.num_tokens, count)

    def preempt(self, victim: Request, planned: dict[Request, tuple[int, int]]) -> Request:
        planned.pop(victim, None)
        if self.manager.preempt(victim, self.random.choice(get_args(PreemptionKind))):
            self.swapped.add(victim.request_id)
        else:
            victim.num_computed_tokens = 0
        assert not victim.block_ids
        self.running.remove(victim)
        self.waiting.insert(0, victim)
        self.manager.expect(victim)
        return victim

    def fail(self, planned: dict[Request, tuple[int, int]], gone: list[Request]) -> None:
        for request in planned:
            self.leave(request)
        for victim in gone:
            self.manager.discard_swapped(victim)
            self.swapped.discard(victim.request_id)

    def leave(self, request: Request) -> None:
        self.manager.free(request)
        (self.running if request in self.running else self.waiting).remove(request)
        self.swapped.discard(request.request_id)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data(), is_poisoned=st.booleans())
    def abort(self, data: st.DataObject, is_poisoned: bool) -> None:
        request = data.draw(st.sampled_from(self.running + self.waiting))
        if is_poisoned and request in self.running:
            self.manager.disown(request)
        self.leave(request)

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "manager"):  # an invariant is also checked before the start
            return
        self.manager.check_integrity()
        held = {block_id for request in self.running for block_id in request.block_ids if block_id != NO_BLOCK}
        assert self.manager.num_used == len(held)
        on_host = sum(request.request_id in self.manager.swap_space for request in self.waiting)
        assert on_host == len(self.swapped)
        if not self.waiting:
            assert self.manager.swap_space.num_used == 0

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for request in [*self.running, *self.waiting]:
            self.leave(request)
        self.manager.check_integrity()
        assert self.manager.num_used == self.manager.swap_space.num_used == 0
        self.manager.reset_prefix_cache()
        assert not self.manager._pool.tree.nodes, "nodes of nobody are kept"


class CollidingMachine(BlockManagerMachine):
    """Four digests for all blocks there are: what is shared must not depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefix_tree, "sha256", WeakHash)

    def teardown(self) -> None:
        super().teardown()
        self.patch.undo()


class WeakHash:
    def __init__(self, data: bytes) -> None:
        self._digest = bytes([sha256(data).digest()[0] & 3])

    def digest(self) -> bytes:
        return self._digest


SETTINGS = settings(max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = SETTINGS
TestCollidingDigests = CollidingMachine.TestCase
TestCollidingDigests.settings = settings(SETTINGS, max_examples=40)


def admitted(manager: BlockManager, request: Request, num_computed: int) -> Request:
    """A request that has computed so many tokens, in a schedule of the past."""
    prefix = manager.find_prefix(request)
    assert prefix is not None
    assert manager.admit(request, prefix, max(num_computed, prefix.num_tokens + 1))
    manager.take_transfers()
    request.num_computed_tokens = num_computed
    manager.commit(request)
    return request


def test_a_request_that_came_back_and_loses_its_blocks_again_is_where_it_was() -> None:
    manager = BlockManager(4, 4, swap_space=SwapSpace(4))
    request = admitted(manager, make_request("a", [1] * 10), 8)
    assert manager.preempt(request, "swap")
    assert manager.take_transfers() == BlockTransfers(swap_out=((0, 0), (1, 1)))
    prefix = manager.find_prefix(request)
    assert prefix is not None
    assert (prefix.num_tokens, prefix.num_taken) == (8, 2)
    assert manager.admit(request, prefix, 9)
    assert manager.preempt(request, "recompute")  # nothing was copied yet: what is in host memory stays
    assert manager.num_free == 4
    assert manager.take_transfers() == BlockTransfers()
    manager.check_integrity()
    prefix = manager.find_prefix(request)
    assert prefix is not None
    assert manager.admit(request, prefix, 9)
    assert [host_id for host_id, _ in manager.take_transfers().swap_in] == [0, 1]
    assert manager.swap_space.num_used == 0


def test_a_fork_that_loses_its_blocks_at_once_was_never_there() -> None:
    manager = BlockManager(6, 4, swap_space=SwapSpace(6))
    parent, child = make_request("a", [1] * 10), make_request("b", [1] * 10)
    parent.siblings, child.siblings = [child], [parent]
    admitted(manager, parent, 10)
    prefix = manager.find_prefix(child)
    assert prefix is not None
    assert prefix.num_tokens == 9
    assert manager.admit(child, prefix, 10)
    child.num_computed_tokens = 9
    assert not manager.preempt(child, "swap"), "blocks that nobody has filled are kept"
    assert manager.take_transfers() == BlockTransfers()
    assert manager.num_used == 3
    manager.check_integrity()


def test_too_little_host_memory_and_costs_decide() -> None:
    manager = BlockManager(20, 4, swap_space=SwapSpace(3, COSTS))  # swapping is cheaper from 4 tokens on
    for num_tokens, kind, is_kept in (
        (3, "cheapest", False),
        (5, "cheapest", True),
        (12, "swap", True),
        (13, "swap", False),
        (5, "recompute", False),
    ):
        request = admitted(manager, make_request("a", [1] * 20), num_tokens)
        assert manager.preempt(request, kind) == is_kept, (num_tokens, kind)
        manager.take_transfers()
        manager.free(request)
        assert manager.num_used == manager.swap_space.num_used == 0


def test_what_others_hold_is_not_counted_as_lost() -> None:
    """Of 12 tokens 8 are shared: computing 4 again costs 3, copying all 12 out and back 4.4."""
    manager = BlockManager(20, 4, enable_prefix_caching=True, swap_space=SwapSpace(20, COSTS))
    admitted(manager, make_request("a", [1] * 9), 9)
    sharing = admitted(manager, make_request("b", [1] * 8 + [2] * 5), 12)
    assert sharing.block_ids[:2] == [0, 1]
    assert not manager.preempt(sharing, "cheapest")
    assert admitted(manager, make_request("c", [3] * 13), 12).block_ids
    assert manager.preempt(manager._holdings["c"].holder, "cheapest")


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = PreemptionCosts((10, 20, 40), (1.0, 3.0, 7.0), (2.0, 2.0, 4.0))
    assert [costs.recompute(length) for length in (10, 15, 30, 50)] == [1.0, 2.0, 5.0, 9.0]
    assert [costs.swap(length) for length in (5, 10, 30, 60)] == [2.0, 2.0, 3.0, 6.0]
    assert costs.recompute(1) == 0.0
    assert costs.crossover(100) == 16  # at 15 both cost 2
    assert costs.crossover(15) is None
    for lengths, seconds in (((10,), (1.0,)), ((10, 10), (1.0, 1.0)), ((10, 20), (1.0,)), ((10, 20), (1.0, math.nan))):
        with pytest.raises(ValueError, match="is not allowed"):
            PreemptionCosts(lengths, seconds, seconds)
