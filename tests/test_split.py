"""The tree of parts against a plain loop over whole numbers, and its kernels, interpreted, against plain torch."""

from fractions import Fraction
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention
from torch.utils._python_dispatch import TorchDispatchMode

from maskevolve import GraphCutPartitioner
from maskevolve.parts import graph_cut
from maskevolve.parts.edges import contrast_edges
from maskevolve.parts.mincut import OFFSETS
from maskevolve.parts.split.kernel import TritonParts
from maskevolve.parts.split.plain import LLOYD_STEPS, SCALE, HostParts


def random_features(patches, dimensions, seed, batch_size=2):
    """Few different whole numbers, so that patches tie."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (batch_size, patches, dimensions), generator=draws)


def gram_of(features):
    return (features @ features.mT).float()


def random_edges(height, width, seed, batch_size=2):
    """Edges between neighbours, [B, 8, N] int32, 0 where there is none."""
    draws = torch.Generator().manual_seed(seed)
    edges = torch.randint(2**30, (batch_size, 8, height, width), generator=draws).int()
    for direction, (row, column) in enumerate(OFFSETS):
        edges[:, direction, slice(-row, None) if row > 0 else slice(0, -row)] = 0
        edges[:, direction, :, slice(-column, None) if column > 0 else slice(0, -column)] = 0
    return edges.flatten(2)


def root(make, features, weaken=True):
    """One part an image; patches in two rows where they are even."""
    batch_size, patches, _ = features.shape
    grid = (2, patches // 2) if patches % 2 == 0 else (1, patches)
    return make(gram_of(features), random_edges(*grid, patches, batch_size), grid, weaken)


def random_sides(patches, seed, batch_size=2):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, patches, generator=draws) < torch.rand(batch_size, 1, generator=draws)


def centred(points):
    return points - points.sum(0) / len(points)


def inertia(points):
    return (centred(points) ** 2).sum()


def loop_terminals(points):
    """How far each point of a part is along the line through two means, first less second, the part's mean at 0."""
    points = centred(points)
    first = max(points, key=lambda point: point @ point)  # the first of equals
    second = max(points, key=lambda point: (point - first) @ (point - first))
    for _ in range(LLOYD_STEPS + 1):
        along = points @ (first - second)
        halves = points[along >= 0], points[along < 0]
        if not all(map(len, halves)):
            break
        first, second = (half.sum(0) / len(half) for half in halves)
    return along


def check_capacities(capacity, parts):
    """Edges of 0.9 a level within a part, weaker in proportion where it is below an eighth of the image; else 0."""
    height, width = parts.grid
    for image, direction, patch in np.ndindex(*capacity.shape):
        row, column = patch // width + OFFSETS[direction][0], patch % width + OFFSETS[direction][1]
        labels, expected = parts.labels[image], 0.0
        if 0 <= row < height and 0 <= column < width and labels[row * width + column] == labels[patch]:
            share = min(1, 8 * int((labels == labels[patch]).sum()) / len(labels))
            expected = int(parts.edges[image, direction, patch]) * 0.9**parts.level * share
        assert int(capacity[image, direction, patch]) == pytest.approx(expected, rel=1e-4, abs=1)


def test_edges_from_an_affinity_are_not_weakened():
    parts = root(HostParts, random_features(24, 3, seed=0), weaken=False)
    sides = random_sides(24, 1)
    parts.split(sides)
    capacity = parts.capacities()[2]
    assert ((capacity == 0) | (capacity == torch.from_numpy(parts.edges))).all()
    assert (capacity > 0).any()


