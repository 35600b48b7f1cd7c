"""Pictures that people have segmented, and how well a partition agrees with theirs.

The folder has the layout of BSDS500 and COCO as they lie in `shared/data`, for anyone's own pictures and label maps:

    FOLDER/NAME.jpg                          a picture
    FOLDER/NAME.png                          its label map, 8 or 16 bits: 0 is unlabelled and left out; or
    FOLDER/NAME_a0.png, NAME_a1.png, ...     a label map a person, whose numbers have no meaning, 0 included

A label map where nothing is labelled is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.ndimage import label as pieces
from torch import Tensor
from torchvision.transforms import v2

Labels = npt.NDArray[np.int64]
UNLABELLED = -1
MEASURES = ("index", "v", "covering", "recall")


class Segmented(NamedTuple):
    """A picture and what people see in it."""

    name: str
    image: Tensor
    """[3, height, width] floats in [0, 1]."""
    people: list[Labels]
    """[height, width] a person; UNLABELLED where nobody said."""


def read_folder(folder: Path, short_side: int, by_piece: bool = False) -> list[Segmented]:
    """Every picture of a folder that has a label map, in the order of their names; see above.

    Args:
        folder: where they lie.
        short_side: of each picture, in pixels; the other side is as long where not all have one shape.
        by_piece: whether each connected piece of a label is a label of its own.
    """
    paths = sorted(folder.glob("*.jpg"))
    shapes = {Image.open(path).size for path in paths}
    size = [short_side, short_side]
    if len(shapes) == 1:  # in steps of a patch
        width, height = shapes.pop()
        size = [round(side / min(width, height) * 16) * short_side // 16 for side in (height, width)]
    found = [read(path, size, by_piece) for path in paths]
    found = [picture for picture in found if picture.people]
    if not found:
        raise SystemExit(f"{folder} holds no NAME.jpg with a NAME.png or NAME_a0.png beside it")
    return found


def read(path: Path, size: list[int], by_piece: bool = False) -> Segmented:
    with Image.open(path) as file:
        image = v2.functional.pil_to_tensor(file.convert("RGB"))
    crop = [min(image.shape[1:])] * 2 if size[0] == size[1] else list(image.shape[1:])
    image = v2.functional.resize(v2.functional.center_crop(image, crop), size, antialias=True)
    people = [read_labels(one, crop, size) for one in sorted(path.parent.glob(f"{path.stem}_a*.png"))]
    if path.with_suffix(".png").exists():
        labels = read_labels(path.with_suffix(".png"), crop, size)
        people.append(np.where(labels == 0, UNLABELLED, labels))
    people = [number_pieces(labels) if by_piece else labels for labels in people if (labels != UNLABELLED).any()]
    return Segmented(path.stem, image.float() / 255, people)


def read_labels(path: Path, crop: list[int], size: list[int]) -> Labels:
    with Image.open(path) as file:
        labels = torch.from_numpy(np.array(file).astype(np.int64))[None]
    labels = v2.functional.center_crop(labels, crop)
    return v2.functional.resize(labels, size, v2.InterpolationMode.NEAREST_EXACT)[0].numpy()


def number_pieces(labels: Labels) -> Labels:
    """Each connected piece of a label, corners joined, under a number of its own."""
    numbered, count = np.full_like(labels, UNLABELLED), 0
    for value in np.unique(labels[labels != UNLABELLED]):
        found, more = pieces(labels == value, np.ones((3, 3)))
        numbered = np.where(found > 0, found + count, numbered)
        count += more
    return numbered


def agreement(parts: Labels, people: Sequence[Labels], grid: tuple[int, int] | None = None) -> dict[str, list[float]]:
    """How well a partition agrees with each person.

    Args:
        parts: [height, width] labels, on any grid that divides that of the people.
        people: [size, size] labels each, at least one pixel of which is labelled.
        grid: where outlines are compared, a grid that divides that of the parts; that of the parts where None.

    Returns:
        For each of MEASURES a number a person, all in [0, 1] but for the index, which chance makes 0:
        `index`: adjusted Rand index. `v`: V-measure. `covering`: achievable segmentation accuracy, the share of pixels
        that lie in the segment which covers most of their part. `recall`: share of the person's outlines, on the grid,
        that lie on an outline of the parts.
    """
    grid = parts.shape if grid is None else grid
    outlined = majority(parts, grid)
    scores: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for person in people:
        rows, columns = (side // cells for side, cells in zip(person.shape, parts.shape, strict=True))
        pixels = parts.repeat(rows, 0).repeat(columns, 1)
        known = person != UNLABELLED
        table = contingency(pixels[known], person[known])
        scores["index"].append(adjusted_rand_index(table))
        scores["v"].append(v_measure(table))
        scores["covering"].append(float(table.max(1).sum() / table.sum()))
        scores["recall"].append(boundary_recall(outlined, majority(person, grid)))
    return scores


def contingency(first: Labels, second: Labels) -> Labels:
    """How many pixels have each pair of labels: a row for each label of the first, a column for each of the second."""
    rows, first = np.unique(first, return_inverse=True)
    columns, second = np.unique(second, return_inverse=True)
    counts = np.bincount(first.ravel() * len(columns) + second.ravel(), minlength=len(rows) * len(columns))
    return counts.reshape(len(rows), len(columns))


def adjusted_rand_index(table: Labels) -> float:
    """From the pairs of pixels that both put together, that one of them does, and that one would by chance."""
    both, first, second, every = (
        int((counts * (counts - 1) // 2).sum()) for counts in (table, table.sum(1), table.sum(0), table.sum()[None])
    )
    if first + second == 2 * both:  # the same partition, perhaps of one pixel
        return 1.0
    return 2 * (every * both - first * second) / (every * (first + second) - 2 * first * second)


def v_measure(table: Labels) -> float:
    """Mutual information over the mean of the two entropies; 1 where both have one label."""
    first, second = entropy(table.sum(1)), entropy(table.sum(0))
    return 2 * max(first + second - entropy(table), 0.0) / (first + second) if first + second else 1.0


def entropy(counts: Labels) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def majority(labels: Labels, grid: tuple[int, int]) -> Labels:
    """[size, size] labels of pixels to those of patches: what most pixels of a patch have, the least of ties."""
    rows, columns = (side // cells for side, cells in zip(labels.shape, grid, strict=True))
    patch = np.arange(grid[0] * grid[1]).reshape(grid).repeat(rows, 0).repeat(columns, 1)
    return np.unique(labels)[contingency(patch, labels).argmax(1)].reshape(grid)


def boundary_recall(parts: Labels, person: Labels) -> float:
    """Of the pairs of neighbouring patches that a person tells apart, the share that the parts tell apart."""
    apart, found = 0, 0
    for axis in (0, 1):
        truth, ours, known = (np.diff(labels, axis=axis) for labels in (person, parts, person == UNLABELLED))
        truth = (truth != 0) & ~known
        apart, found = apart + int(truth.sum()), found + int((truth & (ours != 0)).sum())
    return found / apart if apart else 1.0
