"""The SimBEV row end to end: determinism, layouts, resuming, published files, bad input, use."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT, run
from leansense.core.checkpoint import MARK, read_checkpoint
from leansense.core.loader import loader
from leansense.core.parameters import OWNED, read_parameters
from leansense.core.train import fit
from leansense.layers import bev_metrics
from leansense.layers.bev_loss import bev_loss
from leansense.layers.conventions import INPUTS
from leansense.simbev.data import dataset
from leansense.simbev.task import SimBEVKeeper, SimBEVTask, evaluate, recipe, stage_resume
from leansense.simbev.use import load_checkpoint, main

SMALL = {
    "standin": 20,
    "standin_size": "240x112",
    "nepochs": 1,
    "bsz": 4,
    "nworkers": 0,
    "trunk": "mobilenetv3_small_050",
    "camC": 8,
    "up_width": 16,
    "bev_width": 8,
    "H": 64,
    "W": 144,
    "final_h": 32,
    "final_w": 96,
    "xbound": [-32.0, 32.0, 4.0],
    "ybound": [-32.0, 32.0, 4.0],
    "augment": "matched",
    "val_step": 0,
    "save_step": 0,
    "progress": False,
}
LONGER = {"nepochs": 3, "val_step": 3, "save_step": 2, "panels": 2}
PAPERMILL = str(Path(sys.executable).with_name("papermill"))


def command(out: Path, **values) -> list[str]:
    """papermill as a user would type it, writing below `out`; lists go through a YAML text."""
    given = (
        SMALL
        | {
            "folder": str(out / "folder"),
            "seed": 3,
            "out": str(out / "papers/simbev/records/demo/t/r.s3.json"),
        }
        | values
    )
    words = ["-y", json.dumps(given)]
    return [
        PAPERMILL,
        str(ROOT / "nbs/simbev/80_row.ipynb"),
        str(out / "row.ipynb"),
        "--no-progress-bar",
        *words,
    ]


def row(out: Path, **values) -> subprocess.CompletedProcess:
    out.mkdir(parents=True, exist_ok=True)
    return run(ROOT, *command(out, **values))


def same(out: Path, *less: str) -> str:
    record = json.loads((out / "papers/simbev/records/demo/t/r.s3.json").read_text())
    return json.dumps(
        {k: v for k, v in record.items() if k not in ("cost", "env", *less)}, sort_keys=True
    )


@pytest.fixture(scope="session")
def trained(shared) -> Path:
    """One row, three epochs of four steps, validated and saved within them, without disturbance."""

    def make(out: Path) -> None:
        done = row(out, **LONGER)
        assert done.returncode == 0, done.stderr[-3000:]

    return shared("simbev_row", make)


def test_files_and_record(trained):
    names = sorted(path.name for path in (trained / "folder").glob("*.pt"))
    assert {f"model_{s:06d}.pt" for s in range(2, 13, 2)} | {
        "model_best.pt",
        "model_final.pt",
    } <= set(names)
    kept = read_checkpoint(trained / "folder/model_000006.pt")
    assert {"model_state_dict", "optimizer_state_dict", "counter", "epoch", "val_iou"} <= set(kept)
    assert kept["counter"] == 6
    record = json.loads(same(trained))
    assert record["params"].keys() == read_parameters("nbs/simbev/80_row.ipynb").keys() - OWNED
    assert [step for step, *_ in record["metrics"]["validations"]] == [3, 4, 6, 8, 9, 12]
    assert [record["data"][part] for part in ("train", "valid", "test")] == [16, 2, 2]
    assert len(record["metrics"]["panels"]) == 2 and record["metrics"]["steps"] == 12
    assert (
        0 < record["metrics"]["test_share"] <= record["metrics"]["prior_ap"] < 1
        and record["metrics"]["test_ap"] > 0
    )
    assert str(ROOT) not in json.dumps(record)


@pytest.mark.parametrize("step", [6, 8])
def test_resume_from_a_numbered_file_is_an_undisturbed_run(trained, tmp_path, step):
    """Into an empty folder: the same metrics, byte for byte, from within an epoch or its end."""
    done = row(tmp_path, **LONGER, resume=str(trained / f"folder/model_{step:06d}.pt"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(same(tmp_path))["metrics"] == json.loads(same(trained))["metrics"]
    ours, theirs = (
        read_checkpoint(where / "folder/model_final.pt") for where in (tmp_path, trained)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours["state_dict"].values(), theirs["state_dict"].values())
    )


def test_killed_and_run_again_is_an_undisturbed_run(trained, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, **LONGER),
        cwd=ROOT,
        env=os.environ | {"LEANSENSE_ROOT": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(2400):
        if (tmp_path / "folder/last.ckpt").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        ["pkill", "-9", "-f", str(tmp_path)], check=False
    )  # the kernel has a session of its own
    time.sleep(0.5)
    assert (tmp_path / "folder/last.ckpt").exists() and not list(tmp_path.rglob("r.s3.json")), (
        "killed in the middle"
    )
    assert row(tmp_path, **LONGER).returncode == 0
    assert same(tmp_path) == same(trained)


def test_validation_in_between_changes_nothing(trained, tmp_path):
    assert row(tmp_path, nepochs=3, nworkers=2).returncode == 0
    history = [json.loads(same(where))["metrics"]["history"] for where in (trained, tmp_path)]
    assert history[0] == history[1]


def test_three_layouts_in_the_same_notebook(tmp_path):
    """DATA= on a folder of each layout, written from the same scenes: the same metrics.

    On cells of half a metre: only there a label of 0.4 m and one of 0.5 m say the same.
    """
    found, cells = {}, {"xbound": [-32.0, 32.0, 0.5], "ybound": [-32.0, 32.0, 0.5]}
    for layout in ("published", "converted", "native"):
        folder = dataset(SMALL | {"data": "standin", "layout": layout}).folder
        done = row(tmp_path / layout, data=str(folder), layout="auto", max_grad_norm=1.0, **cells)
        assert done.returncode == 0, done.stderr[-2000:]
        found[layout] = json.loads(same(tmp_path / layout))["metrics"]
    assert found["published"]["history"] == found["converted"]["history"]
    for name, values in found["published"][
        "history"
    ].items():  # native matrices come through quaternions: 1e-16 apart
        assert found["native"]["history"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"resume": "runs/nothing_here.pt"}, "runs/nothing_here.pt: no such file"),
        ({"data": "nothing/here"}, "nothing/here"),
        ({"cams": ["front", "fornt_left"], "trunk": "resnet999"}, "fornt_left"),
    ],
)
def test_bad_input_is_one_line(tmp_path, values, message):
    done = row(tmp_path, **values)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and message in last, last
    assert not list(tmp_path.rglob("r.s3.json"))


def test_resume_of_another_model(trained, tmp_path):
    done = row(tmp_path, nepochs=3, bev_width=16, resume=str(trained / "folder/model_000004.pt"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "model_000004.pt: weights of another model" in last
    broken = tmp_path / "model_000009.pt"
    broken.write_bytes((trained / "folder/model_000004.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="model_000009.pt: cannot be read"):
        stage_resume(str(broken), tmp_path)


def test_predict_on_a_folder(trained, tmp_path, capsys):
    checkpoint, folder = (
        trained / "folder/model_best.pt",
        dataset(SMALL | {"data": "standin"}).folder,
    )
    assert main([str(checkpoint), str(folder), "--out", str(tmp_path), "--limit", "2"]) == 0
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(answers) == 2 and all(
        path.with_suffix(".png").exists() for path in tmp_path.glob("*.json")
    )
    model, params = load_checkpoint(checkpoint)
    assert params["bev_width"] == 8 and not model.training
    assert main([str(tmp_path / "no.pt"), str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- loss and scores, in one process ---


def test_loss_and_iou_vectors():
    def maps(*rows):
        return torch.tensor(rows, dtype=torch.float32)[None, None]

    assert abs(float(bev_loss(maps([0, 0]), maps([1, 1]))) - 1.476404) < 1e-5
    pairs = (
        (maps([1, -1], [1, -1]), maps([1, 0], [0, 0])),
        (maps([1, 1], [1, 1]), maps([1, 1], [1, 1])),
    )
    late = (maps([-1, -1], [-1, 1]), maps([0, 0], [1, 0]))
    losses = [
        float(
            bev_loss(torch.cat([pairs[0][0], pairs[1][0]]), torch.cat([pairs[0][1], pairs[1][1]]))
        )
        * 2,
        float(bev_loss(*late)),
    ]
    assert abs(sum(losses) / 3 - 0.834421) < 1e-5
    assert (
        float(bev_metrics.iou(sum(bev_metrics.count_overlap(*pair) for pair in (*pairs, late))))
        == 0.625
    )


def test_mask_equals_leaving_cells_out():
    draw = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(2, 1, 6, 8, generator=draw),
        (torch.rand(2, 1, 6, 8, generator=draw) > 0.7).float(),
    )
    mask = torch.ones(2, 1, 6, 8)
    mask[..., 4:] = 0
    torch.testing.assert_close(
        bev_loss(logits, target, mask), bev_loss(logits[..., :4], target[..., :4])
    )
    assert torch.equal(
        bev_metrics.count_overlap(logits, target, mask),
        bev_metrics.count_overlap(logits[..., :4], target[..., :4]),
    )


@pytest.mark.parametrize("edges", [(0, 15, 30, 50), (0, 10, 20, 30, 40, 50)])
def test_rings_partition_the_map(edges):
    masks = bev_metrics.make_rings((-50, 50, 0.5), (-20, 20, 1.0), edges)
    assert masks.shape == (len(edges) - 1, 200, 40) and bool((masks.sum(0) == 1).all())


class Mean(nn.Module):
    """A model that is two numbers and a batch norm, so that modes and statistics matter."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(1), nn.Parameter(torch.ones(()))

    def forward(self, imgs, *matrices):
        return self.norm(imgs) * self.scale


