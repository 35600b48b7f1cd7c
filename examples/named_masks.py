"""The masks that the examples know by name."""

from __future__ import annotations

from collections.abc import Callable

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.masks import Masking

MASKS: dict[str, Callable[[float], Masking]] = {
    "random": lambda epochs: RandomMask(),
    "grid": lambda epochs: GridMask(),
    "block": lambda epochs: BlockMask(),
    "part": lambda epochs: PartMask(),
    "evolving": lambda epochs: EvolvingMask(epochs),
    "evolving-block": lambda epochs: EvolvingMask(epochs, end=BlockMask()),
}
