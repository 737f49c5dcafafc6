from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pagedattn.engine.batch import BatchTensors
from pagedattn.engine.degradation import Rung, ShedLowest
from pagedattn.engine.llm import LLM
from pagedattn.engine.monitor import Alert, AlertRule, Condition
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduling_params import SchedulingParams
from pagedattn.engine.weights import LoadedModel, load_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("random", device="cpu")


@pytest.fixture
def llm(loaded: LoadedModel) -> Iterator[LLM]:
    made = LLM(loaded, num_blocks=64)
    yield made
    assert not made.engine.has_unfinished
    made.engine.check_integrity()


def token_ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_generate_takes_every_kind_of_prompt(llm: LLM) -> None:
    text = "The capital"
    ids = llm.tokenizer.encode(text)
    one = llm.generate(text, GREEDY)
    assert len(one) == 1
    assert one[0].prompt == text
    assert one[0].prompt_token_ids == ids
    assert one[0].finished
    assert one[0].error is None
    assert one[0].outputs[0].finish_reason == "length"
    same = [
        llm.generate([text], GREEDY),
        llm.generate(ids, GREEDY),
        llm.generate([ids], GREEDY),
        llm.generate({"prompt_token_ids": ids}, GREEDY),
        llm.generate([{"prompt_token_ids": ids}], [GREEDY]),
    ]
    assert all(token_ids(outputs) == token_ids(one) for outputs in same)
    assert same[1][0].prompt is None


def test_outputs_are_in_the_prompts_order(llm: LLM) -> None:
    prompts = ["a", "bb", "ccc", "dddd"]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (9, 1, 5, 3)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(tokens) for tokens in token_ids(outputs)] == [9, 1, 5, 3]


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_the_defaults_are_those_of_sampling_params(llm: LLM) -> None:
    [output] = llm.generate("abc")
    assert len(output.outputs[0].token_ids) <= SamplingParams().max_tokens  # type: ignore[operator]


def test_a_prompt_that_is_too_long_is_rejected_and_the_others_go_on(loaded: LoadedModel) -> None:
    llm = LLM(loaded, num_blocks=4, block_size=8)
    outputs = llm.generate(["a", "b" * 40, "c"], GREEDY)
    assert outputs[1].error is not None
    assert "40 tokens: it must have fewer than max_model_len=32" in outputs[1].error
    assert outputs[1].outputs[0].finish_reason == "error"
    assert outputs[1].finished
    assert [len(tokens) for tokens in token_ids(outputs)] == [8, 0, 8]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "empty"),
        ([""], "empty"),
        (["a", ""], "empty"),
        ([[]], "empty"),
        ([["a"]], "must be a string, a list of token ids"),
        ([1.5], "must be a string, a list of token ids"),
        ([[1, 10**9]], "token id 1000000000"),
        (3, "prompts must be a prompt or a list"),
    ],
)
def test_bad_prompts_raise_before_any_work(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)
    with pytest.raises(ValueError, match=message):
        llm.stream(prompts, GREEDY)
    assert not llm.engine.has_unfinished


def test_bad_sampling_params(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has 1 entries: it must have one for each of the 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(TypeError, match="sampling_params must be"):
        llm.generate("a", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sampling_params must be"):
        llm.generate(["a", "b"], [GREEDY, {}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(stop_token_ids=[10**6])])
    assert not llm.engine.has_unfinished  # what was queued before the bad one is gone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"max_num_seqs": -1}, "max_num_seqs=-1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_model_len": True}, "max_model_len=True"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"policy": "nope"}, "policy='nope' is not known: it must be one of default, static"),
        ({"order": "lifo"}, "order='lifo' is not known: it must be one of fcfs, priority"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization=0.0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"max_model_len": 10**9}, "max_model_len=1000000000"),
        ({"max_model_len": 100, "num_blocks": 2}, "the KV cache holds 32 tokens"),
    ],
)
def test_bad_arguments_name_themselves(loaded: LoadedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(loaded, **arguments)


def test_sizes_are_checked_before_a_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        LLM("no-such-model", block_size=0)


def test_default_sizes(loaded: LoadedModel) -> None:
    config = LLM(loaded, max_num_seqs=2).engine.config
    assert config.max_model_len == loaded.config.max_position_embeddings
    assert config.num_blocks == 2 * config.max_model_len // config.block_size
    assert LLM(loaded, num_blocks=3).engine.config.max_model_len == 48  # what the blocks hold
    assert LLM(loaded, max_num_seqs=2, max_model_len=40).engine.config.num_blocks == 2 * 3


def test_priority_decides_who_is_first(loaded: LoadedModel) -> None:
    llm = LLM(loaded, num_blocks=32, max_num_seqs=1, order="priority")
    prompts = ["aa", "bb", "cc"]
    outputs = llm.generate(prompts, GREEDY, priority=[5, 5, 0])
    assert [output.prompt for output in outputs] == prompts
    starts = [output.metrics.first_scheduled_time for output in outputs]
    assert sorted(range(3), key=lambda index: starts[index] or 0.0) == [2, 0, 1]
    assert token_ids(outputs) == token_ids(LLM(loaded, num_blocks=32).generate(prompts, GREEDY))


def test_a_deadline_that_can_not_be_met_has_an_end_of_its_own(loaded: LoadedModel) -> None:
    llm = LLM(loaded, num_blocks=32, max_num_seqs=1)
    late = SchedulingParams(first_token_timeout=1e-9)
    outputs = llm.generate(["aa", "bb"], GREEDY, scheduling_params=[SchedulingParams(), late])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "deadline"]
    assert outputs[0].error is None
    assert outputs[1].error is not None
    assert outputs[1].error.startswith("the deadline can not be met: 0 tokens after")
    assert llm.engine.stats().num_dropped == 1
    llm.engine.check_integrity()


