"""Write the tables of docs/costs.md, and the figures of the README, from the files in results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", HOME / "docs/costs.md", HOME / "docs/results.md"]
RESULTS = Path(__file__).parent / "results"
GPU = "nvidia-h200"
PLANTED = "attention, all layers"  # where planted parts stand in the table
NOT_MEASURED = "No GPU was at hand: these figures are still to be measured on one."


def render(text: str) -> str:
    """A page with each table between its two markers made anew."""
    tables = {
        "masks": masks,
        "partition": partition,
        "step": step,
        "teachers": teachers,
        "parts": parts,
        "known": known,
    }
    tables["pretraining"] = pretraining
    tables["more_pictures"] = partial(pretraining, prefix="more_")
    tables["against_default"] = partial(pretraining, prefix="more_", rows="against_default")

    def replace(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def masks() -> str:
    """196 patches in float32, the largest batch: forward, and forward and backward."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        rows = [row for row in rows if row["patches"] == 196 and row["dtype"] == "float32"]
        most = max(row["batch"] for row in rows)
        rows = [row for row in rows if row["batch"] == most]
        return {(row["name"], f"{row['pass'].replace('_', ' ')}, {most} images"): _ratio(row) for row in rows}

    return by_machine("mask_throughput", cells)


def partition() -> str:
    """All grids, batches and numbers of parts."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        def column(row: Any) -> str:
            images = "1 image" if row["batch"] == 1 else f"{row['batch']} images"
            return f"{row['grid']}, {images}, {row['parts']} parts"

        return {(row["name"], column(row)): _ratio(row) for row in rows}

    return by_machine("partition", cells)


def step() -> str:
    """Time, and the matrix products of a ViT-B/16, which were counted."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        time = {(row["name"], "time of a step"): _ratio(row) for row in rows}
        products = {(row["name"], "matrix products, ViT-B/16"): row["products_of_vit_b_16"] for row in rows}
        return time | {place: f"{ratio:.2f}" for place, ratio in products.items() if ratio is not None}

    return by_machine("step", cells)


def teachers() -> str:
    """Time, and the adjusted Rand index at each stage of training."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {(row["name"], "time of a call"): _ratio(row) for row in rows}
        for row in rows:
            for key in (key for key in row if key.startswith("index_")):
                score = f"{row[key]:.3f} ± {row[key.replace('index', 'error')]:.3f}"
                stage = key.split("_")[-1]
                found[row["name"], f"{stage} epoch{'' if stage == '1' else 's'}"] = score
        return found

    return by_machine("teachers", cells, timed=False)


def parts() -> str:
    """Agreement with people on real pictures, by row: index with its standard error, covering, recall, connected."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {}
        for row in rows:
            source = PLANTED if row["column"] == "planted" else row["source"]
            name = ": ".join(filter(None, (row["name"], source)))
            found[name, row["column"]] = f"{row['index']:.3f} ± {row['index_error']:.3f}"
            if row["column"] == "bsds/test":
                found |= {(name, measure): f"{row[measure]:.2f}" for measure in ("covering", "recall", "connected")}
                found[name, "parts"] = f"{row['parts']:.1f}"
        return found

    return by_machine("part_quality", cells, timed=False)


def pretraining(prefix: str = "", rows: str = "rows") -> str:
    """What models have learned under each mask, and differences to the baseline's runs of the same seeds."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        return {(row["name"], column): cell for row in rows for column, cell in pretraining_cells(row, prefix).items()}

    return by_machine("pretraining", cells, rows=rows)


def pretraining_cells(row: Any, prefix: str = "") -> dict[str, str]:
    """The cells of one mask, by column: each measure, and its difference with a 95 % interval in brackets."""
    found = {"seeds": str(row["seeds"]), "time": "" if row["time"] is None else f"{row['time']:.2f}"}
    names = [key.removesuffix("_difference") for key in row if key.endswith("_difference")]
    for name in (name for name in names if name.startswith("more_") == bool(prefix)):
        cell = "" if row[name] is None else f"{row[name]:.3f}"
        mean, low, high = row[f"{name}_difference"] or (None, None, None)
        cell += "" if mean is None else f"; {mean:+.3f}"
        found[name.removeprefix(prefix).replace("_", " ")] = cell + (
            "" if low is None else f" ({low:+.3f} to {high:+.3f})"
        )
    return found


def known() -> str:
    """The README's figures: those of the default on real pictures, and of its training steps."""

    def index(name: str, source: str) -> str:
        found = {row["column"]: row for row in quality if (row["name"], row["source"]) == (name, source)}
        pairs = [(found[column]["index"], found[column]["index_error"]) for column in ("bsds/test", "coco")]
        return " and ".join(f"{value:.2f} ± {error:.2f}" for value, error in pairs)

    quality = read("part_quality")["rows"]
    step, on_gpu = read("step"), read("step", GPU)
    time, time_on_gpu = (
        next(row for row in machine["rows"] if row["name"] == "evolving") for machine in (step, on_gpu)
    )
    ratios = sorted(run["evolving"]["ratio"] for run in step["earlier_runs"])
    return f"""\
- **Time.** A training step of a small MAE takes {_ratio(time)} times as long as with random masks, on an
  {step["machine"]}; earlier runs had medians of {ratios[0]:.2f} to {ratios[-1]:.2f}. A step of a ViT-B/16 has
  {time["products_of_vit_b_16"]:.2f} times the matrix products, not counting the few of the cut.
  On an {on_gpu["machine"]}, the one GPU that the kernels have run on, it takes {_ratio(time_on_gpu)} times as long.
- **Parts.** 10 parts of a picture agree with people's segmentations on BSDS500 test and on COCO by an adjusted
  Rand index of {index("graph cut, contrast edges", "tokens")} (0 is chance, 1 is perfect).
  Felzenszwalb's segments, which are more and smaller, have {index("Felzenszwalb", "pixels")}.
  EM on the same tokens, as the paper's authors released it, has {index("EM, as released", "tokens")}.
  The gain over EM comes from the contrast of the picture: without it, our cut of these tokens has
  {index("graph cut, affinity edges", "tokens")}; with it, colour and position in place of a model
  have {index("graph cut, contrast edges", "colour and position")}."""


def read(name: str, machine: str = "amd-epyc-2-cores") -> Any:
    """The results of one machine; of that without a GPU if not given."""
    return json.loads((RESULTS / machine / f"{name}.json").read_text())


def by_machine(
    name: str, cells: Callable[[list[Any]], dict[tuple[str, str], str]], timed: bool = True, rows: str = "rows"
) -> str:
    """A table for each machine that has results, and a word on those that are missing where machines differ."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    blocks = []
    for result in results:
        found = cells(result[rows])
        columns = dict.fromkeys(column for _, column in found)
        lines = [f"| {result['machine']} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        lines += [
            f"| {label} | " + " | ".join(found.get((label, column), "") for column in columns) + " |"
            for label in dict.fromkeys(label for label, _ in found)
        ]
        blocks.append("\n".join(lines))
    if timed and not any(result["device"] == "cuda" for result in results):
        blocks.append(NOT_MEASURED)
    return "\n\n".join(blocks)


def _ratio(row: Any) -> str:
    if row["ratio_low"] == row["ratio_high"] == 1:  # what the others are set against
        return f"1, {row['milliseconds']:{'.0f' if row['milliseconds'] > 100 else '.3g'}} ms"
    if row["ratio_low"] is None:  # the spread was not measured
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
