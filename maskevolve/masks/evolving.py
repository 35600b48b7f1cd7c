"""The mask that moves from one mask to another over training."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import Grid, GridSize
from ..precision import keep_dtype
from ..schedule import Schedule, alpha_at, clamp_epoch, warn_outside
from . import functional as F
from .base import Masking, check_masking
from .kinds import GridMask, PartMask


class EvolvingMask(Masking):
    """A mask that moves from one mask to another over training: from a grid to parts, unless told otherwise.

    `alpha` is 0 (all start) until the first `set_epoch`, then ``((epoch + 1) / total_epochs) ** power``. It is saved in
    `state_dict`, so that a resumed run goes on where it stopped. A function that was given as `power` is not saved. For
    three stages or more, start or end is an EvolvingMask itself: `set_epoch` moves it, too.
    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001

    Args:
        total_epochs: length of training, in epochs.
        start: mask at the start of training; GridMask() where None.
        end: mask at the end of training; PartMask() where None.
        power: of training progress, or a function of it, see `alpha_at`.
        grid_size: as in `Masking`; where None, that of start or end, else inferred from x.

    Examples:
        >>> masking = EvolvingMask(total_epochs=100).set_epoch(24)
        >>> masking.alpha, masking.needs_parts
        (tensor(0.5000), True)
        >>> parts = torch.arange(196).expand(2, -1) // 20
        >>> masking(torch.randn(2, 196, 8), 0.75, parts=parts).visible.shape
        torch.Size([2, 49, 8])
    """

    alpha: Tensor
    epoch: Tensor

    def __init__(
        self,
        total_epochs: float,
        *,
        start: Masking | None = None,
        end: Masking | None = None,
        power: float | Schedule = 0.5,
        grid_size: GridSize | None = None,
    ) -> None:
        start, end = GridMask() if start is None else start, PartMask() if end is None else end
        check_masking(start, "start")
        check_masking(end, "end")
        super().__init__(start.grid_size or end.grid_size if grid_size is None else grid_size)
        for epoch in (0, total_epochs):
            alpha_at(epoch, total_epochs, power)  # refuses what is bad here, not an epoch later
        self.start, self.end = start, end
        self.total_epochs, self.power = total_epochs, power
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.float32))
        self._alpha = 0.0  # alpha for the host, so that needs_parts does not wait for the device

    def set_epoch(self, epoch: float) -> "EvolvingMask":
        """Move to an epoch, with every mask inside that has one, and return the mask.

        The epoch is counted from 0; fractions are progress within an epoch. It is clamped to the training, with one
        UserWarning where it is below 0 or above total_epochs.
        """
        alpha = alpha_at(epoch, self.total_epochs, self.power)  # first, for it may raise an error
        warn_outside(self, epoch, self.total_epochs)
        _set_epoch_inside(self, epoch)
        self._alpha = alpha
        self.alpha.fill_(alpha)
        self.epoch.fill_(clamp_epoch(epoch, self.total_epochs))
        return self

    @property
    def needs_parts(self) -> bool:  # type: ignore[override]
        """Whether a mask that needs parts has weight now."""
        return (self.start.needs_parts and self._alpha < 1) or (self.end.needs_parts and self._alpha > 0)

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """Whether either mask needs one."""
        return self.start.needs_grid or self.end.needs_grid

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        """``(1 - alpha) * start + alpha * end``, the aggregation of Algorithm 1."""
        if parts is None and self.needs_parts:
            F.check_parts(parts, owner=f"EvolvingMask with alpha={self._alpha:.3g}")
        # Without parts, a mask that needs them has no weight: the other one is all there is.
        masks = [mask for mask in (self.start, self.end) if parts is not None or not mask.needs_parts]
        scores = [mask.unit_draw(batch_size, grid_size, parts, **source) for mask in masks]
        alpha = self.alpha.to(source["device"], torch.float32)
        return (1 - alpha) * scores[0] + alpha * scores[1] if len(scores) == 2 else scores[0]

    def checked_draw(self, *args: Any, **source: Any) -> Tensor:
        """The masks inside make the checks. If alpha were read here, torch.compile would compile each epoch."""
        return self.draw(*args, **source)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (prefix + "alpha", prefix + "epoch"):  # copies, for distributed checkpoints are loaded in place
            destination[name] = destination[name].clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, mask in self.named_modules(prefix=prefix[:-1]):  # all masks inside, before anything is copied
            saved: list[Any] = [state_dict.get(f"{name}.{key}".lstrip(".")) for key in ("alpha", "epoch")]
            if not isinstance(mask, EvolvingMask) or any(getattr(value, "ndim", None) != 0 for value in saved):
                continue  # torch says what is missing or has another shape
            alpha, epoch = map(float, saved)
            expected = alpha_at(epoch, mask.total_epochs, mask.power)
            if alpha != 0 and not math.isclose(alpha, expected, rel_tol=0.01, abs_tol=1e-3):
                ours = f"where this mask of total_epochs={mask.total_epochs:g} has {expected:.4g}"
                how = "make it with total_epochs and power of the saved one"
                raise ValueError(f"the saved state has alpha={alpha:.4g} in epoch {epoch:g}, {ours}: {how}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._alpha = float(self.alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Where a model is cast, alpha and epoch keep their precision."""
        return super()._apply(lambda x: (keep_dtype(fn) if x is self.alpha or x is self.epoch else fn)(x), recurse)

    def extra_repr(self) -> str:
        grid = super().extra_repr()
        return f"total_epochs={self.total_epochs}, power={self.power}" + (f", {grid}" if grid else "")


def _set_epoch_inside(module: nn.Module, epoch: float) -> None:
    """Move the outermost masks inside of a module, each of which moves its own. A stage may end before the training."""
    inner: Any
    for inner in module.children():
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(clamp_epoch(epoch, inner.total_epochs) if hasattr(inner, "total_epochs") else epoch)
        else:
            _set_epoch_inside(inner, epoch)
