"""Pictures: what is grey, what is outlined, how many panels there are."""

import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from maskevolve.viz import GREY, OUTLINE, evolution_figure, mask_picture, part_picture

PLACES = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))


def test_removed_patches_are_grey_and_the_others_are_left():
    image, mask = torch.rand(3, 32, 48), torch.tensor([0, 1, 1, 0, 0, 1])
    removed = np.kron(mask.view(2, 3).numpy(), np.ones((16, 16)))[..., None]
    expected = np.where(removed, GREY, image.permute(1, 2, 0).numpy())
    assert np.array_equal(mask_picture(image, mask, (2, 3)), expected)


def test_outlines_run_between_parts_and_nowhere_else():
    parts = torch.tensor([[0, 0, 1], [0, 2, 1]])
    picture = part_picture(torch.zeros(3, 32, 48), parts.flatten(), (2, 3))
    outlined = (picture == OUTLINE).all(-1)
    assert all(line.all() for line in (outlined[:, 32], outlined[16, 16:32], outlined[16:, 16]))
    assert outlined.sum() == 32 + 16 + 16 - 1
    assert not part_picture(torch.zeros(3, 32, 48), torch.zeros(6, dtype=torch.long), (2, 3)).any()
    wide = part_picture(torch.zeros(3, 16, 64), torch.arange(64) % 16)  # by itself a grid of 4 x 16
    assert (wide == OUTLINE).all((0, 2)).nonzero()[0].tolist() == list(range(4, 64, 4))


@pytest.mark.parametrize(("size", "expected"), [((30, 60), 1), ((150, 300), 1), ((300, 159), 2), ((900, 1200), 6)])
def test_outlines_are_as_wide_as_a_150th_of_the_shorter_side(size, expected):
    parts = torch.tensor([[0, 0, 0], [0, 1, 0]])
    picture = part_picture(torch.zeros(3, *size), parts.flatten(), (2, 3))
    outlined = (picture == OUTLINE).all(-1)
    below, across = outlined[size[0] * 3 // 4], outlined[:, size[1] // 2]
    first, second = size[1] // 3, size[1] * 2 // 3
    for lines, places in ((below, [first, second]), (across, [size[0] // 2])):
        assert lines.sum() == expected * len(places)
        for place in places:
            assert lines[place - expected // 2 : place - expected // 2 + expected].all()


@pytest.mark.parametrize("colour", [None, 0.0, 0.5, 1.0])
def test_removed_patches_can_be_seen_in_pictures_without_colour(colour):
    grey = torch.rand(1, 16, 16) if colour is None else torch.full((1, 16, 16), colour)
    mask = torch.tensor([0, 1, 1, 0])
    picture = mask_picture(grey, mask)
    removed = np.ptp(picture, axis=2) > 0.2
    assert np.array_equal(removed, np.kron([[0, 1], [1, 0]], np.ones((8, 8))) == 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    rgb = (grey - mean) / std * std + mean  # equal but for rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what leaves [0, 1] by rounding is no reason to warn
        assert np.allclose(mask_picture(rgb, mask), picture, atol=1e-5)


def test_evolution_figure_has_a_column_for_each_point(tmp_path):
    images, parts = torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, -1) // 4
    mask = (parts > 1).float()
    figure = evolution_figure(images, [mask] * 3, [None, parts, parts], ["a", "b", "c"])
    assert len(figure.axes) == 4 * 4
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "a", "b", "c"]
    assert [ax.get_ylabel() for ax in figure.axes[1::4]] == ["parts", "visible"] * 2
    figure.savefig(tmp_path / "evolution.png")
    titles = [ax.title.get_window_extent().y0 for ax in figure.axes[:4]]
    assert max(titles) - min(titles) < 1, "on one line, where there were no parts, too"
    figure = evolution_figure(images, [mask], [None], ["a"])
    assert len(figure.axes) == 2 * 2
    assert [ax.get_ylabel() for ax in figure.axes[1::2]] == ["visible"] * 2


@pytest.mark.parametrize("colours", [False, True])
def test_arrays_and_pictures_of_pil_are_shown_as_tensors_are(colours):
    image, parts, mask = torch.randint(256, (3, 16, 24), dtype=torch.uint8), torch.arange(6), [0, 1, 0, 0, 1, 0]
    last, before = image.permute(1, 2, 0).numpy(), image.clone()
    expected = part_picture(image, parts, (2, 3), colours=colours)
    same = [last, last[:, ::-1].copy()[:, ::-1], image.numpy(), last / 255, image.bfloat16() / 255, image.float() / 255]
    for other in [*same, Image.fromarray(last)]:
        assert np.allclose(part_picture(other, parts.numpy(), (2, 3), colours=colours), expected, atol=0.01)
        masked = mask_picture(other, np.array(mask), (2, 3))
        assert np.allclose(masked, mask_picture(image, torch.tensor(mask), (2, 3)), atol=0.01)
    assert torch.equal(image, before), "nothing is written into what was given"
    for mode in ("L", "RGBA", "P"):
        assert mask_picture(Image.new(mode, (24, 16), 7), torch.zeros(4)).shape == (16, 24, 3)
    figure = evolution_figure([Image.fromarray(last)] * 2, [np.zeros((2, 6))], [None], ["a"], (2, 3))
    assert np.allclose(figure.axes[0].images[0].get_array(), last / 255)

    grey = torch.rand(16, 24)
    expected = part_picture(grey.expand(3, -1, -1), parts, colours=colours)
    for other in (grey, grey[None], grey[..., None].numpy(), grey.numpy()):
        assert np.array_equal(part_picture(other, parts, colours=colours), expected)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, torch.nan, torch.inf])
def test_values_that_leave_the_range_are_cut_off_with_one_warning(value):
    images, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.long)
    images[1, 0, 0, 0] = value
    pictures = []
    for call in (
        lambda: pictures.append(mask_picture(images[1], mask[1])),
        lambda: pictures.append(part_picture(images[1], mask[1], colours=True)),
        lambda: evolution_figure(images, [mask] * 3, [mask] * 3, ["a", "b", "c"]),
    ):
        with pytest.warns(UserWarning, match="std") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]
    assert all(0 <= picture.min() <= picture.max() <= 1 for picture in pictures)
    with pytest.warns(UserWarning, match=r"0 to 200.*uint8"):
        mask_picture(torch.tensor([0, 200]).expand(3, 2, 2), mask[0])


