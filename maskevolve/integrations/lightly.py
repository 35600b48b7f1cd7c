"""Lightly's MAE (https://docs.lightly.ai/self-supervised-learning/examples/mae.html), in torch or in Lightning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import MaskedPatches, Masking
from ..teachers import PartTeacher
from ..teachers.average import unwrap
from .eager import Eager
from .evolution import Evolution, Teacher, import_host
from .images import mask_images, tensors_in

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""The methods of an MAE that take images and may draw a mask."""
DRAWS = ("random_token_mask", "random_grid_token_mask", "random_inverse_block_mask", "random_block_mask")
"""The functions of lightly.models.utils that draw a mask: they return (idx_keep, idx_mask), the last bool [B, H, W]."""
HOW_TO_DRAW = (
    "write `from lightly.models import utils` and call `utils.random_token_mask(...)`, `utils.random_block_mask(...)` "
    "or another in the `forward` or the `training_step` of the module that apply_to_lightly is given"
)


def apply_to_lightly(mae: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let an MAE in the shape of Lightly's examples mask with `masking`, in place of `utils.random_token_mask`.

    While `forward`, `training_step` or another step of the MAE runs, Lightly's functions `random_token_mask`,
    `random_grid_token_mask`, `random_inverse_block_mask` and `random_block_mask` draw from `masking`, for the images
    among the arguments of that step. They mask as many patches as they would have masked, and never a prefix token.

    Args:
        mae: a LightningModule or plain module with an encoder of Lightly's in it, such as MaskedVisionTransformerTIMM;
            wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: see `Evolution`. A PartTeacher is built from ``mae.backbone`` or ``mae.backbone.vit``.

    Returns:
        Evolution: what moves the masks along, by hand or in `lightning_callback`. Where a step makes the images itself,
        call ``.see(images)`` before it draws a mask.

    Raises:
        ImportError: where lightly is not installed.
        TypeError: where the module has no encoder of Lightly's in it, or no step that could draw a mask.
        ValueError: as `Evolution`.

    Source: https://github.com/lightly-ai/lightly/blob/master/examples/pytorch_lightning/mae.py
    """
    import_host("lightly.models.utils", "'lightly[timm]'")
    mae = unwrap(mae)
    backbones = [module for module in mae.modules() if hasattr(module, "images_to_tokens")]
    trained = (each for each in backbones if any(weight.requires_grad for weight in each.parameters()))
    backbone: Any = next(trained, backbones[0] if backbones else None)
    if backbone is None or backbone is mae:
        raise TypeError(
            f"{type(mae).__name__} {'is an' if backbone is mae else 'has no'} encoder of Lightly's, such as "
            "MaskedVisionTransformerTIMM: pass the module that draws masks for one, as in Lightly's MAE examples"
        )
    steps = [name for name in STEPS if _is_written(getattr(mae, name, None))]
    if not steps:
        raise TypeError(f"{type(mae).__name__} defines no {', '.join(STEPS)}: {HOW_TO_DRAW}")
    vit: Any = getattr(backbone, "vit", backbone)
    of_vit = isinstance(teacher, PartTeacher) and type(teacher.model.module) is type(vit)
    evolution = Evolution(backbone, masking, teacher, vit if of_vit else backbone, "utils.random_token_mask")
    for name in steps:  # what they and the encoder call is compiled
        evolution.replace(mae, name, Eager(_run_step, recursive=False))
    for each in backbones:
        evolution.replace(each, "encode", Eager(_encode, recursive=False))
    return evolution


_current: ContextVar[Evolution | None] = ContextVar("step", default=None)
"""Whose masks the step that is under way in this thread draws."""
_lock = Lock()
_steps_running = 0
_own: dict[str, Callable[..., Any]] = {}


def _is_written(method: Any) -> bool:
    """Whether a method is the user's, not one that every module has."""
    return method is not None and method.__module__.split(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def _run_step(evolution: Evolution, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _drawing(evolution), evolution.forward_pass(module, tensors_in((args, kwargs))):
        return own(*args, **kwargs)


def _encode(evolution: Evolution, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The encoder's method, which refuses masks that are not ours."""
    masks = (*args[1:], *(value for name, value in kwargs.items() if name != "images"))
    is_drawn = any(each.is_masked for each in evolution._passes)
    if module.training and not is_drawn and any(mask is not None for mask in masks):
        raise RuntimeError(
            f"{type(module).__name__} has evolving masks, but was given one that they did not draw: {HOW_TO_DRAW}. "
            "To train with masks of your own, call .remove() on the evolution"
        )
    if module.training and torch.is_grad_enabled():
        evolution._usage.is_embedded = True
    return own(*args, **kwargs)


@contextmanager
def _drawing(evolution: Evolution) -> Iterator[None]:
    """Lightly's functions draw for an evolution in this thread, and are replaced while any thread is in here."""
    global _steps_running
    utils = vars(import_host("lightly.models.utils", "'lightly[timm]'"))
    with _lock:
        _steps_running += 1
        if _steps_running == 1:
            _own.update({name: utils[name] for name in DRAWS if name in utils})
            utils.update({name: _asking(own) for name, own in _own.items()})
    token = _current.set(evolution)
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            _steps_running -= 1
            if _steps_running == 0:
                utils.update(_own)


@cache  # the same one for each step: compiled code depends on it
def _asking(own: Callable[..., Any]) -> Callable[..., Any]:
    """One of Lightly's functions, which asks the step that runs in this thread, if any."""
    return Eager(partial(_ask, own))


def _ask(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    evolution = _current.get()
    if evolution is None:
        return own(*args, **kwargs)
    evolution._passes[-1].is_masked = True
    if own.__name__ == "random_block_mask":
        return _draw_blocks(evolution, own, *args, **kwargs)
    idx_keep, idx_mask = own(*args, **kwargs)  # for their shapes and device, and for errors in the arguments
    prefix = getattr(getattr(evolution.model, "vit", evolution.model), "num_prefix_tokens", 1)
    keep = idx_keep.shape[1] - prefix
    masked = _mask(evolution, len(idx_keep), keep + idx_mask.shape[1], keep, idx_keep.device)
    before = torch.arange(prefix, device=idx_keep.device).expand(len(idx_keep), -1)
    ours, theirs = (masked.ids_restore.argsort(1) + prefix).tensor_split([keep], 1)
    if own.__name__ == "random_inverse_block_mask":  # in the order of the patches
        ours, theirs = ours.sort(1).values, theirs.sort(1).values
    return torch.cat([before, ours], 1), theirs


def _draw_blocks(evolution: Evolution, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """As many patches of each image as Lightly's function masks, which waits for the device unless that is the CPU."""
    call = signature(own).bind(*args, **kwargs)
    device = call.arguments.get("device")
    call.arguments["device"] = "cpu"
    blocks = own(*call.args, **call.kwargs)
    counts = blocks.sum((1, 2)).to(torch.get_default_device() if device is None else device)
    # Each image has its own number: the order of all patches says which.
    count = blocks[0].numel()
    mask = _mask(evolution, len(blocks), count, count, counts.device).ids_restore >= count - counts[:, None]
    evolution.last_mask = mask.float()
    return mask.view(blocks.shape)


def _mask(evolution: Evolution, batch: int, count: int, keep: int, device: torch.device) -> MaskedPatches:
    # Which images they are does not matter where there are no parts.
    patches = torch.zeros(batch, count, 1, device=device)
    return mask_images(evolution, patches, keep, is_first=not evolution.masking.needs_parts)
