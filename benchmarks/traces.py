"""Seeded request traces for engine comparisons (pure functions: numpy only).

Every engine reads the same list, so the numbers are comparable. A request is a (prompt_token_ids, output_len) pair;
every output token counts (EOS is ignored).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_TOTAL = 4096  # the longest prompt + output that any trace may ask for

Trace = list[tuple[list[int], int]]


def make_trace(workload: str, n: int, vocab_size: int, seed: int = 0) -> Trace:
    """Return a list of n pairs (prompt: list[int], output_len: int).

    workload "uniform": nano-vllm's bench.py, prompt and output lengths each uniform on the integers 100..1024.
    workload "exp": prompt lengths uniform on 16..256, output lengths exponential with mean 128, rounded and clamped to
    1..1024.
    Token ids are uniform on 0..min(vocab_size, 10000)-1.
    The i-th request does not depend on n: lengths and tokens of request i are drawn in order of i.
    """
    return [(ids.tolist(), o) for ids, o in itertools.islice(draw_requests(workload, vocab_size, seed), n)]


def draw_requests(workload: str, vocab_size: int, seed: int = 0) -> Iterator[tuple[NDArray[np.int64], int]]:
    """The requests of ``make_trace`` one by one, without end."""
    if workload not in ("uniform", "exp"):
        raise ValueError(f"workload={workload!r} is not known: it must be 'uniform' or 'exp'")
    rng = np.random.RandomState(seed)
    hi = min(int(vocab_size), 10000)
    while True:
        if workload == "uniform":
            p = int(rng.randint(100, 1025))
            o = int(rng.randint(100, 1025))
        else:
            p = int(rng.randint(16, 257))
            o = int(min(max(round(float(rng.exponential(128.0))), 1), 1024))
        ids = rng.randint(0, hi, size=p).astype(np.int64)
        assert p + o <= MAX_TOTAL
        yield ids, o


def digest(trace: Sequence[tuple[Sequence[int], int]]) -> str:
    """A short hash of a trace, printed by each benchmark to prove it is the same."""
    h = hashlib.sha256()
    for ids, o in trace:
        h.update(np.asarray([len(ids), o, *ids], dtype="<i4").tobytes())
    return h.hexdigest()[:16]
