"""Several devices: two CPU processes, out of a script and out of notebooks that papermill runs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT

TESTS = os.path.dirname(__file__)
COMMON = """
import copy, json, os, sys, time
sys.path.insert(0, {tests!r})
import lightning as L
import torch
from torch import nn
import test_train as t
from leansense.core.loader import loader
from leansense.core.schedule import Recipe
from leansense.core.train import NonFiniteLoss, Task, fit, seed_everything

class Plain(t.Toy):  # without batch norm and dropout: it does not matter where a sample falls
    def __init__(self, breaks=-1):
        super().__init__(Recipe(lr=0.02, schedule="cosine", per="step"))
        self.model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
        self.breaks = breaks
    def step(self, batch):
        loss, extra = super().step(batch)
        if self.training and self.trainer.global_step == self.breaks:
            loss = loss * float("nan")
        return loss, extra

class Validated(L.Callback):
    # the samples of each validation, as a callback with a state collects them
    def __init__(self):
        self.ids = []
    def state_dict(self):
        return dict(ids=list(self.ids))
    def load_state_dict(self, state):
        self.ids = list(state["ids"])
    def on_validation_start(self, *_):
        self.mine = []
    def on_validation_batch_end(self, trainer, task, outputs, batch, *_):
        self.mine += batch["id"].tolist()
    def on_validation_end(self, trainer, *_):
        everyone = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, self.mine)
        self.ids.append(sorted(sum(everyone, [])))

class Slow(L.Callback):
    def on_train_batch_end(self, *_):
        os.write(1, f"{{os.getpid()}}\\n".encode())  # in one piece: two processes write here
        time.sleep(0.3)

def go(folder, batch, ema=0.0, breaks=-1, **settings):
    torch.randn(600, 600) @ torch.randn(600, 600)  # wakes the threads, which a fork leaves behind
    seed_everything(0)
    task = Plain(breaks)
    given = dict(epochs=3, seed=1, monitor="valid_f1", device="cpu", progress=False, patience=0)
    given |= dict(tensorboard=False)
    workers = settings.pop("workers", 0)
    loaders = (loader(t.Points(48), batch, seed=5, shuffle=True, workers=workers),
               loader(t.Points(17, 0.0), 4, seed=5, shuffle=False))
    return task, fit(task, *loaders, folder=folder, ema=ema, **given | settings)

def told(task, result):
    weights = sum((p.detach().flatten().tolist() for p in task.parameters()), [])
    return dict(history=result.history, best=result.best_epoch, score=result.best_score,
                weights=weights, speed=result.samples_per_second, seen=task.seen,
                seconds=result.seconds, path=str(result.best_path))
"""
COMPARE = """
    folder = {folder!r}
    out = dict(one=told(*go(folder + "/one", 8, ema=0.5)))
    seen = Validated()
    out["two"] = told(*go(folder + "/two", 4, ema=0.5, devices=2, callbacks=(seen,), workers=1,
                          **{more!r}))
    out["ids"] = seen.ids
"""
GO_ON = """
    again = Validated()
    out["finished"] = told(*go(folder + "/two", 4, ema=0.5, devices=2, resume="auto",
                               callbacks=(again,)))
    out["ids again"] = again.ids
    try:
        go(folder + "/cut", 4, ema=0.5, devices=2, callbacks=(Validated(), t.Cut(8)),
           save_every_steps=3)
    except InterruptedError as error:
        out["cut"] = str(error)
    out["resumed"] = told(*go(folder + "/cut", 4, ema=0.5, devices=2, callbacks=(Validated(),),
                              resume="auto", save_every_steps=3))
    try:
        go(folder + "/nan", 4, devices=2, breaks=4)
    except NonFiniteLoss as error:
        out["nan"] = str(error)
"""
END = """
    with open(folder + "/out.json", "w") as file:
        json.dump(out, file)
