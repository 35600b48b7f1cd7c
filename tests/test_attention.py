"""The affinity against what the model's own, unfused softmax gives."""

import itertools
import types
from functools import partial

import pytest
import timm
import torch
from test_mae import Unfolded
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from vits import MAE, VARIANTS, make_teacher, make_vit

from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.teachers.patch_grid import patch_grid
from maskevolve.teachers.trial import attention_modules

both = pytest.mark.parametrize("affinity_of", [attention_affinity, token_affinity], ids=["attention", "tokens"])


def no_hooks(model):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def softmax_maps(vit, run):
    """Oracle: what every block of an unfused model puts into its attention dropout, [B, tokens, tokens] a block."""
    maps, attending = [], [module for module in vit.modules() if hasattr(module, "attn_drop")]
    for module in attending:
        module.fused_attn = False
    take = lambda module, args: maps.append(args[0].mean(1))  # noqa: E731
    handles = [module.attn_drop.register_forward_pre_hook(take) for module in attending]
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
    torch.testing.assert_close(affinity, expected.mean(0), rtol=1e-4, atol=1e-6)
    assert affinity.std() > 0.1 * affinity.mean(), "attention that a wrong formula would miss"
    for layers in ([0], [-1], [0, -1], [1, 2]):
        affinity = attention_affinity(vit, images, layers)
        torch.testing.assert_close(affinity, expected[layers].mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_rotary_embeddings_and_position_biases_are_included(name):
    torch.manual_seed(0)
    vit, images = timm.create_model(name, num_classes=0, depth=2).eval(), torch.randn(1, 3, 224, 224)
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


@both
def test_the_model_is_left_as_it_was(affinity_of):
    vit, images = make_vit(), torch.randn(1, 3, 224, 224)
    before = vit(images)
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    affinity_of(vit, images)
    assert no_hooks(vit)
    assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())
    assert torch.equal(vit(images), before)
    with pytest.raises(RuntimeError):  # a call that fails cleans up, too
        affinity_of(vit, torch.randn(1, 5, 224, 224))
    assert no_hooks(vit)


def test_stops_after_what_is_needed():
    vit, images, ran = make_vit(), torch.randn(1, 3, 224, 224), []
    for index, block in enumerate(vit.blocks):
        block.attn.qkv.register_forward_hook(lambda *_, index=index: ran.append(f"qkv {index}"))
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(f"mlp {index}"))
    token_affinity(vit, images)
    assert not ran
    attention_affinity(vit, images, [0, 1])
    assert ran == ["qkv 0", "mlp 0", "qkv 1"]


@both
def test_autocast_and_half_precision_give_float32(affinity_of):
    vit, images = make_vit(), torch.randn(1, 3, 224, 224)
    exact = affinity_of(vit, images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = affinity_of(vit, images)
    for affinity in (rough, affinity_of(vit.bfloat16(), images.bfloat16())):
        assert affinity.dtype == exact.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(affinity.flatten(), exact.flatten(), 0) > 0.99


@both
def test_dropped_patches_are_an_error(affinity_of):
    with pytest.raises(ValueError, match=r"14 x 14.*patch_drop_rate"):
        affinity_of(make_vit(patch_drop_rate=0.5).train(), torch.randn(1, 3, 224, 224))


def test_no_attention_is_an_error_that_lists_the_modules():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for refused in (lambda: attention_affinity(model, torch.randn(1, 3, 8, 8)), lambda: make_teacher(model)):
        with pytest.raises(RuntimeError, match=r"Sequential has no.*num_heads.*0 \(Conv2d\), 1 \(ReLU\)"):
            refused()


def test_a_model_that_hides_its_patch_size_is_an_error():
    mae, images = MAE(), torch.randn(1, 3, 64, 64)
    mae.patch_embed = Unfolded()
    for refused in (lambda: attention_affinity(mae, images), lambda: make_teacher(mae)):
        with pytest.raises(ValueError, match=r"patch_embed\.patch_size = 16"):
            refused()
    mae.patch_embed.patch_size = 8
    assert attention_affinity(mae, images).shape == (1, 64, 64)


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


class Returns(nn.Module):
    """Attention that only says that it is."""

    def __init__(self, call):
        super().__init__()
        self.num_heads, self.forward = 3, call


def test_attention_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="layers="):  # in windows
        attention_affinity(timm.create_model("swin_tiny_patch4_window7_224").eval(), torch.randn(1, 3, 224, 224))
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"in 0\..*0 \(Returns\)"):
        attention_affinity(nn.Sequential(Returns(lambda x: x)), images)
    for shape in ((2, 64, 64), (64, 64)):  # without heads
        with pytest.raises(ValueError, match=r"\[B, heads, tokens, tokens\]"):
            attention_affinity(nn.Sequential(Returns(lambda x, shape=shape: torch.rand(shape).softmax(-1))), images)


