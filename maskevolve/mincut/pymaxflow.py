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
    graph.add_grid_tedges(nodes, _numpy(source), _numpy(sink))
    for direction in range(0, 8, 2):
        here, there = _edge_ends(OFFSETS[direction], height, width)
        forward, back = _numpy(capacity[:, direction])[here], _numpy(capacity[:, direction + 1])[there]
        used = (forward > 0) | (back > 0)
        graph.add_edges(nodes[here][used], nodes[there][used], forward[used], back[used])
    graph.maxflow()
    # PyMaxflow gives nodes that neither terminal reaches to the source, so True is "can reach the sink".
    return torch.from_numpy(graph.get_grid_segments(nodes)).to(source.device)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy().astype(np.int64)


def _edge_ends(offset: tuple[int, int], height: int, width: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of [B, H, W] that hold the nodes with a neighbour at `offset`, and those neighbours."""
    rows, columns = offset
    here = (slice(None), slice(0, height - rows), slice(max(-columns, 0), width - max(columns, 0)))
    there = (slice(None), slice(rows, height), slice(max(columns, 0), width - max(-columns, 0)))
    return here, there
