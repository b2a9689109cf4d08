"""Kinds of scenes from outside: what the doctor says of each must be what training meets."""

import atexit
import csv
import functools
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from kinds import Kind
from leansense.beam import data as beam
from leansense.beam import features, positions
from leansense.beam import layouts as windows
from leansense.beam.standin import make_row, name_files
from leansense.openvocab import data as openvocab
from leansense.openvocab.text import PretrainedText, write_random_encoder
from leansense.simbev import data as simbev
from leansense.simbev.layouts import CAMERAS
from leansense.simbev.overlap import read_depth, read_points
from leansense.simbev.standin import _describe_sensors, describe_rig
from leansense.world.camera import simbev_rig
from leansense.xad import data as xad
from leansense.xad import frame as real
from leansense.xad.frames import read_scan as xad_scan
from leansense.xad.labels import read_names
from leansense.xad.standin import standin as draw_moments

KINDS: list[Kind] = []
DEEP = "[" * 100_000
COLOURS = [(30 + 35 * k, 220 - 30 * k, 20 + 60 * (k % 4)) for k in range(6)]


def same(check: Callable, load: Callable, folder: Path):
    """What training reads in a folder; RuntimeError where the doctor says something else."""
    report = check(folder)
    try:
        found = load(folder)
    except (ValueError, OSError) as error:
        if report.ok:
            raise RuntimeError(f"the doctor says ok, and training: {error}") from None
        raise
    if not report.ok:
        raise RuntimeError(f"the doctor refuses what training reads: {report.errors[0]}")
    return found, report


def save(path: Path, content) -> Path:
    """Write a file, its folder made when missing: bytes, text, a picture or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, "PNG")
    else:
        path.write_text(json.dumps(content))
    return path


def change(path: Path, edit: Callable) -> None:
    """Rewrite a JSON file after edit(content)."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def pipe(path: Path) -> None:
    """A named pipe in the place of a file: who opens it waits."""
    path.unlink()
    os.mkfifo(path)


def swap(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


def npy(shape: tuple, descr: str = "<f4", data: bytes = b"") -> bytes:
    """An npy file whose header says more than there is."""
    header = str({"descr": descr, "fortran_order": False, "shape": shape}) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def npz(**arrays) -> bytes:
    """An npz file of arrays."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


# ---- SimBEV: six plain pictures, a camera's colour in each; a rectangle of 10 m x 5 m is a car

RIG = simbev_rig(56, 120)
WANTED = np.zeros((200, 200), bool)
WANTED[120:140, 90:100] = True  # x from 10 to 20 m, y from -5 to 0, cells of 0.5 m
WORDS = ("train", "val", "test")


def label(res: float = 0.5, side: int = 200) -> np.ndarray:
    """The car on (8, side, side) cells of `res` metres, axes as stored."""
    at = (np.arange(side) + 0.5 - side / 2) * res
    inside = ((at > 10) & (at < 20))[:, None] & ((at > -5) & (at < 0))[None]
    return np.stack([inside & (k == 1) for k in range(8)])[:, ::-1, ::-1]


def picture(k: int) -> np.ndarray:
    return np.full((56, 120, 3), COLOURS[k], np.uint8)


@functools.cache
def drawn(make: Callable, *arguments) -> Path:
    """A folder that make(folder, ...) filled, once in a process; to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="kinds-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder, *arguments)
    return folder


def copy(folder: Path, make: Callable, *arguments) -> Path:
    """A copy of what `make` draws, below `folder`/set."""
    return Path(shutil.copytree(drawn(make, *arguments), folder / "set"))


def plain(folder: Path, layout: str, res: float = 0.5, side: int = 200) -> Path:
    """A sound set of three scenes of one frame in a layout, below `folder`/set."""
    return copy(folder, draw_plain, layout, res, side)


def draw_plain(root: Path, layout: str, res: float, side: int) -> None:
    """The files of `plain`."""
    infos, metas = {}, {}
    for number, word in enumerate(WORDS):
        scene, stem = f"scene_{number:04d}", f"f{number}"
        names = [f"sweeps/RGB-CAM_{c.upper()}/{stem}-RGB-CAM_{c.upper()}.jpg" for c in CAMERAS]
        seen = npz(data=label(res, side), bev=label())
        if layout == "native":
            for k, name in enumerate(names):
                save(root / name, picture(k))
            save(root / f"ground-truth/seg/{stem}-GT_SEG.npz", seen)
            config = f"configs/{scene}.yaml"
            save(root / config, f"# bev_res: 9\nmap: x\nbev_dim: {side}\nbev_res: {res}  # m\n")
            entry = {f"RGB-CAM_{c.upper()}": f"/d/{n}" for c, n in zip(CAMERAS, names)}
            entry |= {"frame": 0, "GT_SEG": f"/d/ground-truth/seg/{stem}-GT_SEG.npz"}
            about = {"scene_info": {"config": f"/d/{config}"}, "scene_data": [entry]}
            infos[word] = {"metadata": _describe_sensors(RIG), "data": {scene: about}}
            continue
        top = root / word / scene / "yaw0pitch0"
        top = top if layout == "published" else root / "SimBEV_cvt_label" / scene / "yaw0pitch0"
        place = top if layout == "published" else root
        if layout == "published":
            names = [f"images/{c}_{number}.jpg" for c in CAMERAS]
        for k, name in enumerate(names):
            save(place / name, picture(k))
        save(top / "bev.npz", seen)
        key = "label" if layout == "published" else "bev"
        metas[top] = [{"token": stem, "images": names, key: "bev.npz"} | describe_rig(RIG)]
    for word, content in infos.items():
        save(root / f"infos/simbev_infos_{word}.json", content)
    for top, content in metas.items():
        save(top / "meta.json", content)


def frames_of(folder: Path):
    """All frames as training reads them: data, items."""
    data = simbev.load(folder)
    items = []
    for split, count in data.counts().items():
        if count:
            part = simbev.SimBEVDataset(data, split, augment="none", size=(56, 120), final=(48, 96))
            items += [(part, part[k]) for k in range(count)]
    return data, items


def right_frames(found, count: int = 3, k=None) -> bool:
    """Whether pictures, matrices and the car are those that were put in."""
    data, items = found
    k = RIG.K if k is None else k
    good = len(data.frames) == len(items) == count
    for frame in data.frames:
        good &= np.allclose(frame.intrinsics, k) and np.allclose(frame.extrinsics, RIG.extrinsics)
    for number, (part, item) in enumerate(items):
        rows = part.rows[number if len(part) > 1 else 0]
        shown = [part.array[row].mean((0, 1)) for row in rows]
        good &= np.abs(np.array(shown) - COLOURS).max() < 4
        good &= np.array_equal(item["target"].numpy()[0] > 0, WANTED)
    return bool(good)


def drive(
    said, right="", edit=None, layout="native", sort="SimBEV infos", look=right_frames, **made
):
    """A kind of SimBEV set: a sound one after edit(root)."""

    def run(folder: Path):
        root = plain(folder, layout, **made)
        edit and edit(root)
        found, report = same(simbev.check, frames_of, root)
        return (
            look(found)
            if look.__code__.co_argcount < 3 or look is right_frames
            else (look(found, report, root))
        )

    KINDS.append(Kind(sort, said, "simbev", right, run))


def first(root: Path) -> Path:
    return root / "infos/simbev_infos_train.json"


def scene(edit: Callable) -> Callable:
    """edit(the training scene)"""
    return lambda root: change(first(root), lambda i: edit(i["data"]["scene_0000"]))


def entry(edit: Callable) -> Callable:
    """edit(the frame of the training scene)"""
    return scene(lambda s: edit(s["scene_data"][0]))


def metadata(edit: Callable) -> Callable:
    """edit(the metadata of the training infos)"""
    return lambda root: change(first(root), lambda i: edit(i["metadata"]))


def config(text: str) -> Callable:
    """Another config of the training scene."""
    return lambda root: save(root / "configs/scene_0000.yaml", text)


def entries_of(root: Path):
    """Each infos file with all its frames."""
    for path in (root / "infos").iterdir():
        yield path, json.loads(path.read_text())


def each_entry(edit: Callable) -> Callable:
    """edit(frame) of every frame of every part."""

    def every(root: Path):
        for path, infos in entries_of(root):
            for part in infos["data"].values():
                for one in part["scene_data"]:
                    edit(one)
            path.write_text(json.dumps(infos))

    return every


for res, side in ((0.125, 800), (0.25, 400), (0.5, 220)):
    drive(f"cells of {res:g} m by the config", res=res, side=side)
drive("a config whose cell is quoted", edit=config("bev_res: '0.5'\nbev_dim: \"200\"\n"))
drive("a config with one size twice, alike", edit=config("a: {bev_res: 0.5}\nb: {bev_res: 0.50}\n"))
for value in (True, 10**400, None, [0.5, 1], {"m": 0.5}):
    drive(
        f"a config within the infos with {json.dumps(value)[:12]}",
        "bev_res is",
        scene(lambda s, v=value: s["scene_info"].update(config={"bev_res": v})),
    )
drive("a config in flow style", edit=config("{map: x, bev_res: 0.5, bev_dim: 200}\n"))
drive("a config with its sizes further down", edit=config("a:\n  bev:\n    bev_res: 0.5\n"))
drive(
    "a config as JSON within the infos",
    edit=scene(lambda s: s["scene_info"].update(config={"bev_res": 0.5, "bev_dim": 200})),
)
drive("a config with Windows line ends", edit=config("bev_dim: 200\r\nbev_res: 0.5\r\n"))
drive("a config with a byte-order mark", edit=config("\ufeffbev_res: 0.5\n"))
drive(
    "a config of another number of cells",
    "200 cells a side, not 300",
    config("bev_res: 0.5\nbev_dim: 300\n"),
)
drive(
    "a config that says two cell sizes", "bev_res", config("a: {bev_res: 0.5}\nb: {bev_res: 1}\n")
)
drive("a config with a cell of 0 m", "bev_res is", config("bev_res: 0\n"))
drive("a config with a cell of .nan m", "bev_res is", config("bev_res: .nan\n"))
drive("a config with a cell in words", "bev_res is", config("bev_res: half a metre\n"))
drive("a config with 200.5 cells", "bev_dim is", config("bev_dim: 200.5\nbev_res: 0.5\n"))
drive("a config that is no YAML", "configs/scene_0000.yaml", config("a: [bev_res: 0.5\n"))
drive(
    "a config that is an alias bomb",
    "configs/scene_0000.yaml",
    config(
        "x: {bev_res: 0.5}\na: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")
        )
    ),
)
drive("a config that is a pipe", "is a pipe", lambda root: pipe(root / "configs/scene_0000.yaml"))


def declared(found, report, root) -> bool:
    """Without a config, the size that the user declares is taken, and without one it is said."""
    data = simbev.load(root, resolution=0.5)
    return "configs/scene_0000.yaml" in str(report) and {f.resolution for f in data.frames} == {0.5}


def no_config(root: Path) -> None:
    shutil.rmtree(root / "configs")


def assumed(found, report, root) -> bool:
    said = str(report)
    return right_frames(found) and "label cells are taken as 0.4 m" in said


drive(
    "no config, cells of 0.4 m",
    edit=no_config,
    look=lambda f, r, root: (
        "label cells are taken as 0.4 m" in str(r) and "its config is not there" in str(r)
    ),
    res=0.4,
    side=360,
)


def say_half(folder: Path):
    """A declared cell size: refused where the config says another one."""
    root = plain(folder, "native", 0.25, 400)
    return simbev.load(root, resolution=0.5)


KINDS.append(
    Kind(
        "SimBEV infos",
        "a declared cell size that the config denies",
        "simbev",
        "data_resolution=0.5",
        say_half,
    )
)


def say_right(folder: Path):
    """A declared cell size where no config is."""
    root = plain(folder, "native", 0.25, 400)
    no_config(root)
    data = simbev.load(root, resolution=0.25)
    part = simbev.SimBEVDataset(data, "train", augment="none", size=(56, 120), final=(48, 96))
    return np.array_equal(part[0]["target"].numpy()[0] > 0, WANTED)


