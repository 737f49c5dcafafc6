"""Logits to tokens and log probabilities, for a batch whose rows have different sampling parameters.

Sampling is by inverse CDF: one uniform number per token, a hash of the request's seed and of how many tokens it has
generated. So a request draws the same numbers whatever else is in the batch, and again after a preemption. The hash is
the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), in integers on the host: the same on every device.

The order of the steps is vLLM's: log probabilities of the raw logits; ``min_tokens`` masks the ids that would end the
request; then temperature, ``min_p``, ``top_k``, ``top_p``, each on what the one before left. Only the rows that ask for
a step pay for it. Filters are thresholds on a row's probabilities, so tokens that tie with the last one kept stay too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams

_MASK = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 / golden ratio, odd
# top_p looks among this many likeliest tokens first: sorting a whole vocabulary costs 20 times as much.
_TOP_P_CANDIDATES = 256

NO_FINITE_LOGITS = "the model returned NaN or infinite logits for this request"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities of the raw logits: the chosen token's, its rank (1 = likeliest), and the likeliest."""

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """``token_id`` None: the row had no finite maximum, nothing can be sampled from it."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


def _mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers in which every input bit flips half of the output's."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(seed: int, counter: int) -> int:
    """The ``counter``-th seed that follows from ``seed``: 64 bits."""
    return _mix((_mix(seed & _MASK) + (counter + 1) * _GOLDEN_GAMMA) & _MASK)


def uniform(seed: int, position: int) -> float:
    """The ``position``-th number of stream ``seed``, in the open interval (0, 1), a multiple of 2**-41."""
    return ((derive_seed(seed, position) >> 24) + 0.5) * 2.0**-40


def sample(logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """One token for each row of ``logits`` [L, vocabulary] fp32, by the parameters of ``requests`` [L].

    ``logits`` may be written to.
    """
    assert logits.shape[0] == len(requests), f"{logits.shape[0]} rows of logits for {len(requests)} requests"
    if not requests:
        return []
    raw_logprobs = _raw_logprobs(logits, requests)
    _mask_stop_tokens(logits, requests)
    maxima, token_ids = logits.max(dim=-1)
    random_rows = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    if random_rows:
        token_ids = _sample_rows(logits, token_ids, random_rows, requests)
    chosen = torch.where(maxima.isfinite(), token_ids, -1).tolist()
    logprobs = _chosen_logprobs(raw_logprobs, chosen, requests)
    return [
        SampledToken(None) if token_id < 0 else SampledToken(token_id, logprobs.get(row))
        for row, token_id in enumerate(chosen)
    ]


def _index(rows: list[int], logits: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=logits.device)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _mask_stop_tokens(logits: Tensor, requests: Sequence[Request]) -> None:
    rows, columns = [], []
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens:
            for token_id in request.stop_token_ids:
                rows.append(row)
                columns.append(token_id)
    if rows:
        logits[_index(rows, logits), _index(columns, logits)] = -torch.inf


def _sample_rows(logits: Tensor, greedy_ids: Tensor, rows: list[int], requests: Sequence[Request]) -> Tensor:
    """``greedy_ids`` with the entries of ``rows`` replaced by sampled ones."""
    params = [requests[row].params for row in rows]
    index = _index(rows, logits)
    all_random = len(rows) == len(requests)
    scaled = (logits if all_random else logits[index]) / _column([one.temperature for one in params], logits)
    probabilities = torch.softmax(scaled, dim=-1)

    filtered = [i for i, one in enumerate(params) if one.top_p < 1.0 or one.top_k > 0 or one.min_p > 0.0]
    if filtered:
        where = _index(filtered, logits)
        subset = probabilities[where]
        thresholds = _probability_thresholds(subset, [params[i] for i in filtered])
        probabilities[where] = subset.masked_fill_(subset < thresholds, 0.0)

    # In fp64 the sum over a large vocabulary keeps more digits than the uniform numbers have.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    draws = _column([uniform(requests[row].seed, requests[row].num_output_tokens) for row in rows], cumulative)
    sampled = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(-1)
    # A row of NaN finds no place; it is reported as such by its maximum.
    return greedy_ids.index_copy(0, index, sampled.clamp_(max=logits.shape[-1] - 1))


def _probability_thresholds(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The least probability [R, 1] that min_p, top_k and top_p keep in each row of ``probabilities`` [R, vocab].

    They are looked for among each row's likeliest tokens, of more and more in the rows where these are too few.
    """
    vocab_size = probabilities.shape[-1]
    thresholds = torch.zeros_like(probabilities[:, :1])
    rows = list(range(len(params)))
    num_candidates = _TOP_P_CANDIDATES if any(one.top_p < 1.0 for one in params) else 1
    num_candidates = max(num_candidates, *(one.top_k for one in params if one.top_k < vocab_size), 1)
    while rows:
        num_candidates = min(num_candidates, vocab_size)
        index = _index(rows, probabilities)
        subset = probabilities if len(rows) == len(params) else probabilities[index]
        found, is_found = _thresholds_among(subset, num_candidates, [params[row] for row in rows])
        thresholds[index] = found
        if num_candidates == vocab_size:
            break
        rows = [row for row, is_done in zip(rows, is_found.squeeze(-1).tolist(), strict=True) if not is_done]
        num_candidates *= 16
    return thresholds


