"""Rows that start from the checkpoints of other rows, and grids, on a toy system."""

import json
import re
import shutil

import pytest

import toy as toys
from conftest import message
from leansense.core import batch, record, rows
from leansense.core.digest import code_key, digest
from leansense.core.paths import write_atomic
from test_crash import kill_all, wait
from toy import started, tables

MATRIX = """title: a toy
tables:
  main:
    rows:
      base: {label: Base, params: {value: 3}}
      tuned: {label: Tuned, needs: {weights: main/base}}
      other: {label: Other, params: {value: 2}, needs: {weights: main/base}}
"""
TWO = MATRIX[: MATRIX.index("      other")]
PARAMETERS = """seed: int = 0  # every draw
value: int = 1  # what the metric is made of
sleep: float = 0.0  # seconds of pretended work
weights: str = ""  # what to start from
fail: bool = False  # stop with an error
out: str = ""  # record
folder: str = ""  # where to leave things
progress: bool = False  # bar"""
ROW = """import time
from pathlib import Path
from leansense.core.paths import write_atomic
from leansense.core.record import Run
run = Run(globals(), "nbs/toy/80_row.ipynb")
home = run.claim("toy")
with open(home.parent / "log", "a") as file:
    file.write(f"{out.split('/')[-1]} start\\n")
if fail:
    raise ValueError("worn out")
start = int(Path(weights).read_text()) if weights else 0
time.sleep(sleep)
write_atomic(home / "best.ckpt", str(start + value))
run.finish({"score": 10 * (start + value)}, {}, {"name": "none", "fingerprint": ""}, {})"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A scratch checkout whose only system has a row that starts from another."""
    folder = toys.make(tmp_path / "clone", MATRIX)
    toys.save(folder / "nbs/toy/80_row.ipynb", [("parameters", PARAMETERS), ("", ROW)])
    monkeypatch.setenv("LEANSENSE_ROOT", str(folder))
    return folder


def matrix(house, text: str) -> None:
    write_atomic(house / "papers/toy/rows.yaml", text)


def reasons() -> dict[str, str]:
    return {step.row.name: step.reason for step in batch.plan("toy")}


def scores(house) -> dict[str, int]:
    found = (house / "papers/toy/records/demo/main").glob("*.json")
    return {path.stem: json.loads(path.read_text())["metrics"]["score"] for path in found}


def play(row: rows.Row) -> None:
    """What a run of the row's notebook leaves, made in this process."""
    (house := row.folder).mkdir(parents=True, exist_ok=True)
    values = row.params | {"seed": row.seed, "out": str(row.record), "folder": str(house)}
    exec(ROW, {"In": []} | values | {"progress": False})
    record.note_checkpoint(house)


def play_all(**more: str) -> None:
    for step in batch.plan("toy"):
        if step.reason:
            play(step.row)


# --- the whole way ---


def test_a_row_starts_from_another(house):
    """Parent first; both when the parent changes; in a fresh clone the parent only where needed."""
    matrix(house, TWO)
    done = tables(house)
    assert done.returncode == 0, done.stdout + done.stderr
    assert scores(house) == {"base.s0": 30, "tuned.s0": 40}
    assert reasons() == {"base": "", "tuned": ""}

    shutil.rmtree(house / "runs")
    assert reasons() == {"base": "", "tuned": ""}, "a checkpoint alone is no reason to train"
    matrix(house, TWO.replace("{label: Tuned,", "{label: Tuned, params: {value: 5},"))
    again = tables(house)
    assert again.returncode == 0 and scores(house) == {"base.s0": 30, "tuned.s0": 80}
    assert "1 row: changed value; 1 row: checkpoint needed by main/tuned.s0" in again.stdout
    assert "2/2" in again.stdout and started(house) == ["base.s0.json start", "tuned.s0.json start"]


def test_killed_between_parent_and_child(house):
    matrix(house, TWO.replace("{label: Tuned,", "{label: Tuned, params: {sleep: 2.0},"))
    main = toys.start(house)
    wait(lambda: "tuned.s0.json start" in started(house) or main.poll() is not None)
    kill_all(main)
    assert scores(house) == {"base.s0": 30}
    assert tables(house).returncode == 0 and scores(house) == {"base.s0": 30, "tuned.s0": 40}
    assert started(house) == ["base.s0.json start"] + ["tuned.s0.json start"] * 2


# --- what is current ---


def test_a_changed_parent_makes_its_children_run(house):
    play_all()
    assert scores(house) == {"base.s0": 30, "tuned.s0": 40, "other.s0": 50}
    assert set(reasons().values()) == {""}
    matrix(house, MATRIX.replace("value: 3", "value: 4"))
    late = "its parent main/base.s0 runs again"
    assert reasons() == {"base": "changed value", "tuned": late, "other": late}
    play(rows.read_rows("toy")[0])  # killed here: the children are still known to be late
    assert reasons()["base"] == ""
    assert reasons()["tuned"] == reasons()["other"] == "its parent main/base.s0 has changed"


def test_only_the_parent_of_a_stale_row_runs_again(house):
    play_all()
    known = {row.name: row for row in rows.read_rows("toy")}
    for row in known.values():
        shutil.rmtree(row.folder)
    assert set(reasons().values()) == {""}
    matrix(house, MATRIX.replace("value: 2", "value: 5"))
    needed = "checkpoint needed by main/other.s0"
    assert reasons() == {"base": needed, "tuned": "", "other": "changed value"}
    play(known["base"])
    assert reasons() == {"base": "", "tuned": "", "other": "changed value"}


