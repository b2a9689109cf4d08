"""The drawn nu-A2D: situations, labels that follow and can be seen, what lies on the disk."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import message
from leansense.core.store import LIST
from leansense.world.camera import nuscenes_rig
from leansense.world.scene import boxes, join
from leansense.xad.frames import scan
from leansense.xad.split import SPLITS
from leansense.xad.standin import (
    ACTIONS,
    AHEAD,
    DESCRIPTIONS,
    LANE,
    NEAR,
    Situation,
    add_rain,
    draw_map,
    draw_moment,
    draw_situation,
    make_moments,
    name_scenes,
    place_situation,
    read_labels,
    standin,
    token,
)

pytestmark = pytest.mark.usefixtures("own_data_root")
SMALL = dict(n=8, per_scene=2, size="64x36")


@pytest.fixture(scope="module")
def moments():
    return list(make_moments(30, 0, 3))


@pytest.fixture(scope="module")
def folder(own_data_root):
    return standin(**SMALL)


def car(x, y, kind="car"):
    return boxes(kind, (x, y), (4.4, 1.8, 1.5) if kind != "pedestrian" else (0.5, 0.5, 1.7))


NOTHING = boxes("building", (60, 30), (10, 10, 8))


@pytest.mark.parametrize("thing, actions, descriptions", [
    (NOTHING, "1011", "10000000"),
    (car(10, 0), "0111", "01000000"),  # in the way
    (car(10, 0, "pedestrian"), "0111", "00100000"),
    (boxes("barrier", (9, 0.5), (2, 0.5, 1), np.pi / 2), "0111", "00010000"),
    (boxes("traffic_cone", (9, 0.5), (0.4, 0.4, 0.7)), "0111", "00010000"),
    (car(35, 0), "1011", "10000000"),  # far ahead
    (car(-8, 0), "1011", "10000000"),  # behind us
    (car(6, LANE), "1001", "10001000"),  # beside us on the left, seen front left
    (car(18, LANE), "1001", "10000000"),  # farther ahead on the left
    (car(-3, LANE), "1011", "10000100"),  # seen back left
    (car(6, -LANE, "truck"), "1010", "10000010"),
    (car(-3, -LANE, "bus"), "1011", "10000001"),
    (car(6, 2.2 * LANE), "1011", "10000000"),  # two lanes away
    (car(10, LANE, "pedestrian"), "1011", "10000000"),  # in the other lane
])  # fmt: skip
def test_labels_follow_from_objects(thing, actions, descriptions):
    found = read_labels(thing, left=True, right=True)
    assert ["".join(map(str, part)) for part in found] == [actions, descriptions]
    edge, _ = read_labels(thing, left=False, right=False)
    assert edge[2:] == [0, 0] and edge[:2] == found[0][:2]


def test_both_values_of_each_label_occur(moments):
    for field, names in (("action", ACTIONS), ("description", DESCRIPTIONS)):
        share = np.mean([getattr(moment, field) for moment in moments], 0)
        assert share.shape == (len(names),) and (share > 0.08).all() and (share < 0.75).all(), share
    assert all(sum(moment.action[:2]) == 1 for moment in moments)


def test_no_label_hangs_on_a_centimetre(moments):
    """Whatever is moved by 25 cm along the road leaves all labels as they are."""
    for moment in moments:
        objects = moment.snapshot.objects
        own = read_labels(objects, True, True)
        assert own[1] == moment.description
        for step in (-0.25, 0.25):
            moved = replace(objects, centre=objects.centre + [step, 0, 0])
            assert read_labels(moved, True, True) == own


ZONES = {  # description -> (camera, classes, x, y)
    1: (1, ("car", "truck", "bus"), (2, NEAR), (-1.75, 1.75)),
    2: (1, ("pedestrian",), (2, NEAR), (-1.75, 1.75)),
    3: (1, ("barrier", "traffic_cone"), (2, NEAR), (-1.75, 1.75)),
    4: (0, ("car", "truck", "bus"), (3, 9), (2, 5.4)),
    5: (3, ("car", "truck", "bus"), (-6, -1), (2, 5.4)),
    6: (2, ("car", "truck", "bus"), (3, 9), (-5.4, -2)),
    7: (5, ("car", "truck", "bus"), (-6, -1), (-5.4, -2)),
}


def test_each_reason_shows_in_its_camera(moments):
    """The published cameras: 0-3 front, 4 front left, 5 back left, 6 front right, 7 back right."""
    rig, shown = nuscenes_rig(45, 80), Counter()
    for moment in moments[::2]:
        images = draw_moment(moment, rig)
        for k, (camera, kinds, x, y) in ZONES.items():
            some = moment.snapshot.objects.select(*kinds)
            foot, middle = some.footprints()[..., 0], some.centre[:, 1]
            near = (foot > x[0]).any(1) & (foot < x[1]).any(1) & (middle > y[0]) & (middle < y[1])
            assert near.any() == bool(moment.description[k])
            if near.any():
                share = np.isin(images.instance[camera], some.instance[near]).mean()
                assert share > (0.004 if k in (2, 3) else 0.01), (moment.scene, moment.order, k)
                shown[k] += 1
    assert set(shown) == set(ZONES)


def test_a_situation_replaces_the_traffic(moments):
    rng = np.random.default_rng(5)
    drawn = [draw_situation(rng) for _ in range(200)]
    assert {s.ahead for s in drawn} == set(AHEAD)
    for part in ("left", "right"):
        sides = np.array([getattr(s, part) for s in drawn])
        assert sides.any(0).all() and not sides.all(0).any()
        assert not (sides[:, 0] & sides[:, 1]).any()
    none = [draw_situation(rng, vehicles=False) for _ in range(50)]
    assert not any(any(s.left + s.right) or s.far or s.ahead == "vehicle" for s in none)
    calm = Situation("free", False, (False,) * 3, (False,) * 3)
    jam = replace(moments[0].snapshot, objects=join(car(9, 0), car(6, LANE), car(60, 0), NOTHING))
    placed = place_situation(jam, calm, [(LANE, 0.0), (-LANE, 0.0)], rng)
    assert placed.objects.centre[:, 0].tolist() == [60, 60]


# ---- names and parts


def test_scenes_are_of_their_published_parts():
    for n in (8, 30, 100):
        parts = name_scenes(n)
        assert len(parts) == n
        for name, part in parts.items():
            split = "pretrain" if part.startswith("pretrain") else "nu_a2d"
            word = {"pretrain": "train", "pretrain_valid": "valid"}.get(part, part)
            assert name in SPLITS[split][word]
        assert {"train", "valid", "test", "pretrain_valid"} <= set(parts.values())
        assert {"scene-0053", "scene-0714"} & set(parts)
    assert Counter(name_scenes(100).values()) == {
        "train": 58, "valid": 10, "test": 22, "pretrain": 8, "pretrain_valid": 2
    }  # fmt: skip
    assert "at least 8" in message(ValueError, name_scenes, 7)
    assert "at most" in message(ValueError, name_scenes, 400)


@pytest.mark.parametrize("wrong, said", [
    ({"size": "320"}, "give WIDTHxHEIGHT"), ({"size": "8x8"}, "give WIDTHxHEIGHT"),
    ({"per_scene": 0}, "give 1 to 40"), ({"n": 3}, "at least 8 scenes"),
])  # fmt: skip
def test_wrong_recipes_write_nothing(tmp_path, wrong, said):
    assert said in message(ValueError, standin, tmp_path, **SMALL | wrong)
    assert list(tmp_path.iterdir()) == []


# ---- what lies on the disk


def test_the_same_recipe_gives_the_same_bytes(folder, tmp_path):
    again = standin(tmp_path, **SMALL)
    assert (again / LIST).read_bytes() == (folder / LIST).read_bytes()
    before = (again / LIST).stat().st_mtime_ns
    assert standin(tmp_path, **SMALL) == again
    assert (again / LIST).stat().st_mtime_ns == before
    other = standin(tmp_path, **SMALL, seed=1)
    lists = [json.loads((place / LIST).read_text()) for place in (again, other)]
    assert lists[0].keys() == lists[1].keys() and lists[0] != lists[1]


def test_what_is_written(folder):
    place, made = folder / "trainval", list(make_moments(8, 0, 2))
    count = Counter(path.parent.name for path in place.rglob("*") if path.is_file())
    assert count["v1.0-trainval"] == 13 and count["local_binmap"] == 16 == count["CAM_BACK"]
    assert count["action_all"] == count["desc_all"] == 14 and count["LIDAR_TOP"] == 8
    assert count["maps"] == 1
    for moment in made:
        name = token(moment.scene, moment.order)
        stored = np.load(place / f"local_binmap/{name}.npy")
        assert stored.shape == (200, 200) and (stored == draw_map(moment.snapshot)).all()
        path = place / f"action_all/{name}.json"
        assert path.exists() == moment.labelled
        if moment.labelled:
            assert json.loads(path.read_text()) == moment.action
            saved = json.loads((place / f"desc_all/{name}.json").read_text())
            assert saved == moment.description
    splits = json.loads((place / "splits.json").read_text())
    assert splits["nu_a2d"]["test"] == ["scene-0053", "scene-0714"]
    assert "scene-0714" in splits["pretrain"]["train"]
    assert "scene-0714" not in splits["pretrain_clean"]["train"]


def test_boxes_come_back_as_they_were_drawn(folder):
    frames = {frame.id: frame for frame in scan(folder)[1]}
    for moment in make_moments(8, 0, 2):
        frame = frames.get(token(moment.scene, moment.order))
        if frame is None:
            continue
        objects = moment.snapshot.objects.select("car", "truck", "bus", "motorcycle", "bicycle")
        near = objects[np.hypot(*objects.centre[:, :2].T) <= 70]
        found = frame.boxes.vehicles()
        assert len(found) == len(near)
        for centre, corners in zip(near.centre, near.corners()):
            at = np.abs(found.centre - centre).sum(1).argmin()
            assert np.allclose(found.corners()[at], corners, atol=1e-6)
        rig = nuscenes_rig(36, 64)
        assert np.allclose(frame.rots, rig.rotation) and np.allclose(frame.trans, rig.translation)
        assert np.allclose(frame.intrins, rig.K) and frame.made_for == ((64, 36),) * 6


def test_weather(folder):
    about = {frame.scene: frame.about for frame in scan(folder)[1]}
    assert sum(text.startswith("Rain") for text in about.values()) == 1
    assert sum(text.startswith("Night") for text in about.values()) == 1
    made = {moment.weather: moment for moment in make_moments(8, 0, 1)}
    rig = nuscenes_rig(36, 64)
    bright = {name: draw_moment(moment, rig).image.mean() for name, moment in made.items()}
    assert bright["night"] < 0.5 * min(bright["day"], bright["rain"])
    dark = np.zeros((2, 90, 160, 3), np.uint8)
    wet = add_rain(dark, 3)
    assert (wet == add_rain(dark, 3)).all() and (wet != add_rain(dark, 4)).any()
    assert not dark.any() and 0.01 < (wet > 0).mean() < 0.2
    assert Path(folder).name.startswith("xad-n8-2-s0-64x36-")
