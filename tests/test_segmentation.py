"""Parts from label maps, against a plain loop over the pixels."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from maskevolve import PartMask, parts_from_segmentation

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64]


def cell_of(place, pixels, cells):
    """The cell that holds the centre of a pixel."""
    return int((place + Fraction(1, 2)) * cells / pixels)


def loop(labels, grid, ignore):
    """Oracle: [height, width] labels to those of the patches, before negative ones are renumbered."""
    votes = {(row, column): {} for row in range(grid[0]) for column in range(grid[1])}
    for row, column in votes:
        rows, columns = (
            [cell_of(cell, cells, pixels)]
            if pixels < cells
            else [pixel for pixel in range(pixels) if cell_of(pixel, pixels, cells) == cell]
            for cell, cells, pixels in zip((row, column), grid, labels.shape, strict=True)
        )
        for label in (int(labels[y, x]) for y in rows for x in columns):
            if label != ignore:
                votes[row, column][label] = votes[row, column].get(label, 0) + 1
    return [max(sorted(patch), key=patch.get) if patch else ignore for patch in votes.values()]


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    different=st.integers(1, 6),
    seed=st.integers(0, 999),
    ignoring=st.booleans(),
)
def test_parts_are_those_of_a_plain_loop(dtype, size, grid, different, seed, ignoring):
    draws = np.random.default_rng(seed)
    info = torch.iinfo(dtype) if dtype != torch.bool else None
    low, high = (0, 1) if info is None else (max(info.min, -(2**62)), min(info.max, 2**62))
    alphabet = draws.integers(low, high, different, endpoint=True)
    labels = torch.from_numpy(draws.choice(alphabet, (2, *size))).to(dtype)
    ignore = int(alphabet[0]) if ignoring else None
    parts = parts_from_segmentation(labels, grid, ignore)
    assert (parts.shape, parts.dtype) == ((2, grid[0] * grid[1]), torch.int64)
    for image, ours in zip(labels.long().numpy(), parts.tolist(), strict=True):
        expected = loop(image, grid, ignore)
        places = {label: place for place, label in enumerate(sorted(set(expected)))}
        assert ours == (expected if min(expected) >= 0 else [places[label] for label in expected])


def test_the_majority_wins_and_ties_go_to_the_lowest():
    labels = torch.tensor([[[9, 9, 5, 5], [9, 2, 3, 3]]])
    assert parts_from_segmentation(labels, (1, 2)).tolist() == [[9, 3]]
    assert parts_from_segmentation(labels.flip(2), (1, 2)).tolist() == [[3, 9]]


def test_coarser_maps_give_the_nearest_label():
    labels = torch.tensor([[[4, 8]]])
    assert parts_from_segmentation(labels, (2, 4)).view(2, 4).tolist() == [[4, 4, 8, 8]] * 2
    grid = torch.arange(12).view(1, 3, 4)
    assert torch.equal(parts_from_segmentation(grid, (3, 4)), grid.flatten(1))


def test_what_is_ignored_does_not_vote_and_is_a_part_where_nothing_else_is():
    labels = torch.tensor([[[255, 255, 255, 255], [255, 1, 255, 255]]], dtype=torch.uint8)
    assert parts_from_segmentation(labels, (1, 2)).tolist() == [[255, 255]]
    assert parts_from_segmentation(labels, (1, 2), ignore=255).tolist() == [[1, 255]]
    labels = torch.tensor([[[-1, -1, -1, -1], [-1, 0, -1, -1]], [[3, 3, 8, 8], [3, 3, 8, 8]]])
    assert parts_from_segmentation(labels, (1, 2), ignore=-1).tolist() == [[1, 0], [3, 8]]


def test_a_mask_takes_what_comes_out():
    labels = torch.randint(-3, 4, (4, 37, 50))
    mask = PartMask()(torch.zeros(4, 5, 5, 1), 0.6, parts=parts_from_segmentation(labels, 5)).mask
    assert (mask.sum(1) == 15).all()


def test_masks_of_torchvision_do():
    labels = tv_tensors.Mask(torch.randint(5, (2, 12, 12)))
    parts = parts_from_segmentation(labels, 3)
    assert type(parts) is torch.Tensor
    assert torch.equal(parts, parts_from_segmentation(labels.as_subclass(torch.Tensor), 3))


def test_compiles_whole_and_needs_no_values_on_the_host():
    torch._dynamo.reset()
    labels = torch.randint(-2, 9, (2, 11, 9))
    compiled = torch.compile(
        lambda labels: parts_from_segmentation(labels, (3, 4), ignore=0), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(labels), parts_from_segmentation(labels, (3, 4), ignore=0))
    assert parts_from_segmentation(labels.to("meta"), (3, 4), ignore=0).shape == (2, 12)
    assert parts_from_segmentation(labels[:0], (3, 4)).shape == (0, 12)


@pytest.mark.parametrize(
    ("labels", "grid_size", "ignore", "message"),
    [
        (torch.zeros(2, 4, 4), 2, None, r"float32.*long"),
        (torch.zeros(4, 4, dtype=torch.long), 2, None, r"\[4, 4\].*\[B, height, width\].*labels\[None\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.long), 2, None, r"\[2, 1, 4, 4\].*labels\[:, 0\]"),
        (torch.zeros(2, 0, 4, dtype=torch.long), 2, None, r"\[2, 0, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.long), "2", None, r"grid_size='2'.*whole numbers"),
        (torch.zeros(2, 4, 4, dtype=torch.long), None, None, "grid_size=None"),
        (torch.zeros(2, 4, 4, dtype=torch.long), (2, 2, 2), None, r"grid_size=\(2, 2, 2\)"),
        (torch.zeros(2, 4, 4, dtype=torch.long), (2, 0), None, r"grid_size=\(2, 0\)"),
        (torch.zeros(2, 4, 4, dtype=torch.long), 2, "255", "ignore='255'"),
        (torch.zeros(2, 4, 4, dtype=torch.long), 2, 0.5, "ignore=0.5"),
    ],
)
def test_bad_input(labels, grid_size, ignore, message):
    with pytest.raises(ValueError, match=message):
        parts_from_segmentation(labels, grid_size, ignore)
    with pytest.raises(TypeError, match=r"ndarray.*as_tensor"):
        parts_from_segmentation(np.zeros((2, 4, 4), int), 2)
