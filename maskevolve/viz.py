"""Pictures of parts and masks: what a run is masking, and how that evolves."""

from __future__ import annotations

import colorsys
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grid import GridSize, resolve_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evolution_figure", "mask_picture", "part_picture"]

Picture = npt.NDArray[np.float32]
OUTLINE = np.array([1.0, 0.85, 0.1], dtype=np.float32)
GREY = np.array([0.5, 0.5, 0.5], dtype=np.float32)
BLUE = np.array([0.45, 0.6, 0.9], dtype=np.float32)
SLACK = 1 / 512  # half a step of bytes: nothing that could be seen
STRENGTH = 0.6  # of the colour of a part, against the picture in grey
HUES = (0.0, 0.07, 0.14, 0.24, 0.37, 0.5, 0.58, 0.76, 0.88, 1.0)  # even to the eye, which sees few blues and greens
SHADES = ((0.5, 1.0), (0.9, 0.55), (0.85, 0.95))  # saturation and value
APART, NEIGHBOURS_APART = 0.25, 0.5  # the distance of two colours, where enough of them are left
EYE = np.array([1.0, 1.3, 0.6], dtype=np.float32)  # what red, green and blue count in that distance
GOLDEN = 0.6180339887  # multiples of the golden ratio are spread evenly at any count
COLUMN, FONT, LETTERS = 1.6, 7, 16  # inches, points, letters in a line of a title: the widest letter is as wide as high


def part_picture(image: Any, parts: Tensor, grid_size: GridSize | None = None, *, colours: bool = False) -> Picture:
    """The image with its parts outlined in yellow, or each in a colour of its own.

    Args:
        image: a tensor [3, height, width], an array [height, width, 3] or [3, height, width], or with one channel or
            none in grey; floats in [0, 1] or uint8. Or a picture of PIL.
        parts: [N] integers, the part of each patch.
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, the grid of square patches of
            the image or, where there is none, a square grid.
        colours: show which pieces belong together: the image in grey under a colour for each part. In nested
            partitions, most parts that are not split keep their colours.

    Returns:
        [height, width, 3] float32 in [0, 1].

    Warns:
        UserWarning: where values leave [0, 1], which are cut off: see `mask_picture`.

    Examples:
        >>> part_picture(torch.zeros(3, 8, 8), torch.tensor([0, 0, 1, 1])).shape
        (8, 8, 3)
        >>> picture = part_picture(torch.zeros(3, 8, 8), torch.tensor([0, 1, 1, 0]), colours=True)
        >>> bool((picture[0, 0] == picture[7, 7]).all())
        True
    """
    (picture,), parts = _pictures([image]), torch.as_tensor(parts)
    if parts.is_complex() or (parts.is_floating_point() and bool((parts != parts.round()).any())):
        raise ValueError(f"parts has dtype {parts.dtype}, but part labels are integers: use parts.long()")
    grid = _to_grid(parts, grid_size, picture)
    if colours:
        picture[:] = (1 - STRENGTH) * picture.mean(2, keepdims=True)
        picture += STRENGTH * _to_pixels(_colours(grid), picture)
    else:
        picture[_outlines(_to_pixels(grid, picture))] = OUTLINE
    return picture


