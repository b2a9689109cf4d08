"""Linear and softmax attention: derivatives, oracles, edge cases, half precision, tracing, cost."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from conftest import run_triton
from leansense.layers import linear_attention as module
from leansense.layers import linear_attention_native as native
from leansense.layers.attention_peers import OPERATOR
from leansense.layers.backend import choose
from leansense.layers.bench import errors, runnable
from leansense.layers.linear_attention import (
    FEATURE_MAPS,
    LinearAttention2d,
    RelativePosition,
    SoftmaxAttention2d,
    linear_attention,
    linear_attention_qkv,
    other_attention,
    sincos_2d,
    softmax_attention,
)

needs_c = pytest.mark.skipif(bool(native.why_not()), reason="no C compiler")
OURS = ["torch", pytest.param("cc", marks=needs_c), "reference"]
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLASH_FLOPS = {
    FLASH: lambda q, k, v, *rest, **_: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda g, q, k, v, *rest, **_: sdpa_flop_count(q, k, v) * 5 // 2,
}


def counter():
    """PyTorch's FLOP counter, with the flash kernel of the CPU, which not every version of it
    knows.
    """
    unknown = {op: flops for op, flops in FLASH_FLOPS.items() if op not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=unknown)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def qkv(*shape, dtype=torch.float64, grad=False):
    return [draw(*shape, seed=n, dtype=dtype).requires_grad_(grad) for n in range(3)]


def explicit(q, k, v, feature_map, eps):
    """The N x N form."""
    phi = FEATURE_MAPS[feature_map]
    weights = phi(q).mT @ phi(k)
    return v @ (weights / (weights.sum(-1, keepdim=True) + eps)).mT


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 4, 36, 49), (1, 3, 2, 7), (2, 1, 5, 64), (3, 2, 8, 1)]
)
@pytest.mark.parametrize("fused", [True, False])
def test_equals_explicit_matrix_with_gradients(feature_map, shape, fused):
    x = qkv(*shape, grad=True)
    gradient = draw(*shape, seed=9)
    found, expected = (
        linear_attention(*x, feature_map, fused=fused),
        explicit(*x, feature_map, 1e-6),
    )
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, x, gradient), torch.autograd.grad(expected, x, gradient)
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradcheck(feature_map):
    x = [
        (t.abs() + 0.2).mul(t.sign()).requires_grad_() for t in qkv(1, 2, 3, 5)
    ]  # away from relu's kink
    assert torch.autograd.gradcheck(lambda *a: linear_attention(*a, feature_map, 1e-2), x)
    assert torch.autograd.gradgradcheck(lambda *a: linear_attention(*a, feature_map, 1e-2), x)


def test_gradient_of_one_input_and_of_views():
    """Some inputs without gradient; inputs and the incoming gradient that are not contiguous."""
    q, k, v = (t.mT for t in qkv(2, 3, 7, 5))  # channels run fastest
    for n in range(3):
        x = [t.detach().requires_grad_(i == n) for i, t in enumerate((q, k, v))]
        gradient = draw(2, 3, 7, 5, seed=5).mT
        (found,) = torch.autograd.grad(linear_attention(*x), x[n], gradient)
        (expected,) = torch.autograd.grad(explicit(*x, "relu", 1e-6), x[n], gradient)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "attention",
    [linear_attention, softmax_attention, lambda *x: softmax_attention(*x, matrix=True)],
)
def test_no_token_and_one_token(attention):
    for shape in ((2, 4, 36, 0), (0, 4, 36, 5)):
        x = qkv(*shape, grad=True)
        out = attention(*x)
        assert (
            out.shape == shape
            and [t.shape for t in torch.autograd.grad(out.sum(), x)] == [shape] * 3
        )
    q, k, v = qkv(1, 2, 4, 1)
    torch.testing.assert_close(attention(q.abs(), k.abs(), v), v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dead_tokens_give_zero(eps, dtype):
    """A dead query, and all keys dead: zeros and finite gradients, never NaN."""
    q, k, v = qkv(1, 1, 4, 6, dtype=dtype)
    half_dead = q.clone()
    half_dead[..., 2] = -1
    for a, b, where in ((half_dead, k.abs(), (..., slice(2, 3))), (q, -k.abs(), ...)):
        x = [t.clone().requires_grad_() for t in (a, b, v)]
        out = linear_attention(*x, eps=eps)
        assert torch.equal(out[where], torch.zeros_like(out[where])) and out.isfinite().all()
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in x)


def test_fp16_range_stays_finite():
    """N d phi^2 is far beyond 65504.

    The same under autocast, in the layers, forward and backward.
    """
    x = [(t.abs() * 300).clamp(max=6e4) for t in qkv(1, 4, 36, 256, dtype=torch.float16)]
    out = linear_attention(*x)
    assert out.dtype == torch.float16 and out.isfinite().all()
    torch.testing.assert_close(
        out.float(), linear_attention(*(t.float() for t in x)), rtol=2e-3, atol=1e-1
    )
    assert softmax_attention(*x, matrix=True).isfinite().all()
    feature_map = 50 * draw(1, 144, 16, 16, dtype=torch.float32)
    for layer in (
        LinearAttention2d(144),
        SoftmaxAttention2d(144),
        SoftmaxAttention2d(144, matrix=True),
    ):
        with torch.autocast("cpu", torch.float16):
            out = layer(feature_map)
            assert out.isfinite().all() and out.dtype == torch.float16
            out.float().mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_autocast_core_runs_in_fp32():
    seen = []
    original = FEATURE_MAPS["relu"]
    FEATURE_MAPS["relu"] = lambda x: (
        seen.append((x.dtype, torch.is_autocast_enabled("cpu"))) or original(x)
    )
    try:
        with torch.autocast("cpu", torch.bfloat16):
            LinearAttention2d(16)(torch.randn(1, 16, 3, 3))
    finally:
        FEATURE_MAPS["relu"] = original
    assert set(seen) == {(torch.float32, False)}


def test_rank_is_bounded_by_the_head():
    q, k, _ = qkv(1, 1, 36, 49)
    assert torch.linalg.matrix_rank(q.relu()[0, 0].T @ k.relu()[0, 0]) <= 36


@pytest.mark.parametrize("matrix", [False, True])
def test_softmax_equals_formula(matrix):
    q, k, v = qkv(2, 4, 36, 49)
    bias = draw(1, 4, 49, 49, seed=7)
    expected = v @ ((q.mT @ k) / 6 + bias).softmax(-1).mT
    torch.testing.assert_close(softmax_attention(q, k, v, bias, matrix), expected)


def test_sdpa_gets_contiguous_tensors(monkeypatch):
    """The fast CPU kernel is left silently when the last stride is not 1."""
    strides = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F,
        "scaled_dot_product_attention",
        lambda *x, **kw: strides.extend(t.stride(-1) for t in x) or kernel(*x, **kw),
    )
    softmax_attention(*qkv(1, 4, 36, 49))
    assert strides == [1, 1, 1]
    with counter() as count, torch.no_grad():
        softmax_attention(*qkv(1, 4, 36, 49, dtype=torch.float32))
    assert any("flash" in str(op) for op in count.get_flop_counts()["Global"])


@pytest.mark.parametrize("n", [49, 100])
def test_flops_are_the_formulas(n):
    x = qkv(2, 4, 36, n, dtype=torch.float32, grad=True)
    expected = {
        linear_attention: 8 * (4 * n * 36 * 36 + 2 * n * 36),
        softmax_attention: 8 * 4 * n * n * 36,
    }
    for attention, forward in expected.items():
        with counter() as count:
            y = attention(*x)
        assert count.get_total_flops() == forward
        with counter() as count:
            y.sum().backward()
        factor = 2 if attention is linear_attention else 2.5  # flash recomputes the logits
        assert count.get_total_flops() == factor * forward


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: linear_attention(*qkv(1, 1, 2, 3), "gelu"), "feature_map='gelu' is unknown"),
        (lambda: linear_attention(*qkv(1, 2, 3)), "must share one shape"),
        (lambda: softmax_attention(*qkv(1, 1, 2, 3)[:2], draw(1, 1, 2, 4)), "must share one shape"),
        (
            lambda: LinearAttention2d(144, 5),
            r"heads=5 does not divide the 144 channels: choose from \[1, 2, 3, 4, 6, 8, 9",
        ),
        (
            lambda: LinearAttention2d(144, pos="relative"),
            "N x N logits, which linear attention never computes",
        ),
        (lambda: SoftmaxAttention2d(144, pos="relative"), r"needs size=\(h, w\)"),
        (lambda: SoftmaxAttention2d(144, pos="rotary"), "pos='rotary' is unknown"),
        (lambda: LinearAttention2d(6, 2), "multiple of 4 channels, not 6"),
        (lambda: LinearAttention2d(8, 2, feature_map="x"), "feature_map='x' is unknown"),
        (
            lambda: RelativePosition(4, (7, 7))(draw(1, 1, 4, 36), (6, 6)),
            r"built for a \(7, 7\) map",
        ),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_relative_logits_one_by_one():
    """Against two loops over tokens, on a map that is not square."""
    relative, (h, w) = RelativePosition(4, (2, 3)).double(), (2, 3)
    q = draw(1, 2, 4, 6)
    bias = relative(q, (h, w))
    for i in range(6):
        for j in range(6):
            r = relative.rel_h[j // w - i // w + h - 1] + relative.rel_w[j % w - i % w + w - 1]
            torch.testing.assert_close(bias[0, :, i, j], q[0, :, :, i] @ r / 2)


def test_both_layers_share_state_and_positions_stay_outside():
    softmax, linear = SoftmaxAttention2d(144), LinearAttention2d(144)

    def layout(layer):
        return [(name, value.shape) for name, value in layer.state_dict().items()]

    assert layout(softmax) == layout(linear)
    assert list(linear.state_dict()) == ["q.weight", "k.weight", "v.weight"]
    linear(torch.randn(1, 144, 9, 5))
    assert len(linear.state_dict()) == 3 and not list(linear.buffers())
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    assert buffer.tell() < 4 * 62_208 + 4096  # a 256 x 256 position buffer would be 37 MB
    copy.deepcopy(linear)


def test_other_attention_keeps_mode_type_and_generator():
    layer = SoftmaxAttention2d(16, 2, "sincos_q").double().eval()
    state = torch.get_rng_state()
    other = other_attention(layer, "elu1")
    assert torch.equal(torch.get_rng_state(), state)
    assert (other.heads, other.pos, other.feature_map, other.training) == (
        2,
        "sincos_q",
        "elu1",
        False,
    )
    assert other.q.weight.dtype == torch.float64 and other.q.weight is not layer.q.weight


def test_position_cache_is_bounded_and_real():
    """At most sixteen sizes are kept.

    What inference mode or a tracer saw first does not spoil later training.
    """
    from torch._subclasses import FakeTensorMode

    module._cached_sincos.cache_clear()
    for n in range(1, 40):
        module._sincos_like(torch.zeros(1, 4, n, n))
    assert module._cached_sincos.cache_info().currsize <= 16
    module._cached_sincos.cache_clear()
    layer = LinearAttention2d(16)
    with FakeTensorMode() as fake:
        module._sincos_like(fake.from_tensor(torch.zeros(1, 16, 5, 5)))
    assert module._cached_sincos.cache_info().currsize == 0
    with torch.inference_mode():
        layer(torch.zeros(1, 16, 5, 5))
    layer(torch.randn(1, 16, 5, 5)).sum().backward()
    assert layer.q.weight.grad is not None


@pytest.mark.parametrize("pos, on_k", [("sincos_q", False), ("sincos_qk", True)])
def test_where_positions_are_added(pos, on_k):
    layer = LinearAttention2d(16, 2, pos)
    x = torch.randn(1, 16, 3, 4)
    code = sincos_2d(16, 3, 4)
    q, k, v = layer.q(x) + code, layer.k(x) + code * on_k, layer.v(x)
    expected = linear_attention(*(t.reshape(1, 2, 8, 12) for t in (q, k, v))).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "layer",
    [
        LinearAttention2d(16, 2),
        SoftmaxAttention2d(16, 2),
        SoftmaxAttention2d(16, 2, "relative", (4, 4)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_channels_last_compile_and_export(layer):
    x = torch.randn(2, 16, 4, 4)
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected)
    ours = torch.autograd.grad(expected.square().sum(), layer.q.weight)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), layer.q.weight), ours)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert not any("higher_order" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(
        program.module()(x[:1].repeat(3, 1, 1, 1)), layer(x[:1].repeat(3, 1, 1, 1))
    )


def lite_order(q, k, v, eps=1e-6):
    """The order of operations common for ReLU linear attention: a row of ones on v carries the
    denominator.
    """
    q, k = q.relu(), k.relu()
    out = (F.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT) @ q
    return out[..., :-1, :] / (out[..., -1:, :] + eps)


@pytest.mark.gate
def test_hand_written_backward_is_worth_it():
    """Forward and backward beat autograd through the usual order of operations, in turns on one
    thread.

    Measured 1.4 to 1.7 at N = 49 to 1024; the bound says only who is faster, on any processor.
    """
    from leansense.core.cost import ratio, throughput

    x = qkv(8, 4, 36, 256, dtype=torch.float32, grad=True)
    gradient = draw(8, 4, 36, 256, seed=4, dtype=torch.float32)

    def step(f):
        return lambda: torch.autograd.grad(f(*x), x, gradient)

    for a, b in zip(step(lite_order)(), step(linear_attention)()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    timings = throughput(
        {"usual": step(lite_order), "ours": step(linear_attention)}, repeats=15, inner=2
    )
    assert ratio(timings["usual"], timings["ours"])["ratio"] > 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    x = qkv(2, 4, 36, 100, dtype=torch.float32)
    for attention in (linear_attention, softmax_attention):
        y = attention(*(t.cuda() for t in x)).cpu()
        torch.testing.assert_close(y, attention(*x), rtol=1e-3, atol=1e-3)
    layer = LinearAttention2d(144).cuda()
    with torch.autocast("cuda", torch.float16):
        out = layer(50 * torch.randn(2, 144, 16, 16, device="cuda"))
    assert out.isfinite().all()
    out.float().mean().backward()
    assert layer.q.weight.grad.isfinite().all()


def agree(shape, backend, feature_map="relu", packed=False, tolerance=2e-5):
    """Output and gradients of a back end in fp32 against the explicit matrix in fp64."""
    x = qkv(*shape, dtype=torch.float32, grad=True)
    gradient = draw(*shape, seed=9, dtype=torch.float32)
    wide = [t.detach().double().requires_grad_() for t in x]
    expected = explicit(*wide, feature_map, 1e-2)
    theirs = torch.autograd.grad(expected, wide, gradient.double())
    if packed:
        one = torch.cat([t.detach() for t in x], 2).flatten(1, 2).requires_grad_()
        found = linear_attention_qkv(one, shape[1], feature_map, 1e-2, backend)
        (one_gradient,) = torch.autograd.grad(found, one, gradient.flatten(1, 2))
        found, ours = (
            found.view(shape),
            one_gradient.view(shape[0], shape[1], 3 * shape[2], shape[3]).chunk(3, 2),
        )
    else:
        found = linear_attention(*x, feature_map, 1e-2, backend=backend)
        ours = torch.autograd.grad(found, x, gradient)
    for a, b in zip((found, *ours), (expected, *theirs)):
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 4, 36, 49),
        (1, 3, 5, 16),
        (1, 2, 32, 512),
        (1, 1, 7, 513),
        (1, 2, 33, 1100),
        (2, 1, 64, 20),
    ],
)
def test_back_ends_agree_with_the_matrix(shape, backend, feature_map, packed):
    agree(shape, backend, feature_map, packed)


@settings(max_examples=30, deadline=None)
@given(
    some.integers(0, 3),
    some.integers(1, 3),
    some.integers(1, 40),
    some.integers(0, 90),
    some.sampled_from(sorted(FEATURE_MAPS)),
    some.booleans(),
    some.sampled_from(["torch", "auto"]),
)
def test_any_shape(batch, heads, d, n, feature_map, packed, backend):
    agree((batch, heads, d, n), backend, feature_map, packed)


@pytest.mark.parametrize("backend", OURS)
def test_each_subset_of_gradients_and_any_strides(backend):
    """Inputs and the incoming gradient with channels fastest, expanded or sliced.

    Only what is wanted is computed.
    """
    g = draw(2, 3, 7, 5, seed=5, dtype=torch.float32).mT
    q, k = (t.mT for t in qkv(2, 3, 7, 5, dtype=torch.float32)[:2])
    v = draw(2, 1, 5, 9, dtype=torch.float32)[..., 1:8].expand(2, 3, 5, 7)
    wanted = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    for flags in wanted:
        x = [t.detach().requires_grad_(bool(flag)) for t, flag in zip((q, k, v), flags)]
        y = [t.detach().double().requires_grad_(bool(flag)) for t, flag in zip((q, k, v), flags)]
        ours, theirs = ([t for t in inputs if t.requires_grad] for inputs in (x, y))
        found = linear_attention(*x, eps=1e-2, backend=backend)
        expanded = torch.autograd.grad(
            found.sum(), ours, retain_graph=True
        )  # a gradient with strides of zero
        assert all(t.isfinite().all() for t in expanded)
        ours = torch.autograd.grad(found, ours, g)
        theirs = torch.autograd.grad(explicit(*y, "relu", 1e-2), theirs, g.double())
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("packed", [False, True])
def test_second_derivative_goes_through_the_formula(backend, packed):
    """In fp32, where gradgradcheck is too coarse: against autograd twice in fp64."""

    def penalty(x, y):
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), x)

    x = [t.abs().add(0.1).detach().requires_grad_() for t in qkv(1, 2, 4, 6, dtype=torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in x]
    theirs = penalty(wide, explicit(*wide, "elu1", 1e-2))
    if packed:
        one = torch.cat(x, 2).detach().requires_grad_()
        (ours,) = penalty([one], linear_attention_qkv(one.flatten(1, 2), 2, "elu1", 1e-2, backend))
        ours = ours.chunk(3, 2)
    else:
        ours = penalty(x, linear_attention(*x, "elu1", 1e-2, backend=backend))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_packed_gradcheck():
    x = (draw(1, 24, 5).abs() + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: linear_attention_qkv(t, 2, eps=1e-2), x)
    assert torch.autograd.gradgradcheck(lambda t: linear_attention_qkv(t, 2, "elu1", 1e-2), x)


@pytest.mark.parametrize("backend", OURS)
def test_flops_in_every_back_end(backend):
    """Counted forward, backward, and backward alone after a forward pass that nobody watched."""
    n, d = 50, 20
    expected = 6 * (4 * n * d * d + 2 * n * d)
    x = qkv(2, 3, d, n, dtype=torch.float32, grad=True)
    packed = torch.cat(x, 2).flatten(1, 2).detach().requires_grad_()
    for call in (
        lambda: linear_attention(*x, backend=backend),
        lambda: linear_attention_qkv(packed, 3, backend=backend),
    ):
        with counter() as count:
            y = call()
        assert count.get_total_flops() == expected
        for result in (y, call()):
            with counter() as count:
                result.sum().backward()
            assert count.get_total_flops() == 2 * expected
    for one, part in zip(
        x, packed.grad.view(2, 3, 3 * d, n).chunk(3, 2)
    ):  # each the sum of a watched pass and another
        torch.testing.assert_close(one.grad, part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_forward_and_backward(backend, dtype):
    """The same bits with autocast on, also when the backward pass runs inside."""
    x = qkv(2, 2, 8, 30, dtype=dtype, grad=True)
    plain = linear_attention(*x, backend=backend)
    gradients = torch.autograd.grad(plain.float().square().sum(), x)
    with torch.autocast("cpu", dtype):
        cast = linear_attention(*x, backend=backend)
        assert torch.equal(plain, cast) and cast.dtype == dtype
        inside = torch.autograd.grad(cast.float().square().sum(), x)
    if backend == "reference":  # autograd's own backward, which autocast rules
        return
    assert all(torch.equal(a, b) for a, b in zip(gradients, inside))


@pytest.mark.parametrize("backend", OURS)
def test_nan_and_dead_queries(backend):
    q, k, v = qkv(1, 1, 4, 40, dtype=torch.float32)
    q[0, 0, :, 7], v[0, 0, 2, 3] = -1, torch.nan
    out = linear_attention(q, k, v, backend=backend)
    assert (
        out[0, 0, 2, [n for n in range(40) if n != 7]].isnan().all()
        and not out[0, 0, [0, 1, 3]].isnan().any()
    )
    q[0, 0, 1, 9] = torch.nan
    assert linear_attention(q, k, v.nan_to_num(), backend=backend)[..., 9].isnan().all()
    x = [t.nan_to_num().requires_grad_() for t in (q, -k.abs(), v)]
    out = linear_attention(*x, eps=0, backend=backend)
    (1e6 * out).sum().backward()
    assert not out.any() and all(t.grad.isfinite().all() for t in x)


@needs_c
def test_c_gives_the_same_bits_on_any_number_of_threads():
    x = qkv(3, 3, 32, 400, dtype=torch.float32, grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            y = linear_attention(*x, backend="cc")
            found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_c
@pytest.mark.parametrize("isa", ["v3", "generic"])
def test_c_for_other_processors(isa, monkeypatch):
    monkeypatch.setenv("LEANSENSE_ISA", isa)
    if native.why_not():
        pytest.skip(native.why_not())
    for shape in ((2, 2, 36, 49), (1, 1, 5, 513), (1, 1, 33, 20), (1, 2, 3, 2)):
        agree(shape, "cc")


def test_choice_of_back_end(monkeypatch):
    """auto takes C; falls back without a compiler, for float64, and as the environment says.

    Names are obeyed.
    """
    x = torch.zeros(1, 1, 2, 3)
    monkeypatch.delenv("LEANSENSE_BACKENDS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not native.why_not():
        assert choose("linear_attention", "auto", x) == "cc"
    assert choose("linear_attention", "auto", x.double()) == "torch"
    for wanted, wrong, message in (
        ("cc", x.double(), "tensors are float64; the kernels compute in float32"),
        ("triton", x, "need a CUDA device"),
        ("cc", x.to("meta"), "tensors are on meta"),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            choose("linear_attention", wanted, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nearest is 'torch'"):
        linear_attention(x, x, x, backend="troch")
    monkeypatch.setenv("LEANSENSE_BACKENDS", "torch")
    assert choose("linear_attention", "auto", x) == "torch"
    monkeypatch.delenv("LEANSENSE_BACKENDS")
    monkeypatch.setenv("LEANSENSE_CC", "0")
    assert choose("linear_attention", "auto", x) == "torch"
    agree((2, 2, 5, 9), "auto")
    with pytest.raises(RuntimeError, match="'cc' cannot run here: switched off"):
        agree((2, 2, 5, 9), "cc")


def test_layers_use_pytorch_unless_asked(monkeypatch):
    """Training does not depend on whether there is a compiler; one that is asked for is used."""
    used = []
    original = native.forward
    monkeypatch.setattr(native, "forward", lambda *x: used.append(1) or original(*x))
    x = torch.randn(1, 16, 4, 4)
    expected = LinearAttention2d(16, 2)
    assert expected.backend == "torch" and expected(x).shape == x.shape and not used
    if not native.why_not():
        other = LinearAttention2d(16, 2, backend="cc")
        other.load_state_dict(expected.state_dict())
        torch.testing.assert_close(other(x), expected(x))
        assert used


def test_a_new_feature_map_is_differentiated_by_autograd(monkeypatch):
    monkeypatch.setitem(FEATURE_MAPS, "square", torch.square)
    agree((1, 2, 3, 5), "auto", "square")


@pytest.mark.parametrize("backend", OURS)
def test_compile_and_export_see_the_formula(backend):
    def f(x):
        return linear_attention_qkv(x, 2, backend=backend).square()

    x = draw(2, 24, 5, 6, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, f(x))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled, f(x))))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return f(x)

    program = torch.export.export(Layer(), (x.detach(),))
    assert not any("leansense" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x.detach()), f(x.detach()))


def test_fake_tensors_have_shapes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 24, 7, 7)
        assert linear_attention_qkv(x, 2).shape == (2, 8, 7, 7)


@pytest.mark.parametrize(
    "x, heads", [(torch.zeros(2, 10, 4), 2), (torch.zeros(2, 12), 2), (torch.zeros(2, 12, 4), 0)]
)
def test_packed_errors(x, heads):
    with pytest.raises(ValueError, match="qkv must be") as caught:
        linear_attention_qkv(x, heads)
    assert "\n" not in str(caught.value)


def test_devices_must_agree():
    x = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="on one device"):
        linear_attention(x, x, x.to("meta"))


def test_import_is_light():
    code = (
        "import sys, leansense.layers.linear_attention; print([m for m in ('triton', "
        "'torch._inductor', "
        "'torch.utils.flop_counter', 'leansense.layers.native') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


TRITON = """
import torch
from test_linear_attention import agree, draw, qkv
from leansense.layers.linear_attention import linear_attention
for shape in ((1, 1, 1, 1), (2, 2, 5, 37), (1, 1, 36, 150), (1, 1, 130, 9), (2, 1, 3, 0), (1, 1, 70, 40)):
    for name in ("relu", "elu1"):
        for packed in (False, True):
            agree(shape, "triton", name, packed)
