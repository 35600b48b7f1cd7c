"""Pictures of parts and masks: what a run masks, and how that evolves."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .grid import GridSize, resolve_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evolution_figure", "mask_picture", "part_picture"]

Array = np.ndarray[Any, Any]
OUTLINE, GREY, BLUE = np.array([[1, 0.85, 0.1], [0.5, 0.5, 0.5], [0.45, 0.6, 0.9]], np.float32)
COLOURS = "1ed 709 f60 060 f6f 08f fd0 910 0b0 fce 058 a69 598 5f5 94f f18 32d 8bf ba3 960"  # far apart in Oklab
PALETTE = np.array([[int(digit, 16) for digit in colour] for colour in COLOURS.split()], np.float32) / 15
STRENGTH = 0.6  # of the colour of a part, against the picture in grey
SLACK = 1 / 512  # half a step of bytes: nothing that could be seen
COLUMN, FONT, LETTERS = 1.6, 7, 16  # inches, points, letters in a line of a title: the widest letter is as wide as high


def part_picture(image: Any, parts: Tensor, grid_size: GridSize | None = None, *, colours: bool = False) -> Array:
    """The image with its parts outlined in yellow, or each part in a colour.

    Args:
        image: a tensor [3, height, width], an array [height, width, 3] or [3, height, width], or with one channel or
            none in grey; floats in [0, 1] or uint8. Or a picture of PIL.
        parts: [N] integers, the part of each patch.
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, the grid of square patches of
            the image or, where there is none, a square grid.
        colours: the image in grey under a fixed palette. Up to 20 parts differ in colour; of more, those that touch do,
            unless one touches 20 others. In nested partitions, most parts that are not split keep theirs, not all.

    Returns:
        [height, width, 3] float32 in [0, 1]; what leaves that range is cut off, with a warning. Undo a normalisation
        first with ``images * std + mean``, with the std and the mean of each channel as [3, 1, 1].

    Examples:
        >>> picture = part_picture(torch.zeros(3, 8, 8), torch.tensor([0, 1, 1, 0]), colours=True)
        >>> picture.shape, bool((picture[0, 0] == picture[7, 7]).all())
        ((8, 8, 3), True)
    """
    (picture,), parts = _pictures([image]), torch.as_tensor(parts)
    if parts.is_complex() or (parts.is_floating_point() and bool((parts != parts.round()).any())):
        raise ValueError(f"parts has dtype {parts.dtype}, but part labels are integers: use parts.long()")
    grid = _to_grid(parts, grid_size, picture)
    if colours:
        picture[:] = (1 - STRENGTH) * picture.mean(2, keepdims=True)
        picture += STRENGTH * _to_pixels(PALETTE[_choose_colours(grid)], picture)
    else:  # a pixel is outlined where the corners of a small window around it are not all in one part
        width = -(-min(picture.shape[:2]) // 150)
        corners = [_to_pixels(grid, picture, by) for by in product((width // 2 - width, width // 2), repeat=2)]
        picture[np.not_equal(corners, corners[0]).any(0)] = OUTLINE
    return picture


def mask_picture(image: Any, mask: Tensor, grid_size: GridSize | None = None) -> Array:
    """The image with its removed patches in grey; in blue where the image itself has no colour.

    Args:
        image: one image, as `part_picture` takes it.
        mask: [N], 0 keep, 1 remove.
        grid_size: as for `part_picture`.

    Returns:
        [height, width, 3] float32 in [0, 1], as from `part_picture`.

    Examples:
        >>> mask_picture(torch.rand(3, 8, 8), torch.tensor([0, 0, 1, 1]))[-1, 0]
        array([0.5, 0.5, 0.5], dtype=float32)
    """
    (picture,), mask = _pictures([image]), torch.as_tensor(mask)
    if (other := mask[(mask != 0) & (mask != 1)]).numel():
        raise ValueError(f"mask has the value {other[0].item():.4g}, but must be 0 (keep) or 1 (remove) in each patch")
    has_colour = np.ptp(picture, axis=2).max() > SLACK
    picture[_to_pixels(_to_grid(mask, grid_size, picture), picture) > 0] = GREY if has_colour else BLUE
    return picture


def evolution_figure(
    images: Tensor | Sequence[Any],
    masks: Sequence[Tensor],
    parts: Sequence[Tensor | None],
    titles: Sequence[str],
    grid_size: GridSize | None = None,
) -> Figure:
    """The images, and a column for each point of training: their parts above, what the mask leaves of them below.

    Args:
        images: B images as `part_picture` takes them, or [B, 3, height, width].
        masks: [B, N] for each point, 0 keep, 1 remove.
        parts: [B, N] integers for each point; None where there were none.
        titles: what to write above each column; long ones take several lines.
        grid_size: as for `part_picture`.

    Returns:
        A matplotlib figure; write it with ``figure.savefig("evolution.png")``.

    Raises:
        ImportError: where matplotlib is missing.

    Examples:
        >>> images, parts = torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, -1) // 4
        >>> len(evolution_figure(images, [parts > 1], [parts], ["epoch 0"]).axes)
        8
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("evolution_figure needs matplotlib: pip install matplotlib") from error

    pictures, titles = _pictures(images), ["image", *map(str, titles)]
    lines = [title.replace(", ", ",\n").splitlines() for title in titles]
    headings = ["\n".join(textwrap.fill(line, LETTERS) for line in title) for title in lines]
    names = ["parts", "visible"] if any(part is not None for part in parts) else ["visible"]
    rows, shape = len(names) * len(pictures), pictures[0].shape[0] / pictures[0].shape[1]
    above = 0.2 + 1.3 * FONT / 72 * (1 + max(heading.count("\n") for heading in headings))
    figure = Figure(figsize=(COLUMN * len(headings), COLUMN * rows * shape + above), layout="constrained")
    axes = figure.subplots(rows, len(headings), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False, box_aspect=shape)
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=FONT)
    for ax, name in zip(axes[:, 1], names * len(pictures), strict=True):
        ax.set_ylabel(name, fontsize=FONT)
    for index, picture in enumerate(pictures):
        first, last = axes[len(names) * index], axes[len(names) * (index + 1) - 1]
        first[0].imshow(picture)
        for column, (mask, part) in enumerate(zip(masks, parts, strict=True), start=1):
            if part is not None:
                first[column].imshow(part_picture(picture, part[index], grid_size))
            last[column].imshow(mask_picture(picture, mask[index], grid_size))
    return figure


