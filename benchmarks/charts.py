"""Draw the charts of the pages from the files in results/: what a step costs, how good the parts are, what is learned.

python benchmarks/charts.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from tables import RESULTS, read

PICTURES = Path(__file__).parents[1] / "docs/pictures"
STUDY = {"pretraining.png": RESULTS / "amd-epyc-2-cores/patch4.png"}  # drawn by pretraining.py
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "maskevolve", "font.size": 9, "font.family": "sans-serif"}

Chart = dict[str, dict[str, list[float]]]  # for each panel and each bar: its value, and the ends of its spread


def step_time() -> Chart:
    """A training step, against one with random masks."""
    rows = {row["name"]: row for row in read("step")["rows"]}
    shown = {
        "random masks": rows["random masks"],
        "evolving masks, the default": rows["evolving"],
        "evolving masks, as published": rows["published: all layers unfused, EM"],
    }
    return {
        "time of a small MAE, 2 CPU cores": {
            label: [row["ratio"], row["ratio_low"], row["ratio_high"]] for label, row in shown.items()
        },
        "matrix products of a ViT-B/16": {label: [row["products_of_vit_b_16"]] * 3 for label, row in shown.items()},
    }


def part_quality() -> Chart:
    """The adjusted Rand index of parts and people's segmentations, with its standard error."""
    ours, small, vit = "graph cut, contrast edges", "small MAE", "vit_small_patch14_dinov2"
    shown = {
        "one person against another": ("one person against another", "", "no model"),
        "the default, of a trained ViT-S": (ours, "attention, middle third", vit),
        "the default, of a small MAE": (ours, "attention, middle third", small),
        "tokens before the first block": (ours, "tokens", small),
        "EM as released, of a trained ViT-S": ("EM, as released", "attention, all layers", vit),
        "EM as released, of a small MAE": ("EM, as released", "attention, all layers", small),
        "Felzenszwalb's segments": ("Felzenszwalb", "pixels", "no model"),
        "blocks of a 3 x 3 grid": ("3 x 3 blocks", "pixels", "no model"),
    }
    chart: Chart = {}
    panels = {"objects, BSDS500 test": "bsds/test", "objects, COCO": "coco", "parts of people, CCP test": "ccp/test"}
    for panel, column in panels.items():
        of_column = [row for row in read("part_quality")["rows"] if row["column"] == column]
        rows = {(row["name"], row["source"], row["model"]): (row["index"], row["index_error"]) for row in of_column}
        found = {label: rows[name] for label, name in shown.items() if name in rows}
        chart[panel] = {label: [index, index - error, index + error] for label, (index, error) in found.items()}
    return chart


def draw(chart: Chart, title: str) -> Figure:
    """A panel of horizontal bars for each group, with their spread and their values; ours in orange."""
    labels = list(next(iter(chart.values())))
    limit = 1.25 * max(high for bars in chart.values() for _, _, high in bars.values())
    figure = Figure(figsize=(7.5, 0.8 + 0.26 * len(labels)), layout="constrained")
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(1, len(chart), sharey=True, squeeze=False)[0]
    for ax, (panel, bars) in zip(axes, chart.items(), strict=True):
        for place, label in enumerate(labels):
            value, low, high = bars.get(label, [0, 0, 0])
            ax.barh(place, value, 0.7, color="#d95f02" if "default" in label else "#8c96a3")
            ax.plot([low, high], [place, place], color="#1f2328", linewidth=1.2, visible=low < high)
            text = f"{value:.2f}" if label in bars else "not measured"
            ax.annotate(text, (high, place), (4, 0), textcoords="offset points", va="center")
        ax.set_title(panel, fontsize=9, loc="left")
        ax.set_yticks(range(len(labels)), labels)
        ax.set(xlim=(0, limit), ylim=(len(labels) - 0.5, -0.5), xticks=[])
        ax.tick_params(length=0)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


CHARTS = {
    "step_time": (step_time, "A training step, against one with random masks: less is better"),
    "part_quality": (
        part_quality,
        "Agreement of parts with people's segmentations, adjusted Rand index: more is better",
    ),
}


def main(folder: Path = PICTURES) -> None:
    """Write each chart as SVG, which carries the data that it was drawn from as its description."""
    for name, (collect, title) in CHARTS.items():
        chart = collect()
        with mpl.rc_context(STYLE):
            metadata = {"Description": json.dumps(chart), "Date": None}
            draw(chart, title).savefig(folder / f"{name}.svg", metadata=metadata)
    for name, path in STUDY.items():
        shutil.copyfile(path, folder / name)


if __name__ == "__main__":
    main()
