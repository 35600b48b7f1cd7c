"""A tree of parts, split in two a level at a time: what draws each patch to either side, and what a split gains.

All sums are of integers, so their order does not matter: every device and every batch gives the same bits.
"""

from __future__ import annotations

from typing import Protocol

# Not `import torch`: in this package that name is the file beside this one.
from torch import Tensor, arange, device, dtype, equal, float32, float64, get_float32_matmul_precision

from .. import kernels as fused

__all__ = ["Parts", "exact_dtype", "whole_images", "wide_dtype"]

LLOYD_STEPS = 2  # more found no more of planted parts
RESOLUTION = 1 << 20  # of terminals before they are scaled: their squares still add up without rounding
SCALE = 1 << 16  # the root mean square of the terminals of a part; a mean edge
LIMIT = 1 << 30
MOST_PATCHES = 4096  # of an image, that kernels take


class Parts(Protocol):
    """The parts of one level of the tree, of a batch of images."""

    labels: Tensor
    """[B, N] int64: the part of each patch, 0 to 2 ** level - 1."""

    def terminals(self) -> tuple[Tensor, Tensor]:
        """How much more each patch belongs to one of two means of its part than to the other: capacities for a cut.

        The means come from two far seeds by Lloyd steps, but the sides meet at the middle of the part, not half way
        between the means, so that a few outliers cannot be one side for good.

        Returns:
            source, sink, each [B, N] int32: how far a patch lies from the part's mean along the line through both
            means, `source` where towards the first and `sink` where towards the second; the root mean square is 2 ** 16
            in every part. However even the attention is, it does not vanish beside the edges.
        """

    def split(self, sides: Tensor) -> Tensor:
        """Go one level down: split every part in two.

        Args:
            sides: [B, N] bool, True for the second half.

        Returns:
            [B, 2 ** level] float64, the gain of each split: how much it lowers the squared distances to the means,
            squared, over the part's size, lest a large background is split first; -1 where nothing is split.
        """


def whole_images(gram: Tensor) -> Parts:
    """The root of the tree: every image is one part. By one kernel a step on a GPU with Triton, else in plain torch.

    Args:
        gram: [B, N, N] float32, whole numbers: inner products of features. Symmetric; the magnitudes of a row sum to at
            most 2 ** 24. May be overwritten.
    """
    if gram.shape[1] <= MOST_PATCHES and fused.works("two means", gram.device, _agrees):
        from .kernel import TritonParts

        return TritonParts(gram)
    from .plain import TorchParts

    return TorchParts(gram.to(exact_dtype()))


def _agrees(on: device) -> bool:
    """Whether the kernels make a small tree as plain torch does."""
    from .kernel import TritonParts
    from .plain import TorchParts

    features = (arange(2 * 40 * 3, device="cpu") * 7919 % 19 - 9).view(2, 40, 3)
    gram = (features @ features.mT).to(float32)
    ours, plain = TritonParts(gram.to(on)), TorchParts(gram.to(float64))
    for _ in range(2):
        terminals = plain.terminals()
        sides = terminals[0] > 0
        pairs = [*zip(ours.terminals(), terminals, strict=True), (ours.split(sides.to(on)), plain.split(sides))]
        if not all(equal(a.cpu(), b) for a, b in [*pairs, (ours.labels, plain.labels)]):
            return False
    return True


def wide_dtype(on: device) -> dtype:
    """The widest float type of a device."""
    return float32 if on.type == "mps" else float64


def exact_dtype() -> dtype:
    """The float type whose matrix products do not round whole numbers: TF32 and bfloat16 would, where they are let."""
    try:
        exact = get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by a newer interface
        exact = False
    return float32 if exact else float64
