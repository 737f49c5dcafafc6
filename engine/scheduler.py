"""``Scheduler``: waiting queue and running set in, a ``StepPlan`` out. No torch, and no clock: time is passed in.

A step gives each scheduled request some number of its uncomputed tokens; that is the whole rule. A decode is one token,
a prefill many, a chunked prefill some, and recomputing after a preemption starts again at zero.

Progress: the request that started first is never preempted by a later one, and ``add`` refuses what the pool can not
hold alone, so the first running request always advances. A request joins only while token budget is left after all
running ones took theirs, so there are never more running requests than the budget serves in a step. No step costs more
than O(running + joined); the waiting queue is only touched at its head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.policy import BatchingPolicy
from pagedattn.engine.request import Request


class RequestRejectedError(ValueError):
    """The request can never be served here, whatever else runs."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """``num_tokens`` tokens of ``request`` from position ``num_computed_tokens`` on are computed in this step.

    ``needs_sample``: its last token is among them, so that a new one follows.
    """

    request: Request
    num_computed_tokens: int
    num_tokens: int
    needs_sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. ``num_padding_tokens`` rows more belong to nobody (docs/architecture.md, "Padding")."""

    scheduled: tuple[ScheduledRequest, ...]
    num_padding_tokens: int = 0
    preempted: tuple[Request, ...] = ()

    @property
    def num_seqs(self) -> int:
        return len(self.scheduled)

    @property
    def num_tokens(self) -> int:
        """Tokens of requests; the padding is not counted."""
        return sum(scheduled.num_tokens for scheduled in self.scheduled)

    @property
    def sampled_requests(self) -> list[Request]:
        """The requests that get a token, in the order of the rows of logits."""
        return [scheduled.request for scheduled in self.scheduled if scheduled.needs_sample]


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """A slot holds one token's keys and values; it is filled when the token is an unfinished request's, else wasted."""

    num_blocks: int
    num_used_blocks: int
    num_allocated_slots: int
    num_filled_slots: int
    max_wasted_slots: int  # the most that one sequence holds and does not use


