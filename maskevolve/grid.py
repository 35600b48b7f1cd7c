"""The patch grid: how many rows and columns of patches there are."""

from __future__ import annotations

import math
from typing import Any

from .checks import is_whole

__all__ = ["GridSize", "check_grid", "resolve_grid"]

GridSize = int | tuple[int, int]
"""The side of a square patch grid, or (H, W), in patches."""


def resolve_grid(
    num_patches: int, grid_size: GridSize | None, image_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The grid (H, W) that holds `num_patches`; where `grid_size` is None, that of square patches, or a square one.

    Args:
        num_patches: number of patches N of one image.
        grid_size: None, the side of a square grid, or (H, W), in patches.
        image_size: (height, width) of the images, in pixels, where they are known.

    Returns:
        (H, W) with H * W == num_patches.

    Raises:
        ValueError: where no such grid exists.

    Examples:
        >>> resolve_grid(196, None), resolve_grid(12, (3, 4)), resolve_grid(256, None, image_size=(128, 512))
        ((14, 14), (3, 4), (8, 32))
    """
    if grid_size is None and image_size is not None:
        side = math.isqrt(image_size[0] * image_size[1] // max(num_patches, 1))
        if side and (image_size[0] // side) * (image_size[1] // side) == num_patches:
            return image_size[0] // side, image_size[1] // side
    if grid_size is None:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            token = " (or leave out the class token)" if math.isqrt(num_patches - 1) ** 2 == num_patches - 1 else ""
            raise ValueError(
                f"N={num_patches} patches form no square grid{token}: pass grid_size=(H, W) with H * W = {num_patches}"
                ", to a mask when you make it (or give it x as [B, H, W, D]), to anything else when you call it"
            )
        return side, side
    height, width = check_grid(grid_size)
    if height * width != num_patches:
        raise ValueError(
            f"grid_size={grid_size!r} has {height} x {width} = {height * width} patches, but there are N={num_patches}"
        )
    return height, width


def check_grid(grid_size: Any) -> tuple[int, int]:
    """A grid size, one number or (H, W), as (H, W)."""
    if isinstance(grid_size, (tuple, list)) and len(grid_size) == 2:
        height, width = grid_size
    else:
        height = width = grid_size
    if not is_whole(height) or not is_whole(width) or height < 1 or width < 1:
        raise ValueError(
            f"grid_size={grid_size!r} must be the side of a square patch grid, or (H, W), in patches: whole numbers of "
            "at least 1"
        )
    return int(height), int(width)
