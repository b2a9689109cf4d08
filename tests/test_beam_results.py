"""The beam paper: what each cell is made of, what the guide implies of itself, no loose ends."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, code_cells
from leansense.core.claims import read_claims

NOTEBOOK = "nbs/beam/90_results.ipynb"
CELLS = code_cells(NOTEBOOK)
SOURCE = "\n".join(CELLS)
PAPER = (ROOT / "papers/beam/main.tex").read_text()


def run_cell(text: str, space: dict, until: str = "") -> dict:
    """Run the cell that holds `text`, up to `until`."""
    source = next(cell for cell in CELLS if text in cell)
    exec(source[: source.index(until)] if until else source, space)
    return space


@pytest.fixture(scope="module")
def tools() -> dict:
    space = {"pd": pd, "np": np, "math": math, "DBA": "metrics.test_dba"}
    run_cell("def pick(", space, "PLACES = (")
    return run_cell("PUBLISHED = {", space, "whole = done")


def records(*lines: dict) -> pd.DataFrame:
    return pd.DataFrame([{"missing": "", "seed": 0} | line for line in lines])


def test_records_are_chosen_by_their_parameters(tools):
    lines = records(
        {"params.arch": "mambafusion", "params.faithful": False, "metrics.test_dba": 0.8},
        {"params.arch": "mambafusion", "params.faithful": False, "metrics.test_dba": 0.9},
        {"params.arch": "mambafusion", "params.faithful": True, "metrics.test_dba": 0.1},
        {"params.arch": "transfuser", "params.faithful": False, "metrics.test_dba": 0.2},
    )
    found = tools["pick"](lines, arch="mambafusion", faithful=False)
    assert tools["mean"](found, "metrics.test_dba") == pytest.approx(0.85)
    assert tools["spell"](found, "metrics.test_dba") == "0.850 ± 0.071"
    assert tools["spell"](found.iloc[:1], "metrics.test_dba") == "0.800"
    for nothing in (tools["pick"](lines, arch="none"), tools["pick"](lines, unknown=1)):
        assert tools["spell"](nothing, "metrics.test_dba") == "–"
        assert math.isnan(tools["mean"](nothing, "metrics.test_dba"))


def test_the_guides_rows_contradict_themselves(tools):
    """Four rows of its Table I imply their overall score; two do not."""
    space = run_cell("def implied(", dict(tools), "def lead(")
    implied = space["implied"]
    for row in ("radar", "lidar", "image", "lidar_radar"):
        assert implied(row) == pytest.approx(tools["PUBLISHED"][row][0], abs=6e-5), row
    assert implied("", 3) == pytest.approx(0.8647, abs=5e-5)
    assert implied("baseline") == pytest.approx(0.8974, abs=5e-5)


def rebuildings() -> pd.DataFrame:
    """One record for each set of losses, of the image, and a full one of both kinds."""
    lines = []
    for k, weights in enumerate([(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0.001), (1, 1, 0.001)]):
        names = dict(zip(("trans", "contrast", "distance"), weights)) | {"fusion": 1.0}
        lines.append(
            {f"params.alpha_{name}": float(value) for name, value in names.items()}
            | {
                "params.target": "image",
                "params.faithful": False,
                "params.modality_missing_type": "zerolike" if k == 4 else "randlike",
                "params.Val": 0,
                "metrics.test_rebuilt_dba": 0.5 + k / 10,
                "metrics.test_filled_zero_dba": 0.3,
                "metrics.test_filled_rand_dba": 0.2,
                "metrics.test_base_dba": 0.9,
            }
        )
    return records(*lines)


@pytest.fixture(scope="module")
def missing(tools) -> dict:
    """Table III's functions over rebuildings, and evaluations of the attention baseline alone."""
    evaluation = {
        "params.Val": 1,
        "params.arch": "transfuser",
        "params.modality_missing": "image",
        "params.modality_missing_type": "randlike",
        "metrics.test_dba": 0.15,
    }
    done = pd.concat([rebuildings(), records(evaluation)], ignore_index=True)
    space = dict(tools) | {"done": done}
    return run_cell("def rebuilt_of(", space, "lines = [")


