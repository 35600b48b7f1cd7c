"""What users of a mask rely on, tested from the outside."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vits import MAE

from maskevolve import (
    BlockMask,
    EMPartitioner,
    EvolvingMask,
    GraphCutPartitioner,
    GridMask,
    MaskedPatches,
    PartMask,
    PartTeacher,
    RandomMask,
)
from maskevolve.masks import Masking
from maskevolve.masks import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_parts(batch_size: int, num_patches: int, num_parts: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(min(num_parts, num_patches), (batch_size, num_patches), generator=seeded(seed))


def halfway(**options) -> EvolvingMask:
    masking = EvolvingMask(10, **options)
    masking.set_epoch(4)
    return masking


MASKS = {
    "random": RandomMask,
    "grid": GridMask,
    "grid3": lambda: GridMask(period=3),
    "block": BlockMask,
    "part": PartMask,
    "evolving": halfway,
    "evolving-block": lambda: halfway(end=BlockMask()),
}
every_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())


@every_mask
@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 4),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    channels=st.integers(1, 5),
    mask_ratio=st.floats(0, 0.99, allow_subnormal=False),
    dtype=st.sampled_from(DTYPES),
    flat=st.booleans(),
)
def test_exact_counts_and_mae_conventions(make, batch_size, height, width, channels, mask_ratio, dtype, flat):
    num_patches = height * width
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        return
    masking, parts = make(), random_parts(batch_size, num_patches)
    x = torch.randn(batch_size, height, width, channels).to(dtype)
    if flat:
        masking.grid_size = (height, width)
    visible, mask, ids_restore = masking(x.flatten(1, 2) if flat else x, mask_ratio, parts=parts)

    assert (visible.shape, visible.dtype) == ((batch_size, keep, channels), dtype)
    assert (mask.shape, mask.dtype) == ((batch_size, num_patches), torch.float32)
    assert (ids_restore.shape, ids_restore.dtype) == ((batch_size, num_patches), torch.int64)
    for image, seen, removed, restore in zip(x.flatten(1, 2), visible, mask, ids_restore, strict=True):
        assert removed.sum() == num_patches - keep
        assert sorted(restore.tolist()) == list(range(num_patches))
        for patch in range(num_patches):  # as MAE's decoder reads it
            assert (removed[patch] == 0) == (restore[patch] < keep)
            if restore[patch] < keep:
                assert torch.equal(seen[restore[patch]], image[patch])


@every_mask
def test_the_highest_scores_are_removed(make):
    masking, parts = make(), random_parts(8, 144)
    p = masking.scores(8, 12, parts=parts, generator=seeded())
    mask = masking(torch.zeros(8, 144, 1), 0.6, parts=parts, generator=seeded()).mask
    assert p.dtype == torch.float32
    assert p.min() >= 0
    assert p.max() <= 1
    for scores, removed in zip(p, mask.bool(), strict=True):
        assert scores[removed].min() >= scores[~removed].max()


@every_mask
def test_images_differ_and_seeds_repeat(make):
    masking, x, parts = make(), torch.zeros(8, 196, 1), random_parts(1, 196).expand(8, -1)
    first = masking(x, 0.75, parts=parts, generator=seeded(1)).mask
    again = masking(x, 0.75, parts=parts, generator=seeded(1)).mask
    other = masking(x, 0.75, parts=parts, generator=seeded(2)).mask
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(mask.tolist()) for mask in first}) > 1
    torch.manual_seed(3)
    first = masking(x, 0.75, parts=parts).mask
    torch.manual_seed(3)
    assert torch.equal(first, masking(x, 0.75, parts=parts).mask)


@every_mask
def test_gradients_are_those_of_a_plain_gather(make):
    masking, parts = make(), random_parts(3, 49)
    x = torch.randn(3, 49, 4, requires_grad=True)
    visible, _, ids_restore = masking(x, 0.5, parts=parts, generator=seeded())
    weight = torch.randn_like(visible)
    (visible * weight).sum().backward()
    for image in range(3):
        for patch in range(49):
            place = int(ids_restore[image, patch])
            expected = weight[image, place] if place < 24 else torch.zeros(4)
            assert torch.equal(x.grad[image, patch], expected)


@pytest.mark.parametrize(("height", "width"), [(14, 14), (6, 10), (15, 15), (14, 15), (7, 12)])
def test_grid_mask_shows_one_cell_of_four(height, width):
    mask = GridMask()(torch.zeros(64, height, width, 1), 0.75, generator=seeded()).mask.view(64, height, width)
    chosen = []
    for removed in mask:
        shown = {(row, column): float(1 - removed[row::2, column::2].mean()) for row in range(2) for column in range(2)}
        # On odd sides the cells are not of one size: the chosen one is shown whole, or nothing but the chosen one is.
        best = max(shown, key=lambda cell: shown[cell])
        rest = [share for cell, share in shown.items() if cell != best]
        assert shown[best] == 1 or max(rest) == 0
        if height % 2 == width % 2 == 0:
            assert shown[best] == 1
            assert max(rest) == 0
        chosen.append(best)
    assert len(set(chosen)) == 4, "the cell is drawn for each image"


@settings(max_examples=50, deadline=None)
@given(side=st.integers(2, 15), num_parts=st.integers(1, 12), mask_ratio=st.floats(0.01, 0.95), seed=st.integers(0, 99))
def test_part_mask_cuts_at_most_one_part(side, num_parts, mask_ratio, seed):
    if int(side**2 * (1 - mask_ratio)) < 1:
        return
    parts = random_parts(4, side**2, num_parts, seed)
    mask = PartMask()(torch.zeros(4, side**2, 1), mask_ratio, parts=parts, generator=seeded(seed)).mask
    for labels, removed in zip(parts, mask, strict=True):
        in_pieces = [label for label in labels.unique() if 0 < removed[labels == label].mean() < 1]
        assert len(in_pieces) <= 1


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    epoch=st.floats(0, 8.9, allow_subnormal=False),
    seed=st.integers(0, 99),
)
def test_evolving_scores_equal_a_plain_loop_over_algorithm_1(height, width, epoch, seed):
    num_patches = height * width
    parts = random_parts(2, num_patches, seed=seed)
    masking = EvolvingMask(10)
    masking.set_epoch(epoch)
    draws = seeded(seed)
    grid = GridMask().scores(2, (height, width), generator=draws)
    part = PartMask().scores(2, (height, width), parts=parts, generator=draws)
    p = masking.scores(2, (height, width), parts=parts, generator=seeded(seed))

    alpha = ((epoch + 1) / 10) ** 0.5
    for image in range(2):
        grid_ini = {(row, column): grid[image, row * width + column] for row in range(2) for column in range(2)
                    if row < height and column < width}  # fmt: skip
        part_ini = {int(label): part[image, i] for i, label in enumerate(parts[image])}
        for i in range(num_patches):
            p_grid = grid_ini[(i // width) % 2, (i % width) % 2]
            p_parts = part_ini[int(parts[image, i])]
            assert p[image, i] == pytest.approx(float((1 - alpha) * p_grid + alpha * p_parts), abs=1e-6)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
def test_ties_are_broken_without_bias(mask_ratio):
    draws, num_patches = 4000, 49
    parts = torch.zeros(draws, num_patches, dtype=torch.long)  # one part covers everything
    mask = PartMask()(torch.zeros(draws, num_patches, 1), mask_ratio, parts=parts, generator=seeded()).mask
    removed = mask.sum(0)
    # Each image removes a fixed number, so the counts vary less than independent ones: scale to chi-squared.
    share = float(mask[0].mean())
    statistic = float(((removed - draws * share) ** 2).sum() / (draws * share * (1 - share)))
    statistic *= (num_patches - 1) / num_patches
    assert 0.001 < scipy.stats.chi2.sf(statistic, num_patches - 1) < 0.999
    in_raster_order = torch.zeros(num_patches).index_fill_(0, torch.arange(int(mask[0].sum())), draws)
    assert float(((in_raster_order - draws * share) ** 2).sum()) > 1000 * float(((removed - draws * share) ** 2).sum())


def test_block_mask_removes_rectangles_of_the_ranges_it_was_given():
    p = BlockMask(num_blocks=1, area=(0.1, 0.3), aspect=(0.5, 2)).scores(500, (20, 24), generator=seeded())
    areas, aspects, corners = [], [], set()
    for scores in p.view(500, 20, 24):
        rows, columns = torch.where(scores == 1)
        top, left = int(rows.min()), int(columns.min())
        height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
        assert len(rows) == height * width, "one filled rectangle"
        areas.append(height * width / 480)
        aspects.append(height / width)
        corners.add((top, left))
    assert 0.08 < min(areas) < 0.13
    assert 0.27 < max(areas) < 0.33
    assert 0.4 < min(aspects) < 0.6
    assert 1.7 < max(aspects) < 2.5
    assert len(corners) > 100


def test_block_mask_is_blocky_and_covers_what_it_must():
    mask = BlockMask()(torch.zeros(200, 14, 14, 1), 0.75, generator=seeded()).mask.view(200, 14, 14)
    noise = RandomMask()(torch.zeros(200, 14, 14, 1), 0.75, generator=seeded()).mask.view(200, 14, 14)

    def borders(mask):
        return float((mask[:, 1:] != mask[:, :-1]).float().mean())

    assert borders(mask) < 0.4 * borders(noise)
    covered = BlockMask().scores(500, 14, generator=seeded())
    assert (covered > covered.amin(1, keepdim=True)).float().mean() > 0.85


def test_evolving_mask_goes_from_start_to_end():
    parts = random_parts(4, 196)
    masking = EvolvingMask(10)
    assert masking.alpha == 0
    assert not masking.needs_parts
    start = masking.scores(4, 14, generator=seeded())
    assert torch.equal(start, GridMask().scores(4, 14, generator=seeded()))
    assert torch.equal(start, masking.scores(4, 14, parts=parts, generator=seeded())), "unneeded parts change nothing"
    masking.set_epoch(9)
    assert masking.alpha == 1
    assert masking.needs_parts
    for scores, labels in zip(masking.scores(4, 14, parts=parts), parts, strict=True):
        assert all(scores[labels == label].unique().numel() == 1 for label in labels.unique())


@pytest.mark.filterwarnings("ignore:epoch=.* is outside of the training")
@pytest.mark.parametrize(("epoch", "alpha"), [(0, 0.1), (24, 0.5), (99, 1), (-7, 0.1), (1e9, 1), (23.5, 0.245**0.5)])
def test_alpha_follows_the_epoch(epoch, alpha):
    masking = EvolvingMask(100)
    masking.set_epoch(epoch)
    assert masking.alpha.item() == pytest.approx(alpha)
    assert masking.alpha.shape == ()


def test_power_bends_the_schedule():
    masking = EvolvingMask(100, power=1)
    masking.set_epoch(24)
    assert masking.alpha.item() == pytest.approx(0.25)


def test_needs_parts_follows_both_ends():
    assert not halfway(end=BlockMask()).needs_parts
    masking = EvolvingMask(10, start=PartMask(), end=RandomMask())
    assert masking.needs_parts
    masking.set_epoch(9)
    assert not masking.needs_parts
    assert torch.equal(masking.scores(2, 4, generator=seeded()), RandomMask().scores(2, 4, generator=seeded()))


def test_a_loaded_run_draws_the_same_masks():
    saved = EvolvingMask(100)
    saved.set_epoch(37.25)
    loaded = EvolvingMask(100)
    loaded.load_state_dict(saved.state_dict())
    assert {"alpha", "epoch"} <= set(saved.state_dict())
    assert loaded.needs_parts
    assert loaded.alpha == saved.alpha
    assert loaded.epoch == 37.25
    x, parts = torch.randn(2, 196, 3), random_parts(2, 196)
    for ours, theirs in zip(
        saved(x, parts=parts, generator=seeded()), loaded(x, parts=parts, generator=seeded()), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_stay_float32_in_a_half_precision_model(dtype):
    masking = halfway().to(dtype)
    assert masking.scores(2, 4, parts=random_parts(2, 16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert masking.scores(2, 4, parts=random_parts(2, 16)).dtype == torch.float32


@pytest.mark.parametrize("end", [PartMask, BlockMask])
def test_compiles_whole_and_a_new_epoch_does_not_recompile(end):
    torch._dynamo.reset()
    masking = EvolvingMask(10, end=end())
    compiled = torch.compile(masking, fullgraph=True)
    x, parts = torch.randn(2, 49, 4, requires_grad=True), random_parts(2, 49) if end is PartMask else None
    masking.set_epoch(0)
    masks = [compiled(x, 0.75, parts=parts).mask]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (1, 4.5, 9):
            masking.set_epoch(epoch)
            visible, mask, ids_restore = compiled(x, 0.75, parts=parts)
            assert (mask.sum(1) == 37).all()
            assert torch.equal((ids_restore >= 12).float(), mask)
            masks.append(mask)
    assert not torch.equal(masks[0], masks[1])
    visible.sum().backward()
    assert x.grad.sum() == visible.numel()


def test_compiled_part_scores_are_constant_on_parts():
    torch._dynamo.reset()
    parts = random_parts(4, 49)
    p = torch.compile(lambda parts: F.compute_scores(F.part_draws(parts)), fullgraph=True)(parts)
    assert p.unique().numel() > 10
    for scores, labels in zip(p, parts, strict=True):
        assert all(scores[labels == label].unique().numel() == 1 for label in labels.unique())


@pytest.mark.parametrize("mask_class", [RandomMask, GridMask, BlockMask])
def test_other_masks_compile(mask_class):
    torch._dynamo.reset()
    assert (torch.compile(mask_class(), fullgraph=True)(torch.randn(2, 49, 4), 0.5).mask.sum(1) == 25).all()


def test_masked_patches_unpack_in_the_order_of_mae():
    assert MaskedPatches._fields == ("visible", "mask", "ids_restore")
    assert isinstance(RandomMask()(torch.zeros(1, 4, 1)), MaskedPatches)


def test_draws_of_parts_are_uniform_and_independent():
    labels = torch.tensor([0, 1, 2, 3, 195, 196, 1000, 2**31, 2**62]).expand(20000, -1)
    p = PartMask().scores(20000, (1, 9), parts=labels, generator=seeded())
    for column in p.T:
        counts = torch.histc(column, 50, 0, 1)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert p.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03
    both = torch.histogramdd(p[:, :2].double().contiguous(), [8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert scipy.stats.chisquare(both.flatten()).pvalue > 1e-4


def test_labels_may_be_large_and_have_gaps():
    small = random_parts(4, 49, 7)
    large = small * 1_000_003 + 5
    p = PartMask().scores(4, 7, parts=large)
    for scores, labels in zip(p, small, strict=True):
        assert scores.unique().numel() == labels.unique().numel()
        assert all(scores[labels == label].unique().numel() == 1 for label in labels.unique())


def test_any_integer_labels_do():
    labels = random_parts(2, 16, 2)
    for dtype in (torch.uint8, torch.int32, torch.bool):
        assert torch.equal(
            PartMask().scores(2, 4, parts=labels.to(dtype), generator=seeded()),
            PartMask().scores(2, 4, parts=labels, generator=seeded()),
        )


# Bad input: DESIGN's table, row by row; the message repeats the caller's values.


@every_mask
@pytest.mark.parametrize("mask_ratio", [1, 1.5, -0.1, math.nan, 0.999])
def test_mask_ratio_out_of_range(make, mask_ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio={mask_ratio}.*[\[\(]0"):
        make()(torch.zeros(2, 16, 1), mask_ratio, parts=random_parts(2, 16))


@settings(max_examples=200)
@given(num_patches=st.integers(1, 5000))
def test_the_bound_that_an_error_names_is_kept(num_patches):
    with pytest.raises(ValueError, match="leaves no visible patch") as error:
        F.num_visible(num_patches, math.nextafter(1, 0))
    assert F.num_visible(num_patches, float(str(error.value).split()[-1].rstrip("]"))) >= 1


@every_mask
def test_patches_that_form_no_grid(make):
    masking = make()
    with pytest.raises(ValueError, match=r"N=50 .*class token.*grid_size"):
        masking(torch.zeros(2, 50, 1), parts=random_parts(2, 50))
    masking.grid_size = (5, 9)
    with pytest.raises(ValueError, match=r"\(5, 9\).*45.*N=50"):
        masking(torch.zeros(2, 50, 1), parts=random_parts(2, 50))
    with pytest.raises(ValueError, match=r"9 x 5 grid, not \(5, 9\)"):
        masking(torch.zeros(2, 9, 5, 1), parts=random_parts(2, 45))
    masking.grid_size = 7
    with pytest.raises(ValueError, match=r"grid_size=7 .*49.*N=50"):
        masking(torch.zeros(2, 50, 1), parts=random_parts(2, 50))


def test_patches_of_a_wrong_rank():
    with pytest.raises(ValueError, match=r"\[16, 3\]"):
        RandomMask()(torch.zeros(16, 3))


@pytest.mark.parametrize("make", [PartMask, halfway])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (torch.zeros(2, 15, dtype=torch.long), r"\[2, 15\].*\[2, 16\]"),
        (torch.zeros(1, 16, dtype=torch.long), r"\[1, 16\].*\[2, 16\]"),
        (torch.zeros(2, 4, 4, dtype=torch.long), r"\[2, 4, 4\].*\[2, 16\]"),
        (torch.zeros(2, 16), r"float32.*long"),
        (torch.full((2, 16), -1), r"label -1.*negative"),
    ],
)
def test_malformed_parts(make, parts, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(2, 16, 1), parts=parts)


def test_parts_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"ndarray.*as_tensor"):
        PartMask()(torch.zeros(2, 16, 1), parts=torch.zeros(2, 16).long().numpy())


class OfParts(Masking):
    """A mask of one's own that cannot do without parts."""

    needs_parts = True

    def draw(self, batch_size, grid_size, parts, **source):
        return parts % 2


