"""Teachers that read every second patch: what they read is what blocks attend to when the others are dropped."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from test_graph_cut import check_labels
from torch import nn
from vits import MAE, VARIANTS, make_vit, photographs

from maskevolve import EMPartitioner, FrozenTeacher, GraphCutPartitioner, PartTeacher
from maskevolve.teachers import attention_affinity, token_affinity

EVERY = pytest.mark.parametrize("kind", [PartTeacher, FrozenTeacher])
ROTARY = ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"]


def make_teacher(model, kind=PartTeacher, partitioner=None, **options):
    return kind(model, partitioner or GraphCutPartitioner(), total_epochs=10, **options)


class Keep(nn.Module):
    """In the place of timm's patch dropout: given patches stay."""

    def __init__(self, ids, prefix, with_indices):
        super().__init__()
        self.ids, self.prefix, self.with_indices = ids, prefix, with_indices

    def forward(self, x):
        kept = torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, self.ids]], 1)
        return (kept, self.ids.expand(len(x), -1)) if self.with_indices else kept


def make(name):
    if name in VARIANTS:
        return make_vit(name, fused=False)
    vit = timm.create_model(name, depth=3, num_classes=0, img_size=224).eval()
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return vit


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("name", [*(name for name in VARIANTS if name != "parallel"), *ROTARY])
@torch.no_grad()
def test_attention_is_that_of_a_model_of_timm_that_drops_the_other_patches(name, stride):
    vit, images = make(name), photographs(2, 224)
    found = attention_affinity(vit, images, [1, 2], stride)
    size, prefix, maps = images.shape[-1] // vit.patch_embed.patch_size[0], vit.num_prefix_tokens, []
    first = (size - 1) % stride // 2
    ids = torch.arange(size * size).view(size, size)[first::stride, first::stride].flatten()
    vit.patch_drop = Keep(ids, prefix, with_indices=name in ROTARY)
    for block in vit.blocks[1:]:
        block.attn.attn_drop.register_forward_hook(lambda _, args, output: maps.append(args[0]))
    vit.forward_features(images)
    torch.testing.assert_close(found, torch.stack(maps).mean((0, 2))[:, prefix:, prefix:])


HOSTS = {
    "MAE": lambda: MAE(depth=3, image_size=64),
    "timm": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=3, dynamic_img_size=True
    ),
    "EVA": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, patch_size=7, depth=3),
    "NaFlexVit": lambda: timm.create_model(
        "naflexvit_base_patch16_gap", embed_dim=48, num_heads=3, depth=3, patch_size=8
    ),
    "torchvision": lambda: torchvision.models.VisionTransformer(64, 8, 3, 3, 48, 96),
    **{
        name: lambda name=name: getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=3,
                intermediate_size=96,
                image_size=64,
                patch_size=8,
            )
        )
        for name in ("ViT", "ViTMAE", "Dinov2WithRegisters", "DINOv3ViT", "SiglipVision")
    },
}


