"""The official MAE (https://github.com/facebookresearch/mae) and every model with its `random_masking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..masks.kinds import Masking
from ..teachers.random_masking import Result, UnknownResultsError, arrange, call_reader, host_method, learn_results
from ..teachers.teacher import unwrap
from .evolution import Evolution, Teacher, eager

__all__ = ["apply_to_mae"]


def apply_to_mae(
    model: nn.Module,
    masking: Masking,
    teacher: Teacher | None = None,
    *,
    patch_size: int | tuple[int, int] | None = None,
) -> Evolution:
    """Let an MAE mask with `masking`, in place of its own `random_masking(x, mask_ratio, ...)`.

    Further arguments of that are left alone, but where one is a tensor, such as noise, the mask is the model's own.
    What is returned is what the model's own returns, in its order: visible patches, mask, ids_restore, ids_keep.

    Args:
        model: the MAE, wrapped in DistributedDataParallel or compiled or not; it must have `random_masking` and
            `patch_embed`, as the official one, its forks and mmpretrain's have.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from the same model, or any callable
            from images to integer labels, [B, N] or, of any size, [B, h, w]. None for a mask that needs none, and where
            they come with each batch: ``evolution.see(parts=labels)``.
        patch_size: in pixels, for a model whose patch embedding does not say. It is noted there, as
            ``model.patch_embed.patch_size``; set that yourself before you build a PartTeacher from such a model.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step.

    Raises:
        TypeError: where the model has no such method, or one that returns something else.
        ValueError: where it has evolving masks already, or the teacher was built for another architecture. At the first
            mask that needs parts, where there are none.

    Source: https://github.com/facebookresearch/mae
    """
    model = unwrap(model)
    for name in ("random_masking", "patch_embed"):
        if not hasattr(model, name):
            raise TypeError(
                f"{type(model).__name__} has no `{name}`, as the official MAE has: set it, or use apply_to_timm, "
                "apply_to_vit_mae or apply_to_lightly for a model of these"
            )
    if patch_size is not None:
        cast(Any, model.patch_embed).patch_size = patch_size
    own: Any = host_method(model, "random_masking")
    read, results = call_reader(own), _try(own, model)
    evolution = Evolution(model, masking, teacher, where=f"{type(model).__name__}.random_masking")

    def random_masking(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal results
        x, mask_ratio, brings_mask = read(*args, **kwargs)
        if brings_mask:
            return own(module, *args, **kwargs)
        if results is None:
            results = eager(learn_results)(lambda: own(module, *args, **kwargs), x)
        return arrange(evolution.mask(x, mask_ratio), results)

    evolution.watch(model.get_submodule("patch_embed"))
    evolution.replace(model, "random_masking", random_masking)
    return evolution


def _try(own: Callable[..., Any], model: nn.Module) -> tuple[Result, ...] | None:
    """What the model's own random_masking returns, or None where only the model knows how to call it."""
    number = getattr(model.patch_embed, "num_patches", 64)
    number = number if isinstance(number, int) else 64
    x = torch.arange(4.0 * number).view(2, number, 2)
    try:
        return learn_results(lambda: own(x, 0.75), x)
    except UnknownResultsError:
        raise
    except Exception:  # whatever it needs, it is asked again when it is called
        return None
