"""How well parts agree with what people see in real pictures, and with parts that were planted in noisy attention.

Every row asks for 10 parts. Rows of the same source cut the same affinities; only edges from contrast see the picture
besides. A small ViT gives the tokens and the attention; its rows are left out where it is missing.

python benchmarks/part_quality.py --data ../shared/data                               # 6 minutes on 2 cores
python benchmarks/part_quality.py --data ../shared/data --images 10                   # a trial: results go to --out
python benchmarks/part_quality.py --data MY/PICTURES --columns indoors outdoors       # your own

A column is a folder of pictures with label maps. The middle square of each is used.

    DATA/COLUMN/NAME.jpg                         a picture
    DATA/COLUMN/NAME.png                         its label map, 8 or 16 bits: 0 is unlabelled and left out; or
    DATA/COLUMN/NAME_a0.png, NAME_a1.png, ...    a label map a person, whose numbers have no meaning, 0 included
    DATA/tiny_vit_random.pt                      weights of the ViT: see `load_model`

For each column (see `segmented.agreement`; means over people, then over pictures; `_error` is the standard error over
pictures):

    index, v, covering, recall    agreement with people; `recall` on the grid of the patches in all rows
    best                          the index against the person who agrees most
    parts                         how many there are
    connected                     share of the parts that are one piece of the picture, corners joined
    milliseconds                  a picture, from the affinity or the pixels to parts; in batches where that is possible
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from matplotlib.figure import Figure
from planted import planted_attention
from scipy.ndimage import label as pieces
from segmented import MEASURES, Labels, agreement, read_folder
from skimage.segmentation import felzenszwalb, slic
from sklearn.cluster import KMeans, SpectralClustering
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize
from torchvision.transforms.v2.functional import normalize as standardise
from tqdm import tqdm

from maskevolve import EMPartitioner, GraphCutPartitioner
from maskevolve.teachers import attention_affinity, token_affinity
from maskevolve.viz import part_picture

NUM_PARTS = 10
COUNTS = (4, 6, 10, 15, 20, 30, 40)  # numbers of parts that are asked for in the second table
SIZE, MODEL_SIZE, PATCH = 256, 128, 8  # pixels: of the label maps, of what the model sees, of its patches
GRID = (MODEL_SIZE // PATCH, MODEL_SIZE // PATCH)
BATCH = 50
TOKENS, FIRST, ALL, COLOUR = "tokens", "attention, first layer", "attention, all layers", "colour and position"
PIXELS = "pixels"
CONTRAST, AFFINITY = "graph cut, contrast edges", "graph cut, affinity edges"  # ours
SHOWN = 8  # pictures: of the best, of those in the middle and of the worst

Parts = list[Labels]  # of each picture, on the grid of the patches or of the pixels


class Column(NamedTuple):
    title: str
    people: list[list[Labels]]
    """What each person sees in each picture."""
    grid: tuple[int, int]
    affinities: dict[str, Tensor]
    """[B, N, N] by source."""
    images: Tensor | None = None
    """[B, 3, 128, 128] as the model sees them; None where there are no pictures."""
    pictures: Tensor | None = None
    """[B, 3, 256, 256] in [0, 1]."""


class Job(NamedTuple):
    """A row for a column; `run` gives the parts of each picture."""

    column: Column
    name: str
    source: str
    run: Callable[[], Parts]


# What is measured on.


def load_model(path: Path, device: str) -> VisionTransformer | None:
    """The encoder of a small MAE for 64 x 64 pictures, set to 128 x 128; None, and a word, where there is no file."""
    if not path.exists():
        print(f"{path} is missing: rows of tokens and attention are left out")
        return None
    vit = VisionTransformer(64, PATCH, num_classes=0, global_pool="", embed_dim=128, depth=6, num_heads=4)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    vit.load_state_dict({name: weight.float() for name, weight in weights.items()})
    vit.set_input_size(img_size=MODEL_SIZE)
    return vit.eval().to(device)


def read_column(folder: Path, title: str, limit: int | None, vit: VisionTransformer | None, device: str) -> Column:
    found = read_folder(folder, SIZE)[:limit]
    pictures = torch.stack([picture.image for picture in found])
    images = interpolate(pictures, MODEL_SIZE, mode="area")
    images = standardise(images, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)).to(device)
    sources: dict[str, Callable[[Tensor], Tensor]] = {COLOUR: colour_affinity}
    if vit is not None:
        sources = {
            TOKENS: partial(token_affinity, vit),
            FIRST: partial(attention_affinity, vit, layers=[0]),
            ALL: partial(attention_affinity, vit),
            **sources,
        }
    affinities = {name: torch.cat([source(batch) for batch in images.split(BATCH)]) for name, source in sources.items()}
    return Column(title, [picture.people for picture in found], GRID, affinities, images, pictures)


def colour_affinity(images: Tensor) -> Tensor:
    """Near 1 for patches that are near in mean colour and in place, [B, N, N]: without a model."""
    colours = avg_pool2d(images, PATCH).flatten(2).mT
    sides = (torch.arange(side, device=images.device) for side in GRID)
    places = torch.cartesian_prod(*sides).float()[None]
    apart = [torch.cdist(values, values).square() for values in (colours, places)]
    return torch.exp(-4 * sum(square / square.mean((1, 2), keepdim=True).clamp(min=1e-9) for square in apart))


def planted_column(count: int, device: str) -> Column:
    """Attention with 8 parts in it, in place of that of all layers; there are no pictures."""
    labels, attention = planted_attention(count, 14, 14, 8, strength=0.3, noise=1, heads=12)
    people = [[parts.reshape(14, 14).numpy()] for parts in labels]
    return Column("planted", people, (14, 14), {ALL: attention.mean(1).to(device)})


# What is measured.


def jobs(column: Column) -> Iterator[Job]:
    """Every row that the column has what is needed for."""
    for name, (method, sources) in methods().items():
        for source in sources:
            if source in column.affinities and (column.images is not None or name != CONTRAST):
                images = column.images if name == CONTRAST else None
                yield Job(column, name, source, partial(cut, method, column.affinities[source], images, column.grid))
    if column.pictures is not None:
        pixels = [picture.permute(1, 2, 0).numpy() for picture in column.pictures]
        for name, segment in PIXEL_METHODS.items():
            yield Job(column, name, PIXELS, partial(segment_all, segment, pixels))


def methods() -> dict[str, tuple[Callable[..., Tensor], Sequence[str]]]:
    """From an affinity, or an affinity and images, to parts [B, N]; and the sources to try each on."""
    every, common_ones = (TOKENS, FIRST, ALL, COLOUR), (TOKENS, ALL, COLOUR)
    found: dict[str, tuple[Callable[..., Tensor], Sequence[str]]] = {
        CONTRAST: (graph_cut, every),
        AFFINITY: (graph_cut, (TOKENS, ALL)),
        "EM, as released": (EMPartitioner(NUM_PARTS), common_ones),
        "k-means": (k_means, common_ones),
        "spectral clustering": (spectral_clustering, common_ones),
    }
    if find_spec("ncut_pytorch"):
        found["normalised cut"] = normalised_cut, common_ones
    return found


def cut(method: Callable[..., Tensor], affinity: Tensor, images: Tensor | None, grid: tuple[int, int]) -> Parts:
    """A batch after the other."""
    batches = [affinity.split(BATCH)] if images is None else [affinity.split(BATCH), images.split(BATCH)]
    parts = torch.cat([method(*batch).cpu() for batch in zip(*batches, strict=True)])
    return list(parts.unflatten(1, grid).numpy())


def graph_cut(affinity: Tensor, images: Tensor | None = None, num_parts: int = NUM_PARTS) -> Tensor:
    return GraphCutPartitioner(num_parts)(affinity, images=images)


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
    rows, columns = (np.arange(side) * 3 // side for side in GRID)
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
    row = {"column": job.column.title, "name": job.name, "source": job.source, "ours": ours}
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
    row = {"column": column.title, "name": "one person against another", "source": "", "ours": False}
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
    return means | {"best": max(found["index"]), "parts": float(len(whole)), "connected": float(np.mean(whole))}


def default_source(column: Column) -> str:
    """Tokens, the default of PartTeacher; without a model, colour and position."""
    return TOKENS if TOKENS in column.affinities else COLOUR


def by_number(column: Column) -> Iterator[common.Row]:
    """The default row for each number of parts."""
    source = default_source(column)
    for count in COUNTS:
        parts = cut(partial(graph_cut, num_parts=count), column.affinities[source], column.images, column.grid)
        cases = [[pair] for pair in zip(parts, column.people, strict=True)]
        yield {"column": column.title, "source": source, "asked_for": count} | judge(cases, column.grid)


# How it is shown.


def draw(rows: list[common.Row], titles: list[str]) -> Figure:
    """The index by row, a panel for each column; ours in orange."""
    labels = list(dict.fromkeys(label_of(row) for row in rows))
    figure = Figure(figsize=(3.5 + 2.6 * len(titles), 1.2 + 0.24 * len(labels)), layout="constrained")
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
    return f"{row['name']}: {row['source']}" if row["source"] not in ("", PIXELS) else row["name"]


def draw_pictures(column: Column) -> Figure:
    """The best, middle and worst pictures of the default row by index: our outlines, and those of the first person."""
    assert column.pictures is not None
    parts = cut(graph_cut, column.affinities[default_source(column)], column.images, column.grid)
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
            gap = np.ones((SIZE, 8, 3), dtype=np.float32)
            ax.imshow(np.concatenate([pair[0], gap, pair[1]], 1))
            ax.set_title(f"{indices[index]:.2f}", fontsize=8, pad=2)
    return figure


def outlined(picture: Tensor, parts: Labels) -> np.ndarray:
    return part_picture(picture, torch.from_numpy(parts).flatten(), parts.shape)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the columns")
    parser.add_argument("--columns", nargs="+", default=["bsds/test", "coco"], help="default: bsds/test coco")
    parser.add_argument("--model", type=Path, help="weights; default: DATA/tiny_vit_random.pt")
    parser.add_argument("--images", type=int, help="at most so many pictures a column: results go to --out")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/part_quality"), help="where pictures go; default: %(default)s"
    )
    args = parser.parse_args()
    if not find_spec("ncut_pytorch"):
        print("ncut-pytorch is not installed: its rows are left out")
    vit = load_model(args.model or args.data / "tiny_vit_random.pt", args.device)
    columns = [read_column(args.data / title, title, args.images, vit, args.device) for title in args.columns]
    every = [*columns, planted_column(args.images or 64, args.device)]
    next(jobs(columns[0])).run()  # what happens once: imports, caches
    rows = [measure(job) for job in tqdm([job for column in every for job in jobs(column)])]
    rows += [row for column in columns if (row := people_against_each_other(column))]
    numbers = [row for column in columns for row in by_number(column)]
    args.out.mkdir(parents=True, exist_ok=True)
    draw_pictures(columns[0]).savefig(args.out / "partitions.png", dpi=110)
    settings = {
        "pictures": {column.title: len(column.people) for column in every},
        "num_parts": NUM_PARTS,
        "more_versions": {name: common._version(name) for name in ("scikit-learn", "scikit-image", "ncut-pytorch")},
        "by_num_parts": numbers,
    }
    name = str((args.out / "part_quality").resolve()) if args.images else "part_quality"
    common.print_table(numbers)
    common.save(name, args.device, rows, draw(rows, [column.title for column in every]), **settings)


if __name__ == "__main__":
    main()
