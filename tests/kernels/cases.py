"""Random attention inputs: shapes and features that engines use, caches poisoned where nothing may be read.

A *variant* is a choice on every axis that a kernel may be compiled for; ``variants`` picks them so that every pair of
choices that may go together does, as early as it can. A *draw* of a variant fills in lengths, heads and values.
"""

from __future__ import annotations

import itertools
import os
import random
from functools import lru_cache

import torch
from torch import Tensor

from pagedattn.kernels.quantization import LARGEST, quantize, token_scale
from tests.device import DTYPES, INTERPRETED, IS_CUDA, IS_LARGE
from tests.kernels.oracle import AttentionCase

Variant = dict[str, object]

AXES: dict[str, tuple[object, ...]] = {
    "dtype": DTYPES,
    "query": ("as dtype", torch.float8_e4m3fn),
    "cache": ("as dtype", *LARGEST),
    "scales": ("none", "tensor", "head", "token"),
    # (D, Dv); "shared": the values are the first elements of the keys, as in latent attention
    "head": ((8, 8), (64, 64), (72, 72), (128, 128), (192, 128), (64, 128), (256, 256), (512, 512), (576, 512)),
    "block_size": (1, 8, 16, 32, 48, 64, 128, 256, 544),
    "group": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 64, 128),
    "layout": ("NHD", "HND", "interleaved", "shared"),
    "kind": ("decode", "verify", "prefill", "mixed"),
    "mask": ("causal", "full", "tree"),
    "sliding_window": (False, True),
    "attention_chunk": (False, True),
    "softcap": (False, True),
    "alibi": (False, True),
    "sinks": (False, True),
    "plan": ("none", "given", "batch invariant"),
    "results": ("out", "out and lse", "given out and lse"),
}


def goes_with(variant: Variant) -> bool:
    """Whether the choices made so far may stand together."""
    cache, scales, layout = (variant.get(name) for name in ("cache", "scales", "layout"))
    if variant.get("query") == torch.float8_e4m3fn and cache not in (None, torch.float8_e4m3fn):
        return False
    if cache is not None and scales is not None and (cache == "as dtype") != (scales == "none"):
        return False
    if variant.get("query") == torch.float8_e4m3fn and scales == "none":
        return False
    return not (layout == "shared" and variant.get("head") not in (None, (576, 512), (512, 512), (192, 128)))


def pairs(variant: Variant) -> set[tuple[str, object, str, object]]:
    return {(*a, *b) for a, b in itertools.combinations(sorted(variant.items(), key=lambda item: item[0]), 2)}


@lru_cache
def all_pairs() -> frozenset[tuple[str, object, str, object]]:
    """Every pair of choices that may go together."""
    return frozenset(
        (a, value_a, b, value_b)
        for a, b in itertools.combinations(sorted(AXES), 2)
        for value_a in AXES[a]
        for value_b in AXES[b]
        if goes_with({a: value_a, b: value_b})
    )


