"""A batch in the order in which its windows are read, and what each step of the pass needs, counted once.

Shapes: B documents, b documents that still have a window, N windows, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Documents sorted by their number of windows, existing windows in front, and the host's plan of the pass."""

    embed: Callable[[Tensor], Tensor]
    """Token ids to word embeddings."""
    input_ids: Tensor
    """[B, N, W]"""
    attention_mask: Tensor
    """[B, N, W] bool"""
    skip: Tensor
    """[B, N] bool: windows that are known to fail."""
    exists: Tensor
    """[B, N] bool"""
    place: Tensor
    """[B]: of each document as it was given, its row here."""
    window_place: Tensor
    """[B, N]: of each of its windows as they were given, its place in that row."""
    alive: list[int]
    """Documents that have a window i."""
    widths: list[int]
    """Tokens of the longest window i."""
    padded: list[bool]
    """Whether any window i is shorter than that."""

    def windows_as_given(self, values: Tensor) -> Tensor:
        """`values` [B, n, ...] of the first n windows in the order in which the batch was given, [B, N, ...]; zero for
        others."""
        absent = values.new_zeros(len(values), self.exists.shape[1] - values.shape[1], *values.shape[2:])
        return torch.cat([values, absent], dim=1)[self.place.unsqueeze(1), self.window_place]


def plan_batch(embed: Callable[[Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, skip: Tensor) -> Batch:
    """Sort the batch, and count once, on the host, what each step of the pass needs.

    A skipped window is reduced to its first token.

    Args:
        input_ids: [B, N, W].
        attention_mask: [B, N, W] bool.
        skip: [B, N] bool.
    """
    exists_BN = attention_mask.any(-1)
    windows_BN = torch.argsort(exists_BN.int(), dim=1, descending=True, stable=True)
    rows_B = torch.argsort(exists_BN.sum(1), descending=True, stable=True)
    place_B = torch.argsort(rows_B)
    windows_BN = windows_BN[rows_B]
    tokens_BNW = windows_BN.unsqueeze(-1).expand_as(input_ids)
    input_ids, attention_mask = (tensor[rows_B].gather(1, tokens_BNW) for tensor in (input_ids, attention_mask))
    skip, exists_BN = (tensor[rows_B].gather(1, windows_BN) for tensor in (skip, exists_BN))
    input_ids = torch.where(skip.unsqueeze(-1), input_ids[:, :, :1], input_ids)
    first_only = torch.arange(input_ids.shape[2], device=input_ids.device) == 0
    attention_mask = torch.where(skip.unsqueeze(-1), attention_mask & first_only, attention_mask)
    positions_W = torch.arange(1, input_ids.shape[2] + 1, device=input_ids.device)
    ends_BN = (attention_mask * positions_W).amax(-1)
    ends, counts = torch.stack([ends_BN, attention_mask.sum(-1)]).tolist()
    if any(row[0] == 0 for row in ends):
        raise ValueError("a document of the batch has no window: every row needs at least one token in its mask")
    windows = max(sum(end > 0 for end in row) for row in ends)
    alive = [sum(row[i] > 0 for row in ends) for i in range(windows)]
    widths = [max(row[i] for row in ends) for i in range(windows)]
    padded = [
        any(row[i] != width for row in counts[:b]) for i, (b, width) in enumerate(zip(alive, widths, strict=True))
    ]
    window_place_BN = torch.argsort(windows_BN, dim=1)[place_B]
    return Batch(embed, input_ids, attention_mask, skip, exists_BN, place_B, window_place_BN, alive, widths, padded)
