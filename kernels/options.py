"""What an attention call asks for beside its batch: shared by the Triton kernel and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pagedattn.kernels.tiling import LOG2E


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

    @property
    def numbers(self) -> tuple[float, float, int, int]:
        """What every kernel is given: factors that bring logits to powers of two, before and after a softcap's tanh;
        window and chunk, 0 where there is none."""
        window, chunk = self.sliding_window or 0, self.attention_chunk or 0
        if self.softcap is None:
            return self.scale * LOG2E, 0.0, window, chunk
        return self.scale / self.softcap, self.softcap * LOG2E, window, chunk
