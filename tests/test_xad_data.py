"""nu-A2D on disk: faults and their words, scene lists, maps, geometry, batches, the real frame."""

import json
import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, message
from leansense.core import check as doctor
from leansense.core.check import Report
from leansense.layers.conventions import SQUARE, quaternion_to_matrix
from leansense.layers.lift_splat import project
from leansense.layers.splat_overlap import compare_flips, lift_depth, mark_cells, score_overlap
from leansense.world.camera import nuscenes_rig
from leansense.xad import data as xad
from leansense.xad import frame as real
from leansense.xad.frames import CAMERAS, Boxes, read_scan, scan
from leansense.xad.labels import (
    CLASSES,
    NEUTRAL,
    fill_cells,
    fill_published,
    make_bev,
    read_map,
    read_names,
    resample_map,
)
from leansense.xad.split import SPLITS, choose_scenes, find_leaks, scene_names
from leansense.xad.standin import DRAWN, draw_moment, make_moments, standin, token
from leansense.xad.tables import TABLES, find_folders, find_root, read_tables

pytestmark = pytest.mark.usefixtures("own_data_root")
SMALL = dict(n=8, per_scene=2, size="160x90")  # 5 scenes train, 1 validates, 1 or 2 test
FAST = dict(final_h=64, final_w=176)


@pytest.fixture(scope="module")
def folder(own_data_root):
    return standin(**SMALL)


@pytest.fixture(scope="module")
def data(folder):
    return xad.load(folder)


@pytest.fixture()
def copy(folder, tmp_path):
    """A stand-in to be broken: its folder with the tables' parent."""
    return Path(shutil.copytree(folder, tmp_path / "my data")) / "trainval"


def change(path, edit):
    """Rewrite a JSON file after `edit(content)`."""
    content = json.loads(Path(path).read_text())
    edit(content)
    Path(path).write_text(json.dumps(content))


# ---- scene lists


def test_published_lists():
    counts = {name: [len(part) for part in split.values()] for name, split in SPLITS.items()}
    assert counts == {
        "nu_a2d": [200, 50, 50], "pretrain": [481, 159, 210], "mini": [8, 2, 0],
        "pretrain_clean": [479, 159, 210],
    }  # fmt: skip
    for split in SPLITS.values():
        every = [name for part in split.values() for name in part]
        assert len(every) == len(set(every))
    main = SPLITS["nu_a2d"]
    ends = [(part[0], part[-1]) for part in main.values()]
    assert ends == [
        ("scene-0001", "scene-1105"), ("scene-0008", "scene-1088"), ("scene-0053", "scene-1110")
    ]  # fmt: skip
    sums = [
        sum(int(name[6:]) for name in part)
        for split in ("nu_a2d", "pretrain")
        for part in SPLITS[split].values()
    ]
    assert sums == [112_596, 26_160, 28_303, 305_002, 97_927, 62_822]
    assert scene_names("7-9 12") == ("scene-0007", "scene-0008", "scene-0009", "scene-0012")


def test_the_leaks_of_pretraining():
    leaks = find_leaks("pretrain")
    assert len(leaks["train"]) == 112 and leaks["valid"] == ()
    assert leaks["test"] == ("scene-0714", "scene-1004")
    assert find_leaks("mini")["test"] == ("scene-1094",)
    clean = find_leaks("pretrain_clean")
    assert clean["test"] == clean["valid"] == () and len(clean["train"]) == 112
    assert find_leaks("nu_a2d") == {"valid": (), "test": ()}
    assert "nearest is 'pretrain'" in message(ValueError, find_leaks, "pretraining")


