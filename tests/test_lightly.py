"""Evolving masks in MAEs made of Lightly's modules and under Lightning, against the real packages."""

import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial

import lightly_mae as example
import pytest
import pytorch_lightning as pl
import torch
from hosts import Plain, lightning_trainer, make_teacher, make_vit, pictures
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision
from lightly_mae import MAE
from test_pretrain import equal
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import vision_transformer as torchvision_vit
from vits import watch_calls

from maskevolve import EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.integrations import apply_to_lightly, lightning_callback
from maskevolve.teachers.attention import attention_affinity

OWN = {name: function for name, function in vars(utils).items() if name.startswith("random_")}


@pytest.fixture(autouse=True)
def lightly_is_left_as_it_was():
    yield
    assert {name: getattr(utils, name) for name in OWN} == OWN


def make(**options):
    return MAE(make_vit(**options), lr=1e-3, decoder_width=32)


def evolve(mae, epochs=4):
    return apply_to_lightly(mae, EvolvingMask(epochs), make_teacher(mae.backbone, total_epochs=epochs))


def test_same_permutation_same_loss(monkeypatch):
    mae, images = make(), pictures()
    mae.log = lambda *_, **__: None
    evolution, drawn = apply_to_lightly(mae, RandomMask()), []
    encode = mae.backbone.encode
    monkeypatch.setattr(
        evolution, "mask", lambda *args: drawn.append(type(evolution).mask(evolution, *args)) or drawn[0]
    )
    patched = mae.training_step(images, 0)
    order = drawn[0].ids_restore.argsort(1) + 1
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.int64), order[:, :16]], 1)
    evolution.remove()
    assert mae.backbone.encode != encode
    with monkeypatch.context() as patch:
        patch.setattr(utils, "random_token_mask", lambda *_, **__: (keep, order[:, 16:]))
        assert torch.equal(mae.training_step(images, 0), patched)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("maskable", [False, True], ids=["", "mask_class_token"])
def test_indices_have_the_shapes_and_order_of_lightlys(ratio, options, maskable):
    def draw(images, length):
        return utils.random_token_mask((len(images), length), ratio, mask_class_token=maskable, device=images.device)

    backbone = MaskedVisionTransformerTIMM(make_vit(**options))
    mae, prefix = Plain(backbone, draw), backbone.vit.num_prefix_tokens
    own = draw(pictures(3), backbone.sequence_length)
    apply_to_lightly(mae, GridMask())
    mae(pictures(3))
    for ours, theirs in zip((mae.idx_keep, mae.idx_mask), own, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert mae.idx_keep[:, :prefix].tolist() == [list(range(prefix))] * 3
    everything = torch.cat([mae.idx_keep, mae.idx_mask], 1).sort(1).values
    assert torch.equal(everything, torch.arange(backbone.sequence_length).expand(3, -1))


def test_pixios_coarse_grid_is_replaced_too():
    mae = Plain(draw=lambda images, length: utils.random_grid_token_mask((len(images), length), 0.75, grid_size=2))
    apply_to_lightly(mae, GridMask())
    assert mae(pictures()).shape == (2, 17, 48)
    assert mae.idx_mask.shape == (2, 48)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.65, 0.95])
