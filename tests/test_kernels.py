"""The mask in one kernel, in Triton's interpreter: to the bit what plain torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import MASKS, Own, halfway, random_parts, seeded

from maskevolve import BlockMask, EvolvingMask, GridMask, PartMask, RandomMask, shuffle
from maskevolve import functional as F
from maskevolve.shuffle import torch as plain

kernels = pytest.importorskip("maskevolve.shuffle.triton")


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(shuffle, "_fused", lambda tensor: True)


def both_ways(masking, x, mask_ratio, **options):
    """The same call in plain torch and with the kernels."""
    plain = masking(x, mask_ratio, generator=seeded(5), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_fused", lambda tensor: True)
        return plain, masking(x, mask_ratio, generator=seeded(5), **options)


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
@settings(max_examples=5, deadline=None)
@given(
    batch_size=st.integers(1, 3),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
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


@pytest.mark.parametrize("num_patches", [1, 16, 784])
def test_sizes(num_patches):
    scores = torch.rand(2, num_patches, generator=seeded()).round(decimals=1)
    key = shuffle.random_key(2, None, seeded())
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
    torch.library.opcheck(kernels._take_op, (torch.randn(2, 16, 3), torch.tensor([[0, 15, 16], [3, 2, 1]])))


def test_scores_are_those_that_scores_returns(fused):
    parts = random_parts(4, 36)
    p = halfway().scores(4, 6, parts=parts, generator=seeded())
    mask = halfway()(torch.zeros(4, 36, 1), 0.5, parts=parts, generator=seeded()).mask.bool()
    assert all(image[removed].min() >= image[~removed].max() for image, removed in zip(p, mask, strict=True))
    assert F.compute_scores(p) is p
