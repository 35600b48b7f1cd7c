"""Masks of clips against those of others: the mask alone, a call forward, and one with the backward pass.

python benchmarks/clips.py --quick          # a look, in less than a minute
python benchmarks/clips.py --device cpu     # some minutes on 2 cores

The mask alone is set against VideoMAE's tubes, which NumPy draws a clip at a time, and which its loader stacks. A call
is set against mae_st's random masking. VideoMAE keeps 20 patches of each frame at this ratio, and ours 19, as mae_st
and MAE round: 0.1 of 196, rounded down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import common
import peers
import torch
from mask_throughput import forward, forward_and_backward
from torch import Tensor
from tqdm import tqdm

from maskevolve import BlockMask, EvolvingMask, GridMask, MaskGenerator, PartMask, RandomMask, TubeMask
from maskevolve.masks.base import Masking

GRID = (8, 14, 14)
MASK_RATIO = 0.9
WIDTH = 384
BATCHES = {"cpu": (8, 32), "cuda": (32, 128)}
MAE = "mae_st random_masking"
VIDEOMAE = "VideoMAE tubes in NumPy"
ONE_BY_ONE = "MaskGenerator of RandomMask tubes"

Calls = dict[str, Callable[[], Any]]


def masks(device: str) -> dict[str, Masking]:
    return {
        "RandomMask": RandomMask(),
        "GridMask": GridMask(),
        "TubeMask of RandomMask": TubeMask(RandomMask()),
        "TubeMask of BlockMask": TubeMask(BlockMask()),
        "PartMask": PartMask(),
        "EvolvingMask": EvolvingMask(100).set_epoch(24).to(device),  # half way
    }


def alone(x: Tensor) -> Calls:
    """Every mask as bool, without patches."""
    parts, batch, device = random_parts(x), len(x), x.device

    def draw(mask: Masking) -> Callable[[], Any]:
        how = {"parts": parts} if mask.needs_parts else {}
        return lambda: mask.sample(batch, GRID, MASK_RATIO, device=device, **how)

    calls = {name: draw(mask) for name, mask in masks(device.type).items()}
    generator = MaskGenerator(TubeMask(RandomMask()), GRID, MASK_RATIO)
    calls[ONE_BY_ONE] = lambda: torch.stack([torch.from_numpy(generator()) for _ in range(batch)]).to(device)
    return calls | {VIDEOMAE: lambda: peers.videomae_tubes(batch, GRID, MASK_RATIO).to(device)}


def taking_visible(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Every mask that takes patches."""
    parts = random_parts(x)

    def take(mask: Masking) -> Callable[[Tensor], Any]:
        how = {"parts": parts} if mask.needs_parts else {}
        return lambda x: mask(x, MASK_RATIO, grid_size=GRID, **how)

    return {name: take(mask) for name, mask in masks(x.device.type).items()} | {
        MAE: lambda x: peers.mae_st_random_masking(x, MASK_RATIO),
        VIDEOMAE: lambda x: peers.videomae_take_visible(x, GRID, MASK_RATIO),
    }


def random_parts(x: Tensor) -> Tensor:
    return torch.randint(10, x.shape[:2], device=x.device)


def measure(way: Callable[..., Any], x: Tensor, device: str) -> list[common.Row]:
    """Rows of the masks alone, or of calls."""
    calls = alone(x) if way is alone else {name: way(mask, x) for name, mask in taking_visible(x).items()}
    case = {"batch": len(x), "pass": "mask alone" if way is alone else way.__name__.replace("_", " ")}
    rows = common.compare(calls, VIDEOMAE if way is alone else MAE, device)
    return [{"name": row["name"], **case, **row} for row in rows]


def main() -> None:
    args = common.parse_quick(__doc__)
    torch.manual_seed(0)
    rows, groups = [], {}
    batches = BATCHES[args.device][: 1 if args.quick else None]
    for batch_size, way in tqdm(list(itertools.product(batches, (alone, forward, forward_and_backward)))):
        x = torch.randn(batch_size, GRID[0] * GRID[1] * GRID[2], WIDTH, device=args.device)
        found = measure(way, x, args.device)
        rows += found
        if way is not alone and batch_size == batches[-1]:
            title = f"{found[0]['pass']}\n{batch_size} clips of 8 x 14 x 14 patches"
            groups[title] = [{**row, "ours": row["name"] not in (MAE, VIDEOMAE)} for row in found]
    if args.quick:
        common.print_table(rows)
        return
    settings = {"grid": GRID, "mask_ratio": MASK_RATIO, "width": WIDTH, "baselines": [VIDEOMAE, MAE]}
    common.save("clips", args.device, rows, common.bars(groups, f"time against {MAE}"), **settings)


if __name__ == "__main__":
    main()
