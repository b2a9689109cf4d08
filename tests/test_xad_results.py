"""The XAD paper: its cells are what the records say, gaps are dashes, orders need every seed."""

import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT, code_cells
from leansense.core.claims import read_claims
from leansense.core.tables import escape

NOTEBOOK = "nbs/xad/90_results.ipynb"
CELLS = code_cells(NOTEBOOK)
SOURCE = "\n".join(CELLS)
PAPER = (ROOT / "papers/xad/main.tex").read_text()
SMOKE = "runs/smoke/papers/xad"
KINDS = {"action": 4, "desc": 8}


def house(folder):
    """A repository's top folder that holds this system's sources and no records."""
    for name in ("nbs", "lib", "settings.ini"):
        os.symlink(ROOT / name, folder / name)
    (folder / "papers/xad").mkdir(parents=True)
    for name in ("rows.yaml", "claims.yaml"):
        os.symlink(ROOT / "papers/xad" / name, folder / "papers/xad" / name)
    return folder


def execute(patch: pytest.MonkeyPatch, folder) -> dict:
    """Run the notebook's cells in `folder`, with a small network for the drawing."""
    import matplotlib.pyplot as plt

    from leansense.xad.model import DEMO, build

    patch.setenv("LEANSENSE_ROOT", str(folder))
    patch.setenv("LEANSENSE_DATA", str(folder / "data"))
    patch.setattr(plt, "show", lambda: plt.close("all"))
    space = {"display": lambda *_: None}
    for source in CELLS:
        source = source.replace('scale: str = "demo"', 'scale: str = "smoke"')
        source = source.replace("from IPython.display import display\n", "")
        exec(source, space)
        if "import build" in source:
            space["build"] = lambda: build(backbone="vov39", **DEMO | {"width": 0.0625})
    return space


def write_record(row, metrics: dict, cost: dict, data: dict) -> None:
    """A sound record of a row with these numbers."""
    block = {"schema": 2, "system": "xad", "table": row.table, "row": row.name, "seed": row.seed}
    block |= {"scale": "smoke", "set": "smoke", "code": {}, "params": row.params, "cost": cost}
    block |= {"metrics": metrics, "data": data, "env": {"device": "a test", "threads": 1}}
    row.record.parent.mkdir(parents=True, exist_ok=True)
    row.record.write_text(json.dumps(block))


def scored(k: int) -> dict:
    """Metrics of a trained row, all different, told by `k`."""
    found = {
        "num_params": 1000 + k,
        "steps": 6,
        "history": {"valid_miou": [k / 100, 0.1 + k / 100]},
    }
    found |= {"test_miou": 0.30 + k / 100, "blind_miou": 0.2, "by_condition": {}}
    for name in ("vehicle", "drivable", "divider"):
        found |= {f"test_iou_{name}": 0.1 + k / 50}
    for kind, labels in KINDS.items():
        for n, meaning in enumerate(("f1", "f1_overall", "f1_micro", "f1_samples")):
            found |= {f"test_{kind}_{meaning}": 0.4 + k / 100 + n / 10}
            found |= {f"blind_{kind}_{meaning}": n / 10}
        found |= {f"test_{kind}_f1_by_label": [0.5] * labels, f"test_{kind}_support": [3] * labels}
    return found


