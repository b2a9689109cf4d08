"""Tables, splits, batches, augmentation and the doctor of the beam system, on hand-made folders."""

import csv
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import message
from leansense.beam import data as beam_data
from leansense.beam.augment import IMAGE, change_images, change_lidar, change_radar, mirror
from leansense.beam.data import (
    BeamDataset,
    Options,
    check,
    choose_split,
    collate,
    dataset,
    identify,
    loaders,
    prepare_image,
)
from leansense.beam.features import count_points, fill_cells, find_field, make_radar, make_target
from leansense.beam.layouts import (
    PARTS,
    Beam,
    Sample,
    choose_folder,
    guess_sequences,
    load,
    number_of,
    parse_beams,
    scan,
)
from leansense.beam.split import (
    VARIANTS,
    add_copies,
    draw_order,
    drop_shared,
    make_split,
    split_by_drive,
)
from leansense.beam.standin import FAULTS, plant_fault, standin

pytestmark = pytest.mark.usefixtures("own_data_root")
STEP, FRAMES = 2, 20  # numbers between frames of a window, as in the challenge; windows' frames


def write_frame(base: Path, number: int, rng: np.random.Generator) -> int:
    """The files of one raw frame below a scenario's folder; its best beam, 1 to 64."""
    beam = int(rng.integers(1, 65))
    unit = base / "unit1"
    picture = Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8))
    for name in ("camera_data", "camera_data_raw", "camera_data_mask", "camera_data_seg"):
        picture.save(unit / name / f"image_{number}.jpg")
    points = rng.uniform((-40, -10), (0, 5), (60, 2))
    head = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\nproperty float x\n"
    rows = "\n".join(f"{x:.2f} {y:.2f}" for x, y in points)
    for name in ("lidar_data", "lidar_data_filtered"):
        text = f"{head}property float y\nend_header\n{rows}\n"
        (unit / name / f"lidar_data_{number}.ply").write_text(text)
    cube = (rng.normal(size=(2, 4, 16, 8)) * [[[[1.0]]], [[[1.0j]]]]).sum(0)
    np.save(unit / "radar_data" / f"radar_data_{number}.npy", cube.astype(np.complex64))
    power = rng.uniform(0.1, 0.5, 64)
    power[beam - 1] = 0.9
    text = "\n".join(f"{p:.6f}" for p in power)
    (unit / "mmWave_data" / f"mmWave_power_{number}.txt").write_text(text)
    place = f"{33.42 + number * 1e-6:.7f}\n-111.929\n"
    (base / "unit2" / "GPS_data" / f"GPS_location_{number}.txt").write_text(place)
    return beam


def write_part(root: Path, part: str, scenarios: dict[int, int], sequences: bool = True) -> None:
    """One folder of the layout: drives of 20 raw frames for each scenario, a window every other."""
    folder, table = PARTS[part]
    rng, rows = np.random.default_rng(len(part)), []
    for scenario, drives in scenarios.items():
        base, local = root / folder / f"scenario{scenario}", f"./scenario{scenario}"
        unit = ["camera_data", "camera_data_raw", "camera_data_mask", "camera_data_seg"]
        unit += ["lidar_data", "lidar_data_filtered", "radar_data", "mmWave_data", "GPS_data"]
        for name in [f"unit1/{n}" for n in unit] + ["unit2/GPS_data"]:
            (base / name).mkdir(parents=True)
        (base / "unit1/GPS_data/gps_location.txt").write_text("33.4203\n-111.9292\n")
        for drive in range(drives):
            first = 1 + drive * 100
            beams = {first + k: write_frame(base, first + k, rng) for k in range(FRAMES)}
            for last in range(first + 4 * STEP, first + FRAMES, STEP):
                ids = [last - STEP * k for k in (4, 3, 2, 1, 0)]
                row = {"index": len(rows) + 1}
                for k, i in enumerate(ids, 1):
                    row[f"unit1_rgb_{k}"] = f"{local}/unit1/camera_data/image_{i}.jpg"
                for k, i in enumerate(ids, 1):
                    row[f"unit1_lidar_{k}"] = f"{local}/unit1/lidar_data/lidar_data_{i}.ply"
                    row[f"unit1_radar_{k}"] = f"{local}/unit1/radar_data/radar_data_{i}.npy"
                row["unit1_loc"] = f"{local}/unit1/GPS_data/gps_location.txt"
                for k, i in enumerate(ids[:2], 1):
                    row[f"unit2_loc_{k}"] = f"{local}/unit2/GPS_data/GPS_location_{i}.txt"
                if part != "challenge":
                    power = f"{local}/unit1/mmWave_data/mmWave_power_{last}.txt"
                    row |= {"unit1_pwr_60ghz": power, "unit1_beam": beams[last]}
                rows.append(row | ({"seq_index": drive + 1} if sequences else {}))
    write_table(root, part, rows)


