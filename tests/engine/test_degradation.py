"""The ladder under pressure: its states, and that each rung does what it says, on a simulated clock."""

from __future__ import annotations

from typing import Any

import pytest

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.degradation import Ladder, Rung, ShedLowest, SmallerChunks
from pagedattn.engine.engine import Engine
from pagedattn.engine.monitor import Condition
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduling_params import SchedulingParams
from tests.engine.fake_model import Clock, expected_tokens, run_to_end

CHUNKS = Rung("smaller_chunks", Condition("num_waiting", enter=10, leave=3), SmallerChunks(0.25))
SHED = Rung("shed_lowest", Condition("num_waiting", enter=20, leave=8), ShedLowest())


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def states(ladder: Ladder, num_waiting: list[int]) -> list[str]:
    result = []
    for second, value in enumerate(num_waiting):
        ladder.update(float(second), {"num_waiting": float(value)}.get)
        result.append(ladder.state)
    return result


def test_one_rung_at_a_look_up_and_down() -> None:
    ladder = Ladder((CHUNKS, SHED))
    assert states(ladder, [9, 50, 50, 50, 8, 4, 3, 0]) == [
        "normal",
        "smaller_chunks",
        "shed_lowest",
        "shed_lowest",
        "smaller_chunks",
        "smaller_chunks",
        "normal",
        "normal",
    ]
    assert ladder.num_changes == 4


def test_between_the_thresholds_nothing_changes() -> None:
    ladder = Ladder((CHUNKS, SHED))
    assert set(states(ladder, [4, 9] * 10)) == {"normal"}
    assert set(states(ladder, [10, *[9, 4, 19] * 10])) == {"smaller_chunks"}
    assert set(states(ladder, [20, *[9, 19] * 10])) == {"shed_lowest"}


def test_a_rung_has_to_be_earned_anew_after_a_change() -> None:
    """The time above the second threshold does not count before the first rung is taken."""
    first = Rung("first", Condition("num_waiting", enter=10, leave=3, hold=2.0), SmallerChunks())
    second = Rung("second", Condition("num_waiting", enter=10, leave=3, hold=2.0), ShedLowest())
    assert states(Ladder((first, second)), [10] * 7) == ["normal"] * 2 + ["first"] * 3 + ["second"] * 2


def test_what_was_pending_before_a_change_is_forgotten() -> None:
    """The second rung's condition was met for a second when the first one's ended: that second does not count later."""
    second = Rung("second", Condition("kv_cache_usage", enter=0.9, leave=0.5, hold=2.0), ShedLowest())
    ladder = Ladder((CHUNKS, second))
    measured = [(10, 0.0), (10, 1.0), (0, 1.0), (10, 0.0), (10, 1.0), (10, 1.0), (10, 1.0)]
    seen = []
    for time, (num_waiting, usage) in enumerate(measured):
        ladder.update(float(time), {"num_waiting": float(num_waiting), "kv_cache_usage": usage}.get)
        seen.append(ladder.state)
    first = CHUNKS.name
    assert seen == [first, first, "normal", first, first, first, "second"]


def test_lower_rungs_go_on_acting() -> None:
    ladder = Ladder((CHUNKS, SHED))
    assert (ladder.prompt_share, ladder.protected_priority) == (1.0, None)
    states(ladder, [50])
    assert (ladder.prompt_share, ladder.protected_priority) == (0.25, None)
    states(ladder, [50])
    assert (ladder.prompt_share, ladder.protected_priority) == (0.25, 0)


@pytest.mark.parametrize("policy", ["default", "splitfuse", "trtllm-max-utilization"])
def test_smaller_chunks_keep_decodes_fast_and_give_the_same_tokens(policy: str) -> None:
    """A step takes as long as its tokens are many: with prompts cut smaller the one that decodes waits less."""

    def slowest_token(degradation: tuple[Rung, ...]) -> float:
        clock = Clock()
        clock.step_seconds, clock.token_seconds = 0.001, 0.001
        engine = clock.engine(
            policy=policy,
            num_blocks=512,
            max_num_batched_tokens=64,
            max_num_seqs=4,
            degradation=degradation,
            check_interval=0.001,
            enable_prefix_caching=False,
        )
        decoding = engine.add_request([98] * 4, greedy(60))
        engine.step()
        expected = {decoding: expected_tokens([98] * 4, 60, ignore_eos=True)}
        for index in range(12):
            prompt = [97 + index] * 120
            expected[engine.add_request(prompt, greedy(1))] = expected_tokens(prompt, 1, ignore_eos=True)
        engine.step()  # the pressure shows at its end
        before = engine.stats()
        while decoding in engine._outputs.groups:
            engine.step()
        latencies = engine.stats(since=before).inter_token_latency
        assert latencies is not None
        assert engine.stats().degradation == ("smaller_chunks" if degradation else "normal")
        finished = run_to_end(engine)
        for name, output in finished.items():
            assert output.outputs[0].token_ids == expected[name]
        return latencies.p95

    pressed = Rung("smaller_chunks", Condition("num_waiting_tokens", enter=1, leave=-1), SmallerChunks(0.25))
    normal, degraded = slowest_token(()), slowest_token((pressed,))
    assert normal == pytest.approx(0.065, rel=0.1)  # 64 tokens
    assert degraded <= 0.001 + 0.001 * (0.25 * 64 + 4) + 1e-9


