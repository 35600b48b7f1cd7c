"""Pictures of parts and masks: what a run is masking, and how that evolves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .functional import GridSize, resolve_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evolution_figure", "mask_picture", "part_picture"]

Picture = npt.NDArray[np.float32]
OUTLINE = np.array([1.0, 0.85, 0.1], dtype=np.float32)
GREY = np.array([0.5, 0.5, 0.5], dtype=np.float32)


def part_picture(image: Tensor, parts: Tensor, grid_size: GridSize | None = None) -> Picture:
    """The image with its parts outlined in yellow.

    Args:
        image: [3, height, width], floats in [0, 1] or uint8.
        parts: [N] integers, the part of each patch.
        grid_size: the side of a square patch grid, or (H, W), in patches; a square where None.

    Returns:
        [height, width, 3] float32 in [0, 1].

    Example:
        >>> part_picture(torch.zeros(3, 8, 8), torch.tensor([0, 0, 1, 1])).shape
        (8, 8, 3)
    """
    picture = _picture(image)
    labels = _to_pixels(parts, grid_size, picture)
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[:-1] |= edge[1:]  # two pixels wide
    edge[:, :-1] |= edge[:, 1:]
    picture[edge] = OUTLINE
    return picture


def mask_picture(image: Tensor, mask: Tensor, grid_size: GridSize | None = None) -> Picture:
    """The image with its removed patches in grey.

    Args:
        image: [3, height, width], floats in [0, 1] or uint8.
        mask: [N], 0 keep, 1 remove.
        grid_size: the side of a square patch grid, or (H, W), in patches; a square where None.

    Returns:
        [height, width, 3] float32 in [0, 1].

    Example:
        >>> mask_picture(torch.zeros(3, 8, 8), torch.tensor([0, 0, 1, 1]))[-1, 0]
        array([0.5, 0.5, 0.5], dtype=float32)
    """
    picture = _picture(image)
    picture[_to_pixels(mask, grid_size, picture) > 0] = GREY
    return picture


def evolution_figure(
    images: Tensor,
    masks: Sequence[Tensor],
    parts: Sequence[Tensor | None],
    titles: Sequence[str],
    grid_size: GridSize | None = None,
) -> Figure:
    """The same images at several points of training, each a column: parts above, what the mask leaves below.

    The first column shows the images themselves.

    Args:
        images: [B, 3, height, width], floats in [0, 1] or uint8.
        masks: [B, N] for each point, 0 keep, 1 remove.
        parts: [B, N] integers for each point; None where there were none.
        titles: what to write above each column.
        grid_size: the side of a square patch grid, or (H, W), in patches; a square where None.

    Returns:
        A matplotlib figure; write it with ``figure.savefig("evolution.png")``.

    Raises:
        ImportError: where matplotlib is missing.

    Example:
        >>> images, parts = torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, -1) // 4
        >>> figure = evolution_figure(images, [parts > 1], [parts], ["epoch 0"])
        >>> len(figure.axes)
        8
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("evolution_figure needs matplotlib: pip install matplotlib") from error

    rows_per_image = 1 + any(part is not None for part in parts)
    rows, columns = rows_per_image * len(images), 1 + len(masks)
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows * images.shape[2] / images.shape[3] + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for index, image in enumerate(images):
        top = rows_per_image * index
        axes[top, 0].imshow(_picture(image))
        for column, (mask, part) in enumerate(zip(masks, parts, strict=True), start=1):
            if part is not None:
                axes[top, column].imshow(part_picture(image, part[index], grid_size))
            axes[top + rows_per_image - 1, column].imshow(mask_picture(image, mask[index], grid_size))
    for ax, title in zip(axes[0], ["image", *titles], strict=True):
        ax.set_title(title, fontsize=9)
    return figure


def _picture(image: Tensor) -> Picture:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image has shape {list(image.shape)}, but must be [3, height, width], floats in [0, 1] or uint8"
        )
    image = image / 255 if image.dtype == torch.uint8 else image
    picture: Picture = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy().copy()
    return picture


def _to_pixels(patches: Tensor, grid_size: GridSize | None, picture: Picture) -> npt.NDArray[np.int64]:
    """[N] values of patches to [height, width] values of pixels."""
    if patches.ndim != 1:
        raise ValueError(f"one image has one value a patch, [N], but got {list(patches.shape)}: index the batch first")
    height, width = resolve_grid(len(patches), grid_size)
    grid = patches.detach().to("cpu", torch.int64).view(height, width).numpy()
    rows = np.arange(picture.shape[0]) * height // picture.shape[0]
    columns = np.arange(picture.shape[1]) * width // picture.shape[1]
    pixels: npt.NDArray[np.int64] = grid[rows[:, None], columns]
    return pixels
