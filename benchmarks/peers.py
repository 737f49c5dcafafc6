"""Other implementations of paged attention, called as their own engines call them.

A peer is used where it can be imported and is otherwise a dash in the table with the reason; nothing of theirs is in
this repository. Each is given what it wants (page lists, metadata, scratch, keys of new tokens side by side) before the
clock starts. What it would repeat every step is ``Prepared.plan``, timed apart.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_systems import FP8_TOLERANCE, TOLERANCE, Prepared, System, first_line, require, require_cuda
from benchmarks.workload import DTYPES, AttentionInputs

WORKSPACE_BYTES = 512 << 20  # FlashInfer's for split results


def _module(*names: str) -> Any:
    """The first of these modules that there is."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(names[-1])


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _page_list(inputs: AttentionInputs, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each copy's pages of the first ``lengths`` tokens in one row: indptr [B + 1] on the host, pages [C, :], last."""
    size = inputs.shape.block_size
    counts = torch.tensor([-(-length // size) for length in lengths], dtype=torch.int32)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)))
    columns = torch.arange(inputs.block_tables.shape[2], device=inputs.device)
    pages = inputs.block_tables[:, columns < counts.to(inputs.device)[:, None]]
    last = torch.tensor([(length - 1) % size + 1 for length in lengths], dtype=torch.int32)
    return indptr, pages.contiguous(), last


class FlashAttention3:
    """FlashAttention-3 as vLLM builds and calls it, with metadata made ahead."""

    def __init__(self) -> None:
        self._interface = _module("vllm.vllm_flash_attn.flash_attn_interface", "vllm_flash_attn.flash_attn_interface")
        if not self._interface.FA3_AVAILABLE:
            raise ImportError(f"FA3 is not in this build: {self._interface.FA3_UNAVAILABLE_REASON}")
        self.name, self.version = "FA3", _version(self._interface.__package__.partition(".")[0])

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require_cuda(inputs)
        require(shape.kind != "latent", "no latent attention over one cache")
        require(shape.cache_dtype in ("bf16", "fp8"), f"no {shape.cache_dtype} cache")
        require(shape.scales != "token", "no scales per token")
        is_fp8 = shape.cache_dtype == "fp8"
        queries = inputs.queries.to(DTYPES["fp8"]) if is_fp8 else inputs.queries
        window = (-1, -1) if shape.sliding_window is None else (shape.sliding_window - 1, 0)
        descale = {}
        if is_fp8:
            assert inputs.k_scale is not None
            assert inputs.v_scale is not None
            every = (shape.batch, shape.num_kv_heads)
            descale = {
                "q_descale": torch.ones(every, device=inputs.device),
                "k_descale": inputs.k_scale.expand(every),
                "v_descale": inputs.v_scale.expand(every),
            }

        def plan(_: int) -> Tensor:
            return self._interface.get_scheduler_metadata(
                batch_size=shape.batch, max_seqlen_q=shape.max_query_len, max_seqlen_k=shape.max_seq_len,
                num_heads_q=shape.num_heads, num_heads_kv=shape.num_kv_heads, headdim=shape.head_size,
                cache_seqlens=inputs.seq_lens, qkv_dtype=queries.dtype, cu_seqlens_q=inputs.query_start_loc,
                page_size=shape.block_size, causal=True, window_size=window, has_softcap=shape.softcap is not None,
            )  # fmt: skip

        metadata = plan(0)
        sinks = None if inputs.sinks is None else inputs.sinks.to(torch.bfloat16)

        def launch(copy: int) -> None:
            self._interface.flash_attn_varlen_func(
                queries[copy], inputs.key_cache, inputs.value_cache, out=inputs.outs[copy],
                cu_seqlens_q=inputs.query_start_loc, max_seqlen_q=shape.max_query_len, seqused_k=inputs.seq_lens,
                max_seqlen_k=shape.max_seq_len, softmax_scale=shape.scale, causal=True, window_size=list(window),
                softcap=shape.softcap or 0.0, block_table=inputs.block_tables[copy], scheduler_metadata=metadata,
                fa_version=3, s_aux=sinks, **descale,
            )  # fmt: skip

        return Prepared(launch, plan, tolerance=FP8_TOLERANCE if is_fp8 else TOLERANCE, note="fp8 query" * is_fp8)


class FlashInfer:
    """FlashInfer's batch wrappers: tensor cores for decode, and the backend that it chooses itself or the one named."""

    def __init__(self, backend: str = "auto") -> None:
        self._package = importlib.import_module("flashinfer")
        self._backend = backend
        self.name, self.version = "FlashInfer" + f" {backend}" * (backend != "auto"), self._package.__version__
        self._workspace: Tensor | None = None

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require_cuda(inputs)
        has_choice = shape.kind == "prefill" or shape.sinks  # a decode without sinks is fa2 anyway
        require(self._backend == "auto" or has_choice, "as without a backend named")
        require(shape.cache_dtype in ("bf16", "fp8"), f"no {shape.cache_dtype} cache of this layout")
        require(shape.scales in ("none", "tensor"), f"no scales per {shape.scales}")
        require(shape.query_dtype == "bf16" or self._backend == "auto", "no fp8 queries")
        require(not (shape.softcap and shape.sinks), "no softcap beside sinks")
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
        if shape.kind == "latent":
            return self._prepare_latent(inputs)
        if shape.kind == "decode" and not shape.sinks:
            return self._prepare_decode(inputs)
        return self._prepare_prefill(inputs)

    def _prepare_decode(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        wrapper = self._package.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
        indptr, pages, last = _page_list(inputs, list(shape.seq_lens))

        def plan(copy: int) -> None:
            wrapper.plan(
                indptr, pages[copy], last, shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size,
                window_left=-1 if shape.sliding_window is None else shape.sliding_window - 1,
                logits_soft_cap=shape.softcap, q_data_type=torch.bfloat16, kv_data_type=inputs.key_cache.dtype,
                sm_scale=shape.scale,
            )  # fmt: skip

        def run(copy: int) -> None:
            wrapper.run(inputs.queries[copy], (inputs.key_cache, inputs.value_cache), out=inputs.outs[copy])

        return self._prepared(wrapper, "_paged_kv_indices_buf", pages, plan, run)

    def _prepare_prefill(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        window_left = -1 if shape.sliding_window is None else shape.sliding_window - 1
        if inputs.sinks is not None:
            attention = importlib.import_module("flashinfer.attention")
            wrapper = attention.BatchAttentionWithAttentionSinkWrapper(
                self._workspace, "NHD", backend=self._backend, q_data_type=torch.bfloat16,
                kv_data_type=inputs.key_cache.dtype, head_dim_qk=shape.head_size, head_dim_vo=shape.value_size,
                window_left=window_left,
            )  # fmt: skip
        else:
            wrapper = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=self._backend)
        starts = inputs.query_start_loc.cpu()
        indptr, pages, last = _page_list(inputs, list(shape.seq_lens))

        def plan(copy: int) -> None:
            wrapper.plan(
                starts, indptr, pages[copy], last, shape.num_heads, shape.num_kv_heads, shape.head_size,
                shape.block_size, causal=True, sm_scale=shape.scale, window_left=window_left,
                logits_soft_cap=shape.softcap, q_data_type=inputs.queries.dtype, kv_data_type=inputs.key_cache.dtype,
                o_data_type=torch.bfloat16,
            )  # fmt: skip

        extra: tuple[Any, ...] = ()
        if inputs.sinks is not None:
            extra = (inputs.sinks, shape.scale)
        elif shape.query_dtype == "fp8":
            ones = torch.ones(shape.num_heads, device=inputs.device)
            extra = (ones, ones[: shape.num_kv_heads], ones[: shape.num_kv_heads])

        def run(copy: int) -> None:
            caches = (inputs.key_cache, inputs.value_cache)
            wrapper.run(inputs.queries[copy], caches, *extra, out=inputs.outs[copy])

        tolerance = FP8_TOLERANCE if shape.query_dtype == "fp8" else TOLERANCE
        return self._prepared(wrapper, "_paged_kv_indices_buf", pages, plan, run, tolerance)

    def _prepare_latent(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        mla = importlib.import_module("flashinfer.mla")
        wrapper = mla.BatchMLAPagedAttentionWrapper(self._workspace, backend="auto")
        indptr, pages, _ = _page_list(inputs, list(shape.seq_lens))
        rank = shape.value_size
        keys = inputs.key_cache[:, :, 0]

        def plan(copy: int) -> None:
            wrapper.plan(
                inputs.query_start_loc, indptr.to(inputs.device), pages[copy], inputs.seq_lens, shape.num_heads, rank,
                shape.head_size - rank, shape.block_size, True, shape.scale, torch.bfloat16, torch.bfloat16,
            )  # fmt: skip

        def run(copy: int) -> None:
            query = inputs.queries[copy]
            wrapper.run(query[..., :rank], query[..., rank:], keys[..., :rank], keys[..., rank:], out=inputs.outs[copy])

        return self._prepared(wrapper, "_kv_indices_buf", pages, plan, run)

    @staticmethod
    def _prepared(
        wrapper: Any,
        attribute: str,
        pages: Tensor,
        plan: Callable[[int], None],
        run: Callable[[int], None],
        tolerance: float = TOLERANCE,
    ) -> Prepared:
        """A plan depends on lengths alone, so all copies share it: only the list of pages changes between launches."""
        plan(0)
        if not hasattr(wrapper, attribute):
            raise AttributeError(f"this FlashInfer keeps its pages elsewhere than in {attribute}")

        def launch(copy: int) -> None:
            setattr(wrapper, attribute, pages[copy])
            run(copy)

        return Prepared(launch, plan, plans_on_host=True, tolerance=tolerance)


class VllmTriton:
    """vLLM's unified Triton attention, with the scratch and thresholds that its backend gives it under CUDA graphs."""

    SEGMENTS, LEAST_GRID, MOST_QUERIES_IN_SEGMENTS = 16, 128, 8

    def __init__(self) -> None:
        self._kernel = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
        self._modes = importlib.import_module("vllm.v1.kv_cache_interface").KVQuantMode
        self.name, self.version = "vLLM Triton", _version("vllm")

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape, device = inputs.shape, inputs.device
        require_cuda(inputs)
        require(shape.kind != "latent", "another kernel there")
        require(shape.cache_dtype != "int4", "its int4 is asymmetric and rotated")
        require(shape.query_dtype == "bf16", "no fp8 query with separate scales here")
        require(shape.scales != "head", "no scales per head")
        extra: dict[str, Any] = {"k_descale": None, "v_descale": None}
        if shape.scales == "tensor":
            require(shape.cache_dtype == "fp8", f"no {shape.cache_dtype} cache with one scale")
            assert inputs.k_scale is not None
            assert inputs.v_scale is not None
            every = (shape.batch, shape.num_kv_heads)
            extra = {"k_descale": inputs.k_scale.expand(every), "v_descale": inputs.v_scale.expand(every)}
            extra["kv_quant_mode"] = self._modes.FP8_PER_TENSOR
        elif shape.scales == "token":
            mode = "INT8" if shape.cache_dtype == "int8" else "FP8"
            extra |= {"k_scale_cache": inputs.k_scale, "v_scale_cache": inputs.v_scale}
            extra["kv_quant_mode"] = self._modes[f"{mode}_PER_TOKEN_HEAD"]
        threshold = self.LEAST_GRID // shape.num_kv_heads
        rows = (threshold * self.MOST_QUERIES_IN_SEGMENTS, shape.num_heads, self.SEGMENTS)
        padded = 1 << (shape.head_size - 1).bit_length()
        partial, largest, total = (torch.empty(s, device=device) for s in ((*rows, padded), rows, rows))

        def launch(copy: int) -> None:
            self._kernel(
                q=inputs.queries[copy], k=inputs.key_cache, v=inputs.value_cache, out=inputs.outs[copy],
                cu_seqlens_q=inputs.query_start_loc, max_seqlen_q=shape.max_query_len, seqused_k=inputs.seq_lens,
                max_seqlen_k=shape.max_seq_len, softmax_scale=shape.scale, causal=True,
                window_size=(-1, -1) if shape.sliding_window is None else (shape.sliding_window - 1, 0),
                block_table=inputs.block_tables[copy], softcap=shape.softcap or 0.0, q_descale=None,
                seq_threshold_3D=threshold, num_par_softmax_segments=self.SEGMENTS, softmax_segm_output=partial,
                softmax_segm_max=largest, softmax_segm_expsum=total, sinks=inputs.sinks, **extra,
            )  # fmt: skip

        return Prepared(launch)


class SGLangTriton:
    """SGLang's Triton backend: its split decode kernel, and its extend kernel for more than one query token."""

    MAX_SPLITS = 8  # its default

    def __init__(self) -> None:
        folder = "sglang.kernels.ops.attention."
        self._decode = importlib.import_module(folder + "decode_attention").decode_attention_fwd
        self._extend = importlib.import_module(folder + "extend_attention").extend_attention_fwd
        self._choose_splits = importlib.import_module(folder + "metadata").get_num_kv_splits_triton
        self.name, self.version = "SGLang Triton", _version("sglang")

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require_cuda(inputs)
        require(shape.cache_dtype in ("bf16", "fp8"), f"no {shape.cache_dtype} cache")
        require(shape.scales in ("none", "tensor"), f"no scales per {shape.scales}")
        require(shape.query_dtype == "bf16", "no fp8 queries")
        return self._prepare_extend(inputs) if shape.kind == "prefill" else self._prepare_decode(inputs)

    def _prepare_decode(self, inputs: AttentionInputs) -> Prepared:
        shape, device = inputs.shape, inputs.device
        window = shape.max_seq_len if shape.sliding_window is None else shape.sliding_window
        lengths = inputs.seq_lens.clamp(max=window)
        indptr = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
        ends = inputs.seq_lens.cumsum(0)
        first = torch.repeat_interleave(ends - lengths, lengths)  # of each listed token's sequence, in the slots
        chosen = first + torch.arange(int(indptr[-1]), device=device) - torch.repeat_interleave(indptr[:-1], lengths)
        indices = torch.stack([inputs.slots(copy)[chosen] for copy in range(inputs.copies)])
        rows = (shape.batch, shape.num_heads, self.MAX_SPLITS)
        partial, lse = torch.empty(*rows, shape.value_size, device=device), torch.empty(rows, device=device)
        splits = torch.empty(shape.batch, dtype=torch.int32, device=device)
        keys, values = inputs.key_cache.flatten(0, 1), inputs.value_cache.flatten(0, 1)
        properties = torch.cuda.get_device_properties(device)

        def plan(_: int) -> None:
            self._choose_splits[(1,)](
                splits, lengths, shape.batch, 1, shape.num_heads, shape.num_kv_heads, self.MAX_SPLITS,
                properties.multi_processor_count, MAX_NUM_SEQ=max(256, 1 << (shape.batch - 1).bit_length()),
            )  # fmt: skip

        plan(0)

        def launch(copy: int) -> None:
            self._decode(
                inputs.queries[copy], keys, values, inputs.outs[copy], indptr, indices[copy], partial, lse, splits,
                self.MAX_SPLITS, shape.scale, 1.0, 1.0, logit_cap=shape.softcap or 0.0, sinks=inputs.sinks,
                has_mla=shape.kind == "latent", use_pdl=properties.major >= 9,
            )  # fmt: skip

        if shape.cache_dtype == "fp8":  # it rounds queries and probabilities to the cache's dtype
            return Prepared(launch, plan, tolerance=FP8_TOLERANCE, note="fp8 query")
        return Prepared(launch, plan)

    def _prepare_extend(self, inputs: AttentionInputs) -> Prepared:
        """Its new tokens' keys and values are not paged: they are the step's own, side by side."""
        shape, device = inputs.shape, inputs.device
        new = torch.tensor(shape.query_lens, device=device)
        cached = inputs.seq_lens - new
        require(shape.sliding_window is None or not int(cached.max()), "windows over a prefix need its own cache")
        indptr = torch.cat((cached.new_zeros(1), cached.cumsum(0))).to(torch.int32)
        in_sequence = torch.cat([torch.arange(length, device=device) for length in shape.seq_lens])
        is_new = in_sequence >= torch.repeat_interleave(cached, inputs.seq_lens)
        prefixes, own = [], []
        for copy in range(inputs.copies):
            slots = inputs.slots(copy)
            prefixes.append(slots[~is_new])
            own.append([cache.flatten(0, 1)[slots[is_new]] for cache in (inputs.key_cache, inputs.value_cache)])
        keys, values = inputs.key_cache.flatten(0, 1), inputs.value_cache.flatten(0, 1)
        left = -1 if shape.sliding_window is None else shape.sliding_window - 1

        def launch(copy: int) -> None:
            self._extend(
                inputs.queries[copy], *own[copy], inputs.outs[copy], keys, values, inputs.query_start_loc, indptr,
                prefixes[copy], None, True, None, shape.max_query_len, 1.0, 1.0, sm_scale=shape.scale,
                logit_cap=shape.softcap or 0.0, sliding_window_size=left, sinks=inputs.sinks,
            )  # fmt: skip

        return Prepared(launch)


class FlashMLA:
    """FlashMLA's dense decode over a bf16 latent cache, as vLLM builds it."""

    def __init__(self) -> None:
        name = "vllm.third_party.flashmla.flash_mla_interface"
        self._interface = _module(name, "flash_mla.flash_mla_interface")
        self.name, self.version = "FlashMLA", _version(self._interface.__package__.partition(".")[0])

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require_cuda(inputs)
        require(shape.kind == "latent", "latent attention alone")
        require(shape.block_size == 64, "pages of 64 alone")
        metadata, _ = self._interface.get_mla_metadata()  # filled in by the first call

        def launch(copy: int) -> None:
            out, _ = self._interface.flash_mla_with_kvcache(
                inputs.queries[copy][:, None], inputs.key_cache, inputs.block_tables[copy], inputs.seq_lens,
                shape.value_size, metadata, softmax_scale=shape.scale, causal=True, out=inputs.outs[copy][:, None],
            )  # fmt: skip
            assert out.data_ptr() == inputs.outs[copy].data_ptr()

        return Prepared(launch)


class TorchAttention:
    """torch's scaled_dot_product_attention over keys and values that are gathered first: what needs no paged kernel."""

    def __init__(self) -> None:
        self.name, self.version = "torch SDPA", str(torch.__version__)

    def prepare(self, inputs: AttentionInputs) -> Prepared:
        shape = inputs.shape
        require(len(set(shape.seq_lens)) == 1 and len(set(shape.query_lens)) == 1, "one length alone, without padding")
        require(shape.cache_dtype == "bf16", "bf16 alone")
        require(shape.sliding_window is None and shape.softcap is None and not shape.sinks, "causal masks alone")
        require(shape.max_query_len in (1, shape.max_seq_len), "a query as long as the keys, or of one token")
        slots = [inputs.slots(copy) for copy in range(inputs.copies)]
        keys, values = inputs.key_cache.flatten(0, 1), inputs.value_cache.flatten(0, 1)
        sizes = (shape.batch, shape.max_query_len)

        def launch(copy: int) -> None:
            gathered = (c.index_select(0, slots[copy]).unflatten(0, (shape.batch, -1)) for c in (keys, values))
            key, value = (rows.transpose(1, 2) for rows in gathered)
            query = inputs.queries[copy].unflatten(0, sizes).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=shape.max_query_len > 1, scale=shape.scale, enable_gqa=True,
            )  # fmt: skip
            inputs.outs[copy].copy_(out.transpose(1, 2).flatten(0, 1))

        return Prepared(launch)


PEERS: dict[str, Callable[[], System]] = {
    "FA3": FlashAttention3,
    "FlashInfer": FlashInfer,
    "FlashInfer fa2": lambda: FlashInfer("fa2"),
    "vLLM Triton": VllmTriton,
    "SGLang Triton": SGLangTriton,
    "FlashMLA": FlashMLA,
    "torch SDPA": TorchAttention,
}


def load_peers(names: list[str]) -> tuple[list[System], dict[str, str]]:
    """The peers of these names that can be imported, and why the others cannot."""
    found, reasons = [], {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers: got {name!r}; must be all, none or some of {', '.join(PEERS)}")
        try:
            found.append(PEERS[name]())
        except Exception as error:  # noqa: BLE001 - whatever somebody's import raises
            reasons[name] = f"not importable: {first_line(error)}"
    return found, reasons