KINDS.append(Kind("SimBEV infos", "a declared cell size without a config", "simbev", "", say_right))

for value, what in (
    (None, "null"),
    ("0012a", "text"),
    (float("nan"), "NaN"),
    ([1], "a list"),
    (-1, "negative"),
    (1.5, "half"),
    (True, "true"),
    ({}, "an object"),
):
    drive(f"frame number: {what}", "frame is", entry(lambda e, v=value: e.update(frame=v)))
drive("frame number: missing", "frame is missing", entry(lambda e: e.pop("frame")))
drive("a frame twice", "occurs twice", scene(lambda s: s["scene_data"].append(s["scene_data"][0])))
for value in (None, 1.5, "x", {}, [], [None], [[]]):
    drive(
        f"scene_data is {json.dumps(value)}",
        "scene_0000",
        scene(lambda s, v=value: s.update(scene_data=v)),
    )
drive(
    "a scene that is a number",
    "scene_0000",
    lambda root: change(first(root), lambda i: i["data"].update(scene_0000=7)),
)
for value in (None, 3, "x", [], [1]):
    drive(
        f"data is {json.dumps(value)}",
        "missing data of scenes",
        lambda root, v=value: change(first(root), lambda i: i.update(data=v)),
    )
    drive(
        f"metadata is {json.dumps(value)}",
        "missing metadata",
        lambda root, v=value: change(first(root), lambda i: i.update(metadata=v)),
    )
for value in (5, "text", [1, 2], True):
    drive(
        f"a camera's metadata is {json.dumps(value)}",
        "CAM_FRONT",
        metadata(lambda m, v=value: m.update(CAM_FRONT=v)),
    )
    drive(
        f"scene_info is {json.dumps(value)}",
        edit=scene(lambda s, v=value: s.update(scene_info=v)),
        look=lambda f, r, root: "no config says bev_res" in str(r),
        res=0.4,
        side=360,
    )
for value in ("matrix", [[1, 2], [3]], None, [[[1] * 3] * 3] * 6, {"a": 1}, [[1e999] * 3] * 3):
    drive(
        f"camera_intrinsics is {json.dumps(value)[:24]}",
        "camera_intrinsics",
        metadata(lambda m, v=value: m.update(camera_intrinsics=v)),
    )
drive(
    "K with NaN",
    "holds NaN",
    metadata(lambda m: m["camera_intrinsics"][0].__setitem__(0, float("nan"))),
)
drive(
    "K with numbers of 400 digits",
    "camera_intrinsics",
    metadata(lambda m: m["camera_intrinsics"][0].__setitem__(0, 10**400)),
)
drive(
    "K for other pictures",
    "principal point",
    metadata(lambda m: m.update(camera_intrinsics=[[800, 0, 800], [0, 800, 450], [0, 0, 1]])),
)
for name, value in (
    ("zero", [0, 0, 0, 0]),
    ("NaN", [float("nan"), 0, 0, 0]),
    ("of three", [1, 0, 0]),
    ("in words", "w x y z"),
):
    drive(
        f"a camera's quaternion: {name}",
        "CAM_FRONT",
        metadata(lambda m, v=value: m["CAM_FRONT"].update(sensor2ego_rotation=v)),
    )


def turned(folder: Path):
    """Cameras that look to another side than their names say: the doctor asks what they see."""
    root = plain(folder, "native")
    metadata(lambda m: m.update(CAM_FRONT=m["CAM_BACK"], CAM_BACK=m["CAM_FRONT"]))(root)
    simbev.check(root).raise_if_bad()


KINDS.append(
    Kind("SimBEV infos", "cameras that look to another side", "simbev", "looks 180 degrees", turned)
)


def by_name(k_back: float = 0.64, names=CAMERAS, gone: bool = False) -> Callable:
    """A K for each camera; that of the back one has another focal length."""

    def edit(root: Path):
        for path, infos in entries_of(root):
            meta = infos["metadata"]
            found = {f"CAM_{c.upper()}": np.array(meta["camera_intrinsics"]) for c in names}
            found["CAM_BACK"][0, 0] *= k_back
            meta["camera_intrinsics_by_name"] = {n: k.tolist() for n, k in found.items()}
            if gone:
                del meta["camera_intrinsics"]
            path.write_text(json.dumps(infos))

    return edit


OWN = RIG.K.copy()
OWN[4, 0, 0] *= 0.64
for gone in (False, True):
    drive(
        f"K by camera's name{', no common one' * gone}",
        edit=by_name(gone=gone),
        look=lambda f, r, root: right_frames(f, k=OWN),
    )
drive("K by camera's name, five of six", "none of CAM_FRONT_LEFT", by_name(names=CAMERAS[1:]))
for value in ([1], "x", 5):
    drive(
        f"K by camera's name is {json.dumps(value)}",
        "intrinsics by name",
        metadata(lambda m, v=value: m.update(camera_intrinsics_by_name=v)),
    )
drive(
    "distortion that is not read",
    "geometry that is not read",
    metadata(lambda m: m["CAM_FRONT"].update(distortion=[0.1, 0.2])),
)
drive(
    "a 5-camera rig",
    "its cameras are RGB-CAM_BACK_LEFT, RGB-CAM_BACK_RIGHT, RGB-CAM_FRONT,",
    each_entry(lambda e: e.pop("RGB-CAM_BACK")),
)
drive(
    "a 1-camera rig",
    "its cameras are RGB-CAM_FRONT",
    each_entry(lambda e: [e.pop(f"RGB-CAM_{c.upper()}") for c in CAMERAS if c != "front"]),
)


def twelve(root: Path) -> None:
    """Six more cameras, named to sort before the others, with pictures of another colour."""
    save(root / "sweeps/RGB-CAM_A/a-RGB-CAM_A.jpg", np.full((56, 120, 3), 255, np.uint8))
    more = {f"RGB-CAM_A{c.upper()}": "/d/sweeps/RGB-CAM_A/a-RGB-CAM_A.jpg" for c in CAMERAS}
    for path, infos in entries_of(root):
        for about in infos["data"].values():
            about["scene_data"] = [more | e for e in about["scene_data"]]
        infos["metadata"] = {
            f"CAM_A{c.upper()}": infos["metadata"]["CAM_BACK"] for c in CAMERAS
        } | infos["metadata"]
        path.write_text(json.dumps(infos))


drive(
    "a 12-camera rig",
    edit=twelve,
    look=lambda f, r, root: right_frames(f) and "cameras that are not read: RGB-CAM_AB" in str(r),
)
drive(
    "paths of a moved root",
    edit=each_entry(
        lambda e: e.update(
            {
                k: f"C:\\disk\\simbev\\{v[3:]}".replace("/", "\\")
                for k, v in e.items()
                if k != "frame"
            }
        )
    ),
)
drive(
    "paths relative to the set",
    edit=each_entry(lambda e: e.update({k: v[3:] for k, v in e.items() if k != "frame"})),
)
drive(
    "a path with nothing of the layout in it",
    "let its path name what lies below",
    entry(lambda e: e.update({"RGB-CAM_FRONT": "/disk/other/a.jpg"})),
)
for value in (None, 5, ["a"], ""):
    drive(
        f"a picture's path is {json.dumps(value)}",
        "RGB-CAM_FRONT" if value != "" else "image",
        entry(lambda e, v=value: e.update({"RGB-CAM_FRONT": v})),
    )
