"""The masks of clips: ours and those that they are set against."""

import clips
import common
import peers
import pytest
import torch

GRID, PATCHES = clips.GRID, 8 * 14 * 14


@pytest.fixture
def untimed(monkeypatch):
    """Each function is called once, and no clock is read."""

    def compare(functions, baseline, device):
        for function in functions.values():
            function()
        return [{"name": name, "baseline": baseline} for name in functions]

    monkeypatch.setattr(common, "compare", compare)


def test_the_tubes_of_videomae_are_the_same_in_each_frame_and_differ_between_clips():
    mask = peers.videomae_tubes(3, GRID, 0.9).view(3, 8, 196)
    assert mask.dtype == torch.bool
    assert (mask == mask[:, :1]).all()
    assert (mask[:, 0].sum(1) == 176).all()
    assert not torch.equal(mask[0], mask[1])


def test_what_videomae_takes_is_what_its_masks_leave(monkeypatch):
    x, mask = torch.arange(2.0 * 2 * 9).view(2, 18, 1), torch.arange(18).expand(2, -1) % 9 > 2
    monkeypatch.setattr(peers, "videomae_tubes", lambda *_: mask)
    assert peers.videomae_take_visible(x, (2, 3, 3), 0.7).flatten(1).tolist() == [
        [18 * clip + patch for patch in (0, 1, 2, 9, 10, 11)] for clip in range(2)
    ]


def test_the_four_values_of_mae_st_fit_each_other():
    x = torch.arange(20.0).view(1, 20, 1).repeat(3, 1, 2)
    visible, mask, restore, kept = peers.mae_st_random_masking(x, 0.75)
    assert torch.equal(visible[..., 0].long(), kept)
    assert kept.shape == (3, 5)
    assert torch.equal(mask, (restore >= 5).float())
    assert torch.equal(restore.gather(1, kept), torch.arange(5).expand(3, -1))


def test_each_mask_leaves_as_many_patches_as_the_page_says():
    x = torch.randn(2, PATCHES, 2)
    taken = {name: take(x) for name, take in clips.taking_visible(x).items()}
    left = {name: (out if isinstance(out, torch.Tensor) else out[0]).shape[1] for name, out in taken.items()}
    assert left.pop(clips.VIDEOMAE) == 8 * 20
    assert {left.pop(name) for name in list(left) if "TubeMask" in name} == {8 * 19}
    assert set(left.values()) == {156}


def test_masks_alone_have_as_many_patches_as_with_patches():
    masks = {name: draw() for name, draw in clips.alone(torch.randn(2, PATCHES, 1)).items()}
    assert {(mask.dtype, tuple(mask.shape)) for mask in masks.values()} == {(torch.bool, (2, PATCHES))}
    assert set((~masks["TubeMask of BlockMask"]).sum(1).tolist()) == {8 * 19}


@pytest.mark.parametrize("way", [clips.alone, clips.forward, clips.forward_and_backward])
def test_rows_say_what_was_measured_against_what(way, untimed):
    rows = clips.measure(way, torch.randn(1, PATCHES, 2), "cpu")
    assert {row["baseline"] for row in rows} == {clips.VIDEOMAE if way is clips.alone else clips.MAE}
    named = "mask alone" if way is clips.alone else way.__name__.replace("_", " ")
    assert {(row["batch"], row["pass"]) for row in rows} == {(1, named)}
    assert rows[0]["baseline"] in [row["name"] for row in rows]
