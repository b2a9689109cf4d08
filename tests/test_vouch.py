"""Vouching for a change that computes the same, and running notebooks warm: on a toy system."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from leansense.core import record, tables, vouch
from leansense.core.digest import code_key, digest
from leansense.core.paths import write_atomic
from leansense.core.rows import read_rows
from leansense.core.warm import Job, run_rows
from test_records import save

CELL = """value: int = 1  # of the metric
seed: int = 0  # draws
out: str = ""  # record
folder: str = ""  # checkpoints
progress: bool = False  # bar"""
BODY = """from leansense.core.record import Run
from leansense.toy.calc import score
run = Run(globals(), "nbs/toy/80_row.ipynb")
folder = run.claim("toy")
data = {"name": "none", "fingerprint": ""}
run.finish({"score": score(value, seed), "history": [0.1 * value, seed]}, {}, data, {})"""
CALC = "def score(value, seed):\n    return value * 10 + seed\n"
MATRIX = """title: a toy
headline: {table: main, row: one, metric: score, name: score}
seeds: [0, 1]
scales: {smoke: {seeds: [0]}}
tables:
  main:
    rows: {one: {label: One}, two: {label: Two, params: {value: 2}}, again: {label: One again}}
  more:
    rows: {three: {label: Three, params: {value: 3}}}
"""


