"""What systems share in core: images, metrics of classifiers, claims, weights, results."""

import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score

from conftest import message
from leansense.core import claims, images, metrics
from leansense.core.results import history_of, value_of
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
