"""Pictures: what is grey, what is outlined, how many panels there are."""

import numpy as np
import pytest
import torch

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


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[1, 8, 8\]"):
        mask_picture(torch.zeros(1, 8, 8), torch.zeros(4))
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        mask_picture(torch.zeros(3, 8, 8), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="N=5"):
        part_picture(torch.zeros(3, 8, 8), torch.zeros(5))
