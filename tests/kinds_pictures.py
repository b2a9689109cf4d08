"""Kinds of pictures, for each of the five readers of one, and of class folders and tables."""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from kinds import Kind, Said, ask
from leansense.beam.data import prepare_image
from leansense.core.check import main as check_main
from leansense.leaf import data as leaf
from leansense.leaf import use
from leansense.leaf.checkpoint import save_checkpoint
from leansense.leaf.data import prepare as prepare_leaf
from leansense.leaf.model import build
from leansense.leaf.split import main as split_main
from leansense.openvocab.data import prepare as prepare_openvocab
from leansense.simbev.frames import read_image as read_simbev
from leansense.xad.data import read_image as read_xad

SIDE = 64
RAMP = np.tile(np.linspace(0, 255, SIDE).round().astype(np.uint8), (SIDE, 1))
COLOUR = np.dstack([RAMP, RAMP.T, np.full_like(RAMP, 90)])  # no two corners are alike
GREY = np.repeat(RAMP[:, :, None], 3, 2)
READERS = {
    "leaf": lambda path: prepare_leaf(path, SIDE),
    "simbev": lambda path: read_simbev(path, (SIDE, SIDE)),
    "beam": lambda path: prepare_image(path, SIDE).transpose(1, 2, 0),
    "xad": lambda path: read_xad(path, (SIDE, SIDE)),
    "openvocab": lambda path: prepare_openvocab(path, SIDE, (SIDE, SIDE)),
}
UPRIGHT = ("leaf", "beam")  # the others have boxes or calibrations of the stored pixels


# ---- bytes of pictures


def saved(array, kind: str, mode: str = "", **options) -> bytes:
    """A picture as PIL writes it."""
    stream, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, bits: int, colour: int, rows: bytes = b"", extra: bytes = b"", laced=0) -> bytes:
    """A PNG file, byte by byte; 0 grey, 2 RGB, 3 palette, 6 RGBA; `laced`: in seven passes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, laced))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + body


def lines(array) -> bytes:
    """The rows of a PNG, none of them filtered."""
    return b"".join(b"\0" + row.tobytes() for row in array)


def laced() -> bytes:
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2),
              (1, 2, 0, 1))  # fmt: skip
    parts = [np.ascontiguousarray(COLOUR[a::b, c::d]) for a, b, c, d in passes]
    return png((SIDE, SIDE), 8, 2, b"".join(map(lines, parts)), laced=1)


def deep(top: int, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits whose white is `top`."""
    array = ((COLOUR if colour else RAMP) / 255 * top).round().astype(">u2")
    if colour == 6:
        array = np.dstack([array, np.full_like(RAMP, 65535, dtype=">u2")]).astype(">u2")
    return png((SIDE, SIDE), 16, colour, lines(array), extra)


def few(bits: int, colour: int = 0) -> bytes:
    """A PNG of 1, 2 or 4 bits, grey or with a palette of greys."""
    levels = np.unpackbits((RAMP >> (8 - bits))[..., None], axis=-1)[..., 8 - bits :]
    palette = np.repeat(np.linspace(0, 255, 2**bits).round().astype(np.uint8), 3).tobytes()
    rows = lines(np.packbits(levels.reshape(SIDE, -1), axis=1))
    return png((SIDE, SIDE), bits, colour, rows, chunk(b"PLTE", palette) if colour else b"")


def of_few(bits: int):
    """What `few` shows."""
    values = ((RAMP >> (8 - bits)) * (255 / (2**bits - 1))).round()
    return np.repeat(values[:, :, None], 3, 2)


def tiff(array, tags=(), **options) -> bytes:
    return saved(array, "TIFF", tiffinfo=dict(tags), **options)


def plain_tiff(array, white: int) -> bytes:
    """A TIFF of one strip, byte by byte; `white`: 0: zero is white, 1: zero is black."""
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = ((256, SIDE), (257, SIDE), (258, 8 * array.itemsize), (259, 1), (262, white),
            (273, 200), (277, 1), (278, SIDE), (279, array.nbytes), (339, kind))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return start.ljust(200, b"\0") + array.tobytes()


def with_alpha() -> bytes:
    """Every pixel covers the half of what is behind it, the values are what they are."""
    return saved(np.dstack([COLOUR, np.full_like(RAMP, 128)]), "PNG")


def turned(way: int, odd: bool = False) -> bytes:
    """A JPEG with an EXIF orientation and, if `odd`, a negative rational beside it."""
    exif = Image.Exif()
    exif[274], exif[282] = way, IFDRational(72, 1)
    content = bytearray(saved(COLOUR, "JPEG", quality=98, subsampling=0, exif=exif))
    start = content.index(b"Exif\0\0") + 6
    order = "<" if content[start : start + 2] == b"II" else ">"
    first = start + struct.unpack_from(order + "I", content, start + 4)[0]
    for k in range(struct.unpack_from(order + "H", content, first)[0]):
        place = first + 2 + 12 * k
        if odd and struct.unpack_from(order + "H", content, place)[0] == 282:
            where = struct.unpack_from(order + "I", content, place + 8)[0]
            struct.pack_into(order + "ii", content, start + where, -72, 1)
    return bytes(content)


