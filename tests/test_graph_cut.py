"""Parts by graph cut and by EM: planted ones are found, and what must not matter does not."""

import copy
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention as planted
from sklearn.metrics import adjusted_rand_score
from torchvision import tv_tensors
from vits import make_teacher, make_vit

from maskevolve import EMPartitioner, GraphCutPartitioner, PartMask
from maskevolve.parts.affinity import interpolate
from maskevolve.parts.split import exact_dtype
from maskevolve.teachers.attention_mode import _attention

KINDS = [GraphCutPartitioner, EMPartitioner]
kinds = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 10**6)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WAYS = {
    "mean of heads": lambda partitioner, attention: partitioner(attention.mean(1)),
    "order of heads": lambda partitioner, attention: partitioner(attention.flip(1)),
    "batch": lambda partitioner, attention: torch.cat([partitioner(image) for image in attention.split(1)]),
    "order": lambda partitioner, attention: partitioner(attention.flip(0)).flip(0),
    "autocast": lambda partitioner, attention: torch.autocast("cpu", torch.bfloat16)(partitioner)(attention),
    "pymaxflow": lambda _, attention: GraphCutPartitioner(20, solver="pymaxflow")(attention),
    "scipy": lambda _, attention: GraphCutPartitioner(20, solver="scipy")(attention),
    "torch": lambda _, attention: GraphCutPartitioner(20, solver="torch")(attention),
}
NEWER = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch is older")
PRECISIONS = [
    lambda: torch.set_float32_matmul_precision("medium"),
    pytest.param(lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), marks=NEWER),
]


def agreement(parts, labels):
    return np.mean([adjusted_rand_score(a, b) for a, b in zip(parts, labels, strict=True)])


def same_partition(a, b):
    return all(adjusted_rand_score(x, y) == 1 for x, y in zip(a, b, strict=True))


def check_labels(parts, num_parts):
    assert parts.dtype == torch.int64
    for labels in parts:
        present = labels.unique().tolist()
        assert present == list(range(len(present)))
        assert len(present) <= num_parts


def check_every_cut(hierarchy, most):
    """Each cut is a coarsening of the next: it has one split less."""
    finer = hierarchy.cut(most)
    for num_parts in range(most, 0, -1):
        parts = hierarchy.cut(num_parts)
        check_labels(parts, num_parts)
        for image, below in zip(parts, finer, strict=True):
            assert all(image[below == label].unique().numel() == 1 for label in below.unique())
            assert below.max() - image.max() <= 1, "one split at a time"
        finer = parts
    assert (finer == 0).all()


def seeded(partitioner, *args):
    torch.manual_seed(0)
    return partitioner(*args)


