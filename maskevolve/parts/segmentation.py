"""Segmentations of pixels to parts: a label for each patch."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_tensor, is_whole
from ..grid import SIDES, Grid, GridSize, check_grid, times


def parts_from_segmentation(labels: Tensor, grid_size: GridSize, ignore: int | None = None) -> Tensor:
    """Label maps of any size to a part for each patch: the label that most of its pixels have, the lowest of ties.

    A pixel belongs to the patch that holds its centre (to the lower or the right one where that lies on a border), so
    the height and the width need be no multiples of H and W. Along a side with fewer pixels than patches, a patch takes
    the pixel that holds its own centre: the nearest.

    Args:
        labels: [B, height, width] of any integer type or bool; labels may be negative and have gaps. Those of uint64
            from 2 ** 63 on count as negative. For other grids, as many axes: [B, length], [B, depth, height, width].
        grid_size: the side of a square patch grid, or (L,), (H, W), (T, H, W) or (D, H, W), in patches.
        ignore: a label that does not vote, such as 255 or -1 for pixels that nobody labelled. Patches without any other
            label are a part of their own, under the number of that label.

    Returns:
        parts [B, H * W] int64 >= 0: equal within an image where the labels are. They keep their numbers, except in an
        image with negative ones, where they are renumbered 0, 1, ... in their order.
        Memory: about 50 bytes for each pixel, and nothing for each label. No wait of the host.

    Raises:
        TypeError: where labels is no tensor.
        ValueError: where labels is not [B, height, width] or of floats, or grid_size or ignore is no whole number.

    Examples:
        >>> labels = torch.tensor([[[7, 7, 255, 255], [7, 3, 255, 3]]])
        >>> parts_from_segmentation(labels, (1, 2)), parts_from_segmentation(labels, (1, 2), ignore=255)
        (tensor([[  7, 255]]), tensor([[7, 3]]))
    """
    labels = check_labels(plain_tensor("labels", labels), "labels")
    if labels.ndim != 1 + len(grid := check_grid(grid_size)):
        must = f"be [B, {SIDES[len(grid)]}] for a grid of {times(grid)} patches"
        must += ": labels[None] is a batch of one" if labels.ndim <= len(grid) else ": labels[:, 0] drops a channel"
        raise ValueError(f"labels has shape {list(labels.shape)}, but must {must}")
    return labels_to_parts(labels, grid_size, ignore)


def labels_to_parts(labels: Any, grid_size: GridSize, ignore: int | None = None) -> Tensor:
    """Labels of patches [B, N] or maps [B, h, w], a tensor or an array, to parts: see `parts_from_segmentation`.

    Maps have as many axes as the grid.

    Returns:
        parts [B, N] int64 >= 0, on the device of the labels. Raises as there, and where N is not that of the grid.

    Examples:
        >>> labels_to_parts(np.array([[3, -1]]), (1, 2)), labels_to_parts(np.array([[[3, 3, -1]]]), (1, 2), ignore=-1)
        (tensor([[1, 0]]), tensor([[3, 3]]))
    """
    labels, grid = check_labels(labels), check_grid(grid_size)
    if ignore is not None and not (is_whole(ignore) and -(2**63) <= ignore < 2**64):
        raise ValueError(f"ignore={ignore!r} must be one label, a whole number, or None")
    if labels.ndim == 1 + len(grid):
        labels = _majority(labels, grid, ignore)
    if labels.shape[1:] != (math.prod(grid),):
        give = f"labels [B, N], or maps [B, {SIDES[len(grid)]}]"
        give += ": labels[:, 0] drops a channel" * (labels.ndim > 1 + len(grid))
        give += ": labels[:, None] is one map for all steps of the first axis" * (labels.ndim == len(grid) > 2)
        axes = f"N={math.prod(grid)} patches along {len(grid)} axes: give {give}"
        raise ValueError(f"parts has shape {list(labels.shape)}, but {grid_size=} has {axes}")
    return torch.where((labels < 0).any(1, keepdim=True), renumber(labels), labels)


def check_labels(labels: Any, name: str = "parts") -> Tensor:
    """Labels, a tensor or an array, as int64 where they are, NumPy's on the CPU; an error where these are no labels."""
    if not hasattr(labels, "shape"):
        raise TypeError(f"{name} is a {type(labels).__name__}, but must be a tensor: torch.stack or torch.as_tensor")
    is_tensor = isinstance(labels, Tensor)
    labels = plain_tensor(name, labels) if is_tensor else np.asarray(labels)
    if labels.is_floating_point() or labels.is_complex() if is_tensor else labels.dtype.kind not in "biu":
        raise ValueError(
            f"{name} has dtype {labels.dtype}, but labels are integers: use {name}.long() where they are labels; where "
            "a ViT is to cut the parts, pass FrozenTeacher(vit, GraphCutPartitioner(), total_epochs=epochs)"
        )
    if not 2 <= labels.ndim <= 4 or 0 in labels.shape[1:]:
        what = "a label for each patch [B, N], or maps of them [B, h, w]"
        what += ": labels[:, 0] drops a channel" * (labels.ndim > 4)
        raise ValueError(f"{name} has shape {list(labels.shape)}, but must be {what}")
    return labels.long() if is_tensor else torch.from_numpy(labels.astype(np.int64))