def lying(kind: str, way: int) -> bytes:
    """A picture of another format with an EXIF orientation."""
    exif = Image.Exif()
    exif[274] = way
    return saved(COLOUR, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def moving(kind: str, **options) -> bytes:
    """Two frames, of which the first is the picture."""
    more = [Image.fromarray(255 - GREY)]
    return saved(GREY, kind, save_all=True, append_images=more, **options)


def claiming(kind: str, size: int) -> bytes:
    """A picture of 64 pixels a side whose header claims another size."""
    content = bytearray(plain_tiff(RAMP, 1) if kind == "TIFF" else saved(COLOUR, kind))
    if kind == "WEBP":  # one of one colour really has so few bytes
        return saved(np.full((size, size), 200, np.uint8), kind, lossless=True, method=0)
    if kind == "TIFF":
        for tag in (256, 257):
            place = content.index(struct.pack("<HHII", tag, 4, 1, SIDE)) + 8
            content[place : place + 4] = struct.pack("<I", size)
    else:
        place = content.index(b"\xff\xc0") + 5 if kind == "JPEG" else {"GIF": 6, "BMP": 18}[kind]
        order = {"GIF": "<HH", "BMP": "<ii", "JPEG": ">HH"}[kind]
        content[place : place + struct.calcsize(order)] = struct.pack(order, size, size)
    return bytes(content)


def bomb(name: bytes) -> bytes:
    """A PNG with a compressed chunk that unpacks to 64 MB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    extra = chunk(name, b"a\0\0" + packed)
    return png((SIDE, SIDE), 8, 2, lines(COLOUR), extra)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def scratched() -> bytes:
    content = bytearray(saved(COLOUR, "PNG"))
    content[len(content) // 2] ^= 255
    return bytes(content)


def jpeg(**options) -> bytes:
    return saved(COLOUR, "JPEG", quality=98, subsampling=0, **options)


def cmyk() -> bytes:
    """A JPEG for a printing press; PIL writes it the way Photoshop does, inverted."""
    return saved(COLOUR, "JPEG", "CMYK", quality=98, subsampling=0)


def brand(name: bytes) -> bytes:
    """The beginning of a file of the family of MP4, as a telephone writes."""
    return struct.pack(">I", 24) + b"ftyp" + name + bytes(4) + b"mif1" + name + bytes(500)


BLACK = np.where(RAMP > 99, 255, 0).astype(np.uint8)  # an alpha, and what shows of white below it
SEEN = np.repeat(BLACK[:, :, None], 3, 2)
TURNS = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
         8: np.rot90}  # fmt: skip

# kind: (name of the file, its bytes, what it shows, how far a pixel may be from that on average)
DEPTHS = {
    "8-bit grey PNG": ("a.png", lambda: saved(RAMP, "PNG"), GREY, 0),
    "8-bit grey JPEG": ("a.jpg", lambda: saved(RAMP, "JPEG", quality=98), GREY, 1),
    "PNG of 1 bit": ("a.png", lambda: few(1), of_few(1), 0),
    "PNG of 2 bits": ("a.png", lambda: few(2), of_few(2), 0),
    "PNG of 4 bits": ("a.png", lambda: few(4), of_few(4), 0),
    "palette of 4 bits": ("a.png", lambda: few(4, 3), of_few(4), 0),
    "palette of 8 bits": ("a.png", lambda: few(8, 3), GREY, 0),
    "16-bit grey PNG": ("a.png", lambda: deep(65535), GREY, 1),
    "16-bit colour PNG": ("a.png", lambda: deep(65535, 2), COLOUR, 1),
    "12 bits in 16, sBIT declared": (
        "a.png", lambda: deep(4095, extra=chunk(b"sBIT", b"\x0c")), GREY, 1),
    "10 bits in 16, sBIT declared": (
        "a.png", lambda: deep(1023, extra=chunk(b"sBIT", b"\x0a")), GREY, 1),
    "12-bit colour in 16, sBIT declared": (
        "a.png", lambda: deep(4095, 2, chunk(b"sBIT", b"\x0c\x0c\x0c")), COLOUR, 1),
    "12-bit colour and alpha in 16, sBIT declared": (
        "a.png", lambda: deep(4095, 6, chunk(b"sBIT", b"\x0c" * 4)), COLOUR, 1),
    "dark colour of 12 bits, sBIT declared": (
        "a.png", lambda: deep(500, 2, chunk(b"sBIT", b"\x0c" * 3)), COLOUR * (500 / 4095), 1),
    "dark colour of 16 bits, sBIT declared": (
        "a.png", lambda: deep(5000, 2, chunk(b"sBIT", b"\x10" * 3)), COLOUR * (5000 / 65535), 1),
    "dark grey of 16 bits, sBIT declared": (
        "a.png", lambda: deep(5000, 0, chunk(b"sBIT", b"\x10")), GREY * (5000 / 65535), 1),
    "16 bits, sBIT of 12 exceeded": (
        "a.png", lambda: deep(65535, 2, chunk(b"sBIT", b"\x0c" * 3)), COLOUR, 1),
    "16 bits, a sBIT that cannot be": (
        "a.png", lambda: deep(65535, extra=chunk(b"sBIT", b"\xff")), GREY, 1),
    "16 bits, all black": ("a.png", lambda: deep(0), GREY * 0, 0),
    "16-bit TIFF whose 0 is white": (
        "a.tif", lambda: plain_tiff(RAMP.astype(np.uint16) * 257, 0), 255 - GREY, 1),
    "float TIFF whose 0 is white": (
        "a.tif", lambda: plain_tiff((RAMP / 255).astype(np.float32), 0), 255 - GREY, 1),
    "8-bit TIFF whose 0 is white": ("a.tif", lambda: plain_tiff(RAMP, 0), 255 - GREY, 0),
    "float TIFF, all black": (
        "a.tif", lambda: plain_tiff(RAMP.astype(np.float32) * 0, 1), GREY * 0, 0),
    "16-bit TIFF": ("a.tif", lambda: tiff(RAMP.astype(np.uint16) * 257), GREY, 1),
    "12 bits in a TIFF that declares 4095": (
        "a.tif", lambda: tiff((RAMP / 255 * 4095).astype(np.uint16), {281: 4095}), GREY, 1),
    "float TIFF, 0 to 1": ("a.tif", lambda: tiff((RAMP / 255).astype(np.float32)), GREY, 1),
    "float TIFF that declares 65535": (
        "a.tif", lambda: tiff((RAMP * 257.0).astype(np.float32), {341: 65535.0}), GREY, 1),
    "32-bit TIFF that declares its range": (
        "a.tif", lambda: tiff(RAMP.astype(np.int32) << 22, {341: 255.0 * 2**22}), GREY, 1),
}  # fmt: skip
FORMS = {
    "PNG": ("a.png", lambda: saved(COLOUR, "PNG"), COLOUR, 0),
    "interlaced PNG": ("a.png", laced, COLOUR, 0),
    "JPEG": ("a.jpg", jpeg, COLOUR, 2),
    "progressive JPEG": ("a.jpg", lambda: jpeg(progressive=True), COLOUR, 2),
    "JPEG for a printing press (CMYK)": ("a.jpg", cmyk, COLOUR, 2),
    "JPEG with bytes behind its end": ("a.jpg", lambda: jpeg() + bytes(999), COLOUR, 2),
    "JPEG with a picture in its EXIF": (
        "a.jpg", lambda: jpeg(exif=b"Exif\0\0" + saved(RAMP, "JPEG")), COLOUR, 2),
    "JPEG called .png": ("a.png", jpeg, COLOUR, 2),
    "two pictures in a JPEG (MPO)": ("a.jpg", lambda: moving("MPO", quality=98), GREY, 1),
    "BMP": ("a.bmp", lambda: saved(COLOUR, "BMP"), COLOUR, 0),
    "WebP": ("a.webp", lambda: saved(COLOUR, "WEBP", lossless=True), COLOUR, 0),
    "moving WebP": ("a.webp", lambda: moving("WEBP", lossless=True), GREY, 0),
    "moving GIF called .png": ("a.png", lambda: moving("GIF"), GREY, 4),
    "moving PNG": ("a.png", lambda: moving("PNG"), GREY, 0),
    "TIFF": ("a.tiff", lambda: tiff(COLOUR), COLOUR, 0),
    "packed TIFF": ("a.tif", lambda: tiff(COLOUR, compression="tiff_lzw"), COLOUR, 0),
    "TIFF of two pages": ("a.tif", lambda: moving("TIFF"), GREY, 0),
    "half transparent": ("a.png", with_alpha, COLOUR, 0),
    "white below transparency": (
        "a.png", lambda: saved(np.dstack([GREY * 0 + 255, BLACK]), "PNG"), SEEN, 0),
    "a transparent grey": (
        "a.png", lambda: saved(BLACK, "PNG", transparency=255), SEEN * 0, 0),
    "EXIF orientation beside a negative rational": ("a.jpg", lambda: turned(6, True), 6, 2),
    **{f"EXIF orientation {way}": ("a.jpg", functools.partial(turned, way), way, 2)
       for way in (1, *TURNS, 99)},
    **{f"{kind} with an EXIF orientation": (
        f"a.{end}", functools.partial(lying, kind, 6), 6, 0)
       for kind, end in (("TIFF", "tif"), ("PNG", "png"), ("WEBP", "webp"))},
    "an EXIF block of nothing": ("a.jpg", lambda: jpeg(exif=b"Exif\0\0"), COLOUR, 2),
    "a colour profile of nothing": ("a.jpg", lambda: jpeg(icc_profile=b"x" * 700), COLOUR, 2),
    "a name in Latin-1": ("caf\udce9.png", lambda: saved(COLOUR, "PNG"), COLOUR, 0),
    "a name with a line break and a space before it": (
        " a\nb.png", lambda: saved(COLOUR, "PNG"), COLOUR, 0),
    "a name with a backslash": ("a\\b.png", lambda: saved(COLOUR, "PNG"), COLOUR, 0),
}  # fmt: skip
# kind: (name of the file, its bytes, words of the line)
REFUSED = {
    "12 bits in 16, nothing declared": ("a.png", lambda: deep(4095), "declares no range"),
    "12-bit colour in 16, nothing declared": ("a.png", lambda: deep(4095, 2), "12-bit camera"),
    "float TIFF, 0 to 65535, nothing declared": (
        "a.tif", lambda: tiff((RAMP * 257.0).astype(np.float32)), "declares no range"),
    "32-bit TIFF, nothing declared": (
        "a.tif", lambda: tiff(RAMP.astype(np.int32) << 22), "declares no range"),
    "signed 16-bit TIFF, nothing declared": (
        "a.tif", lambda: plain_tiff(RAMP.astype(np.int16) * 100, 1), "declares no range"),
    "float TIFF with negative values": (
        "a.tif", lambda: tiff((RAMP - 9.0).astype(np.float32)), "values from -9"),
    "float TIFF with NaN": (
        "a.tif", lambda: tiff(np.where(RAMP > 9, np.nan, 0.5).astype(np.float32)), "holds NaN"),
}  # fmt: skip
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
NONE = {
    "EPS called .jpg": ("a.jpg", lambda: EPS, "is none of JPEG"),
    "text called .jpg": ("a.jpg", lambda: b"hello\n", "is none of JPEG"),
    "a page of HTML called .jpg": (
        "a.jpg", lambda: b"<!DOCTYPE html><title>404</title>", "is none of JPEG"),
    "a pointer of Git LFS": ("a.jpg", lambda: LFS, "is none of JPEG"),
    "SVG called .png": (
        "a.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is none of JPEG"),
    "HEIC called .jpg": ("a.jpg", lambda: brand(b"heic"), "is none of JPEG"),
    "AVIF called .jpg": ("a.jpg", lambda: brand(b"avif"), "is none of JPEG"),
    "JPEG 2000": ("a.jpg", lambda: saved(COLOUR, "JPEG2000"), "is none of JPEG"),
    "PPM": ("a.jpg", lambda: saved(COLOUR, "PPM"), "is none of JPEG"),
    "PDF called .png": ("a.png", lambda: saved(COLOUR, "PDF"), "is none of JPEG"),
    "a bad picture with a line break in its name": ("a\nb.png", lambda: b"x", "is none of JPEG"),
    "a bad picture with a name in Latin-1": ("caf\udce9.png", lambda: b"x", "is none of JPEG"),
    "a bad picture with a terminal's code in its name": (
        "\x1b[31m.png", lambda: b"x", "is none of JPEG"),
    "empty": ("a.jpg", lambda: b"", "image "),
    "half a JPEG": ("a.jpg", lambda: half(jpeg()), "image cannot be decoded"),
    "half a PNG": ("a.png", lambda: half(saved(COLOUR, "PNG")), "image cannot be decoded"),
    "half a TIFF": ("a.tif", lambda: half(tiff(COLOUR)), "image cannot be decoded"),
    "half a WebP": ("a.webp", lambda: half(saved(COLOUR, "WEBP")), "image cannot be decoded"),
    "a PNG with a wrong byte": ("a.png", scratched, "image cannot be decoded"),
    "a JPEG whose end is zeros": (
        "a.jpg", lambda: half(jpeg()) + bytes(len(jpeg()) // 2), "image cannot be decoded"),
    "a JPEG with a picture in its EXIF whose end is zeros": (
        "a.jpg", lambda: jpeg(exif=b"Exif\0\0" + saved(RAMP, "JPEG"))[:-900] + bytes(900),
        "image cannot be decoded"),
    "a JPEG without its last bytes": ("a.jpg", lambda: jpeg()[:-4], "image cannot be decoded"),
    "a PNG without pixels": ("a.png", lambda: png((64, 64), 8, 2), "image cannot be decoded"),
    "a PNG of no size": ("a.png", lambda: png((0, 64), 8, 2), "image "),
    "a strip of 65500 x 1": (
        "a.png", lambda: png((65500, 1), 1, 0, bytes(8189)), "one side more than 100 times"),
    "a header that claims 10^9 pixels": (
        "a.png", lambda: png((32000, 32000), 8, 2), "megapixels that are read"),
    "a header that claims 10^8 pixels": (
        "a.png", lambda: png((10000, 10000), 8, 2), "bytes cannot hold"),
    **{f"a {kind} whose header claims {size} x {size}": (
        f"a.{end}", functools.partial(claiming, kind, size), "bytes cannot hold")
       for kind, end, size in (("GIF", "png", 12000), ("BMP", "bmp", 12000), ("TIFF", "tif", 12000),
                               ("WEBP", "webp", 4000), ("JPEG", "jpg", 30000))},
    "a colour profile that unpacks to 64 MB": ("a.png", lambda: bomb(b"iCCP"), "too large"),
    "a comment that unpacks to 64 MB": ("a.png", lambda: bomb(b"zTXt"), "too large"),
}  # fmt: skip


@functools.cache
def content_of(make: Callable) -> bytes:
    return make()


def put(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def compare(found, wanted, tolerance: float):
    """True, or how far two pictures are from each other."""
    if found.shape != wanted.shape or found.dtype != np.uint8:
        return found.shape, str(found.dtype)
    apart = float(np.abs(found.astype(float) - wanted).mean())
    return apart <= tolerance or apart


def read_right(system: str, name: str, make: Callable, wanted, tolerance, folder: Path):
    if isinstance(wanted, int):  # an orientation
        turn = TURNS.get(wanted) if system in UPRIGHT else None
        wanted = turn(COLOUR) if turn else COLOUR
    path = put(folder, name, content_of(make))
    return compare(READERS[system](path), wanted, tolerance)


def read_bad(system: str, name: str, make: Callable, folder: Path):
    return READERS[system](put(folder, name, content_of(make))).shape


def read_place(system: str, place: Callable, folder: Path):
    return READERS[system](place(folder)).shape


def is_pipe(folder: Path) -> str:
    os.mkfifo(folder / "a.png")
    return str(folder / "a.png")


def is_folder(folder: Path) -> str:
    (folder / "a.png").mkdir()
    return str(folder / "a.png")


def is_broken_link(folder: Path) -> str:
    (folder / "a.png").symlink_to("nowhere.png")
    return str(folder / "a.png")


def is_circle(folder: Path) -> str:
    (folder / "a.png").symlink_to("a.png")
    return str(folder / "a.png")


PLACES = {
    "missing": (lambda folder: str(folder / "a.png"), "image is missing"),
    "below a file": (lambda folder: put(folder, "b", b"x") + "/a.png", "a.png: "),
    "a pipe": (is_pipe, "is a pipe"),
    "a folder": (is_folder, "is a folder"),
    "a link to nothing": (is_broken_link, "image is missing"),
    "a link to itself": (is_circle, "a.png: "),
    "a device": (lambda folder: "/dev/zero", "is a device"),
    "a name with a zero byte": (lambda folder: str(folder / "a\0.png"), "null byte"),
    "a name of 300 letters": (lambda folder: str(folder / ("a" * 300 + ".png")), "too long"),
}


def list_pictures() -> list[Kind]:
    """Every kind of picture for every reader."""
    found = []
    depth, form = "pictures of any depth", "pictures of any form"
    for system in READERS:
        for sort, kinds in ((depth, DEPTHS), (form, FORMS)):
            for said, what in kinds.items():
                run = functools.partial(read_right, system, *what)
                found.append(Kind(sort, said, system, "", run))
        for sort, kinds in ((depth, REFUSED), ("files that are no picture", NONE)):
            for said, (name, make, right) in kinds.items():
                run = functools.partial(read_bad, system, name, make)
                found.append(Kind(sort, said, system, right, run))
        for said, (place, right) in PLACES.items():
            run = functools.partial(read_place, system, place)
            found.append(Kind("places of a picture", said, system, right, run))
    return found


# ---- class folders


@functools.cache
def noise(number: int) -> bytes:
    """A small picture, no two alike."""
    picture = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
    return saved(picture.repeat(4, 0).repeat(4, 1), "PNG")


def draw(folder: Path, *names: str) -> Path:
    """Pictures of these names below a folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise(number))
    return folder


