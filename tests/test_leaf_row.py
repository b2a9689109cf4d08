"""The leaf row end to end: files, resuming, printed commands, scores, claims, use."""

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
import psutil
import pytest
import torch

from conftest import ROOT, run
from leansense.core.checkpoint import load_file
from leansense.core.claims import read_claims
from leansense.core.loader import loader
from leansense.core.parameters import OWNED, read_parameters
from leansense.core.rows import read_matrix, read_rows
from leansense.core.train import fit, seed_everything
from leansense.leaf import use
from leansense.leaf.checkpoint import load_checkpoint, rebuild, save_checkpoint
from leansense.leaf.data import LeafDataset, collate, dataset
from leansense.leaf.model import VARIANTS, build
from leansense.leaf.standin import standin
from leansense.leaf.task import LeafTask, predict_logits, recipe, score_apart
from leansense.leaf.use import export_onnx, find_pictures, predict

SMALL = {
    "standin": 12,
    "epochs": 3,
    "batch_size": 8,
    "fps_repeats": 2,
    "save_every_steps": 1,
    "save_history": True,
    "plot": True,
    "progress": False,
}
PAPERMILL = str(Path(sys.executable).with_name("papermill"))


def command(out: Path, **values) -> list[str]:
    """papermill as a user would type it, writing below `out`."""
    given = (
        SMALL
        | {"folder": out / "folder", "out": out / "papers/leaf/records/demo/t/r.s42.json"}
        | values
    )
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    return [
        PAPERMILL,
        "nbs/leaf/80_row.ipynb",
        str(out / "row.ipynb"),
        "--no-progress-bar",
        *options,
    ]


def row(out: Path, **values) -> subprocess.CompletedProcess:
    """The row, run to its end."""
    return run(ROOT, *command(out, **values))


def record(out: Path) -> dict:
    return json.loads((out / "papers/leaf/records/demo/t/r.s42.json").read_text())


def same(out: Path) -> str:
    kept = {key: value for key, value in record(out).items() if key not in ("cost", "env")}
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="session")
def leaves() -> Path:
    return standin(n=12)


@pytest.fixture(scope="session")
def trained(shared) -> Path:
    """One row, trained without disturbance; the tests only read it."""

    def make(out: Path) -> None:
        done = row(out)
        assert done.returncode == 0, done.stderr[-3000:]

    return shared("leaf_row", make)


def test_outputs_are_those_of_the_guide(trained):
    name = "MobileNetV3_Small_BoT_Linear"
    results = trained / "folder/results"
    metrics = json.loads((results / f"{name}_metrics.json").read_text())
    assert list(metrics) == [
        "model_name",
        "size_mb",
        "valid_acc",
        "valid_f1",
        "fps",
        "num_params",
        "ckpt_path",
    ]
    assert (
        metrics["model_name"] == name
        and isinstance(metrics["num_params"], int)
        and metrics["fps"] > 0
    )
    history = json.loads((results / f"{name}_history.json").read_text())
    names = ("train_loss", "valid_loss", "train_acc", "valid_acc", "learning_rates")
    assert set(names) <= set(history) and {len(history[key]) for key in names} == {3}
    assert (results / f"{name}_training_plot.png").read_bytes().startswith(b"\x89PNG")
    assert Path(metrics["ckpt_path"]).name == f"{name}_best.pt"
    _, meta = load_checkpoint(metrics["ckpt_path"])
    assert meta["metrics"]["valid_f1"] == record(trained)["metrics"]["valid_f1"]
    assert set(meta["label2id"].values()) == {0, 1, 2, 3}


def test_record_says_everything(trained):
    kept = record(trained)
    assert kept["params"].keys() == read_parameters("nbs/leaf/80_row.ipynb").keys() - OWNED - {
        "seed"
    }
    assert (
        kept["data"]["fingerprint"]
        and kept["data"]["train"] > 0
        and kept["code"]
        and kept["env"]["device"]
    )
    assert str(ROOT) not in json.dumps(kept) and "/" not in kept["params"]["data"]
    metrics = kept["metrics"]
    for part in ("valid", "test"):  # the test is quoted, so it is there, image by image
        assert (
            len(metrics[f"{part}_predicted"])
            == len(metrics[f"{part}_labels"])
            == kept["data"][part]
            > 0
        )
    assert metrics["test_copied"] == [0] * kept["data"]["test"], "the planted copy is not scored"
    assert metrics["test_apart"] == {
        "uncopied": {
            "images": kept["data"]["test"],
            "acc": metrics["test_acc"],
            "f1": metrics["test_f1"],
        }
    }


