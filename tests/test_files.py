"""Files: written whole or not at all, known by what cannot be forged, kept with their contents."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from leansense.core import check, paths, store
from leansense.core.paths import atomic_file, sweep, temporary, write_atomic
from leansense.core.store import LIST, alone, stored_array, written_once


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A data folder of the test's own, so that nothing is remembered from another."""
    monkeypatch.setenv("LEANSENSE_DATA", str(tmp_path / "data"))


@pytest.fixture
def later(monkeypatch):
    """A clock that is ten seconds ahead: what was just written is old enough to be remembered."""
    now = time.time_ns
    monkeypatch.setattr(check.time, "time_ns", lambda: now() + 10 * 10**9)


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to be digested."""
    seen, digest = [], check.content_digest
    monkeypatch.setattr(
        check, "content_digest", lambda path: seen.append(path.name) or digest(path)
    )
    return seen


def python(code: str, *arguments, **options) -> subprocess.Popen:
    """Start a Python process of this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def flip(path: Path, at: int = -1) -> None:
    """Change one byte; size and modification time stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 0xFF
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def hidden(folder: Path) -> list[str]:
    """Temporary files and locks that lie about."""
    return [p.name for p in folder.rglob(".*") if p.name.endswith((".tmp", ".lock"))]


# ---- one file


def test_write_leaves_the_umask_alone(tmp_path, monkeypatch):
    """Another thread's file must not come out world-writable because we looked at the umask."""
    old = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
            write_atomic(tmp_path / "a.txt", "a")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


