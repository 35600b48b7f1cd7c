"""Evolving masks in the methods of stable-pretraining, against the real package.

Its installation is heavy, so `.ci/run` gives this file an environment of its own; elsewhere it is skipped.
"""

import copy
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from hosts import anatomy, lightning_trainer, make_teacher, make_vit, pictures, record
from test_pretrain import equal
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from vits import photographs, watch_calls

pytest.importorskip("stable_pretraining", reason="its tests run in .ci/run, in an environment of its own")

import lightning.pytorch as pl
import stable_pretraining as spt
from stable_pretraining import methods
from stable_pretraining.backbone import IJEPAMasking, MaskedEncoder, MultiBlockMasking, PatchMasking
from stable_pretraining.backbone.patch_masking import MaskingOutput

from maskevolve import EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.integrations import apply_to_stable_pretraining

HEADS = {"projector_hidden_dim": 32, "projector_bottleneck_dim": 16}
PROTOTYPES = {"n_cls_prototypes": 32, "n_patch_prototypes": 16}
DECODER = {"decoder_embed_dim": 32, "decoder_num_heads": 2}
METHODS = {
    "MAE": (methods.MAE, {**DECODER, "decoder_depth": 1}),
    "SimMIM": (methods.SimMIM, {"patch_size": 8, "image_size": 64}),
    "BEiT": (methods.BEiT, {"patch_size": 8, "vocab_size": 32, "image_size": 64}),
    "MaskFeat": (methods.MaskFeat, {"patch_size": 8, "image_size": 64}),
    "Data2Vec": (methods.Data2Vec, {"top_k_blocks": 1, "image_size": 64}),
    "iBOT": (methods.iBOT, {**HEADS, **PROTOTYPES, "image_size": 64}),
    "MIMRefiner": (methods.MIMRefiner, {**HEADS, **PROTOTYPES, "image_size": 64}),
    "DINOv2": (methods.DINOv2, {**HEADS, **PROTOTYPES, "image_size": 64}),
    "DINOv3": (methods.DINOv3, {**HEADS, **PROTOTYPES, "image_size": 64}),
    "MSN": (methods.MSN, {**HEADS, "n_prototypes": 16, "image_size": 64}),
    "PMSN": (
        lambda vit, **options: methods.PMSN(encoder_name=vit, **options),
        {**HEADS, "n_prototypes": 16, "image_size": 64},
    ),
    "CMAE": (methods.CMAE, {"patch_size": 8, "projector_dim": 16, "image_size": 64}),
    "CrossMAE": (methods.CrossMAE, {**DECODER, "decoder_depth": 2, "kept_mask_ratio": 0.25, "image_size": 64}),
}
VIEWS = {**dict.fromkeys(("iBOT", "MIMRefiner"), "global"), **dict.fromkeys(("DINOv2", "DINOv3"), "local")}
VIEWS |= dict.fromkeys(("MSN", "PMSN", "CMAE"), "two")


def make(name, **options):
    vit = make_vit(dynamic_img_size=VIEWS.get(name) == "local")
    torch.manual_seed(0)
    method, own = METHODS[name]
    return method(vit, **{**own, **options}).train()


def inputs(name, first=None):
    """What the method is given, by the names of its arguments, and the images among it that are masked."""
    first = pictures(3) if first is None else first
    second = first.flip(3)
    views = VIEWS.get(name)
    if views is None:
        return {"images": first}, first
    if views == "two":
        return {"view2": second, "view1": first}, first
    local = {"local_views": [pictures(len(first), 32)] * 2} if views == "local" else {}
    return {**local, "global_views": [first, second]}, torch.cat([first, second])


def student(module):
    return next(inner for inner in module.modules() if isinstance(inner, VisionTransformer))


def evolve(module, epochs=4):
    return apply_to_stable_pretraining(module, EvolvingMask(epochs), make_teacher(student(module), total_epochs=epochs))


def gradients(module, given):
    torch.manual_seed(1)
    module.zero_grad()
    output = module(**given)
    output.loss.backward()
    return output.loss.detach(), [weight.grad for weight in module.parameters() if weight.grad is not None]


@pytest.mark.parametrize("name", METHODS)
def test_the_same_draws_give_the_same_loss_and_gradients(monkeypatch, name):
    module = make(name)
    given, masked = inputs(name)
    noise = torch.rand(len(masked), 64)
    rand = torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **how: noise if size == noise.shape else rand(*size, **how))
        before = copy.deepcopy(module)  # iBOT moves its centre in each forward pass
        expected = gradients(before, given)
    # MAE and CrossMAE remove what draws the most, the others what draws the least.
    highest = name in ("MAE", "CrossMAE")
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise if highest else 1 - noise)
    trace = anatomy(module)
    evolution = apply_to_stable_pretraining(module, RandomMask())
    loss, grads = gradients(module, given)
    evolution.remove()
    assert anatomy(module) == trace
    assert loss.isfinite()
    assert torch.equal(loss, expected[0])
    assert all(map(torch.equal, grads, expected[1]))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.77, 0.9, 0.98])
