"""The tables of made results."""

import json

import pytest
import tables


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Write results of a machine, where the tables look for them."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(name, rows):
        (tmp_path / "here").mkdir(exist_ok=True)
        result = {"machine": "Here", "device": "cuda", "rows": rows, "confirmation": []}
        (tmp_path / "here" / f"{name}.json").write_text(json.dumps(result))

    return write


def cut(name, ratio=1.0, spread=0.0, side=14, **more):
    times = {"milliseconds": 3.0, "ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}
    return {"name": name, "grid": f"{side} x {side}", "batch": 1, "parts": 10, **times, "peak_mib": 7.6, **more}


def test_parts_have_a_row_for_each_case_with_pictures_and_without(save):
    old = [cut("graph cut, torch", 3, 0.5, side=28), cut("EM", side=28)]
    rows = [cut("graph cut, triton", 0.5, 0.25, pictures=True), cut("EM", pictures=True)]
    save("partition", [*rows, cut("graph cut, triton", 2, 1, pictures=False, batch=64), *old])
    assert tables.partition().splitlines() == [
        "| Here | graph cut, triton | EM | graph cut, torch | peak memory, triton |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 14 x 14, 1 image, 10 parts | 0.50 (0.25 to 0.75) | 1, 3 ms |  | 8 MiB |",
        "| 14 x 14, 64 images, 10 parts, no pictures | 2.00 (1.00 to 3.00) |  |  | 8 MiB |",
        "| 28 x 28, 1 image, 10 parts, no pictures |  | 1, 3 ms | 3.00 (2.50 to 3.50) |  |",
    ]


def test_without_a_gpu_the_memory_is_that_of_the_default_on_a_cpu(save):
    save("partition", [cut("graph cut, scipy", 0.5), cut("graph cut, pymaxflow", 0.5), cut("EM")])
    assert tables.partition().splitlines()[0].endswith("| peak memory, pymaxflow |")


def test_volumes_have_the_columns_of_parts(save):
    more = {"grid": "8 x 14 x 14, by tubes", "pictures": True}
    save("volumes", [{**cut("graph cut, pymaxflow", 0.5, 0.25), **more}, {**cut("EM"), **more}])
    assert tables.partition("volumes").splitlines()[2:] == [
        "| 8 x 14 x 14, by tubes, 1 image, 10 parts | 0.50 (0.25 to 0.75) | 1, 3 ms | 8 MiB |"
    ]


def test_masks_of_clips_have_a_column_for_each_pass_of_the_largest_batch(save):
    rows = [{**cut("RandomMask", 0.5, 0.25), "batch": batch, "pass": "forward"} for batch in (8, 32)]
    save("clips", [*rows, {**cut("RandomMask"), "batch": 32, "pass": "mask alone"}])
    assert tables.clips().splitlines() == [
        "| Here | forward, 32 clips | mask alone, 32 clips |",
        "| --- | ---: | ---: |",
        "| RandomMask | 0.50 (0.25 to 0.75) | 1, 3 ms |",
    ]


def test_moving_shapes_have_both_indices_of_each_motion(save):
    scores = {"within": 0.5, "within_error": 0.25, "over": 0.125, "over_error": 0.0625}
    cases = [("slow", True), ("fast", True), ("slow", False), ("slow", None)]
    save("moving_shapes", [{"name": "cut", "motion": motion, "pictures": given, **scores} for motion, given in cases])
    both = "0.500 ± 0.250 | 0.125 ± 0.062"
    assert tables.moving_shapes().splitlines() == [
        "| Here | slow, within frames | slow, over the clip | fast, within frames | fast, over the clip |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| cut | {both} | {both} |",
        f"| cut, no pictures | {both} |  |  |",
    ]


def test_a_table_without_a_file_says_so(save):
    assert tables.render("<!-- clips -->\n<!-- end -->") == f"<!-- clips -->\n{tables.NO_FILE}\n<!-- end -->"


def differences(name, **means):
    found = {"name": name, "seeds": 3, "pairs": 3, "time": 1.5, "with_parts": "part" in name}
    for measure, mean in means.items():
        apart = None if name == "random" else [mean, mean - 0.01, mean + 0.01]
        found |= {measure: 0.3, f"{measure}_difference": apart, f"{measure}_holm": None if apart is None else 0.25}
    return found


def test_the_study_has_a_column_for_each_measure_and_its_corrected_probability(save):
    save("patch4", [differences(name, fine_tuned=-0.02, knn=0.01) for name in ("random", "half by parts")])
    assert tables.study("primary").splitlines() == [
        "| Here | seeds | time | fine-tuned | p, fine-tuned | k-NN | p, k-NN |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| random | 3 | 1.50 | 0.300 |  | 0.300 |  |",
        "| half by parts | 3 | 1.50 | 0.300; -0.020 (-0.030 to -0.010) | 0.25 | "
        "0.300; +0.010 (+0.000 to +0.020) | 0.25 |",
    ]
    assert tables.study("confirmation") == tables.NO_FILE


def test_the_sentences_on_accuracy_have_the_fresh_seeds_of_the_chosen_mask_and_the_default(monkeypatch):
    means = {"fine_tuned": -0.02, "knn": 0.01}
    rows = [differences(name, **means) for name in ("random", "block", "grid to part", "parts, EM")]
    against = [differences(f"parts, EM, against {name}", **means) for name in ("random", "green", "block")]
    against[1]["pairs"] = 2
    fresh = [*against, differences("block, against random", **means)]
    new = {"rows": rows, "chosen": "parts, EM", "confirmation": fresh, "settings": {"size": {"patch": 4, "epochs": 5}}}
    monkeypatch.setattr(tables, "read", {"patch4": new}.get)
    told, both = " ".join(tables.learned().split()), "-0.020 (-0.030 to -0.010) and +0.010 (+0.000 to +0.020)"
    assert '"parts, EM" was chosen from five masks with parts; with fresh seeds, where' in told
    assert f"are: against random masks, 3 seeds, {both}; against green masks, 2 seeds, {both}; against block" in told
    assert f"block masks, 3 seeds, {both}. Those of the default" in told
    assert f"against random masks are {both}, with the 3 seeds of the screen. The paper" in told
