"""A tree of parts, split in two a level at a time: the capacities of each cut, and the gain of each split.

All sums are of integers, so their order does not matter: every device and every batch gives the same bits.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..kernel_trial import MOST_PATCHES, kernel_works
from ..mincut import neighbours
from .plain import HostParts


def whole_images(gram: Tensor, edges: Tensor, grid: Any, weaken: bool, by_kernel: bool | None = None) -> Any:
    """The root of the tree, where an image is one part: by two kernels a level on a GPU with Triton, else on the host.

    The inner products of features, `gram` [B, N, N], are float32, whole numbers, symmetric, and may be overwritten; the
    magnitudes of a row sum to at most 2 ** 24. The kernels know grids of two axes. See `HostParts` for the others.
    """
    if by_kernel is None:
        fits = len(grid) == 2 and gram.shape[1] <= MOST_PATCHES
        by_kernel = fits and kernel_works("two means", gram.device, _small_tree)
    if by_kernel:
        from .kernel import TritonParts

        return TritonParts(gram, edges, grid, weaken)
    return HostParts(gram.cpu().to(exact_dtype()), edges.cpu(), grid, weaken)


def exact_dtype() -> torch.dtype:
    """The float type whose matrix products do not round whole numbers: those of TF32 and bfloat16 do."""
    with suppress(RuntimeError):  # raised where the precision was set by a newer interface
        return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    return torch.float64


def _small_tree(device: torch.device, by_kernel: bool) -> list[Tensor]:
    features = (torch.arange(2 * 40 * 3, device="cpu") * 7919 % 19 - 9).view(2, 40, 3)
    edges = (torch.arange(2 * 8 * 40, device="cpu") * 7919 % 1001).int().view(2, 8, 40)
    inside = torch.tensor(neighbours(5, 8) != range(40))
    gram = (features @ features.mT).float()
    parts, made = whole_images(gram.to(device), (edges * inside).to(device), (5, 8), True, by_kernel), list[Tensor]()
    for _ in range(2):
        source, sink, capacity = parts.capacities()
        made += source, sink, capacity, parts.split(source > 0), parts.labels.clone()
    return made
