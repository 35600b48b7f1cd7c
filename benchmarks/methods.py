"""What the study of pretraining compares: nine masks, and a model that is not pretrained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskevolve import BlockMask, EMPartitioner, EvolvingMask, GraphCutPartitioner, PartMask, PartTeacher, RandomMask
from maskevolve.masks import Masking

MASK_RATIO = 0.75
DECAY = 0.99  # of the teacher, a step: the library's 0.9999 is for runs of 10,000 steps and more


class GreenNoise(Masking):
    """Noise whose middle frequencies are kept, after ColorMAE (https://arxiv.org/abs/2407.13036)."""

    def draw(self, batch_size: int, grid_size: tuple[int, ...], parts: Tensor | None, **source: Any) -> Tensor:
        noise = torch.rand(batch_size, *grid_size, **source)
        rows, columns = (torch.fft.fftfreq(size, device=noise.device) for size in grid_size)
        square = rows[:, None] ** 2 + columns**2  # of the frequency, in waves a patch
        fine, coarse = (torch.exp(-2 * (math.pi * sigma) ** 2 * square) for sigma in (0.5, 1.5))  # in patches
        return torch.fft.ifft2(torch.fft.fft2(noise) * (fine - coarse)).real.flatten(1)


class ShuffledTeacher(PartTeacher):
    """Parts of the same sizes, whose patches lie anywhere: a control."""

    def forward(self, images: Tensor, grid_size: Any = None) -> Tensor:
        parts = super().forward(images, grid_size)
        return parts.gather(1, torch.rand(parts.shape, device=parts.device).argsort(1))


def taught(
    encoder: nn.Module, epochs: float, kind: type = PartTeacher, cut: type = GraphCutPartitioner, **how: Any
) -> PartTeacher:
    """A moving average of the encoder that trains; the defaults of the library but for the decay."""
    teacher: PartTeacher = kind(encoder, cut(), total_epochs=epochs, decay=DECAY, **how)
    return teacher


class Method(NamedTuple):
    """How masks are drawn."""

    masking: Callable[[float], Masking]
    """From the length of training, in epochs."""
    teacher: Callable[[nn.Module, float], PartTeacher] | None = None
    """From the encoder and the length of training, for masks that need parts."""
    epochs: float = 1.0
    """Times those of the others."""


def half(epochs: float) -> Masking:
    return PartMask(share=0.5)


def random_to_half(epochs: float) -> Masking:
    """The weight of parts rises linearly to a half, as in HPM (https://arxiv.org/abs/2304.05919)."""
    return EvolvingMask(epochs, start=RandomMask(), power=half_of)


def half_of(progress: float) -> float:
    return progress / 2


published = partial(taught, cut=EMPartitioner, layers=None)
BASELINE, SHUFFLED, NOTHING = "random", "half by shuffled parts", "not pretrained"
CONTROLS = (BASELINE, "green", "block")
METHODS = {  # in the order in which they are run
    BASELINE: Method(lambda epochs: RandomMask()),
    "green": Method(lambda epochs: GreenNoise()),
    "block": Method(lambda epochs: BlockMask()),
    "grid to part": Method(EvolvingMask, taught),  # the library's defaults
    "half by parts": Method(half, taught),
    SHUFFLED: Method(half, partial(taught, kind=ShuffledTeacher)),
    "random to part, half": Method(random_to_half, taught),
    "grid to part, hint": Method(lambda epochs: EvolvingMask(epochs, end=PartMask(hint=0.1)), taught),
    "half by parts, EM": Method(half, published),
    NOTHING: Method(lambda epochs: RandomMask(), epochs=0),  # what the measures owe to the start of the weights
}
WITH_PARTS = tuple(name for name, method in METHODS.items() if method.teacher and name != SHUFFLED)
