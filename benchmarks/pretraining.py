"""Do masks that evolve learn more? The same small MAE, pretrained with each mask and seed, and what it has learned.

python benchmarks/pretraining.py --data ../shared/data/tinyimagenet20 --size cpu --seeds 0 1 2 --workers 2
python benchmarks/pretraining.py --report         # the table and the figure, from the finished runs that are there

`--masks` also takes settings of grid to part, one changed at a time, which are for choices: they are scored only on the
pictures of `train` that no probe learns from, and not on `val`.

FOLDER holds `train` and `val` in torchvision's ImageFolder layout and, for the segmentation probe, `boxes.csv` with a
row `path,...,x0,y0,x1,y1` for each picture. Pictures are brought to one size and held in memory.

It can be stopped at any moment: the same command goes on where it was. A finished run is a file in --out and is not
made again; one that is not is a checkpoint in --runs. Two commands side by side share the runs between them.
All masks have the same steps; what that took is in the table, and a row "random, longer" compares at equal time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from mask_runs import SIZES, Run, file_name, num_epochs, write
from matplotlib import colormaps
from matplotlib.figure import Figure
from methods import BASELINE, CHOICES, DEFAULT, MASKS, METHODS
from pictures import Data
from probes import MEASURES, MORE
from scipy.stats import t as student
from tables import pretraining_cells
from torch import multiprocessing
from tqdm import tqdm

Jobs = list[tuple[str, int]]
COLOURS = dict(zip(MASKS, colormaps["tab20"].colors, strict=False)) | {BASELINE: "black", DEFAULT: "red"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER")
    add("--size", choices=SIZES, help="cpu on a CPU, gpu on a GPU if not given")
    names = f"masks: {', '.join(MASKS)} (all of them if not given); settings: {', '.join(CHOICES)}"
    add("--masks", nargs="+", choices=METHODS, default=list(MASKS), metavar="MASK", help=names)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--workers", type=int, default=1, help="runs side by side (default: 1); on a CPU one thread each")
    add("--out", type=Path, help="finished runs (default: results/<machine>/pretraining; ci: RUNS/ci/results)")
    add("--runs", type=Path, default=Path("runs/pretraining"), help="checkpoints (default: runs/pretraining)")
    add("--report", action="store_true", help="only write the table and the figure")
    args = parser.parse_args(argv)
    if args.data is None and not args.report:
        parser.error("--data FOLDER is missing")
    args.size = args.size or ("gpu" if args.device == "cuda" else "cpu")
    args.runs = args.runs / args.size
    trial = args.size == "ci"
    args.out = args.out or (args.runs / "results" if trial else common.folder(args.device) / "pretraining")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.report:
        run_all(args)
    report(args.out)


def run_all(args: argparse.Namespace) -> None:
    """Start the workers and wait for them."""
    size, machine = SIZES[args.size], common.machine(args.device)
    data = Data.read(args.data, size.image, size.patch, size.labelled)
    jobs = [(mask, seed) for seed in args.seeds for mask in args.masks]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by a worker when it starts
    spawn = multiprocessing.get_context("spawn")
    shared = (jobs, args.size, data, args.device, machine, args.out, args.runs)
    workers = [spawn.Process(target=work, args=(place, *shared), daemon=True) for place in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker stopped early, see above: give the same command again to go on")


def work(
    place: int, jobs: Jobs, size: str, data: Data, device: str, machine: str, out: Path, checkpoints: Path
) -> None:
    """Make the runs that are not finished and that nobody else is making, one after the other."""
    if device == "cpu":
        torch.set_num_threads(1)
    every, failed = [num_epochs(mask, SIZES[size]) for mask, _ in jobs], list[str]()

    def finished() -> int:
        """Epochs of finished runs."""
        return sum(n for n, job in zip(every, jobs, strict=True) if (out / f"{file_name(*job)}.json").exists())

    with tqdm(total=sum(every), initial=finished(), position=place, smoothing=0, desc="epochs of all runs") as bar:

        def show(run: Run) -> None:
            bar.set_postfix_str(f"{file_name(run.mask, run.seed)}, epoch {run.epoch}, loss {run.losses[-1]:.3f}", False)
            bar.update(finished() + run.epoch - bar.n)
            parent = multiprocessing.parent_process()
            if parent is not None and not parent.is_alive():  # nobody would stop this one
                raise SystemExit("the command was stopped")

        for mask, seed in jobs:
            path, folder = out / f"{file_name(mask, seed)}.json", checkpoints / file_name(mask, seed)
            with locked(folder) as ours:
                if not ours:
                    continue
                run = Run(mask, seed, SIZES[size], data, device)
                if path.exists():
                    run.check(json.loads(path.read_text())["settings"], path)
                    continue
                try:
                    write(run.go_on(folder / "state.pt", show), path, machine, device)
                except FloatingPointError as error:  # the others go on
                    failed.append(str(error))
                    bar.write(failed[-1])
    if failed:
        raise SystemExit("\n".join(failed))


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether the run of this folder is ours; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def report(folder: Path) -> None:
    """Write the tables, as `folder`.json, and the figure, as `folder`.png, from the finished runs in it."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"{folder} holds no finished run")
    for name in ("size", "probes", "fingerprint"):
        found = {json.dumps(result["settings"][name]) for result in results}
        if len(found) > 1:
            raise SystemExit(f"the runs in {folder} have more than one {name}, {', '.join(found)}: sort them apart")
    by_mask = {mask: {run["seed"]: run for run in results if run["mask"] == mask} for mask in METHODS}
    by_mask = {mask: runs for mask, runs in by_mask.items() if runs}
    masks = {mask: runs for mask, runs in by_mask.items() if mask in MASKS}
    same = ("size", "probes", "pictures", "fingerprint")
    result = {
        "machine": ", ".join(sorted({run["machine"] for run in results})),
        "device": results[0]["device"],
        "settings": {name: results[0]["settings"][name] for name in same},
        "baseline": BASELINE,
        "rows": [summary(mask, runs, by_mask.get(BASELINE, {})) for mask, runs in masks.items()],
        "default": DEFAULT,
        "against_default": [summary(mask, runs, by_mask.get(DEFAULT, {})) for mask, runs in by_mask.items()],
    }
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(masks).savefig(folder.parent / f"{folder.name}.png", dpi=110)
    for rows, prefix in ((result["rows"], ""), (result["rows"], "more_"), (result["against_default"], "more_")):
        common.print_table([{"mask": row["name"], **pretraining_cells(row, prefix)} for row in rows])
    print(f"wrote {folder}.json and .png")


