"""The study of pretraining: a run that was stopped ends like one that was not, and a mask that cheats is found out."""

import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mask_runs
import numpy as np
import pretraining
import processes
import pytest
import torch
from disturbed import disturbed
from mask_runs import SIZES, Run, Sets, file_name
from matplotlib.figure import Figure
from methods import METHODS, SHUFFLED, WITH_PARTS, GreenNoise
from pictures import MEAN, Data, crop, normalised, patches_in, random_crops
from PIL import Image
from regions import pairs_told_apart, read_crops, whitened
from segmented import UNLABELLED
from tables import PRIMARY, SECONDARY, study_cells
from test_pretrain import equal

CI = SIZES["ci"]
CLASSES, TRAIN, VAL = 3, 20, 6
TIMES = {"seconds", "processor_seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of a square of the colour of their class on a ground of noise."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["path,class,x0,y0,x1,y1"]
    for split, number in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            (folder / split / f"c{label}").mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                x, y = rng.integers(0, 16, 2)
                pixels[y : y + 16, x : x + 16, label] = 250
                path = f"{split}/c{label}/{index:02}.png"
                Image.fromarray(pixels).save(folder / path)
                rows.append(f'{path},"a, b",{x},{y},{x + 15},{y + 15}')
    (folder / "boxes.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """Pictures of two halves, one of them with a part that nobody has labelled."""
    folder, draws = make(tmp_path_factory.mktemp("people") / "bsds/test"), np.random.default_rng(0)
    for index in range(12):
        labels = np.ones((64, 64), np.uint8)
        labels[:, draws.integers(24, 40) :] = 2
        labels[: draws.integers(20)] = 0
        Image.fromarray(labels * 100).save(folder / f"{index}.jpg")
        Image.fromarray(labels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def sets(folder, segmented):
    return Sets.read(folder, CI, [segmented])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def work(path, sets, jobs=(("grid to part", 3),), curve=False):
    pretraining.work(0, list(jobs), "ci", sets, curve, "cpu", "this one", make(path / "out"), make(path / "runs"))
    return [json.loads((path / "out" / f"{file_name(*job)}.json").read_text()) for job in jobs]


def make(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def figures(result):
    """Without what differs between two runs of the same: times."""
    if isinstance(result, dict):
        return {key: figures(value) for key, value in result.items() if key not in TIMES}
    return [figures(value) for value in result] if isinstance(result, list) else result


STOPS = {
    "in an epoch": (mask_runs.Run, "step"),
    "in a measure": (mask_runs, "regions"),
    "in fine-tuning": (mask_runs, "fine_tune"),
    "while a checkpoint is written": (torch, "save"),
    "before it takes the place of the last": (mask_runs.os, "replace"),
    "when it is finished": (pretraining, "write"),
}


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("in an epoch", 1),
        ("in an epoch", 8),
        ("in a measure", 2),
        ("in fine-tuning", 1),
        ("while a checkpoint is written", 4),
        ("before it takes the place of the last", 7),
        ("when it is finished", 1),
    ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(whole, tmp_path, monkeypatch, sets, where, calls):
    owner, name = STOPS[where]
    function, called = getattr(owner, name), []

    def stop(*args, **kwargs):
        called.append(1)
        if len(called) == calls:
            if name == "save":
                args[1].write_bytes(b"half of it")
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, sets)
    monkeypatch.undo()
    (result,) = work(tmp_path, sets)
    assert figures(result) == figures(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sets):
    torch.set_num_threads(1)
    return work(tmp_path_factory.mktemp("whole"), sets)[0]


def test_a_model_that_is_not_pretrained_is_measured_once(sets, tmp_path):
    (result,) = work(tmp_path, sets, [("not pretrained", 0)])
    (row,) = result["curve"]
    assert (row["epoch"], row["training_loss"], result["losses"]) == (0, None, [])
    assert 0 < row["fine_tuned"] <= 1


def test_what_is_written_says_how_it_came_about(whole):
    assert [row["epoch"] for row in whole["curve"]] == [1, 2, 4]
    assert all({"regions_bsds", "training_loss"} <= row.keys() for row in whole["curve"])
    assert [row["epoch"] for row in whole["curve"] if "fine_tuned" in row] == [4]
    last = whole["curve"][-1]
    assert all(0 <= last[name] <= 1 for name in (PRIMARY | SECONDARY) if name != "regions_coco")
    assert whole["seconds"] > 0
    assert {"versions", "commits", "seed", "machine"} <= whole.keys()
    settings = whole["settings"]
    assert settings["pictures"] == {"train": CLASSES * TRAIN, "scored": CLASSES * max(1, round(0.1 * TRAIN))}
    assert settings["size"]["width"] == CI.width
    assert settings["teacher"]["decay"] == 0.99
    assert "PartMask" in settings["masking"]


def test_a_curve_adds_points_and_changes_no_end(whole, tmp_path, sets):
    (result,) = work(tmp_path, sets, curve=True)
    assert [row["epoch"] for row in result["curve"] if "fine_tuned" in row] == [1, 2, 4]
    assert figures(result["curve"][-1]) == figures(whole["curve"][-1])
    with pytest.raises(SystemExit, match=r"made with fine_tuned_at \[1, 2, 4\], not \[4\]"):
        work(tmp_path, sets)


@pytest.mark.parametrize("mask", METHODS)
def test_every_mask_trains(mask, sets):
    run = Run(mask, 0, replace(CI, epochs=2), sets, "cpu")
    while run.epoch < run.epochs:
        run.train_epoch()
    assert np.isfinite(run.losses).all()
    assert run.epochs == {"not pretrained": 0}.get(mask, 2)
    assert " at 0x" not in str(run.settings), "a run of another process would be refused"


def test_shuffled_parts_have_the_sizes_of_parts_and_lie_anywhere(sets):
    images = normalised(sets.data.val.images)
    parts, shuffled = (Run(mask, 0, CI, sets, "cpu").teacher(images) for mask in ("half by parts", SHUFFLED))
    assert not torch.equal(parts, shuffled)
    for ours, theirs in zip(parts, shuffled, strict=True):
        assert torch.equal(ours.bincount(minlength=40), theirs.bincount(minlength=40))
    assert SHUFFLED not in WITH_PARTS


def test_green_noise_is_that_of_the_page():
    page = (Path(__file__).parents[2] / "docs/own_mask.md").read_text()
    exec(
        next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "NoiseMask(" in block),
        names := {},
    )
    masks = [
        mask.sample(4, 16, generator=torch.Generator().manual_seed(0))
        for mask in (GreenNoise(), names["NoiseMask"]("green"))
    ]
    assert torch.equal(*masks)


def test_masks_of_a_seed_share_weights_and_batches(monkeypatch, sets):
    def begin(mask, seed):
        run, seen = Run(mask, seed, replace(CI, epochs=1), sets, "cpu"), []
        start = run.model.state_dict()["encoder.cls_token"].clone(), run.model.decoder_pred.weight.clone()
        monkeypatch.setattr(run, "step", lambda images, *_: seen.append(images) or images.mean())
        run.train_epoch()
        return [*start, *seen]

    random = begin("random", 0)
    assert equal(random, begin("half by parts, EM", 0))
    assert not equal(random, begin("random", 1))


def test_epochs_draw_other_masks_and_batches(monkeypatch, sets):
    run, seen = Run("random", 0, CI, sets, "cpu"), []
    monkeypatch.setattr(run, "step", lambda images, *_: seen.append((images, torch.rand(1))) or images.mean())
    run.train_epoch()
    run.train_epoch()
    first, second = seen[0], seen[len(seen) // 2]
    assert not equal(first[0], second[0])
    assert not equal(first[1], second[1])


def test_measures_change_nothing_and_repeat(sets):
    run = Run("random", 0, CI, sets, "cpu")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}, torch.get_rng_state()
    masking = run.model.masking
    run.epoch, run.losses = run.epochs, [1.0]
    run.measure()
    run.measure()
    assert run.curve[0] == run.curve[1]
    assert equal(before, (dict(run.model.state_dict()), torch.get_rng_state()))
    assert run.model.masking is masking
    assert run.model.training
    assert run.model.encoder.training


def test_probes_find_what_is_there(whole):
    """Colours are plain to see, even for an encoder that has barely learned."""
    last = whole["curve"][-1]
    assert min(last["linear"], last["knn"]) > 0.8
    assert last["boxes"] > 0.6
    assert last["regions_bsds"] > 0.7


def test_probes_never_learn_from_what_is_scored(folder, sets):
    held = max(1, round(0.1 * TRAIN))
    assert len(sets.data.fit.images) == CLASSES * (TRAIN - held)
    assert len(sets.data.held_out.images) == len(sets.data.rest.images) == CLASSES * held
    few = Data.read(folder, CI.image, CI.patch, 7)
    assert len(few.rest.images) == CLASSES * (TRAIN - 7)
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (few.fit, few.rest, few.val)]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == CLASSES * (TRAIN + VAL)


def test_without_boxes_and_people_what_needs_them_is_left_out(tmp_path, folder, capsys):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folder / split)
    sets = Sets.read(tmp_path, CI)
    assert "no" in capsys.readouterr().out
    (result,) = work(tmp_path, sets, [("not pretrained", 0)])
    (row,) = result["curve"]
    assert row["boxes"] is None
    assert not {"exchanged", "regions_bsds"} & row.keys()
    assert 0 <= row["parts_hidden"] <= 1
    (tmp_path / "boxes.csv").write_text("path,x0,y0,x1,y1\n")
    with pytest.raises(SystemExit, match=r"no row for train/c0/00\.png"):
        Data.read(tmp_path, CI.image, CI.patch, 5)


def test_disturbed_pictures_keep_what_they_should(sets):
    """Squares of 250 or more of the colour of the class, on a ground below 120."""
    pictures = sets.data.train
    found = disturbed(pictures, CI.patch)
    grey = (255 * torch.tensor(MEAN)).byte().view(3, 1, 1)
    for name in ("parts_hidden", "patches_hidden"):
        hidden = (found[name].images == grey).all(1).unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).all(4).all(2)
        assert (hidden.sum((1, 2)) == 8).all(), name
        assert torch.equal(found[name].classes, pictures.classes)
    inside = pictures.objects.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert torch.equal(found["exchanged"].images[inside], pictures.images[inside])
    outside = found["exchanged"].images.where(~inside, 0)
    source = [
        (outside == other.where(~inside, 0)).flatten(1).all(1)
        for other in (pictures.images, pictures.images.roll(30, 0))
    ]
    assert not source[0].any()
    assert source[1].all()
    assert (pictures.classes != pictures.classes.roll(30)).float().mean() > 0.6


def test_crops_of_regions_have_two_of_them(segmented):
    crops = read_crops(segmented, CI.image, CI.patch)
    assert crops.images.shape[1:] == (3, 32, 32)
    for image, regions in zip(crops.images, crops.regions, strict=True):
        known = regions != UNLABELLED
        assert set(regions[known].tolist()) == {1, 2}
        bright = image.float().mean(0).view(4, 8, 4, 8).mean((1, 3)).flatten() > 150
        assert torch.equal(bright[known], regions[known] == 2)


def test_pairs_that_are_told_apart_by_hand():
    """Of 2 x 2 patches: the pairs of neighbours are two of one region, above one another, and two of different ones."""
    regions = torch.tensor([[5, 7, 5, 7]])
    east, north = [1.0, 0.0], [0.0, 1.0]
    assert pairs_told_apart(torch.tensor([[east, north, east, north]]), regions) == 1
    assert pairs_told_apart(torch.tensor([[east, east, east, east]]), regions) == 0.5
    assert pairs_told_apart(torch.tensor([[east, east, north, north]]), regions) == 0
    half = torch.tensor([[east, east, north, [0.6, 0.8]]])  # 0 and .6 in a region, 1 and .8 between
    assert pairs_told_apart(half, regions) == 0
    unknown = torch.tensor([[5, 7, UNLABELLED, 7]])  # 1 in the region, 0 between
    assert pairs_told_apart(torch.tensor([[east, north, east, north]]), unknown) == 1


def test_whitened_tokens_tell_no_places():
    draws = torch.randn(50, 16, 4, generator=torch.Generator().manual_seed(0))
    places = 100 * torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    found = whitened(draws * torch.tensor([1.0, 1.0, 30.0, 30.0]) + places)
    assert found.mean(0).abs().max() < 1e-3
    assert found.flatten(0, 1).std(0).numpy() == pytest.approx(np.ones(4), abs=0.02)


def test_patches_in_a_box_by_hand():
    assert patches_in((0.4, 1.0, 2.6, 3.0), 4).view(4, 4).int().tolist() == [
        [0, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    assert not patches_in((0.5, 0.0, 1.5, 1.0), 4).any(), "half is not more than half"


def test_boxes_follow_pictures_that_are_no_squares(tmp_path):
    for split in ("train", "val"):
        make(tmp_path / split / "a")
        for index in range(2):
            Image.new("RGB", (128, 64)).save(tmp_path / split / "a" / f"{index}.png")
    rows = [f"{split}/a/{index}.png,32,0,63,31" for split in ("train", "val") for index in range(2)]
    (tmp_path / "boxes.csv").write_text("\n".join(["path,x0,y0,x1,y1", *rows]))
    objects = Data.read(tmp_path, 32, 8, 5).val.objects
    assert objects[0].view(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_crops_lie_in_the_picture_and_differ(sets):
    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32)
    images = normalised(crop(ramp, random_crops(200, torch.Generator().manual_seed(0))))
    least, most = normalised(ramp).flatten(2).min(2).values, normalised(ramp).flatten(2).max(2).values
    assert bool((images.flatten(2).min(2).values >= least - 1e-5).all())
    assert bool((images.flatten(2).max(2).values <= most + 1e-5).all())
    slope = images[:, 0, 16].diff(dim=1).mean(1)
    assert 0.3 < float((slope < 0).float().mean()) < 0.7, "half are flipped"
    assert len(slope.unique()) > 150
    assert bool((images[:, 0, 16].diff(dim=1) != 0).all()), "no crop reaches beyond the picture"


def test_workers_share_the_runs_and_a_second_command_makes_none_again(tmp_path, folder, monkeypatch):
    forkserver = processes.context()
    monkeypatch.setattr(pretraining.multiprocessing, "get_context", lambda method: forkserver)
    options = ["--data", folder, "--size", "ci", "--device", "cpu", "--masks", "random", "green"]
    options += ["--seeds", 0, 1, "--workers", 2, "--out", tmp_path / "out", "--runs", tmp_path / "runs"]
    pretraining.main([str(option) for option in options])
    names = [f"{mask}-{seed}.json" for mask in ("green", "random") for seed in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    times = [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [2, 2]
    with Image.open(tmp_path / "out.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    work(tmp_path, Sets.read(folder, CI), [("random", 0), ("green", 1)])
    assert times == [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]


def test_workers_end_with_a_command_that_is_killed(tmp_path, folder):
    options = ["--data", folder, "--size", "ci", "--device", "cpu", "--runs", tmp_path, "--masks", "random"]
    options += ["--seeds", *range(500)]
    script = Path(pretraining.__file__)
    process = subprocess.Popen([sys.executable, script, *map(str, options)], stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "ci/random-0/state.pt").exists())
    process.kill()
    process.wait()

    def is_free():
        with ExitStack() as stack:
            return all(stack.enter_context(pretraining.locked(path)) for path in (tmp_path / "ci").glob("random-*"))

    wait_for(is_free)
    last = max(path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt"))
    time.sleep(5)  # many epochs of such runs
    assert last == max(path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt"))


def wait_for(condition):
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened for three minutes")


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path, sets):
    with pretraining.locked(tmp_path / "runs/random-0") as ours:
        assert ours
        pretraining.work(0, [("random", 0)], "ci", sets, False, "cpu", "", make(tmp_path / "out"), tmp_path / "runs")
    assert not list((tmp_path / "out").iterdir())


def test_files_of_other_settings_are_refused(tmp_path, sets, monkeypatch):
    work(tmp_path, sets, [("random", 0)])
    monkeypatch.setattr(mask_runs, "MASK_RATIO", 0.5)
    with pytest.raises(SystemExit, match=r"random-0\.json was made with mask_ratio 0\.75, not 0\.5: move it away"):
        work(tmp_path, sets, [("random", 0)])
    (tmp_path / "out/random-0.json").unlink()
    with pytest.raises(SystemExit, match=r"state\.pt was made with mask_ratio 0\.75, not 0\.5"):
        work(tmp_path, sets, [("random", 0)])


def test_a_loss_that_is_no_number_stops_its_run_and_no_other(tmp_path, sets, monkeypatch):
    step = Run.step
    spoil = {"random": float("nan"), "block": 1.0}
    monkeypatch.setattr(Run, "step", lambda run, *args: step(run, *args) * spoil[run.mask])
    with pytest.raises(SystemExit, match="random, seed 5: the loss of epoch 0 is nan"):
        work(tmp_path, sets, [("random", 5), ("block", 5)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["block-5.json"]


def finished(mask, seed, value, seconds=1.0, **settings):
    row = {"epoch": 4, "fine_tuned": value, "knn": value, "linear": value, "boxes": None}
    same = dict.fromkeys(("size", "probes", "pictures", "fingerprint"), 0) | {"epochs": 4}
    times = {"seconds": 2 * seconds, "processor_seconds": seconds}
    where = {"machine": "this one", "device": "cpu"}
    return {"mask": mask, "seed": seed, **where, **times, "settings": same | settings, "curve": [row]}


def report(folder, runs):
    make(folder)
    for run in runs:
        (folder / f"{file_name(run['mask'], run['seed'])}.json").write_text(json.dumps(run))
    pretraining.report(folder)
    return json.loads(folder.with_suffix(".json").read_text())


def test_differences_are_paired_by_seed(tmp_path, capsys):
    """By hand: .01, .02 and .03 have the standard error .01 / sqrt(3), and t of 2 degrees of freedom is 4.3027."""
    random = [finished("random", seed, value) for seed, value in ((0, 0.1), (1, 0.5), (2, 0.3), (9, 0.9))]
    block = [finished("block", seed, value, 3.0) for seed, value in ((0, 0.11), (1, 0.52), (2, 0.33), (7, 0.0))]
    block[1] |= {"machine": "another", "processor_seconds": 30.0}
    block[3] |= {"machine": "a third"}
    found = report(tmp_path / "study", [*random, *block, finished("green", 1, 0.4)])
    rows = {row["name"]: row for row in found["rows"]}
    row, half = rows["block"], 4.302653 * 0.01 / 3**0.5
    assert (row["seeds"], row["pairs"]) == (3, 3), "the screen has seeds 0 to 2"
    assert row["time"] == pytest.approx(3), "times of two machines are not compared"
    assert (found["machine"], found["confirmation_machine"]) == ("another and this one", "a third")
    assert row["linear"] == pytest.approx((0.11 + 0.52 + 0.33) / 3)
    assert row["linear_difference"] == pytest.approx([0.02, 0.02 - half, 0.02 + half], abs=1e-6)
    assert rows["green"]["linear_difference"] == [pytest.approx(-0.1), None, None], "one pair has no interval"
    assert rows["random"]["boxes"] is row["boxes_difference"] is row["regions_coco"] is None
    assert rows["random"]["linear_difference"] is None
    assert (found["chosen"], found["confirmation"]) == (None, [])
    printed = capsys.readouterr().out
    assert "+0.020 (-0.005 to +0.045)" in printed
    assert "0.400; -0.100  " in printed
    assert study_cells(row, PRIMARY)["p, fine-tuned"] == "0.59", "eight times .0742, for eight rows are planned"


def screen_and_fresh(best="random to part, half"):
    """Runs whose seeds differ, and differ otherwise for each mask."""
    means = dict.fromkeys(METHODS, 0.3) | {best: 0.4, SHUFFLED: 0.9}
    runs = {(mask, seed): mean for mask, mean in means.items() for seed in range(3)}
    runs |= {(mask, seed): means[mask] for mask in ("random", "green", "block", best) for seed in range(3, 9)}
    draws = np.random.default_rng(0)
    return [finished(*run, mean + float(draws.normal(0, 0.004))) for run, mean in runs.items()]


def test_curves_are_means_of_the_seeds_that_all_masks_have_at_every_point():
    def curve(*fine_tuned):
        return {"curve": [{"epoch": epoch, "fine_tuned": value} for epoch, value in enumerate(fine_tuned)]}

    runs = {
        "random": {0: curve(0.3), 3: curve(0.1, 0.2), 4: curve(0.3, 0.6), 5: curve(0.9, 0.9)},
        "green": {0: curve(0.3), 3: curve(0.2, 0.2), 4: curve(0.2, 0.4), 5: curve(None, 0.9)},
    }
    ax = Figure().subplots()
    assert pretraining.draw_curves(ax, runs, "fine_tuned") == [3, 4]
    means = [line.get_ydata() for line in ax.get_lines() if line.get_marker() != "."]
    np.testing.assert_allclose(means, [[0.2, 0.4], [0.2, 0.3]])


def test_the_best_row_with_parts_is_chosen_by_the_screen_and_confirmed_by_fresh_seeds(tmp_path):
    found = report(tmp_path / "study", screen_and_fresh())
    assert found["chosen"] == "random to part, half", "not the shuffled parts, which are a control"
    names = [row["name"] for row in found["confirmation"]]
    chosen = [f"random to part, half, against {mask}" for mask in ("random", "green", "block")]
    assert names == [*chosen, "green, against random", "block, against random"]
    assert all((row["seeds"], row["pairs"]) == (6, 6) for row in found["confirmation"])
    assert [row["with_parts"] for row in found["confirmation"]] == [True, True, True, False, False]
    for row in found["confirmation"][:3]:
        assert row["knn_difference"][0] == pytest.approx(0.1, abs=0.01)
        assert 0 < row["knn_p"] <= row["knn_holm"] < 0.01
    less = [run for run in screen_and_fresh() if (run["mask"], run["seed"]) != ("grid to part, hint", 1)]
    (tmp_path / "study/grid-to-part-hint-1.json").unlink()
    assert report(tmp_path / "study", less)["chosen"] is None, "not before all rows have all seeds"


def test_probabilities_are_corrected_by_holms_procedure():
    """By hand, of four rows one of which is to come: .01, .02 and .03 times 4, 3 and 2, none below the one before."""
    probabilities = dict(zip("abcd", (0.02, 0.01, 0.03, None), strict=True))
    rows = [{"name": name, **{f"{each}_p": p for each in PRIMARY | SECONDARY}} for name, p in probabilities.items()]
    found = [row.get("knn_holm") for row in pretraining.with_holm(rows, 4)]
    assert found == [pytest.approx(0.06), pytest.approx(0.04), pytest.approx(0.06), None]


def test_runs_of_different_settings_are_not_averaged(tmp_path):
    with pytest.raises(SystemExit, match="more than one probes"):
        report(tmp_path / "study", [finished("random", 0, 0.1), finished("random", 1, 0.1, probes=1)])
    with pytest.raises(SystemExit, match="holds no finished run"):
        pretraining.report(tmp_path)