def test_a_bounded_queue_holds_prompts_back_and_loses_none(llm: LLM, loaded: LoadedModel) -> None:
    prompts = [f"prompt {index}" for index in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    bounded = LLM(loaded, num_blocks=64, max_num_seqs=2, max_waiting_requests=3)
    assert token_ids(bounded.generate(prompts, params)) == token_ids(llm.generate(prompts, params))
    one, other = bounded.stream(prompts[:6], params), bounded.stream(prompts[6:], params)
    next(one)
    assert bounded.engine.stats().num_waiting <= 3
    finished = [output for output in other if output.finished]
    finished += [output for output in one if output.finished]
    assert len(finished) == 12


def test_alerts_and_shedding_reach_the_llms_user(loaded: LoadedModel) -> None:
    condition, told = Condition("num_waiting", enter=1, leave=-1), list[Alert]()
    llm = LLM(
        loaded,
        num_blocks=64,
        max_num_seqs=1,
        order="priority",
        check_interval=1e-6,
        alerts=[AlertRule("busy", condition)],
        on_alert=told.append,
        degradation=[Rung("shed_lowest", condition, ShedLowest())],
    )
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate(["one", "two", "three"], params, priority=[0, 0, 1])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "shed"]
    assert outputs[2].error == "shed under pressure: priority 1 was the lowest that waited"
    assert [alert.rule.name for alert in told] == ["busy"]


def test_bad_scheduling_params(llm: LLM) -> None:
    with pytest.raises(ValueError, match="priority has 1 entries: it must have one for each of the 2 prompts"):
        llm.generate(["a", "b"], priority=[1])
    with pytest.raises(ValueError, match="priority is not allowed with scheduling_params"):
        llm.generate("a", priority=[1], scheduling_params=SchedulingParams())
    with pytest.raises(TypeError, match="priority must be an int, not True"):
        llm.generate("a", priority=[True])
    with pytest.raises(ValueError, match="timeout=-1"):
        SchedulingParams(timeout=-1)
    with pytest.raises(ValueError, match="expected_output_tokens=0"):
        SchedulingParams(expected_output_tokens=0)
    with pytest.raises(TypeError, match="client_id must be a string"):
        SchedulingParams(client_id=3)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished


def test_stream_interleaves_and_adds_up(llm: LLM) -> None:
    expected = llm.generate(["abc", "de"], GREEDY)
    texts: dict[str, str] = {"abc": "", "de": ""}
    ids: dict[str, list[int]] = {"abc": [], "de": []}
    order, last = [], {}
    for output in llm.stream(["abc", "de"], GREEDY):
        assert output.prompt is not None
        completion = output.outputs[0]
        order.append(output.prompt)
        texts[output.prompt] += completion.delta_text
        ids[output.prompt] += completion.delta_token_ids
        assert completion.text == texts[output.prompt]
        assert completion.token_ids == ids[output.prompt]
        last[output.prompt] = output
    assert order == ["abc", "de"] * 8
    assert token_ids([last["abc"], last["de"]]) == token_ids(expected)
    assert [last[p].outputs[0].text for p in ("abc", "de")] == [output.outputs[0].text for output in expected]


def test_a_closed_stream_aborts_its_requests(llm: LLM) -> None:
    stream = llm.stream(["abc", "de"], GREEDY)
    next(stream)
    assert llm.engine.stats().num_running == 2
    stream.close()
    assert not llm.engine.has_unfinished
    assert llm.engine.stats().num_used_blocks == 0
    assert llm.engine.stats().num_aborted == 2


