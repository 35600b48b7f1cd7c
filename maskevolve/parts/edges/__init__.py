"""Capacities between neighbouring patches, for a min cut: from their affinity, or from the contrast of the picture.

They are [B, 8, N] int32, towards the neighbours in the order of `mincut.offsets`, and 0 where there is none; as many as
there are on grids of one and three axes. Their `smoothness` is the capacity of an edge of mean affinity, or of one
without contrast, in root mean squares of the terminals of a part; an array [pairs, 1] has one for each pair of
directions. A `grid` is the number of patches along each axis, such as (H, W), with H * W = N.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...grid import Grid, times
from ..affinity import safe_divisor, wide_dtype
from ..kernel_trial import MOST_PATCHES, kernel_works
from ..mincut import offsets
from ..split.plain import LIMIT, SCALE
from . import plain


def edge_weights(grid: Grid, axis_weights: Sequence[float] | None) -> Any:
    """What edges are multiplied by: a number, or by the weights of all axes that they step along, [pairs, 1].

    A patch at a flat border has 3 ** (axes - 1) edges across it: they weigh together what those of a picture do.
    """
    usual = 3.0 ** (2 - len(grid))
    if axis_weights is None:
        return usual
    if len(axis_weights) != len(grid):
        raise ValueError(f"axis_weights={axis_weights!r}: give one for each axis of a grid of {times(grid)} patches")
    steps = np.abs(offsets(len(grid))[::2])
    return usual * np.where(steps, axis_weights, 1.0).prod(1)[:, None]


def affinity_edges(affinity: Tensor, grid: Grid, smoothness: Any) -> Tensor:
    """Capacities that are proportional to the affinity of the two patches: [B, N, N], symmetric."""
    patch = torch.arange(affinity.shape[1], device=affinity.device)
    inside = _neighbours_at(grid, torch.ones_like(patch))
    weights = affinity[:, patch, _neighbours_at(grid, patch)].to(wide_dtype(affinity.device)) * inside
    mean = weights.sum((1, 2), keepdim=True) / inside.sum().clamp(min=1)
    if not isinstance(smoothness, (int, float)):  # the same both ways
        smoothness = torch.from_numpy(np.repeat(smoothness, 2, 0)).to(weights)
    edges: Tensor = (weights * (smoothness * SCALE) / safe_divisor(mean)).round().clamp(0, LIMIT).int()
    return edges


def _neighbours_at(grid: Grid, values: Tensor) -> Tensor:
    """The value of each patch's neighbours, 0 where there is none: [N] to [8, N]."""
    padded = torch.nn.functional.pad(values.unflatten(-1, grid), (1, 1) * len(grid))
    places = [
        [slice(1 + step, 1 + step + size) for step, size in zip(offset, grid, strict=True)]
        for offset in offsets(len(grid))
    ]
    around: Tensor = torch.stack([padded[tuple(place)] for place in places]).flatten(1)
    return around


def contrast_edges(images: Tensor, grid: Any, smoothness: Any, by_kernel: bool | None = None) -> tuple[Tensor, Tensor]:
    """Capacities that fall with the contrast of pictures, and how many of their values are NaN or inf, and count as 0.

    They are smoothness / (1 + contrast) ** 6. Contrast is the squared difference between the mean values of two
    patches, 1 on average over the picture. That of brightness (the mean over the channels) and that of colour (the
    variance over them) weigh alike. Each channel is measured by its own root mean square difference, without outliers.

    Images are [B, C, height, width], of any float or integer type, whose patches divide them evenly; on other grids
    they have as many axes. One kernel makes the edges of a picture on a GPU with Triton, else the host does.

    Source: edges that fall with contrast: Y. Boykov and M.-P. Jolly, as for `GraphCutPartitioner`.
    """
    images = images.byte() if images.dtype == torch.bool else images
    if by_kernel is None:
        fits = len(grid) == 2 and isinstance(smoothness, (int, float)) and math.prod(grid) <= MOST_PATCHES
        by_kernel = fits and kernel_works("edges from contrast", images.device, _small_images)
    if by_kernel:
        from . import kernel

        return kernel.contrast_edges(images, grid, smoothness * SCALE)
    edges, bad = plain.contrast_edges(images.cpu(), grid, smoothness * SCALE)
    return edges.to(images.device), bad.to(images.device)


def _small_images(device: torch.device, by_kernel: bool) -> list[Tensor]:
    images = (torch.arange(2 * 10 * 12, device="cpu") * 7919 % 101).float().view(1, 2, 10, 12)
    images[0, 0, 0, 0] = torch.inf
    return [*contrast_edges(images.to(device), (5, 6), 16, by_kernel)]
