"""``Engine``: the step loop. Schedule, prepare, forward, sample, finish.

One thread drives ``step``; ``add_request`` and ``abort`` may come from any. A step that raises fails the requests in
it, one with NaN logits fails alone, and in both cases their blocks are free and the others go on. ``step`` with
unfinished requests always advances one of them or raises.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pagedattn.engine.batch import BatchTensors, prepare_batch
from pagedattn.engine.block_manager import BlockManager, BlockTransfers
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.degradation import Ladder
from pagedattn.engine.length_predictor import LengthPredictor
from pagedattn.engine.monitor import Alert, Monitor, notify
from pagedattn.engine.output_builder import OutputBuilder, OutputGroup
from pagedattn.engine.outputs import FinishReason, RequestOutput
from pagedattn.engine.prompts import Prompt, TokenizedPrompt, tokenize_prompt
from pagedattn.engine.queue_bound import QueueBound, QueueSize
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import NO_FINITE_LOGITS, SampledToken, sample
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import BlockUsage, RequestRejectedError, Scheduler, StepPlan
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.stats import EngineStats, StatsRecorder
from pagedattn.engine.swap_space import SwapSpace
from pagedattn.layer_ops import derive_seed

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Cache(Protocol):
    """What the engine needs of a cache: the windows of its groups of layers, and to copy whole blocks."""

    @property
    def windows(self) -> tuple[int | None, ...]: ...

    null_block: int

    def transfer(self, transfers: BlockTransfers) -> None: ...


class Model(Protocol):
    """What the engine needs of a decoder: a batch's logits, [L, vocabulary]; keys and values go to ``cache``."""

    def forward(self, batch: BatchTensors, cache: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    ``outputs``: the requests that got a token or ended, those aborted since the step before included.
    ``num_scheduled_tokens``: tokens computed, by request id. ``usage``: the blocks as the step had them, before the
    requests that it ended gave theirs back. ``error``: why the whole step failed, None when it did not.
    """

    outputs: list[RequestOutput]
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    num_padding_tokens: int = 0
    preempted: tuple[str, ...] = ()  # request ids
    usage: BlockUsage | None = None
    error: str | None = None

    @property
    def num_seqs(self) -> int:
        return len(self.num_scheduled_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of requests; the padding is not counted."""
        return sum(self.num_scheduled_tokens.values())


def _sequence_id(request_id: str, index: int) -> str:
    """What the scheduler knows the ``index``-th sequence of a request by."""
    return request_id if index == 0 else f"{request_id}#{index}"


class Engine:
    """Serves requests with ``decoder`` over ``cache``, which has ``config.num_blocks`` blocks.

    ``eos_token_ids`` end a request unless its parameters ignore them; None takes the tokenizer's. ``clock`` gives
    seconds. ``predictor`` guesses output lengths for the order "sjf"; None takes one that learns means. ``swap_space``:
    the cache's host blocks, None when it has none. ``on_alert`` is called when one of ``config.alerts`` begins or ends,
    by the thread that drives ``step``, at its end.
    """

    def __init__(
        self,
        decoder: Model,
        cache: Cache,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] | None = None,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        predictor: LengthPredictor | None = None,
        swap_space: SwapSpace | None = None,
        on_alert: Callable[[Alert], None] | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.tokenizer = tokenizer
        self.config = config
        self.clock = clock
        self.block_manager = BlockManager(
            config.num_blocks,
            config.block_size,
            windows=cache.windows,
            enable_prefix_caching=config.enable_prefix_caching,
            swap_space=swap_space,
        )
        self.scheduler = Scheduler.from_config(config, self.block_manager, predictor)
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._device = torch.device(device)
        self._groups: dict[str, OutputGroup] = {}  # by request
        self._builders: dict[str, OutputBuilder] = {}  # by sequence, of which a request has one or more
        self._request_counter = itertools.count()
        self._request_names = map(str, itertools.count())
        self._recorder = StatsRecorder()
        self._queue_bound = QueueBound(config.max_waiting_requests, config.max_waiting_tokens)
        # Not reentrant: a generator that is finalized in the middle of a step aborts its requests from within it.
        self._lock = threading.Lock()
        self._requested_aborts: deque[str] = deque()
        self._aborted_outputs: list[RequestOutput] = []
        self._on_alert = on_alert
        self._ladder = Ladder(config.degradation)
        self._monitor: Monitor | None = None
        is_checked = bool(config.alerts or config.degradation)
        if config.log_interval is not None or is_checked:
            self._monitor = Monitor(
                clock(),
                self.stats(),
                log_interval=config.log_interval,
                check_interval=config.check_interval if is_checked else None,
                alerts=config.alerts,
            )

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def add_request(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        arrival_time: float | None = None,
        scheduling_params: SchedulingParams | None = None,
    ) -> str:
        """Queue a request and return its id. ``arrival_time``: seconds of ``clock``, None = now.

        Raises ValueError for a bad prompt or an id in use, TypeError for bad parameters, RequestRejectedError (a
        ValueError) when the request can never fit, QueueFullError when too many wait.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {params!r}")
        scheduling = SchedulingParams() if scheduling_params is None else scheduling_params
        if not isinstance(scheduling, SchedulingParams):
            raise TypeError(f"scheduling_params must be SchedulingParams, not {scheduling!r}")
        stop_token_ids = frozenset(params.stop_token_ids or ())
        if stop_token_ids and max(stop_token_ids) >= self._vocab_size:
            raise ValueError(f"stop_token_ids has {max(stop_token_ids)}: ids must be in [0, {self._vocab_size})")
        if not params.ignore_eos:
            stop_token_ids |= self._eos_token_ids
        tokenized = tokenize_prompt(prompt, self.tokenizer, self._vocab_size)
        max_num_tokens = self._max_num_tokens(len(tokenized.token_ids), params)
        if params.n > self.config.max_num_seqs:
            raise RequestRejectedError(f"n={params.n} is not allowed: at most max_num_seqs={self.config.max_num_seqs}")
        size = QueueSize(params.n, params.n * len(tokenized.token_ids))
        arrival_time = self.clock() if arrival_time is None else arrival_time
        if not math.isfinite(arrival_time):
            raise ValueError(f"arrival_time={arrival_time} is not allowed: it must be a finite number of seconds")
        with self._lock:
            if request_id is not None and self._is_in_use(request_id, params.n):
                raise ValueError(f"request_id={request_id!r} is in use by an unfinished request")
            # Before the request has a number: who is refused must not change the seeds of those to come.
            if self._queue_bound.is_bounded:
                self._queue_bound.check(self.clock(), self.scheduler.queue_size, size)
            number = next(self._request_counter)
            if request_id is None:
                request_id = next(name for name in self._request_names if not self._is_in_use(name, params.n))
            seed = derive_seed(self.config.seed, number) if params.seed is None else params.seed
            sequences = [
                Request(
                    _sequence_id(request_id, index),
                    tokenized.token_ids,
                    params,
                    max_num_tokens=max_num_tokens,
                    arrival_time=arrival_time,
                    seed=seed if index == 0 else derive_seed(seed, index),
                    stop_token_ids=stop_token_ids,
                    scheduling=scheduling,
                    cache_salt=tokenized.cache_salt,
                )
                for index in range(params.n)
            ]
            self._add_sequences(request_id, sequences, tokenized)
            self._queue_bound.accept(size)
        return request_id

    def _is_in_use(self, request_id: str, num_sequences: int) -> bool:
        names = (_sequence_id(request_id, index) for index in range(num_sequences))
        return request_id in self._groups or any(name in self._builders for name in names)

    def _add_sequences(self, request_id: str, sequences: list[Request], prompt: TokenizedPrompt) -> None:
        group = OutputGroup(request_id, prompt.text, sequences[0].prompt_token_ids)
        for sequence in sequences:
            sequence.siblings = [other for other in sequences if other is not sequence]
            builder = OutputBuilder(sequence, group, self.tokenizer, self._eos_token_ids)
            self.scheduler.add(sequence)  # the first is refused if any is
            self._builders[sequence.request_id] = builder
        self._groups[request_id] = group
        self._recorder.num_prompt_tokens += sequences[0].num_prompt_tokens

    def abort(self, request_id: str) -> None:
        """End a request now, whatever it is doing; its blocks are free. An id that is unknown or ended is ignored.

        Its last output, with finish_reason "abort", is in the next step's. While a step runs, in another thread or
        because this is a finalizer that interrupted it, the abort takes effect at its end.
        """
        self._requested_aborts.append(request_id)
        if self._lock.acquire(blocking=False):
            try:
                self._apply_aborts()
            finally:
                self._lock.release()

    def step(self) -> StepResult:
        """Compute one batch. With nothing to do it only hands out what was aborted."""
        with self._lock:
            self._apply_aborts()
            result = self._step() if self.has_unfinished else StepResult([])
            self._apply_aborts()
            result.outputs.extend(self._aborted_outputs)
            self._aborted_outputs.clear()
            alerts = self._observe(result) if self._monitor is not None else []
            if not self.has_unfinished:
                self.check_integrity()
        notify(alerts, self._on_alert)  # without the lock, so that a callback may add and abort requests
        return result

    def _observe(self, result: StepResult) -> list[Alert]:
        assert self._monitor is not None, "nothing is to be observed"
        now = self.clock()
        self._monitor.log_if_due(now, self.stats)
        interval = self._monitor.measure_if_due(now, self.stats)
        if interval is None:
            return []
        if self._ladder.update(now, interval.value):
            logger.warning("degradation: the engine is in the state %r now", self._ladder.state)
            self.scheduler.prompt_share = self._ladder.prompt_share
        if self._ladder.protected_priority is not None:
            shed = self.scheduler.lowest_tier(self._ladder.protected_priority)
            groups = dict.fromkeys(self._shed(request, now) for request in shed)
            result.outputs.extend(group.build() for group in groups)
        return self._monitor.alerts_of(now, interval)

    def _shed(self, request: Request, now: float) -> OutputGroup:
        builder = self._builders[request.request_id]
        message = f"shed under pressure: priority {request.scheduling.priority} was the lowest that waited"
        self._end(builder, "shed", now, message)
        return builder.group

    @torch.inference_mode()
    def _step(self) -> StepResult:
        now = self.clock()
        plan = self.scheduler.schedule(now)
        if self._queue_bound.is_bounded:
            self._queue_bound.observe(now, self.scheduler.queue_size)
        dropped = dict.fromkeys(self._drop(request, now) for request in plan.dropped)
        outputs = [group.build() for group in dropped]
        if not plan.scheduled:  # whoever was left has been dropped
            assert not plan.transfers, "blocks are to be copied for nobody"
            return StepResult(outputs)
        result = self._compute(plan)
        result.outputs.extend(outputs)
        return result

    def _compute(self, plan: StepPlan) -> StepResult:
        try:
            if plan.transfers:
                self.cache.transfer(plan.transfers)
            batch = prepare_batch(
                plan,
                self.config.block_size,
                self._device,
                num_groups=self.block_manager.num_groups,
                null_block=self.cache.null_block,
            )
            logits = self.decoder.forward(batch, self.cache)
            sampled = sample(logits, plan.sampled_requests)
        except Exception as error:  # noqa: BLE001  whatever it is, these requests end with it and the engine goes on
            return self._fail(plan, error)
        return self._finish(plan, sampled)

    def _finish(self, plan: StepPlan, sampled: list[SampledToken]) -> StepResult:
        """Give each request its token, and let those go that end with it."""
        now = self.clock()
        usage = self.scheduler.block_usage(plan)
        updated: dict[OutputGroup, None] = {}  # ordered
        tokens = iter(sampled)
        for scheduled in plan.scheduled:
            request = scheduled.request
            if scheduled.needs_sample:
                builder = self._builders[request.request_id]
                token = next(tokens)
                self._append_token(builder, token, now)
            # After the token: an interrupt between the two must not leave a request with nothing to compute.
            self.scheduler.advance(scheduled)
            if scheduled.needs_sample:
                if token.token_id is None:  # its keys and values may be NaN too: nobody shall share them
                    self.block_manager.disown(request)
                if builder.finish_reason is not None:
                    self._end(builder, builder.finish_reason, now)
                updated[builder.group] = None
        return self._result(plan, usage, [group.build() for group in updated])

    def _fail(self, plan: StepPlan, error: Exception) -> StepResult:
        """End all requests of a step that raised."""
        message = f"the step failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.debug(message, exc_info=error)
        now = self.clock()
        usage = self.scheduler.block_usage(plan)
        groups: dict[OutputGroup, None] = {}  # ordered
        for scheduled in plan.scheduled:
            builder = self._builders[scheduled.request.request_id]
            self._end(builder, "error", now, message)
            groups[builder.group] = None
        for request in plan.preempted:  # their blocks may not have been copied
            self.block_manager.discard_swapped(request)
        return self._result(plan, usage, [group.build() for group in groups], message)

    def _append_token(self, builder: OutputBuilder, token: SampledToken, now: float) -> None:
        request, recorder = builder.request, self._recorder
        if token.token_id is None:
            builder.finish_reason, builder.error = "error", NO_FINITE_LOGITS
            return
        try:
            builder.append(token)
        except Exception as error:  # a tokenizer that chokes on one request's tokens is not the others' concern
            logger.debug("request %s could not take its token", request.request_id, exc_info=error)
            builder.finish_reason, builder.error = "error", f"detokenizing failed: {type(error).__name__}: {error}"
        recorder.num_generated_tokens += 1
        if request.first_token_time is None:
            request.first_token_time = now
            if not any(sibling.first_token_time is not None for sibling in request.siblings):
                recorder.ttfts.append(now - request.arrival_time)
        if builder.last_token_time is not None:
            recorder.inter_token_latencies.append(now - builder.last_token_time)
        builder.last_token_time = now

    def _end(self, builder: OutputBuilder, reason: FinishReason, now: float, error: str | None = None) -> None:
        request, recorder = builder.request, self._recorder
        builder.finish_reason = reason
        builder.error = error or builder.error
        request.finished_time = now
        if reason != "deadline":  # the scheduler has dropped that one itself
            self.scheduler.finish(request, is_complete=reason in ("stop", "length"))
        del self._builders[request.request_id]
        if not builder.group.is_finished:
            return
        del self._groups[builder.group.request_id]
        reasons = {other.finish_reason for other in builder.group.builders}
        if "error" in reasons:
            recorder.num_failed += 1
        elif "abort" in reasons:
            recorder.num_aborted += 1
        elif "deadline" in reasons:
            recorder.num_dropped += 1
        elif "shed" in reasons:
            recorder.num_shed += 1
        else:
            recorder.num_finished += 1
            recorder.latencies.append(now - request.arrival_time)

    def _drop(self, request: Request, now: float) -> OutputGroup:
        builder = self._builders[request.request_id]
        waited = now - request.arrival_time
        limits = request.scheduling
        self._end(
            builder,
            "deadline",
            now,
            f"the deadline can not be met: {request.num_output_tokens} tokens after {waited:.3g} s, with "
            f"first_token_timeout={limits.first_token_timeout}, timeout={limits.timeout}",
        )
        return builder.group

    def _apply_aborts(self) -> None:
        while self._requested_aborts:
            group = self._groups.get(self._requested_aborts.popleft())
            if group is None:
                continue
            for builder in group.builders:
                if builder.finish_reason is None:
                    self._end(builder, "abort", self.clock())
            self._aborted_outputs.append(group.build())

    def _result(
        self, plan: StepPlan, usage: BlockUsage, outputs: list[RequestOutput], error: str | None = None
    ) -> StepResult:
        recorder = self._recorder
        recorder.num_steps += 1
        recorder.num_computed_tokens += plan.num_tokens
        recorder.num_padding_tokens += plan.num_padding_tokens
        recorder.num_preemptions += len(plan.preempted)
        return StepResult(
            outputs,
            {scheduled.request.request_id: scheduled.num_tokens for scheduled in plan.scheduled},
            plan.num_padding_tokens,
            tuple(request.request_id for request in plan.preempted),
            usage,
            error,
        )

    def _max_num_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Prompt and generation together, cut at max_model_len as vLLM does. Raises RequestRejectedError."""
        max_model_len = self.config.max_model_len
        if num_prompt_tokens >= max_model_len:
            raise RequestRejectedError(
                f"the prompt has {num_prompt_tokens} tokens: it must have fewer than max_model_len={max_model_len}, "
                "so that one more fits"
            )
        if params.max_tokens is None:
            return max_model_len
        return min(num_prompt_tokens + params.max_tokens, max_model_len)

    def stats(self, since: EngineStats | None = None) -> EngineStats:
        """A snapshot; exact between two steps. With ``since`` its distributions cover what came after that one."""
        recorder, usage = self._recorder, self.scheduler.block_usage()
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_waiting_tokens=self.scheduler.num_waiting_tokens,
            num_blocks=usage.num_blocks,
            num_used_blocks=usage.num_used_blocks,
            num_allocated_slots=usage.num_allocated_slots,
            num_filled_slots=usage.num_filled_slots,
            max_wasted_slots=usage.max_wasted_slots,
            num_steps=recorder.num_steps,
            num_prompt_tokens=recorder.num_prompt_tokens,
            num_generated_tokens=recorder.num_generated_tokens,
            num_computed_tokens=recorder.num_computed_tokens,
            num_padding_tokens=recorder.num_padding_tokens,
            num_preemptions=recorder.num_preemptions,
            num_finished=recorder.num_finished,
            num_failed=recorder.num_failed,
            num_aborted=recorder.num_aborted,
            num_dropped=recorder.num_dropped,
            num_shed=recorder.num_shed,
            num_first_tokens=recorder.ttfts.count,
            num_inter_token_latencies=recorder.inter_token_latencies.count,
            num_swaps=self.block_manager.num_swapped_out,
            prefix_cache_queries=self.scheduler.prefix_cache_queries,
            prefix_cache_hits=self.scheduler.prefix_cache_hits,
            degradation=self._ladder.state,
            num_degradation_changes=self._ladder.num_changes,
            ttft=recorder.ttfts.distribution(since.num_first_tokens if since else 0),
            latency=recorder.latencies.distribution(since.num_finished if since else 0),
            inter_token_latency=recorder.inter_token_latencies.distribution(
                since.num_inter_token_latencies if since else 0
            ),
        )

    def check_integrity(self) -> None:
        """Every block is free or held by one running request; without requests all are free. Raises AssertionError."""
        self.scheduler.check_integrity()
        known = {request.request_id for request in (*self.scheduler.waiting, *self.scheduler.running)}
        assert known == set(self._builders), f"requests {known ^ set(self._builders)} are known to one side only"
        if not known:
            num_used = self.block_manager.num_used + self.block_manager.swap_space.num_used
            assert num_used == 0, f"idle, and {num_used} blocks are used"
