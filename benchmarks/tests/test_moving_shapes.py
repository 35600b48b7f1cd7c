"""Planted shapes that move, and how parts are scored against them."""

import moving_shapes as script
import numpy as np
import planted_clips
import pytest
import torch
from planted import attention_between
from planted_clips import PATCH, most_frequent, moving_shapes
from sklearn.metrics import adjusted_rand_score

from maskevolve import GraphCutPartitioner

GRID = (3, 6, 7)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_patch_has_its_most_frequent_label_and_the_least_of_ties():
    labels = torch.tensor([[[2, 2, 0, 1]], [[0, 2, 0, 1]]])  # 2 frames, 1 x 4 pixels
    assert most_frequent(labels, (1, 1, 2)).tolist() == [[[2, 0]]]


def test_nothing_moves_at_no_speed_but_the_noise():
    clip = moving_shapes(0, rng(), GRID)
    assert (clip.labels == clip.labels[:1]).all()
    apart = (clip.images[:, 1:] - clip.images[:, :-1]).std()
    assert apart == pytest.approx(planted_clips.NOISE * 2**0.5, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_labels_say_where_the_pixels_of_a_shape_are(seed, monkeypatch):
    monkeypatch.setattr(planted_clips, "NOISE", 0)
    monkeypatch.setattr(planted_clips, "STRIPES", 0)
    clip = moving_shapes(0.5, rng(seed), (4, 8, 9), num_shapes=1)
    shown = (clip.images != clip.images[:, :1, :1, :1].expand_as(clip.images)).any(0)
    if shown.float().mean() > 0.5:  # the corner was in the shape
        shown = ~shown
    share = shown.view(4, PATCH[0], 8, PATCH[1], 9, PATCH[2]).float().mean((1, 3, 5))
    assert torch.equal(clip.labels == 1, share > 0.5)
    assert 0 < (clip.labels == 1).float().mean() < 0.5


def test_fast_shapes_change_more_patches_than_slow_ones():
    def changed(speed):
        clips = [moving_shapes(speed, rng(seed), (8, 8, 8)) for seed in range(8)]
        return sum(int((clip.labels[1:] != clip.labels[:-1]).sum()) for clip in clips)

    assert 0 < changed(0.05) < changed(0.5)


def test_the_index_is_that_of_scikit_learn_within_frames_and_over_the_clip():
    parts, labels = (torch.randint(3, GRID, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    within, over = script.agreement(parts.view(1, -1), labels)
    frames = [adjusted_rand_score(*(frame.flatten() for frame in pair)) for pair in zip(parts, labels, strict=True)]
    assert within == pytest.approx(np.mean(frames), abs=1e-12)
    assert over == pytest.approx(adjusted_rand_score(parts.flatten(), labels.flatten()), abs=1e-12)


@pytest.mark.parametrize("pictures", [True, False])
def test_frames_that_are_cut_alone_are_those_that_the_partitioner_is_given_alone(pictures):
    clip, cut = moving_shapes(0.5, rng(), GRID), GraphCutPartitioner(3)
    affinity = attention_between(clip.labels.view(1, -1), rng(), strength=1, noise=0.5)[:, 0]
    found = script.cut_frames(cut, affinity, GRID, clip.images[None] if pictures else None).view(GRID)
    for frame, parts in enumerate(found):
        place = slice(42 * frame, 42 * frame + 42)
        pixels = clip.images[:, 2 * frame : 2 * frame + 2].flatten(0, 1)[None] if pictures else None
        alone = cut(affinity[:, place, place], grid_size=GRID[1:], images=pixels)
        assert torch.equal(parts.flatten() - script.NUM_PARTS * frame, alone[0])


def test_an_affinity_with_hardly_any_noise_gives_the_shapes_in_space_and_time_only(monkeypatch):
    monkeypatch.setattr(script, "DEVIATION", 0.01)
    scores = script.measure(moving_shapes(0.5, rng(), (4, 8, 8), num_shapes=2), rng(), "cpu")
    assert min(scores["graph cut, space and time", False]) > 0.95
    within, over = scores["graph cut, frame by frame", False]
    assert within > 0.9 > over
    assert scores["graph cut, tubes", False][1] < 0.9
    assert scores[script.TUBES_OF_TRUTH, None][1] < 0.9


def test_a_summary_has_means_with_their_standard_errors():
    clips = [{("cut", True): (0.5, 0.25)}, {("cut", True): (1.0, 0.75)}]
    (row,) = script.summary("slow", clips)
    assert row == {"name": "cut", "motion": "slow", "pictures": True, "clips": 2} | {
        "within": 0.75,
        "within_error": pytest.approx(0.25),
        "over": 0.5,
        "over_error": pytest.approx(0.25),
    }
