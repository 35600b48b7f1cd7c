"""docs/errors.md has every error and warning that a user can meet, in the words of the source."""

import ast
import re
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
GAP = "…"  # stands for a value

LEFT_OUT = {
    "_Done": "ends a forward pass, and is caught where it does",
    "NotImplementedError": "of a base class that is not public",
}


def source_messages():
    """What each `raise` and `warnings.warn` of the package says, with a gap for each value."""
    messages = {}
    for path in sorted((HOME / "maskevolve").rglob("*.py")):
        tree = ast.parse(path.read_text())
        helpers = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            is_warning = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            if call is None or not (isinstance(node, ast.Raise) or is_warning):
                continue  # raised anew
            where = f"{path.relative_to(HOME)}:{node.lineno}"
            if not isinstance(call, ast.Call) or not call.args:
                name = ast.unparse(call)
                assert name in LEFT_OUT, f"{where}: {name} says nothing"
                continue
            messages[where] = words(call.args[0], helpers)
    return messages


def words(node, helpers):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else GAP for value in node.values)
    assert isinstance(node, ast.Call), f"cannot be read here: {ast.unparse(node)}"
    returned = next(inner for inner in ast.walk(helpers[ast.unparse(node.func)]) if isinstance(inner, ast.Return))
    return words(returned.value, helpers)


SOURCE = source_messages()
PAGE = re.findall(r"^`+ ?(.+?) ?`+\n:   ", (HOME / "docs/errors.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("quoted", PAGE)
def test_every_message_of_the_page_is_one_of_the_package(quoted):
    assert any(quoted in message for message in SOURCE.values())


def test_every_message_of_the_package_is_on_the_page():
    missing = {where: message for where, message in SOURCE.items() if not any(quoted in message for quoted in PAGE)}
    assert not missing, "describe them in docs/errors.md"


def test_no_quote_of_the_page_is_so_short_that_it_fits_anything():
    for quoted in PAGE:
        assert len(re.sub(r"\W", "", quoted)) >= 6, quoted