def sets(folder: Path, count: int = 6, labels=("blast", "healthy"), way="{}/{}.png") -> Path:
    return draw(folder, *(way.format(label, k) for label in labels for k in range(count)))


def split(folder: Path, **counts: int):
    """True if `leaf.split split` finds so many pictures of each class; what it says otherwise."""
    said = ask(split_main, "split", folder)
    data = leaf.load(folder)
    found = Counter(data.classes[s.label] for s in data.samples)
    return (found == counts and leaf.check(folder).ok) or (said, dict(found))


def split_says(folder: Path, *words: str):
    """True if `leaf.split split` writes a table that can be loaded, and says these words."""
    said = ask(split_main, "split", folder)
    leaf.load(folder)
    return all(word in said for word in words) or said


def parts_of(folder: Path, *words) -> dict[str, int]:
    """How many pictures each part has, once `leaf.split split` has run."""
    ask(split_main, "split", folder, *words)
    return {part: sum(count.values()) for part, count in leaf.load(folder).counts().items()}


def doctor(folder: Path, *words: str):
    """True if the doctor finds a set usable and says these words; its first error otherwise."""
    report = leaf.check(folder)
    report.raise_if_bad()
    return all(word in str(report) for word in words) or str(report)


def plain(folder):
    return split(sets(folder), blast=6, healthy=6)


