"""Generated traces, and the public formats."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.engine.simulation.trace_files import read_trace
from pagedattn.engine.simulation.traces import (
    PREFIX_CHUNK_TOKENS,
    WORKLOADS,
    TraceRequest,
    arrival_times,
    at_load,
    generate,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,0
2024-05-10 00:00:00.009930+00:00,2162,5
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
"""
BURSTGPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
9.5,b,1.5,GPT-4,20,5,25,Conversation log
7.0,a,1.0,GPT-4,10,4,14,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 513, "output_length": 490, "hash_ids": [0, 14]}
{"timestamp": 3052, "input_length": 80, "output_length": 3}
"""


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("arrivals", ["at-once", "poisson", "bursty", "on-off"])
def test_a_trace_follows_from_its_seed_and_not_from_its_length(workload: str, arrivals: str) -> None:
    many = generate(workload, 60, arrivals=arrivals, rate=3.0, seed=4)
    assert generate(workload, 60, arrivals=arrivals, rate=3.0, seed=4) == many
    assert generate(workload, 7, arrivals=arrivals, rate=3.0, seed=4) == many[:7]
    assert generate(workload, 60, arrivals=arrivals, rate=3.0, seed=5) != many
    assert many[0].arrival_time == 0.0
    assert all(one.arrival_time <= after.arrival_time for one, after in itertools.pairwise(many))
    lengths = WORKLOADS[workload]
    assert all(1 <= one.num_output_tokens <= one.max_tokens == lengths.max_tokens for one in many)


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "variation"), [("poisson", 4.0, 1.0), ("bursty", 1.0, 1.0), ("bursty", 9.0, 9.0)]
)
def test_gaps_have_the_rate_and_the_variation_asked_for(arrivals: str, burstiness: float, variation: float) -> None:
    gaps = np.diff(list(arrival_times(arrivals, 40_000, 5.0, burstiness, 0)))
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variation, rel=0.1)


def test_on_off_arrivals_have_two_rates() -> None:
    times = np.array(list(arrival_times("on-off", 100_000, 20.0, 9.0, 0)))
    assert len(times) / times[-1] == pytest.approx(20.0, rel=0.1)
    counts = np.bincount(times.astype(int))
    # 36 and 4 a second, for half of the time each; in between there is next to nothing.
    assert np.mean(counts < 14) == pytest.approx(0.5, abs=0.08)
    assert np.mean((counts >= 14) & (counts <= 20)) < 0.05
    assert np.mean(counts[counts > 20]) == pytest.approx(36, rel=0.05)


def test_lengths_are_those_of_the_workload() -> None:
    outputs = {
        name: np.array([one.num_output_tokens for one in generate(name, 20_000, max_tokens=10**9)])
        for name in ("low-variance", "exp", "heavy-tailed")
    }
    assert outputs["low-variance"].mean() == pytest.approx(128, rel=0.02)
    assert outputs["low-variance"].max() <= 192
    assert outputs["exp"].mean() == pytest.approx(128, rel=0.02)
    assert outputs["exp"].std() == pytest.approx(128, rel=0.03)
    assert outputs["heavy-tailed"].mean() == pytest.approx(256, rel=0.1)
    longest = np.sort(outputs["heavy-tailed"])[::-1]
    assert longest[:1000].sum() > 0.45 * longest.sum(), "a twentieth of the requests has about half of the tokens"


def test_what_the_client_allows() -> None:
    limited = generate("exp", 200, max_tokens=50)
    assert {one.max_tokens for one in limited} == {50}
    assert max(one.num_output_tokens for one in limited) == 50
    assert all(one.max_tokens == one.num_output_tokens for one in generate("exp", 50, max_tokens="exact"))


def test_one_client_sends_half() -> None:
    counts = Counter(one.client_id for one in generate("multi-tenant", 10_000))
    assert sorted(counts) == [f"client-{number}" for number in range(5)]
    assert counts["client-0"] == pytest.approx(5000, rel=0.05)
    assert counts["client-3"] == pytest.approx(1250, rel=0.1)


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    trace = generate("shared-prefix", 40)
    prompts = [one.prompt_token_ids(number) for number, one in enumerate(trace)]
    assert len({one.prefix_ids for one in trace}) == 8
    for (one, prompt), (other, another) in itertools.combinations(zip(trace, prompts, strict=True), 2):
        common = next(
            (at for at, (a, b) in enumerate(zip(prompt, another, strict=False)) if a != b),
            min(map(len, (prompt, another))),
        )
        assert common == (4 * PREFIX_CHUNK_TOKENS if one.prefix_ids == other.prefix_ids else 0)


@settings(max_examples=50, deadline=None)
@given(
    num_tokens=st.integers(1, 3000),
    prefix_ids=st.lists(st.integers(0, 10**6), max_size=4),
    number=st.integers(0, 10**6),
)
def test_a_prompt_has_its_length(num_tokens: int, prefix_ids: list[int], number: int) -> None:
    request = TraceRequest(0.0, num_tokens, 1, 1, "", tuple(prefix_ids))
    prompt = request.prompt_token_ids(number)
    assert len(prompt) == num_tokens
    num_shared = min(num_tokens, PREFIX_CHUNK_TOKENS * len(prefix_ids))
    assert all(token % 3 == 0 for token in prompt[:num_shared])
    assert prompt[num_shared:] == [3 * number + 1] * (num_tokens - num_shared)


def test_load_squeezes_the_arrivals() -> None:
    trace = generate("exp", 20)
    assert [one.arrival_time for one in at_load(trace, 2.0)] == [one.arrival_time / 2 for one in trace]
    with pytest.raises(ValueError, match="load=0 is not allowed"):
        at_load(trace, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": "chat"}, "workload='chat' is not known: it must be one of low-variance, exp"),
        ({"arrivals": "regular"}, "arrivals='regular' is not known: it must be one of at-once, poisson"),
        ({"num_requests": 0}, "num_requests=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"rate": 0.0}, r"rate=0\.0 is not allowed"),
        ({"burstiness": float("inf")}, "burstiness=inf is not allowed"),
        ({"max_tokens": 0}, "max_tokens=0 is not allowed"),
    ],
)
def test_bad_parameters_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"workload": "exp", "num_requests": 5, **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1.0, 1, 1, 1), r"arrival_time=-1\.0 is not allowed"),
        ((float("nan"), 1, 1, 1), "arrival_time=nan is not allowed"),
        ((0.0, 0, 1, 1), "num_prompt_tokens=0 is not allowed"),
        ((0.0, 1, 0, 1), "num_output_tokens=0 is not allowed"),
        ((0.0, 1, 2, 1), "num_output_tokens=2 is not allowed: it must be 1 to max_tokens=1"),
    ],
)
def test_a_request_has_a_prompt_and_an_answer(fields: tuple[float, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TraceRequest(*fields)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    return path


def test_azure(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, AZURE))
    assert (found.format, found.num_skipped) == ("azure", 1)
    first, second, third = found.requests
    assert first == TraceRequest(0.0, 374, 44, 44)
    assert second.arrival_time == pytest.approx(4.314579, abs=1e-6)
    assert third.arrival_time == pytest.approx(176 * 86_400 - (18 * 3600 + 15 * 60 + 46.68059) + 0.00993, abs=1e-5)


def test_burstgpt(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, BURSTGPT), max_tokens=100)
    assert (found.format, found.num_skipped) == ("burstgpt", 1)
    assert found.requests == [TraceRequest(0.0, 472, 18, 100), TraceRequest(40.0, 1087, 230, 230)]


def test_burstgpt_with_sessions_is_sorted(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, BURSTGPT_3))
    assert found.requests == [TraceRequest(0.0, 10, 4, 4, "a"), TraceRequest(2.5, 20, 5, 5, "b")]


def test_mooncake(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, MOONCAKE))
    assert (found.format, found.num_skipped) == ("mooncake", 0)
    first, second, third = found.requests
    assert first == TraceRequest(0.0, 1100, 500, 500, "", (0, 1, 2))
    assert second.arrival_time == third.arrival_time == 3.052
    assert first.prompt_token_ids(0)[:512] == second.prompt_token_ids(1)[:512]
    assert first.prompt_token_ids(0)[512] != second.prompt_token_ids(1)[512]


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, MOONCAKE), limit=2).requests) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no trace: its first line is neither"),
        ("a,b\n1,2\n", "is no trace: its first line is neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no request with a prompt and an answer"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: Invalid isoformat string"),
        (AZURE + "2024-05-10 00:00:00.1,1.5,2\n", r"line 6: '1\.5' is no number of tokens"),
        (BURSTGPT + "7,ChatGPT,-3,1,0,API log\n", "line 5: '-3' is no number of tokens"),
        (BURSTGPT + "soon,ChatGPT,3,1,0,API log\n", "line 5: could not convert string to float: 'soon'"),
        (BURSTGPT + "nan,ChatGPT,3,1,0,API log\n", "line 5: nan is no time"),
        (BURSTGPT + "inf,ChatGPT,3,1,0,API log\n", "line 5: inf is no time"),
        (BURSTGPT + "7,ChatGPT,1e12,1,0,API log\n", "line 5: '1e12' is no number of tokens"),
        (BURSTGPT + "7,ChatGPT\n", "line 5: '' is no number of tokens"),
        (BURSTGPT + f"7,ChatGPT,3,1,0,{'x' * 200_000}\n", "is not CSV: field larger than field limit"),
        ("ContextTokens,GeneratedTokens,TIMESTAMP\n1,2\n", "line 2: Invalid isoformat string"),
        (MOONCAKE + f'{{"timestamp": 1{"0" * 400}}}\n', "line 4: int too large to convert to float"),
        (MOONCAKE + f'{{"timestamp": 1{"0" * 5000}}}\n', "line 4: not JSON that can be read: Exceeds the limit"),
        (MOONCAKE + f'{{"timestamp": {"[" * 200_000}\n', "line 4: not JSON that can be read: maximum recursion"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 4: 'input_length' is missing"),
        (MOONCAKE + "{\n", "line 4: not JSON"),
        (MOONCAKE + "[1]\n", "line 4: a request must be an object, not list"),
        (MOONCAKE.replace("[0, 14]", '["a"]'), "line 2: hash_ids must be a list of ints >= 0"),
    ],
)
def test_what_is_no_trace_says_why(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(written(tmp_path, text))


def test_a_binary_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_trace(path)


def test_large_hash_ids_are_fine(tmp_path: Path) -> None:
    ids = [[2**63, 182_790, 7], [2**63, 5]]
    lines = [json.dumps({"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": some}) for some in ids]
    one, other = (request.prefix_ids for request in read_trace(written(tmp_path, "\n".join(lines))).requests)
    assert len(one) == len(other) == 2, "ids past the prompt's end are left out"
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert max(*one, *other) < 10, "they are numbered, as token ids are made of them"
