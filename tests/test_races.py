"""No kernel has a data race, and every barrier is needed: a detector finds one where a barrier is taken out."""

import inspect
from importlib.util import find_spec

import pytest
import torch
import triton
import triton.language as tl
from races import Races
from test_masks import seeded
from test_mincut import random_grid
from test_twomeans import gram_of, random_features, random_sides

from maskevolve.masks.shuffle import Blend, GroupDraws, random_key
from maskevolve.masks.shuffle import kernel as shuffle
from maskevolve.parts.mincut import kernel as mincut
from maskevolve.parts.split import kernel as twomeans

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU"),
    pytest.mark.skipif(find_spec("triton.knobs") is None, reason="the detector knows the interpreter of Triton 3.4 on"),
]


def cut(height, width, sparse=0.3):
    mincut.min_cut(*random_grid(height, width, 50, sparse, seed=height, batch_size=2))


def tree(patches, levels=2):
    parts = twomeans.TritonParts(gram_of(random_features(patches, 3, seed=patches)))
    for level in range(levels):
        parts.terminals()
        parts.split(random_sides(patches, level))


def sort(patches, blend=True):  # interpreted, a sort is slow
    groups = torch.randint(4, (3, patches), generator=seeded())
    draws = GroupDraws(random_key(3, None, seeded()), groups)
    scores = Blend(draws, torch.rand(3, patches), torch.tensor(0.5)) if blend else torch.randn(1, patches)
    shuffle.shuffle(scores, random_key(3, None, seeded()), patches, (patches + 3) // 4)


def take(patches, width):
    ids = torch.stack([torch.randperm(patches, generator=seeded(i)) for i in range(3)])
    x = torch.randn(3, patches, width)
    shuffle.take(shuffle.take(x, ids[:, : patches // 2], ids.argsort(1)), ids.argsort(1), ids)


CASES = {
    "cut 1 x 1": lambda: cut(1, 1),
    "cut 1 x 9": lambda: cut(1, 9),
    "cut 6 x 6": lambda: cut(6, 6, sparse=0),
    "cut 14 x 14": lambda: cut(14, 14, sparse=0.9),
    "cut 32 x 32": lambda: cut(32, 32, sparse=0.97),
    "tree of 1": lambda: tree(1),
    "tree of 20": lambda: tree(20, levels=3),
    "tree of 49": lambda: tree(49),
    "tree of 196": lambda: tree(196, levels=1),
    "sort of 1": lambda: sort(1),
    "sort of 49": lambda: sort(49),
    "sort of 49 scores": lambda: sort(49, blend=False),
    "take of 16 x 1": lambda: take(16, 1),
    "take of 49 x 5": lambda: take(49, 5),
    "take of 10 x 1030": lambda: take(10, 1030),
}


@pytest.mark.parametrize("run", CASES.values(), ids=CASES.keys())
def test_no_kernel_has_a_race(run):
    with Races() as races:
        run()
    assert races.programs > 1
    assert races.stores > 0
    assert not races.found


def barriers_of(module):
    lines, first = inspect.getsourcelines(module)
    return [(module.__file__, max(first, 1) + i) for i, line in enumerate(lines) if "tl.debug_barrier()" in line]


BARRIERS = {mincut: lambda: cut(2, 3), twomeans: lambda: tree(49, levels=1)}


@pytest.mark.parametrize(("module", "run"), BARRIERS.items(), ids=["mincut", "twomeans"])
def test_every_barrier_is_watched(module, run):
    with Races() as races:
        run()
    assert races.barriers == set(barriers_of(module))


@pytest.mark.parametrize(
    ("barrier", "run"), [(barrier, run) for module, run in BARRIERS.items() for barrier in barriers_of(module)]
)
def test_a_barrier_that_is_taken_out_is_a_race(barrier, run):
    with Races(without=frozenset([barrier])) as races:
        run()
    assert barrier in races.barriers
    assert any(race.startswith("threads") for race in races.found)


# What the detector must tell apart, on kernels of four lines.


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


@triton.jit
def two_store_in_one_place(out):
    tl.store(out + tl.program_id(0) * 16 + tl.arange(0, 16) // 2, 1)


@triton.jit
def another_shape(out):
    place = out + tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(place, 1)
    tl.load(place[None, :])


@triton.jit
def all_load_what_one_stores(out):
    out += tl.program_id(0)
    tl.store(out, 1)
    tl.load(out)


@triton.jit
def stores_what_another_has_loaded(out):
    place = out + tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.load(out + tl.program_id(0) * 16 + 15 - tl.arange(0, 16))
    tl.store(place, 1)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (own_places, ""),
        (same_places, "programs"),
        (loads_what_another_stores, "programs"),
        (two_store_in_one_place, "threads"),
        (another_shape, "threads"),
        (all_load_what_one_stores, "threads"),
        (stores_what_another_has_loaded, "threads"),
    ],
)
def test_what_is_a_race(kernel, kind):
    with Races() as races:
        kernel[(2,)](torch.zeros(48, dtype=torch.int32))
    assert {race.split(":")[0] for race in races.found} == ({kind} if kind else set())
