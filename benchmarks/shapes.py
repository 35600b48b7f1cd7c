"""Pictures whose parts are known: textured shapes over a textured background."""

from __future__ import annotations

import torch
from torch import Tensor


def composed_shapes(batch_size: int, size: int, patch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four ellipses over a background, each with stripes, colours and noise of its own.

    Args:
        batch_size: number of images B.
        size: height and width in pixels.
        patch_size: in pixels.
        generator: of all draws.

    Returns:
        images [B, 3, size, size] float32 with mean about 0 and deviation about 1, and labels [B, N] int64: what covers
        most of each patch, 0 is the background.
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, 5, *shape, generator=generator)

    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    angle, frequency, phase = draw(0, 3.14, 1, 1), draw(10, 60, 1, 1), draw(0, 6.28, 1, 1)
    waves = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)[:, :, None]
    textures = draw(-1, 1, 3, 1, 1) + draw(-1, 1, 3, 1, 1) * waves
    row, column, tall, wide = (
        draw(*limits, 1, 1)[:, 1:] for limits in ((0.1, 0.9), (0.1, 0.9), (0.1, 0.3), (0.1, 0.3))
    )
    inside = ((y - row) / tall) ** 2 + ((x - column) / wide) ** 2 < 1
    labels = (inside * torch.arange(1, 5)[:, None, None]).amax(1)  # the last lies on top
    images = textures.gather(1, labels[:, None, None].expand(-1, 1, 3, -1, -1))[:, 0]
    images = 1.2 * images + 0.2 * torch.randn(images.shape, generator=generator)
    votes = torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2).float()
    return images, torch.nn.functional.avg_pool2d(votes, patch_size).argmax(1).flatten(1)
