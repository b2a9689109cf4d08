"""Deformable attention: the usual formula as oracle, kinks, every back end, edge cases, tracing,
the layer, cost.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conftest import run_triton
from leansense.core.cost import peak_memory, ratio, set_threads, throughput
from leansense.layers import deformable as module
from leansense.layers import deformable_native as native
from leansense.layers.backend import choose
from leansense.layers.bench import errors, runnable
from leansense.layers.deformable import (
    DeformableAttention,
    deformable_attention,
    reference_points,
    star,
)
from leansense.layers.deformable_peers import OPERATOR

needs_c = pytest.mark.skipif(bool(native.why_not()), reason="no C compiler")
OURS = ["torch", pytest.param("cc", marks=needs_c)]
SHAPES = [[(7, 5)], [(1, 1)], [(1, 6)], [(6, 1)], [(2, 2)], [(6, 9), (3, 5), (2, 1), (1, 1)]]
SIZES = dict(B=2, Q=11, heads=3, d=5, P=3)


def draw(shapes, dtype=torch.float32, seed=0, margin=0.05, B=2, Q=11, heads=3, d=5, P=3):
    """value, locations, weights and a gradient.

    Locations reach off the map, and keep `margin` pixels from kinks.
    """
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixel = (
        torch.rand(B, Q, heads, len(shapes), P, 2, generator=g, dtype=torch.float64) * (size + 4)
        - 2.5
    )
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(margin, 1 - margin)
    value = torch.randn(
        B, sum(h * w for h, w in shapes), heads, d, generator=g, dtype=torch.float64
    )
    weights = torch.randn(B, Q, heads, len(shapes), P, generator=g, dtype=torch.float64)
    gradient = torch.randn(B, Q, heads * d, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (value, (pixel + 0.5) / size, weights, gradient)]


def run(inputs, shapes, backend, gradient, needed=(True, True, True)):
    """The output and the gradients of those inputs that need one."""
    inputs = [x.detach().clone().requires_grad_(n) for x, n in zip(inputs, needed)]
    out = deformable_attention(inputs[0], shapes, *inputs[1:], backend=backend)
    return out.detach(), torch.autograd.grad(
        out, [x for x, n in zip(inputs, needed) if n], gradient
    )


def agree(shapes, backend, dtype=torch.float32, rtol=1e-4, atol=1e-4, **sizes):
    *inputs, gradient = draw(shapes, **sizes)
    out, found = run([x.to(dtype) for x in inputs], shapes, backend, gradient.to(dtype))
    exact, expected = run([x.double() for x in inputs], shapes, "reference", gradient.double())
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)
    for a, b in zip(found, expected):
        torch.testing.assert_close(
            a.double(), b, rtol=rtol, atol=atol * max(1, float(b.abs().max()))
        )


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_agrees_with_grid_sample_in_double_precision(shapes, backend):
    agree(shapes, backend)
    agree(shapes, backend, Q=130, P=5, d=16)  # more samples than pixels: planes and whole vectors


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("d", [1, 4, 8, 16, 17, 32, 48, 64, 80, 100, 160])
def test_any_number_of_channels(d, backend):
    for queries in (2, 70):  # with fewer than two samples a pixel C reads the value where it is
        agree([(9, 8), (4, 4)], backend, d=d, Q=queries, heads=2, P=2)


@needs_c
@pytest.mark.parametrize("isa", ["v3", "generic"])
def test_every_vector_width(isa, monkeypatch):
    monkeypatch.setenv("LEANSENSE_ISA", isa)
    if why := native.why_not():
        pytest.skip(why)
    for d in (3, 32, 40, 100):
        agree([(9, 8), (1, 3)], "cc", d=d, Q=60, heads=2)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("levels, points", [(1, 1), (1, 70), (2, 33), (3, 50), (5, 13), (9, 1)])
def test_bags_around_the_size_of_a_group(levels, points, backend):
    """C works on 64 samples at a time: bags smaller, larger, and not divisors of it."""
    agree([(6, 5)] * levels, backend, P=points, Q=9, heads=2)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 10**6),
)
def test_any_shapes(shapes, B, Q, heads, d, P, seed):
    for backend in ("torch", *(["cc"] if not native.why_not() else [])):
        agree(shapes, backend, seed=seed, B=B, Q=Q, heads=heads, d=d, P=P)


def test_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    agree([(6, 9), (3, 5)], "torch", Q=25)


@pytest.mark.parametrize("shapes", [[(5, 4)], [(1, 3), (4, 1)], [(3, 3), (2, 2)]], ids=str)
def test_gradcheck(shapes):
    *inputs, _ = draw(shapes, torch.float64, B=1, Q=3, heads=2, d=3, P=2, margin=0.1)
    inputs = [x.requires_grad_() for x in inputs]
    for backend in ("torch", "reference"):
        assert torch.autograd.gradcheck(
            lambda v, at, a: deformable_attention(v, shapes, at, a, backend), inputs
        )
    assert torch.autograd.gradgradcheck(
        lambda v, at, a: deformable_attention(v, shapes, at, a, "reference"), inputs
    )


def exact_pixels(shape, dtype, d=4):
    """Samples at all whole pixel positions from two left of the map to two right of it, exact in
    floating point.
    """
    h, w = shape  # powers of two, so that (i + 0.5) / w * w - 0.5 = i without rounding
    y, x = torch.meshgrid(torch.arange(-2, h + 2), torch.arange(-2, w + 2), indexing="ij")
    at = (torch.stack([x, y], -1).view(-1, 2) + 0.5) / torch.tensor([w, h])
    g = torch.Generator().manual_seed(1)
    value = torch.randn(1, h * w, 1, d, generator=g, dtype=torch.float64)
    return (
        value.to(dtype),
        at.view(1, -1, 1, 1, 1, 2).to(dtype),
        torch.ones(1, at.shape[0], 1, 1, 1, dtype=dtype),
        x,
        y,
    )


@pytest.mark.parametrize("backend", [*OURS, "reference"])
@pytest.mark.parametrize("shape", [(4, 8), (1, 4), (4, 1), (1, 1), (2, 2)], ids=str)
def test_derivative_from_the_right_on_pixel_centres(shape, backend):
    value, at, weights, x, y = exact_pixels(shape, torch.float32)
    gradient = torch.ones(1, x.numel(), 4)
    out, (_, dat, _) = run((value, at, weights), [shape], backend, gradient)
    padded = F.pad(
        value[0, :, 0].sum(-1).view(shape), (2, 3, 2, 3)
    )  # zeros around: two before, three behind
    here = padded[:-1, :-1]
    torch.testing.assert_close(out[0].sum(-1).view(here.shape), here)
    expected = torch.stack(
        [(padded[:-1, 1:] - here) * shape[1], (padded[1:, :-1] - here) * shape[0]], -1
    )
    torch.testing.assert_close(dat.view(expected.shape), expected, rtol=1e-4, atol=1e-4)
    assert dat.abs().sum() > 0


@pytest.mark.parametrize("backend", OURS)
def test_far_outside_and_not_a_number(backend):
    shapes = [(4, 4), (1, 3)]
    value, at, weights, gradient = draw(shapes, Q=4)
    for far in (-3.0, 1e4, 1e30, -1e38, float("inf"), -float("inf")):
        at[:, 1] = far
        at[:, 2, ..., 0] = far  # y alone is on the map
        out, grads = run((value, at, weights), shapes, backend, gradient)
        assert not out[:, 1:3].any() and all(g.isfinite().all() for g in grads)
        assert not grads[1][:, 1:3].any() and not grads[2][:, 1:3].any()
    at[0, 0, 0, 0, 0, 0] = float("nan")
    out, grads = run((value, at, weights), shapes, backend, gradient)
    assert (
        out[0, 0, :5].isnan().all() and out[1].isfinite().all() and out[0, 0, 5:].isfinite().all()
    )
    assert grads[0][1].isfinite().all() and grads[0][:, :, 1:].isfinite().all()


@pytest.mark.parametrize("backend", ["auto", *OURS, "reference"])
@pytest.mark.parametrize("sizes", [dict(B=0), dict(Q=0), dict(P=0), dict(d=0)], ids=str)
def test_nothing_to_do(sizes, backend):
    *inputs, gradient = draw([(3, 4)], **SIZES | sizes)
    out, grads = run(inputs, [(3, 4)], backend, gradient)
    assert out.shape == gradient.shape and not out.any() and all(not g.any() for g in grads)
    assert [g.shape for g in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    "needed",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False)],
)
def test_some_gradients(needed, backend):
    *inputs, gradient = draw([(5, 4), (2, 3)])
    _, every = run(inputs, [(5, 4), (2, 3)], backend, gradient)
    _, some = run(inputs, [(5, 4), (2, 3)], backend, gradient, needed)
    for a, b in zip(some, [g for g, n in zip(every, needed) if n]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", OURS)
def test_strided_inputs(backend):
    shapes = [(5, 4), (2, 3)]
    *inputs, gradient = draw(shapes)
    out, grads = run(inputs, shapes, backend, gradient)
    turned = [x.mT.contiguous().mT for x in inputs]
    assert not any(x.is_contiguous() for x in turned)
    inputs = [x.requires_grad_() for x in turned]
    again = deformable_attention(inputs[0], shapes, *inputs[1:], backend=backend)
    assert torch.equal(again, out)
    for a, b in zip(torch.autograd.grad(again, inputs, gradient.mT.contiguous().mT), grads):
        assert torch.equal(a, b)
    deformable_attention(
        inputs[0], shapes, *inputs[1:], backend=backend
    ).sum().backward()  # an expanded gradient


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    """Value in half precision, positions in fp32: sums are fp32, and every result has its input's
    type.
    """
    shapes = [(9, 8), (4, 4)]
    value, at, weights, gradient = draw(shapes)
    value, gradient = value.to(dtype), gradient.to(dtype)
    out, grads = run((value, at, weights), shapes, backend, gradient)
    exact, expected = run((value.float(), at, weights), shapes, "reference", gradient.float())
    assert out.dtype == dtype and [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), exact, rtol=eps, atol=eps)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a.float(), b, rtol=eps, atol=eps * float(b.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        again, more = run((value, at, weights), shapes, backend, gradient)
    assert torch.equal(again, out) and all(torch.equal(a, b) for a, b in zip(more, grads))


@needs_c
def test_threads_and_runs_change_nothing():
    shapes = [(12, 10), (5, 5)]
    *inputs, gradient = draw(shapes, Q=100, heads=4, d=32)
    results = []
    for threads in (1, 2, 3, 3):
        with set_threads(threads):
            results.append(run(inputs, shapes, "cc", gradient))
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0]) and all(map(torch.equal, grads, results[0][1]))
    _, a = run(inputs, shapes, "torch", gradient)
    _, b = run(inputs, shapes, "torch", gradient)
    assert all(map(torch.equal, a, b))


@needs_c
def test_c_takes_only_what_it_can_read():
    value, at, weights, _ = draw([(3, 4)])
    for wrong in (value.double(), value.mT):
        with pytest.raises(ValueError, match="contiguous float32"):
            native.forward(wrong, at, weights, [(3, 4)])


def test_choice_of_back_end(monkeypatch):
    """auto takes C; falls back without a compiler, for float64, and as the environment says.

    Names are obeyed.
    """
    value = torch.empty(1)
    monkeypatch.delenv("LEANSENSE_BACKENDS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not native.why_not():
        assert choose("deformable_attention", "auto", value) == "cc"
    assert choose("deformable_attention", "auto", value.double()) == "torch"
    with pytest.raises(RuntimeError, match="'cc' cannot run here: tensors are float64"):
        choose("deformable_attention", "cc", value.double())
    with pytest.raises(RuntimeError, match="'triton' cannot run here"):
        choose("deformable_attention", "triton", value)
    monkeypatch.setenv("LEANSENSE_BACKENDS", "torch")
    assert choose("deformable_attention", "auto", value) == "torch"
    monkeypatch.delenv("LEANSENSE_BACKENDS")
    monkeypatch.setenv("LEANSENSE_CC", "0")
    assert choose("deformable_attention", "auto", value) == "torch"
    agree([(4, 5)], "auto")
    with pytest.raises(RuntimeError, match="'cc' cannot run here: switched off"):
        agree([(4, 5)], "cc")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(value=torch.zeros(2, 12, 15)), "value must be"),
        (dict(locations=torch.zeros(2, 11, 3, 1, 3, 3)), "value must be"),
        (dict(weights=torch.zeros(2, 11, 3, 1, 2)), "weights must be"),
        (dict(value=torch.zeros(2, 12, 4, 5)), "batch and heads"),
        (dict(value=torch.zeros(1, 12, 3, 5)), "batch and heads"),
        (dict(shapes=[(3, 4), (1, 1)]), "for each of the 1 levels"),
        (dict(shapes=[(0, 4)]), "at least 1 each"),
        (dict(shapes=[(3, 5)]), "have 15 pixels, value has 12"),
        (dict(value=torch.zeros(2, 12, 3, 5, dtype=torch.int32)), "floating point on one device"),
        (dict(value=torch.zeros(2, 12, 3, 5, device="meta")), "floating point on one device"),
        (dict(backend="triton_"), "nearest is 'triton'"),
    ],
)
def test_one_line_errors(change, message):
    value, locations, weights, _ = draw([(3, 4)])
    given = dict(value=value, shapes=[(3, 4)], locations=locations, weights=weights) | change
    with pytest.raises(ValueError, match=message) as error:
        deformable_attention(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", OURS)
def test_operator_contract(backend):
    """PyTorch's own checks: schema, fake implementation, autograd registration, tracing with
    dynamic shapes.
    """
    value, locations, weights, _ = draw([(4, 3), (2, 2)], B=1, Q=5)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(
        torch.ops.leansense.deformable_attention.default, (*inputs, [4, 3, 2, 2], backend)
    )


@pytest.mark.parametrize("backend", ["auto", *OURS])
def test_compile_and_export(backend):
    shapes = [(6, 5), (3, 3)]
    layer = DeformableAttention(16, 2, levels=2, points=3, backend=backend)
    with torch.no_grad():
        layer.sampling_offsets.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    x, reference = torch.randn(2, 39, 16), reference_points(shapes)

    def call(x):
        return layer(x, reference, x, shapes)

    expected = call(x)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected)
    weight = layer.sampling_offsets.weight
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), weight),
        torch.autograd.grad(expected.square().sum(), weight),
        rtol=1e-4,
        atol=1e-4,
    )
    dynamic = (
        {0: torch.export.Dim("batch")},
        None,
        {0: torch.export.Dim("batch")},
        [(None, None)] * 2,
    )
    program = torch.export.export(layer, (x, reference, x.clone(), shapes), dynamic_shapes=dynamic)
    ours = [
        n
        for n in program.graph.nodes
        if n.target == torch.ops.leansense.deformable_attention.default
    ]
    assert len(ours) == 1 and not any("grid_sampl" in str(n.target) for n in program.graph.nodes)
    three = x[:1].expand(3, -1, -1).contiguous()
    torch.testing.assert_close(program.module()(three, reference, three, shapes), call(three))


def test_flops_and_double_backward():
    value, locations, weights, _ = draw([(4, 3)])
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    with FlopCounterMode(display=False) as counter:
        out = deformable_attention(value, [(4, 3)], locations, weights)
        forward = counter.get_total_flops()
        grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    assert forward == 2 * 2 * 11 * 3 * 3 * 4 * 5 and counter.get_total_flops() == 3 * forward
    with pytest.raises(RuntimeError):
        grads[1].sum().backward()


TRITON = """
import torch
from test_deformable import agree, draw, run
from leansense.layers import deformable_triton as kernels
for shapes in ([(5, 4)], [(1, 3), (4, 1), (1, 1)]):
    agree(shapes, "triton", Q=19, d=5, P=2, heads=2)
