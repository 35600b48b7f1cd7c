"""Masks of the images that are among what a step was given, where the model does not embed and mask in one pass."""

import math
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..masks import MaskedPatches
from ..teachers.patch_grid import patch_grid
from .evolution import Evolution


def mask_images(evolution: Evolution, x: Tensor, keep: int, is_first: bool) -> MaskedPatches:
    """Mask patches x [B, N, D] of the images that `see` was told of or, without, of those that a step was given.

    Of several that it could be, the first is meant where `is_first`; else that is an error.
    """
    given = evolution._given
    images, given.images = given.images, None
    if images is None:
        steps = (each.images for each in reversed(evolution._passes))
        found = next(filter(None, (_images_of(evolution.model, step, *x.shape[:2]) for step in steps)), [])
        if not found or (len(found) > 1 and not is_first):
            raise RuntimeError(
                f"the mask is drawn for {x.shape[0]} images of {x.shape[1]} patches, but the arguments of the step "
                f"hold {len(found)} tensors that could be these images: call evolution.see(images) before it is drawn"
            )
        images = found[0]
    return evolution.mask(x, keep, evolution._grid_of(x, images), images)


def _images_of(model: nn.Module, tensors: Iterable[Tensor], batch_size: int, num_patches: int) -> list[Tensor]:
    """Those that could be a batch of images [B, C, height, width] of so many patches, in their order.

    Where there is none, the first views that are so many images between them, as one tensor: DINOv2 and iBOT are given
    several views of each image, and mask the first ones, one after the other.
    """
    views = [x for x in tensors if x.ndim == 4 and math.prod(patch_grid(model, x)) == num_patches]
    whole = [view for view in views if len(view) == batch_size]
    numbers = [number for number, size in enumerate(accumulate(map(len, views)), 1) if size == batch_size]
    return whole or [torch.cat(views[:number]) for number in numbers[:1]]


def tensors_in(given: Iterable[object]) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries, each once."""
    found: dict[int, Tensor] = {}
    for value in given:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
        found |= {id(each): each for each in ([value] if isinstance(value, Tensor) else tensors_in(values))}
    return list(found.values())
