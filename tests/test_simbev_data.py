"""SimBEV recordings: faults and their words, layouts, conventions, augmentation, cache."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import message
from leansense.core.loader import loader
from leansense.core.parameters import read_parameters
from leansense.core.paths import data_root
from leansense.core.rows import read_rows
from leansense.layers.conventions import (
    EXTRINSICS,
    FLIPS,
    INPUTS,
    INTRINSICS,
    camera_to_ego,
    check_intrinsics,
    check_rigid,
    ego_to_camera,
    orient_label,
    quaternion_to_matrix,
    resample_label,
    scale_intrinsics,
)
from leansense.layers.image_augment import (
    Augment,
    Choice,
    augment_image,
    choose_middle,
    draw_choices,
    make_matrix,
    place_crop,
)
from leansense.layers.lift_splat import project
from leansense.simbev import data as simbev
from leansense.simbev.data import AUGMENTS
from leansense.simbev.frames import cache_pixels
from leansense.simbev.layouts import (
    CAMERAS,
    CLASSES,
    find_camera,
    locate,
    order_cameras,
    parse_classes,
    pick_classes,
    read_label,
    reroot,
)
from leansense.simbev.overlap import read_depth, splat_overlap
from leansense.simbev.standin import DRAWN, encode_depth, make_shots, parse_size, standin

pytestmark = pytest.mark.usefixtures("own_data_root")
SMALL = dict(n=8, size="240x112")  # four scenes of two frames: two train, one validates, one tests
FAST = dict(size=(112, 240), final=(64, 176))
LAYOUTS = ("published", "converted", "native")


@pytest.fixture(scope="module")
def folders(own_data_root):
    return {layout: standin(**SMALL, layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def folder(folders):
    return folders["published"]


@pytest.fixture()
def copies(folders, tmp_path):
    """A function that gives a copy of the stand-in in a layout, to be broken."""
    return lambda layout="published": Path(
        shutil.copytree(folders[layout], tmp_path / f"my {layout}")
    )


@pytest.fixture(scope="module")
def street(own_data_root):
    """A larger native stand-in with depth, for the tests of conventions."""
    return simbev.load(standin(n=16, size="240x112", layout="native"))


def change(path, edit):
    """Rewrite a JSON file after `edit(content)`."""
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))


def meta_of(folder):
    return folder / "train" / "scene_0000" / "yaw0pitch0" / "meta.json"


# ---- faults: each in one line, with the place and the remedy, from the loader and from the check


def drop(key):
    return lambda entries: entries[1].pop(key)


def put(name, *place, value):
    def edit(entries):
        inner = entries[1][name]
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value

    return edit


DESCRIPTIONS = {
    "token": (drop("token"), "missing token"),
    "images": (drop("images"), "missing images"),
    "intrinsics": (drop("intrinsics"), "missing intrinsics"),
    "extrinsics": (drop("extrinsics"), "missing extrinsics"),
    "label": (drop("label"), "missing label"),
    "five images": (lambda entries: entries[1]["images"].pop(), "5 images"),
    "five matrices": (
        lambda entries: entries[1]["intrinsics"].pop(),
        "intrinsics is of shape (5, 3, 3)",
    ),
    "text": (put("extrinsics", 2, value="x"), "extrinsics is no array of numbers"),
    "nan K": (put("intrinsics", 3, 0, 0, value=math.nan), "intrinsics of back_left holds NaN"),
    "inf E": (
        put("extrinsics", 0, 1, 3, value=math.inf),
        "extrinsics of front_left holds NaN or infinity",
    ),
    "scaled E": (put("extrinsics", 1, 0, 1, value=0.5), "extrinsics of front is not rigid"),
    "no affine": (
        put("extrinsics", 1, 3, value=[0, 0, 1, 1]),
        "extrinsics of front does not end with the row 0 0 0 1",
    ),
    "twice": (lambda entries: entries[1].update(token=entries[0]["token"]), "occurs twice"),
    "size": (lambda entries: entries[1].update(image_size=[1600, 0]), "image_size [1600, 0]"),
    "sample": (lambda entries: entries.__setitem__(1, 7), "missing token, images"),
    "empty": (lambda entries: entries.clear(), "holds no sample"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_faults_of_a_description(copies, name):
    folder = copies()
    edit, said = DESCRIPTIONS[name]
    change(meta_of(folder), edit)
    text = message(ValueError, simbev.load, folder)
    assert said in text and str(meta_of(folder)) in text and "; " in text
    report = simbev.check(folder)
    assert not report.ok and any(said in str(problem) for problem in report.errors)


def test_a_mirrored_camera_is_not_rigid(copies):
    folder = copies()
    change(
        meta_of(folder),
        lambda entries: [row.__setitem__(0, -row[0]) for row in entries[0]["extrinsics"][0][:3]],
    )
    assert "mirror image" in message(ValueError, simbev.load, folder)


@pytest.mark.parametrize("content", ["{", "{}", '"x"', "\x00"])
def test_a_meta_that_is_no_list(copies, content):
    folder = copies()
    meta_of(folder).write_text(content)
    text = message(ValueError, simbev.load, folder)
    assert "meta.json" in text and ("not JSON" in text or "not a list" in text)


def test_missing_and_empty_files(copies):
    folder = copies()
    first, second = simbev.load(folder).frames[:2]
    Path(first.images[4]).unlink()
    assert first.images[4] in message(FileNotFoundError, simbev.load, folder)
    Path(second.label).write_bytes(b"")
    report = simbev.check(folder)
    assert [p.path for p in report.errors[:2]] == [
        first.images[4],
        second.label,
    ] and "0 bytes" in report.errors[1].what
    shutil.rmtree(Path(first.images[0]).parent)
    said = [str(problem) for problem in simbev.check(folder).errors]
    assert sum("image is missing" in text for text in said) == 10 and any(
        "2 more image files" in text for text in said
    )


def test_truncated_jpeg_stops_the_cache_and_leaves_nothing(copies):
    folder = copies()
    data = simbev.load(folder)
    victim = Path(data.frames[1].images[2])
    victim.write_bytes(victim.read_bytes()[:-200])
    before = set((data_root() / "cache" / "simbev").glob("*pixels*"))
    text = message(ValueError, simbev.SimBEVDataset, simbev.load(folder), "valid", **FAST)
    assert str(victim) in text and "cannot be decoded" in text
    assert {
        p for p in (data_root() / "cache" / "simbev").glob("*pixels*") if p.suffix == ".npy"
    } <= before
    assert [str(victim)] == [p.path for p in simbev.check(folder).errors]


LABELS = {
    "channels": (np.zeros((7, 200, 200), np.uint8), "(7, 200, 200), not (C, d, d)"),
    "flat": (np.zeros(40000), "has shape (40000,)"),
    "oblong": (np.zeros((8, 200, 100)), "has shape (8, 200, 100)"),
    "side": (np.zeros((8, 360, 360)), "has 360 cells a side, not 200"),
    "values": (np.full((8, 200, 200), 3), "other values than 0 and 1"),
    "nan": (np.full((200, 200), np.nan), "other values than 0 and 1"),
    "words": (np.full((200, 200), "car"), "not of numbers"),
}


@pytest.mark.parametrize("name", LABELS)
def test_faults_of_a_label(copies, name):
    folder = copies()
    array, said = LABELS[name]
    frame = simbev.load(folder).part("valid")[0]
    np.save(frame.label, array)
    text = message(
        ValueError, lambda: simbev.SimBEVDataset(simbev.load(folder), "valid", **FAST)[0]
    )
    assert said in text and frame.label in text
    assert [(p.path, said in p.what) for p in simbev.check(folder).errors] == [(frame.label, True)]


@pytest.mark.parametrize("layout", ["converted", "native"])
def test_pickles_are_refused(copies, layout):
    folder = copies(layout)
    frame = simbev.load(folder).frames[0]
    np.savez(frame.label, **{frame.key: np.array([{"type": "car"}] * 8, dtype=object)})
    assert "holds Python objects, which could run code when loaded" in message(
        ValueError, read_label, frame
    )
    report = simbev.check(folder)
    assert [p.path for p in report.errors] == [frame.label]
    np.savez(frame.label, other=np.zeros((8, 200, 200)))
    assert f"no array '{frame.key}', only other" in message(ValueError, read_label, frame)
    Path(frame.label).write_bytes(b"PK nonsense")
    assert frame.label in message(ValueError, read_label, frame)


def test_a_pickled_box_file_is_no_label(copies):
    folder = copies("native")
    infos = folder / "infos" / "simbev_infos_train.json"
    change(infos, lambda c: c["data"]["scene_0000"]["scene_data"][0].pop("GT_SEG"))
    text = message(ValueError, simbev.load, folder)
    assert (
        "missing GT_SEG" in text and "GT_DET is a pickle" in text and "scene_0000 frame 0" in text
    )


def turned(sensor, name, value):
    return lambda c: c["metadata"][sensor].update({f"sensor2ego_{name}": value})


def scene_of(content, name="scene_0001"):
    return content["data"][name]


def first_frame(**values):
    return lambda c: scene_of(c)["scene_data"][0].update(values)


def by_name(*less, **more):
    named = {f"CAM_{name.upper()}": [[300, 0, 120], [0, 300, 60], [0, 0, 1]] for name in CAMERAS}
    return {name: k for name, k in named.items() if name not in less} | more


NATIVE = {
    "metadata": (lambda c: c.pop("metadata"), "missing metadata with camera_intrinsics"),
    "camera": (lambda c: c["metadata"].pop("CAM_BACK"), "metadata of CAM_BACK"),
    "quaternion": (turned("CAM_BACK", "rotation", [0, 0, 0, 0]), "metadata of CAM_BACK"),
    "nan": (turned("CAM_FRONT", "translation", [0, math.nan, 0]), "metadata of CAM_FRONT"),
    "K": (
        lambda c: c["metadata"].update(camera_intrinsics=[[1, 2], [3, 4]]),
        "intrinsics is of shape (6, 2, 2)",
    ),
    "image": (
        lambda c: c["data"]["scene_0001"]["scene_data"][1].pop("RGB-CAM_BACK"),
        "missing RGB-CAM_BACK",
    ),
    "data": (lambda c: c.update(data={}), "missing data of scenes"),
    "frame null": (first_frame(frame=None), "scene_0001 position 0: frame is null"),
    "frame text": (first_frame(frame="0012a"), 'scene_0001 position 0: frame is "0012a"'),
    "frame NaN": (first_frame(frame=math.nan), "scene_0001 position 0: frame is NaN"),
    "frame real": (first_frame(frame=1.5), "scene_0001 position 0: frame is 1.5"),
    "frame yes": (first_frame(frame=True), "scene_0001 position 0: frame is true"),
    "frame negative": (first_frame(frame=-20), "scene_0001 position 0: frame is -20"),
    "frame list": (first_frame(frame=[3]), "scene_0001 position 0: frame is [3]"),
    "frame gone": (
        lambda c: scene_of(c)["scene_data"][1].pop("frame"),
        "scene_0001 position 1: frame is missing",
    ),
    "frame twice": (
        lambda c: scene_of(c)["scene_data"].append(scene_of(c)["scene_data"][0]),
        "scene_0001 position 2: frame 0 occurs twice",
    ),
    "no frame": (
        lambda c: scene_of(c)["scene_data"].__setitem__(1, 7),
        "scene_0001 position 1: the frame is 7",
    ),
    "scene_data": (lambda c: scene_of(c).update(scene_data=1.5), "scene_0001: scene_data is 1.5"),
    "scene": (lambda c: c["data"].update(scene_0001=[]), "scene_0001: no object"),
    "half the lenses": (
        lambda c: c["metadata"].update(camera_intrinsics_by_name=by_name("CAM_BACK")),
        "none of CAM_BACK",
    ),
    "lens text": (
        lambda c: c["metadata"].update(camera_intrinsics_by_name=by_name(CAM_BACK="x")),
        "no array of numbers",
    ),
    "two lenses": (
        lambda c: (
            c["metadata"].update(camera_intrinsics_by_name=by_name())
            or [
                c["metadata"][name].update(camera_intrinsics=np.eye(3).tolist())
                for name in by_name()
            ]
        ),
        "two different intrinsics",
    ),
    "other name": (
        lambda c: c["metadata"].update(cam_intrinsics={"CAM_BACK": 1}),
        "metadata: cam_intrinsics",
    ),
    "distortion": (
        lambda c: c["metadata"]["CAM_BACK"].update(distortion=[0.1]),
        "CAM_BACK: distortion is geometry",
    ),
    "own lens": (
        first_frame(intrinsics=[[1]]),
        "scene_0001 position 0: intrinsics is geometry that is not read",
    ),
    "config": (
        lambda c: scene_of(c)["scene_info"].update(config={"bev_res": "fine"}),
        "bev_res is 'fine'",
    ),
    "config cells": (
        lambda c: scene_of(c)["scene_info"].update(config={"bev_dim": 0}),
        "bev_dim is 0",
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_faults_of_infos(copies, name):
    folder = copies("native")
    edit, said = NATIVE[name]
    change(folder / "infos" / "simbev_infos_train.json", edit)
    text = message(ValueError, simbev.load, folder)
    assert said in text and "simbev_infos_train.json" in text


@pytest.mark.parametrize("place", ["together", "each"])
def test_every_camera_has_its_own_lens(copies, place):
    folder = copies("native")

    def other_back(content):
        metadata = content["metadata"]
        named = {f"CAM_{name.upper()}": metadata["camera_intrinsics"] for name in CAMERAS}
        wide = np.array(metadata["camera_intrinsics"]) * [[0.64], [0.64], [1]]
        wide[:2, 2] = np.array(metadata["camera_intrinsics"])[:2, 2]
        named["CAM_BACK"] = wide.tolist()
        if place == "together":
            metadata["camera_intrinsics_by_name"] = named
        else:
            for name, k in named.items():
                metadata[name]["camera_intrinsics"] = k

    for infos in (folder / "infos").iterdir():
        change(infos, other_back)
    k = simbev.load(folder).frames[0].intrinsics
    assert (
        k[CAMERAS.index("back"), 0, 0] == pytest.approx(0.64 * k[1, 0, 0]) and (k[0] == k[1]).all()
    )


def regrid(folder, res, dim):
    """The native labels of a copy at another resolution, as SimBEV would have drawn them."""
    at = (np.arange(dim) + 0.5 - dim / 2) * res
    index = np.floor((at + 72) / 0.4).astype(int).clip(0, 359)
    for path in folder.rglob("*GT_SEG.npz"):
        np.savez(path, data=np.load(path)["data"][:, index][:, :, index])
    for path in (folder / "configs").iterdir():
        path.write_text(f"map: Town01\nbev_dim: {dim}  # cells\nbev_res: {res}\n")


def test_labels_have_the_cells_that_the_config_says(copies, folders):
    folder = copies("native")
    regrid(folder, 0.2, 560)
    wanted, found = (
        simbev.SimBEVDataset(simbev.load(place), "train", augment="none", **FAST)
        for place in (folders["native"], folder)
    )
    assert all(torch.equal(wanted[k]["target"], found[k]["target"]) for k in range(len(wanted)))
    assert simbev.check(folder).ok and simbev.load(folder).notes == ()
    said = message(ValueError, simbev.load, folder, resolution=0.4)
    assert "bev_res is 0.2" in said and "data_resolution=0.4" in said and "configs" in said
    (folder / "configs" / "SimBEV-scene-0001.yaml").write_text("bev_dim: 500\nbev_res: 0.2\n")
    label = [f for f in simbev.load(folder).frames if f.scene == "scene_0001"][0]
    assert "has 560 cells a side, not 500" in message(ValueError, read_label, label)


def test_an_assumed_cell_is_said(copies, folders):
    folder = copies("native")
    regrid(folder, 0.2, 560)
    shutil.rmtree(folder / "configs")
    assert any(
        "taken as 0.4 m" in note and "data_resolution" in note for note in simbev.load(folder).notes
    )
    assert any("taken as 0.4 m" in str(problem) for problem in simbev.check(folder).warnings)
    told = simbev.dataset({"data": str(folder), "data_resolution": 0.2})
    assert told.notes == () and told.frames[0].resolution == 0.2
    assert told.fingerprint != simbev.load(folder).fingerprint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_data_set_has_a_test_part(copies, layout):
    """Whole scenes, held back from validation where the files name none."""
    folder = copies(layout)
    parts = {
        part: {f.scene for f in simbev.load(folder).part(part)}
        for part in ("train", "valid", "test")
    }
    assert [len(scenes) for scenes in parts.values()] == [2, 1, 1] and len(
        set().union(*parts.values())
    ) == 4
    if layout == "published":
        (folder / "test" / "scene_0003").rename(folder / "val" / "scene_0003")
        (folder / "test").rmdir()
        assert [f.scene for f in simbev.load(folder).part("test")] == ["scene_0003"] * 2
        shutil.rmtree(folder / "val" / "scene_0003")
        assert any("no test part" in note for note in simbev.load(folder).notes)


def test_a_damaged_standin_is_drawn_again(tmp_path):
    def make():
        return standin(tmp_path, n=3, per_scene=1, size="96x54")

    folder = make()
    picture = next(folder.rglob("*.jpg"))
    before, status = picture.read_bytes(), picture.stat()
    picture.write_bytes(before[:-9] + bytes(9))
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))  # as long and as old as before
    assert make() == folder and picture.read_bytes() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_read_any_layout(folders, layout):
    """Tables that want depth images of the stand-in take a real folder as it is, without them."""
    for scale in ("smoke", "demo", "paper"):
        rows = [
            row
            for row in read_rows("simbev", scale, str(folders[layout]))
            if row.notebook.endswith("80_row.ipynb")
        ]
        assert rows and {
            simbev.dataset(row.params | {"data": str(folders[layout])}).layout for row in rows
        } == {layout}
        assert all(row.params["splat"] for row in rows)


def test_parameters_of_the_data_are_the_rows_own():
    names = read_parameters("nbs/simbev/80_row.ipynb").keys()
    assert set(simbev.PARAMETERS) <= names and {
        "data",
        "layout",
        "standin",
        "data_resolution",
    } <= set(simbev.PARAMETERS)


def test_folders_that_are_none(tmp_path, copies):
    assert "no such folder" in message(FileNotFoundError, simbev.load, tmp_path / "nothing")
    assert "holds no SimBEV data" in message(FileNotFoundError, simbev.load, tmp_path)
    assert not simbev.check(tmp_path).ok and "SimBEV_cvt_label" in str(simbev.check(tmp_path))
    folder = copies("converted")
    shutil.copytree(copies("native") / "infos", folder / "infos")
    assert "converted and native; say which: layout=converted" in message(
        ValueError, simbev.load, folder
    )
    assert simbev.load(folder, "converted").layout == "converted" == locate(folder, "converted")[1]
    assert "layout='cvt'" in message(ValueError, simbev.load, folder, "cvt")
    assert "every=0" in message(ValueError, simbev.load, folder, every=0)


@pytest.mark.parametrize("gone", ["train", "val"])
def test_an_empty_split(copies, gone):
    folder = copies()
    shutil.rmtree(folder / gone)
    split = {"val": "valid"}.get(gone, gone)
    assert f"no sound frame in split '{split}'" in message(ValueError, simbev.load, folder)


def test_k_must_be_made_for_the_image(copies):
    folder = copies()

    def scaled(k):
        return (np.array(k) * [[6.667], [6.667], [1]]).tolist()

    def big(entries):
        return [e.update(intrinsics=scaled(e["intrinsics"])) for e in entries]

    metas = list(folder.rglob("yaw0pitch0/meta.json"))
    for meta in metas:
        change(meta, big)
    text = message(ValueError, simbev.SimBEVDataset, simbev.load(folder), "train", **FAST)
    assert "far from the middle of a 240 x 112 image" in text and "image_size in meta.json" in text
    report = simbev.check(folder)
    assert len(report.errors) == 6 * 4 and all("principal point" in p.what for p in report.errors)
    for meta in metas:  # the same numbers are right once their size is declared
        change(meta, lambda entries: [e.update(image_size=[1600, 747]) for e in entries])
    assert simbev.check(folder).ok
    found = simbev.SimBEVDataset(simbev.load(folder), "train", **FAST)[0]["intrins"]
    wanted = simbev.SimBEVDataset(simbev.load(standin(**SMALL)), "train", **FAST)[0]["intrins"]
    assert torch.allclose(found, wanted, rtol=2e-3)


def test_cameras_that_look_elsewhere(copies):
    folder = copies()

    def inverted(e, order):
        return np.linalg.inv(e["extrinsics"])[::order].tolist()

    change(meta_of(folder), lambda entries: [e.update(extrinsics=inverted(e, 1)) for e in entries])
    said = str(simbev.check(folder))
    assert (
        "its inverse fits: store ego to camera" in said
        and "train/scene_0000" in said
        and "scene_0001" not in said
    )
    change(meta_of(folder), lambda entries: [e.update(extrinsics=inverted(e, -1)) for e in entries])
    assert "put images and matrices in the same order" in str(simbev.check(folder))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"flip": "leftright"}, "flip='leftright' is unknown"),
        ({"extrinsics": "inv"}, "'inverse'"),
        ({"intrinsics": "scale"}, "'scaled'"),
        ({"ego": "mask"}, "ego='mask' is unknown"),
        ({"augment": "publishd"}, "'published'"),
        ({"cams": "front,top"}, "cams='top' is unknown"),
        ({"classes": "lorry"}, "classes: 'lorry' is unknown"),
        ({"classes": ["car", "car"]}, "each once"),
        ({"ncams": 7}, "ncams=7"),
        ({"cams": "front", "ncams": 2}, "ncams=2"),
        ({"size": (0, 240)}, "image size (0, 240)"),
        ({"xbound": (-50, 50, 0.3)}, "bound [-50, 50, 0.3]"),
    ],
)
def test_unknown_words(folder, named, said):
    assert said in message(
        ValueError, simbev.SimBEVDataset, simbev.load(folder), "train", **(FAST | named)
    )
    assert "'valid'" in message(ValueError, simbev.load(folder).part, "valud")


def test_bounds_beyond_the_label(folder):
    dataset = simbev.SimBEVDataset(simbev.load(folder), "train", xbound=(-60, 60, 0.5), **FAST)
    text = message(ValueError, lambda: dataset[0])
    assert "reaches beyond the label (+-50 m)" in text and dataset.frames[0].label in text


def test_classes_a_version_lacks(folder):
    dataset = simbev.SimBEVDataset(simbev.load(folder), "train", classes="car,sidewalk", **FAST)
    text = message(ValueError, lambda: dataset[0])
    assert "has no class sidewalk" in text and dataset.frames[0].label in text


# ---- layouts


def test_three_layouts_give_the_same_tensors(folders):
    sets = {layout: simbev.load(folder) for layout, folder in folders.items()}
    assert {data.layout for data in sets.values()} == set(LAYOUTS)
    assert len({tuple(data.counts().items()) for data in sets.values()}) == 1
    for split in ("train", "valid"):
        made = [
            simbev.SimBEVDataset(data, split, classes="vehicle,road,pedestrian", **FAST)
            for data in sets.values()
        ]
        for index in range(len(made[0])):
            first, *others = (dataset[4, index] for dataset in made)
            for other in others:
                assert all(
                    torch.equal(first[name], other[name])
                    for name in ("imgs", "target", "mask", "post_rots")
                )
                assert all(
                    torch.allclose(first[name], other[name], atol=1e-5)
                    for name in ("rots", "trans", "intrins")
                )
    jpegs = [
        {p.read_bytes() for f in data.frames for p in map(Path, f.images)} for data in sets.values()
    ]
    assert jpegs[0] == jpegs[1] == jpegs[2] and len(jpegs[0]) == 48


@pytest.mark.parametrize("layout", ["published", "converted"])
def test_other_orientations_are_ignored(folders, copies, layout):
    folder = copies(layout)
    others = list(folder.rglob("yaw20pitch0"))
    assert others and all(
        "yaw20" not in path for f in simbev.load(folder).frames for path in f.files
    )
    for other in others:
        (other / "meta.json").write_text("nonsense")
    assert simbev.load(folder).fingerprint == simbev.load(folders[layout]).fingerprint
    shutil.rmtree(others[0].with_name("yaw0pitch0"))
    text = message(FileNotFoundError, simbev.load, folder)
    assert "yaw0pitch0" in text and "there is yaw20pitch0" in text


def test_a_scene_without_an_orientation_folder(copies, folder):
    moved = copies()
    for place in list(moved.rglob("yaw0pitch0")):
        for path in place.iterdir():
            path.rename(place.parent / path.name)
    assert len(simbev.load(moved).frames) == len(simbev.load(folder).frames)


def test_converted_split_is_four_fifths_of_the_sorted_scenes(copies):
    folder = copies("converted")
    labels = folder / "SimBEV_cvt_label"
    for k in range(4, 10):
        shutil.copytree(labels / "scene_0001", labels / f"scene_{k:04d}")
    frames = simbev.load(folder).frames
    assert {f.scene for f in frames if f.split == "train"} == {f"scene_{k:04d}" for k in range(8)}
    assert [f.split for f in frames if f.scene in ("scene_0008", "scene_0009")] == ["valid"] * 2 + [
        "test"
    ] * 2
    for k in range(1, 10):
        shutil.rmtree(labels / f"scene_{k:04d}")
    assert "1 scenes" in message(ValueError, simbev.load, folder)


def test_native_paths_thinning_and_test_split(copies):
    folder = copies("native")
    shutil.copy(
        folder / "infos" / "simbev_infos_val.json", folder / "infos" / "simbev_infos_test.json"
    )
    data = simbev.load(folder)
    assert data.counts() == {"train": 4, "valid": 2, "test": 2}
    named = [path for f in data.frames for path in (*f.files, *f.depth, f.lidar)]
    assert (
        all(str(folder) in path and "/dataset/" not in path for path in named)
        and len(named) == 8 * 14
    )
    assert any("scene_0002 is in test and valid" in p.what for p in simbev.check(folder).warnings)
    assert [f.id for f in simbev.load(folder, every=160).frames] == [f.id for f in data.frames]
    assert [f.id[-4:] for f in simbev.load(folder, every=320).frames] == ["0000"] * 4
    shutil.move(folder, folder.with_name("inner") / "simbev")
    assert simbev.load(folder.with_name("inner")).counts() == data.counts()


def test_converted_finds_depth_beside_its_images(copies, folders):
    folder = copies("converted")
    for sensor in (folders["native"] / "sweeps").iterdir():
        if not sensor.name.startswith("RGB"):
            shutil.copytree(sensor, folder / "sweeps" / sensor.name)
    frame = simbev.load(folder).frames[0]
    assert (
        len(frame.depth) == 6
        and frame.lidar
        and np.allclose(frame.lidar_to_ego[:3, 3], [0, 0, 1.8])
    )
    assert "overlap of labels and depth" in str(simbev.check(folder))


def test_images_in_another_order_are_put_right(copies, folder):
    shuffled, order = copies(), [3, 1, 5, 0, 4, 2]

    def reorder(e):
        return e.update(
            {name: [e[name][k] for k in order] for name in ("images", "intrinsics", "extrinsics")}
        )

    for meta in shuffled.rglob("yaw0pitch0/meta.json"):
        change(meta, lambda entries: [reorder(e) for e in entries])
    first, second = (
        simbev.SimBEVDataset(simbev.load(place), "train", **FAST)[0] for place in (folder, shuffled)
    )
    assert all(torch.equal(first[name], second[name]) for name in INPUTS)
    assert (
        order_cameras(["a"] * 6) == list(range(6))
        and find_camera("front_rightish/3.jpg") != "front_right"
    )


@pytest.mark.parametrize("kind", ["mask", "channels last", "png", "float", "bool"])
def test_labels_in_other_forms(copies, folder, kind):
    made, wanted = copies(), simbev.SimBEVDataset(simbev.load(folder), "train", **FAST)[0]["target"]
    label = np.load(simbev.load(made).frames[0].label)
    mask, place = label[1:4].max(0), Path(simbev.load(made).frames[0].label)
    if kind == "png":
        Image.fromarray(mask * 255).save(place.with_suffix(".png"))
        change(meta_of(made), lambda entries: entries[0].update(label="labels/bev_0000.png"))
    else:
        forms = {
            "mask": mask,
            "channels last": np.moveaxis(label, 0, 2),
            "float": label * 1.0,
            "bool": label > 0,
        }
        np.save(place, forms[kind])
    found = simbev.SimBEVDataset(simbev.load(made), "train", **FAST)[0]["target"]
    assert wanted.sum() > 0 and torch.equal(found, wanted)


@pytest.mark.parametrize("count", [8, 11, 14])
def test_classes_by_name_in_every_version(count):
    label = np.zeros((count, 4, 4), np.uint8)
    for k, name in enumerate(("car", "truck", "bus", "pedestrian")):
        label[CLASSES[count].index(name), k, k] = 1
    found = pick_classes(label, parse_classes("vehicle,pedestrian,road"))
    assert found[0].diagonal().tolist() == [1, 1, 1, 0] and found[1, 3, 3] == 1 == found[1].sum()
    assert found[2].sum() == 0


def test_rerooted():
    windows = r"D:\x\sweeps\old\simbev\sweeps\LIDAR\a.npz"
    assert reroot(windows, Path("r")) == os.path.join("r", "sweeps", "LIDAR", "a.npz")
    assert reroot("elsewhere/a.npz", Path("r")) == "elsewhere/a.npz"


# ---- conventions, against numbers and against the world's truth


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1),
    st.lists(st.floats(-20, 20), min_size=3, max_size=3),
)
def test_extrinsics_invert(quaternion, centre):
    rotation = quaternion_to_matrix(quaternion)
    matrix_ = ego_to_camera(rotation, centre)
    found, place = camera_to_ego(matrix_)
    assert (
        check_rigid(matrix_) == "" and np.allclose(found, rotation) and np.allclose(place, centre)
    )
    assert np.allclose(np.linalg.inv(matrix_)[:3, :3], found) and np.allclose(
        np.linalg.inv(matrix_)[:3, 3], place
    )
    raw = camera_to_ego(matrix_, "raw")
    assert np.array_equal(raw[0], matrix_[:3, :3]) and np.array_equal(raw[1], matrix_[:3, 3])


def test_flips():
    array = np.arange(24).reshape(2, 3, 4)
    oracle = {
        "180": np.rot90(array, 2, (1, 2)),
        "none": array,
        "lr": array[:, :, ::-1],
        "ud": array[:, ::-1],
    }
    assert all((orient_label(array, flip) == oracle[flip]).all() for flip in FLIPS)


def test_native_labels_on_the_networks_grid(street):
    """Ours against the world's own resampling, and its raster straight onto the network's grid."""
    from leansense.world import bev
    from leansense.world.camera import simbev_rig

    bound = (-50.0, 50.0, 0.5)
    for frame, shot in zip(street.frames, make_shots(16, 0, 2)):
        label = read_label(frame)
        found = resample_label(orient_label(label), 0.4, bound, bound)
        assert (found == bev.resample_label(label, bev.SIMBEV_GRID, bev.LSS_GRID)).all()
        direct = bev.rasterise(shot.snapshot, bev.LSS_GRID)
        union = (found[1:4].max(0) | direct[1:4].max(0)).sum()
        assert not union or (found[1:4].max(0) & direct[1:4].max(0)).sum() / union > 0.75
    rig = simbev_rig(112, 240)
    assert np.allclose(camera_to_ego(frame.extrinsics)[0], rig.rotation) and np.allclose(
        frame.intrinsics, rig.K
    )


def test_k_and_image_size():
    k = np.array([[953.4029, 0, 800], [0, 953.4029, 450], [0, 0, 1.0]])
    wanted = [[286.02087, 0, 240], [0, 237.29, 112], [0, 0, 1]]
    assert np.allclose(scale_intrinsics(k, (1600, 900), (480, 224)), wanted, atol=1e-3)
    assert (scale_intrinsics(k, (1600, 900), (480, 224), "native") == k).all()
    assert np.isclose(scale_intrinsics(k, (1600, 900), (480, 224), "isotropic")[1, 1], 286.02087)
    assert check_intrinsics(k, (1600, 900)) == "" and "1920 x 1200" not in check_intrinsics(
        k, (1600, 900)
    )
    assert "no camera matrix" in check_intrinsics(np.eye(3) * [-1, 1, 1], (2, 2))


def test_splat_lands_on_labels_only_when_all_three_are_right(street):
    size = (60, 176)  # squeezed, so that the three readings of K differ
    right = splat_overlap(street, size=size)
    assert right["hit"] > 0.8 and right["overlap"] > 0.6
    for name, values in (("flip", FLIPS), ("extrinsics", EXTRINSICS), ("intrinsics", INTRINSICS)):
        for value in list(values)[1:]:
            assert (
                splat_overlap(street, size=size, **{name: value})["overlap"]
                < 0.4 * right["overlap"]
            ), (name, value)


def test_splat_needs_depth(folder):
    assert "has no depth images" in message(ValueError, splat_overlap, simbev.load(folder))


def test_true_depth_through_loader_and_pooling(street):
    """One-hot true depth, lifted and pooled by a model's layers, under random augmentation."""
    from leansense.layers.bev_pool import Grid, PoolPlan, bev_pool
    from leansense.layers.lift_splat import get_geometry, make_frustum

    grid, dataset = (
        Grid(dbound=(1.0, 45.0, 0.25)),
        simbev.SimBEVDataset(street, "train", augment="published", **FAST),
    )
    frustum = make_frustum(grid, (64, 176), 4)
    hit = missed = 0
    for index in range(0, 12, 3):
        item = dataset[1, index]
        matrices = [item[name][None] for name in INPUTS[1:]]
        v, u = torch.meshgrid(frustum.v, frustum.u, indexing="ij")
        uv = torch.stack([u, v], -1).reshape(1, -1, 2) - item["post_trans"][:, None, :2]
        uv = (uv @ item["post_rots"][:, :2, :2].inverse().transpose(1, 2)).numpy()
        column, row = np.floor(uv[..., 0]).astype(int), np.floor(uv[..., 1]).astype(int)
        inside = (column >= 0) & (column < 240) & (row >= 0) & (row < 112)
        depth = np.stack([read_depth(path) for path in dataset.frames[index].depth])
        d = np.where(
            inside, depth[np.arange(6)[:, None], row.clip(0, 111), column.clip(0, 239)], np.inf
        )
        bins = (
            torch.from_numpy(np.where(d < 45, (d - 1) / 0.25 + 0.5, -1)).long().reshape(6, *u.shape)
        )
        points = get_geometry(frustum, *matrices)
        one = torch.zeros(1, 6, grid.depths, *u.shape)
        one.scatter_(
            2,
            bins.clamp(min=0)[None, :, None],
            ((bins >= 0) & (bins < grid.depths)).float()[None, :, None],
        )
        height = (one[..., None] * points).sum(2)[..., 2]
        feature = ((height > 0.5) & (height < 2.5)).float()[:, :, None]
        found = bev_pool(one, feature, PoolPlan.build(points, grid), backend="torch")[0, 0] > 0
        grown = torch.nn.functional.max_pool2d(item["target"], 3, 1, 1)[0] > 0
        hit, missed = (
            hit + int((found & grown).sum()),
            missed + int((found & (grown.flip(1))).sum()),
        )
    assert hit > 100 and missed < 0.25 * hit


