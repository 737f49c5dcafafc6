"""What comes back from the engine: ``RequestOutput`` and its parts. Cumulative, with what is new beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# "deadline": it could not meet its own, and was dropped; "shed": dropped under pressure, before it ran
FinishReason = Literal["stop", "length", "abort", "error", "deadline", "shed"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of one token at one position. ``rank``: 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One generated continuation.

    ``text`` and ``token_ids`` hold everything so far; ``delta_text`` and ``delta_token_ids`` what is new since the
    output before. While the request runs, text that may turn out to begin a stop string, or half a character, is held
    back. A token that ends the generation is in ``token_ids`` and not in ``text``. ``logprobs`` maps, for each token,
    ids to log probabilities, and ``cumulative_logprob`` sums the chosen ones': None unless asked for. ``stop_reason``
    is the stop string or stop id that matched, None for an end-of-sequence id.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    delta_text: str = ""
    delta_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds of the engine's clock, None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request: ``outputs`` are the ``n`` continuations that it asked for.

    ``prompt`` is None when it came as token ids; ``error`` says why it, or one of several continuations, failed.
    ``num_cached_tokens`` of the prompt were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    error: str | None = None
    num_cached_tokens: int = 0
