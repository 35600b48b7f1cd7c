"""Small models for the tests: timm's own, and an MAE with the interface of the official one."""

import timm
import torch
from einops import rearrange
from photos import centre, find_photos
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn

from maskevolve import GraphCutPartitioner, PartTeacher

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
    """A small MAE with the interface of the official one: its methods, their arguments and what they return."""

    def __init__(self, depth=2, width=48, heads=3, patch_size=8, image_size=64, norm_pix_loss=False, seed=0):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList([Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(0.1 * torch.randn(1, 1 + self.patch_embed.num_patches, width))
        self.decoder_blocks = nn.ModuleList([Block(width, heads, qkv_bias=True)])
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)
        self.norm_pix_loss = norm_pix_loss

    def random_masking(self, x, mask_ratio):
        shuffle = torch.rand(x.shape[0], x.shape[1], device=x.device).argsort(1)
        restore, keep = shuffle.argsort(1), int(x.shape[1] * (1 - mask_ratio))
        visible = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
        return visible, (restore >= keep).float(), restore

    def forward_encoder(self, x, mask_ratio):
        x, mask, ids_restore = self.random_masking(self.patch_embed(x) + self.pos_embed, mask_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        removed = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], removed.to(x)], 1).gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, images, prediction, mask):
        rows, columns = self.patch_embed.patch_size
        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=rows, q=columns)
        if self.norm_pix_loss:
            target = nn.functional.layer_norm(target, target.shape[-1:], eps=1e-6)
        return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, images, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio)
        prediction = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, prediction, mask), prediction, mask


def make_teacher(model, kind=PartTeacher, **options):
    return kind(model, GraphCutPartitioner(), **{"total_epochs": 10, **options})


def photographs(count, size):
    """Real pictures, [count, 3, size, size] around 0."""
    photos = [centre(path, size) for path in find_photos(None)]
    return torch.stack([photos[index % len(photos)].roll(index, -1) for index in range(count)]) * 4 - 2


def check_training(evolution, compute_loss, lr, trained=None):
    """40 steps, an epoch each, of the student or what it is a part of: the loss falls while alpha rises to 1."""
    optimizer = torch.optim.AdamW((trained or evolution.student).parameters(), lr=lr)
    losses, alphas = [], []
    for step in range(40):
        evolution.set_epoch(step)
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        evolution.update()
        losses.append(float(loss.detach()))
        alphas.append(float(evolution.masking.alpha))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert alphas == sorted(alphas)
    assert alphas[-1] == 1


def watch_calls(monkeypatch, evolution):
    """Lists that grow with the epochs that are set and the updates that are made."""
    epochs, updates = [], []
    set_epoch, update = evolution.set_epoch, evolution.update
    monkeypatch.setattr(evolution, "set_epoch", lambda epoch: (epochs.append(epoch), set_epoch(epoch)))
    monkeypatch.setattr(evolution, "update", lambda: (updates.append(1), update()))
    return epochs, updates
