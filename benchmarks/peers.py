"""How others mask: each takes patches [B, N, D] and returns at least the visible ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK_RATIO = 0.75


def mae_random_masking(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of the official MAE, which are those of its successor for video."""
    return mae_st_random_masking(x, MASK_RATIO)[:3]


def mae_st_random_masking(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The steps of mae_st: two argsorts, a gather with a repeated index, a mask that is gathered back."""
    batch_size, num_patches, width = x.shape
    keep = int(num_patches * (1 - mask_ratio))
    order = torch.rand(batch_size, num_patches, device=x.device).argsort(dim=1)
    restore, kept = order.argsort(dim=1), order[:, :keep]
    visible = x.gather(1, kept.unsqueeze(2).repeat(1, 1, width))
    mask = torch.ones(batch_size, num_patches, device=x.device)
    mask[:, :keep] = 0
    return visible, mask.gather(1, restore), restore, kept


def videomae_tubes(batch_size: int, grid: tuple[int, int, int], mask_ratio: float) -> Tensor:
    """The steps of the official VideoMAE, in NumPy, a clip after the other; then the batch as bool, [B, N].

    One frame of zeros and ones is shuffled and repeated. Source:
    https://github.com/MCG-NJU/VideoMAE/blob/main/masking_generator.py
    """
    frames, patches = grid[0], grid[1] * grid[2]
    removed = int(mask_ratio * patches)
    clips = []
    for _ in range(batch_size):
        frame = np.hstack([np.zeros(patches - removed), np.ones(removed)])
        np.random.shuffle(frame)  # noqa: NPY002 (what it shuffles with)
        clips.append(torch.from_numpy(np.tile(frame, (frames, 1)).ravel()))
    return torch.stack(clips).bool()


def videomae_take_visible(x: Tensor, grid: tuple[int, int, int], mask_ratio: float) -> Tensor:
    """Those masks, and what they leave, by an index of bool, as VideoMAE's encoder takes it."""
    mask = videomae_tubes(len(x), grid, mask_ratio).to(x.device)
    return x[~mask].reshape(len(x), -1, x.shape[2])


def bare_gather(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The floor: visible patches by an index that is there already."""
    keep = int(x.shape[1] * (1 - MASK_RATIO))
    index = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, :keep, None].expand(-1, -1, x.shape[2])
    return lambda x: x.gather(1, index)


def timm_patch_dropout() -> Callable[[Tensor], Tensor]:
    from timm.layers import PatchDropout

    return PatchDropout(MASK_RATIO, num_prefix_tokens=0).train()


def lightly_token_mask(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """`random_token_mask` or `random_grid_token_mask`. They count a class token, which comes first and stays."""
    from lightly.models import utils

    def take_visible(x: Tensor) -> Tensor:
        size = (len(x), x.shape[1] + 1)
        ids, _ = getattr(utils, name)(size=size, mask_ratio=MASK_RATIO, device=x.device, **options)
        return utils.get_at_index(x, ids[:, 1:] - 1)

    return take_visible


def hugging_face(width: int, num_patches: int) -> Callable[[Tensor], Any]:
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

    side = math.isqrt(num_patches) * 16
    config = ViTMAEConfig(hidden_size=width, image_size=side, patch_size=16, mask_ratio=MASK_RATIO)
    return ViTMAEEmbeddings(config).random_masking


def beit_block_masking(x: Tensor) -> Tensor:
    """Rectangles laid in NumPy, an image after the other, until three quarters are covered; then a gather."""
    rng, side, keep = np.random.default_rng(0), math.isqrt(x.shape[1]), int(x.shape[1] * (1 - MASK_RATIO))
    visible = np.empty((len(x), keep), dtype=np.int64)
    for image in range(len(x)):
        mask, most = np.zeros((side, side), dtype=bool), side * side - keep
        for _ in range(1000):
            if mask.sum() >= most:
                break
            area = rng.uniform(16 / 196, 0.4) * side * side
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height = min(side, max(1, round(math.sqrt(area * aspect))))
            width = min(side, max(1, round(math.sqrt(area / aspect))))
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            mask[top : top + height, left : left + width] = True
        covered, free = np.flatnonzero(mask), np.flatnonzero(~mask)
        give_back = rng.permutation(covered)[: max(0, keep - len(free))]
        visible[image] = np.concatenate([free, give_back])[:keep]
    index = torch.from_numpy(visible).to(x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
