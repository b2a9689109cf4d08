"""Selective scan: every back end against the formula in float64, its edges, its fall-backs.

The Mamba block.
"""

import copy
import io
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import ROOT, run, run_triton
from leansense.layers import backend as choosing
from leansense.layers import scan, scan_mamba_ssm, scan_native
from leansense.layers.scan import (
    Mamba,
    bidirectional,
    causal_conv1d,
    selective_scan,
    selective_scan_flops,
    selective_scan_step,
)

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
compiled = pytest.mark.skipif(bool(scan_native.why_not()), reason="no C compiler")
FAST = ["torch", pytest.param("cc", marks=compiled)]
BACKENDS = [*FAST, "reference"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("LEANSENSE_BACKENDS", "LEANSENSE_ISA", "LEANSENSE_CC"):
        monkeypatch.delenv(name, raising=False)


def draw(
    batch=2, length=9, channels=5, states=3, dtype=torch.float64, seed=0, step=1.0, device="cpu"
) -> dict:
    """All eight inputs; delta is positive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    made = {
        "u": normal(batch, length, channels),
        "delta": step * uniform(batch, length, channels),
        "A": -0.1 - 3 * uniform(channels, states),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels),
    }
    return {name: x.to(device, dtype) for name, x in made.items()}


def oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reverse=False):
    """The published formula, step by step: (y, last state)."""
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta
    h, rows = 0 * A + u.new_zeros(u.shape[0], 1, 1), {}
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        h = (
            torch.exp(delta[:, t, :, None] * A) * h
            + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        )
        rows[t] = (h * C[:, t, None, :]).sum(-1)
    y = torch.stack([rows[t] for t in range(u.shape[1])], 1) if rows else 0 * u
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z)), h


def choose(inputs: dict, names) -> dict:
    return {name: x for name, x in inputs.items() if name in names or name in NAMES[:5]}


def check(inputs: dict, options: dict, backend: str, tolerance: float) -> None:
    """Result, last state, and all gradients, those by way of the last state too, against the
    formula in float64.
    """
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    used = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    expected = oracle(**wide, **options)
    found = selective_scan(**used, **options, backend=backend, return_last_state=True)
    assert found[0].dtype == used["u"].dtype and found[0].shape == used["u"].shape
    generator = torch.Generator().manual_seed(1)
    incoming = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        for x in expected
    ]
    exact = torch.autograd.grad(expected, list(wide.values()), incoming, allow_unused=True)
    ours = torch.autograd.grad(
        found,
        list(used.values()),
        [g.to(x.dtype) for g, x in zip(incoming, found)],
        allow_unused=True,
    )
    pairs = dict(zip(("y", "last", *used), zip((*found, *ours), (*expected, *exact))))
    for name, (value, e) in pairs.items():
        e = torch.zeros_like(value, dtype=torch.float64) if e is None else e
        scale = max(1e-3, float(e.detach().abs().max())) if e.numel() else 1.0
        assert (
            float((value.detach().double() - e.detach()).abs().max() if e.numel() else 0)
            <= tolerance * scale
        ), name


EVERYTHING, NOTHING = NAMES[5:], ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "names, softplus",
    [
        (NOTHING, False),
        (EVERYTHING, True),
        (("D",), False),
        (("z",), True),
        (("delta_bias",), True),
    ],
)
@pytest.mark.parametrize(
    "size", [(2, 9, 5, 3), (1, 1, 1, 1), (3, 40, 33, 16), (2, 17, 16, 17)], ids=str
)
def test_against_the_formula(backend, reverse, names, softplus, size):
    inputs = choose(draw(*size, dtype=torch.float32), names)
    check(inputs, {"delta_softplus": softplus, "reverse": reverse}, backend, 3e-6)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 4),
    length=st.integers(0, 50),
    channels=st.integers(0, 40),
    states=st.integers(1, 20),
    reverse=st.booleans(),
    softplus=st.booleans(),
    names=st.sets(st.sampled_from(EVERYTHING)),
    seed=st.integers(0, 99),
    backend=st.sampled_from(["torch"] + ["cc"] * (not scan_native.why_not())),
)
def test_any_shape(batch, length, channels, states, reverse, softplus, names, seed, backend):
    inputs = choose(draw(batch, length, channels, states, torch.float32, seed), names)
    softplus = softplus or "delta_bias" in inputs  # a negative step makes states grow without bound
    check(inputs, {"delta_softplus": softplus, "reverse": reverse}, backend, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("names", [NOTHING, EVERYTHING], ids=["bare", "all"])
def test_derivatives_by_finite_differences(reverse, parts, names, monkeypatch):
    """Also when the sequence is cut into parts that run side by side, as on CUDA.

    Chunks of three steps.
    """
    monkeypatch.setattr(scan, "_parts_of", lambda length, device: parts)
    monkeypatch.setattr(scan, "_tile", lambda *_: 3)
    inputs = choose(draw(2, 7, 3, 2), names)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call(*x):
        return selective_scan(
            **dict(zip(inputs, x)),
            delta_softplus=bool(names),
            reverse=reverse,
            return_last_state=True,
            backend="torch",
        )

    for found, expected in zip(
        call(*leaves), oracle(**inputs, delta_softplus=bool(names), reverse=reverse)
    ):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1e-4, 0.3, 3.0, 10.0, 1000.0])
@pytest.mark.parametrize("parts", [1, 4])
def test_any_step_size_is_exact(backend, step, parts, monkeypatch):
    """No exponential of a sum that is later subtracted: closed forms over chunks overflow from
    steps of 0.3 on.
    """
    monkeypatch.setattr(scan, "_parts_of", lambda length, device: parts)
    inputs = choose(draw(1, 70, 20, 16, torch.float32, step=step), ("D",))
    inputs["A"] = -torch.arange(1.0, 17).repeat(20, 1)
    check(inputs, {}, backend, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_growing_states_overflow_as_the_formula_does(backend):
    """A > 0 is unusual but defined: the same values while finite, infinite where exp is."""
    inputs = {**choose(draw(1, 3, 4, 2, torch.float32), ()), "A": torch.full((4, 2), 5.0)}
    check(inputs, {}, backend, 3e-6)
    inputs["delta"] = torch.full((1, 3, 4), 40.0)
    inputs["B"], inputs["C"], inputs["u"] = (
        torch.ones_like(inputs[name]) for name in ("B", "C", "u")
    )
    assert not selective_scan(**inputs, backend=backend).isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_is_not_hidden(backend, name):
    inputs = draw(2, 20, 17, 3, torch.float32)
    inputs[name].view(-1)[0] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert y[0, :, 0].isnan().any()
    assert y[1, :, 1:].isfinite().all(), "and stays where it belongs"


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    """Slices, transposes and expanded gradients give what contiguous ones give, and are not written
    to.
    """
    plain = draw(2, 21, 12, 4, torch.float32)
    wide = torch.cat([plain["z"], plain["u"]], -1)
    odd = {
        **plain,
        "u": wide[..., 12:],
        "z": wide[..., :12],
        "A": plain["A"].T.contiguous().T,
        "B": plain["B"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "delta": plain["delta"].transpose(0, 1).contiguous().transpose(0, 1),
        "C": torch.stack([plain["C"], plain["C"]], -1)[..., 0],
    }
    before = {name: x.clone() for name, x in odd.items()}
    gradients = []
    for inputs in (plain, odd):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        y = selective_scan(**dict(zip(inputs, leaves)), delta_softplus=True, backend=backend)
        incoming = (
            torch.ones(1, 1, 12).expand(2, 21, 12) if inputs is odd else torch.ones(2, 21, 12)
        )
        gradients.append((y, *torch.autograd.grad(y, leaves, incoming)))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(before[name], x) for name, x in odd.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [{"u"}, {"A", "D"}, {"delta_bias"}, {"B", "z"}, {"C"}])
def test_only_some_inputs_need_gradients(backend, wanted):
    inputs = draw(dtype=torch.float32)
    every = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    some = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    for used in (every, some):
        selective_scan(**used, backend=backend).square().sum().backward()
    for name, x in some.items():
        assert (x.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(x.grad, every[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend):
    u = draw(dtype=torch.float32)["u"].requires_grad_()
    first = torch.autograd.grad(
        selective_scan(u, *list(draw(dtype=torch.float32).values())[1:], backend=backend).sum(),
        u,
        create_graph=True,
    )[0]
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outside_only(backend, dtype):
    """State and sums are fp32: the result is the exact one of the rounded inputs, rounded once."""
    inputs = {name: x.to(dtype) for name, x in draw(2, 300, 8, 4, torch.float32).items()}
    inputs["A"], inputs["D"] = inputs["A"].float(), inputs["D"].float()
    exact, h = oracle(**{name: x.double() for name, x in inputs.items()}, delta_softplus=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(
            **leaves, delta_softplus=True, backend=backend, return_last_state=True
        )
        y.float().square().sum().backward()
    assert y.dtype == dtype and last.dtype == torch.float32
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in leaves.values())
    assert (
        float(((y.double() - exact).abs() / exact.abs().clamp(min=0.1)).max().detach())
        < torch.finfo(dtype).eps
    )
    torch.testing.assert_close(last.double(), h, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("isa", ["v4", "v3", "generic"])
def test_instruction_sets(isa, monkeypatch):
    monkeypatch.setenv("LEANSENSE_ISA", isa)
    if scan_native.why_not():
        pytest.skip(scan_native.why_not())
    for size in ((2, 37, 40, 16), (1, 5, 7, 5)):
        check(
            draw(*size, dtype=torch.float32), {"delta_softplus": True, "reverse": True}, "cc", 3e-6
        )
        check(choose(draw(*size, dtype=torch.float32, step=9.0), ()), {}, "cc", 3e-6)
    x = torch.randn(2, 30, 21)
    torch.testing.assert_close(
        causal_conv1d(x, torch.ones(21, 3), activation="silu", backend="cc"),
        causal_conv1d(x, torch.ones(21, 3), activation="silu", backend="torch"),
    )


@compiled
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_threads(threads, batch):
    inputs = draw(batch, 33, 70, 16, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(inputs, {"delta_softplus": True}, "cc", 3e-6)
        first, second = (selective_scan(**inputs, delta_softplus=True) for _ in range(2))
        assert torch.equal(first, second)
        weight = inputs["B"].new_ones(70, 4).requires_grad_()
        mixed = [causal_conv1d(inputs["u"], weight, backend=name) for name in ("cc", "torch")]
        torch.testing.assert_close(*mixed)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), weight)[0] for y in mixed)
        )
    finally:
        torch.set_num_threads(before)


WRONG = {
    "u must be": {"u": torch.zeros(2, 9)},
    "delta has shape": {"delta": torch.zeros(2, 8, 5)},
    "B has shape": {"B": torch.zeros(2, 9, 4)},
    "C has shape": {"C": torch.zeros(2, 3, 9)},
    "D has shape": {"D": torch.zeros(6)},
    "z has shape": {"z": torch.zeros(2, 9, 1)},
    "delta_bias has shape": {"delta_bias": torch.zeros(1)},
    "at least one state": {"A": torch.zeros(5, 0)},
    "B is torch.int64": {"B": torch.zeros(2, 9, 3, dtype=torch.long)},
    "u is torch.int64": {"u": torch.zeros(2, 9, 5, dtype=torch.long)},
    "A is torch.complex64": {"A": torch.zeros(5, 3, dtype=torch.complex64)},
    "A has shape": {"A": torch.zeros(4, 3)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_are_one_line_and_name_the_argument(message):
    with pytest.raises(ValueError, match=message) as error:
        selective_scan(**{**draw(dtype=torch.float32), **WRONG[message]})
    assert "\n" not in str(error.value)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'torch'"):
        selective_scan(**draw(), backend="troch")


def test_named_backends_that_cannot_run_say_why():
    with pytest.raises(RuntimeError, match="'cc' cannot run here: tensors are float64"):
        selective_scan(**draw(), backend="cc")
    with pytest.raises(RuntimeError, match="'mamba_ssm' cannot run here: tensors are on cpu"):
        selective_scan(**draw(), backend="mamba_ssm")
    with pytest.raises(RuntimeError, match="'triton' cannot run here"):
        selective_scan(**draw(), backend="triton")


@pytest.mark.parametrize(
    "environment",
    [{"LEANSENSE_BACKENDS": "torch"}, {"LEANSENSE_CC": "0"}, {"CC": "no-such-compiler"}],
    ids=str,
)
def test_falls_back_to_torch(environment, monkeypatch):
    """With the variable, with C switched off, and without a compiler."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    inputs = draw(dtype=torch.float32)
    assert scan.choose("selective_scan", "auto", *inputs.values()) == "torch"
    torch.testing.assert_close(
        selective_scan(**inputs), selective_scan(**inputs, backend="torch"), rtol=0, atol=0
    )
    x, weight = torch.randn(1, 8, 5), torch.randn(5, 4)
    torch.testing.assert_close(
        causal_conv1d(x, weight), causal_conv1d(x, weight, backend="torch"), rtol=0, atol=0
    )
    if "LEANSENSE_BACKENDS" not in environment:
        with pytest.raises(RuntimeError, match="switched off|not on the path"):
            selective_scan(**inputs, backend="cc")


@compiled
def test_auto_is_compiled_on_the_cpu():
    inputs = draw(dtype=torch.float32)
    assert scan.choose("selective_scan", "auto", *inputs.values()) == "cc"


def test_nothing_heavy_is_imported():
    """Importing the module, and a call on the CPU, load neither Triton nor transformers nor mamba-
    ssm.
    """
    code = (
        "import sys, torch; import leansense.layers.scan as s; s.Mamba(16)(torch.zeros(1, 3, 16)); "
        "print([m for m in ('transformers', 'mamba_ssm', 'selective_scan_cuda', "
        "'leansense.layers.scan_triton') "
        "if m in sys.modules])"
    )
    assert run(ROOT, "python", "-c", code).stdout.strip() == "[]"


# --- tracing --------------------------------------------------------------------------------------
# -----------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_compile_sees_one_operator(backend, reverse):
    inputs = {name: x.requires_grad_() for name, x in draw(dtype=torch.float32).items()}
    call = partial(
        selective_scan,
        delta_softplus=True,
        reverse=reverse,
        backend=backend,
        return_last_state=True,
    )
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    incoming = torch.randn(2, 9, 5), torch.randn(2, 5, 3)
    results = [
        torch.autograd.grad(f(**inputs), list(inputs.values()), incoming) for f in (call, traced)
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(traced(**inputs)[0], call(**inputs)[0])


@pytest.mark.parametrize("backend", FAST)
def test_operator_passes_torchs_own_checks(backend):
    inputs = [x.requires_grad_() for x in draw(dtype=torch.float32).values()]
    options = (True, False, backend, 4, True, False)
    torch.library.opcheck(
        torch.ops.leansense.selective_scan.default,
        (*inputs, *options),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_export_with_a_free_batch_and_length():
    block, x = Mamba(16).eval(), torch.randn(2, 12, 16)
    dims = {
        "x": {
            0: torch.export.Dim("batch", min=1, max=64),
            1: torch.export.Dim("length", min=2, max=4096),
        }
    }
    program = torch.export.export(block, (x,), dynamic_shapes=dims)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("leansense.selective_scan" in name for name in names) == 1
    for other in (x, torch.randn(5, 37, 16)):
        torch.testing.assert_close(program.module()(other), block(other), rtol=1e-4, atol=1e-5)


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = {name: x.requires_grad_() for name, x in draw(2, 9, 5, 3, torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs, delta_softplus=True)
    assert counter.get_total_flops() == 2 * 9 * 5 * (7 * 3 + 1 + 2 + 4 + 4)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs, delta_softplus=True)
        y.sum().backward()
    count = partial(selective_scan_flops, (2, 9, 5), 3, gate=True, softplus=True)
    assert counter.get_total_flops() == count() + count(backward=True)


# --- cost -----------------------------------------------------------------------------------------
# -----------------


@pytest.mark.parametrize("backend", FAST)
def test_memory_is_a_few_copies_of_the_input(backend):
    """Forward and backward of 512 steps with 16 states: the states alone would be 16 copies of u,
    the loop keeps 48.
    """
    from leansense.core.cost import peak_memory

    inputs = {
        name: x.requires_grad_()
        for name, x in choose(draw(2, 512, 256, 16, torch.float32), ("D",)).items()
    }

    def step():
        return torch.autograd.grad(
            selective_scan(**inputs, backend=backend).sum(), list(inputs.values())
        )

    copies = peak_memory(step) / (4 * inputs["u"].numel())
    assert copies < (12 if backend == "torch" else 6), copies


def unbind_loop(u, delta, A, B, C, D):
    """The loop with unbind: linear in the length, the strongest simple alternative."""
    decay, enters = (delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None]
    h, y = 0, []
    for a, x, c in zip(decay.unbind(1), enters.unbind(1), C.unbind(1)):
        h = torch.addcmul(x, a, h) if y else x
        y.append((h @ c[..., None]).squeeze(-1))
    return torch.stack(y, 1) + D * u


@pytest.mark.gate
@pytest.mark.parametrize("backend, least", [("torch", 1), pytest.param("cc", 4, marks=compiled)])
def test_faster_than_the_loop(backend, least):
    """Forward and backward, in turns on one thread, on any processor: 1.9 to 3.9 and 22 to 23 times
    were measured on different ones; `test_bench_gates` holds each to its own record.
    """
    from leansense.core.cost import ratio, throughput

    inputs = [
        x.requires_grad_() for x in choose(draw(2, 128, 512, 16, torch.float32), ("D",)).values()
    ]
    incoming = torch.ones(2, 128, 512)

    def step(f):
        return lambda: torch.autograd.grad(f(*inputs), inputs, incoming)

    spent = throughput(
        {"loop": step(unbind_loop), "ours": step(partial(selective_scan, backend=backend))},
        repeats=5,
        warmup=1,
    )
    assert ratio(spent["loop"], spent["ours"])["ratio"] > least


# --- the extension of mamba-ssm, and Triton
# ------------------------------------------------------------------------


def extension(calls: list) -> types.ModuleType:
    """A stand-in for selective_scan_cuda: the published formula in its layout, which checks what it
    is given.
    """

    def formula(u, delta, A, B, C, D, z, bias, softplus):
        def turn(x):
            return None if x is None else x.transpose(1, 2)

        y, h = oracle(
            turn(u), turn(delta), A, turn(B.squeeze(1)), turn(C.squeeze(1)), D, None, bias, softplus
        )
        return turn(y), h

    def fwd(u, delta, A, B, C, D, z, bias, softplus):
        calls.append("fwd")
        assert all(
            x.stride(-1) == 1 and x.dtype == u.dtype
            for x in (u, delta, B, C, *([] if z is None else [z]))
        )
        assert A.dtype == torch.float32 and B.ndim == C.ndim == 4 and B.shape[1] == 1
        out, h = formula(u, delta, A, B, C, D, z, bias, softplus)
        states = torch.stack([torch.zeros_like(h), h], -1).flatten(2).unsqueeze(2)
        return [out, states, *([] if z is None else [out * F.silu(z)])]

    def bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, softplus, recompute):
        calls.append("bwd")
        assert (
            (out is None) == (z is None)
            and dz is None
            and recompute is False
            and dout.stride(-1) == 1
        )
        leaves = [
            None if x is None else x.detach().requires_grad_()
            for x in (u, delta, A, B, C, D, bias, z)
        ]
        with torch.enable_grad():
            y = formula(*leaves[:6], leaves[7], leaves[6], softplus)[0]
            y = y if z is None else y * F.silu(leaves[7])
        given = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], dout))
        every = [None if x is None else next(given) for x in leaves]
        return every if z is not None else every[:7]

    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = fwd, bwd
    return module