def test_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder, in this order."""
    told, sync, replace = [], os.fsync, os.replace

    def kind(handle):
        return "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"

    monkeypatch.setattr(os, "fsync", lambda handle: (told.append(kind(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (told.append("rename"), replace(*names)))
    write_atomic(tmp_path / "a.txt", "a")
    assert told == ["file", "rename", "folder"]


def refuse(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]
)
def test_a_refused_write_names_its_file_and_keeps_the_old(tmp_path, monkeypatch, call, number):
    target = write_atomic(tmp_path / "deep" / "record.json", "old")
    monkeypatch.setattr(paths.os, call, refuse(number))
    with pytest.raises(OSError) as caught:
        write_atomic(target, "new")
    monkeypatch.undo()
    error = caught.value
    assert error.errno == number and error.filename == str(target) and "; " in error.strerror
    assert str(target) in str(error) and "\n" not in str(error) and ".tmp" not in str(error)
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == [
        "record.json"
    ]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """What the kernel itself says, by its device that is always full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    target = write_atomic(tmp_path / "history.csv", "old")
    plain = open
    monkeypatch.setattr(paths, "open", lambda path, mode: plain("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match=r"No space left on device; free some space.*history\.csv"):
        write_atomic(target, "new")
    assert target.read_text() == "old" and not hidden(tmp_path)


def test_a_file_too_large_names_itself(tmp_path):
    target = write_atomic(tmp_path / "model.pt", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large; .*model\.pt"):
            write_atomic(target, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old" and not hidden(tmp_path)


def test_what_stands_in_the_way_is_named(tmp_path):
    write_atomic(tmp_path / "file", "")
    (tmp_path / "folder").mkdir()
    for target, fix in (
        ("file/a.txt", "a file stands where a folder"),
        ("folder", "a folder stands where a file"),
        ("x" * 300, "shorter name"),
    ):
        with pytest.raises(OSError, match=fix) as caught:
            write_atomic(tmp_path / target, "a")
        assert caught.value.filename == str(tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_about_another_file_passes(tmp_path):
    """Only what is said of the file being written gets its name."""
    missing = OSError(errno.EACCES, "Permission denied", "/elsewhere/input.jpg")
    for error in (missing, ValueError("bad pixel"), FileNotFoundError("a.jpg: image is missing")):
        with pytest.raises(type(error)) as caught, atomic_file(tmp_path / "a.bin"):
            raise error
        assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_a_link_is_replaced_not_followed(tmp_path):
    other = write_atomic(tmp_path / "other.txt", "mine")
    (tmp_path / "a.txt").symlink_to(other)
    write_atomic(tmp_path / "a.txt", "new")
    assert other.read_text() == "mine" and not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


def test_names_of_any_length_and_script(tmp_path):
    for name in ("写" * 80, "a" * 255, "-", "with\nline", ".hidden"):
        assert write_atomic(tmp_path / name, name).read_text() == name
    assert not hidden(tmp_path)


def test_many_writers_never_show_half_a_file(tmp_path):
    """Threads and a process write one name at once; whoever reads sees one content, whole."""
    target = write_atomic(tmp_path / "a.bin", bytes(50_000))
    other = python(
        "import sys; from leansense.core.paths import write_atomic\n"
        "for k in range(40): write_atomic(sys.argv[1], bytes([200 + k % 8]) * 50_000)",
        target,
    )
    threads = [
        threading.Thread(
            target=lambda k=k: [write_atomic(target, bytes([k]) * 50_000) for _ in range(20)]
        )
        for k in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        content = target.read_bytes()
        assert len(content) == 50_000 and len(set(content)) == 1
    assert other.wait(60) == 0, other.stderr.read()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


# ---- what killed writers leave


HALF = """
import os, signal, sys
from leansense.core.paths import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_write_keeps_the_old_file_and_is_swept(tmp_path):
    target = write_atomic(tmp_path / "deep" / "record.json", "old")
    assert python(HALF, target).wait(60) == -signal.SIGKILL
    left = hidden(tmp_path)
    assert target.read_text() == "old" and len(left) == 1 and left[0].startswith(".record.json.")
    assert [p.name for p in sweep(tmp_path)] == left and not hidden(tmp_path) and target.exists()


def test_sweep_takes_nothing_else(tmp_path):
    """Not a living writer's, not a person's, not through a link; folders of dead writers go."""
    kept = [
        tmp_path / ".notes.tmp",
        tmp_path / "a.0123456789ab.tmp",
        tmp_path / ".a.0123456789AB.tmp",
    ]
    for path in kept:
        path.write_text("mine")
    dead = tmp_path / "sub" / ".standin.0123456789ab.tmp"
    (dead / "images").mkdir(parents=True)
    (dead / "images" / ".x.0123456789ab.tmp").write_text("")
    link = tmp_path / ".link.0123456789ab.tmp"
    link.symlink_to(kept[0])
    with temporary(tmp_path / "a.txt") as file, temporary(tmp_path / "b", folder=True) as folder:
        (folder / ".c.0123456789ab.tmp").write_text("inside")
        assert sweep(tmp_path, deep=False) == [] and dead.exists()
        assert sweep(tmp_path) == [dead] and file.exists() and folder.exists()
    assert all(path.read_text() == "mine" for path in kept) and link.is_symlink()


@pytest.mark.parametrize("folder", [False, True])
def test_swept_between_making_and_locking(tmp_path, monkeypatch, folder):
    """A writer that lost its new file before it could lock it takes another."""
    lock, lost = paths.try_lock, []

    def late(handle, wait=False):
        if not lost:
            lost.extend(tmp_path.iterdir())
            paths.remove(lost[0])
        return lock(handle, wait)

    monkeypatch.setattr(paths, "try_lock", late)
    with temporary(tmp_path / "a", folder=folder) as made:
        assert len(lost) == 1 and list(tmp_path.iterdir()) == [made] != lost
    assert not list(tmp_path.iterdir())


def test_without_locks_a_day_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "try_lock", lambda *_, **__: None)
    young, old = (tmp_path / f".{name}.0123456789ab.tmp" for name in ("young", "old"))
    for path in (young, old):
        path.write_text("")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert sweep(tmp_path) == [old] and young.exists()


# ---- digests


def test_a_restored_time_hides_nothing(tmp_path, later, hashed):
    """A file of the same size and time is read again when anything else about it changed."""
    path = write_atomic(tmp_path / "a.bin", b"one two")
    os.utime(path, ns=(10**18, 10**18))
    first = check.file_digests(tmp_path, ["a.bin"])
    assert check.file_digests(tmp_path, ["a.bin"]) == first and hashed == ["a.bin"]
    flip(path)
    second = check.file_digests(tmp_path, ["a.bin"])
    assert second != first and path.stat().st_mtime_ns == 10**18
    other = write_atomic(tmp_path / "b.bin", b"six two")
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, path)  # another file under the same name
    assert check.file_digests(tmp_path, ["a.bin"]) not in (first, second)


def test_the_young_are_never_remembered(tmp_path, hashed):
    """By either time: the clock's tick hides a second change."""
    path = write_atomic(tmp_path / "a.bin", b"one")
    os.utime(path, ns=(10**18, 10**18))
    check.file_digests(tmp_path, ["a.bin"])
    check.file_digests(tmp_path, ["a.bin"])
    assert hashed == ["a.bin"] * 2


def test_a_slow_digest_of_a_young_file_is_not_remembered(tmp_path, monkeypatch):
    """Its age counts from the look at its times, not from the end of the reading."""
    path, now = write_atomic(tmp_path / "a.bin", b"one"), time.time_ns()
    times = iter([now, now + 60 * 10**9, now + 120 * 10**9])
    monkeypatch.setattr(check.time, "time_ns", lambda: next(times))
    check.file_digests(tmp_path, ["a.bin"])
    assert not list((tmp_path / "data").rglob("*.json")) and path.exists()


def test_a_damaged_memory_is_none(tmp_path, later, hashed):
    write_atomic(tmp_path / "a.bin", b"one")
    first = check.file_digests(tmp_path, ["a.bin"])
    (memory,) = (tmp_path / "data" / "cache" / "digests").glob("*.json")
    sound = memory.read_bytes()
    digest = first["a.bin"][1].encode()
    for damage in (
        sound.replace(digest, digest[::-1]),
        sound[:-5],
        b"",
        b"[1, 2",
        b"\xff\xfe",
        b'x\n{"a.bin": 3}',
    ):
        memory.write_bytes(damage)
        assert check.file_digests(tmp_path, ["a.bin"]) == first
    assert len(hashed) == 7


def test_digests_where_nothing_can_be_remembered(tmp_path, later, monkeypatch):
    write_atomic(tmp_path / "data" / "cache", "a file, not a folder")
    write_atomic(tmp_path / "a.bin", b"one")
    assert check.file_digests(tmp_path, ["a.bin"])["a.bin"][0] == 3


# ---- a folder, written once


def draw(folder: Path) -> None:
    for k in range(6):
        (folder / "images" / f"class_{k % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"class_{k % 2}" / f"{k}.bin").write_bytes(bytes([k]) * 3000)
    (folder / "metadata.csv").write_text("path,label\n" + "".join(f"{k},x\n" for k in range(6)))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def drawn(tmp_path):
    return written_once(tmp_path / "standin" / "leaf-v1", draw)


def test_a_sound_folder_is_not_drawn_again(drawn, capsys, later, hashed):
    def refuse(folder):
        return pytest.fail("drawn again")

    for _ in range(3):
        assert written_once(drawn, refuse) == drawn
    assert len(hashed) == 7, "read once, later only asked for its times"
    assert capsys.readouterr() == ("", "") and not hidden(drawn.parent)
    (drawn / ".DS_Store").write_text("the desktop's")
    assert written_once(drawn, refuse) == drawn


DAMAGE = {
    "flipped": lambda folder: (flip(folder / "images/class_1/3.bin", 1500), "images/class_1/3.bin")[
        1
    ],
    "cut": lambda folder: (os.truncate(folder / "metadata.csv", 20), "metadata.csv")[1],
    "empty": lambda folder: (
        os.truncate(folder / "images/class_0/0.bin", 0),
        "images/class_0/0.bin",
    )[1],
    "missing": lambda folder: ((folder / "images/class_0/2.bin").unlink(), "images/class_0/2.bin")[
        1
    ],
    "folder missing": lambda folder: (
        shutil.rmtree(folder / "images/class_1"),
        "images/class_1/1.bin",
    )[1],
    "swapped": lambda folder: (
        os.replace(folder / "images/class_0/0.bin", folder / "images/class_0/2.bin"),
        "images/class_0/0.bin",
    )[1],
    "digest": lambda folder: (flip(folder / LIST, 60), "")[1],
    "a folder in its place": lambda folder: (
        (folder / "metadata.csv").unlink(),
        (folder / "metadata.csv").mkdir(),
        "metadata.csv",
    )[2],
    "a dead link": lambda folder: (
        (folder / "metadata.csv").unlink(),
        (folder / "metadata.csv").symlink_to("nowhere"),
        "metadata.csv",
    )[2],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named_and_drawn_again(drawn, name, capsys, later):
    whole = contents(drawn)
    written_once(drawn, draw)  # verified, and remembered
    first = DAMAGE[name](drawn)
    assert written_once(drawn, draw) == drawn and contents(drawn) == whole
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(drawn) in line and first in line and "drawn again" in line
    assert not hidden(drawn.parent)
    written_once(drawn, lambda folder: pytest.fail("drawn a third time"))


@pytest.mark.parametrize("name", ["extra.jpg", "images/class_0/extra.bin", ".files.json"])
def test_what_we_did_not_write_is_set_aside(drawn, name, capsys):
    """A file that does not belong there changes the data set; it may still be somebody's work."""
    whole = contents(drawn)
    if name == LIST:
        (drawn / name).unlink()  # nothing says what we wrote
        name = "metadata.csv"
    else:
        (drawn / name).write_text("mine")
    content = (drawn / name).read_bytes()
    written_once(drawn, draw)
    aside = drawn.with_name("leaf-v1.aside1")
    line = capsys.readouterr().err
    assert contents(drawn) == whole and (aside / name).read_bytes() == content
    assert line.count("\n") == 1 and "leaf-v1.aside1" in line
    (drawn / "extra.jpg").write_text("again")
    written_once(drawn, draw)
    assert (
        drawn.with_name("leaf-v1.aside2").is_dir() and aside.is_dir() and contents(drawn) == whole
    )


def test_a_change_within_the_clocks_tick_is_seen(drawn):
    """Right after it was drawn and verified, times tell nothing."""
    whole = contents(drawn)
    written_once(drawn, draw)
    flip(drawn / "metadata.csv")
    written_once(drawn, draw)
    assert contents(drawn) == whole


def test_a_failed_drawing_leaves_nothing_and_takes_nothing(tmp_path, drawn):
    def fail(folder):
        draw(folder)
        raise ValueError("class 3 cannot be drawn")

    with pytest.raises(ValueError, match="class 3"):
        written_once(tmp_path / "standin" / "other", fail)
    flip(drawn / "metadata.csv")
    damaged = contents(drawn)
    with pytest.raises(ValueError, match="class 3"):
        written_once(drawn, fail)
    assert contents(drawn) == damaged and [p.name for p in drawn.parent.iterdir()] == ["leaf-v1"]


DRAWER = """
import os, signal, sys, time
from pathlib import Path
from leansense.core.store import stored_array, written_once
target, seen, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
def work():
    with open(seen, "a") as file:
        file.write(f"{os.getpid()}\\n")
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
def write(folder):
    (folder / "a.bin").write_bytes(b"a" * 1000)
    work()
def fill(array):
    array[:500] = 7
    work()
    array[500:] = 7
if target.suffix:
    assert stored_array(target, (1000,), "uint8", fill).sum() == 7000
else:
    assert (written_once(target, write) / "a.bin").read_bytes() == b"a" * 1000
"""


@pytest.mark.parametrize("name", ["leaf-v1", "pixels.npy"])
def test_one_makes_it_and_the_others_wait(tmp_path, name):
    target, seen = tmp_path / "kept" / name, tmp_path / "seen"
    started = [python(DRAWER, target, seen) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0], [
        p.stderr.read() for p in started
    ]
    assert len(seen.read_text().split()) == 1 and not hidden(target.parent)


@pytest.mark.parametrize("name", ["leaf-v1", "pixels.npy"])
def test_the_next_cleans_up_after_a_killed_writer(tmp_path, name):
    target, seen = tmp_path / "kept" / name, tmp_path / "seen"
    assert python(DRAWER, target, seen, "kill").wait(60) == -signal.SIGKILL
    assert not target.exists() and any(path.endswith(".tmp") for path in hidden(target.parent))
    process = python(DRAWER, target, seen)
    assert process.wait(60) == 0, process.stderr.read()
    assert target.exists() and not hidden(target.parent)


def test_threads_wait_for_each_other(tmp_path):
    made = []

    def fill(array):
        made.append(1)
        time.sleep(0.2)
        array[:] = 5

    def work():
        return stored_array(tmp_path / "a.npy", (4,), "uint8", fill).sum() == 20 or made.append(
            "wrong"
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and not hidden(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_without_locks_work_is_done_twice_and_comes_out_whole(tmp_path, monkeypatch, damaged):
    if damaged:
        flip(written_once(tmp_path / "leaf-v1", draw) / "metadata.csv")
        flip(Path(stored_array(tmp_path / "a.npy", (4,), "uint8", fill).filename))
    for module in (paths, store):
        monkeypatch.setattr(module, "try_lock", lambda *_, **__: None)
    together, failed = threading.Barrier(3), []

    def work():
        try:
            written_once(tmp_path / "leaf-v1", lambda folder: (draw(folder), together.wait(30)))
            stored_array(
                tmp_path / "a.npy", (4,), "uint8", lambda array: (fill(array), together.wait(30))
            )
        except BaseException as error:
            failed.append(error)
            together.abort()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(contents(tmp_path / "leaf-v1")) == 8 and not hidden(tmp_path)
    written_once(tmp_path / "leaf-v1", lambda folder: pytest.fail("not whole"))
    stored_array(tmp_path / "a.npy", (4,), "uint8", lambda array: pytest.fail("not whole"))


def test_whoever_waits_long_says_for_whom(tmp_path, capsys):
    held, done = threading.Event(), threading.Event()

    def hold():
        with alone(tmp_path / "a"):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    timer = threading.Timer(0.5, done.set)
    timer.start()
    with alone(tmp_path / "a", patience=0.1):
        pass
    thread.join()
    line = capsys.readouterr().err
    assert f"waiting for process {os.getpid()}" in line and line.count("\n") == 1


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A worker that was forked under the lock lives on; whoever waits goes on without it."""
    got = threading.Event()

    def wait():
        with alone(tmp_path / "a"):
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with alone(tmp_path / "a"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        waiter.start()
        time.sleep(0.3)
        assert not got.is_set()
    try:
        assert got.wait(20)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- an array, stored


def fill(array) -> None:
    array[:] = np.arange(array.size, dtype=array.dtype).reshape(array.shape)


WRONG = {
    "flipped": lambda path: flip(path, 300),
    "header": lambda path: flip(path, 3),
    "cut": lambda path: os.truncate(path, 200),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "foreign": lambda path: np.save(path, np.zeros((50, 4), "uint8")),
    "no list": lambda path: path.with_name(f".{path.name}{LIST}").unlink(),
    "list cut": lambda path: os.truncate(path.with_name(f".{path.name}{LIST}"), 9),
    "list flipped": lambda path: flip(path.with_name(f".{path.name}{LIST}"), 40),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_array_is_made_again(tmp_path, name, capsys, later):
    path = tmp_path / "cache" / "pixels.npy"
    first = stored_array(path, (50, 4), "uint8", fill)
    assert first.filename and not first.flags.writeable and capsys.readouterr().err == ""
    stored_array(
        path, (50, 4), "uint8", lambda array: pytest.fail("made again")
    )  # verified, and remembered
    wanted = bytes(range(200))
    del first
    WRONG[name](path)
    assert stored_array(path, (50, 4), "uint8", fill).tobytes() == wanted
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(path) in line and "made again" in line
    stored_array(path, (50, 4), "uint8", lambda array: pytest.fail("made again"))


def test_another_shape_or_type_is_made_again(tmp_path, capsys):
    path = tmp_path / "pixels.npy"
    stored_array(path, (6, 2), "uint8", fill)
    for shape, dtype in (
        ((12,), "uint8"),
        ((6, 2), "int32"),
        ((6, 2), np.float32),
        ((0, 2), "uint8"),
    ):
        array = stored_array(path, shape, dtype, fill)
        assert array.shape == shape and array.dtype == dtype
        assert f"not {np.dtype(dtype)} {shape}; made again" in capsys.readouterr().err


def test_a_known_array_is_not_read(tmp_path, later, hashed):
    """Across processes too: the second only asks for size, times and number."""
    path = tmp_path / "pixels.npy"
    stored_array(path, (50,), "uint8", fill)
    for _ in range(3):
        stored_array(path, (50,), "uint8", fill)
    assert hashed == ["pixels.npy"]


def test_a_failed_filling_leaves_nothing(tmp_path):
    def bad(array):
        raise FileNotFoundError("leaf_7.jpg: image is missing; copy it there")

    with pytest.raises(FileNotFoundError, match="^leaf_7.jpg: image is missing"):
        stored_array(tmp_path / "pixels.npy", (50,), "uint8", bad)
    assert not list(tmp_path.iterdir())


def test_no_space_for_an_array_names_it(tmp_path):
    """Before it is filled: writing to a mapped file on a full disk would kill the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"too large; .*pixels\.npy") as caught:
            stored_array(
                tmp_path / "pixels.npy", (200_000,), "uint8", lambda array: pytest.fail("filled")
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "pixels.npy") and not list(tmp_path.iterdir())


def test_space_for_an_array_is_taken_before_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "posix_fallocate", refuse(errno.ENOSPC), raising=False)
    with pytest.raises(OSError, match=r"No space left on device; free some space.*pixels\.npy"):
        stored_array(tmp_path / "pixels.npy", (50,), "uint8", lambda array: pytest.fail("filled"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(store.os, "posix_fallocate", refuse(errno.ENOTSUP), raising=False)
    assert stored_array(tmp_path / "pixels.npy", (50,), "uint8", fill).sum() == 1225


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("name", ["leaf-v1", "pixels.npy"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number, name):
    """What is there and sound is used; what is not is one line with the place and the way out."""
    make = (
        (lambda path: stored_array(path, (50,), "uint8", fill))
        if "." in name
        else (lambda path: written_once(path, draw))
    )
    make(tmp_path / name)
    opened = os.open

    def readonly(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", readonly)
    make(tmp_path / name)
    with pytest.raises(OSError, match="LEANSENSE_DATA") as caught:
        make(tmp_path / f"other-{name}")
    assert caught.value.filename == str(tmp_path / f"other-{name}") and "\n" not in str(
        caught.value
    )


def test_no_space_for_a_folder_names_it(tmp_path):
    def full(folder):
        draw(folder)
        raise OSError(
            errno.ENOSPC, os.strerror(errno.ENOSPC)
        )  # what an image writer says, without a name

    with pytest.raises(OSError, match="No space left on device; free some space") as caught:
        written_once(tmp_path / "leaf-v1", full)
    assert caught.value.filename == str(tmp_path / "leaf-v1") and not list(tmp_path.iterdir())


def test_the_store_needs_no_numpy_until_it_is_used():
    process = python("import sys, leansense.core.store; print('numpy' in sys.modules)")
    assert process.communicate(timeout=60)[0].strip() == "False"
