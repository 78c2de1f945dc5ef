"""A small Transformer from scratch, the baseline that knows nothing beforehand: `--model_type transformer`.

- all tokens of the windows as one sequence: [CLS], then the content tokens, without what stands between windows
- word embeddings with sinusoidal positions, two layers, the masked mean of the outputs, and a linear classifier

Shapes: B documents, N windows, W tokens of a window, T tokens of a document, D hidden size, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init

from .aggregation import masked_mean, sinusoids, transformer_layer
from .configuration import ConfigError, DocumentConfig
from .encoder import Dropout, recomputed
from .output import INITIALIZER_RANGE, HiddenStates, ReBertaOutput


class TransformerConfig(DocumentConfig):
    """What `TransformerClassifier` is built from."""

    model_type = "reberta_transformer"

    vocab_size: int = 0
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256


class TransformerClassifier(PreTrainedModel):
    """Embeddings, Transformer layers, mean and head. Its output is that of `RecurrentRoBERTa`, without gates."""

    config_class = TransformerConfig
    main_input_name = "input_ids"
    # all of it, when loaded with a dtype of 16 bits: it has no encoder
    _keep_in_fp32_modules_strict = ("embeddings", "norm", "layers", "classifier")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            transformer_layer(size, config.num_attention_heads, config.intermediate_size, config.dropout)
            for _ in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=INITIALIZER_RANGE)
        if isinstance(module, nn.Linear):
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def check(self) -> None:
        """Raises ConfigError where the configuration reads a document in a way that this model cannot."""
        if self.config.window_overlap:
            raise ConfigError(f"window_overlap is {self.config.window_overlap}; this model reads each token once")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ReBertaOutput:
        """Classify documents.

        Args:
            input_ids: [B, N, W], windows that share no tokens, each [CLS] ... [SEP] padded on the right.
            attention_mask: [B, N, W], 1 for tokens; a window whose mask is all zero does not exist.

        Raises:
            ValueError: a document without any window.
        """
        is_read_BNW = _content(attention_mask.bool())
        is_read_BT = is_read_BNW.flatten(1)
        if not is_read_BT.any(1).all():
            raise ValueError("a document of the batch has no window: every row needs at least one token in its mask")
        positions_BT = is_read_BT.cumsum(1) - 1
        embeds_BTD = self.embeddings(input_ids.flatten(1))
        places_BTD = INITIALIZER_RANGE * sinusoids(positions_BT, embeds_BTD.shape[-1])
        hidden_BTD = self.dropout(self.norm(embeds_BTD + places_BTD))
        recompute = torch.is_grad_enabled() and self.config.memory_level == 2
        for layer in self.layers:
            arguments = layer, hidden_BTD, is_read_BT
            hidden_BTD = recomputed(_read, *arguments) if recompute else _read(*arguments)
        hidden_BTD = hidden_BTD.float()
        document_BD = masked_mean(hidden_BTD, is_read_BT)
        no_gates_BN = document_BD.new_zeros(attention_mask.shape[:2])
        hidden_states = HiddenStates(
            window_states=_window_means(hidden_BTD.detach(), is_read_BNW),
            window_weights=is_read_BNW.sum(-1),
            document_state=document_BD,
            window_gates=no_gates_BN.unsqueeze(0),
            global_gates=no_gates_BN[:, 0].unsqueeze(0),
            window_failures=no_gates_BN.bool(),
        )
        return ReBertaOutput(self.classifier(self.dropout(document_BD)), hidden_states)


def _content(exists_BNW: Tensor) -> Tensor:
    """Which tokens are read: those between [CLS] and [SEP], and the [CLS] of the first window that exists."""
    is_read_BNW = exists_BNW & nn.functional.pad(exists_BNW[:, :, 1:], (0, 1))  # the last token is [SEP]
    is_read_BNW[:, :, 0] &= exists_BNW[:, :, 0].cumsum(1) == 1
    return is_read_BNW


def _read(layer: nn.Module, hidden_BTD: Tensor, is_read_BT: Tensor) -> Tensor:
    return layer(hidden_BTD, src_key_padding_mask=~is_read_BT)


def _window_means(hidden_BTD: Tensor, is_read_BNW: Tensor) -> Tensor:
    """Mean output of the tokens of each window, [B, N, D]; zero where a window does not exist."""
    weights_BNW1 = is_read_BNW.unsqueeze(-1).to(hidden_BTD.dtype)
    hidden_BNWD = hidden_BTD.unflatten(1, is_read_BNW.shape[1:])
    return (hidden_BNWD * weights_BNW1).sum(2) / weights_BNW1.sum(2).clamp(min=1)


AutoConfig.register(TransformerConfig.model_type, TransformerConfig, exist_ok=True)
AutoModelForSequenceClassification.register(TransformerConfig, TransformerClassifier, exist_ok=True)
TransformerConfig.register_for_auto_class()
TransformerClassifier.register_for_auto_class("AutoModelForSequenceClassification")
