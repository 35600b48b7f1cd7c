"""Evolving masks in the models of Hugging Face that take `bool_masked_pos`, against the real package."""

import math

import pytest
import torch
import transformers as hf
from hosts import VIT, make_teacher, pictures, record
from test_vit_mae import Images
from torch import nn

from maskevolve import BlockMask, EvolvingMask, GridMask, RandomMask
from maskevolve.integrations import apply_to_mim, trainer_callback

MERGING = {"image_size": 64, "patch_size": 4, "embed_dim": 12, "depths": [1, 1, 1], "drop_path_rate": 0.0}
SWIN = {**MERGING, "num_heads": [1, 2, 3], "window_size": 4}
FOCAL = {**MERGING, "focal_levels": [2] * 3, "focal_windows": [3] * 3, "hidden_sizes": [12, 24, 48]}
TOKEN, STRIDE = {"use_mask_token": True}, {"encoder_stride": 8}
STEADY = {"drop_path_rate": 0.0, **TOKEN}

MODELS = {
    "ViT": lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**VIT, **STRIDE)),
    "DeiT": lambda: hf.DeiTForMaskedImageModeling(hf.DeiTConfig(**VIT, **STRIDE)),
    "BEiT": lambda: hf.BeitForMaskedImageModeling(hf.BeitConfig(**VIT, **STEADY, vocab_size=16)),
    "Swin": lambda: hf.SwinForMaskedImageModeling(hf.SwinConfig(**SWIN, encoder_stride=16)),
    "Swin v2": lambda: hf.Swinv2ForMaskedImageModeling(hf.Swinv2Config(**SWIN, encoder_stride=16)),
    "FocalNet": lambda: hf.FocalNetForMaskedImageModeling(hf.FocalNetConfig(**FOCAL, encoder_stride=16)),
    "bare ViT": lambda: hf.ViTModel(hf.ViTConfig(**VIT), **TOKEN),
    "bare DeiT": lambda: hf.DeiTModel(hf.DeiTConfig(**VIT), **TOKEN),
    "bare BEiT": lambda: hf.BeitModel(hf.BeitConfig(**VIT, **STEADY)),
    "bare Swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN), **TOKEN),
    "data2vec": lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**VIT, **STEADY)),
    "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT)),
    "DINOv2 with registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT)),
    "MSN": lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VIT), **TOKEN),
    "I-JEPA": lambda: hf.IJepaModel(hf.IJepaConfig(**VIT), **TOKEN),
    "FLAVA": lambda: hf.FlavaImageModel(hf.FlavaImageConfig(**VIT)),
}
BARE = [name for name in MODELS if name.startswith("bare") or name in ("data2vec", "DINOv2")]
PIXELS = ["ViT", "DeiT", "Swin", "Swin v2", "FocalNet"]
MERGERS = ["Swin", "Swin v2", "FocalNet", "bare Swin"]


