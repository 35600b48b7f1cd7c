"""Edges from contrast on the host: torch for pixels, NumPy for patches.

Contrast is in whole numbers up to a last few operations on single elements, which IEEE 754 rounds alike everywhere:
so no edge depends on the device, the batch, the order of the channels, or the scale and offset of their values.
Outliers, such as a border without data, are left out where contrast is measured.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...grid import Grid
from ..mincut import neighbours
from ..split.plain import LIMIT

STEP = 1 << 10  # the median and then the root mean square difference between neighbours, in each channel
MOST_STEPS = 1 << 20
LARGEST = 1 << 42  # of the sum of a patch
OUTLIER = 6  # differences of so many root mean squares of smaller ones say nothing about the rest of the picture
FARTHEST = 1e300  # so that differences of such values are finite
FAR = 1 << 16  # pixels so many medians away from the usual value are as good as farther ones
LEAST_COLOUR = 30  # colour counts at least as if its mean contrast were this part of that of brightness


def contrast_edges(images: Tensor, grid: Grid, weight: Any) -> tuple[Tensor, Tensor]:
    """See `maskevolve.parts.edges.contrast_edges`."""
    darkest, brightest = _ranges(images, grid)
    bad = torch.zeros((), dtype=torch.long)
    if not (darkest.isfinite() & brightest.isfinite()).all():
        bad = torch.count_nonzero(~images.isfinite())
        images = images.nan_to_num(0, 0, 0)
        darkest, brightest = _ranges(images, grid)
    sums = patch_sums(images, darkest.double().numpy(), brightest.double().numpy(), grid)
    return torch.from_numpy(edges_of(sums, grid, weight)), bad


def _ranges(images: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The darkest and the brightest pixel of each patch, [B, C, N]."""
    darkest = brightest = _patches(images, grid)
    for axis in range(3, 3 + len(grid)):  # along whole rows first, which is faster
        darkest, brightest = darkest.amin(axis), brightest.amax(axis)
    return darkest.flatten(2), brightest.flatten(2)


def _patches(images: Tensor, grid: Grid) -> Tensor:
    """[B, C, h, y, w, x]: rows of patches, rows of pixels in each, patches in a row, pixels in a row of each."""
    for axis in reversed(range(len(grid))):
        images = images.unflatten(2 + axis, (grid[axis], -1))
    return images


