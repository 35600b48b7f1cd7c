"""Parts from label maps, against a plain loop over the pixels."""

from collections import Counter
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from maskevolve import PartMask
from maskevolve.parts.segmentation import check_labels, labels_to_parts, parts_from_segmentation

UNSIGNED = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DOORS = [parts_from_segmentation, labels_to_parts]
doors = pytest.mark.parametrize("door", DOORS)
DTYPES = [*UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64]
sides = {"size": st.tuples(*[st.integers(1, 13)] * 2), "grid": st.tuples(*[st.integers(1, 6)] * 2)}
choices = {"different": st.integers(1, 6), "seed": st.integers(0, 999), "ignoring": st.booleans()}
ignores = st.sampled_from([None, 0, 1, -1, 255])


def cell_of(place, pixels, cells):
    """The cell that holds the centre of a pixel."""
    return int((place + Fraction(1, 2)) * cells / pixels)


def loop(labels, grid, ignore):
    """Oracle: [height, width] labels to those of the patches, before negative ones are renumbered."""
    chosen = []
    for cells in np.ndindex(grid):
        rows, columns = (
            [cell_of(cell, side, pixels)]
            if pixels < side
            else [pixel for pixel in range(pixels) if cell_of(pixel, pixels, side) == cell]
            for cell, side, pixels in zip(cells, grid, labels.shape, strict=True)
        )
        votes = Counter(int(labels[y, x]) for y in rows for x in columns if labels[y, x] != ignore)
        chosen.append(max(sorted(votes), key=votes.get, default=ignore))
    return chosen


@settings(max_examples=150, deadline=None)
@given(dtype=st.sampled_from(DTYPES), **sides, **choices)
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


def test_the_majority_wins_ties_go_to_the_lowest_and_coarser_maps_give_the_nearest_label():
    labels = torch.tensor([[[9, 9, 5, 5], [9, 2, 3, 3]]])
    assert parts_from_segmentation(labels, (1, 2)).tolist() == [[9, 3]]
    assert parts_from_segmentation(labels.flip(2), (1, 2)).tolist() == [[3, 9]]
    assert parts_from_segmentation(torch.tensor([[[4, 8]]]), (2, 4)).tolist() == [[4, 4, 8, 8] * 2]
    grid = torch.arange(12).view(1, 3, 4)
    assert torch.equal(parts_from_segmentation(grid, (3, 4)), grid.flatten(1))


def test_what_is_ignored_does_not_vote_and_is_a_part_where_nothing_else_is():
    labels = torch.tensor([[[255, 255, 255, 255], [255, 1, 255, 255]]], dtype=torch.uint8)
    assert parts_from_segmentation(labels, (1, 2)).tolist() == [[255, 255]]
    assert parts_from_segmentation(labels, (1, 2), ignore=255).tolist() == [[1, 255]]
    labels = torch.tensor([[[-1, -1, -1, -1], [-1, 0, -1, -1]], [[3, 3, 8, 8], [3, 3, 8, 8]]])
    parts = parts_from_segmentation(labels, (1, 2), ignore=-1)
    assert parts.tolist() == [[1, 0], [3, 8]]
    assert (PartMask()(torch.zeros(2, 1, 2, 1), 0.5, parts=parts).mask.sum(1) == 1).all(), "a mask takes what comes out"


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), ignore=ignores, seed=st.integers(0, 999), array=st.booleans())
def test_labels_of_patches_and_maps_of_them_are_one(dtype, ignore, seed, array):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2 * (dtype not in UNSIGNED), 3, (3, 4, 5), generator=draws).to(dtype)
    given = labels.numpy() if array else labels
    parts = parts_from_segmentation(labels, (4, 5), ignore)
    assert torch.equal(labels_to_parts(given, (4, 5), ignore), parts)
    assert torch.equal(labels_to_parts(given.reshape(3, 20), (4, 5), ignore), parts)
    assert (parts.dtype, parts.min() >= 0) == (torch.int64, True)
    for image, ours in zip(labels.long(), parts, strict=True):
        assert torch.equal(image.view(-1, 1) == image.view(1, -1), ours[:, None] == ours)