def test_a_checkpoint_of_another_run_is_not_used(house):
    """Its record came from elsewhere, or a run was stopped that had overwritten it."""
    play_all()
    base, tuned, _ = rows.read_rows("toy")
    write_atomic(base.record, base.record.read_text().replace('"seconds"', '"seconds" '))
    matrix(house, MATRIX.replace("{label: Tuned,", "{label: Tuned, params: {value: 7},"))
    assert reasons()["base"] == "checkpoint needed by main/tuned.s0"
    play(tuned)  # by hand, it counts by its content; the batch does not take it
    assert record.read(tuned.record)["params"]["weights"].startswith("best.ckpt#")
    with pytest.raises(RuntimeError, match="the checkpoint of main/base.s0 is not here"):
        rows.run_row(tuned)
    play(base)
    assert reasons()["base"] == "" and "changed" in reasons()["tuned"]
    write_atomic(base.checkpoint, "half a run")
    assert reasons()["base"] == "checkpoint needed by main/tuned.s0"


def test_code_of_parents_counts_through_vouching(house):
    """A record says which code its parents ran with; a vouched change of that is no change."""
    play_all()
    base, tuned, _ = rows.read_rows("toy")
    kept = json.loads(tuned.record.read_text())
    code = digest(tuned.notebook)
    assert kept["needs"] == {"demo/main/base.s0": code_key(code)}
    assert kept["params"]["weights"].startswith("main/base.s0#") and "missing" not in str(kept)
    write_atomic(tuned.record, record.text(kept | {"needs": {"demo/main/base.s0": "old"}}))
    assert reasons()["tuned"] == "its parent main/base.s0 has run with other code since"
    entry = {"notebook": tuned.notebook, "table": "main", "metrics": "m", "commit": "c"}
    vouched = [entry | {"old": "old", "new": code_key(code)}]
    write_atomic(house / "papers/toy/vouched.json", json.dumps(vouched))
    assert reasons()["tuned"] == ""


def test_grandparents_count(house):
    matrix(
        house,
        MATRIX.replace(
            "value: 2}, needs: {weights: main/base", "value: 2}, needs: {weights: main/tuned"
        ),
    )
    play_all()
    other = rows.read_rows("toy")[2]
    assert scores(house)["other.s0"] == 60
    assert sorted(record.read(other.record)["needs"]) == ["demo/main/base.s0", "demo/main/tuned.s0"]
    shutil.rmtree(house / "runs")
    matrix(house, (house / "papers/toy/rows.yaml").read_text().replace("value: 2", "value: 9"))
    assert reasons() == {
        "base": "checkpoint needed by main/tuned.s0",
        "tuned": "checkpoint needed by main/other.s0",
        "other": "changed value",
    }


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("main/base}}", "main/bas}}", "no row 'main/bas' at this scale; nearest is 'main/base'"),
        ("{weights: main", "{wieghts: main", "unknown parameter 'wieghts'; nearest is 'weights'"),
        ("{weights: main/base}", "{out: main/base}", "parameter 'out' is set by the runner"),
        ("{weights: main/base}", "{value: main/base}", "parameter 'value' must be int"),
        ("{weights: main/base}", "main/base", "needs: expected `parameter: table/row`"),
        ("params: {value: 3}", "needs: {weights: main/tuned}", "needs: a circle, main/"),
        ("Tuned,", "Tuned, seeds: [0, 3],", "needs: main/base has no seed 3, only 0"),
        ("Tuned,", "Tuned, params: {weights: x},", "'weights' is set by `needs`"),
    ],
)
def test_wrong_needs_are_one_line(house, old, new, said):
    assert old in MATRIX
    matrix(house, TWO.replace(old, new, 1))
    line = message(rows.RowsError, rows.read_rows, "toy")
    assert said in line and line.startswith("papers/toy/rows.yaml: ")


# --- grids ---

GRID = """tables:
  main:
    params: {value: 7}
    grid: {value: [1, 4], weights: ["", "a b/c"]}
    rows: {first: {label: First}}
"""


def test_a_grid_is_its_rows(house):
    matrix(house, GRID)
    found = {row.name: row for row in rows.read_rows("toy")}
    assert list(found) == ["first", "value1-weights_", "value1-weights_a_b_c"] + [
        "value4-weights_",
        "value4-weights_a_b_c",
    ]
    row = found["value4-weights_a_b_c"]
    assert (row.params["value"], row.params["weights"]) == (4, "a b/c")
    assert row.label == "value 4, weights a b/c" and found["first"].params["value"] == 7


@pytest.mark.parametrize(
    "change, said",
    [
        ("value: [1, 4] → valeu: [1, 4]", "main/valeu1-weights_: unknown parameter 'valeu'"),
        ("value: [1, 4] → value: [1, x]", "main/value_x-weights_: parameter 'value' must be int"),
        ("value: [1, 4] → value: 1", "main: grid: expected `parameter: [value, ...]` lines"),
        ("value: [1, 4] → value: []", "main: grid: expected `parameter: [value, ...]` lines"),
        ("a b/c → ?", "main: grid: two of its rows would be named 'value1-weights_'"),
        ("first → value1-weights_", "main: grid: row 'value1-weights_' is there already"),
    ],
)
def test_wrong_grids_are_refused(house, change, said):
    matrix(house, GRID.replace(*change.split(" → ")))
    with pytest.raises(rows.RowsError, match=re.escape(said)):
        rows.read_rows("toy")
