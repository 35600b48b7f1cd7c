"""Capacities between neighbouring patches, for a min cut: from their affinity, or from the contrast of the picture.

Contrast is in whole numbers up to a last few operations on single elements, which IEEE 754 rounds alike everywhere:
so no edge depends on the device, the batch, the order of the channels, or the scale and offset of their values.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .mincut import OFFSETS
from .split import LIMIT, SCALE, wide_dtype

__all__ = ["affinity_edges", "contrast_edges", "neighbours_at", "or_one", "patch_sums"]

LARGEST_SUM = 1 << 22  # of a patch: float32 holds it, and the squares of differences add up in 64 bits
STEP = 1 << 10  # the root mean square difference between neighbours, in each channel
LEAST_COLOUR = 30  # colour counts at least as if its mean contrast were this part of that of brightness


@lru_cache(maxsize=16)
def _neighbours(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The patch in each of the 8 directions, [8, N], or the patch itself where there is none; and where there is."""
    patch = torch.arange(height * width, device=device)
    index, inside = [], []
    for rows, columns in OFFSETS:
        row, column = patch // width + rows, patch % width + columns
        inside.append((row >= 0) & (row < height) & (column >= 0) & (column < width))
        index.append(torch.where(inside[-1], row * width + column, patch))
    return torch.stack(index), torch.stack(inside)


def neighbours_at(grid: tuple[int, int], values: Tensor) -> Tensor:
    """The value of each patch's neighbours, its own where there is none: [B, N] to [B, 8, N]."""
    index, _ = _neighbours(*grid, values.device)
    return values[:, None].expand(-1, 8, -1).gather(2, index.expand(len(values), -1, -1))


def affinity_edges(affinity: Tensor, grid: tuple[int, int], smoothness: float) -> Tensor:
    """Capacities that are proportional to the affinity of the two patches.

    Args:
        affinity: [B, N, N], symmetric.
        grid: (H, W) in patches, H * W = N.
        smoothness: the capacity of an edge of mean affinity, in root mean squares of the terminals of a part.

    Returns:
        [B, 8, N] int32, towards the neighbours in the order of `mincut.OFFSETS`; 0 where there is none.
    """
    index, inside = _neighbours(*grid, affinity.device)
    patch = torch.arange(affinity.shape[1], device=affinity.device)
    weights = affinity[:, patch, index].to(wide_dtype(affinity.device)) * inside
    mean = weights.sum((1, 2), keepdim=True) / inside.sum().clamp(min=1)
    return _capacities(weights * (smoothness * SCALE) / or_one(mean))


def contrast_edges(sums: Tensor, grid: tuple[int, int], smoothness: float) -> Tensor:
    """Capacities that fall with the contrast of the picture: smoothness / (1 + contrast) ** 6.

    Contrast is the squared difference between the mean values of two patches, 1 on average over the picture. That of
    brightness (the mean over the channels) and that of colour (the variance over them) weigh alike. Each channel is
    measured by its own root mean square difference.

    Args:
        sums: [B, C, N] int64: see `patch_sums`.
        grid: (H, W) in patches, H * W = N.
        smoothness: the capacity of an edge without contrast, in root mean squares of the terminals of a part.

    Returns:
        [B, 8, N] int32, towards the neighbours in the order of `mincut.OFFSETS`; 0 where there is none.

    Source: edges that fall with contrast: Y. Boykov and M.-P. Jolly, Interactive graph cuts, ICCV 2001,
        https://doi.org/10.1109/ICCV.2001.937505
    """
    _, inside = _neighbours(*grid, sums.device)
    wide, count = wide_dtype(sums.device), inside.sum().clamp(min=1)
    steps = neighbours_at(grid, sums.flatten(0, 1)).view(*sums.shape[:2], 8, -1) - sums[:, :, None]
    mean_square = steps.square().sum((2, 3), keepdim=True) // count
    # Of an integer below 2 ** 44, no root is so near the middle between two that devices could round it differently.
    root = mean_square.to(wide).sqrt().round()
    steps = (steps * STEP / or_one(root)).round().long() * (root > 0)
    channels = torch.count_nonzero(root, 1)  # one without contrast does not count
    brightness = steps.sum(1).square()
    colour = channels * steps.square().sum(1) - brightness
    of_brightness, of_colour = (part.sum((1, 2), keepdim=True).to(wide) for part in (brightness, colour))
    least = of_colour + of_brightness / LEAST_COLOUR
    total = (of_brightness > 0) + of_colour / or_one(least)  # what the next line adds up to, without rounding
    contrast = (brightness / or_one(of_brightness) + colour / or_one(least)) * (count / or_one(total))
    square = (1 + contrast) * (1 + contrast)
    return _capacities(inside * (smoothness * SCALE) / (square * square * square))


def patch_sums(images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sums of the pixels of each patch, where each channel of each image is brought to its own whole-number scale.

    Args:
        images: [B, C, height, width], of any float or integer type; NaN and inf count as 0.
        grid: (H, W) in patches, which divide the images evenly.

    Returns:
        sums [B, C, N] int64, at most 2 ** 22 and 0 in a channel of one value; how many pixels were NaN or inf (0-d).
    """
    exact_in_float32 = images.dtype == torch.float32 or images.element_size() <= 2
    given, images = images, images.to(torch.float32 if exact_in_float32 else wide_dtype(images.device), copy=True)
    images.nan_to_num_(0, 0, 0)
    bad = torch.count_nonzero(given != images) if given.is_floating_point() else images.new_zeros((), dtype=torch.long)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    pixels = images[0, 0].numel() // (grid[0] * grid[1])
    scale = max(LARGEST_SUM // pixels, 1) / (high - low)
    scale = torch.where(scale.isfinite(), scale, 0)
    whole = images.sub_(torch.where(scale > 0, low, 0)).mul_(scale).round_()
    patches = whole.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    return patches.sum(3).sum(4).flatten(2).long(), bad


def or_one(divisor: Tensor) -> Tensor:
    """What can be divided by: 1 in place of 0."""
    return torch.where(divisor > 0, divisor, 1)


def _capacities(weights: Tensor) -> Tensor:
    return weights.round().clamp(0, LIMIT).int()