@lru_cache
def variants(count: int) -> tuple[Variant, ...]:
    """``count`` variants; each the one of several random ones that covers most pairs that no earlier one did."""
    draw = random.Random(0)
    missing = set(all_pairs())
    chosen: list[Variant] = []
    while len(chosen) < count:
        candidates = [_complete({}, draw) for _ in range(4)]
        if missing:
            a, value_a, b, value_b = min(missing, key=repr)
            candidates += [_complete({a: value_a, b: value_b}, draw) for _ in range(8)]
        best = max(candidates, key=lambda variant: len(pairs(variant) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return tuple(chosen)


def _complete(variant: Variant, draw: random.Random) -> Variant:
    variant = dict(variant)
    names = [name for name in AXES if name not in variant]
    draw.shuffle(names)
    for name in names:
        variant[name] = draw.choice([value for value in AXES[name] if goes_with({**variant, name: value})])
    return variant


def cache_layout(
    layout: str, blocks: int, block_size: int, heads: int, sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value cache [N, S, Hkv, D] as views of the layouts that engines keep, filled with NaN or its like."""
    size, size_v = (n // 2 if dtype == torch.uint8 else n for n in sizes)

    def poisoned(*shape: int) -> Tensor:
        if dtype in (torch.uint8, torch.int8):
            return torch.full(shape, 0x77, dtype=dtype)
        return torch.full(shape, torch.nan).to(dtype)

    if layout == "shared":
        key_cache = poisoned(blocks, block_size, heads, size)
        return key_cache, key_cache[..., :size_v]
    if layout == "HND":
        stored = [poisoned(blocks, heads, block_size, n) for n in (size, size_v)]
        return stored[0].transpose(1, 2), stored[1].transpose(1, 2)
    if layout == "interleaved":
        both = poisoned(blocks, block_size, heads, size + size_v)
        return both[..., :size], both[..., size:]
    assert layout == "NHD"
    return poisoned(blocks, block_size, heads, size), poisoned(blocks, block_size, heads, size_v)


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
    head_size_v: int | None = None,
    cache_dtype: torch.dtype | None = None,
    scales: str = "none",
    query_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    padding_rows: int = 0,
    magnitude: float = 1.0,
    **options: object,
) -> AttentionCase:
    """Inputs with shuffled blocks, garbage in the table past each sequence, and NaN in every slot without a token."""
    head_size_v = head_size if head_size_v is None else head_size_v
    cache_dtype = dtype if cache_dtype is None else cache_dtype
    needed = [-(-length // block_size) for length in seq_lens]
    blocks = sum(needed) + 2
    caches = cache_layout(layout, blocks, block_size, num_kv_heads, (head_size, head_size_v), cache_dtype)
    table = torch.full((len(seq_lens), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    ids = torch.randperm(blocks, generator=generator)
    used: list[Tensor] = []
    for sequence, (length, count) in enumerate(zip(seq_lens, needed, strict=True)):
        own, ids = ids[:count], ids[count:]
        table[sequence, :count] = own
        used.append((own[:, None] * block_size + torch.arange(block_size)).flatten()[:length])
    slots = torch.cat([*used, torch.empty(0, dtype=torch.int64)])
    where = (slots // block_size, slots % block_size)
    for cache, size, name in zip(caches, (head_size, head_size_v), ("k_scale", "v_scale"), strict=True):
        if name == "v_scale" and layout == "shared":
            if "k_scale" in options:
                options["v_scale"] = options["k_scale"]
            continue
        values = torch.randn(len(slots), num_kv_heads, size, generator=generator)
        if cache_dtype not in LARGEST:
            cache[where] = values.to(dtype)
            continue
        per_token = token_scale(values, cache_dtype)
        if scales == "token":
            scale = torch.full((blocks, block_size, num_kv_heads), torch.nan)
            scale[where] = per_token
            stored = quantize(values, cache_dtype, per_token)
        else:
            scale = per_token.amax(0) if len(slots) else torch.ones(num_kv_heads)
            scale = scale.amax() if scales == "tensor" else scale
            stored = quantize(values, cache_dtype, scale)
        cache[where] = stored
        options[name] = scale
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    rows = sum(query_lens) + padding_rows
    query = torch.randn(rows, num_heads, head_size, generator=generator) * magnitude
    if query_dtype is not None and query_dtype != dtype:
        q_scale = torch.rand(num_kv_heads, generator=generator) + 0.5
        options["q_scale"] = q_scale if scales == "head" else q_scale[0]
        query = query.clamp(-400, 400).to(query_dtype)
    else:
        query = query.to(dtype)
    return AttentionCase(
        query, *caches, table, torch.tensor(seq_lens, dtype=torch.int32), starts, max([1, *query_lens]), dict(options)
    )


def draw_lengths(kind: object, draw: random.Random) -> tuple[list[int], list[int]]:
    """Sequence and query lengths of a batch: empty sequences, positions below 0, and some long enough to be split.

    On a GPU the longest query is always of the length that its kind compiles for.
    """
    longest = draw.choice([24, 150, 300, 600]) if not IS_LARGE else draw.choice([150, 700, 3000, 12000])
    seq_lens, query_lens = [], []
    for _ in range(draw.randint(1, 4)):
        length = draw.randint(0, longest) if draw.random() < 0.9 else 0
        if kind == "decode" or (kind == "mixed" and draw.random() < 0.5):
            query_len = draw.choice([1, 1, 1, 0])
        elif kind == "verify":
            query_len = draw.randint(1, 5)
        elif draw.random() < 0.5:
            query_len = length  # a first chunk
        else:
            query_len = draw.randint(0, length + 1)  # one more than the length: a position below 0
        seq_lens.append(length)
        query_lens.append(min(query_len, 700 if IS_LARGE else 40))
    most = {"decode": 1, "verify": 5}.get(str(kind), 130 if IS_CUDA else 9)
    if max(query_lens) < most:
        seq_lens[0], query_lens[0] = max(seq_lens[0], most), most
    return seq_lens, query_lens


def draw_case(variant: Variant, seed: int) -> AttentionCase:
    """One case of a variant."""
    draw = random.Random(f"{seed} {sorted(map(str, variant.items()))}")
    generator = torch.Generator().manual_seed(draw.randrange(1 << 40))
    group = int(str(variant["group"]))
    num_kv_heads = 1 if group >= 64 else random.Random(describe(variant)).choice([1, 2, 3])
    num_heads = num_kv_heads * group
    head = variant["head"]
    assert isinstance(head, tuple)
    head_size, head_size_v = head
    seq_lens, query_lens = draw_lengths(variant["kind"], draw)
    if INTERPRETED and group * head_size > 4096:
        seq_lens, query_lens = seq_lens[:2], query_lens[:2]  # the interpreter takes seconds for these
    # The oracle holds a sequence's logits and its dequantized keys in fp64.
    for index, length in enumerate(seq_lens):
        length = seq_lens[index] = min(length, 2_000_000 // (num_kv_heads * head_size))
        query_lens[index] = min(query_lens[index], max(130, 16_000_000 // (num_heads * max(1, length))))
    options: dict[str, object] = {}
    if variant["mask"] == "full":
        options["causal"] = False
    if variant["mask"] == "tree":
        # [T, max_query_len]: rows of padding too
        options["tree_mask"] = None
    if variant["sliding_window"]:
        options["sliding_window"] = draw.choice([1, 2, 7, 16, 33, 100, 129])
    if variant["attention_chunk"]:
        options["attention_chunk"] = draw.choice([1, 4, 10, 64, 128, 256, 100_000])
    if variant["softcap"]:
        options["softcap"] = draw.choice([1.0, 10.0, 30.0, 50.0])
    if variant["alibi"]:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator) * draw.choice([0.02, 0.3, 1.0])
    if variant["sinks"]:
        options["sinks"] = torch.randn(num_heads, generator=generator) * draw.choice([1, 4])
    if draw.random() < 0.3:
        options["scale"] = draw.choice([0.1, 1.0, 3.0, -1.0]) * head_size**-0.5
    padding_rows = draw.choice([0, 0, 1, 5, 40])
    case = build_case(
        generator=generator,
        dtype=variant["dtype"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size if head_size != 72 else draw.choice([24, 40, 72, 80, 96, 112]) if not IS_CUDA else 72,
        head_size_v=head_size_v if head_size_v != 72 else None,
        cache_dtype=None if variant["cache"] == "as dtype" else variant["cache"],
        scales=variant["scales"],
        query_dtype=None if variant["query"] == "as dtype" else variant["query"],
        block_size=variant["block_size"],
        seq_lens=seq_lens,
        query_lens=query_lens,
        layout=variant["layout"],
        padding_rows=padding_rows,
        magnitude=draw.choice([0.1, 1, 1, 4]),
        **options,
    )
    if variant["mask"] == "tree":
        case.options["tree_mask"] = torch.rand(len(case.query), case.max_query_len, generator=generator) < 0.6
    return case


def draw_features(draw: random.Random, generator: torch.Generator, num_heads: int) -> dict[str, object]:
    """Options of a call that the kernels for Hopper serve, each with a chance of its own."""
    options: dict[str, object] = {}
    if draw.random() < 0.3:
        options["causal"] = False
    if draw.random() < 0.4:
        options["sliding_window"] = draw.choice([1, 5, 64, 129, 700])
    if draw.random() < 0.2:
        options["attention_chunk"] = draw.choice([10, 64, 300])
    if draw.random() < 0.3:
        options["softcap"] = draw.choice([5.0, 50.0])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(num_heads, generator=generator)
    if draw.random() < 0.2:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator) * 0.3
    return options


def describe(variant: Variant) -> str:
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in variant.items())


NUM_VARIANTS = 320
DRAWS_PER_VARIANT = int(os.environ.get("PAGEDATTN_DRAWS", 10 if IS_CUDA else 1 if INTERPRETED else 2))
