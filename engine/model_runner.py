"""``ModelRunner``: a ``StepPlan`` in, tokens out, one step or two under way at a time.

``launch`` sends what the step changes and enqueues its work; nothing in it waits for the device. ``RunningStep.wait``
hands over the tokens, when they are there. Until then the next step may be launched: it reads the last tokens where
they are, on the device. All work is on one stream, so a block that one step frees may be another's in the next.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pagedattn import layer_ops, ops
from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.batch_state import BatchState, StagedStep
from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import PendingLogprobs, SamplingTensors, TokenLogprobs, sample_again
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_graphs import StepGraphs, decode_batch_sizes
from pagedattn.engine.step_plan import ScheduledRequest, StepPlan

logger = logging.getLogger(__name__)

MAX_RUNNING_STEPS = 2
REHEARSED_LENGTHS = (1, 8, 32, 1 << 30)  # of prompts, as far as the sizes allow


class Cache(Protocol):
    """What a runner needs of a cache: the windows of its groups of layers, and to copy whole blocks."""

    @property
    def windows(self) -> tuple[int | None, ...]: ...

    null_block: int

    def transfer(self, transfers: BlockTransfers) -> None: ...


class Model(Protocol):
    """What a runner needs of a decoder: a batch's logits [L, vocabulary]; keys and values go to ``cache``."""

    def forward(self, batch: BatchTensors, cache: Any) -> Tensor: ...


class RunningStep:
    """A step that was launched. ``token_ids``: where its samples arrive on the host."""

    def __init__(
        self,
        token_ids: Tensor,
        sample_indices: Sequence[int],
        event: torch.cuda.Event | None,
        logprobs: PendingLogprobs | None,
    ) -> None:
        self._token_ids = token_ids
        self._sample_indices = sample_indices
        self._event = event
        self._logprobs = logprobs

    def wait(self) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """The tokens of the plan's requests that get one, in its order, -1 where nothing could be sampled; and what
        those of them asked for beside it, by their place in that order."""
        if self._event is not None:
            self._event.synchronize()
        sampled = self._token_ids.tolist()
        token_ids = [sampled[index] for index in self._sample_indices]
        if self._logprobs is None:
            return token_ids, {}
        by_sample = self._logprobs.read()
        places = enumerate(self._sample_indices)
        return token_ids, {place: by_sample[index] for place, index in places if index in by_sample}


