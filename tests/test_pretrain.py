"""The main job: every mask trains, pictures are written, and a run that was stopped ends like one that was not."""

import json
import re

import lightly_mae
import numpy as np
import own_parts
import pretrain
import pytest
import torch
import vit_mae
from PIL import Image

from maskevolve import PartTeacher
from maskevolve.viz import mask_picture

SMALL = "--device cpu --image-size 32 --width 32 --depth 2 --heads 2 --batch-size 64 --seed 3"
PICTURES = {"loss.png", "evolution.png", "reconstruction.png"}
METHOD = "method.png"  # tells of a grid and of parts


def run(out, *options):
    pretrain.main([*SMALL.split(), "--out", str(out), *map(str, options)])
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose checkpoints alone are looked at: most of the time of so short a run is drawing."""
    monkeypatch.setattr(pretrain, "write_results", lambda *_: None)


def equal(a, b):
    """Whether two nested states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("mask", pretrain.MASKS)
def test_every_mask_trains_and_draws(tmp_path, mask):
    state = run(tmp_path, "--mask", mask, "--epochs", 2)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == (PICTURES | {METHOD} if mask == "evolving" else PICTURES)
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert [snapshot["epoch"] for snapshot in state["snapshots"]] == [0, 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, "--epochs", 3)


@pytest.mark.parametrize("stop_at", [0, 4, 11])
def test_a_stopped_run_ends_like_one_that_was_not(whole, tmp_path, monkeypatch, stop_at):
    folder, expected = whole
    update, updates = PartTeacher.update, []

    def stop(self, model):
        updates.append(1)
        if len(updates) > stop_at:
            raise KeyboardInterrupt
        update(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(PartTeacher, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--epochs", 3)
    assert equal(expected, run(tmp_path, "--epochs", 3, "--resume"))
    for name in ("metrics.jsonl", "evolution.png", METHOD):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_picture_of_the_method_shows_the_masks_of_the_run(whole):
    _, state = whole
    photos = torch.rand(pretrain.EVOLVING, 3, 48, 48)
    axes = np.array(pretrain.draw_method(photos, state["snapshots"]).axes).reshape(pretrain.EVOLVING, -1)
    assert [ax.get_title() for ax in axes[0, 2:]] == [snapshot["title"] for snapshot in state["snapshots"]]
    for row, photo in enumerate(photos):
        for ax, snapshot in zip(axes[row, 2:], state["snapshots"], strict=True):
            expected = mask_picture(photo, snapshot["mask"][row])
            assert np.array_equal(ax.images[0].get_array(), expected)


def test_epochs_are_counted_from_0_and_each_has_one_column(whole):
    folder, state = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plotted = pretrain.draw_loss(rows).axes[0].lines[0].get_xdata()
    columns = [int(snapshot["title"].split()[1]) for snapshot in state["snapshots"]]
    assert [row["epoch"] for row in rows] == list(plotted) == columns == [0, 1, 2]


@pytest.mark.parametrize(("epochs", "shown"), [(1, [0]), (5, [0, 1, 3, 4])])
def test_the_first_and_the_last_epoch_are_shown(tmp_path, epochs, shown):
    state = run(tmp_path, "--epochs", epochs, "--mask", "random", "--depth", 1)
    assert [snapshot["epoch"] for snapshot in state["snapshots"]] == shown
    assert (tmp_path / "evolution.png").exists()


def test_the_pictured_masks_are_the_first_that_the_seed_draws(whole):
    for snapshot in whole[1]["snapshots"]:
        pretrain.seed_everything(3, 0)
        masking = pretrain.MASKS["evolving"](3).set_epoch(snapshot["epoch"])
        removed = masking.sample(*snapshot["mask"].shape[:1], 4, 0.75, parts=snapshot["parts"])
        assert torch.equal(removed.float(), snapshot["mask"])


@pytest.mark.parametrize("script", [pretrain, own_parts, lightly_mae, vit_mae], ids=lambda script: script.__name__)
def test_images_of_no_whole_patches_are_refused(script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(["--image-size", "100"])
    assert re.search(r"error: .*100.* 96 or 104", capsys.readouterr().err)


def test_seeds_make_runs(no_pictures, tmp_path):
    first = run(tmp_path / "a", "--epochs", 1)
    again = run(tmp_path / "b", "--epochs", 1)
    other = run(tmp_path / "c", "--epochs", 1, "--seed", 4)
    assert equal(first, again)
    assert not equal(first["model"], other["model"])


def test_any_folder_of_images(no_pictures, tmp_path):
    folder = tmp_path / "data" / "below"
    folder.mkdir(parents=True)
    for index, mode in enumerate(("RGB", "L", "RGBA")):
        Image.new(mode, (50 + 20 * index, 40)).save(folder / f"{mode}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image either")
    with pytest.warns(UserWarning, match=r"broken\.jpg"):
        run(tmp_path / "out", "--data", folder.parent, "--epochs", 1)
    with pytest.raises(SystemExit, match="no image"):
        run(tmp_path / "out2", "--data", tmp_path / "out" / "nothing", "--epochs", 1)


def test_a_run_is_not_overwritten_nor_mixed(no_pictures, tmp_path):
    state = run(tmp_path, "--epochs", 1)
    with pytest.raises(SystemExit, match="--resume"):
        run(tmp_path, "--epochs", 1)
    with pytest.raises(SystemExit, match="--epochs"):
        run(tmp_path, "--epochs", 2, "--resume")
    assert equal(state, run(tmp_path, "--epochs", 1, "--resume")), "nothing left to do"
