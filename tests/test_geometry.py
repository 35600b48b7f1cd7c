"""The patch grid against the tensor that a patch embedding makes, and refusals before training."""

import pytest
import timm
import torch
from torch import nn
from vits import MAE

from maskevolve import BlockMask, EvolvingMask, GraphCutPartitioner, GridMask, PartMask, PartTeacher, RandomMask
from maskevolve.integrations import apply_to_mae
from maskevolve.teachers.encoder import check_patches
from maskevolve.teachers.patch_grid import patch_grid, whole_patches


class Vit(nn.Module):
    """A ViT of one's own: an embedding, a block and nothing that tells about patches."""

    def __init__(self, embed, width=16):
        super().__init__()
        self.patch_embed = embed
        self.blocks = nn.ModuleList([nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2)])

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).mT
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return x


def make_teacher(model, layers="tokens"):
    return PartTeacher(model, GraphCutPartitioner(), total_epochs=10, layers=layers)


LAYOUTS = {
    "overlapping": {"kernel_size": 16, "stride": 10},
    "overlapping, padded": {"kernel_size": 7, "stride": 4, "padding": 3},
    "apart": {"kernel_size": 4, "stride": 6},
    "dilated": {"kernel_size": 4, "stride": 8, "dilation": 2},
    "oblong": {"kernel_size": (16, 8), "stride": (16, 8)},
    "valid": {"kernel_size": 8, "stride": 8, "padding": "valid"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [(64, 64), (61, 90)])
@pytest.mark.parametrize("channels", [3, 5])
def test_the_grid_is_that_of_the_convolution(layout, size, channels):
    model = Vit(nn.Conv2d(channels, 16, **layout))
    images = torch.randn(2, channels, *size)
    grid = tuple(model.patch_embed(images).shape[2:])
    assert patch_grid(model, images) == grid
    check_patches(model)
    for layers in ("tokens", None):
        assert make_teacher(model, layers)(images).shape == (2, grid[0] * grid[1])


@pytest.mark.parametrize("layout", [LAYOUTS["overlapping"], LAYOUTS["overlapping, padded"]])
def test_the_cell_of_a_patch_is_its_centre(layout):
    """The mean position of the pixels in a cell is that of the pixels that the patch is made of."""
    model, (kernel, stride) = Vit(nn.Conv2d(1, 16, **layout)), (layout["kernel_size"], layout["stride"])
    positions = torch.arange(62.0).expand(1, 1, 62, 62)
    grid, cells = patch_grid(model, positions), whole_patches(model, positions)
    assert cells.shape[2:] == (grid[0] * stride, grid[1] * stride)
    means = nn.functional.avg_pool2d(cells, stride)[0, 0, 0]
    starts = torch.arange(grid[1]) * stride - layout.get("padding", 0)
    inner = (starts >= 0) & (starts + kernel <= 62)
    torch.testing.assert_close(means[inner], (starts + (kernel - 1) / 2)[inner], atol=0.51, rtol=0)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_hybrid_stems_of_timm(name):
    vit = timm.create_model(name, depth=1, num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    side = round(vit.patch_embed.num_patches**0.5)
    assert patch_grid(vit, images) == (side, side)
    assert whole_patches(vit, images).shape == images.shape
    for layers in ("tokens", None):
        assert make_teacher(vit, layers)(images).shape == (1, side * side)


def test_a_hybrid_stem_at_another_size():
    vit = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, num_classes=0, dynamic_img_size=True).eval()
    teacher = make_teacher(vit)
    assert teacher(torch.randn(1, 3, 256, 224)).shape == (1, 56)


class Stem(nn.Sequential):
    """Convolutions as a patch embedding, which only `patch_size` tells about."""

    patch_size = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))


@pytest.mark.parametrize("layers", ["tokens", None])
def test_a_stem_is_believed_where_it_is_right_and_refused_where_it_is_not(layers):
    assert make_teacher(Vit(Stem()), layers)(torch.randn(1, 3, 24, 16)).shape == (1, 24)
    wrong = Vit(Stem())
    wrong.patch_embed.patch_size = 8
    with pytest.raises(ValueError, match=r"4 x 4 patches, by its Stem.*\[1, 16, \d+, \d+\].*distance of its patches"):
        make_teacher(wrong, layers)
    with pytest.raises(ValueError, match="by its Stem"):
        check_patches(wrong)


def test_a_wrong_grid_at_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"3 x 4 patches.*\[2, 16, 4, 4\]"):
        make_teacher(Vit(Stem()))(torch.randn(2, 3, 13, 16))


