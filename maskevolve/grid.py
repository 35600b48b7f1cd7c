"""The patch grid: how many rows and columns of patches there are."""

import math
from typing import Any

from .checks import is_whole

GridSize = int | tuple[int, int]
"""The side of a square patch grid, or (H, W), in patches."""


def resolve_grid(
    num_patches: int, grid_size: GridSize | None, image_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The grid (H, W) that holds `num_patches`, with H * W == num_patches; a ValueError where there is none.

    Args:
        num_patches: number of patches N of one image.
        grid_size: the side of a square grid, or (H, W), in patches; that of square patches, or square, where None.
        image_size: (height, width) of the images, in pixels, where they are known.

    Examples:
        >>> resolve_grid(196, None), resolve_grid(12, (3, 4)), resolve_grid(256, None, image_size=(128, 512))
        ((14, 14), (3, 4), (8, 32))
    """
    if grid_size is None and image_size is not None:
        side = math.isqrt(image_size[0] * image_size[1] // max(num_patches, 1)) or 1
        height, width = image_size[0] // side, image_size[1] // side
        if height * width == num_patches:
            return height, width
    height, width = check_grid(math.isqrt(num_patches) or 1 if grid_size is None else grid_size)
    if height * width == num_patches:
        return height, width
    if grid_size is not None:
        found = f"{height} x {width} = {height * width} patches"
        raise ValueError(f"grid_size={grid_size!r} has {found}, but there are N={num_patches}")
    token = " (or leave out the class token)" if math.isqrt(num_patches - 1) ** 2 == num_patches - 1 else ""
    where = "to a mask when you make it (or x as [B, H, W, D] when you call it), to anything else when you call it"
    raise ValueError(f"N={num_patches} patches form no square grid{token}: pass grid_size=(H, W), {where}")


def every(size: int, stride: int) -> range:
    """Every `stride`-th patch along a side of `size` patches, as far from both ends; one at least.

    Examples:
        >>> [*every(14, 2)], [*every(7, 3)], [*every(1, 2)]
        ([0, 2, 4, 6, 8, 10, 12], [0, 3, 6], [0])
    """
    return range((size - 1) % stride // 2, size, stride)


def check_grid(grid_size: Any) -> tuple[int, int]:
    """A grid size, one number or (H, W), as (H, W)."""
    pair = isinstance(grid_size, (tuple, list)) and len(grid_size) == 2
    height, width = grid_size if pair else (grid_size, grid_size)
    if not is_whole(height) or not is_whole(width) or height < 1 or width < 1:
        what = "the side of a square patch grid, or (H, W), in patches: whole numbers of at least 1"
        raise ValueError(f"grid_size={grid_size!r} must be {what}")
    return int(height), int(width)