@pytest.mark.parametrize("flip", ["none", "lr", "ud"])
def test_check_notices_turned_labels(copies, flip):
    folder = copies("native")
    for path in folder.rglob("*GT_SEG.npz"):
        label = np.load(path)["data"]
        np.savez(path, data=orient_label(orient_label(label), flip))
    problems = simbev.check(folder).errors
    assert (
        len(problems) == 1
        and f"flip={flip}" in problems[0].what
        and f"train with flip={flip}" in problems[0].fix
    )
    assert splat_overlap(simbev.load(folder), flip=flip)["overlap"] > 0.6


@pytest.mark.parametrize(
    ("factor", "said"), [(0.5, "labels hardly fit the depth"), (2, "labels do not fit the depth")]
)
def test_check_notices_a_wrong_focal_length(copies, factor, said):
    folder = copies("native")

    def scale(content):
        k = content["metadata"]["camera_intrinsics"]
        k[0][0], k[1][1] = factor * k[0][0], factor * k[1][1]

    for infos in (folder / "infos").iterdir():
        change(infos, scale)
    report = simbev.check(folder)
    assert [p.what.split(",")[0] for p in report.errors + report.warnings] == [
        said
    ] and report.ok == (factor < 1)


def test_check_asks_whether_cameras_see_the_vehicles(copies, folder):
    assert any(
        "of the vehicle cells" in fact and fact.startswith(("9", "100"))
        for fact in simbev.check(folder).facts
    )
    blind = copies()
    for meta in blind.rglob(
        "yaw0pitch0/meta.json"
    ):  # a focal length in other units: every camera looks through a pipe
        change(
            meta,
            lambda entries: [
                row.__setitem__(k, row[k] * 40)
                for e in entries
                for m in e["intrinsics"]
                for k, row in ((0, m[0]), (1, m[1]))
            ],
        )
    problems = simbev.check(blind).errors
    assert (
        len(problems) == 1
        and "of the labelled vehicle cells lie in view of a camera" in problems[0].what
    )


