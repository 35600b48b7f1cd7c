"""Checks of what a user sets. The errors repeat the value and say what it must be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["REAL", "WHOLE", "check_grid", "check_number", "check_range", "check_whole", "is_number"]

WHOLE = (int, np.integer, torch.SymInt)
REAL = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def is_number(value: Any) -> bool:
    """Whether a value is one real number: Python's, NumPy's or a tensor without dimensions; no bool, no text."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    return isinstance(value, REAL) and not isinstance(value, bool)


def check_number(name: str, value: Any, least: float, what: str) -> None:
    """Raise ValueError where a value is no finite number of at least `least`; `what` says what it must be."""
    if not is_number(value) or not least <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be {what}")


def check_range(name: str, value: Any, most: float, what: str) -> None:
    """Raise ValueError where a value is no (least, greatest) with 0 < least <= greatest <= most."""
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))
    if not pair or not 0 < value[0] <= value[1] <= most or value[1] == math.inf:
        raise ValueError(f"{name}={value!r} must be {what}")


def check_whole(name: str, value: Any, least: int, what: str = "") -> None:
    """Raise ValueError where a value is no whole number of at least `least`; `what` says what it is."""
    if not isinstance(value, WHOLE) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{what and ': ' + what}")


def check_grid(grid_size: Any) -> tuple[int, int]:
    """A grid size, one number or (H, W), as (H, W)."""
    height, width = grid_size if isinstance(grid_size, tuple | list) and len(grid_size) == 2 else (grid_size, grid_size)
    for side in (height, width):
        if not isinstance(side, WHOLE) or isinstance(side, bool) or side < 1:
            raise ValueError(
                f"grid_size={grid_size!r} must be the side of a square patch grid, or (H, W), in patches: whole "
                "numbers of at least 1"
            )
    return height, width
