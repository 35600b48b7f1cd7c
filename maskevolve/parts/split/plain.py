"""The tree of parts on the host: NumPy, and torch for what is quadratic in the patches.

The patches of all images are in one row, those of a part together, in rising order, so that sums over parts are sums
over stretches of the row. The gram matrix is kept at 0 between patches of different parts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...grid import Grid
from ..mincut import neighbours

LLOYD_STEPS = 2  # more found no more of planted parts
RESOLUTION = 1 << 20  # of terminals before they are scaled: their squares still add up without rounding
SCALE = 1 << 16  # the root mean square of the terminals of a part; a mean edge
LIMIT = 1 << 30
SMALL = 8  # parts below this share of an image have weaker contrast edges, so that they can be split
LEVEL = 0.9  # of the contrast edges of one level of the tree, those of the next, so that large parts can be split
ONE = 20  # bits after the point of what edges are multiplied by


class HostParts:
    """The parts of one level of the tree, of a batch of images: `labels` [B, N] int64, 0 to 2 ** level - 1.

    Args:
        gram: see `whole_images`.
        edges: [B, 8, N] int32, capacities between neighbours; as many as there are, on other grids than pictures'.
        grid: patches along each axis, such as (H, W).
        weaken: whether edges are weaker in deeper levels and small parts, whose outline falls with the square root of
            their size.
    """

    def __init__(self, gram: Tensor, edges: Tensor, grid: Grid, weaken: bool) -> None:
        self.gram, self.edges, self.grid = gram.contiguous(), edges.numpy(), grid
        self.weaken, self.level = weaken, 0
        batch_size, patches, _ = gram.shape
        self.rows = self.gram.numpy()  # the same memory
        self.same = torch.empty_like(gram)  # kept, since new memory costs more than the comparison
        self.sides = gram.new_empty(batch_size, patches)  # of the last split, which the gram matrix does not know yet
        self.labels = torch.zeros(batch_size, patches, dtype=torch.long)
        self.norms = gram.diagonal(dim1=1, dim2=2).flatten().numpy().astype(np.int64)
        self.inner = gram.sum(2).flatten().numpy().astype(np.int64)  # product of each patch with the sum of its part
        self.order = np.arange(batch_size * patches, dtype=np.int64)  # which patch of all is at each place of the row
        self.starts, self.sizes = self.order[::patches], np.full(batch_size, patches)  # of parts that have patches
        self.node = np.arange(batch_size)  # image * 2 ** level + label of these
        self.member = np.repeat(self.node, self.sizes)  # which of these parts each patch of the row belongs to

    def capacities(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the next cut: source and sink, [B, N], of each patch, and the edges between patches of a part, [B, 8, N].

        Source and sink are how much more each patch belongs to one of two means of its part than to the other. The
        means come from two far seeds by Lloyd steps, but the sides meet at the middle of the part, not half way
        between the means, so that a few outliers cannot be one side for good. They are how far a patch lies from the
        part's mean along the line through both means, towards the first and towards the second. The root mean square
        is 2 ** 16 in every part, so that even attention does not vanish beside the edges. All are int32.
        """
        if self.level:
            self.gram *= torch.eq(self.sides[:, :, None], self.sides[:, None], out=self.same)
        # Squared distances to the mean of the part, then to the first seed, less what all patches of a part share.
        size = self.spread(self.sizes)
        first = self.column_of_largest(size * self.norms - 2 * self.inner)
        along = first - self.column_of_largest(self.norms - 2 * first)
        for _ in range(LLOYD_STEPS):
            second = size * along < self.sum(along)
            # Where patches lie on the line from the second mean to the first, in a unit that is the part's own.
            along = self.sum(second.astype(np.int64)) * self.inner - size * self.product(second)
        along = size * along - self.sum(along)
        largest = self.spread(np.maximum.reduceat(np.abs(along), self.starts))
        unit = np.rint(along * float(RESOLUTION) / np.maximum(largest, 1))
        square = self.sum(np.square(unit.astype(np.int64))) // size
        # No root of an integer is near the middle between two integers, so every device rounds it alike.
        root = np.maximum(np.rint(np.sqrt(square)), 1)
        drawn = np.empty(len(self.order), dtype=np.int32)
        drawn[self.order] = np.minimum(np.maximum(np.rint(unit * SCALE / root), -LIMIT), LIMIT)
        terminals = torch.from_numpy(drawn).view_as(self.labels)
        return terminals.clamp(min=0), (-terminals).clamp(min=0), self.edges_of_parts(size)

    def edges_of_parts(self, size: Any) -> Tensor:
        labels, patches = self.labels.numpy(), self.labels.shape[1]
        kept = labels[:, neighbours(*self.grid)] == labels[:, None]
        if not self.weaken:
            return torch.from_numpy(self.edges * kept)
        scale = round(LEVEL**self.level * (1 << ONE))
        factor = np.empty_like(self.order)
        factor[self.order] = scale * np.minimum(SMALL * size, patches) // patches
        return torch.from_numpy((self.edges * (kept * factor.reshape(-1, 1, patches)) >> ONE).astype(np.int32))

    def split(self, sides: Tensor) -> Tensor:
        """Go one level down: split every part in two, by `sides` [B, N] bool, True for the second half.

        The gain of each split, [B, 2 ** level] float64, is how much it lowers the squared distances to the means,
        squared, over the part's size, so that a large background is not split first; -1 where nothing is split.
        """
        second = sides.numpy().ravel()[self.order]
        product, square = self.product(second), np.add.reduceat(self.inner, self.starts)
        self.inner = np.where(second, product, self.inner - product)
        count = np.add.reduceat(second, self.starts, dtype=np.int64)
        square_second = np.add.reduceat(self.inner * second, self.starts)
        square_first = np.add.reduceat(self.inner, self.starts) - square_second
        explained = square_first / np.maximum(self.sizes - count, 1) + square_second / np.maximum(count, 1)
        drop = np.maximum(explained - square / self.sizes, 0)
        gain = np.full(len(sides) << self.level, -1.0)
        gain[self.node] = np.where((count > 0) & (count < self.sizes), np.square(drop) / self.sizes, -1)
        # Each part's first half, then its second, in the order that they were in.
        place = (2 * self.member + second).argsort(kind="stable")
        self.order, self.inner, self.norms = self.order[place], self.inner[place], self.norms[place]
        sizes, node = count.repeat(2), (2 * self.node).repeat(2)
        sizes[::2] = self.sizes - count
        node[1::2] += 1
        self.sizes, self.node = sizes[sizes > 0], node[sizes > 0]
        self.starts = self.sizes.cumsum() - self.sizes
        self.member = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.labels, self.sides, self.level = 2 * self.labels + sides, sides.to(self.gram), self.level + 1
        return torch.from_numpy(gain).view(-1, 1 << (self.level - 1))

    def spread(self, values: Any) -> Any:
        """A value of each part, for each patch of the row."""
        return values[self.member]

    def sum(self, values: Any) -> Any:
        """For each patch of the row the sum over its part."""
        return self.spread(np.add.reduceat(values, self.starts))

    def product(self, chosen: Any) -> Any:
        """Inner product of each patch of the row with the sum of those of its part that are chosen."""
        flags = np.empty((len(self.rows), 1, self.rows.shape[1]), dtype=self.rows.dtype)
        flags.ravel()[self.order] = chosen
        product = torch.bmm(torch.from_numpy(flags), self.gram)  # NumPy's product has threads that wait for torch's
        return product.numpy().ravel()[self.order].astype(np.int64)

    def column_of_largest(self, values: Any) -> Any:
        """Inner product of each patch with the patch of its part that has the largest value, the first of these."""
        patches = self.rows.shape[1]
        last = patches - 1 - self.order % patches  # higher for patches that come first
        largest = np.maximum.reduceat(values * patches + last, self.starts)
        seed = patches - 1 - largest % patches
        return self.rows.ravel()[self.order * patches + self.spread(seed)].astype(np.int64)
