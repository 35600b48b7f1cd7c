"""The same masks in every evaluation, whatever training has drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .functional import MaskedPatches
from .kinds import Masking

__all__ = ["FixedDraws", "fixed_masks"]


class FixedDraws:
    """Masks that depend on a seed and on the place of each image, not on the batches that images come in.

    Args:
        seed: any whole number of at least 0.
        rank: of this process, which is given every `ranks`-th image, as DistributedSampler does.
        ranks: number of processes.
    """

    def __init__(self, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.seed, self.place, self.step = seed, rank, ranks

    def mask(self, masking: Any, x: Tensor, mask_ratio: float, parts: Tensor | None = None) -> MaskedPatches:
        """Mask the next images: x as a mask takes it."""
        drawn = []
        for index in range(len(x)):
            # Mixed, for torch's generators on the CPU take 32 bits of a seed.
            seed = int(np.random.SeedSequence([self.seed, self.place]).generate_state(1)[0])
            one = slice(index, index + 1)
            generator = torch.Generator(x.device).manual_seed(seed)
            drawn.append(masking(x[one], mask_ratio, parts=None if parts is None else parts[one], generator=generator))
            self.place += self.step
        return MaskedPatches(*map(torch.cat, zip(*drawn, strict=True)))


@contextmanager
def fixed_masks(masking: Masking, seed: int = 0) -> Iterator[None]:
    """Let a mask remove the same patches in every pass over the same images, as for a validation loss.

    The mask of an image depends on the seed and on how many images came before it in the context, in batches of any
    size: `draw` is called for one image at a time. torch's random states are afterwards what they were before. The mask
    stays that of its epoch, and parts may change: for losses that are to be compared between epochs, use a mask that
    does not evolve, such as RandomMask(). For a patched model, use `Evolution.fixed`.

    Args:
        masking: the mask.
        seed: any whole number of at least 0.

    Examples:
        >>> from maskevolve import GridMask
        >>> masking, masks = GridMask(), []
        >>> for epoch in range(2):
        ...     with fixed_masks(masking, seed=0):
        ...         masks.append(masking(torch.randn(2, 196, 8), 0.75).mask)
        >>> torch.equal(*masks)
        True
    """
    if not isinstance(masking, nn.Module) or not hasattr(masking, "scores"):
        raise TypeError(
            f"masking is a {type(masking).__name__}, but must be a mask, such as RandomMask(); in a patched model, use "
            "`with evolution.fixed(seed):`"
        )
    draws, own, before = FixedDraws(seed), masking.forward, vars(masking).get("forward")

    def forward(
        x: Tensor,
        mask_ratio: float = 0.75,
        *,
        parts: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedPatches:
        return draws.mask(own, x, mask_ratio, parts)

    vars(masking)["forward"] = forward
    try:
        with kept_random_states():
            yield
    finally:
        del vars(masking)["forward"]
        if before is not None:
            vars(masking)["forward"] = before


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Random states of the CPU and of the current GPU are afterwards what they were before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
