"""An xad checkpoint is rebuilt from itself and answers for a folder, or is refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from conftest import message
from leansense.core.checkpoint import MARK
from leansense.core.parameters import read_parameters
from leansense.xad.data import CLASSES, dataset
from leansense.xad.model import build
from leansense.xad.task import network_settings
from leansense.xad.use import describe_map, load_checkpoint, main, name_labels, predict

PARAMS = {name: p.default for name, p in read_parameters("nbs/xad/80_row.ipynb").items()} | {
    "standin": 8,
    "standin_samples": 1,
    "final_h": 32,
    "final_w": 96,
    "width": 0.0625,
    "xbound": [-48.0, 48.0, 3.0],
    "ybound": [-48.0, 48.0, 3.0],
    "dbound": [4.0, 45.0, 4.1],
}


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    model = build(**network_settings(PARAMS))
    return {f"model.{name}": value for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder() -> str:
    return str(dataset(PARAMS).folder)


def write(path: Path, weights: dict, params: dict = PARAMS, **config) -> Path:
    about = json.dumps({"config": {"params": params} | config})
    torch.save({"state_dict": weights, MARK: {"config": about}}, path)
    return path


def test_it_is_rebuilt_and_answers_the_same(weights, folder, tmp_path):
    model, params = load_checkpoint(write(tmp_path / "best.ckpt", weights))
    assert not model.training and params == PARAMS
    found = list(predict(model, params, folder, "test"))
    assert len(found) == dataset(PARAMS).counts()["test"]
    again = list(predict(model, params, folder, "test", limit=1))
    assert again[0][0] == found[0][0] and len(again) == 1
    answer, item, classes = found[0]
    for kind, count in (("actions", 4), ("descriptions", 8)):
        assert len(answer[kind]) == count
        for one in answer[kind]:
            assert one["answer"] == (one["probability"] > 0.5)
            assert 0.5 <= one["confidence"] <= 1
    assert answer["actions"][1]["name"] == "stop" and tuple(classes.shape) == (32, 32)
    assert abs(sum(answer["map"]["shares"].values()) - 1) < 1e-3


def test_a_network_that_answers_nan(weights, folder, tmp_path):
    """Actions and reasons would be those below a threshold, which NaN never is."""
    model, params = load_checkpoint(write(tmp_path / "best.ckpt", weights))
    for value in model.parameters():
        torch.nn.init.constant_(value, float("inf"))
    said = message(ValueError, next, predict(model, params, folder, limit=1))
    assert "answers with NaN or infinity: use another checkpoint" in said


def test_files_for_programs_and_for_people(weights, folder, tmp_path, capsys):
    kept = write(tmp_path / "best.ckpt", weights)
    out = tmp_path / "answers"
    assert main([str(kept), folder, "--out", str(out), "--part", "valid"]) == 0
    (made,) = out.glob("*.json")
    answer = json.loads(made.read_text())
    assert answer["id"] == made.stem and made.with_suffix(".png").stat().st_size > 5000
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".png"]
    assert "1 samples in" in capsys.readouterr().out


def test_what_is_said_of_a_map():
    classes = torch.zeros(4, 4, dtype=torch.long)
    classes[3, 0], classes[:, 2] = 1, 2
    found = describe_map(classes, (-2.0, 2.0, 1.0), (-2.0, 2.0, 1.0))
    assert found["vehicles"] == [[3, 0, 1.5, -1.5]]
    assert found["shares"] == dict(zip(CLASSES, (0.6875, 0.0625, 0.25, 0.0)))


def test_labels_by_name():
    found = name_labels(("stop", "left"), torch.tensor([2.0, -1.0]))
    assert [one["answer"] for one in found] == [True, False]
    assert found[1]["probability"] == 0.2689 and found[1]["confidence"] == 0.7311


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: {"weights": dict(list(w.items())[1:])}, "weights of another model"),
        (lambda w: {"params": PARAMS | {"width": 0.125}}, "weights of another model"),
        (lambda w: {"params": PARAMS | {"refiner": "conf"}}, "cannot be built"),
        (lambda w: {"params": {"arch": "x"}}, "name no lss_version"),
        (lambda w: {"params": PARAMS | {"pretrain": True}}, "first stage"),
        (lambda w: {"stage": "pretrain"}, "first stage"),
        (lambda w: {"weights": {n: v * float("nan") if v.is_floating_point() else v
                                for n, v in w.items()}}, "NaN"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_no_good(weights, tmp_path, change, said):
    given = {"weights": weights} | change(weights)
    path = write(tmp_path / "best.ckpt", given.pop("weights"), given.pop("params", PARAMS), **given)
    text = message(ValueError, load_checkpoint, path)
    assert said in text and str(path) in text


def test_files_that_are_none_and_folders_without_samples(weights, folder, tmp_path, capsys):
    other = tmp_path / "other.ckpt"
    torch.save({"x": torch.zeros(1)}, other)
    assert main([str(other), folder]) == 1 and "not a checkpoint" in capsys.readouterr().err
    kept = write(tmp_path / "best.ckpt", weights)
    assert main([str(kept), str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    model, params = load_checkpoint(kept)
    assert "limit=-1" in message(ValueError, next, predict(model, params, folder, limit=-1))
    mini = params | {"split": "mini"}
    text = message((ValueError, OSError), next, predict(model, mini, folder, "test"))
    assert "mini" in text or "no samples" in text
