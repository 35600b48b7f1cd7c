"""Hugging Face's ViTMAE, and its models that take `bool_masked_pos`: SimMIM's, BEiT's, DINOv2's, VideoMAE's ..."""

import math
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..grid import Grid
from ..masks import Masking, num_visible
from ..teachers import PartTeacher
from ..teachers.average import unwrap
from ..teachers.patch_grid import as_sides, patch_grid
from .eager import Eager
from .evolution import Evolution, Teacher


def apply_to_vit_mae(model: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let a ViTMAE of Hugging Face mask with `masking`, in place of its own `random_masking(sequence, noise)`.

    The mask ratio stays that of the model's config, and the mask of a call that is given `noise` that of the noise.

    Args:
        model: a ViTMAEModel or ViTMAEForPreTraining, wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the same model or from its encoder, ``model.vit``.

    Returns:
        Evolution: what moves the masks along, by hand or in `trainer_callback`.

    Raises:
        TypeError: where the model is no ViTMAE.
        ValueError: as `Evolution`.

    Examples:
        >>> from transformers import ViTMAEConfig, ViTMAEModel
        >>> from maskevolve import GridMask
        >>> config = ViTMAEConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1, mask_ratio=0.5)
        >>> model = ViTMAEModel(config)
        >>> evolution = apply_to_vit_mae(model, GridMask())
        >>> model(torch.randn(2, 3, 224, 224)).last_hidden_state.shape  # 98 patches and the class token
        torch.Size([2, 99, 48])

    Source: https://arxiv.org/abs/2111.06377
    """
    model = unwrap(model)
    embeddings: Any = next((module for module in model.modules() if hasattr(module, "random_masking")), None)
    if not (hasattr(model, "base_model") and hasattr(embeddings, "patch_embeddings")):
        name = type(model).__name__
        raise TypeError(f"{name} is no ViTMAE of Hugging Face: pass a ViTMAEForPreTraining or ViTMAEModel")
    encoder = cast(nn.Module, model.base_model)
    where = f"{type(embeddings).__name__}.random_masking without noise"
    evolution = Evolution(encoder, masking, teacher, _student(model, encoder, teacher), where)
    evolution.note_images(embeddings.patch_embeddings)
    evolution.replace(embeddings, "random_masking", _random_masking)
    return evolution


def _random_masking(evolution: Evolution, module: Any, own: Any, sequence: Tensor, noise: Tensor | None = None) -> Any:
    if noise is not None:
        return own(sequence, noise)
    return evolution.mask(sequence, num_visible(sequence.shape[1], module.config.mask_ratio))


def apply_to_mim(
    model: nn.Module, masking: Masking, teacher: Teacher | None = None, mask_ratio: float = 0.6
) -> Evolution:
    """Let a model of Hugging Face that takes `bool_masked_pos` mask with `masking`, in place of a collator's masks.

    A mask that a call is given, in training or in eval mode, is replaced; True is removed. A
    `...ForMaskedImageModeling` or VideoMAEForPreTraining in training masks without one, too; any other call without a
    mask sees whole images. A VideoMAE takes clips [B, frames, C, height, width], and its patches lie as (T, H, W).

    A loss of your own must be taken over ``evolution.last_mask`` [B, N], 1 where a patch is removed, after the call.
    BeitForMaskedImageModeling must be given `labels` of all patches, [B, N] or [B, H, W], for those of the removed ones
    to be picked. In a Swin or FocalNet, which merge patches, masks are made of squares as wide as a patch of the last
    stage (32 pixels by default), as in SimMIM.

    Args:
        model: one that computes the loss, such as ViTForMaskedImageModeling, or a bare one, such as Dinov2Model, where
            you compute it; wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the same model or from its ``base_model``.
        mask_ratio: share of patches to remove, in [0, 1), for these models' configs have none; BEiT removes 0.4,
            VideoMAE 0.9.

    Returns:
        Evolution: what moves the masks along, by hand or in `trainer_callback`.

    Raises:
        TypeError: where the model takes no `bool_masked_pos`, or one that is no mask of patches (SegGPT).
        ValueError: where the model was made without a mask token, the mask ratio leaves nothing, the teacher is a
            PartTeacher for a model that merges patches, and as `Evolution`.

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
    host: Any = unwrap(model)
    name = type(host).__name__
    if not (hasattr(host, "base_model") and hasattr(host, "config") and _takes_mask(host)):
        raise TypeError(
            f"{name} is no model of Hugging Face that takes `pixel_values` and `bool_masked_pos`: pass one that does, "
            "such as ViTForMaskedImageModeling, or see apply_to_vit_mae and docs/hosts/index.md for others"
        )
    if host.config.model_type == "seggpt":
        raise TypeError(f"{name} takes bool_masked_pos for half of its picture: no evolving masks for this model")
    is_video = host.config.model_type == "videomae"
    if not is_video and all(getattr(module, "mask_token", None) is None for module in host.modules()):
        raise ValueError(
            f"this {name} was made without a mask token, and can mask nothing: make it with use_mask_token=True, an "
            "option of its config or its class"
        )
    merged = 2 ** (len(getattr(host.config, "depths", [0])) - 1)
    if merged > 1 and isinstance(teacher, PartTeacher):
        raise ValueError(
            f"{name} merges patches and has no attention between all of them, for a PartTeacher to read: use a mask "
            "without parts, or parts from elsewhere"
        )
    body = host.base_model if _takes_mask(host.base_model) else host
    evolution = Evolution(body, masking, teacher, _student(host, body, teacher), f"{name}.forward")
    size, frames = as_sides(getattr(host.config, "image_size", 224)), [host.config.num_frames] if is_video else []
    images = torch.empty(1, *frames, host.config.num_channels if is_video else 3, *size, device="meta")
    try:
        masking.num_visible(_mask_grid(body, images, merged), mask_ratio)
    except ValueError:
        evolution.remove()
        raise
    evolution.replace(host, "forward", Eager(partial(_put_mask, mask_ratio, merged), recursive=False))
    return evolution