@np.errstate(divide="ignore", over="ignore")
def patch_sums(images: Tensor, darkest: Any, brightest: Any, grid: Grid) -> Any:
    """Sums of the pixels of each patch, [B, C, N] int64, where each channel of an image has its own scale.

    They are at most 2 ** 42, and 0 in a channel of one value.
    """
    middle = np.sort(darkest)[..., (darkest.shape[2] - 1) // 2, None]
    far = np.minimum(_median(np.abs(darkest - middle)) * FAR, FARTHEST)
    far[far == 0] = FARTHEST
    low = np.clip(darkest.min(2, keepdims=True) - middle, -far, far)
    high = np.clip(brightest.max(2, keepdims=True) - middle, -far, far)
    pixels = math.prod(images.shape[2:]) // darkest.shape[2]
    scale = max(LARGEST // pixels, 1) / (high - low)
    scale[~np.isfinite(scale)] = 0
    sums = torch.empty(darkest.shape, dtype=torch.long)
    ones = [1] * len(grid)
    settings = (
        torch.from_numpy(each.reshape(*each.shape[:2], *ones)) for each in (middle, far, low * (scale > 0), scale)
    )
    for image, *its, total in zip(images, *settings, sums, strict=True):  # an image at a time stays in the cache
        middle, far, low, scale = its
        whole = image.sub(middle).clamp_(-far, far).sub_(low).mul_(scale).round_()
        patches = _patches(whole[None], grid)
        for axis in range(3, 3 + len(grid)):
            patches = patches.sum(axis)
        total[:] = patches[0].flatten(1)
    return sums.numpy()


def edges_of(sums: Any, grid: Grid, weight: Any) -> Any:
    """Capacities from the contrast of patches: of `patch_sums`, [B, 3 ** d - 1, N] int32."""
    there = neighbours(*grid)[::2]
    inside = there != np.arange(sums.shape[2])
    steps = (sums[..., there] - sums[:, :, None]) * inside  # each pair of neighbours once, [B, C, pairs, N]
    median = _median(_flat(np.abs(steps)))[..., None]
    steps = np.rint(steps * STEP / np.maximum(median, 1)).clip(-MOST_STEPS, MOST_STEPS).astype(np.int64)
    root, usual = _spread(steps, inside)
    count = np.maximum(np.count_nonzero(usual, (1, 2), keepdims=True), 1)
    steps = np.rint(steps * STEP / np.maximum(root, 1)).astype(np.int64) * (root > 0)
    channels = np.count_nonzero(root, 1)  # one without contrast does not count
    brightness = np.square(steps.sum(1))
    colour = channels * np.square(steps).sum(1) - brightness
    of_brightness, of_colour = (
        (each * usual).sum((1, 2))[:, None, None].astype(float) for each in (brightness, colour)
    )
    least = of_colour + of_brightness / LEAST_COLOUR
    # Contrast is 1 on average; the total is what its two parts add up to, without rounding.
    total = (of_brightness > 0) + of_colour / _divisor(least)
    contrast = (brightness / _divisor(of_brightness) + colour / _divisor(least)) * (count / _divisor(total))
    square = (1 + contrast) * (1 + contrast)
    weights = np.rint(inside * weight / (square * square * square)).clip(0, LIMIT).astype(np.int32)
    edges = np.zeros((len(sums), 2 * len(there), sums.shape[2]), dtype=np.int32)
    edges[:, ::2] = weights
    for pair in range(len(there)):  # the way back weighs as much
        edges[:, 2 * pair + 1, there[pair, inside[pair]]] = weights[:, pair, inside[pair]]
    return edges


def _spread(steps: Any, inside: Any) -> tuple[Any, Any]:
    """The root mean square of differences, [B, C, pairs, N] in medians, as [B, C, 1, 1], and which count for it.

    From the median upwards, they count up to the first that is OUTLIER times the root mean square of the smaller ones:
    so a border without data tells nothing of the picture, and strong outlines in it do.
    """
    sizes = np.sort(_flat(np.abs(steps)))
    place = np.arange(1, sizes.shape[2] + 1)
    number = np.maximum(place - len(place) + np.count_nonzero(inside), 1)  # of pairs up to this one
    above_median = 2 * (len(place) - place) <= np.count_nonzero(sizes, 2)[..., None]
    squares = np.square(sizes)
    sums, following = squares.cumsum(2), np.roll(squares, -1, 2)
    ends = above_median & (following > squares) & (following * number > OUTLIER**2 * sums) | (place == len(place))
    last = ends.argmax(2)[..., None]
    # Of an integer below 2 ** 44, no root is so near the middle between two that devices could round it differently.
    root = np.rint(np.sqrt(np.take_along_axis(sums, last, 2) // number[last]))[..., None]
    return root, inside & (np.abs(steps) <= np.take_along_axis(sizes, last, 2)[..., None]).all(1)


def _flat(values: Any) -> Any:
    """[B, C, pairs, N] as [B, C, pairs * N]."""
    return values.reshape(*values.shape[:2], math.prod(values.shape[2:]))


def _median(values: Any) -> Any:
    """The median of those values [..., K], >= 0, that are not 0, [..., 1]; 0 where there are none."""
    found = np.count_nonzero(values, -1)[..., None]
    place = np.minimum(values.shape[-1] - found + found // 2, values.shape[-1] - 1)
    return np.take_along_axis(np.sort(values), place, -1)


def _divisor(values: Any) -> Any:
    """The divisor with 1 in place of 0 and less, so that 0 / 0 gives 0."""
    return np.where(values > 0, values, 1)