"""


def environment(threads=2):
    """Without what would tell Lightning that a launcher is at work, and with threads to lose."""
    drop = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def python(*arguments, threads=2, **more):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(threads),
        capture_output=True,
        text=True,
        timeout=1800,
        **more,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def close(one, two, tolerance=1e-5):
    return one.keys() == two.keys() and all(
        a == pytest.approx(b, rel=tolerance, abs=tolerance)
        for name in one
        for a, b in zip(one[name], two[name])
    )


def check_compared(out):
    """One process and two came to the same, and everything is back in the parent."""
    one, two = out["one"], out["two"]
    assert (
        close(one["history"], two["history"]) and (one["best"], two["best"]) == (one["best"],) * 2
    )
    assert one["weights"] == pytest.approx(two["weights"], abs=1e-4)
    assert two["score"] == two["history"]["valid_f1"][two["best"]] and two["seen"] == 3 * 48
    assert two["speed"] > 0 and two["seconds"] > 0 and Path(two["path"]).is_file()
    assert out["ids"] == [list(range(17))] * 3  # every validation sees each sample once
    left = [p.name for p in Path(two["path"]).parent.iterdir()]
    assert sorted(left) == ["best.ckpt", "history.csv", "last.ckpt"]


def check_gone_on(out):
    """A finished run comes back, a cut one goes on exactly, an error keeps kind and words."""
    two, finished, resumed = out["two"], out["finished"], out["resumed"]
    assert (
        finished["history"] == two["history"]
        and finished["speed"] == 0
        and out["ids again"] == out["ids"]
    )
    assert "cut" in out["cut"]
    assert resumed["history"] == two["history"] and resumed["weights"] == two["weights"]
    assert "loss is nan at step 4 of epoch 0, samples [" in out["nan"] and "\n" not in out["nan"]


def test_two_processes_from_a_notebook(tmp_path):
    body = textwrap.dedent(COMPARE.format(folder=str(tmp_path), more={}) + GO_ON + END)
    cells = [nbformat.v4.new_code_cell(text) for text in (COMMON.format(tests=TESTS), body)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "toy.ipynb")
    python("-m", "papermill", "--no-progress-bar", "toy.ipynb", "out.ipynb", cwd=tmp_path)
    out = json.loads((tmp_path / "out.json").read_text())
    check_compared(out)
    check_gone_on(out)


def test_two_spawned_processes(tmp_path):
    """What a machine with GPUs does, where a fork is impossible."""
    body = COMPARE.format(folder=str(tmp_path), more=dict(strategy="ddp_spawn")) + END
    main = "\nif __name__ == '__main__':" + body
    (tmp_path / "script.py").write_text(COMMON.format(tests=TESTS) + main)
    python(str(tmp_path / "script.py"))
    check_compared(json.loads((tmp_path / "out.json").read_text()))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_end_with_their_parent(tmp_path, sent):
    (tmp_path / "script.py").write_text(
        COMMON.format(tests=TESTS)
        + f"\nif __name__ == '__main__':\n    go({str(tmp_path / 'run')!r}, 4, devices=2,"
        + " strategy='ddp_fork', callbacks=(Slow(),), epochs=100)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    children = {int(parent.stdout.readline()) for _ in range(6)}
    assert len(children) == 2 and parent.pid not in children
    parent.send_signal(sent)
    parent.wait()
    until = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))


SMALL = {
    "leaf": dict(image_size=64, epochs=1, batch_size=8, num_workers=0, fps_repeats=1, device="cpu",
                 train_limit=48, valid_limit=16),
    "simbev": dict(standin=20, nepochs=1, bsz=2, nworkers=0, trunk="mobilenetv3_small_050", camC=8,
                   up_width=16, bev_width=8, final_h=64, final_w=160, xbound=[-32.0, 32.0, 2.0],
                   ybound=[-32.0, 32.0, 2.0], augment="none", val_step=2, save_step=2, gpuid=-1),
}  # fmt: skip


def row(system, folder):
    """The record of a system's row on two devices, trained below `folder`."""
    out = folder / f"papers/{system}/records/demo/t/r.s1.json"
    given = SMALL[system] | {"devices": 2, "progress": False, "seed": 1, "out": str(out)}
    values = ("-y", json.dumps(given | {"folder": str(folder / "run")}))
    notebook = (f"nbs/{system}/80_row.ipynb", str(folder / "row.ipynb"))
    python("-m", "papermill", "--no-progress-bar", *notebook, *values, threads=1, cwd=ROOT)
    return json.loads(out.read_text())


@pytest.mark.parametrize("system", SMALL)
def test_a_row_on_two_devices(tmp_path, system):
    record = row(system, tmp_path)
    metrics = record["metrics"]
    assert metrics["epochs_run"] == 1 and len(metrics["history"]["train_loss"]) == 1
    assert record["cost"]["samples_per_second"] > 0
    if system == "simbev":  # its callback has a state and files: all back when found finished
        again = row(system, tmp_path)
        assert again["metrics"] == metrics and again["cost"]["samples_per_second"] == 0
