"""Pictures that people have segmented, and how well a partition agrees with theirs.

The folder has the layout of BSDS500 and COCO as they lie in `shared/data`, for anyone's own pictures and label maps:

    FOLDER/NAME.jpg                          a picture
    FOLDER/NAME.png                          its label map, 8 or 16 bits: 0 is unlabelled and left out; or
    FOLDER/NAME_a0.png, NAME_a1.png, ...     a label map a person, whose numbers have no meaning, 0 included
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score, v_measure_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor
from torchvision.transforms import v2

Labels = npt.NDArray[np.int64]
UNLABELLED = -1
MEASURES = ("index", "v", "covering", "recall")


class Segmented(NamedTuple):
    """A picture and what people see in it."""

    name: str
    image: Tensor
    """[3, size, size] floats in [0, 1], the middle square."""
    people: list[Labels]
    """[size, size] a person; UNLABELLED where nobody said."""


def read_folder(folder: Path, size: int) -> list[Segmented]:
    """Every picture of a folder that has a label map, in the order of their names; see above."""
    found = [read(path, size) for path in sorted(folder.glob("*.jpg"))]
    found = [picture for picture in found if picture.people]
    if not found:
        raise SystemExit(f"{folder} holds no NAME.jpg with a NAME.png or NAME_a0.png beside it")
    return found


def read(path: Path, size: int) -> Segmented:
    with Image.open(path) as file:
        image = v2.functional.pil_to_tensor(file.convert("RGB"))
    square = [min(image.shape[1:])] * 2
    image = v2.functional.resize(v2.functional.center_crop(image, square), [size, size], antialias=True)
    people = [read_labels(one, square, size) for one in sorted(path.parent.glob(f"{path.stem}_a*.png"))]
    if path.with_suffix(".png").exists():
        labels = read_labels(path.with_suffix(".png"), square, size)
        people.append(np.where(labels == 0, UNLABELLED, labels))
    return Segmented(path.stem, image.float() / 255, people)


def read_labels(path: Path, square: list[int], size: int) -> Labels:
    with Image.open(path) as file:
        labels = torch.from_numpy(np.array(file).astype(np.int64))[None]
    labels = v2.functional.center_crop(labels, square)
    return v2.functional.resize(labels, [size, size], v2.InterpolationMode.NEAREST_EXACT)[0].numpy()


def agreement(parts: Labels, people: Sequence[Labels]) -> dict[str, list[float]]:
    """How well a partition agrees with each person.

    Args:
        parts: [height, width] labels, on any grid that divides that of the people.
        people: [size, size] labels each.

    Returns:
        For each of MEASURES a number a person, all in [0, 1] but for the index, which chance makes 0:
        `index`: adjusted Rand index. `v`: V-measure. `covering`: achievable segmentation accuracy, the share of pixels
        that lie in the segment which covers most of their part. `recall`: share of the person's outlines, on the grid
        of the parts, that lie on an outline of the parts.
    """
    scores: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for person in people:
        rows, columns = (side // cells for side, cells in zip(person.shape, parts.shape, strict=True))
        pixels = parts.repeat(rows, 0).repeat(columns, 1)
        known = person != UNLABELLED
        if not known.any():
            continue
        pair = person[known], pixels[known]
        table = contingency_matrix(*pair)
        scores["index"].append(adjusted_rand_score(*pair))
        scores["v"].append(v_measure_score(*pair))
        scores["covering"].append(table.max(0).sum() / table.sum())
        scores["recall"].append(boundary_recall(parts, majority(person, parts.shape)))
    return scores


def majority(labels: Labels, grid: tuple[int, int]) -> Labels:
    """[size, size] labels of pixels to those of patches: the one that most pixels of a patch have."""
    rows, columns = (side // cells for side, cells in zip(labels.shape, grid, strict=True))
    values, numbered = np.unique(labels, return_inverse=True)
    onehot = np.eye(len(values))[numbered.reshape(labels.shape)]
    counts = onehot.reshape(grid[0], rows, grid[1], columns, -1).sum((1, 3))
    return values[counts.argmax(-1)]


def boundary_recall(parts: Labels, person: Labels) -> float:
    """Of the pairs of neighbouring patches that a person tells apart, the share that the parts tell apart."""
    apart, found = 0, 0
    for axis in (0, 1):
        truth, ours, known = (np.diff(labels, axis=axis) for labels in (person, parts, person == UNLABELLED))
        truth = (truth != 0) & ~known
        apart, found = apart + int(truth.sum()), found + int((truth & (ours != 0)).sum())
    return found / apart if apart else 1.0
