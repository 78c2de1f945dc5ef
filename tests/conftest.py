"""Tiny random encoders, the same for all tests of models and engine."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, PreTrainedConfig, RobertaConfig

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

VOCABULARY = 120
WIDTH = 32


def tiny_encoder(kind: str, **changes) -> PreTrainedConfig:
    """A two-layer encoder config of RoBERTa's or BERT's shape: 64 positions, width 32."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.3,  # large, so that what should differ does
        **changes,
    }
    if kind == "roberta":
        return RobertaConfig(max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **shape)
    return BertConfig(max_position_embeddings=64, pad_token_id=0, **shape)


@pytest.fixture(params=["roberta", "bert"])
def encoder_config(request) -> PreTrainedConfig:
    return tiny_encoder(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
