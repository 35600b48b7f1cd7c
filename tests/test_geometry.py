"""The patch grid against the tensor that a patch embedding makes, and refusals before training."""

import pytest
import timm
import torch
import transformers
from einops import rearrange
from torch import nn
from vits import MAE, make_teacher

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.integrations import apply_to_mae
from maskevolve.teachers.encoder import entry_of
from maskevolve.teachers.patch_grid import patch_grid, whole_patches
from maskevolve.teachers.trial import check_patches


class Vit(nn.Module):
    """A ViT of one's own: an embedding, two blocks and nothing that tells about patches."""

    def __init__(self, embed, order="b c ... h w -> b (... h w) c", **sizes):
        super().__init__()
        self.patch_embed, self.order, self.sizes = embed, order, sizes
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)])

    def forward(self, images):
        x = rearrange(self.patch_embed(images), self.order, **self.sizes)
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return x


both = pytest.mark.parametrize("layers", ["tokens", None], ids=["tokens", "attention"])


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
        assert make_teacher(model, layers=layers)(images).shape == (2, grid[0] * grid[1])


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


@both
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_hybrid_stems_of_timm(name, layers):
    vit = timm.create_model(name, depth=1, num_classes=0, dynamic_img_size=True).eval()
    images, side = torch.randn(1, 3, 224, 224), round(vit.patch_embed.num_patches**0.5)
    assert patch_grid(vit, images) == (side, side)
    assert whole_patches(vit, images).shape == images.shape
    teacher = make_teacher(vit, layers=layers)
    assert teacher(images).shape == (1, side * side)
    assert teacher(torch.randn(1, 3, 256, 224)).shape == (1, side * side * 256 // 224)


class Stem(nn.Sequential):
    """Convolutions as a patch embedding, which only `patch_size` tells about."""

    patch_size = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))


@both
def test_a_stem_is_believed_where_it_is_right_and_refused_where_it_is_not(layers):
    torch.manual_seed(0)  # with one in thirty weights, what is wrong does not show
    right, wrong = Vit(Stem()), Vit(Stem())
    assert make_teacher(right, layers=layers)(torch.randn(1, 3, 24, 16)).shape == (1, 24)
    with pytest.raises(ValueError, match=r"16 tokens.*3 x 4 patches"):  # wrong at this size
        make_teacher(right, layers=layers)(torch.randn(2, 3, 13, 16))
    wrong.patch_embed.patch_size = 8
    for refuse in (lambda model: make_teacher(model, layers=layers), check_patches):
        with pytest.raises(ValueError, match="by its Stem"):
            refuse(wrong)


