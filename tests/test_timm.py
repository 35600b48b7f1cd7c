"""Masks in the patch dropout of timm's ViTs: which patches stay is ours, all else is timm's."""

import copy
from pathlib import Path

import processes
import pytest
import timm
import torch
from hosts import make_teacher
from test_pretrain import equal
from timm.layers import PatchDropout
from torch.multiprocessing import ProcessExitedException

from maskevolve import EvolvingMask, GridMask, RandomMask
from maskevolve.integrations import apply_to_timm

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5, "patch_drop_rate": 0.75}
MODELS = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 96}),
    "no class token": ("vit_tiny_patch16_224", {"img_size": 96, "class_token": False, "global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 96}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),
    "EVA": ("eva02_tiny_patch14_224", {"img_size": 84}),
    "RoPE, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 96}),
    "RoPE, registers": ("vit_small_patch16_dinov3", {"img_size": 96}),
    "non-square": ("vit_tiny_patch16_224", {"img_size": (64, 160)}),
    "dynamic": ("vit_tiny_patch16_224", {"img_size": 96, "dynamic_img_size": True}),
}
MODELS = {name: model for name, model in MODELS.items() if timm.is_model(model[0])}  # not all in older versions
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm")


def make(name, **options):
    torch.manual_seed(0)
    architecture, own = MODELS[name]
    vit = timm.create_model(architecture, **{**SMALL, **own, **options}).train()
    return vit, vit.patch_embed.img_size


def evolving(vit):
    return apply_to_timm(vit, EvolvingMask(10), make_teacher(vit, total_epochs=10)).set_epoch(5)


def gradients(vit, images):
    torch.manual_seed(1)
    vit.zero_grad()
    output = vit(images)
    output = sum(output) if isinstance(output, tuple) else output  # distilled models have two heads
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in vit.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_same_draws_give_the_same_output(monkeypatch, name, ordered):
    vit, size = make(name)
    vit.patch_drop.ordered = ordered
    # In distilled models timm's patch dropout may drop the distillation token; ours does not.
    vit.patch_drop.num_prefix_tokens = vit.num_prefix_tokens
    images = torch.randn(3, 3, *size)
    noise = torch.rand(3, vit.patch_embed.num_patches)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise)
        expected = gradients(vit, images)
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise)
    evolution = apply_to_timm(vit, RandomMask())
    ours = gradients(vit, images)
    assert torch.equal(ours[0], expected[0])
    assert all(map(torch.equal, ours[1], expected[1]))
    evolution.remove()


@pytest.mark.parametrize("name", MODELS)
def test_evolving_masks_in_every_vit(name):
    vit, size = make(name)
    evolving(vit)
    images = torch.randn(3, 3, *size)
    keep = int(0.25 * vit.patch_embed.num_patches)
    assert vit.forward_features(images).shape == (3, vit.num_prefix_tokens + keep, 48)
    output, grads = gradients(vit, images)
    assert output.shape == (3, 5)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.77, 0.96, 0.99])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (112, 112)])
def test_as_many_patches_stay_as_in_timm(rate, size):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=size, **{**SMALL, "patch_drop_rate": rate}).train()
    images = torch.randn(2, 3, *size)
    expected = vit.forward_features(images).shape
    apply_to_timm(vit, GridMask())
    assert vit.forward_features(images).shape == expected


def test_copies_go_by_their_own_mode():
    vit, size = make("plain")
    evolving(vit)
    average, images = timm.utils.ModelEmaV3(vit, decay=0.9), torch.randn(2, 3, *size)
    average.update(vit)
    assert average.module.eval().forward_features(images).shape[1] == 37
    assert vit.forward_features(images).shape[1] == 10
    assert copy.deepcopy(vit).forward_features(images).shape[1] == 10


class TestEverydayTraining:
    # Older versions of timm cannot checkpoint an EVA.
    @pytest.mark.parametrize("name", ["plain", "EVA"] if "RoPE, registers" in MODELS else ["plain"])
    def test_checkpointed_activations(self, name):
        vit, size = make(name)
        evolving(vit)
        images = torch.randn(2, 3, *size)
        expected = gradients(vit, images)
        vit.set_grad_checkpointing()
        torch.testing.assert_close(gradients(vit, images), expected)

    def test_batches_of_any_size_and_images_of_several_sizes(self):
        vit, _ = make("dynamic")
        evolving(vit)
        for size, height, width in ((1, 96, 96), (5, 96, 96), (2, 64, 160), (3, 160, 64), (2, 128, 128)):
            number = height * width // 256
            assert vit.forward_features(torch.randn(size, 3, height, width)).shape == (size, 1 + number // 4, 48)


class TestWrongUse:
    @pytest.mark.parametrize("name", ["plain", "EVA"])
    def test_no_patch_dropout(self, name):
        architecture, own = MODELS[name]
        vit = timm.create_model(architecture, **{**SMALL, **own, "patch_drop_rate": 0})
        with pytest.raises(ValueError, match=r"timm\.create_model\(\.\.\., patch_drop_rate=0\.75\)"):
            apply_to_timm(vit, RandomMask())


def test_patch_dropout_of_older_versions():
    """It had an option in place of a class of its own."""

    class Dropout(PatchDropout):
        def forward(self, x):
            return x, None

    vit, size = make("EVA")
    vit.patch_drop = Dropout(0.75, 1)
    vit.patch_drop.return_indices = True
    evolving(vit)
    assert vit.forward_features(torch.randn(2, 3, *size)).shape == (2, 10, 48)


def launch(*options, folder, ranks=1):
    """What the launcher of examples/timm prints, run on the stand-in for timm's script."""
    tests = Path(__file__).parent
    examples = tests.parent / "examples"
    command = [examples / "timm" / "train.py", "--script", tests / "timm_train.py", *options]
    processes.start_script(*command, "--output", folder, folder=folder, ranks=ranks, path=[tests, examples])
    return (folder / "0.out").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_launcher(tmp_path, ranks):
    ours = ("--ema-decay", 0.9, "--num-parts", 8, 4, "--")
    log = launch(*ours, folder=tmp_path / "whole", ranks=ranks)
    processes.check_log(log)
    launch(*ours, "--resume", tmp_path / "whole/checkpoint-0.pth.tar", folder=tmp_path / "resumed", ranks=ranks)
    paths = (tmp_path / run / "checkpoint-2.pth.tar" for run in ("whole", "resumed"))
    whole, resumed = (torch.load(path, weights_only=False) for path in paths)
    for part in ("state_dict", "optimizer", "maskevolve"):
        assert equal(whole[part], resumed[part])
    assert int(whole["maskevolve"]["evolution"]["teacher"]["model.n_averaged"]) == 12


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--script", Path(__file__).parent, "--"), "is no file: take train.py"),
        (("--", "--model", "resnet18"), "no patch dropout: choose a --model that is a ViT"),
    ],
)
def test_launcher_with_what_it_cannot_use(tmp_path, options, error):
    with pytest.raises(ProcessExitedException):
        launch(*options, folder=tmp_path)
    assert error in (tmp_path / "0.err").read_text()