drive(
    "a picture's path with a NUL",
    "image is missing",
    entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/a\0b.jpg"})),
)
drive(
    "a picture's path with half a character",
    "image is missing",
    entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/a\ud800.jpg"})),
)
drive(
    "a picture's path of 100,000 letters",
    "image is missing",
    entry(lambda e: e.update({"RGB-CAM_FRONT": f"/d/sweeps/{'a' * 100_000}"})),
)
drive(
    "a picture's path with terminal escapes",
    "image is missing",
    entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/\x1b[31m.jpg"})),
)


def warned(found, report, root) -> bool:
    return right_frames(found) and "lie outside this folder" in str(report)


def move_out(name: str) -> Callable:
    """A file of the set moved beside it, a link in its place."""

    def edit(root: Path):
        (root / name).rename(root.parent / "away")
        (root / name).symlink_to(root.parent / "away")

    return edit


drive(
    "a linked picture outside",
    edit=move_out("sweeps/RGB-CAM_FRONT/f0-RGB-CAM_FRONT.jpg"),
    look=warned,
)
drive("a linked folder outside", edit=move_out("ground-truth"), look=warned)
drive("a linked config outside", edit=move_out("configs/scene_0000.yaml"), look=warned)


def climb(root: Path) -> None:
    save(root.parent / "away.jpg", picture(1))
    entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/../../away.jpg"}))(root)


drive("`..` in a picture's path", edit=climb, look=warned)


def climb_config(root: Path) -> None:
    save(root.parent / "away.yaml", "bev_res: 0.5\n")
    scene(lambda s: s["scene_info"].update(config="/d/configs/../../away.yaml"))(root)


drive("`..` in a config's path", edit=climb_config, look=warned)
for text, said, what in (
    (DEEP, "nested too deeply", "brackets 100,000 deep"),
    ("9" * 5000, "infos", "a number of 5,000 digits"),
    ("", "is not JSON", "an empty file"),
    ("[1]", "holds a list", "a list"),
    ("{", "is not JSON", "cut short"),
    ("\ud800", "is not JSON", "not UTF-8"),
):
    drive(
        f"infos: {what}",
        said,
        lambda root, t=text: first(root).write_bytes(t.encode("utf-8", "surrogatepass")),
    )
drive(
    "infos with a byte-order mark",
    edit=lambda root: first(root).write_bytes(b"\xef\xbb\xbf" + first(root).read_bytes()),
)
drive(
    "infos in UTF-16", edit=lambda root: first(root).write_text(first(root).read_text(), "utf-16")
)
drive("infos as a pipe", "is a pipe", lambda root: pipe(first(root)))
drive("infos as a folder", "is a folder", lambda root: swap(first(root)))
drive("two layouts in one folder", "say which", lambda root: (root / "train").mkdir())

TOP = "train/scene_0000/yaw0pitch0"


def sample(edit: Callable, top: str = TOP) -> Callable:
    """edit(the training sample of a meta.json)"""
    return lambda root: change(root / top / "meta.json", lambda m: edit(m[0]))


def meta(said, right="", edit=None, look=right_frames):
    drive(said, right, edit, "published", "SimBEV meta.json", look)


meta("as it should be")
meta(
    "pictures in another order, their names tell",
    edit=sample(
        lambda s: s.update({k: s[k][::-1] for k in ("images", "intrinsics", "extrinsics")})
    ),
)
meta(
    "a path with backslashes",
    edit=sample(lambda s: s.update(images=[n.replace("/", "\\") for n in s["images"]])),
)
for name, value in (
    ("images", {}),
    ("images", "x"),
    ("images", [1] * 6),
    ("intrinsics", "x"),
    ("intrinsics", {}),
    ("extrinsics", [[1, 2], [3]]),
    ("extrinsics", None),
    ("label", 5),
    ("label", ["x"]),
    ("token", None),
    ("token", []),
    ("image_size", [1, 2, 3]),
    ("image_size", ["a", "b"]),
    ("image_size", [0, 5]),
):
    meta(
        f"{name} is {json.dumps(value)[:20]}",
        "image" if name == "images" else name,
        sample(lambda s, n=name, v=value: s.update({n: v})),
    )
meta(
    "NaN in a matrix",
    "holds NaN",
    sample(lambda s: s["extrinsics"][2][0].__setitem__(0, float("nan"))),
)
meta(
    "a matrix that is no motion",
    "is not rigid",
    sample(lambda s: s["extrinsics"][2][0].__setitem__(0, 9.0)),
)
meta(
    "five cameras",
    "5 images (front_left",
    sample(lambda s: [s[k].pop() for k in ("images", "intrinsics", "extrinsics")]),
)
meta("twelve cameras", "12 images", sample(lambda s: s.update(images=s["images"] * 2)))
meta(
    "an entry that is a number",
    "sample 0",
    lambda root: change(root / TOP / "meta.json", lambda m: m.insert(0, 7)),
)
meta(
    "a token twice",
    "occurs twice",
    lambda root: change(root / TOP / "meta.json", lambda m: m.append(m[0])),
)
meta(
    "brackets 100,000 deep", "nested too deeply", lambda root: save(root / TOP / "meta.json", DEEP)
)
meta("a pipe", "is a pipe", lambda root: pipe(root / TOP / "meta.json"))
meta("a folder", "is a folder", lambda root: swap(root / TOP / "meta.json"))


def away(root: Path) -> None:
    save(root.parent / "away.jpg", picture(0))
    sample(lambda s: s["images"].__setitem__(0, str(root.parent / "away.jpg")))(root)


meta(
    "an absolute path elsewhere",
    edit=away,
    look=lambda f, r, root: right_frames(f) and "lie outside this folder" in str(r),
)
drive("as it should be", layout="converted", sort="SimBEV meta.json, converted")
drive(
    "one scene only",
    "1 scenes",
    lambda root: [shutil.rmtree(root / f"SimBEV_cvt_label/scene_000{k}") for k in (1, 2)],
    "converted",
    "SimBEV meta.json, converted",
)
drive(
    "no meta.json in a scene",
    "there is yaw9pitch0",
    lambda root: (root / "SimBEV_cvt_label/scene_0000/yaw0pitch0").rename(
        root / "SimBEV_cvt_label/scene_0000/yaw9pitch0"
    ),
    "converted",
    "SimBEV meta.json, converted",
)

SEG = "ground-truth/seg/f0-GT_SEG.npz"


def seg(said, right="", content=b"", edit=None, look=right_frames, name=SEG):
    def put(root: Path):
        edit(root / name) if edit else save(root / name, content)

    drive(said, right, put, sort="SimBEV label", look=look)


seg("as bytes 0 and 1", content=npz(data=label().astype(np.uint8)))
seg("as floats 0 and 1", content=npz(data=label().astype(np.float32)))
seg("with the classes last", content=npz(data=np.moveaxis(label(), 0, 2)))
seg("in Fortran order", content=npz(data=np.asfortranarray(label())))
seg("with other arrays beside", content=npz(other=np.zeros((9, 9)), data=label()))
seg("uncompressed", edit=lambda p: np.savez(p, data=label()))
seg("another key", "has no array 'data', only x", npz(x=label()))
seg(
    "14 classes of 5,000 cells",
    "5000 cells a side",
    npz(data=np.zeros((14, 5000, 1), bool) * np.zeros((1, 1, 5000), bool)),
)
seg("seven classes", "has shape (7, 200, 200)", npz(data=label()[:7]))
seg("no square", "has shape (8, 200, 100)", npz(data=label()[:, :, :100]))
seg("values up to 255", "other values than 0 and 1", npz(data=label().astype(np.uint8) * 255))
seg("NaN", "other values than 0 and 1", npz(data=np.full((8, 200, 200), np.nan, np.float32)))
seg("Python objects", "Python objects", npz(data=np.array([[None]])))
seg("text", "not of numbers", npz(data=np.array([["a"]])))
seg("complex numbers", "type complex", npz(data=label().astype(complex)))
seg("cut short", "label", npz(data=label())[:300])
seg(
    "one byte changed",
    "label",
    edit=lambda p: p.write_bytes(
        p.read_bytes()[:200] + bytes([p.read_bytes()[200] ^ 255]) + p.read_bytes()[201:]
    ),
)
seg("empty", "is empty", b"")
seg("a pipe", "label is", edit=pipe)
seg("a folder", "label is", edit=swap)
seg("a picture", "label", edit=lambda p: save(p, picture(0)))
seg(
    "smaller than the map",
    "reaches beyond the label",
    edit=lambda p: (save(p, npz(data=label(0.5, 100))), config("bev_res: 0.5\n")(p.parents[2])),
)


def lie(path: Path) -> None:
    """A header that says a terabyte, in an archive of a few bytes."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", npy((8, 4000, 4000), "<f8", bytes(100)))


seg("a header that lies", "label", edit=lie)


def sensor(said, right, read, name, content, look=None):
    """A kind of file of a sensor that only the doctor opens."""

    def run(folder: Path):
        path = folder / name
        content(path) if callable(content) else save(path, content)
        return look(read(str(path)))

    KINDS.append(Kind("SimBEV depth and lidar", said, "simbev", right, run))


POINTS = np.arange(12, dtype=np.float32).reshape(4, 3)
sensor(
    "points (n, 3)", "", read_points, "a.npz", npz(data=POINTS), lambda x: np.array_equal(x, POINTS)
)
sensor(
    "points as float64 with intensity",
    "",
    read_points,
    "a.npz",
    npz(data=np.c_[POINTS, POINTS].astype(float)),
    lambda x: np.array_equal(x, POINTS),
)
sensor(
    "points as whole numbers",
    "not (n, 3) numbers",
    read_points,
    "a.npz",
    npz(data=POINTS.astype(int)),
)
sensor(
    "points as objects", "Python objects", read_points, "a.npz", npz(data=np.array([[None] * 3]))
)
sensor("points as a pipe", "is a pipe", read_points, "a.npz", os.mkfifo)
sensor(
    "depth in three channels",
    "",
    read_depth,
    "a.png",
    np.full((4, 4, 3), (0, 0, 1), np.uint8),
    lambda x: np.allclose(x, 65536 * 1000 / (2**24 - 1)),
)
sensor(
    "depth cut short",
    "a.png",
    read_depth,
    "a.png",
    lambda p: p.write_bytes(save(p, picture(0)).read_bytes()[:60]),
)

# ---- beam: seven frames of scenario 32, three windows; a plain picture, four points, a small cube

BEAMS = (7, 30, 64)  # as the table writes them, from 1
CLOUD = np.array([[-10.0, -5.0, 1], [-20, 2, 0], [-30, -30, 0], [-59, 5, 2]])
CUBE = np.exp(1j * np.arange(4 * 8 * 4).reshape(4, 8, 4)).astype(np.complex64)
POWER = np.linspace(0.1, 0.9, 64)
BASE, CAR = (33.42, -111.93), (33.4201, -111.9301)
TABLE_OF = "Multi_Modal/ml_challenge_dev_multi_modal.csv"


def ascii_ply(points=CLOUD, header="") -> str:
    count = len(points)
    rows = "".join("{:g} {:g} {:g}\n".format(*p) for p in points)
    fields = "property float x\nproperty float y\nproperty float z\n"
    return f"ply\nformat ascii 1.0\n{header}element vertex {count}\n{fields}end_header\n{rows}"


def binary_ply(points=CLOUD, order="little", count=None, extra="", kind="float") -> bytes:
    mark, code = "<>"[order == "big"], {"float": "f4", "double": "f8"}[kind]
    fields = "".join(f"property {kind} {c}\n" for c in "xyz")
    head = f"ply\nformat binary_{order}_endian 1.0\ncomment made\nelement vertex "
    head += f"{len(points) if count is None else count}\n{fields}{extra}end_header\n"
    return head.encode() + np.asarray(points).astype(mark + code).tobytes()


def draw_windows(root: Path) -> None:
    """The files of a sound set."""
    place, rows = root / "Multi_Modal", []
    for number in range(1, 8):
        names = name_files(32, number)
        save(place / names["unit1_rgb"], np.full((9, 16, 3), COLOURS[number % 6], np.uint8))
        save(place / names["unit1_lidar"], ascii_ply())
        out = io.BytesIO()
        np.save(out, CUBE)
        save(place / names["unit1_radar"], out.getvalue())
        save(place / names["unit2_loc"], "{}\n{}\n".format(*CAR))
        save(place / names["unit1_pwr_60ghz"], "".join(f"{p}\n" for p in POWER))
    save(place / "scenario32/unit1/GPS_data/gps_location.txt", "{}\n{}\n".format(*BASE))
    for last, best in zip((5, 6, 7), BEAMS):
        rows.append({"index": last} | make_row(32, last, best) | {"seq_index": last})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(root / TABLE_OF, out.getvalue())


def windows_of(folder: Path):
    """All that training opens of the windows: (data, pictures, lidar, radar, positions)."""
    data = windows.load(folder)
    paths = [sorted({p for s in data.samples for p in getattr(s, k)}) for k in windows.KINDS]
    parts = [
        [beam.prepare_image(p, 8) for p in paths[0]],
        [beam.prepare_lidar(p, 8, 32) for p in paths[1]],
        [beam.prepare_radar(p, 8) for p in paths[2]],
        beam._read_gps(data.samples, beam.Options()),
    ]
    split = replace(data, samples=tuple(replace(s, split="train") for s in data.samples))
    beam.BeamDataset(split, "train", size=8, augmentation=0)[0]
    return data, *parts


def right_windows(found, beams=BEAMS) -> bool:
    data, pictures, clouds, cubes, places = found
    wanted = features.make_gps(np.array([CAR] * 2), np.array(BASE), 32)
    seen = features.count_points(CLOUD[:, :2], features.find_field(32), 8)
    radar = features.make_radar(CUBE, 8).astype(np.float16)
    good = [s.beams for s in data.samples] == [(b - 1,) for b in beams] and len(pictures) == 7
    good &= all(np.array_equal(c[0], seen) for c in clouds)
    good &= all(np.array_equal(c, radar) for c in cubes)
    good &= all(
        np.abs(p.mean((1, 2)) - COLOURS[int(n) % 6]).max() < 1
        for n, p in zip(range(1, 8), pictures)
    )
    return bool(
        good and np.allclose(places, wanted) and data.samples[0].image[0].endswith("_1.jpg")
    )


def window(sort, said, right="", edit=None, look=right_windows):
    """A kind of set of windows: a sound one after edit(root)."""

    def run(folder: Path):
        root = copy(folder, draw_windows)
        edit and edit(root)
        found, report = same(beam.check, windows_of, root)
        return look(found) if look is right_windows else look(found, report)

    KINDS.append(Kind(sort, said, "beam", right, run))


def table(said, right="", edit=None, look=right_windows):
    """A kind of table: edit(rows) of dictionaries, or of the text if it takes bytes."""

    def put(root: Path):
        path = root / TABLE_OF
        if edit.__code__.co_varnames[0] == "text":
            path.write_bytes(edit(path.read_bytes()))
            return
        rows = list(csv.DictReader(path.read_text().splitlines()))
        edit(rows)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    window("DeepSense table", said, right, put if edit else None, look)


table("as it should be")
table("with a byte-order mark", edit=lambda text: b"\xef\xbb\xbf" + text)
table("with Windows line ends", edit=lambda text: text.replace(b"\n", b"\r\n"))
table("with old Mac line ends", edit=lambda text: text.replace(b"\n", b"\r"))
table("with semicolons", edit=lambda text: text.replace(b",", b";"))
table(
    "with quotes around every cell",
    edit=lambda text: b"\n".join(
        b",".join(b'"%s"' % c for c in line.split(b",")) for line in text.splitlines()
    ),
)
table("with empty lines", edit=lambda text: text.replace(b"\n", b"\n\n"))
table(
    "with its columns in another order",
    edit=lambda rows: rows.__setitem__(0, dict(reversed(rows[0].items()))),
)
table(
    "beams written as 7.0",
    edit=lambda rows: [r.update(unit1_beam=f"{r['unit1_beam']}.0") for r in rows],
)
table("with tabs", edit=lambda text: text.replace(b",", b"\t"))
table("without beams", "has no column unit1_beam", lambda rows: [r.pop("unit1_beam") for r in rows])
table(
    "without the second frame",
    "has no column unit1_lidar_2",
    lambda rows: [r.pop("unit1_lidar_2") for r in rows],
)
table(
    "with a column twice",
    "two columns 'unit1_beam'",
    lambda text: text.replace(b"seq_index", b"unit1_beam"),
)
for value in ("0", "65", "-3", "x", "", "7.5", "nan", "1e3", "9" * 5000, "7_8", "\x1b[31m"):
    if value != "7_8":
        table(
            f"a beam that is {value[:8]!r}",
            "unit1_beam is",
            lambda rows, v=value: rows[1].update(unit1_beam=v),
        )
table(
    "a row that ends early",
    "row 3: ",
    lambda text: b"\n".join(
        line[:200] if k == 2 else line for k, line in enumerate(text.splitlines())
    ),
)
table(
    "a frame that is not there",
    "is not there",
    lambda rows: rows[0].update(unit1_rgb_1="./scenario32/unit1/camera_data/image_99.jpg"),
)
table(
    "a frame's name with a NUL",
    "row 2: unit1_radar_1",
    lambda rows: rows[0].update(unit1_radar_1="./scenario32/unit1/radar_\0data/radar_data_1.npy"),
)
table(
    "a frame's name of 9,000 letters",
    "is not there",
    lambda rows: rows[0].update(unit1_radar_1="./" + "a/" * 2500 + "b" * 4000),
)
table(
    "a scenario of 5,000 digits",
    "names no scenario",
    lambda rows: rows[0].update(
        unit1_rgb_5=f"./scenario{'9' * 5000}/unit1/camera_data/image_5.jpg"
    ),
)
table(
    "a column of 5,000 digits",
    edit=lambda text: text.replace(b"seq_index", b"unit1_rgb_" + b"9" * 5000),
    look=lambda f, r: [s.beams[0] + 1 for s in f[0].samples] == [*BEAMS],
)
table("a million columns", "columns, more than", lambda text: b"a," * 10**6 + text)
table("not UTF-8", "UTF-8", lambda text: text.replace(b"seq", b"\xe9q"))
table(
    "an open quote",
    "is not CSV (line 4",
    lambda text: text.replace(b"./scenario32", b'"./scenario32', 1),
)
table("no rows", "window", lambda text: text.splitlines()[0] + b"\n")
table("empty", "has no column", lambda text: b"")
window("DeepSense table", "a pipe", "holds no table", lambda root: pipe(root / TABLE_OF))
window("DeepSense table", "a folder", "holds no table", lambda root: swap(root / TABLE_OF))


def away_window(root: Path) -> None:
    """The last cube of a window is named by its place elsewhere."""
    old = root / "Multi_Modal/scenario32/unit1/radar_data/radar_data_7.npy"
    new = Path(shutil.copy(old, root.parent / "radar_data_7.npy"))
    path = root / TABLE_OF
    path.write_text(
        path.read_text().replace("./scenario32/unit1/radar_data/radar_data_7.npy", str(new))
    )


def climb_window(root: Path) -> None:
    away_window(root)
    path = root / TABLE_OF
    path.write_text(path.read_text().replace(str(root.parent), "../.."))


def link_window(root: Path) -> None:
    (root / "Multi_Modal/scenario32").rename(root.parent / "away")
    (root / "Multi_Modal/scenario32").symlink_to(root.parent / "away")


for said, edit in (
    ("an absolute path elsewhere", away_window),
    ("`..` in a path", climb_window),
    ("linked folders", link_window),
):
    window(
        "DeepSense table",
        said,
        "",
        edit,
        lambda f, r: right_windows(f) and "lie outside this folder" in str(r),
    )

UNIT = "Multi_Modal/scenario32/unit1"


def put(name: str, content) -> Callable:
    """Another content of a file, or what content(path) does to it."""
    return lambda root: content(root / name) if callable(content) else save(root / name, content)


def cloud(said, right="", content="", look=right_windows):
    window("PLY cloud", said, right, put(f"{UNIT}/lidar_data/lidar_data_3.ply", content), look)


ELSE = np.c_[CLOUD, CLOUD[:, :1] * 0 + 3]
cloud("ASCII with a comment", content=ascii_ply(header="comment a b c\n"))
cloud("ASCII with Windows line ends", content=ascii_ply().replace("\n", "\r\n").encode())
cloud("binary, little endian", content=binary_ply())
cloud("binary, big endian", content=binary_ply(order="big"))
cloud("binary, of doubles", content=binary_ply(kind="double"))
cloud("binary with intensity", content=binary_ply(ELSE, extra="property float intensity\n"))
cloud("NaN points among others", content=ascii_ply(np.r_[CLOUD, [[np.nan] * 3]]))
cloud("infinite points among others", content=binary_ply(np.r_[CLOUD, [[np.inf, 1, 1]]]))
cloud(
    "with faces behind the points",
    content=binary_ply(extra="element face 1\nproperty list uchar int vertex_indices\n")
    + b"\3"
    + bytes(12),
)
for said, right, content in (
    ("10^9 points of 12 bytes", "ends before its", binary_ply(count=10**9)),
    ("10^18 points", "ends before its", binary_ply(count=10**18)),
    ("10^9 points in text", "ends before its", ascii_ply().replace("vertex 4", f"vertex {10**9}")),
    ("-4 points", "has no points", binary_ply(count=-4)),
    ("no points", "has no points", ascii_ply(CLOUD[:0])),
    ("NaN points only", "no finite points", ascii_ply(CLOUD * np.nan)),
    ("cut short", "ends before its 4", binary_ply()[:-5]),
    ("one point less than it says", "bytes more", binary_ply(count=3)),
    ("a header without end", "is not a PLY file", ascii_ply()[:60]),
    ("a count in words", "four", ascii_ply().replace("vertex 4", "vertex four")),
    ("no x", "has no x and y", ascii_ply().replace("float x", "float a")),
    ("x as a list", "type 'list'", ascii_ply().replace("float x", "list uchar int x")),
    ("x twice", "lidar_data_3.ply", binary_ply().replace(b"float y", b"float x")),
    ("words for numbers", "lidar_data_3.ply", ascii_ply().replace("-10", "ten")),
    ("an unknown format", "is in the format", ascii_ply().replace("ascii", "utf8")),
    (
        "faces first",
        "begins with 'face'",
        ascii_ply().replace("element v", "element face 0\nelement v"),
    ),
    ("empty", "is not a PLY file", b""),
    ("a pipe", "is a pipe", pipe),
    ("a folder", "is a folder", swap),
):
    cloud(said, right, content)


def cube(said, right="", content=b"", look=right_windows):
    window("radar cube", said, right, put(f"{UNIT}/radar_data/radar_data_3.npy", content), look)


def array(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def spoil(values, value) -> np.ndarray:
    """The values with one of them exchanged."""
    new = np.array(values)
    new.flat[5] = value
    return new


cube("complex64", content=array(CUBE))
cube("complex128", content=array(CUBE.astype(complex)))
cube("big endian", content=array(CUBE.astype(">c8")))
cube("in Fortran order", content=array(np.asfortranarray(CUBE)))
for said, right, content in (
    ("terabytes by its header", "more than 4096 a side", npy((4, 10**6, 10**5), "<c8", bytes(99))),
    ("a gigabyte by its header", "bytes, more than", npy((4, 4096, 4096), "<c16", bytes(99))),
    ("shorter than its header says", "ends before its array", npy((4, 8, 4), "<c8", bytes(99))),
    ("objects", "Python objects", array(np.array([[[None]]] * 4))),
    ("float numbers", "not complex", array(CUBE.real)),
    (
        "real and imaginary parts",
        "not (4, samples, chirps)",
        array(np.stack([CUBE.real, CUBE.imag], -1)),
    ),
    ("axes in another order", "not (4, samples, chirps)", array(CUBE.transpose(1, 2, 0))),
    ("two antennas", "not (4, samples, chirps)", array(CUBE[:2])),
    ("NaN", "NaN or infinite", array(spoil(CUBE, np.nan))),
    ("infinity", "NaN or infinite", array(spoil(CUBE, np.inf))),
    ("constant", "constant", array(CUBE * 0)),
    ("no chirps", "radar", array(CUBE[:, :, :0])),
    ("a .mat file", "is not a numpy array", b"MATLAB 5.0 MAT-file" + bytes(200)),
    ("an npz without its name", "has no array ''", npz(cube=CUBE)),
    ("a pickle", "is not a numpy array", b"\x80\x04N."),
    ("another shape than the others", "another shape", array(np.r_["1", CUBE, CUBE])),
    ("empty", "is not a numpy array", b""),
    ("a pipe", "is a pipe", pipe),
):
    if "another shape" not in right:
        cube(said, right, content)


def place(said, right="", content="", look=right_windows):
    window(
        "position text",
        said,
        right,
        put("Multi_Modal/scenario32/unit2/GPS_data/GPS_location_1.txt", content),
        look,
    )


def power(said, right="", content="", look=right_windows):
    window("power text", said, right, put(f"{UNIT}/mmWave_data/mmWave_power_5.txt", content), look)


def lines(values, end="\n") -> str:
    return "".join(f"{v}{end}" for v in values)


place("on one line", content="33.4201 -111.9301")
place("with Windows line ends", content=lines(CAR, "\r\n").encode())
place("with a byte-order mark", content="\ufeff" + lines(CAR))
place("in exponents", content="3.34201e1\n-1.119301e2\n")
for said, right, content in (
    ("NaN", "nowhere on Earth", "nan\n1\n"),
    ("infinity", "nowhere on Earth", "1e999\n1\n"),
    ("the axes exchanged", "nowhere on Earth", lines(CAR[::-1])),
    ("one line", "has 1 line", "33.4\n"),
    ("three lines", "has 3 line", "1\n2\n3\n"),
    ("decimal commas", "is not two numbers", "33,4\n111,9\n"),
    ("words", "is not two numbers", "north\neast\n"),
    ("degrees and minutes", "is not two numbers", "33°25' N\n"),
    ("megabytes", "bytes, more than", "1 " * 10**6),
    ("not UTF-8", "not UTF-8", b"\xff\xfe1\0"),
    ("empty", "has 0 line", ""),
    ("a pipe", "is a pipe", pipe),
    ("digits", "nowhere on Earth", "9" * 5000 + " 1"),
):
    place(said, right, content)
power("with Windows line ends", content=lines(POWER, "\r\n").encode())
power("on one line", content=lines(POWER, " "))
power("with a byte-order mark", content="\ufeff" + lines(POWER))
for said, right, content in (
    ("NaN", "power of beam 6 is nan", lines(spoil(POWER, np.nan))),
    ("63 beams", "63 powers, not 64", lines(POWER[1:])),
    ("65 beams", "65 powers, not 64", lines([0, *POWER])),
    ("words", "list of numbers", lines(["a"] * 64)),
    ("infinity", "is inf", lines(spoil(POWER, np.inf))),
    ("megabytes", "bytes, more than", "1 " * 10**6),
    ("empty", "0 powers", ""),
    ("a pipe", "is a pipe", pipe),
):
    power(said, right, content)


# ---- beam's arrays of positions: one scenario of 12 rows

ROWS = {
    "unit1_pwr_60ghz": np.abs(np.sin(np.arange(12 * 64.0).reshape(12, 64))) + 0.1,
    "unit1_loc": np.tile(BASE, (12, 1)),
    "unit2_loc": np.array(CAR) + np.arange(24.0).reshape(12, 2) / 1e5,
    "seq_index": np.repeat(np.arange(4), 3),
}


def rows_of(folder: Path):
    """The arrays, their features and neighbours."""
    data = positions.make_split(positions.load(folder), "sequence")
    return data, positions.make_features(data), positions.rank_neighbours(data)


def arrays(said, right="", edit=None, name="scenario5_{}_1-12.npy", look=None):
    """A kind of folder of arrays: edit({name: array or bytes})."""

    def run(folder: Path):
        content = dict(ROWS)
        edit and edit(content)
        for stem, values in content.items():
            values = values if isinstance(values, bytes) else array(values)
            save(folder / name.format(stem), values)
        (data, seen, ranked), _ = same(positions.check, rows_of, folder)
        good = np.array_equal(data.power, ROWS["unit1_pwr_60ghz"]) and len(ranked)
        good = good and np.array_equal(data.beam, ROWS["unit1_pwr_60ghz"].argmax(1))
        return bool(good and np.allclose(data.car, ROWS["unit2_loc"]) and np.isfinite(seen).all())

    KINDS.append(Kind("position arrays", said, "beam", right, run))


arrays("as they should be")
arrays("in Fortran order", edit=lambda a: a.update(unit2_loc=np.asfortranarray(a["unit2_loc"])))
arrays("drives as floats", edit=lambda a: a.update(seq_index=a["seq_index"].astype(float)))
for said, right, edit in (
    (
        "NaN",
        "row 0 is not finite",
        lambda a: a.update(unit2_loc=spoil(a["unit2_loc"], np.nan)[::-1][4:].repeat(2, 0)[:12]),
    ),
    (
        "NaN power",
        "row 0 is not finite",
        lambda a: a.update(unit1_pwr_60ghz=spoil(a["unit1_pwr_60ghz"], np.nan)),
    ),
    ("no power at all in a row", "row 3", lambda a: a["unit1_pwr_60ghz"].__setitem__(3, 0)),
    ("powers in decibels", "row 0", lambda a: a.update(unit1_pwr_60ghz=-a["unit1_pwr_60ghz"])),
    ("complex powers", "complex", lambda a: a.update(unit1_pwr_60ghz=a["unit1_pwr_60ghz"] + 0j)),
    (
        "longitude and latitude exchanged",
        "Earth",
        lambda a: a.update(unit2_loc=a["unit2_loc"][:, ::-1]),
    ),
    ("objects", "Python objects", lambda a: a.update(seq_index=np.array([None] * 12))),
    ("another length", "has shape", lambda a: a.update(seq_index=a["seq_index"][:5])),
    ("63 beams", "has shape", lambda a: a.update(unit1_pwr_60ghz=a["unit1_pwr_60ghz"][:, 1:])),
    ("one array less", "has no scenario5_unit2_loc", lambda a: a.pop("unit2_loc")),
    ("none", "holds no scenario", lambda a: a.clear()),
    (
        "terabytes by a header",
        "has shape",
        lambda a: a.update(unit1_pwr_60ghz=npy((10**9, 64), "<f8")),
    ),
    (
        "cut short",
        "ends before",
        lambda a: a.update(unit1_pwr_60ghz=npy((12, 64), "<f8", bytes(9))),
    ),
):
    if said == "NaN":
        right, edit = (
            "row 2 is not finite",
            lambda a: a.update(unit2_loc=spoil(a["unit2_loc"], np.nan)),
        )
    if "power" in said or said in ("objects",):
        old = edit
        edit = lambda a, f=old: (a.update(unit1_pwr_60ghz=a["unit1_pwr_60ghz"].copy()), f(a))  # noqa: E731
    arrays(said, right, edit)

# ---- xad: eight drawn scenes of one moment, pictures of 64 x 36


def draw_scenes(root: Path) -> None:
    """The files of a sound nu-A2D."""
    shutil.copytree(draw_moments(n=8, per_scene=1, size="64x36"), root, dirs_exist_ok=True)


def moments_of(folder: Path):
    """All that training reads: (data, {id: item})."""
    data, items = xad.load(folder), {}
    for part, count in data.counts().items():
        if count:
            found = xad.XADDataset(data, part, augment="none", final_h=32, final_w=64)
            items |= {item["id"]: (item, found) for item in map(found.__getitem__, range(count))}
    return data, items


def right_moments(found, report=None, root=None, count: int = 7) -> bool:
    """Whether matrices, pictures, labels and maps are those of the drawn files."""
    (data, items), old = found, drawn(draw_scenes) / "trainval"
    rows = {
        name: {
            row["token"]: row
            for row in json.loads((old / f"v1.0-trainval/{name}.json").read_text())
        }
        for name in ("calibrated_sensor", "sensor", "sample_data")
    }
    names = {
        t: rows["sensor"][r["sensor_token"]]["channel"]
        for t, r in rows["calibrated_sensor"].items()
    }
    by = {names[t]: r for t, r in rows["calibrated_sensor"].items()}
    files = {
        (r["sample_token"], names[r["calibrated_sensor_token"]]): old / r["filename"]
        for r in rows["sample_data"].values()
    }
    good = len(data.frames) == len(items) == count
    for frame in data.frames:
        item = items[frame.id][0]
        good &= item["action"].tolist() == json.loads(
            (old / f"action_all/{frame.id}.json").read_text()
        )
        static = np.load(old / f"local_binmap/{frame.id}.npy").T
        bev = item["bev"].numpy()
        good &= np.array_equal(bev[bev != 1], static[bev != 1])
        for k, name in enumerate(xad.CAMERAS):
            good &= np.allclose(frame.intrins[k], by[name]["camera_intrinsic"])
            good &= np.allclose(frame.trans[k], by[name]["translation"])
            here = np.asarray(Image.open(frame.images[k]).convert("RGB"))
            good &= np.array_equal(
                here, np.asarray(Image.open(files[frame.id, name]).convert("RGB"))
            )
    return bool(good)


def moment(sort, said, right="", edit=None, look=right_moments):
    """A kind of nu-A2D: a sound one after edit(trainval)."""

    def run(folder: Path):
        root = copy(folder, draw_scenes)
        edit and edit(root / "trainval")
        return look(*same(xad.check, moments_of, root), root)

    KINDS.append(Kind(sort, said, "xad", right, run))


def rows_in(name: str, edit: Callable) -> Callable:
    """edit(rows) of a table."""
    return lambda root: change(root / f"v1.0-trainval/{name}.json", edit)


def nuscenes(said, right="", name="sample", edit=None, look=right_moments):
    moment("nuScenes table", said, right, rows_in(name, edit) if edit else None, look)


def camera_row(root: Path, channel: str = "CAM_FRONT") -> int:
    """Which row of calibrated_sensor is a channel's."""
    tables = root / "v1.0-trainval"
    of = {r["token"]: r["channel"] for r in json.loads((tables / "sensor.json").read_text())}
    rows = json.loads((tables / "calibrated_sensor.json").read_text())
    return next(k for k, r in enumerate(rows) if of[r["sensor_token"]] == channel)


def calibrated(said, right, channel="CAM_FRONT", look=right_moments, **fields):
    """A kind of row of calibrated_sensor: other fields."""

    def edit(root: Path):
        k = camera_row(root, channel)
        rows_in("calibrated_sensor", lambda rows: rows[k].update(fields))(root)

    moment("nuScenes calibration", said, right, edit, look)


NAN = float("nan")
nuscenes("as they should be")
nuscenes("rows in another order", name="sample_data", edit=lambda rows: rows.reverse())
nuscenes(
    "more fields than are read", name="sample", edit=lambda rows: [r.update(more=[1]) for r in rows]
)
nuscenes(
    "sweeps between the key frames",
    name="sample_data",
    edit=lambda rows: rows.extend(
        [r | {"token": f"s{k}", "is_key_frame": False} for k, r in enumerate(rows[:9])]
    ),
)
for said, right, name, edit in (
    ("a token twice", "occurs twice", "sample", lambda rows: rows.append(rows[0])),
    (
        "a token that leads nowhere",
        "is in no row of sample.json",
        "sample_data",
        lambda rows: rows[-2].update(sample_token="x"),
    ),
    (
        "a token as a list",
        "token is ['a'], not text",
        "sample",
        lambda rows: rows[0].update(token=["a"]),
    ),
    ("a token as null", "token is None", "sample", lambda rows: rows[0].update(token=None)),
    (
        "a leading token as an object",
        "is in no row of",
        "sample_annotation",
        lambda rows: rows[0].update(instance_token={}),
    ),
    (
        "a list of logs as a number",
        "is in no row of log",
        "map",
        lambda rows: rows[0].update(log_tokens=7),
    ),
    ("a row as a number", "row 0: has no", "sample", lambda rows: rows.insert(0, 7)),
    ("a row without a field", "has no timestamp", "sample", lambda rows: rows[0].pop("timestamp")),
    ("a moment as text", "timestamp is", "sample", lambda rows: rows[0].update(timestamp="now")),
    ("a moment as NaN", "timestamp is nan", "sample", lambda rows: rows[0].update(timestamp=NAN)),
    (
        "a moment of 400 digits",
        "timestamp is",
        "sample",
        lambda rows: rows[0].update(timestamp=10**400),
    ),
    (
        "is_key_frame in words",
        "is_key_frame is",
        "sample_data",
        lambda rows: [r.update(is_key_frame="false") for r in rows],
    ),
    (
        "two key frames of one camera",
        "two key frames",
        "sample_data",
        lambda rows: rows.append(rows[-2] | {"token": "b"}),
    ),
    (
        "two scenes of one name",
        "occurs twice",
        "scene",
        lambda rows: rows.append(rows[0] | {"token": "b"}),
    ),
    ("no key frame of a camera", "no key frame of", "sample_data", lambda rows: rows.pop(-2)),
    ("no samples", "sample.json", "sample", lambda rows: rows.clear()),
    (
        "a file's name as a list",
        "filename is",
        "sample_data",
        lambda rows: rows[-2].update(filename=["a"]),
    ),
    (
        "a file's name that is empty",
        "not a file",
        "sample_data",
        lambda rows: rows[-2].update(filename=""),
    ),
    (
        "a file's name with a NUL",
        "images file is missing",
        "sample_data",
        lambda rows: rows[-2].update(filename="samples/a\0b.jpg"),
    ),
    (
        "a file's name of 9,000 letters",
        "images file is missing",
        "sample_data",
        lambda rows: rows[-2].update(filename="samples/" + "a" * 9000),
    ),
    (
        "a size of NaN",
        "size is",
        "sample_annotation",
        lambda rows: rows[-1].update(size=[NAN, 1, 1]),
    ),
    (
        "a size of zero",
        "size is",
        "sample_annotation",
        lambda rows: rows[-1].update(size=[0, 1, 1]),
    ),
    ("a size in words", "size is", "sample_annotation", lambda rows: rows[-1].update(size="large")),
    (
        "a box without direction",
        "no sound translation",
        "sample_annotation",
        lambda rows: rows[-1].update(rotation=[0] * 4),
    ),
    (
        "a car at NaN",
        "no sound translation",
        "ego_pose",
        lambda rows: [r.update(translation=[NAN, 0, 0]) for r in rows],
    ),
    (
        "a place as text",
        "no sound translation",
        "ego_pose",
        lambda rows: [r.update(rotation="x") for r in rows],
    ),
):
    nuscenes(said, right, name, edit)
for said, right, content in (
    ("brackets 100,000 deep", "nested too deeply", DEEP),
    ("a number of 5,000 digits", "sample.json", "[" + "9" * 5000 + "]"),
    ("an object", "holds a dict", "{}"),
    ("cut short", "is not JSON", '[{"token": "a"'),
    ("empty", "is not JSON", ""),
    ("a pipe", "is a pipe", pipe),
    ("a folder", "is a folder", swap),
    ("missing", "table is missing", Path.unlink),
    ("not UTF-8", "is not JSON", b"\xff\xff["),
):
    moment("nuScenes table", said, right, put("v1.0-trainval/sample.json", content))
moment(
    "nuScenes table",
    "with a byte-order mark",
    edit=put("v1.0-trainval/scene.json", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes())),
)
for said, value in (
    ("NaN", [NAN, 0, 0, 0]),
    ("zero", [0, 0, 0, 0]),
    ("of three", [1, 0, 0]),
    ("in words", "w"),
    ("of 1e308", [1e308] * 4),
    ("as null", None),
    ("nested", [[1, 0, 0, 0]] * 4),
):
    calibrated(f"a camera's quaternion: {said}", "no sound translation", rotation=value)
    if said in ("NaN", "zero", "of 1e308"):
        calibrated(
            f"the lidar's quaternion: {said}", "no sound translation", "LIDAR_TOP", rotation=value
        )
