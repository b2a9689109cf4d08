"""Contracts of the training layer: exact resume, groups, schedules, checkpoints, two processes."""

import contextlib
import copy
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from leansense.core.checkpoint import (
    MARK,
    load_file,
    load_weights,
    metric_state,
    read_checkpoint,
    set_metric_state,
)
from leansense.core.loader import EpochSampler, Indexed, loader, sample_rng
from leansense.core.lock import hold_folder
from leansense.core.schedule import Group, Recipe, param_groups, rates, scheduler
from leansense.core.train import (
    Average,
    NonFiniteLoss,
    Settings,
    Task,
    averaged_weights,
    clear_run,
    fit,
    scored_weights,
    seed_everything,
)

EPOCHS, SAMPLES, VALID, BATCH = 4, 44, 17, 8  # six batches an epoch, the last of four samples


class Points(Dataset):
    """Three classes in a plane; each look at a sample draws noise from (seed, epoch, index)."""

    def __init__(self, size=SAMPLES, noise=0.3):
        self.size, self.noise = size, noise

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        epoch, index = key
        x = sample_rng(1, 0, index).standard_normal(2)
        y = int(x[0] > 0) + int((x**2).sum() > 1.5)
        x = x + self.noise * sample_rng(2, epoch, index).standard_normal(2)
        return {"x": torch.tensor(x, dtype=torch.float32), "y": y, "id": index}


class Toy(Task):
    def __init__(self, recipe=Recipe(lr=0.02), dropout=0.3):
        norm = nn.BatchNorm1d(16)
        net = nn.Sequential(
            nn.Linear(2, 16), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        )
        super().__init__(net, recipe)
        scores = {"f1": MulticlassF1Score(3), "top": MulticlassAccuracy(3, average="micro")}
        self.valid_metrics["scores"] = MetricCollection(scores)
        self.train_metrics["scores"] = MetricCollection(copy.deepcopy(scores))

    def step(self, batch):
        logits = self.model(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["y"])
        return loss, {"scores": (logits, batch["y"]), "margin": logits.max(1).values.mean()}


class Cut(L.Callback):
    """Stops the run by an exception after a given optimiser step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise InterruptedError("cut")


def loaders(workers=0, batch=BATCH):
    return (
        loader(Points(), batch, seed=5, shuffle=True, workers=workers),
        loader(Points(VALID, 0.0), batch, seed=5, shuffle=False),
    )


def run(folder, recipe=Recipe(lr=0.02), workers=0, task=None, seed=0, **settings):
    given = dict(
        epochs=EPOCHS,
        seed=1,
        monitor="valid_f1",
        device="cpu",
        progress=False,
        tensorboard=False,
        patience=0,
    )
    seed_everything(seed)
    task = task or Toy(recipe)
    return task, fit(task, *loaders(workers), folder=folder, **(given | settings))


def same(one, two):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


ONCE = dict(epochs=1, seed=0, mode="min", device="cpu", progress=False)
ADAM = Recipe(lr=0.02, weight_decay=0.01, schedule="cosine", per="step")
SGD = Recipe("sgd", lr=0.05, schedule="warmup_cosine", per="step", warmup=3, floor=1e-4)
PLATEAU = Recipe("adam", lr=0.02, schedule="plateau", plateau_patience=0, gamma=0.5)
ONECYCLE = Recipe(lr=0.02, schedule="onecycle", per="step")
CASES = {  # recipe, settings, workers, optimiser steps an epoch
    "adamw-ema": (ADAM, dict(ema=0.8), 0, 6),
    "sgd-clip-accumulate": (SGD, dict(clip=0.5, accumulate=2), 0, 3),
    "plateau-early": (PLATEAU, dict(patience=2), 0, 6),
    "onecycle-bf16": (ONECYCLE, dict(amp="bf16"), 0, 6),
    "workers": (ADAM, dict(ema=0.8, accumulate=2, save_every=1), 2, 3),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            recipe, settings, _, _ = CASES[name]
            made[name] = run(tmp_path_factory.mktemp(name), recipe, **settings)
        return made[name]

    return get


@pytest.mark.parametrize(
    "name,cut",
    [
        *itertools.product(list(CASES)[:3], (2, 4, 7, 8, 12, 13)),
        ("onecycle-bf16", 9),
        ("workers", 4),
        ("workers", 7),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, name, cut):
    recipe, settings, workers, steps = CASES[name]
    cut = min(cut, EPOCHS * steps - 1)
    whole, expected = uninterrupted(name)
    with pytest.raises(InterruptedError):
        run(tmp_path, recipe, workers, save_every_steps=1, callbacks=(Cut(cut),), **settings)
    # other first weights and another state of the generators: all must come from the checkpoint
    task, result = run(
        tmp_path, recipe, workers, seed=77, save_every_steps=1, resume="auto", **settings
    )
    assert result.history == expected.history
    assert (result.best_epoch, result.best_score) == (expected.best_epoch, expected.best_score)
    assert result.stopped_early == expected.stopped_early
    assert same(task, whole)
    last, wanted = (read_checkpoint(r.last_path) for r in (result, expected))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", MARK):
        assert str(last.get(key)) == str(wanted.get(key)), key
    assert not list(tmp_path.glob(".*"))


def test_resume_after_several_cuts_and_sparse_saves(tmp_path, uninterrupted):
    whole, expected = uninterrupted("adamw-ema")
    for cut in (5, 10, 17, 20):
        with pytest.raises(InterruptedError):
            run(
                tmp_path,
                ADAM,
                ema=0.8,
                save_every_steps=4,
                callbacks=(Cut(cut),),
                resume="auto",
                seed=cut - 5,
            )
    task, result = run(tmp_path, ADAM, ema=0.8, save_every_steps=4, resume="auto", seed=9)
    assert result.history == expected.history and same(task, whole)
    again, repeated = run(tmp_path, ADAM, ema=0.8, resume="auto", seed=3)  # nothing left to do
    assert (
        repeated.history == expected.history
        and same(again, whole)
        and repeated.samples_per_second == 0
    )


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import time, lightning as L, test_train as t
class Wait(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 9:
            print("here", flush=True)
            time.sleep(1000)
if __name__ == "__main__":
    t.run({folder!r}, t.ADAM, ema=0.8, save_every_steps=1, callbacks=(Wait(),), resume="auto")
"""


