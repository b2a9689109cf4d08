"""Back ends and compiled C: what is chosen, what is cached, and what is never loaded."""

import contextlib
import ctypes
import importlib
import os
import platform
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, run
from leansense.core.digest import closure
from leansense.layers import backend, native
from leansense.layers.backend import allowed, isa, pick, usable_isas, use_isa
from leansense.layers.native import NativeError, library, parallel, pointer, why_not

SOURCE = (
    "typedef float vec __attribute__((vector_size(4 * W)));\n"
    "int lanes(void) { return sizeof(vec) / 4; }\n"
)
has_compiler = pytest.mark.skipif(
    bool(why_not("probe", "int f(void) { return 1; }")), reason="no C compiler"
)
YES, NO = (lambda: ""), (lambda: "not today")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A cache of the test's own, and nothing remembered from another."""
    for name in ("LEANSENSE_BACKENDS", "LEANSENSE_ISA", "LEANSENSE_CC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("op", "logged_once"):
        monkeypatch.setitem(backend.MEASURED, name, dict.fromkeys(backend.INSTRUCTIONS, 2.0))
    monkeypatch.setenv("LEANSENSE_CACHE", str(tmp_path / "cache"))
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def cached(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.so"))


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", "triton"),
        ("torch", "torch"),
        ("cc", "cc"),
        ("cc,torch", "cc"),
        (" cc , triton ", "triton"),
        ("nonsense", "torch"),
    ],
)
def test_variable_narrows_auto(monkeypatch, given, expected):
    monkeypatch.setenv("LEANSENSE_BACKENDS", given)
    assert pick("op", "auto", {"triton": YES, "cc": YES, "torch": YES}) == expected
    assert pick("op", "cc", {"triton": YES, "cc": YES, "torch": YES}) == "cc", "a name is a name"
    assert "torch" in allowed({"cc": YES, "torch": YES})


def test_pick_errors_are_one_line():
    order = {"cc": NO, "torch": YES}
    assert pick("op", "auto", order) == "torch"
    with pytest.raises(RuntimeError, match=r"^op: backend 'cc' cannot run here: not today$"):
        pick("op", "cc", order)
    with pytest.raises(ValueError, match=r"^op: unknown backend 'torhc'; nearest is 'torch'$"):
        pick("op", "torhc", order)
    with pytest.raises(RuntimeError, match="no back end"):
        pick("op", "auto", {"cc": NO})


def test_passing_over_is_logged_once(caplog):
    caplog.set_level("INFO", "leansense")
    for _ in range(3):
        pick("logged_once", "auto", {"cc": NO, "torch": YES})
    assert [r.getMessage() for r in caplog.records] == ["logged_once: not using cc: not today"]