for said, value in (
    ("NaN", [[NAN, 0, 32], [0, 50, 18], [0, 0, 1]]),
    ("none", []),
    ("in words", "K"),
    ("of other pictures", [[1200, 0, 800], [0, 1200, 450], [0, 0, 1]]),
    ("ragged", [[1], [2, 3]]),
    ("negative", [[-50, 0, 32], [0, 50, 18], [0, 0, 1]]),
):
    calibrated(f"K: {said}", "camera_intrinsic", camera_intrinsic=value)
for said, value in (("in words", "wide"), ("NaN", NAN), ("infinite", float("inf"))):
    nuscenes(
        f"a picture's width: {said}",
        "camera_intrinsic",
        "sample_data",
        lambda rows, v=value: [r.update(width=v) for r in rows],
    )


def away_moment(root: Path) -> None:
    """A picture lies elsewhere, and the table says where."""
    rows = json.loads((root / "v1.0-trainval/sample_data.json").read_text())
    new = shutil.move(root / rows[-2]["filename"], root.parents[1] / "a.jpg")
    rows_in("sample_data", lambda r: r[-2].update(filename=str(new)))(root)


def climb_moment(root: Path) -> None:
    away_moment(root)
    rows_in("sample_data", lambda r: r[-2].update(filename="../../a.jpg"))(root)


