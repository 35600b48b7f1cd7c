"""Masking as pure functions of tensors: a score for each patch, one sort, one gather. The highest are removed."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from ..checks import check_tensor
from .mask_ratio import num_visible


class MaskedPatches(NamedTuple):
    """What a mask returns: MAE's three values, in MAE's order (https://arxiv.org/abs/2111.06377)."""

    visible: Tensor
    """[B, N_keep, D], dtype of the input: the patches that stay."""
    mask: Tensor
    """[B, N] float32: 0 keep, 1 remove."""
    ids_restore: Tensor
    """[B, N] int64: the inverse of the shuffle; ``ids_restore < N_keep`` are the patches that stay."""


def random_scores(batch_size: int, grid_size: tuple[int, int], **source: Any) -> Tensor:
    """One uniform draw for each patch: MAE's random masking.

    Args:
        batch_size: number of images B.
        grid_size: (H, W) in patches.
        source: the `device` and the `generator` to draw with, as for `torch.rand`.

    Returns:
        Scores [B, N] float32 in [0, 1).

    Examples:
        >>> random_scores(2, (14, 14)).shape
        torch.Size([2, 196])
    """
    return torch.rand(batch_size, grid_size[0] * grid_size[1], dtype=torch.float32, **source)


def grid_scores(batch_size: int, grid_size: tuple[int, int], *, period: int = 2, **source: Any) -> Tensor:
    """One uniform draw for each cell of a pattern that is tiled over the patch grid: p_grid of GridMask.

    The side of the pattern is `period` patches. Each image has draws of its own. Else, see `random_scores`.

    Examples:
        >>> grid_scores(1, (4, 4)).unique().numel()
        4
    """
    key = torch.randint(1 << 62, (batch_size,), **source)
    row, column = (torch.arange(size, device=key.device) % period for size in grid_size)
    return _uniform(key, (row[:, None] * period + column).view(1, -1))


def block_scores(
    batch_size: int,
    grid_size: tuple[int, int],
    *,
    num_blocks: int = 16,
    area: tuple[float, float] = (16 / 196, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    **source: Any,
) -> Tensor:
    """Random rectangles laid one over the other; the earlier a rectangle is laid, the higher its score.

    Its score is the share of the image that the ones before it are expected to leave uncovered: scores spread over
    (0, 1] as those of a grid or of parts do. The arguments are those of `random_scores` and of `BlockMask`.

    Examples:
        >>> block_scores(2, (14, 14)).shape
        torch.Size([2, 196])
    """
    height, width = grid_size
    draws = torch.rand(4, batch_size, num_blocks, dtype=torch.float32, **source)
    patches = (area[0] + (area[1] - area[0]) * draws[0]) * height * width
    log_aspect = math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[1]
    block_height = (patches * log_aspect.exp()).sqrt().round().clamp(1, height)
    block_width = (patches / log_aspect.exp()).sqrt().round().clamp(1, width)
    top, left = (draws[2] * (height - block_height + 1)).floor(), (draws[3] * (width - block_width + 1)).floor()
    row, column = (torch.arange(size, device=draws.device) for size in grid_size)
    rows = (row >= top[..., None]) & (row < (top + block_height)[..., None])
    columns = (column >= left[..., None]) & (column < (left + block_width)[..., None])

    uncovered = (1 - block_height * block_width / (height * width)).cumprod(1)
    score = torch.cat([torch.ones_like(uncovered[:, :1]), uncovered[:, :-1]], 1)
    covered = ((rows[..., None] & columns[:, :, None]) * score[..., None, None]).amax(1)
    return torch.maximum(covered, uncovered[:, -1, None, None]).flatten(1)  # what no rectangle covers comes last


def part_scores(parts: Tensor, *, device: Any = None, generator: Generator | None = None) -> Tensor:
    """One uniform draw for each part, which its patches take: p_parts of PartMask.

    Args:
        parts: [B, N] of any integer type, >= 0: the part of each patch. Labels may be large and have gaps.
        device: where to draw; that of `parts` where None.
        generator: source of randomness, on the same device; torch's default one where None.

    Returns:
        Scores [B, N] float32 in [0, 1).

    Raises:
        ValueError: where `parts` is not [B, N], has a float type or, which only the CPU checks, has negative labels.

    Examples:
        >>> p = part_scores(torch.tensor([[0, 0, 901, 901]]))
        >>> bool(p[0, 0] == p[0, 1]), bool(p[0, 2] == p[0, 3])
        (True, True)
    """
    labels = check_parts(parts).to(device)
    key = torch.randint(1 << 62, labels.shape[:1], device=labels.device, generator=generator)
    return _uniform(key, labels)  # a hash of the label, not a table of draws, which needs to know the largest label


def check_parts(parts: Any, shape: tuple[int, int, int] | None = None, owner: str = "part_scores") -> Tensor:
    """Labels as int64; an error where they are missing, no labels of patches, or not those of `shape`, (B, H, W)."""
    if parts is None:
        how = "parts=teacher(images) with a PartTeacher, parts=GraphCutPartitioner()(affinity)"
        raise ValueError(f"{owner} needs parts, but got None: pass {how}, or any segmentation as integers [B, N]")
    check_tensor("parts", parts)
    if parts.is_floating_point() or parts.is_complex():
        raise ValueError(f"parts has dtype {parts.dtype}: part labels are integers, use parts.long()")
    if parts.ndim != 2 or (shape and parts.shape != (shape[0], shape[1] * shape[2])):
        wanted = f" = {[shape[0], shape[1] * shape[2]]} for a grid of {shape[1]} x {shape[2]}" if shape else ""
        raise ValueError(f"parts has shape {list(parts.shape)}, but must be [B, N]{wanted}, one label for each patch")
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
    ids = _order(scores, torch.randint(1 << 62, (batch_size,), device=x.device, generator=generator))
    ids_restore = torch.empty_like(ids).scatter_(1, ids, torch.arange(num_patches, device=x.device).expand_as(ids))
    # Rows of one long table: on a CPU many times faster than a gather along the second dimension.
    rows = ids[:, :keep] + torch.arange(batch_size, device=x.device)[:, None] * num_patches
    visible = x.flatten(0, 1).index_select(0, rows.flatten()).view(batch_size, keep, width)
    return MaskedPatches(visible, (ids_restore >= keep).float(), ids_restore)


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
