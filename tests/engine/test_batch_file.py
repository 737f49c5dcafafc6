"""JSONL batch jobs: what lines mean, that bad ones fail alone, order, resuming, and that the engine is left clean."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedattn import LLM, SamplingParams
from pagedattn.engine.batch_file import BatchLineError, finished_ids, parse_line, run_batch

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("random", max_num_seqs=4, num_blocks=256, device="cpu")


def run(llm: LLM, *lines: Any, **options: Any) -> dict[str, Any]:
    """The results by id; a line that is not a string is written as JSON."""
    output = io.StringIO()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    run_batch(llm, texts, output, GREEDY, **options)
    results = [json.loads(line) for line in output.getvalue().splitlines()]
    assert len({result["custom_id"] for result in results}) == len(results)
    assert llm.engine.block_manager.num_used == 0
    return {result["custom_id"]: result for result in results}


def test_three_kinds_of_prompt_give_what_generate_gives(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    results = run(
        llm,
        {"custom_id": "text", "prompt": "hello"},
        {"custom_id": "ids", "prompt_token_ids": [104, 101]},
        {"custom_id": "chat", "messages": messages, "params": {"max_tokens": 6}},
        {"prompt": "numbered"},
    )
    prompts: list[Any] = ["hello", [104, 101], "numbered"]
    text, ids, numbered = llm.generate(prompts, GREEDY)
    (chat,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    expected = {"text": text, "ids": ids, "chat": chat, "line-4": numbered}
    assert set(results) == set(expected)
    for custom_id, output in expected.items():
        num_prompt, num_completion = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        assert results[custom_id] == {
            "custom_id": custom_id,
            "text": output.outputs[0].text,
            "finish_reason": "length",
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_completion,
                "total_tokens": num_prompt + num_completion,
            },
            "error": None,
        }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "not JSON: Expecting value at column 12"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('["hi"]', "a request must be an object, not list"),
        (
            '{"prompt": "hi", "max_tokens": 3}',
            "unknown key 'max_tokens'; allowed: custom_id, prompt, prompt_token_ids,",
        ),
        (
            '{"prompt": "hi", "params": {"temprature": 0}}',
            "unknown sampling parameter 'temprature'; allowed: n, temperature",
        ),
        (
            '{"prompt": "hi", "params": {"temperature": -1}}',
            "temperature=-1 is not allowed: it must be a finite number",
        ),
        ('{"prompt": "hi", "params": {"top_p": NaN}}', "top_p=nan is not allowed: it must be a number in (0, 1]"),
        ('{"prompt": "hi", "params": {"max_tokens": true}}', "max_tokens must be an int >= 1 or None, not True"),
        ('{"prompt": "hi", "params": 3}', "params must be an object, not 3"),
        (
            '{"prompt": "hi", "messages": []}',
            "a request needs exactly one of prompt, prompt_token_ids, messages, not 2",
        ),
        ("{}", "a request needs exactly one of prompt, prompt_token_ids, messages, not 0"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": 7}', "prompt must be a string, not 7"),
        ('{"prompt_token_ids": "7"}', "prompt_token_ids must be a list, not '7'"),
        ('{"prompt": "hi", "custom_id": 7}', "custom_id must be a non-empty string, not 7"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(BatchLineError) as raised:
        parse_line(line, 9, GREEDY)
    assert str(raised.value).startswith(f"line 9: {message}")
    assert "\n" not in str(raised.value)
    assert raised.value.custom_id == "line-9"


def test_bad_lines_and_refused_requests_fail_alone(llm: LLM) -> None:
    results = run(
        llm,
        "{",
        {"custom_id": "good", "prompt": "hello"},
        "",
        {"custom_id": "vocabulary", "prompt_token_ids": [99_999]},
        {"custom_id": "type", "prompt_token_ids": ["a"]},
        {"custom_id": "long", "prompt": "x" * 5000},
        {"custom_id": "roles", "messages": ["hello"]},
        {"custom_id": "good", "prompt": "the same id"},
        {"custom_id": "last", "prompt": "bye"},
    )
    errors = {custom_id: result["error"] for custom_id, result in results.items()}
    assert errors.pop("good") is None
    assert errors.pop("last") is None
    assert errors == {
        "line-1": "line 1: not JSON: Expecting property name enclosed in double quotes at column 2",
        "vocabulary": "line 4: prompt has the token id 99999: ids must be in [0, 259)",
        "type": "line 5: prompt must be a string, a list of token ids or a dict with prompt_token_ids, not ['a']",
        "long": "line 6: the prompt has 5000 tokens: it must have fewer than max_model_len=4096, so that one more fits",
        "roles": "line 7: messages[0] needs 'role', a string; it is 'hello'",
        "line-8": "line 8: custom_id 'good' is line 2's already",
    }


def test_the_id_of_a_bad_line_is_taken(llm: LLM) -> None:
    lines = (
        "{",
        {"custom_id": "line-1", "prompt": "hello"},
        {"custom_id": "b", "wrong": 1},
        {"custom_id": "b", "prompt": "x"},
    )
    errors = {name: result["error"] for name, result in run(llm, *lines).items()}
    assert errors.pop("line-2") == "line 2: custom_id 'line-1' is line 1's already"
    assert errors.pop("line-4") == "line 4: custom_id 'b' is line 3's already"
    assert list(errors) == ["line-1", "b"]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert parse_line('\ufeff{"prompt": "hello"}', 1, GREEDY).prompt == "hello"
    with pytest.raises(BatchLineError):
        parse_line('\ufeff{"prompt": "hello"}', 2, GREEDY)


def test_text_that_is_not_utf8_is_named(llm: LLM) -> None:
    (result,) = run(llm, {"prompt": "a\udcff"}).values()
    assert "text holds '\\udcff', which is no character" in result["error"]


def test_only_bad_lines_end_the_job_too(llm: LLM) -> None:
    results = run(llm, *["{"] * 50, {"prompt": "hello"})
    assert [result["error"] is None for result in results.values()] == [False] * 50 + [True]


def test_results_come_in_the_order_in_which_requests_end(llm: LLM) -> None:
    lengths = {"long": 20, "short": 2, "middle": 9}
    results = run(
        llm, *({"custom_id": name, "prompt": "x", "params": {"max_tokens": n}} for name, n in lengths.items())
    )
    assert list(results) == ["short", "middle", "long"]


def test_reads_ahead_no_more_than_two_batches(llm: LLM) -> None:
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield json.dumps({"prompt": "x"})

    output = io.StringIO()

    def stop(summary: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(llm, lines(), output, GREEDY, on_step=stop)
    assert taken == 2 * llm.engine.config.max_num_seqs
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.num_used == 0


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    params = {"n": 3, "max_tokens": 4, "ignore_eos": True, "logprobs": 1}
    (result,) = run(llm, {"prompt": "x", "params": params}).values()
    assert len(result["choices"]) == 3
    assert all(choice.keys() == {"text", "finish_reason", "logprobs"} for choice in result["choices"])
    assert result["text"] == result["choices"][0]["text"]
    assert result["usage"]["completion_tokens"] == 12


def test_logprobs_are_written_by_token_id(llm: LLM) -> None:
    (result,) = run(llm, {"prompt": "x", "params": {"logprobs": 2, "max_tokens": 3}}).values()
    assert len(result["logprobs"]) == 3
    for position in result["logprobs"]:
        assert 2 <= len(position) <= 3
        assert all(0 <= int(token_id) < 259 and value <= 0 for token_id, value in position.items())


def test_resuming_runs_only_what_has_no_result(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    requests = [{"custom_id": name, "prompt": name} for name in "abc"]
    whole = run(llm, *requests)
    # The job was killed while it wrote the second result.
    path.write_text(json.dumps(whole["a"]) + "\n" + json.dumps(whole["b"])[:20])
    done = finished_ids(path)
    assert done == {"a"}
    assert path.read_text() == json.dumps(whole["a"]) + "\n"
    with path.open("a") as output:
        summary = run_batch(llm, map(json.dumps, requests), output, GREEDY, skip_ids=done)
    assert (summary.num_done, summary.num_skipped, summary.num_failed) == (2, 1, 0)
    assert {r["custom_id"]: r for r in map(json.loads, path.read_text().splitlines())} == whole


@pytest.mark.parametrize("text", ["not a result\nnor this", "one line without an end", "[1]\n", '{"custom": 1}'])
def test_resuming_something_else_is_refused_and_leaves_it_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1 is no result of this command"):
        finished_ids(path)
    assert path.read_text() == text


def test_nothing_to_resume_from_is_a_new_job(tmp_path: Path) -> None:
    assert finished_ids(tmp_path / "none.jsonl") == set()
