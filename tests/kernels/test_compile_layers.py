"""The kernels around matrix products compile for every chip that we name. No GPU: Triton ships ptxas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_compile import SHARED_MEMORY, compile_gluon, compile_kernel, pytestmark, stack_bytes

__all__ = ["pytestmark"]

CAPABILITIES = (80, 90, 120)
assert set(CAPABILITIES) <= set(SHARED_MEMORY)


def pointers_of(kernel: Any, element: str, **others: str) -> dict[str, str]:
    return {name: element for name in kernel.arg_names if name.endswith("_ptr")} | others


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_layers_compile(capability: int, element: str) -> None:
    from pagedattn.kernels import layers

    overlap = {"OVERLAP": capability >= 90}
    options: dict[str, Any] = {"num_warps": 4, "launch_pdl": capability >= 90}
    for size in (576, 4096):
        for has_residual in (False, True):
            kernel = layers.rms_norm_kernel
            constants = {"SIZE": size, "BLOCK": 1 << (size - 1).bit_length(), "HAS_RESIDUAL": has_residual, **overlap}
            compile_kernel(kernel, capability, pointers_of(kernel, element, eps="fp32"), constants, **options)
    kernel = layers.silu_and_mul_kernel
    constants = {"SIZE": 1536, "BLOCK": 1024, **overlap}
    compile_kernel(kernel, capability, pointers_of(kernel, element), constants, **options)
    kernel = layers.query_key_norm_kernel
    constants = {"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "HEADS": 8, "QUERY_PROGRAMS": 2, "HEAD_DIM": 128}
    constants |= {"DIM_PADDED": 128, **overlap}
    compile_kernel(kernel, capability, pointers_of(kernel, element, eps="fp32"), constants, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_products_compile(capability: int, element: str) -> None:
    """Where a warp has outputs of its own, no thread waits for another but to hand out the results."""
    from pagedattn.kernels import linear

    kernel = linear.few_rows_linear_kernel
    for rows, outputs, size, gated in ((4, 576, 1536, False), (1, 14336, 4096, True)):
        cut = linear.choose_linear_launch(rows, outputs, size, gated)
        assert cut is not None
        constants = {"ROWS": cut.rows, "SIZE": size, "BLOCK_N": cut.block_n, "CHUNKS": cut.chunks, "LANES": cut.lanes}
        constants |= {"HAS_BIAS": not gated, "HAS_NORM": gated, "GATED": gated, "ADDS": not gated}
        compiled = compile_kernel(
            kernel,
            capability,
            pointers_of(kernel, element, eps="fp32"),
            {**constants, "OVERLAP": capability >= 90},
            num_warps=cut.num_warps,
            launch_pdl=capability >= 90,
        )
        if cut.lanes == linear.WARP_LANES and element == "*bf16":
            assert compiled.asm["ptx"].count("bar.sync") <= 2 * rows


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_invariant_products_compile(capability: int, element: str, tmp_path: Path) -> None:
    """Every tile that is chosen, with and without what joins; half types need no stack (on 10.0 some versions have a
    word of it, outside of the loop)."""
    from pagedattn.kernels import invariant_linear

    kernel = invariant_linear.invariant_linear_kernel
    itemsize = 4 if element == "*fp32" else 2
    for outputs, size, gated in ((960, 576, False), (4096, 4096, False), (128_256, 4096, False), (14_336, 4096, True)):
        cut = invariant_linear.choose_invariant_linear(outputs, gated, itemsize)
        constants = {"SIZE": size, "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
        constants |= {"HAS_BIAS": outputs == 960, "GATED": gated, "ADDS": outputs == 4096}
        compiled = compile_kernel(
            kernel,
            capability,
            pointers_of(kernel, element),
            {**constants, "OVERLAP": capability >= 90},
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            launch_pdl=capability >= 90,
        )
        if element == "*bf16" and capability != 100:
            assert stack_bytes(compiled, tmp_path / "kernel.cubin") == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("vocab_size", [259, 128_256])
def test_sampling_compiles(capability: int, element: str, vocab_size: int) -> None:
    from pagedattn.kernels import sampling

    cut = sampling.choose_sampling_launch(vocab_size)
    tiles = cut.num_tiles(vocab_size)
    options: dict[str, Any] = {"launch_pdl": capability >= 90}
    shared = {"NUM_TILES": tiles, "TILE": cut.tile, "OVERLAP": capability >= 90}
    pointers = {"sums_ptr": "*fp64", "integers_ptr": "*i32", "top_k_ptr": "*i32", "logits_ptr": element}
    kernel = sampling.summarize_tiles_kernel
    constants = {"GROUP": cut.group, "IN_FP32": sampling.IN_FP32, **shared}
    compile_kernel(
        kernel, capability, pointers_of(kernel, "*fp32", **pointers), constants, num_warps=cut.tile_warps, **options
    )
    kernel = sampling.choose_tokens_kernel
    pointers |= {"tokens_ptr": "*i64", "seed_ptr": "*i64", "position_ptr": "*i64", "copies_ptr": element}
    groups = -(-vocab_size // cut.group)
    constants = {
        "TILES_PADDED": 1 << (tiles - 1).bit_length(),
        "NUM_GROUPS": groups,
        "GROUPS_PADDED": 1 << (groups - 1).bit_length(),
        "CAPACITY": cut.capacity,
        "IN_FP32": sampling.IN_FP32,
        "SHIFT": 16 if element == "*bf16" else 0,
        "ALIGNED": vocab_size % 16 == 0,
        "GAMMA": sampling.GOLDEN_GAMMA,
        "FACTOR_A": sampling.MIX_FACTORS[0],
        "FACTOR_B": sampling.MIX_FACTORS[1],
        **shared,
    }
    compile_kernel(
        kernel, capability, pointers_of(kernel, "*fp32", **pointers), constants, num_warps=cut.row_warps, **options
    )


@pytest.mark.parametrize(
    ("rows", "outputs", "size", "gated"), [(128, 960, 576, False), (128, 1536, 576, True), (9, 576, 1536, False)]
)
def test_hopper_products_compile(rows: int, outputs: int, size: int, gated: bool, tmp_path: Path) -> None:
    """What a Llama of 135M parameters has, without spills."""
    from pagedattn.kernels import hopper_decode, hopper_linear

    cut = hopper_linear.choose_hopper_linear(rows, outputs, size, gated)
    assert cut is not None
    layout = hopper_decode.swizzled_layout(128, 16)
    pointers = {"out_ptr": "*bf16", "bias_ptr": "*bf16", "values_descriptor": f"tensordesc<bf16[64, 64],{layout!r}>"}
    pointers["weight_descriptor"] = f"tensordesc<bf16[{cut.block_n}, 64],{layout!r}>"
    constants = {"BLOCK_N": cut.block_n, "CHUNKS": cut.chunks, "STAGES": cut.stages}
    constants |= {"HAS_BIAS": not gated, "GATED": gated, "ADDS": not gated}
    compiled = compile_gluon(hopper_linear.hopper_linear_kernel, pointers, constants)
    assert compiled.metadata.shared <= SHARED_MEMORY[90]
    assert stack_bytes(compiled, tmp_path / "kernel.cubin") == 0
