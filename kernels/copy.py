"""Copying blocks between a GPU and pinned host memory in one launch, ordered by the stream alone.

Pinned memory is mapped: a kernel reads and writes it over the bus. So which blocks go where may be known on the device
only, nothing is staged, nothing waits, and a copy may run on a side stream or in a CUDA graph. A few programs fill the
bus, and leave the multiprocessors to the model. Source and destination are different memories, so the order of reads
and writes does not matter.

Memory: caches [N, S, H, D] of any strides, the last 1; block_mapping int64 [P, 2] of (source block, destination block).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher, specialized

PROGRAMS = 32
CHUNK_BYTES = 8192  # that a program has under way
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def copy_chunk(
    source_ptr, stride_source_slot, stride_source_head, destination_ptr, stride_destination_slot,
    stride_destination_head, start, SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK elements of a block from the one numbered ``start`` on."""
    element = start + tl.arange(0, CHUNK)
    mask = element < SLOTS * HEADS * DIM
    dim = element % DIM
    head = (element // DIM % HEADS).to(tl.int64)
    slot = (element // (DIM * HEADS)).to(tl.int64)
    values = tl.load(source_ptr + slot * stride_source_slot + head * stride_source_head + dim, mask=mask)
    tl.store(destination_ptr + slot * stride_destination_slot + head * stride_destination_head + dim, values, mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def copy_blocks_kernel(
    src_key_ptr,
    src_value_ptr,
    dst_key_ptr,
    dst_value_ptr,
    block_mapping_ptr,
    num_pairs,
    stride_src_key_block,
    stride_src_key_slot,
    stride_src_key_head,
    stride_src_value_block,
    stride_src_value_slot,
    stride_src_value_head,
    stride_dst_key_block,
    stride_dst_key_slot,
    stride_dst_key_head,
    stride_dst_value_block,
    stride_dst_value_slot,
    stride_dst_value_head,
    stride_mapping_pair,
    stride_mapping_column,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    KEY_CHUNKS: tl.constexpr = (SLOTS * HEADS * KEY_DIM + CHUNK - 1) // CHUNK
    CHUNKS: tl.constexpr = KEY_CHUNKS + (SLOTS * HEADS * VALUE_DIM + CHUNK - 1) // CHUNK
    index = tl.program_id(0).to(tl.int64)
    while index < num_pairs * CHUNKS:
        pair_ptr = block_mapping_ptr + index // CHUNKS * stride_mapping_pair
        source = tl.load(pair_ptr)
        destination = tl.load(pair_ptr + stride_mapping_column)
        chunk = (index % CHUNKS).to(tl.int32)
        if chunk < KEY_CHUNKS:
            copy_chunk(
                src_key_ptr + source * stride_src_key_block, stride_src_key_slot, stride_src_key_head,
                dst_key_ptr + destination * stride_dst_key_block, stride_dst_key_slot, stride_dst_key_head,
                chunk * CHUNK, SLOTS, HEADS, KEY_DIM, CHUNK,
            )  # fmt: skip
        else:
            copy_chunk(
                src_value_ptr + source * stride_src_value_block, stride_src_value_slot, stride_src_value_head,
                dst_value_ptr + destination * stride_dst_value_block, stride_dst_value_slot, stride_dst_value_head,
                (chunk - KEY_CHUNKS) * CHUNK, SLOTS, HEADS, VALUE_DIM, CHUNK,
            )  # fmt: skip
        index += tl.num_programs(0)


def copy_blocks(src_key: Tensor, src_value: Tensor, dst_key: Tensor, dst_value: Tensor, block_mapping: Tensor) -> None:
    """Copy blocks block_mapping[:, 0] of the sources to blocks block_mapping[:, 1]; the mapping is on the device."""
    caches = tuple(cache.view(BITS[cache.element_size()]) for cache in (src_key, src_value, dst_key, dst_value))
    if src_key.stride(1) < src_key.stride(2):  # follow the memory of the source
        caches = tuple(cache.transpose(1, 2) for cache in caches)
    strides = (*(stride for cache in caches for stride in cache.stride()[:3]), *block_mapping.stride())
    chunk = CHUNK_BYTES // max(cache.element_size() for cache in caches)
    constants = (*caches[0].shape[1:], caches[1].shape[3], chunk)
    launch = launch_copy.prepare(
        (*(cache.dtype for cache in caches), specialized(strides), constants),
        (PROGRAMS, 1),
        block_mapping.device,
        (block_mapping.shape[0], *strides, *constants),
        num_warps=4,
    )
    launch((*caches, block_mapping))


launch_copy = Launcher(copy_blocks_kernel)
