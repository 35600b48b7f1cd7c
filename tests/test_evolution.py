"""What all integrations share: parts from anywhere, threads, steps of optimizers, and what is hooked but not used."""

import copy
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytorch_lightning as pl
import timm
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from vits import MAE, make_teacher

from maskevolve import EvolvingMask, GraphCutPartitioner, PartMask, PartTeacher, RandomMask
from maskevolve.integrations import apply_to_mae, apply_to_timm

QUADRANTS = torch.arange(64).view(8, 8) // 4 % 2 + torch.arange(64).view(8, 8) // 32 * 2  # of a grid of 8 x 8 patches


def torn(mask, parts):
    """How many parts of each image are removed in part only."""
    pairs = zip(mask.bool(), parts, strict=True)
    return [sum(one[of == part].unique().numel() == 2 for part in of.unique()) for one, of in pairs]


def random_parts(batch, seed=0):
    """[B, 64], seven in each image, whose patches are scattered."""
    return torch.randint(7, (batch, 64), generator=torch.Generator().manual_seed(seed))


class TestPartsFromAnywhere:
    @pytest.mark.parametrize(
        "labels",
        [
            QUADRANTS.view(1, 64).to(torch.uint16),
            QUADRANTS[None],
            QUADRANTS[None].repeat_interleave(5, 1).repeat_interleave(5, 2),
            torch.tensor([[[0, 1], [2, 3]]]),
            torch.tensor([[[-1, 255], [7, -(10**6)]]]),
        ],
        ids=["patches", "grid", "finer", "coarser", "sparse"],
    )
    @pytest.mark.parametrize("kind", ["function", "module", "numpy", "given"])
    def test_maps_of_any_size(self, labels, kind):
        class Module(nn.Module):
            def forward(self, images):
                return labels.expand(len(images), *labels.shape[1:])

        sources = {"function": Module().forward, "module": Module(), "given": None}
        sources["numpy"] = lambda images: Module()(images).numpy()
        model, images = MAE(), torch.randn(3, 3, 64, 64)
        evolution = apply_to_mae(model, PartMask(), sources[kind])
        for _ in range(3):
            if kind == "given":
                evolution.see(parts=Module()(images))
            mask = model(images)[2]
            assert mask.sum(1).tolist() == [48] * 3
            assert torn(mask, QUADRANTS.view(1, 64).expand(3, -1)) == [0] * 3  # 48 of 64: three of four
            assert torn(evolution.last_parts, QUADRANTS.view(1, 64).expand(3, -1)) == [0] * 3
            assert torch.equal(evolution.last_mask, mask)

    def test_no_average_of_the_student_and_no_second_pass(self):
        model, passes = MAE(), []
        copied, embedded = copy.deepcopy, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy, "deepcopy", lambda *args: passes.append(args) or copied(*args))
            evolution = apply_to_mae(model, EvolvingMask(10), lambda images: QUADRANTS.expand(len(images), -1, -1))
            model.patch_embed.register_forward_hook(lambda *_: embedded.append(1))
            evolution.set_epoch(5)
            evolution.follow(torch.optim.SGD(model.parameters(), 0.1))
            model(torch.randn(2, 3, 64, 64))
            evolution.update()
        assert not passes
        assert embedded == [1]
        assert evolution.state_dict()["teacher"] is None

    def test_a_teacher_that_asks_for_the_grid_and_the_epoch_gets_them(self):
        class Frozen(nn.Module):
            def set_epoch(self, epoch):
                self.epoch = epoch
                return self

            def forward(self, images, grid_size=None):
                self.grid_size = grid_size
                return QUADRANTS.view(1, 64).expand(len(images), -1)

        model, teacher = MAE(), Frozen()
        evolution = apply_to_mae(model, EvolvingMask(10), teacher).set_epoch(7)
        model(torch.randn(2, 3, 64, 64))
        evolution.update()  # it has none
        assert (teacher.epoch, teacher.grid_size) == (7, (8, 8))
        evolution.load_state_dict(evolution.state_dict())

    def test_a_map_of_one_image_from_a_function(self):
        model = MAE()
        apply_to_mae(model, PartMask(), lambda images: torch.zeros(64, 64, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\[64, 64\], but 1 images.*labels\[None\]"):
            model(torch.randn(1, 3, 64, 64))

    def test_forgotten_given_twice_or_of_another_batch(self):
        model, images = MAE(), torch.randn(3, 3, 64, 64)
        evolution = apply_to_mae(model, PartMask())
        evolution.see(parts=random_parts(3))
        model(images)
        with pytest.raises(ValueError, match=r"PartMask needs parts.*none were given.*evolution\.see\(parts=labels\)"):
            model(torch.randn(3, 3, 64, 64))
        evolution.see(parts=random_parts(3))
        with pytest.raises(RuntimeError, match=r"given twice.*DistributedDataParallel"):
            evolution.see(parts=random_parts(3))
        evolution.see(parts=random_parts(2))
        with pytest.raises(ValueError, match=r"\[2, 64\], but 3 images"):
            model(images)
        evolution.see(parts=torch.zeros(40, 48, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\[40, 48\], but 3 .*labels\[None\]"):
            model(images)
        evolution.see(parts=torch.zeros(3, 1, 64, 64, dtype=torch.long))
        with pytest.raises(ValueError, match=r"parts has shape \[3, 1, 64, 64\].*labels\[:, 0\]"):
            model(images)
        evolution.see(parts=random_parts(3))
        model(images)

    @pytest.mark.parametrize(
        ("labels", "error"),
        [
            (None, ValueError),
            ([[0, 1]], TypeError),
            (torch.rand(2, 64), ValueError),
            (torch.zeros(2, 1, 64, 64, dtype=torch.long), ValueError),
            (torch.zeros(2, 63, dtype=torch.long), ValueError),
            (QUADRANTS[None], ValueError),
        ],
    )
    @pytest.mark.parametrize("given", [True, False])
    def test_what_are_no_labels(self, labels, error, given):
        model = MAE()
        evolution = apply_to_mae(model, PartMask(), None if given else lambda images: labels)

        def mask():
            if given:
                evolution.see(parts=labels)
            model(torch.randn(2, 3, 64, 64))

        with pytest.raises(TypeError if labels is None and not given else error):
            mask()

    @pytest.mark.parametrize("teacher", [GraphCutPartitioner(), RandomMask(), PartTeacher, 3])
    def test_what_is_no_source(self, teacher):
        with pytest.raises(TypeError, match=r"no function from images to labels: pass PartTeacher\(model"):
            apply_to_mae(MAE(), PartMask(), teacher)

    def test_a_mask_that_takes_no_parts_leaves_them(self):
        model = MAE()
        evolution = apply_to_mae(model, RandomMask())
        for _ in range(2):
            evolution.see(parts=random_parts(2))
        model(torch.randn(2, 3, 64, 64))
        assert evolution.last_parts is None


class TestThreads:
    @pytest.mark.parametrize("given", [False, True])
    def test_each_thread_masks_with_the_parts_of_its_own_images(self, given):
        model, barrier = MAE(), threading.Barrier(2)
        images = torch.rand(2, 3, 3, 64, 64)
        evolution = apply_to_mae(model, PartMask(), lambda images: random_parts(3, int(1000 * images[0, 0, 0, 0])))

        def wait(*_):  # until both threads have embedded their images
            barrier.wait(60)

        model.patch_embed.register_forward_hook(wait)

        def run(images):
            if given:
                evolution.see(parts=evolution.teacher(images + 1))
            return model(images)[2]

        with ThreadPoolExecutor(2) as threads:
            masks = list(threads.map(run, images))
        for mask, each in zip(masks, images + given, strict=True):
            assert max(torn(mask, evolution.teacher(each))) <= 1

    def test_one_thread_at_a_time_reads_the_teacher(self):
        running, most = [], []

        def teacher(images):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()
            return QUADRANTS.expand(len(images), -1, -1)

        model = MAE(depth=1)
        apply_to_mae(model, PartMask(), teacher)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(model, torch.randn(4, 1, 3, 64, 64)))
        assert most == [1] * 4

    def test_parts_given_in_another_thread_are_not_used_and_said_to_be(self):
        """As nn.DataParallel would have it, which calls replicas in threads of its own, with a share of the images."""
        model = MAE()
        evolution = apply_to_mae(model, PartMask())
        evolution.see(parts=random_parts(4))

        def run():
            with pytest.raises(ValueError, match="none were given"):
                model(torch.randn(2, 3, 64, 64))

        with ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel"):
            evolution.see(parts=random_parts(4))


class Unhooked(torch.optim.Optimizer):
    """Wraps another as Lookahead of timm does, without Optimizer.__init__."""

    def __init__(self, base):
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class DeepSpeedLike:
    """No Optimizer, with one inside that steps before weights are cast, and steps that overflow."""

    def __init__(self, optimizer):
        self.optimizer, self.overflow, self.param_groups = optimizer, False, optimizer.param_groups

    def step(self, closure=None):
        if not self.overflow:
            self.optimizer.step()


class Scaler:
    """A GradScaler, which skips every other step."""

    steps = 0

    def step(self, optimizer, *args):
        self.steps += 1
        if self.steps % 2:
            optimizer.step(*args)

    def update(self):
        pass


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def followed():
    """A model and its evolution, whose updates are counted."""
    model = MAE(depth=1)
    evolution, updates = apply_to_mae(model, EvolvingMask(10), make_teacher(model)), []
    evolution.update = lambda: updates.append(1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, evolution, updates


class TestFollow:
    @pytest.mark.parametrize(
        "wrap",
        [lambda base: base, Unhooked, DeepSpeedLike, timm.optim.Lookahead, pl.core.optimizer.LightningOptimizer],
        ids=["bare", "unhooked", "DeepSpeed", "Lookahead", "Lightning"],
    )
    def test_an_update_after_each_step(self, followed, wrap):
        model, evolution, updates = followed
        base = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = wrap(base)
        handle = evolution.follow(optimizer)
        with pytest.raises(ValueError, match="followed already"):
            evolution.follow(optimizer)
        stepping = base if isinstance(optimizer, pl.core.optimizer.LightningOptimizer) else optimizer
        for steps in (1, 2):
            stepping.step()
            assert len(updates) == steps
        handle.remove()
        stepping.step()
        assert len(updates) == 2
        evolution.follow(optimizer)
        stepping.step()
        assert len(updates) == 3
        evolution.remove()
        stepping.step()
        assert len(updates) == 3

    def test_steps_of_deepspeed_that_overflow(self, followed):
        model, evolution, updates = followed
        optimizer = DeepSpeedLike(torch.optim.SGD(model.parameters(), 0.1))
        evolution.follow(optimizer)
        for overflow, count in ((True, 0), (False, 1), (True, 1)):
            optimizer.overflow = overflow
            optimizer.step()
            assert len(updates) == count

    def test_fused_optimizers_are_told_of_overflow(self, followed):
        """They are always called by a GradScaler, and skip their step themselves."""
        model, evolution, updates = followed
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1, fused=True), torch.amp.GradScaler("cpu")
        evolution.follow(optimizer)
        for grad, count in ((torch.inf, 0), (0.0, 1)):
            scaler.scale(torch.zeros(()))
            model.norm.bias.grad.fill_(grad)
            scaler.step(optimizer)
            scaler.update()
            assert len(updates) == count

    @pytest.mark.parametrize("before", [True, False])
    def test_accelerate(self, followed, accelerator, before):
        model, evolution, updates = followed
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if before:
            evolution.follow(optimizer)
        optimizer = accelerator.prepare(optimizer)
        if not before:
            evolution.follow(optimizer)
        for count in (0, 1, 1, 2):  # two batches a step
            with accelerator.accumulate(model):
                optimizer.step()
            assert len(updates) == count
        optimizer.scaler = Scaler()
        optimizer.__setstate__({})  # as unpickling would, for it had no scaler
        for count in (2, 3, 3, 3):
            with accelerator.accumulate(model):
                optimizer.step()
            assert len(updates) == count

    def test_what_is_no_optimizer(self, followed):
        model, evolution, updates = followed
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for other in (model, scheduler, torch.optim.AdamW, DeepSpeedLike, "adam", None, 3, [optimizer], Scaler()):
            with pytest.raises(TypeError, match=r"(?s)optimizer=.* is no optimizer.*pass the optimizer itself"):
                evolution.follow(other)
        optimizer.step()
        scheduler.step()
        assert not updates


class AudioMAE(MAE):
    """Masks by another method where it is told to."""

    def forward_encoder(self, x, mask_ratio):
        x = self.patch_embed(x) + self.pos_embed
        x, mask, ids_restore = MAE.random_masking(self, x, mask_ratio)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1), mask, ids_restore


class TestHookedIsNotUsed:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_no_mask_is_drawn(self, compiled):
        torch._dynamo.reset()
        model = AudioMAE(depth=1)
        evolution = apply_to_mae(model, RandomMask()).set_epoch(0)
        call = torch.compile(model, backend="eager") if compiled else model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(torch.randn(2, 3, 64, 64))
        with pytest.warns(UserWarning, match=r"not masked: AudioMAE\.random_masking, which draws the evolving masks"):
            evolution.set_epoch(1) if compiled else call(torch.randn(2, 3, 64, 64))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(torch.randn(2, 3, 64, 64))
            evolution.update()
        torch._dynamo.reset()

    def test_a_rate_of_zero(self):
        vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, patch_drop_rate=0.75).train()
        evolution = apply_to_timm(vit, RandomMask())
        vit.patch_drop.prob = 0
        vit(torch.randn(1, 3, 64, 64))
        with pytest.warns(UserWarning, match=r"PatchDropout\.forward"):
            evolution.update()

    def test_evaluation_is_no_training(self):
        model = AudioMAE(depth=1)
        evolution = apply_to_mae(model, RandomMask())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                model.eval()(torch.randn(2, 3, 64, 64))
                with torch.no_grad():
                    model.train()(torch.randn(2, 3, 64, 64))
            evolution.update()

    @pytest.mark.parametrize(("updated", "compiled"), [(False, False), (True, False), (False, True)])
    def test_the_teacher_is_never_updated(self, updated, compiled):
        torch._dynamo.reset()
        model = MAE(depth=1)
        evolution = apply_to_mae(model, EvolvingMask(10), make_teacher(model)).set_epoch(5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        call = torch.compile(model, backend="eager") if compiled else model
        caught = []
        for _ in range(5):
            for _ in range(2):  # batches a step
                with warnings.catch_warnings(record=True) as caught_now:
                    warnings.simplefilter("always")
                    call(torch.randn(2, 3, 64, 64))[0].backward()
                caught += [each for each in caught_now if "never updated" in str(each.message)]
            optimizer.step()
            if updated:
                evolution.update()
        assert len(caught) == (0 if updated else 1)
        torch._dynamo.reset()

    @pytest.mark.parametrize("with_teacher", [False, True])
    def test_a_state_of_another_length_of_training(self, with_teacher):
        def make(epochs):
            model = MAE(depth=1)
            teacher = make_teacher(model, total_epochs=epochs) if with_teacher else None
            return apply_to_mae(model, EvolvingMask(epochs), teacher)

        state = make(10).set_epoch(5).state_dict()
        assert set(state) == {"masking", "teacher", "total_epochs"}
        with pytest.raises(ValueError, match="total_epochs=10, these masks 20"):
            make(20).load_state_dict(state)
        make(10).load_state_dict(state)
        del state["total_epochs"]  # as older versions saved it
        make(10).load_state_dict(state)
        with pytest.raises(ValueError, match=r"alpha=0\.7746 in epoch 5.*total_epochs=20"):
            make(20).load_state_dict(state)


class TestFixedMasks:
    def masks_of(self, evolution, model, images, batch, seed=0):
        """A pass over a validation set."""
        with evolution.fixed(seed), torch.no_grad():
            torch.rand(3)  # as an iterator of a DataLoader does
            return torch.cat([model(each)[2] for each in images.split(batch)])

    @pytest.mark.parametrize("source", ["none", "teacher", "given"])
    def test_a_pass_depends_on_the_seed_and_the_places_alone(self, source):
        model, images = MAE().eval(), torch.randn(6, 3, 64, 64)
        sources = {"none": None, "teacher": make_teacher(model), "given": lambda images: random_parts(len(images))}
        masking = RandomMask() if source == "none" else EvolvingMask(10)
        evolution = apply_to_mae(model, masking, sources[source]).set_epoch(5)
        first = self.masks_of(evolution, model, images, 6)
        assert first.sum(1).tolist() == [48] * 6
        model(images)  # training draws
        state = torch.get_rng_state()
        if source != "given":  # whose parts depend on the batch
            assert torch.equal(self.masks_of(evolution, model, images, 4), first)
        assert torch.equal(self.masks_of(evolution, model, images, 6), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(self.masks_of(evolution, model, images, 6, seed=1), first)
        assert first.unique(dim=0).shape[0] == 6, "each image has a mask of its own"
        assert not torch.equal(model(images)[2], first)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"model": {}, "evolution": {}}, ValueError, "keys model, evolution"),
        ({f"k{index}": None for index in range(200)}, ValueError, "k0, k1, k2, k3, k4:"),
        *[(state, TypeError, r"torch\.load") for state in ("checkpoint.pt", None, [1], 3)],
    ],
)
def test_what_is_no_state_is_named(state, error, words):
    evolution = apply_to_mae(MAE(depth=1), EvolvingMask(10))
    with pytest.raises(error, match=words):
        evolution.load_state_dict(state)


def test_what_are_no_labels_is_named():
    model = MAE()
    evolution = apply_to_mae(model, EvolvingMask(4), nn.Identity()).set_epoch(2)
    with pytest.raises(ValueError, match=r"torch\.float32.*FrozenTeacher\(vit"):
        model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"torch\.int64 and shape \[2, 64\].*see\(parts=labels\)"):
        evolution.see(torch.zeros(2, 64, dtype=torch.long))
