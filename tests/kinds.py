"""Kinds of input that nobody here made, each read right or refused in one line: their list."""

import contextlib
import importlib
import io
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODULES = ("kinds_pictures", "kinds_weights", "kinds_scenes")
LONGEST = 600  # characters of a line beside the paths in it; a doctor's list may have more


@dataclass(frozen=True)
class Kind:
    """A sort of input, and what must come of it.

    Args:
        sort: the sort of file, as the table calls it
        said: the kind in words
        of: the system, or the part of the core, that reads it
        right: empty: it is read right; else words of the line that refuses it
        run: makes the input below a folder and reads it; True: what was read is right
    """

    sort: str
    said: str
    of: str
    right: str
    run: Callable[[Path], object]


class Said(ValueError):
    """What a command wrote on the error stream before it ended with a status above zero."""


def ask(main: Callable, *argv: object) -> str:
    """What a command prints; Said: it ended with an error, which holds its lines."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                raise Said(status) from None
    if status:
        raise Said((error.getvalue() or out.getvalue()).strip() or f"status {status}, no word")
    return out.getvalue()


def judge(kind: Kind, folder: Path) -> str:
    """`read`, `refused`, or `lost: why`."""
    try:
        good = kind.run(folder)
    except (ValueError, OSError) as error:
        line = str(error).replace(str(folder), "")
        odd = [c for c in line if unicodedata.category(c) in ("Cc", "Cs")]
        if "\n" in line.strip() or odd or not line.strip():
            return f"lost: not one line: {line[:300]!r}"
        if len(line) > LONGEST:
            return f"lost: {len(line)} characters: {line[:100]!r}"
        if not kind.right:
            return f"lost: refused, and should be read: {line}"
        return "refused" if kind.right in line else f"lost: {kind.right!r} is not in: {line}"
    except Exception as error:
        return f"lost: {type(error).__name__}: {error}"
    if kind.right:
        return "lost: read, and should be refused"
    return "read" if good is True else f"lost: read wrongly: {good!r}"


def try_all(module: str, folder: Path) -> list[tuple[Kind, str]]:
    """Each kind of a module with what came of it, each in a folder of its own below `folder`."""
    found = []
    for number, kind in enumerate(importlib.import_module(module).KINDS):
        own = folder / str(number)
        own.mkdir()
        found.append((kind, judge(kind, own)))
    return found


def count(found: list[tuple[Kind, str]]) -> list[str]:
    """The table's lines for the kinds of one module."""
    rows = {}
    for kind, what in found:
        rows.setdefault((kind.sort, kind.of), Counter())[what.partition(":")[0]] += 1
    lines = []
    for (sort, of), each in sorted(rows.items()):
        cells = [each[word] for word in ("read", "refused", "lost")]
        lines.append(f"| {sort} | {of} | {' | '.join(map(str, [sum(cells), *cells]))} |")
    return lines


def name(found: list[tuple[Kind, str]]) -> list[str]:
    """A paragraph for each of the table's lines: the kinds that it counts."""
    said = {}
    for kind, _ in found:
        said.setdefault((kind.sort, kind.of), []).append(kind.said)
    lines = []
    for (sort, of), kinds in sorted(said.items()):
        lines += [f"**{sort}, {of}**: {'; '.join(map(quote, kinds))}.", ""]
    return lines


def quote(text: str) -> str:
    """A kind's words as Markdown prints them."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#$~" else c for c in text)


def total(lines: list[str]) -> str:
    """The last line of the table: the sums of its columns."""
    cells = [[int(cell) for cell in line.split("|")[3:7]] for line in lines]
    return f"| **all** | | {' | '.join(str(sum(column)) for column in zip(*cells))} |"


def write(found: list[list[tuple[Kind, str]]]) -> str:
    """The whole file: the table, then the kinds that it counts."""
    lines = [line for each in found for line in count(each)]
    named = [line for each in found for line in name(each)]
    return "\n".join([*HEAD, *lines, total(lines), "", "## The kinds", "", *named]).strip() + "\n"


HEAD = [
    "# What comes from outside",
    "",
    "Made by `python tests/kinds.py`, which tries each kind; `tests/test_kinds.py` tries them",
    "again. *Read right*: what was read is what was put in. *Refused*: in one line that says",
    "what is wrong, mostly with the file, row or parameter. *Lost*: anything else.",
    "",
    "| input | read by | tried | read right | refused in one line | lost |",
    "|---|---|--:|--:|--:|--:|",
]
TABLE = Path(__file__).with_name("kinds.md")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        os.environ["LEANSENSE_DATA"] = str(Path(top, "data"))
        made = []
        for module in MODULES:
            Path(top, module).mkdir()
            made.append(try_all(module, Path(top, module)))
        TABLE.write_text(write(made))
