"""Edges from contrast: what must not matter to them does not, and outlines follow the picture."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention as planted
from sklearn.metrics import adjusted_rand_score
from test_graph_cut import agreement, check_every_cut, check_labels, same_partition
from vits import photographs

from maskevolve import GraphCutPartitioner
from maskevolve.parts.edges import contrast_edges
from maskevolve.parts.mincut import OFFSETS
from maskevolve.parts.split.plain import SCALE

HEIGHT, WIDTH, PATCH = 6, 7, 4
GRID = (HEIGHT, WIDTH)
CHANGES = {
    "offset": st.integers(-(2**16), 2**16),
    "exponent": st.integers(-40, 40),
    "order": st.permutations(range(4)),
    "constant": st.sampled_from([0.0, 1.0, -7.5, 1e30]),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
}
DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
ODD = {
    "one colour": torch.full((2, 3, HEIGHT * PATCH, WIDTH * PATCH), 0.7),
    "13 channels": torch.rand(2, 13, HEIGHT * PATCH, WIDTH * PATCH),
    "bytes": torch.randint(256, (2, 3, HEIGHT * PATCH, WIDTH * PATCH), dtype=torch.uint8),
    "a pixel a patch": torch.rand(2, 1, HEIGHT, WIDTH),
    "tiny": torch.rand(2, 3, HEIGHT * 40, WIDTH * 3) * 1e-38,
    "huge": torch.tensor([-3e38, 3e38])[torch.randint(2, (2, 3, HEIGHT, WIDTH))],
    "largest": torch.tensor([-1.7e308, 0, 1.7e308], dtype=torch.float64)[torch.randint(3, (2, 3, HEIGHT, WIDTH))],
    "bool": torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.bool),
}
BAD_SHAPES = [(3, 3, 24, 28), (2, 3, 24, 29), (2, 3, 3, 28), (3, 24, 28), (2, 0, 24, 28), (2, 3, 0, 28), (0, 3, 24, 28)]


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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), **CHANGES)
def test_a_scale_an_offset_the_order_of_channels_and_one_of_one_value(seed, offset, exponent, order, constant, dtype):
    attention, images = random_case(seed, 3)
    moved = torch.cat([(images + offset) * 2.0**exponent, torch.full_like(images[:, :1], constant)], 1)[:, order]
    assert torch.equal(cut(attention, moved.to(dtype)), cut(attention, images))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), down=st.booleans(), across=st.booleans())
def test_parts_flip_with_the_picture(seed, down, across):
    attention, images = random_case(seed)
    dims = [axis for axis, flipped in ((0, down), (1, across)) if flipped]
    order = torch.arange(HEIGHT * WIDTH).view(GRID).flip(dims).flatten()
    flipped = cut(attention[:, :, order][..., order], images.flip([axis + 2 for axis in dims]))
    assert same_partition(flipped, cut(attention, images)[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_type_and_the_users_images_stay_as_they_are(dtype):
    attention, images = random_case(0)
    images = (images > 120 if dtype == torch.bool else images.clamp(max=255).div(2).floor().mul(2)).to(dtype)
    before = images.clone()
    ours = cut(attention, images.requires_grad_(dtype.is_floating_point))
    assert torch.equal(ours, cut(attention, before.double().requires_grad_()))
    assert torch.equal(images, before)


def test_normalised_channel_by_channel_or_not():
    """Of photographs, within the rounding of a float32."""
    raw = ((photographs(9, 128) + 2) / 4 * 255).round()
    mean, std = torch.tensor([123.7, 116.3, 103.5]).view(3, 1, 1), torch.tensor([58.4, 30.1, 99.4]).view(3, 1, 1)
    affinity, partitioner = smooth_affinity(16, 16).expand(9, -1, -1), GraphCutPartitioner(10)
    parts = partitioner(affinity, images=raw.byte())
    assert agreement(partitioner(affinity, images=(raw - mean) / std), parts) > 0.99
    assert agreement(partitioner(affinity), parts) < 0.9, "the measure can tell"


@pytest.mark.parametrize("solver", ["scipy", "torch", "auto"])
def test_solver_and_batch_and_autocast(solver):
    attention, images = random_case(3, batch_size=5)
    together = cut(attention, images, 20, solver="pymaxflow")
    with torch.autocast("cpu", torch.bfloat16):
        alone = [cut(attention[i : i + 1], images[i : i + 1], 20, solver=solver) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)


def test_contrast_by_a_plain_loop():
    """Mean values of patches, each channel by its root mean square difference; brightness and colour of like weight."""
    _, images = random_case(5, 3, 1)
    images[:, 1] *= 30
    edges, bad = contrast_edges(images.float(), GRID, 16.0)
    edges = edges[0].view(8, *GRID)
    assert bad == 0
    means = images[0].view(3, HEIGHT, PATCH, WIDTH, PATCH).mean((2, 4)).numpy()
    pairs, nodes = {}, list(np.ndindex(GRID))
    for direction, row, column in np.ndindex(8, *GRID):
        there = row + OFFSETS[direction][0], column + OFFSETS[direction][1]
        if there in nodes:
            pairs[direction, row, column] = means[:, there[0], there[1]] - means[:, row, column]
    steps = np.array(list(pairs.values()))
    steps /= np.sqrt((steps**2).mean(0))
    brightness, colour = steps.mean(1) ** 2, steps.var(1)
    contrast = brightness / brightness.mean() + colour / (colour.mean() + brightness.mean() / 30)
    expected = dict(zip(pairs, 16 * SCALE / (1 + contrast / contrast.mean()) ** 6, strict=True))
    for place in np.ndindex(8, *GRID):
        assert math.isclose(int(edges[place]), expected.get(place, 0), rel_tol=0.02, abs_tol=2), place


BAD = torch.rand(2, 3, 24, 28).masked_fill(torch.rand(24, 28) < 0.1, torch.nan) - 2
BAD[..., :6, :], BAD[0, 0, 9, 9] = -9999, torch.inf
PICTURES = ODD | {"without data": BAD, "photograph": photographs(1, 168)[..., ::7, ::6].bfloat16()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is interpreted where there is no GPU")
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered")
@pytest.mark.parametrize("images", PICTURES.values(), ids=PICTURES.keys())
def test_the_kernel_has_the_same_bits(images):
    images = images[:1, :2]
    ours, expected = (contrast_edges(images, GRID, 3.3, by_kernel) for by_kernel in (True, False))
    assert all(map(torch.equal, ours, expected))


def test_outlines_follow_the_picture():
    """Two colours of like brightness that meet at a slant; nothing but the picture says where."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    truth = (columns > 3 + rows // 3).long()
    colours = torch.tensor([[[0.9, 0.3, 0.6], [0.3, 0.9, 0.6]]])
    images = colours[:, truth].permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    parts = GraphCutPartitioner(2)(smooth_affinity(12, 12), images=images)
    assert same_partition(parts, truth.view(1, -1))
    assert not same_partition(GraphCutPartitioner(2)(smooth_affinity(12, 12)), truth.view(1, -1))


