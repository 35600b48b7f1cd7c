"""How much the patches of an image belong together, read from a ViT while it runs. The model is not touched.

Hooks mark which attention module is running; a torch-function mode sees the queries and keys that it hands to
`scaled_dot_product_attention`, the softmax that it takes itself, or the weights of nn.MultiheadAttention. So norms,
rotary embeddings and biases are included, whatever the model does to get there. All of it is gone when the call ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

from .functional import MaskedPatches
from .random_masking import Result, arrange, host_method, learn_results

__all__ = ["attention_affinity", "attention_modules", "patch_grid", "reading", "token_affinity", "whole_patches"]

HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""An attention module is one that has its number of heads under one of these names."""


DECODER = r"decoder|(^|\.)dec(\.|_|\d|$)"
"""In the names of modules that do not see images."""

_results: WeakKeyDictionary[nn.Module, tuple[Result, ...]] = WeakKeyDictionary()
"""What the `random_masking` of a model returns."""


class _Done(Exception):
    """Ends the forward pass after the last layer that is needed."""


@torch.no_grad()
def attention_affinity(model: nn.Module, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Mean softmax attention between patches, over heads and layers; prefix tokens (class, register, ...) are dropped.

    Args:
        model: a ViT of timm or one built alike, an MAE (anything with `forward_encoder` and `random_masking`), a ViT or
            ViTMAE of Hugging Face, or a ViT of torchvision; masking is off here. Runs in the mode it is in: call
            ``model.eval()`` first for a teacher.
        images: what the model takes, [B, C, height, width] in pixels.
        layers: which attention layers, counted from 0 or, below 0, from the end; all where None. Those after the last
            one that is wanted do not run.

    Returns:
        [B, N, N] float32: row n is the attention of patch n to every patch; its sum is below 1 with prefix tokens.

    Raises:
        ValueError: where a layer does not exist or the patches cannot be told from the prefix tokens.
        RuntimeError: where no attention is found; it names the modules that were looked at.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> attention_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    wanted = attention_modules(model, layers)
    reader = _Reader([module for _, module in wanted])
    with reader.hooked(), _all_patches(model), reader, suppress(_Done):
        _encode(model, images)
    if reader.total is None or reader.left:
        silent = ", ".join(name for name, module in wanted if module in reader.left)
        raise RuntimeError(_not_found(model, f"took no softmax attention in {silent}"))
    prefix = _count_prefix(model, images, reader.total.shape[1])
    return reader.total[:, prefix:, prefix:] / len(reader.modules)


@torch.no_grad()
def token_affinity(model: nn.Module, images: Tensor) -> Tensor:
    """Cosine similarity of the patches' tokens where the first attention layer reads them, less their mean.

    So it needs the patch embedding and the first norm, and no block of the model. For a small MAE, parts that were cut
    from it agreed with people's on BSDS500 val within 0.02 of the best source at every stage of training: see
    benchmarks/teachers.py.

    Args:
        model: see `attention_affinity`.
        images: what the model takes, [B, C, height, width] in pixels.

    Returns:
        [B, N, N] float32 in [-1, 1], symmetric. A partitioner takes values below 0 as 0.

    Raises:
        ValueError: where the patches cannot be told from the prefix tokens.
        RuntimeError: where no attention is found; it names the modules that were looked at.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> token_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    name, module = attention_modules(model)[0]
    read: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.extend(value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim == 3)
        if read:
            raise _Done

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with _all_patches(model), suppress(_Done):
            _encode(model, images)
    finally:
        handle.remove()
    if not read:
        raise RuntimeError(_not_found(model, f"gave no tokens, [B, tokens, width], to {name}"))
    tokens = read[0] if getattr(module, "batch_first", True) else read[0].transpose(0, 1)  # of nn.MultiheadAttention
    tokens = tokens[:, _count_prefix(model, images, tokens.shape[1]) :]
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        tokens = nn.functional.normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
        return tokens @ tokens.mT


def _count_prefix(model: nn.Module, images: Tensor, tokens: int) -> int:
    """How many tokens (class, register, ...) come before the patches."""
    height, width = patch_grid(model, images)
    if tokens < height * width:
        raise ValueError(
            f"{type(model).__name__} attends over {tokens} tokens, fewer than the {height} x {width} "
            f"patches of images of shape {list(images.shape)}: does it drop patches (masking, patch_drop_rate)?"
        )
    return tokens - height * width


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The patch grid (H, W) of images of shape [B, C, height, width], from the `patch_size` of the model's parts.

    Example:
        >>> import timm
        >>> patch_grid(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 224, 160))
        (14, 10)
    """
    rows, columns = _patch_size(model)
    height, width = images.shape[-2:]
    if getattr(_patch_embed(model), "dynamic_img_pad", False):
        return -(-height // rows), -(-width // columns)
    return height // rows, width // columns


def whole_patches(model: nn.Module, images: Tensor) -> Tensor:
    """The pixels of the patches: without those at the right and the bottom that fill none, or with those that pad one.

    Example:
        >>> import timm
        >>> whole_patches(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 230, 160)).shape
        torch.Size([1, 3, 224, 160])
    """
    height, width = (cells * size for cells, size in zip(patch_grid(model, images), _patch_size(model), strict=True))
    images = images[..., :height, :width]
    right, below = width - images.shape[-1], height - images.shape[-2]
    return nn.functional.pad(images, (0, right, 0, below), mode="replicate") if right or below else images


def _patch_size(model: nn.Module) -> tuple[int, int]:
    embed = _patch_embed(model)
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} has no patch_embed.patch_size (in pixels), which tells the patch grid: set it, as "
            "in model.patch_embed.patch_size = 16"
        )
    return _pair(embed.patch_size)