def make(name="ViT", seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    for module in model.modules():  # far from the patches, so that it shows
        if getattr(module, "mask_token", None) is not None:
            nn.init.normal_(module.mask_token)
    return model


def evolve(model, epochs=4, **options):
    return apply_to_mim(model, EvolvingMask(epochs), make_teacher(model, total_epochs=epochs), **options)


def result(output):
    """What the model computed for the images: a loss where it has one."""
    loss = output.get("loss")
    return next(iter(output.values())) if loss is None else loss


def none_masked(name, batch=2):
    """A collator's mask, that of integers that run_mim.py has; older versions of DINOv2 take booleans only."""
    dtype = torch.bool if name == "DINOv2" else torch.int64
    return torch.zeros(batch, 256 if name in MERGERS else 64, dtype=dtype)


def call(model, images, given=None):
    """The output, and the mask that came to the module that has the mask token."""
    seen = []
    embeddings = next(module for module in model.modules() if "mask_token" in dict(module.named_parameters("", False)))

    def see(module, args, kwargs):
        seen.append(kwargs["bool_masked_pos"] if "bool_masked_pos" in kwargs else args[1])

    handle = embeddings.register_forward_pre_hook(see, with_kwargs=True)
    try:
        output = model(images, given)
    finally:
        handle.remove()
    return output, seen[-1]


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_given_mask_is_replaced_and_ours_by_hand_gives_the_same(name, mode):
    model, images, given = make(name).train(mode == "training"), pictures(), none_masked(name)
    evolution = apply_to_mim(model, RandomMask())
    patched, mask = call(model, images, given)
    assert mask.dtype == torch.bool
    assert mask.shape == given.shape
    units = 16 if name in MERGERS else 64
    assert mask.sum(1).tolist() == [len(mask[0]) // units * math.ceil(0.6 * units)] * 2
    assert not torch.equal(mask[0], mask[1]), "each picture has its own"
    assert torch.equal(evolution.last_mask, mask.float())
    assert given.sum() == 0, "the caller's tensor is left alone"
    assert not torch.equal(call(model, images, given)[1], mask)
    evolution.remove()
    assert torch.equal(result(model(images, bool_masked_pos=mask)), result(patched))
    assert not torch.equal(result(model(images, bool_masked_pos=given.bool())), result(patched))


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask_features_are_those_of_whole_images(name):
    model, images = make(name).eval(), pictures()
    own = model(images)
    evolution = apply_to_mim(model, RandomMask())
    assert torch.equal(result(model(images)), result(own))
    if name in BARE:
        assert call(model.train(), images)[1] is None
    assert evolution.last_mask is None


@pytest.mark.parametrize("name", PIXELS)
def test_true_is_removed_and_the_loss_is_that_of_what_was_removed(name):
    model, images = make(name), pictures()
    evolution = apply_to_mim(model, GridMask(), mask_ratio=0.5)
    with torch.no_grad():
        output = model(images)
    side = math.isqrt(evolution.last_mask.shape[1])
    pixels = nn.functional.interpolate(evolution.last_mask.reshape(2, 1, side, side), (64, 64)).expand(-1, 3, -1, -1)
    assert pixels.mean() == 0.5
    errors = (output.reconstruction - images).abs()
    torch.testing.assert_close(output.loss, errors[pixels == 1].mean())
    # The model sees nothing of the removed patches, and all of the others.
    model.eval()
    evolution.remove()
    for hidden, same in ((pixels == 1, True), (pixels == 0, False)):
        changed = torch.where(hidden, torch.randn_like(images), images)
        seen = [model(each, bool_masked_pos=mask_of(pixels, side)).reconstruction for each in (images, changed)]
        assert torch.equal(*seen) == same


def mask_of(pixels, side):
    """Which patches these pixels are, in the order of rows."""
    return nn.functional.max_pool2d(pixels[:, :1], 64 // side).flatten(1).bool()


@pytest.mark.parametrize("name", [*PIXELS, "BEiT"])
def test_training_needs_no_mask_from_the_collator(name):
    model, images = make(name), pictures()
    apply_to_mim(model, RandomMask(), mask_ratio=0.75)
    labels = {"labels": torch.randint(16, (2, 64))} if name == "BEiT" else {}
    model(images, **labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", MERGERS)
def test_masks_are_squares_of_the_last_stage_where_patches_are_merged(name):
    model = make(name)
    apply_to_mim(model, RandomMask())
    squares = call(model, pictures(), none_masked(name))[1].view(2, 4, 4, 4, 4)  # 4 x 4 squares of 4 x 4 patches
    assert torch.equal(squares.all(4).all(2), squares.any(4).any(2))
    with pytest.raises(ValueError, match=r"merges 4 x 4 patches, but images of shape \[2, 3, 72, 64\] have 18 x 16"):
        model(pictures(2, 72, 64), none_masked(name))


def test_labels_of_beit_are_picked_where_patches_are_removed():
    model, images = make("BEiT").eval(), pictures()
    evolution = apply_to_mim(model, BlockMask(), mask_ratio=0.4)
    labels = torch.randint(16, (2, 8, 8))
    for given in ({"labels": labels}, {"labels": labels.flatten(1), "bool_masked_pos": none_masked("BEiT")}):
        output = model(images, **given)
        mask = evolution.last_mask.bool()
        chosen = [(output.logits[i, j], labels.flatten(1)[i, j]) for i, j in mask.nonzero().tolist()]
        assert len(chosen) == 2 * 26
        logits, targets = map(torch.stack, zip(*chosen, strict=True))
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, targets))
    with pytest.raises(ValueError, match=r"labels has shape \[50\], but the mask.* is replaced.*\[2, 64\]"):
        model(images, none_masked("BEiT"), labels=torch.randint(16, (50,)))


@pytest.mark.parametrize("name", ["bare ViT", "bare BEiT", "data2vec", "DINOv2"])
def test_images_of_several_sizes_and_batches_of_changing_size(name):
    model = make(name)
    evolution = apply_to_mim(model, GridMask(), mask_ratio=0.75)
    for batch, height, width in ((2, 64, 64), (3, 96, 48), (1, 48, 96), (2, 64, 64)):
        patches = height * width // 64
        given = torch.zeros(batch, patches, dtype=torch.bool)
        model(pictures(batch, height, width), bool_masked_pos=given, interpolate_pos_encoding=True)
        mask = evolution.last_mask.view(batch, height // 8, width // 8)
        cell = mask[:, :2, :2]
        assert (cell.sum((1, 2)) == 3).all()
        assert torch.equal(mask, cell.repeat(1, height // 16, width // 16)), "of the grid of the images"


def test_wrong_use_names_the_fix():
    model = make()
    for wrong in (hf.ViTMAEModel(hf.ViTMAEConfig(**VIT)), hf.ViTForImageClassification(hf.ViTConfig(**VIT))):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} is no model of Hugging Face that takes"):
            apply_to_mim(wrong, RandomMask())
    with pytest.raises(TypeError, match="SegGptModel takes bool_masked_pos for half of its picture"):
        apply_to_mim(hf.SegGptModel(hf.SegGptConfig(**VIT, merge_index=0)), RandomMask())
    for bare in (hf.ViTModel(hf.ViTConfig(**VIT)), hf.BeitModel(hf.BeitConfig(**VIT))):
        with pytest.raises(ValueError, match="made without a mask token, and can mask nothing: make it with use_mask"):
            apply_to_mim(bare, RandomMask())
    for ratio, message in ((1.0, r"mask_ratio=1.0 is outside \[0, 1\)"), (0.99, "leaves no visible patch of N=64")):
        with pytest.raises(ValueError, match=message):
            apply_to_mim(model, RandomMask(), mask_ratio=ratio)
    with pytest.raises(ValueError, match="leaves no visible patch of N=16"):
        apply_to_mim(make("Swin"), RandomMask(), mask_ratio=0.95)
    with pytest.raises(ValueError, match="SwinForMaskedImageModeling merges patches and has no attention between all"):
        apply_to_mim(make("Swin"), EvolvingMask(4), make_teacher(model))


# Under the Trainer, as in transformers' examples/pytorch/image-pretraining/run_mim.py.


def collate(examples):
    """What a collator of SimMIM gives: a mask of integers for each picture."""
    images = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": images, "bool_masked_pos": (torch.rand(len(images), 64) < 0.5).long()}


def make_trainer(out, **options):
    model = make()
    evolution = evolve(model, 3)
    given = {"remove_unused_columns": False, "label_names": ["bool_masked_pos"]}
    settings = {"save_strategy": "no", "learning_rate": 1e-3, "per_device_train_batch_size": 4, **given, **options}
    args = hf.TrainingArguments(
        str(out), num_train_epochs=3, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    pieces = {"train_dataset": Images(), "eval_dataset": Images(4), "data_collator": collate}
    return hf.Trainer(model, args, **pieces, callbacks=[trainer_callback(evolution)]), evolution


def test_trainer_with_the_collator_of_run_mim(tmp_path, monkeypatch):
    trainer, evolution = make_trainer(tmp_path, eval_strategy="epoch")
    masks = record(evolution, monkeypatch)
    trainer.train()
    assert len(masks) == 3 * (3 + 1), "those of evaluation are ours, too"
    assert all((masked.mask.sum(1) == 39).all() for masked in masks)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 3
    assert evolution.teacher.model.n_averaged == 9
    assert evolution.masking.alpha == 1