agree([(3, 3)], "triton", Q=3, d=130, P=1, heads=1, B=1)  # two blocks of channels
shapes = [(3, 4), (1, 2)]
*inputs, gradient = draw(shapes, Q=18, B=1)
_, expected = run(inputs, shapes, "torch", gradient)
for deterministic in (False, True):
    torch.use_deterministic_algorithms(deterministic)
    found = kernels.backward(gradient, *inputs, shapes)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
torch.use_deterministic_algorithms(False)
half = [inputs[0].half(), *inputs[1:]]
out, grads = run(half, shapes, "triton", gradient.half())
exact, more = run(half, shapes, "torch", gradient.half())
assert out.dtype == torch.float16 and grads[0].dtype == torch.float16
torch.testing.assert_close(out, exact, rtol=2e-3, atol=2e-3)
torch.testing.assert_close(grads[0], more[0], rtol=2e-3, atol=1e-2)
at = inputs[1].clone()
at[:, 1], at[:, 2] = float("inf"), -1e30
out, grads = run((inputs[0], at, inputs[2]), shapes, "triton", gradient)
assert not out[:, 1:3].any() and all(g.isfinite().all() for g in grads)
at[:, 0] = float("nan")
assert run((inputs[0], at, inputs[2]), shapes, "triton", gradient)[0][:, 0].isnan().all()
from test_deformable import test_derivative_from_the_right_on_pixel_centres as right
for shape in ((4, 2), (1, 1)):
    right(shape, "triton")
