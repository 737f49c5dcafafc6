"""Logits to tokens and log probabilities, for a batch whose rows have different sampling parameters.

The order of the steps is vLLM's: log probabilities of the raw logits; ``min_tokens`` masks the ids that would end the
request; then temperature, ``min_p``, ``top_k``, ``top_p``, each on what the one before left. The last four and the draw
are ``layer_ops.sample_tokens``; a request draws the same numbers whatever else is in the batch, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pagedattn import layer_ops
from pagedattn.engine.device_copies import to_device, to_host
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


class SamplingTensors(NamedTuple):
    """What ``layer_ops.sample_tokens`` takes beside the logits, in its order; one entry a row."""

    temperature: Tensor  # fp32; 0 is greedy
    top_k: Tensor  # int32; below 1 off
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    seed: Tensor  # int64, the seed's bits
    position: Tensor  # int64, the request's number of output tokens


def sample_again(
    logits: Tensor, sampling: SamplingTensors, held: Sequence[tuple[int, Request]]
) -> tuple[Tensor, Tensor] | None:
    """Tokens for samples whose requests may not end yet: (their indices, the tokens), int64; None where all may.

    ``logits`` [L, vocabulary] are left as they are. ``held``: (index, request) of those that ``min_tokens`` may hold.
    """
    rows: list[int] = []
    columns: list[int] = []
    indices: list[int] = []
    for index, request in held:
        if request.num_output_tokens < request.params.min_tokens and request.stop_token_ids:
            rows += [len(indices)] * len(request.stop_token_ids)
            columns += request.stop_token_ids
            indices.append(index)
    if not indices:
        return None
    selected = to_device(indices, torch.int64, logits.device)
    masked = logits[selected]
    where = [to_device(values, torch.int64, logits.device) for values in (rows, columns)]
    masked[tuple(where)] = -torch.inf
    return selected, layer_ops.sample_tokens(masked, *(values[selected] for values in sampling))


class PendingLogprobs:
    """Log probabilities of samples, on their way from the device to the host.

    ``asked``: (index, count) of samples, and of how many likeliest tokens each wants to know. Neither ``logits`` [L,
    vocabulary] nor ``token_ids`` (int64 [L]) are used after the constructor. ``batch_invariant``: each sample's are
    computed by themselves, for how rows are summed, and which of equals is the likelier, follows from their number.
    """

    def __init__(
        self, logits: Tensor, token_ids: Tensor, asked: Sequence[tuple[int, int]], batch_invariant: bool = False
    ) -> None:
        parts = [[one] for one in asked] if batch_invariant else [asked]
        self._parts = [(part, self._send(logits, token_ids, part)) for part in parts]

    @staticmethod
    def _send(logits: Tensor, token_ids: Tensor, asked: Sequence[tuple[int, int]]) -> list[Tensor]:
        selected = to_device([index for index, _ in asked], torch.int64, logits.device)
        logprobs = torch.log_softmax(logits[selected].float(), dim=-1)
        chosen = logprobs.gather(-1, token_ids[selected].clamp(min=0).unsqueeze(-1))
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        num_top = min(max(count for _, count in asked), logprobs.shape[-1])
        top = torch.topk(logprobs, num_top, dim=-1)
        return [to_host(values) for values in (chosen.squeeze(-1), ranks, top.indices, top.values)]

    def read(self) -> dict[int, TokenLogprobs]:
        """By sample, once the device has come so far."""
        return {
            index: TokenLogprobs(logprob, rank, top_ids[:count], top_values[:count])
            for asked, arriving in self._parts
            for (index, count), logprob, rank, top_ids, top_values in zip(
                asked, *(values.tolist() for values in arriving), strict=True
            )
        }