@pytest.mark.parametrize("layers", [[0, 3], [], 2])
def test_bad_layers(layers):
    with pytest.raises(ValueError, match=r"layer 3|layers=(\[\]|2)"):
        attention_affinity(make_vit(), torch.randn(1, 3, 224, 224), layers)


NAMES = ["decoder", "decoder_blocks", "dec", "dec_blocks", "my_decoder", "tail", "blocks2"]


class Autoencoder(nn.Module):
    """A decoder in the forward pass, which alone takes images."""

    def __init__(self, decoder, encoder="encoder"):
        super().__init__()
        self.patch_embed = MAE(width=48).patch_embed
        self.names = encoder, decoder
        for name in self.names:
            self.add_module(name, nn.ModuleList([HandWritten(48, 3) for _ in range(2)]))

    def forward(self, images):
        x = self.patch_embed(images)
        for block in [*getattr(self, self.names[0]), *getattr(self, self.names[1])]:
            x = block(x)
        return x


class MaskedAutoencoder(Autoencoder):
    """The same with mask tokens, and the first block of the decoder in the list of the encoder."""

    def random_masking(self, x, mask_ratio):
        return MAE.random_masking(self, x, mask_ratio)

    def forward(self, images, mask_ratio=0.75):
        encoder, decoder = (getattr(self, name) for name in self.names)
        x, _, ids_restore = self.random_masking(self.patch_embed(images), mask_ratio)
        x = encoder[0](x)
        x = torch.cat([x, x.new_zeros(len(x), 64 - x.shape[1], 48)], 1)[torch.arange(len(x))[:, None], ids_restore]
        for block in [encoder[1], *decoder]:
            x = block(x)
        return x


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_told_by_where_it_runs_and_not_read(name):
    model, images = Autoencoder(name), torch.randn(2, 3, 64, 64)
    before = attention_affinity(model, images)
    for parameter in getattr(model, name).parameters():
        nn.init.normal_(parameter)
    assert torch.equal(attention_affinity(model, images), before)
    masked, mae = MaskedAutoencoder(name, "decoder_free_encoder"), MAE(width=48)
    mae.add_module(name, mae._modules.pop("decoder_blocks"))
    for each, names in (
        (model, ["encoder.0", "encoder.1"]),
        (Autoencoder(name, "decoder_free_encoder"), ["decoder_free_encoder.0", "decoder_free_encoder.1"]),
        (masked, ["decoder_free_encoder.0"]),
        (mae, ["blocks.0.attn", "blocks.1.attn"]),
    ):
        assert [name for name, _ in attention_modules(each)] == names
    assert attention_affinity(masked, images).shape == (2, 64, 64)
    assert make_teacher(mae, layers=[-1])(images).shape == (2, 64)


def test_modules_that_change_are_looked_at_again():
    model = Autoencoder("tail")
    assert len(attention_modules(model)) == 2
    model.encoder = nn.ModuleList([HandWritten(48, 3) for _ in range(3)])
    assert [name for name, _ in attention_modules(model)] == ["encoder.0", "encoder.1", "encoder.2"]


def test_pooling_and_class_attention_are_left_out():
    cait = timm.create_model("cait_xxs24_224", img_size=64, depth=2).eval()
    assert attention_affinity(cait, torch.randn(1, 3, 64, 64)).shape == (1, 16, 16)


class Calls(nn.Module):
    """Attention of the tokens as they are, by any call."""

    num_heads = 4

    def __init__(self, call, key_heads=4):
        super().__init__()
        self.call, self.key_heads = call, key_heads

    def forward(self, x):
        query = x.unflatten(2, (4, -1)).transpose(1, 2)
        self.given = query, query[:, : self.key_heads], query[:, : self.key_heads].flip(2)
        self.output = self.call(*self.given)
        return self.output.transpose(1, 2).flatten(2)


def embedding(std):
    """A model of nothing yet but patches."""
    torch.manual_seed(0)
    model = nn.Module()
    model.patch_embed = nn.Conv2d(3, 16, 4, 4)
    nn.init.normal_(model.patch_embed.weight, std=std)
    return model, torch.randn(2, 3, 12, 12)


def calling(call, size=1.0, **options):
    model, images = embedding(0.2 * size)
    model.blocks = nn.ModuleList([Calls(call, **options) for _ in range(2)])

    def forward(images):
        x = model.patch_embed(images).flatten(2).mT
        for block in model.blocks:
            x = block(x)

    model.forward = forward
    return model.eval(), images


