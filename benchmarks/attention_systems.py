"""What the kernel benchmark times: the interface that every system has, and our own ops behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pagedattn
from benchmarks.shapes import Shape
from benchmarks.workload import AttentionInputs

OURS = "pagedattn"
INVARIANT = "pagedattn batch-invariant"
TOLERANCE = 0.01  # of the relative error: twice what bf16 results over bf16 probabilities have
FP8_TOLERANCE = 0.08  # where probabilities are rounded to e4m3 too


class UnsupportedError(Exception):
    """A system cannot do a shape; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A shape, ready to be run."""

    launch: Callable[[int], object]  # attention over the copy of this index, into its ``outs``
    plan: Callable[[int], object] | None = None  # what an engine does once a step before the layers
    plans_on_host: bool = False  # the plan runs on the host, and cannot be in a CUDA graph
    tolerance: float = TOLERANCE
    note: str = ""


class System(Protocol):
    name: str
    version: str

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        """Raises UnsupportedError for a shape that it cannot do."""


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise UnsupportedError(reason)


def require_cuda(inputs: AttentionInputs) -> None:
    require(inputs.device.type == "cuda", "needs CUDA")


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".strip()[:160]


class Ours:
    """Our own ops, with one plan for all copies as an engine has one for all layers."""

    def __init__(self, batch_invariant: bool = False) -> None:
        self.name = INVARIANT if batch_invariant else OURS
        self.version = pagedattn.__version__
        self._batch_invariant = batch_invariant

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require(shape.kind == "decode" or not self._batch_invariant, "measured for decode alone")
        step = (inputs.seq_lens, inputs.query_start_loc)
        plan = pagedattn.plan_attention(*step, **self._geometry(shape))
        options: dict[str, Any] = {
            "max_query_len": shape.max_query_len,
            "scale": shape.scale,
            "sliding_window": shape.sliding_window,
            "softcap": shape.softcap,
            "sinks": inputs.sinks,
            "q_scale": inputs.q_scale,
            "k_scale": inputs.k_scale,
            "v_scale": inputs.v_scale,
            "plan": plan,
        }

        def launch(copy: int) -> None:
            pagedattn.paged_attention(
                inputs.queries[copy], inputs.key_cache, inputs.value_cache, inputs.block_tables[copy], *step,
                out=inputs.outs[copy], **options,
            )  # fmt: skip

        def replan(_: int) -> None:
            pagedattn.plan_attention(*step, **self._geometry(shape), out=plan)

        return Prepared(launch, replan, tolerance=FP8_TOLERANCE if shape.query_dtype == "fp8" else TOLERANCE)

    def _geometry(self, shape: Shape) -> dict[str, Any]:
        return {
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "head_size_v": shape.value_size,
            "block_size": shape.block_size,
            "max_query_len": shape.max_query_len,
            "max_seq_len": shape.max_seq_len,
            "sliding_window": shape.sliding_window,
            "batch_invariant": self._batch_invariant,
        }
