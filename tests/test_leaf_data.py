"""The leaf data set: faults and their words, layouts, pixels, augmentation, splits, stand-in."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from conftest import message
from leansense.core import check as doctor
from leansense.core import images
from leansense.core.loader import loader, sample_rng
from leansense.core.paths import data_root
from leansense.leaf import augment
from leansense.leaf import data as leaf
from leansense.leaf.split import (
    assign,
    find_copied,
    find_leaks,
    find_near_copies,
    group,
    hash_all,
    kaggle_to_metadata,
    make_split,
    read_folders,
)
from leansense.leaf.split import main as split_main
from leansense.leaf.standin import CLASSES, LOOKS, find_planted, plan, standin

pytestmark = pytest.mark.usefixtures("own_data_root")
SMALL = dict(n=6, size=64)  # the smallest stand-in that holds every kind of file


@pytest.fixture(scope="module")
def folder(own_data_root):
    return standin(**SMALL)


@pytest.fixture()
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "my photos"))


def rows_of(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def rewrite(folder, rows, header=("path", "label", "split")):
    lines = [",".join(header)] + [",".join(row[name] for name in header) for row in rows]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


# ---- reading: every fault in one line, with the place and the remedy


def test_missing_files(tmp_path, copy):
    text = message(FileNotFoundError, leaf.load, tmp_path / "nothing")
    assert "metadata file not found" in text and str(tmp_path / "nothing" / "metadata.csv") in text
    (copy / "label2id.json").unlink()
    assert "label2id file not found" in message(FileNotFoundError, leaf.load, copy)


def test_missing_columns_are_named(copy):
    rewrite(
        copy, [{"path": r["path"], "kind": r["label"]} for r in rows_of(copy)], ("path", "kind")
    )
    text = message(ValueError, leaf.load, copy)
    assert "label, split" in text and "kind" in text and "metadata.csv" in text


def test_unknown_labels_are_all_listed(copy):
    rows = rows_of(copy)
    rows[0]["label"], rows[9]["label"], rows[10]["label"] = "helthy", "weevil", "weevil"
    rewrite(copy, rows)
    text = message(ValueError, leaf.load, copy)
    assert (
        "'helthy' is not in label2id.json; nearest is 'healthy'" in text
        and "1 more problem" in text
    )
    report = str(leaf.check(copy))
    assert (
        "'helthy'" in report
        and "'weevil' is not in label2id.json (2 rows)" in report
        and "line 2" in report
    )


def test_unknown_split_word(copy):
    rewrite(copy, [r | {"split": r["split"].replace("valid", "val")} for r in rows_of(copy)])
    text = message(ValueError, leaf.load, copy)
    assert (
        "'val' is not one of train, valid, test" in text
        and "nearest is 'valid'" in text
        and "line" in text
    )


@pytest.mark.parametrize("gone", ["train", "valid"])
def test_empty_split(copy, gone):
    rewrite(copy, [r for r in rows_of(copy) if r["split"] != gone])
    assert f"no row with split '{gone}'" in message(ValueError, leaf.load, copy)


def test_no_test_split_is_a_warning(copy):
    rewrite(copy, [r for r in rows_of(copy) if r["split"] != "test"])
    assert leaf.load(copy).part("test") == [] and any(
        "'test'" in p.what for p in leaf.check(copy).warnings
    )


def test_no_rows(copy):
    rewrite(copy, [])
    assert "holds no rows" in message(ValueError, leaf.load, copy)
    (copy / "metadata.csv").write_text("")
    assert "path, label, split" in message(ValueError, leaf.load, copy)


def test_one_picture_in_two_splits(copy):
    rows = rows_of(copy)
    train = next(r for r in rows if r["split"] == "train")
    rewrite(copy, rows + [train | {"split": "test"}])
    text = message(ValueError, leaf.load, copy)
    assert train["path"] in text and "listed 2 times" in text and "train" in text and "test" in text


def test_missing_and_empty_images(copy):
    rows = rows_of(copy)
    (copy / rows[0]["path"]).unlink()
    assert str(copy / rows[0]["path"]) in message(FileNotFoundError, leaf.load, copy)
    (copy / rows[0]["path"]).write_bytes(b"")
    text = message(ValueError, leaf.load, copy)
    assert str(copy / rows[0]["path"]) in text and "0 bytes" in text


def test_truncated_image_stops_the_cache_and_leaves_nothing(copy):
    victim = copy / rows_of(copy)[0]["path"]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    before = set((data_root() / "cache" / "leaf").glob("*.npy"))
    text = message(ValueError, leaf.LeafDataset, leaf.load(copy), "train", 48)
    assert str(victim) in text and "cannot be decoded" in text
    assert set((data_root() / "cache" / "leaf").glob("*.npy")) == before
    assert not list((data_root() / "cache" / "leaf").glob(".pixels*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 0, "b": 2}', "[0, 2]"),
        ('{"a": 0, "b": 0}', "[0, 0]"),
        ('{"a": "0"}', "['0']"),
        ('{"a": true}', "[True]"),
        ("{}", "no class"),
        ("[1]", "no class"),
        ("{", "not JSON"),
    ],
)
def test_bad_label2id(copy, content, said):
    (copy / "label2id.json").write_text(content)
    text = message(ValueError, leaf.load, copy)
    assert said in text and "label2id.json" in text


def test_spreadsheet_habits_are_no_fault(copy, folder):
    rows = rows_of(copy)
    lines = (
        ["path; label ;split;remark"]
        + [f" {r['path']} ;{r['label']}; {r['split']};x" for r in rows]
        + [";;;", ""]
    )
    (copy / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (copy / "label2id.json").write_bytes(b"\xef\xbb\xbf" + (folder / "label2id.json").read_bytes())
    assert leaf.load(copy).fingerprint == leaf.load(folder).fingerprint
    (copy / "metadata.csv").write_bytes("path,label,split\nä.jpg,b,c".encode("latin-1"))
    assert "not UTF-8" in message(ValueError, leaf.load, copy)


def test_backslashes_and_absolute_paths(copy, folder, tmp_path):
    rewrite(copy, [r | {"path": r["path"].replace("/", "\\")} for r in rows_of(copy)])
    assert leaf.load(copy).fingerprint == leaf.load(folder).fingerprint
    rewrite(copy, [r | {"path": str(folder / r["path"])} for r in rows_of(folder)])
    data = leaf.load(copy)
    assert data.samples[0].path == leaf.load(folder).samples[0].path
    assert len(leaf.LeafDataset(data, "train", 32)) > 0 and len(data.fingerprint) == 32


def test_an_empty_cell_names_its_line(copy):
    rows = rows_of(copy)
    rows[3]["label"] = ""
    rewrite(copy, rows)
    assert "metadata.csv line 5" in message(ValueError, leaf.load, copy)


def test_unknown_words(folder):
    data = leaf.load(folder)
    assert "nearest is 'valid'" in message(ValueError, data.part, "val")
    assert "nearest is 'strong'" in message(
        ValueError, leaf.LeafDataset, data, "train", 32, "stron"
    )
    assert "image size 0" in message(ValueError, leaf.LeafDataset, data, "train", 0)
    assert "grouped" in message(ValueError, leaf.load, folder, mode="group")
    assert "-1" in message(ValueError, leaf.limit, data, -1)


def test_light_import():
    heavy = "('torch', 'pandas', 'sklearn', 'torchvision', 'scipy', 'matplotlib', 'PIL')"
    code = f"import sys, leansense.leaf.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_limit_keeps_the_proportions(folder):
    data = leaf.load(folder)
    cut = leaf.limit(data, train_limit=8, valid_limit=4)
    assert list(cut.counts()["train"].values()) == [2, 2, 2, 2] and list(
        cut.counts()["valid"].values()
    ) == [1, 1, 1, 1]
    assert cut == leaf.limit(data, 8, 4) and cut.part("test") == data.part("test")
    assert cut.fingerprint == data.fingerprint and len(leaf.limit(data, 10**6).samples) == len(
        data.samples
    )


# ---- fingerprint


def test_fingerprint_follows_content_and_nothing_else(copy, folder):
    first = leaf.load(folder).fingerprint
    assert leaf.load(copy).fingerprint == first
    rows = rows_of(copy)
    rewrite(copy, rows[::-1])
    assert leaf.load(copy).fingerprint == first
    rewrite(copy, [r | {"split": "test"} if r is rows[0] else r for r in rows])
    assert rows[0]["split"] == "test" or leaf.load(copy).fingerprint != first
    rewrite(copy, rows)
    path = copy / rows[0]["path"]
    path.write_bytes(path.read_bytes() + b"\0")
    assert leaf.load(copy).fingerprint != first


def test_digests_are_remembered_and_noticed_when_stale(tmp_path, monkeypatch):
    path, clock = tmp_path / "a.bin", doctor.time.time_ns
    path.write_bytes(b"one")
    with monkeypatch.context() as later:
        later.setattr(
            doctor.time, "time_ns", lambda: clock() + 10**10
        )  # seen ten seconds after it was written
        first = doctor.fingerprint(tmp_path, ["a.bin"])
    read = []
    digest = doctor.content_digest
    monkeypatch.setattr(doctor, "content_digest", lambda p: read.append(p) or digest(p))
    assert doctor.fingerprint(tmp_path, ["a.bin"]) == first and not read
    path.write_bytes(b"two")  # same size, new time
    second = doctor.fingerprint(tmp_path, ["a.bin"])
    assert second != first and len(read) == 1
    path.write_bytes(b"six")  # perhaps within the clock's tick: too young to have been remembered
    assert doctor.fingerprint(tmp_path, ["a.bin"]) not in (first, second)
    for store in (data_root() / "cache" / "digests").glob("*.json"):
        store.write_text("[1, 2")
    os.utime(path, ns=(10**18, 10**18))
    assert doctor.fingerprint(tmp_path, ["a.bin"]) not in (first, second)


# ---- pixels: the order and values of the transforms


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_odd_padding_goes_right_and_below(tmp_path):
    white = np.full((4, 7, 3), 255, np.uint8)
    wide = leaf.prepare(saved(tmp_path / "wide.png", white), 7)
    assert wide[:, 0, 0].tolist() == [0, 255, 255, 255, 255, 0, 0]
    tall = leaf.prepare(saved(tmp_path / "tall.png", white.transpose(1, 0, 2).copy()), 7)
    assert tall[0, :, 0].tolist() == [0, 255, 255, 255, 255, 0, 0]


def test_pad_comes_before_resize_and_resize_is_bilinear(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.png", image)
    padded = np.zeros((50, 50, 3), np.uint8)
    padded[10:40] = image
    wanted = functional.resize(
        Image.fromarray(padded), [32, 32], functional.InterpolationMode.BILINEAR
    )
    assert (leaf.prepare(path, 32) == np.asarray(wanted)).all()


def test_evaluation_is_tensor_then_normalise(folder):
    data = leaf.load(folder)
    item = leaf.LeafDataset(data, "valid", 40)[1]
    sample = data.part("valid")[1]
    image = Image.fromarray(leaf.prepare(sample.path, 40))
    tensor = functional.to_dtype(functional.to_image(image), torch.float32, True)
    wanted = functional.normalize(tensor, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(item["image"], wanted, atol=1e-6) and item["image"].dtype == torch.float32
    assert (item["label"], item["id"]) == (sample.label, sample.id) and type(item["label"]) is int


def test_every_kind_of_file_becomes_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    rgb = np.stack([grey, grey, grey], 2)
    alpha = np.dstack([rgb, np.full((8, 8), 9, np.uint8)])
    Image.fromarray(rgb).quantize(64).save(tmp_path / "palette.png")
    kinds = [
        saved(tmp_path / "grey.png", grey),
        saved(tmp_path / "deep.png", grey.astype(np.uint16) * 257),
        saved(tmp_path / "alpha.png", alpha),
        tmp_path / "palette.png",
    ]
    for path in kinds:
        assert np.abs(leaf.prepare(path, 8).astype(int) - rgb).max() <= 3, path
    exif = Image.Exif()
    exif[274] = 8  # turn counter-clockwise
    Image.fromarray(rgb).transpose(Image.Transpose.ROTATE_270).save(
        tmp_path / "exif.png", exif=exif
    )
    assert (leaf.prepare(tmp_path / "exif.png", 8) == rgb).all()


@pytest.mark.parametrize("name", ["zero.jpg", "truncated.jpg", "text.jpg"])
def test_broken_files_are_named(folder, name):
    assert name in message(ValueError, leaf.prepare, folder / "awkward" / name, 32)


def test_both_layouts_give_equal_tensors(tmp_path):
    kaggle = standin(**SMALL, layout="kaggle")
    table = kaggle_to_metadata(kaggle, tmp_path / "out", valid=0.2, test=0.2)
    a, b = leaf.load(kaggle, valid=0.2, test=0.2), leaf.load(metadata=table)
    assert a.classes == b.classes == CLASSES[4] and (tmp_path / "out" / "id2label.json").exists()
    for part in leaf.SPLITS:
        first, second = (leaf.LeafDataset(d, part, 32, "none") for d in (a, b))
        keys = range(len(first))
        assert len(first) == len(second) > 0
        for x, y in zip(first.__getitems__(keys), second.__getitems__(keys)):
            assert torch.equal(x["image"], y["image"]) and x["label"] == y["label"]
    assert "published layout" in message(
        ValueError, kaggle_to_metadata, table.parent, tmp_path / "again"
    )


def test_kaggle_split_depends_on_its_seed_only(tmp_path):
    kaggle = standin(**SMALL, layout="kaggle")

    def named(data):
        return {s.id: s.split for s in data.samples}

    first = named(leaf.load(kaggle, valid=0.2, test=0.2))
    moved = Path(shutil.copytree(kaggle, tmp_path / "elsewhere"))
    lines = (moved / "train.csv").read_text().splitlines()
    (moved / "train.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    assert named(leaf.load(moved, valid=0.2, test=0.2)) == first
    assert named(leaf.load(kaggle, valid=0.2, test=0.2, seed=1)) != first
    (moved / "train.csv").write_text("image_id,variety\n1.jpg,x\n")
    assert "missing column label" in message(ValueError, leaf.load, moved)


# ---- augmentation


def test_published_augmentation_is_flip_rotate_jitter(folder):
    ds = leaf.LeafDataset(leaf.load(folder), "train", 64, "published", seed=5)
    for key in ((0, 0), (3, 1), (7, 2), (9, 4)):
        choice = augment.draw(augment.AUGMENTS["published"], sample_rng(5, *key))
        image = Image.fromarray(np.array(ds.array[ds.rows[key[1]]]))
        image = functional.horizontal_flip(image) if choice["mirror"] else image
        image = functional.rotate(image, float(choice["angle"]))
        tensor = functional.to_dtype(functional.to_image(image), torch.float32, True)
        names = ("brightness", "contrast", "saturation", "hue")
        steps = [getattr(functional, f"adjust_{name}") for name in names]
        for k in choice["order"]:
            tensor = steps[k](tensor, float(choice["colour"][k]))
        wanted = functional.normalize(tensor, images.MEAN, images.STD)
        assert torch.allclose(ds[key]["image"], wanted, atol=1e-4)


def test_draws_stay_in_their_ranges():
    drawn = [
        augment.draw(augment.AUGMENTS["published"], np.random.default_rng(k)) for k in range(2000)
    ]
    angles = np.array([d["angle"] for d in drawn])
    colours = np.array([d["colour"] for d in drawn])
    assert 11 < angles.max() <= 12 and -12 <= angles.min() < -11
    assert abs(np.mean([d["mirror"] for d in drawn]) - 0.5) < 0.05
    assert (np.abs(colours[:, :3] - 1) <= 0.15).all() and 0.025 < np.abs(
        colours[:, 3]
    ).max() <= 0.03
    assert all(
        d["box"] is None and d["patch"] is None and not d["flip"] and d["quarters"] == 0
        for d in drawn
    )
    assert len({tuple(d["order"]) for d in drawn}) == 24
    for k in range(500):
        x, y, w, h = augment.draw(augment.AUGMENTS["strong"], np.random.default_rng(k))["box"]
        assert (
            0.59 < w * h <= 1 + 1e-9
            and x >= 0
            and y >= 0
            and x + w <= 1 + 1e-9
            and y + h <= 1 + 1e-9
        )


@pytest.mark.parametrize("amount", [0.0, 0.03, -0.03, 0.4, -0.5])
def test_hue_equals_torchvision(amount):
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    image[:, :5] = image[:1, :5]  # grey pixels have no hue
    image[0, 5:8], image[1, 8:11] = image[1, 5:8], image[2, 8:11]  # ties
    assert torch.allclose(
        augment.shift_hue(image, amount), functional.adjust_hue(image, amount), atol=2e-6
    )


@pytest.mark.parametrize("augment", ["none", "published", "strong"])
def test_a_sample_is_the_same_with_any_number_of_workers(folder, augment):
    ds = leaf.LeafDataset(leaf.load(folder), "train", 32, augment)
    epochs = []
    for workers in (0, 2):
        batches = list(loader(ds, 4, seed=1, shuffle=True, workers=workers, collate=leaf.collate))
        epochs.append(
            (torch.cat([b["image"] for b in batches]), [name for b in batches for name in b["id"]])
        )
    assert epochs[0][1] == epochs[1][1] and torch.equal(epochs[0][0], epochs[1][0])
    keys = [(2, k) for k in range(len(ds))]
    together = ds.__getitems__(keys)
    alone = {k: ds[2, k] for k in reversed(range(len(ds)))}
    assert all(torch.equal(item["image"], alone[k]["image"]) for k, item in enumerate(together))
    changed = [not torch.equal(item["image"], ds[3, k]["image"]) for k, item in enumerate(together)]
    assert all(changed) if augment != "none" else not any(changed)
    assert all(torch.isfinite(item["image"]).all() for item in together)


def test_an_index_alone_is_epoch_0_and_the_end_is_an_end(folder):
    ds = leaf.LeafDataset(leaf.load(folder), "train", 32, "published")
    assert torch.equal(ds[1]["image"], ds[0, 1]["image"]) and torch.equal(
        ds[-1]["image"], ds[len(ds) - 1]["image"]
    )
    with pytest.raises(IndexError):
        ds[len(ds)]
    batch = leaf.collate(ds.__getitems__([0, 1]))
    assert (
        batch["image"].shape == (2, 3, 32, 32)
        and batch["label"].dtype == torch.int64
        and len(batch["id"]) == 2
    )


def test_pickling_takes_the_file_along_not_the_pixels(folder):
    ds = leaf.LeafDataset(leaf.load(folder), "train", 96, "published")
    again = pickle.loads(pickle.dumps(ds))
    assert len(pickle.dumps(ds)) < 20_000 < ds.array.nbytes
    assert torch.equal(again[1, 0]["image"], ds[1, 0]["image"]) and isinstance(
        again.array, np.memmap
    )


# ---- cache


def test_a_damaged_cache_is_built_again(folder):
    data = leaf.load(folder)
    wanted = np.array(leaf.map_pixels(data, 24)[1])
    path = Path(leaf.map_pixels(data, 24)[1].filename)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", whole + b"x", b"nonsense" * 40):
        path.write_bytes(damaged)
        assert (leaf.map_pixels(data, 24)[1] == wanted).all() and path.read_bytes() == whole
    np.save(path, np.zeros((3, 24, 24, 3), np.uint8))
    assert (leaf.map_pixels(data, 24)[1] == wanted).all()


def test_the_cache_follows_content(copy, folder):
    data, other = leaf.load(folder), leaf.load(copy)
    assert leaf.map_pixels(data, 16)[1].filename == leaf.map_pixels(other, 16)[1].filename
    sample = other.part("train")[0]
    Image.new("RGB", (16, 16), (9, 8, 7)).save(sample.path, "PNG")
    assert leaf.LeafDataset(leaf.load(copy), "train", 16)[0]["image"].std((1, 2)).max() < 1e-6
    assert leaf.LeafDataset(data, "train", 16)[0]["image"].std((1, 2)).max() > 1e-3


def run_together(code):
    """What three processes print that run `code` at the same time."""
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [worker.communicate(timeout=1800)[0].strip() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    return found


def test_processes_may_build_at_the_same_time(folder):
    code = (
        "from leansense.leaf.data import load, map_pixels;"
        f" rows, a = map_pixels(load({str(folder)!r}), 28); print(a.sum())"
    )
    found = run_together(code)
    assert len(set(found)) == 1 and int(found[0]) > 0
    assert not [p for p in (data_root() / "cache" / "leaf").iterdir() if ".part" in p.name]


# ---- splits and leaks


def test_stratified_shares_and_independence_of_order():
    ids = [f"{label}_{k}" for label, n in (("a", 100), ("b", 37), ("c", 3)) for k in range(n)]
    labels = [name[0] for name in ids]
    result = dict(zip(ids, assign(ids, labels, valid=0.1, test=0.2)))

    def count(label, part):
        return sum(result[k] == part for k in ids if k[0] == label)

    assert [count("a", p) for p in leaf.SPLITS] == [70, 10, 20] and [
        count("b", p) for p in leaf.SPLITS
    ] == [26, 4, 7]
    assert [count("c", p) for p in leaf.SPLITS] == [1, 1, 1]
    assert assign(ids[::-1], labels[::-1], valid=0.1, test=0.2)[::-1] == [result[k] for k in ids]
    assert "valid=0.6" in message(ValueError, assign, ids, labels, None, 0.6, 0.6)


def photographs(folder, rng, count=12):
    """Random smooth pictures of two classes, each with a turned, a mirrored and a dimmed copy."""
    for k in range(count):
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        image = image.resize((90, 90), Image.Resampling.BICUBIC)
        place = folder / "ab"[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{k}.jpg")
        image.transpose(Image.Transpose.ROTATE_90).save(place / f"{k}_turned.jpg", quality=70)
        image.transpose(Image.Transpose.TRANSVERSE).resize((120, 120)).save(
            place / f"{k}_mirrored.png"
        )
        image.point(lambda v: int(0.8 * v)).save(place / f"{k}_dim.jpg")


def test_copies_are_found_whatever_the_pose(tmp_path):
    photographs(tmp_path, np.random.default_rng(0))
    data = read_folders(tmp_path)

    def name(s):
        return Path(s.id).stem.split("_")[0]

    pairs = find_near_copies(hash_all(data))
    assert {(i, j) for i, j, _ in pairs} == {
        (i, j)
        for i, a in enumerate(data.samples)
        for j, b in enumerate(data.samples)
        if i < j and name(a) == name(b)
    }
    assert find_near_copies(hash_all(data), block=5) == pairs
    assert sorted(np.bincount(group(len(data.samples), pairs))) == [4] * 12


def test_grouped_never_crosses(tmp_path):
    photographs(tmp_path, np.random.default_rng(1))
    assert any(find_leaks(make_split(tmp_path, 0.2, 0.2, seed=seed)) for seed in range(3))
    for seed in range(6):
        data = make_split(tmp_path, 0.2, 0.2, "grouped", seed)
        assert find_leaks(data) == [] and all(data.part(p) for p in ("train", "valid"))
        assert data == make_split(tmp_path, 0.2, 0.2, "grouped", seed)


def test_hamming_distance_is_exact():
    hashed = np.random.default_rng(0).integers(0, 2**63, (40, 8, 4), dtype=np.uint64)

    def bits(a, b):
        return sum(int(x ^ y).bit_count() for x, y in zip(a.tolist(), b.tolist()))

    wanted = []
    for i in range(40):
        for j in range(i + 1, 40):
            best = min(
                min(bits(hashed[i, 0], hashed[j, g]), bits(hashed[i, g], hashed[j, 0]))
                for g in range(8)
            )
            wanted += [(i, j, best)] if best <= 105 else []
    assert find_near_copies(hashed, 105, block=7) == wanted and wanted


def test_planted_leak_is_found(folder):
    found = find_leaks(leaf.load(folder))
    assert (
        len(found) == 1
        and {found[0].split, found[0].other_split} == {"train", "valid"}
        and found[0].same_label
    )
    assert "brown_spot" in str(found[0]) and "of 256 bits apart" in str(found[0])


def test_split_commands(folder, tmp_path, capsys):
    out = str(tmp_path / "metadata.csv")
    assert split_main(["leaks", str(folder)]) == 1 and "1 near-copy pair" in capsys.readouterr().out
    options = [
        "--output",
        out,
        "--mode",
        "grouped",
        "--valid-ratio",
        "0.2",
        "--test-ratio",
        "0.2",
        "--seed",
        "3",
    ]
    assert split_main(["split", str(folder / "images"), *options]) == 0
    data = leaf.load(metadata=out)
    assert data.classes == CLASSES[4] and len(data.samples) == 24 and find_leaks(data) == []
    assert (
        split_main(["split", str(folder / "images"), *options]) == 2
        and "exists already" in capsys.readouterr().err
    )
    assert (
        split_main(["leaks", str(tmp_path / "none")]) == 2
        and "no such folder" in capsys.readouterr().err
    )


# ---- stand-in


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("layout", ["published", "kaggle"])
@pytest.mark.parametrize("classes", [4, 10])
def test_standin_is_the_same_bytes_twice(tmp_path, layout, classes):
    made = [standin(tmp_path / name, n=4, size=48, classes=classes, layout=layout) for name in "ab"]
    first, second = map(contents, made)
    assert first == second and len(first) > 4 * classes
    assert first != contents(
        standin(tmp_path / "c", n=4, size=48, classes=classes, layout=layout, seed=1)
    )
    data = leaf.load(made[0], valid=0.25, test=0.25)
    assert data.classes == CLASSES[classes] and len(data.samples) == 4 * classes
    assert all(min(counts.values()) > 0 for counts in data.counts().values())


def test_standin_is_cached_and_holds_every_kind(folder):
    before = folder.stat().st_mtime_ns
    assert standin(**SMALL) == folder and folder.stat().st_mtime_ns == before
    files = [folder / r["path"] for r in rows_of(folder)]
    modes, sizes, tagged = set(), set(), 0
    for path in files:
        with Image.open(path) as image:
            modes.add(image.mode)
            sizes.add(image.size)
            tagged += 274 in image.getexif()
    assert (
        {"RGB", "L", "RGBA", "P"} <= modes and any(m.startswith("I") for m in modes) and tagged == 1
    )
    assert {(480, 640), (640, 480), (64, 64)} <= sizes
    assert any(p.suffix == ".JPG" for p in files) and any(" (" in p.name for p in files)
    assert {p.name for p in (folder / "awkward").iterdir()} == {
        "zero.jpg",
        "truncated.jpg",
        "text.jpg",
    }
    assert not any("awkward" in str(p) for p in files)


def test_standin_pair_differs_in_arrangement_only():
    spot, blast = LOOKS["brown_spot"], LOOKS["leaf_blast"]
    assert spot.place != blast.place and replace(spot, place=blast.place) == blast
    assert blast == LOOKS["blast"]


def test_standin_refuses_what_it_cannot_draw():
    assert "classes=5" in message(ValueError, plan, 8, 5, 0, 64)
    assert "n=3" in message(ValueError, standin, n=3)
    assert "layout='zip'" in message(ValueError, standin, layout="zip")


def test_standin_written_by_several_at_once(tmp_path):
    found = run_together(
        "from leansense.leaf.standin import standin;"
        f" print(standin({str(tmp_path)!r}, n=4, size=40))"
    )
    assert len(set(found)) == 1 and [str(p) for p in tmp_path.iterdir()] == found[:1]
    assert contents(found[0]) == contents(standin(tmp_path / "alone", n=4, size=40))


@pytest.mark.parametrize("classes", [4, 10])
def test_standin_has_three_parts_and_a_large_test(classes):
    """Half, a fifth, three tenths of each class; by default over two hundred test pictures."""
    pictures = plan(200, classes, 0, 192)

    def count(part):
        return sum(p.split == part for p in pictures)

    assert [count(part) // classes for part in leaf.SPLITS] == [100, 40, 60] and count(
        "test"
    ) >= 200


def test_the_planted_copy_is_on_disk_and_not_in_the_rows_data(folder):
    params = {"data": "standin", "standin": 8}
    rows, disk = leaf.dataset(params), leaf.load(standin(n=8))
    label, file = "brown_spot", find_planted(plan(8, 4, 0, 192), 4)[1].file
    assert {s.id for s in disk.samples} - {s.id for s in rows.samples} == {f"images/{label}/{file}"}
    assert (
        len(find_leaks(disk)) == 1
        and find_leaks(rows) == []
        and sum(find_copied(disk, "valid")) == 1
    )


def test_a_damaged_standin_is_named_and_drawn_again(tmp_path, capsys):
    made = standin(tmp_path, n=4, size=48)
    whole = contents(made)
    victim = sorted((made / "images").rglob("*.jpg"))[3]
    flipped = bytearray(victim.read_bytes())
    flipped[len(flipped) // 2] ^= 255
    victim.write_bytes(bytes(flipped))
    lines = (made / "metadata.csv").read_text().splitlines()
    (made / "metadata.csv").write_text("\n".join(lines[:-3]) + "\n")
    code = f"from leansense.leaf.standin import standin; standin({str(tmp_path)!r}, n=4, size=48)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and (victim.name in said or "metadata.csv" in said), said
    assert contents(made) == whole


# ---- what a row reads


def test_a_set_without_test_part_gets_one(copy):
    rewrite(copy, [r for r in rows_of(copy) if r["split"] != "test"])
    given, data = leaf.load(copy), leaf.dataset({"data": str(copy)})

    def ids(d, part):
        return {s.id for s in d.part(part)}

    assert ids(data, "test") == ids(given, "valid") and "given valid is the test" in data.name
    assert (
        ids(data, "train") | ids(data, "valid") == ids(given, "train")
        and data.part("valid")
        and data.part("train")
    )
    assert sum(find_copied(data, "valid")) == 0, (
        "near-copies stay on one side of the part that chooses"
    )


@pytest.mark.parametrize("split_name", ["stratified", "grouped"])
def test_a_split_made_anew_has_three_parts(copy, split_name):
    data = leaf.dataset({"data": str(copy), "split": split_name})
    assert all(data.part(part) for part in leaf.SPLITS)
    assert split_name == "stratified" or not any(
        find_copied(data, "test") + find_copied(data, "valid")
    )


def test_declared_parameters_are_those_that_decide_the_data(copy):
    """Each row parameter that changes the data or its fingerprint is in PARAMETERS, no other."""
    from leansense.core.parameters import read_parameters

    base = {name: p.default for name, p in read_parameters("nbs/leaf/80_row.ipynb").items()} | {
        "standin": 8
    }

    def seen(params):
        return (
            leaf.identify(params),
            [(s.id, s.split) for s in leaf.dataset(params).samples],
        )

    other = {
        "data": str(copy),
        "metadata": str(copy / "metadata.csv"),
        "label2id": None,
        "standin": 9,
        "classes": 10,
        "split": "stratified",
        "train_limit": 4,
        "valid_limit": 4,
    }
    first = seen(base)
    for name, value in other.items():
        if value is not None:
            assert seen(base | {name: value}) != first, name
    for name in base.keys() - set(leaf.PARAMETERS):
        assert seen(base | {name: "other"}) == first, name
    assert set(other) == set(leaf.PARAMETERS)


def test_identity_of_real_data_needs_no_split_and_nothing_heavy(copy):
    code = (
        "import sys; from leansense.leaf.data import identify;"
        f" print(identify({{'data': {str(copy)!r}, 'split': 'grouped'}}));"
        " print([m for m in ('torch', 'pandas', 'scipy', 'PIL') if m in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split("\n")
    assert said[0] == leaf.load(copy).fingerprint + "-grouped" and said[1] == "[]"


def test_copied_marks_test_pictures_with_a_copy_in_training(tmp_path):
    photographs(tmp_path, np.random.default_rng(2))

    def name(s):
        return Path(s.id).stem.split("_")[0]

    for seed in range(3):
        data = make_split(tmp_path, 0.2, 0.3, seed=seed)
        trained = {name(s) for s in data.part("train")}
        assert find_copied(data) == [name(s) in trained for s in data.part("test")] and any(
            find_copied(data)
        )
        assert not any(find_copied(make_split(tmp_path, 0.2, 0.3, "grouped", seed)))


# ---- doctor


def test_doctor_names_every_bad_file_and_the_loader_says_the_first(copy):
    rows = [r for r in rows_of(copy) if r["split"] == "train"]
    missing, empty, cut, text = (copy / r["path"] for r in rows[:4])
    missing.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("not a picture")
    report = leaf.check(copy)
    said = str(report)
    assert (
        not report.ok
        and len(report.errors) == 4
        and all(str(p) in said for p in (missing, empty, cut, text))
    )
    assert all("\n" not in str(p) and "; " in str(p) for p in report.errors)
    first = message(FileNotFoundError, leaf.load, copy)
    assert str(missing) in first and "1 more problem;" in first
    assert (
        f"python -m leansense.core.check leaf '{copy}'" in first
    )  # the folder's name holds a blank


def test_doctor_is_content_with_the_standins(folder):
    for place in (folder, standin(**SMALL, layout="kaggle")):
        report = leaf.check(place)
        assert (
            report.ok
            and "near-copies: 1 pair(s)" in str(report)
            and "24 image files decoded" in str(report)
        )
    assert any("near-copy" in p.what for p in leaf.check(folder).warnings)


def test_doctor_warns_of_a_copy_under_another_label(copy):
    rows = rows_of(copy)
    source = next(r for r in rows if r["path"].endswith("healthy_004.jpg"))
    shutil.copy(copy / source["path"], copy / "images" / "twin.jpg")
    other = next(
        name for name in json.loads((copy / "label2id.json").read_text()) if name != source["label"]
    )
    rewrite(copy, rows + [{"path": "images/twin.jpg", "label": other, "split": source["split"]}])
    assert any(
        "under another label" in p.what and "twin.jpg" in str(p) for p in leaf.check(copy).warnings
    )


def test_doctor_command(folder, tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "leansense.core.check", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    good, bad, unknown = (
        run("leaf", str(folder)),
        run("leaf", str(tmp_path)),
        run("leav", str(folder)),
    )
    assert good.returncode == 0 and "ok, 0 error(s)" in good.stdout, good.stderr
    assert (
        bad.returncode == 1
        and "metadata file not found" in bad.stdout
        and "Traceback" not in bad.stderr
    )
    assert (
        unknown.returncode == 2
        and "nearest is 'leaf'" in unknown.stderr
        and "Traceback" not in unknown.stderr
    )


def test_loaders_by_a_rows_parameters(folder):
    """Training is augmented, shuffled and in whole batches; the other parts are whole, in order."""
    data = leaf.load(folder)
    asked = {"image_size": 32, "batch_size": 5, "augment": "strong", "seed": 3}
    asked |= {"num_workers": 0, "pin_memory": False}
    found = leaf.loaders(data, asked)
    assert list(found) == ["train", "valid", "test"]
    ids = {part: [name for batch in found[part] for name in batch["id"]] for part in found}
    for part in ("valid", "test"):
        assert ids[part] == [s.id for s in data.part(part)]
    train = [s.id for s in data.part("train")]
    assert len(ids["train"]) == len(train) // 5 * 5 and ids["train"] != train[: len(ids["train"])]
    assert found["train"].dataset.augment == "strong" and found["test"].dataset.augment == "none"
    halves = replace(data, samples=tuple(s for s in data.samples if s.split != "test"))
    assert list(leaf.loaders(halves, asked)) == ["train", "valid"]
