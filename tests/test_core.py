"""Contracts of core: parameters, rows, digests, records, tables, figures."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT
from leansense.core import digest, parameters, paths, record, rows, tables
from leansense.core.paths import write_atomic


def notebook(folder, name, cell, *more):
    cells = [
        {
            "cell_type": "code",
            "metadata": {"tags": ["parameters"]},
            "source": cell,
            "id": "a",
            "outputs": [],
            "execution_count": None,
        }
    ]
    cells += [
        {
            "cell_type": "code",
            "metadata": {},
            "source": code,
            "id": f"c{i}",
            "outputs": [],
            "execution_count": None,
        }
        for i, code in enumerate(more)
    ]
    path = folder / f"nbs/toy/{name}.ipynb"
    write_atomic(
        path, json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    return path


CELL = """epochs: int = 3  # passes
lr: float = 1e-3  # rate
name: str = "a"  # text
limit: int | None = None  # images
flags: list = []  # words
seed: int = 0  # draws
out: str = ""  # record
folder: str = ""  # checkpoints"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A scratch repository with one toy system."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = leansense\n")
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    notebook(tmp_path, "80_row", CELL)
    (tmp_path / "lib").symlink_to(ROOT / "lib")
    return tmp_path


def matrix(house, text):
    write_atomic(house / "papers/toy/rows.yaml", text)


@pytest.mark.parametrize(
    "value, wrong",
    [
        (5, ""),
        (5.0, "must be int, got float 5.0"),
        (True, "must be int, got bool"),
        ("5", "must be int, got str '5'"),
        (None, "must be int, got NoneType"),
    ],
)
def test_int_is_strict(value, wrong):
    lines = parameters.find_faults({"epochs": value}, parameters.parse(CELL))
    assert (lines == []) if not wrong else wrong in lines[0]


def test_yaml_exponent_trap_is_named():
    [line] = parameters.find_faults({"lr": "1e-3"}, parameters.parse(CELL))
    assert "must be float" in line and "1.0e-3" in line


def test_missing_or_doubled_tag(house):
    path = notebook(house, "81_row", CELL)
    cells = json.loads(path.read_text())
    cells["cells"][0]["metadata"] = {}
    path.write_text(json.dumps(cells))
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'"):
        parameters.read_parameters(path)
    cells["cells"] = [cells["cells"][0] | {"metadata": {"tags": ["parameters"]}}] * 2
    path.write_text(json.dumps(cells))
    with pytest.raises(ValueError, match="2 cells tagged 'parameters'"):
        parameters.read_parameters(path)


GOOD = """
seeds: [0, 1]
params: {epochs: 5}
scales:
  demo: {params: {epochs: 7}}
tables:
  main:
    rows:
      one: {label: One}
      two: {label: Two, params: {lr: 1}, scales: {smoke: {seeds: [4], params: {epochs: 1}}}}
"""


def test_layers_and_paths(house):
    matrix(house, GOOD)
    found = rows.read_rows("toy", "demo")
    assert [row.id for row in found] == ["main/one.s0", "main/one.s1", "main/two.s0", "main/two.s1"]
    assert {row.params["epochs"] for row in found} == {7}
    smoke = rows.read_rows("toy", "smoke")
    assert [(row.id, row.params["epochs"]) for row in smoke] == [
        ("main/one.s0", 5),
        ("main/one.s1", 5),
        ("main/two.s4", 1),
    ]
    assert found[0].record == house / "papers/toy/records/demo/main/one.s0.json"
    assert smoke[0].record == house / "runs/smoke/papers/toy/records/smoke/main/one.s0.json"
    assert len({row.record for row in found + smoke}) == 7


@pytest.mark.parametrize(
    "bad, needles",
    [
        ("      two: {params: {epoch: 7}}", ["main/two", "unknown parameter 'epoch'", "'epochs'"]),
        ("      two: {params: {epochs: 1.5}}", ["main/two", "'epochs' must be int", "1.5"]),
        ("      two: {params: {lr: 1e-3}}", ["main/two", "1.0e-3"]),
        ("      two: {parms: {lr: 1}}", ["main/two", "unknown word 'parms'", "'params'"]),
        ("      two: {seeds: 3}", ["main/two", "seeds must be a list"]),
        ("      two: {params: {out: x}}", ["main/two", "'out' is set by the runner"]),
        ("      two: {scales: {dmeo: {}}}", ["main/two", "unknown scale 'dmeo'", "'demo'"]),
        ("      two: {cores: many}", ["main/two", "cores must be"]),
        ("      two: [1]", ["main/two", "expected `name: value`"]),
        ("      two: {params: {lr: 1}", ["rows.yaml", "line"]),
    ],
)
def test_unsound_matrix(house, bad, needles):
    matrix(house, "tables:\n  main:\n    rows:\n      one: {label: One}\n" + bad + "\n")
    with pytest.raises(rows.RowsError) as error:
        rows.read_rows("toy", "demo")
    assert len(str(error.value).splitlines()) == 1
    for needle in needles:
        assert needle in str(error.value)


