"""What holds of one system's data and commands holds of every other's."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

from conftest import message
from leansense.core.check import check
from leansense.core.paths import root
from leansense.core.rows import systems

SMALL = {
    "simbev": {"standin": 8, "standin_size": "240x112", "layout": "native"},
    "beam": {"standin": 2},
    "xad": {"standin": 8, "standin_samples": 1},
    "openvocab": {"standin": 40},
}


def small(system: str) -> Path:
    module = importlib.import_module(f"leansense.{system}.data")
    return Path(module.dataset({"data": "standin"} | SMALL[system]).folder)


@pytest.mark.parametrize("system", SMALL)
def test_every_doctor_says_which_files_lie_elsewhere(tmp_path, system):
    """2.4: a link in a downloaded folder may show any file of the reader's."""
    copy = shutil.copytree(small(system), tmp_path / "set")
    pictures = [*copy.rglob("*.jpg"), *copy.rglob("*.png")]
    (tmp_path / "private").mkdir()
    for number, picture in enumerate(pictures):
        picture.symlink_to(picture.rename(tmp_path / "private" / f"{number}{picture.suffix}"))
    report = check(system, copy)
    warned = [line for line in map(str, report.warnings) if "lie outside this folder" in line]
    assert len(warned) == 1 and "of the files that are read" in warned[0] and report.ok
    assert not [
        line for line in map(str, check(system, small(system)).warnings) if "lie out" in line
    ]


USES = {
    "beam": ("none.ckpt", "folder"),
    "leaf": ("predict", "none.ckpt", "a.jpg"),
    "openvocab": ("none.ckpt", "a.jpg", "a red car"),
    "simbev": ("none.ckpt", "folder"),
    "xad": ("none.ckpt", "folder"),
}


def test_every_system_with_data_of_its_own_is_used():
    found = (root() / "lib" / "leansense").glob("*/use.py")
    assert {path.parent.name for path in found} == set(USES) <= set(systems())


@pytest.mark.parametrize("system", USES)
def test_a_relative_path_is_the_same_for_every_command(tmp_path, system, monkeypatch, capsys):
    """1.4: it counts from the repository, wherever one stands, and the line says the whole path."""
    monkeypatch.chdir(tmp_path)
    use = importlib.import_module(f"leansense.{system}.use")
    assert use.main(list(USES[system])) > 0
    said = capsys.readouterr().err
    assert str(root() / "none.ckpt") in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("system", ["simbev", "beam", "xad", "openvocab", "leaf"])
def test_a_picture_in_the_folders_place_is_one_line(tmp_path, system):
    """1.6, 2.3: a file where a folder is meant, and a folder with nothing in it."""
    load = importlib.import_module(f"leansense.{system}.data").dataset
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "empty").mkdir()
    for name in ("a.jpg", "empty", "none"):
        said = message((OSError, ValueError), load, {"data": str(tmp_path / name)})
        assert str(tmp_path / name) in said
