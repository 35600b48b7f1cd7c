"""What users of a mask rely on, tested from the outside."""

import copy
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vits import MAE

from maskevolve import BlockMask, EvolvingMask, GridMask, MaskedPatches, Masking, PartMask, RandomMask
from maskevolve.integrations import apply_to_mae
from maskevolve.masks import fixed_masks, mask_patches, num_visible, to_unit_range
from maskevolve.masks.fixed import FixedDraws
from maskevolve.masks.interleave import interleaved
from maskevolve.parts import EMPartitioner, GraphCutPartitioner
from maskevolve.teachers import PartTeacher

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_parts(batch_size: int, num_patches: int, num_parts: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(min(num_parts, num_patches), (batch_size, num_patches), generator=seeded(seed))


def halfway(**options) -> EvolvingMask:
    return EvolvingMask(10, **options).set_epoch(4)


MASKS = {
    "random": RandomMask,
    "grid": GridMask,
    "grid3": lambda: GridMask(period=3),
    "block": BlockMask,
    "part": PartMask,
    "part-share": lambda: PartMask(share=0.5),
    "part-hint": lambda: PartMask(hint=0.3),
    "part-share-hint": lambda: PartMask(share=0.6, hint=0.1),
    "evolving": halfway,
    "evolving-share": lambda: halfway(end=PartMask(share=0.5, hint=0.1)),
    "evolving-block": lambda: halfway(end=BlockMask()),
}
every_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())


class Own(Masking):
    """A mask that draws what it was given."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def draw(self, batch_size, grid_size, parts, **source):
        return self.values


def calls_of(masking):
    """All three ways to draw from a mask, for 2 images of 4 x 4 patches."""
    return partial(masking, torch.zeros(2, 16, 1)), partial(masking.sample, 2, 4), partial(masking.scores, 2, 4)


class OfParts(Masking):
    """A mask of one's own that cannot do without parts."""

    needs_parts = True

    def draw(self, batch_size, grid_size, parts, **source):
        return parts % 2


