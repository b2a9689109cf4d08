"""Pictures and phrases: parsers of two layouts, their faults, targets, letter-box, batches."""

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, message, run
from leansense.core import check as doctor
from leansense.openvocab import coco, flickr, targets
from leansense.openvocab import data as openvocab
from leansense.openvocab.flickr import Mention, Object, Sample, Sentence
from leansense.openvocab.standin import standin

pytestmark = pytest.mark.usefixtures("own_data_root")


@pytest.fixture(scope="module")
def folder(own_data_root):
    return standin(n=40)


@pytest.fixture(scope="module")
def data(folder):
    return openvocab.load(folder)


@pytest.fixture()
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "my pictures"))


# ---- one caption

GOLDEN = [
    (
        "[/EN#12/people A child] holds [/EN#13/other/clothing a red scarf] near"
        " [/EN#0/notvisual it] .",
        "A child holds a red scarf near it .",
        [
            ("A child", 0, "12", ("people",)),
            ("a red scarf", 3, "13", ("other", "clothing")),
            ("it", 7, "0", ("notvisual",)),
        ],
    ),
    ("A day without things .", "A day without things .", []),
    ("[/EN#5/other Balls] !", "Balls !", [("Balls", 0, "5", ("other",))]),
    (
        "The [/EN#9/people boy 's friend] , [/EN#9/people he ] waits",
        "The boy 's friend , he waits",
        [("boy 's friend", 1, "9", ("people",)), ("he", 5, "9", ("people",))],
    ),
    (
        "ein [/EN#7/scene Café] [sic] a] b",
        "ein Café [sic] a] b",
        [("Café", 1, "7", ("scene",))],
    ),
]


@pytest.mark.parametrize("line, sentence, phrases", GOLDEN, ids=range(len(GOLDEN)))
def test_parse_golden(line, sentence, phrases):
    found = flickr.parse_sentence(line)
    assert found.sentence == sentence
    assert found.phrases == tuple(Mention(*phrase) for phrase in phrases)
    words = sentence.split()
    for m in found.phrases:
        here = words[m.first_word_index : m.first_word_index + len(m.phrase.split())]
        assert " ".join(here) == m.phrase


@pytest.mark.parametrize(
    "line, said",
    [
        ("a [/EN#3/people man", "the bracket of chain 3 is not closed; add ']'"),
        ("a [/EN#3/people man [/EN#4/other hat] .", "the bracket of chain 3 is not closed"),
        ("a [/EN#3/people ] .", "the phrase of chain 3 is empty; write its words"),
        ("a [/EN#3/person man]", "type 'person' is unknown; nearest is 'people'"),
        ("a [/EN#3 man]", "'[/EN#3' opens no phrase"),
        ("[/EN#1/other x][/EN#2/other z]", "'x][/EN#2/other' opens a phrase within a word"),
        ("a [/EN#/people man]", "opens no phrase"),
    ],
)
def test_damaged_caption(line, said):
    text = message(ValueError, flickr.parse_sentence, line, "Sentences/1.txt, line 2")
    assert said in text and text.startswith("Sentences/1.txt, line 2: ")


def test_sentence_file(tmp_path):
    file = tmp_path / "7.txt"
    assert str(file) in message(FileNotFoundError, flickr.read_sentences, file)
    file.write_text("a\n" * 4)
    text = message(ValueError, flickr.read_sentences, file)
    assert text == f"{file}: 4 captions, 5 are needed; write one a line"
    file.write_text("a\nb\n\nd\ne\n")
    assert f"{file}, line 3: the caption is empty" in message(
        ValueError, flickr.read_sentences, file
    )
    file.write_bytes("a\nb\n[/EN#1/scene café] c\nd\ne".encode("latin-1"))
    text = message(ValueError, flickr.read_sentences, file)
    assert text == f"{file}, line 3: not UTF-8; save the file as UTF-8"
    file.write_text("a\nb\n[/EN#1/scene café] c\nd\ne\n\n", encoding="utf-8")
    found = flickr.read_sentences(file)
    assert [s.number for s in found] == [1, 2, 3, 4, 5] and found[2].phrases[0].phrase == "café"


# ---- one annotation

HEAD = "<annotation><filename>1.jpg</filename><size>{}</size>{}</annotation>"
SIZE = "<width>500</width><height>333</height><depth>3</depth>"


