"""A matrix of rows, a claims file or a folder of links that nobody here made: read, or refused."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import toy
from conftest import ROOT, message
from leansense.core import batch, rows
from leansense.core.claims import read_claims
from leansense.core.outside import BYTES, find_misnomer, keep_below, read_yaml
from leansense.core.parameters import find_faults, nearest, parse, read_parameters
from leansense.core.rows import RowsError, read_rows

BAD = [
    "b$(touch x)",
    "/some/where",
    "../..",
    "-rf",
    "a b",
    "a;b",
    "`x`",
    "a\nb",
    "x" * 300,
    "",
    None,
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A scratch checkout for functions called in this process."""
    folder = toy.make(tmp_path / "clone", toy.SMALL)
    monkeypatch.setenv("LEANSENSE_ROOT", str(folder))
    return folder


def give(folder: Path, matrix: object) -> None:
    text = matrix if isinstance(matrix, str) else yaml.safe_dump(matrix)
    (folder / "papers/toy/rows.yaml").write_text(text)


# --- one grammar ---


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["system", "table", "row", "notebook", "file"])
def test_a_name_that_could_lead_elsewhere_is_none(kind, name):
    why = find_misnomer(kind, name)
    assert f"cannot name a {kind}" in why and "\n" not in why and len(why) < 250


@pytest.mark.parametrize("system", ["class", "ünit", "a-b", "a.b"])
def test_a_system_is_a_module(system):
    assert find_misnomer("system", system) and not find_misnomer("system", "leaf")


@pytest.mark.parametrize("name", BAD)
def test_every_name_in_a_matrix_is_checked(here, name):
    row = {"label": "x"}
    for matrix in (
        {"tables": {name: {"rows": {"one": row}}}},
        {"tables": {"main": {"rows": {name: row}}}},
        {"notebook": name, "tables": {"main": {"rows": {"one": row}}}},
    ):
        give(here, matrix)
        assert "cannot name a" in message(RowsError, read_rows, "toy")


def test_a_command_holds_only_quoted_words():
    """What Snakemake writes into a shell's line is quoted, whatever was checked before."""
    text = (ROOT / "papers/Snakefile").read_text()
    commands = re.findall(r"shell:\n((?: {8}'.*\n)+)", text)
    assert len(commands) == 3
    for command in commands:
        words = re.findall(r"\{([^}]+)\}", command)
        assert words and all(word.endswith(":q") for word in words), command
        assert "+" not in command


@pytest.mark.parametrize("name", ["../..", "/abs", "a/b", "a\nb", ".."])
def test_a_name_for_files_stays_in_its_folder(name):
    """`model_name: ../..` of a row would write beside the row's folder."""
    known = parse('model_name: str = ""  # names files\nother: str = ""  # is free')
    assert "cannot name a file" in "".join(find_faults({"model_name": name}, known))
    assert find_faults({"model_name": "", "other": name}, known) == []
    assert find_faults({"model_name": "bot.v2"}, known) == []


# --- places ---


def test_fresh_deletes_below_runs_only(here, tmp_path):
    """A row whose folder leads out, by its name or by a link, is neither deleted nor written."""
    outside = tmp_path / "mine"
    (outside / "main/one.s0").mkdir(parents=True)
    (outside / "main/one.s0/thesis.txt").write_text("years of work")
    row = read_rows("toy")[0]
    led = replace(row, table=str(outside / "main"), name="one")
    with pytest.raises(ValueError, match="not below runs/"):
        batch.clear([batch.Step(led, "FRESH=1")], fresh=True)
    row.folder.parent.parent.mkdir(parents=True)
    (row.folder.parent).symlink_to(outside / "main")
    for call in (lambda: read_rows("toy"), lambda: batch.clear([batch.Step(row, "x")], True)):
        assert "take the name or link away" in message(ValueError, call)
    with pytest.raises(RuntimeError, match="not below runs/"):
        rows.run_row(row)
    assert (outside / "main/one.s0/thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in outside.rglob("*")) == ["main", "one.s0", "thesis.txt"]


def test_a_record_is_not_written_through_a_link(here, tmp_path):
    (here / "papers/toy/records").symlink_to(tmp_path)
    assert "not below papers/ or runs/" in message(RowsError, read_rows, "toy")


@pytest.mark.parametrize("place", ["papers/toy/tables", "figures/toy"])
def test_a_table_or_figure_is_not_written_through_a_link(here, tmp_path, place):
    from leansense.core.tables import Paper

    (tmp_path / "mine").mkdir()
    (here / place).parent.mkdir(parents=True, exist_ok=True)
    (here / place).symlink_to(tmp_path / "mine")
    assert "take the name or link away" in message(ValueError, Paper, "toy")
    (here / place).unlink()
    assert Paper("toy").system == "toy"


def test_runs_may_be_on_another_disk(here, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.rmtree(here / "runs", ignore_errors=True)
    (here / "runs").symlink_to(tmp_path / "disk")
    assert keep_below(read_rows("toy")[0].folder, "runs")
    for place in ("runs", "runs/..", "runs/../papers/x", "/"):
        with pytest.raises(ValueError, match="not below runs/"):
            keep_below(here / place, "runs")


def test_a_step_of_another_system_makes_no_folder(here, tmp_path, capfd):
    assert batch.main(["results", "--system", "../../../out"]) == 1
    assert "cannot name a system" in capfd.readouterr().err
    assert not list(tmp_path.glob("out*"))


# --- YAML ---


def bomb(levels: int = 12, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * width)}]" for k in range(1, levels)]
    return "\n".join(lines)


