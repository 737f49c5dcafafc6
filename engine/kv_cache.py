"""``KVCache``: keys and values of all layers in blocks, on the device and, of preempted requests, in host memory.

Memory: ``[size, 2, num_blocks, block_size, num_kv_heads, head_size]``, where ``size`` is the number of layers in a
group (layer_groups.py): layer i of every group uses the same tensors, each with its own group's block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pagedattn import ops
from pagedattn.engine.block_manager import BlockTransfers
from pagedattn.engine.layer_groups import group_layers

if TYPE_CHECKING:
    from pagedattn.engine.model import ModelConfig


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
        slots = (self.groups.size, 2, num_blocks + self.groups.has_windows, block_size, config.num_kv_heads)
        storage = torch.empty((*slots, stored), dtype=dtype, device=device)
        self._pools = [storage]  # [size, 2, blocks, block_size, ...]
        if dtype in ops.QUANTIZED_DTYPES:
            self._pools.append(torch.empty(slots, dtype=torch.float32, device=device))
        layers = [LayerCache(*(half for pool in pools for half in pool)) for pools in zip(*self._pools, strict=True)]
        self.layers = [layers[index] for index in self.groups.index_in_group]
        if self.groups.has_windows:
            for pool in self._pools:
                pool[:, :, self.null_block].zero_()
        # Block by block, so that a run of blocks is one copy.
        self._host_pools = [
            torch.empty(
                (num_host_blocks, *pool.shape[:2], *pool.shape[3:]),
                dtype=dtype if pool is storage else torch.float32,
                pin_memory=self.device.type == "cuda" and num_host_blocks > 0,
            )
            for pool in self._pools
        ]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each group's sliding window, None for full attention."""
        return self.groups.windows

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over the layers of a group, keys and values together."""
        num_layers = group_layers(config.layer_windows).size
        return 2 * num_layers * block_size * config.num_kv_heads * config.head_size * dtype.itemsize

    @torch.inference_mode()
    def transfer(self, transfers: BlockTransfers) -> None:
        """Make the copies, in order, on the current stream. Nothing waits for them but what follows on the stream."""
        if transfers.swap_out:
            self._swap_out(transfers.swap_out)
        if transfers.copy:
            mapping = torch.tensor(transfers.copy, dtype=torch.int64).to(self.device)
            for pool in self._pools:
                keys, values = pool.movedim(2, 0).unbind(2)  # each [blocks, size, block_size, ...]: one copy for all
                ops.copy_blocks(keys, values, keys, values, mapping)
        if transfers.swap_in:
            self._swap_in(transfers.swap_in)

    def _swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        sources = torch.tensor([source for source, _ in pairs]).to(self.device)
        for pool, host in zip(self._pools, self._host_pools, strict=True):
            gathered = pool.movedim(2, 0)[sources].contiguous()
            for first, start, count in _runs([host_id for _, host_id in pairs]):
                host[start : start + count].copy_(gathered[first : first + count], non_blocking=True)

    def _swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        destinations = torch.tensor([destination for _, destination in pairs]).to(self.device)
        for pool, host in zip(self._pools, self._host_pools, strict=True):
            gathered = torch.empty((len(pairs), *host.shape[1:]), dtype=host.dtype, device=self.device)
            for first, start, count in _runs([host_id for host_id, _ in pairs]):
                gathered[first : first + count].copy_(host[start : start + count], non_blocking=True)
            pool.movedim(2, 0)[destinations] = gathered


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive ids as (index of the first, the first, how many)."""
    runs: list[tuple[int, int, int]] = []
    for index, value in enumerate(ids):
        if runs and value == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((index, value, 1))
    return runs
