"""How well parts agree with what people see in real pictures: whole objects, and parts of people.

Every row asks for 10 parts. Rows of the same source cut the same affinities; only edges from contrast see the picture
besides. Two ViTs give tokens and attention: a small MAE, and any of timm that is at hand.

python benchmarks/part_quality.py --data ../shared/data --vit vit_small_patch14_dinov2.pt   # half an hour on 2 cores
python benchmarks/part_quality.py --data ../shared/data --images 10                   # a trial: results go to --out
python benchmarks/part_quality.py --data MY/PICTURES --columns indoors outdoors       # your own

A column is a folder of pictures with label maps. Pictures of one shape are used whole, the middle square of others. In
columns whose name begins with "ccp", each connected piece of a label is a part.

    DATA/COLUMN/NAME.jpg                         a picture
    DATA/COLUMN/NAME.png                         its label map, 8 or 16 bits: 0 is unlabelled and left out; or
    DATA/COLUMN/NAME_a0.png, NAME_a1.png, ...    a label map a person, whose numbers have no meaning, 0 included
    DATA/tiny_vit_random.pt                      weights of the small MAE: see `small_mae`

For each column (see `segmented.agreement`; means over people, then over pictures; `_error` is the standard error over
pictures):

    index, v, covering, recall    agreement with people; `recall` on the grid of the patches in all rows
    best                          the index against the person who agrees most
    parts                         how many there are
    effective                     how many of like size would be as even: exp of the entropy of their sizes
    largest                       share of the picture that the largest part has
    connected                     share of the parts that are one piece of the picture, corners joined
    milliseconds                  a picture, from the affinity or the pixels to parts; in batches where that is possible

The index of whole objects does not see that a part is half of the picture, nor whether objects have parts: `effective`
and the columns of people's parts do. None of them sees how much a model learns from masks of such parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from scipy.ndimage import label as pieces
from segmented import MEASURES, Labels, agreement, read_folder
from skimage.segmentation import felzenszwalb, slic
from sklearn.cluster import KMeans, SpectralClustering
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize
from torchvision.transforms.v2.functional import normalize as standardise
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner
from maskevolve.parts.affinity import interpolate as to_all_patches
from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.viz import part_picture

NUM_PARTS = 10
COUNTS = (4, 6, 10, 15, 20, 30, 40)  # numbers of parts that are asked for in the second table
PIXELS_A_PATCH = 16  # of the label maps
SHORT_SIDE = 16  # of the grid, in patches
BATCH = 25
STRIDE = 2
MIDDLE, TOKENS, ALL, COLOUR = "attention, middle third", "tokens", "attention, all layers", "colour and position"
PIXELS = "pixels"
CONTRAST, AFFINITY = "graph cut, contrast edges", "graph cut, affinity edges"  # ours
SMALL, NO_MODEL = "small MAE", "no model"
SHOWN = 8  # pictures: of the best, of those in the middle and of the worst

Parts = list[Labels]  # of each picture, on the grid of the patches or of the pixels


class Column(NamedTuple):
    title: str
    model: str
    people: list[list[Labels]]
    """What each person sees in each picture."""
    grid: tuple[int, int]
    affinities: dict[str, Tensor]
    """[B, N, N] by source; that of MIDDLE is of every second patch."""
    images: Tensor
    """[B, 3, height, width] as the model sees them."""
    pictures: Tensor
    """[B, 3, height, width] in [0, 1]."""


class Job(NamedTuple):
    """A row for a column; `run` gives the parts of each picture."""

    column: Column
    name: str
    source: str
    run: Callable[[], Parts]


# What is measured on.


def small_mae(path: Path) -> VisionTransformer:
    """The encoder of a small MAE for 64 x 64 pictures."""
    vit = VisionTransformer(
        64, 8, num_classes=0, global_pool="", embed_dim=128, depth=6, num_heads=4, dynamic_img_size=True
    )
    weights = torch.load(path, map_location="cpu", weights_only=True)
    vit.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return vit.eval()


def timm_vit(path: Path) -> nn.Module:
    """A ViT of timm, whose weights lie in a file with its name: NAME.pt."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    vit = timm.create_model(path.stem, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(weights)
    return vit.eval()


