"""What a client asks of the scheduler for one request: ``SchedulingParams``, validated once."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# A priority becomes part of a sum in floating point, and a client's choice must not overflow it.
MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True)
class SchedulingParams:
    """Who asks, how urgent it is, and how long it is likely to run. Which of it counts is the queue order's choice.

    ``priority``: lower is earlier, as in vLLM; at most 2**31 - 1 either way. ``client_id``: the tenant that fair orders
    account to.
    ``first_token_timeout``, ``timeout``: seconds from arrival to the first token and to the end; a request that can not
    meet one is dropped, under every order. ``expected_output_tokens``: the client's own estimate; None leaves it to the
    length predictor.
    """

    priority: int = 0
    client_id: str = ""
    first_token_timeout: float | None = None
    timeout: float | None = None
    expected_output_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise TypeError(f"priority must be an int, not {self.priority!r}")
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"priority must be an int of at most {MAX_PRIORITY} either way, not {self.priority}")
        if not isinstance(self.client_id, str):
            raise TypeError(f"client_id must be a string, not {self.client_id!r}")
        for name in ("first_token_timeout", "timeout"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
            if not 0 < value <= sys.float_info.max:
                raise ValueError(f"{name}={value} is not allowed: it must be a finite number > 0 or None")
        expected = self.expected_output_tokens
        if expected is not None:
            if isinstance(expected, bool) or not isinstance(expected, int):
                raise TypeError(f"expected_output_tokens must be an int >= 1 or None, not {expected!r}")
            if expected < 1:
                raise ValueError(f"expected_output_tokens={expected} is not allowed: it must be an int >= 1 or None")
