"""``BatchTensors``: a step as the tensors that the ops take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchTensors:
    """One step for the decoder: ``T`` rows (tokens, then padding), ``B`` sequences, ``L`` rows that get logits.

    ``G`` groups of layers (layer_groups.py) have block tables of their own; a model whose layers are alike has one.
    Rows past ``query_start_loc[B]`` are padding, and so are those of a sequence whose length is 0: id 0, position 0,
    slot -1; the ops write zeros there.
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
    batch_invariant: bool = False  # a row's bits may depend on its own sequence alone