def git(house, *words):
    done = subprocess.run(
        ["git", "-C", str(house), "-c", "user.name=t", "-c", "user.email=t@example.org", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def calc(house, text):
    write_atomic(house / "lib/leansense/toy/calc.py", text)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository with a toy system, its eight records committed with the code that made them."""
    house = tmp_path_factory.mktemp("house") / "my clone's {1} (copy)"
    shutil.copytree(
        ROOT / "lib/leansense/core",
        house / "lib/leansense/core",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name, text in {
        "lib/leansense/__init__.py": '__version__ = "0"\n',
        "lib/leansense/toy/__init__.py": "",
        "settings.ini": "[DEFAULT]\nlib_name = leansense\n",
        ".gitignore": "__pycache__\nruns\ndata\n",
        "papers/toy/rows.yaml": MATRIX,
    }.items():
        write_atomic(house / name, text)
    calc(house, CALC)
    save(house / "nbs/toy/80_row.ipynb", CELL, BODY)
    before, os.environ["LEANSENSE_ROOT"] = os.environ["LEANSENSE_ROOT"], str(house)
    try:
        jobs = [
            Job(
                row.notebook,
                row.params | {"seed": row.seed, "out": str(row.record), "folder": str(row.folder)},
            )
            for row in read_rows("toy")
        ]
        assert all(done.ok for done in run_rows(jobs))
    finally:
        os.environ["LEANSENSE_ROOT"] = before
    git(house, "init", "-q")
    git(house, "add", "-A")
    git(house, "commit", "-qm", "all")
    return house


@pytest.fixture
def house(committed, tmp_path, monkeypatch):
    copy = tmp_path / "my clone's {1} (copy)"
    shutil.copytree(committed, copy)
    monkeypatch.setenv("LEANSENSE_ROOT", str(copy))
    return copy


def reasons():
    return [
        record.stale(row.record, row.params, digest(row.notebook), "") for row in read_rows("toy")
    ]


def entries(house):
    path = house / "papers/toy/vouched.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_nothing_to_do(house, capsys):
    assert reasons() == [""] * 8 and vouch.main(["toy"]) == 0
    assert "nothing to vouch for" in capsys.readouterr().out and entries(house) is None


def test_a_change_that_computes_the_same(house, capsys):
    old = digest("nbs/toy/80_row.ipynb")
    calc(house, "def score(value, seed):\n    total = 10 * value\n    return total + seed\n")
    assert set(reasons()) == {"changed code: leansense.toy.calc"}
    assert vouch.main(["toy"]) == 0
    assert reasons() == [""] * 8
    found = entries(house)
    assert [entry["table"] for entry in found] == ["main", "more"]
    for entry in found:
        assert entry["old"] == code_key(old) and entry["new"] == code_key(
            digest("nbs/toy/80_row.ipynb")
        )
        assert (
            entry["commit"] == git(house, "rev-parse", "HEAD")
            and entry["notebook"] == "nbs/toy/80_row.ipynb"
        )
    assert "toy main: 6 records vouched for" in capsys.readouterr().out
    assert all(record.vouched(row.record) for row in read_rows("toy"))
    assert not (house / "data").exists(), "stand-ins of both sides lie elsewhere"
    assert "8 records vouched for" in tables.caption_facts(tables.frame(read_rows("toy")), "demo")

    calc(
        house, "def score(value, seed):\n    return 11 * value + seed\n"
    )  # and on: this one does not
    assert set(reasons()) == {"changed code: leansense.toy.calc"}
    assert vouch.main(["toy"]) == 1
    said = capsys.readouterr().err
    assert (
        "toy main/one.s0: metrics.score: 10 → 11" in said
        and "toy more/three.s0: metrics.score: 30 → 33" in said
    )
    assert entries(house) == found and "" not in reasons()

    calc(
        house, CALC + "\n\ndef unused():\n    return 0\n"
    )  # and this one does, from the records' own commit
    assert vouch.main(["toy"]) == 0 and reasons() == [""] * 8 and len(entries(house)) == 4


def test_only_the_table_that_stays_equal(house, capsys):
    calc(house, "def score(value, seed):\n    return value * 10 + seed + (value == 3)\n")
    assert vouch.main(["toy"]) == 1
    assert [entry["table"] for entry in entries(house)] == ["main"]
    assert [bool(reason) for reason in reasons()] == [False] * 6 + [True] * 2
    assert "toy more/three.s0: metrics.score: 30 → 31" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, word",
    [
        (
            "def score(value, seed):\n    return float(value * 10 + seed)\n",
            "metrics.score: 10 → 10.0",
        ),
        (
            "def score(value, seed):\n    raise ValueError('worn out')\n",
            "fails under today's code: ValueError: worn out",
        ),
        (
            "def score(value, seed):\n    import os\n    os._exit(0)\n",
            "fails under today's code: RuntimeError: the process ended",
        ),
    ],
)
def test_what_differs_or_fails_is_refused(house, capsys, text, word):
    calc(house, text)
    assert vouch.main(["toy"]) == 1 and entries(house) is None
    assert f"toy main/one.s0: {word}" in capsys.readouterr().err


def test_other_reasons_are_not_vouched_for(house):
    calc(house, CALC + "\nX = 1\n")
    write_atomic(house / "papers/toy/rows.yaml", MATRIX.replace("value: 2", "value: 4"))
    assert vouch.main(["toy"]) == 0
    assert [reason for reason in reasons() if reason] == ["changed value"] * 2


def test_code_that_was_never_committed(house, capsys):
    """A record made by edits that nobody committed names a code that no commit has."""
    first = git(house, "rev-parse", "HEAD")
    calc(house, CALC + "\nX = 1\n")
    for row in read_rows("toy"):
        kept = json.loads(row.record.read_text()) | {"code": digest(row.notebook)}
        write_atomic(row.record, record.text(kept))
    git(house, "add", "papers")
    git(house, "commit", "-qm", "records only")
    calc(house, CALC + "\nX = 2\n")
    assert vouch.main(["toy"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "say where it is: --from COMMIT" in line
    calc(house, CALC + "\nX = 1\n")
    git(house, "commit", "-qam", "the code, late")
    late = git(house, "rev-parse", "HEAD")
    calc(house, CALC + "\nX = 2\n")
    assert (
        vouch.main(["toy", "--from", first]) == 2 and "have not the code" in capsys.readouterr().err
    )
    assert vouch.main(["toy", "--from", "nowhere"]) == 2
    assert vouch.main(["toy", "--from", late]) == 0 and reasons() == [""] * 8


def test_a_new_parameter_at_its_default(house):
    """Records made before a notebook gained a parameter stay current, once its code is vouched."""
    save(house / "nbs/toy/80_row.ipynb", CELL + "\nwidth: int = 3  # a new one", BODY)
    assert set(reasons()) == {"changed width"}, "the same code may compute something else with it"
    calc(house, CALC + "\nX = 1\n")
    assert set(reasons()) == {"changed width"}
    assert vouch.main(["toy"]) == 0 and reasons() == [""] * 8
    write_atomic(house / "papers/toy/rows.yaml", MATRIX.replace("value: 2", "value: 2, width: 4"))
    assert reasons() == [""] * 2 + ["changed width"] * 2 + [""] * 4
    write_atomic(house / "papers/toy/rows.yaml", MATRIX)
    calc(house, CALC + "\nX = 2\n")
    assert set(reasons()) == {"changed width"} and vouch.main(["toy"]) == 0


def test_rows_that_start_from_others_are_run_behind_them(house):
    body = BODY.replace("value, seed)", "value, seed) + start").replace(
        "folder = run.claim",
        "start = int(open(weights).read()) if weights else 0\nfolder = run.claim",
    )
    body += "\n(folder / 'best.ckpt').write_text(str(value))"
    save(house / "nbs/toy/80_row.ipynb", CELL + '\nweights: str = ""  # start', body)
    matrix = MATRIX.replace("{label: Three,", "{label: Three, needs: {weights: main/two},")
    write_atomic(house / "papers/toy/rows.yaml", matrix)
    found = vouch.measure(vouch.smoke_rows("toy")["more"], house, house / "runs/side")
    assert found["toy more/three.s0"]["score"] == 30 + 2 and found["toy main/two.s0"]["score"] == 20


def test_files_outside_git_are_read_where_they_are(house):
    """Weights lie in this checkout, not in the one of the old code that is unpacked beside it."""
    body = BODY.replace("value, seed)", "value, seed) + int(open(weights).read())")
    save(house / "nbs/toy/80_row.ipynb", CELL + '\nweights: str = "data/w.txt"  # start', body)
    write_atomic(house / "data/w.txt", "5")
    old = house / "runs/old"
    for name in ("lib", "nbs"):
        shutil.copytree(house / name, old / name)
    shutil.copy(house / "settings.ini", old)
    found = vouch.measure(vouch.smoke_rows("toy")["more"], old, house / "runs/side")
    assert found["toy more/three.s0"]["score"] == 30 + 5


def test_entries_chain(house):
    row = read_rows("toy")[0]
    here, old = digest(row.notebook), code_key(record.read(row.record)["code"])
    calc(house, CALC + "\nX = 1\n")
    new = code_key(digest(row.notebook))
    entry = {"notebook": row.notebook, "table": "main", "metrics": "m", "commit": "c"}
    chain = [
        entry | {"old": "mid", "new": new},
        entry | {"old": old, "new": "mid"},
        entry | {"old": "mid", "new": old},
    ]

    def current(*found):
        write_atomic(house / "papers/toy/vouched.json", json.dumps(found))
        return record.stale(row.record, row.params, digest(row.notebook), "") == ""

    assert current(*chain) and not current(chain[0]) and not current(chain[1])
    assert not current(*(link | {"table": "more"} for link in chain))
    assert not current(*(link | {"notebook": "nbs/toy/84_cost.ipynb"} for link in chain))
    calc(house, CALC)
    assert digest(row.notebook) == here and current()


@pytest.mark.parametrize("text", ["{", "[1]", '[{"old": "a"}]', "null"])
def test_damaged_entries_are_one_line(house, text):
    calc(house, CALC + "\nX = 1\n")
    write_atomic(house / "papers/toy/vouched.json", text)
    with pytest.raises(
        ValueError, match="vouched.json: not a list of vouched changes; restore it from git"
    ):
        reasons()


# --- warm


def test_each_notebook_has_an_interpreter_of_its_own(tmp_path):
    one = save(
        tmp_path / "one.ipynb",
        "n: int = 1  # how many",
        "import os, json\nassert not hasattr(json, 'mark')\njson.mark = n\n"
        "print('n', n, os.getcwd(), os.environ['WHO'])",
    )
    bad = save(
        tmp_path / "bad.ipynb",
        "n: int = 1  # how many",
        "x = 1",
        "raise KeyError('lost')",
        "print('never')",
    )
    out = save(tmp_path / "exit.ipynb", "import sys", "sys.exit(3)", tagged=False)
    magic = save(
        tmp_path / "magic.ipynb",
        "%matplotlib inline\nfiles = !echo a",
        "assert files == ['a']",
        tagged=False,
    )
    jobs = [
        Job(str(one), {"n": 2}, {"WHO": "a"}, str(tmp_path)),
        Job(str(one), {}, {"WHO": "b"}),
        Job(str(bad)),
        Job(str(out)),
        Job(str(magic)),
    ]
    done = run_rows(jobs, 2)
    assert [each.ok for each in done] == [True, True, False, False, True], done
    assert f"n 2 {tmp_path} a" in done[0].output and "n 1" in done[1].output
    assert (
        done[2].error == "KeyError: 'lost'"
        and "never" not in done[2].output
        and "Traceback" in done[2].output
    )
    assert "SystemExit" in done[3].error


def hanging(folder, *first: str) -> str:
    """A notebook that never ends, after its first cells."""
    last = ("import time", "time.sleep(600)")
    return str(save(folder / "hang.ipynb", *first, *last, tagged=False))


def test_a_job_that_hangs_or_dies_is_ended(tmp_path):
    code = ("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)")
    dies = save(tmp_path / "dies.ipynb", *code, tagged=False)
    [late], [lost] = run_rows([Job(hanging(tmp_path))], timeout=1), run_rows([Job(str(dies))])
    assert "not done in 1 s" in late.error and "ended with status 9" in lost.error


def test_nothing_outlives_the_process_that_asked(tmp_path):
    note = tmp_path / "pid"
    hang = hanging(tmp_path, f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))")
    code = f"from leansense.core.warm import Job, run_rows; run_rows([Job({hang!r})])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    )
    while not (note.exists() and note.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{note.read_text()}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{note.read_text()}")
