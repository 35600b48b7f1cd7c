"""The teacher follows the student and stays out of its way."""

import copy
import io
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import timm
import torch
from test_tokens import TokensFirst
from torch import nn
from torch.optim.swa_utils import AveragedModel
from vits import MAE, make_teacher, make_vit, photographs

from maskevolve import (
    EvolvingMask,
    FrozenTeacher,
    GraphCutPartitioner,
    GridMask,
    PartTeacher,
    RandomMask,
)
from maskevolve.integrations import apply_to_mae
from maskevolve.parts import parts_from_segmentation
from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.teachers.average import unwrap

frozen = partial(make_teacher, kind=FrozenTeacher)
every_kind = pytest.mark.parametrize("kind", [make_teacher, frozen], ids=["moving", "frozen"])


@every_kind
@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
def test_number_of_parts_falls_with_the_epoch_which_is_saved(kind):
    teacher, resumed = kind(make_vit(), num_parts=(8, 2)), kind(make_vit(), num_parts=(8, 2))
    images = torch.randn(2, 3, 224, 224)
    for epoch, most in ((-1, 8), (0, 8), (4.5, 5), (9, 2), (100, 2)):
        teacher.set_epoch(epoch)
        resumed.load_state_dict(teacher.state_dict())
        assert teacher.num_parts == resumed.num_parts == most
        assert teacher(images).max() + 1 <= most
        assert torch.equal(resumed(images), teacher(images))


def test_a_model_and_its_teacher_stay_out_of_each_others_way():
    student = make_vit(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    keys, attributes = set(student.state_dict()), set(vars(student))
    teacher, images = make_teacher(student.train()).train(), torch.randn(2, 3, 224, 224, requires_grad=True)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(images), teacher(images))
    assert images.grad is None
    assert set(student.state_dict()) == keys
    assert set(vars(student)) == attributes
    assert teacher not in list(student.modules())
    ours = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in student.parameters()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_update_changes_parts_and_state_brings_them_back():
    student, images = make_vit(), torch.randn(4, 3, 224, 224)
    teacher, resumed = make_teacher(student, num_parts=(12, 4)), make_teacher(make_vit(), num_parts=(12, 4))
    before = teacher(images)
    move(student)
    teacher.update(student)
    after = teacher.set_epoch(4.5)(images)
    assert not torch.equal(before, after)
    resumed.load_state_dict(teacher.state_dict())
    assert resumed.num_parts == teacher.num_parts == 8
    assert torch.equal(resumed(images), after)
    teacher.update(student)
    resumed.update(student)
    assert torch.equal(resumed(images), teacher(images))


def test_reads_the_middle_of_every_second_patch_unless_another_way_is_asked_for():
    vit, images = make_vit(depth=6), photographs(2, 224)
    read = {(layers, 1): attention_affinity(vit, images, layers) for layers in (None, (0,), (-1,), (2, 3))}
    read |= {("middle", stride): attention_affinity(vit, images, [2, 3], stride) for stride in (2, 3)}
    read |= {("tokens", stride): token_affinity(vit, images, stride) for stride in (1, 2)}
    parts = {
        way: GraphCutPartitioner()(affinity, 40, grid_size=(14, 14), images=images, stride=way[1])
        for way, affinity in read.items()
    }
    assert torch.equal(make_teacher(vit)(images), parts["middle", 2])
    assert torch.equal(make_teacher(vit, stride=1)(images), parts[(2, 3), 1])
    for (layers, stride), expected in parts.items():
        options = {} if stride == 1 else {"stride": stride}
        assert torch.equal(make_teacher(vit, layers=layers, **options)(images), expected)
        assert sum(torch.equal(expected, other) for other in parts.values()) == 1


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


def images_for_partitioner(model, images):
    partitioner = AnyCall()
    assert PartTeacher(model, partitioner, total_epochs=10)(images).shape == make_teacher(model)(images).shape
    return partitioner.got["images"]


def test_images_go_to_partitioners_that_take_them_without_pixels_that_fill_no_patch():
    images, old = photographs(2, 224), OldCall()
    PartTeacher(make_vit(), old, total_epochs=10)(images)
    assert old.got == ((2, 196, 196), 40, (14, 14))
    assert torch.equal(images_for_partitioner(make_vit(), images), images)
    cut = images[:, :, :44, :63]
    assert torch.equal(images_for_partitioner(TokensFirst(2), cut), cut[:, :, :40, :56])


def test_partitioners_get_pixels_for_the_padding():
    vit, images = make_vit(dynamic_img_size=True, dynamic_img_pad=True), photographs(2, 224)[:, :, :100, :220]
    seen = images_for_partitioner(vit, images)
    assert seen.shape == (2, 3, 112, 224)
    assert torch.equal(seen[..., :100, :220], images)
    assert torch.equal(seen[..., 100:, :220], images[..., 99:, :].expand(-1, -1, 12, -1)), "no outline at the border"


