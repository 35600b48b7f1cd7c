"""The tree of parts in plain torch, on any device. The gram matrix is kept at 0 between patches of different parts.

It is symmetric; rows are read where columns could be, for a CPU is faster at that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import LIMIT, LLOYD_STEPS, RESOLUTION, SCALE, wide_dtype


class TorchParts:
    """See `Parts`."""

    def __init__(self, gram: Tensor) -> None:
        self.gram, self.num_parts = gram, 1
        self.sides = gram.new_empty(gram.shape[:2])  # of the last split, which the gram matrix does not know yet
        self.same = torch.empty_like(gram)  # kept, for new memory costs a CPU more than what is done in it
        self.norms = gram.diagonal(dim1=1, dim2=2).long()
        self.inner = gram.sum(2).long()  # product of each patch with the sum of its part
        self.labels = torch.zeros_like(self.norms)
        self.count, self.square = self.total(torch.ones_like(self.norms)), self.total(self.inner)

    def terminals(self) -> tuple[Tensor, Tensor]:
        """See `Parts.terminals`."""
        if self.num_parts > 1:
            self.gram *= torch.eq(self.sides[:, :, None], self.sides[:, None], out=self.same)
        size = self.spread(self.count)
        # Squared distances, but for what all patches of a part share: to its mean, then to the first seed.
        first = self.column_of_largest(size * self.norms - 2 * self.inner)
        along = first - self.column_of_largest(self.norms - 2 * first)
        for _ in range(LLOYD_STEPS):
            second = (size * along < self.sum(along)).long()
            # Where patches lie on the line from the second mean to the first, in a unit that is the part's own.
            along = self.sum(second) * self.inner - size * self.product(second)
        drawn = self.scaled(size * along - self.sum(along), size)
        return drawn.clamp(min=0), (-drawn).clamp(min=0)

    def split(self, sides: Tensor) -> Tensor:
        """See `Parts.split`."""
        ones, size, square = sides.long(), self.count, self.square
        product = self.product(ones)
        self.inner = torch.where(sides, product, self.inner - product)
        self.labels, self.num_parts = 2 * self.labels + ones, 2 * self.num_parts
        self.count, self.square = self.total(torch.ones_like(ones)), self.total(self.inner)
        halves, wide = self.count.unflatten(1, (-1, 2)), wide_dtype(sides.device)
        explained = (self.square.to(wide) / self.count.clamp(min=1)).unflatten(1, halves.shape[1:]).sum(2)
        size = size.clamp(min=1)
        gain = (explained - square.to(wide) / size).clamp(min=0).square() / size
        self.sides = sides.to(self.gram)
        return torch.where((halves > 0).all(2), gain, -1)

    def total(self, values: Tensor) -> Tensor:
        """Sums over each part: [B, N] to [B, num_parts]."""
        return values.new_zeros(len(values), self.num_parts).scatter_add_(1, self.labels, values)

    def spread(self, values: Tensor) -> Tensor:
        """A value a part to a value a patch: [B, num_parts] to [B, N]."""
        return values.gather(1, self.labels)

    def sum(self, values: Tensor) -> Tensor:
        """For each patch the sum over its part, [B, N]."""
        return self.spread(self.total(values))

    def largest(self, values: Tensor) -> Tensor:
        """For each patch the largest value of its part, [B, N]."""
        least = values.new_full((len(values), self.num_parts), torch.iinfo(values.dtype).min)
        return self.spread(least.scatter_reduce_(1, self.labels, values, "amax"))

    def product(self, second: Tensor) -> Tensor:
        """Inner product of each patch with the sum of the patches of its part where `second` is 1, [B, N]."""
        return torch.bmm(second.to(self.gram)[:, None], self.gram)[:, 0].long()

    def column_of_largest(self, values: Tensor) -> Tensor:
        """Inner product of each patch with the patch of its part that has the largest value, the first of these."""
        last = values.shape[1] - 1
        place = torch.arange(last, -1, -1, device=values.device)
        seed = last - self.largest(values * (last + 1) + place) % (last + 1)
        return self.gram.gather(1, seed[:, None])[:, 0].long()

    def scaled(self, values: Tensor, size: Tensor) -> Tensor:
        """Values to a root mean square of SCALE in each part, as int32."""
        wide = wide_dtype(values.device)
        unit = (values.to(wide) * RESOLUTION / self.largest(values.abs()).clamp(min=1)).round()
        square = self.sum(unit.long().square()) // size
        # Of an integer, no root is near the middle between two: however it is taken, it is rounded to the same.
        root = square.to(wide).sqrt().round().clamp(min=1)
        return (unit * SCALE / root).round().clamp(-LIMIT, LIMIT).int()
