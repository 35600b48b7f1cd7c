"""The masks that do not change over training: random, grid, block, part."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import check_number, check_range, check_whole, is_whole
from ..grid import Grid, GridSize
from . import functional as F
from .base import Masking


class RandomMask(Masking):
    """Every patch alike: MAE's `random_masking`. Its argument `grid_size` is that of `Masking`.
    Source: Masked Autoencoders, https://arxiv.org/abs/2111.06377

    Examples:
        >>> RandomMask().sample(2, (14, 14), 0.75).sum(1)
        tensor([147, 147])
    """

    needs_grid = False

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        return F.random_scores(batch_size, grid_size, **source)


class GridMask(Masking):
    """The same cells of a small pattern, all over the image; which ones is drawn for each image.
    Source: Algorithm 1 of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001

    Args:
        period: side of the pattern, in patches: at 2 and mask_ratio 0.75, one cell of four stays. Or one number an
            axis, such as (1, 2, 2) for the same cells in every frame. On one axis, a cell that is cut leaves every
            `period`-th of its patches, and so on: at 2, every fourth patch stays at 0.75; at 5, every fifth at 0.8.
        grid_size: as in `Masking`.

    Examples:
        >>> mask = GridMask().sample(1, (4, 4), 0.75).view(4, 4)
        >>> bool((mask[::2, ::2] == mask[0, 0]).all())
        True
    """

    def __init__(self, period: int | Sequence[int] = 2, *, grid_size: GridSize | None = None) -> None:
        super().__init__(grid_size)
        sides: Any = tuple(period) if isinstance(period, (tuple, list)) else (period,)
        if not 1 <= len(sides) <= 3 or not all(is_whole(side) and side >= 1 for side in sides):
            must = "a whole number of at least 1: the side of the pattern, in patches, or one to three of them"
            raise ValueError(f"period={period!r} must be {must}")
        self.period = tuple(map(int, sides)) if isinstance(period, (tuple, list)) else int(sides[0])

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        return F.grid_scores(batch_size, grid_size, period=self.period, **source)


class BlockMask(Masking):
    """Random rectangles, as BEiT draws them; cuboids and spans on other grids. The last is cut to fit the mask ratio.
    Source: Algorithm 1 of BEiT, https://arxiv.org/abs/2106.08254

    Args:
        num_blocks: blocks for each image; 16 cover nine tenths of an image on average. Patches that none covers are
            removed last, at random.
        area: least and greatest size of a block, as a share of the image (BEiT: 16 of 196 patches to 0.4). A cuboid of
            share s takes s ** (1 / 3) of the first axis.
        aspect: least and greatest height / width of a block, drawn log-uniformly.
        size: in place of both, (least, greatest) along each axis, in patches, such as ((1, 4), (3, 8), (3, 8)). For
            video, `TubeMask(BlockMask())` has rectangles through the whole time.
        grid_size: as in `Masking`.

    Examples:
        >>> BlockMask().sample(2, (14, 14), 0.5).sum(1)
        tensor([98, 98])
    """

    def __init__(
        self,
        num_blocks: int = 16,
        *,
        area: tuple[float, float] = (16 / 196, 0.4),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        size: Sequence[tuple[int, int]] | None = None,
        grid_size: GridSize | None = None,
    ) -> None:
        super().__init__(grid_size)
        check_whole("num_blocks", num_blocks, 1, "the rectangles for each image")
        check_range("area", area, "(least, greatest) with 0 < least <= greatest <= 1", 1)
        check_range("aspect", aspect, "(least, greatest) with 0 < least <= greatest")
        for pair in () if size is None else size:
            must = "(least, greatest) for each axis, whole numbers of patches with 1 <= least <= greatest"
            check_range("size", pair, must)
            for number in pair:
                check_whole("size", number, 1, must)
        self.num_blocks, self.area, self.aspect, self.size = int(num_blocks), area, aspect, size

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        source |= {"num_blocks": self.num_blocks, "area": self.area, "aspect": self.aspect, "size": self.size}
        return F.block_scores(batch_size, grid_size, **source)


class PartMask(Masking):
    """Whole parts; at most one part is cut, at random, to fit the mask ratio.
    Source: Algorithm 1 of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001

    Args:
        grid_size: as in `Masking`.
        share: at most this share of the removed patches, from 0 to 1, is taken by whole parts; the rest are drawn at
            random from all others and may complete a part (HPM, https://arxiv.org/abs/2304.05919, ends with 0.5).
        hint: chance of each patch of a hidden part to stay visible, from 0 to 1 (the hints of AttMask,
            https://arxiv.org/abs/2203.12719). As many more patches of other parts are removed.

    Examples:
        >>> import torch
        >>> parts = torch.arange(16)[None] // 4
        >>> mask = PartMask().sample(1, (4, 4), 0.5, parts=parts).view(4, 4)
        >>> mask.sum(1).sort().values
        tensor([0, 0, 4, 4])
        >>> mask = PartMask(share=0.5).sample(1, (4, 4), 0.5, parts=parts).view(4, 4)
        >>> int(mask.sum()), bool((mask.sum(1) == 4).any())
        (8, True)
    """

    needs_parts, needs_grid = True, False  # the parts say which patches go together

    def __init__(self, grid_size: GridSize | None = None, *, share: float = 1.0, hint: float = 0.0) -> None:
        super().__init__(grid_size)
        check_number("share", share, "in [0, 1]: the share of the removed patches that are whole parts", 0, 1)
        check_number("hint", hint, "in [0, 1]: the chance of a patch of a hidden part to stay visible", 0, 1)
        self.share, self.hint = float(share), float(hint)

    def draw(self, batch_size: int, grid_size: Grid, parts: Tensor | None, **source: Any) -> Tensor:
        return F.part_scores(parts, share=self.share, hint=self.hint, **source)  # type: ignore[arg-type]  # refuses None

    def extra_repr(self) -> str:
        options = [f"share={self.share:g}"] * (self.share < 1) + [f"hint={self.hint:g}"] * (self.hint > 0)
        return ", ".join(filter(None, (super().extra_repr(), *options)))