print("kernels agree")
"""


def test_triton_interpreted():
    run_triton(TRITON, "kernels agree", interpret=True)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leansense.layers import deformable_triton as kernels

def build(kernel, constants, **types):
    names, integers = kernel.arg_names, dict.fromkeys(("queries", "pixels", "heads", "d", "height", "width", "start", "samples"), "i32")
    types = integers | types
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

sizes, one = dict(LEVELS=4, POINTS=8, BLOCK_D=32), dict(LEVELS=1, POINTS=1, BLOCK_D=1, queries=1, pixels=1, heads=1, d=1)
for kind in ("*fp32", "*bf16"):
    common = dict(value=kind, maps="*i32", at="*fp32", weight="*fp32", gradient=kind, out=kind, dvalue="*fp32",
                  dat="*fp32", dweight="*fp32", order="*i32", first="*i32")
    for constants in (sizes, one):  # Triton makes a constant of every argument that is 1
        build(kernels.forward_kernel, constants | dict(BLOCK_Q=16), **common)
        build(kernels.backward_kernel, constants | dict(BLOCK_Q=16, ATOMIC=True), **common)
        flat = dict(height=1, width=1, samples=1) if constants is one else {}
        build(kernels.pixel_kernel, constants | flat | dict(BLOCK=16), **common)
print("compiled")
"""  # noqa: E501


