"""What every integration returns: the masks of one model, and what moves them along."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from itertools import zip_longest
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from ..grid import Grid, GridSize, check_grid, resolve_grid, times
from ..masks import MaskedPatches, Masking
from ..masks.base import check_masking
from ..masks.fixed import FixedDraws, kept_random_states
from ..parts import labels_to_parts, segmentation
from ..teachers import PartTeacher
from ..teachers.average import unwrap
from ..teachers.encoder import entry_of
from ..teachers.host_method import Handler, is_replaced, replace_method, restore_method
from ..teachers.patch_grid import patch_grid
from ..teachers.trial import check_patches
from .eager import Eager
from .forward_pass import ForwardPass, Given, PastMasks, backward_run, is_same_memory
from .optimizer_steps import call_after_steps, is_active, unwrap_optimizer
from .usage import Usage

Teacher = PartTeacher | Callable[..., Any]

HOW_TO_GET_A_TEACHER = "pass PartTeacher(model, GraphCutPartitioner(), total_epochs=epochs)"
LATER = ("_local", "_lock", "_past", "_followed", "_eagerly", "_run_pass_eagerly")
"""What belongs to a process, and is neither copied nor pickled."""

_evolving: WeakSet[nn.Module] = WeakSet()


class Evolution:
    """Masks in somebody else's model. Made by `apply_to_...`, which says where the model asks for them.

    It can be pickled with its model, as where processes are spawned; `follow` the optimizer anew then.

    Args:
        model: the model that is masked.
        masking: the mask.
        teacher: where the mask gets its parts from: a PartTeacher, or any callable from images [B, C, height, width] to
            integer labels, [B, N] or, of any size, [B, h, w]. None for a mask that needs no parts, and where they come
            with each batch: ``see(parts=labels)``.
        student: what the teacher follows; the model where None.
        where: what asks for masks in this model, for warnings.
        grid_size: of its patches, where the model does not tell: (L,), (H, W), (T, H, W) or (D, H, W).

    Attributes:
        last_mask: the last mask, [B, N] float32, 0 keep, 1 remove; None before the first.
        last_parts: the parts that it was made from, [B, N] int64; None where it needed none.
        is_removed: whether `remove` was called. After it, methods that would move or fix masks raise a RuntimeError.

    Raises:
        TypeError: where the masking or the teacher is none.
        ValueError: where the model has evolving masks already, hides the size of its patches or is in FSDP1, or where
            the teacher was built for another architecture or length of training.
    """

    def __init__(
        self,
        model: nn.Module,
        masking: Masking,
        teacher: Teacher | None,
        student: nn.Module | None = None,
        where: str = "the model",
        grid_size: GridSize | None = None,
    ) -> None:
        self.model, self.masking, self.teacher = model, masking, teacher
        self.student = model if student is None else student
        if model in _evolving:
            name = type(model).__name__
            raise ValueError(f"this {name} has evolving masks already: call evolution_of(model).remove() first")
        check_masking(masking)
        _check_teacher(teacher, self.student)
        epochs, teachers = (getattr(each, "total_epochs", None) for each in (masking, teacher))
        if None not in (epochs, teachers) and epochs != teachers:
            raise ValueError(f"the masking has total_epochs={epochs}, its teacher {teachers}: give both the same")
        self.total_epochs = teachers if epochs is None else epochs
        self.last_mask: Tensor | None = None
        self.last_parts: Tensor | None = None
        self.undo: list[Callable[[], Any]] = []
        needs_parts = any(getattr(mask, "needs_parts", False) for mask in masking.modules())
        self._takes_parts = needs_parts or teacher is not None
        self._grid_size = None if grid_size is None else check_grid(grid_size)
        self._has_grid = self._find_grid()
        self._has_epoch = not any(hasattr(part, "set_epoch") for part in (masking, teacher))
        self._usage = Usage(self.student, where)
        self._usage.expect_updates(teacher)
        self._fixed: FixedDraws | None = None
        self.is_removed = self._had_labels = False
        self._begin()

    def _begin(self) -> None:
        """Make what belongs to this process."""
        self._local = threading.local()  # no class of our own, for torch.compile loses what it sets there
        self._lock = threading.RLock()
        self._past = PastMasks()
        self._followed: WeakKeyDictionary[Any, RemovableHandle] = WeakKeyDictionary()
        self._eagerly = Eager(_call)
        self._run_pass_eagerly = Eager(_run_pass_now, recursive=False)  # what it calls is compiled
        if not self.is_removed:
            _evolving.add(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in LATER}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._usage.expect_updates(self.teacher)  # for no optimizer is followed here yet
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Evolution:
        """A copy of a model shares its masks."""
        return self

    def __repr__(self) -> str:
        teacher = type(self.teacher).__name__ if isinstance(self.teacher, nn.Module) else self.teacher
        facts = {"epoch": self.epoch, "alpha": self.alpha, "num_parts": self.num_parts}
        now = ", ".join(f"{name}={value:.4g}" for name, value in facts.items() if value is not None)
        what = f"{type(self.model).__name__}, {type(self.masking).__name__}, teacher={teacher}"
        return f"Evolution({what}{', ' * bool(now)}{now}{', removed' * self.is_removed})"

    @property
    def epoch(self) -> float | None:
        """The epoch that the masks are at, counted from 0; None where nothing of them has one."""
        epochs = (getattr(part, "epoch", None) for part in (self.masking, self.teacher))
        return next((float(epoch) for epoch in epochs if epoch is not None), None)

    @property
    def alpha(self) -> float | None:
        """The weight of the mask's end, in [0, 1]; None where the mask does not evolve."""
        alpha = getattr(self.masking, "alpha", None)
        return None if alpha is None else float(alpha)

    @property
    def num_parts(self) -> float | None:
        """How many parts an image of the last mask has, on average; None where it needed none."""
        parts = self.last_parts
        if parts is None or not parts.numel():
            return None
        return float((parts.sort(1).values.diff(dim=1) != 0).sum(1).add(1).float().mean())

    def set_epoch(self, epoch: float) -> Evolution:
        """Move the mask and the teacher to an epoch, and return the evolution.

        The epoch is counted from 0; fractions are progress within an epoch. It is clamped to the training, with one
        UserWarning where it is below 0 or above total_epochs.
        """
        self._check_active("set_epoch")
        self._has_epoch = True
        self._usage.check_masks()
        for part in (self.masking, self.teacher):
            if hasattr(part, "set_epoch"):
                cast(Any, part).set_epoch(epoch)
        return self

    def update(self) -> None:
        """Move the teacher towards the model: call it after each optimizer step, on every rank, or `follow` does."""
        self._check_active("update")
        self._usage.check_masks()
        if hasattr(self.teacher, "update"):
            self._usage.note_update()
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
        self._check_active("follow")
        optimizer = unwrap_optimizer(optimizer)
        if is_active(self._followed.get(optimizer)):
            raise ValueError(f"this {type(optimizer).__name__} is followed already: call follow(optimizer) once")
        handle = self._followed[optimizer] = call_after_steps(optimizer, lambda: self.update())
        return handle

    def see(self, images: Tensor | None = None, parts: Any = None, ignore: int | None = None) -> None:
        """Say what the next forward pass of this thread, or the one that is under way, is given.

        Args:
            images: whose patches are masked next, where the model does not show them itself: [B, C, height, width].
            parts: that came with the batch, in place of the teacher's: integer labels [B, N], or [B, h, w] of any
                size. They are used for one batch of images, and forgotten at the end of the pass.
            ignore: a label that does not vote, as for `parts_from_segmentation`.

        Raises:
            TypeError: where the parts are no array or tensor.
            ValueError: where neither is given, or the parts are no such labels.
            RuntimeError: where parts were given last and no forward pass began since; those are forgotten.
        """
        self._check_active("see")
        if images is None and parts is None:
            raise ValueError("see() got neither images nor parts: pass images=..., parts=..., or both")
        if images is not None and images.ndim < 4 and not images.is_floating_point():
            raise ValueError(
                f"images has dtype {images.dtype} and shape {list(images.shape)}, as labels have: call "
                "see(parts=labels)"
            )
        given = self._given
        given.images = given.images if images is None else images
        if parts is None or not self._takes_parts:
            return
        was_given = given.labels is not None and given.labelled is None
        given.labels, given.labelled, given.ignore = None, None, ignore
        if was_given:
            raise RuntimeError(
                "parts were given twice, with no mask in between: call evolution.see(parts=...) once for each batch, "
                "in the thread that calls the model (nn.DataParallel has its own: use DistributedDataParallel)"
            )
        given.labels = segmentation.check_labels(parts)

    @contextmanager
    def fixed(self, seed: int = 0) -> Iterator[None]:
        """Draw the same masks in every pass over the same images: ``with evolution.fixed(): validate(model)``.

        The mask of an image depends on the seed and on how many images came before it in the context, in batches of any
        size; of several ranks, each is taken to have every so many-th image, as DistributedSampler gives them. So do
        the parts of a teacher that draws, such as one with an EMPartitioner, which is then asked for one image at a
        time. torch's random states are afterwards what they were before.

        Args:
            seed: any whole number of at least 0.
        """
        self._check_active("fixed")
        before, self._fixed = self._fixed, FixedDraws(seed, *_ranks())
        try:
            with kept_random_states():
                yield
        finally:
            self._fixed = before

    def state_dict(self) -> dict[str, Any]:
        """The state of the mask and of the teacher, to be saved with the model's.

        Its tensors are copies: a distributed checkpoint, which is loaded in place, changes nothing before
        `load_state_dict` has accepted it.
        """
        teacher = _copied(cast(Any, self.teacher).state_dict()) if self._has_state else None
        return {"masking": _copied(self.masking.state_dict()), "teacher": teacher, "total_epochs": self.total_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. One that is refused changes nothing.

        Raises:
            TypeError: where it is no dictionary.
            ValueError: where the state has a teacher and this has none, or the other way round, or where it is that of
                a training of another length.
        """
        _check_state(state, self._has_state, self.total_epochs)
        before = _copied(self.masking.state_dict())
        self.masking.load_state_dict(state["masking"])
        if self._has_state:
            try:
                cast(Any, self.teacher).load_state_dict(state["teacher"])
            except Exception:
                self.masking.load_state_dict(before)
                raise
        self._has_epoch = True

    def remove(self) -> None:
        """Give the model its own masks back, and copies of it theirs."""
        self.is_removed = True
        _evolving.discard(self.model)
        for handle in self._followed.values():
            handle.remove()
        while self.undo:
            self.undo.pop()()

    # Below: what integrations are made of.

    def replace(self, owner: nn.Module, name: str, handler: Handler) -> None:
        """Let `handler(evolution, module, own, *args, **kwargs)` answer calls of a method of a module until `remove`.

        It gets the module, or its copy, and its own method. It must be a function of a module, or a partial of one.
        """
        replace_method(owner, name, self, handler)
        self.undo.append(partial(restore_method, owner, name))

    def note_images(self, embed: nn.Module) -> None:
        """Note the images of each forward pass, by its entry and by the module that embeds patches, until `remove`."""
        entry = entry_of(self.model)
        self.replace(*entry, partial(_run_pass, True))  # a teacher is given the images that this method is
        for name in ("forward", "forward_encoder", "forward_features"):
            if hasattr(self.model, name) and (self.model, name) != entry:
                self.replace(self.model, name, partial(_run_pass, False))
        self.undo.append(embed.register_forward_hook(partial(_note_embedding, self), with_kwargs=True).remove)

    @contextmanager
    def forward_pass(self, module: nn.Module, images: list[Tensor]) -> Iterator[None]:
        """What happens in this context belongs to one forward pass of a module."""
        outer = self._passes[-1] if self._passes and self._passes[-1].module is module else None
        this = ForwardPass(module, images, self._take_given() if outer is None else outer.given)
        self._passes.append(this)
        try:
            yield
        finally:
            self._passes.remove(this)
        if outer is not None:
            outer.is_masked |= this.is_masked
            outer.embedded += [] if this.is_masked else this.embedded
        elif this.embedded and not this.is_masked and module.training and torch.is_grad_enabled():
            self._usage.end_pass()

    def mask(self, x: Tensor, keep: int, grid_size: Grid | None = None, images: Tensor | None = None) -> MaskedPatches:
        """Let `keep` of the patches x, [B, N, D], of the images of this forward pass stay, or of those that are named.

        Their grid is that of the model where `grid_size` is None.
        """
        self._usage.is_masked = True
        if not self._has_epoch and self.model.training:
            self._has_epoch = True
            self._eagerly(_warn_of_epoch)
        if self._takes_parts or self._fixed is not None or _ranks()[1] > 1:
            masked: MaskedPatches = self._eagerly(Evolution._mask, self, x, keep, grid_size, images)
        else:
            grid_size = grid_size or self._grid_of(x, getattr(self._local, "shape", None))
            masked = self.masking(x, keep=keep, grid_size=grid_size)
        self.last_mask = masked.mask.detach()
        return masked

    def _mask(self, x: Tensor, keep: int, grid_size: Grid | None, images: Tensor | None) -> MaskedPatches:
        """Outside of a compiled model, which can trace neither a teacher nor a generator."""
        parts = None
        for each in self._passes[-1:]:
            each.is_masked = True
        if self._takes_parts:
            if self.masking.needs_parts and self.model.training and torch.is_grad_enabled():
                self._usage.check_updates()
            with torch.no_grad():
                parts, grid_size = self._parts(x, grid_size, images)
        grid_size = grid_size or self._grid_of(x, getattr(self._local, "shape", None))
        self.last_parts = parts
        if self._fixed is not None:
            return self._fixed.mask(self.masking, x, keep, parts, grid_size)
        generator = _generator_of_rank(x.device)
        return cast(MaskedPatches, self.masking(x, keep=keep, parts=parts, generator=generator, grid_size=grid_size))

    def _parts(self, x: Tensor, grid_size: Grid | None, images: Tensor | None) -> tuple[Tensor | None, Grid]:
        """The parts of the images whose patches are x, and the grid of these."""
        given = self._passes[-1].given if self._passes else self._take_given()
        images, embedded = self._find_images(x, given) if images is None else (images, images)
        run = backward_run()
        past = None if run is None else self._past.find(images, run)
        if past is not None:  # activation checkpointing repeats that mask
            images = past[0]
        elif run is not None and self._had_labels:
            raise RuntimeError(
                "activation checkpointing repeats a mask whose labels are not found, for its images are made anew in "
                "each pass: checkpoint the blocks of the model, not the whole step"
            )
        grid_size = grid_size or self._grid_of(x, images)
        parts = self._given_parts(given, images, grid_size) if past is None else past[1]
        if past is None:
            self._past.add(images, embedded, parts)
        if parts is None and self.masking.needs_parts:
            with self._lock:  # for a model that is read has hooks, which other threads would run into
                parts = self._ask_teacher(images, grid_size)
        return parts, grid_size

    def _find_images(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """The images whose patches are x, and what the model embedded of them."""
        if given.images is not None:
            images, given.images = given.images, None
            return images, images
        if self._passes:
            # Where the embedding does not tell the grid, it may have taken them in pieces.
            whole = [each.images[0] for each in self._passes if self._grid_size and len(each.images) == 1]
            found = (whole[-1], whole[-1]) if whole else self._passes[-1].images_of(x)
        else:  # another method than those that begin a pass embeds and masks
            last, self._local.last = getattr(self._local, "last", None), None
            taken = None if last is None else last()
            found = None if taken is None else (taken, taken)
        return found or self._refuse_patches()

    def _refuse_patches(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self.model).__name__} masks patches of images that it has not embedded in this forward pass: call "
            "the whole model. With activation checkpointing, checkpoint the model or its blocks, so that images are "
            "embedded again where they are masked again"
        )

    def _grid_of(self, x: Tensor, images: Tensor | None) -> Grid:
        if self._grid_size is not None:
            own = said = resolve_grid(x.shape[1], self._grid_size)
            with suppress(ValueError):  # where the patch embedding does not tell
                own = said if images is None else patch_grid(self.model, images)
            if own != said and math.prod(own) == x.shape[1]:
                raise ValueError(f"grid_size={said} was said, but the patch embedding makes {times(own)} patches")
            return said
        if not self._has_grid:  # it does not matter where patches lie
            return resolve_grid(x.shape[1], self.masking.grid_size or (1, x.shape[1]))
        images = self._refuse_patches() if images is None else images
        grid = patch_grid(self.model, images)
        if math.prod(grid) != x.shape[1]:
            made = f"{times(grid)} patches of images of shape {list(images.shape[1:])}, but N={x.shape[1]} are masked"
            how = "say how they lie with grid_size=(T, H, W), the last axis fastest, where masks are applied"
            raise ValueError(f"the patch embedding of {type(self.model).__name__} makes {made}: {how}")
        return grid

    def _given_parts(self, given: Given, images: Tensor, grid_size: Grid) -> Tensor | None:
        """The parts that came with these images, if any."""
        labels = given.labels
        if labels is None or not (given.labelled is None or is_same_memory(given.labelled, images)):
            return None
        given.labelled, self._had_labels = images, True
        return self._to_parts(labels, images, grid_size, given.ignore)

    def _to_parts(self, labels: Tensor, images: Tensor, grid_size: Grid, ignore: int | None) -> Tensor:
        """Labels of images, which a caller or a teacher gave, on the patch grid."""
        if len(labels) != len(images):
            raise ValueError(
                f"parts has shape {list(labels.shape)}, but {len(images)} images are masked: give the parts of these, "
                "[B, N] or [B, h, w]. A map [h, w] alone is labels[None]"
            )
        if labels.ndim > 2 and not self._has_grid:
            raise ValueError(
                f"parts has shape {list(labels.shape)}, but this {type(self.model).__name__} has no patch grid for "
                f"maps: give labels of patches, [B, {math.prod(grid_size)}]"
            )
        return labels_to_parts(labels.to(images.device), grid_size, ignore)

    def _ask_teacher(self, images: Tensor, grid_size: Grid) -> Tensor:
        if self.teacher is None:
            raise ValueError(
                f"{type(self.masking).__name__} needs parts, but has no teacher, and none were given for these images: "
                f"{HOW_TO_GET_A_TEACHER} as teacher to apply_to_..., or call evolution.see(parts=labels) for each batch"
            )
        if isinstance(self.teacher, PartTeacher):
            if self.teacher.epoch.device != images.device:  # the model was moved after the teacher was built
                self.teacher.to(images.device)
            self.teacher.catch_up(self.student)
        also = {"grid_size": grid_size} if _has_parameter(self.teacher, "grid_size") else {}
        return self._to_parts(_ask(partial(self.teacher, **also), images, self._fixed), images, grid_size, None)

    def _find_grid(self) -> bool:
        """Whether patches lie on a known grid. A mask or a teacher that needs one is refused here without."""
        if self._grid_size is not None:
            return True
        if self._takes_parts or self.masking.needs_grid:
            try:
                check_patches(self.model)
                return True
            except ValueError:
                if self.masking.needs_grid or self.teacher is not None:
                    raise
        return False

    @property
    def _passes(self) -> list[ForwardPass]:
        """The forward passes of this thread that are under way, the innermost last."""
        return cast(list[ForwardPass], vars(self._local).setdefault("passes", []))

    @property
    def _given(self) -> Given:
        """What was given for the forward pass that is under way in this thread or, where none is, for the next."""
        waiting = vars(self._local).setdefault("waiting", Given())
        return self._passes[-1].given if self._passes else waiting

    def _take_given(self) -> Given:
        if backward_run() is not None:  # what waits is for the next batch
            return Given()
        return cast(Given, vars(self._local).pop("waiting", None) or Given())

    def _check_active(self, name: str) -> None:
        if self.is_removed:
            raise RuntimeError(f"{name}() was called after remove(): apply masks to the model anew with apply_to_...")

    @property
    def _has_state(self) -> bool:
        """Whether the teacher changes over training."""
        return hasattr(self.teacher, "set_epoch") and hasattr(self.teacher, "state_dict")


def _run_pass(shows_images: bool, evolution: Evolution, module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of the model as a forward pass, or as a part of one."""
    if not torch.compiler.is_compiling():
        return _run_pass_now(shows_images, evolution, module, own, *args, **kwargs)
    if evolution._takes_parts:
        return evolution._run_pass_eagerly(shows_images, evolution, module, own, *args, **kwargs)
    return own(*args, **kwargs)


def _run_pass_now(shows_images: bool, evolution: Evolution, module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)] if shows_images else []
    with evolution.forward_pass(module, [value for value in tensors if value.shape == tensors[0].shape]):
        return own(*args, **kwargs)


