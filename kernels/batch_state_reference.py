"""The state of a batch that stays on the device from step to step, in torch: what the Triton kernels must do.

Memory, all of it one int32 tensor, so that any of it can be changed by (index, value) pairs:

- fields [NUM_FIELDS, R]: a row for each running sequence, its numbers by ``Field``; floats are there as their bits;
- block_table [G, R, W]: each row's blocks, for each of G groups of layers.

A step uses rows 0 to B - 1. One whose ``QUERY_LEN`` is 0 sits it out: it has no tokens, or one that is padding.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Field(IntEnum):
    """Where a row's numbers are."""

    LAST_TOKEN = 0  # -1: none could be sampled
    NUM_COMPUTED = 1  # tokens in the cache before this step
    QUERY_LEN = 2  # tokens of this step
    NUM_DRAWN = 3  # tokens sampled before this step
    SEED_LOW = 4
    SEED_HIGH = 5
    TOP_K = 6
    TEMPERATURE = 7  # these three are bits of fp32
    TOP_P = 8
    MIN_P = 9


NUM_FIELDS = len(Field)


class StepInputs(NamedTuple):
    """What a step reads, of T rows of tokens, B sequences and L samples."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [G, T]; -1 = padding
    seq_lens: Tensor  # int32 [B]; tokens in the cache, this step's included; 0 where the row sits it out
    temperature: Tensor  # fp32 [L]
    top_k: Tensor  # int32 [L]
    top_p: Tensor  # fp32 [L]
    min_p: Tensor  # fp32 [L]
    seed: Tensor  # int64 [L]
    position: Tensor  # int64 [L]; how many tokens the sequence had drawn


def update_words(words: Tensor, updates: Tensor) -> None:
    """words[updates[0]] = updates[1]; words int32 [N], updates int32 [2, P], no index twice."""
    words[updates[0].long()] = updates[1]


def move_rows(fields: Tensor, block_table: Tensor, moves: Tensor) -> None:
    """Copy rows moves[0] to rows moves[1] (int32 [2, M]); no row is in both."""
    source, destination = moves.long()
    fields[:, destination] = fields[:, source]
    block_table[:, destination] = block_table[:, source]


def prepare_inputs(
    fields: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    token_ids: Tensor | None,
    sample_rows: Tensor | None,
    inputs: StepInputs,
    *,
    block_size: int,
) -> None:
    """Write a step's inputs.

    ``query_start_loc`` int32 [B + 1] says where each row's tokens are; what lies behind them is padding. ``token_ids``
    int32 [T], -1 where it is the row's last token; None: everywhere. ``sample_rows`` int32 [L]: the rows that samples
    are for, -1 for nobody; None: row l for sample l.
    """
    num_rows, num_tokens = inputs.seq_lens.shape[0], inputs.input_ids.shape[0]
    query_lens = query_start_loc.diff()
    is_active = fields[Field.QUERY_LEN, :num_rows] > 0
    starts = fields[Field.NUM_COMPUTED, :num_rows]
    inputs.seq_lens.copy_(torch.where(is_active, starts + query_lens, 0))

    rows = torch.repeat_interleave(torch.arange(num_rows, device=fields.device), query_lens.long())
    num_real = rows.shape[0]
    assert num_real <= num_tokens, f"{num_real} tokens for {num_tokens} rows"
    is_real = is_active[rows]
    last = fields[Field.LAST_TOKEN, rows].clamp(min=0)
    ids = last if token_ids is None else torch.where(token_ids[:num_real] < 0, last, token_ids[:num_real])
    positions = starts[rows] + torch.arange(num_real, device=fields.device) - query_start_loc[rows]
    positions = torch.where(is_real, positions, 0).long()
    blocks = block_table[:, rows, positions // block_size].long()
    inputs.input_ids[:num_real] = torch.where(is_real, ids, 0)
    inputs.positions[:num_real] = positions
    inputs.slot_mapping[:, :num_real] = torch.where(is_real, blocks * block_size + positions % block_size, -1)
    for values, padding in ((inputs.input_ids, 0), (inputs.positions, 0), (inputs.slot_mapping, -1)):
        values[..., num_real:] = padding

    sampled = fields[:, : inputs.top_k.shape[0]] if sample_rows is None else fields[:, sample_rows.long().clamp(min=0)]
    inputs.temperature.copy_(sampled[Field.TEMPERATURE].view(torch.float32))
    inputs.top_k.copy_(sampled[Field.TOP_K])
    inputs.top_p.copy_(sampled[Field.TOP_P].view(torch.float32))
    inputs.min_p.copy_(sampled[Field.MIN_P].view(torch.float32))
    low = sampled[Field.SEED_LOW].long() & 0xFFFFFFFF
    inputs.seed.copy_(sampled[Field.SEED_HIGH].long() << 32 | low)
    inputs.position.copy_(sampled[Field.NUM_DRAWN])


def accept_tokens(fields: Tensor, token_ids: Tensor, sample_rows: Tensor | None, *, num_rows: int) -> None:
    """The step ran: its tokens are computed, and token_ids (int64 [L]) are the last ones of their rows."""
    query_lens = fields[Field.QUERY_LEN, :num_rows]
    fields[Field.NUM_COMPUTED, :num_rows] += query_lens
    if sample_rows is None:
        is_active = query_lens[: token_ids.shape[0]] > 0
        last = fields[Field.LAST_TOKEN, : token_ids.shape[0]]
        last.copy_(torch.where(is_active, token_ids.int(), last))
        fields[Field.NUM_DRAWN, : token_ids.shape[0]] += is_active
    else:
        is_somebodys = sample_rows >= 0
        rows = sample_rows[is_somebodys].long()
        fields[Field.LAST_TOKEN, rows] = token_ids[is_somebodys].int()
        fields[Field.NUM_DRAWN, rows] += 1
