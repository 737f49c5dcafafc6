"""The log line, the alerts and their hysteresis, on a simulated clock."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.degradation import Rung, SmallerChunks
from pagedattn.engine.engine import Engine
from pagedattn.engine.monitor import Alert, AlertRule, Condition, Latch
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.stats import Durations
from tests.engine.fake_model import Clock, run_to_end


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pagedattn"]


def test_a_line_says_what_the_interval_had(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pagedattn")
    engine = Clock().engine(log_interval=0.95, max_num_seqs=2, num_blocks=32)
    for token_id in (98, 99, 100):
        engine.add_request([token_id] * 6, greedy(30))
    for _ in range(10):
        engine.step()
    # Two of 6 + 10 tokens run, the last of which is not computed: 15 slots in 4 blocks of 4 each.
    (line,) = lines(caplog)
    assert line == (
        "1.0 s: 2 running, 1 waiting (6 tokens); KV blocks 25.0% used, their slots 93.8% filled; "
        "tokens/s 12.0 prompt, 20.0 generated; p50/p95/p99 ms of TTFT 100.0/100.0/100.0, "
        "inter-token 100.0/100.0/100.0, total -; 0 preemptions; prefix-cache hits 0.0%"
    )


def test_a_line_an_interval_each_of_its_own_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pagedattn")
    clock = Clock()
    engine = clock.engine(log_interval=0.95)
    engine.add_request([98] * 6, greedy(30))
    for step_seconds in (0.1, 0.2, 0.05):
        clock.step_seconds = step_seconds
        for _ in range(10):
            engine.step()
    gaps = [match[1] for line in lines(caplog) if (match := re.search(r"inter-token ([\d.]+)/", line))]
    assert len(gaps) == 3
    assert gaps == ["100.0", "200.0", "200.0"], "the first five of 0.05 s are not yet a line"


def test_a_line_names_the_state_of_a_degraded_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pagedattn")
    rung = Rung("smaller_chunks", Condition("num_waiting", enter=1, leave=0), SmallerChunks())
    engine = Clock().engine(log_interval=0.25, check_interval=0.05, degradation=(rung,), max_num_seqs=1)
    for _ in range(2):
        engine.add_request([98], greedy(4))
    run_to_end(engine)
    assert "degradation: the engine is in the state 'smaller_chunks' now" in caplog.messages
    assert "degradation: the engine is in the state 'normal' now" in caplog.messages
    degraded = [line.endswith("; degraded: smaller_chunks") for line in lines(caplog) if "running" in line]
    assert degraded == [True, False]


def test_an_idle_engine_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pagedattn")
    clock = Clock()
    engine = clock.engine(log_interval=1.0)
    for _ in range(100):
        clock.now += 1.0
        engine.step()
    assert not lines(caplog)
    engine.add_request([98], greedy(2))
    run_to_end(engine)
    clock.now += 1.0
    engine.step()
    assert len(lines(caplog)) == 1, "what came before the engine went idle is told"


def test_off_costs_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Clock().engine()

    def refuse(*_: Any) -> None:
        raise AssertionError("a snapshot was made")

    monkeypatch.setattr(Engine, "stats", refuse)
    engine.add_request([98], greedy(2))
    run_to_end(engine)


def test_distributions_since_a_snapshot_are_those_of_the_new_values() -> None:
    durations = Durations()
    for value in range(20_000):
        durations.append(float(value))
    assert durations.distribution(20_000) is None
    newest = durations.distribution(19_900)
    assert newest is not None
    assert (newest.count, newest.p50) == (100, np.percentile(np.arange(19_900, 20_000), 50))
    everything = durations.distribution()
    assert everything is not None
    assert everything.count == 16_384


def changes(condition: Condition, values: list[float | None]) -> list[tuple[int, bool]]:
    latch = Latch(condition)
    return [(second, latch.holds) for second, value in enumerate(values) if latch.update(float(second), value)]


def test_a_condition_changes_once_each_way() -> None:
    condition = Condition("num_waiting", enter=10, leave=5)
    assert changes(condition, [0, 9, 10, 50, 9, 6, 10, 6, 5, 0, 9, 10]) == [(2, True), (8, False), (11, True)]


def test_a_condition_has_to_hold() -> None:
    condition = Condition("num_waiting", enter=10, leave=5, hold=3.0)
    assert changes(condition, [10, 10, 10, 9, 10, 10, 10, 10, 0, 0, 6, 0, 0, 0, 0]) == [(7, True), (14, False)]


def test_what_was_not_measured_changes_nothing() -> None:
    condition = Condition("ttft_p99", enter=10, leave=5, hold=2.0)
    assert changes(condition, [10, None, 10, None, None, 0, None, 0]) == [(2, True), (7, False)]


def test_a_latency_spike_is_told_once_and_so_is_its_end() -> None:
    rule = AlertRule("slow", Condition("inter_token_latency_p99", enter=0.5, leave=0.2, hold=2.0))
    clock, told = Clock(), list[Alert]()
    engine = clock.engine(alerts=(rule,), on_alert=told.append)
    engine.add_request([98] * 6, greedy(200))
    for step_seconds, num_steps in ((0.1, 30), (0.6, 3), (0.1, 30), (0.6, 20), (0.3, 20), (0.1, 50)):
        clock.step_seconds = step_seconds
        for _ in range(num_steps):
            engine.step()
    assert [alert.is_active for alert in told] == [True, False], "the spike of 1.8 s is none, and 0.3 s is no end"
    assert told[0].value == pytest.approx(0.6)
    assert told[1].value == pytest.approx(0.1)


def test_a_growing_queue_is_told_and_an_engine_that_went_idle_ends_it() -> None:
    rules = (
        AlertRule("growing", Condition("queue_growth", enter=5, leave=0)),
        AlertRule("slow", Condition("ttft_p99", enter=0.05, leave=0.01)),
    )
    clock, told = Clock(), list[Alert]()
    engine = clock.engine(alerts=rules, on_alert=told.append, max_num_seqs=1)
    for _ in range(11):
        engine.add_request([98], greedy(1))
        engine.add_request([99], greedy(1))
        engine.step()
    assert [(alert.rule.name, alert.is_active) for alert in told] == [("growing", True), ("slow", True)]
    run_to_end(engine)
    for _ in range(3):
        clock.now += 1.0
        engine.step()
    assert [(alert.rule.name, alert.is_active) for alert in told[2:]] == [("growing", False), ("slow", False)]


def test_a_callback_may_use_the_engine_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    def react(alert: Alert) -> None:
        engine.add_request([98], greedy(1), request_id="from the callback")
        raise RuntimeError("no pager")

    rule = AlertRule("busy", Condition("num_waiting", enter=1, leave=0))
    engine = Clock().engine(alerts=(rule,), on_alert=react, max_num_seqs=1, check_interval=0.05)
    engine.add_request([98], greedy(3))
    engine.add_request([98], greedy(3))
    engine.step()
    assert "the callback for the alert 'busy' failed" in lines(caplog)
    assert engine.stats().num_waiting == 2
    engine.abort("from the callback")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "speed"}, "metric='speed' is not known: it must be one of num_waiting,"),
        ({"leave": 2.0}, "leave=2.0 is not allowed: it must be < enter=2.0"),
        ({"enter": float("nan")}, "enter=nan is not allowed: it must be a finite number"),
        ({"hold": -1.0}, "hold=-1.0 is not allowed: it must be >= 0"),
    ],
)
def test_bad_conditions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition(**{"metric": "num_waiting", "enter": 2.0, "leave": 1.0, **arguments})


@pytest.mark.parametrize(
    ("field", "value"),
    [("log_interval", 0), ("log_interval", float("inf")), ("check_interval", None), ("alerts", ["slow"])],
)
def test_bad_config(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* is not allowed: it must be"):
        EngineConfig(num_blocks=1, max_model_len=1, **{field: value})
