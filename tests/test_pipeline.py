"""The batch engine on a toy system in a scratch checkout: current or not, failure, kill, typo."""

import json
import os
import shutil
import stat
import subprocess

import pytest

import toy as toys
from conftest import ROOT, run
from leansense.core import batch, rows
from leansense.core.paths import write_atomic
from leansense.core.tables import frame, over_seeds
from toy import MATRIX, SMALL, started, table, tables

TWO = MATRIX.replace("seeds: [0, 1]", "seeds: [0]")


@pytest.fixture
def toy(tmp_path):
    """A scratch checkout in which the toy is the only system."""
    return toys.make(tmp_path / "clone")


@pytest.fixture
def inside(toy, monkeypatch):
    """The same, for functions called in this process."""
    monkeypatch.setenv("LEANSENSE_ROOT", str(toy))
    return toy


def test_rows_then_nothing_then_one(toy):
    first = tables(toy)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 rows, 0 current, 4 to run" in first.stdout and "4/4" in first.stdout
    assert r"One & 10.5 \\" in table(toy) and r"\textbf{20.5}" in table(toy)
    records = {p: p.read_bytes() for p in (toy / "papers/toy/records").rglob("*.json")}
    assert len(records) == 4 and len(started(toy)) == 4

    log = toy / "runs/demo/toy/snakemake.log"
    again = tables(toy)
    assert again.returncode == 0 and "nothing to train" in again.stdout and len(started(toy)) == 4
    assert log.read_bytes() == b"", "Snakemake is not even started"
    assert again.stdout.strip().endswith("toy: 1 file in papers/toy/, 1 file in papers/toy/tables/")

    write_atomic(toy / "papers/toy/rows.yaml", MATRIX.replace("value: 2", "value: 3"))
    for path in (toy / ".snakemake/metadata").iterdir():
        path.write_bytes(path.read_bytes().replace(b'"rule"', b'"\xffule"'))
    one = tables(toy)
    assert one.returncode == 0 and "set aside: .snakemake/metadata/" in one.stdout
    assert "4 rows, 2 current, 2 to run" in one.stdout and "changed value" in one.stdout
    assert started(toy) == sorted(
        ["one.s0.json start", "one.s1.json start"] + ["two.s0.json start", "two.s1.json start"] * 2
    )
    assert r"\textbf{30.5}" in table(toy)
    assert all(p.read_bytes() == old for p, old in records.items() if p.name.startswith("one"))

    shutil.rmtree(toy / "runs")  # what a fresh clone has: records, and no history at all
    clone = tables(toy)
    assert "nothing to train" in clone.stdout and started(toy) == []

    cut = toy / "papers/toy/tables/main.tex"
    cut.write_bytes(cut.read_bytes()[:60])
    assert tables(toy).returncode == 0 and r"\textbf{30.5}" in table(toy), (
        "half a table is no table"
    )


def test_failed_row_is_a_dash_and_blocks_nobody(toy):
    write_atomic(toy / "papers/toy/rows.yaml", SMALL)
    assert tables(toy).returncode == 0
    kept = (toy / "papers/toy/records/demo/main/one.s0.json").read_bytes()
    write_atomic(
        toy / "papers/toy/rows.yaml",
        TWO.replace("{label: One}", "{label: One, params: {fail: true}}"),
    )
    done = tables(toy)
    assert done.returncode == 1
    assert (
        "toy main/one.s0: ValueError: heads=5 does not divide 144, see papers/toy/rows.yaml"
        in done.stderr
    )
    assert r"One\textsuperscript{a} & -- \\" in table(
        toy
    ) and "heads=5 does not divide 144" in table(toy)
    assert r"Two & 20.0 \\" in table(toy)
    committed = [path.read_text() for path in (toy / "papers/toy").rglob("*") if path.is_file()]
    assert not [text for text in committed if str(toy.parent) in text or "/opt" in text], (
        "no folders of this machine"
    )
    assert (toy / "papers/toy/records/demo/main/one.s0.json").read_bytes() == kept, (
        "but no table passes it off as this row's"
    )
    executed = (toy / "runs/demo/toy/main/one.s0.ipynb").read_text()
    assert "heads=5 does not divide 144" in executed, (
        "the executed notebook with its traceback is kept"
    )