def test_check_uses_lidar_where_there_is_no_depth(copies):
    folder = copies("native")
    for path in folder.rglob("*DPT*.png"):
        path.unlink()
    report = simbev.check(folder)
    assert report.ok and "overlap of labels and lidar" in str(report)
    for path in folder.rglob("*GT_SEG.npz"):
        np.savez(path, data=np.load(path)["data"][:, :, ::-1])
    assert any("fit the lidar with flip=" in p.what for p in simbev.check(folder).errors)
    for path in folder.rglob("*LIDAR.npz"):
        path.write_bytes(b"nothing")
    assert any(
        "LIDAR.npz" in p.path and "cannot be read" in p.what for p in simbev.check(folder).errors
    )


def test_large_images_are_squeezed_with_two_factors(own_data_root):
    data = simbev.load(standin(n=3, size="1600x900", layout="native", per_scene=1))
    item = simbev.SimBEVDataset(data, "train", augment="none")[0]
    assert np.allclose(
        item["intrins"][0], [[286.0209, 0, 240], [0, 237.2914, 112], [0, 0, 1]], atol=1e-3
    )
    assert splat_overlap(data, stride=2)["overlap"] > 0.6
    assert splat_overlap(data, stride=2, intrinsics="native")["overlap"] < 0.3


def test_projected_boxes_lie_on_drawn_vehicles(street):
    """Label cells projected by the item's matrices fall on vehicle pixels of the world's image."""
    from leansense.world.camera import render, simbev_rig
    from leansense.world.scene import class_id

    dataset = simbev.SimBEVDataset(
        street, "train", augment="none", size=(112, 240), final=(112, 240)
    )
    kinds = [class_id(name) for name in ("car", "truck", "bus")]
    inside, total, limit = 0, 0, (240, 112)
    for index, shot in zip(range(6), make_shots(16, 0, 2)):
        item, drawn = dataset[index], render(shot.snapshot, simbev_rig(112, 240), shot.seed)
        i, j = np.nonzero(item["target"][0].numpy())
        points = np.stack([-49.75 + 0.5 * i, -49.75 + 0.5 * j, np.full(len(i), 0.7)], 1)
        near = torch.from_numpy(points[np.hypot(points[:, 0], points[:, 1]) < 15]).float()[None]
        uv, depth = (
            part[0].numpy() for part in project(near, *(item[n][None] for n in INPUTS[1:]))
        )
        for camera in range(6):
            seen = (depth[camera] > 1) & (uv[camera] > 0).all(1) & (uv[camera] < limit).all(1)
            column, row = uv[camera][seen].astype(int).T
            inside += np.isin(drawn.kind[camera][row, column], kinds).sum()
            total += seen.sum()
    assert total > 100 and inside / total > 0.9


