"""``OutputProcessor``: every unfinished request with what the client gets of it; counts what happens to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pagedattn.engine.output_builder import OutputBuilder, OutputGroup
from pagedattn.engine.outputs import FinishReason
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import TokenLogprobs
from pagedattn.engine.stats import StatsRecorder

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def sequence_id(request_id: str, index: int) -> str:
    """What the scheduler knows the ``index``-th sequence of a request by."""
    return request_id if index == 0 else f"{request_id}#{index}"


class OutputProcessor:
    """``groups`` by request, ``builders`` by sequence, of which a request has one or more; both of unfinished ones."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self.groups: dict[str, OutputGroup] = {}
        self.builders: dict[str, OutputBuilder] = {}
        self.recorder = StatsRecorder()
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    def is_in_use(self, request_id: str, num_sequences: int) -> bool:
        names = (sequence_id(request_id, index) for index in range(num_sequences))
        return request_id in self.groups or any(name in self.builders for name in names)

    def add(self, group: OutputGroup, sequences: Sequence[Request]) -> None:
        for sequence in sequences:
            self.builders[sequence.request_id] = OutputBuilder(sequence, group, self._tokenizer, self._eos_token_ids)
        self.groups[group.request_id] = group
        self.recorder.num_prompt_tokens += sequences[0].num_prompt_tokens

    def find(self, request: Request) -> OutputBuilder | None:
        """None when it has ended, even if another of its name is there since."""
        builder = self.builders.get(request.request_id)
        return builder if builder is not None and builder.request is request else None

    def append(self, builder: OutputBuilder, token_id: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """The sequence gets its next token, and may end with it: then its builder has a ``finish_reason``."""
        request, recorder = builder.request, self.recorder
        try:
            builder.append(token_id, logprobs)
        except Exception as error:  # a tokenizer that chokes on one request's tokens is not the others' concern
            logger.debug("request %s could not take its token", request.request_id, exc_info=error)
            builder.finish_reason, builder.error = "error", f"detokenizing failed: {type(error).__name__}: {error}"
        recorder.num_generated_tokens += 1
        if builder.last_token_time is not None:
            recorder.inter_token_latencies.append(now - builder.last_token_time)
        elif request.first_token_time is None:
            request.first_token_time = now
            if not any(sibling.first_token_time is not None for sibling in request.siblings):
                recorder.ttfts.append(now - request.arrival_time)
        builder.last_token_time = now

    def end(self, builder: OutputBuilder, reason: FinishReason, now: float, error: str | None = None) -> None:
        """The sequence has ended; with the last one of its request that is counted, and both are forgotten."""
        request, recorder = builder.request, self.recorder
        builder.finish_reason = reason
        builder.error = error or builder.error
        request.finished_time = now
        if reason not in ("stop", "length", "error"):  # these had their text made, or could not
            builder.complete_text()
        del self.builders[request.request_id]
        if not builder.group.is_finished:
            return
        del self.groups[builder.group.request_id]
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
