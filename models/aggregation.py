"""From window states to the document state: `encoder`, `attention`, `mean` or `max`.

Shapes: B documents, N windows, D hidden size. A window counts only where `exists_BN` is true.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

AGGREGATIONS = ("encoder", "attention", "mean", "max")


def masked_mean(states_BND: Tensor, exists_BN: Tensor) -> Tensor:
    """Mean of a document's existing windows, [B, D]."""
    weights_BN1 = exists_BN.unsqueeze(-1).to(states_BND.dtype)
    return (states_BND * weights_BN1).sum(1) / weights_BN1.sum(1)


def masked_max(states_BND: Tensor, exists_BN: Tensor) -> Tensor:
    """Elementwise maximum over a document's existing windows, [B, D]."""
    return states_BND.masked_fill(~exists_BN.unsqueeze(-1), -torch.inf).amax(1)


class AttentionAggregation(nn.Module):
    """Additive attention over window states (Yang et al. 2016, eq. 8-10). Its query starts at zero: a plain mean."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states_BND: Tensor, exists_BN: Tensor) -> Tensor:
        scores_BN = torch.tanh(self.projection(states_BND)) @ self.query
        weights_BN = scores_BN.masked_fill(~exists_BN, -torch.inf).softmax(-1)
        return torch.einsum("bn,bnd->bd", weights_BN, states_BND)


class EncoderAggregation(nn.Module):
    """[G_CLS] s(0) ... s(n-1) [G_SEP] through the window encoder, joined with the mean of the states by a residual.

    document state = a * g + (1 - a) * mean(s), with g the encoder's output at position 0. `alpha` fixes a; None makes
    it a learned scalar that starts at 0, so that a fresh model is as good as its own mean of windows.
    """

    def __init__(self, alpha: float | None) -> None:
        super().__init__()
        self.alpha: nn.Parameter | float = nn.Parameter(torch.zeros(())) if alpha is None else alpha

    def forward(
        self,
        states_BND: Tensor,
        normed_states_BND: Tensor,
        exists_BN: Tensor,
        cls_D: Tensor,
        sep_D: Tensor,
        encode: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`encode` maps embeddings [B, N + 2, D] and a mask [B, N + 2] to the encoder's output at position 0."""
        batch, windows, size = normed_states_BND.shape
        count_B = exists_BN.sum(1)
        slots = torch.arange(windows, device=exists_BN.device)
        # existing windows are at the front, so that [G_SEP] follows the last one at once, as after any sentence
        content = torch.cat([normed_states_BND, normed_states_BND.new_zeros(batch, 1, size)], dim=1)
        at_end_BN1 = torch.arange(windows + 1, device=exists_BN.device) == count_B.unsqueeze(1)
        content = torch.where(at_end_BN1.unsqueeze(-1), sep_D, content)
        sequence = torch.cat([cls_D.expand(batch, 1, size), content], dim=1)
        mask = torch.arange(windows + 2, device=exists_BN.device) < (count_B + 2).unsqueeze(1)
        mean_BD = masked_mean(states_BND, slots < count_B.unsqueeze(1))
        return self.join(encode(sequence, mask.long()), mean_BD)

    def join(self, output_BD: Tensor, mean_BD: Tensor) -> Tensor:
        """The document state of the encoder's output g and the mean of the window states, all [B, D]."""
        return self.alpha * output_BD + (1 - self.alpha) * mean_BD
