"""Shared by all tests: one thread, no display, scratch repositories, warm processes, gates."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from warm import Warm

ROOT = Path(__file__).resolve().parents[1]
os.environ["LEANSENSE_ROOT"] = str(ROOT)
# behind nohup or a shell's `&` these are ignored, here and in every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
LONG = 1800  # seconds: no test waits longer for a process, however busy the machine is
WARM = Warm()
WAITED = {"seconds": 0.0}


def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: the cores this process may use, at most four (a worker takes about 2 GB)."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, 4)


def pytest_sessionfinish(session) -> None:
    WARM.stop()


# --- data sets and their faults ---


@pytest.fixture(scope="module")
def own_data_root(tmp_path_factory):
    """Stand-ins and caches of a module's tests lie in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANSENSE_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def message(kind: type[Exception], call: Callable, *arguments, **named) -> str:
    """The one line of the error that a call must raise."""
    with pytest.raises(kind) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# --- scratch repositories and processes ---


def code_cells(notebook: str) -> list[str]:
    """The sources of a notebook's code cells."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def set_one(weights: dict, value: float) -> dict:
    """The weights with `value` in one place of the first matrix."""
    name = next(n for n, v in weights.items() if v.is_floating_point() and v.ndim > 1)
    bad = weights[name].clone()
    bad[(0,) * bad.ndim] = value
    return weights | {name: bad}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this checkout's tracked and new files, as `git clone` would give."""
    names = (
        subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .split("\0")
    )
    target = tmp_path / "clone"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run(
    folder: Path, *command: str, timeout: float = LONG, warm: bool | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a command in a scratch checkout, with that checkout's lib in front of the installed one.

    warm: in a process that has the heavy libraries loaded (tests/warm.py); for `papermill` and
    `python -c`. Default: for papermill, unless env holds what a library reads when imported.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "LEANSENSE_DATA")}
    environment |= {"LEANSENSE_ROOT": str(folder), "PYTHONPATH": str(folder / "lib")} | env
    command = [sys.executable if word == "python" else word for word in command]
    if warm is None:
        warm = Path(command[0]).name == "papermill" and all(
            name.startswith("LEANSENSE_") for name in env
        )
    if warm and hasattr(os, "fork"):
        return WARM.run(command, folder, environment, timeout)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def run_triton(code: str, last: str, interpret: bool, **env: str) -> None:
    """Python with Triton kernels, in a process of its own, must end by printing `last`.

    interpret: on the CPU, by Triton's interpreter; else its compiler is there, for any GPU.
    """
    pytest.importorskip("triton")
    places = os.pathsep.join(str(ROOT / name) for name in ("lib", "tests"))
    env |= {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": places}
    done = run(ROOT, "python", "-c", code, **env)
    assert done.returncode == 0 and done.stdout.strip().endswith(last), done.stderr[-2000:]


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """shared(name, make): a folder made once by make(folder) for all workers; only to be read."""
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "shared"
    base.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.made").exists():
                shutil.rmtree(base / name, ignore_errors=True)  # of a worker whose make() failed
                (base / name).mkdir()
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


# --- gates: tests that measure time ---


def quiet(share: float = 0.1, patience: float = 300) -> bool:
    """Wait until all processes together use less than `share` of the machine, at most `patience`.

    The patience, in seconds, is for all gates of a session together; False when it is used up.
    """
    import psutil

    psutil.cpu_percent()
    while WAITED["seconds"] <= patience:
        if psutil.cpu_percent(interval=2) <= 100 * share:
            return True
        WAITED["seconds"] += 2
    return False


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A gate that fails is measured again in a quiet moment; without one it is skipped."""
    if pyfuncitem.get_closest_marker("gate") is None:
        return (yield)
    try:
        return (yield)
    except AssertionError as error:
        found = str(error).splitlines()[0] if str(error) else "the assertion failed"
    if not quiet():
        pytest.skip(f"not judged, this machine has no quiet moment: {found}")
    pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    return True