# ---- augmentation


GOLDEN = [
    (Choice(0.22, (0, 48, 352, 176)), [[0.22, 0], [0, 0.22]], [0, -48]),
    (
        Choice(0.2, (0, 40, 352, 168), True, 5.4),
        [[-0.1991124, 0.0188217], [0.0188217, 0.1991124]],
        [341.43164, -56.10151],
    ),
    (Choice(0.73333, (0, 36, 352, 164)), [[0.73333, 0], [0, 0.73333]], [0, -36]),
]


@pytest.mark.parametrize(("choice", "rotation", "shift"), GOLDEN)
def test_published_matrices(choice, rotation, shift):
    a, b = make_matrix(choice)
    assert np.allclose(a[:2, :2], rotation, atol=1e-6) and np.allclose(b[:2], shift, atol=1e-4)
    assert a[2].tolist() == [0, 0, 1]


def test_evaluation_choices():
    assert choose_middle(AUGMENTS["nuscenes"], (900, 1600), (128, 352)).crop == (0, 48, 352, 176)
    assert choose_middle(AUGMENTS["published"], (224, 480), (128, 352)).crop == (0, 36, 352, 164)
    both = [choose_middle(AUGMENTS[name], (224, 480), (128, 352)) for name in ("none", "matched")]
    assert both[0] == both[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(AUGMENTS)))
