"""Min cut by synchronous push-relabel in plain torch: the whole batch at once, on any device.

In one direction at a time every node has one target, so a push is a shift of the grid and needs no atomics.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import offsets

SWEEPS = 8  # between two exact recomputations of the heights


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor) -> Tensor:
    """See `grid_min_cut`."""
    axes = source.ndim - 1
    padded = [source.shape[1], *(size + 1 for size in source.shape[2:])]
    ahead = [math.prod(padded[axis + 1 :]) for axis in range(axes)]  # in memory, one step along each axis
    steps = [sum(map(math.prod, zip(offset, ahead, strict=True))) for offset in offsets(axes)]
    far = source[0].numel() + 1  # farther from the sink than any node that reaches it
    drawn = source.long() - sink.long()  # 64 bits: the sums of 32-bit capacities do not overflow
    # There is a zero after each row (and an empty row after each slice): so a neighbour is a fixed step in memory,
    # [B, H * (W + 1)], and what leaves the grid leads to an empty place or out of the array, where nothing is lower.
    borders = (0, 1) * (axes - 1)
    excess, to_sink = (pad(terminal.clamp(min=0), borders).flatten(1) for terminal in (drawn, -drawn))
    residual = [pad(edges.long(), borders).flatten(1) for edges in capacity.unbind(1)]

    def lowest_neighbour(height: Tensor) -> Tensor:
        """One more than the lowest end of a node's residual edges."""
        lowest = torch.where(to_sink > 0, 1, far)
        for room, step in zip(residual, steps, strict=True):
            here, there = _ends(lowest, step)[0], _ends(height, step)[1]
            torch.minimum(here, torch.where(_ends(room, step)[0] > 0, there + 1, far), out=here)
        return lowest

    while True:
        # Residual edges on the shortest way to the sink; `far` where there is none.
        height = torch.where(to_sink > 0, 1, far)
        while not torch.equal(nearer := torch.minimum(height, lowest_neighbour(height)), height):
            height = nearer
        if not ((excess > 0) & (height < far)).any():
            inside: list[Any] = [slice(size) for size in source.shape[1:]]
            return (height < far).view(-1, *padded)[(..., *inside)]
        for _ in range(SWEEPS):
            # Move excess to the sink and to every neighbour that is one step lower.
            flow = torch.minimum(excess, to_sink) * (height == 1)
            excess, to_sink = excess - flow, to_sink - flow
            for direction, step in enumerate(steps):
                (here, there), (height_here, height_there) = _ends(excess, step), _ends(height, step)
                room = _ends(residual[direction], step)[0]
                flow = torch.minimum(here, room) * (height_here == height_there + 1)
                here -= flow
                there += flow
                room -= flow
                _ends(residual[direction ^ 1], step)[1].add_(flow)
            # Lift the nodes that hold excess just above their lowest neighbour.
            height = torch.where(excess > 0, torch.maximum(height, lowest_neighbour(height)), height)


def _ends(tensor: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Two views: the nodes that have another one so far ahead in memory, and those others."""
    return (tensor[:, :-step], tensor[:, step:]) if step > 0 else (tensor[:, -step:], tensor[:, :step])
