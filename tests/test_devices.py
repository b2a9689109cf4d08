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

class Plain(t.Toy):  # nothing that depends on how samples fall into processes: no batch norm, no dropout
    def __init__(self, breaks=-1):
        super().__init__(Recipe(lr=0.02, schedule="cosine", per="step"))
        self.model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
        self.breaks = breaks
    def step(self, batch):
        loss, extra = super().step(batch)
        return (loss * float("nan") if self.training and self.trainer.global_step == self.breaks else loss), extra

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
    torch.randn(600, 600) @ torch.randn(600, 600)  # wakes the pool of threads, which a fork does not take along
    seed_everything(0)
    task = Plain(breaks)
    given = dict(epochs=3, seed=1, monitor="valid_f1", device="cpu", progress=False, patience=0, tensorboard=False)
    loaders = (loader(t.Points(48), batch, seed=5, shuffle=True, workers=settings.pop("workers", 0)),
               loader(t.Points(17, 0.0), 4, seed=5, shuffle=False))
    return task, fit(task, *loaders, folder=folder, ema=ema, **given | settings)

def told(task, result):
    weights = [p.detach().flatten().tolist() for p in task.parameters()]
    return dict(history=result.history, best=result.best_epoch, score=result.best_score, weights=sum(weights, []),
                speed=result.samples_per_second, seen=task.seen, seconds=result.seconds, path=str(result.best_path))
"""
COMPARE = """
    folder = {folder!r}
    out = dict(one=told(*go(folder + "/one", 8, ema=0.5)))
    seen = Validated()
    out["two"] = told(*go(folder + "/two", 4, ema=0.5, devices=2, callbacks=(seen,), workers=1, **{more!r}))
    out["ids"] = seen.ids
"""
GO_ON = """
    again = Validated()
    out["finished"] = told(*go(folder + "/two", 4, ema=0.5, devices=2, resume="auto", callbacks=(again,)))
    out["ids again"] = again.ids
    try:
        go(folder + "/cut", 4, ema=0.5, devices=2, callbacks=(Validated(), t.Cut(8)), save_every_steps=3)
    except InterruptedError as error:
        out["cut"] = str(error)
    out["resumed"] = told(*go(folder + "/cut", 4, ema=0.5, devices=2, callbacks=(Validated(),), resume="auto",
                              save_every_steps=3))
    try:
        go(folder + "/nan", 4, devices=2, breaks=4)
    except NonFiniteLoss as error:
        out["nan"] = str(error)
"""
END = """
    with open(folder + "/out.json", "w") as file:
        json.dump(out, file)
"""


def environment(**more):
    """Without what would tell Lightning that a launcher is at work, and with as many threads as the machine likes."""
    drop = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "OMP_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_NUM_THREADS": "2"} | more


def close(one, two, tolerance=1e-5):
    return one.keys() == two.keys() and all(
        a == pytest.approx(b, rel=tolerance, abs=tolerance) for name in one for a, b in zip(one[name], two[name])
    )


def check_compared(out):
    """One process and two came to the same, and everything is back in the parent."""
    one, two = out["one"], out["two"]
    assert close(one["history"], two["history"]) and (one["best"], two["best"]) == (one["best"],) * 2
    assert one["weights"] == pytest.approx(two["weights"], abs=1e-4)
    assert two["score"] == two["history"]["valid_f1"][two["best"]] and two["seen"] == 3 * 48
    assert two["speed"] > 0 and two["seconds"] > 0 and Path(two["path"]).is_file()
    assert out["ids"] == [list(range(17))] * 3  # every validation sees each sample once
    left = [p.name for p in Path(two["path"]).parent.iterdir()]
    assert sorted(left) == ["best.ckpt", "history.csv", "last.ckpt"]


def check_gone_on(out):
    """A finished run is given back, a cut one goes on exactly, an error keeps its kind and words."""
    two, finished, resumed = out["two"], out["finished"], out["resumed"]
    assert finished["history"] == two["history"] and finished["speed"] == 0 and out["ids again"] == out["ids"]
    assert "cut" in out["cut"]
    assert resumed["history"] == two["history"] and resumed["weights"] == two["weights"]
    assert "loss is nan at step 4 of epoch 0, samples [" in out["nan"] and "\n" not in out["nan"]


def papermill(notebook, *options, **env):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(notebook) + ".out.ipynb"]
    done = subprocess.run([*command, *options], env=environment(**env), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_from_a_notebook(tmp_path):
    body = textwrap.dedent(COMPARE.format(folder=str(tmp_path), more={}) + GO_ON + END)
    cells = [nbformat.v4.new_code_cell(text) for text in (COMMON.format(tests=TESTS), body)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "toy.ipynb")
    papermill(tmp_path / "toy.ipynb")
    out = json.loads((tmp_path / "out.json").read_text())
    check_compared(out)
    check_gone_on(out)


def test_two_spawned_processes(tmp_path):
    """What a machine with GPUs does, where a fork is impossible."""
    (tmp_path / "script.py").write_text(
        COMMON.format(tests=TESTS)
        + "\nif __name__ == '__main__':"
        + COMPARE.format(folder=str(tmp_path), more=dict(strategy="ddp_spawn"))
        + END
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
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
        + f"\nif __name__ == '__main__':\n    go({str(tmp_path / 'run')!r}, 4, devices=2, strategy='ddp_fork',"
        + " callbacks=(Slow(),), epochs=100)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env=environment(), stdout=subprocess.PIPE, text=True
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
    "leaf": {"image_size": 64, "epochs": 1, "batch_size": 8, "num_workers": 0, "fps_repeats": 1, "device": "cpu"},
    "simbev": {"standin": 20, "nepochs": 1, "bsz": 2, "nworkers": 0, "trunk": "mobilenetv3_small_050", "camC": 8,
               "up_width": 16, "bev_width": 8, "final_h": 64, "final_w": 160, "xbound": [-32.0, 32.0, 2.0],
               "ybound": [-32.0, 32.0, 2.0], "augment": "none", "val_step": 2, "save_step": 2, "gpuid": -1},
}  # fmt: skip


@pytest.mark.parametrize("system", SMALL)
def test_a_row_on_two_devices(tmp_path, system):
    notebook = Path(TESTS).parent / "nbs" / system / "80_row.ipynb"
    out = tmp_path / f"papers/{system}/records/demo/t/r.s1.json"
    given = SMALL[system] | {"devices": 2, "progress": False, "folder": str(tmp_path / "run"), "out": str(out), "seed": 1}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(tmp_path / "row.ipynb")]
    records = []
    for _ in range(2):  # the second time it is finished already, and the record comes out the same
        done = subprocess.run([*command, "-y", json.dumps(given)], cwd=notebook.parents[2], env=environment(),
                              capture_output=True, text=True, timeout=900)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        records.append(json.loads(out.read_text()))
        costs = records[-1].pop("cost")
        records[-1].pop("env")
        assert (costs["samples_per_second"] > 0) == (len(records) == 1)
    metrics = records[0]["metrics"]
    assert metrics["epochs_run"] == 1 and len(metrics["history"]["train_loss"]) == 1
    assert records[0]["metrics"] == records[1]["metrics"]
