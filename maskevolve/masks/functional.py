"""Masking as pure functions of tensors: scores a patch, then one sort. No state, no modules.

Every mask of the library is a score map ``p`` in [0, 1], one value a patch; those of others may have any range. The
patches with the highest scores are removed; ties are broken at random. Scores may come as a tensor, or as a recipe
(`GroupDraws`, `Blend`) from which a kernel makes them where it sorts them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor, is_number
from .shuffle import Blend, GroupDraws, Scores, compute_scores, random_key, shuffle, take

__all__ = [
    "Blend",
    "GroupDraws",
    "MaskedPatches",
    "Scores",
    "block_scores",
    "compute_scores",
    "grid_draws",
    "mask_patches",
    "num_visible",
    "part_draws",
    "random_scores",
]


class MaskedPatches(NamedTuple):
    """What a mask returns: MAE's three values, in MAE's order (https://arxiv.org/abs/2111.06377)."""

    visible: Tensor
    """[B, N_keep, D], dtype of the input: the patches that stay."""
    mask: Tensor
    """[B, N] float32: 0 keep, 1 remove."""
    ids_restore: Tensor
    """[B, N] int64: the inverse of the shuffle; ``ids_restore < N_keep`` are the patches that stay."""


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay: ``int(N * (1 - mask_ratio))``, rounded down as in MAE.

    Args:
        num_patches: number of patches N of one image.
        mask_ratio: share of patches to remove, in [0, 1).

    Returns:
        Number of patches that stay, at least 1.

    Raises:
        ValueError: where mask_ratio is no number, outside [0, 1), or so high that nothing stays.

    Examples:
        >>> num_visible(196, 0.75)
        49
    """
    if not is_number(mask_ratio):
        raise ValueError(
            f"mask_ratio={mask_ratio!r} is no number in [0, 1): it is the share of patches to remove, the same for all "
            "images of a batch"
        )
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} is outside [0, 1): it is the share of patches to remove")
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        ratios = (step / 1e4 for step in range(10**4, -1, -1))
        most = next((ratio for ratio in ratios if int(num_patches * (1 - ratio)) > 0), 0)
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves no visible patch of N={num_patches}: it must lie in [0, {most}]"
        )
    return keep


def random_scores(
    batch_size: int,
    grid_size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One uniform draw for each patch: MAE's random masking.

    Args:
        batch_size: number of images B.
        grid_size: (H, W) in patches.
        device: where to draw; torch's default device where None.
        generator: source of randomness, on the same device; torch's default one where None.

    Returns:
        Scores [B, N] float32 in [0, 1).

    Examples:
        >>> random_scores(2, (14, 14)).shape
        torch.Size([2, 196])
    """
    height, width = grid_size
    return torch.rand(batch_size, height * width, dtype=torch.float32, device=device, generator=generator)


def grid_draws(
    batch_size: int,
    grid_size: tuple[int, int],
    *,
    period: int = 2,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> GroupDraws:
    """One uniform draw for each cell of a `period` x `period` pattern that is tiled over the patch grid.

    Args:
        batch_size: number of images B; each has draws of its own.
        grid_size: (H, W) in patches.
        period: side of the pattern, in patches.
        device: where to draw; torch's default device where None.
        generator: source of randomness, on the same device; torch's default one where None.

    Returns:
        GroupDraws, a recipe for scores [B, N].

    Examples:
        >>> compute_scores(grid_draws(1, (4, 4))).unique().numel()
        4

    Source: p_grid of Algorithm 1, Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """
    key = random_key(batch_size, device, generator)
    return GroupDraws(key, _cells(grid_size, period, key.device))


def _cells(grid_size: tuple[int, int], period: int, device: torch.device) -> Tensor:
    """[1, N] int64: the cell of each patch in a pattern that is tiled over the grid."""
    row, column = (torch.arange(size, device=device) % period for size in grid_size)
    return (row[:, None] * period + column).view(1, -1)


def block_scores(
    batch_size: int,
    grid_size: tuple[int, int],
    *,
    num_blocks: int = 16,
    area: tuple[float, float] = (16 / 196, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random rectangles laid one over the other; the earlier a rectangle is laid, the higher its score.

    A rectangle's score is the share of the image that the ones before it are expected to leave uncovered, so that the
    scores spread over [0, 1] as those of a grid or of parts do.

    Args:
        batch_size: number of images B.
        grid_size: (H, W) in patches.
        num_blocks: rectangles for each image; 16 cover nine tenths of an image on average.
        area: least and greatest area of a rectangle, as a share of the image (BEiT: 16 of 196 patches to 0.4).
        aspect: least and greatest height / width of a rectangle, drawn log-uniformly.
        device: where to draw; torch's default device where None.
        generator: source of randomness, on the same device; torch's default one where None.

    Returns:
        Scores [B, N] float32 in (0, 1].

    Examples:
        >>> block_scores(2, (14, 14)).shape
        torch.Size([2, 196])

    Source: Algorithm 1 of BEiT, https://arxiv.org/abs/2106.08254
    """
    height, width = grid_size
    draws = torch.rand(4, batch_size, num_blocks, dtype=torch.float32, device=device, generator=generator)
    patches = (area[0] + (area[1] - area[0]) * draws[0]) * height * width
    log_aspect = math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[1]
    block_height = (patches * log_aspect.exp()).sqrt().round().clamp(1, height)
    block_width = (patches / log_aspect.exp()).sqrt().round().clamp(1, width)
    rows = _between((draws[2] * (height - block_height + 1)).floor(), block_height, height)
    columns = _between((draws[3] * (width - block_width + 1)).floor(), block_width, width)

    uncovered = (1 - block_height * block_width / (height * width)).cumprod(1)
    score = torch.cat([torch.ones_like(uncovered[:, :1]), uncovered[:, :-1]], 1)
    laid = rows[:, :, :, None] & columns[:, :, None, :]
    covered = (laid * score[:, :, None, None]).amax(1)
    # What no rectangle covers comes last.
    return torch.maximum(covered, uncovered[:, -1, None, None]).flatten(1)


def _between(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[..., size] bool: which of 0..size-1 lie in [start, start + length)."""
    at = torch.arange(size, device=start.device)
    return (at >= start[..., None]) & (at < (start + length)[..., None])


def part_draws(parts: Tensor, *, generator: torch.Generator | None = None) -> GroupDraws:
    """One uniform draw for each part; a patch takes the draw of its part.

    Args:
        parts: [B, N] of any integer type, >= 0: the part of each patch. Labels may be large and have gaps.
        generator: source of randomness, on the device of `parts`; torch's default one where None.

    Returns:
        GroupDraws, a recipe for scores [B, N].

    Raises:
        ValueError: where `parts` is not [B, N], has a float type, or (checked on the CPU only, for elsewhere the check
            would make the host wait) has negative labels.

    Examples:
        >>> parts = torch.tensor([[0, 0, 901, 901]])
        >>> p = compute_scores(part_draws(parts))
        >>> bool(p[0, 0] == p[0, 1]), bool(p[0, 2] == p[0, 3])
        (True, True)

    Source: p_parts of Algorithm 1, Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """
    check_parts(parts)
    return GroupDraws(random_key(len(parts), parts.device, generator), parts)


def check_parts(parts: Tensor, batch_size: int = 0, grid: tuple[int, int] | None = None) -> None:
    """Raise an error where `parts` cannot label patches, or, where a grid is given, not those of so many images."""
    if not isinstance(parts, Tensor):
        raise TypeError(f"parts is a {type(parts).__name__}, but must be a tensor: use torch.as_tensor(parts)")
    if parts.is_floating_point() or parts.is_complex():
        raise ValueError(f"parts has dtype {parts.dtype}: part labels are integers, use parts.long()")
    if parts.ndim != 2 or (grid is not None and parts.shape != (batch_size, grid[0] * grid[1])):
        wanted = "" if grid is None else f" = {[batch_size, grid[0] * grid[1]]} for a grid of {grid[0]} x {grid[1]}"
        raise ValueError(f"parts has shape {list(parts.shape)}, but must be [B, N]{wanted}, one label for each patch")
    if parts.device.type == "cpu" and parts.numel() and not torch.compiler.is_compiling() and int(parts.min()) < 0:
        raise ValueError(
            f"parts has the label {int(parts.min())}, but labels must not be negative: if that marks patches without a "
            "part, give these a label of their own"
        )


def check_scores(scores: Scores, shape: tuple[int, int]) -> None:
    """Raise an error where scores, or the tensors of a recipe for them, are not those of `shape`, (B, N)."""
    if isinstance(scores, Blend):
        check_scores(scores.start, shape)
        check_scores(scores.end, shape)
        return
    if isinstance(scores, GroupDraws):  # one draw of each image, for groups that may be the same in all
        fits = scores.key.shape == shape[:1] and scores.groups.shape in (shape, (1, shape[1]))
        found = f"key {list(scores.key.shape)} and groups {list(scores.groups.shape)}"
    else:
        check_tensor("scores", scores)
        fits, found = scores.shape == shape, str(list(scores.shape))
    if not fits:
        one = "; fixed masks call draw for one image at a time" if shape[0] == 1 else ""
        raise ValueError(
            f"scores has shape {found}, but must be [B, N] = {list(shape)}, one score for each patch, row by row{one}"
        )


def mask_patches(
    x: Tensor, scores: Scores, mask_ratio: float = 0.75, *, generator: torch.Generator | None = None
) -> MaskedPatches:
    """Remove the patches with the highest scores, the same number from every image.

    Args:
        x: [B, N, D] of any dtype; gradients flow to it.
        scores: [B, N] of any real dtype and any range, or a recipe for them. Ties are broken at random, each patch
            alike. NaN is an error on the CPU; elsewhere the check would make the host wait, and NaN is removed first.
        mask_ratio: share of patches to remove, in [0, 1); ``int(N * (1 - mask_ratio))`` stay.
        generator: source of randomness for the ties, on the device of `x`; torch's default one where None.

    Returns:
        MaskedPatches: visible [B, N_keep, D], mask [B, N] float32, ids_restore [B, N] int64.

    Raises:
        ValueError: where mask_ratio is out of range or leaves no patch, or where `scores` does not match `x`
            or is NaN.

    Examples:
        >>> x = torch.arange(4.0).reshape(1, 4, 1)
        >>> mask_patches(x, torch.tensor([[0.9, 0.1, 0.8, 0.2]]), 0.5).visible.flatten()
        tensor([1., 3.])
    """
    check_scores(scores, (x.shape[0], x.shape[1]))
    keep = num_visible(x.shape[1], mask_ratio)
    tie_key = random_key(len(x), x.device, generator)
    ids_keep, ids_restore, mask = shuffle(scores, tie_key, x.shape[1], keep)
    return MaskedPatches(take(x, ids_keep, ids_restore), mask, ids_restore)
