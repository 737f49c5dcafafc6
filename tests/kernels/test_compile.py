"""Every kernel variant compiles for every chip that we name, within its shared memory. No GPU: Triton ships ptxas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedattn.kernels.tiling import AttentionTiling, choose_launch, choose_tiling, next_power_of_2
from tests.device import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter replaces the compiler; run without TRITON_INTERPRET=1"
)

# Most bytes of shared memory that a thread block may use, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


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


def attention_variants(dtype: torch.dtype) -> list[tuple[AttentionTiling, int, int, bool]]:
    """(tiling, head size, GQA group, windowed) of decode and prefill tiles of each head size class.

    With and without a window the half types, which compile to the same code but for the opcodes, take turns.
    """
    variants = []
    for head_size, group, windowed in (
        (64, 3, True),
        (128, 4, dtype != torch.bfloat16),
        (256, 2, dtype == torch.bfloat16),
    ):
        for max_query_len in (1, 512):
            tiling = choose_tiling(
                num_heads=group * 8,
                num_kv_heads=8,
                head_size=head_size,
                max_query_len=max_query_len,
                max_seq_len=8192,
                num_seqs=4,
                programs=264,
            )
            variants.append((tiling, head_size, group, windowed))
    return variants


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", TRITON_NAMES, ids=str)
def test_attention_compiles(capability: int, dtype: torch.dtype) -> None:
    from pagedattn.kernels.attention import paged_attention_kernel

    element = "*" + TRITON_NAMES[dtype]
    pointers = dict.fromkeys(("out_ptr", "query_ptr", "key_ptr", "value_ptr"), element)
    pointers |= dict.fromkeys(("lse_ptr", "partials_ptr"), "*fp32")
    pointers |= dict.fromkeys(("block_table_ptr", "items_ptr", "merges_ptr", "counts_ptr"), "*i32") | {
        "scale_log2": "fp32"
    }
    for tiling, head_size, group, windowed in attention_variants(dtype):
        launch = choose_launch(
            rows=tiling.rows, head_size=head_size, itemsize=dtype.itemsize, shared_memory=SHARED_MEMORY[capability]
        )
        constants = {
            "GROUP": group,
            "HEAD_DIM": head_size,
            "HEAD_DIM_PADDED": next_power_of_2(head_size),
            "BLOCK_SIZE": 16,
            "ROWS": tiling.rows,
            "QUERIES_PER_TILE": tiling.queries_per_tile,
            "BLOCK_N": launch.block_n,
            "CAUSAL": True,
            "HAS_WINDOW": windowed,
            "RETURN_LSE": windowed,
        }
        compile_kernel(
            paged_attention_kernel,
            capability,
            pointers,
            constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_other_kernels_compile(capability: int) -> None:
    from pagedattn.kernels.cache import append_kv_kernel
    from pagedattn.kernels.plan import plan_attention_kernel

    for has_window in (False, True):
        constants = {"QUERIES_PER_TILE": 4, "HAS_WINDOW": has_window, "MIN_CHUNK": 128, "CHUNK_ALIGNMENT": 128}
        pointers = {name: "*i32" for name in plan_attention_kernel.arg_names if name.endswith("_ptr")}
        compile_kernel(plan_attention_kernel, capability, pointers, {**constants, "NUM_LANES": 256}, num_warps=4)
    for element in ("*bf16", "*fp32"):
        pointers = {name: element for name in append_kv_kernel.arg_names if name.endswith("_ptr")}
        pointers |= {"cos_sin_ptr": "*fp32", "positions_ptr": "*i64", "slot_mapping_ptr": "*i64"}
        for rotary_dim in (0, 64, 128):
            constants = {
                "BLOCK_SIZE": 16,
                "NUM_HEADS": 32,
                "HEADS_PADDED": 32,
                "NUM_KV_HEADS": 8,
                "KV_HEADS_PADDED": 8,
                "HEAD_DIM": 128,
                "HEAD_DIM_V": 128,
                "HEAD_DIM_V_PADDED": 128,
                "ROTARY_DIM": rotary_dim,
                "PAIRS_PADDED": max(1, rotary_dim // 2),
                "REST_PADDED": next_power_of_2(max(1, 128 - rotary_dim)),
                "INTERLEAVED": rotary_dim == 64,
            }
            compile_kernel(append_kv_kernel, capability, pointers, constants, num_warps=4)