class Frames(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, key):
        draw = torch.Generator().manual_seed(key[1])
        imgs = torch.randn(1, 4, 4, generator=draw)
        item = {name: torch.zeros(1) for name in INPUTS} | {
            "imgs": imgs,
            "target": (imgs > 0.5).float(),
        }
        return item | {"mask": torch.ones(1, 4, 4), "id": f"f{key[1]}"}


def toy(folder, val_step=0, save_step=0, resume="", **more):
    task = SimBEVTask(Mean(), recipe(lr=0.05, **more.pop("recipe", {})))
    train, valid = (loader(Frames(), 2, seed=0, shuffle=shuffle) for shuffle in (True, False))
    keeper = SimBEVKeeper(folder, valid, val_step, save_step)
    fit(
        task,
        train,
        valid,
        epochs=4,
        folder=folder,
        seed=0,
        monitor="valid_iou",
        patience=0,
        progress=False,
        resume=stage_resume(resume, folder),
        callbacks=(keeper,),
        **more,
    )
    return task, keeper


@pytest.mark.parametrize(
    "more", [{}, {"accumulate": 2}, {"recipe": {"schedule": "onecycle"}}, {"ema": 0.9}]
)
def test_resume_from_every_file(tmp_path, more):
    whole, kept = toy(tmp_path / "whole", 2, 1, **dict(more))
    files = sorted((tmp_path / "whole").glob("model_0*.pt"))
    assert len(files) >= 11
    for file in files[::3]:
        again, other = toy(tmp_path / file.stem, 2, 1, str(file), **dict(more))
        assert again.history == whole.history and other.validations == kept.validations, file.name
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), whole.state_dict().values())
        )
        assert read_checkpoint(tmp_path / file.stem / "model_final.pt")[MARK]["position"] == [4, 0]