def test_plain_snakemake_works_too(toy):
    """By hand, and a smoke run leaves nothing outside runs/."""
    write_atomic(toy / "papers/toy/rows.yaml", SMALL)

    def files() -> set:
        return {
            p for p in toy.rglob("*") if not {"runs", ".snakemake", "__pycache__"} & set(p.parts)
        }

    before = files()
    done = run(
        toy,
        "python",
        "-m",
        "snakemake",
        "--snakefile",
        "papers/Snakefile",
        "--profile",
        "papers/profiles/default",
        "--cores",
        "2",
        "--config",
        "system=toy",
        "scale=smoke",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "One & 10.0" in (toy / "runs/smoke/papers/toy/tables/main.tex").read_text()
        and files() == before
    )


def test_typo_stops_everything_at_once(toy):
    lines = (
        "".join(f"      r{i}: {{params: {{value: {i}}}}}\n" for i in range(6))
        + "      r7: {params: {valeu: 7}}\n"
    )
    write_atomic(toy / "papers/toy/rows.yaml", "tables:\n  main:\n    rows:\n" + lines)
    done = tables(toy)
    assert done.returncode == 2 and started(toy) == []
    assert (
        done.stderr.strip()
        == "papers/toy/rows.yaml: main/r7: unknown parameter 'valeu'; nearest is 'value'"
    )


