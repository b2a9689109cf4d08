"""The rules of the house: notebooks that teach, a library that is what they export, one list."""

import ast
import configparser
import json
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, run
from leansense.core.notebooks import find_foreign, is_teaching, names_in

NOTEBOOKS = sorted(
    path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
NAMES = [path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_export(cell: dict) -> bool:
    return cell["cell_type"] == "code" and re.match(r"#\|\s*export\b", source(cell)) is not None


def only_imports(cell: dict) -> bool:
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source(cell)).body
    )


def statements(text: str) -> int:
    """Lines of code as they are thought, however the formatter wraps them."""
    text = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text)  # what only IPython reads
    return sum(
        token.type == tokenize.NEWLINE
        for token in tokenize.generate_tokens(StringIO(text).readline)
    )


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_opening(path):
    """The first cell names the module (none for 80+), then a title and one sentence."""
    every = cells(path)
    if int(path.name[:2]) < 80 and path.parent.name != "nbs":
        assert re.fullmatch(rf"#\| default_exp {path.parent.name}\.\w+", source(every[0]).strip())
        every = every[1:]
    assert re.match(r"# .+\n> .+", source(every[0])), "a title and one sentence behind '> '"


def defines(cell: dict) -> list[ast.stmt]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.parse(source(cell)).body if isinstance(node, kinds)]


def is_one_class(cell: dict) -> bool:
    return [type(node) for node in defines(cell)] == [ast.ClassDef]


