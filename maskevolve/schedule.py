"""How the mask and the number of parts change over training, as functions of the epoch."""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .checks import check_number, is_number

__all__ = ["alpha_at", "clamp_epoch", "num_parts_at", "num_parts_by"]

Schedule = Callable[[float], float]
"""A function of training progress, which goes from 0 to 1."""


def clamp_epoch(epoch: float, total_epochs: float) -> float:
    """The epoch, counted from 0 and whole or fractional, moved into [0, total_epochs - 1].
    A ValueError where total_epochs is no positive number, or epoch is no number.

    Examples:
        >>> clamp_epoch(-3, 100), clamp_epoch(7.5, 100), clamp_epoch(250, 100)
        (0.0, 7.5, 99.0)
    """
    if not is_number(total_epochs) or not 0 < total_epochs < math.inf:
        raise ValueError(f"total_epochs={total_epochs!r} must be a positive number: the length of training")
    if not is_number(epoch) or epoch != epoch:
        raise ValueError(f"epoch={epoch!r} must be a number counted from 0, such as epoch + step / steps_per_epoch")
    return float(min(max(epoch, 0), max(total_epochs - 1, 0)))


def warn_outside(owner: Any, epoch: float, total_epochs: float) -> None:
    """Warn, once for each mask or teacher, of an epoch outside of its training; trainers end at total_epochs itself."""
    if 0 <= epoch <= total_epochs or getattr(owner, "_warned_of_epoch", False):
        return
    owner._warned_of_epoch = True
    what = f"epoch={float(epoch):g} is outside of the training, total_epochs={total_epochs:g}: the nearest one is used"
    how = "Epochs are counted from 0; are these steps? Then call set_epoch(step / steps_per_epoch)"
    warnings.warn(f"{what}. {how}. This warning is given once.", stacklevel=3)


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
        ValueError: as `clamp_epoch`, and where power, or what the function returns, is no finite number, or power < 0.

    Examples:
        >>> alpha_at(0, 100), alpha_at(24, 100), alpha_at(99, 100)
        (0.1, 0.5, 1.0)
        >>> [alpha_at(epoch, 100, lambda progress: 2 * progress - 1) for epoch in (0, 74, 99)]
        [0.0, 0.5, 1.0]

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """
    progress = min((clamp_epoch(epoch, total_epochs) + 1) / total_epochs, 1.0)
    if callable(power):
        return min(max(_value_at(progress, power, "power"), 0.0), 1.0)
    check_number("power", power, "a number of at least 0, or a function of progress in [0, 1]")
    return float(progress**power)


def num_parts_at(epoch: float, total_epochs: float, first: int = 40, last: int = 10) -> int:
    """Number of parts: from `first` linearly to `last` in the last epoch, rounded; the epoch is that of `alpha_at`.

    Examples:
        >>> [num_parts_at(epoch, 101) for epoch in (0, 50, 100)]
        [40, 25, 10]
    """
    return num_parts_by(lambda progress: first + (last - first) * progress, epoch, total_epochs)


def num_parts_by(schedule: Schedule, epoch: float, total_epochs: float) -> int:
    """Number of parts: what a function of progress, ``epoch / (total_epochs - 1)`` in [0, 1], returns, rounded.
    A ValueError where that is no finite number, or below 1.

    Examples:
        >>> [num_parts_by(lambda progress: 40 * 0.25**progress, epoch, 101) for epoch in (0, 50, 100)]
        [40, 20, 10]
    """
    progress = clamp_epoch(epoch, total_epochs) / max(total_epochs - 1, 1)
    count = round(_value_at(progress, schedule, "num_parts"))
    if count < 1:
        raise ValueError(f"num_parts is {count} at progress {progress:.4g}, but must be at least 1")
    return count


def _value_at(progress: float, schedule: Callable[[float], Any], name: str) -> float:
    """What a schedule returns, where that is a finite number."""
    value = schedule(progress)
    with suppress(TypeError, ValueError):
        if math.isfinite(value):
            return float(value)
    raise ValueError(f"{name} is {value!r} at progress {progress:.4g}, but must be a finite number")
