"""The study of pretraining: a run that was stopped ends like one that was not, and a mask that cheats is found out."""

import json
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
from mask_runs import SIZES, Run, file_name
from methods import BASELINE, CHOICES, DEFAULT, METHODS, BoxTeacher, Method
from pictures import MEAN, STD, Data, crop, normalised, patches_in, random_crops
from PIL import Image
from probes import MORE
from tables import pretraining_cells
from test_pretrain import equal
from torch.nn.functional import avg_pool2d

from maskevolve import MaskedPatches, RandomMask

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
def data(folder):
    return Data.read(folder, CI.image, CI.patch, CI.labelled)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def work(path, data, jobs=(("grid to part", 3),)):
    pretraining.work(0, list(jobs), "ci", data, "cpu", "this one", make(path / "out"), make(path / "runs"))
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
    "in a measure": (mask_runs, "measure"),
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
def test_a_run_that_was_stopped_ends_like_one_that_was_not(whole, tmp_path, monkeypatch, data, where, calls):
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
        work(tmp_path, data)
    monkeypatch.undo()
    (result,) = work(tmp_path, data)
    assert figures(result) == figures(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    torch.set_num_threads(1)
    return work(tmp_path_factory.mktemp("whole"), data)[0]


def test_a_model_that_is_not_pretrained_is_measured_once(data, tmp_path):
    (result,) = work(tmp_path, data, [("not pretrained", 0)])
    (row,) = result["curve"]
    assert (row["epoch"], row["training_loss"], result["losses"]) == (0, None, [])
    start = Run("random", 0, CI, data, "cpu")
    start.losses = [1.0]
    start.measure()
    assert row["linear"] == start.curve[0]["linear"], "the weights that all masks start from"
    assert 0 < row["fine_tuned"] <= 1


def test_what_an_earlier_code_did_not_measure_is_measured(whole, data, tmp_path):
    work(tmp_path, data)
    path = tmp_path / "runs/grid-to-part-3/state.pt"
    state = torch.load(path)
    for name in (*MORE, "more_pictures"):
        del state["curve"][-1][name]
    torch.save(state, path)
    (tmp_path / "out/grid-to-part-3.json").unlink()
    assert figures(work(tmp_path, data)[0]) == figures(whole)


def test_what_is_written_says_how_it_came_about(whole):
    assert [row["epoch"] for row in whole["curve"]] == [1, 2, 4]
    assert all({"linear", "knn", "segmentation", "fixed_loss", "training_loss"} <= row.keys() for row in whole["curve"])
    last = whole["curve"][-1]
    assert all(0 <= last[name] <= 1 for name in ("fine_tuned", *MORE))
    assert last["more_pictures"] == CLASSES * max(1, round(0.1 * TRAIN))
    assert whole["seconds"] > 0
    assert {"versions", "commits", "seed", "machine"} <= whole.keys()
    settings = whole["settings"]
    assert settings["size"]["width"] == CI.width
    assert settings["teacher"]["decay"] == 0.99
    assert "PartMask" in settings["masking"]


@pytest.mark.parametrize("mask", METHODS)
def test_every_mask_trains(mask, data):
    run = Run(mask, 0, replace(CI, epochs=2), data, "cpu")
    while run.epoch < run.epochs:
        run.train_epoch()
    assert np.isfinite(run.losses).all()
    assert run.epochs == {"random, longer": 3, "not pretrained": 0}.get(mask, 2)


def test_a_choice_changes_one_setting(data):
    def settings(mask):
        found = Run(mask, 0, CI, data, "cpu").settings
        del found["points"]
        return found.pop("teacher") or {}, found

    teacher, others = settings(DEFAULT)
    for mask in CHOICES:
        its_teacher, its_others = settings(mask)
        changed = [name for name in others if its_others[name] != others[name]]
        if not mask.startswith("random") and mask != "people's boxes":
            changed += [name for name in teacher if its_teacher[name] != teacher[name]]
            assert len(changed) == 1, (mask, changed)
        elif mask == "random to part, alpha to 0.5":
            assert changed == ["masking"]
            assert its_teacher == teacher


def test_the_mask_ratio_of_a_choice_is_what_it_trains_with(monkeypatch, data):
    run = Run("mask ratio 0.5", 0, CI, data, "cpu")
    forward, seen = run.model.forward, []
    monkeypatch.setattr(run.model, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
    run.train_epoch()
    assert all((mask.sum(1) == mask.shape[1] / 2).all() for _, _, mask in seen)


def test_parts_from_boxes_follow_the_crops(monkeypatch, data):
    """In these pictures the box holds a square of one colour at 250 or more of 255, and the ground is below 120."""
    run, least = Run("people's boxes", 0, CI, data, "cpu"), (200 / 255 - np.array(MEAN)) / STD
    parts, teacher = [], run.teacher
    monkeypatch.setattr(teacher, "forward", lambda seen: parts.append(BoxTeacher.forward(teacher, seen)) or parts[-1])
    step, images = run.step, []
    monkeypatch.setattr(run, "step", lambda x, *rest: images.append(x) or step(x, *rest))
    run.train_epoch()
    bright = torch.cat(images) > torch.tensor(least, dtype=torch.float32)[:, None, None]
    share = avg_pool2d(bright.any(1, keepdim=True).float(), CI.patch).flatten(1)
    agree = (torch.cat(parts) == 1) == (share > 0.5)
    assert agree.float().mean() > 0.9
    no_boxes = data._replace(train=data.train._replace(objects=None))
    with pytest.raises(SystemExit, match=r"people's boxes needs boxes\.csv"):
        Run("people's boxes", 0, CI, no_boxes, "cpu")


def test_masks_of_a_seed_share_weights_and_batches(monkeypatch, data):
    def begin(mask, seed):
        run, seen = Run(mask, seed, replace(CI, epochs=1), data, "cpu"), []
        start = run.model.state_dict()["encoder.cls_token"].clone(), run.model.decoder_pred.weight.clone()
        monkeypatch.setattr(run, "step", lambda images, *_: seen.append(images) or images.mean())
        run.train_epoch()
        return [*start, *seen]

    random = begin("random", 0)
    assert equal(random, begin("grid to part, EM", 0))
    assert not equal(random, begin("random", 1))


def test_epochs_draw_other_masks_and_batches(monkeypatch, data):
    run, seen = Run("random", 0, CI, data, "cpu"), []
    monkeypatch.setattr(run, "step", lambda images, *_: seen.append((images, torch.rand(1))) or images.mean())
    run.train_epoch()
    run.train_epoch()
    first, second = seen[0], seen[len(seen) // 2]
    assert not equal(first[0], second[0])
    assert not equal(first[1], second[1])


class Leak(RandomMask):
    """Says that it removes patches, and shows them all."""

    def forward(self, x, mask_ratio=0.75, **kwargs):
        mask = super().forward(x, mask_ratio, **kwargs).mask
        return MaskedPatches(x, mask, torch.arange(x.shape[1]).expand(len(x), -1))


def test_a_mask_that_leaks_is_found_out_by_the_loss_on_fixed_masks(monkeypatch, data):
    monkeypatch.setitem(METHODS, "leak", Method(lambda epochs: Leak()))

    def last(mask):
        run = Run(mask, 0, replace(CI, epochs=20), data, "cpu")
        for _ in range(20):
            run.train_epoch()
        run.measure()
        return run.curve[-1]

    random, leak = last("random"), last("leak")
    assert leak["training_loss"] < 0.9 * random["training_loss"], "by its own loss it is the best of masks"
    assert leak["fixed_loss"] > 1.1 * random["fixed_loss"]


def test_measures_change_nothing_and_repeat(data):
    run = Run("random", 0, CI, data, "cpu")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}, torch.get_rng_state()
    masking = run.model.masking
    run.epoch, run.losses = run.epochs, [1.0]
    run.measure()
    (first,) = run.curve
    run.measure()
    assert run.curve == [first]
    assert equal(before, (dict(run.model.state_dict()), torch.get_rng_state()))
    assert run.model.masking is masking
    assert run.model.training
    assert run.model.encoder.training


def test_probes_find_what_is_there(whole):
    """Colours are plain to see, even for an encoder that has barely learned."""
    last = whole["curve"][-1]
    assert min(last["linear"], last["knn"]) > 0.8
    assert last["segmentation"] > 0.6


def test_probes_never_learn_from_what_is_held_out_or_reported(data):
    held = max(1, round(0.1 * TRAIN))
    assert len(data.fit.images) == CLASSES * (TRAIN - held)
    assert len(data.held_out.images) == CLASSES * held
    assert len(data.train.images) == CLASSES * TRAIN
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (data.fit, data.held_out, data.val)]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == CLASSES * (TRAIN + VAL)


def test_choices_are_made_on_pictures_that_no_probe_learns_from(folder):
    data = Data.read(folder, CI.image, CI.patch, 7)
    assert len(data.rest.images) == CLASSES * (TRAIN - 7)
    rest = {image.numpy().tobytes() for image in data.rest.images}
    assert not rest & {image.numpy().tobytes() for image in (*data.fit.images, *data.val.images)}
    assert {image.numpy().tobytes() for image in data.held_out.images} <= rest


def test_without_boxes_there_is_no_segmentation(tmp_path, folder, capsys):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folder / split)
    data = Data.read(tmp_path, CI.image, CI.patch, 7)
    assert "segmentation probe is left out" in capsys.readouterr().out
    assert len(data.fit.images) == CLASSES * 7
    run = Run("random", 0, replace(CI, epochs=1), data, "cpu")
    run.train_epoch()
    run.measure()
    assert run.curve[-1]["segmentation"] is None
    (tmp_path / "boxes.csv").write_text("path,x0,y0,x1,y1\n")
    with pytest.raises(SystemExit, match=r"no row for train/c0/00\.png"):
        Data.read(tmp_path, CI.image, CI.patch, 5)


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