def test_a_folder_declares_its_scenes(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text('{"mine": {"train": ["a", "b"], "test": ["c"]}}')
    assert choose_scenes("mine", tmp_path, "abcd") == {"a": "train", "b": "train", "c": "test"}
    text = message(FileNotFoundError, choose_scenes, "mine", tmp_path, "ab")
    assert text.startswith(f"{tmp_path}: c of split 'mine' is not on disk; ")
    text = message(FileNotFoundError, choose_scenes, "nu_a2d", tmp_path, ["scene-0001"])
    assert "scene-0008 and 298 more of split 'nu_a2d' is not on disk" in text
    assert "nearest is 'mine'" in message(ValueError, choose_scenes, "mines", tmp_path, "abc")
    for wrong in ('{"mine": {"train": ["a"], "test": ["a"]}}', '{"mine": {"trian": ["a"]}}',
                  '{"mine": {"train": [1]}}', '["a"]', "{", '{"mine": {"train": 3}}'):  # fmt: skip
        path.write_text(wrong)
        assert message(ValueError, choose_scenes, "mine", tmp_path, "abc").startswith(f"{path}: ")


# ---- tables


def test_the_stand_in_has_all_tables(folder):
    report = Report("xad", "")
    tables = read_tables(folder / "trainval/v1.0-trainval", report)
    assert report.ok and len(TABLES) == 13 and set(tables.rows) == set(TABLES)
    assert len(tables["sample"]) == 16 and len(tables["sample_data"]) == 7 * 16
    assert len(tables["calibrated_sensor"]) == 7 and len(tables["scene"]) == 8
    first = tables["scene"][token("scene-0008")]["first_sample_token"]
    second = tables["sample"][first]["next"]
    assert tables["sample"][second]["prev"] == first and tables["sample"][second]["next"] == ""


def test_a_missing_table_is_named(copy):
    for name in TABLES:
        path = copy / f"v1.0-trainval/{name}.json"
        kept = path.read_bytes()
        path.unlink()
        text = message(FileNotFoundError, xad.load, copy.parent)
        assert text.startswith(f"{path}: table is missing; copy all 13")
        path.write_bytes(kept)
    assert xad.load(copy.parent).frames


POINTERS = [
    (table, field)
    for table, fields in TABLES.items()
    for field in fields
    if field.endswith(("_token", "_tokens")) or field in ("prev", "next")
]


def test_a_dangling_token_is_named(copy):
    assert len(POINTERS) == 15
    for table, field in POINTERS:
        path, lost = copy / f"v1.0-trainval/{table}.json", "f" * 32
        kept = path.read_text()
        rows = json.loads(kept)
        rows[-1][field] = [lost] if isinstance(rows[-1][field], list) else lost
        path.write_text(json.dumps(rows))
        text = message(ValueError, xad.load, copy.parent)
        where = f"{path} row {len(rows) - 1}: {field} '{lost}' is in no row of "
        assert text.startswith(where) and text.endswith("; copy both again"), text
        path.write_text(kept)


@pytest.mark.parametrize("edit, said", [
    (lambda rows: rows[1].pop("timestamp"), "sample.json row 1: has no timestamp"),
    (lambda rows: rows.append(rows[0]), "occurs twice"),
    (lambda rows: rows.append(3), "has no token, timestamp, prev, next, scene_token"),
])  # fmt: skip
def test_a_faulty_row_is_named(copy, edit, said):
    change(copy / "v1.0-trainval/sample.json", edit)
    assert said in message(ValueError, xad.load, copy.parent)


@pytest.mark.parametrize("text, said", [("{", "is not JSON"), ('{"a": 1}', "holds a dict")])
def test_a_file_that_is_no_table(copy, text, said):
    (copy / "v1.0-trainval/log.json").write_text(text)
    found = message(ValueError, xad.load, copy.parent)
    assert found.startswith(f"{copy}/v1.0-trainval/log.json: {said}")


def nest(copy):
    """The folder as a shared drive hands it out: archives in parts, folders in themselves."""
    for name in ("v1.0-trainval", "maps", "local_binmap", "desc_all"):
        (copy / name).rename(copy / "inner")
        (copy / name).mkdir()
        (copy / "inner").rename(copy / name / name)
    (copy / "action_all").rename(copy / "x")
    (copy / "action_all-001").mkdir()
    (copy / "x").rename(copy / "action_all-001/action_all")
    files = sorted((copy / "samples/CAM_FRONT").iterdir())
    for part, some in (("001", files[::2]), ("003", files[1::2])):
        place = copy / f"samples/CAM_FRONT-{part}/CAM_FRONT"
        place.mkdir(parents=True)
        for path in some:
            path.rename(place / path.name)
    (copy / "samples/CAM_FRONT").rmdir()
    (copy / "samples").rename(copy / "y")
    (copy / "samples").mkdir()
    (copy / "y").rename(copy / "samples/samples")
    copy.rename(copy.parent / "z")
    copy.mkdir()
    (copy.parent / "z").rename(copy / "trainval")


def test_nested_exports_are_read(copy, data):
    nest(copy)
    found = xad.load(copy.parent)
    assert [frame.id for frame in found.frames] == [frame.id for frame in data.frames]
    for a, b in zip(found.frames, data.frames, strict=True):
        assert [Path(path).name for path in a.files] == [Path(path).name for path in b.files]
        assert all(Path(path).exists() for path in (*a.files, *b.files))
    assert doctor.check("xad", str(copy.parent)).ok


def test_where_the_tables_are(copy, tmp_path):
    for place in (copy.parent, copy):
        assert find_root(place) == copy
    assert find_folders(copy, "nothing") == []
    text = message(FileNotFoundError, xad.load, tmp_path / "nowhere")
    assert (
        text.startswith(f"{tmp_path / 'nowhere'}") and "the folder of the tables is missing" in text
    )
    text = message(FileNotFoundError, xad.load, copy.parent, version="mini")
    assert "v1.0-mini" in text


# ---- faults of what belongs to a sample: from the loader and from the doctor, in one line


def first(data, split="train"):
    return data.part(split)[0]


def write(name, text):
    return lambda copy, frame: (copy / f"{name}/{frame.id}.json").write_text(text)


def write_map(array):
    return lambda copy, frame: np.save(copy / f"local_binmap/{frame.id}.npy", array)


def edit_table(name, edit):
    return lambda copy, frame: change(copy / f"v1.0-trainval/{name}.json", edit)


def remove(pattern):
    def act(copy, frame):
        found = sorted(copy.glob(pattern.replace("ID", frame.id)))
        found[0].unlink()

    return act


def spoil_picture(copy, frame):
    path = copy / Path(frame.images[1]).relative_to(Path(frame.images[1]).parents[2])
    path.write_bytes(path.read_bytes()[:300])


FAULTS = {
    "action of 3": (write("action_all", "[1, 0, 1]"), "action file holds 3 numbers, not 4"),
    "description of 9": (write("desc_all", str([0] * 9)), "holds 9 numbers, not 8"),
    "no list": (write("action_all", '{"a": 1}'), "action file holds a dict"),
    "not JSON": (write("desc_all", "[0, 1"), "description file is not JSON"),
    "words": (write("action_all", '["go", 0, 0, 0]'), "action file holds ['go', 0, 0, 0]"),
    "beyond 1": (write("action_all", "[2, 0, 0, 0]"), "give a list of 4 numbers from 0 to 1"),
    "no number": (write("action_all", "[NaN, 0, 0, 0]"), "from 0 to 1"),
    "no action": (remove("action_all/ID.json"), "action file is missing"),
    "no description": (remove("desc_all/ID.json"), "description file is missing"),
    "no map": (remove("local_binmap/ID.npy"), "map file is missing"),
    "empty map": (lambda c, f: (c / f"local_binmap/{f.id}.npy").write_bytes(b""), "is empty"),
    "small map": (write_map(np.zeros((100, 100))), "map has shape (100, 100), not (200, 200)"),
    "values": (write_map(np.full((200, 200), 7)), "map has values [7]"),
    "pickle": (write_map(np.array([{}] * 3)), "map is not a numpy array"),
    "no stub": (remove("maps/*.png"), "map picture is missing"),
    "no picture": (remove("samples/CAM_BACK/scene-0008*"), "images file is missing"),
    "half a picture": (spoil_picture, "image cannot be decoded"),
    "no scene": (
        edit_table("scene", lambda rows: [
            row.update(name="scene-9999") for row in rows if row["name"] == "scene-0008"]),
        "scene-0008 of split 'nu_a2d' is not on disk; copy it there, or list the scenes"),
    "K for another size": (
        edit_table("sample_data", lambda rows: [r.update(width=320, height=180) for r in rows]),
        "principal point at (80, 45), far from the middle of a 320 x 180 image"),
    "K is nothing": (
        edit_table("calibrated_sensor", lambda rows: rows[0].update(camera_intrinsic=[])),
        "camera_intrinsic has shape (0,), not (3, 3)"),
    "no rotation": (
        edit_table("calibrated_sensor", lambda rows: rows[2].update(rotation=[0, 0, 0, 0])),
        "has no sound translation (3) and rotation"),
    "pose": (
        edit_table("ego_pose", lambda rows: [r.update(translation=[0, None, 0]) for r in rows]),
        "has no sound translation (3) and rotation"),
    "box": (
        edit_table("sample_annotation", lambda rows: [r.update(size=[0, 4, 2]) for r in rows]),
        "size is [0, 4, 2]; give width, length, height"),
    "no key frame": (
        edit_table("sample_data", lambda rows: [
            row.update(is_key_frame=False) for row in rows if "CAM_FRONT" in row["filename"]]),
        "has no key frame of CAM_FRONT_LEFT, CAM_FRONT, CAM_FRONT_RIGHT"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(copy, data, name):
    act, said = FAULTS[name]
    act(copy, first(data))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        xad.loaders(xad.load(copy.parent), {"bsize": 1} | FAST)
    text = str(caught.value)
    assert "\n" not in text and said in text and text.startswith(str(copy)) and "; " in text
    report = doctor.check("xad", str(copy.parent))
    assert not report.ok and any(said in str(problem) for problem in report.errors), str(report)


@pytest.mark.parametrize("options, said", [
    ({"H": 90}, "give H and W"), ({"final_h": 0}, "at least 16"), ({"ncams": 7}, "ncams=7"),
    ({"cams": "CAM_FRNT"}, "nearest is 'CAM_FRONT'"), ({"raster": "cell"}, "nearest is 'cells'"),
    ({"augment": "publishd"}, "nearest is 'published'"),
    ({"xbound": (-50, 50, 0.3)}, "step that divides it"),
    ({"xbound": (-50, 50, 0.25)}, "does not fit the cells of local_binmap"),
    ({"ybound": (-60, 60, 0.5)}, "does not fit"), ({"ybound": (-50, 52, 0.5)}, "end at 50 m"),
])  # fmt: skip
def test_wrong_options(data, options, said):
    assert said in message(ValueError, xad.XADDataset, data, "train", **options)


def test_a_part_without_samples(copy):
    change(copy / "splits.json", lambda splits: splits["nu_a2d"].update(val=[]))
    found = xad.load(copy.parent)
    assert set(xad.loaders(found, {"bsize": 1} | FAST)) == {"train", "test"}
    assert "no sample in part 'valid'" in message(ValueError, xad.XADDataset, found, "valid")
    assert "nearest is 'train'" in message(ValueError, found.part, "trian")


# ---- names of the labels


def test_label_names(copy, tmp_path):
    assert [len(names) for names in NEUTRAL.values()] == [4, 8] and read_names() == NEUTRAL
    assert xad.load(copy.parent).actions[1] == "stop"
    (copy / "labels.yaml").unlink()
    assert xad.load(copy.parent).actions == NEUTRAL["actions"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("actions: [go, halt, left, right]\ndescriptions: [a, b, c, d, e, f, g, h]\n")
    assert xad.load(copy.parent, labels=str(mine)).descriptions == tuple("abcdefgh")
    for text in ("actions: [go, halt, left, right]", "[1", "actions: [a, a, b, c]", "3"):
        mine.write_text(text)
        assert message(ValueError, read_names, mine).startswith(str(mine))
    assert "is missing" in message(FileNotFoundError, read_names, tmp_path / "none.yaml")


# ---- the map


def footprint(x, y, length, width, yaw):
    c, s = math.cos(yaw), math.sin(yaw)
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2 * (length, width)
    return corners @ [[c, s], [-s, c]] + (x, y)


def span(cells):
    rows, columns = np.nonzero(cells)
    return rows.min(), rows.max(), columns.min(), columns.max(), len(rows)


def test_both_rasters_of_the_published_box():
    box = footprint(10, 4, 4, 2, 0.0)[None]
    assert span(fill_published(box, SQUARE, SQUARE)) == (116, 124, 106, 110, 45)
    assert span(fill_cells(box, SQUARE, SQUARE)) == (116, 123, 106, 109, 32)
    nothing = np.zeros((0, 4, 2))
    assert not fill_cells(nothing, SQUARE, SQUARE).any()
    assert not fill_published(nothing, SQUARE, SQUARE).any()
    far = footprint(80, 0, 4, 2, 0.3)[None]
    assert not fill_cells(far, SQUARE, SQUARE).any()
    assert not fill_published(far, SQUARE, SQUARE).any()
    edge = fill_cells(footprint(50, -50, 4, 2, 0.0)[None], SQUARE, SQUARE)
    assert span(edge) == (196, 199, 0, 1, 8)


BOXES = st.tuples(
    st.floats(-60, 60), st.floats(-60, 60), st.floats(0.4, 12), st.floats(0.4, 3),
    st.floats(-3.2, 3.2),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(BOXES, st.sampled_from([0.5, 1.0, 2.0]))
def test_cells_are_those_that_a_box_covers(box, step):
    """Each point inside the box lies in a labelled cell; each labelled cell has such a point."""
    bound = (-50.0, 50.0, step)
    quad = footprint(*box)
    cells = fill_cells(quad[None], bound, bound)
    share = (np.arange(60) + 0.5) / 60
    u, v = np.meshgrid(share, share)
    edges = np.concatenate([u.ravel()[:, None], v.ravel()[:, None]], 1)
    points = quad[2] + edges[:, :1] * (quad[1] - quad[2]) + edges[:, 1:] * (quad[3] - quad[2])
    index = np.floor((points + 50) / step).astype(int)
    inside = ((index >= 0) & (index < len(cells))).all(1)
    sampled = np.zeros_like(cells)
    sampled[index[inside, 0], index[inside, 1]] = True
    assert not (sampled & ~cells).any()
    rows, columns = np.nonzero(cells & ~sampled)  # a corner may be too small for the sampling
    for row, column in zip(rows, columns):
        fine = np.stack(np.meshgrid(*[np.linspace(0, 1, 41)] * 2), -1).reshape(-1, 2)
        at = (fine + (row, column)) * step - 50
        offset = (at - quad.mean(0)) @ np.stack([quad[1] - quad[2], quad[3] - quad[2]], 1)
        half = np.array([box[3] ** 2, box[2] ** 2]) / 2
        assert (abs(offset) <= half * (1 + 1e-6) + 0.05 * step * max(box[2:4])).all(1).any()


@settings(deadline=None, max_examples=40)
@given(BOXES)
def test_the_published_raster_is_whole(box):
    """A filled polygon of rounded corners: its corners are in it, and no row has a gap."""
    quad = footprint(*box)
    cells = fill_published(quad[None], SQUARE, SQUARE)
    corners = np.round((quad + 50) / 0.5).astype(int)
    kept = corners[((corners >= 0) & (corners < 200)).all(1)]
    assert cells[kept[:, 0], kept[:, 1]].all()
    for row in cells[cells.any(1)]:
        found = np.flatnonzero(row)
        assert len(found) == found[-1] - found[0] + 1


def test_the_stored_map_is_transposed(data):
    stored = np.load(first(data).map)
    static = read_map(first(data).map)
    assert (static == np.rot90(np.fliplr(stored), 1)).all() and (static != stored).any()
    bev = make_bev(first(data), SQUARE, SQUARE)
    vehicle = fill_cells(first(data).boxes.vehicles().footprints(), SQUARE, SQUARE)
    assert (bev[vehicle] == 1).all() and (bev[~vehicle] == static[~vehicle]).all()
    assert vehicle.any() and set(np.unique(static)) == {0, 2, 3} and CLASSES[3] == "divider"


def test_larger_cells_of_the_map():
    static = np.zeros((200, 200), np.uint8)
    static[100:103, 100:104] = 2  # three rows of a 2 m cell's four
    static[110, 110] = 3
    coarse = resample_map(static, (-50, 50, 2.0), (-50, 50, 2.0))
    assert coarse[25, 25] == 2 and coarse[27, 27] == 3 and (coarse > 0).sum() == 2
    part = resample_map(static, (0, 10, 1.0), (-10, 10, 0.5))
    assert part.shape == (10, 40) and part[0, 20] == 2 and part[5, 30] == 3 and part[1, 20] == 2
    assert (resample_map(static, SQUARE, SQUARE) == static).all()


# ---- batches


def test_a_batch(data):
    batches = xad.loaders(data, {"bsize": 2, "xbound": (-50, 50, 1), "ybound": (-50, 50, 2)} | FAST)
    batch = next(iter(batches["train"]))
    shapes = {name: tuple(v.shape) for name, v in batch.items() if torch.is_tensor(v)}
    assert shapes == {
        "images": (2, 6, 3, 64, 176), "rots": (2, 6, 3, 3), "trans": (2, 6, 3),
        "intrins": (2, 6, 3, 3), "post_rots": (2, 6, 3, 3), "post_trans": (2, 6, 3),
        "bev": (2, 100, 50), "action": (2, 4), "description": (2, 8),
    }  # fmt: skip
    assert batch["images"].dtype == torch.uint8 and batch["bev"].dtype == torch.int64
    floats = set(shapes) - {"images", "bev"}
    assert all(batch[name].dtype == torch.float32 for name in floats)
    assert [len(batch[name]) for name in ("id", "scene")] == [2, 2]
    found = {frame.id: frame for frame in data.frames}
    for k, name in enumerate(batch["id"]):
        assert found[name].scene == batch["scene"][k] and found[name].split == "train"
        assert batch["action"][k].tolist() == json.loads(Path(found[name].action).read_text())


def test_published_image_geometry(data):
    """Evaluation scales 1600 x 900 by .22 and cuts off half of the share below that may go."""
    full = xad.choose_middle(xad.AUGMENTS["published"], (900, 1600), (128, 352))
    assert full.resize == pytest.approx(0.22, abs=1e-6) and full.crop == (0, 48, 352, 176)
    assert not full.flip and not full.rotate
    rot, tran = xad.make_matrix(full)
    assert torch.allclose(rot[:2, :2], 0.22 * torch.eye(2)) and tran.tolist() == [0, -48, 0]
    draws = [c for k in range(40) for c in xad.draw_choices(
        xad.AUGMENTS["published"], (900, 1600), (128, 352), np.random.default_rng(k))]  # fmt: skip
    sizes = [c.resize for c in draws]
    assert 0.193 <= min(sizes) < 0.195 and 0.223 < max(sizes) <= 0.225
    assert {c.flip for c in draws} == {True, False} and max(c.rotate for c in draws) <= 5.4
    named = xad.read_options({"resize_lim": [0.193, 0.225], "rot_lim": [0, 0], "rand_flip": False})
    made = named["augment"]
    assert made.resize_lim == xad.AUGMENTS["published"].resize_lim and not made.rand_flip
    assert made.rot_lim == (0, 0) and xad.read_options({"ncams": 6})["ncams"] == 0


def test_augmentation_depends_on_seed_epoch_and_index(data):
    dataset = xad.XADDataset(data, "train", seed=3, **FAST)
    a, b = dataset[2, 1], dataset[2, 1]
    assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))
    assert not torch.equal(dataset[1, 1]["post_rots"], a["post_rots"])
    other = xad.XADDataset(data, "train", seed=4, **FAST)
    assert not torch.equal(other[2, 1]["post_rots"], a["post_rots"])
    still = xad.XADDataset(data, "train", augment="none", **FAST)
    assert torch.equal(still[0, 1]["images"], still[7, 1]["images"])
    valid = xad.XADDataset(data, "valid", **FAST)
    assert torch.equal(valid[0, 0]["images"], valid[5, 0]["images"])


def test_fewer_cameras(data):
    named = xad.XADDataset(data, "test", cams="back,front_left", **FAST)[0]
    every = xad.XADDataset(data, "test", **FAST)[0]
    assert torch.equal(named["images"], every["images"][[0, 4]])
    assert torch.equal(named["trans"], every["trans"][[0, 4]])
    three = xad.XADDataset(data, "train", ncams=3, **FAST)
    assert three[0, 0]["images"].shape[0] == 3
    assert len({tuple(three[k, 0]["trans"][:, 0].tolist()) for k in range(8)}) > 1


def moment_of(frame):
    moments = make_moments(SMALL["n"], 0, SMALL["per_scene"])
    return next(m for m in moments if token(m.scene, m.order) == frame.id)


@pytest.mark.parametrize("size", [(0, 0), (60, 120)])
def test_boxes_fall_on_the_pixels_of_their_objects(data, size):
    """The centre of a vehicle's visible face, through the batch's matrices, hits that vehicle."""
    dataset = xad.XADDataset(data, "train", H=size[0], W=size[1], **FAST)
    tested = hit = 0
    for index in range(0, len(dataset), 2):
        frame, item = dataset.frames[index], dataset[4, index]
        moment = moment_of(frame)
        images = draw_moment(moment, nuscenes_rig(90, 160))
        rig = [item[k][None].double() for k in
               ("rots", "trans", "intrins", "post_rots", "post_trans")]  # fmt: skip
        objects = moment.snapshot.objects.select("car", "truck", "bus")
        for at, thing in zip(objects.centre, objects.instance):
            (camera, row, column) = (images.instance == thing).nonzero()
            if len(row) < 40 or np.hypot(*at[:2]) > 30:
                continue
            n = np.bincount(camera).argmax()
            v, u = (np.median(k[camera == n]) for k in (row, column))
            if images.instance[n, int(v), int(u)] != thing:
                continue
            k = nuscenes_rig(90, 160)
            depth = images.depth[n, int(v), int(u)]
            ray = np.linalg.inv(k.K[n]) @ [u + 0.5, v + 0.5, 1] * depth
            point = torch.tensor(k.rotation[n] @ ray + k.translation[n])[None, None]
            uv, far = project(point, *rig)
            x, y = uv[0, n, 0].tolist()
            if 2 < x < 174 and 2 < y < 62:
                tested += 1
                pixel = item["images"][n, :, int(y), int(x)].numpy().astype(int)
                seen = images.image[n, int(v) - 2 : int(v) + 3, int(u) - 2 : int(u) + 3].astype(int)
                hit += bool((abs(seen - pixel).max(-1) < 60).any()) and far[0, n, 0] > 0
    assert tested >= 8 and hit >= 0.8 * tested


def test_true_depth_lands_on_the_labels(data):
    """The splat test: depth, lifted by the batch's matrices, against maps read from files."""
    dataset, triples = xad.XADDataset(data, "train", augment="none"), []
    wrong = []
    for index in range(len(dataset)):
        item, size = dataset[index], (90, 160)
        images = draw_moment(moment_of(dataset.frames[index]), nuscenes_rig(*size))
        rig = [item[k].double().numpy() for k in ("rots", "trans", "intrins")]
        points = lift_depth(images.depth, size, *rig, stride=1)
        vehicle = item["bev"].numpy() == 1
        triples.append((mark_cells(points), mark_cells(points, 0.3), vehicle))
        rig[0] = rig[0].swapaxes(1, 2)
        raw = lift_depth(images.depth, size, *rig, stride=1)
        wrong.append((mark_cells(points), mark_cells(raw, 0.3), vehicle))
    fits = compare_flips(triples)
    assert fits["180"] > 0.6 and max(v for k, v in fits.items() if k != "180") < 0.3, fits
    assert score_overlap(wrong)["overlap"] < 0.2


def test_pictures_that_are_not_kept(data):
    kept = xad.XADDataset(data, "valid", H=60, W=120, **FAST)
    read = xad.XADDataset(data, "valid", H=60, W=120, cache_gb=0.0, **FAST)
    assert read.pixels.array is None and isinstance(kept.pixels.array, np.memmap)
    assert torch.equal(kept[0]["images"], read[0]["images"])
    for dataset in (kept, read):
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[0]["images"], dataset[0]["images"])
        assert torch.equal(again[0]["bev"], dataset[0]["bev"])
    assert len(pickle.dumps(kept.pixels)) < 10_000 < kept.pixels.array.nbytes


def test_maps_are_kept_by_what_they_are_made_of(copy, data):
    before = xad.XADDataset(data, "train", **FAST)
    again = xad.XADDataset(data, "train", **FAST)
    assert before.array.filename == again.array.filename
    other = xad.XADDataset(data, "train", raster="published", **FAST)
    assert other.array.filename != before.array.filename
    write_map(np.zeros((200, 200), np.int64))(copy, first(data))
    changed = xad.XADDataset(xad.load(copy.parent), "train", **FAST)
    assert set(changed[0]["bev"].unique().tolist()) <= {0, 1}


# ---- rows


def test_pretraining_needs_no_actions(copy, data):
    early = xad.load(copy.parent, split="pretrain_clean")
    extra = {f.scene for f in early.frames} - {f.scene for f in data.frames}
    assert extra and all(f.action == "" for f in early.frames)
    shutil.rmtree(copy / "action_all")
    batch = next(
        iter(xad.loaders(xad.load(copy.parent, split="pretrain"), {"bsize": 1} | FAST)["train"])
    )
    assert "bev" in batch and not {"action", "description"} & set(batch)
    leaked = {f.scene for f in xad.load(copy.parent, split="pretrain").part("train")}
    held = {f.scene for f in data.part("test")}
    assert leaked & held and not {f.scene for f in early.part("train")} & held


def test_rows_name_their_data(folder, data):
    asked = {"data": "standin", "standin": 8, "standin_size": "160x90", "standin_samples": 2}
    found = xad.dataset(asked)
    assert found.folder == str(folder / "trainval") and found.name == "stand-in, 8 scenes"
    assert xad.identify(asked) == f"standin-nu_a2d-8-160x90-2-{DRAWN}"
    others = ({}, {"standin": 9}, {"split": "pretrain"}, {"standin_samples": 3})
    assert len({xad.identify(asked | other) for other in others}) == 4
    assert set(asked) | {"version", "split", "labels"} == set(xad.PARAMETERS)
    own = xad.dataset({"data": str(folder)})
    assert own.fingerprint == xad.identify({"data": str(folder)}) == data.fingerprint
    assert data.counts() == {"train": 8, "valid": 2, "test": 4}


def test_the_fingerprint_sees_what_training_reads(copy, data):
    same = xad.load(copy.parent)
    assert same.fingerprint == data.fingerprint
    write("action_all", "[0, 0, 0, 1]")(copy, first(data))
    changed = xad.load(copy.parent).fingerprint
    change(copy / "v1.0-trainval/sample_annotation.json", lambda rows: [
        row.update(translation=[v + 0.1 for v in row["translation"]]) for row in rows])  # fmt: skip
    assert len({data.fingerprint, changed, xad.load(copy.parent).fingerprint}) == 3


def test_identify_is_light():
    heavy = "('torch', 'pandas', 'lightning', 'matplotlib', 'torchvision', 'scipy', 'PIL', 'yaml')"
    code = (
        "import sys, leansense.xad.data as d; print(d.identify({'data': 'standin'}));"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name, loaded = done.stdout.split("\n")[:2]
    assert name == f"standin-nu_a2d-100-320x180-4-{DRAWN}" and loaded == "[]"


# ---- the doctor


def test_the_doctor_finds_wrong_conventions(copy, data):
    report = doctor.check("xad", str(copy.parent))
    assert report.ok and "7 scenes" in report.facts[0], str(report)
    assert "as they are 0." in str(report) and "84 of 84 images decoded" in str(report)
    for frame in data.frames:
        stored = copy / f"local_binmap/{frame.id}.npy"
        np.save(stored, np.load(stored).T)
    report = doctor.check("xad", str(copy.parent))
    assert [p.path for p in report.errors] == [str(copy / "local_binmap")], str(report)
    assert "fit the vehicles as [x, y] and not as [y, x]" in str(report)


def test_the_doctor_finds_boxes_and_cameras_in_other_frames(copy):
    def mirror(rows):
        for row in rows:
            w, x, y, z = row["rotation"]
            row["rotation"] = [w, x, y, -z]
            row["translation"][1] *= -1

    change(copy / "v1.0-trainval/sample_annotation.json", mirror)
    assert "boxes do not lie where the lidar sees" in str(doctor.check("xad", str(copy.parent)))
    change(copy / "v1.0-trainval/calibrated_sensor.json", lambda rows: [
        row.update(rotation=[row["rotation"][0], *(-v for v in row["rotation"][1:])])
        for row in rows])  # fmt: skip
    report = doctor.check("xad", str(copy.parent))
    assert any("CAM_FRONT_LEFT: the camera" in str(p) for p in report.errors)


def test_the_doctor_reads_scans(copy, data):
    path = next((copy / "samples/LIDAR_TOP").glob("scene-0008*"))
    path.write_bytes(path.read_bytes()[:44])
    said = f"{path}: lidar scan has 44 bytes, not rows of 5 numbers of 4; copy it again"
    assert said in str(doctor.check("xad", str(copy.parent)))
    shutil.rmtree(copy / "samples/LIDAR_TOP")
    report = doctor.check("xad", str(copy.parent))
    assert report.ok and "places of the boxes were not tested" in str(report)
    frame = next(f for f in data.frames if Path(f.lidar).exists())
    assert read_scan(frame).shape[1] == 3


# ---- a real frame, where it is there

REAL = ROOT / "data/nuscenes_frame"
with_real = pytest.mark.skipif(not REAL.exists(), reason="needs data/nuscenes_frame")


@with_real
def test_lidar_points_fall_on_labelled_vehicles():
    frame = real.read_frame(REAL)
    shares = real.compare_readings(frame, read_scan(frame))
    assert shares["right"] >= 0.9
    wrong = {name: share for name, share in shares.items() if name != "right"}
    assert max(wrong.values()) < 0.9 and sorted(wrong.values())[5] < 0.4, wrong


@with_real
def test_points_inside_boxes_are_those_that_nuscenes_counts():
    import yaml

    frame = real.read_frame(REAL)
    counted = np.array(yaml.safe_load((REAL / "sample0000.yaml").read_text())["num_lidar_pts"])
    found = real.find_inside(read_scan(frame), frame.boxes).sum(0)
    assert counted.sum() > 1000 and abs(found - counted).sum() <= 0.02 * counted.sum()


@with_real
def test_real_calibration_agrees_with_itself():
    """The file holds camera to lidar as well; through the car it must come out the same."""
    import yaml

    frame = real.read_frame(REAL)
    content = yaml.safe_load((REAL / "sample0000.yaml").read_text())
    turn, shift = frame.lidar_to_ego
    for n, name in enumerate(CAMERAS):
        camera = content["cams"][name]
        back = quaternion_to_matrix(content["ego2global_rotation"]).T
        own = quaternion_to_matrix(camera["ego2global_rotation"])
        moved = np.subtract(camera["ego2global_translation"], content["ego2global_translation"])
        rot = turn.T @ back @ own @ frame.rots[n]
        at = turn.T @ (back @ (own @ frame.trans[n] + moved) - shift)
        assert np.allclose(rot, camera["sensor2lidar_rotation"], atol=1e-6)
        assert np.allclose(at, camera["sensor2lidar_translation"], atol=1e-6)
    rig, choice = real.fold_rig(frame, (900, 1600), (128, 352))
    assert choice.crop == (0, 48, 352, 176) and (rig.height, rig.width) == (128, 352)
    assert np.allclose(rig.K[1][:2, 2], 0.22 * frame.intrins[1][:2, 2] - [0, 48], atol=1e-3)


def test_a_real_frame_that_is_not_whole(tmp_path):
    text = message(FileNotFoundError, real.read_frame, tmp_path)
    assert text.startswith(f"{tmp_path / 'sample0000.yaml'}: file of the real frame is missing; ")
    (tmp_path / "imgs").mkdir()
    for name in ("0.bin", *(f"imgs/{camera}.jpg" for camera in CAMERAS)):
        (tmp_path / name).touch()
    (tmp_path / "sample0000.yaml").write_text("cams: {}\n")
    assert "is not the file of a frame" in message(ValueError, real.read_frame, tmp_path)


def test_a_drawn_frame_goes_the_same_way(data):
    scanned = [frame for frame in data.frames if Path(frame.lidar).exists()]
    found = [
        real.compare_readings(frame, read_scan(frame))
        for frame in scanned
        if real.find_inside(read_scan(frame), frame.boxes.vehicles()).any()
    ]
    assert len(scanned) == 7 and len(found) >= 4
    shares = {name: np.mean([each[name] for each in found]) for name in found[0]}
    assert shares["right"] > 0.98 and shares["lidar's axes for the car's"] < 0.5
    assert shares["left and right exchanged"] < 0.8 > shares["rows and columns exchanged"]
    empty = Boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3, 3)), ())
    points = read_scan(scanned[0])
    assert real.find_inside(points, empty).shape == (len(points), 0) and len(empty) == 0
    bare = replace(scanned[0], boxes=empty)
    assert "no point lies in a vehicle's box" in message(
        ValueError, real.compare_readings, bare, points
    )
    assert scan(Path(data.folder).parent)[2].ok
