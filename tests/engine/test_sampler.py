from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedattn.engine.request import Request
from pagedattn.engine.sampler import MAX_TOP_K, PendingLogprobs, SamplingTensors, TokenLogprobs, sample_again
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.kernels import sampling_reference
from pagedattn.layer_ops import as_int64, derive_seed, sample_tokens

VOCAB_SIZE = 5000  # so that top_p looks among 256, 4096 and all candidates


def request(num_outputs: int = 0, stop_ids: frozenset[int] = frozenset(), **params: Any) -> Request:
    sampling_params = SamplingParams(**{"max_tokens": 10_000, **params})
    made = Request(
        "r", [0], sampling_params, max_num_tokens=10_001, seed=sampling_params.seed or 0, stop_token_ids=stop_ids
    )
    made.token_ids += [0] * num_outputs
    return made


def sample(logits: Tensor, requests: list[Request]) -> tuple[list[int | None], dict[int, TokenLogprobs]]:
    """As the model runner does it: tokens, None where there is none, and log probabilities by row."""
    params = [request.params for request in requests]
    columns: tuple[tuple[list[Any], torch.dtype], ...] = (
        ([0.0 if one.is_greedy else one.temperature for one in params], torch.float32),
        ([min(one.top_k, MAX_TOP_K) for one in params], torch.int32),
        ([one.top_p for one in params], torch.float32),
        ([one.min_p for one in params], torch.float32),
        ([as_int64(request.seed) for request in requests], torch.int64),
        ([request.num_output_tokens for request in requests], torch.int64),
    )
    sampling = SamplingTensors(*(torch.tensor(values, dtype=dtype) for values, dtype in columns))
    before = logits.clone()
    token_ids = sample_tokens(logits, *sampling)
    again = sample_again(logits, sampling, list(enumerate(requests)))
    if again is not None:
        token_ids.index_copy_(0, *again)
    asked = [(row, one.logprobs) for row, one in enumerate(params) if one.logprobs is not None]
    logprobs = PendingLogprobs(logits, token_ids, asked).read() if asked else {}
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return [token_id if token_id >= 0 else None for token_id in token_ids.tolist()], logprobs


