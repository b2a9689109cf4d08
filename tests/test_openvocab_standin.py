"""The drawn pictures: the real layout, every awkward case, and pairs that training never sees."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import message
from leansense.openvocab import data as openvocab
from leansense.openvocab import standin as drawn
from leansense.openvocab import targets
from leansense.openvocab.flickr import SPLITS, UNSEEN

pytestmark = pytest.mark.usefixtures("own_data_root")
N = 80


@pytest.fixture(scope="module")
def folder(own_data_root):
    return drawn.standin(n=N)


@pytest.fixture(scope="module")
def data(folder):
    return openvocab.load(folder)


def phrases(data, split):
    return [m for s in data.part(split) for x in s.sentences for m in x.phrases]


def test_layout(folder, data):
    assert data.counts() == {"train": 48, "valid": 12, "test": 20}
    assert {s.width for s in data.samples} | {s.height for s in data.samples} == {
        333, 375, 400, 500,
    }  # fmt: skip
    assert all(len(s.sentences) == 5 for s in data.samples)
    assert openvocab.check(folder).ok
    assert not (folder / "val.txt").read_bytes().endswith(b"\n")
    assert (folder / "train.txt").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("split", SPLITS)
def test_every_case_is_there(data, split):
    part = data.part(split)
    many, empty, plain, border, names, accent, apostrophe, absent, unrelated, word = part[:10]
    assert len(many.objects) > 25
    assert empty.objects == () and empty.scene and empty.nobox
    assert plain.sentences[4].phrases == ()
    assert any(o.box[0] == 0 and o.box[2] == border.width - 1 for o in border.objects)
    assert any(len(o.chains) == 2 for o in names.objects)
    assert not accent.sentences[4].sentence.isascii()
    assert " , " in apostrophe.sentences[4].sentence and " 's " in apostrophe.sentences[4].sentence
    here = {c for o in absent.objects for c in o.chains} | {*absent.scene, *absent.nobox}
    assert {m.phrase_id for m in absent.sentences[4].phrases} - here
    assert [s.related for s in unrelated.sentences] == [True] * 4 + [False]
    assert any(" " not in m.phrase for m in word.sentences[4].phrases)


def test_what_all_pictures_share(data):
    """Several types of a phrase, the number 0, plural chains, chains that are the whole picture."""
    mentions = phrases(data, "train")
    assert any(len(m.phrase_type) > 1 for m in mentions)
    assert any(m.phrase_id == UNSEEN for m in mentions)
    types = {kind for m in mentions for kind in m.phrase_type}
    assert types == {
        "people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene", "other",
        "notvisual",
    }  # fmt: skip
    three = [
        targets.make_targets(s)
        for s in data.part("train")
        if any(m.phrase.startswith("three ") for x in s.sentences for m in x.phrases)
    ]
    assert three
    for found in three:
        k = next(k for k, phrase in enumerate(found.phrases) if phrase.startswith("three "))
        assert found.positive[:, k].sum() == 3
    assert all(s.scene for s in data.samples)


def test_held_out_pairs(data):
    """Never drawn nor named in train and valid; about half of what test asks."""
    assert len(drawn.HELD_OUT) == 16
    assert Counter(colour for colour, _ in drawn.HELD_OUT) == Counter(list(drawn.COLOURS) * 2)
    assert {kind for _, kind in drawn.HELD_OUT} == set(drawn.KINDS)
    for split in ("train", "valid"):
        cores = {targets.find_core(m.phrase) for m in phrases(data, split)}
        assert not cores & drawn.HELD_OUT
        words = {word for m in phrases(data, split) for word in m.phrase.lower().split()}
        assert not words & {*drawn.SUBWORDS.values(), *drawn.SYNONYMS.values()}
        assert words >= set(drawn.COLOURS) and words >= {"greenish"}
    assert {targets.find_core(m.phrase) for m in phrases(data, "test")} & drawn.HELD_OUT


def test_choice_of_groups():
    rng = np.random.default_rng(0)
    for unseen in (False, True):
        groups = [g for _ in range(300) for g in drawn.choose_groups(rng, unseen)]
        apart = np.mean([(g.colour, g.kind) in drawn.HELD_OUT for g in groups])
        assert apart == 0 if not unseen else 0.3 < apart < 0.6
        assert {g.count for g in groups} == {1, 2, 3}
        assert {g.side for g in groups} == {"", "left", "right"}


def test_every_novelty_is_asked(data):
    test = openvocab.PhraseDataset(data, "test", image_size=32)
    found = Counter(
        group["novelty"]
        for k in range(len(test))
        for group in test[k]["groups"]
        if len(group["boxes"])
    )
    assert set(found) == set(targets.NOVELTIES)
    assert found["seen"] > 20 and found["combination"] > 20


def test_left_is_left(data):
    """Of two equal things the left one has the smaller x, in every picture that names sides."""
    pairs = 0
    for s in data.samples:
        found = targets.make_targets(s)
        side = {"left": {}, "right": {}}
        for phrase, group in zip(found.phrases, found.groups, strict=True):
            words = phrase.split()
            if words[:1] == ["the"] and words[1] in side:
                side[words[1]][words[-1]] = group["boxes"][0]
        for kind in side["left"].keys() & side["right"].keys():
            pairs += 1
            assert side["left"][kind][[0, 2]].mean() < side["right"][kind][[0, 2]].mean()
    assert pairs > 3


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_a_box_ends_where_its_thing_ends(kind):
    thing = drawn.draw_thing(kind, "red", 60, np.random.default_rng(0))
    solid = np.asarray(thing)[..., 3] > 127
    assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any()
    assert 40 < thing.height < 100


def test_byte_for_byte(folder, tmp_path):
    again = drawn.standin(tmp_path, n=N)
    assert again.name == folder.name
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(names) > 3 * N

    def digest(root: Path) -> str:
        return hashlib.sha256(b"".join((root / name).read_bytes() for name in names)).hexdigest()

    assert digest(folder) == digest(again)
    other = drawn.standin(tmp_path, n=40, seed=1) / "flickr30k_images" / "1042.jpg"
    assert other.read_bytes() != (folder / "flickr30k_images" / "1042.jpg").read_bytes()


def test_too_few_pictures():
    assert "at least 40 pictures" in message(ValueError, drawn.standin, n=39)
