"""stable-pretraining (https://github.com/galilai-group/stable-pretraining): its MAE, SimMIM, iBOT, DINOv2 and more."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.kinds import Masking
from ..teachers.teacher import PartTeacher, unwrap
from .evolution import Evolution, Teacher, eager, import_host
from .views import first_images, images_of

__all__ = ["apply_to_stable_pretraining"]


def apply_to_stable_pretraining(module: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let a module of stable-pretraining mask with `masking`.

    In a MaskedEncoder, which MAE has, it takes the place of the encoder's own ``masking(x, grid_h, grid_w)``; in
    SimMIM, BEiT, MaskFeat, data2vec, iBOT, MIM-Refiner, DINOv2, DINOv3, MSN, PMSN, CMAE and CrossMAE, that of
    ``_random_mask``. How many patches are removed stays with what is replaced, as does when: its mask ratio is read at
    each mask, and an encoder in eval mode keeps all patches. I-JEPA and SALT draw a context and targets, not a mask.

    Args:
        module: such a method, its MaskedEncoder, or a module with one of either in it; wrapped in
            DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from the MaskedEncoder or from the ViT
            that trains, such as ``module.encoder.vit``, or any callable from images to integer labels, [B, N] or, of
            any size, [B, h, w]. None for a mask that needs none, and where they come with each batch:
            ``evolution.see(parts=labels)``.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step, or leave both to
        `lightning_callback`. Where a method masks images that its `forward` makes itself, call ``.see(images)`` first.

    Raises:
        ImportError: where stable-pretraining is not installed.
        TypeError: where nothing in the module draws such masks, or more than one does.
        ValueError: where it has evolving masks already, or the teacher was built for another architecture or from a
            whole module. At the first mask that needs parts, where there are none.

    Source: https://github.com/galilai-group/stable-pretraining
    """
    backbone = import_host("stable_pretraining.backbone", "stable-pretraining")
    module = unwrap(module)
    owner = _find_owner(module, backbone.MaskedEncoder)
    _check_draw(owner)
    model = next((inner for inner in owner.modules() if hasattr(inner, "patch_embed")), owner)
    drawn = "_random_mask" if hasattr(owner, "_random_mask") else "masking"
    where = f"{type(owner).__name__}.{drawn}"
    evolution = Evolution(model, masking, teacher, _find_student(module, model, teacher), where)
    if isinstance(owner, backbone.MaskedEncoder):
        _replace_masking(evolution, owner)
    else:
        _replace_random_mask(evolution, owner)
    return evolution


def _find_owner(module: nn.Module, encoder: Any) -> Any:
    """The one module that draws masks: a MaskedEncoder with a masking, or a method with a `_random_mask`."""

    def draws(inner: Any) -> bool:
        return hasattr(inner, "_random_mask") or (isinstance(inner, encoder) and isinstance(inner.masking, nn.Module))

    found = [(name or "itself", inner) for name, inner in module.named_modules() if draws(inner)]
    if not found:
        raise TypeError(
            f"{type(module).__name__} has neither a MaskedEncoder with a masking, as MAE has, nor a `_random_mask`, as "
            "SimMIM, iBOT and others have. I-JEPA and SALT draw a context and targets, which no mask replaces"
        )
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(inner).__name__})" for name, inner in found)
        raise TypeError(f"{type(module).__name__} has {len(found)} modules that draw masks: pass one of {names}")
    return found[0][1]


def _check_draw(owner: Any) -> None:
    """Refuse masks of another kind than those that are replaced."""
    if hasattr(owner, "_random_mask"):
        if len(signature(owner._random_mask).parameters) not in (1, 3):
            raise TypeError(
                f"{type(owner).__name__}._random_mask{signature(owner._random_mask)} is neither _random_mask(B, N, "
                "device), as in SimMIM, nor _random_mask(x), as in CrossMAE"
            )
        return
    height, width = owner.default_grid_h, owner.default_grid_w
    with torch.random.fork_rng([]):
        draw = type(owner.masking).forward  # not ours, where masks evolve already
        drawn = draw(owner.masking, torch.zeros(1, height * width, owner.embed_dim), height, width)
    if not all(hasattr(drawn, name) for name in ("visible", "mask", "ids_restore", "ids_keep")):
        raise TypeError(
            f"{type(owner.masking).__name__} returns {type(drawn).__name__}, where PatchMasking and others return a "
            "MaskingOutput: masks can take the place of these only"
        )


