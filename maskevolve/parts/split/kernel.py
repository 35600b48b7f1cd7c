"""The tree of parts on a GPU: one launch for the capacities of a level and one for its split, and no host sync.

It gives the same bits as `plain.py`. A program takes one part. The patches of a part are listed in a row, so that it
reads only their rows and columns of the gram matrix: a level costs no more than the one above, and nothing is masked.
"""

# No annotations of __future__: the interpreter of Triton 3.0, which torch 2.4 brings, looks for constexpr itself.
import torch
import triton
import triton.language as tl
from torch import Tensor

from .plain import LEVEL, LIMIT, LLOYD_STEPS, ONE, RESOLUTION, SCALE, SMALL

LOADS = 32  # that a thread has under way at a time
MIDDLE = tl.constexpr(6755399441055744.0)  # 1.5 * 2 ** 52: float64s near it are integers, so + - rounds, half to even
SETTINGS = {"LLOYD_STEPS": LLOYD_STEPS, "RESOLUTION": RESOLUTION, "SCALE": SCALE, "LIMIT": LIMIT, "ONE": ONE}


class TritonParts:
    """See `HostParts`. Memory beside the gram matrix and the edges: at most 72 bytes a patch, and 16 a part."""

    def __init__(self, gram: Tensor, edges: Tensor, grid: tuple[int, int], weaken: bool) -> None:
        batch_size, patches, _ = gram.shape
        self.gram, self.edges, self.width, self.weaken, self.level = gram.contiguous(), edges, grid[1], weaken, 0
        self.inner = self.gram.sum(2)  # product of each patch with the sum of its part
        self.labels = torch.zeros(batch_size, patches, dtype=torch.long, device=gram.device)
        # The patches of part p of an image are order[starts[p]:starts[p + 1]], in rising order.
        self.order = torch.arange(patches, dtype=torch.int32, device=gram.device).repeat(batch_size, 1)
        self.starts = torch.arange(0, patches + 1, patches, dtype=torch.int32, device=gram.device).repeat(batch_size, 1)
        self.second = torch.empty_like(self.inner)  # where programs note what is in the second half

    def capacities(self) -> tuple[Tensor, Tensor, Tensor]:
        source, sink, capacity = (torch.empty_like(like) for like in (self.order, self.order, self.edges))
        fade = (round(LEVEL**self.level * (1 << ONE)), SMALL) if self.weaken else (1 << ONE, self.order.shape[1])
        self._run(_capacities_kernel, source, sink, self.labels, self.edges, capacity, self.width, *fade, **SETTINGS)
        return source, sink, capacity

    def split(self, sides: Tensor) -> Tensor:
        parts = 1 << self.level
        gain = torch.empty(len(sides), parts, dtype=torch.float64, device=sides.device)
        order, starts = torch.empty_like(self.order), self.starts.new_empty(len(sides), 2 * parts + 1)
        self._run(_split_kernel, sides.contiguous(), gain, self.labels, order, starts)
        self.order, self.starts, self.level = order, starts, self.level + 1
        return gain

    def _run(self, kernel, *tensors, **settings):
        batch_size, patches = self.order.shape
        block = max(triton.next_power_of_2(patches), 32)
        # Parts get smaller: more programs at a time, of fewer threads, where a thread can hold what falls to it.
        warps = max(1, block // 256, min(block // 64, 16) >> self.level)
        # The batch comes first, for the other dimensions of a grid end at 65,535.
        with torch.cuda.device_of(self.gram):  # Triton launches on the current device
            kernel[(batch_size, 1 << self.level)](
                self.gram, self.order, self.starts, self.inner, self.second, *tensors, patches, **settings,
                ROWS=max(1, 32 * warps * LOADS // block), BLOCK=block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit
def _part(gram, order, starts, second, patches, BLOCK: tl.constexpr):
    """Of this program: its tensors, start and size of its part, its patches, their places, which lanes hold one."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    starts += image * (tl.num_programs(1) + 1) + part
    start = tl.load(starts)
    size = tl.load(starts + 1) - start
    inside = tl.arange(0, BLOCK) < size
    order += image * patches + start
    patch = tl.load(order + tl.arange(0, BLOCK), mask=inside, other=0)
    gram += image * patches * patches
    return gram, order, second + image * patches, start, size, patch, image * patches + patch, inside


@triton.jit
def _column_of_largest(gram, order, values, patch, inside, patches, BLOCK: tl.constexpr):
    """Inner product of each patch with the one that has the largest value, the first of these."""
    largest = tl.max(tl.where(inside, values, -(1 << 62)))
    seed = tl.load(order + tl.min(tl.where(inside & (values == largest), tl.arange(0, BLOCK), BLOCK - 1)))
    return tl.load(gram + seed.to(tl.int64) * patches + patch, mask=inside, other=0).to(tl.int64)


@triton.jit
def _product(gram, order, second, flags, size, patch, inside, patches, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Inner product of each patch with the sum of those that are flagged."""
    tl.debug_barrier()  # all have read the notes before
    tl.store(second + patch, flags.to(tl.float32), mask=inside)
    tl.debug_barrier()
    product = tl.zeros([BLOCK], tl.float32)  # of integers below 2 ** 24: exact
    for first in range(0, size, ROWS):
        row = first + tl.arange(0, ROWS)
        other = tl.load(order + row, mask=row < size, other=0)
        flagged = tl.load(second + other, mask=row < size, other=0) > 0
        place = other.to(tl.int64)[:, None] * patches + patch[None, :]
        product += tl.sum(tl.load(gram + place, mask=flagged[:, None] & inside[None, :], other=0), 0)
    return product.to(tl.int64)


@triton.jit(do_not_specialize=["width", "scale", "small"])
def _capacities_kernel(
    gram, order, starts, inner, second, source, sink, labels, edges, capacity, width, scale, small, patches,
    LLOYD_STEPS: tl.constexpr, RESOLUTION: tl.constexpr, SCALE: tl.constexpr, LIMIT: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gram, order, second, _start, size, patch, at, inside = _part(gram, order, starts, second, patches, BLOCK)
    if size == 0:
        return
    total = tl.load(inner + at, mask=inside, other=0).to(tl.int64)
    norm = tl.load(gram + patch.to(tl.int64) * (patches + 1), mask=inside, other=0).to(tl.int64)
    # Squared distances to the mean, then to the first seed, less what all patches share.
    first = _column_of_largest(gram, order, size * norm - 2 * total, patch, inside, patches, BLOCK)
    along = first - _column_of_largest(gram, order, norm - 2 * first, patch, inside, patches, BLOCK)
    for _ in range(LLOYD_STEPS):
        flags = inside & (size * along < tl.sum(along))
        product = _product(gram, order, second, flags, size, patch, inside, patches, ROWS, BLOCK)
        # Where patches lie on the line from the second mean to the first, in a unit that is the part's own.
        along = tl.sum(flags.to(tl.int64)) * total - size * product
    along = tl.where(inside, size * along - tl.sum(along), 0)
    unit = along.to(tl.float64) * RESOLUTION / tl.maximum(tl.max(tl.abs(along)), 1).to(tl.float64)
    unit = (unit + MIDDLE) - MIDDLE
    square = tl.sum(unit.to(tl.int64) * unit.to(tl.int64)) // size
    root = tl.maximum((tl.sqrt(square.to(tl.float64)) + MIDDLE) - MIDDLE, 1)
    scaled = tl.minimum(tl.maximum((unit * SCALE / root + MIDDLE) - MIDDLE, -LIMIT), LIMIT)
    tl.store(source + at, tl.maximum(scaled, 0).to(tl.int32), mask=inside)
    tl.store(sink + at, tl.maximum(-scaled, 0).to(tl.int32), mask=inside)
    # Edges within the part, to the east, west, south, north, south-east, north-west, south-west and north-east.
    factor = scale.to(tl.int64) * tl.minimum(small * size, patches) // patches
    for direction in range(8):
        down, right = tl.where(direction > 1, 1, 0), tl.where(direction // 2 == 1, 0, tl.where(direction > 5, -1, 1))
        step = (down * width + right) * (1 - 2 * (direction % 2))
        edge = at + (at // patches * 7 + direction) * patches
        room = tl.load(edges + edge, mask=inside, other=0).to(tl.int64)
        other = tl.load(labels + at + step, mask=inside & (room > 0), other=-1)
        tl.store(capacity + edge, tl.where(other == tl.program_id(1), room * factor >> ONE, 0), mask=inside)


@triton.jit
def _split_kernel(
    gram, order, starts, inner, second, sides, gain, labels, order_after, starts_after, patches, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    gram, order, second, start, size, patch, at, inside = _part(gram, order, starts, second, patches, BLOCK)
    flags = inside & (tl.load(sides + at, mask=inside, other=0) != 0)
    total = tl.load(inner + at, mask=inside, other=0).to(tl.int64)
    product = _product(gram, order, second, flags, size, patch, inside, patches, ROWS, BLOCK)
    product = tl.where(flags, product, total - product)
    count = tl.sum(flags.to(tl.int32))
    square, square_second = tl.sum(total), tl.sum(tl.where(flags, product, 0))
    explained = _over(tl.sum(product) - square_second, size - count) + _over(square_second, count)
    drop = tl.maximum(explained - _over(square, size), 0)
    tl.store(gain + image * parts + part, tl.where((count > 0) & (count < size), _over(drop * drop, size), -1))
    tl.store(inner + at, product.to(tl.float32), mask=inside)
    tl.store(labels + at, (2 * part + flags.to(tl.int32)).to(tl.int64), mask=inside)
    # A stable partition of the list: the first half, then the second.
    before = tl.cumsum(flags.to(tl.int32), 0)
    place = tl.where(flags, size - count + before - 1, tl.arange(0, BLOCK) - before)
    tl.store(order_after + image * patches + start + place, patch, mask=inside)
    starts_after += image * (2 * parts + 1) + 2 * part
    tl.store(starts_after, start)
    tl.store(starts_after + 1, start + size - count)
    tl.store(starts_after + 2, start + size, mask=part == parts - 1)


@triton.jit
def _over(total, count):
    return total.to(tl.float64) / tl.maximum(count, 1).to(tl.float64)