def _student(model: nn.Module, body: nn.Module, teacher: Any) -> nn.Module:
    """What the teacher follows: the model or, where it was built from that, its body without a head or decoder."""
    return body if isinstance(teacher, PartTeacher) and type(teacher.model.module) is type(body) else model


def _takes_mask(model: nn.Module) -> bool:
    return {"pixel_values", "bool_masked_pos"} <= set(signature(type(model).forward).parameters)


def _put_mask(
    mask_ratio: float, merged: int, evolution: Evolution, module: nn.Module, own: Any, *args: Any, **kwargs: Any
) -> Any:
    """A forward pass of the model: with our mask, where it is to be masked."""
    names = list(signature(type(module).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    images, labels = call.get("pixel_values"), call.get("labels")
    is_masked = call.get("bool_masked_pos") is not None or labels is not None
    # These have no loss without a mask.
    kinds = ("ForMaskedImageModeling", "VideoMAEForPreTraining")
    needs_mask = module.training and any(kind in each.__name__ for each in type(module).__mro__ for kind in kinds)
    with evolution.forward_pass(module, []):
        if images is not None and (is_masked or needs_mask):
            call["bool_masked_pos"] = mask = _draw(evolution, images, mask_ratio, merged)
            if labels is not None:
                call["labels"] = _labels_of(labels, mask)
        return own(**call)


def _draw(evolution: Evolution, images: Tensor, mask_ratio: float, merged: int) -> Tensor:
    """Which patches are removed, [B, N] bool."""
    grid = _mask_grid(evolution.model, images, merged)
    patches = images.new_zeros(len(images), math.prod(grid), 1, dtype=torch.float32)
    mask = evolution.mask(patches, evolution.masking.num_visible(grid, mask_ratio), grid, images).mask.bool()
    if merged > 1:
        mask = mask.unflatten(1, grid).repeat_interleave(merged, 1).repeat_interleave(merged, 2).flatten(1)
        evolution.last_mask = mask.float()
    return mask


def _mask_grid(model: nn.Module, images: Tensor, merged: int) -> Grid:
    """The grid, such as (H, W), of the squares that are removed, each of merged x merged patches."""
    if merged == 1:
        return patch_grid(model, images)
    height, width = patch_grid(model, images)
    if height % merged or width % merged:
        raise ValueError(
            f"{type(model).__name__} merges {merged} x {merged} patches, but images of shape {list(images.shape)} have "
            f"{height} x {width}: give it images whose height and width are multiples of these"
        )
    return height // merged, width // merged


def _labels_of(labels: Tensor, mask: Tensor) -> Tensor:
    """The labels of the patches that are removed, in order."""
    if labels.numel() != mask.numel():
        raise ValueError(
            f"labels has shape {list(labels.shape)}, but the mask that was given is replaced: pass labels of all "
            f"patches, {list(mask.shape)}"
        )
    return labels.reshape(mask.shape)[mask]