def test_all_complaints_at_once(house):
    matrix(
        house,
        "tables:\n  main:\n    rows:\n      one: {params: {epoch: 1}}\n"
        "      two: {params: {lr: 1e-3}}\n",
    )
    with pytest.raises(rows.RowsError) as error:
        rows.read_rows("toy", "demo")
    assert len(str(error.value).splitlines()) == 2


def test_real_data_has_a_set_of_its_own(house):
    notebook(house, "80_row", CELL + '\ndata: str = "standin"  # folder')
    matrix(house, GOOD)
    (house / "Rice leaf").mkdir()
    real = rows.read_rows("toy", "demo", "Rice leaf")[0]
    assert real.set.startswith("demo-Rice_leaf-") and Path(real.params["data"]).name == "Rice leaf"
    with pytest.raises(rows.RowsError, match="DATA=nowhere: no such folder"):
        rows.read_rows("toy", "demo", "nowhere")


def test_tables_for_real_data_only(house):
    notebook(house, "80_row", CELL + '\ndata: str = "standin"  # folder')
    matrix(house, GOOD + "  extra:\n    only: real\n    rows: {three: {label: Three}}\n")
    (house / "photos").mkdir()
    assert {row.table for row in rows.read_rows("toy")} == {"main"}
    assert {row.table for row in rows.read_rows("toy", "demo", "photos")} == {"main", "extra"}


def test_digest_counts_what_counts(house):
    (house / "lib").unlink()
    lib = house / "lib/leansense"
    for name, text in {
        "__init__": "",
        "core/__init__": "",
        "core/a": "from .b import f",
        "core/b": "def f(): return 1",
        "leaf/__init__": "",
        "leaf/m": "X = 1",
        "beam/__init__": "",
        "beam/m": "from ..core import a",
    }.items():
        write_atomic(lib / f"{name}.py", text)
    path = notebook(
        house, "80_row", CELL, "from leansense.core.a import f", "%matplotlib inline\nf()"
    )
    first = digest.digest(path)

    def after(name, text):
        write_atomic(lib / f"{name}.py", text)
        return digest.digest(path)

    assert after("core/b", '# why\ndef f():\n    """One."""\n    return 1') == first
    assert after("leaf/m", "X = 2") == first, "a system that is not imported"
    assert after("beam/m", "from ..core import b") == first
    assert after("core/b", "def f(): return 2") != first
    assert after("core/b", "def f(): return 1") == first
    notebook(
        house,
        "80_row",
        CELL.replace("3", "4"),
        "from leansense.core.a import f",
        "%matplotlib inline\nf()  # same",
    )
    assert digest.digest(path) == first, "defaults are in the record's params"
    notebook(house, "80_row", CELL, "from leansense.core.a import f", "f() + 1")
    assert digest.digest(path) != first


def test_record_round_trip_and_staleness(house):
    out = house / "papers/toy/records/demo/main/one.s2.json"
    run = record.Run(
        {"epochs": 3, "lr": 1e-3, "seed": 2, "out": str(out), "folder": "x"}, "nbs/toy/80_row.ipynb"
    )
    run.finish({"f1": 0.1 + 0.2}, {}, {"name": "d", "fingerprint": "f0"}, {"device": "cpu"})
    kept = record.read(out)
    assert kept["metrics"]["f1"] == 0.1 + 0.2 and kept["table"] == "main" and kept["seed"] == 2
    assert "folder" not in kept["params"] and "out" not in kept["params"]
    now = {"epochs": 3, "lr": 1e-3}
    assert record.stale(out, now, run.code, "f0") == ""
    assert record.stale(out, now | {"epochs": 4}, run.code, "f0") == "changed epochs"
    out.write_text("{")
    assert record.stale(out, now, run.code, "f0") == "unreadable record"