def test_drawn_choices_stay_in_range(seed, name):
    augment = AUGMENTS[name]
    unit = 352 / 480 if augment.relative else 1.0
    for choice in draw_choices(augment, (224, 480), (128, 352), np.random.default_rng(seed)):
        assert (
            unit * augment.resize_lim[0] - 1e-9
            <= choice.resize
            <= unit * augment.resize_lim[1] + 1e-9
        )
        assert augment.rot_lim[0] <= choice.rotate <= augment.rot_lim[1] and (
            augment.rand_flip or not choice.flip
        )
        left, top, right, bottom = choice.crop
        assert (
            right - left == 352
            and bottom - top == 128
            and 0 <= left <= max(0, int(480 * choice.resize) - 352)
        )
        assert bottom == int((1 - 0) * int(224 * choice.resize)) or augment.bot_pct_lim[1] > 0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotate", [-15.0, 0.0, 5.4])
@pytest.mark.parametrize("resize", [0.45, 0.7333, 1.2])
def test_image_follows_matrix(resize, rotate, flip):
    """A bright spot is where the matrix says, in x and in y."""
    choice = place_crop(resize, 0.1, 0.7, (150, 300), (64, 128), flip, rotate)
    a, b = (part.numpy() for part in make_matrix(choice))
    wanted = np.array([50.3, 28.9])
    spot = np.linalg.solve(a[:2, :2], wanted - b[:2])
    assert (spot > 12).all() and spot[0] < 288 and spot[1] < 138
    y, x = np.mgrid[:150, :300] + 0.5
    image = (
        (np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 40) * 255)[..., None]
        .repeat(3, 2)
        .astype(np.uint8)
    )
    out = augment_image(image, choice)[..., 0].astype(float)
    v, u = np.mgrid[:64, :128] + 0.5
    found = np.array([(out * u).sum(), (out * v).sum()]) / out.sum()
    assert out.shape == (64, 128) and np.abs(found - wanted).max() < 0.2


