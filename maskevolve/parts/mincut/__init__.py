"""Exact min cuts on grids of one to three axes, between all neighbours, a whole batch at a time."""

import math
import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel_trial


def offsets(axes: int) -> tuple[tuple[int, ...], ...]:
    """Steps along each axis to all 3 ** axes - 1 neighbours. Direction d ^ 1 is the way back.

    Those without a step along the first axis come first, in the order that they have on a grid without it. Of the rest,
    the one straight along it is followed by those to the side, in that order.

    Examples:
        >>> offsets(2)  # E, W, S, N, SE, NW, SW, NE
        ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
    """
    if axes == 0:
        return ()
    beside = offsets(axes - 1)
    onward = [(1, *step) for step in ((0,) * (axes - 1), *beside)]
    pairs = [(step, tuple(-each for each in step)) for step in onward]
    return (*((0, *step) for step in beside), *(step for pair in pairs for step in pair))


OFFSETS = offsets(2)
"""(rows, columns) to the neighbour in each direction of a picture: E, W, S, N, SE, NW, SW, NE."""

SOLVERS = {"auto": "", "pymaxflow": "PyMaxflow", "scipy": "SciPy", "torch": "", "triton": "triton"}  # and its package


def grid_min_cut(source: Tensor, sink: Tensor, capacity: Tensor, *, solver: str = "auto") -> Tensor:
    """The minimum cut of every grid of the batch: which nodes can still reach the sink.

    Args:
        source: [B, H, W] int32 >= 0, capacity from the source to each node; [B, L] or [B, D, H, W] on other grids.
        sink: the same from each node to the sink.
        capacity: [B, 8, H, W] int32 >= 0, capacity from each node to its neighbour in the directions E, W, S, N, SE,
            NW, SW, NE. What leaves the grid is ignored. On one axis there are two, [B, 2, L]: E, W. On three there are
            26, [B, 26, D, H, W]: the 8 of a slice, then to the next slice and from it: straight, E, W, S, N, ...: see
            `offsets`.
        solver: "pymaxflow" (CPU; PyMaxflow is under the GPL and is imported only here), "scipy" (CPU), "torch" (any
            device), "triton" (a GPU; the host does not wait), or "auto". That is triton on a GPU where it is installed
            and, tried once, gives the bits of torch (MASKEVOLVE_KERNELS=0 turns it off), for grids of two axes and up
            to 4096 nodes; else pymaxflow where it is installed, or scipy. These two copy tensors of a GPU to the host
            and wait. They also cut the other grids of who asks for triton.

    Returns:
        bool, of the shape and on the device of `source`: True on the sink's side. That set is the same for every
        maximum flow, so all solvers give the same bits.

    Raises:
        ImportError: where the package of the solver is not installed.
        ValueError: where a shape, a dtype or the solver is wrong, or (checked on the CPU only) a capacity is negative;
            where "triton" is asked for and cannot run.

    Examples:
        >>> source, sink = torch.tensor([[[9, 0, 0]]]).int(), torch.tensor([[[0, 0, 9]]]).int()
        >>> capacity = torch.zeros(1, 8, 1, 3).int()
        >>> capacity[0, 0] = torch.tensor([5, 3, 0])  # to the east
        >>> grid_min_cut(source, sink, capacity)
        tensor([[[False, False,  True]]])

    Source: A. Goldberg and R. Tarjan, A new approach to the maximum-flow problem, https://doi.org/10.1145/48014.61051;
    Y. Boykov and V. Kolmogorov, An experimental comparison of min-cut/max-flow algorithms,
    https://doi.org/10.1109/TPAMI.2004.60
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(map(repr, SOLVERS))}")
    tensors = (source, sink, capacity)
    shape, *others = [list(tensor.shape) for tensor in tensors]
    fits = 2 <= source.ndim <= 4 and others == [shape, [shape[0], 3 ** (source.ndim - 1) - 1, *shape[1:]]]
    if not fits or {tensor.dtype for tensor in tensors} != {torch.int32}:
        given = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        must = "int32, [B, H, W] twice and [B, 8, H, W] (or [B, 2, L], [B, 26, D, H, W] on grids of other axes)"
        raise ValueError(f"source, sink and capacity must be {must}, but are {given}")
    if not source.numel():
        return source > 0
    for name, tensor in zip(("source", "sink", "capacity"), tensors, strict=True):
        if source.device.type == "cpu" and (least := int(tensor.min())) < 0:
            raise ValueError(f"capacities must not be negative, but {name} has {least}")
    if solver == "triton" and kernel_trial.OFF:
        raise ValueError('solver="triton" is turned off by MASKEVOLVE_KERNELS=0: use solver="auto"')
    if solver == "triton" and source.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('solver="triton" needs tensors on a GPU, but these are on the CPU: use solver="auto"')
    fits = source.ndim == 3 and source[0].numel() <= kernel_trial.MOST_PATCHES
    if solver == "auto" and fits and kernel_trial.kernel_works("min cuts", source.device, _small_cuts):
        solver = "triton"
    elif solver == "auto" or (solver == "triton" and not fits):  # torch is slower than the way to the host
        solver = "pymaxflow" if find_spec("maxflow") else "scipy"
    try:
        module = import_module({"torch": ".plain", "triton": ".kernel"}.get(solver, f".{solver}"), __package__)
        cut: Tensor = module.min_cut(source, sink, capacity)
    except ImportError as error:
        needed = f'solver="{solver}" needs {SOLVERS[solver]}: pip install {SOLVERS[solver]}'
        raise ImportError(f'{needed}, or use solver="auto"') from error
    return cut


@lru_cache(64)
def neighbours(*grid: int) -> Any:
    """The neighbour of each node of a grid in each direction, [3 ** d - 1, N]; the node itself where there is none."""
    node = np.arange(math.prod(grid))
    sizes = np.array(grid)[:, None]
    around = np.stack(np.unravel_index(node, grid)) + np.array(offsets(len(grid)))[..., None]
    inside = ((around >= 0) & (around < sizes)).all(1)
    return np.where(inside, np.ravel_multi_index(tuple(np.moveaxis(around, 1, 0)), grid, mode="clip"), node)


@lru_cache(64)
def _edges_of_one(*grid: int) -> tuple[Any, Any, Any, Any]:
    there, nodes = neighbours(*grid)[::2], math.prod(grid)
    pair, here = np.nonzero(there != np.arange(nodes))
    there = there[pair, here]
    return here, there, 2 * pair * nodes + here, (2 * pair + 1) * nodes + there


def grid_edges(capacity: Any) -> tuple[Any, Any, Any, Any]:
    """Of capacities [B, 8, H, W], each pair of neighbours once: from, to, capacity forth and back, all flat."""
    here, there, forth, back = _edges_of_one(*capacity.shape[2:])
    first = np.arange(len(capacity))[:, None] * math.prod(capacity.shape[2:])
    flat = capacity.reshape(len(capacity), -1)
    return (first + here).ravel(), (first + there).ravel(), flat[:, forth].ravel(), flat[:, back].ravel()


def _small_cuts(device: torch.device, by_kernel: bool) -> list[Tensor]:
    draws = (torch.arange(2 * 10 * 3 * 4, device="cpu") * 7919 % 101).int().view(2, 10, 3, 4)
    grids = (draws[:, 0] - 50).clamp(min=0), (50 - draws[:, 1]).clamp(min=0), draws[:, 2:] // 4
    for tensor in grids:
        tensor[1] <<= 23  # one image that fits 32 bits, and one that does not
    return [grid_min_cut(*(tensor.to(device) for tensor in grids), solver="triton" if by_kernel else "torch")]
