"""Schedules: by a power, by a function of one's own, in stages, and through casts."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import Wrapped
from torch import nn
from vits import MAE

from maskevolve import EMPartitioner, EvolvingMask, GridMask, PartMask, PartTeacher, RandomMask

EPOCHS = 10
FUNCTIONS = {
    "cosine": (lambda progress: (1 - math.cos(math.pi * progress)) / 2, lambda p: (1 - math.cos(math.pi * p)) / 2),
    "warm-up": (lambda progress: (progress - 0.5) / 0.5, lambda p: max(0, 2 * p - 1)),
    "stops half way": (lambda progress: 2 * progress, lambda p: min(1, 2 * p)),
    "a step": (lambda progress: progress > 0.5, lambda p: float(p > 0.5)),
    "numpy": (lambda progress: np.float32(progress), lambda p: p),
    "torch": (lambda progress: torch.tensor(progress).sqrt(), lambda p: p**0.5),
}


@pytest.mark.parametrize(("function", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_power_takes_a_function_of_progress(function, expected):
    masking = EvolvingMask(EPOCHS, power=function)
    for epoch in range(EPOCHS):
        alpha = masking.set_epoch(epoch).alpha
        assert alpha.shape == ()
        assert float(alpha) == pytest.approx(expected((epoch + 1) / EPOCHS), abs=1e-6)
        assert masking.needs_parts == (float(alpha) > 0)


@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
@given(epochs=st.floats(0.1, 50), epoch=st.floats(-5, 60), power=st.floats(0, 4))
def test_a_power_is_a_function_of_progress(epochs, epoch, power):
    seen = []
    ours = EvolvingMask(epochs, power=lambda progress: seen.append(progress) or progress**power).set_epoch(epoch)
    assert ours.alpha == EvolvingMask(epochs, power=power).set_epoch(epoch).alpha
    assert float(ours.alpha) == pytest.approx((min(max(epoch + 1, 1), epochs) / epochs) ** power)
    assert all(0 <= progress <= 1 for progress in seen)


def make_teacher(num_parts, epochs=EPOCHS):
    return PartTeacher(MAE(depth=1, image_size=32), EMPartitioner(), total_epochs=epochs, num_parts=num_parts)


BAD_POWERS = [("power", value, 0.5) for value in (math.nan, math.inf, "0.5", None, [0.5])]
BAD_COUNTS = [("num_parts", value, 4 / 9) for value in (math.nan, math.inf, "0.5", None, [0.5], 0, -3, 0.2)]


@pytest.mark.parametrize(("name", "value", "at"), [*BAD_POWERS, *BAD_COUNTS])
def test_a_function_that_returns_no_number_is_refused_when_it_does(name, value, at):
    make = make_teacher if name == "num_parts" else lambda function: EvolvingMask(EPOCHS, power=function)
    with pytest.raises(ValueError, match=rf"{name} is .* at progress 0"):
        make(lambda _: value)
    each = make(lambda progress: value if progress == at else 9 * progress + 1 if name == "num_parts" else progress)
    each.set_epoch(3)
    with pytest.raises(ValueError, match=rf"{name} is .* at progress {at:.4g}"):
        each.set_epoch(4)
    kept = each.num_parts if name == "num_parts" else 10 * each.alpha
    assert (kept, each.epoch) == (4, 3), "as if nothing had been asked"


def test_masks_with_a_function_and_masks_inside_are_resumed():
    masks = {"start": RandomMask(), "end": EvolvingMask(EPOCHS)}
    saved, resumed = (EvolvingMask(EPOCHS, **copy.deepcopy(masks), power=math.sqrt) for _ in range(2))
    resumed.load_state_dict(saved.set_epoch(6).state_dict())
    assert set(saved.state_dict()) == {"alpha", "epoch", "end.alpha", "end.epoch"}
    assert (resumed.alpha, resumed.end.alpha) == (saved.alpha, saved.end.alpha)
    assert (resumed.epoch, resumed.end.epoch, resumed.needs_parts) == (6, 6, True)
    parts, seed = torch.arange(16).expand(2, -1) // 4, torch.Generator()
    assert torch.equal(*(mask.scores(2, 4, parts=parts, generator=seed.manual_seed(1)) for mask in (saved, resumed)))


@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
def test_number_of_parts_takes_a_function_of_progress():
    teacher = make_teacher(lambda progress: 16 * 0.125**progress, epochs=4)
    counts = [teacher.set_epoch(epoch).num_parts for epoch in range(-1, 5)]
    assert counts == [16, 16, 8, 4, 2, 2]
    assert all(isinstance(count, int) for count in counts)
    assert teacher.set_epoch(3)(torch.randn(2, 3, 32, 32)).max() < 2
    resumed = make_teacher(lambda progress: 16 * 0.125**progress, epochs=4)
    resumed.load_state_dict(teacher.state_dict())
    assert resumed.num_parts == 2


@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
@settings(max_examples=25)
@given(epoch=st.floats(-5, 20), first=st.integers(1, 99), last=st.integers(1, 99))
def test_a_pair_is_a_function_of_progress(epoch, first, last):
    ours = make_teacher(lambda progress: first + (last - first) * progress).set_epoch(epoch)
    assert ours.num_parts == make_teacher((first, last)).set_epoch(epoch).num_parts


def stages():
    """A first stage that ends before the training does."""
    return EvolvingMask(EPOCHS, start=EvolvingMask(5, start=RandomMask(), end=GridMask()), end=Other(EvolvingMask(3)))


@pytest.mark.parametrize("make", [lambda: EvolvingMask(EPOCHS), stages, lambda: make_teacher((4, 2))])
def test_an_epoch_outside_of_the_training_is_warned_of_once(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        each = make()
        for epoch in (0, 0.5, EPOCHS - 1, EPOCHS - 0.01, EPOCHS):
            each.set_epoch(epoch)
    for epoch in (5000, -1, EPOCHS + 0.5, torch.tensor(11.0)):
        each = make()
        with pytest.warns(UserWarning, match=rf"epoch={float(epoch):g} is outside .*=10.*steps") as caught:
            [each.set_epoch(again) for again in (epoch, -2, epoch, 77)]
        assert [warning.filename for warning in caught] == [__file__]
        each.set_epoch(5)
        assert each.epoch == 5


class Other(Wrapped):
    """A mask of one's own, with another inside that it draws from."""

    needs_parts = property(lambda self: self.inner[0].needs_parts)


