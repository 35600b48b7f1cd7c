"""Masks: a score for each patch, one sort, one gather."""

from .base import Masking
from .evolving import EvolvingMask
from .fixed import fixed_masks
from .functional import MaskedPatches, block_scores, grid_scores, mask_patches, part_scores, random_scores
from .functional import to_unit_range as to_unit_range
from .generator import MaskGenerator
from .kinds import BlockMask, GridMask, PartMask, RandomMask
from .mask_ratio import num_visible
from .tube import TubeMask

__all__ = [
    "BlockMask",
    "EvolvingMask",
    "GridMask",
    "MaskGenerator",
    "MaskedPatches",
    "Masking",
    "PartMask",
    "RandomMask",
    "TubeMask",
]
__all__ += ["block_scores", "fixed_masks", "grid_scores", "mask_patches", "num_visible", "part_scores"]
__all__ += ["random_scores", "to_unit_range"]
