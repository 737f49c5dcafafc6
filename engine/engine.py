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
from typing import TYPE_CHECKING

import torch

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.degradation import Ladder
from pagedattn.engine.length_predictor import LengthPredictor
from pagedattn.engine.model_runner import Cache, Model, ModelRunner
from pagedattn.engine.monitor import Alert, Monitor, notify
from pagedattn.engine.output_builder import OutputBuilder, OutputGroup
from pagedattn.engine.output_processor import OutputProcessor, sequence_id
from pagedattn.engine.outputs import FinishReason, RequestOutput
from pagedattn.engine.prompts import Prompt, TokenizedPrompt, tokenize_prompt
from pagedattn.engine.queue_bound import QueueBound, QueueSize
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import NO_FINITE_LOGITS
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError, Scheduler, StepPlan
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.stats import EngineStats
from pagedattn.engine.step_result import LaunchedStep, StepResult
from pagedattn.engine.swap_space import SwapSpace
from pagedattn.layer_ops import derive_seed

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
        self.runner = ModelRunner(
            decoder,
            cache,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=torch.device(device),
            batch_invariant=config.batch_invariant,
        )
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._outputs = OutputProcessor(tokenizer, self._eos_token_ids)
        self._launched: deque[LaunchedStep] = deque()  # whose tokens are to come
        self._must_drain = False  # the runner has forgotten its state: every token must be known before the next launch
        self._request_counter = itertools.count()
        self._request_names = map(str, itertools.count())
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
        return bool(self._outputs.groups)

    def add_request(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        arrival_time: float | None = None,
        scheduling_params: SchedulingParams | None = None,
        is_streamed: bool = True,
    ) -> str:
        """Queue a request and return its id. ``arrival_time``: seconds of ``clock``, None = now. ``is_streamed`` False:
        the request has no output before its last one, which costs less.

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
            if request_id is not None and self._outputs.is_in_use(request_id, params.n):
                raise ValueError(f"request_id={request_id!r} is in use by an unfinished request")
            # Before the request has a number: who is refused must not change the seeds of those to come.
            if self._queue_bound.is_bounded:
                self._queue_bound.check(self.clock(), self.scheduler.queue_size, size)
            number = next(self._request_counter)
            if request_id is None:
                request_id = next(name for name in self._request_names if not self._outputs.is_in_use(name, params.n))
            seed = derive_seed(self.config.seed, number) if params.seed is None else params.seed
            sequences = [
                Request(
                    sequence_id(request_id, index),
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
            self._add_sequences(request_id, sequences, tokenized, is_streamed)
            self._queue_bound.accept(size)
        return request_id

    def _add_sequences(
        self, request_id: str, sequences: list[Request], prompt: TokenizedPrompt, is_streamed: bool
    ) -> None:
        group = OutputGroup(request_id, prompt.text, sequences[0].prompt_token_ids, is_streamed=is_streamed)
        builders = self._outputs.make_builders(group, sequences)
        for sequence in sequences:
            sequence.siblings = [other for other in sequences if other is not sequence]
            self.scheduler.add(sequence)  # the first is refused if any is
        self._outputs.add(group, builders)

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

    def step(self, *, with_usage: bool = True) -> StepResult:
        """Compute one batch. With nothing to do it only hands out what was aborted.

        With ``async_scheduling`` the batch is launched, and the result is that of the one before: nothing the first
        time. ``with_usage`` False leaves out the result's ``usage``, which costs time for each running sequence.
        """
        with self._lock:
            self._apply_aborts()
            result = self._step(with_usage) if self.has_unfinished else StepResult([])
            self._apply_aborts()
            result.outputs.extend(self._aborted_outputs)
            self._aborted_outputs.clear()
            alerts = self._observe(result) if self._monitor is not None else []
            if not self.has_unfinished:
                self._drain()
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
        builder = self._outputs.builders[request]
        message = f"shed under pressure: priority {request.scheduling.priority} was the lowest that waited"
        self._end(builder, "shed", now, message)
        return builder.group

    def _step(self, with_usage: bool) -> StepResult:
        """Schedule and launch a step; then finish it, or the one before while it runs."""
        outputs: list[RequestOutput] = []
        num_left_running = 0
        if not self._must_drain:
            now = self.clock()
            plan = self.scheduler.schedule(now)
            if self._queue_bound.is_bounded:
                self._queue_bound.observe(now, self.scheduler.queue_size)
            dropped = dict.fromkeys(self._drop(request, now) for request in plan.dropped)
            outputs += [group.build() for group in dropped]
            if plan.requests:
                self._launch(plan, with_usage)
                num_left_running = int(self.config.async_scheduling and not self._must_drain)
            else:  # whoever was left has been dropped, or has only its last token to come
                assert not plan.transfers, "blocks are to be copied for nobody"
        if len(self._launched) <= num_left_running:
            return StepResult(outputs)
        result = self._finish_next()
        result.outputs.extend(outputs)
        return result

    def _launch(self, plan: StepPlan, with_usage: bool) -> None:
        """Enqueue the plan's work; from here on its tokens count as computed, and those that follow as pending."""
        usage = self.scheduler.block_usage(plan) if with_usage else None
        try:
            running = self.runner.launch(plan)
        except BaseException as error:
            self._must_drain = bool(self._launched)
            if not isinstance(error, Exception):
                raise
            self._must_drain = True
            self._launched.append(LaunchedStep(plan, None, usage, error))
            return
        self._launched.append(LaunchedStep(plan, running, usage))
        for request in plan.sampled_requests:
            request.num_pending_tokens += 1
        self.scheduler.advance(*plan.rows())

    def _finish_next(self) -> StepResult:
        """Wait for the step that was launched first, give its requests their tokens, and let those go that end."""
        step = self._launched[0]
        if step.running is None:
            assert step.error is not None
            return self._fail(step, step.error)
        try:
            token_ids, logprobs = step.running.wait()
        except Exception as error:  # noqa: BLE001  whatever it is, these requests end with it and the engine goes on
            return self._fail(step, error)
        self._pop_launched()
        now = self.clock()
        sampled = step.plan.sampled_requests
        builders = self._outputs.accept(sampled, token_ids, logprobs, now)
        self.scheduler.learn(sampled)
        for builder in builders:
            if builder.finish_reason is not None:
                if builder.error == NO_FINITE_LOGITS:  # its keys and values may be NaN too: nobody shall share them
                    self.block_manager.disown(builder.request)
                self._end(builder, builder.finish_reason, now)
        updated = dict.fromkeys(builder.group for builder in builders)  # ordered
        return self._result(step, updated)

    def _fail(self, step: LaunchedStep, error: Exception) -> StepResult:
        """End all requests of a step that raised."""
        message = f"the step failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.debug(message, exc_info=error)
        self.runner.state.forget()
        self._must_drain = True
        self._pop_launched()
        now = self.clock()
        updated: dict[OutputGroup, None] = {}  # ordered
        for request in step.plan.requests:
            builder = self._outputs.builders.get(request)
            if builder is not None:
                self._end(builder, "error", now, message)
                updated[builder.group] = None
        for request in step.plan.preempted:  # their blocks may not have been copied
            self.block_manager.discard_swapped(request)
        return self._result(step, updated, message)

    def _pop_launched(self) -> None:
        self._launched.popleft()
        self._must_drain = self._must_drain and bool(self._launched)

    def _drain(self) -> None:
        """All have ended: wait for a step that runs for nobody any more, and let go of the ended."""
        while self._launched:
            self._finish_next()
        self.runner.state.release()

    def _end(self, builder: OutputBuilder, reason: FinishReason, now: float, error: str | None = None) -> None:
        if reason != "deadline":  # the scheduler has dropped that one itself
            self.scheduler.finish(builder.request, is_complete=reason in ("stop", "length"))
        self._outputs.end(builder, reason, now, error)

    def _drop(self, request: Request, now: float) -> OutputGroup:
        builder = self._outputs.builders[request]
        waited = now - request.arrival_time
        limits = request.scheduling
        self._end(
            builder,
            "deadline",
            now,
            f"the deadline can not be met: {len(request.output_token_ids)} tokens after {waited:.3g} s, with "
            f"first_token_timeout={limits.first_token_timeout}, timeout={limits.timeout}",
        )
        return builder.group

    def _apply_aborts(self) -> None:
        while self._requested_aborts:
            group = self._outputs.groups.get(self._requested_aborts.popleft())
            if group is None:
                continue
            for builder in group.builders:
                if builder.finish_reason is None:
                    self._end(builder, "abort", self.clock())
            self._aborted_outputs.append(group.build())

    def _result(self, step: LaunchedStep, updated: Iterable[OutputGroup], error: str | None = None) -> StepResult:
        recorder, plan = self._outputs.recorder, step.plan
        recorder.num_steps += 1
        recorder.num_computed_tokens += plan.num_tokens
        recorder.num_padding_tokens += plan.num_padding_tokens
        recorder.num_preemptions += len(plan.preempted)
        outputs = [group.build() for group in updated if group.is_streamed or group.is_finished]
        return StepResult(outputs, plan, step.usage, error)

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
        return self._outputs.recorder.snapshot(self.scheduler, self._ladder, since)

    def check_integrity(self) -> None:
        """Every block is free or held by one running request; without requests all are free. Raises AssertionError."""
        self.scheduler.check_integrity()
        known = {*self.scheduler.waiting, *self.scheduler.running}
        assert known == set(self._outputs.builders), f"{known ^ set(self._outputs.builders)} are known to one side only"
        if not known:
            num_used = self.block_manager.num_used + self.block_manager.swap_space.num_used
            assert num_used == 0, f"idle, and {num_used} blocks are used"
