"""Folders and lists that somebody else made: read as they are meant, counted, or refused."""

import csv
import json
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kinds_scenes as scenes
from conftest import message
from leansense.beam import features
from leansense.beam.data import prepare_image
from leansense.beam.layouts import parse_beams
from leansense.core.check import Report, check, systems
from leansense.leaf import data as leaf
from leansense.leaf.layouts import describe_gaps, write_metadata
from leansense.leaf.split import main as split_main
from leansense.leaf.split import make_split, read_folders
from leansense.openvocab import coco, flickr
from leansense.simbev import layouts as simbev
from leansense.simbev.overlap import read_depth, read_points
from leansense.xad.frames import _is_size
from leansense.xad.labels import read_list, read_map, read_names
from leansense.xad.tables import TABLES, read_table

pytestmark = pytest.mark.usefixtures("own_data_root")


def draw(folder: Path, *names: str) -> Path:
    """Pictures of these names below a folder, no two alike."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(k).integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(picture).resize((24, 24), 0).save(folder / name, format="PNG")
    return folder


def sets(folder: Path, count: int = 6, labels=("blast", "healthy")) -> Path:
    return draw(folder, *(f"{label}/{k}.png" for label in labels for k in range(count)))


def table_of(folder: Path) -> list[dict]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- class folders


def test_the_class_is_the_first_level(tmp_path, capsys):
    """1.2: hidden folders are none, deeper ones belong to it, linked ones are read, once."""
    sets(tmp_path / "set")
    here = draw(tmp_path / "set", "blast/.ipynb_checkpoints/0.png", ".cache/x/0.png",
                "blast/field1/7.png", "blast/field2/8.JPE", "healthy/9.jfif")  # fmt: skip
    for name in ("healthy/IMG_1.HEIC", "healthy/IMG_2.heic", "blast/notes.txt", "blast/._0.png"):
        (here / name).write_bytes(b"x")
    draw(tmp_path / "elsewhere", "a.png", "b.png", "c.png")
    (here / "smut").symlink_to(tmp_path / "elsewhere")
    (here / "healthy" / "loop").symlink_to(here)
    assert split_main(["split", str(here)]) == 0
    said = capsys.readouterr().out
    assert "left out: 2 .heic, 1 .txt, 1 folder that is there twice" in said
    count = Counter(row["label"] for row in table_of(here))
    assert count == {"blast": 8, "healthy": 7, "smut": 3}
    report = leaf.check(here)
    assert report.ok and "3 of the files that are read lie outside" in str(report)


def test_a_division_that_is_there_stays(tmp_path, capsys):
    """1.2: test pictures do not go to train; only what is lacking is made."""
    for part, count in (("Training", 8), ("val", 3), ("test_images", 2)):
        sets(tmp_path / "whole" / part, count)
    draw(tmp_path / "whole", "test_images/unknown.png", "extra/1.png")
    assert split_main(["split", str(tmp_path / "whole"), "--mode", "grouped"]) == 0
    said = capsys.readouterr().out
    assert "the division into folders was kept" in said
    assert "1 picture in extra, no class, 1 picture in test_images, in no class folder" in said
    parts = {row["path"].split("/")[0]: row["split"] for row in table_of(tmp_path / "whole")}
    assert parts == {"Training": "train", "val": "valid", "test_images": "test"}
    for part in ("train", "test"):
        sets(tmp_path / "half" / part, 10)
    made = make_split(tmp_path / "half", 0.2, 0.2)
    assert {k: sum(v.values()) for k, v in made.counts().items()} == {
        "train": 16, "valid": 4, "test": 20
    }  # fmt: skip
    assert all(s.split == "test" for s in made.samples if s.id.startswith("test/"))


def test_unlabelled_pictures_are_no_class(tmp_path, capsys):
    """1.2: Paddy Doctor's folders train_images and test_images."""
    sets(tmp_path / "train_images", 8)
    draw(tmp_path, "test_images/1.png", "test_images/2.png")
    assert split_main(["split", str(tmp_path)]) == 0
    assert "2 picture in test_images" in capsys.readouterr().out
    assert {row["split"] for row in table_of(tmp_path)} == {"train", "valid", "test"}
    assert read_folders(tmp_path).classes == ("blast", "healthy")


