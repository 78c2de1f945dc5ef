"""Linear layers by oneDNN give what torch's own give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import linear
from models.encoder import load_encoder
from models.linear import Linear, cast_weights, using
from tests.conftest import tiny_encoder

AUTOCAST_COUNTS_TO = 256.0  # it adds up gradients in bf16, where 256 + 1 is 256
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


@pytest.fixture(params=[False, True], ids=["onednn", "mkl"])
def fp32_trains_by_mkl(request, monkeypatch):
    """Both choices, whatever the CPU."""
    monkeypatch.setattr(linear, "FP32_TRAINS_BY_MKL", request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(24,), (1, 24), (70, 24), (3, 5, 24)])
def test_the_same_values_and_gradients(size, bias, fp32_trains_by_mkl):
    ours, plain = pair(bias)
    values = torch.randn(size)
    torch.testing.assert_close(ours(values), plain(values), atol=1e-5, rtol=0)
    for own, expected in zip(gradients(ours, values), gradients(plain, values), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(values), plain(values), atol=1e-5, rtol=0)
        expected = nn.functional.gelu(plain(values))
        torch.testing.assert_close(ours.followed_by_gelu(values), expected, atol=1e-5, rtol=0)


def test_strided_values_and_gradients(fp32_trains_by_mkl):
    ours, plain = pair()
    values, scale = torch.randn(24, 7).t(), torch.randn(40, 7).t()
    for layer in (ours, plain):
        (layer(values) * scale).sum().backward()
    for own, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, atol=1e-4, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient(fp32_trains_by_mkl):
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


def test_which_products_of_an_encoder_in_fp32_are_computed_by_onednn(fp32_trains_by_mkl):
    encoder = load_encoder(tiny_encoder("roberta"), 0.0, 0.0)
    layers, input_ids = 2 * 6, torch.randint(5, 20, (2, linear.FEW_ROWS))
    with Products() as products:
        encoder(input_ids=input_ids).last_hidden_state.sum().backward()
    computed = products.by_onednn, products.by_torch
    assert computed == ((0, layers * 3) if fp32_trains_by_mkl else (layers * 3, 0))
    with Products() as products, torch.no_grad():
        encoder(input_ids=input_ids)
    assert (products.by_onednn, products.by_torch) == (layers, 0)


@pytest.mark.usefixtures("whose_bf16")
class TestCastWeights:
    """Under autocast weights are cast once for all uses."""

    def layers(self, **options) -> tuple[Linear, nn.Linear]:
        """With weights that bf16 holds exactly, so that only the sums differ."""
        ours, plain = pair(**options)
        for layer in (ours, plain):
            for parameter in layer.parameters():
                parameter.data = parameter.detach().bfloat16().float()
        return ours, plain

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", [(1, 24), (70, 24), (3, 5, 24)])
    def test_values_and_gradients(self, size, bias):
        ours, plain = self.layers(bias=bias)
        values = torch.randn(size).bfloat16().float()
        with torch.autocast("cpu", torch.bfloat16), using(cast_weights(ours)):
            output = ours(values)
            mine = gradients(ours, values)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), plain(values), atol=1e-2, rtol=1e-2)
        for own, expected in zip(mine, gradients(plain, values), strict=True):
            torch.testing.assert_close(own, expected, atol=1e-2 * float(expected.abs().max()), rtol=0)

    def test_without_gradients(self):
        ours, plain = self.layers()
        values = torch.randn(70, 24).bfloat16().float()
        expected = plain(values)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), using(cast_weights(ours)):
            output, activated = ours(values).float(), ours.followed_by_gelu(values).float()
        torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(activated, nn.functional.gelu(expected), atol=1e-2, rtol=1e-2)

    def test_gradients_of_many_uses_are_added_up_in_fp32(self):
        ours, plain = self.layers(bias=False)
        uses = 600
        values = torch.ones(uses, 24)
        with torch.autocast("cpu", torch.bfloat16), using(cast_weights(ours)):
            sum(ours(row).float().sum() for row in values).backward()
        with torch.autocast("cpu", torch.bfloat16):
            sum(plain(row).float().sum() for row in values).backward()
        assert torch.equal(plain.weight.grad, torch.full((40, 24), AUTOCAST_COUNTS_TO))
        assert torch.equal(ours.weight.grad, torch.full((40, 24), float(uses)))

    def test_a_weight_without_gradient(self):
        ours, _ = self.layers()
        ours.weight.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16), using(cast_weights(ours)):
            ours(torch.randn(6, 24)).float().sum().backward()
        assert ours.weight.grad is None
        torch.testing.assert_close(ours.bias.grad, torch.full((40,), 6.0))

    def test_a_second_backward_pass_adds_the_same(self):
        ours, _ = self.layers()
        with torch.autocast("cpu", torch.bfloat16), using(cast_weights(ours)):
            loss = (ours(torch.randn(6, 24)) + ours(torch.randn(6, 24))).float().square().sum()
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in ours.parameters()]
        loss.backward()
        for first, parameter in zip(once, ours.parameters(), strict=True):
            assert torch.equal(parameter.grad, 2 * first)

    def test_fp16(self):
        ours, plain = self.layers()
        values = torch.randn(6, 24).bfloat16().float()
        with torch.autocast("cpu", torch.float16), using(cast_weights(ours)):
            assert ours(values).dtype == torch.float16
            mine = gradients(ours, values)
        for own, expected in zip(mine, gradients(plain, values), strict=True):
            torch.testing.assert_close(own, expected, atol=1e-2 * float(expected.abs().max()), rtol=0)

    def test_only_under_autocast(self):
        assert cast_weights(pair()[0]) is None
