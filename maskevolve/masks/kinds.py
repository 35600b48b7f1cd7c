"""The masks as modules: each is a few lines of scores, and `Masking` turns scores into what an MAE needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_range, check_whole
from ..grid import GridSize, check_grid, resolve_grid
from ..precision import keep_dtype
from ..schedule import Schedule, alpha_at, clamp_epoch, warn_outside
from . import functional as F
from .functional import MaskedPatches, Scores

__all__ = ["BlockMask", "EvolvingMask", "GridMask", "Masking", "PartMask", "RandomMask"]

HOW_TO_GET_PARTS = (
    "pass parts=teacher(images) with a PartTeacher, parts=GraphCutPartitioner()(affinity), "
    "or any segmentation as integers [B, N]"
)


class Masking(nn.Module):
    """Base of all masks: removes the patches with the highest scores. A subclass says how to `draw` them.

    Args:
        grid_size: the side of a square patch grid, or (H, W), in patches; inferred from x where None.

    Examples:
        Cells of 2 x 2 patches at random, as Pixio has them:

        >>> class CellMask(Masking):
        ...     def draw(self, batch_size, grid_size, parts, **source):
        ...         height, width = grid_size
        ...         cells = torch.rand(batch_size, -(-height // 2), -(-width // 2), **source)
        ...         return cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width].flatten(1)
        >>> mask = CellMask()(torch.randn(2, 256, 8), 0.75).mask.view(2, 16, 16)
        >>> bool((mask[:, ::2, ::2] == mask[:, 1::2, 1::2]).all()), mask.sum((1, 2))
        (True, tensor([192., 192.]))
    """

    def __init__(self, grid_size: GridSize | None = None) -> None:
        super().__init__()
        if grid_size is not None:
            check_grid(grid_size)
        self.grid_size = grid_size

    @property
    def needs_parts(self) -> bool:
        """Whether the next call must be given `parts`."""
        return False

    @property
    def needs_grid(self) -> bool:
        """Whether it matters where patches lie. A mask to which it does not is drawn for patches of any kind."""
        return True

    def scores(
        self,
        batch_size: int,
        grid_size: GridSize,
        *,
        parts: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The score map p: the patches with the highest values are removed.

        Args:
            batch_size: number of images B.
            grid_size: the side of a square patch grid, or (H, W), in patches.
            parts: [B, N] integers >= 0, the part of each patch; only for masks that need parts.
            device: where to draw; that of `parts`, else torch's default device, where None.
            generator: source of randomness, on the same device; torch's default one where None.

        Returns:
            [B, N] float32 in [0, 1]: what a mask of one's own draws beyond is brought there as in a blend, see `draw`.
        """
        if device is None and parts is not None:
            device = parts.device
        check_whole("batch_size", batch_size, 0, "the number of images")
        scores = _draw(self, batch_size, check_grid(grid_size), parts, device=device, generator=generator)
        return F.compute_scores(scores)

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        """The scores of the patches, or the recipe for them, for subclasses to write.

        Args:
            batch_size: number of images B.
            grid_size: (H, W) in patches.
            parts: what the caller gave, or None.
            source: the device and the generator to draw with.

        Returns:
            [B, N] of any real dtype and any range: the patches with the highest scores are removed, ties at random.
            Where EvolvingMask blends two masks, scores in [0, 1] are taken as they are; in each image whose scores
            leave [0, 1], the distinct ones are spread evenly over [0, 1], in their order (a single one becomes 0).
            NaN is an error on the CPU; elsewhere the check would make the host wait, and NaN is removed first.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(batch_size, grid_size, parts, **source)")

    def forward(
        self,
        x: Tensor,
        mask_ratio: float = 0.75,
        *,
        parts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedPatches:
        """Remove ``N - int(N * (1 - mask_ratio))`` patches from every image.

        Args:
            x: patches, [B, N, D] or [B, H, W, D], of any dtype, on any device; gradients flow to it.
            mask_ratio: share of patches to remove, in [0, 1).
            parts: [B, N] integers >= 0, the part of each patch; only for masks that need parts.
            generator: source of randomness, on the device of x; torch's default one where None. torch.compile cannot
                trace a generator: there, seed with torch.manual_seed.

        Returns:
            MaskedPatches: visible [B, N_keep, D], mask [B, N] float32 (0 keep, 1 remove), ids_restore [B, N] int64.

        Raises:
            ValueError: where mask_ratio is outside [0, 1) or leaves nothing, where the patches do not fit the grid,
                or where parts are missing or malformed.
        """
        x, grid_size = self._flatten(x)
        scores = _draw(self, x.shape[0], grid_size, parts, device=x.device, generator=generator)
        return F.mask_patches(x, scores, mask_ratio, generator=generator)

    def sample(
        self,
        batch_size: int,
        grid_size: GridSize,
        mask_ratio: float = 0.75,
        *,
        parts: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mask alone: what BEiT and SimMIM take as `bool_masked_pos`.

        Args:
            batch_size: number of images B.
            grid_size: the side of a square patch grid, or (H, W), in patches.
            mask_ratio: share of patches to remove, in [0, 1); ``N - int(N * (1 - mask_ratio))`` of them are.
            parts: [B, N] integers >= 0, the part of each patch; only for masks that need parts.
            device: where to draw; that of `parts`, else torch's default device, where None.
            generator: source of randomness, on the same device; torch's default one where None.

        Returns:
            [B, N] bool: True where a patch is removed, by the draws that `forward` makes from the same state.

        Raises:
            ValueError: as `forward`.

        Examples:
            >>> GridMask().sample(2, (14, 14), mask_ratio=0.5).sum(1)
            tensor([98, 98])
        """
        check_whole("batch_size", batch_size, 0, "the number of images")
        height, width = check_grid(grid_size)
        if self.grid_size is not None and (height, width) != check_grid(self.grid_size):
            raise ValueError(f"grid_size={grid_size!r} is not that of this mask, {self.grid_size!r}")
        if device is None and parts is not None:
            device = parts.device
        patches = torch.empty(batch_size, height, width, 1, device=device)  # stand in for tokens
        mask = self.forward(patches, mask_ratio, parts=parts, generator=generator).mask
        return mask > 0

    def _flatten(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if x.ndim == 3:
            return x, resolve_grid(x.shape[1], self.grid_size)
        if x.ndim != 4:
            raise ValueError(f"x has shape {list(x.shape)}, but must be [B, N, D] or [B, H, W, D]")
        height, width = x.shape[1:3]
        if self.grid_size is not None and (height, width) != resolve_grid(height * width, self.grid_size):
            raise ValueError(f"x of shape {list(x.shape)} has a {height} x {width} grid, not {self.grid_size!r}")
        return x.flatten(1, 2), (height, width)

    def extra_repr(self) -> str:
        return "" if self.grid_size is None else f"grid_size={self.grid_size}"


class RandomMask(Masking):
    """Every patch alike: MAE's `random_masking`.

    Args:
        grid_size: the side of a square patch grid, or (H, W), in patches; inferred from x where None.

    Shape:
        x [B, N, D] or [B, H, W, D] to visible [B, N_keep, D], mask [B, N], ids_restore [B, N].

    Examples:
        >>> visible, mask, ids_restore = RandomMask()(torch.randn(2, 196, 8), 0.75)
        >>> visible.shape, mask.sum(1)
        (torch.Size([2, 49, 8]), tensor([147., 147.]))

    Source: Masked Autoencoders, https://arxiv.org/abs/2111.06377
    """

    @property
    def needs_grid(self) -> bool:
        """False: every patch is alike."""
        return False

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        return F.random_scores(batch_size, grid_size, **source)


class GridMask(Masking):
    """The same cells of a small pattern, all over the image; which ones is drawn for each image.

    Args:
        period: side of the pattern, in patches: at 2 and mask_ratio 0.75, one cell of four stays.
        grid_size: the side of a square patch grid, or (H, W), in patches; inferred from x where None.

    Shape:
        x [B, N, D] or [B, H, W, D] to visible [B, N_keep, D], mask [B, N], ids_restore [B, N].

    Examples:
        >>> mask = GridMask()(torch.randn(1, 16, 8), 0.75).mask.reshape(4, 4)
        >>> bool((mask[::2, ::2] == mask[0, 0]).all())
        True

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    def __init__(self, period: int = 2, *, grid_size: GridSize | None = None) -> None:
        super().__init__(grid_size)
        check_whole("period", period, 1, "the side of the pattern, in patches")
        self.period = int(period)

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        return F.grid_draws(batch_size, grid_size, period=self.period, **source)


class BlockMask(Masking):
    """Random rectangles, as BEiT draws them; the last one is cut to fit the mask ratio.

    Args:
        num_blocks: rectangles for each image; patches that none covers are removed last, at random.
        area: least and greatest area of a rectangle, as a share of the image.
        aspect: least and greatest height / width of a rectangle.
        grid_size: the side of a square patch grid, or (H, W), in patches; inferred from x where None.

    Shape:
        x [B, N, D] or [B, H, W, D] to visible [B, N_keep, D], mask [B, N], ids_restore [B, N].

    Examples:
        >>> BlockMask()(torch.randn(2, 196, 8), 0.5).visible.shape
        torch.Size([2, 98, 8])

    Source: BEiT, https://arxiv.org/abs/2106.08254
    """

    def __init__(
        self,
        num_blocks: int = 16,
        *,
        area: tuple[float, float] = (16 / 196, 0.4),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        grid_size: GridSize | None = None,
    ) -> None:
        super().__init__(grid_size)
        check_whole("num_blocks", num_blocks, 1, "the rectangles for each image")
        check_range("area", area, "(least, greatest) with 0 < least <= greatest <= 1", 1)
        check_range("aspect", aspect, "(least, greatest) with 0 < least <= greatest")
        self.num_blocks, self.area, self.aspect = int(num_blocks), area, aspect

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        shape: dict[str, Any] = {"num_blocks": self.num_blocks, "area": self.area, "aspect": self.aspect}
        return F.block_scores(batch_size, grid_size, **shape, **source)


class PartMask(Masking):
    """Whole parts; at most one part is cut, at random, to fit the mask ratio.

    Args:
        grid_size: the side of a square patch grid, or (H, W), in patches; inferred from x where None.

    Shape:
        x [B, N, D] or [B, H, W, D] and parts [B, N] to visible [B, N_keep, D], mask [B, N], ids_restore [B, N].

    Examples:
        >>> parts = torch.tensor([[0, 0, 1, 1]])
        >>> mask = PartMask()(torch.randn(1, 4, 8), 0.5, parts=parts).mask
        >>> bool(mask[0, 0] == mask[0, 1])
        True

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    @property
    def needs_parts(self) -> bool:
        """True: there are no whole parts without parts."""
        return True

    @property
    def needs_grid(self) -> bool:
        """False: the parts say which patches go together."""
        return False

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        return F.part_draws(_needed(self, parts).to(source["device"]), generator=source["generator"])


class EvolvingMask(Masking):
    """A mask that moves from one mask to another over training: from a grid to parts, unless told otherwise.

    `alpha` is 0 (all start) until the first `set_epoch`, then ``((epoch + 1) / total_epochs) ** power``. It is saved in
    `state_dict`, so that a resumed run goes on where it stopped. A function that was given as `power` is not saved.

    For three stages or more, start or end is an EvolvingMask itself: `set_epoch` moves it, too.

    Args:
        total_epochs: length of training, in epochs.
        start: mask at the start of training; GridMask() where None.
        end: mask at the end of training; PartMask() where None.
        power: of training progress; 0.5 moves fast at first, 1 moves evenly. Or a function of progress,
            ``(epoch + 1) / total_epochs`` in (0, 1], to alpha; what it returns is clamped to [0, 1].
        grid_size: the side of a square patch grid, or (H, W), in patches; where None, that of start or end, else
            inferred from x.

    Shape:
        x [B, N, D] or [B, H, W, D] and parts [B, N] to visible [B, N_keep, D], mask [B, N], ids_restore [B, N].

    Examples:
        >>> masking = EvolvingMask(total_epochs=100).set_epoch(24)
        >>> masking.alpha, masking.needs_parts
        (tensor(0.5000), True)
        >>> parts = torch.arange(196).expand(2, -1) // 20
        >>> masking(torch.randn(2, 196, 8), 0.75, parts=parts).visible.shape
        torch.Size([2, 49, 8])

        From random patches to a grid in the first 50 epochs, then to parts:

        >>> to_grid = EvolvingMask(50, start=RandomMask(), end=GridMask())
        >>> masking = EvolvingMask(100, start=to_grid, power=lambda progress: 2 * progress - 1)
        >>> for epoch in (49, 74, 99):
        ...     print(float(masking.set_epoch(epoch).alpha), float(to_grid.alpha))
        0.0 1.0
        0.5 1.0
        1.0 1.0

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
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
        start = GridMask() if start is None else start
        end = PartMask() if end is None else end
        for name, mask in (("start", start), ("end", end)):
            if not isinstance(mask, nn.Module):
                raise TypeError(f"{name}={mask!r} is no mask: pass an instance, such as {name}=BlockMask()")
        ends = getattr(start, "grid_size", None) or getattr(end, "grid_size", None)
        super().__init__(ends if grid_size is None else grid_size)
        for epoch in (0, total_epochs):
            alpha_at(epoch, total_epochs, power)  # refuses what is bad here, not an epoch later
        self.start, self.end = start, end
        self.total_epochs, self.power = total_epochs, power
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.float32))
        # A copy for the host, so that needs_parts does not wait for the device.
        self._alpha = 0.0
        self.register_load_state_dict_post_hook(_read_alpha)

    def set_epoch(self, epoch: float) -> EvolvingMask:
        """Move to an epoch, with every mask inside that has one, and return the mask.

        Args:
            epoch: counted from 0; fractions are progress within an epoch. Clamped to the training.

        Warns:
            UserWarning: once, where the epoch is below 0 or above total_epochs.
        """
        alpha = alpha_at(epoch, self.total_epochs, self.power)  # first, for it may raise an error
        warn_outside(self, epoch, self.total_epochs)
        _set_epoch_inside(self, epoch)
        self._alpha = alpha
        self.alpha.fill_(alpha)
        self.epoch.fill_(clamp_epoch(epoch, self.total_epochs))
        return self

    @property
    def needs_parts(self) -> bool:
        """Whether a mask that needs parts has weight now."""
        return (self.start.needs_parts and self._alpha < 1) or (self.end.needs_parts and self._alpha > 0)

    @property
    def needs_grid(self) -> bool:
        """Whether either mask needs one."""
        return self.start.needs_grid or self.end.needs_grid

    def draw(self, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
        if parts is None and self.needs_parts:
            _needed(self, parts)
        # Without parts, a mask that needs them has no weight: the other one is all there is.
        if parts is None and self.end.needs_parts:
            return _draw(self.start, batch_size, grid_size, None, **source)
        if parts is None and self.start.needs_parts:
            return _draw(self.end, batch_size, grid_size, None, **source)
        start = _draw(self.start, batch_size, grid_size, parts, **source)
        end = _draw(self.end, batch_size, grid_size, parts, **source)
        return F.Blend(_no_blend(start), _no_blend(end), self.alpha.to(source["device"], torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EvolvingMask:
        """Where a model is cast, alpha and epoch keep their precision."""
        kept = keep_dtype(fn)
        super()._apply(lambda x: kept(x) if x is self.alpha or x is self.epoch else fn(x), recurse)
        return self

    def extra_repr(self) -> str:
        grid = super().extra_repr()
        return f"total_epochs={self.total_epochs}, power={self.power}" + (f", {grid}" if grid else "")


def _draw(masking: Masking, batch_size: int, grid_size: tuple[int, int], parts: Tensor | None, **source: Any) -> Scores:
    """What a mask draws. The parts that it needs are checked, and what it returns."""
    shape = batch_size, grid_size[0] * grid_size[1]
    # A blend leaves parts to its masks: if it read its alpha here, torch.compile would compile anew in each epoch.
    if (parts is None or not isinstance(masking, EvolvingMask)) and masking.needs_parts:
        F.check_parts(_needed(masking, parts), batch_size, grid_size)
    scores = masking.draw(batch_size, grid_size, parts, **source)
    F.check_scores(scores, shape)
    return scores


def _needed(masking: Masking, parts: Tensor | None) -> Tensor:
    """Parts, for a mask that cannot do without."""
    if parts is None:
        alpha = f" with alpha={masking._alpha:.3g}" if isinstance(masking, EvolvingMask) else ""
        raise ValueError(f"{type(masking).__name__}{alpha} needs parts, but got None: {HOW_TO_GET_PARTS}")
    return parts


def _no_blend(scores: Scores) -> Tensor | F.GroupDraws:
    """For a blend is made of what is none."""
    return F.compute_scores(scores) if isinstance(scores, F.Blend) else scores


def _set_epoch_inside(module: nn.Module, epoch: float) -> None:
    """Move the outermost masks inside of a module; each of them moves those inside of itself."""
    inner: Any
    for inner in module.children():
        if isinstance(inner, EvolvingMask):
            inner.set_epoch(clamp_epoch(epoch, inner.total_epochs))  # a stage may end before the training does
        elif hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        else:
            _set_epoch_inside(inner, epoch)


def _read_alpha(masking: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(masking, EvolvingMask)
    masking._alpha, epoch = float(masking.alpha), float(masking.epoch)
    expected = alpha_at(epoch, masking.total_epochs, masking.power)
    if masking._alpha > 0 and not math.isclose(masking._alpha, expected, rel_tol=0.01, abs_tol=1e-3):
        raise ValueError(
            f"the saved state has alpha={masking._alpha:.4g} in epoch {epoch:g}, where this mask of total_epochs="
            f"{masking.total_epochs:g} has {expected:.4g}: make it with the total_epochs and the power of the saved one"
        )