def summary(mask: str, runs: dict[int, Any], others: dict[int, Any]) -> common.Row:
    """Means at the end of training, and differences to the baseline's runs of the same seeds."""
    pairs = [(runs[seed], others[seed]) for seed in sorted(runs) if seed in others]
    times = [duration(run) / duration(other) for run, other in pairs]
    row: common.Row = {"name": mask, "seeds": len(runs), "pairs": len(pairs)}
    row["epochs"] = next(iter(runs.values()))["settings"]["epochs"]
    row["seconds"] = float(np.mean([run["seconds"] for run in runs.values()]))
    row["time"] = float(np.mean(times)) if times else None
    for name in (*MEASURES, *MORE):
        values = [run["curve"][-1].get(name) for run in runs.values()]
        ends = [(run["curve"][-1].get(name), other["curve"][-1].get(name)) for run, other in pairs]
        apart = [value - other for value, other in ends if None not in (value, other)]
        row[name] = None if None in values else float(np.mean(values))
        row[f"{name}_difference"] = None if runs is others else interval(apart)
    return row


def interval(differences: list[float]) -> list[float | None] | None:
    """Mean, and the ends of its 95 % interval by Student's t, for which there must be two differences."""
    if not differences:
        return None
    mean, degrees = float(np.mean(differences)), len(differences) - 1
    if not degrees:
        return [mean, None, None]
    half = float(student.ppf(0.975, degrees) * np.std(differences, ddof=1) / len(differences) ** 0.5)
    return [mean, mean - half, mean + half]


def duration(run: Any) -> float:
    """Seconds of pretraining: of the processor on a CPU, which others may share."""
    return float(run["seconds" if run["device"] == "cuda" else "processor_seconds"])


def draw(by_mask: dict[str, dict[int, Any]]) -> Figure:
    """Fine-tuned accuracy of each mask, and the other measures against training: means, and seeds as dots."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    draw_ends(axes[0], by_mask, "fine_tuned", "fine-tuned")
    draw_ends(axes[1], by_mask, MORE[0], "fine-tuned, many more pictures")
    for ax, (name, title) in zip(axes[2:], list(MEASURES.items())[1:], strict=True):
        for index, (mask, runs) in enumerate(by_mask.items()):
            draw_curve(ax, mask, list(runs.values()), name, index)
        ax.set(title=title, xlabel="epoch", xlim=(-0.3, None))
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def draw_ends(ax: Any, by_mask: dict[str, dict[int, Any]], name: str, title: str) -> None:
    """A row for each mask."""
    for place, (mask, runs) in enumerate(by_mask.items()):
        values = [run["curve"][-1][name] for run in runs.values() if name in run["curve"][-1]]
        if values:
            ax.plot(values, [place] * len(values), ".", color=COLOURS[mask], markersize=4)
            ax.plot(np.mean(values), place, "os^"[place % 3], color=COLOURS[mask])
    ax.set_yticks(range(len(by_mask)), by_mask, fontsize=8)
    ax.set(title=title, xlabel="accuracy")
    ax.invert_yaxis()


def draw_curve(ax: Any, mask: str, runs: list[Any], name: str, index: int) -> None:
    rows = [[row for row in run["curve"] if row.get(name) is not None] for run in runs]
    if not rows[0] or (name == "fixed_loss" and rows[0][-1]["epoch"] == 0):  # before training it is out of scale
        return
    style = {"color": COLOURS[mask], "linewidth": 2.5 if mask in (BASELINE, DEFAULT) else 1}
    epochs = [row["epoch"] for row in rows[0]]
    mean = np.mean([[row[name] for row in run] for run in rows], 0)
    ax.plot(epochs, mean, marker="os^"[index % 3], label=mask, **style)
    ax.scatter([epochs[-1]] * len(rows), [run[-1][name] for run in rows], s=8, color=COLOURS[mask])


if __name__ == "__main__":
    main()