def box(x1, y1, x2, y2, *names):
    names = "".join(f"<name>{name}</name>" for name in names)
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (x1, y1, x2, y2), strict=True)
    return (
        f"<object>{names}<bndbox>{''.join(f'<{n}>{v}</{n}>' for n, v in corners)}</bndbox></object>"
    )


def flags(scene, nobox, name):
    return f"<object><name>{name}</name><scene>{scene}</scene><nobndbox>{nobox}</nobndbox></object>"


def test_annotation_golden(tmp_path):
    """Several boxes of a chain, several names of a box, both flags; coordinates from 0."""
    body = box(1, 1, 500, 40, "12", "15") + box(5, 6, 7, 8, "12")
    body += flags(1, 0, "20") + flags(0, 1, "21") + flags(1, 1, "22")
    file = tmp_path / "1.xml"
    file.write_text(HEAD.format(SIZE, body))
    found = flickr.read_annotation(file)
    assert found.boxes == {"12": [[0, 0, 499, 39], [4, 5, 6, 7]], "15": [[0, 0, 499, 39]]}
    assert (found.scene, found.nobox) == (("20", "22"), ("21", "22"))
    assert (found.width, found.height, found.depth, found.filename) == (500, 333, 3, "1.jpg")


@pytest.mark.parametrize(
    "size, body, said",
    [
        (SIZE, box(9, 9, 3, 20, "1"), "object 1: box x1 8 y1 8 x2 2 y2 19 is inverted"),
        (SIZE, box(1, 1, 5, 5, "1") + box(501, 1, 505, 5, "1"), "object 2: box x1 500"),
        (SIZE, box(1, 334, 5, 340, "1"), "is outside the 500x333 picture"),
        (SIZE, box(1, 1, "x", 5, "1"), "xmax is 'x'; a whole number is needed"),
        (SIZE, box(1, 1, 5, 5), "an object has no name"),
        (SIZE, box(1, 1, 5, 5, ""), "an object has no name"),
        (SIZE, flags(0, 0, "1"), "has neither a box nor a reason for none"),
        ("<width>500</width>", "", "height is missing"),
        (SIZE.replace("500", "0"), "", "size 0x333; give pixels"),
        (SIZE, "<object>", "not XML (mismatched tag"),
    ],
)
def test_damaged_annotation(tmp_path, size, body, said):
    file = tmp_path / "1.xml"
    file.write_text(HEAD.format(size, body))
    text = message(ValueError, flickr.read_annotation, file)
    assert said in text and str(file) in text and "; " in text
    assert "missing" in message(FileNotFoundError, flickr.read_annotation, tmp_path / "2.xml")


# ---- lists and folders


def test_lists(tmp_path):
    file = tmp_path / "train.txt"
    assert "missing" in message(FileNotFoundError, flickr.read_list, file)
    file.write_text("36979\n101093029.jpg\n\n7")
    assert flickr.read_list(file) == ["36979", "101093029", "7"]
    file.write_text("1\n2\n1.jpg\n")
    text = message(ValueError, flickr.read_list, file)
    assert text == f"{file}, line 3: 1 stands in line 1 already; remove one"
    file.write_text("1 2\n")
    assert "'1 2' is no identity" in message(ValueError, flickr.read_list, file)


def test_unrelated_captions(tmp_path):
    file = tmp_path / "UNRELATED_CAPTIONS"
    assert flickr.read_unrelated(file) == set()
    file.write_text("# format: <imageID> <sentence number>\n129602216 5\n3367384342 2\n")
    assert flickr.read_unrelated(file) == {("129602216", 5), ("3367384342", 2)}
    file.write_text("129602216 6\n")
    assert "line 1: '129602216 6' names no caption" in message(
        ValueError, flickr.read_unrelated, file
    )


def test_missing_folders_and_parts(tmp_path, copy):
    text = message(FileNotFoundError, openvocab.load, tmp_path / "nothing")
    assert "flickr30k_images: folder is missing" in text and "2 more problems" in text
    first = flickr.read_list(copy / "train.txt")[0]
    with open(copy / "val.txt", "a") as file:
        file.write(f"\n{first}")
    assert f"{first} is in train.txt too" in message(ValueError, openvocab.load, copy)
    (copy / "val.txt").write_text("\n")
    assert "val.txt: lists no picture" in message(ValueError, openvocab.load, copy)


