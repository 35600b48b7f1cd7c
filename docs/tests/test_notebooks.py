"""Each notebook is what its script makes, and was run from its first cell to its last. CI runs the scripts again."""

import importlib.util
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("script", make.SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_what_its_script_makes(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert cells(notebook) == cells(make.read(script)), "run python docs/notebooks/make.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code)))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("script", make.SCRIPTS, ids=lambda script: script.stem)
def test_the_badge_opens_this_notebook(script):
    path = f"/blob/main/docs/notebooks/{script.stem}.ipynb)"
    address = make.REPOSITORY.replace("https://", "(https://colab.research.google.com/").replace("github.com", "github")
    assert address + path in make.read(script).cells[0].source


def test_every_notebook_has_a_script():
    assert make.SCRIPTS
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in make.SCRIPTS}