def script(tmp_path, text, **names):
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(text).format(tests=os.path.dirname(__file__), **names))
    return [sys.executable, str(file)]


def test_resume_after_kill(tmp_path, uninterrupted):
    whole, expected = uninterrupted("adamw-ema")
    folder = tmp_path / "run"
    process = subprocess.Popen(script(tmp_path, SCRIPT, folder=str(folder)), start_new_session=True,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert read_checkpoint(folder / "last.ckpt")[MARK]["position"] == [1, 2]
    task, result = run(folder, ADAM, ema=0.8, resume="auto", seed=8)
    assert result.history == expected.history and same(task, whole)


@pytest.mark.parametrize(
    "sent,raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals(tmp_path, uninterrupted, sent, raised):
    class Send(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                os.kill(os.getpid(), sent)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        run(tmp_path, ADAM, ema=0.8, save_every_steps=1, callbacks=(Send(),))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    task, result = run(tmp_path, ADAM, ema=0.8, resume="auto", seed=8)
    whole, expected = uninterrupted("adamw-ema")
    assert result.history == expected.history and same(task, whole)


def test_same_seed_same_weights_other_seed_others(tmp_path):
    one, first = run(tmp_path / "a", ADAM)
    two, second = run(tmp_path / "b", ADAM, workers=2)
    other, _ = run(tmp_path / "c", ADAM, seed=1)
    assert same(one, two) and first.history == second.history and not same(one, other)


def test_result_and_files(tmp_path):
    task, result = run(tmp_path, save_every=2, ema=0.5, tensorboard=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.ckpt",
        "epoch_0001.ckpt",
        "epoch_0003.ckpt",
        "history.csv",
        "last.ckpt",
        "tensorboard",
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].split(",") == list(result.history) and len(lines) == EPOCHS + 1
    assert [float(v) for v in lines[2].split(",")] == [
        values[1] for values in result.history.values()
    ]
    columns = (
        "epoch",
        "step",
        "lr_all",
        "train_loss",
        "train_f1",
        "valid_loss",
        "valid_f1",
        "valid_margin",
    )
    assert set(columns) <= set(result.history)
    assert result.best_score == max(result.history["valid_f1"]) and result.epochs_run == EPOCHS
    assert result.samples_per_second > 0 and not result.stopped_early
    assert same(task, load_weights(Toy(), result.best_path))
    # the averaged weights are what was validated: validating them again gives the recorded score
    metric = MulticlassF1Score(3)
    task.eval()
    for batch in loaders()[1]:
        metric.update(task(batch["x"]), batch["y"])
    assert abs(metric.compute().item() - result.best_score) < 1e-6
    torch.load(result.last_path, weights_only=True)


def test_a_fresh_start_leaves_nothing_stale(tmp_path):
    run(tmp_path, save_every=1)
    _, second = run(tmp_path, epochs=1, seed=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "history.csv", "last.ckpt"]
    assert read_checkpoint(second.best_path)[MARK]["history"] == second.history
    # auto, but another configuration: afresh as well
    _, third = run(tmp_path, epochs=1, clip=0.1, resume="auto")
    assert (
        third.epochs_run == 1
        and json.loads(read_checkpoint(third.last_path)[MARK]["config"])["clip"] == 0.1
    )


def test_more_epochs_continue_where_the_schedule_allows(tmp_path):
    whole, expected = run(tmp_path / "a")
    run(tmp_path / "b", epochs=2)
    task, result = run(tmp_path / "b", resume="auto", seed=6)
    assert result.history == expected.history and same(task, whole)
    run(tmp_path / "c", ADAM, epochs=2)
    with pytest.raises(ValueError, match="other settings .*horizon"):
        run(tmp_path / "c", ADAM, resume=tmp_path / "c" / "last.ckpt")


def test_resume_in_another_folder_brings_the_best_along(tmp_path):
    whole, expected = run(tmp_path / "a", save_every=1, mode="min", monitor="valid_f1")
    start = tmp_path / "a" / f"epoch_{EPOCHS - 2:04d}.ckpt"
    task, result = run(tmp_path / "b", resume=start, seed=3, mode="min")
    assert result.history == expected.history and same(task, whole)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "best.ckpt",
        "history.csv",
        "last.ckpt",
    ]


def test_a_best_of_another_time_line_is_refused(tmp_path):
    class Falling(Toy):
        def valid_scores(self):
            return {"f1": [0.5, 0.9, 0.6, 0.95][self.current_epoch]}

    run(tmp_path, task=Falling(), save_every=1)
    shutil.copytree(tmp_path, tmp_path / "whole")
    for folder, start in ((tmp_path / "whole", "epoch_0002"), (tmp_path, "epoch_0001")):
        _, result = run(
            folder, task=Falling(), resume=folder / f"{start}.ckpt"
        )  # epoch 1 is still there: its own best
        assert result.best_epoch == 3
    (tmp_path / "epoch_0001.ckpt").unlink()
    with pytest.raises(ValueError, match=r"best\.ckpt: not the best epoch \(1\) .*epoch_0002"):
        run(tmp_path, task=Falling(), resume=tmp_path / "epoch_0002.ckpt")


@pytest.mark.parametrize(
    "mode,scores,patience,ran,best",
    [
        ("max", [0.5, 0.5, 0.5, 0.5, 0.9], 2, 3, 0),  # equal is no improvement
        ("max", [0.1, 0.3, 0.2, 0.25, 0.9], 2, 4, 1),
        ("min", [0.9, 0.3, 0.4, 0.2, 0.1], 2, 5, 4),
        ("max", [0.5, 0.4, 0.3, 0.2, 0.1], 0, 5, 0),  # off, and the best still kept
    ],
)
def test_early_stopping(tmp_path, mode, scores, patience, ran, best):
    class Scripted(Toy):
        def valid_scores(self):
            return {"f1": scores[self.current_epoch]}

    task = Scripted()
    _, result = run(tmp_path, task=task, epochs=5, mode=mode, patience=patience)
    assert (result.epochs_run, result.best_epoch, result.best_score) == (ran, best, scores[best])
    assert result.stopped_early == (ran < 5)
    assert read_checkpoint(result.best_path)[MARK]["position"] == [best + 1, 0]
    _, again = run(tmp_path, task=Scripted(), epochs=5, mode=mode, patience=patience, resume="auto")
    assert again.history == result.history and again.stopped_early == result.stopped_early


def test_max_steps(tmp_path):
    _, result = run(tmp_path, max_steps=8)
    assert result.history["step"] == [6, 8] and result.stopped_early
    _, again = run(tmp_path, max_steps=8, resume="auto")
    assert again.history == result.history


@pytest.mark.parametrize(
    "kind,message",
    [
        ("truncated", "truncated or not a checkpoint"),
        ("empty", "truncated"),
        ("text", "truncated"),
        ("objects", "objects other than numbers"),
        ("foreign", "not a checkpoint of this project"),
    ],
)
def test_wrong_checkpoints_are_refused_by_name(tmp_path, capsys, kind, message):
    file = tmp_path / f"{kind}.ckpt"
    if kind == "truncated":
        run(tmp_path / "run", epochs=1)
        data = (tmp_path / "run" / "last.ckpt").read_bytes()
        file.write_bytes(data[: len(data) // 2])
    elif kind in ("objects", "foreign"):
        torch.save({"state_dict": nn.Linear(1, 1) if kind == "objects" else {}}, file)
    else:
        file.write_text("" if kind == "empty" else "not a checkpoint")
    with pytest.raises(ValueError, match=f"{kind}.ckpt.*{message}") as error:
        run(tmp_path / "new", resume=file)
    assert "\n" not in str(error.value)
    content = file.read_bytes()
    file.replace(tmp_path / "last.ckpt")  # auto sets it aside, says so, and goes on
    _, result = run(tmp_path, epochs=1, resume="auto")
    said = capsys.readouterr().out.splitlines()
    assert [
        line for line in said if "last.ckpt" in line and message in line and "afresh" in line
    ] == said[-1:]
    assert (tmp_path / "last.ckpt.damaged").read_bytes() == content and result.epochs_run == 1


@pytest.mark.parametrize("where", ["weights", "optimiser"])
def test_resume_refuses_numbers_that_are_none(tmp_path, capsys, where):
    _, expected = run(tmp_path, ADAM)
    last = tmp_path / "last.ckpt"
    kept = load_file(last)
    state = kept["optimizer_states"][0]["state"]
    (kept["state_dict"] if where == "weights" else next(iter(state.values())))[
        "model.0.weight" if where == "weights" else "exp_avg"
    ].flatten()[0] = math.nan
    torch.save(kept, last)
    with pytest.raises(ValueError, match=r"last\.ckpt hold NaN") as error:
        run(tmp_path / "new", ADAM, resume=last)
    assert "\n" not in str(error.value)
    assert ("optimiser" if where == "optimiser" else "model.0.weight") in str(error.value)
    capsys.readouterr()
    _, result = run(tmp_path, ADAM, resume="auto")  # from the best epoch, which is sound
    [said] = capsys.readouterr().out.splitlines()
    assert "last.ckpt.damaged" in said and "going on from best.ckpt" in said
    assert result.history == expected.history


def test_checkpoint_of_another_model_or_run(tmp_path):
    _, result = run(tmp_path / "a", epochs=1)
    wide = Toy()
    wide.model[0] = nn.Linear(2, 17)
    with pytest.raises(
        ValueError, match=r"last.ckpt: weights of another model: model.0.weight has shape \(17, 2\)"
    ):
        load_weights(wide, result.last_path)
    with pytest.raises(ValueError, match="other settings .*clip"):
        run(tmp_path / "a", epochs=1, clip=1.0, resume=result.last_path)
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        run(tmp_path / "a", resume=tmp_path / "nowhere.ckpt")


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    _, result = run(tmp_path, epochs=1)
    before = result.last_path.read_bytes()

    def broken(obj, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, epochs=2, resume="auto")
    assert result.last_path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_resume_needs_a_sampler_that_can(tmp_path):
    plain = DataLoader(TensorDataset(torch.zeros(4, 2)), 2, shuffle=True)
    with pytest.raises(ValueError, match="core.loader.loader"):
        fit(Toy(), plain, epochs=1, folder=tmp_path, seed=0, device="cpu")


# --- whose checkpoint -----------------------------------------------------------------------------


def test_a_changed_parameter_is_named_and_starts_afresh(tmp_path, capsys):
    base = {
        "notebook": "nbs/x.ipynb",
        "params": {"label_smoothing": 0.0, "dropout": 0.1},
        "code": {"a.b": "1"},
    }
    run(tmp_path, epochs=1, config=base)
    again, _ = run(tmp_path, epochs=1, config=base, resume="auto")
    assert capsys.readouterr().out.splitlines() == ["resumed a finished run"]
    changes = {
        "label_smoothing": {"params": {"label_smoothing": 0.1, "dropout": 0.1}},
        "a.b": {"code": {"a.b": "2"}},
        "dropout": {"params": {"label_smoothing": 0.1}},
    }
    for name, change in changes.items():
        run(tmp_path, epochs=1, config=base)
        _, result = run(tmp_path, epochs=1, config=base | change, resume="auto")
        said = capsys.readouterr().out.splitlines()
        assert (
            len(said) == 1 and said[0].startswith("starting afresh: changed ") and name in said[0]
        )
        assert result.samples_per_second > 0
        with pytest.raises(ValueError, match=f"other settings .*{name}"):
            run(tmp_path, epochs=1, config=base, resume=result.last_path)


def test_best_of_another_run_is_refused_after_training(tmp_path):
    other = run(tmp_path / "other", epochs=2, seed=3, clip=0.5)[1].best_path

    class Thief(L.Callback):  # stands for a second run in this folder
        def __init__(self, source):
            self.source = source

        def on_train_end(self, *_):
            shutil.copy(self.source, tmp_path / "run" / "best.ckpt")

    with pytest.raises(
        ValueError,
        match=r"best\.ckpt: holds epoch \d of a run with other clip, .* of this run is epoch",
    ):
        run(tmp_path / "run", epochs=2, callbacks=(Thief(other),))

    class Falling(Toy):
        def valid_scores(self):
            return {"f1": [0.9, 0.5][self.current_epoch]}

    run(tmp_path / "kept", task=Falling(), epochs=2, save_every=1)
    with pytest.raises(
        ValueError,
        match=r"best\.ckpt: holds epoch 1 of this run, but the best of this run is epoch 0",
    ):
        run(
            tmp_path / "run",
            task=Falling(),
            epochs=2,
            callbacks=(Thief(tmp_path / "kept" / "epoch_0001.ckpt"),),
        )


def test_a_folder_has_one_run_at_a_time(tmp_path):
    text = f"""
    from leansense.core.lock import hold_folder
    hold_folder({str(tmp_path)!r}, "nbs/other.ipynb")
    print("held", flush=True)
    input()
    """
    command = script(tmp_path.parent, textwrap.dedent(text).replace("{", "{{").replace("}", "}}"))
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(
            RuntimeError, match=rf"process {other.pid} on .* \(nbs/other.ipynb\)"
        ) as error:
            run(tmp_path, epochs=1)
        assert "\n" not in str(error.value) and not (tmp_path / "last.ckpt").exists()
    finally:
        other.kill()
        other.wait()
    with hold_folder(
        tmp_path, "a notebook"
    ):  # free after the holder's death; held by this process: fit may
        run(tmp_path, epochs=1)
        assert re.fullmatch(
            rf"process {os.getpid()} on \S+ \(a notebook\)", (tmp_path / ".lock").read_text()
        )
    assert not (tmp_path / ".lock").exists()


def test_forked_processes_do_not_keep_the_folder(tmp_path):
    held = hold_folder(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # lives on until the parent is done
        os._exit(0)
    held.close()
    try:
        with hold_folder(tmp_path, "again") as again:
            assert again.folder == tmp_path.resolve()
    finally:
        os.close(write)
        os.waitpid(child, 0)


# --- what a finished or damaged folder still owes -------------------------------------------------


class Scribe(L.Callback):
    """Files and a state of its own, as a system's callback has them."""

    patterns = ("note_*.txt",)

    def __init__(self):
        self.scores = []

    def state_dict(self):
        return {"scores": list(self.scores)}

    def load_state_dict(self, state):
        self.scores = list(state["scores"])

    def on_validation_end(self, trainer, task):
        self.scores.append(trainer.global_step)

    def finish(self, folder, task):
        (folder / "note_final.txt").write_text(f"{self.scores} {len(task.history['epoch'])}")


def test_a_finished_run_gives_everything_back(tmp_path):
    first = Scribe()
    whole, expected = run(tmp_path, callbacks=(first,), save_every=EPOCHS)
    for name in ("history.csv", f"epoch_{EPOCHS - 1:04d}.ckpt"):
        (tmp_path / name).rename(tmp_path / f"was_{name}")  # killed just after the last last.ckpt
    again = Scribe()
    task, result = run(tmp_path, callbacks=(again,), save_every=EPOCHS, resume="auto", seed=5)
    assert again.scores == first.scores and len(first.scores) == EPOCHS
    assert (tmp_path / "note_final.txt").read_text() == f"{first.scores} {EPOCHS}"
    assert result.history == expected.history and same(task, whole)
    for name in ("history.csv", f"epoch_{EPOCHS - 1:04d}.ckpt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / f"was_{name}").read_bytes()


def test_a_fresh_run_removes_what_callbacks_left(tmp_path):
    for name in ("note_1.txt", "other.txt", ".last.ckpt.tmp", ".note_1.txt.tmp"):
        (tmp_path / name).write_text("of another run")
    run(tmp_path, epochs=1, callbacks=(Scribe(),))
    assert not (tmp_path / "note_1.txt").exists() and (tmp_path / "other.txt").exists()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "note_1.txt").write_text("of another run")
    clear_run(tmp_path)
    assert (tmp_path / "note_1.txt").exists()


def flip(file):
    """Turn one bit of one weight in a checkpoint over."""
    weight = read_checkpoint(file)["state_dict"]["model.0.weight"].numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.find(weight) + 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("hurt", ["cut", "flipped"])
def test_a_damaged_last_checkpoint_is_set_aside(tmp_path, capsys, hurt):
    whole, expected = run(tmp_path / "whole", save_every=1)

    def damaged(keep):
        folder = tmp_path / f"with {keep[0]}"
        shutil.copytree(tmp_path / "whole", folder)
        for file in folder.glob("*.ckpt"):
            if file.name not in (*keep, "last.ckpt"):
                file.unlink()
        last = folder / "last.ckpt"
        flip(last) if hurt == "flipped" else last.write_bytes(last.read_bytes()[:5000])
        return folder

    best = f"epoch_{expected.best_epoch:04d}.ckpt"
    for keep, start in (
        (("epoch_0002.ckpt", best), "epoch_0002.ckpt"),
        (("best.ckpt",), "best.ckpt"),
    ):
        folder = damaged(keep)
        capsys.readouterr()
        task, result = run(folder, save_every=1, resume="auto", seed=9)
        said = capsys.readouterr().out.splitlines()
        assert (
            len(said) == 1
            and "last.ckpt.damaged" in said[0]
            and said[0].endswith(f"going on from {start}")
        )
        assert result.history == expected.history and same(task, whole)
    # nothing sound of this very run: afresh
    folder = damaged(("nothing",))
    task, result = run(folder, resume="auto")
    assert capsys.readouterr().out.splitlines()[-1].endswith("starting afresh")
    assert result.history == expected.history and (folder / "last.ckpt.damaged").exists()


def test_a_damaged_best_checkpoint_is_no_dead_end(tmp_path, capsys):
    class Falling(Toy):
        def valid_scores(self):
            return {"f1": [0.5, 0.9, 0.6, 0.7][self.current_epoch]}

    whole, expected = run(tmp_path, task=Falling())
    flip(tmp_path / "best.ckpt")
    capsys.readouterr()
    task, result = run(tmp_path, task=Falling(), resume="auto")
    assert "best.ckpt: missing, damaged" in capsys.readouterr().out
    assert result.history == expected.history and same(task, whole)


@contextlib.contextmanager
def small_files(size):
    """Within, no file can grow beyond `size` bytes: what a full disk does, on any machine."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "size,settings,name,advice",
    [
        (2000, {}, "last.ckpt", "make room"),
        (30000, dict(tensorboard=True), "tensorboard", "make room"),
        (100_000, {}, "history.csv", "see ulimit -f"),
    ],
)
def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch, size, settings, name, advice):
    import leansense.core.train as module

    class Talkative(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.logger and trainer.global_step == 1:
                trainer.logger.experiment.add_text("much", "x" * 60_000)

    if name == "history.csv":
        monkeypatch.setattr(module, "history_csv", lambda history: "0" * 200_000)
    if name == "tensorboard":
        monkeypatch.setattr(module.Keeper, "_save", lambda *_: None)
    with small_files(size), pytest.raises(OSError, match=name) as error:
        run(tmp_path, epochs=2, callbacks=(Talkative(),), **settings)
    assert "\n" not in str(error.value) and advice in str(error.value)
    assert not list(tmp_path.glob(".*.tmp"))


# --- files of weights -----------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    weights = {
        "state_dict": {"w": torch.arange(64.0), "i": torch.arange(9)},
        MARK: {"config": "{}", "list": [1, 2.5]},
    }
    file = tmp_path / "a.ckpt"
    torch.save(weights, file)
    data, noticed, tensors = file.read_bytes(), 0, weights["state_dict"]["w"].numpy().tobytes()
    start = data.find(tensors)
    for place in {*range(0, len(data), 7), *range(start, start + len(tensors), 3)}:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            found = load_file(file)
        except ValueError as error:
            noticed += 1
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert str(found) == str(weights) and not start <= place < start + len(tensors), place
    assert noticed > len(tensors) // 3


@pytest.mark.parametrize(
    "kind,error,message",
    [
        ("missing", FileNotFoundError, "no such file"),
        ("folder", ValueError, "not a file"),
        ("pickle", ValueError, "truncated or not a checkpoint"),
        ("objects", ValueError, "objects other than numbers"),
        ("nan", ValueError, r"weights of .*nan\.pt hold NaN \(state_dict\.b\)"),
        ("inf", ValueError, r"weights of .*inf\.pt hold Inf"),
        ("text.safetensors", ValueError, "cannot be read"),
    ],
)
def test_files_of_weights_that_are_refused(tmp_path, kind, error, message):
    file = tmp_path / (kind if "." in kind else f"{kind}.pt")
    if kind == "folder":
        file.mkdir()
    elif kind == "pickle":
        file.write_bytes(b"\x80\x04\x95 not all of it")
    elif kind == "objects":
        torch.save({"state_dict": nn.Linear(1, 1)}, file)
    elif kind in ("nan", "inf"):
        torch.save({"state_dict": {"a": torch.ones(3), "b": torch.tensor([1, float(kind)])}}, file)
        assert load_file(file)["state_dict"]["a"].sum() == 3  # refused only where it is asked for
    elif kind != "missing":
        file.write_text("text")
    with pytest.raises(error, match=message) as caught:
        load_file(file, finite=True)
    assert "\n" not in str(caught.value) and file.name in str(caught.value)


def test_weights_that_are_no_numbers_do_not_come_back(tmp_path):
    task, result = run(tmp_path, epochs=1)
    kept = read_checkpoint(result.best_path)
    kept["state_dict"]["model.0.weight"][0] = float("nan")
    torch.save(kept, result.best_path)
    with pytest.raises(ValueError, match="best.ckpt hold NaN"):
        load_weights(task, result.best_path)


# --- the weight average ---------------------------------------------------------------------------


def test_the_average_warms_up(tmp_path):
    average = Average(0.99)
    assert [average.decay_at(n) for n in (1, 8, 90)] == [
        2 / 11,
        9 / 18,
        91 / 100,
    ] and average.decay_at(10**6) == 0.99
    # a high decay on two dozen steps: the average must follow the weights, not the first ones
    _, plain = run(tmp_path / "plain", ADAM, epochs=4)
    task, _ = run(tmp_path / "average", ADAM, epochs=4, ema=0.999)
    seed_everything(0)
    first = Toy(ADAM)
    last = read_checkpoint(tmp_path / "average" / "last.ckpt")
    weights = [name for name, _ in first.named_parameters()]

    def distance(one, two):
        return sum(float((one[name] - two[name]).pow(2).sum()) for name in weights) ** 0.5

    raw = last["current_model_state"]
    assert distance(last["state_dict"], raw) < 0.5 * distance(first.state_dict(), raw)


def test_every_file_scores_what_it_says(tmp_path):
    stated = {}

    def score(weights):
        task = Toy(ADAM)
        task.load_state_dict(weights)
        metric = MulticlassF1Score(3)
        task.eval()
        for batch in loaders()[1]:
            metric.update(task(batch["x"]), batch["y"])
        return metric.compute().item()

    class Middle(L.Callback):  # a callback that validates and writes in mid-epoch, as SimBEV's does
        def on_train_batch_end(self, trainer, task, *_):
            if trainer.global_step % 6 == 4:
                before = copy.deepcopy(task.state_dict())
                with scored_weights(trainer, task):
                    found = score(task.state_dict())
                    inside = copy.deepcopy(task.state_dict())
                assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
                assert all(
                    torch.equal(v, inside[k]) for k, v in averaged_weights(trainer, task).items()
                )
                file = tmp_path / f"middle_{trainer.global_step}.ckpt"
                torch.save({"state_dict": averaged_weights(trainer, task)}, file)
                stated[file.name] = found

    _, result = run(tmp_path, ADAM, ema=0.9, save_every=1, callbacks=(Middle(),))
    for epoch, value in enumerate(result.history["valid_f1"]):
        stated[f"epoch_{epoch:04d}.ckpt"] = value
    stated |= {"best.ckpt": result.best_score, "last.ckpt": result.history["valid_f1"][-1]}
    assert (
        set(stated) == {file.name for file in tmp_path.glob("*.ckpt")}
        and len(set(stated.values())) > 1
    )
    for name, value in stated.items():
        assert score(load_file(tmp_path / name)["state_dict"]) == pytest.approx(value, abs=1e-6), (
            name
        )


# --- losses and metrics ---------------------------------------------------------------------------


class Given(Task):
    """Logits straight from the batch; one weight so that there is something to train."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1))

    def step(self, batch):
        logits, y = batch
        return nn.functional.cross_entropy(logits + 0 * self.model.weight, y), {}


def test_epoch_loss_is_weighted_by_size(tmp_path):
    logits = torch.tensor([[2.0, 1, 0], [0, 0, 0], [0, 3, 0]])
    data = Indexed(TensorDataset(logits, torch.tensor([0, 2, 1])))
    train = loader(data, 2, seed=0, shuffle=False, train=True)
    result = fit(
        Given(),
        train,
        loader(data, 2, seed=0, shuffle=False),
        folder=tmp_path,
        monitor="valid_loss",
        **ONCE,
    )
    assert result.history["train_loss"] == pytest.approx([0.5337138], abs=1e-6)
    assert result.history["valid_loss"] == pytest.approx([0.5337138], abs=1e-6)


def test_validation_is_full_precision_under_amp(tmp_path):
    seen = {}

    class Watch(Toy):
        def step(self, batch):
            loss, extra = super().step(batch)
            seen[self.training] = self.model(batch["x"]).dtype
            return loss, extra

    run(tmp_path / "a", task=Watch(), epochs=1, amp="bf16")
    assert seen == {True: torch.bfloat16, False: torch.float32}
    run(tmp_path / "b", task=Watch(), epochs=1, amp="bf16", valid_fp32=False)
    assert seen[False] == torch.bfloat16


def test_bf16_is_clipped_beside_a_fused_optimiser(tmp_path):
    """A clip far below Adam's eps leaves the weights where they were; without one they move."""

    def distance(clip):
        torch.manual_seed(0)
        task = Toy(recipe=Recipe(lr=0.01, weight_decay=0.0))
        before = [p.detach().clone() for p in task.parameters()]
        run(tmp_path / str(clip), task=task, epochs=1, amp="bf16", clip=clip)
        return max((p - q).abs().max().item() for p, q in zip(task.parameters(), before))

    assert 0 < distance(1e-12) < 1e-4 < 1e-2 < distance(0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_names_everything(tmp_path, value):
    class Breaking(Toy):
        def step(self, batch):
            loss, extra = super().step(batch)
            return (
                loss * value if self.training and self.trainer.global_step == 8 else loss
            ), extra

    with pytest.raises(NonFiniteLoss) as error:
        run(tmp_path, task=Breaking(), save_every_steps=5)
    sampler = EpochSampler(SAMPLES, 5, True, True)
    sampler.set_epoch(1)
    ids = [index for _, index in sampler][2 * BATCH : 3 * BATCH]
    assert f"loss is {value} at step 8 of epoch 1, samples {ids}" in str(error.value)
    assert str(error.value).endswith(f"last good checkpoint: {tmp_path / 'last.ckpt'}")
    assert read_checkpoint(tmp_path / "last.ckpt")[MARK]["position"] == [1, 0]


@pytest.mark.parametrize("form", ["dict", "tuple", "object"])
def test_non_finite_loss_names_the_samples_in_any_batch(tmp_path, form):
    class Box:
        def __init__(self, batch):
            self.x, self.id = batch

    class Breaking(Toy):
        def step(self, batch):
            x, names = (
                (batch.x, batch.id)
                if form == "object"
                else (batch["x"], batch["ids"])
                if form == "dict"
                else batch
            )
            bad = "field_3" in names and not self.training
            return self.model(x).sum() * (float("nan") if bad else 1.0), {}

        def count(self, batch):
            return 4

    class Named(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, key):
            return torch.ones(2), f"field_{key[1]}"

    def collate(items):
        x, names = torch.stack([x for x, _ in items]), [name for _, name in items]
        return {"dict": dict(x=x, ids=names), "tuple": (x, names), "object": Box((x, names))}[form]

    made = [
        loader(Named(), 4, seed=0, shuffle=False, train=train, collate=collate)
        for train in (True, False)
    ]
    with pytest.raises(
        NonFiniteLoss, match=r"validation loss is nan .* samples \['field_0', .*'field_3'\]"
    ):
        fit(Breaking(), *made, folder=tmp_path, monitor="train_loss", tensorboard=False, **ONCE)


def test_non_finite_validation_is_an_error(tmp_path):
    class Nan(Toy):
        def valid_scores(self):
            return {"f1": float("nan")}

    with pytest.raises(NonFiniteLoss, match="valid_f1 is nan at the end of epoch 0"):
        run(tmp_path, task=Nan())


def test_unmeasured_monitor_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match="monitor='valid_iou' is not measured: .*valid_f1"):
        run(tmp_path, monitor="valid_iou")


def test_metric_collections_survive_mid_epoch():
    one, two = Toy(), Toy()
    batches = list(loaders()[0])
    for batch in batches[:3]:
        one.train_metrics["scores"].update(one(batch["x"]), batch["y"])
    set_metric_state(two, metric_state(one))
    two.load_state_dict(one.state_dict())
    one.eval(), two.eval()
    for task in (one, two):
        for batch in batches[3:]:
            task.train_metrics["scores"].update(task(batch["x"]), batch["y"])
    assert str(one.train_metrics["scores"].compute()) == str(two.train_metrics["scores"].compute())
    assert isinstance(MeanMetric(), nn.Module)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(amp="fp16", device="cpu"), "fp16"),
        (dict(amp="int8"), "amp='int8'"),
        (dict(mode="best"), "mode='best'"),
        (dict(epochs=0), "epochs=0"),
        (dict(accumulate=0), "accumulate=0"),
        (dict(ema=1.0), "ema=1.0"),
        (dict(clip=-1.0), "clip"),
        (dict(device="tpu"), "device='tpu'"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        Settings(**{"epochs": 1, "folder": "x", "seed": 0, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device():
    with pytest.raises(ValueError, match="no CUDA device"):
        Settings(epochs=1, folder="x", seed=0, device="cuda")


def test_process_settings_are_put_back(tmp_path):
    threads = torch.get_num_threads()
    run(tmp_path, epochs=1, threads=1)
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()


# --- loaders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,drop", [(0, False), (3, True)])
def test_loader_without_a_batch(size, drop):
    with pytest.raises(ValueError, match=f"{size} samples make no batch of 4"):
        loader(Points(size), 4, seed=0, shuffle=True, drop_last=drop)


def test_sampler_covers_shuffles_and_starts_anywhere():
    sampler = EpochSampler(11, seed=0, shuffle=True, train=True)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert sorted(i for _, i in keys) == list(range(11)) and {e for e, _ in keys} == {epoch}
        epochs.append(keys)
        sampler.start_at(epoch, 4)
        assert list(sampler) == keys[4:] and len(sampler) == 11
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]


@pytest.mark.parametrize("train", [True, False])
def test_sampler_shares_out(monkeypatch, train):
    import leansense.core.loader as module

    shares = []
    for rank in range(3):
        monkeypatch.setattr(module, "world_of", lambda rank=rank: (rank, 3))
        sampler = EpochSampler(7, seed=0, shuffle=True, train=train)
        shares.append([i for _, i in sampler])
        assert len(sampler) == len(shares[-1])
    drawn = sorted(sum(shares, []))
    assert set(drawn) == set(range(7)) and len(drawn) == (9 if train else 7)
    assert not train or len({len(share) for share in shares}) == 1


# --- groups and schedules -------------------------------------------------------------------------


def test_groups_are_exact():
    model = nn.ModuleDict(
        {"a": nn.Linear(2, 2), "b": nn.LayerNorm((2, 2)), "c": nn.Conv2d(1, 1, 3)}
    )
    made = param_groups(
        model, [Group("a", [model["a"]], lr=0.1), Group("rest")], lr=1.0, weight_decay=0.5
    )
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in made] == [
        ("a", 0.1, 0.5, 1), ("a_no_decay", 0.1, 0.0, 1),
        ("rest", 1.0, 0.5, 1), ("rest_no_decay", 1.0, 0.0, 3)]  # fmt: skip
    whole = param_groups(model, [Group("all")], no_decay_norm_bias=False, weight_decay=0.5)
    assert [len(g["params"]) for g in whole] == [6]
    model["c"].requires_grad_(False)
    assert sum(len(g["params"]) for g in param_groups(model, [Group("all")], weight_decay=0.5)) == 4


@pytest.mark.parametrize(
    "groups,message",
    [
        (lambda m: [Group("a", [m[0]])], r"in no group: 1.weight, 1.bias"),
        (
            lambda m: [Group("a", [m[0]]), Group("b", [m])],
            r"two groups: 0.weight \(a, b\), 0.bias \(a, b\)",
        ),
        (
            lambda m: [Group("a", [nn.Linear(3, 1)]), Group("b")],
            r"'a' claims a \(1, 3\) parameter not in the model",
        ),
        (lambda m: [Group("a"), Group("b")], "one at most takes the rest"),
        (lambda m: [Group("a", [m[0]]), Group("a")], "names must differ"),
    ],
)
def test_unclear_groups(groups, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=message):
        param_groups(model, groups(model))


def test_cosine_vector():
    curve = [row[0] for row in rates(Recipe(schedule="cosine", t_max=30), [5e-4], 30)]
    for epoch, value in {0: 5e-4, 1: 4.98630e-4, 10: 3.75e-4, 15: 2.5e-4, 29: 1.36953e-6}.items():
        assert curve[epoch] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "warmup_cosine"])
def test_the_floor_is_absolute_for_every_group(kind):
    warmup = 2 if kind == "warmup_cosine" else 0
    recipe = Recipe(schedule=kind, floor=1e-5, warmup=warmup)
    dummy = torch.optim.SGD(
        [dict(params=[nn.Parameter(torch.zeros(1))], lr=peak) for peak in (1e-3, 1e-4)], lr=1.0
    )
    clock = scheduler(dummy, recipe, epochs=10, steps=0)
    tops = []
    for _ in range(10):
        tops.append([g["lr"] for g in dummy.param_groups])
        dummy.step(), clock.step()
    assert [g["lr"] for g in dummy.param_groups] == pytest.approx([1e-5, 1e-5])
    assert [max(column) for column in zip(*tops)] == pytest.approx([1e-3, 1e-4])
    half = (10 - warmup) // 2 + warmup
    assert tops[half] == pytest.approx([(1e-3 + 1e-5) / 2, (1e-4 + 1e-5) / 2])


def test_schedules_step_as_often_as_said(tmp_path):
    stairs = Recipe(lr=1.0, schedule="step", step_size=2, gamma=0.5)
    assert [row[0] for row in rates(stairs, [1.0], 5)] == [1, 1, 0.5, 0.5, 0.25]
    curve = [row[0] for row in rates(ONECYCLE, [0.02], EPOCHS, 6 * EPOCHS)]
    _, result = run(tmp_path / "a", ONECYCLE)
    assert result.history["lr_all"] == curve[::6] and max(curve) == pytest.approx(0.02, rel=0.01)
    _, result = run(tmp_path / "b", Recipe(lr=0.02, schedule="cosine"), accumulate=2)
    assert result.history["lr_all"] == [
        row[0] for row in rates(Recipe(schedule="cosine"), [0.02], EPOCHS)
    ]


def test_plateau_follows_the_monitor(tmp_path):
    class Flat(Toy):
        def valid_scores(self):
            return {"f1": [0.5, 0.6, 0.6, 0.6, 0.6][self.current_epoch]}

    recipe = Recipe(lr=0.08, schedule="plateau", plateau_patience=1, gamma=0.5, floor=0.03)
    _, result = run(tmp_path, task=Flat(recipe), epochs=5)
    assert result.history["lr_all"] == [0.08, 0.08, 0.08, 0.08, 0.04]


@pytest.mark.parametrize(
    "recipe,message",
    [
        (dict(schedule="cosine", t_max=9), "t_max=9 ends before the run of 10"),
        (dict(schedule="onecycle", per="step", t_max=50), "t_max=50 ends before the run of 100"),
        (dict(schedule="warmup_cosine", warmup=10), "warmup=10 leaves nothing"),
        (dict(schedule="cosine", floor=0.1), "floor=0.1 is above the peak"),
    ],
)
def test_schedules_that_would_misbehave(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        rates(Recipe(**recipe), [1e-3], epochs=10, steps=100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "recipe",
    [
        dict(optimizer="adamax"),
        dict(schedule="linear"),
        dict(per="batch"),
        dict(warmup=1),
        dict(floor=0.1),
        dict(lr=-1.0),
        dict(schedule="plateau", per="step"),
    ],
)
def test_recipes_that_make_no_sense(recipe):
    with pytest.raises(ValueError):
        Recipe(**recipe)


# --- two processes --------------------------------------------------------------------------------

DDP = """
import sys; sys.path.insert(0, {tests!r})
import json, os, test_train as t
class Seen(t.Toy):
    def __init__(self):
        super().__init__(t.ADAM)
        self.ids = []
    def step(self, batch):
        self.ids.append([bool(self.training), self.current_epoch, batch["id"].tolist()])
        return super().step(batch)
def go(name, **more):
    t.seed_everything(0)
    task = Seen()
    given = dict(epochs=2, devices=2, strategy="ddp", save_every_steps=1) | more
    _, result = t.run({folder!r} + "/" + name, task=task, **given)
    weights = sum(float(p.double().sum()) for p in task.parameters())
    return dict(history=result.history, weights=weights, ids=task.ids, best=result.best_epoch)
if __name__ == "__main__":
    whole = go("whole")
    try:
        go("cut", callbacks=(t.Cut(5),))
        sys.exit("was not cut")
    except InterruptedError:
        t.seed_everything(9)
    again = go("cut", resume="auto")
    with open({folder!r} + "/" + os.environ.get("LOCAL_RANK", "0") + ".json", "w") as file:
        json.dump([whole, again], file)
"""


def test_two_processes(tmp_path):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    done = subprocess.run(
        script(tmp_path, DDP, folder=str(tmp_path)),
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, again), (two, other) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert (
        one["history"] == two["history"]
        and one["weights"] == two["weights"]
        and one["best"] == two["best"]
    )
    for epoch, training in itertools.product((0, 1), (True, False)):
        seen = sorted(
            i
            for r in (one, two)
            for t, e, ids in r["ids"]
            if (t, e) == (training, epoch)
            for i in ids
        )
        assert seen == list(range(SAMPLES if training else VALID))
    # cut in the middle of the second epoch and continued: each process has its own generators back
    assert again["history"] == other["history"] == one["history"]
    assert again["weights"] == other["weights"] == one["weights"]
    assert {e for _, e, _ in again["ids"]} == {1}


def test_one_progress_line_an_epoch(tmp_path, capsys):
    """Each epoch's line stays, with its own metrics; no line of validation, no version of a log."""
    task, result = run(tmp_path, progress=True, tensorboard=True, epochs=3)
    shown = [line.rsplit("\r", 1)[-1] for line in capsys.readouterr().out.split("\n")]
    lines = [line for line in shown if "it/s" in line]
    assert len(lines) == 3 and "Validation" not in str(shown) and "v_num" not in str(shown)
    for epoch, line in enumerate(lines):
        assert line.startswith(f"Epoch {epoch + 1}/3: 100%")
        assert f"valid_f1={result.history['valid_f1'][epoch]:.3g}" in line