def _pictures(images: Tensor | Sequence[Any]) -> list[Array]:
    """New arrays [height, width, 3] in [0, 1]; one warning where values are cut off."""
    pictures = [_channels_last(image) for image in images]
    low, high = np.min([picture.min() for picture in pictures]), np.max([picture.max() for picture in pictures])
    if not (low >= -SLACK and high <= 1 + SLACK):  # not so for NaN
        warnings.warn(
            f"values of the images reach from {low:.3g} to {high:.3g}: pictures cut off what leaves [0, 1]. Undo a "
            "normalisation with images * std + mean, which have one value a channel, [3, 1, 1]; give bytes as uint8",
            stacklevel=3,
        )
    return [np.nan_to_num(picture, copy=False).clip(0, 1) for picture in pictures]


def _channels_last(image: Any) -> Array:
    """A copy, [height, width, 3] float32; bytes are brought to [0, 1]."""
    if hasattr(image, "convert"):  # a picture of PIL, of any mode
        image = np.asarray(image.convert("RGB"))
    is_tensor, shape = isinstance(image, Tensor), list(image.shape)
    if is_tensor:
        image = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
    if image.ndim == 2:
        image = image[..., None]
    elif is_tensor or image.shape[-1] not in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"image has shape {shape}, but must be [3, height, width] or, in grey, [1, height, width], or an array "
            "with the channels last, floats in [0, 1] or uint8: choose three of more channels"
        )
    picture: Array = image.astype(np.float32) / np.float32(255 if image.dtype == np.uint8 else 1)
    return picture.repeat(3 // picture.shape[2], 2)


def _to_grid(patches: Tensor, grid_size: GridSize | None, picture: Array) -> Array:
    """[N] values of patches to [H, W]."""
    if patches.ndim != 1:
        raise ValueError(f"one image has one value a patch, [N], but got {list(patches.shape)}: index the batch first")
    grid = resolve_grid(len(patches), grid_size, picture.shape[:2])
    return patches.detach().to("cpu", torch.int64).view(grid).numpy()


def _to_pixels(grid: Array, picture: Array, by: tuple[int, int] = (0, 0)) -> Array:
    """Values of patches [H, W, ...] to those of pixels [height, width, ...], each from a pixel that lies `by` away."""
    (height, width, _), (rows, columns) = picture.shape, grid.shape[:2]
    below, beside = (np.arange(height) + by[0]).clip(0, height - 1), (np.arange(width) + by[1]).clip(0, width - 1)
    return grid[np.ix_(below * rows // height, beside * columns // width)]


def _choose_colours(grid: Array) -> Array:
    """Labels of parts [H, W] to places in the palette.

    A part asks for the colour of the first of its patches, in an order that begins in the middle and is scattered over
    the grid. It takes the next colour that no part before it has or, where there is none, no neighbour.
    """
    middle = len(grid) // 2 * grid.shape[1] + grid.shape[1] // 2
    order = (0.6180339887 * (np.arange(grid.size) - middle) % 1).argsort()  # the golden ratio spreads evenly
    labels, first = np.unique(grid.flat[order], return_index=True)
    parts, touch = np.searchsorted(labels, grid), np.eye(len(labels), dtype=bool)
    for one, other in ((parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1])):
        touch[one, other] = touch[other, one] = True
    chosen = np.full(len(labels), -1)
    for part in first.argsort():
        wanted = (first[part] + np.arange(len(PALETTE))) % len(PALETTE)
        taken = np.isin(wanted, chosen).astype(int) + np.isin(wanted, chosen[touch[part]])
        chosen[part] = wanted[taken.argmin()]
    return chosen[parts]