@pytest.mark.parametrize("names", [NOTHING, EVERYTHING, ("z",), ("D", "delta_bias")])
@pytest.mark.parametrize("reverse", [False, True])
def test_extension_adapter(names, reverse, monkeypatch):
    """What reaches the extension, and what comes back, through the public function."""
    calls = []
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", extension(calls))
    monkeypatch.setattr(scan, "choose", lambda operator, *_: "mamba_ssm")
    inputs = {
        name: x.requires_grad_() for name, x in choose(draw(dtype=torch.float32), names).items()
    }
    y, last = selective_scan(**inputs, delta_softplus=True, reverse=reverse, return_last_state=True)
    expected, h = oracle(**inputs, delta_softplus=True, reverse=reverse)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, h, rtol=1e-4, atol=1e-5)
    incoming = torch.randn(y.shape)
    for a, b in zip(
        *(torch.autograd.grad(out, list(inputs.values()), incoming) for out in (y, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert calls == ["fwd", "bwd"]


@pytest.mark.parametrize(
    "error", [ImportError("no module"), OSError("undefined symbol: _ZN3c10"), None]
)
def test_extension_is_probed_and_never_required(error, monkeypatch):
    """Missing, or built for another PyTorch (OSError): a reason, not an exception."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "selective_scan_cuda" and error is not None:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    found = scan_mamba_ssm.find_extension()
    if isinstance(found, str):
        assert "not importable" in found and "\n" not in found


def test_order_of_preference():
    """On the GPU the vendor's kernel, then ours; elsewhere C, then PyTorch.

    The formula by name only.
    """
    assert list(choosing.OPERATORS["selective_scan"]) == [
        "mamba_ssm",
        "triton",
        "cc",
        "torch",
        "reference",
    ]
    u = torch.empty(1, 1, 1, device="meta")
    why = partial(choosing._why_not, "selective_scan")
    assert "meta" in why("cc", (u,)) and why("torch", (u,)) == why("reference", (u,)) == ""
    assert "runs on cuda" in why("mamba_ssm", (torch.empty(1, 1, 1),))


INTERPRETED = """
import torch
from test_scan import EVERYTHING, check, choose, draw
from leansense.layers import scan_triton
scan_triton.T, scan_triton.BD, scan_triton.GROUP = 4, 2, 2
for size in ((2, 7, 3, 3), (1, 1, 1, 1)):
    for names, options in (((), {}), (EVERYTHING, {"delta_softplus": True, "reverse": True}),
                           (("z",), {"reverse": True}), (("D", "delta_bias"), {"delta_softplus": True})):
        check(choose(draw(*size, dtype=torch.float32), names), options, "triton", 5e-6)
check(choose(draw(1, 9, 2, 2, torch.float32, step=10.0), ()), {}, "triton", 5e-6)
half = {name: x.bfloat16() for name, x in draw(1, 9, 3, 2, torch.float32).items()}
check(half, {"delta_softplus": True}, "triton", 2e-2)
from leansense.layers.scan import selective_scan
call = torch.compile(lambda **x: selective_scan(**x, backend="triton"), backend="aot_eager", fullgraph=True)
x = {name: v.requires_grad_() for name, v in choose(draw(1, 5, 2, 2, torch.float32), ()).items()}
call(**x).sum().backward()
print("interpreted")
"""  # noqa: E501


def test_triton_in_its_interpreter():
    run_triton(INTERPRETED, "interpreted", interpret=True)


ASSEMBLED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leansense.layers import scan_triton as kernels
flags = dict(SKIP=True, GATE=True, BIAS=True, SOFTPLUS=True, REVERSE=True, BACK=True, T=16, BD=8, G=8, BN=16)
for function in (kernels.summary, kernels.carry, kernels.output, kernels._gradient):
    names = function.arg_names
    whole = {"length", "channels", "states", "chunks"}
    kind = lambda n: "constexpr" if n in flags else "i32" if n in whole or n.endswith("_row") else "*fp32"
    source = ASTSource(fn=function, signature={n: kind(n) for n in names},
                       constexprs={(names.index(n),): v for n, v in flags.items() if n in names})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(function.fn.__name__, len(made.asm["ptx"]) > 1000)
"""  # noqa: E501


def test_triton_compiles_for_a_gpu_that_is_not_here():
    """All four kernels, all flags on, down to assembly for compute capability 9.0."""
    pytest.importorskip("triton")
    if not (triton_has_assembler()):
        pytest.skip("this build of triton has no NVIDIA back end")
    done = run(ROOT, "python", "-c", ASSEMBLED)
    names = ("summary", "carry", "output", "_gradient")
    assert done.stdout.split() == [word for name in names for word in (name, "True")], done.stderr


def triton_has_assembler() -> bool:
    from importlib.util import find_spec

    return find_spec("triton.backends.nvidia") is not None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton", "mamba_ssm"])
@pytest.mark.parametrize("size", [(2, 9, 5, 3), (2, 300, 70, 16), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("names", [NOTHING, EVERYTHING], ids=["bare", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu(backend, size, names, reverse):
    inputs = choose(draw(*size, dtype=torch.float32, device="cuda"), names)
    why = choosing._why_not("selective_scan", backend, tuple(inputs.values()))
    if why:
        pytest.skip(why)
    options = {"delta_softplus": bool(names), "reverse": reverse}
    if backend == "mamba_ssm":
        y = selective_scan(**inputs, **options, backend=backend)
        exact = oracle(**{name: x.double() for name, x in inputs.items()}, **options)[0]
        torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)
    else:
        check(inputs, options, backend, 1e-5)


# --- one step at a time
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [NOTHING, EVERYTHING], ids=["bare", "all"])
def test_steps_are_the_whole(dtype, names):
    inputs = choose(draw(3, 12, 6, 4, dtype), names)
    options = {"delta_softplus": bool(names)}
    whole, last = selective_scan(**inputs, **options, return_last_state=True)
    state, rows = torch.zeros_like(last), []
    for t in range(12):
        token = {
            name: x[:, t] if name in ("u", "delta", "B", "C", "z") else x
            for name, x in inputs.items()
        }
        kept = state.clone()
        y, after = selective_scan_step(state, **token, **options)
        assert torch.equal(state, kept), "a step does not change the state it is given"
        state = after
        rows.append(y)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.stack(rows, 1), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_step_errors():
    x = draw(dtype=torch.float32)
    token = {name: v[:, 0] if v.ndim == 3 else v for name, v in x.items()}
    with pytest.raises(ValueError, match="state has shape"):
        selective_scan_step(torch.zeros(2, 5, 4), **token)
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan_step(torch.zeros(2, 5, 3), **{**token, "B": torch.zeros(2, 7)})


# --- convolution ----------------------------------------------------------------------------------
# -----------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "size, taps",
    [
        ((2, 70, 19), 4),
        ((1, 2, 3), 4),
        ((2, 5, 16), 1),
        ((1, 130, 33), 7),
        ((0, 5, 3), 4),
        ((2, 0, 3), 4),
    ],
    ids=str,
)
def test_causal_conv(backend, reverse, activation, size, taps):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*s, generator=generator, requires_grad=True)
        for s in (size, (size[2], 1, taps), (size[2],))
    ]
    x, weight, bias = (v.double() for v in leaves)
    x = x.flip(1) if reverse else x
    expected = (
        F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight, bias, groups=size[2]).mT if x.numel() else x
    )
    expected = F.silu(expected) if activation else expected
    expected = expected.flip(1) if reverse else expected
    found = causal_conv1d(*leaves, activation, reverse, backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    incoming = torch.randn(size, generator=generator)
    pairs = (
        torch.autograd.grad(y, leaves, incoming.to(y.dtype), allow_unused=True)
        for y in (found, expected)
    )
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


def test_causal_conv_errors():
    x = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="activation='relu'"):
        causal_conv1d(x, torch.zeros(3, 4), activation="relu")
    with pytest.raises(ValueError, match="nearest"):
        causal_conv1d(x, torch.zeros(3, 4), backend="torhc")


# --- the block ------------------------------------------------------------------------------------
# -----------------

# names and shapes of mamba-ssm's Mamba(d_model=64): d_inner 128, dt_rank 4, d_state 16, d_conv 4
PARAMETERS = {
    "A_log": (128, 16),
    "D": (128,),
    "in_proj.weight": (256, 64),
    "conv1d.weight": (128, 1, 4),
    "conv1d.bias": (128,),
    "x_proj.weight": (36, 128),
    "dt_proj.weight": (128, 4),
    "dt_proj.bias": (128,),
    "out_proj.weight": (64, 128),
}


def mamba_formula(weights: dict, x: torch.Tensor) -> torch.Tensor:
    """The published block, written down in float64 with F.conv1d and the loop."""
    w = {name: v.double() for name, v in weights.items()}
    stream, z = (x.double() @ w["in_proj.weight"].T).chunk(2, -1)
    taps = w["conv1d.weight"].shape[-1]
    padded = F.pad(stream.mT, (taps - 1, 0))
    u = F.silu(F.conv1d(padded, w["conv1d.weight"], w["conv1d.bias"], groups=stream.shape[-1]).mT)
    rank, states = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    dt, B, C = (u @ w["x_proj.weight"].T).split([rank, states, states], -1)
    y, _ = oracle(
        u, dt @ w["dt_proj.weight"].T, -w["A_log"].exp(), B, C, w["D"], z, w["dt_proj.bias"], True
    )
    return y @ w["out_proj.weight"].T


def test_mamba_has_the_published_names_and_shapes():
    block = Mamba(64)
    assert {name: tuple(x.shape) for name, x in block.state_dict().items()} == PARAMETERS
    theirs = {name: torch.randn(shape) for name, shape in PARAMETERS.items()}
    block.load_state_dict(theirs, strict=True)
    assert all(torch.equal(x, theirs[name]) for name, x in block.state_dict().items())
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    Mamba(64).load_state_dict(torch.load(buffer, weights_only=True))
    assert set(Mamba(64, conv_bias=False, bias=True).state_dict()) == set(PARAMETERS) - {
        "conv1d.bias"
    } | {"in_proj.bias", "out_proj.bias"}


@pytest.mark.parametrize(
    "width, count", [(64, 32_640), (128, 116_480), (256, 437_760), (512, 1_694_720)]
)
def test_mamba_parameter_counts(width, count):
    assert sum(p.numel() for p in Mamba(width, device="meta").parameters()) == count


def test_mamba_initialisation():
    torch.manual_seed(0)
    block = Mamba(64, dt_min=0.01, dt_max=0.05)
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).repeat(128, 1))
    assert torch.equal(block.D, torch.ones(128))
    step = F.softplus(block.dt_proj.bias)
    assert 0.0099 < step.min() < 0.012 and 0.04 < step.max() < 0.0501
    assert block.dt_proj.weight.abs().max() <= 4**-0.5 and block.dt_proj.bias._no_reinit
    assert block.A_log._no_weight_decay and block.D._no_weight_decay
    assert torch.equal(
        Mamba(64, dt_init="constant", dt_scale=2.0).dt_proj.weight, torch.ones(128, 4)
    )
    assert (
        F.softplus(Mamba(64, dt_min=1e-9, dt_max=1e-8, dt_init_floor=0.01).dt_proj.bias).min()
        > 0.0099
    )
    low = Mamba(64, dtype=torch.bfloat16)
    assert (
        low.A_log.dtype == low.D.dtype == torch.float32
        and low.in_proj.weight.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 3, 50])