def plain_tensor(name: str, value: Any) -> Tensor:
    """A tensor as torch's own type, since two subclasses do not mix; TypeError where the value is no tensor."""
    check_tensor(name, value)
    return value if type(value) is Tensor else value.as_subclass(Tensor)


def renumber(labels: Tensor) -> Tensor:
    """[B, N] labels to 0..k-1 without gaps in each image, in their order."""
    values, order = labels.sort(1)
    return torch.empty_like(labels).scatter_(1, order, (values.diff(dim=1, prepend=values[:, :1]) != 0).cumsum(1))


def _majority(pixels: Tensor, grid: Grid, ignore: int | None) -> Tensor:
    """[B, height, width] labels of pixels to the label [B, H * W] that most pixels of each patch have."""
    places: list[Any] = []
    axes = len(grid)
    votes = torch.ones((), dtype=torch.bool, device=pixels.device)
    for axis, cells in enumerate(grid):
        place, is_real = _pixels_of_cells(pixels.shape[1 + axis], cells, pixels.device)
        after = [1] * (axes - 1 - axis)  # of cells, then of pixels in them
        places.append(place.view(cells, *after, *[1] * axis, -1, *after))
        votes = votes & is_real.view(cells, *after, *[1] * axis, -1, *after)
    pixels = pixels[(slice(None), *places)].flatten(-axes)  # [B, H, W, pixels of a patch]
    votes = votes.flatten(-axes).expand_as(pixels)
    if ignore is not None:
        votes = votes & (pixels != (ignore if ignore < 2**63 else ignore - 2**64))  # a label of uint64
    values, order = pixels.sort(-1)
    votes = votes.gather(-1, order)
    so_far = votes.cumsum(-1, dtype=torch.int32)
    starts = values.diff(dim=-1, prepend=values[..., :1] - 1) != 0
    before = torch.where(starts, so_far - votes.int(), 0).cummax(-1).values  # the votes for lower values
    # The first of the most votes: the lowest of ties, and the lowest of all where none has a vote.
    return values.gather(-1, (so_far - before).argmax(-1, keepdim=True)).flatten(1)


def _pixels_of_cells(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one side, the pixels of each cell [cells, K], the last one repeated up to K; and False for repetitions."""
    cell = torch.arange(cells + 1, device=device)[:, None]
    # In whole numbers, since a centre may lie on a border: pixel y has its centre at (2 * y + 1) / 2.
    first = (2 * cell * pixels + cells - 1) // (2 * cells)
    nearest = (2 * cell[:-1] + 1) * pixels // (2 * cells)
    first, end = (nearest, nearest + 1) if pixels < cells else (first[:-1], first[1:])
    pixel = first + torch.arange(-(-pixels // cells), device=device)
    return pixel.minimum(end - 1), pixel < end
