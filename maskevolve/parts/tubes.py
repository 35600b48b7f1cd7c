"""Parts that are the same all along one axis: those of a video in every frame."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import GridSize, every, repeat_along, without_axis
from .affinity import Partitioner, check_affinity, interpolate, strided_grid
from .graph_cut import check_images


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
        self.partitioner, self.axis = partitioner, axis

    @torch.no_grad()
    def forward(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
        stride: int = 1,
    ) -> Tensor:
        """Cut every image into at most `num_parts` parts: see `GraphCutPartitioner.forward`. It needs a `grid_size`."""
        if grid_size is None:
            raise ValueError("tubes need grid_size=(T, H, W), that of the patches in the affinity")
        affinity = check_affinity(affinity)
        grid = strided_grid(affinity.shape[-1], grid_size, stride)
        (axis, left), how = without_axis(self.axis, grid), dict[str, Any]()
        coarse = [len(every(side, stride)) for side in grid]
        flat = self.partitioner.clean(affinity) if isinstance(self.partitioner, Partitioner) else affinity
        flat = flat if flat.ndim == 3 else flat.mean(1)
        flat = flat.unflatten(2, coarse).mean(2 + axis).unflatten(1, coarse).mean(1 + axis)
        flat = flat.flatten(len(grid)).flatten(1, -2)
        taken = signature(self.partitioner.forward).parameters
        if images is not None and "images" in taken:
            frames: Any = check_images(affinity, grid, images, stride)[1]
            how["images"] = frames.movedim(2 + axis, 2).flatten(1, 2)
        if "stride" in taken:
            how["stride"] = stride
        elif stride > 1:
            flat = interpolate(flat, left, stride)
        return repeat_along(self.partitioner(flat, num_parts, grid_size=left, **how), grid, axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"
