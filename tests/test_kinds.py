"""Each kind of input from outside is read right or refused in one line, and the table says so."""

import pytest

from kinds import MODULES, TABLE, count, name, total, try_all

pytestmark = pytest.mark.usefixtures("own_data_root")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_lost(module, tmp_path):
    """All kinds of a module are tried, and the committed table says what was found."""
    found = try_all(module, tmp_path)
    lost = [f"{k.of}, {k.sort}, {k.said}: {what}" for k, what in found if what.startswith("lost")]
    assert not lost, "\n".join(lost)
    assert len({(kind.sort, kind.of, kind.said) for kind, _ in found}) == len(found)
    text = TABLE.read_text()
    for lines in (count(found), name(found)):
        assert "\n".join(lines).strip() in text, "write the table anew: python tests/kinds.py"


def test_the_table_adds_up():
    """At least 200 kinds, of all five systems, none of them lost."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert lines[-1] == total(lines[:-1])
    tried, read, refused, lost = (int(cell) for cell in lines[-1].split("|")[3:7])
    assert tried == read + refused >= 200 and lost == 0
    systems = {"leaf", "simbev", "beam", "xad", "openvocab"}
    assert systems <= {line.split("|")[2].strip() for line in lines}