def test_same_row_twice_is_the_same_record_with_any_number_of_workers(trained, tmp_path):
    assert row(tmp_path, num_workers=2).returncode == 0
    assert same(tmp_path) == same(trained)


def test_killed_and_run_again_is_an_undisturbed_run(trained, tmp_path):
    environment = os.environ | {"LEANSENSE_ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "lib")}
    process = subprocess.Popen(
        command(tmp_path),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "folder/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.02)
    kernels = psutil.Process(process.pid).children(
        recursive=True
    )  # the kernel has a session of its own
    for victim in (process.pid, *(kernel.pid for kernel in kernels)):
        os.kill(victim, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(kernels, timeout=60)
    assert (tmp_path / "folder/last.ckpt").exists(), "killed in the middle"
    assert not list((tmp_path / "papers").rglob("*.json")), "and before there was a record"
    assert row(tmp_path).returncode == 0
    assert same(tmp_path) == same(trained)


# ---- checkpoints: what a file's score says is what its weights do


def pictures_of(data, part: str = "test") -> dict:
    """All pictures of a part as one batch."""
    split = LeafDataset(data, part, 64)
    return collate(split.__getitems__(range(len(split))))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_rebuilt_from_itself_alone(tmp_path, variant, faithful, keep):
    """The parameters beside the weights do not say how the network was built; the file does."""
    seed_everything(1)
    model = build(variant, 3, faithful=faithful, keep_unused_head=keep).eval()
    meta = {
        "label2id": {"a": 0, "b": 1, "c": 2},
        "image_size": 64,
        "temperature": 1.0,
        "unsure_below": 0.5,
    }
    again, kept = load_checkpoint(
        save_checkpoint(tmp_path / "m.pt", model, meta | {"params": {"variant": variant}})
    )
    image = torch.randn(2, 3, 64, 64)
    assert (
        torch.equal(again(image), model(image)) and again.config == model.config == kept["network"]
    )
    assert not again.training


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 6, "pos": "sincos_q", "feature_map": "elu1", "attn_stride": 16, "dropout": 0.3},
        {"variant": "bot", "pos": "relative", "image_size": 64},
        {"variant": "ca", "reduction": 32},
        {"variant": "bot", "matrix": True},
    ],
)
def test_every_setting_of_the_network_is_in_its_file(tmp_path, settings):
    model = build(**{"variant": "bot_linear", "num_classes": 2} | settings).eval()
    meta = {"label2id": {"a": 0, "b": 1}, "image_size": 64, "temperature": 1.0, "unsure_below": 0.5}
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "m.pt", model, meta))
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(image), model(image)) and again.config == model.config


def test_every_file_that_training_writes_does_what_its_score_says(trained, leaves):
    """Each of the row's files, rebuilt: the best ones give the record's predictions, all logits."""
    kept = record(trained)["metrics"]
    batch = pictures_of(dataset({"data": "standin", "standin": 12}))
    files = sorted(
        path for path in (trained / "folder").iterdir() if path.suffix in (".pt", ".ckpt")
    )
    assert {path.name for path in files} >= {
        "best.ckpt",
        "last.ckpt",
        "MobileNetV3_Small_BoT_Linear_best.pt",
    }
    logits = {}
    with torch.no_grad():
        for path in files:
            model, _ = rebuild(path)
            logits[path.name] = model(batch["image"])
    best = logits["MobileNetV3_Small_BoT_Linear_best.pt"]
    assert torch.equal(best, logits["best.ckpt"])
    assert (
        best.argmax(1).tolist() == kept["test_predicted"]
        and batch["label"].tolist() == kept["test_labels"]
    )


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_faithful_training_leaves_faithful_files(tmp_path, ema):
    data = dataset({"data": "standin", "standin": 12})
    train, valid = (LeafDataset(data, part, 32) for part in ("train", "valid"))
    seed_everything(0)
    task = LeafTask(build("bot_linear", 4, faithful=True, image_size=32), 4, recipe(1), 1e-3, 1e-3)
    source = loader(train, 8, seed=0, shuffle=True, drop_last=True, collate=collate)
    check = loader(valid, 8, seed=0, shuffle=False, collate=collate)
    fit(
        task,
        source,
        check,
        epochs=1,
        folder=tmp_path,
        seed=0,
        patience=0,
        ema=ema,
        save_every=1,
        device="cpu",
        progress=False,
        tensorboard=False,
    )
    want, _, _ = predict_logits(task.model, check)
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == ["best.ckpt", "epoch_0000.ckpt", "last.ckpt"]
    for name in names:  # one epoch: all three are of the same moment
        model, _ = rebuild(tmp_path / name)
        assert model.config["feature_map"] == "elu1" and model.config["keep_unused_head"]
        assert torch.equal(predict_logits(model, check)[0], want), name