def test_triton_compiles_for_a_gpu():
    """All the way to machine code for a Hopper GPU, which needs no GPU."""
    run_triton(COMPILE, "compiled", interpret=False)


def test_layer_counts_names_and_star():
    layer = DeformableAttention(256, 8, levels=1, points=8)
    assert {n: p.numel() for n, p in layer.named_parameters()} == {
        "sampling_offsets.weight": 32_768,
        "sampling_offsets.bias": 128,
        "attention_weights.weight": 16_384,
        "attention_weights.bias": 64,
        "value_proj.weight": 65_536,
        "value_proj.bias": 256,
        "output_proj.weight": 65_536,
        "output_proj.bias": 256,
    }
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()
    bias = layer.sampling_offsets.bias.view(8, 1, 8, 2)
    torch.testing.assert_close(bias[0, 0, :, 0], torch.arange(1.0, 9)) and torch.equal(
        bias, star(8, 1, 8)
    )
    torch.testing.assert_close(bias[1, 0, 2], torch.tensor([3.0, 3.0]))  # 45 degrees, third point
    torch.testing.assert_close(bias[2, 0, 0], torch.tensor([0.0, 1.0]))
    for wrong in (dict(dim=10, heads=3), dict(points=0), dict(levels=0)):
        with pytest.raises(ValueError, match="multiple of heads"):
            DeformableAttention(**wrong)


