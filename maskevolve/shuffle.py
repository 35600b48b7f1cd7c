"""One sort a mask: scores to the order of the patches, and the visible patches out of it.

Plain torch here; the same in one Triton kernel, to the bit, in `kernels.py`, which is used on CUDA.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blend", "GroupDraws", "Scores", "compute_scores", "random_key", "shuffle", "take"]


HAS_TRITON = find_spec("triton") is not None
MOST_PATCHES = 4096  # that one program sorts


class GroupDraws(NamedTuple):
    """A recipe for scores: one uniform draw for each group of patches. Patches of a group have the same score."""

    key: Tensor
    """[B] int64: random, of each image."""
    groups: Tensor
    """[1 or B, N] of any integer type: the group of each patch."""


class Blend(NamedTuple):
    """A recipe for scores: ``(1 - alpha) * start + alpha * end``, the aggregation of Algorithm 1."""

    start: Tensor | GroupDraws
    end: Tensor | GroupDraws
    alpha: Tensor
    """0-d float32 in [0, 1]."""


Scores = Tensor | GroupDraws | Blend
"""[B, N] float32 in [0, 1], or the recipe for them, which a kernel follows where it sorts."""


def random_key(batch_size: int, device: torch.device | str | None, generator: torch.Generator | None) -> Tensor:
    """[B] int64: from which all draws of a kind, for an image, are hashed."""
    return torch.randint(1 << 62, (batch_size,), device=device, generator=generator)


def compute_scores(scores: Scores) -> Tensor:
    """Follow a recipe.

    Returns:
        Scores [B, N] float32 in [0, 1].

    Example:
        >>> compute_scores(Blend(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.25)))
        tensor([[0.2500, 0.2500]])
    """
    if isinstance(scores, Blend):
        return (1 - scores.alpha) * compute_scores(scores.start) + scores.alpha * compute_scores(scores.end)
    if isinstance(scores, GroupDraws):
        # A hash of the group, not a table of draws: a table needs to know the largest label.
        return (_hash(scores.key, scores.groups.long()) >> 32 & 0xFFFFFF).float() / (1 << 24)
    return scores


def shuffle(scores: Scores, tie_key: Tensor, num_patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the patches by their scores, ties at random.

    Args:
        scores: [B, N] or a recipe.
        tie_key: [B] int64, see `random_key`.
        num_patches: N.
        keep: number of patches that stay, those with the lowest scores.

    Returns:
        ids_keep [B, N_keep] int64, ids_restore [B, N] int64, mask [B, N] float32.
    """
    if _fused(tie_key) and num_patches <= MOST_PATCHES:
        from . import kernels

        return kernels.shuffle(*_operands(scores), tie_key, num_patches, keep)
    patch = torch.arange(num_patches, device=tie_key.device)
    index_bits = 1
    while 1 << index_bits < num_patches:  # torch.compile of torch 2.4 knows no int.bit_length
        index_bits += 1
    # One integer a patch: the bits of floats in [0, 1], which order as the floats do, then random bits, then the patch
    # itself. So the sorted integers are all that is needed.
    bits = compute_scores(scores).clamp(0, 1).view(torch.int32).long()
    ties = _hash(tie_key, patch) >> (31 + index_bits) & ((1 << (33 - index_bits)) - 1)
    ids = _sort(bits << 33 | ties << index_bits | patch) & ((1 << index_bits) - 1)
    ids_restore = torch.empty_like(ids).scatter_(1, ids, patch.expand_as(ids))
    return ids[:, :keep], ids_restore, (ids_restore >= keep).float()


def _fused(tensor: Tensor) -> bool:
    return HAS_TRITON and tensor.device.type == "cuda"


def _sort(keys: Tensor) -> Tensor:
    """Each row in ascending order."""
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        return keys.sort(1).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1))  # tens of times faster than torch's on a CPU


def _hash(key: Tensor, counter: Tensor) -> Tensor:
    """64 random bits for each pair of a key [B] and a counter [N] or [B, N]: SplitMix64, as in `kernels.py`."""
    bits = key[:, None] + counter * 0x9E3779B1  # 32 bits: a compiler may fold it into indices, which must not overflow
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31)


def _operands(scores: Scores) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A recipe as the kernel takes it: start, its key, end, its key, alpha."""
    if not isinstance(scores, Blend):
        return *_values_and_key(scores), None, None, None
    return *_values_and_key(scores.start), *_values_and_key(scores.end), scores.alpha


def _values_and_key(scores: Tensor | GroupDraws) -> tuple[Tensor, Tensor | None]:
    return (scores.groups, scores.key) if isinstance(scores, GroupDraws) else (scores, None)


def take(x: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
    """The patches that stay, [B, N_keep, D].

    Every patch is taken at most once, so the gradient is a copy, too: no atomics, and the same bits every time.

    Args:
        x: [B, N, D].
        ids_keep: [B, N_keep] int64.
        ids_restore: [B, N] int64, its inverse: the place of each patch, N_keep or more for those that are left.
    """
    visible: Tensor = _Take.apply(x, ids_keep, ids_restore)
    return visible


class _Take(torch.autograd.Function):
    """out[b, i] = x[b, ids[b, i]], or 0 where ids is past the end of x; inverse[b, ids[b, i]] = i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(ids, inverse)
        if _fused(x):
            from . import kernels

            return kernels.take(x, ids)
        if ids.shape[1] <= x.shape[1]:
            return x.reshape(-1, x.shape[2]).index_select(0, _flat(ids, x.shape[1])).view(*ids.shape, x.shape[2])
        out = x.new_zeros(ids.numel(), x.shape[2])
        return out.index_copy_(0, _flat(inverse, ids.shape[1]), x.flatten(0, 1)).view(*ids.shape, x.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ids, inverse = ctx.saved_tensors
        return _Take.apply(grad, inverse, ids), None, None


def _flat(ids: Tensor, size: int) -> Tensor:
    """Indices [B, K] into each of B rows of a size, as indices into all of them one after the other."""
    return (ids + torch.arange(len(ids), device=ids.device)[:, None] * size).flatten()
