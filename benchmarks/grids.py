"""Grids that are easy and hard to cut: random ones of many kinds, and photographs' at every level of the tree."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from planted import planted_attention
from torch import Tensor

from maskevolve import GraphCutPartitioner
from maskevolve.grid import every
from maskevolve.parts import graph_cut

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from photos import centre, find_photos

Grids = tuple[Tensor, Tensor, Tensor]
KINDS = (
    "plain",
    "zero",
    "equal",
    "huge",
    "limits",
    "sparse",
    "no source",
    "no sink",
    "walls",
    "snake",
    "comb",
    "corner",
)


def random_grids(kind: str, height: int, width: int, draws: torch.Generator, batch_size: int = 8) -> Grids:
    """Grids of one size and one kind: source, sink and capacity as for `grid_min_cut`."""
    largest = {"zero": 0, "huge": 2**31 - 1}.get(kind, 10 ** int(torch.randint(1, 7, (), generator=draws)))

    def draw(*shape: int) -> Tensor:
        values = torch.randint(largest + 1, (batch_size, *shape), generator=draws)
        if kind == "equal":
            values = torch.full_like(values, largest)
        if kind == "limits":
            values = torch.where(values > largest // 2, 2**30, 0)
        if kind == "sparse":
            values *= torch.rand(values.shape, generator=draws) < 0.15
        return values.int()

    source, sink, capacity = draw(height, width), draw(height, width), draw(8, height, width)
    if kind == "no source":
        source.zero_()
    if kind == "no sink":
        sink.zero_()
    if kind == "walls":  # columns that nothing leaves: nodes that cannot be reached
        capacity[..., ::3] = 0
    if kind in ("snake", "comb"):
        capacity *= corridors(kind, height, width)
    if kind in ("snake", "comb", "corner"):  # what flows has the longest way: from one corner to the other
        source[:, 1:], source[..., 1:] = 0, 0
        sink[:, :-1], sink[..., :-1] = 0, 0
    return source, sink, capacity


def corridors(kind: str, height: int, width: int) -> Tensor:
    """1 where an edge [8, H, W] lies in the corridor: rows that join at alternate ends, or all at one end; else 0."""
    open_edges = torch.zeros(8, height, width, dtype=torch.int32)
    open_edges[:2] = 1  # along the rows
    for row in range(height - 1):
        column = 0 if kind == "snake" and row % 2 else width - 1
        open_edges[2, row, column] = open_edges[3, row + 1, column] = 1
    return open_edges


def photograph_grids(side: int, batch_size: int) -> list[Grids]:
    """What the default partitioner cuts at each level: real pictures, and attention of every second patch, planted."""
    photos = [centre(path, 16 * side) for path in find_photos(None)]
    images = torch.stack([photos[index % len(photos)] for index in range(batch_size)])
    coarse = len(every(side, 2))
    _, attention = planted_attention(batch_size, coarse, coarse, 8, strength=0.5, noise=1)
    noted: list[Grids] = []

    def note(source: Tensor, sink: Tensor, capacity: Tensor, solver: str) -> Tensor:
        noted.append((source.clone(), sink.clone(), capacity.clone()))
        return cut(source, sink, capacity, solver=solver)

    cut = graph_cut.grid_min_cut
    with mock.patch.object(graph_cut, "grid_min_cut", note):
        GraphCutPartitioner()(attention, 10, side, images, 2)
    return noted
