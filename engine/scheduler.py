"""``Scheduler``: waiting queue and running set in, a ``StepPlan`` out. No torch, and no clock: time is passed in.

A step gives each scheduled request some number of its uncomputed tokens; that is the whole rule. A decode is one token,
a prefill many, a chunked prefill some, and recomputing after a preemption starts again at zero. The policy says how
many and who may join (policy.py), the queue who is next (orders.py).

Progress: a request gives up its blocks only to one that started before it (or, under an order by priority, that ranks
before it), and ``add`` refuses what the pool can not hold alone, so somebody always advances. A step costs
O(running * (1 + preempted) + looked at * log waiting) and what the blocks of these cost; how many are looked at, the
policy bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagedattn.engine.block_manager import BlockManager, CachedPrefix
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.deadlines import DeadlineWatch
from pagedattn.engine.fruitless_join import FruitlessJoin, JoinState, WaitingNeeds
from pagedattn.engine.length_predictor import LengthPredictor, MeanLengthPredictor
from pagedattn.engine.orders import ORDERS, QueueOrder, make_queue, resolve_order
from pagedattn.engine.policy import BatchingPolicy, resolve_policy
from pagedattn.engine.prefix_tree import NO_BLOCK
from pagedattn.engine.queue_bound import QueueSize
from pagedattn.engine.request import Request
from pagedattn.engine.step_draft import StepDraft
from pagedattn.engine.step_plan import StepPlan


class RequestRejectedError(ValueError):
    """The request can never be served here, whatever else runs."""


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """A slot holds one token's keys and values; it is filled when the token is an unfinished request's, else wasted."""

    num_blocks: int
    num_used_blocks: int
    num_allocated_slots: int
    num_filled_slots: int
    max_wasted_slots: int  # the most that one sequence holds and does not use


class Scheduler:
    """``order`` decides who joins first, ``predictor`` guesses lengths for the orders that need them."""

    def __init__(
        self,
        block_manager: BlockManager,
        policy: BatchingPolicy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        order: QueueOrder = ORDERS["fcfs"],
        predictor: LengthPredictor | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.predictor = MeanLengthPredictor() if predictor is None else predictor
        self.waiting = make_queue(order, self.predictor)
        self.running: list[Request] = []  # in the order they started
        self.num_waiting_tokens = 0
        self.prompt_share = 1.0  # of the tokens that the policy has for prompts they get no more
        self.lingering: list[Request] = []  # finished; padded rows of a batch that still runs, blocks held
        self.prefix_cache_queries = 0  # prompt tokens of requests when they joined for the first time
        self.prefix_cache_hits = 0  # those of them that were not computed
        self._deadlines = DeadlineWatch(self._fewest_steps)
        self._chunk_unit = block_manager.block_size if policy.chunk_unit == "block" else 1
        self._num_watermark_blocks = int(policy.watermark * block_manager.num_blocks)
        self._num_queued = 0
        self._num_steps_without_join = 0
        self._is_closed = False  # after a preemption, until a running request has ended
        self._needs = WaitingNeeds()
        self._fruitless: FruitlessJoin | None = None  # the last attempt to join, if nobody came or left since

    @classmethod
    def from_config(
        cls, config: EngineConfig, block_manager: BlockManager, predictor: LengthPredictor | None = None
    ) -> Scheduler:
        """The scheduler that an engine of ``config`` has."""
        return cls(
            block_manager,
            resolve_policy(config.policy),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            order=resolve_order(config.order),
            predictor=predictor,
        )

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def queue_size(self) -> QueueSize:
        return QueueSize(len(self.waiting), self.num_waiting_tokens)

    def check_fits(self, num_prompt_tokens: int, max_num_tokens: int) -> None:
        """Raises RequestRejectedError when all blocks together could not hold such a request."""
        num_needed = self._peak_blocks(max_num_tokens - 1)  # the last token generated is never computed
        if num_needed > self.block_manager.num_blocks:
            raise RequestRejectedError(
                f"the request can come to {max_num_tokens} tokens (prompt {num_prompt_tokens}), which need "
                f"{num_needed} KV blocks; there are {self.block_manager.num_blocks} of "
                f"{self.block_manager.block_size} tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestRejectedError when all blocks together could not hold it."""
        self.check_fits(request.num_prompt_tokens, request.max_num_tokens)
        self._number(request)
        self.waiting.add(request)  # first: a predictor may raise, and then nothing has happened
        self._fruitless = None
        self._note_waiting(request)
        self._deadlines.add(request)

    def schedule(self, now: float) -> StepPlan:
        """Choose the tokens of the next step and take the blocks for them. ``now``: seconds, on any clock."""
        is_tight = self.block_manager.num_free < self._num_watermark_blocks
        may_prefill = not (is_tight and self.policy.watermark_gates == "prefills")
        dropped = self._deadlines.start_step(now)
        for request in dropped:
            self.finish(request, is_complete=False)
        step = StepDraft(now, self.policy.prefill, self._chunk_unit, self._step_tokens(), may_prefill, dropped)
        if self.policy.order == "waiting_first":
            self._admit_waiting(step)
            if self.policy.mix or not step.joined:
                self._continue_running(step)
        else:
            self._continue_running(step)
            self._admit_waiting(step)
        self._relieve_starved(step)
        if self.policy.prefill == "equal_chunks":
            step.cut_equal_chunks()
        self._num_steps_without_join = 0 if step.joined else self._num_steps_without_join + 1
        self._deadlines.end_step(now, is_empty=not step.num_tokens)
        return self._plan(step)

    def advance(self, *scheduled: tuple[Request, int, int, bool]) -> None:
        """The step runs: for every later one the tokens of these rows of its plan are in the cache. The token that
        follows is the request's, known or pending."""
        accounts = self.waiting.accounts
        for request, start, num_tokens, needs_sample in scheduled:
            request.num_computed_tokens = num_computed = start + num_tokens
            if num_computed >= request.steady_until:
                self.block_manager.commit(request)
            if accounts and needs_sample:
                self.waiting.served(request)

    def learn(self, requests: Iterable[Request]) -> None:
        """Pending tokens have become known: blocks that they complete can be shared, if they are still held."""
        block_manager = self.block_manager
        if not block_manager.enable_prefix_caching:
            return
        for request in requests:
            if len(request.token_ids) % block_manager.block_size == 0 and request.block_ids:
                block_manager.commit(request)

    def finish(self, request: Request, *, is_complete: bool = True) -> None:
        """The request leaves, for whatever reason; its blocks are free unless its padded batch still runs.

        ``is_complete``: it ended by itself, so that its length says something about others'.
        """
        if is_complete:
            self.predictor.observe(request)
        self._deadlines.remove(request)
        self._fruitless = None
        if self.waiting.remove(request):
            self._note_not_waiting(request)
            self.block_manager.free(request)
            return
        self.running.remove(request)
        self._is_closed = False
        self.lingering.append(request)
        if self.running and self.policy.pad:
            return
        for leaving in self.lingering:
            self.block_manager.free(leaving)
        self.lingering.clear()

    def lowest_tier(self, protected_priority: int) -> list[Request]:
        """Of who waits and never ran, nor did a sibling, those of the highest priority number above this one."""
        new = [
            request
            for request in self.waiting
            if request.scheduling.priority > protected_priority
            and all(one.first_scheduled_time is None for one in (request, *request.siblings))
        ]
        lowest = max((request.scheduling.priority for request in new), default=protected_priority)
        return [request for request in new if request.scheduling.priority == lowest]

    def block_usage(self, plan: StepPlan | None = None) -> BlockUsage:
        """The blocks now, or with the tokens of ``plan`` in them."""
        block_size, num_unfilled_slots = self.block_manager.block_size, self.block_manager.num_unfilled_slots
        num_planned = dict(zip(plan.requests, plan.query_lens, strict=True)) if plan is not None else {}
        wasted = [
            num_unfilled_slots(request, request.num_computed_tokens + num_planned.get(request, 0))
            for request in self.running
        ]
        num_wasted = sum(wasted)
        if self.lingering:  # ended rows use nothing of what they hold, but a running one may share some of it
            ended = {id_ for request in self.lingering for id_ in request.block_ids}
            num_wasted += len(ended.difference(*(request.block_ids for request in self.running))) * block_size
            wasted += [len(request.block_ids) * block_size for request in self.lingering]
        num_used = self.block_manager.num_used
        num_slots = num_used * block_size
        return BlockUsage(
            self.block_manager.num_blocks, num_used, num_slots, num_slots - num_wasted, max(wasted, default=0)
        )

    def check_integrity(self) -> None:
        """Blocks are whole, and held by running and lingering requests only. Raises AssertionError."""
        self.block_manager.check_integrity()
        held = {id_ for request in [*self.running, *self.lingering] for id_ in request.block_ids if id_ != NO_BLOCK}
        assert len(held) == self.block_manager.num_used, f"{self.block_manager.num_used} blocks used, {len(held)} held"
        assert len(self.running) <= self.max_num_seqs, f"{len(self.running)} running, at most {self.max_num_seqs}"
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting), f"{len(self.waiting)} said to wait, {len(waiting)} do"
        num_tokens = sum(request.num_tokens for request in waiting)
        assert num_tokens == self.num_waiting_tokens, f"{self.num_waiting_tokens} tokens said to wait, {num_tokens} do"
        assert not set(waiting) & set(self.running), "a request waits and runs"
        self._needs.check_integrity(waiting)
        for request in waiting:
            assert not request.block_ids, f"{request} waits and holds blocks"
        for request in self.running:
            num_slots = len(request.block_ids) * self.block_manager.block_size
            assert request.num_computed_tokens <= num_slots, f"{request} has more tokens than slots"
            if request.num_computed_tokens < request.steady_until:
                assert request.num_uncomputed_tokens == request.num_tokens - request.num_computed_tokens == 1, (
                    f"{request} is not steady"
                )

    # What a request gets in a step

    def _step_tokens(self) -> int:
        """The step's budget. A prompt always finds a chunk in it, even where its share is less than one."""
        budget, limit = self.max_num_batched_tokens, self.policy.prefill_limit
        if self.prompt_share == 1.0 and (limit is None or limit >= budget):
            return budget
        num_decodes = sum(
            [
                request.num_computed_tokens < request.steady_until or request.num_uncomputed_tokens == 1
                for request in self.running
            ]
        )
        num_for_prompts = budget if limit is None or not num_decodes else min(limit, budget)
        return min(num_decodes + max(int(self.prompt_share * num_for_prompts), self._chunk_unit), budget)

    # Running requests

    def _continue_running(self, step: StepDraft) -> None:
        decode_first = self.policy.order == "decode_first"
        prefills: list[Request] = []
        num_tokens = step.num_tokens
        for request in list(self.running):
            if request.num_computed_tokens < request.steady_until and step.token_budget > 0:
                # Nearly all requests of nearly all steps. None of them was preempted or has tokens in this step.
                num_tokens[request] = 1
                step.token_budget -= 1
            elif decode_first and request.num_uncomputed_tokens != 1:
                prefills.append(request)
            else:
                self._continue(request, step)
        for request in prefills:
            self._continue(request, step)

    def _continue(self, request: Request, step: StepDraft) -> None:
        if request in step.num_tokens or request in step.preempted:
            return
        if not step.may_prefill and step.num_tokens and request.num_uncomputed_tokens > 1:
            return
        num_tokens = step.num_tokens_for(request)
        if num_tokens and self._find_blocks(request, request.num_computed_tokens + num_tokens, step):
            step.give(request, num_tokens)
            if request.num_tokens - request.num_computed_tokens == 1:
                request.steady_until = min(self.block_manager.steady_until(request), request.max_num_tokens - 1)

    def _find_blocks(self, request: Request, num_tokens: int, step: StepDraft) -> bool:
        """Blocks for a running request, by the policy's means; False when it gets none and sits out the step."""
        while not self.block_manager.ensure(request, num_tokens):
            assert self.policy.when_full != "never", f"{request} ran out of the blocks it had reserved"
            if self.policy.when_full != "preempt_last":
                step.starved.append(request)
                return False
            victim = self._choose_victim()
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _choose_victim(self) -> Request:
        if self.waiting.ranks_victims:
            return max(reversed(self.running), key=self.waiting.rank)
        return self.running[-1]

    def _preempt(self, victim: Request, step: StepDraft) -> None:
        """Take a running request's blocks away and queue it again."""
        self.running.remove(victim)
        step.take_back(victim)
        step.preempted.append(victim)
        self._fruitless = None
        self._release(victim)
        victim.num_preemptions += 1
        if self.policy.requeue == "tail":
            victim.queue_time = step.now
            self._number(victim)
        self.waiting.put_back(victim)
        self._note_waiting(victim)
        self._is_closed = self.policy.join_after_preemption == "when_one_ended"

    def _release(self, request: Request) -> None:
        """Its blocks are free, and what it has computed is kept in host memory or forgotten."""
        request.steady_until = 0
        if not self.block_manager.preempt(request, self.policy.preempt_by):
            request.num_computed_tokens = 0

    def _relieve_starved(self, step: StepDraft) -> None:
        """Requests that found no block: the newest give up theirs, as far as the policy wants it."""
        if self.policy.when_full == "preempt_starved":
            while step.starved and len(self.running) > 1 and not self._fit_next_step(step.starved):
                self._preempt(step.starved.pop(), step)
        while step.starved and not step.num_tokens:
            if self.policy.when_full == "stall" or not self._fit_next_step(step.starved):
                self._preempt(self.running[-1], step)
            step.starved.clear()
            self._continue_running(step)

    def _fit_next_step(self, starved: list[Request]) -> bool:
        blocks_for, budget = self.block_manager.blocks_for, self.max_num_batched_tokens
        num_missing = sum(
            blocks_for(request.num_computed_tokens + min(request.num_uncomputed_tokens, budget))
            - len(request.block_ids)
            for request in starved
        )
        return num_missing <= self.block_manager.num_free

    # Waiting requests

    def _admit_waiting(self, step: StepDraft) -> None:
        """Those who are next join, as long as budget, blocks and the policy's rules last."""
        # Who joins in a step that ran out of blocks would be the next to be preempted.
        if step.preempted or (self.running and (self._is_closed or self.policy.join == "when_empty")):
            return
        min_joins = 0
        if self._num_steps_without_join + 1 < self.policy.join_patience:
            min_joins = int(len(self.running) * self.policy.join_ratio)
        if min(len(self.waiting), self.max_num_seqs - len(self.running), self._most_joins(step)) < min_joins:
            return
        state = JoinState(
            min_joins,
            step.token_budget,
            step.num_promised_tokens,
            bool(step.uncut),
            bool(step.num_tokens),
            step.may_prefill,
            self.block_manager.num_free,
            self.block_manager.num_changes,
        )
        if self._fruitless is not None and self._fruitless.would_repeat(state, self.waiting, step.now):
            return
        set_turn_back = self.waiting.mark_turn()
        looked_at = self._join_next(step)
        self._fruitless = None
        if len(step.joined) < max(min_joins, 1):
            self._fruitless = FruitlessJoin(state, tuple((one, one in step.num_tokens) for one in looked_at))
            for request in reversed(step.joined):
                self._withdraw(request, step)
            step.joined.clear()
            set_turn_back()
            return
        for request, num_overtakes in looked_at.items():
            request.num_overtaken += num_overtakes
        for request in step.joined:
            if request.first_scheduled_time is None:
                request.first_scheduled_time = step.now
                self._count_cached(request)

    def _most_joins(self, step: StepDraft) -> int:
        """At most so many can join, by their tokens: one of them is cut to what is left, or begins the step."""
        has_budget = self.policy.prefill in ("whole_within_budget", "chunked")
        if not has_budget or not self.block_manager.finds_nothing_cached:
            return len(self.waiting)
        return 1 + self._needs.most_within(max(step.token_budget, 0))

    def _count_cached(self, request: Request) -> None:
        request.num_cached_tokens = request.num_computed_tokens
        self.prefix_cache_queries += request.num_prompt_tokens
        self.prefix_cache_hits += request.num_cached_tokens

    def _join_next(self, step: StepDraft) -> dict[Request, int]:
        """Returns all who were looked at, in order, and of those that did not fit how many joined past them."""
        policy, waiting = self.policy, self.waiting
        looked_at: dict[Request, int] = {}
        misfits: list[Request] = []
        deferred: list[Request] = []  # what they would compute next is being computed
        may_defer = policy.join == "every_step"
        num_may_pass = self.max_num_seqs  # how many may still join past the misfits
        while waiting and len(self.running) < self.max_num_seqs and num_may_pass > 0 and self._has_room(step):
            request = waiting.take(step.now)
            looked_at[request] = 0
            prefix = self.block_manager.find_prefix(request, may_wait=may_defer)
            if prefix is None:
                deferred.append(request)
                if len(deferred) == self.max_num_seqs:
                    break
                continue
            num_kept, request.num_computed_tokens = request.num_computed_tokens, prefix.num_tokens
            num_tokens = step.num_tokens_for(request)
            if num_tokens and self._reserve(request, prefix, num_tokens):
                self._join(request, num_tokens, step)
                num_may_pass -= bool(misfits)
                for misfit in misfits:
                    looked_at[misfit] += 1
                continue
            request.num_computed_tokens = num_kept
            misfits.append(request)
            if not num_tokens or len(misfits) > policy.overtake_window:
                break
            if policy.max_overtakes is not None:
                num_may_pass = min(num_may_pass, policy.max_overtakes - request.num_overtaken)
        for request in [*misfits, *deferred]:
            waiting.put_back(request)
        return looked_at

    def _has_room(self, step: StepDraft) -> bool:
        """Whether it is worth looking at who is next."""
        if not step.may_prefill and step.num_tokens:
            return False
        has_budget = step.token_budget > 0 or self.policy.prefill == "whole"
        return has_budget and self.block_manager.num_free > self.policy.headroom_blocks * len(self.running)

    def _reserve(self, request: Request, prefix: CachedPrefix, num_tokens: int) -> bool:
        """The blocks that a request holds when it joins; False, and none taken, when it has to wait."""
        policy = self.policy
        wanted = {
            "step": request.num_computed_tokens + num_tokens,
            "sequence": request.num_tokens,
            "max_tokens": request.max_cached_tokens,
        }
        max_step_tokens = self._max_step_tokens(wanted[policy.must_fit])
        num_needed = self.block_manager.num_missing(prefix, wanted[policy.must_fit], max_step_tokens)
        num_needed += policy.headroom_blocks * len(self.running)
        if self.running and policy.watermark_gates == "each_join":
            num_needed += self._num_watermark_blocks
        return num_needed <= self.block_manager.num_free and self.block_manager.admit(
            request, prefix, wanted[policy.reserve]
        )

    def _peak_blocks(self, num_tokens: int) -> int:
        """The most blocks that a request of so many tokens comes to hold."""
        return self.block_manager.peak_blocks(num_tokens, self._max_step_tokens(num_tokens))

    def _max_step_tokens(self, num_tokens: int) -> int:
        """The most of a request's tokens whose blocks are taken at once; windows let go of those before them."""
        return min(num_tokens, self.max_num_batched_tokens) if self.policy.takes_blocks_stepwise else num_tokens

    def _join(self, request: Request, num_tokens: int, step: StepDraft) -> None:
        self._note_not_waiting(request)
        self.running.append(request)
        step.joined.append(request)
        step.give(request, num_tokens)
        self.waiting.joined(request)

    def _withdraw(self, request: Request, step: StepDraft) -> None:
        """Undo ``_join``, the last one first."""
        last = self.running.pop()
        assert last is request, f"{last} joined after {request}"
        step.take_back(request)
        self._release(request)
        self.waiting.withdrawn(request)
        self.waiting.put_back(request)
        self._note_waiting(request)

    def _note_waiting(self, request: Request) -> None:
        self.num_waiting_tokens += request.num_tokens
        self._needs.add(request, self.block_manager.least_uncomputed(request, request.num_uncomputed_tokens))
        self.block_manager.expect(request)

    def _note_not_waiting(self, request: Request) -> None:
        self.num_waiting_tokens -= request.num_tokens
        self._needs.remove(request)

    def _number(self, request: Request) -> None:
        """Its place among requests of the same time: behind all that have one."""
        self._num_queued += 1
        request.queue_number = self._num_queued

    def _fewest_steps(self, request: Request) -> int:
        """Until its next token, were it in every step from now on; what others compute of its prompt until then counts
        as if it did."""
        if self.policy.is_whole:
            return 1
        num_known = request.num_computed_tokens
        if not request.block_ids:
            prefix = self.block_manager.find_prefix(request, may_wait=False)
            forkable = [sibling.num_computed_tokens for sibling in request.siblings if sibling.block_ids]
            num_known = max([num_known if prefix is None else prefix.num_tokens, *forkable])
        return max(1, -(-(request.num_tokens - num_known) // self.max_num_batched_tokens))

    # The plan

    def _plan(self, step: StepDraft) -> StepPlan:
        requests, query_lens = tuple(step.num_tokens), tuple(step.num_tokens.values())
        starts = [request.num_computed_tokens for request in requests]
        # Who has its last token pending is in no step, so these are all that it has.
        needs_sample = [
            start < request.steady_until or start + query_len == request.num_tokens
            for request, start, query_len in zip(requests, starts, query_lens, strict=True)
        ]
        return StepPlan(
            requests,
            starts,
            query_lens,
            needs_sample,
            num_padding_tokens=self._num_padding_tokens(query_lens),
            preempted=tuple(step.preempted),
            dropped=tuple(step.dropped),
            transfers=self.block_manager.take_transfers(),
        )

    def _num_padding_tokens(self, query_lens: Sequence[int]) -> int:
        """Rows that make the step a rectangle: every row of the batch, ended ones too, as long as the longest."""
        if not self.policy.pad:
            return 0
        return (len(self.running) + len(self.lingering)) * max(query_lens, default=0) - sum(query_lens)
