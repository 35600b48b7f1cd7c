"""Affinities and pictures to parts by recursive min cuts."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..checks import check_memory, check_number
from ..grid import SIDES, Grid, GridSize, resolve_grid, times
from .affinity import Partitioner, check_affinity, interpolate, safe_divisor, strided_grid, wide_dtype
from .edges import affinity_edges, contrast_edges, edge_weights
from .hierarchy import PartHierarchy, check_num_parts
from .mincut import SOLVERS, grid_min_cut
from .segmentation import plain_tensor
from .split import exact_dtype, whole_images

FEW_PARTS = 16  # up to so many, the tree is two levels deeper than a balanced one, for uneven parts; above, one
OF_AFFINITY, OF_CONTRAST = 0.3, 16.0  # smoothness where none is given


class GraphCutPartitioner(Partitioner):
    """Parts by recursive min cuts on an affinity and on the contrast of the pictures, a level of the batch at a time.

    Features are rows of the square root of the affinity, unit length. In each part, two means give the terminal
    capacities of a min cut, which splits the part; the splits that explain the most are kept. The edges of the cut,
    between 8 neighbours in a picture and 26 in a volume, come from the images: they are weak where two patches differ
    in brightness or colour, so that outlines follow what is in the picture. Without images, edges come from the
    affinity.

    Args:
        num_parts: the most parts K of an image, where the call names none. Their sizes differ.
        smoothness: weight of the edges against the distances to the means: higher gives smoother outlines and fewer
            parts. Where None: 16 for edges from images, 0.3 for those from the affinity.
        solver: of `maskevolve.parts.grid_min_cut`: "auto", "pymaxflow", "scipy", "torch" or "triton".
        axis_weights: of edges, a number an axis, such as (0.3, 1, 1) where the slices of a volume are 1 / 0.3 times as
            far apart as its rows; an edge that steps along several axes has the product. All 1 where None.

    Memory: about 24 bytes for each pair of patches of an image beside the affinity, 28 where float32 products may be
    rounded (TF32); so 236 MB for 256 images of 14 x 14 patches. With images, and given back before that: 40 bytes for
    each patch and channel on a GPU with Triton, else 350, and a few images in float64. What cannot fit is refused.
    With a stride, pairs are those of all patches of the grid.
    On a GPU with Triton, up to 4096 patches: no wait of the host, so that a CUDA graph can hold the call.

    Examples:
        >>> affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))[None]  # two halves of a 4 x 4 grid
        >>> GraphCutPartitioner(num_parts=2)(affinity).reshape(4, 4)
        tensor([[0, 0, 0, 0],
                [0, 0, 0, 0],
                [1, 1, 1, 1],
                [1, 1, 1, 1]])

    Source: the graph cut of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001;
    edges from contrast: Y. Boykov and M.-P. Jolly, Interactive graph cuts, ICCV 2001,
    https://doi.org/10.1109/ICCV.2001.937505
    """

    def __init__(
        self,
        num_parts: int = 10,
        *,
        smoothness: float | None = None,
        solver: str = "auto",
        axis_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_parts)
        if smoothness is not None:
            check_number("smoothness", smoothness, "a number of at least 0, or None")
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is not one of {', '.join(map(repr, SOLVERS))}")
        if axis_weights is not None and not isinstance(axis_weights, (tuple, list)):
            raise ValueError(f"axis_weights={axis_weights!r} must be a number for each axis of the grid, or None")
        for weight in axis_weights or ():
            check_number("axis_weights", weight, "numbers of at least 0, one for each axis of the grid")
        self.smoothness, self.solver, self.axis_weights = smoothness, solver, axis_weights

    def forward(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
        stride: int = 1,
    ) -> Tensor:
        """Cut every image into at most `num_parts` parts.

        Args:
            affinity: [B, N, N] or [B, heads, N, N], any float type, >= 0: how much the patches of an image belong
                together. Its scale does not matter; it need not be symmetric. NaN, inf and values below 0 count as 0.
            num_parts: number of parts K; that of the partitioner where None.
            grid_size: the side of a square patch grid, or (L,), (H, W), (T, H, W) or (D, H, W), in patches; where None,
                that which square patches of the images make, or a square.
            images: [B, C, height, width], whose height and width are multiples of H and W, and alike for other grids,
                [B, C, depth, height, width]; any number of channels, any float or integer type. The scale and the
                offset of each channel do not matter, nor does the order of the channels; those of one value change
                nothing. NaN and inf count as 0.
            stride: of the patches in the affinity, where it is that of every stride-th patch in each direction, as
                `attention_affinity` returns it for the same stride. Such an affinity needs images.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K; fewer where the data has fewer.

        Raises:
            ValueError: where the affinity is not square, or the grid, the stride or the images do not fit.
        """
        hierarchy = self.hierarchy(affinity, num_parts, grid_size, images, stride)
        return hierarchy.cut(hierarchy.num_parts)

    @torch.no_grad()
    def hierarchy(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
        stride: int = 1,
    ) -> PartHierarchy:
        """Every nested partition of one solve, as `forward`: ``.cut(K)`` has at most K parts, for K up to num_parts.

        A solve for more parts goes deeper, so that its cut(K) may differ from that of a solve for K.
        """
        num_parts, given = check_num_parts(num_parts, self.num_parts), check_affinity(affinity)
        grid, images = check_images(given, grid_size, images, stride)
        patches, what = math.prod(grid), f"a cut of {len(given)} images of {times(grid)} patches"
        check_memory(what, 10 * len(given) * patches**2, given.device)
        with torch.autocast(given.device.type, enabled=False):
            affinity = self.clean(given)
            affinity = affinity + affinity.mT
            edges, gains = self._edges(affinity, grid, images), list[Tensor]()
            parts = whole_images(_gram(affinity, grid, stride), edges, grid, weaken=images is not None)
            # A balanced tree and more levels for unequal parts, unless these would come down to one patch.
            least, more = (min(num_parts, patches) - 1).bit_length(), 2 if num_parts <= FEW_PARTS else 1
            for _ in range(max(1, least, min(least + more, patches.bit_length() - 1))):
                grids = (tensor.unflatten(-1, grid) for tensor in parts.capacities())
                gains.append(parts.split(grid_min_cut(*grids, solver=self.solver).flatten(1)))
            leaves, order = parts.labels + (1 << len(gains)), _split_order(gains, num_parts - 1)
            return PartHierarchy(leaves.to(affinity.device), order.to(affinity.device), num_parts)

    def _edges(self, affinity: Tensor, grid: Grid, images: Tensor | None) -> Tensor:
        """Capacities: see `contrast_edges` and `affinity_edges`."""
        usual = OF_AFFINITY if images is None else OF_CONTRAST
        weight = float(usual if self.smoothness is None else self.smoothness)
        smoothness = weight * edge_weights(grid, self.axis_weights)
        if images is None:
            return affinity_edges(affinity, grid, smoothness)
        edges, bad = contrast_edges(images, grid, smoothness)
        self.warn_of("values of images", bad, images.numel(), "look for what made them before they came here")
        return edges


def check_images(affinity: Tensor, grid_size: Any, images: Any, stride: int) -> tuple[Grid, Tensor | None]:
    """The grid, such as (H, W), and the images as a plain tensor; ValueError where they do not fit the affinity."""
    if images is None:
        if stride != 1:
            raise ValueError(f"an affinity with stride={stride} needs images=..., for outlines between its patches")
        return resolve_grid(affinity.shape[-1], grid_size), None
    images = plain_tensor("images", images)
    if stride == 1:
        grid = resolve_grid(affinity.shape[-1], grid_size, images.shape[2:] if 3 <= images.ndim <= 5 else None)
    else:
        grid = strided_grid(affinity.shape[-1], grid_size, stride)
    fits = images.ndim == 2 + len(grid) and len(images) == len(affinity) and images.shape[1] > 0
    fits = fits and not images.is_complex()
    if not fits or any(side == 0 or side % cells for side, cells in zip(images.shape[2:], grid, strict=True)):
        raise ValueError(
            f"images has shape {list(images.shape)}, but must be [{len(affinity)}, channels, {SIDES[len(grid)]}] for "
            f"an affinity of shape {list(affinity.shape)}, with sides that are multiples of those of the {times(grid)} "
            f"patches, and of a float or integer type, not {images.dtype}"
        )
    return grid, images


def _split_order(gains: list[Tensor], splits: int) -> Tensor:
    """[B, 2 ** depth]: the place of each node of the tree among the best splits, a child after its parent."""
    best = accumulate(gains, lambda above, gain: torch.minimum(gain, above.repeat_interleave(2, 1)))
    gain = torch.cat([torch.full_like(gains[0], -1), *best], 1)  # heap numbers start at 1
    order = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where((gain < 0) | (order >= splits), gain.shape[1], order)


def _gram(affinity: Tensor, grid: Grid, stride: int) -> Tensor:
    """Inner products of the patches' features, [B, N, N] float32 integers: see `whole_images`.

    The features are integers too, no longer than 2 ** 12: float32 holds their products, on whatever device. Between
    those of every stride-th patch, they are interpolated.
    """
    wide = wide_dtype(affinity.device)  # for sums: rounded to float32, they hardly depend on their order
    length = affinity.sum(2, keepdim=True, dtype=wide).sqrt_()
    features = affinity.float().sqrt().div_(safe_divisor(length).float())
    features -= features.mean(1, keepdim=True, dtype=wide).float()
    longest = torch.linalg.vector_norm(features, dim=2, dtype=wide).amax(1)[:, None, None]
    features *= torch.where(longest > 1e-6, 4000 / longest, 0).float()  # below: rounding, not structure
    integers = features.round_().to(exact_dtype())
    gram = (integers @ integers.mT).float()
    if stride > 1:
        gram = interpolate(_scaled(gram, (1 << 24) / stride ** (2 * len(grid))).to(exact_dtype()), grid, stride).float()
    return _scaled(gram, (1 << 24) / gram.shape[1] - 1)


def _scaled(gram: Tensor, most: float) -> Tensor:
    """Whole numbers of which the largest is `most`; changes the gram matrix."""
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    return gram.mul_(most / safe_divisor(largest)).round_()
