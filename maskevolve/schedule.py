"""How the mask and the number of parts change over training, as functions of the epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from .checks import is_number

__all__ = ["Schedule", "alpha_at", "clamp_epoch", "num_parts_at", "num_parts_by"]

Schedule = Callable[[float], float]
"""A function of training progress, which goes from 0 to 1."""

_warned: WeakSet[Any] = WeakSet()
"""What was moved to an epoch outside of its training, and has said so."""


def clamp_epoch(epoch: float, total_epochs: float) -> float:
    """The epoch, moved into [0, total_epochs - 1].

    Args:
        epoch: current epoch, counted from 0; fractions are progress within an epoch.
        total_epochs: length of training, in epochs.

    Returns:
        The nearest epoch of the training.

    Raises:
        ValueError: where total_epochs is no positive number, or epoch is no number.

    Examples:
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


def warn_outside(owner: Any, epoch: float, total_epochs: float) -> None:
    """Warn, once for each mask or teacher, where it is moved to an epoch that its training does not have.

    Not at its very end, total_epochs, which trainers reach when they are done.
    """
    if 0 <= epoch <= total_epochs or owner in _warned:
        return
    _warned.add(owner)
    warnings.warn(
        f"epoch={float(epoch):g} is outside of the training, total_epochs={total_epochs:g}: the nearest epoch of it is "
        "used. Epochs are counted from 0; are these steps? Then call set_epoch(step / steps_per_epoch). This warning "
        "is given once.",
        stacklevel=3,
    )


def alpha_at(epoch: float, total_epochs: float, power: float | Schedule = 0.5) -> float:
    """Weight of the end mask: training progress to a power, or a function of it.

    Args:
        epoch: current epoch, counted from 0, whole or fractional; clamped to the training.
        total_epochs: length of training, in epochs.
        power: 0.5 moves fast at first, 1 moves evenly. Or a function of progress, ``(epoch + 1) / total_epochs`` in
            (0, 1], to the weight; what it returns is clamped to [0, 1].

    Returns:
        ``((epoch + 1) / total_epochs) ** power`` in (0, 1], 1 in the last epoch; or what the function returns.

    Raises:
        ValueError: where total_epochs is not positive, epoch is NaN, power is negative or no number, or the function
            returns no finite number.

    Examples:
        >>> alpha_at(0, 100), alpha_at(24, 100), alpha_at(99, 100)
        (0.1, 0.5, 1.0)
        >>> [alpha_at(epoch, 100, lambda progress: 2 * progress - 1) for epoch in (0, 74, 99)]
        [0.0, 0.5, 1.0]

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """
    progress = min((clamp_epoch(epoch, total_epochs) + 1) / total_epochs, 1.0)
    if callable(power):
        return min(max(_ask(power, progress, "power"), 0.0), 1.0)
    if not is_number(power) or not 0 <= power < math.inf:
        raise ValueError(f"power={power!r} must be a number of at least 0, or a function of progress in [0, 1]")
    return float(progress**power)


def num_parts_at(epoch: float, total_epochs: float, first: int = 40, last: int = 10) -> int:
    """Number of parts, falling linearly over training.

    Args:
        epoch: current epoch, counted from 0, whole or fractional; clamped to the training.
        total_epochs: length of training, in epochs.
        first: number of parts in epoch 0.
        last: number of parts in the last epoch.

    Returns:
        Number of parts, rounded to the nearest whole number.

    Examples:
        >>> [num_parts_at(epoch, 101) for epoch in (0, 50, 100)]
        [40, 25, 10]
    """
    progress = clamp_epoch(epoch, total_epochs) / max(total_epochs - 1, 1)
    return round(first + (last - first) * progress)


def num_parts_by(schedule: Schedule, epoch: float, total_epochs: float) -> int:
    """Number of parts, by a function of training progress.

    Args:
        schedule: a function of progress, ``epoch / (total_epochs - 1)`` in [0, 1], to the number of parts.
        epoch: current epoch, counted from 0, whole or fractional; clamped to the training.
        total_epochs: length of training, in epochs.

    Returns:
        What the function returns, rounded to the nearest whole number.

    Raises:
        ValueError: where the function returns no finite number, or one below 1.

    Examples:
        >>> [num_parts_by(lambda progress: 40 * 0.25**progress, epoch, 101) for epoch in (0, 50, 100)]
        [40, 20, 10]
    """
    progress = clamp_epoch(epoch, total_epochs) / max(total_epochs - 1, 1)
    count = round(_ask(schedule, progress, "num_parts"))
    if count < 1:
        raise ValueError(f"num_parts is {count} at progress {progress:.4g}, but must be at least 1")
    return count


def _ask(schedule: Callable[[float], Any], progress: float, name: str) -> float:
    """What a schedule returns, where that is a number."""
    value = schedule(progress)
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{name} is {value!r} at progress {progress:.4g}, but the function must return a finite number"
        )
    return number
