"""The sort and the gather in plain torch, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Scores, follow, random_bits

INFINITY = 0x7F800000  # as bits


def shuffle(scores: Scores, tie_key: Tensor, num_patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `shuffle.shuffle`."""
    patch = torch.arange(num_patches, device=tie_key.device)
    index_bits = 1
    while 1 << index_bits < num_patches:  # torch.compile of torch 2.4 knows no int.bit_length
        index_bits += 1
    # One integer a patch: bits that order as the scores do, then random bits, then the patch itself. So the sorted
    # integers are all that is needed. Scores of 2 and more need one bit more, which their image's random bits give.
    bits = follow(scores).view(torch.int32)
    size = bits & 0x7FFFFFFF
    order = torch.where((bits < 0) & (size <= INFINITY), -size, size).long()  # NaN last, whatever its sign
    wide = (size >> 30).amax(1, keepdim=True).long()
    ties = random_bits(tie_key, patch) >> (31 + index_bits) & ((1 << (33 - index_bits)) - 1)
    ids = _sort(order << (33 - wide) | ties >> wide << index_bits | patch) & ((1 << index_bits) - 1)
    ids_restore = torch.empty_like(ids).scatter_(1, ids, patch.expand_as(ids))
    return ids[:, :keep], ids_restore, (ids_restore >= keep).float()


def take(x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
    """out[b, i] = x[b, ids[b, i]], or 0 where ids is past the end of x; inverse[b, ids[b, i]] = i."""
    if ids.shape[1] <= x.shape[1]:
        return x.reshape(-1, x.shape[2]).index_select(0, _flat(ids, x.shape[1])).view(*ids.shape, x.shape[2])
    out = x.new_zeros(ids.numel(), x.shape[2])
    return out.index_copy_(0, _flat(inverse, ids.shape[1]), x.flatten(0, 1)).view(*ids.shape, x.shape[2])


def _sort(keys: Tensor) -> Tensor:
    """Each row in ascending order."""
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        return keys.sort(1).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1))  # tens of times faster than torch's on a CPU


def _flat(ids: Tensor, size: int) -> Tensor:
    """Indices [B, K] into each of B rows of a size, as indices into all of them one after the other."""
    return (ids + torch.arange(len(ids), device=ids.device)[:, None] * size).flatten()
