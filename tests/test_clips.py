"""Masks in hosts of clips, volumes, spectrograms and waves: where the grid says, as many as the host's, to the end."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from clip_hosts import HOSTS, Embed, Video, make
from hosts import anatomy
from timm.models.vision_transformer import Block
from torch import nn
from vits import MAE

from maskevolve.integrations import apply_to_mae, apply_to_mim
from maskevolve.masks import BlockMask, EvolvingMask, Masking, PartMask, RandomMask, TubeMask
from maskevolve.parts import GraphCutPartitioner, TubePartitioner
from maskevolve.teachers import FrozenTeacher, PartTeacher
from maskevolve.teachers.patch_grid import patch_grid, whole_patches

TAUGHT = [name for name, host in HOSTS.items() if host.can_teach]
CLIPS = [name for name in HOSTS if len(HOSTS[name].grid) == 3]
VIDEO_MAES = [name for name, host in HOSTS.items() if host.put is apply_to_mim]
OTHERS = [name for name in HOSTS if name not in VIDEO_MAES]
ratios = pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.5, 0.75, 0.9])


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


class Ends(Masking):
    """Removes the end of each image, along one axis of the grid that it is given."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def draw(self, batch_size, grid_size, parts, **source):
        place = torch.arange(float(grid_size[self.axis])).view(-1, *[1] * (len(grid_size) - 1 - self.axis))
        return place.expand(batch_size, *grid_size).flatten(1)


def evolve(host, model, epochs=4, tubes=False):
    """With parts from a teacher, where the host can be read."""
    masking, partitioner, teacher = EvolvingMask(epochs, end=BlockMask()), GraphCutPartitioner(), None
    if host.can_teach:
        masking, partitioner = EvolvingMask(epochs), TubePartitioner(partitioner) if tubes else partitioner
        settings = {"total_epochs": epochs, "num_parts": (8, 4), "decay": 0.5}
        teacher = PartTeacher(model.get_submodule(host.body), partitioner, **settings)
    return host.apply(model, TubeMask(masking) if tubes else masking, teacher).set_epoch(2)