def by_hand(query, key, mask=None, causal=False, scale=None):
    """The softmax, a head and a query at a time, in float64: [B, tokens, tokens], the mean over heads."""
    batch, heads, tokens, width = query.shape
    total = torch.zeros(batch, tokens, tokens, dtype=torch.float64)
    for b, h, n in itertools.product(range(batch), range(heads), range(tokens)):
        logits = key[b, h * key.shape[1] // heads].double() @ query[b, h, n].double()
        logits = logits * (width**-0.5 if scale is None else scale)
        if mask is not None:
            logits = torch.where(mask[n], logits, -torch.inf) if mask.dtype == torch.bool else logits + mask[n]
        if causal:
            logits[n + 1 :] = -torch.inf
        if logits.isfinite().any():
            total[b, n] += logits.softmax(0)
    return (total / heads).float()


ALLOWED = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.4
ALLOWED[3] = torch.__version__ < (2, 5)  # before, torch made NaN of a token that attends to nothing
BIAS = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda q, k, v: sdpa(q, k, v), {}),
        (lambda q, k, v: sdpa(q, k, v, None, 0.0), {}),
        (lambda q, k, v: sdpa(q, k, v, None, 0.0, False), {}),
        (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), {"causal": True}),
        (lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True, scale=2.0), {"causal": True, "scale": 2.0}),
        (lambda q, k, v: sdpa(q, k, v, BIAS, 0.0, scale=0.1), {"mask": BIAS, "scale": 0.1}),
        (lambda q, k, v: sdpa(q, k, v, attn_mask=ALLOWED), {"mask": ALLOWED}),
        (lambda q, k, v: sdpa(q, k, v, ALLOWED, dropout_p=0.0), {"mask": ALLOWED}),
        (lambda q, k, v: sdpa(q, k, v, None, 0.5), {}),
    ],
)
@pytest.mark.parametrize("key_heads", [4, 2, 1] if torch.__version__ >= (2, 5) else [4])  # enable_gqa is of 2.5
def test_every_call_of_scaled_dot_product_attention(call, expected, key_heads):
    if key_heads < 4:
        call = grouped(call)
    model, images = calling(call, key_heads=key_heads)
    torch.manual_seed(1)
    with torch.no_grad():
        model.forward(images)
    query, key, _ = model.blocks[1].given
    output = model.blocks[0].output
    torch.manual_seed(1)
    second = attention_affinity(model, images, [1])
    torch.testing.assert_close(second, by_hand(query, key, **expected), rtol=1e-4, atol=1e-6)
    torch.manual_seed(1)
    attention_affinity(model, images, [0, 1])
    assert torch.equal(model.blocks[0].output, output), "the forward pass is what it is without us"


def grouped(call):
    """The same call, for keys of fewer heads."""
    return types.FunctionType(call.__code__, {**call.__globals__, "sdpa": partial(sdpa, enable_gqa=True)})


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 60.0), (torch.bfloat16, 8.0)])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_half_precision_are_exact(dtype, size, autocast):
    model, images = calling(lambda q, k, v: sdpa(q.to(dtype), k.to(dtype), v.to(dtype)).float(), size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        affinity = attention_affinity(model, images, [0])
    query, key, _ = (each.to(dtype) for each in model.blocks[0].given)
    largest = (query.double() @ key.double().mT).abs().max()
    assert largest > (65504 if dtype == torch.float16 else 1000)
    torch.testing.assert_close(affinity, by_hand(query, key), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [0.2, 60.0])
def test_multihead_attention_is_read_without_dropout_and_in_float32(size):
    model, images = embedding(size)
    model.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)])
    nn.init.normal_(model.blocks[0].in_proj_weight, std=size)
    model.forward = lambda images: model.blocks[0](*[model.patch_embed(images).flatten(2).mT] * 3, need_weights=False)
    model, images = model.half().train(), images.half()
    affinity = attention_affinity(model, images)
    with torch.no_grad():
        x = model.patch_embed(images).flatten(2).mT.float()
        expected = model.float().eval().blocks[0](x, x, x)[1]
    torch.testing.assert_close(affinity, expected, rtol=1e-4, atol=1e-6)


class Counter(nn.Module):
    """Changes one buffer in place and replaces another, in any mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, images):
        self.calls += 1
        self.last = images.mean((0, 2, 3))
        return images + torch.rand_like(images)


def test_trying_a_model_leaves_no_trace():
    model = Autoencoder("tail")
    model.counter, model.norm = Counter(), nn.BatchNorm2d(3)
    model.encoder.eval()
    encode = model.forward
    model.forward = lambda images: encode(model.norm(model.counter(images)))
    buffers = dict(model.named_buffers())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    attention_modules(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert no_hooks(model)
