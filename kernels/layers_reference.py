"""What is between a decoder's matrix products, in torch: what the Triton kernels must do, and the CPU path.

Rows are tokens. ``F.rms_norm`` accumulates in fp32 whatever the dtype, as models are trained.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of values [T, H] over its root mean square, times weight [H]."""
    return F.rms_norm(values, weight.shape, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add hidden [T, H] to residual in place, and norm what that gives, as it is stored."""
    return rms_norm(residual.add_(hidden), weight, eps)


def query_key_norm(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    """Norm every head of query [T, Hq, D] and of key [T, Hkv, D] in place."""
    query.copy_(rms_norm(query, query_weight, eps))
    key.copy_(rms_norm(key, key_weight, eps))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I], gates before what they let through, as [T, I]: silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Tensor:
    """rms_norm(values) [T, K] times weight [N, K]; gated: [T, N / 2], silu of the first half times the second."""
    product = F.linear(rms_norm(values, norm_weight, eps), weight, bias)
    return silu_and_mul(product) if gated else product


def add_linear(residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add values [T, K] times weight [N, K] to residual [T, N] in place."""
    if bias is None:
        residual.addmm_(values, weight.t())
    else:
        residual += F.linear(values, weight, bias)
