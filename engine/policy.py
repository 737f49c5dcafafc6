"""How a batch is formed, as data: ``BatchingPolicy`` is the axes, a batching system is a row of ``POLICIES``.

The scheduler reads the axes and never a name, so that two systems are compared on one engine with nothing else changed.
docs/batching.md says where each row's rules come from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

_FIT_RANKS = {"step": 0, "sequence": 1, "max_tokens": 2}


@dataclass(frozen=True)
class BatchingPolicy:
    """The axes along which batching systems differ.

    Memory when a request joins: blocks for its first "step", for the "sequence" as it is now (the prompt, and after a
    preemption what it had generated), or for all that it can come to ("max_tokens").

    ``reserve``: the blocks it takes.
    ``must_fit``: the blocks that must be free.
    ``headroom_blocks``: so many more must be free for each request that runs, which keeps who joins from being
    preempted at once.
    ``watermark``: this share of all blocks must stay free when a request joins others. ``watermark_gates`` "each_join",
    or once at the step's beginning "prefills": below it only decodes run, and one prefill when there are none.

    Who joins, and when:

    ``join``: "every_step", or "when_empty": when none runs.
    ``join_ratio``, ``join_patience``: nobody joins until those who can are this share of the running ones, or this many
    steps had no join.
    ``join_after_preemption``: from the "next_step" on, or "when_one_ended".
    ``overtake_window``: in a step so many waiting requests that do not fit are passed over; with 0 the first stops all.
    ``max_overtakes``: a request that so many have passed is passed no more; None is no bound.

    Who gets tokens:

    ``order``: "running_first": running requests in the order they started, then waiting ones; "decode_first": the same,
    but prompts that are partly computed come after all decodes; or "waiting_first".
    ``mix``: newcomers and running requests share a step; without it those that join are computed alone.
    ``prefill``: "whole": a prompt is computed in one step, whatever the budget; "whole_within_budget": the same, but
    others join only as far as the token budget goes; "chunked": prompts are cut to fill the budget; "equal_chunks":
    cut so that all prompts in the step progress equally.
    ``prefill_limit``: while somebody decodes, prompts get no more tokens of a step than this, however many its budget
    has; None is no limit.
    ``chunk_unit``: a chunk that does not end its prompt is a number of "token"s or of "block"s.
    ``pad``: the batch is a rectangle: prompts are padded to the longest, and a finished request keeps its row and its
    blocks until the last of its batch ends.

    When a running request finds no block:

    ``when_full``: "preempt_last": the request that started last (with an order by priority: the least important) gives
    up its blocks, until there are enough; "preempt_starved": who finds none sits out the step, and the newest of these
    give up theirs until the others fit; "stall": who finds none sits out, and only when nobody can go on the newest
    gives up its blocks; "never": it cannot happen.
    ``preempt_by``: its tokens are forgotten and computed again ("recompute"), kept in host memory while there is room
    ("swap"), or what costs less ("cheapest").
    ``requeue``: who gave up its blocks waits in its "own_place", or at the "tail".
    """

    reserve: Literal["step", "sequence", "max_tokens"]
    must_fit: Literal["step", "sequence", "max_tokens"]
    join: Literal["every_step", "when_empty"]
    order: Literal["running_first", "decode_first", "waiting_first"]
    prefill: Literal["whole", "whole_within_budget", "chunked", "equal_chunks"]
    when_full: Literal["preempt_last", "preempt_starved", "stall", "never"]
    headroom_blocks: int = 0
    watermark: float = 0.0
    watermark_gates: Literal["each_join", "prefills"] = "each_join"
    join_ratio: float = 0.0
    join_patience: int = 0
    join_after_preemption: Literal["next_step", "when_one_ended"] = "next_step"
    overtake_window: int = 0
    max_overtakes: int | None = 0
    mix: bool = True
    prefill_limit: int | None = None
    chunk_unit: Literal["token", "block"] = "token"
    pad: bool = False
    preempt_by: Literal["recompute", "swap", "cheapest"] = "recompute"
    requeue: Literal["own_place", "tail"] = "own_place"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise ValueError(f"{field.name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")
        for name in ("headroom_blocks", "join_patience", "overtake_window", "join_ratio", "max_overtakes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is not allowed: it must be >= 0")
        if self.prefill_limit is not None and self.prefill_limit < 1:
            raise ValueError(f"prefill_limit={self.prefill_limit} is not allowed: it must be >= 1 or None")
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark={self.watermark} is not allowed: it must be in [0, 1)")
        self._validate_combinations()

    def _validate_combinations(self) -> None:
        if _FIT_RANKS[self.reserve] > _FIT_RANKS[self.must_fit]:
            raise ValueError(f"reserve={self.reserve!r} is not allowed with must_fit={self.must_fit!r}, which is less")
        if self.when_full == "never" and self.reserve != "max_tokens":
            raise ValueError(f"when_full='never' is not allowed with reserve={self.reserve!r}: blocks can run out")
        if self.pad and (self.join != "when_empty" or self.prefill != "whole" or self.when_full != "never"):
            raise ValueError("pad=True is not allowed unless join='when_empty', prefill='whole', when_full='never'")
        if self.prefill == "equal_chunks" and (self.reserve == "step" or self.order != "decode_first"):
            raise ValueError(
                "prefill='equal_chunks' is not allowed unless order='decode_first' and reserve is not 'step'"
            )
        if self.prefill_limit is not None and self.is_whole:
            raise ValueError(f"prefill_limit={self.prefill_limit} is not allowed with prefill={self.prefill!r}")
        if not self.mix and (self.order != "waiting_first" or not self.is_whole):
            raise ValueError("mix=False is not allowed unless order='waiting_first' and prompts are whole")

    @property
    def takes_blocks_stepwise(self) -> bool:
        """A request never takes the blocks of more than a step's tokens at once."""
        return self.reserve == "step" and not self.is_whole

    @property
    def is_whole(self) -> bool:
        """A prompt is computed in one step."""
        return self.prefill in ("whole", "whole_within_budget")


