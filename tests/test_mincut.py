"""Cuts against two independent oracles: the flow in a graph that a plain loop makes, and PyMaxflow."""

import sys

import numpy as np
import pytest
import torch
from grids import KINDS, random_grids
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from maskevolve.parts import kernel_trial, mincut
from maskevolve.parts.mincut import OFFSETS, grid_min_cut
from maskevolve.parts.mincut.kernel import min_cut as triton_min_cut

SOLVERS = ["pymaxflow", "scipy", "torch", "triton"]
sizes = {"height": st.integers(1, 7), "width": st.integers(1, 7), "seed": st.integers(0, 10**6)}
capacities = {"largest": st.sampled_from([0, 1, 3, 1000, 10**6]), "sparse": st.sampled_from([0, 0.5, 0.9])}
LARGEST = 2**31 - 1
magnitudes = st.sampled_from([0, 1, 2, 50, 65536, 2**30 - 1, 2**30, LARGEST])


def random_grid(height, width, largest, sparse, seed, batch_size=1):
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randint(largest + 1, (batch_size, *shape), generator=draws)
        return (values * (torch.rand(values.shape, generator=draws) >= sparse)).int()

    return draw(height, width), draw(height, width), draw(8, height, width)


def flow_by_loop(source, sink, capacity):
    """Of one grid: capacities [N + 2, N + 2], the maximum flow by SciPy, and which nodes still reach the sink."""
    nodes = list(np.ndindex(*source.shape))
    graph = np.zeros((len(nodes) + 2, len(nodes) + 2), dtype=np.int32)
    for place, node in enumerate(nodes):
        graph[-2, place], graph[place, -1] = source[node], sink[node]
        for direction, (rows, columns) in enumerate(OFFSETS):
            if (there := (node[0] + rows, node[1] + columns)) in nodes:
                graph[place, nodes.index(there)] = capacity[(direction, *node)]
    result = maximum_flow(csr_array(graph), len(nodes), len(nodes) + 1)
    residual = csr_array((graph - result.flow.toarray() > 0).T)
    reached = breadth_first_order(residual, len(nodes) + 1, return_predecessors=False)
    return graph, result.flow_value, np.isin(np.arange(len(graph)), reached)


@pytest.mark.parametrize("solver", ["pymaxflow", "scipy", "torch"])
@settings(max_examples=40, deadline=None)
@given(**sizes, **capacities)
def test_cut_is_that_of_a_plain_loop_over_the_edges(solver, height, width, largest, sparse, seed):
    source, sink, capacity = random_grid(height, width, largest, sparse, seed)
    labels = grid_min_cut(source, sink, capacity, solver=solver)
    graph, value, reaches_sink = flow_by_loop(source[0], sink[0], capacity[0])
    assert labels.flatten().tolist() == reaches_sink[:-2].tolist()
    assert graph[~reaches_sink][:, reaches_sink].sum() == value
    assert (reaches_sink[-2], reaches_sink[-1]) == (False, True)


