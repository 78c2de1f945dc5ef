"""The recurrent cell of `--carry gru`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Cell(torch.autograd.Function):
    """torch's own function, computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.gru_cell(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = torch.gru_cell(*inputs)
        return torch.autograd.grad(output, inputs, gradient)


class MemoryCell(nn.GRUCell):
    """A GRU cell (Cho et al. 2014) that is one node of autograd's graph, and not 17: a long document keeps the graph of
    each window, and that of torch's cell alone would take 10 kB of it."""

    def forward(self, state_bD: Tensor, memory_bD: Tensor | None = None) -> Tensor:
        """The memory after a window, [b, D]; at first there is none."""
        memory_bD = torch.zeros_like(state_bD) if memory_bD is None else memory_bD
        inputs = state_bD, memory_bD, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return _Cell.apply(*inputs) if torch.is_grad_enabled() else torch.gru_cell(*inputs)