def hidden(folder):
    draw(sets(folder), "blast/.ipynb_checkpoints/0.png", ".ipynb_checkpoints/a.png", ".git/x/1.png",
         "__MACOSX/blast/._0.png")  # fmt: skip
    return split(folder, blast=6, healthy=6)


def deeper(folder):
    sets(folder, 3, way="{}/field1/{}.png")
    draw(folder, "blast/field2/north/9.png", "healthy/field1/8.png")
    return split(folder, blast=4, healthy=4)


def divided(folder, names, way="{part}/{{}}/{{}}.png", **wanted):
    for part, count in names.items():
        sets(folder, count, way=way.format(part=part))
    found = parts_of(folder)
    return found == wanted or found


def unlabelled(folder):
    draw(sets(folder, way="train_images/{}/{}.png"), "test_images/1.png", "test_images/2.png")
    return split_says(folder, "2 picture in test_images") and leaf.load(folder).classes == (
        "blast", "healthy")  # fmt: skip


def beside_classes(folder):
    return split_says(draw(sets(folder), "test_images/1.png"), "1 picture in test_images, no class")


def other_endings(folder):
    sets(folder)
    for name in ("blast/1.HEIC", "blast/2.heic", "healthy/a.gif", "healthy/Thumbs.db", "blast/b"):
        (folder / name).write_bytes(b"x")
    return split_says(folder, "2 .heic", "1 .gif", "1 .db", "1 without ending")


