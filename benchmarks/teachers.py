"""What a cheaper teacher saves, and what it no longer sees: time, and parts found in pictures whose parts are known.

An MAE is trained with random masks, so that every teacher reads the same model; then each cuts the same pictures.

python benchmarks/teachers.py --device cpu      # some minutes on 2 cores
python benchmarks/teachers.py --device cuda
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from shapes import composed_shapes
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import trange

from maskevolve import EMPartitioner, GraphCutPartitioner, PartTeacher, RandomMask

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mae import MaskedAutoencoder

ALL = "all layers"
LAYERS = {
    ALL: None,
    "first half of the layers": range(3),
    "last layer of the first half": [2],
    "last half of the layers": range(3, 6),
    "first layer": [0],
    "last layer": [5],
}
SIZE, PATCH, DEPTH, NUM_PARTS = 96, 8, 6, 8  # five textures are in a picture
SEEDS, STAGES, BATCH, IMAGES = (0, 1), (100, 200), 16, 64  # stages: steps of training


def new_model() -> MaskedAutoencoder:
    return MaskedAutoencoder(RandomMask(), SIZE, PATCH, 128, DEPTH, 4)


def training(seed: int, device: str) -> Iterator[nn.Module]:
    """The encoder of a small MAE at each of STAGES, on pictures that it sees once."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    model = new_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in trange(max(STAGES) + 1, desc=f"training {seed}"):
        if step in STAGES:
            yield model.encoder.eval()
            model.train()
        images, _ = composed_shapes(BATCH, SIZE, PATCH, draws)
        loss = model(images.to(device), 0.75, None)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def teachers(vit: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    def teacher(vit: nn.Module, **options) -> PartTeacher:
        return PartTeacher(vit, GraphCutPartitioner(), total_epochs=1, num_parts=(NUM_PARTS, NUM_PARTS), **options)

    small = copy.deepcopy(vit)
    small.set_input_size(img_size=SIZE // 2)
    every, coarse = teacher(vit), teacher(small)

    def in_bfloat16(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return every(images)

    def in_half_resolution(images: Tensor) -> Tensor:
        parts = coarse(interpolate(images, scale_factor=0.5, mode="area")).unflatten(1, (SIZE // PATCH // 2, -1))
        return parts.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)

    return {
        **{name: teacher(vit, layers=layers) for name, layers in LAYERS.items()},
        "all layers, bfloat16": in_bfloat16,
        "all layers, a quarter of the patches": in_half_resolution,
        "all layers, EM": PartTeacher(vit, EMPartitioner(), total_epochs=1, num_parts=(NUM_PARTS, NUM_PARTS)),
        "all layers, untrained": teacher(new_model().encoder.to(next(vit.parameters()).device)),
        "no model: mean colours": by_colour,
    }


def by_colour(images: Tensor) -> Tensor:
    """Parts out of the mean colours of the patches."""
    colours = avg_pool2d(images, PATCH).flatten(2).mT
    return GraphCutPartitioner(NUM_PARTS)(torch.exp(-torch.cdist(colours, colours).square()))


def agreement(teacher: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> list[float]:
    """Adjusted Rand index of each image: 1 where its parts are the true ones, about 0 by chance."""
    return [adjusted_rand_score(*pair) for pair in zip(labels, teacher(images).cpu(), strict=True)]


def main() -> None:
    args = common.parse_args(__doc__)
    images, labels = composed_shapes(IMAGES, SIZE, PATCH, torch.Generator().manual_seed(len(SEEDS)))
    images = images.to(args.device)
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for seed in SEEDS:
        for stage, vit in zip(STAGES, training(seed, args.device), strict=True):
            by_name = teachers(vit)
            for name, teacher in by_name.items():
                found[name, stage] += agreement(teacher, images, labels)
    rows = common.compare(
        {name: partial(teacher, images[:BATCH]) for name, teacher in by_name.items()}, ALL, args.device
    )
    for row in rows:
        for stage in STAGES:
            scores = found[row["name"], stage]
            row[f"found_after_{stage}"] = float(np.mean(scores))
            row[f"error_after_{stage}"] = float(np.std(scores) / len(scores) ** 0.5)
    settings = {"seeds": SEEDS, "batch": BATCH, "images": IMAGES, "num_parts": NUM_PARTS}
    common.save("teachers", args.device, rows, draw(rows), baseline=ALL, **settings)


def draw(rows: list[common.Row]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for index, row in enumerate(rows):
        y = [row[f"found_after_{stage}"] for stage in STAGES]
        ax.plot([row["ratio"]] * len(y), y, marker="os"[index // 10], label=row["name"])  # ten colours
    ax.set(xlabel=f"time of a call against {ALL}", ylabel="adjusted Rand index", xscale="log", ylim=(0, 0.6))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(f"after {' and '.join(map(str, STAGES))} steps, a line each", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
