"""Files that somebody else made: bounded before memory is taken, refused in one line, counted."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from conftest import message
from leansense.core import files
from leansense.core.check import Report

pytestmark = pytest.mark.usefixtures("own_data_root")


def one_line(call, *arguments, **named) -> str:
    """The single line that a call is refused with, whichever way."""
    text = message((ValueError, OSError), call, *arguments, **named)
    assert "\n" not in text and "Traceback" not in text and len(text) < 1200, text[:300]
    return text


def npy(shape, dtype="|u1", data=b"", version=b"\x01\x00") -> bytes:
    """An npy file whose header claims `shape`, whatever follows."""
    said = str({"descr": dtype, "fortran_order": False, "shape": shape})
    head = (said + " " * (53 - (len(said) - 11) % 64)).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(head)) + head + data


def zipped(path: Path, content: bytes, name: str = "data.npy") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


CLAIMS = {
    "a terabyte": (npy((10**6, 10**6)), "more than the"),
    "more digits than memory": (npy((10**30,)), "more than the"),
    "a negative side": (npy((-1, 4)), "shape (-1, 4)"),
    "nothing behind it": (npy((10, 10)), "ends before its array"),
    "objects": (npy((1,), "|O", b"cos\nsystem\n."), "Python objects"),
    "text": (npy((1,), "<U4", bytes(16)), "not of numbers"),
    "a record": (npy((1,), [("a", "<f4")], bytes(4)), "not of numbers"),
    "another version": (npy((1,), version=b"\x02\x00"), "version 2"),
    "brackets": (npy(((((((1,),),),),),)), ""),
    "no array": (b"hello", "not a numpy array"),
    "nothing": (b"", "not a numpy array"),
}


@pytest.mark.parametrize("kind", CLAIMS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_is_believed_only_as_far_as_it_can_be(tmp_path, kind, packed):
    """2.3: shape and type are known, and found in order, before any memory is taken."""
    content, said = CLAIMS[kind]
    path = tmp_path / "a.npy"
    if packed:
        zipped(path, content)
    else:
        path.write_bytes(content)
    text = one_line(files.read_array, path, "data")
    assert str(path) in text and said in text


def test_an_array_that_unpacks_to_much_is_refused_unread(tmp_path, monkeypatch):
    """2.3: a member of some kB that holds gigabytes: `accept` and `limit` come first."""
    path = zipped(tmp_path / "bomb.npz", npy((14, 3000, 3000)) + bytes(14 * 3000 * 3000))
    assert path.stat().st_size < 200_000
    made = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    assert "126,000,000 bytes" in one_line(files.read_array, path, "data", limit=1 << 20)
    assert "is odd" in one_line(files.read_array, path, "data", lambda shape, dtype: "is odd")
    assert made == []
    assert "has no array 'bev', only data" in one_line(files.read_array, path, "bev")


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["?", "<f2", ">f8", "<c8", "<i8", "|u1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
def test_sound_arrays_are_read_as_numpy_reads_them(tmp_path, order, dtype, shape):
    rng = np.random.default_rng(0)
    array = np.asarray(rng.integers(0, 2, shape).astype(dtype), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", first=array, other=array + array)
    for name, key in (("a.npy", ""), ("a.npz", "first")):
        found = files.read_array(tmp_path / name, key)
        assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
        assert found.flags.writeable


def test_a_damaged_member_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, data=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    assert "CRC" in one_line(files.read_array, path, "data")


TEXTS = {
    "deep": ("[" * 200_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "infinite": ('{"a": 1e999}', "no finite number"),
    "minus infinite": ("[-1e999]", "no finite number"),
    "NaN": ("[NaN]", "no finite number"),
    "a word": ('[Infinity, "x"]', "no finite number"),
    "cut": ('{"a": 1', "is not JSON"),
    "twice": ('{"a": 1, "a": 2}', "names 'a' twice"),
    "a list": ("[1]", "holds a list, not a dict"),
    "many digits": ('{"a": ' + "9" * 5000 + "}", "digits"),
    "latin": ('{"a": "é"}'.encode("latin-1"), "is not JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json_from_outside(tmp_path, kind):
    """2.3: whatever Python's decoder raises becomes one line with the file."""
    content, said = TEXTS[kind]
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = one_line(files.read_json, path, dict, once=True)
    assert str(path) in text and said in text


