"""Beam search on top of ``LLM.generate``: a step is one token for each beam, and the prefix cache holds the beams.

Beams of one prompt share the blocks of what they have in common; a beam that goes on computes its last, partly filled
block again and nothing else.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.engine.prompts import Prompt, TokenizedPrompt, TokensPrompt, tokenize_prompt
from pagedattn.engine.sampling_params import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from pagedattn.engine.llm import LLM


@dataclass(frozen=True)
class BeamSearchParams:
    """``beam_width`` beams go on at each step, for ``max_tokens`` tokens or until they end with an end-of-sequence id
    (unless ``ignore_eos``), or prompt and generation have the model's greatest length. A score is the sum of log
    probabilities over length ** ``length_penalty``, where the length is that of what was generated, without the
    end-of-sequence id. vLLM's names.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_LOGPROBS // 2), ("max_tokens", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int >= 1, not {value!r}")
            if value < 1 or (most is not None and value > most):
                allowed = ">= 1" if most is None else f"in [1, {most}]"
                raise ValueError(f"{name}={value} is not allowed: it must be an int {allowed}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float):
            raise TypeError(f"length_penalty must be a number, not {penalty!r}")
        if not abs(penalty) <= sys.float_info.max:
            raise ValueError(f"length_penalty={penalty} is not allowed: it must be finite")


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """What was generated, the end-of-sequence id included, and the sum of its natural log probabilities."""

    token_ids: list[int]
    cum_logprob: float
    score: float
    text: str = ""
    finish_reason: str = "length"


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The best ``beam_width`` sequences of a prompt, the best first; ``error`` says why there are none."""

    prompt_token_ids: list[int]
    sequences: list[BeamSearchSequence]
    error: str | None = None


class _Search:
    """The beams of one prompt. ``beams``: generated ids and their log probability, those that go on."""

    def __init__(self, prompt: TokenizedPrompt, params: BeamSearchParams, eos_token_ids: Sequence[int]) -> None:
        self.prompt = prompt
        self.error: str | None = None
        self.beams: list[tuple[list[int], float]] = [([], 0.0)]
        self._params = params
        self._eos_token_ids = () if params.ignore_eos else tuple(eos_token_ids)
        self._ended: list[BeamSearchSequence] = []

    def extend(self, candidates: list[tuple[list[int], float]]) -> None:
        """Keep the best of all continuations; those that end leave their place to the next."""
        self.beams = []
        for token_ids, logprob in heapq.nlargest(2 * self._params.beam_width, candidates, key=lambda beam: beam[1]):
            if token_ids[-1] in self._eos_token_ids:
                self._ended.append(self._sequence(token_ids, logprob, "stop"))
            elif len(self.beams) < self._params.beam_width:
                self.beams.append((token_ids, logprob))

    def best(self) -> list[BeamSearchSequence]:
        going_on = [self._sequence(token_ids, logprob, "length") for token_ids, logprob in self.beams]
        return heapq.nlargest(self._params.beam_width, self._ended + going_on, key=lambda sequence: sequence.score)

    def _sequence(self, token_ids: list[int], logprob: float, finish_reason: str) -> BeamSearchSequence:
        length = max(1, len(token_ids) - (finish_reason == "stop"))
        score = logprob / length**self._params.length_penalty
        return BeamSearchSequence(token_ids, logprob, score, finish_reason=finish_reason)


def beam_search(llm: LLM, prompts: Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
    """All prompts together, in their order. Raises ValueError for a bad prompt, before any work."""
    eos_token_ids = llm.model_config.eos_token_ids
    searches = [
        _Search(tokenize_prompt(prompt, llm.tokenizer, llm.model_config.vocab_size), params, eos_token_ids)
        for prompt in prompts
    ]
    step = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, detokenize=False, ignore_eos=True
    )
    for _ in range(params.max_tokens):
        work = [
            (search, beam)
            for search in searches
            if search.error is None
            for beam in search.beams
            if not beam[0] or len(search.prompt.token_ids) + len(beam[0]) < llm.engine.config.max_model_len
        ]
        if not work:
            break
        beams = [
            TokensPrompt(prompt_token_ids=search.prompt.token_ids + token_ids, cache_salt=search.prompt.cache_salt)
            for search, (token_ids, _) in work
        ]
        candidates: dict[_Search, list[tuple[list[int], float]]] = {search: [] for search, _ in work}
        for (search, (token_ids, logprob)), output in zip(work, llm.generate(beams, step, use_tqdm=False), strict=True):
            if output.error is not None:
                search.error = output.error
                continue
            (best,) = output.outputs[0].logprobs or [{}]
            candidates[search] += [([*token_ids, token], logprob + entry.logprob) for token, entry in best.items()]
        for search, found in candidates.items():
            search.extend(found)
    return [_output(llm, search) for search in searches]


def _output(llm: LLM, search: _Search) -> BeamSearchOutput:
    prompt = search.prompt.token_ids
    if search.error is not None:
        return BeamSearchOutput(prompt, [], search.error)
    return BeamSearchOutput(
        prompt, [replace(sequence, text=llm.tokenizer.decode(sequence.token_ids)) for sequence in search.best()]
    )
