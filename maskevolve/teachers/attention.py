"""How much the patches of an image belong together, read from a ViT while it runs. The model is not touched.

Hooks mark which attention module is running; a torch-function mode sees the queries and keys that it hands to
`scaled_dot_product_attention`, the softmax that it takes itself, or the weights of nn.MultiheadAttention. So norms,
rotary embeddings and biases are included, whatever the model does to get there. All of it is gone when the call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode

from .encoder import all_patches, encode, encoder_of, has_attribute, has_decoder, try_picture, untouched
from .patch_grid import PatchWatch, patch_grid

__all__ = ["attention_affinity", "attention_modules", "check_affinity", "reading", "token_affinity"]

HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
"""An attention module is one that has its number of heads under one of these names."""


_known: WeakKeyDictionary[nn.Module, tuple[list[ref[nn.Module]], list[str]]] = WeakKeyDictionary()
"""Of models with a decoder that were tried: all their attention modules, and the names of the encoder's."""


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

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> attention_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    wanted = attention_modules(model, layers)
    reader, watch = _Reader([module for _, module in wanted]), PatchWatch()
    with reader.hooked(), all_patches(model), watch, reader, suppress(_Done):
        encode(model, images)
    total = _all_read(reader, model, wanted)
    watch.check(model, images)
    return _between_patches(total, model, images) / len(reader.modules)


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

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> token_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    names = {module: name for name, module in _all_attention(model)}
    first: list[nn.Module] = []
    read: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first.append(module)
        read.extend(value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim == 3)
        raise _Done

    handles = [module.register_forward_pre_hook(take, with_kwargs=True) for module in names]
    watch = PatchWatch()
    try:
        with all_patches(model), watch, suppress(_Done):
            encode(model, images)
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        asked = ", ".join(names[module] for module in first or names)
        raise RuntimeError(_not_found(model, f"gave no tokens, [B, tokens, width], to {asked}"))
    watch.check(model, images)
    tokens = read[0] if getattr(first[0], "batch_first", True) else read[0].transpose(0, 1)  # of nn.MultiheadAttention
    tokens = tokens[:, _count_prefix(model, images, tokens.shape[1]) :]
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        tokens = nn.functional.normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
        return tokens @ tokens.mT


def _all_read(reader: _Reader, model: nn.Module, wanted: Sequence[tuple[str, nn.Module]]) -> Tensor:
    """The sum of the attention of all modules that were wanted, [B, tokens, tokens]."""
    if reader.total is None or reader.left:
        silent = ", ".join(name for name, module in wanted if module in reader.left)
        raise RuntimeError(_not_found(model, f"took no softmax attention in {silent}"))
    return reader.total


def _between_patches(attention: Tensor, model: nn.Module, images: Tensor) -> Tensor:
    """[B, tokens, tokens] without the prefix tokens: [B, N, N]."""
    prefix = _count_prefix(model, images, attention.shape[1])
    return attention[:, prefix:, prefix:]


def _count_prefix(model: nn.Module, images: Tensor, tokens: int) -> int:
    """How many tokens (class, register, ...) come before the patches."""
    height, width = patch_grid(model, images)
    if tokens < height * width:
        raise ValueError(
            f"{type(model).__name__} attends over {tokens} tokens, fewer than the {height} x {width} "
            f"patches of images of shape {list(images.shape)}: does it drop patches (masking, patch_drop_rate)?"
        )
    return tokens - height * width


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
            self._add(_attention(*args, **kwargs))
        elif func is multi_head_attention_forward:  # nn.MultiheadAttention, whose inside no mode sees
            self._add(_attention_of_multi_head(*args, **kwargs))
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
        Callable: from the images of that pass, [B, C, height, width], to what `attention_affinity` returns for them,
        [B, N, N] float32, without gradient. It may be called in the context or after it. Each forward pass starts anew:
        of several, the last one counts.

    Raises:
        ValueError: where a layer does not exist; by the function, where the images are no such batch or patches were
            left out.
        RuntimeError: by the function, where a layer was not run or took no attention that can be read.

    Examples:
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
        total = _all_read(reader, model, wanted)
        if len(total) != len(images):
            raise ValueError(
                f"attention of {len(total)} images was read last, but images has shape {list(images.shape)}: "
                "give the images of the last pass"
            )
        return _between_patches(total, model, images) / len(reader.modules)

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


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The softmax that scaled_dot_product_attention takes of these arguments, before dropout, in float32 at least."""
    with torch.autocast(query.device.type, enabled=False):
        query, key = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (query, key))
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        if is_causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        alone = (logits == -torch.inf).all(-1, keepdim=True)  # attends to nothing
        return logits.softmax(-1).masked_fill(alone, 0.0)


def _attention_of_multi_head(*args: Any, **kwargs: Any) -> Tensor:
    """The same of multi_head_attention_forward, [B, 1, tokens, tokens], the mean over its heads."""
    call = signature(multi_head_attention_forward).bind(*args, **kwargs)
    for name, value in call.arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            call.arguments[name] = value.float()
    call.arguments.update(training=False, need_weights=True, average_attn_weights=True)
    with torch.autocast(call.arguments["query"].device.type, enabled=False):
        attention = multi_head_attention_forward(*call.args, **call.kwargs)[1]
    assert attention is not None
    return attention[:, None] if attention.ndim == 3 else attention[None, None]


class _Shapes(_Reader):
    """Notes the shapes of the attention of modules, in the order in which they run: None where none is seen."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        self.shapes: dict[nn.Module, tuple[int, ...] | None] = {}

    def _enter(self, module: nn.Module, args: Any) -> None:
        super()._enter(module, args)
        self.shapes.setdefault(module, None)

    def _add(self, attention: Tensor) -> None:
        assert self.running is not None
        self.shapes[self.running] = tuple(attention.shape)


