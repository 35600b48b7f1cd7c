"""Evolving masks in timm's NaFlexVit: images of several sizes in one batch, as patches with coordinates and padding."""

import copy

import pytest
import timm
import torch
from hosts import make_teacher
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrain import equal
from vits import photographs

pytest.importorskip("timm.models.naflexvit", reason="timm had no NaFlexVit before 1.0.16")
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import patchify_image

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.integrations import apply_to_timm

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "patch_drop_rate": 0.75}
MODELS = {
    "registers": {},
    "class token": {"class_token": True, "reg_tokens": 0, "global_pool": "token"},
    "no prefix": {"reg_tokens": 0},
    "RoPE": {"rope_type": "axial"},
    "RoPE, mixed": {"rope_type": "mixed"},
    "attention pool": {"global_pool": "map"},
}
SIZES = [(64, 96), (96, 64), (64, 96), (48, 48), (16, 112)]


def make(name="registers", **options):
    torch.manual_seed(0)
    return timm.create_model("naflexvit_base_patch16_gap", **{**SMALL, **MODELS[name], **options}).train()


def evolve(vit):
    return apply_to_timm(vit, EvolvingMask(10), make_teacher(vit, total_epochs=10)).set_epoch(5)


def images(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def collate(pictures, length=40, patch_size=(16, 16), **options):
    """What timm's loader makes of images."""
    names = ("patches", "patch_coord", "patch_valid")
    each = [(dict(zip(names, patchify_image(picture, patch_size, **options), strict=True)), 0) for picture in pictures]
    return NaFlexCollator(length)(each)[0]


def embed(vit, batch):
    return vit._forward_embeds(batch["patches"], batch["patch_coord"], batch["patch_valid"], None)


def gradients(vit, x):
    torch.manual_seed(1)
    vit.zero_grad()
    output = vit(x)
    output.square().sum().backward()
    return output.detach(), [weight.grad.clone() for weight in vit.parameters() if weight.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("as_patches", [False, True])
def test_the_same_draws_give_the_same_output(monkeypatch, name, ordered, as_patches):
    vit, pictures = make(name), images([(64, 96)] * 3)
    vit.patch_drop.ordered = ordered
    x = collate(pictures, 24) if as_patches else torch.stack(pictures)
    noise = torch.rand(3, 24)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise)
        expected = gradients(vit, x)
    monkeypatch.setattr(RandomMask, "draw", lambda *_, **__: noise)
    apply_to_timm(vit, RandomMask())
    ours = gradients(vit, x)
    assert torch.equal(ours[0], expected[0])
    assert all(map(torch.equal, ours[1], expected[1]))


sides = st.integers(1, 6)
GRID = make()
apply_to_timm(GRID, GridMask())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4), st.integers(0, 9), st.floats(0.01, 0.99))
def test_padding_is_never_counted(sizes, padding, rate):
    length = max(height * width for height, width in sizes) + padding
    batch = collate(images([(16 * height, 16 * width) for height, width in sizes]), length)
    GRID.patch_drop.prob = rate
    out = embed(GRID, batch)
    keep = out["keep_indices"]
    assert keep.shape == (len(sizes), max(1, int(length * (1 - rate)))), "as in timm"
    assert all(len(row.unique()) == len(row) for row in keep)
    assert torch.equal(out["patch_valid"], batch["patch_valid"].gather(1, keep))
    assert out["patch_valid"].sum(1).tolist() == [max(1, int(rows * columns * (1 - rate))) for rows, columns in sizes]


def stays(vit, batch):
    """Which patches of each image stay, [H * W] bool each, row by row."""
    keep = embed(vit, batch)["keep_indices"]
    stay = torch.zeros_like(batch["patch_valid"]).scatter(1, keep, True)
    result = []
    for row, coordinates, valid in zip(stay, batch["patch_coord"], batch["patch_valid"], strict=True):
        y, x = coordinates[valid].unbind(1)
        result.append(row[valid][(y * (x.max() + 1) + x).argsort()])
    return result


@pytest.mark.parametrize("options", [{}, {"channels_last": False}, {"flatten_patches": False}])
def test_each_image_is_masked_by_its_own_parts(monkeypatch, options):
    vit = make(patchify_channels_last=options.get("channels_last", True), enable_patch_interpolator=True)
    pictures = [
        picture[:, :height, :width] for picture, (height, width) in zip(photographs(5, 112), SIZES, strict=True)
    ]
    teacher = make_teacher(vit, total_epochs=10)
    evolution, seen = apply_to_timm(vit, PartMask(), teacher).set_epoch(9), []
    mask = evolution.mask
    monkeypatch.setattr(evolution, "mask", lambda *args: seen.extend(args[-1]) or mask(*args))
    for picture, stay in zip(pictures, stays(vit, collate(pictures, **options)), strict=True):
        assert any(equal(picture, each) for each in seen), "pixel by pixel"
        parts = teacher(picture[None])[0]
        assert sum(stay[parts == part].unique().numel() == 2 for part in parts.unique()) <= 1


def test_grids_are_those_of_each_image():
    vit = make()
    apply_to_timm(vit, GridMask())
    for (height, width), stay in zip(SIZES[:3], stays(vit, collate(images()[:3])), strict=True):
        cells = stay.view(height // 32, 2, width // 32, 2)
        assert (cells == cells[:1, :, :1]).all()


def test_neither_the_order_of_patches_nor_the_place_of_padding_matters():
    vit, batch = make(), collate(images())
    evolve(vit)
    order = torch.rand(5, 40).argsort(1)
    mixed = {
        "patches": batch["patches"].take_along_dim(order[..., None], 1),
        "patch_coord": batch["patch_coord"].take_along_dim(order[..., None], 1),
        "patch_valid": batch["patch_valid"].take_along_dim(order, 1),
    }
    mixed["patches"][~mixed["patch_valid"]] = 7
    masks = []
    for x in (batch, mixed):
        torch.manual_seed(2)
        masks.append(stays(vit, x))
    assert equal(*masks)


def test_patches_of_another_size():
    vit = make(enable_patch_interpolator=True)
    evolve(vit)
    halves = [picture[:, ::2, ::2] for picture in images()]
    assert vit(collate(halves, patch_size=(8, 8), flatten_patches=False)).shape == (5, 5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", [EvolvingMask(10, end=BlockMask()), EvolvingMask(10)])
def test_evolving_masks_in_every_model(name, mask):
    vit = make(name)
    apply_to_timm(vit, mask, make_teacher(vit, total_epochs=10)).set_epoch(5)
    output, grads = gradients(vit, collate(images()))
    assert output.shape == (5, 5)
    assert all(grad.isfinite().all() for grad in grads)
    output, _ = gradients(vit, torch.stack(images([(64, 96)] * 2)))
    assert output.shape == (2, 5)


def test_eval_drops_nothing_and_a_copy_drops_as_many():
    vit, batch = make("RoPE").eval(), collate(images())
    expected = vit(batch)
    evolve(vit)
    assert torch.equal(vit(batch), expected)
    assert embed(copy.deepcopy(vit.train()), batch)["patch_valid"].sum(1).tolist() == [6, 6, 6, 2, 1]


def test_wrong_use():
    vit = make()
    evolve(vit)
    batch = collate(images())
    batch["patch_valid"][1, 3] = False
    with pytest.raises(ValueError, match=r"image 1 has 23 patches.*do not fill a grid of 6 x 4"):
        vit(batch)
    with pytest.raises(ValueError, match=r"made without patch dropout.*patch_drop_rate=0\.75"):
        apply_to_timm(make(patch_drop_rate=0.0), RandomMask())
