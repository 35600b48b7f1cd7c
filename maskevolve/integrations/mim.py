"""Models of Hugging Face that take `bool_masked_pos`: SimMIM's, BEiT's, data2vec's, DINOv2's."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks.functional import num_visible
from ..masks.kinds import Masking
from ..teachers.patch_grid import patch_grid
from ..teachers.teacher import PartTeacher, unwrap
from .evolution import Evolution, Teacher

__all__ = ["apply_to_mim"]

REFUSED = {
    "videomae": "masks tubes of a video, and the masks here are those of images",
    "seggpt": "takes bool_masked_pos for the half of its picture that it is to fill in",
}
"""Model types whose `bool_masked_pos` is something else, and what that is."""


def apply_to_mim(
    model: nn.Module, masking: Masking, teacher: Teacher | None = None, mask_ratio: float = 0.6
) -> Evolution:
    """Let a model of Hugging Face that takes `bool_masked_pos` mask with `masking`, in place of a collator's masks.

    A mask that a call is given, in training or in eval mode, is replaced; True is removed. A
    `...ForMaskedImageModeling` in training masks without being given one, too, for it has no loss without a mask. Any
    other call without a mask sees whole images: model(pixel_values) gives features as ever.

    A loss of your own must be taken over ``evolution.last_mask`` [B, N], 1 where a patch is removed, after the call.
    BeitForMaskedImageModeling must be given `labels` of all patches, [B, N] or [B, H, W]; those of the removed patches
    are picked from them. In a Swin or FocalNet, which merge patches, a mask is made of squares as wide as a patch of
    the last stage (32 pixels by default), as in SimMIM.

    Args:
        model: the model that computes the loss, such as ViTForMaskedImageModeling, or a bare one, such as Dinov2Model,
            where you compute it; wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from the same model or from its
            ``base_model``, or any callable from images to integer labels, [B, N] or, of any size, [B, h, w]. None for a
            mask that needs none, and where they come with each batch: ``evolution.see(parts=labels)``.
        mask_ratio: share of patches to remove, in [0, 1), for these models have none in their config. SimMIM removes
            0.6, BEiT 0.4.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step, or leave both to
        `trainer_callback`.

    Raises:
        TypeError: where the model takes no `bool_masked_pos`, or one that is no mask of patches (VideoMAE, SegGPT).
        ValueError: where the model was made without a mask token, the mask ratio leaves nothing, the model has evolving
            masks already, the teacher was built for another architecture, or is a PartTeacher for a model that merges
            patches. At the first mask that needs parts, where there are none.

    Examples:
        >>> from transformers import ViTConfig, ViTForMaskedImageModeling
        >>> from maskevolve import GridMask
        >>> config = ViTConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1)
        >>> model = ViTForMaskedImageModeling(config)
        >>> evolution = apply_to_mim(model, GridMask(), mask_ratio=0.5)
        >>> loss = model(torch.randn(2, 3, 224, 224)).loss
        >>> evolution.last_mask.sum(1)
        tensor([98., 98.])

    Source: SimMIM, https://arxiv.org/abs/2111.09886, and
    https://github.com/huggingface/transformers/blob/main/examples/pytorch/image-pretraining/run_mim.py
    """
    model = unwrap(model)
    _check_host(model)
    body = cast(nn.Module, model.base_model)
    body = body if _takes_mask(body) else model
    merged = 2 ** (len(getattr(model.config, "depths", [0])) - 1)
    if merged > 1 and isinstance(teacher, PartTeacher):
        raise ValueError(
            f"{type(model).__name__} merges patches and has no attention between all of them, for a PartTeacher to "
            "read: use a mask without parts, or parts from elsewhere"
        )
    of_body = isinstance(teacher, PartTeacher) and type(teacher.model.module) is type(body)
    evolution = Evolution(body, masking, teacher, body if of_body else model, f"{type(model).__name__}.forward")
    try:
        num_visible(math.prod(_mask_grid(body, _empty_image(model.config), merged)), mask_ratio)
    except ValueError:
        evolution.remove()
        raise

    def put_mask(module: nn.Module, call: dict[str, Any]) -> dict[str, Any] | None:
        if not _wants_mask(module, call):
            return None
        call["bool_masked_pos"] = mask = _draw(evolution, call["pixel_values"], mask_ratio, merged)
        if call.get("labels") is not None:
            call["labels"] = _labels_of(call["labels"], mask)
        return call

    evolution.hook(model, put_mask)
    return evolution


def _takes_mask(model: nn.Module) -> bool:
    return {"pixel_values", "bool_masked_pos"} <= set(signature(type(model).forward).parameters)


def _check_host(model: Any) -> None:
    name = type(model).__name__
    if not (hasattr(model, "base_model") and hasattr(model, "config") and _takes_mask(model)):
        raise TypeError(
            f"{name} is no model of Hugging Face that takes `pixel_values` and `bool_masked_pos`: pass one that does, "
            "such as ViTForMaskedImageModeling, or use apply_to_vit_mae for a ViTMAE"
        )
    if model.config.model_type in REFUSED:
        raise TypeError(f"{name} {REFUSED[model.config.model_type]}: no evolving masks for this model")
    if all(getattr(module, "mask_token", None) is None for module in model.modules()):
        raise ValueError(
            f"this {name} was made without a mask token, and can mask nothing: make it with use_mask_token=True, in "
            "its config or as an argument of its class"
        )


def _wants_mask(module: nn.Module, call: dict[str, Any]) -> bool:
    if call.get("pixel_values") is None:
        return False
    if call.get("bool_masked_pos") is not None or call.get("labels") is not None:
        return True
    return module.training and any("ForMaskedImageModeling" in cls.__name__ for cls in type(module).__mro__)


def _draw(evolution: Evolution, images: Tensor, mask_ratio: float, merged: int) -> Tensor:
    """Which patches are removed, [B, N] bool."""
    grid = _mask_grid(evolution.model, images, merged)
    evolution.see(images)
    patches = images.new_zeros(len(images), math.prod(grid), 1, dtype=torch.float32)
    mask = evolution.mask(patches, mask_ratio, grid).mask.bool()
    if merged > 1:
        mask = mask.unflatten(1, grid).repeat_interleave(merged, 1).repeat_interleave(merged, 2).flatten(1)
        evolution.last_mask = mask.float()
    return mask


def _mask_grid(model: nn.Module, images: Tensor, merged: int) -> tuple[int, int]:
    """The grid (H, W) of the squares that are removed, each of merged x merged patches."""
    height, width = patch_grid(model, images)
    if height % merged or width % merged:
        raise ValueError(
            f"{type(model).__name__} merges {merged} x {merged} patches, but images of shape {list(images.shape)} have "
            f"{height} x {width}: give it images whose height and width are multiples of these"
        )
    return height // merged, width // merged


def _empty_image(config: Any) -> Tensor:
    """An image of the size that the model was made for, without memory."""
    size = getattr(config, "image_size", 224)
    return torch.empty(1, 3, *((size, size) if isinstance(size, int) else size), device="meta")


def _labels_of(labels: Tensor, mask: Tensor) -> Tensor:
    """The labels of the patches that are removed, in order."""
    if labels.numel() != mask.numel():
        raise ValueError(
            f"labels has shape {list(labels.shape)}, but the mask that was given is replaced: pass labels of all "
            f"patches, {list(mask.shape)}, of which those of the removed ones are picked"
        )
    return labels.reshape(mask.shape)[mask]