@pytest.mark.parametrize(("height", "width"), [(14, 14), (9, 17)])
@pytest.mark.parametrize(("num_parts", "strength"), [(2, 1.0), (5, 1.0), (8, 1.0), (8, 0.5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_parts_are_recovered(height, width, num_parts, strength, dtype):
    labels, attention = planted(8, height, width, num_parts, strength=strength)
    parts = GraphCutPartitioner(num_parts=num_parts)(attention.to(dtype), grid_size=(height, width))
    assert agreement(parts, labels) > 0.9
    assert agreement(parts[:, torch.randperm(height * width)], labels) < 0.1, "the measure can tell"
    found, present = (np.mean([len(image.unique()) for image in each]) for each in (parts, labels))
    assert found > 0.8 * present


def test_planted_parts_without_noise_are_recovered_exactly():
    for image, one in zip(*planted(8, 14, 14, 6, strength=3, noise=0), strict=True):
        parts = GraphCutPartitioner(smoothness=0)(one[None], len(image.unique()))
        assert same_partition(parts, image[None])


def test_faint_noisy_parts_are_found_where_clustering_loses_them():
    labels, attention = planted(8, 14, 14, 8, strength=0.3, noise=1, heads=12)
    ours = agreement(GraphCutPartitioner()(attention), labels)
    assert ours > 0.8
    assert ours > agreement(seeded(EMPartitioner(), attention), labels) + 0.2
    labels, attention = planted(8, 14, 14, 5, strength=3)
    assert agreement(seeded(EMPartitioner(8), attention), labels) > 0.7, "which finds clear parts"


@settings(max_examples=15, deadline=None)
@given(seed=seeds, height=st.integers(1, 10), width=st.integers(1, 10), strength=st.floats(0, 2, allow_subnormal=False))
def test_every_cut_is_a_coarsening_of_the_next(seed, height, width, strength):
    _, attention = planted(3, height, width, 5, strength=strength, noise=1, heads=1, seed=seed)
    check_every_cut(GraphCutPartitioner().hierarchy(attention, 12, (height, width)), 12)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, exponent=st.integers(-100, 100), strength=st.floats(0.2, 2))
def test_rescaling_the_affinity_changes_nothing(seed, exponent, strength):
    _, attention = planted(2, 8, 9, 5, strength=strength, seed=seed)
    parts = GraphCutPartitioner()(attention, grid_size=(8, 9))
    for scaled in (attention * 2.0**exponent, attention.double() * 3.7e5):
        assert torch.equal(GraphCutPartitioner()(scaled, grid_size=(8, 9)), parts)


@pytest.mark.parametrize("seed", range(4))
def test_relabelling_the_patches_changes_nothing(seed):
    """Flips and the transposition renumber the patches but keep who is whose neighbour."""
    _, attention = planted(4, 8, 9, 5, seed=seed)
    parts = GraphCutPartitioner()(attention, grid_size=(8, 9))
    patches = torch.arange(72).view(8, 9)
    for order in (patches.flip(0), patches.flip(1), patches.flip(0, 1), patches.T):
        renumbered = attention[:, :, order.flatten()][..., order.flatten()]
        result = GraphCutPartitioner()(renumbered, grid_size=tuple(order.shape))
        assert same_partition(result, parts[:, order.flatten()])


@pytest.mark.parametrize("cut", WAYS.values(), ids=WAYS.keys())
def test_what_does_not_change_parts(cut):
    _, attention = planted(5, 12, 12, 6)
    attention = attention.double()  # so that the order of the sum over heads does not show
    partitioner = GraphCutPartitioner(20)
    assert torch.equal(cut(partitioner, attention), partitioner(attention))


def test_smoothness_shortens_outlines_and_a_call_overrides_the_number_of_parts():
    _, attention = planted(8, 14, 14, 6, strength=0.3, noise=1)
    cuts = [GraphCutPartitioner(6, smoothness=s)(attention).view(-1, 14, 14) for s in (0.5, 0.1, 0)]
    outlines = [sum(int((parts.diff(dim=dim) != 0).sum()) for dim in (1, 2)) for parts in cuts]
    assert outlines[0] < outlines[1] < outlines[2]
    partitioner = GraphCutPartitioner(3)
    assert partitioner(attention).max() == 2
    assert torch.equal(partitioner(attention, 8), GraphCutPartitioner(8)(attention))


@pytest.mark.parametrize("set_precision", PRECISIONS)
def test_products_of_low_precision_do_not_change_parts(set_precision):
    """Where a program lets float32 be rounded in matrix products, ours are taken in float64."""
    _, attention = planted(4, 12, 12, 6)
    parts = GraphCutPartitioner(20)(attention)
    try:
        set_precision()
        assert exact_dtype() == torch.float64
        assert torch.equal(GraphCutPartitioner(20)(attention), parts)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact_dtype() == torch.float32


def test_em_draws_from_torchs_generator():
    _, attention = planted(2, 8, 8, 5, strength=0.2, noise=1)
    first = seeded(EMPartitioner(), attention)
    assert torch.equal(first, seeded(EMPartitioner(), attention))
    assert not torch.equal(first, EMPartitioner()(attention))


@pytest.mark.parametrize("num_parts", [1, 2, 10, 1000, None])
def test_cuts_that_a_hierarchy_was_not_made_for(num_parts):
    hierarchy = GraphCutPartitioner(40).hierarchy(torch.rand(2, 16, 16), num_parts)
    most = num_parts or 40
    check_labels(hierarchy.cut(most), most)
    for bad in (most + 1, 10**6, 2.5, 0, -1, "2", None):
        with pytest.raises(ValueError, match=f"num_parts='?{bad}"):
            hierarchy.cut(bad)


def call(kind, *shape, **options):
    return lambda: kind(2)(torch.rand(shape), **options)


NOT_SQUARE = [(2, 16, 15), (16, 16), (2, 3, 16, 15), (1, 2, 3, 16, 16), (2, 0, 0), (2, 0, 4, 4)]
BAD = [
    *((call(kind, *shape), ValueError, re.escape(str(list(shape)))) for kind in KINDS for shape in NOT_SQUARE),
    *((call(kind, 2, 15, 15), ValueError, "N=15") for kind in KINDS),
    *((call(kind, 2, 15, 15, grid_size=(3, 4)), ValueError, r"\(3, 4\).*12.*N=15") for kind in KINDS),
    *((lambda kind=kind: kind(0), ValueError, "num_parts=0") for kind in KINDS),
    (call(GraphCutPartitioner, 1, 4, 4, num_parts=0), ValueError, "num_parts=0"),
    (lambda: GraphCutPartitioner(smoothness=-1), ValueError, "smoothness=-1"),
    (lambda: GraphCutPartitioner(smoothness=float("nan")), ValueError, "smoothness=nan"),
    (lambda: GraphCutPartitioner(solver="magic"), ValueError, "'magic'"),
    (lambda: GraphCutPartitioner(2)(torch.rand(1, 16, 16).numpy()), TypeError, "affinity is a ndarray"),
    (lambda: EMPartitioner(2)([[1.0]]), TypeError, "affinity is a list"),
    (call(GraphCutPartitioner, 1, 16, 16, images=[[0.0]]), TypeError, "images is a list"),
]


@pytest.mark.parametrize(("bad", "error", "named"), BAD)
def test_bad_calls_are_refused_by_name(bad, error, named):
    with pytest.raises(error, match=named):
        bad()


@pytest.mark.filterwarnings("error")
@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda partitioner: pickle.loads(pickle.dumps(partitioner))])
def test_nan_and_inf_count_as_zero_with_one_warning_of_all_copies(kind, bad, again):
    _, attention = planted(2, 8, 8, 5)
    attention[0, 0, 3:7, 5] = bad
    partitioner = kind(7)
    with pytest.warns(UserWarning, match="4 of 32768 affinities"):
        parts = seeded(partitioner, attention)
    for other in (partitioner, again(partitioner)):
        assert torch.equal(seeded(other, attention), parts)
    assert torch.equal(seeded(kind(7), attention.nan_to_num(0, 0, 0)), parts)