@pytest.mark.parametrize("size", [(32, 32), (32, 128), (128, 32)])
def test_titles_do_not_overlap(size):
    titles = ["epoch 399, alpha 1.00, 10 parts", "W" * 40, "a rather long title for a narrow column", "m\nm", ""]
    figure = evolution_figure(torch.rand(1, 3, *size), [torch.zeros(1, 4)] * 5, [None] * 5, titles)
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes[:6]]
    for left, right in pairwise(boxes):
        assert left.x1 < right.x0
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    for title, ax in zip(titles, figure.axes[1:6], strict=True):
        assert ax.get_title().split() == title.split() or "W" in title
    assert figure.axes[1].get_title() == "epoch 399,\nalpha 1.00,\n10 parts", "broken after its commas"


@pytest.mark.parametrize("count", [1, 7, 20])
def test_a_colour_is_a_part_and_a_part_a_colour(count):
    image, parts = torch.full((3, 16, 16), 0.5), torch.arange(64) % count * 1000
    picture = part_picture(image, parts, colours=True)
    assert picture.dtype == np.float32
    colours = picture[1::2, 1::2].reshape(64, 3)
    same = (colours[:, None] == colours).all(-1)
    assert np.array_equal(same, (parts[:, None] == parts).numpy())
    far = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert far[~same].min(initial=1) > 0.15
    white, black = (part_picture(image * 0 + value, parts, colours=True) for value in (1, 0))
    assert (white - black).min() > 0.3, "the picture is seen through the colours"


