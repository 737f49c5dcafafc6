from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedattn import LLM, BeamSearchParams
from pagedattn.engine.weights import load_model
from tests.engine.checkpoints import make_model, save_directory

PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 73)), [200]]


@torch.inference_mode()
def transformers_beams(model: Any, prompt: list[int], width: int, max_tokens: int, **options: Any) -> list[list[int]]:
    ids = torch.tensor([prompt])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=max_tokens,
        **options,
    )
    return result[:, len(prompt) :].tolist()


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_beams_are_transformers(width: int, enable_prefix_caching: bool, tmp_path: Path) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    llm = LLM(
        save_directory(model, tmp_path),
        device="cpu",
        block_size=4,
        num_blocks=400,
        enable_prefix_caching=enable_prefix_caching,
    )
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=width, max_tokens=9, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.error is None
        assert [sequence.token_ids for sequence in output.sequences] == transformers_beams(model, prompt, width, 9)
        assert output.sequences[0].text == llm.tokenizer.decode(output.sequences[0].token_ids)
    computed = llm.engine.stats().num_computed_tokens
    if enable_prefix_caching:
        assert computed <= sum(map(len, PROMPTS)) + len(PROMPTS) * width * 8 * 4  # a block of four tokens a step


def test_beams_end_with_their_eos(tmp_path: Path) -> None:
    """The last token of the likeliest pair as the end: the pair is found again, and nothing goes on after it."""
    loaded = load_model(save_directory(make_model("llama"), tmp_path), device="cpu")
    free = LLM(loaded, num_blocks=100).beam_search(PROMPTS[:1], BeamSearchParams(3, 2, ignore_eos=True))[0].sequences
    first, end = free[0].token_ids
    ending = replace(loaded, config=replace(loaded.config, eos_token_ids=(end,)))
    llm = LLM(ending, num_blocks=100)
    for length_penalty in (0.0, 1.0):
        params = BeamSearchParams(3, 4, length_penalty=length_penalty)
        sequences = llm.beam_search(PROMPTS[:1], params)[0].sequences
        for sequence in sequences:
            has_ended = sequence.token_ids[-1] == end
            assert sequence.finish_reason == ("stop" if has_ended else "length")
            assert end not in sequence.token_ids[:-1]
            length = len(sequence.token_ids) - has_ended
            assert sequence.score == pytest.approx(sequence.cum_logprob / length**length_penalty)
        assert [sequence.score for sequence in sequences] == sorted((s.score for s in sequences), reverse=True)
        if length_penalty == 0.0:
            assert sequences[0].token_ids == [first, end]


def test_a_prompt_that_does_not_fit_has_an_error_and_the_others_go_on() -> None:
    llm = LLM("random", device="cpu", num_blocks=4)
    outputs = llm.beam_search([[65] * 100, [65, 66]], BeamSearchParams(beam_width=2, max_tokens=3))
    assert outputs[0].error is not None
    assert "max_model_len" in outputs[0].error
    assert outputs[0].sequences == []
    assert len(outputs[1].sequences) == 2


def test_beams_end_where_the_model_does() -> None:
    llm = LLM("random", device="cpu", num_blocks=16, max_model_len=12)
    longest, shorter = llm.beam_search([[65] * 11, [65] * 9], BeamSearchParams(beam_width=2, max_tokens=20))
    for output, count in ((longest, 1), (shorter, 3)):
        assert output.error is None
        assert [len(sequence.token_ids) for sequence in output.sequences] == [count] * 2
        assert [sequence.finish_reason for sequence in output.sequences] == ["length"] * 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"length_penalty": float("nan")}, ValueError),
        ({"length_penalty": float("inf")}, ValueError),
        ({"length_penalty": "1"}, TypeError),
        ({"beam_width": 0}, ValueError),
        ({"beam_width": 11}, ValueError),
        ({"max_tokens": True}, TypeError),
        ({"max_tokens": 0}, ValueError),
    ],
)
def test_parameters_are_validated(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(change))):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **change})
