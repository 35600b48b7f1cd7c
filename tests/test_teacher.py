"""The teacher follows the student and stays out of its way."""

import copy
import io
import pickle
import re
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from test_tokens import TokensFirst
from torch import nn
from torch.optim.swa_utils import AveragedModel
from vits import MAE, make_vit, photographs

from maskevolve import EMPartitioner, EvolvingMask, FrozenTeacher, GraphCutPartitioner, PartTeacher
from maskevolve.integrations import apply_to_mae
from maskevolve.teachers.attention import attention_affinity, token_affinity


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


@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
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


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def move(model, by=0.1, seed=0):
    """As a step of an optimizer would."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise).to(parameter))


def equal(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def same(ours, theirs):
    """Two state_dicts, dtypes included."""
    kinds = [[(key, value.dtype) for key, value in state.items()] for state in (ours, theirs)]
    return kinds[0] == kinds[1] and equal(ours.values(), theirs.values())


class Wrapper(nn.Module):
    """As DistributedDataParallel has it."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_average_is_kept_in_float32(self, dtype):
        student = MAE().to(dtype)
        teacher = make_teacher(student, decay=0.9999)
        teacher.update(student)
        start, images = weights(teacher.model.module), torch.rand(1, 3, 64, 64).to(dtype)
        assert {weight.dtype for weight in start} == {torch.float32}
        move(student)
        for _ in range(200):
            teacher.update(student)
        for first, now, new in zip(start, weights(teacher.model.module), student.parameters(), strict=True):
            torch.testing.assert_close(now, new.float() + 0.9999**200 * (first - new.float()), rtol=1e-4, atol=1e-5)
        assert teacher(images).shape == (1, 64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("layers", ["tokens", None], ids=["tokens", "attention"])
    def test_forward_runs_in_the_dtype_of_the_student(self, dtype, layers):
        student, images = make_vit().to(dtype), photographs(2, 224).to(dtype)
        teacher = make_teacher(student, layers=layers)
        ran = []
        for module in teacher.model.module.modules():
            module.register_forward_hook(lambda module, args, output: ran.append((module, args[0].dtype)))
        expected = token_affinity(student, images) if layers else attention_affinity(student, images)
        expected = GraphCutPartitioner()(expected, 40, grid_size=(14, 14), images=images)
        assert torch.equal(teacher(images), expected)
        assert {kind for _, kind in ran} == {dtype}
        assert {weight.dtype for weight in teacher.model.module.parameters()} == {torch.float32}, "put back"
        assert torch.equal(teacher(images.float()), teacher(images.float().to(dtype).float())), "what precision allows"

    @pytest.mark.parametrize("updates", [0, 1])
    def test_a_model_may_be_cast_after_its_teacher_was_built(self, updates):
        student, images = make_vit(), photographs(2, 224).bfloat16()
        teacher = make_teacher(student, decay=0.5)
        for _ in range(updates):
            teacher.update(student)
        student.bfloat16()
        for seed in range(2):
            assert teacher(images).shape == (2, 196)
            move(student, seed=seed)
            teacher.update(student)
        kinds = []
        teacher.model.module.norm_pre.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
        teacher(images)
        assert kinds == [torch.bfloat16]

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
    def test_a_cast_of_the_teacher_leaves_the_average_as_it_is(self, cast):
        teacher, images = make_teacher(make_vit()), photographs(2, 224)
        before, parts = copy.deepcopy(teacher.state_dict()), teacher(images)
        cast(nn.ModuleDict({"teacher": teacher}))
        assert same(teacher.state_dict(), before)
        assert torch.equal(teacher(images), parts)

    def test_tied_weights(self):
        student = MAE()
        student.decoder_embed.weight = student.blocks[0].attn.proj.weight
        teacher = make_teacher(student.bfloat16(), layers=None)
        teacher.update(student)
        assert teacher(torch.randn(1, 3, 64, 64).bfloat16()).shape == (1, 64)
        module = teacher.model.module
        assert module.decoder_embed.weight is module.blocks[0].attn.proj.weight

    def test_integer_and_batchnorm_buffers_are_copied(self):
        student = MAE()
        student.stem = nn.BatchNorm2d(3)
        teacher = make_teacher(student, decay=0.9)
        teacher.update(student)
        for seed in range(2):
            student.stem.train()(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
            teacher.update(student.bfloat16() if seed else student)
            for ours, theirs in zip(teacher.model.module.buffers(), student.buffers(), strict=True):
                assert torch.equal(ours, theirs.to(ours.dtype))
        assert teacher.model.module.stem.num_batches_tracked == 2
        assert teacher.model.module.stem.num_batches_tracked.dtype == torch.int64


class TestBeginning:
    """What the average begins with."""

    @pytest.mark.parametrize("decay", [1.0, 0.999, 0.5])
    @pytest.mark.parametrize("gone", [False, True], ids=["at hand", "deleted"])
    def test_weights_of_another_model(self, decay, gone):
        pretrained, student = MAE(seed=7), MAE(seed=0)
        teacher, expected = make_teacher(pretrained, decay=decay), weights(pretrained)
        if gone:
            del pretrained
        for seed in range(3):
            move(student, seed=seed)
            teacher.update(student)
            expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights(student), strict=True)]
        for ours, theirs in zip(teacher.model.module.parameters(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert teacher.model.n_averaged == 3

    def test_weights_of_another_model_under_an_evolution(self):
        pretrained, student = MAE(seed=7), MAE(seed=0)
        evolution = apply_to_mae(student, EvolvingMask(10), make_teacher(pretrained, decay=1.0)).set_epoch(5)
        for _ in range(2):
            student(torch.randn(1, 3, 64, 64))
            move(student)
            evolution.update()
        assert equal(weights(evolution.teacher.model.module), weights(pretrained))

    def test_decay_1_keeps_what_the_teacher_was_built_from_even_where_the_student_diverges(self):
        student = MAE()
        teacher, expected = make_teacher(student, decay=1.0), weights(student)
        for by in (0.1, torch.nan):
            move(student, by)
            teacher.update(student)
        assert equal(weights(teacher.model.module), expected)

    @pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile, Wrapper])
    def test_weights_that_were_loaded_after_it_was_built(self, wrap):
        student, checkpoint = MAE(), MAE(seed=7)
        teacher = make_teacher(student)
        student.load_state_dict(checkpoint.state_dict())
        teacher.catch_up(student)
        assert equal(weights(teacher.model.module), weights(checkpoint))
        assert teacher.model.n_averaged == 0, "that was no step"
        move(student)
        teacher.update(wrap(student))
        assert equal(weights(teacher.model.module), weights(student)), "with no look before the first step"
        move(student)
        teacher.update(wrap(student))
        assert not equal(weights(teacher.model.module), weights(student))

    def test_a_teacher_that_was_loaded_stays_what_it_is(self):
        student, saved = MAE(), make_teacher(MAE(seed=7), decay=0.5)
        saved.update(MAE(seed=8))
        teacher = make_teacher(student, decay=0.5)
        teacher.load_state_dict(saved.state_dict())
        teacher.catch_up(student)
        assert equal(weights(teacher.model.module), weights(saved.model.module))
        teacher.update(student)
        expected = [
            0.5 * old + 0.5 * new for old, new in zip(weights(saved.model.module), weights(student), strict=True)
        ]
        torch.testing.assert_close(weights(teacher.model.module), expected)

    @pytest.mark.parametrize("other", [MAE(width=24, heads=3), MAE(depth=3), nn.Linear(2, 2), MAE(patch_size=16)])
    def test_a_model_of_another_architecture_is_refused_and_changes_nothing(self, other):
        teacher = make_teacher(MAE(), decay=0.5)
        before = copy.deepcopy(teacher.state_dict())
        with pytest.raises(ValueError, match=f"another architecture than this {type(other).__name__}"):
            teacher.update(other)
        assert same(teacher.state_dict(), before)

    @pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
    def test_bad_decay(self, decay):
        with pytest.raises(ValueError, match=f"decay={decay} must be a number in"):
            make_teacher(MAE(), decay=decay)


