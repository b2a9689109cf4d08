"""Names that nobody here chose print as they are: in LaTeX, in a terminal, in a plot."""

import ast
import io
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from leansense.core.check import Problem, Report
from leansense.core.record import _ready
from leansense.core.tables import Column, booktabs
from leansense.core.text import say, shorten, terminal, tex

LABELS = {
    "bracket": "[x] first",
    "number": "[2cm] first",
    "star": "* first",
    "parenthesis": "(a) first",
    "blank": "  [x]",
    "Greek": "αβγ Ωμέγα ς ϕ Λ",
    "half": "½ of 2½ and ⅔",
    "Chinese": "水稻白叶枯病",
    "emoji": "leaf 🌾 👩🏽‍🌾",
    "control": "a\x1b[31mb\x07\x00c",
    "bidi": "a\u202eb\u200bc\ufeff",
    "surrogate": "caf\udce9",
    "accents": "Łódź Ünïcödé naïve Ðð Þ ĳ ế ạ ç ő Å Ω K",
    "lines": "a\nb\r\n\tc\u2028d",
    "commands": r"\foo $\bar{x}$ \\ 50 % #1 ~ ^ {a}_{b} & | < > ` ' \"",
    "hyphens": "a--b---c ''quoted'' ``so'' !` ?`",
    "signs": "± × ÷ · ≤ ≥ ≠ ≈ ∞ → ← ↔ ⇒ √ ∑ ∈ • … – — ‘a’ “b” „c“ « » € £ § © ® ™ ° µ ª º ¿ ¡",
    "powers": "x² y³ H₂O 10⁻³ ℃ Ⅳ ﬁ ％ １",
    "empty": "",
}


def compile_tex(folder: Path, body: str) -> str:
    """The text of the PDF that LaTeX makes of `body`, or the end of its log."""
    (folder / "main.tex").write_text(
        "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs}\n"
        "\\begin{document}\n" + body + "\n\\end{document}\n",
        encoding="utf-8",
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and (folder / "main.pdf").exists(), done.stdout[-1500:]
    return done.stdout


needs_latex = pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")


@needs_latex
def test_every_label_leaves_a_pdf_with_all_its_rows(tmp_path):
    """Two tables: each odd label behind a line break, as row, heading, cell and macro."""
    lines = pd.DataFrame(
        {"label": list(LABELS.values()), "m": 1.0, "t": list(LABELS.values()), "missing": ""}
    )
    text = booktabs(lines, [Column("m", "[m]", best=max), Column("t", "* t", text=True)], "(head")
    assert text.count(r"\\") == len(LABELS) + 1
    macros = "".join(
        f"\\newcommand{{\\zz{chr(97 + k)}}}{{{tex(label)}}}\\zza\\\\\n\\zz{chr(97 + k)}\n\n"
        for k, label in enumerate(LABELS.values())
    )
    assert "Error" not in compile_tex(tmp_path, text + macros)


@needs_latex
def test_every_sign_of_the_common_planes_compiles(tmp_path):
    """Each assigned sign up to U+2BFF, some of every later block, and those nobody assigned."""
    every = [*range(0, 0x2C00), *range(0x2C00, 0x20000, 257), 0x1F33E, 0x10FFFF, 0xD800, 0xDFFF]
    parts = [tex("".join(map(chr, every[i : i + 40]))) for i in range(0, len(every), 40)]
    compile_tex(tmp_path, "\\tiny\\raggedright\n" + "\n\n".join(parts))


def printed(latex: str) -> str:
    """What is left of a LaTeX text without the braces and commands that print nothing."""
    return latex.replace("{", "").replace("}", "")


@pytest.mark.parametrize("first", "[*(")
def test_a_row_never_begins_with_what_a_line_break_would_take(first):
    for label in (f"{first}x", f"  {first}x", f"{first}"):
        assert tex(label).lstrip()[0] == "{" and printed(tex(label)) == label
    assert tex("a[x]*(y)") == "a[x]*(y)"


def test_what_has_no_letter_is_printed_by_its_code():
    assert tex("水") == r"\texttt{[U+6C34]}" and tex("\x1b") == r"\texttt{[U+001B]}"
    assert tex("½") == r"\textsuperscript{1}/\textsubscript{2}"
    assert tex("e\u0301") == tex("é") == r"\'{e}"
    assert tex("a--b") == "a-{}-b" and tex("a\nb") == "a b"


def test_labels_of_the_papers_are_set_as_before():
    """What the committed tables say does not change: no row had to run, or look different."""
    from leansense.core.rows import read_rows, systems

    labels = {row.label for system in systems() for row in read_rows(system)}
    odd = {label for label in labels if "U+" in tex(label)}
    assert len(labels) > 50 and not odd


# --- terminals ---


@pytest.mark.parametrize("text", ["\x1b[2Jx", "\x9b31m", "a\rb", "\x07", "\u202ex", "\x7f", "\x00"])
def test_a_terminal_is_told_nothing(text):
    said = terminal(text)
    assert not [c for c in said if unicodedata.category(c) in ("Cc", "Cf")] and "\\" in said


def test_readable_text_stays_as_it_is():
    assert terminal("水稻 é ½ α 🌾\n\tx") == "水稻 é ½ α 🌾\n\tx"


def test_say_never_fails_on_a_stream_that_knows_less(monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        say("caf\udce9 水 \x1b[31m")
        stream.seek(0)
        assert "\\x1b" in stream.read()


def test_a_message_is_short(capsys):
    columns = ", ".join(f"column {k}" for k in range(1_000_000))
    say(f"x.csv: columns {columns}", error=True)
    assert len(capsys.readouterr().err) < 2200
    line = str(Problem("x.csv", f"has the columns {columns}", "name one label"))
    assert len(line) < 700 and "characters)" in line and line.endswith("; name one label")
    assert shorten("short") == "short"


def test_the_doctor_prints_no_escape(capsys):
    report = Report("leaf", "x")
    report.add("a\x1b[31mb\nc.jpg", "cannot be read", "copy it again")
    assert "a\\x1b[31mb c.jpg" in str(report) and "\x1b" not in str(report)


def test_no_module_prints_a_foreign_text_raw():
    """All that the library says goes through `say`; core.warm ends as Python itself does."""
    bare = {
        path.relative_to(ROOT / "lib/leansense").as_posix()
        for path in sorted((ROOT / "lib/leansense").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert bare == {"core/text.py", "core/warm.py"}


def test_a_folder_in_the_place_of_a_record_is_named_harmlessly(tmp_path, capsys):
    out = tmp_path / "a\x1b[31mb" / "papers/toy/records/demo/main/row.s0.json"
    out.mkdir(parents=True)
    _ready(out)
    said = capsys.readouterr().out
    assert "a\\x1b[31mb" in said and "\x1b" not in said and not out.exists()


# --- plots ---


@pytest.mark.parametrize(
    "name", [r"$\foo$", "$", "$$", "a$b$c", r"\$x\$", "a\x00b", "caf\udce9", "水"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_class_name_does_not_end_the_plot(tmp_path, name):
    import matplotlib.pyplot as plt

    from leansense.core.figures import confusion, save, sheet

    figure, axes = plt.subplots()
    confusion(np.eye(2), [name, "ok"], axes)
    save(figure, tmp_path / "confusion")
    save(sheet([np.zeros((4, 4, 3), np.uint8)], [name]), tmp_path / "sheet")
    plt.close("all")
    assert (tmp_path / "confusion.pdf").stat().st_size > 1000
