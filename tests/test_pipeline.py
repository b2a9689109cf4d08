"""The batch engine on a toy system in a scratch checkout: current or not, failure, kill, cluster, typo."""
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run

from leansense.core.paths import write_atomic

ROW = [("parameters", """seed: int = 0  # every draw
value: int = 1  # what the metric is made of
sleep: float = 0.0  # seconds of pretended work
fail: bool = False  # stop with an error
out: str = ""  # record
folder: str = ""  # where to leave things
progress: bool = False  # bar"""),
       ("", """import time
from pathlib import Path
from leansense.core.record import Run
run = Run(globals(), "nbs/toy/80_row.ipynb")"""),
       ("", """if fail:
    raise ValueError("heads=5 does not divide 144")
with open(Path(folder).parent / "log", "a") as file:
    file.write(f"{out.split('/')[-1]} start\\n")
time.sleep(sleep)
run.finish({"score": value * 10 + seed}, {}, {"name": "none", "fingerprint": ""}, {"device": "cpu", "threads": 1})""")]
RESULTS = [("parameters", """scale: str = "demo"  # which records
data: str = ""  # data set
out: str = ""  # where the list of files goes"""),
           ("", """from leansense.core.tables import Column, Paper, over_seeds
paper = Paper("toy", scale, data)
lines = over_seeds(paper.runs("main"), ["metrics.score"])
paper.table("main", lines, [Column("metrics.score", "score", digits=1, best=max)])
paper.finish(out)""")]
MATRIX = """title: a toy
headline: {table: main, row: one, metric: score, name: score}
seeds: [0, 1]
tables:
  main:
    rows:
      one: {label: One}
      two: {label: Two, params: {value: 2}}
"""


