"""How somebody's encoder is found, and run on all patches of images without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..masks import MaskedPatches
from .host_method import host_method
from .patch_grid import as_sides, patch_embedding
from .random_masking import Result, arrange, learn_results

# Held while a model is read, whose hooks another thread would run into. Not in a teacher, which can be pickled.
read_lock = RLock()
MASKING = ("random_masking", "_masking")  # the method of an MAE that masks: MAE's, and MONAI's
# What that of a model returns.
_results: WeakKeyDictionary[nn.Module, tuple[Result, ...]] = WeakKeyDictionary()


def is_fatal(error: BaseException) -> bool:
    """Whether an error says that memory ran out, or ends the program: such a one is never turned into another."""
    texts = ("out of memory", "allocate memory", "not enough memory")
    says_so = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return says_so or isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or not isinstance(error, Exception)


def encoder_of(model: nn.Module) -> Any:
    """The model without its head or decoder, where it has a name for it (Hugging Face's) and patches are made there."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and patch_embedding(base) is not None else model


def entry_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module, and the name of its method, that `encode` gives images to."""
    encoder = encoder_of(model)
    with suppress(AttributeError, TypeError):
        forward_encoder = signature(encoder.forward_encoder)
        forward_encoder.bind(None, 0.0)
        # MAE's takes images and a mask ratio: not two images, as those of siamese MAEs. There is no second with *args.
        second = [*forward_encoder.parameters.values()][1:2]
        if all("ratio" in each.name or "rate" in each.name or isinstance(each.default, float) for each in second):
            return encoder, "forward_encoder"
    return encoder, "forward_features" if hasattr(encoder, "forward_features") else "forward"


def encode(model: nn.Module, images: Tensor) -> None:
    """Run the encoder or, where the model has no name for it, the model."""
    encoder, name = entry_of(model)
    run: Any = encoder if name == "forward" else getattr(encoder, name)
    if name == "forward_encoder":
        run(images, 0.0)
    elif name == "forward" and "interpolate_pos_encoding" in signature(encoder.forward).parameters:
        # Not at its own size, where Hugging Face's interpolation refuses images that are not square.
        run(images, interpolate_pos_encoding=image_size(model) != images.shape[-2:])
    else:
        run(images)


def image_size(model: nn.Module) -> tuple[int, ...] | None:
    """The size (height, width) of images that the model was made for, in pixels; None where it does not say."""
    owners = (patch_embedding(model), model, getattr(model, "config", None), *model.modules())
    sizes = (getattr(owner, name, None) for owner in owners for name in ("img_size", "image_size"))
    return next((as_sides(size) for size in sizes if isinstance(size, int | tuple | list)), None)


@contextmanager
def all_patches(model: nn.Module, share: float = 1.0) -> Iterator[list[Tensor]]:
    """Make an MAE keep every patch, or the first `share` of them, in order. Yields the patches that it was to mask."""
    asked = list[Tensor]()
    # Not by hasattr alone, for nn.Module takes its time to say no, and this is done in each step.
    pairs = ((m, name) for m in model.modules() for name in MASKING)
    has = ((m, name) for m, name in pairs if name in vars(m) or name in m._modules or hasattr(type(m), name))
    owner, name = next(has, (None, ""))
    if owner is None:
        yield asked
        return
    before, own = vars(owner).get(name), host_method(owner, name)

    def keep_all(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        x: Tensor = args[0] if args else kwargs[next(iter(signature(own).parameters))]
        asked.append(x)
        if owner not in _results:
            _results[owner] = learn_results(lambda: own(*args, **kwargs), x)
        kept = x[:, : max(1, int(x.shape[1] * share))]
        in_order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return arrange(MaskedPatches(kept, (in_order >= kept.shape[1]).float(), in_order), _results[owner])

    vars(owner)[name] = keep_all
    try:
        yield asked
    finally:
        del vars(owner)[name]
        if before is not None:
            vars(owner)[name] = before


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Switch off the hooks of users, but those of torch (weight_norm) and transformers, which are needed to compute."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    every: list[dict[int, Any]] = [vars(module)[kind] for module in model.modules() for kind in kinds]
    taken = [(hooks, dict(hooks), {key for key in hooks if not _is_needed(hooks[key])}) for hooks in every if hooks]
    try:
        for hooks, _, users in taken:
            for key in users:
                del hooks[key]
        yield
    finally:
        for hooks, before, users in taken:
            left = dict(hooks)  # which may have changed in the pass
            hooks.clear()
            hooks.update({key: hook for key, hook in before.items() if key in left or key in users} | left)


def _is_needed(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("torch", "transformers")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, without gradients and users' hooks; mode, buffers and random state come back."""
    modes = {module: module.training for module in model.modules()}
    named: list[Any] = [(module._buffers, *item) for module in modes for item in module._buffers.items()]
    buffers = [(*each, each[2]._version, each[2].clone()) for each in named if each[2] is not None]
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)), without_hooks(model):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for owner, name, buffer, version, value in buffers:
                owner[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)
