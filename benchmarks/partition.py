"""Parts out of attention: our cut with each solver against the clustering of the paper's released code.

python benchmarks/partition.py --device cpu     # some minutes on 2 cores
python benchmarks/partition.py --device cuda
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from planted import planted_attention
from torch import Tensor
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner

EM = "EM, as released"
CASES = {  # grid side, batch, number of parts
    "cpu": ((14, 1, 10), (14, 64, 10), (14, 64, 40), (28, 4, 10), (48, 1, 10)),
    "cuda": ((14, 1, 10), (14, 256, 10), (14, 256, 40), (28, 64, 10), (48, 16, 10)),
}


def round_trip(affinity: Tensor, num_parts: int) -> Tensor:
    """As with a CPU library in a GPU program: to the CPU, an image at a time, and back."""
    partitioner = GraphCutPartitioner(num_parts, solver="pymaxflow")
    return torch.stack([partitioner(image[None].cpu())[0] for image in affinity]).to(affinity.device)


def partitioners(affinity: Tensor, num_parts: int) -> dict[str, Callable[[], Any]]:
    solvers = ("pymaxflow", "scipy", "torch") + (("triton",) if affinity.is_cuda else ())
    cuts = {solver: GraphCutPartitioner(num_parts, solver=solver) for solver in solvers}
    em = EMPartitioner(num_parts)
    return {
        **{f"graph cut, {solver}": (lambda cut=cut: cut(affinity)) for solver, cut in cuts.items()},
        "graph cut, an image at a time on the CPU": lambda: round_trip(affinity, num_parts),
        EM: lambda: em(affinity),
    }


def unlike_cpu(function: Callable[[], Tensor], affinity: Tensor, num_parts: int) -> int | None:
    """How many patches are in another part than when the whole is done on the CPU; None where it is."""
    if not affinity.is_cuda:
        return None
    return int((function().cpu() != GraphCutPartitioner(num_parts)(affinity.cpu())).sum())


def main() -> None:
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    rows, groups = [], {}
    for side, batch, num_parts in tqdm(CASES[args.device]):
        _, affinity = planted_attention(batch, side, side, 8, strength=0.3, noise=1, heads=1)
        affinity = affinity.mean(1).to(args.device)
        functions = partitioners(affinity, num_parts)
        found = [
            {"name": row["name"], "grid": f"{side} x {side}", "batch": batch, "parts": num_parts, **row}
            for row in common.compare(functions, EM, args.device)
        ]
        for row, function in zip(found, functions.values(), strict=True):
            row["peak_mib"] = common.peak_memory(function, args.device)
            row["patches_unlike_cpu"] = unlike_cpu(function, affinity, num_parts) if row["name"] != EM else None
        rows += found
        if num_parts == 10 and (batch > 1 or side == 48):
            groups[f"{batch} images, {side} x {side}"] = [{**row, "ours": row["name"] != EM} for row in found]
    common.save("partition", args.device, rows, common.bars(groups, f"time against {EM}"), baseline=EM)


if __name__ == "__main__":
    main()
