"""Parts of pictures: from affinities, by graph cut or EM, and from segmentations."""

from .em import EMPartitioner
from .graph_cut import GraphCutPartitioner
from .hierarchy import PartHierarchy
from .mincut import grid_min_cut
from .segmentation import labels_to_parts, parts_from_segmentation
from .tubes import TubePartitioner

__all__ = ["EMPartitioner", "GraphCutPartitioner", "PartHierarchy", "TubePartitioner", "grid_min_cut"]
__all__ += ["labels_to_parts", "parts_from_segmentation"]