def test_crops_lie_in_the_picture_and_differ(data):
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
    options = ["--data", folder, "--size", "ci", "--device", "cpu", "--masks", "random", "grid to block"]
    options += ["--seeds", 0, 1, "--workers", 2, "--out", tmp_path / "out", "--runs", tmp_path / "runs"]
    pretraining.main([str(option) for option in options])
    names = [f"{mask}-{seed}.json" for mask in ("grid-to-block", "random") for seed in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    times = [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [2, 2]
    with Image.open(tmp_path / "out.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    data = Data.read(folder, CI.image, CI.patch, CI.labelled)
    work(tmp_path, data, [("random", 0), ("grid to block", 1)])
    assert times == [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]


def test_choices_are_not_scored_on_what_is_reported(tmp_path, data, capsys):
    jobs = [(BASELINE, 0), (DEFAULT, 0), ("mask ratio 0.5", 0)]
    runs = work(tmp_path, data, jobs)
    assert [row["epoch"] for row in runs[2]["curve"]] == [CI.epochs]
    assert not {"linear", "knn", "fine_tuned", "segmentation", "fixed_loss"} & runs[2]["curve"][0].keys()
    pretraining.report(tmp_path / "out")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["rows"]] == [BASELINE, DEFAULT]
    assert [row["name"] for row in result["against_default"]] == [job[0] for job in jobs]
    row = result["against_default"][2]
    ends = [run["curve"][-1]["more_knn"] for run in runs]
    assert row["more_knn_difference"] == [pytest.approx(ends[2] - ends[1]), None, None], "against the default"
    assert pretraining_cells(row, "more_")["knn"] == f"{ends[2]:.3f}; {ends[2] - ends[1]:+.3f}"


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


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path, data):
    with pretraining.locked(tmp_path / "runs/random-0") as ours:
        assert ours
        pretraining.work(0, [("random", 0)], "ci", data, "cpu", "", make(tmp_path / "out"), tmp_path / "runs")
    assert not list((tmp_path / "out").iterdir())


def test_files_of_other_settings_are_refused(tmp_path, data, monkeypatch):
    work(tmp_path, data, [("random", 0)])
    monkeypatch.setitem(METHODS, "random", METHODS["random"]._replace(mask_ratio=0.5))
    with pytest.raises(SystemExit, match=r"random-0\.json was made with mask_ratio 0\.75, not 0\.5: move it away"):
        work(tmp_path, data, [("random", 0)])
    (tmp_path / "out/random-0.json").unlink()
    with pytest.raises(SystemExit, match=r"state\.pt was made with mask_ratio 0\.75, not 0\.5"):
        work(tmp_path, data, [("random", 0)])


def test_a_loss_that_is_no_number_stops_its_run_and_no_other(tmp_path, data, monkeypatch):
    step = Run.step
    spoil = {"random": float("nan"), "block": 1.0}
    monkeypatch.setattr(Run, "step", lambda run, *args: step(run, *args) * spoil[run.mask])
    with pytest.raises(SystemExit, match="random, seed 5: the loss of epoch 0 is nan"):
        work(tmp_path, data, [("random", 5), ("block", 5)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["block-5.json"]


def finished(mask, seed, value, seconds=1.0, **settings):
    row = {"epoch": 4, "fine_tuned": value, "linear": value, "knn": value, "segmentation": None, "fixed_loss": value}
    same = dict.fromkeys(("size", "probes", "pictures", "fingerprint"), 0) | {"epochs": 4}
    times = {"seconds": 2 * seconds, "processor_seconds": seconds}
    where = {"machine": "this one", "device": "cpu"}
    return {"mask": mask, "seed": seed, **where, **times, "settings": same | settings, "curve": [row]}


def write_all(folder, runs):
    make(folder)
    for run in runs:
        (folder / f"{file_name(run['mask'], run['seed'])}.json").write_text(json.dumps(run))


def test_differences_are_paired_by_seed(tmp_path, capsys):
    """By hand: .01, .02 and .03 have the standard error .01 / sqrt(3), and t of 2 degrees of freedom is 4.3027."""
    random = [finished("random", seed, value) for seed, value in ((0, 0.1), (1, 0.5), (2, 0.3), (9, 0.9))]
    block = [finished("block", seed, value, 3.0) for seed, value in ((0, 0.11), (1, 0.52), (2, 0.33), (7, 0.0))]
    write_all(tmp_path / "study", [*random, *block, finished("grid", 1, 0.4)])
    pretraining.report(tmp_path / "study")
    rows = {row["name"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    row, half = rows["block"], 4.302653 * 0.01 / 3**0.5
    assert (row["seeds"], row["pairs"]) == (4, 3)
    assert row["time"] == pytest.approx(3)
    assert row["linear"] == pytest.approx((0.11 + 0.52 + 0.33) / 4)
    assert row["linear_difference"] == pytest.approx([0.02, 0.02 - half, 0.02 + half], abs=1e-6)
    assert rows["grid"]["linear_difference"] == [pytest.approx(-0.1), None, None], "one pair has no interval"
    assert rows["random"]["segmentation"] is row["segmentation_difference"] is None
    assert rows["random"]["linear_difference"] is None
    printed = capsys.readouterr().out
    assert "+0.020 (-0.005 to +0.045)" in printed
    assert "0.400; -0.100  " in printed


def test_the_table_of_more_pictures_holds_them_and_no_other(tmp_path):
    runs = [finished("random", 0, 0.1), finished("block", 0, 0.2)]
    for run, value in zip(runs, (0.5, 0.75), strict=True):
        run["curve"][-1] |= dict.fromkeys(MORE, value)
    write_all(tmp_path / "study", [*runs, finished("grid", 0, 0.1)])
    pretraining.report(tmp_path / "study")
    rows = {row["name"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    assert pretraining_cells(rows["block"], "more_")["linear"] == "0.750; +0.250"
    assert pretraining_cells(rows["block"])["linear"] == "0.200; +0.100"
    assert pretraining_cells(rows["grid"], "more_")["linear"] == "", "not measured"


def test_runs_of_different_settings_are_not_averaged(tmp_path):
    write_all(tmp_path / "study", [finished("random", 0, 0.1), finished("random", 1, 0.1, probes=1)])
    with pytest.raises(SystemExit, match="more than one probes"):
        pretraining.report(tmp_path / "study")
    with pytest.raises(SystemExit, match="holds no finished run"):
        pretraining.report(tmp_path)
