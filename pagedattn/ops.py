"""The contract of the ops: each one's schema, host checks, fake and dispatch.

CPU tensors go to the torch reference, CUDA tensors to the Triton kernels; with ``TRITON_INTERPRET=1`` in the
environment before import, CPU tensors go to the Triton kernels too. ``PAGEDATTN_CHECK=1`` also checks values (ids,
lengths, duplicate slots), which synchronizes. Shapes use T tokens in this step, B sequences, Hq and Hkv heads, D head
size, N blocks, S block size. Every op is also ``torch.ops.pagedattn.<name>``, where a plan is its tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pagedattn.checks import (
    FLOAT_DTYPES,
    cache_head_size,
    check_block_ids,
    check_cache_scales,
    check_caches,
    check_dense,
    check_head_sizes,
    check_index,
    check_lengths,
    check_rows,
    check_written,
    describe,
    fail,
    require_bool,
    require_int,
    require_no_grad,
    require_number,
    require_tensor,
)
from pagedattn.kernels import attention_reference, cache_reference, plan_reference
from pagedattn.kernels.options import AttentionOptions
from pagedattn.kernels.quantization import LARGEST
from pagedattn.kernels.tiling import ITEM_FIELDS, AttentionTiling, choose_tiling
from pagedattn.seen import Empty, SeenCalls

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHECK_VALUES = os.environ.get("PAGEDATTN_CHECK") == "1"
INTERPRETER_MULTIPROCESSORS = 4

_QUERY_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)
QUANTIZED_DTYPES = tuple(LARGEST)  # of caches

_library = torch.library.Library("pagedattn", "DEF")


# --- checks of whole calls: from metadata alone, so that they never synchronize --------------------------------------


class _Attention(NamedTuple):
    """The arguments of ``paged_attention`` as the op receives them; shapes as in its docstring."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    scale: float
    causal: bool
    sliding_window: int | None
    attention_chunk: int | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    tree_mask: Tensor | None
    plan: list[Tensor] | None
    batch_invariant: bool  # what the plan is made for


def _check_attention(call: _Attention) -> None:
    (
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc, max_query_len, max_seq_len, scale, _,
        sliding_window, attention_chunk, softcap, alibi_slopes, sinks, q_scale, k_scale, v_scale, tree_mask, _, _,
    ) = call  # fmt: skip
    device = query.device
    check_rows("query", query, device, _QUERY_DTYPES)
    check_caches(key_cache, value_cache, device)
    num_tokens, num_heads, head_size = query.shape
    num_seqs = seq_lens.shape[0] if seq_lens.dim() else -1
    check_index("seq_lens", seq_lens, torch.int32, 1, device)
    check_index("block_table", block_table, torch.int32, 2, device, num_seqs)
    check_index("query_start_loc", query_start_loc, torch.int32, 1, device, num_seqs + 1)
    num_kv_heads = key_cache.shape[2]
    if num_heads < 1 or num_heads % num_kv_heads:
        fail("query", query, f"of a multiple of key_cache's {num_kv_heads} heads")
    if cache_head_size(key_cache) != head_size:
        fail("key_cache", key_cache, f"of head size {head_size} like query")
    check_head_sizes("query", head_size, "value_cache", cache_head_size(value_cache))
    if key_cache.dtype not in LARGEST and query.dtype != key_cache.dtype:
        fail("key_cache", key_cache, f"{query.dtype} like query, or quantized")
    if query.dtype == torch.float8_e4m3fn:
        if q_scale is None:
            fail("q_scale", q_scale, "given for a float8_e4m3fn query")
        if key_cache.dtype != torch.float8_e4m3fn:
            fail("key_cache", key_cache, "float8_e4m3fn for a float8_e4m3fn query")
    if max_query_len < (1 if num_tokens else 0):
        fail("max_query_len", max_query_len, ">= 1")
    if max_seq_len < 0:
        fail("max_seq_len", max_seq_len, ">= 0")
    if max_seq_len > block_table.shape[1] * key_cache.shape[1]:
        fail("max_seq_len", max_seq_len, "within block_table")
    if not -math.inf < scale < math.inf:
        fail("scale", scale, "finite")
    if softcap is not None and not 0 < softcap < math.inf:
        fail("softcap", softcap, "positive and finite")
    if sliding_window is not None and sliding_window < 1:
        fail("sliding_window", sliding_window, ">= 1")
    if attention_chunk is not None and attention_chunk < 1:
        fail("attention_chunk", attention_chunk, ">= 1")
    for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is not None:
            fits = tensor.shape == (num_heads,) and tensor.dtype == torch.float32 and tensor.device == device
            if not fits:
                fail(name, tensor, f"float32 [{num_heads}] on {device}")
            check_dense(name, tensor)
    if q_scale is not None:
        fits = (q_scale.dim() == 0 or q_scale.shape == (num_kv_heads,)) and q_scale.dtype == torch.float32
        if not fits or q_scale.device != device:
            fail("q_scale", q_scale, f"float32, 0-d or [{num_kv_heads}], on {device}")
        check_dense("q_scale", q_scale)
    if k_scale is not None or v_scale is not None:
        check_cache_scales(key_cache, k_scale, v_scale)
    if tree_mask is not None:
        fits = tree_mask.shape == (num_tokens, max_query_len) and tree_mask.dtype == torch.bool
        if not fits or tree_mask.device != device:
            fail("tree_mask", tree_mask, f"bool [{num_tokens}, {max_query_len}] on {device}")
        check_dense("tree_mask", tree_mask)


