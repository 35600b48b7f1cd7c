"""Random grids of 1 x 1 to 64 x 64 and those of photographs, cut by every solver: do all give the same bits?

python benchmarks/same_bits.py --device cuda    # 60,000 random grids by the kernel, and a share by the others
python benchmarks/same_bits.py --device cpu     # 10,000 by SciPy, and a share by torch and by the interpreted kernel
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from interpreted import interpret

if "cuda" not in sys.argv:
    interpret()

import json
import platform

import common
import torch
from grids import KINDS, Grids, photograph_grids, random_grids
from tqdm import tqdm

from maskevolve.parts.mincut import grid_min_cut

BATCH_SIZE, LARGEST_SIDE = 8, 64
BATCHES = {"cpu": 1250, "cuda": 7500}
PHOTOGRAPHS = (14, 16, 28, 37, 48, 64)
ONE_IN = {  # so many batches, of which the first grid is cut
    "cpu": {"torch": 20, "triton": 100},
    "cuda": {"scipy": 50, "torch": 100},
}


def all_grids(device: str) -> Iterator[tuple[int, Grids]]:
    """Batches, and the number of each among its like. Small grids are as many as large ones."""
    draws = torch.Generator().manual_seed(0)
    for index in range(BATCHES[device]):
        height, width = (int((LARGEST_SIDE + 1) ** float(torch.rand((), generator=draws))) for _ in range(2))
        yield index, random_grids(KINDS[index % len(KINDS)], height, width, draws, BATCH_SIZE)
    for side in PHOTOGRAPHS:
        for grids in photograph_grids(side, 1 if device == "cpu" else BATCH_SIZE):
            yield 0, grids


def main() -> None:
    args = common.parse_args(__doc__)
    compared, different = (dict.fromkeys(("scipy", "torch", "triton"), 0) for _ in range(2))
    result = {"machine": common.machine(args.device), "python": platform.python_version(), "torch": torch.__version__}
    result |= {"compared with pymaxflow": compared, "different": different}
    for index, grids in tqdm(all_grids(args.device), total=BATCHES[args.device] + 6 * len(PHOTOGRAPHS)):
        expected = grid_min_cut(*grids, solver="pymaxflow")
        for solver in compared:
            one_in = ONE_IN[args.device].get(solver, 1)
            some = tuple(tensor if one_in == 1 else tensor[: int(index % one_in == 0)] for tensor in grids)
            cut = grid_min_cut(*(tensor.to(args.device) for tensor in some), solver=solver).cpu()
            compared[solver] += len(cut)
            different[solver] += int((cut != expected[: len(cut)]).flatten(1).any(1).sum())
        if index % 500 == 0:  # what is known so far, should the time end
            (common.folder(args.device) / "same_bits.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)
    sys.exit(any(different.values()))


if __name__ == "__main__":
    main()
