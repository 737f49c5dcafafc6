"""How a batch is formed, as data: ``BatchingPolicy`` is the axes, a batching system is a row of ``POLICIES``.

The scheduler reads the axes and never a name, so that two systems are compared on one engine with nothing else changed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class BatchingPolicy:
    """The axes along which batching systems differ.

    ``reserve``: the blocks a request holds: those of the tokens computed so far and in this "step"; of the whole
    "prompt" from its first step on; or of "prompt_and_max_tokens".
    ``join``: waiting requests join the running ones in "every_step", or "when_empty": when none runs.
    ``order``: who takes from the token budget first: "running_first" or "waiting_first".
    ``chunk_prefill``: prompts are cut to fit the token budget. Without it a prompt is computed in one step, whatever
    the budget.
    ``pad``: the batch is a rectangle: prompts are padded to the longest, and a finished request keeps its row and its
    blocks until the last of its batch ends.
    ``when_full``: when a running request finds no block, "recompute_last": the request that started last gives up its
    blocks and computes its tokens again later; or "never": it cannot happen.
    ``headroom_blocks``: free blocks per running request that must remain when another one joins, so that who joins is
    not preempted at once.
    """

    reserve: Literal["step", "prompt", "prompt_and_max_tokens"]
    join: Literal["every_step", "when_empty"]
    order: Literal["running_first", "waiting_first"]
    chunk_prefill: bool
    pad: bool
    when_full: Literal["recompute_last", "never"]
    headroom_blocks: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and value not in allowed:
                raise ValueError(f"{field.name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")
        if self.when_full == "never" and self.reserve != "prompt_and_max_tokens":
            raise ValueError(f"when_full='never' is not allowed with reserve={self.reserve!r}: blocks can run out")
        if self.pad and (self.join != "when_empty" or self.chunk_prefill or self.when_full != "never"):
            raise ValueError("pad=True is not allowed unless join='when_empty', chunk_prefill=False, when_full='never'")
        if self.headroom_blocks < 0:
            raise ValueError(f"headroom_blocks={self.headroom_blocks} is not allowed: it must be >= 0")


POLICIES: dict[str, BatchingPolicy] = {
    # Continuous batching with on-demand blocks: decodes first, then prefill chunks fill the token budget.
    "default": BatchingPolicy(
        reserve="step",
        join="every_step",
        order="running_first",
        chunk_prefill=True,
        pad=False,
        when_full="recompute_last",
        headroom_blocks=1,
    ),
    # The textbook's static batching: a padded rectangle that runs until its last sequence ends. Its tokens are handed
    # out as they are produced, not when the batch ends, which favours this baseline in time to first token and latency.
    "static": BatchingPolicy(
        reserve="prompt_and_max_tokens",
        join="when_empty",
        order="waiting_first",
        chunk_prefill=False,
        pad=True,
        when_full="never",
    ),
}


def resolve_policy(policy: str | BatchingPolicy) -> BatchingPolicy:
    """A row of ``POLICIES`` by name, or the policy itself. Raises ValueError that lists the names."""
    if isinstance(policy, BatchingPolicy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not known: it must be one of {', '.join(POLICIES)}")
    return POLICIES[policy]
