"""The cuts of volumes and clips."""

from functools import partial

import common
import numpy as np
import pytest
import torch
import volumes
from planted_clips import moving_shapes
from volumes import Case

SMALL = [Case((3, 3, 3), 2, pictures) for pictures in (True, False)]


@pytest.fixture
def untimed(monkeypatch):
    """Each function is called once, and neither a clock nor the memory is read."""
    monkeypatch.setattr(common, "peak_memory", lambda function, device: 1.0)
    monkeypatch.setattr(common, "compare", lambda functions, *_: [{"name": name} for name in functions])


@pytest.mark.parametrize("case", SMALL)
def test_a_volume_has_pictures_where_it_should(case):
    affinity, images = volumes.given(case)
    assert affinity.shape == (2, 27, 27)
    assert images.shape == (2, 1, 12, 12, 12) if case.pictures else images is None


def test_brightness_tells_parts_apart():
    labels = torch.arange(8).view(1, 1, 2, 2, 2) // 4
    image = volumes.brightness(labels, np.random.default_rng(0))
    first, second = image[0, 0].split(4)
    assert abs(first.mean() - second.mean()) > 0.1
    assert first.std() < 0.2


@pytest.mark.parametrize("tubes", [True, False])
def test_tubes_are_the_same_in_all_frames(tubes, monkeypatch):
    monkeypatch.setattr(volumes, "GRID", (2, 4, 4))
    monkeypatch.setattr(volumes, "moving_shapes", partial(moving_shapes, grid=(2, 4, 4)))
    case = Case((2, 4, 4), 1, True, tubes)
    calls = volumes.partitioners(case, *volumes.given(case))
    assert list(calls) == ["graph cut, pymaxflow", "graph cut, scipy", volumes.EM]
    parts = {name: call().view(2, 16) for name, call in calls.items()}
    assert torch.equal(parts["graph cut, pymaxflow"], parts["graph cut, scipy"])
    assert all(torch.equal(*each) for each in parts.values()) == tubes


def test_rows_say_what_was_cut(untimed):
    rows = [row for case in SMALL for row in volumes.measure(case, "cpu")]
    assert {(row["grid"], row["batch"], row["parts"], row["peak_mib"]) for row in rows} == {("3 x 3 x 3", 2, 10, 1.0)}
    assert [row["pictures"] for row in rows] == [True] * 3 + [False] * 3


def test_each_case_has_a_row_of_its_own_in_the_table():
    assert len({(case.name, case.batch, case.pictures) for case in volumes.CASES}) == len(volumes.CASES)
