"""Matching and losses of openvocab, against hand-computed values and a loop over pictures."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from conftest import message
from leansense.openvocab import match as module
from leansense.openvocab.match import (
    Costs,
    Matches,
    assign,
    box_losses,
    check_corners,
    contrast,
    contrast_phrases,
    contrast_regions,
    cost_pairs,
    count_boxes,
    losses,
    match,
    objectness_loss,
    overlap,
    pad_targets,
    to_corners,
)

FOUND = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
WANTED = torch.tensor([[0.75, 0.75, 0.5, 0.5], [0.3, 0.25, 0.4, 0.5]])
FIT = torch.tensor([[0.2, 0.9], [0.8, 0.1], [0.5, 0.5]])


def draw(pictures=3, queries=6, seed=0, most=5, grad=False) -> tuple[dict, dict]:
    """What a network could say of a batch, and the batch."""
    rng = torch.Generator().manual_seed(seed)
    phrases = [[f"thing {k}" for k in range(n + 1)] for n in range(pictures)]
    count = [int(torch.randint(1, most + 1, (1,), generator=rng)) for _ in range(pictures)]
    batch = {
        "phrases": phrases,
        "boxes": [torch.rand(g, 4, generator=rng) * 0.4 + 0.1 for g in count],
        "positive": [torch.rand(g, len(p), generator=rng) < 0.6 for g, p in zip(count, phrases)],
    }
    width = pictures
    region = normalize(torch.randn(pictures, queries, 8, generator=rng), dim=-1)
    phrase = normalize(torch.randn(pictures, width, 8, generator=rng), dim=-1)
    output = {
        "boxes": torch.rand(pictures, queries, 4, generator=rng) * 0.4 + 0.1,
        "objectness": torch.randn(pictures, queries, generator=rng),
        "region": region,
        "phrase": phrase,
        "similarity": region @ phrase.mT / 0.1,
        "mask": torch.tensor([[k < len(p) for k in range(width)] for p in phrases]),
    }
    if grad:
        output = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in output.items()}
    return output, batch


def test_boxes():
    pairs = [
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, -0.0793651),
        ([0, 0, 4, 4], [1, 1, 3, 3], 0.25, 0.25),
    ]
    for one, two, iou, giou in [*pairs, ([0, 0, 1, 1], [2, 2, 3, 3], 0, -0.7777778)]:
        one, two = (torch.tensor([box], dtype=torch.float32) for box in (one, two))
        assert float(box_iou(one, two)) == pytest.approx(iou, abs=1e-6)
        assert float(overlap(one, two)) == pytest.approx(giou, abs=1e-6)
    corners = to_corners(torch.tensor([0.5, 0.5, 0.4, 0.2]))
    torch.testing.assert_close(corners, torch.tensor([0.3, 0.4, 0.7, 0.6]))


def test_a_box_inside_out_is_refused():
    bad = torch.tensor([[0.0, 0, 1, 1], [0.6, 0.6, 0.4, 0.4]])
    assert float(overlap(bad[1], torch.tensor([0.3, 0.3, 0.7, 0.7]))) == pytest.approx(0.25)
    assert "[0.6, 0.6, 0.4, 0.4] ends before it begins" in message(ValueError, check_corners, bad)
    assert check_corners(bad[:1]) is not None


def test_shares_against_pixels():
    share, pixel = torch.tensor([0.2, 0.2, 0.6, 0.6]), torch.tensor([40.0, 30, 120, 200])
    assert float((share - pixel).abs().mean()) == pytest.approx(97.1)
    assert float(overlap(share, pixel)) == pytest.approx(-0.4318, abs=1e-4)


def test_costs_and_assignment():
    costs = cost_pairs(FIT, FOUND, WANTED)
    expected = torch.tensor([[5.8, -1.75], [-2.8, 6.15], [6.5, 6.85]])
    torch.testing.assert_close(costs, expected)
    pairs = assign(costs[None], [2])
    assert pairs.query.tolist() == [0, 1] and pairs.box.tolist() == [1, 0]
    assert float(costs[pairs.query, pairs.box].sum()) == pytest.approx(-4.55)
    l1, giou = box_losses(FOUND[pairs.query], WANTED[pairs.box], 2)
    assert (float(l1), float(giou)) == pytest.approx((0.075, 0.1), abs=1e-6)
    assert float((FOUND[pairs.query] - WANTED[pairs.box]).abs().mean()) == pytest.approx(0.01875)


def test_objectness():
    logits, paired = torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[True, False, False]])
    each = [float(objectness_loss(logits[:, k : k + 1], paired[:, k : k + 1])) for k in range(3)]
    assert each == pytest.approx([0.1269280, 0.3132617, 0.6931472], abs=1e-6)
    assert float(objectness_loss(logits, paired)) == pytest.approx(0.3777790, abs=1e-6)
    focal = [
        float(objectness_loss(logits[:, k : k + 1], paired[:, k : k + 1], "focal"))
        for k in range(3)
    ]
    assert focal == pytest.approx([0.00045089, 0.01699354, 0.12996510], abs=1e-7)


def test_contrast():
    regions = normalize(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), dim=-1)
    cosines = regions @ torch.eye(2)
    torch.testing.assert_close(cosines, torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]))
    right = torch.tensor([[False, True], [True, False]])
    each = [float(contrast(cosines[k : k + 1] / 0.1, right[k : k + 1])) for k in range(2)]
    assert each == pytest.approx([0.1269280, 0.0000454], abs=1e-6)
    assert float(contrast(cosines[:2] / 0.1, right)) == pytest.approx(0.0634867, abs=1e-6)
    assert float(contrast(cosines[:2] / 0.07, right)) == pytest.approx(0.0279223, abs=1e-6)


def test_several_right_answers_cost_nothing():
    """Five regions with one text: the published loss stays at log 5."""
    same = torch.full((5, 5), 10.0)
    assert float(contrast(same, torch.ones(5, 5, dtype=torch.bool))) == pytest.approx(0, abs=1e-6)
    assert float(contrast(same, torch.eye(5, dtype=torch.bool))) == pytest.approx(1.609, abs=1e-3)


def test_the_same_words_are_right_for_each_other():
    batch = {
        "phrases": [["a man", "a scarf", "a man"], ["a man"]],
        "boxes": [torch.rand(2, 4), torch.rand(1, 4)],
        "positive": [
            torch.tensor([[True, False, False], [False, True, False]]),
            torch.tensor([[True]]),
        ],
    }
    padded = pad_targets(batch, 4)
    assert padded.positive[0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert padded.words.tolist() == [[0, 1, 0, -1], [0, -1, -1, -1]] and padded.counts == (2, 1)
    pairs = Matches(*(torch.tensor(v) for v in ([0, 0, 1], [0, 1, 0], [0, 1, 0])))
    region = normalize(torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]]), dim=-1)
    phrase = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [0, 0]]])
    output = {"region": region, "phrase": phrase, "similarity": region @ phrase.mT / 0.1}
    output["mask"] = padded.words >= 0
    for negatives in ("image", "batch"):
        assert float(contrast_regions(output, padded, pairs, negatives)) < 1e-4
    assert float(contrast_phrases(output, padded, pairs)) < 1e-4


def test_phrases_of_other_pictures_count_where_asked():
    output, batch = draw()
    padded = pad_targets(batch, 3)
    pairs = match(output, padded)
    near, far = (float(contrast_regions(output, padded, pairs, n)) for n in ("image", "batch"))
    assert far > near > 0
    logits = output["region"][pairs.picture, pairs.query] @ output["phrase"].flatten(0, 1).mT / 0.1
    there = padded.words.flatten() >= 0
    words = padded.words.flatten().tolist()
    costs = []
    for row, picture, box in zip(logits, pairs.picture.tolist(), pairs.box.tolist()):
        own = {words[3 * picture + p] for p in padded.positive[picture, box].nonzero().flatten()}
        right = torch.tensor([w in own and w >= 0 for w in words])
        if right.any():
            costs.append(row[there].logsumexp(0) - row[right].logsumexp(0))
    assert far == pytest.approx(float(torch.stack(costs).mean()), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_batch_is_matched_as_its_pictures_are(seed):
    output, batch = draw(seed=seed)
    padded = pad_targets(batch, 3)
    pairs = match(output, padded)
    for k, wanted in enumerate(batch["boxes"]):
        said = output["similarity"][k, :, : len(batch["phrases"][k])].softmax(-1)
        fit = said @ batch["positive"][k].float().mT
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (output["boxes"][k], wanted)]
        costs = 5 * torch.cdist(output["boxes"][k], wanted, p=1) - fit
        costs = costs - 2 * generalized_box_iou(*corners)
        queries, boxes = linear_sum_assignment(costs)
        mine = pairs.picture == k
        assert pairs.query[mine].tolist() == queries.tolist()
        assert pairs.box[mine].tolist() == boxes.tolist()


def test_matching_wants_no_gradient_and_keeps_its_precision():
    output, batch = draw(grad=True)
    padded = pad_targets(batch, 3)
    plain = match(output, padded)
    with torch.autocast("cpu", torch.bfloat16):
        under = match(output, padded)
        parts = losses(output, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, under))
    assert parts["loss"].dtype == torch.float32
    assert torch.equal(parts["loss"], losses(output, batch)["loss"])


def test_more_boxes_than_queries():
    output, batch = draw(queries=2, most=7, seed=1)
    counts = [len(boxes) for boxes in batch["boxes"]]
    parts = losses(output, batch)
    assert max(counts) > 2
    assert parts["unreachable"] == sum(max(0, count - 2) for count in counts)
    assert bool(parts["loss"].isfinite())


def test_nothing_to_find_still_reaches_the_network():
    output, batch = draw(grad=True)
    batch["boxes"] = [boxes[:0] for boxes in batch["boxes"]]
    batch["positive"] = [positive[:0] for positive in batch["positive"]]
    for negatives in ("image", "batch"):
        parts = losses(output, batch, Costs(negatives=negatives))
        parts["loss"].backward()
        assert float(parts["loss_bbox"]) == float(parts["loss_sim"]) == 0 < float(parts["loss_cls"])
    assert all(output[name].grad is not None for name in ("boxes", "objectness", "similarity"))


def test_a_picture_without_phrases():
    output, batch = draw()
    batch["phrases"][0], batch["positive"][0] = [], batch["positive"][0][:, :0]
    output["mask"][0] = False
    parts = losses(output, batch)
    assert bool(parts["loss"].isfinite()) and parts["unreachable"] == 0


def test_a_network_that_says_nan_has_a_loss_that_says_so():
    output, batch = draw()
    output["boxes"] = output["boxes"] * torch.nan
    assert bool(losses(output, batch)["loss"].isnan())


def test_earlier_answers_are_paid_for():
    output, batch = draw()
    earlier = {name: output[name] for name in ("boxes", "objectness", "region", "similarity")}
    once = float(losses(output, batch)["loss"])
    assert float(losses(output | {"earlier": [earlier]}, batch)["loss"]) == pytest.approx(2 * once)


def test_weights_of_the_parts():
    output, batch = draw()
    parts = losses(output, batch, Costs())
    total = sum(
        weight * float(parts[f"loss_{name}"])
        for name, weight in {"cls": 0.3, "bbox": 5, "giou": 2, "sim": 0.1}.items()
    )
    assert float(parts["loss"]) == pytest.approx(total, rel=1e-6)


def test_published_targets_in_pixels():
    output, batch = draw()
    perfect = {**output, "boxes": output["boxes"].clone()}
    for k, boxes in enumerate(batch["boxes"]):
        perfect["boxes"][k, : len(boxes)] = boxes
    right, published = losses(perfect, batch), losses(perfect, batch, Costs(pixels=224))
    assert float(right["loss_bbox"]) < 1e-6 and float(published["loss_bbox"]) > 30


def test_boxes_are_counted_over_processes(monkeypatch):
    assert count_boxes(0) == 1 and count_boxes(7) == 7
    monkeypatch.setattr(module, "world_of", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(5))
    assert count_boxes(3) == 4


@pytest.mark.parametrize(
    "given, said",
    [
        ({"objectness": "bec"}, "bce"),
        ({"negatives": "images"}, "image"),
        ({"weight_giou": -1.0}, "weight_giou=-1.0"),
        ({"weight_sim": float("nan")}, "weight_sim=nan"),
    ],
)
def test_bad_settings_are_one_line(given, said):
    assert said in message(ValueError, lambda: Costs(**given))