def test_every_fault_is_listed(copy):
    """The doctor names all damaged files; loading stops at the first."""
    a, b, c, d, e = flickr.read_list(copy / "train.txt")[10:15]
    (copy / "Sentences" / f"{a}.txt").write_text("one\n")
    (copy / "Annotations" / f"{b}.xml").write_text("<annotation>")
    (copy / "flickr30k_images" / f"{c}.jpg").write_bytes(b"")
    (copy / "flickr30k_images" / f"{d}.jpg").unlink()
    Image.new("RGB", (64, 48)).save(copy / "flickr30k_images" / f"{e}.jpg")
    report = doctor.check("openvocab", str(copy))
    said = {Path(p.path).name.partition(".")[0]: str(p) for p in report.errors}
    assert set(said) == {a, b, c, d, e} and not report.ok
    assert "1 captions, 5 are needed" in said[a] and "not XML" in said[b]
    assert "image cannot be decoded" in said[c] and "image is missing" in said[d]
    assert "the picture is 64x48, its annotation says" in said[e]
    assert all("\n" not in line for line in said.values())
    assert "list all: python -m leansense.core.check openvocab" in message(
        ValueError, openvocab.load, copy
    )


@pytest.mark.parametrize("fault", ["zero", "gone", "size"])
def test_a_bad_picture_stops_the_loader(copy, fault):
    data = openvocab.load(copy)
    path = Path(data.part("train")[3].path)
    if fault == "zero":
        path.write_bytes(b"")
    elif fault == "gone":
        path.unlink()
    else:
        Image.new("RGB", (64, 48)).save(path)
    kind = FileNotFoundError if fault == "gone" else ValueError
    text = message(kind, openvocab.PhraseDataset, data, "train", image_size=32)
    assert str(path) in text and "; " in text
    assert not list(openvocab.data_root().glob(f"cache/openvocab/*32*{path.stem}*"))


# ---- targets


def sample(objects=(), lines=(), **more):
    sentences = tuple(
        flickr.parse_sentence(line, number=number) for number, line in enumerate(lines, 1)
    )
    return Sample("1", "1.jpg", "train", 100, 50, sentences, tuple(objects), **more)


def test_boxes_are_clipped_dropped_and_joined():
    own = sample(
        [
            Object((-5.0, 10.0, 30.0, 60.0), ("1",)),
            Object((0.0, 10.0, 30.0, 50.0), ("2", "1")),
            Object((99.5, 0.0, 120.0, 40.0), ("3",)),
            Object((10.0, 10.0, 10.0, 20.0), ("3",)),
        ]
    )
    boxes, chains, thin = targets.clip_boxes(own)
    assert boxes.tolist() == [[0, 10, 30, 50]] and chains == [("1", "2")] and thin == 2
    assert boxes.dtype == np.float32
    assert targets.clip_boxes(sample())[0].shape == (0, 4)


def test_targets_of_a_picture():
    """Number 0 asks nothing; a chain without boxes asks; pairs are unique, lower and sorted."""
    lines = [
        "[/EN#2/people A Man] and [/EN#10/other two balls] on [/EN#3/scene grass]",
        "[/EN#2/people a man] sees [/EN#0/notvisual it] with [/EN#9/other/clothing a hat]",
        "[/EN#10/other the balls] of [/EN#2/clothing a man]",
    ]
    own = sample(
        [
            Object((0.0, 0.0, 10.0, 10.0), ("10",)),
            Object((50.0, 20.0, 60.0, 30.0), ("10", "2")),
        ],
        lines,
        scene=("3",),
    )
    found = targets.make_targets(own)
    named = list(zip(found.phrases, [g["chain"] for g in found.groups], strict=True))
    assert named == [
        ("the balls", "10"),
        ("two balls", "10"),
        ("a man", "2"),
        ("grass", "3"),
        ("a hat", "9"),
    ]
    assert found.positive.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    man, hat = found.groups[2], found.groups[4]
    assert man["sentences"] == (1, 2, 3) and man["types"] == ("people", "clothing")
    assert hat["types"] == ("other", "clothing") and hat["boxes"].shape == (0, 4)
    assert found.groups[0]["boxes"].tolist() == [[0, 0, 10, 10], [50, 20, 60, 30]]
    merged = targets.make_targets(own, "merged")
    assert merged.boxes.tolist() == [[0, 0, 60, 30], [50, 20, 60, 30]]
    assert merged.positive.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert merged.groups[0]["boxes"].tolist() == found.groups[0]["boxes"].tolist()
    assert "nearest is 'any'" in message(ValueError, targets.make_targets, own, "anybox")