@pytest.mark.parametrize("count", [5, 10, 20, 40, 196])
def test_neighbours_are_told_apart(count):
    centres = 14 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    parts = torch.arange(196) if count == 196 else torch.cdist(PLACES, centres).argmin(1)
    picture = part_picture(torch.full((3, 14, 14), 0.5), parts, colours=True)
    grid = parts.view(14, 14).numpy()
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        border = grid[one] != grid[other]
        assert np.linalg.norm(picture[one] - picture[other], axis=-1)[border].min() > 0.15


def test_parts_keep_their_colours_where_others_are_split():
    generator = torch.Generator().manual_seed(0)
    before = changed = 0
    for _ in range(10):
        centres = 14 * torch.rand(20, 2, generator=generator)
        parts, colours = torch.zeros(196, dtype=torch.long), None
        for count in range(2, 15):
            ours = parts == parts[torch.randint(196, (), generator=generator)]  # the larger, the likelier
            one, other = torch.cdist(PLACES[ours], centres[torch.randperm(20, generator=generator)[:2]]).unbind(1)
            split = parts.clone()
            split[ours] = torch.where(one < other, parts[ours], count)
            split = split.unique(return_inverse=True)[1]  # in another order
            picture = part_picture(torch.full((3, 14, 14), 0.5), split, colours=True).reshape(196, 3)
            if colours is not None:
                changed += int((picture != colours).any(1)[~ours].sum())
                before += int((~ours).sum())
            parts, colours = split, picture
    assert changed < 0.05 * before


@pytest.mark.parametrize(("channels", "patches"), [(2, [4]), (13, [4]), (3, [2, 4]), (3, [5])])
@pytest.mark.parametrize("picture", [mask_picture, part_picture])
def test_shapes_that_are_refused_are_named(picture, channels, patches):
    with pytest.raises(ValueError, match=rf"{patches if channels == 3 else channels}".strip("[]")):
        picture(torch.zeros(channels, 8, 8), torch.zeros(patches, dtype=torch.long))


def test_labels_are_integers_and_masks_0_or_1():
    image, parts, mask = torch.rand(3, 28, 28), torch.arange(49) // 7, torch.arange(49) % 2
    for labels in (parts.float() / 2, parts.numpy() / 2, parts * 1j, parts / 0):
        for colours in (False, True):
            with pytest.raises(ValueError, match="dtype"):
                part_picture(image, labels, colours=colours)
    for other, value in ((mask * 0.5, "0.5"), (mask * 2, "2"), (-mask, "-1"), (mask / 0, "nan")):
        with pytest.raises(ValueError, match=value):
            mask_picture(image, other)
    for same in (mask.float(), mask.bool(), mask.numpy(), mask.byte().numpy()):
        assert np.array_equal(mask_picture(image, same), mask_picture(image, mask))
    for same in (parts.int().numpy(), parts.float()):
        assert np.array_equal(part_picture(image, same), part_picture(image, parts))


def _split(row, steps):
    """The frames of a picture of a clip, and whether the gaps between them are white."""
    width = (row.shape[1] + 2) // steps - 2
    frames = [row[:, start : start + width] for start in range(0, row.shape[1], width + 2)]
    gaps = [row[:, start - 2 : start] for start in range(width + 2, row.shape[1], width + 2)]
    assert len(frames) == steps
    assert all((gap == 1).all() for gap in gaps)
    return frames


