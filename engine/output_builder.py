"""From sampled tokens to texts and ends: ``OutputBuilder`` of one sequence, ``OutputGroup`` of a request's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pagedattn.engine.detokenizer import Detokenizer
from pagedattn.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from pagedattn.engine.request import Request
from pagedattn.engine.sampler import TokenLogprobs

if TYPE_CHECKING:
    from pagedattn.engine.tokenizer import Tokenizer


class OutputGroup:
    """The sequences that a request asked for, and the ``RequestOutput`` that they are together.

    ``is_streamed`` False: nobody looks before the end, so text is made then, unless a stop string is looked for in it.
    """

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], *, is_streamed: bool = True
    ) -> None:
        self.request_id = request_id
        self.is_streamed = is_streamed
        self.builders: list[OutputBuilder] = []
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids

    @property
    def is_finished(self) -> bool:
        return all(builder.request.finished_time is not None for builder in self.builders)

    @property
    def error(self) -> str | None:
        """Why a sequence failed, the first that did; None when none did."""
        return next((builder.error for builder in self.builders if builder.error is not None), None)

    def build(self) -> RequestOutput:
        """The request as it stands; what is new in it counts as handed out."""
        requests = [builder.request for builder in self.builders]
        is_finished = self.is_finished
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[builder.build(index) for index, builder in enumerate(self.builders)],
            finished=is_finished,
            metrics=RequestMetrics(
                requests[0].arrival_time,
                _first(request.first_scheduled_time for request in requests),
                _first(request.first_token_time for request in requests),
                max(request.finished_time or 0.0 for request in requests) if is_finished else None,
                sum(request.num_preemptions for request in requests),
            ),
            error=self.error,
            num_cached_tokens=requests[0].num_cached_tokens,
        )


def _first(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


class OutputBuilder:
    """Decides when the sequence ends, by vLLM's rules: a stop id, then a stop string, then the length."""

    def __init__(
        self, request: Request, group: OutputGroup, tokenizer: Tokenizer, eos_token_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.group = group
        group.builders.append(self)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.last_token_time: float | None = None
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._detokenizer = Detokenizer(tokenizer, request.params) if request.params.detokenize else None
        self.is_streamed = group.is_streamed
        self._is_text_due = group.is_streamed or bool(request.params.stop_strings)
        self._num_detokenized = 0
        self._logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
        self._looks_at_each = self._logprobs is not None or (self._is_text_due and self._detokenizer is not None)
        self._cumulative_logprob = 0.0
        self._num_emitted_chars = 0
        self._num_emitted_tokens = 0

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the request's pending token, and note in ``finish_reason`` whether it ends the request."""
        request = self.request
        token_ids = request.token_ids
        token_ids.append(token_id)
        request.num_pending_tokens -= 1
        if self._looks_at_each or len(token_ids) >= request.max_num_tokens or token_id in request.stop_token_ids:
            self._look_at(token_id, logprobs)

    def _look_at(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The last token may end the sequence, or something is to be made of it at once."""
        request = self.request
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(self._decode_logprobs(token_id, logprobs))
            self._cumulative_logprob += logprobs.logprob

        if token_id in request.stop_token_ids and self._may_stop:
            is_eos = token_id in self._eos_token_ids and not request.params.ignore_eos
            self.finish_reason, self.stop_reason = "stop", None if is_eos else token_id
        if self._is_text_due and self._detokenizer is not None and self._is_cut_by(self._detokenizer):
            return
        if self.finish_reason is None and len(request.token_ids) >= request.max_num_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            self._detokenizer.flush(self._take_unseen())

    @property
    def _may_stop(self) -> bool:
        request = self.request
        return len(request.token_ids) - request.num_prompt_tokens > request.params.min_tokens

    def complete_text(self) -> None:
        """The sequence was ended from outside: add the text of tokens that were not looked at before."""
        if self._detokenizer is not None:
            for token_id in self._take_unseen():
                self._detokenizer.append(token_id, may_stop=False)

    def _take_unseen(self) -> list[int]:
        """Tokens whose text is to be made yet; from now on they count as seen."""
        request = self.request
        num_text_tokens = len(request.token_ids) - request.num_prompt_tokens
        ends_by_id = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        if ends_by_id and not request.params.include_stop_str_in_output:
            num_text_tokens -= 1  # a stop token's text does not appear
        first, self._num_detokenized = request.num_prompt_tokens + self._num_detokenized, num_text_tokens
        return request.token_ids[first : request.num_prompt_tokens + num_text_tokens]

    def build(self, index: int) -> CompletionOutput:
        """The sequence as it stands; what is new in it counts as handed out."""
        text, num_ready = "", 0
        if self._detokenizer is not None:
            text = self._detokenizer.text
            num_ready = len(text) if self.finish_reason is not None else self._detokenizer.num_ready
        token_ids = self.request.output_token_ids
        completion = CompletionOutput(
            index=index,
            text=text[:num_ready],
            token_ids=token_ids,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta_text=text[self._num_emitted_chars : num_ready],
            delta_token_ids=token_ids[self._num_emitted_tokens :],
        )
        self._num_emitted_chars, self._num_emitted_tokens = num_ready, len(token_ids)
        return completion

    def _is_cut_by(self, detokenizer: Detokenizer) -> bool:
        """Add the last token's text, unless it is a stop token's; True when the text is cut at a stop string."""
        if self.finish_reason is not None and not self.request.params.include_stop_str_in_output:
            return False
        self._num_detokenized += 1
        may_stop = self.finish_reason is None and self._may_stop
        stop_string = detokenizer.append(self.request.token_ids[-1], may_stop=may_stop)
        if stop_string is None:
            return False
        self.finish_reason, self.stop_reason = "stop", stop_string
        return True

    def _decode_logprobs(self, token_id: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """The chosen token first, then the likeliest in their order."""
        decoded = {token_id: Logprob(logprobs.logprob, logprobs.rank, self._tokenizer.token_text(token_id))}
        for index, (top_id, logprob) in enumerate(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)):
            if top_id != token_id:
                decoded[top_id] = Logprob(logprob, index + 1, self._tokenizer.token_text(top_id))
        return decoded