def test_two_at_once_are_refused(toy):
    import fcntl

    write_atomic(toy / "runs/lock", "12345\n")
    with (toy / "runs/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = tables(toy)
    assert (
        done.returncode == 2
        and "another run is at work in this clone (process 12345)" in done.stderr
    )


def test_cluster_through_a_fake_sbatch(toy):
    """The settings of the SLURM profile, with an executor whose `sbatch` is a script of ours."""
    write_atomic(toy / "papers/toy/rows.yaml", SMALL)
    tools = toy / "runs/bin"
    write_atomic(
        tools / "sbatch",
        '#!/bin/sh\necho submitted >> "$SUBMITTED"\nsh "$1" >/dev/null 2>&1 &\necho 1\n',
    )
    (tools / "sbatch").chmod(0o755 | stat.S_IXUSR)
    profile = (toy / "papers/profiles/slurm/config.yaml").read_text()
    assert "executor: slurm" in profile
    write_atomic(
        toy / "papers/profiles/fake/config.yaml",
        profile.replace(
            "executor: slurm", "executor: cluster-generic\ncluster-generic-submit-cmd: sbatch"
        ).replace("latency-wait: 60", "latency-wait: 20"),
    )
    done = tables(
        toy,
        "--profile",
        "fake",
        PATH=f"{tools}:{os.environ['PATH']}",
        SUBMITTED=str(toy / "runs/submitted"),
    )
    assert done.returncode == 0, (
        done.stdout + done.stderr + (toy / "runs/demo/toy/snakemake.log").read_text()[-3000:]
    )
    assert (toy / "runs/submitted").read_text().count("submitted") == 1
    assert "One & 10.0" in table(toy)


def test_unknown_profile(toy):
    done = tables(toy, "--profile", "slrum")
    assert done.returncode == 2 and "nearest is 'slurm'" in done.stderr


# --- a row's own record ---


def execution(folder, monkeypatch, act):
    """The toy's first row and its error's line, run with `act(row, values)` for papermill."""
    row = rows.read_rows("toy")[0]
    monkeypatch.setattr(
        rows, "execute", lambda notebook, executed, values, progress: act(row, values)
    )
    try:
        rows.run_row(row)
    except RuntimeError as error:
        return row, str(error)
    return row, ""


def record(row, values: dict) -> None:
    """Write what the toy's notebook would write for these values."""
    from leansense.core.digest import digest
    from leansense.core.parameters import read_parameters
    from leansense.core.record import SCHEMA, portable, text

    params = {
        name: parameter.default for name, parameter in read_parameters(row.notebook).items()
    } | values
    write_atomic(
        row.record,
        text(
            {
                "schema": SCHEMA,
                "system": "toy",
                "set": row.set,
                "scale": row.scale,
                "table": row.table,
                "row": row.name,
                "seed": row.seed,
                "code": digest(row.notebook),
                "params": portable(params),
                "metrics": {"score": 1},
                "cost": {"seconds": 1.0},
                "data": {"name": "none", "fingerprint": ""},
                "env": {"device": "cpu"},
            }
        ),
    )


def test_row_without_a_record_fails(inside, monkeypatch):
    row, why = execution(inside, monkeypatch, lambda row, values: None)
    assert "ended without writing its record" in why
    record(row, {})  # an old one, current by itself, is not this run's
    row, why = execution(inside, monkeypatch, lambda row, values: None)
    assert (
        "ended without writing its record" in why and rows.note_of(row).read_text().count("\n") == 1
    )


def test_row_with_another_rows_record_fails(inside, monkeypatch):
    row, why = execution(
        inside, monkeypatch, lambda row, values: record(row, values | {"value": 7})
    )
    assert (
        why
        == "toy main/one.s0: RuntimeError: nbs/toy/80_row.ipynb wrote a record that is not this "
        "row's: changed value"
    )
    assert execution(inside, monkeypatch, lambda row, values: record(row, values)) == (row, "")
    assert not rows.note_of(row).exists()


def test_kernel_killed_after_its_record_has_done_its_duty(inside, monkeypatch):
    def act(row, values):
        record(row, values)
        raise RuntimeError("Kernel died")

    row, why = execution(inside, monkeypatch, act)
    assert why == "" and not rows.note_of(row).exists()


def test_current_record_makes_a_failure_void(inside):
    """What a run left that was killed between the record and the end."""
    row, other = rows.read_rows("toy")[:2]
    record(row, {})
    for each in (row, other):
        write_atomic(rows.note_of(each), "DeadKernelError: Kernel died\n")
    batch.clear(batch.plan("toy"))
    assert list(frame([row, other])["missing"]) == ["", "not run"]


def test_full_disk_names_the_file(inside, monkeypatch, capsys):
    import errno

    import papermill

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    with pytest.raises(RuntimeError) as caught:
        rows.run_row(rows.read_rows("toy")[0])
    assert (
        str(caught.value)
        == "toy main/one.s0: runs/demo/toy/main/one.s0.ipynb: No space left on device"
    )

    def full_too(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x.json")

    monkeypatch.setattr(batch, "tables", full_too)
    assert batch.main(["--system", "toy"]) == 2
    assert capsys.readouterr().err == "runs/x.json: No space left on device\n"


DAMAGE = {
    "empty": b"",
    "cut": lambda good: good[: len(good) // 2],
    "zeros": bytes(700),
    "no UTF-8": lambda good: good[:50] + b"\xff" + good[51:],
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "only schema": b'{"schema": 1}',
    "conflict": lambda good: b"<<<<<<< HEAD\n" + good,
    "folder": None,
}
DAMAGE |= {
    f"no {word}": (lambda good, word=word: without(good, word))
    for word in ("params", "code", "data", "metrics", "cost", "env", "schema")
}
DAMAGE |= {
    f"{word} = {value!r}": (
        lambda good, word=word, value=value: json.dumps(json.loads(good) | {word: value}).encode()
    )
    for word, value in (
        ("params", [1]),
        ("params", None),
        ("data", None),
        ("schema", "1"),
        ("schema", 0),
        ("schema", 99),
        ("metrics", {}),
        ("metrics", None),
        ("cost", {"seconds": "x"}),
        ("cost", None),
        ("cost", []),
    )
}


def without(good: bytes, word: str) -> bytes:
    return json.dumps(
        {key: value for key, value in json.loads(good).items() if key != word}
    ).encode()


@pytest.mark.parametrize("name", DAMAGE)
def test_odd_record_runs_again(inside, name):
    """A damaged record is a reason to run the row, never a traceback, in the plan or a table."""
    for row in rows.read_rows("toy"):
        record(row, {name: value for name, value in row.params.items() if name != "data"})
    odd, *rest = rows.read_rows("toy")
    good, damage = odd.record.read_bytes(), DAMAGE[name]
    assert not any(step.reason for step in batch.plan("toy"))
    odd.record.unlink()
    if damage is None:
        odd.record.mkdir()
    else:
        odd.record.write_bytes(damage(good) if callable(damage) else damage)
    steps = batch.plan("toy")
    assert [bool(step.reason) for step in steps] == [
        True,
        False,
        False,
        False,
    ] and "\n" not in steps[0].reason
    assert isinstance(batch.announce("toy", steps, "demo", "", 2), str)
    assert batch.results_key("toy", [odd, *rest])
    lines = over_seeds(frame([odd, *rest]), ["metrics.score"])
    assert list(lines["seeds"]) == [1, 2] and lines["missing"][0] == "unreadable record"


# --- what is current ---


def test_edited_defaults_are_refused(inside, capsys):
    """An uncommitted edit of a parameters cell does not make the records of all rows anew."""
    for row in rows.read_rows("toy"):
        record(row, {name: value for name, value in row.params.items() if name != "data"})
    notebook = inside / "nbs/toy/80_row.ipynb"
    whole = notebook.read_text()

    def refused() -> str:
        return batch.edited_defaults(batch.plan("toy"))

    write_atomic(notebook, whole.replace("sleep: float = 0.0", "sleep: float = 0.1"))
    assert {step.reason for step in batch.plan("toy")} == {"changed sleep"}
    assert refused() == "", "there is no git here"
    git = ["git", "-C", str(inside), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    write_atomic(notebook, whole)
    for words in (["init", "-q"], ["add", "nbs"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    assert refused() == ""
    write_atomic(notebook, whole.replace("sleep: float = 0.0", "sleep: float = 0.1"))
    assert refused() == (
        "nbs/toy/80_row.ipynb: its parameters cell was edited (sleep) and not committed, and its "
        "defaults are those of 4 rows whose records would be made anew; to try something, copy the "
        "notebook; else commit the change"
    )
    assert batch.main(["--system", "toy"]) == 2 and refused() in capsys.readouterr().err
    write_atomic(notebook, notebook.read_text().replace("value: int = 1", "value: int = 2"))
    assert "(sleep, value)" in refused()
    write_atomic(notebook, notebook.read_text().replace("step < 3", "step < 4"))
    assert refused() == "", "the code is another, too: that is development"
    write_atomic(notebook, whole.replace("sleep: float = 0.0", "sleep: float = 0.1"))
    subprocess.run([*git, "commit", "-qam", "meant"], check=True)
    assert refused() == ""


def test_results_are_current_by_content(inside):
    stamp = batch.results_stamp("toy", "demo")
    made = write_atomic(inside / "papers/toy/tables/main.tex", "whole\n")
    ours, key = rows.read_rows("toy"), batch.results_key("toy", rows.read_rows("toy"))
    write_atomic(stamp, json.dumps({"key": key, "files": batch._contents([made])}))
    assert batch.results_current("toy", ours, "demo")
    for damage in (
        lambda: made.write_text("who"),
        lambda: made.write_text("Whole\n"),
        made.unlink,
        lambda: stamp.write_bytes(stamp.read_bytes()[:9]),
        lambda: stamp.write_bytes(b"\xff"),
        lambda: stamp.write_text('{"key": 1, "files": ["papers/toy/tables/main.tex"]}'),
        lambda: stamp.write_text("[]"),
    ):
        before = stamp.read_bytes()
        damage()
        assert not batch.results_current("toy", ours, "demo")
        made.write_text("whole\n")
        stamp.write_bytes(before)
        assert batch.results_current("toy", ours, "demo")
    write_atomic(rows.note_of(ours[0]), "ValueError: x\n")
    assert not batch.results_current("toy", ours, "demo"), "a failure changes the table"


LATEX = """#!/bin/sh
echo "$@" >>../../runs/called
if grep -q broken main.tex; then
printf 'This is a fake\\n! Undefined control sequence.\\nl.7 broken\\n'
exit 12
fi
cp main.tex main.pdf
"""


def test_pdf_is_of_todays_text(inside, monkeypatch):
    tool = write_atomic(inside / "runs/bin/latexmk", LATEX)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    paper = write_atomic(inside / "papers/toy/main.tex", "one\n").parent
    assert batch.pdf_wanted("toy", "demo") and not batch.pdf_current("toy", "demo")
    assert not batch.pdf_wanted("toy", "smoke") and batch.pdf_current("toy", "smoke")
    stamp = batch.results_stamp("toy", "demo", name="pdf")
    stamp.parent.mkdir(parents=True)
    for change in (
        lambda: None,
        lambda: write_atomic(paper / "main.tex", "two\n"),
        (paper / "main.pdf").unlink,
        lambda: (paper / "main.pdf").write_text("of another text"),
        lambda: write_atomic(paper / "tables/x.tex", "1"),
        lambda: write_atomic(inside / "figures/toy/x.pdf", "%PDF"),
    ):
        change()
        assert not batch.pdf_current("toy", "demo")
        assert batch._step("pdf", "toy", "demo", "") == 0 and batch.pdf_current("toy", "demo")
        assert (paper / "main.pdf").read_text() == (paper / "main.tex").read_text()
    write_atomic(paper / "main.tex", "broken\n")
    assert batch._step("pdf", "toy", "demo", "") == 1 and not batch.pdf_current("toy", "demo")
    assert stamp.with_suffix(".error").read_text() == (
        "no PDF: papers/toy/main.tex: Undefined control sequence. (main.tex or its input, l.7); "
        "see runs/demo/toy/latex.log\n"
    )


def test_reasons_reach_the_screen(toy):
    """LaTeX's first error, and what ended a results notebook."""
    write_atomic(toy / "papers/toy/rows.yaml", SMALL)
    tool = write_atomic(toy / "runs/bin/latexmk", LATEX)
    tool.chmod(0o755)
    write_atomic(toy / "papers/toy/main.tex", "broken\n")
    path = f"{tool.parent}:{os.environ['PATH']}"
    done = tables(toy, PATH=path)
    assert (
        done.returncode == 1
        and "failed: toy: no PDF: papers/toy/main.tex: Undefined control sequence." in done.stderr
    )
    write_atomic(toy / "papers/toy/main.tex", "sound\n")
    results = toy / "nbs/toy/90_results.ipynb"
    write_atomic(
        results,
        results.read_text().replace(
            "paper = Paper", "raise KeyError('no such column')\\npaper = Paper"
        ),
    )
    done = tables(toy, PATH=path)
    assert (
        done.returncode == 1
        and "failed: toy: no tables and figures: KeyError: 'no such column'" in done.stderr
    )


@pytest.mark.parametrize(
    "log, why",
    [
        (
            "Building DAG\nerror: DATA=007: no such folder\nExiting because a job failed.\n",
            "DATA=007: no such folder",
        ),
        (
            "Traceback\n  File x\nre.error: bad group\nCalledProcessError: Command x: y\n",
            "re.error: bad group",
        ),
        (
            "OSError: [Errno 28] No space left on device\n",
            "OSError: [Errno 28] No space left on device",
        ),
        ("\xff\n", "its process ended without a word; was it killed?"),
    ],
)
def test_last_words(inside, log, why):
    path = inside / "runs/x.log"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(log.encode("latin1"))
    assert batch._last_words(path) == f"{why}; see runs/x.log"


def test_the_estimate_never_rises():
    import io

    bar, shown = batch.Progress("toy", 10, expect=40, stream=io.StringIO()), []
    for past, done in ((0, 0), (5, 0), (12, 1), (20, 2), (60, 3), (200, 4), (210, 9)):
        bar.start = batch.time.monotonic() - past
        bar.show(done, at_work=f"main/r{done}.s0")
        shown.append(bar.left)
    assert shown == sorted(shown, reverse=True) and shown[0] <= 40
    assert (
        "3/10, 1 min 00 s so far" in bar.stream.getvalue()
        and "at work: main/r3.s0" in bar.stream.getvalue()
    )


def test_data_are_keyed_by_declared_parameters(inside):
    """What a data module declares decides; 4 and 10 classes of a stand-in are two data sets."""
    write_atomic(inside / "lib/leansense/toy/__init__.py", "")
    row = rows.read_rows("toy")[0]
    assert rows.data_values(row) == {} and rows.fingerprint(row) == ""
    import sys
    import types

    module = types.ModuleType("leansense.toy.data")
    module.PARAMETERS = ("data", "value")
    module.identify = lambda params: f"{params['value']}"
    try:
        sys.modules["leansense.toy"], sys.modules["leansense.toy.data"] = (
            types.ModuleType("leansense.toy"),
            module,
        )
        assert rows.fingerprints(rows.read_rows("toy")) == ["1", "1", "2", "2"]
        module.PARAMETERS = ("data",)
        assert rows.data_values(row) == {"data": ""}
    finally:
        del sys.modules["leansense.toy.data"], sys.modules["leansense.toy"]


def _not_here(params, recorded):
    """What a record says of its data set, and of weights files that this machine does not have."""
    from leansense.core.paths import resolve
    from leansense.core.record import CONTENT

    missing = [name for name in CONTENT if params.get(name) and not resolve(params[name]).exists()]
    return {name: recorded[name] for name in ["data", *missing]}


def test_committed_records_are_current():
    """Every record in papers/ is that of today's code and parameters; of the stand-in, data too."""
    from leansense.core.digest import digest
    from leansense.core.record import read, stale
    from leansense.core.rows import fingerprint, read_rows, systems

    found = []
    for system in systems():
        known = {row.record: row for row in read_rows(system, "demo")}
        real = {
            row.id: row for row in read_rows(system, "demo", str(ROOT / "nbs"), every=True)
        }  # any folder: the rows are the same
        for path in sorted((ROOT / "papers" / system / "records").rglob("*.json")):
            if path in known:
                row = known[path]
                found.append(
                    (path.name, stale(path, row.params, digest(row.notebook), fingerprint(row)))
                )
                continue
            record = read(
                path
            )  # of a real data set, which this machine may not have: its code and parameters, then
            row = real.get(f"{record['table']}/{record['row']}.s{record['seed']}")
            why = (
                "no such row"
                if row is None
                else stale(
                    path,
                    row.params | _not_here(row.params, record["params"]),
                    digest(row.notebook),
                    record["data"]["fingerprint"],
                )
            )
            found.append((f"{record['set']}/{path.name}", why))
    assert [line for line in found if line[1]] == []
    assert not systems() or found
