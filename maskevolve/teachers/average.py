"""A slow copy of a model in training, whatever that model is wrapped in."""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

WRAPPERS = {
    "AveragedModel",
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ShardedDataParallel",
    "XlaFullyShardedDataParallel",
    "_FabricModule",
}
"""Classes of torch, Lightning, DeepSpeed and others that hold a model; by name, for importing them takes seconds."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, FullyShardedDataParallel, torch.compile and the like."""
    while any(kind.__name__ in WRAPPERS for kind in type(model).__mro__):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    return model


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and then the buffers of a model, each once."""
    modules = list(model.modules())  # walked once, for this is done in each step
    parameters = (tensor for module in modules for tensor in module._parameters.values())
    buffers = (tensor for module in modules for tensor in module._buffers.values())
    return [tensor for tensor in dict.fromkeys((*parameters, *buffers)) if tensor is not None]


def without_weights(model: nn.Module) -> str:
    """Why the weights of a model are not all here (split among ranks, or on the meta device), and what to do; or ""."""
    parameters = list(model.parameters())
    if any(hasattr(parameter, "full_tensor") for parameter in parameters) or _is_fsdp(model):
        return "it is sharded: build the teacher before fully_shard(model) or FullyShardedDataParallel(model)"
    if any(hasattr(parameter, "ds_id") and not parameter.numel() for parameter in parameters):
        return "DeepSpeed's ZeRO-3 has split its weights: build the teacher before, from a model outside of zero.Init"
    on_meta = any(parameter.is_meta for parameter in parameters)
    return "it is on the meta device, where weights have no values: load its weights first" if on_meta else ""


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ValueError where the weights of a model are not all here."""
    if reason := without_weights(model):
        raise ValueError(f"this {type(unwrap(model)).__name__} cannot be read or copied, for {reason}")


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> list[torch.dtype]:
    """Make parameters `decay` of what they are, the rest those of `model`, and copy what cannot be averaged.

    It runs on every rank, and returns the dtypes of `tensors_of(model)`. Where shapes differ, nothing has changed.
    """
    fsdp: Any = next((module for module in model.modules() if hasattr(type(module), "summon_full_params")), None)
    if fsdp is not None and "_is_fsdp_managed_module" in vars(model):
        _refuse_inner(model)  # for gathering here what is inside of another would break that one
    ours, kept, new = tensors_of(average), list[Tensor](), list[Tensor]()
    with nullcontext() if fsdp is None else fsdp.summon_full_params(model, writeback=False):
        given: list[Any] = tensors_of(model)
        theirs = [each.full_tensor() if hasattr(each, "full_tensor") else each.detach() for each in given]
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            _refuse_shapes(average, ours, theirs, model)
        for old, current in zip(ours, theirs, strict=True):
            if 0 in old.stride():  # the model expands it in its forward pass: it cannot be written to
                old.data = old.data.clone()
            if decay > 0 and isinstance(old, nn.Parameter) and old.is_floating_point():
                kept.append(old)
                new.append(current.to(old.device, old.dtype))
            else:
                old.copy_(current)
        if kept:
            get_ema_multi_avg_fn(decay)(kept, new, 1)
        return [tensor.dtype for tensor in theirs]


def _refuse_shapes(average: nn.Module, ours: list[Tensor], theirs: list[Tensor], model: nn.Module) -> None:
    """Raise the error that says why the tensors of a model are not those of the average."""
    if _is_fsdp(model):
        _refuse_inner(model)
    refuse_sharded(model)
    names = [name for name, _ in (*average.named_parameters(), *average.named_buffers())]
    pairs = zip(names, ours, theirs, strict=False)
    different = next((name for name, our, their in pairs if our.shape != their.shape), "none")
    raise ValueError(
        f"the teacher was built for another architecture than this {type(unwrap(model)).__name__}: it has {len(ours)} "
        f"parameters and buffers, the model {len(theirs)}, and {different} is the first of another shape. Build it "
        "from this model or, where set_input_size or the like resized that, resize teacher.model.module, too"
    )


def _is_fsdp(model: nn.Module) -> bool:
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())


def _refuse_inner(model: nn.Module) -> None:
    raise ValueError(
        f"the weights of this {type(unwrap(model)).__name__} are split by FullyShardedDataParallel (FSDP1): call "
        "update(model) with the outermost wrapped model, or shard with fully_shard (FSDP2)"
    )