@pytest.mark.parametrize("each", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1, 2, 3), (2, 3, 2), (3, 1, 4), (4, 2, 2)])
def test_a_frame_of_a_clip_is_the_picture_of_its_middle_image(grid, each):
    clip = torch.rand(3, grid[0] * each, 20, 26)
    middle = clip[:, each // 2 :: each].unbind(1)
    for values in (torch.randint(2, grid).flatten(), torch.zeros(grid).flatten(), torch.ones(grid).flatten()):
        for draw in (mask_picture, part_picture):
            row = draw(clip, values, grid)
            assert row.dtype == np.float32
            steps = values.view(grid[0], -1)
            for frame, image, step in zip(_split(row, grid[0]), middle, steps, strict=True):
                assert np.array_equal(frame, draw(image, step, grid[1:]))


def test_a_removed_patch_is_grey_in_its_frame_and_place_alone():
    clip, mask = torch.rand(3, 4, 16, 24), torch.zeros(2, 2, 3)
    mask[1, 0, 2] = 1
    first, second = _split(mask_picture(clip, mask.flatten(), (2, 2, 3)), 2)
    assert np.array_equal(first, clip[:, 1].permute(1, 2, 0).numpy())
    grey = (second == GREY).all(-1)
    assert grey[:8, 16:].all()
    assert grey.sum() == 8 * 8


@pytest.mark.parametrize("count", [2, 20, 60])
def test_a_part_has_one_colour_in_all_frames_and_neighbours_differ(count):
    grid = (4, 6, 5)
    parts = torch.randint(count, (grid[0] * grid[1] * grid[2],), generator=torch.Generator().manual_seed(0))
    row = part_picture(torch.full((4, 6, 5), 0.5), parts, grid, colours=True)
    colours, parts = np.stack(_split(row, 4)), parts.view(grid).numpy()
    for part in np.unique(parts):
        assert (colours[parts == part] == colours[parts == part][0]).all()
    for axis in range(3 if count <= 20 else 0):
        lines, labels = np.moveaxis(colours, axis, 0), np.moveaxis(parts, axis, 0)
        border = labels[1:] != labels[:-1]
        assert np.linalg.norm(lines[1:] - lines[:-1], axis=-1)[border].min() > 0.15


@pytest.mark.parametrize("colours", [False, True])
def test_clips_and_volumes_of_all_kinds_are_shown_alike(colours):
    clip, parts, grid = torch.randint(256, (3, 4, 16, 24), dtype=torch.uint8), torch.arange(12) // 2, (2, 2, 3)
    last, before = clip.permute(1, 2, 3, 0), clip.clone()
    expected = part_picture(clip, parts, grid, colours=colours)
    for other in (last, last.numpy(), clip.numpy(), last.numpy() / 255, clip.bfloat16() / 255):
        assert np.allclose(part_picture(other, parts.numpy(), list(grid), colours=colours), expected, atol=0.01)
    assert torch.equal(clip, before), "nothing is written into what was given"
    volume = torch.rand(4, 16, 24)
    expected = part_picture(volume.expand(3, -1, -1, -1), parts, grid, colours=colours)
    for other in (volume, volume[None], volume.numpy(), volume[..., None].numpy()):
        assert np.array_equal(part_picture(other, parts, grid, colours=colours), expected)
    blue = np.ptp(mask_picture(volume, parts == 0, grid), axis=2) > 0.2
    assert blue.sum() == blue[:8, :16].sum() == 8 * 16, "without colour, removed patches are blue"


@pytest.mark.parametrize("patches", [1, 2, 7, 40, 600])
@pytest.mark.parametrize("length", [40, 512, 4000])
def test_the_patches_of_a_series_are_bands_of_equal_width(patches, length):
    series, mask = torch.randn(2, length), torch.arange(patches) % 3 == 1
    series[:, 0] = torch.tensor([40.0, -40.0])  # the mean over channels is drawn
    whole, seen = (mask_picture(series, values, (patches,)) for values in (mask & False, mask))
    assert whole.shape == seen.shape == (64, whole.shape[1], 3)
    removed = mask.numpy().repeat(whole.shape[1] // patches)
    assert np.array_equal(seen, np.where(removed[:, None], GREY, whole))
    dark = (whole < 0.5).any(-1)
    assert dark.any(0).all(), "the wave has no holes"
    values = series.mean(0).numpy()
    place = int((values.argmax() + 0.5) * whole.shape[1] / length)
    assert dark.argmax(0)[max(place - 1, 0) : place + 2].min() == dark.argmax(0).min(), (
        "the greatest value is the highest"
    )
    parts = torch.arange(patches) // 2
    lines = (part_picture(series, parts, (patches,)) != whole).any(-1)
    width = whole.shape[1] // patches
    assert lines.any(0).nonzero()[0].tolist() == list(range(2 * width, whole.shape[1], 2 * width))
    assert lines[:, lines.any(0)].all(), "from top to bottom"


def test_bands_of_a_series_are_coloured_by_part():
    parts = torch.tensor([0, 1, 0, 2])
    picture = part_picture(torch.zeros(100), parts, (4,), colours=True)
    bands = picture[0, 64::128]
    same = (bands[:, None] == bands).all(-1)
    assert np.array_equal(same, (parts[:, None] == parts).numpy())


def test_series_of_any_values_are_drawn_and_a_gap_where_they_are_not_finite():
    draws = torch.randn(512, generator=torch.Generator().manual_seed(0))
    series, zeros = (64 * draws).round() / 64, torch.zeros(4)
    expected = mask_picture(series, zeros, (4,))
    for same in (series[None], series.expand(12, -1), series.numpy(), series * 1024 - 256, series.double()):
        assert np.array_equal(mask_picture(same, zeros, (4,)), expected)
    flat = mask_picture(torch.full((512,), 7, dtype=torch.uint8), zeros, (4,))
    assert (flat[32] < 0.5).all()
    assert (flat != 1).any(-1).sum() == 512, "one line, in the middle"
    for value in (torch.nan, torch.inf):
        series[200:300] = value
        white = (mask_picture(series, zeros, (4,)) == 1).all((0, 2))
        assert white[201:299].all()
        assert white.sum() <= 100


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((3, 8, 16, 16), None),
        ((3, 8, 16, 16), (2, 4)),
        ((3, 8, 16, 16), (8,)),
        ((3, 7, 16, 16), (2, 2, 2)),
        ((2, 8, 16, 16), (2, 2, 2)),
        ((1, 3, 8, 16, 16), (2, 2, 2)),
        ((16, 16), (2, 2, 2)),
        ((16, 16, 3), (2, 2, 2)),
        ((0, 16, 16), (2, 2, 2)),
        ((100,), (2, 4)),
        ((100,), None),
        ((3, 16, 16), (8,)),
        ((0,), (8,)),
    ],
)
def test_a_picture_and_a_grid_that_do_not_fit_are_repeated(shape, grid):
    image, values = torch.zeros(shape), torch.zeros(8, dtype=torch.long)
    message = re.escape(f"image has shape {list(shape)}, which does not fit grid_size={grid}")
    for draw in (mask_picture, part_picture):
        with pytest.raises(ValueError, match=message):
            draw(image, values, grid)
    with pytest.raises(ValueError, match=message):
        evolution_figure([image], [values[None]], [None], ["a"], grid)
    with pytest.raises(ValueError, match=re.escape("[16, 16, 3], which does not fit grid_size=(2, 2, 2)")):
        mask_picture(Image.new("RGB", (16, 16)), values, (2, 2, 2))


@pytest.mark.parametrize(
    ("images", "grid"), [(torch.rand(2, 3, 8, 32, 32), (4, 2, 2)), (torch.randn(2, 1, 4000), (16,))]
)
def test_a_figure_has_clips_and_series_below_one_another_high_enough_to_see_something(images, grid):
    parts = torch.arange(16).expand(2, -1) // 4
    figure = evolution_figure(images, [parts > 1] * 2, [None, parts], ["a", "b"], grid)
    figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == 2 * (1 + 1 + 2)
    for ax in shown:
        height, width = ax.images[0].get_array().shape[:2]
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(width / height, rel=0.01)
        assert box.height > 0.7 * figure.dpi, "high enough to see something"
    for index in range(2):  # of the last point, from the eighth on
        parts_of, visible = (figure.axes[8 + 2 * index + row].images[0].get_array() for row in range(2))
        assert np.array_equal(parts_of, part_picture(images[index], parts[index], grid))
        assert np.array_equal(visible, mask_picture(images[index], parts[index] > 1, grid))
