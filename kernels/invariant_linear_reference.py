"""``invariant_linear.py`` in torch, for CPU tensors: a row's bits do not depend on how many others there are.

A CPU's library too chooses its kernel by the number of rows (one row is not even a matrix to it). So rows are taken
BLOCK_ROWS at a time, the last block filled up with zeros: all products of a weight are the same call, on operands of
the same alignment. That a row comes out the same at every place of such a block no library promises; it is what the
tests find with the one that this torch has. It holds for one machine and one number of threads.

Some of torch's elementwise functions compute the end of a tensor by other code than its middle, so that an element's
last bit depends on what is beside it. What is called here does not: sums, products, quotients, ``exp``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedattn.kernels.layers_reference import rms_norm

BLOCK_ROWS = 16
# For fewer outputs, of rows that are not whole vectors, one CPU's library was found to treat a block's rows by their
# places: up to 11 outputs in fp32, where columns are no multiple of 4.
FEW_OUTPUTS = 32
COLUMN_ALIGNMENT = 16


def _linear(values: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    """Values [T, K] times weight [N, K], on top of addend, [N] or [T, N]: [T, N], rounded once."""
    rows, size = values.shape
    missing_rows = -rows % BLOCK_ROWS
    missing_columns = -size % COLUMN_ALIGNMENT if weight.shape[0] < FEW_OUTPUTS else 0
    values = F.pad(values, (0, missing_columns, 0, missing_rows))
    if missing_columns:
        weight = F.pad(weight, (0, missing_columns))
    if addend is not None and addend.ndim == 2:
        addend = F.pad(addend, (0, 0, 0, missing_rows))
    out = values.new_empty((values.shape[0], weight.shape[0]))
    for first in range(0, rows, BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        if addend is None:
            torch.mm(values[block], weight.t(), out=out[block])
        else:
            base = addend if addend.ndim == 1 else addend[block]
            torch.addmm(base, values[block], weight.t(), out=out[block])
    return out[:rows]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), computed in fp32."""
    wide = x.float()
    return (wide / (torch.exp(-wide) + 1.0)).to(x.dtype)


def norm_linear(
    values: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Tensor:
    """rms_norm(values) [T, K] times weight [N, K]; gated: [T, N / 2], silu of the first half times the second."""
    product = _linear(rms_norm(values, norm_weight, eps), weight, bias)
    if not gated:
        return product
    gate, up = product.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def add_linear(residual: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add values [T, K] times weight [N, K] to residual [T, N] in place."""
    if bias is None:
        residual.copy_(_linear(values, weight, residual))
    else:
        residual += _linear(values, weight, bias)