def is_private(cell: dict) -> bool:
    """It defines helpers, or constants for them, and nothing that a reader would call."""
    names = [node.name for node in defines(cell)] or [
        target.id
        for node in ast.parse(source(cell)).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    return bool(names) and all(name.startswith("_") for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_export_cells_are_short_and_shown(path):
    """At most 40 statements (a class may have more); what is public is shown by the next cell."""
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if not is_export(cell):
            continue
        lines, count = source(cell).splitlines(), statements(source(cell))
        assert count <= 40 or is_one_class(cell), f"{count} statements: {lines[1]}"
        if not only_imports(cell) and not is_private(cell):
            shown = following is not None and not is_export(following)
            assert shown, f"nothing shows this cell: {lines[1]}"


def test_which_cells_are_private_or_one_class():
    def cell(text):
        return {"cell_type": "code", "source": [f"#| export\n{text}"]}

    assert is_private(cell("def _a(): ...\nclass _B: ...")) and is_private(cell("_A = 1"))
    assert not is_private(cell("def _a(): ...\ndef b(): ...")) and not is_private(cell("A = 1"))
    assert is_one_class(cell("A = 1\nclass B: ..."))
    assert not is_one_class(cell("class A: ...\nclass B: ..."))
    assert not is_one_class(cell("class A: ...\ndef b(): ..."))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_source_is_clean(path):
    """No wildcard import, no machine's path, no unsafe reading, at most 150 kB."""
    text = path.read_text()
    assert path.stat().st_size <= 150_000
    for cell in cells(path):
        body = source(cell)
        assert not re.search(r"^from .* import \*", body, re.M), "wildcard import"
        assert not find_foreign(body), "absolute path"
    assert not re.search(r"torch\.load\((?![^\n]*weights_only=True)", text), (
        "torch.load without weights_only=True"
    )
    assert "allow_pickle=True" not in text and "yaml.load(" not in text


OUTPUTS_COMMITTED = True


def prints(cell: dict) -> bool:
    """Whether a code cell ends by printing or by showing a picture, whatever happens."""
    body = [] if "%" in source(cell) else ast.parse(source(cell)).body
    called = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    return isinstance(called, ast.Call) and ast.unparse(called.func) in ("print", "plt.show")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs(path):
    """A notebook that teaches has all its outputs or none; one that the batch runs has none."""
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(cell["execution_count"] is None for cell in code), "run `make notebooks`"
    if not is_teaching(path):
        assert outputs == [], "the batch runs it: `jupyter nbconvert --clear-output --inplace`"
    elif outputs or OUTPUTS_COMMITTED:
        silent = [source(cell) for cell in code if prints(cell) and not cell["outputs"]]
        assert outputs and silent == [], "run `make notebooks`"
    kinds = {output.get("name", output["output_type"]) for output in outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}, "run `make notebooks`"
    assert not find_foreign(json.dumps(outputs)), "a path of some machine: run `make notebooks`"
    assert "widget-view" not in json.dumps(outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_links(path):
    """A link leads to a file that is there."""
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", source(cell)):
                assert (path.parent / link).exists(), f"{link} is not there"


def test_every_table_is_displayed():
    """A table that a cell makes before its last line is given to display, or nobody sees it."""
    for path, name in zip(NOTEBOOKS, NAMES, strict=True):
        for cell in cells(path):
            if cell["cell_type"] == "code" and not is_export(cell) and ".table(" in source(cell):
                bare = [n for n in ast.parse(source(cell)).body[:-1] if isinstance(n, ast.Expr)]
                calls = [ast.unparse(n) for n in bare]
                assert not [call for call in calls if call.startswith("paper.table(")], name


def test_the_tour_shows_all_systems():
    """The tour finds the systems by itself and leads to a notebook of each; `make lab` opens it."""
    tour = (ROOT / "nbs/00_tour.ipynb").read_text()
    assert "for system in systems()" in tour and "copy first" in tour
    for folder in ("core", "layers", "world", "leaf"):
        assert re.search(rf"\]\({folder}/\w+\.ipynb\)", tour), folder
    recipes = (ROOT / "Makefile").read_text()
    assert re.search(r"lab: .*\n.*--ip=127.0.0.1 .*--notebook-dir=\. (.|\n)*00_tour", recipes)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_prose(path):
    """A notebook has a word of prose for each statement, at the least."""
    words = sum(len(source(c).split()) for c in cells(path) if c["cell_type"] == "markdown")
    lines = sum(statements(source(c)) for c in cells(path) if c["cell_type"] == "code")
    assert words >= lines, f"{words} words, {lines} statements"


def ruff(*arguments: str) -> subprocess.CompletedProcess:
    return run(ROOT, str(Path(sys.executable).with_name("ruff")), *arguments)


CHECKED = ("nbs", "tests", "setup.py")  # lib is what the notebooks export


def test_format():
    """`make prepare` formats; pyproject.toml has the settings."""
    done = ruff("format", "--check", *CHECKED)
    assert done.returncode == 0, "run `make prepare`:\n" + done.stdout


OLDER = {"width": 0, "other": 0}  # complaints that are admitted


def test_lint():
    """ruff finds nothing: errors, unused names, bugs, the order of imports, lines over 100."""
    lines = {"width": [], "other": []}
    for found in json.loads(ruff("check", "--output-format", "json", *CHECKED).stdout):
        where = f"{Path(found['filename']).relative_to(ROOT)}, cell {found['cell']}"
        line = f"{where}, line {found['location']['row']}: {found['code']} {found['message']}"
        lines["width" if found["code"] == "E501" else "other"].append(line)
    for kind, older in OLDER.items():
        count = len(lines[kind])
        assert count <= older, f"{count}; run `ruff check {' '.join(CHECKED)}`: {lines[kind][:40]}"


def test_hooks_fetch_nothing():
    """The pre-commit hooks are commands of .venv, so they need no network."""
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    for hook in repos[0]["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")


LOOKING = {"callable", "dir", "hasattr", "isinstance", "issubclass", "signature", "type", "vars"}
HARMLESS = LOOKING | {"list", "sorted", "set", "len", "print", "str", "dict", "tuple", "repr"}


def is_filler(text: str) -> bool:
    """Whether a cell runs nothing and only says that what was just defined is there."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a command of IPython
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {getattr(f, "id", getattr(f, "attr", "?")) for f in calls}
    words = names_in(tree)
    looks = called & LOOKING or any(re.fullmatch("__(?!version)[a-z]+__", word) for word in words)
    kinds = (ast.Assert, ast.Expr, ast.Import, ast.ImportFrom)
    return bool(looks) and called <= HARMLESS and all(isinstance(n, kinds) for n in tree.body)


@pytest.mark.parametrize("text, filler", [
    ('assert "update" in dir()', True), ("list(_execute.__annotations__)", True),
    ("_fork.__doc__, serve.__doc__", True), ("type(_sum_cells).__name__", True),
    ("assert issubclass(Toy, Task)", True), ("sorted(OWNED)", False),
    ("type(optimizer(groups)).__name__", False), ("assert world_of() == (0, 1)", False),
])  # fmt: skip
def test_which_cells_are_filler(text, filler):
    assert is_filler(text) == filler


def test_no_cell_is_filler():
    """A cell shows something that a reader wants to see, or is not there."""
    found = [
        f"{name}: {source(cell)}"
        for path, name in zip(NOTEBOOKS, NAMES, strict=True)
        for cell in cells(path)
        if cell["cell_type"] == "code" and not is_export(cell) and is_filler(source(cell))
    ]
    assert not found, "\n".join(found)


def test_median_export_cell():
    sizes = [statements(source(c)) for path in NOTEBOOKS for c in cells(path) if is_export(c)]
    assert statistics.median(sizes) <= 16


def test_lib_is_what_the_notebooks_export(clone):
    """Export a copy afresh and compare: finds notebooks not exported and modules edited by hand."""
    shutil.rmtree(clone / "lib")
    exported = run(clone, str(Path(sys.executable).with_name("nbdev_export")))
    assert exported.returncode == 0, exported.stderr
    made = {p.relative_to(clone / "lib"): p.read_text() for p in (clone / "lib").rglob("*.py")}
    kept = {p.relative_to(ROOT / "lib"): p.read_text() for p in (ROOT / "lib").rglob("*.py")}
    assert made.keys() == kept.keys()
    assert [str(name) for name in made if made[name] != kept[name]] == []


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(p.relative_to(ROOT / "lib").with_suffix("").parts): ast.parse(p.read_text())
        for p in (ROOT / "lib").rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py")
    }


def test_who_may_import_whom():
    """core imports no system; layers and world import core; systems never import each other."""
    from leansense.core.digest import imports

    for name in modules():
        own = name.split(".")[1]
        allowed = {"core": {"core"}, "layers": {"core", "layers"}, "world": {"core", "world"}}.get(
            own, {"core", "layers", "world", own}
        )
        path = ROOT / "lib" / Path(*name.split(".")).with_suffix(".py")
        reached = {module.split(".")[1] for module in imports(path.read_text(), name)}
        assert reached <= allowed, f"{name} imports {reached - allowed}"


def test_lib_needs_no_developer_tool():
    for name, tree in modules().items():
        found = {
            n.names[0].name if isinstance(n, ast.Import) else n.module or ""
            for n in ast.walk(tree)
            if isinstance(n, (ast.Import, ast.ImportFrom))
        }
        assert not {
            f for f in found if f.split(".")[0] in ("nbdev", "fastcore", "execnb", "pytest")
        }, name


def test_public_names_have_docstrings():
    bare = [
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_import_is_light():
    """`import leansense` loads nothing but itself."""
    code = (
        "import sys; a = set(sys.modules); import leansense; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - a}))"
    )
    assert run(ROOT, "python", "-c", code).stdout.strip() == "['leansense']"


def test_scheduler_side_is_light():
    """What Snakemake parses for each job must not load torch, pandas or Lightning."""
    code = (
        "import sys, leansense.core.batch, leansense.leaf.data; "
        "heavy = 'torch pandas lightning matplotlib papermill torchvision sklearn'.split(); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(ROOT, "python", "-c", code).stdout.strip() == "[]"


def _pins() -> dict[str, str]:
    """name -> exact version of environment.yml's conda packages."""
    packages = [
        p
        for p in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(p, str)
    ]
    return dict(re.fullmatch(r"([\w.-]+)=+([\w.]+)", package).groups() for package in packages)


CONDA_NAMES = {"torch": "pytorch-gpu", "matplotlib": "matplotlib-base"}


def test_environment_agrees_with_settings():
    """Each requirement is in environment.yml, at an exact version that settings.ini admits."""
    from packaging.requirements import Requirement

    pins = _pins()
    names = set()
    for line in (SETTINGS["requirements"] + " " + SETTINGS["cuda_requirements"]).split():
        requirement = Requirement(line)
        name = CONDA_NAMES.get(requirement.name, requirement.name)
        names.add(name)
        assert name in pins, f"{name} is missing in environment.yml"
        assert requirement.specifier.contains(pins[name]), (
            f"{name}={pins[name]} is outside {requirement.specifier}"
        )
    assert set(pins) - names == {"python", "pip", "tectonic"}, (
        "environment.yml has packages that settings.ini lacks"
    )
    pip = [
        p
        for p in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(p, dict)
    ]
    assert pip == [{"pip": ["-e .[dev,onnx,bench,weights,text]"]}]
    assert pins["python"].startswith(SETTINGS["min_python"])


def test_the_users_packages_are_there():
    wanted = {
        "torch",
        "jupyterlab",
        "papermill",
        "timm",
        "mamba-ssm",
        "matplotlib",
        "seaborn",
        "nbdev",
        "torchmetrics",
    }
    text = " ".join(SETTINGS[f"{extra}requirements"] for extra in ("", "cuda_", "dev_"))
    assert {re.split(r"[<>=]", word)[0] for word in text.split()} >= wanted


def test_installed_metadata_comes_from_settings():
    from importlib.metadata import requires, version

    assert version("leansense") == SETTINGS["version"]
    assert len([r for r in requires("leansense") if "extra" not in r]) == len(
        SETTINGS["requirements"].split()
    )


def test_readme():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make tables" in text and "make test" in text
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"


def test_readme_table_comes_from_records():
    from leansense.core.readme import block

    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- systems -->")[1].split("<!-- end -->")[0].strip()
    assert shown == block().strip(), "run `make tables`: it writes the table of systems"


def test_top_level():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert top <= {
        "README.md",
        "settings.ini",
        "environment.yml",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "LICENSE",
        ".gitignore",
        ".gitattributes",
        ".pre-commit-config.yaml",
        ".ci",
        "nbs",
        "lib",
        "figures",
        "papers",
        "tests",
    }


def test_no_machine_paths_in_tracked_text():
    hits = subprocess.run(
        [
            "git",
            "grep",
            "-nIE",
            r"(^|[^A-Za-z0-9_.])/(work|tmp|root|home)/[a-z]",
            "--",
            ".",
            ":!tests/test_house.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert hits == ""


# --- versions, CI, and the tests themselves ---


def lock() -> dict[str, str]:
    """package -> the version in papers/versions.lock."""
    lines = (ROOT / "papers/versions.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_lock_holds_the_versions_that_made_the_records():
    """`pip install -c papers/versions.lock` gives what every committed record was made with."""
    records = list((ROOT / "papers").glob("*/records/**/*.json"))
    assert records
    pins = {name.lower().replace("_", "-"): version for name, version in lock().items()}
    for path in records:
        for name, version in json.loads(path.read_text())["env"]["packages"].items():
            pinned = pins.get(name.lower().replace("_", "-"))
            where = path.relative_to(ROOT)
            assert pinned == version, (
                f"{where}: {name} {version}, papers/versions.lock has {pinned}"
            )


def test_lock_can_be_installed():
    """Each requirement, extras included, is locked at a version that settings.ini admits."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {canonicalize_name(name): version for name, version in lock().items()}
    for extra in ("", "dev_", "onnx_", "bench_", "weights_", "text_"):
        for line in SETTINGS[f"{extra}requirements"].split():
            requirement = Requirement(line)
            version = pins.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version), f"{line}: {version}"


def test_ci_does_what_the_readme_says():
    """The README's commands, every system's tables, and a comparison that sees every table."""
    text = (ROOT / ".ci/run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("make test", "make gates", "make tables SYSTEM="):
        assert command in text and command in readme, command
    assert "for matrix in papers/*/rows.yaml" in text, "tables of all systems"
    compared = re.search(r"git diff --exit-code -- (.*?)\s+#", text)[1].replace("'", "").split()
    seen = subprocess.run(["git", "ls-files", *compared], cwd=ROOT, capture_output=True, text=True)
    rebuilt = [
        *(ROOT / "papers").glob("*/**/tables/*.tex"),
        *(ROOT / "papers").glob("*/**/numbers.tex"),
    ]
    names = {path.relative_to(ROOT).as_posix() for path in rebuilt} | {"README.md"}
    assert len(names) > 10 and names <= set(seen.stdout.split())


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


TIMERS = {"throughput", "perf_counter", "process_time", "timeit", "thread_time"}


def test_only_gates_measure_time():
    """A test that times anything is a gate, so that `make test` is the same on a busy machine.

    test_cost.py tests the meter itself, with clocks of its own.
    """
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for function in functions(path) if path.name != "test_cost.py" else ():
            gate = any("gate" in names_in(mark) for mark in function.decorator_list)
            timed = names_in(function) & TIMERS
            assert gate or not timed, f"{path.name}::{function.name} calls {sorted(timed)}"


def timed(tree: ast.Module) -> set[str]:
    """The timers, and the names in a cell whose value comes from them."""
    found = set(TIMERS)
    for _ in range(3):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and names_in(node.value) & found:
                found |= {n for target in node.targets for n in names_in(target)}
            elif isinstance(node, ast.FunctionDef) and names_in(node) & found:
                found.add(node.name)
    return found


def test_no_notebook_asserts_a_time():
    """Notebooks may print times, but assert nothing about more or less of them."""
    kinds = (ast.Lt, ast.Gt, ast.LtE, ast.GtE)
    for path, name in zip(NOTEBOOKS, NAMES, strict=True):
        for cell in cells(path):
            if cell["cell_type"] != "code" or is_export(cell):
                continue
            tree = ast.parse(source(cell))
            asserts = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
            compared = [n for test in asserts for n in ast.walk(test) if isinstance(n, ast.Compare)]
            wrong = [
                ast.unparse(n)
                for n in compared
                if any(isinstance(op, kinds) for op in n.ops) and names_in(n) & timed(tree)
            ]
            assert wrong == [], f"{name}: {wrong}"


GATE = """
import conftest, pytest
conftest.quiet = lambda: {quiet}
times = []
@pytest.mark.gate
def test_gate():
    times.append(1)
    assert len(times) > {failures}
"""


@pytest.mark.parametrize("quiet, failures, outcome", [
    (True, 0, "1 passed"), (True, 1, "1 passed"), (True, 2, "1 failed"), (False, 1, "1 skipped"),
])  # fmt: skip
def test_a_gate_fails_only_twice_and_in_quiet(tmp_path, quiet, failures, outcome):
    for name in ("conftest.py", "warm.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gate: timed\n")
    (tmp_path / "test_it.py").write_text(GATE.format(quiet=quiet, failures=failures))
    done = run(ROOT, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))
    assert outcome in done.stdout, done.stdout + done.stderr


def test_gates_are_left_out_unless_named():
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-m 'not gate'" in options["addopts"]
    recipes = (ROOT / "Makefile").read_text()
    assert re.search(r"^gates:.*\n\t.*pytest .*-m gate", recipes, re.M)
    assert not re.search(r"^test:.*\n\t.*pytest.*-m ", recipes, re.M)


def test_workers_share_what_is_made_once(shared, tmp_path):
    """make() runs once for a name, anew when it failed, and its folder stays where it was made."""
    import conftest

    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text("x")
        if len(made) == 1:
            raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        shared(tmp_path.name, make)
    first, second = shared(tmp_path.name, make), shared(tmp_path.name, make)
    assert first == second == made[1] and len(made) == 2 and (first / "file").read_text() == "x"
    assert 1 <= conftest.pytest_xdist_auto_num_workers(None) <= 4


# --- the warm process ---


def test_warm_process_is_like_a_fresh_one(tmp_path):
    """Its own folder, environment, arguments, exit code; nothing of this repository is loaded."""
    code = (
        "import os, sys; print(os.getcwd(), os.environ['LEANSENSE_X'], sys.argv, __name__); "
        "print([m for m in sys.modules if m.startswith('leansense')], 'torch' in sys.modules); "
        "import leansense; print(leansense.__file__, file=sys.stderr); sys.exit(3)"
    )
    (tmp_path / "lib/leansense").mkdir(parents=True)
    (tmp_path / "lib/leansense/__init__.py").touch()
    for _ in range(2):
        done = run(tmp_path, "python", "-c", code, "one", "two words", warm=True, LEANSENSE_X="x")
        assert done.stdout.splitlines() == [
            f"{tmp_path} x ['-c', 'one', 'two words'] __main__",
            "[] True",
        ]
        assert done.returncode == 3 and done.stderr.strip() == str(
            tmp_path / "lib/leansense/__init__.py"
        )


def test_warm_process_shows_its_error_and_can_be_stopped(tmp_path):
    done = run(tmp_path, "python", "-c", "int('no')", warm=True)
    assert done.returncode == 1 and "ValueError: invalid literal for int()" in done.stderr
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, "python", "-c", "import time; time.sleep(600)", warm=True, timeout=0.5)
    assert run(tmp_path, "python", "-c", "print(1)", warm=True).stdout == "1\n"


def test_a_notebook_that_fails_shows_its_cell(tmp_path):
    from test_notebooks import CODE

    first = next(path for path in NOTEBOOKS if path.parent.name == "core")
    notebook = json.loads(first.read_text())
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": []}
    notebook["cells"] = [cell | {"source": ["x = 1\n", "assert x == 2, 'the wrong x'"]}]
    (tmp_path / "bad.ipynb").write_text(json.dumps(notebook))
    done = run(ROOT, "python", "-c", CODE, str(tmp_path / "bad.ipynb"), warm=True)
    assert done.returncode == 1
    assert "assert x == 2" in done.stderr and "the wrong x" in done.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "papers").glob("*/rows.yaml")), ids=lambda p: p.parent.name
)
def test_rows_merge_one_mapping_at_a_time(path):
    """Versions of PyYAML disagree which of two mappings in `<<: [a, b]` wins."""
    assert not re.search(r"<<:\s*\[", path.read_text()), f"{path}: merge one mapping, `<<: *a`"
