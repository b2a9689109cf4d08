"""The convolution of an enlarged map and the fused norm: against float64 formulas, in every shape,
with their fall-backs.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import batch_norm, conv2d, interpolate
from torch.utils.flop_counter import FlopCounterMode

from leansense.layers import norm_act as na
from leansense.layers import upsample_conv as uc
from leansense.layers.norm_act import ACTIVATIONS, NormAct, fuse, norm_act
from leansense.layers.upsample_conv import UpsampleConv2d, axis_adjoint, axis_weights, upsample_conv

native = pytest.mark.skipif(
    bool(uc.why_not("upsample_conv", uc.SOURCE) or na.why_not("norm_act", na.SOURCE, na.FLAGS)),
    reason="no C compiler",
)


def exact(x, weight, size, skip, corners):
    """The definition, in float64."""
    fine = interpolate(x.double(), size, mode="bilinear", align_corners=corners)
    fine = fine if skip is None else torch.cat([skip.double(), fine], 1)
    return conv2d(fine, weight.double(), padding=weight.shape[-1] // 2)


shapes = st.tuples(*[st.integers(0 if n == 0 else 1, 6) for n in range(6)])  # B, C, O, S, h, w


@native
@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.sampled_from([1, 3, 5]),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.booleans(),
    st.booleans(),
)
def test_upsample_conv_is_its_definition(shape, k, size, corners, with_skip):
    """Enlarged or reduced, any kernel, any width, forward and backward."""
    B, C, O, S, h, w = shape
    torch.manual_seed(0)
    x = torch.randn(B, C, h, w, requires_grad=True)
    skip = torch.randn(B, S, *size, requires_grad=True) if with_skip else None
    weight = torch.randn(O, C + (S if with_skip else 0), k, k, requires_grad=True)
    inputs = [t for t in (x, weight, skip) if t is not None]
    y, reference = (
        upsample_conv(x, weight, size, skip, corners, "cc"),
        exact(x, weight, size, skip, corners),
    )
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, upstream)
    for one, other in zip(ours, torch.autograd.grad(reference, inputs, upstream.double())):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=2e-4)


@native
@pytest.mark.parametrize("corners", [True, False])
def test_upsample_conv_gradients_in_float64(corners):
    torch.manual_seed(0)
    x, weight, skip = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 3, 2), (4, 5, 3, 3), (2, 2, 6, 4))
    )
    assert torch.autograd.gradcheck(
        lambda *t: upsample_conv(t[0], t[1], (6, 4), t[2], corners, "cc"), (x, weight, skip)
    )


@native
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_upsample_conv_partial_gradients(wanted):
    x, weight = (
        torch.randn(*s, requires_grad=r) for s, r in zip(((1, 3, 4, 4), (2, 3, 3, 3)), wanted)
    )
    upsample_conv(x, weight, (8, 8), backend="cc").sum().backward()
    assert ((x.grad is not None), (weight.grad is not None)) == wanted


@native
def test_upsample_conv_takes_any_memory_order():
    """Strided inputs and strided incoming gradients."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 5, 3, 2).permute(3, 2, 0, 1), torch.randn(7, 3, 3, 3)  # (2, 3, 4, 5)
    x.requires_grad_()
    y = upsample_conv(x, weight, (8, 10), backend="cc")
    upstream = torch.randn(8, 10, 7, 2).permute(3, 2, 0, 1)
    (one,) = torch.autograd.grad(y, x, upstream)
    (other,) = torch.autograd.grad(exact(x, weight, (8, 10), None, True), x, upstream.double())
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(upsample_conv(x, weight, (8, 10), backend="cc").sum(), x)[0],
        torch.autograd.grad(exact(x, weight, (8, 10), None, True).sum(), x)[0],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("coarse, fine", [(1, 1), (1, 5), (4, 1), (5, 10), (7, 3), (100, 200)])