def _find_student(module: nn.Module, model: nn.Module, teacher: Any) -> nn.Module:
    """What the teacher follows: the module of its type that trains."""
    if not isinstance(teacher, PartTeacher):
        return model
    source = teacher.model.module
    if hasattr(source, "callbacks_modules"):
        raise ValueError(
            f"the teacher was built from a whole {type(source).__name__}, to which callbacks such as OnlineProbe add "
            "parameters: build it from the ViT that trains, as in PartTeacher(module.encoder, ...)"
        )
    same = (inner for inner in module.modules() if type(inner) is type(source))
    return next((inner for inner in same if any(weight.requires_grad for weight in inner.parameters())), model)


def _replace_masking(evolution: Evolution, encoder: Any) -> None:
    """Mask in place of the masking of a MaskedEncoder."""
    output: Any = import_host("stable_pretraining.backbone.patch_masking", "stable-pretraining").MaskingOutput

    def forward(masking: nn.Module, own: Callable[..., Any], x: Tensor, grid_h: int, grid_w: int) -> Any:
        # What the host draws for one image on the CPU, where that waits for no device, says how many patches stay.
        keep = own(masking, torch.zeros_like(x[:1], device="cpu"), grid_h, grid_w).ids_keep.shape[1]
        if keep == x.shape[1]:  # in eval mode, say
            return own(masking, x, grid_h, grid_w)
        visible, mask, ids_restore = evolution.mask(x, _ratio(keep, x.shape[1]))
        return output(visible, mask, ids_restore, ids_restore.argsort(1)[:, :keep])

    evolution.watch(encoder.patch_embed)
    evolution.replace(encoder.masking, "forward", eager(forward))


def _replace_random_mask(evolution: Evolution, method: Any) -> None:
    """Mask in place of a method's `_random_mask`, which draws for the first images that its `forward` was given."""
    order = signature(method.forward)
    given: list[Tensor] = []

    def forward(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values = order.bind(*args, **kwargs).arguments.values()
        listed = (value if isinstance(value, list | tuple) else [value] for value in values)
        given[:] = [tensor for value in listed for tensor in value if isinstance(tensor, Tensor)]
        try:
            return own(module, *args, **kwargs)
        finally:
            given.clear()

    def see(batch: int, count: int) -> None:
        images = first_images(images_of(evolution.model, given, count), batch)
        if images is not None:
            evolution.see(images)

    # As above, one image on the CPU says how many patches the host removes.
    def boolean(module: nn.Module, own: Callable[..., Tensor], B: int, N: int, device: torch.device | str) -> Tensor:
        see(B, N)
        keep = N - int(own(module, 1, N, "cpu").sum())
        return evolution.mask(torch.zeros(B, N, 1, device=device), _ratio(keep, N)).mask

    def pair(module: nn.Module, own: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        """CrossMAE's: what stays, and what of the rest is predicted."""
        see(*x.shape[:2])
        visible, predicted = own(module, torch.zeros_like(x[:1], device="cpu"))
        masked = evolution.mask(x, _ratio(visible.shape[1], x.shape[1]))
        return masked.visible, masked.ids_restore >= x.shape[1] - int(predicted.sum())

    draw = pair if len(signature(method._random_mask).parameters) == 1 else boolean
    evolution.replace(method, "forward", eager(forward, recursive=False))
    evolution.replace(method, "_random_mask", eager(draw))


def _ratio(keep: int, count: int) -> float:
    """The mask ratio that keeps so many of `count` patches, half a patch off against rounding."""
    return max(0.0, 1 - (keep + 0.5) / count)
