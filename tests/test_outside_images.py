"""Pictures that somebody else made: scaled by what they declare, bounded, or refused in a line."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import IFDRational

from conftest import message
from leansense.core import images
from leansense.leaf import data as leaf
from leansense.leaf import use

pytestmark = pytest.mark.usefixtures("own_data_root")
GREY = np.linspace(0, 255, 64 * 64).reshape(64, 64)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, bits, kind, rows=b"", extra=b"") -> bytes:
    """A PNG file, byte by byte: `kind` 0 grey, 2 colour."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + body


def colour16(values) -> bytes:
    rgb = np.repeat(values.astype(">u2")[:, :, None], 3, 2)
    return png((64, 64), 16, 2, b"".join(b"\0" + row.tobytes() for row in rgb))


def tiff(path, array, tags=()) -> Path:
    Image.fromarray(array).save(path, tiffinfo=dict(tags))
    return path


def test_depths_are_scaled_by_the_declared_range(tmp_path):
    """1.1: 16 bits, 12 declared bits and floating point all show the same ramp."""
    grey12 = (GREY / 255 * 4095).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in grey12)
    (tmp_path / "sbit.png").write_bytes(png((64, 64), 16, 0, rows, chunk(b"sBIT", b"\x0c")))
    (tmp_path / "colour.png").write_bytes(colour16(GREY * 257))
    Image.fromarray((GREY * 257).astype(np.uint16)).save(tmp_path / "full.png")
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "eight.png")
    tiff(tmp_path / "float.tif", (GREY / 255).astype(np.float32))
    top = {341: 65535.0}
    tiff(tmp_path / "declared.tif", (GREY * 257).astype(np.float32), top)
    tiff(tmp_path / "whole.tif", (GREY * 2**22).astype(np.int32), {341: 255.0 * 2**22})
    for path in sorted(tmp_path.iterdir()):
        found = np.asarray(images.open_image(path)).astype(float)
        assert abs(found - GREY[:, :, None]).max() <= 1.01, path.name


UNDECLARED = {
    "twelve.png": lambda p: Image.fromarray((GREY / 255 * 4095).astype(np.uint16)).save(p),
    "twelve.tif": lambda p: tiff(p, (GREY / 255 * 4095).astype(np.uint16)),
    "colour12.png": lambda p: p.write_bytes(colour16(GREY / 255 * 4095)),
    "float16.tif": lambda p: tiff(p, (GREY * 257).astype(np.float32)),
    "float255.tif": lambda p: tiff(p, GREY.astype(np.float32)),
    "int32.tif": lambda p: tiff(p, (GREY * 2**22).astype(np.int32)),
    "negative.tif": lambda p: tiff(p, (GREY - 9).astype(np.float32)),
    "nan.tif": lambda p: tiff(p, np.where(GREY > 99, np.nan, GREY / 255).astype(np.float32)),
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_what_declares_no_range_is_refused(tmp_path, name):
    """1.1: such pictures were read as black or white, and nobody was told."""
    UNDECLARED[name](tmp_path / name)
    text = message(ValueError, images.open_image, tmp_path / name)
    assert str(tmp_path / name) in text and "image h" in text


def test_odd_exif_is_no_matter(tmp_path):
    """1.1: an orientation beside a negative rational: turned, and no traceback."""
    exif = Image.Exif()
    exif[274], exif[282] = 6, IFDRational(72, 1)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    start = content.index(b"Exif\0\0") + 6
    order = "<" if content[start : start + 2] == b"II" else ">"
    first = start + struct.unpack_from(order + "I", content, start + 4)[0]
    for k in range(struct.unpack_from(order + "H", content, first)[0]):
        place = first + 2 + 12 * k
        if struct.unpack_from(order + "H", content, place)[0] == 282:
            where = struct.unpack_from(order + "I", content, place + 8)[0]
            struct.pack_into(order + "ii", content, start + where, -72, 1)
    (tmp_path / "a.jpg").write_bytes(content)
    assert images.open_image(tmp_path / "a.jpg").size == (20, 40)


def test_only_known_formats_are_opened(tmp_path, monkeypatch):
    """1.1: an EPS file called .jpg started Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("was started"))
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_text(eps)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg", format="PPM")
    for name in ("a.jpg", "b.jpg"):
        assert "is none of JPEG" in message(ValueError, images.open_image, tmp_path / name)
        assert "is none of JPEG" in message(ValueError, images.size_of, tmp_path / name)


HUGE = {
    "strip": (png((65500, 1), 1, 0, bytes(8189)), "one side more than 100 times"),
    "claim": (png((13000, 13000), 1, 0), "which 65 bytes cannot hold"),
    "many": (png((20000, 20000), 1, 0, bytes(20000 * 2501)), "megapixels"),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_are_bounded_before_memory(tmp_path, name, monkeypatch):
    """1.1: 88 bytes asked for 13 GB in training, and the doctor said ok."""
    content, said = HUGE[name]
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    for read in (images.open_image, images.size_of, lambda p: leaf.prepare(p, 64)):
        assert said in message(ValueError, read, tmp_path / "a.png")


def test_a_large_jpeg_is_read_smaller(tmp_path, monkeypatch):
    """1.1: what a telephone of 200 megapixels writes; here with a limit of 12,000 pixels."""
    monkeypatch.setattr(images, "PIXELS", 12_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    ramp = np.linspace(0, 255, 200 * 160).reshape(160, 200).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert images.size_of(tmp_path / "a.jpg") == (200, 160)
    small = images.open_image(tmp_path / "a.jpg")
    assert small.size == (100, 80) and abs(np.asarray(small).mean() - ramp.mean()) < 2
    assert "or as JPEG" in message(ValueError, images.open_image, tmp_path / "a.png")


def test_a_telephones_200_megapixels(tmp_path, monkeypatch):
    """1.1: a JPEG of that size is decoded at half of it, in 50 megapixels; a PNG is refused."""
    size = 16_000, 12_500
    Image.linear_gradient("L").resize(size, Image.Resampling.NEAREST).save(tmp_path / "a.jpg")
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(size[0] + 1)) for _ in range(size[1])) + pack.flush()
    monkeypatch.setattr(zlib, "compress", lambda packed: packed)
    (tmp_path / "a.png").write_bytes(png(size, 8, 0, rows))
    decoded, load = [], ImageFile.ImageFile.load

    def watched(file):
        decoded.append(file.size)
        return load(file)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    assert images.open_image(tmp_path / "a.jpg").size == (8_000, 6_250)
    small = leaf.prepare(tmp_path / "a.jpg", 64)
    assert max(decoded) == (8_000, 6_250)
    decoded.clear()
    assert max(images.open_image(tmp_path / "a.jpg", 64).size, *decoded) == (2_000, 1_563)
    middle = small[8:-8, 32, 0].astype(int)
    assert small.shape == (64, 64, 3) and np.abs(middle - np.linspace(3, 252, 48)).max() < 5
    decoded.clear()
    said = message(ValueError, images.open_image, tmp_path / "a.png")
    assert "more than the 178 megapixels" in said and "at half the size, or as JPEG" in said
    assert decoded == [] and said == message(ValueError, leaf.prepare, tmp_path / "a.png", 64)


def test_a_long_picture_is_resized_before_it_is_padded(tmp_path, monkeypatch):
    """1.1: the square around a strip takes many times the memory of the strip."""
    ramp = np.repeat(np.linspace(0, 255, 5000).astype(np.uint8)[None], 60, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    sides, new = [], Image.new

    def watched(mode, size, *rest):
        sides.append(max(size))
        return new(mode, size, *rest)

    monkeypatch.setattr(Image, "new", watched)
    found = leaf.prepare(tmp_path / "a.png", 50)
    assert found.shape == (50, 50, 3) and max(sides, default=0) <= 60
    assert found[:24].max() == 0 and found[24, 0].max() < 10 and found[24, -1].min() > 245


def test_what_cannot_be_seen_is_black(tmp_path):
    alpha = np.where(GREY > 99, 255, 0).astype(np.uint8)
    plain = np.dstack([np.full((64, 64), 255, np.uint8)] * 3)
    Image.fromarray(np.dstack([plain, alpha])).save(tmp_path / "a.png")
    assert (np.asarray(images.open_image(tmp_path / "a.png"))[..., 0] == alpha).all()


def test_the_doctor_takes_the_path_of_training(tmp_path, monkeypatch):
    """1.1: whatever `prepare` refuses is an error of the doctor's, with the file."""
    for name, label in (("a", "blast"), ("b", "healthy")):
        for part in ("train", "valid"):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / label / f"{part}{name}.png")
    rows = ["path,label,split"]
    rows += [f"{p.parent.name}/{p.name},{p.parent.name},{p.name[:5]}"
             for p in sorted(tmp_path.rglob("*.png"))]  # fmt: skip
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "label2id.json").write_text('{"blast": 0, "healthy": 1}')
    assert leaf.check(tmp_path).ok
    Image.new("RGB", (9000, 9)).save(tmp_path / "blast" / "traina.png")
    report = leaf.check(tmp_path)
    assert [Path(problem.path).name for problem in report.errors] == ["traina.png"]


