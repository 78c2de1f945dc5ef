"""The models that the benchmarks compare: equal encoder shape, random weights, five classes, one way to call them.

- `PEERS`: ReBerta and what else reads long documents; `VARIANTS`: ReBerta made faster; `MEMORY_LEVELS`: and smaller
- a variant is called `<model>, <what is different>`: by its name its work is counted on the model it derives from
- the same vocabulary, layers, width, heads and width of the feed-forward; hidden dropout 0.1, attention dropout 0

Where a peer differs by nature: ModernBERT's feed-forward is gated (half as many weights again), its positions are
rotary, and its local attention is full attention under a mask; Longformer has projections of its own for its global
token; BigBird reads up to 704 tokens with full attention.

Shapes: B documents, T tokens of a document, C classes. All documents are full: no padding, and no mask for the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BigBirdConfig,
    LongformerConfig,
    ModernBertConfig,
    RobertaConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from models.quantization import quantize_int8
from models.reberta import RecurrentRoBERTa

WINDOW = 256
VOCABULARY = 30522
CLASSES = 5
DROPOUT = 0.1
ROBERTA_RESERVED = 2  # rows of RoBERTa's position table that are no positions: pad_id + 1


@dataclass(frozen=True)
class Shape:
    """An encoder's layers and width; heads as in MiniLM (12 of 32 at width 384) and BERT (12 of 64 at 768)."""

    layers: int
    width: int

    @property
    def heads(self) -> int:
        return self.width // (32 if self.width <= 384 else 64)


class IndependentWindows(nn.Module):
    """What a user would write: all windows as one batch through transformers, the mean of their [CLS], a classifier."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AutoModel.from_config(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        windows = self.encoder(input_ids=input_ids.flatten(0, 1))
        states = windows.last_hidden_state[:, 0].unflatten(0, input_ids.shape[:2])
        return SequenceClassifierOutput(logits=self.classifier(states.mean(1)))


def _encoder_options(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "num_labels": CLASSES,
    }


def _bert_options(shape: Shape) -> dict[str, Any]:
    dropouts = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": 0.0}
    return {**_encoder_options(shape), **dropouts, "hidden_act": "gelu"}


def _roberta_config(shape: Shape, positions: int) -> RobertaConfig:
    return RobertaConfig(
        max_position_embeddings=positions + ROBERTA_RESERVED, type_vocab_size=1, **_bert_options(shape)
    )


def reberta(shape: Shape, tokens: int, memory_level: int | str = 0) -> RecurrentRoBERTa:
    return RecurrentRoBERTa(
        num_classes=CLASSES,
        encoder=_roberta_config(shape, 512),
        cls_token_id=0,
        window_size=WINDOW,
        max_windows=tokens // WINDOW,
        dropout=DROPOUT,
        memory_level=memory_level,
    )


def int8_reberta(shape: Shape, tokens: int) -> RecurrentRoBERTa:
    return quantize_int8(reberta(shape, tokens))


def independent_windows(shape: Shape, tokens: int) -> IndependentWindows:
    return IndependentWindows(_roberta_config(shape, 512))


def full_attention(shape: Shape, tokens: int) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(_roberta_config(shape, tokens), attn_implementation="sdpa")


def longformer(shape: Shape, tokens: int) -> nn.Module:
    """Its model puts global attention on token 0, and pads to a multiple of its attention window."""
    window = 512
    positions = -(-tokens // window) * window + ROBERTA_RESERVED
    config = LongformerConfig(
        attention_window=window, max_position_embeddings=positions, type_vocab_size=1, **_bert_options(shape)
    )
    return AutoModelForSequenceClassification.from_config(config)


def bigbird(shape: Shape, tokens: int) -> nn.Module:
    config = BigBirdConfig(
        attention_type="block_sparse",
        block_size=64,
        num_random_blocks=3,
        max_position_embeddings=max(tokens, 4096),
        **_bert_options(shape),
    )
    return AutoModelForSequenceClassification.from_config(config)


def modernbert(shape: Shape, tokens: int) -> nn.Module:
    config = ModernBertConfig(
        max_position_embeddings=max(tokens, 8192),
        local_attention=128,
        global_attn_every_n_layers=3,
        attention_dropout=0.0,
        embedding_dropout=DROPOUT,
        mlp_dropout=DROPOUT,
        classifier_dropout=DROPOUT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **_encoder_options(shape),
    )
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


Builder = Callable[[Shape, int], nn.Module]
PEERS: dict[str, Builder] = {
    "ReBerta": reberta,
    "independent windows": independent_windows,
    "full attention": full_attention,
    "Longformer": longformer,
    "BigBird": bigbird,
    "ModernBERT": modernbert,
}
VARIANTS: dict[str, Builder] = {"ReBerta, int8": int8_reberta}
MEMORY_LEVELS: dict[str, Builder] = {
    f"ReBerta, memory level {level}": partial(reberta, memory_level=level) for level in ("auto", 0, 1, 2)
}


def build(name: str, shape: Shape, tokens: int) -> nn.Module:
    """The model called `name`, able to read `tokens` tokens, with the same random weights each time."""
    torch.manual_seed(0)
    return {**PEERS, **VARIANTS, **MEMORY_LEVELS}[name](shape, tokens)


def original(name: str) -> str:
    """The model whose work a variant does: itself for all others."""
    return name.split(",")[0]


def documents(batch: int, tokens: int) -> Tensor:
    """Random tokens, [B, T]."""
    return torch.randint(5, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def classify(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits [B, C] of full documents [B, T]; models that read windows get the same tokens cut into windows of 256."""
    if isinstance(model, RecurrentRoBERTa):
        windows = input_ids.unflatten(1, (-1, WINDOW))
        return model(input_ids=windows, attention_mask=torch.ones_like(windows)).logits
    if isinstance(model, IndependentWindows):
        return model(input_ids=input_ids.unflatten(1, (-1, WINDOW))).logits
    return model(input_ids=input_ids).logits


def step(model: nn.Module, input_ids: Tensor, mode: str, precision: str = "fp32") -> None:
    """One `training` step (forward and backward; the optimizer is left out) or one `inference` of documents [B, T]."""
    model.train(mode == "training")
    with torch.inference_mode(mode == "inference"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = classify(model, input_ids)
        if mode == "training":
            logits.float().logsumexp(-1).sum().backward()
