"""Kernels compile, are launched where their tensors are, and are tried before they are trusted.

There is no GPU here: a CPU stands in, where kernels are interpreted.
"""

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from test_mincut import random_grid
from test_split import random_features, root

from maskevolve.parts import kernel_trial
from maskevolve.parts.edges import contrast_edges
from maskevolve.parts.mincut import grid_min_cut
from maskevolve.parts.split import whole_images
from maskevolve.parts.split.plain import HostParts

mincut = pytest.importorskip("maskevolve.parts.mincut.kernel")
split = pytest.importorskip("maskevolve.parts.split.kernel")
edges = pytest.importorskip("maskevolve.parts.edges.kernel")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def cut():
    return (grid_min_cut(*random_grid(3, 4, 9, 0.5, seed=2, batch_size=2)),)


def tree():
    parts = root(whole_images, random_features(12, 3, seed=0))
    capacities = parts.capacities()
    return (*capacities, parts.split(capacities[0] > 0), parts.labels)


def contrast():
    return contrast_edges(torch.arange(24).view(1, 1, 4, 6) % 7, (2, 3), 1)


KERNELS = {  # its module, what calls it, its name in a warning, and the place of something that it stores
    "_min_cut_kernel": (mincut, cut, "min cuts", 3),
    "_capacities_kernel": (split, tree, "two means", 5),
    "_split_kernel": (split, tree, "two means", 6),
    "_contrast_kernel": (edges, contrast, "edges from contrast", 1),
}
every_kernel = pytest.mark.parametrize(("name", "case"), KERNELS.items(), ids=KERNELS.keys())
NO_COMPILER = RuntimeError("Failed to find C compiler")


def note_launches(monkeypatch, module, name, error=None, wrong=None, silent=False):
    """A list of all launches of a kernel, which may raise, store something else in one argument, or do nothing."""
    kernel, calls = getattr(module, name), []

    def launch(grid, *args, **options):
        calls.append((grid, options))
        if error:
            raise error
        if not silent:
            kernel[grid](*args, **options)
        if wrong and len(calls) == 1:
            args[wrong].view(-1)[0] = 1 - args[wrong].view(-1)[0].int()

    monkeypatch.setattr(module, name, MagicMock(**{"__getitem__.side_effect": lambda grid: partial(launch, grid)}))
    return calls


@every_kernel
def test_kernels_are_launched_on_the_device_of_their_tensors_and_fuse_no_floats(name, case, monkeypatch):
    inside = []

    @contextmanager
    def guard(tensor):
        assert isinstance(tensor, torch.Tensor)
        inside.append(len(calls))
        yield
        inside.append(len(calls))

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    calls = {each: note_launches(monkeypatch, KERNELS[each][0], each, silent=True) for each in KERNELS}[name]
    mincut.min_cut(*random_grid(1, 1, 9, 0, 0, batch_size=70_000))
    parts = root(split.TritonParts, torch.zeros(70_000, 1, 1))
    parts.capacities()
    parts.split(torch.zeros(70_000, 1, dtype=torch.bool))
    edges.contrast_edges(torch.zeros(70_000, 1, 1, 1), (1, 1), 1)
    assert any(before < after for before, after in zip(inside[::2], inside[1::2], strict=True))
    assert all(grid[0] == 70_000 for grid, _ in calls), "dimensions of a grid after the first end at 65,535"
    assert not any(options["enable_fp_fusion"] for _, options in calls)
    assert len(calls) == (2 if name == "_min_cut_kernel" else 1), "cuts in 32 bits, and in 64"


