"""Who gets a request, seen from the outside, and what that does to replicas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from pagedattn.engine.config import EngineConfig
from pagedattn.engine.simulation.recorder import Recorder, ServiceLevel
from pagedattn.engine.simulation.router import LeastLoaded, PrefixAffinity, RoundRobin, make_router
from pagedattn.engine.simulation.simulator import simulate
from pagedattn.engine.simulation.step_time import FixedRate
from pagedattn.engine.simulation.traces import TraceRequest, generate


@dataclass
class Busy:
    num_unfinished: int
    num_prompt_tokens: int = 0


def request(*prefix_ids: int) -> TraceRequest:
    return TraceRequest(0.0, 2048, 1, 1, "", prefix_ids)


def test_round_robin_takes_turns() -> None:
    router = RoundRobin()
    assert [router.choose(request(), [Busy(9), Busy(0), Busy(0)]) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_counts_requests_then_prompts() -> None:
    router = LeastLoaded()
    assert router.choose(request(), [Busy(2), Busy(1), Busy(3)]) == 1
    assert router.choose(request(), [Busy(1, 900), Busy(1, 100), Busy(1, 500)]) == 1


def test_affinity_follows_the_longest_known_prefix() -> None:
    router = PrefixAffinity()
    assert router.choose(request(1, 2, 3), [Busy(1), Busy(0)]) == 1
    assert router.choose(request(7, 8), [Busy(0), Busy(1)]) == 0
    assert router.choose(request(1, 2, 9), [Busy(0), Busy(5)]) == 1
    assert router.choose(request(7, 2, 3), [Busy(5), Busy(0)]) == 0
    assert router.choose(request(5), [Busy(5), Busy(4)]) == 1, "nobody knows it: the least loaded"
    assert router.choose(request(), [Busy(0), Busy(4)]) == 0, "nothing to share: the least loaded"


def test_affinity_gives_way_to_load() -> None:
    router = PrefixAffinity(max_imbalance=1.5, slack=8)
    assert router.choose(request(1), [Busy(0), Busy(1)]) == 0
    assert router.choose(request(1), [Busy(23), Busy(10)]) == 0
    assert router.choose(request(1), [Busy(24), Busy(10)]) == 1
    assert router.choose(request(1), [Busy(0), Busy(5)]) == 0, "now both know it"


def test_affinity_forgets_the_oldest_chunks() -> None:
    router = PrefixAffinity(capacity=2)
    both = [Busy(0), Busy(0)]
    assert router.choose(request(1), both) == 0
    assert router.choose(request(1), [Busy(1), Busy(0)]) == 0
    router.choose(request(5, 6), [Busy(0), Busy(1)])
    assert router.choose(request(1), [Busy(1), Busy(0)]) == 1


@pytest.mark.parametrize("fields", [{"max_imbalance": 0.5}, {"slack": -1}, {"capacity": 0}])
def test_bad_limits_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="are not allowed"):
        PrefixAffinity(**fields)
    with pytest.raises(ValueError, match="router='random' is not known: it must be one of round-robin, least-loaded"):
        make_router("random")


def spread(name: str, trace: list[TraceRequest]) -> tuple[Counter[int], Recorder, float]:
    recorder = Recorder()
    config = EngineConfig(num_blocks=100_000, max_model_len=1 << 20, max_num_seqs=8)
    simulate(trace, config, FixedRate(10.0), recorder=recorder, router=make_router(name), num_replicas=4)
    latency = recorder.result(ServiceLevel(1.0, 1.0)).latency
    assert latency is not None
    return Counter(recorder.replicas), recorder, latency.mean


def test_replicas_share_the_work() -> None:
    trace = generate("exp", 400, rate=2.0, seed=2)
    counts, _, round_robin = spread("round-robin", trace)
    assert counts == dict.fromkeys(range(4), 100)
    _, _, least_loaded = spread("least-loaded", trace)
    assert least_loaded < 0.97 * round_robin, "knowing who is busy is worth something"


def test_affinity_keeps_prefixes_together() -> None:
    trace = generate("shared-prefix", 400, rate=1.0, seed=2)
    homes = {}
    for name in ("round-robin", "prefix-affinity"):
        _, recorder, _ = spread(name, trace)
        pairs = {(one.prefix_ids, replica) for one, replica in zip(trace, recorder.replicas, strict=True)}
        homes[name] = len(pairs) / 8
    assert homes["round-robin"] == 4.0
    assert homes["prefix-affinity"] < 2.5
    counts, _, _ = spread("prefix-affinity", trace)
    assert np.std(list(counts.values())) < 60, "and yet nobody does it all"