def test_two_chains_with_one_enclosing_box_share_it():
    objects = [Object((0.0, 0.0, 10.0, 10.0), ("1", "2"))]
    merged = targets.make_targets(sample(objects, ["[/EN#1/other a] [/EN#2/other b]"]), "merged")
    assert merged.boxes.shape == (1, 4) and merged.positive.tolist() == [[True, True]]


def test_unrelated_captions_are_asked_in_the_evaluation_alone():
    own = sample([], ["[/EN#1/other a cup]"])
    own = replace(own, sentences=(replace(own.sentences[0], related=False),))
    assert targets.make_targets(own, train=True).phrases == []
    assert targets.make_targets(own, train=False).phrases == ["a cup"]


def test_limit_keeps_phrases_with_boxes():
    line = " ".join(f"[/EN#{k}/other thing {k}]" for k in range(1, 31))
    own = sample(
        [Object((5.0 * k, 0.0, 5.0 * k + 4, 9.0), (str(k + 1),)) for k in range(6)], [line]
    )
    whole = targets.make_targets(own)
    some = targets.limit_phrases(whole, 10, np.random.default_rng(0))
    again = targets.limit_phrases(whole, 10, np.random.default_rng(0))
    other = targets.limit_phrases(whole, 10, np.random.default_rng(1))
    assert some.phrases == again.phrases != other.phrases and len(some.phrases) == 10
    assert {g["chain"] for g in some.groups} >= {str(k) for k in range(1, 7)}
    assert some.phrases == [p for p in whole.phrases if p in some.phrases]  # in their order
    few = targets.limit_phrases(whole, 4, np.random.default_rng(0))
    assert few.positive.shape == (6, 4) and few.positive.any(0).all()
    assert targets.limit_phrases(whole, 30, np.random.default_rng(0)) is whole


def test_unreachable_boxes_are_counted():
    objects = [Object((3.0 * k, 0.0, 3.0 * k + 2, 9.0), ("1",)) for k in range(9)]
    assert targets.count_unreachable([sample(objects), sample()], 5) == 4
    assert targets.count_unreachable([sample(objects)], 5, "merged") == 0


def test_novelty():
    line = "[/EN#1/other two small red balls] [/EN#2/other a blue cup] [/EN#3/other Grasses]"
    data = flickr.OpenVocab("x", ".", "flickr", (sample([], [line]),))
    known = targets.find_vocabulary(data)
    rated = {
        "the red ball": "seen",
        "grass": "seen",
        "a blue ball": "combination",
        "reddish cup": "subword",
        "a red sphere": "word",
    }
    assert {phrase: known.rate(phrase) for phrase in rated} == rated
    assert targets.find_core("the boy 's big dresses") == ("big", "dress")
    assert targets.find_core("a bus") == ("bus",)


# ---- letter-box

SHAPES = [(500, 333), (333, 500), (400, 400), (500, 375), (640, 1), (97, 101)]


@pytest.mark.parametrize("width, height", SHAPES)
@pytest.mark.parametrize("side", [96, 224])
def test_round_trip(width, height, side):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (50, 2, 2)), 1) * [width, height]
    boxes = corners.reshape(-1, 4).astype(np.float32)
    frame = targets.make_frame(width, height, side)
    square = targets.into_square(boxes, frame)
    assert square.dtype == np.float32 and -1e-6 <= square.min() and square.max() <= 1 + 1e-6
    back = targets.out_of_square(torch.from_numpy(square), frame)
    assert np.abs(back.numpy() - boxes).max() < 1e-2
    batched = targets.out_of_square(
        torch.from_numpy(square)[None].repeat(2, 1, 1),
        torch.from_numpy(np.stack([frame, frame])),
        torch.tensor([[height, width], [height, width / 2]]),
    )
    assert np.abs(batched[0].numpy() - boxes).max() < 1e-2
    assert batched[1, :, [0, 2]].max() <= width / 2


