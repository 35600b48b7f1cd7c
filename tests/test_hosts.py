"""What holds in every code base: parts of the images at hand, copies, pickles, checkpointing, nothing left behind."""

import copy
import gc
import pickle
import re
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from hosts import HOSTS, anatomy, make, make_teacher, make_vit, pictures
from timm.models.vision_transformer import VisionTransformer
from torch.utils.checkpoint import checkpoint
from vits import check_training, photographs

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask

LABELS = torch.arange(64).expand(2, -1) % 5
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


def gradients(model):
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_removal_leaves_the_model_and_its_copies_as_they_were(name):
    host, model, images = HOSTS[name], make(name), pictures()
    expected, before = host.run(model, images), anatomy(model)
    evolution = host.evolve(model).set_epoch(3)
    assert list(model.state_dict()) == before[0], "nothing is added to the checkpoint"
    host.run(model, images)
    other = copy.deepcopy(model)
    for _ in range(2):
        evolution.remove()
    for each in (model, other):
        assert torch.equal(host.run(each, images), expected)
    assert anatomy(model) == before
    host.evolve(model).remove()
    assert anatomy(model) == before


@pytest.mark.parametrize("masking", [GridMask(), BlockMask(), EvolvingMask(4, end=BlockMask())])
def test_masks_without_parts_need_no_teacher(name, masking):
    evolution = HOSTS[name].apply(model := make(name), masking).set_epoch(1)
    HOSTS[name].run(model, pictures())
    assert evolution.last_mask.sum(1).tolist() == [HOSTS[name].removed] * 2
    assert evolution.last_parts is None


def test_masks_are_whole_parts_of_the_images_at_the_end(name):
    host, model = HOSTS[name], make(name)
    evolution = host.evolve(model, PartMask()).set_epoch(3)
    for images in (photographs(4, 64), pictures(3)):
        for seed in range(3):
            host.run(model, images, seed)
            assert torch.equal(evolution.last_parts, evolution.teacher(images))
            for mask, parts in zip(evolution.last_mask, evolution.last_parts, strict=True):
                assert mask.sum() == host.removed
                assert sum(0 < mask[parts == part].mean() < 1 for part in parts.unique()) <= 1


def test_a_copy_masks_with_its_own_weights(name):
    host, model, images = HOSTS[name], make(name), pictures()
    evolution = host.evolve(model).set_epoch(2)
    other = copy.deepcopy(model)
    ours, mask = host.run(model, images), evolution.last_mask
    assert torch.equal(host.run(other, images), ours)
    for weight in other.parameters():
        weight.data.mul_(1.5)
    assert host.run(other, images) != ours
    assert torch.equal(evolution.last_mask, mask)


def test_a_pickle_masks_with_its_own_evolution(name):
    host, model, images = HOSTS[name], make(name), pictures()
    evolution = host.evolve(model).set_epoch(2)
    other, resumed = pickle.loads(pickle.dumps((model, evolution)))
    expected = host.run(model, images)
    mask, evolution.last_mask = evolution.last_mask, None
    assert torch.equal(host.run(other, images), expected)
    assert torch.equal(resumed.last_mask, mask)
    assert evolution.last_mask is None
    resumed.update()
    resumed.remove()
    assert torch.equal(host.run(other, images), host.run(make(name), images))