def odd_endings(folder):
    draw(sets(folder, 4), "blast/a.JPE", "blast/b.jfif", "healthy/c.JPG", "healthy/d.Tiff")
    return split(folder, blast=6, healthy=6)


def linked(folder):
    draw(sets(folder / "set"), "healthy/one.png")
    (folder / "set" / "smut").symlink_to(draw(folder / "else", "a.png", "b.png", "c.png"))
    (folder / "set" / "blast" / "one.png").symlink_to(folder / "else" / "d.png")
    draw(folder / "else", "a.png", "b.png", "c.png", "d.png")
    (folder / "set" / "healthy" / "loop").symlink_to(folder / "set")
    return split(folder / "set", blast=7, healthy=7, smut=4)


def broken_link(folder):
    (sets(folder) / "blast" / "one.png").symlink_to("nowhere.png")
    ask(split_main, "split", folder)
    return doctor(folder)


def named(*labels: str, extra=()):
    def run(folder):
        draw(sets(folder, 6, labels), *extra)
        more = Counter(name.split("/")[0] for name in extra)
        return split(folder, **{label: 6 + more[label] for label in labels})

    return run


def with_ids(text, **wanted):
    """A label2id.json of the user's beside the folders; the numbers that must be used."""

    def run(folder):
        (sets(folder) / "label2id.json").write_bytes(text)
        ask(split_main, "split", folder)
        ids = {name: k for k, name in enumerate(leaf.load(folder).classes)}
        return (folder / "label2id.json").read_bytes() == text and ids == wanted

    return run


def no_overwriting(folder):
    (sets(folder) / "id2label.json").write_text('{"0": "rust"}')
    return split(folder)


def existing(folder):
    (sets(folder) / "metadata.csv").write_text("path,label,split\n")
    return split(folder)


def nothing_half_written(folder):
    """A refused split leaves the folder as it was."""
    draw(sets(folder), "blast/caf\udce9.png")
    before = sorted(folder.rglob("*"))
    try:
        ask(split_main, "split", folder)
    except ValueError:
        return sorted(folder.rglob("*")) == before


def elsewhere(folder):
    """A table in another folder names the pictures from there."""
    ask(split_main, "split", sets(folder / "set"), "--output", folder / "out" / "table.csv")
    return len(leaf.load(metadata=folder / "out" / "table.csv").samples) == 12


def grouped(folder):
    """Copies of a photograph stay in one part."""
    sets(folder)
    for k in range(6):
        (folder / "blast" / f"copy{k}.png").write_bytes((folder / "blast/0.png").read_bytes())
    ask(split_main, "split", folder, "--mode", "grouped")
    data = leaf.load(folder)
    return len({s.split for s in data.samples if "copy" in s.id or s.id == "blast/0.png"}) == 1


def few_of_a_class(folder):
    draw(sets(folder), "rust/0.png", "rust/1.png")
    return split_says(folder, "valid has no picture of rust", "all 3 classes")


def told(folder):
    return doctor(sets(folder / "my set"))


def told_of_links(folder):
    (folder / "set").mkdir()
    for label in ("blast", "healthy"):
        (folder / "set" / label).symlink_to(sets(folder / "else") / label)
    return doctor(folder / "set")


CLASS_FOLDERS = {
    "a folder for each class": ("", plain),
    "hidden folders and those of an archive": ("", hidden),
    "fields below the class": ("", deeper),
    "train, valid, test": ("", lambda f: divided(
        f, {"train": 6, "valid": 2, "test": 1}, train=12, valid=4, test=2)),
    "Training, val, test_images": ("", lambda f: divided(
        f, {"Training": 6, "val": 2, "test_images": 1}, train=12, valid=4, test=2)),
    "train and test alone": ("", lambda f: divided(
        f, {"train": 10, "test": 3}, train=18, valid=2, test=6)),
    "train and valid alone": ("", lambda f: divided(
        f, {"train": 6, "valid": 2}, train=12, valid=4, test=0)),
    "a division with fields below the class": ("", lambda f: divided(
        f, {"train": 6, "valid": 2, "test": 1}, "{part}/{{}}/field/{{}}.png",
        train=12, valid=4, test=2)),
    "a division below each class": ("", lambda f: divided(
        f, {"train": 6, "valid": 2, "test": 1}, "{{}}/{part}/{{}}.png",
        train=12, valid=4, test=2)),
    "unlabelled test pictures beside train_images": ("", unlabelled),
    "unlabelled test pictures beside classes": ("", beside_classes),
    "pictures and files of other endings": ("", other_endings),
    "JPE, jfif, capitals": ("", odd_endings),
    "linked folders, files and a circle": ("", linked),
    "a link to nothing": ("image is missing", broken_link),
    "a space before a class": ("", named(" blast", "healthy ")),
    "backslash, comma, quote, line break": ("", named("blast", "healthy", extra=(
        "blast/a\\b.png", 'blast/x;y, "z".png', "healthy/two\nlines.png"))),
    "classes with commas and quotes": ("", named("a, b", '"c"', "d;e")),
    "names in other alphabets": ("", named("稻瘟病", "café", "Müller's", extra=("café/é.png",))),
    "classes called by numbers": ("", named("0", "1", "10")),
    "classes that begin like a formula": ("", named("=1+1", "@x", "-2")),
    "a Latin-1 file": ("is not UTF-8; rename it", lambda f: split(
        draw(sets(f), "blast/caf\udce9.png"))),
    "a Latin-1 class": ("is not UTF-8; rename it", lambda f: split(
        draw(sets(f), "ros\udce9/1.png"))),
    "nothing is written when refused": ("", nothing_half_written),
    "the user's label2id": ("", with_ids(b'{"healthy": 0, "blast": 1}', healthy=0, blast=1)),
    "label2id with a byte-order mark": ("", with_ids(
        b'\xef\xbb\xbf{"healthy": 0, "blast": 1}', healthy=0, blast=1)),
    "label2id with one class more": ("", with_ids(
        b'{"rust": 0, "healthy": 1, "blast": 2}', rust=0, healthy=1, blast=2)),
    "label2id without a class": ("'blast'", with_ids(b'{"healthy": 0}')),
    "label2id that names a class twice": ("twice", with_ids(b'{"blast": 0, "blast": 1}')),
    "label2id turned round": ("numbers are", with_ids(b'{"0": "blast", "1": "healthy"}')),
    "label2id from 1": ("numbers are", with_ids(b'{"blast": 1, "healthy": 2}')),
    "label2id with texts": ("numbers are", with_ids(b'{"blast": "0", "healthy": "1"}')),
    "label2id with truth": ("numbers are", with_ids(b'{"blast": false, "healthy": true}')),
    "label2id as a list": ("holds no class", with_ids(b'["blast", "healthy"]')),
    "label2id that is empty": ("is not JSON", with_ids(b"")),
    "label2id in UTF-16": ("", with_ids('{"blast": 0, "healthy": 1}'.encode("utf-16"),
                                        blast=0, healthy=1)),
    "label2id nested deeply": ("nested too deeply", with_ids(b"[" * 100_000)),
    "id2label that says otherwise": ("says otherwise", no_overwriting),
    "a table that is there": ("exists already", existing),
    "a table elsewhere": ("", elsewhere),
    "copies of one photograph": ("", grouped),
    "a class of two pictures": ("", few_of_a_class),
    "classes that differ by capitals": ("", lambda f: split_says(
        sets(f, labels=("Leaf blast", "leaf_Blast")), "their names look alike")),
    "classes that differ by the way é is written": ("", lambda f: split_says(
        sets(f, labels=("caf\u00e9", "cafe\u0301")), "their names look alike")),
    "one class": ("1 sub-folder(s)", lambda f: split(sets(f, labels=("blast",)))),
    "a folder between": (
        "further down, give /paddy", lambda f: split(sets(f, way="paddy/{}/{}.png"))),
    "HEIC alone": ("1 .heic", lambda f: split(draw(f, "a/1.heic"))),
    "no picture": ("0 sub-folder(s)", lambda f: split(f)),
    "pictures without folders": ("2 picture in no class folder", lambda f: split(
        draw(f, "1.png", "2.png"))),
    "no such folder": ("no such folder", lambda f: split(f / "none")),
    "a file for a folder": ("no such folder", lambda f: split(draw(f, "a.png") / "a.png")),
    "shares above one": ("shares need", lambda f: parts_of(sets(f), "--valid-ratio", "2")),
    "shares that are no number": (
        "shares need", lambda f: parts_of(sets(f), "--test-ratio", "nan")),
    "plain folders, asked of the doctor": ("leansense.leaf.split split", told),
    "linked folders, asked of the doctor": ("leansense.leaf.split split", told_of_links),
    "a name of 5000 letters, asked of the doctor": (
        "File name too long; give another", lambda f: ask(check_main, "leaf", f / ("a" * 5000))),
}  # fmt: skip


