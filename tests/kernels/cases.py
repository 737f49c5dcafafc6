"""Random attention inputs: shapes drawn from what engines really use, caches poisoned where nothing may be read."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.device import IS_CUDA
from tests.kernels.oracle import AttentionCase


def cache_layout(
    layout: str, blocks: int, block_size: int, heads: int, head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value cache [N, S, Hkv, D] as views of the layouts that engines keep, filled with NaN."""
    if layout == "NHD":
        shape = (2, blocks, block_size, heads, head_size)
        key_cache, value_cache = torch.full(shape, torch.nan, dtype=dtype).unbind()
        return key_cache, value_cache
    if layout == "HND":
        stored = [torch.full((blocks, heads, block_size, head_size), torch.nan, dtype=dtype) for _ in range(2)]
        return stored[0].transpose(1, 2), stored[1].transpose(1, 2)
    assert layout == "interleaved"
    both = torch.full((blocks, 2, block_size, heads, head_size), torch.nan, dtype=dtype)
    return both[:, 0], both[:, 1]


def build_case(
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    seq_lens: list[int],
    query_lens: list[int],
    layout: str = "NHD",
    padding_rows: int = 0,
    **options: object,
) -> AttentionCase:
    """Inputs with shuffled blocks, garbage in the table past each sequence, and NaN in every slot without a token."""
    needed = [-(-length // block_size) for length in seq_lens]
    blocks = sum(needed) + 2
    key_cache, value_cache = cache_layout(layout, blocks, block_size, num_kv_heads, head_size, dtype)
    table = torch.full((len(seq_lens), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    ids = torch.randperm(blocks, generator=generator).tolist()
    for sequence, length in enumerate(seq_lens):
        for position in range(0, length, block_size):
            block = ids.pop()
            table[sequence, position // block_size] = block
            filled = min(block_size, length - position)
            for cache in (key_cache, value_cache):
                values = torch.randn(filled, num_kv_heads, head_size, generator=generator)
                cache[block, :filled] = values.to(dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    rows = sum(query_lens) + padding_rows
    query = torch.randn(rows, num_heads, head_size, generator=generator).to(dtype)
    return AttentionCase(
        query,
        key_cache,
        value_cache,
        table,
        torch.tensor(seq_lens, dtype=torch.int32),
        starts,
        max([1, *query_lens]),
        dict(options),
    )


def draw_case(seed: int, dtypes: tuple[torch.dtype, ...]) -> AttentionCase:
    """One configuration of the features that every path has: GQA ratio, sizes, window, causal or not, mixed batches."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = draw.choice([1, 2, 3])
    group = draw.choice([1, 2, 3, 4, 5, 7, 8] if seed % 10 else [16, 20])
    kind = draw.choice(["decode", "prefill", "mixed", "mixed"])
    longest = draw.choice([24, 150, 300]) if not IS_CUDA else draw.choice([150, 700, 3000])
    seq_lens, query_lens = [], []
    for _ in range(draw.randint(1, 4)):
        length = draw.randint(0, longest) if draw.random() < 0.9 else 0
        if kind == "decode" or (kind == "mixed" and draw.random() < 0.5):
            query_len = draw.choice([1, 1, 1, 0])
        elif draw.random() < 0.5:
            query_len = length  # a first chunk
        else:
            query_len = draw.randint(0, length + 1)  # one more than the length: a position below 0
        if not IS_CUDA:
            query_len = min(query_len, 40)
        seq_lens.append(length)
        query_lens.append(query_len)
    options: dict[str, object] = {}
    if draw.random() < 0.4:
        options["sliding_window"] = draw.choice([1, 2, 7, 16, 33, 100, 129])
    if draw.random() < 0.2:
        options["causal"] = False
    if draw.random() < 0.2:
        options["scale"] = draw.choice([0.05, 0.3])
    return build_case(
        generator=generator,
        dtype=draw.choice(dtypes),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_size=draw.choice([8, 16, 24, 32, 64] if not IS_CUDA else [16, 40, 64, 80, 128, 256]),
        block_size=draw.choice([1, 3, 8, 16, 16, 48, 128]),
        seq_lens=seq_lens,
        query_lens=query_lens,
        layout=draw.choice(["NHD", "HND", "interleaved"]),
        padding_rows=draw.choice([0, 0, 1, 5, 40]),
        **options,
    )