@pytest.mark.parametrize("width, height", SHAPES[:4])
def test_pixels_go_where_boxes_go(width, height):
    """A white rectangle lies in the square where its box does, to a pixel."""
    from PIL import ImageDraw

    picture = Image.new("RGB", (width, height), (90, 20, 20))
    box = (int(width * 0.31), int(height * 0.22), int(width * 0.87), int(height * 0.93))
    ImageDraw.Draw(picture).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill="white")
    side = 128
    array, frame = targets.letter_box(picture, side), targets.make_frame(width, height, side)
    rows, columns = np.nonzero(array[..., 1] > 137)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    cx, cy, w, h = targets.into_square(np.array([box], np.float32), frame)[0] * side
    assert np.abs(np.array(found) - [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).max() < 1
    x1, y1, x2, y2 = targets.find_extent(frame, width, height)
    assert (
        not np.delete(array, np.s_[x1:x2], 1).any() and not np.delete(array, np.s_[y1:y2], 0).any()
    )
    assert array[y1:y2, x1:x2].any(2).all()


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("the ball on the left", "the ball on the right"),
        ("Right-hand LEFT leftmost", "Left-hand RIGHT rightmost"),
        ("a bright copyright cleft", "a bright copyright cleft"),
        ("leftovers", "leftovers"),
    ],
)
def test_swap_sides(text, swapped):
    assert targets.swap_sides(text) == swapped and targets.swap_sides(swapped) == text


def test_jitter_stays_in_its_ranges():
    image = np.full((8, 8, 3), 120, np.uint8)
    grey = [targets.jitter(image, (0.1, 0, 0, 0), np.random.default_rng(k))[0, 0, 0]
            for k in range(30)]  # fmt: skip
    assert 107 <= min(grey) < 114 and 126 < max(grey) <= 132
    same = targets.jitter(image, (0.1, 0.1, 0.1, 0.05), np.random.default_rng(1))
    assert (same == targets.jitter(image, (0.1, 0.1, 0.1, 0.05), np.random.default_rng(1))).all()
    assert targets.AUGMENTS["after"].jitter == (0.1, 0.1, 0.1, 0.05)
    assert targets.AUGMENTS["before"].jitter == (0.2, 0.2, 0.2, 0.1)


# ---- items and batches


def test_items(data):
    part = openvocab.PhraseDataset(data, "test", image_size=64)
    item = part[4]
    own = part.samples[4]
    assert item["images"].shape == (3, 64, 64) and item["images"].dtype == np.uint8
    assert (item["size"] == [own.height, own.width]).all() and not item["mirrored"]
    assert not item["images"][:, ~item["valid"]].any()
    area = item["valid"].mean()
    assert abs(area - min(own.width, own.height) / max(own.width, own.height)) < 0.02
    assert {g["novelty"] for g in item["groups"]} <= set(targets.NOVELTIES)
    assert len(item["phrases"]) == len(item["groups"]) == item["positive"].shape[1]
    back = targets.out_of_square(torch.from_numpy(item["boxes"]), item["frame"])
    assert np.abs(back.numpy() - targets.clip_boxes(own)[0]).max() < 1e-3
    with pytest.raises(IndexError):
        part[len(part)]


def test_mirrored_items(data):
    """In a mirror the boxes lie where the pixels went, and left is right."""
    plain = openvocab.PhraseDataset(data, "train", image_size=96, augmentation="none")
    part = openvocab.PhraseDataset(data, "train", image_size=96, augmentation="mirror")
    flags, sided = set(), 0
    for index in range(len(part)):
        for epoch in range(3):
            a, b = plain[(epoch, index)], part[(epoch, index)]
            flags.add(bool(b["mirrored"]))
            if not b["mirrored"]:
                assert (a["images"] == b["images"]).all() and a["phrases"] == b["phrases"]
                continue
            extent = np.nonzero(b["valid"].any(0))[0]
            x1, x2 = extent.min(), extent.max() + 1
            assert (a["images"][:, :, x1:x2] == b["images"][:, :, x1:x2][:, :, ::-1]).all()
            assert [targets.swap_sides(p) for p in a["phrases"]] == b["phrases"]
            sided += a["phrases"] != b["phrases"]
            back = targets.out_of_square(torch.from_numpy(b["boxes"]), b["frame"]).numpy()
            width = part.samples[index].width
            assert (
                np.abs(back[:, 0] + targets.clip_boxes(part.samples[index])[0][:, 2] - width).max(
                    initial=0
                )
                < 1e-2
            )
            for p, group in enumerate(b["groups"]):
                chosen = back[b["positive"][:, p]]
                assert np.abs(np.sort(chosen, 0) - np.sort(group["boxes"], 0)).max(initial=0) < 1e-2
    assert flags == {True, False} and sided


