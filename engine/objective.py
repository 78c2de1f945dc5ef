"""What training minimises: the loss of the documents of an update, and of their windows (`--window_loss`).

- computed from the logits, as a sum over the documents of an update divided by their number
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def window_shares(weights_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all n windows that exist: document [n], place in it [n], and its share of the document's weights [n]."""
    documents, windows = weights_BN.nonzero(as_tuple=True)
    return documents, windows, (weights_BN / weights_BN.sum(1, keepdim=True))[documents, windows]


class Objective:
    """Cross-entropy, or binary cross-entropy for several labels a document, as a sum divided by a count.

    Called as transformers' `compute_loss_func`: `num_items_in_batch` counts the labels of the whole update, over all
    micro-batches and processes.
    """

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Tensor | None = None, window_loss: float = 0.0
    ) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.window_loss = window_loss

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[n] of logits [n, C] and labels [n]; [n, C] of labels [n, C]."""
        logits = logits.float()
        if self.class_weights is not None:  # moved once
            self.class_weights = self.class_weights.to(logits.device)
        weight = self.class_weights
        if labels.dim() == 2:
            targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            return nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
        return nn.functional.cross_entropy(
            logits, labels, weight=weight, label_smoothing=self.label_smoothing, reduction="none"
        )

    def window_loss_sum(self, hidden_states: Any, labels: Tensor) -> Tensor:
        """Sum over documents of the weighted mean loss of their windows, each of which should tell the label alone."""
        documents, windows, shares = window_shares(hidden_states.window_weights)
        losses = self.losses(hidden_states.window_logits[documents, windows], labels[documents])
        return (losses * shares.view(-1, *[1] * (losses.dim() - 1))).sum()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
        loss = self.losses(outputs.logits, labels).sum()
        if self.window_loss:
            loss = loss + self.window_loss * self.window_loss_sum(outputs.hidden_states, labels)
        return loss / num_items_in_batch