@pytest.mark.parametrize("more", [{}, {"ema": 0.8}, {"accumulate": 2, "ema": 0.8}])
def test_what_a_file_says_of_its_score_its_weights_do(tmp_path, more):
    """Every file that training writes, at an epoch's end and within, averaged or not."""
    toy(tmp_path, 2, 1, **more)
    valid, scored = loader(Frames(), 2, seed=0, shuffle=False), 0
    for file in sorted([*tmp_path.glob("*.pt"), *tmp_path.glob("*.ckpt")]):
        kept, model = read_checkpoint(file), Mean()
        model.load_state_dict(kept["model_state_dict"])
        found = evaluate(model, valid, (-2, 2, 1), (-2, 2, 1))
        if "val_iou" in kept:
            assert found["iou"] == kept["val_iou"], file.name
            scored += 1
        assert ("val_iou" in kept) == (
            kept["counter"] % 2 == 0 or kept[MARK]["position"][1] == 0
        ), file.name
    assert scored >= 6 and "val_iou" in read_checkpoint(tmp_path / "model_best.pt")


def test_files_of_another_run_do_not_stay(tmp_path):
    toy(tmp_path, 2, 1)
    toy(tmp_path, 2, 4, "auto", recipe={"weight_decay": 0.1})
    found = [read_checkpoint(file) for file in tmp_path.glob("*.pt")]
    assert len(found) < 20 and len({kept[MARK]["config"] for kept in found}) == 1


