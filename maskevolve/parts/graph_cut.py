"""Affinities and pictures to parts: recursive min cuts, or the clustering of the paper's released code."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_number, check_tensor, check_whole
from ..grid import GridSize, resolve_grid
from .edges import affinity_edges, contrast_edges, neighbours_at, or_one, patch_sums
from .mincut import SOLVERS, grid_min_cut
from .split import exact_dtype, whole_images, wide_dtype

__all__ = ["EMPartitioner", "GraphCutPartitioner", "PartHierarchy"]

FEW_PARTS = 16  # up to so many, the tree is two levels deeper than a balanced one, for uneven parts; above, one
OF_AFFINITY, OF_CONTRAST = 0.3, 16.0  # smoothness where none is given
SMALL = 8  # parts below this share of an image have weaker contrast edges, lest none of them could be split
CAUSES = {
    "affinities": "the model that they come from may have diverged",
    "values of images": "look for what made them before they came here",
}


class PartHierarchy(NamedTuple):
    """Every nested partition of one solve: a binary tree of splits for each image, and the order to make them in.

    Nodes are numbered as in a heap: the whole image is 1, the two sides of node n are 2n and 2n + 1.
    """

    leaves: Tensor
    """[B, N] int64: the deepest node that holds each patch."""
    order: Tensor
    """[B, 2 ** depth] int64: the place of each inner node among the splits, best first; 2 ** depth for no split."""
    num_parts: int
    """The number of parts that the solve was asked for."""

    def cut(self, num_parts: int) -> Tensor:
        """The partition that the best `num_parts - 1` splits give, a child never before its parent.

        Args:
            num_parts: number of parts K that is wanted, from 1 to that of the hierarchy.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K; fewer if the data has no more.
            Every cut(K) is a coarsening of cut(K + 1).

        Raises:
            ValueError: where num_parts is no whole number, below 1, or above that of the hierarchy.

        Examples:
            >>> affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))[None]
            >>> GraphCutPartitioner().hierarchy(affinity).cut(2)
            tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
        """
        num_parts = _whole(num_parts)
        if num_parts > self.num_parts:
            raise ValueError(
                f"num_parts={num_parts} is more than the {self.num_parts} parts that this hierarchy was made for: make "
                f"it with hierarchy(affinity, num_parts={num_parts})"
            )
        depth = self.order.shape[1].bit_length() - 1
        # The splits that are made lie on the way from the root: their number is the depth of a patch's part.
        ancestors = self.leaves[..., None] >> torch.arange(depth, 0, -1, device=self.leaves.device)
        splits = min(num_parts - 1, self.order.shape[1])
        made = self.order.gather(1, ancestors.flatten(1)).view_as(ancestors) < splits
        return _renumber(self.leaves >> (depth - made.sum(-1)), 2 * self.order.shape[1])


class _Partitioner(nn.Module):
    """What both partitioners do with an affinity before they cut it."""

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.num_parts = _whole(num_parts)
        self._warned: set[str] = set()
        self._bad: dict[str, Tensor] = {}  # how many values were NaN or inf, where the host can see it

    def _clean(self, affinity: Tensor) -> Tensor:
        """[B, N, N] in 32 bits or more, mean over heads, 0 for what is no affinity, the largest value of an image 1."""
        if affinity.ndim not in (3, 4) or affinity.shape[-1] != affinity.shape[-2]:
            raise ValueError(
                f"affinity has shape {list(affinity.shape)}, but must be [B, N, N] or [B, heads, N, N], "
                "with a row and a column for each patch"
            )
        given, affinity = affinity, affinity.nan_to_num(0, 0, 0)
        self._warn_of("affinities", torch.count_nonzero(given != affinity), affinity.numel())
        affinity = (affinity if affinity.dtype == torch.float64 else affinity.float()).clamp_(min=0)
        affinity /= or_one(affinity.flatten(1).amax(1)).view(-1, *[1] * (affinity.ndim - 1))
        return affinity.mean(1) if affinity.ndim == 4 else affinity

    def _warn_of(self, what: str, bad: Tensor, total: int) -> None:
        """Warn once of values that are none; on a GPU a call later or more, so that the host need not wait."""
        if what in self._warned:
            return
        if bad.device.type == "cpu":
            self._bad[what] = bad
        elif what not in self._bad:
            self._bad[what] = torch.zeros_like(bad, device="cpu").pin_memory()
        if int(self._bad[what]):
            self._warned.add(what)
            warnings.warn(
                f"{int(self._bad[what])} of {total} {what} are NaN or inf and count as 0: {CAUSES[what]}. "
                "This warning is given once.",
                stacklevel=5,
            )
        self._bad[what].copy_(bad, non_blocking=True)


class GraphCutPartitioner(_Partitioner):
    """Parts by recursive min cuts on an affinity and on the contrast of the pictures, a level of the batch at a time.

    Features are rows of the square root of the affinity, unit length. In each part, two means give the terminal
    capacities of a min cut, which splits the part; the splits that explain the most are kept. The edges of the cut,
    between 8-neighbours, come from the images: they are weak where two patches differ in brightness or colour, so that
    outlines follow what is in the picture. Without images, they come from the affinity.

    Args:
        num_parts: number of parts K where the call names none.
        smoothness: weight of the edges against the distances to the means: higher gives smoother outlines and fewer
            parts. Where None: 16 for edges from images, 0.3 for those from the affinity.
        solver: of `maskevolve.mincut.grid_min_cut`: "auto", "pymaxflow", "torch" or "triton".

    Shape:
        affinity [B, N, N] or [B, heads, N, N] to parts [B, N] int64.
        Memory: about 24 bytes for each pair of patches of an image beside the affinity, 28 where float32 products
        may be rounded (TF32); so 236 MB for 256 images of 14 x 14 patches. With images, and given back before that:
        5 bytes for each value of the images and 260 for each patch and channel; so 232 MB for 256 of 3 x 224 x 224.
        On a GPU with Triton, up to 1024 patches: no wait of the host, so that a CUDA graph can hold the call.

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

    def __init__(self, num_parts: int = 10, *, smoothness: float | None = None, solver: str = "auto") -> None:
        super().__init__(num_parts)
        if smoothness is not None:
            check_number("smoothness", smoothness, "a number of at least 0, or None")
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is not one of {', '.join(map(repr, SOLVERS))}")
        self.smoothness, self.solver = smoothness, solver

    def forward(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Cut every image into at most `num_parts` parts.

        Args:
            affinity: [B, N, N] or [B, heads, N, N], any float type, >= 0: how much the patches of an image belong
                together. Its scale does not matter; it need not be symmetric. NaN, inf and values below 0 count as 0.
            num_parts: number of parts K; that of the partitioner where None.
            grid_size: the side of a square patch grid, or (H, W), in patches; where None, that which square patches of
                the images make, or a square.
            images: [B, C, height, width], whose height and width are multiples of H and W; any number of channels, any
                float or integer type. The scale and the offset of each channel do not matter, nor does the order of
                the channels; those of one value change nothing. NaN and inf count as 0.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K; fewer where the data has fewer.

        Raises:
            ValueError: where the affinity is not square, or the grid or the images do not fit.
        """
        num_parts = self.num_parts if num_parts is None else num_parts
        return self.hierarchy(affinity, num_parts, grid_size, images).cut(num_parts)

    @torch.no_grad()
    def hierarchy(
        self,
        affinity: Tensor,
        num_parts: int | None = None,
        grid_size: GridSize | None = None,
        images: Tensor | None = None,
    ) -> PartHierarchy:
        """Every nested partition up to `num_parts` parts from one solve: see `forward` for the arguments.

        Returns:
            PartHierarchy: ``.cut(K)`` is the partition into at most K parts, for every K up to num_parts.
        """
        num_parts = self.num_parts if num_parts is None else _whole(num_parts)
        check_tensor("affinity", affinity)
        with torch.autocast(affinity.device.type, enabled=False):
            affinity = self._clean(affinity)
            affinity = affinity + affinity.mT
            grid = resolve_grid(affinity.shape[1], grid_size, _size(images))
            edges = self._edges(affinity, grid, images)
            parts, gains = whole_images(_gram(affinity)), list[Tensor]()
            for _ in range(_depth(num_parts, affinity.shape[1])):
                capacity = edges if images is None else _weaken(edges, parts.labels, 1 << len(gains))
                grids = (tensor.unflatten(-1, grid) for tensor in (*parts.terminals(), capacity))
                sides = grid_min_cut(*grids, solver=self.solver).flatten(1)
                gains.append(parts.split(sides))
                edges *= neighbours_at(grid, sides) == sides[:, None]
            return PartHierarchy(parts.labels + (1 << len(gains)), _split_order(gains, num_parts - 1), num_parts)

    def _edges(self, affinity: Tensor, grid: tuple[int, int], images: Tensor | None) -> Tensor:
        if images is None:
            return affinity_edges(affinity, grid, OF_AFFINITY if self.smoothness is None else self.smoothness)
        _check_images(images, affinity, grid)
        sums, bad = patch_sums(images, grid)
        self._warn_of("values of images", bad, images.numel())
        return contrast_edges(sums, grid, OF_CONTRAST if self.smoothness is None else self.smoothness)

    def extra_repr(self) -> str:
        return f"num_parts={self.num_parts}, smoothness={self.smoothness}, solver={self.solver!r}"


class EMPartitioner(_Partitioner):
    """Parts as the paper's released code makes them: EM clustering of the affinity's columns.

    The released code sums attention over the 12 x 12 heads and blocks of a ViT-B and multiplies it by 40 in a softmax;
    any affinity is brought to that scale here. Starts from random unit means, drawn for each image from torch's default
    generator.

    Args:
        num_parts: number of parts K where the call names none.
        steps: EM steps.
        kappa: scale of the kernel.

    Shape:
        affinity [B, N, N] or [B, heads, N, N] to parts [B, N] int64.

    Examples:
        >>> EMPartitioner(num_parts=4)(torch.rand(2, 196, 196)).shape
        torch.Size([2, 196])

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001;
    EM attention, https://arxiv.org/abs/1907.13426
    """

    def __init__(self, num_parts: int = 10, *, steps: int = 15, kappa: float = 40.0) -> None:
        super().__init__(num_parts)
        check_whole("steps", steps, 0, "the EM steps")
        check_number("kappa", kappa, "a number of at least 0: the scale of the kernel")
        self.steps, self.kappa = steps, kappa

    @torch.no_grad()
    def forward(self, affinity: Tensor, num_parts: int | None = None, grid_size: GridSize | None = None) -> Tensor:
        """Cluster every image into at most `num_parts` parts; arguments as for `GraphCutPartitioner`.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K.
        """
        num_parts = self.num_parts if num_parts is None else _whole(num_parts)
        check_tensor("affinity", affinity)
        with torch.autocast(affinity.device.type, enabled=False):
            affinity = self._clean(affinity).float()
            resolve_grid(affinity.shape[1], grid_size)
            maps = affinity.shape[1] * 144 / or_one(affinity.sum((1, 2), keepdim=True))
            features = affinity.mT * maps  # one row a patch: how much each patch attends to it
            shape = (len(features), num_parts, features.shape[2])
            means = torch.randn(shape, dtype=features.dtype, device=features.device)
            for _ in range(self.steps):
                means = nn.functional.normalize(means, dim=2)
                members = (self.kappa * features @ means.mT).softmax(2)
                means = (members / (1e-6 + members.sum(1, keepdim=True))).mT @ features
            members = (self.kappa * features @ nn.functional.normalize(means, dim=2).mT).softmax(2)
            labels = (members / (1e-6 + members.sum(1, keepdim=True))).argmax(2)
            return _renumber(labels, num_parts)

    def extra_repr(self) -> str:
        return f"num_parts={self.num_parts}, steps={self.steps}, kappa={self.kappa}"


def _weaken(edges: Tensor, labels: Tensor, num_parts: int) -> Tensor:
    """Edges in proportion to the size of the part that they are in, where that is small.

    The outline of a part falls with the square root of its size: else no small part could be split.
    """
    if num_parts == 1:
        return edges
    one = labels.new_ones((), dtype=wide_dtype(labels.device)).expand_as(labels)
    count = one.new_zeros(len(labels), num_parts).scatter_add_(1, labels, one)
    share = (count.gather(1, labels) * (SMALL / labels.shape[1])).clamp_(max=1)
    return (edges * share[:, None]).int()


def _depth(num_parts: int, num_patches: int) -> int:
    """Levels of splits: of a balanced tree and more for unequal parts, unless these would come down to one patch."""
    least = max(min(num_parts, num_patches) - 1, 0).bit_length()
    more = 2 if num_parts <= FEW_PARTS else 1
    return max(1, least, min(least + more, num_patches.bit_length() - 1))


def _split_order(gains: list[Tensor], splits: int) -> Tensor:
    """[B, 2 ** depth]: the place of each node of the tree among the best splits, a child after its parent."""
    best = [gains[0]]
    for gain in gains[1:]:
        best.append(torch.minimum(gain, best[-1].repeat_interleave(2, 1)))
    gain = torch.cat([torch.full_like(gains[0], -1), *best], 1)  # heap numbers start at 1
    nodes = gain.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(gain.shape[1], device=gain.device).expand_as(nodes)
    order = torch.empty_like(nodes).scatter_(1, nodes, places)
    return torch.where((gain < 0) | (order >= splits), gain.shape[1], order)


def _gram(affinity: Tensor) -> Tensor:
    """Inner products of the patches' features, [B, N, N] float32 integers: see `whole_images`.

    The features are integers too, no longer than 2 ** 12: float32 holds their products, on whatever device.
    """
    wide = wide_dtype(affinity.device)  # for sums: rounded to float32, they hardly depend on their order
    length = affinity.sum(2, keepdim=True, dtype=wide).sqrt_()
    features = affinity.float().sqrt().div_(or_one(length).float())
    features -= features.mean(1, keepdim=True, dtype=wide).float()
    longest = torch.linalg.vector_norm(features, dim=2, dtype=wide).amax(1)[:, None, None]
    features *= torch.where(longest > 1e-6, 4000 / longest, 0).float()  # below: rounding, not structure
    integers = features.round_().to(exact_dtype())
    gram = (integers @ integers.mT).float()
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    return gram.mul_(((1 << 24) / gram.shape[1] - 1) / or_one(largest)).round_()


def _renumber(labels: Tensor, limit: int) -> Tensor:
    """Labels below `limit`, renumbered in order to 0..k-1 without gaps in each image."""
    present = torch.zeros(len(labels), limit, dtype=torch.long, device=labels.device).scatter_(1, labels, 1)
    return (present.cumsum(1) - 1).gather(1, labels)


def _size(images: Tensor | None) -> tuple[int, int] | None:
    return None if images is None or images.ndim != 4 else (images.shape[2], images.shape[3])


def _check_images(images: Tensor, affinity: Tensor, grid: tuple[int, int]) -> None:
    check_tensor("images", images)
    fits = images.ndim == 4 and len(images) == len(affinity) and images.shape[1] > 0
    if not fits or any(side == 0 or side % cells for side, cells in zip(images.shape[2:], grid, strict=True)):
        raise ValueError(
            f"images has shape {list(images.shape)}, but must be [{len(affinity)}, channels, height, width] for an "
            f"affinity of shape {list(affinity.shape)}, with a height and a width that are multiples of those of the "
            f"{grid[0]} x {grid[1]} patches"
        )
    if images.is_complex():
        raise ValueError(f"images has dtype {images.dtype}, but must be of a float or integer type")


def _whole(num_parts: int) -> int:
    check_whole("num_parts", num_parts, 1, "how many parts to cut an image into")
    return int(num_parts)
