"""``StepResult``: what a step of the engine did; ``LaunchedStep``: one that has not ended yet."""

from __future__ import annotations

from dataclasses import dataclass

from pagedattn.engine.model_runner import RunningStep
from pagedattn.engine.outputs import RequestOutput
from pagedattn.engine.scheduler import BlockUsage
from pagedattn.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    ``outputs``: the requests that got a token or ended, those aborted since the step before included; of requests that
    are not streamed those that ended. ``plan``: what was computed, None when nothing was. ``usage``: the blocks as the
    step had them, before the requests that it ended gave theirs back; None unless asked for. ``error``: why the whole
    step failed, None when it did not.
    """

    outputs: list[RequestOutput]
    plan: StepPlan | None = None
    usage: BlockUsage | None = None
    error: str | None = None

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens computed, by sequence."""
        scheduled = self.plan.scheduled if self.plan is not None else ()
        return {item.request.request_id: item.num_tokens for item in scheduled}

    @property
    def num_padding_tokens(self) -> int:
        return self.plan.num_padding_tokens if self.plan is not None else 0

    @property
    def preempted(self) -> tuple[str, ...]:
        """Of sequences, by id."""
        return tuple(request.request_id for request in self.plan.preempted) if self.plan is not None else ()

    @property
    def num_seqs(self) -> int:
        return self.plan.num_seqs if self.plan is not None else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of requests; the padding is not counted."""
        return self.plan.num_tokens if self.plan is not None else 0


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose tokens are to come. ``running`` is None where the launch failed, with ``error``."""

    plan: StepPlan
    running: RunningStep | None
    usage: BlockUsage | None
    error: Exception | None = None
