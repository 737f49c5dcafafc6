"""Every kernel variant compiles for every chip that we name, within its shared memory. No GPU: Triton ships ptxas."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedattn.kernels.quantization import HEAD_SCALE, NO_SCALE, TENSOR_SCALE, TOKEN_SCALE
from pagedattn.kernels.tiling import (
    CHUNK_ALIGNMENT,
    FINE_CHUNK,
    HOPPER_HALF_SHARED_MEMORY,
    ITEM_FIELDS,
    MIN_CHUNK,
    MIN_SHARE,
    SHARE_UNIT,
    CacheRows,
    choose_hopper_decode,
    choose_hopper_prefill,
    choose_launch,
    choose_tiling,
)
from tests.device import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter replaces the compiler; run without TRITON_INTERPRET=1"
)

# Most bytes of shared memory that a thread block may use, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8"}
TRITON_NAMES |= {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}


def compile_kernel(
    kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """Compile with the argument properties that a launch on ordinary tensors specializes on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.startswith("stride")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    return compiled


@dataclass(frozen=True)
class Variant:
    """What of the attention kernel is compiled, beside its tile."""

    head: tuple[int, int] = (128, 128)
    group: int = 4
    cache: torch.dtype | None = None
    scale: int = NO_SCALE
    mask: str = "causal"
    features: tuple[str, ...] = ()
    batch_invariant: bool = False


VARIANTS = {
    torch.bfloat16: (
        Variant(),
        Variant((64, 64), 3, features=("HAS_WINDOW", "RETURN_LSE")),
        Variant((256, 256), 2, features=("HAS_SOFTCAP", "HAS_WINDOW")),
        Variant((576, 512), 128, mask="full"),
        Variant((512, 512), 8, features=("HAS_SINKS",)),
        Variant(cache=torch.float8_e4m3fn, scale=HEAD_SCALE),
        Variant(cache=torch.uint8, scale=TOKEN_SCALE),
        Variant((64, 64), 8, mask="tree", features=("HAS_CHUNK", "HAS_ALIBI", "HAS_SINKS", "HAS_SOFTCAP")),
        Variant(batch_invariant=True),
    ),
    torch.float16: (
        Variant(features=("HAS_WINDOW",)),
        Variant((576, 512), 16, torch.float8_e5m2, TENSOR_SCALE),
        Variant((256, 256), 4, torch.int8, TOKEN_SCALE, batch_invariant=True),
        Variant((256, 256), 4, torch.uint8, HEAD_SCALE, features=("HAS_ALIBI",)),
    ),
    torch.float32: (
        Variant(),
        Variant((64, 64), 3, features=("HAS_WINDOW", "RETURN_LSE")),
        Variant((256, 256), 2, mask="tree"),
        Variant((512, 512), 4, torch.float8_e4m3fn, TOKEN_SCALE, batch_invariant=True),
        Variant((576, 512), 16),
    ),
}
FLAGS = ("HAS_WINDOW", "HAS_CHUNK", "HAS_SOFTCAP", "HAS_ALIBI", "HAS_SINKS", "RETURN_LSE")


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", VARIANTS, ids=str)
def test_attention_compiles(capability: int, dtype: torch.dtype) -> None:
    from pagedattn.kernels.attention import HeadSizes, paged_attention_kernel

    for number, variant in enumerate(VARIANTS[dtype]):
        for max_query_len in (1, 512):
            if capability not in (80, 90) and (number + (max_query_len > 1)) % 2:
                continue  # the other chips take turns with decodes and prefills
            heads = HeadSizes.of(*variant.head, variant.cache == torch.uint8)
            compile_attention(paged_attention_kernel, heads, capability, dtype, variant, max_query_len)


