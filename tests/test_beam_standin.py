"""The stand-in of beam prediction: layout, columns, geometry, reproducible bytes, faults."""

import csv

import numpy as np
import pytest
from PIL import Image

from leansense.beam.standin import (
    FAULTS,
    FOLDERS,
    SITES,
    locate,
    make_drive,
    make_station,
    plan,
    plant_fault,
    standin,
    standin_arrays,
    take_frame,
)
from leansense.core.store import LIST
from leansense.world.channel import Array, find_beam, find_paths, receive

SMALL = {"sequences": 1, "frames": 6, "size": "64x36", "radar": "32x16", "rays": 128}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return standin(tmp_path_factory.mktemp("beam"), **SMALL)


def rows(root, folder):
    with open(root / folder / FOLDERS[folder], newline="") as file:
        return list(csv.DictReader(file))


def files(root):
    """Every file's bytes by name, without the list, whose order of keys is fixed as well."""
    found = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def test_folders_and_columns(root):
    assert {path.name for path in root.iterdir()} == {*FOLDERS, LIST}
    for folder, counts in plan(1).items():
        table = rows(root, folder)
        assert len(table) == 2 * sum(counts.values())  # six frames: two windows
        names = list(table[0])
        assert names[:2] == ["index", "unit1_rgb_1"] and names[-1] == "seq_index"
        assert ("unit1_beam" in names) is (folder != "Multi_Modal_Test")
        assert ("unit1_pwr_60ghz" in names) is (folder != "Multi_Modal_Test")
        scenarios = {int(row["unit1_rgb_5"].split("scenario")[1][:2]) for row in table}
        assert scenarios == set(counts)
        assert [row["index"] for row in table] == [str(n + 1) for n in range(len(table))]


def test_paths_start_as_published_and_exist(root):
    for folder in FOLDERS:
        for row in rows(root, folder):
            for name, value in row.items():
                if name in ("index", "unit1_beam", "seq_index"):
                    continue
                assert value.startswith("./scenario3") and (root / folder / value).is_file()
            assert row["unit1_rgb_1"][:30] == row["unit1_rgb_1"].rsplit("/", 1)[0]


def test_windows_share_frames_and_sequences_do_not(root):
    first, second, *rest = rows(root, "Multi_Modal")
    assert first["unit1_rgb_2"] == second["unit1_rgb_1"]
    images = {row[f"unit1_rgb_{k}"] for row in rows(root, "Multi_Modal") for k in range(1, 6)}
    kept = list((root / "Multi_Modal").glob("scenario*/unit1/camera_data/*.jpg"))
    assert len(images) == len(kept) == 18
    seen = {}
    for folder in FOLDERS:
        for row in rows(root, folder):
            key = row["unit1_rgb_5"].split("/")[1], row["seq_index"]
            assert seen.setdefault(key, folder) == folder


def test_labels_are_the_strongest_beams(root):
    for folder in ("Multi_Modal", "Adaptation_dataset_multi_modal"):
        for row in rows(root, folder):
            power = np.loadtxt(root / folder / row["unit1_pwr_60ghz"])
            assert power.shape == (64,) and (power > 0).all()
            assert int(row["unit1_beam"]) == power.argmax() + 1
    assert not list((root / "Multi_Modal_Test").rglob("mmWave*"))


def test_content_of_a_frame(root):
    folder, row = root / "Multi_Modal", rows(root, "Multi_Modal")[0]
    assert Image.open(folder / row["unit1_rgb_1"]).size == (64, 36)
    cube = np.load(folder / row["unit1_radar_1"], allow_pickle=False)
    assert cube.shape == (4, 32, 16) and cube.dtype == np.complex64
    head, body = (folder / row["unit1_lidar_1"]).read_text().split("end_header\n")
    points = np.array([line.split() for line in body.splitlines()], float)
    assert head.startswith("ply\nformat ascii 1.0\n") and "property float z" in head
    assert f"element vertex {len(points)}\n" in head and points.shape[1] == 4
    assert (points[:, 0] < 0).all() and len(points) > 50  # the street lies at negative x
    for name in ("unit1_loc", "unit2_loc_1", "unit2_loc_2"):
        latitude, longitude = np.loadtxt(folder / row[name])
        assert 33.4 < latitude < 33.5 and -112 < longitude < -111.9


def test_variants_of_the_camera(root):
    base = root / "Multi_Modal"
    names = {n: {p.name for p in (base / f"scenario{n}/unit1").iterdir()} for n in (32, 33)}
    assert {"camera_data_mask", "camera_data_seg"} <= names[32]
    assert "camera_data_raw" in names[33] and "camera_data_raw" not in names[32]
    raw, bright = (
        np.asarray(Image.open(base / f"scenario33/unit1/{name}/image_1.jpg")).mean()
        for name in ("camera_data_raw", "camera_data")
    )
    assert bright > 2 * raw


