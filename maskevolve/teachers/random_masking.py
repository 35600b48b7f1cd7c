"""The method `random_masking` of an MAE: what a call of it asks for, and what it returns.

MAE's takes (x, mask_ratio) and returns (visible, mask, ids_restore). Its descendants take more, return more, or return
the same in another order: ids_keep in the fourth or in the first place, a mask that is 1 where a patch stays.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks import MaskedPatches


class UnknownResultsError(TypeError):
    """A `random_masking` returns what is not known."""


class Result(NamedTuple):
    """One of the values that a `random_masking` returns."""

    name: str
    dtype: torch.dtype
    kept: int | None = None  # of a mask: how many patches it keeps, where more than are visible, as in CrossMAE


class CallSpec(NamedTuple):
    """How a `random_masking` is called."""

    names: list[str]
    ratio: str
    defaults: dict[str, Any]


def call_spec(method: Callable[..., Any]) -> CallSpec:
    """How a `random_masking`, bound to its model, is called; a TypeError where it takes no mask ratio."""
    parameters = [each for each in signature(method).parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    # Named so, or MAE's second argument under another name.
    ratios = [each.name for each in parameters if "ratio" in each.name]
    ratios += [each.name for each in parameters[1:2] if each.default is not None]
    if not ratios:
        should = "has no argument for the mask ratio: let it take (x, mask_ratio), as MAE's does"
        raise TypeError(f"random_masking{signature(method)} {should}")
    defaults = {each.name: each.default for each in parameters if each.default is not Parameter.empty}
    return CallSpec([each.name for each in parameters], ratios[0], defaults)


def read_call(spec: CallSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """The patches, the mask ratio, and the further arguments whose value is not their default, by name."""
    given = {**spec.defaults, **dict(zip(spec.names, args, strict=False)), **kwargs}
    x, mask_ratio = given.pop(spec.names[0]), given.pop(spec.ratio)
    others = {name: value for name, value in given.items() if not _is(value, spec.defaults.get(name, spec))}
    return x, mask_ratio, others


def _is(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and not isinstance(default, Tensor) and value == default)


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
    orders = [
        each for each in values if isinstance(each, Tensor) and (each.dtype, each.shape) == (torch.int64, x.shape[:2])
    ]
    kept = (each for each in values if isinstance(each, Tensor) and (each.dtype, each.ndim) == (torch.int64, 2))
    orders = orders or [_complete(each, x.shape[1]) for each in kept if len(each) == len(x)]
    for ids_restore in [either for each in orders for either in (each, each.argsort(1))]:
        results = [result for value in values if (result := _recognise(value, x, ids_restore))]
        # Which of these two it is, the other values tell.
        if len(results) == len(values) and {each.name for each in results} - {"ids_restore", "ids_shuffle"}:
            visible = {value.shape[1] for value in values if value.ndim == 3}
            return tuple(each._replace(kept=None) if {each.kept} == visible else each for each in results)
    shapes = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    raise UnknownResultsError(
        f"random_masking of patches {list(x.shape)} returns {shapes}. Known are, in any order, the visible patches, "
        "the mask, ids_restore and ids_keep, as MAE defines them, ids_restore or ids_keep among them: let yours "
        "return these, of the patches (not images) that are its first argument"
    )


def _complete(kept: Tensor, number: int) -> Tensor:
    """ids_shuffle of ids_keep, as MONAI returns it without the rest: the patches that are kept, then the others."""
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept) - number
    return kept.new_zeros(len(kept), number).scatter_(1, kept, place).argsort(dim=1, stable=True)


def _recognise(value: Any, x: Tensor, ids_restore: Tensor) -> Result | None:
    """What a value is, if this is ids_restore."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    # How many patches are kept, by the shape or, of a mask, by its zeros or its ones.
    zeros, number = int((value[0] == 0).sum()), x.shape[1]
    for kept in sorted({value.shape[1], number - value.shape[1], zeros, number - zeros}, reverse=True):
        if not 0 < kept <= number:
            continue
        visible = x.take_along_dim(ids_restore.argsort(1)[:, :kept, None], 1)
        known = _known(MaskedPatches(visible, (ids_restore >= kept).float(), ids_restore))
        for name, make in known.items():
            if value.shape == (made := make()).shape and bool((value == made).all()):
                return Result(name, value.dtype, kept if name in ("mask", "kept") else None)
    return None


def arrange(masked: MaskedPatches, results: tuple[Result, ...]) -> tuple[Tensor, ...]:
    """What a `random_masking` that returns `results` would return of a mask; patches stay in the dtype they have."""
    returned = []
    for name, dtype, kept in results:
        known = _known(masked if kept is None else masked._replace(mask=(masked.ids_restore >= kept).float()))
        returned.append(masked.visible if name == "visible" else known[name]().to(dtype))
    return tuple(returned)


def _known(masked: MaskedPatches) -> dict[str, Callable[[], Tensor]]:
    """All that is known to be returned."""
    visible, mask, ids_restore = masked
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
