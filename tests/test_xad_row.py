"""The rows of xad: what they leave behind, stages, the guide's commands and snippets, bad input."""

import json
import re
import shlex

import matplotlib
import pytest
import torch
import yaml

from conftest import ROOT
from leansense.core import schedule
from leansense.core.parameters import OWNED, find_faults, read_parameters
from leansense.core.rows import data_values, fingerprint, read_rows
from leansense.layers.conventions import INPUTS
from leansense.xad import data as xad
from leansense.xad.task import decode_map, inputs_of, network_settings

ROW = "nbs/xad/80_row.ipynb"
TINY = {
    "standin": 8,
    "standin_samples": 1,
    "final_h": 32,
    "final_w": 96,
    "xbound": [-48.0, 48.0, 3.0],
    "ybound": [-48.0, 48.0, 3.0],
    "dbound": [4.0, 45.0, 4.1],
    "epochs": 1,
    "bsize": 2,
    "warmup_epochs": 0.5,
    "amp": "off",
    "nworkers": 0,
    "gpuid": -1,
    "progress": False,
}


def cells(kind: str) -> list[str]:
    """The cells of the row notebook that are code or markdown."""
    content = json.loads((ROOT / ROW).read_text())
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


def execute(**values) -> dict:
    """What the row leaves behind when it is run in this process with these parameters."""
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    first, *rest = cells("code")
    found = {"__name__": "__main__"}
    exec(first, found)
    assert values.keys() <= read_parameters(ROW).keys()
    found |= values
    for number, cell in enumerate(rest):
        exec(compile(cell, f"{ROW}, code cell {number + 1}", "exec"), found)
        plt.close("all")
    return found


def blocks(language: str) -> list[str]:
    """The fenced blocks of the row notebook."""
    return re.findall(rf"^```{language}\n(.+?)^```", "\n".join(cells("markdown")), re.M | re.S)


