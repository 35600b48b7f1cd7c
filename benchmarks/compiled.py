"""Every kernel compiled ahead of time for seven kinds of card: what it takes of each, against what each has.

python benchmarks/compiled.py     # needs no GPU; a quarter of an hour on 2 cores
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports Triton

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from typing import Any
from unittest import mock

import common
import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from maskevolve.parts.edges import kernel as edges
from maskevolve.parts.mincut import kernel as mincut
from maskevolve.parts.split import kernel as split

# CUDA C++ Programming Guide, technical specifications by compute capability.
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that one program can have
REGISTERS, REGISTERS_OF_A_THREAD = 65536, 255
KERNELS = [
    (mincut, "_min_cut_kernel"),
    (split, "_capacities_kernel"),
    (split, "_split_kernel"),
    (edges, "_contrast_kernel"),
]
Case = tuple[str, Callable[[], Any]]


class NoCard:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


class Compiler:
    """In the place of a kernel: a launch compiles it, and notes what it takes."""

    def __init__(self, kernel: Any, rows: list[common.Row], sm: int) -> None:
        self.kernel, self.rows, self.sm = kernel, rows, sm

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*args: Any, **options: Any) -> None:
            args = tuple(MockTensor(arg.dtype) if isinstance(arg, Tensor) else arg for arg in args)
            self.kernel.device_caches.clear()  # for the log
            with redirect_stdout(io.StringIO()) as log:
                compiled = self.kernel.warmup(*args, grid=grid, **options)
            bits = {True: 32, False: 64}.get(options.get("IS_NARROW"))  # of which kernels there are two
            row = {"kernel": self.kernel.__name__, "bits": bits, "sm": self.sm}
            self.rows.append({**row, **needs(compiled, log.getvalue(), self.sm)})

        return compile_it


def needs(compiled: Any, log: str, sm: int) -> common.Row:
    """Registers of a thread, bytes of a thread that are spilled, bytes of shared memory of a program; does all fit?"""
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers = int(re.findall(r"Used (\d+) registers", log)[-1])
    stores, loads = map(int, re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)[-1])
    granted = -(-registers // 8) * 8 * 32 * warps  # of a card's registers: eight at a time, for a warp of 32
    fits = registers <= REGISTERS_OF_A_THREAD and granted <= REGISTERS and shared <= SHARED[sm] * 1024
    return {
        "warps": warps,
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "shared": shared,
        "shared_limit": SHARED[sm] * 1024,
        "barriers": compiled.asm["ptx"].count("bar.sync"),
        "fits": fits,
    }


def compile_for(sm: int, cases: list[Case]) -> list[common.Row]:
    """A row for each kernel that a case launches."""
    rows: list[common.Row] = []
    driver.set_active(NoCard(sm))
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    with ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(mock.patch.object(module, name, Compiler(getattr(module, name), rows, sm)))
        for case, launch in cases:
            before = len(rows)
            launch()
            rows[before:] = [{"case": case, **row} for row in rows[before:]]
    return rows


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cut(height: int, width: int, rounds: int = mincut.ROUNDS) -> Case:
    grid, edges = empty(2, height, width, dtype=torch.int32), empty(2, 8, height, width, dtype=torch.int32)
    return f"{height} x {width}, {rounds} rounds", lambda: mincut.min_cut(grid, grid, edges, rounds=rounds)


def tree(side: int, level: int) -> Case:
    def launch() -> None:
        patches = side * side
        capacity = empty(2, 8, patches, dtype=torch.int32)
        parts = split.TritonParts(empty(2, patches, patches), capacity, (side, side), weaken=True)
        parts.level = level
        parts.capacities()
        parts.split(empty(2, patches, dtype=torch.bool))

    return f"{side} x {side}, level {level}", launch


def contrast(side: int) -> Case:
    return f"{side} x {side}, pictures", lambda: edges.contrast_edges(
        empty(2, 3, 16 * side, 16 * side), (side, side), 1
    )


def all_cases() -> Iterator[Case]:
    yield from (cut(side, side) for side in (14, 16, 32, 64))
    yield cut(14, 14, rounds=1)
    yield from (tree(14, level) for level in (0, 3))
    yield from (tree(side, level=0) for side in (32, 64))
    yield from (contrast(side) for side in (14, 32, 64))


def main() -> None:
    cases = list(all_cases())
    rows = [row for sm in tqdm(SHARED) for row in compile_for(sm, cases)]
    result = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    path = common.RESULTS / "compiled" / "kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    common.print_table(rows)
    print(f"wrote {path}; {sum(not row['fits'] for row in rows)} of {len(rows)} do not fit")


if __name__ == "__main__":
    main()
