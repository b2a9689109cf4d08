"""Kinds of checkpoints, weights, matrices of rows, records and names from outside."""

import atexit
import contextlib
import io
import json
import math
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import toy
from conftest import ROOT, set_one
from kinds import Kind, ask

# --- the checkpoints of the five systems, of tiny networks that nobody trained ---

BEAM = {"width": 8, "size": 32, "anchors": 2, "n_layer": 1, "image_depth": 18}
GRID = {"xbound": [-32.0, 32.0, 8.0], "ybound": [-32.0, 32.0, 8.0], "dbound": [4.0, 45.0, 8.2]}


def _settings(system: str) -> dict:
    """What a checkpoint of a system says of its network."""
    from leansense.core.parameters import read_parameters

    if system == "leaf":
        return {"variant": "vanilla", "num_classes": 4, "image_size": 64}
    if system == "simbev":
        from leansense.simbev.model import DEMO

        grid = GRID | {"zbound": [-10.0, 10.0, 20.0]}
        narrow = {"camC": 8, "up_width": 16, "bev_width": 8}
        return DEMO | narrow | {"outC": 1, "final_dim": [32, 96], "grid_conf": grid}
    if system == "beam":
        return BEAM | {"arch": "mambafusion", "FFM": "bimamba", "seq_len": 5}
    if system == "xad":
        known = read_parameters("nbs/xad/80_row.ipynb")
        small = {"final_h": 32, "final_w": 96, "width": 0.0625, "vovnet_type": 39}
        return {name: p.default for name, p in known.items()} | small | GRID
    return {"preset": "demo", "dim": 16, "embed": 16, "image_size": 64} | {
        "text_encoder": "tiny", "text_dim": 16, "vocabulary": 300
    }  # fmt: skip


def _build(system: str) -> torch.nn.Module:
    settings = _settings(system)
    if system == "leaf":
        from leansense.leaf.model import build

        return build(**settings)
    if system == "simbev":
        from leansense.simbev.model import build

        return build(**settings)
    if system == "beam":
        from leansense.beam.use import _settings as taken
        from leansense.beam.use import build

        return build(**taken(settings))
    if system == "xad":
        from leansense.xad.use import build, network_settings

        return build(**network_settings(settings))
    from leansense.openvocab.use import build_detector

    return build_detector(settings, ["a red ball near a blue cup"] * 2)


@cache
def _weights(system: str) -> dict:
    torch.manual_seed(0)
    return _build(system).state_dict()


def _content(system: str, weights: object, settings: object) -> dict:
    """A checkpoint as a system's training writes it; settings: a dict, or JSON that is none."""
    if system == "leaf":
        meta = {"label2id": dict(zip("abcd", range(4))), "image_size": 64, "temperature": 1.5}
        meta |= {"unsure_below": 0.5, "network": settings, "mark": "x"}
        return {"model": weights, "meta": meta if isinstance(settings, dict) else settings}
    own = {"classes": "vehicle", "H": 64, "W": 144}
    if isinstance(settings, dict):
        own, settings = own | settings.get("params", {}), dict(settings)
        settings.pop("params", None)
    whole = {"model": settings, "params": own}
    if system != "simbev":
        whole = {"config": {"params": settings}, "seed": 0}
    said = json.dumps(whole) if isinstance(settings, dict) else settings
    if system == "simbev":
        return {"leansense": {}, "state_dict": {}, "model_state_dict": weights, "settings": said}
    return {"leansense": {"config": said}, "state_dict": weights}


def _load(system: str, path: Path) -> torch.nn.Module:
    from importlib import import_module

    name = "load_detector" if system == "openvocab" else "load_checkpoint"
    where = "checkpoint" if system == "leaf" else "use"
    return getattr(import_module(f"leansense.{system}.{where}"), name)(path)[0]


def _main(system: str) -> Callable:
    from importlib import import_module

    return import_module(f"leansense.{system}.use").main


def _use(system: str, path: Path, *more: object) -> str:
    """What a system's command says of a checkpoint, and of data that are not there."""
    first = ["predict"] if system == "leaf" else []
    last = ["a ball"] if system == "openvocab" else []
    out = ["--out", path.parent / "out"]
    return ask(_main(system), *first, path, path.parent / "none.jpg", *last, *out, *more)


PREFIX = {"leaf": "", "simbev": ""}  # what a system's own training writes before names
SYSTEMS = ("leaf", "simbev", "beam", "xad", "openvocab")


def _before(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def _saved(system: str, path: Path, change: Callable = dict, settings: object = (), **how) -> Path:
    """Write a checkpoint whose weights and settings were changed."""
    named = change(_before(PREFIX.get(system, "model."), _weights(system)))
    settings = _settings(system) | dict(settings) if not isinstance(settings, str) else settings
    torch.save(_content(system, named, settings), path, **how)
    return path


def _same(system: str, path: Path, dtype: torch.dtype | None = None) -> object:
    """True: the network that is read has the tiny one's weights, rounded to `dtype`."""
    module, own = _load(system, path), _weights(system)
    found = module.state_dict()
    if module.training or found.keys() != own.keys():
        return "another network"
    for name, value in own.items():
        wanted = value.to(dtype).to(value.dtype) if dtype and value.is_floating_point() else value
        if not torch.equal(found[name], wanted):
            return name
    return True


def _cast(dtype: torch.dtype, weights: dict) -> dict:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in weights.items()}


def _bare(weights: dict) -> dict:
    return {name.removeprefix("model."): value for name, value in weights.items()}


READ = {  # kind: (what is done to the weights, how they are saved)
    "as training writes it": (dict, {}),
    "bare names": (_bare, {}),
    "`model.module.` before names (DDP)": (lambda w: _before("model.module.", _bare(w)), {}),
    "`module.module.` before names": (lambda w: _before("module.module.", w), {}),
    "`_orig_mod.` before names (compiled)": (lambda w: _before("_orig_mod.", w), {}),
    "`model._orig_mod.module.`": (lambda w: _before("model._orig_mod.module.", _bare(w)), {}),
    "under one more `model`": (lambda w: {"model": w}, {}),
    "under one more `net`": (lambda w: {"net": w, "epoch": 3}, {}),
    "in PyTorch's older format": (dict, {"_use_new_zipfile_serialization": False}),
    "double precision": (partial(_cast, torch.float64), {}),
    "views of larger tensors": (
        lambda w: {n: torch.stack([v, v])[1] for n, v in w.items()}, {}),
}  # fmt: skip


def _read_kind(system: str, change: Callable, how: dict, folder: Path) -> object:
    return _same(system, _saved(system, folder / "best.ckpt", change, **how))


def _rounded(system: str, dtype: torch.dtype, folder: Path) -> object:
    return _same(system, _saved(system, folder / "best.ckpt", partial(_cast, dtype)), dtype)


def _beside(system: str, folder: Path) -> object:
    """An optimiser's state, which holds NaN, and a step that a script kept."""
    path = _saved(system, folder / "best.ckpt")
    content = torch.load(path, weights_only=True)
    content |= {"optimizer_states": [{"x": torch.tensor(math.nan)}], "epoch": 3, "best": 0.5}
    torch.save(content, path)
    return _same(system, path)


def _named_oddly(system: str, folder: Path) -> object:
    return _same(system, _saved(system, folder / "größte übung $(x) 'a'.ckpt"))


def _started(system: str, folder: Path) -> object:
    """Settings that name the files and the hub that the network began from: none is opened."""
    names = {"leaf": "weights", "simbev": "weights", "xad": "weights", "beam": "map_weights"}
    settings = {names.get(system, "backbone_weights"): "/none/start.pt", "pretrained": True}
    if system in ("beam", "openvocab"):
        del settings["pretrained"]
    return _same(system, _saved(system, folder / "best.ckpt", settings=settings))