def spoilt(how: str, content: dict) -> None:
    """Change one thing in a checkpoint."""
    meta = content["meta"]
    if how == "nan":
        content["model"]["classifier.bias"][0] = float("nan")
    elif how == "inf":
        content["model"]["backbone.bn1.running_var"][3] = float("inf")
    elif how == "prefixed":
        content["model"] = {f"student.{name}": value for name, value in content["model"].items()}
    elif how == "missing":
        content["model"].pop("classifier.weight")
    elif how == "more classes":
        meta["label2id"]["e"] = 4
    elif how == "fewer classes":
        meta["label2id"].pop("d")
    elif how == "sparse":
        meta["label2id"]["d"] = 7
    elif how == "words":
        meta["label2id"]["d"] = "3"
    elif how == "variant":
        meta["params"]["variant"] = "bot9"
    elif how == "network":
        meta["network"]["variant"] = "bot9"
    elif how == "other network":
        meta["network"]["variant"] = "ca"
        meta["params"]["variant"] = "ca"
    elif how == "unknown setting":
        meta["network"]["depth"] = 3
    elif how in ("label2id", "network gone", "image_size", "temperature", "unsure_below"):
        meta.pop(how.removesuffix(" gone"))
    elif how == "cold":
        meta["temperature"] = 0.0
    elif how == "size":
        meta["image_size"] = 65
    elif how == "no meta":
        content["meta"] = [1]
    elif how == "older":
        meta.pop("network")
        meta["mark"] = "leansense leaf checkpoint 1"


