"""The base of all masks: a subclass says how to draw scores, `Masking` turns them into what an MAE needs."""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from ..checks import check_whole
from ..grid import Grid, GridSize, check_grid, resolve_grid
from . import functional as F
from .functional import MaskedPatches
from .mask_ratio import num_visible


class Masking(nn.Module):
    """Base of all masks: removes the patches with the highest scores. A subclass says how to `draw` them.

    Args:
        grid_size: the side of a square patch grid, or the patches along each axis: (L,), (H, W), (T, H, W) or
            (D, H, W), the last axis fastest; inferred from x where None.

    Examples:
        >>> class CellMask(Masking):  # cells of 2 x 2 patches at random, as Pixio has them
        ...     def draw(self, batch_size, grid_size, parts, **source):
        ...         height, width = grid_size
        ...         cells = torch.rand(batch_size, -(-height // 2), -(-width // 2), **source)
        ...         return cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width].flatten(1)
        >>> mask = CellMask()(torch.randn(2, 256, 8), 0.75).mask.view(2, 16, 16)
        >>> bool((mask[:, ::2, ::2] == mask[:, 1::2, 1::2]).all()), mask.sum((1, 2))
        (True, tensor([192., 192.]))
    """

    needs_parts: bool = False
    """Whether the next call must be given `parts`."""
    needs_grid: bool = True
    """Whether it matters where patches lie. A mask to which it does not is drawn for patches of any kind."""

    def __init__(self, grid_size: GridSize | None = None) -> None:
        super().__init__()
        if grid_size is not None:
            check_grid(grid_size)
        self.grid_size = grid_size
        # Known of the masks of the library, so that a blend on a GPU need neither wait to look nor sort to be sure.
        self.draws_in_unit_range = type(self).draw.__module__ == f"{__package__}.kinds"

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        """The scores of the patches, for subclasses to write.

        Args:
            batch_size: number of images B.
            grid_size: patches along each axis, such as (H, W); the last axis is the fastest.
            parts: what the caller gave; for a mask that needs parts, checked, as int64, on the device to draw on.
            source: the device and the generator to draw with.

        Returns:
            [B, N] of any real dtype and any range: the highest are removed, ties at random, NaN as in `mask_patches`.
            Where EvolvingMask blends two masks, `to_unit_range` brings their scores to [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(batch_size, grid_size, parts, **source)")

    def forward(
        self,
        x: Tensor,
        mask_ratio: float = 0.75,
        *,
        keep: int | None = None,
        parts: Tensor | None = None,
        generator: Generator | None = None,
        grid_size: GridSize | None = None,
    ) -> MaskedPatches:
        """Remove ``N - int(N * (1 - mask_ratio))`` patches from every image; returns MaskedPatches.

        Args:
            x: patches, [B, N, D] or [B, *grid, D], of any dtype, on any device; gradients flow to it.
            mask_ratio: share of patches to remove, in [0, 1).
            keep: in place of mask_ratio, the number of patches that stay, from 1 to N.
            parts: [B, N] integers >= 0, the part of each patch; only for masks that need parts.
            generator: source of randomness, on the device of x; torch's default one where None. torch.compile cannot
                trace a generator: there, seed with torch.manual_seed.
            grid_size: of these patches, for a mask that was made without one.

        Raises:
            ValueError: as `num_visible`, where the patches do not fit the grid, or parts are missing or malformed.
        """
        x, grid = self.flatten(x, grid_size)
        keep = self.num_visible(grid, mask_ratio, keep)
        scores = self.checked_draw(x.shape[0], grid, parts, device=x.device, generator=generator)
        return F.mask_patches(x, scores, keep=keep, generator=generator)

    def sample(
        self,
        batch_size: int,
        grid_size: GridSize,
        mask_ratio: float | Tensor = 0.75,
        *,
        keep: int | None = None,
        parts: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The mask alone, [B, N] bool, True is removed: what BEiT and SimMIM take as `bool_masked_pos`.

        Of `batch_size` images B with a patch grid of `grid_size`, as of `Masking`, drawn on `device`: on that of
        `parts`, else on torch's default one, where None. With a tensor [B], each image has a mask ratio of its own; it
        is read by the host. Other arguments, draws and errors are those of `forward`.

        Examples:
            >>> from maskevolve import GridMask
            >>> GridMask().sample(2, (14, 14), mask_ratio=0.5).sum(1)
            tensor([98, 98])
            >>> GridMask().sample(2, (14, 14), mask_ratio=torch.tensor([0.5, 0.75])).sum(1)
            tensor([ 98, 147])
        """
        check_whole("batch_size", batch_size, 0, "the number of images")
        device, grid = getattr(parts, "device", None) if device is None else device, check_grid(grid_size)
        how: Any = {"parts": parts, "generator": generator, "grid_size": grid}
        patches = torch.empty(batch_size, math.prod(grid), 1, device=device)  # stand in for tokens
        if not isinstance(mask_ratio, Tensor) or mask_ratio.ndim != 1:
            return self.forward(patches, cast(Any, mask_ratio), keep=keep, **how).mask > 0
        if keep is not None or len(mask_ratio) != batch_size:
            given = f"mask_ratio has shape {list(mask_ratio.shape)} for {batch_size} images, and keep={keep!r}"
            raise ValueError(f"{given}: give one ratio for each image, or keep")
        each = torch.tensor([self.num_visible(grid, ratio) for ratio in mask_ratio.tolist()], device=patches.device)
        return self.forward(patches, keep=math.prod(grid), **how).ids_restore >= each.view(-1, 1)

    def scores(
        self,
        batch_size: int,
        grid_size: GridSize,
        *,
        parts: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The score map p, for the arguments of `sample`: [B, N] float32 in [0, 1], the highest are removed.

        What a mask of one's own draws beyond is brought there by `to_unit_range`, as in a blend.
        """
        check_whole("batch_size", batch_size, 0, "the number of images")
        device = getattr(parts, "device", None) if device is None else device
        return self.unit_draw(batch_size, check_grid(grid_size), parts, device=device, generator=generator)

    def num_visible(self, grid: Grid, mask_ratio: float = 0.75, keep: int | None = None) -> int:
        """How many patches of a grid stay, see `num_visible`."""
        return num_visible(math.prod(grid), mask_ratio, keep)

    def checked_draw(self, batch_size: int, grid: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        """What `draw` returns. The parts that the mask needs are checked, and so are the scores."""
        if self.needs_parts:
            parts = F.check_parts(parts, (batch_size, *grid), type(self).__name__).to(source["device"])
        scores = self.draw(batch_size, grid, parts, **source)
        F.check_scores(scores, (batch_size, math.prod(grid)))
        return scores

    def unit_draw(self, *args: Any, **source: Any) -> Tensor:
        """What `checked_draw` returns, in [0, 1]."""
        scores = self.checked_draw(*args, **source)
        return scores if self.draws_in_unit_range else F.to_unit_range(scores)

    def flatten(self, x: Tensor, grid_size: GridSize | None = None) -> tuple[Tensor, Grid]:
        """Patches [B, N, D] or [B, *grid, D], as [B, N, D], and their grid."""
        if not 3 <= x.ndim <= 5:
            must = "[B, N, D] or [B, *grid, D] with a grid of one to three axes"
            raise ValueError(f"x has shape {list(x.shape)}, but must be {must}")
        own = self.grid_size if grid_size is None else grid_size
        grid = resolve_grid(x.shape[1], own) if x.ndim == 3 else tuple(x.shape[1:-1])
        for size in (self.grid_size, grid_size):
            if size is not None and grid != resolve_grid(math.prod(grid), size):
                raise ValueError(f"grid_size={grid} is not {size!r}, that of this mask or this call")
        return x.flatten(1, -2), grid

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module, but a state that is refused leaves the mask as it was."""
        before = copy.deepcopy(self.state_dict())
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            super().load_state_dict(before, assign=assign)
            raise

    def extra_repr(self) -> str:
        return "" if self.grid_size is None else f"grid_size={self.grid_size}"


def check_masking(value: Any, name: str = "masking", hint: str = "") -> None:
    """Raise TypeError where a value is no mask."""
    if not isinstance(value, Masking):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {found}, but must be an instance of a mask, such as {name}=BlockMask(){hint}")
