"""Greedy output equals transformers' ``generate`` token for token: fp32, the default model.

The prompts are chosen so that at no position transformers' two best logits are closer than fp32 rounding: then a token
that differs is a wrong token. The oracle's own margins are checked, so that a new torch can not turn this into luck.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedattn.engine.engine import Engine
from pagedattn.engine.llm import LLM
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.weights import LoadedModel, load_model
from tests.device import DEVICE, IS_CUDA

NUM_NEW_TOKENS = 64
# Two prompts of each length, so that transformers can run them together without padding. Around block boundaries too.
LENGTHS = (5, 9, 16, 17, 33, 63, 64, 100, 129, 200, 320, 600)
SHORT = 16  # prompts of at most 100 tokens
MIN_MARGIN = 1e-4
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)

PASSAGES = (
    (
        "A lighthouse keeper counts the ships that pass in the night and writes each one down: its lamp, its "
        "course, the hour. By spring the book is full of ships, and he has seen none of them. He knows the ferry "
        "by its two green lights, the trawlers by the way they crowd together before a storm, and the mail boat by "
        "its hurry. "
    ),
    (
        "To bake bread you need flour, water, salt and time. Mix 500 g of flour with 350 g of water and wait 30 "
        "minutes. Then add 10 g of salt and 2 g of yeast, fold the dough four times within two hours, and leave it "
        "in the cold until tomorrow. The oven should be as hot as it gets; the crust is done when it sounds "
        "hollow. "
    ),
    (
        "def moving_average(values, window):\n    total = sum(values[:window])\n    yield total / window\n    for "
        "old, new in zip(values, values[window:]):\n        total += new - old\n        yield total / window\n\n\n"
        "# The sum is kept, so that each value is added once and taken away once.\n"
    ),
    (
        "The water cycle has no beginning. Rain falls on the hills, sinks into the ground and comes out again "
        "lower down as a spring; rivers carry it to the sea; the sun lifts it up as vapour, and the wind brings it "
        "back over the hills. A drop spends about nine days in the air, weeks in a river, and thousands of years "
        "under the ground. "
    ),
)


def make_prompts(model: LoadedModel) -> list[list[int]]:
    """Of each length the beginning of a text, and a chat turn that quotes another."""
    encode = model.tokenizer.encode
    texts = [encode(passage, add_special_tokens=False) * 20 for passage in PASSAGES]
    before = encode("<|im_start|>user\nPlease continue: ", add_special_tokens=False)
    after = encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    prompts = []
    for index, length in enumerate(LENGTHS):
        prompts.append(texts[index % 4][:length])
        quoted = texts[(index + 1) % 4][: length - len(before) - len(after)]
        prompts.append(before + quoted + after if length > 20 else texts[(index + 1) % 4][7 : 7 + length])
    return prompts


def run_transformers(path: Path, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Tokens of each prompt, and the least distance between the two best logits on their way."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    tokens, margins = [], []
    for first in range(0, len(prompts), 2):
        input_ids = torch.tensor(prompts[first : first + 2])
        result = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            pad_token_id=0,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens += result.sequences[:, input_ids.shape[1] :].tolist()
        best = torch.stack(result.logits).topk(2, dim=-1).values  # [steps, prompts, 2]
        margins += (best[..., 0] - best[..., 1]).amin(dim=0).tolist()
    return {"tokens": tokens, "margins": margins}


# One process computes the oracle. Where there is a GPU the engine runs there, with graphs and overlap.
pytestmark = [pytest.mark.xdist_group("greedy"), *([pytest.mark.gpu] if IS_CUDA else [])]


@pytest.fixture(scope="session")
def model(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path, dtype="float32", device=DEVICE)


@pytest.fixture(scope="session")
def prompts(model: LoadedModel) -> list[list[int]]:
    made = make_prompts(model)
    assert [len(prompt) for prompt in made] == [length for length in LENGTHS for _ in range(2)]
    return made


@pytest.fixture(scope="session")
def oracle(smollm2_path: Path, prompts: list[list[int]], pytestconfig: pytest.Config) -> dict[str, Any]:
    """Kept in pytest's cache, under what it depends on."""
    import transformers

    depends = [prompts, NUM_NEW_TOKENS, transformers.__version__, torch.__version__, smollm2_path.stat().st_size]
    key = f"pagedattn/greedy-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}"
    assert pytestconfig.cache is not None
    found = pytestconfig.cache.get(key, None)
    if found is None:
        found = run_transformers(smollm2_path, prompts)
        pytestconfig.cache.set(key, found)
    return found


def check(engine: Engine, tokens: list[list[int]], oracle: dict[str, Any]) -> None:
    different = [
        f"prompt {index} of {LENGTHS[index // 2]} tokens differs from token {position} on, margin {margin:.2e}"
        for index, (ours, theirs, margin) in enumerate(zip(tokens, oracle["tokens"], oracle["margins"], strict=False))
        if (position := next((i for i in range(NUM_NEW_TOKENS) if ours[i] != theirs[i]), None)) is not None
    ]
    assert not different, "\n".join(different)
    assert engine.block_manager.num_used == engine.block_manager.swap_space.num_used == 0
    engine.check_integrity()


def test_the_oracle_is_not_a_coin_toss(oracle: dict[str, Any]) -> None:
    assert min(oracle["margins"]) > MIN_MARGIN, sorted(oracle["margins"])[:3]
    assert len({tuple(tokens) for tokens in oracle["tokens"]}) == len(oracle["tokens"])


