"""``LLM``: a model and an engine for offline use. Call-compatible with vLLM's class, for what both have."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pagedattn.engine.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from pagedattn.engine.cache_size import default_num_blocks, longest_sequence
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.degradation import Rung
from pagedattn.engine.engine import Engine
from pagedattn.engine.kv_cache import KVCache, resolve_kv_cache_dtype
from pagedattn.engine.layer_groups import group_layers
from pagedattn.engine.monitor import Alert, AlertRule
from pagedattn.engine.orders import QueueOrder
from pagedattn.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pagedattn.engine.policy import BatchingPolicy, resolve_policy
from pagedattn.engine.preemption_costs import measure_preemption_costs
from pagedattn.engine.prompts import Prompt, TokenizedPrompt, is_token_ids, tokenize_prompt
from pagedattn.engine.queue_bound import QueueFullError
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.step_graphs import decode_batch_sizes, mixture_sizes
from pagedattn.engine.swap_space import SwapSpace
from pagedattn.engine.weights import LoadedModel, load_model

# A step of this many tokens keeps the device busy; a longer one would only make running requests wait.
DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}
PROGRESS_DELAY_SECONDS = 2.0

Message = Mapping[str, Any]
Work = list[tuple[TokenizedPrompt, SamplingParams, SchedulingParams]]
T = TypeVar("T")


class LLM:
    """Loads a model and answers prompts with it, many at once.

    Args:
        model: a name from ``pagedattn models``, a directory, a GGUF file, a hub id, or a ``LoadedModel`` to share its
            weights between engines (``dtype`` and ``device`` are then its own).
        dtype: "auto" is fp32 on a CPU and the checkpoint's dtype on CUDA.
        device: None takes CUDA where there is one.
        block_size: tokens per KV-cache block.
        num_blocks: blocks of the KV cache; None takes what ``max_num_seqs`` sequences need, as far as memory allows.
        kv_cache_dtype: what keys and values are stored as: "auto" as the model computes, or "fp8" (that is "fp8_e4m3"),
            "fp8_e5m2", "int8" or "int4", with a scale for each token and head, written as they are appended. Less
            memory and fewer bytes to read, slower prompts (docs/command-line.md).
        gpu_memory_utilization: share of the GPU's memory, in (0, 1], that weights, activations and KV cache may take.
        max_model_len: most tokens of a prompt and its generation together; None takes the model's, or what blocks hold.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; None takes 8192 on CUDA and 512 on a CPU.
        policy: how batches are formed: a row of ``POLICIES`` by name, or a ``BatchingPolicy``.
        enable_prefix_caching: requests with an equal beginning share its blocks, and compute it once.
        swap_space: GiB of host memory for the blocks of preempted requests, where the policy keeps them; whether that
            is cheaper than computing them again is measured when the engine starts.
        order: who joins a batch first: a row of ``ORDERS`` by name, or a ``QueueOrder``.
        enforce_eager: on a GPU, launch a decode's kernels one by one and not as a CUDA graph: ready sooner, slower.
        async_scheduling: on a GPU, launch a step before the tokens of the one before it are known. On a CPU there is
            nothing to overlap, and steps are always one after the other.
        batch_invariant: a request's logits, tokens and log probabilities are the same bits alone and in any batch,
            however its prompt is cut, with its prefix cached or not, and after a preemption (docs/decode-loop.md).
            Slower.
        seed: where requests without a seed get theirs from.
        max_waiting_requests, max_waiting_tokens: at most so many sequences, and tokens of them, wait in the engine;
            None is no bound. The methods here hold back what finds no room; ``llm.engine.add_request`` refuses it.
        log_interval: seconds between two lines about the engine in the log "pagedattn"; None writes none.
        check_interval: seconds between two looks at ``alerts`` and ``degradation``.
        alerts: rules about latencies, queue and cache; ``on_alert`` is called when one begins to hold and when it ends.
        degradation: what is given up under pressure, the first rung first.

    Raises ValueError for arguments out of range, and what loading the model raises.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel = "smollm2-135m-instruct",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        swap_space: float = 0.0,
        policy: str | BatchingPolicy = "default",
        order: str | QueueOrder = "fcfs",
        enforce_eager: bool = False,
        async_scheduling: bool = True,
        batch_invariant: bool = False,
        kv_cache_dtype: str = "auto",
        seed: int = 0,
        max_waiting_requests: int | None = None,
        max_waiting_tokens: int | None = None,
        log_interval: float | None = None,
        check_interval: float = 1.0,
        alerts: Sequence[AlertRule] = (),
        on_alert: Callable[[Alert], None] | None = None,
        degradation: Sequence[Rung] = (),
    ) -> None:
        if not isinstance(gpu_memory_utilization, int | float) or not 0.0 < gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization={gpu_memory_utilization!r} is not allowed: it must be a number in (0, 1]"
            )
        # Bad sizes are found before a model is loaded for minutes: None stands for a size that memory decides.
        checked = EngineConfig(
            num_blocks=1 if num_blocks is None else num_blocks,
            max_model_len=1 if max_model_len is None else max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=1 if max_num_batched_tokens is None else max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            swap_space=swap_space,
            policy=policy,
            order=order,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            batch_invariant=batch_invariant,
            kv_cache_dtype=kv_cache_dtype,
            seed=seed,
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            log_interval=log_interval,
            check_interval=check_interval,
            alerts=tuple(alerts),
            degradation=tuple(degradation),
        )
        loaded = model if isinstance(model, LoadedModel) else _load(model, dtype, device, max_model_len)
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.name = loaded.name
        self.device = loaded.decoder.device
        is_cuda = self.device.type == "cuda"
        if max_num_batched_tokens is None:
            max_num_batched_tokens = DEFAULT_BATCHED_TOKENS["cuda" if is_cuda else "cpu"]
        cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, loaded.decoder.dtype, loaded.config.head_size)
        longest = loaded.decoder.max_model_len
        if max_model_len is not None and max_model_len > longest:
            raise ValueError(f"max_model_len={max_model_len} is not allowed: {self.name} has {longest} positions")
        if num_blocks is None:
            with _out_of_memory_explained("a step of the largest size", checked, gpu_memory_utilization):
                num_blocks = default_num_blocks(
                    loaded.decoder,
                    block_size=block_size,
                    max_model_len=max_model_len or longest,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    gpu_memory_utilization=gpu_memory_utilization,
                    cache_dtype=cache_dtype,
                    enforce_eager=enforce_eager,
                    batch_invariant=batch_invariant,
                )
        max_step_tokens = max_num_batched_tokens if resolve_policy(policy).takes_blocks_stepwise else None
        groups = group_layers(loaded.config.layer_windows)
        fitting = longest_sequence(groups, num_blocks, block_size, max_step_tokens, limit=longest)
        if (max_model_len or 1) > fitting:
            raise ValueError(
                f"max_model_len={max_model_len} is not allowed: the KV cache holds {fitting} tokens "
                f"({num_blocks} blocks of {block_size})"
            )
        config = dataclasses.replace(
            checked,
            num_blocks=num_blocks,
            max_model_len=fitting if max_model_len is None else max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            async_scheduling=async_scheduling and is_cuda,
        )
        bytes_per_block = KVCache.bytes_per_block(loaded.config, block_size, cache_dtype)
        num_host_blocks = (int(swap_space) * 2**30 + int(swap_space % 1 * 2**30)) // bytes_per_block
        what = f"a KV cache of {num_blocks} blocks"
        if num_host_blocks:
            what += f" and {num_host_blocks} of swap space"
        with _out_of_memory_explained(what, config, gpu_memory_utilization):
            cache = KVCache(loaded.config, num_blocks, block_size, cache_dtype, self.device, num_host_blocks)
        with _out_of_memory_explained("warming up", config, gpu_memory_utilization):
            costs = measure_preemption_costs(loaded.decoder, cache, config) if num_host_blocks else None
            self.engine = Engine(
                loaded.decoder,
                cache,
                loaded.tokenizer,
                config,
                vocab_size=loaded.config.vocab_size,
                eos_token_ids=loaded.config.eos_token_ids,
                device=self.device,
                swap_space=SwapSpace(num_host_blocks, costs),
                on_alert=on_alert,
            )
            if is_cuda:
                self.engine.runner.warm_up(
                    max_num_batched_tokens,
                    decode_sizes=() if enforce_eager else decode_batch_sizes(max_num_seqs),
                    mixture_sizes=mixture_sizes(max_num_batched_tokens, loaded.decoder.flops_per_token),
                )
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[RequestOutput]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts; the outputs are in the prompts' order.

        A prompt is a string, a list of token ids or ``{"prompt_token_ids": [...]}``; ``sampling_params`` is one for all
        or a list with one for each, and so are ``scheduling_params``. ``priority`` has one int for each prompt: lower
        is earlier, under an order that heeds it. A request that fails or can not fit has ``error`` set and
        finish_reason "error", or "deadline" when it could not meet its own, or "shed" when it was dropped under
        pressure; the others go on. Raises ValueError, before any work, for a prompt that is empty, of the wrong type or
        has ids out of the vocabulary. Shows progress on stderr when it takes longer than two seconds, where tqdm is
        installed.
        """
        return self._generate(self._prepare(prompts, sampling_params, priority, scheduling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them. A message is ``{"role": ..., "content": ...}``, oldest first.

        As ``generate`` with the model's chat template applied. Raises ValueError when the model has none.
        """
        is_single = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_single else messages
        texts = [self.tokenizer.apply_chat_template(conversation) for conversation in conversations]
        prompts: list[Prompt] = [
            # The template has put the special tokens into the text.
            {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}
            for text in texts
        ]
        return self._generate(self._prepare(prompts, sampling_params, priority, scheduling_params), use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None = None,
    ) -> Generator[RequestOutput]:
        """As ``generate``, but yields a request's output whenever it got a token, those of all prompts interleaved.

        Each has everything so far (``text``, ``token_ids``) and what is new (``delta_text``, ``delta_token_ids``).
        Closing the iterator early aborts its requests. Bad prompts raise here and not at the first ``next``.
        """
        return self._run(self._prepare(prompts, sampling_params, priority, scheduling_params))

    def beam_search(self, prompts: Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt that a beam search finds, the best first.

        Raises ValueError, before any work, for a bad prompt.
        """
        return beam_search(self, prompts, params)

    def _prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None,
    ) -> Work:
        is_single = isinstance(prompts, str | dict) or (is_token_ids(prompts) and len(prompts) > 0)
        if not is_single and not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a prompt or a list of prompts, not {prompts!r}")
        prompt_list: list[Any] = [prompts] if is_single else list(prompts)
        if priority is not None:
            if scheduling_params is not None:
                raise ValueError("priority is not allowed with scheduling_params, which has it as a field")
            scheduling_params = [SchedulingParams(priority=value) for value in priority]
        count = len(prompt_list)
        sampling = _one_for_each(count, sampling_params, SamplingParams, "sampling_params")
        name = "scheduling_params" if priority is None else "priority"
        scheduling = _one_for_each(count, scheduling_params, SchedulingParams, name)
        vocab_size = self.model_config.vocab_size
        tokenized = (tokenize_prompt(prompt, self.tokenizer, vocab_size) for prompt in prompt_list)
        return list(zip(tokenized, sampling, scheduling, strict=True))

    def _generate(self, work: Work, use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[int, RequestOutput] = {}
        num_tokens = 0
        with (
            contextlib.closing(self._run_indexed(work, is_streamed=False)) as outputs,
            _progress_bar(use_tqdm, total=len(work), desc="requests", unit="request") as bar,
        ):
            for index, output in outputs:
                num_tokens += sum(len(completion.delta_token_ids) for completion in output.outputs)
                if output.finished:
                    finished[index] = output
                    if bar is not None:
                        bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                        bar.update()
        return [finished[index] for index in range(len(work))]

    def _run(self, work: Work) -> Generator[RequestOutput]:
        with contextlib.closing(self._run_indexed(work, is_streamed=True)) as outputs:
            for _, output in outputs:
                yield output

    def _run_indexed(self, work: Work, *, is_streamed: bool) -> Generator[tuple[int, RequestOutput]]:
        """The outputs of ``work`` as they come, each with its index; closing it aborts what is unfinished."""
        inbox: deque[RequestOutput] = deque()
        indices: dict[str, int] = {}
        held_back = deque(enumerate(work))
        arrival_time = self.engine.clock()  # of all of them: what is held back here waits too
        try:
            while held_back or indices:
                while held_back:
                    index, (prompt, sampling, scheduling) = held_back[0]
                    try:
                        request_id = self.engine.add_request(
                            prompt,
                            sampling,
                            arrival_time=arrival_time,
                            scheduling_params=scheduling,
                            is_streamed=is_streamed,
                        )
                    except QueueFullError:
                        break
                    except RequestRejectedError as error:
                        held_back.popleft()
                        yield index, self._rejected(index, prompt, str(error))
                        continue
                    held_back.popleft()
                    indices[request_id] = index
                    self._inboxes[request_id] = inbox
                if not inbox:
                    self._advance(inbox if indices else None)
                    continue
                output = inbox.popleft()
                index = indices[output.request_id]
                if output.finished:
                    del indices[output.request_id]
                    del self._inboxes[output.request_id]
                yield index, output
        finally:
            for request_id in indices:
                self._inboxes.pop(request_id, None)
                self.engine.abort(request_id)

    def _advance(self, inbox: deque[RequestOutput] | None) -> None:
        """Step, unless another iterator has just filled ``inbox``; each output goes to its own iterator's.

        None is for an iterator that has nothing in the engine yet.
        """
        with self._lock:
            if inbox:
                return
            for output in self.engine.step(with_usage=False).outputs:
                if output.request_id in self._inboxes:
                    self._inboxes[output.request_id].append(output)
            if inbox is not None and not inbox and not self.engine.has_unfinished:
                raise RuntimeError("somebody else took this iterator's outputs from llm.engine.step()")

    def _rejected(self, index: int, prompt: TokenizedPrompt, reason: str) -> RequestOutput:
        now = self.engine.clock()
        return RequestOutput(
            request_id=f"rejected-{index}",
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            outputs=[CompletionOutput(finish_reason="error")],
            finished=True,
            metrics=RequestMetrics(arrival_time=now, finished_time=now),
            error=reason,
        )


@contextlib.contextmanager
def _out_of_memory_explained(what: str, config: EngineConfig, gpu_memory_utilization: float) -> Iterator[None]:
    """Raises ValueError that says what to lower when memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has too little free memory for {what}: lower max_num_batched_tokens="
            f"{config.max_num_batched_tokens}, max_num_seqs={config.max_num_seqs}, gpu_memory_utilization="
            f"{gpu_memory_utilization} or num_blocks ({str(error).strip().partition('.')[0]})"
        ) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise ValueError(f"there is too little memory for {what}: lower num_blocks or swap_space") from error


def _one_for_each(count: int, values: T | Sequence[T] | None, kind: type[T], name: str) -> list[T]:
    """One of a kind for each of ``count`` prompts: the same for all, a list of them, or ``kind()``."""
    if values is None or isinstance(values, kind):
        return [kind() if values is None else values] * count
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be {kind.__name__} or a list of them, not {values!r}")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries: it must have one for each of the {count} prompts")
    return list(values)


def _load(
    model: str | Path, dtype: str | torch.dtype, device: str | torch.device | None, max_model_len: int | None
) -> LoadedModel:
    with _progress_bar(True, desc="download", unit="B", unit_scale=True) as bar:

        def show(num_done: int, num_total: int) -> None:
            bar.total = num_total
            bar.update(num_done - bar.n)

        return load_model(model, dtype, device, max_model_len, progress=None if bar is None else show)


@contextlib.contextmanager
def _progress_bar(enabled: bool, **options: Any) -> Iterator[Any]:
    """A tqdm bar on stderr that appears after two seconds; None where tqdm is not installed."""
    if not enabled:
        yield None
        return
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield None
        return
    with tqdm(**options, delay=PROGRESS_DELAY_SECONDS) as bar:
        yield bar
