"""What makes a run, whose folder it is, which code made a record, and what damage does."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from leansense.core import batch, digest, parameters, record, rows
from leansense.core.parameters import OWNED, read_parameters
from leansense.core.paths import write_atomic

NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "nbs").rglob("8?_*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
CELL = """epochs: int = 3  # passes
lr: float = 1e-3  # rate
name: str = "a"  # text
size: dict = {}  # of the problem
data: str = "standin"  # folder
weights: str = ""  # file
num_workers: int = 0  # processes
seed: int = 0  # draws
out: str = ""  # record
folder: str = ""  # checkpoints"""
GIVEN = {
    "epochs": 3,
    "lr": 1e-3,
    "name": "a",
    "size": {},
    "data": "standin",
    "weights": "",
    "num_workers": 0,
    "seed": 0,
    "out": "",
    "folder": "",
}


def save(path, *cells, tagged=True):
    def tag(i):
        return {"tags": ["parameters"]} if tagged and i == 0 else {}

    return write_atomic(
        path,
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "metadata": tag(i),
                        "source": code,
                        "id": f"c{i}",
                        "outputs": [],
                        "execution_count": None,
                    }
                    for i, code in enumerate(cells)
                ],
                "metadata": {},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        ),
    )


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A scratch repository with one toy system and the library of this checkout."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = leansense\n")
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    (tmp_path / "lib").symlink_to(ROOT / "lib")
    save(tmp_path / "nbs/toy/80_row.ipynb", CELL)
    yield tmp_path
    for folder in list(record._CLAIMS):
        record._CLAIMS.pop(folder)[0].close()


def run(**more):
    return record.Run(GIVEN | more, "nbs/toy/80_row.ipynb")


def made(house, **more):
    """A sound record in its place, and the Run that wrote it."""
    out = house / "papers/toy/records/demo/main/one.s0.json"
    this = run(out=str(out), **more)
    this.finish({"f1": 0.5}, {}, {"name": "d", "fingerprint": "f0"}, {"device": "cpu"})
    return out, this


