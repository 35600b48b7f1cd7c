"""Lightly's MAE (https://docs.lightly.ai/self-supervised-learning/examples/mae.html), in torch or in Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..masks.kinds import Masking
from ..teachers.teacher import PartTeacher, unwrap
from .evolution import Evolution, Teacher, eager, import_host
from .views import first_images, images_of

__all__ = ["apply_to_lightly", "lightning_callback"]

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""The methods of an MAE that take images and may draw a mask."""
DRAWS = ("random_token_mask", "random_grid_token_mask", "random_inverse_block_mask", "random_block_mask")
"""The functions of lightly.models.utils that draw a mask: they return (idx_keep, idx_mask), the last bool [B, H, W]."""
HOW_TO_DRAW = (
    "write `from lightly.models import utils` and call `utils.random_token_mask(...)`, `utils.random_block_mask(...)` "
    "or another in the `forward` or the `training_step` of the module that apply_to_lightly was given"
)


def apply_to_lightly(mae: nn.Module, masking: Masking, teacher: Teacher | None = None) -> Evolution:
    """Let an MAE in the shape of Lightly's examples mask with `masking`, in place of `utils.random_token_mask`.

    While `forward`, `training_step` or another step of the MAE runs, Lightly's functions `random_token_mask`,
    `random_grid_token_mask`, `random_inverse_block_mask` and `random_block_mask` draw from `masking`, for the images
    among the arguments of that step. The first three return indices of the shapes that they would have returned, except
    that no prefix token is ever masked; the last masks as many patches of each image as it would have masked.

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
    prefix: int = getattr(vit, "num_prefix_tokens", 1)

    def rank(step: _Step, batch: int, count: int, ratio: float, device: torch.device) -> Tensor:
        """The place of each patch [B, N] in the order in which they stay."""
        patches = torch.zeros(batch, count, 1, device=device)
        if evolution.images is None:
            evolution.see(_find_images(step, backbone, patches, masking.needs_parts))
        masked = evolution.mask(patches, ratio)
        return masked.ids_restore

    def draw(step: _Step, idx_keep: Tensor, idx_mask: Tensor) -> tuple[Tensor, Tensor]:
        batch, keep = idx_keep.shape[0], idx_keep.shape[1] - prefix
        count = keep + idx_mask.shape[1]
        ratio = max(0.0, 1 - (keep + 0.5) / count)  # half a patch more, against rounding
        order = rank(step, batch, count, ratio, idx_keep.device).argsort(1) + prefix
        before = torch.arange(prefix, device=order.device).expand(batch, -1)
        return torch.cat([before, order[:, :keep]], 1), order[:, keep:]

    def draw_blocks(step: _Step, counts: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if not isinstance(masking, Masking):
            raise TypeError(
                "random_block_mask masks another number of patches in each image, for which "
                f"{type(masking).__name__} must be a maskevolve.masks.Masking"
            )
        # Each image has its own number: the order of all patches says which.
        count = grid_size[0] * grid_size[1]
        place = rank(step, len(counts), count, 0.0, counts.device)
        return (place >= count - counts[:, None]).view(-1, *grid_size)

    for name in steps:
        evolution.replace(mae, name, _drawing_step(utils, draw, draw_blocks))
    for each in backbones:
        evolution.replace(each, "encode", _checked_encode(evolution))
    return evolution


def lightning_callback(evolution: Evolution) -> Any:
    """What moves an evolution along under Lightning: ``Trainer(..., callbacks=[lightning_callback(evolution)])``.

    It sets the epoch before each batch, fractions included, and updates the teacher after each step of an optimizer of
    the model (not of a probe beside it) that a GradScaler does not skip. Lightning's checkpoints hold the evolution, so
    that a resumed run goes on. `alpha` and `num_parts` are logged.

    Args:
        evolution: what `apply_to_lightly`, `apply_to_stable_pretraining` or any other integration returned.

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
            optimizers = _optimizers_of(evolution.student, trainer.optimizers)
            self.hooks = [evolution.follow(optimizer) for optimizer in optimizers]

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


def _optimizers_of(student: nn.Module, optimizers: list[Any]) -> list[Any]:
    """Those that train the student, not a probe beside it; all where its weights are in none, as in DeepSpeed."""
    weights = set(student.parameters())
    own = [each for each in optimizers if any(weights.intersection(group["params"]) for group in each.param_groups)]
    return own or optimizers


@dataclass
class _Step:
    """A step of an MAE that is under way in this thread."""

    given: Any
    draw: Callable[..., tuple[Tensor, Tensor]]
    draw_blocks: Callable[..., Tensor]
    outer: _Step | None
    has_drawn: bool = False


_current: ContextVar[_Step | None] = ContextVar("step", default=None)
_lock = Lock()
_steps_running = 0
_own: dict[str, Callable[..., Any]] = {}


def _is_written(method: Any) -> bool:
    """Whether a method is the user's, not one that every module has."""
    return method is not None and method.__module__.split(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def _drawing_step(
    utils: Any, draw: Callable[..., tuple[Tensor, Tensor]], draw_blocks: Callable[..., Tensor]
) -> Callable[..., Any]:
    """A method during which Lightly's functions draw ours."""

    def step(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _replaced(utils):
            token = _current.set(_Step((args, kwargs), draw, draw_blocks, _current.get()))
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
def _asking(own: Callable[..., Any]) -> Callable[..., Any]:
    """One of Lightly's functions, which asks the step that runs in this thread, if any."""

    @wraps(own)
    def random_mask(*args: Any, **kwargs: Any) -> Any:
        step = _current.get()
        if step is None:
            return own(*args, **kwargs)
        step.has_drawn = True
        if own.__name__ == "random_block_mask":
            return _ask_for_blocks(step, own, *args, **kwargs)
        idx_keep, idx_mask = own(*args, **kwargs)  # for their shapes and device, and for errors in the arguments
        idx_keep, idx_mask = step.draw(step, idx_keep, idx_mask)
        if own.__name__ == "random_inverse_block_mask":
            return idx_keep.sort(1).values, idx_mask.sort(1).values
        return idx_keep, idx_mask

    return eager(random_mask)


def _ask_for_blocks(step: _Step, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """As many patches of each image as Lightly's function masks, which waits for the device unless that is the CPU."""
    call = signature(own).bind(*args, **kwargs)
    device = call.arguments.get("device")
    call.arguments["device"] = "cpu"
    blocks = own(*call.args, **call.kwargs)
    counts = blocks.sum((1, 2)).to(torch.get_default_device() if device is None else device)
    return step.draw_blocks(step, counts, (blocks.shape[1], blocks.shape[2]))


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
        views = images_of(backbone, _tensors(giver.given), count)
        found |= {id(view): view for view in views if len(view) == batch}
        joined = None if found else first_images(views, batch)
        if joined is not None:
            return joined
        if len(found) == 1 or (found and not only):
            return next(iter(found.values()))
        if found:
            break
    raise RuntimeError(
        f"the mask is drawn for {batch} images of {count} patches, but the arguments of the step hold {len(found)} "
        "tensors that could be these images: call evolution.see(images) before the mask is drawn"
    )


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict | list | tuple):
        for value in given.values() if isinstance(given, dict) else given:
            yield from _tensors(value)
