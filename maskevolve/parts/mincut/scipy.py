"""Min cut by SciPy's maximum flow: the whole batch as one disconnected graph, on the CPU."""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor

from . import grid_edges, plain


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor) -> Tensor:
    """See `grid_min_cut`.

    SciPy counts in 32 bits, and what is left of an edge can grow by the capacity of the edge back. So an edge is given
    no more than 1 above what can flow in its image: no minimum cut goes through it then, nor did one before, and all
    cuts without such edges cost what they did. Where the two still do not fit 32 bits, plain torch cuts the batch.
    """
    drawn = (source - sink).cpu().numpy()  # what goes straight from the source to the sink is in every flow
    supply, demand = drawn.clip(min=0), (-drawn).clip(min=0)
    totals = (each.reshape(len(each), -1).sum(1, dtype=np.int64) for each in (supply, demand))
    flow = np.minimum(*totals).reshape(-1, *[1] * drawn.ndim)
    capacities = np.minimum(capacity.cpu().numpy(), flow + 1)
    nodes = np.arange(drawn.size, dtype=np.int32).reshape(drawn.shape)
    start, end = np.full_like(nodes, drawn.size), np.full_like(nodes, drawn.size + 1)
    here, there, forth, back = grid_edges(capacities)
    if (forth + back).max(initial=0) > np.iinfo(np.int32).max:
        return plain.min_cut(source, sink, capacity)
    edges = [(start.ravel(), nodes.ravel(), supply.ravel()), (nodes.ravel(), end.ravel(), demand.ravel())]
    edges += [(here, there, forth), (there, here, back)]
    tails, heads, weights = map(np.concatenate, zip(*edges, strict=True))
    used = weights.nonzero()
    weights, size = weights[used].astype(np.int32), drawn.size + 2
    graph = coo_array((weights, (tails[used], heads[used])), shape=(size, size)).tocsr()
    residual = graph - maximum_flow(graph, size - 2, size - 1).flow
    reaches_sink = np.zeros(size, dtype=bool)
    reaches_sink[breadth_first_order(residual.T.tocsr(), size - 1, return_predecessors=False)] = True
    return torch.from_numpy(reaches_sink[:-2].reshape(drawn.shape)).to(source.device)
