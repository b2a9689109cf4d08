"""Kinds of input that nobody here made, each read right or refused in one line: their list."""

import contextlib
import importlib
import io
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


def collect() -> list[Kind]:
    """All kinds, in the order of their modules."""
    return [kind for name in MODULES for kind in importlib.import_module(name).KINDS]


def tabulate(kinds: list[Kind], found: list[str]) -> str:
    """The table as Markdown: sort and reader, then tried, read right, refused in one line, lost."""
    rows, names = {}, {}
    for kind, what in zip(kinds, found, strict=True):
        rows.setdefault((kind.sort, kind.of), Counter())[what.partition(":")[0]] += 1
        names.setdefault((kind.sort, kind.of), []).append(kind.said)
    lines = [
        "# What comes from outside",
        "",
        "Made by `tests/test_kinds.py`, which tries each kind; `LEANSENSE_WRITE=1` writes this",
        "file anew. *Read right*: its values were compared with what was put in. *Refused*: one",
        "line that names the file, row or parameter. *Lost*: anything else.",
        "",
        "| input | read by | tried | read right | refused in one line | lost |",
        "|---|---|--:|--:|--:|--:|",
    ]
    total = Counter()
    for (sort, of), count in rows.items():
        total += count
        cells = [count[word] for word in ("read", "refused", "lost")]
        lines.append(f"| {sort} | {of} | {' | '.join(map(str, [sum(cells), *cells]))} |")
    cells = [total[word] for word in ("read", "refused", "lost")]
    lines += [
        f"| **all** | | {' | '.join(map(str, [sum(cells), *cells]))} |",
        "",
        "## The kinds",
        "",
    ]
    for (sort, of), said in names.items():
        lines.append(f"- {sort}, {of}: {'; '.join(said)}.")
    return "\n".join(lines) + "\n"


TABLE = Path(__file__).with_name("kinds.md")
