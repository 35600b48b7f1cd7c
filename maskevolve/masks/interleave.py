"""One order of removal that is made of two."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def interleaved(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Of the M patches that it removes first, whatever M is, `share` are those that `first` removes, rounded down.

    The others are those of the rest that `second` removes first.

    Args:
        first: [B, N] int64, the place 0..N-1 of each patch in the one order; 0 is removed first.
        second: [B, N] int64, in the other order.
        share: in [0, 1], to nine decimals.

    Returns:
        [B, N] int64, the place of each patch in the order that is made of both.

    Examples:
        >>> first, second = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 3, 2, 0]])
        >>> interleaved(first, second, 0.5)
        tensor([[1, 3, 2, 0]])
    """
    removed = torch.arange(1, first.shape[1] + 1, device=first.device)
    of_first = removed * round(share * 1e9) // 10**9
    of_second = removed - of_first
    along_first = torch.empty_like(second).scatter_(1, first, second)
    last = torch.where(of_second > 0, _smallest(along_first, of_first, of_second - 1), -1)  # that `second` removes
    # For each patch, the least M with which one of the two orders removes it, less 1.
    by_first = torch.searchsorted(of_first, first, right=True)
    return torch.minimum(by_first, torch.searchsorted(last, second))


def _smallest(values: Tensor, start: Tensor, rank: Tensor) -> Tensor:
    """The values of a certain rank (0 is the least) among those from a certain place on, by a wavelet matrix.

    Args:
        values: [B, N] int64, 0..N-1 in any order.
        start: [N] int64, the places.
        rank: [N] int64, the ranks.

    Returns:
        [B, N] int64, for each pair of a place and a rank.
    """
    size, bits = values.shape[1], 0
    while 1 << bits < size:  # torch.compile of torch 2.4 knows no int.bit_length
        bits += 1
    begin, rank, found = start.expand_as(values), rank.expand_as(values), torch.zeros_like(values)
    end, place = torch.full_like(values, size), torch.arange(size, device=values.device)
    for bit in reversed(range(bits)):  # the values without the bit go to the left, the others to the right
        ones = values >> bit & 1
        before = pad((1 - ones).cumsum(1), (1, 0))
        low, high, left = before.gather(1, begin), before.gather(1, end), before[:, -1:]
        right = rank >= high - low
        begin, end = torch.where(right, left + begin - low, low), torch.where(right, left + end - high, high)
        rank, found = torch.where(right, rank - (high - low), rank), found << 1 | right
        to = torch.where(ones > 0, left + place - before[:, :-1], before[:, :-1])
        values = torch.empty_like(values).scatter_(1, to, values)
    return found
