"""Commands and compiled code take nothing from a folder that is not the user's own."""

import os
import subprocess
import sys
import tomllib

import pytest

from conftest import ROOT
from leansense import leave_folder
from leansense.core import command
from leansense.layers import native
from leansense.layers.backend import NativeError

TRAP = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit(7)\n"


@pytest.mark.parametrize("command", ["core.check", "core.rows"])
def test_a_command_imports_nothing_from_the_folder_it_is_started_in(tmp_path, command):
    """A data set that brings its own yaml.py, numpy.py and torch.py is checked all the same."""
    for name in ("yaml", "numpy", "torch", "PIL", "psutil", "IPython"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    words = {"core.check": ["leaf", "."], "core.rows": ["check", "leaf"]}[command]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "LEANSENSE_ROOT": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", f"leansense.{command}", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists() and done.returncode != 7, done.stderr
    assert "leaf" in done.stdout and "Traceback" not in done.stderr


SCRIPT = (
    "import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"
)


@pytest.mark.parametrize("words", [["check", "leaf", "."], ["leaf.use", "predict", "none.pt", "."]])
def test_the_installed_command_imports_nothing_from_its_folder(tmp_path, words):
    """Not even where the folder brings a package of this one's name."""
    names = ("yaml", "numpy", "torch", "PIL", "psutil", "argparse", "importlib/metadata")
    for name in (*names, *(f"leansense/{part}__init__" for part in ("", "core/", "leaf/"))):
        path = tmp_path / "downloaded" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(7)\n")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["leansense"].split(":")
    script = tmp_path / "bin" / "leansense"  # as pip writes it
    script.parent.mkdir()
    script.write_text(SCRIPT.format(module=module, name=name))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "LEANSENSE_ROOT": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, script, *words],
        cwd=tmp_path / "downloaded", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists() and done.returncode in (1, 2), done.stderr
    assert "NOT USABLE" in done.stdout or "none.pt: no such checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_commands_of_this_package_are_run(capsys, monkeypatch):
    """A word of the user is looked up, never imported."""
    known = command.list_commands()
    for module in known.values():
        assert "\ndef main(" in (ROOT / "lib" / f"{module.replace('.', '/')}.py").read_text()
    assert {"check", "rows", "leaf.use", "leaf.split", "xad.use"} <= set(known)
    monkeypatch.setattr(command.importlib, "import_module", lambda name: pytest.fail(name))
    for word in (
        "os.path",
        "../leaf.use",
        ".check",
        "core.command",
        "leaf",
        "\033[31m",
        "x" * 5000,
    ):
        assert command.main([word]) == 2
        said = capsys.readouterr().err
        assert said.startswith("leansense: no command") and said.count("\n") == 1
        assert "leaf.use" in said and len(said) < 400 and "\033" not in said
    assert command.main([]) == 2 and command.main(["--help"]) == 0


@pytest.mark.parametrize("spelled", ["check", "core.check", "leansense.core.check"])
def test_a_command_gets_its_words_and_its_status_is_kept(spelled, monkeypatch):
    monkeypatch.setattr("leansense.core.check.main", lambda words: ["a", "-b"] == words and 41)
    assert command.main([spelled, "a", "-b"]) == 41


@pytest.mark.parametrize(
    "path, argv, own, left",
    [
        (["here", "site"], ["-m", "x"], "clone/lib/leansense/__init__.py", ["site"]),
        (["clone/lib", "site"], ["-m"], "clone/lib/leansense/__init__.py", ["clone/lib", "site"]),
        (["here", "site"], ["script.py"], "clone/lib/leansense/__init__.py", ["here", "site"]),
        ([], ["-m"], "clone/lib/leansense/__init__.py", []),
    ],
)
def test_only_the_folder_of_m_is_left(path, argv, own, left):
    leave_folder(path, argv, own)
    assert path == left


def test_a_cache_below_a_folder_open_to_all_is_refused(tmp_path, monkeypatch):
    """Whoever may rename the cache may put another in its place, with hashes that fit."""
    parent = tmp_path / "open"
    parent.mkdir()
    monkeypatch.setenv("LEANSENSE_CACHE", str(parent / "deep" / "cache"))
    assert native.cache_folder() == parent / "deep" / "cache"
    parent.chmod(0o777)
    with pytest.raises(NativeError, match=f"{parent}: other users can write to it") as caught:
        native.cache_folder()
    assert "\n" not in str(caught.value)
    parent.chmod(0o1777)  # sticky, as /tmp: only the owner of a folder renames it
    assert native.cache_folder()
    (parent / "deep" / "cache").chmod(0o770)
    with pytest.raises(NativeError, match="cache: other users"):
        native.cache_folder()


def test_what_is_code_is_said():
    readme = (ROOT / "README.md").read_text()
    part = readme.split("### From strangers")[1].split("`SCALE=paper`")[0]
    assert part.count("**code**") == 2
    for word in ("notebooks", "cache", "weights", "rows.yaml", ".venv/bin/leansense"):
        assert word in part
    assert "not a reason to trust it" in (ROOT / "nbs/layers/01_native.ipynb").read_text()
