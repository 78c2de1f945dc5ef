"""The loss, against torch's functions and formulas written out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.objective import Objective


def test_objective_sums():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    per_document = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(Objective(0.1).losses(logits, labels), per_document)
    assert Objective().losses(logits.bfloat16(), labels).dtype == torch.float32
    weights = torch.tensor([0.5, 2.0, 3.0])
    plain = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(Objective(0.0, weights).losses(logits, labels), plain * weights[labels])
    several = torch.from_numpy(np.eye(3, dtype=np.float32)[labels.numpy()])
    smoothed = several * 0.9 + 0.05
    expected = -(smoothed * torch.sigmoid(logits).log() + (1 - smoothed) * torch.sigmoid(-logits).log())
    torch.testing.assert_close(Objective(0.1).losses(logits, several), expected)
    weighted = -(weights * several * torch.sigmoid(logits).log() + (1 - several) * torch.sigmoid(-logits).log())
    torch.testing.assert_close(Objective(0.0, weights).losses(logits, several), weighted)


@pytest.mark.parametrize("several", [False, True])
def test_window_loss_is_the_mean_over_a_documents_windows_by_their_weights(several):
    torch.manual_seed(0)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]) if several else torch.tensor([2, 0])
    weights = torch.tensor([[9, 9, 2], [4, 0, 0]])  # the second document has one window
    window_logits, logits = torch.randn(2, 3, 3), torch.randn(2, 3)
    hidden = SimpleNamespace(window_weights=weights, window_logits=window_logits)
    plain = Objective()
    first = sum(w * plain.losses(window_logits[:1, i], labels[:1]).sum() for i, w in enumerate([0.45, 0.45, 0.1]))
    windows = first + plain.losses(window_logits[1:, 0], labels[1:]).sum()
    expected = (plain.losses(logits, labels).sum() + 0.5 * windows) / 12
    objective = Objective(window_loss=0.5)
    torch.testing.assert_close(objective(SimpleNamespace(logits=logits, hidden_states=hidden), labels, 12), expected)
