"""What an attention call asks for beside its batch: shared by the Triton kernel and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """The arguments of ``pagedattn.paged_attention`` that are no tensors of the batch; meaning and shapes as there."""

    scale: float
    causal: bool = True
    sliding_window: int | None = None
    attention_chunk: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    tree_mask: Tensor | None = None