def test_old_checkpoints_load():
    """Those of an average in the dtype of the student, from before it was kept in float32."""
    teacher = make_teacher(MAE())
    state = {
        key: value.bfloat16() if key.startswith("model.module") else value
        for key, value in make_teacher(MAE(seed=7)).set_epoch(4).state_dict().items()
    }
    assert {"epoch", "model.n_averaged", "model.module.cls_token"} <= set(state)
    teacher.load_state_dict(state)
    assert teacher.epoch == 4
    assert torch.equal(teacher.model.module.cls_token, MAE(seed=7).cls_token.bfloat16().float())


def saved_and_loaded(teacher):
    buffer = io.BytesIO()
    torch.save(teacher, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda teacher: pickle.loads(pickle.dumps(teacher)),
    "torch.save": saved_and_loaded,
    "spawn": lambda teacher: pickle.loads(ForkingPickler.dumps(teacher)),  # what a spawned process is given
}


class TestCopies:
    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_copies_go_on_alike(self, copied):
        student, images = make_vit(), photographs(2, 224)
        teacher = make_teacher(student, decay=0.9)
        teacher.update(student)
        other = copied(teacher)
        move(student)
        for each in (teacher, other):
            each.update(student)
            each.set_epoch(5)
        assert equal(weights(other.model.module), weights(teacher.model.module))
        assert not equal(weights(other.model.module), weights(student))
        assert torch.equal(other(images), teacher(images))


def test_parts_on_another_grid():
    teacher, images = make_teacher(make_vit()), photographs(2, 224)
    own = teacher(images).unflatten(1, (14, 14))
    assert torch.equal(teacher(images, grid_size=14), own.flatten(1))
    assert torch.equal(teacher(images, grid_size=28), own.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1))
    assert teacher(images, grid_size=(7, 5)).shape == (2, 35)


@pytest.mark.parametrize("call", ["__call__", "hierarchy"])
@pytest.mark.parametrize(
    "kind", [make_teacher, lambda model: FrozenTeacher(model, GraphCutPartitioner(), total_epochs=10)]
)
def test_what_is_no_batch_of_images(kind, call):
    run = getattr(kind(make_vit()), call)
    for shape in ([3, 224, 224], [224, 224], [2, 3, 1, 224, 224], [2, 196, 768]):
        with pytest.raises(
            ValueError, match=rf"images has shape {re.escape(str(shape))}, but must be .*images\[None\]"
        ):
            run(torch.zeros(shape))
    with pytest.raises(TypeError, match="images is a ndarray, but must be a tensor"):
        run(torch.zeros(2, 3, 224, 224).numpy())


class FromBytes(nn.Module):
    """A model that brings bytes to floats itself."""

    def __init__(self):
        super().__init__()
        self.vit = make_vit()
        self.patch_embed = self.vit.patch_embed

    def forward(self, images):
        return self.vit(images.float() / 255)


def test_images_as_bytes():
    images = photographs(2, 224).mul(255).clamp(0, 255).byte()
    with pytest.raises(ValueError, match=r"images has dtype torch\.uint8.*images / 255"):
        make_teacher(make_vit())(images)
    model = FromBytes()
    assert torch.equal(make_teacher(model, layers=None)(images), make_teacher(model, layers=None)(images.float()))
