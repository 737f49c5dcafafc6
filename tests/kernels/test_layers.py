"""Norms and the gated activation against fp64, at most twice as far from it as plain torch in the same dtype."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagedattn import layer_ops
from tests.device import DEVICE, DTYPES, IS_CUDA

EPS = 1e-5
FLOOR = 1e-7  # relative: what fp32 arithmetic leaves


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def exact_norm(values: Tensor, weight: Tensor) -> Tensor:
    values = values.double()
    return values * (values.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def assert_as_good_as(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Root mean square and largest error, at most twice those of ``plain``, which is of the same dtype."""
    assert ours.dtype == plain.dtype
    errors = [(found.double() - exact).abs() for found in (ours, plain)]
    floor = FLOOR * float(exact.abs().max())
    assert float(errors[0].max()) <= 2 * float(errors[1].max()) + floor
    assert float(errors[0].square().mean().sqrt()) <= 2 * float(errors[1].square().mean().sqrt()) + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (5, 64), (3, 1000), (2, 4096)])
def test_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    values, weight = draw(rows, size + 8, dtype=dtype, scale=3.0)[:, :size], draw(size, dtype=dtype, seed=1)
    plain = F.rms_norm(values, (size,), weight, EPS)
    assert_as_good_as(layer_ops.rms_norm(values, weight, EPS), plain, exact_norm(values, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (4, 200)])
def test_add_and_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    hidden, residual = draw(rows, size, dtype=dtype), draw(rows, size, dtype=dtype, seed=1, scale=5.0)
    weight = draw(size, dtype=dtype, seed=2)
    expected = residual + hidden
    normed = layer_ops.add_rms_norm(hidden, residual, weight, EPS)
    assert torch.equal(residual, expected)
    assert_as_good_as(normed, F.rms_norm(expected, (size,), weight, EPS), exact_norm(expected, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 2, 64), (7, 1, 24), (16, 8, 128)])
def test_query_key_norm(dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> None:
    """In place in fused rows, of which the values stay as they are."""
    rows = draw(5, heads + 2 * kv_heads, head_size, dtype=dtype, scale=2.0)
    before = rows.clone()
    weights = [draw(head_size, dtype=dtype, seed=seed) for seed in (1, 2)]
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
    layer_ops.query_key_norm(query, key, weights[0], weights[1], EPS)
    old_query, old_key, old_value = before.split([heads, kv_heads, kv_heads], dim=1)
    assert torch.equal(value, old_value)
    for ours, old, weight in ((query, old_query, weights[0]), (key, old_key, weights[1])):
        assert_as_good_as(ours, F.rms_norm(old, (head_size,), weight, EPS), exact_norm(old, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (3, 100), (0, 64)])
def test_gated_activation(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = draw(rows, 2 * size, dtype=dtype, scale=4.0)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    ours = layer_ops.silu_and_mul(gate_up)
    assert ours.shape == (rows, size)
    if rows:
        assert_as_good_as(ours, F.silu(gate) * up, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 5])
@pytest.mark.parametrize(("outputs", "size", "gated"), [(50, 576, False), (50, 576, True), (9, 2100, True)])
def test_norm_and_product(dtype: torch.dtype, rows: int, outputs: int, size: int, gated: bool) -> None:
    """From one row to more than one launch takes, with a bias where there is no gate."""
    values, norm_weight = draw(rows, size, dtype=dtype, scale=3.0), draw(size, dtype=dtype, seed=1)
    weight = draw(outputs * (2 if gated else 1), size, dtype=dtype, seed=2, scale=size**-0.5)
    bias = None if gated else draw(outputs, dtype=dtype, seed=3)
    ours = layer_ops.norm_linear(values, norm_weight, EPS, weight, bias, gated=gated)
    assert ours.shape == (rows, outputs)
    plain = F.linear(F.rms_norm(values, (size,), norm_weight, EPS), weight, bias)
    exact = F.linear(exact_norm(values, norm_weight), weight.double(), None if bias is None else bias.double())
    if gated:
        plain, exact = (F.silu(gate) * up for gate, up in (plain.chunk(2, -1), exact.chunk(2, -1)))
    if rows:
        assert_as_good_as(ours, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_added_to_the_residual(dtype: torch.dtype, rows: int, has_bias: bool) -> None:
    residual, values = draw(rows, 37, dtype=dtype, scale=4.0), draw(rows, 320, dtype=dtype, seed=1)
    weight = draw(37, 320, dtype=dtype, seed=2, scale=0.1)
    bias = draw(37, dtype=dtype, seed=3) if has_bias else None
    before = residual.clone()
    layer_ops.add_linear(residual, values, weight, bias)
    exact = before.double() + F.linear(values.double(), weight.double(), None if bias is None else bias.double())
    assert_as_good_as(residual, before + F.linear(values, weight, bias), exact)


def test_which_products_are_ours() -> None:
    """Few rows; a thread's weights fit its registers."""
    linear = pytest.importorskip("pagedattn.kernels.linear")
    for rows, is_ours in ((0, False), (1, True), (linear.FEW_ROWS, True), (linear.FEW_ROWS + 1, False)):
        assert (linear.choose_linear_launch(rows, 576, 1536, gated=False) is not None) == is_ours
    for rows, outputs, size, is_ours in (
        (1, 14336, 4096, True),  # bound by its bytes
        (2, 14336, 4096, False),  # bound by its arithmetic
        (4, 1536, 576, True),
        (1, 49152, 576, False),  # an output projection
    ):
        assert (linear.choose_linear_launch(rows, outputs, size, gated=True) is not None) == is_ours
    for rows, is_ours in ((1, True), (2, True), (3, False), (4, False)):  # as with 4 rows, which a graph pads 3 to
        assert (linear.choose_linear_launch(rows, 2048, 2048, gated=False) is not None) == is_ours
    for size in (64, 576, 1536, 4096, 14336):
        for gated in (False, True):
            cut = linear.choose_linear_launch(1, 512, size, gated)
            assert cut.lanes * cut.chunks >= size
            held = cut.block_n * cut.lanes * cut.chunks * (2 if gated else 1) // (32 * cut.num_warps)
            assert held <= 2 * linear.WEIGHTS_PER_THREAD


def test_extreme_gates() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    assert layer_ops.silu_and_mul(gate_up).tolist() == [[0.0, pytest.approx(0.0), 0.0, 200.0, 2e4]]


def arguments() -> dict[str, tuple[Any, ...]]:
    """A call of each op, without the weights' eps."""
    dtype = DTYPES[0]
    hidden, residual, weight = draw(4, 64, dtype=dtype), draw(4, 64, dtype=dtype, seed=1), draw(64, dtype=dtype, seed=2)
    query, key = draw(4, 2, 64, dtype=dtype), draw(4, 1, 64, dtype=dtype, seed=1)
    return {
        "rms_norm": (hidden, weight, EPS),
        "add_rms_norm": (hidden, residual, weight, EPS),
        "query_key_norm": (query, key, weight, weight, EPS),
        "silu_and_mul": (hidden,),
        "norm_linear": (hidden, weight, EPS, draw(10, 64, dtype=dtype, seed=3), draw(10, dtype=dtype), False),
        "add_linear": (residual, hidden, draw(64, 64, dtype=dtype, seed=3), None),
    }


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.pagedattn, name).default, arguments()[name])


