"""Pictures: what is grey, what is outlined, how many panels there are."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from maskevolve.viz import GREY, OUTLINE, evolution_figure, mask_picture, part_picture


def test_removed_patches_are_grey_and_the_others_are_left():
    image = torch.rand(3, 32, 48)
    mask = torch.tensor([0, 1, 1, 0, 0, 1])
    picture = mask_picture(image, mask, (2, 3))
    for patch, removed in enumerate(mask):
        row, column = divmod(patch, 3)
        block = (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
        expected = GREY if removed else image.permute(1, 2, 0).numpy()[block]
        assert np.array_equal(picture[block], np.broadcast_to(expected, (16, 16, 3)))


def test_outlines_run_between_parts_and_nowhere_else():
    parts = torch.tensor([[0, 0, 1], [0, 2, 1]])
    picture = part_picture(torch.zeros(3, 32, 48), parts.flatten(), (2, 3))
    outlined = (picture == OUTLINE).all(-1)
    assert outlined[:, 32].all()
    assert outlined[16, 16:32].all()
    assert outlined[16:, 16].all()
    assert outlined.sum() == 32 + 16 + 16 - 1
    one_part = part_picture(torch.zeros(3, 32, 48), torch.zeros(6, dtype=torch.long), (2, 3))
    assert not one_part.any()


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
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    mean, std = mean[:, None, None], std[:, None, None]
    rgb = (grey - mean) / std * std + mean  # equal but for rounding
    assert np.allclose(mask_picture(rgb, mask), picture, atol=1e-5)


def test_the_image_is_not_changed():
    image = torch.rand(3, 16, 16)
    before = image.clone()
    mask_picture(image, torch.ones(4))
    part_picture(image, torch.arange(4))
    assert torch.equal(image, before)


def test_bytes_and_floats_give_the_same_picture():
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    assert np.allclose(mask_picture(image, torch.zeros(4)), mask_picture(image.float() / 255, torch.zeros(4)))


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


def test_long_titles_are_broken_after_their_commas():
    titles = ["epoch 0, alpha 0.17", "a, b"]
    figure = evolution_figure(torch.rand(1, 3, 8, 8), [torch.zeros(1, 4)] * 2, [None] * 2, titles)
    assert [ax.get_title() for ax in figure.axes[1:3]] == ["epoch 0,\nalpha 0.17", "a, b"]


@pytest.mark.parametrize("colours", [False, True])
def test_arrays_and_pictures_of_pil_are_shown_as_tensors_are(colours):
    image, parts = torch.randint(256, (3, 16, 24), dtype=torch.uint8), torch.arange(6)
    last = image.permute(1, 2, 0).numpy()
    expected = part_picture(image, parts, (2, 3), colours=colours)
    same = [last, last[:, ::-1][:, ::-1], image.numpy(), last / 255, Image.fromarray(last), image.bfloat16() / 255]
    for other in same:
        assert np.allclose(part_picture(other, parts.numpy(), (2, 3), colours=colours), expected, atol=0.01)
        masked = mask_picture(other, np.array([0, 1, 0, 0, 1, 0]), (2, 3))
        assert np.allclose(masked, mask_picture(image, torch.tensor([0, 1, 0, 0, 1, 0]), (2, 3)), atol=0.01)
    assert np.array_equal(last, image.permute(1, 2, 0).numpy()), "nothing is written into what was given"
    for mode in ("L", "RGBA", "P"):
        grey = Image.new(mode, (24, 16), 7)
        assert mask_picture(grey, torch.zeros(4)).shape == (16, 24, 3)
    figure = evolution_figure([Image.fromarray(last)] * 2, [np.zeros((2, 6))], [None], ["a"], (2, 3))
    assert np.allclose(figure.axes[0].images[0].get_array(), last / 255)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, torch.nan, torch.inf])
def test_values_that_leave_the_range_are_cut_off_with_a_warning(value):
    images, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.long)
    images[1, 0, 0, 0] = value
    with pytest.warns(UserWarning, match=r"std \+ mean") as caught:
        picture = mask_picture(images[1], mask[1])
    assert caught[0].filename == __file__
    assert picture.min() >= 0
    assert picture.max() <= 1
    with pytest.warns(UserWarning, match="values of the images") as caught:
        part_picture(images[1], mask[1], colours=True)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="values of the images") as caught:
        evolution_figure(images, [mask] * 3, [mask] * 3, ["a", "b", "c"])
    assert len(caught) == 1, "one for all"
    with pytest.warns(UserWarning, match="reach from 0 to 200: .*as uint8"):
        mask_picture(torch.tensor([0, 200]).expand(3, 2, 2), mask[0])


def test_what_a_normalisation_was_undone_for_is_shown_without_a_warning():
    images, std, mean = torch.rand(1, 3, 16, 16), torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.4, 0.5, 0.6])
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 1
    std, mean = std[:, None, None], mean[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask_picture((images[0] - mean) / std * std + mean, torch.zeros(4))


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


def test_a_colour_is_a_part_and_a_part_a_colour():
    image, parts = torch.full((3, 16, 16), 0.5), torch.arange(64) % 40 * 1000
    picture = part_picture(image, parts, colours=True)
    colours = picture[1::2, 1::2].reshape(64, 3)
    same = (colours[:, None] == colours).all(-1)
    assert np.array_equal(same, (parts[:, None] == parts).numpy())
    far = np.abs(colours[:, None] - colours).max(-1)
    assert far[~same].min() > 0.02
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture.dtype == np.float32


def test_parts_keep_their_colours_where_others_are_split():
    generator = torch.Generator().manual_seed(0)
    before = changed = 0
    for _ in range(10):
        centres = 14 * torch.rand(20, 2, generator=generator)
        places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
        parts, colours = torch.zeros(196, dtype=torch.long), None
        for count in range(2, 15):
            ours = parts == parts[torch.randint(196, (), generator=generator)]  # the larger, the likelier
            one, other = torch.cdist(places[ours], centres[torch.randperm(20, generator=generator)[:2]]).unbind(1)
            split = parts.clone()
            split[ours] = torch.where(one < other, parts[ours], count)
            split = split.unique(return_inverse=True)[1]  # in another order
            picture = part_picture(torch.full((3, 14, 14), 0.5), split, colours=True).reshape(196, 3)
            if colours is not None:
                changed += int((np.abs(picture - colours).max(1) > 1e-6)[~ours].sum())
                before += int((~ours).sum())
            parts, colours = split, picture
    assert changed < 0.04 * before


def test_neighbours_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    for count in (5, 10, 20, 40):
        centres = 14 * torch.rand(count, 2, generator=generator)
        places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
        parts = torch.cdist(places, centres).argmin(1)
        picture = part_picture(torch.full((3, 14, 14), 0.5), parts, colours=True)
        grid = parts.view(14, 14).numpy()
        for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            border = grid[one] != grid[other]
            distances = np.linalg.norm(picture[one] - picture[other], axis=-1)[border]
            assert distances.min() > 0.2


def test_no_two_of_many_parts_have_one_colour():
    picture = part_picture(torch.full((3, 14, 14), 0.5), torch.randperm(196), colours=True)
    assert len(np.unique(picture.reshape(196, 3), axis=0)) == 196


def test_the_picture_is_seen_through_the_colours():
    dark, light = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    parts = torch.tensor([0, 1, 1, 0])
    assert (part_picture(light, parts, colours=True) - part_picture(dark, parts, colours=True)).min() > 0.3


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[2, 8, 8\]"):
        mask_picture(torch.zeros(2, 8, 8), torch.zeros(4))
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        mask_picture(torch.zeros(3, 8, 8), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="N=5"):
        part_picture(torch.zeros(3, 8, 8), torch.zeros(5, dtype=torch.long))


def test_labels_are_integers_and_masks_0_or_1():
    image, parts, mask = torch.rand(3, 28, 28), torch.arange(49) // 7, torch.arange(49) % 2
    for labels in (parts.float() / 2, parts.numpy() / 2, parts * 1j, parts / 0):
        with pytest.raises(ValueError, match=r"parts has dtype .*parts\.long\(\)"):
            part_picture(image, labels)
        with pytest.raises(ValueError, match=r"parts has dtype"):
            part_picture(image, labels, colours=True)
    for other, value in ((mask * 0.5, "0.5"), (mask * 2, "2"), (-mask, "-1"), (mask / 0, "nan")):
        with pytest.raises(ValueError, match=rf"mask has the value {value}, but must be 0 \(keep\) or 1"):
            mask_picture(image, other)
    expected = mask_picture(image, mask)
    for same in (mask.float(), mask.bool(), mask.numpy(), mask.byte().numpy()):
        assert np.array_equal(mask_picture(image, same), expected)
    for same in (parts.int().numpy(), parts.float()):
        assert np.array_equal(part_picture(image, same), part_picture(image, parts))


def test_grey_pictures():
    grey, parts = torch.rand(32, 32), torch.arange(16) // 4
    expected = part_picture(grey.expand(3, -1, -1), parts)
    for image in (grey, grey[None], grey[..., None].numpy(), grey.numpy()):
        assert np.array_equal(part_picture(image, parts), expected)
    with pytest.raises(ValueError, match="choose three of more channels"):
        part_picture(torch.rand(13, 32, 32), parts)


def test_the_grid_of_pictures_that_are_not_square():
    picture = part_picture(torch.zeros(3, 16, 64), torch.arange(64) % 16, colours=True)
    columns = picture.reshape(4, 4, 16, 4, 3)
    assert np.array_equal(columns, np.broadcast_to(columns[:1, :1, :, :1], columns.shape))