def test_fills_and_rebuildings_of_table_three(missing):
    spell, fill, rebuilt = (missing[name] for name in ("spell", "fill_of", "rebuilt_of"))
    assert spell(rebuilt("image", "randlike"), "dba") == "0.800"  # all four losses only
    assert spell(rebuilt("image", "zerolike"), "dba") == "0.900"
    assert spell(rebuilt("lidar", "zerolike"), "dba") == "–"
    assert missing["mean"](fill("mambafusion", "image", "zerolike"), "dba") == pytest.approx(0.3)
    assert missing["mean"](fill("mambafusion", "image", "randlike"), "dba") == pytest.approx(0.2)
    assert spell(fill("transfuser", "image", "randlike"), "dba") == "0.150"
    assert spell(fill("transfuser", "image", "zerolike"), "dba") == "–"


def test_losses_of_table_four(missing):
    space = run_cell("def of_losses(", dict(missing), "REBUILT = ")
    for k, weights in enumerate([(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]):
        found = space["of_losses"]("image", *weights)
        assert found["metrics.test_rebuilt_dba"].tolist() == [0.5 + k / 10], weights
        assert len(space["of_losses"]("radar", *weights)) == 0


def test_recovered_is_a_share_of_what_zeros_cost(missing):
    source = next(cell for cell in CELLS if "def recovered(" in cell)
    source = source[source.index("def recovered(") : source.index("def zero(")]
    space = dict(missing)
    exec(source, space)
    assert space["recovered"]("image") == pytest.approx(100 * (0.9 - 0.3) / (0.9 - 0.3))
    assert math.isnan(space["recovered"]("lidar"))


def test_every_claim_is_judged_or_says_why_not():
    claims = read_claims("papers/beam/claims.yaml")
    assert len(claims) >= 45
    named = {"full_over", "count", "recovered"}  # whose keys are put together
    for claim in claims:
        assert claim.keys() & {"measure", "cannot", "read"}, claim["statement"]
        measure = claim.get("measure", "")
        made = any(measure.startswith(f"{name}_") for name in named)
        assert made or f'"{measure}":' in SOURCE or not measure, measure
    said = " ".join(claim["statement"] for claim in claims)
    facts = "78,118,308 | 0.8918 | baseline4 is L+R+G | 14min*50 | 5.0 | bimamba solves"
    for words in facts.split(" | "):
        assert words in said, words


def test_every_table_and_figure_of_the_paper_is_made():
    tables = set(re.findall(r"\\input\{(?:beams_gps-\w+/)?tables/(\w+)\}", PAPER))
    figures = set(re.findall(r"\\includegraphics\[[^\]]*\]\{(\w+)\}", PAPER))
    assert len(tables) >= 12 and len(figures) >= 6
    for name in tables:
        assert re.search(rf'(show|paper\.table)\(\s*"{name}"', SOURCE), name
    for name in figures:
        assert f'"{name}"' in SOURCE, name
    made = set(re.findall(r'^show\(\s*"(\w+)"', SOURCE, re.M))
    assert made <= tables, "a table that nobody reads"


def test_every_caption_says_scale_data_and_hardware():
    for found in re.findall(r"\\begin\{table\}(.*?)\\end\{table\}", PAPER, re.S):
        assert r"\facts{" in found, found[:80]


def test_prose_has_no_score_of_its_own():
    """Numbers come from numbers.tex; what stands in the text is the guide's, or a size."""
    prose = re.sub(r"%.*", "", PAPER[PAPER.index(r"\begin{document}") :])
    given = {"0.8918", "0.9005", "0.89", "0.53", "0.02", "1.0", "5.0", "3.0", "57.8", "2.5"}
    assert set(re.findall(r"\d+\.\d+", re.sub(r"\[[^\]]*\]", "", prose))) <= given | {".62"}


def test_every_reference_is_cited_and_known():
    keys = set(re.findall(r"@\w+\{(\w+),", (ROOT / "papers/beam/refs.bib").read_text()))
    cited = {
        key for group in re.findall(r"\\cite[tp]?\{([^}]*)\}", PAPER) for key in group.split(",")
    }
    assert cited == keys