@pytest.mark.parametrize("name", ["MAE", "SimMIM", "CrossMAE"])
def test_as_many_patches_are_removed_as_in_the_host(name, ratio):
    module = make(name)
    owner = module.encoder.masking if name == "MAE" else module
    evolution = apply_to_stable_pretraining(module, GridMask())
    owner.mask_ratio = ratio  # a schedule of the ratio goes on working
    if name == "CrossMAE":
        module.kept_mask_ratio = ratio / 2
    evolution.see(pictures(3))
    x = torch.randn(3, 64, 48)
    call = {
        "MAE": lambda: owner(x, 8, 8),
        "SimMIM": lambda: module._random_mask(3, 64, x.device),
        "CrossMAE": lambda: module._random_mask(x),
    }[name]
    ours = call()
    evolution.remove()
    own = call()
    for one, other in zip(*(list(out.values()) if name == "MAE" else list(out) for out in (ours, own)), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    masks = (out.mask if name == "MAE" else out[1] if name == "CrossMAE" else out for out in (ours, own))
    assert len({tuple(mask.sum(1).tolist()) for mask in masks}) == 1


def test_masking_output_is_consistent():
    vit = make_vit(reg_tokens=2)
    encoder = MaskedEncoder(vit, PatchMasking(0.6)).train()
    apply_to_stable_pretraining(encoder, GridMask())
    encoder.patch_embed(pictures(3))
    x = torch.randn(3, 64, 48)
    out = encoder.masking(x, grid_h=8, grid_w=8)
    assert isinstance(out, MaskingOutput)
    assert torch.equal(out.visible, x.gather(1, out.ids_keep[..., None].expand(-1, -1, 48)))
    assert torch.equal(out.mask.gather(1, out.ids_keep), torch.zeros(3, 26))
    assert torch.equal(out.ids_restore.argsort(1)[:, :26], out.ids_keep)
    encoded = encoder(pictures(3))
    assert encoded.encoded.shape == (3, 3 + 26, 48), "class token and registers stay"
    assert encoded.grid_size == (8, 8)


@pytest.mark.parametrize("make_masking", [partial(PatchMasking, block_size=3, crop_ratio=0.5), MultiBlockMasking])
def test_every_masking_of_the_encoder_is_replaced(make_masking):
    masking = make_masking()
    encoder = MaskedEncoder(make_vit(), masking).train()
    evolution = apply_to_stable_pretraining(encoder, RandomMask())
    masks = {tuple(encoder(pictures(3)).mask[0].tolist()) for _ in range(3)}
    assert len(masks) == 3
    with pytest.raises(ValueError, match=r"6\D+5"):
        encoder.masking(torch.randn(1, 64, 48), 6, 5)
    evolution.remove()
    assert "forward" not in vars(masking)


@pytest.mark.parametrize("name", ["MAE", "SimMIM", "CrossMAE", "iBOT", "MSN"])
def test_eval_mode_is_the_hosts(name):
    module = make(name).eval()
    given = {"images": pictures(3)} if name in ("iBOT", "MSN") else inputs(name)[0]
    expected = module(**given)
    evolution = evolve(module)
    evolution.mask = None  # is not called
    assert equal(dict(module(**given)), dict(expected))
    if name == "MAE":
        whole = module.encoder.train()
        whole.masking.eval()
        assert whole(pictures(3)).ids_keep.shape == (3, 64)


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_those_of_the_images_that_are_masked(monkeypatch, name):
    module = make(name)
    given, masked = inputs(name, photographs(3, 64))
    teacher = make_teacher(student(module))
    evolution = apply_to_stable_pretraining(module, PartMask(), teacher).set_epoch(3)
    masks = record(evolution, monkeypatch)
    module(**given)
    parts = teacher(masked)
    assert masks[0].mask.shape == parts.shape
    for image, labels in zip(masks[0].mask, parts, strict=True):
        assert sum(image[labels == part].unique().numel() == 2 for part in labels.unique()) <= 1


def test_views_that_are_no_batch_are_refused():
    module = make("iBOT")
    evolve(module).set_epoch(3)
    with pytest.raises(RuntimeError, match="0 tensors"):
        module._random_mask(4, 64, "cpu")  # outside of forward
    module(**inputs("iBOT")[0])


def test_copies_go_by_their_own_mode_weights_and_ratio():
    for name in ("MAE", "SimMIM"):
        module = make(name)
        evolve(module).set_epoch(2)
        average = copy.deepcopy(module)
        removed = int(module(pictures(3)).mask[0].sum())
        owner = average.encoder.masking if name == "MAE" else average
        owner.mask_ratio = 0.25
        assert int(average(pictures(3)).mask[0].sum()) == 16
        assert int(module(pictures(3)).mask[0].sum()) == removed != 16
        assert float(average.eval()(pictures(3)).loss) == 0
        assert float(module(pictures(3)).loss.detach()) > 0


def test_wrong_use_names_the_fix():
    with pytest.raises(TypeError, match="I-JEPA and SALT draw a context and targets"):
        apply_to_stable_pretraining(methods.IJEPA(make_vit(), predictor_embed_dim=24), RandomMask())
    pair = nn.ModuleDict({"first": make("SimMIM"), "second": make("MAE")})
    with pytest.raises(TypeError, match=r"2 modules that draw masks: pass one of first \(SimMIM\), second\.encoder"):
        apply_to_stable_pretraining(pair, RandomMask())
    with pytest.raises(TypeError, match="IJEPAMasking returns IJEPAMaskOutput, where PatchMasking"):
        apply_to_stable_pretraining(MaskedEncoder(make_vit(), IJEPAMasking()), RandomMask())
    other = make("SimMIM")
    other._random_mask = lambda images, ratio: None
    with pytest.raises(TypeError, match=r"SimMIM\._random_mask\(images, ratio\) is neither"):
        apply_to_stable_pretraining(other, RandomMask())
    module = make("MAE")
    with pytest.raises(ValueError, match=r"from a whole MAE.*PartTeacher\(module\.encoder"):
        apply_to_stable_pretraining(module, EvolvingMask(4), make_teacher(module))


# Under Lightning, in a Module as stable-pretraining's own examples build it.

make_trainer = partial(lightning_trainer, pl)


def step(self, batch, stage):
    output = self.method(batch["image"])
    self.losses.append(float(output.loss.detach()))
    embedding = output.predictions.mean((1, 2))[:, None].detach()
    probe = self.probe(embedding).square().mean() if hasattr(self, "probe") else 0
    return {**batch, "loss": output.loss + probe}


def make_module(name="MAE"):
    optim = {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "scheduler": "ConstantLR"}
    return spt.Module(method=make(name), forward=step, optim=optim, losses=[])


def loader(count=12):
    return torch.utils.data.DataLoader([{"image": image} for image in pictures(count)], 4)


@pytest.mark.parametrize("name", ["MAE", "SimMIM"])
def test_lightning_moves_the_epoch_and_the_teacher(tmp_path, monkeypatch, name):
    module = make_module(name)
    evolution = evolve(module, 3)
    epochs, updates = watch_calls(monkeypatch, evolution)
    trainer = make_trainer(evolution, tmp_path)
    trainer.fit(module, loader())
    assert epochs == pytest.approx([step / 3 for step in range(9)])
    assert len(updates) == 9
    assert evolution.masking.alpha == trainer.callback_metrics["alpha"] == 1
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_probes_with_optimizers_of_their_own_do_not_move_the_teacher(tmp_path):
    module = make_module()
    module.probe = nn.Linear(1, 1)
    module.optim = {name: {**module.optim, "modules": name} for name in ("method", "probe")}
    evolution = evolve(module, 1)
    trainer = make_trainer(evolution, tmp_path, 1)
    trainer.fit(module, loader())
    assert len(trainer.optimizers) == 2
    assert evolution.teacher.model.n_averaged == 3


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path):
    module = make_module()
    expected = evolve(module, 3)
    every = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(expected, tmp_path, callbacks=[every]).fit(module, loader())

    torch.manual_seed(123)
    resumed = make_module()
    evolution = evolve(resumed, 3)
    make_trainer(evolution, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=False)
    assert module.losses[3:] == resumed.losses
    assert equal(module.state_dict(), resumed.state_dict())
    assert equal(expected.state_dict(), evolution.state_dict())


def test_ranks_draw_different_masks_and_have_one_teacher(tmp_path):
    trainers = Path(__file__).with_name("trainers.py")
    processes.start_script(trainers, "stable_pretraining", tmp_path, folder=tmp_path, ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["masks"]) == len(second["masks"]) == 4
    assert not any(map(torch.equal, first["masks"], second["masks"]))
    assert equal(first["model"], second["model"])
    assert equal(first["evolution"]["teacher"], second["evolution"]["teacher"])
