"""Masks against those of others: time of a call against MAE's random_masking, forward and with the backward pass.

python benchmarks/mask_throughput.py --device cpu     # some minutes on 2 cores
python benchmarks/mask_throughput.py --device cuda
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import common
import peers
import torch
from torch import Tensor
from tqdm import tqdm

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask

WIDTH = 768
MAE = "MAE random_masking"
BATCHES = {"cpu": (16, 64), "cuda": (64, 256, 1024, 4096)}
PATCHES = (196, 784)
DTYPES = (torch.float32, torch.bfloat16)


def masks(x: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Every mask, ours first; all take x and remove three quarters."""
    parts = torch.randint(10, x.shape[:2], device=x.device)
    halfway = EvolvingMask(100).set_epoch(24).to(x.device)
    baseline = EvolvingMask(100, end=BlockMask()).set_epoch(24).to(x.device)
    return {
        "RandomMask": RandomMask(),
        "GridMask": GridMask(),
        "BlockMask": BlockMask(),
        "PartMask": lambda x: PartMask()(x, parts=parts),
        "PartMask(share=0.5)": lambda x: PartMask(share=0.5)(x, parts=parts),
        "EvolvingMask": lambda x: halfway(x, parts=parts),
        "EvolvingMask, block": baseline,
        MAE: peers.mae_random_masking,
        "timm PatchDropout": peers.timm_patch_dropout(),
        "Lightly random": peers.lightly_token_mask("random_token_mask"),
        "Lightly grid": peers.lightly_token_mask("random_grid_token_mask", grid_size=2),
        "Hugging Face ViTMAE": peers.hugging_face(x.shape[2], x.shape[1]),
        "BEiT block in NumPy": peers.beit_block_masking,
        "bare gather": peers.bare_gather(x),
    }


def forward(mask: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: mask(x)


def forward_and_backward(mask: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_()

    def step() -> None:
        out = mask(x)
        visible = out if isinstance(out, Tensor) else out[0]
        x.grad = None
        visible.backward(visible.detach())

    return step


def main() -> None:
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    rows, groups = [], {}
    cases = list(itertools.product(PATCHES, BATCHES[args.device], DTYPES, (forward, forward_and_backward)))
    for num_patches, batch_size, dtype, way in tqdm(cases):
        x = torch.randn(batch_size, num_patches, WIDTH, dtype=dtype, device=args.device)
        functions = {name: way(mask, x) for name, mask in masks(x).items()}
        case = {"patches": num_patches, "batch": batch_size, "dtype": str(dtype)[6:], "pass": way.__name__}
        found = [{"name": row["name"], **case, **row} for row in common.compare(functions, MAE, args.device)]
        rows += found
        if dtype == torch.float32 and num_patches == 196 and batch_size == BATCHES[args.device][-1]:
            ours = list(functions).index(MAE)
            title = f"{way.__name__.replace('_', ' ')}\n{batch_size} x {num_patches} patches, float32"
            groups[title] = [{**row, "ours": i < ours} for i, row in enumerate(found)]
    figure = common.bars(groups, f"time against {MAE}")
    common.save("mask_throughput", args.device, rows, figure, width=WIDTH, baseline=MAE)


if __name__ == "__main__":
    main()
