"""int8 on a CPU: the encoder's linear layers with weights and, drawn anew for each input, activations in 8 bits."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from models.linear import Linear
from models.reberta import RecurrentRoBERTa


def quantize_int8(model: RecurrentRoBERTa) -> RecurrentRoBERTa:
    """The same model, its encoder's `nn.Linear` quantised in place; gates, norms, head and embeddings stay in fp32.

    For inference on a CPU, outside of autocast; such a model can be neither trained nor saved. Activations are scaled
    by the largest of the whole batch: read one document at a time, or its logits depend on its batch mates.
    """
    for module in model.encoder.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # the exact type that is looked for
    with warnings.catch_warnings():  # torch advises torchao, whose int8 on a CPU is slow unless it is compiled
        warnings.simplefilter("ignore", DeprecationWarning)
        model.encoder = quantize_dynamic(model.encoder, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model