def train(host, model, evolution, optimizer, epochs):
    """The masks and losses of two steps an epoch."""
    seen = []
    for epoch in epochs:
        evolution.set_epoch(epoch)
        for step in range(2):
            loss, _ = host.run(model, host.images(seed=step), seed=10 * epoch + step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            evolution.update()
            seen.append((evolution.last_mask, loss.detach()))
    return seen


@torch.no_grad()
def test_the_end_of_each_axis_is_removed_and_the_model_sees_nothing_of_it(name):
    host, model, images = HOSTS[name], make(name).eval(), HOSTS[name].images()
    for axis, side in enumerate(host.grid):
        kept, stride = side // 2, (host.stride or host.kernel)[axis]
        ratio = 1 - kept / side - 1e-6  # for what is rounded down
        evolution = host.apply(model, Ends(axis), ratio=ratio)
        expected = host.run(model, images, ratio)[1]
        mask = evolution.last_mask.view(2, *host.grid).movedim(1 + axis, 1)
        assert mask[:, kept:].all()
        assert not mask[:, :kept].any()
        border = (kept - 1) * stride + host.kernel[axis]
        for hidden, same in ((slice(border, None), True), (slice(stride), False)):
            changed = images.clone()
            host.view(changed).movedim(2 + axis, 0)[hidden].normal_()
            assert torch.equal(host.run(model, changed, ratio)[1], expected) == same
        evolution.remove()


@ratios
@pytest.mark.parametrize("name", OTHERS)
def test_results_are_those_of_the_hosts_own_function(name, ratio):
    host, model = HOSTS[name], make(name)
    body, x = model.get_submodule(host.body), torch.randn(3, math.prod(host.grid), 48)
    of_monai = "MONAI" in name
    method = "_masking" if of_monai else "random_masking"
    own = getattr(body, method)(x, ratio)
    evolution = host.apply(model, RandomMask())
    ours = getattr(body, method)(x, ratio)
    assert [(each.shape, each.dtype) for each in ours] == [(each.shape, each.dtype) for each in own]
    for visible, *others in (own, ours):
        ids_keep, mask = others if of_monai else (others[1].argsort(1)[:, : visible.shape[1]], others[0])
        assert torch.equal(visible, x.take_along_dim(ids_keep[..., None], 1))
        assert torch.equal(mask, torch.ones_like(mask).scatter(1, ids_keep, 0))
        assert others[2:] == [] or torch.equal(others[2], ids_keep)
    assert len(mask.unique(dim=0)) > 1, "each has its own"
    assert host.run(model, host.images(), ratio)[0].isfinite(), "and the decoder takes them"
    assert torch.equal(evolution.last_mask.sum(1), mask[:2].sum(1).float())


def test_noise_that_prithvi_is_given_makes_its_own_mask():
    body, x, noise = make("Prithvi").encoder, torch.randn(2, 60, 48), torch.rand(2, 60)
    own = body.random_masking(x, 0.5, noise)
    apply_to_mae(body, RandomMask())
    assert all(map(torch.equal, body.random_masking(x, 0.5, noise=noise), own))


@ratios
@pytest.mark.parametrize("name", VIDEO_MAES)
def test_our_mask_by_hand_gives_video_mae_the_same_loss(name, ratio):
    host, model, clips, number = HOSTS[name], make(name), HOSTS[name].images(), math.prod(HOSTS[name].grid)
    evolution = host.apply(model, RandomMask(), ratio=ratio)
    given = torch.zeros(2, number, dtype=torch.bool)
    ours, mask = model(clips, given)[0], evolution.last_mask.bool()
    assert mask.sum(1).tolist() == [number - int(number * (1 - ratio))] * 2
    assert not given.any(), "the caller's tensor is left alone"
    if name == "bare VideoMAE":
        assert model(clips)[0].shape == (2, number, 48), "features are those of whole clips"
    else:
        assert not torch.equal(model(clips, None)[0], ours), "in training, none need be given"
    evolution.remove()
    assert torch.equal(model(clips, mask)[0], ours)


def test_a_resumed_run_goes_on_with_the_same_masks_and_losses(name):
    host, saved = HOSTS[name], None
    for seed in (0, 7):
        model = make(name, seed)
        run = model, evolve(host, model), torch.optim.AdamW(model.parameters(), 1e-3)
        if saved is None:
            train(host, *run, (0, 1))
            saved = copy.deepcopy([part.state_dict() for part in run])
            expected = train(host, *run, (2, 3))
        else:
            for part, state in zip(run, saved, strict=True):
                part.load_state_dict(state)
            assert run[1].epoch == 1
            for whole, resumed in zip(expected, train(host, *run, (2, 3)), strict=True):
                assert all(map(torch.equal, whole, resumed))


def test_removal_leaves_the_model_as_it_was(name):
    host, model, images = HOSTS[name], make(name), HOSTS[name].images()
    expected, before = host.run(model, images), anatomy(model)
    evolution = evolve(host, model)
    assert not torch.equal(host.run(model, images)[1], expected[1])
    evolution.remove()
    assert all(map(torch.equal, host.run(model, images), expected))
    assert anatomy(model) == before


@pytest.mark.parametrize("tubes", [True, False], ids=["tubes", "space and time"])
@pytest.mark.parametrize("name", [name for name in TAUGHT if name not in ("waves", "bare VideoMAE")])
def test_the_loss_falls_while_masks_become_parts(name, tubes):
    host, model = HOSTS[name], make(name)
    evolution = evolve(host, model, 6, tubes)
    losses = [loss for _, loss in train(host, model, evolution, torch.optim.AdamW(model.parameters(), 3e-3), range(6))]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert 1 < evolution.num_parts <= 4
    parts, mask = (each.view(2, *host.grid) for each in (evolution.last_parts, evolution.last_mask))
    for each, labels in zip(mask, parts, strict=True):
        assert sum(0 < each[labels == label].mean() < 1 for label in labels.unique()) <= 1, "torn parts"
    if tubes:
        assert torch.equal(parts, parts[:, :1].expand_as(parts))
        assert ((mask != mask[:, :1]).any(1).flatten(1).sum(1) <= 1).all(), "one tube is cut for the host's count"


@pytest.mark.parametrize("name", CLIPS)
def test_parts_that_come_with_the_clips(name):
    host, model = HOSTS[name], make(name)
    evolution = host.apply(model, PartMask())
    labels = torch.arange(math.prod(host.grid)).expand(2, -1) % 7
    cells = labels.view(2, *host.grid)
    maps = cells.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for given in (labels, cells, maps):
        evolution.see(parts=given)
        host.run(model, host.images())
        assert torch.equal(evolution.last_parts, labels)
    evolution.see(parts=maps[:, 0])
    with pytest.raises(ValueError, match=rf"parts has shape \[2, 24, 40\].*\({host.grid[0]}, 3, 5\)"):
        host.run(model, host.images())


def picture_teacher(transform):
    seen = {"transform": lambda clips: nn.functional.interpolate(transform(clips), (64, 64))}
    return FrozenTeacher(MAE(), GraphCutPartitioner(), total_epochs=4, num_parts=(5, 5), **seen)


@pytest.mark.parametrize("name", ["mae_st", "SatMAE of time"])
def test_a_frozen_teacher_of_pictures_cuts_one_picture_of_a_clip_or_each_of_them(name):
    host, model, clips, depth = HOSTS[name], make(name), HOSTS[name].images(), HOSTS[name].kernel[0]
    one, seen = picture_teacher(lambda clips: host.view(clips)[:, :, 0]), []
    for teacher in (one, picture_teacher(lambda clips: host.view(clips)[:, :, ::depth].transpose(1, 2).flatten(0, 1))):
        evolution = host.apply(model, PartMask(), teacher).set_epoch(0)
        host.run(model, clips)
        seen.append(evolution.last_parts.view(2, -1, 15))
        evolution.remove()
    frames = [one(host.view(host.view(clips)[:, :, time:]), grid_size=(3, 5)) for time in range(0, depth * 3, depth)]
    assert torch.equal(seen[0], frames[0][:, None].expand_as(seen[0]))
    for time, alone in enumerate(frames):
        assert torch.equal(*(each[:, :, None] == each[:, None] for each in (seen[1][:, time], alone))), "its own parts"
    for clip in seen[1]:
        numbers = [set(frame.tolist()) for frame in clip]
        assert len(set.union(*numbers)) == sum(map(len, numbers)) > 4, "no two frames share a number"


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda clips: clips[:, :, :3].transpose(1, 2).flatten(0, 1), "made 3 pictures of each image, for 4 x 3 x 5"),
        (lambda clips: clips[:, :, :3].transpose(1, 2).flatten(0, 1)[1:], r"returned \[5, 3.* must return \[2, C"),
        (lambda clips: clips[:1, :, 0], r"returned \[1, 3.* \[2, 3, 8, 24, 40\], but must return \[2, C"),
    ],
)
def test_a_transform_that_makes_another_number_of_pictures_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        picture_teacher(transform)(HOSTS["mae_st"].images(), grid_size=(4, 3, 5))


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_is_shown_the_pixels_that_the_host_embeds(name):
    host, body, images = HOSTS[name], make(name).get_submodule(HOSTS[name].body), HOSTS[name].images()
    assert patch_grid(body, images) == host.grid
    border = (slice(None), slice(None), slice(4, -4), slice(4, -4)) if host.stride else ...  # of overlapping patches
    assert torch.equal(whole_patches(body, images), host.view(images)[border])


