"""A sixth system, as a newcomer would add it: four notebooks, results and rows.yaml."""

from inspect import getsource

import torch
from torch.utils.data import Dataset

from leansense.core.loader import sample_rng


class Clouds(Dataset):
    """Clouds of three to eight points: on which side of the axis their centre lies."""

    def __init__(self, size, first):
        self.size, self.first = size, first

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        draw = sample_rng(7, 0, self.first + key[1])
        centre = draw.normal(size=2)
        cloud = centre + 0.5 * draw.normal(size=(draw.integers(3, 9), 2))
        return torch.tensor(cloud, dtype=torch.float32), int(centre[0] > 0)


DATA = [
    "#| default_exp clouds.data",
    "# Clouds: data\n> Clouds of points; on which side of an axis does each lie?",
    """#| export
from types import SimpleNamespace

import torch
from torch.utils.data import Dataset

from leansense.core.loader import loader, sample_rng

PARAMETERS = ("data", "count")


def dataset(params):
    \"\"\"So many clouds; drawn, so there is nothing to read.\"\"\"
    return SimpleNamespace(name="clouds", count=params["count"])


def identify(params):
    \"\"\"The fingerprint of these clouds.\"\"\"
    return f"clouds-{params['count']}-1"


"""
    + getsource(Clouds)
    + """

def collate(samples):
    \"\"\"A list of clouds, which differ in size, and their labels.\"\"\"
    return [cloud for cloud, _ in samples], torch.tensor([label for _, label in samples])


def loaders(data, params):
    \"\"\"A loader for each part.\"\"\"
    sizes = {"train": data.count, "valid": data.count // 2, "test": data.count // 2}
    more = {"seed": params["seed"], "collate": collate}
    return {
        part: loader(Clouds(size, 9999 * k), 16, shuffle=part == "train", **more)
        for k, (part, size) in enumerate(sizes.items())
    }""",
]
MODEL = [
    "#| default_exp clouds.model",
    "# Clouds: model\n> A mean over encoded points.",
    """#| export
import torch
from torch import nn


class Net(nn.Module):
    \"\"\"An encoder of points, and a classifier of their mean.\"\"\"

    def __init__(self, width=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, clouds):
        points = self.encoder(torch.cat(clouds)).split([len(cloud) for cloud in clouds])
        return self.head(torch.stack([each.mean(0) for each in points]))""",
]
TASK = [
    "#| default_exp clouds.task",
    "# Clouds: task\n> Cross-entropy and accuracy.",
    """#| export
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from leansense.core.schedule import Recipe
from leansense.core.task import Task


class CloudTask(Task):
    \"\"\"What one step is.\"\"\"

    def __init__(self, model, lr):
        super().__init__(model, Recipe(lr=lr))
        self.valid_metrics["acc"] = MulticlassAccuracy(2, average="micro")

    def step(self, batch):
        logits = self(batch[0])
        return cross_entropy(logits, batch[1]), {"acc": (logits, batch[1])}""",
]
ROW = [
    "# Clouds: one row\n> Trains one net, in two stages where asked to.",
    """# parameters
data: str = "standin"  # clouds are drawn
count: int = 80  # clouds of the training part
width: int = 8  # features of a point
lr: float = 0.02  # learning rate
stages: bool = False  # train the head alone afterwards
weights: str = ""  # checkpoint of another row to begin with
epochs: int = 2  # passes over the training part
monitor: str = "acc"  # validation score that chooses the best epoch
resume: str = "auto"  # auto: this row's own last checkpoint; a path; empty: afresh
seed: int = 0  # every random draw
folder: str = ""  # where checkpoints, logs, results go; empty: below runs/by-hand
out: str = ""  # path of the record; empty: show it only
progress: bool = False  # a progress bar""",
    """from leansense.core.row import Row

run = Row(globals(), "nbs/clouds/80_row.ipynb")""",
    """import torch

from leansense.clouds import data
from leansense.clouds.model import Net
from leansense.clouds.task import CloudTask
from leansense.core.train import seed_everything

clouds, batches = run.data(data)
seed_everything(seed)
task = CloudTask(Net(width), lr)
run.fit(task, stage="base" if stages else "", start=weights)
if stages:
    run.fit(task, stage="head", start=run.best("base"), freeze=["model.encoder"])
with torch.no_grad():
    right = [(task.eval()(x).argmax(1) == y) for x, y in batches["test"]]
run.finish({"test_acc": float(torch.cat(right).double().mean())})""",
]
RESULTS = [
    "# Clouds: results\n> The table.",
    """# parameters
scale: str = "demo"  # which records
data: str = ""  # data set
out: str = ""  # where the list of files goes""",
    """from leansense.core.tables import Column, Paper, over_seeds

paper = Paper("clouds", scale, data)
lines = over_seeds(paper.runs("main"), ["metrics.test_acc"])
paper.table("main", lines, [Column("metrics.test_acc", "accuracy", digits=2, best=max)])
paper.finish(out)""",
]
MATRIX = """title: clouds of points
headline: {table: main, row: plain, metric: test_acc, name: accuracy}
seeds: [0, 1]
tables:
  main:
    rows:
      plain: {label: Plain}
      tuned: {label: Tuned, needs: {weights: main/plain}, params: {stages: true, lr: 0.01}}
    grid: {width: [4, 16]}
"""
