"""What is no number, and numbers out of range, are a ValueError that repeats the value: for every setting."""

import math
import re

import numpy as np
import pytest
import torch
from vits import MAE

from maskevolve import BlockMask, EMPartitioner, EvolvingMask, GraphCutPartitioner, GridMask, PartTeacher, RandomMask
from maskevolve.masks import functional as F
from maskevolve.schedule import alpha_at, clamp_epoch, num_parts_at

X, AFFINITY = torch.zeros(2, 16, 1), torch.rand(1, 16, 16)
NOT_A_NUMBER = ["0.5", None, (0.5, 0.5), [0.5], torch.tensor([0.5, 0.5]), np.array([0.5, 0.5]), 0.5j, True]


def teacher(**options):
    return PartTeacher(MAE(depth=1), GraphCutPartitioner(), **{"total_epochs": 10, **options})


NUMBERS = {
    "mask_ratio": [
        lambda value: RandomMask()(X, value),
        lambda value: GridMask().sample(2, 4, value),
        lambda value: F.mask_patches(X, torch.rand(2, 16), value),
        lambda value: F.num_visible(16, value),
    ],
    "total_epochs": [
        EvolvingMask,
        lambda value: clamp_epoch(0, value),
        lambda value: alpha_at(0, value),
        lambda value: num_parts_at(0, value),
        lambda value: teacher(total_epochs=value),
    ],
    "epoch": [EvolvingMask(10).set_epoch, lambda value: teacher().set_epoch(value)],
    "decay": [lambda value: teacher(decay=value)],
    "kappa": [lambda value: EMPartitioner(kappa=value)],
    "smoothness": [lambda value: None if value is None else GraphCutPartitioner(smoothness=value)],
}
WHOLE = {
    "num_parts": [
        GraphCutPartitioner,
        EMPartitioner,
        lambda value: GraphCutPartitioner()(AFFINITY, value),
        lambda value: GraphCutPartitioner().hierarchy(AFFINITY, value),
        lambda value: EMPartitioner()(AFFINITY, value),
        lambda value: GraphCutPartitioner().hierarchy(AFFINITY).cut(value),
    ],
    "period": [GridMask],
    "num_blocks": [BlockMask],
    "steps": [lambda value: EMPartitioner(steps=value)],
    "batch_size": [lambda value: RandomMask().scores(value, 4), lambda value: RandomMask().sample(value, 4)],
}


def each(settings):
    return [(name, call) for name, calls in settings.items() for call in calls]


def refuses(call, name, value):
    message = "" if isinstance(value, torch.Tensor | np.ndarray) else re.escape(repr(value))
    with pytest.raises(ValueError, match=f"{name}={message}"):
        call(value)


@pytest.mark.parametrize(("name", "call"), each(NUMBERS))
def test_what_is_no_number(name, call):
    for value in [*NOT_A_NUMBER, math.nan]:
        if not (name == "smoothness" and value is None):
            refuses(call, name, value)


@pytest.mark.parametrize(("name", "call"), each(WHOLE))
def test_what_is_no_whole_number(name, call):
    for value in [*NOT_A_NUMBER, math.nan, 2.5, math.inf, -1]:
        takes_none = name == "num_parts" and value is None  # in a call: that of the partitioner
        if not takes_none:
            refuses(call, name, value)


@pytest.mark.parametrize(
    ("name", "call", "values"),
    [
        ("mask_ratio", lambda value: RandomMask()(X, value), [1, -0.1, math.inf, np.float32(1.5)]),
        ("total_epochs", EvolvingMask, [0, -3, math.inf]),
        ("decay", lambda value: teacher(decay=value), [-0.1, 1.1]),
        ("smoothness", lambda value: GraphCutPartitioner(smoothness=value), [-1, math.inf]),
        ("num_parts", GraphCutPartitioner, [0]),
        ("num_parts", lambda value: teacher(num_parts=value), ["40", (40,), (40, "10"), (0, 1), (4.5, 2), None, 7]),
        ("area", lambda value: BlockMask(area=value), [None, 0.5, ("a", "b"), (0.1,), (0.4, 0.1), (0.1, math.nan)]),
        ("aspect", lambda value: BlockMask(aspect=value), [None, (0, 1), (1, math.inf), ([1], [2])]),
        ("grid_size", lambda value: RandomMask(grid_size=value), ["4", 0, (4, 0), (4.0, 4.0), (4, 4, 1), [4]]),
        ("grid_size", lambda value: EvolvingMask(10, grid_size=value), [0, "4"]),
        ("grid_size", lambda value: GridMask().scores(2, value), [None, "4", -4, (4, None)]),
        ("grid_size", lambda value: GraphCutPartitioner()(AFFINITY, grid_size=value), ["4", (4, -4), 4.0]),
    ],
)
def test_what_is_out_of_range(name, call, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}=.*{re.escape(str(value))}"):
            call(value)


def test_numbers_of_numpy_and_torch_are_numbers():
    assert (RandomMask()(X, np.float32(0.5)).mask.sum(1) == 8).all()
    assert (RandomMask()(X, torch.tensor(0.5)).mask.sum(1) == 8).all()
    assert EvolvingMask(np.int64(10)).set_epoch(torch.tensor(9)).alpha == 1
    assert GraphCutPartitioner(np.int64(3))(AFFINITY, np.int32(2)).max() <= 1
    assert GridMask(np.int64(3), grid_size=(np.int64(4), 4)).sample(2, [4, np.int64(4)]).shape == (2, 16)


def test_ratios_may_change_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(GridMask(grid_size=(4, 4)), fullgraph=True, backend="aot_eager")
    for ratio in (0.75, 0.5):
        assert (compiled(X, ratio).mask.sum(1) == 16 * ratio).all()
