"""``StepDraft``: a step while it is being scheduled, and the arithmetic of its token budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagedattn.engine.request import Request


@dataclass(slots=True)
class StepDraft:
    """Who gets how many tokens so far. ``prefill`` is the policy's rule, ``chunk_unit`` in tokens."""

    now: float
    prefill: Literal["whole", "whole_within_budget", "chunked", "equal_chunks"]
    chunk_unit: int
    token_budget: int
    may_prefill: bool  # False: only decodes run, and one prefill where there is none
    dropped: list[Request]
    num_tokens: dict[Request, int] = field(default_factory=dict)
    uncut: dict[Request, int] = field(default_factory=dict)  # under "equal_chunks", not yet taken from the budget
    num_promised_tokens: int = 0  # of them: one unit each, or less where less is left of a prompt
    joined: list[Request] = field(default_factory=list)
    starved: list[Request] = field(default_factory=list)  # found no block
    preempted: list[Request] = field(default_factory=list)

    def num_tokens_for(self, request: Request) -> int:
        """How many of its uncomputed tokens; 0 when the budget has none for it."""
        num_tokens = request.num_uncomputed_tokens
        prefill, budget = self.prefill, self.token_budget
        if num_tokens == 1 and budget > 0 and not self.uncut:
            return 1
        if prefill == "whole":
            return num_tokens
        if prefill == "whole_within_budget":
            return num_tokens if num_tokens <= max(budget, 1) or not self.num_tokens else 0
        if prefill == "equal_chunks":  # cut in the end, when it is known how many there are
            has_chunk = self.num_promised_tokens + min(num_tokens, self.chunk_unit) <= budget
            return num_tokens if has_chunk or not self.num_tokens else 0
        if num_tokens <= budget:
            return num_tokens
        return budget - budget % self.chunk_unit or (0 if self.num_tokens else budget)

    def give(self, request: Request, num_tokens: int) -> None:
        self.num_tokens[request] = num_tokens
        if self.prefill == "equal_chunks" and (num_tokens > 1 or self.uncut):
            self.uncut[request] = num_tokens
            self.num_promised_tokens += min(num_tokens, self.chunk_unit)
        else:
            self.token_budget -= num_tokens

    def take_back(self, request: Request) -> None:
        """Undo ``give``, if it was called."""
        num_tokens = self.num_tokens.pop(request, 0)
        if self.uncut.pop(request, None) is None:
            self.token_budget += num_tokens
        else:
            self.num_promised_tokens -= min(num_tokens, self.chunk_unit)

    def cut_equal_chunks(self) -> None:
        """Share the budget among the prompts: each gets the same, but no more than it needs; what is left goes to the
        first ones."""
        open_prompts, budget, unit = self.uncut, self.token_budget, self.chunk_unit
        if sum(open_prompts.values()) <= budget:
            return
        share = 0
        while open_prompts:
            share = budget // len(open_prompts)
            fitting = [request for request, num_tokens in open_prompts.items() if num_tokens <= share]
            if not fitting:
                break
            budget -= sum(open_prompts.pop(request) for request in fitting)
        chunk = share - share % unit
        budget -= chunk * len(open_prompts)
        for request, num_tokens in open_prompts.items():
            extra = min(num_tokens - chunk, unit if chunk else budget)
            if extra > budget:
                extra = 0
            budget -= extra
            self.num_tokens[request] = chunk + extra
