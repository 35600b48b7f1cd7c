"""Exact min cuts on 8-neighbour grids, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

# Not `import torch`: in this package that name is the solver beside this file.
from torch import Tensor, arange, device, equal, int32

from .. import kernels as fused

__all__ = ["OFFSETS", "SOLVERS", "grid_min_cut"]

OFFSETS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
"""(rows, columns) to the neighbour in each direction: E, W, S, N, SE, NW, SW, NE. Direction d ^ 1 is the way back."""

SOLVERS = ("auto", "pymaxflow", "torch", "triton")


def grid_min_cut(source: Tensor, sink: Tensor, capacity: Tensor, *, solver: str = "auto") -> Tensor:
    """The minimum cut of every grid of the batch: which nodes can still reach the sink.

    That set is the same for every maximum flow, so all solvers give the same bits.

    Args:
        source: [B, H, W] int32 >= 0, capacity from the source to each node.
        sink: [B, H, W] int32 >= 0, capacity from each node to the sink.
        capacity: [B, 8, H, W] int32 >= 0, capacity from each node to its neighbour in the directions E, W, S, N, SE,
            NW, SW, NE. What leaves the grid is ignored.
        solver: "pymaxflow" (CPU; PyMaxflow is under the GPL and is imported only here), "torch" (any device), "triton"
            (a GPU; the host does not wait, but grids of more than 1024 nodes go to torch, where it does), or "auto":
            pymaxflow for tensors on the CPU where it is installed; triton on a GPU where it is installed and, tried
            once, gives the bits of torch (MASKEVOLVE_KERNELS=0 turns it off); else torch.

    Returns:
        [B, H, W] bool: True on the sink's side; on the device of `source`.

    Raises:
        ValueError: where a shape, a dtype or the solver is wrong, or (checked on the CPU only) a capacity is negative;
            where "triton" is asked for and cannot run.

    Examples:
        >>> import torch
        >>> source, sink = torch.tensor([[[9, 0, 0]]]).int(), torch.tensor([[[0, 0, 9]]]).int()
        >>> capacity = torch.zeros(1, 8, 1, 3).int()
        >>> capacity[0, 0] = torch.tensor([5, 3, 0])  # to the east
        >>> grid_min_cut(source, sink, capacity)
        tensor([[[False, False,  True]]])

    Source: A. Goldberg and R. Tarjan, A new approach to the maximum-flow problem, https://doi.org/10.1145/48014.61051;
    Y. Boykov and V. Kolmogorov, An experimental comparison of min-cut/max-flow algorithms,
    https://doi.org/10.1109/TPAMI.2004.60
    """
    _check(source, sink, capacity)
    if not source.numel():
        return source > 0
    return _solver(solver, source.device)(source, sink, capacity)


def _solver(name: str, on: device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name not in SOLVERS:
        raise ValueError(f"solver={name!r} is not one of {', '.join(map(repr, SOLVERS))}")
    if name == "triton" and fused.OFF:
        raise ValueError('solver="triton" is turned off by MASKEVOLVE_KERNELS=0: use solver="auto"')
    if name == "auto":
        on_cpu = "pymaxflow" if on.type == "cpu" and find_spec("maxflow") else "torch"
        name = "triton" if fused.works("min cuts", on, _agrees) else on_cpu
    if name == "pymaxflow":
        from .pymaxflow import min_cut
    elif name == "triton":
        from .kernel import min_cut
    else:
        from .plain import min_cut
    return min_cut


def _agrees(on: device) -> bool:
    """Whether the kernel cuts two small grids as plain torch does."""
    from .kernel import min_cut as by_kernel
    from .plain import min_cut

    draws = (arange(2 * 10 * 3 * 4, device="cpu") * 7919 % 101).int().view(2, 10, 3, 4)
    grids = [(draws[:, 0] - 50).clamp(min=0), (50 - draws[:, 1]).clamp(min=0), draws[:, 2:] // 4]
    return equal(by_kernel(*(tensor.to(on) for tensor in grids)).cpu(), min_cut(*grids))


def _check(source: Tensor, sink: Tensor, capacity: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (source, sink, capacity)]
    if source.ndim != 3 or shapes[1] != shapes[0] or shapes[2] != [shapes[0][0], 8, *shapes[0][1:]]:
        raise ValueError(
            "source and sink must be [B, H, W] and capacity [B, 8, H, W], "
            f"but they are {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    dtypes = [tensor.dtype for tensor in (source, sink, capacity)]
    if set(dtypes) != {int32}:
        raise ValueError(f"source, sink and capacity must be int32, but they are {', '.join(map(str, dtypes))}")
    if source.device.type == "cpu" and source.numel():
        least = min(int(tensor.min()) for tensor in (source, sink, capacity))
        if least < 0:
            raise ValueError(f"capacities must not be negative, but one is {least}")
