"""Lidar without its background is written beside the frames, and rows read it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from leansense.beam.data import dataset
from leansense.beam.features import read_points
from leansense.beam.filter import filter_dataset, filter_scenario, main, write_points
from leansense.beam.standin import standin


@pytest.fixture
def copy(tmp_path) -> Path:
    source = Path(standin(tmp_path / "drawn", sequences=3, frames=5, rays=64))
    return Path(shutil.copytree(source, tmp_path / "copy"))


def test_a_filtered_data_set_is_read_by_a_row(copy, capsys):
    assert main([str(copy), "--least", "0"]) == 0
    assert "Multi_Modal/scenario32: 15 frames" in capsys.readouterr().out
    params = {"data": str(copy), "filtered": 1, "seq_len": 2, "damaged": "error"}
    windows = dataset(params)
    paths = {path for sample in windows.samples for path in sample.lidar}
    assert {Path(path).parent.name for path in paths} == {"lidar_data_filtered"}
    whole = {path.replace("lidar_data_filtered/", "lidar_data/") for path in paths}
    left, all_of = (sum(len(read_points(p)) for p in some) for some in (paths, whole))
    assert 0 < left < all_of / 2


def test_what_moves_stays_and_what_stands_goes(tmp_path):
    wall = np.stack([np.full(40, -12.0), np.linspace(-8, 8, 40)], 1)
    unit = tmp_path / "scenario31" / "unit1"
    for frame in range(4):
        car = np.array([[-6.0, frame - 2.0], [-6.0, frame - 1.8]])
        write_points(unit / f"lidar_data/lidar_data_{frame + 9}.ply", np.concatenate([wall, car]))
    write_points(unit / "lidar_data/lidar_data_8.ply", wall)
    assert filter_scenario(unit, least=40) == 5
    for frame in range(4):
        kept = read_points(unit / f"lidar_data_filtered/lidar_data_{frame + 9}.ply")
        assert np.allclose(kept, [[-6.0, frame - 2.0], [-6.0, frame - 1.8]])
    assert len(read_points(unit / "lidar_data_filtered/lidar_data_8.ply")) == 1


def test_bad_folders_are_one_line(copy, tmp_path, capsys):
    for least, folder, said in (
        (-1, tmp_path / "nothing", "no scenario folders"),
        (99999, copy, "its densest frame has"),
        (-1, copy, "its densest frame has"),
    ):
        assert main([str(folder), "--least", str(least)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error
    (copy / "Multi_Modal" / "scenario32" / "unit1" / "lidar_data").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="no .ply files"):
        filter_dataset(copy, least=0)
