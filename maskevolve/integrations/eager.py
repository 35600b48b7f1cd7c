"""Functions that torch.compile runs as they are, and that can be pickled."""

from collections.abc import Callable
from typing import Any

import torch


class Eager:
    """A function of a module, or a `partial` of one, that torch.compile does not trace.

    `torch.compiler.disable` as a decorator would import torch's compiler, which takes seconds; what it makes later
    cannot be pickled.

    Args:
        function: what is called.
        recursive: whether what it calls is not compiled either.
    """

    def __init__(self, function: Callable[..., Any], recursive: bool = True) -> None:
        self.made_of = function, recursive
        self.run = torch.compiler.disable(function, recursive=recursive)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __reduce__(self) -> Any:
        return Eager, self.made_of