def test_inverse_blocks_of_capi_are_replaced_too(monkeypatch, ratio):
    def draw(images, length):
        return utils.random_inverse_block_mask((len(images), length), ratio, 5, roll=False, device=images.device)

    mae = Plain(MaskedVisionTransformerTIMM(make_vit(reg_tokens=4)), draw)
    own = draw(pictures(3), 69)
    noise = torch.rand(3, 64)
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise)
    apply_to_lightly(mae, RandomMask())
    mae(pictures(3))
    for ours, theirs in zip((mae.idx_keep, mae.idx_mask), own, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert torch.equal(ours, ours.sort(1).values), "in the order of the patches, as Lightly's"
    removed = noise.argsort(1)[:, 64 - own[1].shape[1] :].sort(1).values + 5
    assert torch.equal(mae.idx_mask, removed)


class Distilled(nn.Module):
    """In the shape of Lightly's DINOv2: a student whose blocks of patches are masked, and its frozen average."""

    def __init__(self, **blocks):
        super().__init__()
        self.teacher = MaskedVisionTransformerTIMM(make_vit(dynamic_img_size=True))
        self.student = deepcopy(self.teacher)
        self.teacher.requires_grad_(False)
        self.blocks = blocks

    def training_step(self, batch, batch_idx):
        views, _ = batch
        images = torch.cat(views[:2])
        self.block_mask = utils.random_block_mask((len(images), 8, 8), **self.blocks)
        mask = torch.cat([images.new_zeros(len(images), 1, dtype=torch.bool), self.block_mask.flatten(1)], 1)
        with torch.no_grad():
            target = self.teacher.encode(images)[mask]
        self.student.encode(torch.cat(views[2:]))
        return nn.functional.mse_loss(self.student.encode(images, mask=mask)[mask], target)


def views():
    return [pictures(3), pictures(3).flip(3), pictures(3, 32, 32), pictures(3, 32, 32)], torch.zeros(3)


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"batch_mask_ratio": 1.0, "min_image_mask_ratio": 0.3, "max_image_mask_ratio": 0.6},
        {"batch_mask_ratio": 0.4, "max_num_masks_per_block": 8, "max_attempts_per_block": 1, "device": "cpu"},
        {"batch_mask_ratio": 0.0},
    ],
)
def test_blocks_of_patches_have_lightlys_counts(blocks):
    model, own = Distilled(**blocks), []
    apply_to_lightly(model, EvolvingMask(4), make_teacher(model.student.vit)).set_epoch(3)
    for seed in range(4):
        random.seed(seed)
        model.training_step(views(), 0)
        random.seed(seed)
        own = utils.random_block_mask((6, 8, 8), **blocks)
        assert (model.block_mask.shape, model.block_mask.dtype) == (own.shape, own.dtype)
        assert torch.equal(model.block_mask.sum((1, 2)), own.sum((1, 2)))


def test_the_blocks_that_are_masked_have_the_highest_scores(monkeypatch):
    model, noise = Distilled(batch_mask_ratio=1.0), torch.rand(6, 64)
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise)
    apply_to_lightly(model, RandomMask())
    model.training_step(views(), 0)
    for scores, mask in zip(noise, model.block_mask.flatten(1), strict=True):
        assert scores[mask].min() > scores[~mask].max()


def test_blocks_are_whole_parts_of_the_views_that_are_masked():
    model, (images, labels) = Distilled(batch_mask_ratio=1.0), views()
    teacher = make_teacher(model.student)
    evolution = apply_to_lightly(model, PartMask(), teacher).set_epoch(3)
    assert evolution.student is model.student, "not its average"
    parts = teacher(torch.cat(images[:2]))
    for _ in range(3):
        model.training_step((images, labels), 0)
        for mask, image in zip(model.block_mask.flatten(1), parts, strict=True):
            assert sum(mask[image == part].unique().numel() == 2 for part in image.unique()) <= 1


def test_the_same_blocks_give_the_same_loss(monkeypatch):
    model = Distilled()
    evolution = apply_to_lightly(model, RandomMask())
    ours = model.training_step(views(), 0)
    evolution.remove()
    monkeypatch.setattr(utils, "random_block_mask", lambda *_, **__: model.block_mask)
    assert torch.equal(model.training_step(views(), 0), ours)


def test_blocks_imported_by_name_are_an_error():
    class Example(Distilled):
        def training_step(self, batch, batch_idx):
            images = torch.cat(batch[0][:2])
            blocks = OWN["random_block_mask"]((len(images), 8, 8))
            return self.student.encode(images, mask=nn.functional.pad(blocks.flatten(1), (1, 0)))

    model = Example()
    apply_to_lightly(model, RandomMask())
    with pytest.raises(RuntimeError, match=r"from lightly\.models import utils.*utils\.random_block_mask"):
        model.training_step(views(), 0)


def test_lightly_is_left_as_it_was_by_steps_that_fail():
    mae = Plain(draw=lambda images, length: [][0])
    apply_to_lightly(mae, RandomMask())
    with pytest.raises(IndexError):
        mae(pictures())


def test_other_threads_and_other_models_draw_lightlys_own_masks():
    reached, go_on = threading.Event(), threading.Event()

    def draw(images, length):
        reached.set()
        go_on.wait(10)
        return utils.random_token_mask((len(images), length), 0.75)

    mae = Plain(draw=draw)
    evolution = apply_to_lightly(mae, RandomMask())
    evolution.mask = None

    with ThreadPoolExecutor(1) as thread:
        failing = thread.submit(mae, pictures())
        reached.wait(10)
        assert Plain()(pictures()).shape == (2, 17, 48), "would fail if it drew ours"
        go_on.set()
        assert isinstance(failing.exception(), TypeError)