def link_moment(root: Path) -> None:
    shutil.move(root / "local_binmap", root.parents[1] / "maps")
    (root / "local_binmap").symlink_to(root.parents[1] / "maps")


for said, edit in (
    ("an absolute path elsewhere", away_moment),
    ("`..` in a path", climb_moment),
    ("a linked folder", link_moment),
):
    moment(
        "nuScenes table",
        said,
        "",
        edit,
        lambda f, r, root: right_moments(f) and "lie outside this folder" in str(r),
    )


def any_file(pattern: str, content) -> Callable:
    """Another content of the first used file of a pattern."""

    def edit(root: Path):
        used = {row["name"] for row in json.loads((root / "v1.0-trainval/scene.json").read_text())}
        path = sorted(root.glob(pattern))[0]
        assert used and path.exists()
        content(path) if callable(content) else save(path, content)

    return edit


MAP = np.zeros((200, 200), np.uint8)
for said, right, content in (
    ("another shape", "map has shape (200, 201)", array(np.zeros((200, 201)))),
    ("values of 7", "map has values", array(MAP + 7)),
    ("NaN", "map has values", array(MAP * NAN)),
    ("objects", "Python objects", array(np.array([[None]]))),
    ("text", "not of numbers", array(np.array([["a"]]))),
    ("terabytes by its header", "map has shape", npy((10**6, 10**6), "|u1")),
    ("cut short", "ends before its array", array(MAP)[:500]),
    ("a picture", "not a numpy array", lambda p: save(p, picture(0))),
    ("empty", "map file is empty", b""),
    ("a pipe", "map", pipe),
    ("missing", "map file is missing", Path.unlink),
    ("complex numbers", "map", array(MAP + 0j)),
):
    moment("static map", said, right, any_file("local_binmap/*.npy", content))