def test_small_images_are_padded_black():
    out = augment_image(
        np.full((900, 1600, 3), 200, np.uint8), place_crop(0.193, 0.0, 0.5, (900, 1600), (128, 352))
    )
    assert (out[:, :308] == 200).all() and (out[:, 309:] == 0).all()
    gone = augment_image(np.full((20, 20, 3), 200, np.uint8), Choice(1.0, (40, 40, 48, 48)))
    assert gone.shape == (8, 8, 3) and not gone.any()


@pytest.mark.parametrize("augment", ["none", "published", "matched", "head"])
def test_a_sample_is_the_same_with_any_number_of_workers(folder, augment):
    dataset = simbev.SimBEVDataset(
        simbev.load(folder), "train", augment=augment, ncams=4, seed=3, **FAST
    )
    epochs = []
    for workers in (0, 2):
        batches = list(
            loader(dataset, 2, seed=1, shuffle=True, workers=workers, collate=simbev.collate)
        )
        epochs.append(
            (torch.cat([b["imgs"] for b in batches]), [name for b in batches for name in b["id"]])
        )
    assert epochs[0][1] == epochs[1][1] and torch.equal(epochs[0][0], epochs[1][0])
    backwards = {k: dataset[2, k] for k in reversed(range(len(dataset)))}
    for k in range(len(dataset)):
        assert all(
            torch.equal(dataset[2, k][name], backwards[k][name]) for name in (*INPUTS, "target")
        )
        same = all(
            torch.equal(dataset[2, k][name], dataset[3, k][name]) for name in ("imgs", "rots")
        )
        assert same == (augment == "none")


