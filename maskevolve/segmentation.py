"""Segmentations of pixels to parts: a label for each patch. A stand-in, until the real one is merged."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import GridSize

__all__ = ["parts_from_segmentation"]


def parts_from_segmentation(labels: Tensor, grid_size: GridSize, ignore: int | None = None) -> Tensor:
    """Label maps [B, height, width] to parts [B, N]: the label of most pixels of a patch, or the nearest."""
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    rows, columns = (_patch_of(pixels, cells) for pixels, cells in zip(labels.shape[1:], (height, width), strict=True))
    patches = [labels[:, row][:, :, column].flatten(1).mode(1).values for row in rows for column in columns]
    return torch.stack(patches, 1).long()


def _patch_of(pixels: int, cells: int) -> list[list[int]]:
    if pixels < cells:
        return [[(2 * cell + 1) * pixels // (2 * cells)] for cell in range(cells)]
    owners = [(2 * pixel + 1) * cells // (2 * pixels) for pixel in range(pixels)]
    return [[pixel for pixel, owner in enumerate(owners) if owner == cell] for cell in range(cells)]