@pytest.mark.parametrize("backend", OURS)
def test_layer_without_offsets_is_the_identity(backend):
    """Constant maps stay constant up to the edge, unlike with reference points from 0 to 1 on pixel
    corners.
    """
    layer = DeformableAttention(16, 4, levels=1, points=3, backend=backend)
    with torch.no_grad():
        layer.sampling_offsets.bias.zero_()
        for projection in (layer.value_proj, layer.output_proj):
            projection.weight.copy_(torch.eye(16))
    for h, w in ((10, 20), (1, 5), (16, 16)):
        x = torch.randn(2, h * w, 16)
        torch.testing.assert_close(
            layer(x, reference_points([(h, w)]), x, [(h, w)]), x, rtol=1e-4, atol=1e-4
        )


def test_layer_mask_boxes_and_autocast():
    shapes = [(6, 5), (3, 3)]
    layer = DeformableAttention(16, 2, levels=2, points=3)
    x, query, points = torch.randn(2, 39, 16), torch.randn(2, 7, 16), torch.rand(2, 7, 2, 2)
    mask = torch.zeros(2, 39, dtype=torch.bool)
    mask[:, 20:] = True
    hidden = x.clone()
    hidden[:, 20:] = 100
    torch.testing.assert_close(
        layer(query, points, x, shapes, mask), layer(query, points, hidden, shapes, mask)
    )
    assert layer(query, torch.cat([points, points], -1), x, shapes).shape == (2, 7, 16)
    with pytest.raises(ValueError, match="reference must be"):
        layer(query, points[..., :1, :], x, shapes)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, points, x, shapes)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.sampling_offsets.weight.grad.isfinite().all()
    torch.testing.assert_close(out.float(), layer(query, points, x, shapes), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "size",
    [
        {"Q": 150, "shapes": [(12, 13)]},
        {"Q": 40, "shapes": [[8, 8], [4, 4]], "spread": 0},
        {"Q": 9, "shapes": [[5, 5]], "B": 2, "heads": 2, "d": 12, "P": 3},
    ],
    ids=str,
)
def test_contenders_agree(size):
    names, missing = runnable(OPERATOR, list(OPERATOR.contenders), "cpu")
    assert {"grid_sample", "gather", "torch"} <= set(names) and all(missing.values())
    found = errors(OPERATOR, OPERATOR.problem(size, 0, torch.float32, "cpu"), names)
    assert all(error < 1e-4 for phase in found.values() for error in phase.values()), found


