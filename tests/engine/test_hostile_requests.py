"""What a client may choose (priority, salt, names, times) and what a predictor may answer: they break nobody else."""

from __future__ import annotations

import math

import pytest

from pagedattn.engine.block_manager import BlockManager
from pagedattn.engine.length_predictor import MeanLengthPredictor, expected_output_tokens
from pagedattn.engine.orders import ORDERS, QueueOrder, make_queue
from pagedattn.engine.policy import POLICIES
from pagedattn.engine.request import Request
from pagedattn.engine.sampling_params import SamplingParams
from pagedattn.engine.scheduler import Scheduler
from pagedattn.engine.scheduling_params import MAX_PRIORITY, SchedulingParams
from pagedattn.engine.waiting_queue import FairQueue
from tests.engine.fake_model import fake_engine, run_to_end
from tests.engine.scheduler_run import SchedulerRun, make_request


class Guess(MeanLengthPredictor):
    """Answers the same always; raises what is an exception."""

    def __init__(self, answer: float | Exception) -> None:
        super().__init__()
        self.answer = answer

    def predict(self, request: Request) -> float:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("order", ORDERS)
def test_extreme_priorities_are_an_order_like_others(order: str) -> None:
    engine = fake_engine(order=order)
    for priority in (MAX_PRIORITY, 0, -MAX_PRIORITY):
        engine.add_request(
            [98, 99], SamplingParams(max_tokens=3), scheduling_params=SchedulingParams(priority=priority)
        )
    assert len(run_to_end(engine)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"priority": MAX_PRIORITY + 1}, "priority must be an int of at most 2147483647 either way"),
        ({"priority": -(10**400)}, "priority must be an int of at most"),
        ({"timeout": 10**400}, "timeout=1000"),
        ({"timeout": math.nan}, "timeout=nan is not allowed"),
        ({"first_token_timeout": math.inf}, "first_token_timeout=inf is not allowed"),
        ({"first_token_timeout": 0}, "first_token_timeout=0 is not allowed"),
    ],
)
def test_numbers_that_are_too_large_say_so(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulingParams(**change)


@pytest.mark.timeout(15)  # a second; minutes if each were compared with all others
def test_many_priorities_cost_what_few_do() -> None:
    queue = make_queue(ORDERS["priority-fair"], MeanLengthPredictor())
    requests = [make_request(str(index), 2, 2, priority=-index) for index in range(60_000)]
    for request in requests:
        queue.add(request)
    assert [queue.take(0.0) for _ in requests] == requests[::-1]


def test_a_salt_may_be_any_string() -> None:
    engine = fake_engine()
    prompt = {"prompt_token_ids": [98] * 9, "cache_salt": "\ud800"}
    for _ in range(2):
        engine.add_request(prompt, SamplingParams(max_tokens=2))  # type: ignore[arg-type]
        run_to_end(engine)
    assert engine.stats().prefix_cache_hits == 8


@pytest.mark.parametrize("arrival_time", [math.nan, math.inf, -math.inf])
def test_an_arrival_at_no_time_is_refused(arrival_time: float) -> None:
    engine = fake_engine()
    with pytest.raises(ValueError, match=r"arrival_time=.* is not allowed: it must be a finite number of seconds"):
        engine.add_request([98], arrival_time=arrival_time)
    assert not engine.has_unfinished
    engine.check_integrity()


@pytest.mark.parametrize("order", [QueueOrder(by="length", max_wait=1.0), QueueOrder(by="length", tiers=True)])
def test_a_predictor_that_raises_leaves_the_queue_as_it_was(order: QueueOrder) -> None:
    predictor = Guess(5.0)
    scheduler = Scheduler(
        BlockManager(16, 4, enable_prefix_caching=True),
        POLICIES["default"],
        max_num_seqs=4,
        max_num_batched_tokens=16,
        order=order,
        predictor=predictor,
    )
    run = SchedulerRun(scheduler)
    run.add(make_request("a", 4, 2))
    predictor.answer = ZeroDivisionError("no idea")
    with pytest.raises(ZeroDivisionError):
        run.add(make_request("b", 4, 2, timeout=5))
    scheduler.check_integrity()
    assert [request.request_id for request in scheduler.waiting] == ["a"]
    assert scheduler.queue_size == (1, 4)
    while scheduler.has_unfinished:
        run.step()
    assert [request.request_id for request in run.ended] == ["a"]


@pytest.mark.parametrize("answer", [math.nan, -3.0, math.inf])
def test_no_guess_at_all_counts_as_the_longest_answer(answer: float) -> None:
    assert expected_output_tokens(make_request("a", 4, 7), Guess(answer)) == 7.0


def test_who_takes_the_name_of_a_sequence_that_ended_is_not_forked_from() -> None:
    """ "a#1" is the second sequence of "a", and anybody's name once that one has ended."""
    manager = BlockManager(16, 4)
    ended, waits = make_request("a#1", 10, 5), make_request("a#2", 10, 5)
    ended.siblings, waits.siblings = [waits], [ended]
    stranger = make_request("a#1", 12, 5, prefix=7)
    for request in (ended, stranger):
        assert manager.ensure(request, 12)
        manager.take_transfers()
        request.num_computed_tokens = request.num_tokens
        manager.commit(request)
        prefix = manager.find_prefix(waits)
        assert prefix is not None
        assert prefix.num_tokens == (9 if request is ended else 0)
        if request is ended:
            manager.free(ended)


def test_a_client_forgotten_while_it_runs_does_not_come_back_as_the_poorest() -> None:
    queue = FairQueue({})
    runs = make_request("runs", 10, 5, client_id="quiet")
    queue.add(runs)
    assert queue.take(0.0) is runs
    queue.joined(runs)
    queue.add(make_request("busy", 10, 5, client_id="busy"))
    for _ in range(50):
        queue.served(make_request("busy", 10, 5, client_id="busy"))
    for number in range(1100):  # so many that who has had no more than the others is forgotten
        passing = make_request(str(number), 1, 1, client_id=f"passing {number}")
        queue.add(passing)
        queue.remove(passing)
    assert "quiet" not in queue._counters
    queue.served(runs)
    assert queue.counter("quiet") > queue.counter("busy")
