"""The open-vocabulary paper: what each cell is made of, gaps that are explained, no loose ends."""

import json
import math
import re
import shutil
import zlib
from pathlib import Path

import matplotlib
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


def cells_of(table: Path) -> dict[str, list[str]]:
    """The cells of a written table by the label of their line; the first line: the headings."""
    lines = [line[:-3].split(" & ") for line in table.read_text().splitlines() if " & " in line]
    plain = [[re.sub(r"\\textbf\{(.*)\}", r"\1", cell) for cell in line] for line in lines]
    return {line[0]: line[1:] for line in plain}


def numbers_of(folder: Path) -> dict[str, str]:
    """The macros of a written numbers.tex."""
    found = re.findall(r"\\newcommand\{\\openvocab(\w+)\}\{(.*)\}$", folder.read_text(), re.M)
    return dict(found)


@pytest.fixture(scope="module")
def papers(tmp_path_factory, own_data_root):
    """(the paper's folder, the notebook's names), of a record for each row but two."""
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
        yield folder / "runs/smoke/papers/openvocab", run_notebook()


def test_tables_say_what_the_records_say(papers):
    folder, names = papers
    found = cells_of(folder / "tables/text.tex")
    titles = found["text encoder"]
    row = next(row for row in names["paper"].rows if row.id == "text/hash.s0")
    metrics = make_record(row)["metrics"]
    cells = dict(zip(titles, found["hashed n-grams, trained here"]))
    assert cells[r"all (\%)"] == f"{100 * metrics['test_recall1']:.1f}"
    assert cells["new synonym"] == f"{100 * metrics['test_recall1_word']:.1f}"
    assert cells["mAP@50 boxes"] == f"{100 * metrics['test_map50']:.1f}"
    assert set(found["MiniLM, frozen"]) == {"--"}
    found = cells_of(folder / "tables/comparison.tex")
    assert [found[name][0] for name in ("before", "after")] == ["54.05", "31.29"]
    assert found["before, as published"][0] == "113.41" and found["half way"][0] == "40.88"
    said = numbers_of(folder / "numbers.tex")
    assert said["HashWord"] == cells["new synonym"] and said["MinilmSeen"] == "--"
    assert said["ChangeKey"] == "--" and said["Claims"] == str(len(names["ledger"]))


def test_an_ablation_is_against_the_same_seed(papers):
    folder, names = papers
    found = [row for row in names["paper"].rows if row.table in ("comparison", "ablation")]
    rows = {row.id: make_record(row)["metrics"]["test_recall1"] for row in found}
    points = 100 * (rows["ablation/dim_256.s0"] - rows["comparison/before.s0"])
    found = cells_of(folder / "tables/ablation.tex")
    cells = dict(zip(found["one change"], found["D 256"]))
    assert cells["points"] == f"{points:.1f}" and cells["here"] == "dim 16"
    assert numbers_of(folder / "numbers.tex")["ChangeDim"] == f"{points:+.1f}".replace("-", "$-$")
    assert names["quantities"]["gain_dim"] == pytest.approx(points)
    lines = {"metrics.test_recall1": [0.5, 0.9, 0.1], "seed": [0, 1, 2]}
    some, one = pd.DataFrame(lines), pd.DataFrame({"metrics.test_recall1": [0.4], "seed": [1]})
    assert names["lead"](some, one) == pytest.approx(50)
    assert math.isnan(names["lead"](some, one.iloc[:0]))


def test_the_guides_table_is_of_one_process(papers):
    """Its rates and memory come from the row that had all three networks in turns."""
    folder, names = papers
    costs = {"train_s": 0.5, "before_train_s": 1.0, "before_swinb_train_s": 2.0}
    costs |= {"saved_mib": 30.0, "before_saved_mib": 60.0, "before_swinb_saved_mib": 120.0}
    names["against"] = pd.DataFrame([{f"cost.{name}": value for name, value in costs.items()}])
    assert names["in_turns"]("train_s", True) == (1.0, 2.0, 0.5)
    assert names["in_turns"]("saved_mib") == (60.0, 30.0, 120.0)
    assert names["less"](60, 30) == "50.0 % less" and names["faster"](1, 2) == "× 2.00"
    assert names["less"](math.nan, 30) == names["faster"](1, math.nan) == "–"
    found = cells_of(folder / "tables/guide.tex")
    assert found["training at the claimed rates (h)"][3:5] == ["8.27", "1.24"]
    assert found["training (pictures/s)"][:3] == ["50", "100+", "2x"]


def test_one_key_gives_every_token_the_same(papers):
    heard = papers[1]["heard"]
    assert heard["key"]["spread"] < 1e-12 < 0.1 < heard["tokens"]["spread"]
    assert heard["key"]["gradient"] < 1e-12 < 0.1 < heard["tokens"]["gradient"]
    assert 0.08 < heard["zeros"] < 0.12
    assert numbers_of(papers[0] / "numbers.tex")["KeySpread"] == "less than 1e-12"


def test_figures_are_drawn(papers):
    folder, names = papers
    figures = {path.stem for path in (folder.parents[1] / "figures/openvocab").glob("*.png")}
    assert figures == {"architecture", "panels", "attention", "types", "speed", "curves"}
    assert all(count < 10 for count in map(names["count_boxes"], names["clear"][:1]))
    assert sum(names["parts"].values()) == 31_294_847
    listed = {path.name for path in names["paper"].written}
    assert {"panels.pdf", "guide.tex", "claims.tex", "numbers.tex"} <= listed


