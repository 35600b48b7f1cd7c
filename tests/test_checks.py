"""What is no number, and numbers out of range, are a ValueError that repeats the value: for every setting."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from vits import MAE, make_teacher

from maskevolve import (
    BlockMask,
    EMPartitioner,
    EvolvingMask,
    FrozenTeacher,
    GraphCutPartitioner,
    GridMask,
    PartMask,
    RandomMask,
)
from maskevolve.masks import mask_patches, num_visible
from maskevolve.schedule import alpha_at, clamp_epoch, num_parts_at

X, AFFINITY = torch.zeros(2, 16, 1), torch.rand(1, 16, 16)
NO_NUMBER = ["0.5", None, (0.5, 0.5), [0.5], torch.tensor([0.5, 0.5]), np.array([0.5, 0.5]), 0.5j, True, math.nan]
NOT_WHOLE = [*NO_NUMBER, 2.5, math.inf, -1]
NO_RATIO = [value for value in NO_NUMBER if not isinstance(value, torch.Tensor)]  # where each image may have its own
OR_NONE = [value for value in NOT_WHOLE if value is not None]  # None is the default


teacher = partial(make_teacher, MAE(depth=1))
frozen = partial(teacher, FrozenTeacher)


REFUSED = [
    ("mask_ratio", partial(RandomMask(), X), [*NO_NUMBER, 1, -0.1, 0.999, math.inf, np.float32(1.5)]),
    ("mask_ratio", partial(EvolvingMask(10).sample, 2, 4), [*NO_RATIO, 1, 0.999]),
    ("mask_ratio", partial(mask_patches, X, torch.rand(2, 16)), NO_NUMBER),
    ("mask_ratio", partial(num_visible, 16), NO_NUMBER),
    ("total_epochs", EvolvingMask, [*NO_NUMBER, 0, -3, math.inf]),
    *(("total_epochs", partial(function, 0), NO_NUMBER) for function in (clamp_epoch, alpha_at, num_parts_at)),
    *(("total_epochs", kind, [*NO_NUMBER, 0]) for kind in (teacher, frozen)),
    *(("layers", kind, [0, "all"]) for kind in (teacher, frozen)),
    ("power", partial(EvolvingMask, 10), [*NO_NUMBER, -1, math.inf]),
    ("epoch", EvolvingMask(10).set_epoch, NO_NUMBER),
    ("epoch", lambda epoch: teacher().set_epoch(epoch), NO_NUMBER),
    ("decay", teacher, [*NO_NUMBER, -0.1, 1.1]),
    ("kappa", EMPartitioner, NO_NUMBER),
    ("smoothness", GraphCutPartitioner, [value for value in [*NO_NUMBER, -1, math.inf] if value is not None]),
    *(("num_parts", partitioner, [*OR_NONE, 0]) for partitioner in (GraphCutPartitioner, EMPartitioner)),
    *(("num_parts", partial(each(), AFFINITY), OR_NONE) for each in (GraphCutPartitioner, EMPartitioner)),
    ("num_parts", partial(GraphCutPartitioner().hierarchy, AFFINITY), OR_NONE),
    ("num_parts", GraphCutPartitioner().hierarchy(AFFINITY).cut, OR_NONE),
    *(("num_parts", kind, ["40", (40,), (40, "10"), (0, 1), (4.5, 2), None, 7]) for kind in (teacher, frozen)),
    ("period", GridMask, NOT_WHOLE),
    *((name, PartMask, [*NO_NUMBER, -0.1, 1.1]) for name in ("share", "hint")),
    *((name, call, NOT_WHOLE) for name, call in (("num_blocks", BlockMask), ("steps", EMPartitioner))),
    *(("batch_size", partial(call, grid_size=4), NOT_WHOLE) for call in (RandomMask().scores, RandomMask().sample)),
    ("area", BlockMask, [None, 0.5, ("a", "b"), (0.1,), (0.4, 0.1), (0.1, math.nan)]),
    ("aspect", BlockMask, [None, (0, 1), (1, math.inf), ([1], [2])]),
    ("grid_size", RandomMask, ["4", 0, (4, 0), (4.0, 4.0), (2, 2, 2, 2), (), [4, "4", 1]]),
    ("grid_size", partial(EvolvingMask, 10), [0, "4"]),
    ("grid_size", partial(GridMask().scores, 2), [None, "4", -4, (4, None)]),
    ("grid_size", partial(GraphCutPartitioner(), AFFINITY), ["4", (4, -4), 4.0]),
]


@pytest.mark.parametrize(("name", "call", "values"), REFUSED)
def test_what_is_no_number_no_whole_one_or_out_of_range(name, call, values):
    for value in values:
        said = "" if isinstance(value, torch.Tensor | np.ndarray) else re.escape(str(value))
        with pytest.raises(ValueError, match=f"{name}=.*{said}"):
            call(**{name: value})


def test_numbers_of_numpy_and_torch_are_numbers():
    for ratio in (np.float32(0.5), torch.tensor(0.5)):
        assert (RandomMask()(X, ratio).mask.sum(1) == 8).all()
    assert EvolvingMask(np.int64(10)).set_epoch(torch.tensor(9)).alpha == 1
    assert GraphCutPartitioner(np.int64(3))(AFFINITY, np.int32(2)).max() <= 1
    for smoothness in (np.float32(0.25), torch.tensor(0.25)):
        ours, expected = (GraphCutPartitioner(9, smoothness=each)(AFFINITY) for each in (smoothness, 0.25))
        assert torch.equal(ours, expected)
    assert GridMask(np.int64(3), grid_size=(np.int64(4), 4)).sample(2, [4, np.int64(4)]).shape == (2, 16)
