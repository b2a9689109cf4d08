"""A toy system in a small scratch checkout: rows that take no time, stop with an error, wait, or go on after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, run
from leansense.core.paths import write_atomic

ROW = [
    (
        "parameters",
        """seed: int = 0  # every draw
value: int = 1  # what the metric is made of
sleep: float = 0.0  # seconds of pretended work
fail: bool = False  # stop with an error
data: str = ""  # folder whose files are counted
out: str = ""  # record
folder: str = ""  # where to leave things
progress: bool = False  # bar""",
    ),
    (
        "",
        """import json
import time
from pathlib import Path
from leansense.core.paths import root, write_atomic
from leansense.core.record import Run
run = Run(globals(), "nbs/toy/80_row.ipynb")
home = run.claim("toy")""",
    ),
    (
        "",
        """with open(home.parent / "log", "a") as file:
    file.write(f"{out.split('/')[-1]} start\\n")
if fail:
    raise ValueError(f"heads=5 does not divide 144, see {root()}/papers/toy/rows.yaml and /opt/some where/x.csv")
state = home / "state.json"  # a checkpoint: three steps, each kept, of this value only
step, total, of = json.loads(state.read_text()) if state.exists() else (0, 0, value)
if of != value:
    step, total = 0, 0
while step < 3:
    time.sleep(sleep / 3)
    step, total = step + 1, total + value * (step + 1)
    write_atomic(state, json.dumps([step, total, value]))
found = sorted(path.name for path in Path(data).iterdir()) if data else []
score = value * 10 + seed + total - value * 6
run.finish({"score": score, "files": found}, {}, {"name": "none", "fingerprint": ""}, {"device": "cpu", "threads": 1})""",
    ),
]
RESULTS = [
    (
        "parameters",
        """scale: str = "demo"  # which records
data: str = ""  # data set
out: str = ""  # where the list of files goes""",
    ),
    (
        "",
        """from leansense.core.tables import Column, Paper, over_seeds
paper = Paper("toy", scale, data)
lines = over_seeds(paper.runs("main"), ["metrics.score"])
paper.table("main", lines, [Column("metrics.score", "score", digits=1, best=max)])
paper.number("Best", float(lines["metrics.score"].max()), 1)
paper.finish(out)""",
    ),
]
MATRIX = """title: a toy
headline: {table: main, row: one, metric: score, name: score}
seeds: [0, 1]
tables:
  main:
    rows:
      one: {label: One}
      two: {label: Two, params: {value: 2}}
"""
SMALL = "tables: {main: {rows: {one: {label: One}}}}\n"  # one row, one seed
PARTS = (
    "lib",
    "nbs/core",
    "papers/Snakefile",
    "papers/profiles",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "Makefile",
    ".gitignore",
)


def save(path: Path, cells) -> None:
    write_atomic(
        path,
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "id": f"c{i}",
                        "metadata": {"tags": [tag]} if tag else {},
                        "source": code,
                        "outputs": [],
                        "execution_count": None,
                    }
                    for i, (tag, code) in enumerate(cells)
                ],
                "metadata": {
                    "kernelspec": {
                        "name": "python3",
                        "display_name": "python3",
                        "language": "python",
                    }
                },
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        ),
    )


def make(target: Path, matrix: str = MATRIX) -> Path:
    """A checkout at `target` with core and the toy as its only system."""
    names = (
        subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z", *PARTS],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    save(target / "nbs/toy/80_row.ipynb", ROW)
    save(target / "nbs/toy/90_results.ipynb", RESULTS)
    write_atomic(target / "papers/toy/rows.yaml", matrix)
    return target


BATCH = ("-m", "leansense.core.batch", "--system", "toy", "--cores", "2")


def environment(folder: Path) -> dict:
    """What a process in the scratch checkout gets to see."""
    hidden = ("IN_TEST", "LEANSENSE_DATA", "LEANSENSE_PARENT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"LEANSENSE_ROOT": str(folder), "PYTHONPATH": str(folder / "lib")}


def start(folder: Path, *more: str, **options) -> subprocess.Popen:
    """The batch in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *BATCH, *more],
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options,
    )


def tables(folder: Path, *more: str, **env):
    """The batch, to its end."""
    return run(folder, "python", *BATCH, *more, **env)


def started(folder: Path, scale: str = "demo") -> list[str]:
    """Which rows began, as they noted it themselves."""
    log = folder / f"runs/{scale}/toy/main/log"
    return sorted(log.read_text().split("\n")[:-1]) if log.exists() else []


def table(folder: Path, sub: str = "") -> str:
    return (folder / "papers/toy" / sub / "tables/main.tex").read_text()


def kept(folder: Path) -> dict:
    """The records, without what may differ between two runs."""
    found = {}
    for path in sorted((folder / "papers/toy/records").rglob("*.json")):
        record = json.loads(path.read_text())
        found[path.name] = {
            key: value for key, value in record.items() if key not in ("cost", "env")
        }
    return found
