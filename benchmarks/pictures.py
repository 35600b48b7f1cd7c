"""Labelled pictures in memory, for the study of pretraining: a cache of bytes that all its workers share."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
HELD_OUT = 0.1  # share of the training pictures of each class on which the settings of the probes are chosen
AREA, ASPECT = (0.4, 1.0), (3 / 4, 4 / 3)  # of random crops

Boxes = dict[str, tuple[float, float, float, float]]


class Pictures(NamedTuple):
    images: Tensor
    """[n, 3, size, size] uint8, the middle square of each picture."""
    classes: Tensor
    """[n] int64."""
    objects: Tensor | None
    """[n, N] bool, which patches lie in the box of the object; None where nobody drew boxes."""

    def take(self, index: Tensor) -> Pictures:
        return Pictures(*(None if tensor is None else tensor[index] for tensor in self))

    def spread(self, most: int) -> Pictures:
        """At most so many pictures, from all classes."""
        return self.take(torch.linspace(0, len(self.images) - 1, min(most, len(self.images))).long())


class Data(NamedTuple):
    train: Pictures
    """All that a model is pretrained on; no label is used."""
    fit: Pictures
    """What the probes learn from: the first pictures of each class that are not held out."""
    held_out: Pictures
    """What the settings of the probes are chosen on."""
    val: Pictures
    """Pictures that no model is pretrained on, for the patches of objects."""
    rest: Pictures
    """Pictures of train that no probe learns from, held out or not: what accuracies are reported on."""
    fingerprint: str
    """Of the pictures that are trained and measured on."""

    @classmethod
    def read(cls, folder: Path, size: int, patch: int, labelled: int) -> Data:
        """Read FOLDER/train and FOLDER/val, in torchvision's ImageFolder layout, and FOLDER/boxes.csv where it is.

        Args:
            folder: where they are.
            size: side that pictures are brought to, in pixels.
            patch: side of a patch, in pixels.
            labelled: pictures a class that the probes learn from, at most.
        """
        boxes = read_boxes(folder / "boxes.csv")
        train, val = (read_pictures(folder, name, size, patch, boxes) for name in ("train", "val"))
        fit, held_out, rest = [], [], []
        for label in train.classes.unique():
            index = (train.classes == label).nonzero().flatten()
            held = max(1, round(HELD_OUT * len(index)))
            fit.append(index[:-held][:labelled])
            held_out.append(index[-held:])
            rest.append(index[len(fit[-1]) :])
        fingerprint = hashlib.sha256(train.images.numpy())
        fingerprint.update(val.images.numpy())
        fit, held_out, rest = (train.take(torch.cat(index)) for index in (fit, held_out, rest))
        return cls(train, fit, held_out, val, rest, fingerprint.hexdigest()[:16])


def read_pictures(folder: Path, name: str, size: int, patch: int, boxes: Boxes | None) -> Pictures:
    dataset = ImageFolder(folder / name)

    def read(sample: tuple[str, int]) -> tuple[Tensor, Tensor | None]:
        with Image.open(sample[0]) as file:
            image = v2.functional.pil_to_tensor(file.convert("RGB"))
        square = min(image.shape[1:])
        small = v2.functional.resize(v2.functional.center_crop(image, [square, square]), [size, size], antialias=True)
        if boxes is None:
            return small, None
        key = Path(sample[0]).relative_to(folder).as_posix()
        if key not in boxes:
            raise SystemExit(f"{folder}/boxes.csv has no row for {key}: add its box, or move the file away")
        top, left = ((side - square) // 2 for side in image.shape[1:])
        x0, y0, x1, y1 = boxes[key]
        cells = size // patch / square
        box = ((x0 - left) * cells, (y0 - top) * cells, (x1 + 1 - left) * cells, (y1 + 1 - top) * cells)
        return small, patches_in(box, size // patch)

    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    objects = None if boxes is None else torch.empty(len(dataset), (size // patch) ** 2, dtype=torch.bool)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = tqdm(threads.map(read, dataset.samples), f"pictures of {name}", len(dataset), mininterval=10)
        for place, (image, patches) in enumerate(found):
            images[place] = image
            if objects is not None:
                objects[place] = patches
    return Pictures(images, torch.tensor(dataset.targets), objects)


def read_boxes(path: Path) -> Boxes | None:
    """Pixels x0, y0, x1, y1 of the object, the last row and column included, by the path of the picture."""
    if not path.exists():
        print(f"there is no {path}: the segmentation probe is left out")
        return None
    with path.open(newline="") as file:
        sides = ("x0", "y0", "x1", "y1")
        return {row["path"]: tuple(float(row[side]) for side in sides) for row in csv.DictReader(file)}


def patches_in(box: tuple[float, float, float, float], grid: int) -> Tensor:
    """[grid * grid] bool: the patches more than half of whose area lies in x0, y0, x1, y1, in patches."""
    x0, y0, x1, y1 = box
    start = torch.arange(grid)
    columns, rows = (
        ((start + 1).clamp(max=last) - start.clamp(min=first)).clamp(min=0) for first, last in ((x0, x1), (y0, y1))
    )
    return (rows[:, None] * columns > 0.5).flatten()


def batches(images: Tensor, size: int, generator: torch.Generator, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Places and cropped pictures of an epoch in random order; the last few pictures are left out."""
    for index in torch.randperm(len(images), generator=generator).split(size)[: max(1, len(images) // size)]:
        crops = random_crops(len(index), generator).to(device)
        yield index, normalised(crop(images[index].to(device), crops))


def random_crops(number: int, generator: torch.Generator) -> Tensor:
    """Crops and flips, each picture its own: [number, 2, 3], from the places of pixels to those in the picture."""
    area, aspect, x, y, flip = torch.rand(5, number, generator=generator)
    area, log_aspect = AREA[0] + (AREA[1] - AREA[0]) * area, math.log(ASPECT[1]) * (2 * aspect - 1)
    width, height = ((area * (sign * log_aspect).exp()).sqrt().clamp(max=1) for sign in (1, -1))
    zeros = torch.zeros_like(area)
    across = torch.stack([torch.where(flip < 0.5, -width, width), zeros, (1 - width) * (2 * x - 1)], 1)
    down = torch.stack([zeros, height, (1 - height) * (2 * y - 1)], 1)
    return torch.stack([across, down], 1)


def crop(images: Tensor, crops: Tensor) -> Tensor:
    """Each picture's crop, scaled to the size of the picture."""
    grid = affine_grid(crops, list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def normalised(images: Tensor) -> Tensor:
    """Bytes to floats of about mean 0 and deviation 1."""
    return v2.functional.normalize(images.float() / 255, MEAN, STD)
