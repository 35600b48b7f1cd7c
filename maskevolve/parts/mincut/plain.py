"""Min cut by synchronous push-relabel in plain torch: the whole batch at once, on any device.

In one direction at a time every node has one target, so a push is a shift of the grid and needs no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import OFFSETS

SWEEPS = 8  # between two exact recomputations of the heights


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor) -> Tensor:
    """See `grid_min_cut`."""
    grid = _Grid(source, sink, capacity)
    height = grid.distance_to_sink()
    while bool(((grid.excess > 0) & (height < grid.far)).any()):
        for _ in range(SWEEPS):
            grid.push(height)
            height = grid.relabel(height)
        height = grid.distance_to_sink()
    reaches_sink = (height < grid.far).view(*source.shape[:2], -1)
    return reaches_sink[..., :-1]


class _Grid:
    """Residual capacities and excess. Rows end in one empty column, so that a neighbour is a fixed step in memory."""

    def __init__(self, source: Tensor, sink: Tensor, capacity: Tensor) -> None:
        rows, columns = source.shape[1:]
        self.steps = [row * (columns + 1) + column for row, column in OFFSETS]
        self.far = rows * columns + 1  # farther from the sink than any node that reaches it
        # 64 bits: the sums of 32-bit capacities do not overflow.
        straight = torch.minimum(source, sink).long()
        self.excess = _pad(source.long() - straight)
        self.to_sink = _pad(sink.long() - straight)
        # What leaves the grid leads to an empty column or out of the array, where nothing is lower.
        self.residual = [_pad(capacity[:, direction].long()) for direction in range(8)]

    def ends(self, tensor: Tensor, direction: int) -> tuple[Tensor, Tensor]:
        """Two views: the nodes that have somewhere to push in this direction, and where they push to."""
        step = self.steps[direction]
        return (tensor[:, :-step], tensor[:, step:]) if step > 0 else (tensor[:, -step:], tensor[:, :step])

    def push(self, height: Tensor) -> None:
        """Move excess to the sink and to every neighbour that is one step lower."""
        flow = torch.minimum(self.excess, self.to_sink) * (height == 1)
        self.excess -= flow
        self.to_sink -= flow
        for direction in range(8):
            excess, excess_there = self.ends(self.excess, direction)
            height_here, height_there = self.ends(height, direction)
            residual = self.ends(self.residual[direction], direction)[0]
            flow = torch.minimum(excess, residual) * (height_here == height_there + 1)
            excess -= flow
            excess_there += flow
            residual -= flow
            self.ends(self.residual[direction ^ 1], direction)[1].add_(flow)

    def lowest_neighbour(self, height: Tensor) -> Tensor:
        """One more than the lowest end of a node's residual edges."""
        lowest = torch.where(self.to_sink > 0, 1, self.far)
        for direction in range(8):
            here, there = self.ends(lowest, direction)[0], self.ends(height, direction)[1]
            residual = self.ends(self.residual[direction], direction)[0]
            torch.minimum(here, torch.where(residual > 0, there + 1, self.far), out=here)
        return lowest

    def relabel(self, height: Tensor) -> Tensor:
        """Lift the nodes that hold excess just above their lowest neighbour."""
        return torch.where(self.excess > 0, torch.maximum(height, self.lowest_neighbour(height)), height)

    def distance_to_sink(self) -> Tensor:
        """Residual edges on the shortest way to the sink; `far` where there is none."""
        distance = torch.where(self.to_sink > 0, 1, self.far)
        while True:
            nearer = torch.minimum(distance, self.lowest_neighbour(distance))
            if torch.equal(nearer, distance):
                return distance
            distance = nearer


def _pad(grid: Tensor) -> Tensor:
    """[B, H, W] to [B, H * (W + 1)], a zero after each row."""
    return torch.nn.functional.pad(grid, (0, 1)).flatten(1)
