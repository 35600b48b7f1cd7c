"""Where the patches of an image lie, as the patch embedding of a model lays them out."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Unfold)
Pair = tuple[int, int]


class PatchGridError(ValueError):
    """A model does not lay out its patches in a grid of two dimensions, or does not tell how."""


class _Layout(NamedTuple):
    """Of patches, in pixels: (vertically, horizontally)."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    is_padded: bool = False  # at the right and the bottom, until the last patch is full


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The patch grid (H, W) of images of shape [B, C, height, width], from the model's patch embedding.

    It follows from the stride of the convolution in the embedding. Where there are several or none, or `patch_size` is
    neither its kernel nor its stride, it follows from `patch_size`. A frame of a video, [B, C, 1, height, width], is an
    image, too. Raises a PatchGridError where the model has no patch size, patches of one or three dimensions, or
    several patch embeddings; a ValueError for images of another shape, or smaller than a patch.

    Examples:
        >>> import timm, torch
        >>> patch_grid(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 224, 160))
        (14, 10)
    """
    layout, shape = patch_layout(model), list(images.shape)
    if images.ndim != 4 and (images.ndim != 5 or shape[2] != 1):
        raise ValueError(f"images has shape {shape}, but must be [B, C, height, width]: pass images[None] for one")
    rows, columns = (
        -(-size // stride) if layout.is_padded else (size + 2 * padding - kernel) // stride + 1
        for size, kernel, stride, padding in zip(shape[-2:], layout.kernel, layout.stride, layout.padding, strict=True)
    )
    if min(rows, columns) < 1:
        raise ValueError(f"images of shape {shape} have no whole patch of {layout.kernel} pixels: make them larger")
    return rows, columns


def whole_patches(model: nn.Module, images: Tensor) -> Tensor:
    """The pixels of the patches: a cell of the grid each, as large as the stride, in the centre of the patch."""
    layout, grid = patch_layout(model), patch_grid(model, images)
    images = images.flatten(1, -3)  # a frame of a video as an image
    borders: list[int] = []  # that are padded: missing on the left, on the right, above and below
    for axis in (1, 0):
        first = (layout.kernel[axis] - layout.stride[axis]) // 2 - layout.padding[axis]
        end, size = first + grid[axis] * layout.stride[axis], images.shape[2 + axis]
        images = images.narrow(2 + axis, max(first, 0), min(end, size) - max(first, 0))
        borders += [max(-first, 0), max(end - size, 0)]
    return pad(images, borders, mode="replicate") if any(borders) else images


def patch_embedding(model: nn.Module) -> Any:
    """What lays out the patches: `patch_embed`, the first module with a patch size, or the first convolution."""
    named = getattr(model, "patch_embed", None)
    several = isinstance(named, nn.ModuleList | nn.ModuleDict)
    if several or (isinstance(named, nn.Module) and (_has_patch_size(named) or _convolution(named))):
        return named
    sized = (module for module in model.modules() if _has_patch_size(module))
    return next(sized, next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None))


def patch_layout(model: nn.Module) -> _Layout:
    """How the patch embedding of a model lays out patches; see `patch_grid`."""
    embed = patch_embedding(model)
    if embed is None:
        without = f"{type(model).__name__} has no patch_embed.patch_size and no convolution, which tell the patch grid"
        raise PatchGridError(f"{without}: set it, in pixels, as in model.patch_embed.patch_size = 16")
    if isinstance(embed, nn.ModuleList | nn.ModuleDict):
        several = f"{type(model).__name__}.patch_embed is a {type(embed).__name__} of {len(embed)} embeddings"
        raise PatchGridError(f"{several}: use a model that embeds whole images, or a function from images to labels")
    is_padded = bool(getattr(embed, "dynamic_img_pad", False))
    size = _two(model, embed, embed.patch_size) if _has_patch_size(embed) else None
    if (convolution := _convolution(embed)) is not None:
        names = ("kernel_size", "stride", "padding", "dilation")
        kernel, stride, padding, dilation = (_two(model, embed, getattr(convolution, name)) for name in names)
        if size in (None, kernel, stride):
            reach = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
            return _Layout(reach, stride, padding, is_padded)
    elif hasattr(embed, "feat_ratio"):  # a convolutional stem of timm shrinks an image before its patches
        size = _two(model, embed, embed.feat_ratio(as_scalar=False))
    size = _two(model, embed, embed.stride) if size is None else size  # of the first of several convolutions
    return _Layout(size, size, is_padded=is_padded)


def _convolution(embed: nn.Module) -> Any:
    """The one that makes patches of pixels; None where it does not do so alone."""
    found: list[Any] = [module for module in embed.modules() if isinstance(module, CONVOLUTIONS)]
    alone = len(found) == 1 and not isinstance(found[0].padding, str)
    return found[0] if alone and as_sides(found[0].stride) != (1, 1) else None


def _has_patch_size(module: nn.Module) -> bool:
    size = getattr(module, "patch_size", None)
    return isinstance(size, int) or (isinstance(size, tuple | list) and all(isinstance(side, int) for side in size))


def as_sides(size: Any) -> tuple[int, ...]:
    """A size as a tuple: that of a square where it is one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _two(model: nn.Module, embed: Any, size: Any) -> Pair:
    """The size (vertically, horizontally); of one frame of a video, too."""
    sides = as_sides(size)
    sides = sides[1:] if len(sides) == 3 and sides[0] <= 1 else sides
    if len(sides) != 2:
        has = f"{type(model).__name__} has patches of {len(sides)} dimensions ({type(embed).__name__}, {size}), not two"
        raise PatchGridError(f"{has}: use a mask that needs no grid: RandomMask(), or PartMask() with parts [B, N]")
    return sides[0], sides[1]