def test_kernels_compile_for_a_gpu():
    """Without one, and not interpreted; sides that 16 divides take no other kernel than those that it does not."""
    pytest.importorskip("triton.knobs", reason="benchmarks/compiled.py needs Triton 3.4, which torch 2.8 brings")
    code = """if True:
        import json
        from compiled import compile_for, contrast, cut, tree
        cases = [cut(14, 14, rounds=1), cut(16, 16), tree(7, 1), contrast(7)]
        print(json.dumps(compile_for(80, cases)))"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rows = json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment))
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert all(row["fits"] and row["spill_stores"] <= 64 for row in rows), rows
    needs = [{key: row[key] for key in ("registers", "shared")} for row in rows if row["kernel"] == "_min_cut_kernel"]
    assert needs[:2] == needs[2:], "in 32 bits, and in 64"


@pytest.fixture
def gpu(monkeypatch):
    """Kernels that no one has tried, on a device that takes them; how a wait would be answered, as a list of one."""
    mode = ["error"]
    monkeypatch.setattr(kernel_trial, "takes_kernels", lambda device: True)
    monkeypatch.setattr(kernel_trial, "_worked", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    return mode


@pytest.mark.filterwarnings("error")
@interpreted
@every_kernel
@pytest.mark.parametrize(("error", "reason"), [(NO_COMPILER, "C compiler"), (None, "same bits")])
def test_a_kernel_that_fails_gives_way_to_plain_torch_with_one_warning(name, case, error, reason, request, monkeypatch):
    module, call, what, wrong = case
    expected = call()
    mode = request.getfixturevalue("gpu")
    calls = note_launches(monkeypatch, module, name, error, wrong)
    with pytest.warns(UserWarning, match=rf"(?s){what} on cpu.*{reason}.*MASKEVOLVE_KERNELS=0"):
        ours = call()
    assert all(map(torch.equal, ours, expected))
    assert mode == ["error"], "as it was before"
    assert (tried := len(calls)) > 0
    assert all(map(torch.equal, call(), expected))
    assert len(calls) == tried


@pytest.mark.filterwarnings("error")
@interpreted
@every_kernel
def test_a_kernel_that_works_is_tried_once_but_in_no_capture_of_a_graph_and_used(name, case, request, monkeypatch):
    module, call, *_ = case
    expected = call()
    request.getfixturevalue("gpu")
    calls, state, launched = note_launches(monkeypatch, module, name), torch.get_rng_state(), []
    for capturing in (True, False, False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        calls.clear()
        assert all(map(torch.equal, call(), expected))
        launched.append(len(calls))
    assert launched[1] > launched[2] == launched[3] > launched[0] == 0, "once tried, a graph holds the kernel"
    assert torch.equal(torch.get_rng_state(), state), "a trial takes no random numbers"


def works(trial):
    return kernel_trial.kernel_works("cuts", torch.device("cpu"), trial)


@pytest.mark.parametrize("error", [None, MemoryError, torch.cuda.OutOfMemoryError, KeyboardInterrupt])
def test_a_trial_may_wait_and_is_made_once_among_threads_and_again_where_memory_was_short(error, gpu):
    tried = []

    def trial(device, by_kernel):
        tried.append((gpu[0], by_kernel))
        return []

    if error:
        with pytest.raises(error):
            works(MagicMock(side_effect=error))
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(works, [trial] * 32))
    assert (tried, gpu) == ([("default", True), ("default", False)], ["error"])


def test_a_solver_that_was_asked_for_is_not_replaced(gpu, monkeypatch):
    note_launches(monkeypatch, mincut, "_min_cut_kernel", NO_COMPILER)
    grid = random_grid(3, 3, 9, 0, seed=0)
    for off, error, named in ((False, RuntimeError, "C compiler"), (True, ValueError, "MASKEVOLVE_KERNELS=0")):
        monkeypatch.setattr(kernel_trial, "OFF", off)
        with pytest.raises(error, match=named):
            grid_min_cut(*grid, solver="triton")


def test_kernels_can_be_turned_off_and_a_cpu_takes_plain_torch(monkeypatch):
    for value, takes in (("0", False), ("", True)):
        monkeypatch.setenv("MASKEVOLVE_KERNELS", value)
        assert runpy.run_path(kernel_trial.__file__)["takes_kernels"](torch.device("cuda")) == takes
    assert not works(lambda device, by_kernel: [])
    assert isinstance(root(whole_images, random_features(4, 2, 0)), HostParts)
