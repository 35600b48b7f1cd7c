"""Run the scripts of this folder and write each as a notebook with its outputs, here or into another folder.

python docs/notebooks/make.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
SCRIPTS = [path for path in sorted(HERE.glob("*.py")) if path.name != "make.py"]
sys.path.insert(0, str(HERE.parent))
from hooks import NAME, OWNER, REPOSITORY, SITE  # noqa: E402  of the folder above


def read(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, with the addresses in it."""
    text = script.read_text("utf-8").replace("{OWNER}/{NAME}", f"{OWNER}/{NAME}")
    return jupytext.reads(text.replace("{REPOSITORY}", REPOSITORY).replace("{SITE}", SITE), "py:percent")


def run(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, after its run; without what it wrote to stderr, such as warnings of this machine."""
    from nbclient import NotebookClient

    notebook = read(script)
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": script.parent}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # not another one in each run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for script in SCRIPTS:
        print(f"runs {script.name}", flush=True)
        nbformat.write(run(script), folder / script.with_suffix(".ipynb").name)
