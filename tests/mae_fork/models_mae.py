"""A stand-in for the official MAE's file of this name: the same interface and the same obstacles, in our own words."""

import torch
from timm.models.vision_transformer import Block
from torch import nn
from util.pos_embed import sines
from vits import MAE


class MaskedAutoencoderViT(MAE):
    def __init__(self, norm_pix_loss=False):
        super().__init__(norm_pix_loss=norm_pix_loss, seed=None)
        self.blocks = nn.ModuleList([Block(48, 3, 4.0, qkv_bias=True, qk_scale=None) for _ in range(2)])
        self.pos_embed.data.copy_(torch.from_numpy(sines(64, 48)))
        self.pos_embed.requires_grad = False


mae_vit_small = MaskedAutoencoderViT
