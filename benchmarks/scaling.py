"""How time grows with the number of patches and with the batch.

python benchmarks/scaling.py --device cpu
python benchmarks/scaling.py --device cuda

The default teacher is called whole, on a narrow ViT, so that most of it is the cut; a forward pass of that ViT is what
all are set against. The partitioner gets what the teacher gives it. EM gets the affinity of all patches, and no grid
above 48 x 48. In the file, `growth` is the exponent of the time in the number of patches, from the number before: 1 is
linear, 2 is that of the affinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import common
import torch
from matplotlib.figure import Figure
from partition import PATCH, as_by_default, planted
from timm.models.vision_transformer import VisionTransformer
from tqdm import tqdm

from maskevolve import EMPartitioner, EvolvingMask, GraphCutPartitioner, PartTeacher

SIDES = (7, 14, 20, 28, 37, 48, 64)
LARGEST_EM = 48  # which takes 20 times as long on the next
BATCHES = {"cpu": (1, 4, 16, 64), "cuda": (1, 4, 16, 64, 256)}
FIXED_BATCH = {"cpu": 1, "cuda": 16}
WIDTH = 768  # of what is masked
VIT = {"embed_dim": 64, "depth": 6, "num_heads": 2}
FORWARD = "forward pass"


def functions(batch_size: int, side: int, device: str) -> dict[str, Callable[[], Any]]:
    given = as_by_default(batch_size, side).to(device)
    x = torch.randn(batch_size, side * side, WIDTH, device=device)
    parts = torch.randint(10, x.shape[:2], device=device)
    masking = EvolvingMask(100).set_epoch(24).to(device)
    vit = VisionTransformer(PATCH * side, PATCH, num_classes=0, **VIT).to(device).eval()
    teacher = PartTeacher(vit, GraphCutPartitioner(), total_epochs=100).to(device).set_epoch(50)
    forward, cut, em = torch.no_grad()(vit), GraphCutPartitioner(10), EMPartitioner(10)
    found = {
        FORWARD: lambda: forward(given.images),
        "PartTeacher": lambda: teacher(given.images),
        "EvolvingMask": lambda: masking(x, parts=parts),
        "GraphCutPartitioner": lambda: given.cut(cut),
    }
    if side <= LARGEST_EM:
        affinity = planted(batch_size, side).to(device)
        found["EMPartitioner"] = lambda: em(affinity)
    return found


def main() -> None:
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    cases = [("patches", FIXED_BATCH[args.device], side) for side in SIDES]
    cases += [("batch", batch_size, 14) for batch_size in BATCHES[args.device]]
    rows: list[common.Row] = []
    for over, batch_size, side in tqdm(cases):
        for row in common.compare(functions(batch_size, side, args.device), FORWARD, args.device):
            row = {"name": row["name"], "over": over, "batch": batch_size, "patches": side**2, **row}
            rows.append({**row, "growth": growth(rows, row) if over == "patches" else None})
    common.save("scaling", args.device, rows, draw(rows), baseline=FORWARD)


def growth(before: list[common.Row], row: common.Row) -> float | None:
    """The exponent of the time in the number of patches, since the last row of this name; None where there is none."""
    for last in reversed(before):
        if last["name"] == row["name"]:
            times, patches = (math.log(row[key] / last[key]) for key in ("milliseconds", "patches"))
            return times / patches
    return None


def draw(rows: list[common.Row]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for ax, over in zip(figure.subplots(1, 2), ("patches", "batch"), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row[over], row["milliseconds"]) for row in rows if row["name"] == name and row["over"] == over]
            ax.plot(*zip(*points, strict=True), marker="o", label=name)
        ax.set(xlabel=over, xscale="log", yscale="log")
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