@pytest.mark.parametrize(
    "how, needle",
    [
        ("nan", "NaN"),
        ("inf", "Inf"),
        ("prefixed", "backbone.conv_stem.weight"),
        ("missing", "classifier.weight"),
        ("more classes", "5 classes"),
        ("fewer classes", "3 classes"),
        ("sparse", "7"),
        ("words", "'3'"),
        ("variant", "bot9"),
        ("network", "bot9"),
        ("other network", "block"),
        ("unknown setting", "depth"),
        ("label2id", "label2id"),
        ("network gone", "not a checkpoint"),
        ("image_size", "image_size"),
        ("temperature", "temperature"),
        ("unsure_below", "unsure_below"),
        ("cold", "temperature"),
        ("size", "64 or 96"),
        ("no meta", "not a checkpoint"),
        ("older", "train again"),
    ],
)
def test_a_spoilt_checkpoint_is_one_line(tmp_path, capsys, leaves, how, needle):
    path = tmp_path / "m.pt"
    meta = {
        "label2id": {"a": 0, "b": 1, "c": 2, "d": 3},
        "image_size": 64,
        "temperature": 1.0,
        "unsure_below": 0.5,
        "params": {"variant": "vanilla"},
    }
    content = load_file(save_checkpoint(path, build("vanilla", 4), meta))
    spoilt(how, content)
    torch.save(content, path)
    assert use.main(["predict", str(path), str(find_pictures(leaves / "images")[0])]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and str(path) in said and needle in said


def test_nan_is_not_written(tmp_path):
    model = build("vanilla", 2)
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        save_checkpoint(tmp_path / "m.pt", model, {"label2id": {"a": 0, "b": 1}, "image_size": 64})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no checkpoint"])
def test_foreign_files_are_one_line(tmp_path, capsys, leaves, content):
    (tmp_path / "m.pt").write_bytes(content)
    assert use.main(["predict", str(tmp_path / "m.pt"), str(leaves / "images")]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "m.pt" in said


def test_foreign_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a leaf classifier"):
        load_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


# ---- bad data, bad parameters


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
        csv.write_text(
            "\n".join(lines).replace("leaf_blast", "leaf_blust") if "leaf_blast" in labels else ""
        )
    elif what == "empty split":
        csv.write_text("\n".join(line for line in lines if not line.endswith(",valid")))
    elif what == "zero bytes":
        first.write_bytes(b"")
    elif what == "truncated":
        first.write_bytes(first.read_bytes()[:200])


@pytest.mark.parametrize(
    "what, needles",
    [
        ("no csv", ["metadata file not found", "metadata.csv"]),
        ("no column", ["metadata.csv", "label"]),
        ("foreign label", ["leaf_blust"]),
        ("empty split", ["valid"]),
        ("zero bytes", ["empty"]),
        ("truncated", [""]),
    ],
)
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


@pytest.mark.parametrize(
    "values, needle",
    [
        ({"heads": 5}, r"heads=5.*144"),
        ({"image_size": 100}, r"image_size.*100.*multiple of 32"),
        ({"epoch": 3}, r"unknown parameter 'epoch'; nearest is 'epochs'"),
        ({"epochs": "two"}, r"'epochs' must be int, got str 'two'"),
        ({"data": "nowhere/at/all"}, r"nowhere/at/all"),
        ({"weights": "nowhere.pt", "pretrained": True}, r"nowhere\.pt"),
        ({"variant": "bot_liner"}, r"bot_liner.*bot_linear"),
        ({"reduction": 8}, r"reduction"),
        ({"scheduler_tmax": 1}, r"scheduler_tmax=1 is shorter than epochs=3"),
        ({"device": "cuda"}, r"cuda"),
        ({"batch_size": 4096}, r"4096"),
        ({"amp": "fp16"}, r"fp16"),
    ],
)
def test_bad_parameters_are_one_line(tmp_path, values, needle):
    if "device" in values and torch.cuda.is_available():
        pytest.skip("there is a GPU, so asking for it is no mistake")
    done = row(tmp_path, **values)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and re.search(needle, last), done.stderr[-1500:]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*_best.pt"))


@pytest.mark.parametrize(
    "env", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_pretrained_without_a_hub_is_one_line_before_any_work(tmp_path, env):
    env |= {"HF_HOME": str(tmp_path / "hub"), "LEANSENSE_DATA": str(tmp_path / "data")}
    done = run(ROOT, *command(tmp_path, pretrained=True), **env)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "weights=PATH" in last and "mobilenetv3_small_100" in last
    assert not (tmp_path / "data").exists(), "nothing was drawn for it"


def commands() -> list[str]:
    cells = json.loads((ROOT / "nbs/leaf/80_row.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [line for line in text.splitlines() if "papermill nbs/leaf/80_row.ipynb" in line]


def printed(which: int, out: Path, **more) -> subprocess.CompletedProcess:
    """A printed command as it is; only its length, pixels, output and progress bar are others."""
    words = shlex.split(commands()[which])
    words = words[words.index("papermill") :]
    words[0], words[2] = PAPERMILL, str(out / "row.ipynb")
    extra = {
        "epochs": 1,
        "image_size": 32,
        "fps_repeats": 2,
        "folder": out / "folder",
        "progress": False,
    } | more
    return run(
        ROOT,
        *words,
        "--no-progress-bar",
        *(w for name, v in extra.items() for w in ("-p", name, str(v))),
    )


def test_eight_commands_are_there_and_spell_what_they_need():
    """The guide's values are not this notebook's defaults, so each command gives them."""
    assert len(commands()) == 8
    for line in commands():
        words = shlex.split(line)
        given = {words[i + 1] for i, word in enumerate(words) if word == "-p"}
        assert given >= {
            "epochs",
            "batch_size",
            "image_size",
            "base_lr",
            "head_lr",
            "weight_decay",
            "schedule",
            "ema",
        }
        assert (
            given <= read_parameters("nbs/leaf/80_row.ipynb").keys() and "pretrained" not in given
        )


@pytest.mark.parametrize("which", range(8))
def test_the_guides_commands_run_as_printed(which, tmp_path):
    """On the default stand-in, with the batch sizes, limits, workers and rates that are printed."""
    done = printed(which, tmp_path)
    if "cuda" in commands()[which] and not torch.cuda.is_available():
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0 and "no CUDA device" in last
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "folder").glob("*_best.pt"))


def test_run_all_ends_in_a_model_that_has_learned(tmp_path):
    """The defaults, given only where to write: test accuracy, a curve, predictions on pictures."""
    done = run(
        ROOT,
        PAPERMILL,
        "nbs/leaf/80_row.ipynb",
        str(tmp_path / "row.ipynb"),
        "--no-progress-bar",
        "-p",
        "folder",
        str(tmp_path / "folder"),
        "-p",
        "progress",
        "False",
        MPLBACKEND="module://matplotlib_inline.backend_inline",  # as Jupyter has it
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / "row.ipynb").read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    drawn = sum("image/png" in out.get("data", {}) for out in outputs)
    said = "".join("".join(out.get("text", "")) for out in outputs)
    accuracy = float(re.search(r"accuracy on \d+ test pictures: ([\d.]+)%", said)[1])
    assert drawn == 3, "training pictures, the curve, answers on test pictures"
    assert accuracy >= 80, said


def test_kaggle_layout_and_ten_classes(tmp_path):
    folder = standin(n=12, classes=10, size=64, layout="kaggle")
    done = row(
        tmp_path, data=str(folder), epochs=1, variant="vanilla", save_every_steps=0, plot=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(record(tmp_path)["metrics"]["classes"]) == 10


def test_copied_and_uncopied_are_scored_apart():
    found = score_apart([0, 1, 0, 1, 1], [0, 1, 1, 1, 0], [True, True, False, False, False], 2)
    assert found["copied"] == {"images": 2, "acc": 1.0, "f1": 1.0}
    assert found["uncopied"]["images"] == 3 and found["uncopied"]["acc"] == pytest.approx(1 / 3)
    assert set(score_apart([0], [0], [0], 2)) == {"uncopied"} and set(
        score_apart([0], [0], [1], 2)
    ) == {"copied"}
    with pytest.raises(ValueError):
        score_apart([0, 1], [0, 1], [True], 2)


def test_predict_and_onnx(trained, leaves, tmp_path):
    model, meta = load_checkpoint(next((trained / "folder").glob("*_best.pt")))
    paths = find_pictures(leaves / "images")[:5]
    answers = predict(model, meta, paths)
    for one, other in zip(answers, predict(model, meta, paths, batch_size=2)):
        assert one["best"] == other["best"] and one["confidence"] == pytest.approx(
            other["confidence"], abs=1e-5
        )
    assert all(abs(sum(answer["confidences"].values()) - 1) < 1e-5 for answer in answers)
    assert export_onnx(model, meta, tmp_path / "m.onnx") < 1e-4
    with pytest.raises(ValueError, match="differ from PyTorch"):
        export_onnx(model, meta, tmp_path / "never.onnx", tolerance=-1.0)
    assert not (tmp_path / "never.onnx").exists()


@pytest.mark.parametrize("variant", ["bot_linear", "hybrid"])
def test_the_older_onnx_exporter_gives_a_file_that_runs(tmp_path, variant):
    import onnxruntime

    model = build(variant, 4, image_size=64).eval()
    path = str(tmp_path / "old.onnx")
    with torch.no_grad():
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 64, 64),),
            path,
            dynamo=False,
            input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
            verbose=False,
        )
    session, image = onnxruntime.InferenceSession(path), torch.randn(3, 3, 64, 64)
    error = np.abs(
        session.run(None, {"image": image.numpy()})[0] - model(image).detach().numpy()
    ).max()
    assert error < 1e-4


@pytest.mark.gate
def test_training_through_fit_is_as_fast_as_a_bare_loop(tmp_path):
    """Samples per second of `fit` against a hand-written loop: same model, data and batches."""
    data = dataset({"data": "standin", "standin": 24})
    part = LeafDataset(data, "train", 96, "published", 0)
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
        result = fit(
            task,
            source,
            None,
            epochs=2,
            folder=tmp_path / str(turn),
            seed=0,
            monitor="train_loss",
            mode="min",
            patience=0,
            device="cpu",
            progress=False,
            tensorboard=False,
        )
        return result.samples_per_second, 2 * len(source) * 16 / (time.process_time() - start)

    bare(), ours(0)
    ratios = []
    for turn in range(1, 6):
        plain = bare()
        ratios.append(ours(turn)[1] / plain)
    print("samples/s through fit, everything counted, against a bare loop:", np.round(ratios, 3))
    assert np.median(ratios) > 0.7, (
        "the whole call, start-up and checkpoints included; records measure the steps alone"
    )


# ---- the rows, and what the paper says of them


def test_rows_quote_the_test_and_have_enough_of_it():
    """The headline is a test score; 240 test pictures; five seeds of short rows, else three."""
    assert read_matrix("leaf")["headline"]["metric"] == "test_f1"
    seeds = {}
    for line in read_rows("leaf", "demo"):
        seeds.setdefault(line.table, set()).add(line.seed)
        if line.table in ("comparison", "ablation"):
            assert (
                line.params["standin"]
                == read_parameters("nbs/leaf/80_row.ipynb")["standin"].default
                == 200
            )
    assert len(seeds["comparison"]) >= 5 and len(seeds["ablation"]) >= 3
    real = read_rows("leaf", "demo", "tests")  # any folder: the rows are not run
    found = {}
    for line in real:
        found.setdefault((line.table, line.name), set()).add(line.seed)
    trained = {key: len(kept) for key, kept in found.items() if key[0] in ("photographs", "recipe")}
    assert len(trained) == 11 and set(trained.values()) == {3}
    kept = {line.name: line.params for line in real if line.table == "recipe"}
    for name in ("pretrained", "pretrained_grouped"):
        assert kept[name]["weights"].startswith("data/weights/") and kept[name]["frozen_norms"]
        assert kept[name]["split"] == ("grouped" if name.endswith("grouped") else "given")


def cell_with(notebook: str, text: str) -> str:
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if text in "".join(cell["source"]))


