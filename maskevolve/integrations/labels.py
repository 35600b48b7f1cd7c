"""Labels from anywhere, as a source of parts: which callables give them, and how they come to the patch grid."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.kinds import Masking
from ..parts.segmentation import parts_from_segmentation

__all__ = ["HOW_TO_GET_A_TEACHER", "check_labels", "check_teacher", "labels_to_grid", "takes_argument"]

HOW_TO_GET_A_TEACHER = "pass PartTeacher(model, GraphCutPartitioner(), total_epochs=epochs)"


def check_teacher(teacher: Any) -> None:
    """Refuse what cannot turn images into labels."""
    if teacher is None:
        return
    wants_affinity = isinstance(teacher, nn.Module) and takes_argument(teacher.forward, "affinity")
    if isinstance(teacher, type | Masking) or not callable(teacher) or wants_affinity:
        raise TypeError(
            f"teacher={teacher!r} is no PartTeacher, and no function from images to labels: {HOW_TO_GET_A_TEACHER}"
        )


def takes_argument(function: Any, name: str) -> bool:
    """Whether a function or module can be called with an argument of this name."""
    try:
        parameters = signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # of some built-in functions
        return False
    return name in parameters and parameters[name].kind is not Parameter.POSITIONAL_ONLY


def check_labels(labels: Any) -> Tensor:
    """The labels of a batch as a tensor, [B, N] or [B, h, w].

    Raises:
        TypeError: where they are no array or tensor.
        ValueError: where they are no integers, or of another shape.
    """
    if not hasattr(labels, "shape"):
        raise TypeError(f"parts is a {type(labels).__name__}, but must be a tensor: use torch.stack or torch.as_tensor")
    parts: Tensor = torch.as_tensor(labels).as_subclass(Tensor)
    if parts.is_floating_point() or parts.is_complex():
        raise ValueError(
            f"parts has dtype {parts.dtype}, but labels are integers: use parts.long() where they are labels; where a "
            "ViT is to cut the parts, pass FrozenTeacher(vit, GraphCutPartitioner(), total_epochs=epochs)"
        )
    if parts.ndim not in (2, 3):
        raise ValueError(
            f"parts has shape {list(parts.shape)}, but must be [B, N], a label for each patch, or [B, h, w], a map of "
            "labels for each image: use labels[:, 0] where there is a channel"
        )
    return parts


def labels_to_grid(labels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Labels of patches [B, N] as they are; of maps [B, h, w], by majority or, where they are coarser, the nearest."""
    return labels if labels.ndim == 2 else parts_from_segmentation(labels, grid_size)
