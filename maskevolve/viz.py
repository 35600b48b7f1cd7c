"""Pictures of parts and masks, of images, clips, volumes and series: what a run masks, and how that evolves."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .grid import Grid, GridSize, check_grid, resolve_grid

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
ROW = 0.8  # inches: the height of a clip or series in a figure, at least
GAP, STRIP = 2, (64, 512)  # pixels: between frames; the height of a series, and its width, about
INK, RED = (0.1, 0.15, 0.35), (0.9, 0.1, 0.1)  # the wave of a series, and the outlines of its parts


def part_picture(image: Any, parts: Tensor, grid_size: GridSize | None = None, *, colours: bool = False) -> Array:
    """The image with its parts outlined in yellow (red on the white of a series), or each part in a colour.

    Args:
        image: a tensor [3, height, width], an array [height, width, 3] or [3, height, width], or with one channel or
            none in grey; floats in [0, 1] or uint8. Or a picture of PIL. Or a clip [3, T', height, width] or
            [T', height, width, 3] or a volume [D', height, width], T' or D' a multiple of the steps of the grid; a last
            axis of 1 or 3 is that of the channels. Or a series [length] or [C, length] of any values.
        parts: [N] integers, the part of each patch.
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, the grid of square patches of
            the image or, where there is none, a square grid. (T, H, W) or (D, H, W) for a clip or volume, (L,) for a
            series.
        colours: the image in grey under a fixed palette. Up to 20 parts differ in colour; of more, those that touch do,
            unless one touches 20 others. In nested partitions, most parts that are not split keep theirs, not all.

    Returns:
        [height, width, 3] float32 in [0, 1]; what leaves that range is cut off, with a warning. Undo a normalisation
        first with ``images * std + mean``, with the std and the mean of each channel as [3, 1, 1]. Of a clip or volume,
        the middle frame of each step of the grid, in a row from the left, with white between them. Of a series, the
        mean of its channels as a wave, 64 pixels high, with a gap where that is not finite.

    Examples:
        >>> picture = part_picture(torch.zeros(3, 8, 8), torch.tensor([0, 1, 1, 0]), colours=True)
        >>> picture.shape, bool((picture[0, 0] == picture[7, 7]).all())
        ((8, 8, 3), True)
    """
    return _show_parts(_to_pictures([image], grid_size)[0], parts, grid_size, colours)


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
    return _show_mask(_to_pictures([image], grid_size)[0], mask, grid_size)


def evolution_figure(
    images: Tensor | Sequence[Any],
    masks: Sequence[Tensor],
    parts: Sequence[Tensor | None],
    titles: Sequence[str],
    grid_size: GridSize | None = None,
) -> Figure:
    """The images, and a column for each point of training: their parts above, what the mask leaves of them below.

    Points of clips, volumes and series, which are wide, are below one another.

    Args:
        images: B images, clips, volumes or series as `part_picture` takes them, or a tensor, [B, 3, height, width].
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

    pictures, titles = _to_pictures(images, grid_size), ["image", *map(str, titles)]
    lines = [title.replace(", ", ",\n").splitlines() for title in titles]
    headings = ["\n".join(textwrap.fill(line, LETTERS) for line in title) for title in lines]
    names = ["parts", "visible"] if any(part is not None for part in parts) else ["visible"]
    rows, (height, width, _) = len(names) * len(pictures), _join(pictures[0]).shape
    shape, columns = height / width, len(headings)
    if len(_check_grid(grid_size)) == 2:
        above = 0.2 + 1.3 * FONT / 72 * (1 + max(heading.count("\n") for heading in headings))
        figure = Figure(figsize=(COLUMN * columns, COLUMN * rows * shape + above), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    else:
        headings, places = titles, product(range(columns), range(rows))
        heights = [0.01 if column == 0 and row % len(names) else 1 for column, row in places]  # below images, nothing
        size = max(COLUMN, ROW / shape), (ROW + 0.2) * sum(heights) + 0.2 * columns
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows * columns, 1, squeeze=False, height_ratios=heights).reshape(columns, rows).T
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False, box_aspect=shape)
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize=FONT)
    for (row, column), ax in np.ndenumerate(axes):
        if column == 1 or (column and headings is titles):
            ax.set_ylabel(names[row % len(names)], fontsize=FONT)
    for index, picture in enumerate(pictures):
        first, last = axes[len(names) * index], axes[len(names) * (index + 1) - 1]
        first[0].imshow(_join(picture))
        for column, (mask, part) in enumerate(zip(masks, parts, strict=True), start=1):
            if part is not None:
                first[column].imshow(_show_parts(picture, part[index], grid_size))
            last[column].imshow(_show_mask(picture, mask[index], grid_size))
    return figure