def blocks_for_all(block_size: int) -> int:
    """With the default policy's headroom, so that all join at once."""
    headroom = 2 * len(LENGTHS) * POLICIES["default"].headroom_blocks
    return sum(-(-(length + NUM_NEW_TOKENS) // block_size) * 2 for length in LENGTHS) + headroom


@pytest.mark.parametrize("max_num_batched_tokens", [96, 8192], ids=["chunked", "whole"])
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_generate(
    model: LoadedModel, prompts: list[list[int]], oracle: dict[str, Any], block_size: int, max_num_batched_tokens: int
) -> None:
    llm = LLM(
        model,
        block_size=block_size,
        num_blocks=blocks_for_all(block_size),
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
    )
    outputs = llm.generate(prompts, GREEDY)
    check(llm.engine, [output.outputs[0].token_ids for output in outputs], oracle)
    stats = llm.engine.stats()
    assert stats.num_preemptions == stats.prefix_cache_hits == 0
    num_prompt_tokens = 2 * sum(LENGTHS)
    prefill_steps = -(-num_prompt_tokens // max_num_batched_tokens)
    assert stats.num_steps >= prefill_steps + NUM_NEW_TOKENS - 1
    assert (stats.num_steps == NUM_NEW_TOKENS) == (max_num_batched_tokens > num_prompt_tokens)


@pytest.mark.parametrize(("block_size", "max_num_batched_tokens"), [(1, 96), (16, 8192)])
def test_prefix_sharing(
    model: LoadedModel, prompts: list[list[int]], oracle: dict[str, Any], block_size: int, max_num_batched_tokens: int
) -> None:
    """The prompts are beginnings of four texts; then the shorter ones come again, some of their blocks evicted."""
    llm = LLM(
        model,
        block_size=block_size,
        num_blocks=-(-(sum(LENGTHS[: SHORT // 2]) + 8 * NUM_NEW_TOKENS) // block_size) + 20,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    hits = []
    for _ in range(2):
        outputs = llm.generate(prompts[:SHORT], GREEDY)
        check(llm.engine, [output.outputs[0].token_ids for output in outputs], oracle)
        hits.append(llm.engine.stats().prefix_cache_hits)
    assert hits[1] > 2 * hits[0] > 0


def test_staggered_arrivals(model: LoadedModel, prompts: list[list[int]], oracle: dict[str, Any]) -> None:
    """Requests come between the steps, long ones first, and join sequences that are at every other point."""
    engine = LLM(model, num_blocks=400, max_num_seqs=12, max_num_batched_tokens=160).engine
    waiting = list(range(len(prompts)))
    tokens: list[list[int]] = [[] for _ in prompts]
    num_steps = 0
    while waiting or engine.has_unfinished:
        if waiting and num_steps % 3 == 0:
            index = waiting.pop()
            engine.add_request(prompts[index], GREEDY, request_id=str(index))
        for output in engine.step().outputs:
            tokens[int(output.request_id)] += output.outputs[0].delta_token_ids
        engine.check_integrity()
        num_steps += 1
    check(engine, tokens, oracle)


@pytest.mark.parametrize(
    ("num_prompts", "enable_prefix_caching", "swap_space"),
    [(2 * len(LENGTHS), False, 0.0), (SHORT, True, 0.0), (SHORT, True, 0.05)],
    ids=["recompute", "recompute and share", "swap and share"],
)
def test_preemption(
    model: LoadedModel,
    prompts: list[list[int]],
    oracle: dict[str, Any],
    num_prompts: int,
    enable_prefix_caching: bool,
    swap_space: float,
) -> None:
    """Blocks for the longest request and little more: the rest gets in each other's way."""
    llm = LLM(
        model,
        num_blocks=-(-(LENGTHS[num_prompts // 2 - 1] + NUM_NEW_TOKENS) // 16) + 6,
        max_num_batched_tokens=256,
        enable_prefix_caching=enable_prefix_caching,
        swap_space=swap_space,
    )
    outputs = llm.generate(prompts[:num_prompts], GREEDY)
    assert llm.engine.stats().num_preemptions > 0
    assert (llm.engine.stats().num_swaps > 0) == (swap_space > 0)
    assert sum(output.metrics.num_preemptions for output in outputs) == llm.engine.stats().num_preemptions
    check(llm.engine, [output.outputs[0].token_ids for output in outputs], oracle)


def test_forks(model: LoadedModel, prompts: list[list[int]], oracle: dict[str, Any]) -> None:
    """Three sequences of each prompt, in blocks that they share up to the last, which is copied."""
    llm = LLM(model, num_blocks=400, max_num_batched_tokens=256)
    chosen = range(4, 10)
    outputs = llm.generate([prompts[index] for index in chosen], replace(GREEDY, n=3))
    for index, output in zip(chosen, outputs, strict=True):
        assert [completion.token_ids for completion in output.outputs] == [oracle["tokens"][index]] * 3
    num_prompt_tokens = sum(len(prompts[index]) for index in chosen)
    assert llm.engine.stats().num_computed_tokens <= num_prompt_tokens + 18 * NUM_NEW_TOKENS
    llm.engine.check_integrity()


def test_a_system_prompt_is_computed_once(model: LoadedModel, prompts: list[list[int]]) -> None:
    system = prompts[-2]
    questions = [[*system, *prompts[index]] for index in range(4)]
    params = replace(GREEDY, max_tokens=8)
    tokens = []
    for enable_prefix_caching in (False, True):
        llm = LLM(model, num_blocks=600, enable_prefix_caching=enable_prefix_caching)
        tokens.append([output.outputs[0].token_ids for output in llm.generate(questions, params)])
    assert tokens[0] == tokens[1]
    assert llm.engine.stats().prefix_cache_hits >= 3 * (len(system) - len(system) % 16)
