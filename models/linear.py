"""Linear layers that many windows share.

- fp32 on a CPU: by oneDNN, but in training on Intel's CPUs, where MKL is at least as fast
- autocast, on any device: weights are cast once for all windows, and their gradients added up in fp32 (`cast_weights`);
  in bf16 on a CPU that has it, laid out for oneDNN too
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gathered import gathered

FEW_ROWS = 32


def _is_intel() -> bool:
    on_linux = Path("/proc/cpuinfo")
    return "GenuineIntel" in (on_linux.read_text(encoding="utf-8") if on_linux.exists() else platform.processor())


FP32_TRAINS_BY_MKL = _is_intel()
ONEDNN = torch.backends.mkldnn.is_available()
BF16_BY_ONEDNN = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """`nn.Linear`, whose products on a CPU may go to oneDNN.

    torch takes MKL in fp32. MKL leaves AVX-512 unused on CPUs that are not Intel's: 190 GFLOP/s instead of 440 on two
    Zen 5 cores, 512 x 384 times 384 x 384.
    """

    def forward(self, values: Tensor) -> Tensor:
        if (cast := self._cast()) is not None:
            return cast(values, self.bias)
        if not self._takes_fp32(values):
            return super().forward(values)
        if torch.is_grad_enabled():
            return _Product.apply(values, self.weight, self.bias)
        return product_by_onednn(values, self.weight, self.bias)

    def followed_by_gelu(self, values: Tensor) -> Tensor:
        """gelu(x W^T + b), without a gradient: in one go, which saves a tenth of an encoder's time."""
        if (cast := self._cast()) is not None:
            return cast.product(values, "gelu")
        if self._takes_fp32(values):
            return product_by_onednn(values, self.weight, self.bias, "gelu")
        return nn.functional.gelu(self(values))

    def _cast(self) -> CastWeight | None:
        weights = cast_weights_in_use()
        return None if weights is None else weights.get(self)

    def _takes_fp32(self, values: Tensor) -> bool:
        in_fp32 = values.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        by_mkl = FP32_TRAINS_BY_MKL and torch.is_grad_enabled()
        on_cpu = ONEDNN and values.device.type == "cpu"
        return in_fp32 and not by_mkl and on_cpu and not torch.compiler.is_compiling()


class _Product(torch.autograd.Function):
    """x W^T + b and its gradients, in fp32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        return product_by_onednn(values, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        of_values, of_weight, of_bias = ctx.needs_input_grad
        rows = _rows(gradient)
        return (
            product_by_onednn(gradient, weight.t()) if of_values else None,
            _weight_gradient(rows, _rows(values)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _weight_gradient(rows: Tensor, inputs: Tensor) -> Tensor:
    if len(rows) < FEW_ROWS:  # oneDNN takes 2.7 ms for 384 x 2 times 2 x 384
        return rows.t() @ inputs
    return product_by_onednn(rows.t(), inputs.t())


def product_by_onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """then(x W^T + b), on a CPU; `then` is none or gelu."""
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, then, [], "none")


class CastWeight:
    """What a layer multiplies by under autocast, for one forward pass and its backward pass.

    Autocast's own copy of a weight is made again for every call in inference mode; it is never laid out for the product
    (870 to 1,430 GFLOP/s on two cores with AMX, 512 x 384 times 384 x 384); and its gradients are added up in 16 bits,
    where 256 + 1 is 256 in bf16.
    """

    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight, self.gradients = gathered(layer.weight, dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        by_onednn = BF16_BY_ONEDNN and dtype == torch.bfloat16 and self.weight.device.type == "cpu"
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach()) if by_onednn else None

    def __call__(self, values: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b in 16 bits; `bias` is the layer's own, for its gradient."""
        if torch.is_grad_enabled():
            return _CastProduct.apply(values.to(self.dtype), self.weight, bias, self)
        return self.product(values)

    def product(self, values: Tensor, then: str = "none") -> Tensor:
        """then(x W^T + b) in 16 bits, without a gradient; `then` is none or gelu."""
        values = values.to(self.dtype)
        if self.packed is not None:
            return product_by_onednn(values, self.packed, self.bias, then)
        product = nn.functional.linear(values, self.weight.detach(), self.bias)
        return nn.functional.gelu(product) if then == "gelu" else product


class _CastProduct(torch.autograd.Function):
    """x W^T + b and its gradients in 16 bits; those of the weight and of the bias are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, cast: CastWeight) -> Tensor:
        ctx.save_for_backward(values)
        ctx.cast = cast
        return cast.product(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        of_values, of_weight, of_bias, _ = ctx.needs_input_grad
        rows, gradients = _rows(gradient), ctx.cast.gradients
        if of_weight:
            of_one_use = rows.t() @ _rows(values)
            if gradients:
                gradients[0].add_(of_one_use)
            else:
                gradients.append(of_one_use.float())
        return (
            gradient @ ctx.cast.weight.detach() if of_values else None,
            None,
            rows.sum(0, dtype=torch.float32) if of_bias else None,
            None,
        )


CastWeights = dict[Linear, CastWeight]
_cast_weights: ContextVar[CastWeights | None] = ContextVar("_cast_weights", default=None)


def cast_weights(module: nn.Module) -> CastWeights | None:
    """What its layers multiply by under the autocast that is on, for one forward pass; None without autocast."""
    device = next(module.parameters()).device.type
    if not torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return None
    dtype = torch.get_autocast_dtype(device)
    return {layer: CastWeight(layer, dtype) for layer in module.modules() if type(layer) is Linear}


def cast_weights_in_use() -> CastWeights | None:
    return None if torch.compiler.is_compiling() else _cast_weights.get()


@contextmanager
def using(weights: CastWeights | None) -> Iterator[None]:
    """Within, the layers multiply by these."""
    token = _cast_weights.set(weights)
    try:
        yield
    finally:
        _cast_weights.reset(token)