def test_a_finished_run_gives_everything_back(tmp_path):
    """last.ckpt is final, and what came after it was lost: all comes back, without training."""
    _, kept = toy(tmp_path, 2, 2)
    files = {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.suffix in (".pt", ".csv")
    }
    for name in ("model_best.pt", "model_final.pt", "history.csv"):
        (tmp_path / name).unlink()
    _, again = toy(tmp_path, 2, 2, "auto")
    assert again.validations == kept.validations and again.best == kept.best
    assert files == {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.suffix in (".pt", ".csv")
    }


def test_average_precision_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import binary_average_precision

    draw = torch.Generator().manual_seed(1)
    target = (torch.rand(3, 1, 20, 30, generator=draw) < 0.1).float()
    logits = ((torch.randn(target.shape, generator=draw) + 2 * target) * 8).round() / 8  # many ties
    logits[0, 0, 0, 0] = 40.0
    mask = torch.ones_like(target)
    mask[..., 10:] = 0
    for part in (mask, None):
        keep = slice(None) if part is None else part > 0
        wanted = binary_average_precision(
            logits[keep].flatten().sigmoid().double(), target[keep].flatten().int()
        )
        assert float(
            bev_metrics.average_precision(bev_metrics.count_by_logit(logits, target, part))
        ) == pytest.approx(float(wanted), abs=1e-6)
    parts = bev_metrics.count_by_logit(logits[:1], target[:1]) + bev_metrics.count_by_logit(
        logits[1:], target[1:]
    )
    assert torch.equal(parts, bev_metrics.count_by_logit(logits, target)), (
        "the same from any number of processes"
    )
    assert float(bev_metrics.average_precision(bev_metrics.count_by_logit(logits, 0 * target))) == 0
    with pytest.raises(ValueError, match="logits hold NaN"):
        bev_metrics.count_by_logit(logits * math.nan, target)


def test_scores_of_several_processes_are_those_of_one():
    """States that are summed give the same numbers to the last bit, however frames are shared."""
    draw = torch.Generator().manual_seed(2)
    target = (torch.rand(6, 2, 12, 16, generator=draw) < 0.1).float()
    target[2] = 0
    logits = torch.randn(target.shape, generator=draw) + 2 * target - 1
    mask = (torch.rand(6, 1, 12, 16, generator=draw) > 0.2).float()
    bands = bev_metrics.make_rings((-6, 6, 1), (-8, 8, 1), (0, 3, 6, 9))
    for make in (lambda: bev_metrics.BevScores(2), lambda: bev_metrics.BevReport(bands, 2)):
        whole, first, second = make(), make(), make()
        whole.update(logits, target, mask)
        first.update(logits[:1], target[:1], mask[:1])
        for part in (slice(1, 3), slice(3, 6)):
            second.update(logits[part], target[part], mask[part])
        first.merge_state(second)
        assert first.compute() == whole.compute() and 0 < whole.compute()["iou"] < 1
        idle = make()
        first.merge_state(idle)  # a process that had no frame
        assert first.compute() == whole.compute()
    counted = bev_metrics.count_overlap(logits, target, mask)
    assert whole.compute()["iou_per_class"] == bev_metrics.iou(counted).tolist()
    with pytest.raises(ValueError, match="maps of 2 classes: these scores are of 1"):
        bev_metrics.BevScores(1).update(logits, target, mask)


def test_evaluate_keeps_the_mode_and_counts_false_alarms():
    model = Mean().train()
    ones = torch.ones(2, 1, 4, 4)
    batch = {name: torch.zeros(2, 1) for name in INPUTS} | {"imgs": ones, "mask": ones}
    batch["target"] = torch.zeros(2, 1, 4, 4)
    batch["target"][0, 0, 0] = 1
    found = evaluate(model, [batch], (-2, 2, 1), (-2, 2, 1))
    assert (
        model.training
        and found["empty_frames"] == 1
        and found["false_alarms"] == 1.0
        and found["iou"] == 4 / 32
    )
    assert int(model.norm.num_batches_tracked) == 0
