"""How time grows with the number of patches and with the batch.

python benchmarks/scaling.py --device cpu
python benchmarks/scaling.py --device cuda
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from matplotlib.figure import Figure
from planted import planted_attention
from tqdm import tqdm

from maskevolve import EMPartitioner, EvolvingMask, GraphCutPartitioner

SIDES = (7, 14, 20, 28, 40, 48)
BATCHES = {"cpu": (1, 4, 16, 64), "cuda": (1, 4, 16, 64, 256)}
FIXED_BATCH = {"cpu": 1, "cuda": 16}
WIDTH = 768


def functions(batch_size: int, side: int, device: str) -> dict[str, Callable[[], Any]]:
    _, affinity = planted_attention(batch_size, side, side, 8, strength=0.3, noise=1, heads=1)
    affinity = affinity[:, 0].to(device)
    x = torch.randn(batch_size, side * side, WIDTH, device=device)
    parts = torch.randint(10, x.shape[:2], device=device)
    masking = EvolvingMask(100).set_epoch(24).to(device)
    cut, em = GraphCutPartitioner(10), EMPartitioner(10)
    return {
        "EvolvingMask": lambda: masking(x, parts=parts),
        "GraphCutPartitioner": lambda: cut(affinity),
        "EMPartitioner": lambda: em(affinity),
    }


def main() -> None:
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    cases = [("patches", FIXED_BATCH[args.device], side) for side in SIDES]
    cases += [("batch", batch_size, 14) for batch_size in BATCHES[args.device]]
    rows = []
    for over, batch_size, side in tqdm(cases):
        found = common.compare(functions(batch_size, side, args.device), "EMPartitioner", args.device)
        rows += [{"name": row["name"], "over": over, "batch": batch_size, "patches": side**2, **row} for row in found]
    common.save("scaling", args.device, rows, draw(rows), baseline="EMPartitioner")


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
