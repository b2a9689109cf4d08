"""The open-vocabulary paper: what each cell is made of, gaps that are explained, no loose ends."""

import json
import math
import re
import shutil
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from leansense.core.claims import read_claims
from leansense.core.record import SCHEMA
from leansense.core.rows import Row, read_rows

NOTEBOOK = "nbs/openvocab/90_results.ipynb"
CELLS = [
    ("".join(cell["source"]), cell["metadata"].get("tags", []))
    for cell in json.loads((ROOT / NOTEBOOK).read_text())["cells"]
    if cell["cell_type"] == "code"
]
SOURCE = "\n".join(source for source, _ in CELLS)
PAPER = (ROOT / "papers/openvocab/main.tex").read_text()
PARTS = ("", "_seen", "_unseen", "_combination", "_subword", "_word", "_people", "_other")


def share(*words: object) -> float:
    """A number from 0 to 1 that is always the same for these words."""
    return zlib.crc32(repr(words).encode()) % 10007 / 10007


def score_names() -> list[str]:
    """The scores of a trained row."""
    names = [f"test_{name}" for name in ("recall5", "recall10", "upper", "merged_recall1")]
    names += [f"test_recall1{part}" for part in PARTS] + ["test_blind_recall1"]
    return names + ["test_map", "test_map50", "test_map50_phrase", "test_map50_unseen"]


def draw_panels() -> list[dict]:
    """Answers to the phrases of three pictures of the stand-in, as a row leaves them."""
    from leansense.openvocab import data

    pictures = data.dataset({"data": "standin", "standin": 40, "image_size": 64})
    panels = []
    for sample in pictures.part("test")[:3]:
        boxes = [item.box for item in sample.objects][:3]
        answers = [
            {
                "phrase": f"a thing_{k} & more",
                "boxes": [{"box": [float(v) for v in box], "score": 0.5}],
                "truth": [[float(v) for v in box]],
                "novelty": "seen",
            }
            for k, box in enumerate(boxes)
        ]
        panels.append({"id": sample.id, "answers": answers})
        maps = {name: [[0.1] * 8] * 8 for name in ("words", "answer")}
        panels[-1]["attention"] = [{"phrase": answer["phrase"]} | maps for answer in answers]
    return panels


def make_record(row: Row) -> dict:
    """A record as that row would leave it, with numbers of no meaning."""
    metrics = {name: share(row.id, name) for name in score_names()}
    metrics |= {f"test_n_phrases{part}": 10.0 + len(part) for part in PARTS}
    metrics |= {"params_text": 1e6, "params": 2e6, "params_trained": 2e6}
    curve = [share(row.id, k) for k in range(3)]
    names = ("train_loss", "valid_loss_sim", "valid_recall1")
    metrics["history"] = dict.fromkeys(names, curve)
    cost = {"seconds": 9.0, "samples_per_second": 50 + 50 * share(row.id)}
    if row.table == "cost":
        metrics = {"params_trained": 3e7 + 1e7 * share(row.id), "gflops": 10 * share(row.id)}
        metrics["params_total"] = metrics["params_trained"] + 63e6
        kinds = [f"{m}_{u}" for m in ("eval", "train") for u in ("s", "fps", "mib")] + ["saved_mib"]
        cost |= {kind: 0.1 + share(row.id, kind) for kind in kinds}
        for rival in row.params["against"].split():
            more = [*kinds, "eval_ratio", "train_ratio"]
            cost |= {f"{rival}_{kind}": 0.1 + share(row.id, rival, kind) for kind in more}
    data = {"name": "drawn_things & 40 %", "train": 24, "valid": 6, "test": 10, "fingerprint": "x"}
    return {
        "schema": SCHEMA, "system": row.system, "table": row.table, "row": row.name,
        "seed": row.seed, "scale": row.scale, "set": row.set, "params": row.params,
        "metrics": metrics, "cost": cost, "data": data, "code": {}, "env": {"device": "a CPU"},
    }  # fmt: skip


def scratch(folder: Path) -> Path:
    """A checkout with no record in it: the matrix, the claims, the notebooks."""
    (folder / "papers/openvocab").mkdir(parents=True)
    for name in ("rows.yaml", "claims.yaml"):
        shutil.copy(ROOT / "papers/openvocab" / name, folder / "papers/openvocab")
    for name in ("nbs", "lib", "settings.ini"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_notebook(scale: str = "smoke", data: str = "") -> dict:
    """All cells of the notebook in one space, as papermill would run them."""
    matplotlib.use("Agg", force=True)
    space = {"__name__": "results"}
    for source, tags in CELLS:
        exec(source, space)
        if "parameters" in tags:
            space |= {"scale": scale, "data": data}
    space["plt"].close("all")
    return space


def cells_of(table: str) -> dict[str, list[str]]:
    """The cells of a written table by the label of their line, unescaped to plain numbers."""
    lines = [line[:-3].split(" & ") for line in table.splitlines() if line.endswith(r" \\")]
    return {line[0]: [re.sub(r"\\textbf\{(.*)\}", r"\1", cell) for cell in line[1:]] for line in lines}


@pytest.fixture(scope="module")
def papers(tmp_path_factory, own_data_root):
    """(scratch checkout, the notebook's names) with a record for each row but two."""
    folder = scratch(tmp_path_factory.mktemp("results"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANSENSE_ROOT", str(folder))
        panels = draw_panels()
        for row in read_rows("openvocab", "smoke"):
            if row.id in ("text/minilm.s0", "ablation/key.s0"):
                continue
            record = make_record(row)
            if (row.table, row.name) == ("text", "tiny"):
                record["metrics"]["panels"] = panels
            row.record.parent.mkdir(parents=True, exist_ok=True)
            row.record.write_text(json.dumps(record))
        yield folder, run_notebook()


def test_smoke(papers):
    assert papers