def test_draws_come_from_seed_epoch_and_index(data):
    make = openvocab.PhraseDataset
    a, b, c = (make(data, "train", image_size=48, seed=seed) for seed in (1, 1, 2))
    same = [(a[key]["images"] == b[key]["images"]).all() for key in ((0, 3), (5, 7), (1, 0))]
    assert all(same) and a[(5, 7)]["phrases"] == b[(5, 7)]["phrases"]
    assert any((a[(0, k)]["images"] != c[(0, k)]["images"]).any() for k in range(5))
    assert any((a[(0, k)]["images"] != a[(1, k)]["images"]).any() for k in range(5))
    still = make(data, "valid", image_size=48)
    assert (still[(0, 1)]["images"] == still[(9, 1)]["images"]).all()
    padded = a[(0, 2)]
    assert not padded["images"][:, ~padded["valid"]].any()  # colours change in the picture alone


def test_training_limits_phrases_and_evaluation_does_not(data):
    few = openvocab.PhraseDataset(data, "train", image_size=48, max_phrases=3)
    assert max(len(few[k]["phrases"]) for k in range(len(few))) == 3
    test = openvocab.PhraseDataset(data, "test", image_size=48, max_phrases=3)
    assert max(len(test[k]["phrases"]) for k in range(len(test))) > 3


def test_batch(data):
    part = openvocab.PhraseDataset(data, "test", image_size=48)
    batch = openvocab.collate([part[k] for k in range(4)])
    assert batch["images"].shape == (4, 3, 48, 48) and batch["images"].dtype == torch.uint8
    assert batch["valid"].shape == (4, 48, 48) and batch["valid"].dtype == torch.bool
    assert batch["size"].shape == (4, 2) and batch["frame"].shape == (4, 4)
    assert batch["frame"].dtype == torch.float32
    for boxes, positive, phrases in zip(
        batch["boxes"], batch["positive"], batch["phrases"], strict=True
    ):
        assert boxes.dtype == torch.float32 and positive.dtype == torch.bool
        assert positive.shape == (len(boxes), len(phrases))
    assert batch["boxes"][1].shape == (0, 4)  # the picture without any box
    assert part.example()["images"].shape[0] == 1
    assert pickle.loads(pickle.dumps(part))[0]["phrases"] == part[0]["phrases"]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"augmentation": "afer"}, "nearest is 'after'"),
        ({"protocol": "merge"}, "nearest is 'merged'"),
        ({"image_size": 4}, "image_size=4"),
        ({"max_phrases": 0}, "max_phrases=0"),
    ],
)
def test_options(given, said):
    assert said in message(ValueError, openvocab.Options, **given)


# ---- what a row needs


def test_loaders(data, capsys):
    params = {"image_size": 48, "batch_size": 5, "seed": 3, "queries": 20}
    found = openvocab.loaders(data, params)
    assert {name: len(batches) for name, batches in found.items()} == {
        "train": 4,
        "valid": 2,
        "test": 2,
    }
    assert "train: 7 boxes are beyond 20 queries" in capsys.readouterr().out
    order = [name for batch in found["test"] for name in batch["id"]]
    assert order == [s.id for s in data.part("test")]
    first = next(iter(openvocab.loaders(data, params)["train"]))
    assert first["id"] == next(iter(openvocab.loaders(data, params)["train"]))["id"]
    capsys.readouterr()
    openvocab.loaders(data, params | {"queries": 50})
    assert capsys.readouterr().out == ""


def test_identity(copy, tmp_path, folder):
    recipe = openvocab.identify({"data": "standin", "standin": 40})
    assert recipe == openvocab.identify({"standin": 40}) != openvocab.identify({"standin": 60})
    found = openvocab.identify({"data": str(folder)})
    assert found == openvocab.identify({"data": str(copy)})
    name = flickr.read_list(copy / "train.txt")[12]
    with open(copy / "Sentences" / f"{name}.txt", "a") as file:
        file.write("\n")
    assert found != openvocab.identify({"data": str(copy)})


def test_dataset_names(folder):
    drawn = openvocab.dataset({"data": "standin", "standin": 40})
    assert drawn.name == "stand-in, 40 pictures"
    assert openvocab.dataset({"data": str(folder)}).name == folder.name
    assert "nearest is 'valid'" in message(ValueError, drawn.part, "vaild")
    captions = drawn.captions("train")
    assert len(captions) == 5 * 24 and not any("[" in caption for caption in captions)


def test_import_is_light():
    code = (
        "import sys, leansense.openvocab.data; "
        "print([n for n in ('torch', 'torchvision', 'pandas', 'PIL') if n in sys.modules])"
    )
    assert run(ROOT, "python", "-c", code).stdout.strip() == "[]"