class Wrapped(Masking):
    """A mask of one's own that does not say what the one inside of it needs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def draw(self, *args, **source):
        return self.inner.draw(*args, **source)


@pytest.mark.parametrize("make", [PartMask, halfway, OfParts, lambda: halfway(start=OfParts(), end=RandomMask())])
def test_missing_parts(make):
    refused = r"(PartMask|EvolvingMask with alpha=0\.707|OfParts) needs parts, but got None.*PartTeacher"
    for call in (
        lambda masking: masking(torch.zeros(2, 16, 1)),
        lambda masking: masking.sample(2, 4),
        lambda masking: masking.scores(2, 4),
    ):
        with pytest.raises(ValueError, match=refused):
            call(make())


@pytest.mark.parametrize("make", [PartMask, halfway])
def test_missing_parts_of_a_mask_inside_of_another(make):
    with pytest.raises(ValueError, match="needs parts, but got None"):
        Wrapped(make())(torch.zeros(2, 16, 1))


@pytest.mark.parametrize("parts", [torch.zeros(2, 15).long(), torch.zeros(2, 4, 4).long(), torch.zeros(2, 16)])
@pytest.mark.parametrize("make", [OfParts, lambda: EvolvingMask(10, start=OfParts(), end=RandomMask())])
def test_malformed_parts_of_a_mask_of_ones_own(make, parts):
    with pytest.raises(ValueError, match=r"parts has (shape|dtype)"):
        make()(torch.zeros(2, 16, 1), parts=parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GridMask(0),
        lambda: GridMask((8, 64)),
        lambda: BlockMask(0),
        lambda: BlockMask(area=(0.5, 0.2)),
        lambda: BlockMask(aspect=(0, 1)),
        lambda: EvolvingMask(0),
        lambda: EvolvingMask(10).set_epoch(math.nan),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"must be|NaN"):
        make()


def test_a_class_is_no_mask():
    with pytest.raises(TypeError, match=r"end=.*BlockMask.*end=BlockMask\(\)"):
        EvolvingMask(10, end=BlockMask)


def test_evolving_mask_takes_the_grid_of_its_ends():
    x = torch.zeros(2, 50, 1)
    assert EvolvingMask(10, start=GridMask(grid_size=(5, 10)))(x).mask.shape == (2, 50)
    assert EvolvingMask(10, grid_size=(5, 10))(x).mask.shape == (2, 50)


def test_scores_of_another_shape():
    with pytest.raises(ValueError, match=r"\[2, 15\].*\[2, 16\]"):
        F.mask_patches(torch.zeros(2, 16, 3), torch.zeros(2, 15))


def test_gradients_are_deterministic_copies():
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(2, 49, 3, requires_grad=True)
        visible, mask, _ = GridMask()(x)
        visible.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(x.grad, (1 - mask)[..., None].expand_as(x))


# The mask alone


@every_mask
@pytest.mark.parametrize(("grid_size", "mask_ratio"), [(7, 0.75), ((5, 9), 0.6), ((1, 4), 0), (14, 0.75)])
def test_samples_are_the_draws_of_a_call(make, grid_size, mask_ratio):
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    masking, x, parts = make(), torch.zeros(4, height, width, 1), random_parts(4, height * width)
    expected = masking(x, mask_ratio, parts=parts, generator=seeded(3)).mask
    sampled = masking.sample(4, grid_size, mask_ratio, parts=parts, generator=seeded(3))
    assert sampled.dtype == torch.bool
    assert torch.equal(sampled, expected == 1)
    assert (sampled.sum(1) == height * width - int(height * width * (1 - mask_ratio))).all()
    torch.manual_seed(4)
    expected = masking(x, mask_ratio, parts=parts).mask
    torch.manual_seed(4)
    assert torch.equal(masking.sample(4, grid_size, mask_ratio, parts=parts, device="cpu"), expected == 1)


def test_true_is_what_is_removed():
    parts = torch.tensor([[0, 0, 0, 1]])
    removed = PartMask().sample(1, 2, 0.75, parts=parts)
    visible = PartMask()(torch.arange(4.0).view(1, 4, 1), 0.75, parts=parts).visible
    assert removed.sum() == 3
    assert visible.shape[1] == 1


def test_samples_compile_whole():
    torch._dynamo.reset()
    masking, parts, x = halfway(), random_parts(2, 49), torch.zeros(2, 49, 1)
    compiled = torch.compile(lambda parts: masking.sample(2, 7, 0.6, parts=parts), fullgraph=True)
    torch.manual_seed(5)
    removed = compiled(parts)
    assert removed.dtype == torch.bool
    assert (removed.sum(1) == 30).all()
    assert not torch.equal(removed, compiled(parts))
    torch.manual_seed(5)
    assert torch.equal(removed, torch.compile(masking, fullgraph=True)(x, 0.6, parts=parts).mask == 1)


def test_samples_refuse_what_a_call_refuses():
    with pytest.raises(ValueError, match=r"mask_ratio=1\.5"):
        RandomMask().sample(2, 4, 1.5)
    with pytest.raises(ValueError, match=r"\[2, 15\].*\[2, 16\] for a grid of 4 x 4,"):
        PartMask().sample(2, 4, parts=torch.zeros(2, 15, dtype=torch.long))
    with pytest.raises(ValueError, match="needs parts"):
        PartMask().sample(2, 4)
    with pytest.raises(ValueError, match=r"grid_size=4 .*\(2, 8\)"):
        GridMask(grid_size=(2, 8)).sample(2, 4)
    with pytest.raises(ValueError, match=r"grid_size=\(4, 0\)"):
        RandomMask().sample(2, (4, 0))
    with pytest.raises(ValueError, match="batch_size='2'"):
        RandomMask().sample("2", 4)


# Scores of one's own: of any type and any finite range.


class Own(Masking):
    """A mask that draws what it was given."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def draw(self, batch_size, grid_size, parts, **source):
        return self.values


