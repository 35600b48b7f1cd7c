"""Which of the tensors that a step was given are the images whose patches it masks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..teachers.patch_grid import patch_grid

__all__ = ["first_images", "images_of"]


def images_of(model: nn.Module, tensors: Iterable[Tensor], num_patches: int) -> list[Tensor]:
    """Those that could be images [B, C, height, width] of so many patches, in their order."""
    return [x for x in tensors if x.ndim == 4 and math.prod(patch_grid(model, x)) == num_patches]


def first_images(views: list[Tensor], batch_size: int) -> Tensor | None:
    """The first views that are `batch_size` images between them, as one tensor; None where there are no such.

    DINOv2 and iBOT are given several views of each image, and mask the first ones, one after the other.

    Examples:
        >>> first_images([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)], 4).shape
        torch.Size([4, 3, 8, 8])
    """
    for number, size in enumerate(accumulate(map(len, views)), 1):
        if size == batch_size:
            return views[0] if number == 1 else torch.cat(views[:number])
    return None
