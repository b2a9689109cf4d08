"""The rows of beam: printed invocations, checkpoints that others start from, bad input."""

import json
import re
import shlex

import matplotlib
import pytest
import yaml

from conftest import ROOT
from leansense.beam import data as beam
from leansense.beam import positions
from leansense.core.parameters import OWNED, find_faults, read_parameters
from leansense.core.rows import data_values, fingerprint, read_rows

TINY = {
    "standin": 3,
    "size": 16,
    "width": 4,
    "anchors": 1,
    "n_layer": 1,
    "epochs": 1,
    "batch_size": 24,
    "device": "cpu",
    "progress": False,
}
ROW, REBUILD, POSITIONS = (
    f"nbs/beam/{name}.ipynb" for name in ("80_row", "82_rebuild", "86_positions")
)


def cells(notebook: str) -> list[str]:
    """The code of a notebook, cell by cell."""
    content = json.loads((ROOT / notebook).read_text())
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]


def execute(notebook: str, **values) -> dict:
    """What a notebook leaves behind when it is run in this process with these parameters."""
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    first, *rest = cells(notebook)
    known = read_parameters(notebook)
    found = {"__name__": "__main__"}
    exec(first, found)
    found |= {name: value for name, value in values.items() if name in known}
    for number, cell in enumerate(rest):
        exec(compile(cell, f"{notebook}, code cell {number + 1}", "exec"), found)
        plt.close("all")
    return found


