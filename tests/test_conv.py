"""The convolution whose weight gradient is made of matrix products: its definition, its choice, its
fall-backs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leansense.core import record
from leansense.layers import backend
from leansense.layers.conv import Conv2d, conv2d, weight_gradient


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), *[st.integers(1, 9)] * 2, *[st.integers(1, 7)] * 2),
    st.sampled_from([1, 3, 5, 7]),
)
def test_weight_gradient_is_its_definition(shape, k):
    torch.manual_seed(0)
    B, C, O, h, w = shape
    x, grad = (torch.randn(B, channels, h, w, dtype=torch.float64) for channels in (C, O))
    wanted = torch.nn.grad.conv2d_weight(x, (O, C, k, k), grad, padding=k // 2)
    torch.testing.assert_close(weight_gradient(x, grad, k), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wants", [(True, True), (False, True)])
def test_both_routes_are_the_convolution(stride, wants):
    torch.manual_seed(0)
    layer = Conv2d(64, 64, 3, stride).to(memory_format=torch.channels_last)
    x = maps(2, 64, 9, 11).requires_grad_(wants[0])
    wide = [t.detach().double().requires_grad_(want) for t, want in zip((x, layer.weight), wants)]
    exact = F.conv2d(*wide, stride=stride, padding=1)
    upstream = torch.randn(exact.shape)
    wanted = torch.autograd.grad(exact, [t for t in wide if t.requires_grad], upstream.double())
    for route in ("products", "torch"):
        y = conv2d(x, layer.weight, stride, route)
        found = torch.autograd.grad(y, [t for t in (x, layer.weight) if t.requires_grad], upstream)
        for one, other in zip((y, *found), (exact, *wanted)):
            assert (one - other).abs().max() < 1e-5 * other.abs().max(), route
    assert layer.state_dict().keys() == nn.Conv2d(64, 64, 3, bias=False).state_dict().keys()


@pytest.mark.parametrize(
    "kind, chosen", [("v3", "products"), ("v4", "torch"), ("generic", "torch")]
)
def test_route_by_instruction_set(monkeypatch, kind, chosen):
    """oneDNN's weight gradient is slow with AVX2 only."""
    monkeypatch.setattr(record, "_BACKENDS", {})
    monkeypatch.setattr(backend, "usable_isas", lambda: ("v4", "v3", "generic"))
    with backend.use_isa(kind):
        Conv2d(64, 64, 3)(maps(1, 64, 5, 5))
    assert record._BACKENDS == {"conv2d": {chosen}}


def test_left_to_torch(monkeypatch):
    """Few channels, another type, autocast, another order, no gradients wanted: not one call of the
    other route.
    """
    monkeypatch.setattr(backend, "isa", lambda: "v3")
    monkeypatch.setattr("leansense.layers.conv.weight_gradient", None)
    Conv2d(8, 8, 3)(maps(1, 8, 5, 5)).sum().backward()
    Conv2d(64, 64, 3)(torch.randn(1, 64, 5, 5)).sum().backward()
    Conv2d(64, 64, 3).double()(maps(1, 64, 5, 5).double()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        Conv2d(64, 64, 3)(maps(1, 64, 5, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="at least 64 channels"):
        conv2d(maps(1, 8, 5, 5), torch.randn(8, 8, 3, 3, requires_grad=True), backend="products")
