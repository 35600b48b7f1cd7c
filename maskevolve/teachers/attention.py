"""How much the patches of an image attend to one another in a ViT, and how alike they are where it first does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from .attention_mode import AttentionMode
from .encoder import all_patches, encode, read_lock
from .stride import every_few_patches
from .trial import Done, attention_modules, check_shape, not_found, prefix_length


@torch.no_grad()
def attention_affinity(
    model: nn.Module, images: Tensor, layers: Sequence[int] | Literal["middle"] | None = None, stride: int = 1
) -> Tensor:
    """Mean softmax attention between patches, over heads and layers; prefix tokens (class, register, ...) are dropped.

    Args:
        model: a ViT of timm, torchvision or Hugging Face or one built alike, or an MAE, whose masking is off here. It
            runs in the mode it is in: call ``model.eval()`` first for a teacher.
        images: what the model takes, [B, C, height, width] in pixels.
        layers: which attention layers, counted from 0 or, below 0, from the end; "middle", those of the middle third;
            all where None. Those after the last one that is wanted do not run.
        stride: which patches: every stride-th one in each direction is given to the blocks. At 2, these cost a quarter.

    Returns:
        [B, N, N] float32: row n is the attention of patch n to every patch; its sum is below 1 with prefix tokens. With
        a stride, N is the number of the patches that are left: half of the rows and columns, rounded up, at 2.

    Raises:
        ValueError: where a layer does not exist, fewer than 2 x 2 patches are left, the model cannot be tried on
            pictures, the patches cannot be told from the prefix tokens, or the model brings them in another order.
        RuntimeError: where no attention is found; it names the modules that were looked at.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> attention_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    modules, fewer = attention_modules(model, layers, images), every_few_patches(model, images, stride)
    with read_lock, _reading(model, modules, True, stride) as affinity, all_patches(model), fewer, suppress(Done):
        encode(model, images)
    return affinity(images)


def reading(
    model: nn.Module, layers: Sequence[int] | None = None
) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    """Read the attention of a forward pass that runs anyway, such as that of a teacher: there is no second pass.

    What the model returns, its gradients and the random state are those that it has without this.

    Args:
        model: see `attention_affinity`, but it masks if it does. Not compiled: what torch.compile fused is not seen.
        layers: see `attention_affinity`.

    Yields:
        Callable: from the images of that pass, [B, C, height, width], to what `attention_affinity` returns for them,
        [B, N, N] float32, without gradient. Call it in the context or after it. Of several passes, the last one counts.

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
    return _reading(model, attention_modules(model, layers), ends=False, stride=1)


@contextmanager
def _reading(
    model: nn.Module, layers: list[tuple[str, nn.Module]], ends: bool, stride: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Add up the attention of some layers; where it `ends` the pass, after the last of them."""
    names = {module: name for name, module in layers}
    left, total = dict(names), None

    def enter(module: nn.Module, tokens: list[Tensor]) -> None:
        nonlocal left, total
        if module not in left:  # another pass
            left, total = dict(names), None

    def take(module: nn.Module, attention: Tensor) -> None:
        nonlocal total
        if module not in left:  # its second softmax
            return
        check_shape(attention.shape, None if total is None else total.shape)
        attention = attention.detach().float().mean(1)
        total = attention if total is None else total + attention
        del left[module]
        if ends and not left:
            raise Done

    def affinity(images: Tensor) -> Tensor:
        if total is None or left:
            raise RuntimeError(not_found(model, f"took no softmax attention in {', '.join(left.values())}"))
        if len(total) != len(images):
            given = f"but images has shape {list(images.shape)}: give the images of the last pass"
            raise ValueError(f"attention of {len(total)} images was read last, {given}")
        prefix = prefix_length(model, images, total.shape[1], stride)
        return total[:, prefix:, prefix:] / len(names)

    with AttentionMode(names, enter, take):
        yield affinity


@torch.no_grad()
def token_affinity(model: nn.Module, images: Tensor, stride: int = 1) -> Tensor:
    """Cosine similarity of the patches' tokens where the first attention layer reads them, less their mean.

    So no block of the model is run. For a small MAE, parts that were cut from it agreed with people's on BSDS500 val
    within 0.02 of the best source at every stage of training: see benchmarks/teachers.py.

    Args:
        model: see `attention_affinity`.
        images: what the model takes, [B, C, height, width] in pixels.
        stride: see `attention_affinity`.

    Returns:
        [B, N, N] float32 in [-1, 1], symmetric. A partitioner takes values below 0 as 0.

    Raises:
        ValueError, RuntimeError: see `attention_affinity`.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> token_affinity(vit, torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 196, 196])
    """
    name, first = attention_modules(model, images=images)[0]
    read: list[Tensor] = []

    def enter(module: nn.Module, tokens: list[Tensor]) -> None:
        read.extend(tokens)
        raise Done

    mode, fewer = AttentionMode([first], enter, lambda *_: None), every_few_patches(model, images, stride)
    with read_lock, all_patches(model), fewer, suppress(Done), mode:
        encode(model, images)
    if not read:
        raise RuntimeError(not_found(model, f"gave no tokens, [B, tokens, width], to {name}"))
    tokens = read[0][:, prefix_length(model, images, read[0].shape[1], stride) :]
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        tokens = nn.functional.normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
        return tokens @ tokens.mT