def cost_of(k: int) -> tuple[dict, dict]:
    """Metrics and cost of a row of the cost notebook, told by `k`."""
    parts = ("backbone", "depth", "splat", "bev_encoder", "refiner", "text_head")
    metrics = {"num_params": 5_000_000 + 100_000 * k, "gflops": 2.0 + k}
    metrics |= {f"{part}_params": 1000 * (n + 1) + k for n, part in enumerate(parts)}
    cost = {"train_mib": 1024.0 * (k + 1), "eval_mib": 10.0, "train_s": 2.0, "eval_s": 0.5}
    cost |= {"eval_fps": 2.0, "published_eval_s": 1.0, "published_eval_mib": 40.0}
    for n, part in enumerate(parts):
        cost |= {f"{part}_weights_mib": 1.0 + n, f"{part}_saved_mib": 10.0 * (n + 1)}
    return metrics, cost


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The notebook's variables after a run in which all rows but one have records."""
    from leansense.core.rows import read_rows
    from leansense.xad.data import dataset, loaders
    from leansense.xad.task import encode_map

    folder = house(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANSENSE_ROOT", str(folder))
        patch.setenv("LEANSENSE_DATA", str(folder / "data"))
        rows = read_rows("xad", "smoke")
        for k, row in enumerate(rows):
            if row.notebook.endswith("84_cost.ipynb"):
                write_record(row, *cost_of(k % 9), {"name": "random images"})
            elif (row.table, row.name) == ("ablation", "full"):
                test = loaders(dataset(row.params), row.params)["test"].dataset
                metrics = scored(k) | {"panels": [], "samples": []}
                for index in range(len(test)):
                    item = test[index]
                    one = {"id": item["id"], "scene": item["scene"], "miou": 0.5, "wrong": index}
                    one |= {"action": [0.9] * 4, "description": [0.1] * 8}
                    metrics["samples"].append(one)
                    about = "Rain, " if index else "Night, "
                    one = one | {"index": index, "map": encode_map(item["bev"]), "about": about}
                    metrics["panels"].append(one)
                metrics["by_condition"] = {"night": {"samples": 1, "miou": 0.5, "wrong": 0}}
                write_record(row, metrics, {"seconds": 1.0}, {"name": "drawn", "test": len(test)})
            elif row.name != "v2":
                write_record(row, scored(k), {"seconds": 1.0}, {"name": "drawn", "test": 2})
        note = folder / "runs/smoke/xad/ablation/v2.s0.error"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("ValueError: 50% of _x & y went wrong\n")
        yield execute(patch, folder) | {"folder": folder}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """The same without any record."""
    folder = house(tmp_path_factory.mktemp("empty"))
    with pytest.MonkeyPatch.context() as patch:
        yield execute(patch, folder) | {"folder": folder}


def cells(space: dict, table: str, label: str) -> list[str]:
    """The cells of a table's line, as LaTeX."""
    text = (space["folder"] / SMOKE / f"tables/{table}.tex").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{escape(label)}"))
    return [cell.strip(" \\") for cell in line.split(" & ")]


def test_cells_of_the_ablation_are_those_of_the_records(whole):
    rows = {row.name: k for k, row in enumerate(whole["paper"].rows) if row.table == "ablation"}
    for label, name in (("Baseline &", "baseline"), ("+ VoVNet", "vovnet")):
        found = cells(whole, "ablation", label.removesuffix(" &"))
        k = rows[name]
        assert re.sub(r"\\textbf|[{}]", "", found[5]) == f"{30 + k:.1f}", found
        assert re.sub(r"\\textbf|[{}]", "", found[10]) == f"{40 + k:.1f}", found
        assert found[6] == {"baseline": "47.2", "vovnet": "51.5"}[name]
    assert cells(whole, "ablation", "looking at nothing")[5] == "20.0"


def test_a_failed_row_is_a_dash_with_its_reason(whole):
    assert set(cells(whole, "ablation", "+ LSS v2")[5:6]) == {"--"}
    text = (whole["folder"] / SMOKE / "tables/ablation.tex").read_text()
    assert r"failed: ValueError: 50\% of \_x \& y went wrong" in text
    assert cells(whole, "orders", "+ LSS v2")[2:] == ["--", "not run"]


def test_headline_tells_the_meanings_of_f_one_apart(whole):
    k = next(
        n for n, r in enumerate(whole["paper"].rows) if (r.table, r.name) == ("ablation", "full")
    )
    for n, words in enumerate(("mean over labels", "as published", "micro", "by sample")):
        found = cells(whole, "headline", f"action F1, {words}")
        assert found[4] == f"{40 + k + 10 * n:.1f}" and found[1] == f"{10 * n:.1f}"
        assert found[5] == ("78.5" if words == "as published" else "--")


def test_modules_and_ratios(whole):
    assert cells(whole, "modules", "depth and splat")[1:3] == ["5.0", "50.0"]
    assert cells(whole, "modules", "map encoder and heads")[1:3] == ["5.0", "50.0"]
    assert cells(whole, "modules", "sum")[2] == "160.0", "the refiner is counted once"
    held = whole["held"]
    cost = pd.DataFrame([{"cost.backbone_saved_mib": 1.0, "cost.text_head_saved_mib": 3.0}])
    assert held(cost, "saved_mib", ("text_head",), ("refiner",)) == 3, "a part that is not there"
    assert math.isnan(held(cost.drop(columns="cost.backbone_saved_mib"), "saved_mib", ("depth",)))
    found = cells(whole, "against", "whole network, forward &".removesuffix(" &"))
    assert found[1:4] == ["0.500", "1.000", "2.0"] and found[6] == "4.0"


def test_parameters_are_exact_and_sum_up(whole):
    found = cells(whole, "parameters", "VoVNet-39, V2")
    values = [int(cell.replace(r"\,", "")) for cell in found[1:]]
    assert values[2] + values[3] == 4000 + values[0] - 1000, "the encoder without its refiner"


def test_pictures_are_made_of_the_kept_maps(whole):
    figures = whole["folder"] / "runs/smoke/figures/xad"
    made = {path.stem for path in figures.glob("*.pdf")}
    assert made >= {"architecture", "panels", "maps", "failures", "labels", "curves", "memory"}
    assert list(whole["gallery"])[:2] == ["night", "rain"]
    shown = whole["panels"][0]
    assert (shown["found"] == shown["item"]["bev"]).all()
    assert whole["seen"].all(), "the maps are the labels themselves"


def test_a_sample_of_older_data_is_named(whole):
    lines = whole["full"].copy()
    lines["metrics.panels"] = [[{"index": 0, "id": "gone", "map": ["0"]}]]
    with pytest.raises(ValueError, match="gone: a sample of older data; run ablation/full.s0"):
        whole["read_panels"](lines)


def test_cells_behind_another_vehicle():
    space = {"np": np, "CLASSES": ("background", "vehicle", "drivable", "divider")}
    source = next(cell for cell in CELLS if "def split_cells(" in cell)
    from leansense.xad.frames import Boxes
    from leansense.xad.labels import fill_cells

    centre = np.array([[6.0, 0, 0], [14.0, 0, 0], [0, 9.0, 0]])
    boxes = Boxes(centre, np.full((3, 3), 2.0), np.stack([np.eye(3)] * 3), ("vehicle.car",) * 3)
    bound = (-20.0, 20.0, 1.0)
    label = torch.zeros(40, 40, dtype=torch.long)
    label[torch.from_numpy(fill_cells(boxes.footprints(), bound, bound))] = 1
    frame = type("Frame", (), {"boxes": boxes})
    one = {"frame": frame, "item": {"bev": label}, "found": label * 0, "bounds": (bound, bound)}
    space |= {"fill_cells": fill_cells}
    exec(source[source.index("def split_cells(") : source.index("\n\npairs = ")], space)
    behind, found = space["split_cells"](one)
    assert behind.tolist().count(True) == 4 and len(behind) == 12, "the second car, and it alone"
    assert not found.any()


def test_without_records_all_is_dashes(empty):
    assert set(cells(empty, "ablation", "+ VoVNet")[5:6]) == {"--"}
    assert set(cells(empty, "orders", "two stages")[2:]) == {"--", "not run"}
    text = (empty["folder"] / SMOKE / "numbers.tex").read_text()
    assert r"\newcommand{\xadFullMiou}{--}" in text and "nan" not in text
    assert not (empty["folder"] / "runs/smoke/figures/xad/panels.pdf").exists()
    wanted = set(re.findall(r"\\(xad[A-Za-z]+)", PAPER))
    assert wanted <= set(re.findall(r"\\newcommand\{\\(xad\w+)\}", text)), "numbers of the text"


def test_an_order_needs_every_seed():
    space = {"pd": pd, "math": math, "DASH": "–"}
    source = next(cell for cell in CELLS if "def say_order(" in cell)
    exec(source[: source.index("def say_facts(")], space)
    say, differ = space["say_order"], space["differences"]
    assert say(pd.Series([1.0, 2.0, 0.1])) == "holds: 3 of 3 seeds"
    assert say(pd.Series([1.0, -2.0, 0.1])) == "undecided: 2 of 3 seeds"
    assert say(pd.Series([-1.0, -0.1])) == "reversed: 0 of 2 seeds"
    assert say(pd.Series([-1.0, 0.0])) == "undecided: 0 of 2 seeds"
    assert say(pd.Series([0.0, 0.0])) == "undecided: none differs"
    assert say(pd.Series([3.0])) == "higher, one seed" and say(pd.Series(dtype=float)) == "not run"
    first = pd.DataFrame({"seed": [0, 1, 2], "x": [0.5, 0.6, 0.7]})
    second = pd.DataFrame({"seed": [2, 0, 5], "x": [0.6, 0.6, 0.0]})
    assert differ(first, second, "x").round(9).to_dict() == {0: -10.0, 2: 10.0}
    assert len(differ(first, second, "y")) == 0
    assert space["spell"](first, "x") == "60.0 ± 10.0" and space["spell"](first, "y") == "–"


def test_every_claim_is_judged_or_says_why_not(empty):
    claims = read_claims(ROOT / "papers/xad/claims.yaml")
    assert len(claims) == len(empty["ledger"]) >= 45
    for claim in claims:
        assert claim.get("measure", "fps") in empty["quantities"], claim["statement"]


def test_a_claimed_order_of_one_seed_is_not_judged(whole):
    ledger = whole["ledger"].set_index("label")
    said = ledger.loc["+ VoVNet: 47.2 → 51.5", "verdict"]
    assert said == "cannot be judged here: one seed"
    assert ledger.loc["25–30 FPS", "verdict"].startswith("cannot be judged")


def test_every_table_and_figure_of_the_paper_is_made():
    tables = set(re.findall(r"\\input\{tables/(\w+)\}", PAPER))
    figures = set(re.findall(r"\\includegraphics\[[^\]]*\]\{(\w+)\}", PAPER))
    figures |= set(re.findall(r"\\shown\{[^}]*\}\{(\w+)\}", PAPER))
    assert tables == set(re.findall(r'paper\.table\(\s*"(\w+)"', SOURCE)), "made, read, both"
    for name in figures:
        assert f'"{name}"' in SOURCE, name
    assert {"architecture", "maps", "panels", "failures", "labels", "curves", "memory"} <= figures


def test_every_caption_says_scale_data_and_hardware():
    for kind in ("table", "figure"):
        for found in re.findall(rf"\\begin\{{{kind}\}}(.*?)\\end\{{{kind}\}}", PAPER, re.S):
            assert r"\facts{" in found or "{architecture}" in found, found[:80]


def test_prose_has_no_score_of_its_own():
    """Numbers come from numbers.tex; what stands in the text is the guide's."""
    prose = re.sub(r"%.*", "", PAPER[PAPER.index(r"\begin{document}") :])
    found = set(re.findall(r"\d+\.\d+", re.sub(r"\[[^\]]*\]|\\shown\{[^}]*\}", "", prose)))
    assert found <= {"2.3"}


def test_every_reference_is_cited_and_known():
    keys = set(re.findall(r"@\w+\{(\w+),", (ROOT / "papers/xad/refs.bib").read_text()))
    groups = re.findall(r"\\cite[tp]?\{([^}]*)\}", PAPER)
    assert {key for group in groups for key in group.split(",")} == keys