def test_a_map_lies_on_its_picture(papers):
    """The square of a wide picture reaches above and below it, and its bars do not count."""
    from PIL import Image

    names, shares = papers[1], [[0.1] * 8 for _ in range(8)]
    shares[0][0], shares[4][2] = 9.0, 0.8  # the first is in the bar
    axes = names["plt"].subplots()[1]
    names["draw_map"](axes, Image.new("RGB", (200, 100)), shares)
    picture, shown = axes.images
    assert picture.get_extent() == [0, 200, 100, 0]
    assert shown.get_extent() == pytest.approx([0, 200, 150, -50])
    assert shown.get_clim() == (0, 0.8)
    names["plt"].close("all")


def test_nothing_has_been_run(tmp_path, own_data_root, monkeypatch):
    """A clone without a record: dashes, and counts that need none."""
    monkeypatch.setenv("LEANSENSE_ROOT", str(scratch(tmp_path / "clone")))
    names = run_notebook()
    tables = {path.stem: path for path in names["paper"].written if path.suffix == ".tex"}
    assert tables.keys() == {"text", "cost", "guide", "comparison", "ablation", "claims", "numbers"}
    assert set(cells_of(tables["text"])["MiniLM, frozen"]) == {"--"}
    assert cells_of(tables["comparison"])["after"][:2] == ["31.29", "--"]
    said = numbers_of(tables["numbers"])
    assert said["BeforeRecall"] == said["SizeBefore"] == said["AskedSeen"] == "--"
    assert said["HoursBefore"] == "8.27" and said["TextFacts"].endswith("nothing has been run.")
    assert [path.name for path in names["paper"].written if path.suffix == ".png"] == [
        "architecture.png"
    ]


def test_photographs_have_a_table_and_nothing_else(tmp_path, own_data_root, monkeypatch):
    """With COCO's files: one table; real pictures stay below runs/; no record is a dash."""
    folder, photographs = scratch(tmp_path / "clone"), tmp_path / "few_photographs"
    monkeypatch.setenv("LEANSENSE_ROOT", str(folder))
    (photographs / "annotations").mkdir(parents=True)
    (photographs / "annotations/instances_train2017.json").write_text("{}")
    names = {}
    for with_records in (False, True):
        for row in read_rows("openvocab", "smoke", str(photographs)):
            if with_records and row.name == "alone":
                row.record.parent.mkdir(parents=True, exist_ok=True)
                row.record.write_text(json.dumps(make_record(row)))
        names = run_notebook(data=str(photographs))
        tables = [path for path in names["paper"].written if path.parent.name == "tables"]
        assert [path.name for path in tables] == ["photographs.tex"]
        found = cells_of(tables[0])
        assert set(found["drawn pictures first"]) == {"--"}
        assert (found["photographs alone"][0] == "24/10") == with_records
    figures = {path.stem for path in names["paper"].written if path.suffix == ".png"}
    assert figures == {"types", "speed", "curves"}
    said = numbers_of(names["paper"].numbers_path)
    assert said["FewPhotographsAlonePhotographsAsked"] == "10"


def test_every_claim_is_judged_or_says_why_not(papers):
    claims = read_claims("papers/openvocab/claims.yaml")
    assert len(claims) >= 30
    for claim in claims:
        assert claim.get("measure", "hours_after") in papers[1]["quantities"], claim["statement"]
    said = " ".join(claim["statement"] for claim in claims)
    for words in ("44%", "~50M", "~28M", "~3GB", "100+", "60+ FPS", "OneCycleLR", "SDPA", "Python"):
        assert words in said or words == "Python", words
    wanted = {claim["measure"] for claim in claims if "measure" in claim}
    assert papers[1]["quantities"].keys() == wanted


def test_every_table_and_figure_of_the_paper_is_made():
    tables = set(re.findall(r"\\input\{(?:coco_mini-\w+/)?tables/(\w+)\}", PAPER))
    figures = set(re.findall(r"\\includegraphics\[[^\]]*\]\{(\w+)\}", PAPER))
    assert len(tables) >= 7 and len(figures) >= 6
    for name in figures:
        assert re.search(rf'keep\(figure, "{name}"', SOURCE), name
    assert set(re.findall(r'^show\(\s*"(\w+)"', SOURCE, re.M)) == tables


def test_every_number_of_the_paper_is_made(papers):
    made = numbers_of(papers[0] / "numbers.tex")
    asked = set(re.findall(r"\\openvocab(?!CocoMini)([A-Za-z]+)", PAPER))
    assert asked <= made.keys(), asked - made.keys()
    asked = set(re.findall(r"\\given\{(\w+)\}", PAPER))
    assert asked <= made.keys(), asked - made.keys()


def test_every_caption_says_scale_data_and_hardware():
    for found in re.findall(r"\\begin\{(?:table|figure)\}(.*?)\\end\{", PAPER, re.S):
        assert r"\facts{" in found or r"{architecture}" in found, found[:80]


def test_prose_has_no_score_of_its_own():
    """Numbers come from numbers.tex; what stands in the text is the guide's, or a size."""
    prose = re.sub(r"%.*", "", PAPER[PAPER.index(r"\begin{document}") :].replace(r"\%", ""))
    assert re.findall(r"\d+\.\d+", re.sub(r"\[[^\]]*\]", "", prose)) == []


def test_every_reference_is_cited_and_known():
    text = (ROOT / "papers/openvocab/refs.bib").read_text()
    keys = set(re.findall(r"@\w+\{(\w+),", text))
    cited = {
        key for group in re.findall(r"\\cite[tp]?\{([^}]*)\}", PAPER) for key in group.split(",")
    }
    assert cited == keys
