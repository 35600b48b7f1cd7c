"""Capacities between neighbouring patches, for a min cut: from their affinity, or from the contrast of the picture.

They are [B, 8, N] int32, towards the neighbours in the order of `mincut.OFFSETS`, and 0 where there is none. Their
`smoothness` is the capacity of an edge of mean affinity, or of one without contrast, in root mean squares of the
terminals of a part. A `grid` is (H, W) in patches, with H * W = N.

Contrast is in whole numbers up to a last few operations on single elements, which IEEE 754 rounds alike everywhere:
so no edge depends on the device, the batch, the order of the channels, or the scale and offset of their values.
Outliers, such as a border without data, are left out where contrast is measured.
"""

import einops
import torch
from torch import Tensor

from .affinity import safe_divisor
from .mincut import OFFSETS
from .split.plain import LIMIT, SCALE, wide_dtype

STEP = 1 << 10  # the median and then the root mean square difference between neighbours, in each channel
OUTLIER = 6  # differences of so many root mean squares of smaller ones say nothing about the rest of the picture
FAR = 1 << 16  # pixels so many medians away from the usual value are as good as farther ones
SMALL = 8  # parts below this share of an image have weaker contrast edges, so that they can be split
LEVEL = 0.9  # of the contrast edges of one level of the tree, those of the next, so that large parts can be split
PATCHES = "b c (h y) (w x) -> b c (h w)"
LEAST_COLOUR = 30  # colour counts at least as if its mean contrast were this part of that of brightness


def neighbours_at(grid: tuple[int, int], values: Tensor) -> Tensor:
    """The value of each patch's neighbours, 0 where there is none: [..., N] to [..., 8, N]."""
    padded = torch.nn.functional.pad(values.unflatten(-1, grid), (1, 1, 1, 1))
    around = [padded[..., 1 + row :, 1 + column :][..., : grid[0], : grid[1]] for row, column in OFFSETS]
    return torch.stack(around, -3).flatten(-2)


def affinity_edges(affinity: Tensor, grid: tuple[int, int], smoothness: float) -> Tensor:
    """Capacities that are proportional to the affinity of the two patches: [B, N, N], symmetric."""
    patch = torch.arange(affinity.shape[1], device=affinity.device)
    inside = neighbours_at(grid, torch.ones_like(patch))
    weights = affinity[:, patch, neighbours_at(grid, patch)].to(wide_dtype(affinity.device)) * inside
    mean = weights.sum((1, 2), keepdim=True) / inside.sum().clamp(min=1)
    return (weights * (smoothness * SCALE) / safe_divisor(mean)).round().clamp(0, LIMIT).int()


def contrast_edges(sums: Tensor, grid: tuple[int, int], smoothness: float) -> Tensor:
    """Capacities that fall with the contrast of the picture, of which `sums` is as from `patch_sums`.

    They are smoothness / (1 + contrast) ** 6. Contrast is the squared difference between the mean values of two
    patches, 1 on average over the picture. That of brightness (the mean over the channels) and that of colour (the
    variance over them) weigh alike. Each channel is measured by its own root mean square difference, without outliers.

    Source: edges that fall with contrast: Y. Boykov and M.-P. Jolly, as for `GraphCutPartitioner`.
    """
    inside = neighbours_at(grid, torch.ones(sums.shape[2:], dtype=torch.long, device=sums.device))
    wide = wide_dtype(sums.device)
    steps = (neighbours_at(grid, sums) - sums[:, :, None]) * inside
    median = _median(steps[:, :, ::2].abs().flatten(2))[..., None]
    steps = (steps * STEP / safe_divisor(median)).round().clamp(-(1 << 20), 1 << 20).long()
    root, usual = _spread(steps, inside)
    count = usual.sum((1, 2), keepdim=True).clamp(min=1)
    steps = (steps * STEP / safe_divisor(root)).round().long() * (root > 0)
    channels = torch.count_nonzero(root, 1)  # one without contrast does not count
    brightness = steps.sum(1).square()
    colour = channels * steps.square().sum(1) - brightness
    of_brightness, of_colour = ((each * usual).sum((1, 2), keepdim=True).to(wide) for each in (brightness, colour))
    least = of_colour + of_brightness / LEAST_COLOUR
    total = (of_brightness > 0) + of_colour / safe_divisor(least)  # what the next line adds up to, without rounding
    contrast = (brightness / safe_divisor(of_brightness) + colour / safe_divisor(least)) * (count / safe_divisor(total))
    square = (1 + contrast) * (1 + contrast)
    weights: Tensor = inside * (smoothness * SCALE) / (square * square * square)
    return weights.round().clamp(0, LIMIT).int()


