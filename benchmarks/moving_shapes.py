"""Are planted shapes that move found? Tubes, cuts in space and time, and frames that are cut alone.

python benchmarks/moving_shapes.py --quick         # a look, in less than a minute
python benchmarks/moving_shapes.py --device cpu    # some minutes on 2 cores

The clips and the affinity are made: patches of one shape belong together in all frames, but for noise. Such a case
shows that code works, never that a method does.

`within` is the adjusted Rand index of the parts and the shapes in each frame, averaged over frames; `over` is that of
all patches of the clip at once. Where frames are cut alone, nothing says which part of one frame is which of the next:
over the clip, each part of each frame is one of its own.
"""

from __future__ import annotations

import math
from typing import Any

import common
import numpy as np
import torch
from planted import attention_between
from planted_clips import GRID, NUM_SHAPES, Clip, moving_shapes
from segmented import adjusted_rand_index, contingency
from torch import Tensor
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner
from maskevolve.grid import Grid
from maskevolve.parts import TubePartitioner

SPEEDS = {"slow": 0.05, "fast": 0.5}  # patches a frame: of 16 frames, 1 patch and 8
CLIPS = 50
STRENGTH, DEVIATION = 0.5, 1.0  # of the affinity: see planted_attention
NUM_PARTS = NUM_SHAPES + 1  # the background is one
TUBES_OF_TRUTH = "most frequent true shape of each tube"

Scores = dict[tuple[str, bool | None], tuple[float, float]]
"""By way, and whether it is given pictures: both indices."""


def cut_frames(partitioner: GraphCutPartitioner, affinity: Tensor, grid: Grid, images: Tensor | None) -> Tensor:
    """Each frame of patches alone, [1, N]: labels of one frame mean nothing in another."""
    frames, height, width = grid
    pairs = affinity.view(frames, height * width, frames, height * width)
    alone = pairs.diagonal(dim1=0, dim2=2).movedim(2, 0)
    if images is not None:  # the frames of one patch are channels, as in tubes
        images = images[0].unflatten(1, (frames, -1)).movedim(1, 0).flatten(1, 2)
    found = partitioner(alone, grid_size=(height, width), images=images)
    return (found + NUM_PARTS * torch.arange(frames, device=found.device)[:, None]).view(1, -1)


def find_parts(affinity: Tensor, grid: Grid, images: Tensor | None) -> dict[str, Tensor]:
    """The parts of one clip, [1, N], by each way; an affinity is [1, N, N]."""
    cut = GraphCutPartitioner(NUM_PARTS)
    found = {
        "graph cut, space and time": cut(affinity, grid_size=grid, images=images),
        "graph cut, tubes": TubePartitioner(cut)(affinity, grid_size=grid, images=images),
        "graph cut, frame by frame": cut_frames(cut, affinity, grid, images),
    }
    if images is None:
        found["EM, as released, space and time"] = EMPartitioner(NUM_PARTS)(affinity, grid_size=grid)
    return found


def agreement(parts: Tensor, labels: Tensor) -> tuple[float, float]:
    """The index within frames, and over the clip, of parts [1, N] and labels [T, H, W]."""
    ours, truth = parts.view(labels.shape).cpu().numpy(), labels.numpy()
    within = [adjusted_rand_index(contingency(*frame)) for frame in zip(ours, truth, strict=True)]
    return float(np.mean(within)), adjusted_rand_index(contingency(ours, truth))


def measure(clip: Clip, rng: np.random.Generator, device: str) -> Scores:
    """Both indices of one clip by each way, with pictures and without."""
    grid, images = tuple(clip.labels.shape), clip.images[None].to(device)
    affinity = attention_between(clip.labels.view(1, -1), rng, strength=STRENGTH, noise=DEVIATION)[:, 0].to(device)
    found: Scores = {
        (name, given is not None): agreement(parts, clip.labels)
        for given in (images, None)
        for name, parts in find_parts(affinity, grid, given).items()
    }
    tubes = clip.labels.mode(0).values.expand(grid)
    return found | {(TUBES_OF_TRUTH, None): agreement(tubes.reshape(1, -1), clip.labels)}


def summary(motion: str, clips: list[Scores]) -> list[common.Row]:
    """A row for each way: means over clips, with their standard errors."""
    rows = []
    for name, pictures in clips[0]:
        row: dict[str, Any] = {"name": name, "motion": motion, "pictures": pictures, "clips": len(clips)}
        for place, index in enumerate(("within", "over")):
            values = [of[name, pictures][place] for of in clips]
            row[index] = float(np.mean(values))
            row[f"{index}_error"] = float(np.std(values, ddof=1) / math.sqrt(len(clips)))
        rows.append(row)
    return rows


def main() -> None:
    args = common.parse_quick(__doc__)
    torch.manual_seed(0)
    rows = []
    for motion, speed in SPEEDS.items():
        clips = []
        for seed in tqdm(range(2 if args.quick else CLIPS), desc=motion):
            rng = np.random.default_rng(seed)
            clips.append(measure(moving_shapes(speed, rng), rng, args.device))
        rows += summary(motion, clips)
    if args.quick:
        common.print_table(rows)
        return
    settings = {"grid": GRID, "speeds": SPEEDS, "strength": STRENGTH, "deviation": DEVIATION, "num_parts": NUM_PARTS}
    common.save("moving_shapes", args.device, rows, None, **settings)


if __name__ == "__main__":
    main()
