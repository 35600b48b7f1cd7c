"""Edges from contrast by one Triton program an image, with the bits of `plain.py` and no host sync.

A thread reads the pixels of a patch. Medians are found a bit at a time, from the number of values below: that needs
no sort. What patches tell each other goes through a scratch of whole numbers, where each thread keeps to its own keys.
"""

# No annotations of __future__: the interpreter of Triton 3.0, which torch 2.4 brings, looks for constexpr itself.
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..split.kernel import MIDDLE
from ..split.plain import LIMIT
from .plain import FAR, FARTHEST, LARGEST, LEAST_COLOUR, MOST_STEPS, OUTLIER, STEP

INF = tl.constexpr(float("inf"))
FIRST_BIT = tl.constexpr(-(1 << 63))
SETTINGS = {
    "FAR": FAR, "FARTHEST": FARTHEST, "LEAST_COLOUR": LEAST_COLOUR, "LIMIT": LIMIT, "MOST_STEPS": MOST_STEPS,
    "OUTLIER": OUTLIER, "STEP": STEP,
}  # fmt: skip


def contrast_edges(images: Tensor, grid: tuple[int, int], weight: float) -> tuple[Tensor, Tensor]:
    """See `maskevolve.parts.edges.contrast_edges`. Memory: 40 bytes for each patch and channel, and 100 a patch."""
    batch_size, channels, height, width = images.shape
    patches = grid[0] * grid[1]
    edges = torch.zeros(batch_size, 8, patches, dtype=torch.int32, device=images.device)
    bad = torch.empty(batch_size, dtype=torch.long, device=images.device)
    scratch = bad.new_empty(batch_size, 5 * patches * channels + 2 * channels + 4 * patches)
    block = min(max(triton.next_power_of_2(patches), 32), 1024)
    bits = int(np.float64(weight).view(np.int64))  # a float argument of a kernel has 32 bits
    pixels = height * width // patches
    with torch.cuda.device_of(images):  # Triton launches on the current device
        _contrast_kernel[(batch_size,)](
            images.contiguous(), edges, bad, scratch, bits, max(LARGEST // pixels, 1), channels, *grid,
            height // grid[0], width // grid[1], **SETTINGS, BLOCK=block, num_warps=min(block // 32, 16),
            enable_fp_fusion=False,
        )  # fmt: skip
    return edges, bad.sum()


@triton.jit(do_not_specialize=["weight", "largest", "channels", "height", "width", "tall", "wide"])
def _contrast_kernel(
    images, edges, bad, scratch, weight, largest, channels, height, width, tall, wide, FAR: tl.constexpr,
    FARTHEST: tl.constexpr, LEAST_COLOUR: tl.constexpr, LIMIT: tl.constexpr, MOST_STEPS: tl.constexpr,
    OUTLIER: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, patches, lane = tl.program_id(0).to(tl.int64), height * width, tl.arange(0, BLOCK)
    images += image * channels * patches * tall * wide
    edges += image * 8 * patches
    scratch += image * (5 * patches * channels + 2 * channels + 4 * patches)
    keys, sums, steps = scratch, scratch + 4 * patches, scratch + (4 + channels) * patches
    roots = steps + 4 * channels * patches
    bad_values = tl.full([], 0, tl.int64)
    for channel in range(channels):
        its_sums = sums + channel * patches
        low, high, its_bad = _ranges(images, keys, height, width, tall, wide, BLOCK)
        middle, far, low, scale = _scale(keys, patches, low, high, largest, FAR, FARTHEST, BLOCK)
        _sum_patches(images, its_sums, middle, far, low, scale, height, width, tall, wide, BLOCK)
        its_steps = steps + 4 * channel * patches
        root, limit = _differences(keys, its_sums, its_steps, height, width, STEP, MOST_STEPS, OUTLIER, BLOCK)
        tl.store(roots + 2 * channel, root)
        tl.store(roots + 2 * channel + 1, limit)
        bad_values += its_bad
        images += patches * tall * wide  # to the next channel
    tl.store(bad + image, bad_values)
    tl.debug_barrier()  # all have stored their steps
    nothing = tl.zeros([BLOCK], tl.int64)
    of_brightness, of_colour, count = nothing, nothing, nothing
    for first in range(0, 4 * patches, BLOCK):
        brightness, colour, usual = _contrast(steps, roots, first + lane, channels, patches, STEP, BLOCK)
        usual = usual & (_there(first + lane, height, width) >= 0)
        of_brightness += tl.where(usual, brightness, 0)
        of_colour += tl.where(usual, colour, 0)
        count += tl.where(usual, 1, 0)
    mean_brightness, mean_colour = tl.sum(of_brightness).to(tl.float64), tl.sum(of_colour).to(tl.float64)
    number = tl.maximum(tl.sum(count), 1).to(tl.float64)
    least_colour = mean_colour + mean_brightness / LEAST_COLOUR
    total = tl.where(mean_brightness > 0, 1, 0) + mean_colour / _divisor(least_colour)
    for first in range(0, 4 * patches, BLOCK):
        brightness, colour, _usual = _contrast(steps, roots, first + lane, channels, patches, STEP, BLOCK)
        contrast = brightness / _divisor(mean_brightness) + colour / _divisor(least_colour)
        contrast = contrast * (number / _divisor(total))
        square = (1 + contrast) * (1 + contrast)
        capacity = weight.to(tl.int64).to(tl.float64, bitcast=True) / (square * square * square)
        capacity = tl.minimum(_round(capacity), LIMIT).to(tl.int32)
        pair, patch, there = (first + lane) // patches, (first + lane) % patches, _there(first + lane, height, width)
        tl.store(edges + 2 * pair * patches + patch, capacity, mask=there >= 0)
        tl.store(edges + (2 * pair + 1) * patches + there, capacity, mask=there >= 0)


@triton.jit
def _ranges(pixels, keys, height, width, tall, wide, BLOCK: tl.constexpr):
    """Least and greatest value of a channel and how many are NaN or inf; the least of each patch becomes its key."""
    least, most = tl.full([BLOCK], INF, tl.float64), tl.full([BLOCK], -INF, tl.float64)
    bad = tl.zeros([BLOCK], tl.int64)
    for first in range(0, height * width, BLOCK):
        patch = first + tl.arange(0, BLOCK)
        inside, darkest = patch < height * width, tl.full([BLOCK], INF, tl.float64)
        for pixel in range(tall * wide):
            value = tl.load(pixels + _place(patch, pixel, width, tall, wide), mask=inside, other=0).to(tl.float64)
            finite = tl.abs(value) < INF
            value, bad = tl.where(finite, value, 0), bad + tl.where(finite, 0, 1)
            darkest, most = tl.minimum(darkest, value), tl.where(inside, tl.maximum(most, value), most)
        least = tl.where(inside, tl.minimum(least, darkest), least)
        tl.store(keys + patch, _ordered(darkest), mask=inside)
    return tl.min(least), tl.max(most), tl.sum(bad)


@triton.jit
def _scale(keys, patches, low, high, largest, FAR: tl.constexpr, FARTHEST: tl.constexpr, BLOCK: tl.constexpr):
    """The usual value of a channel, how far from it values are clipped, the least of these, and what they are times."""
    middle = _number(_ranked(keys, patches, (patches - 1) // 2, 63, BLOCK))
    for first in range(0, patches, BLOCK):
        patch = first + tl.arange(0, BLOCK)
        distance = tl.abs(_number(tl.load(keys + patch, mask=patch < patches, other=0)) - middle)
        tl.store(keys + patch, _ordered(distance), mask=patch < patches)
    far = tl.minimum(_number(_median(keys, patches, 63, BLOCK)) * FAR, FARTHEST)
    far = tl.where(far > 0, far, FARTHEST)
    low, high = _clip(low - middle, far), _clip(high - middle, far)
    scale = largest.to(tl.float64) / (high - low)
    scale = tl.where(scale < INF, scale, 0)
    return middle, far, tl.where(scale > 0, low, 0), scale


@triton.jit
def _sum_patches(pixels, sums, middle, far, low, scale, height, width, tall, wide, BLOCK: tl.constexpr):
    for first in range(0, height * width, BLOCK):
        patch, total = first + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float64)
        for pixel in range(tall * wide):
            place = _place(patch, pixel, width, tall, wide)
            value = tl.load(pixels + place, mask=patch < height * width, other=0).to(tl.float64)
            value = tl.where(tl.abs(value) < INF, value, 0)
            total += _round((_clip(value - middle, far) - low) * scale)
        tl.store(sums + patch, total.to(tl.int64), mask=patch < height * width)


@triton.jit
def _place(patch, pixel, width, tall, wide):
    """Of a pixel of each patch, in a channel."""
    return (patch // width * tall + pixel // wide) * width * wide + patch % width * wide + pixel % wide


@triton.jit
def _differences(
    keys, sums, steps, height, width, STEP: tl.constexpr, MOST_STEPS: tl.constexpr, OUTLIER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps of a channel in medians, and of those without outliers the root mean square and the largest."""
    patches, lane = height * width, tl.arange(0, BLOCK)
    tl.debug_barrier()  # all have stored their sums
    pairs = tl.zeros([BLOCK], tl.int64)
    for first in range(0, 4 * patches, BLOCK):
        there = _there(first + lane, height, width)
        here = tl.load(sums + (first + lane) % patches, mask=there >= 0, other=0)
        step = tl.load(sums + there, mask=there >= 0, other=0) - here
        tl.store(steps + first + lane, step, mask=first + lane < 4 * patches)
        tl.store(keys + first + lane, tl.abs(step), mask=first + lane < 4 * patches)
        pairs += tl.where(there >= 0, 1, 0)
    median = tl.maximum(_median(keys, 4 * patches, 43, BLOCK), 1).to(tl.float64)
    nonzero = tl.zeros([BLOCK], tl.int64)
    for first in range(0, 4 * patches, BLOCK):
        inside = first + lane < 4 * patches
        step = tl.load(steps + first + lane, mask=inside, other=0)
        scaled = _round((step * STEP).to(tl.float64) / median)
        step = tl.minimum(tl.maximum(scaled, -MOST_STEPS), MOST_STEPS).to(tl.int64)
        tl.store(steps + first + lane, step, mask=inside)
        tl.store(keys + first + lane, tl.abs(step), mask=inside)
        nonzero += tl.where(step != 0, 1, 0)
    outside = 4 * patches - tl.sum(pairs)
    limit = _ranked(keys, 4 * patches, 4 * patches - tl.sum(nonzero) // 2 - 1, 21, BLOCK)
    before, mean_square = limit - 1, limit
    while before < limit:
        number, square = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for first in range(0, 4 * patches, BLOCK):
            size = tl.load(keys + first + lane, mask=first + lane < 4 * patches, other=MOST_STEPS + 1)
            number += tl.where(size <= limit, 1, 0)
            square += tl.where(size <= limit, size * size, 0)
        smaller, total = tl.maximum(tl.sum(number) - outside, 1), tl.sum(square)
        before, mean_square, larger = limit, total // smaller, tl.zeros([BLOCK], tl.int64)
        for first in range(0, 4 * patches, BLOCK):
            size = tl.load(keys + first + lane, mask=first + lane < 4 * patches, other=0)
            larger = tl.where(size * size * smaller <= OUTLIER * OUTLIER * total, tl.maximum(larger, size), larger)
        limit = tl.maximum(limit, tl.max(larger))
    return _round(tl.sqrt(mean_square.to(tl.float64))).to(tl.int64), limit


@triton.jit
def _contrast(steps, roots, place, channels, patches, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Contrast of pairs of neighbours in brightness and in colour, and which of them are no outliers."""
    total, squares = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    usual, measured = place < 4 * patches, 0
    for channel in range(channels):
        root, limit = tl.load(roots + 2 * channel), tl.load(roots + 2 * channel + 1)
        step = tl.load(steps + 4 * channel * patches + place, mask=place < 4 * patches, other=0)
        usual = usual & (tl.abs(step) <= limit)
        step = _round((step * STEP).to(tl.float64) / tl.maximum(root, 1).to(tl.float64)).to(tl.int64)
        step = tl.where(root > 0, step, 0)
        total, squares, measured = total + step, squares + step * step, measured + tl.where(root > 0, 1, 0)
    return total * total, measured * squares - total * total, usual


@triton.jit
def _there(place, height, width):
    """Of pair * N + patch, the neighbour to the east, south, south-east or south-west; -1 where there is none."""
    pair, patch = place // (height * width), place % (height * width)
    row = patch // width + tl.where(pair > 0, 1, 0)
    column = patch % width + tl.where(pair == 1, 0, tl.where(pair == 3, -1, 1))
    inside = (pair < 4) & (row < height) & (column >= 0) & (column < width)
    return tl.where(inside, row * width + column, -1)


@triton.jit
def _ranked(keys, number, rank, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of whole numbers of so many bits and a sign, the one that `rank` others are below, or as many as can be."""
    found = tl.where(_below(keys, number, 0, BLOCK) > rank, FIRST_BIT, 0)
    for bit in range(BITS):
        candidate = found + (tl.full([], 1, tl.int64) << (BITS - 1 - bit))
        found = tl.where(_below(keys, number, candidate, BLOCK) <= rank, candidate, found)
    return found


@triton.jit
def _below(keys, number, bound, BLOCK: tl.constexpr):
    """How many keys are below a bound."""
    below = tl.zeros([BLOCK], tl.int64)
    for first in range(0, number, BLOCK):
        place = first + tl.arange(0, BLOCK)
        key = tl.load(keys + place, mask=place < number, other=0)
        below += tl.where((place < number) & (key < bound), 1, 0)
    return tl.sum(below)


@triton.jit
def _median(keys, number, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The median of those keys, >= 0, that are not 0; 0 where there are none."""
    found = number - _below(keys, number, 1, BLOCK)
    return _ranked(keys, number, tl.minimum(number - found + found // 2, number - 1), BITS, BLOCK)


@triton.jit
def _ordered(number):
    """Whole numbers in the order of float64s."""
    bits = (number + 0.0).to(tl.int64, bitcast=True)  # -0 is 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


@triton.jit
def _number(key):
    """The float64 whose place in the order this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)


@triton.jit
def _round(number):
    """To the next whole number, half to even: of numbers below 2 ** 51, and of others that are clipped after."""
    return tl.where(tl.abs(number) < 2251799813685248.0, (number + MIDDLE) - MIDDLE, number)


@triton.jit
def _clip(number, far):
    return tl.minimum(tl.maximum(number, -far), far)


@triton.jit
def _divisor(number):
    """The divisor with 1 in place of 0 and less, so that 0 / 0 gives 0."""
    return tl.where(number > 0, number, 1.0)
