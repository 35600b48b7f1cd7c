"""What the study of pretraining compares: masks, and settings that masks from grid to part leave open."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from maskevolve import BlockMask, EMPartitioner, EvolvingMask, GraphCutPartitioner, GridMask, PartMask, PartTeacher
from maskevolve import RandomMask as Random
from maskevolve.masks import Masking
from maskevolve.schedule import num_parts_at

MASK_RATIO = 0.75
DECAY = 0.99  # of the teacher, a step: the library's 0.9999 is for runs of 10,000 steps and more
NUM_PARTS = (40, 10)  # in the first and the last epoch, as released


class ColourTeacher(nn.Module):
    """Parts without a model: the default cut, of the cosines of the patches' mean colours, less their mean."""

    part_range, layers, decay = NUM_PARTS, "colours", None

    def __init__(self, patch: int, epochs: float) -> None:
        super().__init__()
        self.patch, self.epochs, self.partitioner = patch, epochs, GraphCutPartitioner()

    def set_epoch(self, epoch: float) -> None:
        self.num_parts = num_parts_at(epoch, self.epochs, *self.part_range)

    def update(self, model: nn.Module) -> None:
        """There is nothing to update."""

    def forward(self, images: Tensor) -> Tensor:
        x = avg_pool2d(images, self.patch).flatten(2).mT
        x = normalize(x - x.mean(1, keepdim=True), dim=2)
        return self.partitioner(x @ x.mT, self.num_parts, images=images)


class BoxTeacher(nn.Module):
    """Parts that people drew: what lies in the box of the object, and what does not."""

    partitioner, part_range, layers, decay = "people's boxes", (2, 2), "boxes", None

    def set_epoch(self, epoch: float) -> None:
        """There are two parts at any time."""

    def update(self, model: nn.Module) -> None:
        """There is nothing to update."""

    def forward(self, objects: Tensor) -> Tensor:
        """From whether a patch lies in the box, [B, 1, H, W] in [0, 1], to parts [B, N]."""
        return (objects.flatten(1) > 0.5).long()


def taught(
    encoder: nn.Module, epochs: float, partitioner: Any = GraphCutPartitioner, decay: float = DECAY, **options: Any
) -> PartTeacher:
    """A moving average of the encoder that trains; the defaults of the library but for the decay."""
    return PartTeacher(encoder, partitioner(), total_epochs=epochs, decay=decay, **{"num_parts": NUM_PARTS, **options})


def by_colour(encoder: nn.Module, epochs: float) -> ColourTeacher:
    return ColourTeacher(encoder.patch_embed.patch_size[0], epochs)


def from_patches(encoder: nn.Module, epochs: float) -> PartTeacher:
    """As many parts as patches at first."""
    return taught(encoder, epochs, num_parts=(encoder.patch_embed.num_patches, NUM_PARTS[1]))


Teacher = PartTeacher | ColourTeacher | BoxTeacher


class Method(NamedTuple):
    """How masks are drawn."""

    masking: Callable[[float], Masking]
    """From the length of training, in epochs."""
    teacher: Callable[[nn.Module, float], Teacher] | None = None
    """From the encoder and the length of training, for masks that need parts."""
    longer: float = 1.0
    """How many times the epochs of the others, to compare at equal time."""
    mask_ratio: float = MASK_RATIO
    """Of the masks that it is trained with."""


def random(epochs: float) -> Masking:
    return Random()


def random_to_part(epochs: float) -> Masking:
    return EvolvingMask(epochs, start=Random())


def half_way(epochs: float, **masks: Masking) -> Masking:
    """Alpha ends at about 0.5: the square root of a quarter."""
    return EvolvingMask(4 * epochs, **masks)


BASELINE, DEFAULT = "random", "grid to part"
MASKS = {
    BASELINE: Method(random),
    "grid": Method(lambda epochs: GridMask()),
    "block": Method(lambda epochs: BlockMask()),
    "part": Method(lambda epochs: PartMask(), taught),
    "grid to block": Method(lambda epochs: EvolvingMask(epochs, end=BlockMask())),
    DEFAULT: Method(EvolvingMask, taught),  # the library's defaults: tokens, edges from contrast
    "grid to part, EM": Method(EvolvingMask, partial(taught, partitioner=EMPartitioner, layers=None)),  # as released
    "grid to part, all layers": Method(EvolvingMask, partial(taught, layers=None)),
    "grid to part, colours": Method(EvolvingMask, by_colour),
    "random to part": Method(random_to_part, taught),
    "part to random": Method(lambda epochs: EvolvingMask(epochs, start=PartMask(), end=Random()), taught),
    "patches to part": Method(lambda epochs: PartMask(), from_patches),  # no grid
    "random, longer": Method(random, longer=1.4),  # about the time of grid to part
    "not pretrained": Method(random, longer=0),  # what the measures owe to the start of the weights
}
CHOICES = {  # one setting of grid to part at a time, and random masks of the same ratios
    "power 1": Method(partial(EvolvingMask, power=1), taught),
    "power 2": Method(partial(EvolvingMask, power=2), taught),
    "alpha to 0.5": Method(half_way, taught),
    "mask ratio 0.6": Method(EvolvingMask, taught, mask_ratio=0.6),
    "mask ratio 0.5": Method(EvolvingMask, taught, mask_ratio=0.5),
    "random, mask ratio 0.6": Method(random, mask_ratio=0.6),
    "random, mask ratio 0.5": Method(random, mask_ratio=0.5),
    "40 parts": Method(EvolvingMask, partial(taught, num_parts=(40, 40))),
    "10 parts": Method(EvolvingMask, partial(taught, num_parts=(10, 10))),
    "40 to 4 parts": Method(EvolvingMask, partial(taught, num_parts=(40, 4))),
    "last layer": Method(EvolvingMask, partial(taught, layers=[-1])),
    "decay 0.9": Method(EvolvingMask, partial(taught, decay=0.9)),
    "decay 0.999": Method(EvolvingMask, partial(taught, decay=0.999)),
    "random to part, alpha to 0.5": Method(lambda epochs: half_way(epochs, start=Random()), taught),
    "people's boxes": Method(EvolvingMask, lambda encoder, epochs: BoxTeacher()),
}
METHODS = MASKS | CHOICES
