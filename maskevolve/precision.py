"""What keeps its precision where the rest of a model is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["keep_dtype"]


def keep_dtype(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` is given, without the change of dtype that it may make: devices change, dtypes do not.

    For an average or an epoch in half precision would stand still or be off, where ``model.bfloat16()`` casts all.

    Args:
        convert: a function from a tensor to the tensor that takes its place, such as ``lambda x: x.cuda().half()``.

    Returns:
        The function that moves a tensor to where `convert` does, in the dtype that it has.

    Examples:
        >>> import torch
        >>> keep_dtype(Tensor.half)(torch.tensor(0.1))
        tensor(0.1000)
    """

    def moved(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return moved
