r"""Which masks teach? The same small MAE, pretrained with each mask and seed, and what it has learned.

python benchmarks/pretraining.py --data ../shared/data/tinyimagenet20 --workers 2 \
    --segmented ../shared/data/bsds/test ../shared/data/coco
python benchmarks/pretraining.py --report         # the tables and the figure, from the finished runs that are there

The second half, once the report has named a CHOSEN mask, each with the folders of the first command:

    --seeds 3 4 5 --curve --masks random green "grid to part" CHOSEN
    --seeds 3 4 5 --masks block
    --seeds 6 7 8 --masks random green block CHOSEN

On a second machine, name the folder of the first by --out: each run says which machine made it.

FOLDER of `--data` holds `train` and `val` in torchvision's ImageFolder layout and, for the patches of objects and for
backgrounds that are exchanged, `boxes.csv` with a row `path,...,x0,y0,x1,y1` for each picture. Pictures are brought to
one size and held in memory. Each FOLDER of `--segmented` holds pictures and label maps, see `segmented.py`.

It can be stopped at any moment: the same command goes on where it was. A finished run is a file in --out and is not
made again; one that is not is a checkpoint in --runs. Two commands side by side share the runs between them. All masks
have the same steps; what that took is in the table. How a mask is chosen and confirmed stands in docs/results.md.
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
from mask_runs import SIZES, Run, Sets, file_name, num_epochs, write
from matplotlib import colormaps
from matplotlib.figure import Figure
from methods import BASELINE, CONTROLS, METHODS, NOTHING, SHUFFLED, WITH_PARTS
from scipy.stats import ttest_rel
from tables import PRIMARY, SECONDARY, study_cells
from torch import multiprocessing
from tqdm import tqdm

Jobs = list[tuple[str, int]]
Runs = dict[str, dict[int, Any]]  # of a mask, of a seed
COLOURS = dict(zip(METHODS, colormaps["tab10"].colors, strict=True)) | {BASELINE: "black"}
MEASURES = PRIMARY | SECONDARY
SCREEN, FRESH = (0, 1, 2), (3, 4, 5, 6, 7, 8)  # seeds: to choose a mask with, and to confirm it


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER")
    add("--segmented", type=Path, nargs="*", default=[], metavar="FOLDER", help="bsds/test and coco, for regions")
    add("--size", choices=SIZES, help="patch4 on a CPU, gpu on a GPU if not given")
    names = f"{', '.join(map(repr, METHODS))} (all of them if not given)"
    add("--masks", nargs="+", choices=METHODS, default=list(METHODS), metavar="MASK", help=names)
    add("--seeds", type=int, nargs="+", default=SCREEN, help="default: 0 1 2")
    add("--curve", action="store_true", help="fine-tune at three points of training, not only at the end")
    add("--workers", type=int, default=1, help="runs side by side (default: 1); on a CPU one thread each")
    add("--out", type=Path, help="finished runs (default: results/<machine>/SIZE; ci: RUNS/ci/results)")
    add("--runs", type=Path, default=Path("runs/pretraining"), help="checkpoints (default: runs/pretraining)")
    add("--report", action="store_true", help="only write the table and the figure")
    args = parser.parse_args(argv)
    if args.data is None and not args.report:
        parser.error("--data FOLDER is missing")
    args.size = args.size or ("gpu" if args.device == "cuda" else "patch4")
    args.runs = args.runs / args.size
    trial = args.size == "ci"
    args.out = args.out or (args.runs / "results" if trial else common.folder(args.device) / args.size)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.report:
        run_all(args)
    report(args.out)


def run_all(args: argparse.Namespace) -> None:
    """Start the workers and wait for them."""
    size, machine = SIZES[args.size], common.machine(args.device)
    sets = Sets.read(args.data, size, args.segmented)
    jobs = [(mask, seed) for mask in args.masks for seed in args.seeds]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by a worker when it starts
    spawn = multiprocessing.get_context("spawn")
    shared = (jobs, args.size, sets, args.curve, args.device, machine, args.out, args.runs)
    workers = [spawn.Process(target=work, args=(place, *shared), daemon=True) for place in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker stopped early, see above: give the same command again to go on")


def work(
    place: int,
    jobs: Jobs,
    size: str,
    sets: Sets,
    curve: bool,
    device: str,
    machine: str,
    out: Path,
    checkpoints: Path,
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
                run = Run(mask, seed, SIZES[size], sets, device, curve)
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
    runs = {mask: {run["seed"]: run for run in results if run["mask"] == mask} for mask in METHODS}
    screen = of_seeds(runs, SCREEN)
    rows = [summary(mask, of, screen.get(BASELINE, {})) for mask, of in screen.items()]
    with_holm([row for row in rows if row["name"] not in (BASELINE, NOTHING)], len(METHODS) - 2)
    best = chosen(rows)
    result = {
        "machine": machines(screen),
        "confirmation_machine": machines(of_seeds(runs, FRESH)),
        "device": results[0]["device"],
        "settings": {name: results[0]["settings"][name] for name in ("size", "probes", "pictures", "fingerprint")},
        "baseline": BASELINE,
        "rows": rows,
        "chosen": best,
        "confirmation": [] if best is None else confirmation(runs, best),
    }
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, best).savefig(folder.parent / f"{folder.name}.png", dpi=110)
    for rows in (result["rows"], result["confirmation"]):
        for measures in (PRIMARY, SECONDARY) if rows else ():
            common.print_table([{"mask": row["name"], **study_cells(row, measures)} for row in rows])
    print(f"wrote {folder}.json and .png")


def machines(runs: Runs) -> str:
    """The names of the machines that these runs were made on."""
    return " and ".join(sorted({run["machine"] for of in runs.values() for run in of.values()}))


def of_seeds(runs: Runs, seeds: Sequence[int]) -> Runs:
    """Those masks that have runs of these seeds, with these."""
    found = {mask: {seed: run for seed, run in of.items() if seed in seeds} for mask, of in runs.items()}
    return {mask: of for mask, of in found.items() if of}


def summary(mask: str, runs: dict[int, Any], others: dict[int, Any]) -> common.Row:
    """Means at the end of training, and differences to the others' runs of the same seeds."""
    pairs = [(runs[seed], others[seed]) for seed in sorted(runs) if seed in others]
    times = [duration(run) / duration(other) for run, other in pairs if run["machine"] == other["machine"]]
    row: common.Row = {"name": mask, "seeds": len(runs), "pairs": len(pairs), "with_parts": mask in WITH_PARTS}
    row["epochs"] = next(iter(runs.values()))["settings"]["epochs"]
    row["seconds"] = float(np.mean([run["seconds"] for run in runs.values()]))
    row["time"] = float(np.mean(times)) if times else None
    for name in MEASURES:
        values = [run["curve"][-1].get(name) for run in runs.values()]
        ends = [(run["curve"][-1].get(name), other["curve"][-1].get(name)) for run, other in pairs]
        ends = [pair for pair in ends if None not in pair]
        row[name] = None if None in values else float(np.mean(values))
        row[f"{name}_difference"], row[f"{name}_p"] = (None, None) if runs is others else paired(ends)
    return row


