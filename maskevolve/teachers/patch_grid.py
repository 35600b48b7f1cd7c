"""Where the patches of an image lie, as the patch embedding of a model lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

__all__ = ["PatchWatch", "image_size", "patch_embedding", "patch_grid", "tiny_pictures", "whole_patches"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Unfold)
EMBEDDERS = (torch.conv1d, torch.conv2d, torch.conv3d, linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
"""What turns pixels into tokens."""

Pair = tuple[int, int]


class _Layout(NamedTuple):
    """Of patches, in pixels: (vertically, horizontally)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    is_padded: bool = False  # at the right and the bottom, until the last patch is full


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The patch grid (H, W) of images of shape [B, C, height, width], from the model's patch embedding.

    It follows from the stride of the convolution in the embedding. Where there are several or none, or `patch_size` is
    neither its kernel nor its stride, it follows from `patch_size`.

    Raises:
        ValueError: where the model has no patch size, or patches of one or three dimensions, or images are smaller
            than a patch.

    Examples:
        >>> import timm
        >>> patch_grid(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 224, 160))
        (14, 10)
    """
    layout = _layout(model)
    if images.ndim != 4:
        raise ValueError(f"images have shape {list(images.shape)}, but a patch grid is that of [B, C, height, width]")
    rows, columns = (_count(layout, axis, images.shape[2 + axis]) for axis in (0, 1))
    if min(rows, columns) < 1:
        raise ValueError(
            f"images of shape {list(images.shape)} have no whole patch of {layout.kernel[0]} x {layout.kernel[1]} "
            "pixels: make them larger"
        )
    return rows, columns


def whole_patches(model: nn.Module, images: Tensor) -> Tensor:
    """The pixels of the patches, a cell of the grid each: without those that are in no patch, or with those that pad.

    Where patches overlap, the cell of each is its centre, as large as the stride.

    Examples:
        >>> import timm
        >>> whole_patches(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 230, 160)).shape
        torch.Size([1, 3, 224, 160])
    """
    layout, grid = _layout(model), patch_grid(model, images)
    borders: list[int] = []  # missing on the left, on the right, above and below
    for axis in (1, 0):
        first = (layout.kernel[axis] - layout.stride[axis]) // 2 - layout.padding[axis]
        end = first + grid[axis] * layout.stride[axis]
        size = images.shape[2 + axis]
        images = images.narrow(2 + axis, max(first, 0), min(end, size) - max(first, 0))
        borders += [max(-first, 0), max(end - size, 0)]
    return pad(images, borders, mode="replicate") if any(borders) else images


def patch_embedding(model: nn.Module) -> Any:
    """What lays out the patches: `patch_embed`, the first module with a patch size, or the first convolution."""
    named = getattr(model, "patch_embed", None)
    if isinstance(named, nn.Module) and (_has_patch_size(named) or _convolution(named)):
        return named
    sized = (module for module in model.modules() if _has_patch_size(module))
    return next(sized, next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None))


def _layout(model: nn.Module) -> _Layout:
    embed = patch_embedding(model)
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} has no patch_embed.patch_size (in pixels) and no convolution, which tell the "
            "patch grid: set it, as in model.patch_embed.patch_size = 16"
        )
    is_padded = bool(getattr(embed, "dynamic_img_pad", False))
    size = _two(model, embed, embed.patch_size) if _has_patch_size(embed) else None
    convolution = _convolution(embed)
    if convolution is not None:
        kernel, stride, padding, dilation = (
            _two(model, embed, getattr(convolution, name)) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        if size in (None, kernel, stride):
            reach = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
            return _Layout(reach, stride, padding, is_padded)
    elif hasattr(embed, "feat_ratio"):  # a convolutional stem of timm shrinks an image before its patches
        size = _two(model, embed, embed.feat_ratio(as_scalar=False))
    size = _two(model, embed, embed.stride) if size is None else size  # of the first of several convolutions
    return _Layout(size, size, is_padded=is_padded)


def _count(layout: _Layout, axis: int, size: int) -> int:
    """How many patches there are along an axis."""
    if layout.is_padded:
        return -(-size // layout.stride[axis])
    return int((size + 2 * layout.padding[axis] - layout.kernel[axis]) // layout.stride[axis] + 1)


def _convolution(embed: nn.Module) -> Any:
    """The one that makes patches of pixels; None where it does not do so alone."""
    found: list[Any] = [module for module in embed.modules() if isinstance(module, CONVOLUTIONS)]
    alone = len(found) == 1 and not isinstance(found[0].padding, str)
    return found[0] if alone and _pair(found[0].stride) != (1, 1) else None


def _has_patch_size(module: nn.Module) -> bool:
    size = getattr(module, "patch_size", None)
    return isinstance(size, int) or (isinstance(size, tuple | list) and all(isinstance(side, int) for side in size))


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _two(model: nn.Module, embed: Any, size: Any) -> Pair:
    pair = _pair(size)
    if len(pair) != 2:
        raise ValueError(
            f"{type(model).__name__} has patches of {len(pair)} dimensions ({type(embed).__name__}, {size}), but a "
            "patch grid has two: use a mask that needs no grid, such as RandomMask() or PartMask() with parts of yours"
        )
    return pair[0], pair[1]


class PatchWatch(TorchFunctionMode):
    """Notes the shapes of what turns pixels into tokens, so that the patch grid can be compared to what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in EMBEDDERS:
            self.shapes.append(tuple(result.shape))
        return result

    def check(self, model: nn.Module, images: Tensor) -> None:
        """Refuse a model that made other patches of the images than those of `patch_grid`."""
        grid = patch_grid(model, images)
        if self.shapes and not any(_holds(shape, len(images), grid) for shape in self.shapes):
            raise ValueError(
                f"{type(model).__name__} should cut images of shape {list(images.shape)} into {grid[0]} x {grid[1]} "
                f"patches, by its {type(patch_embedding(model)).__name__}, but made tensors of the shapes "
                f"{', '.join(str(list(shape)) for shape in dict.fromkeys(self.shapes))} of them: set "
                "model.patch_embed.patch_size to the distance of its patches in pixels, or choose another image size"
            )


