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
        result = {"machine": "Here", "device": "cuda", "rows": rows}
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
