"""A mask that is the same all along one axis: tubes through the frames of a video, columns through a volume."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from ..grid import Grid, GridSize, check_grid, repeat_along, times, without_axis
from . import functional as F
from .base import Masking, check_masking

OF_EPOCHS = ("alpha", "epoch", "power", "set_epoch", "total_epochs")


class TubeMask(Masking):
    """Any mask, drawn on the other axes of the grid and repeated along this one.

    A mask ratio is rounded on the grid that is drawn: at 0.9, 19 of 196 patches of each frame stay. Where `keep` names
    a number that is no multiple of the axis, one tube at most is cut, at random.
    Source: VideoMAE, https://arxiv.org/abs/2203.12602

    Args:
        mask: the mask that is repeated. One that evolves does so here, too: `set_epoch`, `alpha` and `epoch` are its.
        axis: along which it is repeated: 0 is the time of a grid (T, H, W).
        grid_size: as in `Masking`, with this axis.

    Parts are those of the grid that is drawn, [B, H * W], or of all patches, [B, T * H * W]: then each tube belongs to
    the part that most of its patches do.

    Examples:
        >>> from maskevolve import RandomMask
        >>> mask = TubeMask(RandomMask()).sample(2, (8, 14, 14), 0.9).view(2, 8, 196)
        >>> bool((mask == mask[:, :1]).all()), (~mask[0]).sum(1)
        (True, tensor([19, 19, 19, 19, 19, 19, 19, 19]))
    """

    def __init__(self, mask: Masking, axis: int = 0, *, grid_size: GridSize | None = None) -> None:
        super().__init__(grid_size)
        check_masking(mask, "mask")
        self.mask, self.axis = mask, axis
        if grid_size is not None:
            self._drawn(check_grid(grid_size))

    def __getattr__(self, name: str) -> Any:
        if name not in OF_EPOCHS:
            return super().__getattr__(name)
        value = getattr(super().__getattr__("mask"), name)
        return partial(_set_epoch, self, value) if name == "set_epoch" else value

    @property
    def needs_parts(self) -> bool:  # type: ignore[override]
        """Whether the mask that is repeated does."""
        return self.mask.needs_parts

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        """The places of tubes in a random order that keeps that of their scores, so that none is cut by a tie."""
        axis, drawn = self._drawn(grid_size)
        scores = self.mask.checked_draw(batch_size, drawn, self._parts_of_tubes(parts, grid_size), **source)
        return repeat_along(F.shuffle(scores, source.get("generator"))[1].float(), grid_size, axis)

    def checked_draw(self, *args: Any, **source: Any) -> Tensor:
        """The mask that is repeated makes the checks."""
        return self.draw(*args, **source)

    def unit_draw(self, batch_size: int, grid: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        """The scores of the mask that is repeated, as in a blend."""
        axis, drawn = self._drawn(grid)
        scores = self.mask.unit_draw(batch_size, drawn, self._parts_of_tubes(parts, grid), **source)
        return repeat_along(scores, grid, axis)

    def num_visible(self, grid: Grid, mask_ratio: float = 0.75, keep: int | None = None) -> int:
        axis, drawn = self._drawn(grid)
        own = super().num_visible(grid, mask_ratio, keep)  # first, for it may raise an error
        return own if keep is not None else grid[axis] * self.mask.num_visible(drawn, mask_ratio)

    def _drawn(self, grid: Grid) -> tuple[int, Grid]:
        """The axis, and the grid without it."""
        axis, drawn = without_axis(self.axis, grid)
        if self.mask.grid_size is not None and check_grid(self.mask.grid_size) != drawn:
            left = f"a grid of {times(grid)} patches has {times(drawn)} without axis={self.axis}"
            raise ValueError(f"{left}, but the mask that is repeated has grid_size={self.mask.grid_size!r}")
        return axis, drawn

    def _parts_of_tubes(self, parts: Tensor | None, grid: Grid) -> Tensor | None:
        if not isinstance(parts, Tensor) or parts.shape[1:] != (math.prod(grid),):
            return parts  # those of the grid that is drawn, which the mask that is repeated checks
        cells: Tensor = F.check_parts(parts, owner=type(self).__name__).unflatten(1, grid)
        return cells.mode(self._drawn(grid)[0] + 1).values.flatten(1)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"axis={self.axis}", super().extra_repr())))


def _set_epoch(mask: TubeMask, set_epoch: Any, epoch: float) -> TubeMask:
    set_epoch(epoch)
    return mask