def _thresholds_among(
    probabilities: Tensor, num_candidates: int, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """The thresholds [R, 1], and in which rows a look at the ``num_candidates`` likeliest tokens found them.

    A row's threshold does not depend on how many were looked at: other rows change the work, not the result.
    """
    device, vocab_size = probabilities.device, probabilities.shape[-1]
    candidates = torch.topk(probabilities, num_candidates, dim=-1).values
    top_ks = torch.tensor([one.top_k if one.top_k > 0 else vocab_size for one in params], device=device).unsqueeze(-1)
    has_top_p = torch.tensor([one.top_p < 1.0 for one in params], device=device).unsqueeze(-1)

    min_p_thresholds = candidates[:, :1] * _column([one.min_p for one in params], candidates)
    is_top_k_inside = top_ks <= num_candidates
    top_k_thresholds = candidates.gather(-1, top_ks.clamp(max=num_candidates) - 1) * is_top_k_inside

    is_kept = (candidates >= min_p_thresholds) & (torch.arange(num_candidates, device=device) < top_ks)
    kept = candidates * is_kept
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    # What min_p and top_k leave sums to the last of these if they cut among the candidates, and to 1 if they are off.
    is_cut_inside = is_top_k_inside | (candidates[:, -1:] < min_p_thresholds)
    mass = torch.where(is_cut_inside, cumulative[:, -1:], 1.0)
    num_below = (cumulative < _column([one.top_p for one in params], cumulative) * mass).sum(dim=-1, keepdim=True)
    top_p_thresholds = kept.gather(-1, num_below.clamp(max=num_candidates - 1)) * has_top_p

    thresholds = torch.maximum(torch.maximum(min_p_thresholds, top_k_thresholds), top_p_thresholds)
    is_found = ~has_top_p | is_cut_inside | ((num_below < num_candidates) & (min_p_thresholds == 0.0))
    return thresholds, is_found


def _raw_logprobs(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], Tensor] | None:
    """The rows that ask for log probabilities, and these, [rows, vocabulary]."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return None
    return rows, torch.log_softmax(logits[_index(rows, logits)], dim=-1)


def _chosen_logprobs(
    raw_logprobs: tuple[list[int], Tensor] | None, chosen: list[int], requests: Sequence[Request]
) -> dict[int, TokenLogprobs]:
    if raw_logprobs is None:
        return {}
    rows, logprobs = raw_logprobs
    ids = _index([max(chosen[row], 0) for row in rows], logprobs).unsqueeze(-1)
    chosen_logprobs = logprobs.gather(-1, ids)
    ranks = (logprobs > chosen_logprobs).sum(dim=-1) + 1
    num_top = min(max(requests[row].params.logprobs or 0 for row in rows), logprobs.shape[-1])
    top = torch.topk(logprobs, num_top, dim=-1)
    per_row = zip(
        rows,
        chosen_logprobs.squeeze(-1).tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        strict=True,
    )
    result = {}
    for row, logprob, rank, top_ids, top_values in per_row:
        count = requests[row].params.logprobs or 0
        result[row] = TokenLogprobs(logprob, rank, top_ids[:count], top_values[:count])
    return result