def paired(ends: list[tuple[float, float]]) -> tuple[list[float | None] | None, float | None]:
    """The mean difference with the ends of its 95 % interval, and its p, by Student's t; these need two pairs."""
    if not ends:
        return None, None
    mean = float(np.mean([value - other for value, other in ends]))
    if len(ends) == 1:
        return [mean, None, None], None
    test = ttest_rel(*zip(*ends, strict=True))
    return [mean, *map(float, test.confidence_interval())], float(test.pvalue)


def with_holm(rows: list[common.Row], number: int) -> list[common.Row]:
    """Correct the probabilities of each measure by Holm's procedure, for a number of rows that counts those to come."""
    for name in MEASURES:
        tested = sorted((row for row in rows if row[f"{name}_p"] is not None), key=lambda row: row[f"{name}_p"])
        least = 0.0
        for place, row in enumerate(tested):
            least = max(least, min(1.0, (number - place) * row[f"{name}_p"]))
            row[f"{name}_holm"] = least
    return rows


def chosen(rows: list[common.Row]) -> str | None:
    """The row with parts whose differences to random masks have the greatest sum over the primary measures.

    None until all of them have all seeds of the screen.
    """
    ready = {row["name"]: row for row in rows if row["name"] in WITH_PARTS and row["pairs"] == len(SCREEN)}
    if len(ready) < len(WITH_PARTS):
        return None
    return max(ready, key=lambda name: sum(ready[name][f"{measure}_difference"][0] for measure in PRIMARY))


