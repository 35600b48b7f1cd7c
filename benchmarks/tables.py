"""Write the tables of the pages, and the figures of the README, from the files in results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
PAGES = [HOME / "README.md", *(HOME / f"docs/{page}.md" for page in ("costs", "parts", "results", "hosts/index"))]
PAGES.append(HOME / "benchmarks/results/README.md")
RESULTS = Path(__file__).parent / "results"
GPU = "nvidia-h200"
TRAINED = ("vit_small_patch14_dinov2",)
MODELS = {"small MAE": "small MAE", TRAINED[0]: "ViT-S", "no model": ""}
STUDIES = ("patch4", "gpu")
PRIMARY = {"fine_tuned": "fine-tuned", "knn": "k-NN"}
SECONDARY = {
    "linear": "linear probe",
    "boxes": "patches of objects",
    "regions_bsds": "regions, BSDS",
    "regions_coco": "regions, COCO",
    "exchanged": "background exchanged",
    "parts_hidden": "parts hidden",
    "patches_hidden": "patches hidden",
}
TESTED = ("torch", "numpy", "scipy", "PyMaxflow", "timm", "transformers", "lightly", "pytorch-lightning")
TESTED += ("stable-pretraining", "monai")
NO_FILE = "Not measured yet."
NOT_MEASURED = "No GPU was at hand: these figures are still to be measured on one."


def render(text: str) -> str:
    """A page with each table between its two markers made anew."""
    tables = {
        "masks": masks,
        "clips": clips,
        "partition": partition,
        "volumes": partial(partition, "volumes"),
        "moving_shapes": moving_shapes,
        "compiled": compiled,
        "step": step,
        "teachers": teachers,
        "parts": parts,
        "numbers": numbers,
        "known": known,
        "counts": counts,
        "versions": versions,
        "learned": learned,
    }
    for name in ("primary", "secondary", "confirmation", "confirmation_secondary"):
        tables[name] = partial(study, name)
    tables["old_study"] = old_study

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


def clips() -> str:
    """The largest batch: the masks alone, forward, and forward and backward."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        most = max(row["batch"] for row in rows)
        return {(row["name"], f"{row['pass']}, {most} clips"): _ratio(row) for row in rows if row["batch"] == most}

    return by_machine("clips", cells)


def partition(name: str = "partition") -> str:
    """A row for each grid, batch and number of parts: with pictures first, then without."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        def label(row: Any) -> str:
            images = "1 image" if row["batch"] == 1 else f"{row['batch']} images"
            without = "" if row.get("pictures") else ", no pictures"
            return f"{row['grid']}, {images}, {row['parts']} parts{without}"

        solver = "triton" if any(row["name"] == "graph cut, triton" for row in rows) else "pymaxflow"  # the default
        peak = {
            (label(row), f"peak memory, {solver}"): f"{row['peak_mib']:.0f} MiB"
            for row in rows
            if row["name"] == f"graph cut, {solver}"
        }
        return {(label(row), row["name"]): _ratio(row) for row in rows} | peak

    return by_machine(name, cells)


def compiled() -> str:
    """Registers of a thread, spilled bytes of it and bytes of shared memory of each kernel on each kind of card."""
    rows = json.loads((RESULTS / "compiled/kernels.json").read_text())["rows"]
    cards = dict.fromkeys(row["sm"] for row in rows)
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        kernel = row["kernel"].strip("_").removesuffix("_kernel").replace("_", " ")
        label = f"{kernel}, {row['case']}" + (f", {row['bits']} bits" if row["bits"] else "")
        needs = f"{row['registers']}; {row['spill_stores']}; {row['shared']}"
        cells.setdefault(label, {})[row["sm"]] = needs if row["fits"] else f"{needs}: does not fit"
    lines = ["| | " + " | ".join(f"sm_{sm}" for sm in cards) + " |", "| --- |" + " ---: |" * len(cards)]
    return "\n".join(lines + [f"| {label} | " + " | ".join(of.values()) + " |" for label, of in cells.items()])


def step() -> str:
    """Time, and the matrix products of a ViT-B/16, which were counted."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        time = {(row["name"], "time of a step"): _ratio(row) for row in rows}
        products = {(row["name"], "matrix products, ViT-B/16"): row["products_of_vit_b_16"] for row in rows}
        return time | {place: f"{ratio:.2f}" for place, ratio in products.items() if ratio is not None}

    return by_machine("step", cells)