@pytest.mark.parametrize("corners", [True, False])
def test_axis_tables(coarse, fine, corners):
    """Both tables are the same matrix, PyTorch's."""
    neighbours, weights = axis_weights(coarse, fine, corners)
    matrix = torch.zeros(fine, coarse, dtype=torch.float64)
    matrix.scatter_add_(1, neighbours.long(), weights)
    ramp = torch.randn(1, 1, coarse, dtype=torch.float64)
    torch.testing.assert_close(
        matrix @ ramp[0, 0],
        interpolate(ramp, fine, mode="linear", align_corners=corners)[0, 0],
        rtol=1e-6,
        atol=1e-6,
    )
    starts, positions, values = axis_adjoint(coarse, fine, corners)
    again = torch.zeros_like(matrix)
    for c in range(coarse):
        for n in range(starts[c], starts[c + 1]):
            again[positions[n], c] += values[n]
    assert torch.equal(matrix, again)


@pytest.mark.parametrize(
    "weight, skip, message",
    [
        ((4, 3, 3, 3), (1, 2, 8, 8), "needs 2 [+] 3 input channels"),
        ((4, 3, 2, 2), None, "square kernel of odd size"),
        ((4, 3, 3, 1), None, "square kernel of odd size"),
        ((4, 5, 3, 3), (1, 2, 8, 7), r"needs \(1, 2, 8, 8\)"),
        ((4, 5, 3, 3), (2, 2, 8, 8), r"needs \(1, 2, 8, 8\)"),
    ],
)
def test_upsample_conv_errors(weight, skip, message):
    with pytest.raises(ValueError, match=message) as caught:
        upsample_conv(
            torch.zeros(1, 3, 4, 4),
            torch.zeros(weight),
            (8, 8),
            None if skip is None else torch.zeros(skip),
        )
    assert "\n" not in str(caught.value)


def test_upsample_conv_layer_is_a_convolution_by_name():
    plain, layer = nn.Conv2d(5, 4, 3, padding=1, bias=False), UpsampleConv2d(3, 4, skip_channels=2)
    layer.load_state_dict(plain.state_dict())
    x, skip = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 8, 8)
    fine = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x)
    torch.testing.assert_close(
        layer(x, skip), plain(torch.cat([skip, fine], 1)), rtol=1e-4, atol=1e-5
    )


