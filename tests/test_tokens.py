"""The affinity of tokens against tokens that are computed by hand."""

import pytest
import timm
import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import cosine_similarity
from torchvision.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTModel
from vits import MAE, VARIANTS, make_vit

from maskevolve.teachers import token_affinity


def similarity(tokens):
    """[B, N, width] to [B, N, N], a pair at a time."""
    tokens = tokens - tokens.mean(1, keepdim=True)
    return cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)


def check(affinity, tokens):
    torch.testing.assert_close(affinity, similarity(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "parallel"])
def test_tokens_that_the_first_block_of_timm_reads(variant):
    vit, images = make_vit(variant), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        tokens = vit.blocks[0].norm1(x)[:, vit.num_prefix_tokens :]
    check(token_affinity(vit, images), tokens)


def test_rotary_embeddings():
    vit = timm.create_model("eva02_tiny_patch14_224", depth=3, num_classes=0).eval()
    affinity = token_affinity(vit, torch.randn(2, 3, 224, 224))
    assert affinity.shape == (2, 256, 256)
    torch.testing.assert_close(affinity.diagonal(dim1=1, dim2=2), torch.ones(2, 256))


def test_mae_without_masking():
    mae, images = MAE(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = torch.cat([mae.cls_token.expand(2, -1, -1), mae.patch_embed(images) + mae.pos_embed], 1)
        tokens = mae.blocks[0].norm1(x)[:, 1:]
    check(token_affinity(mae, images), tokens)
    assert "random_masking" not in vars(mae)


def test_hugging_face():
    config = ViTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=64)
    model, images = ViTModel(config).eval(), torch.randn(2, 3, 64, 64)
    layer = next(module for module in model.modules() if hasattr(module, "layernorm_before"))
    with torch.no_grad():
        hidden = model(images, output_hidden_states=True).hidden_states[0]
        check(token_affinity(model, images), layer.layernorm_before(hidden)[:, 1:])


def test_torchvision():
    vit, images = VisionTransformer(64, 16, 3, 4, 48, 96).eval(), torch.randn(2, 3, 64, 64)
    seen = []
    handle = vit.encoder.layers[0].ln_1.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        vit(images)
    handle.remove()
    check(token_affinity(vit, images), seen[0][:, 1:])


class TokensFirst(nn.Module):
    """Blocks of nn.MultiheadAttention that take [tokens, B, width]."""

    def __init__(self, depth):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.patch_embed.patch_size = 8
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2) for _ in range(depth)])

    def forward(self, images):
        x = rearrange(self.patch_embed(images), "b c h w -> (h w) b c")
        for block in self.blocks:
            x = x + block(query=x, key=x, value=x)[0]
        return x


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_of_ones_own(depth):
    torch.manual_seed(0)
    model, images = TokensFirst(depth).eval(), torch.randn(3, 3, 32, 24)
    with torch.no_grad():
        x = rearrange(model.patch_embed(images), "b c h w -> (h w) b c")
    check(token_affinity(model, images), x.transpose(0, 1))
