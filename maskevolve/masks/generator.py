"""Masks for data sets that draw one for each sample, in the processes of a loader."""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import is_whole
from ..grid import GridSize, check_grid, times
from .base import Masking, check_masking


class MaskGenerator:
    """A mask for each call, in place of the generator in a data set's transform or in a collate function.

    Those of VideoMAE are called without an argument; those of DINOv2, DINOv3 and lightly-train with the number of
    patches to remove. Drawn with torch's default generator, which a DataLoader seeds in each of its processes.

    Args:
        masking: the mask. It is moved by `set_epoch` of the generator: its own reaches no process that is alive.
        grid_size: the side of a square patch grid, or (L,), (H, W), (T, H, W) or (D, H, W), in patches.
        mask_ratio: share of patches to remove, in [0, 1), where a call does not say how many.

    Examples:
        >>> from maskevolve import RandomMask, TubeMask
        >>> generator = MaskGenerator(TubeMask(RandomMask()), (8, 14, 14), 0.9)
        >>> generator().shape, int(generator().sum()), generator(100).shape
        ((1568,), 1416, (8, 14, 14))

    Source: https://github.com/MCG-NJU/VideoMAE; https://github.com/facebookresearch/dinov3
    """

    def __init__(self, masking: Masking, grid_size: GridSize, mask_ratio: float = 0.75) -> None:
        check_masking(masking)
        self.masking, self.grid_size = masking, check_grid(grid_size)
        self.num_patches = math.prod(self.grid_size)
        self.keep = masking.num_visible(self.grid_size, mask_ratio)
        self._epoch = torch.full(
            (), math.nan, dtype=torch.float64, device="cpu"
        ).share_memory_()  # seen by all processes
        self._own_epoch = math.nan

    def set_epoch(self, epoch: float) -> "MaskGenerator":
        """Move the mask to an epoch, in all processes of a loader that are alive, and return the generator."""
        if not hasattr(self.masking, "set_epoch"):
            raise ValueError(f"{type(self.masking).__name__} does not evolve: it has no epoch={epoch} to be set to")
        cast(Any, self.masking).set_epoch(epoch)
        self._epoch.fill_(epoch)
        self._own_epoch = float(epoch)
        return self

    def __call__(self, num_removed: int | None = None, *, parts: Any = None) -> np.ndarray[Any, Any]:
        """The next mask.

        Args:
            num_removed: how many patches to remove, from 0 to N - 1, in place of the mask ratio.
            parts: [N] integers >= 0, the part of each patch, as they came with the sample; a tensor or an array.

        Returns:
            bool, True (1) is removed: flat, [N], or of the shape of the grid where `num_removed` is given.

        Raises:
            ValueError: as of `Masking.sample`.
        """
        if num_removed is not None and not (is_whole(num_removed) and 0 <= num_removed < self.num_patches):
            grid = f"no whole number in [0, {self.num_patches - 1}] for {times(self.grid_size)} patches"
            raise ValueError(f"num_removed={num_removed!r} is {grid}")
        epoch = float(self._epoch)
        if not math.isnan(epoch) and epoch != self._own_epoch:
            cast(Any, self.masking).set_epoch(epoch)
            self._own_epoch = epoch
        labels: Tensor | None = None if parts is None else torch.as_tensor(parts, device="cpu")[None]
        keep = self.keep if num_removed is None else self.num_patches - num_removed
        mask = self.masking.sample(1, self.grid_size, keep=keep, parts=labels, device="cpu")[0].numpy()
        return mask if num_removed is None else mask.reshape(self.grid_size)
