"""Padded steps and, on a GPU, that graphs change no token. Without one, a graph is a step that is run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pagedattn.engine import cache_size, model_runner
from pagedattn.engine.llm import LLM
from pagedattn.engine.outputs import CompletionOutput
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.step_graphs import Step, decode_batch_sizes, mixture_sizes
from pagedattn.engine.weights import LoadedModel, load_model
from tests.device import DEVICE, IS_CUDA


class RepeatedSteps:
    """As ``StepGraphs``, without a device: every replay runs the step again, padded as a graph would be."""

    def __init__(self, step: Step, sizes: Sequence[int], device: torch.device, pool: Any) -> None:
        self.sizes = sizes
        self.replayed: list[int] = []
        self._step = step

    def replay(self, size: int) -> Any:
        padded = next(larger for larger in self.sizes if larger >= size)
        self.replayed.append(padded)
        return self._step(padded)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("random", dtype="float32", device=DEVICE)


def make_llm(model: LoadedModel, **options: Any) -> LLM:
    return LLM(model, **{"num_blocks": 200, "max_num_seqs": 12, "max_num_batched_tokens": 64, **options})


def answers(llm: LLM, **params: Any) -> list[CompletionOutput]:
    prompts = [[7 * index + offset for offset in range(3 + 5 * index)] for index in range(11)]
    sampling = [SamplingParams(**{"max_tokens": 4 + 3 * index, "ignore_eos": True, **params}) for index in range(11)]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 11
    llm.engine.check_integrity()
    return [output.outputs[0] for output in outputs]


def assert_same(found: list[CompletionOutput], expected: list[CompletionOutput]) -> None:
    """The same tokens, and log probabilities up to the rounding of products of other shapes."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for position, other in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert [entry.logprob for entry in position.values()] == pytest.approx(
                [entry.logprob for entry in other.values()], abs=1e-4
            )


ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3, "top_p": 0.8},
    {"temperature": 0.9, "seed": 4, "logprobs": 2},
    {"temperature": 0.0, "ignore_eos": False, "stop_token_ids": list(range(250)), "min_tokens": 4},
]


@pytest.mark.parametrize("params", ASKED, ids=["greedy", "sampled", "logprobs", "min_tokens"])
@pytest.mark.parametrize("mixtures", [(), (16, 40), (16, 32, 48, 64)], ids=["no mixtures", "short ones", "all"])
def test_a_padded_step_gives_the_same_tokens(
    model: LoadedModel, params: dict[str, Any], mixtures: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(make_llm(model, enforce_eager=True), **params)
    monkeypatch.setattr(model_runner, "StepGraphs", RepeatedSteps)
    llm = make_llm(model, enforce_eager=True)
    llm.engine.runner.warm_up(64, decode_sizes=decode_batch_sizes(12), mixture_sizes=mixtures)
    assert_same(answers(llm, **params), expected)
    runner: Any = llm.engine.runner
    assert set(runner._decodes.replayed) <= {1, 2, 4, 8, 12}
    assert len(set(runner._decodes.replayed)) > 2
    assert (runner._mixtures is None) == (not mixtures)
    if mixtures:
        assert set(runner._mixtures.replayed) <= set(mixtures)
        assert runner._mixtures.replayed


def test_what_can_not_be_captured_is_served_without(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = answers(make_llm(model, enforce_eager=True), temperature=0.0)
    monkeypatch.setattr(model_runner, "StepGraphs", refuse)
    llm = make_llm(model, enforce_eager=True)
    llm.engine.runner.warm_up(64, decode_sizes=[12], mixture_sizes=[64])
    assert "not permitted" in caplog.text
    assert not llm.engine.runner.has_graphs
    assert_same(answers(llm, temperature=0.0), expected)


def test_sizes_are_few_and_end_with_the_largest() -> None:
    assert decode_batch_sizes(1) == [1]
    assert decode_batch_sizes(3) == [1, 2, 3]
    assert decode_batch_sizes(8) == [1, 2, 4, 8]
    assert decode_batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_batch_sizes(256)[-2:] == [248, 256]
    for most in range(1, 300):
        sizes = decode_batch_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
    assert mixture_sizes(200, 1e9) == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 200]
    assert mixture_sizes(8192, 1e10)[-3:] == [640, 768, 800]  # beyond, launches do not bound a step
    assert mixture_sizes(8, 1e9) == mixture_sizes(8192, 1e13) == []
    for most in range(16, 10000, 7):
        sizes = mixture_sizes(most, 1.0)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


def test_what_a_step_takes_is_measured_with_the_largest(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the measuring itself is not to be had; the steps that it runs are."""
    steps: list[tuple[int, int]] = []
    rehearse = model_runner.ModelRunner.rehearse

    def record(self: model_runner.ModelRunner, num_seqs: int, num_tokens: int) -> None:
        steps.append((num_seqs, num_tokens))
        rehearse(self, num_seqs, num_tokens)

    monkeypatch.setattr(model_runner.ModelRunner, "rehearse", record)
    if not IS_CUDA:
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda device: None)
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    sizes: dict[str, Any] = {"block_size": 16, "max_model_len": 100, "max_num_seqs": 9}
    sizes["cache_dtype"] = model.decoder.dtype
    taken = [
        cache_size._measure_step_bytes(model.decoder, **sizes, max_num_batched_tokens=tokens, enforce_eager=eager)
        for tokens, eager in ((36, True), (36, True), (36, False), (4, True), (8, False))
    ]  # the first one also has what the device's libraries take once
    assert steps == [(9, 4), (9, 4), (9, 4), (9, 4), (4, 1), (8, 1), (9, 1)]
    num_graphs = len(decode_batch_sizes(9)) + len(mixture_sizes(36, model.decoder.flops_per_token))
    assert taken[2] >= taken[1] + num_graphs * cache_size.GRAPH_BYTES
    assert num_graphs == 5 + 3


@pytest.mark.gpu
@pytest.mark.parametrize("params", ASKED, ids=["greedy", "sampled", "logprobs", "min_tokens"])
def test_graphs_and_overlap_change_no_token(model: LoadedModel, params: dict[str, Any]) -> None:
    expected = answers(make_llm(model, enforce_eager=True, async_scheduling=False), **params)
    for enforce_eager, async_scheduling in ((False, False), (False, True), (True, True)):
        llm = make_llm(model, enforce_eager=enforce_eager, async_scheduling=async_scheduling)
        assert llm.engine.runner.has_graphs != enforce_eager
        assert_same(answers(llm, **params), expected)