moment(
    "static map",
    "as floats",
    edit=any_file("local_binmap/*.npy", lambda p: np.save(p, np.load(p).astype(float))),
)
moment(
    "static map",
    "in Fortran order",
    edit=any_file("local_binmap/*.npy", lambda p: np.save(p, np.asfortranarray(np.load(p)))),
)
for said, right, content in (
    ("three numbers", "holds 3 numbers, not 4", "[0, 1, 0]"),
    ("words", "action file holds", '["a", "b", "c", "d"]'),
    ("true and false", "action file holds", "[true, false, true, false]"),
    ("NaN", "NaN", "[NaN, 0, 0, 0]"),
    ("1e999", "1e999", "[1e999, 0, 0, 0]"),
    ("two", "action file holds", "[2, 0, 0, 0]"),
    ("an object", "holds a dict", "{}"),
    ("brackets 100,000 deep", "nested too deeply", DEEP),
    ("megabytes", "bytes, more than", "[" + "0," * 10**6 + "0]"),
    ("empty", "action file is empty", ""),
    ("a pipe", "not a file", pipe),
    ("a folder", "not a file", swap),
    ("missing", "action file is missing", Path.unlink),
):
    moment("action and description", said, right, any_file("action_all/*.json", content))
moment(
    "action and description",
    "with a byte-order mark",
    edit=any_file("action_all/*.json", lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes())),
)
for said, right, content in (
    (
        "a scene in two parts",
        "is in train and",
        lambda s: s["nu_a2d"]["val"].extend(s["nu_a2d"]["train"]),
    ),
    (
        "a scene that is not there",
        "is not on disk",
        lambda s: s["nu_a2d"]["val"].append("scene-9999"),
    ),
    ("an unknown part", "no list of scene names", lambda s: s["nu_a2d"].update(valid=[])),
    ("a list as a number", "not a list of scenes", lambda s: s["nu_a2d"].update(val=7)),
    ("a split as null", "not a list of scenes", lambda s: s.update(nu_a2d=None)),
):
    moment("splits.json", said, right, lambda root, e=content: change(root / "splits.json", e))
for said, right, content in (
    ("brackets 100,000 deep", "nested too deeply", DEEP),
    ("a list", "holds a list", "[]"),
    ("a pipe", "is a pipe", pipe),
):
    moment("splits.json", said, right, put("splits.json", content))


def names_of(said, right, content, look=None):
    """A kind of file of label names."""

    def run(folder: Path):
        path = folder / "labels.yaml"
        content(path) if callable(content) else save(path, content)
        return look(read_names(path))

    KINDS.append(Kind("label names", said, "xad", right, run))


EIGHT = "descriptions: [a, b, c, d, e, f, g, h]\n"
names_of(
    "as YAML",
    "",
    f"actions: [go, halt, left, right]\n{EIGHT}",
    lambda n: n["actions"] == ("go", "halt", "left", "right") and len(n["descriptions"]) == 8,
)
names_of("a list twice", "is there twice", f"actions: [a, b, c, d]\nactions: [e, f, g, h]\n{EIGHT}")
names_of(
    "yes and no, which YAML takes for truth",
    "no list of names",
    f"actions: [yes, no, a, b]\n{EIGHT}",
)
names_of(
    "an alias bomb",
    "are allowed",
    "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
)
names_of("a Python object", "labels.yaml", "actions: !!python/object/apply:os.system [touch x]\n")
names_of("a pipe", "not a file", os.mkfifo)


def scan_of(said, right, content):
    """A kind of lidar scan; the doctor compares some with the boxes."""

    def run(folder: Path):
        data = xad.load(copy(folder, draw_scenes))
        frame = next(f for f in data.frames if os.path.exists(f.lidar))
        old = np.fromfile(frame.lidar, "<f4").reshape(-1, 5)
        path = Path(frame.lidar)
        content(path) if callable(content) else save(path, content)
        turn, shift = frame.lidar_to_ego
        return np.allclose(xad_scan(frame), old[:, :3] @ turn.T + shift, atol=1e-4)

    KINDS.append(Kind("lidar scan", said, "xad", right, run))


scan_of("as it should be", "", lambda p: None)
for said, right, content in (
    ("of odd length", "rows of 5", lambda p: p.write_bytes(p.read_bytes() + b"ab")),
    ("of four numbers a point", "rows of 5", lambda p: p.write_bytes(p.read_bytes()[: 16 * 4])),
    ("NaN", "lidar scan", np.full(5, np.nan, "<f4").tobytes()),
    ("empty", "lidar scan", b""),
    ("a pipe", "is a pipe", pipe),
    ("missing", "lidar scan is missing", Path.unlink),
    ("100 MB", "bytes, more than", lambda p: os.truncate(p, 10**8)),
):
    scan_of(said, right, content)


# ---- xad's frame of six pictures: a file that describes it


def draw_frame(root: Path) -> None:
    """A sound frame: JSON is YAML."""
    still = {"ego2global_rotation": [1, 0, 0, 0], "ego2global_translation": [5, 6, 0]}
    cams = {}
    for k, name in enumerate(xad.CAMERAS):
        save(root / f"imgs/{name}.jpg", picture(k))
        cams[name] = still | {
            "cam_intrinsic": [[1200, 0, 800], [0, 1200, 450], [0, 0, 1]],
            "sensor2ego_rotation": [1, 0, 0, 0],
            "sensor2ego_translation": [k, 0, 1],
        }
    pose = {"lidar2ego_rotation": [1, 0, 0, 0], "lidar2ego_translation": [0, 0, 2]}
    about = {
        "token": "t",
        "scene_token": "s",
        "cams": cams,
        "gt_names": ["car"],
        "ann_infos": [[[1, 2, 0, 4, 2, 1.5, 0, 0, 0]], [0]],
    }
    save(root / "sample0000.yaml", about | still | pose)
    save(root / "0.bin", np.ones((3, 5), "<f4").tobytes())


def one_frame(said, right="", edit=None):
    def run(folder: Path):
        root = copy(folder, draw_frame)
        edit and edit(root / "sample0000.yaml")
        frame = real.read_frame(root)
        good = frame.boxes.category == ("vehicle.car",) and np.allclose(
            frame.boxes.centre, [[1, 2, 0]]
        )
        return bool(
            good and np.allclose(frame.trans[:, 0], range(6)) and frame.intrins[3, 0, 0] == 1200
        )

    KINDS.append(Kind("description of a frame", said, "xad", right, run))


def cam(**fields) -> Callable:
    return lambda p: change(p, lambda c: c["cams"]["CAM_BACK"].update(fields))


one_frame("as it should be")
one_frame(
    "as plain YAML",
    edit=lambda p: p.write_text(__import__("yaml").safe_dump(json.loads(p.read_text()))),
)
for said, right, edit in (
    ("a zero quaternion", "sample0000.yaml", cam(sensor2ego_rotation=[0, 0, 0, 0])),
    ("a camera missing", "CAM_BACK", lambda p: change(p, lambda c: c["cams"].pop("CAM_BACK"))),
    ("NaN in K", "sample0000.yaml", cam(cam_intrinsic=[[NAN] * 3] * 3)),
    ("K of another size", "sample0000.yaml", cam(cam_intrinsic=[[1, 2], [3, 4]])),
    ("a place of two numbers", "sample0000.yaml", cam(sensor2ego_translation=[1, 2])),
    ("NaN in a place", "sample0000.yaml", cam(sensor2ego_translation=[1, 2, NAN])),
    (
        "more names than boxes",
        "sample0000.yaml",
        lambda p: change(p, lambda c: c["gt_names"].append("bus")),
    ),
    (
        "a NaN box",
        "sample0000.yaml",
        lambda p: change(p, lambda c: c["ann_infos"][0][0].__setitem__(0, NAN)),
    ),
    ("boxes as text", "sample0000.yaml", lambda p: change(p, lambda c: c.update(ann_infos="x"))),
    ("a list", "sample0000.yaml", lambda p: p.write_text("[]")),
    ("brackets 100,000 deep", "levels deep", lambda p: p.write_text(DEEP)),
    ("a pipe", "not a file", pipe),
    ("empty", "sample0000.yaml", lambda p: p.write_text("")),
):
    one_frame(said, right, edit)

# ---- openvocab: three pictures of 20 x 10, one box and five captions each

LISTED = {"train": "train.txt", "valid": "val.txt", "test": "test.txt"}
SIZE = "<size><width>{}</width><height>{}</height><depth>3</depth></size>"
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
BOX = f"<object><name>{{}}</name><bndbox>{CORNERS}</bndbox></object>"
CAPTION = "[/EN#7/people A man] walks [/EN#0/notvisual here] ."
LAST = 95  # the number of the picture to train on


def xml(*parts: str, size: str = SIZE.format(20, 10)) -> str:
    return f"<annotation>{size}{''.join(parts) or BOX.format(7, 3, 2, 10, 8)}</annotation>"


def draw_flickr(root: Path) -> None:
    """The files of a sound set."""
    for k, name in enumerate(LISTED.values()):
        save(root / name, f"{LAST + k}\n")
        save(root / f"flickr30k_images/{LAST + k}.jpg", np.full((10, 20, 3), COLOURS[k], np.uint8))
        save(root / f"Annotations/{LAST + k}.xml", xml())
        save(root / f"Sentences/{LAST + k}.txt", f"{CAPTION}\n" * 5)


