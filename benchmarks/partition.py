"""Parts out of attention and pictures: our cut with each solver against the clustering of the paper's released code.

python benchmarks/partition.py --device cpu     # some minutes on 2 cores
python benchmarks/partition.py --device cuda

First with pictures, as the default teacher calls it: random crops of photographs, and the affinity of every second
patch in each direction. EM gets what the published way gives it, the affinity of all patches and no pictures. Then
without pictures, both from the affinity of all patches. The attention is planted and not a model's: how long a cut
takes depends on the contrast of the photographs, and not on what the attention means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from planted import planted_attention
from torch import Tensor
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner
from maskevolve.grid import every

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from photos import PhotoCrops, find_photos

EM = "EM, as released"
PATCH, STRIDE = 16, 2
CASES = {  # with pictures or without: grid side, batch, number of parts
    "cpu": {
        True: (
            (14, 1, 10),
            (14, 64, 10),
            (14, 64, 40),
            (28, 1, 10),
            (28, 4, 10),
            (37, 1, 10),
            (48, 1, 10),
            (64, 1, 10),
        ),
        False: ((14, 1, 10), (14, 64, 10), (28, 4, 10), (48, 1, 10)),
    },
    "cuda": {
        True: (
            *((14, 1, 10), (14, 64, 10), (14, 256, 10), (14, 256, 40), (28, 16, 10), (28, 64, 10)),
            *((37, 16, 10), (48, 1, 10), (48, 16, 10), (64, 4, 10), (64, 16, 10)),
        ),
        False: ((14, 64, 10), (14, 256, 10), (28, 16, 10), (48, 16, 10)),
    },
}
SMALL = 28  # side of the largest grid that plain torch, and one image after another, are not too slow for
MOST = 64 * 28 * 28  # patches of a batch that go from a GPU through the host
SHOWN = (14, 28, 48)  # sides in the figure, each with its largest batch


class Given(NamedTuple):
    """What a partitioner is given."""

    affinity: Tensor
    images: Tensor | None

    def to(self, device: str) -> Given:
        return Given(self.affinity.to(device), None if self.images is None else self.images.to(device))

    def cut(self, partitioner: GraphCutPartitioner) -> Tensor:
        if self.images is None:
            return partitioner(self.affinity)
        return partitioner(self.affinity, None, self.images.shape[2] // PATCH, self.images, STRIDE)

    def round_trip(self, partitioner: GraphCutPartitioner) -> Tensor:
        """As with a CPU library in a GPU program: to the CPU, an image at a time, and back."""
        images = [None] * len(self.affinity) if self.images is None else self.images.split(1)
        each = [Given(*one).to("cpu").cut(partitioner) for one in zip(self.affinity.split(1), images, strict=True)]
        return torch.cat(each).to(self.affinity.device)


def planted(batch: int, side: int) -> Tensor:
    return planted_attention(batch, side, side, 8, strength=0.3, noise=1, heads=1)[1][:, 0]


def as_by_default(batch: int, side: int) -> Given:
    """What the default teacher gives its partitioner, for `side` x `side` patches of 16 pixels."""
    crops = PhotoCrops(find_photos(None), PATCH * side)
    return Given(planted(batch, len(every(side, STRIDE))), torch.stack([crops[index] for index in range(batch)]))


def partitioners(given: Given, affinity: Tensor, num_parts: int) -> dict[str, Callable[[], Any]]:
    """Calls of our cut on what it is given, and of EM on the affinity of all patches."""
    batch, patches = affinity.shape[:2]
    small, on_gpu = patches <= SMALL**2, affinity.is_cuda
    solvers = {
        "pymaxflow": not on_gpu or batch * patches <= MOST,
        "scipy": not on_gpu,
        "torch": small and given.images is not None,
        "triton": on_gpu,
    }
    cuts = {solver: GraphCutPartitioner(num_parts, solver=solver) for solver, taken in solvers.items() if taken}
    functions = {f"graph cut, {solver}": (lambda cut=cut: given.cut(cut)) for solver, cut in cuts.items()}
    if small:
        functions["graph cut, an image at a time on the CPU"] = lambda: given.round_trip(cuts["pymaxflow"])
    em = EMPartitioner(num_parts)
    return {**functions, EM: lambda: em(affinity)}


def measure(given: Given, affinity: Tensor, num_parts: int, device: str) -> list[common.Row]:
    """A row for each partitioner: its time against EM's, its memory, and how its parts differ from the CPU's."""
    functions = partitioners(given, affinity, num_parts)
    rows = common.compare(functions, EM, device)
    on_cpu = given.to("cpu").cut(GraphCutPartitioner(num_parts)) if device == "cuda" else None
    for row, function in zip(rows, functions.values(), strict=True):
        row["peak_mib"] = common.peak_memory(function, device)
        ours = on_cpu is not None and row["name"] != EM
        row["patches_unlike_cpu"] = int((function().cpu() != on_cpu).sum()) if ours else None
    return rows


def main() -> None:
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    rows, groups = [], {}
    cases = [(pictures, *case) for pictures, of_kind in CASES[args.device].items() for case in of_kind]
    for pictures, side, batch, num_parts in tqdm(cases):
        affinity = planted(batch, side).to(args.device)
        given = as_by_default(batch, side).to(args.device) if pictures else Given(affinity, None)
        case = {"grid": f"{side} x {side}", "batch": batch, "parts": num_parts, "pictures": pictures}
        found = measure(given, affinity, num_parts, args.device)
        rows += [{"name": row["name"], **case, **row} for row in found]
        if pictures and num_parts == 10 and side in SHOWN:
            groups[side] = (f"{side} x {side}, batch of {batch}", found)
    in_all = set.intersection(*({row["name"] for row in found} for _, found in groups.values()))
    shown = {
        title: [{**row, "ours": row["name"] != EM} for row in found if row["name"] in in_all]
        for title, found in groups.values()
    }
    common.save("partition", args.device, rows, common.bars(shown, f"time against {EM}"), baseline=EM)


if __name__ == "__main__":
    main()
