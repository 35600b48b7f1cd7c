"""Checks of what a user sets. The errors repeat the value and say what it must be."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of Python or NumPy; a bool is none."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy, or a tensor without dimensions; text and a bool are none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    return is_whole(value) or isinstance(value, (float, np.floating, torch.SymFloat))


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError where a value is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but must be a tensor: use torch.as_tensor({name})")


def check_whole(name: str, value: Any, least: int, what: str) -> None:
    """Raise ValueError where a value is no whole number of at least `least`; `what` says what it is."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}: {what}")


def check_number(name: str, value: Any, what: str, least: float = 0, most: float = math.inf) -> None:
    """Raise ValueError where a value is no finite number from `least` to `most`; `what` says what it must be."""
    if not is_number(value) or not least <= value <= most or value == math.inf:
        raise ValueError(f"{name}={value!r} must be {what}")


def check_range(name: str, value: Any, what: str, most: float = math.inf) -> None:
    """Raise ValueError where a value is no (least, greatest) with 0 < least <= greatest <= most."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))
    if not pair or not 0 < value[0] <= value[1] <= most or value[1] == math.inf:
        raise ValueError(f"{name}={value!r} must be {what}")


LITTLE = 1 << 30  # bytes, for which it is not worth to look how many there are


class TooLarge(ValueError, MemoryError):
    """What would not fit into memory. As a MemoryError, it is not taken for a fault of the model that is tried."""


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise TooLarge where a device has less than the needed bytes; `what` says of what size what needs them is."""
    if needed > LITTLE and (found := memory_of(device)) is not None and needed > found:
        sizes = f"{what} needs at least {needed / 2**30:.1f} GiB, but there are {found / 2**30:.1f} GiB on {device}"
        raise TooLarge(f"{sizes}: give fewer images at a time, larger patches, or read fewer by a larger stride")


def memory_of(device: torch.device) -> int | None:
    """Bytes: all of a GPU's, what is available of a Linux host's; None where they are not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    information = Path("/proc/meminfo")
    if device.type != "cpu" or not information.exists():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", information.read_text())
    return available and int(available[1]) << 10
