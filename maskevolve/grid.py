"""The patch grid: how many patches there are along each of its one to three axes, the last axis fastest."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .checks import is_whole

Grid = tuple[int, ...]
GridSize = int | tuple[int, ...]
"""The side of a square patch grid, or the patches along each axis: (L,), (H, W), (T, H, W) or (D, H, W)."""

AXES = "(L,), (H, W), (T, H, W) or (D, H, W)"
SIDES = {1: "length", 2: "height, width", 3: "depth, height, width"}  # of images, by the axes of their grid


def resolve_grid(num_patches: int, grid_size: GridSize | None, image_size: Sequence[int] | None = None) -> Grid:
    """The grid, such as (H, W), that holds `num_patches`; a ValueError where there is none.

    Args:
        num_patches: number of patches N of one image.
        grid_size: the side of a square grid, or one to three numbers, in patches; that of square patches, or square,
            where None.
        image_size: (height, width) of the images, in pixels, where they are known; (depth, height, width) of volumes.

    Examples:
        >>> resolve_grid(196, None), resolve_grid(12, (3, 4)), resolve_grid(256, None, image_size=(128, 512))
        ((14, 14), (3, 4), (8, 32))
    """
    if grid_size is None and image_size is not None:
        pixels = math.prod(image_size) // max(num_patches, 1)
        side = math.isqrt(pixels) if len(image_size) == 2 else round(pixels ** (1 / len(image_size)))
        grid = tuple(size // max(side, 1) for size in image_size)
        if math.prod(grid) == num_patches:
            return grid
    grid = check_grid(math.isqrt(num_patches) or 1 if grid_size is None else grid_size)
    if math.prod(grid) == num_patches:
        return grid
    if grid_size is not None:
        found = f"{times(grid)} = {math.prod(grid)} patches"
        raise ValueError(f"grid_size={grid_size!r} has {found}, but there are N={num_patches}")
    token = " (or leave out the class token)" if math.isqrt(num_patches - 1) ** 2 == num_patches - 1 else ""
    where = "in this call; a mask also takes it when it is made, or sees it in x of shape [B, *grid, D]"
    raise ValueError(f"N={num_patches} patches form no square grid{token}: pass grid_size={AXES} {where}")


def every(size: int, stride: int) -> range:
    """Every `stride`-th patch along a side of `size` patches, as far from both ends; one at least.

    Examples:
        >>> [*every(14, 2)], [*every(7, 3)], [*every(1, 2)]
        ([0, 2, 4, 6, 8, 10, 12], [0, 3, 6], [0])
    """
    return range((size - 1) % stride // 2, size, stride)


def check_grid(grid_size: Any) -> Grid:
    """A grid size, one number or one to three, as a tuple."""
    sides = grid_size if isinstance(grid_size, (tuple, list)) else (grid_size, grid_size)
    if not 1 <= len(sides) <= 3 or not all(is_whole(side) and side >= 1 for side in sides):
        what = f"the side of a square patch grid, or {AXES}, in patches: whole numbers of at least 1"
        raise ValueError(f"grid_size={grid_size!r} must be {what}")
    return tuple(map(int, sides))


def without_axis(axis: Any, grid: Grid) -> tuple[int, Grid]:
    """The number of an axis, counted from 0 (below 0, from the end), and the grid without it, of one axis or more."""
    if not is_whole(axis) or not -len(grid) <= axis < len(grid):
        raise ValueError(f"axis={axis!r} does not exist in a grid of {times(grid)} patches, which has {len(grid)} axes")
    if len(grid) == 1:
        raise ValueError(f"a grid of {times(grid)} patches has one axis, and nothing is left without axis={axis}")
    axis = int(axis) % len(grid)
    return axis, grid[:axis] + grid[axis + 1 :]


def repeat_along(values: Tensor, grid: Grid, axis: int) -> Tensor:
    """Values [B, n] of the patches of a grid without an axis, repeated along it: [B, N]."""
    left: Tensor = values.unflatten(1, grid[:axis] + grid[axis + 1 :])
    return left.unsqueeze(axis + 1).expand(-1, *grid).flatten(1)


def times(sizes: Sequence[int]) -> str:
    """Sizes as in a message, such as 8 x 14 x 14."""
    return " x ".join(map(str, sizes))
