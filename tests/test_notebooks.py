"""Every notebook runs, top to bottom, on stand-in data with nothing downloaded."""
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CODE = """
import sys
from pathlib import Path
import nbdev.test
ok, seconds = nbdev.test.test_nb(Path(sys.argv[1]))
sys.exit(not ok)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS])
def test_notebook_runs(path):
    """In a process of its own: notebooks set seeds, threads and styles."""
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
