"""Every notebook runs, top to bottom, on stand-in data with nothing downloaded."""

import pytest

from conftest import ROOT, run

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
CODE = """
import sys
from pathlib import Path
import nbdev.test
ok, seconds = nbdev.test.test_nb(Path(sys.argv[1]))
sys.exit(not ok)
"""


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
)
def test_notebook_runs(path):
    """In a process of its own, forked from one that has the libraries."""
    warm = "TRITON_INTERPRET" not in path.read_text()  # which triton reads while it is imported
    done = run(ROOT, "python", "-c", CODE, str(path), warm=warm)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
