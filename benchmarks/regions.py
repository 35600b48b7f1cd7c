"""Crops of pictures that people have segmented, and how well the tokens of patches tell their regions apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from segmented import UNLABELLED, majority, read_folder
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

CROPS = 4  # of a picture
SHORT_SIDE = 2  # of a picture, in crops
LEAST = 8  # patches of the second region of a crop
COMPONENTS = 32
DISTANCES = range(1, 7)  # between patches, in patches


class Crops(NamedTuple):
    images: Tensor
    """[n, 3, size, size] uint8."""
    regions: Tensor
    """[n, N] int64, the region of most pixels of a patch; UNLABELLED where nobody said."""


def read_crops(folder: Path, size: int, patch: int) -> Crops:
    """Square crops from anywhere in the middle square of each picture, each with the regions of one person.

    Args:
        folder: pictures and label maps, as `segmented.read_folder` takes them.
        size: side of a crop, in pixels.
        patch: side of a patch, in pixels.
    """
    draws, images, regions = np.random.default_rng(0), [], []
    for picture in read_folder(folder, SHORT_SIDE * size):
        for number in range(CROPS):
            top, left = (int(draws.integers(side - size + 1)) for side in picture.image.shape[1:])
            labels = picture.people[number % len(picture.people)][top : top + size, left : left + size]
            of_patches = majority(labels, (size // patch, size // patch)).flatten()
            counts = np.sort(np.unique(of_patches[of_patches != UNLABELLED], return_counts=True)[1])
            if len(counts) > 1 and counts[-2] >= LEAST:
                images.append((picture.image[:, top : top + size, left : left + size] * 255).round().byte())
                regions.append(torch.from_numpy(of_patches))
    return Crops(torch.stack(images), torch.stack(regions))


def whitened(tokens: Tensor) -> Tensor:
    """Tokens [n, N, D] of one grid, less the mean of their place, in their first principal components, each as strong.

    For the cosines of tokens as they are tell the place and the colour of a patch, and little that a model has learned.
    """
    centred = (tokens - tokens.mean(0, keepdim=True)).flatten(0, 1)
    found = PCA(min(COMPONENTS, *centred.shape), whiten=True, random_state=0).fit_transform(centred)
    return torch.from_numpy(found).unflatten(0, tokens.shape[:2])


def pairs_told_apart(tokens: Tensor, regions: Tensor) -> float:
    """How often two patches of one region have more in common than two of different regions that lie as far apart.

    The area under the ROC of the pairs at each distance, weighed by how many comparisons there are of it; of each crop,
    and then the mean over the crops. It sees neither what a region is nor whether the same looks the same elsewhere.

    Args:
        tokens: [n, N, D] of a square grid of patches, compared by their cosine.
        regions: [n, N] their labels, of at least two regions a crop.
    """
    first, second = torch.triu_indices(regions.shape[1], regions.shape[1], 1)
    places = torch.cartesian_prod(*[torch.arange(math.isqrt(regions.shape[1]))] * 2)
    distance = (places[first] - places[second]).square().sum(1)
    pairs = [(distance == each**2).nonzero().flatten() for each in DISTANCES]
    pairs = [(first[index], second[index]) for index in pairs]
    return float(
        np.nanmean([_told_apart(*each, pairs) for each in zip(normalize(tokens, dim=2), regions, strict=True)])
    )


def _told_apart(tokens: Tensor, regions: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> float:
    cosines, areas, weights = tokens @ tokens.T, list[float](), list[int]()
    for first, second in pairs:
        known = (regions[first] != UNLABELLED) & (regions[second] != UNLABELLED)
        same, alike = (regions[first] == regions[second])[known].numpy(), cosines[first, second][known].numpy()
        comparisons = int(same.sum()) * int((~same).sum())
        if comparisons:
            areas.append(roc_auc_score(same, alike))
            weights.append(comparisons)
    return float(np.average(areas, weights=weights)) if areas else math.nan  # no two regions are near


def read_all(folders: Sequence[Path], size: int, patch: int) -> dict[str, Crops]:
    """By the name of the collection: of `coco`, and of `bsds` where the folder is `bsds/test`."""
    names = [folder.parent.name if folder.name in ("val", "test") else folder.name for folder in folders]
    return {name: read_crops(folder, size, patch) for name, folder in zip(names, folders, strict=True)}