def test_a_dropped_stream_aborts_its_requests(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    next(stream)
    del stream
    gc.collect()
    assert not llm.engine.has_unfinished


def test_a_stream_that_was_never_started_costs_nothing(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    assert not llm.engine.has_unfinished
    stream.close()


def test_two_streams_and_a_generate_share_the_engine(llm: LLM) -> None:
    expected = token_ids(llm.generate(["abc", "de", "f"], GREEDY))
    first, second = llm.stream("abc", GREEDY), llm.stream("de", GREEDY)
    streamed = [[next(first)], [next(second)]]
    between = llm.generate("f", GREEDY)
    streamed[1] += second
    streamed[0] += first
    assert token_ids([streamed[0][-1], streamed[1][-1], between[0]]) == expected
    assert [len(outputs) for outputs in streamed] == [8, 8]


def test_aborting_inside_a_stream_ends_that_request_only(llm: LLM) -> None:
    reasons: dict[str | None, Any] = {}
    for output in llm.stream(["abc", "de"], GREEDY):
        if output.prompt == "abc" and len(output.outputs[0].token_ids) == 3:
            llm.engine.abort(output.request_id)
        if output.finished:
            reasons[output.prompt] = (output.outputs[0].finish_reason, len(output.outputs[0].token_ids))
    assert reasons == {"abc": ("abort", 3), "de": ("length", 8)}


def test_outputs_taken_by_another_hand_do_not_hang_the_stream(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    next(stream)
    while llm.engine.has_unfinished:
        llm.engine.step()
    with pytest.raises(RuntimeError, match="took this iterator's outputs"):
        list(stream)


def test_an_interrupted_generate_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = llm.engine.runner.decoder.forward, []

    def interrupted(batch: BatchTensors, cache: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(batch, cache)

    monkeypatch.setattr(llm.engine.runner.decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "de"], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.engine.stats().num_used_blocks == 0
    monkeypatch.undo()
    assert len(token_ids(llm.generate("abc", GREEDY))[0]) == 8


def test_chat_applies_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    text = llm.tokenizer.apply_chat_template(conversation)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    [one] = llm.chat(conversation, GREEDY)
    assert (one.prompt, one.prompt_token_ids) == (text, ids)
    assert token_ids([one]) == token_ids(llm.generate(ids, GREEDY))
    assert len(llm.chat([conversation, conversation], GREEDY)) == 2
    with pytest.raises(ValueError, match="content"):
        llm.chat([{"role": "user"}], GREEDY)


def test_policies_give_the_same_tokens(loaded: LoadedModel) -> None:
    prompts = [[65 + index] * (index + 1) for index in range(6)]
    runs = []
    for policy in ("default", "static"):
        llm = LLM(loaded, num_blocks=32, policy=policy, max_num_seqs=4, max_num_batched_tokens=8)
        runs.append(token_ids(llm.generate(prompts, GREEDY)))
        assert (llm.engine.stats().num_padding_tokens > 0) == (policy == "static")
    assert runs[0] == runs[1]


def test_seeded_samples_do_not_depend_on_company_or_preemption(loaded: LoadedModel) -> None:
    params = SamplingParams(seed=11, max_tokens=24, ignore_eos=True, top_p=0.9)
    [alone] = token_ids(LLM(loaded, num_blocks=64).generate("abc", params))
    crowded = LLM(loaded, num_blocks=10, block_size=4)
    outputs = crowded.generate(["xyz", "uvw", "abc"], [SamplingParams(max_tokens=24, ignore_eos=True)] * 2 + [params])
    assert crowded.engine.stats().num_preemptions > 0
    assert token_ids(outputs)[2] == alone


def test_progress_is_silent_when_quick(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate("abc", GREEDY)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_is_shown_when_slow(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedattn.engine.llm.PROGRESS_DELAY_SECONDS", 0.0)
    llm.generate(["abc", "de"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate("abc", GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("KVCache.__init__", "a KV cache of 64 blocks and 1310 of swap space"),
        ("measure_preemption_costs", "warming up"),
        ("Engine", "warming up"),
    ],
)
def test_too_little_memory_at_the_start_says_what_to_lower(
    loaded: LoadedModel, where: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(f"pagedattn.engine.llm.{where}", allocate)
    message = (
        f"too little free memory for {what}: lower max_num_batched_tokens=512, max_num_seqs=256, "
        "gpu_memory_utilization=0.9 or num_blocks (CUDA out of memory)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LLM(loaded, num_blocks=64, swap_space=0.01)


def test_steps_wait_for_each_other_on_a_cpu(llm: LLM) -> None:
    assert not llm.engine.config.async_scheduling
    llm.engine.add_request([1, 2, 3], GREEDY)
    assert len(llm.engine.step().outputs) == 1
    llm.generate([[1]], GREEDY, use_tqdm=False)