class _Even(torch.nn.Module):
    def forward(self, image):
        return torch.zeros(len(image), 2) + torch.tensor([0.0, 1.0])


META = {"label2id": {"blast": 0, "healthy": 1}, "image_size": 32, "temperature": 1.0,
        "unsure_below": 0.0}  # fmt: skip


@pytest.fixture
def ready(monkeypatch):
    """The command with a network that always says healthy."""
    monkeypatch.setattr(use, "load_checkpoint", lambda path: (_Even(), META))


def test_one_bad_picture_loses_no_other_answer(tmp_path, ready, capsys):
    """1.1, 1.4: errors are per file, several places may be named, a missing one is an answer."""
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.png", "caf\udce9.png", " b.JPE", ".ipynb_checkpoints/a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name, format="PNG")
    (tmp_path / "set" / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    out = tmp_path / "answers.json"
    places = [str(tmp_path / "set"), str(tmp_path / "set" / "a.png"), str(tmp_path / "none.jpg")]
    assert use.main(["predict", "c.pt", *places, "--out", str(out)]) == 1
    answers = json.loads(out.read_text())
    assert [a.get("label", "error") for a in answers].count("healthy") == 3
    assert len(answers) == 5 and sum("error" in answer for answer in answers) == 2
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert use.main(["predict", "c.pt", str(tmp_path / "none.jpg")]) == 2


def test_answers_are_written_before_they_are_printed(tmp_path, ready, monkeypatch):
    """1.4: a closed pipe behind the command loses nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    out = tmp_path / "answers.json"

    def closed(*words, **named):
        assert out.exists()
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        use.main(["predict", "c.pt", str(tmp_path / "a.png"), "--out", str(out)])
    assert json.loads(out.read_text())[0]["label"] == "healthy"


def test_relative_paths_count_from_the_repository(tmp_path, ready, monkeypatch, capsys):
    """1.4: as in every other command, wherever one stands."""
    monkeypatch.setenv("LEANSENSE_ROOT", str(tmp_path))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert use.main(["predict", "c.pt", "a.png", "--out", "answers.json"]) == 0
    assert (tmp_path / "answers.json").exists() and str(tmp_path) in capsys.readouterr().out
