"""One sort a mask: scores to the order of the patches, and the visible patches out of it."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

# Not `import torch`: in this package that name is the file beside this one.
from torch import Generator, Tensor, arange, device, equal, float32, randint, tensor, where, zeros_like
from torch.autograd import Function
from torch.compiler import is_compiling

from ...parts import kernels as fused

__all__ = [
    "Blend",
    "GroupDraws",
    "Scores",
    "compute_scores",
    "follow",
    "random_bits",
    "random_key",
    "shuffle",
    "sorts",
    "take",
    "takes",
]

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
"""[B, N] of any real type, or the recipe for them, which a kernel follows where it sorts."""


def random_key(batch_size: int, on: device | str | None, generator: Generator | None) -> Tensor:
    """[B] int64: from which all draws of a kind, for an image, are hashed."""
    return randint(1 << 62, (batch_size,), device=on, generator=generator)


def random_bits(key: Tensor, counter: Tensor) -> Tensor:
    """64 random bits for each pair of a key [B] and a counter [N] or [B, N]: SplitMix64, as in `triton.py`."""
    bits = key[:, None] + counter * 0x9E3779B1  # 32 bits: a compiler may fold it into indices, which must not overflow
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31)


def compute_scores(scores: Scores) -> Tensor:
    """Follow a recipe, or bring scores to [0, 1].

    In each image whose scores leave [0, 1], alone or as an end of a blend, the distinct scores are spread evenly over
    [0, 1], in their order; a single one becomes 0.

    Returns:
        Scores [B, N] float32 in [0, 1].

    Raises:
        ValueError: where scores are NaN (on the CPU; elsewhere they count as the highest) or complex.

    Examples:
        >>> import torch
        >>> compute_scores(Blend(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor(0.25)))
        tensor([[0.2500, 0.2500]])
        >>> compute_scores(torch.tensor([[40, -3, 7]]))
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    return _unit(scores) if isinstance(scores, Tensor) else follow(_prepare(scores))


def follow(scores: Scores) -> Tensor:
    """The scores [B, N] float32 that a recipe stands for; its tensors are float32."""
    if isinstance(scores, Blend):
        return (1 - scores.alpha) * follow(scores.start) + scores.alpha * follow(scores.end)
    if isinstance(scores, GroupDraws):
        # A hash of the group, not a table of draws: a table needs to know the largest label.
        return (random_bits(scores.key, scores.groups.long()) >> 32 & 0xFFFFFF).float() * 2.0**-24
    return scores


def _prepare(scores: Scores) -> Scores:
    """The same order of the patches by float32: ends of a blend in [0, 1], a tensor alone in any range."""
    if isinstance(scores, Blend):
        start, end = (_unit(part) if isinstance(part, Tensor) else part for part in scores[:2])
        return Blend(start, end, scores.alpha)
    if isinstance(scores, Tensor):
        _check(scores)
        return scores.float() if scores.dtype == float32 or scores.element_size() <= 2 else _ranks(scores)
    return scores


def _unit(scores: Tensor) -> Tensor:
    """Scores to float32 in [0, 1]: see `compute_scores`."""
    _check(scores)
    inside = (scores.amin(1, keepdim=True) >= 0) & (scores.amax(1, keepdim=True) <= 1)
    if _is_seen(scores) and bool(inside.all()):
        return scores.float()
    ranks = _ranks(scores)
    return where(inside, scores.float(), ranks / ranks.amax(1, keepdim=True).clamp(min=1))


def _ranks(scores: Tensor) -> Tensor:
    """[B, N] float32: how many distinct scores of the image are lower. NaN counts as the highest."""
    values, patches = scores.nan_to_num(inf, inf, -inf).sort(1)
    steps = (values[:, 1:] != values[:, :-1]).cumsum(1)
    return zeros_like(patches).scatter_(1, patches[:, 1:], steps).float()


def _check(scores: Tensor) -> None:
    if scores.is_complex():
        raise ValueError(f"scores has dtype {scores.dtype}, but must be of a real type")
    if _is_seen(scores) and bool(scores.isnan().any()):
        raise ValueError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: look for what made them, such as a "
            "division by zero or a model that has diverged"
        )


def _is_seen(scores: Tensor) -> bool:
    """Whether values can be looked at without a wait for a device."""
    return scores.device.type == "cpu" and not is_compiling()


def shuffle(scores: Scores, tie_key: Tensor, num_patches: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the patches by their scores, ties at random: by one kernel on a GPU with Triton, else in plain torch.

    Args:
        scores: [B, N] of any real type and range, or a recipe.
        tie_key: [B] int64, see `random_key`.
        num_patches: N.
        keep: number of patches that stay, those with the lowest scores.

    Returns:
        ids_keep [B, N_keep] int64, ids_restore [B, N] int64, mask [B, N] float32.
    """
    if num_patches <= MOST_PATCHES and sorts(tie_key.device):
        from .kernel import shuffle as run
    else:
        from .plain import shuffle as run
    return run(_prepare(scores), tie_key, num_patches, keep)


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


class _Take(Function):
    """out[b, i] = x[b, ids[b, i]], or 0 where ids is past the end of x; inverse[b, ids[b, i]] = i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(ids, inverse)
        if takes(x.device):
            from .kernel import take as run
        else:
            from .plain import take as run
        return run(x, ids, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ids, inverse = ctx.saved_tensors
        return _Take.apply(grad, inverse, ids), None, None


def sorts(on: device) -> bool:
    """Whether the kernel sorts on a device; torch.compile holds an operator that decides it when it runs."""
    return fused.on_gpu(on) if is_compiling() else fused.works("masks", on, _sorts_alike)


def takes(on: device) -> bool:
    """Whether the kernel copies patches on a device: see `sorts`."""
    return fused.on_gpu(on) if is_compiling() else fused.works("visible patches", on, _takes_alike)


def _sorts_alike(on: device) -> bool:
    """Whether the kernel orders a few patches as plain torch does."""
    from .kernel import shuffle as by_kernel
    from .plain import shuffle

    def order(way: Callable[..., tuple[Tensor, ...]], on: device) -> tuple[Tensor, ...]:
        keys, patches = arange(2, device=on), arange(100, device=on).view(2, 50)
        draws, values = GroupDraws(keys, patches // 4), (patches % 7).to(float32) / 8
        return way(Blend(draws, values, tensor(0.25, dtype=float32, device=on)), keys, 50, 20)

    ours, expected = order(by_kernel, on), order(shuffle, device("cpu"))
    return all(equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def _takes_alike(on: device) -> bool:
    """Whether the kernel copies a few patches there and back as plain torch does."""
    from .kernel import take as by_kernel
    from .plain import take

    ids = tensor([[3, 0, 2, 1, 4], [1, 4, 0, 3, 2]], device="cpu")
    some, inverse, x = ids[:, :3], ids.argsort(1), arange(30, dtype=float32, device="cpu").view(2, 5, 3)
    there = by_kernel(x.to(on), some.to(on), inverse.to(on))
    back = by_kernel(there, inverse.to(on), some.to(on))
    expected = take(x, some, inverse)
    return equal(there.cpu(), expected) and equal(back.cpu(), take(expected, inverse, some))
