"""Where the patches of an image, a clip, a volume or a series lie, as the patch embedding of a model lays them out."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad

from ..grid import SIDES, Grid

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Unfold)


class PatchGridError(ValueError):
    """A model does not lay out its patches in a grid of one to three axes, or does not tell how."""


class _Layout(NamedTuple):
    """Of patches, in pixels, along each axis: (vertically, horizontally) in a picture."""

    kernel: Grid
    stride: Grid
    padding: Grid
    is_padded: bool = False  # at the right and the bottom, until the last patch is full
    channels: int | None = None  # of the convolution that makes patches


def patch_grid(model: nn.Module, images: Tensor) -> Grid:
    """The patch grid of images, from the model's patch embedding: (H, W) of pictures [B, C, height, width].

    It is (T, H, W) of clips [B, C, frames, height, width] or [B, frames, C, height, width], whichever has as many
    channels as the model, (D, H, W) of volumes, and (L,) of series [B, C, length].

    It follows from the stride of the convolution in the embedding. Where there are several or none, or `patch_size` is
    neither its kernel nor its stride, it follows from `patch_size`. A frame of a video, [B, C, 1, height, width], is an
    image, too, where patches are no deeper. Raises a PatchGridError where the model has no patch size or several patch
    embeddings; a ValueError for images of another shape, or smaller than a patch.

    Examples:
        >>> import timm, torch
        >>> patch_grid(timm.create_model("vit_tiny_patch16_224", depth=1), torch.empty(1, 3, 224, 160))
        (14, 10)
    """
    layout, images = patch_layout(model), channels_first(model, images)
    grid = tuple(
        -(-size // stride) if layout.is_padded else (size + 2 * padding - kernel) // stride + 1
        for size, kernel, stride, padding in zip(images.shape[2:], *layout[:3], strict=True)
    )
    if min(grid) < 1:
        shape = list(images.shape)
        raise ValueError(f"images of shape {shape} have no whole patch of {layout.kernel} pixels: make them larger")
    return grid[1:] if _is_frame(layout, images) else grid


def _is_frame(layout: _Layout, images: Tensor) -> bool:
    """Whether clips have one frame, and patches are no deeper."""
    return len(layout.kernel) == 3 and layout.kernel[0] == layout.stride[0] == images.shape[2] == 1


def channels_first(model: nn.Module, images: Tensor) -> Tensor:
    """Images as a convolution takes them, [B, C, ...], of as many axes as the patches of a model."""
    layout, shape = patch_layout(model), list(images.shape)
    axes = len(layout.kernel)
    if axes == 2 and images.ndim == 5 and shape[2] == 1:
        return images[:, :, 0]
    if axes == 3 and images.ndim == 4 and layout.kernel[0] == 1:
        return images[:, :, None]
    if images.ndim != 2 + axes:
        raise ValueError(f"images has shape {shape}, but must be [B, C, {SIDES[axes]}]: pass images[None] for one")
    # Clips of Hugging Face are [B, frames, C, height, width]; as many frames as channels tell that by a name alone.
    by_name = shape[1] != shape[2] or getattr(model, "frames_first", hasattr(patch_embedding(model), "tubelet_size"))
    is_frames_first = axes == 3 and layout.channels == shape[2] and by_name
    return images.transpose(1, 2) if is_frames_first else images


def whole_patches(model: nn.Module, images: Tensor) -> Tensor:
    """The pixels of the patches: a cell of the grid each, as large as the stride, in the centre of the patch."""
    layout, grid, images = patch_layout(model), patch_grid(model, images), channels_first(model, images)
    if is_frame := _is_frame(layout, images):
        images = images[:, :, 0]
    kernel, stride, padding = (sides[is_frame:] for sides in layout[:3])
    borders: list[int] = []  # that are padded: missing on the left, on the right, above and below
    for axis in reversed(range(len(grid))):
        first = (kernel[axis] - stride[axis]) // 2 - padding[axis]
        end, size = first + grid[axis] * stride[axis], images.shape[2 + axis]
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
        other = "say grid_size=... where masks are applied, or use a model that embeds whole images"
        raise PatchGridError(f"{several}: {other}, or a function from images to labels")
    is_padded = bool(getattr(embed, "dynamic_img_pad", False))
    size = as_sides(embed.patch_size) if _has_patch_size(embed) else None
    if (convolution := _convolution(embed)) is not None:
        names = ("kernel_size", "stride", "padding", "dilation")
        axes = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(convolution), 2)
        kernel, stride, padding, dilation = (as_sides(getattr(convolution, name), axes) for name in names)
        # Video models may say how large patches are within a frame.
        if size is None or any(size == sides[-len(size) :] or {*size} == {*sides} for sides in (kernel, stride)):
            reach = tuple(one * (side - 1) + 1 for one, side in zip(dilation, kernel, strict=True))
            return _Layout(reach, stride, padding, is_padded, getattr(convolution, "in_channels", None))
    elif hasattr(embed, "feat_ratio"):  # a convolutional stem of timm shrinks an image before its patches
        size = as_sides(embed.feat_ratio(as_scalar=False))
    size = as_sides(embed.stride) if size is None else size  # of the first of several convolutions
    if not 1 <= len(size) <= 3:
        has = (
            f"{type(model).__name__} has patches of {len(size)} axes ({type(embed).__name__}, {size}), not one to three"
        )
        raise PatchGridError(f"{has}: use a mask that needs no grid: RandomMask(), or PartMask() with parts [B, N]")
    return _Layout(size, size, (0,) * len(size), is_padded)


def _convolution(embed: nn.Module) -> Any:
    """The one that makes patches of pixels; None where it does not do so alone."""
    found: list[Any] = [module for module in embed.modules() if isinstance(module, CONVOLUTIONS)]
    alone = len(found) == 1 and not isinstance(found[0].padding, str)
    return found[0] if alone and {*as_sides(found[0].stride)} != {1} else None


def _has_patch_size(module: nn.Module) -> bool:
    size = getattr(module, "patch_size", None)
    return isinstance(size, int) or (isinstance(size, tuple | list) and all(isinstance(side, int) for side in size))


def as_sides(size: Any, axes: int = 2) -> Grid:
    """A size as a tuple: that of a square, or of as many axes, where it is one number."""
    return (size,) * axes if isinstance(size, int) else tuple(size)
