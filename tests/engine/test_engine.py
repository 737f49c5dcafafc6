from __future__ import annotations

import cProfile
import gc
import random
import weakref
from typing import Any

import pytest
import torch

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.sampler import NO_FINITE_LOGITS
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import RequestRejectedError
from tests.engine.fake_model import (
    EOS,
    FakeDecoder,
    FakeTokenizer,
    expected_tokens,
    fake_engine,
    run_to_end,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(97, 123) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


@pytest.mark.parametrize("policy", ["default", "static"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 512])
def test_tokens_are_the_models(policy: str, block_size: int, max_num_batched_tokens: int) -> None:
    engine = fake_engine(
        policy=policy,
        block_size=block_size,
        num_blocks=256 // block_size,
        max_num_seqs=5,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    expected = {}
    for index, prompt in enumerate(prompts(12)):
        max_tokens = 1 + 3 * index
        expected[engine.add_request(prompt, greedy(max_tokens))] = expected_tokens(prompt, max_tokens)
    finished = run_to_end(engine)
    assert {name: output.outputs[0].token_ids for name, output in finished.items()} == expected
    assert any(tokens[-1] == EOS for tokens in expected.values())
    assert engine.block_manager.num_used == 0


def test_tokens_are_the_models_through_preemptions() -> None:
    engine = fake_engine(num_blocks=8, block_size=4, max_model_len=32)
    expected = {}
    for prompt in prompts(6, longest=10):
        expected[engine.add_request(prompt, greedy(20, ignore_eos=True))] = expected_tokens(prompt, 20, ignore_eos=True)
    finished = run_to_end(engine)
    assert engine.stats().num_preemptions > 0
    assert sum(output.metrics.num_preemptions for output in finished.values()) == engine.stats().num_preemptions
    assert {name: output.outputs[0].token_ids for name, output in finished.items()} == expected


def test_sampled_tokens_survive_preemption_and_company() -> None:
    """A seeded request draws the same tokens alone, in a crowd, and when it is preempted."""

    def run(num_blocks: int, company: int) -> tuple[list[list[int]], int]:
        engine = fake_engine(num_blocks=num_blocks, max_model_len=40, decoder=NoisyDecoder())
        names = [
            engine.add_request([98, 99], SamplingParams(seed=seed, max_tokens=20, ignore_eos=True, top_p=0.95))
            for seed in range(2 + company)
        ]
        finished = run_to_end(engine)
        return [finished[name].outputs[0].token_ids for name in names[:2]], engine.stats().num_preemptions

    alone, _ = run(64, 0)
    crowd, _ = run(64, 6)
    squeezed, num_preemptions = run(10, 4)
    assert num_preemptions > 0
    assert alone == crowd == squeezed
    assert alone[0] != alone[1]


class NoisyDecoder:
    """Logits that depend on the last token and its position only, but are not peaked."""

    def forward(self, batch: BatchTensors, cache: Any) -> torch.Tensor:
        ids, positions = batch.input_ids[batch.logits_indices], batch.positions[batch.logits_indices]
        return torch.sin(torch.outer(ids * 3 + positions * 17 + 1, torch.arange(1, 258)).float()) * 2


def test_unseeded_requests_differ_and_repeat_with_the_engines_seed() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = fake_engine(seed=seed, decoder=NoisyDecoder())
        names = [engine.add_request([98], SamplingParams(max_tokens=16, ignore_eos=True)) for _ in range(3)]
        finished = run_to_end(engine)
        return [finished[name].outputs[0].token_ids for name in names]

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert first[0] != first[1] != first[2]


def test_finish_reasons_and_text() -> None:
    engine = fake_engine()
    prompt = next(p for p in prompts(200) if expected_tokens(p, 12)[-1] == EOS and len(expected_tokens(p, 12)) > 4)
    tokens = expected_tokens(prompt, 12)
    stops = engine.add_request(prompt, GREEDY)
    goes_on = engine.add_request(prompt, greedy(12, ignore_eos=True))
    stop_id = engine.add_request(prompt, greedy(12, stop_token_ids=[tokens[2]]))
    kept = engine.add_request(prompt, greedy(12, include_stop_str_in_output=True, skip_special_tokens=False))
    mute = engine.add_request(prompt, greedy(12, detokenize=False))
    outputs = {name: output.outputs[0] for name, output in run_to_end(engine).items()}

    text = bytes(tokens[:-1]).decode()
    assert (outputs[stops].text, outputs[stops].finish_reason, outputs[stops].stop_reason) == (text, "stop", None)
    assert outputs[stops].token_ids == tokens  # the end-of-sequence id is a token, and not text
    assert outputs[goes_on].finish_reason == "length"
    assert len(outputs[goes_on].token_ids) == 12
    first = tokens.index(tokens[2])
    assert outputs[stop_id].token_ids == tokens[: first + 1]
    assert (outputs[stop_id].finish_reason, outputs[stop_id].stop_reason) == ("stop", tokens[2])
    assert outputs[stop_id].text == text[:first]
    assert outputs[kept].text == text + "<eos>"
    assert (outputs[mute].text, outputs[mute].token_ids) == ("", tokens)


class ScriptedDecoder:
    """Says the bytes of a text, whatever it is asked; ``script`` is by position of the generated token."""

    def __init__(self, text: bytes, prompt_len: int = 1) -> None:
        self.text, self.prompt_len = text, prompt_len

    def forward(self, batch: BatchTensors, cache: Any) -> torch.Tensor:
        logits = torch.zeros(len(batch.logits_indices), EOS + 1)
        for row, position in enumerate(batch.positions[batch.logits_indices].tolist()):
            index = position - self.prompt_len + 1
            logits[row, self.text[index] if index < len(self.text) else EOS] = 9.0
        return logits


def stream_text(text: str | bytes, **params: Any) -> tuple[list[str], Any]:
    data = text.encode() if isinstance(text, str) else text
    engine = fake_engine(decoder=ScriptedDecoder(data))
    engine.add_request([65], greedy(len(data) + 1, **params))
    deltas, last = [], None
    while engine.has_unfinished:
        for output in engine.step().outputs:
            last = output.outputs[0]
            deltas.append(last.delta_text)
            assert "".join(deltas) == last.text
    assert last is not None
    return deltas, last


def test_streamed_text_never_holds_half_a_character() -> None:
    text = "naïve 🙂 → ok"
    deltas, last = stream_text(text)
    assert last.text == text
    assert all("\N{REPLACEMENT CHARACTER}" not in delta for delta in deltas)
    _, cut = stream_text("ab🙂".encode()[:-2])
    assert cut.text == "ab"


def test_a_stop_string_over_tokens_is_cut_and_never_streamed() -> None:
    deltas, last = stream_text("one STOP two", stop=["STOP", "nothing"])
    assert last.text == "one "
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")
    assert bytes(last.token_ids).decode() == "one STOP"
    assert "S" not in "".join(deltas)
    assert stream_text("one STOP two", stop="STOP", include_stop_str_in_output=True)[1].text == "one STOP"


def test_text_that_only_begins_a_stop_string_comes_out() -> None:
    deltas, last = stream_text("a STOq STO", stop="STOP")
    assert last.text == "a STOq STO"
    assert last.finish_reason == "stop"
    assert last.stop_reason is None
    assert deltas[2:6] == ["", "", "", "STOq"]


def test_of_two_stop_strings_the_one_that_ends_first_wins() -> None:
    assert stream_text("xabcd", stop=["abcd", "bc"])[1].text == "xa"
    assert stream_text("xabcd", stop=["bc", "abc"])[1].text == "x"  # together: the longer


def test_min_tokens_holds_off_every_stop() -> None:
    _, last = stream_text("a.b.c.d", stop=".", min_tokens=4)
    assert last.text == "a.b.c"
    engine = fake_engine(decoder=ScriptedDecoder(b""))  # end-of-sequence at once, and for ever
    name = engine.add_request([65], greedy(8, min_tokens=3))
    assert len(run_to_end(engine)[name].outputs[0].token_ids) == 4


def test_logprobs_are_decoded_and_summed() -> None:
    engine = fake_engine()
    name = engine.add_request([98, 99], greedy(3, logprobs=2, ignore_eos=True))
    completion = run_to_end(engine)[name].outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 3
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(position)) == token_id
        assert position[token_id].rank == 1
        assert position[token_id].decoded_token == FakeTokenizer().token_text(token_id)
        assert len(position) == 2
    chosen = [p[t].logprob for t, p in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 257], "token id 257"),
        ([-1], "token id -1"),
        ([1.5], "must be a string, a list of token ids"),
        ([True], "must be a string, a list of token ids"),
        (7, "must be a string, a list of token ids"),
        (None, "must be a string, a list of token ids"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt": "a"}, "must have prompt_token_ids"),
        ({"prompt_token_ids": [1], "image": "x"}, "image"),
        ({"prompt_token_ids": [1], "prompt": 3}, "beside prompt_token_ids"),
    ],
)
def test_bad_prompts_are_value_errors(prompt: Any, message: str) -> None:
    engine = fake_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt)
    assert not engine.has_unfinished