def _spread(steps: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The root mean square of differences, [B, C, 8, N] in medians, as [B, C, 1, 1], and which count for it, [B, 8, N].

    From the median upwards, they count up to the first that is OUTLIER times the root mean square of the smaller ones:
    so a border without data tells nothing of the picture, and strong outlines in it do.
    """
    sizes = steps[:, :, ::2].abs().flatten(2).sort(2).values  # of each pair of neighbours once
    place = torch.arange(1, sizes.shape[2] + 1, device=sizes.device)
    number = (place - len(place) + inside[::2].sum()).clamp(min=1)  # of pairs up to this one
    above_median = 2 * (len(place) - place) <= torch.count_nonzero(sizes, 2)[..., None]
    squares = sizes.square()
    sums, following = squares.cumsum(2), squares.roll(-1, 2)
    ends = above_median & (following * number > OUTLIER**2 * sums) | (place == len(place))
    last = ends.int().argmax(2, keepdim=True)
    mean_square = sums.gather(2, last) // number[last]
    # Of an integer below 2 ** 44, no root is so near the middle between two that devices could round it differently.
    root = mean_square.to(wide_dtype(steps.device)).sqrt().round()[..., None]
    return root, inside * (steps.abs() <= sizes.gather(2, last)[..., None]).all(1)


def patch_sums(images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sums of the pixels of each patch, where each channel of each image is brought to its own whole-number scale.

    Images are [B, C, height, width], of any float or integer type, whose patches divide them evenly. The sums [B, C, N]
    int64 are at most 2 ** 42, and 0 in a channel of one value. NaN and inf count as 0, and are True in what comes next.
    """
    wide = wide_dtype(images.device)
    bad = ~images.isfinite()
    images = images.to(wide, copy=True).nan_to_num_(0, 0, 0)
    darkest = einops.reduce(images, PATCHES, "min", h=grid[0], w=grid[1])
    # The median, by a sort: torch's own refuses to run on a GPU where algorithms must be deterministic.
    middle = darkest.sort(2).values[..., (darkest.shape[2] - 1) // 2, None]
    far = _median((darkest - middle).abs()) * FAR
    far = torch.where(far > 0, far, torch.inf)[..., None]
    images.sub_(middle[..., None]).clamp_(-far, far)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    largest = 1 << (42 if wide == torch.float64 else 22)  # so that sums are exact
    pixels = images.shape[2] * images.shape[3] // (grid[0] * grid[1])
    scale = (max(largest // pixels, 1) / (high - low)).nan_to_num_(0, 0, 0)
    whole = images.sub_(torch.where(scale > 0, low, 0)).mul_(scale).round_()
    return einops.reduce(whole, PATCHES, "sum", h=grid[0], w=grid[1]).long(), bad


def _median(values: Tensor) -> Tensor:
    """The median of those values [..., K], >= 0, that are not 0, [..., 1]; 0 where there are none."""
    ordered, found = values.sort(-1).values, torch.count_nonzero(values, -1)[..., None]
    return ordered.gather(-1, (values.shape[-1] - found + found // 2).clamp(max=values.shape[-1] - 1))


def weaken(edges: Tensor, labels: Tensor, level: int) -> Tensor:
    """Edges for a deeper level of the tree, in proportion to the size of their part where it is small.

    For the outline of a part falls with the square root of its size.
    """
    one = torch.ones_like(labels, dtype=wide_dtype(labels.device))
    count = torch.zeros_like(one).scatter_add_(1, labels, one)  # there are no more parts than patches
    share = (count.gather(1, labels) * (SMALL / labels.shape[1])).clamp_(max=1)
    return (edges * (LEVEL**level * share[:, None])).int()