class TwoEmbeddings(nn.Module):
    """Depth is embedded elsewhere, by patches of another size."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, {"depth": nn.Conv2d(1, 16, 8, 8), "image": nn.Conv2d(3, 16, 4, 4)}[name])
            getattr(self, name).patch_size = getattr(self, name).kernel_size
        self.vit = Vit(nn.Identity())

    def forward(self, images):
        return self.vit(self.image(images))


def test_of_several_embeddings_none_is_taken_for_the_one_that_sees_images():
    assert make_teacher(TwoEmbeddings("image", "depth"))(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    with pytest.raises(ValueError, match="TwoEmbeddings"):
        make_teacher(TwoEmbeddings("depth", "image"))


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
    model, images = Signals(embed), torch.randn(shape)
    grid = tuple(embed(images).shape[2:])
    assert patch_grid(model, images) == grid
    cells = tuple(side * one for side, one in zip(embed.kernel_size, grid, strict=True))
    assert torch.equal(whole_patches(model, images), images[(..., *map(slice, cells))])
    for masking in (RandomMask(), GridMask(), BlockMask(), EvolvingMask(10, end=BlockMask()).set_epoch(5)):
        evolution = apply_to_mae(model.eval(), masking)
        visible, mask, _ = model(images)
        assert visible.shape == (2, int(count * 0.25), 16)
        assert torch.equal(mask, evolution.last_mask)
        assert mask.shape == (2, count)
        evolution.remove()


def test_patches_of_four_axes_have_no_grid():
    model = Signals(nn.Identity())
    model.patch_embed.patch_size = (2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"patches of 4 axes \(Identity, \(2, 2, 2, 2\)\).*RandomMask\(\)"):
        apply_to_mae(model, GridMask())


def test_masks_say_whether_they_need_a_grid():
    without = (RandomMask(), PartMask(), EvolvingMask(10, start=RandomMask()))
    assert not any(mask.needs_grid for mask in without)
    needing = (GridMask(), EvolvingMask(10), EvolvingMask(10, start=RandomMask(), end=BlockMask()))
    assert all(mask.needs_grid for mask in needing)


def test_a_grid_that_was_asked_for_is_checked_without_need():
    model = MAE()
    apply_to_mae(model, RandomMask(grid_size=(4, 4)))
    with pytest.raises(ValueError, match=r"4 x 4.*64"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("channels", [(3, 1), (3,)], ids=["one frame", "an image"])
@pytest.mark.parametrize("kernel", [(1, 8, 8), (1, 4, 8)])
def test_one_frame_of_a_video_is_an_image(kernel, channels):
    class Video(Vit):
        def forward(self, images):
            assert images.shape[1:-2] == channels
            return super().forward(images if images.ndim == 5 else images[:, :, None])

    model, images = Video(nn.Conv3d(3, 16, kernel, kernel)), torch.randn(2, *channels, 32, 44)
    model.patch_embed.patch_size = kernel
    teacher, rows = make_teacher(model), 32 // kernel[1]
    check_patches(model)
    assert patch_grid(model, images) == (rows, 5)
    assert whole_patches(model, images).shape == (2, 3, 32, 40)
    assert teacher(images).shape == (2, rows * 5)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 32, 44\]"):
        teacher(torch.randn(2, 3, 4, 32, 44))


def test_one_frame_of_a_video_that_several_convolutions_embed_is_an_image():
    embed = nn.Sequential(nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2)), nn.Conv3d(8, 16, (1, 4, 4), (1, 4, 4)))
    embed.patch_size = (8, 8)
    teacher = make_teacher(Vit(embed))
    assert teacher(torch.randn(2, 3, 1, 32, 40)).shape == (2, 20)


def test_masking_of_other_tokens_is_refused_when_the_evolution_is_made():
    class Merges(MAE):
        def random_masking(self, x, mask_ratio):
            return super().random_masking(x, mask_ratio)

        def forward_encoder(self, x, mask_ratio):
            return self.random_masking(self.patch_embed(x)[:, ::2], mask_ratio)

    with pytest.raises(ValueError, match=r"Merges .* masks 32"):
        apply_to_mae(Merges(), GridMask())


def test_a_model_of_more_than_images_is_refused_by_name():
    class Captions(Vit):
        def forward(self, images, text):
            return super().forward(images)

    model = Captions(nn.Conv2d(3, 16, 8, 8))
    with pytest.raises(ValueError, match=r"Captions could.*'text'.*pass the encoder"):
        make_teacher(model)
    check_patches(model)  # whose embedding can be tried


class Positions(Vit):
    """Takes images of one size, which its position table alone tells."""

    def __init__(self, channels=3, error=None):
        super().__init__(nn.Conv2d(channels, 16, 8, 8))
        self.positions, self.error = nn.Parameter(torch.randn(1, 25, 16)), error

    def forward(self, images):
        self.patch_embed(images).flatten(2).mT + self.positions
        if self.error is not None:
            raise self.error
        return super().forward(images)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_dtype_and_of_any_size(dtype, layers):
    teacher = make_teacher(Positions(4).to(dtype), layers=layers)
    assert teacher(torch.randn(2, 4, 40, 40, dtype=dtype)).shape == (2, 25)


def test_the_error_is_that_of_the_models_own_size():
    with pytest.raises(ValueError, match=r"Tried: \[3, 3, 40, 40\], .* at \[3, 3, 40, 40\]: KeyError"):
        make_teacher(Positions(error=KeyError("a key of mine")))


def test_making_a_teacher_or_an_evolution_draws_no_random_numbers():
    model, before = MAE().train(), torch.get_rng_state()
    make_teacher(model, layers=None)
    apply_to_mae(model, GridMask())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


ORDERS = {
    "by columns": "b c (a h) (d w) -> b (d w a h) c",
    "by windows": "b c (a h) (d w) -> b (a d h w) c",
    "as Hiera's": "b c (a h) (d w) -> b (h w a d) c",
}


@both
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_tokens_in_another_order_are_refused(order, layers):
    with pytest.raises(ValueError, match="reorders tokens"):
        make_teacher(Vit(nn.Conv2d(3, 16, 8, 8), order, h=2, w=2), layers=layers)


def test_hiera_is_refused():
    config = transformers.HieraConfig(embed_dim=24, num_hidden_layers=4, depths=[1, 1, 1, 1])
    for model in (timm.create_model("hiera_tiny_224", num_classes=0), transformers.HieraModel(config)):
        with pytest.raises(ValueError, match="reorders tokens"):
            make_teacher(model)


def test_a_list_of_patch_embeddings_is_refused():
    model = MAE()  # as SatMAE has it: an embedding for each group of channels
    model.patch_embed = nn.ModuleList([MAE().patch_embed for _ in range(2)])
    for refuse in (make_teacher, check_patches):
        with pytest.raises(ValueError, match=r"ModuleList of 2 embeddings.*function from images to labels"):
            refuse(model)


@pytest.mark.parametrize("why", ["meta device", "ZeRO-3"])
def test_a_model_whose_weights_are_elsewhere(why):
    model = MAE()
    if why == "ZeRO-3":  # as deepspeed leaves them
        for parameter in model.parameters():
            parameter.ds_id, parameter.ds_shape, parameter.data = 1, parameter.shape, torch.empty(0)
    else:
        model.to("meta")
    with pytest.raises(ValueError, match=why):
        make_teacher(model)
    check_patches(model)  # a mask needs no weights


@pytest.mark.parametrize("second", ["other", "mask_ratio"])
def test_an_encoder_of_two_images_is_not_called_with_a_ratio(second):
    model = MAE()
    call = {"other": lambda x, other: x, "mask_ratio": lambda x, mask_ratio: x}[second]
    model.forward_encoder = call
    assert entry_of(model) == (model, "forward" if second == "other" else "forward_encoder")
