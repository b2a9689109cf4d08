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
from pathlib import Path

import numpy as np
from PIL import Image

from kinds import Kind
from leansense.beam import data as beam
from leansense.beam import features, positions
from leansense.beam import layouts as windows
from leansense.beam.standin import make_row, name_files
from leansense.openvocab import data as openvocab
from leansense.openvocab import flickr
from leansense.simbev import data as simbev
from leansense.simbev.layouts import CAMERAS
from leansense.simbev.overlap import read_depth, read_points
from leansense.simbev.standin import _describe_sensors, describe_rig
from leansense.world.camera import nuscenes_rig, simbev_rig
from leansense.xad import data as xad
from leansense.xad import frame as real
from leansense.xad.labels import read_list, read_map, read_names
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


def drive(said, right="", edit=None, layout="native", sort="SimBEV infos", look=right_frames, **made):
    """A kind of SimBEV set: a sound one after edit(root)."""

    def run(folder: Path):
        root = plain(folder, layout, **made)
        edit and edit(root)
        found, report = same(simbev.check, frames_of, root)
        return look(found) if look.__code__.co_argcount < 3 or look is right_frames else (
            look(found, report, root))  # fmt: skip

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
    drive(f"a config within the infos with {json.dumps(value)[:12]}", "bev_res is",
          scene(lambda s, v=value: s["scene_info"].update(config={"bev_res": v})))  # fmt: skip
drive("a config in flow style", edit=config("{map: x, bev_res: 0.5, bev_dim: 200}\n"))
drive("a config with its sizes further down", edit=config("a:\n  bev:\n    bev_res: 0.5\n"))
drive("a config as JSON within the infos",
      edit=scene(lambda s: s["scene_info"].update(config={"bev_res": 0.5, "bev_dim": 200})))  # fmt: skip
drive("a config with Windows line ends", edit=config("bev_dim: 200\r\nbev_res: 0.5\r\n"))
drive("a config with a byte-order mark", edit=config("\ufeffbev_res: 0.5\n"))
drive("a config of another number of cells", "200 cells a side, not 300",
      config("bev_res: 0.5\nbev_dim: 300\n"))  # fmt: skip
