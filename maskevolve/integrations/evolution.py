"""What every integration returns: the masks of one model, and what moves them along."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from inspect import signature
from itertools import zip_longest
from types import MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from ..grid import GridSize, resolve_grid
from ..masks.fixed import FixedDraws, kept_random_states
from ..masks.functional import MaskedPatches
from ..masks.kinds import Masking
from ..teachers.encoder import check_patches
from ..teachers.patch_grid import patch_grid
from ..teachers.random_masking import host_method
from ..teachers.teacher import PartTeacher
from .follow import call_after_steps, is_active, unwrap_optimizer
from .labels import HOW_TO_GET_A_TEACHER, check_labels, check_teacher, labels_to_grid, takes_argument
from .watch import Watch

__all__ = ["Evolution", "Teacher"]

F = TypeVar("F", bound=Callable[..., Any])

Teacher = PartTeacher | Callable[..., Any]

_evolving: WeakSet[nn.Module] = WeakSet()


def eager(function: F, **options: Any) -> F:
    """What torch.compile runs as it is: `torch.compiler.disable`, which has no types."""
    return cast(F, torch.compiler.disable(function, **options))


class Evolution:
    """Masks in somebody else's model. Made by `apply_to_...`, which says where the model draws them.

    Args:
        model: the model whose masks are drawn here.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher, or any callable from images [B, C, height, width] to
            integer labels, [B, N] or, of any size, [B, h, w]. None for a mask that needs no parts, and where they come
            with each batch: ``see(parts=labels)``.
        student: what the teacher follows; the model where None.
        where: what draws masks in this model, for messages.

    Attributes:
        last_mask: the last mask that was drawn, [B, N] float32, 0 keep, 1 remove; None before the first.
        last_parts: the parts that it was drawn from, [B, N]; None where it needed none.

    Raises:
        TypeError: where the masking or the teacher is none.
        ValueError: where the model has evolving masks already, where the teacher was built for another architecture or
            length of training, where it would have to follow a model in FSDP1, or where the model hides the size of
            its patches.
    """

    def __init__(
        self,
        model: nn.Module,
        masking: Masking,
        teacher: Teacher | None,
        student: nn.Module | None = None,
        where: str = "the model",
    ) -> None:
        self.model, self.masking, self.teacher = model, masking, teacher
        self.student = model if student is None else student
        if model in _evolving:
            raise ValueError(f"this {type(model).__name__} has evolving masks already: call .remove() on them first")
        if not isinstance(masking, nn.Module):
            raise TypeError(f"masking={masking!r} is no mask: pass an instance, such as EvolvingMask(epochs)")
        check_teacher(teacher)
        if isinstance(teacher, PartTeacher):
            _refuse_fsdp1(self.student)
            _check_architecture(teacher, self.student)
        epochs, teachers = (getattr(each, "total_epochs", None) for each in (masking, teacher))
        if None not in (epochs, teachers) and epochs != teachers:
            raise ValueError(f"the masking has total_epochs={epochs}, its teacher {teachers}: give both the same")
        self.total_epochs = teachers if epochs is None else epochs
        self.last_mask: Tensor | None = None
        self.last_parts: Tensor | None = None
        # What a thread has seen since its last mask: nn.DataParallel, for one, runs a model in several threads. No
        # class of our own, for torch.compile loses what it sets there.
        self._seen = threading.local()
        self._masked_before: tuple[Tensor, int, Tensor] | None = None
        needs_parts = any(getattr(mask, "needs_parts", False) for mask in masking.modules())
        self._takes_parts = needs_parts or teacher is not None
        self._needs_grid = self._takes_parts or getattr(masking, "needs_grid", True)
        if self._needs_grid:
            check_patches(model)  # refuses here what it would in the first step
        self._has_epoch = not any(hasattr(part, "set_epoch") for part in (masking, teacher))
        self._watch = Watch(self.student, where, hasattr(teacher, "update") and getattr(teacher, "decay", 0) != 1)
        self._lock = threading.RLock()
        self._followed: WeakKeyDictionary[Any, RemovableHandle] = WeakKeyDictionary()
        self._fixed: FixedDraws | None = None
        self._is_removed = False
        self._undo = ExitStack()
        # No decorators: they import torch's compiler, which takes seconds, as soon as this package is imported.
        self._mask_eagerly, self._warn_of_epoch = eager(Evolution._mask_with_parts), eager(_warn_of_epoch)
        _evolving.add(model)
        self._undo.callback(_evolving.discard, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Evolution:
        """A copy of a model shares its masks."""
        return self

    def set_epoch(self, epoch: float) -> Evolution:
        """Move the mask and the teacher to an epoch, and return the evolution.

        Args:
            epoch: counted from 0; fractions are progress within an epoch. Clamped to the training.

        Warns:
            UserWarning: once, where the epoch is below 0 or above total_epochs.
        """
        self._has_epoch = True
        self._watch.check_masks()
        for part in (self.masking, self.teacher):
            if hasattr(part, "set_epoch"):
                cast(Any, part).set_epoch(epoch)
        return self

    def update(self) -> None:
        """Move the teacher towards the model: call it after each optimizer step, on every rank, or `follow` does."""
        self._watch.check_masks()
        self._watch.awaits_update = False
        if hasattr(self.teacher, "update"):
            if isinstance(self.teacher, PartTeacher):
                _refuse_fsdp1(self.student)
            cast(Any, self.teacher).update(self.student)

    def follow(self, optimizer: Any) -> RemovableHandle:
        """Call `update` after each step of an optimizer that is not skipped, until `remove`.

        Args:
            optimizer: one of torch or made like them, bare or wrapped by Accelerate or Lightning, or DeepSpeed's.

        Returns:
            A handle, whose ``.remove()`` ends it.

        Raises:
            TypeError: where it is none.
            ValueError: where it is followed already.

        Examples:
            >>> import timm
            >>> from maskevolve import EvolvingMask, GraphCutPartitioner
            >>> from maskevolve.integrations import apply_to_timm
            >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.75)
            >>> teacher = PartTeacher(vit, GraphCutPartitioner(), total_epochs=100)
            >>> handle = apply_to_timm(vit, EvolvingMask(100), teacher).follow(torch.optim.AdamW(vit.parameters()))
        """
        optimizer = unwrap_optimizer(optimizer)
        if is_active(self._followed.get(optimizer)):
            raise ValueError(f"this {type(optimizer).__name__} is followed already: call follow(optimizer) once")
        handle = self._followed[optimizer] = call_after_steps(optimizer, lambda: self.update())
        self._undo.callback(handle.remove)
        return handle

    def see(self, images: Tensor | None = None, parts: Tensor | None = None) -> None:
        """Take what the next mask of this thread is drawn for.

        Args:
            images: whose patches are masked, where the model does not show them itself: [B, C, height, width].
            parts: that came with the batch, in place of the teacher's: integer labels [B, N], or [B, h, w] of any
                size.

        Raises:
            TypeError: where the parts are no array or tensor.
            ValueError: where neither is given, or the parts are no such labels.
            RuntimeError: where no mask was drawn since parts were given last; those are forgotten.
        """
        if images is None and parts is None:
            raise ValueError("see() got neither images nor parts: pass images=..., parts=..., or both")
        if images is not None and images.ndim < 4 and not images.is_floating_point():
            raise ValueError(
                f"images has dtype {images.dtype} and shape {list(images.shape)}, as labels have: call "
                "see(parts=labels)"
            )
        if images is not None:
            self._seen.images = images
        if parts is None or not self._takes_parts:
            return
        was_given = getattr(self._seen, "parts", None) is not None
        self._seen.parts = None if was_given else check_labels(parts)
        if was_given:
            raise RuntimeError(
                "parts were given twice, with no mask in between: call evolution.see(parts=...) once for each batch, "
                "in the thread that calls the model (nn.DataParallel has its own: use DistributedDataParallel)"
            )

    @contextmanager
    def fixed(self, seed: int = 0) -> Iterator[None]:
        """Draw the same masks in every pass over the same images: ``with evolution.fixed(): validate(model)``.

        The mask of an image depends on the seed and on how many images came before it in the context, in batches of any
        size; of several ranks, each is taken to have every so many-th image, as DistributedSampler gives them. torch's
        random states are afterwards what they were before.

        Args:
            seed: any whole number of at least 0.
        """
        ranks = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
        before, self._fixed = self._fixed, FixedDraws(seed, *ranks)
        try:
            with kept_random_states():
                yield
        finally:
            self._fixed = before

    def state_dict(self) -> dict[str, Any]:
        """The state of the mask and of the teacher, to be saved with the model's."""
        teacher = cast(Any, self.teacher).state_dict() if self._has_state else None
        return {"masking": self.masking.state_dict(), "teacher": teacher, "total_epochs": self.total_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            TypeError: where it is no dictionary.
            ValueError: where the state has a teacher and this has none, or the other way round, or where it is that of
                a training of another length.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state={state!r:.100} is no state of an evolution: pass what evolution.state_dict() returned; where "
                "it was saved, read the file with torch.load first"
            )
        if not {"masking", "teacher"} <= state.keys():
            keys, more = ", ".join(map(str, [*state][:5])), f" and {len(state) - 5} more" if len(state) > 5 else ""
            raise ValueError(
                f"this is no state of an evolution, for it has the keys {keys}{more}: pass what evolution.state_dict() "
                "returned"
            )
        if (state["teacher"] is None) == self._has_state:
            ours, theirs = ("a teacher", "none") if self._has_state else ("no teacher", "one")
            raise ValueError(
                f"this evolution has {ours}, the saved state {theirs}: resume with the masks it began with"
            )
        epochs = state.get("total_epochs")  # older states do not have it
        if None not in (epochs, self.total_epochs) and epochs != self.total_epochs:
            raise ValueError(
                f"the saved state is that of a training of total_epochs={epochs}, but the masks were made with "
                f"{self.total_epochs}: resume with the same"
            )
        self.masking.load_state_dict(state["masking"])
        if self._has_state:
            cast(Any, self.teacher).load_state_dict(state["teacher"])
        self._has_epoch = True

    def remove(self) -> None:
        """Give the model its own masks back, and copies of it theirs."""
        self._is_removed = True
        self._undo.close()

    # Below: what integrations are made of.

    def replace(self, owner: nn.Module, name: str, value: Callable[..., Any]) -> None:
        """Set a method of a module until `remove`.

        `value` is called with the module, or its copy, and its own method as a function, before the arguments of the
        call.
        """
        before, own = vars(owner).get(name), _unbound(host_method(owner, name))

        @wraps(own)
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._is_removed:  # and this module a copy that was made before
                return own(module, *args, **kwargs)
            return value(module, own, *args, **kwargs)

        cast(Any, method).own = own
        # A method, so that a copy of the module (its average, say) runs its own weights.
        vars(owner)[name] = MethodType(method, owner)
        self._undo.callback(lambda: vars(owner).pop(name) if before is None else vars(owner).update({name: before}))

    def watch(self, embed: nn.Module) -> None:
        """See the images, the first argument of the module that embeds them, until `remove`."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._is_removed:
                self.embedding(module)
                self._seen.images = args[0] if args else next(iter(kwargs.values()))

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

    def embedding(self, module: nn.Module) -> None:
        """Note that a module embeds images now."""
        if module.training and torch.is_grad_enabled():
            self._watch.note_embedding()

    @property
    def images(self) -> Tensor | None:
        """The images of this thread that have not been masked yet."""
        return getattr(self._seen, "images", None)

    def mask(self, x: Tensor, mask_ratio: float, grid_size: tuple[int, int] | None = None) -> MaskedPatches:
        """Mask the patches [B, N, D] of the images that the model was given last; on its patch grid where None."""
        # Each batch of images is masked once, so that no patches are masked with the parts of other images.
        images, self._seen.images = getattr(self._seen, "images", None), None
        if images is None:
            raise RuntimeError(
                f"{type(self.model).__name__} masks patches of images that it has not embedded since the last mask: "
                "call the whole model. With activation checkpointing, checkpoint the model or its blocks, so that "
                "images are embedded again where they are masked again"
            )
        self._watch.is_masked = True
        if not self._has_epoch and self.model.training:
            self._has_epoch = True
            self._warn_of_epoch()
        x = x.unflatten(1, grid_size or resolve_grid(x.shape[1], self._grid(x, images)))
        if self._takes_parts or self._fixed is not None or _is_distributed():
            masked = self._mask_eagerly(self, x, mask_ratio, images)
        else:
            masked = cast(MaskedPatches, self.masking(x, mask_ratio))
        self.last_mask = masked.mask.detach()
        return masked

    def _grid(self, x: Tensor, images: Tensor) -> GridSize:
        if self._needs_grid:
            return patch_grid(self.model, images)
        return self.masking.grid_size or (1, x.shape[1])  # where patches lie does not matter

    def _mask_with_parts(self, x: Tensor, mask_ratio: float, images: Tensor) -> MaskedPatches:
        """Outside of a compiled model, which can trace neither a teacher nor a generator."""
        if self.masking.needs_parts and self.model.training and torch.is_grad_enabled():
            self._watch.check_updates()
        parts = self.last_parts = self._parts(images, (x.shape[1], x.shape[2]))
        if self._fixed is not None:
            return self._fixed.mask(self.masking, x, mask_ratio, parts)
        generator = _generator_of_rank(x.device)
        return cast(MaskedPatches, self.masking(x, mask_ratio, parts=parts, generator=generator))

    @torch.no_grad()
    def _parts(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor | None:
        parts = self._given_parts(images)
        if parts is None and self.masking.needs_parts:
            with self._lock:  # for a model that is read has hooks, which other threads would run into
                parts = self._ask_teacher(images, grid_size)
        return None if parts is None else labels_to_grid(parts.to(images.device), grid_size)

    def _given_parts(self, images: Tensor) -> Tensor | None:
        """The parts that came with these images, if any."""
        parts: Tensor | None = getattr(self._seen, "parts", None)
        self._seen.parts = None
        version = 0 if images.is_inference() else images._version
        if parts is None:
            # Activation checkpointing masks the same images again, maybe in another thread.
            before = self._masked_before
            is_again = before is not None and before[1] == version and _is_alias(before[0], images)
            return before[2] if before is not None and is_again else None
        if len(parts) != len(images):
            raise ValueError(
                f"parts of {len(parts)} images were given, of shape {list(parts.shape)}, but {len(images)} images are "
                "masked: call evolution.see(parts=...) with the parts of the batch that the model is then called with. "
                "A map [h, w] of one image is labels[None]"
            )
        self._masked_before = images, version, parts
        return parts

    def _ask_teacher(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.teacher is None:
            raise ValueError(
                f"{type(self.masking).__name__} needs parts, but there is no teacher to cut them and none were given "
                f"for these images. As a teacher, {HOW_TO_GET_A_TEACHER}, or any function from images to labels, to "
                "apply_to_...; or call evolution.see(parts=labels) before each batch"
            )
        if isinstance(self.teacher, PartTeacher):
            if self.teacher.epoch.device != images.device:  # the model was moved after the teacher was built
                self.teacher.to(images.device)
            _refuse_fsdp1(self.student)
            self.teacher.catch_up(self.student)
        also = {"grid_size": grid_size} if takes_argument(self.teacher, "grid_size") else {}
        parts = check_labels(self.teacher(images, **also))
        if len(parts) != len(images):
            raise ValueError(
                f"the teacher returned labels of {len(parts)} images for {len(images)}, of shape {list(parts.shape)}: "
                "return [B, N] or [B, h, w]. A map [h, w] of one image is labels[None]"
            )
        return parts

    @property
    def _has_state(self) -> bool:
        """Whether the teacher changes over training."""
        return hasattr(self.teacher, "set_epoch") and hasattr(self.teacher, "state_dict")


def import_host(name: str, package: str) -> Any:
    """A module of a package that need not be installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install {package}") from error


def _check_architecture(teacher: PartTeacher, student: nn.Module) -> None:
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


def _refuse_fsdp1(student: nn.Module) -> None:
    """FSDP1 flattens weights and keeps a shard of them, from which no average can be made."""
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in student.parameters()):
        raise ValueError(
            f"this {type(student).__name__} is sharded by FullyShardedDataParallel (FSDP1), whose weights no "
            "teacher can follow: shard it with torch.distributed.fsdp.fully_shard (FSDP2) after the teacher was built, "
            "or give parts from elsewhere, as a function from images to labels or with evolution.see(parts=labels)"
        )


def _unbound(method: Any) -> Callable[..., Any]:
    """The function of a method; of a function that is none, one that takes a module first, which it does not need."""
    if isinstance(method, MethodType):
        return method.__func__

    @wraps(method)
    def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


def _is_alias(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


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
