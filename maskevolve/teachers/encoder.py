"""How somebody's encoder is run on all patches of images, and tried on a picture before it is relied on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..masks.functional import MaskedPatches
from .average import is_sharded
from .patch_grid import PatchWatch, image_size, patch_embedding, patch_grid, tiny_pictures
from .random_masking import Result, arrange, host_method, learn_results

__all__ = [
    "all_patches",
    "check_patches",
    "encode",
    "encoder_of",
    "has_attribute",
    "has_decoder",
    "try_picture",
    "untouched",
]

T = TypeVar("T")

_results: WeakKeyDictionary[nn.Module, tuple[Result, ...]] = WeakKeyDictionary()
"""What the `random_masking` of a model returns."""


def has_attribute(module: nn.Module, name: str) -> bool:
    """`hasattr` for what is no parameter or buffer: nn.Module takes its time to say no."""
    return name in vars(module) or name in module._modules or hasattr(type(module), name)


def encoder_of(model: nn.Module) -> Any:
    """The model without its head or decoder, where it has a name for it (Hugging Face's) and patches are made there."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and patch_embedding(base) is not None else model


def encode(model: nn.Module, images: Tensor) -> None:
    """Run the encoder or, where the model has no name for it, the model."""
    encoder = encoder_of(model)
    if _takes(encoder, "forward_encoder", images, 0.0):
        encoder.forward_encoder(images, 0.0)
    elif hasattr(encoder, "forward_features"):
        encoder.forward_features(images)
    elif hasattr(model, "base_model"):
        # Only where it must: at its own size, Hugging Face's interpolation refuses images that are not square.
        resized = image_size(model) != images.shape[-2:] and "interpolate_pos_encoding" in _parameters(encoder)
        encoder(images, **({"interpolate_pos_encoding": True} if resized else {}))
    else:
        encoder(images)


def has_decoder(model: nn.Module) -> bool:
    """Whether `encode` may run more than the encoder."""
    encoder = encoder_of(model)
    named = hasattr(encoder, "forward_features") or hasattr(model, "base_model")
    return not (named or _takes(encoder, "forward_encoder", torch.empty(0), 0.0))


def _takes(owner: Any, name: str, *args: Any) -> bool:
    """Whether a module has a method that can be called with these arguments."""
    try:
        signature(getattr(owner, name)).bind(*args)
    except (AttributeError, TypeError):
        return False
    return True


def _parameters(encoder: nn.Module) -> Any:
    return signature(encoder.forward).parameters


@contextmanager
def all_patches(model: nn.Module, share: float = 1.0) -> Iterator[list[Tensor]]:
    """Make an MAE keep every patch, or the first `share` of them, in order, for as long as the context lasts.

    Yields the patches that the MAE would have masked, once it has come there.
    """
    asked: list[Tensor] = []
    owner = next((module for module in model.modules() if has_attribute(module, "random_masking")), None)
    if owner is None:
        yield asked
        return
    before, own = vars(owner).get("random_masking"), host_method(owner, "random_masking")
    first = next(iter(signature(own).parameters))

    def keep_all(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        x = args[0] if args else kwargs[first]
        asked.append(x)
        if owner not in _results:
            _results[owner] = learn_results(lambda: own(*args, **kwargs), x)
        kept = x[:, : max(1, int(x.shape[1] * share))]
        in_order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return arrange(MaskedPatches(kept, (in_order >= kept.shape[1]).float(), in_order), _results[owner])

    vars(owner)["random_masking"] = keep_all
    try:
        yield asked
    finally:
        del vars(owner)["random_masking"]
        if before is not None:
            vars(owner)["random_masking"] = before


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, without gradients; its mode, buffers and torch's random state come back after."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module._buffers, name, buffer, buffer._version, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
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


def try_picture(model: nn.Module, run: Callable[[Tensor], T]) -> tuple[Tensor, T]:
    """The first tiny picture, [1, C, height, width], with which `run` goes through the model, and what it returned.

    Raises:
        ValueError: where none does; it has the shapes that were tried, and the model's own error.
    """
    tried: dict[str, Exception] = {}
    with untouched(model):
        for picture in tiny_pictures(model):
            with _noted(tried, str(list(picture.shape))):
                return picture, run(picture)
    cause = list(tried.values())[-1]
    raise ValueError(
        f"{type(model).__name__} could not be tried on a picture. Tried: {', '.join(tried)}. Its last error: "
        f"{type(cause).__name__}: {cause}. It must take images [B, C, height, width] alone: pass the encoder that does "
        "(a model of images and text has one for images). Where it takes images of one size, set "
        "model.img_size = (height, width), in pixels"
    ) from cause


@contextmanager
def _noted(errors: dict[str, Exception], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        errors[name] = error


def check_patches(model: nn.Module) -> None:
    """Refuse a model whose patch grid cannot be found: its encoder is tried on a tiny picture.

    An encoder that takes more than images is not; its patch embedding is.

    Raises:
        ValueError: where the grid is not that of what comes out, or is masked, or no picture goes in.
    """
    patch_grid(model, torch.empty(1, 3, 1 << 12, 1 << 12, device="meta"))
    if is_sharded(model):
        return  # Sharded weights cannot be run a part at a time.
    watch = PatchWatch()

    def run(picture: Tensor) -> list[Tensor]:
        with watch, all_patches(model) as masked:
            encode(model, picture)
        return masked

    def embed(picture: Tensor) -> list[Tensor]:
        with watch:
            patch_embedding(model)(picture)
        return []

    try:
        picture, masked = try_picture(model, run)
    except ValueError:
        picture, masked = try_picture(model, embed)
    watch.check(model, picture)
    height, width = patch_grid(model, picture)
    if masked and masked[0].shape[1] != height * width:
        raise ValueError(
            f"{type(model).__name__} masks {masked[0].shape[1]} tokens of a picture of shape {list(picture.shape)}, "
            f"whose patches are {height} x {width}: use a mask that needs no grid, such as RandomMask()"
        )