@doors
def test_the_largest_labels_of_64_bits(door):
    labels = torch.from_numpy(np.array([[[2**64 - 1, 3, 2**63, 2**64 - 1]]], np.uint64))
    parts = door(labels, (1, 4))[0].tolist()
    assert (len(set(parts)), parts[0], min(parts)) == (3, parts[3], 0)
    assert door(labels[..., :2], (1, 1), ignore=2**64 - 1).tolist() == [[3]]


@doors
@pytest.mark.parametrize("kind", [tv_tensors.Mask, tv_tensors.Image])
def test_subclasses_of_tensors(door, kind):
    labels = torch.randint(5, (2, 12, 12))
    assert type(parts := door(kind(labels), 3)) is torch.Tensor
    assert torch.equal(parts, parts_from_segmentation(labels, 3))


@pytest.mark.parametrize("change", [lambda a: a, np.asfortranarray, lambda a: a[:, ::-1], lambda a: a.astype(">i4")])
def test_arrays_of_any_layout_stay_on_the_cpu(change):
    """Whatever torch's default device is; an array that cannot be written to gives no warning."""
    array = change(np.random.default_rng(0).integers(0, 4, (2, 6, 6)))
    array.flags.writeable = False
    expected = parts_from_segmentation(torch.from_numpy(np.array(array, dtype=np.int64)), 3)
    with torch.device("meta"):
        parts = labels_to_parts(array, 3)
    assert torch.equal(parts, expected)
    assert labels_to_parts(torch.zeros(2, 9, dtype=torch.int32, device="meta"), 3).device.type == "meta"


def test_compiles_whole_and_needs_no_values_on_the_host():
    torch._dynamo.reset()
    labels = torch.randint(-2, 9, (2, 11, 9))
    cut = partial(parts_from_segmentation, grid_size=(3, 4), ignore=0)
    assert torch.equal(torch.compile(cut, fullgraph=True, backend="aot_eager")(labels), cut(labels))
    assert cut(labels.to("meta")).shape == (2, 12)
    for empty in (labels[:0], labels[:0].reshape(0, 99)[:, :12]):
        assert labels_to_parts(empty, (3, 4)).shape == (0, 12)


def whole(*shape):
    return torch.zeros(shape, dtype=torch.long)


BAD = [
    *((door, torch.zeros(2, 4, 4), 2, None, "float32") for door in DOORS),
    (labels_to_parts, np.zeros((2, 4), np.float16), 2, None, "float16"),
    (labels_to_parts, np.array([["a", "b"]]), 2, None, "dtype"),
    (parts_from_segmentation, whole(4, 4), 2, None, r"\[4, 4\].*labels\[None\] is a batch of one$"),
    (labels_to_parts, whole(4), 2, None, r"\[4\]"),
    *((door, whole(2, 1, 4, 4), 2, None, r"\[2, 1, 4, 4\].*labels\[:, 0\]") for door in DOORS),
    (labels_to_parts, whole(2, 5), 2, None, r"\[2, 5\].*N=4"),
    *((door, whole(2, 0, 4), 2, None, r"\[2, 0, 4\]") for door in DOORS),
    *((labels_to_parts, whole(2, 4, 4), grid, None, "grid_size=") for grid in ("2", None, (2, 2, 2), (2, 0))),
    *((labels_to_parts, whole(2, 4), 2, ignore, "ignore=") for ignore in ("255", 0.5, True, 2**64)),
    (parts_from_segmentation, whole(2, 4, 4), 2, "255", "ignore='255'"),
    (parts_from_segmentation, np.zeros((2, 4, 4), int), 2, None, "as_tensor"),
    (labels_to_parts, [whole(4)], 2, None, "as_tensor"),
]


@pytest.mark.parametrize(("door", "labels", "grid_size", "ignore", "named"), BAD)
def test_bad_input(door, labels, grid_size, ignore, named):
    with pytest.raises(TypeError if named == "as_tensor" else ValueError, match=named):
        door(labels, grid_size, ignore)


def test_labels_are_checked_before_the_grid_is_known():
    for labels in (whole(2, 5).int(), whole(2, 3, 4).byte().numpy()):
        assert torch.equal(check_labels(labels), torch.zeros(labels.shape, dtype=torch.long))
    with pytest.raises(ValueError, match="parts has shape"):
        check_labels(whole(2, 1, 1, 4, 4))