q, k, v = (t.mT for t in qkv(1, 2, 7, 5, dtype=torch.float32))
for n in range(3):
    x = [t.detach().requires_grad_(i == n) for i, t in enumerate((q, k, v))]
    ours, theirs = (torch.autograd.grad(linear_attention(*x, backend=b), x[n], draw(1, 2, 7, 5, dtype=torch.float32).mT)
                    for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
for dtype in (torch.float16, torch.bfloat16):
    x = qkv(1, 2, 8, 70, dtype=dtype, grad=True)
    y, z = (linear_attention(*x, backend=b) for b in ("triton", "torch"))
    assert y.dtype == dtype
    torch.testing.assert_close(y, z)
    for a, b in zip(*(torch.autograd.grad(t.float().square().sum(), x) for t in (y, z))):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
print("kernels agree")
"""  # noqa: E501


def test_triton_in_the_interpreter():
    run_triton(TRITON, "kernels agree", interpret=True)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leansense.layers import linear_attention_triton as kernels

def build(kernel, constants, kind):
    names, types = kernel.arg_names, {"eps": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "g", "out", "dq", "dk", "dv"), kind)
    types |= dict.fromkeys(("kv", "z", "r", "dkv", "dz"), "*fp32")
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

ones = dict.fromkeys(("heads", "tokens", "d", "splits", "steps", "q_row", "k_row", "v_row", "g_row", "o_row"), 1)
for kind, precision, more in (("*fp32", "ieee", {}), ("*bf16", "tf32", ones)):  # an argument that is 1 is a constant
    common = dict(PRECISION=precision, BD=32, BN=64, ELU=not more, WANTED=True, DK=True, DV=True) | more
    for kernel in (kernels.collect, kernels.spread, kernels.queries, kernels.keys):
        build(kernel, common, kind)
print("compiled")
"""  # noqa: E501


def test_triton_compiles_for_a_gpu_that_is_not_here():
    """All the way to machine code for a Hopper GPU, which needs no GPU."""
    run_triton(COMPILE, "compiled", interpret=False)


def test_every_contender_computes_its_function():
    names, missing = runnable(OPERATOR, list(OPERATOR.contenders), "cpu")
    assert {"lite", "einsum", "sdpa", "torch", "reference"} <= set(names) and "triton" in missing
    for size in ({"B": 2, "N": 49, "C": 64, "heads": 4}, {"B": 1, "N": 50, "C": 36, "heads": 1}):
        found = errors(OPERATOR, OPERATOR.problem(size, 3), names)
        assert all(value < 1e-5 for phase in found.values() for value in phase.values()), found
    with pytest.raises(ValueError, match="multiple of heads"):
        OPERATOR.problem({"N": 4, "C": 10, "heads": 3})


@pytest.mark.gate
@needs_c
def test_c_is_worth_it():
    """Forward and backward of packed input against EfficientViT's operations.

    Measured 3.3; the bound says only who is faster, on any processor.
    """
    from leansense.core.cost import ratio, throughput
    from leansense.layers.bench import step

    problem = OPERATOR.problem({"B": 2, "N": 196})
    steps = {name: step(OPERATOR.contenders[name], problem, "train") for name in ("lite", "cc")}
    timings = throughput(steps, repeats=15, inner=2)
    assert ratio(timings["lite"], timings["cc"])["ratio"] > 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(
    "shape", [(2, 4, 36, 49), (1, 8, 32, 4096), (1, 1, 5, 1), (1, 2, 128, 300), (1, 1, 130, 20)]
)
def test_triton_on_a_gpu(shape, feature_map):
    gradient = draw(*shape, seed=9, dtype=torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)):
        x = [t.cuda().requires_grad_() for t in qkv(*shape, dtype=dtype)]
        wide = [t.detach().double().requires_grad_() for t in x]
        found = linear_attention(*x, feature_map, 1e-2, backend="triton")
        expected = linear_attention(*wide, feature_map, 1e-2, backend="reference")
        ours = torch.autograd.grad(found, x, gradient.cuda().to(dtype))
        theirs = torch.autograd.grad(expected, wide, gradient.cuda().to(dtype).double())
        for a, b in zip((found, *ours), (expected, *theirs)):
            assert (a.double() - b).abs().max() <= tolerance * max(
                1.0, float(b.detach().abs().max())
            )
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                ours,
                torch.autograd.grad(
                    linear_attention(*x, feature_map, 1e-2, backend="triton"),
                    x,
                    gradient.cuda().to(dtype),
                ),
            )
        )


def test_digest_sees_the_kernels():
    """Modules that are imported by name when they are first needed belong to the code of a row all
    the same.
    """
    from leansense.core import digest

    names = {f"leansense.layers.linear_attention_{kind}" for kind in ("native", "triton")}
    assert names <= set(digest.closure({"leansense.layers.linear_attention"}))
