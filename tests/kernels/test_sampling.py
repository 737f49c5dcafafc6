"""Sampling against the torch reference, token by token, and against fp64 where the two differ by rounding."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pagedattn import layer_ops
from pagedattn.kernels import sampling_reference
from tests.device import DEVICE, DTYPES, INTERPRETED, IS_CUDA

# A draw this close to a step of the CDF falls to either side by how the sums before it were rounded.
TIE = 2e-6
ROWS = 8 if INTERPRETED else 200


class Parameters(NamedTuple):
    """As ``layer_ops.sample_tokens`` takes them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor

    def rows(self, index: Any) -> Parameters:
        return Parameters(*(one[index].contiguous() for one in self))


def parameters(rows: list[dict[str, Any]], seeds: list[int] | None = None) -> Parameters:
    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype, device=DEVICE)

    bits = torch.tensor(seeds or [row.get("seed", 1000 + i) for i, row in enumerate(rows)], device=DEVICE)
    return Parameters(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        bits,
        column("position", 0, torch.int64),
    )


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "cold": {"temperature": 0.3},
    "greedy": {"temperature": 0.0, "top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k 50": {"top_k": 50, "temperature": 0.8},
    "top_k of many": {"top_k": 2000, "temperature": 3.0},
    "top_k off": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "small top_p": {"top_p": 1e-6},
    "top_p of nearly all": {"top_p": 0.99999, "temperature": 9.0},
    "min_p": {"min_p": 0.05, "temperature": 2.0},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 300, "top_p": 0.8, "min_p": 0.002},
    "top_k and top_p": {"top_k": 20, "top_p": 0.7},
    "min_p and top_p": {"min_p": 0.01, "top_p": 0.5, "temperature": 2.0},
}


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2.5
    return logits.to(DEVICE, dtype)


def sample(logits: Tensor, given: Parameters) -> Tensor:
    return layer_ops.sample_tokens(logits, *given)


def exact_steps(logits: Tensor, given: Parameters, row: int) -> tuple[Tensor, float]:
    """fp64 CDF of one row with its filters, and its draw; thresholds keep what ties with the last token kept."""
    x = logits[row].double().cpu()
    temperature, top_k, top_p, min_p = (float(one[row]) for one in given[:4])
    weights = torch.exp((x - x.max()) / temperature)
    keeps = weights >= min_p
    order = weights.argsort(descending=True, stable=True)
    if 0 < top_k < len(x):
        keeps &= weights >= weights[order[int(top_k) - 1]]
        order = order[: int(top_k)]
    if top_p < 1.0:
        likeliest = weights[order] * (weights[order] >= min_p)
        cumulative = likeliest.cumsum(0)
        last = int((cumulative < top_p * cumulative[-1] * (1 - 1e-12)).sum())
        keeps &= weights >= likeliest[min(last, len(likeliest) - 1)]
    cdf = (weights * keeps).cumsum(0)
    return cdf / cdf[-1], float(sampling_reference.uniform(given.seed[row].cpu(), given.position[row].cpu()))


def assert_same_or_tied(found: Tensor, logits: Tensor, given: Parameters, share: float) -> None:
    """Tokens equal the reference's but for a share of rows, in which the draw lies on an end of the token's step."""
    expected = sampling_reference.sample_tokens(logits.cpu(), *(one.cpu() for one in given))
    different = (found.cpu() != expected).nonzero().flatten().tolist()
    assert len(different) <= max(1, share * len(found)), (found.cpu()[different], expected[different])
    for row in different:
        assert given.temperature[row] > 0, "greedy is exact"
        cdf, draw = exact_steps(logits, given, row)
        token = int(found[row])
        begin = float(cdf[token - 1]) if token else 0.0
        assert begin - TIE <= draw <= float(cdf[token]) + TIE, row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_tokens_equal_the_references(dtype: torch.dtype, name: str) -> None:
    vocab_size = 5000 if "many" in name or "nearly" in name else 1237
    logits = random_logits(ROWS, vocab_size, dtype)
    given = parameters([{**FILTERS[name], "position": i % 7} for i in range(ROWS)])
    assert_same_or_tied(sample(logits, given), logits, given, share=0.02)


@pytest.mark.parametrize("name", [name for name in FILTERS if name not in ("greedy", "none", "cold", "top_k off")])
def test_filters_keep_what_fp64_keeps(name: str) -> None:
    """A step of the CDF that the filters cut off is never drawn, those next to the cut are."""
    logits = random_logits(1, 700, seed=3).expand(ROWS, -1)
    given = parameters([{**FILTERS[name], "position": i, "seed": 5} for i in range(ROWS)])
    found = sample(logits, given)
    for row in range(ROWS):
        cdf, draw = exact_steps(logits, given, row)
        token = int(found[row])
        begin = float(cdf[token - 1]) if token else 0.0
        assert begin < float(cdf[token])
        assert begin - TIE <= draw <= float(cdf[token]) + TIE


