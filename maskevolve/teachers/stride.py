"""Reading every few patches only: the blocks of an encoder are given these, as an MAE's are given the visible ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_whole
from ..grid import Grid, every, times
from .encoder import is_fatal
from .patch_grid import patch_grid
from .trial import Done, attention_modules, blocks_of, trial_of


def check_stride(stride: Any) -> None:
    check_whole("stride", stride, 1, "how far apart the patches are that are read, 1 for all of them")


def leaves_enough(grid: Grid, stride: int) -> bool:
    """Whether two patches stay along each side that has as many."""
    return all(len(every(side, stride)) >= min(side, 2) for side in grid)


def check_left(grid: Grid, stride: int) -> None:
    """Raise a ValueError where too few patches are left."""
    if not leaves_enough(grid, stride):
        left = times([len(every(side, stride)) for side in grid])
        raise ValueError(
            f"stride={stride} leaves {left} of {times(grid)} patches, where two must stay along each side that has as "
            "many: pass stride=1, or larger images"
        )


@contextmanager
def every_few_patches(model: nn.Module, images: Tensor, stride: int) -> Iterator[None]:
    """Let the blocks of an encoder see every `stride`-th patch of images in each direction, and all prefix tokens.

    Positions that are added before the blocks stay with their patches, and so do rotary ones that blocks are given.
    Positions that blocks know of themselves, as those of BEiT, do not fit: that is a ValueError.
    """
    check_stride(stride)
    if stride == 1:
        yield
        return
    grid, seen = patch_grid(model, images), list[nn.Module]()
    check_left(grid, stride)
    count, prefixes = math.prod(grid), {0, *trial_of(model).prefixes}
    kept = torch.zeros(1, dtype=torch.long, device=images.device)
    for side in grid:
        there = every(side, stride)
        place = torch.arange(there.start, there.stop, stride, device=images.device)
        kept = (kept[:, None] * side + place).flatten()

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: pick(each) for name, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(pick, value))
        if not torch.is_tensor(value) or value.ndim < 2 or value.shape[-2] - count not in prefixes:
            return value
        prefix = value.shape[-2] - count
        return value.index_select(-2, torch.cat([torch.arange(prefix, device=kept.device), kept + prefix]))

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # The tokens come first. After the first block they are fewer already, and as many as all patches by chance.
        own = args[:1] if seen else ()
        first = dict([*kwargs.items()][:1]) if seen and not args else {}
        seen.append(block)
        return (*own, *pick(args[len(own) :])), pick(kwargs) | first

    blocks = blocks_of(model, [name for name, _ in attention_modules(model)])
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        yield
    except Exception as error:
        if not seen or isinstance(error, Done) or is_fatal(error):
            raise
        why = str(error).partition("\n")[0]
        blocks_cannot = f"the blocks of {type(model).__name__} cannot do with every few patches"
        raise ValueError(f"{blocks_cannot} ({why}): pass stride=1") from error
    finally:
        for handle in handles:
            handle.remove()