def invocations(notebook: str) -> list[dict]:
    """The parameters of each command line that a notebook prints."""
    content = json.loads((ROOT / notebook).read_text())
    text = "\n".join("".join(c["source"]) for c in content["cells"] if c["cell_type"] == "markdown")
    found = []
    for line in re.findall(r"^papermill .+$", text, re.M):
        _, given, _, *words = shlex.split(line)
        assert given == notebook and words[::3] == ["-p"] * (len(words) // 3), line
        floats = re.compile(r"[+-]?\d+e[+-]?\d+")  # numbers to papermill, text to YAML
        found.append(
            {
                name: float(value) if floats.fullmatch(value) else yaml.safe_load(value)
                for name, value in zip(words[1::3], words[2::3])
            }
        )
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A training by the printed name of its folder, on next to nothing."""
    folder = tmp_path_factory.mktemp("beam") / "experiments/base"
    found = execute(ROW, **TINY, logdir=str(folder), signal=True, panels=2, Test=1, hidden=True)
    return folder, found


def test_training_leaves_the_published_files_and_a_record(base):
    folder, found = base
    names = {path.name for path in folder.iterdir()}
    assert {"best_model.pth", "final_model.pth", "published", "beam_pred.csv"} <= names
    lines = (folder / "beam_pred.csv").read_text().splitlines()
    assert lines[0] == "index,top-1 beam,top-2 beam,top-3 beam" and len(lines) > 4
    assert all(1 <= int(b) <= 64 for line in lines[1:] for b in line.split(",")[1:])
    record, metrics = found["record"], found["record"]["metrics"]
    assert record["params"].keys() == read_parameters(ROW).keys() - OWNED
    for part in ("valid", "test"):
        assert {
            f"{part}_{key}" for key in ("dba", "top1", "top2", "top3", "dba_31", "dba_34")
        } <= metrics.keys()
    assert sum(map(sum, metrics["test_confusion"])) == record["data"]["test"]
    assert len(metrics["panels"]) == 2 and len(metrics["panels"][0]["top"]) == 5
    assert metrics["finite"] is True and len(metrics["signal"]) == 4
    assert {
        f"without_{name}_dba" for name in ("image", "lidar", "radar", "lidar_radar")
    } <= metrics.keys()
    assert all(metrics["heard"][name] > 0 for name in ("image", "lidar", "radar", "gps"))
    assert len(metrics["history"]["valid_dba"]) == 1 and str(ROOT) not in json.dumps(record)


def test_the_published_exchange_hears_nothing(tmp_path):
    found = execute(
        ROW, **TINY | {"n_layer": 8}, faithful=True, signal=True, folder=str(tmp_path / "f")
    )
    metrics = found["record"]["metrics"]
    assert metrics["heard"]["gps"] == 0 and metrics["heard"]["image"] > 0
    assert max(row["gradient"] for row in metrics["signal"]) == 0
    assert min(row["std"] for row in metrics["signal"]) == 0


def test_evaluation_of_a_checkpoint_without_a_sensor(base, tmp_path):
    """Val=1 gives the scores of the training, and under a missing sensor those of `hidden`."""
    folder, found = base
    here = {"Val": 1, "load_model_path": str(folder / "best_model.pth")}
    whole = execute(ROW, **TINY, **here, folder=str(tmp_path / "a"))["record"]["metrics"]
    assert whole["test_dba"] == found["measured"]["test_dba"] and "history" not in whole
    less = execute(ROW, **TINY, **here, modality_missing="image", folder=str(tmp_path / "b"))
    assert less["record"]["metrics"]["test_dba"] == found["without"]["without_image_dba"]
    assert less["record"]["metrics"]["heard"]["image"] == 0


def test_rebuilding_starts_from_a_row(base, tmp_path):
    folder, found = base
    given = {
        "pretrain_weight": str(folder / "best_model.pth"),
        "source": "image",
        "target": "lidar radar",
    }
    metrics = execute(REBUILD, **TINY, **given, folder=str(tmp_path / "r"))["record"]["metrics"]
    assert metrics["test_base_dba"] == found["measured"]["test_dba"]
    assert metrics["test_filled_zero_dba"] == found["without"]["without_lidar_radar_dba"]
    for name in ("filled_rand", "rebuilt", "full"):
        assert 0 <= metrics[f"test_{name}_dba"] <= 1 and f"test_{name}_top3" in metrics
    assert {f"train_{name}" for name in ("trans", "contrast", "distance", "fusion")} <= metrics[
        "history"
    ].keys()
    kept = execute(
        REBUILD,
        **TINY,
        **given,
        Val=1,
        load_model_dir=str(tmp_path / "r"),
        folder=str(tmp_path / "v"),
    )
    assert kept["record"]["metrics"]["test_rebuilt_dba"] == metrics["test_rebuilt_dba"]


def test_a_loss_that_is_not_finite_is_an_error_or_a_record(tmp_path, monkeypatch):
    from leansense.beam.task import BeamTask

    plain = BeamTask.loss_of
    monkeypatch.setattr(
        BeamTask, "loss_of", lambda self, *given: plain(self, *given) * float("nan")
    )
    with pytest.raises(RuntimeError, match="loss is nan at step 0"):
        execute(ROW, **TINY, folder=str(tmp_path / "stop"))
    metrics = execute(ROW, **TINY, diverge="record", folder=str(tmp_path / "note"))["record"][
        "metrics"
    ]
    assert (
        metrics["finite"] is False and metrics["stopped_epoch"] == 0 and "test_dba" not in metrics
    )


@pytest.mark.parametrize("split", ["sequence", "random"])
def test_positions(tmp_path, split):
    metrics = execute(POSITIONS, epochs=8, split=split, progress=False, folder=str(tmp_path / "p"))[
        "record"
    ]["metrics"]
    assert metrics["nearest_dba"] > 0.5 and metrics["mlp_dba"] > 0.2
    assert {
        f"{who}_top{k}_{s}" for who in ("nearest", "mlp") for k in (1, 3, 5) for s in (1, 2)
    } <= metrics.keys()


@pytest.mark.parametrize("notebook, count", [(ROW, 14), (REBUILD, 26)])
def test_every_printed_invocation_is_sound(notebook, count):
    found = invocations(notebook)
    assert len(found) == count
    for values in found:
        assert not find_faults(values, read_parameters(notebook)), values


@pytest.mark.parametrize("number", [1, 5, 9, 10])
def test_printed_invocations_run(base, tmp_path, number):
    """As printed, but on next to nothing; what is named by an earlier one is there."""
    values = invocations(ROW)[number]
    small = {name: TINY[name] for name in TINY if name not in values} | {"epochs": 1}
    if "load_model_path" in values:
        small["load_model_path"] = str(base[0] / "best_model.pth")
    values |= small | {"logdir": str(tmp_path / values.get("logdir", "log"))}
    found = execute(ROW, **values)
    wanted = {
        1: "log",
        5: "img_lidar-ms_radar-zerolike",
        9: "ablation",
        10: "missing-ms_image-zerolike_val",
    }
    assert found["run"].name == ROW and str(found["run"].params["folder"]).endswith(wanted[number])


@pytest.mark.parametrize("number", [5, 13, 15])
def test_printed_rebuilding_runs(tmp_path, number):
    values = invocations(REBUILD)[number]
    small = TINY | {"base_epochs": 1, "logdir": str(tmp_path / "log")}
    metrics = execute(REBUILD, **values | small)["record"]["metrics"]
    assert metrics["base_history"] and metrics["rebuild_history"]


@pytest.mark.parametrize(
    "notebook, values, message",
    [
        (ROW, {"Val": 1}, "load_model_path"),
        (ROW, {"diverge": "recrod"}, "record"),
        (ROW, {"modality_missing": "lidra"}, "lidar"),
        (REBUILD, {"modality_missing": "radar"}, "is not what target='image' rebuilds"),
        (REBUILD, {"frozen": "encoder"}, "encoders"),
        (POSITIONS, {"split": "sequences"}, "sequence"),
    ],
)
def test_bad_input_is_one_line(tmp_path, notebook, values, message):
    tiny = {} if notebook == POSITIONS else TINY
    with pytest.raises(ValueError, match=message) as raised:
        execute(notebook, **tiny, **values, folder=str(tmp_path / "x"))
    assert "\n" not in str(raised.value)


def test_rows_of_every_scale_are_sound_and_know_their_data():
    counted = {}
    for scale in ("smoke", "demo", "paper"):
        rows = read_rows("beam", scale)
        counted[scale] = {f"{row.table}/{row.name}" for row in rows}
    assert counted["smoke"] == counted["demo"] == counted["paper"] and len(counted["demo"]) > 60
    for row in read_rows("beam", "smoke"):
        if row.table == "positions":
            assert fingerprint(row) == positions.identify(row.params)
        elif data_values(row):
            assert fingerprint(row) == beam.identify(row.params)


def test_arrays_of_positions_are_for_one_table():
    folder = positions.dataset({"data": "standin"}).folder
    assert {row.table for row in read_rows("beam", "demo", folder)} == {"cost", "positions"}
