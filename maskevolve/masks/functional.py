"""Masking as pure functions of tensors: a score for each patch, one sort, one gather. The highest are removed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from ..checks import check_tensor
from ..grid import Grid, times
from .interleave import interleaved
from .mask_ratio import num_visible


class MaskedPatches(NamedTuple):
    """What a mask returns: MAE's three values, in MAE's order (https://arxiv.org/abs/2111.06377)."""

    visible: Tensor
    """[B, N_keep, D], dtype of the input: the patches that stay."""
    mask: Tensor
    """[B, N] float32: 0 keep, 1 remove."""
    ids_restore: Tensor
    """[B, N] int64: the inverse of the shuffle; ``ids_restore < N_keep`` are the patches that stay."""


def random_scores(batch_size: int, grid_size: Grid, **source: Any) -> Tensor:
    """One uniform draw for each patch: MAE's random masking.

    Args:
        batch_size: number of images B.
        grid_size: patches along each axis, such as (H, W).
        source: the `device` and the `generator` to draw with, as for `torch.rand`.

    Returns:
        Scores [B, N] float32 in [0, 1).

    Examples:
        >>> random_scores(2, (14, 14)).shape
        torch.Size([2, 196])
    """
    return torch.rand(batch_size, math.prod(grid_size), dtype=torch.float32, **source)


def grid_scores(batch_size: int, grid_size: Grid, *, period: int | Sequence[int] = 2, **source: Any) -> Tensor:
    """One uniform draw for each cell of a pattern that is tiled over the patch grid: p_grid of GridMask.

    The sides of the pattern are `period` patches. Each image has draws of its own. On one axis, cells are split into
    such patterns again and again, so that what is left of a cell that is cut lies evenly, too. Else, see
    `random_scores`.

    Examples:
        >>> grid_scores(1, (4, 4)).unique().numel()
        4
    """
    key = torch.randint(1 << 62, (batch_size,), **source)
    periods = _periods(period, grid_size)
    if len(grid_size) == 1:
        return _evenly_spread(key, grid_size[0], periods[0])
    cell = torch.zeros((), dtype=torch.long, device=key.device)
    for size, side in zip(grid_size, periods, strict=True):
        cell = cell[..., None] * side + torch.arange(size, device=key.device) % side
    return _uniform(key, cell.view(1, -1))


def _periods(period: int | Sequence[int], grid_size: Grid) -> Sequence[int]:
    """The sides of a pattern, one an axis."""
    if isinstance(period, Sequence):
        return _check_sides("period", period, period, grid_size)
    if len(grid_size) == 2:  # of pictures, one number has always been allowed to be longer than a side
        return period, period
    return _check_sides("period", period, [1 if size == 1 else period for size in grid_size], grid_size)


def _check_sides(name: str, value: Any, sides: Sequence[int], grid_size: Grid) -> Sequence[int]:
    """The sides; a ValueError where there is not one for each axis, or one is longer than its axis."""
    if len(sides) != len(grid_size) or any(side > size for side, size in zip(sides, grid_size, strict=True)):
        must = "have one for each axis, none longer than the axis"
        raise ValueError(f"{name}={value!r} does not fit a grid of {times(grid_size)} patches: it must {must}")
    return sides


def _evenly_spread(key: Tensor, size: int, period: int) -> Tensor:
    """[B, size] float32 in [0, 1): the digits of each place to the base `period`, the last one first, each shuffled."""
    place, weight = torch.arange(size, device=key.device), 1.0
    scores = torch.zeros((), dtype=torch.float32, device=key.device)
    for level in range(max(1, math.ceil(math.log(size, period))) if period > 1 else 1):
        digits = torch.arange(period, device=key.device)[None] + level * period
        rank = _uniform(key, digits).argsort(1).argsort(1).float()
        weight /= period
        scores = scores + rank[:, place // period**level % period] * weight
    return scores


def block_scores(
    batch_size: int,
    grid_size: Grid,
    *,
    num_blocks: int = 16,
    area: tuple[float, float] = (16 / 196, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    size: Sequence[tuple[int, int]] | None = None,
    **source: Any,
) -> Tensor:
    """Random blocks laid one over the other; the earlier a block is laid, the higher its score.

    Its score is the share of the image that the ones before it are expected to leave uncovered: scores spread over
    (0, 1] as those of a grid or of parts do. The arguments are those of `random_scores` and of `BlockMask`.

    Examples:
        >>> block_scores(2, (14, 14)).shape
        torch.Size([2, 196])
    """
    axes = len(grid_size)
    draws = torch.rand(2 * axes, batch_size, num_blocks, dtype=torch.float32, **source)
    sides = _sides_between(draws, grid_size, size) if size else _sides_of_areas(draws, grid_size, area, aspect)
    inside, volume = torch.ones((), dtype=torch.bool, device=draws.device), torch.ones_like(sides[0])
    for axis, (side, cells) in enumerate(zip(sides, grid_size, strict=True)):
        first = (draws[axes + axis] * (cells - side + 1)).floor()[..., None]
        place = torch.arange(cells, device=draws.device)
        along = (place >= first) & (place < first + side[..., None])
        inside = inside[..., None] & along.view(*along.shape[:2], *[1] * axis, cells)
        volume = volume * side
    uncovered = (1 - volume / math.prod(grid_size)).cumprod(1)
    score = torch.cat([torch.ones_like(uncovered[:, :1]), uncovered[:, :-1]], 1)
    covered = (inside.flatten(2) * score[..., None]).amax(1)
    return torch.maximum(covered, uncovered[:, -1:])  # what no block covers comes last


def _sides_of_areas(draws: Tensor, grid_size: Grid, area: Any, aspect: Any) -> list[Tensor]:
    """The sides of blocks that are a share of the grid; of the last two axes, those of rectangles of an aspect."""
    share = area[0] + (area[1] - area[0]) * draws[0]
    if len(grid_size) == 1:
        return [(share * grid_size[0]).round().clamp(1, grid_size[0])]
    *long, height, width = grid_size
    first = [(share ** (1 / 3) * cells).round().clamp(1, cells) for cells in long]
    patches = (share ** (2 / 3) if long else share) * height * width
    log_aspect = math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[1]
    rows = (patches * log_aspect.exp()).sqrt().round().clamp(1, height)
    return [*first, rows, (patches / log_aspect.exp()).sqrt().round().clamp(1, width)]


def _sides_between(draws: Tensor, grid_size: Grid, size: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The sides of blocks, each between its least and greatest, whole numbers alike."""
    _check_sides("size", size, [most for _, most in size], grid_size)
    return [least + (draw * (most - least + 1)).floor() for draw, (least, most) in zip(draws, size, strict=False)]


def part_scores(
    parts: Tensor, *, share: float = 1.0, hint: float = 0.0, device: Any = None, generator: Generator | None = None
) -> Tensor:
    """One uniform draw for each part, which its patches take: p_parts of PartMask.

    With a share or a hint, scores are those of patches. A hint orders the patches that it keeps after all others. With
    a share, the highest M scores are those of floor(share * M) patches by parts and of the rest at random, for each M.

    Args:
        parts: [B, N] of any integer type, >= 0: the part of each patch. Labels may be large and have gaps.
        share: of the removed patches that are chosen by parts, as of PartMask.
        hint: chance of a patch of a hidden part to stay, as of PartMask.
        device: where to draw; that of `parts` where None.
        generator: source of randomness, on the same device; torch's default one where None.

    Returns:
        Scores [B, N] float32 in [0, 1].

    Raises:
        ValueError: where `parts` is not [B, N], has a float type or, which only the CPU checks, has negative labels.

    Examples:
        >>> p = part_scores(torch.tensor([[0, 0, 901, 901]]))
        >>> bool(p[0, 0] == p[0, 1]), bool(p[0, 2] == p[0, 3])
        (True, True)
    """
    labels = check_parts(parts).to(device)
    key = torch.randint(1 << 62, labels.shape[:1], device=labels.device, generator=generator)
    scores = _uniform(key, labels)  # a hash of the label, not a table of draws, which needs to know the largest label
    if share == 1 and hint == 0:
        return scores
    draws = torch.rand(labels.shape, dtype=torch.float32, device=labels.device, generator=generator)
    scores = torch.where(draws < hint, draws, hint + (1 - hint) * scores)  # the draws have the same patches last
    if share == 1:
        return scores
    last = labels.shape[1] - 1
    by_parts, at_random = (last - shuffle(each, generator)[1] for each in (scores, draws))
    return 1 - interleaved(by_parts, at_random, share).float() / labels.shape[1]


def check_parts(parts: Any, shape: tuple[int, ...] | None = None, owner: str = "part_scores") -> Tensor:
    """Labels as int64; an error where they are missing, no labels of patches, or not those of `shape`, (B, *grid)."""
    if parts is None:
        how = "parts=teacher(images) with a PartTeacher, parts=GraphCutPartitioner()(affinity)"
        raise ValueError(f"{owner} needs parts, but got None: pass {how}, or any segmentation as integers [B, N]")
    check_tensor("parts", parts)
    if parts.is_floating_point() or parts.is_complex():
        raise ValueError(f"parts has dtype {parts.dtype}: part labels are integers, use parts.long()")
    if parts.ndim != 2 or (shape and parts.shape != (shape[0], math.prod(shape[1:]))):
        wanted = f" = {[shape[0], math.prod(shape[1:])]} for a grid of {times(shape[1:])}" if shape else ""
        maps = "; maps of pixels become such labels by parts_from_segmentation(maps, grid_size)" * (parts.ndim > 2)
        must = f"[B, N]{wanted}, one label for each patch{maps}"
        raise ValueError(f"parts has shape {list(parts.shape)}, but must be {must}")
    labels: Tensor = parts.long()
    if _can_look_at(labels) and labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"parts has the label {labels.min()}, but labels must not be negative: give it another")
    return labels


def check_scores(scores: Any, shape: tuple[int, int]) -> None:
    """Raise an error where scores are no tensor, complex, not of `shape`, (B, N), or (on the CPU) NaN."""
    check_tensor("scores", scores)
    if scores.shape != shape or scores.is_complex():
        wanted = f"[B, N] = {list(shape)}, a real score for each patch, row by row"
        one = "; fixed masks call draw for one image at a time" if shape[0] == 1 else ""
        raise ValueError(f"scores has shape {list(scores.shape)}, {scores.dtype}, but must be {wanted}{one}")
    if _can_look_at(scores) and bool(scores.isnan().any()):
        cause = "such as a division by zero or a model that has diverged"
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: look for the cause, {cause}")


def to_unit_range(scores: Tensor) -> Tensor:
    """Scores [B, N] of any real dtype and range, as float32 in [0, 1], in their order.

    In each image whose scores leave [0, 1], the distinct ones are spread evenly over [0, 1]; a single one becomes 0.
    NaN counts as the highest.

    Examples:
        >>> to_unit_range(torch.tensor([[40, -3, 7]]))
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    inside = (scores.amin(1, keepdim=True) >= 0) & (scores.amax(1, keepdim=True) <= 1)
    if _can_look_at(scores) and bool(inside.all()):
        return scores.float()
    ranks = _ranks(scores)
    return torch.where(inside, scores.float(), ranks / ranks.amax(1, keepdim=True).clamp(min=1))


def _ranks(scores: Tensor) -> Tensor:
    """[B, N] float32: how many distinct scores of the image are lower. NaN counts as the highest."""
    values, patches = scores.nan_to_num(math.inf, math.inf, -math.inf).sort(1)
    steps = (values[:, 1:] != values[:, :-1]).cumsum(1)
    return torch.zeros_like(patches).scatter_(1, patches[:, 1:], steps).float()


def _can_look_at(values: Tensor) -> bool:
    """Whether values can be looked at without a wait for a device."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def mask_patches(
    x: Tensor, scores: Tensor, mask_ratio: float = 0.75, *, keep: int | None = None, generator: Generator | None = None
) -> MaskedPatches:
    """Remove the patches with the highest scores, the same number from every image, as MaskedPatches.

    Args:
        x: [B, N, D] of any dtype; gradients flow to it.
        scores: [B, N] of any real dtype and any range. Ties are broken at random, each patch alike. NaN is an error on
            the CPU; elsewhere the check would make the host wait, and NaN is removed first.
        mask_ratio: share of patches to remove, see `num_visible`.
        keep: in place of mask_ratio, the number of patches that stay, see `num_visible`.
        generator: source of randomness for the ties, on the device of `x`; torch's default one where None.

    Raises:
        ValueError: as `num_visible`, and where `scores` does not match `x` or is NaN.

    Examples:
        >>> x = torch.arange(4.0).reshape(1, 4, 1)
        >>> mask_patches(x, torch.tensor([[0.9, 0.1, 0.8, 0.2]]), 0.5).visible.flatten()
        tensor([1., 3.])
    """
    batch_size, num_patches, width = x.shape
    check_scores(scores, (batch_size, num_patches))
    keep = num_visible(num_patches, mask_ratio, keep)
    ids, ids_restore = shuffle(scores, generator)
    # Rows of one long table: on a CPU many times faster than a gather along the second dimension.
    rows = ids[:, :keep] + torch.arange(batch_size, device=x.device)[:, None] * num_patches
    visible = x.flatten(0, 1).index_select(0, rows.flatten()).view(batch_size, keep, width)
    return MaskedPatches(visible, (ids_restore >= keep).float(), ids_restore)


def shuffle(scores: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """The patches in ascending order of their scores, ties at random, and the place of each patch: [B, N] int64."""
    batch_size, num_patches = scores.shape
    ids = _order(scores, torch.randint(1 << 62, (batch_size,), device=scores.device, generator=generator))
    place = torch.arange(num_patches, device=scores.device).expand_as(ids)
    return ids, torch.empty_like(ids).scatter_(1, ids, place)


def _order(scores: Tensor, tie_key: Tensor) -> Tensor:
    """[B, N] int64: the patches in ascending order of their scores, ties at random, NaN last."""
    num_patches, index_bits = scores.shape[1], 1
    while 1 << index_bits < num_patches:  # torch.compile of torch 2.4 knows no int.bit_length
        index_bits += 1
    exact = scores.dtype == torch.float32 or scores.element_size() <= 2
    bits = (scores.float() if exact else _ranks(scores)).view(torch.int32)
    # One integer for each patch: bits that order as the scores do, then random bits, then the patch itself. The sorted
    # integers are all that is needed. Where an image has scores of 2 and more, these take one of its random bits.
    size = bits & 0x7FFFFFFF
    order = torch.where((bits < 0) & (size <= 0x7F800000), -size, size).long()  # up to infinity: the rest is NaN
    wide = (size >> 30).amax(1, keepdim=True).long()
    patch = torch.arange(num_patches, device=scores.device)
    ties = _random_bits(tie_key, patch) >> (31 + index_bits) & ((1 << (33 - index_bits)) - 1)
    keys = order << (33 - wide) | ties >> wide << index_bits | patch
    # On a CPU, NumPy sorts tens of times faster than torch.
    ordered = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if _can_look_at(keys) else keys.sort(1).values
    return ordered & ((1 << index_bits) - 1)


def _random_bits(key: Tensor, counter: Tensor) -> Tensor:
    """64 random bits for each pair of a random key [B] int64 and a counter [N], [1, N] or [B, N]: SplitMix64."""
    bits = key[:, None] + counter * 0x9E3779B1  # 32 bits: a compiler may fold it into indices, which must not overflow
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31)


def _uniform(key: Tensor, groups: Tensor) -> Tensor:
    """[B, N] float32 in [0, 1): one draw for each pair of a key [B] and a group [1 or B, N]."""
    return (_random_bits(key, groups) >> 32 & 0xFFFFFF).float() * 2.0**-24
