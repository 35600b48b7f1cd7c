"""Capacities between neighbouring patches, for a min cut: from their affinity, or from the contrast of the picture.

They are [B, 8, N] int32, towards the neighbours in the order of `mincut.OFFSETS`, and 0 where there is none. Their
`smoothness` is the capacity of an edge of mean affinity, or of one without contrast, in root mean squares of the
terminals of a part. A `grid` is (H, W) in patches, with H * W = N.
"""

import torch
from torch import Tensor

from ..affinity import safe_divisor, wide_dtype
from ..kernel_trial import MOST_PATCHES, kernel_works
from ..mincut import OFFSETS
from ..split.plain import LIMIT, SCALE
from . import plain


def affinity_edges(affinity: Tensor, grid: tuple[int, int], smoothness: float) -> Tensor:
    """Capacities that are proportional to the affinity of the two patches: [B, N, N], symmetric."""
    patch = torch.arange(affinity.shape[1], device=affinity.device)
    inside = _neighbours_at(grid, torch.ones_like(patch))
    weights = affinity[:, patch, _neighbours_at(grid, patch)].to(wide_dtype(affinity.device)) * inside
    mean = weights.sum((1, 2), keepdim=True) / inside.sum().clamp(min=1)
    return (weights * (smoothness * SCALE) / safe_divisor(mean)).round().clamp(0, LIMIT).int()


def _neighbours_at(grid: tuple[int, int], values: Tensor) -> Tensor:
    """The value of each patch's neighbours, 0 where there is none: [N] to [8, N]."""
    padded = torch.nn.functional.pad(values.unflatten(-1, grid), (1, 1, 1, 1))
    around = [padded[1 + row :, 1 + column :][: grid[0], : grid[1]] for row, column in OFFSETS]
    return torch.stack(around).flatten(-2)


def contrast_edges(
    images: Tensor, grid: tuple[int, int], smoothness: float, by_kernel: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Capacities that fall with the contrast of pictures, and how many of their values are NaN or inf, and count as 0.

    They are smoothness / (1 + contrast) ** 6. Contrast is the squared difference between the mean values of two
    patches, 1 on average over the picture. That of brightness (the mean over the channels) and that of colour (the
    variance over them) weigh alike. Each channel is measured by its own root mean square difference, without outliers.

    Images are [B, C, height, width], of any float or integer type, whose patches divide them evenly. One kernel makes
    the edges of an image on a GPU with Triton, else the host does.

    Source: edges that fall with contrast: Y. Boykov and M.-P. Jolly, as for `GraphCutPartitioner`.
    """
    images = images.byte() if images.dtype == torch.bool else images
    if by_kernel is None:
        fits = grid[0] * grid[1] <= MOST_PATCHES
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
