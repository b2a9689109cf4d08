"""Beams from the position alone: arrays, splits, neighbours, network, faults."""

import numpy as np
import pytest

from conftest import message
from leansense.beam.positions import (
    build_mlp,
    check,
    dataset,
    find_scenarios,
    identify,
    load,
    loaders,
    make_features,
    make_split,
    rank_neighbours,
    rank_with,
    score_ranked,
)
from leansense.beam.standin import standin_arrays
from leansense.beam.task import BeamTask, recipe
from leansense.core.train import fit

pytestmark = pytest.mark.usefixtures("own_data_root")


@pytest.fixture
def folder(tmp_path):
    return standin_arrays(tmp_path, n=240, frames=20)


def test_arrays(folder):
    data = load(folder)
    n = len(data.beam)
    assert data.power.shape == (n, 64) and data.car.shape == data.base.shape == (n, 2)
    assert (data.beam == data.power.argmax(1)).all() and set(data.scenario) == {1, 2}
    assert set(load(folder, [2]).scenario) == {2}
    assert "has no scenario 7" in message(ValueError, load, folder, [7])
    assert len(set(zip(data.scenario, data.sequence))) == 24
    assert load(folder, [1]).fingerprint != data.fingerprint == load(folder).fingerprint


def test_calibrated_positions_are_not_mistaken(folder):
    """`unit2_loc_cal` lies beside `unit2_loc` in some scenarios."""
    first = load(folder)
    path = next(folder.glob("scenario1_unit2_loc_1-*.npy"))
    np.save(folder / path.name.replace("loc_1", "loc_cal_1"), np.zeros((3, 2)))
    assert (load(folder).car == first.car).all()


def test_faults(folder, tmp_path):
    assert "holds no scenario*.npy" in message(FileNotFoundError, load, tmp_path)
    power = next(folder.glob("scenario1_unit1_pwr*.npy"))
    values = np.load(power)
    np.save(power, values[:, :32])
    assert f"{power}: has shape" in message(ValueError, load, folder)
    values[4, 9] = np.nan
    np.save(power, values)
    assert "row 4 is not finite" in message(ValueError, load, folder)
    assert "row 4 is not finite" in str(check(folder)) and not check(folder).ok
    power.write_bytes(b"no")
    assert "is not a numpy array" in message(ValueError, load, folder)
    power.unlink()
    assert "has no scenario1_unit1_pwr_60ghz" in message(ValueError, find_scenarios, folder)


def test_pickled_arrays_are_refused(folder):
    path = next(folder.glob("scenario1_seq_index*.npy"))
    np.save(path, np.array([{}] * 5, dtype=object))
    assert "holds Python objects" in message(ValueError, load, folder)


def test_splits(folder):
    data = load(folder)
    made = make_split(data)
    for scenario in (1, 2):
        rows = data.scenario == scenario
        of = {}
        for drive, part in zip(data.sequence[rows], made.split[rows]):
            assert of.setdefault(drive, part) == part, "a pass is in one part"
        counts = [list(of.values()).count(p) for p in ("train", "valid", "test")]
        assert counts == [8, 2, 2]
    assert (make_split(data).split == made.split).all()
    assert (make_split(data, fold=1).split != made.split).any()
    random = make_split(data, "random")
    drives = {p: set(data.sequence[random.split == p]) for p in ("train", "test")}
    assert drives["test"] <= drives["train"] and random.counts()["test"] == round(
        0.2 * (data.scenario == 1).sum()
    ) + round(0.2 * (data.scenario == 2).sum())
    assert "nearest is 'random'" in message(ValueError, make_split, data, "rndom")


def test_one_long_pass_is_cut(folder):
    for path in folder.glob("scenario1_seq_index*.npy"):
        np.save(path, np.ones_like(np.load(path)))
    data = make_split(load(folder, [1]))
    assert all(data.counts().values())
    changes = (data.split[1:] != data.split[:-1]).sum()
    assert changes <= 9, "stretches, not single rows"


def test_features(folder):
    data = make_split(load(folder))
    metres, scaled = make_features(data), make_features(data, "degrees")
    true = (data.car - data.base) * 111_000 / 50
    true[:, 1] *= np.cos(np.radians(data.base[:, 0]))
    assert metres[:, ::-1] == pytest.approx(true, abs=0.03)
    train = data.part("train")
    assert scaled[train].min() == 0 and scaled[train].max() == 1
    assert "features='metre'" in message(ValueError, make_features, data, "metre")


def test_neighbours(folder):
    data = make_split(load(folder))
    test = data.part("test")
    ranked = rank_neighbours(data, k=1)
    features = make_features(data)
    for row, answer in zip(test[:20], ranked):
        known = np.flatnonzero((data.split == "train") & (data.scenario == data.scenario[row]))
        near = known[np.linalg.norm(features[known] - features[row], axis=1).argmin()]
        assert (answer == np.argsort(-data.power[near], kind="stable")[:5]).all()
    found = score_ranked(ranked, data.beam[test])
    assert found["top1"] <= found["top3"] <= found["top5"] and found["dba"] > 0.5
    exact = np.stack([data.beam[test]] * 5, 1)
    assert score_ranked(exact, data.beam[test])["dba"] == 1


def test_network_learns(tmp_path):
    params = {"split": "sequence", "batch_size": 32, "seed": 0}
    data = dataset(params)
    assert identify(params) == data.fingerprint != identify(params | {"split": "random"})
    parts = loaders(data, params)
    task = BeamTask(build_mlp([1, 2]), recipe(10, 1e-2, "onecycle"), "ce", scenarios=(1, 2))
    result = fit(task, parts["train"], parts["valid"], epochs=10, folder=tmp_path, seed=0,
                 monitor="valid_dba", mode="max", resume="", progress=False)  # fmt: skip
    assert result.best_score > 0.55 > result.history["valid_dba"][0]
    ranked = rank_with(task.model, parts["test"])
    assert ranked.shape == (len(data.part("test")), 5)
    assert score_ranked(ranked, data.beam[data.part("test")])["dba"] > 0.5
