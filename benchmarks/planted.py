"""Attention with parts planted in it, to measure whether they are found."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def planted_attention(
    batch_size: int,
    height: int,
    width: int,
    num_parts: int,
    *,
    strength: float = 1.0,
    noise: float = 0.5,
    heads: int = 4,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Voronoi parts of random centres, and heads whose logits are higher by `strength` within a part.

    Args:
        batch_size: number of images B.
        height: of the grid, in patches.
        width: of the grid, in patches.
        num_parts: number of centres; a few may own no patch.
        strength: what is added to the logits between patches of the same part.
        noise: standard deviation of the logits, independent for every pair and head.
        heads: number of heads.
        seed: of NumPy's generator.

    Returns:
        labels [B, N] int64 and attention [B, heads, N, N] float32, each row a softmax.
    """
    rng = np.random.default_rng(seed)
    labels = planted_parts(batch_size, (height, width), num_parts, rng)
    return labels, attention_between(labels, rng, strength=strength, noise=noise, heads=heads)


def planted_parts(batch_size: int, grid: tuple[int, ...], num_parts: int, rng: np.random.Generator) -> Tensor:
    """Labels [B, N] of the patches of a grid of any number of axes: to which of the centres each is nearest."""
    sides = np.meshgrid(*(np.arange(side) / side for side in grid), indexing="ij")
    centres = rng.random((batch_size, num_parts, len(grid)))
    distance = np.square(np.stack(sides, -1).reshape(1, -1, 1, len(grid)) - centres[:, None]).sum(-1)
    return torch.from_numpy(distance.argmin(-1))


def attention_between(
    labels: Tensor, rng: np.random.Generator, *, strength: float, noise: float, heads: int = 1
) -> Tensor:
    """Attention [B, heads, N, N] of patches with these labels [B, N]."""
    logits = strength * (labels[:, :, None] == labels[:, None]).float()[:, None]
    shape = (len(labels), heads, *logits.shape[2:])
    return (logits + noise * torch.from_numpy(rng.standard_normal(shape)).float()).softmax(-1)
