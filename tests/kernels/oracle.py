"""Attention written out: one sequence at a time, all keys at once, in fp64. Wasteful, and meant to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AttentionCase:
    """Inputs of one ``paged_attention`` call."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    options: dict = field(default_factory=dict)

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
        )

    def to(self, device: torch.device) -> AttentionCase:
        options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.options.items()}
        query, key_cache, value_cache, table, seq_lens, starts = (t.to(device) for t in self.arguments())
        return AttentionCase(query, key_cache, value_cache, table, seq_lens, starts, self.max_query_len, options)


def unpack(stored: Tensor) -> Tensor:
    """int4 pairs as numbers, element by element."""
    if stored.dtype != torch.uint8:
        return stored.double()
    low, high = (stored & 15).double(), (stored >> 4).double()
    pairs = torch.stack((low, high), -1).flatten(-2)
    return torch.where(pairs > 7, pairs - 16, pairs)


def sequence_kv(case: AttentionCase, sequence: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, dequantized, fp64 [length, Hkv, D]."""
    block_size = case.key_cache.shape[1]
    position = torch.arange(int(case.seq_lens[sequence]), device=case.query.device)
    slots = (case.block_table[sequence, position // block_size].long(), position % block_size)
    tensors = []
    for cache, name in ((case.key_cache, "k_scale"), (case.value_cache, "v_scale")):
        values = unpack(cache[slots])
        scale = case.options.get(name)
        if scale is not None:
            scale = (scale[slots] if scale.dim() == 3 else scale).double()
            values = values * (scale if scale.dim() == 0 else scale[..., None])
        tensors.append(values)
    return tensors[0], tensors[1]


def visible_keys(case: AttentionCase, begin: int, end: int, length: int) -> Tensor:
    """Which of a sequence's keys each of its query tokens sees, bool [query_len, length]."""
    options = case.options
    query = torch.arange(length - (end - begin), length, device=case.query.device)[:, None]
    key = torch.arange(length, device=case.query.device)[None, :]
    visible = (query >= 0).expand(-1, length)
    tree_mask = options.get("tree_mask")
    if tree_mask is not None:
        first = length - (end - begin)  # position of the first query token
        tree = torch.zeros(end - begin, length, dtype=torch.bool, device=case.query.device)
        tree[:, : max(first, 0)] = True
        for column in range(max(0, -first), end - begin):
            tree[:, first + column] = tree_mask[begin:end, column]
        visible = visible & tree
    elif options.get("causal", True):
        visible = visible & (key <= query)
    if options.get("sliding_window") is not None:
        visible = visible & ((query - key).abs() < options["sliding_window"])
    if options.get("attention_chunk") is not None:
        visible = visible & (query // options["attention_chunk"] == key // options["attention_chunk"])
    return visible


def attention(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """fp64 output [T, Hq, Dv] and log-sum-exp [T, Hq]."""
    return _attention(case, torch.float64)


def math_attention(case: AttentionCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What plain torch attention gives when everything is done in ``dtype``: the yardstick of the error budget."""
    return _attention(case, dtype)


def _attention(case: AttentionCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    options, device = case.options, case.query.device
    num_tokens, num_heads, head_size = case.query.shape
    num_kv_heads = case.key_cache.shape[2]
    head_size_v = case.value_cache.shape[3] * (2 if case.value_cache.dtype == torch.uint8 else 1)
    out = torch.zeros(num_tokens, num_heads, head_size_v, dtype=torch.float64, device=device)
    lse = torch.full((num_tokens, num_heads), -math.inf, dtype=torch.float64, device=device)
    scale = options["scale"] if options.get("scale") is not None else head_size**-0.5
    for sequence in range(len(case.seq_lens)):
        begin, end = int(case.query_start_loc[sequence]), int(case.query_start_loc[sequence + 1])
        keys, values = sequence_kv(case, sequence)
        length, group = len(keys), num_heads // num_kv_heads
        query = case.query[begin:end].double()
        if options.get("q_scale") is not None:
            q_scale = options["q_scale"].double().expand(num_kv_heads).repeat_interleave(num_heads // num_kv_heads)
            query = query * q_scale[:, None]
        grouped = query.to(dtype).unflatten(1, (num_kv_heads, group))
        logits = torch.einsum("qhgd,khd->hgqk", grouped, keys.to(dtype)).flatten(0, 1) * scale
        if options.get("softcap") is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        position = torch.arange(length - (end - begin), length, device=device)
        if options.get("alibi_slopes") is not None:
            distance = (position[:, None] - torch.arange(length, device=device)).abs().double()
            logits = logits - (options["alibi_slopes"].double()[:, None, None] * distance).to(dtype)
        logits = logits.masked_fill(~visible_keys(case, begin, end, length), -math.inf)
        if options.get("sinks") is not None:
            sinks = options["sinks"].to(dtype)[:, None, None].expand(-1, end - begin, 1)
            logits = torch.cat((logits, sinks.masked_fill((position < 0)[:, None], -math.inf)), -1)
        probabilities = torch.softmax(logits, -1).nan_to_num(0.0)[..., :length]  # no visible key: 0 / 0
        probabilities = probabilities.unflatten(0, (num_kv_heads, group))
        out[begin:end] = torch.einsum("hgqk,khd->qhgd", probabilities, values.to(dtype)).flatten(1, 2).double()
        lse[begin:end] = torch.logsumexp(logits, -1).double().T
    return out, lse