def test_images_are_found_in_the_arguments():
    mae, images = Plain(), pictures()
    evolution = evolve(mae).set_epoch(2)
    mae(images, extra={"labels": torch.zeros(2), "small": pictures(2, 8, 8), "again": [images]})
    with pytest.raises(RuntimeError, match=r"2 tensors that could be.*call evolution\.see\(images\)"):
        mae(images, extra=pictures())
    evolution.see(images)
    mae(images, extra=pictures())
    mae.draw = lambda images, length: utils.random_token_mask((2 * len(images), length), 0.75)
    with pytest.raises(RuntimeError, match="for 4 images of 64 patches, but the arguments of the step hold 0 tensors"):
        mae(images)


def test_a_mask_that_was_not_drawn_from_ours_is_an_error():
    mae, images = Plain(), pictures()
    evolution = apply_to_lightly(mae, RandomMask())
    imported_by_name = OWN["random_token_mask"]
    mae.draw = lambda images, length: imported_by_name((len(images), length), 0.75)
    with pytest.raises(RuntimeError, match=r"from lightly\.models import utils.*utils\.random_token_mask"):
        mae(images)
    keep, mask = utils.random_token_mask((2, 65), 0.75)  # outside of forward
    for named in ({"idx_keep": keep}, {"idx_mask": mask}):
        with pytest.raises(RuntimeError, match="in the `forward` or the `training_step`"):
            mae.backbone.encode(images, **named)
    assert mae.backbone(images).shape == (2, 48), "no mask, no error"
    assert mae.eval().backbone.encode(images, idx_keep=keep).shape == (2, 17, 48), "for demos, any mask will do"
    evolution.remove()
    assert mae.train()(images).shape == (2, 17, 48)


def test_validation_draws_ours():
    class Validated(MAE):
        def validation_step(self, images, batch_idx):
            return self.training_step(images, batch_idx)

    mae = Validated(make_vit(), lr=1e-3)
    mae.log = lambda *_, **__: None
    evolution = evolve(mae).set_epoch(3)
    evolution.mask = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mae.eval().validation_step(pictures(), 0)


def test_images_that_are_not_square():
    mae = Plain(MaskedVisionTransformerTIMM(make_vit((64, 32)), pos_embed_initialization="learn"))
    evolve(mae).set_epoch(2)
    assert mae(pictures(3, 64, 32)).shape == (3, 9, 48)


def test_torchvisions_attention_is_read():
    torch.manual_seed(0)
    vit, images, maps = torchvision_vit.VisionTransformer(64, 8, 2, 3, 48, 96).eval(), pictures(), []
    for block in vit.encoder.layers:
        nn.init.normal_(block.self_attention.in_proj_weight, std=0.5)
        block.self_attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "need_weights": True}), with_kwargs=True
        )
        block.self_attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    vit(images)
    affinity = attention_affinity(vit, images)
    torch.testing.assert_close(affinity, torch.stack(maps[:2]).mean(0)[:, 1:, 1:])
    assert affinity.std() > 0.1 * affinity.mean()
    mae = Plain(MaskedVisionTransformerTorchvision(vit))
    evolve(mae).set_epoch(2)
    assert mae(images).shape == (2, 17, 48)


def test_parts_that_came_with_the_batch():
    mae, images, parts = Plain(), pictures(), torch.arange(64).expand(2, -1) % 7
    evolution = apply_to_lightly(mae, PartMask())
    evolution.see(parts=parts)
    mae(images)
    assert torch.equal(evolution.last_parts, parts)
    assert torch.equal(evolution.last_mask, torch.zeros(2, 64).scatter(1, mae.idx_mask - 1, 1))
    evolution.see(images, parts)
    mae(images, extra=pictures())
    with pytest.raises(ValueError, match="needs parts"):
        mae(pictures())


def test_an_encoder_that_is_given_no_mask_in_training():
    mae = Plain(draw=lambda images, length: (None, None))
    evolution = apply_to_lightly(mae, RandomMask())
    mae(pictures())
    with pytest.warns(UserWarning, match=r"not masked: utils\.random_token_mask"):
        evolution.update()


