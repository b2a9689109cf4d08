"""An openvocab checkpoint is rebuilt from itself, or refused in one line; pictures are answered."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import message, set_one
from leansense.openvocab.task import build_detector
from leansense.openvocab.use import (
    ask,
    detect,
    find_attention,
    load_detector,
    main,
    make_batch,
    write_answers,
)

PARAMS = {
    "preset": "demo", "dim": 16, "embed": 16, "image_size": 64,
    "text_encoder": "tiny", "text_dim": 16, "vocabulary": 300,
}  # fmt: skip
CAPTIONS = ["a red ball near a blue cup", "a blue ball and a red cup"] * 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_detector(PARAMS, CAPTIONS).eval()


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def write(path: Path, weights: dict, params: object = PARAMS) -> Path:
    config = json.dumps({"config": {"params": params}, "seed": 0})
    named = {f"model.{name}": value for name, value in weights.items()}
    torch.save({"leansense": {"config": config}, "state_dict": named}, path)
    return path


def test_a_checkpoint_gives_its_answers_again(tmp_path, model, picture):
    """Its tokenizer comes along: no caption is needed to read phrases as in training."""
    again, params = load_detector(write(tmp_path / "best.ckpt", model.state_dict()))
    assert not again.training and params["preset"] == "demo"
    image, phrases = Image.open(picture), ["a red ball", "the cup"]
    assert again.text.pieces("ball")[0] == model.text.pieces("ball")[0] != list(b"ball")
    assert detect(again, PARAMS, image, phrases) == detect(model, PARAMS, image, phrases)


FAULTS = {
    "a weight is missing": (lambda w: (dict(list(w.items())[1:]), PARAMS), "of another model"),
    "one too many": (lambda w: (w | {"x": torch.zeros(1)}, PARAMS), "of another model"),
    "not a number": (lambda w: (set_one(w, math.nan), PARAMS), "hold NaN"),
    "infinity": (lambda w: (set_one(w, math.inf), PARAMS), "hold Inf"),
    "another width": (lambda w: (w, PARAMS | {"dim": 32}), "of another model"),
    "another text": (lambda w: (w, PARAMS | {"text_encoder": "hash"}), "of another model"),
    "no preset": (lambda w: (w, {"dim": 16}), "name no preset"),
    "no parameters": (lambda w: (w, None), "says nothing of its network"),
    "cannot be built": (lambda w: (w, PARAMS | {"preset": "demon"}), "cannot be built"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_no_good(tmp_path, model, fault):
    spoil, said = FAULTS[fault]
    weights, params = spoil(model.state_dict())
    path = write(tmp_path / "bad.ckpt", weights, params)
    assert said in message(ValueError, load_detector, path)


def test_answers_are_boxes_in_the_picture(model, picture):
    image = Image.open(picture)
    found = detect(model, PARAMS, image, ["A  Red ball", "cup"], top=3)
    assert [answer["phrase"] for answer in found] == ["A  Red ball", "cup"]
    for answer in found:
        scores = [box["score"] for box in answer["boxes"]]
        assert 1 <= len(scores) <= 3 and scores == sorted(scores, reverse=True)
        for box in answer["boxes"]:
            x1, y1, x2, y2 = box["box"]
            assert 0 <= x1 <= x2 <= 100 and 0 <= y1 <= y2 <= 60
    assert detect(model, PARAMS, image, ["a red ball"], floor=1.0)[0]["boxes"] == []


def test_a_batch_is_as_the_loader_makes_it(own_data_root):
    from leansense.core.images import open_image
    from leansense.openvocab import data

    drawn = data.dataset({"data": "standin", "standin": 40})
    part = data.PhraseDataset(drawn, "test", image_size=64)
    item, sample = part[3], part.samples[3]
    batch = make_batch(open_image(sample.path), ["a ball"], 64)
    near = batch["images"][0].int() - torch.from_numpy(item["images"]).int()
    assert float(near.abs().float().mean()) < 6  # the loader decodes JPEG at a smaller size
    assert np.array_equal(batch["valid"][0].numpy(), item["valid"])
    assert np.array_equal(batch["frame"][0].numpy(), item["frame"])
    assert batch["size"][0].tolist() == item["size"].tolist()


def test_files_and_a_figure(tmp_path, model, picture, capsys):
    path = write(tmp_path / "best.ckpt", model.state_dict())
    answers, figure = ask(path, picture, ["a red ball", "a dog"], top=2)
    assert len(answers) == 2 and len(figure.axes) == 1
    made = write_answers(path, [picture], ["a red ball"], tmp_path / "out")
    assert json.loads(made[0].read_text())["picture"] == "street.png"
    assert (tmp_path / "out/street.png").stat().st_size > 1000
    given = [str(path), str(picture), "a red ball", "a café", "--out", str(tmp_path / "cli")]
    assert main(given) == 0
    said = json.loads(capsys.readouterr().out)
    assert [answer["phrase"] for answer in said["answers"]] == ["a red ball", "a café"]
    assert said["answers"][0]["phrase"] == json.loads(made[0].read_text())["answers"][0]["phrase"]


@pytest.mark.parametrize(
    "phrases, more, said",
    [
        ([], {}, "give a list of phrases"),
        ("a red ball", {}, "give a list of phrases"),
        (["a ball", "  "], {}, "a phrase is empty"),
        (["a ball"], {"top": 0}, "top=0"),
        (["a ball"], {"floor": 2.0}, "floor=2.0"),
    ],
)
def test_bad_questions_are_one_line(model, picture, phrases, more, said):
    image = Image.open(picture)
    assert said in message(ValueError, lambda: detect(model, PARAMS, image, phrases, **more))


def test_bad_files_are_one_line(tmp_path, model, picture, capsys):
    path = write(tmp_path / "best.ckpt", model.state_dict())
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    for file, said in ((broken, "cannot be decoded"), (tmp_path / "no.jpg", "is missing")):
        assert main([str(path), str(file), "a ball", "--out", str(tmp_path / "o")]) == 1
        assert said in capsys.readouterr().err
    assert main([str(tmp_path / "no.ckpt"), str(picture), "a ball"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_network_that_answers_nan(model, picture):
    torch.manual_seed(0)
    bad = build_detector(PARAMS, CAPTIONS).eval()
    torch.nn.init.constant_(bad.region.bias, math.nan)
    image = Image.open(picture)
    assert "NaN" in message(ValueError, lambda: detect(bad, PARAMS, image, ["a ball"]))


@pytest.mark.parametrize("changes", [{}, {"faithful": "key"}, {"anchors": 0, "queries": 5}])
def test_attention_is_shared_out_among_words_and_cells(picture, changes):
    """Each cell shares its attention among all words; the answer's is shared among all cells."""
    torch.manual_seed(0)
    made, image = build_detector(PARAMS | changes, CAPTIONS).eval(), Image.open(picture)
    found = find_attention(made, PARAMS, image, ["a red ball", "a cup"])
    words, answers = (np.array([one[name] for one in found]) for name in ("words", "answer"))
    assert words.shape == answers.shape == (2, 8, 8)  # cells of 8 pixels
    assert [one["phrase"] for one in found] == ["a red ball", "a cup"]
    total = words[0] if changes.get("faithful") else words.sum(0)
    assert np.allclose(total, 1, atol=2e-3)
    assert (answers >= 0).all() and (0 < answers.sum((1, 2))).all()
    assert (answers.sum((1, 2)) < 1).all()  # the coarser cells have their share too
