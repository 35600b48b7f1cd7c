"""A tree of parts, split in two a level at a time: the terminal capacities of each cut, and the gain of each split.

All sums are of integers, so their order does not matter: every device and every batch gives the same bits.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..kernel_trial import MOST_PATCHES, kernel_works
from .plain import TorchParts


def whole_images(gram: Tensor, by_kernel: bool | None = None) -> Any:
    """The root of the tree, where an image is one part: by one kernel a step on a GPU with Triton, else in plain torch.

    The inner products of features, `gram` [B, N, N], are float32, whole numbers, symmetric, and may be overwritten; the
    magnitudes of a row sum to at most 2 ** 24.
    """
    if by_kernel is None:
        by_kernel = gram.shape[1] <= MOST_PATCHES and kernel_works("two means", gram.device, _small_tree)
    if by_kernel:
        from .kernel import TritonParts

        return TritonParts(gram)
    return TorchParts(gram.to(exact_dtype()))


def exact_dtype() -> torch.dtype:
    """The float type whose matrix products do not round whole numbers: those of TF32 and bfloat16 do."""
    with suppress(RuntimeError):  # raised where the precision was set by a newer interface
        return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    return torch.float64


def _small_tree(device: torch.device, by_kernel: bool) -> list[Tensor]:
    features = (torch.arange(2 * 40 * 3, device="cpu") * 7919 % 19 - 9).view(2, 40, 3)
    parts, made = whole_images((features @ features.mT).to(device, torch.float32), by_kernel), list[Tensor]()
    for _ in range(2):
        source, sink = parts.terminals()
        made += source, sink, parts.split(source > 0), parts.labels.clone()
    return made
