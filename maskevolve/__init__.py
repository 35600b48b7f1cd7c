"""Masks that evolve from a grid to object parts, for any MAE code base."""

from .masks import BlockMask, EvolvingMask, GridMask, MaskedPatches, MaskGenerator, Masking, PartMask, RandomMask
from .masks import TubeMask as TubeMask
from .parts import EMPartitioner, GraphCutPartitioner, PartHierarchy, TubePartitioner, parts_from_segmentation
from .teachers import FrozenTeacher, PartTeacher

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "EMPartitioner",
    "EvolvingMask",
    "FrozenTeacher",
    "GraphCutPartitioner",
    "GridMask",
    "MaskGenerator",
    "MaskedPatches",
    "Masking",
    "PartHierarchy",
    "PartMask",
    "PartTeacher",
    "RandomMask",
    "TubeMask",
    "TubePartitioner",
    "parts_from_segmentation",
]
