"""What every integration returns: the masks of one model, and what moves them along."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from inspect import signature
from itertools import zip_longest
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..attention import patch_grid
from ..functional import MaskedPatches, resolve_grid
from ..masks import Masking
from ..teacher import PartTeacher

__all__ = ["Evolution"]

F = TypeVar("F", bound=Callable[..., Any])

_evolving: WeakSet[nn.Module] = WeakSet()


def eager(function: F, **options: Any) -> F:
    """What torch.compile runs as it is: `torch.compiler.disable`, which has no types."""
    return cast(F, torch.compiler.disable(function, **options))


class Evolution:
    """Masks in somebody else's model. Made by `apply_to_...`, which says where the model draws them.

    Args:
        model: the model whose masks are drawn here.
        masking: the mask.
        teacher: where the mask gets its parts from; None for a mask that needs none.
        student: what the teacher follows; the model where None.

    Raises:
        TypeError: where the masking or the teacher is none.
        ValueError: where the model has evolving masks already, where the masking needs parts and there is no teacher,
            where the teacher was built for another architecture or length of training, or where the model hides the
            size of its patches.
    """

    def __init__(
        self, model: nn.Module, masking: Masking, teacher: PartTeacher | None, student: nn.Module | None = None
    ) -> None:
        self.model, self.masking, self.teacher = model, masking, teacher
        self.student = model if student is None else student
        if model in _evolving:
            raise ValueError(f"this {type(model).__name__} has evolving masks already: call .remove() on them first")
        if not isinstance(masking, nn.Module):
            raise TypeError(f"masking={masking!r} is no mask: pass an instance, such as EvolvingMask(epochs)")
        if not (teacher is None or isinstance(teacher, PartTeacher)):
            raise TypeError(f"teacher={teacher!r} is no PartTeacher: {HOW_TO_GET_A_TEACHER}")
        if teacher is None and any(getattr(mask, "needs_parts", False) for mask in masking.modules()):
            raise ValueError(
                f"{type(masking).__name__} needs parts, but there is no teacher to cut them: {HOW_TO_GET_A_TEACHER}"
            )
        if teacher is not None:
            _check_teacher(teacher, self.student)
        epochs, teachers = (getattr(each, "total_epochs", None) for each in (masking, teacher))
        if None not in (epochs, teachers) and epochs != teachers:
            raise ValueError(f"the masking has total_epochs={epochs}, its teacher {teachers}: give both the same")
        patch_grid(model, torch.empty(1, 3, 224, 224, device="meta"))  # refuses here what it would in the first step
        self.last_mask: Tensor | None = None
        self._images: Tensor | None = None
        self._has_epoch = teacher is None and not hasattr(masking, "set_epoch")
        self._is_removed = False
        self._undo = ExitStack()
        _evolving.add(model)
        self._undo.callback(_evolving.discard, model)

    def set_epoch(self, epoch: float) -> Evolution:
        """Move the mask and the teacher to an epoch, and return the evolution.

        Args:
            epoch: counted from 0; fractions are progress within an epoch. Clamped to the training.
        """
        self._has_epoch = True
        for part in (self.masking, self.teacher):
            if hasattr(part, "set_epoch"):
                cast(Any, part).set_epoch(epoch)
        return self

    def update(self) -> None:
        """Move the teacher towards the model: call it after each optimizer step, on every rank."""
        if self.teacher is not None:
            self.teacher.update(self.student)

    def state_dict(self) -> dict[str, Any]:
        """The state of the mask and of the teacher, to be saved with the model's."""
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return {"masking": self.masking.state_dict(), "teacher": teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: where the state has a teacher and this has none, or the other way round.
        """
        if (state["teacher"] is None) != (self.teacher is None):
            ours, theirs = ("no teacher", "one") if self.teacher is None else ("a teacher", "none")
            raise ValueError(
                f"this evolution has {ours}, the saved state {theirs}: resume with the masks it began with"
            )
        self.masking.load_state_dict(state["masking"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self._has_epoch = True

    def remove(self) -> None:
        """Give the model its own masks back."""
        self._is_removed = True
        self._undo.close()

    # Below: what integrations are made of.

    def replace(self, owner: nn.Module, name: str, value: Callable[..., Any]) -> None:
        """Set an attribute of a module until `remove`. Give it a function, which copies of the module then share."""
        before = vars(owner).get(name)
        vars(owner)[name] = value
        self._undo.callback(lambda: vars(owner).pop(name) if before is None else vars(owner).update({name: before}))

    def watch(self, embed: nn.Module) -> None:
        """See the images, the first argument of the module that embeds them, until `remove`."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see(args[0] if args else next(iter(kwargs.values())))

        self._undo.callback(embed.register_forward_pre_hook(see, with_kwargs=True).remove)

    def hook(self, module: nn.Module, change: Callable[[nn.Module, dict[str, Any]], dict[str, Any] | None]) -> None:
        """Let `change` say what a module, or its copy, is called with, until `remove`.

        It is called with the module and the arguments of the call by name; None leaves them as they are.
        """
        names = list(signature(type(module).forward).parameters)[1:]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if self._is_removed:  # and this module a copy that was made before
                return None
            changed = change(module, dict(zip(names, args, strict=False)) | kwargs)
            return None if changed is None else ((), changed)

        self._undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def see(self, images: Tensor) -> None:
        """Take the images whose patches are masked next."""
        self._images = images

    def mask(self, x: Tensor, mask_ratio: float, grid_size: tuple[int, int] | None = None) -> MaskedPatches:
        """Mask the patches [B, N, D] of the images that the model was given last; on its patch grid where None."""
        # Each batch of images is masked once, so that no patches are masked with the parts of other images.
        images, self._images = self._images, None
        if images is None:
            raise RuntimeError(
                f"{type(self.model).__name__} masks patches of images that it has not embedded since the last mask: "
                "call the whole model. With activation checkpointing, checkpoint the model or its blocks, so that "
                "images are embedded again where they are masked again"
            )
        if not self._has_epoch and self.model.training:
            self._has_epoch = True
            _warn_of_epoch()
        x = x.unflatten(1, grid_size or resolve_grid(x.shape[1], patch_grid(self.model, images)))
        if self.teacher is None and not _is_distributed():
            masked = cast(MaskedPatches, self.masking(x, mask_ratio))
        else:
            masked = self._mask_eagerly(x, mask_ratio, images)
        self.last_mask = masked.mask.detach()
        return masked

    @eager
    def _mask_eagerly(self, x: Tensor, mask_ratio: float, images: Tensor) -> MaskedPatches:
        """Outside of a compiled model, which can trace neither a teacher nor a generator."""
        parts, generator = self._parts(images), _generator_of_rank(x.device)
        return cast(MaskedPatches, self.masking(x, mask_ratio, parts=parts, generator=generator))

    def _parts(self, images: Tensor) -> Tensor | None:
        if self.teacher is None or not self.masking.needs_parts:
            return None
        if self.teacher.epoch.device != images.device:  # the model was moved after the teacher was built
            self.teacher.to(images.device)
        self.teacher.catch_up(self.student)
        return cast(Tensor, self.teacher(images))


def import_host(name: str, package: str) -> Any:
    """A module of a package that need not be installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install {package}") from error


HOW_TO_GET_A_TEACHER = "pass PartTeacher(model, GraphCutPartitioner(), total_epochs=epochs)"


def _check_teacher(teacher: PartTeacher, student: nn.Module) -> None:
    """Refuse a teacher whose average could not follow the student."""
    ours = [(name, list(value.shape)) for name, value in teacher.model.module.named_parameters()]
    theirs = [(name, list(value.shape)) for name, value in student.named_parameters()]
    if ours == theirs:
        return
    different = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
    raise ValueError(
        f"the teacher was built for another architecture than this {type(student).__name__}: the teacher has the "
        f"parameter {different[0]}, the model {different[1]}. Build it from this model: PartTeacher(model, ...)"
    )


@eager
def _warn_of_epoch() -> None:
    warnings.warn(
        "the masks follow the epoch, which nothing has set: call evolution.set_epoch(epoch) at the start of each "
        "epoch. Until then the masks are those of the start. This warning is given once.",
        stacklevel=4,
    )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _generator_of_rank(device: torch.device) -> torch.Generator | None:
    """A source of randomness that differs between ranks even where all were seeded alike, and follows that seed."""
    if not _is_distributed():
        return None
    seed = int(torch.randint(1 << 62, ())) + dist.get_rank() * 0x1E3779B97F4A7C15
    return torch.Generator(device).manual_seed(seed % (1 << 63))
