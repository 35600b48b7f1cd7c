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
    points = np.stack(np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij"), -1)
    centres = rng.random((batch_size, num_parts, 2))
    distance = np.square(points.reshape(1, -1, 1, 2) - centres[:, None]).sum(-1)
    labels = torch.from_numpy(distance.argmin(-1))
    logits = strength * (labels[:, :, None] == labels[:, None]).float()[:, None]
    logits = logits + noise * torch.from_numpy(rng.standard_normal((batch_size, heads, *logits.shape[2:]))).float()
    return labels, logits.softmax(-1)
