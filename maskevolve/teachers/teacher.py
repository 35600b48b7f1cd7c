"""Teachers: images to parts, by a slow copy of the model in training or by a pretrained model."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..checks import check_number, check_tensor, is_whole
from ..grid import Grid, GridSize, check_grid, repeat_along, times
from ..parts import PartHierarchy, parts_from_segmentation
from ..parts.affinity import interpolate
from ..precision import keep_dtype
from ..schedule import Schedule, clamp_epoch, num_parts_at, num_parts_by, warn_outside
from .attention import attention_affinity, token_affinity
from .average import move_average, refuse_sharded, tensors_of, unwrap
from .encoder import is_fatal, read_lock, untouched, without_hooks
from .host_method import restore_methods
from .patch_grid import patch_grid, whole_patches
from .stride import check_left, check_stride, leaves_enough
from .trial import check_affinity, trial_of, trials

Layers = Sequence[int] | Literal["middle", "tokens"] | None
NumParts = tuple[int, int] | Schedule
Self = TypeVar("Self", bound="_Teacher")


class _Teacher(nn.Module):
    """What both teachers do: read from a ViT what the patches of images have in common, and cut that into parts."""

    epoch: Tensor
    advice: str  # what to do where the model cannot read images
    # For images: the model, the dtypes that its tensors have while it runs, and the images that it sees.
    _model_for: Callable[[Tensor], tuple[nn.Module, list[torch.dtype], Tensor]]

    def __init__(
        self, partitioner: nn.Module, total_epochs: float, num_parts: NumParts, layers: Layers, stride: int | None
    ) -> None:
        super().__init__()
        if isinstance(layers, str) and layers not in ("middle", "tokens"):
            must = '"middle", "tokens", a list of attention layers, or None for all of them'
            raise ValueError(f"layers={layers!r} must be {must}")
        if stride is not None:
            check_stride(stride)
        if not isinstance(partitioner, nn.Module):
            raise TypeError(f"partitioner={partitioner!r} must be an instance, such as GraphCutPartitioner()")
        pair = isinstance(num_parts, (tuple, list)) and len(num_parts) == 2
        if not callable(num_parts) and not (pair and all(is_whole(count) and count >= 1 for count in num_parts)):
            must = "(in the first epoch, in the last epoch), whole numbers of at least 1, or a function of progress"
            raise ValueError(f"num_parts={num_parts!r} must be {must}")
        self.partitioner = partitioner
        self.total_epochs, self.part_range, self.layers = total_epochs, num_parts, layers
        self.stride, self.must_stride = (
            (2 if layers == "middle" else 1) if stride is None else stride,
            stride is not None,
        )
        taken = signature(partitioner.forward).parameters
        self.wants_images = any(name == "images" or each.kind is Parameter.VAR_KEYWORD for name, each in taken.items())
        self.knows_stride = "stride" in taken
        self.register_buffer("epoch", torch.zeros((), dtype=torch.float32))
        self.num_parts = self._num_parts_in(0)
        self._num_parts_in(total_epochs)  # refuses what is bad here, not in the last epoch
        self.register_load_state_dict_post_hook(_read_progress)

    def set_epoch(self: Self, epoch: float) -> Self:
        """Move to an epoch and return the teacher.

        Args:
            epoch: counted from 0, fractions included. Outside of 0 to total_epochs it is clamped, with one UserWarning.
        """
        self.num_parts = self._num_parts_in(epoch)
        warn_outside(self, epoch, self.total_epochs)
        self.epoch.fill_(clamp_epoch(epoch, self.total_epochs))
        return self

    def _num_parts_in(self, epoch: float) -> int:
        if callable(self.part_range):
            return num_parts_by(self.part_range, epoch, self.total_epochs)
        return num_parts_at(epoch, self.total_epochs, *self.part_range)

    @torch.no_grad()
    def forward(self, images: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """Cut images into parts.

        Args:
            images: what the model takes, or its `transform`: [B, C, height, width] in pixels.
            grid_size: the side of a square patch grid, or (L,), (H, W), (T, H, W) or (D, H, W), in patches, to bring
                the parts to as `parts_from_segmentation` does; where None, they stay on the model's own grid. Parts of
                one picture of a clip are repeated in all T steps.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k at most the number of parts of this epoch.
            On a grid that is coarser than the model's own, parts may be lost, which leaves gaps.

        Raises:
            ValueError: where images are of another shape, or of an integer type that the model does not take.
        """
        affinity, how = self._read(images)
        parts: Tensor = self.partitioner(affinity, self.num_parts, **how) if len(affinity) else affinity[:, :, 0].long()
        return _to_grid(parts, how["grid_size"], grid_size, len(images))

    @torch.no_grad()
    def hierarchy(self, images: Tensor) -> PartHierarchy:
        """Every nested partition of images up to the number of parts of this epoch, on the model's own grid.

        Args:
            images: as for a call.

        Returns:
            PartHierarchy: ``.cut(K)`` is the partition into at most K parts.

        Raises:
            TypeError: where the partitioner makes no hierarchy.
        """
        if not hasattr(self.partitioner, "hierarchy"):
            raise TypeError(f"{type(self.partitioner).__name__} has no hierarchy: use GraphCutPartitioner()")
        affinity, how = self._read(images)
        return cast(PartHierarchy, cast(Any, self.partitioner).hierarchy(affinity, self.num_parts, **how))

    def _read(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The affinity [B, N, N] of images, and what else the partitioner is told."""
        check_tensor("images", images)
        with read_lock:
            model, dtypes, images = self._model_for(images)
            grid = patch_grid(model, images)
            stride = self.stride if self.must_stride or leaves_enough(grid, self.stride) else 1
            check_left(grid, stride)
            stride = stride if len(images) else 1  # nothing is read of an empty batch
            how: dict[str, Any] = {"grid_size": grid}
            how |= {"images": whole_patches(model, images)} if self.wants_images else {}
            how |= {"stride": stride} if self.knows_stride else {}
            if not len(images):
                return images.new_zeros((0, math.prod(grid), math.prod(grid)), dtype=torch.float32), how
            try:
                affinity = _affinity(model, images, dtypes, self.layers, stride)
                return affinity if self.knows_stride else interpolate(affinity, grid, stride), how
            except Exception as error:
                if is_fatal(error):
                    raise
                dtype = f"images has dtype {images.dtype}: pass floats, such as images / 255, normalised"
                advice = self.advice if images.is_floating_point() else dtype
                cannot = f"the {type(self).__name__}'s {type(model).__name__} cannot read images of shape"
                raise ValueError(f"{cannot} {list(images.shape)}: {str(error).rstrip('.')}. {advice}") from error

    def _copy(self, model: nn.Module) -> nn.Module:
        """A copy of a model that can be read as this teacher does: refused here is what would be in the first step."""
        copy = _copy(model)
        if error := _problem(copy, self.layers):
            if self.layers == "middle" and not _problem(copy, "tokens"):
                raise type(error)(f'{error} With layers="tokens" it can be read.') from error
            raise error
        if self.stride > 1 and (error := _problem(copy, self.layers, self.stride)):
            if self.must_stride:
                raise error
            self.stride = 1
            warnings.warn(f"{error}. This teacher does so, and reads all patches at a higher cost", stacklevel=3)
        trials[model] = trial_of(copy)
        trials[copy] = trials[model]._replace(size=0)  # which nobody changes
        return copy

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of nn.Module, but where a state is refused, the teacher stays what it is."""
        tensors, others = {name: value.clone() for name, value in self.state_dict().items()}, dict(vars(self))
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except Exception:
            super().load_state_dict(tensors)
            vars(self).update(others)
            raise

    def extra_repr(self) -> str:
        return f"num_parts={self.num_parts}, layers={self.layers!r}, stride={self.stride}"

    def train(self: Self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked: a teacher has no dropout."""
        return super().train(False)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where a model is cast, a teacher in it keeps its precision."""
        super()._apply(keep_dtype(fn), recurse)
        return self


class PartTeacher(_Teacher):
    """An exponential moving average of a ViT, what its patches have in common, and a partitioner: images in, parts out.

    It has its own `state_dict`: keep it beside the model, not in it, and save both. It has no gradients and is always
    in eval mode. The average stays in float32, whatever it is cast to, but runs in the dtype of the model.

    Args:
        model: the ViT or MAE that trains, or another one of its architecture, whose weights the average begins with; it
            is copied, so build the teacher before `fully_shard` or FullyShardedDataParallel.
        partitioner: GraphCutPartitioner() or EMPartitioner(), or any module called alike; it gets `images` if it takes
            them.
        total_epochs: length of training, in epochs.
        num_parts: the most parts of an image in the first and in the last epoch; it changes linearly. Or a function of
            progress, ``epoch / (total_epochs - 1)`` in [0, 1], to that number; what it returns is rounded. Parts differ
            in size, and an image gets fewer where it supports no more: ``len(parts[0].unique())`` counts them.
        decay: of the moving average, for each update, in [0, 1]; short runs want less than 0.9999. At 1, none moves it.
        layers: what is read from the average: "middle", the attention of the middle third of its layers; None, that of
            all layers, the published way; a list, that of these, counted from 0 or, below 0, from the end; "tokens",
            the tokens before its first block (`token_affinity`), which are least to read and know colours only. What
            comes after the last layer that is read is not computed.
        stride: which patches the average sees: every stride-th one in each direction. Where None, 2 for the "middle",
            which then costs a quarter, and 1, all of them, for anything else, for a model that cannot do with fewer
            (one warning says so) and for images with two patches along a side.

    Examples:
        >>> import timm
        >>> from maskevolve import GraphCutPartitioner
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> teacher = PartTeacher(vit, GraphCutPartitioner(), total_epochs=100)
        >>> teacher.update(vit)  # after each optimizer step
        >>> teacher.set_epoch(50)(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 196])

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    advice = (
        "Give it images as the model is trained with. Where that was resized, as by set_input_size, resize "
        "teacher.model.module, too, or build a new PartTeacher(model, ...)"
    )

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        *,
        total_epochs: float,
        num_parts: NumParts = (40, 10),
        decay: float = 0.9999,
        layers: Layers = "middle",
        stride: int | None = None,
    ) -> None:
        super().__init__(partitioner, total_epochs, num_parts, layers, stride)
        check_number("decay", decay, "a number in [0, 1]: the share of the average that an update keeps", most=1)
        self.decay = decay
        model = unwrap(model)
        self.model = AveragedModel(nn.Identity())
        self.model.module = self._copy(model)  # set, for AveragedModel would copy hooks, too
        self._dtypes = [tensor.dtype for tensor in tensors_of(model)]
        self.model.requires_grad_(False).float()
        self._caught_up = False
        self._source: Callable[[], nn.Module | None] = ref(model)  # until the first update
        self.eval()

    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`: call it after each optimizer step.

        The first call copies the model that the teacher was built from, as torch's AveragedModel does, for it may have
        loaded other weights since. Towards any other model, the average moves from the weights that it was built with;
        so does that of a teacher that was copied or pickled before its first update.

        Args:
            model: the model that trains. A sharded one is gathered: call this on every rank, with the outermost model
                of FullyShardedDataParallel.

        Raises:
            ValueError: where the model is of another architecture; the average has not changed then.
        """
        if self.decay < 1:
            decay = 0 if self._source() is unwrap(model) else self.decay
            self._dtypes = move_average(self.model.module, model, decay)
        self.model.n_averaged += 1
        self._source = _no_model

    def catch_up(self, model: nn.Module) -> None:
        """Copy `model` anew, once, where this was copied from it and has neither been updated nor loaded since.

        For its weights may have become those of a checkpoint or, in DistributedDataParallel, those of the first rank.
        """
        if not self._caught_up and self._source() is unwrap(model):
            self._dtypes = move_average(self.model.module, model, 0)
        self._caught_up = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": _no_model}  # neither copied nor saved with a teacher

    def _model_for(self, images: Tensor) -> tuple[nn.Module, list[torch.dtype], Tensor]:
        # The model that this was built from may have been cast since, until the first update.
        source = self._source()
        dtypes = [] if source is None else [tensor.dtype for tensor in tensors_of(source)]
        return self.model.module, dtypes if len(dtypes) == len(self._dtypes) else self._dtypes, images


class FrozenTeacher(_Teacher):
    """A pretrained ViT that is never updated, what its patches have in common, and a partitioner: images in, parts out.

    Its architecture, patches and input need not be those of the model that trains. Its weights are neither in its
    `state_dict` nor among its `parameters()`; it moves to the device of the images. For the source: `PartTeacher`.

    Args:
        model: any ViT that `PartTeacher` takes, such as one of DINOv2; it is copied, so that nothing can change it.
        partitioner: as for `PartTeacher`; it gets the images that the model sees.
        total_epochs: as for `PartTeacher`.
        num_parts: as for `PartTeacher`.
        layers: as for `PartTeacher`.
        stride: as for `PartTeacher`.
        transform: maps the images of the model that trains, of any shape [B, ...], to those that this model takes,
            [B, C, height, width], as by another size or normalisation. It shows the same section: no crops, no flips.
            Of clips it may make a picture each, such as ``lambda clips: clips[:, :, 0]``, or one for each of the T
            steps in time, [B * T, C, height, width], a clip after the other, each of which then has parts of its own.

    Examples:
        >>> import timm
        >>> from maskevolve import GraphCutPartitioner
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)  # with pretrained=True, at home
        >>> resize = torch.nn.Upsample((224, 224), mode="bilinear")
        >>> teacher = FrozenTeacher(vit, GraphCutPartitioner(), total_epochs=100, transform=resize)
        >>> images = torch.randn(2, 3, 64, 64)
        >>> teacher(images).shape, teacher(images, grid_size=8).shape
        (torch.Size([2, 196]), torch.Size([2, 64]))
    """

    model: nn.Module
    transform: Callable[[Tensor], Tensor] | None
    advice = "Bring images to what it takes with transform=..., such as torch.nn.Upsample((height, width))"

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        *,
        total_epochs: float,
        num_parts: NumParts = (40, 10),
        layers: Layers = "middle",
        stride: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(partitioner, total_epochs, num_parts, layers, stride)
        # No module of this one's: so it is neither saved nor averaged, cast or trained with what holds the teacher.
        vars(self)["model"] = self._copy(unwrap(model)).requires_grad_(False).eval()
        vars(self)["transform"] = transform
        self.eval()

    def _model_for(self, images: Tensor) -> tuple[nn.Module, list[torch.dtype], Tensor]:
        for module in (self.model, self.transform):
            if isinstance(module, nn.Module) and any(each.device != images.device for each in tensors_of(module)):
                module.to(images.device)
        seen: Any = images if self.transform is None else self.transform(images)
        count = len(images)
        if not isinstance(seen, Tensor) or len(seen) % max(count, 1) or (len(seen) > 0) != (count > 0):
            what = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            must = f"for images of shape {list(images.shape)}, but must return [{count}, C, height, width], or {count} "
            must += "times as many steps"
            raise ValueError(f"transform returned {what} {must}")
        return self.model, [tensor.dtype for tensor in tensors_of(self.model)], seen


def _to_grid(parts: Tensor, own: Grid, grid_size: GridSize | None, batch_size: int) -> Tensor:
    """Parts of as many images, on the grid of the model that made them, as those of another grid.

    Of several pictures of each image, those of one frame after another, parts have numbers of their own.
    """
    pictures = len(parts) // max(batch_size, 1)
    if pictures > 1:
        first = torch.arange(pictures, device=parts.device) * (parts.shape[1] + 1)
        parts = (parts.unflatten(0, (batch_size, pictures)) + first[:, None]).flatten(1)
        own = (pictures, *own)
    if grid_size is None or (grid := check_grid(grid_size)) == own:
        return parts
    if len(grid) == 1 + len(own):
        return repeat_along(_to_grid(parts, own, grid[1:], batch_size), grid, 0)
    if pictures > 1 and pictures != grid[0]:
        each = f"transform made {pictures} pictures of each image, for {times(grid)} patches"
        raise ValueError(f"{each}: let it make one for each of {grid[0]} steps in time, or one in all")
    return parts_from_segmentation(parts.unflatten(1, own), grid)


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a model without what users and integrations hooked to it."""
    refuse_sharded(model)
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    # What was computed with gradients, as by weight_norm, cannot be copied with them.
    detached = {id(value): value.detach().clone() for value in held if not value.is_leaf}
    with read_lock, without_hooks(model):
        copy = deepcopy(model, detached)
    restore_methods(copy)
    return copy


def _problem(model: nn.Module, layers: Layers, stride: int = 1) -> Exception | None:
    """Why a model cannot be read so, tried on a picture where a stride asks for it."""
    try:
        check_affinity(model, layers)
        if stride > 1:
            weight = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(()))
            with untouched(model):
                picture = torch.rand(1, *trial_of(model).pictures[1:]).to(weight)
                if leaves_enough(patch_grid(model, picture), stride):
                    _affinity(model, picture, [tensor.dtype for tensor in tensors_of(model)], layers, stride)
    except Exception as error:
        if is_fatal(error):
            raise
        return error
    return None


def _affinity(model: nn.Module, images: Tensor, dtypes: Sequence[torch.dtype], layers: Layers, stride: int) -> Tensor:
    """The affinity of images, while the tensors of a model, and images, have these dtypes."""
    tensors = tensors_of(model)
    floats = {dtype for dtype in dtypes[: len([*model.parameters()])] if dtype.is_floating_point}
    images = images.to(floats.pop()) if len(floats) == 1 and images.is_floating_point() else images
    cast_ones = [(each, each.data, dtype) for each, dtype in zip(tensors, dtypes, strict=True) if each.dtype != dtype]
    try:
        for tensor, data, dtype in cast_ones:
            tensor.data = data.to(dtype)
        if layers == "tokens":
            return token_affinity(model, images, stride)
        return attention_affinity(model, images, cast(Any, layers), stride)
    finally:
        for tensor, data, _ in cast_ones:
            tensor.data = data


def _read_progress(teacher: Any, incompatible_keys: Any) -> None:
    """What a teacher is told by a state that was loaded."""
    teacher.set_epoch(float(teacher.epoch))
    teacher._caught_up = True
    if isinstance(teacher, PartTeacher) and int(teacher.model.n_averaged):
        teacher._source = _no_model


def _no_model() -> None:
    """The source of a teacher that has none."""
