"""Linear and softmax attention: derivatives, oracles, edge cases, half precision, tracing, cost."""
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from leansense.layers import linear_attention as module
from leansense.layers.linear_attention import (
    FEATURE_MAPS,
    LinearAttention2d,
    RelativePosition,
    SoftmaxAttention2d,
    linear_attention,
    other_attention,
    sincos_2d,
    softmax_attention,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(*shape, dtype=torch.float64, grad=False):
    return [draw(*shape, seed=n, dtype=dtype).requires_grad_(grad) for n in range(3)]


def explicit(q, k, v, feature_map, eps):
    """The N x N form."""
    phi = FEATURE_MAPS[feature_map]
    weights = phi(q).mT @ phi(k)
    return v @ (weights / (weights.sum(-1, keepdim=True) + eps)).mT


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 36, 49), (1, 3, 2, 7), (2, 1, 5, 64), (3, 2, 8, 1)])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_explicit_matrix_with_gradients(feature_map, shape, fused):
    x = qkv(*shape, grad=True)
    gradient = draw(*shape, seed=9)
    found, expected = linear_attention(*x, feature_map, fused=fused), explicit(*x, feature_map, 1e-6)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, x, gradient), torch.autograd.grad(expected, x, gradient)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradcheck(feature_map):
    x = [(t.abs() + 0.2).mul(t.sign()).requires_grad_() for t in qkv(1, 2, 3, 5)]  # away from relu's kink
    assert torch.autograd.gradcheck(lambda *a: linear_attention(*a, feature_map, 1e-2), x)
    assert torch.autograd.gradgradcheck(lambda *a: linear_attention(*a, feature_map, 1e-2), x)


def test_gradient_of_one_input_and_of_views():
    """Some inputs without gradient; inputs and the incoming gradient that are not contiguous."""
    q, k, v = (t.mT for t in qkv(2, 3, 7, 5))  # channels run fastest
    for n in range(3):
        x = [t.detach().requires_grad_(i == n) for i, t in enumerate((q, k, v))]
        gradient = draw(2, 3, 7, 5, seed=5).mT
        found, = torch.autograd.grad(linear_attention(*x), x[n], gradient)
        expected, = torch.autograd.grad(explicit(*x, "relu", 1e-6), x[n], gradient)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention,
                                       lambda *x: softmax_attention(*x, matrix=True)])