def _holds(shape: tuple[int, ...], batch: int, grid: Pair) -> bool:
    """Whether a tensor of this shape can be the tokens of a batch of images, one a patch."""
    count = grid[0] * grid[1]
    if len(shape) == 2:
        return shape[0] == batch * count
    if len(shape) == 3:
        return shape[:2] in ((batch, count), (count, batch))
    return len(shape) == 4 and shape[0] == batch and grid in (shape[1:3], shape[2:4])


def image_size(model: nn.Module) -> tuple[int, ...] | None:
    """The size (height, width) of images that the model was made for, in pixels; None where it does not say."""
    owners = (patch_embedding(model), model, getattr(model, "config", None), *model.modules())
    sizes = (getattr(owner, name, None) for owner in owners for name in ("img_size", "image_size"))
    return next((_pair(size) for size in sizes if isinstance(size, int | tuple | list)), None)


def tiny_pictures(model: nn.Module) -> Iterator[Tensor]:
    """Pictures [1, C, height, width] to try a model with: of its size or, where it does not say, ever larger ones."""
    embed = patch_embedding(model)
    weights = (weight for owner in (embed, model) if owner is not None for weight in owner.parameters())
    weight = next((weight for weight in weights if weight.is_floating_point()), torch.empty(()))
    size = image_size(model)
    for height, width in [size] if size is not None else _likely_sizes(model):
        yield torch.rand(1, _channels(model), height, width, device=weight.device, dtype=weight.dtype)


def _likely_sizes(model: nn.Module) -> list[Pair]:
    layout = _layout(model) if patch_embedding(model) is not None else _Layout((16, 16), (16, 16))
    # Position embeddings, [1, tokens, width], tell how many patches there are.
    tables = {value.shape[1] for value in (*model.parameters(), *model.buffers()) if value.ndim == 3}
    sides = sorted({4, *(math.isqrt(count) for count in tables if count > 3)})
    sizes = [tuple((side - 1) * layout.stride[axis] + layout.kernel[axis] for axis in (0, 1)) for side in sides]
    return [(height, width) for height, width in (*sizes, (224, 224))]


def _channels(model: nn.Module) -> int:
    embed = patch_embedding(model)
    modules = [] if embed is None else list(embed.modules())
    owners = (*modules, model, getattr(model, "config", None))
    counts = (getattr(owner, name, None) for owner in owners for name in ("in_channels", "in_chans", "num_channels"))
    return next((count for count in counts if isinstance(count, int)), 3)