@EVERY
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_are_read_so_by_default_and_no_layer_too_many_runs(host, kind):
    torch.manual_seed(0)
    model = HOSTS[host]()
    images = photographs(2, 56 if host == "EVA" else 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = make_teacher(model, kind)
    assert teacher.stride == 2
    inner = teacher.model.module if kind is PartTeacher else teacher.model
    assert attention_affinity(inner, images, "middle", 2).shape == (2, 16, 16)
    calls = []
    for name, module in inner.named_modules():
        if isinstance(module, nn.LayerNorm) and "." in name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    check_labels(teacher(images), 40)
    assert not any(f".{place}." in f".{name}" for name in calls for place in ("2", "encoder_layer_2")), "the last block"
    assert teacher(images[:0]).shape == teacher.hierarchy(images[:0]).cut(3).shape == (0, 64)


def test_as_many_tokens_are_left_as_there_are_patches():
    """Four of 3 x 3 patches, and five tokens before them."""
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=24, patch_size=8
    )
    dinov3 = transformers.DINOv3ViTModel(config)
    eva = timm.create_model("vit_small_patch16_dinov3", depth=3, img_size=48, dynamic_img_size=True, num_classes=0)
    for model, size in ((dinov3, 24), (eva, 48)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert make_teacher(model)(photographs(2, size)).shape == (2, 9)


@pytest.mark.parametrize("size", [(56, 104), (8, 128), (128, 8), (24, 24), (16, 64), (16, 16), (8, 8)])
def test_grids_of_every_size(size):
    teacher = make_teacher(HOSTS["timm"](), num_parts=(6, 6))
    parts = teacher(torch.randn(2, 3, *size))
    assert parts.shape == (2, size[0] * size[1] // 64)
    check_labels(parts, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_the_dtype_of_the_model(dtype):
    vit, images = make_vit(depth=3).to(dtype), photographs(2, 224)
    teacher = make_teacher(vit, num_parts=(8, 8))
    assert torch.equal(
        teacher(images.to(dtype)), make_teacher(vit, num_parts=(8, 8), layers=[1], stride=2)(images.to(dtype))
    )


def test_a_partitioner_that_knows_no_stride_gets_all_patches():
    class Any(EMPartitioner):
        def forward(self, affinity, num_parts=None, grid_size=None):
            self.shape = affinity.shape
            return super().forward(affinity, num_parts, grid_size)

    teacher, images = make_teacher(make_vit(), partitioner=Any()), photographs(2, 224)
    assert teacher(images).shape == (2, 196)
    assert teacher.partitioner.shape == (2, 196, 196)


@EVERY
def test_blocks_that_know_where_all_patches_lie(kind):
    beit = timm.create_model("beit_base_patch16_224", depth=3, embed_dim=48, num_heads=3, num_classes=0)
    images = photographs(2, 224)
    with pytest.warns(UserWarning, match="stride=1") as caught:
        teacher = make_teacher(beit, kind)
    assert len(caught) == 1
    assert torch.equal(teacher(images), make_teacher(beit, kind, stride=1)(images))
    with pytest.raises(ValueError, match=r"the blocks of Beit.*pass stride=1"):
        make_teacher(beit, kind, stride=2)
    with pytest.raises(ValueError, match=r"the blocks of Beit.*pass stride=1"):
        attention_affinity(beit.eval(), images, "middle", 2)


class Linear(nn.Module):
    """Attention without a softmax."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.to_query = 2, nn.Linear(48, 48)

    def forward(self, x, **_):
        return self.to_query(x) @ (x.mT @ x)


def test_what_cannot_be_read_in_its_middle_is_refused_with_what_works():
    model = MAE(depth=3)
    for block in model.blocks:
        block.attn = Linear()
    with pytest.raises(RuntimeError, match='layers="tokens"'):
        make_teacher(model)
    assert make_teacher(model, layers="tokens")(torch.randn(2, 3, 64, 64)).shape == (2, 64)


@pytest.mark.parametrize("stride", [0, -1, 1.5, "2", True])
def test_a_stride_is_a_whole_number(stride):
    with pytest.raises(ValueError, match=f"stride={stride!r}"):
        make_teacher(make_vit(), stride=stride)
    with pytest.raises(ValueError, match=f"stride={stride!r}"):
        attention_affinity(make_vit(), torch.randn(1, 3, 224, 224), None, stride)


@pytest.mark.parametrize(
    "read", [lambda *args: attention_affinity(*args[:2], None, 8), lambda *args: token_affinity(*args, 8)]
)
def test_too_few_patches_are_left(read):
    with pytest.raises(ValueError, match="stride=8 leaves 1 x 1 of 8 x 8"):
        read(HOSTS["timm"](), torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="stride=8 leaves 1 x 1 of 8 x 8"):
        make_teacher(HOSTS["timm"](), stride=8)(torch.randn(1, 3, 64, 64))


def test_a_state_from_before_is_read():
    vit, images = make_vit(), photographs(2, 224)
    before, after = make_teacher(vit, layers="tokens"), make_teacher(copy.deepcopy(vit))
    for parameter in vit.parameters():
        nn.init.normal_(parameter)
    before.update(vit)
    after.load_state_dict(before.set_epoch(5).state_dict())
    assert float(after.epoch) == 5
    assert torch.equal(after(images), make_teacher(vit).set_epoch(5)(images))
