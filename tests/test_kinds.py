"""Each kind of input from outside is read right or refused in one line, and the table says so."""

import os

import pytest

from kinds import TABLE, collect, judge, tabulate

pytestmark = pytest.mark.usefixtures("own_data_root")


def test_nothing_is_lost(tmp_path):
    """All kinds are tried, none is lost, and the committed table is what was found."""
    kinds, found = collect(), []
    for number, kind in enumerate(kinds):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(judge(kind, folder))
    lost = [
        f"{kind.of}, {kind.sort}, {kind.said}: {what}"
        for kind, what in zip(kinds, found, strict=True)
        if what.startswith("lost")
    ]
    assert not lost, "\n".join(lost)
    assert len(kinds) >= 200 and len({(k.sort, k.of, k.said) for k in kinds}) == len(kinds)
    text = tabulate(kinds, found)
    if os.environ.get("LEANSENSE_WRITE") == "1":
        TABLE.write_text(text)
    assert TABLE.read_text() == text
