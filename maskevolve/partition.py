"""Attention affinities to parts: recursive min cuts, or the clustering of the paper's released code."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import GridSize, resolve_grid
from .mincut import OFFSETS, SOLVERS, grid_min_cut
from .twomeans import LIMIT, SCALE, exact_dtype, whole_images, wide_dtype

__all__ = ["EMPartitioner", "GraphCutPartitioner", "PartHierarchy"]

EXTRA_LEVELS = 2  # of splits beyond those of a balanced tree, for parts of unequal size


class PartHierarchy(NamedTuple):
    """Every nested partition of one solve: a binary tree of splits for each image, and the order to make them in.

    Nodes are numbered as in a heap: the whole image is 1, the two sides of node n are 2n and 2n + 1.
    """

    leaves: Tensor
    """[B, N] int64: the deepest node that holds each patch."""
    order: Tensor
    """[B, 2 ** depth] int64: the place of each inner node among the splits, best first; 2 ** depth for no split."""

    def cut(self, num_parts: int) -> Tensor:
        """The partition that the best `num_parts - 1` splits give, a child never before its parent.

        Args:
            num_parts: number of parts K that is wanted, from 1 to that of the hierarchy.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K; fewer if the data has no more.
            Every cut(K) is a coarsening of cut(K + 1).

        Example:
            >>> affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))[None]
            >>> GraphCutPartitioner().hierarchy(affinity).cut(2)
            tensor([[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
        """
        _check_num_parts(num_parts)
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
        _check_num_parts(num_parts)
        self.num_parts = num_parts
        self._warned = False
        self._bad: Tensor | None = None  # how many affinities were NaN or inf, where the host can see it

    def _clean(self, affinity: Tensor) -> Tensor:
        """[B, N, N] in 32 bits or more, mean over heads, 0 for what is no affinity, the largest value of an image 1."""
        if affinity.ndim not in (3, 4) or affinity.shape[-1] != affinity.shape[-2]:
            raise ValueError(
                f"affinity has shape {list(affinity.shape)}, but must be [B, N, N] or [B, heads, N, N], "
                "with a row and a column for each patch"
            )
        given, affinity = affinity, affinity.nan_to_num(0, 0, 0)
        self._warn_of(torch.count_nonzero(given != affinity), affinity.numel())
        affinity = (affinity if affinity.dtype == torch.float64 else affinity.float()).clamp_(min=0)
        affinity /= _or_one(affinity.flatten(1).amax(1)).view(-1, *[1] * (affinity.ndim - 1))
        return affinity.mean(1) if affinity.ndim == 4 else affinity

    def _warn_of(self, bad: Tensor, total: int) -> None:
        """Warn once of affinities that are none; on a GPU a call later or more, so that the host need not wait."""
        if self._warned:
            return
        if bad.device.type == "cpu":
            self._bad = bad
        elif self._bad is None:
            self._bad = torch.zeros_like(bad, device="cpu").pin_memory()
        if int(self._bad):
            self._warned = True
            warnings.warn(
                f"{int(self._bad)} of {total} affinities are NaN or inf and count as 0: "
                "the model that they come from may have diverged. This warning is given once.",
                stacklevel=5,
            )
        self._bad.copy_(bad, non_blocking=True)


class GraphCutPartitioner(_Partitioner):
    """Parts by recursive min cuts on an attention affinity, a level of the whole batch at a time.

    Features are rows of the square root of the affinity, unit length. In each part, two means give the terminal
    capacities and the affinity between 8-neighbours gives the edges of a min cut, which splits the part; the splits
    that explain the most are kept.

    Args:
        num_parts: number of parts K where the call names none.
        smoothness: weight of the edges against the distances to the means: higher gives smoother outlines.
        solver: of `maskevolve.mincut.grid_min_cut`: "auto", "pymaxflow", "torch" or "triton".

    Shape:
        affinity [B, N, N] or [B, heads, N, N] to parts [B, N] int64.
        Memory: about 24 bytes for each pair of patches of an image beside the affinity, 28 where float32 products
        may be rounded (TF32); so 236 MB for 256 images of 14 x 14 patches.
        On a GPU with Triton, up to 1024 patches: no wait of the host, so that a CUDA graph can hold the call.

    Example:
        >>> affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))[None]  # two halves of a 4 x 4 grid
        >>> GraphCutPartitioner(num_parts=2)(affinity).reshape(4, 4)
        tensor([[0, 0, 0, 0],
                [0, 0, 0, 0],
                [1, 1, 1, 1],
                [1, 1, 1, 1]])

    Source: the graph cut of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    def __init__(self, num_parts: int = 10, *, smoothness: float = 0.3, solver: str = "auto") -> None:
        super().__init__(num_parts)
        if not smoothness >= 0:
            raise ValueError(f"smoothness={smoothness} must not be negative")
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is not one of {', '.join(map(repr, SOLVERS))}")
        self.smoothness, self.solver = smoothness, solver

    def forward(self, affinity: Tensor, num_parts: int | None = None, grid_size: GridSize | None = None) -> Tensor:
        """Cut every image into at most `num_parts` parts.

        Args:
            affinity: [B, N, N] or [B, heads, N, N], any float type, >= 0: how much the patches of an image belong
                together. Its scale does not matter; it need not be symmetric. NaN, inf and values below 0 count as 0.
            num_parts: number of parts K; that of the partitioner where None.
            grid_size: the side of a square patch grid, or (H, W), in patches; a square where None.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K; fewer where the affinity has fewer.

        Raises:
            ValueError: where the affinity is not square or the grid does not fit.
        """
        num_parts = self.num_parts if num_parts is None else num_parts
        return self.hierarchy(affinity, num_parts, grid_size).cut(num_parts)

    @torch.no_grad()
    def hierarchy(
        self, affinity: Tensor, num_parts: int | None = None, grid_size: GridSize | None = None
    ) -> PartHierarchy:
        """Every nested partition up to `num_parts` parts from one solve: see `forward` for the arguments.

        Returns:
            PartHierarchy: ``.cut(K)`` is the partition into at most K parts.
        """
        num_parts = self.num_parts if num_parts is None else num_parts
        _check_num_parts(num_parts)
        with torch.autocast(affinity.device.type, enabled=False):
            affinity = self._clean(affinity)
            affinity = affinity + affinity.mT
            height, width = resolve_grid(affinity.shape[1], grid_size)
            neighbours, inside = _neighbours(height, width, affinity.device)
            edges = _edges(affinity, neighbours, inside, self.smoothness)
            parts, gains = whole_images(_gram(affinity)), []
            for _ in range(_depth(num_parts, height * width)):
                source, sink = parts.terminals()
                grids = (tensor.unflatten(-1, (height, width)) for tensor in (source, sink, edges))
                sides = grid_min_cut(*grids, solver=self.solver).flatten(1)
                gains.append(parts.split(sides))
                edges *= _at(neighbours, sides) == sides[:, None]
            return PartHierarchy(parts.labels + (1 << len(gains)), _split_order(gains, num_parts - 1))

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

    Example:
        >>> EMPartitioner(num_parts=4)(torch.rand(2, 196, 196)).shape
        torch.Size([2, 196])

    Source: the released code of Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001;
        EM attention, https://arxiv.org/abs/1907.13426
    """

    def __init__(self, num_parts: int = 10, *, steps: int = 15, kappa: float = 40.0) -> None:
        super().__init__(num_parts)
        self.steps, self.kappa = steps, kappa

    @torch.no_grad()
    def forward(self, affinity: Tensor, num_parts: int | None = None, grid_size: GridSize | None = None) -> Tensor:
        """Cluster every image into at most `num_parts` parts; arguments as for `GraphCutPartitioner`.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k <= K.
        """
        num_parts = self.num_parts if num_parts is None else num_parts
        _check_num_parts(num_parts)
        with torch.autocast(affinity.device.type, enabled=False):
            affinity = self._clean(affinity).float()
            resolve_grid(affinity.shape[1], grid_size)
            maps = affinity.shape[1] * 144 / _or_one(affinity.sum((1, 2), keepdim=True))
            features = affinity.mT * maps  # one row a patch: how much each patch attends to it
            means = torch.randn(len(features), num_parts, features.shape[2], device=features.device)
            for _ in range(self.steps):
                means = nn.functional.normalize(means, dim=2)
                members = (self.kappa * features @ means.mT).softmax(2)
                means = (members / (1e-6 + members.sum(1, keepdim=True))).mT @ features
            members = (self.kappa * features @ nn.functional.normalize(means, dim=2).mT).softmax(2)
            labels = (members / (1e-6 + members.sum(1, keepdim=True))).argmax(2)
            return _renumber(labels, num_parts)

    def extra_repr(self) -> str:
        return f"num_parts={self.num_parts}, steps={self.steps}, kappa={self.kappa}"


def _depth(num_parts: int, num_patches: int) -> int:
    """Levels of splits: those of a balanced tree and some more, unless parts would come down to single patches."""
    least = max(min(num_parts, num_patches) - 1, 0).bit_length()
    return max(1, least, min(least + EXTRA_LEVELS, num_patches.bit_length() - 1))


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
    features = affinity.to(wide_dtype(affinity.device), copy=True).sqrt_()  # in place: new memory costs a CPU more
    features /= _or_one(features.norm(dim=2, keepdim=True))
    features -= features.mean(1, keepdim=True)
    longest = features.norm(dim=2).amax(1)[:, None, None]
    features *= torch.where(longest > 1e-6, 4000 / longest, 0)  # below: rounding, not structure
    integers = features.round_().to(exact_dtype())
    gram = (integers @ integers.mT).float()
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    return gram.mul_(((1 << 24) / gram.shape[1] - 1) / _or_one(largest)).round_()


@lru_cache(maxsize=16)
def _neighbours(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The patch in each of the 8 directions, [8, N], or the patch itself where there is none; and where there is."""
    patch = torch.arange(height * width, device=device)
    index, inside = [], []
    for rows, columns in OFFSETS:
        row, column = patch // width + rows, patch % width + columns
        inside.append((row >= 0) & (row < height) & (column >= 0) & (column < width))
        index.append(torch.where(inside[-1], row * width + column, patch))
    return torch.stack(index), torch.stack(inside)


def _at(neighbours: Tensor, values: Tensor) -> Tensor:
    """The value of each patch's neighbours: [8, N] and [B, N] to [B, 8, N]."""
    return values[:, None].expand(-1, 8, -1).gather(2, neighbours.expand(len(values), -1, -1))


def _edges(affinity: Tensor, neighbours: Tensor, inside: Tensor, smoothness: float) -> Tensor:
    """[B, 8, N] int32: capacities between 8-neighbours, `smoothness` for an edge of mean affinity."""
    patch = torch.arange(affinity.shape[1], device=affinity.device)
    weights = affinity[:, patch, neighbours].to(wide_dtype(affinity.device)) * inside
    mean = weights.sum((1, 2), keepdim=True) / inside.sum().clamp(min=1)
    return (weights * (smoothness * SCALE) / _or_one(mean)).round().clamp(0, LIMIT).int()


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, 1)


def _renumber(labels: Tensor, limit: int) -> Tensor:
    """Labels below `limit`, renumbered in order to 0..k-1 without gaps in each image."""
    present = torch.zeros(len(labels), limit, dtype=torch.long, device=labels.device).scatter_(1, labels, 1)
    return (present.cumsum(1) - 1).gather(1, labels)


def _check_num_parts(num_parts: int) -> None:
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts} must be at least 1")
