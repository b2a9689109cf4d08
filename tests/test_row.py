"""Rows as an object: settings from parameters, stages, frozen parts, batches of any kind."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from conftest import ROOT
from leansense.core.checkpoint import MARK, read_checkpoint
from leansense.core.loader import EpochSampler, Indexed, loader
from leansense.core.parameters import read_parameters
from leansense.core.paths import write_atomic
from leansense.core.row import SHARED, Row, find_differing, settings_of
from leansense.core.schedule import Recipe
from leansense.core.task import NonFiniteLoss, Task, samples_of
from leansense.core.train import Settings, fit, seed_everything, weights_digest
from sixth import Clouds

CELL = """
data: str = "standin"  # clouds are drawn
epochs: int = 3  # passes over the training part
lr: float = 0.02  # learning rate
ema: float = 0.0  # decay of the weight average; 0: none
amp: str = "off"  # mixed precision: off | bf16 | fp16
monitor: str = "acc"  # what chooses the epoch
device: str = "cpu"  # auto | cpu | cuda
devices: int = 1  # GPUs, or CPU processes
resume: str = "auto"  # auto: this row's own last checkpoint; a path; empty: afresh
progress: bool = False  # a progress bar
seed: int = 0  # every random draw
folder: str = ""  # where checkpoints, logs, results go; empty: below runs/by-hand
out: str = ""  # path of the record; empty: show it only
""".strip()


def collate(samples):
    """Pictures of different sizes come like this: a list, and a tensor of labels."""
    clouds, labels = zip(*samples, strict=True)
    return list(clouds), torch.tensor(labels)


def loaders(dataset, params):
    return {
        part: loader(
            Clouds(size, first), 8, seed=params["seed"], shuffle=part == "train", collate=collate
        )
        for part, size, first in (("train", 44, 0), ("valid", 21, 1000))
    }


DATA = SimpleNamespace(
    dataset=lambda params: SimpleNamespace(name="clouds"),
    identify=lambda params: "clouds-1",
    loaders=loaders,
)


class Side(Task):
    def __init__(self, lr=0.02):
        encoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        super().__init__(
            nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 2)}), Recipe(lr=lr)
        )
        self.valid_metrics["acc"] = MulticlassAccuracy(2, average="micro")

    def forward(self, clouds):
        features = self.model["encoder"](torch.cat(clouds)).split([len(c) for c in clouds])
        return self.model["head"](torch.stack([f.mean(0) for f in features]))

    def step(self, batch):
        clouds, labels = batch
        logits = self(clouds)
        return nn.functional.cross_entropy(logits, labels), {"acc": (logits, labels)}


@pytest.fixture
def notebook(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": CELL}
    return str(write_atomic(tmp_path / "80_row.ipynb", json.dumps({"cells": [cell]})))


def begin(notebook, folder, **more):
    given = {name: one.default for name, one in read_parameters(notebook).items()}
    run = Row(given | {"folder": str(folder)} | more, notebook)
    run.data(DATA)
    seed_everything(run.seed)
    return run, Side(run.params["lr"])


def two_stages(notebook, folder, **more):
    run, task = begin(notebook, folder, **more)
    run.fit(task, stage="base")
    encoder = task.model["encoder"]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    result = run.fit(task, stage="tuned", start=run.best("base"), freeze=[encoder], epochs=2)
    return run, task, before, result


# --- settings -------------------------------------------------------------------------------------


def test_every_setting_comes_from_the_parameters():
    found = settings_of(
        {"nepochs": 7, "max_grad_norm": 2.0, "monitor": "loss", "lr": 1.0, "ema": 0.9}
    )
    assert found == {"epochs": 7, "clip": 2.0, "monitor": "valid_loss", "ema": 0.9}
    assert Settings(**found, folder="", seed=0).mode == "min"
    assert Settings(epochs=1, folder="", seed=0, monitor="valid_iou").mode == "max"


def test_a_wrong_setting_stops_before_the_data(notebook, tmp_path):
    given = {name: one.default for name, one in read_parameters(notebook).items()}
    with pytest.raises(ValueError, match="ema=1.5: must be at least 0 and below 1"):
        Row(given | {"ema": 1.5, "folder": str(tmp_path / "run")}, notebook)
    assert not (tmp_path / "run").exists()


ROWS = [
    path for path in sorted(ROOT.glob("nbs/*/80_row.ipynb")) if "resume" in read_parameters(path)
]


def test_data_need_a_parameter(tmp_path):
    cell = {
        "cell_type": "code",
        "metadata": {"tags": ["parameters"]},
        "source": "n: int = 1  # one",
    }
    path = str(write_atomic(tmp_path / "row.ipynb", json.dumps({"cells": [cell]})))
    with pytest.raises(
        ValueError, match="row.ipynb: reads data, so it needs a parameter `data: str`"
    ):
        Row({"n": 1}, path).data(DATA)


@pytest.mark.parametrize("path", ROWS, ids=[path.parent.name for path in ROWS])
def test_shared_parameters_mean_the_same_everywhere(path):
    assert find_differing(path) == []
    assert len(SHARED.keys() & read_parameters(path)) >= 8


def test_a_parameter_that_means_something_else_is_found(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}}
    cell["source"] = "amp: bool = True  # mixed precision\nema: float = 0.9  # something else"
    path = write_atomic(tmp_path / "row.ipynb", json.dumps({"cells": [cell]}))
    assert [line.split("'")[1] for line in find_differing(path)] == ["amp", "ema"]


# --- stages and frozen parts ----------------------------------------------------------------------


def test_stages_have_their_own_folder_identity_and_history(notebook, tmp_path):
    run, task, before, result = two_stages(notebook, tmp_path / "run", out=str(tmp_path / "r.json"))
    for stage, epochs in (("base", 3), ("tuned", 2)):
        kept = read_checkpoint(tmp_path / "run" / stage / "last.ckpt")[MARK]
        identity = json.loads(kept["config"])
        assert identity["config"]["stage"] == stage and len(kept["history"]["epoch"]) == epochs
    assert identity["start"] == weights_digest(run.best("base"))
    assert identity["freeze"] == ["model.encoder"]
    record = run.finish({"answer": 1.0})
    assert record["metrics"].keys() >= {"base_history", "tuned_history", "tuned_best_epoch"}
    assert record["data"] == {"name": "clouds", "fingerprint": "clouds-1", "train": 44, "valid": 21}
    whole = weights_digest(tmp_path / "run" / "best.ckpt")
    assert whole == weights_digest(run.best("tuned")) != weights_digest(run.best("base"))
    assert record["cost"]["train_seconds"] > 0 and record["cost"]["gpu_hours"] == 0.0


def test_frozen_parts_stay_as_they_were(notebook, tmp_path):
    _, task, before, result = two_stages(notebook, tmp_path, ema=0.9)
    after = task.model["encoder"].state_dict()  # the statistics of its batch norm too
    assert all(value.equal(after[name]) for name, value in before.items())
    assert all(p.requires_grad for p in task.parameters()) and task.frozen == ()
    assert task.train().model["encoder"].training  # free again for a next stage
    head = read_checkpoint(tmp_path / "base" / "best.ckpt")["state_dict"]["model.head.weight"]
    assert not head.equal(
        read_checkpoint(tmp_path / "tuned" / "last.ckpt")["state_dict"]["model.head.weight"]
    )


def test_a_frozen_part_is_in_evaluation_mode_while_training(notebook, tmp_path):
    seen = []

    class Watching(Side):
        def step(self, batch):
            seen.append(
                (self.training, self.model["encoder"].training, self.model["head"].training)
            )
            return super().step(batch)

    run, _ = begin(notebook, tmp_path)
    run.fit(Watching(), freeze=["model.encoder"])
    assert (True, False, True) in seen and not any(encoder for _, encoder, _ in seen)
    assert {head for training, _, head in seen if training} == {True}


def test_frozen_and_started_elsewhere_are_part_of_the_identity(notebook, tmp_path, capsys):
    run, task = begin(notebook, tmp_path / "one")
    first = run.fit(task)
    run.finish({"x": 1.0})
    run, task = begin(notebook, tmp_path / "two")
    run.fit(task, freeze=["model.head"])
    capsys.readouterr()
    run.fit(task, freeze=["model.encoder"], start=first.best_path)
    said = capsys.readouterr().out
    assert "starting afresh: changed freeze, groups, model, start" in said


def test_a_stage_goes_on_exactly(notebook, tmp_path):
    class Power(Side):
        def training_step(self, batch, batch_idx):
            if self.frozen and (self.current_epoch, batch_idx) == (1, 2):
                raise InterruptedError("cut")
            return super().training_step(batch, batch_idx)

    _, whole, _, expected = two_stages(notebook, tmp_path / "whole")
    run, task = begin(notebook, tmp_path / "cut")
    task.__class__ = Power
    base = run.fit(task, stage="base")
    with pytest.raises(InterruptedError):
        run.fit(task, stage="tuned", start=base.best_path, freeze=[task.model["encoder"]], epochs=2)
    _, again, _, result = two_stages(notebook, tmp_path / "cut")
    assert result.history == expected.history
    assert all(
        a.equal(b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_resume_from_a_named_file_is_for_its_stage(notebook, tmp_path):
    two_stages(notebook, tmp_path / "one")
    named = tmp_path / "one" / "tuned" / "last.ckpt"
    run, task, _, result = two_stages(notebook, tmp_path / "one", resume=str(named))
    assert result.samples_per_second == 0  # finished already: nothing was trained again


def test_weights_that_do_not_fit_are_refused(notebook, tmp_path):
    run, task = begin(notebook, tmp_path / "one")
    best = run.fit(task).best_path
    run.finish({"x": 1.0})
    other, task = begin(notebook, tmp_path / "two")
    task.model["head"] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"best.ckpt: weights of another model: model.head.weight"):
        other.fit(task, start=best)
    with pytest.raises(ValueError, match="freeze='model.encodr'.*nearest is 'model.encoder'"):
        other.fit(task, freeze=["model.encodr"])


def test_a_part_that_the_weights_lack_is_said(notebook, tmp_path, capsys):
    run, task = begin(notebook, tmp_path / "one")
    best = run.fit(task).best_path
    run.finish({"x": 1.0})
    other, task = begin(notebook, tmp_path / "two")
    task.rebuild = nn.Linear(8, 8)
    other.fit(task, start=best)
    assert (
        "best.ckpt: holds no rebuild.bias, rebuild.weight; these begin with"
        in capsys.readouterr().out
    )


# --- batches of any kind --------------------------------------------------------------------------


def foreign(batch):
    return samples_of(batch, 0, None)[1]


def test_the_size_of_a_batch_is_the_number_of_its_ids():
    tokens, images = torch.zeros(77), torch.zeros(3, 2)
    assert samples_of({"tokens": tokens, "images": images, "id": ["a", "b", "c"]}, 0)[1] == 3
    assert foreign((images, torch.ones(3))) == foreign({"x": images}) == foreign(images) == 3
    for unclear in ((tokens, images), [["a", "b"], {}], {"n": 3}):
        with pytest.raises(ValueError, match="put their ids into it under 'id'"):
            foreign(unclear)


@pytest.mark.parametrize("kind", ["list", "text first", "dictionaries"])
def test_our_loaders_know_the_samples_of_any_batch(kind):
    def pack(samples):
        if kind == "list":
            return [torch.zeros(n + 1, 2) for n in samples]
        if kind == "text first":
            return torch.zeros(50), [str(n) for n in samples], torch.tensor(samples)
        return [{"boxes": torch.zeros(n % 3, 4)} for n in samples]

    batches = loader(Indexed(list(range(10))), 4, seed=1, shuffle=True, collate=pack)
    batches.sampler.start_at(2, 4)
    order = EpochSampler(10, 1, True, True)
    order.set_epoch(2)
    found = [samples_of(batch, n, batches) for n, batch in enumerate(batches, start=1)]
    assert [size for _, size in found] == [4, 2]
    named = found[0][0] if kind != "text first" else [int(n) for n in found[0][0]]
    assert list(named) == list(order.order()[4:8])


def test_loss_and_rate_count_samples_of_lists(notebook, tmp_path):
    run, task = begin(notebook, tmp_path)
    result = run.fit(task)
    assert task.seen == 3 * 44 and len(result.history["train_loss"]) == 3


def test_a_loss_that_breaks_names_samples_of_lists(tmp_path):
    class Broken(Side):
        def step(self, batch):
            loss, extra = super().step(batch)
            return loss * float("nan"), extra

    batches = loaders(None, {"seed": 0})
    batches["train"].sampler.start_at(0, 0)
    first = list(batches["train"].sampler.batch(0, 8))
    with pytest.raises(NonFiniteLoss) as error:
        fit(Broken(), *batches.values(), epochs=1, folder=tmp_path, seed=0, monitor="valid_acc",
            device="cpu", progress=False, tensorboard=False)  # fmt: skip
    assert f"samples [{', '.join(map(str, first))}]" in str(error.value)


def test_a_plain_loader_for_validation_will_do(notebook, tmp_path):
    run, task = begin(notebook, tmp_path)
    points = [(torch.zeros(4, 2) + k % 2, k % 2) for k in range(10)]
    plain = DataLoader(points, 4, collate_fn=collate)
    run.loaders["valid"] = plain
    assert len(run.fit(task).history["valid_acc"]) == 3


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_score_lists_like_one(notebook, tmp_path):
    """Every validation sample once, whatever a batch is made of: the same scores, to the digit."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from test_row import DATA, Row, Side, read_parameters, seed_everything
        notebook = {notebook!r}
        given = {{name: one.default for name, one in read_parameters(notebook).items()}}
        for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
            more = {{"devices": devices, "lr": 0.0, "folder": f"{tmp_path}/{{devices}}"}}
            run = Row(given | more, notebook)
            run.data(DATA)
            seed_everything(0)
            result = run.fit(Side(0.0), freeze=["model.encoder"], strategy=strategy)
            print("HISTORY", result.history["valid_acc"])
            run.finish({{"x": 1.0}})
    """
    env = os.environ | {"LEANSENSE_ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = [line for line in done.stdout.splitlines() if line.startswith("HISTORY")]
    assert one == two