@dataclass(slots=True)
class _StepInTheMaking:
    token_budget: int
    num_tokens: dict[Request, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    def __init__(
        self, block_manager: BlockManager, policy: BatchingPolicy, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # a queue that gives up any request in O(1)
        self.running: list[Request] = []  # in the order they started
        self.lingering: list[Request] = []  # finished; padded rows of a batch that still runs, blocks held

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestRejectedError when all blocks together could not hold it."""
        if request.max_cached_tokens > self.block_manager.capacity:
            raise RequestRejectedError(
                f"the request can come to {request.max_num_tokens} tokens (prompt {request.num_prompt_tokens}), which "
                f"need {self.block_manager.blocks_for(request.max_cached_tokens)} KV blocks; there are "
                f"{self.block_manager.num_blocks} of {self.block_manager.block_size} tokens"
            )
        self.waiting[request.request_id] = request

    def schedule(self, now: float) -> StepPlan:
        """Choose the tokens of the next step and take the blocks for them. ``now``: seconds, on any clock."""
        step = _StepInTheMaking(self.max_num_batched_tokens)
        if self.policy.order == "running_first":
            self._continue_running(step)
            self._admit_waiting(step, now)
        else:
            self._admit_waiting(step, now)
            self._continue_running(step)
        return StepPlan(
            tuple(
                ScheduledRequest(
                    request, request.num_computed_tokens, num_tokens, num_tokens == request.num_uncomputed_tokens
                )
                for request, num_tokens in step.num_tokens.items()
            ),
            self._num_padding_tokens(step.num_tokens.values()),
            tuple(step.preempted),
        )

    def advance(self, scheduled: ScheduledRequest) -> None:
        """The step ran: these tokens are in the cache."""
        scheduled.request.num_computed_tokens = scheduled.num_computed_tokens + scheduled.num_tokens

    def finish(self, request: Request) -> None:
        """The request leaves, for whatever reason; its blocks are free unless its padded batch still runs."""
        if self.waiting.pop(request.request_id, None) is not None:
            return
        self.running.remove(request)
        self.lingering.append(request)
        if self.running and self.policy.pad:
            return
        for leaving in self.lingering:
            self.block_manager.free(leaving)
        self.lingering.clear()

    def block_usage(self, plan: StepPlan | None = None) -> BlockUsage:
        """The blocks now, or with the tokens of ``plan`` in them."""
        block_size = self.block_manager.block_size
        num_planned = {item.request: item.num_tokens for item in plan.scheduled} if plan is not None else {}
        num_filled = max_wasted = 0
        for request in self.running:
            num_tokens = request.num_computed_tokens + num_planned.get(request, 0)
            num_filled += num_tokens
            max_wasted = max(max_wasted, len(request.block_ids) * block_size - num_tokens)
        for request in self.lingering:
            max_wasted = max(max_wasted, len(request.block_ids) * block_size)
        num_used = self.block_manager.num_used
        return BlockUsage(self.block_manager.num_blocks, num_used, num_used * block_size, num_filled, max_wasted)

    def check_integrity(self) -> None:
        """Blocks are whole, and held by running and lingering requests only. Raises AssertionError."""
        self.block_manager.check_integrity()
        num_held = sum(len(request.block_ids) for request in [*self.running, *self.lingering])
        assert num_held == self.block_manager.num_used, f"{self.block_manager.num_used} blocks used, {num_held} held"
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} running, at most {self.max_num_seqs}"
        for request in self.waiting.values():
            assert not request.block_ids, f"{request} waits and holds blocks"
        for request in self.running:
            num_slots = len(request.block_ids) * self.block_manager.block_size
            assert request.num_computed_tokens <= num_slots, f"{request} has more tokens than slots"

    def _num_step_tokens(self, request: Request, step: _StepInTheMaking) -> int:
        if not self.policy.chunk_prefill:
            return request.num_uncomputed_tokens
        return min(request.num_uncomputed_tokens, step.token_budget)

    def _plan_tokens(self, request: Request, num_tokens: int, step: _StepInTheMaking) -> None:
        step.num_tokens[request] = num_tokens
        step.token_budget -= num_tokens

    def _continue_running(self, step: _StepInTheMaking) -> None:
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            request = self.running[index]
            index += 1
            if request in step.num_tokens:
                continue
            num_tokens = self._num_step_tokens(request, step)
            if num_tokens == 0:
                return
            if self._find_blocks(request, request.num_computed_tokens + num_tokens, step):
                self._plan_tokens(request, num_tokens, step)

    def _find_blocks(self, request: Request, num_tokens: int, step: _StepInTheMaking) -> bool:
        """Blocks for a running request, from those that started after it if need be; False when it gave up its own."""
        while not self.block_manager.ensure(request, num_tokens):
            assert self.policy.when_full == "recompute_last", f"{request} ran out of the blocks it had reserved"
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, step: _StepInTheMaking) -> None:
        step.num_tokens.pop(victim, None)
        step.preempted.append(victim)
        self.block_manager.free(victim)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self.waiting[victim.request_id] = victim
        self.waiting.move_to_end(victim.request_id, last=False)

    def _admit_waiting(self, step: _StepInTheMaking, now: float) -> None:
        # Who joins in a step that ran out of blocks would be the next to be preempted.
        if step.preempted or (self.policy.join == "when_empty" and self.running):
            return
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = next(iter(self.waiting.values()))
            num_tokens = self._num_step_tokens(request, step)
            if num_tokens == 0 or not self._reserve(request, num_tokens):
                return
            del self.waiting[request.request_id]
            self.running.append(request)
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
            self._plan_tokens(request, num_tokens, step)

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """The blocks that a request holds when it joins; False, and none taken, when it has to wait."""
        if self.policy.reserve == "prompt_and_max_tokens":
            num_fitting = num_held = request.max_cached_tokens
        else:
            num_fitting = request.num_tokens  # all of it must fit, or it would be preempted before its first token
            num_held = num_tokens if self.policy.reserve == "step" else request.num_tokens
        num_needed = self.block_manager.blocks_for(num_fitting) + self.policy.headroom_blocks * len(self.running)
        return num_needed <= self.block_manager.num_free and self.block_manager.ensure(request, num_held)

    def _num_padding_tokens(self, num_tokens: Iterable[int]) -> int:
        """Rows that make the step a rectangle: every row of the batch, ended ones too, as long as the longest."""
        counts = list(num_tokens)
        if not self.policy.pad or not counts:
            return 0
        return (len(self.running) + len(self.lingering)) * max(counts) - sum(counts)
