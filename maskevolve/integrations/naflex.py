"""timm's NaFlexVit on images of several sizes in one batch: patches with coordinates, padded to one length."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evolution import Evolution

__all__ = ["NaFlexBatch", "drop_patches"]


class NaFlexBatch(NamedTuple):
    """What timm's NaFlexEmbeds is given: see `timm.data.naflex_dataset.NaFlexCollator`."""

    x: Tensor
    """Patches [B, L, P * P * C] or, of any patch size, [B, L, P, P, C]; or images."""
    patch_coord: Tensor | None = None
    """[B, L, 2] int64: row and column; None where these are images."""
    patch_valid: Tensor | None = None
    """[B, L] bool: False is padding; None where there is none."""


def drop_patches(evolution: Evolution, batch: NaFlexBatch, embeds: Any, rate: float, count: int) -> Tensor:
    """Which patches stay, when every image loses the same share of its own patches.

    Images of one size are masked together, each on its own grid, so padding is neither drawn for nor counted. An image
    with fewer patches than others keeps padding in their place, which the attention of NaFlexVit does not see. The
    host waits for the coordinates, as timm does where it interpolates its position embeddings.

    Args:
        evolution: draws the masks.
        batch: the patches, L of each image.
        embeds: the NaFlexEmbeds of the model, which knows their size and layout.
        rate: share of the patches to drop.
        count: how many of the L stay, `int(L * (1 - rate))`.

    Returns:
        [B, count] int64, on the device of the patches.
    """
    length, device = batch.x.shape[1], batch.x.device
    # Patches that stay come first, padding next, those that are dropped last.
    rank = torch.full(batch.x.shape[:2], length, device=device)
    for grid_size, (images, places) in _by_grid(batch).items():
        image, place = torch.tensor(images, device=device)[:, None], torch.stack(places).to(device)
        evolution.see(_pictures(batch.x[image, place], grid_size, embeds))
        number = place.shape[1]
        # As in timm, one patch stays at least.
        masked = evolution.mask(torch.zeros(*place.shape, 1, device=device), min(rate, max(0.0, 1 - 1.5 / number)))
        rank[image, place] = masked.ids_restore + 2 * length * masked.mask.long()
    return rank.argsort(1)[:, :count]


def _by_grid(batch: NaFlexBatch) -> dict[tuple[int, int], tuple[list[int], list[Tensor]]]:
    """For each grid (H, W): the images that have it, and where each has its patches, row by row, [H * W] int64."""
    groups: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
    assert batch.patch_coord is not None
    coordinates = batch.patch_coord.cpu()
    everything = torch.ones(coordinates.shape[:2], dtype=torch.bool)
    valid = everything if batch.patch_valid is None else batch.patch_valid.bool().cpu()
    for image in range(len(coordinates)):
        place = valid[image].nonzero().flatten()
        if not len(place):
            continue
        row, column = coordinates[image, place].unbind(1)
        height, width = int(row.max()) + 1, int(column.max()) + 1
        cell, order = (row * width + column).sort()
        if not torch.equal(cell, torch.arange(height * width)):
            raise ValueError(
                f"image {image} has {len(place)} patches, with coordinates up to ({height - 1}, {width - 1}), which do "
                f"not fill a grid of {height} x {width}: masks are drawn for whole images"
            )
        images, places = groups[height, width]
        images.append(image)
        places.append(place[order])
    return groups


def _pictures(patches: Tensor, grid_size: tuple[int, int], embeds: Any) -> Tensor:
    """The images [B, C, height, width] of patches [B, H * W, ...], at the patch size of the model."""
    rows, columns = embeds.patch_size
    channels_last = getattr(embeds, "channels_last", True)  # as in older versions
    if patches.ndim == 3:
        patches = patches.unflatten(2, (rows, columns, -1) if channels_last else (-1, rows, columns))
    if channels_last:
        patches = patches.movedim(-1, 2)
    images = patches.unflatten(1, grid_size).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    size = (grid_size[0] * rows, grid_size[1] * columns)
    return (
        images if images.shape[2:] == size else nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    )
