"""Batch-invariant products: a row's bits are its own, at every place and among any number of rows; and against fp64."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pagedattn import layer_ops
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_CUDA, SANITIZED
from tests.kernels.test_layers import EPS, assert_as_good_as, draw, exact_norm

NUM_ROWS = 130
COUNTS = (1, 5, 64, 130)
# [outputs, columns]: whole tiles and blocks, and none.
SHAPES = (
    [(96, 64), (77, 203)]
    if INTERPRETED or SANITIZED
    else [(96, 64), (77, 203), (4, 203), (1, 90), (960, 576), (2101, 72), (50, 4096)]
)


class Products:
    """Each form of product on rows of the same values."""

    def __init__(self, outputs: int, size: int, dtype: torch.dtype) -> None:
        self.values, self.norm_weight = draw(NUM_ROWS, size, dtype=dtype, scale=3.0), draw(size, dtype=dtype, seed=1)
        self.weight = draw(2 * outputs, size, dtype=dtype, seed=2, scale=size**-0.5)
        self.bias = draw(2 * outputs, dtype=dtype, seed=3)
        self.residual = draw(NUM_ROWS, 2 * outputs, dtype=dtype, seed=4, scale=4.0)

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        values, norm = self.values[rows], (self.norm_weight, EPS)
        added, added_with_bias = self.residual[rows], self.residual[rows]
        layer_ops.add_linear(added, values, self.weight, batch_invariant=True)
        layer_ops.add_linear(added_with_bias, values, self.weight, self.bias, batch_invariant=True)
        return {
            "plain": layer_ops.norm_linear(values, *norm, self.weight, batch_invariant=True),
            "bias": layer_ops.norm_linear(values, *norm, self.weight, self.bias, batch_invariant=True),
            "gated": layer_ops.norm_linear(values, *norm, self.weight, gated=True, batch_invariant=True),
            "added": added,
            "added with bias": added_with_bias,
        }

    def plain(self, *, exactly: bool) -> dict[str, Tensor]:
        """By torch, in fp64 or in the operands' dtype."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.double() if exactly else tensor

        values, weight, bias, residual = map(cast, (self.values, self.weight, self.bias, self.residual))
        normed = exact_norm(self.values, self.norm_weight)
        if not exactly:
            normed = F.rms_norm(self.values, self.norm_weight.shape, self.norm_weight, EPS)
        gate, up = F.linear(normed, weight).chunk(2, -1)
        return {
            "plain": F.linear(normed, weight),
            "bias": F.linear(normed, weight, bias),
            "gated": F.silu(gate) * up,
            "added": residual + F.linear(values, weight),
            "added with bias": residual + F.linear(values, weight, bias),
        }


@pytest.fixture(params=[1] if IS_CUDA or INTERPRETED else [1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of torch on the CPU: three cut a tensor in the middle of a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "size"), SHAPES)
def test_neither_other_rows_nor_the_place_among_them_show(outputs: int, size: int, dtype: torch.dtype) -> None:
    products = Products(outputs, size, dtype)
    generator = torch.Generator().manual_seed(0)
    everything = products.of(torch.arange(NUM_ROWS, device=DEVICE))
    for count in COUNTS:
        rows = torch.randperm(NUM_ROWS, generator=generator)[:count].to(DEVICE)
        for name, found in products.of(rows).items():
            assert torch.equal(found, everything[name][rows]), f"{name}, {count} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "size"), SHAPES)
def test_as_near_to_fp64_as_torch(outputs: int, size: int, dtype: torch.dtype) -> None:
    products = Products(outputs, size, dtype)
    exact, plain = products.plain(exactly=True), products.plain(exactly=False)
    for name, found in products.of(torch.arange(NUM_ROWS, device=DEVICE)).items():
        assert_as_good_as(found, plain[name], exact[name])


@pytest.mark.skipif(IS_CUDA or INTERPRETED, reason="of torch's functions on a CPU")
def test_torch_functions_do_not_tell_where_an_element_lies() -> None:
    """What the CPU's batch-invariant path calls computes a tensor's end as it does its middle. ``F.silu`` does not."""
    from pagedattn.kernels.attention_reference import merge_states
    from pagedattn.kernels.invariant_linear_reference import silu

    values = draw(4096, dtype=torch.float32, scale=3.0)
    part, lse = draw(4096, 8, dtype=torch.float32, seed=1), draw(4096, dtype=torch.float32, seed=2)
    gated, merged = silu(values), merge_states(part, values, part, lse)
    for first in range(0, 2000, 7):
        some = slice(first, first + 1 + first % 67)
        assert torch.equal(silu(values[some].clone()), gated[some])
        ours = merge_states(part[some], values[some].clone(), part[some], lse[some].clone())
        for found, expected in zip(ours, merged, strict=True):
            assert torch.equal(found, expected[some])


def test_no_rows() -> None:
    values, weight = draw(0, 64, dtype=torch.float32), draw(10, 64, dtype=torch.float32)
    assert layer_ops.norm_linear(values, weight[0], EPS, weight, batch_invariant=True).shape == (0, 10)
    layer_ops.add_linear(draw(0, 10, dtype=torch.float32), values, weight, batch_invariant=True)


def test_opcheck() -> None:
    values, weight = draw(4, 64, dtype=DTYPES[0]), draw(10, 64, dtype=DTYPES[0], seed=1)
    ops = torch.ops.pagedattn
    torch.library.opcheck(ops.norm_linear.default, (values, weight[0].clone(), EPS, weight, None, True, True))
    torch.library.opcheck(ops.add_linear.default, (draw(4, 10, dtype=DTYPES[0]), values, weight, None, True))


def test_the_cut_is_the_weights_own() -> None:
    """Rows are not among what it is chosen by; few outputs are spread over many programs."""
    choose = pytest.importorskip("pagedattn.kernels.invariant_linear").choose_invariant_linear
    assert set(inspect.signature(choose).parameters) == {"num_outputs", "gated", "itemsize"}
    assert [choose(outputs, False, 2).block_n for outputs in (576, 4096, 8192, 128_256)] == [32, 64, 128, 128]
    assert [choose(outputs, True, 2).block_n for outputs in (1536, 14_336)] == [32, 64]
    assert [choose(outputs, True, 4).block_n for outputs in (1536, 14_336)] == [32, 32]


def test_the_mode_is_a_bool() -> None:
    values = draw(2, 64, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^batch_invariant: "):
        layer_ops.norm_linear(values, values[0], EPS, values, batch_invariant=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^batch_invariant: "):
        layer_ops.add_linear(values, values, values[:1], batch_invariant=1)  # type: ignore[arg-type]
