from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.engine.cache_size import longest_sequence
from pagedattn.engine.layer_groups import MAX_EMPTY_SHARE, group_layers, peak_blocks

PATTERNS: dict[str, tuple[list[int | None], int, list[int | None]]] = {
    "llama": ([None] * 32, 32, [None]),
    "mistral": ([4096] * 32, 32, [4096]),
    "alternating": ([128, None] * 12, 12, [128, None]),
    "five to one": (([512] * 5 + [None]) * 5, 5, [512, None, 512, 512, 512, 512]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_layers_of_real_models(name: str) -> None:
    layer_windows, size, windows = PATTERNS[name]
    groups = group_layers(layer_windows)
    assert groups.size == size
    assert sorted(groups.windows, key=str) == sorted(windows, key=str)


def test_a_little_emptiness_for_fewer_groups() -> None:
    """62 layers, 10 of them full: nothing stays empty in 31 groups of 2, one room of 16 in 11 of 6."""
    groups = group_layers([None if index % 6 == 5 else 1024 for index in range(62)])
    assert groups.size == 6
    assert len(groups.windows) == 11


@given(st.lists(st.sampled_from([None, 4, 16]), min_size=1, max_size=60))
def test_every_layer_has_a_place_of_its_own(layer_windows: list[int | None]) -> None:
    groups = group_layers(layer_windows)
    places = list(zip(groups.group_of_layer, groups.index_in_group, strict=True))
    assert len(set(places)) == len(layer_windows)
    assert all(0 <= index < groups.size for index in groups.index_in_group)
    assert [groups.windows[group] for group in groups.group_of_layer] == layer_windows
    assert 1 - len(layer_windows) / (groups.size * len(groups.windows)) <= MAX_EMPTY_SHARE
    assert groups.has_windows == (set(layer_windows) != {None})


def held_blocks(window: int | None, block_size: int, num_tokens: int, step: int) -> int:
    """The most blocks at once, with steps that begin anywhere."""
    most = 0
    for start in range(num_tokens):
        end = min(start + step, num_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        most = max(most, len({position // block_size for position in range(first, end)}))
    return most


@given(
    windows=st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3),
    block_size=st.integers(1, 6),
    num_tokens=st.integers(1, 80),
    step=st.integers(1, 80),
)
def test_peak_is_never_passed_and_nearly_reached(
    windows: list[int | None], block_size: int, num_tokens: int, step: int
) -> None:
    held = sum(held_blocks(window, block_size, num_tokens, step) for window in windows)
    assert held <= peak_blocks(windows, block_size, num_tokens, step) <= held + len(windows)


def test_the_longest_sequence_is_the_longest() -> None:
    groups = group_layers([8, None] * 2)
    for num_blocks in range(2, 40):
        longest = longest_sequence(groups, num_blocks, 4, 6, limit=1000)
        assert peak_blocks(groups.windows, 4, longest, min(longest, 6)) <= num_blocks
        assert peak_blocks(groups.windows, 4, longest + 1, min(longest + 1, 6)) > num_blocks
    assert longest_sequence(groups, 1, 4, 6, limit=1000) == 0
    assert longest_sequence(groups, 40, 4, None, limit=1000) == 80
    assert longest_sequence(groups, 4000, 4, None, limit=1000) == 1000
