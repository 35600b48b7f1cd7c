"""The parts of an image, as a slow copy of the model in training sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .attention import attention_affinity, check_affinity, token_affinity
from .geometry import patch_grid, whole_patches
from .schedule import clamp_epoch, num_parts_at

__all__ = ["PartTeacher", "unwrap"]

_sources: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
"""Which model a new teacher was copied from. Not in the teacher, which can be copied and saved."""


class PartTeacher(nn.Module):
    """An exponential moving average of a ViT, what its patches have in common, and a partitioner: images in, parts out.

    It is a module of its own with its own `state_dict`: keep it beside the model, not in it, and save both. It never
    trains: no gradients, always in eval mode.

    Args:
        model: the ViT or MAE that trains; it is copied. Before `fully_shard`, for sharded weights cannot be.
        partitioner: GraphCutPartitioner() or EMPartitioner(), or any module with the call of either. One that takes
            `images` gets them, too.
        total_epochs: length of training, in epochs.
        num_parts: number of parts in the first and in the last epoch; it changes linearly.
        decay: of the moving average, for each update; short runs want less than 0.9999.
        layers: what is read from the average. "tokens", the tokens before its first block (`token_affinity`),
            costs least. None is the published way: the attention of all layers. A list names the attention layers, counted
            from 0 or, below 0, from the end. What comes after the last layer that is read is not computed.

    Shape:
        images [B, C, height, width] to parts [B, N] int64.

    Example:
        >>> import timm
        >>> from maskevolve import GraphCutPartitioner
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> teacher = PartTeacher(vit, GraphCutPartitioner(), total_epochs=100)
        >>> teacher.update(vit)  # after each optimizer step
        >>> teacher.set_epoch(50)(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 196])

    Source: Evolved Part Masking (CVPR 2023), https://doi.org/10.1109/CVPR52729.2023.01001
    """

    epoch: Tensor

    def __init__(
        self,
        model: nn.Module,
        partitioner: nn.Module,
        *,
        total_epochs: float,
        num_parts: tuple[int, int] = (40, 10),
        decay: float = 0.9999,
        layers: Sequence[int] | Literal["tokens"] | None = "tokens",
    ) -> None:
        super().__init__()
        model = unwrap(model)
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise ValueError(
                f"this {type(model).__name__} is sharded, which cannot be copied: build the teacher before "
                "fully_shard(model)"
            )
        if isinstance(layers, str) and layers != "tokens":
            raise ValueError(f'layers={layers!r} must be "tokens", a list of attention layers, or None for all of them')
        check_affinity(model, layers)  # refuses here what it would in the first step
        if not isinstance(partitioner, nn.Module):
            raise TypeError(f"partitioner={partitioner!r} must be an instance, such as GraphCutPartitioner()")
        if isinstance(num_parts, int) or min(num_parts) < 1:
            raise ValueError(f"num_parts={num_parts} must be (in the first epoch, in the last epoch), each at least 1")
        self.model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
        self.partitioner = partitioner
        self.total_epochs, self.part_range, self.layers = total_epochs, num_parts, layers
        self.wants_images = _takes_images(partitioner)
        self.register_buffer("epoch", torch.zeros(()))
        self.num_parts = num_parts_at(0, total_epochs, *num_parts)
        self.register_load_state_dict_post_hook(_read_epoch)
        self.eval()
        _sources[self] = ref(model)

    def set_epoch(self, epoch: float) -> PartTeacher:
        """Move to an epoch and return the teacher.

        Args:
            epoch: counted from 0; fractions are progress within an epoch. Clamped to the training.
        """
        self.num_parts = num_parts_at(epoch, self.total_epochs, *self.part_range)
        self.epoch.fill_(clamp_epoch(epoch, self.total_epochs))
        return self

    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`: call it after each optimizer step. The first call copies the model.

        Args:
            model: the model that trains. Where it is sharded (FSDP2), its weights are gathered: call it on every rank.
        """
        _sources.pop(self, None)
        # All that an AveragedModel asks of a model.
        whole = SimpleNamespace(
            parameters=lambda: _gather(model.parameters()), buffers=lambda: _gather(model.buffers())
        )
        self.model.update_parameters(cast(nn.Module, whole))

    def catch_up(self, model: nn.Module) -> None:
        """Copy `model` anew, once, where this was copied from it and has neither been updated nor loaded since.

        For its weights may have changed without a step: to those of a checkpoint or, in DistributedDataParallel, to
        those of the first rank, so that all ranks have the same teacher.
        """
        source = _sources.get(self)
        if source is not None and source() is model:
            self.update(model)
            self.model.n_averaged.zero_()  # the first step is still to come
        _sources.pop(self, None)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Cut images into parts.

        Args:
            images: what the model takes, [B, C, height, width] in pixels.

        Returns:
            parts [B, N] int64: labels 0..k-1 without gaps in each image, k at most the number of parts of this epoch.
        """
        model = self.model.module
        affinity = (
            token_affinity(model, images)
            if isinstance(self.layers, str)
            else attention_affinity(model, images, self.layers)
        )
        also = {"images": whole_patches(model, images)} if self.wants_images else {}
        parts: Tensor = self.partitioner(affinity, self.num_parts, grid_size=patch_grid(model, images), **also)
        return parts

    def train(self, mode: bool = True) -> PartTeacher:
        """Stays in eval mode, whatever is asked: a teacher has no dropout."""
        return super().train(False)


def _takes_images(partitioner: nn.Module) -> bool:
    parameters = signature(partitioner.forward).parameters.values()
    return any(parameter.name == "images" or parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)


def _read_epoch(teacher: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(teacher, PartTeacher)
    teacher.set_epoch(float(teacher.epoch))
    _sources.pop(teacher, None)


def _gather(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The whole of each tensor, where this rank has a shard of it."""
    return (cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or torch.compile."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model