@has_compiler
@pytest.mark.parametrize("kind", ["v4", "v3", "generic"])
def test_each_instruction_set(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("LEANSENSE_ISA", kind)
    if kind not in usable_isas():
        with pytest.raises(NativeError, match="cannot run it"):
            isa()
        return
    assert library("lanes", SOURCE).lanes() == {"v4": 16, "v3": 8, "generic": 4}[kind]
    assert cached(tmp_path)[0].name.startswith(f"lanes-{kind}-")


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("LEANSENSE_ISA", "v9")
    assert why_not("lanes", SOURCE) == "LEANSENSE_ISA=v9: choose from v4, v3, generic"


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler on the path" in why_not("lanes", SOURCE)
    monkeypatch.setenv("CC", "nonsense-cc")
    assert why_not("lanes", SOURCE) == "no C compiler: nonsense-cc is not on the path"
    monkeypatch.setenv("LEANSENSE_CC", "0")
    assert why_not("lanes", SOURCE) == "switched off by LEANSENSE_CC=0"


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    only_version = "[ $1 = --version ] || { echo 'x: error: no' >&2; exit 1; }"
    for body, message in (
        ("exit 3", "does not run: exit status 3"),
        (only_version, "failed: x: error: no"),
    ):
        fake = tmp_path / "fakecc"
        fake.write_text(f"#!/bin/sh\n{body}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        native._load.cache_clear()
        native._version.cache_clear()
        assert message in why_not("lanes", SOURCE) and "\n" not in why_not("lanes", SOURCE)
    native._version.cache_clear()


@has_compiler
def test_off_switch_beats_a_loaded_library(monkeypatch):
    assert why_not("lanes", SOURCE) == ""
    monkeypatch.setenv("LEANSENSE_CC", "0")
    assert why_not("lanes", SOURCE) == "switched off by LEANSENSE_CC=0"


@has_compiler
def test_second_process_compiles_nothing(tmp_path):
    library("lanes", SOURCE)
    before = cached(tmp_path)[0].stat()
    native._load.cache_clear()
    library("lanes", SOURCE)
    after = cached(tmp_path)[0].stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    library("lanes", SOURCE + "// another source is another file\n")
    assert len(cached(tmp_path)) == 2


def damage(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "bit":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no note":
        path.with_suffix(".hash").unlink()
    elif how == "other note":
        path.with_suffix(".hash").write_text("0" * 32)
    elif how == "binary note":
        path.with_suffix(".hash").write_bytes(b"\xff\xfe")


def load_afresh(first: str = "") -> subprocess.CompletedProcess:
    """Load the example in a process of its own, which does `first` before all else."""
    code = (
        f"import os, sys; {first}\nfrom leansense.layers.native import library\n"
        "print(library('lanes', sys.argv[1]).lanes())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, SOURCE], capture_output=True, text=True, cwd=ROOT
    )


@has_compiler
@pytest.mark.parametrize("how", ["cut", "bit", "empty", "no note", "other note", "binary note"])
def test_damaged_cache_is_rebuilt(tmp_path, how):
    """In a process of its own: a library that is in use must not be written over."""
    first = load_afresh()
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    damage(path, how)
    second = load_afresh()
    assert second.returncode == 0 and second.stdout == first.stdout
    assert cached(tmp_path) == [path] and path.read_bytes() == whole
    assert path.with_suffix(".hash").read_text() == native._hash(whole)


@has_compiler
def test_wrong_library_under_the_right_name(tmp_path):
    """Somebody else's library in our place: its bytes do not match the note; never loaded."""
    library("lanes", SOURCE)
    (right,) = cached(tmp_path)
    library("other", "int lanes(void) { return -1; }\n")
    other = next(path for path in cached(tmp_path) if path.name.startswith("other"))
    content = other.read_bytes()
    right.unlink()
    right.write_bytes(content)
    native._load.cache_clear()
    assert library("lanes", SOURCE).lanes() > 0


@has_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_cache_open_to_others_is_refused_by_name(tmp_path):
    library("lanes", SOURCE)
    (path,) = cached(tmp_path)
    path.chmod(0o777)
    native._load.cache_clear()
    assert why_not("lanes", SOURCE) == f"{path}: other users can write to it; delete it"
    path.parent.chmod(0o777)
    native._load.cache_clear()
    assert f"{path.parent}: other users can write to it; chmod go-w it" in why_not("lanes", SOURCE)
    path.parent.chmod(stat.S_IRWXU)


def test_cache_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEANSENSE_CACHE", str(tmp_path / "file"))
    reason = why_not("lanes", SOURCE)
    assert "LEANSENSE_CACHE" in reason or "no C compiler" in reason


@has_compiler
def test_many_at_once(tmp_path):
    """Eight threads and no lock: each gets a whole library, one stays."""
    results = []

    def load():
        return results.append(native._load.__wrapped__("lanes", SOURCE, (), isa(), ()).lanes())

    threads = [threading.Thread(target=load) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(results)) == 1 and len(results) == 8 and len(cached(tmp_path)) == 1
    assert not list((tmp_path / "cache").glob(".build-*"))


@has_compiler
def test_broken_source_is_one_line():
    with pytest.raises(NativeError, match="failed: .*error") as caught:
        library("broken", "int f(void) { return x; }")
    assert "\n" not in str(caught.value)


def test_pointer():
    assert pointer(None).value is None
    x = torch.arange(4.0)
    assert ctypes.cast(pointer(x), ctypes.POINTER(ctypes.c_float))[3] == 3
    with pytest.raises(ValueError, match="contiguous"):
        pointer(torch.zeros(3, 4).T)
    with pytest.raises(ValueError, match="on the CPU"):
        pointer(torch.zeros(3, device="meta"))


def test_parallel_runs_all_and_raises_after_all():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            done = []
            parallel([lambda i=i: done.append(i) for i in range(6)])
            assert sorted(done) == list(range(6))
            parallel([])
        done.clear()

        def fail():
            raise ValueError("task 2")

        with pytest.raises(ValueError, match="task 2"):
            parallel([lambda: done.append(0), fail, lambda: done.append(2)])
        assert sorted(done) == [0, 2]
    finally:
        torch.set_num_threads(before)


def test_fork_gets_its_own_pool():
    """Data loader workers are forks, and threads do not survive one."""
    code = """
import os, torch
from leansense.layers.native import parallel
torch.set_num_threads(2)
parallel([int, int])
pid = os.fork()
if pid == 0:
    torch.set_num_threads(2)
    parallel([int, int])
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=1800
    )
    assert done.stdout.strip() == "7", done.stderr


@has_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_second_start_where_groups_may_write(tmp_path):
    """Under the umask of many systems: what the first start writes, the second must not refuse as
    open to others.
    """
    first, second = (load_afresh("os.umask(0o002)") for _ in range(2))
    assert second.returncode == 0 and second.stdout == first.stdout, second.stderr
    (path,) = cached(tmp_path)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path, path.with_suffix(".hash"))]
    assert modes == [0o700, 0o700, 0o600]


# ---- which back end "auto" takes, and what is noted of it


@pytest.mark.parametrize("kind", ["v4", "v3", "generic"])
def test_auto_takes_c_only_where_it_was_measured_to_win(monkeypatch, kind):
    monkeypatch.setattr(backend, "usable_isas", lambda: ("v4", "v3", "generic"))
    monkeypatch.setenv("LEANSENSE_ISA", kind)
    monkeypatch.setitem(backend.MEASURED, "measured", {"v4": 1.2, "v3": 0.9})
    order = {"cc": YES, "torch": YES}
    assert pick("measured", "auto", order) == ("cc" if kind == "v4" else "torch")
    assert pick("measured", "cc", order) == "cc", "a name is a name"
    assert pick("never measured", "auto", order) == "torch"
    assert pick("never measured", "auto", {"triton": YES, **order}) == "triton", (
        "no instruction set decides that"
    )


OPERATORS = {  # module: the operators that it enters into the table
    "scan": ["selective_scan", "causal_conv1d"],
    "linear_attention": ["linear_attention"],
    "bev_pool": ["bev_pool", "bev_pool plan"],
    "deformable": ["deformable_attention"],
    "conv": ["conv2d"],
    "upsample_conv": ["upsample_conv"],
    "norm_act": [f"norm_act/{act}" for act in ("identity", "relu", "silu", "hardswish")],
}
ENTRY_POINTS = ("why_not", "prepare", "forward", "backward")


@pytest.fixture
def table():
    """The dispatch table with all operators of layers in it."""
    for name in OPERATORS:
        importlib.import_module(f"leansense.layers.{name}")
    return backend.OPERATORS


def test_measured_operators_exist(table):
    """A name that no operator has would switch C off without a word."""
    known = {operator for names in OPERATORS.values() for operator in names}
    assert known <= set(table) and set(backend.MEASURED) - {"op", "logged_once"} == known
    for entry in backend.MEASURED.values():
        assert set(entry) <= set(backend.INSTRUCTIONS)


def test_every_operator_has_the_same_skeleton(table):
    """Triton, C, PyTorch, the formula, in this order, with the same four entry points."""
    for operators in OPERATORS.values():
        for operator in operators:
            names = list(table[operator])
            order = ["mamba_ssm", "triton", "cc", "products", "torch", "index_add", "reference"]
            assert names == [name for name in order if name in names]
            assert operator == "bev_pool plan" or names[-1] == "reference"
            for name in names:
                found = backend.load(operator, name)
                if isinstance(table[operator][name], str) or isinstance(found, backend.Backend):
                    assert all(callable(getattr(found, entry)) for entry in ENTRY_POINTS), name
                else:  # a formula, or forward and backward in one piece
                    assert hasattr(found, "apply") == (name in ("cc", "products")), name


@pytest.mark.parametrize("name", ["scan", "linear_attention", "bev_pool", "deformable"])
def test_digest_sees_the_kernels_of_an_operator(name):
    """Modules that are imported by name when they are first needed belong to a row's code too."""
    whole = closure({f"leansense.layers.{name}"})
    found = {module.removeprefix("leansense.layers.") for module in whole}
    assert {f"{name}_native", f"{name}_triton", "triton_jit", "backend"} <= found
    others = {"scan", "linear_attention", "bev_pool", "deformable"} - {name}
    assert not {module for module in found if module.split("_native")[0] in others}


def test_operators_are_imported_without_their_kernels():
    """No module of kernels is loaded before somebody calls it, and so no compiler is asked."""
    code = (
        f"import sys, {', '.join(f'leansense.layers.{name}' for name in OPERATORS)}; "
        "print([m for m in sys.modules if m.startswith('leansense') "
        "and m.endswith(('_native', '_triton', '_jit', '_mamba_ssm'))])"
    )
    assert run(ROOT, "python", "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("tracer", ["nothing", "counter", "compiler", "subclass"])
def test_is_traced(tracer, monkeypatch):
    """By a dispatch mode, a compiler, or a tensor that is no plain one."""
    x = torch.ones(2)
    with FlopCounterMode(display=False) if tracer == "counter" else contextlib.nullcontext():
        if tracer == "compiler":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        if tracer == "subclass":
            x = x.as_subclass(type("Watched", (torch.Tensor,), {}))
        assert backend.is_traced(torch.nn.Parameter(torch.ones(1)), None, x) == (
            tracer != "nothing"
        )


def test_back_ends_are_noted_with_their_build(monkeypatch):
    from leansense.core import record

    monkeypatch.setattr(record, "_BACKENDS", {})
    pick("op", "auto", {"cc": NO, "torch": YES})
    with use_isa("generic"):
        pick("op", "cc", {"cc": YES, "torch": YES})
    assert record._BACKENDS == {"op": {"torch", "cc-generic"}}


@has_compiler
def test_two_builds_in_one_process(tmp_path):
    """Side by side, whatever the environment says; flags make a library of their own."""
    found = {}
    for kind in usable_isas():
        with use_isa(kind):
            found[kind] = library("lanes", SOURCE).lanes()
    assert found == {kind: {"v4": 16, "v3": 8, "generic": 4}[kind] for kind in usable_isas()}
    library("lanes", SOURCE, ("-fno-trapping-math",))
    assert len(cached(tmp_path)) == len(usable_isas()) + 1
    with pytest.raises(NativeError, match="choose from"), use_isa("v9"):
        pass
    assert isa() == usable_isas()[0]


@has_compiler
@pytest.mark.parametrize("kind", ["v4", "v3"])
def test_loops_over_elements_are_vectorised(tmp_path, kind):
    """The fused norm's inner loops, for both instruction sets: one that is not takes ten times as
    long.
    """
    from leansense.layers import norm_act

    command = native.compiler()
    if (
        "Free Software Foundation" not in native._version(tuple(command))
        or platform.machine() != "x86_64"
    ):
        pytest.skip("reports of vectorised loops are GCC's")
    code = tmp_path / "code.c"
    code.write_text(norm_act.SOURCE)
    flags = (*native.FLAGS, *norm_act.FLAGS, *native.ISAS[kind][0], "-fopt-info-vec-optimized")
    done = subprocess.run(
        [*command, *flags, code, "-o", tmp_path / "made.so", "-lm"], capture_output=True, text=True
    )
    told = {
        int(line.split(":")[1]) for line in done.stderr.splitlines() if "loop vectorized" in line
    }
    loops = [
        n
        for n, line in enumerate(norm_act.SOURCE.split("\n"), 1)
        if "for (long i = 0; i < m" in line
    ]
    assert done.returncode == 0 and len(loops) == 1 + 3 * len(norm_act.ACTIVATIONS)
    assert set(loops) <= told, [norm_act.SOURCE.split("\n")[n - 1] for n in set(loops) - told]
