"""Checks of single arguments, from metadata alone unless said. Messages: the argument, what it is, what it must be."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pagedattn.kernels.quantization import LARGEST

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHE_DTYPES = (*FLOAT_DTYPES, *LARGEST)
LARGEST_INT = 2**63 - 1  # that the dispatcher takes


def fail(name: str, given: object, required: str) -> NoReturn:
    raise ValueError(f"{name}: got {describe(given)}; must be {required}")


def describe(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{given.dtype} {list(given.shape)} on {given.device}".replace("torch.", "")
    return repr(given)


def require_tensor(name: str, given: object, optional: bool = False) -> None:
    if not isinstance(given, Tensor) and not (optional and given is None):
        raise TypeError(f"{name}: got {type(given).__name__}; must be a torch.Tensor{' or None' if optional else ''}")
    if isinstance(given, Tensor) and given.layout != torch.strided:
        raise ValueError(f"{name}: got layout {given.layout}; must be strided")


def require_int(name: str, given: object, minimum: int = 0, optional: bool = False) -> None:
    if optional and given is None:
        return
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(given).__name__}; must be an int{' or None' if optional else ''}")
    if given < minimum:
        raise ValueError(f"{name}: got {given}; must be >= {minimum}")
    if isinstance(given, int) and given > LARGEST_INT:
        raise ValueError(f"{name}: got {given}; must be <= {LARGEST_INT}")


def require_number(name: str, given: object, positive: bool = False) -> None:
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {type(given).__name__}; must be a float or None")
    if isinstance(given, int) and abs(given) > sys.float_info.max:
        raise ValueError(f"{name}: got an int beyond floats; must be finite")
    if given != given or given in (float("inf"), float("-inf")) or (positive and given <= 0):
        raise ValueError(f"{name}: got {given}; must be {'positive and ' if positive else ''}finite")


def require_bool(name: str, given: object) -> None:
    if not isinstance(given, bool):
        raise TypeError(f"{name}: got {type(given).__name__}; must be a bool")


def require_no_grad(name: str, given: Any) -> None:
    """No op has a backward or a forward-mode derivative."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return
    if torch.is_grad_enabled() and given.requires_grad:
        raise ValueError(f"{name}: requires grad; must not, for the ops have no backward (use torch.no_grad())")
    if forward_ad.unpack_dual(given).tangent is not None:
        raise ValueError(f"{name}: has a tangent; must not, for the ops have no forward-mode derivative")


def check_dense(name: str, given: Tensor) -> None:
    if given.dim() and given.stride()[-1] != 1 and given.shape[-1] > 1:
        fail(name, given.stride(), "contiguous in its last dimension")


def check_written(name: str, given: Tensor) -> None:
    """What an op writes must not be expanded: one place would stand for several elements."""
    places = zip(given.shape, given.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in places):
        fail(name, given.stride(), "of elements that do not share memory, for it is written")


def check_lengths(seq_lens: Tensor, query_start_loc: Tensor, max_query_len: int, max_seq_len: int) -> list[int]:
    """Values: this one synchronizes. Returns query_start_loc."""
    lengths, starts = seq_lens.tolist(), query_start_loc.tolist()
    if not all(0 <= length <= max_seq_len for length in lengths):
        fail("seq_lens", lengths, f"within 0..max_seq_len={max_seq_len}")
    if starts[0] != 0:
        fail("query_start_loc", starts, "from 0 on")
    if not all(0 <= end - begin <= max_query_len for begin, end in itertools.pairwise(starts)):
        fail("query_start_loc", starts, f"rising by 0..max_query_len={max_query_len}")
    return list(starts)


def check_index(
    name: str, given: Tensor, dtype: torch.dtype, dims: int, device: torch.device, size: Any = None
) -> None:
    """An index tensor: dtype, rank, first size if given, last dimension contiguous, on the ops' device."""
    if given.dtype != dtype or given.ndim != dims or (size is not None and given.shape[0] != size):
        shape = "[" + ", ".join([str(size) if size is not None else ":", ":"][:dims]) + "]"
        fail(name, given, f"{dtype} {shape}".replace("torch.", ""))
    if given.device != device:
        fail(name, given, f"on {device}")
    check_dense(name, given)


def check_rows(
    name: str, given: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], tokens: Any = None
) -> None:
    """A tensor of heads per token: [T, H, D]."""
    if given.ndim != 3 or (tokens is not None and given.shape[0] != tokens):
        fail(name, given, f"[{'T' if tokens is None else tokens}, heads, head_size]")
    if given.dtype not in dtypes:
        fail(name, given, f"one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if given.device != device:
        fail(name, given, f"on {device}")
    check_dense(name, given)


def check_cache(name: str, cache: Tensor, device: torch.device) -> Sequence[int]:
    if cache.ndim != 4:
        fail(name, cache, "[num_blocks, block_size, num_kv_heads, head_size]")
    if cache.dtype not in CACHE_DTYPES:
        fail(name, cache, "fp16, bf16, fp32, float8_e4m3fn, float8_e5m2, int8 or uint8 (int4)")
    if cache.device != device:
        fail(name, cache, f"on {device}")
    check_dense(name, cache)
    return cache.shape


def check_caches(key_cache: Tensor, value_cache: Tensor, device: torch.device) -> None:
    blocks, block_size, num_kv_heads, _ = check_cache("key_cache", key_cache, device)
    if block_size < 1:
        fail("key_cache", key_cache, "of block_size >= 1")
    if num_kv_heads < 1:
        fail("key_cache", key_cache, "of num_kv_heads >= 1")
    blocks_v, block_size_v, num_kv_heads_v, _ = check_cache("value_cache", value_cache, device)
    if blocks_v != blocks or block_size_v != block_size or num_kv_heads_v != num_kv_heads:
        fail("value_cache", value_cache, f"[{blocks}, {block_size}, {num_kv_heads}, :] like key_cache")
    if value_cache.dtype != key_cache.dtype:
        fail("value_cache", value_cache, f"{key_cache.dtype} like key_cache")


def cache_head_size(cache: Tensor) -> int:
    return cache.shape[3] * 2 if cache.dtype == torch.uint8 else cache.shape[3]


def check_cache_scales(cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        fits = scale.dim() == 0 or scale.shape == (cache.shape[2],) or scale.shape == cache.shape[:3]
        blocks, block_size, heads = cache.shape[:3]
        if not fits:
            fail(name, scale, f"0-d, [{heads}] or [{blocks}, {block_size}, {heads}]")
        if scale.dtype != torch.float32:
            fail(name, scale, "float32")
        if scale.device != cache.device:
            fail(name, scale, f"on {cache.device}")
        if scale.dim() == 1:
            check_dense(name, scale)


def check_head_sizes(name: str, head_size: int, name_v: str, head_size_v: int) -> None:
    if head_size < 8 or head_size % 8 or not (head_size <= 256 or head_size in (512, 576)):
        raise ValueError(f"{name}: got head size {head_size}; must be a multiple of 8 up to 256, 512 or 576")
    if head_size_v < 8 or head_size_v % 8 or not (head_size_v <= 256 or head_size_v == 512):
        raise ValueError(f"{name_v}: got head size {head_size_v}; must be a multiple of 8 up to 256, or 512")


def check_block_ids(name: str, ids: Tensor, num_blocks: int) -> None:
    """Values: this one synchronizes."""
    bad = ids[(ids < 0) | (ids >= num_blocks)].tolist()
    if bad:
        fail(name, bad[:4], f"block ids within 0..{num_blocks - 1}")
