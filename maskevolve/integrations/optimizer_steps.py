"""What runs after each step of an optimizer, whatever it is wrapped in."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def call_after_steps(optimizer: Any, function: Callable[[], None]) -> RemovableHandle:
    """Call a function after each step of what `unwrap_optimizer` returned that is not skipped, until `.remove()`."""

    def after(*_: Any) -> None:
        # float16 gradients may overflow: a GradScaler tells a fused optimizer, and DeepSpeed's optimizers say so.
        found_inf = getattr(optimizer, "found_inf", None)
        if not getattr(optimizer, "overflow", False) and not (found_inf is not None and bool(found_inf)):
            function()

    if _runs_hooks(optimizer):
        handle: RemovableHandle = optimizer.register_step_post_hook(after)
        return handle
    return _wrap_step(optimizer, after)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer that steps. Accelerate's and Lightning's wrappers are asked for steps that they do not take.

    Raises:
        TypeError: where it is no optimizer, such as a class, or a scheduler, which has steps, too.
    """
    is_optimizer = callable(getattr(optimizer, "step", None)) and hasattr(optimizer, "param_groups")
    if isinstance(optimizer, type) or not is_optimizer:
        raise TypeError(
            f"optimizer={optimizer!r:.100} is no optimizer, which has step() and param_groups: pass the optimizer "
            "itself, not its name, its class or a scheduler"
        )
    while isinstance(optimizer, Optimizer) and not _runs_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_active(handle: RemovableHandle | None) -> bool:
    """Whether there is a handle, and what it stands for is still called."""
    return handle is not None and handle.id in (handle.hooks_dict_ref() or ())


def _runs_hooks(optimizer: Any) -> bool:
    """Whether torch has made this optimizer's step run hooks: not that of a subclass that leaves out `__init__`."""
    return getattr(type(optimizer).step, "hooked", False)


def _wrap_step(optimizer: Any, after: Callable[[], None]) -> RemovableHandle:
    hooks: OrderedDict[int, Callable[[], None]] = OrderedDict()
    handle = RemovableHandle(hooks)
    hooks[handle.id] = after
    own = optimizer.step

    @wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        for hook in hooks.values():
            hook()
        return result

    optimizer.step = step
    return handle