def compile_attention(
    kernel: Any, heads: Any, capability: int, dtype: torch.dtype, variant: Variant, max_query_len: int
) -> None:
    tiling = choose_tiling(
        num_heads=variant.group * 2,
        num_kv_heads=2,
        head_size=variant.head[0],
        head_size_v=variant.head[1],
        max_query_len=max_query_len,
        max_seq_len=8192,
        num_seqs=4,
        multiprocessors=132,
        shared_memory=SHARED_MEMORY[capability],
        batch_invariant=variant.batch_invariant,
    )
    cache = variant.cache or dtype
    launch = choose_launch(
        rows=tiling.rows,
        head_size=variant.head[0],
        head_size_v=variant.head[1],
        itemsize=dtype.itemsize,
        cache_itemsize=0.5 if cache == torch.uint8 else cache.itemsize,
        shared_memory=SHARED_MEMORY[capability],
    )
    bits = cache == torch.float8_e4m3fn and capability < 89
    stored = "*u8" if bits or cache == torch.uint8 else "*" + TRITON_NAMES[cache]
    pointers = dict.fromkeys(("out_ptr", "query_ptr"), "*" + TRITON_NAMES[dtype])
    pointers |= dict.fromkeys(("key_ptr", "value_ptr"), stored)
    pointers |= dict.fromkeys(("lse_ptr", "partials_ptr", "alibi_slopes_ptr", "sinks_ptr"), "*fp32")
    pointers |= dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32") | {"tree_mask_ptr": "*u8"}
    names = ("block_table_ptr", "items_ptr", "counts_ptr")
    pointers |= dict.fromkeys(names, "*i32") | dict.fromkeys(("logit_scale", "softcap_log2"), "fp32")
    constants = {flag: flag in variant.features for flag in FLAGS} | {
        "GROUP": variant.group,
        "HEADS": tiling.heads_per_tile,
        "KEY_DIM": heads.key,
        "KEY_PADDED": heads.key_padded,
        "KEY_REST": heads.key_rest,
        "VALUE_DIM": heads.value,
        "VALUE_PADDED": heads.value_padded,
        "FORMAT": "e4m3 bits" if bits else "int4" if cache == torch.uint8 else "cast",
        "QUERY_FORMAT": "cast",
        "Q_SCALE": NO_SCALE,
        "K_SCALE": variant.scale,
        "V_SCALE": variant.scale,
        "BLOCK_SIZE": 16,
        "ROWS": tiling.rows,
        "QUERIES_PER_TILE": tiling.queries_per_tile,
        "BLOCK_N": launch.block_n,
        "CAUSAL": variant.mask == "causal",
        "HAS_TREE": variant.mask == "tree",
        "BATCH_INVARIANT": variant.batch_invariant,
        "WALKS": tiling.workers > 0,
        "FIELDS": ITEM_FIELDS,
    }
    compile_kernel(
        kernel, capability, pointers, constants,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


HOPPER_VARIANTS = (
    Variant(),
    Variant((64, 64), 8, features=("HAS_WINDOW", "HAS_SINKS", "RETURN_LSE")),
    Variant((256, 256), 6, mask="full", features=("HAS_SOFTCAP", "HAS_ALIBI", "HAS_CHUNK")),
    Variant(cache=torch.float8_e4m3fn, scale=HEAD_SCALE),
    Variant((64, 64), 3, cache=torch.float8_e5m2, scale=TENSOR_SCALE),
    Variant(cache=torch.int8, scale=TOKEN_SCALE),
    Variant(cache=torch.uint8, scale=TOKEN_SCALE),
    Variant(batch_invariant=True),
    Variant((64, 64), 8, features=("HAS_WINDOW", "HAS_SINKS", "RETURN_LSE"), batch_invariant=True),
    Variant((256, 256), 6, features=("HAS_SOFTCAP",), batch_invariant=True),
    Variant(cache=torch.float8_e4m3fn, scale=HEAD_SCALE, batch_invariant=True),
    Variant(cache=torch.uint8, scale=TOKEN_SCALE, batch_invariant=True),
)


def compile_gluon(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """As ``compile_kernel``, for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.startswith("stride")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "launch_pdl": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(compiled: Any, path: Path) -> int:
    """What a thread keeps in memory for want of registers."""
    import triton

    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", report))


@pytest.mark.parametrize("variant", HOPPER_VARIANTS, ids=str)
@pytest.mark.parametrize("max_query_len", [1, 4])
def test_hopper_decode_compiles(variant: Variant, max_query_len: int, tmp_path: Path) -> None:
    from pagedattn.kernels import hopper_decode

    head_size, cache = variant.head[0], variant.cache or torch.bfloat16
    itemsize = 0.5 if cache == torch.uint8 else cache.itemsize
    stored = int(head_size * itemsize) // cache.itemsize
    rows = CacheRows.of((100, 16, 2, stored), (32 * stored, 2 * stored, stored, 1), cache.itemsize)
    tiling = choose_tiling(
        num_heads=variant.group * 2,
        num_kv_heads=2,
        head_size=head_size,
        head_size_v=head_size,
        max_query_len=max_query_len,
        max_seq_len=8192,
        num_seqs=4,
        multiprocessors=132,
        batch_invariant=variant.batch_invariant,
    )
    launch = choose_hopper_decode(
        tiling=tiling,
        head_size=head_size,
        head_size_v=head_size,
        cache_itemsize=itemsize,
        block_size=16,
        key_rows=rows,
        value_rows=rows,
    )
    assert launch is not None
    kernel = hopper_decode.hopper_decode_kernel
    constants = {flag: flag in variant.features for flag in FLAGS} | {
        "GROUP": variant.group,
        "HEADS": tiling.heads_per_tile,
        "HEAD_DIM": head_size,
        "COLUMNS": launch.columns,
        "QUERIES_PER_TILE": tiling.slot_rows // tiling.heads_per_tile,
        "BLOCK_SIZE": 16,
        "PAGE": launch.page,
        "BLOCK_N": launch.block_n,
        "SLOTS": launch.slots,
        "SLOT_ROWS": launch.slot_rows,
        "STAGES": launch.stages,
        "SAME_ROWS": True,
        "CAUSAL": variant.mask == "causal",
        "FORMAT": hopper_decode.FORMATS.get(cache, "same"),
        "K_SCALE": variant.scale,
        "V_SCALE": variant.scale,
        "FIELDS": ITEM_FIELDS,
        "BATCH_INVARIANT": variant.batch_invariant,
    }
    layout = hopper_decode.swizzled_layout(stored * cache.itemsize, cache.itemsize * 8)
    element = "u8" if cache == torch.uint8 else TRITON_NAMES[cache]
    descriptor = f"tensordesc<{element}[{launch.page}, {stored}],{layout!r}>"
    pointers = dict.fromkeys(("block_table_ptr", "items_ptr", "counts_ptr"), "*i32")
    pointers |= {"out_ptr": "*bf16", "query_ptr": "*bf16", "logit_scale": "fp32", "softcap_log2": "fp32"}
    pointers |= {"key_descriptor": descriptor, "value_descriptor": descriptor}
    options = {} if launch.max_registers is None else {"maxnreg": launch.max_registers}
    compiled = compile_gluon(kernel, pointers, constants, enable_fp_fusion=not variant.batch_invariant, **options)
    available = HOPPER_HALF_SHARED_MEMORY if head_size <= 128 else SHARED_MEMORY[90]
    assert compiled.metadata.shared <= available
    if variant.batch_invariant:  # what is spilled is read between items and chunks, little of it for each tile
        most = {"same": 0, "float8": 64, "int4": 160}[str(constants["FORMAT"])] if head_size <= 128 else 128
        assert stack_bytes(compiled, tmp_path / "kernel.cubin") <= most


PREFILL_VARIANTS = (
    Variant(),
    Variant((64, 64), 3, features=("HAS_WINDOW", "HAS_SINKS", "RETURN_LSE")),
    Variant((256, 256), 2, features=("HAS_SOFTCAP",)),
    Variant((128, 128), 7, mask="full", features=("HAS_ALIBI", "HAS_CHUNK")),
)


@pytest.mark.parametrize("variant", PREFILL_VARIANTS, ids=str)
def test_hopper_prefill_compiles(variant: Variant, tmp_path: Path) -> None:
    from pagedattn.kernels import hopper_decode, hopper_prefill

    head_size = variant.head[0]
    rows = CacheRows.of((100, 16, 2, head_size), (32 * head_size, 2 * head_size, head_size, 1), 2)
    tiling = choose_tiling(
        num_heads=variant.group * 2,
        num_kv_heads=2,
        head_size=head_size,
        head_size_v=head_size,
        max_query_len=512,
        max_seq_len=8192,
        num_seqs=4,
        multiprocessors=132,
        shared_memory=SHARED_MEMORY[90],
    )
    launch = choose_hopper_prefill(
        tiling=tiling,
        head_size=head_size,
        head_size_v=head_size,
        block_size=16,
        key_rows=rows,
        value_rows=rows,
        multiprocessors=132,
    )
    assert launch is not None
    kernel = hopper_prefill.hopper_prefill_kernel
    constants = {flag: flag in variant.features for flag in FLAGS} | {
        "GROUP": variant.group,
        "HEADS": tiling.heads_per_tile,
        "HEAD_DIM": head_size,
        "ROWS": tiling.rows,
        "QUERIES_PER_TILE": tiling.queries_per_tile,
        "BLOCK_SIZE": 16,
        "PAGE": launch.page,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "QUERY_TILES": launch.query_tiles,
        "SAME_ROWS": True,
        "CAUSAL": variant.mask == "causal",
        "OUT_MULTIPLE": hopper_prefill.VECTOR,
        "FIELDS": ITEM_FIELDS,
    }
    layout = hopper_decode.swizzled_layout(head_size * 2, 16)
    descriptor = f"tensordesc<bf16[{launch.page}, {head_size}],{layout!r}>"
    pointers = dict.fromkeys(("block_table_ptr", "items_ptr", "counts_ptr"), "*i32")
    pointers |= {"out_ptr": "*bf16", "query_ptr": "*bf16", "logit_scale": "fp32", "softcap_log2": "fp32"}
    pointers |= {"key_descriptor": descriptor, "value_descriptor": descriptor}
    compiled = compile_gluon(kernel, pointers, constants)
    assert compiled.metadata.shared <= SHARED_MEMORY[90]
    stores = set(re.findall(r"st\.global\.\S*(?:b16|b32|b64)\b", compiled.asm["ptx"]))
    assert "st.global.v4.b32" in stores, stores
    assert not any(store.endswith("b16") for store in stores), stores  # results leave 16 bytes at a time
    # Parameters may wait in memory for the end of a unit; what the loop over keys needs would be more than this.
    assert stack_bytes(compiled, tmp_path / "kernel.cubin") <= (64 if head_size <= 128 else 192)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_other_kernels_compile(capability: int) -> None:
    from pagedattn.kernels.cache import append_kv_kernel
    from pagedattn.kernels.copy import copy_blocks_kernel
    from pagedattn.kernels.plan import plan_items_kernel, plan_walks_kernel

    for has_window in (False, True):
        shared: dict[str, Any] = {"HAS_WINDOW": has_window, "FIELDS": ITEM_FIELDS, "NUM_LANES": 256}
        unit = FINE_CHUNK if has_window else SHARE_UNIT
        walks = {"MIN_UNITS": MIN_SHARE // unit, "UNIT": unit, "BATCH_INVARIANT": has_window}
        items = {"QUERIES_PER_TILE": 4, "BATCH_INVARIANT": has_window, "SORTED": True, "MIN_CHUNK": MIN_CHUNK}
        items["CHUNK_ALIGNMENT"] = CHUNK_ALIGNMENT
        for kernel, constants in ((plan_walks_kernel, walks), (plan_items_kernel, items)):
            pointers = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
            compile_kernel(kernel, capability, pointers, {**constants, **shared}, num_warps=4)
    pointers = {name: "*i16" for name in copy_blocks_kernel.arg_names if name.endswith("_ptr")}
    copy_constants = {"SLOTS": 16, "HEADS": 8, "KEY_DIM": 128, "VALUE_DIM": 72, "CHUNK": 4096}
    compile_kernel(
        copy_blocks_kernel, capability, pointers | {"block_mapping_ptr": "*i64"}, copy_constants, num_warps=4
    )
    for element in ("*bf16", "*fp32"):
        for rotary_dim, cache_format in ((0, "cast"), (64, "e4m3"), (128, "int4"), (128, "cast"), (64, "int8")):
            stored = {"cast": element, "int8": "*i8"}.get(cache_format, "*u8")
            pointers = {name: element for name in append_kv_kernel.arg_names if name.endswith("_ptr")}
            pointers |= {"cos_sin_ptr": "*fp32", "positions_ptr": "*i64", "slot_mapping_ptr": "*i64"}
            pointers |= {
                "key_cache_ptr": stored,
                "value_cache_ptr": stored,
                "k_scale_ptr": "*fp32",
                "v_scale_ptr": "*fp32",
            }
            append_constants: dict[str, Any] = {
                "BLOCK_SIZE": 16,
                "NUM_HEADS": 32,
                "HEADS": 8,
                "NUM_KV_HEADS": 8,
                "KV_HEADS": 8,
                "KV_PROGRAMS": 1,
                "HEAD_DIM": 128,
                "KEY_PADDED": 128,
                "HEAD_DIM_V": 128,
                "VALUE_PADDED": 128,
                "ROTARY_DIM": rotary_dim,
                "PAIRS_PADDED": max(1, rotary_dim // 2),
                "INTERLEAVED": rotary_dim == 64,
                "FORMAT": cache_format,
                "LARGEST": 7.0,
                "K_SCALE": TOKEN_SCALE if cache_format != "cast" else NO_SCALE,
                "V_SCALE": HEAD_SCALE if cache_format != "cast" else NO_SCALE,
                "OVERLAP": capability >= 90,
            }
            compiled = compile_kernel(
                append_kv_kernel, capability, pointers, append_constants, num_warps=4, enable_fp_fusion=False
            )
            if cache_format == "cast":
                # A program only waits for memory: each thread keeps what it loads, and loads 16 bytes at a time.
                loads = set(re.findall(r"ld\.global\.\S+", compiled.asm["ptx"]))
                assert loads <= {"ld.global.v4.b32", "ld.global.v2.b32", "ld.global.b64"}, loads
                assert compiled.metadata.shared == 0


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_batch_state_compiles(capability: int) -> None:
    from pagedattn.kernels import batch_state

    long = {"input_ids_ptr", "positions_ptr", "slot_mapping_ptr", "seed_ptr", "position_ptr"}
    floats = {"temperature_ptr", "top_p_ptr", "min_p_ptr"}
    for is_decode in (False, True):
        flags = {"HAS_TOKEN_IDS": not is_decode, "HAS_SAMPLE_ROWS": not is_decode}
        for kernel, constants in (
            (batch_state.update_words_kernel, {"CHUNK": 1024}),
            (batch_state.move_rows_kernel, {"NUM_FIELDS": 10, "NUM_GROUPS": 2, "CHUNK": 1024}),
            (batch_state.prepare_inputs_kernel, {"BLOCK_SIZE": 16, "NUM_GROUPS": 2, "CHUNK": 32, **flags}),
            (batch_state.accept_tokens_kernel, {"HAS_SAMPLE_ROWS": not is_decode, "CHUNK": 256}),
        ):
            pointers = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
            is_prepared = kernel is batch_state.prepare_inputs_kernel
            pointers |= dict.fromkeys(long if is_prepared else {"token_ids_ptr"} & pointers.keys(), "*i64")
            pointers |= dict.fromkeys(floats if is_prepared else set(), "*fp32")
            names = {name for name in kernel.arg_names if name in constants}
            compile_kernel(
                kernel,
                capability,
                pointers,
                {name: constants[name] for name in names},
                num_warps=1 if is_prepared else 4,
            )