def _linked(system: str, folder: Path) -> object:
    _saved(system, folder / "real.ckpt")
    (folder / "best.ckpt").symlink_to("real.ckpt")
    return _same(system, folder / "best.ckpt")


def _drop(weights: dict) -> dict:
    return dict(list(weights.items())[1:])


def _first(change: Callable, weights: dict) -> dict:
    """The weights with the first matrix changed."""
    name = next(n for n, v in weights.items() if v.is_floating_point() and v.ndim > 1)
    return weights | {name: change(weights[name])}


def _quantised(value: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(value.contiguous(), 0.1, 0, torch.qint8)


def _extra(name: str, value: object, weights: dict) -> dict:
    prefix = "model." if next(iter(weights)).startswith("model.") else ""
    return weights | {f"{prefix}{name}": value}


MISFITS = {  # kind: (words of the line, what is done to the weights)
    "a weight missing": ("weights of another model", _drop),
    "a weight too many": ("weights of another model", partial(_extra, "x", torch.ones(1))),
    "a weight too many, named in escapes": (
        "weights of another model", partial(_extra, "x\x1b[2J\n", torch.ones(1))),
    "a weight turned over": ("weights of another model", partial(_first, lambda v: v[None])),
    "a weight that is a number": ("is no tensor", partial(_extra, "x", 3)),
    "one NaN": ("hold NaN", lambda w: set_one(w, math.nan)),
    "one infinity": ("hold Inf", lambda w: set_one(w, -math.inf)),
    "half precision with one NaN": (
        "hold NaN", lambda w: _cast(torch.bfloat16, set_one(w, math.nan))),
    "whole numbers for weights": ("torch.int64", partial(_first, lambda v: v.long())),
    "complex weights": ("torch.complex64", partial(_first, lambda v: v.to(torch.complex64))),
    "sparse weights": ("best.ckpt", partial(_first, lambda v: v.to_sparse())),
    "quantised weights": ("best.ckpt", partial(_first, _quantised)),
    "weights without numbers (meta)": ("best.ckpt", partial(_first, lambda v: v.to("meta"))),
    "a weight spread to a terabyte": (
        "spread to", partial(_first, lambda v: torch.ones(1).expand(1 << 38))),
    "no weights at all": ("best.ckpt", lambda w: {}),
    "numbers for names": ("best.ckpt", lambda w: dict(enumerate(w.values()))),
}  # fmt: skip

LINES = {  # kind: (words, settings of each system)
    "another width or number of classes": ("weights of another model", {
        "leaf": {"num_classes": 5}, "simbev": {"camC": 16}, "beam": {"width": 16},
        "xad": {"width": 0.125}, "openvocab": {"dim": 32}}),
    "a choice that is unknown": ("cannot be built", {
        "leaf": {"variant": "bott"}, "simbev": {"trunk": "efficientnet_bo"},
        "beam": {"arch": "mambafuson"}, "xad": {"refiner": "conf"},
        "openvocab": {"preset": "demon"}}),
    "a million pixels": ("is the most", {
        "leaf": {"image_size": 10**6}, "simbev": {"final_dim": [10**6, 10**6]},
        "beam": {"size": 10**6}, "xad": {"final_h": 10**6}, "openvocab": {"image_size": 10**6}}),
    "minus a billion layers": ("best.ckpt", {
        "leaf": {"heads": -(10**9)}, "simbev": {"up_width": -(10**9)},
        "beam": {"n_layer": -(10**9)},
        "xad": {"camC": -(10**9)}, "openvocab": {"dec_layers": -(10**9)}}),
    "an infinite number": ("best.ckpt", {
        "leaf": {"dropout": math.inf}, "simbev": {"camC": math.inf}, "beam": {"width": math.inf},
        "xad": {"width": math.inf}, "openvocab": {"dim": math.inf}}),
    "a probability that is no number": ("best.ckpt", {
        "leaf": {"dropout": math.nan}, "simbev": {"dropout": math.nan},
        "beam": {"dropout": math.nan}, "xad": {"dropout": math.nan},
        "openvocab": {"dropout": math.nan}}),
    "a word for a number": ("best.ckpt", {
        "leaf": {"num_classes": "four"}, "simbev": {"camC": "eight"}, "beam": {"width": "wide"},
        "xad": {"width": "wide"}, "openvocab": {"dim": "wide"}}),
    "null for a number": ("best.ckpt", {
        "leaf": {"num_classes": None}, "simbev": {"camC": None}, "beam": {"width": None},
        "xad": {"width": None}, "openvocab": {"image_size": [64]}}),
    "a list for a word": ("best.ckpt", {
        "leaf": {"variant": ["vanilla"]}, "simbev": {"trunk": []}, "beam": {"FFM": {}},
        "xad": {"refiner": []}, "openvocab": {"text_encoder": ["tiny"]}}),
    "a name of 10^5 letters": ("best.ckpt", {
        "leaf": {"variant": "x" * 10**5}, "simbev": {"trunk": "x" * 10**5},
        "beam": {"arch": "x" * 10**5}, "xad": {"refiner": "x" * 10**5},
        "openvocab": {"preset": "x" * 10**5}}),
}  # fmt: skip


def _misfit(system: str, change: Callable, folder: Path) -> object:
    return _use(system, _saved(system, folder / "best.ckpt", change))


def _setting(system: str, settings: object, folder: Path) -> object:
    return _use(system, _saved(system, folder / "best.ckpt", settings=settings))


class Net(torch.nn.Linear):
    """Somebody's class, which a file may name."""


class _Command:
    """What runs a command where a pickle is read as a program."""

    def __reduce__(self):
        return os.mkdir, (os.environ["LEANSENSE_KIND"],)


def _runs_nothing(path: Path, bare: bool, call: Callable) -> object:
    """Have `path` be a pickle that makes a folder, and see that none is made."""
    os.environ["LEANSENSE_KIND"] = str(path.parent / "ran")
    try:
        if bare:
            path.write_bytes(pickle.dumps({"model": _Command()}))
        else:
            torch.save({"model": _Command()}, path)
        return call()
    finally:
        del os.environ["LEANSENSE_KIND"]
        assert not (path.parent / "ran").exists()


def _packed(path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 16)}, path)
    content = {}
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def _deep(path: Path) -> None:
    """A list in a list, 100,000 levels, which no pickler would write."""
    torch.save({"x": 3}, path)
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in content.items():
            deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
            new.writestr(name, deep if name.endswith("data.pkl") else data)