class ModelRunner:
    """``decoder`` over ``cache`` on ``device``, for at most ``max_num_seqs`` sequences of ``max_model_len`` tokens.

    ``batch_invariant``: a request gets the same bits, logits and log probabilities, whatever else is in its steps.
    """

    def __init__(
        self,
        decoder: Model,
        cache: Cache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.state = BatchState(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            num_groups=len(cache.windows),
            null_block=cache.null_block,
            device=device,
            batch_invariant=batch_invariant,
        )
        self._batch_invariant = batch_invariant
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._max_model_len = max_model_len
        self._decodes: StepGraphs | None = None
        self._mixtures: StepGraphs | None = None
        self._arriving = [
            torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=self._is_cuda) for _ in range(MAX_RUNNING_STEPS)
        ]
        self._events = [torch.cuda.Event() if self._is_cuda else None for _ in range(MAX_RUNNING_STEPS)]
        self._turn = 0

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> RunningStep:
        """Enqueue a step. At most ``MAX_RUNNING_STEPS`` may be waited for at a time.

        Every token that the plan computes must be known, but for the last ones of requests that were in the step
        before. If this raises, the device's state is forgotten: then no token may be pending at the next launch.
        """
        try:
            if plan.transfers:
                self.cache.transfer(plan.transfers)
            staged = self.state.stage(plan)
            logits, token_ids, sampling = self._compute(staged)
            logprobs = self._treat_special(plan, staged, logits, token_ids, sampling)
            return self._send_back(staged, token_ids, logprobs)
        except BaseException:
            self.state.forget()
            raise

    def rehearse(self, num_seqs: int, num_tokens: int) -> None:
        """Run a step of ``num_seqs`` prompts of ``num_tokens`` tokens each, all written to the cache's first block.

        Where the ops check values it is left out: they refuse slots that are written twice.
        """
        if ops.CHECK_VALUES:
            return
        params = SamplingParams(top_p=0.9)
        requests = [Request(str(i), [0] * num_tokens, params, max_num_tokens=num_tokens + 2) for i in range(num_seqs)]
        for request in requests:
            request.block_ids = [0] * (-(-num_tokens // self.state.block_size) * self.state.num_groups)
        self.launch(StepPlan.of(ScheduledRequest(request, 0, num_tokens, True) for request in requests)).wait()
        self.state.release()

    @torch.inference_mode()
    def warm_up(
        self, max_num_batched_tokens: int, *, decode_sizes: Sequence[int] = (), mixture_sizes: Sequence[int] = ()
    ) -> None:
        """Capture steps of these sizes as graphs, and compile what other steps need, before there are any.

        What the cache holds is overwritten. Where the ops check values (which reads them back) there are no graphs, and
        a decoder that can not be captured is served without, with a warning.
        """
        if decode_sizes and not ops.CHECK_VALUES:
            try:
                self._capture(decode_sizes, mixture_sizes)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what CUDA says of work that a graph can not hold
                logger.warning("steps are launched kernel by kernel, as they can not be captured: %s", error)
                self._decodes = self._mixtures = None
                self.state.pad_mixtures(())
        if self._mixtures is None or mixture_sizes[-1] < max_num_batched_tokens:
            self._rehearse_all(max_num_batched_tokens)
        self.state.reset()

    def _capture(self, decode_sizes: Sequence[int], mixture_sizes: Sequence[int]) -> None:
        pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        if mixture_sizes:  # first: they take more memory
            self.state.pad_mixtures(mixture_sizes)
            self._mixtures = StepGraphs(self._mixture, mixture_sizes, self._device, pool)
        self._decodes = StepGraphs(self._decode, decode_sizes, self._device, pool)

    def _rehearse_all(self, max_num_batched_tokens: int) -> None:
        max_num_seqs, longest = self.state.max_num_seqs, max(1, self._max_model_len - 1)
        # What is compiled depends on powers of two: of the sequences, and of the rows of a tile of queries.
        for num_seqs in decode_batch_sizes(min(max_num_seqs, max_num_batched_tokens)):
            if num_seqs & (num_seqs - 1) and num_seqs != max_num_seqs:
                continue
            for num_tokens in {
                min(length, longest, max_num_batched_tokens // num_seqs) for length in REHEARSED_LENGTHS
            }:
                self.rehearse(num_seqs, num_tokens)

    @property
    def has_graphs(self) -> bool:
        return self._decodes is not None

    def _compute(self, staged: StagedStep) -> tuple[Tensor, Tensor, SamplingTensors]:
        """Logits, samples, and what these were drawn by."""
        if staged.mixture is None and self._decodes is not None:
            return self._decodes.replay(staged.num_rows)
        if staged.padded_size is not None and self._mixtures is not None:
            return self._mixtures.replay(staged.padded_size)
        max_seq_len = staged.max_seq_len
        if self._is_cuda:  # few bounds, so that calls are alike and their preparations are remembered
            max_seq_len = min(1 << (max_seq_len - 1).bit_length(), self._max_model_len)
        batch, sampling = self.state.prepare(staged, max_seq_len)
        return self._forward(batch, sampling, staged.num_rows, staged.sample_rows)

    def _decode(self, num_rows: int) -> tuple[Tensor, Tensor, SamplingTensors]:
        """A decode of whatever the first rows hold: all sizes follow from ``num_rows``, as a graph needs."""
        batch, sampling = self.state.prepare_decode(num_rows, self._max_model_len)
        return self._forward(batch, sampling, num_rows, None)

    def _mixture(self, size: int) -> tuple[Tensor, Tensor, SamplingTensors]:
        """Whatever step was staged last, padded to so many tokens: all sizes follow from that, as a graph needs."""
        batch, sampling = self.state.prepare_padded(size, self._max_model_len)
        return self._forward(batch, sampling, self.state.max_num_seqs, self.state.padded_sample_rows)

    def _forward(
        self, batch: BatchTensors, sampling: SamplingTensors, num_rows: int, sample_rows: Tensor | None
    ) -> tuple[Tensor, Tensor, SamplingTensors]:
        logits = self.decoder.forward(batch, self.cache)
        token_ids = layer_ops.sample_tokens(logits, *sampling)
        self.state.accept(token_ids, num_rows, sample_rows)
        return logits, token_ids, sampling

    def _treat_special(
        self, plan: StepPlan, staged: StagedStep, logits: Tensor, token_ids: Tensor, sampling: SamplingTensors
    ) -> PendingLogprobs | None:
        """What few requests ask for: tokens that do not end them yet, and log probabilities."""
        special = self.state.special
        if not special:
            return None
        asking = [
            (index, request)
            for index, request in zip(staged.sample_indices, plan.sampled_requests, strict=True)
            if request in special
        ]
        again = sample_again(logits, sampling, asking)
        if again is not None:
            indices, chosen = again
            token_ids.index_copy_(0, indices, chosen)
            rows = indices if staged.sample_rows is None else staged.sample_rows[indices].long()
            self.state.replace_last(rows, chosen)
        asked = [(index, request.params.logprobs) for index, request in asking if request.params.logprobs is not None]
        return PendingLogprobs(logits, token_ids, asked, self._batch_invariant) if asked else None

    def _send_back(self, staged: StagedStep, token_ids: Tensor, logprobs: PendingLogprobs | None) -> RunningStep:
        self._turn = (self._turn + 1) % MAX_RUNNING_STEPS
        num_samples = min(len(token_ids), staged.num_rows)
        token_ids = token_ids[:num_samples]
        arriving, event = self._arriving[self._turn][:num_samples], self._events[self._turn]
        arriving.copy_(token_ids, non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))
        return RunningStep(arriving, staged.sample_indices, event, logprobs)
