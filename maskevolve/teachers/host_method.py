"""Methods of somebody's model, replaced on the instance: copies and pickles of the model keep the replacement."""

from collections.abc import Callable
from functools import partial
from inspect import getattr_static, signature
from typing import Any

from torch import nn

# Called with the evolution, the module, the module's own method and the arguments of the call.
Handler = Callable[..., Any]


def replace_method(owner: nn.Module, name: str, evolution: Any, handler: Handler) -> None:
    """Let `handler` answer calls of a method of a module, until `restore_method`.

    The replacement holds its module as an argument, not in a closure, so that a deep copy runs its own weights and the
    module can be pickled; for that, `handler` must be a function of a module or a `partial` of one.
    """
    before, own = vars(owner).get(name), host_method(owner, name)
    if before is None and isinstance(getattr_static(type(owner), name), staticmethod):
        before = own
    method = partial(_call, owner, evolution, name, before, handler)
    vars(method)["__signature__"] = signature(own)  # which transformers' Trainer looks at
    vars(owner)[name] = method


def restore_method(owner: nn.Module, name: str) -> None:
    """Give a module its own method back."""
    method: Any = vars(owner).get(name)
    if is_replaced(method):
        before = method.args[3]
        del vars(owner)[name]
        if before is not None and not isinstance(getattr_static(type(owner), name, None), staticmethod):
            vars(owner)[name] = before


def restore_methods(model: nn.Module) -> None:
    """Give all modules of a copy of a model their own methods back."""
    for module in model.modules():
        for name in list(vars(module)):
            restore_method(module, name)


def host_method(owner: Any, name: str) -> Callable[..., Any]:
    """A method of a module, bound to it: the one that it has without a replacement."""
    method: Any = getattr(owner, name)
    return _own(owner, name, method.args[3]) if is_replaced(method) else method


def _call(
    module: nn.Module, evolution: Any, name: str, before: Any, handler: Handler, /, *args: Any, **kwargs: Any
) -> Any:
    own = _own(module, name, before)
    if evolution.is_removed:  # and this module a copy that was made before
        return own(*args, **kwargs)
    return handler(evolution, module, own, *args, **kwargs)


def _own(module: nn.Module, name: str, before: Any) -> Callable[..., Any]:
    return partial(getattr(type(module), name), module) if before is None else before


def is_replaced(method: Any) -> bool:
    """Whether a value is what `replace_method` sets."""
    return isinstance(method, partial) and method.func is _call