def test_no_token_and_one_token(attention):
    for shape in ((2, 4, 36, 0), (0, 4, 36, 5)):
        x = qkv(*shape, grad=True)
        out = attention(*x)
        assert out.shape == shape and [t.shape for t in torch.autograd.grad(out.sum(), x)] == [shape] * 3
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
    """N d phi^2 is far beyond 65504; the same under autocast, in the layers, forward and backward."""
    x = [(t.abs() * 300).clamp(max=6e4) for t in qkv(1, 4, 36, 256, dtype=torch.float16)]
    out = linear_attention(*x)
    assert out.dtype == torch.float16 and out.isfinite().all()
    torch.testing.assert_close(out.float(), linear_attention(*(t.float() for t in x)), rtol=2e-3, atol=1e-1)
    assert softmax_attention(*x, matrix=True).isfinite().all()
    feature_map = 50 * draw(1, 144, 16, 16, dtype=torch.float32)
    for layer in (LinearAttention2d(144), SoftmaxAttention2d(144), SoftmaxAttention2d(144, matrix=True)):
        with torch.autocast("cpu", torch.float16):
            out = layer(feature_map)
            assert out.isfinite().all() and out.dtype == torch.float16
            out.float().mean().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_autocast_core_runs_in_fp32():
    seen = []
    original = FEATURE_MAPS["relu"]
    FEATURE_MAPS["relu"] = lambda x: seen.append((x.dtype, torch.is_autocast_enabled("cpu"))) or original(x)
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
    monkeypatch.setattr(module.F, "scaled_dot_product_attention",
                        lambda *x, **kw: strides.extend(t.stride(-1) for t in x) or kernel(*x, **kw))
    softmax_attention(*qkv(1, 4, 36, 49))
    assert strides == [1, 1, 1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        softmax_attention(*qkv(1, 4, 36, 49, dtype=torch.float32))
    assert any("flash" in str(op) for op in counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("n", [49, 100])
def test_flops_are_the_formulas(n):
    x = qkv(2, 4, 36, n, dtype=torch.float32, grad=True)
    expected = {linear_attention: 8 * (4 * n * 36 * 36 + 2 * n * 36), softmax_attention: 8 * 4 * n * n * 36}
    for attention, forward in expected.items():
        with FlopCounterMode(display=False) as counter:
            y = attention(*x)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        factor = 2 if attention is linear_attention else 2.5  # flash recomputes the logits
        assert counter.get_total_flops() == factor * forward


@pytest.mark.parametrize("call, message", [
    (lambda: linear_attention(*qkv(1, 1, 2, 3), "gelu"), "feature_map='gelu' is unknown"),
    (lambda: linear_attention(*qkv(1, 2, 3)), "must share one shape"),
    (lambda: softmax_attention(*qkv(1, 1, 2, 3)[:2], draw(1, 1, 2, 4)), "must share one shape"),
    (lambda: LinearAttention2d(144, 5), r"heads=5 does not divide the 144 channels: choose from \[1, 2, 3, 4, 6, 8, 9"),
    (lambda: LinearAttention2d(144, pos="relative"), "N x N logits, which linear attention never computes"),
    (lambda: SoftmaxAttention2d(144, pos="relative"), r"needs size=\(h, w\)"),
    (lambda: SoftmaxAttention2d(144, pos="rotary"), "pos='rotary' is unknown"),
    (lambda: LinearAttention2d(6, 2), "multiple of 4 channels, not 6"),
    (lambda: LinearAttention2d(8, 2, feature_map="x"), "feature_map='x' is unknown"),
    (lambda: RelativePosition(4, (7, 7))(draw(1, 1, 4, 36), (6, 6)), r"built for a \(7, 7\) map"),
])
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
    layout = lambda layer: [(name, value.shape) for name, value in layer.state_dict().items()]
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
    assert (other.heads, other.pos, other.feature_map, other.training) == (2, "sincos_q", "elu1", False)
    assert other.q.weight.dtype == torch.float64 and other.q.weight is not layer.q.weight


def test_position_cache_is_bounded_and_real():
    """At most sixteen sizes are kept; what inference mode or a tracer saw first does not spoil later training."""
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


@pytest.mark.parametrize("layer", [LinearAttention2d(16, 2), SoftmaxAttention2d(16, 2),
                                   SoftmaxAttention2d(16, 2, "relative", (4, 4))], ids=lambda x: type(x).__name__)
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
    torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), layer(x[:1].repeat(3, 1, 1, 1)))


def lite_order(q, k, v, eps=1e-6):
    """The order of operations common for ReLU linear attention: a row of ones on v carries the denominator."""
    q, k = q.relu(), k.relu()
    out = (F.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT) @ q
    return out[..., :-1, :] / (out[..., -1:, :] + eps)


def test_hand_written_backward_is_worth_it():
    """Forward and backward beat autograd through the usual order of operations, in turns on one thread.

    Measured 1.4 to 1.7 at N = 49 to 1024; the bound is low because other jobs may share the caches.
    """
    from leansense.core.cost import ratio, throughput

    x = qkv(8, 4, 36, 256, dtype=torch.float32, grad=True)
    gradient = draw(8, 4, 36, 256, seed=4, dtype=torch.float32)
    step = lambda f: lambda: torch.autograd.grad(f(*x), x, gradient)
    for a, b in zip(step(lite_order)(), step(linear_attention)()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    timings = throughput({"usual": step(lite_order), "ours": step(linear_attention)}, repeats=15, inner=2)
    assert ratio(timings["usual"], timings["ours"])["ratio"] > 1.1


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
