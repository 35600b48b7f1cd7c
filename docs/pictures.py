"""Draw the pictures of the pages on masks and parts, from the code of these pages or the same calls.

python docs/pictures.py               # all of them, into docs/pictures
python docs/pictures.py --out FOLDER
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from maskevolve import EvolvingMask, GraphCutPartitioner, PartMask, PartTeacher, parts_from_segmentation
from maskevolve.parts import mincut
from maskevolve.schedule import alpha_at, num_parts_at, num_parts_by
from maskevolve.viz import mask_picture, part_picture

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import video

DOCS = Path(__file__).parent

WIDTH, DPI, FONT = 4.2, 150, 8  # inches, pixels an inch, points: readable where a page is 400 pixels wide
WIDEST = 800  # pixels
GAP, LINE = 0.05, 0.14  # inches, between panels and for a line of a title
PHOTO, GRID = 224, 14  # pixels, patches


@cache
def names(page: str, containing: str = "") -> dict[str, Any]:
    """What the first block of Python on a page with `containing` in it leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    left: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(next(block for block in blocks if containing in block), left)
    return left


def panels(pictures: Sequence[Any], titles: Sequence[str], columns: int) -> Figure:
    """Square pictures side by side, each under its title."""
    side, above = (WIDTH - GAP) / columns, GAP + LINE * (1 + max(title.count("\n") for title in titles))
    height = -(-len(pictures) // columns) * (side - GAP + above) + GAP
    figure = Figure(figsize=(WIDTH, height))
    for place, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = GAP + place % columns * side, height - place // columns * (side - GAP + above) - above
        size = (left / WIDTH, (top - side + GAP) / height, (side - GAP) / WIDTH, (side - GAP) / height)
        ax = figure.add_axes(size)
        ax.set_axis_off()
        ax.imshow(picture, extent=(0, PHOTO, PHOTO, 0))
        ax.set_title(title, fontsize=FONT, pad=3)
    return figure


def masks() -> Figure:
    """A photograph with its parts, and what each mask leaves of it."""
    page = names("masks.md", "half_way")
    titles = ["10 parts", *(type(mask).__name__ for mask in page["masks"][:-1]), "Evolving, alpha 0.5"]
    return panels(page["pictures"], titles, 3)


def shares() -> Figure:
    """What masks that remove not only whole parts leave of the same photograph."""
    page = names("masks.md", "half_way")
    options = [{"share": 0.5}, {"share": 0.25}, {"hint": 0.1}, {"share": 0.5, "hint": 0.1}]
    masks = [PartMask(), *(PartMask(**each) for each in options)]
    pictures = [part_picture(page["images"][0], page["parts"][0])]
    for mask in masks:
        torch.manual_seed(2)
        pictures.append(mask_picture(page["images"][0], mask.sample(1, GRID, 0.75, parts=page["parts"])[0]))
    titles = [", ".join(f"{name} {value}" for name, value in each.items()) for each in options]
    return panels(pictures, ["10 parts", "PartMask()", *titles], 3)


def evolving() -> Figure:
    """Parts and masks at four epochs of 100."""
    page, epochs = names("masks.md", "half_way"), (0, 24, 49, 99)
    masking, teacher = EvolvingMask(100), PartTeacher(page["vit"], GraphCutPartitioner(), total_epochs=100)
    above, below = [], []
    for epoch in epochs:
        torch.manual_seed(1)
        parts = teacher.set_epoch(epoch)(page["images"])
        removed = masking.set_epoch(epoch).sample(1, GRID, 0.75, parts=parts)
        above.append((part_picture(page["images"][0], parts[0]), f"epoch {epoch}\n{len(parts.unique())} parts"))
        below.append((mask_picture(page["images"][0], removed[0]), f"alpha {masking.alpha:.2f}"))
    return panels(*zip(*above, *below, strict=True), len(epochs))


def chart(columns: int, height: float) -> tuple[Figure, Any]:
    """An empty chart."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=FONT - 1)
        ax.grid(color="0.9")
    return figure, axes


def schedules() -> Figure:
    """The weight of the end mask, and the number of parts, over 100 epochs."""
    figure, (left, right) = chart(2, 2.3)
    epochs = np.arange(100)
    powers = {"power 0.5": 0.5, "power 1": 1.0, "power 2": 2.0, "2p - 1": lambda progress: 2 * progress - 1}
    for name, power in powers.items():
        left.plot(epochs, [alpha_at(epoch, 100, power) for epoch in epochs], label=name)
    right.plot(epochs, [num_parts_at(epoch, 100) for epoch in epochs], label="(40, 10)")
    falling = [num_parts_by(lambda progress: 40 * 0.25**progress, epoch, 100) for epoch in epochs]
    right.plot(epochs, falling, label="40 * 0.25**p")
    left.set(title="alpha", ylim=(0, 1.02))
    right.set(title="number of parts", ylim=(0, 42))
    for ax in (left, right):
        ax.title.set_size(FONT)
        ax.set_xlabel("epoch", fontsize=FONT)
        ax.legend(fontsize=FONT - 1, frameon=False)
    return figure


def own_masks() -> Figure:
    """What the masks of the page on one's own leave of a photograph."""
    image = names("masks.md", "half_way")["images"][0]
    noise = names("own_mask.md", "class NoiseMask")["NoiseMask"]
    salient = names("own_mask.md", "class SaliencyMask")["SaliencyMask"]()
    salient.saliency = image.unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1)).std((0, 2, 4)).view(1, -1)
    own = {"CellMask": names("own_mask.md", "class CellMask")["CellMask"]()}
    own |= {f"NoiseMask, {colour}": noise(colour) for colour in ("red", "green", "blue", "purple")}
    own |= {"SaliencyMask": salient}
    torch.manual_seed(0)
    pictures = [mask_picture(image, mask.sample(1, GRID, 0.75)[0]) for mask in own.values()]
    return panels(pictures, list(own), 3)


