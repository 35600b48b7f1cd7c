"""Attention that is read while the model runs for other reasons: what it reads, and what it leaves alone."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import ViTConfig, ViTModel
from vits import MAE, make_vit

from maskevolve import GraphCutPartitioner
from maskevolve.teachers import attention_affinity, reading

SIZE = 64


def small_vit(fused=True, **options):
    return make_vit(depth=2, fused=fused, img_size=SIZE, **options)


def hugging_face(implementation):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return ViTModel(ViTConfig(image_size=SIZE, **shape, attn_implementation=implementation))


MODELS = {
    "timm, fused": small_vit,
    "timm, unfused": lambda: small_vit(fused=False),
    "Hugging Face, sdpa": lambda: hugging_face("sdpa"),
    "Hugging Face, eager": lambda: hugging_face("eager"),
    "torchvision": lambda: torchvision.models.VisionTransformer(SIZE, 16, 2, 3, 48, 96, 0.1, 0.1),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def output(model, images):
    out = model(images)
    return out if torch.is_tensor(out) else out.last_hidden_state


@every_model
@pytest.mark.parametrize("layers", [None, [0], [-1]])
def test_reads_what_a_pass_of_its_own_would(make, layers):
    model, images = make().eval(), torch.randn(3, 3, SIZE, SIZE)
    with reading(model, layers) as affinity:
        output(model, images)
        inside = affinity(images)
    assert inside.dtype == torch.float32
    assert not inside.requires_grad
    torch.testing.assert_close(inside, attention_affinity(model, images, layers))
    assert torch.equal(inside, affinity(images)), "and still so after it"


@every_model
def test_the_pass_is_the_callers_own(make):
    model, images = make().train(), torch.randn(2, 3, SIZE, SIZE)
    for module in model.modules():
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.p = 0.1

    def run():
        torch.manual_seed(1)
        model.zero_grad()
        out = output(model, images)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [out.detach(), torch.rand(1), *gradients]

    alone = run()
    with reading(model) as affinity:
        read = run()
    assert len(alone) == len(read) > 10
    assert all(map(torch.equal, alone, read))
    assert affinity(images).shape == (2, 16, 16)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_teacher_of_a_distillation_is_read_in_its_own_pass():
    """As iBOT and DINO have it: a backbone and a head, run on the global crops."""
    teacher, student = nn.Sequential(small_vit(), nn.Linear(192, 7)).eval(), small_vit()
    crops, passes = torch.randn(4, 3, SIZE, SIZE), []
    teacher[0].forward = teacher[0].forward_features
    with reading(teacher, [-1]) as affinity, torch.no_grad():  # after its one trial
        teacher[1].register_forward_hook(lambda *_: passes.append(1))
        targets = teacher(crops)
    student(crops)  # is not read
    parts = GraphCutPartitioner(4)(affinity(crops), images=crops)
    assert len(passes) == 1
    assert targets.shape == (4, 17, 7)
    assert parts.shape == (4, 16)
    torch.testing.assert_close(affinity(crops), attention_affinity(teacher[0], crops, [-1]))


def test_of_several_passes_the_last_one_counts():
    vit, first, last = small_vit(dynamic_img_size=True), torch.randn(3, 3, SIZE, SIZE), torch.randn(2, 3, 96, SIZE)
    with reading(vit) as affinity:
        vit(first)
        vit(last)
        assert affinity(last).shape == (2, 24, 24)
        torch.testing.assert_close(affinity(last), attention_affinity(vit, last))
    with pytest.raises(ValueError, match=r"2 images.*\[3, 3, 64, 64\]"):
        affinity(first)


def test_a_pass_that_failed_leaves_nothing_behind():
    vit, images = small_vit(), torch.randn(2, 3, SIZE, SIZE)
    handle = vit.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with reading(vit) as affinity:
        with pytest.raises(ZeroDivisionError):
            vit(images)
        with pytest.raises(RuntimeError, match=r"blocks\.1\.attn"):
            affinity(images)
        handle.remove()
        vit(images)
    torch.testing.assert_close(affinity(images), attention_affinity(vit, images))


def test_what_cannot_be_read_is_an_error():
    vit, images = small_vit(), torch.randn(2, 3, SIZE, SIZE)
    with reading(vit) as affinity, pytest.raises(RuntimeError, match=r"blocks\.0\.attn"):
        affinity(images)
    with pytest.raises(ValueError, match="layer 2"), reading(vit, [2]):
        pass
    mae = MAE(depth=2)
    with reading(mae) as affinity:
        mae(images)
    with pytest.raises(ValueError, match=r"8 x 8.*masking"):
        affinity(images)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2)
    with reading(swin), pytest.raises(ValueError, match=r"layers="):
        swin(images)