@pytest.mark.parametrize("name", arguments())
def test_fullgraph_compile(name: str) -> None:
    op = getattr(torch.ops.pagedattn, name).default
    plain, compiled = arguments()[name], arguments()[name]
    expected = op(*plain)
    assert_equal(torch.compile(op, fullgraph=True, backend="aot_eager")(*compiled), expected)
    assert_equal(compiled, plain)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", arguments())
def test_cuda_graph(name: str) -> None:
    op = getattr(torch.ops.pagedattn, name).default
    given = arguments()[name]
    op(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*given)
    fresh = [argument * 0.5 if isinstance(argument, Tensor) else argument for argument in arguments()[name]]
    for old, new in zip(given, fresh, strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
    graph.replay()
    expected = op(*fresh)
    assert_equal(captured, expected)
    assert_equal(list(given), fresh)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: layer_ops.rms_norm(x[0], w, EPS), "values: got float32 [64] on"),
        (lambda x, w: layer_ops.rms_norm(x, w[:8], EPS), "weight: got float32 [8] on"),
        (lambda x, w: layer_ops.rms_norm(x.t(), w[:4], EPS), "values: got (1, 64); must be contiguous"),
        (lambda x, w: layer_ops.add_rms_norm(x[:2], x, w, EPS), "hidden: got float32 [2, 64] on"),
        (lambda x, w: layer_ops.silu_and_mul(x[:, :63]), "gate_up: got float32 [4, 63] on"),
        (lambda x, w: layer_ops.silu_and_mul(x.int()), "gate_up: got int32 [4, 64] on"),
        (lambda x, w: layer_ops.query_key_norm(x[:, None], x[:, None, :32], w, w, EPS), "key: got float32 [4, 1, 32]"),
        (lambda x, w: layer_ops.query_key_norm(x[:, None], x[:, None], w, w[1:], EPS), "key_weight: got float32 [63]"),
        (lambda x, w: layer_ops.norm_linear(x, w, EPS, x[:, :8]), "weight: got float32 [4, 8] on"),
        (lambda x, w: layer_ops.norm_linear(x, w, EPS, x, w[:4], gated=True), "gated: got True"),
        (lambda x, w: layer_ops.norm_linear(x, w[1:], EPS, x), "norm_weight: got float32 [63] on"),
        (lambda x, w: layer_ops.add_linear(x, x, x), "residual: got float32 [4, 64] on"),
        (lambda x, w: layer_ops.add_linear(x[:, :4], x, x, w), "bias: got float32 [64] on"),
        (lambda x, w: layer_ops.rms_norm(x, w.requires_grad_(), EPS), "weight: requires grad"),
    ],
)
def test_errors_name_the_argument(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(4, 64, device=DEVICE), torch.zeros(64, device=DEVICE))


def test_types_are_checked() -> None:
    bad: Any = [1.0]
    with pytest.raises(TypeError, match=re.escape("gate_up: got list; must be a torch.Tensor")):
        layer_ops.silu_and_mul(bad)
