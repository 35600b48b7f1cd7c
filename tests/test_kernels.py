"""The mask in one kernel, in Triton's interpreter: to the bit what plain torch does."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import MASKS, Own, halfway, random_parts, seeded
from test_mincut import random_grid

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask
from maskevolve.masks import functional as F
from maskevolve.masks import shuffle
from maskevolve.masks.shuffle import plain
from maskevolve.parts import kernels as gate

kernels = pytest.importorskip("maskevolve.masks.shuffle.kernel")
mincut_kernels = pytest.importorskip("maskevolve.parts.mincut.kernel")
twomeans_kernels = pytest.importorskip("maskevolve.parts.split.kernel")


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(gate, "on_gpu", lambda on: True)


def both_ways(masking, x, mask_ratio, **options):
    """The same call in plain torch and with the kernels."""
    plain = masking(x, mask_ratio, generator=seeded(5), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "on_gpu", lambda on: True)
        return plain, masking(x, mask_ratio, generator=seeded(5), **options)


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
@settings(max_examples=5, deadline=None)  # interpreted, a sort is slow: test_sizes has the large ones
@given(
    batch_size=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([1, 3, 8, 1025]),
    mask_ratio=st.floats(0, 0.99, allow_subnormal=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_same_bits_as_plain_torch(make, batch_size, height, width, channels, mask_ratio, dtype, seed):
    if int(height * width * (1 - mask_ratio)) < 1:
        return
    x = torch.randn(batch_size, height, width, channels, generator=seeded(seed)).to(dtype)
    parts = random_parts(batch_size, height * width, seed=seed) * 1000003
    for ours, expected in zip(*both_ways(make(), x, mask_ratio, parts=parts), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "masking",
    [
        halfway(start=RandomMask(), end=PartMask()),
        halfway(start=PartMask(), end=RandomMask()),
        halfway(start=BlockMask(), end=GridMask(3)),
        halfway(start=halfway(), end=RandomMask()),
        EvolvingMask(10),
    ],
    ids=["random-part", "part-random", "block-grid", "nested", "start"],
)
def test_every_blend_has_the_same_bits(masking):
    x, parts = torch.randn(3, 49, 5), random_parts(3, 49)
    for ours, expected in zip(*both_ways(masking, x, 0.6, parts=parts), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("batch_size", "num_patches"), [(2, 1), (2, 16), (2, 17), (1, 784)])
def test_sizes(batch_size, num_patches):
    scores = torch.rand(batch_size, num_patches, generator=seeded()).round(decimals=1)
    key = shuffle.random_key(batch_size, None, seeded())
    keep = (num_patches + 3) // 4
    expected = shuffle.shuffle(scores, key, num_patches, keep)
    ours = kernels.shuffle(scores, key, num_patches, keep)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


NAN = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 2, -2, 0.0, -0.0])
WIDE = {
    "noise": torch.randn(2, 50, generator=seeded()) * 9,
    "coarse": (torch.randn(2, 50, generator=seeded()) * 3).round(),
    "one image wide": torch.stack([torch.linspace(-1.9, 1.9, 50).round(decimals=1), torch.linspace(-2, 9, 50)]),
    "no numbers": NAN[torch.randint(8, (2, 50), generator=seeded())],
}


@pytest.mark.parametrize("scores", WIDE.values(), ids=WIDE.keys())
def test_scores_of_any_range_have_the_same_bits(scores):
    key = shuffle.random_key(2, None, seeded())
    expected = plain.shuffle(scores, key, 50, 20)
    assert all(torch.equal(a, b) for a, b in zip(kernels.shuffle(scores, key, 50, 20), expected, strict=True))
    not_a_number = scores.isnan().sum(1, keepdim=True)
    ids_restore = expected[1]
    assert torch.equal(scores.isnan(), ids_restore >= 50 - not_a_number), "NaN is removed first"
    ordered = scores.gather(1, ids_restore.argsort(1)).nan_to_num(math.inf, math.inf, -math.inf)
    assert (ordered[:, 1:] >= ordered[:, :-1]).all()


@pytest.mark.parametrize("scores", [WIDE["noise"], WIDE["noise"].double(), WIDE["coarse"].long()])
def test_masks_of_ones_own_have_the_same_bits(scores):
    for masking in (Own(scores), halfway(end=Own(scores)), halfway(start=Own(scores), end=BlockMask())):
        for ours, expected in zip(*both_ways(masking, torch.randn(2, 5, 10, 3), 0.6), strict=True):
            assert torch.equal(ours, expected)


def test_larger_images_go_by_plain_torch(fused, monkeypatch):
    monkeypatch.setattr(kernels, "shuffle", None)
    assert GridMask()(torch.zeros(1, 65, 65, 1), 0.75).mask.sum() == 65 * 65 - int(65 * 65 * 0.25)


def test_gradients_are_those_of_a_plain_gather(fused):
    x = torch.randn(3, 49, 37, dtype=torch.float64, requires_grad=True)
    visible, _, ids_restore = halfway()(x, 0.5, parts=random_parts(3, 49), generator=seeded())
    ids_keep = ids_restore.argsort(1)[:, :24]
    expected = x.gather(1, ids_keep[..., None].expand(-1, -1, 37))
    assert torch.equal(visible, expected)
    weight = torch.randn_like(visible)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (visible, expected))
    assert torch.equal(ours, theirs)


def test_gradients_of_gradients(fused):
    ids_restore = torch.tensor([[2, 0, 3, 1], [0, 3, 1, 2]])
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: shuffle.take(x, ids_restore.argsort(1)[:, :2], ids_restore).square(), x)


def test_patches_with_any_strides(fused):
    x = torch.randn(5, 49, 3).permute(2, 1, 0)  # [3, 49, 5], no row in one piece
    visible, _, ids_restore = GridMask()(x, 0.5)
    assert torch.equal(visible, x.gather(1, ids_restore.argsort(1)[:, :24, None].expand(-1, -1, 5)))
    x = torch.randn(3, 50, 8)[:, 1:]  # as behind a class token
    visible, _, ids_restore = GridMask()(x, 0.5)
    assert torch.equal(visible, x.gather(1, ids_restore.argsort(1)[:, :24, None].expand(-1, -1, 8)))


def test_compiles_whole(fused):
    torch._dynamo.reset()
    masking, parts = halfway(), random_parts(2, 49)
    x = torch.randn(2, 49, 8, requires_grad=True)
    compiled = torch.compile(masking, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (2, 5):
            masking.set_epoch(epoch)
            visible, mask, ids_restore = compiled(x, 0.75, parts=parts)
            assert torch.equal(visible, x.gather(1, ids_restore.argsort(1)[:, :12, None].expand(-1, -1, 8)))
            assert (mask.sum(1) == 37).all()
    visible.sum().backward()
    assert torch.equal(x.grad, (1 - mask)[..., None].expand(-1, -1, 8))


def test_operators_are_sound():
    key, scores = shuffle.random_key(2, None, seeded()), torch.rand(2, 16)
    torch.library.opcheck(kernels._shuffle_op, (scores, None, None, None, None, key, 16, 4))
    ids = torch.stack([torch.randperm(16, generator=seeded(i)) for i in range(2)])
    torch.library.opcheck(kernels._take_op, (torch.randn(2, 16, 3), ids[:, :3], ids.argsort(1)))


def test_scores_are_those_that_scores_returns(fused):
    parts = random_parts(4, 36)
    p = halfway().scores(4, 6, parts=parts, generator=seeded())
    mask = halfway()(torch.zeros(4, 36, 1), 0.5, parts=parts, generator=seeded()).mask.bool()
    assert all(image[removed].min() >= image[~removed].max() for image, removed in zip(p, mask, strict=True))
    assert F.compute_scores(p) is p


# How every kernel is launched, whatever it does.

LAUNCHERS = {
    "_min_cut_kernel": (mincut_kernels, lambda: mincut_kernels.min_cut(*random_grid(3, 4, 9, 0, 0, batch_size=2))),
    "_terminals_kernel": (twomeans_kernels, lambda: twomeans_kernels.TritonParts(torch.zeros(2, 9, 9)).terminals()),
    "_split_kernel": (
        twomeans_kernels,
        lambda: twomeans_kernels.TritonParts(torch.zeros(2, 9, 9)).split(torch.zeros(2, 9, dtype=torch.bool)),
    ),
    "_shuffle_kernel": (
        kernels,
        lambda: kernels.shuffle(torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64), 9, 3),
    ),
    "_take_kernel": (
        kernels,
        lambda: kernels.take(torch.zeros(2, 9, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 9)),
    ),
}
every_kernel = pytest.mark.parametrize(("name", "launcher"), LAUNCHERS.items(), ids=LAUNCHERS.keys())


class Launched:
    """In the place of a kernel: notes how it is launched."""

    def __init__(self, monkeypatch, module, name):
        self.calls = []
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options))


@every_kernel
def test_kernels_are_launched_on_the_device_of_their_tensors(name, launcher, monkeypatch):
    module, launch = launcher
    guarded = []

    class Guard:
        def __init__(self, tensor):
            assert isinstance(tensor, torch.Tensor)

        def __enter__(self):
            guarded.append(self)

        def __exit__(self, *error):
            guarded.pop()

    class Guarded(Launched):
        def __getitem__(self, grid):
            assert guarded
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    launched = Guarded(monkeypatch, module, name)
    launch()
    assert len(launched.calls) == 1


@every_kernel
def test_no_float_operations_are_fused(name, launcher, monkeypatch):
    module, launch = launcher
    launched = Launched(monkeypatch, module, name)
    launch()
    assert launched.calls[0][2]["enable_fp_fusion"] is False


def test_a_batch_may_be_larger_than_a_grid_beyond_its_first_dimension(monkeypatch):
    parts = twomeans_kernels.TritonParts(torch.zeros(70_000, 1, 1))
    launched = [Launched(monkeypatch, twomeans_kernels, name) for name in ("_terminals_kernel", "_split_kernel")]
    parts.terminals()
    parts.split(torch.zeros(70_000, 1, dtype=torch.bool))
    assert [call[0] for each in launched for call in each.calls] == [(70_000, 1)] * 2


def test_kernels_compile_for_a_gpu():
    """Without one, and not interpreted; sides that 16 divides take no other kernel than those that it does not."""
    pytest.importorskip("triton.knobs", reason="benchmarks/compiled.py needs Triton 3.4, which torch 2.8 brings")
    code = """if True:
        import json
        from compiled import compile_for, cut, sort, take, torch, tree
        cases = [cut(14, 14, rounds=1), cut(16, 16), sort(49, "blend of scores"), take(8, torch.bfloat16), tree(49, 1)]
        print(json.dumps(compile_for(80, cases)))"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    rows = json.loads(out.stdout)
    assert {row["kernel"] for row in rows} == set(LAUNCHERS)
    assert all(row["fits"] and row["spill_stores"] == 0 for row in rows)
    needs = [{key: row[key] for key in ("registers", "shared")} for row in rows if row["kernel"] == "_min_cut_kernel"]
    assert needs[0] == needs[1]
