"""Request traces: ``TraceRequest``, and seeded generators of arrivals, lengths, clients and shared prefixes.

A trace is a list of ``TraceRequest`` sorted by arrival. What is generated follows from the parameters and the seed
alone, and the i-th request does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Arrivals = Literal["at-once", "poisson", "bursty", "on-off"]
ON_OFF_SECONDS = 30.0  # the mean time in each state of "on-off" arrivals
PREFIX_CHUNK_TOKENS = 512  # of a prefix id; Mooncake's traces count in these


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """``arrival_time``: seconds since the trace began. ``num_output_tokens``: how long the answer will be.

    ``max_tokens``: what the client allows, which is all that a scheduler knows beforehand. ``prefix_ids``: the prompt
    begins with these chunks of ``PREFIX_CHUNK_TOKENS`` tokens (the last cut to the prompt's length); equal ids are
    equal tokens. What is not covered by them is like no other request's.
    """

    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    client_id: str = ""
    prefix_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_time) and self.arrival_time >= 0):
            raise ValueError(f"arrival_time={self.arrival_time} is not allowed: it must be finite and >= 0")
        if self.num_prompt_tokens < 1:
            raise ValueError(f"num_prompt_tokens={self.num_prompt_tokens} is not allowed: it must be >= 1")
        if not 1 <= self.num_output_tokens <= self.max_tokens:
            raise ValueError(
                f"num_output_tokens={self.num_output_tokens} is not allowed: it must be 1 to max_tokens="
                f"{self.max_tokens}"
            )

    @staticmethod
    def answer_token_id(number: int) -> int:
        """What the ``number``-th request answers, again and again: like no other's answer, and no prompt's token."""
        return 3 * number + 2

    def prompt_token_ids(self, number: int) -> list[int]:
        """The prompt of the ``number``-th request: multiples of three are shared chunks, one more its own tokens."""
        token_ids: list[int] = []
        for prefix_id in self.prefix_ids:
            token_ids += [3 * prefix_id] * min(PREFIX_CHUNK_TOKENS, self.num_prompt_tokens - len(token_ids))
        token_ids += [3 * number + 1] * (self.num_prompt_tokens - len(token_ids))
        return token_ids


@dataclass(frozen=True)
class Lengths:
    """A workload's lengths. ``max_tokens``: what each client allows; outputs are clamped to it.

    ``shared_chunks``: every prompt begins with one of ``num_prefixes`` prefixes of that many chunks.
    ``num_clients``: client 0 sends as much as all the others together.
    """

    prompt: tuple[int, int]  # uniform, both ends included
    output_mean: float
    output_distribution: Literal["exponential", "lognormal", "uniform"]
    max_tokens: int
    num_prefixes: int = 0
    shared_chunks: int = 0
    num_clients: int = 1


LOGNORMAL_SIGMA = 1.6  # the longest percentile takes about half of all tokens

WORKLOADS: dict[str, Lengths] = {
    "low-variance": Lengths((16, 256), 128.0, "uniform", 1024),
    "exp": Lengths((16, 256), 128.0, "exponential", 1024),
    "heavy-tailed": Lengths((16, 1024), 256.0, "lognormal", 4096),
    "shared-prefix": Lengths((16, 128), 128.0, "exponential", 1024, num_prefixes=8, shared_chunks=4),
    "long-prompt": Lengths((4096, 12288), 32.0, "exponential", 256),
    "multi-tenant": Lengths((16, 512), 128.0, "exponential", 1024, num_clients=5),
}


def generate(
    workload: str | Lengths,
    num_requests: int,
    *,
    arrivals: str = "poisson",
    rate: float = 1.0,
    burstiness: float = 4.0,
    seed: int = 0,
    max_tokens: int | Literal["exact"] | None = None,
) -> list[TraceRequest]:
    """``num_requests`` requests with the lengths of a row of ``WORKLOADS``, or others, at ``rate`` a second on average.

    ``max_tokens``: what every client allows, which cuts longer answers; None is the workload's own limit, "exact" the
    length of the answer, as if it were known beforehand.
    ``burstiness``: see ``arrival_times``. Raises ValueError for a parameter out of range.
    """
    if isinstance(workload, str) and workload not in WORKLOADS:
        raise ValueError(f"workload={workload!r} is not known: it must be one of {', '.join(WORKLOADS)}")
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests} is not allowed: it must be >= 1")
    lengths = WORKLOADS[workload] if isinstance(workload, str) else workload
    limit = max_tokens if isinstance(max_tokens, int) else lengths.max_tokens
    if limit < 1:
        raise ValueError(f"max_tokens={limit} is not allowed: it must be >= 1")
    if seed < 0:
        raise ValueError(f"seed={seed} is not allowed: it must be >= 0")
    times = arrival_times(arrivals, num_requests, rate, burstiness, seed)
    random = np.random.default_rng([seed, 1])
    trace = []
    for arrival_time in times:
        num_own = int(random.integers(lengths.prompt[0], lengths.prompt[1] + 1))
        num_output = min(max(round(_output_length(random, lengths)), 1), limit)
        choice, client = random.random(2).tolist()
        prefix_ids: tuple[int, ...] = ()
        if lengths.num_prefixes:
            first = int(choice * lengths.num_prefixes) * lengths.shared_chunks
            prefix_ids = tuple(range(first, first + lengths.shared_chunks))
        trace.append(
            TraceRequest(
                arrival_time,
                num_own + PREFIX_CHUNK_TOKENS * len(prefix_ids),
                num_output,
                num_output if max_tokens == "exact" else limit,
                _client(client, lengths.num_clients),
                prefix_ids,
            )
        )
    return trace


def _output_length(random: np.random.Generator, lengths: Lengths) -> float:
    if lengths.output_distribution == "exponential":
        return float(random.exponential(lengths.output_mean))
    if lengths.output_distribution == "uniform":
        return float(random.uniform(0.5, 1.5)) * lengths.output_mean
    mu = math.log(lengths.output_mean) - LOGNORMAL_SIGMA**2 / 2
    return float(random.lognormal(mu, LOGNORMAL_SIGMA))


def _client(draw: float, num_clients: int) -> str:
    if num_clients == 1:
        return ""
    return "client-0" if draw < 0.5 else f"client-{1 + int((draw - 0.5) * 2 * (num_clients - 1))}"


def arrival_times(arrivals: str, num_requests: int, rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds, the first at 0, ``rate`` a second on average.

    "at-once": all at 0. "poisson". "bursty": gaps are gamma-distributed with a squared coefficient of variation of
    ``burstiness`` (1 is Poisson). "on-off": Poisson whose rate alternates between high and low, ``burstiness`` times
    apart, each for an exponential time of 30 seconds on average.
    """
    if arrivals not in get_args(Arrivals):
        raise ValueError(f"arrivals={arrivals!r} is not known: it must be one of {', '.join(get_args(Arrivals))}")
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} is not allowed: it must be a finite number > 0")
    return _arrival_times(arrivals, num_requests, rate, burstiness, np.random.default_rng([seed, 0]))


def _arrival_times(
    arrivals: str, num_requests: int, rate: float, burstiness: float, random: np.random.Generator
) -> Iterator[float]:
    now = 0.0
    # Of two equally long states whose mean is ``rate``; Poisson forgets, so a change may redraw the gap.
    high = 2.0 * rate * burstiness / (1.0 + burstiness)
    state_rate, state_end = high, float(random.exponential(ON_OFF_SECONDS))
    for number in range(num_requests):
        if number and arrivals == "poisson":
            now += float(random.exponential(1.0 / rate))
        elif number and arrivals == "bursty":
            now += float(random.gamma(1.0 / burstiness, burstiness / rate))
        elif number and arrivals == "on-off":
            while (gap := float(random.exponential(1.0 / state_rate))) > state_end - now:
                now = state_end
                state_end += float(random.exponential(ON_OFF_SECONDS))
                state_rate = 2.0 * rate - state_rate
            now += gap
        yield now


def at_load(trace: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests arriving ``factor`` times as fast."""
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"load={factor} is not allowed: it must be a finite number > 0")
    return [replace(request, arrival_time=request.arrival_time / factor) for request in trace]