class TwoEmbeddings(Vit):
    """Depth is embedded elsewhere, by patches of another size."""

    def __init__(self, first):
        super().__init__(nn.Identity())
        del self.patch_embed
        embeds = {"depth_embed": nn.Conv2d(1, 16, 8, 8), "image_embed": nn.Conv2d(3, 16, 4, 4)}
        for name in sorted(embeds, reverse=first == "image_embed"):
            embeds[name].patch_size = embeds[name].kernel_size
            self.add_module(name, embeds[name])

    def forward(self, images):
        self._modules["patch_embed"] = self.image_embed
        try:
            return super().forward(images)
        finally:
            del self._modules["patch_embed"]


def test_of_several_embeddings_none_is_taken_for_the_one_that_sees_images():
    assert make_teacher(TwoEmbeddings("image_embed"))(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    with pytest.raises(ValueError, match="TwoEmbeddings"):
        make_teacher(TwoEmbeddings("depth_embed"))


class Signals(nn.Module):
    """An MAE of signals or volumes."""

    def __init__(self, embed):
        super().__init__()
        self.patch_embed = embed
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])

    def random_masking(self, x, mask_ratio):
        return MAE.random_masking(self, x, mask_ratio)

    def forward(self, images, mask_ratio=0.75):
        return self.random_masking(self.patch_embed(images).flatten(2).mT, mask_ratio)


SIGNALS = {"1-d": (nn.Conv1d(2, 16, 5, 5), (2, 2, 55), 11), "3-d": (nn.Conv3d(3, 16, 4, 4), (2, 3, 8, 8, 12), 12)}


@pytest.mark.parametrize(("embed", "shape", "count"), SIGNALS.values(), ids=SIGNALS)
def test_patches_of_other_dimensions(embed, shape, count):
    model = Signals(embed)
    for refused in (GridMask(), BlockMask(), EvolvingMask(10, start=RandomMask(), end=GridMask())):
        with pytest.raises(ValueError, match=r"Signals has patches of [13] dimensions.*RandomMask\(\)"):
            apply_to_mae(model, refused)
    with pytest.raises(ValueError, match=r"Signals has patches of [13] dimensions"):
        make_teacher(model)
    evolution = apply_to_mae(model, RandomMask())
    visible, mask, _ = model(torch.randn(shape))
    assert visible.shape == (2, int(count * 0.25), 16)
    assert torch.equal(mask, evolution.last_mask)
    assert mask.shape == (2, count)
    evolution.remove()


def test_masks_say_whether_they_need_a_grid():
    assert not RandomMask().needs_grid
    assert not PartMask().needs_grid
    assert not EvolvingMask(10, start=RandomMask()).needs_grid
    assert GridMask().needs_grid
    assert EvolvingMask(10).needs_grid
    assert EvolvingMask(10, start=RandomMask(), end=BlockMask()).needs_grid


def test_a_grid_that_was_asked_for_is_checked_without_need():
    model = MAE()
    apply_to_mae(model, RandomMask(grid_size=(4, 4)))
    with pytest.raises(ValueError, match=r"4 x 4.*64"):
        model(torch.randn(1, 3, 64, 64))


def test_masking_of_other_tokens_is_refused_when_the_evolution_is_made():
    class Merges(MAE):
        def random_masking(self, x, mask_ratio):
            return super().random_masking(x, mask_ratio)

        def forward_encoder(self, x, mask_ratio):
            return self.random_masking(self.patch_embed(x)[:, ::2], mask_ratio)

    with pytest.raises(ValueError, match=r"Merges masks 32 tokens.*8 x 8"):
        apply_to_mae(Merges(), GridMask())


def test_a_model_of_more_than_images_is_refused_by_name():
    class Captions(Vit):
        def forward(self, images, text):
            return super().forward(images)

    model = Captions(nn.Conv2d(3, 16, 8, 8))
    with pytest.raises(ValueError, match=r"Captions could not be tried.*\[1, 3, 32, 32\].*'text'.*pass the encoder"):
        make_teacher(model)
    check_patches(model)  # whose embedding can be tried


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_dtype_and_of_any_size(dtype):
    class Positions(Vit):
        def __init__(self):
            super().__init__(nn.Conv2d(4, 16, 8, 8))
            self.positions = nn.Parameter(torch.randn(1, 25, 16))

        def forward(self, images):
            assert images.shape[1:] == (4, 40, 40)
            return super().forward(images)

    for layers in ("tokens", None):
        teacher = make_teacher(Positions().to(dtype), layers)
        assert teacher(torch.randn(2, 4, 40, 40, dtype=dtype)).shape == (2, 25)


def test_making_a_teacher_or_an_evolution_draws_no_random_numbers():
    model, before = MAE().train(), torch.get_rng_state()
    make_teacher(model, None)
    apply_to_mae(model, GridMask())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
