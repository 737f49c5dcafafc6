"""Logits to tokens in Triton: two launches, no sort, nothing that depends on the batch.

Memory: logits [B, V], any stride of rows. A row is cut into tiles of fixed size. The first kernel reads every tile once
and leaves its maximum, where that is, and its weight: the sum of exp((x - maximum) / temperature), in fp64 but for the
innermost few. The second has a program for each row. Without filters it finds the tile in which the CDF passes the
draw, and reads that tile again. With filters it looks for the row's threshold, a logit: candidates that may pass it are
copied side by side first (or read in place, where they are too many), and the threshold is found by bisection on the
bits of a float, counting for top_k and adding up for top_p. How a row's sums are cut and added follows from its own
vocabulary and parameters, so its token is the same in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedattn.kernels.launcher import Launcher, specialized
from pagedattn.kernels.overlap import let_next_start, overlaps, wait_for_previous
from pagedattn.kernels.sampling_reference import GOLDEN_GAMMA, MIX_FACTORS
from pagedattn.kernels.tiling import next_power_of_2

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ALIGNMENT: tl.constexpr = tl.constexpr(16)  # logits that a thread can be sure to load together
NO_INDEX: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def mix(value, FACTOR_A: tl.constexpr, FACTOR_B: tl.constexpr):
    """SplitMix64's finalizer, in uint64."""
    value = (value ^ (value >> 30)) * FACTOR_A
    value = (value ^ (value >> 27)) * FACTOR_B
    return value ^ (value >> 31)


@triton.jit
def uniform(seed, position, GAMMA: tl.constexpr, FACTOR_A: tl.constexpr, FACTOR_B: tl.constexpr):
    """Number ``position`` of stream ``seed``, fp64 in (0, 1)."""
    counter = (position + 1).to(tl.uint64, bitcast=True)
    bits = mix(mix(seed.to(tl.uint64, bitcast=True), FACTOR_A, FACTOR_B) + counter * GAMMA, FACTOR_A, FACTOR_B)
    return ((bits >> 24).to(tl.int64).to(tl.float64) + 0.5) * (2.0**-40)


@triton.jit
def weights_of(x, maximum, sharpness):
    """exp((x - maximum) / temperature), sharpness = log2(e) / temperature; 1 at the maximum."""
    return tl.exp2((x - maximum) * sharpness)


@triton.jit
def sharpness_of(temperature):
    """A greedy row's weights serve to find NaN alone."""
    return tl.where(temperature > 0.0, LOG2E / tl.where(temperature > 0.0, temperature, 1.0), LOG2E)


