"""10,000 random grids, cut by every solver: do all give the same bits?

python benchmarks/same_bits.py --device cuda    # all solvers on all grids
python benchmarks/same_bits.py --device cpu     # the kernel is interpreted, on a share of the grids, for that is slow
"""

from __future__ import annotations

import os
import sys

if "cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import json
import platform

import common
import torch
from torch import Tensor
from tqdm import tqdm

from maskevolve.parts.mincut import grid_min_cut

BATCHES, BATCH_SIZE, LARGEST_SIDE = 1250, 8, 32
INTERPRETED = 10  # of every so many batches, one grid
KINDS = ("plain", "zero", "equal", "huge", "sparse", "no source", "no sink", "walls")


def random_grids(kind: str, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Grids of one size and one kind: source, sink and capacity as for `grid_min_cut`."""
    height, width = torch.randint(1, LARGEST_SIDE + 1, (2,), generator=draws).tolist()
    largest = {"zero": 0, "huge": 2**31 - 1}.get(kind, 10 ** int(torch.randint(1, 7, (), generator=draws)))

    def draw(*shape: int) -> Tensor:
        values = torch.randint(largest + 1, shape, generator=draws)
        if kind == "equal":
            values = torch.full_like(values, largest)
        if kind == "sparse":
            values *= torch.rand(shape, generator=draws) < 0.15
        return values.int()

    source, sink = draw(BATCH_SIZE, height, width), draw(BATCH_SIZE, height, width)
    capacity = draw(BATCH_SIZE, 8, height, width)
    if kind == "no source":
        source.zero_()
    if kind == "no sink":
        sink.zero_()
    if kind == "walls":  # columns that nothing leaves: nodes that cannot be reached
        capacity[..., ::3] = 0
    return source, sink, capacity


def main() -> None:
    args = common.parse_args(__doc__)
    draws = torch.Generator().manual_seed(0)
    compared, different = (dict.fromkeys(("scipy", "torch", "triton"), 0) for _ in range(2))
    for index in tqdm(range(BATCHES)):
        grids = random_grids(KINDS[index % len(KINDS)], draws)
        expected = grid_min_cut(*grids, solver="pymaxflow")
        for solver in compared:
            some = grids
            if solver == "triton" and args.device == "cpu":
                some = tuple(tensor[: int(index % INTERPRETED == 0)] for tensor in grids)
            cut = grid_min_cut(*(tensor.to(args.device) for tensor in some), solver=solver).cpu()
            compared[solver] += len(cut)
            different[solver] += int((cut != expected[: len(cut)]).flatten(1).any(1).sum())
    result = {"machine": common.machine(args.device), "python": platform.python_version(), "torch": torch.__version__}
    result |= {"compared with pymaxflow": compared, "different": different}
    print(result)
    (common.folder(args.device) / "same_bits.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(different.values()))


if __name__ == "__main__":
    main()
