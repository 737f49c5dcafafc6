"""``Request``: its tokens and a few lengths; everything else about it is a property."""

from __future__ import annotations

from collections.abc import Sequence

from pagedattn.engine.sampling_params import SamplingParams


class Request:
    """One sequence on its way through the engine.

    ``token_ids`` are the prompt's and then the generated ones; ``num_computed_tokens`` of them have their keys and
    values in the cache, in the blocks ``block_ids`` (which the block manager alone changes). ``max_num_tokens`` bounds
    prompt and generation together. ``stop_token_ids`` are all ids that end it, the end-of-sequence ids included. Times
    are in seconds of the engine's clock, None until they happen.
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
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.token_ids: list[int] = list(prompt_token_ids)
        self.block_ids: list[int] = []
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.max_num_tokens = max_num_tokens
        self.arrival_time = arrival_time
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
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_cached_tokens(self) -> int:
        """The most cache slots it can come to need: the last token generated is never computed."""
        return self.max_num_tokens - 1

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
