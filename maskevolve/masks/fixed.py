"""The same masks in every evaluation, whatever training has drawn before."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..grid import Grid
from .base import Masking, check_masking
from .functional import MaskedPatches


class FixedDraws:
    """Masks that depend on a seed and on the place of each image, not on the batches that images come in.
    This process, `rank` of `ranks`, is given every `ranks`-th image, as DistributedSampler does.
    """

    def __init__(self, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.seed, self.place, self.step = seed, rank, ranks

    def seed_of(self, index: int) -> int:
        """Of the image that comes after so many others: mixed, for torch's generators on a CPU take 32 bits of it."""
        place = self.place + index * self.step
        return int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0])

    def mask(
        self, masking: Any, x: Tensor, keep: int, parts: Any = None, grid_size: Grid | None = None
    ) -> MaskedPatches:
        """Mask the next images so that `keep` patches of each stay: x and parts as a mask takes them."""
        drawn: list[MaskedPatches] = []
        for one in x.split(1) if len(x) else [x]:  # an empty batch is one call, too
            own = None if parts is None else parts[len(drawn) : len(drawn) + 1]
            generator = torch.Generator(x.device).manual_seed(self.seed_of(0))
            drawn.append(masking(one, keep=keep, parts=own, generator=generator, grid_size=grid_size))
            self.place += self.step * len(one)
        return MaskedPatches(*map(torch.cat, zip(*drawn, strict=True)))


@contextmanager
def fixed_masks(masking: Masking, seed: int = 0) -> Iterator[None]:
    """Let a mask remove the same patches in every pass over the same images, as for a validation loss.

    The mask of an image depends on the seed, any whole number of at least 0, and on how many images came before it in
    the context, in batches of any size: `draw` is called for one image at a time. torch's random states are afterwards
    what they were before. The mask stays that of its epoch, and parts may change: for losses that are to be compared
    between epochs, use a mask that does not evolve, such as RandomMask(). For a patched model, use `Evolution.fixed`.

    Examples:
        >>> from maskevolve import GridMask
        >>> masking, masks = GridMask(), []
        >>> for epoch in range(2):
        ...     with fixed_masks(masking, seed=0):
        ...         masks.append(masking(torch.randn(2, 196, 8), 0.75).mask)
        >>> torch.equal(*masks)
        True
    """
    check_masking(masking, hint="; in a patched model, use `with evolution.fixed(seed):`")
    draws, own, before = FixedDraws(seed), masking.forward, vars(masking).get("forward")

    def forward(x: Any, mask_ratio: float = 0.75, *, keep: Any = None, parts: Any = None, **how: Any) -> Any:
        grid = masking.flatten(x, how.get("grid_size"))[1]
        return draws.mask(own, x, masking.num_visible(grid, mask_ratio, keep), parts, grid)

    vars(masking)["forward"] = forward
    try:
        with kept_random_states():
            yield
    finally:
        del vars(masking)["forward"]
        if before is not None:
            vars(masking)["forward"] = before


def kept_random_states() -> AbstractContextManager[None]:
    """Random states of the CPU and of the current GPU are afterwards what they were before."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])