def phrases_of(folder: Path):
    """All that training reads: (data, items of its parts)."""
    data, items = openvocab.load(folder), []
    for split, count in data.counts().items():
        if count:
            part = openvocab.PhraseDataset(data, split, train=False, image_size=32)
            items += [part[k] for k in range(count)]
    return data, items


def right_phrases(found, report=None, root=None) -> bool:
    data, items = found
    sample = data.part("train")[0]
    good = len(data.samples) == len(items) == 3 and data.counts() == {
        "train": 1,
        "valid": 1,
        "test": 1,
    }
    good &= [o.box for o in sample.objects] == [(2, 1, 9, 7)] and sample.objects[0].chains == ("7",)
    mention = sample.sentences[0].phrases[0]
    good &= len(sample.sentences) == 5 and sample.sentences[0].sentence == "A man walks here ."
    good &= (mention.phrase, mention.first_word_index, mention.phrase_id) == ("A man", 0, "7")
    shown = np.asarray(Image.open(sample.path).convert("RGB")).mean((0, 1))
    return bool(good and np.allclose(shown, COLOURS[0]))


def phrase(sort, said, right="", edit=None, look=right_phrases):
    """A kind of Flickr set: a sound one after edit(root)."""

    def run(folder: Path):
        root = copy(folder, draw_flickr)
        edit and edit(root)
        return look(*same(openvocab.check, phrases_of, root), root)

    KINDS.append(Kind(sort, said, "openvocab", right, run))


def boxes(said, right="", content=None, look=right_phrases):
    phrase(
        "Flickr annotation",
        said,
        right,
        None if content is None else put(f"Annotations/{LAST}.xml", content),
        look,
    )


def first_sample(look: Callable) -> Callable:
    return lambda found, report, root: look(found[0].part("train")[0], report)


ENTITIES = (
    "<!DOCTYPE a [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;'><!ENTITY c '&b;&b;&b;&b;&b;'>]>"
)
boxes("as it should be")
boxes(
    "with a declaration and a byte-order mark",
    content=b"\xef\xbb\xbf" + f"<?xml version='1.0' encoding='utf-8'?>{xml()}".encode(),
)
boxes("with Windows line ends", content=xml().replace("><", ">\r\n<"))
boxes("with spaces around numbers", content=xml(BOX.format(7, " 3 ", "\n2", 10, 8)))
boxes("with more elements", content=xml(BOX.format(7, 3, 2, 10, 8), "<segmented>0</segmented>"))
boxes(
    "a box that ends beyond the picture",
    content=xml(BOX.format(7, 3, 2, 99, 8)),
    look=first_sample(
        lambda s, r: "1 boxes end beyond" in str(r) and s.objects[0].box == (2, 1, 98, 7)
    ),
)
boxes(
    "a scene without a box",
    content=xml("<object><name>7</name><scene>1</scene><nobndbox>0</nobndbox></object>"),
    look=first_sample(lambda s, r: s.scene == ("7",) and not s.objects),
)
for said, right, content in (
    ("entities that multiply", "<!DOCTYPE", f"{ENTITIES}<annotation>&c;</annotation>"),
    (
        "an entity that names a file",
        "<!DOCTYPE",
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation>&x;</annotation>",
    ),
    ("entities in UTF-16", "not UTF-8", f"{ENTITIES}<annotation>&c;</annotation>".encode("utf-16")),
    ("entities in UTF-7", "95.xml", b"<?xml version='1.0' encoding='utf-7'?>+ADwAIQ-DOCTYPE a>"),
    ("elements 100,000 deep", "95.xml", "<a>" * 100_000),
    (
        "elements 100,000 deep and closed",
        "95.xml",
        f"<annotation>{'<a>' * 10**5}{'</a>' * 10**5}</annotation>",
    ),
    ("cut short", "not XML", xml()[:90]),
    ("empty", "not XML", ""),
    ("a pipe", "is a pipe", pipe),
    ("a folder", "is a folder", swap),
    ("missing", "annotation is missing", Path.unlink),
    ("no size", "width is missing", xml(size="")),
    ("a size of zero", "give pixels", xml(size=SIZE.format(0, 10))),
    ("a size in words", "width is 'wide'", xml(size=SIZE.format("wide", 1))),
    ("a size of 400 digits", "width is", xml(size=SIZE.format("9" * 400, 1))),
    ("another size than the picture", "its annotation says", xml(size=SIZE.format(30, 10))),
    ("a box outside", "is outside the 20x10", xml(BOX.format(7, 30, 2, 40, 8))),
    ("a negative box", "is outside", xml(BOX.format(7, -30, 2, -9, 8))),
    ("corners exchanged", "is inverted", xml(BOX.format(7, 10, 2, 3, 8))),
    ("a corner of NaN", "xmin is 'nan'", xml(BOX.format(7, "nan", 2, 3, 8))),
    ("a corner of 1e999", "xmin is '1e999'", xml(BOX.format(7, "1e999", 2, 3, 8))),
    ("a corner missing", "xmax is missing", xml(BOX.format(7, 3, 2, 10, 8).replace("xmax", "x"))),
    ("an object without name", "has no name", xml(BOX.format("", 3, 2, 10, 8))),
    ("an object without a box", "neither a box nor", xml("<object><name>7</name></object>")),
    ("another root", "width is missing", "<html></html>"),
):
    boxes(said, right, content)


def captions(said, right="", content=None, look=right_phrases):
    phrase("Flickr sentences", said, right, put(f"Sentences/{LAST}.txt", content), look)


FIVE = f"{CAPTION}\n" * 4
captions("with Windows line ends", content=f"{CAPTION}\r\n" * 5)
captions("with a byte-order mark", content=f"\ufeff{CAPTION}\n" + FIVE)
captions("with empty lines at the end", content=f"{CAPTION}\n" * 5 + "\n\n")
captions("without the last line end", content=(f"{CAPTION}\n" * 5).strip())
captions("with a line separator of Unicode in it", content=FIVE + CAPTION.replace(" .", " \u2028."))
captions("with 'next line' in it", content=FIVE + CAPTION.replace(" .", " \x85."))
captions(
    "with a word in brackets",
    content=f"{CAPTION}\n" * 4 + "a [sic] word",
    look=first_sample(lambda s, r: s.sentences[4].sentence == "a [sic] word"),
)
for said, right, content in (
    ("a bracket that is not closed", "is not closed", FIVE + "[/EN#7/people A man walks"),
    ("brackets within brackets", "is not closed", FIVE + "[/EN#7/people A [/EN#8/people man] ]"),
    ("a phrase without words", "is empty", FIVE + "[/EN#7/people ] walks"),
    ("a phrase without id", "opens no phrase", FIVE + "[/EN#/people A man] walks"),
    ("a phrase without type", "opens no phrase", FIVE + "[/EN#7 A man] walks"),
    ("an unknown type", "type 'peple' is unknown", FIVE + "[/EN#7/peple A man]"),
    ("a phrase within a word", "within a word", FIVE + "a[/EN#7/people A man]"),
    ("four captions", "4 captions, 5 are needed", FIVE),
    ("eight captions", "8 captions", FIVE * 2),
    ("an empty caption", "the caption is empty", "\n" + FIVE),
    ("not UTF-8", "not UTF-8", FIVE.encode() + b"caf\xe9"),
    ("in UTF-16", "not UTF-8", (FIVE + CAPTION).encode("utf-16")),
    ("empty", "0 captions", ""),
    ("a pipe", "is a pipe", pipe),
    ("a folder", "is a folder", swap),
    ("missing", "sentence file is missing", Path.unlink),
    ("100 MB", "bytes, more than", lambda p: os.truncate(p, 10**8)),
):
    captions(said, right, content)


def listing(said, right="", content=None, name="train.txt", look=right_phrases):
    phrase("list of pictures", said, right, put(name, content), look)


listing("with Windows line ends", content=f"{LAST}\r\n")
listing("with a byte-order mark", content=f"\ufeff{LAST}\n")
listing("with endings", content=f"{LAST}.jpg\n\n")
for said, right, content in (
    ("`..` in a name", "is no identity", "../95\n"),
    ("`..` alone", "is no identity", "..\n"),
    ("an absolute path", "is no identity", "/etc/passwd\n"),
    ("a picture twice", "stands in line 1", f"{LAST}\n{LAST}.jpg\n"),
    ("a picture of another part", "is in train.txt too", f"{LAST}\n{LAST + 1}\n"),
    ("two on a line", "is no identity", f"{LAST} 9\n"),
    ("an unknown picture", "is missing", f"{LAST}\n9999\n"),
    ("a NUL", "is no identity", f"{LAST}\n9\0" + "5\n"),
    ("a name of 9,000 letters", "is no identity", f"{LAST}\n{'a' * 9000}\n"),
    ("no pictures", "lists no picture", ""),
    ("not UTF-8", "not UTF-8", b"\xff\n"),
    ("a pipe", "is a pipe", pipe),
    ("missing", "list of pictures is missing", Path.unlink),
    ("a backslash", "is no identity", f"{LAST}\n..\\9\n"),
):
    listing(said, right, content)
for said, content in (
    ("unrelated captions", f"# id number\n{LAST} 2\n"),
    ("unrelated captions with a byte-order mark", f"\ufeff{LAST} 2\n"),
):
    listing(
        said,
        content=content,
        name="UNRELATED_CAPTIONS",
        look=first_sample(
            lambda s, r: [x.related for x in s.sentences] == [True, False, True, True, True]
        ),
    )
for said, right, content in (
    ("of the 6th caption", "names no caption", f"{LAST} 6\n"),
    ("in words", "names no caption", f"{LAST} two\n"),
    ("of a number of 5,000 digits", "names no caption", f"{LAST} {'9' * 5000}\n"),
    ("of ² captions", "names no caption", f"{LAST} ²\n"),
    ("not UTF-8", "not UTF-8", b"\xff\n"),
):
    listing(f"unrelated captions {said}", right, content, "UNRELATED_CAPTIONS")
phrase(
    "list of pictures",
    "a picture that is missing",
    f"{LAST}.jpg",
    put(f"flickr30k_images/{LAST}.jpg", Path.unlink),
)
phrase(
    "list of pictures",
    "linked pictures",
    "",
    lambda root: (
        (root / "flickr30k_images").rename(root.parent / "away"),
        (root / "flickr30k_images").symlink_to(root.parent / "away"),
    ),
    lambda f, r, root: right_phrases(f) and "3 of the files that are read lie outside" in str(r),
)

COCO_FILE = "annotations/instances_train2017.json"


def coco_set() -> dict:
    """Ten pictures, one of two categories in each."""
    return {
        "categories": [
            {"id": 1, "name": "cat"},
            {"id": 7, "name": "traffic light", "supercategory": "outdoor"},
        ],
        "images": [
            {"id": k, "file_name": f"{k:04d}.jpg", "width": 20, "height": 10} for k in range(10)
        ],
        "annotations": [
            {"id": k, "image_id": k, "category_id": (1, 7)[k % 2], "bbox": [k, 1, 4, 5.5]}
            for k in range(10)
        ],
    }


def draw_coco(root: Path) -> None:
    """The files of a sound set."""
    for k in range(10):
        save(root / f"train2017/{k:04d}.jpg", np.full((10, 20, 3), 25 * k, np.uint8))
    save(root / COCO_FILE, coco_set())


def right_instances(found, report=None, root=None) -> bool:
    data, items = found
    good = len(data.samples) == len(items) == 10 and all(data.counts().values())
    for k, sample in enumerate(sorted(data.samples, key=lambda s: s.id)):
        good &= sample.objects[0].box == (k, 1, k + 4, 6.5) and sample.objects[0].chains == (
            f"c{(1, 7)[k % 2]}",
        )
        good &= [m.phrase for m in sample.extra] == ["cat", "traffic light"] and len(
            sample.objects
        ) == 1
        good &= np.asarray(Image.open(sample.path)).mean() == 25 * k and not sample.crowds
    return bool(good)