def read_columns(
    folder: Path, title: str, limit: int | None, models: dict[str, nn.Module], device: str
) -> list[Column]:
    """The column for each model, and one without a model."""
    found = read_folder(folder, SHORT_SIDE * PIXELS_A_PATCH, by_piece=title.startswith("ccp"))[:limit]
    pictures = torch.stack([picture.image for picture in found])
    grid = (pictures.shape[2] // PIXELS_A_PATCH, pictures.shape[3] // PIXELS_A_PATCH)
    columns = []
    for name, model in {**models, NO_MODEL: None}.items():
        patch = PIXELS_A_PATCH if model is None else model.patch_embed.patch_size[0]
        images = interpolate(pictures, (grid[0] * patch, grid[1] * patch), mode="area")
        images = standardise(images, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)).to(device)
        sources: dict[str, Callable[[Tensor], Tensor]] = {COLOUR: partial(colour_affinity, grid)}
        if model is not None:
            model = model.to(device)
            sources = {
                MIDDLE: partial(attention_affinity, model, layers="middle", stride=STRIDE),
                TOKENS: partial(token_affinity, model),
                ALL: partial(attention_affinity, model),
            }
        affinities = {
            source: torch.cat([read(batch) for batch in images.split(BATCH)]) for source, read in sources.items()
        }
        columns.append(Column(title, name, [one.people for one in found], grid, affinities, images, pictures))
    return columns


def colour_affinity(grid: tuple[int, int], images: Tensor) -> Tensor:
    """Near 1 for patches that are near in mean colour and in place, [B, N, N]: without a model."""
    colours = avg_pool2d(images, PIXELS_A_PATCH).flatten(2).mT
    sides = (torch.arange(side, device=images.device) for side in grid)
    places = torch.cartesian_prod(*sides).float()[None]
    apart = [torch.cdist(values, values).square() for values in (colours, places)]
    return torch.exp(-4 * sum(square / square.mean((1, 2), keepdim=True).clamp(min=1e-9) for square in apart))


# What is measured.


def jobs(column: Column) -> Iterator[Job]:
    """Every row that the column has what is needed for."""
    for name, method in methods().items():
        for source, affinity in column.affinities.items():
            stride = STRIDE if source == MIDDLE else 1
            if name == CONTRAST:
                method = partial(graph_cut, grid=column.grid, stride=stride)
            elif stride > 1:
                affinity = to_all_patches(affinity, column.grid, stride) / stride**4
            images = column.images if name == CONTRAST else None
            yield Job(column, name, source, partial(cut, method, affinity, images, column.grid))
    if column.model == NO_MODEL:
        pixels = [picture.permute(1, 2, 0).numpy() for picture in column.pictures]
        for name, segment in PIXEL_METHODS.items():
            yield Job(column, name, PIXELS, partial(segment_all, segment, pixels))


def methods() -> dict[str, Callable[..., Tensor]]:
    """From an affinity, or an affinity and images, to parts [B, N]."""
    found: dict[str, Callable[..., Tensor]] = {
        CONTRAST: graph_cut,
        AFFINITY: lambda affinity: GraphCutPartitioner(NUM_PARTS)(affinity, grid_size=shape_of(affinity)),
        "EM, as released": lambda affinity: EMPartitioner(NUM_PARTS)(affinity, grid_size=shape_of(affinity)),
        "k-means": k_means,
        "spectral clustering": spectral_clustering,
    }
    if find_spec("ncut_pytorch"):
        found["normalised cut"] = normalised_cut
    return found


def shape_of(affinity: Tensor) -> tuple[int, int]:
    """The grid of so many patches, SHORT_SIDE wide."""
    return affinity.shape[1] // SHORT_SIDE, SHORT_SIDE


def cut(method: Callable[..., Tensor], affinity: Tensor, images: Tensor | None, grid: tuple[int, int]) -> Parts:
    """A batch after the other."""
    batches = [affinity.split(BATCH)] if images is None else [affinity.split(BATCH), images.split(BATCH)]
    parts = torch.cat([method(*batch).cpu() for batch in zip(*batches, strict=True)])
    return list(parts.unflatten(1, grid).numpy())


def graph_cut(
    affinity: Tensor, images: Tensor, grid: tuple[int, int], stride: int = 1, num_parts: int = NUM_PARTS
) -> Tensor:
    return GraphCutPartitioner(num_parts)(affinity, None, grid, images, stride)


def k_means(affinity: Tensor) -> Tensor:
    """The best of ten starts for each picture."""
    clusters = KMeans(NUM_PARTS, n_init=10, random_state=0)
    return torch.stack([torch.from_numpy(clusters.fit_predict(rows)).long() for rows in features(affinity).numpy()])


def spectral_clustering(affinity: Tensor) -> Tensor:
    clusters = SpectralClustering(NUM_PARTS, affinity="precomputed", random_state=0)
    affinity = symmetric(affinity).double()
    return torch.stack([torch.from_numpy(clusters.fit_predict(one)).long() for one in affinity.numpy()])