# ---- tables


IDS = b'{"blast": 0, "healthy": 1}'
NOTED = "path,label,split,note"
ROWS = [f"{c}/{k}.png,{c},{p}" for c in ("blast", "healthy")
        for k, p in enumerate(("train", "train", "valid", "test"))]  # fmt: skip


def listed(folder: Path, *rows: str, header="path,label,split", ids=IDS, join="\n", code="utf-8"):
    """Eight pictures, four of each class, and a table of them; `rows` come behind its own."""
    sets(folder, 4)
    (folder / "metadata.csv").write_bytes((join.join([header, *ROWS, *rows]) + join).encode(code))
    if ids is not None:
        (folder / "label2id.json").write_bytes(ids)
    return folder


def loads(folder: Path, count: int = 8):
    """True if the doctor is content and so many samples are read, each with its own label."""
    data = leaf.load(folder)
    leaf.check(folder).raise_if_bad()
    right = all(data.classes[s.label] in s.id and os.path.isfile(s.path) for s in data.samples)
    return (len(data.samples) == count and right) or (len(data.samples), data.samples)


def rewritten(change: Callable[[bytes], bytes]):
    def run(folder):
        path = listed(folder) / "metadata.csv"
        path.write_bytes(change(path.read_bytes()))
        return loads(folder)

    return run


def more_columns(folder):
    wide = [",".join(["id", "path", "split", "note", "label"])]
    for k, row in enumerate(ROWS):
        path, label, part = row.split(",")
        wide.append(f'{k},{path},{part},"a, b",{label}')
    (listed(folder) / "metadata.csv").write_text("\n".join(wide))
    return loads(folder)


def spaced(folder):
    """Cells with the spaces that people put behind commas."""
    path = listed(folder) / "metadata.csv"
    path.write_text(path.read_text().replace(",", " , "))
    return loads(folder)


def windows(folder):
    path = listed(folder) / "metadata.csv"
    path.write_text(path.read_text().replace("/", "\\").replace("\n", "\r\n"))
    return loads(folder)


def outside(folder):
    draw(folder / "else", "blast.png")
    here = listed(folder / "set", "../else/blast.png,blast,train")
    return doctor(here, "1 of the files that are read lie outside") and loads(here, 9)


def absolute(folder):
    draw(folder / "else", "blast.png")
    here = listed(folder / "set", f"{folder}/else/blast.png,blast,train")
    return doctor(here, "1 of the files that are read lie outside") and loads(here, 9)


def without_valid(folder):
    path = listed(folder, *("healthy/0.png,healthy,train",)) / "metadata.csv"
    path.write_text(path.read_text().replace("blast/2.png,blast,valid", "blast/2.png,blast,train"))
    return doctor(folder, "valid has no picture of blast", "all 2 classes")


def repeated(folder):
    return doctor(listed(folder, ROWS[0]), "is listed 2 times")


def damaged(folder):
    (listed(folder) / "blast" / "0.png").write_bytes(b"x")
    return doctor(folder)


def kaggle(folder, header="image_id,label,variety,age", bad="", start=""):
    sets(folder, 6, way="train_images/{}/{}.png")
    rows = [f"{k}.png,{label},ADT45,45" for label in ("blast", "healthy") for k in range(6)]
    text = "\n".join([start + header, *rows, *filter(None, [bad])])
    (folder / "train.csv").write_text(text, encoding="utf-8")
    return loads(folder, 12)


def far_away(folder):
    """Table and class list in places of their own."""
    listed(folder / "set")
    (folder / "set" / "label2id.json").rename(folder / "ids.json")
    data = leaf.load(metadata=folder / "set" / "metadata.csv", label2id=folder / "ids.json")
    return len(data.samples) == 8


def many_classes(folder):
    """One line, not two thousand."""
    ids = {"blast": 0, "healthy": 1} | {f"class {k}": k + 2 for k in range(2000)}
    report = leaf.check(listed(folder, ids=json.dumps(ids).encode()))
    named = "2000 classes" in str(report) and "have no training picture" in str(report)
    return (report.ok and named and len(str(report)) < 12_000) or str(report)


def piped(folder):
    (listed(folder) / "metadata.csv").unlink()
    os.mkfifo(folder / "metadata.csv")
    return loads(folder)


