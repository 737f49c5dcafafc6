"""Logits to tokens and log probabilities, for a batch whose rows have different sampling parameters.

The order of the steps is vLLM's: log probabilities of the raw logits; ``min_tokens`` masks the ids that would end the
request; then temperature, ``min_p``, ``top_k``, ``top_p``, each on what the one before left. The last four and the draw
are ``layer_ops.sample_tokens``; a request draws the same numbers whatever else is in the batch, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pagedattn import layer_ops
from pagedattn.engine.request import Request

MAX_TOP_K = 2**31 - 1  # more than any vocabulary has

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


class SamplingTensors(NamedTuple):
    """What ``layer_ops.sample_tokens`` takes beside the logits, in its order; one entry a row."""

    temperature: Tensor  # fp32; 0 is greedy
    top_k: Tensor  # int32; below 1 off
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    seed: Tensor  # int64, the seed's bits
    position: Tensor  # int64, the request's number of output tokens


def sampling_tensors(requests: Sequence[Request], device: torch.device) -> SamplingTensors:
    """The parameters of ``requests`` for their next tokens."""
    params = [request.params for request in requests]
    columns: tuple[tuple[list[Any], torch.dtype], ...] = (
        ([0.0 if one.is_greedy else one.temperature for one in params], torch.float32),
        ([min(one.top_k, MAX_TOP_K) for one in params], torch.int32),
        ([one.top_p for one in params], torch.float32),
        ([one.min_p for one in params], torch.float32),
        ([layer_ops.as_int64(request.seed) for request in requests], torch.int64),
        ([request.num_output_tokens for request in requests], torch.int64),
    )
    return SamplingTensors(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns))


def sample(logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """One token for each row of ``logits`` [L, vocabulary], by the parameters of ``requests`` [L].

    ``logits`` may be written to.
    """
    assert logits.shape[0] == len(requests), f"{logits.shape[0]} rows of logits for {len(requests)} requests"
    if not requests:
        return []
    raw_logprobs = _raw_logprobs(logits, requests)
    _mask_stop_tokens(logits, requests)
    chosen = layer_ops.sample_tokens(logits, *sampling_tensors(requests, logits.device)).tolist()
    logprobs = _chosen_logprobs(raw_logprobs, chosen, requests)
    return [
        SampledToken(None) if token_id < 0 else SampledToken(token_id, logprobs.get(row))
        for row, token_id in enumerate(chosen)
    ]


def _index(rows: list[int], logits: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=logits.device)


def _mask_stop_tokens(logits: Tensor, requests: Sequence[Request]) -> None:
    rows, columns = [], []
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens:
            for token_id in request.stop_token_ids:
                rows.append(row)
                columns.append(token_id)
    if rows:
        logits[_index(rows, logits), _index(columns, logits)] = -torch.inf


def _raw_logprobs(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], Tensor] | None:
    """The rows that ask for log probabilities, and these, [rows, vocabulary]."""
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return None
    return rows, torch.log_softmax(logits[_index(rows, logits)].float(), dim=-1)


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
