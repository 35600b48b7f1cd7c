"""How the mask and the number of parts change over training, as functions of the epoch."""

from __future__ import annotations

import math

from .checks import is_number

__all__ = ["alpha_at", "clamp_epoch", "num_parts_at"]


def clamp_epoch(epoch: float, total_epochs: float) -> float:
    """The epoch, moved into [0, total_epochs - 1].

    Args:
        epoch: current epoch, counted from 0; fractions are progress within an epoch.
        total_epochs: length of training, in epochs.

    Returns:
        The nearest epoch of the training.

    Raises:
        ValueError: where total_epochs is no positive number, or epoch is no number.

    Example:
        >>> clamp_epoch(-3, 100), clamp_epoch(7.5, 100), clamp_epoch(250, 100)
        (0.0, 7.5, 99.0)
    """
    if not is_number(total_epochs) or not 0 < total_epochs < math.inf:
        raise ValueError(f"total_epochs={total_epochs!r} must be a positive number: the length of training")
    if not is_number(epoch) or epoch != epoch:
        raise ValueError(
            f"epoch={epoch!r} must be a number: the epoch counted from 0, such as epoch + step / steps_per_epoch"
        )
    return float(min(max(epoch, 0), max(total_epochs - 1, 0)))


def alpha_at(epoch: float, total_epochs: float, power: float = 0.5) -> float:
    """Weight of the end mask: training progress to a power.

    Args:
        epoch: current epoch, counted from 0, whole or fractional; clamped to the training.
        total_epochs: length of training, in epochs.
        power: 0.5 moves fast at first, 1 moves evenly.

    Returns:
        ``((epoch + 1) / total_epochs) ** power`` in (0, 1], 1 in the last epoch.

    Example:
        >>> alpha_at(0, 100), alpha_at(24, 100), alpha_at(99, 100)
        (0.1, 0.5, 1.0)

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """
    progress = (clamp_epoch(epoch, total_epochs) + 1) / total_epochs
    return float(min(progress, 1.0) ** power)


def num_parts_at(epoch: float, total_epochs: float, first: int = 40, last: int = 10) -> int:
    """Number of parts, falling linearly over training.

    Args:
        epoch: current epoch, counted from 0, whole or fractional; clamped to the training.
        total_epochs: length of training, in epochs.
        first: number of parts in epoch 0.
        last: number of parts in the last epoch.

    Returns:
        Number of parts, rounded to the nearest whole number.

    Example:
        >>> [num_parts_at(epoch, 101) for epoch in (0, 50, 100)]
        [40, 25, 10]
    """
    progress = clamp_epoch(epoch, total_epochs) / max(total_epochs - 1, 1)
    return round(first + (last - first) * progress)
