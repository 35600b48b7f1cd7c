"""Segmentations of pixels to parts: a label for each patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import is_whole
from ..grid import GridSize, check_grid

__all__ = ["parts_from_segmentation"]


def parts_from_segmentation(labels: Tensor, grid_size: GridSize, ignore: int | None = None) -> Tensor:
    """Label maps of any size to a part for each patch: the label that most of its pixels have, the lowest of ties.

    A pixel belongs to the patch that holds its centre (to the lower or the right one where that lies on a border), so
    the height and the width need be no multiples of H and W. Along a side with fewer pixels than patches, a patch takes
    the pixel that holds its own centre: the nearest.

    Args:
        labels: [B, height, width] of any integer type or bool; labels may be negative and have gaps.
        grid_size: the side of a square patch grid, or (H, W), in patches.
        ignore: a label that does not vote, such as 255 or -1 for pixels that nobody labelled. Patches without any other
            label are a part of their own, under the number of that label.

    Returns:
        parts [B, N] int64 >= 0: equal within an image where the labels are. They keep their numbers, except in an image
        with negative ones, where they are renumbered 0, 1, ... in their order.

    Raises:
        ValueError: where labels is not [B, height, width] or of a float type, or where grid_size or ignore is no whole
            number.

    Shape:
        labels [B, height, width] to parts [B, H * W].
        Memory: about 50 bytes for each pixel, and nothing for each label. No wait of the host.

    Examples:
        >>> labels = torch.tensor([[[7, 7, 255, 255], [7, 3, 255, 3]]])
        >>> parts_from_segmentation(labels, (1, 2)), parts_from_segmentation(labels, (1, 2), ignore=255)
        (tensor([[  7, 255]]), tensor([[7, 3]]))
    """
    _check(labels, ignore)
    height, width = check_grid(grid_size)
    rows, real_rows = _pixels_of_cells(labels.shape[1], height, labels.device)
    columns, real_columns = _pixels_of_cells(labels.shape[2], width, labels.device)
    pixels = labels.long()[:, rows[:, None, :, None], columns[:, None, :]].flatten(3)  # [B, H, W, pixels of a patch]
    votes = (real_rows[:, None, :, None] & real_columns[:, None, :]).flatten(2).expand_as(pixels)
    if ignore is not None:
        votes = votes & (pixels != ignore)
    return _without_negative(_most_frequent(pixels, votes).flatten(1))


def _pixels_of_cells(pixels: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one side, the pixels of each cell, [cells, K], its last one repeated up to K; and which are no repetition.

    In whole numbers, since a centre may lie on a border: pixel y has its centre at (2 * y + 1) / 2.
    """
    cell = torch.arange(cells + 1, device=device)
    if pixels < cells:
        nearest = (2 * cell[:-1, None] + 1) * pixels // (2 * cells)
        return nearest, torch.ones_like(nearest, dtype=torch.bool)
    first = (2 * cell * pixels + cells - 1) // (2 * cells)
    pixel = first[:-1, None] + torch.arange(-(-pixels // cells), device=device)
    end = first[1:, None]
    return pixel.minimum(end - 1), pixel < end


def _most_frequent(values: Tensor, votes: Tensor) -> Tensor:
    """[..., K] values to the one with the most votes, the lowest of ties; the lowest of all where none has a vote."""
    values, order = values.sort(-1)
    votes = votes.gather(-1, order)
    so_far = votes.cumsum(-1, dtype=torch.int32)
    starts = torch.ones_like(votes)
    starts[..., 1:] = values[..., 1:] != values[..., :-1]
    before = torch.where(starts, so_far - votes.int(), 0).cummax(-1).values  # the votes for lower values
    return values.gather(-1, (so_far - before).argmax(-1, keepdim=True)).squeeze(-1)


def _without_negative(labels: Tensor) -> Tensor:
    """[B, N] labels, with the place of each among those of its image where one of them is negative."""
    values, order = labels.sort(1)
    steps = (values.diff(dim=1) != 0).long()
    ranks = nn.functional.pad(steps, (1, 0)).cumsum(1)
    return torch.where((labels < 0).any(1, keepdim=True), torch.empty_like(labels).scatter_(1, order, ranks), labels)


def _check(labels: Tensor, ignore: int | None) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}, but must be a tensor: use torch.as_tensor(labels)")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels has dtype {labels.dtype}, but labels are integers: use labels.long()")
    if labels.ndim != 3 or 0 in labels.shape[1:]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}, but must be [B, height, width], one label for each pixel: use "
            "labels[None] for one image, labels[:, 0] where there is a channel"
        )
    if ignore is not None and not is_whole(ignore):
        raise ValueError(f"ignore={ignore!r} must be one label, a whole number, or None")
