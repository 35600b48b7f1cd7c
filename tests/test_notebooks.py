"""Each notebook is what its script makes, and was run from its first cell to its last. CI runs the scripts again."""

from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[1] / "docs/notebooks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.name != "make.py"]


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_what_its_script_makes(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert cells(notebook) == cells(jupytext.read(script)), "run python docs/notebooks/make.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code)))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_badge_opens_this_notebook(script):
    path = f"docs/notebooks/{script.stem}.ipynb"
    assert f"(https://colab.research.google.com/github/maskevolve/maskevolve/blob/main/{path})" in script.read_text()


def test_every_notebook_has_a_script():
    assert SCRIPTS
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SCRIPTS}