@pytest.mark.parametrize("kind", [PartTeacher, FrozenTeacher])
def test_what_is_no_partitioner_or_no_vit(kind):
    with pytest.raises(TypeError, match=r"GraphCutPartitioner\(\)"):
        kind(MAE(), GraphCutPartitioner, total_epochs=10)
    with pytest.raises(RuntimeError, match="no attention module"):
        make_teacher(nn.Conv2d(3, 3, 3), kind)
    with pytest.raises(ValueError, match="layer 99"):
        make_teacher(MAE(), kind, layers=[99])


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def average(teacher):
    return weights(teacher.model.module)


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


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_average_is_kept_in_float32(self, dtype):
        student = MAE().to(dtype)
        teacher = make_teacher(student, decay=0.9999)
        teacher.update(student)
        start, images = average(teacher), torch.rand(1, 3, 64, 64).to(dtype)
        assert {weight.dtype for weight in start} == {torch.float32}
        move(student)
        for _ in range(200):
            teacher.update(student)
        for first, now, new in zip(start, average(teacher), student.parameters(), strict=True):
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
        student, images, kinds = make_vit(), photographs(2, 224).bfloat16(), []
        teacher = make_teacher(student, decay=0.5)
        for _ in range(updates):
            teacher.update(student)
        student.bfloat16()
        teacher.model.module.norm_pre.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
        for _ in range(2):
            assert teacher(images).shape == (2, 196)
            teacher.update(student)
        assert kinds == [torch.bfloat16] * 2 if not updates else kinds[-1] == torch.bfloat16

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
        torch.testing.assert_close(average(teacher), expected)
        assert teacher.model.n_averaged == 3
        assert isinstance(teacher.model, AveragedModel)

    def test_weights_of_another_model_under_an_evolution(self):
        pretrained, student = MAE(seed=7), MAE(seed=0)
        evolution = apply_to_mae(student, EvolvingMask(10), make_teacher(pretrained, decay=1.0)).set_epoch(5)
        for _ in range(2):
            student(torch.randn(1, 3, 64, 64))
            move(student)
            evolution.update()
        assert equal(average(evolution.teacher), weights(pretrained))

    def test_decay_1_keeps_what_it_was_built_from_even_where_the_student_diverges(self):
        student = MAE()
        teacher, expected = make_teacher(student, decay=1.0), weights(student)
        for by in (0.1, torch.nan):
            move(student, by)
            teacher.update(student)
        assert equal(average(teacher), expected)

    @pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
    def test_weights_that_were_loaded_after_it_was_built(self, wrap):
        student, checkpoint = MAE(), MAE(seed=7)
        teacher = make_teacher(student)
        student.load_state_dict(checkpoint.state_dict())
        teacher.catch_up(student)
        assert equal(average(teacher), weights(checkpoint))
        assert teacher.model.n_averaged == 0, "that was no step"
        move(student)
        teacher.update(wrap(student))
        assert equal(average(teacher), weights(student)), "with no look before the first step"
        move(student)
        teacher.update(wrap(student))
        assert not equal(average(teacher), weights(student))

    def test_a_teacher_that_was_loaded_stays_what_it_is(self):
        student, saved = MAE(), make_teacher(MAE(seed=7), decay=0.5)
        saved.update(MAE(seed=8))
        teacher = make_teacher(student, decay=0.5)
        teacher.load_state_dict(saved.state_dict())
        teacher.catch_up(student)
        assert equal(average(teacher), average(saved))
        teacher.update(student)
        halves = zip(average(saved), weights(student), strict=True)
        torch.testing.assert_close(average(teacher), [0.5 * old + 0.5 * new for old, new in halves])

    @pytest.mark.parametrize("other", [MAE(width=24, heads=3), MAE(depth=3), nn.Linear(2, 2), MAE(patch_size=16)])
    def test_a_model_of_another_architecture_is_refused_and_changes_nothing(self, other):
        teacher = make_teacher(MAE(), decay=0.5)
        before = copy.deepcopy(teacher.state_dict())
        with pytest.raises(ValueError, match=f"another architecture.* {type(other).__name__}"):
            teacher.update(other)
        assert same(teacher.state_dict(), before)