def test_mamba_is_the_published_formula(backend, length):
    torch.manual_seed(0)
    block, x = Mamba(32, backend=backend), torch.randn(2, length, 32, requires_grad=True)
    wide = {name: p.detach().double().requires_grad_() for name, p in block.named_parameters()}
    expected, found = mamba_formula(wide, x), block(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    exact = torch.autograd.grad(expected.square().sum(), wide.values())
    ours = torch.autograd.grad(found.square().sum(), block.parameters())
    for name, a, b in zip(wide, ours, exact):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), name


def test_mamba_agrees_with_another_implementation():
    """mamba.py's block takes our state_dict as it is, gives us its own, and computes the same."""
    theirs = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    ours, other = Mamba(32), theirs.MambaBlock(theirs.MambaConfig(d_model=32, n_layers=1))
    x = torch.randn(2, 21, 32)
    ours.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-4, atol=1e-6)
    other.load_state_dict(Mamba(32).state_dict(), strict=True)


def test_mamba_in_float64_is_exact():
    torch.manual_seed(0)
    block, x = Mamba(16).double(), torch.randn(2, 20, 16).double()
    torch.testing.assert_close(block(x), mamba_formula(block.state_dict(), x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 5, "d_conv": 2, "expand": 1, "dt_rank": 3, "bias": True},
        {"d_conv": 1},
        {"conv_bias": False},
    ],
    ids=str,
)
def test_mamba_step_by_step(options):
    torch.manual_seed(0)
    block, x = Mamba(16, **options), torch.randn(3, 11, 16)
    with torch.no_grad():
        whole, (conv, state) = block(x, return_states=True)
        torch.testing.assert_close(whole, block(x))
        cache, rows = block.allocate_inference_cache(3, 11), []
        for t in range(11):
            y, *cache = block.step(x[:, t : t + 1], *cache)
            rows.append(y)
        torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cache, [conv, state], rtol=1e-4, atol=1e-5)
        half, states = block(
            x[:, :2], return_states=True
        )  # fewer tokens than taps, then on from there
        for t in range(2, 11):
            y, *states = block.step(x[:, t : t + 1], *states)
            torch.testing.assert_close(y, whole[:, t : t + 1], rtol=1e-4, atol=1e-6)