class Wrapped(Masking):
    """A mask of one's own that does not say what the ones inside of it need."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def draw(self, *args, **source):
        return self.inner[0].draw(*args, **source)


def check_order(scores, mask):
    for image, removed in zip(scores, mask.bool(), strict=True):
        assert image[removed].min() >= image[~removed].max()


def check_whole_parts(parts, mask):
    for labels, removed in zip(parts, mask, strict=True):
        assert sum(0 < removed[labels == label].mean() < 1 for label in labels.unique()) <= 1


def constant_on(parts, scores):
    pairs = zip(scores, parts, strict=True)
    return all(image[labels == label].unique().numel() == 1 for image, labels in pairs for label in labels.unique())


@every_mask
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*(st.integers(1, most) for most in (4, 17, 17, 5))),
    st.floats(0, 0.99, allow_subnormal=False),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_exact_counts_and_mae_conventions(make, shape, mask_ratio, dtype, flat):
    num_patches = shape[1] * shape[2]
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        return
    masking, x, parts = make(), torch.randn(shape).to(dtype), random_parts(shape[0], num_patches)
    if flat:
        masking.grid_size = shape[1:3]
    masked = masking(x.flatten(1, 2) if flat else x, mask_ratio, parts=parts)
    assert isinstance(masked, MaskedPatches)
    assert masked._fields == ("visible", "mask", "ids_restore")
    visible, mask, ids_restore = masked
    assert (visible.shape, visible.dtype) == ((shape[0], keep, shape[3]), dtype)
    assert (mask.shape, mask.dtype) == ((shape[0], num_patches), torch.float32)
    assert (ids_restore.shape, ids_restore.dtype) == ((shape[0], num_patches), torch.int64)
    for image, seen, removed, restore in zip(x.flatten(1, 2), visible, mask, ids_restore, strict=True):
        assert removed.sum() == num_patches - keep
        assert sorted(restore.tolist()) == list(range(num_patches))
        for patch in range(num_patches):  # as MAE's decoder reads it
            assert (removed[patch] == 0) == (restore[patch] < keep)
            if restore[patch] < keep:
                assert torch.equal(seen[restore[patch]], image[patch])


@every_mask
@pytest.mark.parametrize(("height", "width", "mask_ratio"), [(7, 7, 0.75), (5, 9, 0.6), (1, 4, 0.5), (14, 14, 0.75)])
def test_a_random_state_gives_the_same_mask_in_all_three_calls(make, height, width, mask_ratio):
    masking, x, parts = make(), torch.zeros(8, height, width, 1), random_parts(1, height * width).expand(8, -1)
    for options in ({"generator": seeded()}, {}):
        draws = options.get("generator", torch)
        mask, again, other = (
            draws.manual_seed(seed) and masking(x, mask_ratio, parts=parts, **options).mask for seed in (1, 1, 2)
        )
        assert torch.equal(mask, again)
        if height == 14:
            assert not torch.equal(mask, other)
            assert len(mask.unique(dim=0)) > 1, "images differ"
        draws.manual_seed(1)
        sampled = masking.sample(8, (height, width), mask_ratio, parts=parts, device="cpu", **options)
        assert sampled.dtype == torch.bool
        assert torch.equal(sampled, mask == 1)
        draws.manual_seed(1)
        p = masking.scores(8, (height, width), parts=parts, **options)
        assert p.dtype == torch.float32
        assert 0 <= p.min() <= p.max() <= 1
        check_order(p, mask)


@every_mask
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:, 1:]], ids=["", "T", "cls"]
)
def test_gradients_are_those_of_a_plain_gather(make, view):
    masking = make()
    masking.grid_size = (6, 8)
    x = torch.randn(3, 49, 4, requires_grad=True)
    patches = view(x)[:, :48]
    torch.use_deterministic_algorithms(True)
    visible, _, ids_restore = masking(patches, 0.5, parts=random_parts(3, 48), generator=seeded())
    expected = patches.gather(1, ids_restore.argsort(1)[:, :24, None].expand(-1, -1, 4))
    assert torch.equal(visible, expected)
    weight = torch.randn_like(visible)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), x, retain_graph=True)[0] for out in (visible, expected))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(14, 14), (6, 10), (15, 15), (14, 15), (7, 12)])
def test_grid_mask_shows_one_cell_of_four(height, width):
    mask = GridMask()(torch.zeros(64, height, width, 1), 0.75, generator=seeded()).mask.view(64, height, width)
    cells = [1 - mask[:, row::2, column::2].flatten(1).mean(1) for row in range(2) for column in range(2)]
    shown = torch.stack(cells, 1).sort(descending=True)
    whole, alone = shown.values[:, 0] == 1, shown.values[:, 1] == 0
    # On odd sides the cells are not of one size: the chosen one is shown whole, or nothing but the chosen one is.
    assert (whole | alone if height % 2 or width % 2 else whole & alone).all()
    assert shown.indices[:, 0].unique().numel() == 4, "the cell is drawn for each image"


@settings(max_examples=50, deadline=None)
@given(side=st.integers(2, 15), num_parts=st.integers(1, 12), mask_ratio=st.floats(0.01, 0.95), seed=st.integers(0, 99))
def test_part_mask_cuts_at_most_one_part(side, num_parts, mask_ratio, seed):
    if int(side**2 * (1 - mask_ratio)) < 1:
        return
    parts = random_parts(4, side**2, num_parts, seed)
    mask = PartMask()(torch.zeros(4, side**2, 1), mask_ratio, parts=parts, generator=seeded(seed)).mask
    check_whole_parts(parts, mask)


SHARES = st.one_of(st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0]), st.floats(0, 1))


def random_order(num_patches: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_patches, generator=seeded(seed))[None]


@settings(max_examples=60, deadline=None)
@given(num_patches=st.integers(1, 40), share=SHARES, seed=st.integers(0, 10**6))
def test_of_every_number_of_removed_patches_a_share_is_of_the_first_order(num_patches, share, seed):
    """The oracle draws the removed patches of each number anew."""
    first, second = random_order(num_patches, seed), random_order(num_patches, seed + 1)
    places = interleaved(first, second, share)
    for removed in range(1, num_patches + 1):
        by_first = first[0].argsort().tolist()[: math.floor(removed * share + 1e-6)]
        others = [patch for patch in second[0].argsort().tolist() if patch not in by_first]
        expected = by_first + others[: removed - len(by_first)]
        assert sorted(torch.where(places[0] < removed)[0].tolist()) == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(
    num_parts=st.integers(2, 8),
    size=st.integers(24, 32),
    share=SHARES,
    mask_ratio=st.floats(0.1, 0.6),
    seed=st.integers(0, 99),
)
def test_no_more_than_the_share_is_removed_as_whole_parts(num_parts, size, share, mask_ratio, seed):
    """Of parts so large that chance removes none of them whole, but for what is left of one that is cut."""
    parts = torch.arange(num_parts).repeat_interleave(size)[None]
    mask = PartMask(share=share, grid_size=(1, num_parts * size))
    removed = mask.sample(1, (1, num_parts * size), mask_ratio, parts=parts, generator=seeded(seed))[0]
    whole, cut = divmod(math.floor(share * int(removed.sum()) + 1e-6), size)
    assert 0 <= int(removed.view(num_parts, size).all(1).sum()) - whole <= (size - cut < 16)


def test_what_a_share_leaves_is_drawn_from_all_other_patches_alike():
    parts = torch.arange(8).repeat_interleave(8).expand(4000, -1)
    removed = PartMask(share=0.5).sample(4000, 8, 0.5, parts=parts, generator=seeded()).view(-1, 8, 8)
    whole = removed.all(2)
    assert (whole.sum(1) == 2).float().mean() > 0.99, "16 of 32: two parts of eight patches, hardly ever one by chance"
    others = removed[~whole].float()
    assert others.mean(0).numpy() == pytest.approx(np.full(8, 1 / 3), abs=0.02)
    assert others.sum(1).var() == pytest.approx(8 * (1 / 3) * (2 / 3) * 40 / 47, rel=0.05), "hypergeometric"


@pytest.mark.parametrize("share", [1, 0.5])
def test_each_patch_of_a_hidden_part_stays_with_the_chance_of_the_hint(share):
    parts = torch.arange(4).repeat_interleave(16).expand(2000, -1)
    masking = PartMask(share=share, hint=0.2)
    removed = masking.sample(2000, 8, 0.5, parts=parts, generator=seeded()).view(-1, 4, 16)
    assert (removed.sum((1, 2)) == 32).all()
    stays = 1 - removed.sum(2).amax(1).float().mean() / 16  # of the part of which most is hidden
    assert stays == pytest.approx(0.2, abs=0.08)
    assert PartMask(hint=0).sample(3, 8, 0.5, parts=parts[:3]).view(3, 4, 16).all(2).sum() == 6


def test_hints_that_leave_too_few_patches_to_remove_are_removed_at_random():
    parts = torch.arange(4).repeat_interleave(16).expand(1000, -1)
    removed = PartMask(hint=1.0).sample(1000, 8, 0.75, parts=parts, generator=seeded())
    assert (removed.sum(1) == 48).all()
    assert removed.float().mean(0).numpy() == pytest.approx(np.full(64, 0.75), abs=0.06)


def test_without_share_and_hint_whole_parts_are_drawn_as_before():
    parts, scores = random_parts(3, 64), [PartMask(share=1, hint=0), PartMask()]
    first, second = (mask.scores(3, 8, parts=parts, generator=seeded()) for mask in scores)
    assert torch.equal(first, second)
    assert constant_on(parts, first)
    assert "share=0.5, hint=0.1" in repr(PartMask(share=0.5, hint=0.1))
    assert repr(PartMask()) == "PartMask()"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 8.9, allow_subnormal=False), st.integers(0, 99))
def test_evolving_scores_equal_a_plain_loop_over_algorithm_1(height, width, epoch, seed):
    parts, draws = random_parts(2, height * width, seed=seed), seeded(seed)
    grid = GridMask().scores(2, (height, width), generator=draws)
    part = PartMask().scores(2, (height, width), parts=parts, generator=draws)
    p = EvolvingMask(10).set_epoch(epoch).scores(2, (height, width), parts=parts, generator=seeded(seed))

    alpha = ((epoch + 1) / 10) ** 0.5
    for image in range(2):
        grid_ini = {(i // width % 2, i % width % 2): grid[image, i] for i in range(height * width)}
        part_ini = {int(label): part[image, i] for i, label in enumerate(parts[image])}
        for i, label in enumerate(parts[image]):
            blend = (1 - alpha) * grid_ini[i // width % 2, i % width % 2] + alpha * part_ini[int(label)]
            assert p[image, i] == pytest.approx(float(blend), abs=1e-6)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("value", ["part", -3.0, 0.0, 0.5, 2.0, 1e38])
def test_ties_are_broken_without_bias(value, mask_ratio):
    draws, num_patches = 4000, 49
    masking = PartMask() if value == "part" else Own(torch.full((draws, num_patches), value))
    if value == 0:
        masking.values[:, ::2] = -0.0  # which is equal to 0
    parts = torch.zeros(draws, num_patches, dtype=torch.long)  # one part covers everything
    mask = masking(torch.zeros(draws, num_patches, 1), mask_ratio, parts=parts, generator=seeded()).mask
    # Each image removes a fixed number, so the counts vary less than independent ones: scale to chi-squared.
    share = float(mask[0].mean())
    statistic = float(((mask.sum(0) - draws * share) ** 2).sum() / (draws * share * (1 - share)))
    assert 0.001 < scipy.stats.chi2.sf(statistic * (num_patches - 1) / num_patches, num_patches - 1) < 0.999


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
    assert (min(areas), max(areas)) == pytest.approx((0.105, 0.3), abs=0.025)
    assert (min(aspects), max(aspects)) == pytest.approx((0.5, 2.1), rel=0.19)
    assert len(corners) > 100


def test_block_mask_is_blocky_and_covers_what_it_must():
    blocks, noise = (each.sample(200, 14, generator=seeded()).view(200, 14, 14) for each in (BlockMask(), RandomMask()))
    borders = [float((mask[:, 1:] != mask[:, :-1]).float().mean()) for mask in (blocks, noise)]
    assert borders[0] < 0.4 * borders[1]
    covered = BlockMask().scores(500, 14, generator=seeded())
    assert (covered > covered.amin(1, keepdim=True)).float().mean() > 0.85


def test_evolving_mask_goes_from_start_to_end():
    parts, masking = random_parts(4, 196), EvolvingMask(10)
    assert (masking.alpha, masking.needs_parts) == (0, False)
    start = masking.scores(4, 14, generator=seeded())
    assert torch.equal(start, GridMask().scores(4, 14, generator=seeded()))
    assert torch.equal(start, masking.scores(4, 14, parts=parts, generator=seeded())), "unneeded parts change nothing"
    masking.set_epoch(9)
    assert (masking.alpha, masking.needs_parts) == (1, True)
    assert constant_on(parts, masking.scores(4, 14, parts=parts))
    assert not halfway(end=BlockMask()).needs_parts
    masking = EvolvingMask(10, start=PartMask(), end=RandomMask())
    assert masking.needs_parts
    assert not masking.set_epoch(9).needs_parts
    assert torch.equal(masking.scores(2, 4, generator=seeded()), RandomMask().scores(2, 4, generator=seeded()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_stay_float32_in_a_half_precision_model(dtype):
    masking = halfway().to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, autocast):
            assert masking.scores(2, 4, parts=random_parts(2, 16)).dtype == torch.float32


@pytest.mark.parametrize("end", [PartMask, partial(PartMask, share=0.5, hint=0.1), BlockMask, RandomMask])
def test_compiles_whole_and_a_new_epoch_does_not_recompile(end):
    torch._dynamo.reset()
    masking = EvolvingMask(10, end=end()).set_epoch(0)
    of_parts = end not in (BlockMask, RandomMask)
    backend = "inductor" if end is PartMask else "aot_eager"
    compiled = torch.compile(masking, fullgraph=True, backend=backend)
    x, parts = torch.randn(2, 49, 4, requires_grad=True), random_parts(2, 49) if of_parts else None
    masks = [compiled(x, 0.75, parts=parts).mask]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (1, 4.5, 9):
            masking.set_epoch(epoch)
            visible, mask, ids_restore = compiled(x, 0.75, parts=parts)
            assert (mask.sum(1) == 37).all()
            assert torch.equal((ids_restore >= 12).float(), mask)
            assert torch.equal(visible, x.gather(1, ids_restore.argsort(1)[:, :12, None].expand(-1, -1, 4)))
            masks.append(mask)
    assert not torch.equal(masks[0], masks[1])
    if end is PartMask:
        check_whole_parts(parts, mask)
    visible.sum().backward()
    assert torch.equal(x.grad, (1 - mask)[..., None].expand_as(x))


def test_other_numbers_of_patches_compile_once_more():
    torch._dynamo.reset()
    masking, x, parts = halfway(end=PartMask(share=0.5)), torch.randn(2, 49, 4), random_parts(2, 49)
    compiled = torch.compile(masking, fullgraph=True, backend="eager")
    compiled(x, keep=30, parts=parts), compiled(x, keep=29, parts=parts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for keep in (20, 12, 2):
            assert compiled(x, keep=keep, parts=parts).visible.shape == (2, keep, 4)


@every_mask
def test_no_value_is_looked_at_but_on_a_cpu(make):
    x, parts = torch.empty(2, 49, 4, device="meta"), random_parts(2, 49).to("meta")  # which has no values
    masking = make().to("meta")
    assert masking(x, 0.5, parts=parts).visible.shape == (2, 24, 4)
    assert masking.scores(2, 7, parts=parts, device="meta").is_meta


def test_draws_of_parts_are_uniform_and_independent():
    labels = torch.tensor([0, 1, 2, 3, 195, 196, 1000, 2**31, 2**62]).expand(20000, -1)
    p = PartMask().scores(20000, (1, 9), parts=labels, generator=seeded())
    assert all(scipy.stats.chisquare(torch.histc(column, 50, 0, 1)).pvalue > 1e-4 for column in p.T)
    assert p.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03
    both = torch.histogramdd(p[:, :2].double().contiguous(), [8, 8], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert scipy.stats.chisquare(both.flatten()).pvalue > 1e-4


def test_labels_may_be_large_and_have_gaps():
    small = random_parts(4, 49, 7)
    p = PartMask().scores(4, 7, parts=small * 1_000_003 + 5)
    assert constant_on(small, p)
    assert all(scores.unique().numel() == labels.unique().numel() for scores, labels in zip(p, small, strict=True))


@pytest.mark.parametrize("name", ["bool", "uint8", "int8", "int32", "uint16", "uint32", "uint64"])
def test_any_integer_labels_do(name):
    labels, x = random_parts(2, 16, 2), torch.zeros(2, 16, 1)
    for masking in (PartMask(), halfway(), OfParts()):
        parts = labels.to(getattr(torch, name))
        ours, expected = (masking(x, parts=each, generator=seeded()).mask for each in (parts, labels))
        assert torch.equal(ours, expected)


# Bad input: DESIGN's table, row by row; the message repeats the caller's values.


@settings(max_examples=200)
@given(num_patches=st.integers(1, 5000))
def test_the_bound_that_an_error_names_is_kept(num_patches):
    with pytest.raises(ValueError, match="mask_ratio") as error:
        num_visible(num_patches, math.nextafter(1, 0))
    assert num_visible(num_patches, float(str(error.value).split()[-1].rstrip("]"))) >= 1


@every_mask
def test_patches_that_form_no_grid(make):
    masking = make()
    for grid_size, shape, message in [
        (None, (2, 50, 1), "N=50 .*class token.*grid_size"),
        (None, (16, 3), r"\[16, 3\]"),
        ((5, 9), (2, 50, 1), r"\(5, 9\).*45.*N=50"),
        ((5, 9), (2, 9, 5, 1), r"\(9, 5\).*\(5, 9\)"),
        (7, (2, 50, 1), "grid_size=7 .*49.*N=50"),
    ]:
        masking.grid_size = grid_size
        with pytest.raises(ValueError, match=message):
            masking(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"grid_size=7 .*49.*N=16"):
        masking.sample(2, 4)
    assert EvolvingMask(10, start=GridMask(grid_size=(5, 10)))(torch.zeros(2, 50, 1)).mask.shape == (2, 50)
    assert EvolvingMask(10, grid_size=(5, 10))(torch.zeros(2, 50, 1)).mask.shape == (2, 50)


OF_PARTS = [PartMask, lambda: PartMask(share=0.5), halfway, OfParts, lambda: halfway(start=OfParts(), end=RandomMask())]


@pytest.mark.parametrize("make", [*OF_PARTS, lambda: EvolvingMask(10, start=OfParts(), end=RandomMask())])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        *((torch.zeros(shape).long(), r"\[2, 16\].*each patch$") for shape in ((2, 15), (1, 16), ())),
        (torch.zeros(2, 4, 4).long(), r"\[2, 16\].*parts_from_segmentation"),
        (torch.zeros(2, 16), "float32.*long"),
        (torch.full((2, 16), -1), "-1.*negative"),
        (torch.full((2, 16), -1, dtype=torch.int8), "-1.*negative"),
        (torch.zeros(2, 16).long().numpy(), "ndarray.*as_tensor"),
    ],
)
def test_malformed_parts(make, parts, message):
    for call in calls_of(make()):
        with pytest.raises((ValueError, TypeError), match=message):
            call(parts=parts)


@pytest.mark.parametrize("make", [*OF_PARTS, lambda: Wrapped(PartMask()), lambda: Wrapped(halfway())])
def test_missing_parts(make):
    for call in calls_of(make()):
        with pytest.raises(ValueError, match=r"(PartMask|EvolvingMask .*0\.707|OfParts|part_scores) needs parts"):
            call()


@pytest.mark.parametrize("value", [BlockMask, nn.Linear(2, 2), "grid", len])
def test_what_is_no_mask(value):
    for name in ("start", "end"):
        with pytest.raises(TypeError, match=rf"{name} .*{name}=BlockMask\(\)"):
            EvolvingMask(10, **{name: value})
    with pytest.raises(TypeError, match="masking "), fixed_masks(value):
        pass
    with pytest.raises(TypeError, match="mask"):
        apply_to_mae(MAE(depth=1), value)


@every_mask
def test_as_many_patches_stay_as_are_asked_for(make):
    masking, x, parts = make(), torch.randn(3, 5, 7, 2), random_parts(3, 35)
    for keep in (1, 2, 17, np.int64(34), 35):
        masked = masking(x, keep=keep, parts=parts, generator=seeded())
        assert (masked.mask == 0).sum(1).tolist() == [keep] * 3
        assert masked.visible.shape == (3, keep, 2)
        sampled = masking.sample(3, (5, 7), keep=keep, parts=parts, generator=seeded())
        assert torch.equal(sampled, masked.mask == 1)
    same = masking(x, 0.5, parts=parts, generator=seeded()), masking(x, keep=17, parts=parts, generator=seeded())
    assert all(map(torch.equal, *same))
    assert mask_patches(x.flatten(1, 2), torch.rand(3, 35), keep=4).visible.shape == (3, 4, 2)
    with pytest.raises(ValueError, match=r"keep=4 .*mask_ratio=0\.5"):
        masking(x, 0.5, keep=4, parts=parts)


@pytest.mark.parametrize("keep", [0, -1, 17, 2.5, 4.0, "4", True, [4], torch.tensor([4, 4]), math.nan])
def test_a_number_of_patches_that_cannot_stay(keep):
    with fixed_masks(fixed := RandomMask()):
        for masking in (RandomMask(), fixed, halfway(end=BlockMask())):
            for call in calls_of(masking)[:2]:
                with pytest.raises(ValueError, match="keep="):
                    call(keep=keep)


def test_fixed_masks_keep_the_number_of_patches():
    masking, x, masks = GridMask(), torch.randn(4, 16, 1), []
    for batch in (4, 3):
        with fixed_masks(masking, seed=3):
            masks.append(torch.cat([masking(each, keep=5).mask for each in x.split(batch)]))
    assert torch.equal(*masks)
    assert (masks[0] == 0).sum(1).tolist() == [5] * 4
    with fixed_masks(masking, seed=3):
        assert torch.equal(masking(x, 1 - 5 / 16).mask, masks[0])
        with pytest.raises(ValueError, match="class token"):
            masking(torch.randn(4, 17, 1))
    assert not torch.equal(FixedDraws(seed=3).mask(masking, x, 5)[1], FixedDraws(seed=4).mask(masking, x, 5)[1])


@every_mask
def test_an_empty_batch(make):
    masking, x, parts, draws = make(), torch.randn(0, 16, 3, requires_grad=True), random_parts(0, 16), FixedDraws()
    with fixed_masks(fixed := make()):
        for call in (masking, fixed, partial(draws.mask, masking)):
            visible, mask, ids_restore = call(x, keep=4, parts=parts)
            assert (visible.shape, mask.shape, ids_restore.shape) == ((0, 4, 3), (0, 16), (0, 16))
            visible.sum().backward()
    assert draws.place == 0, "an empty batch holds no place"
    assert masking(torch.randn(0, 4, 4, 3), parts=parts).mask.shape == (0, 16)
    assert masking.sample(0, 4, parts=parts).shape == masking.scores(0, 4, parts=parts).shape == (0, 16)


def test_samples_compile_whole():
    torch._dynamo.reset()
    masking, parts, x = halfway(), random_parts(2, 49), torch.zeros(2, 49, 1)
    compiled, sample = (torch.compile(call, fullgraph=True, backend="eager") for call in (masking, masking.sample))
    for ratio, count in ((0.6, 30), (0.75, 37)):  # which may change
        torch.manual_seed(5)
        removed = sample(2, 7, ratio, parts=parts)
        assert removed.dtype == torch.bool
        assert (removed.sum(1) == count).all()
        assert not torch.equal(removed, sample(2, 7, ratio, parts=parts))
        torch.manual_seed(5)
        assert torch.equal(removed, compiled(x, ratio, parts=parts).mask == 1)


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


@pytest.mark.parametrize("make_scores", OWN_SCORES.values(), ids=OWN_SCORES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), mask_ratio=st.floats(0.01, 0.99))
def test_scores_of_any_type_and_range_keep_their_order(make_scores, seed, mask_ratio):
    scores = make_scores(seed)
    mask, p = Own(scores)(torch.zeros(3, 196, 1), mask_ratio, generator=seeded(seed)).mask, Own(scores).scores(3, 14)
    assert (mask.sum(1) == 196 - int(196 * (1 - mask_ratio))).all()
    check_order(scores, mask)
    assert p.dtype == torch.float32
    for ours, image in zip(p, scores, strict=True):
        values, ranks = image.unique(return_inverse=True)
        within = 0 <= values[0] <= values[-1] <= 1
        assert torch.equal(ours, image.float() if within else (ranks / max(len(values) - 1, 1)).float())


def test_in_a_blend_scores_of_ones_own_weigh_as_much_as_draws():
    wide, inside = torch.tensor([[195.0, -4, 9, 9]]), torch.tensor([[0.2, 0, 1, 0.5]])
    spread = torch.tensor([[1, 0, 0.5, 0.5]])

    class Wide(BlockMask):  # of the library, but for its range
        def draw(self, *args, **source):
            return 195 * super().draw(*args, **source) - 4

    for values, expected in [
        (wide, spread),
        (wide.double(), spread),
        (torch.full((1, 4), 7.0), torch.zeros(1, 4)),
        (inside, inside),
        (torch.cat([wide, inside]), torch.cat([spread, inside])),
    ]:
        batch_size = len(values)
        other = BlockMask().scores(batch_size, 2, generator=seeded())
        for start, scores in ((BlockMask(), other), (Wide(), to_unit_range(9 * other - 4))):
            masking = EvolvingMask(4, start=start, end=Own(values)).set_epoch(0)  # alpha 0.5
            p = masking.scores(batch_size, 2, generator=seeded())
            assert torch.allclose(p, 0.5 * scores + 0.5 * expected)
            check_order(p, masking(torch.zeros(batch_size, 4, 1), 0.5, generator=seeded()).mask)


with_nan = torch.rand(3, 16).index_fill_(1, torch.tensor([3]), math.nan)
REFUSED = {
    **{f"NaN, {dtype}": (with_nan.to(dtype), "3 of 48 .* NaN") for dtype in (*DTYPES, torch.float64)},
    "complex": (torch.zeros(3, 16, dtype=torch.complex64), "complex64"),
    **{type(x).__name__: (x, type(x).__name__) for x in (None, torch.rand(3, 16).numpy(), [[0.5] * 16] * 3)},
    **{str(shape): (torch.rand(shape), r"\[3, 16\]") for shape in (16, (1, 16), (3, 1), (3, 4, 4), (6, 16), (3, 17))},
}
PLACES = {
    "alone": lambda own: own,
    "start": lambda own: halfway(start=own),
    "end": lambda own: halfway(end=own),
    "start, without parts": lambda own: EvolvingMask(10, start=own),
    "nested": lambda own: halfway(end=halfway(start=own, end=RandomMask())),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("scores", "message"), REFUSED.values(), ids=REFUSED)
def test_malformed_scores_are_refused_wherever_a_mask_is(scores, message, place):
    masking, x = place(Own(scores)), torch.zeros(3, 16, 1)
    options = {"parts": random_parts(3, 16)} if masking.needs_parts else {}
    calls = partial(masking, x, **options), partial(masking.scores, 3, 4, **options), partial(mask_patches, x, scores)
    for call in calls:
        with pytest.raises(ValueError if isinstance(scores, torch.Tensor) else TypeError, match=message):
            call()


def test_another_default_dtype_changes_no_mask_and_no_parts():
    affinity, images = torch.rand(2, 36, 36, generator=seeded()), torch.rand(2, 3, 24, 24, generator=seeded())

    def draw():
        torch.manual_seed(0)
        cuts = GraphCutPartitioner(5)(affinity, images=images), GraphCutPartitioner(5, solver="torch")(affinity)
        drawn = [*cuts, EMPartitioner(5)(affinity)]
        for make in MASKS.values():
            drawn += make()(torch.zeros(3, 49, 1), 0.6, parts=random_parts(3, 49), generator=seeded())[1:]
            drawn.append(make().scores(3, 7, parts=random_parts(3, 49), generator=seeded()))
        return drawn

    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        ours = draw()
        teacher = PartTeacher(model := MAE(image_size=32), GraphCutPartitioner(), total_epochs=10)
        teacher.update(model)
        parts = teacher(torch.rand(2, 3, 32, 32))
        visible = halfway()(torch.rand(2, 16, 4), parts=parts).visible
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert parts.max() > 0
    assert visible.dtype == torch.float64


@pytest.mark.parametrize("made", [{"total_epochs": 20}, {"total_epochs": 10, "power": 1}])
def test_a_state_of_another_schedule_is_refused(made):
    state = EvolvingMask(10).set_epoch(4).state_dict()
    with pytest.raises(ValueError, match=r"alpha=0\.7071 in epoch 4.*total_epochs="):
        EvolvingMask(**made).load_state_dict(state)
    EvolvingMask(**made).load_state_dict(EvolvingMask(10).state_dict())  # before the first epoch


def nested(inner_epochs=10):
    return EvolvingMask(10, start=RandomMask(), end=EvolvingMask(inner_epochs))


SAVED, TWO = nested().set_epoch(7).state_dict(), torch.zeros(2)
REFUSED_STATES = {
    "another schedule inside": nested(20).set_epoch(7).state_dict(),
    "NaN": {**SAVED, "alpha": torch.tensor(math.nan)},
    "missing inside": {key: value for key, value in SAVED.items() if key != "end.epoch"},
    "missing": {key: value for key, value in SAVED.items() if key != "alpha"},
    "unexpected": {**SAVED, "other": TWO},
    "another shape inside": {**SAVED, "end.alpha": TWO},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", REFUSED_STATES.values(), ids=REFUSED_STATES)
def test_a_state_that_is_refused_leaves_the_mask_as_it_was(state, assign):
    alone, first, second = nested(), nested(), nested()
    both = {f"inner.0.{key}": value for key, value in SAVED.items()}
    both |= {f"inner.1.{key}": value for key, value in state.items()}
    for masking, given_state in ((alone, state), (Wrapped(first, second), both)):
        before = copy.deepcopy(masking.state_dict())
        with pytest.raises((ValueError, RuntimeError)):
            masking.load_state_dict(given_state, assign=assign)
        assert masking.state_dict() == before
    assert not any(each.needs_parts or each.end.needs_parts for each in (alone, first, second))
    alone.load_state_dict(SAVED, assign=assign)
    assert alone.needs_parts
    assert alone.end.needs_parts


def test_a_state_that_is_read_in_place_or_refused_by_a_whole_model_leaves_the_mask_as_it_was():
    masking = nested().set_epoch(2)  # torch.distributed.checkpoint fills the tensors of state_dict()
    model, before = nn.ModuleDict({"masking": masking}), copy.deepcopy(masking.state_dict())
    for value in (state := masking.state_dict()).values():
        value.fill_(9)
    for wrong in (state, nested(20).set_epoch(7).state_dict()):
        with pytest.raises(ValueError, match="total_epochs"):
            model.load_state_dict({f"masking.{key}": value for key, value in wrong.items()})
        assert masking.state_dict() == before


def test_validations_go_on_after_a_stop(tmp_path):
    """The recipe of docs/masks.md: a run that is stopped and resumed has the validation losses of one that is not."""
    page = (Path(__file__).parents[1] / "docs/masks.md").read_text()
    (recipe,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def validate" in block]
    batches, first, resumed = torch.randn(3, 2, 3, 64, 64), {}, {}
    for names in (first, resumed):
        torch.manual_seed(0)
        teacher = PartTeacher(model := MAE(), GraphCutPartitioner(), total_epochs=4)
        evolution = apply_to_mae(model, EvolvingMask(4), teacher)
        names |= {"torch": torch, "model": model, "evolution": evolution, "epochs": 4, "epoch": 0}
        exec(recipe, names)
    first["validate"](first["model"], batches)
    mask = first["evolution"].last_mask
    nn.init.normal_(first["model"].patch_embed.proj.weight)  # so that the teacher would cut other parts
    first["evolution"].update()
    first["epoch"] = resumed["epoch"] = 2
    first["save"](tmp_path / "checkpoint.pt")
    expected = first["validate"](first["model"], batches)
    assert torch.equal(first["evolution"].last_mask, mask), "validations can be compared"
    resumed["resume"](tmp_path / "checkpoint.pt")
    assert resumed["validate"](resumed["model"], batches) == expected
    assert resumed["evolution"].masking.alpha < 1, "training goes on at its own epoch"
