"""The import graph of the library: no module reaches itself, imports inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT


def imported(path: Path, name: str) -> set[str]:
    """Every module that the file `path` of module `name` imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def graph(lib: Path) -> dict[str, set[str]]:
    """Each module below `lib` with the modules of ours that it imports."""
    names = {
        ".".join(path.relative_to(lib).with_suffix("").parts): path
        for path in (lib / "leansense").rglob("*.py")
        if path.name not in ("__init__.py", "_modidx.py")
    }
    return {name: imported(path, name) & names.keys() for name, path in names.items()}


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; none where there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle():
    found = graph(ROOT / "lib")
    assert len(found) > 50 and "leansense.leaf.layouts" in found["leansense.leaf.split"]
    assert circle(found) == []


@pytest.mark.parametrize("indent", ["", "    "])
def test_a_circle_would_be_found(tmp_path, indent):
    """Also where one of the two imports stands in a function, to hide it from the interpreter."""
    package = tmp_path / "leansense" / "toy"
    package.mkdir(parents=True)
    (package / "data.py").write_text("from .split import divide\n")
    function = "def load():\n" if indent else ""
    (package / "split.py").write_text(f"{function}{indent}from leansense.toy.data import SPLITS\n")
    assert set(circle(graph(tmp_path))) == {"leansense.toy.data", "leansense.toy.split"}
    (package / "split.py").write_text("import json\n")
    assert circle(graph(tmp_path)) == []
