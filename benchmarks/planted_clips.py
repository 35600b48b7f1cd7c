"""Clips in which shapes move over a background, with the shape that each patch shows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRID = (8, 14, 14)  # patches of two frames
PATCH = (2, 8, 8)  # pixels
NUM_SHAPES = 4
NOISE = 0.05  # of each value of each pixel, standard deviation
STRIPES = 0.15  # height of their waves

Values = NDArray[np.float64]


class Clip(NamedTuple):
    images: Tensor
    """[3, frames, height, width] float32."""
    labels: Tensor
    """[T, H, W] int64: 0 is the background."""


def moving_shapes(
    speed: float, rng: np.random.Generator, grid: tuple[int, int, int] = GRID, num_shapes: int = NUM_SHAPES
) -> Clip:
    """Discs and squares with a colour and stripes of their own, which turn back at the border.

    Args:
        speed: patches a frame that a shape moves on average; each moves at 0.5 to 1.5 times that, in a direction of its
            own.
        rng: NumPy's generator.
        grid: of the patches, (T, H, W).
        num_shapes: of which a later one hides an earlier one.
    """
    frames, height, width = (cells * size for cells, size in zip(grid, PATCH, strict=True))
    rows, columns = np.mgrid[:height, :width].astype(float)
    labels = np.zeros((frames, height, width), dtype=np.int64)
    images = np.broadcast_to(striped(rows, columns, rng)[:, None], (3, frames, height, width)).copy()
    for shape in range(1, num_shapes + 1):
        radius = rng.uniform(0.1, 0.2) * min(height, width)
        room = np.array([height, width]) - 2 * radius
        angle = rng.uniform(0, 2 * math.pi)
        step = rng.uniform(0.5, 1.5) * speed * PATCH[1] * np.array([math.sin(angle), math.cos(angle)])
        place = rng.random(2) * room + np.arange(frames)[:, None] * step
        centre = radius + room - np.abs(place % (2 * room) - room)
        down, right = rows - centre[:, 0, None, None], columns - centre[:, 1, None, None]
        inside = np.hypot(down, right) <= radius if shape % 2 else np.maximum(abs(down), abs(right)) <= radius
        labels[inside] = shape
        images = np.where(inside, striped(down, right, rng), images)
    images += rng.normal(0, NOISE, images.shape)
    return Clip(torch.from_numpy(images).float(), most_frequent(torch.from_numpy(labels), grid))


def striped(rows: Values, columns: Values, rng: np.random.Generator) -> Values:
    """A random colour with stripes of a random width and direction: [3, ...] of places [...]."""
    colour, period, angle = rng.random(3), rng.uniform(4, 16), rng.uniform(0, math.pi)
    waves = np.sin(2 * math.pi / period * (rows * math.sin(angle) + columns * math.cos(angle)))
    return colour.reshape(3, *[1] * rows.ndim) + STRIPES * waves


def most_frequent(labels: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Labels [frames, height, width] of pixels to those of patches; the least of ties."""
    each = torch.nn.functional.one_hot(labels)
    blocks = [size for side, cells in zip(labels.shape, grid, strict=True) for size in (cells, side // cells)]
    return each.view(*blocks, -1).sum((1, 3, 5)).argmax(-1)