@pytest.mark.filterwarnings("ignore:.*NaN or inf")
@kinds
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-38, 3e38, torch.nan, torch.inf])
@pytest.mark.parametrize("num_patches", [1, 4, 144])
def test_constant_affinity_gives_a_valid_partition_and_mask(kind, value, num_patches):
    parts = kind()(torch.full((3, num_patches, num_patches), value), 10)
    check_labels(parts, 10)
    ratio = 0 if num_patches == 1 else 0.75
    assert (PartMask()(torch.zeros(3, num_patches, 1), ratio, parts=parts).mask.sum(1) == ratio * num_patches).all()
    if kind is GraphCutPartitioner:
        assert (parts == 0).all(), "there is one part in such data"


@kinds
def test_more_parts_than_patches(kind):
    affinity = torch.eye(9)[None] + 0.01 * torch.rand(2, 9, 9)
    check_labels(kind()(affinity, 1000), 9)
    assert GraphCutPartitioner(9, smoothness=0)(affinity).max() > 4, "as many as there are, where all differ"


@kinds
@pytest.mark.parametrize("shape", [(0, 16, 16), (0, 3, 16, 16)])
def test_an_empty_batch_has_no_parts(kind, shape):
    parts = kind()(torch.rand(shape), 5)
    assert (parts.shape, parts.dtype) == ((0, 16), torch.int64)
    hierarchy = GraphCutPartitioner().hierarchy(torch.rand(shape), 5, images=torch.rand(0, 3, 8, 8))
    assert [hierarchy.cut(num_parts).shape for num_parts in (1, 5)] == [(0, 16)] * 2


@pytest.mark.parametrize("kind", [tv_tensors.Image, tv_tensors.Mask, torch.nn.Parameter])
def test_subclasses_of_tensors_need_not_know_each_other(kind):
    """Images of torchvision with an affinity of another subclass."""
    _, attention = planted(2, 8, 8, 5, heads=1)
    images = torch.rand(2, 3, 16, 16)
    ours = GraphCutPartitioner()(kind(attention), images=tv_tensors.Image(images))
    assert torch.equal(ours, GraphCutPartitioner()(attention, images=images))
    by_em = seeded(EMPartitioner(), kind(attention))
    assert torch.equal(by_em, seeded(EMPartitioner(), attention))
    assert type(ours) is type(by_em) is torch.Tensor


@pytest.mark.parametrize("with_nan", [False, True])
def test_threads_may_share_a_partitioner(with_nan):
    """Each gets its own parts, and one warning is given among all."""
    _, attention = planted(24, 8, 8, 5, strength=0.5, noise=1)
    attention[:, 0, 0, 0] = torch.nan if with_nan else 0
    expected, partitioner = GraphCutPartitioner()(attention.nan_to_num(0)), GraphCutPartitioner()
    with warnings.catch_warnings(record=True) as warned, ThreadPoolExecutor(8) as threads:
        warnings.simplefilter("always")
        parts = list(threads.map(partitioner, attention.split(1)))
    assert torch.equal(torch.cat(parts), expected)
    assert len(warned) == with_nan


def test_the_grid_follows_from_images_that_are_not_square():
    draws = torch.Generator().manual_seed(0)
    images, affinity = torch.rand(2, 3, 32, 128, generator=draws), torch.rand(2, 256, 256, generator=draws)
    expected = GraphCutPartitioner(5)(affinity, grid_size=(8, 32), images=images)
    assert torch.equal(GraphCutPartitioner(5)(affinity, images=images), expected)
    assert not torch.equal(GraphCutPartitioner(5)(affinity, grid_size=16, images=images), expected)