def test_set_epoch_reaches_every_mask_inside():
    innermost = EvolvingMask(EPOCHS)
    masking = EvolvingMask(EPOCHS, start=RandomMask(), end=EvolvingMask(EPOCHS, start=Other(innermost)))
    masking.set_epoch(3.5)
    assert [mask.epoch for mask in masking.modules() if isinstance(mask, EvolvingMask)] == [3.5] * 3
    assert innermost.alpha == masking.alpha == masking.end.alpha


def test_three_stages():
    """Random to a grid in the first half of training, the grid to parts in the second."""
    first = EvolvingMask(5, start=RandomMask(), end=GridMask(), power=1)
    masking = EvolvingMask(EPOCHS, start=first, end=PartMask(), power=lambda progress: 2 * progress - 1)
    stages = [(float(masking.set_epoch(epoch).alpha), float(first.alpha)) for epoch in range(EPOCHS)]
    expected = [(0, 0.2), (0, 0.4), (0, 0.6), (0, 0.8), (0, 1), (0.2, 1), (0.4, 1), (0.6, 1), (0.8, 1), (1, 1)]
    torch.testing.assert_close(torch.tensor(stages), torch.tensor(expected))

    parts = torch.arange(64).expand(2, -1) // 16
    for epoch, needed in ((0, False), (4, False), (5, True), (9, True)):
        assert masking.set_epoch(epoch).needs_parts == needed
        assert masking(torch.randn(2, 64, 3), 0.75, parts=parts if needed else None).mask.sum(1).tolist() == [48, 48]
    kept = masking(torch.randn(2, 64, 3), 0.75, parts=parts).mask.view(2, 4, 16)
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept)), "whole parts in the end"
    grid = masking.set_epoch(4)(torch.randn(2, 64, 3), 0.75).mask.view(2, 4, 2, 4, 2)
    assert torch.equal(grid, grid[:, :1, :, :1].expand_as(grid)), "a grid half way"


CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda model: model.to(torch.float16),
    "to a device and a dtype": lambda model: model.to("cpu", torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_the_epoch_and_alpha_as_they_are(cast):
    own = Other(nn.Linear(2, 2))  # a mask that learns
    masking = EvolvingMask(3001, start=own, end=EvolvingMask(3001)).set_epoch(2999.25)
    model = nn.ModuleDict({"masking": masking, "teacher": make_teacher((40, 10), 3001).set_epoch(2999.25)})
    before = copy.deepcopy(model.state_dict())
    cast(model)
    assert own.inner[0].weight.dtype != torch.float32
    for key, value in model.state_dict().items():
        assert "inner" in key or (value.dtype == before[key].dtype and torch.equal(value, before[key]))


def test_masks_and_teachers_move_to_other_devices():
    masking, teacher = EvolvingMask(EPOCHS).half().to("meta"), make_teacher((4, 2)).half().to("meta")
    assert masking.alpha.is_meta
    assert teacher.epoch.is_meta
    assert not masking.to_empty(device="cpu").alpha.is_meta


def test_the_epoch_is_exact_where_half_precision_is_torchs_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        masking, teacher = EvolvingMask(3001), make_teacher((4, 2), 3001)
    finally:
        torch.set_default_dtype(torch.float32)
    assert masking.set_epoch(2999.25).epoch == teacher.set_epoch(2999.25).epoch == 2999.25
    assert float(masking.alpha) == pytest.approx((3000.25 / 3001) ** 0.5, rel=1e-6)
