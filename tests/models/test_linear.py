"""Linear layers by oneDNN give what torch's own give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.encoder import load_encoder
from models.linear import Linear
from tests.conftest import tiny_encoder

ONEDNN = torch.ops.mkldnn._linear_pointwise


class Products(TorchDispatchMode):
    """How many of oneDNN's products, and of torch's, were computed while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.by_onednn = self.by_torch = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        packet = function.overloadpacket
        self.by_onednn += packet == ONEDNN
        self.by_torch += packet in (torch.ops.aten.addmm, torch.ops.aten.mm)
        return function(*arguments, **(options or {}))


def pair(bias: bool = True) -> tuple[Linear, nn.Linear]:
    ours, plain = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def gradients(layer: nn.Linear, values: Tensor) -> list[Tensor | None]:
    values = values.clone().requires_grad_()
    (layer(values) ** 2).sum().backward()
    return [values.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(24,), (1, 24), (70, 24), (3, 5, 24)])
def test_the_same_values_and_gradients(size, bias):
    ours, plain = pair(bias)
    values = torch.randn(size)
    torch.testing.assert_close(ours(values), plain(values), atol=1e-5, rtol=0)
    for own, expected in zip(gradients(ours, values), gradients(plain, values), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(values), plain(values), atol=1e-5, rtol=0)
        expected = nn.functional.gelu(plain(values))
        torch.testing.assert_close(ours.followed_by_gelu(values), expected, atol=1e-5, rtol=0)


def test_strided_values_and_gradients():
    ours, plain = pair()
    values, scale = torch.randn(24, 7).t(), torch.randn(40, 7).t()
    for layer in (ours, plain):
        (layer(values) * scale).sum().backward()
    for own, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, atol=1e-4, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient():
    ours, plain = pair()
    for layer in (ours, plain):
        layer.weight.requires_grad_(False)
    values = torch.randn(6, 24)
    mine, expected = gradients(ours, values), gradients(plain, values)
    assert mine[1] is None
    torch.testing.assert_close([mine[0], mine[2]], [expected[0], expected[2]], atol=1e-4, rtol=1e-5)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    assert not ours(values).requires_grad


def test_other_precisions_are_left_to_torch():
    ours, plain = pair()
    values = torch.randn(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(values), plain(values))
        assert torch.equal(ours.followed_by_gelu(values), nn.functional.gelu(plain(values)))
    assert torch.equal(ours.double()(values.double()), plain.double()(values.double()))


def test_an_encoder_in_fp32_computes_all_its_products_by_onednn():
    encoder = load_encoder(tiny_encoder("roberta"), 0.0, 0.0)
    layers = 2 * 6
    with Products() as products:
        encoder(input_ids=torch.tensor([[2, 5, 6, 3]])).last_hidden_state.sum().backward()
    assert (products.by_onednn, products.by_torch) == (layers * 3, 0)
