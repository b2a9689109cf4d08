"""Openvocab's detector: stated counts, layouts, gradients for all, masks, and the defects."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leansense.core.cost import flops
from leansense.openvocab.model import (
    FAITHFUL,
    PRESETS,
    Attention,
    Backbone,
    FusionLayer,
    Head,
    build,
    count_parts,
    encode_positions,
    example,
    grid_points,
    keep_attention,
    load_backbone,
    read_phrases,
    to_channels_first,
)
from leansense.openvocab.peers import PackedAttention, published_cosine, use_published_parts
from leansense.openvocab.text import HashText, TinyText

SWINS = {name: f"swin_{name}_patch4_window7_224" for name in ("tiny", "small", "base")}


def demo(seed=0, **settings):
    torch.manual_seed(seed)
    return build("demo", **{"image_size": 64, "text_dim": 16, "dim": 32, "embed": 32} | settings)


def count(*preset, **settings):
    with torch.device("meta"):
        return sum(count_parts(build(*preset, **settings)).values())


# --- stated numbers


@pytest.mark.parametrize(
    "preset, changes, parameters",
    [
        ("before", {}, 54_050_687),
        ("before_swinb", {}, 113_405_629),
        ("before_swinb", {"faithful": "layout projection"}, 112_622_269),
        ("mid", {}, 40_877_055),
        ("mid", {"faithful": "layout"}, 40_387_839 + 196_992),
        ("after", {"dec_layers": 6}, 33_667_199),
        ("after", {}, 31_294_847),
        ("after", {"dec_layers": 1}, 29_713_279),
        ("after", {"dec_layers": 6, "backbone": SWINS["small"]}, 54_985_103),
        ("after", {"dec_layers": 6, "faithful": "layout"}, 33_472_383),
        ("after", {"dec_layers": 6, "faithful": "layout", "queries": 25}, 33_473_663),
    ],
)
def test_counts(preset, changes, parameters):
    assert count(preset, **changes) == parameters


def test_counts_of_parts():
    with torch.device("meta"):
        parts = count_parts(build("after", dec_layers=6))
    assert parts == {
        "backbone": 27_519_354,
        "image projection": 196_864,
        "text projection": 131_328,
        "fusion": 789_760,
        "decoder": 4_744_704,
        "queries": 5_120,
        "box head": 49_924,
        "objectness head": 33_025,
        "region embedding": 65_792,
        "phrase embedding": 131_328,
    }


@pytest.mark.parametrize(
    "preset, changes, gflops", [("before", {}, 13.35), ("after", {"dec_layers": 6}, 9.33)]
)
def test_operations(preset, changes, gflops):
    """Two per multiply-add, at 224 pixels with 32 words and without the text encoder."""
    model = build(preset, **changes)
    assert round(flops(model, example(model, 1)) / 1e9, 2) == gflops


def test_a_frozen_tower_is_counted_apart():
    class Held(nn.Module):
        dim, trainable, held = 16, False, []

        def count(self):
            return 63_165_952

    model = demo(text=Held())
    parts = count_parts(model)
    trained = sum(p.numel() for p in model.parameters())
    assert parts.pop("frozen text encoder") == 63_165_952 and sum(parts.values()) == trained


# --- maps and their layout


@pytest.mark.parametrize("name", [SWINS["tiny"], "resnet10t"])
@pytest.mark.parametrize("strides", [(32,), (8, 16), (8, 16, 32)])
def test_maps_are_where_the_strides_say(name, strides):
    """Swin answers with channels last, a ResNet with channels first: both come out as B C H W."""
    torch.manual_seed(0)
    backbone = Backbone(name, 64, strides).eval()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[..., :32] = 255
    with torch.no_grad():
        maps = backbone(images)
        assert [level.shape[-1] for level in maps] == [64 // stride for stride in strides]
        assert [level.shape[1] for level in maps] == backbone.channels
        again = backbone(images / 255)
    assert all(torch.equal(*pair) for pair in zip(maps, again)), "uint8 and 0..1 mean the same"


def test_layout_is_asked_and_checked():
    """By shape alone (B, 7, 7, 768) passes as 7 channels; by the number of channels it does not."""
    last = torch.arange(7.0 * 7 * 768).reshape(1, 7, 7, 768)
    first = to_channels_first(last, 768, "NHWC")
    assert torch.equal(first[0, :, 2, 3], last[0, 2, 3])
    assert to_channels_first(first, 768, "NCHW") is first
    for features, layout in ((last, "NCHW"), (first, "NHWC"), (last.flatten(1, 2), "NLC")):
        with pytest.raises(ValueError, match="choose another backbone"):
            to_channels_first(features, 768, layout)


def test_the_misread_layout_has_tokens_of_width_7():
    backbone = Backbone(SWINS["tiny"], 64, misread=True).eval()
    assert backbone.channels == [2]
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64))[0].shape == (1, 2, 2, 768)
    with pytest.raises(ValueError, match="needs one map of a backbone with NHWC maps"):
        Backbone("resnet10t", 64, (32,), misread=True)


# --- every tensor learns


def total(out):
    """A loss in which everything that forward() answers takes part, each with its own weight."""
    torch.manual_seed(1)
    parts = [out, *out["earlier"]]
    kinds = ("boxes", "objectness", "region", "similarity")
    return sum(
        (part[kind] * torch.randn_like(part[kind])).sum() for part in parts for kind in kinds
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_gets_a_gradient_on_the_first_step(preset):
    """A bias of keys shifts all logits of a softmax alike: its gradient is 0 but for rounding."""
    torch.manual_seed(0)
    text = HashText(64, 256)
    model = build(preset, text=text, image_size=64)
    phrases = [["a red ball", "two blue cups near a box"], ["a dog"]]
    total(model.answer({"images": torch.rand(2, 3, 64, 64), "phrases": phrases})).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0 or name.endswith(".key.bias"), name


def test_one_key_starves_the_projections():
    """The published fusion: queries and keys get no gradient but rounding, the rest learns."""
    model = demo(text=HashText(16, 64), faithful="key")
    total(
        model.answer({"images": torch.rand(1, 3, 64, 64), "phrases": [["a cup", "a dog"]]})
    ).backward()
    attend = model.fusion[0].attend
    learns = attend.value.weight.grad.abs().max()
    for layer in (attend.query, attend.key):
        assert layer.weight.grad.abs().max() < 1e-5 * learns


# --- fusion


def spread(faithful):
    """How much what the fusion adds differs between the image tokens of a detector."""
    model = demo(faithful=faithful).eval()
    added = []
    model.fusion[0].attend.register_forward_hook(lambda *call: added.append(call[2]))
    with torch.no_grad():
        model(**example(model, 1))
    return float(added[0].std(1).max() / added[0].abs().max())


def test_fusion_varies_over_tokens():
    assert spread("") > 1e-2
    assert spread("key") < 1e-6


def test_attention_weights_are_those_of_the_answer():
    torch.manual_seed(0)
    attend, x, words = Attention(16, 2), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    with keep_attention(attend) as kept:
        out = attend(x, words, words, mask)
    value = attend.value(words).unflatten(-1, (2, 8)).transpose(1, 2)
    by_hand = attend.out((kept[0] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand, out, atol=1e-5, rtol=1e-5)
    assert attend.kept is None and (kept[0][0, ..., 2:] == 0).all()


# --- masks


def test_padding_of_text_changes_nothing():
    """More phrases beside it and padded words behind it: an image's answer stays."""
    model = demo(text=HashText(16, 64)).eval()
    images = torch.rand(2, 3, 64, 64)
    short, long = ["a red ball"], ["two cups", "a dog left of a very big blue box", "a cat"]
    with torch.no_grad():
        both = model.answer({"images": images, "phrases": [short, long]})
        alone = model.answer({"images": images[:1], "phrases": [short]})
    assert both["mask"].tolist() == [[True, False, False], [True] * 3]
    for name in ("boxes", "objectness", "region"):
        torch.testing.assert_close(both[name][:1], alone[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        both["similarity"][:1, :, :1], alone["similarity"], atol=1e-4, rtol=1e-4
    )


def test_words_behind_the_mask_change_nothing():
    model = demo().eval()
    inputs = example(model, 1, phrases=2, words=4)
    inputs["texts"]["token_mask"][:, 5:] = False
    with torch.no_grad():
        before = model(**inputs)["boxes"]
        inputs["texts"]["tokens"][:, 5:] += 100
        assert torch.equal(model(**inputs)["boxes"], before)
        inputs["texts"]["tokens"][:, :5] += 1
        assert not torch.equal(model(**inputs)["boxes"], before)


def test_the_border_of_a_letterbox_is_masked():
    """With nothing valid in the lower half, what the tokens there hold changes no other query."""
    model = demo(text=HashText(16, 64)).eval()
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[:, 32:] = False
    with torch.no_grad():
        tokens, cells, _ = model.look(torch.rand(1, 3, 64, 64), valid)
    assert cells.shape == tokens.shape[:2]
    assert cells[0].tolist() == [True] * 32 + [False] * 32 + [True] * 8 + [False] * 8
    layer, memory = model.decoder[0], tokens.clone()
    memory[:, 32:64] += 9
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        pair = [layer(x, None, m, cells) for m in (tokens, memory)]
    assert torch.equal(*pair)


def test_an_image_without_phrases_gives_finite_answers_and_gradients():
    model = demo(text=HashText(16, 64))
    out = model.answer({"images": torch.rand(2, 3, 64, 64), "phrases": [[], []]})
    assert out["mask"].sum() == 0 and out["similarity"].isfinite().all()
    total(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_phrases_of_a_batch():
    """Each string is read once, and comes back where it was asked for."""
    text = HashText(8, 64)
    asked = []
    text.encode = lambda phrases: asked.append(list(phrases)) or HashText.encode(text, phrases)
    texts = read_phrases(text, [["a cup", "a red ball"], ["a red ball"], []])
    assert asked == [["a cup", "a red ball"]]
    alone = HashText.encode(text, ["a red ball"])
    torch.testing.assert_close(texts["pooled"][1, 0], alone[2][0])
    torch.testing.assert_close(texts["pooled"][0, 1], alone[2][0])
    torch.testing.assert_close(texts["tokens"][0, 2:5], alone[0][0])
    assert texts["token_mask"].sum(1).tolist() == [5, 3, 0]
    assert texts["mask"].tolist() == [[True, True], [True, False], [False, False]]


# --- what comes out


def test_answers():
    model = demo(text=TinyText((), 16, 300, heads=2), queries=5)
    out = model.answer({"images": torch.rand(2, 3, 64, 64), "phrases": [["a cup"], ["a", "b"]]})
    shapes = {k: tuple(v.shape) for k, v in out.items() if k != "earlier"}
    assert shapes == {
        "boxes": (2, 5, 4),
        "objectness": (2, 5),
        "region": (2, 5, 32),
        "phrase": (2, 2, 32),
        "similarity": (2, 5, 2),
        "mask": (2, 2),
    }
    assert 0 < out["boxes"].min() and out["boxes"].max() < 1
    cosine = out["similarity"] * model.config["tau"]
    assert cosine.abs().max() <= 1 + 1e-5
    assert out["earlier"][0]["boxes"].shape == (2, 16, 4), "all cells, before the best are chosen"
    torch.testing.assert_close(cosine, F.cosine_similarity(
        out["region"][:, :, None], out["phrase"][:, None], dim=-1
    ))  # fmt: skip


def test_queries_from_the_image_start_at_their_cells():
    """All 16 cells by default; otherwise those with the highest objectness, of valid ones."""
    model = demo(text=HashText(16, 64)).eval()
    last = [layer for layer in model.box if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
        batch = {"images": torch.rand(1, 3, 64, 64), "phrases": [["a cup"]]}
        out = model.answer(batch)
        torch.testing.assert_close(out["boxes"][0, :, :2], grid_points(4, 4), atol=1e-4, rtol=0)
        every = out["earlier"][0]
        model.config["queries"] = 3
        few = model.answer(batch)
        assert torch.equal(few["earlier"][0]["objectness"], every["objectness"])
        best = every["objectness"][0].topk(3).indices
        torch.testing.assert_close(
            few["boxes"][0, :, :2], grid_points(4, 4)[best], atol=1e-4, rtol=0
        )
        batch["valid"] = torch.zeros(1, 64, 64, dtype=torch.bool)
        batch["valid"][:, :32, :32] = True
        inside = model.answer(batch)["boxes"][0, :, :2]
    assert (inside < 0.5).all()


def test_places():
    """Codes tell places apart, are alike for near ones, and agree between levels."""
    points = grid_points(2, 3)
    assert points[1].tolist() == pytest.approx([0.5, 0.25])
    codes = F.normalize(encode_positions(grid_points(4, 4), 32), dim=-1)
    alike = codes @ codes.T
    assert alike[0].argmax() == 0 and alike[0, 1] > alike[0, 3] and alike[0, 4] > alike[0, 12]
    centre = encode_positions(torch.tensor([[0.5, 0.5]]), 32)
    torch.testing.assert_close(centre, encode_positions(grid_points(3, 3), 32)[4:5])


def test_dropout_on_outputs_is_a_defect_that_can_be_had():
    torch.manual_seed(0)
    x = torch.randn(4000, 16)
    ours, published = (Head(16, 8, 4, dropout=0.1, on_output=on) for on in (False, True))
    assert (ours(x) == 0).sum() == 0
    assert 0.08 < (published(x) == 0).float().mean() < 0.12
    settings = {"head_dropout": 0.1, "anchors": False, "queries": 200}
    for faithful, share in (("dropout", 0.1), ("", 0.0)):
        model = demo(faithful=faithful, **settings).train()
        halves = (model(**example(model, 4))["boxes"] == 0.5).float().mean()
        assert halves == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("name", sorted(FAITHFUL))
def test_each_defect_runs_alone(name):
    """A misread map of 2 x 2 cells and 768 channels becomes 1,536 tokens of width 2."""
    settings = {"text_dim": 32} if name == "projection" else {}
    if name == "layout":
        settings |= {"backbone": SWINS["tiny"], "strides": (32,), "anchors": False, "queries": 4}
    model = demo(faithful=name, **settings).eval()
    with torch.no_grad():
        out = model(**example(model, 1))
    assert out["boxes"].isfinite().all() and model.config["faithful"] == (name,)
    if name == "layout":
        tokens, _, _ = model.look(torch.rand(1, 3, 64, 64))
        assert tokens.shape == (1, 2 * 768, 32) and model.project[0].in_features == 2


def test_two_builds_with_one_seed_agree():
    models = [demo(seed=3) for _ in range(2)]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert not torch.equal(weights[0], torch.zeros_like(weights[0]))
    assert torch.equal(*weights)


# --- the published maths


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_packed_attention_is_the_same(need_weights):
    torch.manual_seed(0)
    ours, x, words = Attention(32, 4), torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    packed = PackedAttention(ours, need_weights)
    torch.testing.assert_close(packed(x, words, words, mask), ours(x, words, words, mask))
    assert sum(p.numel() for p in packed.parameters()) == sum(p.numel() for p in ours.parameters())


def test_a_detector_of_published_parts_answers_the_same():
    model = demo(head_dropout=0.1).eval()
    other = use_published_parts(model)
    assert not any(type(m) in (Attention, Head) for m in other.modules())
    assert any(type(m) is Attention for m in model.modules()), "the original is left alone"
    with torch.no_grad():
        ours, theirs = (network(**example(model, 2)) for network in (model, other))
    for name in ("boxes", "objectness", "similarity"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_cosines():
    """The vectors of the specification; a row of zeros is NaN there and 0 here."""
    regions, texts = torch.tensor([[3.0, 4], [1, 0], [0, 2]]), torch.eye(2)
    wanted = torch.tensor([[0.6, 0.8], [1, 0], [0, 1]])
    torch.testing.assert_close(published_cosine(regions, texts), wanted)
    torch.testing.assert_close(F.normalize(regions, dim=-1) @ texts.T, wanted)
    assert published_cosine(torch.zeros(1, 2), texts).isnan().all()
    assert (F.normalize(torch.zeros(1, 2), dim=-1) @ texts.T == 0).all()


# --- weights and bad input


def test_backbone_weights_from_a_file(tmp_path):
    first, second = (Backbone("resnet10t", 64, (8, 16)) for _ in range(2))
    path = tmp_path / "trunk.pt"
    state = first.network.state_dict()
    torch.save({"state_dict": state | {"fc.weight": torch.zeros(10, 4)}}, path)
    load_backbone(second, str(path))
    assert all(
        torch.equal(value, second.network.state_dict()[name]) for name, value in state.items()
    )
    for broken, message in (
        ({n: v for n, v in state.items() if n != "conv1.0.weight"}, "has no conv1.0.weight"),
        (state | {"conv1.0.weight": torch.zeros(1)}, "conv1.0.weight is"),
    ):
        torch.save(broken, path)
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(second, str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "preset, settings, message",
    [
        ("afer", {}, "unknown.*after"),
        ("after", {"dims": 3}, "dims is no setting.*dim"),
        ("after", {"faithful": "keys"}, "unknown.*key"),
        ("after", {"image_size": 200}, "multiple of 32: 192"),
        ("after", {"queries": 0}, "queries=0"),
        ("after", {"dim": 250}, "dim=250"),
        ("after", {"head_dropout": 1.0}, "head_dropout=1.0"),
        ("after", {"faithful": "projection"}, "needs dim=512"),
        ("after", {"backbone": "swin_tinny"}, "unknown to timm"),
        ("demo", {"strides": (5,), "image_size": 320}, "no map at stride 5"),
        ("demo", {"fusion_heads": 7}, "7 heads"),
    ],
)
def test_bad_settings(preset, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        with torch.device("meta"):
            build(preset, **settings)
    assert "\n" not in str(error.value)


def test_no_text_encoder_no_answer():
    with pytest.raises(ValueError, match="text='tiny'"):
        demo().answer({"images": torch.zeros(1, 3, 64, 64), "phrases": [["a"]]})


def test_example_is_fixed():
    model = demo()
    first, second = (example(model, 2, phrases=3, words=2) for _ in range(2))
    assert torch.equal(first["images"], second["images"])
    assert first["texts"]["tokens"].shape == (2, 6, 16)
    assert FusionLayer(16, 2)(torch.zeros(1, 2, 16), first["texts"]["tokens"][:1]).shape == (
        1,
        2,
        16,
    )