def invocations() -> list[dict]:
    """The parameters of each command line that the row notebook prints."""
    found, floats = [], re.compile(r"[+-]?\d+e[+-]?\d+")  # numbers to papermill, text to YAML
    for line in "".join(blocks("sh")).splitlines():
        program, given, out, *words = shlex.split(line)
        assert (program, given) == ("papermill", ROW) and out.startswith("runs/"), line
        assert words[::3] == ["-p"] * (len(words) // 3), line
        pairs = zip(words[1::3], words[2::3])
        found.append({n: float(v) if floats.fullmatch(v) else yaml.safe_load(v) for n, v in pairs})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A training into a published folder, on next to nothing."""
    folder = tmp_path_factory.mktemp("xad") / "checkpoints_vovnet_transformer"
    return folder, execute(**TINY, logdir=str(folder), panels=2, save_every=1)


def test_a_row_leaves_the_published_files_and_a_record(base):
    folder, found = base
    names = {path.name for path in folder.iterdir()}
    assert {"best_model.pth", "checkpoint_epoch_1.pth", "published", "best.ckpt"} <= names
    record, metrics = found["record"], found["record"]["metrics"]
    assert record["params"].keys() == read_parameters(ROW).keys() - OWNED
    assert str(ROOT) not in json.dumps(record)
    kinds = ("f1", "f1_overall", "f1_micro", "f1_samples", "f1_by_label", "support")
    for part in ("valid", "test"):
        wanted = {"miou", "loss", "bev_loss", "action_loss", "desc_loss"}
        wanted |= {f"{name}_{kind}" for name in ("action", "desc") for kind in kinds}
        assert {f"{part}_{name}" for name in wanted} <= metrics.keys()
    assert len(metrics["test_action_support"]) == 4 and len(metrics["test_desc_support"]) == 8
    assert {"blind_miou", "blind_action_f1", "blind_desc_f1", "num_params"} <= metrics.keys()
    assert len(metrics["history"]["valid_miou"]) == 1 and metrics["steps"] == 2
    assert sum(one["samples"] for one in metrics["by_condition"].values()) == record["data"]["test"]
    first, last = metrics["panels"][0], metrics["panels"][-1]
    assert first["miou"] >= last["miou"] and len(metrics["samples"]) == record["data"]["test"]
    shape = decode_map(first["map"]).shape
    assert tuple(shape) == (32, 32) and len(first["action"]) == 4 and len(first["description"]) == 8


def test_the_same_row_twice_is_the_same_record(base, tmp_path):
    again = execute(**TINY, folder=str(tmp_path / "again"), panels=2, save_every=1)
    one, other = base[1]["record"]["metrics"], again["record"]["metrics"]
    assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_two_stages_in_one_row(tmp_path):
    found = execute(**TINY, pretrain_epochs=1, folder=str(tmp_path / "two"))
    metrics = found["record"]["metrics"]
    assert "train_action_loss" not in metrics["pretrain_history"]
    assert "train_action_loss" in metrics["main_history"] and found["left"] == ["text"]
    assert (tmp_path / "two/best.ckpt").exists()


def test_a_row_starts_from_a_first_stage(tmp_path):
    """The first stage has scenes of its own without labels; the next row begins with its map."""
    stage = {"pretrain": True, "split": "pretrain_clean", "logdir": str(tmp_path / "pre")}
    first = execute(**TINY, **stage)
    assert "action" not in first["first"] and "test_miou" in first["record"]["metrics"]
    assert "test_action_f1" not in first["record"]["metrics"]
    for name in ("best_pretrained.pth", "best.ckpt"):
        path = str(tmp_path / "pre" / name)
        second = execute(**TINY, pretrained_path=path, folder=str(tmp_path / name))
        assert second["left"] == ["text"] and "test_action_f1" in second["record"]["metrics"]
        assert name in second["record"]["params"]["pretrained_path"]


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "test_efficientnet", "lss_version": "joint", "refiner": "resnet18",
         "text_head": "bev_txt"},
        {"text_head": "unified_v3", "loss": "head", "lss_version": "v1", "monitor": "action_f1"},
        {"refiner": "none", "text_head": "onlybev", "augment": "published", "ema": 0.9,
         "accumulate": 2, "checkpointing": True, "detect_anomaly": True, "cudnn_benchmark": True,
         "schedule": "onecycle", "optimizer": "adam"},
        {"cams": ["front", "front_left"], "bev_detach": 1, "faithful": True, "amp": "bf16"},
    ],
    ids=["baseline", "unified", "options", "cameras"],
)  # fmt: skip
def test_choices_run(tmp_path, values):
    found = execute(**TINY | values, folder=str(tmp_path / "x"))
    assert 0 <= found["record"]["metrics"]["test_miou"] <= 1
    assert not found["torch"].backends.cudnn.benchmark


# --- the guide's commands and snippets ---

FLAGS = {  # of the guide and of the published scripts: parameters by the same name
    "bsize", "lr", "epochs", "version", "gpuid", "nworkers", "weight_decay", "lss_version",
    "vovnet_type", "logdir", "save_suffix", "run_name", "pretrained_path", "data", "ncams", "cams",
    "resize_lim", "rot_lim", "bot_pct_lim", "rand_flip", "xbound", "ybound", "zbound", "dbound",
    "final_h", "final_w", "H", "W", "pin_memory", "weights", "pretrained", "amp", "clip", "devices",
    "sync_batchnorm", "schedule", "checkpointing", "accumulate", "seed", "cudnn_benchmark",
    "detect_anomaly", "val_every", "save_every", "resume", "backbone_factor", "warmup_epochs",
}  # fmt: skip


def test_every_flag_is_a_parameter():
    assert FLAGS <= read_parameters(ROW).keys()
    text = "\n".join(cells("markdown"))
    for name in ("nepochs", "batch_size", "num_workers", "wdecay", "save_dir", "checkpoint"):
        assert f"`--{name}` is" in text
    assert "--no_pretrained" in text and "--seg_classes" in text and "--version V3" in text


def test_every_printed_command_is_sound():
    found = invocations()
    assert len(found) == 24
    for values in found:
        assert not find_faults(values, read_parameters(ROW)), values
        settings = network_settings(
            {n: p.default for n, p in read_parameters(ROW).items()} | values
        )
        assert settings["backbone"]


SMALLER = {"epochs", "nworkers", "bsize", "pretrain_epochs", "warmup_epochs", "standin_samples"}


@pytest.mark.parametrize("number", [1, 2, 11, 15, 18, 21, 23])
def test_printed_commands_run(base, tmp_path, monkeypatch, number):
    """As printed, but on next to nothing: fewer epochs, small pictures, what is named is there."""
    values = invocations()[number]
    folder = tmp_path / values.get("logdir", "log")
    small = {name: x for name, x in TINY.items() if name not in values or name in SMALLER}
    if values.get("backbone") == "effb4":
        small["backbone"] = "test_efficientnet"
    if values.get("vovnet_type", 39) > 39:
        small["vovnet_type"] = 39
    if "final_h" in values:
        small |= {"final_h": 56, "final_w": 110}
    if "pretrain_epochs" in values:
        small["pretrain_epochs"] = 1
    if "data" in values:
        small["data"] = str(xad.dataset(TINY | {"data": "standin"}).folder)
    if "pretrained_path" in values:
        small["pretrained_path"] = str(base[0] / "best_model.pth")
    found = execute(**values | small | {"logdir": str(folder)})
    suffix = f"_{values['save_suffix']}" if "save_suffix" in values else ""
    assert str(found["run"].folder) == f"{folder}{suffix}"
    made = "best_pretrained.pth" if values.get("pretrain") else f"best_model{suffix}.pth"
    assert (found["run"].folder / made).exists()


def test_going_on(tmp_path):
    """The command that goes on, in a folder of its own: an epoch more would be refused."""
    printed = [values for values in invocations() if "resume" in values][0]
    small = {n: x for n, x in TINY.items() if n not in printed or n in SMALLER} | {"epochs": 3}
    whole = execute(**printed | small | {"logdir": str(tmp_path / "a"), "resume": ""})
    kept = tmp_path / "a" / "last.ckpt"
    more = execute(**printed | small | {"logdir": str(tmp_path / "b"), "resume": str(kept)})
    assert more["history"] == whole["history"]
    assert more["record"]["metrics"]["test_miou"] == whole["record"]["metrics"]["test_miou"]


def test_the_guides_snippets_run_as_printed(base, tmp_path, monkeypatch):
    """Resuming by hand, and inference by the guide's factory, beside the folder that they name."""
    resume, infer = blocks("python")
    monkeypatch.chdir(base[0].parent)
    task = base[1]["task"]
    model = base[1]["build"](**base[1]["settings"])
    groups = schedule.param_groups(task, task.groups(), lr=task.recipe.lr, weight_decay=1e-4)
    optimizer = schedule.optimizer(groups, task.recipe)
    known = {"torch": torch, "model": model, "optimizer": optimizer}
    known["scheduler"] = schedule.scheduler(optimizer, task.recipe, 1, 2)
    exec(resume, known)
    assert known["start_epoch"] == 0
    for name, value in task.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    batch = base[1]["first"]
    settings = base[1]["settings"]
    given = dict(zip(INPUTS, inputs_of(batch)))
    given |= {"grid_conf": settings["grid_conf"]}
    given["data_aug_conf"] = {"final_dim": (32, 96), "cams": settings["cams"]}
    exec(infer, given)
    assert given["bev_seg"].shape[1] == 4 and given["action"].shape[1] == 4
    assert given["desc"].shape == (len(batch["id"]), 8)


# --- bad input, rows ---


@pytest.mark.parametrize(
    "values, message",
    [
        ({"version": "V3"}, "text_head=unified_v3"),
        ({"vovnet_type": 98}, "99"),
        ({"lss_version": "v3"}, "v2"),
        ({"pretrain": True, "pretrain_epochs": 2}, "leave out pretrain_epochs"),
        ({"loss": "heads"}, "head"),
        ({"split": "nua2d"}, "nu_a2d"),
        ({"val_every": 0}, "val_every=0"),
        ({"warmup_epochs": 5.0}, "leaves nothing"),
        ({"monitor": "mioux"}, "not measured"),
        ({"backbone_factor": -1.0}, "factor"),
    ],
)
def test_bad_input_is_one_line(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as raised:
        execute(**TINY | values, folder=str(tmp_path / "x"))
    assert "\n" not in str(raised.value)


def test_rows_of_every_scale_are_sound_and_know_their_data():
    counted = {}
    for scale in ("smoke", "demo", "paper"):
        counted[scale] = {f"{row.table}/{row.name}" for row in read_rows("xad", scale)}
    assert counted["smoke"] == counted["demo"] == counted["paper"] and len(counted["demo"]) > 40
    for row in read_rows("xad", "smoke"):
        if data_values(row):
            assert fingerprint(row) == xad.identify(row.params)


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_rows_that_are_compared_take_equally_many_steps(scale):
    """Within a table: samples, batch, epochs of both stages; what `scenes` compares is its own."""
    for table in ("ablation", "heads", "stages"):
        rows = [row.params for row in read_rows("xad", scale) if row.table == table]
        names = ("standin", "standin_samples", "bsize", "accumulate", "split")
        same = {tuple(row[name] for name in names) for row in rows}
        epochs = {row["epochs"] + row["pretrain_epochs"] for row in rows}
        assert len(same) == 1 and len(epochs) == 1, table


def test_the_ablation_changes_one_thing_at_a_time():
    rows = {row.name: row.params for row in read_rows("xad", "paper") if row.table == "ablation"}

    def differ(one: str, other: str) -> set:
        a, b = rows[one], rows[other]
        return {name for name in a if a[name] != b[name]} - {"panels"}

    assert differ("baseline", "baseline_ours") == {"lss_version", "refiner", "text_head"}
    assert differ("baseline_ours", "vovnet") == {"backbone"}
    assert differ("vovnet", "v2") == {"lss_version"} and differ("v2", "full") == {"refiner"}
