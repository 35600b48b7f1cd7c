"""A masked autoencoder in the shape of the official one, with a timm ViT as its encoder.

The encoder sees only the visible patches; a small decoder predicts the pixels of the removed ones.
Source: Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from maskevolve.masks import Masking


class MaskedAutoencoder(nn.Module):
    """`masking` stands where the official MAE has `random_masking`."""

    def __init__(
        self,
        masking: Masking,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        decoder_depth: int = 2,
    ) -> None:
        super().__init__()
        self.masking = masking
        self.patch_size = patch_size
        self.encoder = VisionTransformer(
            image_size, patch_size, num_classes=0, global_pool="", embed_dim=width, depth=depth, num_heads=heads
        )
        half, grid = width // 2, self.encoder.patch_embed.grid_size
        self.decoder_embed = nn.Linear(width, half)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, half))
        self.decoder_blocks = nn.Sequential(*[Block(half, heads, qkv_bias=True) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(half)
        self.decoder_pred = nn.Linear(half, 3 * patch_size**2)
        self.register_buffer("decoder_pos_embed", sincos(grid, half), persistent=False)
        self.encoder.pos_embed.requires_grad_(False).copy_(sincos(grid, width))
        self.apply(init_linear)

    def forward_encoder(self, images: Tensor, mask_ratio: float, parts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder._pos_embed(self.encoder.patch_embed(images))
        visible, mask, ids_restore = self.masking(x[:, 1:], mask_ratio, parts=parts)  # was: self.random_masking
        x = torch.cat([x[:, :1], visible], 1)
        return self.encoder.norm(self.encoder.blocks(x)), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], removed.to(x)], 1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        prediction: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return prediction[:, 1:]

    def forward(self, images: Tensor, mask_ratio: float, parts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error on the removed patches (0-d), predicted patches [B, N, pixels], mask [B, N]."""
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, parts)
        prediction = self.forward_decoder(latent, ids_restore)
        error = (prediction.float() - patchify(images, self.patch_size)).square().mean(-1)
        return (error * mask).sum() / mask.sum(), prediction, mask


def init_linear(module: nn.Module) -> None:
    """Xavier, as MAE: timm's narrower start learns more slowly in a short run."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embeddings [1, 1 + N, width], zeros for the class token.

    MAE's temperature is 10000; on a grid of 12 x 12 most of those waves are nearly constant. With shorter and stronger
    ones the loss of a short run is a third lower.
    """
    patches = build_sincos2d_pos_embed(list(grid), width, temperature=20)
    return 2 * torch.cat([torch.zeros(1, width), patches])[None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    height = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch_size, q=patch_size)
