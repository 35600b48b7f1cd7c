"""Lightly's MAE (https://docs.lightly.ai/self-supervised-learning/examples/mae.html), in torch or in Lightning."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..geometry import patch_grid
from ..masks import Masking
from ..teacher import PartTeacher, unwrap
from .evolution import Evolution, Teacher, eager, import_host

__all__ = ["apply_to_lightly", "lightning_callback"]

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""The methods of an MAE that take images and may draw a mask."""
DRAWS = ("random_token_mask", "random_grid_token_mask")
"""The functions of lightly.models.utils that stand for a mask: they return (idx_keep, idx_mask)."""
HOW_TO_DRAW = (
    "write `from lightly.models import utils` and call `utils.random_token_mask(...)` in the `forward` or the "
    "`training_step` of the module that apply_to_lightly was given"
)


def apply_to_lightly(mae: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let an MAE in the shape of Lightly's examples mask with `masking`, in place of `utils.random_token_mask`.

    While `forward`, `training_step` or another step of the MAE runs, Lightly's function draws from `masking`, for the
    images among the arguments of that step. It returns indices of the shapes that it would have returned, except that
    no prefix token is ever masked.

    Args:
        mae: a LightningModule or plain module that has a MaskedVisionTransformerTIMM (or another encoder of Lightly's)
            in it; wrapped in DistributedDataParallel or compiled or not.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher that was built from ``mae.backbone`` or
            ``mae.backbone.vit``, or any callable from images to integer labels, [B, N] or, of any size, [B, h, w]. None
            for a mask that needs none, and where they come with each batch: ``evolution.see(parts=labels)``.

    Returns:
        Evolution: call ``.set_epoch(epoch)`` in each epoch, ``.update()`` after each optimizer step, or leave both to
        `lightning_callback`. Where a step makes the images itself, call ``.see(images)`` before it draws a mask.

    Raises:
        ImportError: where lightly is not installed.
        TypeError: where the module has no encoder of Lightly's in it, or no step that could draw a mask.
        ValueError: where it has evolving masks already, or the teacher was built for another architecture. At the first
            mask that needs parts, where there are none.

    Source: https://github.com/lightly-ai/lightly/blob/master/examples/pytorch_lightning/mae.py
    """
    utils = import_host("lightly.models.utils", "'lightly[timm]'")
    mae = unwrap(mae)
    backbone: Any = next((module for module in mae.modules() if hasattr(module, "images_to_tokens")), None)
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
    prefix: int = getattr(vit, "num_prefix_tokens", 1)

    def draw(step: _Step, idx_keep: Tensor, idx_mask: Tensor) -> tuple[Tensor, Tensor]:
        batch, keep = idx_keep.shape[0], idx_keep.shape[1] - prefix
        patches = idx_keep.new_zeros(batch, keep + idx_mask.shape[1], 1, dtype=torch.float32)
        if evolution.images is None:
            evolution.see(_find_images(step, backbone, patches, masking.needs_parts))
        ratio = 1 - (keep + 0.5) / patches.shape[1]  # half a patch more, against rounding
        order = evolution.mask(patches, ratio).ids_restore.argsort(1) + prefix
        before = torch.arange(prefix, device=order.device).expand(batch, -1)
        return torch.cat([before, order[:, :keep]], 1), order[:, keep:]

    for name in steps:
        evolution.replace(mae, name, _drawing_step(utils, draw))
    evolution.replace(backbone, "encode", _checked_encode(evolution))
    return evolution


def lightning_callback(evolution: Evolution) -> Any:
    """What moves an evolution along under Lightning: ``Trainer(..., callbacks=[lightning_callback(evolution)])``.

    It sets the epoch before each batch, fractions included, and updates the teacher after each step of an optimizer
    that a GradScaler does not skip. Lightning's checkpoints hold the evolution, so that a resumed run goes on. `alpha`
    and `num_parts` are logged.

    Args:
        evolution: what `apply_to_lightly`, or any other integration, returned.

    Returns:
        A Callback, of `lightning.pytorch` and of `pytorch_lightning` alike.

    Raises:
        ImportError: where neither is installed.
    """
    # Lightly imports pytorch_lightning. Whoever uses the other one has imported it by now.
    hosts = [sys.modules[name] for name in ("lightning.pytorch", "pytorch_lightning") if sys.modules.get(name)]
    hosts = hosts or [import_host("pytorch_lightning", "pytorch-lightning")]
    base: Any = type("Callback", tuple(host.Callback for host in hosts), {})

    class EvolutionCallback(base):
        state_key = "maskevolve"

        def __init__(self) -> None:
            self.hooks: list[Any] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.remove_hooks()
            self.hooks = [evolution.follow(optimizer) for optimizer in trainer.optimizers]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # An endless loader has infinitely many batches: its epoch stays a whole number.
            evolution.set_epoch(trainer.current_epoch + batch_idx / trainer.num_training_batches)

            if hasattr(evolution.masking, "alpha"):
                pl_module.log("alpha", evolution.masking.alpha, prog_bar=True)
            if hasattr(evolution.teacher, "num_parts"):
                pl_module.log("num_parts", float(cast(Any, evolution.teacher).num_parts))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.remove_hooks()

        def remove_hooks(self) -> None:
            while self.hooks:
                self.hooks.pop().remove()

        def state_dict(self) -> dict[str, Any]:
            return evolution.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            evolution.load_state_dict(state_dict)

    return EvolutionCallback()


@dataclass
class _Step:
    """A step of an MAE that is under way in this thread."""

    given: Any
    draw: Callable[..., tuple[Tensor, Tensor]]
    outer: _Step | None
    has_drawn: bool = False


_current: ContextVar[_Step | None] = ContextVar("step", default=None)
_lock = Lock()
_steps_running = 0
_own: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}


def _is_written(method: Any) -> bool:
    """Whether a method is the user's, not one that every module has."""
    return method is not None and method.__module__.split(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def _drawing_step(utils: Any, draw: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """A method during which Lightly's functions draw ours."""

    def step(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _replaced(utils):
            token = _current.set(_Step((args, kwargs), draw, _current.get()))
            try:
                return own(module, *args, **kwargs)
            finally:
                _current.reset(token)

    return eager(step, recursive=False)  # what it calls is compiled


@contextmanager
def _replaced(utils: Any) -> Iterator[None]:
    """Lightly's functions ask the current step, for as long as any step runs in any thread."""
    global _steps_running
    with _lock:
        _steps_running += 1
        if _steps_running == 1:
            _own.update({name: getattr(utils, name) for name in DRAWS if hasattr(utils, name)})
            vars(utils).update({name: _asking(own) for name, own in _own.items()})
    try:
        yield
    finally:
        with _lock:
            _steps_running -= 1
            if _steps_running == 0:
                vars(utils).update(_own)


@cache  # the same one for each step: compiled code depends on it
def _asking(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One of Lightly's functions, which asks the step that runs in this thread, if any."""

    @wraps(own)
    def random_mask(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        idx_keep, idx_mask = own(*args, **kwargs)  # for their shapes and device, and for errors in the arguments
        step = _current.get()
        if step is None:
            return idx_keep, idx_mask
        step.has_drawn = True
        return step.draw(step, idx_keep, idx_mask)

    return eager(random_mask)


def _checked_encode(evolution: Evolution) -> Callable[..., Any]:
    """The encoder's method, which refuses masks that are not ours."""

    def encode(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        masks = (*args[1:], *(value for name, value in kwargs.items() if name != "images"))
        steps = _outwards(_current.get())
        if module.training and not any(step.has_drawn for step in steps) and any(mask is not None for mask in masks):
            raise RuntimeError(
                f"{type(module).__name__} has evolving masks, but was given one that they did not draw: {HOW_TO_DRAW}. "
                "To train with masks of your own, call .remove() on the evolution"
            )
        evolution.embedding(module)
        return own(module, *args, **kwargs)

    return eager(encode, recursive=False)


def _outwards(step: _Step | None) -> Iterator[_Step]:
    while step is not None:
        yield step
        step = step.outer


def _find_images(step: _Step, backbone: nn.Module, patches: Tensor, only: bool) -> Tensor:
    """The images of these patches [B, N, 1] among what the step was given; `only` where there must be no choice."""
    batch, count = patches.shape[:2]
    found: dict[int, Tensor] = {}
    for giver in _outwards(step):
        for tensor in _tensors(giver.given):
            if tensor.ndim == 4 and len(tensor) == batch and math.prod(patch_grid(backbone, tensor)) == count:
                found[id(tensor)] = tensor
        if len(found) == 1 or (found and not only):
            return next(iter(found.values()))
        if found:
            break
    raise RuntimeError(
        f"the mask is drawn for {batch} images of {count} patches, but the arguments of the step hold {len(found)} "
        "tensors that could be these images: call evolution.see(images) before utils.random_token_mask(...)"
    )


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict | list | tuple):
        for value in given.values() if isinstance(given, dict) else given:
            yield from _tensors(value)