def test_the_uniform_numbers_are_the_references() -> None:
    """Equal logits make the token the draw's upper bits, exactly."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567 << 36, *range(5, 5 + 10)]
    given = parameters([{"position": 3**i % 2**50} for i in range(len(seeds))], seeds)
    size = 2**13
    expected = (sampling_reference.uniform(given.seed, given.position) * size).long()
    assert torch.equal(sample(torch.zeros(len(seeds), size, device=DEVICE), given), expected)


def test_a_row_depends_on_nothing_else() -> None:
    chosen = list(FILTERS.values())[:: 4 if INTERPRETED else 1]
    logits = random_logits(len(chosen), 4500)
    given = parameters(chosen)
    together = sample(logits, given)
    wide = torch.full((len(chosen), 5000), math.nan, device=DEVICE)
    wide[:, :4500] = logits
    assert torch.equal(sample(wide[:, :4500], given), together)
    for row in range(len(chosen)):
        index = slice(row, row + 1)
        assert torch.equal(sample(logits[index], given.rows(index)), together[index])
    backwards = torch.arange(len(chosen) - 1, -1, -1, device=DEVICE)
    assert torch.equal(sample(logits[backwards], given.rows(backwards)), together[backwards])


@pytest.mark.skipif(INTERPRETED, reason="of the reference alone")
def test_a_threshold_at_a_step_of_the_cdf_does_not_depend_on_who_asks_for_more() -> None:
    """Where top_p falls on a step, the last bit of the mass decides; a neighbour's top_k has more tokens looked at."""
    probabilities = torch.softmax(torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)) * 0.5, dim=-1)
    steps = probabilities.sort(descending=True).values.cumsum(-1, dtype=torch.float64)[0, 4500:12_000:50]
    pair = probabilities.expand(2, -1)
    for top_p in steps.float().tolist():
        alone = sampling_reference._probability_thresholds(
            probabilities, torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0])
        )
        beside = sampling_reference._probability_thresholds(
            pair, torch.tensor([0, 15_000]), torch.tensor([top_p, 1.0]), torch.tensor([0.0, 0.0])
        )
        assert torch.equal(alone[0], beside[0])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = random_logits(3, 9000)
    logits[0, [8999, 4097, 4096]] = 50.0
    logits[1, [7, 5]] = 50.0
    given = parameters([{"temperature": 0.0}] * 3)
    assert sample(logits, given).tolist() == [4096, 5, int(logits[2].argmax())]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
def test_a_row_that_is_not_finite_has_no_token(bad: float, filters: dict[str, Any]) -> None:
    logits = random_logits(3, 300)
    given = parameters([filters] * 3)
    good = sample(logits, given).tolist()
    logits[1, slice(None) if bad == -math.inf else 17] = bad
    assert sample(logits, given).tolist() == [good[0], -1, good[2]]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.0}, {"top_p": 0.999}, {"top_k": 200}, {"min_p": 1e-9}])
def test_masked_tokens_are_never_chosen(filters: dict[str, Any]) -> None:
    logits = torch.full((8, 600), -math.inf, device=DEVICE)
    logits[:, 400:403] = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    logits[:, 0] = -1000.0
    found = sample(logits, parameters([{**filters, "position": i} for i in range(8)]))
    assert set(found.tolist()) <= {400, 401, 402}


def test_ties_with_the_last_token_kept_are_kept() -> None:
    """Zeros of either sign are equal too."""
    rows = 14
    logits = torch.tensor([[0.2, 0.1, 0.1, 0.1, 0.0, -0.0]], device=DEVICE, dtype=torch.float16).expand(rows, -1)
    for filters, kept in (({"top_k": 2}, {0, 1, 2, 3}), ({"top_p": 0.5}, {0, 1, 2, 3}), ({"top_k": 5}, {*range(6)})):
        found = sample(logits, parameters([{**filters, "position": i, "seed": 9} for i in range(rows)]))
        assert set(found.tolist()) == kept


def test_opcheck_and_fullgraph() -> None:
    logits, given = random_logits(4, 300), parameters([{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}])
    torch.library.opcheck(torch.ops.pagedattn.sample_tokens.default, (logits, *given))
    compiled = torch.compile(layer_ops.sample_tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, *given), sample(logits, given))
    assert sample(logits[:0], given.rows(slice(0, 0))).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_CUDA, reason="CUDA graphs need a GPU")
def test_cuda_graph() -> None:
    logits, given = random_logits(15, 9000), parameters(list(FILTERS.values()))
    sample(logits, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, given)
    fresh, others = random_logits(15, 9000, seed=8), given.rows(torch.randperm(15, device=DEVICE))
    logits.copy_(fresh)
    for old, new in zip(given, others, strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(captured, sample(fresh, others))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": torch.int64}, "top_k: got int64"),
        ({"seed": torch.int32}, "seed: got int32"),
        ({"temperature": torch.float64}, "temperature: got float64"),
    ],
)
def test_errors_name_the_argument(change: dict[str, torch.dtype], message: str) -> None:
    given = parameters([{}])._asdict()
    for name, dtype in change.items():
        given[name] = given[name].to(dtype)
    with pytest.raises(ValueError, match=message):
        layer_ops.sample_tokens(random_logits(1, 300), **given)
    with pytest.raises(ValueError, match=r"temperature: got float32 \[1\] on"):
        layer_ops.sample_tokens(random_logits(2, 300), **parameters([{}])._asdict())