def test_hash_seed_changes_nothing(folder):
    """Phrases, their order, what a limit leaves and the words known are the same in any process."""
    code = f"""
import hashlib, numpy
from leansense.openvocab import flickr, targets
from leansense.openvocab.standin import choose_groups, version
data = flickr.load({str(folder)!r})
known = targets.find_vocabulary(data)
said = [version(), str(choose_groups(numpy.random.default_rng(0), True))]
for s in data.samples:
    found = targets.make_targets(s, "merged")
    some = targets.limit_phrases(found, 4, numpy.random.default_rng(0))
    said += [repr((s.id, found.phrases, found.groups, found.boxes.tolist(), some.phrases))]
    said += [known.rate(phrase) for phrase in found.phrases]
print(data.fingerprint, hashlib.sha256("".join(said).encode()).hexdigest())
"""
    out = [
        run(ROOT, "python", "-c", code, warm=False, PYTHONHASHSEED=seed).stdout
        for seed in ("0", "12345")
    ]
    assert out[0] == out[1] and len(out[0].split()) == 2


def test_same_picture_in_two_parts(copy):
    test = flickr.read_list(copy / "test.txt")[6]
    train = flickr.read_list(copy / "train.txt")[11]
    for name, suffix in (("flickr30k_images", "jpg"), ("Annotations", "xml")):
        shutil.copy(copy / name / f"{train}.{suffix}", copy / name / f"{test}.{suffix}")
    report = openvocab.check(copy)
    assert report.ok and any(f"the same picture as {train} of train" in p.what
                             for p in report.warnings)  # fmt: skip


# ---- COCO

SIZES = {
    "a.jpg": (64, 48),
    "b.jpg": (48, 64),
    "c.jpg": (32, 32),
    "d.jpg": (64, 64),
    "e.jpg": (9, 9),
}


def coco_content():
    return {
        "images": [
            {"id": k, "file_name": name, "width": w, "height": h}
            for k, (name, (w, h)) in enumerate(SIZES.items())
        ],
        "categories": [
            {"id": 0, "name": "Dog", "supercategory": "animal"},
            {"id": 7, "name": "traffic light", "supercategory": "street thing"},
            {"id": 9, "name": "café"},
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 0, "bbox": [4, 5.5, 20, 20], "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 7, "bbox": [60, 0, 10, 10]},
            {"id": 3, "image_id": 0, "category_id": 7, "bbox": [0, 0, 64, 30], "iscrowd": 1},
            {"id": 4, "image_id": 1, "category_id": 9, "bbox": [0, 0, 0.4, 30]},
        ],
    }


def write_coco(root, content, file="annotations/instances_train2017.json", images="train2017"):
    (root / images).mkdir(parents=True)
    (root / file).parent.mkdir(exist_ok=True)
    for name, size in SIZES.items():
        Image.effect_noise(size, 50).convert("RGB").save(root / images / name)
    (root / file).write_text(json.dumps(content))
    return root