def test_another_seed_augments_otherwise(folder):
    a, b = (
        simbev.SimBEVDataset(simbev.load(folder), "train", seed=seed, **FAST)[0]["post_rots"]
        for seed in (0, 1)
    )
    assert not torch.equal(a, b)


def test_per_camera_and_per_sample(folder):
    data = simbev.load(folder)
    for per, count in (("camera", 6), ("sample", 1)):
        dataset = simbev.SimBEVDataset(data, "train", augment=Augment(per=per), **FAST)
        assert len({tuple(a.flatten().tolist()) for a in dataset[1]["post_rots"]}) == count


def test_a_subset_of_cameras_and_dropping_cameras_are_two_things(folder):
    data = simbev.load(folder)

    def make(split, **named):
        return simbev.SimBEVDataset(data, split, augment="published", **FAST, **named)

    front = make("train", cams="front_right,front_left,front")
    for name in INPUTS:  # the rig's order, and the very augmentation that the whole rig has
        assert torch.equal(front[5, 1][name], make("train")[5, 1][name][:3])
        assert torch.equal(make("valid", cams="back")[0][name], make("valid")[0][name][4:5])
    dropped = [make("train", ncams=5)[0, k] for k in range(4)] + [
        make("train", ncams=5)[1, k] for k in range(4)
    ]
    assert all(item["imgs"].shape[0] == 5 for item in dropped)
    assert len({tuple(item["trans"][:, 0].tolist()) for item in dropped}) > 1

    def count(split, **named):
        return make(split, **named)[0]["imgs"].shape[0]

    assert count("valid", ncams=5) == 6 and count("valid", cams="back,front", ncams=1) == 2
    assert count("train", cams="back,front", ncams=1) == 1


def test_evaluation_is_not_random(folder):
    data = simbev.load(folder)
    one = simbev.SimBEVDataset(data, "valid", augment="published", **FAST)
    assert torch.equal(one[0, 1]["imgs"], one[9, 1]["imgs"])

    def make(train):
        return simbev.SimBEVDataset(data, "valid", augment="published", train=train, **FAST)

    still, moving = make(False), make(True)
    assert torch.equal(one[1]["imgs"], still[1]["imgs"]) and not torch.equal(
        one[1]["imgs"], moving[1]["imgs"]
    )


