"""``StepPlan``: what one step computes, as the scheduler hands it to whoever runs it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.request import Request

NO_TRANSFERS = BlockTransfers()


class ScheduledRequest(NamedTuple):
    """``num_tokens`` tokens of ``request`` from position ``num_computed_tokens`` on are computed in this step.

    ``needs_sample``: its last token is among them, so that a new one follows.
    """

    request: Request
    num_computed_tokens: int
    num_tokens: int
    needs_sample: bool


# A ScheduledRequest of a tuple of its fields: a third of the time that calling the class takes, for every sequence.
make_scheduled = partial(tuple.__new__, ScheduledRequest)


@dataclass(frozen=True)
class StepPlan:
    """What one step computes. ``num_padding_tokens`` rows more belong to nobody (docs/architecture.md, "Padding").

    ``dropped``: requests that can not meet their deadline; the scheduler has forgotten them. With nothing else left the
    plan is empty: there is nothing to compute.
    """

    scheduled: tuple[ScheduledRequest, ...]
    num_padding_tokens: int = 0
    preempted: tuple[Request, ...] = ()
    dropped: tuple[Request, ...] = ()
    transfers: BlockTransfers = NO_TRANSFERS  # to be made before the step

    @property
    def num_seqs(self) -> int:
        return len(self.scheduled)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of requests; the padding is not counted."""
        return sum([num_tokens for _, _, num_tokens, _ in self.scheduled])

    @cached_property
    def sampled_requests(self) -> list[Request]:
        """The requests that get a token, in the order of the rows of logits."""
        return [request for request, _, _, needs_sample in self.scheduled if needs_sample]
