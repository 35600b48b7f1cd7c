"""What all benchmarks share: rounds side by side, ratios with their spread, one JSON file and one picture each."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer, timer

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("maskevolve", "torch", "triton", "numpy", "scipy", "PyMaxflow", "timm", "transformers", "lightly")
ROUNDS = 5
SECONDS = 0.03  # that one function runs in one round, at least
IN_A_ROW = 3  # calls of a function on a GPU, where no more fit into that
SLOW = 0.3  # seconds from which one call is timed, for the host need not work ahead

Row = dict[str, Any]


def parse_args(description: str) -> argparse.Namespace:
    """`--device`, the one flag that all have."""
    return make_parser(description).parse_args()


def parse_quick(description: str) -> argparse.Namespace:
    """`--device`, and `--quick`."""
    parser = make_parser(description)
    parser.add_argument("--quick", action="store_true", help="the smallest cases: prints them and writes no file")
    return parser.parse_args()


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def compare(functions: dict[str, Callable[[], Any]], baseline: str, device: str) -> list[Row]:
    """Time the functions round after round, each round in an order of its own, and set each against the baseline's.

    Returns:
        A row for each function: `milliseconds`, its median, and `ratio` to the baseline, with its lowest and highest.
    """
    calls = [(function, _repetitions(function, device)) for function in functions.values()]
    times = np.empty((ROUNDS, len(calls)))
    for row in times:
        for i in np.random.default_rng().permutation(len(calls)):
            row[i] = _time(*calls[i], device)
    ratios = times / times[:, [list(functions).index(baseline)]]
    return [
        {
            "name": name,
            "milliseconds": float(np.median(times[:, i])),
            "ratio": float(np.median(ratios[:, i])),
            "ratio_low": float(ratios[:, i].min()),
            "ratio_high": float(ratios[:, i].max()),
        }
        for i, name in enumerate(functions)
    ]


def _repetitions(function: Callable[[], Any], device: str) -> int:
    first = _time(function, 1, device)  # with what happens once: compilation, caches
    milliseconds = first if device == "cpu" and first > SLOW * 1e3 else _time(function, 1, device)
    least = IN_A_ROW if device == "cuda" and milliseconds < SLOW * 1e3 else 1  # as in training: the host works ahead
    return max(least, round(SECONDS * 1e3 / milliseconds))


def _time(function: Callable[[], Any], number: int, device: str) -> float:
    """Milliseconds of a call."""
    if device == "cuda" and number > IN_A_ROW:
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=int(SECONDS * 1e3), return_mode="median"))
    if number > 1:  # with two more calls, to warm up
        many = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return many.timeit(number).mean * 1e3
    start = timer()  # which waits for the GPU
    function()
    return (timer() - start) * 1e3


def peak_memory(function: Callable[[], Any], device: str) -> float:
    """MiB that a call needs on top of what is there."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide the need
    Path("/proc/self/clear_refs").write_text("5")  # Linux: begin the peak anew
    before = _resident("VmRSS")
    function()
    return (_resident("VmHWM") - before) / 2**10


def _resident(name: str) -> int:
    """KiB, from /proc."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} cores"


def folder(device: str) -> Path:
    """Where the results of this machine are."""
    path = RESULTS / re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(name: str, device: str, rows: list[Row], figure: Figure | None, **settings: Any) -> None:
    """Write `results/<machine>/<name>.json`, and `.png` where there is a figure, and print the rows."""
    result = {"machine": machine(device), "device": device, "versions": versions(), **settings, "rows": rows}
    path = folder(device) / name
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=110)
    print_table(rows)
    print(f"wrote {path}.json{'' if figure is None else ' and .png'}")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def print_table(rows: list[Row]) -> None:
    cells = [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    for line in [list(rows[0]), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def bars(groups: dict[str, list[Row]], xlabel: str) -> Figure:
    """Ratios as bars with their spread, a panel for each group; ours in orange."""
    most = max(map(len, groups.values()))
    figure = Figure(figsize=(3 + 3 * len(groups), 1.2 + 0.28 * most), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for ax, (title, rows) in zip(axes, groups.items(), strict=True):
        place, ratio = np.arange(len(rows)), np.array([row["ratio"] for row in rows])
        spread = [ratio - [row["ratio_low"] for row in rows], [row["ratio_high"] for row in rows] - ratio]
        ax.barh(place, ratio, xerr=spread, color=["tab:orange" if row["ours"] else "tab:gray" for row in rows])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yticks(place, [row["name"] for row in rows], fontsize=8)
        ax.set(title=title, xlabel=xlabel)
        ax.title.set_fontsize(9)
    axes[0].invert_yaxis()
    return figure