def test_old_checkpoints_load():
    """Those of an average in the dtype of the student, from before it was kept in float32."""
    teacher, saved = make_teacher(MAE()), make_teacher(MAE(seed=7)).set_epoch(4).state_dict()
    assert {"epoch", "model.n_averaged", "model.module.cls_token"} <= set(saved)
    teacher.load_state_dict({key: value.bfloat16() if "module" in key else value for key, value in saved.items()})
    assert teacher.epoch == 4
    assert torch.equal(teacher.model.module.cls_token, saved["model.module.cls_token"].bfloat16().float())


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


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike(copied):
    student, images = make_vit(), photographs(2, 224)
    teacher = make_teacher(student, decay=0.9)
    first = copied(teacher)  # which does not know what it was built from
    teacher.update(student)
    other = copied(teacher)
    move(student)
    for each in (teacher, other, first):
        each.update(student)
        each.set_epoch(5)
        torch.testing.assert_close(average(each), average(teacher))
    assert equal(average(other), average(teacher))
    assert not equal(average(first), weights(student))
    assert torch.equal(other(images), teacher(images))


class Expands(MAE):
    """Its position table is expanded in its forward pass."""

    def forward_encoder(self, x, mask_ratio):
        self.pos_embed.data = self.pos_embed.data[:, :1].expand(-1, 64, -1)
        return super().forward_encoder(x, mask_ratio)


def test_the_average_of_a_table_that_is_expanded():
    student = Expands()
    teacher = make_teacher(student, decay=0.5)
    for row in (1.0, 3.0):
        student.pos_embed.data = torch.full((1, 64, 48), row)
        teacher.update(student)
        student(torch.randn(1, 3, 64, 64))
        assert teacher(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    assert (teacher.model.module.pos_embed == 2).all()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "epoch"])
@every_kind
def test_a_state_that_is_refused_leaves_the_teacher_as_it_was(kind, change):
    teacher, source = kind(MAE()).set_epoch(2), MAE(seed=7)
    state, before = kind(source).set_epoch(7).state_dict(), copy.deepcopy(teacher.state_dict())
    parts = teacher.num_parts
    if change == "missing":
        state.pop(next(iter(reversed(state))))
    state |= {"unexpected": {"more": torch.zeros(1)}, "shape": {"epoch": torch.zeros(2)}}.get(change, {})
    state |= {"epoch": torch.tensor(torch.nan)} if change == "epoch" else {}
    with pytest.raises((RuntimeError, ValueError)):
        teacher.load_state_dict(state)
    assert same(teacher.state_dict(), before)
    assert teacher.num_parts == parts
    if kind is make_teacher:  # another model, towards which a new teacher moves only slowly
        teacher.update(source)
        assert not equal(average(teacher), weights(source))


@every_kind
def test_threads_that_share_a_teacher_each_get_their_own_parts(kind):
    teacher, images = kind(MAE(), layers=None), torch.randn(24, 1, 3, 64, 64)
    expected = [teacher(each) for each in images]
    with ThreadPoolExecutor(4) as pool:
        assert equal(pool.map(teacher, images), expected)


class Watched(MAE):
    error, passes = None, 0

    def forward_encoder(self, x, mask_ratio):
        Watched.passes += 1
        if Watched.error is not None:
            raise Watched.error
        return super().forward_encoder(x, mask_ratio)


def test_a_model_is_tried_once(monkeypatch):
    model, images = Watched(), torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(Watched, "passes", 0)
    teacher = make_teacher(model)
    apply_to_mae(model, EvolvingMask(10), teacher)
    assert Watched.passes == 2, "all patches, and every second one up to the layers that are read"
    teacher(images)
    assert Watched.passes == 3


OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError("no"), MemoryError(), RuntimeError("can't allocate memory"))


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@every_kind
def test_out_of_memory_is_not_turned_into_another_error(monkeypatch, kind, error):
    teacher, images = kind(Watched()), torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(Watched, "error", error)
    for run in (lambda: teacher(images), lambda: kind(Watched())):
        with pytest.raises(type(error)) as raised:
            run()
        assert raised.value is error


@every_kind
def test_hooks_of_users_run_neither_in_the_trial_nor_in_the_copy(kind):
    model, ran = MAE(), []
    model.patch_embed.proj = torch.nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.norm = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(48, 48)))  # by a hook
    lock = threading.Lock()  # which cannot be copied
    model.blocks[0].register_forward_hook(lambda module, args, output: ran.append(output.retain_grad()))
    model.blocks[1].register_forward_pre_hook(partial(lambda lock, module, args: ran.append(1), lock))
    expected = frozen(MAE())
    teacher = kind(model)
    assert teacher(torch.randn(1, 3, 64, 64)).shape == expected(torch.randn(1, 3, 64, 64)).shape
    assert not ran
    with torch.no_grad():
        model.norm[0].weight_g.zero_()
    if kind is make_teacher:
        teacher.update(model)
        latent, _, _ = teacher.model.module.forward_encoder(torch.randn(1, 3, 64, 64), 0.5)
        assert torch.equal(latent, model.norm[0].bias.expand_as(latent)), "hooks of torch compute"
    model(torch.randn(1, 3, 64, 64))
    assert len(ran) == 2, "they are still there"


