"""Driving a ``Decoder`` without the engine: sequences in shuffled blocks, any number of tokens of each per step."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.kv_cache import KVCache
from pagedattn.engine.layer_groups import group_layers
from pagedattn.engine.model import Decoder


class PagedRun:
    """A cache with room for ``num_seqs`` sequences of ``max_len`` tokens, each in blocks of its own in random order."""

    def __init__(self, decoder: Decoder, num_seqs: int, max_len: int, block_size: int) -> None:
        self.decoder = decoder
        self.block_size = block_size
        blocks_each = -(-max_len // block_size)
        num_groups = len(group_layers(decoder.config.layer_windows).windows)
        num_blocks = num_groups * num_seqs * blocks_each
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self.block_table = order.view(num_groups, num_seqs, blocks_each).int()
        self.cache = KVCache(decoder.config, num_blocks, block_size, decoder.dtype, decoder.device)
        for keys, values, *_ in self.cache.layers:  # what was never written must never count
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
        self.lengths = [0] * num_seqs

    @torch.inference_mode()
    def step(self, tokens: dict[int, list[int]], num_padding: int = 0) -> Tensor:
        """Append tokens to sequences; the logits of every new token, in order, ``[T, vocab_size]``."""
        starts = {seq: self.lengths[seq] for seq in tokens}
        for seq, ids in tokens.items():
            self.lengths[seq] += len(ids)
        positions = [starts[seq] + offset for seq, ids in tokens.items() for offset in range(len(ids))]
        rows = [seq for seq, ids in tokens.items() for _ in ids]
        blocks = self.block_table[:, rows, [position // self.block_size for position in positions]].long()
        slots = blocks * self.block_size + torch.tensor(positions) % self.block_size
        query_lens = [len(ids) for ids in tokens.values()]
        padding = [0] * num_padding
        device = self.decoder.device
        batch = BatchTensors(
            input_ids=torch.tensor([token for ids in tokens.values() for token in ids] + padding, device=device),
            positions=torch.tensor(positions + padding, device=device),
            slot_mapping=torch.nn.functional.pad(slots, (0, num_padding), value=-1).to(device),
            block_table=self.block_table[:, list(tokens)].to(device),
            seq_lens=torch.tensor([self.lengths[seq] for seq in tokens], dtype=torch.int32, device=device),
            query_start_loc=torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
            logits_indices=torch.arange(len(positions), device=device),
            max_query_len=max(query_lens),
            max_seq_len=max(self.lengths[seq] for seq in tokens),
        )
        return self.decoder.forward(batch, self.cache)
