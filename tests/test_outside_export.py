"""Each way out of PyTorch gives the same numbers elsewhere, or says in one line which one does."""

import json
import sys

import pytest
import torch

from conftest import message
from leansense.core.export import write_onnx
from leansense.layers.bev_pool import Grid, PoolPlan, bev_pool
from leansense.layers.lift_splat import LiftSplat, get_geometry, make_frustum, surround_rig
from leansense.layers.trunk import Trunk
from leansense.simbev.model import DEMO, build, example
from leansense.simbev.use import export_onnx, main
from test_outside_tensors import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
GRID = Grid((-16, 16, 2), (-16, 16, 2), (-10, 10, 20), (4, 12, 2))


def rigs(seed: int) -> tuple:
    rig = surround_rig()
    moved = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    return rig._replace(trans=rig.trans + moved)


def lift_inputs(seed: int) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 6, 4, 2, 6, generator=draw)
    return logits, torch.randn(1, 6, 3, 2, 6, generator=draw), *rigs(seed)


@pytest.mark.parametrize("backend", ["auto", "torch", "index_add"])
def test_a_traced_lift_computes_for_other_inputs(backend):
    """A trace must not keep the plan of the matrices that it was made with."""
    lift = LiftSplat(GRID, (32, 96), backend=backend).eval()
    with torch.no_grad():
        traced = torch.jit.trace(lift, lift_inputs(0), check_trace=False)
        found, wanted = traced(*lift_inputs(1)), lift(*lift_inputs(1))
        assert not torch.equal(wanted, lift(*lift_inputs(0)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_function_that_hides_its_network_is_one_line():
    """Its weights are no constants; that tracer's own line says nothing of a way out."""
    trunk = Trunk("mobilenetv3_small_050").eval()
    first, second = torch.rand(2, 1, 3, 64, 96).unbind()
    with torch.no_grad():
        with pytest.raises(RuntimeError) as caught:
            torch.jit.trace(lambda x: trunk(x)[0], (first,), check_trace=False)
        assert "\n" not in str(caught.value)
        assert "Trunk" in str(caught.value) and "torch.export.export" in str(caught.value)
        traced = torch.jit.trace(trunk, (first,), check_trace=False)
        for found, wanted in zip(traced(second), trunk(second), strict=True):
            torch.testing.assert_close(found, wanted)
        exported = torch.export.export(trunk, (first,)).module()
        torch.testing.assert_close(exported(second)[0], trunk(second)[0])


def test_the_older_exporter_is_refused_in_one_line(tmp_path):
    """It writes a transpose that runtimes refuse; what to call instead is said."""
    plan = PoolPlan.build(get_geometry(make_frustum(GRID, (32, 96)), *rigs(0)), GRID, ordered=False)

    class Pool(torch.nn.Module):
        def forward(self, depth, feat):
            return bev_pool(depth, feat, plan, "index_add")

    model = build(**TINY, pool="index_add").eval()
    depth = torch.rand(1, 6, 4, 2, 6), torch.rand(1, 6, 3, 2, 6)
    for module, inputs in ((Pool(), depth), (model, example(model, 1, 2))):
        with pytest.raises(RuntimeError) as caught:
            torch.onnx.export(module, inputs, str(tmp_path / "x.onnx"), dynamo=False)
        assert "dynamo=True" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = build(**TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    params = {"H": 64, "W": 144, "classes": "vehicle"}
    settings = json.dumps({"model": model.config, "params": params})
    content = {"leansense": {}, "state_dict": {}, "settings": settings}
    torch.save(content | {"model_state_dict": model.state_dict()}, tmp_path / "model_best.pt")
    return tmp_path / "model_best.pt"


def test_a_map_network_runs_in_another_runtime(tmp_path, checkpoint, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "map.onnx"
    assert main(["export", str(checkpoint), str(path), "--cameras", "2"]) == 0
    assert "largest difference" in capsys.readouterr().out
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["cameras"]) == 2 and json.loads(notes["classes"]) == "vehicle"
    from leansense.simbev.use import load_checkpoint

    model = load_checkpoint(checkpoint)[0]
    inputs = example(model, 1, 2, seed=7)
    named = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs)}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, named)[0]), model(*inputs), rtol=1e-3, atol=1e-3
        )
    assert "not written" in message(
        ValueError, export_onnx, checkpoint, tmp_path / "no.onnx", 2, tolerance=-1.0
    )
    assert not (tmp_path / "no.onnx").exists()


def test_what_cannot_be_exported_is_one_line(tmp_path, checkpoint, capsys, monkeypatch):
    path = str(tmp_path / "map.onnx")
    for argv, said in (
        (["export", str(tmp_path / "none.pt"), path], "none.pt"),
        (["export", str(checkpoint), path, "--cameras", "0"], "cameras=0"),
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    net = torch.nn.Linear(2, 1)
    x = torch.ones(1, 2)
    assert "extra onnx" in message(ValueError, write_onnx, net, {"x": x}, [x], "y", path)
    assert not (tmp_path / "map.onnx").exists() and DEMO