def test_the_users_class_numbers_stay(tmp_path):
    """1.2: a label2id.json is somebody's network; it is used, or the two are told apart."""
    sets(tmp_path / "set")
    ids = tmp_path / "set" / "label2id.json"
    ids.write_text('{"healthy": 0, "blast": 1}')
    assert split_main(["split", str(tmp_path / "set")]) == 0
    assert ids.read_text() == '{"healthy": 0, "blast": 1}'
    assert leaf.load(tmp_path / "set").classes == ("healthy", "blast")
    data = read_folders(tmp_path / "set")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "id2label.json").write_text('{"0": "rust"}')
    assert "says otherwise" in message(FileExistsError, write_metadata, data, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["id2label.json"]  # nothing half written
    ids.write_text('{"healthy": 0}')
    assert "'blast'" in message(ValueError, read_folders, tmp_path / "set")
    ids.write_text('{"healthy": 0, "blast": 1, "blast": 2}')
    assert "names 'blast' twice" in message(ValueError, read_folders, tmp_path / "set")


def test_the_doctor_of_plain_folders_says_what_to_do(tmp_path):
    """1.2: nothing is wrong with them but that nobody has divided them yet."""
    sets(tmp_path / "my set")
    said = str(leaf.check(tmp_path / "my set"))
    assert f"python -m leansense.leaf.split split '{tmp_path / 'my set'}'" in said
    assert "leaf.split" not in str(leaf.check(tmp_path / "none"))


# ---- absent classes, columns, names


def test_a_class_without_validation_pictures_is_said(tmp_path, capsys):
    """1.3: doctor, split and row say that macro-F1 cannot reach 1, and of which classes."""
    sets(tmp_path, 6)
    draw(tmp_path, "rust/0.png", "rust/1.png")
    assert split_main(["split", str(tmp_path)]) == 0
    said = "valid has no picture of rust: macro-F1 is the mean over all 3 classes"
    assert said in capsys.readouterr().out
    report = leaf.check(tmp_path)
    assert report.ok and any(said in str(problem) for problem in report.warnings)
    assert len(describe_gaps(leaf.load(tmp_path))) == 2
    row = (Path(__file__).parents[1] / "nbs/leaf/80_row.ipynb").read_text()
    assert "for line in describe_gaps(leaves)" in row


def test_a_score_says_which_classes_have_no_picture():
    """1.3: the key is there only where a class is absent."""
    import torch

    from leansense.leaf.task import evaluate

    model = torch.nn.Linear(3, 3)
    batch = {"image": torch.zeros(2, 3), "label": torch.tensor([0, 2]), "id": ["a", "b"]}
    assert evaluate(model, [batch], 3)["absent"] == [1]
    full = batch | {"image": torch.zeros(3, 3), "label": torch.tensor([0, 1, 2])}
    assert "absent" not in evaluate(model, [full], 3)


def test_a_doubled_column_is_an_error(tmp_path):
    """1.3: the second column hid the first."""
    sets(tmp_path, 3)
    (tmp_path / "label2id.json").write_text('{"blast": 0, "healthy": 1}')
    rows = [f"{c}/{k}.png,{c},{part},rust" for c in ("blast", "healthy")
            for k, part in enumerate(("train", "valid", "test"))]  # fmt: skip
    (tmp_path / "metadata.csv").write_text("\n".join(["path,label,split,label", *rows]))
    assert "two columns 'label'" in message(ValueError, leaf.load, tmp_path)


def test_odd_names_work_or_are_named(tmp_path, capsys):
    """1.4: a leading space and a backslash are part of a name; Latin-1 cannot be written down."""
    labels = (" blast", "healthy ")
    sets(tmp_path, 6, labels)
    draw(tmp_path, " blast/a\\b.png", " blast/x;y, z.png", " blast/two\nlines.png")
    assert split_main(["split", str(tmp_path)]) == 0
    data = leaf.load(tmp_path)
    assert data.classes == labels and len(data.samples) == 15
    assert all(os.path.isfile(s.path) for s in data.samples) and leaf.check(tmp_path).ok
    (tmp_path / "metadata.csv").unlink()
    draw(tmp_path, "healthy /caf\udce9.png")
    capsys.readouterr()
    assert split_main(["split", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "caf\\udce9.png' is not UTF-8; rename it" in said
    assert not (tmp_path / "metadata.csv").exists()


# ---- SimBEV


CAMS = {f"RGB-CAM_{name.upper()}": f"/d/sweeps/{name}.jpg" for name in simbev.CAMERAS}


def test_rigs_are_named(tmp_path):
    """1.5: with five cameras the ones that exist are said, once a scene; more than six are too."""
    whole = CAMS | {"GT_SEG": "/d/ground-truth/seg/a.npz"}
    five = {k: v for k, v in whole.items() if k != "RGB-CAM_BACK"}
    report = Report("simbev", str(tmp_path))
    simbev._report_sensors([(k, five) for k in range(40)], "infos.json scene_0", report)
    (problem,) = report.errors
    assert "frame 0 and 39 more frames: missing RGB-CAM_BACK; its cameras are" in str(problem)
    assert "RGB-CAM_BACK_LEFT" in str(problem)
    twelve = whole | {f"RGB-CAM_FAR_{k}": "/d/sweeps/f.jpg" for k in range(6)}
    report = Report("simbev", str(tmp_path))
    simbev._report_sensors([(0, twelve)], "infos.json scene_0", report)
    assert report.ok and "cameras that are not read: RGB-CAM_FAR_0" in str(report)
    metadata = {"camera_intrinsics": np.eye(3).tolist(), "CAM_FRONT": {}, "CAM_ROOF": {}}
    assert simbev.read_calibration(metadata, tmp_path, report) is None
    assert "it has CAM_FRONT, CAM_ROOF" in str(report.errors[0])
    entry = {"token": "a", "images": ["front.jpg", "back.jpg"], "intrinsics": [], "extrinsics": []}
    report = Report("simbev", "")
    simbev._sample(entry | {"label": "x"}, "meta.json", "label", report)
    assert "2 images (front, back)" in str(report.errors[0])


def test_moved_roots_name_the_place_searched(tmp_path):
    """1.5: a recorded path that has nothing of the layout in it is no place to look at."""
    report = Report("simbev", str(tmp_path))
    paths = [str(tmp_path / "sweeps" / "a.jpg"), "/disk/other/a.jpg", "relative/a.jpg", "a\0b"]
    assert simbev.find_missing(paths * 6, "image", "copy it", report, tmp_path) == set(paths)
    own, other = map(str, report.errors[:2])
    assert own.startswith(paths[0]) and own.endswith("copy it")
    assert "let its path name what lies below" in other and str(tmp_path) in other
    many = [f"/disk/{k}.jpg" for k in range(9)] + [f"rel/{k}.jpg" for k in range(9)]
    assert len(simbev.find_missing(many, "image", "copy it", report, tmp_path)) == 18
    scene = {"scene_info": {"config": "/d/simbev/configs/scene.yaml"}}
    assert simbev.read_label_grid(scene, tmp_path, "infos", 0, report)["assumed"]
    assert str(tmp_path / "configs/scene.yaml") in str(report.warnings[0])


def frame(path, **named) -> simbev.Frame:
    return simbev.Frame(
        "a", "s", "train", ("i",) * 6, np.eye(3), np.eye(4), str(path), side=0, **named
    )


def test_labels_are_looked_at_before_memory(tmp_path, monkeypatch):
    """2.3: 389 kB took 5 GB before they were refused."""
    np.savez_compressed(tmp_path / "a.npz", bev=np.zeros((14, 5000, 5000), bool))
    made, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    text = message(ValueError, simbev.read_label, frame(tmp_path / "a.npz", key="bev"))
    assert "5000 cells a side, more than 4096" in text and made == []
    for value, said in ((1, "without white, its brightest value is 1"), (255, "")):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / "a.png")
        if said:
            assert said in message(ValueError, simbev.read_label, frame(tmp_path / "a.png"))
        else:
            assert simbev.read_label(frame(tmp_path / "a.png")).all()
    os.mkfifo(tmp_path / "pipe.npz")
    assert "is a pipe" in message(ValueError, simbev.read_label, frame(tmp_path / "pipe.npz"))
    assert "is a pipe" in message(ValueError, read_points, str(tmp_path / "pipe.npz"))
    assert "is a pipe" in message(ValueError, read_depth, str(tmp_path / "pipe.npz"))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "[1]"])
