"""Kernels are tried before they are trusted. There is no GPU here: a CPU stands in, where kernels are interpreted."""

import subprocess
import sys
import warnings

import pytest
import torch
from test_masks import halfway, random_parts, seeded
from test_mincut import random_grid
from test_twomeans import gram_of, random_features

from maskevolve import GridMask
from maskevolve.masks.shuffle import kernel as shuffle
from maskevolve.parts import kernels as fused
from maskevolve.parts.mincut import grid_min_cut
from maskevolve.parts.mincut import kernel as mincut
from maskevolve.parts.split import kernel as twomeans
from maskevolve.parts.split import whole_images
from maskevolve.parts.split.plain import TorchParts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def mask():
    return tuple(halfway()(torch.ones(2, 16, 3), 0.5, parts=random_parts(2, 16), generator=seeded()))


def cut():
    return (grid_min_cut(*random_grid(3, 4, 9, 0.5, seed=2, batch_size=2)),)


def tree():
    parts = whole_images(gram_of(random_features(12, 3, seed=0)))
    terminals = parts.terminals()
    return (*terminals, parts.split(terminals[0] > 0), parts.labels)


KERNELS = {  # its module, what calls it, its name in a warning, and the place of something that it stores
    "_shuffle_kernel": (shuffle, mask, "masks", 8),
    "_take_kernel": (shuffle, mask, "visible patches", 2),
    "_min_cut_kernel": (mincut, cut, "min cuts", 3),
    "_terminals_kernel": (twomeans, tree, "two means", 5),
    "_split_kernel": (twomeans, tree, "two means", 6),
}
every_kernel = pytest.mark.parametrize(("name", "case"), KERNELS.items(), ids=KERNELS.keys())


@pytest.fixture
def gpu(monkeypatch):
    """Kernels that no one has tried, on a device that takes them."""
    monkeypatch.setattr(fused, "on_gpu", lambda on: True)
    monkeypatch.setattr(fused, "_worked", {})


class Launches:
    """A kernel whose launches are counted. It may raise, or store something else in one of its arguments."""

    def __init__(self, kernel, error=None, wrong=None):
        self.kernel, self.error, self.wrong, self.count = kernel, error, wrong, 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.count += 1
            if self.error:
                raise self.error
            self.kernel[grid](*args, **options)
            if self.wrong:
                args[self.wrong].view(-1)[0] = 1 - args[self.wrong].view(-1)[0].int()

        return launch


NO_COMPILER = RuntimeError("Failed to find C compiler")


@every_kernel
@pytest.mark.parametrize(("error", "reason"), [(NO_COMPILER, "RuntimeError.*C compiler"), (None, "same bits")])
def test_a_kernel_that_fails_gives_way_to_plain_torch_with_one_warning(name, case, error, reason, request, monkeypatch):
    module, call, what, wrong = case
    expected = call()
    request.getfixturevalue("gpu")
    launches = Launches(getattr(module, name), error, wrong)
    monkeypatch.setattr(module, name, launches)
    with pytest.warns(UserWarning, match=rf"(?s)kernel for {what} on cpu is not used.*{reason}.*MASKEVOLVE_KERNELS=0"):
        ours = call()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    tried = launches.count
    assert tried > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = call()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert launches.count == tried


@every_kernel
def test_a_kernel_that_works_is_tried_once_and_used(name, case, gpu, monkeypatch):
    module, call, what, _ = case
    launches = Launches(getattr(module, name))
    monkeypatch.setattr(module, name, launches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        first = launches.count
        call()
    assert first > launches.count - first > 0
    assert fused._worked[f"{what} on cpu"]


def test_nothing_is_tried_in_the_capture_of_a_graph(request, monkeypatch):
    expected = cut()
    request.getfixturevalue("gpu")
    monkeypatch.setattr(fused, "_capturing", lambda on: True)
    launches = Launches(mincut._min_cut_kernel)
    monkeypatch.setattr(mincut, "_min_cut_kernel", launches)
    assert torch.equal(cut()[0], expected[0])
    assert launches.count == 0
    monkeypatch.setattr(fused, "_capturing", lambda on: False)
    cut()
    monkeypatch.setattr(fused, "_capturing", lambda on: True)
    before = launches.count
    cut()
    assert launches.count == before + 1, "once tried, a graph holds the kernel"


@pytest.mark.parametrize("error", [None, NO_COMPILER])
def test_a_compiled_mask_tries_when_it_runs(error, gpu, monkeypatch):
    torch._dynamo.reset()
    launches = [Launches(getattr(shuffle, name), error) for name in ("_shuffle_kernel", "_take_kernel")]
    monkeypatch.setattr(shuffle, "_shuffle_kernel", launches[0])
    monkeypatch.setattr(shuffle, "_take_kernel", launches[1])
    x = torch.randn(2, 16, 3, requires_grad=True)
    compiled = torch.compile(GridMask(), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if error else "error", UserWarning)
        visible, removed, ids_restore = compiled(x, 0.5)
        visible.sum().backward()
    assert torch.equal(visible, x.gather(1, ids_restore.argsort(1)[:, :8, None].expand(-1, -1, 3)))
    assert torch.equal(x.grad, (1 - removed)[..., None].expand_as(x))
    assert all(fused._worked[f"{what} on cpu"] is (error is None) for what in ("masks", "visible patches"))


def test_a_trial_takes_no_random_numbers_and_no_gradients(gpu):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    cut(), tree()
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(2, 16, 3, requires_grad=True)
    GridMask()(x, 0.5).visible.sum().backward()
    assert x.grad.sum() == 2 * 8 * 3


def test_a_solver_that_was_asked_for_is_not_replaced(gpu, monkeypatch):
    monkeypatch.setattr(mincut, "_min_cut_kernel", Launches(None, NO_COMPILER))
    with pytest.raises(RuntimeError, match="C compiler"):
        grid_min_cut(*random_grid(3, 3, 9, 0, seed=0), solver="triton")
    monkeypatch.setattr(fused, "OFF", True)
    with pytest.raises(ValueError, match=r"solver=\"triton\".*MASKEVOLVE_KERNELS=0.*auto"):
        grid_min_cut(*random_grid(3, 3, 9, 0, seed=0), solver="triton")


def test_kernels_can_be_turned_off(monkeypatch):
    code = (
        "import torch; from maskevolve.parts import kernels; print(kernels.OFF, kernels.on_gpu(torch.device('cuda')))"
    )
    monkeypatch.setenv("MASKEVOLVE_KERNELS", "0")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False"]
    assert not fused.OFF
    assert fused.on_gpu(torch.device("cuda"))


def test_a_cpu_takes_plain_torch():
    assert not fused.works("min cuts", torch.device("cpu"), lambda on: True)
    assert isinstance(whole_images(gram_of(random_features(4, 2, 0))), TorchParts)
