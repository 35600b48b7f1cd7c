"""The parts of an image: as a slow copy of the model in training sees them, or as a pretrained model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from ..checks import check_number, check_tensor, is_whole
from ..grid import GridSize
from ..parts.graph_cut import PartHierarchy
from ..parts.segmentation import parts_from_segmentation
from ..precision import keep_dtype
from ..schedule import Schedule, clamp_epoch, num_parts_at, num_parts_by, warn_outside
from .attention import attention_affinity, check_affinity, token_affinity
from .average import move_average, refuse_sharded, tensors_of, unwrap
from .patch_grid import patch_grid, whole_patches

__all__ = ["FrozenTeacher", "PartTeacher", "unwrap"]

Layers = Sequence[int] | Literal["tokens"] | None
Self = TypeVar("Self", bound="_Teacher")

_sources: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
"""Which model a new teacher was copied from. Not in the teacher, which can be copied and saved."""


class _Teacher(nn.Module):
    """What both teachers do: read from a ViT what the patches of images have in common, and cut that into parts."""

    epoch: Tensor

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        total_epochs: float,
        num_parts: tuple[int, int] | Schedule,
        layers: Layers,
    ) -> None:
        super().__init__()
        refuse_sharded(model)
        if isinstance(layers, str) and layers != "tokens":
            raise ValueError(f'layers={layers!r} must be "tokens", a list of attention layers, or None for all of them')
        check_affinity(model, layers)  # refuses here what it would in the first step
        if not isinstance(partitioner, nn.Module):
            raise TypeError(f"partitioner={partitioner!r} must be an instance, such as GraphCutPartitioner()")
        pair = isinstance(num_parts, (tuple, list)) and len(num_parts) == 2
        if not callable(num_parts) and not (pair and all(is_whole(count) and count >= 1 for count in num_parts)):
            raise ValueError(
                f"num_parts={num_parts!r} must be (in the first epoch, in the last epoch), whole numbers of at least "
                "1, or a function of progress"
            )
        self.partitioner = partitioner
        self.total_epochs, self.part_range, self.layers = total_epochs, num_parts, layers
        self.wants_images = _takes_images(partitioner)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.float32))
        self.num_parts = self._num_parts_in(0)
        self._num_parts_in(total_epochs)  # refuses what is bad here, not in the last epoch
        self.register_load_state_dict_post_hook(_read_epoch)

    def set_epoch(self: Self, epoch: float) -> Self:
        """Move to an epoch and return the teacher.

        Args:
            epoch: counted from 0; fractions are progress within an epoch. Clamped to the training.

        Warns:
            UserWarning: once, where the epoch is below 0 or above total_epochs.
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
            grid_size: the side of a square patch grid, or (H, W), in patches, to bring the parts to as
                `parts_from_segmentation` does; where None, they stay on the model's own grid.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k at most the number of parts of this epoch.
            On a grid that is coarser than the model's own, parts may be lost, which leaves gaps.

        Raises:
            ValueError: where images are of another shape, or of an integer type that the model does not take.
        """
        affinity, how = self._read_checked(images)
        parts: Tensor = self.partitioner(affinity, self.num_parts, **how)
        own_grid = how["grid_size"]
        if grid_size is None or grid_size == own_grid:
            return parts
        return parts_from_segmentation(parts.unflatten(1, own_grid), grid_size)

    @torch.no_grad()
    def hierarchy(self, images: Tensor) -> PartHierarchy:
        """Every nested partition of images up to the number of parts of this epoch, on the model's own grid.

        Args:
            images: what the model takes, or its `transform`: [B, C, height, width] in pixels.

        Returns:
            PartHierarchy: ``.cut(K)`` is the partition into at most K parts.

        Raises:
            TypeError: where the partitioner makes no hierarchy.
        """
        if not hasattr(self.partitioner, "hierarchy"):
            raise TypeError(f"{type(self.partitioner).__name__} has no hierarchy: use GraphCutPartitioner()")
        affinity, how = self._read_checked(images)
        return cast(PartHierarchy, cast(Any, self.partitioner).hierarchy(affinity, self.num_parts, **how))

    def _read_checked(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        check_tensor("images", images)
        if images.ndim != 4:
            raise ValueError(
                f"images has shape {list(images.shape)}, but must be [B, C, height, width]: pass images[None] for one"
            )
        try:
            return self._read(images)
        except RuntimeError as error:
            if images.is_floating_point():
                raise
            raise ValueError(
                f"images has dtype {images.dtype}, which the model does not take: pass floats as the model is trained "
                "with, such as images / 255, normalised"
            ) from error

    def _read(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The affinity [B, N, N] of images, and what else the partitioner is told."""
        raise NotImplementedError

    def _grid_and_images(self, model: nn.Module, images: Tensor) -> dict[str, Any]:
        also = {"images": whole_patches(model, images)} if self.wants_images else {}
        return {"grid_size": patch_grid(model, images), **also}

    def train(self: Self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked: a teacher has no dropout."""
        return super().train(False)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where a model is cast, a teacher in it keeps its precision."""
        super()._apply(keep_dtype(fn), recurse)
        return self


class PartTeacher(_Teacher):
    """An exponential moving average of a ViT, what its patches have in common, and a partitioner: images in, parts out.

    It is a module of its own with its own `state_dict`: keep it beside the model, not in it, and save both. It never
    trains: no gradients, always in eval mode. The average is kept in float32, whatever the dtype of the model and
    whatever the teacher is cast to; its forward pass runs in the dtype of the model.

    Args:
        model: the ViT or MAE that trains, or another one of its architecture, whose weights the average begins with; it
            is copied. Before `fully_shard` or FullyShardedDataParallel, for sharded weights cannot be.
        partitioner: GraphCutPartitioner() or EMPartitioner(), or any module with the call of either. One that takes
            `images` gets them, too.
        total_epochs: length of training, in epochs.
        num_parts: number of parts in the first and in the last epoch; it changes linearly. Or a function of progress,
            ``epoch / (total_epochs - 1)`` in [0, 1], to the number of parts; what it returns is rounded.
        decay: of the moving average, for each update, in [0, 1]; short runs want less than 0.9999. At 1 no update
            changes the average.
        layers: what is read from the average. "tokens", the tokens before its first block (`token_affinity`),
            costs least. None is the published way: the attention of all layers. A list names attention layers, counted
            from 0 or, below 0, from the end. What comes after the last layer that is read is not computed.

    Shape:
        images [B, C, height, width] to parts [B, N] int64.

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

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        *,
        total_epochs: float,
        num_parts: tuple[int, int] | Schedule = (40, 10),
        decay: float = 0.9999,
        layers: Layers = "tokens",
    ) -> None:
        model = unwrap(model)
        super().__init__(model, partitioner, total_epochs, num_parts, layers)
        check_number("decay", decay, "a number in [0, 1]: the share of the average that an update keeps", most=1)
        self.decay = decay
        self.model = AveragedModel(model).requires_grad_(False).float()
        self._dtypes = [tensor.dtype for tensor in tensors_of(model)]
        self._num_parameters = len([*model.parameters()])
        self._caught_up = False
        self.register_load_state_dict_post_hook(_read_progress)
        self.eval()
        _sources[self] = ref(model)

    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`: call it after each optimizer step.

        The first call copies the model where the teacher was built from it, as torch's AveragedModel does, for the
        model may have loaded other weights since. Towards any other model, the average moves from the weights that it
        was built with.

        Args:
            model: the model that trains. Where it is sharded, its weights are gathered: call it on every rank, and give
                it the outermost model of FullyShardedDataParallel.

        Raises:
            ValueError: where the model is of another architecture; the average has not changed then.
        """
        if self.decay < 1:
            self._dtypes = move_average(self.model.module, model, 0 if self._is_source(model) else self.decay)
        self.model.n_averaged += 1
        _sources.pop(self, None)

    def catch_up(self, model: nn.Module) -> None:
        """Copy `model` anew, once, where this was copied from it and has neither been updated nor loaded since.

        For its weights may have changed without a step: to those of a checkpoint or, in DistributedDataParallel, to
        those of the first rank, so that all ranks have the same teacher.
        """
        if not self._caught_up and self._is_source(model):
            self._dtypes = move_average(self.model.module, model, 0)
        self._caught_up = True

    def _is_source(self, model: nn.Module) -> bool:
        source = _sources.get(self)
        return source is not None and source() is unwrap(model)

    def _read(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        model = self.model.module
        read, dtypes = _Affinity(model, self.layers), self._dtypes_of_student()
        seen = _in_dtype(images, dtypes[: self._num_parameters])
        if dtypes == [tensor.dtype for tensor in tensors_of(model)]:
            return read(seen), self._grid_and_images(model, images)
        named = (*read.named_parameters(), *read.named_buffers())
        cast = {name: old.to(new) for (name, old), new in zip(named, dtypes, strict=True) if old.dtype != new}
        return functional_call(read, cast, (seen,)), self._grid_and_images(model, images)

    def _dtypes_of_student(self) -> list[torch.dtype]:
        """Those of the model that this was built from, which may have been cast since, until the first update."""
        source = _sources.get(self)
        model = None if source is None else source()
        dtypes = [] if model is None else [tensor.dtype for tensor in tensors_of(model)]
        return dtypes if len(dtypes) == len(self._dtypes) else self._dtypes


class FrozenTeacher(_Teacher):
    """A pretrained ViT that is never updated, what its patches have in common, and a partitioner: images in, parts out.

    Its architecture, its patches and its input need not be those of the model that trains. Its weights are neither in
    its `state_dict` nor among its `parameters()`; it moves to the device of the images.

    Args:
        model: any ViT that `PartTeacher` takes, such as one of DINOv2; it is copied, so that nothing can change it.
        partitioner: GraphCutPartitioner() or EMPartitioner(), or any module with the call of either. One that takes
            `images` gets those that the model sees.
        total_epochs: length of training, in epochs.
        num_parts: number of parts in the first and in the last epoch; it changes linearly. Or a function of progress,
            ``epoch / (total_epochs - 1)`` in [0, 1], to the number of parts; what it returns is rounded.
        layers: what is read from the model: "tokens", those before its first block (`token_affinity`), None for the
            attention of all layers, or a list of attention layers, counted from 0 or, below 0, from the end.
        transform: maps the images of the model that trains, [B, C, height, width], to those that this model takes, such
            as by another size or normalisation. It must show the same section of the images: no crops, no flips.

    Shape:
        images [B, C, height, width] to parts [B, N] int64.

    Examples:
        >>> import timm
        >>> from maskevolve import GraphCutPartitioner
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)  # with pretrained=True, at home
        >>> resize = torch.nn.Upsample((224, 224), mode="bilinear")
        >>> teacher = FrozenTeacher(vit, GraphCutPartitioner(), total_epochs=100, transform=resize)
        >>> images = torch.randn(2, 3, 64, 64)
        >>> teacher(images).shape, teacher(images, grid_size=8).shape
        (torch.Size([2, 196]), torch.Size([2, 64]))

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    model: nn.Module
    transform: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        *,
        total_epochs: float,
        num_parts: tuple[int, int] | Schedule = (40, 10),
        layers: Layers = "tokens",
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        model = unwrap(model)
        super().__init__(model, partitioner, total_epochs, num_parts, layers)
        # No module of this one's: so it is neither saved nor averaged, cast or trained with what holds the teacher.
        vars(self)["model"] = deepcopy(model).requires_grad_(False).eval()
        vars(self)["transform"] = transform
        self.eval()

    def _read(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        images = self._transformed(images)
        parameters = list(self.model.parameters())
        if parameters[0].device != images.device:
            self.model.to(images.device)
        seen = _in_dtype(images, [parameter.dtype for parameter in parameters])
        try:
            affinity = _Affinity(self.model, self.layers)(seen)
        except Exception as error:
            reason = str(error).rstrip(".")
            raise ValueError(
                f"the frozen {type(self.model).__name__} cannot read images of shape {list(seen.shape)}: {reason}. "
                "Bring images to what it takes with transform=..., such as torch.nn.Upsample((height, width))"
            ) from error
        return affinity, self._grid_and_images(self.model, images)

    def _transformed(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        if isinstance(self.transform, nn.Module):
            self.transform.to(images.device)
        transformed = self.transform(images)
        if not (isinstance(transformed, Tensor) and transformed.ndim == 4 and len(transformed) == len(images)):
            what = list(transformed.shape) if isinstance(transformed, Tensor) else type(transformed).__name__
            raise ValueError(
                f"transform returned {what} for images of shape {list(images.shape)}, but must return a tensor "
                f"[{len(images)}, channels, height, width]"
            )
        return transformed


class _Affinity(nn.Module):
    """What the patches of images have in common, as a module, which `functional_call` runs with weights in a dtype."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.layers, str):
            return token_affinity(self.model, images)
        return attention_affinity(self.model, images, self.layers)


def _in_dtype(images: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Images in the dtype of a model's parameters, where these have one."""
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    return images.to(floats.pop()) if len(floats) == 1 and images.is_floating_point() else images


def _takes_images(partitioner: nn.Module) -> bool:
    parameters = signature(partitioner.forward).parameters.values()
    return any(parameter.name == "images" or parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)


def _read_epoch(teacher: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(teacher, _Teacher)
    teacher.set_epoch(float(teacher.epoch))


def _read_progress(teacher: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(teacher, PartTeacher)
    teacher._caught_up = True
    if int(teacher.model.n_averaged):
        _sources.pop(teacher, None)
