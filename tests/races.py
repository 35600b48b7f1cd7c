"""A detector of data races: what kernels load and store in Triton's interpreter, where no two threads ever meet."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from triton.runtime.interpreter import InterpreterBuilder

TRITON = str(Path(triton.__file__).parent)

Site = tuple[str, int]
"""A file and a line of it."""


class Races:
    """Watches every launch inside a `with`.

    Between two barriers of a program, no address that one thread stores may be touched by another; in a launch, no
    address that one program stores may be touched by another. The same lane of blocks of the same shape is one thread:
    these have one layout. All threads load a scalar, and one stores it.

    Args:
        without: barriers that are taken out.

    Attributes:
        found: what races were found, each once: where the addresses were touched.
        barriers: where there were barriers, those that were taken out included.
        stores, programs: how much was watched.
    """

    def __init__(self, without: frozenset[Site] = frozenset()) -> None:
        self.without = without
        self.found: set[str] = set()
        self.barriers: set[Site] = set()
        self.stores = self.programs = 0
        self._phase: list[tuple[np.ndarray, np.ndarray, bool, Site]] = []
        self._launch: list[tuple[np.ndarray, np.ndarray]] = []  # of each program: what it touched, what it stored
        self._touched: list[np.ndarray] = []
        self._stored: list[np.ndarray] = []
        self._shapes: dict[tuple[int, ...], int] = {}

    def __enter__(self) -> Races:
        self._patch = pytest.MonkeyPatch()
        for name, before in [
            ("create_masked_load", self._load),
            ("create_masked_store", self._store),
            ("create_barrier", self._barrier),
            ("set_grid_idx", self._next_program),
            ("set_grid_dim", self._next_launch),
            *((name, _refuse) for name in ("create_atomic_rmw", "create_atomic_cas", "create_descriptor_load")),
        ]:
            self._patch.setattr(InterpreterBuilder, name, _after(before, getattr(InterpreterBuilder, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        self._next_launch()

    def _load(self, pointers, mask, *rest) -> None:
        self._access(pointers.data, mask.data, stored=False)

    def _store(self, pointers, value, mask, *rest) -> None:
        self._access(pointers.data, mask.data, stored=True)

    def _access(self, addresses: np.ndarray, mask: np.ndarray, stored: bool) -> None:
        addresses, mask = np.broadcast_arrays(np.asarray(addresses), np.asarray(mask))
        shape = self._shapes.setdefault(addresses.shape, len(self._shapes))
        threads = (shape << 40) + np.arange(addresses.size)
        if addresses.size == 1 and not stored:
            threads -= 1 << 50  # a scalar: all
        inside = mask.ravel().astype(bool)
        self.stores += int(inside.sum()) * stored
        self._phase.append((addresses.ravel()[inside].astype(np.int64), threads[inside], stored, _site()))

    def _barrier(self, *rest) -> None:
        site = _site()
        self.barriers.add(site)
        if site not in self.without:
            self._end_phase()

    def _end_phase(self) -> None:
        if any(stored for *_, stored, _ in self._phase):
            addresses, threads = (np.concatenate(part) for part in list(zip(*self._phase, strict=True))[:2])
            stored = np.unique(np.concatenate([each for each, _, stored, _ in self._phase if stored]))
            by, counts = np.unique(np.unique(np.stack([addresses, threads]), axis=1)[0], return_counts=True)
            for address in np.intersect1d(by[counts > 1], stored)[:1]:
                sites = {(stored, site) for each, _, stored, site in self._phase if address in each}
                self.found.add(f"threads: {_named(sites)}")
            self._stored.append(stored)
        self._touched += [each for each, *_ in self._phase]
        self._phase = []

    def _next_program(self, *rest) -> None:
        self._end_phase()
        if self._touched:
            stored = np.unique(np.concatenate(self._stored)) if self._stored else np.empty(0, np.int64)
            self._launch.append((np.unique(np.concatenate(self._touched)), stored))
            self.programs += 1
        self._touched, self._stored = [], []

    def _next_launch(self, *rest) -> None:
        self._next_program()
        if self._launch:
            touched, stored = (np.concatenate(part) for part in zip(*self._launch, strict=True))
            by, programs = np.unique(touched, return_counts=True)
            shared = np.intersect1d(by[programs > 1], stored)
            if shared.size:
                self.found.add(f"programs: {shared.size} addresses")
        self._launch = []


def _after(before, original):
    def call(builder, *args):
        before(*args)
        return original(builder, *args)

    return call


def _refuse(*args) -> None:
    raise NotImplementedError("the detector knows loads, stores and barriers only")


def _site() -> Site:
    """Where in a kernel this happens: the first frame that is neither Triton's nor here."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith((TRITON, __file__)):
        frame = frame.f_back
        assert frame is not None
    return frame.f_code.co_filename, frame.f_lineno


def _named(sites: set[tuple[bool, Site]]) -> str:
    return ", ".join(sorted(f"{file}:{line} {'stores' if stored else 'loads'}" for stored, (file, line) in sites))
