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
    alive: list[int]
    """Documents that have a window i."""
    widths: list[int]
    """Tokens of the longest window i."""
    padded: list[bool]
    """Whether any window i is shorter than that."""


def plan_batch(embed: Callable[[Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, skip: Tensor) -> Batch:
    """Count once, on the host, what each step of the pass needs; a skipped window is reduced to its first token."""
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
    return Batch(embed, input_ids, attention_mask, skip, alive, widths, padded)
