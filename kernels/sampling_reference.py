"""Logits to tokens in torch: what the Triton kernels must do, and the path of CPU tensors.

Sampling is by inverse CDF: one uniform number for each token, a hash of a row's seed and position with the finalizer of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), in integers: the same on every device. So a row draws the same numbers
whatever else is in the batch, and again after a preemption.

A row's filters apply in the order min_p, top_k, top_p, each on what the one before left. They are thresholds on its
probabilities, so that tokens that tie with the last one kept stay too. Only rows that ask for a step pay for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 / golden ratio, odd
MIX_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1
# top_p looks among this many likeliest tokens first: sorting a whole vocabulary costs 20 times as much.
TOP_P_CANDIDATES = 256


def derive_seed(seed: int, counter: int) -> int:
    """The ``counter``-th seed that follows from ``seed``: 64 bits."""
    return _mix_integer((_mix_integer(seed & _MASK) + (counter + 1) * GOLDEN_GAMMA) & _MASK)


def _mix_integer(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers in which every input bit flips half of the output's."""
    value = ((value ^ (value >> 30)) * MIX_FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * MIX_FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def as_int64(bits: int) -> int:
    """The int64 with these low 64 bits: torch has no arithmetic of unsigned ones."""
    return (bits + 2**63) % 2**64 - 2**63


def _shift_right(values: Tensor, count: int) -> Tensor:
    """Zeros move in, as into an unsigned number."""
    return (values >> count) & (2 ** (64 - count) - 1)


def _mix(values: Tensor) -> Tensor:
    """``_mix_integer`` of every element."""
    values = (values ^ _shift_right(values, 30)) * as_int64(MIX_FACTORS[0])
    values = (values ^ _shift_right(values, 27)) * as_int64(MIX_FACTORS[1])
    return values ^ _shift_right(values, 31)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Number ``position`` of stream ``seed`` (int64 [B] both), fp64 in (0, 1), multiples of 2**-41.

    It is made of the upper 40 bits of ``derive_seed(seed, position)``.
    """
    bits = _mix(_mix(seed) + (position + 1) * as_int64(GOLDEN_GAMMA))
    return (_shift_right(bits, 24).double() + 0.5) * 2.0**-40


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """A token for each row of logits [B, V], int64 [B]; arguments as in ``layer_ops.sample_tokens``."""
    maxima, token_ids = logits.max(dim=-1)
    rows = (temperature > 0).nonzero().squeeze(-1)
    if 0 < rows.numel() == token_ids.numel():
        token_ids = _draw(logits, temperature, top_k, top_p, min_p, uniform(seed, position))
    elif rows.numel():
        draws = uniform(seed[rows], position[rows])
        token_ids[rows] = _draw(logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows], draws)
    return torch.where(maxima.isfinite(), token_ids, -1)


def _draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor) -> Tensor:
    """Tokens [R] of rows [R, V] at positions ``draws``, fp64 [R] in (0, 1), of what the filters leave of the CDF."""
    scaled = logits.float() / temperature[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    filtered = ((top_p < 1.0) | (top_k > 0) | (min_p > 0.0)).nonzero().squeeze(-1)
    if filtered.numel() == len(probabilities):
        thresholds = _probability_thresholds(probabilities, top_k, top_p, min_p)
        probabilities.masked_fill_(probabilities < thresholds, 0.0)
    elif filtered.numel():
        subset = probabilities[filtered]
        thresholds = _probability_thresholds(subset, top_k[filtered], top_p[filtered], min_p[filtered])
        probabilities[filtered] = subset.masked_fill_(subset < thresholds, 0.0)
    # In fp64 the sum over a large vocabulary keeps more digits than the uniform numbers have.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    sampled = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    # A row of NaN finds no place; it is reported as such by its maximum.
    return sampled.clamp_(max=logits.shape[-1] - 1)


def _probability_thresholds(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The least probability [R, 1] that min_p, top_k and top_p keep in each row of ``probabilities`` [R, V].

    They are looked for among each row's likeliest tokens, of more and more in the rows where these are too few.
    """
    vocab_size = probabilities.shape[-1]
    thresholds = torch.zeros_like(probabilities[:, :1])
    rows = torch.arange(len(thresholds), device=thresholds.device)
    num_candidates = TOP_P_CANDIDATES if bool((top_p < 1.0).any()) else 1
    num_candidates = max(num_candidates, int(top_k.masked_fill(top_k >= vocab_size, 0).max()))
    while rows.numel():
        num_candidates = min(num_candidates, vocab_size)
        subset = probabilities if rows.numel() == len(thresholds) else probabilities[rows]
        found, is_found = _thresholds_among(subset, num_candidates, top_k[rows], top_p[rows], min_p[rows])
        thresholds[rows] = found
        if num_candidates == vocab_size:
            break
        rows = rows[~is_found.squeeze(-1)]
        num_candidates *= 16
    return thresholds


def _thresholds_among(
    probabilities: Tensor, num_candidates: int, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The thresholds [R, 1], and in which rows a look at the ``num_candidates`` likeliest tokens found them.

    A row's threshold does not depend on how many were looked at: other rows change the work, not the result.
    """
    candidates = torch.topk(probabilities, num_candidates, dim=-1).values
    vocab_size = probabilities.shape[-1]
    has_top_k = ((top_k > 0) & (top_k < vocab_size)).unsqueeze(-1)
    top_k = torch.where(has_top_k, top_k.unsqueeze(-1).long(), vocab_size)
    has_top_p = (top_p < 1.0).unsqueeze(-1)

    min_p_thresholds = candidates[:, :1] * min_p.unsqueeze(-1)
    is_top_k_inside = has_top_k & (top_k <= num_candidates)
    top_k_thresholds = candidates.gather(-1, top_k.clamp(max=num_candidates) - 1) * is_top_k_inside

    is_kept = (candidates >= min_p_thresholds) & (torch.arange(num_candidates, device=top_k.device) < top_k)
    kept = candidates * is_kept
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    # What min_p and top_k leave sums to the last of these if they cut among the candidates, and to 1 if they are off.
    is_cut_inside = is_top_k_inside | (candidates[:, -1:] < min_p_thresholds)
    mass = torch.where(is_cut_inside, cumulative[:, -1:], 1.0)
    num_below = (cumulative < top_p.double().unsqueeze(-1) * mass).sum(dim=-1, keepdim=True)
    top_p_thresholds = kept.gather(-1, num_below.clamp(max=num_candidates - 1)) * has_top_p

    thresholds = torch.maximum(torch.maximum(min_p_thresholds, top_k_thresholds), top_p_thresholds)
    is_found = ~has_top_p | is_cut_inside | ((num_below < num_candidates) & (min_p_thresholds == 0.0))
    return thresholds, is_found
