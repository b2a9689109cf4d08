"""A beam checkpoint is rebuilt from itself, or refused in one line; folders are answered."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import set_one
from leansense.beam.data import dataset, loaders
from leansense.beam.model import build
from leansense.beam.rebuild import RebuildTask
from leansense.beam.use import (
    find_temperature,
    find_windows,
    load_checkpoint,
    main,
    predict,
    read_window,
)
from leansense.core.schedule import Recipe

TINY = {"width": 8, "size": 32, "anchors": 2, "n_layer": 1, "image_depth": 18}
PARAMS = TINY | {"arch": "mambafusion", "FFM": "bimamba", "standin": 2, "seq_len": 5}


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    return build(**TINY, FFM="bimamba").state_dict()


@pytest.fixture(scope="module")
def data():
    return dataset({"data": "standin", "standin": 2})


def write(path: Path, weights: dict, params: object = PARAMS, prefix: str = "model.") -> Path:
    config = json.dumps({"config": {"params": params}, "seed": 0})
    named = {prefix + name: value for name, value in weights.items()}
    torch.save({"leansense": {"config": config}, "state_dict": named}, path)
    return path


FAULTS = {
    "a key is missing": (lambda w: {"weights": dict(list(w.items())[1:])}, "of another model"),
    "one too many": (lambda w: {"weights": w | {"x": torch.zeros(1)}}, "of another model"),
    "NaN": (lambda w: {"weights": set_one(w, math.nan)}, "hold NaN"),
    "infinity": (lambda w: {"weights": set_one(w, math.inf)}, "hold Inf"),
    "another exchange": (lambda w: {"params": PARAMS | {"FFM": "mamba"}}, "of another model"),
    "another width": (lambda w: {"params": PARAMS | {"width": 16}}, "of another model"),
    "unknown arch": (lambda w: {"params": PARAMS | {"arch": "mambafuson"}}, "cannot be built"),
    "no parameters": (lambda w: {"params": 7}, "says nothing of its network"),
    "no arch": (lambda w: {"params": TINY}, "name no arch"),
    "a rebuilding of nothing": (lambda w: {"prefix": "rebuild."}, "what is rebuilt"),
    "half a rebuilding": (
        lambda w: {"prefix": "base.", "params": PARAMS | {"source": "lidar", "target": "image"}},
        "of another model",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_that_is_no_good_is_one_line(tmp_path, weights, data, capsys, name):
    change, said = FAULTS[name]
    path = write(tmp_path / "best.ckpt", **({"weights": weights} | change(weights)))
    assert main([str(path), data.folder, "--out", str(tmp_path / "out"), "--limit", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "best.ckpt" in error, error
    assert not (tmp_path / "out").exists()


def test_a_rebuilding_answers_without_its_target(tmp_path, data):
    """The file of a rebuilding gives the task's own logits, whatever the target shows."""
    torch.manual_seed(0)
    task = RebuildTask(build(**TINY, FFM="bimamba"), Recipe(), "lidar radar", "image").eval()
    params = PARAMS | {"source": "lidar radar", "target": "image", "faithful": False}
    path = write(tmp_path / "best.ckpt", task.state_dict(), params, prefix="")
    again, said = load_checkpoint(path)
    window = read_window(find_windows(data.folder, said, "test")[0], said)
    other = window | {"image": 255 - window["image"]}
    with torch.no_grad():
        assert torch.equal(again(window), task(window))
        assert torch.equal(again(other), again(window))
    given = [str(path), data.folder, "--out", str(tmp_path / "out"), "--limit", "1"]
    assert main(given) == 0 and len(list((tmp_path / "out").glob("*.json"))) == 1


