"""A scheduler driven as the engine drives it, without a model, and checked at every step against what it promises."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.orders import QueueOrder
from pagedattn.engine.policy import BatchingPolicy
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import Scheduler, StepPlan
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.swap_space import PreemptionCosts, SwapSpace

PARAMS = SamplingParams()


def make_request(
    name: str,
    num_prompt: int,
    max_tokens: int,
    *,
    arrival_time: float = 0.0,
    prefix: int = 1,
    **scheduling: object,
) -> Request:
    """A request that generates ``max_tokens`` tokens; its prompt repeats one token."""
    return Request(
        name,
        [prefix] * num_prompt,
        PARAMS,
        max_num_tokens=num_prompt + max_tokens,
        arrival_time=arrival_time,
        scheduling=SchedulingParams(**scheduling),
    )


@dataclass
class SchedulerRun:
    """``step`` is one step of the engine; every request ends by its length, unless it is cancelled or dropped."""

    scheduler: Scheduler
    step_seconds: float = 1.0
    now: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    ended: list[Request] = field(default_factory=list)
    dropped: list[Request] = field(default_factory=list)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        self.scheduler.finish(request, is_complete=False)

    def step(self) -> StepPlan:
        """One step without checks."""
        plan = self.scheduler.schedule(self.now)
        self.now += self.step_seconds
        self.num_steps += 1
        self.num_preemptions += len(plan.preempted)
        self.dropped += plan.dropped
        for item in plan.scheduled:
            request = item.request
            if item.needs_sample:
                request.token_ids.append(2)
                if request.first_token_time is None:
                    request.first_token_time = self.now
            self.scheduler.advance(item)
            if request.num_tokens >= request.max_num_tokens:
                request.finished_time = self.now
                self.scheduler.finish(request)
                self.ended.append(request)
        return plan

    def checked_step(self) -> StepPlan:
        before = list(self.scheduler.running)
        schedule = self.scheduler.schedule

        def schedule_and_check(now: float) -> StepPlan:
            plan = schedule(now)
            self.scheduler.check_integrity()
            check_plan(self.scheduler, plan, before, now)
            return plan

        self.scheduler.schedule = schedule_and_check  # type: ignore[method-assign]
        try:
            plan = self.step()
        finally:
            self.scheduler.schedule = schedule  # type: ignore[method-assign]
        self.scheduler.check_integrity()
        return plan


def make_run(
    policy: BatchingPolicy,
    order: QueueOrder,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    step_seconds: float = 1.0,
    windows: tuple[int | None, ...] = (None,),
    enable_prefix_caching: bool = False,
    num_host_blocks: int = 0,
) -> SchedulerRun:
    """``num_host_blocks``: swapping is cheaper from 8 tokens on."""
    costs = PreemptionCosts((1, 16), (0.0, 15.0), (7.0, 7.0))
    scheduler = Scheduler(
        BlockManager(
            num_blocks,
            block_size,
            windows=windows,
            enable_prefix_caching=enable_prefix_caching,
            swap_space=SwapSpace(num_host_blocks, costs),
        ),
        policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        order=order,
    )
    return SchedulerRun(scheduler, step_seconds)


def check_plan(scheduler: Scheduler, plan: StepPlan, running_before: list[Request], now: float) -> None:
    """What holds of any plan, under any policy and order; called before the plan is carried out."""
    policy, block_size = scheduler.policy, scheduler.block_manager.block_size
    assert plan.scheduled or not scheduler.has_unfinished, "a step with unfinished requests computes something"
    assert len({item.request for item in plan.scheduled}) == plan.num_seqs <= scheduler.max_num_seqs
    for item in plan.scheduled:
        request = item.request
        assert request in scheduler.running
        assert 1 <= item.num_tokens <= request.num_uncomputed_tokens
        assert item.num_computed_tokens == request.num_computed_tokens
        assert item.needs_sample == (item.num_tokens == request.num_uncomputed_tokens)
        num_spare = len(request.block_ids) * block_size - item.num_computed_tokens - item.num_tokens
        assert num_spare >= 0, "tokens without slots"
        if policy.reserve == "step":
            assert num_spare < block_size, "blocks before they are needed"
        if policy.is_whole:
            assert item.needs_sample, "a prompt that should be whole is cut"
    for request in (*plan.preempted, *plan.dropped):
        assert request not in scheduler.running
        is_swapped = request.request_id in scheduler.block_manager.swap_space
        assert request.num_computed_tokens == 0 or request in plan.dropped or is_swapped
        assert not request.block_ids or policy.pad
    joined = [request for request in scheduler.running if request not in running_before]
    check_budget(scheduler, plan, joined)
    check_room_left(scheduler, joined)
    check_padding(scheduler, plan)
    if policy.when_full == "never":
        assert not plan.preempted
    if plan.preempted and policy.when_full == "preempt_last" and policy.order != "waiting_first":
        assert not joined, "nobody joins in a step that preempted"
    if policy.join == "when_empty" and joined:
        assert set(running_before) <= {*plan.dropped}, "others join a batch that runs"
    if not policy.mix and joined:
        assert {item.request for item in plan.scheduled} == set(joined), "newcomers are not alone"
    if policy.max_overtakes is not None:
        for request in (*scheduler.waiting, *scheduler.running):
            assert request.num_overtaken <= policy.max_overtakes
    if not plan.preempted:
        check_work_conserved(scheduler, plan, joined, now)


def check_budget(scheduler: Scheduler, plan: StepPlan, joined: list[Request]) -> None:
    policy, budget = scheduler.policy, scheduler.max_num_batched_tokens
    if not policy.is_whole:
        assert plan.num_tokens <= budget
    elif policy.prefill == "whole_within_budget" and len(joined) > 1:
        assert sum(item.num_tokens for item in plan.scheduled if item.request in joined) <= budget


def check_room_left(scheduler: Scheduler, joined: list[Request]) -> None:
    """Who joins leaves the blocks free that the policy wants free."""
    policy, block_manager = scheduler.policy, scheduler.block_manager
    if not joined or len(scheduler.running) == 1 or policy.order == "waiting_first":
        return
    num_free = policy.headroom_blocks * (len(scheduler.running) - 1)
    if policy.must_fit == "sequence":  # what the last one has still to take
        num_free += block_manager.blocks_for(joined[-1].num_tokens) - len(joined[-1].block_ids)
    if policy.watermark_gates == "each_join":
        num_free += int(policy.watermark * block_manager.num_blocks)
    assert block_manager.num_free >= num_free, "too few blocks are left"


def check_padding(scheduler: Scheduler, plan: StepPlan) -> None:
    if scheduler.policy.pad:
        num_rows = len(scheduler.running) + len(scheduler.lingering)
        assert not plan.scheduled or (plan.num_tokens + plan.num_padding_tokens) % num_rows == 0
    else:
        assert plan.num_padding_tokens == 0
        assert not scheduler.lingering


def check_work_conserved(scheduler: Scheduler, plan: StepPlan, joined: list[Request], now: float) -> None:
    """Nobody idles who could be computed: tokens are left over only when all that run have theirs and who is next can
    not join. Restated here from the policies' description, not from the scheduler's code."""
    policy, block_manager = scheduler.policy, scheduler.block_manager
    left = scheduler.max_num_batched_tokens - plan.num_tokens
    # Prompts may get less than the budget has: what the last of them left is not to be had.
    num_decodes = sum(one.num_uncomputed_tokens == 1 for one in scheduler.running if one not in joined)
    if policy.prefill_limit is not None and num_decodes:
        left = min(left, policy.prefill_limit + num_decodes - plan.num_tokens)
    is_tight = policy.watermark_gates == "prefills" and policy.watermark > 0
    if policy.mix and not is_tight and left >= block_manager.block_size and policy.when_full == "preempt_last":
        assert len(plan.scheduled) == len(scheduler.running), "somebody sits out, with tokens left"
    if not scheduler.waiting or len(scheduler.running) >= scheduler.max_num_seqs or left < block_manager.block_size:
        return
    running_before = [request for request in scheduler.running if request not in joined]
    may_join = (
        (policy.join == "every_step" or not running_before)
        and (policy.join_after_preemption == "next_step" or not running_before)
        and (policy.join_ratio == 0 or not running_before)
        and not is_tight
    )
    if not may_join:
        return
    request = scheduler.waiting.take(now)
    scheduler.waiting.put_back(request)
    if block_manager.find_prefix(request, may_wait=policy.join == "every_step") is None:
        assert scheduler.running, "a request waits for a prefix that nobody computes"
        return
    if any(sibling in joined for sibling in request.siblings):
        return  # it can be forked from the next step on, even where all of its prompt came from the cache
    num_first = request.num_tokens if policy.is_whole else min(request.num_tokens, left)
    if policy.prefill == "whole_within_budget" and num_first > left:
        return
    needed = {"step": num_first, "sequence": request.num_tokens, "max_tokens": request.max_num_tokens - 1}
    num_blocks = -(-needed[policy.must_fit] // block_manager.block_size)
    num_blocks += policy.headroom_blocks * len(scheduler.running)
    if scheduler.running:
        num_blocks += int(policy.watermark * block_manager.num_blocks)
    assert num_blocks > block_manager.num_free, f"{request} could have joined"