def attention_modules(model: nn.Module, layers: Sequence[int] | None = None) -> list[tuple[str, nn.Module]]:
    """The encoder's attention modules by name.

    Those of a decoder or a pooling head are left out by where they run. Where the names of the modules leave it open
    which these are, the model is tried on a picture, once: `encode` tells what it runs, a model that masks in its
    forward pass attends over more tokens in its decoder, and in one that does not, the encoder is the list of blocks
    that images come to first.

    Args:
        model: see `attention_affinity`.
        layers: which of them, counted from 0 or, below 0, from the end; all where None.

    Raises:
        ValueError: where a layer does not exist, or the model cannot be tried on a picture.
        RuntimeError: where there are none; it names the modules that were looked at.
    """
    found = _all_attention(model)
    if len(blocks := {_block_list(model, name) for name, _ in found}) > 1 or None in blocks:
        names = _names_in_encoder(model, found)
        found = [(name, module) for name, module in found if name in names]
    if layers is None:
        return found
    if isinstance(layers, int) or not len(layers):
        raise ValueError(f"layers={layers} must be a list of at least one layer, such as [0, 1]")
    return [found[_layer_index(layer, len(found))] for layer in layers]


def _all_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules that attend, by name, those of a decoder too."""
    found = [(name, module) for name, module in model.named_modules() if _has_heads(module)]
    if (encoder := encoder_of(model)) is not model:
        inside = set(encoder.modules())
        found = [(name, module) for name, module in found if module in inside]
    # Where a block or the whole model has such a name too, the attention is what lies innermost.
    known = {module for _, module in found}
    found = [(name, module) for name, module in found if len(known.intersection(module.modules())) == 1]
    if not found:
        raise RuntimeError(_not_found(model, f"has no attention module, which is one with `{'` or `'.join(HEADS)}`"))
    return found


def _has_heads(module: nn.Module) -> bool:
    return any(has_attribute(module, heads) for heads in HEADS)


def _block_list(model: nn.Module, name: str) -> str | None:
    """The name of the outermost list that a module is in."""
    parts = name.split(".")
    owners = (".".join(parts[:end]) for end in range(len(parts)))
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return next((owner for owner in owners if isinstance(model.get_submodule(owner), lists)), None)


def _names_in_encoder(model: nn.Module, found: list[tuple[str, nn.Module]]) -> list[str]:
    """Which of the attention modules are the encoder's. The model is tried once, and again where they change."""
    modules = [ref(module) for _, module in found]
    if model not in _known or _known[model][0] != modules:
        _known[model] = modules, _try_encoder(model, dict(found))
    return _known[model][1]


def _try_encoder(model: nn.Module, found: dict[str, nn.Module]) -> list[str]:
    whole = has_decoder(model)

    def run(picture: Tensor) -> tuple[dict[nn.Module, tuple[int, ...] | None], bool]:
        reader = _Shapes(list(found.values()))
        # Without half of the patches, a decoder has more tokens than the encoder.
        with reader.hooked(), all_patches(model, share=0.5 if whole else 1.0) as asked, reader:
            encode(model, picture)
        return reader.shapes, bool(asked)

    _, (shapes, masks) = try_picture(model, run)
    # Where nothing runs, all stay, for the error that names them.
    names = {module: name for name, module in found.items()}
    # A class token or a pooling head attends to patches, but they do not to one another.
    ran = [module for module, shape in shapes.items() if shape is None or shape[-2] == shape[-1]] or list(names)
    if whole and masks:
        first = shapes.get(ran[0])
        ran = [module for module in ran if shapes.get(module) == first]
    elif whole:
        ran = [module for module in ran if _same_list(model, names[module], names[ran[0]])]
    return [names[module] for module in ran]


def _same_list(model: nn.Module, name: str, other: str) -> bool:
    return _block_list(model, name) == _block_list(model, other)


def _layer_index(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} does not exist: the model has {count} attention layers, 0..{count - 1}")
    return layer % count


def check_affinity(model: nn.Module, layers: Sequence[int] | str | None) -> None:
    """Refuse a model that could not be read in training: it is tried on a tiny picture.

    Args:
        model: see `attention_affinity`.
        layers: what is read; "tokens" for what `token_affinity` reads.

    Raises:
        ValueError: where a layer or the patch grid is not found, or the model cannot be tried on a picture.
        RuntimeError: where no attention is found; it names the modules that were looked at.
    """
    _all_attention(model)
    with all_patches(model):
        picture, _ = try_picture(model, lambda picture: encode(model, picture))
    with untouched(model):
        if isinstance(layers, str):
            token_affinity(model, picture)
        else:
            attention_affinity(model, picture, layers)


def _not_found(model: nn.Module, what: str) -> str:
    looked_at = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name]
    shown = ", ".join(looked_at[:40]) + (f" and {len(looked_at) - 40} more" if len(looked_at) > 40 else "")
    return (
        f"{type(model).__name__} {what}. Attention is read where a module has its number of heads as `num_heads` and "
        "takes a softmax or torch's scaled_dot_product_attention: set self.num_heads in yours, name the layers that do "
        "with layers=[...], or compute an affinity [B, N, N] yourself and give it to a partitioner. "
        f"Modules looked at: {shown or 'none'}."
    )
