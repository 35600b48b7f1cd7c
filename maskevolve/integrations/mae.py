"""The official MAE (https://github.com/facebookresearch/mae) and every model with its `random_masking`."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..grid import GridSize
from ..masks import Masking, num_visible
from ..teachers.average import unwrap
from ..teachers.encoder import is_fatal
from ..teachers.host_method import host_method
from ..teachers.random_masking import CallSpec, UnknownResultsError, arrange, call_spec, learn_results, read_call
from .eager import Eager
from .evolution import Evolution, Teacher

METHODS = ("random_masking", "patch_embed"), ("_masking", "patch_embedding")  # of an MAE, and of MONAI's


def apply_to_mae(
    model: nn.Module,
    masking: Masking,
    teacher: Teacher | None = None,
    *,
    patch_size: int | tuple[int, ...] | None = None,
    grid_size: GridSize | None = None,
) -> Evolution:
    """Let an MAE mask with `masking`, in place of its own `random_masking(x, mask_ratio, ...)` or MONAI's `_masking`.

    It returns what the model's own returns, in its order: visible patches, mask, ids_restore, ids_keep. Of further
    arguments, a second ratio is honoured (CrossMAE's `kept_mask_ratio`), a tensor, such as noise, means that the mask
    is the model's own, and any other must have its default or, without one, the value of the first call.

    Args:
        model: the MAE, with `random_masking` and `patch_embed`, as the official one, its forks and mmpretrain's have,
            or MONAI's MaskedAutoEncoderViT; wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from the same model.
        patch_size: in pixels, for a model whose patch embedding does not say. It is ``model.patch_embed.patch_size``
            until `remove`; set that yourself before you build a PartTeacher from such a model.
        grid_size: of the patches that are masked, (L,), (H, W), (T, H, W) or (D, H, W), the last axis fastest, for a
            model whose patch embedding does not say, as where it embeds one frame after the other.

    Returns:
        Evolution: what moves the masks along.

    Raises:
        TypeError: where the model has no such method, or one that returns something else.
        ValueError: as `Evolution`.

    Source: https://github.com/facebookresearch/mae
    """
    model = unwrap(model)
    method, embedding = METHODS[hasattr(model, "_masking")]
    for name in (method, embedding):
        if not hasattr(model, name):
            inside = [inner for inner, module in model.named_modules() if hasattr(module, name)]
            instead = f"pass model.{inside[0]}, which has it" if inside else "see docs/hosts for other code bases"
            raise TypeError(f"{type(model).__name__} has no `{name}`, as the official MAE has: {instead}")
    own = host_method(model, method)
    spec, embed = call_spec(own), cast(Any, model.get_submodule(embedding))
    learned: dict[Any, Any] = {(): _try(own, embed)}
    undo = partial(_set_patch_size, embed, vars(embed).get("patch_size"))
    if patch_size is not None:
        embed.patch_size = patch_size
    try:
        evolution = Evolution(model, masking, teacher, None, f"{type(model).__name__}.{method}", grid_size)
    except Exception:
        undo()
        raise
    evolution.undo.append(undo)
    evolution.note_images(embed)
    evolution.replace(model, method, partial(_random_masking, spec, learned))
    return evolution


def _random_masking(
    spec: CallSpec, learned: dict[Any, Any], evolution: Evolution, model: Any, own: Any, *args: Any, **kwargs: Any
) -> Any:
    x, mask_ratio, others = read_call(spec, args, kwargs)
    mask_ratio = model.masking_ratio if mask_ratio is None else mask_ratio  # MONAI's
    if any(isinstance(value, Tensor) for value in others.values()):
        return own(*args, **kwargs)
    for name, value in others.items():
        if "ratio" not in name and (name in spec.defaults or learned.setdefault(name, value) != value):
            raise ValueError(
                f"random_masking was given {name}={value!r}, which masks that evolve cannot honour: leave it at "
                f"{spec.defaults.get(name, learned.get(name))!r}, or call .remove() on the evolution"
            )
    # What a second ratio asks for holds for so many patches only.
    asked = (x.shape[1], mask_ratio, *others.items()) if others else ()
    if learned.get(asked) is None:
        if not len(x):
            return own(*args, **kwargs)
        learned[asked] = Eager(learn_results)(partial(own, *args, **kwargs), x)
    return arrange(evolution.mask(x, num_visible(x.shape[1], mask_ratio)), learned[asked])


def _try(own: Callable[..., Any], embed: Any) -> Any:
    """What the model's own random_masking returns, or None where only the model knows how to call it."""
    number = getattr(embed, "num_patches", None)
    number = number if isinstance(number, int) else 64
    x = torch.arange(4.0 * number).view(2, number, 2)
    try:
        return learn_results(partial(own, x, 0.75), x)
    except Exception as error:  # whatever it needs, it is asked again when it is called
        if isinstance(error, UnknownResultsError) or is_fatal(error):
            raise
        return None


def _set_patch_size(embed: nn.Module, patch_size: Any) -> None:
    vars(embed).pop("patch_size", None)
    vars(embed).update({} if patch_size is None else {"patch_size": patch_size})
