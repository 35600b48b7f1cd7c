"""Pictures that lack what a classifier may lean on: their background, whole parts, or patches at random."""

from __future__ import annotations

import math

import torch
from pictures import MEAN, Pictures
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from maskevolve import GraphCutPartitioner, PartMask, RandomMask

HIDDEN = 0.5  # of the patches
NUM_PARTS = 10
SEED = 20230618


def disturbed(pictures: Pictures, patch: int) -> dict[str, Pictures]:
    """Each kind of disturbance of the same pictures.

    Returns:
        exchanged: what lies outside of the box comes from a picture of another class; left out where nobody drew boxes.
        parts_hidden, patches_hidden: half of the patches show the mean colour of ImageNet, by parts of colour that no
        model was asked for, or at random.
    """
    grid, draw = pictures.images.shape[2] // patch, torch.Generator().manual_seed(SEED)
    hidden = {
        "parts_hidden": PartMask().sample(
            len(pictures.images), grid, HIDDEN, parts=colour_parts(pictures.images, patch), generator=draw
        ),
        "patches_hidden": RandomMask().sample(len(pictures.images), grid, HIDDEN, generator=draw),
    }
    mean = (255 * torch.tensor(MEAN)).byte().view(3, 1, 1)
    found = {name: torch.where(pixels(mask, patch), mean, pictures.images) for name, mask in hidden.items()}
    if pictures.objects is not None:
        other = pictures.images.roll(len(pictures.images) // 2, 0)  # they are sorted by class
        found["exchanged"] = torch.where(pixels(pictures.objects, patch), pictures.images, other)
    return {name: pictures._replace(images=images) for name, images in found.items()}


def pixels(patches: Tensor, patch: int) -> Tensor:
    """From patches [n, N] to pixels [n, 1, size, size]."""
    grid = math.isqrt(patches.shape[1])
    return patches.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def colour_parts(images: Tensor, patch: int) -> Tensor:
    """Parts [n, N] by the default cut, of the cosines of the patches' mean colours, less their mean."""
    found = []
    for batch in images.split(100):
        x = avg_pool2d(batch.float() / 255, patch).flatten(2).mT
        x = normalize(x - x.mean(1, keepdim=True), dim=2)
        found.append(GraphCutPartitioner(NUM_PARTS)(x @ x.mT, images=batch.float() / 255))
    return torch.cat(found)
