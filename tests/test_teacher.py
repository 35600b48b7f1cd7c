"""The teacher follows the student and stays out of its way."""

import pytest
import torch
from test_tokens import TokensFirst
from torch import nn
from torch.optim.swa_utils import AveragedModel
from vits import MAE, make_vit, photographs

from maskevolve import EMPartitioner, EvolvingMask, GraphCutPartitioner, PartTeacher
from maskevolve.attention import attention_affinity, token_affinity


def make_teacher(model, **options):
    return PartTeacher(model, GraphCutPartitioner(), **{"total_epochs": 10, **options})


@pytest.mark.parametrize("model", [make_vit(), MAE(image_size=224, patch_size=16)], ids=["timm", "MAE"])
@pytest.mark.parametrize("partitioner", [GraphCutPartitioner(), EMPartitioner()], ids=["cut", "em"])
def test_images_in_parts_out(model, partitioner):
    teacher = PartTeacher(model, partitioner, total_epochs=10)
    parts = teacher(torch.randn(2, 3, 224, 224))
    assert parts.shape == (2, 196)
    assert parts.dtype == torch.int64
    assert 1 < parts.max() < 40
    mask = EvolvingMask(10)
    mask.set_epoch(5)
    assert (mask(torch.randn(2, 196, 4), parts=parts).mask.sum(1) == 147).all()


def test_parts_follow_the_grid_of_rectangular_images():
    vit = make_vit(dynamic_img_size=True)
    assert make_teacher(vit)(torch.randn(2, 3, 96, 224)).shape == (2, 84)


def test_number_of_parts_falls_with_the_epoch():
    teacher, images = make_teacher(make_vit(), num_parts=(8, 2)), torch.randn(2, 3, 224, 224)
    for epoch, most in ((-1, 8), (0, 8), (4.5, 5), (9, 2), (100, 2)):
        teacher.set_epoch(epoch)
        assert teacher.num_parts == most
        assert teacher(images).max() + 1 <= most


def test_average_is_that_of_torch():
    torch.manual_seed(0)
    student = MAE()
    teacher = make_teacher(student, decay=0.9)
    weights = [parameter.detach().clone() for parameter in student.parameters()]
    for step in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        teacher.update(student)
        new = [parameter.detach().clone() for parameter in student.parameters()]
        weights = new if step == 0 else [0.9 * old + 0.1 * now for old, now in zip(weights, new, strict=True)]
    assert isinstance(teacher.model, AveragedModel)
    for ours, expected in zip(teacher.model.module.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_student_does_not_see_its_teacher():
    student = make_vit()
    keys = set(student.state_dict())
    teacher = make_teacher(student)
    student.train()
    assert set(student.state_dict()) == keys
    assert teacher not in list(student.modules())
    ours = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in student.parameters()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters() if parameter.is_floating_point())


def test_always_in_eval_mode_and_without_gradients():
    vit = make_vit(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5).train()
    teacher, images = make_teacher(vit).train(), torch.randn(2, 3, 224, 224, requires_grad=True)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(images), teacher(images))
    teacher(images)
    assert images.grad is None


def test_update_changes_parts_and_state_brings_them_back():
    student, images = make_vit(), torch.randn(4, 3, 224, 224)
    teacher = make_teacher(student, num_parts=(12, 4))
    before = teacher(images)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.update(student)
    teacher.set_epoch(4.5)
    after = teacher(images)
    assert not torch.equal(before, after)

    resumed = make_teacher(make_vit(), num_parts=(12, 4))
    resumed.load_state_dict(teacher.state_dict())
    assert resumed.num_parts == teacher.num_parts == 8
    assert torch.equal(resumed(images), after)
    teacher.update(student)
    resumed.update(student)
    assert torch.equal(resumed(images), teacher(images))


def test_layers_are_passed_on():
    vit, images = make_vit(), torch.randn(2, 3, 224, 224)
    assert not torch.equal(make_teacher(vit, layers=[0])(images), make_teacher(vit, layers=[-1])(images))


def test_reads_tokens_unless_the_published_way_is_asked_for():
    vit, images = make_vit(), photographs(2, 224)
    partitioner, options = GraphCutPartitioner(), {"grid_size": (14, 14), "images": images}
    expected = partitioner(token_affinity(vit, images), 40, **options)
    assert torch.equal(make_teacher(vit)(images), expected)
    assert torch.equal(make_teacher(vit, layers="tokens")(images), expected)
    published = partitioner(attention_affinity(vit, images), 40, **options)
    assert torch.equal(make_teacher(vit, layers=None)(images), published)
    assert not torch.equal(expected, published)


class OldCall(nn.Module):
    """A partitioner that knows nothing of images."""

    def forward(self, affinity, num_parts=None, grid_size=None):
        self.got = (affinity.shape, num_parts, grid_size)
        return torch.zeros(affinity.shape[:2], dtype=torch.long)


class AnyCall(nn.Module):
    """A partitioner that passes on what it gets."""

    def forward(self, affinity, *args, **kwargs):
        self.got = kwargs
        return torch.zeros(affinity.shape[:2], dtype=torch.long)


def test_images_go_to_partitioners_that_take_them():
    vit, images = make_vit(), photographs(2, 224)
    old, new = OldCall(), AnyCall()
    PartTeacher(vit, old, total_epochs=10)(images)
    assert old.got == ((2, 196, 196), 40, (14, 14))
    PartTeacher(vit, new, total_epochs=10)(images)
    assert torch.equal(new.got["images"], images)


def test_partitioners_get_no_pixels_that_fill_no_patch():
    model, partitioner, images = TokensFirst(2), AnyCall(), photographs(2, 64)[:, :, :44, :63]
    PartTeacher(model, partitioner, total_epochs=10)(images)
    assert torch.equal(partitioner.got["images"], images[:, :, :40, :56])
    assert make_teacher(model)(images).shape == (2, 35)


def test_partitioners_get_pixels_for_the_padding():
    vit, partitioner = make_vit(dynamic_img_size=True, dynamic_img_pad=True), AnyCall()
    images = photographs(2, 224)[:, :, :100, :220]
    PartTeacher(vit, partitioner, total_epochs=10)(images)
    seen = partitioner.got["images"]
    assert seen.shape == (2, 3, 112, 224)
    assert torch.equal(seen[..., :100, :220], images)
    assert torch.equal(seen[..., 100:, :220], images[..., 99:, :].expand(-1, -1, 12, -1)), "no outline at the border"
    assert make_teacher(vit)(images).shape == (2, 98)


@pytest.mark.parametrize(
    "options",
    [{"num_parts": (0, 5)}, {"num_parts": 10}, {"total_epochs": 0}, {"layers": 0}, {"layers": [99]}, {"layers": "all"}],
)
def test_bad_settings(options):
    match = r"num_parts=(\(0, 5\)|10) must|total_epochs=0|layers=0 must|layer 99|layers='all' must"
    with pytest.raises(ValueError, match=match):
        make_teacher(MAE(), **options)


def test_a_class_is_no_partitioner():
    with pytest.raises(TypeError, match=r"GraphCutPartitioner\(\)"):
        PartTeacher(MAE(), GraphCutPartitioner, total_epochs=10)