def test_no_checkpoint_at_all(tmp_path, data, capsys):
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, said in {
        "no.ckpt": "no such file",
        "text.ckpt": "cannot be read",
        "foreign.ckpt": "not a checkpoint of this project",
    }.items():
        assert main([str(tmp_path / name), data.folder]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and name in error, error


def test_a_data_set_is_answered(tmp_path, weights, data):
    path, out = write(tmp_path / "best.ckpt", weights), tmp_path / "out"
    given = [str(path), data.folder, "--out", str(out), "--limit", "2", "--top", "5"]
    assert main([*given, "--split", "test"]) == 0
    made = sorted(out.glob("*.json"))
    assert len(made) == 2 and all(file.with_suffix(".png").exists() for file in made)
    for file in made:
        answer = json.loads(file.read_text())
        sure = [beam["confidence"] for beam in answer["beams"]]
        assert len(sure) == 5 and sure == sorted(sure, reverse=True) and sum(sure) <= 1
        assert (
            all(1 <= beam["beam"] <= 64 for beam in answer["beams"]) and 1 <= answer["true"] <= 64
        )
        assert not answer["calibrated"] and answer["absent"] == dict(image=0, lidar=0, radar=0)


def test_windows_are_those_of_training(data):
    """The same tensors as the loader's, bit for bit, so a checkpoint answers as it was scored."""
    batch = loaders(data, PARAMS | {"batch_size": 4})["test"].dataset.batch([0])
    mine = read_window(find_windows(data.folder, PARAMS, "test")[0], PARAMS)
    for name in ("image", "lidar", "radar", "gps", "present", "beam", "target", "scenario"):
        assert torch.equal(mine[name], batch[name]), name


def bare(data, tmp_path: Path) -> Path:
    """The frames of one scenario without table or labels."""
    folder = tmp_path / "scenario32"
    shutil.copytree(Path(data.folder) / "Multi_Modal" / "scenario32", folder)
    shutil.rmtree(folder / "unit1" / "mmWave_data")
    return folder


def test_a_bare_folder_is_answered_and_may_lack_a_sensor(tmp_path, weights, data, capsys):
    folder, path = bare(data, tmp_path), write(tmp_path / "best.ckpt", weights)
    newest = find_windows(folder, PARAMS)[0]
    numbers = [int(Path(name).stem.split("_")[-1]) for name in newest.lidar]
    assert numbers == sorted(numbers) and newest.beams == () and newest.scenario == 32
    shutil.rmtree(folder / "unit1" / "radar_data")
    Path(newest.image[0]).unlink()
    out = tmp_path / "out"
    assert main([str(path), str(folder), "--out", str(out)]) == 0, capsys.readouterr().err
    (answer,) = (json.loads(file.read_text()) for file in out.glob("*.json"))
    assert answer["absent"] == {"image": 1, "lidar": 0, "radar": 5} and "true" not in answer


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda f: shutil.rmtree(f / "unit2"), "two positions"),
        (lambda f: (f / "unit1" / "GPS_data" / "gps_location.txt").unlink(), "gps_location.txt"),
        (lambda f: [shutil.rmtree(p) for p in (f / "unit1").glob("*_data*") if "GPS" not in p.name],
         "0 frames in"),
        (lambda f: f.rename(f.with_name("street")), "no such folder"),
        (lambda f: np.save(next((f / "unit1/radar_data").glob("*")), np.zeros((4, 8))), "radar"),
    ],
)  # fmt: skip
def test_missing_and_broken_frames_are_one_line(tmp_path, weights, data, capsys, harm, said):
    folder, path = bare(data, tmp_path), write(tmp_path / "best.ckpt", weights)
    for file in (folder / "unit1" / "radar_data").glob("*"):
        newest = max(
            (folder / "unit1" / "radar_data").glob("*"), key=lambda p: int(p.stem.split("_")[-1])
        )
        if file != newest:
            file.unlink()
    harm(folder)
    assert main([str(path), str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "out").exists()


def test_a_frame_that_the_table_names_is_missing(tmp_path, weights, data, capsys):
    folder, path = tmp_path / "data", write(tmp_path / "best.ckpt", weights)
    shutil.copytree(data.folder, folder)
    gone = Path(find_windows(folder, PARAMS, "test")[0].image[2])
    gone.unlink()
    given = [
        str(path),
        str(folder),
        "--split",
        "test",
        "--limit",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and gone.name in error
    assert main([*given, "--absent"]) == 0
    (answer,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json"))
    assert answer["absent"]["image"] == 1


@pytest.mark.parametrize(
    "more, said",
    [
        (["--limit", "-1"], "limit=-1"),
        (["--top", "0"], "top=0"),
        (["--top", "65"], "top=65"),
    ],
)
def test_numbers_out_of_range(tmp_path, weights, data, capsys, more, said):
    path = write(tmp_path / "best.ckpt", weights)
    assert main([str(path), data.folder, "--out", str(tmp_path / "out"), *more]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_which_scenario(tmp_path, data, capsys):
    folder = bare(data, tmp_path)
    other = folder.rename(tmp_path / "street")
    with pytest.raises(ValueError, match="which scenario is it"):
        find_windows(other, PARAMS)
    assert find_windows(other, PARAMS, scenario=32)[0].scenario == 32
    with pytest.raises(ValueError, match="has no part 'test'"):
        find_windows(other, PARAMS, "test", scenario=32)


def test_temperature_is_that_of_the_draw():
    draw = torch.Generator().manual_seed(1)
    truth = 2 * torch.randn(4000, 64, generator=draw)
    beams = torch.multinomial(truth.softmax(1), 1, generator=draw)[:, 0]
    for factor in (0.5, 1.0, 4.0):
        assert find_temperature(factor * truth, beams) == pytest.approx(factor, rel=0.12)


def test_calibration_changes_confidence_and_not_order(tmp_path, weights, data):
    path = write(tmp_path / "best.ckpt", weights)
    answers = []
    for k, more in enumerate(([], ["--calibrate", data.folder])):
        out = tmp_path / f"out{k}"
        given = [str(path), data.folder, "--split", "test", "--limit", "1", "--out", str(out)]
        assert main([*given, *more]) == 0
        answers += [json.loads(file.read_text()) for file in out.glob("*.json")]
    plain, fitted = answers
    assert [b["beam"] for b in plain["beams"]] == [b["beam"] for b in fitted["beams"]]
    assert fitted["calibrated"] and not plain["calibrated"]
    assert fitted["beams"][0]["confidence"] != plain["beams"][0]["confidence"]


def test_several_beams_ahead(data):
    """A network of five steps gives five lists of beams."""
    torch.manual_seed(0)
    model = build(**TINY, pred_len=5).eval()
    windows = find_windows(data.folder, PARAMS, "test")[:1]
    ((answer, _, _, chances),) = predict(model, PARAMS, windows)
    assert len(answer["beams"]) == 5 and all(len(step) == 3 for step in answer["beams"])
    assert chances.shape == (5, 64)


def test_a_network_that_answers_nan(data):
    model = build(**TINY).eval()
    torch.nn.init.constant_(list(model.parameters())[-1], math.nan)
    with pytest.raises(ValueError, match="answers with NaN"):
        next(predict(model, PARAMS, find_windows(data.folder, PARAMS, "test")[:1]))


def test_loading_gives_the_same_answers(tmp_path, weights, data):
    model, params = load_checkpoint(write(tmp_path / "best.ckpt", weights))
    assert not model.training and params["FFM"] == "bimamba"
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
