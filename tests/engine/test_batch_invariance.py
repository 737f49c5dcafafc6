"""Batch-invariant engines: a request's tokens and log probabilities are the same bits, whatever its steps are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pagedattn.engine import model_runner
from pagedattn.engine.config import EngineConfig
from pagedattn.engine.llm import LLM
from pagedattn.engine.model import ModelConfig, RopeConfig
from pagedattn.engine.outputs import CompletionOutput, RequestOutput
from pagedattn.engine.sampler import PendingLogprobs
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_graphs import decode_batch_sizes
from pagedattn.engine.weights import LoadedModel, random_model
from tests.engine.test_step_graphs import RepeatedSteps

# Heads and sizes that no vector divides; windows, norms and biases; contexts of more than one chunk of keys.
SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=90,
    intermediate_size=203,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_size=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    rope=RopeConfig(theta=10_000.0, rotary_dim=16),
    attention_bias=True,
    attention_output_bias=True,
    qk_norm=True,
    sliding_window=(None, 300),
)
# What a GPU's own kernels for decodes, small products and few rows serve.
LIKE_135M = replace(
    SMALL,
    vocab_size=8192,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=4,
    head_size=64,
    rope=RopeConfig(theta=10_000.0, rotary_dim=64),
    qk_norm=False,
    sliding_window=(None, 300, None, None),
)
LENGTHS = (5, 620, 37, 64, 303, 16, 121)
SIZES = {"num_blocks": 400, "max_num_seqs": 12, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of which the longer ones begin alike; greedy and sampled answers of several lengths."""
    prompts = [[(13 * position + position * position // 7) % 250 for position in range(length)] for length in LENGTHS]
    for index, prompt in enumerate(prompts):
        prompt[-3:] = [index, 2 * index, 250 - index]
    params = [
        SamplingParams(max_tokens=5 + 3 * index, ignore_eos=True, logprobs=1 + index, **how)
        for index, how in enumerate([{"temperature": 0.0}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}] * 4)
    ]
    return prompts, params[: len(prompts)]


def answers(llm: LLM, copies: int = 1) -> list[RequestOutput]:
    """Those of all requests, so many of each."""
    prompts, params = requests()
    outputs = llm.generate(prompts * copies, params * copies, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(LENGTHS) * copies
    llm.engine.check_integrity()
    return outputs


def bits(completion: CompletionOutput) -> list[Any]:
    """The tokens, and beside each the floats of its log probabilities."""
    assert completion.logprobs is not None
    beside = [{id_: (entry.logprob, entry.rank) for id_, entry in position.items()} for position in completion.logprobs]
    return list(zip(completion.token_ids, beside, strict=True))


def assert_same(outputs: Sequence[RequestOutput], expected: Sequence[list[Any]]) -> None:
    for index, output in enumerate(outputs):
        alone = expected[index % len(LENGTHS)]
        assert bits(output.outputs[0]) == alone, f"request {index} of {len(output.prompt_token_ids)} tokens"


def answers_alone(model: LoadedModel, **options: Any) -> list[list[Any]]:
    llm = LLM(model, batch_invariant=True, **{**SIZES, **options})
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt, params in zip(*requests(), strict=True)]
    return [bits(output.outputs[0]) for output in outputs]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return random_model(SMALL, request.param, "cpu")


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> list[list[Any]]:
    return answers_alone(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 96},
        {"max_num_batched_tokens": 23, "max_num_seqs": 5},
        {"block_size": 7},
        {"policy": "static"},
    ],
    ids=str,
)
def test_neither_company_nor_how_prompts_are_cut_shows(
    model: LoadedModel, alone: list[list[Any]], options: dict[str, Any]
) -> None:
    assert_same(answers(LLM(model, batch_invariant=True, **{**SIZES, **options})), alone)


