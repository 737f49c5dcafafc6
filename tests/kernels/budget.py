"""The error budget: at most twice the error of torch's math attention in the same dtype, against fp64, plus 1e-5."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.device import SANITIZED
from tests.kernels import oracle
from tests.kernels.oracle import AttentionCase

FLOOR = 1e-5


def error_ratios(case: AttentionCase, out: Tensor, lse: Tensor | None) -> dict[str, float]:
    """Error over budget, for the output (root mean square and maximum) and for the log-sum-exp; above 1 is a failure.

    The log-sum-exp is fp32 whatever the dtype, so it is held to what fp32 arithmetic gives: output rounding hides
    nothing. Its floor is relative where it is large: tensor cores cut off, not round, what they add up.
    """
    if SANITIZED:
        case, out, lse = case.to(torch.device("cpu")), out.cpu(), None if lse is None else lse.cpu()
    exact, exact_lse = oracle.attention(case)
    plain, _ = oracle.math_attention(case, out.dtype)
    _, plain_lse = oracle.math_attention(case, torch.float32)
    assert out.isfinite().all()
    assert not out[exact_lse.isneginf()].any()
    seen = exact_lse.isfinite()
    errors = [("out", out.double() - exact, plain - exact, FLOOR)]
    if lse is not None:
        assert torch.equal(lse.isneginf(), exact_lse.isneginf())
        floor = FLOOR * max(1.0, float(exact_lse[seen].abs().max())) if seen.any() else FLOOR
        errors.append(("lse", (lse.double() - exact_lse)[seen], (plain_lse - exact_lse)[seen], floor))
    ratios = {}
    for name, ours, theirs, floor in errors:
        if ours.numel():
            ratios[f"{name} max"] = float(ours.abs().max() / (2 * theirs.abs().max() + floor))
            ratios[f"{name} rms"] = float(ours.square().mean().sqrt() / (2 * theirs.square().mean().sqrt() + floor))
    return ratios


def assert_within_budget(case: AttentionCase, out: Tensor, lse: Tensor | None) -> float:
    """Returns the worst ratio."""
    ratios = error_ratios(case, out, lse)
    assert all(ratio <= 1 for ratio in ratios.values()), ratios
    return max(ratios.values(), default=0.0)