def other(value, kind):
    """Another value of a parameter's type."""
    if kind == "bool":
        return not value
    if kind in ("int", "float"):
        return (value or 0) + 1
    return (
        f"{value or ''}x"
        if kind == "str"
        else [*(value or []), 1]
        if kind == "list"
        else (value or {}) | {"x": 1}
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_parameter_makes_the_run(notebook, tmp_path):
    """Each parameter of each row notebook flipped: a new identity, unless it is on the list."""
    try:
        known = read_parameters(notebook)
    except ValueError:
        pytest.skip("a teaching or results notebook without a parameters cell")
    if "out" not in known or notebook.endswith("90_results.ipynb"):
        pytest.skip("leaves no record")
    defaults = {name: parameter.default for name, parameter in known.items()}
    system, table = notebook.split("/")[1], "t"
    path = tmp_path / f"papers/{system}/records/demo/{table}/r.s{defaults.get('seed', 0)}.json"
    this = record.Run(defaults | {"out": str(path)}, notebook)
    this.finish({"f1": 1.0}, {}, {"fingerprint": "f"}, {})
    base = this.identity("f")
    assert json.loads(json.dumps(base)) == base
    assert record.stale(path, defaults, this.code, "f") == ""
    for name, parameter in known.items():
        if name == "out":
            continue
        flipped = defaults | {name: other(parameter.default, parameter.type)}
        same = record.Run(dict(flipped), notebook).identity("f") == base
        assert same == (name in OWNED and name != "seed"), name
        reason = record.stale(path, flipped, this.code, "f")
        assert reason == ("" if name in OWNED else f"changed {name}"), name
    assert this.identity("g") != base


def test_identity_knows_seed_code_and_data(house):
    one = run().identity("f")
    assert run(seed=1).identity("f") != one and run().identity("g") != one
    save(house / "nbs/toy/80_row.ipynb", CELL, "x = 1")
    assert run().identity("f") != one


# --- a run owns its folder


def test_folder_is_named_by_what_makes_the_run(house):
    claims = [
        run(**more).claim("bot")
        for more in (
            {},
            {"seed": 1},
            {"epochs": 4},
            {"data": "a/images"},
            {"data": "b/images"},
            {"num_workers": 4},
        )
    ]
    assert claims[0] == claims[5] and len(set(claims)) == 5
    assert all(
        path.parent == house / "runs/by-hand/toy" and path.name.startswith("bot-")
        for path in claims
    )
    assert run(folder="runs/mine").claim("bot") == house / "runs/mine"


def test_logdir_counts_where_it_was_set(house):
    save(house / "nbs/toy/80_row.ipynb", CELL + '\nlogdir: str = "runs/toy"  # logs')
    assert run(logdir="runs/toy").claim("a").parent.name == "toy" and "by-hand" in str(
        run(logdir="runs/toy").claim("a")
    )
    assert run(logdir="runs/elsewhere").claim("a") == house / "runs/elsewhere"


HOLD = """import sys, time
from leansense.core.record import Run
Run({given!r}, "nbs/toy/80_row.ipynb").claim("bot")
{more}
print("held", flush=True)
time.sleep(60)"""


def holder(house, more="", **given):
    code = HOLD.format(given=GIVEN | given, more=more)
    env = os.environ | {"LEANSENSE_ROOT": str(house), "PYTHONPATH": str(ROOT / "lib")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_folder_of_a_living_process_is_refused(house):
    process = holder(house, folder="runs/mine")
    try:
        with pytest.raises(RuntimeError) as error:
            run(folder="runs/mine", seed=2).claim("bot")
        assert len(str(error.value).splitlines()) == 1
        assert f"process {process.pid} " in str(error.value) and "nbs/toy/80_row.ipynb" in str(
            error.value
        )
    finally:
        process.kill()
        process.wait()
    assert run(folder="runs/mine", seed=2).claim("bot") == house / "runs/mine"


def test_a_dead_parents_children_hold_nothing(house):
    """A loader's worker outlives a killed process for some seconds; its folder is free at once."""
    process = holder(house, "import os\nif not os.fork():\n    time.sleep(60)", folder="runs/mine")
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert run(folder="runs/mine").claim("bot")
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_claim_again_and_after_finish(house):
    first = run(folder="runs/mine", epochs=3)
    second = run(folder="runs/mine", epochs=4)
    assert first.claim("x") == second.claim("x") == second.claim("x")
    second.finish({"f1": 1.0}, {}, {}, {})
    process = holder(house, folder="runs/mine")  # let go by finish
    process.kill()
    process.wait()


# --- digest


LIBRARY = {
    "__init__": "",
    "core/__init__": "",
    "core/a": "from .b import f",
    "core/b": "def f(): return 1",
    "layers/__init__": "",
    "layers/k_native": "X = 1",
    "layers/k_triton": "X = 1",
    "leaf/__init__": "",
    "leaf/data": "X = 1",
    "leaf/x": "Y = 1",
}


@pytest.fixture
def library(house):
    """The scratch repository with a library of its own."""
    (house / "lib").unlink()
    for name, text in LIBRARY.items():
        write_atomic(house / f"lib/leansense/{name}.py", text)
    return house


@pytest.mark.parametrize(
    "code, module, found",
    [
        ('import_module("leansense.layers.k_native")', "", {"layers.k_native"}),
        (
            'K = {"cc": "leansense.layers.k_native", "torch": "leansense.layers.k_triton"}',
            "",
            {"layers.k_native", "layers.k_triton"},
        ),
        ('import_module(".k_native", __package__)', "leansense.layers.k", {"layers.k_native"}),
        ('import_module(".k_native", package="leansense.layers")', "", {"layers.k_native"}),
        (
            'import_module("..layers.k_native", __package__)',
            "leansense.core.a",
            {"layers.k_native"},
        ),
        ('__import__("leansense.layers.k_native")', "", {"layers.k_native"}),
        ('import_module(f"leansense.layers.{name}")', "", {"layers.k_native", "layers.k_triton"}),
        ('import_module("leansense.layers." + name)', "", {"layers.k_native", "layers.k_triton"}),
        ('import_module("leansense.layers.%s" % name)', "", {"layers.k_native", "layers.k_triton"}),
        (
            'import_module("leansense.layers.{}".format(name))',
            "",
            {"layers.k_native", "layers.k_triton"},
        ),
        (
            'import_module(f"{__package__}.{name}")',
            "leansense.layers.k",
            {"layers.k_native", "layers.k_triton"},
        ),
        (
            'import_module(f".{name}", __package__)',
            "leansense.layers.k",
            {"layers.k_native", "layers.k_triton"},
        ),
        (
            'P = "leansense.layers"\nimport_module(f"{P}.{name}")',
            "",
            {"layers.k_native", "layers.k_triton"},
        ),
        ('f"leansense.layers.k_{name}"', "", {"layers.k_native", "layers.k_triton"}),
        ('"leansense.core.a.f"', "", {"core.a"}),
        (
            'f"{name}.json", ".b", name.split("."), "python -m leansense.core.a", '
            'getLogger("leansense")',
            "",
            set(),
        ),
        ('f".{name}.part"', "leansense.core.a", set()),
    ],
)
def test_module_names_in_strings_are_imports(library, code, module, found):
    assert digest.imports(code, module) == {f"leansense.{name}" for name in found}


def test_the_asking_system_fills_a_gap(library):
    save(library / "nbs/leaf/80_row.ipynb", CELL, 'import_module(f"leansense.{system}.data")')
    assert set(digest.digest("nbs/leaf/80_row.ipynb")) == {
        "nbs/leaf/80_row.ipynb",
        "leansense.leaf.data",
    }


def test_kernels_of_todays_rows_are_in_their_digests():
    for kernel in ("native", "triton"):
        assert f"leansense.layers.linear_attention_{kernel}" in digest.digest(
            "nbs/leaf/80_row.ipynb"
        )


def test_staleness_names_the_module(library):
    save(
        library / "nbs/toy/80_row.ipynb",
        CELL,
        "from leansense.core.a import f",
        'from importlib import import_module\nimport_module("leansense.layers.k_native")',
    )
    out, this = made(library)
    assert record.read(out)["code"] == this.code and set(this.code) == {
        "nbs/toy/80_row.ipynb",
        "leansense.core.a",
        "leansense.core.b",
        "leansense.layers.k_native",
    }
    write_atomic(library / "lib/leansense/layers/k_native.py", "X = 2  # faster")
    assert (
        record.stale(out, GIVEN, digest.digest("nbs/toy/80_row.ipynb"), "f0")
        == "changed code: leansense.layers.k_native"
    )
    save(library / "nbs/toy/80_row.ipynb", CELL, "from leansense.core.a import f")
    assert record.stale(out, GIVEN, digest.digest("nbs/toy/80_row.ipynb"), "f0") == (
        "changed code: leansense.layers.k_native, nbs/toy/80_row.ipynb"
    )


SCRATCH = [
    "model?",
    "?fit",
    "model??",
    "files = !ls",
    "!ls",
    "%%bash\nfor f in *; do echo $f; done",
    "%timeit f()",
    "x = %env HOME",
    "  \n# nothing",
    "%%html\n<b>1</b>",
    "await f()",
]


@pytest.mark.parametrize("cell", SCRATCH)
def test_cells_are_read_as_jupyter_reads_them(house, cell):
    save(house / "nbs/toy/80_row.ipynb", CELL, "x = 1", cell)
    assert len(digest.digest("nbs/toy/80_row.ipynb")) == 1


def test_what_a_scratch_cell_changes(house):
    def key(*cells):
        save(house / "nbs/toy/80_row.ipynb", CELL, *cells)
        return digest.digest("nbs/toy/80_row.ipynb")

    assert (
        key("x = 1")
        == key("x = 1", "x?")
        == key("x = 1", "%matplotlib inline")
        == key("x = 1", "# later")
    )
    assert (
        key("x = 1")
        != key("x = 1", "!rm x")
        != key("x = 1", "%%bash\nrm x")
        != key("x = 1", "%%bash\nrm  x")
    )
    assert key("%%time\nfrom leansense.core.paths import root\nroot()") == key(
        "%%time\nfrom leansense.core.paths import root  # where\nroot( )"
    )
    assert "leansense.core.paths" in key("%%time\nfrom leansense.core.paths import root\nroot()")
    assert key("%%time\nf(1)") != key("%%time\nf(2)")


@pytest.mark.parametrize(
    "cell",
    [
        "x = 3 +",
        "def f(:",
        "for i in range(3)",
        "x = (1,",
        "if True:\nx",
        "%%time\nx = 3 +",
        "'abc",
    ],
)
def test_a_half_written_cell_is_one_line(house, cell, capsys):
    save(house / "nbs/toy/80_row.ipynb", CELL, "x = 1", cell)
    write_atomic(house / "papers/toy/rows.yaml", "tables: {main: {rows: {one: {label: One}}}}\n")
    (house / "papers/profiles/default").mkdir(parents=True)
    (house / "papers/profiles/default/config.yaml").write_text("")
    assert batch.main(["--system", "toy"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "80_row.ipynb, cell 3" in line and "mend" in line and "Traceback" not in line


def test_a_half_written_parameters_cell_is_one_line(house):
    save(house / "nbs/toy/80_row.ipynb", "epochs: int = (3  # passes")
    with pytest.raises(ValueError, match=r"80_row.ipynb, line 1: not Python"):
        parameters.read_parameters("nbs/toy/80_row.ipynb")


def test_scheduler_side_does_not_load_ipython():
    code = (
        "import sys\nfrom leansense.core.digest import digest\ndigest('nbs/leaf/80_row.ipynb')\n"
        "print('IPython' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"LEANSENSE_ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "lib")},
    )
    assert done.stdout.strip() == "False", done.stderr


# --- damage


def broken():
    def without(*names):
        return lambda r: {k: v for k, v in r.items() if k not in names}

    def but(**more):
        return lambda r: r | more

    cases = {
        f"no {name}": without(name)
        for name in (
            "schema",
            "params",
            "code",
            "data",
            "metrics",
            "cost",
            "env",
            "system",
            "table",
            "row",
            "seed",
            "scale",
            "set",
        )
    }
    for name in ("params", "code", "data", "metrics", "cost", "env", "system", "seed", "schema"):
        cases |= {
            f"{name} null": but(**{name: None}),
            f"{name} list": but(**{name: [1]}),
            f"{name} true": but(**{name: True}),
        }
    cases |= {
        "metrics {}": but(metrics={}),
        "seconds text": but(cost={"seconds": "x"}),
        "seconds true": but(cost={"seconds": True}),
        "schema text": but(schema="2"),
        "schema 0": but(schema=0),
        "schema 2.5": but(schema=2.5),
        "code text": but(code="0" * 16),
        "fingerprint null": but(data={"fingerprint": None}),
    }
    texts = {
        "empty": b"",
        "zeros": bytes(100),
        "list": b"[]",
        "null": b"null",
        "number": b"7",
        "not utf8": b'{"a": "\xff\xfe"}',
        "conflict": b"<<<<<<< HEAD\n{}\n=======\n",
        "deep": b"[" * 100_000,
    }
    return cases | texts


@pytest.mark.parametrize("how", broken())
def test_damaged_record_runs_again(house, how):
    out, this = made(house)
    good, damage = out.read_bytes(), broken()[how]
    out.write_bytes(
        damage if isinstance(damage, bytes) else json.dumps(damage(json.loads(good))).encode()
    )
    assert record.stale(out, GIVEN, this.code, "f0") == "unreadable record"
    with pytest.raises(ValueError, match="unreadable record; delete it and run the row again"):
        record.read(out)
    made(house)
    assert record.stale(out, GIVEN, this.code, "f0") == ""


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_record_has_json_numbers_only(house, number):
    out, this = made(house)
    out.write_text(out.read_text().replace("0.5", number))
    assert record.stale(out, GIVEN, this.code, "f0") == "unreadable record"


def test_cut_records_are_unreadable(house):
    out, this = made(house)
    good = out.read_bytes().rstrip()
    for size in range(0, len(good), 17):
        out.write_bytes(good[:size])
        assert record.stale(out, GIVEN, this.code, "f0") == "unreadable record"


def test_a_folder_in_its_place_is_moved_aside(house, capsys):
    out, this = made(house)
    out.unlink()
    write_atomic(out / "notes.txt", "mine")
    assert record.stale(out, GIVEN, this.code, "f0") == "unreadable record"
    made(house)
    assert record.stale(out, GIVEN, this.code, "f0") == ""
    [kept] = out.parent.rglob("notes.txt")
    assert kept.read_text() == "mine" and str(kept.parents[1]) in capsys.readouterr().out


def test_newer_schema_is_refused_and_kept(house):
    out, this = made(house)
    newer = out.read_text().replace('"schema": 2', '"schema": 99')
    out.write_text(newer)
    assert record.stale(out, GIVEN, this.code, "f0") == "newer schema; update the checkout"
    with pytest.raises(ValueError, match="schema 99, this code reads up to 2; update the checkout"):
        run(out=str(out))
    with pytest.raises(ValueError, match="update the checkout"):
        this.finish({"f1": 1.0}, {}, {}, {})
    assert out.read_text() == newer


def test_schema_one_reads_and_is_stale(house):
    out, this = made(house)
    out.write_text(json.dumps(json.loads(out.read_text()) | {"schema": 1, "code": "0" * 16}))
    assert record.read(out)["metrics"] == {"f1": 0.5}
    assert record.stale(out, GIVEN, this.code, "f0") == "older schema"


def test_a_copied_record_is_not_this_rows(house):
    out, this = made(house)
    copy = out.with_name("one.s1.json")
    copy.write_bytes(out.read_bytes())
    assert record.stale(copy, GIVEN, this.code, "f0") == "another row's record"


# --- where a record goes is looked at before training


@pytest.mark.parametrize("out", ["file.txt/record.json", "/proc/record.json", "folder"])
def test_unwritable_out_is_noticed_at_once(house, out):
    (house / "file.txt").write_text("")
    (house / "folder").mkdir()
    with pytest.raises((ValueError, OSError)) as error:
        run(out=out)
    assert str(error.value).startswith("out=") and len(str(error.value).splitlines()) == 1


def test_looking_leaves_nothing(house):
    run(out="runs/a/b.json")
    assert list((house / "runs/a").iterdir()) == []


def test_a_record_without_metrics_is_not_written(house):
    with pytest.raises(ValueError, match="metrics is empty"):
        run(out="runs/r.json").finish({}, {}, {}, {})
    assert not (house / "runs/r.json").exists()


# --- no path of this machine


def test_weights_count_by_content(house):
    for folder, content in (("A", b"1"), ("B", b"2"), ("C", b"1")):
        write_atomic(house / folder / "model.safetensors", content)
    kept = {
        folder: record.portable({"weights": str(house / folder / "model.safetensors")})["weights"]
        for folder in "ABC"
    }
    assert (
        re.fullmatch(r"model\.safetensors#[0-9a-f]{12}", kept["A"])
        and kept["A"] == kept["C"] != kept["B"]
    )
    assert record.portable({"weights": kept["A"]})["weights"] == kept["A"]
    write_atomic(house / "A/model.safetensors", b"3")
    assert record.portable({"weights": "A/model.safetensors"})["weights"] not in kept.values()
    assert record.portable({"weights": str(house)})["weights"].startswith(f"{house.name}#")
    assert record.portable({"weights": "none.pt"})["weights"] == "none.pt#missing"
    of_any_name = [
        record.portable({"words": f"{folder}/model.safetensors"})["words"] for folder in "ABC"
    ]
    assert len(set(of_any_name)) == 3 and all("#" in value for value in of_any_name)


def test_no_absolute_path_in_a_record(house):
    out = house / "papers/toy/records/demo/main/one.s0.json"
    where = "/disk/my photographs/rice"
    this = run(
        out=str(out),
        name="/disk/x/last.ckpt",
        size={"from": ["/a/b", f"see '{where}'"]},
        data=where,
    )
    this.finish(
        {"f1": 1.0, "missing": {"cc": f"gcc failed in {house}/nbs: '/usr/lib/my gcc/cc1'"}},
        {"log": "/var/log/x"},
        {"name": where, "fingerprint": ""},
        {"device": "cpu", "lib": "file:///opt/y/z.so", "rate": "12 images/s"},
    )
    kept = record.read(out)
    assert kept["params"]["name"] == "last.ckpt" and kept["params"]["size"] == {
        "from": ["b", "see 'rice'"]
    }
    assert kept["metrics"]["missing"]["cc"] == "gcc failed in nbs: 'cc1'"
    assert kept["env"]["rate"] == "12 images/s" and kept["data"]["name"] == "rice"
    assert not re.search(r"(?<![\w.])/\w", out.read_text().replace("images/s", "")), out.read_text()
    assert (
        record.stale(
            out,
            GIVEN
            | {
                "name": "/mnt/last.ckpt",
                "size": {"from": ["/c/b", "see 'rice'"]},
                "data": "/mnt/rice",
            },
            this.code,
            "",
        )
        == ""
    )


@pytest.mark.parametrize(
    "text, right",
    [
        (
            "FileNotFoundError: /disk/2024/rice leaf.csv: no such file",
            "FileNotFoundError: rice leaf.csv: no such file",
        ),
        ("ValueError: '/disk/my photos/a b.jpg': cut", "ValueError: 'a b.jpg': cut"),
        ("(/a/b/c), =/a/b", "(c), =b"),
        (
            "https://pytorch.org/docs and 3/4, m/s, a/b.c",
            "https://pytorch.org/docs and 3/4, m/s, a/b.c",
        ),
        ("O(N / 2)", "O(N / 2)"),
        ("nbs/leaf/80_row.ipynb", "nbs/leaf/80_row.ipynb"),
        ("error:/opt/x/y.py", "error:y.py"),
    ],
)
def test_text_without_paths(text, right):
    assert record.without_paths(text) == right


def test_paths_of_the_checkout_are_named_from_its_top(house):
    assert (
        record.without_paths(f"{house}/nbs/toy/80_row.ipynb, cell 3")
        == "nbs/toy/80_row.ipynb, cell 3"
    )


def test_a_checkout_with_blanks_in_its_path(tmp_path, monkeypatch):
    top = tmp_path / "my clone's {1} (copy)"
    top.mkdir()
    monkeypatch.setenv("LEANSENSE_ROOT", str(top))
    assert (
        record.without_paths(f"ValueError: {top}/nbs/x.ipynb: no cell")
        == "ValueError: nbs/x.ipynb: no cell"
    )


def test_back_ends_and_instructions_are_recorded(house):
    this = run()
    for name in ("cc-v3", "torch", "cc-v3"):
        record.note_backend("selective_scan", name)
    env = this.finish({"f1": 1.0}, {}, {}, {"device": "cpu"})["env"]
    assert env["backends"] == {"selective_scan": ["cc-v3", "torch"]} and "C v3" in env["isa"]
    assert run().finish({"f1": 1.0}, {}, {}, {})["env"]["backends"] == {}, "of this run only"


# --- parameters in a living notebook


@pytest.mark.parametrize(
    "values",
    [
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -float("inf")},
        {"size": {"a": [1.0, {"b": float("nan")}]}},
    ],
)
def test_numbers_are_finite(values):
    [line] = parameters.find_faults(values, parameters.parse(CELL))
    assert f"parameter '{next(iter(values))}' must be finite" in line


@pytest.mark.parametrize("value", [2024, 2024.5, True, None])
def test_text_that_looks_like_a_number(value):
    [line] = parameters.find_faults({"data": value}, parameters.parse(CELL))
    assert "'data' must be str" in line and "quote it; with papermill use -r data value" in line


ROW = (
    "from leansense.core.record import Run",
    "run = Run(globals(), 'nbs/toy/80_row.ipynb')",
    "folder = run.claim('x')\nname = name or 'made up'\nfor epochs_done in range(2): pass",
)


class Session:
    """A notebook's session: cells are executed, and stand in `In`."""

    def __init__(self, house, *row):
        save(house / "nbs/toy/80_row.ipynb", CELL, *row)
        self.row, self.names = row, {"In": [""]}
        self.cell(CELL)

    def cell(self, source):
        self.names["In"].append(source)
        exec(source, self.names)  # noqa: S102
        return self

    def all(self):
        for source in self.row:
            self.cell(source)
        return self.names["run"]


def test_the_run_cell_twice(house):
    session = Session(house, *ROW).cell("# Parameters\nname = ''\nfolder = 'runs/mine'\n")
    first = session.all()
    again = session.cell(ROW[1]).names["run"]
    assert (
        again.params == first.params
        and again.params["name"] == ""
        and again.params["folder"] == "runs/mine"
    )
    assert again.identity("f") == first.identity("f")
    session.cell("folder = 'runs/yours'\nname = 'b'").cell(ROW[1])
    assert (
        session.names["run"].params["folder"] == "runs/yours"
        and session.names["run"].params["name"] == "b"
    )


def test_the_run_cell_twice_without_a_history(house):
    save(house / "nbs/toy/80_row.ipynb", CELL, *ROW)
    names = dict(GIVEN)
    first = record.Run(names, "nbs/toy/80_row.ipynb")
    names |= {"folder": first.claim("x"), "name": "made up"}
    assert record.Run(names, "nbs/toy/80_row.ipynb").params == first.params


@pytest.mark.parametrize(
    "mend", ["# Parameters\nepochs = 5\n", "epochs = 5", CELL, "del epoch", "# Parameters\n"]
)
def test_a_corrected_typo_passes(house, mend):
    session = Session(house, *ROW).cell("# Parameters\nepoch = 5\n")
    with pytest.raises(ValueError, match="unknown parameter 'epoch'; nearest is 'epochs'"):
        session.cell(ROW[0]).cell(ROW[1])
    session.cell(mend).cell(ROW[1])
    assert session.names["run"].params["epochs"] == (5 if "epochs = 5" in mend else 3)


def test_a_typo_stays_one_until_it_is_mended(house):
    session = Session(house, *ROW).cell("# Parameters\nepoch = 5\n").cell("x = 3")
    session.names["In"] += ["x = 3 +", "model?"]
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown parameter 'epoch'"):
            session.cell(ROW[0]).cell(ROW[1])


def test_a_corrected_value_counts(house):
    session = Session(house, *ROW).cell("# Parameters\nepochs = 'five'\nlr = 2\n")
    with pytest.raises(ValueError, match="'epochs' must be int"):
        session.cell(ROW[0]).cell(ROW[1])
    session.cell("# Parameters\nepochs = 5\nlr = 2\n").cell(ROW[1])
    assert session.names["run"].params["epochs"] == 5 and session.names["run"].params["lr"] == 2.0


def test_a_parameter_changed_behind_the_runs_back(house):
    session = Session(house, *ROW)
    this = session.all()
    session.cell("epochs = 9")
    for late in (lambda: this.identity("f"), lambda: this.finish({"f1": 1.0}, {}, {}, {})):
        with pytest.raises(ValueError, match="'epochs' was 3 when this run began and is 9 now"):
            late()
    session.cell(ROW[1])
    assert session.names["run"].identity("f")["params"]["epochs"] == 9


def test_rows_yaml_may_set_workers_but_not_places(house):
    write_atomic(
        house / "papers/toy/rows.yaml",
        "tables: {main: {rows: {one: {params: {num_workers: 2}}}}}\n",
    )
    assert rows.read_rows("toy")[0].params["num_workers"] == 2
    write_atomic(
        house / "papers/toy/rows.yaml", "tables: {main: {rows: {one: {params: {folder: x}}}}}\n"
    )
    with pytest.raises(rows.RowsError, match="'folder' is set by the runner"):
        rows.read_rows("toy")


def test_readme_passes_over_a_damaged_record(house):
    from leansense.core.readme import headline

    write_atomic(
        house / "papers/toy/rows.yaml",
        "headline: {table: main, row: one, metric: f1, name: F1}\nseeds: [0, 1]\n"
        "tables: {main: {rows: {one: {label: One}}}}\n",
    )
    out, _ = made(house)
    write_atomic(out.with_name("one.s1.json"), "{")
    assert headline("toy") == ("One: F1 0.5", "d, 1 seed")
    write_atomic(
        house / "papers/toy/rows.yaml",
        (house / "papers/toy/rows.yaml").read_text().replace("f1,", "f2,"),
    )
    with pytest.raises(ValueError, match="no number 'f2'"):
        headline("toy")
