"""A ``StepPlan`` as the tensors that the ops take: ``BatchTensors``, made by ``prepare_batch``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedattn.engine.prefix_tree import NO_BLOCK
from pagedattn.engine.step_plan import StepPlan


@dataclass(frozen=True)
class BatchTensors:
    """One step for the decoder: ``T`` rows (tokens, then padding), ``B`` sequences, ``L`` rows that get logits.

    ``G`` groups of layers (layer_groups.py) have block tables of their own; a model whose layers are alike has one.
    Rows past ``query_start_loc[B]`` are padding: id 0, position 0, slot -1; the ops write zeros there.
    """

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [G, T]; -1 = padding row
    block_table: Tensor  # int32 [G, B, max_blocks]
    seq_lens: Tensor  # int32 [B]; tokens in the cache, this step's included
    query_start_loc: Tensor  # int32 [B + 1]
    logits_indices: Tensor  # int64 [L]
    max_query_len: int
    max_seq_len: int


def prepare_batch(
    plan: StepPlan, block_size: int, device: torch.device | str, *, num_groups: int = 1, null_block: int = 0
) -> BatchTensors:
    """Lay the plan's sequences one after the other, padding rows last, on ``device``.

    ``null_block`` stands in the tables for blocks that a group's window has left behind: nothing there is seen.
    The plan must schedule at least one request. Built in numpy: a torch call per sequence would cost more than the step
    has on a small model.
    """
    scheduled = plan.scheduled
    assert scheduled, "an empty plan has no batch"
    starts = np.array([item.num_computed_tokens for item in scheduled], dtype=np.int64)
    query_lens = np.array([item.num_tokens for item in scheduled], dtype=np.int64)
    seq_lens = starts + query_lens
    query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_start_loc[1:])
    num_tokens = int(query_start_loc[-1])
    num_rows = num_tokens + plan.num_padding_tokens

    input_ids = np.zeros(num_rows, dtype=np.int64)
    input_ids[:num_tokens] = [
        token_id
        for item in scheduled
        for token_id in item.request.token_ids[item.num_computed_tokens : item.num_computed_tokens + item.num_tokens]
    ]
    positions = np.zeros(num_rows, dtype=np.int64)
    positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - query_start_loc[:-1], query_lens)

    num_blocks = -(-seq_lens // block_size)
    block_table = np.zeros((len(scheduled), int(num_blocks.max()), num_groups), dtype=np.int32)
    for row, item, count in zip(block_table, scheduled, num_blocks.tolist(), strict=True):
        row[:count] = np.reshape(item.request.block_ids[: count * num_groups], (count, num_groups))
    block_table[block_table == NO_BLOCK] = null_block

    slot_mapping = np.full((num_groups, num_rows), -1, dtype=np.int64)
    sequence_of_row = np.repeat(np.arange(len(scheduled)), query_lens)
    block_of_row, offsets = np.divmod(positions[:num_tokens], block_size)
    block_ids = block_table[sequence_of_row, block_of_row].astype(np.int64)
    slot_mapping[:, :num_tokens] = block_ids.T * block_size + offsets

    needs_sample = np.array([item.needs_sample for item in scheduled], dtype=bool)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return BatchTensors(
        input_ids=on_device(input_ids),
        positions=on_device(positions),
        slot_mapping=on_device(slot_mapping),
        block_table=on_device(np.ascontiguousarray(block_table.transpose(2, 0, 1))),
        seq_lens=on_device(seq_lens.astype(np.int32)),
        query_start_loc=on_device(query_start_loc.astype(np.int32)),
        logits_indices=on_device(query_start_loc[1:][needs_sample] - 1),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
    )