def test_a_model_that_an_integration_has_changed_is_copied_without():
    model, images = MAE(), torch.randn(2, 3, 64, 64)
    expected = make_teacher(model)(images)
    evolution = apply_to_mae(model, EvolvingMask(10, start=RandomMask(), end=GridMask()))
    assert torch.equal(make_teacher(model)(images), expected)
    assert evolution.last_mask is None


def test_a_model_that_was_resized_in_training():
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    teacher, images = make_teacher(student), torch.randn(1, 3, 96, 96)
    student.set_input_size((96, 96))
    for run in (lambda: teacher(images), lambda: teacher.update(student)):
        with pytest.raises(ValueError, match=r"resize teacher\.model\.module"):
            run()
    teacher.model.module.set_input_size((96, 96))
    teacher.update(student)
    assert teacher(images).shape == (1, 36)


@every_kind
def test_an_empty_batch(kind):
    teacher, images = kind(make_vit(dynamic_img_size=True)), torch.randn(0, 3, 96, 224)
    for parts, count in ((teacher(images), 84), (teacher(images, grid_size=5), 25)):
        assert parts.shape == (0, count)
        assert parts.dtype == torch.int64


def test_wrappers_are_opened_and_no_others():
    model = make_vit()
    model.module = nn.Linear(2, 2)  # has the name that wrappers have
    assert unwrap(model) is model
    for wrap in (nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))):
        assert unwrap(wrap(model)) is model
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    assert unwrap(engine) is model
    teacher = make_teacher(model)
    teacher.update(model)
    assert teacher(torch.randn(1, 3, 224, 224)).shape == (1, 196)


@every_kind
def test_parts_on_another_grid(kind):
    teacher, images = kind(make_vit(dynamic_img_size=True)), photographs(2, 224)[:, :, :96]
    own = teacher(images).unflatten(1, (6, 14))
    assert torch.equal(teacher(images, grid_size=(6, 14)), own.flatten(1))
    doubled = own.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert torch.equal(teacher(images, grid_size=(12, 28)), doubled)
    for grid in ((3, 7), (5, 9), (14, 6)):
        assert torch.equal(teacher(images, grid_size=grid), parts_from_segmentation(own, grid))


@pytest.mark.parametrize("call", ["__call__", "hierarchy"])
@every_kind
def test_what_is_no_batch_of_images(kind, call):
    run = getattr(kind(make_vit()), call)
    for shape in ([3, 224, 224], [224, 224], [2, 3, 1, 224, 224], [2, 196, 768]):
        with pytest.raises(ValueError, match=r"\[B, C, height, width\]|images of shape"):
            run(torch.zeros(shape))
    with pytest.raises(TypeError, match="ndarray"):
        run(torch.zeros(2, 3, 224, 224).numpy())


class FromBytes(MAE):
    """A model that brings bytes to floats itself."""

    def forward_encoder(self, x, mask_ratio):
        return super().forward_encoder(x.float() / 255, mask_ratio)


def test_images_as_bytes():
    images = photographs(2, 64).mul(255).clamp(0, 255).byte()
    with pytest.raises(ValueError, match=r"uint8.*/ 255"):
        make_teacher(MAE())(images)
    teacher = make_teacher(FromBytes(), layers=None)
    assert torch.equal(teacher(images), teacher(images.float()))


class Masker(nn.Module):
    def forward(self, x, mask_ratio):
        shuffle = torch.rand(x.shape[:2]).argsort(1)
        restore, keep = shuffle.argsort(1), int(x.shape[1] * (1 - mask_ratio))
        return x.take_along_dim(shuffle[:, :keep, None], 1), (restore >= keep).float(), restore


class MaskedByAModule(nn.Module):
    """An MAE whose `random_masking` is a module of its own."""

    def __init__(self):
        super().__init__()
        vit = make_vit()
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        self.positions, self.random_masking = nn.Parameter(torch.randn(1, 196, 192)), Masker()

    def forward_encoder(self, images, mask_ratio):
        x, mask, ids_restore = self.random_masking(self.patch_embed(images) + self.positions, mask_ratio)
        return self.blocks(x), mask, ids_restore


def test_all_patches_are_read_of_an_mae_that_a_module_masks():
    model, images = MaskedByAModule(), photographs(2, 224)
    teacher = make_teacher(model, layers=None)
    assert torch.equal(teacher(images), teacher(images)), "no patch is shuffled"
    assert isinstance(model.random_masking, Masker)
