"""Data sets and clones may be called anything, and nothing of their names is read as code."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import toy
from conftest import ROOT, run
from leansense.core.rows import RowsError, read_rows, set_name
from leansense.core.tables import macro_part

NAMES = [
    "2024_07",
    "007",
    "1e3",
    "field{1}",
    "it's",
    'a "b"',
    "$HOME x",
    "x;touch m;",
    "$(shell touch m)",
    "`touch m`",
    "${PATH}",
    "a [b] (c)",
    "写真",
    "#1 100%",
    "-x",
    "back\\slash",
    "a&b|c>m",
    "*",
    "~x",
]
ODD = "it's {1} $HOME;touch m;$(touch m) [写真]"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A scratch checkout for functions called in this process."""
    folder = toy.make(tmp_path / "clone", toy.SMALL)
    monkeypatch.setenv("LEANSENSE_ROOT", str(folder))
    return folder


# --- names of sets ---


def test_set_names_are_unique_and_plain(here):
    folders = NAMES + [
        "/data/2023/images",
        "/data/2024/images",
        "/data/写真",
        "/data/稲",
        "a b",
        "a_b",
        "a/b",
        "b/a",
        "x" * 200,
    ]
    names = {folder: set_name("demo", folder) for folder in folders}
    assert len(set(names.values())) == len(folders)
    for name in names.values():
        assert re.fullmatch(r"demo-\w{1,40}-[0-9a-f]{6}", name, re.ASCII)
        assert re.fullmatch("[A-Za-z]+", macro_part(name))


def test_the_root_is_not_the_standin(here):
    assert set_name("demo") == "demo" and set_name("demo", "/") not in ("demo", "demo-")


def test_one_folder_has_one_name(here, tmp_path):
    (tmp_path / "link").symlink_to(here)
    ways = [
        "data/rice",
        "data/rice/",
        "./data/../data/rice",
        str(here / "data/rice"),
        str(tmp_path / "link/data/rice"),
    ]
    assert len({set_name("demo", way) for way in ways}) == 1


def test_a_link_stands_for_its_place(here, tmp_path):
    """The committed records of photographs are found where one puts the folder, or a link to it."""
    (tmp_path / "somewhere").mkdir()
    (here / "data").mkdir()
    before = set_name("demo", "data/rice")
    (here / "data/rice").symlink_to(tmp_path / "somewhere")
    assert set_name("demo", "data/rice") == before


def test_photographs_lie_in_their_set():
    for path in ROOT.glob("papers/*/records/*-*/"):
        assert (
            path.name.split("-", 1)[1]
            == set_name("demo", "data/" + path.name.split("-")[1]).split("-", 1)[1]
        )


def test_macros_of_two_years_differ():
    assert (
        macro_part("demo-paddy2023-aaaaaa")
        == "PaddyTwoZeroTwoThree"
        != macro_part("demo-paddy2024-aaaaaa")
    )
    assert macro_part("demo") == ""


@pytest.mark.parametrize(
    "name", ["a b", "$(touch m)", "a/b", "it's", "..", "{x}", "写真", "-x", ""]
)
@pytest.mark.parametrize("kind", ["table", "row"])
def test_names_in_the_matrix_are_plain(here, name, kind):
    import yaml

    table, row = (name, "one") if kind == "table" else ("main", name)
    (here / "papers/toy/rows.yaml").write_text(
        yaml.safe_dump({"tables": {table: {"rows": {row: {"label": "x"}}}}})
    )
    with pytest.raises(RowsError) as caught:
        read_rows("toy")
    assert f"{name!r} cannot name a {kind}" in str(caught.value) and "\n" not in str(caught.value)


# --- from make to the notebook ---


def mark_ready(folder: Path) -> None:
    """Let make believe that `make setup` has run in a checkout, for its settings as they are."""
    sums = "cat settings.ini setup.py pyproject.toml | cksum | cut -d' ' -f1"
    done = subprocess.run(sums, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    (folder / f".venv/ready-{done.stdout.strip()}").touch()


@pytest.mark.parametrize("way", ["word", "environment"])
def test_make_hands_on_what_was_given(tmp_path, way):
    """Each name reaches Python as it is, and nothing in it is run."""
    shutil.copy2(ROOT / "Makefile", tmp_path)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >argv\n')
    python.chmod(0o755)
    mark_ready(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    for name in NAMES + [ODD]:
        given, more = ([f"DATA={name}"], {}) if way == "word" else ([], {"DATA": name})
        done = subprocess.run(
            ["make", "tables", "SYSTEM=toy", *given],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=kept | more,
        )
        assert done.returncode == 0, (name, done.stdout + done.stderr)
        assert f"--data={name}" in (tmp_path / "argv").read_text().split("\n"), name
        (tmp_path / "argv").unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == before, f"{name} was run"


def test_odd_clone_and_data(tmp_path):
    """The whole way, `make tables` to records and tables, with odd names of clone and data."""
    clone = toy.make(tmp_path / "my clone's {1} (copy)", toy.SMALL)
    venv.create(clone / ".venv", symlinks=True)
    site = next((clone / ".venv/lib").glob("python3*/site-packages"))
    (site / "here.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n"
    )
    mark_ready(clone)
    for i, name in enumerate(("007", ODD)):
        data = tmp_path / name
        data.mkdir()
        (data / f"{i}.jpg").touch()
        done = run(clone, "make", "tables", "SYSTEM=toy", "SCALE=smoke", "CORES=1", f"DATA={data}")
        assert done.returncode == 0, done.stdout + done.stderr
        sub = set_name("smoke", str(data)).split("-", 1)[1]
        paper = clone / "runs/smoke/papers/toy"
        (record,) = (paper / "records").glob(f"smoke-{Path(name).name[:2]}*/main/one.s0.json")
        assert f'"{i}.jpg"' in record.read_text() and str(tmp_path) not in record.read_text()
        assert "One & 10.0" in next(paper.glob(f"*{sub[:3]}*/tables/main.tex")).read_text()
    assert not list(tmp_path.rglob("m"))


def test_snakemake_by_hand_refuses_a_number(tmp_path):
    """`--config data=007` is 7 when we see it: refused, with the way that works."""
    clone = toy.make(tmp_path / "clone", toy.SMALL)
    (clone / "007").mkdir()
    done = run(
        clone,
        "python",
        "-m",
        "snakemake",
        "--snakefile",
        "papers/Snakefile",
        "--cores",
        "1",
        "-n",
        "--config",
        "system=toy",
        "scale=smoke",
        "data=007",
    )
    assert done.returncode and "LEANSENSE_DATA_SET=folder" in done.stderr
