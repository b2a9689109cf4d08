"""Recall and average precision of openvocab, against hand-computed values."""

import pytest
import torch
from torch import nn

from conftest import message
from leansense.openvocab import data
from leansense.openvocab.evaluate import (
    Precision,
    Recall,
    best_overlaps,
    evaluate,
    find_corners,
    find_types,
    score_pairs,
)

ANSWERS = torch.tensor([[0.0, 0, 24, 10], [0, 0, 10, 10], [0, 0, 30, 10]])
CHAIN = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
RANKED = torch.tensor([[[0.9], [0.8], [0.7]]])
OPTIONS = {"data": "standin", "standin": 40, "image_size": 64, "batch_size": 4}


def ask(name: str, boxes=CHAIN, types=("people",), sentences=(1,), novelty="seen") -> dict:
    """A batch of one picture and one phrase."""
    entry = {"boxes": boxes.numpy(), "types": types, "sentences": sentences, "novelty": novelty}
    return {"id": [name], "groups": [[entry]]}


def count(protocol: str, *batches: dict, **more) -> dict:
    recall = Recall(protocol, **more)
    for batch in batches:
        recall.update(ANSWERS[None], RANKED, batch)
    return recall.compute()


def test_overlaps_under_both_protocols():
    each = torch.stack([best_overlaps(ANSWERS, CHAIN[k : k + 1], "any") for k in range(2)], 1)
    wanted = [[0.4167, 0.1333], [1, 0], [0.3333, 0.3333]]
    torch.testing.assert_close(each, torch.tensor(wanted), atol=1e-4, rtol=0)
    merged = best_overlaps(ANSWERS, CHAIN, "merged")
    torch.testing.assert_close(merged, torch.tensor([0.8, 0.3333, 1]), atol=1e-4, rtol=0)


def test_protocols_disagree_in_both_directions():
    batch = ask("1")
    any_box, merged = count("any", batch), count("merged", batch)
    assert (any_box["recall1"], any_box["recall5"], any_box["upper"]) == (0, 1, 1)
    assert merged["recall1"] == 1
    one = Recall("any"), Recall("merged")
    for recall in one:
        recall.update(ANSWERS[None, 1:2], RANKED[:, :1], batch)
    assert [recall.compute()["recall1"] for recall in one] == [1, 0]


def test_mentions_types_and_novelty():
    found = count(
        "any",
        ask("1", types=("people", "other"), sentences=(1, 1, 4)),
        ask("2", ANSWERS[:1], novelty="combination"),
        ask("3", CHAIN[:0]),
    )
    assert found["n_phrases"] == 4 and found["recall1"] == pytest.approx(1 / 4)
    assert found["n_phrases_people"] == 4 and found["n_phrases_other"] == 3
    assert found["recall1_seen"] == 0 and found["recall1_unseen"] == 1
    assert found["recall1_combination"] == 1 and "recall1_word" not in found
    assert not [name for name in found if "clothing" in name]


def test_a_picture_that_two_processes_had_counts_once(monkeypatch):
    """Each process counts its share; what a sampler gave twice is one picture."""
    here, there = Recall("any"), Recall("any")
    here.update(ANSWERS[None], RANKED, ask("1"))
    here.update(ANSWERS[None], RANKED, ask("2", ANSWERS[:1]))
    there.update(ANSWERS[None], RANKED, ask("2", ANSWERS[:1]))
    there.update(ANSWERS[None], RANKED, ask("3", ANSWERS[:1]))
    other = torch.cat(there.rows)
    both = Recall(
        "any",
        dist_sync_fn=lambda rows, group=None: [rows, other],
        distributed_available_fn=lambda: True,
    )
    both.rows = list(here.rows)
    both._update_count = 1
    found = both.compute()
    assert found["n_phrases"] == 3 and found["recall1"] == pytest.approx(2 / 3)


def test_a_process_without_a_picture_has_something_to_send():
    empty = Recall("any")
    assert torch.cat(empty.rows).shape == (0, 6) and empty.compute() == {}
    empty.update(ANSWERS[None], RANKED, ask("1"))
    empty.reset()
    assert torch.cat(empty.rows).shape == (0, 6)


def test_an_unannounced_type_is_one_line():
    said = message(ValueError, lambda: count("any", ask("9", types=("robots",))))
    assert "9: phrase type 'robots'" in said
    assert "any" in message(ValueError, lambda: Recall("all"))


def picture(corners, objectness, fits, positive, boxes, novelty) -> tuple:
    """Arguments of Precision.update for one picture of 100 pixels."""
    phrases = [f"thing {k}" for k in range(fits.shape[1])]
    batch = {
        "phrases": [phrases],
        "positive": [positive],
        "groups": [[{"novelty": n} for n in novelty]],
        "boxes": [boxes],
        "frame": torch.tensor([[1.0, 0, 0, 100]]),
    }
    return corners[None], fits[None], torch.logit(objectness)[None], batch


def test_average_precision():
    found = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    boxes = torch.tensor([[0.05, 0.05, 0.1, 0.1], [0.55, 0.55, 0.1, 0.1]])
    fits = torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.1, 0.9]])
    precision = Precision()
    sure = torch.tensor([0.9, 0.8, 0.7])
    right = torch.eye(2, dtype=torch.bool)
    precision.update(*picture(found, sure, fits, right, boxes, ("seen", "word")))
    scores = precision.compute()
    for name in ("map", "map50", "map75"):
        assert scores[name] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert scores["ar"] == 1 and scores["map50_phrase"] == 1 and scores["map50_unseen"] == 1
    precision.reset()
    assert precision.boxes.compute()["map"] == -1


