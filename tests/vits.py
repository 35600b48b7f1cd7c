"""Small models for the tests: timm's own, and an MAE with the interface of the official one."""

import timm
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn

VARIANTS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "parallel": ("vit_small_patch16_36x1_224", {"embed_dim": 192, "num_heads": 3}),
}


def make_vit(variant="class token", depth=3, fused=True, **options):
    name, extra = VARIANTS[variant]
    torch.manual_seed(0)
    vit = timm.create_model(name, depth=depth, num_classes=0, **extra, **options).eval()
    for parameter in vit.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 * parameter.shape[-1] ** -0.5 * 4)  # attention that is far from even
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return vit


class MAE(nn.Module):
    """What a teacher meets of the official MAE: two sets of blocks, and masking in the encoder."""

    def __init__(self, depth=2, width=48, heads=3, patch_size=8, image_size=64):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList([Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.decoder_blocks = nn.ModuleList([Block(width, heads, qkv_bias=True)])

    def random_masking(self, x, mask_ratio):
        order = torch.rand(x.shape[:2]).argsort(1)
        keep = order[:, : int(x.shape[1] * (1 - mask_ratio)), None].expand(-1, -1, x.shape[2])
        return x.gather(1, keep), torch.zeros(x.shape[:2]), order.argsort(1)

    def forward_encoder(self, x, mask_ratio):
        x, mask, ids_restore = self.random_masking(self.patch_embed(x) + self.pos_embed, mask_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward(self, images, mask_ratio=0.75):
        latent, mask, _ = self.forward_encoder(images, mask_ratio)
        for block in self.decoder_blocks:
            latent = block(latent)
        return latent.square().mean(), latent, mask