def test_a_compiled_model_draws_the_same_masks(name):
    host, model, images = HOSTS[name], make(name), pictures()
    evolution = host.evolve(model)
    compiled = torch.compile(model, backend="eager")
    for epoch in (0, 3):
        evolution.set_epoch(epoch)
        expected, mask = host.run(model, images), evolution.last_mask
        loss = host.run(compiled, images)
        assert torch.equal(evolution.last_mask, mask)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        evolution.update()
    with torch._dynamo.config.patch(error_on_recompile=True):
        evolution.set_epoch(2)
        host.run(compiled, images)
    evolution.see(parts=LABELS)
    host.run(compiled, images)
    assert torch.equal(evolution.last_parts, LABELS)
    masks = []
    for each in (model, compiled):
        with evolution.fixed():
            host.run(each, images)
        masks.append(evolution.last_mask)
    assert torch.equal(*masks)
    evolution.remove()
    assert host.apply(compiled, RandomMask()).model is evolution.model
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 cannot trace what a thread has seen")
@pytest.mark.parametrize("name", ["MAE", "timm"])
def test_masks_without_a_teacher_need_no_graph_break(name):
    torch._dynamo.reset()
    host, model, images = HOSTS[name], make(name), pictures()
    evolution = host.apply(model, EvolvingMask(4, end=BlockMask())).set_epoch(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(host.run(compiled, images), host.run(model, images))
    with torch._dynamo.config.patch(error_on_recompile=True):
        evolution.set_epoch(2)
        compiled(images)
    torch._dynamo.reset()


def test_autocast_and_an_optimizer_that_is_followed(name):
    host, model = HOSTS[name], make(name)
    evolution = host.evolve(model).set_epoch(2)
    optimizer = torch.optim.AdamW(model.parameters())
    evolution.follow(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = host.run(model, pictures())
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert int(evolution.teacher.model.n_averaged) == 1


STUDENTS = {
    "ViTMAE": ["", "vit"],
    "MIM": ["", "vit"],
    "Lightly": ["backbone", "backbone.vit"],
    "stable_pretraining MAE": ["encoder", "encoder.vit"],
}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in STUDENTS if name in HOSTS for part in STUDENTS[name]]
)
def test_a_teacher_may_be_built_from_the_model_or_its_encoder(name, part):
    host, model = HOSTS[name], make(name)
    student = model.get_submodule(part)
    evolution = host.apply(model, EvolvingMask(4), make_teacher(student)).set_epoch(2)
    host.run(model, pictures()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    evolution.update()
    ours = zip(evolution.teacher.model.module.parameters(), student.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in ours), "the first update copies"


@pytest.mark.parametrize("name", ["ViTMAE", "MIM"])
def test_gradient_checkpointing_of_hugging_face(name):
    host, model, images = HOSTS[name], make(name), pictures()
    host.evolve(model).set_epoch(2)
    plain = host.run(model.train(), images)
    model.gradient_checkpointing_enable()
    checkpointed = host.run(model, images)
    assert torch.equal(checkpointed, plain)
    checkpointed.backward()


@pytest.mark.parametrize("same_images", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_views_have_their_own_labels_in_one_backward_pass(name, reentrant, same_images):
    host, model = HOSTS[name], make(name)
    evolution = host.evolve(model, PartMask()).set_epoch(2)
    views = [pictures(2)] * 2 if same_images else [pictures(2), pictures(2).flip(3)]
    labels = [LABELS, torch.arange(64).expand(2, -1) // 16]
    expected = []

    def loss(x):
        return host.loss(model(x))

    for run in (loss, partial(checkpoint, loss, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad()
        losses = []
        for view, parts in zip(views, labels, strict=True):
            evolution.see(parts=parts)
            losses.append(run(view.requires_grad_()))
            assert torch.equal(evolution.last_parts, parts)
        sum(losses).backward()
        expected.append(gradients(model))
    assert all(map(torch.equal, *expected))


def test_parts_given_for_the_first_filling_of_a_buffer_are_not_those_of_the_next(name):
    host, model, buffer = HOSTS[name], make(name), pictures()
    evolution = host.evolve(model, PartMask()).set_epoch(3)
    evolution.see(parts=LABELS)
    host.run(model, buffer)
    assert torch.equal(evolution.last_parts, LABELS)
    buffer.numpy()[:] = photographs(2, 64)
    host.run(model, buffer)
    assert torch.equal(evolution.last_parts, evolution.teacher(buffer))


def test_a_batch_that_fails_leaves_no_parts_behind(name):
    host, model = HOSTS[name], make(name)
    evolution = host.evolve(model, PartMask()).set_epoch(3)
    evolution.see(parts=LABELS)
    with pytest.raises(Exception):  # noqa: B017, PT011  # of the host, whatever it is
        host.run(model, torch.zeros(2, 2, 5, 5))
    host.run(model, pictures())
    assert torch.equal(evolution.last_parts, evolution.teacher(pictures()))
    evolution.see(parts=LABELS)
    host.run(model, pictures())
    assert torch.equal(evolution.last_parts, LABELS)


def test_no_batch_stays_in_memory(name):
    host, model = HOSTS[name], make(name)
    evolution = host.evolve(model).set_epoch(3)
    for given in (True, False):
        images, labels = pictures(), LABELS.view(2, 8, 8).clone()
        if given:
            evolution.see(parts=labels)
        loss = host.run(model.train(given), images)
        if loss.requires_grad:  # not of all patches in eval mode, everywhere
            loss.backward()
        del loss
        gone = [weakref.ref(images), weakref.ref(labels)]
        del images, labels
        gc.collect()
        assert [each() for each in gone] == [None, None]


def test_fixed_masks(name):
    host, model, images, masks = HOSTS[name], make(name), pictures(), []
    evolution = host.evolve(model).set_epoch(2)
    for seed, other in ((3, 1), (3, 2), (4, 1)):
        with evolution.fixed(seed):
            host.run(model, images, other)
        masks.append(evolution.last_mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_forgetting_the_epoch_warns_once_and_in_training_alone(name):
    HOSTS[name].evolve(model := make(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        HOSTS[name].run(model.eval(), pictures())
    with pytest.warns(UserWarning, match="set_epoch"):
        HOSTS[name].run(model.train(), pictures())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        HOSTS[name].run(model, pictures())


def test_wrong_use(name):
    host, model = HOSTS[name], make(name)
    with pytest.raises(TypeError, match="Identity"):
        host.apply(torch.nn.Identity(), RandomMask())
    evolution = host.apply(model, EvolvingMask(4)).set_epoch(2)
    with pytest.raises(ValueError, match="PartTeacher"):
        host.run(model, pictures())
    with pytest.raises(ValueError, match="already"):
        host.apply(model, RandomMask())
    evolution.remove()
    with pytest.raises(ValueError, match="another architecture"):
        host.apply(model, EvolvingMask(4), make_teacher(make_vit(reg_tokens=2)))
    host.apply(model, GridMask(grid_size=(4, 9)))
    with pytest.raises(ValueError, match="4 x 9"):
        host.run(model, pictures())


def test_training_on_photographs(name):
    """The loss of pixels falls, or that of telling nine photographs apart by the quarter of them that stays."""
    host, model, images = HOSTS[name], make(name), photographs(18, 64)
    evolution = host.evolve(model, epochs=40, decay=0.9)

    def loss():
        batch = torch.randperm(18)[:12]
        output = model(images[batch])
        return torch.nn.functional.cross_entropy(output, batch % 9) if name in ("timm", "NaFlex") else host.loss(output)

    check_training(evolution, loss, lr=3e-3, trained=model)


class Given(VisionTransformer):
    """A model that must be given its mask, as BEiT's own."""

    def forward(self, images, mask):
        x = self.patch_embed(images)
        x = self._pos_embed(x * ~mask[..., None])
        return self.norm(self.blocks(x))

    forward_features = property()  # nothing else takes images


def test_the_wrapper_of_the_page_for_models_that_must_be_given_their_mask():
    page = Path(__file__).parents[1] / "docs/hosts/index.md"
    (code,) = re.findall(r"```python\n((?:(?!```).)*class Masked.*?)```", page.read_text(), re.DOTALL)
    exec(code, names := {})
    model = Given(64, 8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    masked, images, masking = names["Masked"](model, (8, 8)), photographs(3, 64), EvolvingMask(4)
    teacher = make_teacher(masked)
    for part in (masking, teacher):
        part.set_epoch(3)
    mask = masked.draw(images, masking, teacher)
    assert mask.sum(1).tolist() == [48] * 3
    for each, parts in zip(mask.float(), teacher(images), strict=True):
        assert sum(0 < each[parts == part].mean() < 1 for part in parts.unique()) <= 1
    model(images, mask).square().mean().backward()
    teacher.update(masked)