UNSOUND = {
    "bomb": (bomb(), "with its aliases written out"),
    "merged": ("a: &a {x: 1}\n" + bomb().replace("a0: &a0", "b: 1\na0: &a0"), "aliases"),
    "itself": ("tables: &a [*a]", "levels deep"),
    "deep": ("tables: " + "[" * 5000 + "]" * 5000, "levels deep"),
    "twice": ("tables: {}\ntables: {}", "line 2: 'tables' is there twice"),
    "object": ("tables: !!python/object/apply:os.getcwd []", "could not determine"),
    "bytes": (b"tables: \xff", "byte 8 is not UTF-8"),
    "large": ("# " + "x" * BYTES, "more than 1 MB"),
    "digits": ("tables: " + "9" * 5000, "digits"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_yaml_is_bounded_before_it_is_used(here, tmp_path, kind):
    content, said = UNSOUND[kind]
    path = here / "papers/toy/rows.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(RowsError, read_rows, "toy")
    assert text.startswith("papers/toy/rows.yaml") and said in text and len(text) < 400
    text = message(ValueError, read_claims, path)
    assert text.startswith(str(path)) and said in text


def test_a_value_that_is_a_bomb_does_not_hang(here):
    give(here, f"params:\n  value: 3\n  {bomb(9).replace(chr(10), chr(10) + '  ')}\n{toy.SMALL}")
    assert "aliases written out" in message(RowsError, read_rows, "toy")


def test_a_pipe_is_no_matrix(tmp_path):
    os.mkfifo(tmp_path / "rows.yaml")
    assert "not a file" in message(ValueError, read_yaml, tmp_path / "rows.yaml")


def test_anchors_and_merges_are_read_as_ever(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    found = {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert read_yaml(tmp_path / "a.yaml") == found
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") is None


@pytest.mark.parametrize("path", sorted((ROOT / "papers").glob("*/*.yaml")), ids=str)
def test_the_repositorys_own_are_read_the_same(path):
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


# --- blocks of another kind ---

LINE = {"label": "One"}
ODD = {
    "params a list": {"params": [1], "tables": {"main": {"rows": {"one": LINE}}}},
    "params with numbers": {"params": {3: 1}, "tables": {"main": {"rows": {"one": LINE}}}},
    "scales a list": {"tables": {"main": {"scales": ["demo"], "rows": {"one": LINE}}}},
    "claim a text": {"tables": {"main": {"rows": {"one": {"claim": "99 %"}}}}},
    "real a number": {"scales": {"demo": {"real": 3}}, "tables": {"main": {"rows": {"one": LINE}}}},
    "needs of numbers": {"tables": {"main": {"rows": {"one": {"needs": {"value": 3}}}}}},
    "a long word": {"w" * 100_000: 1, "tables": {}},
    "seeds beyond NumPy": {"seeds": [1 << 40], "tables": {"main": {"rows": {"one": LINE}}}},
    "a grid of a billion": {
        "tables": {"main": {"grid": {name: list(range(1000)) for name in ("a", "b", "c")}}}
    },
    "a whole file": [1, 2],
}


@pytest.mark.parametrize("kind", ODD)
def test_a_block_of_another_kind_is_one_line(here, kind):
    give(here, ODD[kind])
    text = message(RowsError, read_rows, "toy")
    assert text.startswith("papers/toy/rows.yaml") and len(text) < 400


@pytest.mark.parametrize("holds", ["/etc/*", "../**/x", "[", "", "**/../../*"])
def test_a_pattern_of_files_stays_one(here, tmp_path, holds):
    (tmp_path / "set").mkdir()
    give(here, {"tables": {"main": {"holds": holds, "rows": {"one": LINE}}}})
    assert isinstance(read_rows("toy", data=str(tmp_path / "set")), list)


def test_a_million_known_names_make_a_short_line():
    known = [f"column {k}" for k in range(1_000_000)]
    assert len(nearest("label", known)) < 600 and "characters" in nearest("label", known)
    assert "'value'" in nearest(
        "valeu", read_parameters("nbs/leaf/80_row.ipynb").keys() | {"value"}
    )