def test_prompts_advance_in_the_smallest_share() -> None:
    rung = Rung("smaller_chunks", Condition("num_waiting", enter=0, leave=-1), SmallerChunks(0.001))
    for policy in ("default", "splitfuse", "trtllm-max-utilization", "vllm"):
        engine = Clock().engine(degradation=(rung,), check_interval=0.01, policy=policy, max_num_batched_tokens=32)
        for index in range(6):
            engine.add_request([97 + index] * 20, greedy(5))
        assert len(run_to_end(engine)) == 6
        assert engine.stats().num_degradation_changes == 1


def tiers(engine: Engine, priorities: list[int], max_tokens: int = 50) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for priority in priorities:
        scheduling = SchedulingParams(priority=priority)
        name = engine.add_request([98] * 4, greedy(max_tokens), scheduling_params=scheduling)
        names.setdefault(priority, []).append(name)
    return names


def test_the_lowest_tier_is_shed_first_and_only_while_it_is_needed() -> None:
    rung = Rung("shed_lowest", Condition("num_waiting", enter=10, leave=5), ShedLowest())
    engine = Clock().engine(degradation=(rung,), check_interval=0.05, max_num_seqs=1, order="priority")
    names = tiers(engine, [0] * 3 + [1] * 3 + [2] * 8)
    (first, second) = (engine.step().outputs for _ in range(2))
    shed = [output.request_id for output in first if output.finished]
    assert sorted(shed) == sorted(names[2])
    assert all(output.outputs[0].finish_reason == "shed" for output in first if output.finished)
    assert all("priority 2 was the lowest" in str(output.error) for output in first if output.finished)
    assert not [output for output in second if output.finished], "5 wait: the pressure is gone"
    assert engine.stats().degradation == "normal"
    finished = run_to_end(engine)
    assert set(finished) == {*names[0], *names[1]}
    assert (engine.stats().num_shed, engine.stats().num_finished) == (8, 6)


def test_who_is_protected_or_has_run_is_not_shed() -> None:
    rung = Rung("shed_lowest", Condition("num_waiting", enter=1, leave=-1), ShedLowest(protected_priority=1))
    engine = Clock().engine(
        degradation=(rung,), check_interval=0.05, num_blocks=10, max_model_len=36, max_num_seqs=4, order="priority"
    )
    names = tiers(engine, [5, 5, 5], max_tokens=25)  # they run, and will be preempted
    engine.step()
    late = tiers(engine, [0, 1, 2, 3, 5], max_tokens=3)
    finished = run_to_end(engine)
    reasons = {name: output.outputs[0].finish_reason for name, output in finished.items()}
    assert engine.stats().num_preemptions > 0
    assert {reasons[name] for name in (*names[5], *late[0], *late[1])} == {"length"}
    assert "shed" in {reasons[name] for name in (*late[2], *late[3], *late[5])}
    assert len(finished) == 8


def test_the_last_request_may_be_shed_and_the_engine_is_idle() -> None:
    rung = Rung("shed_lowest", Condition("num_waiting", enter=1, leave=-1), ShedLowest(protected_priority=-1))
    engine = Clock().engine(degradation=(rung,), check_interval=0.05, max_num_seqs=1)
    tiers(engine, [0, 0], max_tokens=1)
    outputs = engine.step().outputs
    assert sorted(str(output.outputs[0].finish_reason) for output in outputs) == ["length", "shed"]
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degradation": [CHUNKS]}, "must be a tuple of Rung"),
        ({"degradation": (CHUNKS, CHUNKS)}, "each must be there once"),
        ({"degradation": (CHUNKS,), "policy": "static"}, "SmallerChunks is not allowed with policy='static'"),
    ],
)
def test_bad_ladders(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(num_blocks=1, max_model_len=1, **options)


def test_bad_rungs() -> None:
    with pytest.raises(ValueError, match=r"share=1\.0 is not allowed"):
        SmallerChunks(1.0)
    with pytest.raises(ValueError, match="protected_priority=None is not allowed"):
        ShedLowest(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name='normal' is not allowed"):
        Rung("normal", CHUNKS.condition, SmallerChunks())
