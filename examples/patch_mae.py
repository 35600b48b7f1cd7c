"""A small masked autoencoder of series, pictures or clips, with MAE's `random_masking`, and how it is trained.

`apply_to_mae` replaces `random_masking`, as it does in anybody's MAE.
Source: Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from tqdm import tqdm

from maskevolve.integrations import Evolution
from maskevolve.viz import evolution_figure

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbed(nn.Module):
    """Patches [B, N, width] of images [B, C, *size], the last axis of the grid fastest."""

    def __init__(self, channels: int, size: tuple[int, ...], patch_size: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.patch_size, self.img_size = patch_size, size
        self.num_patches = math.prod(size) // math.prod(patch_size)
        self.proj = CONVOLUTIONS[len(size)](channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class PatchMAE(nn.Module):
    """Encoder and decoder of `depth` blocks and one."""

    def __init__(
        self, channels: int, size: tuple[int, ...], patch_size: tuple[int, ...], width: int = 64, depth: int = 4
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, size, patch_size, width)
        shape, pixels = (1, self.patch_embed.num_patches, width), channels * math.prod(patch_size)
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*[Block(width, 4, qkv_bias=True) for _ in range(depth)], nn.LayerNorm(width))
        self.decoder = nn.Sequential(Block(width, 4, qkv_bias=True), nn.LayerNorm(width), nn.Linear(width, pixels))

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        ids_shuffle = torch.rand(x.shape[:2], device=x.device).argsort(1)
        ids_restore, keep = ids_shuffle.argsort(1), int(x.shape[1] * (1 - mask_ratio))
        visible = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
        return visible, (ids_restore >= keep).float(), ids_restore

    def forward_encoder(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, ids_restore = self.random_masking(self.patch_embed(images) + self.pos_embed, mask_ratio)
        return self.blocks(x), mask, ids_restore

    def forward(self, images: Tensor, mask_ratio: float) -> Tensor:
        """Mean squared error on the removed patches, each normalised, 0-d."""
        x, mask, ids_restore = self.forward_encoder(images, mask_ratio)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] - x.shape[1], -1)
        x = torch.cat([x, removed], 1).gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        error = (self.decoder(x + self.decoder_pos_embed) - self.patchify(images)).square().mean(2)
        return (error * mask).sum() / mask.sum()

    def patchify(self, images: Tensor) -> Tensor:
        """Pixels of patches, [B, N, pixels], with mean 0 and variance 1 in each."""
        axes = images.ndim - 2
        for axis in reversed(range(axes)):
            images = images.unflatten(2 + axis, (-1, self.patch_embed.patch_size[axis]))
        cells, inside = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        pixels = images.permute(0, *cells, *inside, 1).flatten(1, axes).flatten(2)
        return (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True) + 1e-6).sqrt()


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """What `train` is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="default: 12")
    parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches to remove (default: 0.75)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(f"runs/{name}"), help=f"where to write (default: runs/{name})")
    return parser


def train(
    model: PatchMAE,
    evolution: Evolution,
    draw_batches: Callable[[], Sequence[Tensor]],
    shown: Tensor,
    args: argparse.Namespace,
    snapshots: int,
) -> tuple[list[float], tuple[list[Any], list[Any], list[str]]]:
    """The loss of each epoch; and masks, parts and titles of some of them, of the images that are shown."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    evolution.follow(optimizer)
    losses, masks, parts, titles = [], [], [], []
    last = max(args.epochs - 1, 1)
    wanted = {round(last * step / (snapshots - 1)) for step in range(snapshots)}
    for epoch in tqdm(range(args.epochs)):
        evolution.set_epoch(epoch)
        found = []
        for images in draw_batches():
            loss = model(images, args.mask_ratio)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        losses.append(sum(found) / len(found))
        if epoch in wanted:
            with torch.no_grad(), evolution.fixed(args.seed):
                model.eval()(shown, args.mask_ratio)
            model.train()
            masks.append(evolution.last_mask)
            parts.append(evolution.last_parts)
            titles.append(f"epoch {epoch + 1}, alpha {evolution.alpha:.2f}")
    return losses, (masks, parts, titles)


def draw(images: Tensor, points: Any, grid: tuple[int, ...], losses: list[float], path: Path) -> None:
    """Write the picture of the masks at some points of training, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    evolution_figure(images, *points, grid).savefig(path, dpi=110)
    print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}; see {path}")
