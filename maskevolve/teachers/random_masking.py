"""The method `random_masking` of an MAE: what a call of it asks for, and what it returns, learned by trying it.

MAE's takes (x, mask_ratio) and returns (visible, mask, ids_restore). Its descendants take more, return more, or return
the same in another order: ids_keep in the fourth or in the first place, a mask that is 1 where a patch stays.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks.functional import MaskedPatches

__all__ = ["Result", "UnknownResultsError", "arrange", "call_reader", "host_method", "learn_results"]


class UnknownResultsError(TypeError):
    """A `random_masking` returns what nobody knows."""


class Result(NamedTuple):
    """One of the values that a `random_masking` returns."""

    name: str
    dtype: torch.dtype


def host_method(owner: Any, name: str) -> Callable[..., Any]:
    """A method of a module, bound to it: the one that it had before integrations replaced it."""
    method: Any = getattr(owner, name)
    return MethodType(method.own, owner) if hasattr(method, "own") else method


def call_reader(method: Callable[..., Any]) -> Callable[..., tuple[Tensor, Any, bool]]:
    """How to read a call of `random_masking`.

    Args:
        method: the model's own, bound to it.

    Returns:
        What turns the arguments of a call into the patches, the mask ratio, and whether the call brings a tensor that
        says what to mask, such as noise.

    Raises:
        TypeError: where the method has no argument for the mask ratio.
    """
    parameters = [each for each in signature(method).parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    names = [each.name for each in parameters]
    # Named so, or MAE's second argument under another name.
    ratios = [each for each in parameters if "ratio" in each.name]
    ratios += [each for each in parameters[1:2] if each.default is not None]
    if not ratios:
        raise TypeError(
            f"random_masking{signature(method)} has no argument for the mask ratio: let it take (x, mask_ratio), as "
            "MAE's does"
        )
    ratio = ratios[0]

    def read(*args: Any, **kwargs: Any) -> tuple[Tensor, Any, bool]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given.pop(names[0])
        return x, given.pop(ratio.name, ratio.default), any(isinstance(value, Tensor) for value in given.values())

    return read


@torch.no_grad()
def learn_results(call: Callable[[], Any], x: Tensor) -> tuple[Result, ...]:
    """What `random_masking` returns: call it once, and recognise each value. Random states are as before.

    Args:
        call: calls the model's own with the patches x.
        x: patches [B, N, D], no two alike.

    Raises:
        UnknownResultsError: where it returns something else.

    Examples:
        >>> def random_masking(x, mask_ratio):
        ...     ids_shuffle = torch.rand(x.shape[:2]).argsort(1)
        ...     return ids_shuffle[:, : int(x.shape[1] * (1 - mask_ratio))], ids_shuffle.argsort(1)
        >>> x = torch.arange(32.0).view(2, 16, 1)
        >>> [result.name for result in learn_results(lambda: random_masking(x, 0.5), x)]
        ['ids_keep', 'ids_restore']
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        returned = call()
    values = returned if isinstance(returned, tuple | list) else (returned,)
    orders = [value for value in values if isinstance(value, Tensor) and not value.is_floating_point()]
    for order in orders:
        for ids_restore in (order, order.argsort(1)) if order.shape == x.shape[:2] else ():
            names = _name(values, x, ids_restore)
            if names:
                return tuple(Result(name, value.dtype) for name, value in zip(names, values, strict=True))
    shapes = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    raise UnknownResultsError(
        f"random_masking of patches {list(x.shape)} returns {shapes}. Known are, in any order, the visible patches, "
        "the mask, ids_restore and ids_keep, as MAE defines them, ids_restore among them: let yours return these"
    )


def arrange(masked: MaskedPatches, results: tuple[Result, ...]) -> tuple[Tensor, ...]:
    """What a `random_masking` that returns `results` would return of a mask."""
    values = _values(*masked)
    # Patches stay in the dtype that they have now.
    return tuple(
        values[result.name]() if result.name == "visible" else values[result.name]().to(result.dtype)
        for result in results
    )


def _values(visible: Tensor, mask: Tensor, ids_restore: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All that is known to be returned."""
    keep = visible.shape[1]
    return {
        "visible": lambda: visible,
        "mask": lambda: mask,
        "kept": lambda: 1 - mask,
        "ids_restore": lambda: ids_restore,
        "ids_shuffle": lambda: ids_restore.argsort(1),
        "ids_keep": lambda: ids_restore.argsort(1)[:, :keep],
        "ids_mask": lambda: ids_restore.argsort(1)[:, keep:],
    }


def _name(values: Any, x: Tensor, ids_restore: Tensor) -> list[str]:
    """The name of each value, if this is ids_restore; none where one has no name."""
    ids_shuffle = ids_restore.argsort(1)
    for keep in _possible_counts(values, x):
        visible = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
        known = _values(visible, (ids_restore >= keep).float(), ids_restore)
        names = [next((name for name, make in known.items() if _is_same(value, make())), "") for value in values]
        if all(names) and {*names} - {"ids_restore", "ids_shuffle"}:  # which of these two it is, other values tell
            return names
    return []


def _possible_counts(values: Any, x: Tensor) -> list[int]:
    """How many patches may stay, the most first: by the shapes and by the zeros of what may be a mask."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 1]
    counts = {tensor.shape[1] for tensor in tensors} | {int((tensor[0] == 0).sum()) for tensor in tensors}
    counts |= {x.shape[1] - count for count in counts}
    return sorted((count for count in counts if 0 < count <= x.shape[1]), reverse=True)


def _is_same(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == expected.shape and bool((value == expected).all())
