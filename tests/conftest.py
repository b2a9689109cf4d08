"""Shared by all tests: one thread (two cores, many workers), no display, and scratch repositories."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["LEANSENSE_ROOT"] = str(ROOT)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the tracked and new files of this checkout, without runs and data, as `git clone` would give."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                           check=True).stdout.decode().split("\0")
    target = tmp_path / "clone"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run(folder: Path, *command: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
    """Run a command in a scratch checkout, with that checkout's lib in front of the installed one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "LEANSENSE_DATA")}
    environment |= {"LEANSENSE_ROOT": str(folder), "PYTHONPATH": str(folder / "lib")} | env
    command = [sys.executable if word == "python" else word for word in command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
