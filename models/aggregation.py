"""From window states to the document state: `encoder`, `transformer`, `attention`, `mean` or `max`.

Shapes: B documents, N windows, D hidden size. `weights_BN` say how much a window counts, 0 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

AGGREGATIONS = ("encoder", "transformer", "attention", "mean", "max")
ADDED = (".self_attn.out_proj", ".linear2")  # what makes the states that a Transformer's layer adds


def masked_mean(states_BND: Tensor, weights_BN: Tensor) -> Tensor:
    """Mean of a document's windows, or of a window's tokens, by a mask or other weights, [B, D]."""
    weights_BN1 = weights_BN.unsqueeze(-1).to(states_BND.dtype)
    return (states_BND * weights_BN1).sum(1) / weights_BN1.sum(1)


def masked_max(states_BND: Tensor, exists_BN: Tensor) -> Tensor:
    """Elementwise maximum over a document's existing windows, [B, D]."""
    return states_BND.masked_fill(~exists_BN.unsqueeze(-1), -torch.inf).amax(1)


class AttentionAggregation(nn.Module):
    """Additive attention over window states (Yang et al. 2016, eq. 8-10), times their weights.

    Its query starts at zero: a mean.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, states_BND: Tensor, weights_BN: Tensor) -> Tensor:
        scores_BN = torch.tanh(self.projection(states_BND)) @ self.query
        shares_BN = (scores_BN + weights_BN.log()).softmax(-1)
        return torch.einsum("bn,bnd->bd", shares_BN, states_BND)


class TransformerAggregation(nn.Module):
    """After ToBERT (Pappagari et al. 2019): the window states through a small Transformer of their own.

    Two layers with as many heads as the encoder has. Ours: the document state is the mean of the window states and of
    what the layers add to them, which is nothing at first, so that a fresh model is as good as its own mean of windows;
    positions are sinusoids, so that any number of windows can be read; encoder and Transformer are trained together.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            transformer_layer(hidden_size, heads, 4 * hidden_size, dropout, norm_first=True) for _ in range(2)
        )

    def forward(self, states_BND: Tensor, weights_BN: Tensor) -> Tensor:
        places_N = torch.arange(states_BND.shape[1], device=states_BND.device)
        places_ND = sinusoids(places_N, states_BND.shape[-1])
        hidden_BND = states_BND + places_ND
        for layer in self.layers:
            hidden_BND = layer(hidden_BND, src_key_padding_mask=weights_BN == 0)
        return masked_mean(hidden_BND - places_ND, weights_BN)


def transformer_layer(
    size: int, heads: int, inner_size: int, dropout: float, *, norm_first: bool = False
) -> nn.TransformerEncoderLayer:
    """A layer over [B, L, D] as Vaswani et al. 2017 have it, with GELU and without dropout of attention weights."""
    layer = nn.TransformerEncoderLayer(
        size, heads, inner_size, dropout, activation="gelu", batch_first=True, norm_first=norm_first
    )
    layer.self_attn.dropout = 0.0  # above that, SDPA on a CPU leaves its fast path
    # or inference takes torch's fused layer, which holds all attention weights: 5 GB for 8 documents of 4,096 tokens
    layer.activation_relu_or_gelu = 0
    return layer


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Positions [...] as sines and cosines [..., size], an even number (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions.unsqueeze(-1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class EncoderAggregation(nn.Module):
    """[G_CLS] s(0) ... s(n-1) [G_SEP] through the window encoder, joined with the mean of the states by a residual.

    document state = a * g + (1 - a) * mean(s), with g what the encoder makes of that sequence: its output at position
    0, or the mean over it, as `pooling` has it for windows. `alpha` fixes a; None makes it a learned scalar that starts
    at 0, so that a fresh model is as good as its own mean of windows.
    """

    def __init__(self, alpha: float | None) -> None:
        super().__init__()
        self.alpha: nn.Parameter | float = nn.Parameter(torch.zeros(())) if alpha is None else alpha

    def forward(
        self,
        states_BND: Tensor,
        normed_states_BND: Tensor,
        weights_BN: Tensor,
        cls_D: Tensor,
        sep_D: Tensor,
        encode: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`encode` maps embeddings [B, N + 2, D] and a mask [B, N + 2] to g [B, D]."""
        batch, windows, size = normed_states_BND.shape
        count_B = (weights_BN > 0).sum(1)
        # existing windows are at the front, so that [G_SEP] follows the last one at once, as after any sentence
        content = torch.cat([normed_states_BND, normed_states_BND.new_zeros(batch, 1, size)], dim=1)
        at_end_BN1 = torch.arange(windows + 1, device=weights_BN.device) == count_B.unsqueeze(1)
        content = torch.where(at_end_BN1.unsqueeze(-1), sep_D, content)
        sequence = torch.cat([cls_D.expand(batch, 1, size), content], dim=1)
        mask = torch.arange(windows + 2, device=weights_BN.device) < (count_B + 2).unsqueeze(1)
        return self.join(encode(sequence, mask.long()), masked_mean(states_BND, weights_BN))

    def join(self, output_BD: Tensor, mean_BD: Tensor) -> Tensor:
        """The document state of the encoder's output g and the mean of the window states, all [B, D]."""
        return self.alpha * output_BD + (1 - self.alpha) * mean_BD
