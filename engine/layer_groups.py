"""``LayerGroups``: which layers keep their keys and values in the same blocks. Imports no torch.

Layers that see the same window need the blocks of the same tokens, so they share a block table and form a group. All
groups take blocks from one pool, which is only possible if a block has room for as many layers in each. So layers are
cut into groups of one size: 25 layers with a window and 5 without become six groups of 5, and a long request's windowed
groups hold few blocks while the other one goes on. The fewer groups, the less there is to do in a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Rooms for layers that may stay empty, of all: fewer groups for a little memory.
MAX_EMPTY_SHARE = 1 / 16


@dataclass(frozen=True)
class LayerGroups:
    """``windows``: each group's sliding window, None for full attention. A block has room for ``size`` layers.

    Layer i is number ``index_in_group[i]`` of group ``group_of_layer[i]``.
    """

    windows: tuple[int | None, ...]
    size: int
    group_of_layer: tuple[int, ...]
    index_in_group: tuple[int, ...]

    @property
    def has_windows(self) -> bool:
        return any(window is not None for window in self.windows)


def group_layers(layer_windows: Sequence[int | None]) -> LayerGroups:
    """Groups for layers with these sliding windows, at least one layer."""
    counts = {window: layer_windows.count(window) for window in dict.fromkeys(layer_windows)}
    size = next(
        size for size in range(min(counts.values()), 0, -1) if _empty_share(counts.values(), size) <= MAX_EMPTY_SHARE
    )
    windows: list[int | None] = []
    groups: list[int] = []
    indices: list[int] = []
    filling: dict[int | None, int] = {}  # the group of a window that still has room
    for window in layer_windows:
        if window not in filling or groups.count(filling[window]) == size:
            filling[window] = len(windows)
            windows.append(window)
        indices.append(groups.count(filling[window]))
        groups.append(filling[window])
    return LayerGroups(tuple(windows), size, tuple(groups), tuple(indices))


def peak_blocks(windows: Sequence[int | None], block_size: int, num_tokens: int, max_step_tokens: int) -> int:
    """The most blocks that a request of ``num_tokens`` tokens holds in groups with these windows, when the blocks of at
    most ``max_step_tokens`` tokens are taken at once."""
    num_needed = -(-num_tokens // block_size)
    # The window before the step, the step, and a block that both its ends lie within.
    num_seen = [window and -(-(window - 1 + max_step_tokens) // block_size) + 1 for window in windows]
    return sum(num_needed if count is None else min(num_needed, count) for count in num_seen)


def _empty_share(counts: Collection[int], size: int) -> float:
    num_rooms = sum(-(-count // size) * size for count in counts)
    return 1 - sum(counts) / num_rooms
