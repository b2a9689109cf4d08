"""The leaf row end to end: bad input, determinism, resume after kill -9, the seed document's eight commands, use of the result."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from leansense.core.loader import loader
from leansense.core.parameters import declared
from leansense.core.train import fit, seed_everything
from leansense.leaf.checkpoint import load_checkpoint
from leansense.leaf.data import LeafDataset, collate, dataset
from leansense.leaf.model import build
from leansense.leaf.standin import standin
from leansense.leaf.task import LeafTask, compare, confusion, recipe, scores
from leansense.leaf.use import export_onnx, pictures, predict

SMALL = {"image_size": 64, "epochs": 2, "batch_size": 16, "num_workers": 0, "fps_repeats": 1, "progress": False}
PAPERMILL = str(Path(sys.executable).with_name("papermill"))


def row(out: Path, *more: str, folder: Path = ROOT, **values) -> subprocess.CompletedProcess:
    """papermill as a user would type it, writing below `out`."""
    given = SMALL | {"folder": str(out / "folder"), "out": str(out / "papers/leaf/records/demo/t/r.s42.json")} | values
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    return run(folder, PAPERMILL, "nbs/leaf/80_row.ipynb", str(out / "row.ipynb"), "--no-progress-bar", *options, *more)


def record(out: Path) -> dict:
    return json.loads((out / "papers/leaf/records/demo/t/r.s42.json").read_text())


def same(out: Path) -> str:
    return json.dumps({key: value for key, value in record(out).items() if key not in ("cost", "env")}, sort_keys=True)


@pytest.fixture(scope="module")
def leaves() -> Path:
    return standin(n=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One row, trained without disturbance."""
    out = tmp_path_factory.mktemp("trained")
    done = row(out, save_history=True, plot=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_outputs_are_those_of_the_seed_document(trained):
    name = "MobileNetV3_Small_BoT_Linear"
    results = trained / "folder/results"
    metrics = json.loads((results / f"{name}_metrics.json").read_text())
    assert list(metrics) == ["model_name", "size_mb", "valid_acc", "valid_f1", "fps", "num_params", "ckpt_path"]
    assert metrics["model_name"] == name and isinstance(metrics["num_params"], int) and metrics["fps"] > 0
    history = json.loads((results / f"{name}_history.json").read_text())
    assert {"train_loss", "valid_loss", "train_acc", "valid_acc", "learning_rates"} <= set(history)
    assert {len(history[key]) for key in ("train_loss", "valid_loss", "train_acc", "valid_acc", "learning_rates")} == {2}
    assert (results / f"{name}_training_plot.png").read_bytes().startswith(b"\x89PNG")
    assert Path(metrics["ckpt_path"]).name == f"{name}_best.pt"
    model, meta = load_checkpoint(metrics["ckpt_path"])
    assert meta["metrics"]["valid_f1"] == record(trained)["metrics"]["valid_f1"] and set(meta["label2id"].values()) == {0, 1, 2, 3}


def test_record_says_everything(trained):
    kept = record(trained)
    assert kept["params"].keys() == declared("nbs/leaf/80_row.ipynb").keys() - {"seed", "out", "folder", "progress"}
    assert kept["data"]["fingerprint"] and kept["data"]["train"] > 0 and kept["code"] and kept["env"]["device"]
    assert len(kept["metrics"]["valid_predicted"]) == len(kept["metrics"]["valid_labels"]) == kept["data"]["valid"]
    assert str(ROOT) not in json.dumps(kept) and "/" not in kept["params"]["data"]


def test_same_row_twice_is_the_same_record(trained, tmp_path):
    assert row(tmp_path, save_history=True, plot=True).returncode == 0
    assert same(tmp_path) == same(trained)


def test_workers_do_not_matter(trained, tmp_path):
    assert row(tmp_path, save_history=True, plot=True, num_workers=2).returncode == 0
    assert json.loads(same(tmp_path))["metrics"] == json.loads(same(trained))["metrics"]


def test_killed_and_run_again_is_an_undisturbed_run(tmp_path):
    values = dict(epochs=6, save_every_steps=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert row(whole, **values).returncode == 0
    given = SMALL | values | {"folder": str(cut / "folder"), "out": str(cut / "papers/leaf/records/demo/t/r.s42.json")}
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    process = subprocess.Popen([PAPERMILL, str(ROOT / "nbs/leaf/80_row.ipynb"), str(cut / "row.ipynb"), "--no-progress-bar", *options],
                               cwd=ROOT, env=os.environ | {"LEANSENSE_ROOT": str(ROOT)}, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (cut / "folder/last.ckpt").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", str(cut)], check=False)  # the kernel has a session of its own
    time.sleep(0.5)
    assert (cut / "folder/last.ckpt").exists() and not (cut / "papers").exists(), "killed in the middle"
    assert row(cut, **values).returncode == 0
    assert same(cut) == same(whole)


def broken(tmp_path: Path, leaves: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(leaves, folder)
    return folder


def spoil(folder: Path, what: str) -> None:
    """Make one thing wrong with a copy of the stand-in."""
    csv = folder / "metadata.csv"
    lines = csv.read_text().splitlines()
    columns = lines[0].split(",")
    first = folder / lines[1].split(",")[columns.index("path")]
    if what == "no csv":
        csv.unlink()
    elif what == "no column":
        csv.write_text("\n".join([lines[0].replace("label", "lable"), *lines[1:]]))
    elif what == "foreign label":
        labels = json.loads((folder / "label2id.json").read_text())
        csv.write_text("\n".join(lines).replace("leaf_blast", "leaf_blust") if "leaf_blast" in labels else "")
    elif what == "empty split":
        csv.write_text("\n".join(line for line in lines if not line.endswith(",valid")))
    elif what == "zero bytes":
        first.write_bytes(b"")
    elif what == "truncated":
        first.write_bytes(first.read_bytes()[:200])


@pytest.mark.parametrize("what, needles", [
    ("no csv", ["metadata file not found", "metadata.csv"]), ("no column", ["metadata.csv", "label"]),
    ("foreign label", ["leaf_blust"]), ("empty split", ["valid"]),
    ("zero bytes", ["empty"]), ("truncated", [""])])
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, leaves, what, needles):
    folder = broken(tmp_path, leaves)
    spoil(folder, what)
    with pytest.raises((ValueError, OSError)) as error:
        data = dataset({"data": str(folder)})
        LeafDataset(data, "train", 64)[(0, 0)]
    line = str(error.value)
    assert len(line.splitlines()) == 1 and str(folder) in line
    for needle in needles:
        assert needle in line


@pytest.mark.parametrize("values, needle", [
    ({"heads": 5}, r"heads=5.*144"), ({"image_size": 100}, r"image_size.*100.*multiple of 32"),
    ({"epoch": 3}, r"unknown parameter 'epoch'; nearest is 'epochs'"), ({"epochs": "two"}, r"'epochs' must be int, got str 'two'"),
    ({"data": "nowhere/at/all"}, r"nowhere/at/all"), ({"weights": "nowhere.pt", "pretrained": True}, r"nowhere\.pt"),
    ({"variant": "bot_liner"}, r"bot_liner.*bot_linear"), ({"reduction": 8}, r"reduction"),
    ({"scheduler_tmax": 1}, r"scheduler_tmax=1 is shorter than epochs=2"), ({"device": "cuda"}, r"cuda"),
    ({"batch_size": 4096}, r"4096"), ({"amp": "fp16"}, r"fp16")])
def test_bad_parameters_are_one_line(tmp_path, values, needle):
    if "device" in values and torch.cuda.is_available():
        pytest.skip("there is a GPU, so asking for it is no mistake")
    done = row(tmp_path, **values)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and re.search(needle, last), done.stderr[-1500:]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*_best.pt"))


def test_pretrained_without_a_hub_fails_fast(tmp_path):
    done = row(tmp_path, pretrained=True)
    assert done.returncode != 0 and "weights" in done.stderr.strip().splitlines()[-1]


def test_foreign_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "foreign.pt")
    for path in (tmp_path / "foreign.pt", Path(__file__)):
        with pytest.raises(ValueError, match="not a checkpoint of a leaf classifier"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def commands() -> list[str]:
    cells = json.loads((ROOT / "nbs/leaf/80_row.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [line for line in text.splitlines() if "papermill nbs/leaf/80_row.ipynb" in line]


def test_eight_commands_are_there():
    assert len(commands()) == 8


@pytest.mark.parametrize("which", range(8))
def test_the_seeds_commands_run(which, tmp_path):
    """As printed, then cut short by the last options: one epoch, few pictures, weights from a file, the CPU."""
    import timm

    words = shlex.split(commands()[which])
    words = words[words.index("papermill"):]
    words[0], words[2] = PAPERMILL, str(tmp_path / "row.ipynb")
    extra = {"epochs": 1, "train_limit": 16, "valid_limit": 8, "batch_size": 8, "num_workers": 0, "fps_repeats": 1,
             "device": "cpu", "folder": str(tmp_path / "folder"), "progress": False}
    if "pretrained" in words:
        torch.save(timm.create_model("mobilenetv3_small_100", num_classes=1000).state_dict(), tmp_path / "weights.pt")
        extra["weights"] = str(tmp_path / "weights.pt")
    if which not in (3, 7):
        extra["image_size"] = 64
    done = run(ROOT, *words, "--no-progress-bar", *(w for name, value in extra.items() for w in ("-p", name, str(value))))
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "folder").glob("*_best.pt"))


def test_kaggle_layout_and_ten_classes(tmp_path):
    folder = standin(n=12, classes=10, layout="kaggle")
    done = row(tmp_path, data=str(folder), epochs=1, variant="vanilla")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(record(tmp_path)["metrics"]["classes"]) == 10


def test_scores_by_hand():
    first = scores(confusion([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3))
    assert first["acc"] == pytest.approx(0.6) and first["f1"] == pytest.approx(0.4333333, abs=1e-6)
    assert confusion([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert scores(confusion([0, 0, 1], [0, 1, 1], 3))["f1"] == pytest.approx(4 / 9)


def test_scores_against_sklearn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    assert scores(confusion(truth, guess, 5))["f1"] == pytest.approx(f1_score(truth, guess, average="macro"))


def test_mcnemar_by_hand():
    found = compare([0] * 10, [0] * 8 + [1] * 2, [1] * 3 + [0] * 7)
    assert (found["differ"], found["only_first"], found["only_second"]) == (5, 3, 2) and found["p"] == pytest.approx(1.0)


def test_predict_and_onnx(trained, leaves, tmp_path):
    model, meta = load_checkpoint(next((trained / "folder").glob("*_best.pt")))
    paths = pictures(leaves / "images")[:5]
    answers = predict(model, meta, paths)
    for one, other in zip(answers, predict(model, meta, paths, batch_size=2)):
        assert one["best"] == other["best"] and one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
    assert all(abs(sum(answer["confidences"].values()) - 1) < 1e-5 for answer in answers)
    assert export_onnx(model, meta, tmp_path / "m.onnx") < 1e-4
    with pytest.raises(ValueError, match="differ from PyTorch"):
        export_onnx(model, meta, tmp_path / "never.onnx", tolerance=-1.0)
    assert not (tmp_path / "never.onnx").exists()


@pytest.mark.gate
def test_training_through_fit_is_as_fast_as_a_bare_loop(tmp_path):
    """Samples per second of `fit` against a hand-written loop: same model, data and batches, taking turns in one process."""
    data = dataset({"data": "standin", "standin": 24})
    part = LeafDataset(data, "train", 96, "seed", 0)
    torch.set_num_threads(1)

    def batches():
        return loader(part, 16, seed=0, shuffle=True, drop_last=True, collate=collate)

    def bare() -> float:
        seed_everything(0)
        model = build("bot_linear", 4).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        source, seen, start = batches(), 0, time.process_time()
        for epoch in range(2):
            source.sampler.set_epoch(epoch)
            for batch in source:
                loss = torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen += len(batch["label"])
        return seen / (time.process_time() - start)

    def ours(turn: int) -> float:
        seed_everything(0)
        task = LeafTask(build("bot_linear", 4), 4, recipe(2))
        source, start = batches(), time.process_time()
        result = fit(task, source, None, epochs=2, folder=tmp_path / str(turn), seed=0, monitor="train_loss", mode="min", patience=0,
                     device="cpu", progress=False, tensorboard=False)
        return result.samples_per_second, 2 * len(source) * 16 / (time.process_time() - start)

    bare(), ours(0)
    ratios = []
    for turn in range(1, 6):
        plain = bare()
        ratios.append(ours(turn)[1] / plain)
    print("samples/s through fit, everything counted, against a bare loop:", np.round(ratios, 3))
    assert np.median(ratios) > 0.7, "the whole call, start-up and checkpoints included; the steps alone are measured in the records"
