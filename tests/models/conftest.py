"""Random documents for the tests of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models import linear
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, PAD, SEP, VOCABULARY

LENGTHS = [[12, 12, 12, 7], [12, 4], [12, 12, 12, 12, 12, 9], [8]]  # of the windows of four documents


def documents(lengths: list[list[int]], window_size: int = 12) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` [B, N, W] of random documents; a length counts [CLS] and [SEP]."""
    windows = max(map(len, lengths))
    input_ids = torch.full((len(lengths), windows, window_size), PAD)
    mask = torch.zeros(len(lengths), windows, window_size, dtype=torch.long)
    for row, document in enumerate(lengths):
        for window, length in enumerate(document):
            content = torch.randint(5, VOCABULARY, (length - 2,))
            input_ids[row, window, :length] = torch.cat([torch.tensor([CLS]), content, torch.tensor([SEP])])
            mask[row, window, :length] = 1
    return input_ids, mask


def build(encoder, **options) -> RecurrentRoBERTa:
    """A model in eval mode whose gates, norms and learned scalar are away from their start values."""
    defaults = {"num_classes": 3, "window_size": 12, "max_windows": 8, "dropout": 0.0, "cls_token_id": CLS}
    model = RecurrentRoBERTa(encoder=encoder, **{**defaults, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("encoder."):
                # the layers of the small Transformer multiply what they add; by more, rounding would count
                parameter.add_((0.2 if ".layers." in name else 0.3) * torch.randn_like(parameter))
    return model.eval()


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of the sum of squares of what `forward` gives, by parameter; only those that get one."""
    model.zero_grad()
    forward().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["torch", *(["onednn"] if linear.BF16_BY_ONEDNN else [])])
def whose_bf16(request, monkeypatch):
    """Both ways to multiply in bf16; torch's is that of GPUs, and of CPUs that have no bf16."""
    monkeypatch.setattr(linear, "BF16_BY_ONEDNN", request.param == "onednn")
