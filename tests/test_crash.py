"""Killed at any moment: nothing is left running, nothing is lost, the same command goes on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import toy
from conftest import run
from leansense.core import batch, process, rows

PATIENCE = 300  # seconds until a busy machine has got so far


def wait(condition, seconds: float = PATIENCE):
    """What `condition` gives once it is true; an error when that takes too long."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)
    return found


def family(head: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        return [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def gone(processes: list[psutil.Process]) -> bool:
    left = []
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [each] if each.is_running() and each.status() != psutil.STATUS_ZOMBIE else []
    return not left


def kill_all(head: subprocess.Popen) -> None:
    """kill -9 of a process and all below it, and wait until they are gone."""
    everyone = family(head)
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    head.wait()
    wait(lambda: gone(everyone), 30)


def kernels(head: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for each in family(head):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [each] if "ipykernel_launcher" in " ".join(each.cmdline()) else []
    return found


# --- children end with their parent ---


def test_marks():
    mine = process.mark()
    machine, pid, birth = mine.split()
    assert process.lives(mine) is True
    assert process.lives(f"{machine} {pid} {int(birth) - 1000}") is False, (
        "the number was given out again"
    )
    assert (
        process.lives(f"elsewhere {pid} 1") is None
        and process.lives("") is None
        and process.lives("a b c") is None
    )


def test_a_grandchild_ends_with_its_grandparent():
    code = "import sys, time\nfrom leansense.core.process import end_with\n"
    code += "end_with(sys.argv[1])\ntime.sleep(600)"
    head = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child = subprocess.Popen(
        [sys.executable, "-c", code, process.mark(head.pid)], start_new_session=True
    )
    time.sleep(1)
    assert child.poll() is None
    head.kill()
    head.wait()
    assert child.wait(60) == 1


@pytest.mark.parametrize("how", ["TERM", "HUP", "KILL", "snakemake"])
def test_nothing_is_left_running(tmp_path, how):
    """A signal to the main process alone, or the loss of Snakemake: all end, the clone is free."""
    clone = toy.make(
        tmp_path / "clone",
        toy.SMALL.replace("{label: One}", "{label: One, params: {sleep: 600.0}}"),
    )
    main = toy.start(clone)
    try:
        wait(lambda: toy.started(clone))
        others = family(main)[1:]
        assert kernels(main) and len(others) >= 3
        if how == "snakemake":
            others[0].kill()
            assert main.wait(60) == 1  # its row has failed, and it says so
        else:
            main.send_signal(getattr(signal, f"SIG{how}"))
            assert main.wait(60) == {"TERM": 143, "HUP": 129, "KILL": -9}[how]
        free = run(clone, "python", "-c", "from leansense.core.batch import own_lock; own_lock()")
        assert free.returncode == 0, free.stderr
        wait(lambda: gone(others), 30)
    finally:
        for each in family(main):
            each.kill()


def test_ignored_hangup_stays_ignored():
    """`nohup make tables` goes on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt), process.stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_make_is_a_parent_too(tmp_path):
    """kill -9 to make: the batch that it started ends."""
    clone = toy.make(
        tmp_path / "clone",
        toy.SMALL.replace("{label: One}", "{label: One, params: {sleep: 600.0}}"),
    )
    (clone / "Makefile").write_text(
        f"SHELL := /bin/bash\ntables:\n\t@'{sys.executable}' -m leansense.core.batch "
        '--system="$$SYSTEM"\n'
    )
    main = subprocess.Popen(
        ["make", "tables"],
        cwd=clone,
        env=toy.environment(clone) | {"SYSTEM": "toy"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait(lambda: (clone / "runs/demo/toy/snakemake.log").exists())
    others = family(main)[1:]
    assert others
    main.kill()
    main.wait()
    wait(lambda: gone(others), 30)


# --- the lock ---


def test_lock_outlives_nobody(tmp_path, monkeypatch):
    """A second run is refused by name; the last run's Snakemake is waited for, then ended."""
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    with batch.own_lock(), pytest.raises(rows.RowsError, match=f"process {os.getpid()}"):
        batch.own_lock()
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    batch._wait_for_last([process.mark(left.pid)], patience=0.2)
    assert left.wait(30) == -9
    (tmp_path / "runs/lock").write_bytes(b"\xff\xfe\n\x00 1 2\n")  # after a power loss
    batch.own_lock().close()


# --- what is left lying about ---


def test_half_written_files_are_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    swept = [
        "papers/toy/records/demo/main/.one.s0.json.x1y2z3.tmp",
        "papers/toy/.numbers.tex.abc.tmp",
        "figures/toy/.a.pdf.q.tmp",
        ".README.md.abc.tmp",
        "runs/demo/toy/main/one.s0/.last.ckpt.tmp",
        "papers/toy/records/demo/main/.one.s0.json.a1b2c3d4",
    ]
    kept = [
        "papers/toy/.latexmkrc",
        "runs/by-hand/toy/x/.last.ckpt.tmp",
        "papers/toy/tables/main.tex",
        ".gitignore",
    ]
    for name in swept + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert batch.sweep() == len(swept)
    assert not [name for name in swept if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def test_temporary_files_are_ignored_by_git(tmp_path):
    clone = toy.make(tmp_path / "clone")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    for name in (
        "papers/toy/records/demo/main/.one.s0.json.x1y2z3.tmp",
        "figures/toy/.a.pdf.q.tmp",
        ".README.md.abc.tmp",
    ):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=clone).returncode == 0, name


@pytest.mark.parametrize("damage", [b"", b"{", b'{"rule": "\xff"}', b"[1]", b"7", b"null"])
def test_damaged_memory_of_snakemake_is_set_aside(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    for part in ("metadata", "incomplete"):
        folder = tmp_path / ".snakemake" / part / "@deep"
        folder.mkdir(parents=True)
        (folder / f"{part}-bad").write_bytes(damage)
        (folder / f"{part}-good").write_text("{}")
    lines = batch.set_aside()
    assert len(lines) == 2 and all("set aside: .snakemake/" in line for line in lines)
    assert sorted(p.name for p in (tmp_path / ".snakemake/damaged").iterdir()) == [
        "incomplete-bad",
        "metadata-bad",
    ]
    assert batch.set_aside() == []


# --- the drill ---


def broken(clone: Path) -> list[str]:
    """Records that are not whole."""
    found = []
    for path in (clone / "papers/toy").rglob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            found.append(path.name)
    return found


SLOW = "{params: {sleep: 3.0}}"
ROWS = {1: f"one: {SLOW}", 2: f"one: {SLOW}, two: {{params: {{value: 2}}}}"}


def drill(clone: Path, moments: list) -> None:
    """kill -9 of the whole family at each moment of one batch, then to the end: nothing is lost."""
    records = clone / "papers/toy/records"
    for moment in moments:
        main = toy.start(clone)
        begun, before = time.monotonic(), len(list(records.rglob("*.json")))
        reached = {
            "snakemake": lambda: len(family(main)) > 1,
            "row": lambda: kernels(main),
            "step": lambda: list((clone / "runs").rglob("state.json")),
            "record": lambda: len(list(records.rglob("*.json"))) > before,
        }.get(moment, lambda: time.monotonic() - begun > moment)
        wait(lambda: reached() or main.poll() is not None)
        kill_all(main)
        assert broken(clone) == [], f"killed at {moment}"
    end = toy.tables(clone)
    assert end.returncode == 0, end.stdout + end.stderr
    assert not list(clone.rglob(".*.tmp"))
    again = toy.tables(clone)
    assert again.returncode == 0 and "nothing to train" in again.stdout


def test_crash_drill(tmp_path):
    """In the middle of a row, which goes on; and after its record was written, which counts."""
    clone = toy.make(tmp_path / "clone", f"tables: {{main: {{rows: {{{ROWS[1]}}}}}}}\n")
    drill(clone, ["step", "record"])
    (record,) = toy.kept(clone).values()
    assert record["metrics"] == {"score": 10, "files": []} and "10.0" in toy.table(clone)
    assert toy.started(clone) == ["one.s0.json start"] * 2, (
        "killed once, ended once, and never again"
    )


@pytest.mark.slow
def test_crash_drill_of_eighteen(tmp_path, request):
    """Chosen and random moments of one batch; the records equal those of an undisturbed one."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes: pytest -m slow tests/test_crash.py")
    clone, calm = (
        toy.make(tmp_path / name, f"tables: {{main: {{rows: {{{ROWS[2]}}}}}}}\n")
        for name in ("clone", "calm")
    )
    chance = random.Random(7)
    chosen = ["snakemake", "row", "step", "record"]
    drill(clone, [*chosen, *(chance.uniform(0, 25) for _ in range(12)), "row", "record"])
    assert toy.tables(calm).returncode == 0
    assert toy.kept(clone) == toy.kept(calm) and len(toy.kept(calm)) == 2
    assert toy.table(clone) == toy.table(calm)