def test_every_claim_is_judged_by_a_measurement_or_says_why_not():
    claims = read_claims("papers/leaf/claims.yaml")
    assert len(claims) >= 29
    for claim in claims:
        assert ("measure" in claim) or claim.get("cannot") or claim.get("read"), claim["statement"]
        assert claim.get("at") is None, "verdicts are two-sided"
        assert "rates_per_epoch" != claim.get("measure"), "that would test our own logger"
    said = " ".join(claim["statement"] for claim in claims)
    for words in (
        "O(N²)",
        "memory is O(Nd + d²)",
        "320",
        "384",
        "φ is ReLU",
        "relative position",
        "T4",
        "images lie in",
    ):
        assert words in said


def test_orders_of_growth_are_fitted_over_all_sizes():
    import pandas as pd

    sizes = np.array([49, 100, 144, 256])
    done = pd.DataFrame(
        {"metrics.tokens": sizes, "ms": 0.01 * sizes**2.0, "params.attn_stride": 32}
    )
    source = cell_with("nbs/leaf/90_results.ipynb", "def fit_order(")
    space = {"np": np, "pd": pd, "done": done}
    exec(source[source.index("def fit_order(") : source.index("done = scaling")], space)
    assert space["fit_order"]("ms") == pytest.approx(2) and np.isnan(space["fit_order"]("ms", 16))
    done.loc[0, "ms"] *= 4  # every size counts, not the last two
    assert space["fit_order"]("ms") < 1.5 and np.isnan(space["fit_order"]("none"))


def test_the_photographs_have_a_name():
    paper = (ROOT / "papers/leaf/main.tex").read_text()
    assert (
        "NukhuGama" in (ROOT / "papers/leaf/refs.bib").read_text()
        and paper.count(r"\citet{nukhugama}") >= 3
    )
    flat = " ".join(paper.split())
    for words in ("no licence file", r"data/rice\_leaf", "label2id.json", "metadata.csv"):
        assert words in flat, words


def test_prose_quotes_test_scores():
    """A number that is a validation score says so in its name; all others are test scores."""
    source = "".join(
        "".join(cell["source"])
        for cell in json.loads((ROOT / "nbs/leaf/90_results.ipynb").read_text())["cells"]
    )
    numbers = [line for line in source.splitlines() if "paper.number(" in line]
    validation = [line for line in numbers if "valid_f1" in line or "valid_acc" in line]
    assert len(numbers) > len(validation)
    assert [line for line in validation if not re.search(r'Valid(Sd)?",', line)] == []