def steps_on_one_level(Q: int) -> dict:
    """Forward and backward of grid_sample and of ours, by name."""
    problem = OPERATOR.problem({"Q": Q, "shapes": [(64, 64)]}, 0, torch.float32, "cpu")
    names = ["grid_sample", "torch", *(["cc"] if not native.why_not() else [])]
    computes = {name: OPERATOR.contenders[name].prepare(problem) for name in names}
    return {
        name: lambda f=f: torch.autograd.grad(f(), problem.wanted(), problem.gradient)
        for name, f in computes.items()
    }


def test_smaller_than_grid_sample():
    """Bytes that forward and backward ask the allocator for: 1/7 and 1/8 were measured."""
    with set_threads(1):
        peak = {name: peak_memory(step) for name, step in steps_on_one_level(4096).items()}
    for name, most in {"torch": 1 / 3, "cc": 1 / 5}.items():
        assert name not in peak or peak[name] < most * peak["grid_sample"], (name, peak)


@pytest.mark.gate
def test_faster_than_grid_sample():
    """On one thread, in turns, on any processor; 5.7 and 18 times were measured, held in
    `test_bench_gates` where the processor is that of the record.
    """
    timings = throughput(steps_on_one_level(4096), repeats=5, warmup=1)
    for name, least in {"torch": 1, "cc": 3}.items():
        assert (
            name not in timings or ratio(timings["grid_sample"], timings[name])["ratio"] > least
        ), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(backend, dtype):
    shapes = [(40, 30), (20, 15), (1, 7)]
    *inputs, gradient = draw(shapes, Q=300, heads=4, d=40, P=4)
    exact, expected = run(inputs, shapes, "reference", gradient)
    inputs[0] = inputs[0].to(dtype)
    inputs, gradient = [x.cuda() for x in inputs], gradient.cuda().to(dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        out, grads = run(inputs, shapes, backend, gradient)
        again = run(inputs, shapes, backend, gradient)[1]
        torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(out.float().cpu(), exact, rtol=tolerance, atol=tolerance)
        for a, b in zip(grads, expected):
            torch.testing.assert_close(
                a.float().cpu(), b, rtol=tolerance, atol=tolerance * float(b.abs().max())
            )
        if deterministic:
            assert all(map(torch.equal, grads, again))
