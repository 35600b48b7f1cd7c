"""timm's ViTs (https://github.com/huggingface/pytorch-image-models), which hide patches by patch dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks.kinds import Masking
from ..teachers.teacher import unwrap
from .evolution import Evolution, Teacher, eager
from .naflex import NaFlexBatch, drop_patches

__all__ = ["apply_to_timm"]


def apply_to_timm(vit: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let the patch dropout of a timm ViT drop what `masking` removes; its rate stays that of the ViT.

    Prefix tokens (class, distillation, registers) are kept, and nothing is dropped in eval mode. Where a NaFlexVit is
    given patches with coordinates, each image loses its share of its own patches, and padding is never counted.

    Args:
        vit: a ViT, EVA or NaFlexVit of timm, made with `patch_drop_rate`; wrapped in DistributedDataParallel or
            compiled or not.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from the same model, or any callable
            from images to integer labels, [B, N] or, of any size, [B, h, w]. None for a mask that needs none, and where
            they come with each batch: ``evolution.see(parts=labels)``.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step.

    Raises:
        TypeError: where the model is no ViT with patch dropout.
        ValueError: where it was made without it, has evolving masks already, or the teacher was built for another
            architecture. At the first mask that needs parts, where there are none.

    Examples:
        >>> import timm
        >>> from maskevolve import RandomMask
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.75)
        >>> evolution = apply_to_timm(vit, RandomMask())
        >>> vit.forward_features(torch.randn(2, 3, 224, 224)).shape  # 49 patches and the class token
        torch.Size([2, 50, 192])

    Source: https://arxiv.org/abs/2212.00794
    """
    vit = unwrap(vit)
    embed = "embeds" if hasattr(vit, "embeds") else "patch_embed"  # NaFlexVit's name for it
    for name in ("patch_drop", embed):
        if not hasattr(vit, name):
            raise TypeError(f"{type(vit).__name__} has no `{name}`, as timm's ViTs have: pass such a ViT itself")
    dropout: Any = vit.patch_drop
    if not hasattr(dropout, "prob"):
        raise ValueError(
            f"this {type(vit).__name__} was made without patch dropout, and drops no patches: make it with "
            "timm.create_model(..., patch_drop_rate=0.75)"
        )
    evolution = Evolution(vit, masking, teacher, where=f"{type(dropout).__name__}.forward, the ViT's patch_drop")
    # Not that of the dropout, which in distilled models does not count the distillation token.
    prefix = cast(int, vit.num_prefix_tokens)
    # In models with rotary embeddings. Older versions of timm have an option in place of a class.
    with_indices = type(dropout).__name__ == "PatchDropoutWithIndices" or getattr(dropout, "return_indices", False)

    def drop(module: Any, own: Callable[..., Any], x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        keep = None
        if module.training and module.prob > 0 and naflex:
            count = max(1, int((x.shape[1] - prefix) * (1 - module.prob)))
            keep = drop_padded(evolution, naflex[0], vit.embeds, module.prob, count)
            keep = keep.sort(1).values if module.ordered else keep
            x = torch.cat([x[:, :prefix], x[:, prefix:].take_along_dim(keep[..., None], 1)], 1)
        elif module.training and module.prob > 0:
            x, keep = _drop(evolution, x, prefix, module.prob, module.ordered, with_indices)
        return (x, keep) if with_indices else x

    drop_padded = eager(drop_patches)
    evolution.watch(vit.get_submodule(embed))
    naflex: list[NaFlexBatch] = []  # what the ViT was given last, where that was no images
    if embed == "embeds":
        _note_batches(evolution, vit.get_submodule(embed), naflex)
    evolution.replace(dropout, "forward", drop)
    return evolution


def _note_batches(evolution: Evolution, embeds: nn.Module, naflex: list[NaFlexBatch]) -> None:
    """Keep the last batch of a NaFlexVit in `naflex`, which is empty where that was images."""

    def note(module: nn.Module, call: dict[str, Any]) -> None:
        batch = NaFlexBatch(call["x"], call.get("patch_coord"), call.get("patch_valid"))
        naflex[:] = [] if batch.patch_coord is None else [batch]

    evolution.hook(embeds, note)


def _drop(
    evolution: Evolution, x: Tensor, prefix: int, rate: float, ordered: bool, with_indices: bool
) -> tuple[Tensor, Tensor | None]:
    """The tokens [B, prefix + N_keep, D] that stay and, where they are wanted, which patches those are, [B, N_keep]."""
    patches = x[:, prefix:]
    # timm keeps one patch at least.
    rate = min(rate, max(0.0, 1 - 1.5 / patches.shape[1]))
    visible, mask, ids_restore = evolution.mask(patches, rate)
    keep = None
    if ordered:
        keep = mask.argsort(dim=1, stable=True)[:, : visible.shape[1]]
        visible = patches.gather(1, keep[..., None].expand_as(visible))
    elif with_indices:
        keep = ids_restore.argsort(dim=1)[:, : visible.shape[1]]
    return torch.cat([x[:, :prefix], visible], 1), keep
