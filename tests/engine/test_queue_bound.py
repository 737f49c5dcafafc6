"""The bounded queue: who is refused, and when it is told to come again."""

from __future__ import annotations

from typing import Any

import pytest

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.engine import Engine
from pagedattn.engine.queue_bound import (
    DEFAULT_RETRY_SECONDS,
    MAX_RETRY_SECONDS,
    QueueBound,
    QueueFullError,
    QueueSize,
)
from pagedattn.engine.sampling_params import SamplingParams
from tests.engine.fake_model import expected_tokens, fake_engine, run_to_end

ONE = QueueSize(1, 10)


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)


def refusal(bound: QueueBound, now: float, waiting: QueueSize, request: QueueSize = ONE) -> float | None:
    """``retry_after``, None when the request is not refused."""
    try:
        bound.check(now, waiting, request)
    except QueueFullError as error:
        return error.retry_after
    return None


def draining(bound: QueueBound, seconds: int, *, per_second: int, num_waiting: int) -> QueueSize:
    """A queue that starts with ``num_waiting`` of ten tokens each, after so many seconds at that rate."""
    bound.accept(QueueSize(num_waiting, 10 * num_waiting))
    for second in range(seconds + 1):
        waiting = num_waiting - second * per_second
        bound.observe(float(second), QueueSize(waiting, 10 * waiting))
    return QueueSize(waiting, 10 * waiting)


@pytest.mark.parametrize(("max_requests", "max_tokens"), [(4, None), (None, 40), (4, 40)])
def test_the_bound_is_exact(max_requests: int | None, max_tokens: int | None) -> None:
    bound = QueueBound(max_requests, max_tokens)
    assert bound.is_bounded
    assert refusal(bound, 0.0, QueueSize(3, 30)) is None
    assert refusal(bound, 0.0, QueueSize(4, 40)) == DEFAULT_RETRY_SECONDS
    assert refusal(bound, 0.0, QueueSize(3, 30), QueueSize(2, 20)) == DEFAULT_RETRY_SECONDS


def test_an_empty_queue_takes_any_one_request() -> None:
    assert refusal(QueueBound(2, 20), 0.0, QueueSize(0, 0), QueueSize(5, 500)) is None
    assert not QueueBound(None, None).is_bounded


def test_retry_after_is_what_is_missing_over_the_rate_of_draining() -> None:
    bound = QueueBound(50, None)
    waiting = draining(bound, 10, per_second=5, num_waiting=100)
    assert waiting.num_seqs == 50
    assert refusal(bound, 10.0, waiting) == pytest.approx(1 / 5)
    assert refusal(bound, 10.0, waiting, QueueSize(10, 100)) == pytest.approx(10 / 5)


def test_retry_after_follows_the_tighter_bound() -> None:
    bound = QueueBound(50, 300)
    waiting = draining(bound, 10, per_second=5, num_waiting=100)
    assert refusal(bound, 10.0, waiting) == pytest.approx((500 + 10 - 300) / 50)


def test_the_rate_is_the_recent_one() -> None:
    """200 a second at first, then one: after the window only the slow rate counts."""
    bound = QueueBound(20, None)
    bound.accept(QueueSize(2000, 2000))
    waiting = 2000
    for second in range(100):
        waiting -= 200 if second < 9 else 1
        bound.observe(float(second), QueueSize(waiting, waiting))
    assert refusal(bound, 99.0, QueueSize(waiting, waiting), QueueSize(1, 1)) == MAX_RETRY_SECONDS
    near = QueueBound(waiting, None)
    near._accepted, near._samples = bound._accepted, bound._samples
    assert refusal(near, 99.0, QueueSize(waiting, waiting), QueueSize(1, 1)) == pytest.approx(1.0)


def test_a_queue_that_stands_still_says_the_most() -> None:
    bound = QueueBound(5, None)
    waiting = draining(bound, 10, per_second=0, num_waiting=5)
    assert refusal(bound, 10.0, waiting) == MAX_RETRY_SECONDS


def test_an_idle_time_does_not_slow_the_rate() -> None:
    bound = QueueBound(50, None)
    bound.accept(QueueSize(1, 10))
    bound.observe(0.0, QueueSize(1, 10))
    for second in range(1, 15):
        bound.observe(float(second), QueueSize(0, 0))
    bound.accept(QueueSize(100, 1000))
    for second in range(11):
        bound.observe(15.0 + second, QueueSize(100 - 5 * second, 1000))
    assert refusal(bound, 25.0, QueueSize(50, 1000)) == pytest.approx(1 / 5)


def fill(engine: Engine, count: int) -> int:
    """How many of ``count`` requests were taken; the others were refused as full."""
    num_taken = 0
    for _ in range(count):
        try:
            engine.add_request([97, 98, 99], greedy(4))
        except QueueFullError:
            continue
        num_taken += 1
    return num_taken


@pytest.mark.parametrize("bound", [{"max_waiting_requests": 5}, {"max_waiting_tokens": 17}])
def test_the_engine_refuses_and_keeps_nothing(bound: dict[str, int]) -> None:
    engine = fake_engine(max_num_seqs=2, **bound)
    assert fill(engine, 20) == 5
    before = engine.stats()
    assert fill(engine, 3) == 0
    assert engine.stats() == before
    engine.step()
    assert engine.stats().num_waiting == 3
    assert fill(engine, 10) == 2
    finished = run_to_end(engine)
    assert len(finished) == 7
    assert {tuple(output.outputs[0].token_ids) for output in finished.values()} == {
        tuple(expected_tokens([97, 98, 99], 4, ignore_eos=True))
    }
    assert fill(engine, 1) == 1, "an idle engine takes requests again"


def test_sequences_of_one_request_count_each() -> None:
    engine = fake_engine(max_num_seqs=4, max_waiting_requests=4)
    engine.add_request([97], greedy(2, n=3))
    with pytest.raises(QueueFullError, match="max_waiting_requests=4"):
        engine.add_request([97], greedy(2, n=2))
    engine.add_request([97], greedy(2))
    assert engine.stats().num_waiting == 4


def test_who_is_refused_does_not_change_the_others_seeds() -> None:
    def seeds(num_refused: int) -> list[int]:
        engine = fake_engine(max_waiting_requests=1)
        engine.add_request([97], greedy(2))
        for _ in range(num_refused):
            with pytest.raises(QueueFullError):
                engine.add_request([97], greedy(2))
        engine.step()
        engine.add_request([97], greedy(2))
        return [request.seed for request in (*engine.scheduler.running, *engine.scheduler.waiting)]

    assert seeds(0) == seeds(3)


def test_tokens_that_wait_are_counted_through_preemptions_and_aborts() -> None:
    """``run_to_end`` compares the count with the queue after every step."""
    engine = fake_engine(num_blocks=8, block_size=4, max_model_len=32, max_waiting_tokens=1000)
    names = [engine.add_request([97 + index] * 6, greedy(20)) for index in range(6)]
    engine.abort(names[5])
    run_to_end(engine)
    assert engine.stats().num_preemptions > 0
    assert engine.scheduler.num_waiting_tokens == 0


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "9"])
@pytest.mark.parametrize("name", ["max_waiting_requests", "max_waiting_tokens"])
def test_bad_bounds(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed: it must be an int >= 1 or None"):
        EngineConfig(num_blocks=1, max_model_len=1, **{name: value})