def test_mamba_reads_both_ways():
    torch.manual_seed(0)
    ahead, behind, x = Mamba(16), Mamba(16), torch.randn(2, 13, 16)
    a, b = bidirectional(x, ahead, behind)
    torch.testing.assert_close(a, ahead(x))
    torch.testing.assert_close(b, behind(x.flip(1)).flip(1), rtol=1e-4, atol=1e-6)
    changed = x.clone()
    changed[:, 6] += 1
    after = bidirectional(changed, ahead, behind)
    assert torch.equal(after[0][:, :6], a[:, :6]) and torch.equal(after[1][:, 7:], b[:, 7:])


def test_mamba_under_autocast_compiled_and_copied():
    torch.manual_seed(0)
    block, x = Mamba(16), torch.randn(2, 13, 16)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and block.A_log.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)
    compiled_block = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_block(x), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(block)(x), expected)
    assert nn.Sequential(block, Mamba(16))(x[:0]).shape == (0, 13, 16) and block(
        x[:, :0]
    ).shape == (2, 0, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [({"d_model": 0}, "d_model=0"), ({"d_model": 8, "dt_init": "zero"}, "zero")],
)
def test_mamba_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mamba(**arguments)
    with pytest.raises(ValueError, match=r"\(B, L, 8\)"):
        Mamba(8)(torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"\(B, 1, 8\)"):
        Mamba(8).step(torch.zeros(2, 2, 8), *Mamba(8).allocate_inference_cache(2))
