"""Masks: scores a patch, one sort, one gather."""

from .functional import MaskedPatches
from .kinds import BlockMask, EvolvingMask, GridMask, Masking, PartMask, RandomMask

__all__ = ["BlockMask", "EvolvingMask", "GridMask", "MaskedPatches", "Masking", "PartMask", "RandomMask"]
