"""The charts and the figures of the pages show what the files of results say today."""

import json
from xml.etree import ElementTree

import charts
import pytest
import tables

NAMES = {"svg": "http://www.w3.org/2000/svg", "dc": "http://purl.org/dc/elements/1.1/"}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_figures_are_those_of_the_result_files(page):
    assert tables.render(page.read_text()) == page.read_text(), "run python benchmarks/tables.py"


@pytest.fixture(scope="module")
def drawn_now(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    charts.main(folder)
    return folder


def read(path):
    """The data that a chart was drawn from, and what is written in it."""
    svg = ElementTree.parse(path).getroot()
    data = json.loads(svg.findtext(".//dc:description", namespaces=NAMES))
    return data, [text.text for text in svg.iterfind(".//svg:text", NAMES)]


@pytest.mark.parametrize("name", charts.CHARTS)
def test_a_chart_was_drawn_from_the_result_files(name, drawn_now):
    expected = read(drawn_now / f"{name}.svg")
    assert read(charts.PICTURES / f"{name}.svg") == expected, "run python benchmarks/charts.py"


@pytest.mark.parametrize("name", charts.STUDY)
def test_a_figure_of_the_study_is_the_last_one(name, drawn_now):
    assert (drawn_now / name).read_bytes() == (charts.PICTURES / name).read_bytes()


@pytest.mark.parametrize("name", charts.CHARTS)
def test_a_chart_names_each_bar_and_its_value(name, drawn_now):
    data, texts = read(drawn_now / f"{name}.svg")
    for panel, bars in data.items():
        assert panel in texts
        for label, (value, low, high) in bars.items():
            assert low <= value <= high
            assert label in texts
            assert f"{value:.2f}" in texts