def normalised_cut(affinity: Tensor) -> Tensor:
    """By ncut-pytorch, as its documentation clusters.

    With a mean affinity of 0.1 in place of its default: chosen on pictures of BSDS val.
    """
    from ncut_pytorch import Ncut, kway_ncut

    vectors = [Ncut(n_eig=NUM_PARTS, A_degree=0.1).fit_transform(rows) for rows in features(affinity)]
    return torch.stack([kway_ncut(one).argmax(1) for one in vectors])


def symmetric(affinity: Tensor) -> Tensor:
    """As the graph cut takes it: what is below 0 counts as 0."""
    affinity = affinity.cpu().clamp(min=0)
    return affinity + affinity.mT


def features(affinity: Tensor) -> Tensor:
    """Rows of the square root of the affinity, unit length: what the graph cut clusters."""
    return normalize(symmetric(affinity).sqrt(), dim=2)


def blocks(pixels: np.ndarray) -> Labels:
    """3 x 3 blocks of patches, whatever the picture."""
    rows, columns = (np.arange(side // PIXELS_A_PATCH) * 3 // (side // PIXELS_A_PATCH) for side in pixels.shape[:2])
    return rows[:, None] * 3 + columns


PIXEL_METHODS: dict[str, Callable[[np.ndarray], Labels]] = {
    "SLIC": partial(slic, n_segments=NUM_PARTS),
    "Felzenszwalb": partial(felzenszwalb, scale=300, sigma=0.8, min_size=100),
    "3 x 3 blocks": blocks,
}


def segment_all(segment: Callable[[np.ndarray], Labels], pixels: list[np.ndarray]) -> Parts:
    return [segment(picture) for picture in pixels]


# How it is measured.


def measure(job: Job) -> common.Row:
    torch.manual_seed(0)
    start = time.perf_counter()
    parts = job.run()
    milliseconds = (time.perf_counter() - start) * 1e3 / len(parts)
    cases = [[pair] for pair in zip(parts, job.column.people, strict=True)]
    ours = job.name in (CONTRAST, AFFINITY)
    column = job.column
    row = {"column": column.title, "model": column.model, "name": job.name, "source": job.source, "ours": ours}
    return row | judge(cases, job.column.grid) | {"milliseconds": milliseconds}


def people_against_each_other(column: Column) -> common.Row | None:
    """Each person's segments as parts, against all others of the picture; None where there is one person at most."""
    cases = [
        [(person, people[:index] + people[index + 1 :]) for index, person in enumerate(people)]
        for people in column.people
        if len(people) > 1
    ]
    if not cases:
        return None
    row = {"column": column.title, "model": NO_MODEL, "name": "one person against another", "source": "", "ours": False}
    return row | judge(cases, column.grid) | {"milliseconds": None}


def judge(cases: list[list[tuple[Labels, list[Labels]]]], grid: tuple[int, int]) -> common.Row:
    """Means over pictures and standard errors; a case is a picture: partitions of it, each with those who judge it."""
    scores = [[judge_parts(*pair, grid) for pair in pairs] for pairs in cases]
    row: common.Row = {}
    for name in scores[0][0]:
        values = [np.mean([one[name] for one in picture]) for picture in scores]
        row[name] = float(np.mean(values))
        if name in (*MEASURES, "best"):
            row[f"{name}_error"] = float(np.std(values) / len(values) ** 0.5)
    return row


def judge_parts(parts: Labels, people: list[Labels], grid: tuple[int, int]) -> dict[str, float]:
    found = agreement(parts, people, grid)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    whole = [pieces(parts == part, np.ones((3, 3)))[1] == 1 for part in np.unique(parts)]
    share = np.unique(parts, return_counts=True)[1] / parts.size
    sizes = {"effective": float(np.exp(-(share * np.log(share)).sum())), "largest": float(share.max())}
    counts = {"best": max(found["index"]), "parts": float(len(whole)), "connected": float(np.mean(whole))}
    return means | counts | sizes


def by_number(column: Column) -> Iterator[common.Row]:
    """The default row of a model for each number of parts."""
    for count in COUNTS:
        method = partial(graph_cut, grid=column.grid, stride=STRIDE, num_parts=count)
        parts = cut(method, column.affinities[MIDDLE], column.images, column.grid)
        cases = [[pair] for pair in zip(parts, column.people, strict=True)]
        yield {"column": column.title, "model": column.model, "asked_for": count} | judge(cases, column.grid)


# How it is shown.


def draw(rows: list[common.Row], titles: list[str]) -> Figure:
    """The index by row, a panel for each column; ours in orange."""
    labels = list(dict.fromkeys(label_of(row) for row in rows))
    figure = Figure(figsize=(4.5 + 2.6 * len(titles), 1.2 + 0.24 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, sharex=True, sharey=True)[0]
    for ax, title in zip(axes, titles, strict=True):
        own = [row for row in rows if row["column"] == title]
        colours = ["tab:orange" if row["ours"] else "tab:gray" for row in own]
        places = [labels.index(label_of(row)) for row in own]
        ax.barh(places, [row["index"] for row in own], xerr=[row["index_error"] for row in own], color=colours)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("adjusted Rand index", fontsize=9)
        ax.grid(axis="x", linewidth=0.4)
        ax.set_axisbelow(True)
        ax.margins(y=0.01)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    return figure


def label_of(row: common.Row) -> str:
    source = "" if row["source"] in ("", PIXELS) else f": {row['source']}"
    return row["name"] + source + (f" ({row['model']})" if row["model"] != NO_MODEL else "")


def draw_pictures(column: Column) -> Figure:
    """The best, middle and worst pictures of the default row by index: our outlines, and those of the first person."""
    method = partial(graph_cut, grid=column.grid, stride=STRIDE)
    parts = cut(method, column.affinities[MIDDLE], column.images, column.grid)
    indices = [np.mean(agreement(*pair)["index"]) for pair in zip(parts, column.people, strict=True)]
    order = np.argsort(indices)[::-1]
    count = max(1, min(SHOWN, len(order) // 3))
    starts = {"best": 0, "median": (len(order) - count) // 2, "worst": len(order) - count}
    across, down = 4, -(-count // 4)
    figure = Figure(figsize=(3.6 * across, 2 * down * len(starts) + 0.6), layout="constrained")
    figure.suptitle(f"{column.title}: our parts on the left, one person's on the right, and the index", fontsize=11)
    for part, (title, start) in zip(figure.subfigures(len(starts), 1), starts.items(), strict=True):
        axes = part.subplots(down, across, squeeze=False).flat
        for ax in axes:
            ax.set_axis_off()
        part.supylabel(title, fontsize=11)
        for ax, index in zip(part.axes, order[start : start + count], strict=False):
            pair = [outlined(column.pictures[index], labels) for labels in (parts[index], column.people[index][0])]
            gap = np.ones((column.pictures.shape[2], 8, 3), dtype=np.float32)
            ax.imshow(np.concatenate([pair[0], gap, pair[1]], 1))
            ax.set_title(f"{indices[index]:.2f}", fontsize=8, pad=2)
    return figure


def outlined(picture: Tensor, parts: Labels) -> np.ndarray:
    return part_picture(picture, torch.from_numpy(parts).flatten(), parts.shape)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the columns")
    parser.add_argument("--columns", nargs="+", default=["bsds/test", "coco", "ccp/test"], help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="weights of the small MAE; default: DATA/tiny_vit_random.pt")
    parser.add_argument("--vit", type=Path, help="weights of another ViT, in a file with its name in timm: NAME.pt")
    parser.add_argument("--images", type=int, help="at most so many pictures a column: results go to --out")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/part_quality"), help="where pictures go; default: %(default)s"
    )
    args = parser.parse_args()
    if not find_spec("ncut_pytorch"):
        print("ncut-pytorch is not installed: its rows are left out")
    models: dict[str, nn.Module] = {SMALL: small_mae(args.model or args.data / "tiny_vit_random.pt")}
    if args.vit:
        models[args.vit.stem] = timm_vit(args.vit)
    read = partial(read_columns, limit=args.images, models=models, device=args.device)
    columns = [column for title in args.columns for column in read(args.data / title, title)]
    next(jobs(columns[0])).run()  # what happens once: imports, caches
    rows = [measure(job) for job in tqdm([job for column in columns for job in jobs(column)])]
    rows += [row for column in columns if column.model == NO_MODEL and (row := people_against_each_other(column))]
    numbers = [row for column in columns if column.model != NO_MODEL for row in by_number(column)]
    args.out.mkdir(parents=True, exist_ok=True)
    for column in columns:
        if column.model != NO_MODEL:
            name = f"{column.title}-{column.model}".replace("/", "-").replace(" ", "-")
            draw_pictures(column).savefig(args.out / f"{name}.png", dpi=110)
    settings = {
        "pictures": {column.title: len(column.people) for column in columns},
        "num_parts": NUM_PARTS,
        "more_versions": {name: common._version(name) for name in ("scikit-learn", "scikit-image", "ncut-pytorch")},
        "by_num_parts": numbers,
    }
    name = str((args.out / "part_quality").resolve()) if args.images else "part_quality"
    common.print_table(numbers)
    common.save(name, args.device, rows, draw(rows, args.columns), **settings)


if __name__ == "__main__":
    main()
