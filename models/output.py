"""What the models of this package have in common: their output, and the spread of fresh weights.

Shapes: B documents, N windows, D hidden size, C classes, R repeats.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

INITIALIZER_RANGE = 0.02


class HiddenStates(NamedTuple):
    """What the last repeat knew, and how much of what was read before it let in."""

    window_states: Tensor
    """[B, N, D]; zero where a window does not exist."""
    window_weights: Tensor
    """[B, N]: how much each counts in the document, in tokens or 1; 0 where a window does not exist."""
    document_state: Tensor
    """[B, D]"""
    window_gates: Tensor
    """[R, B, N]: mean weight with which what was read before entered; 0 where nothing could enter."""
    global_gates: Tensor
    """[R, B]: the same for the document state of the repeat before."""
    window_failures: Tensor
    """[B, N] bool: windows whose state was not finite and was replaced by the one before it."""
    window_logits: Tensor | None = None
    """[B, N, C]: what the head makes of each window's state alone; None but in training with `window_loss`."""


class ReBertaOutput(NamedTuple):
    """`logits, hidden_states = model(...)`"""

    logits: Tensor
    """[B, C]; not a number for a document of which no window could be read."""
    hidden_states: HiddenStates
