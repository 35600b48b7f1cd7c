"""timm's NaFlexVit on images of several sizes in one batch: patches with coordinates, padded to one length."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evolution import Evolution


class NaFlexBatch(NamedTuple):
    """What timm's NaFlexEmbeds is given: see `timm.data.naflex_dataset.NaFlexCollator`."""

    embeds: Any  # the NaFlexEmbeds, which knows the size and the layout of its patches
    x: Tensor  # patches [B, L, P * P * C] or, of any patch size, [B, L, P, P, C]
    patch_coord: Tensor  # [B, L, 2] int64: row and column
    patch_valid: Tensor | None = None  # [B, L] bool: False is padding; None where there is none


def note_batch(evolution: Evolution, vit: Any, own: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Embed what a NaFlexVit is given: images, or patches with coordinates, which its patch dropout must know."""
    given = dict(zip(("patch_coord", "patch_valid"), args, strict=False)) | kwargs
    if given.get("patch_coord") is None:
        return own(x, *args, **kwargs)
    evolution._local.naflex = NaFlexBatch(vit.embeds, x, given["patch_coord"], given.get("patch_valid"))
    try:
        return own(x, *args, **kwargs)
    finally:
        evolution._local.naflex = None


def drop_patches(evolution: Evolution, batch: NaFlexBatch, rate: float, count: int) -> Tensor:
    """Which patches stay, when every image loses the same share of its own patches.

    Images of one size are masked together. One with fewer patches than others keeps padding in their place, which the
    attention of NaFlexVit does not see. The host waits for the coordinates, as where timm interpolates its position
    embeddings. Of L places, `count` stay, ``int(L * (1 - rate))``: [B, count] int64, on the device of the patches.
    """
    length, device = batch.x.shape[1], batch.x.device
    # Patches that stay come first, padding next, those that are dropped last.
    rank = torch.full(batch.x.shape[:2], length, device=device)
    for grid_size, (images, places) in _by_grid(batch).items():
        image, place = torch.tensor(images, device=device)[:, None], torch.stack(places).to(device)
        pictures = _pictures(batch.x[image, place], grid_size, batch.embeds)
        keep = max(1, int(place.shape[1] * (1 - rate)))  # as in timm, one patch stays at least
        masked = evolution.mask(torch.zeros(*place.shape, 1, device=device), keep, grid_size, pictures)
        rank[image, place] = masked.ids_restore + 2 * length * masked.mask.long()
    return rank.argsort(1)[:, :count]


def _by_grid(batch: NaFlexBatch) -> dict[tuple[int, int], tuple[list[int], list[Tensor]]]:
    """For each grid (H, W): the images that have it, and where each has its patches, row by row, [H * W] int64."""
    groups: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
    coordinates = batch.patch_coord.cpu()
    valid = torch.ones(coordinates.shape[:2]) if batch.patch_valid is None else batch.patch_valid.cpu()
    for image in range(len(coordinates)):
        place = valid[image].nonzero().flatten()
        if not len(place):
            continue
        row, column = coordinates[image, place].unbind(1)
        height, width = int(row.max()) + 1, int(column.max()) + 1
        cell, order = (row * width + column).sort()
        if not torch.equal(cell, torch.arange(height * width)):
            raise ValueError(
                f"image {image} has {len(place)} patches, which do not fill a grid of {height} x {width}: masks "
                "are drawn for whole images"
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
    images: Tensor = patches.unflatten(1, grid_size).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    size = (grid_size[0] * rows, grid_size[1] * columns)
    if images.shape[2:] != size:
        images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return images