def _patch_embed(model: nn.Module) -> Any:
    """What knows the patch size: `patch_embed`, or the first module that has one; None where there is none."""
    candidates = (getattr(model, "patch_embed", None), *model.modules())
    return next((module for module in candidates if hasattr(module, "patch_size")), None)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


class _Reader(TorchFunctionMode):
    """Adds up the attention of some modules, [B, tokens, tokens]."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules, self.left = set(modules), set(modules)
        self.running: nn.Module | None = None
        self.total: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Know which of the modules is running, for as long as the context lasts."""
        handles = [module.register_forward_pre_hook(self._enter) for module in self.modules]
        handles += [module.register_forward_hook(self._leave) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.running = module

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.running not in self.left:
            return func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            self._add(_attend(*args, **kwargs)[0])
        elif func is multi_head_attention_forward:  # nn.MultiheadAttention, whose inside no mode sees
            weights = {"need_weights": True, "average_attn_weights": True, "training": False}
            self._add(func(*args, **{**kwargs, **weights})[1][:, None])
        result = func(*args, **kwargs)
        if func in (Tensor.softmax, torch.softmax, softmax):
            self._add(result)
        return result

    def _add(self, attention: Tensor) -> None:
        if attention.ndim != 4:
            raise ValueError(
                f"attention has shape {list(attention.shape)}, but must be [B, heads, tokens, tokens]: unflatten the "
                "heads before the softmax"
            )
        attention = attention.float().mean(1)
        if self.total is not None and self.total.shape != attention.shape:
            raise ValueError(
                f"attention has shape {list(attention.shape)} in one layer and {list(self.total.shape)} in another: it "
                "must be between all tokens of an image in each (no windows): choose such layers with layers=[...]"
            )
        self.total = attention if self.total is None else self.total + attention
        self.left = {module for module in self.left if module is not self.running}
        if not self.left:
            raise _Done


@contextmanager
def reading(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Read the attention of a forward pass that runs anyway, such as that of a teacher: there is no second pass.

    What the model returns, its gradients and the random state are those that it has without this.

    Args:
        model: see `attention_affinity`, but it masks if it does. Not compiled: what torch.compile fused is not seen.
        layers: which attention layers, counted from 0 or, below 0, from the end; all where None.

    Yields:
        A function from the images of that pass, [B, C, height, width], to what `attention_affinity` returns for them:
        [B, N, N] float32, without gradient. It may be called in the context or after it. Each forward pass starts anew:
        of several, the last one counts.

    Raises:
        ValueError: where a layer does not exist; by the function, where the images are no such batch or patches were
            left out.
        RuntimeError: by the function, where a layer was not run or took no attention that can be read.

    Example:
        >>> import timm
        >>> vit, images = timm.create_model("vit_tiny_patch16_224", depth=2).eval(), torch.randn(1, 3, 224, 224)
        >>> with reading(vit) as affinity:
        ...     features = vit(images)
        >>> affinity(images).shape
        torch.Size([1, 196, 196])
    """
    wanted = attention_modules(model, layers)
    reader = _Onlooker([module for _, module in wanted])

    def affinity(images: Tensor) -> Tensor:
        if reader.total is None or reader.left:
            silent = ", ".join(name for name, module in wanted if module in reader.left)
            raise RuntimeError(_not_found(model, f"took no softmax attention in {silent} while it was read"))
        if len(reader.total) != len(images):
            raise ValueError(
                f"attention of {len(reader.total)} images was read last, but images has shape {list(images.shape)}: "
                "give the images of the last pass"
            )
        prefix = _count_prefix(model, images, reader.total.shape[1])
        return reader.total[:, prefix:, prefix:] / len(reader.modules)

    with reader.hooked(), reader:
        yield affinity


class _Onlooker(_Reader):
    """A reader that ends no forward pass, and starts anew when a module runs again."""

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self.left:
            self.left, self.total = set(self.modules), None
        super()._enter(module, args)

    def _add(self, attention: Tensor) -> None:
        with suppress(_Done):
            super()._add(attention.detach())


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention returns, after the softmax [B, heads, tokens, tokens] that it does not."""
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    attention = torch.softmax(logits, -1, dtype=torch.float32)
    return attention, attention.to(value.dtype) @ value


def attention_modules(model: nn.Module, layers: Sequence[int] | None = None) -> list[tuple[str, nn.Module]]:
    """The encoder's attention modules by name: in `blocks` where there are such, so that no decoder is counted.

    Args:
        model: see `attention_affinity`.
        layers: which of them, counted from 0 or, below 0, from the end; all where None.

    Raises:
        ValueError: where a layer does not exist.
        RuntimeError: where there are none; it names the modules that were looked at.
    """
    encoder = _encoder(model)
    inside = set(getattr(encoder, "blocks", encoder).modules())
    named = [(name, module) for name, module in model.named_modules() if module in inside]
    found = [(name, module) for name, module in named if any(hasattr(module, heads) for heads in HEADS)]
    # A decoder sees mask tokens, not images.
    found = [(name, module) for name, module in found if not re.search(DECODER, name)] or found
    # Where a block or the whole model has such a name too, the attention is what lies innermost.
    known = {module for _, module in found}
    found = [(name, module) for name, module in found if len(known.intersection(module.modules())) == 1]
    if not found:
        raise RuntimeError(_not_found(model, f"has no attention module, which is one with `{'` or `'.join(HEADS)}`"))
    if layers is None:
        return found
    if isinstance(layers, int) or not len(layers):
        raise ValueError(f"layers={layers} must be a list of at least one layer, such as [0, 1]")
    return [found[_layer_index(layer, len(found))] for layer in layers]


def _layer_index(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} does not exist: the model has {count} attention layers, 0..{count - 1}")
    return layer % count


def _encode(model: nn.Module, images: Tensor) -> None:
    """Run the encoder on all patches."""
    encoder = _encoder(model)
    if hasattr(encoder, "forward_encoder"):
        encoder.forward_encoder(images, 0.0)
    elif hasattr(encoder, "forward_features"):
        encoder.forward_features(images)
    elif hasattr(model, "base_model"):
        # Only where it must: at its own size, Hugging Face's interpolation refuses images that are not square.
        resized = _pair(_patch_embed(model).image_size) != images.shape[-2:]
        encoder(images, **({"interpolate_pos_encoding": True} if resized else {}))
    else:
        encoder(images)


def _encoder(model: nn.Module) -> Any:
    """The model without its head or decoder, where it has that name for it (Hugging Face's)."""
    return getattr(model, "base_model", model)


@contextmanager
def _all_patches(model: nn.Module) -> Iterator[None]:
    """Make an MAE keep every patch, in order, for as long as the context lasts."""
    owner = next((module for module in model.modules() if hasattr(module, "random_masking")), None)
    if owner is None:
        yield
        return
    before, own = vars(owner).get("random_masking"), host_method(owner, "random_masking")

    first = next(iter(signature(own).parameters))

    def keep_all(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        x = args[0] if args else kwargs[first]
        if owner not in _results:
            _results[owner] = learn_results(lambda: own(*args, **kwargs), x)
        in_order = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return arrange(MaskedPatches(x, torch.zeros_like(in_order), in_order), _results[owner])

    vars(owner)["random_masking"] = keep_all
    try:
        yield
    finally:
        del vars(owner)["random_masking"]
        if before is not None:
            vars(owner)["random_masking"] = before


def _not_found(model: nn.Module, what: str) -> str:
    looked_at = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name]
    shown = ", ".join(looked_at[:40]) + (f" and {len(looked_at) - 40} more" if len(looked_at) > 40 else "")
    return (
        f"{type(model).__name__} {what}. Attention is read where a module has its number of heads as `num_heads` and "
        "takes a softmax or torch's scaled_dot_product_attention: set self.num_heads in yours, name the layers that do "
        "with layers=[...], or compute an affinity [B, N, N] yourself and give it to a partitioner. "
        f"Modules looked at: {shown or 'none'}."
    )