def noise(seed):
    return torch.randn(3, 196, generator=seeded(seed), dtype=torch.float64)


OWN_SCORES = {
    "rising": lambda seed: torch.stack([torch.randperm(196, generator=seeded(seed + i)) for i in range(3)]).float(),
    "noise": lambda seed: noise(seed).float(),
    "coarse": lambda seed: noise(seed).float().round(decimals=1),
    "tiny": lambda seed: noise(seed).float() * 1e-43,
    "huge": lambda seed: (noise(seed) * 8e37).float(),
    "negative": lambda seed: -noise(seed).float().exp(),
    "infinite": lambda seed: torch.where(noise(seed) > 1, math.inf, -noise(seed).float()),
    "float64": lambda seed: 1 + noise(seed) * 1e-15,
    "float64 of all sizes": lambda seed: (noise(seed) * 200).exp(),
    "bfloat16": lambda seed: (noise(seed) * 1e30).bfloat16(),
    "float16": lambda seed: noise(seed).half(),
    "int64": lambda seed: 2**62 + (noise(seed) * 100).long(),
    "int32": lambda seed: 2**30 + (noise(seed) * 100).int(),
    "uint8": lambda seed: (noise(seed) * 9).abs().byte(),
    "bool": lambda seed: noise(seed) > 1,
}
own_scores = pytest.mark.parametrize("make_scores", OWN_SCORES.values(), ids=OWN_SCORES.keys())