@triton.jit
def summarize_tiles_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    sums_ptr,
    floats_ptr,
    integers_ptr,
    vocab_size,
    stride_logits,
    stride_floats,
    stride_integers,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    IN_FP32: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The maximum and the weight of each tile, and the maxima of its groups where the row has a top_k."""
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    wait_for_previous(OVERLAP)
    x = tl.load(logits_ptr + row * stride_logits + column, mask=column < vocab_size, other=float("-inf"))
    sharpness = sharpness_of(tl.load(temperature_ptr + row))
    top_k = tl.load(top_k_ptr + row)
    x = x.to(tl.float32)
    maximum = tl.max(x, axis=0)
    first = tl.min(tl.where(x == maximum, column, NO_INDEX), axis=0)
    weights = weights_of(x, tl.where(maximum == float("-inf"), 0.0, maximum), sharpness)
    partial = tl.sum(tl.reshape(weights, (TILE // IN_FP32, IN_FP32)), axis=1)
    tl.store(sums_ptr + row * NUM_TILES + tile, tl.sum(partial.to(tl.float64), axis=0))
    tl.store(floats_ptr + row * stride_floats + tile, maximum)
    tl.store(integers_ptr + row * stride_integers + tile, first)
    if top_k > 0:
        group = tl.arange(0, TILE // GROUP)
        maxima = tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), axis=1)
        tl.store(floats_ptr + row * stride_floats + NUM_TILES + tile * (TILE // GROUP) + group, maxima)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """An integer for a float, in the same order. SHIFT: how many of the lowest bits are zero whatever is compared."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def float_of(key, SHIFT: tl.constexpr):
    """The float of a key."""
    bits = key.to(tl.int32) << SHIFT
    return tl.where(bits < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(values, k, lowest, highest, SHIFT: tl.constexpr):
    """A float that at least k of values reach, as large as can be; all lie from lowest to highest."""
    low = key_of(lowest, SHIFT).to(tl.int64)
    high = key_of(highest, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.sum((values >= float_of(middle, SHIFT)).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    return float_of(low, SHIFT)


@triton.jit
def load_candidates(candidates_ptr, start, count, maximum, sharpness, least_logit, least_weight, TILE: tl.constexpr):
    """TILE logits and weights of what may be kept; -inf and 0 where something may not."""
    position = start + tl.arange(0, TILE)
    x = tl.load(candidates_ptr + position, mask=position < count, other=float("-inf")).to(tl.float32)
    weights = weights_of(x, maximum, sharpness)
    may_stay = (x >= least_logit) & (weights >= least_weight) & (x > float("-inf"))
    return tl.where(may_stay, x, float("-inf")), tl.where(may_stay, weights, 0.0)


@triton.jit
def measure(
    candidates_ptr, count, maximum, sharpness, least_logit, least_weight, threshold, TILE: tl.constexpr,
    IN_FP32: tl.constexpr,
):  # fmt: skip
    """How many candidates reach a threshold, and what they weigh."""
    number = tl.zeros([TILE // IN_FP32], dtype=tl.int32)
    mass = tl.zeros([TILE // IN_FP32], dtype=tl.float64)
    start = 0
    while start < count:
        x, weights = load_candidates(
            candidates_ptr, start, count, maximum, sharpness, least_logit, least_weight, TILE
        )  # fmt: skip
        reaches = (x >= threshold) & (x > float("-inf"))
        number += tl.sum(tl.reshape(reaches.to(tl.int32), (TILE // IN_FP32, IN_FP32)), axis=1)
        weights = tl.where(reaches, weights, 0.0)
        mass += tl.sum(tl.reshape(weights, (TILE // IN_FP32, IN_FP32)), axis=1).to(tl.float64)
        start += TILE
    return tl.sum(number, axis=0), tl.sum(mass, axis=0)


@triton.jit
def find_in_tile(logits_ptr, column, vocab_size, maximum, sharpness, target):
    """The first of columns [TILE] at which the CDF, from the tile's begin on, passes a target."""
    x = tl.load(logits_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    weights = weights_of(x, maximum, sharpness)
    passes = (tl.cumsum(weights.to(tl.float64), axis=0) > target) & (weights > 0.0)
    last = tl.max(tl.where(weights > 0.0, column, 0), axis=0)  # if rounding left the target behind the last one
    return tl.minimum(tl.min(tl.where(passes, column, NO_INDEX), axis=0), last)


@triton.jit
def choose_tokens_kernel(
    tokens_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    sums_ptr,
    floats_ptr,
    integers_ptr,
    copies_ptr,
    vocab_size,
    stride_logits,
    stride_floats,
    stride_integers,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    CAPACITY: tl.constexpr,
    IN_FP32: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    GAMMA: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILES_PADDED)
    is_tile = lane < NUM_TILES
    logits_ptr += row * stride_logits
    floats_ptr += row * stride_floats
    integers_ptr += row * stride_integers
    copies_ptr += row * CAPACITY
    wait_for_previous(OVERLAP)
    sums = tl.load(sums_ptr + row * NUM_TILES + lane, mask=is_tile, other=0.0)
    maxima = tl.load(floats_ptr + lane, mask=is_tile, other=float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    draw = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row), GAMMA, FACTOR_A, FACTOR_B)

    sharpness = sharpness_of(temperature)
    maximum = tl.max(maxima, axis=0)
    has_nan = tl.sum((sums != sums).to(tl.int32), axis=0) > 0
    is_sound = (tl.abs(maximum) < float("inf")) & (has_nan == 0)
    if top_k >= vocab_size:
        top_k = 0
    token = (row * 0 - 1).to(tl.int32)
    if is_sound:
        scales = tl.exp2(((maxima - maximum) * sharpness).to(tl.float64))
        masses = tl.where(sums > 0.0, sums * scales, 0.0)
        cumulative = tl.cumsum(masses, axis=0)
        mass = tl.max(cumulative, axis=0)
        if temperature <= 0.0:
            first = tl.load(integers_ptr + lane, mask=is_tile & (maxima == maximum), other=NO_INDEX)
            token = tl.min(first, axis=0)
        elif (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0):
            target = draw * mass
            last = tl.max(tl.where(masses > 0.0, lane, 0), axis=0)
            tile = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), axis=0), last)
            before = tl.max(tl.where(lane < tile, cumulative, 0.0), axis=0)
            scale = tl.sum(tl.where(lane == tile, scales, 0.0), axis=0)
            tile_maximum = tl.max(tl.where(lane == tile, maxima, float("-inf")), axis=0)
            column = tile * TILE + tl.arange(0, TILE)
            token = find_in_tile(logits_ptr, column, vocab_size, tile_maximum, sharpness, (target - before) / scale)
        else:
            token = choose_filtered(
                logits_ptr, copies_ptr, floats_ptr + NUM_TILES, integers_ptr + NUM_TILES, vocab_size, maximum,
                sharpness, mass, draw, top_k, top_p, min_p, TILE, NUM_GROUPS, GROUPS_PADDED, CAPACITY, IN_FP32, SHIFT,
                ALIGNED,
            )  # fmt: skip
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def choose_filtered(
    logits_ptr, copies_ptr, groups_ptr, indices_ptr, vocab_size, maximum, sharpness, mass, draw, top_k, top_p, min_p,
    TILE: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, CAPACITY: tl.constexpr,
    IN_FP32: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The token of one row with filters; ``mass`` is what all of its tokens weigh, the likeliest one weighing 1."""
    # What surely is not kept: less than the k-th largest of groups' maxima, or min_p, or so little that all tokens of
    # that weight together are less than what top_p may drop.
    least_logit = float("-inf")
    if (top_k > 0) & (top_k <= NUM_GROUPS):
        group = tl.arange(0, GROUPS_PADDED)
        groups = tl.load(groups_ptr + group, mask=group < NUM_GROUPS, other=float("-inf"))
        lowest = tl.min(tl.where(group < NUM_GROUPS, groups, maximum))
        least_logit = kth_largest(groups, top_k, lowest, maximum, SHIFT)
    kept_mass = tl.where(top_k > 0, 1.0, mass)
    droppable = tl.where(top_p < 1.0, 0.999 * (1.0 - top_p) * kept_mass / vocab_size, 0.0)
    least_weight = tl.where(min_p > 0.0, min_p, droppable.to(tl.float32))

    num_candidates = 0
    smallest = maximum
    start = 0
    while start < vocab_size:
        x, _ = load_candidates(logits_ptr, start, vocab_size, maximum, sharpness, least_logit, least_weight, TILE)
        is_candidate = x > float("-inf")
        place = num_candidates + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        is_copied = is_candidate & (place < CAPACITY)
        tl.store(copies_ptr + place, x.to(copies_ptr.dtype.element_ty), mask=is_copied)
        tl.store(indices_ptr + place, start + tl.arange(0, TILE), mask=is_copied)
        num_candidates += tl.sum(is_candidate.to(tl.int32), axis=0)
        smallest = tl.minimum(smallest, tl.min(tl.where(is_candidate, x, maximum), axis=0))
        start += TILE
    if ALIGNED:  # their number is rounded up to whole vectors of loads
        place = num_candidates + tl.arange(0, ALIGNMENT)
        tl.store(copies_ptr + place, float("-inf"), mask=place < CAPACITY)
    tl.debug_barrier()  # all copies are written before any is read

    is_copied = num_candidates <= CAPACITY
    candidates_ptr = logits_ptr
    count = vocab_size
    if is_copied:
        candidates_ptr = copies_ptr
        count = num_candidates
        if ALIGNED:
            count = tl.cdiv(num_candidates, ALIGNMENT) * ALIGNMENT
    if ALIGNED:
        candidates_ptr = tl.multiple_of(candidates_ptr, ALIGNMENT)
        count = tl.multiple_of(count, ALIGNMENT)

    low = key_of(smallest, SHIFT).to(tl.int64)
    most = key_of(maximum, SHIFT).to(tl.int64) + 1
    low_number = num_candidates
    if (top_k > 0) & (top_k < num_candidates):
        high = most
        while (high - low > 1) & (low_number != top_k):
            middle = low + (high - low) // 2
            pivot = float_of(middle, SHIFT)
            number, _ = measure(
                candidates_ptr, count, maximum, sharpness, least_logit, least_weight, pivot, TILE, IN_FP32
            )  # fmt: skip
            if number >= top_k:
                low = middle
                low_number = number
            else:
                high = middle
    if top_p < 1.0:
        kept = mass
        if (top_k > 0) | (min_p > 0.0):
            pivot = float_of(low, SHIFT)
            _, kept = measure(
                candidates_ptr, count, maximum, sharpness, least_logit, least_weight, pivot, TILE, IN_FP32
            )  # fmt: skip
            if (top_k > 0) & (low_number > top_k):  # of those that tie with the k-th, only k count
                kept -= (low_number - top_k) * weights_of(pivot, maximum, sharpness).to(tl.float64)
        wanted = top_p.to(tl.float64) * kept
        high = most
        high_number = 0
        while (high - low > 1) & (low_number - high_number > 1):
            middle = low + (high - low) // 2
            pivot = float_of(middle, SHIFT)
            number, weight = measure(
                candidates_ptr, count, maximum, sharpness, least_logit, least_weight, pivot, TILE, IN_FP32
            )  # fmt: skip
            if weight >= wanted:
                low = middle
                low_number = number
            else:
                high = middle
                high_number = number

    threshold = float_of(low, SHIFT)
    _, kept = measure(
        candidates_ptr, count, maximum, sharpness, least_logit, least_weight, threshold, TILE, IN_FP32
    )  # fmt: skip
    target = draw * kept
    before = kept * 0.0
    found = NO_INDEX + 0
    last = 0
    start = 0
    while (start < count) & (found == NO_INDEX):
        x, weights = load_candidates(
            candidates_ptr, start, count, maximum, sharpness, least_logit, least_weight, TILE
        )  # fmt: skip
        weights = tl.where(x >= threshold, weights, 0.0)
        position = start + tl.arange(0, TILE)
        passes = (before + tl.cumsum(weights.to(tl.float64), axis=0) > target) & (weights > 0.0)
        found = tl.min(tl.where(passes, position, NO_INDEX), axis=0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, position, 0), axis=0))
        before += tl.sum(weights.to(tl.float64), axis=0)
        start += TILE
    token = tl.where(found == NO_INDEX, last, found)
    if is_copied:
        token = tl.load(indices_ptr + token)
    return token


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingLaunch:
    """How rows are cut; it follows from the vocabulary alone, and so does a row's token."""

    tile: int  # logits of a tile
    group: int  # logits of which the maximum is kept, to tell candidates of top_k
    capacity: int  # candidates that are copied

    @property
    def tile_warps(self) -> int:
        """Of the program that summarizes a tile: up to 32 logits a thread."""
        return max(1, self.tile // 1024)

    @property
    def row_warps(self) -> int:
        """Of the program that chooses a row's token: half as many, for it holds fp64."""
        return max(1, self.tile // 512)

    def num_tiles(self, vocab_size: int) -> int:
        return -(-vocab_size // self.tile)


LARGEST_TILE, SMALLEST_TILE = 4096, 256
CAPACITY = 4096
GROUP = 128
ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # that a dtype leaves at the end of fp32
IN_FP32 = 8  # weights that are added up in fp32 before fp64 takes over


def choose_sampling_launch(vocab_size: int) -> SamplingLaunch:
    tile = max(SMALLEST_TILE, min(LARGEST_TILE, next_power_of_2(vocab_size)))
    return SamplingLaunch(tile, min(GROUP, tile), CAPACITY)


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """A token for each row of logits [B, V], int64 [B]; arguments as in ``layer_ops.sample_tokens``."""
    rows, vocab_size = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens
    cut = choose_sampling_launch(vocab_size)
    num_tiles = cut.num_tiles(vocab_size)
    num_groups = -(-vocab_size // cut.group)
    sums = torch.empty((rows, num_tiles), dtype=torch.float64, device=device)
    floats = torch.empty((rows, num_tiles + num_tiles * (cut.tile // cut.group)), dtype=torch.float32, device=device)
    integers = torch.empty((rows, num_tiles + cut.capacity), dtype=torch.int32, device=device)
    copies = torch.empty((rows, cut.capacity), dtype=logits.dtype, device=device)
    overlap = overlaps(device)
    is_aligned = not (vocab_size | logits.stride(0) | logits.data_ptr()) % ALIGNMENT.value
    sizes = (vocab_size, logits.stride(0), floats.stride(0), integers.stride(0))
    key = (logits.dtype, specialized(sizes))
    constants: tuple[int | bool, ...] = (num_tiles, cut.tile, cut.group, IN_FP32, overlap)
    launch = launch_summaries.prepare(
        (*key, constants),
        (rows, num_tiles),
        device,
        (*sizes, *constants),
        num_warps=cut.tile_warps,
        launch_pdl=overlap,
    )
    launch((logits, temperature, top_k, sums, floats, integers))
    constants = (
        num_tiles, next_power_of_2(num_tiles), cut.tile, num_groups, next_power_of_2(num_groups), cut.capacity,
        IN_FP32, ZERO_BITS[logits.dtype], is_aligned,
        GOLDEN_GAMMA, *MIX_FACTORS, overlap,
    )  # fmt: skip
    launch = launch_choice.prepare(
        (*key, constants),
        (rows, 1),
        device,
        (*sizes, *constants),
        num_warps=cut.row_warps,
        launch_pdl=overlap,
    )
    launch(
        (tokens, logits, temperature, top_k, top_p, min_p, seed, position, sums, floats, integers, copies)
    )  # fmt: skip
    return tokens


launch_summaries = Launcher(summarize_tiles_kernel)
launch_choice = Launcher(choose_tokens_kernel)
