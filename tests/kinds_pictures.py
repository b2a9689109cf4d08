"""Kinds of pictures, for each of the five readers of one, and of class folders and tables."""

import functools
import io
import itertools
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from kinds import Kind
from leansense.beam.data import prepare_image
from leansense.leaf.data import prepare as prepare_leaf
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
    """A PNG file, byte by byte; `colour`: 0 grey, 2 RGB, 3 palette, 6 RGBA; `laced`: 1 in seven passes."""
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
    kind = 3 if array.dtype.kind == "f" else 1
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


def bomb(name: bytes) -> bytes:
    """A PNG with a compressed chunk that unpacks to 200 MB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
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


def cmyk(turn: int = 0) -> bytes:
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
    "a PNG without pixels": ("a.png", lambda: png((64, 64), 8, 2), "image cannot be decoded"),
    "a PNG of no size": ("a.png", lambda: png((0, 64), 8, 2), "image "),
    "a strip of 65500 x 1": (
        "a.png", lambda: png((65500, 1), 1, 0, bytes(8189)), "one side more than 100 times"),
    "a header that claims 10^9 pixels": (
        "a.png", lambda: png((32000, 32000), 8, 2), "megapixels that are read"),
    "a header that claims 10^8 pixels": (
        "a.png", lambda: png((10000, 10000), 8, 2), "bytes cannot hold"),
    "a colour profile that unpacks to 200 MB": ("a.png", lambda: bomb(b"iCCP"), "too large"),
    "a comment that unpacks to 200 MB": ("a.png", lambda: bomb(b"zTXt"), "too large"),
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
    for system in READERS:
        for sort, kinds in (("pictures of any depth", DEPTHS), ("pictures of any form", FORMS)):
            found += [Kind(sort, said, system, "", functools.partial(read_right, system, *what))
                      for said, what in kinds.items()]  # fmt: skip
        for sort, kinds in (("pictures of any depth", REFUSED), ("files that are no picture", NONE)):
            found += [Kind(sort, said, system, right, functools.partial(read_bad, system, name, make))
                      for said, (name, make, right) in kinds.items()]  # fmt: skip
        for said, (make, right) in PLACES.items():
            read = READERS[system]
            found.append(Kind("places of a picture", said, system, right,
                              lambda folder, make=make, read=read: read(make(folder)).shape))  # fmt: skip
    return found


KINDS = list_pictures()
