"""The rules of the house: notebooks that teach, a library that is exactly what they export, one list of requirements."""
import ast
import configparser
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
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
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source(cell)).body)


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_export_cells_are_short_and_shown(path):
    """At most 40 lines each, and each is followed by a cell that shows or asserts it."""
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    for cell, following in zip(code, [*code[1:], None]):
        if not is_export(cell):
            continue
        lines = [line for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= 41, f"{len(lines) - 1} lines: {lines[1]}"
        if not only_imports(cell):
            assert following is not None and not is_export(following), f"nothing shows this cell: {lines[1]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_source_is_clean(path):
    """No wildcard import, no machine's path, no line over 120, no outputs of running it, at most 150 kB."""
    text = path.read_text()
    assert path.stat().st_size <= 150_000
    for cell in cells(path):
        body = source(cell)
        assert not re.search(r"^from .* import \*", body, re.M), "wildcard import"
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)/\w", body), "absolute path"
        assert cell["cell_type"] == "markdown" or max(map(len, body.splitlines()), default=0) <= 120, "long line"
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None, "run nbdev_clean"
            assert not any(out.get("name") == "stderr" for out in cell["outputs"])
            assert path.name[:2] != "80" or not cell["outputs"]
    assert not re.search(r"torch\.load\((?![^\n]*weights_only=True)", text), "torch.load without weights_only=True"
    assert "allow_pickle=True" not in text and "yaml.load(" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_prose(path):
    """A notebook has a word of prose for each line of code, at the least."""
    words = sum(len(source(c).split()) for c in cells(path) if c["cell_type"] == "markdown")
    lines = sum(len(source(c).splitlines()) for c in cells(path) if c["cell_type"] == "code")
    assert words >= lines, f"{words} words, {lines} lines of code"


def test_median_export_cell():
    sizes = [len(source(c).splitlines()) for path in NOTEBOOKS for c in cells(path) if is_export(c)]
    assert statistics.median(sizes) <= 25


def test_lib_is_what_the_notebooks_export(clone):
    """Export a copy afresh and compare: catches a notebook not exported and a module edited by hand."""
    shutil.rmtree(clone / "lib")
    exported = run(clone, str(Path(sys.executable).with_name("nbdev_export")))
    assert exported.returncode == 0, exported.stderr
    made = {p.relative_to(clone / "lib"): p.read_text() for p in (clone / "lib").rglob("*.py")}
    kept = {p.relative_to(ROOT / "lib"): p.read_text() for p in (ROOT / "lib").rglob("*.py")}
    assert made.keys() == kept.keys()
    assert [str(name) for name in made if made[name] != kept[name]] == []


def modules() -> dict[str, ast.Module]:
    return {".".join(p.relative_to(ROOT / "lib").with_suffix("").parts): ast.parse(p.read_text())
            for p in (ROOT / "lib").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}


def test_who_may_import_whom():
    """core imports no system; layers and world import core; systems never import each other."""
    from leansense.core.digest import imports

    for name in modules():
        own = name.split(".")[1]
        allowed = {"core": {"core"}, "layers": {"core", "layers"}, "world": {"core", "world"}}.get(
            own, {"core", "layers", "world", own})
        path = ROOT / "lib" / Path(*name.split(".")).with_suffix(".py")
        reached = {module.split(".")[1] for module in imports(path.read_text(), name)}
        assert reached <= allowed, f"{name} imports {reached - allowed}"


def test_lib_needs_no_developer_tool():
    for name, tree in modules().items():
        found = {n.names[0].name if isinstance(n, ast.Import) else n.module or "" for n in ast.walk(tree)
                 if isinstance(n, (ast.Import, ast.ImportFrom))}
        assert not {f for f in found if f.split(".")[0] in ("nbdev", "fastcore", "execnb", "pytest")}, name


def test_public_names_have_docstrings():
    bare = [f"{name}.{node.name}" for name, tree in modules().items() for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            and not ast.get_docstring(node)]
    assert bare == []


def test_import_is_light():
    """`import leansense` loads nothing but itself (its time is printed for whoever runs with -s)."""
    code = ("import sys, time; a = set(sys.modules); t = time.perf_counter(); import leansense; "
            "print(time.perf_counter() - t); print(sorted({m.split('.')[0] for m in set(sys.modules) - a}))")
    seconds, loaded = run(ROOT, "python", "-c", code).stdout.splitlines()
    print(f"import leansense: {float(seconds) * 1e3:.1f} ms")
    assert loaded == "['leansense']"


def test_scheduler_side_is_light():
    """What Snakemake parses for each job must not load torch, pandas or Lightning."""
    code = "import sys, leansense.core.batch, leansense.leaf.data; print([m for m in ('torch', 'pandas', 'lightning', 'matplotlib', 'papermill', 'torchvision', 'sklearn') if m in sys.modules])"
    assert run(ROOT, "python", "-c", code).stdout.strip() == "[]"


def _pins() -> dict[str, str]:
    """name -> exact version of environment.yml's conda packages."""
    packages = [p for p in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(p, str)]
    return dict(re.fullmatch(r"([\w.-]+)=+([\w.]+)", package).groups() for package in packages)


CONDA_NAMES = {"torch": "pytorch-gpu", "matplotlib": "matplotlib-base"}


def test_environment_agrees_with_settings():
    """Each requirement is in environment.yml, at an exact version that settings.ini admits, and the reverse."""
    from packaging.requirements import Requirement

    pins = _pins()
    names = set()
    for line in (SETTINGS["requirements"] + " " + SETTINGS["cuda_requirements"]).split():
        requirement = Requirement(line)
        name = CONDA_NAMES.get(requirement.name, requirement.name)
        names.add(name)
        assert name in pins, f"{name} is missing in environment.yml"
        assert requirement.specifier.contains(pins[name]), f"{name}={pins[name]} is outside {requirement.specifier}"
    assert set(pins) - names == {"python", "pip", "tectonic"}, "environment.yml has packages that settings.ini lacks"
    pip = [p for p in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(p, dict)]
    assert pip == [{"pip": ["-e .[dev,onnx,bench]"]}]
    assert pins["python"].startswith(SETTINGS["min_python"])


def test_the_users_packages_are_there():
    wanted = {"torch", "jupyterlab", "papermill", "timm", "mamba-ssm", "matplotlib", "seaborn", "nbdev", "torchmetrics"}
    text = " ".join(SETTINGS[f"{extra}requirements"] for extra in ("", "cuda_", "dev_"))
    assert {re.split(r"[<>=]", word)[0] for word in text.split()} >= wanted


def test_installed_metadata_comes_from_settings():
    from importlib.metadata import requires, version

    assert version("leansense") == SETTINGS["version"]
    assert len([r for r in requires("leansense") if "extra" not in r]) == len(SETTINGS["requirements"].split())


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
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert top <= {"README.md", "settings.ini", "environment.yml", "Makefile", "pyproject.toml", "setup.py", "LICENSE",
                   ".gitignore", ".gitattributes", ".ci", "nbs", "lib", "figures", "papers", "tests"}


def test_no_machine_paths_in_tracked_text():
    hits = subprocess.run(["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.])/(work|tmp|root|home)/[a-z]", "--", ".",
                           ":!tests/test_house.py"], cwd=ROOT, capture_output=True, text=True).stdout
    assert hits == ""
