"""Parts of volumes and of clips: our cut with each solver of a CPU against the clustering of the paper's released code.

python benchmarks/volumes.py --quick        # a look, in about a minute
python benchmarks/volumes.py --device cpu   # some minutes on 2 cores
python benchmarks/volumes.py --device cuda  # where these cuts run on the host, too

Clips are cut in space and time, and by tubes, for which EM gets the affinity averaged over time as well. With pictures,
edges come from their contrast; EM sees none, and gets the same affinity. Affinity, volumes and clips are made: how long
a cut takes depends on the contrast of what is cut, and that of real volumes and videos is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from planted import attention_between, planted_parts
from planted_clips import GRID, moving_shapes
from torch import Tensor, nn
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner
from maskevolve.grid import times
from maskevolve.parts import TubePartitioner

EM = "EM, as released"
NUM_PARTS = 10
PATCH = 4  # voxels along each side
SOLVERS = ("pymaxflow", "scipy")


class Case(NamedTuple):
    grid: tuple[int, int, int]
    batch: int
    pictures: bool
    tubes: bool = False

    @property
    def name(self) -> str:
        by = "" if self.grid != GRID else ", by tubes" if self.tubes else ", space and time"
        return times(self.grid) + by


QUICK = [Case((6, 6, 6), 1, True), Case((6, 6, 6), 1, False), Case(GRID, 1, True, True)]
CASES = [
    Case(grid, batch, pictures, tubes)
    for pictures in (True, False)
    for grid, batches, ways in (
        ((6, 6, 6), (1, 32), (False,)),
        ((10, 10, 10), (1, 8), (False,)),
        (GRID, (1, 4), (True, False)),
    )
    for tubes in ways
    for batch in batches
]


def given(case: Case) -> tuple[Tensor, Tensor | None]:
    """Affinity [B, N, N] and images: clips of moving shapes, or volumes whose planted parts differ in brightness."""
    rng = np.random.default_rng(0)
    if case.grid == GRID:
        clips = [moving_shapes(0.2, rng) for _ in range(case.batch)]
        labels = torch.stack([clip.labels for clip in clips]).flatten(1)
        images = torch.stack([clip.images for clip in clips])
    else:
        labels = planted_parts(case.batch, case.grid, 8, rng)
        images = brightness(labels.view(-1, 1, *case.grid), rng)
    affinity = attention_between(labels, rng, strength=0.3, noise=1)[:, 0]
    return affinity, images if case.pictures else None


def brightness(labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Volumes [B, 1, depth, height, width] of labels of patches, with noise in each voxel."""
    values = torch.from_numpy(rng.random(int(labels.max()) + 1)).float()[labels]
    for axis in (2, 3, 4):
        values = values.repeat_interleave(PATCH, axis)
    return values + 0.1 * torch.from_numpy(rng.standard_normal(values.shape)).float()


def partitioners(case: Case, affinity: Tensor, images: Tensor | None) -> dict[str, Callable[[], Any]]:
    """Calls of our cut with each solver, and of EM."""

    def call(partitioner: nn.Module, **more: Any) -> Callable[[], Any]:
        by = TubePartitioner(partitioner) if case.tubes else partitioner
        return lambda: by(affinity, grid_size=case.grid, **more)

    cuts = {solver: GraphCutPartitioner(NUM_PARTS, solver=solver) for solver in SOLVERS}
    calls = {f"graph cut, {solver}": call(cut, images=images) for solver, cut in cuts.items()}
    return {**calls, EM: call(EMPartitioner(NUM_PARTS))}


def measure(case: Case, device: str) -> list[common.Row]:
    """A row for each partitioner: its time against EM's, and its memory."""
    affinity, images = (None if tensor is None else tensor.to(device) for tensor in given(case))
    functions = partitioners(case, affinity, images)
    rows = common.compare(functions, EM, device)
    for row, function in zip(rows, functions.values(), strict=True):
        row["peak_mib"] = common.peak_memory(function, device)
    described = {"grid": case.name, "batch": case.batch, "parts": NUM_PARTS, "pictures": case.pictures}
    return [{"name": row["name"], **described, **row} for row in rows]


def main() -> None:
    args = common.parse_quick(__doc__)
    torch.manual_seed(0)
    rows, groups = [], {}
    for case in tqdm(QUICK if args.quick else CASES):
        found = measure(case, args.device)
        rows += found
        if case.pictures and case.batch == 1:
            groups[case.name] = [{**row, "ours": row["name"] != EM} for row in found]
    if args.quick:
        common.print_table(rows)
        return
    common.save("volumes", args.device, rows, common.bars(groups, f"time against {EM}"), baseline=EM)


if __name__ == "__main__":
    main()