def _arrays(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    path.write_bytes(buffer.getvalue())


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SPOILED = {  # kind: (words, what is done to a sound file at the path)
    "nothing there": ("no such", lambda p: p.unlink()),
    "a folder": ("not a", lambda p: (p.unlink(), p.mkdir())),
    "a pipe": ("not a", lambda p: (p.unlink(), os.mkfifo(p))),
    "a link to nothing": ("no such", lambda p: (p.unlink(), p.symlink_to("nowhere"))),
    "an empty file": ("cannot be read", lambda p: p.write_bytes(b"")),
    "a text": ("cannot be read", lambda p: p.write_text("hello\n")),
    "a web page": ("cannot be read", lambda p: p.write_text("<!doctype html><p>404")),
    "a pointer of git LFS": ("cannot be read", lambda p: p.write_text(LFS)),
    "the first half": ("cannot be read", lambda p: p.write_bytes(
        p.read_bytes()[: p.stat().st_size // 2])),
    "zeros after a power cut": ("cannot be read", lambda p: p.write_bytes(
        bytes(p.stat().st_size))),
    "one bit turned over": ("damaged", _flipped),
    "packed, as TorchScript": ("packed", _packed),
    "a whole network (an object)": ("save its state_dict alone", lambda p: torch.save(
        {"model": Net(2, 3)}, p)),
    "arrays of NumPy": ("best.ckpt", _arrays),
    "one number": ("not a checkpoint", lambda p: torch.save(3, p)),
    "a list of tensors": ("not a checkpoint", lambda p: torch.save([torch.ones(2)], p)),
    "weights alone": ("not a checkpoint", lambda p: torch.save({"w": torch.ones(2)}, p)),
}  # fmt: skip


@cache
def _sound(system: str) -> bytes:
    """A sound checkpoint's bytes."""
    with tempfile.TemporaryDirectory() as name:
        return _saved(system, Path(name) / "best.ckpt").read_bytes()


def _spoiled(system: str, spoil: Callable, folder: Path) -> object:
    path = folder / "best.ckpt"
    path.write_bytes(_sound(system))
    spoil(path)
    return _use(system, path)


def _command(system: str, bare: bool, folder: Path) -> object:
    path = folder / "best.ckpt"
    return _runs_nothing(path, bare, lambda: _use(system, path))


def _foreign(system: str, folder: Path) -> object:
    """A sound checkpoint of the next system."""
    other = SYSTEMS[(SYSTEMS.index(system) + 1) % len(SYSTEMS)]
    return _use(system, _saved(other, folder / "best.ckpt"))


def _overflow(system: str, folder: Path) -> object:
    """Finite weights so large that the answer is none."""
    from PIL import Image

    Image.new("RGB", (64, 64), "green").save(folder / "p.png")
    path = _saved(system, folder / "best.ckpt", partial(_cast, torch.float32))
    content = torch.load(path, weights_only=True)
    inner = content["model" if system == "leaf" else "state_dict"]
    for name, value in inner.items():
        if value.is_floating_point() and name.endswith("weight"):
            inner[name] = torch.full_like(value, 1e30)
    torch.save(content, path)
    first, last = (["predict"], []) if system == "leaf" else ([], ["a ball"])
    return ask(_main(system), *first, path, folder / "p.png", *last, "--out", folder / "out")


CHECKPOINTS: list[Kind] = []
for _system in SYSTEMS:
    _add = partial(Kind, "checkpoint")
    CHECKPOINTS += [
        _add(said, _system, "", partial(_read_kind, _system, *spoil))
        for said, spoil in READ.items()
    ]
    CHECKPOINTS += [
        _add("half precision", _system, "", partial(_rounded, _system, torch.float16)),
        _add("8-bit floats", _system, "", partial(_rounded, _system, torch.float8_e4m3fn)),
        _add("bfloat16", _system, "", partial(_rounded, _system, torch.bfloat16)),
        _add("with an optimiser's NaN beside it", _system, "", partial(_beside, _system)),
        _add("umlauts and shell words in its path", _system, "", partial(_named_oddly, _system)),
        _add("settings that name other files", _system, "", partial(_started, _system)),
        _add("a link to it", _system, "", partial(_linked, _system)),
    ]
    CHECKPOINTS += [
        _add(said, _system, words, partial(_misfit, _system, change))
        for said, (words, change) in MISFITS.items()
    ]
    CHECKPOINTS += [
        _add(said, _system, words, partial(_setting, _system, given[_system]))
        for said, (words, given) in LINES.items()
    ]
    CHECKPOINTS += [
        _add(said, _system, words, partial(_spoiled, _system, spoil))
        for said, (words, spoil) in SPOILED.items()
    ]
    CHECKPOINTS += [
        _add("settings that are no JSON", _system, "best.ckpt", partial(_setting, _system, "{")),
        _add("settings of 10^5 brackets", _system, "best.ckpt",
             partial(_setting, _system, "[" * 10**5)),
        _add("settings with a number of 5,000 digits", _system, "best.ckpt",
             partial(_setting, _system, '{"config": ' + "9" * 5000 + "}")),
        _add("a command in PyTorch's format", _system, "objects",
             partial(_command, _system, False)),
        _add("a command in a pickle", _system, "cannot be read", partial(_command, _system, True)),
        _add("a checkpoint of another system", _system, "best.ckpt", partial(_foreign, _system)),
    ]  # fmt: skip


READING = {  # kind: (words, parameters of each system)
    "pictures of 10^9 pixels a side": ("is the most", {
        "simbev": {"params": {"H": 10**9, "W": 10**9}}, "xad": {"H": 10**9, "W": 10**9},
        "beam": {"size": 10**9}}),
    "a word for a number of reading": ("best.ckpt", {
        "simbev": {"params": {"H": "many"}}, "xad": {"ncams": "many"},
        "beam": {"enhanced": "many"}}),
    "a number for cameras": ("best.ckpt", {
        "simbev": {"params": {"cams": 3}}, "xad": {"cams": 3}, "beam": {"modalities": 3}}),
    "a list for a number of reading": ("best.ckpt", {
        "simbev": {"params": {"W": [1]}}, "xad": {"H": [1]}, "beam": {"angle": [1]}}),
    "an infinite size": ("best.ckpt", {
        "simbev": {"params": {"H": math.inf}}, "xad": {"H": math.inf}, "beam": {"size": math.inf}}),
    "classes that are numbers": ("best.ckpt", {
        "simbev": {"params": {"classes": [1, 2]}}, "xad": {"raster": 3}, "beam": {"arch": 3}}),
}  # fmt: skip
CHECKPOINTS += [
    Kind("checkpoint", said, system, words, partial(_setting, system, given[system]))
    for said, (words, given) in READING.items()
    for system in given
]


def _limited(system: str, words: tuple, folder: Path) -> object:
    from PIL import Image

    Image.new("RGB", (64, 64), "green").save(folder / "none.jpg")
    return _use(system, _saved(system, folder / "best.ckpt"), *words)


OPTIONS = {
    "--limit -1": (("simbev", "beam", "xad"), "limit=-1", ("--limit", "-1")),
    "--top 0": (("openvocab",), "top=0", ("--top", "0")),
    "--floor 2": (("openvocab",), "floor=2", ("--floor", "2")),
    "--floor nan": (("openvocab",), "floor=nan", ("--floor", "nan")),
}
CHECKPOINTS += [
    Kind("option", said, system, words, partial(_limited, system, given))
    for said, (systems, words, given) in OPTIONS.items()
    for system in systems
]
CHECKPOINTS += [
    Kind("checkpoint", "finite weights that overflow", system, "NaN", partial(_overflow, system))
    for system in ("leaf", "openvocab")
]

# --- meta of a leaf checkpoint ---

META = {
    "no temperature": ("temperature is None", {"temperature": None}),
    "a temperature of zero": ("temperature is 0", {"temperature": 0.0}),
    "names of two classes": ("names 2 classes", {"label2id": {"a": 0, "b": 1}}),
    "two classes of one number": ("numbers its classes", {"label2id": dict(a=0, b=1, c=2, d=2)}),
    "a picture of no number": ("not a number of pixels", {"image_size": True}),
    "a side of 10^6 in meta": ("is the most", {"image_size": 10**6}),
    "a class name that is a pair": (
        "names a class",
        {"label2id": {(1, 2): 0, "b": 1, "c": 2, "d": 3}},
    ),
    "class names that are a list": ("class names", {"label2id": ["a", "b", "c", "d"]}),
    "a threshold of NaN": ("unsure_below is nan", {"unsure_below": math.nan}),
    "parameters that are a list": ("best.ckpt", {"params": [1]}),
}


def _meta(change: dict, folder: Path) -> object:
    content = torch.load(_saved("leaf", folder / "best.ckpt"), weights_only=True)
    content["meta"] |= change
    torch.save(content, folder / "best.ckpt")
    return _use("leaf", folder / "best.ckpt")


CHECKPOINTS += [
    Kind("checkpoint", said, "leaf", words, partial(_meta, change))
    for said, (words, change) in META.items()
]

# --- files of weights ---

PLAIN = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.zeros(3)}


def _safe(path: Path, weights: dict) -> None:
    from safetensors.torch import save_file

    save_file(weights, path)


def _plain(write: Callable, name: str, folder: Path) -> object:
    """True: a file of weights is read as what was written."""
    from leansense.core.weights import read_weights

    path = folder / name
    write(path)
    found = read_weights(path)
    return found.keys() == PLAIN.keys() and all(torch.equal(found[n], PLAIN[n]) for n in PLAIN)


def _header(length: int, text: bytes = b"{}") -> Callable:
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + text)


def _hole(size: int, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _cycle(path: Path) -> None:
    content = {"a": torch.ones(1)}
    content["model"] = content
    torch.save(content, path)


def _pickled(path: Path) -> object:
    from leansense.core.weights import read_weights

    return _runs_nothing(path, False, lambda: read_weights(path))


LIES = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'  # noqa: E501
FILES = {  # kind: (words, name, what writes it)
    "safetensors": ("", "w.safetensors", lambda p: _safe(p, PLAIN)),
    "safetensors, ending in capitals": ("", "w.SAFETENSORS", lambda p: _safe(p, PLAIN)),
    "safetensors behind `module.`": (
        "", "w.safetensors", lambda p: _safe(p, _before("module.", PLAIN))),
    "a state_dict in .pt": ("", "w.pt", lambda p: torch.save(PLAIN, p)),
    "a state_dict in .pth.tar": ("", "w.pth.tar", lambda p: torch.save(
        {"state_dict": _before("module.", PLAIN), "arch": "x"}, p)),
    "a state_dict in .bin": ("", "w.bin", lambda p: torch.save(PLAIN, p)),
    "names behind `model.module._orig_mod.`": ("", "w.pt", lambda p: torch.save(
        _before("model.module._orig_mod.", PLAIN), p)),
    "`state_dict` under `model`": ("", "w.pt", lambda p: torch.save(
        {"model": {"state_dict": PLAIN}}, p)),
    "parameters, not tensors": ("", "w.pt", lambda p: torch.save(
        {n: torch.nn.Parameter(v) for n, v in PLAIN.items()}, p)),
    "complex numbers with NaN": ("hold NaN", "w.pt", lambda p: torch.save(
        {"w": torch.tensor([complex(math.nan, 1)])}, p)),
    "a dictionary inside itself": ("nested", "w.pt", _cycle),
    "lists nested 100,000 deep": ("w.pt", "w.pt", _deep),
    "64 GB of a hole": ("cannot be read", "w.pt", partial(_hole, 1 << 36)),
    "64 GB of a hole, safetensors": ("cannot be read", "w.safetensors", partial(_hole, 1 << 36)),
    "weights with NaN": ("hold NaN", "w.pt", lambda p: torch.save(
        PLAIN | {"bias": torch.tensor([0, math.nan, 0])}, p)),
    "safetensors with infinity": ("hold Inf", "w.safetensors", lambda p: _safe(
        p, PLAIN | {"bias": torch.tensor([0, math.inf, 0])})),
    "an object in a list": ("save its state_dict", "w.pt", lambda p: torch.save([Net(2, 3)], p)),
    "a pickle that runs a command": ("objects", "w.pt", _pickled),
    "a dictionary without tensors": ("no weights by name", "w.pt", lambda p: torch.save(
        {"epoch": 3}, p)),
    "a header of 2^60 bytes": ("cannot be read", "w.safetensors", _header(1 << 60)),
    "a header that claims 4 TB": ("cannot be read", "w.safetensors", _header(
        len(LIES), LIES.encode())),
    "a header that is no JSON": ("cannot be read", "w.safetensors", _header(3, b"{{{")),
    "safetensors with a name twice": ("cannot be read", "w.safetensors", _header(
        len(TWICE), TWICE + b"0")),
    "safetensors cut short": ("cannot be read", "w.safetensors", lambda p: (
        _safe(p, PLAIN), p.write_bytes(p.read_bytes()[:-4]))),
    "an empty .safetensors": ("cannot be read", "w.safetensors", lambda p: p.write_bytes(b"")),
    "a folder of weights": ("not a file", "w", lambda p: p.mkdir()),
}  # fmt: skip
WEIGHTS = [
    Kind("file of weights", said, "core.weights", words, partial(_plain, write, name))
    for said, (words, name, write) in FILES.items()
]


def _trunk(system: str, change: Callable, folder: Path) -> object:
    """True: a system's network begins with the weights of a file of a trunk."""
    torch.manual_seed(1)
    path = folder / "trunk.pt"
    if system == "leaf":
        from leansense.leaf.model import build, load_weights

        given = build(**_settings(system)).backbone.state_dict()
        torch.save(change(given), path)
        found = load_weights(build(**_settings(system)), path).backbone
    elif system == "beam":
        from leansense.beam.model import load_backbones
        from leansense.beam.use import _settings as taken
        from leansense.beam.use import build

        given = build(**taken(_settings(system))).encoders["image"].state_dict()
        torch.save(change(given | {"fc.weight": torch.ones(1)}), path)
        model = build(**taken(_settings(system)))
        load_backbones(model, path)
        found = model.encoders["image"]
    elif system == "openvocab":
        from leansense.openvocab.model import load_backbone
        from leansense.openvocab.use import build_detector

        own = build_detector(_settings(system)).backbone
        given = {name: value + 1 for name, value in own.network.state_dict().items()}
        torch.save(change(given), path)
        load_backbone(own, path)
        found = own.network
    else:
        from leansense.layers.vovnet import VoVNet, load_trunk

        given = VoVNet(39, width=0.0625).state_dict()
        torch.save(change(given), path)
        found = load_trunk(VoVNet(39, width=0.0625), path)
    return all(torch.equal(value, given[name]) for name, value in found.state_dict().items())


TRUNKS = {
    "a trunk's weights": ("", dict),
    "a trunk's weights behind `module.`": ("", partial(_before, "module.")),
    "a trunk's weights with NaN": ("hold NaN", lambda w: set_one(w, math.nan)),
    "weights of another trunk": ("trunk.pt", lambda w: PLAIN),
}
WEIGHTS += [
    Kind("file of weights", said, system, words, partial(_trunk, system, change))
    for system in ("leaf", "beam", "xad", "openvocab")
    for said, (words, change) in TRUNKS.items()
]

# --- matrices of rows, and lists of claims ---


@contextlib.contextmanager
def _repository(folder: Path, matrix: str | bytes = toy.MATRIX):
    """A scratch repository with one toy system, which this process works in."""
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = leansense\n")
    if not (folder / "lib").exists():
        (folder / "lib").symlink_to(ROOT / "lib")
        toy.save(folder / "nbs/toy/80_row.ipynb", toy.ROW)
    path = folder / "papers/toy/rows.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(matrix if isinstance(matrix, bytes) else matrix.encode())
    before = os.environ["LEANSENSE_ROOT"]
    os.environ["LEANSENSE_ROOT"] = str(folder)
    try:
        yield path
    finally:
        os.environ["LEANSENSE_ROOT"] = before


def _check(matrix: str | bytes, folder: Path) -> str:
    from leansense.core import rows

    with _repository(folder, matrix):
        return ask(rows.main, "check", "toy")


def _counted(matrix: str | bytes, count: int, folder: Path) -> object:
    return f"toy: {count} rows " in _check(matrix, folder)


def _values(matrix: str, values: list, folder: Path) -> object:
    """True: the rows have these values of the parameter `value`."""
    from leansense.core.rows import read_rows

    with _repository(folder, matrix):
        found = [row.params["value"] for row in read_rows("toy")]
        return found == values or found


def _one(line: str = "{label: One}", name: str = "one", more: str = "") -> str:
    return f"{more}tables: {{main: {{rows: {{{name}: {line}}}}}}}\n"


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(
        lines + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    )


ROWS_READ = {
    "the toy's matrix": (toy.MATRIX, 4),
    "an empty file": ("", 0),
    "a comment alone": ("# nothing yet\n", 0),
    "CRLF ends of lines": (toy.MATRIX.replace("\n", "\r\n"), 4),
    "a byte-order mark": ("\ufeff" + toy.MATRIX, 4),
    "a name that is a number": (_one(name="2024"), 1),
    "a name with dots and dashes": (_one(name="a-b.c_d"), 1),
    "a Chinese label": (_one("{label: 水稻}"), 1),
    "a label of LaTeX": (_one(r"{label: '$\alpha$ \\ [x]'}"), 1),
    "a label with escapes": (_one(r'{label: "\e[2J"}'), 1),
    "no label": (_one("{}"), 1),
    "null for a row": (_one("null"), 1),
}
ROWS_VALUES = {
    "a grid": ("tables: {main: {grid: {value: [1, 2]}}}\n", [1, 2]),
    "anchors and merges": (
        "tables: {main: {params: &p {value: 3}, rows: {one: {params: {<<: *p}}, two: {}}}}\n",
        [3, 3]),
    "a row's value over its table's": (
        "tables: {main: {params: {value: 5}, rows: {one: {}, two: {params: {value: 6}}}}}\n",
        [5, 6]),
}  # fmt: skip
ROWS_REFUSED = {
    **{
        f"a {kind} named {said}": ("cannot name a", matrix)
        for said, name in {
            "`b$(touch x)`": '"b$(touch x)"', "in backticks": '"`x`"', "`../..`": '"../.."',
            "by an absolute path": "/some/where", "`-rf`": '"-rf"', "`.hidden`": ".hidden",
            "with a blank": '"a b"', "with a line break": r'"a\nb"', "with a tab": r'"a\tb"',
            "with 300 letters": "x" * 300, "by nothing": '""', "by an umlaut": "größe",
            "`~`": '"~"', "with braces": '"{seed}"', "with a bell": r'"a\ab"', "`true`": "true",
        }.items()
        for kind, matrix in {
            "row": _one(name=name), "table": f"tables: {{{name}: {{rows: {{one: {{}}}}}}}}\n",
        }.items()
    },  # fmt: skip
    "a table named null": ("cannot name a", "tables: {null: {rows: {one: {}}}}\n"),
    "a notebook that leads out": ("cannot name a", _one(more="notebook: ../../x\n")),
    "a notebook that is not there": ("rows.yaml", _one(more="notebook: 99_none\n")),
    "a bomb of aliases": ("aliases", _bomb()),
    "a bomb in a value": ("aliases", _one(more=f"params:\n  {_bomb()}\n".replace("\na", "\n  a"))),
    "an alias of itself": ("levels deep", "tables: &a [*a]\n"),
    "5,000 brackets": ("levels deep", "tables: " + "[" * 5000 + "]" * 5000),
    "a key twice": ("is there twice", "tables: {}\ntables: {}\n"),
    "a row twice": ("is there twice", "tables: {main: {rows: {one: {}, one: {}}}}\n"),
    "rows 1 and '1'": ("is there twice", "tables: {main: {rows: {1: {}, '1': {}}}}\n"),
    "tabs": ("rows.yaml, line 2", "tables:\n\tmain: {}\n"),
    "a bracket open": ("rows.yaml, line", "tables: {main: {\n"),
    "marks of a merge": ("rows.yaml, line", f"<<<<<<< HEAD\n{toy.SMALL}=======\n>>>>>>> x\n"),
    "two documents": ("rows.yaml", "tables: {}\n---\ntables: {}\n"),
    "Latin-1": ("is not UTF-8", "# größe\n".encode("latin-1")),
    "UTF-16": ("is not UTF-8", toy.SMALL.encode("utf-16")),
    "NULs": ("rows.yaml", bytes(100)),
    "a megabyte of blanks": ("more than 1 MB", b" " * (1 << 21)),
    "a Python object": ("could not determine", "tables: !!python/object/apply:os.getcwd []\n"),
    "a number of 5,000 digits": ("rows.yaml", "tables: " + "9" * 5000),
    "a list for the file": ("expected", "[1, 2]\n"),
    "a text for the file": ("expected", "hello\n"),
    "a number for the tables": ("expected", "tables: 3\n"),
    "a list of rows": ("expected", "tables: {main: {rows: [one, two]}}\n"),
    "a text for a row": ("expected", _one("hello")),
    "an unknown word": ("unknown word", _one("{lable: One}")),
    "an unknown scale": ("unknown scale", _one("{scales: {demonstration: {}}}")),
    "an unknown parameter": ("'valeu'", _one("{params: {valeu: 3}}")),
    "a text for a number": ("value", _one("{params: {value: many}}")),
    "a list for a number": ("value", _one("{params: {value: [1]}}")),
    "null for a number": ("value", _one("{params: {value: null}}")),
    "NaN for a number": ("sleep", _one("{params: {sleep: .nan}}")),
    "infinity for a number": ("sleep", _one("{params: {sleep: .inf}}")),
    "yes for a number": ("value", _one("{params: {value: yes}}")),
    "a date for a number": ("value", _one("{params: {value: 2024-01-01}}")),
    "a parameter of the runner": ("set by the runner", _one("{params: {out: /etc/passwd}}")),
    "seeds that are a text": ("seeds", _one(more="seeds: all\n")),
    "a seed below zero": ("seeds", _one(more="seeds: [-1]\n")),
    "a seed beyond NumPy's": ("seeds", _one(more="seeds: [99999999999]\n")),
    "no seed": ("seeds", _one(more="seeds: []\n")),
    "a seed twice": ("seed", _one(more="seeds: [0, 0]\n")),
    "cores below one": ("cores", _one(more="cores: 0\n")),
    "cores in words": ("cores", _one(more="cores: many\n")),
    "a grid of 10^9 rows": ("are allowed", "tables: {main: {grid: {" + ", ".join(
        f"{name}: [{', '.join(map(str, range(1000)))}]" for name in "abc") + "}}}\n"),
    "a grid of nothing": ("grid", "tables: {main: {grid: {value: []}}}\n"),
    "two rows of one name in a grid": (
        "would be named", "tables: {main: {grid: {value: [1, 1]}}}\n"),
    "a parent that is not there": ("no row", _one("{needs: {data: main/none}}")),
    "a row that needs itself": ("circle", _one("{needs: {data: main/one}}")),
    "a parent that is a number": ("expected", _one("{needs: {data: 3}}")),
    "an unknown word for the data": (
        "expected standin or real", "tables: {main: {only: reel, rows: {one: {}}}}\n"),
    "a list for a pattern": ("holds", "tables: {main: {holds: [a], rows: {one: {}}}}\n"),
    "a list for a label": ("label", _one("{label: [a]}")),
    "a claim of a list": ("claim", _one("{claim: {score: [1, 2]}}")),
    "a headline in words": ("headline", _one(more="headline: 99 %\n")),
    "half a headline": ("headline", _one(more="headline: {table: main}\n")),
    "a title that is a list": ("title", _one(more="title: [a]\n")),
    "a claim that is a text": ("expected", _one("{claim: '99 %'}")),
}  # fmt: skip


def _matrix_folder(make: Callable, folder: Path) -> object:
    """The matrix replaced by something that is no file."""
    from leansense.core import rows

    with _repository(folder) as path:
        path.unlink()
        make(path)
        return ask(rows.main, "check", "toy")


def _strayed(folder: Path) -> object:
    """A folder of records that is a link to a folder of the user's."""
    from leansense.core import rows

    with _repository(folder, toy.SMALL) as path:
        (folder / "mine").mkdir()
        (path.parent / "records").symlink_to(folder / "mine")
        return ask(rows.main, "check", "toy")


ROWS = [
    Kind("rows.yaml", said, "core.rows", "", partial(_counted, matrix, count))
    for said, (matrix, count) in ROWS_READ.items()
]
ROWS += [
    Kind("rows.yaml", said, "core.rows", "", partial(_values, matrix, values))
    for said, (matrix, values) in ROWS_VALUES.items()
]
ROWS += [
    Kind("rows.yaml", said, "core.rows", words, partial(_check, matrix))
    for said, (words, matrix) in ROWS_REFUSED.items()
]
ROWS += [
    Kind("rows.yaml", "a folder", "core.rows", "rows.yaml", partial(_matrix_folder, Path.mkdir)),
    Kind("rows.yaml", "a pipe", "core.rows", "rows.yaml", partial(_matrix_folder, os.mkfifo)),
    Kind("rows.yaml", "nothing", "core.rows", "no system", partial(_matrix_folder, lambda p: None)),
    Kind("rows.yaml", "records that are a link out", "core.rows", "not below", _strayed),
]

CLAIM = "- {statement: a, unit: '%', measure: m, claimed: 1, tolerance: 0.5}\n"
CLAIMS_REFUSED = {
    "a mapping": ("expected a list", "a: 1\n"),
    "nothing": ("expected a list", ""),
    "an unknown entry": ("unknown entry", CLAIM.replace("unit", "units")),
    "no tolerance": ("tolerance", CLAIM.replace(", tolerance: 0.5", "")),
    "a claimed text": ("claimed", CLAIM.replace("claimed: 1", "claimed: a lot")),
    "a claimed list of three": ("claimed", CLAIM.replace("claimed: 1", "claimed: [1, 2, 3]")),
    "a tolerance of NaN": ("tolerance", CLAIM.replace("0.5", ".nan")),
    "a statement that is a list": ("statement", CLAIM.replace("statement: a", "statement: [a]")),
    "a number for an entry's name": ("entry", "- {3: a}\n"),
    "a bomb": ("aliases", _bomb()),
}


def _claims(text: str, folder: Path) -> object:
    from leansense.core.claims import judge_all, read_claims

    (folder / "claims.yaml").write_text(text)
    return list(judge_all(read_claims(folder / "claims.yaml"), {"m": 1.2})["verdict"])


ROWS += [
    Kind("claims.yaml", said, "core.claims", words, partial(_claims, text))
    for said, (words, text) in CLAIMS_REFUSED.items()
]
ROWS.append(Kind("claims.yaml", "sound", "core.claims", "",
                 lambda folder: _claims(CLAIM, folder) == ["reproduced"]))  # fmt: skip

# --- records ---


@cache
def _record() -> bytes:
    """A sound record of the toy's row, as its notebook would write it."""
    from leansense.core.record import Run

    with _repository(_house(), toy.SMALL):
        out = _house() / "papers/toy/records/demo/main/one.s0.json"
        given = {"seed": 0, "value": 1, "sleep": 0.0, "fail": False, "data": "", "folder": ""}
        given |= {"progress": False, "out": str(out)}
        run = Run(given, "nbs/toy/80_row.ipynb")
        run.finish({"score": 1.5}, {}, {"name": "none", "fingerprint": ""}, {"device": "cpu"})
        return out.read_bytes()


def _changed(**blocks: object) -> bytes:
    return json.dumps(json.loads(_record()) | blocks).encode()


def _without(block: str) -> bytes:
    record = json.loads(_record())
    del record[block]
    return json.dumps(record).encode()


@cache
def _house() -> Path:
    """One scratch repository for all records: its code is looked at once."""
    made = tempfile.mkdtemp(prefix="kinds-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made).resolve()


@contextlib.contextmanager
def _placed(make: Callable):
    """A record of the toy's one row, as `make` says: its bytes, or what is in its place."""
    with _repository(_house(), toy.SMALL):
        path = _house() / "papers/toy/records/demo/main/one.s0.json"
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        made = make()
        path.write_bytes(made) if isinstance(made, bytes) else made(path)
        yield path


def _judged(make: Callable, reason: str, folder: Path) -> object:
    """True: the plan says this of the row, its table shows no number of it, and it is not lost."""
    from leansense.core import batch, tables

    with _placed(make):
        (step,) = batch.plan("toy")
        line = tables.frame([step.row]).iloc[0]
        shown = "metrics.score" in line
        if step.reason != reason or shown == (reason == "unreadable record"):
            return step.reason, shown
        return step.seconds is None or step.seconds >= 0


BLOCKS = ("params", "metrics", "cost", "data", "env", "code", "seed", "table", "schema")
BROKEN: dict[str, Callable] = {
    "an empty file": lambda: b"",
    "its first half": lambda: _record()[: len(_record()) // 2],
    "zeros after a power cut": lambda: bytes(len(_record())),
    "bytes that are not UTF-8": lambda: _record()[:50] + b"\xff\xfe" + _record()[52:],
    "a list": lambda: b"[]",
    "null": lambda: b"null",
    "a number": lambda: b"7",
    "its schema alone": lambda: b'{"schema": 2}',
    "a schema that is a text": lambda: _changed(schema="2"),
    "a schema that is true": lambda: _changed(schema=True),
    "schema 0": lambda: _changed(schema=0),
    "no metrics in metrics": lambda: _changed(metrics={}),
    "a metric of NaN": lambda: _record().replace(b'"score": 1.5', b'"score": NaN'),
    "a metric of 1e999": lambda: _record().replace(b'"score": 1.5', b'"score": 1e999'),
    "a number of 5,000 digits": lambda: _record().replace(b"1.5", b"9" * 5000),
    "10^5 brackets": lambda: b"[" * 10**5,
    "marks of a merge": lambda: b"<<<<<<< HEAD\n" + _record() + b"=======\n>>>>>>> x\n",
    "a metric of 400 digits": lambda: _changed(metrics={"score": 10**400}),
    "parents that are a list": lambda: _changed(needs=[1]),
    "a parent without its code": lambda: _changed(needs={"main/two.s0": None}),
    "seconds that are a text": lambda: _changed(cost={"seconds": "x"}),
    "a fingerprint that is a list": lambda: _changed(
        data=json.loads(_record())["data"] | {"fingerprint": []}
    ),
    "a folder in its place": lambda: Path.mkdir,
    "a pipe in its place": lambda: os.mkfifo,
    **{f"{block} missing": partial(_without, block) for block in BLOCKS},
    **{f"{block} null": partial(lambda b: _changed(**{b: None}), block) for block in BLOCKS},
}
DATED: dict[str, tuple[str, Callable]] = {
    "as it was written": ("", lambda: _record()),
    "a byte-order mark before it": ("", lambda: b"\xef\xbb\xbf" + _record()),
    "a metric that is null": ("", lambda: _record().replace(b'"score": 1.5', b'"score": null')),
    "CRLF ends of lines": ("", lambda: _record().replace(b"\n", b"\r\n")),
    "other blanks and order of keys": ("", lambda: _changed()),
    "other parameters": ("changed value", lambda: _changed(
        params=json.loads(_record())["params"] | {"value": 2})),
    "other code": ("changed code: ", lambda: _changed(
        code={"nbs/toy/80_row.ipynb": "0"})),
    "another row's": ("another row's record", lambda: _changed(row="two")),
    "a link to itself": ("no record yet", lambda: lambda path: path.symlink_to(path.name)),
    "a newer schema": ("newer schema; update the checkout", lambda: _changed(schema=99)),
}  # fmt: skip
RECORDS = [
    Kind("record", said, "core.record", "", partial(_judged, make, "unreadable record"))
    for said, make in BROKEN.items()
]


def _dated(reason: str, make: Callable, folder: Path) -> object:
    from leansense.core import batch

    with _placed(make):
        found = batch.plan("toy")[0].reason
        return found == reason or bool(reason) and found.startswith(reason) or found


def _overwritten(folder: Path) -> object:
    """A run that would write over the record of a later version."""
    from leansense.core.record import Run

    with _placed(lambda: _changed(schema=99)) as path:
        given = {"seed": 0, "value": 1, "sleep": 0.0, "fail": False, "data": "", "folder": ""}
        try:
            return Run(given | {"progress": False, "out": str(path)}, "nbs/toy/80_row.ipynb")
        finally:
            assert path.read_bytes() == _changed(schema=99)


def _tabled(value: object, shown: str, folder: Path) -> object:
    """True: a table prints this metric so."""
    from leansense.core import tables

    with _placed(lambda: _changed(metrics={"score": value})):
        paper = tables.Paper("toy")
        lines = paper.runs("main")
        found = paper.table("x", lines, [tables.Column("metrics.score", "score", best=max)])
        return found["score"].iloc[0] == shown or found["score"].iloc[0]


RECORDS += [
    Kind("record", f"{said}, in a table", "core.tables", "", partial(_tabled, value, shown))
    for said, value, shown in (
        ("a number", 1.5, "1.50"),
        ("null", None, "–"),
        ("a list", [1, 2], "[1,\u00a02]"),
        ("a text of commands", r"\foo", r"\foo"),
        ("a mapping", {"a": 1}, "–"),
    )
]
RECORDS += [
    Kind("record", said, "core.record", "", partial(_dated, reason, make))
    for said, (reason, make) in DATED.items()
]
RECORDS.append(
    Kind(
        "record", "one of a newer schema, to be written over", "core.record", "update", _overwritten
    )
)

# --- a notebook, a list of vouched changes, a checkpoint to go on from ---


def _cells(**change: object) -> dict:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": toy.ROW[0][1]}
    return {"cells": [cell | change], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def _declared(line: str) -> dict:
    return _cells(source=f"{toy.ROW[0][1]}\n{line}")


NOTEBOOKS: dict[str, tuple[str, object]] = {
    "as it was saved": ("", _cells()),
    "a byte-order mark before it": ("", b"\xef\xbb\xbf" + json.dumps(_cells()).encode()),
    "NaN among its outputs": ("", _cells(outputs=[{"data": math.nan}])),
    "an empty file": ("not a notebook", b""),
    "a folder": ("not a notebook", Path.mkdir),
    "a pipe": ("not a notebook", os.mkfifo),
    "nothing": ("no such notebook", lambda path: None),
    "a list": ("not a notebook", []),
    "no cells": ("not a notebook", {"cells": None}),
    "cells that are texts": ("not a notebook", {"cells": ["a", "b"]}),
    "metadata that are a list": ("not a notebook", _cells(metadata=[])),
    "tags that are null": ("not a notebook", _cells(metadata={"tags": None})),
    "a source that is a number": ("not a notebook", _cells(source=3)),
    "10^5 brackets": ("not a notebook", b"[" * 10**5),
    "marks of a merge": ("not a notebook", b"<<<<<<< HEAD\n" + json.dumps(_cells()).encode()),
    "Latin-1": ("not a notebook", '{"cells": ["größe"]}'.encode("latin-1")),
    "no cell of parameters": ("0 cells tagged", _cells(metadata={})),
    "a parameter by a call": ("is not a literal", _declared("x: int = open('x')  # y")),
    "a parameter of an unknown kind": ("must be one of", _declared("x: Path = ''  # y")),
    "a parameter of NaN": ("finite", _declared("x: float = 1e999  # y")),
    "a parameter without a word": ("needs a comment", _declared("x: int = 3")),
    "a parameter of another kind": ("is not int", _declared("x: int = 'a'  # y")),
    "a key that is a list": ("80_row", _declared("x: dict = {[]: 1}  # y")),
    "10^4 brackets in a parameter": ("80_row", _declared(
        "x: list = " + "[" * 10**4 + "]" * 10**4 + "  # y")),
    "a number of 5,000 digits": ("80_row", _declared("x: int = " + "9" * 5000 + "  # y")),
    "10^5 signs in a parameter": ("80_row", _declared("x: int = " + "-" * 10**5 + "1  # y")),
    "a NUL in a parameter": ("80_row", _declared("x: str = 'a\0'  # y")),
    "a line of no Python": ("not Python", _declared("x: int = = 3  # y")),
}  # fmt: skip


def _notebook(content: object, folder: Path) -> object:
    """True: the row of the toy is sound with this as its notebook."""
    from leansense.core import rows

    with _repository(folder, toy.SMALL):
        path = folder / "nbs/toy/80_row.ipynb"
        path.unlink()
        if callable(content):
            content(path)
        else:
            path.write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
        return "toy: 1 rows " in ask(rows.main, "check", "toy")


ROWS += [
    Kind("notebook", said, "core.parameters", words, partial(_notebook, content))
    for said, (words, content) in NOTEBOOKS.items()
]

CELLS = {
    "a cell of 10^5 brackets": "x = " + "[" * 10**5,
    "a cell of 10^5 signs": "x = " + "-" * 10**5 + "1",
    "a cell of 10^4 sums": "x = 1" + " + 1" * 10**4,
    "a cell with a NUL": "x = 'a\0'",
    "half a cell": "x = (",
}


def _cell(source: str, folder: Path) -> object:
    """What the plan says of a row whose notebook has this cell."""
    from leansense.core import batch

    with _repository(folder, toy.SMALL):
        toy.save(folder / "nbs/toy/80_row.ipynb", [*toy.ROW, ("", source)])
        return batch.plan("toy")


ROWS += [
    Kind("notebook", said, "core.digest", "cell 4", partial(_cell, source))
    for said, source in CELLS.items()
]

ENTRY = dict.fromkeys(("notebook", "table", "old", "new", "metrics", "commit"), "x")
VOUCHED: dict[str, tuple[str, object]] = {
    "sound": ("", [ENTRY]),
    "an empty list": ("", []),
    "a mapping": ("not a list of vouched", ENTRY),
    "an entry without its table": ("not a list of vouched", [{"old": "x"}]),
    "an entry that is a number": ("not a list of vouched", [3]),
    "a table that is a number": ("not a list of vouched", [ENTRY | {"table": 3}]),
    "an empty file": ("not a list of vouched", b""),
    "10^5 brackets": ("not a list of vouched", b"[" * 10**5),
    "a folder": ("not a list of vouched", Path.mkdir),
    "a pipe": ("not a list of vouched", os.mkfifo),
}


def _vouched(content: object, folder: Path) -> object:
    from leansense.core.record import vouchers

    path = folder / "vouched.json"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return vouchers(path) == content


RECORDS += [
    Kind("vouched.json", said, "core.record", words, partial(_vouched, content))
    for said, (words, content) in VOUCHED.items()
]

RESUMED: dict[str, tuple[str, dict]] = {
    "as training left it": ("", {}),
    "a place in words": ("nothing to go on", {"position": ["one", 0]}),
    "a place of one number": ("nothing to go on", {"position": [1]}),
    "a place that is null": ("nothing to go on", {"position": None}),
    "settings that are no JSON": ("nothing to go on", {"config": "{"}),
    "settings that are a list": ("nothing to go on", {"config": "[]"}),
    "settings of 10^5 brackets": ("nothing to go on", {"config": "[" * 10**5}),
    "a history that is a list": ("nothing to go on", {"history": []}),
    "no best epoch": ("nothing to go on", {"best_epoch": None}),
    "a best epoch in words": ("nothing to go on", {"best_epoch": "two"}),
}


def _resumed(change: dict, folder: Path) -> object:
    """True: a checkpoint is taken to go on training from."""
    from leansense.core.train import Keeper, read_run

    own = {"config": "{}", "history": {}, "rates": {}, "position": [1, 0], "stopped": False}
    own |= {"processes": []} | {n: v for n, v in change.items() if n != "best_epoch"}
    keeper = {"best_epoch": change.get("best_epoch", 0), "best": 0.5}
    content = {"leansense": own, "state_dict": PLAIN, "callbacks": {Keeper.__qualname__: keeper}}
    torch.save(content, folder / "last.ckpt")
    return read_run(folder / "last.ckpt")["leansense"] == own


CHECKPOINTS += [
    Kind("checkpoint to go on from", said, "core.train", words, partial(_resumed, change))
    for said, (words, change) in RESUMED.items()
]

# --- names in LaTeX, terminals and plots ---

TEX = {
    "a bracket first": ("[x] first", "{[}x] first"),
    "a star first": ("* first", "{*} first"),
    "a parenthesis first": ("(a)", "{(}a)"),
    "a length in brackets": ("[2cm]", "{[}2cm]"),
    "commands": (r"\foo", r"\textbackslash{}foo"),
    "a formula": ("$x_1^2$", r"\$x\_1\textasciicircum{}2\$"),
    "all signs of LaTeX": ("&%#{}~", r"\&\%\#\{\}\textasciitilde{}"),
    "Greek": ("αβΩ", r"$\alpha$$\beta$$\Omega$"),
    "a half": ("½", r"\textsuperscript{1}/\textsubscript{2}"),
    "Chinese": ("稻", r"\texttt{[U+7A3B]}"),
    "an emoji": ("🌾", r"\texttt{[U+1F33E]}"),
    "an escape": ("\x1b", r"\texttt{[U+001B]}"),
    "a half of a pair": ("\udce9", r"\texttt{[U+DCE9]}"),
    "accents": ("éŁ", r"\'{e}\L{}"),
    "letters and accents apart": ("e\u0301", r"\'{e}"),
    "ligatures of dashes": ("a--b", "a-{}-b"),
    "lines": ("a\nb\tc", "a b c"),
    "a direction turned over": ("\u202e", r"\texttt{[U+202E]}"),
    "nothing": ("", ""),
}
SHOWN = {
    "an escape": ("\x1b[2Jx", "\\x1b[2Jx"),
    "a short escape": ("\x9b31m", "\\x9b31m"),
    "a line drawn back": ("a\rb", "a\\rb".replace("\\r", "\\x0d")),
    "a direction turned over": ("\u202ex", "\\u202ex"),
    "a half of a pair": ("caf\udce9", "caf\\udce9"),
    "Chinese and an emoji": ("水 🌾", "水 🌾"),
    "a tab and a line": ("a\n\tb", "a\n\tb"),
    "a line of Unicode": ("a\u2028b", "a\\u2028b"),
}


def _tex(given: str, wanted: str, folder: Path) -> object:
    from leansense.core.text import tex

    return tex(given) == wanted or tex(given)


def _shown(given: str, wanted: str, folder: Path) -> object:
    """True: a terminal is told just that, also one that knows ASCII alone."""
    from leansense.core.text import say, terminal

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(stream):
        say(given)
    return terminal(given) == wanted and b"\x1b" not in stream.buffer.getvalue()


def _drawn(name: str, folder: Path) -> object:
    """True: a plot with this as the name of a class is written, and shows it."""
    import matplotlib.pyplot as plt

    from leansense.core.figures import confusion, save
    from leansense.core.text import plot

    figure, axes = plt.subplots(figsize=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not
        confusion(np.eye(2), [name, "ok"], axes)
        made = save(figure, folder / "confusion")
    plt.close(figure)
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    return labels[0] == plot(name) and all(path.stat().st_size > 1000 for path in made)


PLOTS = {
    "a formula that is none": r"$\foo$", "one dollar": "$", "two dollars": "a$b$c",
    "a dollar behind a backslash": r"\$x\$", "a NUL": "a\x00b", "half of a pair": "caf\udce9",
    "Chinese": "水稻", "an open brace": "{x", "an escape": "\x1b[2J", "nothing": "",
    "a fraction": r"$\frac{1}$", "a line": "a\nb",
}  # fmt: skip
TEXT = [
    Kind("name", said, "core.text, LaTeX", "", partial(_tex, *pair)) for said, pair in TEX.items()
]
TEXT += [
    Kind("name", said, "core.text, terminal", "", partial(_shown, *pair))
    for said, pair in SHOWN.items()
]
TEXT += [
    Kind("name", said, "core.text, plot", "", partial(_drawn, name)) for said, name in PLOTS.items()
]

# --- parts of a table, a figure or a path that a name becomes ---

NAMES_REFUSED = {
    "a system that leads out": ("no system", ("check", "../../x")),
    "a system that is a keyword": ("no system", ("check", "class")),
    "a system of a command": ("no system", ("check", "$(touch x)")),
    "a row that is not there": ("no row", ("run", "toy", "main/none.s0")),
    "a row that leads out": ("no row", ("run", "toy", "../../x.s0")),
    "a data folder that is not there": ("no such folder", ("check", "toy", "--data", "/none")),
    "a data folder that is no text": ("not valid text", ("check", "toy", "--data", "caf\udce9")),
    "a data folder with a NUL": ("", ("check", "toy", "--data", "a\0b")),
}


def _named(words: tuple, folder: Path) -> object:
    from leansense.core import rows

    with _repository(folder):
        return ask(rows.main, *words)


def _phrase(given: tuple, folder: Path) -> object:
    """True: a detector answers each phrase under its own words."""
    from PIL import Image

    Image.new("RGB", (64, 64), "green").save(folder / "p.png")
    path = _saved("openvocab", folder / "best.ckpt")
    said = ask(_main("openvocab"), path, folder / "p.png", *given, "--out", folder / "out")
    return [answer["phrase"] for answer in json.loads(said)["answers"]] == list(given)


PHRASES = {
    "a formula that is none": ("", (r"$\foo$",)), "an escape": ("", ("\x1b[2Jball",)),
    "Chinese and an emoji": ("", ("水 🌾", "a ball")), "signs alone": ("", ("!!!",)),
    "20 times one": ("", ("ball",) * 20), "a blank": ("a phrase is empty", (" ",)),
    "half of a pair": ("not valid text", ("caf\udce9",)),
}  # fmt: skip
NAMES = [
    Kind("phrase", said, "openvocab", words, partial(_phrase, given))
    for said, (words, given) in PHRASES.items()
]
NAMES += [
    Kind("name", said, "core.rows, command", words or "DATA", partial(_named, given))
    for said, (words, given) in NAMES_REFUSED.items()
]

KINDS = [*CHECKPOINTS, *WEIGHTS, *ROWS, *RECORDS, *TEXT, *NAMES]