class Both(nn.Module):
    """A small network of the two operators."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = UpsampleConv2d(3, 8), nn.BatchNorm2d(8)

    def forward(self, x):
        return norm_act(self.up(x), self.norm, "silu")


@pytest.mark.filterwarnings("ignore")  # jit.trace is deprecated, and still how some exporters work
def test_counted_traced_and_compiled_as_plain_operators():
    """Tools that look at operators see the convolution, whatever runs otherwise."""
    torch.manual_seed(0)
    net, x = Both().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        y = net(x)
        with FlopCounterMode(display=False) as counter:
            net(x)
        assert counter.get_total_flops() == 2 * 2 * 12 * 12 * 3 * 8 * 9
        program = torch.export.export(net, (x,))
        torch.testing.assert_close(program.module()(x), y, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(net, x)
        torch.testing.assert_close(traced(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_plain_form(dtype):
    net, x = Both(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=dtype):
        y = net(x)
    assert y.dtype == dtype and y.isfinite().all()


def test_without_a_compiler():
    """The same numbers when C is switched off, in a process of its own."""
    code = (
        "import torch; from leansense.layers.upsample_conv import *; from "
        "leansense.layers.norm_act import *;"
        "torch.manual_seed(0); n = torch.nn.BatchNorm2d(4);"
        "y = norm_act(upsample_conv(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), (10, 10)), "
        "n);"
        "print(y.double().sum().item(), n.running_var.double().sum().item())"
    )
    results = []
    for cc in ({"LEANSENSE_CC": "0"}, {}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | cc,
            capture_output=True,
            text=True,
            check=True,
        )
        results.append([float(word) for word in done.stdout.split()])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@native
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.integers(2, 9)),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.floats(-1000, 1000),
    st.booleans(),
)
def test_norm_act_is_its_definition(shape, act, offset, training):
    """Any number of channels, data far from zero; output, gradients and running statistics."""
    torch.manual_seed(0)
    B, C, h, w = shape
    x = (
        (torch.randn(B, C, h, w) + offset)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    norm = nn.BatchNorm2d(C).train(training)
    with torch.no_grad():
        norm.weight.uniform_(-1, 2)
        norm.bias.normal_()
        norm.running_mean.fill_(offset)
        norm.running_var.uniform_(0.5, 2)
    wide, other = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    with torch.set_grad_enabled(training):
        y, reference = norm_act(x, norm, act, "cc"), ACTIVATIONS[act](wide(other))
    noise = 2e-6 * abs(offset) + 1e-5  # x itself is rounded at its offset
    few = (
        B * h * w < 8
    )  # so few values that their variance may be tiny, and its root's inverse large
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=noise * (1e3 if few else 30))
    for one, wanted in zip(norm.buffers(), wide.buffers()):
        torch.testing.assert_close(one.double(), wanted.double(), rtol=1e-4, atol=noise * 10)
    if training and not few and abs(offset) < 10:
        upstream = torch.randn_like(y)
        ours = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)
        theirs = torch.autograd.grad(reference, (other, wide.weight, wide.bias), upstream.double())
        for one, wanted in zip(ours, theirs):
            near = act == "relu" and 0.02  # a value at the kink may fall on either side
            wrong = (one.double() - wanted).abs() > 1e-3 + 1e-3 * wanted.abs()
            assert wrong.double().mean() <= near


@native
def test_silu_over_its_whole_range():
    norm = nn.BatchNorm2d(1).eval()
    x = torch.linspace(-120, 120, 20001)[None, None, :, None].contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        y = norm_act(x, norm, "silu", "cc").double()
    scaled = batch_norm(
        x.double(), norm.running_mean.double(), norm.running_var.double(), eps=norm.eps
    )
    torch.testing.assert_close(
        y, nn.functional.silu(scaled), rtol=1e-5, atol=1e-30
    )  # u has 24 bits


def test_norm_act_falls_back():
    """Eval mode with gradients, another type, another order, a synchronised norm: PyTorch's own."""
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4, requires_grad=True)
    norm_act(x, norm).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    assert norm_act(x.double(), nn.BatchNorm2d(3).double()).dtype == torch.float64
    assert norm_act(x, nn.Identity(), "silu").shape == x.shape
    with pytest.raises(ValueError, match="act='gelu' is unknown"):
        norm_act(x, norm, "gelu")
    with pytest.raises(RuntimeError, match="plain BatchNorm2d"):
        norm_act(x, nn.Identity(), backend="cc")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(torch.zeros(1, 3, 1, 1), nn.BatchNorm2d(3))


def test_synchronised_norms_keep_their_activation():
    """PyTorch's conversion finds the norm inside and leaves the activation outside."""
    import timm

    net = fuse(timm.create_model("mobilenetv3_small_050", features_only=True))
    fused = [m for m in net.modules() if isinstance(m, NormAct)]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert len(fused) > 10 and all(
        type(m.norm) is nn.SyncBatchNorm for m in converted.modules() if isinstance(m, NormAct)
    )


def test_cumulative_momentum():
    norms, x = [nn.BatchNorm2d(4, momentum=None) for _ in range(2)], torch.randn(3, 2, 4, 5, 5)
    for batch in x:
        batch = batch.contiguous(memory_format=torch.channels_last)
        norm_act(batch, norms[0], "relu"), norm_act(batch, norms[1], "relu", "torch")
    for one, other in zip(norms[0].buffers(), norms[1].buffers()):
        torch.testing.assert_close(one, other)


@native
def test_threads_change_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 24, 40, 40).contiguous(memory_format=torch.channels_last)
    layer, norm, before, results = (
        UpsampleConv2d(24, 8),
        nn.BatchNorm2d(8),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(norm_act(layer(x), norm, "silu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_norm_uses_all_threads(monkeypatch, act):
    """Every loop over a map runs in as many parts as there are threads, two forward and two
    backward.
    """
    parts, before, run = [], torch.get_num_threads(), na.parallel
    monkeypatch.setattr(na, "parallel", lambda tasks: (parts.append(len(tasks)), run(tasks)))
    x = torch.randn(2, 24, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
    try:
        torch.set_num_threads(2)
        norm_act(x, nn.BatchNorm2d(24), act, "cc").sum().backward()
    finally:
        torch.set_num_threads(before)
    assert parts == [2, 2, 2, 2]
