"""Min cut by push-relabel in one Triton program an image: no host sync, safe in a CUDA graph.

An image's state stays in registers; what nodes tell their neighbours goes through a scratch that fits the first cache.
Directions come in four pairs, forth and back, as rows of [4, nodes], and are pushed along four at a time.
"""

# No annotations of __future__: the interpreter of Triton 3.0, which torch 2.4 brings, looks for constexpr itself.
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain

MOST_NODES = 1024  # of a grid in one program
ROUNDS = 1024  # of `plain.SWEEPS` sweeps each; a few are enough for images


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor, *, rounds: int = ROUNDS) -> Tensor:
    """See `grid_min_cut`. Grids of more than 1024 nodes are cut by the torch solver.

    The kernel pushes for at most `rounds` rounds of sweeps. If excess is left that can reach the sink, it goes on with
    exact heights before every sweep. Then in each sweep all such excess moves one step nearer to the sink, or a node's
    edges towards it are full and its distance grows for good: with n nodes, that ends within n ** 3 sweeps. So the cut
    is exact whatever the bound.
    """
    if source.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('solver="triton" needs tensors on a GPU, but these are on the CPU: use solver="auto"')
    batch_size, height, width = source.shape
    if height * width > MOST_NODES:
        return plain.min_cut(source, sink, capacity)
    reaches_sink = torch.empty(source.shape, dtype=torch.bool, device=source.device)
    block = max(triton.next_power_of_2(height * width), 32)
    heights, flows = source.new_empty(batch_size, block), source.new_empty(batch_size, 8, block, dtype=torch.int64)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        _min_cut_kernel[(batch_size,)](
            source.contiguous(), sink.contiguous(), capacity.contiguous(), reaches_sink, heights, flows, height, width,
            rounds, SWEEPS=plain.SWEEPS, BLOCK=block, num_warps=max(1, block // 64), enable_fp_fusion=False,
        )  # fmt: skip
    return reaches_sink


# Specialised, a number of rounds of 1 is a constant that cannot be counted down, and sides that 16 divides take more
# registers and 32 KB of shared memory.
@triton.jit(do_not_specialize=["height", "width", "rounds"])
def _min_cut_kernel(
    source, sink, capacity, reaches_sink, heights, flows, height, width, rounds, SWEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, nodes, node = tl.program_id(0).to(tl.int64), height * width, tl.arange(0, BLOCK)
    heights, flows, inside = heights + image * BLOCK, flows + image * 8 * BLOCK, node < nodes
    # 64 bits: the sums of 32-bit capacities do not overflow.
    excess = tl.load(source + image * nodes + node, mask=inside, other=0).to(tl.int64)
    to_sink = tl.load(sink + image * nodes + node, mask=inside, other=0).to(tl.int64)
    straight = tl.minimum(excess, to_sink)
    excess, to_sink = excess - straight, to_sink - straight
    # The directions E, S, SE, SW as rows; the ways back are W, N, NW, NE.
    pair = tl.arange(0, 4)[:, None]
    down, right = tl.where(pair > 0, 1, 0), tl.where(pair == 1, 0, tl.where(pair == 3, -1, 1))
    row, column = (node // width)[None, :], (node % width)[None, :]
    ahead = inside[None, :] & (row + down < height) & (column + right >= 0) & (column + right < width)
    behind = inside[None, :] & (row - down >= 0) & (column - right >= 0) & (column - right < width)
    step = down * width + right
    edge = capacity + (image * 8 + 2 * pair) * nodes + node[None, :]
    forth = tl.load(edge, mask=ahead, other=0).to(tl.int64)
    back = tl.load(edge + nodes, mask=behind, other=0).to(tl.int64)
    far = nodes + 1  # farther from the sink than any node that reaches it
    label = _distance(to_sink, forth, back, heights, node, step, ahead, behind, far)
    while tl.max(tl.where((excess > 0) & (label < far), 1, 0)) > 0:
        for _ in range(tl.where(rounds > 0, SWEEPS, 1)):
            pushed = tl.where(label == 1, tl.minimum(excess, to_sink), 0)
            excess, to_sink = excess - pushed, to_sink - pushed
            after, before = _neighbours(label, heights, node, step, ahead, behind)
            downhill, uphill = label[None, :] == after + 1, label[None, :] == before + 1
            place = flows + pair * BLOCK + node[None, :]
            excess, forth, back = _push(excess, forth, back, downhill, place, -step, behind)
            excess, back, forth = _push(excess, back, forth, uphill, place + 4 * BLOCK, step, ahead)
            lowest = _lowest(to_sink, forth, back, after, before, far)
            label = tl.where(excess > 0, tl.maximum(label, lowest), label)
        label = _distance(to_sink, forth, back, heights, node, step, ahead, behind, far)
        rounds -= 1
    tl.store(reaches_sink + image * nodes + node, label < far, mask=inside)


@triton.jit
def _neighbours(label, heights, node, step, ahead, behind):
    """Heights of the neighbours, [4, BLOCK] forth and back; 0 where there is none."""
    tl.debug_barrier()  # all have read the heights before
    tl.store(heights + node, label)
    tl.debug_barrier()
    heights += node[None, :]
    return tl.load(heights + step, mask=ahead, other=0), tl.load(heights - step, mask=behind, other=0)


@triton.jit
def _push(excess, residual, reverse, downhill, place, to_giver, given):
    """Push along four directions; `to_giver` is the step to the node that pushes here, where there is one (`given`)."""
    room = tl.where(downhill, residual, 0)
    left = excess[None, :] - (tl.cumsum(room, 0) - room)  # for this direction, after those before it
    flow = tl.minimum(tl.maximum(left, 0), room)
    tl.store(place, flow)
    tl.debug_barrier()
    arrived = tl.load(place + to_giver, mask=given, other=0)
    return excess + tl.sum(arrived, 0) - tl.sum(flow, 0), residual - flow, reverse + arrived


@triton.jit
def _lowest(to_sink, forth, back, after, before, far):
    """One more than the lowest end of a node's residual edges; `after` and `before` are the heights at their ends."""
    ahead = tl.min(tl.where(forth > 0, after + 1, far), 0)
    behind = tl.min(tl.where(back > 0, before + 1, far), 0)
    return tl.where(to_sink > 0, 1, tl.minimum(tl.minimum(ahead, behind), far))


@triton.jit
def _distance(to_sink, forth, back, heights, node, step, ahead, behind, far):
    """Residual edges on the shortest way to the sink; `far` where there is none."""
    distance, nearer = tl.where(to_sink > 0, 1, far), 1
    while nearer > 0:
        after, before = _neighbours(distance, heights, node, step, ahead, behind)
        lowest = tl.minimum(distance, _lowest(to_sink, forth, back, after, before, far))
        nearer = tl.max(tl.where(lowest < distance, 1, 0))
        distance = lowest
    return distance