@pytest.mark.parametrize(("policy", "num_blocks"), [("vllm", 350), ("transformers", 250)])
def test_a_preemption_does_not_show(model: LoadedModel, alone: list[list[Any]], policy: str, num_blocks: int) -> None:
    """What was computed is computed again, or swapped to host memory and back."""
    scarce = {"num_blocks": num_blocks, "block_size": 8, "max_num_seqs": 32, "max_num_batched_tokens": 150}
    llm = LLM(model, batch_invariant=True, policy=policy, swap_space=0.01, **{**SIZES, **scarce})
    assert_same(answers(llm, copies=3), alone)
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps > 0) == (policy == "transformers")


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_quantized_cache_is_no_exception(model: LoadedModel, name: str) -> None:
    alone = answers_alone(model, kv_cache_dtype=name)
    for options in ({"max_num_batched_tokens": 96}, {"enable_prefix_caching": True}):
        llm = LLM(model, batch_invariant=True, kv_cache_dtype=name, **{**SIZES, **options})
        for _ in range(2):
            assert_same(answers(llm), alone)


def test_a_cached_prefix_does_not_show(model: LoadedModel, alone: list[list[Any]]) -> None:
    llm = LLM(model, batch_invariant=True, **{**SIZES, "enable_prefix_caching": True})
    for _ in range(2):
        outputs = answers(llm)
        assert_same(outputs, alone)
    assert sum(output.num_cached_tokens for output in outputs) > 1000


@pytest.mark.parametrize("mixtures", [(), (16, 40, 400)], ids=["decodes", "all"])
def test_padding_does_not_show(
    model: LoadedModel, alone: list[list[Any]], mixtures: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps as wide as the graphs that a GPU would have."""
    monkeypatch.setattr(model_runner, "StepGraphs", RepeatedSteps)
    llm = LLM(model, batch_invariant=True, **{**SIZES, "max_num_batched_tokens": 400})
    llm.engine.runner.warm_up(400, decode_sizes=decode_batch_sizes(12), mixture_sizes=mixtures)
    assert_same(answers(llm), alone)
    runner: Any = llm.engine.runner
    assert {4, 8} <= set(runner._decodes.replayed)


def test_which_of_equal_tokens_are_told_does_not_depend_on_company() -> None:
    """As many are likely alike as are not told: which ones, follows from the sample's own request."""
    logits = torch.zeros(6, 3000)
    logits[:, ::7] = 1.0
    token_ids = torch.arange(6)
    asked = [(index, 1 + 40 * index) for index in range(6)]
    together = PendingLogprobs(logits, token_ids, asked, batch_invariant=True).read()
    for index, count in asked:
        one = PendingLogprobs(logits[index : index + 1], token_ids[index : index + 1], [(0, count)]).read()
        assert together[index] == one[0]


def test_the_mode_is_a_bool(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"^batch_invariant=1 is not allowed: True or False"):
        EngineConfig(num_blocks=1, max_model_len=1, batch_invariant=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^batch_invariant='yes' is not allowed"):
        LLM(model, batch_invariant="yes")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu(dtype: str) -> None:
    """With graphs and overlap and without, whatever bucket a step is padded to."""
    model = random_model(LIKE_135M, dtype, "cuda")
    expected = answers_alone(model, enforce_eager=True, async_scheduling=False)
    for options in (
        {"enforce_eager": True, "async_scheduling": False},
        {"enforce_eager": True, "max_num_batched_tokens": 96},
        {},
        {"max_num_seqs": 3},
        {"max_num_seqs": 64, "max_num_batched_tokens": 200},
        {"enable_prefix_caching": True},
    ):
        llm = LLM(model, batch_invariant=True, **{**SIZES, **options})
        assert llm.engine.runner.has_graphs != options.get("enforce_eager", False)
        for _ in range(2):
            assert_same(answers(llm), expected)
    num_preemptions = 0
    for policy in ("vllm", "transformers"):
        scarce = {"num_blocks": 250, "max_num_seqs": 32, "max_num_batched_tokens": 150}
        llm = LLM(model, batch_invariant=True, policy=policy, swap_space=0.1, **{**SIZES, **scarce})
        assert_same(answers(llm, copies=3), expected)
        num_preemptions += llm.engine.stats().num_preemptions
    assert num_preemptions > 0