def teachers() -> str:
    """The share of a forward pass, the index of each column, and the effective parts inside of people."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {}
        for row in rows:
            label = f"{MODELS[row['model']]}: {row['name']}"
            found[label, "share of a forward pass"] = f"{row['share']:.2f}"
            for title in ("bsds/val", "coco", "ccp/val"):
                found[label, title] = f"{row[f'{title} index']:.3f} ± {row[f'{title} index_error']:.3f}"
            found[label, "effective of 10, ccp/val"] = f"{row['ccp/val effective']:.1f}"
        return found

    return by_machine("teachers", cells, timed=False)


def parts() -> str:
    """Agreement with people on real pictures, by row: the index with its standard error, and other measures."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {}
        for row in rows:
            name = ": ".join(filter(None, (MODELS[row["model"]], row["name"], row["source"])))
            found[name, row["column"]] = f"{row['index']:.3f} ± {row['index_error']:.3f}"
            if row["column"] == "bsds/test":
                found |= {(name, measure): f"{row[measure]:.2f}" for measure in ("covering", "recall", "connected")}
            if row["column"] == "ccp/test":
                found[name, "parts"] = f"{row['parts']:.1f}"
                found[name, "effective"] = f"{row['effective']:.1f}"
                found[name, "largest"] = f"{row['largest']:.2f}"
        return found

    return by_machine("part_quality", cells, timed=False)


def moving_shapes() -> str:
    """The index of planted shapes within frames and over the clip, with its standard error, by how fast they move."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {}
        for row in rows:
            label = row["name"] + (", no pictures" if row["pictures"] is False else "")
            for measure, column in {"within": "within frames", "over": "over the clip"}.items():
                found[label, f"{row['motion']}, {column}"] = f"{row[measure]:.3f} ± {row[f'{measure}_error']:.3f}"
        return found

    return by_machine("moving_shapes", cells, timed=False)


def numbers() -> str:
    """How many parts there are, and how many are effective, by how many are asked for."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        return {
            (f"{MODELS[row['model']]}, {row['column']}", f"{row['asked_for']} asked for"): (
                f"{row['parts']:.1f}; {row['effective']:.1f}; {row['index']:.3f}"
            )
            for row in rows
        }

    return by_machine("part_quality", cells, timed=False, rows="by_num_parts")


def counts() -> str:
    """What the default makes of three numbers of parts."""

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        found = {}
        for row in (row for row in rows if row["column"] == "bsds/test" and row["asked_for"] in (4, 10, 40)):
            numbers = f"{row['parts']:.0f}, as even as {row['effective']:.0f}"
            found[MODELS[row["model"]], f"{row['asked_for']} asked for"] = numbers
        return found

    return by_machine("part_quality", cells, timed=False, rows="by_num_parts")


def versions() -> str:
    """What CI installs."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (HOME / ".ci/constraints.txt").read_text(), re.MULTILINE))
    told = ", ".join(f"{name} {pins[name]}" for name in TESTED)
    return textwrap.fill(f"The tests run with {told}.", 118)


def study(table: str) -> str:
    """What models have learned under each mask: by the primary or by the other measures, or with fresh seeds."""
    rows = "confirmation" if table.startswith("confirmation") else "rows"
    measures = SECONDARY if table.endswith("secondary") else PRIMARY

    def cells(rows: list[Any]) -> dict[tuple[str, str], str]:
        return {(row["name"], column): cell for row in rows for column, cell in study_cells(row, measures).items()}

    found = [by_machine(size, cells, timed=False, rows=rows) for size in STUDIES]
    return "\n\n".join(table for table in found if table != NO_FILE) or NO_FILE


def study_cells(row: Any, measures: dict[str, str]) -> dict[str, str]:
    """The cells of one mask, by column: each measure, its difference with a 95 % interval in brackets, Holm's p."""
    found = {"seeds": str(row["pairs"] or row["seeds"]), "time": "" if row["time"] is None else f"{row['time']:.2f}"}
    for name in measures:
        found[measures[name]] = _cell(row, name)
        if name in PRIMARY:
            corrected = row.get(f"{name}_holm")
            found[f"p, {measures[name]}"] = "" if corrected is None else f"{corrected:.2g}"
    return found


def old_study() -> str:
    """The study with parts by colour: accuracies on the 6,000 pictures, and differences to random masks."""
    names = {"fine_tuned": "fine-tuned", "linear": "linear probe", "knn": "k-NN"}
    lines = [f"| | seeds | {' | '.join(names.values())} |", "| --- |" + " ---: |" * (1 + len(names))]
    for machine in ("amd-epyc-2-cores", GPU):
        result = read("pretraining", machine)
        for row in result["rows"]:
            cells = " | ".join(_cell(row, f"more_{name}") for name in names)
            lines.append(f"| {result['machine']}: {row['name']} | {row['seeds']} | {cells} |")
    return "\n".join(lines)