POLICIES: dict[str, BatchingPolicy] = {
    # Decodes first, prompts fill the budget, but while somebody decodes only up to where more rows would only take
    # longer; who joins leaves each running request two blocks to grow into, and a prompt that does not fit lets smaller
    # ones pass, for a while.
    "default": BatchingPolicy(
        reserve="step",
        must_fit="sequence",
        headroom_blocks=2,
        join="every_step",
        overtake_window=8,
        max_overtakes=32,
        order="decode_first",
        prefill="chunked",
        prefill_limit=2048,
        when_full="preempt_last",
        preempt_by="cheapest",
    ),
    # The textbook's static batching: a padded rectangle that runs until its last sequence ends. Its tokens are handed
    # out as they are produced, not when the batch ends, which favours this baseline in time to first token and latency.
    "static": BatchingPolicy(
        reserve="max_tokens",
        must_fit="max_tokens",
        join="when_empty",
        order="waiting_first",
        prefill="whole",
        pad=True,
        when_full="never",
    ),
    "orca": BatchingPolicy(
        reserve="max_tokens",
        must_fit="max_tokens",
        join="every_step",
        order="running_first",
        prefill="whole",
        when_full="never",
    ),
    "vllm": BatchingPolicy(
        reserve="step",
        must_fit="sequence",
        watermark=0.01,
        join="every_step",
        order="running_first",
        prefill="chunked",
        when_full="preempt_last",
    ),
    "trtllm-no-evict": BatchingPolicy(
        reserve="max_tokens",
        must_fit="max_tokens",
        join="every_step",
        order="decode_first",
        prefill="chunked",
        chunk_unit="block",
        when_full="never",
    ),
    "trtllm-max-utilization": BatchingPolicy(
        reserve="sequence",
        must_fit="sequence",
        join="every_step",
        order="decode_first",
        prefill="chunked",
        chunk_unit="block",
        when_full="preempt_last",
    ),
    "tgi": BatchingPolicy(
        reserve="max_tokens",
        must_fit="max_tokens",
        join="every_step",
        order="running_first",
        prefill="chunked",
        when_full="never",
    ),
    "tgi-unchunked": BatchingPolicy(
        reserve="max_tokens",
        must_fit="max_tokens",
        join="every_step",
        join_ratio=0.3,
        join_patience=20,
        order="waiting_first",
        mix=False,
        prefill="whole_within_budget",
        when_full="never",
    ),
    "splitfuse": BatchingPolicy(
        reserve="step",
        must_fit="sequence",
        join="every_step",
        order="decode_first",
        prefill="chunked",
        when_full="stall",
        requeue="tail",
    ),
    "transformers": BatchingPolicy(
        reserve="step",
        must_fit="step",
        watermark=0.15,
        watermark_gates="prefills",
        join="every_step",
        join_after_preemption="when_one_ended",
        overtake_window=256,
        max_overtakes=None,
        order="decode_first",
        prefill="chunked",
        when_full="preempt_starved",
        preempt_by="swap",
    ),
}


def resolve_policy(policy: str | BatchingPolicy) -> BatchingPolicy:
    """A row of ``POLICIES`` by name, or the policy itself. Raises ValueError that lists the names."""
    if isinstance(policy, BatchingPolicy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not known: it must be one of {', '.join(POLICIES)}")
    return POLICIES[policy]
