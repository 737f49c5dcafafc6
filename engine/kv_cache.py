"""``KVCache``: keys and values of all layers in blocks, on the device and, of preempted requests, in host memory.

Memory: ``[size, 2, num_blocks, block_size, num_kv_heads, head_size]``, where ``size`` is the number of layers in a
group (layer_groups.py): layer i of every group uses the same tensors, each with its own group's block table. On a GPU
a block's slots of one head lie side by side (``num_kv_heads`` before ``block_size``): what a thread block reads is in
one piece, which heads of 64 dimensions gain 3 to 5% from (docs/kernel-notes.md).
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pagedattn import ops
from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.layer_groups import group_layers

if TYPE_CHECKING:
    from pagedattn.engine.model import ModelConfig

# What a cache may be stored as, by name; vLLM's names where it has them. "auto" is the model's dtype.
KV_CACHE_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int4": torch.uint8,
}


def resolve_kv_cache_dtype(name: str, model_dtype: torch.dtype, head_size: int) -> torch.dtype:
    """The dtype that a cache of this name is stored as. Raises ValueError for int4 where heads are not pairs."""
    if name == "int4" and head_size % 2:
        raise ValueError(f"kv_cache_dtype='int4' is not allowed: heads of {head_size} are not pairs of numbers")
    return KV_CACHE_DTYPES[name] or model_dtype


class LayerCache(NamedTuple):
    """One layer's caches ``[num_blocks, block_size, num_kv_heads, head_size]`` and, if quantized, their scales."""

    key: Tensor
    value: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class KVCache:
    """Keys and values of every layer in blocks of ``block_size`` token slots.

    A quantized ``dtype`` (float8_e4m3fn, float8_e5m2, int8, or uint8 for int4) gives each token and head a scale of its
    own, written as it is appended; ``layers`` may be replaced by others with scales per tensor or head. Slots are left
    as allocated: no op lets what a slot past a sequence's length holds change a result. Where layers have windows there
    is one block more, ``null_block``: zeros, in the place of blocks that a window has left behind.

    ``num_host_blocks`` blocks more are in host memory, pinned where the cache is on a GPU.

    Raises:
        ValueError: for sizes below their least or out of all bounds.
        RuntimeError: from torch, if memory does not suffice; a GPU's is a torch.OutOfMemoryError.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_host_blocks: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_blocks", num_blocks, 1),
            ("block_size", block_size, 1),
            ("num_host_blocks", num_host_blocks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.groups = group_layers(config.layer_windows)
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.null_block = num_blocks
        self.device = torch.device(device)
        stored = config.head_size // 2 if dtype == torch.uint8 else config.head_size
        is_quantized = dtype in ops.QUANTIZED_DTYPES
        heads_first = self.device.type == "cuda"
        heads = (config.num_kv_heads, block_size) if heads_first else (block_size, config.num_kv_heads)

        bytes_per_block = self.bytes_per_block(config, block_size, dtype)
        for what, count in (("blocks of the KV cache", num_blocks), ("blocks of swap space", num_host_blocks)):
            if count * bytes_per_block >= 1 << 62:  # what no allocator takes, and torch has no words for
                raise ValueError(f"{Decimal(count):.4g} {what} cannot be allocated: one takes {bytes_per_block} bytes")

        def allocate(num_blocks: int, place: torch.device, pin_memory: bool = False) -> list[Tensor]:
            """[size, 2, blocks, *heads, head_size], and scales with 1 for the last."""
            parts = [(stored, dtype), *([(1, torch.float32)] if is_quantized else [])]
            return [
                torch.empty(
                    (self.groups.size, 2, num_blocks, *heads, width),
                    dtype=part_dtype,
                    device=place,
                    pin_memory=pin_memory,
                )
                for width, part_dtype in parts
            ]

        self._pools = allocate(num_blocks + self.groups.has_windows, self.device)
        self._host_pools = allocate(
            num_host_blocks, torch.device("cpu"), pin_memory=self.device.type == "cuda" and num_host_blocks > 0
        )
        by_slot = [pool.transpose(3, 4) if heads_first else pool for pool in self._pools]
        caches, scales = by_slot[0], [pool.squeeze(-1) for pool in by_slot[1:]]
        layers = [
            LayerCache(*caches[index], *(half for scale in scales for half in scale[index]))
            for index in range(self.groups.size)
        ]
        self.layers = [layers[index] for index in self.groups.index_in_group]
        if self.groups.has_windows:
            for pool in self._pools:
                pool[:, :, self.null_block].zero_()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each group's sliding window, None for full attention."""
        return self.groups.windows

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over the layers of a group, keys and values together, and their scales."""
        num_layers = group_layers(config.layer_windows).size
        head_bytes = config.head_size * dtype.itemsize
        if dtype in ops.QUANTIZED_DTYPES:
            head_bytes = (head_bytes // 2 if dtype == torch.uint8 else head_bytes) + torch.float32.itemsize
        return 2 * num_layers * block_size * config.num_kv_heads * head_bytes

    @torch.inference_mode()
    def transfer(self, transfers: BlockTransfers) -> None:
        """Make the copies, in order, on the current stream."""
        for pairs, sources, destinations in (
            (transfers.swap_out, self._pools, self._host_pools),
            (transfers.copy, self._pools, self._pools),
            (transfers.swap_in, self._host_pools, self._pools),
        ):
            if not pairs:
                continue
            mapping = torch.tensor(pairs, dtype=torch.int64)
            for source, destination in zip(sources, destinations, strict=True):
                keys, values = _by_block(source)
                ops.copy_blocks(keys, values, *_by_block(destination), mapping)


def _by_block(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as ``[blocks, size, slots of all heads, head_size]``: a block with all its layers, one copy."""
    keys, values = pool.movedim(2, 0).flatten(3, 4).unbind(2)
    return keys, values