def test_bad_requests() -> None:
    engine = fake_engine(num_blocks=4, block_size=4, max_model_len=16)
    with pytest.raises(TypeError, match="sampling_params"):
        engine.add_request("a", {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop_token_ids has 300"):
        engine.add_request("a", SamplingParams(stop_token_ids=[300]))
    with pytest.raises(RequestRejectedError, match="16 tokens: it must have fewer than max_model_len=16"):
        engine.add_request("a" * 16)
    engine.add_request("a", request_id="x")
    with pytest.raises(ValueError, match="request_id='x' is in use"):
        engine.add_request("a", request_id="x")
    assert len(run_to_end(engine)) == 1
    engine.add_request("a", request_id="x")  # free again


def test_generation_is_cut_at_the_models_length() -> None:
    engine = fake_engine(num_blocks=4, block_size=4, max_model_len=16)
    bounded = engine.add_request([98] * 10, greedy(100, ignore_eos=True))
    unbounded = engine.add_request([98] * 12, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    finished = run_to_end(engine)
    assert [len(finished[name].outputs[0].token_ids) for name in (bounded, unbounded)] == [6, 4]
    assert finished[bounded].outputs[0].finish_reason == "length"


def failing(when: int, error: BaseException) -> FakeDecoder:
    calls = 0

    def before_forward(batch: BatchTensors) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise error

    return FakeDecoder(4, before_forward)


@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("policy", ["default", "static"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("a kernel broke\nlong traceback"), "the step failed: RuntimeError: a kernel broke"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the step failed: OutOfMemoryError: CUDA out of memory"),
    ],
    ids=["raise", "oom"],
)
def test_a_step_that_raises_fails_its_requests_and_no_other(
    when: int, policy: str, error: Exception, message: str
) -> None:
    engine = fake_engine(decoder=failing(when, error), max_num_seqs=2, policy=policy)
    work = [[98, 99, 100], [101, 102], [103, 104], [105]]
    names = [engine.add_request(prompt, greedy(6, ignore_eos=True)) for prompt in work]
    finished = run_to_end(engine)
    assert [finished[name].error for name in names] == [message, message, None, None]
    assert [finished[name].outputs[0].finish_reason for name in names] == ["error", "error", "length", "length"]
    assert len(finished[names[0]].outputs[0].token_ids) == when - 1  # what it had is handed back
    for name, prompt in zip(names[2:], work[2:], strict=True):
        assert finished[name].outputs[0].token_ids == expected_tokens(prompt, 6, ignore_eos=True)
    stats = engine.stats()
    assert (stats.num_failed, stats.num_finished, stats.num_used_blocks) == (2, 2, 0)


def test_nan_logits_fail_their_request_alone() -> None:
    engine = fake_engine(decoder=FakeDecoder(4, nan_prompts=[[101, 102]]))
    work = [[98, 99, 100], [101, 102], [103, 104]]
    names = [engine.add_request(prompt, GREEDY) for prompt in work]
    finished = run_to_end(engine)
    assert [finished[name].error for name in names] == [None, NO_FINITE_LOGITS, None]
    assert finished[names[1]].outputs[0].finish_reason == "error"
    for index in (0, 2):
        assert finished[names[index]].outputs[0].token_ids == expected_tokens(work[index], 12)


def test_a_tokenizer_that_chokes_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine()
    work = [[98, 99, 100], [101, 102]]
    names = [engine.add_request(prompt, greedy(5, ignore_eos=True)) for prompt in work]

    def choke(token_id: int) -> str:
        raise RuntimeError("invalid prefix")

    [builder] = engine._outputs.groups[names[0]].builders
    monkeypatch.setattr(builder._detokenizer._stream, "step", choke)  # type: ignore[union-attr]
    finished = run_to_end(engine)
    assert finished[names[0]].error == "detokenizing failed: RuntimeError: invalid prefix"
    assert finished[names[1]].outputs[0].token_ids == expected_tokens(work[1], 5, ignore_eos=True)


def test_an_interrupt_propagates_and_nothing_is_lost() -> None:
    engine = fake_engine(decoder=failing(3, KeyboardInterrupt()))
    work = [[98, 99, 100], [101, 102]]
    names = [engine.add_request(prompt, greedy(8, ignore_eos=True)) for prompt in work]
    with pytest.raises(KeyboardInterrupt):
        run_to_end(engine)
    engine.check_integrity()
    finished = run_to_end(engine)
    for name, prompt in zip(names, work, strict=True):
        assert finished[name].outputs[0].token_ids == expected_tokens(prompt, 8, ignore_eos=True)


@pytest.mark.parametrize("policy", ["default", "static"])
@pytest.mark.parametrize("seed", range(8))
def test_aborts_at_random_moments_leave_all_blocks(policy: str, seed: int) -> None:
    generator = random.Random(seed)
    engine = fake_engine(policy=policy, num_blocks=14, max_model_len=56, max_num_seqs=4, max_num_batched_tokens=9)
    work = {engine.add_request(prompt, GREEDY): prompt for prompt in prompts(12, seed)}
    finished: dict[str, Any] = {}
    aborted = set()
    while engine.has_unfinished:
        for output in engine.step().outputs:
            if output.finished:
                assert output.request_id not in finished
                finished[output.request_id] = output
        engine.check_integrity()
        if generator.random() < 0.3:
            name = generator.choice(list(work))
            aborted |= {name} - set(finished)
            engine.abort(name)
            engine.check_integrity()
    for output in engine.step().outputs:  # the aborts of the last round
        finished[output.request_id] = output
    assert set(finished) == set(work)
    assert aborted
    for name, output in finished.items():
        assert (output.outputs[0].finish_reason == "abort") == (name in aborted)
        expected, token_ids = expected_tokens(work[name], 12), output.outputs[0].token_ids
        assert token_ids == (expected[: len(token_ids)] if name in aborted else expected)
    assert engine.block_manager.num_used == 0
    assert engine.stats().num_aborted == len(aborted)


def test_an_abort_from_within_a_step_waits_for_its_end() -> None:
    """As when the garbage collector closes a stream in the middle of another's step."""
    engine = fake_engine()

    def abort_within(batch: BatchTensors) -> None:
        engine.abort("victim")

    engine.runner.decoder = FakeDecoder(4, abort_within)
    engine.add_request([98], greedy(3, ignore_eos=True), request_id="victim")
    engine.add_request([99], greedy(3, ignore_eos=True), request_id="other")
    first = engine.step()
    engine.check_integrity()
    assert [(o.request_id, o.outputs[0].finish_reason) for o in first.outputs] == [
        ("victim", None),
        ("other", None),
        ("victim", "abort"),
    ]
    assert run_to_end(engine)["other"].outputs[0].token_ids == expected_tokens([99], 3, ignore_eos=True)


def test_aborting_what_is_unknown_or_ended_is_nothing() -> None:
    engine = fake_engine()
    engine.abort("nobody")
    name = engine.add_request([98], greedy(1))
    run_to_end(engine)
    engine.abort(name)
    assert engine.step().outputs == []
    assert engine.stats().num_aborted == 0


def test_an_idle_step_does_nothing() -> None:
    result = fake_engine().step()
    assert (result.outputs, result.num_seqs, result.num_tokens, result.usage) == ([], 0, 0, None)


def test_step_results_and_stats_add_up() -> None:
    engine = fake_engine(max_num_seqs=3, max_num_batched_tokens=8, num_blocks=12, max_model_len=48)
    work = prompts(8, longest=12)
    for prompt in work:
        engine.add_request(prompt, greedy(10, ignore_eos=True))
    totals = {"tokens": 0, "steps": 0, "preempted": 0, "new": 0}
    while engine.has_unfinished:
        result = engine.step()
        assert result.num_seqs <= 3
        assert result.num_tokens <= 8
        assert result.usage is not None
        assert result.usage.max_wasted_slots < 4
        assert result.usage.num_filled_slots <= result.usage.num_allocated_slots
        totals["steps"] += 1
        totals["tokens"] += result.num_tokens
        totals["preempted"] += len(result.preempted)
        totals["new"] += sum(len(output.outputs[0].delta_token_ids) for output in result.outputs)
    stats = engine.stats()
    assert totals == {
        "tokens": stats.num_computed_tokens,
        "steps": stats.num_steps,
        "preempted": stats.num_preemptions,
        "new": stats.num_generated_tokens,
    }
    assert stats.num_generated_tokens == 80
    assert stats.num_prompt_tokens == sum(map(len, work))
    assert stats.num_computed_tokens >= stats.num_prompt_tokens + 80 - 8
    assert (stats.num_finished, stats.num_running, stats.num_waiting, stats.num_used_blocks) == (8, 0, 0, 0)
    assert stats.kv_cache_usage == 0.0
    assert stats.kv_utilization is None
    assert stats.ttft is not None
    assert stats.latency is not None
    assert stats.inter_token_latency is not None
    assert (stats.ttft.count, stats.latency.count, stats.inter_token_latency.count) == (8, 8, 72)
    assert 0 < stats.ttft.p50 <= stats.ttft.p95 <= stats.ttft.p99 <= stats.latency.p99


def test_metrics_are_in_the_clocks_seconds() -> None:
    engine = fake_engine(max_num_seqs=1)
    ticks = iter(range(100, 1000))
    engine.clock = lambda: float(next(ticks))
    engine.add_request([98], greedy(3, ignore_eos=True), request_id="a")  # arrives at 100
    engine.add_request([98], greedy(1), request_id="b", arrival_time=50.0)
    finished = run_to_end(engine)
    assert finished["b"].metrics.ttft == 102.0 - 50.0  # first come first served: it came before
    metrics = finished["a"].metrics  # two ticks a step: scheduled, finished
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (100.0, 103.0, 104.0)
    assert metrics.finished_time == 108.0
    assert (metrics.ttft, metrics.latency) == (4.0, 8.0)


def test_static_streams_and_pays_for_padding() -> None:
    engine = fake_engine(policy="static", max_num_seqs=2)
    seen = []

    def record(batch: BatchTensors) -> None:
        seen.append((len(batch.input_ids), int(batch.query_start_loc[-1])))

    engine.runner.decoder = FakeDecoder(4, record)
    engine.add_request([98] * 5, greedy(3, ignore_eos=True))
    engine.add_request([98] * 2, greedy(1, ignore_eos=True))
    results = []
    while engine.has_unfinished:
        results.append(engine.step())
    assert seen == [(10, 7), (2, 1), (2, 1)]
    assert [result.num_padding_tokens for result in results] == [3, 1, 1]
    assert [len(result.outputs) for result in results] == [2, 1, 1]
    assert engine.stats().num_padding_tokens == 5


def test_ended_requests_are_let_go() -> None:
    engine = fake_engine()
    [builder] = engine._outputs.groups[engine.add_request([98, 99], greedy(4))].builders
    request = weakref.ref(builder.request)
    del builder
    assert request() is not None
    run_to_end(engine)
    gc.collect()
    assert request() is None


def test_a_waiting_queue_of_any_length_costs_a_step_nothing() -> None:
    """Calls, not time: what a step does must not depend on how many wait."""

    def calls_of_a_step(num_waiting: int) -> int:
        engine = fake_engine(max_num_seqs=2)
        for _ in range(2 + num_waiting):
            engine.add_request([98], greedy(8, ignore_eos=True))
        engine.step()
        profile = cProfile.Profile()
        profile.runcall(engine.step)
        profile.create_stats()
        return sum(calls for _, calls, *_ in profile.stats.values())  # type: ignore[attr-defined]

    assert calls_of_a_step(5) == calls_of_a_step(500)