def test_record_refuses_nan_and_leaves_the_old_one(house):
    out = house / "papers/toy/records/demo/main/one.s0.json"
    write_atomic(out, "old")
    run = record.Run({"epochs": 3, "out": str(out)}, "nbs/toy/80_row.ipynb")
    with pytest.raises(ValueError, match=r"record.metrics.loss is nan"):
        run.finish({"loss": math.nan}, {}, {}, {})
    assert out.read_text() == "old" and len(list(out.parent.iterdir())) == 1


def test_row_notebook_refuses_unknown_and_wrong(house):
    path = "nbs/toy/80_row.ipynb"
    with pytest.raises(ValueError, match="unknown parameter 'epoch'; nearest is 'epochs'"):
        record.Run({"epochs": 3, "epoch": 4, "In": ["# Parameters\nepoch = 4"]}, path)
    with pytest.raises(ValueError, match="parameter 'epochs' must be int, got str 'two'"):
        record.Run({"epochs": "two"}, path)


LINES = pd.DataFrame(
    {
        "label": ["A_1", "B", "C"],
        "name": list("abc"),
        "missing": ["", "", "failed: 50% of $x_1$ & {y}"],
        "f1": [0.90001, 0.90004, math.nan],
        "f1 sd": [0.01, math.nan, math.nan],
    }
)


def test_table_is_escaped_bold_and_dashed():
    tex = tables.booktabs(
        LINES, [tables.Column("f1", "F1 (%)", digits=1, scale=100, best=max, sd=True)], "model"
    )
    assert r"A\_1 & 90.0 $\pm$ 1.0 \\" in tex and r"B & \textbf{90.0} \\" in tex
    assert r"C\textsuperscript{a} & -- \\" in tex and r"50\% of \$x\_1\$ \& \{y\}" in tex


def test_no_negative_zero():
    assert tables.Column("m", "M", digits=1).cell(pd.Series({"m": -0.01})) == "0.0"


def test_ties_are_all_bold():
    tied = LINES.assign(f1=[0.5, 0.5, 0.25])
    assert tables.booktabs(tied, [tables.Column("f1", "F1", best=max)]).count(r"\textbf") == 2


def test_over_seeds_by_hand():
    runs = pd.DataFrame(
        {
            "table": "t",
            "name": ["a"] * 3,
            "label": "A",
            "seed": [0, 1, 2],
            "missing": ["", "", "not run"],
            "m": [1.0, 3.0, math.nan],
        }
    )
    line = tables.over_seeds(runs, ["m"]).iloc[0]
    assert (line["m"], line["m sd"], line["m n"], line["seeds"]) == (2.0, math.sqrt(2), 2, 2)


@pytest.mark.parametrize(
    "claimed, measured, tolerance, word",
    [
        (99.35, 99.30, 0.1, "reproduced"),
        (99.35, 99.0, 0.1, "not reproduced"),
        (4216, None, 1, "cannot be judged here: no GPU"),
    ],
)
def test_verdict(claimed, measured, tolerance, word):
    assert tables.verdict(claimed, measured, tolerance, "no GPU") == word


def test_write_atomic_keeps_the_old_file(tmp_path):
    target = write_atomic(tmp_path / "a/b.txt", "old")
    with pytest.raises(TypeError):
        write_atomic(target, {"no": "text"})
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["b.txt"]


# --- where the repository is ---


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """Two checkouts, one inside the other; the caller stands in a folder of the inner one."""
    inner = tmp_path / "outer" / "inner"
    (inner / "nbs").mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = leansense\n")
    monkeypatch.delenv("LEANSENSE_ROOT")
    monkeypatch.chdir(inner / "nbs")
    return inner.parent, inner


def test_the_root_is_read_once(checkouts, monkeypatch):
    reads = []

    class Counting(paths.ConfigParser):
        def read(self, *given):
            reads.append(given)
            return super().read(*given)

    monkeypatch.setattr(paths, "ConfigParser", Counting)
    assert {paths.root() for _ in range(50)} == {checkouts[1]} and len(reads) <= 1


def test_the_root_follows_every_change(checkouts, monkeypatch):
    outer, inner = checkouts
    assert paths.root() == inner
    (inner / "settings.ini").write_text("[DEFAULT]\nlib_name = something_else\n")
    assert paths.root() == outer
    (inner / "settings.ini").unlink()
    assert paths.root() == outer
    (outer / "settings.ini").rename(inner / "settings.ini")
    assert paths.root() == inner
    monkeypatch.setenv("LEANSENSE_ROOT", str(outer))
    assert paths.root() == outer
    monkeypatch.delenv("LEANSENSE_ROOT")
    monkeypatch.chdir(outer)
    assert paths.root() == ROOT  # none above us any more: the one that was installed