def save(path: Path, cells) -> None:
    write_atomic(path, json.dumps({
        "cells": [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": [tag]} if tag else {}, "source": code,
                   "outputs": [], "execution_count": None} for i, (tag, code) in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def toy(clone):
    """A scratch checkout in which the toy is the only system."""
    shutil.rmtree(clone / "papers/leaf", ignore_errors=True)
    save(clone / "nbs/toy/80_row.ipynb", ROW)
    save(clone / "nbs/toy/90_results.ipynb", RESULTS)
    write_atomic(clone / "papers/toy/rows.yaml", MATRIX)
    return clone


def tables(folder: Path, *more: str, **env):
    return run(folder, "python", "-m", "leansense.core.batch", "--system", "toy", "--cores", "2", *more, **env)


def started(folder: Path, scale: str = "demo") -> list[str]:
    log = folder / f"runs/{scale}/toy/main/log"
    return sorted(log.read_text().split("\n")[:-1]) if log.exists() else []


def table(folder: Path) -> str:
    return (folder / "papers/toy/tables/main.tex").read_text()


def test_rows_then_nothing_then_one(toy):
    first = tables(toy)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 rows, 0 current, 4 to run" in first.stdout and "4/4" in first.stdout
    assert r"One & 10.5 \\" in table(toy) and r"\textbf{20.5}" in table(toy)
    records = {p: p.read_bytes() for p in (toy / "papers/toy/records").rglob("*.json")}
    assert len(records) == 4 and len(started(toy)) == 4

    again = tables(toy)
    assert again.returncode == 0 and "nothing to train" in again.stdout and len(started(toy)) == 4

    write_atomic(toy / "papers/toy/rows.yaml", MATRIX.replace("value: 2", "value: 3"))
    one = tables(toy)
    assert "4 rows, 2 current, 2 to run" in one.stdout and "changed value" in one.stdout
    assert started(toy) == sorted(["one.s0.json start", "one.s1.json start"] + ["two.s0.json start", "two.s1.json start"] * 2)
    assert r"\textbf{30.5}" in table(toy)
    assert all(p.read_bytes() == old for p, old in records.items() if p.name.startswith("one"))

    shutil.rmtree(toy / "runs")  # what a fresh clone has: records, and no history at all
    clone = tables(toy)
    assert "nothing to train" in clone.stdout and started(toy) == []

    (toy / "papers/toy/tables/main.tex").unlink()
    assert tables(toy).returncode == 0 and r"\textbf{30.5}" in table(toy), "a deleted table comes back"


def test_failed_row_is_a_dash_and_blocks_nobody(toy):
    write_atomic(toy / "papers/toy/rows.yaml", MATRIX.replace("{value: 2}", "{fail: true}"))
    done = tables(toy)
    assert done.returncode == 1
    assert "toy main/two.s0: ValueError: heads=5 does not divide 144" in done.stderr
    assert r"Two\textsuperscript{a} & -- \\" in table(toy) and "heads=5 does not divide 144" in table(toy)
    assert r"One & 10.5 \\" in table(toy)
    executed = (toy / "runs/demo/toy/main/two.s0.ipynb").read_text()
    assert "heads=5 does not divide 144" in executed, "the executed notebook with its traceback is kept"

    write_atomic(toy / "papers/toy/rows.yaml", MATRIX)
    assert tables(toy).returncode == 0 and r"\textbf{20.5}" in table(toy)


def test_failure_keeps_the_old_record(toy):
    assert tables(toy).returncode == 0
    kept = (toy / "papers/toy/records/demo/main/two.s0.json").read_bytes()
    write_atomic(toy / "papers/toy/rows.yaml", MATRIX.replace("{value: 2}", "{fail: true}"))
    assert tables(toy).returncode == 1
    assert (toy / "papers/toy/records/demo/main/two.s0.json").read_bytes() == kept
    assert r"Two\textsuperscript{a} & -- \\" in table(toy), "but the table does not pass it off as this row's"


def test_smoke_stays_below_runs(toy):
    before = {p for p in toy.rglob("*") if "runs" not in p.parts and ".snakemake" not in p.parts and "__pycache__" not in p.parts}
    assert tables(toy, "--scale", "smoke").returncode == 0
    after = {p for p in toy.rglob("*") if "runs" not in p.parts and ".snakemake" not in p.parts and "__pycache__" not in p.parts}
    assert after == before and (toy / "runs/smoke/papers/toy/tables/main.tex").exists()


def test_typo_stops_everything_at_once(toy):
    lines = "".join(f"      r{i}: {{params: {{value: {i}}}}}\n" for i in range(6)) + "      r7: {params: {valeu: 7}}\n"
    write_atomic(toy / "papers/toy/rows.yaml", "tables:\n  main:\n    rows:\n" + lines)
    done = tables(toy)
    assert done.returncode == 2 and started(toy) == []
    assert done.stderr.strip() == "papers/toy/rows.yaml: main/r7: unknown parameter 'valeu'; nearest is 'value'"


def test_kill_then_finish(toy):
    """SIGKILL to the whole process group in the middle: the next call ends with what an undisturbed run gives."""
    other = toy.parent / "undisturbed"
    slow = MATRIX.replace("{label: One}", "{label: One, params: {sleep: 6.0}}")
    write_atomic(toy / "papers/toy/rows.yaml", slow)
    shutil.copytree(toy, other, symlinks=True)
    environment = os.environ | {"LEANSENSE_ROOT": str(toy), "PYTHONPATH": str(toy / "lib")}
    environment.pop("IN_TEST", None)
    process = subprocess.Popen([sys.executable, "-m", "leansense.core.batch", "--system", "toy", "--cores", "2"], cwd=toy,
                               env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if started(toy):
            break
        time.sleep(0.1)
    descendants = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parent = dict(zip(map(int, descendants[::2]), map(int, descendants[1::2])))
    family = {process.pid}
    while more := {pid for pid, up in parent.items() if up in family} - family:
        family |= more
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    finished = len(list((toy / "papers/toy").rglob("records/**/*.json")))
    assert finished < 4, "killed too late to show anything"
    assert (toy / ".snakemake/locks").exists() and list((toy / ".snakemake/locks").iterdir()), "the lock was left behind"
    done = tables(toy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(other).returncode == 0

    def kept(folder):
        found = {}
        for path in sorted((folder / "papers/toy/records").rglob("*.json")):
            record = json.loads(path.read_text())
            found[path.name] = {key: value for key, value in record.items() if key not in ("cost", "env")}
        return json.dumps(found)

    assert kept(toy) == kept(other) and (toy / "papers/toy/tables/main.tex").read_bytes() == (
        other / "papers/toy/tables/main.tex").read_bytes()


def test_two_at_once_are_refused(toy):
    import fcntl
    write_atomic(toy / "runs/lock", "12345\n")
    with (toy / "runs/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = tables(toy)
    assert done.returncode == 2 and "another run is at work in this clone (process 12345)" in done.stderr


def test_cluster_through_a_fake_sbatch(toy):
    """The SLURM profile's settings, with the executor swapped for cluster-generic and `sbatch` for a script that runs the job."""
    tools = toy / "runs/bin"
    write_atomic(tools / "sbatch", "#!/bin/sh\necho submitted >> \"$SUBMITTED\"\nsh \"$1\" >/dev/null 2>&1 &\necho 1\n")
    (tools / "sbatch").chmod(0o755 | stat.S_IXUSR)
    profile = (toy / "papers/profiles/slurm/config.yaml").read_text()
    assert "executor: slurm" in profile
    write_atomic(toy / "papers/profiles/fake/config.yaml", profile.replace(
        "executor: slurm", "executor: cluster-generic\ncluster-generic-submit-cmd: sbatch").replace(
        "latency-wait: 60", "latency-wait: 20"))
    done = tables(toy, "--profile", "fake", PATH=f"{tools}:{os.environ['PATH']}", SUBMITTED=str(toy / "runs/submitted"))
    assert done.returncode == 0, done.stdout + done.stderr + (toy / "runs/demo/toy/snakemake.log").read_text()[-3000:]
    assert (toy / "runs/submitted").read_text().count("submitted") == 4
    assert r"\textbf{20.5}" in table(toy)


def test_unknown_profile(toy):
    done = tables(toy, "--profile", "slrum")
    assert done.returncode == 2 and "nearest is 'slurm'" in done.stderr


def test_plain_snakemake_works_too(toy):
    done = run(toy, "python", "-m", "snakemake", "--snakefile", "papers/Snakefile", "--profile", "papers/profiles/default",
               "--cores", "2", "--config", "system=toy")
    assert done.returncode == 0, done.stderr[-3000:]
    assert r"\textbf{20.5}" in table(toy)


def test_committed_records_are_current():
    """Every record in papers/ is that of today's code and parameters (data too, where it is the stand-in)."""
    from leansense.core.digest import digest
    from leansense.core.record import read, stale
    from leansense.core.rows import fingerprint, read_rows, systems

    found = []
    for system in systems():
        known = {row.record: row for row in read_rows(system, "demo")}
        real = {row.id: row for row in read_rows(system, "demo", str(ROOT / "nbs"))}  # any folder: the rows are the same
        for path in sorted((ROOT / "papers" / system / "records").rglob("*.json")):
            if path in known:
                row = known[path]
                found.append((path.name, stale(path, row.params, digest(row.notebook), fingerprint(row))))
                continue
            record = read(path)  # of a real data set, which this machine may not have: its code and parameters, then
            row = real.get(f"{record['table']}/{record['row']}.s{record['seed']}")
            why = "no such row" if row is None else stale(path, row.params | {"data": record["params"]["data"]},
                                                          digest(row.notebook), record["data"]["fingerprint"])
            found.append((f"{record['set']}/{path.name}", why))
    assert [line for line in found if line[1]] == []
    assert not systems() or found
