"""stable-pretraining (https://github.com/galilai-group/stable-pretraining): its MAE, SimMIM, iBOT, DINOv2 and more."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Masking
from ..teachers import PartTeacher
from ..teachers.average import unwrap
from .eager import Eager
from .evolution import Evolution, Teacher, import_host
from .images import mask_images, tensors_in


def apply_to_stable_pretraining(module: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let a module of stable-pretraining mask with `masking`.

    In a MaskedEncoder, which MAE has, it takes the place of the encoder's own ``masking(x, grid_h, grid_w)``; in
    SimMIM, BEiT, MaskFeat, data2vec, iBOT, MIM-Refiner, DINOv2, DINOv3, MSN, PMSN, CMAE and CrossMAE, that of
    ``_random_mask``. What is replaced still says, at each mask, how many patches are removed: none in an encoder in
    eval mode. I-JEPA and SALT draw a context and targets, not a mask.

    Args:
        module: such a method, its MaskedEncoder, or a module with one of either in it; wrapped in
            DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the MaskedEncoder or the ViT that trains, such as
            ``module.encoder.vit``.

    Returns:
        Evolution: what moves the masks along, by hand or in `lightning_callback`. Where a method masks images that its
        `forward` makes itself, call ``.see(images)`` first.

    Raises:
        ImportError: where stable-pretraining is not installed.
        TypeError: where nothing in the module draws such masks, or more than one does.
        ValueError: where the teacher was built from a whole module, and as `Evolution`.

    Source: https://github.com/galilai-group/stable-pretraining
    """
    backbone = import_host("stable_pretraining.backbone", "stable-pretraining")
    module = unwrap(module)
    owner = _find_owner(module, backbone.MaskedEncoder)
    _check_draw(owner)
    model = next((inner for inner in owner.modules() if hasattr(inner, "patch_embed")), owner)
    drawn = "_random_mask" if hasattr(owner, "_random_mask") else "masking"
    student = _find_student(module, model, teacher)
    evolution = Evolution(model, masking, teacher, student, f"{type(owner).__name__}.{drawn}")
    if drawn == "masking":
        evolution.note_images(owner.patch_embed)
        evolution.replace(owner.masking, "forward", _mask_tokens)
    else:
        evolution.replace(owner, "forward", Eager(_run_method, recursive=False))
        evolution.replace(owner, drawn, DRAWS[len(signature(owner._random_mask).parameters)])
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
        arguments = signature(owner._random_mask)
        if len(arguments.parameters) not in DRAWS:
            known = "neither _random_mask(B, N, device), as in SimMIM, nor _random_mask(x), as in CrossMAE"
            raise TypeError(f"{type(owner).__name__}._random_mask{arguments} is {known}")
        return
    height, width = owner.default_grid_h, owner.default_grid_w
    with torch.random.fork_rng([]):
        draw = type(owner.masking).forward  # not ours, where masks evolve already
        drawn = draw(owner.masking, torch.zeros(1, height * width, owner.embed_dim), height, width)
    if not all(hasattr(drawn, name) for name in ("visible", "mask", "ids_restore", "ids_keep")):
        raise TypeError(
            f"{type(owner.masking).__name__} returns {type(drawn).__name__}, where PatchMasking and others that "
            "masks can take the place of return a MaskingOutput"
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


# What the host draws for one image on the CPU, where that waits for no device, says how many patches stay.


def _mask_tokens(evolution: Evolution, _: nn.Module, own: Any, x: Tensor, grid_h: int, grid_w: int) -> Any:
    """In place of the `masking` of a MaskedEncoder."""
    drawn = own(torch.zeros_like(x[:1], device="cpu"), grid_h, grid_w)
    keep = drawn.ids_keep.shape[1]
    if keep == x.shape[1]:  # in eval mode, say
        return own(x, grid_h, grid_w)
    visible, mask, ids_restore = evolution.mask(x, keep, (grid_h, grid_w))
    ids_keep = ids_restore.argsort(1)[:, :keep]
    return type(drawn)(visible=visible, mask=mask, ids_restore=ids_restore, ids_keep=ids_keep)


def _run_method(evolution: Evolution, method: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a method, a forward pass that draws for the first images that it is given."""
    given = signature(type(method).forward).bind(method, *args, **kwargs).arguments.values()
    with evolution.forward_pass(method, tensors_in(given)):
        return own(*args, **kwargs)


def _draw_mask(evolution: Evolution, _: nn.Module, own: Callable[..., Any], B: int, N: int, device: Any) -> Tensor:
    """In place of a `_random_mask` that returns which patches are removed, [B, N]."""
    keep = N - int(own(1, N, "cpu").sum())
    return mask_images(evolution, torch.zeros(B, N, 1, device=device), keep, is_first=True).mask


def _draw_pair(evolution: Evolution, _: nn.Module, own: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """In place of CrossMAE's, which returns what stays and what of the rest is predicted."""
    visible, predicted = own(torch.zeros_like(x[:1], device="cpu"))
    masked = mask_images(evolution, x, visible.shape[1], is_first=True)
    return masked.visible, masked.ids_restore >= x.shape[1] - int(predicted.sum())


DRAWS: dict[int, Callable[..., Any]] = {1: _draw_pair, 3: _draw_mask}
"""What takes the place of a `_random_mask`, by the number of its arguments."""
