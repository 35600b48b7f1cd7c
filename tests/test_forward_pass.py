"""Which batch is this? A mask belongs to the images and labels of the forward pass that it is drawn in."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from test_mae import Unfolded
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import MAE, make_teacher

from maskevolve import EvolvingMask, GridMask, PartMask, PartTeacher, RandomMask
from maskevolve.integrations import apply_to_mae, evolution_of


def labels_for(seed, batch=2):
    return torch.randint(7, (batch, 64), generator=torch.Generator().manual_seed(seed))


def pictures(seed=0, batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def parts_by_content(images):
    """A teacher whose labels tell which images it was given."""
    return (images.flatten(1).sum(1, keepdim=True) * 1000).long().abs() % 97 + torch.arange(64) // 16 * 100


class TestGivenParts:
    @pytest.mark.parametrize(
        "fill",
        [
            lambda buffer, images: buffer.numpy().__setitem__(slice(None), images.numpy()),
            lambda buffer, images: buffer.data.copy_(images),
            lambda buffer, images: buffer.copy_(images),
        ],
    )
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_a_buffer_that_is_filled_again(self, fill, mode):
        model, buffer = MAE(), pictures()
        evolution = apply_to_mae(model, PartMask(), parts_by_content)
        with mode():
            evolution.see(parts=labels_for(1))
            model(buffer)
            assert torch.equal(evolution.last_parts, labels_for(1))
            fill(buffer, pictures(1))
            model(buffer)
            assert torch.equal(evolution.last_parts, parts_by_content(buffer))

    def test_one_rule_for_maps_and_for_labels_of_patches(self):
        labels = labels_for(0)
        labels[:, :9], labels[:, 9:12] = 255, -1
        labels[:, 20:] += 300
        model, seen = MAE(), {}
        evolution = apply_to_mae(model, PartMask())
        for name, given in {"patches": labels, "map": labels.view(2, 8, 8), "bytes": labels.int().numpy()}.items():
            for ignore in (None, 255, -1):
                evolution.see(parts=given, ignore=ignore)
                model(pictures())
                parts = evolution.last_parts
                seen.setdefault(ignore, parts)
                assert torch.equal(parts, seen[ignore]), (name, ignore)
                assert parts.min() >= 0

    def test_labels_that_are_ignored_do_not_vote(self):
        model, maps = MAE(), torch.full((1, 64, 64), 255)
        maps[:, ::8, ::8] = 3  # a pixel of each patch
        evolution = apply_to_mae(model, PartMask())
        evolution.see(parts=maps, ignore=255)
        model(pictures(batch=1))
        assert evolution.last_parts.unique().tolist() == [3]


class Prepared(MAE):
    """Does something to its images before it embeds them."""

    def __init__(self, prepare):
        super().__init__()
        self.prepare = prepare

    def forward_encoder(self, x, mask_ratio):
        return super().forward_encoder(self.prepare(x), mask_ratio)

    def forward_loss(self, images, prediction, mask):
        return prediction.mean()


PREPARATIONS = {
    "normalised": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.1),
    "logarithm": lambda x: (x.abs() + 1e-3).log(),
    "scaled": lambda x: x / 255 - 0.5,
}


class TestImages:
    @pytest.mark.parametrize("name", PREPARATIONS)
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_what_a_model_does_before_it_embeds_is_done_once(self, name, checkpointed):
        model, images = Prepared(PREPARATIONS[name]), pictures().requires_grad_()
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(5)
        if checkpointed:
            checkpoint(lambda x: model(x)[0], images, use_reentrant=False).backward()
        else:
            model(images)
        assert torch.equal(evolution.last_parts, evolution.teacher(images))

    def test_coordinates_as_channels(self):
        class Coordinates(MAE):
            def __init__(self):
                super().__init__()
                self.patch_embed.proj = nn.Conv2d(5, 48, 8, 8)
                self.patch_embed.in_chans = 3

            def forward_encoder(self, x, mask_ratio):
                rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
                return super().forward_encoder(
                    torch.cat([x, torch.stack([rows, columns]).expand(len(x), -1, -1, -1)], 1), mask_ratio
                )

        model, images, seen = Coordinates(), pictures(), []
        model.img_size, model.in_chans = 64, 3

        def teacher(x):
            seen.append(x)
            return parts_by_content(x)

        apply_to_mae(model, PartMask(), teacher)
        model(images)
        assert torch.equal(seen[0], images)

    def test_a_pass_without_a_mask_leaves_nothing(self):
        model = MAE()
        evolution = apply_to_mae(model, PartMask())
        evolution.see(parts=labels_for(0))
        images = pictures()
        with pytest.raises(AssertionError):
            model(images[:, :, :32])
        with pytest.raises(ValueError, match="needs parts"):
            model(images)
        model.patch_embed(images)
        gone = weakref.ref(images)
        del images
        gc.collect()
        assert gone() is None


class Siamese(MAE):
    """Embeds two frames, in one method, before it masks the first, the second or both."""

    def __init__(self, masked, joined=False):
        super().__init__()
        self.masked, self.joined = masked, joined

    def frames(self, first, second, mask_ratio):
        tokens = [self.patch_embed(frame) + self.pos_embed for frame in (first, second)]
        return [self.random_masking(tokens[place], mask_ratio) for place in self.masked]

    def forward(self, first, second, mask_ratio=0.75):
        if self.joined:
            return [self.forward_encoder(each, mask_ratio)[1] for each in (first, second)]
        return [masked[1] for masked in self.frames(first, second, mask_ratio)]


class TestTwoFrames:
    @pytest.mark.parametrize("masked", [(0,), (1,), (0, 1), (1, 0)])
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_masks_are_those_of_the_frame(self, masked, grad, batch):
        model, frames, asked = Siamese(masked), (pictures(0, batch), pictures(1, batch)), []

        def teacher(images):
            asked.append(next(place for place in (0, 1) if torch.equal(images, frames[place])))
            return parts_by_content(images)

        evolution = apply_to_mae(model, PartMask(), teacher)
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("error")
            if batch == 1 and not grad:  # nothing tells the two apart
                with pytest.raises(RuntimeError, match=r"see\(images"):
                    model(*frames)
                evolution.see(frames[masked[0]])
                if len(masked) == 1:
                    model(*frames)
                    assert asked == list(masked)
                return
            for _ in range(3):
                masks = model(*frames)
        assert asked == list(masked) * 3
        assert [mask.sum(1).tolist() for mask in masks] == [[48] * batch] * len(masked)

    def test_each_in_a_pass_of_its_own(self):
        model, frames = Siamese((), joined=True), (pictures(0), pictures(1))
        evolution = apply_to_mae(model, PartMask(), parts_by_content)
        evolution.see(parts=labels_for(0))
        used, draw = [], evolution.masking.draw
        evolution.masking.draw = lambda *args, **source: used.append(args[2]) or draw(*args, **source)
        model(*frames)
        assert torch.equal(used[0], labels_for(0)), "labels are those of the frame that is masked first"
        assert torch.equal(used[1], parts_by_content(frames[1]))

    def test_without_parts_no_warning(self):
        model = Siamese((1,))
        apply_to_mae(model, GridMask())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                model(pictures(0), pictures(1))


class TestPickle:
    def test_a_pickled_evolution_takes_labels_and_says_that_no_optimizer_is_followed(self):
        model, images = MAE(), pictures()
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(5)
        evolution.follow(torch.optim.SGD(model.parameters(), 0.1))
        again, its = pickle.loads(pickle.dumps((model, evolution)))
        assert its.model is again
        its.see(parts=labels_for(1))
        again(images)
        assert torch.equal(its.last_parts, labels_for(1))
        step = torch.optim.SGD(again.parameters(), 0.0)
        for _ in range(2):
            again(images)[0].backward()
            step.step()
        with pytest.warns(UserWarning, match="never updated"):
            again(images)
        its.follow(step)
        with pytest.raises(ValueError, match="already"):
            apply_to_mae(again, RandomMask())

    def test_a_model_saved_whole(self, tmp_path):
        model = MAE()
        apply_to_mae(model, GridMask())
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert evolution_of(again).model is again
        assert evolution_of(MAE()) is None
        grid = again(pictures())[2].view(2, 4, 2, 4, 2)
        assert torch.equal(grid, grid[:, :1, :, :1].expand_as(grid))


class TestStates:
    @pytest.mark.parametrize("change", ["alpha", "teacher", "length"])
    def test_a_state_that_is_refused_changes_nothing(self, change):
        model, other = MAE(), MAE()
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(2)
        state = apply_to_mae(other, EvolvingMask(10), make_teacher(other)).set_epoch(7).state_dict()
        if change == "alpha":
            state["masking"]["alpha"].fill_(0.123)
        elif change == "teacher":
            state["teacher"]["more"] = torch.zeros(1)
        else:
            state["total_epochs"] = 20
        before = copy.deepcopy(evolution.state_dict())
        with pytest.raises((ValueError, RuntimeError)):
            evolution.load_state_dict(state)
        after = evolution.state_dict()
        for name in ("masking", "teacher"):
            assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
        assert (evolution.epoch, evolution.alpha) == (2, pytest.approx(0.3**0.5))

    def test_a_state_can_be_written_to_without_harm(self):
        """As distributed checkpoints load: in place, before `load_state_dict` has seen it."""
        model = MAE()
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(2)
        for part in ("masking", "teacher"):
            for value in evolution.state_dict()[part].values():
                value.zero_()
        assert evolution.epoch == 2
        assert evolution.teacher.model.module.pos_embed.abs().sum() > 0


class TestAfterRemoval:
    @pytest.mark.parametrize("name", ["set_epoch", "update", "see", "fixed", "follow"])
    def test_nothing_is_silently_not_done(self, name):
        model = MAE()
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model))
        evolution.remove()
        arguments = {"set_epoch": (1,), "see": (pictures(),), "follow": (torch.optim.SGD(model.parameters(), 0.1),)}
        with pytest.raises(RuntimeError, match="remove"), getattr(evolution, name)(*arguments.get(name, ())):
            pass

    def test_a_patch_size_goes_with_the_masks(self):
        model = MAE()
        model.patch_embed = Unfolded()
        apply_to_mae(model, GridMask(), patch_size=8).remove()
        assert "patch_size" not in vars(model.patch_embed)
        with pytest.raises(ValueError, match="patch_size"):
            apply_to_mae(model, GridMask())


def test_what_it_is_at_is_at_hand():
    model = MAE()
    evolution = apply_to_mae(model, EvolvingMask(10), lambda images: torch.arange(64).expand(len(images), -1) // 16)
    assert (evolution.epoch, evolution.alpha, evolution.num_parts) == (0, 0, None)
    evolution.set_epoch(2.5)
    model(pictures())
    assert (evolution.epoch, evolution.alpha) == (2.5, pytest.approx(0.35**0.5))
    assert evolution.num_parts == 4
    assert all(word in repr(evolution) for word in ("EvolvingMask", "epoch=2.5", "alpha=0.59", "num_parts=4"))
    assert apply_to_mae(MAE(), RandomMask()).epoch is None


def test_fixed_masks_of_a_teacher_that_draws():
    from maskevolve import EMPartitioner

    model, images = MAE().eval(), pictures(batch=6)
    teacher = PartTeacher(model, EMPartitioner(), total_epochs=10, num_parts=(8, 4))
    evolution = apply_to_mae(model, PartMask(), teacher)
    passes = []
    for batch in (6, 6, 4):
        state = torch.get_rng_state()
        with evolution.fixed(3), torch.no_grad():
            passes.append(torch.cat([model(each)[2] for each in images.split(batch)]))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])


def test_labels_of_patches_in_one_or_three_dimensions():
    class Video(MAE):
        """Patches of 2 x 8 x 8 pixels of four frames."""

        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Sequential(nn.Conv3d(3, 48, (2, 8, 8), (2, 8, 8)), nn.Flatten(2))
            self.pos_embed = nn.Parameter(torch.randn(1, 128, 48))

        def forward(self, clips):
            return self.random_masking(self.patch_embed(clips).mT + self.pos_embed, 0.75)[1]

    model, parts = Video(), torch.arange(128).expand(2, -1) // 16
    evolution = apply_to_mae(model, PartMask(), grid_size=(2, 8, 8))
    evolution.see(parts=parts)
    mask = model(torch.randn(2, 3, 4, 64, 64))
    assert mask.view(2, 8, 16).sum(2).unique().tolist() == [0, 16], "whole parts"
    evolution.see(parts=parts.view(2, 2, 8, 8).repeat_interleave(3, 3))
    assert torch.equal(model(torch.randn(2, 3, 4, 64, 64)), evolution.last_mask)
    assert torch.equal(evolution.last_parts, parts)
    evolution.see(parts=parts.view(2, 8, 16))
    with pytest.raises(ValueError, match=r"\[2, 8, 16\].*along 3 axes"):
        model(torch.randn(2, 3, 4, 64, 64))


def test_an_empty_batch():
    model = MAE().eval()
    evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(5)
    assert model.forward_encoder(pictures(batch=0), 0.75)[1].shape == (0, 64)
    with evolution.fixed():
        assert model.forward_encoder(pictures(batch=0), 0.75)[1].shape == (0, 64)


def test_a_trainer_that_trains_another_model():
    model = MAE(depth=1)
    other = copy.deepcopy(model)
    evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(5)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    evolution.follow(optimizer)
    other(pictures())[0].backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="another model"):
        optimizer.step()
