"""The tree of parts against a plain loop over whole numbers, and its kernels, interpreted, against plain torch."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention
from torch.utils._python_dispatch import TorchDispatchMode

from maskevolve import GraphCutPartitioner
from maskevolve.parts import graph_cut as partition
from maskevolve.parts.mincut import kernel as mincut_triton
from maskevolve.parts.split import LLOYD_STEPS, SCALE, whole_images
from maskevolve.parts.split import kernel as kernels
from maskevolve.parts.split.kernel import TritonParts
from maskevolve.parts.split.plain import TorchParts


def random_features(patches, dimensions, seed, batch_size=2):
    """Few different whole numbers, so that patches tie."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (batch_size, patches, dimensions), generator=draws)


def gram_of(features):
    return (features @ features.mT).float()


def random_sides(patches, seed, batch_size=2):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, patches, generator=draws) < torch.rand(batch_size, 1, generator=draws)


def mean_of(points):
    return [Fraction(sum(column), len(points)) for column in zip(*points, strict=True)]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def loop_terminals(points):
    """How far each point of a part is along the line through two means, first less second, the part's mean at 0."""
    middle = mean_of(points)
    first = max(points, key=lambda point: distance(point, middle))  # the first of equals
    second = max(points, key=lambda point: distance(point, first))
    for _ in range(LLOYD_STEPS + 1):
        line = [a - b for a, b in zip(first, second, strict=True)]
        along = [sum((x - m) * d for x, m, d in zip(point, middle, line, strict=True)) for point in points]
        halves = [[p for p, a in zip(points, along, strict=True) if (a < 0) == side] for side in (False, True)]
        if not all(halves):
            break
        first, second = map(mean_of, halves)
    return along


def inertia(points):
    return sum(distance(point, mean_of(points)) for point in points)


shapes = {"patches": st.integers(1, 24), "dimensions": st.integers(1, 4), "seed": st.integers(0, 10**6)}


@settings(max_examples=100, deadline=None)
@given(**shapes, levels=st.integers(0, 3))
def test_terminals_and_gains_are_those_of_a_plain_loop(patches, dimensions, seed, levels):
    features = random_features(patches, dimensions, seed)
    parts = TorchParts(gram_of(features))
    for level in range(levels + 1):
        source, sink = parts.terminals()
        assert ((source >= 0) & (sink >= 0) & ((source == 0) | (sink == 0))).all()
        sides, labels = random_sides(patches, seed + level), parts.labels.clone()
        gains = parts.split(sides)
        assert torch.equal(parts.labels, 2 * labels + sides)
        for image, drawn in enumerate((source - sink).tolist()):
            for label in range(2**level):
                members = (labels[image] == label).nonzero().flatten().tolist()
                points = [features[image, i].tolist() for i in members]
                halves = [[features[image, i].tolist() for i in members if sides[image, i] == side] for side in (0, 1)]
                gain = gains[image, label].item()
                if all(halves):
                    drop = inertia(points) - sum(map(inertia, halves))
                    assert gain == pytest.approx(float(drop**2 / len(points)), rel=1e-6, abs=1e-6)
                else:
                    assert gain == -1
                if members:
                    along = loop_terminals(points)
                    root = float(sum(a * a for a in along) / len(along)) ** 0.5 or 1
                    expected = [float(a) / root * SCALE for a in along]
                    assert [drawn[i] for i in members] == pytest.approx(expected, rel=1e-4, abs=8)


@settings(max_examples=5, deadline=None)  # interpreted kernels are slow
@given(patches=st.integers(1, 40), dimensions=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_kernels_have_the_same_bits(patches, dimensions, seed):
    gram = gram_of(random_features(patches, dimensions, seed))
    ours, expected = TritonParts(gram.clone()), TorchParts(gram)
    for level in range(3):
        assert all(torch.equal(a, b) for a, b in zip(ours.terminals(), expected.terminals(), strict=True))
        sides = random_sides(patches, seed + level)
        gain = ours.split(sides)
        assert torch.equal(gain, expected.split(sides))
        assert gain.dtype == torch.float64
        assert torch.equal(ours.labels, expected.labels)


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(partition, "whole_images", TritonParts)


def test_parts_by_kernels_alone_are_those_of_the_cpu(fused, monkeypatch):
    _, attention = planted_attention(1, 5, 9, 4, strength=0.5, noise=1)
    parts = GraphCutPartitioner(4, solver="triton")(attention, grid_size=(5, 9))
    monkeypatch.undo()
    assert parts.max() == 3
    assert torch.equal(parts, GraphCutPartitioner(4)(attention, grid_size=(5, 9)))


def test_a_cpu_takes_plain_torch():
    assert isinstance(whole_images(gram_of(random_features(4, 2, 0))), TorchParts)


class Launches(TorchDispatchMode):
    """Counts the operators that a GPU would run, but for kernels of our own."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "scalar_tensor", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class Silent:
    """A kernel that is counted and not run."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        def run(*args, **options):
            self.count += 1

        return run


def test_a_level_is_a_few_launches(fused, monkeypatch):
    ours = Silent()
    for module, name in [
        (kernels, "_terminals_kernel"),
        (kernels, "_split_kernel"),
        (mincut_triton, "_min_cut_kernel"),
    ]:
        monkeypatch.setattr(module, name, ours)
    monkeypatch.setattr("maskevolve.parts.mincut._check", lambda *grid: None)  # reads values, on a CPU only
    partitioner, affinity, counts = GraphCutPartitioner(solver="triton"), torch.rand(1, 196, 196), {}
    for images in (None, torch.rand(1, 3, 224, 224)):
        for num_parts in (10, 40):
            partitioner.hierarchy(affinity, num_parts, images=images)  # tables of neighbours
            ours.count = 0
            with Launches() as others:
                partitioner.hierarchy(affinity, num_parts, images=images)
            counts[num_parts] = ours.count + others.count.total()
        assert counts[10] < (130 if images is None else 230)
        assert counts[40] - counts[10] < (15 if images is None else 40), "one level more"