def test_of_as_many_frames_as_channels_the_channels_come_first_but_in_hugging_face():
    clips = torch.randn(2, 3, 3, 24, 40)
    assert torch.equal(whole_patches(Video(3, 1), clips), clips)
    assert torch.equal(whole_patches(make("VideoMAE of three frames"), clips), clips.transpose(1, 2))


@pytest.mark.parametrize("masking", [BlockMask(), TubeMask(RandomMask())])
@pytest.mark.parametrize("name", ["SatMAE of time", "SatMAE of channels"])
def test_a_grid_that_the_embedding_does_not_tell_must_be_said(name, masking):
    def run(**options):
        model = make(name)
        apply_to_mae(model, masking, **options)
        HOSTS[name].run(model, HOSTS[name].images())

    with pytest.raises(ValueError, match=r"grid_size="):
        run()
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) has 2 x 3 x 5 = 30 patches, but there are N=45"):
        run(grid_size=(2, 3, 5))
    run(grid_size=(3, 3, 5))


class FramesFirst(Video):
    """One that transposes clips before it embeds them."""

    def forward_encoder(self, x, mask_ratio):
        return super().forward_encoder(x.transpose(1, 2), mask_ratio)

    def forward_loss(self, images, prediction, mask):
        return super().forward_loss(images.transpose(1, 2), prediction, mask)


