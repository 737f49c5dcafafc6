"""Inputs of a shape on a device, in several disjoint copies, and an fp64 check of some rows of what was computed.

Caches lie in two large tensors of random numbers that are made once and used by every shape, so that no time goes into
filling memory. Blocks are dealt out in random order, on the device. A copy's visible keys are in blocks of its own; the
columns of a table that no query sees hold arbitrary blocks, for a long sequence with a short window would otherwise
need memory that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.device_timing import scratch_elements
from benchmarks.shapes import Shape
from pagedattn.kernels.quantization import dequantize, quantize, token_scale

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
COLD_BYTES = 200 << 20  # read between two uses of a copy: four times an H100's L2
ROWS_CHECKED = 5
MOST_ON_CPU = 1 << 26  # elements of keys: the shapes of real models are for a GPU
LARGEST_NUMBER = 6.0  # that normal draws reach; sets the scale of integer caches


class WrongResultError(Exception):
    """What was computed is not attention: nothing about its time is reported."""


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a shape are."""

    copies: int
    blocks_per_copy: int
    max_blocks: int

    @property
    def num_blocks(self) -> int:
        return self.copies * self.blocks_per_copy


def choose_layout(shape: Shape, cold_bytes: int) -> Layout:
    size = shape.block_size
    used = [-(-length // size) - shape.first_key(i) // size for i, length in enumerate(shape.seq_lens)]
    copies = max(2, -(-cold_bytes // int(shape.bytes)) + 1)
    return Layout(copies, sum(used), max(-(-length // size) for length in shape.seq_lens))


class Arena:
    """Random numbers for the caches of all shapes, and for measuring the device's ceilings."""

    def __init__(self, shapes: list[Shape], device: torch.device, cold_bytes: int | None = None) -> None:
        self.device = device
        self.cold_bytes = (COLD_BYTES if device.type == "cuda" else 0) if cold_bytes is None else cold_bytes
        sizes = [
            choose_layout(shape, self.cold_bytes).num_blocks * shape.block_size * shape.num_kv_heads * shape.head_size
            for shape in shapes
        ]
        largest = max(*sizes, scratch_elements(device))
        if device.type == "cpu" and largest > MOST_ON_CPU:
            raise ValueError(f"shapes: got caches of {largest} elements; must be at most {MOST_ON_CPU} on a CPU")
        self.keys, self.values = (self._normal(largest) for _ in range(2))

    def _normal(self, size: int) -> Tensor:
        numbers = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        for part in numbers.split(1 << 27):
            part.normal_()
        return numbers

    def caches(self, shape: Shape, num_blocks: int) -> tuple[Tensor, Tensor]:
        """bf16 keys and values [N, S, Hkv, D]; latent attention's values are the first columns of its keys."""
        sizes = (num_blocks, shape.block_size, shape.num_kv_heads)
        keys = self.keys[: num_blocks * shape.block_size * shape.num_kv_heads * shape.head_size]
        keys = keys.view(*sizes, shape.head_size)
        if shape.kind == "latent":
            return keys, keys[..., : shape.value_size]
        values = self.values[: num_blocks * shape.block_size * shape.num_kv_heads * shape.value_size]
        return keys, values.view(*sizes, shape.value_size)


class AttentionInputs:
    """What an attention call over a shape is given. Everything with a leading C is one per copy."""

    def __init__(self, shape: Shape, arena: Arena) -> None:
        device = arena.device
        layout = choose_layout(shape, arena.cold_bytes)
        self.shape, self.device, self.copies = shape, device, layout.copies
        self.seq_lens = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)
        self.query_start_loc = torch.tensor((0, *accumulate(shape.query_lens)), dtype=torch.int32, device=device)
        self.block_tables = self._deal(layout)  # [C, B, max_blocks]
        self.key_cache, self.value_cache = arena.caches(shape, layout.num_blocks)
        self.k_scale = self.v_scale = None
        if shape.cache_dtype != "bf16":
            self.key_cache, self.k_scale = self._quantized(self.key_cache)
            self.value_cache, self.v_scale = self._quantized(self.value_cache)
        rows = (layout.copies, shape.num_tokens, shape.num_heads)
        self.queries = torch.randn(*rows, shape.head_size, dtype=torch.bfloat16, device=device)
        self.q_scale = None
        if shape.query_dtype == "fp8":
            self.queries, self.q_scale = self.queries.to(DTYPES["fp8"]), torch.ones((), device=device)
        self.outs = torch.empty(*rows, shape.value_size, dtype=torch.bfloat16, device=device)
        self.sinks = torch.randn(shape.num_heads, device=device) if shape.sinks else None

    def _deal(self, layout: Layout) -> Tensor:
        shape, device = self.shape, self.device
        size = shape.block_size
        ends = torch.tensor([-(-length // size) for length in shape.seq_lens], device=device)
        begins = torch.tensor([shape.first_key(i) // size for i in range(shape.batch)], device=device)
        column = torch.arange(layout.max_blocks, device=device)
        is_seen = (column >= begins[:, None]) & (column < ends[:, None])
        blocks = torch.randperm(layout.num_blocks, dtype=torch.int32, device=device)
        tables = blocks[:1].repeat(layout.copies, shape.batch, layout.max_blocks)
        tables[:, is_seen] = blocks.view(layout.copies, -1)
        return tables

    def _quantized(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """A bf16 cache as the shape stores it, a part at a time, and its scales."""
        shape, dtype = self.shape, DTYPES[self.shape.cache_dtype]
        width = cache.shape[3] // 2 if dtype == torch.uint8 else cache.shape[3]
        stored = torch.empty(*cache.shape[:3], width, dtype=dtype, device=cache.device)
        scale = torch.tensor(1.0 if shape.cache_dtype == "fp8" else LARGEST_NUMBER / 127, device=cache.device)
        if shape.scales == "head":
            scale = scale * torch.linspace(0.5, 1.5, shape.num_kv_heads, device=cache.device)
        elif shape.scales == "token":
            scale = torch.empty(cache.shape[:3], device=cache.device)
        step = max(1, (1 << 26) // cache[0].numel())
        for begin in range(0, len(cache), step):
            part = cache[begin : begin + step]
            if shape.scales == "token":
                scale[begin : begin + step] = token_scale(part, dtype)
            stored[begin : begin + step] = quantize(
                part, dtype, scale[begin : begin + step] if scale.dim() > 1 else scale
            )
        return stored, scale

    def slots(self, copy: int) -> Tensor:
        """Where the cached tokens of a copy are, one sequence after the other: int64 [sum of seq_lens]."""
        size = self.shape.block_size
        position = torch.arange(self.block_tables.shape[2] * size, device=self.device)
        every = self.block_tables[copy].long()[:, position // size] * size + position % size
        return every[position < self.seq_lens[:, None]]

    def check(self, copy: int, out: Tensor, tolerance: float) -> float:
        """Relative error of some rows of ``out`` against fp64, over two of the KV heads.

        Raises:
            WrongResultError: an element is not finite (results are poisoned with NaN), or the error is above tolerance.
        """
        if not bool(out.isfinite().all()):
            raise WrongResultError(f"copy {copy} has elements that were not written, or are not finite")
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        kv_heads = sorted({0, shape.num_kv_heads - 1})
        heads = [head * group + i for head in kv_heads for i in range(group)]
        starts = self.query_start_loc.tolist()
        longest = max(range(shape.batch), key=shape.seq_lens.__getitem__)
        rows = {0, starts[longest], starts[longest + 1] - 1, starts[-1] - 1}
        rows |= set(torch.randint(starts[-1], (ROWS_CHECKED,)).tolist())
        square_error = square = 0.0
        for row in rows:
            sequence = next(i for i, end in enumerate(starts[1:]) if row < end)
            position = shape.seq_lens[sequence] - (starts[sequence + 1] - row)
            exact = self._exact_row(copy, row, sequence, position, kv_heads)
            square_error += float((out[row, heads].double() - exact).square().sum())
            square += float(exact.square().sum())
        error = (square_error / square) ** 0.5
        if not error <= tolerance:
            raise WrongResultError(f"copy {copy} is {error:.2g} off, relative to fp64; at most {tolerance:g} is right")
        return error

    def _exact_row(self, copy: int, row: int, sequence: int, position: int, kv_heads: list[int]) -> Tensor:
        """fp64 attention of one query token at ``position`` over the heads of some KV heads: [heads, Dv]."""
        shape = self.shape
        first = 0 if shape.sliding_window is None else max(0, position - shape.sliding_window + 1)
        keys_at = torch.arange(first, position + 1, device=self.device)
        blocks = self.block_tables[copy, sequence, keys_at // shape.block_size].long()
        where = (blocks, keys_at % shape.block_size)
        keys, values = (
            dequantize(cache[where], scale[where] if scale is not None and scale.dim() == 3 else scale)[:, kv_heads]
            for cache, scale in ((self.key_cache, self.k_scale), (self.value_cache, self.v_scale))
        )
        query = self.queries[copy, row].double().view(shape.num_kv_heads, -1, shape.head_size)[kv_heads]
        logits = torch.einsum("hgd,khd->hgk", query, keys.double()) * shape.scale
        if shape.softcap is not None:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        total = torch.logsumexp(logits, -1, keepdim=True)
        if self.sinks is not None:
            sinks = self.sinks.double().view(shape.num_kv_heads, -1, 1)[kv_heads]
            total = torch.logaddexp(total, sinks)
        return torch.einsum("hgk,khd->hgd", torch.exp(logits - total), values.double()).flatten(0, 1)


class AppendInputs:
    """What an append of a shape's tokens is given. Everything with a leading C is one per copy."""

    def __init__(self, shape: Shape, arena: Arena) -> None:
        device, rows = arena.device, shape.num_tokens
        layout = choose_layout(shape, arena.cold_bytes)
        self.shape, self.device, self.copies = shape, device, layout.copies
        self.key_cache, self.value_cache = arena.caches(shape, layout.num_blocks)
        slots = layout.num_blocks * shape.block_size
        per_copy = slots // layout.copies
        self.slot_mappings = torch.empty(layout.copies, rows, dtype=torch.int64, device=device)
        lengths = torch.tensor(shape.query_lens, device=device)
        self.positions = torch.cat([torch.arange(length, device=device) for length in shape.query_lens])
        sequences = torch.repeat_interleave(torch.arange(shape.batch, device=device), lengths)
        blocks_of = -(-lengths // shape.block_size)
        column = (blocks_of.cumsum(0) - blocks_of)[sequences] + self.positions // shape.block_size
        for copy in range(layout.copies):
            blocks = torch.randperm(layout.blocks_per_copy, device=device) + copy * (per_copy // shape.block_size)
            self.slot_mappings[copy] = blocks[column] * shape.block_size + self.positions % shape.block_size
        heads = (layout.copies, rows, shape.num_kv_heads)
        self.keys = torch.randn(*heads, shape.head_size, dtype=torch.bfloat16, device=device)
        self.values = torch.randn(*heads, shape.value_size, dtype=torch.bfloat16, device=device)
        self.queries = torch.randn(
            layout.copies, rows, shape.num_heads, shape.head_size, dtype=torch.bfloat16, device=device
        )
        angles = torch.rand(shape.max_query_len, shape.head_size // 2, device=device) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    def rotated(self, rows: Tensor) -> Tensor:
        """fp64 rotation of [T, H, D] by the tokens' positions."""
        cosine, sine = self.cos_sin[self.positions].double()[:, None].chunk(2, -1)
        first, second = rows.double().chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    def check(self, copy: int, query_before: Tensor) -> float:
        """Worst difference of what is cached, and of the rotated queries, from what they must be.

        Raises:
            WrongResultError: above two roundings of bf16 at that magnitude.
        """
        shape, slots = self.shape, self.slot_mappings[copy]
        rotates = shape.kind == "rope_append"
        expected = [(self.value_cache, self.values[copy].double())]
        expected.append((self.key_cache, self.rotated(self.keys[copy]) if rotates else self.keys[copy].double()))
        pairs = [(cache.flatten(0, 1)[slots].double(), wanted) for cache, wanted in expected]
        if rotates:
            pairs.append((self.queries[copy].double(), self.rotated(query_before)))
        worst = max(float(((found - wanted).abs() / (wanted.abs() + 1)).max()) for found, wanted in pairs)
        if not worst <= 2**-7:
            raise WrongResultError(f"copy {copy} is {worst:.2g} off; at most 2**-7 is right")
        return worst
