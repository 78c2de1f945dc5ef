"""One tensor for all the gradients of a parameter that one forward pass uses many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gathered(parameter: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The parameter's values as `dtype`, and a list. Whoever uses the values returns None as their gradient, and has it
    added to the one tensor in the list, which is empty until the first has put its own there.

    autograd makes a tensor for each use and adds it to the sum, in the type of the values.
    """
    gradients: list[Tensor] = []
    return _Gathered.apply(parameter, dtype, gradients), gradients


class _Gathered(torch.autograd.Function):
    """The graph keeps the users' edges to this node, which therefore runs after all of them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype, gradients: list[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return parameter.view_as(parameter) if parameter.dtype == dtype else parameter.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nothing: None) -> tuple[Tensor, None, None]:
        return ctx.gradients.pop(), None, None
