"""The rows of openvocab: printed invocations, checkpoints scored, photographs, bad input."""

import json
import re
import shlex

import matplotlib
import pytest
import yaml

from conftest import ROOT, message
from leansense.core.claims import read_claims
from leansense.core.parameters import OWNED, find_faults, read_parameters
from leansense.core.rows import data_values, fingerprint, read_rows
from leansense.openvocab import data

ROW = "nbs/openvocab/80_row.ipynb"
TINY = {
    "standin": 40,
    "image_size": 64,
    "max_phrases": 8,
    "batch_size": 8,
    "epochs": 1,
    "dim": 16,
    "embed": 16,
    "text_dim": 16,
    "vocabulary": 300,
    "device": "cpu",
    "progress": False,
}


def execute(notebook: str, **values) -> dict:
    """What a notebook leaves behind when it is run in this process with these parameters."""
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    content = json.loads((ROOT / notebook).read_text())
    first, *rest = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]
    found = {"__name__": "__main__"}
    exec(first, found)
    found |= values
    for number, cell in enumerate(rest):
        exec(compile(cell, f"{notebook}, code cell {number + 1}", "exec"), found)
        plt.close("all")
    return found


def invocations(notebook: str) -> dict[str, dict]:
    """The parameters of each command line that a notebook prints, by the name of its output."""
    content = json.loads((ROOT / notebook).read_text())
    text = "\n".join("".join(c["source"]) for c in content["cells"] if c["cell_type"] == "markdown")
    found = {}
    for line in re.findall(r"^papermill .+$", text, re.M):
        _, given, made, *words = shlex.split(line)
        assert given == notebook and words[::3] == ["-p"] * (len(words) // 3), line
        floats = re.compile(r"[+-]?\d+e[+-]?\d+")  # numbers to papermill, text to YAML
        found[made.removeprefix("runs/openvocab-").removesuffix(".ipynb")] = {
            name: float(value) if floats.fullmatch(value) else yaml.safe_load(value)
            for name, value in zip(words[1::3], words[2::3])
        }
    return found


@pytest.fixture(scope="module")
def base(own_data_root, tmp_path_factory):
    """The printed `run.py test`, on next to nothing."""
    folder = tmp_path_factory.mktemp("openvocab") / "test"
    given = invocations(ROW)["test"] | {"logdir": str(folder), "panels": 4, "precision": True}
    return folder, execute(ROW, **TINY | given)


def test_a_row_measures_what_the_tables_print(base):
    folder, found = base
    record, metrics = found["record"], found["record"]["metrics"]
    assert record["params"].keys() == read_parameters(ROW).keys() - OWNED
    for name in ("recall1", "recall5", "recall10", "upper"):
        for part in ("valid", "test", "test_merged"):
            assert 0 <= metrics[f"{part}_{name}"] <= 1
    kinds = {"seen", "unseen", "combination", "subword", "word", "people", "vehicles"}
    assert {f"test_recall1_{kind}" for kind in kinds} <= metrics.keys()
    assert {"test_map", "test_map50", "test_map50_phrase", "test_map50_unseen"} <= metrics.keys()
    assert metrics["test_recall1"] <= metrics["test_recall5"] <= metrics["test_upper"]
    assert metrics["test_n_phrases"] > metrics["test_n_phrases_seen"] > 0
    assert (
        sum(metrics[f"test_n_phrases_{kind}"] for kind in ("combination", "subword", "word"))
        == (metrics["test_n_phrases_unseen"])
    )
    assert {"test_n_unreachable", "test_blind_recall1", "valid_recall1"} <= metrics.keys()
    assert 0 < metrics["params_text"] < metrics["params"] == metrics["params_trained"]
    assert len(metrics["panels"]) == 4 and len(metrics["history"]["valid_recall1"]) == 1
    answer = metrics["panels"][0]["answers"][0]
    assert {"phrase", "boxes", "truth", "novelty"} == answer.keys() and len(answer["boxes"]) == 1
    maps = next(panel["attention"] for panel in metrics["panels"] if "attention" in panel)
    assert 3 <= len(maps) <= 4 and len(maps[0]["answer"]) == 8
    assert str(ROOT) not in json.dumps(record) and str(folder) not in json.dumps(metrics)
    assert (folder / "best.ckpt").is_file() and any((folder / "lightning_logs").iterdir())


def test_evaluation_scores_a_checkpoint_as_its_training_did(base, tmp_path):
    folder, found = base
    given = invocations(ROW)["eval"] | {"weights": str(folder / "best.ckpt")}
    again = execute(ROW, **TINY | given, folder=str(tmp_path / "eval"))["record"]["metrics"]
    same = [name for name in found["measured"] if name.startswith("test_")]
    assert {name: again[name] for name in same} == {name: found["measured"][name] for name in same}
    assert "history" not in again


def test_the_cost_of_a_network_beside_another():
    """What the results notebook reads, of a small network; packed attention answers the same."""
    given = {"preset": "demo", "image_size": 64, "against": "packed", "repeats": 1}
    record = execute("nbs/openvocab/84_cost.ipynb", **given)["record"]
    metrics, cost = record["metrics"], record["cost"]
    assert metrics["params_total"] == metrics["params_trained"] + 63_165_952
    assert metrics["gflops"] > 0.01
    for name in (
        "eval_s",
        "eval_fps",
        "eval_mib",
        "train_s",
        "train_fps",
        "train_mib",
        "saved_mib",
    ):
        assert cost[name] > 0 and cost[f"packed_{name}"] > 0
    assert cost["packed_eval_ratio"] > 0 and cost["packed_train_ratio"] > 0
    assert cost["packed_difference"] < 1e-5
    assert record["env"]["device"] and record["params"].keys() == (
        read_parameters("nbs/openvocab/84_cost.ipynb").keys() - OWNED
    )


@pytest.mark.parametrize(
    "values, said",
    [
        ({"amp": "half"}, "amp='half'"),
        ({"against": "befor"}, "nearest is 'before'"),
        ({"preset": "aftr"}, "nearest is 'after'"),
    ],
)
def test_a_cost_that_cannot_be_measured_is_one_line(values, said):
    assert said in message(ValueError, lambda: execute("nbs/openvocab/84_cost.ipynb", **values))


def test_every_printed_invocation_is_sound():
    found = invocations(ROW)
    assert len(found) == 14
    for name, values in found.items():
        assert not find_faults(values, read_parameters(ROW)), name


@pytest.mark.parametrize("name", ["optimized", "baseline", "tuned", "less"])
def test_printed_invocations_run(base, tmp_path, name):
    """As printed, but with a small network, on next to nothing."""
    values = invocations(ROW)[name]
    small = TINY | {"num_workers": 0, "pin_memory": False, "logdir": str(tmp_path / "run")}
    if "preset" in values:
        small |= {"backbone": "resnet10t", "dec_layers": 1, "queries": 4}
    if "weights" in values:
        small["weights"] = str(base[0] / "best.ckpt")
    found = execute(ROW, **values | small)
    kept = found["run"].params
    assert {n: kept[n] for n in values.keys() - small.keys()} == {
        n: v for n, v in values.items() if n not in small
    }
    assert "test_recall1" in found["record"]["metrics"]
    assert (tmp_path / "run" / "lightning_logs").is_dir()


def test_photographs_of_another_layout_after_drawn_ones(own_data_root, tmp_path):
    """COCO's instances, few of them; the network has seen drawn pictures first."""
    from PIL import Image

    root = tmp_path / "photographs"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, boxes = [], []
    for k in range(10):
        Image.new("RGB", (80, 60), (20 * k, 90, 120)).save(root / "train2017" / f"{k}.jpg")
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 80, "height": 60})
        box = {"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [5, 5, 40, 30]}
        boxes.append(box | {"area": 1200, "iscrowd": 0})
    kinds = [{"id": 1, "name": "dog", "supercategory": "animal"}]
    kinds.append({"id": 2, "name": "cup", "supercategory": "kitchen"})
    content = {"images": images, "annotations": boxes, "categories": kinds}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    given = {"data": str(root), "first": 1, "batch_size": 4, "folder": str(tmp_path / "run")}
    found = execute(ROW, **TINY | given)
    metrics = found["record"]["metrics"]
    assert len(metrics["drawn_history"]["train_loss"]) == 1
    assert len(metrics["photographs_history"]["train_loss"]) == 1
    assert metrics["test_n_phrases"] > 0 and 0 <= metrics["test_upper"] <= 1


@pytest.mark.parametrize(
    "values, said",
    [
        ({"evaluate": True}, "name it with weights"),
        ({"monitor": "map"}, "precision=True"),
        ({"preset": "aftre"}, "after"),
        ({"objectness": "focl"}, "focal"),
        ({"limit_val": 1.5}, "limit_val=1.5"),
        ({"data": "nowhere-at-all"}, "nowhere-at-all"),
    ],
)
def test_bad_input_is_one_line(own_data_root, tmp_path, values, said):
    run = {"folder": str(tmp_path / "x")} | values
    assert said in message((ValueError, OSError), lambda: execute(ROW, **TINY | run))


def test_rows_of_every_scale_are_sound_and_know_their_data():
    counted = {}
    for scale in ("smoke", "demo", "paper"):
        rows = read_rows("openvocab", scale)
        counted[scale] = {f"{row.table}/{row.name}" for row in rows}
    assert counted["smoke"] == counted["demo"] == counted["paper"] and len(counted["demo"]) > 35
    assert not [name for name in counted["demo"] if name.startswith("photographs")]
    for row in read_rows("openvocab", "smoke"):
        if data_values(row):
            assert fingerprint(row) == data.identify(row.params)


def test_ablation_changes_one_thing_each():
    rows = {f"{row.table}/{row.name}": row.params for row in read_rows("openvocab", "paper")}
    before = rows["comparison/before"]
    for name, params in rows.items():
        if name.startswith("ablation/"):
            changed = {key for key in before if params[key] != before[key]}
            assert len(changed) == 1 or changed == {"faithful", "head_dropout"}, name


def test_compared_rows_take_equally_many_steps():
    """At demo scale, where a training ends long before it has learned all it can."""
    steps = {}
    for row in read_rows("openvocab", "demo"):
        if "epochs" in row.params:
            training = int(0.6 * row.params["standin"])
            each = training // row.params["batch_size"]
            table = {"ablation": "comparison"}.get(row.table, row.table)
            steps.setdefault(table, set()).add(row.params["epochs"] * each)
    assert steps.keys() == {"text", "comparison"}
    assert all(len(counts) == 1 for counts in steps.values())


def test_photographs_are_for_one_table(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    tables = {row.table for row in read_rows("openvocab", "demo", str(tmp_path))}
    assert tables == {"cost", "photographs"}


def test_claims_can_be_judged():
    claims = read_claims("papers/openvocab/claims.yaml")
    assert len(claims) > 30
    assert len({claim["statement"] for claim in claims}) == len(claims)
