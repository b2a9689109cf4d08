"""The cost meter against numbers known otherwise."""

import copy

import pytest
import torch
from torch import nn

from leansense.core import cost
from leansense.core.cost import (
    Meter,
    Timing,
    cost_of,
    eval_step,
    flops,
    flops_by_operator,
    gpu_hours,
    hardware,
    mib,
    parameters,
    peak_memory,
    quartiles,
    ratio,
    saved_bytes,
    set_threads,
    state_mib,
    throughput,
    train_step,
)


class Branch(nn.Module):
    """One used, one unused and one frozen layer; dict in, dict out."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen.requires_grad_(False)
        self.norm.eval()

    def forward(self, x, scale):
        return {"out": [self.norm(self.frozen(self.used(x))) * scale], "n": 3}


def test_parameters_live_and_nothing_touched():
    model = Branch()
    before = copy.deepcopy(model.state_dict())
    example = {
        "x": torch.randn(5, 4),
        "scale": torch.tensor(0.0),
    }  # gradients of zero still count as reached
    assert parameters(model, example) == {"declared": 68, "live": 48}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not model.frozen.weight.requires_grad and model.used.weight.grad is None
    assert model.training and not model.norm.training
    with torch.no_grad():
        assert parameters(model, example)["live"] == 48


def test_parameters_of_a_model_without_any():
    with pytest.raises(ValueError, match="depends on its parameters"):
        parameters(nn.ReLU(), torch.ones(1))


def test_shared_parameters_count_once():
    a = nn.Linear(3, 3)
    assert parameters(nn.Sequential(a, a), torch.ones(1, 3)) == {"declared": 12, "live": 12}


def test_sizes():
    assert mib(2**18) == 1.0 and mib(2**18, torch.float16) == 0.5
    model = nn.Sequential(nn.Linear(2, 3).half(), nn.BatchNorm1d(3))
    assert state_mib(model) == (9 * 2 + 4 * 3 * 4 + 8) / 2**20


def test_flops_of_known_products():
    assert flops(nn.Linear(10, 20), torch.ones(3, 10)) == 2 * 3 * 10 * 20
    assert (
        flops(nn.Conv2d(8, 8, 3, groups=8), torch.ones(1, 8, 10, 10)) == 2 * 8 * 64 * 9
    )  # depthwise
    assert flops_by_operator(nn.ReLU(), torch.ones(2)) == {}
    model = nn.Dropout(0.5).train()
    flops(model, torch.ones(2))
    assert model.training


class Matmul(nn.Module):
    def forward(self, a, b):
        return a @ b


def test_flops_with_several_inputs():
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert flops(Matmul(), (a, b)) == flops(Matmul(), {"a": a, "b": b}) == 60


def test_replay():
    assert cost._replay([]) == 0 and cost._replay([-5, 3]) == 0 and cost._replay([5, -5, 3]) == 5


def test_peak_memory_of_known_allocations():
    """Freed tensors do not add up, kept ones do; what was there before does not count."""
    mega = 2**20
    old = [torch.empty(mega, dtype=torch.uint8)]

    def serial():
        for _ in range(4):
            torch.empty(mega, dtype=torch.uint8).fill_(1)

    def parallel():
        return [torch.empty(mega, dtype=torch.uint8) for _ in range(4)] and None

    assert mega <= peak_memory(serial) < 1.01 * mega
    assert 4 * mega <= peak_memory(parallel) < 4.01 * mega
    assert len(old) == 1


def test_peak_memory_finds_the_matrix():
    """softmax over an N x N matrix needs two of them; a train step keeps more than an eval step."""
    x = torch.randn(512, 8)
    n_by_n = 512 * 512 * 4
    peak = peak_memory(lambda: (x @ x.T).softmax(-1).sum())
    assert 2 * n_by_n <= peak < 3 * n_by_n  # and what little the products ask for
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    y = torch.randn(256, 64)
    assert peak_memory(train_step(model, y)) > 2 * peak_memory(eval_step(model, y))


def test_train_step_leaves_no_gradient_and_eval_step_no_graph():
    model = nn.Linear(3, 1)
    train_step(model, torch.ones(2, 3), lambda out: out.square().sum())()
    assert model.weight.grad is None and model.training
    assert not eval_step(model, torch.ones(2, 3))().requires_grad and not model.training


def test_saved_bytes():
    x = torch.randn(10, 4)
    assert saved_bytes(nn.Linear(4, 2), x) == x.numel() * 4  # the input, for the weight's gradient
    assert saved_bytes(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), x) == (40 + 20) * 4
    norm = nn.BatchNorm1d(4)
    saved_bytes(norm, x)
    assert float(norm.running_mean.abs().sum()) == 0 and int(norm.num_batches_tracked) == 0


def test_rounds_are_abba():
    order = [name for names in cost._rounds("AB", 4) for name in names]
    assert order == list("ABBAABBA")


def test_throughput_takes_turns_and_records_circumstances():
    calls = []
    before = torch.get_num_threads()
    steps = {name: lambda name=name: calls.append(name) or sum(range(20_000)) for name in "AB"}
    timings = throughput(steps, repeats=4, warmup=2, inner=1, batch=16, dtype="float32")
    assert calls == list("AABB" + "ABBAABBA")
    summary = timings["A"].summary()
    assert {k: summary[k] for k in ("batch", "clock", "device", "dtype", "threads", "repeats")} == {
        "batch": 16,
        "clock": "process",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "repeats": 4,
    }
    assert summary["min"] <= summary["p25"] <= summary["p50"] <= summary["p75"]
    assert summary["per_second"] == pytest.approx(16 / summary["p50"])
    assert torch.get_num_threads() == before


class Clocks:
    """Two clocks that go as told: work moves both, waiting only the one on the wall."""

    def __init__(self, monkeypatch):
        self.wall = self.process = 0.0
        monkeypatch.setattr(cost.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(cost.time, "process_time", lambda: self.process)

    def go(self, seconds: float, working: bool = True) -> None:
        self.wall += seconds
        self.process += seconds * working


def test_clocks_differ_for_a_sleeper(monkeypatch):
    """A process that waits uses wall time, not process time."""
    clocks = Clocks(monkeypatch)
    steps = {"nap": lambda: (clocks.go(2.0, working=False), clocks.go(0.5))}
    wall = throughput(steps, repeats=3, warmup=1, clock="wall")["nap"].summary()
    process = throughput(steps, repeats=3, warmup=1, inner=4, clock="process")["nap"].summary()
    assert (wall["p50"], wall["clock"]) == (2.5, "wall")
    assert (process["p50"], process["clock"]) == (0.5, "process")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(clock="sundial"), "clock='sundial' is unknown"),
        (dict(repeats=1), "repeats=1"),
        (dict(warmup=0), "warmup=0"),
        (dict(threads=2), "process clock adds"),
        (dict(clock="wall", threads=0), "threads=0"),
    ],
)
def test_throughput_errors(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        throughput({"a": lambda: None}, **settings)
    assert "\n" not in str(caught.value)


def test_ratio_is_paired():
    def make(*s, **kw):
        return Timing(
            s, **dict(batch=1, clock="wall", device="cpu", dtype="float32", threads=1) | kw
        )

    drifting = make(1.0, 10.0, 100.0), make(2.0, 20.0, 200.0)
    assert ratio(*drifting) == {"ratio": 0.5, "p25": 0.5, "p75": 0.5}
    wide = ratio(make(1.0, 3.0), make(2.0, 2.0))
    assert wide["p25"] < 1 < wide["p75"]
    for other in (
        make(1.0, 2.0),
        make(1.0, 2.0, 3.0, clock="process"),
        make(1.0, 2.0, 3.0, threads=2),
    ):
        with pytest.raises(ValueError, match="one throughput"):
            ratio(drifting[0], other)
    with pytest.raises(ValueError, match="raise inner"):
        ratio(make(1.0, 1.0), make(0.0, 1.0))


def test_quartiles():
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4) and quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_set_threads_comes_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), set_threads(1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_hardware_and_gpu_hours():
    machine = hardware()
    assert (
        machine["cores"] >= 1 and machine["ram_gib"] > 0 and machine["torch"] == torch.__version__
    )
    assert (machine["gpu"] is None) == (machine["gpus"] == 0) == (not torch.cuda.is_available())
    assert gpu_hours(7200, 4) == 8 and gpu_hours(3600, 0) == 0
    with pytest.raises(ValueError):
        gpu_hours(-1, 1)


def test_meter(monkeypatch):
    clocks = Clocks(monkeypatch)
    with Meter() as meter:
        clocks.go(2.0, working=False)
        clocks.go(1.0)
    summary = meter.summary()
    assert summary["seconds"] == 3.0 and summary["cpu_seconds"] == 1.0
    assert summary["gpu_hours"] == 0 and summary["peak_mib"] is None


def test_cost_of_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    found = cost_of(model, torch.randn(2, 3, 8, 8), 2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert model[0].weight.grad is not None and not model.training
    assert (
        found["mflops"] == 2 * 6 * 6 * 4 * 27 / 1e6 and found["train_mib"] > found["eval_mib"] > 0
    )


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_cuda_peak_and_clock():
    x = torch.randn(512, 8, device="cuda")
    n_by_n = 512 * 512 * 4
    assert 2 * n_by_n <= peak_memory(lambda: (x @ x.T).softmax(-1).sum(), "cuda") < 20 * n_by_n
    big = torch.randn(2048, 2048, device="cuda")
    timings = throughput(
        {"small": lambda: x.T @ x, "big": lambda: big @ big @ big}, inner=10, device="cuda"
    )
    assert timings["big"].clock == "cuda" and ratio(timings["big"], timings["small"])["ratio"] > 1
    with Meter("cuda", devices=2) as meter:
        big @ big
    assert meter.summary()["gpu_hours"] >= 0 and meter.summary()["peak_mib"] > 0
