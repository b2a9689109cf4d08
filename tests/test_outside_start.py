"""Commands and compiled code take nothing from a folder that is not the user's own."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from leansense import leave_folder
from leansense.layers import native
from leansense.layers.backend import NativeError

TRAP = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit(7)\n"


@pytest.mark.parametrize("command", ["core.check", "core.rows"])
def test_a_command_imports_nothing_from_the_folder_it_is_started_in(tmp_path, command):
    """A data set that brings its own yaml.py, numpy.py and torch.py is checked all the same."""
    for name in ("yaml", "numpy", "torch", "PIL", "psutil", "IPython"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    words = {"core.check": ["leaf", "."], "core.rows": ["check", "leaf"]}[command]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "LEANSENSE_ROOT": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", f"leansense.{command}", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists() and done.returncode != 7, done.stderr
    assert "leaf" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path, argv, own, left",
    [
        (["here", "site"], ["-m", "x"], "clone/lib/leansense/__init__.py", ["site"]),
        (["clone/lib", "site"], ["-m"], "clone/lib/leansense/__init__.py", ["clone/lib", "site"]),
        (["here", "site"], ["script.py"], "clone/lib/leansense/__init__.py", ["here", "site"]),
        ([], ["-m"], "clone/lib/leansense/__init__.py", []),
    ],
)
def test_only_the_folder_of_m_is_left(path, argv, own, left):
    leave_folder(path, argv, own)
    assert path == left


def test_a_cache_below_a_folder_open_to_all_is_refused(tmp_path, monkeypatch):
    """Whoever may rename the cache may put another in its place, with hashes that fit."""
    parent = tmp_path / "open"
    parent.mkdir()
    monkeypatch.setenv("LEANSENSE_CACHE", str(parent / "deep" / "cache"))
    assert native.cache_folder() == parent / "deep" / "cache"
    parent.chmod(0o777)
    with pytest.raises(NativeError, match=f"{parent}: other users can write to it") as caught:
        native.cache_folder()
    assert "\n" not in str(caught.value)
    parent.chmod(0o1777)  # sticky, as /tmp: only the owner of a folder renames it
    assert native.cache_folder()
    (parent / "deep" / "cache").chmod(0o770)
    with pytest.raises(NativeError, match="cache: other users"):
        native.cache_folder()


def test_what_is_code_is_said():
    readme = (ROOT / "README.md").read_text()
    part = readme.split("### From strangers")[1].split("`SCALE=paper`")[0]
    assert part.count("**code**") == 2
    for word in ("notebooks", "cache", "weights", "rows.yaml", "python -P -m"):
        assert word in part
    assert "not a reason to trust it" in (ROOT / "nbs/layers/01_native.ipynb").read_text()
