"""Min cut by push-relabel in one Triton program an image: no host sync, safe in a CUDA graph.

A grid is cut in bands of whole rows, of which one at a time is in registers, with the rows above and below it. A grid
of up to BAND nodes is one band. What nodes tell their neighbours goes through a scratch that fits the first cache.
Directions come in four pairs, forth and back, as rows of [4, nodes], and are pushed along four at a time.
"""

# No annotations of __future__: the interpreter of Triton 3.0, which torch 2.4 brings, looks for constexpr itself.
import torch
import triton
import triton.language as tl
from torch import Tensor

BAND = 1024  # nodes of a band: in 32 bits, all the registers that 16 warps have
ROUNDS = 1024  # of SWEEPS sweeps of each band; a few are enough for images
SWEEPS = tl.constexpr(16)  # between two exact recomputations of the heights
STEPS = tl.constexpr(4)  # of heights, from one look at whether they have settled to the next
NARROW = tl.constexpr(1 << 28)  # sums of up to this are counted in 32 bits: four of them do not overflow
STATE = tl.constexpr(11)  # numbers of a node: excess, what it can give to the sink, height, 4 residuals forth, 4 back


def min_cut(source: Tensor, sink: Tensor, capacity: Tensor, *, rounds: int = ROUNDS, band: int = BAND) -> Tensor:
    """See `grid_min_cut`. Grids of more than `band` nodes are cut in bands, whose rows have at most `band` / 4.

    The kernel pushes for at most `rounds` rounds of sweeps. If excess is left that can reach the sink, it goes on with
    exact heights before every sweep. Then in each sweep all such excess moves one step nearer to the sink, or a node's
    edges towards it are full and its distance grows for good: with n nodes, that ends within n ** 3 sweeps. So the cut
    is exact whatever the bound.
    """
    batch_size, height, width = source.shape
    nodes = height * width
    if nodes > band and width > height:  # rows of a band are to be short
        across = torch.stack([capacity[:, direction].mT for direction in (2, 3, 0, 1, 4, 5, 7, 6)], 1)
        return min_cut(source.mT, sink.mT, across, rounds=rounds, band=band).mT
    block = max(triton.next_power_of_2(min(nodes, band)), 32)
    rows = height if nodes <= block else block // width - 2
    reaches_sink = torch.empty(source.shape, dtype=torch.bool, device=source.device)
    scratch = source.new_empty(batch_size, STATE.value * nodes + 10 * block, dtype=torch.int64)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        for narrow in (True, False):  # each takes the images that are its own, so that the host need not know
            _min_cut_kernel[(batch_size,)](
                source.contiguous(), sink.contiguous(), capacity.contiguous(), reaches_sink,
                scratch.view(torch.int32) if narrow else scratch, height, width, rows, rounds,
                IS_NARROW=narrow, BLOCK=block, num_warps=min(max(1, block // 32), 16), enable_fp_fusion=False,
            )  # fmt: skip
    return reaches_sink


# Specialised, a number of rounds of 1 is a constant that cannot be counted down, and sides that 16 divides take more
# registers and 32 KB of shared memory.
@triton.jit(do_not_specialize=["height", "width", "rows", "rounds"])
def _min_cut_kernel(
    source, sink, capacity, reaches_sink, scratch, height, width, rows, rounds, IS_NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, nodes, lane = tl.program_id(0).to(tl.int64), height * width, tl.arange(0, BLOCK)
    source, sink, reaches_sink = source + image * nodes, sink + image * nodes, reaches_sink + image * nodes
    capacity += image * 8 * nodes
    state = scratch + image * (STATE * nodes + 10 * BLOCK)
    heights, flows = state + STATE * nodes, state + STATE * nodes + 2 * BLOCK
    supply, demand = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for first in range(0, nodes, BLOCK):
        node = first + lane
        excess, to_sink = _terminals(source, sink, node, node < nodes)
        supply, demand = supply + excess, demand + to_sink
    if (tl.maximum(tl.sum(supply), tl.sum(demand)) <= NARROW) != IS_NARROW:
        return
    bands, far = tl.cdiv(height, rows), nodes + 1  # farther from the sink than any node that reaches it
    for band in range(bands):
        node, _inside, own, pair, _step, ahead, behind = _band(band, rows, height, width, BLOCK)
        ahead, behind = ahead & own[None, :], behind & own[None, :]
        excess, to_sink = _terminals(source, sink, node, own)
        edge = capacity + 2 * pair * nodes + node[None, :]
        forth, back = tl.load(edge, mask=ahead, other=0), tl.load(edge + nodes, mask=behind, other=0)
        if IS_NARROW:  # no cut goes through an edge that is wider than all that can flow
            forth, back = tl.minimum(forth, NARROW + 1), tl.minimum(back, NARROW + 1)
        tl.store(state + node, excess, mask=own)
        tl.store(state + nodes + node, to_sink, mask=own)
        edge = state + (3 + pair) * nodes + node[None, :]
        tl.store(edge, forth, mask=ahead)
        tl.store(edge + 4 * nodes, back, mask=behind)
    active = 1
    while active > 0:
        _exact_heights(state, heights, rows, height, width, far, BLOCK)
        active = 0
        for band in range(bands):
            sweeps = tl.where(rounds > 0, SWEEPS, 1)
            active += _sweep(state, heights, flows, band, sweeps, rows, height, width, far, BLOCK)
        rounds -= 1
    for first in range(0, nodes, BLOCK):
        node = first + lane
        label = tl.load(state + 2 * nodes + node, mask=node < nodes, other=0)
        tl.store(reaches_sink + node, label < far, mask=node < nodes)


@triton.jit
def _terminals(source, sink, node, inside):
    """Excess and capacity to the sink, without what goes straight from the source to the sink."""
    drawn = tl.load(source + node, mask=inside, other=0).to(tl.int64) - tl.load(sink + node, mask=inside, other=0)
    return tl.maximum(drawn, 0), tl.maximum(-drawn, 0)


@triton.jit
def _band(band, rows, height, width, BLOCK: tl.constexpr):
    """Of the rows of a band and one more on either side: nodes, which are in the grid, which are the band's own.

    And the pairs of directions, E, S, SE and SW as rows, whose ways back are W, N, NW and NE: their steps in memory,
    and which nodes have a neighbour that way, and which one on the way back.
    """
    lane = tl.arange(0, BLOCK)
    top, end = tl.maximum(band * rows - 1, 0), tl.minimum((band + 1) * rows + 1, height)
    row, column = top + lane // width, lane % width
    inside, own = row < end, (row >= band * rows) & (row < (band + 1) * rows)
    pair = tl.arange(0, 4)[:, None]
    down, right = tl.where(pair > 0, 1, 0), tl.where(pair == 1, 0, tl.where(pair == 3, -1, 1))
    after, before = column[None, :] + right, column[None, :] - right
    ahead = (row[None, :] + down < end) & (after >= 0) & (after < width)
    behind = inside[None, :] & (row[None, :] - down >= top) & (before >= 0) & (before < width)
    return top * width + lane, inside, own & inside, pair, down * width + right, ahead, behind


@triton.jit
def _exact_heights(state, heights, rows, height, width, far, BLOCK: tl.constexpr):
    """Residual edges on the shortest way of each node to the sink; `far` where there is none."""
    nodes = height * width
    tl.debug_barrier()  # all have stored their state
    for first in range(0, nodes, BLOCK):
        node = first + tl.arange(0, BLOCK)
        to_sink = tl.load(state + nodes + node, mask=node < nodes, other=0)
        tl.store(state + 2 * nodes + node, tl.where(to_sink > 0, 1, far), mask=node < nodes)
    bands, lowered, upwards = tl.cdiv(height, rows), 1, 0
    while lowered > 0:
        lowered = 0
        for index in range(bands):
            band = tl.where(upwards > 0, bands - 1 - index, index)
            node, inside, _own, pair, step, ahead, behind = _band(band, rows, height, width, BLOCK)
            tl.debug_barrier()  # all have stored their heights
            edge = state + (3 + pair) * nodes + node[None, :]
            forth, back = tl.load(edge, mask=ahead, other=0), tl.load(edge + 4 * nodes, mask=behind, other=0)
            distance = tl.load(state + 2 * nodes + node, mask=inside, other=0).to(tl.int32)
            nearer, turn = 1, 0
            while nearer > 0:
                before = distance
                for _ in range(STEPS):
                    above, below = _neighbours(distance, heights + turn, step, ahead, behind, BLOCK)
                    distance = tl.minimum(distance, _lowest(forth, back, above, below, far))
                    turn = BLOCK - turn
                nearer = tl.max(tl.where(distance < before, 1, 0))
                lowered += nearer
            tl.store(state + 2 * nodes + node, distance, mask=inside)
        lowered, upwards = tl.where(bands > 1, lowered, 0), 1 - upwards


@triton.jit
def _sweep(state, heights, flows, band, sweeps, rows, height, width, far, BLOCK: tl.constexpr):
    """Sweeps over one band, while the heights of the rows around it stand still; whether it has excess to push."""
    node, inside, own, pair, step, ahead, behind = _band(band, rows, height, width, BLOCK)
    nodes, edge = height * width, state + (3 + pair) * height * width + node[None, :]
    tl.debug_barrier()  # all have stored the state of the band before
    excess = tl.load(state + node, mask=inside, other=0)
    label = tl.load(state + 2 * nodes + node, mask=inside, other=0).to(tl.int32)
    active = tl.max(tl.where((excess > 0) & (label < far), 1, 0))
    if active > 0:
        to_sink = tl.load(state + nodes + node, mask=inside, other=0)
        forth, back = tl.load(edge, mask=ahead, other=0), tl.load(edge + 4 * nodes, mask=behind, other=0)
        place, turn = flows + pair * BLOCK + tl.arange(0, BLOCK)[None, :], 0
        for _ in range(sweeps):
            pushed = tl.where(label == 1, tl.minimum(excess, to_sink), 0)
            excess, to_sink = excess - pushed, to_sink - pushed
            above, below = _neighbours(label, heights + turn, step, ahead, behind, BLOCK)
            turn = BLOCK - turn
            downhill, uphill = label[None, :] == above + 1, label[None, :] == below + 1
            excess, forth, back = _push(excess, forth, back, downhill, place, -step, behind)
            excess, back, forth = _push(excess, back, forth, uphill, place + 4 * BLOCK, step, ahead)
            lowest = tl.where(to_sink > 0, 1, _lowest(forth, back, above, below, far))
            label = tl.where(own & (excess > 0), tl.maximum(label, lowest), label)
        tl.store(state + node, excess, mask=inside)
        tl.store(state + nodes + node, to_sink, mask=inside)
        tl.store(state + 2 * nodes + node, label, mask=inside)
        tl.store(edge, forth, mask=ahead)
        tl.store(edge + 4 * nodes, back, mask=behind)
    return active


@triton.jit
def _neighbours(label, heights, step, ahead, behind, BLOCK: tl.constexpr):
    """Heights of the neighbours, [4, BLOCK] forth and back; 0 where there is none.

    The scratch is another than in the call before, which others may still read.
    """
    heights += tl.arange(0, BLOCK)
    tl.store(heights, label)
    tl.debug_barrier()
    after, before = heights[None, :] + step, heights[None, :] - step
    return tl.load(after, mask=ahead, other=0).to(tl.int32), tl.load(before, mask=behind, other=0).to(tl.int32)


@triton.jit
def _push(excess, residual, reverse, downhill, place, to_giver, given):
    """Push along four directions; `to_giver` is the step to the node that pushes here, where there is one (`given`)."""
    room = tl.where(downhill, tl.minimum(residual, excess[None, :]), 0)
    left = excess[None, :] - (tl.cumsum(room, 0) - room)  # for this direction, after those before it
    flow = tl.minimum(tl.maximum(left, 0), room)
    tl.store(place, flow)
    tl.debug_barrier()
    arrived = tl.load(place + to_giver, mask=given, other=0)
    return excess + tl.sum(arrived, 0) - tl.sum(flow, 0), residual - flow, reverse + arrived


@triton.jit
def _lowest(forth, back, after, before, far):
    """One more than the lowest end of a node's residual edges; `after` and `before` are the heights at their ends."""
    ahead = tl.min(tl.where(forth > 0, after + 1, far), 0)
    behind = tl.min(tl.where(back > 0, before + 1, far), 0)
    return tl.minimum(tl.minimum(ahead, behind), far)