drive("a config that says two cell sizes", "bev_res", config("a: {bev_res: 0.5}\nb: {bev_res: 1}\n"))
drive("a config with a cell of 0 m", "bev_res is", config("bev_res: 0\n"))
drive("a config with a cell of .nan m", "bev_res is", config("bev_res: .nan\n"))
drive("a config with a cell in words", "bev_res is", config("bev_res: half a metre\n"))
drive("a config with 200.5 cells", "bev_dim is", config("bev_dim: 200.5\nbev_res: 0.5\n"))
drive("a config that is no YAML", "configs/scene_0000.yaml", config("a: [bev_res: 0.5\n"))
drive("a config that is an alias bomb", "configs/scene_0000.yaml", config(
    "x: {bev_res: 0.5}\na: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))))  # fmt: skip
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


drive("no config, cells of 0.4 m", edit=no_config, look=lambda f, r, root: (
    "label cells are taken as 0.4 m" in str(r) and "its config is not there" in str(r)),
    res=0.4, side=360)  # fmt: skip


def say_half(folder: Path):
    """A declared cell size: refused where the config says another one."""
    root = plain(folder, "native", 0.25, 400)
    return simbev.load(root, resolution=0.5)


KINDS.append(Kind("SimBEV infos", "a declared cell size that the config denies", "simbev",
                  "data_resolution=0.5", say_half))  # fmt: skip


def say_right(folder: Path):
    """A declared cell size where no config is."""
    root = plain(folder, "native", 0.25, 400)
    no_config(root)
    data = simbev.load(root, resolution=0.25)
    part = simbev.SimBEVDataset(data, "train", augment="none", size=(56, 120), final=(48, 96))
    return np.array_equal(part[0]["target"].numpy()[0] > 0, WANTED)


KINDS.append(Kind("SimBEV infos", "a declared cell size without a config", "simbev", "", say_right))

for value, what in ((None, "null"), ("0012a", "text"), (float("nan"), "NaN"), ([1], "a list"),
                    (-1, "negative"), (1.5, "half"), (True, "true"), ({}, "an object")):  # fmt: skip
    drive(f"frame number: {what}", "frame is", entry(lambda e, v=value: e.update(frame=v)))
drive("frame number: missing", "frame is missing", entry(lambda e: e.pop("frame")))
drive("a frame twice", "occurs twice", scene(lambda s: s["scene_data"].append(s["scene_data"][0])))
for value in (None, 1.5, "x", {}, [], [None], [[]]):
    drive(f"scene_data is {json.dumps(value)}", "scene_0000",
          scene(lambda s, v=value: s.update(scene_data=v)))  # fmt: skip
drive("a scene that is a number", "scene_0000",
      lambda root: change(first(root), lambda i: i["data"].update(scene_0000=7)))  # fmt: skip
for value in (None, 3, "x", [], [1]):
    drive(f"data is {json.dumps(value)}", "missing data of scenes",
          lambda root, v=value: change(first(root), lambda i: i.update(data=v)))  # fmt: skip
    drive(f"metadata is {json.dumps(value)}", "missing metadata",
          lambda root, v=value: change(first(root), lambda i: i.update(metadata=v)))  # fmt: skip
for value in (5, "text", [1, 2], True):
    drive(f"a camera's metadata is {json.dumps(value)}", "CAM_FRONT",
          metadata(lambda m, v=value: m.update(CAM_FRONT=v)))  # fmt: skip
    drive(f"scene_info is {json.dumps(value)}", edit=scene(lambda s, v=value: s.update(scene_info=v)),
          look=lambda f, r, root: "no config says bev_res" in str(r), res=0.4, side=360)  # fmt: skip
for value in ("matrix", [[1, 2], [3]], None, [[[1] * 3] * 3] * 6, {"a": 1}, [[1e999] * 3] * 3):
    drive(f"camera_intrinsics is {json.dumps(value)[:24]}", "camera_intrinsics",
          metadata(lambda m, v=value: m.update(camera_intrinsics=v)))  # fmt: skip
drive("K with NaN", "holds NaN", metadata(lambda m: m["camera_intrinsics"][0].__setitem__(0, float("nan"))))
drive("K with numbers of 400 digits", "camera_intrinsics",
      metadata(lambda m: m["camera_intrinsics"][0].__setitem__(0, 10**400)))  # fmt: skip
drive("K for other pictures", "principal point",
      metadata(lambda m: m.update(camera_intrinsics=[[800, 0, 800], [0, 800, 450], [0, 0, 1]])))  # fmt: skip
for name, value in (("zero", [0, 0, 0, 0]), ("NaN", [float("nan"), 0, 0, 0]), ("of three", [1, 0, 0]),
                    ("in words", "w x y z")):  # fmt: skip
    drive(f"a camera's quaternion: {name}", "CAM_FRONT",
          metadata(lambda m, v=value: m["CAM_FRONT"].update(sensor2ego_rotation=v)))  # fmt: skip


def turned(folder: Path):
    """Cameras that look to another side than their names say: the doctor asks what they see."""
    root = plain(folder, "native")
    metadata(lambda m: m.update(CAM_FRONT=m["CAM_BACK"], CAM_BACK=m["CAM_FRONT"]))(root)
    simbev.check(root).raise_if_bad()


KINDS.append(Kind("SimBEV infos", "cameras that look to another side", "simbev",
                  "looks 180 degrees", turned))  # fmt: skip


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
    drive(f"K by camera's name{', no common one' * gone}", edit=by_name(gone=gone),
          look=lambda f, r, root: right_frames(f, k=OWN))  # fmt: skip
drive("K by camera's name, five of six", "none of CAM_FRONT_LEFT", by_name(names=CAMERAS[1:]))
for value in ([1], "x", 5):
    drive(f"K by camera's name is {json.dumps(value)}", "intrinsics by name",
          metadata(lambda m, v=value: m.update(camera_intrinsics_by_name=v)))  # fmt: skip
drive("distortion that is not read", "geometry that is not read",
      metadata(lambda m: m["CAM_FRONT"].update(distortion=[0.1, 0.2])))  # fmt: skip
drive("a 5-camera rig", "its cameras are RGB-CAM_BACK_LEFT, RGB-CAM_BACK_RIGHT, RGB-CAM_FRONT,",
      each_entry(lambda e: e.pop("RGB-CAM_BACK")))  # fmt: skip
drive("a 1-camera rig", "its cameras are RGB-CAM_FRONT",
      each_entry(lambda e: [e.pop(f"RGB-CAM_{c.upper()}") for c in CAMERAS if c != "front"]))  # fmt: skip


def twelve(root: Path) -> None:
    """Six more cameras, named to sort before the others, with pictures of another colour."""
    save(root / "sweeps/RGB-CAM_A/a-RGB-CAM_A.jpg", np.full((56, 120, 3), 255, np.uint8))
    more = {f"RGB-CAM_A{c.upper()}": "/d/sweeps/RGB-CAM_A/a-RGB-CAM_A.jpg" for c in CAMERAS}
    for path, infos in entries_of(root):
        for about in infos["data"].values():
            about["scene_data"] = [more | e for e in about["scene_data"]]
        infos["metadata"] = {f"CAM_A{c.upper()}": infos["metadata"]["CAM_BACK"]
                             for c in CAMERAS} | infos["metadata"]  # fmt: skip
        path.write_text(json.dumps(infos))


drive("a 12-camera rig", edit=twelve,
      look=lambda f, r, root: right_frames(f) and "cameras that are not read: RGB-CAM_AB" in str(r))  # fmt: skip
drive("paths of a moved root", edit=each_entry(lambda e: e.update(
    {k: f"C:\\disk\\simbev\\{v[3:]}".replace("/", "\\") for k, v in e.items() if k != "frame"})))  # fmt: skip
drive("paths relative to the set", edit=each_entry(
    lambda e: e.update({k: v[3:] for k, v in e.items() if k != "frame"})))  # fmt: skip
drive("a path with nothing of the layout in it", "let its path name what lies below",
      entry(lambda e: e.update({"RGB-CAM_FRONT": "/disk/other/a.jpg"})))  # fmt: skip
for value in (None, 5, ["a"], ""):
    drive(f"a picture's path is {json.dumps(value)}", "RGB-CAM_FRONT" if value != "" else "image",
          entry(lambda e, v=value: e.update({"RGB-CAM_FRONT": v})))  # fmt: skip
drive("a picture's path with a NUL", "image is missing",
      entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/a\0b.jpg"})))  # fmt: skip
drive("a picture's path with half a character", "image is missing",
      entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/a\ud800.jpg"})))  # fmt: skip
drive("a picture's path of 100,000 letters", "image is missing",
      entry(lambda e: e.update({"RGB-CAM_FRONT": f"/d/sweeps/{'a' * 100_000}"})))  # fmt: skip
drive("a picture's path with terminal escapes", "image is missing",
      entry(lambda e: e.update({"RGB-CAM_FRONT": "/d/sweeps/\x1b[31m.jpg"})))  # fmt: skip


def warned(found, report, root) -> bool:
    return right_frames(found) and "lie outside this folder" in str(report)


def move_out(name: str) -> Callable:
    """A file of the set moved beside it, a link in its place."""

    def edit(root: Path):
        (root / name).rename(root.parent / "away")
        (root / name).symlink_to(root.parent / "away")

    return edit


drive("a linked picture outside", edit=move_out("sweeps/RGB-CAM_FRONT/f0-RGB-CAM_FRONT.jpg"), look=warned)
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
for text, said, what in ((DEEP, "nested too deeply", "brackets 100,000 deep"),
                         ("9" * 5000, "infos", "a number of 5,000 digits"), ("", "is not JSON", "an empty file"),
                         ("[1]", "holds a list", "a list"), ("{", "is not JSON", "cut short"),
                         ("\ud800", "is not JSON", "not UTF-8")):  # fmt: skip
    drive(f"infos: {what}", said, lambda root, t=text: first(root).write_bytes(
        t.encode("utf-8", "surrogatepass")))  # fmt: skip
drive("infos with a byte-order mark",
      edit=lambda root: first(root).write_bytes(b"\xef\xbb\xbf" + first(root).read_bytes()))  # fmt: skip
drive("infos in UTF-16", edit=lambda root: first(root).write_text(first(root).read_text(), "utf-16"))
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
meta("pictures in another order, their names tell",
     edit=sample(lambda s: s.update({k: s[k][::-1] for k in ("images", "intrinsics", "extrinsics")})))  # fmt: skip
meta("a path with backslashes",
     edit=sample(lambda s: s.update(images=[n.replace("/", "\\") for n in s["images"]])))  # fmt: skip
for name, value in (("images", {}), ("images", "x"), ("images", [1] * 6), ("intrinsics", "x"),
                    ("intrinsics", {}), ("extrinsics", [[1, 2], [3]]), ("extrinsics", None), ("label", 5),
                    ("label", ["x"]), ("token", None), ("token", []), ("image_size", [1, 2, 3]),
                    ("image_size", ["a", "b"]), ("image_size", [0, 5])):  # fmt: skip
    meta(f"{name} is {json.dumps(value)[:20]}", "image" if name == "images" else name,
         sample(lambda s, n=name, v=value: s.update({n: v})))  # fmt: skip
meta("NaN in a matrix", "holds NaN", sample(lambda s: s["extrinsics"][2][0].__setitem__(0, float("nan"))))
meta("a matrix that is no motion", "is not rigid",
     sample(lambda s: s["extrinsics"][2][0].__setitem__(0, 9.0)))  # fmt: skip
meta("five cameras", "5 images (front_left",
     sample(lambda s: [s[k].pop() for k in ("images", "intrinsics", "extrinsics")]))  # fmt: skip
meta("twelve cameras", "12 images", sample(lambda s: s.update(images=s["images"] * 2)))
meta("an entry that is a number", "sample 0",
     lambda root: change(root / TOP / "meta.json", lambda m: m.insert(0, 7)))  # fmt: skip
meta("a token twice", "occurs twice",
     lambda root: change(root / TOP / "meta.json", lambda m: m.append(m[0])))  # fmt: skip
meta("brackets 100,000 deep", "nested too deeply", lambda root: save(root / TOP / "meta.json", DEEP))
meta("a pipe", "is a pipe", lambda root: pipe(root / TOP / "meta.json"))
meta("a folder", "is a folder", lambda root: swap(root / TOP / "meta.json"))


def away(root: Path) -> None:
    save(root.parent / "away.jpg", picture(0))
    sample(lambda s: s["images"].__setitem__(0, str(root.parent / "away.jpg")))(root)


meta("an absolute path elsewhere", edit=away, look=lambda f, r, root: (
    right_frames(f) and "lie outside this folder" in str(r)))  # fmt: skip
drive("as it should be", layout="converted", sort="SimBEV meta.json, converted")
drive("one scene only", "1 scenes", lambda root: [
    shutil.rmtree(root / f"SimBEV_cvt_label/scene_000{k}") for k in (1, 2)],
    "converted", "SimBEV meta.json, converted")  # fmt: skip
drive("no meta.json in a scene", "there is yaw9pitch0", lambda root: (
    root / "SimBEV_cvt_label/scene_0000/yaw0pitch0").rename(
    root / "SimBEV_cvt_label/scene_0000/yaw9pitch0"), "converted", "SimBEV meta.json, converted")  # fmt: skip

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
seg("14 classes of 5,000 cells", "5000 cells a side", npz(data=np.zeros((14, 5000, 1), bool) *
                                                          np.zeros((1, 1, 5000), bool)))  # fmt: skip
seg("seven classes", "has shape (7, 200, 200)", npz(data=label()[:7]))
seg("no square", "has shape (8, 200, 100)", npz(data=label()[:, :, :100]))
seg("values up to 255", "other values than 0 and 1", npz(data=label().astype(np.uint8) * 255))
seg("NaN", "other values than 0 and 1", npz(data=np.full((8, 200, 200), np.nan, np.float32)))
seg("Python objects", "Python objects", npz(data=np.array([[None]])))
seg("text", "not of numbers", npz(data=np.array([["a"]])))
seg("complex numbers", "type complex", npz(data=label().astype(complex)))
seg("cut short", "label", npz(data=label())[:300])
seg("one byte changed", "label", edit=lambda p: p.write_bytes(
    p.read_bytes()[:200] + bytes([p.read_bytes()[200] ^ 255]) + p.read_bytes()[201:]))  # fmt: skip
seg("empty", "is empty", b"")
seg("a pipe", "label is", edit=pipe)
seg("a folder", "label is", edit=swap)
seg("a picture", "label", edit=lambda p: save(p, picture(0)))
seg("smaller than the map", "reaches beyond the label", edit=lambda p: (
    save(p, npz(data=label(0.5, 100))), config("bev_res: 0.5\n")(p.parents[2])))  # fmt: skip


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
sensor("points (n, 3)", "", read_points, "a.npz", npz(data=POINTS), lambda x: np.array_equal(x, POINTS))
sensor("points as float64 with intensity", "", read_points, "a.npz",
       npz(data=np.c_[POINTS, POINTS].astype(float)), lambda x: np.array_equal(x, POINTS))  # fmt: skip
sensor("points as whole numbers", "not (n, 3) numbers", read_points, "a.npz", npz(data=POINTS.astype(int)))
sensor("points as objects", "Python objects", read_points, "a.npz", npz(data=np.array([[None] * 3])))
sensor("points as a pipe", "is a pipe", read_points, "a.npz", os.mkfifo)
sensor("depth in three channels", "", read_depth, "a.png", np.full((4, 4, 3), (0, 0, 1), np.uint8),
       lambda x: np.allclose(x, 65536 * 1000 / (2**24 - 1)))  # fmt: skip
sensor("depth cut short", "a.png", read_depth, "a.png", lambda p: p.write_bytes(
    save(p, picture(0)).read_bytes()[:60]))  # fmt: skip
