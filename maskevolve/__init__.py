"""Masks that evolve from a grid to object parts, for any MAE code base."""

from .functional import MaskedPatches
from .masks import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask
from .partition import EMPartitioner, GraphCutPartitioner
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
    "PartMask",
    "PartTeacher",
    "RandomMask",
]