def test_infos_that_break_the_decoder(tmp_path, text):
    report = Report("simbev", str(tmp_path))
    (tmp_path / "a.json").write_text(text)
    assert simbev.read_json(tmp_path / "a.json", dict, report) is None
    assert len(report.errors) == 1 and str(tmp_path / "a.json") in str(report.errors[0])
    matrices = [[[10**400] * 3] * 3] * 6
    assert simbev.read_matrices(matrices, 3, "meta.json", "intrinsics", report) is None


# ---- radar, points, positions


def ply(header: str, data: bytes = b"") -> bytes:
    return f"ply\n{header}\nend_header\n".encode() + data


POINTS = "property float x\nproperty float y"
BINARY = "format binary_little_endian 1.0\n"
BROKEN = {
    "more points than bytes": ply(f"{BINARY}element vertex {10**12}\n{POINTS}"),
    "a negative number": ply(f"{BINARY}element vertex -1\n{POINTS}", bytes(80)),
    "no number": ply(f"format ascii 1.0\nelement vertex\n{POINTS}"),
    "no type": ply("format ascii 1.0\nelement vertex 1\nproperty"),
    "no format": ply(f"format\nelement vertex 1\n{POINTS}"),
    "digits": ply(f"format ascii 1.0\nelement vertex {'9' * 5000}\n{POINTS}"),
    "twice x": ply(f"{BINARY}element vertex 1\n{POINTS}\n{POINTS}", bytes(16)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_point_clouds_from_outside(tmp_path, kind):
    """2.3: a header that lies, or is cut short, is one line with the file."""
    (tmp_path / "a.ply").write_bytes(BROKEN[kind])
    text = message(ValueError, features.read_points, tmp_path / "a.ply")
    assert text.startswith(f"{tmp_path / 'a.ply'}: ") and text.endswith("remove its rows")


def test_a_segmentation_of_another_size_is_named(tmp_path):
    draw(tmp_path, "unit1/camera_data/a.png")
    (tmp_path / "unit1" / "camera_data_seg").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "unit1" / "camera_data_seg" / "a.png")
    picture = str(tmp_path / "unit1" / "camera_data" / "a.png")
    assert "camera_data_seg/a.png: segmentation" in message(
        ValueError, prepare_image, picture, 8, 1
    )


def test_cubes_and_texts_from_outside(tmp_path):
    """2.3: the shape of a cube is known before it is read; a text has a bound."""
    header = str({"descr": "<c8", "fortran_order": False, "shape": (4, 10**6, 10**6)}) + "\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    (tmp_path / "a.npy").write_bytes(head)
    assert "more than 4096 a side" in message(ValueError, features.read_radar, tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("1e999 2\n")
    assert "nowhere on Earth" in message(ValueError, features.read_place, tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("1 " * 100_000)
    for read in (features.read_place, features.read_power):
        assert "more than the 65,536" in message(ValueError, read, tmp_path / "a.txt")
    assert "unit1_beam" in message(ValueError, parse_beams, "9" * 400)


# ---- nuScenes


ROWS = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "a list as token": ('[{"token": ["a"], "name": "x"}]', "token is ['a'], not text"),
    "a number as name": ('[{"token": "a", "name": 1}]', "name is 1, not text"),
    "an object": ("{}", "holds a dict"),
    "digits": ('[{"token": "a", "name": "x", "n": ' + "9" * 5000 + "}]", "digits"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_tables_from_outside(tmp_path, kind):
    """2.3: a table that is not what it should be is a line with its row."""
    content, said = ROWS[kind]
    (tmp_path / "category.json").write_text(content)
    report = Report("xad", str(tmp_path))
    assert read_table(tmp_path, "category", report) == {} and "category" in TABLES
    assert len(report.errors) == 1 and said in str(report.errors[0])


def test_labels_of_a_moment_from_outside(tmp_path):
    """2.3: maps, lists and names through the guarded readers."""
    np.save(tmp_path / "a.npy", np.zeros((200, 201)))
    assert "map has shape (200, 201)" in message(ValueError, read_map, str(tmp_path / "a.npy"))
    os.mkfifo(tmp_path / "pipe")
    for read in (read_map, lambda p: read_list(p, 4, "action")):
        assert "is a pipe" in message(ValueError, read, str(tmp_path / "pipe"))
    assert "not a file" in message(ValueError, read_names, str(tmp_path / "pipe"))
    (tmp_path / "a.json").write_text("[0, 1, 1e999, 0]")
    assert "1e999" in message(ValueError, read_list, str(tmp_path / "a.json"), 4, "action")
    levels = (f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9))
    (tmp_path / "a.yaml").write_text("\n".join(["a0: &a0 [lol]", *levels]))
    assert "aliases written out" in message(ValueError, read_names, tmp_path / "a.yaml")
    for size in ([1, float("nan"), 1], [1, 2, "3"], [1, 2], None, [1, 2, 10**9], [True, 1, 1]):
        assert not _is_size(size)
    assert _is_size([1, 2.5, 3]) and json.loads("[1]") == [1]


# ---- Flickr and COCO


def test_annotations_from_outside(tmp_path):
    """2.3: XML bombs, numbers without end, objects for numbers: a line with the file."""
    box = "<object><name>1</name><bndbox><xmin>{}</xmin><ymin>1</ymin></bndbox></object>"
    size = "<size><width>{}</width><height>9</height><depth>3</depth></size>"
    for text, said in (
        ("<!DOCTYPE a []><annotation/>", "<!DOCTYPE"),
        (f"<annotation>{size.format('9' * 400)}</annotation>", "width is"),
        (f"<annotation>{size.format(9)}{box.format('1e999')}</annotation>", "xmin is"),
    ):
        (tmp_path / "a.xml").write_text(text)
        told = message(ValueError, flickr.read_annotation, tmp_path / "a.xml")
        assert str(tmp_path / "a.xml") in told and said in told and len(told) < 500
    os.mkfifo(tmp_path / "pipe")
    for read in (flickr.read_annotation, flickr.read_sentences, flickr.read_list):
        assert "is a pipe" in message(ValueError, read, tmp_path / "pipe")


def instances(category=1, image=1, box=(1, 2, 3, 4)) -> str:
    """A COCO file of one category, one picture and one box."""
    return json.dumps({
        "categories": [{"id": category, "name": "a"}],
        "images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}],
        "annotations": [{"image_id": image, "category_id": 1, "bbox": box}],
    })  # fmt: skip


COCO = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "no list": ('{"images": {}}', "has no categories"),
    "an object as id": (instances(category={}), "category {} is empty"),
    "an infinite box": (instances(box=[1, 2, float("inf"), 4]), "is no box"),
    "a list as image": (instances(image=[1]), "image [1] is unknown"),
}


@pytest.mark.parametrize("kind", COCO)
def test_instances_from_outside(tmp_path, kind):
    """2.3: what JSON may hold and COCO does not."""
    content, said = COCO[kind]
    (tmp_path / "instances_train.json").write_text(content)
    _, report = coco.scan(tmp_path)
    assert any(said in str(problem) for problem in report.errors), str(report)


# ---- files outside the folder


def draw_leaves(root: Path) -> None:
    sets(root)
    assert split_main(["split", str(root)]) == 0


SETS = {  # how a small set is drawn, and one of its folders
    "leaf": (draw_leaves, (), "blast"),
    "simbev": (scenes.draw_plain, ("native", 0.5, 200), "ground-truth"),
    "beam": (scenes.draw_windows, (), "Multi_Modal/scenario32"),
    "xad": (scenes.draw_scenes, (), "trainval/local_binmap"),
    "openvocab": (scenes.draw_flickr, (), "flickr30k_images"),
}


@pytest.mark.parametrize("system", systems())
def test_each_doctor_warns_of_files_outside(tmp_path, system):
    """2.4: nothing beyond the folder is read without a word, in any system."""
    make, arguments, name = SETS[system]
    root = scenes.copy(tmp_path, make, *arguments)
    report = check(system, str(root))
    assert report.ok and "outside" not in str(report)
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    report = check(system, str(root))
    assert report.ok and "of the files that are read lie outside this folder" in str(report)
