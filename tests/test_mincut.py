"""Cuts against two independent oracles: SciPy for the value, PyMaxflow for the labels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from maskevolve.parts.mincut import OFFSETS, grid_min_cut
from maskevolve.parts.mincut.kernel import min_cut as triton_min_cut

SOLVERS = ["pymaxflow", "torch", "triton"]


def random_grid(height, width, largest, sparse, seed, batch_size=1):
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randint(largest + 1, shape, generator=draws)
        return (values * (torch.rand(shape, generator=draws) >= sparse)).int()

    return draw(batch_size, height, width), draw(batch_size, height, width), draw(batch_size, 8, height, width)


def edges_of(capacity):
    """(from, to, capacity) of every edge inside one grid [8, H, W]; nodes are (row, column)."""
    _, height, width = capacity.shape
    for direction, (rows, columns) in enumerate(OFFSETS):
        for row in range(height):
            for column in range(width):
                there = (row + rows, column + columns)
                if 0 <= there[0] < height and 0 <= there[1] < width:
                    yield (row, column), there, int(capacity[direction, row, column])


def cut_value(source, sink, capacity, on_sink_side):
    """What the labels of one grid cut through."""
    value = int(source[on_sink_side].long().sum() + sink[~on_sink_side].long().sum())
    return value + sum(weight for a, b, weight in edges_of(capacity) if not on_sink_side[a] and on_sink_side[b])


def scipy_cut(source, sink, capacity):
    """Value of the maximum flow by SciPy, and the nodes that can still reach the sink in its residual graph."""
    height, width = source.shape
    nodes = {(row, column): row * width + column for row in range(height) for column in range(width)}
    s, t = len(nodes), len(nodes) + 1
    edges = [(nodes[a], nodes[b], weight) for a, b, weight in edges_of(capacity)]
    edges += [(s, node, int(source[at])) for at, node in nodes.items()]
    edges += [(node, t, int(sink[at])) for at, node in nodes.items()]
    rows, columns, weights = np.array(edges, dtype=np.int32).T
    graph = coo_array((weights, (rows, columns)), shape=(t + 1, t + 1)).tocsr()
    result = maximum_flow(graph, s, t)
    backwards = csr_array(((graph - result.flow) > 0).T)
    reaches_sink = np.zeros(t + 1, dtype=bool)
    reaches_sink[breadth_first_order(backwards, t, return_predecessors=False)] = True
    return result.flow_value, torch.from_numpy(reaches_sink[:s]).view(height, width)


sizes = {"height": st.integers(1, 7), "width": st.integers(1, 7), "seed": st.integers(0, 10**6)}
capacities = {"largest": st.sampled_from([0, 1, 3, 1000, 10**6]), "sparse": st.sampled_from([0, 0.5, 0.9])}


@pytest.mark.parametrize("solver", ["pymaxflow", "torch"])
@settings(max_examples=50, deadline=None)
@given(**sizes, **capacities)
def test_cut_is_that_of_scipys_flow(solver, height, width, largest, sparse, seed):
    source, sink, capacity = random_grid(height, width, largest, sparse, seed)
    labels = grid_min_cut(source, sink, capacity, solver=solver)
    value, reaches_sink = scipy_cut(source[0], sink[0], capacity[0])
    assert cut_value(source[0], sink[0], capacity[0], labels[0]) == value
    assert torch.equal(labels[0], reaches_sink)


@settings(max_examples=100, deadline=None)
@given(**sizes, largest=st.sampled_from([0, 1, 2, 50, 65536, 2**31 - 1]), sparse=st.sampled_from([0, 0.5, 0.95]))
def test_solvers_return_the_same_bits(height, width, seed, largest, sparse):
    grid = random_grid(height, width, largest, sparse, seed, batch_size=5)
    assert torch.equal(grid_min_cut(*grid, solver="pymaxflow"), grid_min_cut(*grid, solver="torch"))


@pytest.mark.parametrize("rounds", [0, 1, 2])
@settings(max_examples=4, deadline=None)  # an interpreted kernel is slow
@given(**sizes, largest=st.sampled_from([1, 50, 2**31 - 1]), sparse=st.sampled_from([0, 0.5]))
def test_kernel_returns_the_same_bits_whatever_its_bound(rounds, height, width, seed, largest, sparse):
    grid = random_grid(height, width, largest, sparse, seed)
    assert torch.equal(triton_min_cut(*grid, rounds=rounds), grid_min_cut(*grid, solver="torch"))


def test_larger_grids_go_to_the_torch_solver(monkeypatch):
    grid = random_grid(33, 32, 100, 0.2, seed=0)
    expected = grid_min_cut(*grid, solver="pymaxflow")
    with monkeypatch.context() as patch:
        patch.setattr("maskevolve.parts.mincut.kernel._min_cut_kernel", None)
        assert torch.equal(grid_min_cut(*grid, solver="triton"), expected)


def test_the_kernel_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"needs tensors on a GPU"):
        grid_min_cut(*random_grid(3, 3, 9, 0, seed=0), solver="triton")


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_of_a_batch_are_cut_each_for_itself(solver):
    grids = random_grid(4, 5, 100, 0.3, seed=1, batch_size=3)
    together = grid_min_cut(*grids, solver=solver)
    alone = [grid_min_cut(*(tensor[i : i + 1] for tensor in grids), solver=solver) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("solver", SOLVERS)
def test_capacities_that_leave_the_grid_are_ignored(solver):
    source, sink, capacity = random_grid(4, 5, 9, 0.2, seed=2, batch_size=3)
    expected = grid_min_cut(source, sink, capacity, solver=solver)
    capacity[:, 0, :, -1] = capacity[:, 3, 0] = capacity[:, 6, :, 0] = 2**31 - 1  # east, north, south-west
    assert torch.equal(grid_min_cut(source, sink, capacity, solver=solver), expected)


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_inputs_are_left_alone_and_empty_batches_are_fine(solver):
    grid = random_grid(4, 5, 9, 0.2, seed=2)
    before = [tensor.clone() for tensor in grid]
    assert grid_min_cut(*grid, solver=solver).dtype == torch.bool
    assert all(torch.equal(a, b) for a, b in zip(grid, before, strict=True))
    assert grid_min_cut(*(tensor[:0] for tensor in grid), solver=solver).shape == (0, 4, 5)


def test_bad_input():
    source, sink, capacity = random_grid(3, 4, 9, 0, seed=0)
    with pytest.raises(ValueError, match=r"\[1, 3, 4\], \[1, 3, 3\] and \[1, 8, 3, 4\]"):
        grid_min_cut(source, sink[..., :3], capacity)
    with pytest.raises(ValueError, match=r"\[1, 4, 3, 4\]"):
        grid_min_cut(source, sink, capacity[:, :4])
    with pytest.raises(ValueError, match=r"int32, torch\.float32"):
        grid_min_cut(source, sink.float(), capacity)
    with pytest.raises(ValueError, match="one is -100"):
        grid_min_cut(source, sink, capacity - 100)
    with pytest.raises(ValueError, match=r"'cuda-magic'.*'pymaxflow'"):
        grid_min_cut(source, sink, capacity, solver="cuda-magic")
