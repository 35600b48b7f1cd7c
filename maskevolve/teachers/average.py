"""A slow copy of a model in training, whatever that model is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["is_sharded", "move_average", "refuse_sharded", "tensors_of", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, FullyShardedDataParallel or torch.compile."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and then the buffers of a model, each once."""
    modules = list(model.modules())  # walked once, for this is done in each step
    parameters = (tensor for module in modules for tensor in module._parameters.values())
    buffers = (tensor for module in modules for tensor in module._buffers.values())
    return [tensor for tensor in dict.fromkeys((*parameters, *buffers)) if tensor is not None]


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` or FullyShardedDataParallel has split the weights of a model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or _is_fsdp(model)


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ValueError where the weights of a model are split."""
    if is_sharded(model):
        raise ValueError(
            f"this {type(unwrap(model)).__name__} is sharded, which cannot be copied: build the teacher before "
            "fully_shard(model) or FullyShardedDataParallel(model)"
        )


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> list[torch.dtype]:
    """Make parameters `decay` of what they are and the rest those of `model`; copy what cannot be averaged.

    Args:
        average: what moves, in any dtype.
        model: the model to move to, in any dtype, on any device. Where it is sharded, on every rank.
        decay: share that the average keeps, in [0, 1]; with 0 it is a copy.

    Returns:
        The dtypes of `tensors_of(model)`.

    Raises:
        ValueError: where the two are not of the same shapes; nothing has changed then.
    """
    with _whole_tensors(model) as theirs:
        ours = tensors_of(average)
        _check_shapes(average, ours, theirs, model)
        kept, new = list[Tensor](), list[Tensor]()
        for old, current in zip(ours, theirs, strict=True):
            if decay > 0 and isinstance(old, nn.Parameter) and old.is_floating_point():
                kept.append(old)
                new.append(current.to(old.device, old.dtype))
            else:
                old.copy_(current)
        if kept:
            get_ema_multi_avg_fn(decay)(kept, new, 1)
        return [tensor.dtype for tensor in theirs]


@contextmanager
def _whole_tensors(model: nn.Module) -> Iterator[list[Tensor]]:
    """`tensors_of` a model, whole on each rank, for as long as the context lasts."""
    fsdp: Any = next((module for module in model.modules() if hasattr(type(module), "summon_full_params")), None)
    if fsdp is not None and "_is_fsdp_managed_module" in vars(model):
        raise ValueError(_not_outermost(model))  # gathering here what is inside of another would break that one
    with nullcontext() if fsdp is None else fsdp.summon_full_params(model, writeback=False):
        yield [
            cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
            for tensor in tensors_of(model)
        ]


def _check_shapes(average: nn.Module, ours: Sequence[Tensor], theirs: Sequence[Tensor], model: nn.Module) -> None:
    if [tensor.shape for tensor in ours] == [tensor.shape for tensor in theirs]:
        return
    if _is_fsdp(model):
        raise ValueError(_not_outermost(model))
    names = [name for name, _ in (*average.named_parameters(), *average.named_buffers())]
    pairs = zip(names, ours, theirs, strict=False)
    different = next((name for name, our, their in pairs if our.shape != their.shape), "none")
    raise ValueError(
        f"the teacher was built for another architecture than this {type(unwrap(model)).__name__}: it has {len(ours)} "
        f"parameters and buffers, the model {len(theirs)}, and {different} is the first of another shape. Build it "
        "from such a model: PartTeacher(model, ...)"
    )


def _is_fsdp(model: nn.Module) -> bool:
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())


def _not_outermost(model: nn.Module) -> str:
    return (
        f"the weights of this {type(unwrap(model)).__name__} are split by FullyShardedDataParallel (FSDP1): call "
        "update(model) with the outermost wrapped model, or shard with fully_shard (FSDP2)"
    )
