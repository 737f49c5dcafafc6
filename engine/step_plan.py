"""``StepPlan``: what one step computes, as the scheduler hands it to whoever runs it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
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


@dataclass(frozen=True)
class StepPlan:
    """What one step computes, in columns: of each request what ``ScheduledRequest`` says.

    An object for each request of each step would be most of what a step of decodes costs: where all are gone through,
    ``rows`` is for that, and ``scheduled`` for who wants names.

    ``num_padding_tokens`` rows more belong to nobody (docs/architecture.md, "Padding"). ``dropped``: requests that can
    not meet their deadline; the scheduler has forgotten them. With nothing else left the plan is empty: there is
    nothing to compute.
    """

    requests: Sequence[Request]
    num_computed_tokens: Sequence[int]
    query_lens: Sequence[int]
    needs_sample: Sequence[bool]
    num_padding_tokens: int = 0
    preempted: tuple[Request, ...] = ()
    dropped: tuple[Request, ...] = ()
    transfers: BlockTransfers = NO_TRANSFERS  # to be made before the step

    @staticmethod
    def of(scheduled: Iterable[ScheduledRequest], *, num_padding_tokens: int = 0) -> StepPlan:
        """A plan of these, and nothing else."""
        requests, num_computed_tokens, query_lens, needs_sample = zip(*scheduled, strict=True)
        return StepPlan(requests, num_computed_tokens, query_lens, needs_sample, num_padding_tokens)

    def rows(self) -> Iterator[tuple[Request, int, int, bool]]:
        """The fields of a ``ScheduledRequest`` for each request."""
        return zip(self.requests, self.num_computed_tokens, self.query_lens, self.needs_sample, strict=True)

    @cached_property
    def scheduled(self) -> tuple[ScheduledRequest, ...]:
        return tuple(map(ScheduledRequest._make, self.rows()))

    @property
    def num_seqs(self) -> int:
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        """Tokens of requests; the padding is not counted."""
        return sum(self.query_lens)

    @cached_property
    def sampled_requests(self) -> list[Request]:
        """The requests that get a token, in the order of the rows of logits."""
        return list(compress(self.requests, self.needs_sample))
