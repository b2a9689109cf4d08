"""Every notebook runs, with nothing downloaded; what is kept of its outputs; edited defaults."""

import json
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run
from leansense.core.notebooks import find_teaching, main, with_outputs
from leansense.core.parameters import check_parameters

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
CODE = """
import sys
from pathlib import Path
import nbdev.test
ok, seconds = nbdev.test.test_nb(Path(sys.argv[1]))
sys.exit(not ok)
"""


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
)
def test_notebook_runs(path):
    """In a process of its own, forked from one that has the libraries."""
    warm = "TRITON_INTERPRET" not in path.read_text()  # which triton reads while it is imported
    done = run(ROOT, "python", "-c", CODE, str(path), warm=warm)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# --- the parameters cell, edited by hand ---

DEFAULTS = "epochs: int = 3  # passes\nlr: float = 0.1  # rate\npatience: int = 0  # epochs\n"
USE = "from leansense.core.record import Run\nrun = Run(globals(), 'x')\nprint(epochs, lr)"


def edited(folder: Path, saved: str, ran: str, known: tuple = ("patience",)) -> dict:
    """What `check_parameters` says of a row notebook: `saved` in its file, `ran` in Lab."""
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": saved}]
    cells += [{"cell_type": "code", "metadata": {}, "source": USE}]
    (folder / "80_row.ipynb").write_text(json.dumps({"cells": cells}))
    session = {"In": ["", DEFAULTS, ran], "epochs": 3, "lr": 0.1, "patience": 0}  # of an older run
    exec(ran, session)
    return check_parameters(session, folder / "80_row.ipynb", known)


@pytest.mark.parametrize("name, wrong", [
    ("epochs", "epoch"), ("lr", "lrr"), ("patience", "patiance"),
])  # fmt: skip
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_misspelt_name_in_the_parameters_cell(tmp_path, name, wrong, is_saved):
    """Saved or not, used by the notebook or by the library, and whatever was run before."""
    cell = DEFAULTS.replace(f"{name}:", f"{wrong}:")
    with pytest.raises(ValueError, match=f"'{wrong}'.*'{name}'|'{name}' is used, but no cell"):
        edited(tmp_path, cell if is_saved else DEFAULTS, cell)


def test_a_line_lost_from_the_parameters_cell(tmp_path):
    cell = DEFAULTS.replace("lr: float = 0.1  # rate\n", "")
    with pytest.raises(ValueError, match="'lr' is missing in the parameters cell: restore"):
        edited(tmp_path, DEFAULTS, cell)
    with pytest.raises(ValueError, match="'lr' is used, but no cell defines it"):
        edited(tmp_path, cell, cell)


def test_edited_values_pass(tmp_path):
    assert edited(tmp_path, DEFAULTS, DEFAULTS.replace("= 3", "= 9"))["epochs"] == 9
    more = DEFAULTS + "mine: int = 1  # a new parameter, for a cell to come\n"
    assert edited(tmp_path, more, more)["mine"] == 1


# --- outputs ---


def notebook(path: Path, *sources: str) -> Path:
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [],
         "source": source.splitlines(keepends=True)}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    whole = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return path


@pytest.fixture
def top(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    return tmp_path


PICTURE = """
import sys, time
import matplotlib.pyplot as plt
import numpy as np
print("in red", file=sys.stderr)
print(r"%s/runs/x.pt")
figure, axis = plt.subplots(figsize=(12, 8), dpi=200)
axis.imshow(np.random.default_rng(0).random((400, 600)))
plt.show()
"""
CLOCK = "started = time.perf_counter()\nprint(f'{time.perf_counter() - started:.9f} s')"


def test_outputs_are_small_clean_and_the_same_again(top, capfd):
    """One file twice the same bytes, which nbdev_clean keeps; times stay as they are stored."""
    path = notebook(top / "nbs/00_a.ipynb", PICTURE % top, CLOCK, "object()")
    assert main([]) == 0 and "(in red: in red)" in capfd.readouterr().out
    first = path.read_bytes()
    assert main([str(path)]) == 0 and path.read_bytes() == first and len(first) <= 150_000
    shown = [output for cell in json.loads(first)["cells"] for output in cell["outputs"]]
    assert [o.get("name", o["output_type"]) for o in shown] == [
        "stdout", "display_data", "stdout", "execute_result",
    ]  # fmt: skip
    assert shown[0]["text"] == ["runs/x.pt\n"] and "0x" not in str(shown[3])
    done = run(ROOT, str(Path(sys.executable).with_name("nbdev_clean")), "--fname", str(path))
    assert done.returncode == 0 and path.read_bytes() == first


def test_a_notebook_that_fails_keeps_its_outputs(top, capsys):
    """The others go on, and the command says so at its end; what the batch runs is refused."""
    bad = notebook(top / "nbs/00_a.ipynb", "1 / 0")
    lost = notebook(top / "nbs/01_b.ipynb", "print('/' + 'home/ada/x')")
    good = notebook(top / "nbs/02_c.ipynb", "1 + 1")
    before = bad.read_bytes(), lost.read_bytes(), good.read_bytes()
    assert main(["--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "nbs/00_a.ipynb: ZeroDivisionError: division by zero" in said
    assert "01_b.ipynb: the cell 'print('/' + 'home/ada/x')' shows /" + "home/ada" in said
    assert "1 of 3 notebooks" in said
    assert (bad.read_bytes(), lost.read_bytes()) == before[:2] and good.read_bytes() != before[2]
    row = json.loads(good.read_text())
    row["cells"][0]["metadata"]["tags"] = ["parameters"]
    good.write_text(json.dumps(row))
    assert main([str(good)]) == 1 and main(["--system", "no"]) == 1
    assert "run by the batch" in (said := capsys.readouterr().err) and "nbs/no" in said
    assert good not in find_teaching()


def test_too_much_to_show_is_an_error():
    cell = {"cell_type": "code", "source": ["print(x)"], "outputs": []}
    stream = {"output_type": "stream", "name": "stdout", "text": "a line\n" * 30_000}
    with pytest.raises(ValueError, match="much.ipynb: .* bytes with outputs; show less"):
        with_outputs({"cells": [cell], "metadata": {}}, [[stream]], "much.ipynb")
