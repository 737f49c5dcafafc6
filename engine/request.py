"""``Request``: its tokens and a few lengths; everything else about it is a property."""

from __future__ import annotations

from collections.abc import Sequence

from pagedattn.engine.prefix_tree import PrefixHashes
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduling_params import SchedulingParams

_PLAIN = SchedulingParams()


class Request:
    """One sequence on its way through the engine.

    ``token_ids`` are the prompt's and then the generated ones, as far as they are known; ``num_pending_tokens`` more
    are being sampled by a step that runs, and count as tokens too. ``num_computed_tokens`` of them all have their keys
    and values in the cache, or will when the steps that run have ended, in the blocks ``block_ids`` (which the block
    manager alone changes). Requests of an equal
    ``cache_salt`` share what is cached; ``siblings`` have the same prompt and fork from it. ``max_num_tokens`` bounds
    prompt and generation together. ``stop_token_ids`` are all ids that end it, the end-of-sequence ids included. Times
    are in seconds of the engine's clock, None until they happen.

    The scheduler's own: ``queue_time`` and ``queue_number`` are its place in line, by time and among equal times;
    ``num_overtaken`` counts who joined past it; ``expected_output_tokens`` is an estimate, None until somebody asked;
    ``is_billed`` says that its client was charged for the prompt. While it has computed fewer than ``steady_until``
    tokens it decodes, and all that a step has to do for it is to give it one token.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_num_tokens: int,
        arrival_time: float = 0.0,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        scheduling: SchedulingParams = _PLAIN,
        cache_salt: str = "",
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.scheduling = scheduling
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.token_ids: list[int] = list(prompt_token_ids)
        self.block_ids: list[int] = []
        self.cache_salt = cache_salt
        self.prefix_hashes: PrefixHashes | None = None
        self.siblings: list[Request] = []
        self.num_prompt_tokens = len(self.token_ids)
        self.num_pending_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # computed already when it joined for the first time
        self.num_preemptions = 0
        self.max_num_tokens = max_num_tokens
        self.arrival_time = arrival_time
        self.queue_time = arrival_time
        self.queue_number = 0
        self.num_overtaken = 0
        self.expected_output_tokens: float | None = None
        self.is_billed = False
        self.steady_until = 0
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.finished_time: float | None = None

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.num_prompt_tokens} prompt + {self.num_output_tokens} output tokens, "
            f"{self.num_computed_tokens} computed, {len(self.block_ids)} blocks)"
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step can be given. The last that it may have is never computed: none while it is pending."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        if num_tokens >= self.max_num_tokens:
            num_tokens = self.max_num_tokens - 1
        return num_tokens - self.num_computed_tokens

    @property
    def max_cached_tokens(self) -> int:
        """The most cache slots it can come to need: the last token generated is never computed."""
        return self.max_num_tokens - 1

    @property
    def min_num_tokens(self) -> int:
        """The fewest tokens, prompt and generation together, that it can end with; an abort aside."""
        if not self.stop_token_ids and not self.params.stop_strings:
            return self.max_num_tokens
        return min(self.num_prompt_tokens + max(self.params.min_tokens, 1), self.max_num_tokens)

    @property
    def first_token_deadline(self) -> float | None:
        """When its first token must have come; None for whenever."""
        timeout = self.scheduling.first_token_timeout
        return None if timeout is None else self.arrival_time + timeout

    @property
    def deadline(self) -> float | None:
        """When it must have ended; None for whenever."""
        timeout = self.scheduling.timeout
        return None if timeout is None else self.arrival_time + timeout

    @property
    def next_deadline(self) -> float | None:
        """The earlier of the two that still count; None for whenever."""
        first, end = self.first_token_deadline, self.deadline
        if first is None or self.num_output_tokens:
            return end
        return first if end is None else min(first, end)

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