def test_average_precision_of_one_overlap():
    """An IoU of 0.82 is right at seven thresholds of ten; nothing said is 0."""
    precision = Precision()
    found = torch.tensor([[0.0, 0, 82, 100]])
    one, half = torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([0.5])
    right = torch.ones(1, 1, dtype=torch.bool)
    precision.update(*picture(found, half, torch.ones(1, 1), right, one, ("seen",)))
    scores = precision.compute()
    assert scores["map"] == pytest.approx(0.7) and scores["map_phrase"] == pytest.approx(0.7)
    assert "map50_unseen" not in scores
    precision.reset()
    precision.update(*picture(found[:0], half[:0], torch.ones(0, 1), right, one, ("seen",)))
    assert precision.compute()["map"] == 0


def test_two_chains_with_the_same_words_are_one_class():
    found = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    boxes = torch.tensor([[0.05, 0.05, 0.1, 0.1], [0.55, 0.55, 0.1, 0.1]])
    args = list(picture(found, torch.tensor([0.9, 0.8]), torch.full((2, 2), 0.9),
                        torch.eye(2, dtype=torch.bool), boxes, ("seen", "seen")))  # fmt: skip
    args[3]["phrases"] = [["a man", "a man"]]
    precision = Precision()
    precision.update(*args)
    assert precision.compute()["map50_phrase"] == pytest.approx(1)


def test_corners_leave_the_letter_box_and_the_defect_is_kept():
    batch = {"frame": torch.tensor([[0.5, 0.0, 25.0, 100.0]]), "size": torch.tensor([[100, 200]])}
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.25], [0.5, 0.1, 1.0, 0.2]]])
    found = find_corners({"boxes": boxes}, batch)
    assert found[0].tolist() == [[75, 25, 125, 75], [0, 0, 200, 0]]
    pixels = find_corners({"boxes": boxes}, batch, pixels=100)
    assert float(pixels.max()) < 3  # answers from 0 to 1, read as pixels


def test_scores_of_pairs():
    """Two queries, two phrases and one that is not there."""
    fits = torch.tensor([[[1.0, 0.0, 5.0], [0.0, 0.0, 5.0]]])
    mask = torch.tensor([[True, True, False]])
    found = score_pairs({"objectness": torch.zeros(1, 2), "similarity": fits, "mask": mask})
    high = 1 / (1 + torch.e**-1)
    assert found[0, 0, 0] == pytest.approx(0.5 * high * high)
    assert found[0, 1, 0] == pytest.approx(0.5 * (1 - high) * 0.5)
    assert found[0, :, 2].tolist() == [0, 0]
    alone = score_pairs({"objectness": torch.zeros(1, 2), "similarity": fits, "mask": ~mask & mask})
    assert alone.tolist() == [[[0] * 3] * 2]


class Oracle(nn.Module):
    """Answers with the targets, in as many queries as there are boxes."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def answer(self, batch):
        queries, words = (max(map(len, batch[name])) for name in ("boxes", "phrases"))
        boxes = torch.full((len(batch["id"]), queries, 4), 0.5)
        fit = torch.full((len(boxes), queries, words), -20.0)
        for k, own in enumerate(batch["boxes"]):
            boxes[k, : len(own)] = own
            fit[k, : len(own), : len(batch["phrases"][k])][batch["positive"][k]] = 20.0
        sure = torch.stack([20.0 - 40 * (torch.arange(queries) >= len(b)) for b in batch["boxes"]])
        mask = torch.arange(words) < torch.tensor([[len(own)] for own in batch["phrases"]])
        return {"boxes": boxes, "objectness": sure, "similarity": fit, "mask": mask}


@pytest.fixture(scope="module")
def drawn(own_data_root):
    return data.dataset(OPTIONS)


def test_perfect_boxes_score_one(drawn):
    found = evaluate(Oracle(), data.loaders(drawn, OPTIONS)["test"], find_types(drawn))
    for name in ("recall1", "recall1_seen", "recall1_unseen", "recall10", "upper"):
        assert found[name] == 1
    assert 0 < found["merged_recall1"] < 1  # a plural phrase has several boxes, not one around them
    for name in ("map", "map50", "map_phrase", "map50_unseen"):
        assert found[name] == pytest.approx(1, abs=1e-4)
    assert found["blind_recall1"] < 0.9 and found["n_unreachable"] == 0
    mentioned = sum(
        len(entry["sentences"])
        for item in data.PhraseDataset(drawn, "test", image_size=64)
        for entry in item["groups"]
        if len(entry["boxes"])
    )
    assert found["n_phrases"] == mentioned


def test_merged_boxes_trained_for_score_one_under_that_protocol(drawn):
    merged = data.loaders(drawn, OPTIONS | {"protocol": "merged"})["test"]
    found = evaluate(Oracle(), merged, find_types(drawn), precision=False)
    assert found["merged_recall1"] == 1 > found["recall1"] and "map" not in found


def test_boxes_in_pixels_score_nothing(drawn):
    """Perfect answers from 0 to 1, taken for pixels as published."""
    batches = data.loaders(drawn, OPTIONS)["test"]
    found = evaluate(Oracle(), batches, find_types(drawn), pixels=64)
    assert found["upper"] == 0 and found["map"] < 0.01
