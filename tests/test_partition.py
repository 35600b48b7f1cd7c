"""Parts: planted ones are found, and what must not matter does not."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted_attention as planted
from sklearn.metrics import adjusted_rand_score

from maskevolve import EMPartitioner, GraphCutPartitioner, PartMask
from maskevolve.parts.split import exact_dtype

partitioners = pytest.mark.parametrize("partitioner", [GraphCutPartitioner(), EMPartitioner()], ids=["cut", "em"])


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


@pytest.mark.parametrize(("height", "width"), [(14, 14), (9, 17)])
@pytest.mark.parametrize(("num_parts", "strength"), [(2, 1.0), (5, 1.0), (8, 1.0), (8, 0.5)])
def test_planted_parts_are_recovered(height, width, num_parts, strength):
    labels, attention = planted(8, height, width, num_parts, strength=strength)
    present = [len(image.unique()) for image in labels]
    partitioner = GraphCutPartitioner(num_parts=num_parts)
    parts = partitioner(attention, grid_size=(height, width))
    assert agreement(parts, labels) > 0.9
    assert agreement(parts[:, torch.randperm(height * width)], labels) < 0.1, "the measure can tell"
    assert np.mean([len(image.unique()) for image in parts]) > 0.8 * np.mean(present)


def test_planted_parts_without_noise_are_recovered_exactly():
    labels, attention = planted(8, 14, 14, 6, strength=3, noise=0)
    for image, one in zip(labels, attention, strict=True):
        count = len(image.unique())
        assert adjusted_rand_score(GraphCutPartitioner(smoothness=0)(one[None], count)[0], image) == 1


def test_faint_noisy_parts_are_found_where_clustering_loses_them():
    labels, attention = planted(8, 14, 14, 8, strength=0.3, noise=1, heads=12)
    ours = agreement(GraphCutPartitioner()(attention), labels)
    assert ours > 0.8
    torch.manual_seed(0)
    assert ours > agreement(EMPartitioner()(attention), labels) + 0.2


def test_em_finds_clear_parts():
    labels, attention = planted(8, 14, 14, 5, strength=3)
    torch.manual_seed(0)
    assert agreement(EMPartitioner(8)(attention), labels) > 0.7


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 10),
    width=st.integers(1, 10),
    strength=st.floats(0, 2, allow_subnormal=False),
)
def test_every_cut_is_a_coarsening_of_the_next(seed, height, width, strength):
    _, attention = planted(3, height, width, 5, strength=strength, noise=1, heads=1, seed=seed)
    hierarchy = GraphCutPartitioner().hierarchy(attention, 12, (height, width))
    finer = hierarchy.cut(12)
    for num_parts in range(12, 0, -1):
        parts = hierarchy.cut(num_parts)
        check_labels(parts, num_parts)
        for image, below in zip(parts, finer, strict=True):
            assert all(image[below == label].unique().numel() == 1 for label in below.unique())
            assert below.max() - image.max() <= 1, "one split at a time"
        finer = parts
    assert (finer == 0).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-100, 100), strength=st.floats(0.2, 2))
def test_rescaling_the_affinity_changes_nothing(seed, exponent, strength):
    _, attention = planted(2, 8, 9, 5, strength=strength, seed=seed)
    parts = GraphCutPartitioner()(attention, grid_size=(8, 9))
    assert torch.equal(GraphCutPartitioner()(attention * 2.0**exponent, grid_size=(8, 9)), parts)
    assert torch.equal(GraphCutPartitioner()(attention.double() * 3.7e5, grid_size=(8, 9)), parts)


@pytest.mark.parametrize("seed", range(4))
def test_relabelling_the_patches_changes_nothing(seed):
    """Flips and the transposition renumber the patches but keep who is whose neighbour."""
    height, width = 8, 9
    _, attention = planted(4, height, width, 5, seed=seed)
    parts = GraphCutPartitioner()(attention, grid_size=(height, width))
    patches = torch.arange(height * width).view(height, width)
    for order in (patches.flip(0), patches.flip(1), patches.flip(0, 1), patches.T):
        renumbered = attention[:, :, order.flatten()][..., order.flatten()]
        result = GraphCutPartitioner()(renumbered, grid_size=tuple(order.shape))
        assert same_partition(result, parts[:, order.flatten()])


def test_heads_are_averaged_in_any_order():
    _, attention = planted(4, 8, 8, 5)
    attention = attention.double()  # so that the order of the sum does not show
    parts = GraphCutPartitioner()(attention)
    assert torch.equal(GraphCutPartitioner()(attention.mean(1)), parts)
    assert torch.equal(GraphCutPartitioner()(attention.flip(1)), parts)


def test_images_do_not_depend_on_their_batch():
    _, attention = planted(9, 12, 12, 6)
    partitioner = GraphCutPartitioner(20)
    together = partitioner(attention)
    assert torch.equal(together, torch.cat([partitioner(attention[i : i + 1]) for i in range(9)]))
    assert torch.equal(together.flip(0), partitioner(attention.flip(0)))


def test_solvers_give_the_same_parts():
    _, attention = planted(4, 12, 12, 6)
    by_solver = [GraphCutPartitioner(20, solver=solver)(attention) for solver in ("pymaxflow", "torch", "auto")]
    assert torch.equal(by_solver[0], by_solver[1])
    assert torch.equal(by_solver[0], by_solver[2])


def test_smoothness_shortens_outlines():
    _, attention = planted(8, 14, 14, 6, strength=0.3, noise=1)

    def outline(smoothness):
        parts = GraphCutPartitioner(6, smoothness=smoothness)(attention).view(-1, 14, 14)
        return int((parts[:, 1:] != parts[:, :-1]).sum() + (parts[..., 1:] != parts[..., :-1]).sum())

    assert outline(0.5) < outline(0.1) < outline(0)


def test_call_overrides_the_number_of_parts():
    _, attention = planted(4, 12, 12, 8)
    partitioner = GraphCutPartitioner(3)
    assert partitioner(attention).max() == 2
    assert torch.equal(partitioner(attention, 8), GraphCutPartitioner(8)(attention))


def test_autocast_does_not_change_parts():
    _, attention = planted(4, 8, 8, 5)
    parts = GraphCutPartitioner()(attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(GraphCutPartitioner()(attention), parts)


NEWER = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch is older")


@pytest.mark.parametrize(
    "set_precision",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        pytest.param(lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), marks=NEWER),
    ],
)
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
    torch.manual_seed(1)
    first = EMPartitioner()(attention)
    torch.manual_seed(1)
    assert torch.equal(first, EMPartitioner()(attention))
    assert not torch.equal(first, EMPartitioner()(attention))


# Bad input: DESIGN's table, row by row.


@pytest.mark.parametrize("num_parts", [1, 2, 10, 1000])
def test_cuts_that_a_hierarchy_was_not_made_for(num_parts):
    hierarchy = GraphCutPartitioner(40).hierarchy(torch.rand(2, 16, 16), num_parts)
    check_labels(hierarchy.cut(num_parts), num_parts)
    for more in (num_parts + 1, 10**6):
        with pytest.raises(ValueError, match=rf"num_parts={more} is more than the {num_parts} parts.*hierarchy\("):
            hierarchy.cut(more)
    for bad in (2.5, 0, -1, "2", None):
        with pytest.raises(ValueError, match=rf"num_parts='?{bad}'? must be a whole number"):
            hierarchy.cut(bad)
    with pytest.raises(ValueError, match="num_parts=41"):
        GraphCutPartitioner(40).hierarchy(torch.rand(2, 16, 16)).cut(41)


@partitioners
@pytest.mark.parametrize("shape", [(2, 16, 15), (16, 16), (2, 3, 16, 15), (1, 2, 3, 16, 16)])
def test_affinity_that_is_not_square(partitioner, shape):
    with pytest.raises(ValueError, match=rf"{list(shape)}".replace("[", r"\[").replace("]", r"\]")):
        partitioner(torch.rand(shape))


@partitioners
def test_grid_that_does_not_fit(partitioner):
    with pytest.raises(ValueError, match=r"N=15 .*grid_size"):
        partitioner(torch.rand(2, 15, 15))
    with pytest.raises(ValueError, match=r"\(3, 4\).*12.*N=15"):
        partitioner(torch.rand(2, 15, 15), grid_size=(3, 4))


@pytest.mark.parametrize("kind", [GraphCutPartitioner, EMPartitioner])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_count_as_zero_with_one_warning(kind, bad):
    _, attention = planted(2, 8, 8, 5)
    attention[0, 0, 3:7, 5] = bad
    zeroed = attention.nan_to_num(0, 0, 0)
    partitioner = kind()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="4 of 32768 affinities are NaN or inf"):
        parts = partitioner(attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partitioner(attention)
        torch.manual_seed(0)
        assert torch.equal(parts, kind()(zeroed))


@pytest.mark.filterwarnings("ignore:.*NaN or inf")
@partitioners
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-38, 3e38, torch.nan, torch.inf])
@pytest.mark.parametrize("num_patches", [1, 4, 144])
def test_constant_affinity_gives_a_valid_partition_and_mask(partitioner, value, num_patches):
    parts = partitioner(torch.full((3, num_patches, num_patches), value), 10)
    check_labels(parts, 10)
    mask = PartMask()(torch.zeros(3, num_patches, 1), 0 if num_patches == 1 else 0.75, parts=parts).mask
    assert (mask.sum(1) == (0 if num_patches == 1 else 0.75 * num_patches)).all()
    if isinstance(partitioner, GraphCutPartitioner):
        assert (parts == 0).all(), "there is one part in such data"


@partitioners
def test_more_parts_than_patches(partitioner):
    parts = partitioner(torch.eye(9)[None] + 0.01 * torch.rand(2, 9, 9), 1000)
    check_labels(parts, 9)


def test_as_many_parts_as_patches_where_all_differ():
    parts = GraphCutPartitioner(9, smoothness=0)(torch.eye(9)[None] + 0.01 * torch.rand(2, 9, 9))
    assert parts.max() > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type(dtype):
    labels, attention = planted(4, 12, 12, 5)
    assert agreement(GraphCutPartitioner(6)(attention.to(dtype)), labels) > 0.8


@pytest.mark.parametrize(
    "make",
    [
        lambda: GraphCutPartitioner(0),
        lambda: EMPartitioner(-1),
        lambda: GraphCutPartitioner()(torch.rand(1, 4, 4), 0),
        lambda: GraphCutPartitioner(smoothness=-1),
        lambda: GraphCutPartitioner(smoothness=float("nan")),
        lambda: GraphCutPartitioner(solver="magic"),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"num_parts=|smoothness=|'magic'"):
        make()


def test_the_grid_follows_from_images_that_are_not_square():
    images = torch.rand(2, 3, 32, 128, generator=torch.Generator().manual_seed(0))
    affinity = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(1))
    expected = GraphCutPartitioner(5)(affinity, grid_size=(8, 32), images=images)
    assert torch.equal(GraphCutPartitioner(5)(affinity, images=images), expected)
    assert not torch.equal(GraphCutPartitioner(5)(affinity, grid_size=16, images=images), expected)


def test_arrays_are_refused_by_name():
    with pytest.raises(TypeError, match=r"affinity is a ndarray.*torch\.as_tensor\(affinity\)"):
        GraphCutPartitioner(2)(torch.rand(1, 16, 16).numpy())
    with pytest.raises(TypeError, match="affinity is a list"):
        EMPartitioner(2)([[1.0]])
    with pytest.raises(TypeError, match=r"images is a ndarray.*torch\.as_tensor\(images\)"):
        GraphCutPartitioner(2)(torch.rand(1, 16, 16), images=torch.rand(1, 3, 8, 8).numpy())
