"""timm's ViTs (https://github.com/huggingface/pytorch-image-models), which hide patches by patch dropout."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks import Masking
from ..teachers.average import unwrap
from .eager import Eager
from .evolution import Evolution, Teacher
from .naflex import NaFlexBatch, drop_patches, note_batch


def apply_to_timm(vit: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let the patch dropout of a timm ViT drop what `masking` removes; its rate stays that of the ViT.

    Prefix tokens (class, distillation, registers) are kept, and nothing is dropped in eval mode. Where a NaFlexVit is
    given patches with coordinates, each image loses its share of its own patches, and padding is never counted.

    Args:
        vit: a ViT, EVA or NaFlexVit of timm, made with `patch_drop_rate`; wrapped in DistributedDataParallel or
            compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the same model.

    Returns:
        Evolution: what moves the masks along.

    Raises:
        TypeError: where the model is no ViT with patch dropout.
        ValueError: where it was made without it, and as `Evolution`.

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
        how = "make it with timm.create_model(..., patch_drop_rate=0.75)"
        raise ValueError(f"this {type(vit).__name__} was made without patch dropout, and drops no patches: {how}")
    evolution = Evolution(vit, masking, teacher, where=f"{type(dropout).__name__}.forward, the ViT's patch_drop")
    # In models with rotary embeddings. Older versions of timm have an option in place of a class.
    with_indices = type(dropout).__name__ == "PatchDropoutWithIndices" or getattr(dropout, "return_indices", False)
    evolution.note_images(vit.get_submodule(embed))
    if embed == "embeds":
        evolution.replace(vit, "_forward_embeds", note_batch)
    # The number of prefix tokens is not that of the dropout, which does not count the distillation token.
    drop = partial(_drop, cast(int, vit.num_prefix_tokens), with_indices, Eager(drop_patches))
    evolution.replace(dropout, "forward", drop)
    return evolution


def _drop(
    prefix: int, with_indices: bool, drop_padded: Any, evolution: Evolution, module: Any, _: Any, x: Tensor
) -> Tensor | tuple[Tensor, Tensor | None]:
    """The tokens [B, prefix + N_keep, D] that stay and, where they are wanted, which patches those are, [B, N_keep]."""
    keep: Tensor | None = None
    if module.training and module.prob > 0:
        patches = x[:, prefix:]
        count = max(1, int(patches.shape[1] * (1 - module.prob)))
        batch: NaFlexBatch | None = getattr(evolution._local, "naflex", None)
        if batch is not None:
            keep = drop_padded(evolution, batch, module.prob, count)
        else:
            visible, _, ids_restore = evolution.mask(patches, count)
            if module.ordered or with_indices:
                keep = ids_restore.argsort(1)[:, :count]
        if keep is not None:
            keep = keep.sort(1).values if module.ordered else keep
            visible = patches.take_along_dim(keep[..., None], 1)
        x = torch.cat([x[:, :prefix], visible], 1)
    return (x, keep) if with_indices else x