def mask_picture(image: Any, mask: Tensor, grid_size: GridSize | None = None) -> Picture:
    """The image with its removed patches in grey; in blue where the image itself has no colour.

    Args:
        image: a tensor [3, height, width], an array [height, width, 3] or [3, height, width], or with one channel or
            none in grey; floats in [0, 1] or uint8. Or a picture of PIL.
        mask: [N], 0 keep, 1 remove.
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, the grid of square patches of
            the image or, where there is none, a square grid.

    Returns:
        [height, width, 3] float32 in [0, 1].

    Warns:
        UserWarning: where values leave [0, 1], which are cut off. Images that were normalised for a model are
            ``images * std + mean`` before that, with the std and the mean of each channel as [3, 1, 1].

    Examples:
        >>> mask_picture(torch.rand(3, 8, 8), torch.tensor([0, 0, 1, 1]))[-1, 0]
        array([0.5, 0.5, 0.5], dtype=float32)
    """
    (picture,), mask = _pictures([image]), torch.as_tensor(mask)
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
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
    """The same images at several points of training, each a column: parts above, what the mask leaves below.

    The first column shows the images themselves.

    Args:
        images: [B, 3, height, width], floats in [0, 1] or uint8; or B images as `mask_picture` takes them.
        masks: [B, N] for each point, 0 keep, 1 remove.
        parts: [B, N] integers for each point; None where there were none.
        titles: what to write above each column; long ones take several lines.
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, the grid of square patches of
            the image or, where there is none, a square grid.

    Returns:
        A matplotlib figure; write it with ``figure.savefig("evolution.png")``.

    Raises:
        ImportError: where matplotlib is missing.

    Warns:
        UserWarning: where values leave [0, 1]: see `mask_picture`.

    Examples:
        >>> images, parts = torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, -1) // 4
        >>> figure = evolution_figure(images, [parts > 1], [parts], ["epoch 0"])
        >>> len(figure.axes)
        8
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("evolution_figure needs matplotlib: pip install matplotlib") from error

    pictures = _pictures(images)
    height, width, _ = pictures[0].shape
    names = ["parts", "visible"] if any(part is not None for part in parts) else ["visible"]
    rows, columns = len(names) * len(pictures), 1 + len(masks)
    headings = ["image", *map(_heading, titles)]
    lines = 1 + max(heading.count("\n") for heading in headings)
    size = COLUMN * columns, COLUMN * rows * height / width + 0.2 + lines * 1.3 * FONT / 72
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for index, picture in enumerate(pictures):
        top = len(names) * index
        axes[top, 0].imshow(picture)
        for row, name in enumerate(names, start=top):
            axes[row, 1].set_ylabel(name, fontsize=FONT)
        for column, (mask, part) in enumerate(zip(masks, parts, strict=True), start=1):
            if part is not None:
                axes[top, column].imshow(part_picture(picture, part[index], grid_size))
            else:
                axes[top, column].set_box_aspect(picture.shape[0] / picture.shape[1])
            axes[top + len(names) - 1, column].imshow(mask_picture(picture, mask[index], grid_size))
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=FONT)
    return figure


def _heading(title: str) -> str:
    """A title in lines that fit a column; a long one is broken after its commas first."""
    broken = [line if len(line) <= LETTERS else line.replace(", ", ",\n") for line in str(title).splitlines()]
    return "\n".join(textwrap.fill(line, LETTERS) for line in "\n".join(broken).splitlines())


def _pictures(images: Tensor | Sequence[Any]) -> list[Picture]:
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


def _channels_last(image: Any) -> Picture:
    """A copy, [height, width, 3] float32; bytes are brought to [0, 1]."""
    if hasattr(image, "convert"):  # a picture of PIL, of any mode
        image = np.asarray(image.convert("RGB"))
    channels_first = isinstance(image, Tensor)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    if image.ndim == 2 or (image.ndim == 3 and 1 in (image.shape[0], image.shape[2])):  # grey
        image = image.reshape(*image.shape[:2], 1) if image.ndim == 2 or image.shape[2] == 1 else image[0][..., None]
        image, channels_first = image.repeat(3, 2), False
    channels_first |= image.shape[-1] != 3
    if image.ndim != 3 or image.shape[0 if channels_first else 2] != 3:
        raise ValueError(
            f"image has shape {list(image.shape)}, but must be [3, height, width] or, in grey, [1, height, width], or "
            "an array with the channels last, floats in [0, 1] or uint8: choose three of more channels"
        )
    picture: Picture = (image.transpose(1, 2, 0) if channels_first else image).astype(np.float32)
    return picture / np.float32(255) if image.dtype == np.uint8 else picture


def _to_grid(patches: Tensor, grid_size: GridSize | None, picture: Picture) -> npt.NDArray[np.int64]:
    """[N] values of patches to [H, W]."""
    if patches.ndim != 1:
        raise ValueError(f"one image has one value a patch, [N], but got {list(patches.shape)}: index the batch first")
    grid = resolve_grid(len(patches), grid_size, picture.shape[:2])
    values: npt.NDArray[np.int64] = patches.detach().to("cpu", torch.int64).view(grid).numpy()
    return values


def _to_pixels(grid: npt.NDArray[Any], picture: Picture) -> npt.NDArray[Any]:
    """[H, W, ...] values of patches to [height, width, ...] values of pixels."""
    rows = np.arange(picture.shape[0]) * grid.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * grid.shape[1] // picture.shape[1]
    pixels: npt.NDArray[Any] = grid[rows[:, None], columns]
    return pixels


def _outlines(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where labels [height, width] meet: lines as wide as a 150th of the shorter side, rounded up."""
    width = -(-min(labels.shape) // 150)
    lines = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        lines |= np.diff(labels, axis=axis, prepend=labels.take([0], axis)) != 0
    for axis, size in enumerate(labels.shape):
        places = np.arange(size) + width // 2
        lines = np.logical_or.reduce([lines.take(places - step, axis, mode="clip") for step in range(width)])
    return lines


def _colours(grid: npt.NDArray[np.int64]) -> Picture:
    """Labels [H, W] to a colour for each part, [H, W, 3].

    The patches are numbered in a fixed order, scattered over the grid. The number of a part is the lowest of its
    patches: it keeps that where others are split, and so does, more often than not, the larger side of a split. A part
    takes the first colour of the series from its number on that differs enough from those of the parts with lower
    numbers, most of all from those of its neighbours; where there is none, the one that differs most.
    """
    middle = np.ravel_multi_index((grid.shape[0] // 2, grid.shape[1] // 2), grid.shape)
    numbered = (GOLDEN * (np.arange(grid.size) - middle) % 1).argsort()
    labels, numbers = np.unique(grid.flat[numbered], return_index=True)
    order = numbers.argsort()
    parts = order.argsort()[np.searchsorted(labels, grid)]
    wanted = np.full((len(labels), len(labels)), APART)
    for one, other in ((parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1])):
        wanted[one, other] = wanted[other, one] = NEIGHBOURS_APART
    colours = np.zeros((len(labels), 3), dtype=np.float32)
    for part, number in enumerate(numbers[order]):
        series = _series(int(number))
        distances = np.linalg.norm(EYE * (series[:, None] - colours[:part]), axis=2)
        colours[part] = series[(distances / wanted[part, :part]).min(1, initial=1).argmax()]
    return colours[parts]


def _series(start: int, count: int = 48) -> Picture:
    """[count, 3]: colours of an endless series; those that follow each other lie far apart."""
    places = range(start, start + count)
    hues = np.interp([GOLDEN * place % 1 for place in places], np.linspace(0, 1, len(HUES)), HUES)
    colours = [colorsys.hsv_to_rgb(hue, *SHADES[place % 3]) for place, hue in zip(places, hues, strict=True)]
    return np.array(colours, dtype=np.float32)
