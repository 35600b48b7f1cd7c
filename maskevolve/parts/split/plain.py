"""The tree of parts in plain torch, on any device. The gram matrix is kept at 0 between patches of different parts.

It is symmetric; rows are read and not columns, since a CPU is faster at that.
"""

import torch
from torch import Tensor

LLOYD_STEPS = 2  # more found no more of planted parts
RESOLUTION = 1 << 20  # of terminals before they are scaled: their squares still add up without rounding
SCALE = 1 << 16  # the root mean square of the terminals of a part; a mean edge
LIMIT = 1 << 30


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class TorchParts:
    """The parts of one level of the tree, of a batch of images: `labels` [B, N] int64, 0 to 2 ** level - 1."""

    def __init__(self, gram: Tensor) -> None:
        self.gram, self.num_parts = gram, 1
        self.sides = gram.new_empty(gram.shape[:2])  # of the last split, which the gram matrix does not know yet
        self.same = torch.empty_like(gram)  # kept, since new memory costs a CPU more than the comparison
        self.norms = gram.diagonal(dim1=1, dim2=2).long()
        self.inner = gram.sum(2).long()  # product of each patch with the sum of its part
        self.labels = torch.zeros_like(self.norms)
        self.count, self.square = self.total(torch.ones_like(self.norms)), self.total(self.inner)

    def terminals(self) -> tuple[Tensor, Tensor]:
        """How much more each patch belongs to one of two means of its part than to the other: capacities for a cut.

        The means come from two far seeds by Lloyd steps, but the sides meet at the middle of the part, not half way
        between the means, so that a few outliers cannot be one side for good. Source and sink, each [B, N] int32, are
        how far a patch lies from the part's mean along the line through both means, towards the first and towards the
        second. The root mean square is 2 ** 16 in every part, so that even attention does not vanish beside the edges.
        """
        if self.num_parts > 1:
            self.gram *= torch.eq(self.sides[:, :, None], self.sides[:, None], out=self.same)
        size = self.count.gather(1, self.labels)
        # Squared distances to the mean of the part, then to the first seed, less what all patches of a part share.
        first = self.column_of_largest(size * self.norms - 2 * self.inner)
        along = first - self.column_of_largest(self.norms - 2 * first)
        for _ in range(LLOYD_STEPS):
            second = size * along < self.sum(along)
            product = torch.bmm(second.to(self.gram)[:, None], self.gram)[
                :, 0
            ].long()  # with the sum of the second half
            # Where patches lie on the line from the second mean to the first, in a unit that is the part's own.
            along = self.sum(second.long()) * self.inner - size * product
        along, wide = size * along - self.sum(along), wide_dtype(along.device)
        unit = (along.to(wide) * RESOLUTION / self.largest(along.abs()).clamp(min=1)).round()
        square = self.sum(unit.long().square()) // size
        # No root of an integer is near the middle between two integers, so every device rounds it alike.
        root = square.to(wide).sqrt().round().clamp(min=1)
        drawn = (unit * SCALE / root).round().clamp(-LIMIT, LIMIT).int()
        return drawn.clamp(min=0), (-drawn).clamp(min=0)

    def split(self, sides: Tensor) -> Tensor:
        """Go one level down: split every part in two, by `sides` [B, N] bool, True for the second half.

        The gain of each split, [B, 2 ** level] float64, is how much it lowers the squared distances to the means,
        squared, over the part's size, so that a large background is not split first; -1 where nothing is split.
        """
        size, square, self.sides = self.count.clamp(min=1), self.square, sides.to(self.gram)
        product = torch.bmm(self.sides[:, None], self.gram)[:, 0].long()
        self.inner = torch.where(sides, product, self.inner - product)
        self.labels, self.num_parts = 2 * self.labels + sides, 2 * self.num_parts
        self.count, self.square = self.total(torch.ones_like(self.labels)), self.total(self.inner)
        halves, wide = self.count.unflatten(1, (-1, 2)), wide_dtype(sides.device)
        explained = (self.square.to(wide) / self.count.clamp(min=1)).unflatten(1, halves.shape[1:]).sum(2)
        gain = (explained - square.to(wide) / size).clamp(min=0).square() / size
        return torch.where((halves > 0).all(2), gain, -1)

    def total(self, values: Tensor) -> Tensor:
        """Sums over each part: [B, N] to [B, num_parts]."""
        return values.new_zeros(len(values), self.num_parts).scatter_add_(1, self.labels, values)

    def sum(self, values: Tensor) -> Tensor:
        """For each patch the sum over its part, [B, N]."""
        return self.total(values).gather(1, self.labels)

    def largest(self, values: Tensor) -> Tensor:
        """For each patch the largest value of its part, [B, N]."""
        least = values.new_full((len(values), self.num_parts), torch.iinfo(values.dtype).min)
        return least.scatter_reduce_(1, self.labels, values, "amax").gather(1, self.labels)

    def column_of_largest(self, values: Tensor) -> Tensor:
        """Inner product of each patch with the patch of its part that has the largest value, the first of these."""
        size = values.shape[1]
        place = torch.arange(size - 1, -1, -1, device=values.device)
        seed = size - 1 - self.largest(values * size + place) % size
        return self.gram.gather(1, seed[:, None])[:, 0].long()