def _note_embedding(evolution: Evolution, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """After the patch embedding of the model, or of a copy."""
    if evolution.is_removed:
        return
    taken = args[0] if args else next(iter(kwargs.values()))
    if module.training and torch.is_grad_enabled():
        evolution._usage.is_embedded = True
    evolution._local.shape = taken.new_empty((0, *taken.shape[1:]))  # no images, which would stay in memory
    if not torch.compiler.is_compiling():
        _note_embedding_now(evolution, taken, output)
    elif evolution._takes_parts:
        evolution._eagerly(_note_embedding_now, evolution, taken, output)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _note_embedding_now(evolution: Evolution, taken: Tensor, made: Any) -> None:
    for each in evolution._passes[-1:]:
        each.note_embedding(taken, made)
    evolution._local.last = None if evolution._passes else TensorWeakRef(taken)


def evolution_of(model: nn.Module) -> Evolution | None:
    """The masks that evolve in a model, such as one that was saved whole and loaded; None where it has none.

    Examples:
        >>> import timm
        >>> from maskevolve import GridMask
        >>> from maskevolve.integrations import apply_to_timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.75)
        >>> evolution = apply_to_timm(vit, GridMask())
        >>> evolution_of(vit) is evolution
        True
    """
    values = (value for module in unwrap(model).modules() for value in vars(module).values())
    return next((value.args[1] for value in values if is_replaced(value)), None)


def import_host(name: str, package: str) -> Any:
    """A module of a package that need not be installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install {package}") from error


def _ask(teacher: Callable[[Tensor], Any], images: Tensor, fixed: FixedDraws | None) -> Tensor:
    """What a teacher says; while masks are fixed, one that draws is asked for one image at a time, each with a seed."""
    if fixed is None:
        return segmentation.check_labels(teacher(images))
    with kept_random_states():
        before = _random_states(images.device)
        labels = segmentation.check_labels(teacher(images))
        if all(map(torch.equal, before, _random_states(images.device))):
            return labels
        drawn = []
        for index in range(len(images)):
            torch.default_generator.manual_seed(fixed.seed_of(index))
            if images.is_cuda:
                torch.cuda.default_generators[images.device.index].manual_seed(fixed.seed_of(index))
            drawn.append(segmentation.check_labels(teacher(images[index : index + 1])))
        return torch.cat(drawn) if drawn else labels


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _check_teacher(teacher: Any, student: nn.Module) -> None:
    """Refuse what cannot turn images into labels, and an average that could not follow the student."""
    if teacher is None:
        return
    wants_affinity = isinstance(teacher, nn.Module) and _has_parameter(teacher, "affinity")
    if isinstance(teacher, type | Masking) or not callable(teacher) or wants_affinity:
        raise TypeError(
            f"teacher={teacher!r} is no PartTeacher, and no function from images to labels: {HOW_TO_GET_A_TEACHER}"
        )
    if not isinstance(teacher, PartTeacher):
        return
    _refuse_fsdp1(student)
    models = (teacher.model.module, student)
    both = zip_longest(*([(name, list(value.shape)) for name, value in each.named_parameters()] for each in models))
    if different := next((pair for pair in both if pair[0] != pair[1]), None):
        raise ValueError(
            f"the teacher was built for another architecture than this {type(student).__name__}: the teacher has the "
            f"parameter {different[0]}, the model {different[1]}. Build it from this model: PartTeacher(model, ...)"
        )


def _has_parameter(function: Any, name: str) -> bool:
    """Whether a function or module can be called with an argument of this name."""
    try:
        parameters = signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # of some built-in functions
        return False
    return name in parameters and parameters[name].kind is not Parameter.POSITIONAL_ONLY


def _refuse_fsdp1(student: nn.Module) -> None:
    """FSDP1 flattens weights and keeps a shard of them, from which no average can be made."""
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in student.parameters()):
        raise ValueError(
            f"this {type(student).__name__} is sharded by FullyShardedDataParallel (FSDP1), whose weights no "
            "teacher can follow: shard it with torch.distributed.fsdp.fully_shard (FSDP2) after the teacher was built, "
            "or give parts from elsewhere, as a function from images to labels or with evolution.see(parts=labels)"
        )


def _check_state(state: Any, has_teacher: bool, total_epochs: float | None) -> None:
    """Refuse what is no state of an evolution, or that of another."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state={state!r:.100} is no state of an evolution: read the file with torch.load first")
    if not {"masking", "teacher"} <= state.keys():
        keys = ", ".join(map(str, [*state][:5]))
        raise ValueError(f"no state of an evolution has the keys {keys}: pass what evolution.state_dict() returned")
    if (state["teacher"] is None) == has_teacher:
        ours, theirs = ("a teacher", "none") if has_teacher else ("no teacher", "one")
        raise ValueError(f"this evolution has {ours}, the saved state {theirs}: resume with the masks it began with")
    epochs = state.get("total_epochs")  # older states do not have it
    if None not in (epochs, total_epochs) and epochs != total_epochs:
        raise ValueError(f"the saved state has total_epochs={epochs}, these masks {total_epochs}: resume with the same")


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with tensors of its own."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _warn_of_epoch() -> None:
    warnings.warn(
        "the masks follow the epoch, which nothing has set: call evolution.set_epoch(epoch) at the start of each "
        "epoch. Until then the masks are those of the start. This warning is given once.",
        stacklevel=4,
    )


def _ranks() -> tuple[int, int]:
    """Of this process, and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _generator_of_rank(device: torch.device) -> torch.Generator | None:
    """A source of randomness that differs between ranks even where all were seeded alike, and follows that seed."""
    rank, ranks = _ranks()
    if ranks == 1:
        return None
    seed = int(torch.randint(1 << 62, ())) + rank * 0x1E3779B97F4A7C15
    return torch.Generator(device).manual_seed(seed % (1 << 63))