def test_same_numbers_same_bytes(root, tmp_path):
    again = standin(tmp_path, **SMALL)
    assert files(again) == files(root)
    assert again.name == root.name
    other = standin(tmp_path, **SMALL | {"seed": 1})
    name = "Multi_Modal/scenario32/unit1/radar_data/radar_data_1.npy"
    assert files(other)[name] != files(root)[name]


@pytest.mark.parametrize("number", SITES)
def test_the_fixes_give_the_published_angle(number):
    site = SITES[number]
    here = np.array(site.place)
    for angle in (-40.0, -5.0, 20.0, 44.0):
        place = 15 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        north, east = (locate(site, place) - here) * 110_900
        east *= 1.0035 * np.cos(np.radians(here[0]))
        assert np.hypot(north, east) == pytest.approx(15, rel=1e-3)
        found = np.degrees(np.arctan(north / east)) - site.azimuth
        found += 180 if found < -90 else -180 if found > 90 else 0
        assert found == pytest.approx(angle, abs=0.1)


@pytest.mark.parametrize("number", SITES)
def test_beam_follows_the_user_through_a_sequence(number):
    array, off, best = Array(), [], []
    for sequence in range(1, 13):
        drive = make_drive(SITES[number], (0, number, sequence), 12)
        for frame in (0, 6, 11):
            view = drive.snapshot(frame)
            x, y, z = view.objects.centre[0]
            angle = np.degrees(np.arctan2(y, x))
            assert abs(angle) < 45
            place = np.array([x, y, 1.6])
            power = receive(find_paths(view, place, array, own=0), array, [sequence, frame])
            best.append(int(power.argmax()))
            off.append(abs(best[-1] - find_beam(angle, array)))
    assert np.mean(np.array(off) <= 1) > 0.85
    assert len(set(best)) > 15 and np.mean(np.diff(np.reshape(best, (-1, 3)), axis=1) != 0) > 0.9


def test_a_long_sequence_stays_in_view():
    drive = make_drive(SITES[33], (0, 33, 1), 60)
    for frame in (0, 30, 59):
        x, y, _ = drive.snapshot(frame).objects.centre[0]
        assert abs(np.degrees(np.arctan2(y, x))) < 45


def test_lidar_is_short_ranged_and_night_is_dark():
    station = make_station("64x36", "32x16", 128)
    day, night = (
        take_frame(make_drive(SITES[number], (0, number, 1), 6), 3, station) for number in (31, 33)
    )
    assert np.linalg.norm(day.points[:, :3], axis=1).max() < 19
    assert night.image.mean() < 0.3 * day.image.mean()


def test_published_sizes():
    station = make_station("960x540", "256x250", 2048)
    shot = take_frame(make_drive(SITES[31], (0, 31, 1), 6), 3, station)
    assert shot.image.shape == (540, 960, 3) and shot.image.dtype == np.uint8
    assert shot.cube.shape == (4, 256, 250) and shot.cube.dtype == np.complex64
    assert shot.power.shape == (64,) and len(shot.points) > 2000


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_change_one_file(fault, root, tmp_path):
    spoilt = plant_fault(root, tmp_path / "copy", fault)
    before, after = files(root), files(tmp_path / "copy")
    name = spoilt.relative_to(tmp_path / "copy").as_posix()
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed == {name} and not after.keys() - before.keys()


def test_arrays_have_the_published_names_and_types(tmp_path):
    made = standin_arrays(tmp_path, n=45, seed=3, scenarios=(1, 6), frames=20)
    for number in (1, 6):
        array = {
            name: np.load(made / f"scenario{number}_{name}_1-45.npy", allow_pickle=False)
            for name in ("seq_index", "unit1_loc", "unit2_loc", "unit1_pwr_60ghz")
        }
        assert array["seq_index"].dtype == np.int64
        assert np.bincount(array["seq_index"]).tolist() == [0, 20, 20, 5]
        assert array["unit1_pwr_60ghz"].shape == (45, 64)
        assert array["unit1_loc"].shape == array["unit2_loc"].shape == (45, 2)
        assert all(array[n].dtype == np.float64 for n in array if n != "seq_index")
        assert (array["unit1_pwr_60ghz"] > 0).all() and np.ptp(
            array["unit1_loc"], axis=0
        ).max() == 0
    assert sum(path.suffix == ".npy" for path in made.iterdir()) == 8


@pytest.mark.parametrize(
    "given, said",
    [
        ({"sequences": 0}, "at least 1 sequence"),
        ({"frames": 4}, "5 frames"),
        ({"size": "big"}, "size='big'"),
        ({"radar": "4x4"}, "radar='4x4'"),
    ],
)
def test_impossible_numbers(given, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        standin(tmp_path, **given)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least one sample"):
        standin_arrays(tmp_path, n=0)
    with pytest.raises(ValueError, match="nan power"):
        plant_fault(tmp_path, tmp_path / "copy", "nan powers")
