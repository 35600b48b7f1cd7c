"""What keeps its precision where the rest of a model is cast."""

from collections.abc import Callable

from torch import Tensor


def keep_dtype(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function for `nn.Module._apply`, such as ``lambda x: x.cuda().half()``, without its change of dtype.
    In half precision, an average would stand still and an epoch would be off: ``model.bfloat16()`` leaves them alone.
    """

    def moved(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return moved
