"""Vision models of Hugging Face as teachers, at their own and at other sizes."""

import pytest
import torch
import transformers

from maskevolve import GraphCutPartitioner, PartTeacher
from maskevolve.teachers.attention import attention_affinity

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SIZE = {"image_size": 64, "patch_size": 8}
MODELS = {
    "Dinov2": {},
    "Dinov2WithRegisters": {},
    "DINOv3ViT": {},
    "Beit": {"use_relative_position_bias": True},
    "Data2VecVision": {},
    "DeiT": {},
    "IJepa": {},
    "SiglipVision": {},
}


def make(name, attention="sdpa"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **SIZE, initializer_range=0.2, **MODELS[name])
    config._attn_implementation = attention
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_teachers_at_their_own_and_at_other_sizes(name, attention):
    model = make(name, attention)
    for layers in ("tokens", None, [0], [-1]):
        teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=10, layers=layers)
        assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 64)
        assert teacher(torch.randn(1, 3, 96, 48)).shape == (1, 72)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_affinity_is_what_the_model_reports(name, attention):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        reported = make(name, "eager")(images, output_attentions=True).attentions
    maps = torch.stack(reported).mean(2)[:, :, -64:, -64:]  # prefix tokens come first
    model = make(name, attention)
    torch.testing.assert_close(attention_affinity(model, images), maps.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention_affinity(model, images, [-1]), maps[-1], rtol=1e-4, atol=1e-6)


def test_a_model_of_images_and_text_is_refused_by_name():
    text = {**SMALL, "vocab_size": 32, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SMALL, **SIZE})
    model = transformers.SiglipModel(config)
    with pytest.raises(ValueError, match=r"SiglipModel could not be tried on a picture.*pass the encoder"):
        PartTeacher(model, GraphCutPartitioner(), total_epochs=10)
    teacher = PartTeacher(model.vision_model, GraphCutPartitioner(), total_epochs=10)
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 64)
