"""Edges from contrast: what must not matter to them does not, and outlines follow the picture."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention as planted
from test_partition import agreement, check_labels, same_partition
from vits import photographs

from maskevolve import GraphCutPartitioner
from maskevolve.parts.edges import contrast_edges, patch_sums
from maskevolve.parts.mincut import OFFSETS
from maskevolve.parts.split import SCALE

HEIGHT, WIDTH, PATCH = 6, 7, 4
GRID = (HEIGHT, WIDTH)


def random_case(seed, channels=3, batch_size=2):
    """An affinity, and pictures of whole numbers with edges in them, [B, C, height, width] float64."""
    _, attention = planted(batch_size, *GRID, 5, strength=0.5, noise=1, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 200, (batch_size, channels, 3, 7), generator=draws)
    images = coarse.repeat_interleave(HEIGHT * PATCH // 3, 2).repeat_interleave(PATCH, 3)
    return attention, (images + torch.randint(0, 50, images.shape, generator=draws)).double()


def cut(attention, images, num_parts=8, **options):
    return GraphCutPartitioner(num_parts, **options)(attention, grid_size=GRID, images=images)


def smooth_affinity(height, width):
    """Nearer patches belong together: an affinity that knows nothing of the picture."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns], -1).view(1, -1, 2).float()
    return torch.exp(-torch.cdist(place, place).square() / 20)


# What must not matter.


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    offset=st.integers(-(2**16), 2**16),
    exponent=st.integers(-40, 40),
    channels=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_common_offset_and_a_scale_by_a_power_of_two(seed, offset, exponent, channels, dtype):
    attention, images = random_case(seed, channels)
    moved = ((images + offset) * 2.0**exponent).to(dtype)
    assert torch.equal(cut(attention, moved), cut(attention, images))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_the_order_of_the_channels(seed, order):
    attention, images = random_case(seed, 5)
    assert torch.equal(cut(attention, images[:, order]), cut(attention, images))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), value=st.sampled_from([0.0, 1.0, -7.5, 1e30]), place=st.integers(0, 3))
def test_a_channel_of_one_value(seed, value, place):
    attention, images = random_case(seed, 3)
    constant = torch.full_like(images[:, :1], value)
    more = torch.cat([images[:, :place], constant, images[:, place:]], 1)
    assert torch.equal(cut(attention, more), cut(attention, images))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), down=st.booleans(), across=st.booleans())
def test_parts_flip_with_the_picture(seed, down, across):
    attention, images = random_case(seed)
    dims = [axis for axis, flipped in ((0, down), (1, across)) if flipped]
    order = torch.arange(HEIGHT * WIDTH).view(GRID).flip(dims).flatten()
    flipped = cut(attention[:, :, order][..., order], images.flip([axis + 2 for axis in dims]))
    assert same_partition(flipped, cut(attention, images)[:, order])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_any_type(dtype):
    attention, images = random_case(0)
    images = images.clamp(max=255)
    if dtype == torch.bfloat16:  # has 8 bits
        images = images.div(2).floor().mul(2)
    assert torch.equal(cut(attention, images.to(dtype)), cut(attention, images))


def test_two_values():
    attention, images = random_case(0)
    assert torch.equal(cut(attention, images > 120), cut(attention, (images > 120).float()))


def test_normalised_channel_by_channel_or_not():
    """Of photographs, within the rounding of a float32."""
    raw = ((photographs(9, 128) + 2) / 4 * 255).round()
    mean, std = torch.tensor([123.7, 116.3, 103.5]).view(3, 1, 1), torch.tensor([58.4, 30.1, 99.4]).view(3, 1, 1)
    affinity = smooth_affinity(16, 16).expand(9, -1, -1)
    partitioner = GraphCutPartitioner(10)
    parts = partitioner(affinity, images=raw.byte())
    assert agreement(partitioner(affinity, images=(raw - mean) / std), parts) > 0.99
    assert agreement(partitioner(affinity), parts) < 0.9, "the measure can tell"


@pytest.mark.parametrize("solver", ["pymaxflow", "torch", "auto"])
def test_solver_and_batch(solver):
    attention, images = random_case(3, batch_size=5)
    together = cut(attention, images, 20, solver="pymaxflow")
    alone = [cut(attention[i : i + 1], images[i : i + 1], 20, solver=solver) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)


