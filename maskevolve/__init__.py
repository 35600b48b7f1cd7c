"""Masks that evolve from a grid to object parts, for any MAE code base."""

from .functional import MaskedPatches
from .masks import BlockMask, EvolvingMask, GridMask, Masking, PartMask, RandomMask
from .partition import EMPartitioner, GraphCutPartitioner, PartHierarchy
from .segmentation import parts_from_segmentation
from .teacher import FrozenTeacher, PartTeacher

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "EMPartitioner",
    "EvolvingMask",
    "FrozenTeacher",
    "GraphCutPartitioner",
    "GridMask",
    "MaskedPatches",
    "Masking",
    "PartHierarchy",
    "PartMask",
    "PartTeacher",
    "RandomMask",
    "parts_from_segmentation",
]
