"""Parts of pictures: from affinities, by graph cut or EM, and from segmentations."""

from .graph_cut import EMPartitioner, GraphCutPartitioner, PartHierarchy
from .mincut import grid_min_cut
from .segmentation import parts_from_segmentation

__all__ = ["EMPartitioner", "GraphCutPartitioner", "PartHierarchy", "grid_min_cut", "parts_from_segmentation"]
