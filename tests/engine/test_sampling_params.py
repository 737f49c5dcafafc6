from __future__ import annotations

import math
from typing import Any

import pytest

from pagedattn.engine.sampling_params import SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.stop_strings == ()
    assert not params.is_greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 2.0),
        ("top_k", -2),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop_token_ids", [-1]),
    ],
)
def test_out_of_range_is_a_value_error_that_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    shown = value[-1] if isinstance(value, list) else value
    assert str(shown) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", None),
        ("top_k", 1.5),
        ("top_k", True),
        ("max_tokens", 8.0),
        ("max_tokens", True),
        ("min_tokens", None),
        ("logprobs", True),
        ("seed", 0.5),
        ("stop", 3),
        ("stop", ["a", 3]),
        ("stop_token_ids", 3),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
        ("detokenize", "yes"),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 0),
    ],
)
def test_wrong_type_is_a_type_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_unknown_fields_are_rejected() -> None:
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=4)  # type: ignore[call-arg]


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match="detokenize=False"):
        SamplingParams(stop="x", detokenize=False)


def test_accepted_limits() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(top_k=-1, top_p=1, min_p=1, max_tokens=None, logprobs=20, seed=-1).max_tokens is None
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["x", "yz"]).stop_strings == ("x", "yz")