def coco(said, right="", edit=None, look=right_instances, raw=None):
    """A kind of COCO file: edit(content), or another content."""

    def run(folder: Path):
        root = copy(folder, draw_coco)
        if raw is not None:
            put(COCO_FILE, raw)(root)
        elif edit:
            change(root / COCO_FILE, edit)
        return look(*same(openvocab.check, phrases_of, root), root)

    KINDS.append(Kind("COCO instances", said, "openvocab", right, run))


def of(key: str, place: int = 0, **fields) -> Callable:
    """Other fields of an entry."""
    return lambda c: c[key][place].update(fields)


coco("as they should be")
coco("with more keys", edit=lambda c: c.update(info={"year": 2017}, licenses=[]))
coco(
    "ids as text",
    edit=lambda c: (
        [i.update(id=str(i["id"])) for i in c["images"]]
        + [a.update(image_id=str(a["image_id"])) for a in c["annotations"]]
    ),
)
coco(
    "pictures without a size, which their files have",
    edit=lambda c: [(i.pop("width"), i.pop("height")) for i in c["images"]],
)
coco(
    "a crowd as run lengths",
    edit=lambda c: c["annotations"].append(
        {
            "id": 77,
            "image_id": 3,
            "category_id": 1,
            "iscrowd": 1,
            "bbox": [0, 0, 20, 10],
            "segmentation": {"counts": [9], "size": [10, 20]},
        }
    ),
    look=lambda f, r, root: sum(len(s.crowds) for s in f[0].samples) == 1 and "crowds" in str(r),
)
coco(
    "polygons beside the boxes",
    edit=lambda c: [
        a.update(segmentation=[[1, 2, 3, 4, 5, 6]], area=9.0) for a in c["annotations"]
    ],
)
coco(
    "a picture without annotations",
    edit=lambda c: c["annotations"].pop(),
    look=lambda f, r, root: len(f[1]) == 10 and "1 pictures have no box" in str(r),
)
for said, right, edit in (
    ("a picture's id twice", "is there twice", of("images", id=1)),
    ("a file twice", "is there twice", of("images", file_name="0001.jpg")),
    ("a picture that is missing", "9999.jpg", of("images", file_name="9999.jpg")),
    ("a picture without name", "no id or no file_name", of("images", file_name="")),
    ("a picture's name as a list", "file_name", of("images", file_name=["a"])),
    ("a picture's id as null", "no id", of("images", id=None)),
    ("a picture's id as a list", "no id", of("images", id=[1])),
    ("a picture's name of 9,000 letters", "can name no file", of("images", file_name="a" * 9000)),
    ("a picture's name with a NUL", "can name no file", of("images", file_name="0000\0.jpg")),
    ("another size than the picture", "its annotation says", of("images", width=30)),
    ("a box of NaN", "is no box", of("annotations", bbox=[NAN, 1, 2, 3])),
    ("a box of 400 digits", "is no box", of("annotations", bbox=[10**400, 1, 2, 3])),
    ("a box of three", "is no box", of("annotations", bbox=[1, 2, 3])),
    ("a box in words", "is no box", of("annotations", bbox="all")),
    ("a box of true", "is no box", of("annotations", bbox=[True, True, True, True])),
    ("a box outside", "is outside", of("annotations", bbox=[50, 1, 2, 3])),
    ("a negative width", "is inverted", of("annotations", bbox=[5, 1, -2, 3])),
    ("no box", "is no box", lambda c: c["annotations"][0].pop("bbox")),
    ("an unknown category", "category 9 is unknown", of("annotations", category_id=9)),
    ("a category as a list", "is unknown", of("annotations", category_id=[1])),
    ("an unknown picture", "image 99 is unknown", of("annotations", image_id=99)),
    ("a picture as an object", "is unknown", of("annotations", image_id={})),
    ("a category twice", "is there twice", of("categories", id=7)),
    ("a category without name", "write its name", of("categories", name="")),
    ("a category's name as a list", "name", of("categories", name=["cat"])),
    ("no categories", "is empty", lambda c: c["categories"].clear()),
    ("no pictures", "too few", lambda c: (c["images"].clear(), c["annotations"].clear())),
    ("annotations as an object", "has no annotations", lambda c: c.update(annotations={})),
    ("an entry as a number", "is no object", lambda c: c["images"].append(7)),
    ("iscrowd in words", "iscrowd", of("annotations", iscrowd="no")),
):
    coco(said, right, edit)
for said, right, raw in (
    ("brackets 100,000 deep", "nested too deeply", DEEP),
    ("a number of 5,000 digits", "instances", f'{{"images": [{"9" * 5000}]}}'),
    ("a list", "has no categories", "[]"),
    ("cut short", "is not JSON", '{"images": ['),
    ("empty", "is not JSON", ""),
    ("a pipe", "is a pipe", pipe),
    ("not UTF-8", "is not JSON", b'{"a": "\xff"}'),
):
    coco(said, right, raw=raw)
coco("with a byte-order mark", raw=lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()))


def move_picture(name: Callable) -> Callable:
    """A picture lies beside the set, and the file says where."""

    def edit(root: Path):
        new = Path(shutil.move(root / "train2017/0000.jpg", root.parent / "a.jpg"))
        change(root / COCO_FILE, of("images", file_name=name(new)))

    return edit


def away_coco(said, name):
    def run(folder: Path):
        root = copy(folder, draw_coco)
        move_picture(name)(root)
        found, report = same(openvocab.check, phrases_of, root)
        return len(found[1]) == 10 and "1 of the files that are read lie outside" in str(report)

    KINDS.append(Kind("COCO instances", said, "openvocab", "", run))


away_coco("an absolute path elsewhere", str)
away_coco("`..` in a path", lambda new: f"../../{new.name}")

# ---- openvocab's text encoders: a folder of transformers, and what it said of some phrases

WORDS_OF = ("a", "cat", "dog", "man", "walks")


def draw_encoder(root: Path) -> None:
    """A small random BERT, and its pack of two phrases."""
    write_random_encoder(root / "bert", WORDS_OF)
    PretrainedText(root / "bert").remember(["a cat", "dog"], root / "packs")


def encode(root: Path) -> np.ndarray:
    encoder = PretrainedText(root / "bert")
    encoder.remember(["a cat", "dog"], root / "packs")
    tokens, mask, pooled = encoder.encode(["dog", "a cat"])
    return np.concatenate([tokens[mask].numpy().ravel(), pooled.numpy().ravel()])


def encoder(sort, said, right="", edit=None):
    """A kind of encoder's folder or pack; read right: the vectors are those of the sound one."""

    def run(folder: Path):
        root = copy(folder, draw_encoder)
        edit and edit(root)
        found = encode(root)
        return np.allclose(found, encode(drawn(draw_encoder)), atol=1e-6)

    KINDS.append(Kind(sort, said, "openvocab", right, run))


def pack(name: str, content) -> Callable:
    """Another content of an array of the pack."""

    def edit(root: Path):
        (path,) = (root / "packs").glob(f"*/*/{name}.npy")
        content(path) if callable(content) else save(path, content)

    return edit


encoder("pack of phrases", "as it should be")
encoder(
    "pack of phrases",
    "of another encoder",
    edit=lambda root: next((root / "packs").glob("*")).rename(root / "packs/other"),
)
for said, edit in (
    ("NaN vectors", pack("states", lambda p: np.save(p, np.load(p) * np.nan))),
    ("another width", pack("pooled", array(np.zeros((2, 8), "f4")))),
    ("fewer tokens than it says", pack("states", lambda p: np.save(p, np.load(p)[1:]))),
    ("lengths that do not fit", pack("lengths", array(np.array([1, 99])))),
    ("objects", pack("pooled", array(np.array([[None]] * 2)))),
    ("cut short", pack("states", lambda p: os.truncate(p, 200))),
    ("missing", pack("pooled", Path.unlink)),
    ("a pipe", pack("pooled", pipe)),
    ("terabytes by a header", pack("states", npy((10**6, 10**6)))),
):
    encoder("pack of phrases", f"{said}: made again", "", edit)
encoder("text encoder", "with a file beside that nobody reads", edit=put("bert/.DS_Store", b"x"))
for said, right, edit in (
    ("no config.json", "no config.json", put("bert/config.json", Path.unlink)),
    ("a config 100,000 brackets deep", "nested too deeply", put("bert/config.json", DEEP)),
    ("an unknown type", "holds no text encoder", put("bert/config.json", '{"model_type": "x"}')),
    ("a type as a list", "holds no text encoder", put("bert/config.json", '{"model_type": [1]}')),
    ("no type", "holds no text encoder", put("bert/config.json", "{}")),
    (
        "weights cut short",
        "holds no text encoder",
        put("bert/model.safetensors", lambda p: os.truncate(p, 5000)),
    ),
    ("weights of text", "holds no text encoder", put("bert/model.safetensors", "weights")),
    ("no weights", "holds no text encoder", put("bert/model.safetensors", Path.unlink)),
    ("a tokenizer of text", "holds no text encoder", put("bert/tokenizer.json", "{")),
    (
        "another width than its weights",
        "holds no text encoder",
        lambda root: change(root / "bert/config.json", lambda c: c.update(hidden_size=64)),
    ),
    (
        "more layers than its weights",
        "its weights lack",
        lambda root: change(root / "bert/config.json", lambda c: c.update(num_hidden_layers=3)),
    ),
    ("NaN weights", "NaN", lambda root: spoil_weights(root / "bert/model.safetensors")),
):
    encoder("text encoder", said, right, edit)


def spoil_weights(path: Path) -> None:
    """NaN in the first matrix."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(path)
    name = next(n for n, v in weights.items() if v.ndim > 1)
    weights[name] = spoil(weights[name], np.nan)
    save_file(weights, path, metadata={"format": "pt"})


# ---- more of the same sorts, found by attacks

meta(
    "image_size of 400 digits",
    "image_size",
    sample(lambda s: s.update(image_size=[10**400, 10**400])),
)
sensor(
    "points of which some are NaN",
    "",
    read_points,
    "a.npz",
    npz(data=np.r_[POINTS, [[np.nan, 0, 0]]].astype(np.float32)),
    lambda x: np.array_equal(x, POINTS),
)
cube("values of 1e300", "above 1e15", array(CUBE.astype(complex) * 1e300))
moment(
    "splits.json",
    "a part as text",
    "no list of scene names",
    lambda root: change(root / "splits.json", lambda s: s["nu_a2d"].update(val="scene-0008")),
)
moment("label names", "in the set: a pipe", "not a file", put("labels.yaml", pipe))
moment("label names", "in the set: too deep", "levels deep", put("labels.yaml", "[" * 900))
coco("a picture's name with half a character", "can name no file", of("images", file_name="\ud800"))
coco("a category's name with half a character", "write its name", of("categories", name="\ud800"))
coco("a category as true", "is unknown", of("annotations", category_id=True))


def beside(said, right, content, look=right_instances):
    """A kind of captions beside the instances."""

    def run(folder: Path):
        root = copy(folder, draw_coco)
        path = root / COCO_FILE.replace("instances", "captions")
        content(path) if callable(content) else save(path, content)
        return look(*same(openvocab.check, phrases_of, root), root)

    KINDS.append(Kind("COCO captions", said, "openvocab", right, run))


def caption(**fields) -> dict:
    return {"annotations": [{"id": 5, "image_id": 3, "caption": "A cat ."} | fields]}


beside(
    "as they should be",
    "",
    caption(),
    lambda f, r, root: (
        [x.sentence for s in f[0].samples for x in s.sentences] == ["A cat ."]
        and right_instances(f)
    ),
)
for said, right, content in (
    ("of an unknown picture", "image 99 is unknown", caption(image_id=99)),
    ("a caption as a list", "is no text", caption(caption=["a", "b"])),
    ("an empty caption", "is no text", caption(caption=" ")),
    ("half a character", "is no text", caption(caption="\ud800")),
    ("no annotations", "has no annotations", {}),
    ("brackets 100,000 deep", "nested too deeply", DEEP),
    ("a pipe", "is a pipe", os.mkfifo),
):
    beside(said, right, content)