@settings(max_examples=100, deadline=None)
@given(patches=st.integers(1, 24), dimensions=st.integers(1, 4), seed=st.integers(0, 10**6), levels=st.integers(0, 3))
def test_terminals_and_gains_are_those_of_a_plain_loop(patches, dimensions, seed, levels):
    features = random_features(patches, dimensions, seed)
    parts, exact = root(HostParts, features), np.vectorize(Fraction, otypes=[object])(features.tolist())
    for level in range(levels + 1):
        source, sink, capacity = parts.capacities()
        check_capacities(capacity, parts)
        assert ((source >= 0) & (sink >= 0) & ((source == 0) | (sink == 0))).all()
        sides, labels, drawn = random_sides(patches, seed + level), parts.labels.clone(), (source - sink).numpy()
        gains = parts.split(sides)
        assert torch.equal(parts.labels, 2 * labels + sides)
        for image, gains_of_image in enumerate(gains.tolist()):
            for label, gain in enumerate(gains_of_image):
                members, second = (labels[image] == label).numpy(), sides[image].numpy()
                points, halves = exact[image][members], [exact[image][members & (second == half)] for half in (0, 1)]
                if all(map(len, halves)):
                    drop = inertia(points) - sum(map(inertia, halves))
                    assert gain == pytest.approx(float(drop**2 / len(points)), rel=1e-6, abs=1e-6)
                else:
                    assert gain == -1
                if len(points):
                    along = loop_terminals(points)
                    mean_square = float(along @ along / len(along))
                    expected = (along / (mean_square**0.5 or 1) * SCALE).astype(float)
                    assert drawn[image][members] == pytest.approx(expected, rel=1e-4, abs=8)


@settings(max_examples=5, deadline=None)  # interpreted kernels are slow
@given(patches=st.integers(1, 40), dimensions=st.integers(1, 4), seed=st.integers(0, 10**6), weaken=st.booleans())
def test_kernels_have_the_same_bits(patches, dimensions, seed, weaken):
    ours, expected = (
        root(make, random_features(patches, dimensions, seed), weaken) for make in (TritonParts, HostParts)
    )
    for level in range(3):
        assert all(torch.equal(a, b) for a, b in zip(ours.capacities(), expected.capacities(), strict=True))
        sides = random_sides(patches, seed + level)
        assert torch.equal(gain := ours.split(sides), expected.split(sides))
        assert gain.dtype == torch.float64
        assert torch.equal(ours.labels, expected.labels)


def test_parts_by_kernels_alone_are_those_of_the_cpu(monkeypatch):
    _, attention = planted_attention(1, 5, 9, 4, strength=0.5, noise=1)
    expected = GraphCutPartitioner(4)(attention, grid_size=(5, 9))
    assert expected.max() == 3
    monkeypatch.setattr(graph_cut, "whole_images", TritonParts)
    assert torch.equal(GraphCutPartitioner(4, solver="triton")(attention, grid_size=(5, 9)), expected)


class Launches(TorchDispatchMode):
    """Counts the operators that a GPU would run."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "scalar_tensor", "_local_scalar_dense")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*values of images")  # which no kernel has counted
def test_a_level_is_a_few_launches(monkeypatch):
    monkeypatch.setattr(graph_cut, "whole_images", TritonParts)
    monkeypatch.setattr(graph_cut, "contrast_edges", partial(contrast_edges, by_kernel=True))
    ours = MagicMock()  # kernels that are counted and not run
    for name in (
        "split.kernel._capacities_kernel",
        "split.kernel._split_kernel",
        "mincut.kernel._min_cut_kernel",
        "edges.kernel._contrast_kernel",
    ):
        monkeypatch.setattr(f"maskevolve.parts.{name}", ours)
    monkeypatch.setattr(torch.Tensor, "min", lambda tensor: 0)  # checks capacities, on a CPU only
    partitioner, affinity, counts = GraphCutPartitioner(solver="triton"), torch.rand(1, 196, 196), {}
    for images in (None, torch.rand(1, 3, 224, 224)):
        for num_parts in (10, 40):
            before = ours.__getitem__.call_count
            with Launches() as others:
                partitioner.hierarchy(affinity, num_parts, images=images)
            counts[num_parts] = ours.__getitem__.call_count - before + others.count
        assert counts[10] < 130
        assert counts[40] - counts[10] < 10, "one level more"