class TestStride:
    """The affinity of every second or third patch, brought to all of them."""

    @pytest.mark.parametrize(("grid", "stride"), [((7, 13), 2), ((12, 9), 3), ((1, 16), 2), ((16, 16), 5), ((4, 4), 3)])
    def test_between_patches_it_is_linear(self, grid, stride):
        kept = [np.arange((side - 1) % stride // 2, side, stride) for side in grid]
        affinity = torch.randint(1000, (2, *[len(kept[0]) * len(kept[1])] * 2)).double()
        wanted = affinity.view(2, len(kept[0]), len(kept[1]), len(kept[0]), len(kept[1])).numpy()
        for axis in range(4):
            places, side = kept[axis % 2], grid[axis % 2]
            wanted = np.apply_along_axis(lambda row: np.interp(np.arange(side), places, row), axis + 1, wanted)  # noqa: B023
        found = interpolate(affinity, grid, stride) / stride**4
        assert np.allclose(found, wanted.reshape(found.shape))

    @pytest.mark.parametrize(("grid", "stride"), [((7, 13), 2), ((1, 16), 2), ((15, 16), 3), ((16, 16), 4)])
    def test_halves_are_found_by_every_solver_and_batch(self, grid, stride):
        kept = [torch.arange((side - 1) % stride // 2, side, stride) for side in grid]
        right = (kept[1] >= grid[1] // 2).repeat(len(kept[0]))
        affinity = 0.1 + (right[:, None] == right).float().expand(2, -1, -1)
        images = torch.zeros(2, 3, grid[0] * 4, grid[1] * 4)
        images[..., grid[1] // 2 * 4 :] = 1
        images += 0.1 * torch.randn(images.shape)
        parts = GraphCutPartitioner(2)(affinity, None, grid, images, stride)
        assert same_partition(parts, (torch.arange(grid[1]) >= grid[1] // 2).repeat(grid[0]).expand(2, -1))
        finer = GraphCutPartitioner(12, solver="pymaxflow").hierarchy(affinity, None, grid, images, stride)
        check_every_cut(finer, 12)
        for solver in ("scipy", "torch"):
            one = GraphCutPartitioner(12, solver=solver)(affinity[:1], None, grid, images[:1], stride)
            assert torch.equal(one, finer.cut(12)[:1])

    @pytest.mark.parametrize(
        ("grid", "stride", "images", "words"),
        [
            ((4, 4), 2, False, "stride=2 needs images"),
            (None, 2, True, "stride=2 needs grid_size"),
            ((4, 6), 2, True, "leaves 2 x 3"),
            ((4, 4), 0, True, "stride=0"),
            ((4, 4), 1.5, True, r"stride=1\.5"),
        ],
    )
    def test_what_does_not_fit(self, grid, stride, images, words):
        with pytest.raises(ValueError, match=words):
            GraphCutPartitioner()(torch.rand(1, 4, 4), 2, grid, torch.rand(1, 3, 16, 16) if images else None, stride)


@pytest.mark.parametrize("kind", [GraphCutPartitioner, EMPartitioner])
def test_an_affinity_larger_than_memory_is_refused_before_it_is_copied(kind):
    affinity = torch.rand(1, 1, 1).expand(2, 10**6, 10**6)
    with pytest.raises(ValueError, match=r"(1000000\]|1000 x 1000) .*needs at least .* GiB, but there are .* on cpu"):
        kind()(affinity)


def test_a_grid_whose_products_are_larger_than_memory_is_refused_before_anything_is_made():
    affinity, images = torch.rand(1, 1, 1).expand(2, 200**2, 200**2), torch.rand(2, 1, 400, 400)
    with pytest.raises(ValueError, match=r"2 images of 400 x 400 patches needs at least 476.8 GiB, .*fewer images"):
        GraphCutPartitioner()(affinity, 10, 400, images, 2)
    with pytest.raises(ValueError, match="stride=2 needs images"):
        GraphCutPartitioner()(affinity, 10, 400, stride=2)


def test_attention_larger_than_memory_is_refused_before_it_is_taken():
    tokens = torch.rand(1, 1, 1, 1).expand(1, 1, 10**6, 1)
    with pytest.raises(ValueError, match=r"\[1, 1, 1000000, 1000000\] needs at least 7450.6 GiB"):
        _attention(tokens, tokens, tokens)


def test_a_teacher_whose_attention_is_larger_than_memory_says_so(monkeypatch):
    monkeypatch.setattr("maskevolve.checks.memory_of", lambda device: 0)
    monkeypatch.setattr("maskevolve.checks.LITTLE", 0)
    with pytest.raises(ValueError, match=r"^reading attention .* needs at least 0.0 GiB, but there are 0.0 GiB on cpu"):
        make_teacher(make_vit())
