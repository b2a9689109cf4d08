"""Weights and checkpoints that somebody else saved: whatever wraps them, read or refused."""

import io
import math
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT, message
from leansense.core.checkpoint import check_weights, load_file
from leansense.core.weights import find_excess, fit_weights, read_weights, rebuild, unwrap

PLAIN = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
SETTINGS = {"in_features": 2, "out_features": 3}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def before(prefix: str, weights: dict = PLAIN) -> dict:
    return {prefix + name: value for name, value in weights.items()}


# --- what trainers wrap around weights ---

WRAPPED = {
    "bare": PLAIN,
    "ordered": OrderedDict(PLAIN),
    "model.module.": before("model.module."),
    "module.model.module.": before("module.model.module."),
    "_orig_mod.": before("_orig_mod."),
    "module._orig_mod.": before("module._orig_mod."),
    "_orig_mod.module.": before("_orig_mod.module."),
    "model": {"model": PLAIN},
    "net": {"net": PLAIN, "epoch": 3},
    "state_dict in model": {"model": {"state_dict": before("module.")}, "optimizer": {"lr": 1.0}},
    "net in state_dict": {"state_dict": {"net": before("model._orig_mod.")}},
    "an empty one first": {"state_dict": {}, "model_state_dict": PLAIN},
    "Lightning with a metric": {"state_dict": before("model.") | {"scores.sum": torch.ones(1)}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_in_every_wrapping(tmp_path, kind):
    found = read_weights(saved(tmp_path / "w.pt", WRAPPED[kind]))
    assert found.keys() == PLAIN.keys() and torch.equal(found["weight"], PLAIN["weight"])
    module = rebuild(nn.Linear, SETTINGS, load_file(tmp_path / "w.pt"), "w.pt")
    assert torch.equal(module.weight, PLAIN["weight"]) and not module.training


def test_a_layer_that_is_called_model_keeps_its_name():
    """Names that fit the network are never taken for a trainer's."""
    module = nn.Sequential(OrderedDict(model=nn.Linear(2, 3)))
    fit_weights(module, before("model."), "w.pt")
    fit_weights(module, before("module.model."), "w.pt")
    assert torch.equal(module.model.weight, PLAIN["weight"])


def test_compiled_parts_lose_their_mark():
    module = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Linear(2, 3)))
    weights = before("a._orig_mod.") | before("b.")
    assert torch.equal(fit_weights(module, weights, "w.pt").a.weight, PLAIN["weight"])


@pytest.mark.parametrize(
    "content", [3, [1, 2], {}, {"epoch": 3}, {"model": {}}, {1: torch.ones(1)}]
)
def test_what_holds_no_weights_says_so(tmp_path, content):
    assert unwrap(content) == {}
    text = message(ValueError, read_weights, saved(tmp_path / "w.pt", content))
    assert "holds no weights by name" in text


# --- what must not be read ---


class Net(nn.Linear):
    """Somebody's class, which a file may name."""


def test_an_object_inside_is_named(tmp_path):
    path = saved(tmp_path / "w.pt", {"model": Net(2, 3)})
    text = message(ValueError, read_weights, path)
    assert f"{Net.__module__}.Net" in text and "save its state_dict alone" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_are_none_are_refused_wherever_weights_are_read(tmp_path, value, dtype):
    bad = PLAIN["weight"].to(dtype).clone()
    bad[1, 1] = value
    path = saved(tmp_path / "w.pt", {"net": PLAIN | {"weight": bad}})
    what = "NaN" if math.isnan(value) else "Inf"
    for read in (
        lambda: read_weights(path),
        lambda: rebuild(nn.Linear, SETTINGS, load_file(path), path),
        lambda: fit_weights(nn.Linear(2, 3), PLAIN | {"weight": bad}, path),
    ):
        assert f"weights of {path} hold {what} (weight)" in message(ValueError, read)


