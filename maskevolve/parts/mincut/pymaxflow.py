"""Min cut by PyMaxflow: the whole batch as one disconnected graph, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import OFFSETS


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor) -> Tensor:
    """See `grid_min_cut`."""
    try:
        import maxflow  # GPL: only a caller who asks for this solver links it
    except ImportError as error:
        raise ImportError('solver="pymaxflow" needs PyMaxflow: pip install PyMaxflow, or use solver="torch"') from error

    batch_size, height, width = source.shape
    graph = maxflow.GraphInt(source.numel(), 4 * source.numel())  # sums are 64 bits wide: nothing overflows
    nodes = graph.add_grid_nodes((batch_size, height, width))
    graph.add_grid_tedges(nodes, source.cpu().numpy(), sink.cpu().numpy())
    capacities = capacity.cpu().numpy()
    for direction in range(0, 8, 2):
        rows, columns = OFFSETS[direction]
        here, there = _edge_ends((rows, columns), height, width)
        forward, back = capacities[:, direction][here].ravel(), capacities[:, direction + 1][there].ravel()
        used = np.flatnonzero(forward | back)
        start = nodes[here].ravel()[used]
        graph.add_edges(start, start + (rows * width + columns), forward[used], back[used])
    graph.maxflow()
    # PyMaxflow gives nodes that neither terminal reaches to the source, so True is "can reach the sink".
    return torch.from_numpy(graph.get_grid_segments(nodes)).to(source.device)


def _edge_ends(offset: tuple[int, int], height: int, width: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of [B, H, W] that hold the nodes with a neighbour at `offset`, and those neighbours."""
    rows, columns = offset
    here = (slice(None), slice(0, height - rows), slice(max(-columns, 0), width - max(columns, 0)))
    there = (slice(None), slice(rows, height), slice(max(columns, 0), width - max(-columns, 0)))
    return here, there
