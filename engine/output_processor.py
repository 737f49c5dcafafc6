"""``OutputProcessor``: every unfinished request with what the client gets of it; counts what happens to them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

from pagedattn.engine.output_builder import OutputBuilder, OutputGroup
from pagedattn.engine.outputs import FinishReason
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import NO_FINITE_LOGITS, TokenLogprobs
from pagedattn.engine.stats import StatsRecorder

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def sequence_id(request_id: str, index: int) -> str:
    """What the scheduler knows the ``index``-th sequence of a request by."""
    return request_id if index == 0 else f"{request_id}#{index}"


class OutputProcessor:
    """``groups`` by request id, ``builders`` by sequence, one or more of a request; both of unfinished ones."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self.groups: dict[str, OutputGroup] = {}
        self.builders: dict[Request, OutputBuilder] = {}
        self.recorder = StatsRecorder()
        self._last_time = math.nan  # when the step before handed out its tokens
        self._sequence_ids: set[str] = set()  # of those in builders
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    def is_in_use(self, request_id: str, num_sequences: int) -> bool:
        names = (sequence_id(request_id, index) for index in range(num_sequences))
        return request_id in self.groups or any(name in self._sequence_ids for name in names)

    def make_builders(self, group: OutputGroup, sequences: Sequence[Request]) -> list[OutputBuilder]:
        """Of a request that is not known yet. The tokenizer may raise here."""
        return [OutputBuilder(sequence, group, self._tokenizer, self._eos_token_ids) for sequence in sequences]

    def add(self, group: OutputGroup, builders: Sequence[OutputBuilder]) -> None:
        for builder in builders:
            self.builders[builder.request] = builder
            self._sequence_ids.add(builder.request.request_id)
        self.groups[group.request_id] = group
        self.recorder.num_prompt_tokens += builders[0].request.num_prompt_tokens

    def accept(
        self, requests: Sequence[Request], token_ids: Sequence[int], logprobs: Mapping[int, TokenLogprobs], now: float
    ) -> list[OutputBuilder]:
        """Give requests their tokens, -1 where none could be sampled, and what they asked for beside, by their place.

        Returns the builders of those that clients are to hear of: who is streamed, and who has a ``finish_reason`` now.
        """
        updated, builders, recorder = [], self.builders, self.recorder
        last_time, num_steady = self._last_time, 0  # who got a token the last time too
        extras = map(logprobs.get, range(len(token_ids))) if logprobs else repeat(None, len(token_ids))
        for builder, token_id, extra in zip(map(builders.get, requests), token_ids, extras, strict=True):
            if builder is None:  # the request has ended before; the token is nobody's
                continue
            if token_id < 0:
                builder.finish_reason, builder.error = "error", NO_FINITE_LOGITS
                updated.append(builder)
                continue
            try:
                builder.append(token_id, extra)
            except Exception as error:  # a tokenizer that chokes on one request's tokens is not the others' concern
                logger.debug("request %s could not take its token", builder.request.request_id, exc_info=error)
                builder.finish_reason, builder.error = "error", f"detokenizing failed: {type(error).__name__}: {error}"
            if builder.last_token_time == last_time:
                num_steady += 1
            else:
                self._note_late_token(builder, now)
            builder.last_token_time = now
            if builder.is_streamed or builder.finish_reason is not None:
                updated.append(builder)
        if num_steady:
            recorder.inter_token_latencies.append(now - last_time, num_steady)
            recorder.num_generated_tokens += num_steady
        self._last_time = now
        return updated

    def _note_late_token(self, builder: OutputBuilder, now: float) -> None:
        """A sequence's first token, or the first one after steps that it sat out."""
        self.recorder.num_generated_tokens += 1
        if builder.last_token_time is not None:
            self.recorder.inter_token_latencies.append(now - builder.last_token_time)
        else:
            self._note_first_token(builder.request, now)

    def _note_first_token(self, request: Request, now: float) -> None:
        request.first_token_time = now
        if all(sibling.first_token_time is None for sibling in request.siblings):
            self.recorder.ttfts.append(now - request.arrival_time)

    def end(self, builder: OutputBuilder, reason: FinishReason, now: float, error: str | None = None) -> None:
        """The sequence has ended; with the last one of its request that is counted, and both are forgotten."""
        request, recorder = builder.request, self.recorder
        builder.finish_reason = reason
        builder.error = error or builder.error
        request.finished_time = now
        if reason not in ("stop", "length", "error"):  # these had their text made, or could not
            builder.complete_text()
        del self.builders[request]
        self._sequence_ids.remove(request.request_id)
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