@settings(max_examples=200, deadline=None)
@given(**sizes, terminals=magnitudes, edges=magnitudes, sparse=st.sampled_from([0, 0.5, 0.95]))
def test_solvers_return_the_same_bits(height, width, seed, terminals, edges, sparse):
    """Up to the largest capacities, which neither 32 bits nor one flow of an image can add up."""
    source, sink, _ = random_grid(height, width, terminals, sparse, seed, batch_size=5)
    capacity = random_grid(height, width, edges, sparse, seed + 1, batch_size=5)[2]
    expected = grid_min_cut(source, sink, capacity, solver="pymaxflow")
    for solver in ("scipy", "torch"):
        assert torch.equal(grid_min_cut(source, sink, capacity, solver=solver), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flow", [2**30 - 1, 2**30, LARGEST])
@pytest.mark.parametrize("edge", [2**30 - 1, 2**30, LARGEST])
def test_what_flows_back_along_an_edge_may_exceed_32_bits(solver, flow, edge):
    """Much goes from patch 3 to its neighbour 4; then the 7 of patch 7, farther from a sink, come the other way."""
    source, sink = torch.zeros(2, 1, 1, 8, dtype=torch.int32)
    source[..., 3] = sink[..., 4] = min(flow, edge)
    source[..., 7] = sink[..., 0] = 7
    capacity = torch.full((1, 8, 1, 8), edge, dtype=torch.int32)
    assert not grid_min_cut(source, sink, capacity, solver=solver).any(), "all of it arrives"


def test_auto_on_a_cpu_does_without_pymaxflow(monkeypatch):
    """It takes SciPy's flow then: neither plain torch, nor a package that is not there. Others say what they need."""
    grid = random_grid(6, 7, 1000, 0.3, seed=4, batch_size=3)
    expected = grid_min_cut(*grid, solver="pymaxflow")
    monkeypatch.setattr("maskevolve.parts.mincut.plain.min_cut", None)
    for solver, file, module in (("pymaxflow", "pymaxflow", "maxflow"), ("triton", "kernel", "triton")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, f"maskevolve.parts.mincut.{file}", raising=False)
        with pytest.raises(ImportError, match=f"(?i){solver}.*pip install {solver}"):
            grid_min_cut(*grid, solver=solver)
    assert torch.equal(grid_min_cut(*grid), expected)


@pytest.mark.parametrize("rounds", [0, 1, 2])
@settings(max_examples=4, deadline=None)  # an interpreted kernel is slow
@given(**sizes, largest=st.sampled_from([1, 50, 2**31 - 1]), sparse=st.sampled_from([0, 0.5]))
def test_kernel_returns_the_same_bits_whatever_its_bound(rounds, height, width, seed, largest, sparse):
    grid = random_grid(height, width, largest, sparse, seed)
    assert torch.equal(triton_min_cut(*grid, rounds=rounds), grid_min_cut(*grid, solver="torch"))


ONE_BAND = [(kind, 6, 7, 1024) for kind in KINDS]
MANY_BANDS = [(kind, 9, 5, 32) for kind in ("limits", "sparse", "snake", "comb", "corner")] + [("limits", 2, 20, 32)]


@pytest.mark.parametrize(("kind", "height", "width", "band"), ONE_BAND + MANY_BANDS)
def test_easy_and_hard_grids_give_the_same_bits_in_one_band_and_in_many(kind, height, width, band):
    """With sums that fit 32 bits and, but for kinds of small numbers, with sums that do not, in one batch."""
    grid = random_grids(kind, height, width, torch.Generator().manual_seed(height), batch_size=2)
    for tensor in grid:
        tensor[1] %= 10
    expected = grid_min_cut(*grid, solver="pymaxflow")
    assert torch.equal(triton_min_cut(*grid, band=band), expected)
    assert torch.equal(grid_min_cut(*grid, solver="scipy"), expected)


@pytest.mark.parametrize("solver", ["triton", "auto"])
@pytest.mark.parametrize("installed", [True, False], ids=["PyMaxflow", "SciPy"])
def test_grids_beyond_the_kernel_are_cut_on_the_host(solver, installed, monkeypatch):
    """By the solver that "auto" takes on a CPU, and not by plain torch, which is slow; on a GPU too."""
    grid = random_grid(65, 64, 100, 0.2, seed=0)
    for name in ("kernel", "plain", *(["pymaxflow"] if not installed else [])):
        monkeypatch.setattr(f"maskevolve.parts.mincut.{name}.min_cut", None)
    monkeypatch.setattr(mincut, "find_spec", lambda name: installed)
    monkeypatch.setattr(kernel_trial, "kernel_works", lambda *args: True)
    cut = grid_min_cut(*grid, solver=solver)
    monkeypatch.undo()
    assert torch.equal(cut, grid_min_cut(*grid, solver="scipy" if installed else "pymaxflow"))


def test_a_cpu_does_not_run_the_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="GPU"):
        grid_min_cut(*random_grid(3, 3, 9, 0, seed=0), solver="triton")


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_images_are_cut_each_for_itself_and_left_alone_and_capacities_that_leave_the_grid_are_ignored(solver):
    (source, sink, capacity), before = (random_grid(4, 5, 9, 0.2, seed=2, batch_size=3) for _ in range(2))
    images = zip(source.split(1), sink.split(1), capacity.split(1), strict=True)
    expected = torch.cat([grid_min_cut(*image, solver=solver) for image in images])
    assert expected.dtype == torch.bool
    assert torch.equal(grid_min_cut(source, sink, capacity, solver=solver), expected)
    assert all(map(torch.equal, (source, sink, capacity), before))
    assert grid_min_cut(source[:0], sink[:0], capacity[:0], solver=solver).shape == (0, 4, 5)
    capacity[:, 0, :, -1] = capacity[:, 3, 0] = capacity[:, 6, :, 0] = 2**31 - 1  # east, north, south-west
    assert torch.equal(grid_min_cut(source, sink, capacity, solver=solver), expected)


def test_bad_input():
    source, sink, capacity = random_grid(3, 4, 9, 0, seed=0)
    for grid, solver, named in (
        ((source, sink[..., :3], capacity), "auto", r"\[1, 3, 3\]"),
        ((source, sink, capacity[:, :4]), "auto", r"\[1, 4, 3, 4\]"),
        ((source, sink.float(), capacity), "auto", "float32"),
        ((source, sink, capacity - 100), "auto", "-100"),
        ((source, sink, capacity), "magic", "'magic'"),
    ):
        with pytest.raises(ValueError, match=named):
            grid_min_cut(*grid, solver=solver)