def test_xml_from_outside(tmp_path):
    """2.3: definitions of its own may stand for gigabytes, or for another file."""
    path = tmp_path / "a.xml"
    words = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 9}">' for k in range(1, 12))
    for text, said in (
        (f'<!DOCTYPE x [<!ENTITY a0 "lol">{words}]><x>&a11;</x>', "<!DOCTYPE"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><x>&a;</x>', "<!DOCTYPE"),
        ("<x><y></x>", "not XML"),
        ("", "not XML"),
    ):
        path.write_text(text)
        assert said in one_line(files.read_xml, path)
    path.write_bytes("<x>é</x>".encode("utf-16"))
    assert "not UTF-8" in one_line(files.read_xml, path)
    path.write_text("<x><y>12</y></x>")
    assert files.read_xml(path).findtext("y") == "12"


@pytest.mark.parametrize("read", [files.read_text, files.read_json, files.read_xml,
                                  files.read_csv, files.read_array])  # fmt: skip
def test_what_is_no_file_is_not_opened(tmp_path, read):
    """2.3: a pipe blocks whoever opens it, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, not a file" in one_line(read, tmp_path / "pipe")
    assert "is a folder, not a file" in one_line(read, tmp_path)
    assert "is a device, not a file" in one_line(read, "/dev/zero")
    assert "is missing" in message(FileNotFoundError, read, tmp_path / "none")


def test_size_is_asked_before_reading(tmp_path):
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing, on no disk
    for read in (files.read_text, files.read_json, files.read_xml, files.read_csv):
        assert "bytes, more than the" in one_line(read, path)


def test_csv_of_other_programs(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffpath;label\r\n a.jpg;ä\r\n\r\nb.jpg\r\n".encode())
    header, rows = files.read_csv(path)
    assert header == ["path", "label"] and rows == [
        (2, {"path": " a.jpg", "label": "ä"}),
        (4, {"path": "b.jpg", "label": ""}),
    ]
    path.write_text("path,label,label\n")
    assert "two columns 'label'" in one_line(files.read_csv, path)
    path.write_text(",".join(f"c{k}" for k in range(100_000)) + "\n")
    assert "100,000 columns" in one_line(files.read_csv, path)
    path.write_text('path\n"' + "x" * 200_000 + '"\n')
    assert "is not CSV (line" in one_line(files.read_csv, path)


def test_files_outside_the_folder_are_counted(tmp_path):
    """2.4: absolute paths, `..` and links of either kind; links inside are no matter."""
    root, other = tmp_path / "set", tmp_path / "other"
    (root / "own").mkdir(parents=True)
    other.mkdir()
    for place in (root / "own" / "a", other / "b"):
        place.touch()
    (root / "linked").symlink_to(other)
    (root / "link").symlink_to(other / "b")
    (root / "inner").symlink_to(root / "own" / "a")
    names = ["own/a", "inner", "own/../own/a", str(root / "own" / "a")]
    assert files.find_outside(root, names) == []
    away = ["linked/b", "link", "../other/b", str(other / "b"), "own/../../other/b"]
    assert files.find_outside(root, [*names, *away]) == away
    assert files.find_outside(root, ["missing", "../missing", "a\0b/c"]) == ["../missing"]
    report = Report("leaf", str(root))
    files.warn_outside(report, root, [*names, *away])
    assert report.ok and "5 of the files that are read lie outside" in str(report)
    (tmp_path / "door").symlink_to(root)
    assert files.find_outside(tmp_path / "door", names[:2]) == []


def test_reasons_are_shortened_and_survive_a_process():
    import pickle

    with pytest.raises(files.Refused) as caught, files.refusing("x" * 20, fix="go"):
        raise RuntimeError("y\n" * 10**6)
    assert len(str(caught.value)) < 250
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.reason == caught.value.reason and str(again) == str(caught.value)
    for error in (MemoryError(), RecursionError(), OverflowError("big"), zlib.error("bad")):
        with pytest.raises(files.Refused), files.refusing("a.bin"):
            raise error
    with pytest.raises(KeyboardInterrupt), files.refusing("a.bin"):
        raise KeyboardInterrupt
    assert json.dumps(files.one_line("a\n b")) == '"a b"'
