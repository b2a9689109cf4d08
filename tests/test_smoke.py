"""Smoke rows in forked children of a warm process: what they leave, and what ends with what."""

import json
import os
import signal
import sys

import pytest

import toy as toys
from conftest import run
from leansense.core import batch
from leansense.core.paths import write_atomic
from test_crash import family, gone, wait
from test_needs import PARAMETERS, ROW
from toy import started, tables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked rows are for Linux")
MATRIX = """tables:
  main:
    rows:
      late: {label: Late, needs: {weights: main/all}}
      all: {label: All, cores: all}
      worn: {label: Worn, params: {fail: true}}
      child: {label: Child, needs: {weights: main/worn}}
      slow: {label: Slow, params: {sleep: SECONDS}}
"""


@pytest.fixture
def house(tmp_path):
    """A scratch checkout whose rows start from others, fail, take time or want all cores."""
    folder = toys.make(tmp_path / "my clone's {1}", MATRIX.replace("SECONDS", "0.1"))
    body = ROW.replace("}, {})", "}, {'OMP': os.environ['OMP_NUM_THREADS']})")
    body = body.replace(
        "import time", "import os, sys, time\nprint('hello', 'torch' in sys.modules)"
    )
    toys.save(folder / "nbs/toy/80_row.ipynb", [("parameters", PARAMETERS), ("", body)])
    return folder


def warm_here(monkeypatch) -> None:
    """No GPU to take turns on, whatever this machine has."""
    hidden = [d for d in os.environ["PATH"].split(":") if not os.path.exists(f"{d}/nvidia-smi")]
    monkeypatch.setenv("PATH", ":".join(hidden))


def test_forked_rows_leave_what_others_do(house, monkeypatch):
    """Records, executed notebooks, reasons, stamps; one row's failure is no other's."""
    warm_here(monkeypatch)
    done = tables(house, "--scale", "smoke")
    assert done.returncode == 1 and "5/5" not in done.stdout
    assert "failed: toy main/worn.s0: ValueError: worn out" in done.stderr
    assert "failed: toy main/child.s0: not run: its parent main/worn.s0 failed" in done.stderr
    assert "left" not in done.stdout.rpartition("3/5")[2], "nothing is, when all have ended"
    runs, records = house / "runs/smoke/toy/main", house / "runs/smoke/papers/toy/records/smoke"
    found = {p.stem: json.loads(p.read_text()) for p in (records / "main").glob("*.json")}
    scores = {name: record["metrics"]["score"] for name, record in found.items()}
    assert scores == {"late.s0": 20, "all.s0": 10, "slow.s0": 10}
    assert {record["env"]["OMP"] for record in found.values()} == {"1"}
    assert {p.stem for p in runs.glob("*.done")} == {"late.s0", "all.s0", "slow.s0"}
    assert "worn out" in (runs / "worn.s0.ipynb").read_text()
    executed = json.loads((runs / "late.s0.ipynb").read_text())
    assert executed["cells"][0]["metadata"]["tags"] == ["parameters"]
    assert "hello False" in str(executed["cells"][2]["outputs"]), "the toy imports no torch"
    log = started(house, "smoke")
    assert log.index("all.s0.json start") < log.index("late.s0.json start") and len(log) == 4

    cold = run(
        house, "python", "-m", "leansense.core.rows", "run", "toy", "main/slow.s0", "--scale=smoke"
    )
    assert cold.returncode == 0, cold.stderr
    again = json.loads((records / "main/slow.s0.json").read_text())
    same = ("metrics", "params", "code", "data", "seed")
    assert [again[word] for word in same] == [found["slow.s0"][word] for word in same]


@pytest.mark.parametrize("how", ["KILL", "TERM", "server"])
def test_forked_rows_end_with_the_batch(house, how, monkeypatch):
    """Nothing is left running, the clone is free, and the same command goes on."""
    warm_here(monkeypatch)
    write_atomic(house / "papers/toy/rows.yaml", MATRIX.replace("SECONDS", "600.0"))
    main = toys.start(house, "--scale", "smoke")
    try:
        wait(lambda: "slow.s0.json start" in started(house, "smoke") or main.poll() is not None)
        others = family(main)[1:]
        assert len(others) >= 3
        if how == "server":
            others[0].kill()  # its row is lost and says so
            assert main.wait(120) == 1
            note = house / "runs/smoke/toy/main/slow.s0.error"
            assert "its process ended without a word; was it killed?" in note.read_text()
        else:
            main.send_signal(getattr(signal, f"SIG{how}"))
            assert main.wait(60) == {"KILL": -9, "TERM": 143}[how]
        wait(lambda: gone(others), 30)
    finally:
        for each in family(main):
            each.kill()
    free = run(house, "python", "-c", "from leansense.core.batch import own_lock; own_lock()")
    assert free.returncode == 0, free.stderr


def test_who_may_fork(monkeypatch):
    """Only smoke rows of this machine; a GPU is shared by turns."""
    options = ["--profile", "x", "--cores", "2"]
    warm_here(monkeypatch)
    assert batch._forks("smoke", options)
    assert not batch._forks("demo", options) and not batch._forks("smoke", options[:2])
    monkeypatch.setattr(batch.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not batch._forks("smoke", options)