def random_logits(num_rows: int, scale: float = 3.0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * scale


def tokens(logits: Tensor, requests: list[Request]) -> list[int | None]:
    return sample(logits, requests)[0]


def naive_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """fp64 probabilities of one row, filter by filter, renormalized after each; exact where nothing ties."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    order = probabilities.argsort(descending=True)
    if params.top_k > 0:
        probabilities[order[params.top_k :]] = 0.0
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        mass = 0.0
        for rank, token_id in enumerate(order.tolist()):
            mass += float(probabilities[token_id])
            if mass >= params.top_p:
                probabilities[order[rank + 1 :]] = 0.0
                break
    return probabilities / probabilities.sum()


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    seeds, positions = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    numbers = sampling_reference.uniform(seeds, positions).float()
    assert float(numbers.min()) > 0.0
    assert float(numbers.max()) < 1.0
    histogram = torch.histc(numbers.flatten(), bins=16, min=0.0, max=1.0)
    chi_square = float(((histogram - 256.0) ** 2 / 256.0).sum())
    assert chi_square < 37.7  # 99.9 % quantile, 15 degrees of freedom; the numbers are fixed
    for first, second in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.05


def test_known_splitmix64_values() -> None:
    """The finalizer over a counter that starts at 0 is SplitMix64 with seed 0, whose first outputs are published."""
    assert derive_seed(0, 0) == 0xE220A8397B1DCDAF
    assert derive_seed(0, 1) == 0x6E789E6AA1B965F4


def test_uniform_numbers_are_bits_of_derived_seeds() -> None:
    seeds, positions = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEF00D], [0, 1, 5, 100_000, 7, 2**40]
    bits = torch.tensor([sampling_reference.as_int64(seed) for seed in seeds])
    numbers = sampling_reference.uniform(bits, torch.tensor(positions))
    expected = [
        ((derive_seed(seed, position) >> 24) + 0.5) * 2.0**-40 for seed, position in zip(seeds, positions, strict=True)
    ]
    assert numbers.tolist() == expected


def test_greedy_is_argmax_first_of_equals() -> None:
    logits = random_logits(3)
    logits[1, [7, 5]] = 100.0
    assert tokens(logits, [request(temperature=0.0)] * 3) == [int(logits[0].argmax()), 5, int(logits[2].argmax())]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    logits = random_logits(1, scale=1.5, vocab_size=12)
    probabilities = naive_distribution(logits[0], SamplingParams(**params))  # type: ignore[arg-type]
    num_draws = 4000
    requests = [request(num_outputs=position, seed=3, **params) for position in range(num_draws)]
    drawn = torch.tensor(tokens(logits.expand(num_draws, -1), requests))
    observed = torch.bincount(drawn, minlength=12).double()
    allowed = probabilities > 0
    assert int(observed[~allowed].sum()) == 0
    expected = num_draws * probabilities[allowed]
    chi_square = float(((observed[allowed] - expected) ** 2 / expected).sum())
    degrees = int(allowed.sum()) - 1
    # Wilson and Hilferty's approximation of the 99.9 % quantile; seed and so the draws are fixed.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2000},
        {"top_k": VOCAB_SIZE + 5},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"top_p": 0.9, "temperature": 20.0},  # nearly flat: more tokens than the candidates
        {"min_p": 0.1},
        {"min_p": 0.001, "top_p": 0.99, "temperature": 5.0},
        {"min_p": 0.01, "top_p": 0.4, "temperature": 2.0},  # min_p takes much, from beyond the candidates
        {"min_p": 0.01, "top_k": 30, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_alone", [True, False])
def test_filters_keep_what_the_naive_ones_keep(params: dict[str, float], is_alone: bool) -> None:
    """Draw at the very ends of the CDF and in between: the tokens must be those of the naive filtered distribution."""
    logits = random_logits(1).expand(40, -1).contiguous()
    probabilities = naive_distribution(logits[0], SamplingParams(**params))  # type: ignore[arg-type]
    requests = [request(num_outputs=position, seed=9, **params) for position in range(40)]
    if not is_alone:  # what other rows ask for changes how many candidates are looked at
        others = [request(top_p=0.5, top_k=1500, seed=1), request(), request(temperature=0.0), request(top_k=2)]
        requests[1::2] = others * 5
    drawn = tokens(logits, requests)
    cumulative = probabilities.cumsum(-1)
    for index in range(0, 40, 2):
        token_id = drawn[index]
        assert token_id is not None
        position = torch.tensor(requests[index].num_output_tokens)
        draw = float(sampling_reference.uniform(torch.tensor(9), position))
        assert probabilities[token_id] > 0
        # fp32 probabilities against fp64: the draw must fall into the token's interval, give or take rounding.
        end, width = float(cumulative[token_id]), float(probabilities[token_id])
        assert end - width - 1e-5 <= draw <= end + 1e-5


def test_tokens_do_not_depend_on_the_batch() -> None:
    logits = random_logits(6)
    requests = [
        request(seed=5),
        request(seed=5, top_p=0.9),
        request(temperature=0.0),
        request(seed=6, top_k=20, min_p=0.01),
        request(seed=7, temperature=2.0, top_p=0.95),
        request(num_outputs=3, seed=5),
    ]
    together = tokens(logits, requests)
    alone = [tokens(logits[row : row + 1], [one])[0] for row, one in enumerate(requests)]
    backwards = tokens(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards


def test_seed_and_position_decide_the_draw() -> None:
    logits = random_logits(1, scale=0.1)
    draws = {(seed, n): tokens(logits, [request(num_outputs=n, seed=seed)])[0] for seed in range(4) for n in range(4)}
    assert len(set(draws.values())) > 12
    assert tokens(logits, [request(num_outputs=2, seed=1)])[0] == draws[1, 2]


def test_min_tokens_masks_stop_ids_until_it_is_reached() -> None:
    logits = torch.zeros(2, 8)
    logits[:, 3] = 50.0
    logits[:, 4] = 40.0
    stops = frozenset({3})
    early, late = request(1, stops, min_tokens=2, temperature=0.0), request(2, stops, min_tokens=2, temperature=0.0)
    assert tokens(logits, [early, late]) == [4, 3]
    assert tokens(logits, [request(1, stops, min_tokens=2, seed=1), request(2, stops, min_tokens=2, seed=1)]) == [4, 3]


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_p": 0.5}, {"logprobs": 2}], ids=str)
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, Any]) -> None:
    logits = random_logits(3)
    good = tokens(logits, [request(**params)] * 3)
    logits[1] = bad
    assert tokens(logits, [request(**params)] * 3) == [good[0], None, good[2]]


def test_one_nan_in_a_row_is_enough() -> None:
    logits = random_logits(1)
    logits[0, 17] = math.nan
    assert tokens(logits, [request()]) == [None]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3)
    stops = frozenset({int(logits[2].argmax())})
    requests = [
        request(logprobs=3, temperature=0.0),
        request(temperature=0.3),
        request(logprobs=5, temperature=0.3, top_k=2, min_tokens=2, stop_ids=stops, seed=2),
    ]
    chosen, logprobs = sample(logits, requests)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert logprobs.keys() == {0, 2}
    for row, count in ((0, 3), (2, 5)):
        found, token_id = logprobs[row], chosen[row]
        assert token_id is not None
        top = expected[row].topk(count)
        assert found.top_token_ids == top.indices.tolist()
        assert found.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
        assert found.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
        assert found.rank == int((expected[row] > expected[row, token_id]).sum()) + 1
    assert logprobs[0].logprob == logprobs[0].top_logprobs[0]  # exactly, as lm-eval compares
    assert chosen[2] not in stops


def test_logprobs_zero_is_the_chosen_token_only() -> None:
    _, logprobs = sample(random_logits(1), [request(logprobs=0, temperature=0.0)])
    assert logprobs[0].top_token_ids == []
    assert logprobs[0].rank == 1


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), []) == ([], {})
