"""Tests of the measures of benchmarks/segmented.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmented import UNLABELLED, agreement, majority, read_folder
from sklearn.metrics import adjusted_rand_score, v_measure_score

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("labels", [1, 2, 5, 40])
@pytest.mark.parametrize("parts", [1, 3, 16])
def test_measures_are_those_of_scikit_learn(parts, labels):
    ours, person = RNG.integers(parts, size=(4, 4)), RNG.integers(UNLABELLED, labels, size=(16, 16))
    known = person != UNLABELLED
    pair = person[known], ours.repeat(4, 0).repeat(4, 1)[known]
    scores = agreement(ours, [person])
    assert scores["index"] == pytest.approx([adjusted_rand_score(*pair)], abs=1e-12)
    assert scores["v"] == pytest.approx([v_measure_score(*pair)], abs=1e-12)


def test_the_persons_own_partition_is_perfect():
    person = np.arange(16).reshape(4, 4).repeat(2, 0).repeat(2, 1) // 3
    for parts in (person, majority(person, (4, 4))):
        assert agreement(parts, [person]) == {measure: [1.0] for measure in ("index", "v", "covering", "recall")}


def test_covering_and_recall_by_hand():
    person = np.array([[0, 0, 0, 1]] * 4)
    scores = agreement(np.array([[0, 1], [0, 1]]), [person])
    assert scores["covering"] == [0.75]  # of the right half, one label covers half
    assert scores["recall"] == [1.0]  # on the grid of the parts, a tie goes to the least label: no outline
    scores = agreement(np.array([[0, 0, 1, 1]] * 4), [person])
    assert scores["recall"] == [0.0]
    scores = agreement(np.array([[0, 0, 1, 2], [0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 1, 1]]), [person])
    assert scores["recall"] == [0.5]


def test_pixels_can_be_compared_on_a_coarser_grid():
    person = np.arange(64).reshape(8, 8) % 8 // 4
    moved = np.roll(person, 1, axis=1)
    moved[:, 0] = 0
    assert agreement(moved, [person])["recall"] == [0.0]
    assert agreement(moved, [person], (2, 2))["recall"] == [1.0]


def test_majority_takes_the_most_frequent_label():
    labels = np.array([[5, 5, 7, 9], [5, 2, 9, 9]])
    assert majority(labels, (1, 2)).tolist() == [[5, 9]]


def test_a_folder_is_read_with_one_person_or_several(tmp_path: Path):
    for name, size in {"a": (12, 8), "b": (12, 8), "c": (8, 12)}.items():
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.jpg")
    save_labels(tmp_path / "a.png", [0, 0, 3, 3])
    save_labels(tmp_path / "b_a0.png", [0, 0, 3, 3])
    save_labels(tmp_path / "b_a1.png", [1, 1, 1, 1])
    save_labels(tmp_path / "c.png", [0, 0, 0, 0])
    a, b = read_folder(tmp_path, 4)
    assert (a.name, b.name) == ("a", "b")
    assert a.image.shape == (3, 4, 4)
    assert [person[0].tolist() for person in a.people] == [[UNLABELLED, UNLABELLED, 3, 3]]
    assert [person[0].tolist() for person in b.people] == [[0, 0, 3, 3], [1, 1, 1, 1]]


def test_pictures_of_one_shape_are_read_whole_and_pieces_are_numbered(tmp_path: Path):
    Image.new("RGB", (32, 48), (255, 0, 0)).save(tmp_path / "a.jpg")
    labels = np.zeros((48, 32), dtype=np.uint8)
    labels[:8], labels[-8:], labels[20:28, :8] = 7, 7, 2
    Image.fromarray(labels).save(tmp_path / "a.png")
    (found,) = read_folder(tmp_path, 32, by_piece=True)
    assert found.image.shape == (3, 48, 32)
    assert sorted(np.unique(found.people[0])) == [UNLABELLED, 1, 2, 3]
    assert len({found.people[0][0, 0], found.people[0][-1, 0], found.people[0][24, 0]}) == 3


def test_a_folder_without_labels_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="holds no NAME"):
        read_folder(tmp_path, 4)


def save_labels(path: Path, columns: list[int]) -> None:
    """A label map of 8 x 12 pixels whose middle square has these columns, two pixels wide each."""
    square = np.repeat(columns, 2)
    Image.fromarray(np.tile(np.concatenate([[0, 0], square, [0, 0]]), (8, 1)).astype(np.uint8)).save(path)