def test_keys_at_the_ends(folder):
    dataset = simbev.SimBEVDataset(simbev.load(folder), "train", **FAST)
    assert torch.equal(dataset[1]["imgs"], dataset[0, 1]["imgs"])
    assert torch.equal(dataset[-1]["imgs"], dataset[len(dataset) - 1]["imgs"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    batch = dataset.example()
    assert batch["imgs"].shape == (1, 6, 3, 64, 176) and batch["target"].shape == (1, 1, 200, 200)
    assert all(batch[name].dtype == torch.float32 for name in (*INPUTS, "target", "mask"))


# ---- targets


def test_targets_by_class_and_grid(folder):
    data = simbev.load(folder)

    def make(**named):
        return simbev.SimBEVDataset(data, "train", augment="none", **FAST, **named)[0]["target"]

    parts, vehicle = make(classes=["car", "truck", "bus"]), make()
    assert torch.equal(parts.amax(0, keepdim=True), vehicle) and set(vehicle.unique().tolist()) == {
        0.0,
        1.0,
    }
    part = make(xbound=(0, 20, 0.5), ybound=(-10, 10, 0.5))
    assert torch.equal(part, vehicle[:, 100:140, 80:120])
    assert make(xbound=(-48, 48, 1.0), ybound=(-48, 48, 2.0)).shape == (1, 96, 48)
    for flip, axes in (("none", (1, 2)), ("lr", (1,)), ("ud", (2,))):
        assert torch.equal(make(flip=flip), vehicle.flip(axes))


def test_ego_is_kept_cleared_or_ignored(own_data_root):
    data = simbev.load(standin(n=6, size="240x112", layout="native", ego=True))

    def make(ego):
        return simbev.SimBEVDataset(data, "train", ego=ego, **FAST)[0]

    kept, cleared, ignored = map(make, ("keep", "clear", "ignore"))
    blob = slice(96, 104), slice(98, 102)
    assert kept["target"][0][blob].mean() > 0.9 and kept["mask"].min() == 1 == cleared["mask"].min()
    assert cleared["target"][0][blob].sum() == 0 and torch.equal(ignored["target"], kept["target"])
    gone = kept["target"] - cleared["target"]
    assert (gone * ignored["mask"]).sum() == 0 and (ignored["mask"] == 0).sum() == 10 * 6
    plain = simbev.load(standin(n=6, size="240x112", layout="native"))
    assert torch.equal(
        simbev.SimBEVDataset(plain, "train", ego="clear", **FAST)[0]["target"], cleared["target"]
    )


# ---- cache


def test_a_damaged_cache_is_built_again(folder):
    data = simbev.load(folder)
    paths = [path for f in data.frames for path in f.images]

    def build():
        return cache_pixels(data.folder, paths, (28, 60))[1]

    wanted, path = np.array(build()), Path(build().filename)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", whole + b"x", b"nonsense" * 40):
        path.write_bytes(damaged)
        assert (build() == wanted).all() and path.read_bytes() == whole
    np.save(path, wanted.reshape(-1, 60, 28, 3))  # as long, but of another shape
    assert build().shape == wanted.shape and (build() == wanted).all()


def test_the_cache_follows_content(copies, folder, folders):
    changed = copies()
    frame = simbev.load(changed).frames[0]
    before = simbev.SimBEVDataset(simbev.load(changed), "train", augment="none", **FAST)
    Image.new("RGB", (240, 112), (9, 8, 7)).save(frame.images[0], "PNG")
    after = simbev.SimBEVDataset(simbev.load(changed), "train", augment="none", **FAST)
    assert before[0]["imgs"][0].std((1, 2)).max() > 1e-3 > after[0]["imgs"][0].std((1, 2)).max()
    other = simbev.SimBEVDataset(simbev.load(folders["native"]), "train", **FAST)
    assert other.array.filename == before.array.filename


def test_pickling_takes_the_file_along_not_the_pixels(folder):
    dataset = simbev.SimBEVDataset(simbev.load(folder), "train", **FAST)
    again = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 60_000 < dataset.array.nbytes and isinstance(
        again.array, np.memmap
    )
    assert torch.equal(again[1, 0]["imgs"], dataset[1, 0]["imgs"])


# ---- rows


def test_identify_is_light():
    heavy = (
        "('torch', 'pandas', 'lightning', 'matplotlib', 'torchvision', 'sklearn', 'scipy', 'PIL')"
    )
    code = (
        "import sys, leansense.simbev.data as d; "
        "print(d.identify({'data': 'standin', 'standin': 40}));"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    name, loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split("\n")[:2]
    assert name == f"standin-40-published-480x224-{DRAWN}" and loaded == "[]"


def test_rows_name_their_data(folders):
    asked = {"data": "standin", "standin": 8, "standin_size": "240x112", "layout": "native"}
    data = simbev.dataset(asked)
    assert (
        data.layout == "native"
        and data.folder == str(folders["native"])
        and data.name == "stand-in, 8 frames"
    )
    others = ({}, {"layout": "auto"}, {"standin": 10}, {"standin_size": ""})
    names = {simbev.identify(asked | other) for other in others}
    assert len(names) == 4 and simbev.identify(asked) == simbev.identify(
        asked | {"cams": "front", "seed": 7}
    )
    real = {"data": str(folders["native"])}
    assert simbev.identify(real) == simbev.load(folders["native"]).fingerprint
    assert simbev.dataset(real | {"data_every": 320}).counts()["train"] == 2
    assert simbev.identify(real | {"data_every": 320}) != simbev.identify(real)


def test_fingerprint_follows_content_not_place(copies, folder):
    copied = copies()
    assert simbev.load(copied).fingerprint == simbev.load(folder).fingerprint
    change(meta_of(copied), put("extrinsics", 0, 0, 3, value=0.123))
    moved = simbev.load(copied).fingerprint
    assert moved != simbev.load(folder).fingerprint
    np.save(simbev.load(copied).frames[0].label, np.zeros((8, 200, 200), np.uint8))
    assert simbev.load(copied).fingerprint != moved


def test_loaders_take_the_published_flags(folder):
    data = simbev.load(folder)
    params = dict(
        H=112,
        W=240,
        final_h=64,
        final_w=176,
        ncams=6,
        cams="",
        bsz=3,
        nworkers=0,
        seed=1,
        resize_lim=[0.5, 0.6],
        rot_lim=None,
        rand_flip=False,
        classes="vehicle,road",
        lr=1e-3,
    )
    named = simbev.read_options(params)
    assert named["size"] == (112, 240) and named["ncams"] == 0
    for count, asked, kept in ((4, 6, 0), (4, 4, 0), (4, 3, 3), (6, 5, 5), (6, 0, 0)):
        assert simbev.read_options({"cams": list(CAMERAS[:count]), "ncams": asked})["ncams"] == kept
    assert named["augment"] == Augment((0.5, 0.6), rand_flip=False)
    made = simbev.loaders(data, params)
    assert {split: len(part) for split, part in made.items()} == {"train": 1, "valid": 1, "test": 1}
    batch = next(iter(made["valid"]))
    assert batch["imgs"].shape == (2, 6, 3, 64, 176) and batch["target"].shape == (2, 2, 200, 200)
    assert batch["id"] == [f.id for f in data.part("valid")]
    assert simbev.read_options({})["final"] == (128, 352)
    assert "resize_lim=(2, 1)" in message(ValueError, simbev.read_options, {"resize_lim": [2, 1]})
    assert "make no batch of 9" in message(ValueError, simbev.loaders, data, params | {"bsz": 9})


# ---- stand-in


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_standin_is_the_same_bytes_twice(tmp_path, layout):
    small = dict(n=3, per_scene=1, size="96x54", layout=layout)
    first, second = (contents(standin(tmp_path / name, **small)) for name in "ab")
    assert first == second and len(first) > 12
    assert first != contents(standin(tmp_path / "c", seed=1, **small))


def test_standin_holds_what_real_data_hold(street):
    labels = [read_label(frame)[1:4].max(0) for frame in street.frames]
    assert any(not label.any() for label in labels)
    beyond = [label.sum() - label[55:305, 55:305].sum() for label in labels]
    assert sum(beyond) > 100
    near = [
        resample_label(orient_label(label), 0.4, (-50, 50, 0.5), (-50, 50, 0.5))
        for label in labels
        if label.any()
    ]
    for axis in (0, 1):  # scenes are not their own mirror images
        assert sum((label & np.flip(label, axis)).sum() for label in near) < 0.3 * sum(
            label.sum() for label in near
        )
    assert len({label.tobytes() for label in labels if label.any()}) == sum(
        label.any() for label in labels
    )


def test_depth_code_round_trip(tmp_path):
    depth = np.array([[0.0, 1.0, 44.987], [500.0, 1000.0, np.inf]], np.float32)
    (tmp_path / "d.png").write_bytes(encode_depth(depth))
    assert np.allclose(read_depth(str(tmp_path / "d.png")), np.minimum(depth, 1000), atol=0.01)
    Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)).save(tmp_path / "e.png")
    assert np.isclose(
        read_depth(str(tmp_path / "e.png"))[0, 0], 1000 * (1 + 2 * 256 + 3 * 65536) / (2**24 - 1)
    )


def test_standin_refuses_what_it_cannot_write():
    assert "layout='cvt'" in message(ValueError, standin, layout="cvt")
    assert "size='big'" in message(ValueError, standin, size="big")
    assert "n=2, per_scene=2" in message(ValueError, standin, n=2)
    assert parse_size("1600X900") == (1600, 900)


def test_standin_written_by_several_at_once(tmp_path):
    call = f"standin({str(tmp_path)!r}, n=3, per_scene=1, size='96x54')"
    code = f"from leansense.simbev.standin import standin; print({call})"
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {worker.communicate(timeout=1800)[0].strip() for worker in workers}
    assert len(found) == 1 and [str(p) for p in tmp_path.iterdir()] == list(found)


def test_check_is_content_with_the_standins(folders):
    for layout, folder in folders.items():
        report = simbev.check(folder)
        assert report.ok and not report.warnings and f"{layout} layout, 4 scenes" in str(report)
        assert "48 of 48 images decoded" in str(report)


def test_check_command(folder, tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "leansense.core.check", "simbev", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    good, bad = run(str(folder)), run(str(tmp_path))
    assert good.returncode == 0 and "ok, 0 error(s)" in good.stdout, good.stderr
    assert (
        bad.returncode == 1
        and "holds no SimBEV data" in bad.stdout
        and "Traceback" not in bad.stderr
    )
