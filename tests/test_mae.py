"""Masks in an MAE with `random_masking`: the model is otherwise what it was, in everything that people train with."""

import copy
import re
from pathlib import Path

import processes
import pytest
import torch
from test_pretrain import equal
from torch import nn
from torch.multiprocessing import ProcessExitedException
from torchvision.utils import save_image
from vits import MAE, make_teacher, make_vit, photographs

from maskevolve import EvolvingMask, GridMask, RandomMask
from maskevolve.integrations import Evolution, apply_to_mae

EXAMPLES = Path(__file__).parents[1] / "examples"
FORK = Path(__file__).parent / "mae_fork"


def evolving(model, **options):
    """An MAE in the middle of its training."""
    return apply_to_mae(model, EvolvingMask(10), make_teacher(model, **options)).set_epoch(5)


def loss_and_gradients(model, images, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    loss, _, mask = model(images)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach(), mask, gradients


def test_weights_loaded_after_the_teacher_was_copied_reach_it():
    model, pretrained, images = MAE(), MAE(seed=7), torch.randn(2, 3, 64, 64)
    evolution = evolving(model)
    model.load_state_dict(pretrained.state_dict())
    model(images)
    assert torch.equal(evolution.teacher.model.module.cls_token, pretrained.cls_token)
    assert int(evolution.teacher.model.n_averaged) == 0, "that was no step"


class TestEverydayTraining:
    def test_a_step_that_the_scaler_skips_does_not_move_the_teacher(self):
        model, images = MAE(), torch.randn(2, 3, 64, 64)
        evolution = evolving(model)
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
        evolution.follow(optimizer)
        for step, updates in enumerate((1, 1, 2)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(images)[0]
            scaler.scale(loss).backward()
            if step == 1:
                model.norm.bias.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert int(evolution.teacher.model.n_averaged) == updates

    def test_compiled_in_place(self):
        torch._dynamo.reset()
        model, images = MAE(depth=1), torch.randn(2, 3, 64, 64)
        evolution = evolving(model)
        expected = loss_and_gradients(model, images)
        model.compile(backend="aot_eager")
        ours = loss_and_gradients(model, images)
        torch.testing.assert_close(ours, expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for epoch in (5.5, 6, 9):
                evolution.set_epoch(epoch)
                assert (model(images)[2].sum(1) == 48).all()
        evolution.remove()
        torch._dynamo.reset()

    def test_reconstruction_in_eval_mode(self):
        model, images = MAE(), torch.randn(2, 3, 64, 64)
        evolving(model)
        model.eval()
        with torch.no_grad():
            _, prediction, mask = model(images, mask_ratio=0.5)
        assert prediction.shape == (2, 64, 192)
        assert (mask.sum(1) == 32).all()

    def test_batches_of_any_size_and_images_of_several_sizes(self):
        class AnySize(MAE):
            def forward_encoder(self, x, mask_ratio):
                self.pos_embed.data = self.pos_embed.data[:, :1].expand(-1, x.shape[2] * x.shape[3] // 64, -1)
                return super().forward_encoder(x, mask_ratio)

        model = AnySize()
        model.patch_embed.strict_img_size = False
        evolving(model)
        for size, height, width in ((1, 64, 64), (5, 64, 64), (2, 32, 96), (3, 96, 32), (2, 128, 64)):
            visible, mask, _ = model.forward_encoder(torch.randn(size, 3, height, width), 0.75)
            number = height * width // 64
            assert visible.shape[:2] == (size, 1 + number // 4)
            assert mask.shape == (size, number)

    def test_copies_share_the_masks_until_they_are_removed(self):
        model, images = MAE(), torch.randn(2, 3, 64, 64)
        model.evolution = evolving(model)  # as examples/mae/mae.patch keeps it
        average = copy.deepcopy(model)
        assert torch.equal(loss_and_gradients(average, images)[0], loss_and_gradients(model, images)[0])
        assert isinstance(average.evolution, Evolution)
        model.evolution.remove()
        expected = loss_and_gradients(MAE(), images)
        for each in (model, average):
            assert torch.equal(loss_and_gradients(each, images)[0], expected[0])
            assert torch.equal(loss_and_gradients(each, images)[1], expected[1])

    def test_a_model_that_was_moved_takes_its_teacher_along(self):
        model = MAE()
        evolution = evolving(model)
        evolution.teacher.to("meta")
        assert evolution.teacher.epoch.is_meta
        with pytest.raises(NotImplementedError, match="meta"):  # nothing to move: but it tried
            model(torch.randn(2, 3, 64, 64))


def test_models_in_the_shape_of_mmpretrain():
    """`layers` for `blocks`, a ratio of its own, everything in `forward`, and an embedding that returns its size."""

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Conv2d(3, 48, 8, 8)

        def forward(self, x):
            x = self.projection(x)
            return x.flatten(2).mT, x.shape[2:]

    class MAEViT(nn.Module):
        def __init__(self):
            super().__init__()
            source = MAE()
            self.patch_embed, self.layers, self.mask_ratio = Embed(), source.blocks, 0.75

        def random_masking(self, x, mask_ratio=0.75):
            return MAE.random_masking(self, x, mask_ratio)

        def forward(self, x, mask=True):
            x, _ = self.patch_embed(x)
            x, mask, ids_restore = self.random_masking(x, self.mask_ratio)
            for layer in self.layers:
                x = layer(x)
            return x, mask, ids_restore

    model = MAEViT()
    model.patch_embed.patch_size = 8  # what the README says to do where it is missing
    evolving(model)
    assert model(torch.randn(2, 3, 64, 64))[0].shape == (2, 16, 48)


class Unfolded(nn.Module):
    """A patch embedding that does not tell the size of its patches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 48)

    def forward(self, images):
        return self.linear(nn.functional.unfold(images, 8, stride=8).mT)


class TestWrongUse:
    def test_two_lengths_of_training(self):
        model = MAE()
        with pytest.raises(ValueError, match=r"total_epochs=400, its teacher 10"):
            apply_to_mae(model, EvolvingMask(400), make_teacher(model))
        apply_to_mae(model, EvolvingMask(10), make_teacher(model))

    def test_a_hidden_patch_size_is_found_at_once(self):
        model, embed = MAE(), Unfolded()
        model.patch_embed = embed
        with pytest.raises(ValueError, match=r"patch_embed\.patch_size = 16"):
            apply_to_mae(model, GridMask())
        apply_to_mae(model, RandomMask()).remove()  # for which it does not matter where patches lie
        evolution = apply_to_mae(model, GridMask(), patch_size=(8, 8))
        model(torch.randn(2, 3, 64, 64))
        pattern = evolution.last_mask.view(2, 4, 2, 4, 2)  # of 2 x 2 patches, all over the image
        assert torch.equal(pattern, pattern[:, :1, :, :1].expand_as(pattern))

    def test_patches_that_do_not_fit_the_images(self):
        model = MAE()
        evolving(model)
        model.patch_embed.patch_size = (16, 16)
        with pytest.raises(ValueError, match=r"4 x 4 .*N=64"):
            model(torch.randn(1, 3, 64, 64))

    def test_patches_of_images_that_were_not_embedded(self):
        model = MAE()
        evolving(model)
        with pytest.raises(RuntimeError, match="call the whole model"):
            model.random_masking(torch.randn(1, 64, 48), 0.75)

    def test_state_of_other_masks(self):
        model, other = MAE(), MAE()
        state = apply_to_mae(model, RandomMask()).state_dict()
        with pytest.raises(ValueError, match="has a teacher, the saved state none"):
            evolving(other).load_state_dict(state)


def test_the_patch_only_inserts_lines():
    text = (EXAMPLES / "mae" / "mae.patch").read_text()
    head, *hunks = re.split(r"(?m)^@@ ", text[text.index("diff --git") :])
    for hunk in hunks:
        position, *lines = hunk.split("\n")
        count = int(re.fullmatch(r"-\d+,0 \+\d+(?:,(\d+))? @@", position)[1] or 1)
        assert all(line.startswith("+") for line in lines[:count])
        assert all(re.match(r"diff |--- |\+\+\+ |$", line) for line in lines[count:])
    assert len(hunks) == 5
    assert head.startswith("diff --git a/main_pretrain.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs as an ImageFolder."""
    folder = tmp_path_factory.mktemp("images")
    for index, photo in enumerate(photographs(32, 64)):
        path = folder / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(photo / 4 + 0.5, path)
    return folder


def launch(*options, folder, ranks=1):
    """What the launcher of examples/mae prints, run on the stand-in for a fork."""
    ours, theirs = options[: options.index("--")], options[options.index("--") :]
    command = [EXAMPLES / "mae" / "pretrain.py", "--mae", FORK, *ours, *theirs, "--device", "cpu"]
    processes.start_script(*command, "--output_dir", folder, folder=folder, ranks=ranks, path=[FORK.parent])
    return (folder / "0.out").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_launcher(images, tmp_path, ranks):
    ours = ("--ema-decay", 0.9, "--num-parts", 8, 4, "--", "--data_path", images, "--accum_iter", 2)
    log = launch(*ours, folder=tmp_path / "whole", ranks=ranks)
    processes.check_log(log)

    launch(*ours, "--resume", tmp_path / "whole/checkpoint-0.pth", folder=tmp_path / "resumed", ranks=ranks)
    paths = (tmp_path / run / "checkpoint-2.pth" for run in ("whole", "resumed"))
    whole, resumed = (torch.load(path, weights_only=False) for path in paths)
    del whole["args"], resumed["args"]
    assert equal(whole, resumed)
    teacher = whole["maskevolve"]["evolution"]["teacher"]
    assert int(teacher["model.n_averaged"]) == 6 // ranks, "once for each two batches"
    assert len(whole["maskevolve"]["random"]) == ranks


def test_launcher_with_the_masks_of_the_fork(images, tmp_path):
    own, ours = tmp_path / "own", tmp_path / "ours"
    log = launch("--mask", "own", "--", "--data_path", images, "--epochs", 1, folder=own)
    assert "masks" not in log
    assert "loss" in log
    options = ("--data_path", images, "--epochs", 2, "--resume", own / "checkpoint-0.pth")
    log = launch("--mask", "evolving-block", "--", *options, folder=ours)
    assert "saved without evolving masks" in log
    assert "masks of epoch 1: EvolvingMask, alpha 1.000" in log


def test_launcher_without_a_fork(tmp_path):
    with pytest.raises(ProcessExitedException):
        processes.start_script(EXAMPLES / "mae" / "pretrain.py", "--mae", tmp_path, "--", folder=tmp_path)
    assert "holds no main_pretrain.py: git clone" in (tmp_path / "0.err").read_text()


def test_no_mae():
    with pytest.raises(TypeError, match="VisionTransformer has no `random_masking`"):
        apply_to_mae(make_vit(), RandomMask())


def test_a_teacher_of_another_architecture_is_told_by_its_weights():
    with pytest.raises(ValueError, match=r"another architecture than this MAE.*\[1, 1, 24\].*\[1, 1, 48\]"):
        apply_to_mae(MAE(), EvolvingMask(10), make_teacher(MAE(width=24)))
    with pytest.raises(ValueError, match=r"another architecture.*blocks\.2\.norm1"):
        apply_to_mae(MAE(), EvolvingMask(10), make_teacher(MAE(depth=3)))