def test_coco(tmp_path):
    root = write_coco(tmp_path / "mine", coco_content())
    captions = {"annotations": [{"id": 1, "image_id": 0, "caption": " A dog\nwaits ."}]}
    (root / "annotations/captions_train2017.json").write_text(json.dumps(captions))
    data = openvocab.load(root)
    assert data.layout == "coco" and data.counts() == {"train": 3, "valid": 1, "test": 1}
    first = next(s for s in data.samples if s.id == "train2017/a.jpg")
    assert first.sentences == (Sentence("A dog waits .", (), 1),) and len(first.crowds) == 1
    found = targets.make_targets(first)
    assert found.phrases == ["dog", "traffic light", "café"]  # every category is asked
    assert found.boxes.tolist() == [[4, 5.5, 24, 25.5], [60, 0, 64, 10]]  # clipped
    assert found.positive.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert [g["types"] for g in found.groups] == [("animal",), ("street_thing",), ("other",)]
    assert set(data.captions("train")) >= {"Dog", "traffic light", "café"}
    assert {"Dog": 1, "traffic light": 1, "café": 1} == coco.count_categories(data)
    report = openvocab.check(root)
    said = " ".join(str(p) for p in report.warnings)
    assert report.ok and "1 boxes are crowds" in said and "1 boxes are thinner" in said
    assert "1 boxes end beyond their picture" in said and "parts divided 60 20 20" in str(report)
    item = openvocab.PhraseDataset(data, first.split, image_size=32, train=False)
    assert len(item) == data.counts()[first.split]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.pop("categories"), "the file has no categories; write COCO instances"),
        (lambda c: c.update(categories=[]), "the list of categories is empty"),
        (lambda c: c["categories"][1].update(name=" "), "the phrase of category 7 is empty"),
        (lambda c: c["categories"][1].update(id=0), "category 0 is there twice"),
        (lambda c: c.pop("annotations"), "the file has no annotations"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 2: image 77 is unknown"),
        (
            lambda c: c["annotations"][1].update(category_id=3),
            "annotation 2: category 3 is unknown",
        ),
        (lambda c: c["annotations"][0].update(bbox=[4, 4, -2, 5]), "annotation 1: box x1 4 y1 4"),
        (lambda c: c["annotations"][0].update(bbox=[64, 4, 2, 5]), "is outside the 64x48 picture"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox [1, 2, 3] is no box"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, None]), "is no box"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "is no box"),
        (lambda c: c["images"][1].update(file_name="a.jpg"), "a.jpg is there twice"),
        (lambda c: c["images"][1].pop("file_name"), "it has no id or no file_name"),
        (lambda c: c["images"].append({"id": 99, "file_name": "z.jpg"}), "z.jpg: image is missing"),
    ],
)
def test_damaged_coco(tmp_path, change, said):
    content = coco_content()
    change(content)
    root = write_coco(tmp_path / "mine", content)
    kind = FileNotFoundError if "z.jpg" in said else ValueError
    text = message(kind, openvocab.load, root)
    assert said in text and str(root) in text and "; " in text
    assert said in str(openvocab.check(root))


def test_coco_that_is_no_json(tmp_path):
    root = write_coco(tmp_path / "mine", coco_content())
    (root / "annotations/instances_train2017.json").write_text('{"images": [')
    assert "instances_train2017.json: not JSON (" in message(ValueError, openvocab.load, root)


@pytest.mark.parametrize(
    "file, images",
    [
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("instances.json", "images"),
        ("instances.json", "."),
        ("test/_annotations.coco.json", "test"),
    ],
)
def test_coco_arrangements(tmp_path, file, images):
    root = tmp_path / "mine"
    if images == ".":
        root.mkdir()
        for name, size in SIZES.items():
            Image.new("RGB", size).save(root / name)
        (root / file).write_text(json.dumps(coco_content()))
    else:
        write_coco(root, coco_content(), file, images)
    data = openvocab.load(root)
    assert sum(data.counts().values()) == 5 and min(data.counts().values()) == 1
    assert all(Path(s.path).is_file() for s in data.samples)


def test_coco_parts():
    names = [f"{k}.jpg" for k in range(40)]
    found, rule = coco.divide(names, ["train"] * 30 + ["valid"] * 10)
    assert found[30:] == ["test"] * 10 and found[:30].count("valid") == 3 and "valid" in rule
    found, _ = coco.divide(names, ["train"] * 20 + ["valid"] * 10 + ["test"] * 10)
    assert found == ["train"] * 20 + ["valid"] * 10 + ["test"] * 10
    found, _ = coco.divide(names, [""] * 40)
    assert [found.count(part) for part in ("train", "valid", "test")] == [24, 8, 8]
    again, _ = coco.divide(names[::-1], [""] * 40)
    assert again[::-1] == found  # a picture's part does not depend on the file's order
    assert coco.divide(names, ["train"] * 30 + ["test"] * 10)[0].count("valid") == 3


def test_encoded_jpeg_decodes_small_and_right(tmp_path):
    """A large JPEG is decoded at a fraction of its size, and its boxes stay right."""
    from PIL import ImageDraw

    picture = Image.new("RGB", (1600, 1001), (90, 20, 20))
    ImageDraw.Draw(picture).rectangle((400, 300, 1199, 799), fill="white")
    out = io.BytesIO()
    picture.save(out, "JPEG")
    file = tmp_path / "large.jpg"
    file.write_bytes(out.getvalue())
    array = openvocab.prepare(file, 64, (1600, 1001))
    rows, columns = np.nonzero(array[..., 1] > 137)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    frame = targets.make_frame(1600, 1001, 64)
    cx, cy, w, h = targets.into_square(np.array([[400, 300, 1200, 800]]), frame)[0] * 64
    assert np.abs(found - [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).max() < 1
