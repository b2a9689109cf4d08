"""A SimBEV checkpoint is rebuilt from itself, or refused in one line; printed invocations run."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from conftest import ROOT, set_one
from leansense.core.parameters import read_parameters
from leansense.simbev.data import dataset, loaders
from leansense.simbev.model import DEMO, build
from leansense.simbev.task import stage_resume
from leansense.simbev.use import load_checkpoint, main, predict

SETTINGS = dict(
    DEMO,
    outC=1,
    final_dim=[32, 96],
    camC=8,
    up_width=16,
    bev_width=8,
    grid_conf={
        "xbound": [-32.0, 32.0, 4.0],
        "ybound": [-32.0, 32.0, 4.0],
        "zbound": [-10.0, 10.0, 20.0],
        "dbound": [4.0, 45.0, 4.1],
    },
)
PARAMS = {
    "H": 64,
    "W": 144,
    "final_h": 32,
    "final_w": 96,
    "classes": ["vehicle"],
    "xbound": [-32.0, 32.0, 4.0],
    "ybound": [-32.0, 32.0, 4.0],
    "dbound": [4.0, 45.0, 4.1],
}


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    return build(**SETTINGS).state_dict()


@pytest.fixture(scope="module")
def folder() -> str:
    return dataset(
        {"data": "standin", "standin": 8, "standin_size": "240x112", "layout": "native"}
    ).folder


def write(path: Path, weights: dict, model: dict = SETTINGS, params: dict = PARAMS, **more) -> Path:
    settings = json.dumps({"model": model, "params": params})
    torch.save(
        {"leansense": {}, "state_dict": {}, "model_state_dict": weights, "settings": settings}
        | more,
        path,
    )
    return path


FINE = SETTINGS["grid_conf"] | {name: [-32.0, 32.0, 0.0064] for name in ("xbound", "ybound")}
FAULTS = {
    "a key is missing": (
        lambda w: {"weights": dict(list(w.items())[1:])},
        "weights of another model",
    ),
    "a key too many": (
        lambda w: {"weights": w | {"extra": torch.zeros(1)}},
        "weights of another model",
    ),
    "all NaN": (
        lambda w: {
            "weights": {k: v * math.nan if v.is_floating_point() else v for k, v in w.items()}
        },
        "hold NaN",
    ),
    "one NaN": (lambda w: {"weights": set_one(w, math.nan)}, "hold NaN"),
    "one infinity": (lambda w: {"weights": set_one(w, math.inf)}, "hold Inf"),
    "no weights": (lambda w: {"weights": 3}, "no checkpoint of SimBEV training"),
    "a setting is unknown": (
        lambda w: {"model": SETTINGS | {"splat": "old"}},
        "not known here (splat)",
    ),
    "a setting is wrong": (lambda w: {"model": SETTINGS | {"camC": 0}}, "cannot be built: camC=0"),
    "a size of one number": (lambda w: {"model": SETTINGS | {"final_dim": 5}}, "not a height"),
    "a grid that is a word": (lambda w: {"model": SETTINGS | {"grid_conf": "x"}}, "its grid is"),
    "a grid of 10^8 cells": (lambda w: {"model": SETTINGS | {"grid_conf": FINE}}, "are the most"),
    "a billion channels": (lambda w: {"model": SETTINGS | {"camC": 10**9}}, "camC is 1000000000"),
    "another trunk": (
        lambda w: {"model": SETTINGS | {"trunk": "resnet10t"}},
        "weights of another model",
    ),
    "no parameters": (
        lambda w: {"settings": json.dumps({"model": SETTINGS})},
        "nothing sound of its network",
    ),
    "no JSON": (lambda w: {"settings": "{"}, "nothing sound of its network"),
    "no text": (lambda w: {"settings": 7}, "nothing sound of its network"),
    "another grid": (
        lambda w: {"params": PARAMS | {"xbound": [-40.0, 40.0, 0.5]}},
        "xbound is [-40.0, 40.0, 0.5]",
    ),
    "another picture": (lambda w: {"params": PARAMS | {"final_h": 64}}, "final_h is 64"),
    "more classes": (
        lambda w: {"params": PARAMS | {"classes": ["car", "bus"]}},
        "2 classes in its parameters, 1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_that_contradicts_itself_is_one_line(tmp_path, weights, folder, capsys, name):
    change, said = FAULTS[name]
    path = write(tmp_path / "model_best.pt", **({"weights": weights} | change(weights)))
    assert main([str(path), folder, "--out", str(tmp_path / "out"), "--limit", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "model_best.pt" in error, error
    assert not (tmp_path / "out").exists()


def test_good_checkpoints_answer(tmp_path, weights, folder):
    """Also one that a wrapper for GPUs wrote, and one that leaves the grid to its network."""
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    less = {name: value for name, value in PARAMS.items() if not name.endswith("bound")}
    answers = set()
    for k, path in enumerate(
        (write(tmp_path / "a.pt", weights), write(tmp_path / "b.pt", wrapped, params=less))
    ):
        out = tmp_path / f"out{k}"
        assert main([str(path), folder, "--out", str(out), "--limit", "1", "--split", "test"]) == 0
        answers |= {file.read_text() for file in out.glob("*.json")}
        assert load_checkpoint(path)[1]["xbound"] == [-32.0, 32.0, 4.0]
    assert len(answers) == 1 and "NaN" not in answers.pop()


def test_a_negative_limit_is_refused(tmp_path, weights, folder, capsys):
    path = write(tmp_path / "a.pt", weights)
    assert main([str(path), folder, "--out", str(tmp_path / "out"), "--limit", "-1"]) == 1
    assert "limit=-1" in capsys.readouterr().err


def test_a_network_that_answers_nan(tmp_path, weights, folder):
    """Finite weights can still overflow; an empty map would be the answer, with an IoU of 1."""
    model, params = load_checkpoint(write(tmp_path / "a.pt", weights))
    torch.nn.init.constant_(list(model.parameters())[-1], math.nan)
    with pytest.raises(ValueError, match="answers with NaN or infinity: use another"):
        next(predict(model, params, folder, limit=1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_to_start_from_must_be_numbers(tmp_path, weights, value):
    torch.save({"model_state_dict": set_one(weights, value)}, tmp_path / "start.pt")
    with pytest.raises(ValueError, match="start.pt hold (NaN|Inf)"):
        build(**SETTINGS, weights=str(tmp_path / "start.pt"))


# --- what the row notebook prints for a shell

PRINTED = re.findall(
    r"^papermill (.*)$",
    "\n".join(
        "".join(cell["source"])
        for cell in json.loads((ROOT / "nbs/simbev/80_row.ipynb").read_text())["cells"]
    ),
    re.M,
)


def given(line: str) -> dict:
    """The parameters of a printed papermill line, as the notebook would have them."""
    words, known = shlex.split(line), read_parameters("nbs/simbev/80_row.ipynb")
    pairs = [words[k + 1 : k + 3] for k, word in enumerate(words) if word == "-p"]
    assert all(name in known for name, _ in pairs)
    return {name: p.default for name, p in known.items()} | {
        n: type(known[n].default)(v) for n, v in pairs
    }


@pytest.mark.parametrize("line", PRINTED)
def test_printed_invocations_fit_the_default_stand_in(line):
    """Batches of the printed size, from the data that the line names: at least one a part."""
    params = given(line)
    made = loaders(dataset(params), params | {"nworkers": 0})
    assert set(made) == {"train", "valid", "test"} and all(len(part) >= 1 for part in made.values())
    resumed = params["resume"] not in ("auto", "")
    assert not resumed or any(
        Path(params["resume"]).parent == Path(given(other)["logdir"]) for other in PRINTED
    )
    assert stage_resume("auto", ROOT) == "auto" and len(PRINTED) == 4