def confirmation(runs: Runs, best: str) -> list[common.Row]:
    """The chosen mask against each control and the shuffled parts, and each other control against random masks."""
    fresh = of_seeds(runs, FRESH)

    def compared(pairs: list[tuple[str, str]]) -> list[common.Row]:
        pairs = [(mask, other) for mask, other in pairs if fresh.get(mask, {}).keys() & fresh.get(other, {}).keys()]
        return [
            summary(mask, fresh[mask], fresh[other]) | {"name": f"{mask}, against {other}"} for mask, other in pairs
        ]

    rows = compared([(best, other) for other in (*CONTROLS, SHUFFLED)])
    controls = compared([(control, BASELINE) for control in CONTROLS if control != BASELINE])
    return with_holm(rows, max(len(rows), len(CONTROLS))) + with_holm(controls, len(CONTROLS) - 1)


def duration(run: Any) -> float:
    """Seconds of pretraining: of the processor on a CPU, which others may share."""
    return float(run["seconds" if run["device"] == "cuda" else "processor_seconds"])


def draw(runs: Runs, best: str | None) -> Figure:
    """Both primary measures of each mask, and how the fine-tuned accuracy and that of regions grow with training."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, (name, title) in zip(axes[0], PRIMARY.items(), strict=True):
        draw_ends(ax, of_seeds(runs, SCREEN), name, f"{title}, seeds 0 to 2")
    shown = {mask: runs[mask] for mask in (*CONTROLS[:2], "grid to part", best) if mask in runs}
    for ax, name, title in ((axes[1, 0], "fine_tuned", "fine-tuned"), (axes[1, 1], "regions_coco", "regions, COCO")):
        seeds = draw_curves(ax, shown, name)
        told = f"seeds {', '.join(map(str, seeds))}" if seeds else "not measured yet"
        ax.set(title=f"{title}, {told}", xlabel="epoch")
    return figure


def draw_ends(ax: Any, by_mask: Runs, name: str, title: str) -> None:
    """A row for each mask: its seeds as dots, and their mean."""
    for place, (mask, runs) in enumerate(by_mask.items()):
        values = [run["curve"][-1][name] for run in runs.values()]
        ax.plot(values, [place] * len(values), ".", color=COLOURS[mask], markersize=5)
        ax.plot(np.mean(values), place, "o", color=COLOURS[mask], markerfacecolor="none", markersize=9)
    ax.set_yticks(range(len(by_mask)), by_mask, fontsize=8)
    ax.set(title=title, xlabel="accuracy")
    ax.invert_yaxis()


def draw_curves(ax: Any, by_mask: Runs, name: str) -> list[int]:
    """The means of the seeds that all masks have at each point of training, with these seeds as dots; return them."""
    found = {
        mask: {seed: curve for seed, run in runs.items() if len(curve := curve_of(run, name)) > 1}
        for mask, runs in by_mask.items()
    }
    seeds = sorted(set.intersection(*(set(curves) for curves in found.values())))
    if not seeds:
        return []
    for marker, (mask, curves) in zip("os^D", found.items(), strict=False):  # fewer masks while none is chosen
        points = np.array([list(curves[seed].values()) for seed in seeds])
        epochs = list(curves[seeds[0]])
        ax.plot(epochs, points.mean(0), marker=marker, label=mask, color=COLOURS[mask])
        ax.plot(epochs, points.T, ".", markersize=3, color=COLOURS[mask])
    ax.set_xticks(epochs)
    ax.legend(fontsize=8)
    return seeds


def curve_of(run: Any, name: str) -> dict[int, float]:
    """The curve of a run by epoch, or nothing if it was not measured at each of them."""
    found = {row["epoch"]: row.get(name) for row in run["curve"]}
    return {} if None in found.values() else found


if __name__ == "__main__":
    main()