def test_a_folder_a_pipe_and_nothing_are_named(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path, tmp_path / "pipe.pt"):
        assert "not a file" in message(ValueError, read_weights, path)
    assert "no such file" in message(FileNotFoundError, read_weights, tmp_path / "none.pt")


def test_a_file_that_unpacks_to_anything_is_not_unpacked(tmp_path):
    """A megabyte of zeros packs to a kilobyte, and so would a terabyte."""
    torch.save({"weight": torch.zeros(1 << 18)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old:
        with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    assert (tmp_path / "packed.pt").stat().st_size < 20_000
    text = message(ValueError, load_file, tmp_path / "packed.pt")
    assert "packed.pt: cannot be read (packed" in text


def test_one_number_spread_to_a_terabyte_is_refused(tmp_path):
    path = saved(tmp_path / "w.pt", {"weight": torch.ones(1).expand(1 << 38)})
    assert path.stat().st_size < 5000
    assert "one number spread to" in message(ValueError, read_weights, path)
    small = torch.ones(1).expand(100)
    assert load_file(saved(path, {"w": small}))["w"].shape == (100,)


def test_every_loader_goes_through_the_same_door():
    """No system opens, unwraps or judges weights by itself."""
    loaders = {"leaf": "checkpoint.py", "simbev": "use.py", "beam": "use.py", "xad": "use.py"}
    loaders["openvocab"] = "use.py"
    for system, name in loaders.items():
        text = (ROOT / "lib/leansense" / system / name).read_text()
        assert (
            "core.weights import" in text
            and "load_state_dict(" not in text.split("def export_onnx")[0]
        ), system
    found = [
        path.name
        for path in (ROOT / "lib/leansense").rglob("*.py")
        if "torch.load(" in path.read_text() and path.name != "checkpoint.py"
    ]
    assert found == ["trunk.py"]  # what an installed package brings


# --- what does not fit ---

MISFITS = {
    "a key is missing": ({"weight": PLAIN["weight"]}, SETTINGS, "bias has shape (3,) in the model"),
    "a key too many": (PLAIN | {"x": torch.ones(1)}, SETTINGS, "x has none in the model"),
    "other classes": (
        PLAIN,
        SETTINGS | {"out_features": 4},
        "weight has shape (4, 2) in the model",
    ),
    "a number for a tensor": (PLAIN | {"x": 3}, SETTINGS, "x is no tensor"),
    "whole numbers": (PLAIN | {"bias": torch.zeros(3).long()}, SETTINGS, "bias is torch.int64"),
    "an unknown setting": (PLAIN, SETTINGS | {"outs": 1}, "cannot be built: "),
    "text for a number": (PLAIN, SETTINGS | {"in_features": "two"}, "cannot be built: "),
    "a billion": (PLAIN, SETTINGS | {"out_features": 10**9}, "out_features is 1000000000"),
    "minus a billion": (PLAIN, SETTINGS | {"out_features": -(10**9)}, "is the most"),
    "infinity": (PLAIN, SETTINGS | {"out_features": math.inf}, "out_features is inf"),
    "NaN": (PLAIN, SETTINGS | {"out_features": math.nan}, "out_features is nan"),
    "in a list": (PLAIN, SETTINGS | {"bias": [1, {"a": 10**9}]}, "bias.1.a is 1000000000"),
    "a long text": (PLAIN, SETTINGS | {"device": "x" * 5000}, "no setting"),
    "no weights": (3, SETTINGS, "weight has shape (3, 2) in the model, none in the file"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_one_line(kind):
    weights, settings, said = MISFITS[kind]
    text = message(ValueError, rebuild, nn.Linear, settings, weights, "w.pt")
    assert text.startswith("w.pt: ") and said in text and len(text) < 400


def test_a_number_is_bounded_by_the_tensors():
    assert find_excess({"classes": 5000}, 5000) == "" and find_excess({"classes": 5001}, 5000)
    wide = {"weight": torch.zeros(9000, 2), "bias": torch.zeros(9000)}
    assert rebuild(nn.Linear, SETTINGS | {"out_features": 9000}, wide, "w.pt").out_features == 9000


def test_half_precision_weights_serve_a_full_precision_network():
    half = {name: value.half() for name, value in PLAIN.items()}
    module = rebuild(nn.Linear, SETTINGS, half, "w.pt")
    assert module.weight.dtype == torch.float32 and module(torch.ones(1, 2)).isfinite().all()


def test_what_a_module_keeps_beside_tensors_is_no_fault():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"kept": 1}

        def set_extra_state(self, state):
            self.kept = state

    module = Extra(2, 3)
    check_weights(module, module.state_dict(), "w.pt")


# --- a leaf checkpoint, whose meta decides what is read ---


@pytest.fixture(scope="module")
def leaf():
    from leansense.leaf.checkpoint import NETWORK
    from leansense.leaf.model import build

    torch.manual_seed(0)
    model = build("vanilla", 4, image_size=64)
    labels = {"a": 0, "b": 1, "c": 2, "d": 3}
    meta = {"label2id": labels, "image_size": 64, "temperature": 1.0, "unsure_below": 0.5}
    meta |= {NETWORK: model.config, "params": {"variant": "vanilla"}, "mark": "x"}
    return {"model": model.state_dict(), "meta": meta}


META = {
    "image_size 10^6": ({"image_size": 10**6}, "image_size is 1000000"),
    "image_size text": ({"image_size": "64"}, "not a number of pixels"),
    "no temperature": ({"temperature": None}, "temperature is None"),
    "temperature zero": ({"temperature": 0.0}, "temperature is 0.0"),
    "temperature NaN": ({"temperature": math.nan}, "temperature is nan"),
    "no names": ({"label2id": None}, "no class names"),
    "other count": ({"label2id": {"a": 0, "b": 1}}, "names 2 classes, the network has 4"),
    "a gap": ({"label2id": {"a": 0, "b": 1, "c": 2, "d": 7}}, "not 0 to 3"),
}


@pytest.mark.parametrize("kind", META)
def test_what_a_leaf_checkpoint_says_has_bounds(tmp_path, leaf, kind):
    from leansense.leaf.checkpoint import load_checkpoint

    change, said = META[kind]
    path = saved(tmp_path / "leaf.pt", leaf | {"meta": leaf["meta"] | change})
    text = message(ValueError, load_checkpoint, path)
    assert text.startswith(f"{path}: ") and said in text


def test_a_leaf_checkpoint_in_any_wrapping(tmp_path, leaf):
    from leansense.leaf.checkpoint import load_checkpoint

    for prefix in ("module.", "model.module.", "_orig_mod."):
        content = leaf | {"model": before(prefix, leaf["model"])}
        model, meta = load_checkpoint(saved(tmp_path / "leaf.pt", content))
        assert meta["image_size"] == 64 and not model.training


def test_a_leaf_network_that_answers_nan_gives_no_answer(tmp_path, leaf):
    """Finite weights can still overflow; a label is never made of NaN."""
    from PIL import Image

    from leansense.leaf.checkpoint import rebuild as rebuild_leaf
    from leansense.leaf.use import predict

    model, content = rebuild_leaf(saved(tmp_path / "leaf.pt", leaf))
    with torch.no_grad():
        list(model.parameters())[-1].fill_(math.nan)
    Image.new("RGB", (64, 64), "green").save(tmp_path / "p.png")
    answer = predict(model, content["meta"], [tmp_path / "p.png"])[0]
    assert "p.png: the network answers with NaN" in answer["error"] and "label" not in answer


def test_bytes_that_are_no_file_of_weights(tmp_path):
    buffer = io.BytesIO()
    torch.save(PLAIN, buffer)
    for name, content in {
        "cut.pt": buffer.getvalue()[:200],
        "empty.pt": b"",
        "text.pt": b"hello",
        "cut.safetensors": b"\xff" * 64,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in message(ValueError, read_weights, tmp_path / name)