def test_wrong_use_names_the_fix():
    mae = make()
    with pytest.raises(TypeError, match=r"MaskedVisionTransformerTIMM is an encoder.*pass the module that draws"):
        apply_to_lightly(mae.backbone, RandomMask())
    with pytest.raises(TypeError, match="Sequential defines no forward"):
        apply_to_lightly(nn.Sequential(mae.backbone), RandomMask())
    with pytest.raises(ValueError, match=r"MAE could not be tried on a picture.*forward.*pass the encoder"):
        make_teacher(mae)
    other = Plain(draw=lambda images, length: utils.random_token_mask((len(images), length), 1.0))
    apply_to_lightly(other, RandomMask())
    with pytest.raises(ValueError, match="keep"):
        other(pictures())


# Under Lightning.

make_trainer = partial(lightning_trainer, pl)


def loader(count=12):
    return DataLoader(pictures(count), 4)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}]
)
def test_lightning_moves_the_epoch_and_the_teacher(tmp_path, monkeypatch, options):
    mae = make()
    evolution = evolve(mae, 3)
    epochs, updates = watch_calls(monkeypatch, evolution)
    trainer = make_trainer(evolution, tmp_path, **options)
    trainer.fit(mae, loader())
    assert epochs == pytest.approx([step / 3 for step in range(9)])
    assert len(updates) == evolution.teacher.model.n_averaged == 9 // options.get("accumulate_grad_batches", 1)
    assert evolution.masking.alpha == trainer.callback_metrics["alpha"] == 1
    assert evolution.teacher.num_parts == trainer.callback_metrics["num_parts"] == 4
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_another_model_is_refused_and_a_removed_evolution_left_alone(tmp_path):
    mae = make()
    evolution = evolve(mae, 1)
    with pytest.raises(ValueError, match="very model"):
        make_trainer(evolution, tmp_path, 1).fit(make(), loader())
    evolution.remove()
    trainer = make_trainer(evolution, tmp_path, 1)
    trainer.fit(make(), loader())
    assert "alpha" not in trainer.callback_metrics
    copy = pickle.loads(pickle.dumps(lightning_callback(evolution)))
    assert copy.state_dict() == {}
    copy.load_state_dict({"masking": None})


def test_a_probe_with_an_optimizer_of_its_own_does_not_move_the_teacher(tmp_path):
    class Probed(MAE):
        automatic_optimization = False

        def training_step(self, images, batch_idx):
            loss = super().training_step(images, batch_idx) + self.probe(images.mean((2, 3))).square().mean()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            probe = set(self.probe.parameters())
            rest = [weight for weight in self.parameters() if weight not in probe]
            return torch.optim.SGD(self.probe.parameters(), 0.1), torch.optim.AdamW(rest, 1e-3)

    mae = Probed(make_vit(), lr=1e-3, decoder_width=32)
    mae.probe = nn.Linear(3, 1)
    evolution = evolve(mae, 1)
    make_trainer(evolution, tmp_path, 1).fit(mae, loader())
    assert evolution.teacher.model.n_averaged == 3


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path):
    mae = make()
    expected = evolve(mae, 3)
    every = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(expected, tmp_path, callbacks=[every]).fit(mae, loader())

    torch.manual_seed(123)
    resumed = make()
    evolution = evolve(resumed, 3)
    trainer = make_trainer(evolution, tmp_path)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert evolution.teacher.model.n_averaged == 9
    assert equal(mae.state_dict(), resumed.state_dict())
    for name in ("teacher", "masking"):
        assert equal(expected.state_dict()[name], evolution.state_dict()[name])


def test_pretraining_on_photographs_lowers_the_loss_and_raises_alpha(tmp_path):
    losses, alphas = [], []

    class Record(MAE):
        def training_step(self, images, batch_idx):
            loss = super().training_step(images, batch_idx)
            losses.append(float(loss.detach()))
            return loss

        def on_train_epoch_end(self):
            alphas.append(float(self.trainer.callback_metrics["alpha"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "MAE", Record)
        example.main(["--image-size", "32", "--epochs", "4", "--out", str(tmp_path)])
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert alphas == sorted(alphas)
    assert alphas[-1] == 1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["callbacks"]["maskevolve"]["masking"]["alpha"] == 1
