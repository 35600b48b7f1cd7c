"""The affinity against what the model's own, unfused softmax gives."""

import re

import pytest
import timm
import torch
from torch import nn
from vits import MAE, VARIANTS, make_vit

from maskevolve import GraphCutPartitioner, PartTeacher
from maskevolve.attention import attention_affinity, attention_modules
from maskevolve.geometry import patch_grid


def softmax_maps(vit, run):
    """Oracle: what every block of an unfused model puts into its attention dropout, [B, tokens, tokens] a block."""
    maps, handles = [], []
    for module in vit.modules():
        if hasattr(module, "attn_drop"):
            module.fused_attn = False
            hook = module.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0].mean(1)))
            handles.append(hook)
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return torch.stack(maps)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_affinity_is_the_mean_softmax_between_patches(variant, fused):
    vit, images = make_vit(variant), torch.randn(2, 3, 224, 224)
    height, width = patch_grid(vit, images)
    prefix = vit.num_prefix_tokens
    expected = softmax_maps(vit, lambda: vit.forward_features(images))[:, :, prefix:, prefix:]
    assert len(expected) == 3
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    affinity = attention_affinity(vit, images)
    assert affinity.shape == (2, height * width, height * width)
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity, expected.mean(0), rtol=1e-4, atol=1e-6)
    assert affinity.std() > 0.1 * affinity.mean(), "attention that a wrong formula would miss"
    for layers in ([0], [-1], [0, -1], [1, 2]):
        torch.testing.assert_close(
            attention_affinity(vit, images, layers), expected[layers].mean(0), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_rotary_embeddings_and_position_biases_are_included(name):
    torch.manual_seed(0)
    vit, images = timm.create_model(name, num_classes=0).eval(), torch.randn(1, 3, 224, 224)
    for block in vit.blocks:
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            nn.init.normal_(block.attn.relative_position_bias_table)
    fused = attention_affinity(vit, images, [0, 1])
    expected = softmax_maps(vit, lambda: vit.forward_features(images))[:2, :, 1:, 1:]
    torch.testing.assert_close(fused, expected.mean(0), rtol=1e-4, atol=1e-6)


def test_mae_is_read_without_masking_and_without_its_decoder():
    mae, images = MAE(), torch.randn(2, 3, 64, 64)
    affinity = attention_affinity(mae, images)

    def run():
        x = torch.cat([mae.cls_token.expand(2, -1, -1), mae.patch_embed(images) + mae.pos_embed], 1)
        for block in mae.blocks:
            x = block(x)

    torch.testing.assert_close(affinity, softmax_maps(mae, run)[:, :, 1:, 1:].mean(0), rtol=1e-4, atol=1e-6)
    assert "random_masking" not in vars(mae)
    mae.random_masking = own = lambda x, mask_ratio: (x, None, None)
    attention_affinity(mae, images)
    assert mae.random_masking is own


def test_the_model_is_left_as_it_was():
    vit, images = make_vit(), torch.randn(1, 3, 224, 224)
    before = vit(images)
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    attention_affinity(vit, images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())
    assert torch.equal(vit(images), before)
    with pytest.raises(RuntimeError):  # a call that fails cleans up, too
        attention_affinity(vit, torch.randn(1, 5, 224, 224))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_stops_after_the_last_layer_that_is_needed():
    vit, ran = make_vit(), []
    for index, block in enumerate(vit.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    attention_affinity(vit, torch.randn(1, 3, 224, 224), [0, 1])
    assert ran == [0], "the MLP of block 1 comes after the attention that was wanted last"


def test_rectangular_images():
    vit = make_vit(dynamic_img_size=True)
    images = torch.randn(2, 3, 160, 224)
    assert patch_grid(vit, images) == (10, 14)
    assert attention_affinity(vit, images).shape == (2, 140, 140)


def test_autocast_and_half_precision_give_float32():
    vit, images = make_vit(), torch.randn(1, 3, 224, 224)
    exact = attention_affinity(vit, images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attention_affinity(vit, images)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), 0) > 0.99
    assert attention_affinity(vit.bfloat16(), images.bfloat16()).dtype == torch.float32


def test_no_attention_is_an_error_that_lists_the_modules():
    class Convolutions(nn.Sequential):
        pass

    model = Convolutions(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(RuntimeError, match=r"Convolutions has no attention.*num_heads.*0 \(Conv2d\), 1 \(ReLU\)"):
        attention_affinity(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="Convolutions has no attention"):
        PartTeacher(model, GraphCutPartitioner(), total_epochs=10)


def test_windowed_attention_is_an_error():
    swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
    with pytest.raises(ValueError, match=r"between all tokens.*layers="):
        attention_affinity(swin, torch.randn(1, 3, 224, 224))


def test_a_model_that_hides_its_patch_size_is_an_error():
    vit = make_vit()
    del vit.patch_embed.patch_size
    with pytest.raises(ValueError, match=r"patch_embed\.patch_size = 16"):
        attention_affinity(vit, torch.randn(1, 3, 224, 224))


class HandWritten(nn.Module):
    """Attention as people write it themselves."""

    def __init__(self, width, heads):
        super().__init__()
        self.n_heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.nn.functional.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return x + (weights @ v).transpose(1, 2).flatten(2)


def test_hand_written_attention_is_read():
    mae = MAE(width=48)
    mae.blocks = nn.ModuleList([HandWritten(48, 3) for _ in range(2)])
    affinity = attention_affinity(mae, torch.randn(2, 3, 64, 64))
    assert affinity.shape == (2, 64, 64)
    assert ((affinity.sum(-1) > 0.5) & (affinity.sum(-1) <= 1)).all()


def test_attention_without_softmax_is_an_error_that_names_it():
    class Linear(nn.Module):
        num_heads = 1

        def forward(self, x):
            return x

    model = nn.Sequential(Linear())
    with pytest.raises(RuntimeError, match=r"no softmax attention in 0\..*0 \(Linear\)"):
        attention_affinity(model, torch.randn(1, 3, 8, 8))


def test_bad_layers():
    vit, images = make_vit(), torch.randn(1, 3, 224, 224)
    with pytest.raises(ValueError, match=r"layer 3 .*3 attention layers"):
        attention_affinity(vit, images, [0, 3])
    for layers in ([], 2):
        with pytest.raises(ValueError, match=re.escape(f"layers={layers} must be a list")):
            attention_affinity(vit, images, layers)


def test_dropped_patches_are_an_error():
    vit = make_vit(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"fewer than the 14 x 14.*patch_drop"):
        attention_affinity(vit, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("name", ["decoder", "decoder_blocks", "dec", "dec_blocks", "my_decoder"])
def test_a_decoder_is_not_read(name):
    class WithDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = MAE(width=48).patch_embed
            self.encoder = nn.ModuleList([HandWritten(48, 3) for _ in range(2)])
            self.add_module(name, nn.ModuleList([HandWritten(48, 3) for _ in range(2)]))

        def forward(self, images):
            x = self.patch_embed(images)
            for block in [*self.encoder, *getattr(self, name)]:
                x = block(x)
            return x

    model, images = WithDecoder(), torch.randn(2, 3, 64, 64)
    before = attention_affinity(model, images)
    for parameter in getattr(model, name).parameters():
        nn.init.normal_(parameter)
    assert torch.equal(attention_affinity(model, images), before)
    assert [name for name, _ in attention_modules(model)] == ["encoder.0", "encoder.1"]


@pytest.mark.parametrize("shape", [(2, 64, 64), (64, 64)])
def test_attention_without_heads_is_an_error_that_says_so(shape):
    class Folded(nn.Module):
        num_heads = 3

        def forward(self, images):
            return torch.rand(shape).softmax(-1)

    with pytest.raises(ValueError, match=r"\[B, heads, tokens, tokens\]"):
        attention_affinity(nn.Sequential(Folded()), torch.randn(2, 3, 64, 64))
