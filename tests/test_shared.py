"""What systems share in core: images, doctors, answers, tags, metrics, claims, weights, results."""

import ast
import json
import math
import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score

from conftest import ROOT, message
from leansense.core import claims, images, metrics
from leansense.core.answers import read_trained, run_command, write_answer, write_picture
from leansense.core.check import Report, try_files
from leansense.core.results import history_of, value_of
from leansense.core.tags import write_tags
from leansense.core.weights import read_weights

# ---- images


@pytest.fixture
def photo(tmp_path):
    """An 8-bit photograph of 40 x 20 pixels whose tag says: turn me clockwise."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png", pixels


def test_images_are_upright_or_as_stored(photo):
    path, pixels = photo
    assert images.open_image(path).size == (20, 40) and images.size_of(path) == (40, 20)
    assert (np.asarray(images.open_image(path, upright=False)) == pixels).all()


def test_sixteen_bits_are_not_cut_off(tmp_path):
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = np.asarray(images.open_image(tmp_path / "deep.png"))
    assert (found == (deep >> 8)[..., None]).all() and found.shape == (8, 8, 3)


@pytest.mark.parametrize("read", [images.open_image, images.size_of])
def test_a_broken_image_is_named_in_one_line(tmp_path, read):
    (tmp_path / "text.jpg").write_text("no image")
    text = message(ValueError, read, tmp_path / "text.jpg", entry="sample")
    assert text.startswith(f"{tmp_path / 'text.jpg'}: image cannot be decoded (")
    assert text.endswith("copy it again or remove its sample") and text.count("text.jpg") == 1
    assert "image is missing" in message(FileNotFoundError, images.open_image, tmp_path / "none")


def test_normalising_there_and_back(photo):
    pixels = photo[1]
    batch = images.to_tensor(pixels[None])
    assert batch.shape == (1, 3, 20, 40) and batch.is_contiguous()
    assert torch.equal(batch[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    same = images.normalise(batch)
    assert same is batch and np.allclose(images.to_picture(same[0]), pixels / 255, atol=1e-6)


def test_rows_of_a_cache_follow_content(photo, tmp_path):
    (tmp_path / "twin.png").write_bytes(photo[0].read_bytes())
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    names = ["photo.png", "black.png", "twin.png"]
    rows, files, key = images.index_content(tmp_path, names)
    assert rows[0] == rows[2] != rows[1] and len(files) == 2 and files[rows[1]] == "black.png"
    assert images.index_content(tmp_path, names[::-1])[2] == key
    Image.new("RGB", (4, 4), "red").save(tmp_path / "black.png")
    assert images.index_content(tmp_path, names)[2] != key


def test_rows_are_made_by_threads_and_stay_in_order(tmp_path):
    seen = set()

    def make(name):
        seen.add(threading.current_thread().name)
        return np.full(3, int(name), np.int32)

    found = images.stored_rows(tmp_path / "a.npy", (3,), "int32", list("31415"), make)
    assert found[:, 0].tolist() == [3, 1, 4, 1, 5] and "MainThread" not in seen
    again = images.stored_rows(tmp_path / "a.npy", (3,), "int32", list("31415"), None)
    assert (again == found).all(), "read, not made"
    holder = images.Mapped()
    holder.array = found
    sent = pickle.dumps(holder)
    assert len(sent) < 500 and (pickle.loads(sent).array == found).all()


# ---- metrics


def test_scores_by_hand():
    first = metrics.score_confusions(metrics.count_confusions([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3))
    assert first["acc"] == pytest.approx(0.6) and first["f1"] == pytest.approx(0.4333333, abs=1e-6)
    assert metrics.count_confusions([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 3).tolist() == [
        [1, 1, 0],
        [0, 2, 0],
        [1, 0, 0],
    ]
    assert metrics.score_confusions(metrics.count_confusions([0, 0, 1], [0, 1, 1], 3))[
        "f1"
    ] == pytest.approx(4 / 9)


def test_scores_against_sklearn():
    rng = np.random.default_rng(1)
    truth, guess = rng.integers(0, 5, (2, 300))
    counted = metrics.count_confusions(truth, guess, 5)
    assert (counted.numpy() == confusion_matrix(truth, guess)).all()
    found = metrics.score_confusions(counted)
    each = f1_score(truth, guess, average=None)
    assert [found[f"f1_{k}"] for k in range(5)] == pytest.approx(list(each))
    assert found["acc"] == (truth == guess).mean() and found["f1"] == pytest.approx(each.mean())


def test_an_absent_class_counts_as_zero():
    found = metrics.score_confusions(metrics.count_confusions([0, 1], [0, 1], 3))
    assert found["f1"] == pytest.approx(2 / 3) and found["f1_2"] == 0


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_processes_add_up_to_what_one_would_have_counted(parts):
    """The states are summed, as a distributed run sums them; no digit of the scores differs."""
    rng = np.random.default_rng(2)
    truth, guess = (torch.from_numpy(rng.integers(0, 4, 101)) for _ in range(2))
    each = [metrics.ClassScores(4) for _ in range(parts)]
    for rank, metric in enumerate(each):
        metric.update(guess[rank::parts], truth[rank::parts])
    whole = each[0]
    whole.confmat = sum(metric.confmat for metric in each)
    wanted = metrics.score_confusions(metrics.count_confusions(truth, guess, 4))
    assert whole.compute() == {name: wanted[name] for name in ("acc", "f1")}
    assert not whole.confmat.is_floating_point()


def test_mcnemar_by_hand():
    found = metrics.compare_predictions([0] * 10, [0] * 8 + [1] * 2, [1] * 3 + [0] * 7)
    assert (found["differ"], found["only_first"], found["only_second"]) == (5, 3, 2) and found[
        "p"
    ] == pytest.approx(1.0)


def test_calibration_by_hand():
    confidence, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 1, 1, 0], bool)
    assert metrics.calibration_error(confidence, right) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert metrics.find_threshold(confidence, right, 0.75) == 0.55
    assert metrics.find_threshold(confidence, right, 1.0) == 0.55
    assert metrics.find_threshold(confidence, ~right, 0.9) == 1.01
    logits, labels = torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1])
    assert metrics.fit_temperature(logits, labels) > 19, "right half of the time: no confidence"


# ---- claims


def read(tmp_path, text):
    (tmp_path / "claims.yaml").write_text(text)
    return claims.read_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize(
    "text, said",
    [
        ("- {statement: a, unit: b, mesure: c}", "unknown entry 'mesure'; nearest is 'measure'"),
        ("- {unit: b, read: c}", "give its statement and its unit"),
        ("- {statement: a, unit: b, claimed: 3}", "give measure, cannot or read"),
        ("- {statement: a, unit: b, measure: c}", "what is claimed and the tolerance"),
    ],
)
def test_an_incomplete_claim_is_named(tmp_path, text, said):
    good = "- {statement: a, unit: '', read: b}\n"
    found = message(ValueError, read, tmp_path, good + text)
    assert said in found and "claims.yaml, claim 2" in found


@pytest.mark.parametrize(
    "claim, number, block, wanted",
    [
        ({"claimed": 2, "tolerance": 0.3}, 2.1, None, "reproduced"),
        ({"claimed": 2, "tolerance": 0.3}, 2.8, None, "not reproduced: more"),
        ({"claimed": 2, "tolerance": 0.3}, 1.2, None, "not reproduced"),
        ({"claimed": [20, 30], "tolerance": 2}, 25.0, None, "reproduced"),
        ({"claimed": [20, 30], "tolerance": 2}, 41.0, None, "not reproduced: more"),
        ({"claimed": 25, "tolerance": 2}, 2.2, 25.4, "true of the block only (25.4)"),
        ({"claimed": 25, "tolerance": 2}, 2.2, 41.0, "true of the block only (41.0)"),
        ({"claimed": 25, "tolerance": 2}, 2.2, 11.0, "not reproduced"),
        ({"claimed": 25, "tolerance": 2}, float("nan"), 25.0, "cannot be judged here: no record"),
        (
            {"claimed": 25, "tolerance": 2, "cannot": "other data"},
            25.0,
            None,
            "cannot be judged here: other data",
        ),
    ],
)
def test_verdicts_have_two_sides(claim, number, block, wanted):
    """What core.claims says of numbers made up."""
    claim = claim | {"measure": "a"} | ({"block": "b"} if block is not None else {})
    assert claims.judge(claim, {"a": number, "b": block})[1] == wanted


def test_every_verdict_is_counted_once():
    said = [
        {"claimed": 1, "tolerance": 0.1, "measure": "one"},
        {"claimed": 9, "tolerance": 0.1, "measure": "one"},
        {"claimed": 0, "tolerance": 0.1, "measure": "one"},
        {"claimed": 5, "tolerance": 0.1, "measure": "one", "block": "nine"},
        {"claimed": [3, float("inf")], "tolerance": 0, "measure": "gone"},
        {"read": "its code says otherwise"},
    ]
    entries = [claim | {"statement": "s", "unit": ""} for claim in said]
    ledger = claims.judge_all(entries, {"one": 1.0, "nine": 9.0, "gone": float("nan")})
    found = claims.count_verdicts(ledger)
    assert found == {
        "Reproduced": 1,
        "BlockOnly": 1,
        "NotSo": 1,
        "NotReproduced": 2,
        "NotJudged": 1,
    }
    assert ledger["claimed"].tolist() == ["1", "9", "0", "5", "> 3", "–"]


# ---- weights, results


def test_weights_come_without_their_wrapping(tmp_path):
    plain = {"a.weight": torch.ones(2), "a.bias": torch.zeros(1)}
    lightning = {"state_dict": {f"model.{name}": value for name, value in plain.items()}}
    parallel = {"model": {f"module.{name}": value for name, value in plain.items()}, "epoch": 3}
    for content in (plain, lightning, parallel, {"model_state_dict": plain}):
        torch.save(content, tmp_path / "w.pt")
        found = read_weights(tmp_path / "w.pt")
        assert found.keys() == plain.keys() and torch.equal(found["a.weight"], torch.ones(2))
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    assert "holds no weights by name" in message(ValueError, read_weights, tmp_path / "w.pt")


def test_a_value_that_is_not_there_is_nan():
    lines = pd.DataFrame(
        [
            {"name": "a", "missing": "not run"},
            {"name": "a", "missing": "", "f1": 0.5, "metrics.history.loss": [2.0, 1.0]},
        ]
    )
    assert value_of(lines, "a", "f1") == 0.5, "the first that was run"
    for name, column in (("b", "f1"), ("a", "none")):
        assert np.isnan(value_of(lines, name, column))
    assert np.isnan(value_of(lines.iloc[:0], "a", "f1"))
    assert history_of(lines.iloc[1]) == {"loss": [2.0, 1.0]} and history_of(lines.iloc[0]) == {}


# ---- doctors: each picture is opened once ----


def test_a_picture_is_opened_once_and_measured(photo, tmp_path, monkeypatch):
    from PIL import Image as module

    opened, real = [], module.open
    monkeypatch.setattr(module, "open", lambda *a, **k: (opened.append(a[0]), real(*a, **k))[1])
    assert images.check_image(photo[0]) == images.size_of(photo[0]) == (40, 20)
    assert opened == [photo[0]] * 2  # one for each of the two calls
    (tmp_path / "cut.png").write_bytes(photo[0].read_bytes()[:-400])
    said = message(ValueError, images.check_image, tmp_path / "cut.png", entry="sample")
    assert said == message(ValueError, images.open_image, tmp_path / "cut.png", entry="sample")
    assert images.size_of(tmp_path / "cut.png") == (40, 20)  # its header says nothing of it


def test_a_file_that_cannot_be_read_costs_its_own_line(photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = [str(photo[0]), str(tmp_path / "bad.png"), str(tmp_path / "gone.png"), str(photo[0])]
    report = Report("toy", str(tmp_path))
    assert try_files(images.check_image, names, report) == [(40, 20), None, None, (40, 20)]
    assert [one.path for one in report.errors] == names[1:3]
    assert report.errors[0].fix == "copy it again or remove its row"
    assert report.errors[1].what == "image is missing"

    def read(pair):
        raise ValueError(f"{pair[0]}: {pair[1]}")

    report = Report("toy", "")
    given = [("a", "is bad; mend it; now"), ("b", "is worse"), ("c", "")]
    assert try_files(read, given, report, of=lambda pair: pair[0], fix="see there") == [None] * 3
    found = [(one.path, one.what, one.fix) for one in report.errors]
    assert found[:2] == [("a", "is bad; mend it", "now"), ("b", "is worse", "see there")]
    assert found[2] == ("c", "ValueError", "see there")
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no fault of a file
        try_files(lambda name: 1 / 0, ["a"], report)


# ---- answers, and how a command ends ----


def test_answers_are_whole_or_absent(tmp_path):
    from matplotlib.figure import Figure

    stem = tmp_path / "made" / "scene.1"
    made = write_answer(stem, {"id": "scene/1", "score": 0.5})
    assert made == tmp_path / "made/scene.1.json"
    assert made.read_bytes() == b'{"id": "scene/1", "score": 0.5}\n'
    assert "JSON" in message(ValueError, write_answer, tmp_path / "nan", {"score": math.nan})
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    assert write_picture(stem, figure).read_bytes().startswith(b"\x89PNG")
    found = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(found) == ["made/scene.1.json", "made/scene.1.png"]
    (tmp_path / "made/scene.1.pdf").write_text("the user's own")
    assert write_picture(stem, figure) == tmp_path / "made/scene.1.png"
    assert (tmp_path / "made/scene.1.pdf").read_text() == "the user's own"


@pytest.mark.parametrize(
    "config", [None, 3, "{", "[]", '{"config": []}', '{"config": {"params": 1}}', "[" * 100_000]
)
def test_a_checkpoint_of_no_row_is_one_line(tmp_path, config):
    torch.save({"leansense": {"config": config}, "state_dict": {}}, tmp_path / "a.ckpt")
    said = message(ValueError, read_trained, tmp_path / "a.ckpt", "name another")
    assert said.endswith("a.ckpt: says nothing of its network (parameters): name another")
    right = json.dumps({"config": {"params": {"lr": 1}, "stage": "pretrain"}})
    torch.save({"leansense": {"config": right}, "state_dict": {}}, tmp_path / "b.ckpt")
    assert read_trained(tmp_path / "b.ckpt", "")[1:] == ({"lr": 1}, "pretrain")


@pytest.mark.parametrize("error", [ValueError("a\x1b[1m.ckpt: no"), OSError("a\x1b[1m.ckpt: no")])
def test_a_command_ends_with_one_line(error, capsys):
    def work():
        raise error

    assert run_command(work) == 1 and run_command(lambda: "2 frames in out") == 0
    said = capsys.readouterr()
    assert said.err == "a\\x1b[1m.ckpt: no\n" and said.out == "2 frames in out\n"
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: str(1 / 0))


# ---- tags ----


@pytest.mark.parametrize("first", [0, 1])
def test_tags_count_from_the_first_epoch(tmp_path, first):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(write_tags(tmp_path, {"a/b": [2.0, 1.0], "c": []}, first)))
    board.Reload()
    assert board.Tags()["scalars"] == ["a/b"]
    found = [(event.step, event.value) for event in board.Scalars("a/b")]
    assert found == [(first, 2.0), (first + 1, 1.0)]


def test_what_systems_share_is_written_once():
    """No system writes its own board, its own threads over pictures, or its own JSON answers."""
    found = {}
    for path in sorted((ROOT / "lib/leansense").glob("*/*.py")):
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        found[path.relative_to(ROOT / "lib/leansense").as_posix()] = names
    writers = {name for name, used in found.items() if "SummaryWriter" in used}
    assert writers == {"core/tags.py"}
    doctors = ["leaf/data", "simbev/data", "beam/data", "openvocab/data", "xad/doctor"]
    assert all("try_files" in found[f"{name}.py"] for name in doctors)
    assert not any("ThreadPoolExecutor" in found[f"{name}.py"] for name in doctors)
    ends = [f"{name}/use.py" for name in ("simbev", "beam", "xad", "openvocab")]
    assert all({"run_command", "write_answer", "write_picture"} <= found[name] for name in ends)