def _show_parts(frames: Array, parts: Tensor, grid_size: GridSize | None, colours: bool = False) -> Array:
    """What `part_picture` returns, of frames [T, height, width, 3]."""
    frames, parts = frames.copy(), torch.as_tensor(parts)
    if parts.is_complex() or (parts.is_floating_point() and bool((parts != parts.round()).any())):
        raise ValueError(f"parts has dtype {parts.dtype}, but part labels are integers: use parts.long()")
    grid = _to_grid(parts, grid_size, frames)
    if colours:
        frames[:] = (1 - STRENGTH) * frames.mean(3, keepdims=True)
        frames += STRENGTH * _to_pixels(PALETTE[_choose_colours(grid)], frames)
    else:  # a pixel is outlined where the corners of a small window around it are not all in one part
        width = -(-min(frames.shape[1:3]) // 150)
        corners = [_to_pixels(grid, frames, by) for by in product((width // 2 - width, width // 2), repeat=2)]
        frames[np.not_equal(corners, corners[0]).any(0)] = RED if len(_check_grid(grid_size)) == 1 else OUTLINE
    return _join(frames)


def _show_mask(frames: Array, mask: Tensor, grid_size: GridSize | None) -> Array:
    """What `mask_picture` returns, of frames [T, height, width, 3]."""
    frames, mask = frames.copy(), torch.as_tensor(mask)
    if (other := mask[(mask != 0) & (mask != 1)]).numel():
        raise ValueError(f"mask has the value {other[0].item():.4g}, but must be 0 (keep) or 1 (remove) in each patch")
    has_colour = np.ptp(frames, axis=3).max() > SLACK
    frames[_to_pixels(_to_grid(mask, grid_size, frames), frames) > 0] = GREY if has_colour else BLUE
    return _join(frames)


def _join(frames: Array) -> Array:
    """Frames [T, height, width, 3] to one picture: in a row from the left, with white between them."""
    gap = np.ones_like(frames[0, :, :1]).repeat(GAP, 1)
    return np.concatenate([piece for frame in frames for piece in (gap, frame)][1:], 1)


def _to_pictures(images: Tensor | Sequence[Any], grid_size: GridSize | None) -> list[Array]:
    """New arrays [T, height, width, 3] in [0, 1]; one warning where values are cut off."""
    pictures = [_to_frames(image, grid_size) for image in images]
    low, high = np.min([picture.min() for picture in pictures]), np.max([picture.max() for picture in pictures])
    if not (low >= -SLACK and high <= 1 + SLACK):  # not so for NaN
        warnings.warn(
            f"values of the images reach from {low:.3g} to {high:.3g}: pictures cut off what leaves [0, 1]. Undo a "
            "normalisation with images * std + mean, which have one value a channel, [3, 1, 1]; give bytes as uint8",
            stacklevel=3,
        )
    return [np.nan_to_num(picture, copy=False).clip(0, 1) for picture in pictures]


def _check_grid(grid_size: GridSize | None) -> Grid:
    """A grid size as a tuple, one number an axis; of two axes where None."""
    return (1, 1) if grid_size is None else check_grid(grid_size)


def _to_frames(image: Any, grid_size: GridSize | None) -> Array:
    """A copy, [T, height, width, 3] float32, a frame for each step of the grid; bytes are brought to [0, 1]."""
    if hasattr(image, "convert"):  # a picture of PIL, of any mode
        image = np.asarray(image.convert("RGB"))
    is_tensor, shape, grid = isinstance(image, Tensor), list(image.shape), _check_grid(grid_size)
    if is_tensor:
        image = (image.detach().float() if image.is_floating_point() else image).cpu().numpy()
    axes, steps = len(grid), grid[0] if len(grid) == 3 else 1
    if axes == 1 and image.ndim in (1, 2) and image.size:
        return _draw_wave(image.reshape(-1, shape[-1]), grid[0])
    channels_last = shape[-1] in (1, 3) and not (is_tensor and axes == 2)
    if image.ndim == axes and not (axes == 3 and channels_last):
        image = image[..., None]
    elif not channels_last:
        image = np.moveaxis(image, 0, -1)
    frames = image[None] if axes == 2 else image
    if axes == 1 or frames.ndim != 4 or frames.shape[3] not in (1, 3) or not image.size or len(frames) % steps:
        raise ValueError(
            f"image has shape {shape}, which does not fit grid_size={grid_size!r}: (H, W) takes [3, height, width] or, "
            "in grey, [1, height, width], or an array with the channels last, floats in [0, 1] or uint8: choose three "
            "of more channels; (T, H, W) takes [3, T', height, width] or [T', height, width, 3] or, in grey, "
            "[T', height, width], T' a multiple of T; (L,) takes [length] or [C, length]"
        )
    step = len(frames) // steps
    picture: Array = frames[step // 2 :: step].astype(np.float32) / np.float32(255 if image.dtype == np.uint8 else 1)
    return picture.repeat(3 // picture.shape[3], 3)


def _draw_wave(series: Array, patches: int) -> Array:
    """A series [C, length] to one frame: the range of the values in each column of pixels, dark on white."""
    height, width = STRIP[0], max(STRIP[1] // patches, 1) * patches
    wave = np.where(np.isfinite(series), series, np.nan).mean(0)
    starts = np.arange(width) * len(wave) // width
    low, high = np.fmin.reduceat(wave, starts), np.fmax.reduceat(wave, starts)
    low[1:], high[1:] = np.fmin(low[1:], high[:-1]), np.fmax(high[1:], low[:-1])  # each reaches to the one before
    bottom, top = np.fmin.reduce(low), np.fmax.reduce(high)
    rows, scale = np.arange(height)[:, None] - height // 2, (height - 5) / ((top - bottom) or 1)
    first, last = (np.rint(((top + bottom) / 2 - values) * scale) for values in (high, low))
    picture = np.ones((1, height, width, 3), np.float32)
    picture[0, (first <= rows) & (rows <= last)] = INK
    return picture


def _to_grid(patches: Tensor, grid_size: GridSize | None, frames: Array) -> Array:
    """[N] values of patches to [T, H, W]."""
    if patches.ndim != 1:
        raise ValueError(f"one image has one value a patch, [N], but got {list(patches.shape)}: index the batch first")
    grid = resolve_grid(len(patches), grid_size, frames.shape[1:3])
    return patches.detach().to("cpu", torch.int64).view((1,) * (3 - len(grid)) + grid).numpy()


def _to_pixels(grid: Array, frames: Array, by: tuple[int, int] = (0, 0)) -> Array:
    """Values of patches [T, H, W, ...] to those of pixels [T, height, width, ...], each from `by` away."""
    (height, width), (steps, rows, columns) = frames.shape[1:3], grid.shape[:3]
    below, beside = (np.arange(height) + by[0]).clip(0, height - 1), (np.arange(width) + by[1]).clip(0, width - 1)
    return grid[np.ix_(range(steps), below * rows // height, beside * columns // width)]


def _choose_colours(grid: Array) -> Array:
    """Labels of parts [T, H, W] to places in the palette.

    A part asks for the colour of the first of its patches, in an order that begins in the middle and is scattered over
    the grid. It takes the next colour that no part before it has or, where there is none, no neighbour.
    """
    middle = np.ravel_multi_index([side // 2 for side in grid.shape], grid.shape)
    order = (0.6180339887 * (np.arange(grid.size) - middle) % 1).argsort()  # the golden ratio spreads evenly
    labels, first = np.unique(grid.flat[order], return_index=True)
    parts, touch = np.searchsorted(labels, grid), np.eye(len(labels), dtype=bool)
    for axis in range(grid.ndim):
        line = np.moveaxis(parts, axis, 0)
        touch[line[1:], line[:-1]] = touch[line[:-1], line[1:]] = True
    chosen = np.full(len(labels), -1)
    for part in first.argsort():
        wanted = (first[part] + np.arange(len(PALETTE))) % len(PALETTE)
        taken = np.isin(wanted, chosen).astype(int) + np.isin(wanted, chosen[touch[part]])
        chosen[part] = wanted[taken.argmin()]
    return chosen[parts]