def test_every_number_of_parts_from_one_solve_and_smoothness_of_ones_own():
    affinity, images = smooth_affinity(16, 16).expand(4, -1, -1), photographs(4, 128)
    hierarchy = GraphCutPartitioner().hierarchy(affinity, 40, images=images)
    assert hierarchy.cut(40).amax(1).float().mean() > 30, "small parts are split, too"
    check_every_cut(hierarchy, 40)
    for smoothness, pictures in ((16, images), (0.3, None)):
        ours = GraphCutPartitioner(smoothness=smoothness)(affinity, images=pictures)
        assert torch.equal(ours, GraphCutPartitioner()(affinity, images=pictures))
    free, stiff = (GraphCutPartitioner(40, smoothness=s)(affinity, images=images) for s in (4, 64))
    assert free.max() > stiff.max()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", ODD.values(), ids=ODD.keys())
def test_odd_pictures_are_cut_without_a_warning(images):
    check_labels(cut(random_case(0)[0], images, 10), 10)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1)])
def test_one_patch_wide(grid):
    affinity, images = torch.rand(2, math.prod(grid), math.prod(grid)), torch.rand(2, 3, 8 * grid[0], 8 * grid[1])
    check_labels(GraphCutPartitioner(5)(affinity, grid_size=grid, images=images), 5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_count_as_zero_with_one_warning(bad):
    attention, images = random_case(0)
    images[0, 1, 2:4, 5] = bad
    partitioner = GraphCutPartitioner()
    with pytest.warns(UserWarning, match="2 of 4032 values of images"):
        parts = partitioner(attention, grid_size=GRID, images=images)
    for again in (images, images.nan_to_num(0, 0, 0)):
        assert torch.equal(partitioner(attention, grid_size=GRID, images=again), parts)


@pytest.mark.parametrize("images", [*map(torch.rand, BAD_SHAPES), torch.rand(2, 3, 24, 28) * 1j])
def test_images_that_do_not_match(images):
    attention, _ = random_case(0)
    with pytest.raises(ValueError, match=re.escape(str(list(images.shape))) + f".*6 x 7.*{images.dtype}"):
        cut(attention, images)


@pytest.mark.parametrize("value", [-9999.0, -3.4e38, 1e30, 0.0, 3.0, 400.0, -255.0, float("nan")])
@pytest.mark.parametrize("place", [np.s_[..., :16, :], np.s_[..., :, -8:], np.s_[..., 40:, 40:]])
@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_border_does_not_blind(value, place):
    """No data or a bar beside a flat picture: what is in the picture is found as without."""
    draws = torch.Generator().manual_seed(0)
    cells = torch.tensor([[0.0, 0.7, 1.4], [1.0, 0.3, 1.7], [2.0, 1.2, 0.5]]).repeat_interleave(24, 0)
    image = 10 + cells.repeat_interleave(24, 1) + 0.05 * torch.randn(1, 3, 72, 72, generator=draws)
    truth = torch.arange(9).view(3, 3).repeat_interleave(6, 0).repeat_interleave(6, 1)
    outside = torch.zeros(72, 72, dtype=torch.bool)
    outside[place] = True
    known = (truth.view(-1, 1) == truth.view(-1)).float()[None] + 0.2 * smooth_affinity(18, 18)
    parts = GraphCutPartitioner(12)(known, images=image.masked_fill(outside, value))
    inside = ~outside[2::4, 2::4]
    assert adjusted_rand_score(parts.view(18, 18)[inside], truth[inside]) > 0.8
