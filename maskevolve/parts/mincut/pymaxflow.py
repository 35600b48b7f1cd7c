"""Min cut by PyMaxflow: the whole batch as one disconnected graph, on the CPU."""

import numpy as np
import torch
from torch import Tensor

from . import grid_edges


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor) -> Tensor:
    """See `grid_min_cut`."""
    import maxflow  # GPL: only a caller who asks for this solver links it

    graph = maxflow.GraphInt(source.numel(), 4 * source.numel())  # sums are 64 bits wide: nothing overflows
    nodes = graph.add_grid_nodes(tuple(source.shape))
    graph.add_grid_tedges(nodes, source.cpu().numpy(), sink.cpu().numpy())
    here, there, forth, back = grid_edges(capacity.cpu().numpy())
    used = np.flatnonzero(forth | back)
    graph.add_edges(here[used], there[used], forth[used], back[used])
    graph.maxflow()
    # PyMaxflow gives nodes that neither terminal reaches to the source, so True is "can reach the sink".
    return torch.from_numpy(graph.get_grid_segments(nodes)).to(source.device)
