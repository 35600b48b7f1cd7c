"""A detector of data races: what kernels load and store in Triton's interpreter, where no two threads ever meet."""

import sys
from pathlib import Path

import numpy as np
import pytest
import triton
from triton.runtime.interpreter import InterpreterBuilder

TRITON = str(Path(triton.__file__).parent)


class Races:
    """Watches every launch inside a `with`; barriers in `without`, each a file and a line of it, are taken out.

    Between two barriers of a program, no address that one thread stores may be touched by another; in a launch, no
    address that one program stores may be touched by another. The same lane of blocks of the same shape is one thread:
    these have one layout. All threads load a scalar, and one stores it.
    """

    def __init__(self, without=frozenset()):
        self.without = without
        self.found = set()  # races, each once: where the addresses were touched
        self.barriers = set()  # those that were taken out included
        self.stores = self.programs = 0  # how much was watched
        self._phase = []  # addresses, threads, whether stored, and where
        self._launch = []  # of each program: what it touched, what it stored
        self._touched, self._stored, self._shapes = [], [], {}

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name, before in {
            "create_masked_load": lambda pointers, mask, *rest: self._access(pointers.data, mask.data, stored=False),
            "create_masked_store": lambda pointers, _, mask, *rest: self._access(pointers.data, mask.data, stored=True),
            "create_barrier": lambda *rest: self._barrier(),
            "set_grid_idx": lambda *rest: self._next_program(),
            "set_grid_dim": lambda *rest: self._next_launch(),
            **dict.fromkeys(("create_atomic_rmw", "create_atomic_cas", "create_descriptor_load"), _refuse),
        }.items():
            self._patch.setattr(InterpreterBuilder, name, _after(before, getattr(InterpreterBuilder, name)))
        return self

    def __exit__(self, *error):
        self._patch.undo()
        self._next_launch()

    def _access(self, addresses, mask, stored):
        addresses, mask = np.broadcast_arrays(np.asarray(addresses), np.asarray(mask))
        threads = (self._shapes.setdefault(addresses.shape, len(self._shapes)) << 40) + np.arange(addresses.size)
        if addresses.size == 1 and not stored:
            threads -= 1 << 50  # a scalar: all
        inside = mask.ravel().astype(bool)
        self.stores += int(inside.sum()) * stored
        self._phase.append((addresses.ravel()[inside].astype(np.int64), threads[inside], stored, _site()))

    def _barrier(self):
        self.barriers.add(site := _site())
        if site not in self.without:
            self._end_phase()

    def _end_phase(self):
        if any(stored for *_, stored, _ in self._phase):
            addresses, threads = (np.concatenate(part) for part in list(zip(*self._phase, strict=True))[:2])
            stored = np.unique(np.concatenate([each for each, _, stored, _ in self._phase if stored]))
            by, counts = np.unique(np.unique(np.stack([addresses, threads]), axis=1)[0], return_counts=True)
            for address in np.intersect1d(by[counts > 1], stored)[:1]:
                sites = {(*site, stored) for each, _, stored, site in self._phase if address in each}
                self.found.add(f"threads: {sorted(sites)}, a file, a line, and whether it stores")
            self._stored.append(stored)
        self._touched += [each for each, *_ in self._phase]
        self._phase = []

    def _next_program(self):
        self._end_phase()
        if self._touched:
            stored = np.unique(np.concatenate([np.empty(0, np.int64), *self._stored]))
            self._launch.append((np.unique(np.concatenate(self._touched)), stored))
            self.programs += 1
        self._touched, self._stored = [], []

    def _next_launch(self):
        self._next_program()
        if self._launch:
            touched, stored = (np.concatenate(part) for part in zip(*self._launch, strict=True))
            by, programs = np.unique(touched, return_counts=True)
            if (shared := np.intersect1d(by[programs > 1], stored)).size:
                self.found.add(f"programs: {shared.size} addresses")
        self._launch = []


def _after(before, original):
    def call(builder, *args):
        before(*args)
        return original(builder, *args)

    return call


def _refuse(*args):
    raise NotImplementedError("the detector knows loads, stores and barriers only")


def _site():
    """Where in a kernel this happens: the first frame that is neither Triton's nor here."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith((TRITON, __file__)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