def _check_append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    device = key.device
    check_rows("key", key, device, FLOAT_DTYPES)
    check_rows("value", value, device, (key.dtype,), tokens=key.shape[0])
    check_caches(key_cache, value_cache, device)
    check_written("key_cache", key_cache)
    check_written("value_cache", value_cache)
    check_index("slot_mapping", slot_mapping, torch.int64, 1, device, key.shape[0])
    for name, rows, cache_name, cache in (
        ("key", key, "key_cache", key_cache),
        ("value", value, "value_cache", value_cache),
    ):
        if rows.shape[1] != cache.shape[2] or rows.shape[2] != cache_head_size(cache):
            fail(name, rows, f"[T, {cache.shape[2]}, {cache_head_size(cache)}] like {cache_name}")
    if key_cache.dtype in LARGEST:
        if k_scale is None:
            fail("k_scale", k_scale, f"given for a {key_cache.dtype} cache")
        if v_scale is None:
            fail("v_scale", v_scale, f"given for a {value_cache.dtype} cache")
        check_cache_scales(key_cache, k_scale, v_scale)
    else:
        if key_cache.dtype != key.dtype:
            fail("key_cache", key_cache, f"{key.dtype} like key, or quantized")
        if k_scale is not None:
            fail("k_scale", k_scale, f"None for a {key_cache.dtype} cache")
        if v_scale is not None:
            fail("v_scale", v_scale, f"None for a {value_cache.dtype} cache")


def _check_attention_values(call: _Attention) -> None:
    """The checks of PAGEDATTN_CHECK=1: they read the tensors, and so synchronize."""
    rows = call.query.shape[0]
    starts = check_lengths(call.seq_lens, call.query_start_loc, call.max_query_len, call.max_seq_len)
    if starts[-1] > rows:
        fail("query_start_loc", starts, f"from 0 to at most {rows}")
    _check_table_values(call.block_table, call.seq_lens, call.key_cache)


def _check_table_values(block_table: Tensor, seq_lens: Tensor, key_cache: Tensor) -> None:
    """Blocks that hold tokens exist."""
    first_tokens = torch.arange(block_table.shape[1], device=block_table.device) * key_cache.shape[1]
    check_block_ids("block_table", block_table[first_tokens < seq_lens[:, None]], key_cache.shape[0])


def _check_slot_values(slot_mapping: Tensor, key_cache: Tensor) -> None:
    slots = slot_mapping[slot_mapping != -1]
    limit = key_cache.shape[0] * key_cache.shape[1]
    bad = slots[(slots < -1) | (slots >= limit)].tolist()
    if bad:
        fail("slot_mapping", bad[:4], f"-1 or slots within 0..{limit - 1}")
    ids, counts = slots.unique(return_counts=True)
    if ids.numel() != slots.numel():
        fail("slot_mapping", ids[counts > 1][:4].tolist(), "without duplicates")


# --- geometry: what a plan is made for, from host integers ------------------------------------------------------------


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETER_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


class _Geometry(NamedTuple):
    """What a plan's buffers and tiles follow from, besides the number of sequences and the device."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    max_query_len: int
    max_seq_len: int
    batch_invariant: bool


def _tiling(geometry: _Geometry, num_seqs: int, device: torch.device) -> AttentionTiling:
    return choose_tiling(
        **geometry._asdict(),
        num_seqs=num_seqs,
        multiprocessors=_multiprocessors(device),
        shared_memory=_shared_memory(device),
    )


_cached_tiling = lru_cache(maxsize=1024)(_tiling)  # symbolic sizes, which only fakes see, cannot be hashed


def _window(sliding_window: int | None, max_seq_len: int) -> int | None:
    """A window, or a chunk, that no sequence outgrows is none."""
    return None if sliding_window is None or sliding_window >= max_seq_len else sliding_window


def _plan_buffers(tiling: AttentionTiling, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty((tiling.max_items, ITEM_FIELDS), dtype=torch.int32),
        like.new_empty((tiling.num_counts,), dtype=torch.int32),
    )


def _fits_plan(tiling: AttentionTiling, device: torch.device, items: Tensor, counts: Tensor) -> bool:
    shapes = ((tiling.max_items, ITEM_FIELDS), (tiling.num_counts,))
    return all(
        tensor.shape == shape and tensor.dtype == torch.int32 and tensor.device == device and tensor.is_contiguous()
        for tensor, shape in zip((items, counts), shapes, strict=True)
    )


# --- implementations --------------------------------------------------------------------------------------------------


def uses_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda or INTERPRETED


def _plan_geometry(seq_lens: Tensor, query_start_loc: Tensor, *arguments: Any) -> _Geometry:
    """The geometry of a plan op's arguments (those of ``_PLAN``), checked."""
    geometry = _Geometry._make((*arguments[:6], arguments[7]))
    check_index("seq_lens", seq_lens, torch.int32, 1, seq_lens.device)
    check_index("query_start_loc", query_start_loc, torch.int32, 1, seq_lens.device, seq_lens.shape[0] + 1)
    if geometry.num_heads % geometry.num_kv_heads != 0:
        fail("num_heads", geometry.num_heads, f"a multiple of num_kv_heads={geometry.num_kv_heads}")
    check_head_sizes("head_size", geometry.head_size, "head_size_v", geometry.head_size_v)
    return geometry


def _plan_attention_out(
    seq_lens: Tensor, query_start_loc: Tensor, items: Tensor, counts: Tensor, *arguments: Any
) -> None:
    geometry = _plan_geometry(seq_lens, query_start_loc, *arguments)
    tiling = _cached_tiling(geometry, seq_lens.shape[0], seq_lens.device)
    if not _fits_plan(tiling, seq_lens.device, items, counts):
        fail("out", items, f"a plan of {seq_lens.shape[0]} sequences with the same geometry")
    _write_plan(seq_lens, query_start_loc, items, counts, tiling, geometry, arguments[6])


