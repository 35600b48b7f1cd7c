"""The official MAE (https://github.com/facebookresearch/mae) and every model with its `random_masking`."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import MaskedPatches
from ..masks import Masking
from ..teacher import PartTeacher, unwrap
from .evolution import Evolution

__all__ = ["apply_to_mae"]


def apply_to_mae(model: nn.Module, masking: Masking, teacher: PartTeacher | None = None) -> Evolution:
    """Let an MAE mask with `masking`, in place of its own `random_masking(x, mask_ratio)`.

    Args:
        model: the MAE, wrapped in DistributedDataParallel or compiled or not; it must have `random_masking` and
            `patch_embed`, as the official one, its forks and mmpretrain's have.
        masking: the mask.
        teacher: where the mask gets its parts from, built from the same model; None for a mask that needs none.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step.

    Raises:
        TypeError: where the model has no such method.
        ValueError: where it has evolving masks already, the mask needs parts and there is no teacher, or the teacher
            was built for another architecture.

    Source: https://github.com/facebookresearch/mae
    """
    model = unwrap(model)
    for name in ("random_masking", "patch_embed"):
        if not hasattr(model, name):
            raise TypeError(
                f"{type(model).__name__} has no `{name}`, as the official MAE has: set it, or use apply_to_timm, "
                "apply_to_vit_mae or apply_to_lightly for a model of these"
            )
    evolution = Evolution(model, masking, teacher)

    def random_masking(x: Tensor, mask_ratio: float) -> MaskedPatches:
        return evolution.mask(x, mask_ratio)

    evolution.watch(model.get_submodule("patch_embed"))
    evolution.replace(model, "random_masking", random_masking)
    return evolution
