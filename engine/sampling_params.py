"""What a client asks of one generation: ``SamplingParams``, with vLLM's names and defaults, validated once.

Values out of range raise ValueError, values of the wrong type TypeError; both name the field, the value and what is
allowed. A bool is not accepted for a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Below this a division by the temperature overflows what it should sharpen: vLLM treats it as greedy, and so do we.
GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20


def _require_int(name: str, value: Any, allowed: str, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")


def _require_number(name: str, value: Any, allowed: str, low: float, high: float, *, exclude_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    if not math.isfinite(value) or not low <= value <= high or (exclude_low and value == low):
        raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    ``n`` continuations are drawn, each from a seed of its own, and share the prompt's place in the cache.
    ``temperature`` 0 is greedy. ``top_k`` 0 and -1 switch it off. ``min_p`` drops tokens less likely than ``min_p``
    times the likeliest. ``seed`` makes the tokens the same whatever else is in the batch; without it a seed is drawn
    from the engine's own. ``stop`` strings end the generation and are cut off unless ``include_stop_str_in_output``;
    ``stop_token_ids`` and the model's end-of-sequence ids (unless ``ignore_eos``) end it too, their id stays in
    ``token_ids``, their text does not appear. No stop applies before ``min_tokens`` tokens. ``max_tokens`` None means
    as many as the model's length allows. ``logprobs`` n returns the n likeliest tokens' log probabilities (of the raw
    logits, before temperature and masks) and the chosen token's. ``detokenize`` False returns ids and no text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        _require_int("n", self.n, "an int >= 1", 1)
        _require_number("temperature", self.temperature, "a finite number >= 0", 0.0, math.inf)
        _require_number("top_p", self.top_p, "a number in (0, 1]", 0.0, 1.0, exclude_low=True)
        _require_number("min_p", self.min_p, "a number in [0, 1]", 0.0, 1.0)
        _require_int("top_k", self.top_k, "an int >= 1, or 0 or -1 for off", -1)
        if self.seed is not None:
            _require_int("seed", self.seed, "an int in [-2**63, 2**64) or None", -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, "an int >= 1 or None", 1)
        _require_int("min_tokens", self.min_tokens, "an int >= 0", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is not allowed: it must be <= max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, f"an int in [0, {MAX_LOGPROBS}] or None", 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            _require_bool(name, getattr(self, name))
        self._validate_stops()

    def _validate_stops(self) -> None:
        stop = self.stop
        is_strings = isinstance(stop, Sequence) and all(isinstance(item, str) for item in stop)
        if stop is not None and not is_strings:
            raise TypeError(f"stop must be a string, a list of strings or None, not {stop!r}")
        if any(not item for item in self.stop_strings):
            raise ValueError(f"stop={stop!r} is not allowed: a stop string must not be empty")
        if self.stop_strings and not self.detokenize:
            raise ValueError(f"stop={stop!r} is not allowed with detokenize=False: stop strings are found in the text")
        ids = self.stop_token_ids
        if ids is not None:
            if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
                raise TypeError(f"stop_token_ids must be a list of token ids or None, not {ids!r}")
            for item in ids:
                _require_int("stop_token_ids", item, "a list of ints >= 0", 0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE
