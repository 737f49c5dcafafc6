"""The replay that the demo compares policies with, its figures, its picture, and the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagedattn.engine import cli, live_view
from pagedattn.engine.demo import load_questions, make_arrivals
from pagedattn.engine.llm import LLM
from pagedattn.engine.replay import Arrival, Replay, replay, summarize
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.timeline import draw_timeline, spans
from tests.engine.fake_model import expected_tokens, fake_engine

# Two short answers and a long one in a batch of three, then a late one: static holds two slots and makes the last wait.
LENGTHS = (2, 12, 3, 4)


def arrivals() -> list[Arrival]:
    return [
        Arrival(
            0.0,
            f"question {index}",
            [65 + index] * 9,
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True),
        )
        for index, length in enumerate(LENGTHS)
    ]


def run(policy: str) -> Replay:
    return replay(fake_engine(policy=policy, max_num_seqs=3), policy, arrivals())


@pytest.mark.parametrize("policy", ["default", "static"])
def test_every_arrival_gets_its_answer(policy: str) -> None:
    seen: list[int] = []
    engine = fake_engine(policy=policy, max_num_seqs=3)
    record = replay(engine, policy, arrivals(), lambda so_far: seen.append(so_far.num_finished))
    engine.check_integrity()
    assert [answer.num_tokens for answer in record.answers] == list(LENGTHS)
    assert seen[-1] == len(LENGTHS)
    assert len(seen) == len(record.steps)
    for answer, length in zip(record.answers, LENGTHS, strict=True):
        assert answer.finish_reason == "length"
        assert answer.first_token_time is not None
        assert answer.finished_time is not None
        assert 0 < answer.first_token_time <= answer.finished_time
        expected = expected_tokens(answer.arrival.prompt_token_ids, length, ignore_eos=True)
        assert answer.text == "".join(chr(token) for token in expected if token < 256)


def test_static_holds_slots_that_default_gives_on() -> None:
    static, default = run("static"), run("default")
    assert len(static.steps) == LENGTHS[1] + LENGTHS[3]
    assert len(default.steps) == LENGTHS[1]
    assert not any(step.held for step in default.steps)
    # Request 0 ends at step 2 and request 2 at step 3, and both keep their slots until request 1 ends at step 12.
    assert [set(step.held.values()) for step in static.steps[:4]] == [set(), set(), {0}, {0, 2}]
    assert static.steps[11].held == {0: 0, 2: 2}
    assert static.steps[11].active == {1: 1}
    # The fourth request takes the slot of the first that ended.
    assert [step.active.get(0) for step in default.steps[:7]] == [0, 0, 3, 3, 3, 3, None]
    for step in [*static.steps, *default.steps]:
        assert not set(step.active) & set(step.held)
        assert max([*step.active, *step.held]) < 3


def test_figures_of_a_known_record() -> None:
    record = run("static")
    # Steps of one second: all figures follow from the lengths.
    record.steps = [replace(step, start=float(i), end=i + 1.0) for i, step in enumerate(record.steps)]
    for answer, first, last in zip(record.answers, (1, 1, 1, 13), (2, 12, 3, 16), strict=True):
        answer.first_token_time, answer.finished_time = float(first), float(last)
    summary = summarize(record)
    assert summary.seconds == 16
    assert summary.num_generated_tokens == sum(LENGTHS)
    assert summary.tokens_per_second == sum(LENGTHS) / 16
    assert summary.ttft.mean == (1 + 1 + 1 + 13) / 4
    assert summary.latency.p50 == (3 + 12) / 2
    assert summary.slot_utilization == pytest.approx(sum(LENGTHS) / (16 * 3))
    # Each of the first batch's decode steps has three rows; of these the ended ones' are padding.
    num_padding = 3 * (LENGTHS[1] - 1) - (1 + 11 + 2)
    num_computed = 3 * 9 + (1 + 11 + 2) + 9 + 3
    assert summary.padding_share == num_padding / (num_padding + num_computed)
    assert summary.num_failed == 0


def test_kv_utilization_is_better_on_demand() -> None:
    static, default = summarize(run("static")), summarize(run("default"))
    assert static.max_wasted_slots > default.max_wasted_slots
    assert default.max_wasted_slots < default.block_size
    assert static.kv_utilization < default.kv_utilization <= 1


def test_waste_of_a_block_under_an_on_demand_policy_is_loud() -> None:
    engine = fake_engine(max_num_seqs=3)
    ensure = engine.block_manager.ensure

    def generous(holder: object, num_tokens: int) -> bool:
        return ensure(holder, num_tokens + engine.config.block_size)

    engine.block_manager.ensure = generous  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="KV slots of one sequence unfilled"):
        replay(engine, "default", arrivals())


def test_spans_join_steps_and_split_at_gaps() -> None:
    steps = [
        SimpleNamespace(start=float(i), end=i + 1.0, active=active, held={})
        for i, active in enumerate([{0: 7}, {0: 7, 1: 8}, {1: 8}, {0: 7}])
    ]
    assert spans(steps, held=False) == {(0, 7): [(0.0, 2.0), (3.0, 1.0)], (1, 8): [(1.0, 2.0)]}
    assert spans(steps, held=True) == {}


def test_timeline_is_a_png(tmp_path: Path) -> None:
    draw_timeline([run("static"), run("default")], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_live_screen_shows_slots_and_queue() -> None:
    from rich.console import Console

    record = run("static")
    record.steps = record.steps[:3]
    console = Console(width=140, record=True, force_terminal=False)
    console.print(live_view.RichView()._screen(record))
    text = console.export_text()
    assert "policy static" in text
    assert "1 waiting" in text
    assert text.count("question") >= 4  # the heading and three slots
    assert f"{record.steps[-1].usage.num_used_blocks}/64" in text


def test_plain_view_prints_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with live_view.PlainView() as view:
        record = replay(fake_engine(max_num_seqs=3), "default", arrivals(), view)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[default]")
    assert f"done {len(LENGTHS)}/{len(LENGTHS)}" in lines[-1]
    assert len(lines) < len(record.steps)


def test_arrivals_are_seeded_and_do_not_depend_on_their_number() -> None:
    llm = LLM("random", max_num_seqs=2, num_blocks=64, device="cpu")
    many, few, other = make_arrivals(llm, 40, 2.0, 0), make_arrivals(llm, 5, 2.0, 0), make_arrivals(llm, 5, 2.0, 1)
    assert many[:5] == few
    assert [a.time for a in other] != [a.time for a in few]
    assert many[0].time == 0
    assert all(earlier.time < later.time for earlier, later in itertools.pairwise(many))
    assert len({arrival.question for arrival in many}) == len(load_questions()) == 32
    lengths = [arrival.params.max_tokens or 0 for arrival in many]
    assert 8 <= min(lengths) < max(lengths) <= 128


def test_command_compares_policies_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--model", "random", "--device", "cpu", "--num-requests", "6", "--rate", "1000"]
    assert cli.main([*arguments, "--max-num-seqs", "3", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "static" in out
    assert "latency p99, s" in out
    assert "answers that are the same under every policy: 6 of 6" in out
    assert "policy default: at each of " in out
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    results = json.loads((tmp_path / "results.json").read_text())
    assert [summary["policy"] for summary in results["policies"]] == ["static", "default"]
    assert [len(requests) for requests in results["requests"].values()] == [6, 6]
    static, default = results["policies"]
    assert default["num_steps"] < static["num_steps"]
    assert default["padding_share"] == 0 < static["padding_share"]

    assert results["options"] == {"device": "cpu", "max_num_seqs": 3, "num_blocks": 256}

    arguments += ["--json", "--policies", "default", "--batch-invariant"]
    assert cli.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["policies"][0]["policy"] == "default"
    assert results["options"]["batch_invariant"]
