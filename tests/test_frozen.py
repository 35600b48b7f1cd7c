"""A pretrained ViT of any kind cuts the parts of a model that trains."""

import contextlib

import pytest
import timm
import torch
from test_graph_cut import check_every_cut
from test_teacher import COPIES
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from vits import MAE, make_vit, photographs

from maskevolve import EMPartitioner, FrozenTeacher, GraphCutPartitioner, PartMask, PartTeacher
from maskevolve.parts.segmentation import parts_from_segmentation
from maskevolve.teachers import attention_affinity, token_affinity


def resized(size):
    """The images of the student, in another size and with other values."""
    return nn.Sequential(nn.Upsample((size, size), mode="bilinear"), nn.BatchNorm2d(3, affine=False).eval())


def frozen(model, partitioner=None, **options):
    options = {"total_epochs": 10, "num_parts": (12, 4), **options}
    return FrozenTeacher(model, partitioner or GraphCutPartitioner(), **options)


def timms(name, **options):
    return timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=0, **options)


SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 112, "patch_size": 14}
MODELS = {
    "DINOv2": (lambda: timms("vit_small_patch14_reg4_dinov2", img_size=112), 112, 8),
    "DINOv3": (lambda: timms("vit_small_patch16_dinov3", img_size=96), 96, 6),
    "MAE": (lambda: timms("vit_base_patch16_224.mae", img_size=64), 64, 4),
    "Hugging Face's Dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES)), 112, 8),
}
if not timm.is_model("vit_small_patch16_dinov3"):
    MODELS.pop("DINOv3")  # which older versions of timm do not have


@pytest.mark.parametrize("layers", ["tokens", None, [-1]], ids=["tokens", "attention", "last"])
@pytest.mark.parametrize(("make", "size", "own"), MODELS.values(), ids=MODELS)
def test_pretrained_models(make, size, own, layers):
    torch.manual_seed(0)
    teacher, images = frozen(make(), layers=layers, transform=resized(size)), photographs(2, 64)
    parts = teacher(images)
    assert parts.shape == (2, own**2)
    assert 1 < parts.max() + 1 <= 12
    student = teacher(images, grid_size=(8, 8))
    assert torch.equal(student, parts_from_segmentation(parts.unflatten(1, (own, own)), 8))
    kept = PartMask()(torch.randn(2, 64, 4), 0.5, parts=student).mask
    for mask, labels in zip(kept, student, strict=True):
        assert sum(len(mask[labels == label].unique()) > 1 for label in labels.unique()) <= 1, "torn"


def test_reads_what_the_model_sees():
    vit, images, transform = make_vit(), photographs(2, 64), resized(224)
    seen = transform(images)
    for layers, affinity in (("tokens", token_affinity(vit, seen)), ([-1], attention_affinity(vit, seen, [-1]))):
        expected = GraphCutPartitioner()(affinity, 12, grid_size=(14, 14), images=seen)
        assert torch.equal(frozen(vit, layers=layers, transform=transform)(images), expected)
    published = frozen(vit, EMPartitioner(), layers=None, transform=transform)
    torch.manual_seed(1)
    expected = EMPartitioner()(attention_affinity(vit, seen), 12, (14, 14))
    torch.manual_seed(1)
    assert torch.equal(published(images), expected)


def test_never_changes_and_stays_out_of_everything():
    vit = make_vit(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5).train()
    teacher, images = frozen(vit, layers=None), photographs(2, 224)
    before = teacher(images)
    assert vit.training, "the model that was given is as it was"
    assert all(parameter.requires_grad for parameter in vit.parameters())
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_()
    holder = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)}).train()
    assert torch.equal(teacher(images), before)
    assert not teacher.training
    assert not any(module.training for module in teacher.model.modules())
    assert set(teacher.state_dict()) == {"epoch"}
    assert set(dict(holder.named_parameters())) == {"student.weight", "student.bias"}
    assert not hasattr(teacher, "update")
    holder.bfloat16()
    assert torch.equal(teacher(images), before), "and keeps its precision"


def test_takes_images_of_any_float_type_and_asks_for_no_gradients():
    teacher, images = frozen(make_vit()), photographs(2, 224)
    expected = teacher(images)
    assert torch.equal(teacher(images.double().requires_grad_()), expected)
    assert teacher(images.bfloat16()).shape == expected.shape
    half = frozen(make_vit().bfloat16())
    assert half(images).shape == expected.shape
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


def test_moves_with_the_images():
    teacher = frozen(make_vit(), transform=resized(224))
    with contextlib.suppress(ValueError):  # nothing can be read there: but it went
        teacher(torch.empty(2, 3, 64, 64, device="meta"))
    assert all(tensor.is_meta for module in (teacher.model, teacher.transform) for tensor in module.buffers())
    assert all(parameter.is_meta for parameter in teacher.model.parameters())


@pytest.mark.parametrize("kind", [FrozenTeacher, PartTeacher])
def test_hierarchy(kind):
    teacher, images = kind(make_vit(), GraphCutPartitioner(), total_epochs=9), photographs(2, 224)
    hierarchy = teacher.hierarchy(images)
    assert torch.equal(hierarchy.cut(teacher.num_parts), teacher(images))
    check_every_cut(hierarchy, 10)
    with pytest.raises(TypeError, match="EMPartitioner has no hierarchy"):
        kind(make_vit(), EMPartitioner(), total_epochs=9).hierarchy(images)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_cut_alike(copied):
    teacher, images = frozen(make_vit(), transform=resized(224)).set_epoch(5), photographs(2, 64)
    other = copied(teacher)
    assert other.model is not teacher.model
    assert torch.equal(other(images, grid_size=8), teacher(images, grid_size=8))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_opened(wrap):
    vit, images = make_vit(), photographs(2, 224)
    assert torch.equal(frozen(wrap(vit))(images), frozen(vit)(images))


def test_a_transform_that_makes_pictures_of_clips():
    teacher, clips = frozen(MAE(), transform=lambda clips: clips[:, :, 0]), torch.randn(2, 3, 4, 64, 64)
    assert torch.equal(teacher(clips), frozen(MAE())(clips[:, :, 0]))


@pytest.mark.parametrize("transform", [lambda images: images[:1], list, lambda images: images[0]])
def test_a_transform_that_returns_something_else(transform):
    with pytest.raises(ValueError, match=r"transform returned .* \[2, 3, 224, 224\]"):
        frozen(make_vit(), transform=transform)(photographs(2, 224))


def test_images_that_the_frozen_model_cannot_take():
    teacher = frozen(timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1))
    with pytest.raises(ValueError, match=r"\[2, 3, 64, 64\].*transform=") as raised:
        teacher(torch.randn(2, 3, 64, 64))
    assert ".." not in str(raised.value).replace("transform=...", "")
