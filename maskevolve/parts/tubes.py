"""Parts that are the same all along one axis: those of a video in every frame."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_whole
from ..grid import Grid, GridSize, check_axis, check_grid, every, repeat_along
from .affinity import Partitioner, check_affinity, interpolate, strided_grid
from .graph_cut import check_images
from .hierarchy import PartHierarchy


class TubePartitioner(nn.Module):
    """Parts of the other axes of a grid, repeated along this one, as `TubeMask` repeats masks.

    The affinity is averaged over this axis, so that a partitioner cuts patches of the other axes. Of images, it gets
    all frames as channels.

    Args:
        partitioner: GraphCutPartitioner() or EMPartitioner(), or any module called alike.
        axis: along which parts are repeated: 0 is the time of a grid (T, H, W).

    Examples:
        >>> from maskevolve import GraphCutPartitioner
        >>> parts = TubePartitioner(GraphCutPartitioner(num_parts=4))(torch.rand(2, 72, 72), grid_size=(2, 6, 6))
        >>> parts.shape, bool((parts[:, :36] == parts[:, 36:]).all())
        (torch.Size([2, 72]), True)
    """

    def __init__(self, partitioner: nn.Module, axis: int = 0) -> None:
        super().__init__()
        if not isinstance(partitioner, nn.Module):
            raise TypeError(f"partitioner={partitioner!r} must be an instance, such as GraphCutPartitioner()")
        if not is_whole(axis):
            raise ValueError(f"axis={axis!r} must be a whole number: 0 is the first axis of the grid, -1 the last")
        self.partitioner, self.axis = partitioner, int(axis)

    def forward(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
        stride: int = 1,
    ) -> Tensor:
        """Cut every image into at most `num_parts` parts: see `GraphCutPartitioner.forward`. It needs a `grid_size`."""
        flat, how, grid, axis = self._flatten(affinity, grid_size, images, stride)
        return repeat_along(self.partitioner(flat, num_parts, **how), grid, axis)

    def hierarchy(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
        stride: int = 1,
    ) -> PartHierarchy:
        """Every nested partition of one solve: see `GraphCutPartitioner.hierarchy`."""
        if not hasattr(self.partitioner, "hierarchy"):
            raise TypeError(f"{type(self.partitioner).__name__} has no hierarchy: use GraphCutPartitioner()")
        flat, how, grid, axis = self._flatten(affinity, grid_size, images, stride)
        partitioner: Any = self.partitioner
        hierarchy: PartHierarchy = partitioner.hierarchy(flat, num_parts, **how)
        return hierarchy._replace(leaves=repeat_along(hierarchy.leaves, grid, axis))

    @torch.no_grad()
    def _flatten(
        self, affinity: Any, grid_size: Any, images: Any, stride: int
    ) -> tuple[Tensor, dict[str, Any], Grid, int]:
        """The affinity without the axis, what else the partitioner is told, the grid, and the number of the axis."""
        affinity = check_affinity(affinity)
        affinity = self.partitioner.clean(affinity) if isinstance(self.partitioner, Partitioner) else affinity
        if grid_size is None:
            raise ValueError("tubes need grid_size=(T, H, W), that of the patches in the affinity")
        grid = strided_grid(affinity.shape[-1], grid_size, stride)
        axis = check_axis(self.axis, check_grid(grid_size))
        left, coarse = grid[:axis] + grid[axis + 1 :], [len(every(side, stride)) for side in grid]
        pairs = affinity.unflatten(-1, coarse).unflatten(-1 - len(grid), coarse)
        flat = pairs.mean(
            (axis - len(grid), axis - 2 * len(grid)), dtype=torch.promote_types(pairs.dtype, torch.float32)
        )
        flat = flat.flatten(1 - len(grid)).flatten(-len(grid), -2)
        taken, how = signature(self.partitioner.forward).parameters, dict[str, Any](grid_size=left)
        if images is not None and "images" in taken:
            frames: Any = check_images(affinity, grid, images, stride)[1]
            how["images"] = frames.movedim(2 + axis, 2).flatten(1, 2)
        if "stride" in taken:
            how["stride"] = stride
        elif stride > 1:
            flat = interpolate(flat if flat.ndim == 3 else flat.mean(1), left, stride)
        return flat, how, grid, axis

    def extra_repr(self) -> str:
        return f"axis={self.axis}"