def wide(folder):
    header = "path,label,split," + ",".join(f"c{k}" for k in range(10**6))
    return loads(listed(folder, header=header))


TABLES = {
    "a table": ("", lambda f: loads(listed(f))),
    "a byte-order mark": ("", lambda f: loads(listed(f, code="utf-8-sig"))),
    "CRLF": ("", lambda f: loads(listed(f, join="\r\n"))),
    "CR alone": ("", lambda f: loads(listed(f, join="\r"))),
    "semicolons": ("", rewritten(lambda b: b.replace(b",", b";"))),
    "semicolons and a byte-order mark": (
        "", rewritten(lambda b: b"\xef\xbb\xbf" + b.replace(b",", b";"))),
    "blank lines": ("", lambda f: loads(listed(f, "", " , ,", "", ""))),
    "every cell in quotes": ("", rewritten(
        lambda b: b'"' + b.strip().replace(b",", b'","').replace(b"\n", b'"\n"') + b'"\n')),
    "commas behind the last column": ("", rewritten(lambda b: b.replace(b"\n", b",,,\n"))),
    "more columns, in another order": ("", more_columns),
    "spaces around every cell": ("", spaced),
    "backslashes of Windows": ("", windows),
    "./ and // in paths": ("", rewritten(
        lambda b: b.replace(b"blast/0", b"./blast/0").replace(b"blast/1", b"blast//1"))),
    ".. in a path": ("", outside),
    "an absolute path": ("", absolute),
    "table and class list apart": ("", far_away),
    "a class absent from validation": ("", without_valid),
    "a row twice": ("", repeated),
    "a picture under two labels": (
        "is listed 2 times", lambda f: loads(listed(f, "blast/0.png,healthy,train"))),
    "a picture in two parts": (
        "is listed 2 times", lambda f: loads(listed(f, "./blast/0.png,blast,test"))),
    "tabs": ("", rewritten(lambda b: b.replace(b",", b"\t"))),
    "a quote within a cell": (
        "", lambda f: loads(listed(f, 'healthy/0.png,healthy,train,5" wide', header=NOTED), 9)),
    "a line sep=; for Excel": (
        "", rewritten(lambda b: b"sep=;\r\n" + b.replace(b",", b";").replace(b"\n", b"\r\n"))),
    "2000 classes without a picture": ("", many_classes),
    "1000 unknown labels": ("and 20 more problems", lambda f: loads(listed(
        f, *[f"blast/0.png,rust{k},train" for k in range(1000)]))),
    "a label of 100,000 letters": (
        "is not in label2id.json", lambda f: loads(listed(f, f"a.png,{'r' * 100_000},train"))),
    "a label with a terminal's code": (
        "'\\x1b[31mred'", lambda f: loads(listed(f, "a.png,\x1b[31mred,train"))),
    "an address for a path": (
        "image is missing", lambda f: loads(listed(f, "http://x/y.png,blast,train"))),
    "UTF-16": ("not UTF-8", lambda f: loads(listed(f, code="utf-16"))),
    "Latin-1": ("not UTF-8", lambda f: loads(listed(f, "é.png,blast,train", code="latin-1"))),
    "a packed file": ("not UTF-8", rewritten(lambda b: b"\x1f\x8b" + zlib.compress(b))),
    "a column twice": ("two columns 'label'", rewritten(
        lambda b: b.replace(b"\n", b",rust\n").replace(b"split,rust", b"split,label"))),
    "10^6 columns": ("columns, more than", wide),
    "a zero byte": ("image is missing", rewritten(lambda b: b.replace(b"blast/0", b"bl\0ast/0"))),
    "an empty file": ("it is empty", rewritten(lambda b: b"")),
    "a header alone": ("holds no rows", rewritten(lambda b: b"path,label,split\n")),
    "no header": ("missing column", rewritten(lambda b: b.partition(b"\n")[2])),
    "a header in capitals": ("missing column", rewritten(lambda b: b.replace(b"path", b"Path"))),
    "an unknown label": (
        "'rust' is not in label2id.json", lambda f: loads(listed(f, "blast/0.png,rust,train"))),
    "a label in capitals": (
        "nearest is 'blast'", lambda f: loads(listed(f, "blast/0.png,Blast,train"))),
    "an unknown part": (
        "split 'vaild' is not one of", lambda f: loads(listed(f, "blast/0.png,blast,vaild"))),
    "10^4 unknown labels": (
        "10000 rows", lambda f: loads(listed(f, *["blast/0.png,rust,train"] * 10_000))),
    "an empty cell": (
        "path, label or split is empty", lambda f: loads(listed(f, "blast/0.png,,train"))),
    "a short row": (
        "path, label or split is empty", lambda f: loads(listed(f, "blast/0.png"))),
    "a row with a cell too many": (
        "cells", lambda f: loads(listed(f, "blast/0.png,blast,train,rust"))),
    "a quote that never ends": (
        "is not CSV", lambda f: loads(listed(f, "", header='path,label,split,"note'))),
    "a cell of 200,000 letters": (
        "is not CSV", lambda f: loads(listed(f, "a" * 200_000 + ",blast,train"))),
    "a missing picture": (
        "image is missing", lambda f: loads(listed(f, "blast/9.png,blast,train"))),
    "a folder for a picture": (
        "image is a folder", lambda f: loads(listed(f, "blast,blast,train"))),
    "a device for a picture": (
        "image is a device", lambda f: loads(listed(f, "/dev/zero,blast,train"))),
    "a class without a name": (
        "names a class ''", lambda f: loads(listed(f, ids=b'{"blast": 0, "": 1, "healthy": 2}'))),
    "a damaged picture": ("is none of JPEG", damaged),
    "no table": ("metadata file not found", loads),
    "a pipe for a table": ("metadata.csv: ", piped),
    "no class list": ("label2id file not found", lambda f: loads(listed(f, ids=None))),
    "a class list that is no JSON": ("is not JSON", lambda f: loads(listed(f, ids=b"blast 0"))),
    "a class list with a gap": (
        "the numbers are", lambda f: loads(listed(f, ids=b'{"blast": 0, "healthy": 2}'))),
    "no row of a part": ("no row with split 'valid'", rewritten(
        lambda b: b"\n".join(r for r in b.split(b"\n") if b"valid" not in r))),
    "Kaggle's table": ("", kaggle),
    "Kaggle's table with a byte-order mark": ("", lambda f: kaggle(f, start="\ufeff")),
    "Kaggle's table with a missing picture": (
        "image is missing", lambda f: kaggle(f, bad="99.png,blast,ADT45,45")),
    "Kaggle's table with an empty label": (
        "is empty", lambda f: kaggle(f, bad="1.png,,ADT45,45")),
    "Kaggle's table without labels": (
        "missing column", lambda f: kaggle(f, "image_id,class,variety,age")),
}  # fmt: skip