class Backwards(Video):
    """One whose patches are in another order."""

    def forward_encoder(self, x, mask_ratio):
        x, mask, ids_restore, _ = self.random_masking(self.patch_embed(x).transpose(1, 2).flatten(1, 2), mask_ratio)
        return self.run_blocks(x), mask, ids_restore


class Dated(Video):
    """One that must be given more than clips."""

    def forward_encoder(self, x, dates, mask_ratio):
        return super().forward_encoder(x, mask_ratio)

    def forward(self, x, dates):
        return self.forward_encoder(x, dates, 0.75)


@pytest.mark.parametrize("frames", [8, 3])
def test_a_model_that_transposes_clips_is_taught_the_clips_that_it_is_given(frames):
    torch.manual_seed(0)
    model = FramesFirst(frames, frames // 3 or 1)
    model.frames_first = True  # which matters with as many frames as channels
    teacher = PartTeacher(model, TubePartitioner(GraphCutPartitioner()), total_epochs=4, num_parts=(4, 4))
    evolution = apply_to_mae(model, TubeMask(EvolvingMask(4)), teacher).set_epoch(3)
    clips = torch.randn(2, frames, 3, 24, 40)
    assert model(clips)[0].isfinite()
    parts = evolution.last_parts.unflatten(1, (-1, 15))
    assert torch.equal(parts, parts[:, :1].expand_as(parts))
    assert torch.equal(teacher(clips, (parts.shape[1], 3, 5)), evolution.last_parts)


def test_an_order_that_cannot_be_seen_is_refused_and_a_grid_that_is_said_wrongly():
    with pytest.raises(ValueError, match="where half of a picture changed"):
        apply_to_mae(Backwards(), TubeMask(RandomMask()))
    hidden = Dated()
    with pytest.raises(ValueError, match=r"the order of its patches cannot be seen: say it with grid_size="):
        apply_to_mae(hidden, TubeMask(RandomMask()))
    evolution = apply_to_mae(hidden, TubeMask(RandomMask()), grid_size=(4, 3, 5))
    hidden(torch.randn(2, 3, 8, 24, 40), None)
    mask = evolution.last_mask.view(2, 4, 15)
    assert ((mask != mask[:, :1]).any(1).sum(1) <= 1).all(), "one tube at most is cut"
    evolution.remove()
    apply_to_mae(hidden, TubeMask(RandomMask()), grid_size=(4, 5, 3))
    with pytest.raises(ValueError, match=r"\(4, 5, 3\) was said, but the patch embedding makes 4 x 3 x 5"):
        hidden(torch.randn(2, 3, 8, 24, 40), None)


class Given(nn.Module):
    """As the encoder of the official VideoMAE: given its mask, it runs what that leaves."""

    def __init__(self):
        super().__init__()
        self.patch_embed = Embed(3, (2, 8, 8), patch_size=(8, 8), img_size=(24, 40), num_patches=60)
        self.positions = torch.randn(1, 60, 48)
        self.blocks = nn.ModuleList([Block(48, 3), Block(48, 3)])

    def forward(self, clips, mask):
        x = self.patch_embed(clips) + self.positions
        return nn.Sequential(*self.blocks)(x[~mask].view(len(x), -1, 48))


def test_the_wrapper_of_the_page_draws_tubes_of_clips():
    page = Path(__file__).parents[1] / "docs/hosts/index.md"
    (code,) = re.findall(r"```python\n((?:(?!```).)*class Masked.*?)```", page.read_text(), re.DOTALL)
    exec(code, names := {})
    masked, masking, clips = (
        names["Masked"](Given(), (4, 3, 5)),
        TubeMask(EvolvingMask(4)),
        torch.randn(2, 3, 8, 24, 40),
    )
    teacher = PartTeacher(masked, TubePartitioner(GraphCutPartitioner()), total_epochs=4, num_parts=(4, 4))
    masking.set_epoch(3)
    mask = masked.draw(clips, masking, teacher, 0.6)
    assert mask.view(2, 4, 15).sum(2).tolist() == [[9] * 4] * 2
    assert masked.model(clips, mask).shape == (2, 24, 48)
    teacher.update(masked)
