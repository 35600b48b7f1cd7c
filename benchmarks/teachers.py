"""What a teacher should read from a ViT: how well its parts agree with people's, and what reading costs.

python benchmarks/teachers.py --data ../shared/data --vit vit_small_patch14_dinov2.pt    # some minutes on 2 cores

Layers by stride, for a small MAE and for another ViT of timm, on the pictures that defaults may be chosen on: BSDS val,
COCO, CCP val (the layout of `part_quality.py`). `share` is what is read, in matrix products of a forward pass of the
encoder on all patches. Neither the index nor the number of parts tells how much a model learns from such masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from part_quality import (
    BATCH,
    NO_MODEL,
    NUM_PARTS,
    SMALL,
    Column,
    cut,
    graph_cut,
    judge,
    read_columns,
    small_mae,
    timm_vit,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from maskevolve import EMPartitioner
from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.teachers.trial import attention_modules

COLUMNS = ("bsds/val", "coco", "ccp/val")
MOST = 50  # pictures of a column
DEFAULT = "middle third, every 2nd patch"
PUBLISHED = "all layers, EM"


def ways(depth: int) -> Iterator[tuple[str, Any, int]]:
    """Name, layers and stride of what may be read."""
    yield "tokens", "tokens", 1
    single = sorted({0, depth // 3, depth // 2 - 1, depth // 2, 2 * depth // 3, depth - 1})
    for stride, patches in ((1, ""), (2, ", every 2nd patch"), (3, ", every 3rd patch")):
        yield f"middle third{patches}", "middle", stride
        yield f"all layers{patches}", None, stride
        for layer in single:
            yield f"layer {layer + 1} of {depth}{patches}", [layer], stride


def read(model: nn.Module, layers: Any, stride: int, images: Tensor) -> Tensor:
    if layers == "tokens":
        return token_affinity(model, images, stride)
    return attention_affinity(model, images, layers, stride)


def products(function: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def measure(model: nn.Module, columns: list[Column], layers: Any, stride: int, em: bool = False) -> common.Row:
    """The share of a forward pass, and for each column the index, its error and the effective parts."""
    one = columns[0].images[:1]
    share = products(partial(read, model, layers, stride, one)) / products(partial(model, one))
    row: common.Row = {"share": share}
    for column in columns:
        affinity = torch.cat([read(model, layers, stride, images) for images in column.images.split(BATCH)])
        if em:
            parts = list(EMPartitioner(NUM_PARTS)(affinity, grid_size=column.grid).unflatten(1, column.grid).numpy())
        else:
            parts = cut(partial(graph_cut, grid=column.grid, stride=stride), affinity, column.images, column.grid)
        found = judge([[pair] for pair in zip(parts, column.people, strict=True)], column.grid)
        names = ("index", "index_error", "effective", "largest")
        row |= {f"{column.title} {name}": found[name] for name in names}
    return row


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--vit", type=Path, help="weights of another ViT, in a file with its name in timm: NAME.pt")
    args = parser.parse_args()
    models: dict[str, nn.Module] = {SMALL: small_mae(args.data / "tiny_vit_random.pt")}
    if args.vit:
        models[args.vit.stem] = timm_vit(args.vit)
    by_model: dict[str, list[Column]] = {name: [] for name in models}
    for title in COLUMNS:
        for column in read_columns(args.data / title, title, MOST, models, args.device):
            if column.model != NO_MODEL:
                by_model[column.model].append(column)
    rows = []
    for name, model in models.items():
        torch.manual_seed(0)  # EM starts from random means
        rows.append({"model": name, "name": PUBLISHED, **measure(model, by_model[name], None, 1, em=True)})
        for way, layers, stride in tqdm([*ways(len(attention_modules(model)))], desc=name):
            rows.append({"model": name, "name": way, **measure(model, by_model[name], layers, stride)})
    pictures = {column.title: len(column.people) for column in by_model[SMALL]}
    common.save("teachers", args.device, rows, draw(rows), pictures=pictures, num_parts=NUM_PARTS)


def draw(rows: list[common.Row]) -> Figure:
    """The mean index over what is read, in shares of a forward pass, a panel for each model; the default in orange."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.5 * len(names), 4.5), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for row in (row for row in rows if row["model"] == name):
            index = float(np.mean([row[f"{column} index"] for column in COLUMNS]))
            marker = (
                "s"
                if row["name"] in (PUBLISHED, "tokens")
                else "o^v"[(", every" in row["name"]) + ("3rd" in row["name"])]
            )
            ours = row["name"] == DEFAULT
            ax.plot(
                row["share"], index, marker, color="tab:orange" if ours else "tab:gray", markersize=10 if ours else 5
            )
            if ours or marker == "s" or "every" not in row["name"]:
                ax.annotate(row["name"], (row["share"], index), fontsize=7, xytext=(4, 3), textcoords="offset points")
        ax.set(title=name, xlabel="share of a forward pass", ylabel=f"index, mean of {', '.join(COLUMNS)}")
        ax.grid(linewidth=0.4)
    return figure


if __name__ == "__main__":
    main()