@own_scores
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), mask_ratio=st.floats(0.01, 0.99))
def test_scores_of_any_type_and_range_keep_their_order(make_scores, seed, mask_ratio):
    scores = make_scores(seed)
    mask = Own(scores)(torch.zeros(3, 196, 1), mask_ratio, generator=seeded(seed)).mask.bool()
    assert (mask.sum(1) == 196 - int(196 * (1 - mask_ratio))).all()
    for image, removed in zip(scores, mask, strict=True):
        assert image[removed].min() >= image[~removed].max()


@own_scores
def test_scores_of_ones_own_come_in_0_to_1_in_their_order(make_scores):
    given_scores = make_scores(0)
    p = Own(given_scores).scores(3, 14)
    assert p.dtype == torch.float32
    assert p.min() >= 0
    assert p.max() <= 1
    for ours, image in zip(p, given_scores, strict=True):
        assert (ours[image.argsort(stable=True)].diff() >= 0).all()
        if image.min() < 0 or image.max() > 1:
            distinct = image.unique(return_inverse=True)
            assert torch.equal(ours, (distinct[1] / (len(distinct[0]) - 1)).float())
        else:
            assert torch.equal(ours, image.float())


@pytest.mark.parametrize("value", [-3.0, 0.5, 2.0, 1e38])
def test_ties_of_any_value_are_broken_without_bias(value):
    scores = torch.full((4000, 49), value)
    removed = Own(scores)(torch.zeros(4000, 49, 1), 0.5, generator=seeded()).mask.sum(0)
    share = 25 / 49
    statistic = float(((removed - 4000 * share) ** 2).sum() / (4000 * share * (1 - share))) * 48 / 49
    assert 0.001 < scipy.stats.chi2.sf(statistic, 48) < 0.999


