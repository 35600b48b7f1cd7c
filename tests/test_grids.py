"""Grids of one to three axes: masks, tubes, cuts and label maps, against plain loops and other people's code."""

import hashlib
import re
from collections import Counter
from functools import partial
from itertools import product
from math import prod

import maxflow
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from test_graph_cut import check_every_cut, check_labels, same_partition
from test_segmentation import cell_of

from maskevolve import (
    BlockMask,
    EMPartitioner,
    EvolvingMask,
    GraphCutPartitioner,
    GridMask,
    PartMask,
    RandomMask,
    TubeMask,
)
from maskevolve.masks import fixed_masks
from maskevolve.parts import TubePartitioner, grid_min_cut, parts_from_segmentation
from maskevolve.parts.affinity import interpolate
from maskevolve.parts.edges import affinity_edges, contrast_edges, edge_weights
from maskevolve.parts.mincut import offsets

GRIDS = [(1,), (7,), (64,), (3, 5), (2, 3, 4), (8, 14, 14), (6, 6, 6), (10, 10, 10)]
SMALL = GRIDS[:5] + GRIDS[6:7]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
AXES = [(grid, axis) for grid in GRIDS if len(grid) > 1 for axis in (*range(len(grid)), -1)]
every_axis = pytest.mark.parametrize(("grid", "axis"), AXES, ids=str)
INNER = {
    "random": RandomMask,
    "grid": GridMask,
    "block": BlockMask,
    "part": PartMask,
    "to parts": lambda: EvolvingMask(10).set_epoch(4),
    "to blocks": lambda: EvolvingMask(10, end=BlockMask()).set_epoch(4),
}
CASES = [(kind, grid, axis) for kind in INNER for grid, axis in [*((grid, None) for grid in GRIDS), *AXES]]
# As `grid_min_cut` documents them, direction by direction: E, W, S, N, SE, NW, SW, NE; on three axes those of a slice,
# then to the next slice and from it: straight, E, W, S, N, ...
PLANE = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
ACROSS = [way for y, x in [(0, 0), *PLANE] for way in ((1, y, x), (-1, -y, -x))]
DIRECTIONS = {1: [(1,), (-1,)], 2: PLANE, 3: [*((0, *step) for step in PLANE), *ACROSS]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parts_of(grid, seed=0, batch_size=3):
    return torch.randint(min(5, prod(grid)), (batch_size, prod(grid)), generator=seeded(seed))


def made(kind, axis):
    return INNER[kind]() if axis is None else TubeMask(INNER[kind](), axis)


def without(grid, axis):
    return tuple(np.delete(grid, axis).tolist())


def along(values, grid, axis):
    """[B, N, ...] with the axis of the grid first: [steps, B, others]."""
    return values.unflatten(1, grid).movedim(range(1, 1 + len(grid))[axis], 0).flatten(2)


def counted(grid, axis, ratio):
    steps = 1 if axis is None else grid[axis]
    return steps * int(prod(grid) // steps * (1 - ratio))


@pytest.mark.parametrize(("kind", "grid", "axis"), CASES, ids=str)
def test_counts_are_exact_and_every_call_gives_the_same(kind, grid, axis):
    x, parts = torch.randn(3, *grid, 2, generator=seeded()), parts_of(grid)
    flat, masking, patches = x.flatten(1, -2), made(kind, axis), prod(grid)
    wanted = [({"mask_ratio": ratio}, counted(grid, axis, ratio)) for ratio in (0.3, 0.75, 0.9)]
    for how, keep in [*wanted, *(({"keep": keep}, keep) for keep in {patches // 2 + patches % 2, patches})]:
        if not keep:
            with pytest.raises(ValueError, match="leaves no visible patch"):
                masking(x, parts=parts, grid_size=grid, **how)
            continue
        how |= {"parts": parts, "generator": seeded(7)}
        visible, mask, ids_restore = masking(flat, grid_size=grid, **how)
        assert (mask.sum(1) == patches - keep).all()
        assert torch.equal(ids_restore.sort(1).values, torch.arange(patches).expand(3, -1))
        assert torch.equal(mask, (ids_restore >= keep).float())
        assert torch.equal(visible, flat.gather(1, ids_restore.argsort(1)[:, :keep, None].expand(-1, -1, 2)))
        how["generator"].manual_seed(7)
        again = masking(x, grid_size=grid, **how)
        assert all(map(torch.equal, again, (visible, mask, ids_restore)))
        how["generator"].manual_seed(7)
        assert torch.equal(masking.sample(3, grid, **how), mask == 1)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.floats(0, 0.99), min_size=1, max_size=4), st.integers(0, 99))
def test_a_ratio_of_each_image_gives_the_mask_that_it_gives_alone(case, ratios, seed):
    kind, grid, axis = case
    ratios, parts = [ratio for ratio in ratios if counted(grid, axis, ratio)] or [0.0], parts_of(grid, seed, 1)
    masking, how = made(kind, axis), {"parts": parts.expand(len(ratios), -1), "generator": seeded(seed)}
    together = masking.sample(len(ratios), grid, torch.tensor(ratios, dtype=torch.float64), **how)
    assert (~together).sum(1).tolist() == [counted(grid, axis, ratio) for ratio in ratios]
    for image, ratio in enumerate(ratios):
        how["generator"].manual_seed(seed)
        assert torch.equal(masking.sample(len(ratios), grid, ratio, **how)[image], together[image])


@every_grid
@pytest.mark.parametrize("period", [1, 2, "each"])
def test_scores_equal_a_plain_loop_over_algorithm_1(grid, period):
    draws, parts, epoch = seeded(3), parts_of(grid), 4
    if period == "each":
        period = tuple(range(1, 1 + len(grid))) if len(grid) > 1 else grid
    sides = (period,) * len(grid) if isinstance(period, int) else period
    p_grid = GridMask(period).scores(3, grid, generator=draws)
    p_parts = PartMask().scores(3, grid, parts=parts, generator=draws)
    masking = EvolvingMask(10, start=GridMask(period)).set_epoch(epoch)
    p = masking.scores(3, grid, parts=parts, generator=seeded(3))
    alpha = ((epoch + 1) / 10) ** 0.5
    for image in range(3):
        of_cells, of_parts = {}, {}
        for patch, place in enumerate(product(*map(range, grid))):
            cell = tuple(each % side for each, side in zip(place, sides, strict=True)) if len(grid) > 1 else place
            drawn = of_cells.setdefault(cell, float(p_grid[image, patch]))
            of_part = of_parts.setdefault(int(parts[image, patch]), float(p_parts[image, patch]))
            assert p[image, patch] == pytest.approx((1 - alpha) * drawn + alpha * of_part, abs=1e-6)
        assert len(set(of_parts.values())) == len(of_parts), "a draw a part"
        if len(grid) > 1:
            assert len(set(of_cells.values())) == len(of_cells) == prod(map(min, sides, grid)), "a draw a cell"
    assert prod(grid) == 1 or sides == (1,) * len(grid) or not torch.equal(p_grid[0], p_grid[1]), "of each image"


@pytest.mark.parametrize(
    ("patches", "period", "ratio", "step"),
    [(64, 2, 0.75, 4), (64, 4, 0.75, 4), (64, 2, 0.5, 2), (64, 2, 0.875, 8), (27, 3, 2 / 3 - 1e-9, 3), (7, 7, 0.8, 7)],
)
def test_on_one_axis_every_so_many_patches_stay(patches, period, ratio, step):
    removed = GridMask(period).sample(64, (patches,), ratio, generator=seeded())
    firsts = set()
    for image in removed:
        kept = torch.where(~image)[0]
        firsts.add(int(kept[0]))
        assert kept.tolist() == list(range(int(kept[0]), patches, step))
    assert firsts == set(range(step)), "which ones is drawn"


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(1, 64), level=st.integers(0, 6), period=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
def test_on_one_axis_what_stays_lies_evenly_at_any_ratio(keep, level, period, seed):
    """Of any stretch of 2 ** level patches (of whole patterns), the same share stays, up to one patch."""
    span = period ** (level // {2: 1, 4: 2, 8: 3}[period])
    removed = GridMask(period).sample(4, (64,), keep=keep, generator=seeded(seed))
    stretches = (~removed).unfold(1, span, 1).sum(2)
    assert stretches.min() >= keep * span // 64
    assert stretches.max() <= -(-keep * span // 64)


@pytest.mark.parametrize("kind", INNER)
@every_axis
def test_tubes_are_the_inner_mask_in_every_step(kind, grid, axis):
    left, small = without(grid, axis), parts_of(without(grid, axis))
    whole = torch.stack([small.unflatten(1, left)] * grid[axis], range(1, 4)[axis] if axis >= 0 else -1).flatten(1)
    masking, how = TubeMask(INNER[kind](), axis), {"generator": seeded(5)}
    mask = masking.sample(3, grid, 0.5, parts=small, **how)
    assert (along(mask, grid, axis) == along(mask, grid, axis)[0]).all()
    ours, expected = (
        each.scores(3, sizes, parts=small, generator=seeded(5))
        for each, sizes in ((masking, grid), (masking.mask, left))
    )
    assert (along(ours, grid, axis) == expected).all()
    first = along(mask, grid, axis)[0]
    assert all(p[removed].min() >= p[~removed].max() for p, removed in zip(expected, first, strict=True))
    assert torch.equal(masking.sample(3, grid, 0.5, parts=whole, generator=seeded(5)), mask)
    for keep in {1, grid[axis], grid[axis] + 1, prod(grid) // 2, prod(grid) - 1}:
        stays = along(~masking.sample(3, grid, keep=keep, parts=whole), grid, axis).sum(0)
        cut = (stays > 0) & (stays < grid[axis])
        assert (cut.sum(1) == bool(keep % grid[axis])).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([((3, 5), 0), ((3, 5), -1), ((3, 2, 5), 0), ((2, 7, 3), 1)]), st.integers(0, 999))
def test_a_tube_belongs_to_the_part_of_most_of_its_patches(case, seed):
    grid, axis = case
    parts = 10 * parts_of(grid, seed).clamp(max=1)  # two labels in tubes of odd length: no ties
    tubes = along(parts, grid, axis)
    most = [[Counter(tubes[:, b, i].tolist()).most_common(1)[0][0] for i in range(tubes.shape[2])] for b in range(3)]
    ours, expected = (
        TubeMask(PartMask(), axis).scores(3, grid, parts=p, generator=seeded()) for p in (parts, torch.tensor(most))
    )
    assert torch.equal(ours, expected)


@every_axis
def test_a_mask_evolves_inside_of_tubes(grid, axis):
    masking, parts = TubeMask(EvolvingMask(10), axis), parts_of(grid)
    assert (float(masking.alpha), masking.needs_parts, masking.total_epochs) == (0, False, 10)
    p = masking.scores(3, grid, generator=seeded())
    for given_parts in (parts, parts_of(without(grid, axis))):
        assert torch.equal(masking.scores(3, grid, parts=given_parts, generator=seeded()), p), "not needed yet"
    assert masking.set_epoch(4) is masking
    assert masking.needs_parts
    assert masking.epoch is masking.mask.epoch
    assert float(masking.alpha) == pytest.approx(0.5**0.5)
    resumed = TubeMask(EvolvingMask(10), axis)
    resumed.load_state_dict(masking.state_dict())
    assert resumed.needs_parts
    ours, expected = (each.sample(3, grid, 0.5, parts=parts, generator=seeded()) for each in (resumed, masking))
    assert torch.equal(ours, expected)
    with pytest.raises(AttributeError, match="set_epoch"):
        TubeMask(RandomMask(), axis).set_epoch(4)
    outer = EvolvingMask(10, start=masking, end=TubeMask(RandomMask(), axis)).set_epoch(9)
    assert float(masking.alpha) == 1, "an outer mask moves it"
    assert (along(outer.scores(3, grid, parts=parts), grid, axis).diff(dim=0) == 0).all()


@pytest.mark.parametrize(("kind", "grid", "axis"), [case for case in CASES if case[1] in SMALL[1:]], ids=str)
def test_fixed_masks_depend_on_no_batch(kind, grid, axis):
    x, parts, masking, masks = torch.randn(3, *grid, 2), parts_of(grid), made(kind, axis), []
    for size in (1, 2):
        with fixed_masks(masking, seed=5):
            batches = zip(x.split(size), parts.split(size), strict=True)
            masks.append(torch.cat([masking(each, 0.4, parts=its, grid_size=grid).mask for each, its in batches]))
    assert torch.equal(*masks)
    assert ((masks[0] == 0).sum(1) == counted(grid, axis, 0.4)).all()


@every_grid
def test_a_block_is_a_cuboid_of_the_sizes_that_it_was_given(grid):
    size = tuple((max(1, side // 3), max(1, side // 2)) for side in grid)
    sides_within(BlockMask(1, size=size), grid, size)
    if min(grid) > 5:  # cubes, of shares of which a side takes the root
        area = (0.12, 0.3) if len(grid) > 1 else (0.2, 0.45)
        size = tuple(tuple(round(share ** (1 / len(grid)) * side) for share in area) for side in grid)
        sides_within(BlockMask(1, area=area, aspect=(1, 1)), grid, size)


def sides_within(masking, grid, size):
    """The first block of each image fills a box, whose sides are within and reach both ends; so do its places."""
    found, corners = [set() for _ in grid], [set() for _ in grid]
    for seed, p in enumerate(masking.scores(300, grid, generator=seeded())):
        block = p == 1
        places = [torch.unique(each).tolist() for each in torch.where(block.view(grid))]
        assert block.sum() == prod(map(len, places)), "a full box"
        for axis, place in enumerate(places):
            assert place == list(range(place[0], place[-1] + 1))
            found[axis].add(len(place))
            corners[axis].add((place[0] == 0, place[-1] == grid[axis] - 1))
        if seed < 5 and block.sum() < prod(grid):
            alone = masking.sample(300, grid, keep=int((~block).sum()), generator=seeded())[seed]
            assert torch.equal(alone, block), "and it is what is removed"
    for axis, (least, most) in enumerate(size):
        assert (min(found[axis]), max(found[axis])) == (least, most)
        assert {at for pair in corners[axis] for at in ("first", "last") if pair[at == "last"]} == {"first", "last"}


def cut_by_loop(source, sink, capacity):
    """Oracle: edge by edge into PyMaxflow's graph."""
    grid = source.shape
    graph, nodes = maxflow.GraphInt(), {place: node for node, place in enumerate(product(*map(range, grid)))}
    graph.add_nodes(len(nodes))
    for place, node in nodes.items():
        graph.add_tedge(node, int(source[place]), int(sink[place]))
        for direction, step in enumerate(DIRECTIONS[len(grid)]):
            there = nodes.get(tuple(np.add(place, step).tolist()))
            if there is not None and (amount := int(capacity[(direction, *place)])):
                graph.add_edge(node, there, amount, 0)
    graph.maxflow()
    return [graph.get_segment(node) == 1 for node in nodes.values()]


def random_cut(grid, kind, seed):
    """Of one image; capacities that leave the grid are as large as others, or huge."""
    draws = np.random.default_rng(seed)
    source, sink = (draws.integers(0, 50, grid) * (draws.random(grid) < 0.4) for _ in range(2))
    capacity = draws.integers(0, 20, (3 ** len(grid) - 1, *grid)) * (draws.random((3 ** len(grid) - 1, *grid)) < 0.7)
    if kind == "zeros":
        source, sink, capacity = source * 0, sink, capacity * (draws.random(capacity.shape) < 0.1)
    elif kind == "limits":
        source, sink, capacity = (draws.choice([0, 1, 2**30], each.shape) for each in (source, sink, capacity))
    elif kind == "corner":
        source, sink = source * 0, sink * 0
        source.flat[0], sink.flat[-1] = 2**30, 10**6
    for direction, step in enumerate(DIRECTIONS[len(grid)]):
        for axis, ahead in enumerate(step):
            if ahead and kind != "zeros":
                np.moveaxis(capacity[direction], axis, 0)[0 if ahead < 0 else -1] = draws.choice([7, 2**31 - 1])
    return source, sink, capacity


CUTS = [*product(SMALL, ["random", "zeros", "limits", "corner"]), ((10, 10, 10), "random")]


@pytest.mark.parametrize(("grid", "kind"), CUTS, ids=str)
def test_every_solver_cuts_as_a_plain_loop_does(grid, kind):
    cases = [random_cut(grid, kind, seed) for seed in range(4 if prod(grid) < 1000 else 1)]
    tensors = [torch.from_numpy(np.stack(each)).int() for each in zip(*cases, strict=True)]
    expected = [cut_by_loop(*case) for case in cases]
    for solver in ("pymaxflow", "scipy", "torch"):
        assert grid_min_cut(*tensors, solver=solver).flatten(1).tolist() == expected, solver


def planted(grid, seed=0, batch_size=2):
    """An affinity with the octants of a grid in it (halves, quarters), and pictures of whole numbers."""
    draws = seeded(seed)
    halves = [torch.arange(side) >= (side + 1) // 2 for side in grid]
    labels = sum(half.long() << axis for axis, half in enumerate(torch.meshgrid(*halves, indexing="ij")))
    flat = labels.flatten()
    affinity = torch.randint(32, (batch_size, len(flat), len(flat)), generator=draws) + 64.0 * (flat[:, None] == flat)
    images = torch.randint(50, (batch_size, 2, *(2 * side for side in grid)), generator=draws)
    for axis in range(len(grid)):
        labels = labels.repeat_interleave(2, axis)
    return affinity, (images + 100 * labels).double()


@every_grid
def test_parts_of_every_grid_do_not_depend_on_batch_scale_or_solver(grid):
    affinity, images = planted(grid)
    for pictures in (None, images) if prod(grid) < 1000 else (images,):
        hierarchy = GraphCutPartitioner().hierarchy(affinity, 6, grid, pictures)
        check_every_cut(hierarchy, 6)
        parts = hierarchy.cut(6)
        assert parts.max() > 0 or prod(grid) == 1
        moved = None if pictures is None else (pictures[1:] * 4 - 100).float()
        for solver in ("pymaxflow", "scipy", "torch") if prod(grid) < 1000 else ("scipy",):
            alone = GraphCutPartitioner(6, solver=solver)(8 * affinity[1:], grid_size=grid, images=moved)
            assert torch.equal(alone, parts[1:])
    by_em = []
    for _ in range(2):
        torch.manual_seed(0)
        by_em.append(EMPartitioner(4)(affinity, grid_size=grid))
    check_labels(by_em[0], 4)
    assert torch.equal(*by_em)


@pytest.mark.parametrize("grid", SMALL, ids=str)
def test_parts_mirror_with_the_grid(grid):
    affinity, images = planted(grid)
    for axis, pictures in product(range(len(grid)), (None, images)):
        order = torch.arange(prod(grid)).view(grid).flip(axis).flatten()
        parts = GraphCutPartitioner(6)(affinity, grid_size=grid, images=pictures)
        flipped = None if pictures is None else pictures.flip(2 + axis)
        ours = GraphCutPartitioner(6)(affinity[:, order][..., order], grid_size=grid, images=flipped)
        assert same_partition(ours, parts[:, order])


@every_axis
def test_parts_of_tubes_are_those_of_the_mean_affinity_in_every_step(grid, axis):
    left = without(grid, axis)
    affinity, images = planted(grid, batch_size=1)
    axis %= len(grid)
    sides = "abc"[: len(grid)], "xyz"[: len(grid)]
    kept = [letters.replace(letters[axis], "") for letters in sides]
    mean = torch.einsum(f"i{''.join(sides)}->i{''.join(kept)}", affinity.view(1, *grid, *grid).double())
    mean = (mean / grid[axis] ** 2).view(1, prod(left), prod(left))
    frames = images.movedim(2 + axis, 2).flatten(1, 2)
    for inner, pictures in ((GraphCutPartitioner(5), None), (GraphCutPartitioner(5), frames), (EMPartitioner(5), None)):
        how = {} if pictures is None else {"images": images}
        torch.manual_seed(0)
        parts = TubePartitioner(inner, axis)(affinity, grid_size=grid, **how)
        check_labels(parts, 5)
        expected = inner(mean.float(), grid_size=left, **({} if pictures is None else {"images": frames}))
        is_em = isinstance(inner, EMPartitioner)  # whose parts depend on the last bit of a mean
        assert is_em or same_partition(along(parts, grid, axis)[0], expected)
        assert (along(parts, grid, axis) == along(parts, grid, axis)[0]).all()
        torch.manual_seed(0)
        assert torch.equal(TubePartitioner(inner, axis - len(grid))(affinity, grid_size=grid, **how), parts)


HALVES = [(grid, axis) for grid in (*SMALL, (10, 10, 10)) for axis in range(len(grid)) if grid[axis] > 1]


@pytest.mark.parametrize(
    ("grid", "axis", "stride"),
    [(*case, stride) for case in (*HALVES, ((8, 14, 14), 2)) for stride in (1, 2) if case[0][case[1]] > stride],
    ids=str,
)
def test_two_halves_along_every_axis_are_found_exactly(grid, axis, stride):
    """Between every second patch the picture says where; along the tubes of a partitioner, too."""
    side = torch.arange(prod(grid)) // prod(grid[axis + 1 :]) % grid[axis]
    truth = (side >= (grid[axis] + 1) // 2).long()[None]
    read = truth.view(1, *grid)[(..., *[slice((each - 1) % stride // 2, None, stride) for each in grid])].flatten(1)
    affinity, pictures = 0.1 + (read[:, None] == read[..., None]).float(), truth.view(1, 1, *grid).float()
    for images in (None, pictures) if stride == 1 else (pictures,):
        assert same_partition(GraphCutPartitioner(2)(affinity, None, grid, images, stride), truth)
        for tube in {0, len(grid) - 1} - {axis}:
            tubes = TubePartitioner(GraphCutPartitioner(2), tube)
            assert same_partition(tubes(affinity, None, grid, images, stride), truth)


@pytest.mark.parametrize(("grid", "axis"), [case for case in HALVES if 2 < case[0][case[1]] < 10], ids=str)
def test_slices_without_edges_between_them_are_cut_apart(grid, axis):
    """Every other slice belongs together. Edges of the usual weight along the axis do not let them."""
    truth = (torch.arange(prod(grid)) // prod(grid[axis + 1 :]) % grid[axis] % 2)[None]
    affinity = 1 + 0.1 * (truth[:, None] == truth[..., None])
    weights = [float(place != axis) for place in range(len(grid))]
    parts, stiff = (
        GraphCutPartitioner(2, smoothness=5, axis_weights=each)(affinity, grid_size=grid)
        for each in (weights, [1.0] * len(grid))
    )
    assert same_partition(parts, truth)
    assert torch.equal(stiff, GraphCutPartitioner(2, smoothness=5)(affinity, grid_size=grid))
    assert (stiff == 0).all()


@every_grid
def test_edges_lie_between_documented_neighbours_and_weigh_the_product_of_their_axes(grid):
    """An affinity of one value, so that an edge is its weight; as strong as those of a picture at a flat border."""
    assert list(offsets(len(grid))) == DIRECTIONS[len(grid)]
    weights, one = (0.5, 2.0, 3.0)[: len(grid)], torch.ones(1, prod(grid), prod(grid))
    flat = torch.zeros(1, 1, *grid)
    smoothness = edge_weights(grid, weights)
    edges = affinity_edges(one, grid, smoothness), contrast_edges(flat, grid, smoothness)[0]
    expected = torch.zeros(3 ** len(grid) - 1, *grid)
    for place, (direction, step) in product(product(*map(range, grid)), enumerate(DIRECTIONS[len(grid)])):
        if all(0 <= at + by < side for at, by, side in zip(place, step, grid, strict=True)):
            weight = prod(each for each, by in zip(weights, step, strict=True) if by)
            expected[(direction, *place)] = round(2**16 * weight * 9 / 3 ** len(grid))
    for ours in edges:
        assert torch.equal(ours.view(expected.shape), expected.int())


@pytest.mark.parametrize(("grid", "stride"), [((6, 6, 6), 2), ((8, 14, 14), 2), ((7, 5, 4), 3), ((64,), 2), ((7,), 3)])
def test_between_strided_patches_an_affinity_is_linear(grid, stride):
    kept = [np.arange((side - 1) % stride // 2, side, stride) for side in grid] * 2
    sizes = tuple(map(len, kept))
    wanted = np.random.default_rng(0).integers(0, 1000, (1, *sizes)).astype(float)
    affinity = torch.from_numpy(wanted).view(1, prod(sizes[: len(grid)]), -1)
    for axis, (places, side) in enumerate(zip(kept, grid * 2, strict=True)):
        within = np.arange(side).clip(places[0], places[-1])
        wanted = interp1d(places, wanted, axis=1 + axis)(within) if len(places) > 1 else wanted.repeat(side, 1 + axis)
    found = interpolate(affinity, grid, stride) / stride ** (2 * len(grid))
    assert np.allclose(found, wanted.reshape(found.shape))


@settings(max_examples=120, deadline=None)
@given(data=st.data(), axes=st.integers(1, 3), seed=st.integers(0, 999), ignore=st.sampled_from([None, 0, 1]))
def test_label_maps_of_every_grid_are_read_as_a_plain_loop_does(data, axes, seed, ignore):
    grid = data.draw(st.tuples(*[st.integers(1, 4)] * axes))
    size = data.draw(st.tuples(*[st.integers(1, 9)] * axes))
    labels = torch.randint(3, (2, *size), generator=seeded(seed))
    parts = parts_from_segmentation(labels, grid, ignore).view(2, *grid)
    for image, cell in product(range(2), product(*map(range, grid))):
        pixels = [
            [cell_of(at, side, full)] if full < side else [i for i in range(full) if cell_of(i, full, side) == at]
            for at, side, full in zip(cell, grid, size, strict=True)
        ]
        votes = Counter(int(labels[(image, *pixel)]) for pixel in product(*pixels))
        votes.pop(ignore, None)
        assert parts[(image, *cell)] == max(sorted(votes), key=votes.get, default=ignore)


def whole(*shape):
    return torch.zeros(shape, dtype=torch.long)


VOLUME = (2, 3, 4)
AFFINITY = torch.ones(2, 24, 24)
LABELS, CUT, ODD = whole(2, 4, 4), GraphCutPartitioner(), torch.tensor([0.5, 0.9375])
RATIOS = [
    (torch.rand(3) / 2, "[3] for 2 images"),
    (torch.tensor([0.5, 1.5]), "1.5 is outside [0, 1)"),
    (torch.tensor([-0.25, 0.5]), "-0.25 is outside [0, 1)"),
    (torch.tensor([[0.5], [0.25]]), "mask_ratio=tensor([[0.5000],"),
]
PERIODS = [(3, VOLUME), (8, (7,)), ((2, 3, 5), VOLUME), ((5, 2), (4, 4)), ((2, 2), VOLUME), ((2,), (4, 4))]
SIZES = [((1, 3), (1, 3), (1, 4)), ((1, 2),)]
OF_TUBES = [3, 0, torch.rand(2, 1, 3, 4)], [3, 2, torch.rand(2, 1, 3, 4)], [3, 0, torch.rand(2, 1, 3, 3, 4)]
BAD = [
    *((partial(RandomMask, grid), f"grid_size={grid}") for grid in ((2,) * 4, ())),
    *((partial(RandomMask().sample, 2, grid), f"grid_size={grid}") for grid in ((2,) * 4, ())),
    *((partial(parts_from_segmentation, LABELS, grid), f"grid_size={grid}") for grid in ((2,) * 4, ())),
    (partial(RandomMask(), torch.zeros(2, 2, 2, 2, 2, 1)), "[2, 2, 2, 2, 2, 1]", "one to three axes"),
    (partial(RandomMask(), torch.zeros(2, 25, 1), grid_size=VOLUME), "(2, 3, 4)", "N=25"),
    (partial(RandomMask(VOLUME), torch.zeros(2, 3, 2, 4, 1)), "(3, 2, 4)", "(2, 3, 4)"),
    (partial(PartMask().sample, 2, VOLUME, parts=whole(2, 23)), "[2, 23]", "[2, 24] for a grid of 2 x 3 x 4"),
    (partial(TubeMask(PartMask()).sample, 2, VOLUME, parts=whole(2, 23)), "[2, 23]", "[2, 12] for a grid of 3 x 4"),
    (partial(parts_from_segmentation, LABELS, (4,)), "[2, 4, 4]", "4 patches"),
    (partial(parts_from_segmentation, LABELS, VOLUME), "[2, 4, 4]", "2 x 3 x 4"),
    (partial(parts_from_segmentation, whole(2, 3, 4, 4), 4), "[2, 3, 4, 4]", "4 x 4"),
    *((partial(GridMask(p).sample, 2, grid), f"period={p} ", " x ".join(map(str, grid))) for p, grid in PERIODS),
    *((partial(BlockMask(size=size).sample, 2, VOLUME), f"size={size} ", "2 x 3 x 4") for size in SIZES),
    *((partial(TubeMask(RandomMask(), axis).sample, 2, VOLUME), f"axis={axis} ", "2 x 3 x 4") for axis in (3, -4)),
    (partial(TubePartitioner(CUT, 3), AFFINITY, 2, VOLUME), "axis=3 ", "2 x 3 x 4"),
    (partial(TubeMask, RandomMask(), 2, grid_size=14), "axis=2 ", "14 x 14"),
    (partial(TubeMask(RandomMask()).sample, 2, (7,)), "grid of 7 patches", "axis=0"),
    (partial(TubePartitioner(CUT), AFFINITY, 2, (24,)), "grid of 24 patches", "axis=0"),
    (partial(TubeMask(RandomMask((3, 5))).sample, 2, VOLUME), "2 x 3 x 4", "has 3 x 4", "(3, 5)"),
    (partial(GraphCutPartitioner(axis_weights=(1, 2)), AFFINITY, 2, VOLUME), "(1, 2)", "2 x 3 x 4"),
    (partial(CUT, AFFINITY, 2, (2, 3, 5)), "(2, 3, 5)", "N=24"),
    *((partial(TubePartitioner(CUT, a), AFFINITY, k, VOLUME, x), str([*x.shape]), "2 x 3 x 4") for k, a, x in OF_TUBES),
    *((partial(m.sample, 2, VOLUME, r), named) for r, named in RATIOS for m in (RandomMask(), TubeMask(RandomMask()))),
    (partial(RandomMask().sample, 2, (3, 5), ODD), "0.9375", "N=15"),
    (partial(TubeMask(RandomMask()).sample, 2, VOLUME, ODD), "0.9375", "N=12"),
    (partial(RandomMask().sample, 2, VOLUME, torch.rand(2), keep=3), "[2] for 2 images", "keep=3"),
    (partial(RandomMask(), torch.zeros(2, *VOLUME, 1), ODD), "mask_ratio=tensor([0.5000, 0.9375])"),
]


@pytest.mark.parametrize("bad", BAD, ids=[str(values) for _, *values in BAD])
def test_what_does_not_fit_is_refused_by_its_values(bad):
    with pytest.raises(ValueError, match=re.escape(bad[1])) as error:
        bad[0]()
    assert all(value in str(error.value) for value in bad[2:])


PICTURES = [(14, 14), (5, 9), (1, 7), (16, 3)]
FROZEN = "6329e31c5761fb96f3c29aa5cde87a4010f999d289b8da90b443671dea38bc38"


def frozen_bits():
    """All that masks and cuts of pictures draw, from integers and torch's generator alone."""
    digest = hashlib.sha256()
    blend = lambda end: EvolvingMask(100, end=end).set_epoch(24)  # noqa: E731  of alpha 0.5
    for grid, seed in product(PICTURES, range(5)):
        height, width = grid
        patch = torch.arange(height * width)
        parts = (patch * 7919 + seed) % 101 % 5 * torch.ones(3, 1, dtype=torch.long)
        makes = RandomMask(), GridMask(), GridMask(3), BlockMask(), BlockMask(4, area=(0.1, 0.5)), PartMask()
        for masking in (*makes, blend(PartMask()), blend(BlockMask())):
            draws = torch.Generator().manual_seed(seed)
            digest.update(masking.scores(3, grid, parts=parts, generator=draws).numpy().tobytes())
            digest.update(masking.sample(3, grid, 0.6, parts=parts, generator=draws).numpy().tobytes())
            masked = masking(torch.zeros(3, height, width, 1), keep=3, parts=parts, generator=draws)
            digest.update(masked.ids_restore.numpy().tobytes())
        one, other = patch // width * 3 // height, patch % width * 2 // width
        alike = ((one[:, None] == one) * 2 + (other[:, None] == other)) * 64
        noise = (patch[:, None] * 7919 + patch * 104729 + seed * 31) % 61
        affinity = (alike + noise).clamp(max=256).float()[None]
        pixel = torch.arange(2 * 4 * height * width)
        images = (pixel * 7919 % 101).view(1, 2, 2 * height, 2 * width)
        for pictures in (None, images) if seed < 2 else ():
            digest.update(GraphCutPartitioner(6)(affinity, grid_size=grid, images=pictures).numpy().tobytes())
    return digest.hexdigest()


def test_pictures_have_the_bits_that_they_had_before_there_were_other_grids():
    assert frozen_bits() == FROZEN


@pytest.mark.parametrize(
    "make", [lambda: GridMask((1, 2, 2)), BlockMask, lambda: TubeMask(EvolvingMask(4).set_epoch(1))]
)
def test_masks_of_clips_compile_whole(make):
    masking, x, parts = make(), torch.randn(2, *VOLUME, 3), torch.arange(24).expand(2, -1) // 5
    torch._dynamo.reset()
    masks = []
    for mask in (masking, torch.compile(masking, fullgraph=True, backend="eager")):
        torch.manual_seed(0)
        masks.append(mask(x, 0.5, parts=parts if masking.needs_parts else None))
    assert all(map(torch.equal, *masks))
