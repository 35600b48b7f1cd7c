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
    assert outlined[:16, 31:33].all()
    assert outlined[15:17, 16:32].all()
    assert not outlined[:15, :31].any()
    assert not outlined[:, 33:].any()
    one_part = part_picture(torch.zeros(3, 32, 48), torch.zeros(6, dtype=torch.long), (2, 3))
    assert not one_part.any()


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
    figure.savefig(tmp_path / "evolution.png")
    assert len(evolution_figure(images, [mask], [None], ["a"]).axes) == 2 * 2


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