def power_of(removed: torch.Tensor) -> tuple[Any, Any]:
    """The mean power of masks [B, H, W] at each frequency, in waves a grid; 1 where patches are independent."""
    size, waves = removed.shape[1], torch.fft.fftfreq(removed.shape[1]) * removed.shape[1]
    share = removed.float().mean()
    power = torch.fft.fft2(removed.float() - share).abs().square().mean(0) / (share * (1 - share) * size**2)
    ring = torch.hypot(waves[:, None], waves).round().long()
    rings = torch.arange(1, size // 2 + 1)
    return rings.numpy(), torch.stack([power[ring == each].mean() for each in rings]).numpy()


def noise() -> Figure:
    """The power of masks of filtered noise over frequency."""
    mask = names("own_mask.md", "class NoiseMask")["NoiseMask"]
    figure, (ax,) = chart(1, 2.2)
    torch.manual_seed(0)
    for colour in ("red", "green", "blue", "purple"):
        frequency, power = power_of(mask(colour).sample(2000, GRID, 0.75).view(-1, GRID, GRID))
        ax.plot(frequency, power, color=f"tab:{colour}", label=colour)
    ax.axhline(1, color="0.5", linestyle=":", label="random masks")
    ax.set(yscale="log", xlabel="frequency, waves in the grid", ylabel="power")
    ax.xaxis.label.set_size(FONT)
    ax.yaxis.label.set_size(FONT)
    ax.legend(fontsize=FONT - 1, frameon=False, ncols=2)
    return figure


def grey(image: torch.Tensor) -> Any:
    """[3, height, width] to [height, width, 3], pale, to draw on."""
    return (0.35 + 0.65 * image.mean(0))[..., None].expand(-1, -1, 3).numpy()


def cut() -> Figure:
    """What the first cut of a photograph is made of: the values that the library hands to its solver."""
    page = names("parts.md", "hierarchy.cut")
    image, affinity, graphs = page["images"], page["affinity"], []

    def record(*graph: torch.Tensor, **options: Any) -> torch.Tensor:
        graphs.append((*graph, mincut.grid_min_cut(*graph, **options)))
        return graphs[-1][-1]

    with mock.patch("maskevolve.parts.graph_cut.grid_min_cut", record):
        GraphCutPartitioner().hierarchy(affinity, images=image)
    source, sink, capacity, side = (tensor[0] for tensor in graphs[0])
    titles = ["1. affinity to one patch", "2. pull to either mean", "3. edges: cheap where dark", "4. the cut"]
    backdrop = grey(image[0])
    figure = panels([backdrop] * 3 + [part_picture(image[0], side.flatten())], titles, 2)
    row, column = 8, 5
    over = {"extent": (0, PHOTO, PHOTO, 0), "alpha": 0.7}
    figure.axes[0].imshow(affinity[0, row * GRID + column].clamp(min=0).view(GRID, GRID).numpy(), cmap="YlOrRd", **over)
    square = Rectangle((16 * column, 16 * row), 16, 16, fill=False, edgecolor="blue", linewidth=2)
    figure.axes[0].add_patch(square)
    figure.axes[2].add_collection(border_lines(capacity))
    pull = (source - sink).numpy()
    figure.axes[1].imshow(pull, cmap="PuOr", vmin=-abs(pull).max(), vmax=abs(pull).max(), **over)
    return figure


def border_lines(capacity: torch.Tensor) -> LineCollection:
    """The border of each patch to the east and to the south, the darker the lower its capacity."""
    weakness = 1 - capacity / capacity.max()
    lines, alphas = [], []
    for row in range(GRID):
        for column in range(GRID):
            corner = (16 * column + 16, 16 * row + 16)
            lines += [[(corner[0], corner[1] - 16), corner], [(corner[0] - 16, corner[1]), corner]]
            inside = column < GRID - 1, row < GRID - 1
            alphas += [float(weakness[way, row, column]) * there for way, there in zip((0, 2), inside, strict=True)]
    return LineCollection(lines, colors=[(0.1, 0.1, 0.5, alpha) for alpha in alphas], linewidths=1.6)


def tree() -> Figure:
    """Nested partitions from one solve."""
    page = names("parts.md", "hierarchy.cut")
    return panels(page["pictures"], [f"cut({count})" for count in (2, 5, 10, 20)], 2)


def smoothness() -> Figure:
    """Ten parts at three values of smoothness."""
    page, pictures, titles = names("parts.md", "hierarchy.cut"), [], []
    for value in (4, 16, 64):
        parts = GraphCutPartitioner(smoothness=value)(page["affinity"], 10, images=page["images"])
        pictures.append(part_picture(page["images"][0], parts[0], colours=True))
        titles.append(f"smoothness {value}")
    return panels(pictures, titles, 3)


def own_parts() -> Figure:
    """Segments of scikit-image, the parts that they become, and a mask of them."""
    image = names("masks.md", "half_way")["images"]
    labels = names("own_parts.md", "slic(")["slic_parts"](image)
    parts = parts_from_segmentation(labels, GRID)
    torch.manual_seed(3)
    removed = names("masks.md", "half_way")["PartMask"]().sample(1, GRID, 0.75, parts=parts)
    pictures = [part_picture(image[0], labels.flatten(), (PHOTO, PHOTO)), part_picture(image[0], parts[0])]
    pictures.append(mask_picture(image[0], removed[0]))
    return panels(pictures, ["segments of pixels", "parts of patches", "PartMask"], 3)


def quickstart() -> Figure:
    """What the script of the quickstart draws."""
    with mock.patch.object(Figure, "savefig"):  # the script writes into the working folder
        figure: Figure = names("quickstart.md", "savefig")["figure"]
    return figure


def tubes() -> Figure:
    """What the example of video draws."""
    with mock.patch.object(Figure, "savefig", autospec=True) as saved, tempfile.TemporaryDirectory() as out:
        video.main(["--out", out])
    figure: Figure = saved.call_args.args[0]
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    drawing.__name__: drawing
    for drawing in (
        masks,
        shares,
        evolving,
        schedules,
        own_masks,
        noise,
        cut,
        tree,
        smoothness,
        own_parts,
        quickstart,
        tubes,
    )
}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, for a small file; dithered, for smooth shades."""
    raw = io.BytesIO()
    figure.savefig(raw, dpi=min(DPI, WIDEST / figure.get_figwidth()), facecolor="white")
    with Image.open(raw) as opened:
        picture = opened.convert("RGB")
    few = picture.quantize(256, kmeans=2)
    colours = np.array(few.getpalette()).reshape(-1, 3)
    few.putpalette(
        np.where((colours > 247).all(1, keepdims=True), 255, colours).flatten().tolist()
    )  # white stays white
    picture.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "pictures", help="folder (default: docs/pictures)")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save(draw(), out / f"{name}.png")


if __name__ == "__main__":
    main()
