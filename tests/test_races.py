"""No kernel has a data race, and every barrier is needed: a detector finds one where a barrier is taken out."""

import inspect
from importlib.util import find_spec

import pytest
import torch
import triton
import triton.language as tl
from races import Races
from test_mincut import random_grid
from test_split import random_features, random_sides, root

from maskevolve.parts.edges import kernel as edges
from maskevolve.parts.mincut import kernel as mincut
from maskevolve.parts.split import kernel as split

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU"),
    pytest.mark.skipif(find_spec("triton.knobs") is None, reason="the detector knows the interpreter of Triton 3.4 on"),
]


def cut(height, width, sparse=0.3, band=1024):
    mincut.min_cut(*random_grid(height, width, 50, sparse, seed=height, batch_size=2), band=band)


def tree(patches, levels=2):
    parts = root(split.TritonParts, random_features(patches, 3, seed=patches))
    for level in range(levels):
        parts.capacities()
        parts.split(random_sides(patches, level))


def contrast(height, width, patch, channels=2):
    images = torch.randn(2, channels, height * patch, width * patch, generator=torch.Generator().manual_seed(height))
    edges.contrast_edges(images, (height, width), 1e5)


def barriers_of(module):
    lines, first = inspect.getsourcelines(module)
    return [(module.__file__, max(first, 1) + i) for i, line in enumerate(lines) if "tl.debug_barrier()" in line]


CUTS = [
    (cut, (1, 1)),
    (cut, (1, 9)),
    (cut, (6, 6, 0)),
    (cut, (14, 14, 0.9)),
    (cut, (32, 32, 0.97)),
    (cut, (12, 4, 0.8, 32)),
]
TREES = [(tree, (1,)), (tree, (20, 3)), (tree, (49,)), (tree, (196, 1))]
PICTURES = [(contrast, (5, 8, 2)), (contrast, (33, 32, 1, 1))]
BARRIERS = {
    mincut: lambda: cut(12, 4, 0.8, band=32),
    split: lambda: tree(49, levels=1),
    edges: lambda: contrast(6, 7, 2),
}
EACH = [(module, barrier) for module in BARRIERS for barrier in barriers_of(module)]


@pytest.mark.parametrize(("run", "size"), [*CUTS, *TREES, *PICTURES])
def test_no_kernel_has_a_race(run, size):
    with Races() as races:
        run(*size)
    assert (races.programs > 1, races.stores > 0, races.found) == (True, True, set())


@pytest.mark.parametrize(("module", "barrier"), EACH)
def test_every_barrier_is_watched_and_a_race_where_it_is_taken_out(module, barrier):
    with Races(without={barrier}) as races:
        BARRIERS[module]()
    assert races.barriers == set(barriers_of(module))
    assert any(race.startswith("threads") for race in races.found)


@triton.jit
def own_places(out):
    place = out + tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(place, tl.load(place) + 1)


@triton.jit
def same_places(out):
    tl.store(out + tl.arange(0, 16), tl.program_id(0))


@triton.jit
def loads_what_another_stores(out):
    place = out + 16 + tl.arange(0, 16)
    tl.store(place, tl.load(place - 16 * tl.program_id(0)))


@pytest.mark.parametrize(
    ("kernel", "kinds"), [(own_places, set()), (same_places, {"programs"}), (loads_what_another_stores, {"programs"})]
)
def test_what_is_a_race_between_programs(kernel, kinds):
    with Races() as races:
        kernel[(2,)](torch.zeros(48, dtype=torch.int32))
    assert {race.split(":")[0] for race in races.found} == kinds