# ---- predictions


@functools.cache
def checkpoint() -> str:
    """A network that has learned nothing, of two classes."""
    path = Path(tempfile.mkdtemp(prefix="kinds-")) / "none_best.pt"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    meta = {"label2id": {"blast": 0, "healthy": 1}, "image_size": 32, "temperature": 1.0,
            "unsure_below": 0.0}  # fmt: skip
    save_checkpoint(path, build("vanilla", 2).eval(), meta)
    return str(path)


def predict(folder: Path, *places: str, status: int = 0):
    """(label or error) of each answer that `leaf.use predict` writes, by the file's name."""
    out = folder / "answers.json"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = use.main(["predict", checkpoint(), *map(str, places), "--out", str(out)])
    if found != status:
        raise Said(said.getvalue().strip())
    return [
        (Path(a["path"]).name, a.get("label") or a["error"]) for a in json.loads(out.read_text())
    ]


def one_bad(content: bytes, name: str = "bad.jpg", words: str = "bad.jpg: "):
    """The others are answered, and the bad one has its line."""

    def run(folder):
        draw(folder / "set", "a.png", "b.png")
        (folder / "set" / name).write_bytes(content)
        found = dict(predict(folder, folder / "set", status=1))
        good = {found.pop(k) for k in ("a.png", "b.png")} <= {"blast", "healthy"}
        return (good and words in found[name] and "\n" not in found[name]) or found

    return run


def named_right(*names: str):
    def run(folder):
        found = predict(folder, draw(folder / "set", *names))
        return sorted(k for k, _ in found) == sorted(Path(n).name for n in names) or found

    return run


def several(folder):
    draw(folder, "set/a.png", "b.png")
    found = predict(folder, folder / "set", folder / "b.png", folder / "none.png", status=1)
    return [k for k, _ in found] == ["a.png", "b.png", "none.png"] or found


def linked_pictures(folder):
    (folder / "set").mkdir()
    (folder / "set" / "more").symlink_to(draw(folder / "else", "a.png", "b.png"))
    (folder / "set" / "c.png").symlink_to(folder / "else" / "a.png")
    (folder / "set" / "loop").symlink_to(folder / "set")
    found = sorted(k for k, _ in predict(folder, folder / "set"))
    return found == ["a.png", "b.png", "c.png"] or found


def left_out(folder):
    """What is no picture by its ending is counted, not forgotten."""
    draw(folder / "set", "a.png", "b.HEIC", "c.heic")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        use.main(["predict", checkpoint(), str(folder / "set")])
    return "2 .heic" in said.getvalue() or said.getvalue()


def no_place(folder):
    draw(folder, "a.png")
    return ask(use.main, "predict", checkpoint(), folder / "a.png", "--out", folder / "a.png" / "b")


def spared(picture: Path, place: Path):
    """The line, if the picture is still there after the command."""
    try:
        return ask(use.main, "predict", checkpoint(), place, "--out", picture)
    finally:
        assert picture.read_bytes() == noise(0)


PREDICTIONS = {
    "pictures in folders": ("", named_right("a.png", "b/c.JPE", "b/d.jfif")),
    "hidden ones": ("", lambda f: [k for k, _ in predict(f, draw(
        f / "set", "a.png", ".b.png", ".ipynb_checkpoints/a.png"))] == ["a.png"]),
    "Latin-1, spaces, line breaks": (
        "", named_right("caf\udce9.png", " a.png", "b\nc.png", "é.png")),
    "several places, one of them missing": ("", several),
    "one file twice": ("", lambda f: len(predict(f, draw(f, "a.png") / "a.png", f / "a.png")) == 1),
    "linked folders and files": ("", linked_pictures),
    "HEIC beside pictures": ("", left_out),
    "one that is cut short": ("", one_bad(half(noise(3)))),
    "one that is text": ("", one_bad(b"hello")),
    "one that is empty": ("", one_bad(b"")),
    "one that starts Ghostscript": ("", one_bad(EPS)),
    "one of 65500 x 1": ("", one_bad(png((65500, 1), 1, 0, bytes(8189)))),
    "one of 12 bits": ("", one_bad(deep(4095), words="declares no range")),
    "a bad one in Latin-1": ("", one_bad(b"x", "caf\udce9.jpg", "is none of")),
    "nothing there": ("no picture there", lambda f: predict(f, f / "none")),
    "a folder without pictures": ("no picture there", lambda f: predict(f, f)),
    "a place below a file for the answers": (
        "a file stands where a folder is needed", no_place),
    "answers in the place of a picture": (
        "would be overwritten", lambda f: spared(draw(f, "a.png") / "a.png", f)),
    "answers in the place of a picture of a folder": (
        "would be overwritten", lambda f: spared(draw(f, "set/a.png") / "set/a.png", f / "set")),
    "no checkpoint": ("no such checkpoint", lambda f: ask(
        use.main, "predict", f / "none.pt", draw(f, "a.png"))),
    "a picture for a checkpoint": ("a.png", lambda f: ask(
        use.main, "predict", draw(f, "a.png") / "a.png", f / "a.png")),
}  # fmt: skip


def large(folder):
    """A photograph of 192 megapixels, which a telephone writes: read at half its size."""
    picture = Image.fromarray(RAMP).resize((16000, 12000), Image.Resampling.NEAREST)
    picture.save(folder / "a.jpg", quality=30)
    found = prepare_leaf(folder / "a.jpg", SIDE)
    inner = found[SIDE // 8 : -SIDE // 8]  # the rest is padding
    wanted = np.repeat(RAMP[:1, :, None], 3, 2)
    return found.shape == (SIDE, SIDE, 3) and bool(np.abs(inner - 1.0 * wanted).mean() < 3)


def list_rest() -> list[Kind]:
    """The kinds of leaf's folders, tables and predictions."""
    parts = (("class folders", CLASS_FOLDERS), ("tables of pictures", TABLES),
             ("predictions", PREDICTIONS))  # fmt: skip
    found = [Kind(sort, said, "leaf", right, run)
             for sort, kinds in parts for said, (right, run) in kinds.items()]  # fmt: skip
    return [Kind("pictures of any form", "192 megapixels", "leaf", "", large), *found]


KINDS = list_pictures() + list_rest()
