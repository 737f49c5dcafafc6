"""The Hopper kernel for small products: who is served, and results on a CPU and on the chip against fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedattn import layer_ops
from tests.device import DEVICE, INTERPRETED, IS_HOPPER
from tests.kernels.gluon_interpreter import InterpretedLauncher, MatrixDescriptor

hopper_linear = pytest.importorskip("pagedattn.kernels.hopper_linear")
choose = hopper_linear.choose_hopper_linear


def test_who_is_served() -> None:
    assert choose(128, 960, 576, False).programs == (60, 2)
    assert choose(128, 1536, 576, True) == hopper_linear.HopperLinearLaunch(32, 9, 9, (48, 2))
    assert choose(5, 576, 1536, False) == hopper_linear.HopperLinearLaunch(16, 24, 22, (36, 1))
    assert choose(0, 960, 576, False) is None
    assert choose(129, 960, 576, False) is None
    assert choose(64, 960, 572, False) is None  # rows that are not aligned
    assert choose(64, 49152, 576, False) is None  # bound by bytes


def test_launch_fits() -> None:
    for rows in (1, 64, 65, 128):
        for outputs in (16, 50, 576, 1000):
            for size in (8, 64, 576, 1536, 2048):
                for matrices in (1, 2):
                    cut = choose(rows, outputs, size, matrices == 2)
                    assert cut.stages * (64 + matrices * cut.block_n) * 64 * 2 + 1024 <= 232_448
                    assert 1 <= cut.stages <= cut.chunks
                    assert cut.programs[0] * cut.block_n >= outputs
                    assert cut.programs[1] * 64 >= rows


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]


def draw_operands(number: int, device: torch.device | str) -> Operands:
    """Values, weight, bias, what it is added to, and whether it is gated."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    rows, size = draw.choice([5, 17, 64, 65, 100, 128]), draw.choice([8, 64, 72, 576, 1536])
    gated, outputs = draw.random() < 0.4, draw.choice([8, 50, 96, 130, 576])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    values = normal(rows, size + draw.choice([0, 16]))[:, :size]
    weight = normal(outputs * (2 if gated else 1), size) / 8
    bias = normal(outputs) if not gated and draw.random() < 0.4 else None
    residual = normal(rows, outputs) if not gated and draw.random() < 0.5 else None
    return values, weight, bias, residual, gated


def exact(values: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool) -> Tensor:
    result = values.double() @ weight.double().T
    if gated:
        gate, through = result.chunk(2, 1)
        return torch.nn.functional.silu(gate) * through
    for term in (bias, residual):
        if term is not None:
            result += term.double()
    return result


def check(out: Tensor, operands: Operands) -> None:
    """Rounded once, behind sums in fp32."""
    expected = exact(*operands)
    ulp = torch.finfo(out.dtype).eps
    scale = operands[0].double().norm(dim=1, keepdim=True) * operands[1].double().norm(dim=1).max()
    allowed = 0.51 * ulp * expected.abs() + 2e-6 * scale * (1 + (scale if operands[4] else 0))
    assert ((out.double() - expected).abs() <= allowed).all()


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter replaces the jit functions")
@pytest.mark.parametrize("number", range(16))
def test_drawn_on_a_cpu(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = values, weight, bias, residual, gated = draw_operands(number, "cpu")
    described = hopper_linear.Descriptors(MatrixDescriptor(values), MatrixDescriptor(weight))
    monkeypatch.setattr(hopper_linear, "describe", lambda *_: described)
    launcher = InterpretedLauncher(hopper_linear.hopper_linear_kernel)
    monkeypatch.setattr(hopper_linear, "launch_hopper_linear", launcher)
    outputs = weight.shape[0] // (2 if gated else 1)
    cut = choose(values.shape[0], outputs, values.shape[1], gated)
    out = (
        torch.full((values.shape[0], outputs), torch.nan, dtype=values.dtype) if residual is None else residual.clone()
    )
    hopper_linear.hopper_linear(cut, out, values, weight, bias, gated, residual is not None)
    check(out, operands)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for compute capability 9")
@pytest.mark.parametrize("number", range(60))
def test_drawn_on_hopper(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = values, weight, bias, residual, gated = draw_operands(number, DEVICE)
    calls: list[Any] = []
    launch = hopper_linear.hopper_linear

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        launch(*arguments)

    monkeypatch.setattr(hopper_linear, "hopper_linear", counted)
    if residual is not None:
        out = residual.clone()
        layer_ops.add_linear(out, values, weight, bias)
    else:
        ones = torch.ones(values.shape[1], dtype=values.dtype, device=DEVICE)
        out = layer_ops.norm_linear(values, ones, 1e-5, weight, bias, gated=gated)
        operands = (layer_ops.rms_norm(values, ones, 1e-5), *operands[1:])
    assert len(calls) == 1
    check(out, operands)