def _plan_attention(seq_lens: Tensor, query_start_loc: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    geometry = _plan_geometry(seq_lens, query_start_loc, *arguments)
    tiling = _cached_tiling(geometry, seq_lens.shape[0], seq_lens.device)
    tensors = _plan_buffers(tiling, seq_lens)
    _write_plan(seq_lens, query_start_loc, *tensors, tiling, geometry, arguments[6])
    return tensors


def _write_plan(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    items: Tensor,
    counts: Tensor,
    tiling: AttentionTiling,
    geometry: _Geometry,
    sliding_window: int | None,
) -> None:
    if CHECK_VALUES:
        check_lengths(seq_lens, query_start_loc, geometry.max_query_len, geometry.max_seq_len)
    window = _window(sliding_window, geometry.max_seq_len)
    if uses_triton(seq_lens):
        _prepare_plan(tiling, seq_lens.shape[0], window, seq_lens.device)(seq_lens, query_start_loc, items, counts)
        return
    plan_reference.plan_attention(seq_lens, query_start_loc, items, counts, tiling=tiling, sliding_window=window)


def _prepare_plan(tiling: AttentionTiling, num_seqs: int, window: int | None, device: torch.device) -> Any:
    from pagedattn.kernels.plan import prepare_plan

    return prepare_plan(tiling, num_seqs, window, device)


def _plan_attention_fake(seq_lens: Tensor, query_start_loc: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    geometry = _plan_geometry(seq_lens, query_start_loc, *arguments)
    return _plan_buffers(_tiling(geometry, seq_lens.shape[0], seq_lens.device), seq_lens)


def _attention_outputs(call: _Attention, return_lse: bool) -> tuple[Tensor, Tensor]:
    query = call.query
    dtype = query.dtype if query.dtype in FLOAT_DTYPES else torch.bfloat16
    out = query.new_empty((query.shape[0], query.shape[1], cache_head_size(call.value_cache)), dtype=dtype)
    return out, query.new_empty(query.shape[:2] if return_lse else (0, 0), dtype=torch.float32)


def _paged_attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = _Attention(*args[:-1])
    _check_attention(call)
    return _attention_outputs(call, return_lse=args[-1])


def _paged_attention(*args: Any) -> tuple[Tensor, Tensor]:
    call, return_lse = _Attention(*args[:-1]), args[-1]
    _check_attention(call)
    out, lse = _attention_outputs(call, return_lse)
    _attend(call, out, lse if return_lse else None)
    return out, lse


def _paged_attention_out(*args: Any) -> None:
    _check_attention_out(*args)
    _attend(_Attention(*args[:-2]), *args[-2:])


def _check_attention_out(*args: Any) -> None:
    call, out, lse = _Attention(*args[:-2]), args[-2], args[-1]
    _check_attention(call)
    query = call.query
    check_rows("out", out, query.device, FLOAT_DTYPES, tokens=query.shape[0])
    check_written("out", out)
    shape = (*query.shape[:2], cache_head_size(call.value_cache))
    if out.shape != shape:
        fail("out", out, f"{list(shape)}, as query and the head size of value_cache ask for")
    if query.dtype in FLOAT_DTYPES and out.dtype != query.dtype:
        fail("out", out, f"{query.dtype} like query")
    if lse is not None:
        fits = lse.shape == query.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous()
        if not fits or lse.device != query.device:
            fail("lse", lse, f"contiguous float32 {list(query.shape[:2])} on {query.device}")


def _attend(call: _Attention, out: Tensor, lse: Tensor | None) -> None:
    if CHECK_VALUES:
        _check_attention_values(call)
    if not out.numel():
        return
    if uses_triton(call.query):
        _attend_triton(call, out, lse)
        return
    if call.plan is not None:
        _attention_tiling(call, out)  # refuses the plan of another batch; the reference needs none
    attention_reference.paged_attention(
        *call[:6], options=_options(call), out=out, lse=lse, batch_invariant=call.batch_invariant
    )


def _options(call: _Attention) -> AttentionOptions:
    window, chunk = (_window(size, call.max_seq_len) for size in (call.sliding_window, call.attention_chunk))
    return AttentionOptions(call.scale, call.causal, window, chunk, *call[12:19])


def _attend_triton(call: _Attention, out: Tensor, lse: Tensor | None) -> None:
    prepared, planner = _prepare_attention(call, out, lse)
    plan = planner(*call[4:6]) if call.plan is None else call.plan
    prepared(*call[:4], plan, *call[13:19], out, lse)


# --- what calls prepare, remembered by their metadata -----------------------------------------------------------------

MAX_PREPARED = 4096
_prepared: dict[Any, Any] = {}


def _remember(fingerprint: tuple[Any, ...], prepared: Any) -> None:
    if len(_prepared) >= MAX_PREPARED:
        _prepared.clear()
    _prepared[fingerprint] = prepared


def _metadata(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())


class _Planner(NamedTuple):
    """Plans for calls that bring none."""

    launch: Any
    tiling: AttentionTiling

    def __call__(self, seq_lens: Tensor, query_start_loc: Tensor) -> tuple[Tensor, Tensor]:
        plan = _plan_buffers(self.tiling, seq_lens)
        self.launch(seq_lens, query_start_loc, *plan)
        return plan


def _attention_tiling(call: _Attention, out: Tensor) -> AttentionTiling:
    """The tiling of a checked call, which a plan that it brings must have been made for."""
    query, key_cache, num_seqs, plan = *call[:2], call.seq_lens.shape[0], call.plan
    sizes = (query.shape[1], key_cache.shape[2], query.shape[2], out.shape[2], call.max_query_len, call.max_seq_len)
    tiling = _cached_tiling(_Geometry(*sizes, call.batch_invariant), num_seqs, query.device)
    if plan is not None and (len(plan) != 2 or not _fits_plan(tiling, query.device, *plan)):
        fail("plan", plan and plan[0], f"made for these {num_seqs} sequences and this geometry")
    return tiling


def _prepare_attention(call: _Attention, out: Tensor, lse: Tensor | None) -> tuple[Any, _Planner]:
    """The launch of a checked call, and that of its plan in case it has none."""
    from pagedattn.kernels.attention import PreparedAttention

    query, key_cache, value_cache, num_seqs = *call[:3], call.seq_lens.shape[0]
    tiling = _attention_tiling(call, out)
    window = _window(call.sliding_window, call.max_seq_len)
    planner = _Planner(_prepare_plan(tiling, num_seqs, window, query.device), tiling)
    fingerprint = (call[6:13], call.batch_invariant, *map(_metadata, (*call[:6], *call[13:19], out, lse)))
    prepared = _prepared.get(fingerprint)
    if prepared is None:
        prepared = PreparedAttention(query, key_cache, value_cache, call.block_table, tiling, _options(call), out, lse)
        _remember(fingerprint, prepared)
    return prepared, planner


def _prepare_append(tensors: tuple[Any, ...], interleaved: bool) -> Any:
    """tensors: query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, k_scale, v_scale."""
    from pagedattn.kernels.cache import PreparedAppend

    query, key, value, cos_sin, _, key_cache, value_cache, _, k_scale, v_scale = tensors
    fingerprint = (interleaved, *map(_metadata, tensors))
    prepared = _prepared.get(fingerprint)
    if prepared is None:
        prepared = PreparedAppend(query, key, value, cos_sin, key_cache, value_cache, k_scale, v_scale, interleaved)
        _remember(fingerprint, prepared)
    return prepared


def _append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _check_append(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    if CHECK_VALUES:
        _check_slot_values(slot_mapping, key_cache)
    if not key.shape[0]:
        return
    if not uses_triton(key):
        cache_reference.append_kv(key, value, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return
    tensors = (None, key, value, None, None, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    _prepare_append(tensors, False)(*tensors)


def _check_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _check_append(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    check_rows("query", query, key.device, (key.dtype,), tokens=key.shape[0])
    check_written("query", query)
    if query.shape[2] != key.shape[2]:
        fail("query", query, f"of head size {key.shape[2]} like key")
    check_index("positions", positions, torch.int64, 1, key.device, key.shape[0])
    fits = cos_sin.dim() == 2 and cos_sin.shape[1] % 2 == 0 and 2 <= cos_sin.shape[1] <= key.shape[2]
    if not fits or cos_sin.dtype != torch.float32:
        fail("cos_sin", cos_sin, f"float32 [:, even and <= {key.shape[2]}]")
    if cos_sin.device != key.device:
        fail("cos_sin", cos_sin, f"on {key.device}")
    if cos_sin.stride(1) != 1:
        fail("cos_sin", cos_sin.stride(), "contiguous in its last dimension")


def _rope_append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _check_rope(
        query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, interleaved, k_scale, v_scale
    )
    if CHECK_VALUES:
        _check_slot_values(slot_mapping, key_cache)
        bad = positions[(positions < 0) | (positions >= cos_sin.shape[0])].tolist()
        if bad:
            fail("positions", bad[:4], f"within 0..{cos_sin.shape[0] - 1}")
    if not key.shape[0]:
        return
    if not uses_triton(key):
        cache_reference.rope_append_kv(
            query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping,
            interleaved=interleaved, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return
    tensors = (query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    _prepare_append(tensors, interleaved)(*tensors)


def _check_copy(src_key: Tensor, src_value: Tensor, dst_key: Tensor, dst_value: Tensor, block_mapping: Tensor) -> None:
    pairs = (("dst_key", dst_key, "src_key", src_key), ("dst_value", dst_value, "src_value", src_value))
    for name, destination, source_name, source in pairs:
        if source.dim() < 2:
            fail(source_name, source, "[num_blocks, ...]")
        fits = destination.shape[1:] == source.shape[1:] and destination.dtype == source.dtype
        if not fits:
            fail(name, destination, f"{source.dtype} with blocks of {list(source.shape[1:])} like {source_name}")
        if source.is_meta != destination.is_meta:
            fail(source_name, source, f"of memory, as {name} is" if source.is_meta else f"on meta, as {name} is")
        check_written(name, destination)
    fits = block_mapping.dim() == 2 and block_mapping.shape[1] == 2 and block_mapping.dtype == torch.int64
    if not fits:
        fail("block_mapping", block_mapping, "int64 [:, 2]")


def _copy_blocks(src_key: Tensor, src_value: Tensor, dst_key: Tensor, dst_value: Tensor, block_mapping: Tensor) -> None:
    _check_copy(src_key, src_value, dst_key, dst_value, block_mapping)
    if CHECK_VALUES:
        for column, caches in enumerate(((src_key, src_value), (dst_key, dst_value))):
            check_block_ids("block_mapping", block_mapping[:, column], min(len(cache) for cache in caches))
        destinations, counts = block_mapping[:, 1].unique(return_counts=True)
        if destinations.numel() != len(block_mapping):
            fail("block_mapping", destinations[counts > 1][:4].tolist(), "without a destination named twice")
    if not block_mapping.shape[0]:
        return
    if _crosses_mapped_memory(src_key, src_value, dst_key, dst_value):
        from pagedattn.kernels import copy

        if not block_mapping.is_cuda:
            device = src_key.device if src_key.is_cuda else dst_key.device
            block_mapping = block_mapping.pin_memory().to(device, non_blocking=True)
        copy.copy_blocks(src_key, src_value, dst_key, dst_value, block_mapping)
        return
    cache_reference.copy_blocks(src_key, src_value, dst_key, dst_value, block_mapping)


def _crosses_mapped_memory(*caches: Tensor) -> bool:
    """Whether of [src_key, src_value, dst_key, dst_value] one side is a GPU's and the other is pinned in the host."""
    src_key, src_value, dst_key, dst_value = caches
    if (
        src_key.is_cuda == dst_key.is_cuda
        or src_key.is_cuda != src_value.is_cuda
        or dst_key.is_cuda != dst_value.is_cuda
    ):
        return False
    return src_key.shape[1:3] == src_value.shape[1:3] and all(
        cache.dim() == 4 and cache.stride(3) == 1 and (cache.is_cuda or cache.is_pinned()) for cache in caches
    )


def _check_gather(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    device = key_cache.device
    check_caches(key_cache, value_cache, device)
    check_index("seq_lens", seq_lens, torch.int32, 1, device)
    check_index("block_table", block_table, torch.int32, 2, device, seq_lens.shape[0])
    require_int("max_seq_len", max_seq_len)
    check_cache_scales(key_cache, k_scale, v_scale)


def _gather_kv_fake(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    _check_gather(key_cache, value_cache, block_table, seq_lens, max_seq_len, k_scale, v_scale)
    dtype = _gathered_dtype(key_cache, dtype)
    rows = (seq_lens.shape[0], max_seq_len, key_cache.shape[2])
    return (
        key_cache.new_empty((*rows, cache_head_size(key_cache)), dtype=dtype),
        value_cache.new_empty((*rows, cache_head_size(value_cache)), dtype=dtype),
    )


def _gathered_dtype(key_cache: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        dtype = torch.bfloat16 if key_cache.dtype in LARGEST else key_cache.dtype
    if dtype not in FLOAT_DTYPES:
        fail("dtype", dtype, "torch.float16, torch.bfloat16 or torch.float32")
    return dtype


def _gather_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    _check_gather(key_cache, value_cache, block_table, seq_lens, max_seq_len, k_scale, v_scale)
    if CHECK_VALUES:
        reach = min(max_seq_len, block_table.shape[1] * key_cache.shape[1])
        if not bool(((seq_lens >= 0) & (seq_lens <= reach)).all()):
            fail("seq_lens", seq_lens.tolist(), f"within 0..{reach}")
        _check_table_values(block_table, seq_lens, key_cache)
    return cache_reference.gather_kv(
        key_cache, value_cache, block_table, seq_lens,
        max_seq_len=max_seq_len, k_scale=k_scale, v_scale=v_scale, dtype=_gathered_dtype(key_cache, dtype),
    )  # fmt: skip


def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    if out_a.dim() != 3 or out_a.dtype not in FLOAT_DTYPES:
        fail("out_a", out_a, "fp16, bf16 or fp32 [T, Hq, Dv]")
    if out_b.shape != out_a.shape or out_b.dtype != out_a.dtype:
        fail("out_b", out_b, f"{describe(out_a)} like out_a")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        fits = lse.shape == out_a.shape[:2] and lse.dtype == torch.float32
        if not fits:
            fail(name, lse, f"float32 {list(out_a.shape[:2])}")
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if tensor.device != out_a.device:
            fail(name, tensor, f"on {out_a.device}")
    return torch.empty_like(out_a, memory_format=torch.contiguous_format), lse_a.new_empty(lse_a.shape)


def _merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _merge_fake(out_a, lse_a, out_b, lse_b)
    return attention_reference.merge_attention_states(out_a, lse_a, out_b, lse_b)


# --- registration -----------------------------------------------------------------------------------------------------


def register(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + signature)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    _library.impl(name, _without_derivatives(name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"pagedattn::{name}", fake, lib=_library)


def _without_derivatives(name: str) -> Callable[..., Any]:
    """What autograd calls, torch.func's included: arguments that somebody differentiates by are refused."""
    packet, _, overload = name.partition(".")

    @lru_cache
    def registered() -> tuple[Any, tuple[str, ...]]:
        op = getattr(getattr(torch.ops.pagedattn, packet), overload or "default")
        return op, tuple(argument.name for argument in op._schema.arguments)

    def check_and_go_on(keys: Any, *args: Any) -> Any:
        op, names = registered()
        for argument, given in zip(names, args, strict=False):
            require_no_grad(argument, given)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return check_and_go_on


def fake_of_mutation(check: Callable[..., None]) -> Callable[..., None]:
    """The fake of an op that only writes its arguments: its checks."""

    def fake(*args: Any) -> None:
        check(*args)

    return fake


_PLAN = (
    "SymInt num_heads, SymInt num_kv_heads, SymInt head_size, SymInt head_size_v, SymInt max_query_len, "
    "SymInt max_seq_len, SymInt? sliding_window, bool batch_invariant"
)
register(
    "plan_attention",
    f"(Tensor seq_lens, Tensor query_start_loc, {_PLAN}) -> (Tensor, Tensor)",
    _plan_attention,
    _plan_attention_fake,
)
register(
    "plan_attention.out",
    f"(Tensor seq_lens, Tensor query_start_loc, Tensor(a!) items, Tensor(b!) counts, {_PLAN}) -> ()",
    _plan_attention_out,
    lambda *args: None,
)
_ATTENTION = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor query_start_loc, SymInt max_query_len, SymInt max_seq_len, float scale, bool causal, "
    "SymInt? sliding_window, SymInt? attention_chunk, float? softcap, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor? tree_mask, Tensor[]? plan, "
    "bool batch_invariant, "
)
register(
    "paged_attention", f"({_ATTENTION}bool return_lse) -> (Tensor, Tensor)", _paged_attention, _paged_attention_fake
)
register(
    "paged_attention.out",
    f"({_ATTENTION}Tensor(a!) out, Tensor(b!)? lse) -> ()",
    _paged_attention_out,
    fake_of_mutation(_check_attention_out),
)
_CACHES = "Tensor({}!) key_cache, Tensor({}!) value_cache, Tensor slot_mapping, "
_SCALES = "Tensor({}!)? k_scale, Tensor({}!)? v_scale) -> ()"
register(
    "append_kv",
    "(Tensor key, Tensor value, " + _CACHES.format("a", "b") + _SCALES.format("c", "d"),
    _append_kv,
    fake_of_mutation(_check_append),
)
register(
    "rope_append_kv",
    "(Tensor(a!) query, Tensor key, Tensor value, Tensor cos_sin, Tensor positions, "
    + _CACHES.format("b", "c")
    + "bool interleaved, "
    + _SCALES.format("d", "e"),
    _rope_append_kv,
    fake_of_mutation(_check_rope),
)
register(
    "copy_blocks",
    "(Tensor src_key, Tensor src_value, Tensor(a!) dst_key, Tensor(b!) dst_value, Tensor block_mapping) -> ()",
    _copy_blocks,
    fake_of_mutation(_check_copy),
)
register(
    "gather_kv",
    "(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, SymInt max_seq_len, Tensor? k_scale, "
    "Tensor? v_scale, ScalarType? dtype) -> (Tensor, Tensor)",
    _gather_kv,
    _gather_kv_fake,
)
register(
    "merge_attention_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    _merge_attention_states,
    _merge_fake,
)


# --- what people call -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionPlan:
    """How a step's attention is cut up, made once by ``plan_attention`` for all layers of one geometry.

    The tensors are laid out as ``kernels/plan_reference.py`` says; counters among them make it a plan for one stream at
    a time. ``geometry``: what it was made for, in the order of ``GEOMETRY``. ``workspaces``: by size, what its calls
    hold unfinished results in, from one layer to the next.
    """

    items: Tensor
    counts: Tensor
    geometry: tuple[Any, ...]
    workspaces: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def batch_invariant(self) -> bool:
        return self.geometry[8]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.items, self.counts]


GEOMETRY = (
    "num_heads, num_kv_heads, head_size, head_size_v, block_size, max_query_len, max_seq_len, sliding_window, "
    "batch_invariant"
)


def plan_attention(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    head_size_v: int | None = None,
    block_size: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
    out: AttentionPlan | None = None,
) -> AttentionPlan:
    """Plan one step's attention on the device, for every layer of this geometry.

    Args:
        seq_lens: int32 [B], tokens in the cache, the new ones included.
        query_start_loc: int32 [B + 1], first row of each sequence's query tokens.
        num_heads, num_kv_heads, head_size, head_size_v, block_size: the layers' geometry; head_size_v None = head_size.
        max_query_len, max_seq_len: upper bounds, host ints. They and B decide every buffer's size.
        sliding_window: as in ``paged_attention``.
        batch_invariant: make every sequence's output the same bits whatever else is in the batch, however it is padded
            and however its prefill was cut.
        out: a plan of the same geometry, rewritten in place (same addresses, as a CUDA graph needs).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    require_tensor("seq_lens", seq_lens)
    require_tensor("query_start_loc", query_start_loc)
    for name, given in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("block_size", block_size)):
        require_int(name, given, minimum=1)
    require_int("head_size", head_size)
    require_int("head_size_v", head_size_v, optional=True)
    require_int("max_query_len", max_query_len)
    require_int("max_seq_len", max_seq_len)
    require_int("sliding_window", sliding_window, minimum=1, optional=True)
    require_bool("batch_invariant", batch_invariant)
    head_size_v = head_size if head_size_v is None else head_size_v
    sizes = (num_heads, num_kv_heads, head_size, head_size_v)
    bounds = (max_query_len, max_seq_len, sliding_window, batch_invariant)
    geometry, arguments = (*sizes, block_size, *bounds), (*sizes, *bounds)
    if out is None:
        tensors = torch.ops.pagedattn.plan_attention.default(seq_lens, query_start_loc, *arguments)
        items, counts = tensors
        return AttentionPlan(items, counts, geometry)
    if not isinstance(out, AttentionPlan):
        raise TypeError(f"out: got {type(out).__name__}; must be an AttentionPlan or None")
    if out.geometry != geometry:
        raise ValueError(f"out: got a plan for ({GEOMETRY}) = {out.geometry}; must be for {geometry}")
    torch.ops.pagedattn.plan_attention.out(seq_lens, query_start_loc, *out.tensors, *arguments)
    return out


class _SeenAttention(NamedTuple):
    """A call of ``paged_attention`` that has passed all checks, to be made again on other tensors of its like."""

    prepared: Any
    planner: _Planner
    result: Empty
    lse: Empty | None  # where it is wanted

    def __call__(
        self, batch: tuple[Tensor, ...], plan: AttentionPlan | None, optional: tuple[Tensor | None, ...]
    ) -> Any:
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc = batch
        *features, out = optional
        workspaces: dict[int, Tensor] | None = None
        if plan is None:
            tensors: tuple[Tensor, ...] = self.planner(seq_lens, query_start_loc)
        else:
            tensors, workspaces = (plan.items, plan.counts), plan.workspaces
        if out is None:
            out = self.result()
        lse = None if self.lse is None else self.lse()
        self.prepared(query, key_cache, value_cache, block_table, tensors, *features, out, lse, workspaces)
        return out if lse is None else (out, lse)


_seen_attention: SeenCalls[_SeenAttention] = SeenCalls()


def _check_attention_types(
    batch: tuple[Any, ...], numbers: tuple[Any, ...], optional: tuple[Any, ...], plan: Any
) -> None:
    """The types of ``paged_attention``'s arguments, and the ranks without which they have no shape to speak of."""
    query, key_cache, value_cache, block_table, *_ = batch
    for name, given in zip(_Attention._fields[:6], batch, strict=True):
        require_tensor(name, given)
    for name, given, shape in (
        ("query", query, "[T, Hq, D]"),
        ("key_cache", key_cache, "[N, S, Hkv, D]"),
        ("value_cache", value_cache, "[N, S, Hkv, Dv]"),
        ("block_table", block_table, "int32 [B, max_blocks]"),
    ):
        if given.ndim != shape.count(",") + 1:
            fail(name, given, shape)
    for name, given in zip((*_Attention._fields[13:19], "out"), optional, strict=True):
        require_tensor(name, given, optional=True)
    if plan is not None and not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan: got {type(plan).__name__}; must be an AttentionPlan or None")
    max_query_len, max_seq_len, scale, causal, sliding_window, attention_chunk, softcap, return_lse = numbers
    require_number("scale", scale)
    require_number("softcap", softcap, positive=True)
    require_int("max_query_len", max_query_len)
    require_int("max_seq_len", max_seq_len, optional=True)
    require_int("sliding_window", sliding_window, optional=True)
    require_int("attention_chunk", attention_chunk, optional=True)
    require_bool("causal", causal)
    require_bool("return_lse", return_lse)


@overload
def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, *, max_query_len: int, max_seq_len: int | None = ..., scale: float | None = ...,
    causal: bool = ..., sliding_window: int | None = ..., attention_chunk: int | None = ...,
    softcap: float | None = ..., alibi_slopes: Tensor | None = ..., sinks: Tensor | None = ...,
    q_scale: Tensor | None = ..., k_scale: Tensor | None = ..., v_scale: Tensor | None = ...,
    tree_mask: Tensor | None = ..., plan: AttentionPlan | None = ..., out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, *, max_query_len: int, max_seq_len: int | None = ..., scale: float | None = ...,
    causal: bool = ..., sliding_window: int | None = ..., attention_chunk: int | None = ...,
    softcap: float | None = ..., alibi_slopes: Tensor | None = ..., sinks: Tensor | None = ...,
    q_scale: Tensor | None = ..., k_scale: Tensor | None = ..., v_scale: Tensor | None = ...,
    tree_mask: Tensor | None = ..., plan: AttentionPlan | None = ..., out: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    max_query_len: int,
    max_seq_len: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence's query tokens over its keys and values in a paged cache.

    A query's position is seq_len - query_len + its index. A logit is scaled, softcapped, gets ALiBi, then is masked;
    the sink joins the denominator last. A query that sees no key gives 0 and a log-sum-exp of -inf (the sink's value
    with a sink); rows past query_start_loc[B] and positions below 0 give 0 and -inf.

    Args:
        query: [T, Hq, D] fp16, bf16, fp32, or float8_e4m3fn with q_scale (then the result is bf16).
        key_cache: [N, S, Hkv, D], any strides with stride(-1) == 1; the query's dtype, or quantized (float8_e4m3fn,
            float8_e5m2, int8, or uint8 holding int4 pairs).
        value_cache: [N, S, Hkv, Dv]; may share memory with key_cache.
        block_table: int32 [B, max_blocks].
        seq_lens: int32 [B], tokens in the cache, the new ones included; 0 is allowed.
        query_start_loc: int32 [B + 1]; a decode batch is 0, 1, 2, ...
        max_query_len: upper bound of the query lengths, a host int.
        max_seq_len: upper bound of seq_lens, a host int; None = the plan's, or max_blocks * S.
        scale: None = D ** -0.5.
        causal: a query sees no key after its own position.
        sliding_window: w: |query position - key position| < w.
        attention_chunk: c: a query sees only keys of its own chunk of c positions.
        softcap: logits become softcap * tanh(logit / softcap).
        alibi_slopes: fp32 [Hq]; adds -slope * |query position - key position|.
        sinks: fp32 [Hq], one logit more in each softmax's denominator.
        q_scale: fp32, 0-d or [Hkv].
        k_scale, v_scale: fp32, 0-d, [Hkv] or [N, S, Hkv].
        tree_mask: bool [T, max_query_len]; columns are the sequence's query tokens; replaces causal among them.
        plan: from ``plan_attention`` with the same geometry and lengths; None makes one, at the cost of a launch.
        out: [T, Hq, Dv] to write into.
        return_lse: also return the log-sum-exp, fp32 [T, Hq], natural logarithm.

    Returns:
        [T, Hq, Dv], or that and the log-sum-exp.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """

    batch = (query, key_cache, value_cache, block_table, seq_lens, query_start_loc)
    numbers = (max_query_len, max_seq_len, scale, causal, sliding_window, attention_chunk, softcap, return_lse)
    optional = (alibi_slopes, sinks, q_scale, k_scale, v_scale, tree_mask, out)
    key: tuple[Any, ...] | None = None
    tensors: tuple[Any, ...] = ()
    try:
        if not CHECK_VALUES and not torch.compiler.is_compiling():
            geometry, planned = (None, ()) if plan is None else (plan.geometry, (plan.items, plan.counts))
            key = (geometry, query.shape, numbers, (*map(type, numbers + optional),))
            given = [tensor for tensor in optional if tensor is not None]
            tensors = (*batch, *planned, *given)
            seen = _seen_attention.find(key, tensors)
            if seen is not None:
                return seen(batch, plan, optional)
        if bool in map(type, numbers[:3] + numbers[4:7]) or type(causal) is not bool or type(return_lse) is not bool:
            _check_attention_types(batch, numbers, optional, plan)  # the dispatcher takes a bool for an int
        bound = block_table.shape[1] * key_cache.shape[1] if plan is None else plan.geometry[6]
        call = _Attention(
            *batch, max_query_len, bound if max_seq_len is None else max_seq_len,
            query.shape[2] ** -0.5 if scale is None else scale, causal, sliding_window, attention_chunk, softcap,
            *optional[:6], None if plan is None else plan.tensors, plan is not None and plan.batch_invariant,
        )  # fmt: skip
        if plan is not None and plan.geometry[:8] != (
            query.shape[1], key_cache.shape[2], query.shape[2], cache_head_size(value_cache), key_cache.shape[1],
            max_query_len, call.max_seq_len, sliding_window,
        ):  # fmt: skip
            raise ValueError(f"plan: got one for ({GEOMETRY}) = {plan.geometry}; must be for this call's")
        lse = None
        if out is None:
            result, result_lse = torch.ops.pagedattn.paged_attention.default(*call, return_lse)
            lse = result_lse if return_lse else None
        else:
            result = out
            lse = query.new_empty(query.shape[:2], dtype=torch.float32) if return_lse else None
            torch.ops.pagedattn.paged_attention.out(*call, out, lse)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        # The dispatcher checks types, and once is enough; but it does not name the argument in our terms.
        _check_attention_types(batch, numbers, optional, plan)
        raise
    if key is not None and uses_triton(query) and result.numel():
        prepared, planner = _prepare_attention(call, result, lse)
        empty_lse = None if lse is None else Empty(lse)
        _seen_attention.add(key, tensors, _SeenAttention(prepared, planner, Empty(result), empty_lse))
    return result if lse is None else (result, lse)


_seen_appends: SeenCalls[Any] = SeenCalls()


def _append_key(tensors: tuple[Any, ...], interleaved: bool, rotary_dim: int | None) -> tuple[Any, ...]:
    return (getattr(tensors[1], "shape", None), interleaved, rotary_dim, *map(type, tensors))


def _append_again(tensors: tuple[Any, ...], interleaved: bool = False, rotary_dim: int | None = None) -> bool:
    """Make an append again whose like has passed all checks; False if none has. tensors: as ``_prepare_append``'s."""
    given = [tensor for tensor in tensors if tensor is not None]
    prepared = _seen_appends.find(_append_key(tensors, interleaved, rotary_dim), given)
    if prepared is None or CHECK_VALUES:
        return False
    prepared(*tensors)
    return True


def _remember_append(tensors: tuple[Any, ...], interleaved: bool = False, rotary_dim: int | None = None) -> None:
    if tensors[1].shape[0] and uses_triton(tensors[1]):
        given = [tensor for tensor in tensors if tensor is not None]
        key = _append_key(tensors, interleaved, rotary_dim)
        _seen_appends.add(key, given, _prepare_append(tensors, interleaved))


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Store each token's key and value in its slot of the paged cache, quantizing if the cache is quantized.

    Args:
        key: [T, Hkv, D] fp16, bf16 or fp32.
        value: [T, Hkv, Dv], the key's dtype.
        key_cache, value_cache: [N, S, Hkv, D] and [N, S, Hkv, Dv], written in place.
        slot_mapping: int64 [T]: block * S + offset; -1 skips the token. Slots must not repeat.
        k_scale, v_scale: fp32, for quantized caches: 0-d and [Hkv] are read, [N, S, Hkv] are written.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    tensors = (None, key, value, None, None, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    if not torch.compiler.is_compiling() and _append_again(tensors):
        return
    for name, given in (("key", key), ("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        require_tensor(name, given)
    require_tensor("slot_mapping", slot_mapping)
    require_tensor("k_scale", k_scale, optional=True)
    require_tensor("v_scale", v_scale, optional=True)
    torch.ops.pagedattn.append_kv.default(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    if not torch.compiler.is_compiling():
        _remember_append(tensors)


def rope_append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate query in place by its positions, and store the rotated key and the value in the paged cache.

    Args:
        query: [T, Hq, D], rotated in place.
        key: [T, Hkv, D], not modified.
        value: [T, Hkv, Dv].
        cos_sin: fp32 [P, rotary_dim]: per position, the cosines of the rotary_dim / 2 angles, then their sines.
        positions: int64 [T], within 0..P - 1 (also where slot_mapping is -1).
        key_cache, value_cache, slot_mapping, k_scale, v_scale: as in ``append_kv``.
        interleaved: rotate pairs (0, 1), (2, 3), ... instead of (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
        rotary_dim: how many leading elements of a head are rotated; None = cos_sin's width, which it must equal.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    require_bool("interleaved", interleaved)
    if rotary_dim is not None:
        require_int("rotary_dim", rotary_dim, minimum=2)
    tensors = (query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    if not torch.compiler.is_compiling() and _append_again(tensors, interleaved, rotary_dim):
        return
    for name, given in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("cos_sin", cos_sin),
        ("positions", positions),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("slot_mapping", slot_mapping),
    ):
        require_tensor(name, given)
    require_tensor("k_scale", k_scale, optional=True)
    require_tensor("v_scale", v_scale, optional=True)
    if rotary_dim is not None and (cos_sin.dim() != 2 or rotary_dim != cos_sin.shape[1]):
        fail("rotary_dim", rotary_dim, "cos_sin.shape[1]")
    torch.ops.pagedattn.rope_append_kv.default(
        query, key, value, cos_sin, positions, key_cache, value_cache, slot_mapping, interleaved, k_scale, v_scale
    )
    if not torch.compiler.is_compiling():
        _remember_append(tensors, interleaved, rotary_dim)


def copy_blocks(src_key: Tensor, src_value: Tensor, dst_key: Tensor, dst_value: Tensor, block_mapping: Tensor) -> None:
    """Copy whole blocks between caches, on one device or across; everything is read before anything is written.

    Between a GPU and pinned memory of the host, caches of four dimensions, this enqueues on the current stream and does
    not wait: run it on a side stream, and wait for an event before the host, or another stream, reads the result or
    frees its memory. To and from other memory of the host it synchronizes.

    Args:
        src_key, src_value: caches [N, ...] to read.
        dst_key, dst_value: caches [M, ...] with blocks of the same shape and dtype, written in place; may be the
            sources.
        block_mapping: int64 [P, 2] of (source block, destination block). Destinations must not repeat.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    for name, given in (("src_key", src_key), ("src_value", src_value), ("dst_key", dst_key), ("dst_value", dst_value)):
        require_tensor(name, given)
    require_tensor("block_mapping", block_mapping)
    torch.ops.pagedattn.copy_blocks.default(src_key, src_value, dst_key, dst_value, block_mapping)


def gather_kv(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_seq_len: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Read each sequence's keys and values out of the paged cache, dequantized, side by side.

    Args:
        key_cache, value_cache, block_table, seq_lens, k_scale, v_scale: as in ``paged_attention``.
        max_seq_len: length of the result; must be at least every length.
        dtype: fp16, bf16 or fp32; None = the cache's, bf16 if that is quantized.

    Returns:
        [B, max_seq_len, Hkv, D] and [B, max_seq_len, Hkv, Dv], zero past each length.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    for name, given in (("key_cache", key_cache), ("value_cache", value_cache), ("block_table", block_table)):
        require_tensor(name, given)
    require_tensor("seq_lens", seq_lens)
    require_tensor("k_scale", k_scale, optional=True)
    require_tensor("v_scale", v_scale, optional=True)
    require_int("max_seq_len", max_seq_len)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}; must be a torch.dtype or None")
    return torch.ops.pagedattn.gather_kv.default(
        key_cache, value_cache, block_table, seq_lens, max_seq_len, k_scale, v_scale, dtype
    )


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    For shared prefixes and context parallelism.

    Args:
        out_a, out_b: [T, Hq, Dv], one dtype.
        lse_a, lse_b: fp32 [T, Hq], natural logarithm; -inf where a part saw no key.

    Returns:
        [T, Hq, Dv] and fp32 [T, Hq]; two -inf merge to 0 and -inf.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    for name, given in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        require_tensor(name, given)
    return torch.ops.pagedattn.merge_attention_states.default(out_a, lse_a, out_b, lse_b)
