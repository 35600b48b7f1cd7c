"""What both partitioners do with an affinity before they cut it."""

import math
import warnings
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_memory, check_whole
from ..grid import Grid, GridSize, check_grid, every, times
from .hierarchy import check_num_parts
from .segmentation import plain_tensor

_lock = Lock()  # of the counts of all partitioners: one of their own could not be copied


class Partitioner(nn.Module):
    """A number of parts, and one warning of values that are NaN or inf."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.num_parts = check_num_parts(num_parts)
        self._warned: set[str] = set()
        self._bad: dict[str, Tensor] = {}  # how many values were NaN or inf, where the host can see it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bad": {}}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if key[0] != "_" and key != "training")

    def clean(self, affinity: Tensor) -> Tensor:
        """Checked, [B, N, N] in 32 bits or more: mean over heads, NaN, inf and negative ones 0, the largest 1."""
        given = check_affinity(affinity)
        check_memory(f"a copy of an affinity {list(given.shape)}", given.numel() * given.element_size(), given.device)
        affinity = given.nan_to_num(0, 0, 0)
        count = torch.count_nonzero(given != affinity)
        self.warn_of("affinities", count, given.numel(), "the model that they come from may have diverged")
        affinity = (affinity if affinity.dtype == torch.float64 else affinity.float()).clamp_(min=0)
        affinity /= safe_divisor(affinity.flatten(1).amax(1)).view(-1, *[1] * (affinity.ndim - 1))
        return affinity.mean(1) if affinity.ndim == 4 else affinity

    def warn_of(self, what: str, count: Tensor, total: int, cause: str) -> None:
        """Warn once of values that are bad; on a GPU a call later or more, so that the host need not wait."""
        with _lock:
            if what in self._warned:
                return
            seen = self._bad.get(what) if count.is_cuda else count
            if seen is None:
                seen = self._bad[what] = torch.zeros_like(count, device="cpu").pin_memory()
            if found := int(seen):
                self._warned.add(what)
                counted = f"{found} of {total} {what} are NaN or inf and count as 0"
                warnings.warn(f"{counted}: {cause}. This warning is given once.", stacklevel=5)
            seen.copy_(count, non_blocking=True)


def check_affinity(affinity: Any) -> Tensor:
    """An affinity as a plain tensor; ValueError where it has another shape than one for each pair of patches."""
    given = plain_tensor("affinity", affinity)
    if given.ndim not in (3, 4) or given.shape[-1] != given.shape[-2] or 0 in given.shape[1:]:
        what = "[B, N, N] or [B, heads, N, N], with a row and a column for each patch"
        raise ValueError(f"affinity has shape {list(given.shape)}, but must be {what}")
    return given


def interpolate(affinity: Tensor, grid: Grid, stride: int) -> Tensor:
    """Affinities of every stride-th patch in each direction, [B, n, n], to those of all patches, [B, N, N].

    Linear along each axis, times stride ** (2 * axes): whole numbers stay whole numbers.
    """
    weights = {side: _weights(side, stride, affinity) for side in set(grid)}
    batch = len(affinity)
    for _ in range(2):  # from the columns of the matrix, then from its rows
        affinity, done = affinity.mT, batch
        for side in grid:
            affinity = weights[side] @ affinity.reshape(done, weights[side].shape[1], -1)
            done *= side
        affinity = affinity.reshape(batch, done // batch, -1)
    return affinity


def _weights(size: int, stride: int, like: Tensor) -> Tensor:
    """Of every stride-th of `size` patches of a side, in each of them: [size, n] whole numbers, `stride` a row."""
    kept = every(size, stride)
    place = torch.arange(size, device=like.device).clamp(kept[0], kept[-1])
    apart = place[:, None] - torch.arange(kept.start, kept.stop, stride, device=like.device)
    return (stride - apart.abs()).clamp(min=0).to(like.dtype)


def strided_grid(patches: int, grid_size: GridSize | None, stride: int) -> Grid:
    """The grid of all patches, where `patches` is the number of every stride-th one in each direction."""
    check_whole("stride", stride, 1, "of the patches in the affinity")
    if grid_size is None:
        raise ValueError(f"an affinity with stride={stride} needs grid_size=(H, W), that of all patches")
    grid = check_grid(grid_size)
    coarse = [len(every(side, stride)) for side in grid]
    if math.prod(coarse) != patches:
        left = f"of which stride={stride} leaves {times(coarse)}"
        raise ValueError(f"grid_size={grid_size!r}, {left}, does not fit an affinity of {patches} patches")
    return grid


def safe_divisor(divisor: Tensor) -> Tensor:
    """The divisor with 1 in place of 0 and less, so that 0 / 0 gives 0."""
    return torch.where(divisor > 0, divisor, 1)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