def test_zeros_tie_whatever_their_sign():
    scores = torch.zeros(2000, 2)
    scores[:, 1] = -0.0
    removed = Own(scores)(torch.zeros(2000, 1, 2, 1), 0.5, generator=seeded()).mask.sum(0)
    assert (removed > 900).all()


def test_in_a_blend_scores_of_ones_own_weigh_as_much_as_draws():
    wide, constant, inside = (
        torch.tensor([[195.0, -4, 9, 9]]),
        torch.full((1, 4), 7.0),
        torch.tensor([[0.2, 0, 1, 0.5]]),
    )
    for values, expected in [
        (wide, [[1, 0, 0.5, 0.5]]),
        (wide.double(), [[1, 0, 0.5, 0.5]]),
        (constant, [[0, 0, 0, 0]]),
        (inside, inside.tolist()),
        (torch.cat([wide, inside]), [[1, 0, 0.5, 0.5], *inside.tolist()]),
    ]:
        batch_size = len(values)
        other = BlockMask().scores(batch_size, 2, generator=seeded())
        masking = EvolvingMask(4, start=BlockMask(), end=Own(values)).set_epoch(0)  # alpha 0.5
        p = masking.scores(batch_size, 2, generator=seeded())
        assert torch.allclose(p, 0.5 * other + 0.5 * torch.tensor(expected))
        mask = masking(torch.zeros(batch_size, 4, 1), 0.5, generator=seeded()).mask.bool()
        assert all(image[removed].min() >= image[~removed].max() for image, removed in zip(p, mask, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_that_are_nan(dtype):
    scores = torch.rand(2, 16).to(dtype)
    scores[0, 3] = scores[1, 5] = math.nan
    evolving = EvolvingMask(10, end=Own(scores)).set_epoch(4)
    for masking in (Own(scores), evolving):
        for call in (lambda masking: masking(torch.zeros(2, 16, 1)), lambda masking: masking.scores(2, 4)):
            with pytest.raises(ValueError, match=r"2 of 32 scores are NaN"):
                call(masking)


def test_scores_that_are_complex():
    with pytest.raises(ValueError, match=r"complex64.*real"):
        F.mask_patches(torch.zeros(2, 16, 1), torch.zeros(2, 16, dtype=torch.complex64))


BAD_SCORES = {
    "[N]": torch.rand(16),
    "[1, N]": torch.rand(1, 16),
    "[B, 1]": torch.rand(3, 1),
    "[B, H, W]": torch.rand(3, 4, 4),
    "[2B, N]": torch.rand(6, 16),
    "[B, N + 1]": torch.rand(3, 17),
    "one key": F.GroupDraws(torch.zeros(1, dtype=torch.int64), torch.arange(16)[None]),
    "groups [B, 1]": F.GroupDraws(torch.arange(3), torch.zeros(3, 1, dtype=torch.int64)),
    "a blend": F.Blend(torch.rand(3, 16), torch.rand(1, 16), torch.tensor(0.5)),
}
NO_SCORES = {"None": None, "array": torch.rand(3, 16).numpy(), "list": [[0.5] * 16] * 3}
PLACES = {
    "alone": lambda own: own,
    "start": lambda own: halfway(start=own),
    "end": lambda own: halfway(end=own),
    "start, without parts": lambda own: EvolvingMask(10, start=own),
    "nested": lambda own: halfway(end=halfway(start=own, end=RandomMask())),
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def calls_of(masking):
    parts = random_parts(3, 16)
    yield lambda: masking(torch.zeros(3, 16, 1), parts=parts if masking.needs_parts else None)
    yield lambda: masking.scores(3, 4, parts=parts if masking.needs_parts else None)


BAD_SHAPE = (ValueError, r"scores has shape .*, but must be \[B, N\] = \[3, 16\]")
NO_TENSOR = (TypeError, r"scores is a (NoneType|ndarray|list), but must be a tensor")
REFUSED = {name: (scores, *BAD_SHAPE) for name, scores in BAD_SCORES.items()}
REFUSED |= {name: (scores, *NO_TENSOR) for name, scores in NO_SCORES.items()}


@every_place
@pytest.mark.parametrize(("scores", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_malformed_scores_are_refused_wherever_a_mask_is(scores, error, message, place):
    for call in calls_of(place(Own(scores))):
        with pytest.raises(error, match=message):
            call()


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_mask
def test_another_default_dtype_changes_no_mask(make, request):
    parts, options = random_parts(3, 49), {"mask_ratio": 0.6}
    expected = make()(torch.zeros(3, 49, 1), parts=parts, generator=seeded(), **options)
    expected_scores = make().scores(3, 7, parts=parts, generator=seeded())
    request.getfixturevalue("float64_by_default")
    ours = make()(torch.zeros(3, 49, 1), parts=parts, generator=seeded(), **options)
    assert torch.equal(ours.mask, expected.mask)
    assert torch.equal(ours.ids_restore, expected.ids_restore)
    assert ours.visible.dtype == torch.float64
    scores = make().scores(3, 7, parts=parts, generator=seeded())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected_scores)


def test_another_default_dtype_changes_no_parts(request):
    affinity, images = torch.rand(2, 36, 36, generator=seeded()), torch.rand(2, 3, 24, 24, generator=seeded())

    def parts():
        torch.manual_seed(0)
        return (
            GraphCutPartitioner(5)(affinity, images=images),
            GraphCutPartitioner(5, solver="torch")(affinity),
            EMPartitioner(5)(affinity),
        )

    expected = parts()
    request.getfixturevalue("float64_by_default")
    assert all(torch.equal(a, b) for a, b in zip(parts(), expected, strict=True))


def test_another_default_dtype_and_a_teacher(float64_by_default):
    model = MAE(image_size=32)
    teacher = PartTeacher(model, GraphCutPartitioner(), total_epochs=10)
    teacher.update(model)
    parts = teacher(torch.rand(2, 3, 32, 32))
    assert parts.max() > 0
    assert halfway()(torch.rand(2, parts.shape[1], 4), parts=parts).visible.dtype == torch.float64


@pytest.mark.parametrize("made", [{"total_epochs": 20}, {"total_epochs": 10, "power": 1}])
def test_a_state_of_another_schedule_is_refused(made):
    state = EvolvingMask(10).set_epoch(4).state_dict()
    with pytest.raises(ValueError, match=r"alpha=0\.7071 in epoch 4.*total_epochs="):
        EvolvingMask(**made).load_state_dict(state)
    EvolvingMask(**made).load_state_dict(EvolvingMask(10).state_dict())  # before the first epoch
    masking = EvolvingMask(10)
    masking.load_state_dict(state)
    assert masking.needs_parts
