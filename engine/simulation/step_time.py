"""How long a step takes: ``StepWork`` says what is in it, a step-time model how many seconds that is.

Three models. ``FixedRate``: a step takes the same time whatever is in it, the textbook's assumption. ``Roofline``: from
first principles, bytes over bandwidth and operations over rate. ``Fitted``: linear in the work with coefficients that
were measured on a real engine (``benchmarks.step_time``).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, fields
from typing import Any, Protocol

from pagedattn.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    ``num_rows``: tokens of sequences and padding, all of which go through the linear layers. ``num_sampled``: rows that
    get logits. ``num_context_tokens``: tokens whose keys and values are read, over all sequences, this step's included.
    ``num_pairs``: (query, key) pairs of the attention.
    """

    num_seqs: int
    num_rows: int
    num_sampled: int
    num_context_tokens: int
    num_pairs: int

    @staticmethod
    def of(plan: StepPlan) -> StepWork:
        num_rows, num_sampled, num_context, num_pairs = plan.num_padding_tokens, 0, 0, 0
        for _, num_before, num_tokens, needs_sample in plan.rows():
            num_rows += num_tokens
            num_context += num_before + num_tokens
            num_pairs += num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
            num_sampled += needs_sample
        return StepWork(plan.num_seqs, num_rows, num_sampled, num_context, num_pairs)


class StepTimeModel(Protocol):
    def seconds(self, work: StepWork) -> float: ...


def _check_not_negative(model: Any) -> None:
    """All numbers of a model are finite and >= 0."""
    for field in fields(model):
        value = getattr(model, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise ValueError(f"{field.name}={value!r} is not allowed: it must be finite numbers >= 0")


@dataclass(frozen=True)
class FixedRate:
    """Every sequence in the batch gets ``tokens_per_second``, whatever else is in it; prompts cost nothing more."""

    tokens_per_second: float

    def __post_init__(self) -> None:
        _check_not_negative(self)
        if not self.tokens_per_second:
            raise ValueError("tokens_per_second=0 is not allowed: it must be > 0")

    def seconds(self, work: StepWork) -> float:
        return 1.0 / self.tokens_per_second


@dataclass(frozen=True)
class Roofline:
    """Linear layers take the longer of reading the weights and computing the rows; attention comes on top.

    ``*_per_second`` are what the device reaches, not what its data sheet says. ``flops_per_row``: of the layers;
    ``flops_per_sample``: of the logits; ``flops_per_pair``: of the attention, over all layers. ``overhead_seconds``:
    what a step costs whatever is in it, ``overhead_seconds_per_seq`` what a sequence adds on the host.
    """

    overhead_seconds: float
    overhead_seconds_per_seq: float
    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_row: float
    flops_per_sample: float
    flops_per_pair: float
    bytes_per_second: float
    flops_per_second: float

    def __post_init__(self) -> None:
        _check_not_negative(self)
        for name in ("bytes_per_second", "flops_per_second"):
            if not getattr(self, name):
                raise ValueError(f"{name}=0 is not allowed: it must be > 0")

    def seconds(self, work: StepWork) -> float:
        linear_flops = self.flops_per_row * work.num_rows + self.flops_per_sample * work.num_sampled
        linear = max(self.weight_bytes / self.bytes_per_second, linear_flops / self.flops_per_second)
        attention = max(
            self.kv_bytes_per_token * work.num_context_tokens / self.bytes_per_second,
            self.flops_per_pair * work.num_pairs / self.flops_per_second,
        )
        return self.overhead_seconds + self.overhead_seconds_per_seq * work.num_seqs + linear + attention


@dataclass(frozen=True)
class Fitted:
    """A sum of non-negative costs.

    What rows cost is given at some counts, ``row_knots``, and is linear between and past them: reading the weights
    takes as long for one row as for a few, and matrix products like some sizes better than others.
    """

    seconds_per_seq: float
    seconds_per_sample: float
    seconds_per_context_token: float
    seconds_per_pair: float
    row_knots: tuple[int, ...]
    seconds_at_knots: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_knots", tuple(self.row_knots))
        object.__setattr__(self, "seconds_at_knots", tuple(self.seconds_at_knots))
        _check_not_negative(self)
        if list(self.row_knots) != sorted(set(self.row_knots)) or len(self.row_knots) < 2:
            raise ValueError(f"row_knots={self.row_knots} is not allowed: it must be two or more that increase")
        if len(self.seconds_at_knots) != len(self.row_knots):
            raise ValueError(
                f"seconds_at_knots has {len(self.seconds_at_knots)} entries: it must have one for each of the "
                f"{len(self.row_knots)} row_knots"
            )

    def seconds(self, work: StepWork) -> float:
        index, share = locate(work.num_rows, self.row_knots)
        low, high = self.seconds_at_knots[index], self.seconds_at_knots[index + 1]
        return (
            max(0.0, low + share * (high - low))
            + self.seconds_per_seq * work.num_seqs
            + self.seconds_per_sample * work.num_sampled
            + self.seconds_per_context_token * work.num_context_tokens
            + self.seconds_per_pair * work.num_pairs
        )


def locate(num_rows: int, knots: tuple[int, ...]) -> tuple[int, float]:
    """The segment ``num_rows`` falls into, and where in it: 0 is its start, 1 its end. Past the last knot: above 1."""
    index = min(max(bisect.bisect_right(knots, num_rows) - 1, 0), len(knots) - 2)
    return index, (num_rows - knots[index]) / (knots[index + 1] - knots[index])