def table_of(root: Path, part: str = "development") -> Path:
    return root.joinpath(*PARTS[part])


def write_table(root: Path, part: str, rows: list[dict]) -> None:
    with open(table_of(root, part), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_table(root: Path, part: str = "development") -> list[dict]:
    with open(table_of(root, part), newline="") as file:
        return list(csv.DictReader(file))


def write_all(root: Path) -> Path:
    write_part(root, "development", {32: 4, 33: 3, 34: 3})
    write_part(root, "adaptation", {31: 3, 32: 1, 33: 1})
    write_part(root, "challenge", {31: 1, 34: 1})
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Nobody writes into this one."""
    return write_all(tmp_path_factory.mktemp("beam"))


@pytest.fixture
def small(tmp_path) -> Path:
    """One scenario, to be broken."""
    write_part(tmp_path, "development", {33: 3})
    return tmp_path


# --- tables ---


def test_samples(whole):
    data = load(whole)
    assert Counter(s.part for s in data.samples) == {
        "development": 60, "adaptation": 30, "challenge": 12,
    }  # fmt: skip
    s = data.samples[0]
    assert (s.id, s.scenario, s.sequence) == ("development/0", 32, "32-1")
    assert [number_of(path) for path in s.image] == [1, 3, 5, 7, 9]
    assert [number_of(path) for path in s.car] == [1, 3]
    assert all(Path(p).is_absolute() and Path(p).is_file() for p in data.files())
    row = read_table(whole)[0]
    assert s.beams == (int(row["unit1_beam"]) - 1,) and number_of(s.power[0]) == 9
    assert all(not s.beams for s in data.samples if s.part == "challenge")
    assert load(whole, seq_len=1).samples[0].image == s.image[-1:]


def test_camera_folders(whole):
    def used(**options):
        return {
            (s.scenario, Path(path).parent.name)
            for s in load(whole, **options).samples
            for path in s.image
        }

    day, night = {31, 32}, {33, 34}
    assert used() == {(s, "camera_data") for s in day | night}
    assert used(enhanced=0) == {(s, "camera_data") for s in day} | {
        (s, "camera_data_raw") for s in night
    }
    assert used(enhanced=0, add_mask=1) == {(s, "camera_data_mask") for s in day | night}
    assert "add_mask=1 with enhanced=1" in message(ValueError, load, whole, add_mask=1)
    assert choose_folder(31, 1, 1) == "camera_data_mask"
    filtered = load(whole, filtered=1).samples[0].lidar[0]
    assert Path(filtered).parent.name == "lidar_data_filtered"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"unit1_beam": "0"}, "row 5: unit1_beam is 0; give a beam from 1 to 64"),
        ({"unit1_beam": "65"}, "row 5: unit1_beam is 65"),
        ({"unit1_beam": "x"}, "row 5: unit1_beam is 'x'"),
        ({"unit1_rgb_5": "./somewhere/a_1.jpg"}, "names no scenario"),
        ({"unit1_lidar_3": "./scenario33/unit1/lidar_data/lidar_data_999.ply"},
         "row 5: unit1_lidar_3 './scenario33/unit1/lidar_data/lidar_data_999.ply' is not there"),
        ({"unit2_loc_1": ""}, "row 5: unit2_loc_1 '' is not there"),
    ],
)  # fmt: skip
def test_faulty_rows(small, change, said):
    rows = read_table(small)
    rows[3] |= change
    write_table(small, "development", rows)
    kind = FileNotFoundError if "not there" in said else ValueError
    text = message(kind, load, small)
    assert said in text and str(table_of(small)) in text
    if "names no scenario" in said:
        return  # no frame of it can be found, so it is a fault of the table
    kept = load(small, damaged="absent")
    assert len(kept.samples) == len(rows) - ("lidar" not in said)


def test_faulty_tables(small, tmp_path_factory):
    rows = read_table(small)
    for name in ("unit1_radar_2", "unit1_beam", "unit1_loc"):
        write_table(small, "development", [{k: v for k, v in r.items() if k != name} for r in rows])
        assert f"has no column {name}" in message(ValueError, load, small)
    empty = tmp_path_factory.mktemp("empty")
    assert "holds no table of the challenge" in message(FileNotFoundError, load, empty)
    table_of(small).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(ValueError, load, small) or "has no column" in message(
        ValueError, load, small
    )


def test_nan_power(small):
    path = next(small.rglob("mmWave_power_9.txt"))
    path.write_text(path.read_text().replace("0.900000", "nan"))
    text = message(ValueError, load, small)
    assert str(path) in text and "is nan" in text and "row 2 of" in text
    assert len(load(small, damaged="absent").samples) == 17
    assert load(small, damaged="absent").left_out == {"power": 1}


def test_labels_of_several_steps():
    assert parse_beams("1_64_7") == (0, 63, 6) and parse_beams("12.0") == (11,)


# --- several steps ---


def test_windows_are_rebuilt(whole):
    """Ten frames 2 apart, and positions before them, do not fit into 20 raw frames; two do."""
    assert "no window of 10 frames and 5 beams" in message(
        ValueError, load, whole, seq_len=10, pred_len=5
    )
    data = load(whole, seq_len=2, pred_len=5)
    labelled = [s for s in data.samples if s.part == "development"]
    s = labelled[0]
    last = number_of(s.image[-1])
    assert [number_of(path) for path in s.image] == [last - 2, last]
    assert [number_of(path) for path in s.car] == [last - 12, last - 6]
    assert [number_of(path) for path in s.power] == list(range(last, last + 5))
    for path, beam in zip(s.power, s.beams):
        assert np.loadtxt(path).argmax() == beam
    assert data.left_out["window"] > 0


@pytest.mark.parametrize("seq_len", [10, 20])
def test_long_windows(tmp_path, seq_len, monkeypatch):
    monkeypatch.setattr("test_beam_data.FRAMES", 2 * seq_len + 10)
    write_part(tmp_path, "development", {33: 3})
    data = load(tmp_path, seq_len=seq_len, pred_len=5)
    for s in data.samples:
        ids = [number_of(path) for path in s.image]
        assert len(s.image) == len(s.lidar) == len(s.radar) == seq_len and len(s.beams) == 5
        assert set(np.diff(ids)) == {2} and ids == [number_of(path) for path in s.radar]
        assert {number // 100 for number in ids} == {ids[0] // 100}, "within one drive"
    parts = loaders(make_split(data), {"size": 16, "batch_size": 2, "augmentation": 0})
    batch = next(iter(parts["train"]))
    assert batch["image"].shape == (2, seq_len, 3, 16, 16)
    assert batch["beam"].shape == (2, 5) and batch["target"].shape == (2, 5, 64)


def test_sequences_are_guessed(tmp_path):
    write_part(tmp_path, "development", {33: 3}, sequences=False)
    data = load(tmp_path)
    assert Counter(s.sequence for s in data.samples) == {"33-d0": 6, "33-d1": 6, "33-d2": 6}
    toy = replace(data.samples[0], sequence="")
    long = [replace(toy, id=str(k), image=(f"image_{2 * k}.jpg",)) for k in range(120)]
    assert sorted(Counter(s.sequence for s in guess_sequences(long)).values()) == [20, 50, 50]


# --- splits ---

TOY = Sample("", "development", 32, "", (), (), (), "", ("", ""))


def toys(counts: dict[int, int], part: str = "adaptation") -> list[Sample]:
    return [
        replace(TOY, id=f"{part}/{s}/{k}", part=part, scenario=s, sequence=f"{s}-{k // 5}")
        for s, n in counts.items()
        for k in range(n)
    ]


def test_published_split():
    order = draw_order(15943)
    assert order[14348:][:5] == [2047, 12892, 3829, 5025, 12901]
    torch.manual_seed(100)
    train, valid = torch.utils.data.random_split(range(15943), [14348, 1595])
    assert list(train.indices) + list(valid.indices) == order
    rows = toys({32: 11143}, "development") + toys({31: 50, 32: 25, 33: 25})
    whole = add_copies(rows)
    assert len(VARIANTS) == 47 and len(whole) == 15943
    made = make_split(Beam("toy", "", tuple(rows)), "published")
    assert made.counts() == {"train": 14348, "valid": 1595, "test": 1595}
    valid = made.part("valid")
    assert sum(s.scenario == 31 for s in valid) == 235
    assert sum(s.part == "adaptation" for s in valid) == 482
    assert [s.id for s in valid] == [whole[k].id for k in order[14348:]]
    plain = make_split(Beam("toy", "", tuple(rows)), "published", copies=False)
    assert plain.counts() == {"train": 10118, "valid": 1125, "test": 1125}


def test_split_by_drive():
    rows = toys({31: 50, 32: 100, 33: 35, 34: 15}, "development")
    parts = split_by_drive(rows)
    of = {}
    for s in parts:
        assert of.setdefault((s.scenario, s.sequence), s.split) == s.split
    counts = Counter((scenario, part) for (scenario, _), part in of.items())
    assert all(counts[s, p] for s in (31, 32, 33, 34) for p in ("train", "valid", "test"))
    assert counts[32, "test"] == 4 and counts[32, "valid"] == 3 and len(parts) == len(rows)
    again = {s.id: s.split for s in split_by_drive(rows[::-1])}
    assert again == {s.id: s.split for s in parts}, "the order of rows does not matter"


def test_leave_one_scenario_out():
    data = Beam("toy", "", tuple(toys({31: 50, 32: 100, 33: 35}, "development")))
    made = make_split(data, "scenario31")
    assert {s.scenario for s in made.part("test")} == {31}
    assert {s.scenario for s in made.samples if s.split != "test"} == {32, 33}
    assert made.counts()["test"] == 50 and made.counts()["valid"] > 0
    assert "split='scenario34' is unknown" in message(ValueError, make_split, data, "scenario34")
    assert "nearest is 'sequence'" in message(ValueError, make_split, data, "sequnce")
    alone = Beam("toy", "here", tuple(toys({31: 5}, "development")))
    assert "leaves valid empty" in message(ValueError, make_split, alone, "sequence")


def test_other_published_splits():
    rows = toys({32: 200, 34: 100}, "development") + toys({31: 50, 33: 25})
    data = Beam("toy", "", tuple(rows))
    assert make_split(data, "dev_80_20").counts() == {"train": 240, "valid": 60, "test": 60}
    tuned = make_split(data, "finetune")
    train = Counter((s.part, s.scenario) for s in tuned.part("train"))
    assert train == {("adaptation", 31): 50, ("adaptation", 33): 25, ("development", 34): 25}
    ids = {s.id for s in tuned.part("train")}
    assert not any(s.id in ids for s in tuned.samples if s.split != "train")
    assert choose_split({"finetune": 1}) == "finetune" and choose_split({}) == "sequence"
    assert choose_split({"split": "published", "train_adapt_together": 0}) == "dev_80_20"


def test_no_frame_is_in_two_parts(whole, tmp_path):
    a = replace(TOY, id="a", image=("1", "2"), split="train")
    b = replace(TOY, id="b", image=("2", "3"), split="valid")
    c = replace(TOY, id="c", lidar=("3",), image=("4",), split="test")
    assert [s.id for s in drop_shared([a, b, c])] == ["a", "c"]
    assert [s.id for s in drop_shared([a, b, replace(c, lidar=())])] == ["b", "c"]
    made = make_split(load(whole))
    frames = {p: {f for s in made.part(p) for f in s.image} for p in ("train", "valid", "test")}
    assert all(frames.values())
    assert not frames["train"] & frames["valid"] and not frames["test"] & (
        frames["train"] | frames["valid"]
    )
    assert all(s.part != "challenge" for s in made.samples)


# --- batches ---


def test_batch_is_what_the_files_say(whole):
    data = make_split(load(whole))
    part = BeamDataset(data, "test", size=24, angle="atan2")
    batch = part.batch([1, 4])
    s = part.samples[4]
    assert batch["id"] == [part.samples[1].id, s.id]
    assert (batch["image"][1, 2].numpy() == prepare_image(s.image[2], 24)).all()
    points = np.loadtxt(s.lidar[3], skiprows=6)
    wanted = fill_cells(count_points(points, find_field(s.scenario), 24))
    assert (batch["lidar"][1, 3, 0].numpy() == wanted).all()
    radar = make_radar(np.load(s.radar[0]), 24)
    assert batch["radar"][1, 0].numpy() == pytest.approx(radar, abs=1e-3)
    assert batch["beam"].dtype == torch.int64 and batch["beam"][1] == s.beams[0]
    assert (batch["target"][1].numpy() == make_target(s.beams[0])).all()
    assert batch["present"].all() and batch["present"].shape == (2, 3, 5)
    assert batch["gps"].shape == (2, 2, 2) and batch["scenario"][1] == s.scenario
    kinds = {n: v.dtype for n, v in batch.items() if n != "id"}
    assert kinds["image"] == torch.uint8
    assert {kinds[n] for n in ("lidar", "radar", "gps", "target")} == {torch.float32}


def test_windows_share_cached_frames(whole):
    data = make_split(load(whole))
    part = BeamDataset(data, "train", size=16)
    frames = {path for s in data.samples for path in s.image}
    assert len(part.arrays["image"]) == len(frames) < sum(len(s.image) for s in data.samples)
    again = BeamDataset(data, "valid", size=16)
    assert again.arrays["image"].filename == part.arrays["image"].filename
    other = BeamDataset(data, "valid", size=16, custom_FoV_lidar=0)
    assert other.arrays["lidar"].filename != part.arrays["lidar"].filename
    assert len(pickle.dumps(part).replace(str(whole).encode(), b"")) < 100_000  # no arrays in it
    copy = pickle.loads(pickle.dumps(part))
    assert all(torch.equal(copy[2, 3][n], part[2, 3][n]) for n in ("image", "radar", "target"))


def test_loaders(whole):
    params = {"data": str(whole), "size": 16, "batch_size": 4, "seed": 3, "num_workers": 0}
    parts = loaders(dataset(params), params | {"add_velocity": 0})
    assert set(parts) == {"train", "valid", "test"}
    batch = next(iter(parts["train"]))
    assert batch["radar"].shape == (4, 5, 1, 16, 16) and len(batch["id"]) == 4
    assert len(identify(params)) > 32 and identify(params).endswith("-sequence-5to1")
    assert identify(params | {"split": "scenario32"}) != identify(params)
    single = dataset(params | {"seq_len": 1})
    batch = next(iter(loaders(single, params)["valid"]))
    assert batch["image"].shape[1] == 1 and batch["gps"].shape[1:] == (2, 2)


def test_augmentation_is_of_training_only_and_repeats(whole):
    data = make_split(load(whole))
    train, valid = (BeamDataset(data, part, size=16, seed=5) for part in ("train", "valid"))
    plain = BeamDataset(data, "train", size=16, augmentation=0)
    changed = [not torch.equal(train[e, 0]["image"], plain[0]["image"]) for e in range(12)]
    assert 6 <= sum(changed) <= 12
    for key in ((1, 0), (7, 3)):
        one, two = train[key], train[key]
        assert all(torch.equal(one[n], two[n]) for n in ("image", "lidar", "radar"))
    assert all(torch.equal(valid[0, 1][n], valid[9, 1][n]) for n in ("image", "lidar", "radar"))
    items = collate([train[2, 1], train[2, 4]])
    assert torch.equal(items["image"], train.batch([(2, 1), (2, 4)])["image"])


def test_published_copies_are_fixed_samples(whole):
    data = make_split(load(whole), "published")
    part = BeamDataset(data, "train", size=16, seed=5)
    copy = next(k for k, s in enumerate(part.samples) if s.variant == (3, 2, 1))
    own = next(k for k, s in enumerate(part.samples) if not any(s.variant))
    for k in (copy, own):
        assert torch.equal(part[0, k]["image"], part[4, k]["image"])
        assert torch.equal(part[0, k]["lidar"], part[4, k]["lidar"])
    s = part.samples[copy]
    assert not (part[copy]["image"][0].numpy() == prepare_image(s.image[0], 16)).all()
    assert len(data.samples) == 60 + 30 * 48 + len(data.part("test"))


# --- augmentation ---


@pytest.mark.parametrize("kind", range(1, 8))
def test_changed_pictures(kind):
    rng = np.random.default_rng(0)
    size = 256 if IMAGE[kind - 1] == "blur" else 20  # the blur shrinks with the picture
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, size, size), np.uint8))
    before = images.clone()
    found = change_images(images, kind, np.random.default_rng(1))
    assert found.dtype == torch.uint8 and found.shape == images.shape, IMAGE[kind - 1]
    assert not torch.equal(found, images) and torch.equal(images, before)
    assert torch.equal(found, change_images(images, kind, np.random.default_rng(1)))


def test_changed_clouds_and_maps():
    rng = np.random.default_rng(0)
    counts = np.zeros((2, 50, 50), np.uint8)
    counts[:, 20:30, 20:30] = 20
    field = ((-50.0, 0.0), (-25.0, 25.0))
    kept = change_lidar(counts, 1, field, rng)
    assert 0.88 < kept.sum() / counts.sum() < 0.92 and (kept <= counts).all()
    moved = change_lidar(counts, 2, field, rng)
    assert moved.sum() == counts.sum() and not moved[:, :19].any() and not moved[:, 31:].any()
    assert moved[:, 19].any() and moved[:, 30].any(), "by up to 0.4 m, in cells of 1 m"
    edge = np.zeros((1, 50, 50), np.uint8)
    edge[0, 0, 0] = 200
    assert 0 < change_lidar(edge, 2, field, rng).sum() < 200, "some leave the field of view"
    maps = rng.random((2, 2, 8, 8)).astype(np.float32)
    found = change_radar(maps, 1, rng)
    assert found.dtype == np.float32 and not np.allclose(found, maps)
    assert (found.min((2, 3)) == 0).all() and (found.max((2, 3)) == 1).all()
    assert not change_radar(maps * 0, 1, rng).any()


def test_mirror(whole):
    data = make_split(load(whole))
    plain = BeamDataset(data, "train", size=16, augmentation=0)
    part = BeamDataset(data, "train", size=16, augmentation=0, flip=1)
    turned = 0
    for epoch in range(16):
        item = part[epoch, 0]
        wanted = mirror(plain[0])
        turned += int(
            item["beam"] != plain[0]["beam"] or torch.equal(item["image"], wanted["image"])
        )
        assert any(
            all(torch.equal(item[n], other[n]) for n in ("image", "lidar", "radar", "gps", "beam"))
            for other in (plain[0], wanted)
        )
    assert 3 <= turned <= 13
    assert torch.equal(part.batch([(0, 0)])["gps"], part.batch([(0, 0)])["gps"]), "not in place"
    once = mirror(plain[0])
    assert once["beam"] == 63 - plain[0]["beam"] == once["target"].argmax()
    assert torch.equal(once["gps"], -plain[0]["gps"])
    assert torch.equal(once["radar"][:, 1], plain[0]["radar"][:, 1])
    unit = mirror(plain[0], "atan2")["gps"]
    assert torch.equal(unit[:, 0], plain[0]["gps"][:, 0])
    a, s, c = np.ogrid[:4, :16, :8]
    left, right = (
        make_radar(np.exp(2j * np.pi * (3 * s / 16 + k * a / 16 + c / 4)), 16) for k in (3, -3)
    )
    item = plain[0] | {"radar": torch.from_numpy(left)[None]}
    assert mirror(item)["radar"][0, 0].numpy() == pytest.approx(right[0], abs=1e-3)


def test_segmentation_is_mixed_in(tmp_path):
    for name, colour in (("camera_data", (100, 100, 100)), ("camera_data_seg", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), colour).save(tmp_path / name / "image_1.png")
    path = str(tmp_path / "camera_data" / "image_1.png")
    assert (prepare_image(path, 8) == 100).all() and (prepare_image(path, 8, 1) == 130).all()


def test_options():
    assert "size=4" in message(ValueError, Options, size=4)
    assert "angle='tan'" in message(ValueError, Options, angle="tan")


# --- damage and the doctor ---


def damage(root: Path) -> dict[str, Path]:
    """One missing picture, one empty cloud, a constant and a turned cube, one GPS line, one NaN."""
    unit = root / "Multi_Modal/scenario33/unit1"
    found = {
        "gone": unit / "camera_data/image_103.jpg",
        "empty": unit / "lidar_data/lidar_data_105.ply",
        "constant": unit / "radar_data/radar_data_107.npy",
        "turned": unit / "radar_data/radar_data_205.npy",
        "line": root / "Multi_Modal/scenario33/unit2/GPS_data/GPS_location_205.txt",
    }
    found["gone"].unlink()
    text = found["empty"].read_text().replace("element vertex 60", "element vertex 0")
    found["empty"].write_text(text)
    cube = np.load(found["constant"])
    np.save(found["constant"], cube * 0)
    np.save(found["turned"], cube.transpose(1, 2, 0))
    found["line"].write_text("33.4\n")
    return found


def test_damaged_frames_stop_a_run_with_a_line(small):
    faults = damage(small)
    assert "image_103.jpg' is not there" in message(FileNotFoundError, load, small)
    Image.new("RGB", (16, 9)).save(faults["gone"])
    data = make_split(load(small))
    text = message(ValueError, BeamDataset, data, "train", size=16)
    assert str(faults["empty"]) in text and "has no points" in text
    faults["empty"].write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
        "end_header\n-5 0\n"
    )
    text = message(ValueError, BeamDataset, data, "train", size=16)
    assert "radar is constant" in text or "radar has shape (16, 8, 4)" in text


def test_damaged_frames_can_be_absent(small):
    faults = damage(small)
    faults["line"].write_text("33.4\n-111.9\n")
    data = make_split(load(small, damaged="absent"))
    absent = {}
    for split in ("train", "valid", "test"):
        part = BeamDataset(data, split, size=16, damaged="absent")
        for k, s in enumerate(part.samples):
            item = part[3, k]
            assert ((item["image"].flatten(1) != 0).any(1) == item["present"][0]).all()
            for m, name in enumerate(("image", "lidar", "radar")):
                gone = ~item["present"][m]
                assert not item[name][gone].any()
                numbers = np.arange(number_of(s.image[-1]) - 8, number_of(s.image[-1]) + 1, 2)
                absent.setdefault(name, set()).update(numbers[gone.numpy()].tolist())
    assert absent == {"image": {103}, "lidar": {105}, "radar": {107, 205}}


def test_doctor(whole, small):
    report = check(whole)
    assert report.ok and len(report.facts) == 3 + 8 + 1
    assert "adaptation, scenario 31: image 30, lidar 30, radar 30" in str(report)
    faults = damage(small)
    path = next(small.rglob("mmWave_power_213.txt"))
    path.write_text(path.read_text().replace("0.900000", "nan"))
    report = check(small)
    text = str(report)
    assert not report.ok and all(path.name in text for path in (*faults.values(), path))
    line = next(fact for fact in report.facts if fact.startswith("development, scenario 33:"))
    wanted = "image 29 (1 missing), lidar 30 (1 damaged), radar 30 (2 damaged), position"
    assert wanted in line and "power" in line and "(1 NaN)" in line
    assert "rows left out: 1 for their power" in text
    assert "\n" not in str(report.errors[0])


def test_scan_lists_every_fault(small):
    rows = read_table(small)
    rows[1]["unit1_beam"], rows[2]["unit1_beam"] = "0", "65"
    rows[4]["unit1_radar_1"] = "./scenario33/unit1/radar_data/none_1.npy"
    write_table(small, "development", rows)
    data, report = scan(small)
    assert len(report.errors) == 3 and len(data.samples) == len(rows) - 3
    assert "(and 2 more problems" in message(ValueError, report.raise_if_bad)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The smallest stand-in that has all three parts."""
    return standin(tmp_path_factory.mktemp("standin"), sequences=3, frames=5, rays=64)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_planted_fault_is_one_line(drawn, tmp_path, fault):
    """It stops a run, and the doctor names it, with the file and what to do."""
    where = plant_fault(drawn, tmp_path / "copy", fault)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data = make_split(load(tmp_path / "copy"))
        for part in ("train", "valid", "test"):
            BeamDataset(data, part, size=16)
    report = check(tmp_path / "copy")
    assert not report.ok
    for text in (str(caught.value), str(report.errors[0])):
        assert "\n" not in text and where.name in text and "; " in text


def test_standin_batches(drawn):
    params = {"data": str(drawn), "size": 16, "batch_size": 2, "angle": "atan2"}
    parts = loaders(dataset(params), params)
    assert {k: len(part.dataset) for k, part in parts.items()} == {
        "train": 6, "valid": 4, "test": 4,
    }  # fmt: skip
    for batch in (next(iter(part)) for part in parts.values()):
        assert batch["image"].float().std() > 10 and batch["radar"].amax() == 1
        assert (batch["lidar"] > 0).any() and batch["present"].all()
        assert batch["gps"].norm(dim=2).allclose(torch.ones(2, 2))
    few = {"standin": 3, "seq_len": 1}
    assert identify(few).startswith("standin-3x8-") and identify(few).endswith("-sequence-1to1")


def test_the_module_is_light():
    assert {"dataset", "identify", "loaders", "check", "PARAMETERS"} <= set(dir(beam_data))
    import subprocess
    import sys

    code = (
        "import sys, leansense.beam.data; heavy = 'torch pandas lightning torchvision'.split();"
        "print([n for n in heavy if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