def test_precision_under_autocast():
    attention, images = random_case(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cut(attention, images)
    assert torch.equal(inside, cut(attention, images))


# What does.


def test_contrast_by_a_plain_loop():
    """Mean values of patches, each channel by its root mean square difference; brightness and colour of like weight."""
    _, images = random_case(5, 3, 1)
    images[:, 1] *= 30
    sums, bad = patch_sums(images.float(), GRID)
    edges = contrast_edges(sums, GRID, 16.0)[0].view(8, *GRID)
    assert bad == 0
    means = images[0].view(3, HEIGHT, PATCH, WIDTH, PATCH).mean((2, 4)).numpy()
    pairs = {}
    for direction, (rows, columns) in enumerate(OFFSETS):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                there = row + rows, column + columns
                if 0 <= there[0] < HEIGHT and 0 <= there[1] < WIDTH:
                    pairs[direction, row, column] = means[:, there[0], there[1]] - means[:, row, column]
    unit = np.sqrt(np.mean([step**2 for step in pairs.values()], 0))
    brightness = {place: np.mean(step / unit) ** 2 for place, step in pairs.items()}
    colour = {place: np.var(step / unit) for place, step in pairs.items()}
    typical = np.mean(list(brightness.values()))
    least = np.mean(list(colour.values())) + typical / 30
    contrast = {place: brightness[place] / typical + colour[place] / least for place in pairs}
    mean = np.mean(list(contrast.values()))
    for place in np.ndindex(8, *GRID):
        expected = 16 * SCALE / (1 + contrast[place] / mean) ** 6 if place in pairs else 0
        assert math.isclose(int(edges[place]), expected, rel_tol=0.02, abs_tol=2), place


def test_outlines_follow_the_picture():
    """Two colours of like brightness that meet at a slant; nothing but the picture says where."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    truth = (columns > 3 + rows // 3).long()
    colours = torch.tensor([[[0.9, 0.3, 0.6], [0.3, 0.9, 0.6]]])
    images = colours[:, truth].permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    parts = GraphCutPartitioner(2)(smooth_affinity(12, 12), images=images)
    assert same_partition(parts, truth.view(1, -1))
    assert not same_partition(GraphCutPartitioner(2)(smooth_affinity(12, 12)), truth.view(1, -1))


def test_every_number_of_parts_from_one_solve():
    affinity, images = smooth_affinity(16, 16).expand(4, -1, -1), photographs(4, 128)
    hierarchy = GraphCutPartitioner().hierarchy(affinity, 40, images=images)
    finer = hierarchy.cut(40)
    assert finer.amax(1).float().mean() > 30, "small parts are split, too"
    for num_parts in range(39, 0, -1):
        parts = hierarchy.cut(num_parts)
        check_labels(parts, num_parts)
        for image, below in zip(parts, finer, strict=True):
            assert all(image[below == label].unique().numel() == 1 for label in below.unique())
        finer = parts


def test_smoothness_of_ones_own():
    affinity, images = smooth_affinity(16, 16).expand(4, -1, -1), photographs(4, 128)
    assert torch.equal(
        GraphCutPartitioner(smoothness=16)(affinity, images=images), GraphCutPartitioner()(affinity, images=images)
    )
    assert torch.equal(GraphCutPartitioner(smoothness=0.3)(affinity), GraphCutPartitioner()(affinity))
    free, stiff = (GraphCutPartitioner(40, smoothness=s)(affinity, images=images) for s in (4, 64))
    assert free.max() > stiff.max()


# Bad input.


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 3, HEIGHT * PATCH, WIDTH * PATCH), 0.7),
        torch.rand(2, 13, HEIGHT * PATCH, WIDTH * PATCH),
        torch.randint(256, (2, 3, HEIGHT * PATCH, WIDTH * PATCH), dtype=torch.uint8),
        torch.rand(2, 1, HEIGHT, WIDTH),
        torch.rand(2, 3, HEIGHT * 40, WIDTH * 3) * 1e-38,
        torch.tensor([-3e38, 3e38])[torch.randint(2, (2, 3, HEIGHT, WIDTH))],
        torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.bool),
    ],
    ids=["one colour", "13 channels", "bytes", "a pixel a patch", "tiny", "huge", "bool"],
)
def test_odd_pictures_are_cut_without_a_warning(images):
    attention, _ = random_case(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_labels(cut(attention, images, 10), 10)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1)])
def test_one_patch_wide(grid):
    patches = grid[0] * grid[1]
    parts = GraphCutPartitioner(5)(
        torch.rand(2, patches, patches), grid_size=grid, images=torch.rand(2, 3, 8 * grid[0], 8 * grid[1])
    )
    check_labels(parts, 5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_count_as_zero_with_one_warning(bad):
    attention, images = random_case(0)
    images[0, 1, 2:4, 5] = bad
    partitioner = GraphCutPartitioner()
    with pytest.warns(UserWarning, match="2 of 4032 values of images are NaN or inf"):
        parts = partitioner(attention, grid_size=GRID, images=images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partitioner(attention, grid_size=GRID, images=images)
        assert torch.equal(cut(attention, images.nan_to_num(0, 0, 0), 10), parts)


@pytest.mark.parametrize(
    "shape", [(3, 3, 24, 28), (2, 3, 24, 29), (2, 3, 3, 28), (3, 24, 28), (2, 0, 24, 28), (2, 3, 0, 28)]
)
def test_images_that_do_not_match(shape):
    attention, _ = random_case(0)
    message = f"images has shape {list(shape)}, .* shape [2, 42, 42], .* 6 x 7 patches"
    message = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=message):
        cut(attention, torch.rand(shape))


def test_the_users_images_stay_as_they_are():
    attention, images = random_case(0)
    before = images.clone()
    cut(attention, images.requires_grad_())
    assert torch.equal(images, before)
