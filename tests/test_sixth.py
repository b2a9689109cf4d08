"""What it takes to add a system: under 150 lines, and it stands in tables and README by itself."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import sixth
from conftest import run
from toy import environment

NOTEBOOKS = {
    "00_data": sixth.DATA,
    "10_model": sixth.MODEL,
    "20_task": sixth.TASK,
    "80_row": sixth.ROW,
    "90_results": sixth.RESULTS,
}


def write(path: Path, sources: list[str]) -> None:
    """A notebook of these cells: texts begin with a heading, parameters with their word."""
    cells = []
    for k, source in enumerate(sources):
        kind = "markdown" if source.startswith("# Clouds") else "code"
        tagged = source.startswith("# parameters")
        cell = {
            "cell_type": kind,
            "id": f"c{k}",
            "metadata": {"tags": ["parameters"]} if tagged else {},
            "source": source,
        }
        cells.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    names = {"name": "python3", "display_name": "python3", "language": "python"}
    made = {"cells": cells, "metadata": {"kernelspec": names}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))


@pytest.fixture
def house(clone):
    for system in (path.parent for path in clone.glob("papers/*/rows.yaml")):
        shutil.rmtree(system)
    for name, sources in NOTEBOOKS.items():
        write(clone / f"nbs/clouds/{name}.ipynb", sources)
    (clone / "papers/clouds").mkdir()
    (clone / "papers/clouds/rows.yaml").write_text(sixth.MATRIX)
    exported = run(clone, str(Path(sys.executable).with_name("nbdev_export")))
    assert exported.returncode == 0, exported.stderr
    return clone


def batch(folder: Path):
    return run(
        folder, sys.executable, "-m", "leansense.core.batch", "--cores", "2",
        **environment(folder),
    )  # fmt: skip


def test_it_is_short():
    texts = [*(cell for cells in NOTEBOOKS.values() for cell in cells), sixth.MATRIX]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    assert len(lines) <= 150, len(lines)


def test_it_appears_by_itself(house):
    done = batch(house)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    records = {
        path.name: json.loads(path.read_text())
        for path in (house / "papers/clouds/records/demo/main").glob("*.json")
    }
    rows = ("plain", "tuned", "width4", "width16")
    assert records.keys() == {f"{row}.s{seed}.json" for row in rows for seed in (0, 1)}
    for name in ("plain.s0.json", "width16.s1.json"):
        assert records[name]["data"] == {
            "name": "clouds", "fingerprint": "clouds-80-1", "train": 80, "valid": 40, "test": 40,
        }  # fmt: skip
    tuned = records["tuned.s0.json"]["metrics"]
    assert tuned.keys() >= {"base_history", "head_history", "base_best_epoch", "test_acc"}
    table = (house / "papers/clouds/tables/main.tex").read_text()
    assert all(label in table for label in ("Plain", "Tuned", "width 4", "width 16"))
    readme = (house / "README.md").read_text()
    assert "**clouds** — clouds of points" in readme and "accuracy" in readme
    again = batch(house)
    assert again.returncode == 0 and "8 current" in again.stdout, again.stdout