def learned() -> str:
    """The README's sentences on accuracy: the differences that were seen, and what others report."""
    new = read("patch4")
    best, (default,) = new["chosen"], (row for row in new["rows"] if row["name"] == "grid to part")
    fresh = [row for row in new["confirmation"] if row["with_parts"]]
    against = "; ".join(
        f"{row['name'].removeprefix(f'{best}, ')} masks, {row['pairs']} seeds, {_both(row)}" for row in fresh
    )
    patch, epochs = (new["settings"]["size"][name] for name in ("patch", "epochs"))
    told = f"""
        **Accuracy.** No mask with parts has been shown to teach more than block masks, which need no parts, and by a
        criterion that was set beforehand our [study](docs/results.md) of a small MAE, patches of {patch} pixels and
        {epochs} epochs, cannot show what a mask is worth. In it, "{best}" was chosen from five masks with parts; with
        fresh seeds, where some runs of the other masks failed, its differences in fine-tuned accuracy and in that of
        nearest neighbours, on 6,000 pictures and with 95 % intervals without correction, are: {against}. Those of the
        default, grid to part, against random masks are {_both(default)}, with the {default["pairs"]} seeds of the
        screen. The paper reports 79.89 % on ImageNet for grid to part and 79.18 % for grid to block (fine-tuned after
        200 epochs), and MEDiC (arXiv 2603.29009), a later method with CLIP targets, found that
        evolved masks do not beat block masks."""
    return textwrap.fill(
        " ".join(told.split()), 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
    )


def _both(row: Any) -> str:
    return f"{_difference(row, 'fine_tuned')} and {_difference(row, 'knn')}"


def _difference(row: Any, name: str) -> str:
    mean, low, high = row[f"{name}_difference"]
    return f"{mean:+.3f}" if low is None else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _cell(row: Any, name: str) -> str:
    cell = "" if row[name] is None else f"{row[name]:.3f}"
    return cell if row[f"{name}_difference"] is None else f"{cell}; {_difference(row, name)}"


def known() -> str:
    """The README's figures: those of the default on real pictures, and of its training steps."""

    def index(name: str, source: str, model: str = "small MAE") -> str:
        wanted = (name, source, model)
        found = {row["column"]: row for row in quality if (row["name"], row["source"], row["model"]) == wanted}
        values = [found[column]["index"] for column in ("bsds/test", "coco", "ccp/test")]
        return "{:.2f}, {:.2f} and {:.2f}".format(*values)

    quality = read("part_quality")["rows"]
    trained = next(row["model"] for row in quality if row["model"] in TRAINED)
    default = ("graph cut, contrast edges", "attention, middle third")
    tokens = (default[0], "tokens")
    step, on_gpu = read("step"), read("step", GPU)
    time, time_on_gpu = (
        next(row for row in machine["rows"] if row["name"] == "evolving") for machine in (step, on_gpu)
    )
    return f"""\
- **Time.** A training step of a small MAE takes {_ratio(time)} times as long as with random masks, on an
  {step["machine"]}. A step of a ViT-B/16 has {time["products_of_vit_b_16"]:.2f} times the matrix products, not
  counting the few of the cut. On an {on_gpu["machine"]}, the one GPU that kernels of ours have run on, before they
  were rewritten, a teacher that read tokens made it {_ratio(time_on_gpu)} times as long; today's default has not run
  there.
- **Parts.** The adjusted Rand index (0 is chance, 1 is perfect; errors are near 0.02) of 10 parts with people's
  segmentations of whole objects, BSDS500 test and COCO, and with people's parts of people, CCP test: with a small MAE
  {index(*default)}, with a well-trained ViT-S {index(*default, trained)}.
  EM on the attention of all layers, as the paper's authors released it, has
  {index("EM, as released", "attention, all layers")}, and {index("EM, as released", "attention, all layers", trained)}.
  Reading tokens before the first block has {index(*tokens)}, and
  {index(*tokens, trained)}. Without a model, colour and position have
  {index(default[0], "colour and position", "no model")}, and Felzenszwalb's segments, which are more and smaller,
  {index("Felzenszwalb", "pixels", "no model")}."""


def read(name: str, machine: str = "amd-epyc-2-cores") -> Any:
    """The results of one machine; of that without a GPU if not given."""
    return json.loads((RESULTS / machine / f"{name}.json").read_text())


def by_machine(
    name: str, cells: Callable[[list[Any]], dict[tuple[str, str], str]], timed: bool = True, rows: str = "rows"
) -> str:
    """A table for each machine that has results, and a word on those that are missing where machines differ."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    results = [result for result in results if result[rows]]
    if not results:
        return NO_FILE
    blocks = []
    for result in results:
        found = cells(result[rows])
        columns = dict.fromkeys(column for _, column in found)
        machine = result.get(f"{rows}_machine", result["machine"])
        lines = [f"| {machine} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
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
