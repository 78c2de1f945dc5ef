"""The window encoder: a thin reader of a transformers encoder's own layers.

- `load_encoder`: an encoder by name, folder or config, without its pooler
- `max_window_size`: how many tokens a window may hold, read off the encoder's position table
- `cls_output`: [CLS] of a batch of embedded windows; the last layer computes the [CLS] row only, since nothing else of
  it is read; no attention mask where nothing is padded; layer-wise recomputation where asked
- `use_rotary_positions`: rotary positions, as an attention function registered with transformers

Shapes: B documents, W tokens of a window, D hidden size, H heads, K size of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.bert.modeling_bert import eager_attention_forward

ROTARY = "reberta_rotary"
ROTARY_BASE = 10_000.0


def load_encoder(
    encoder: str | Path | PreTrainedConfig, dropout: float, attention_dropout: float, pretrained: bool = True
) -> PreTrainedModel:
    """Load an encoder (name or folder: with its weights; config object: with random weights), without its pooler.

    Raises:
        OSError: the name or folder cannot be found (as transformers says it).
    """
    config = encoder if isinstance(encoder, PreTrainedConfig) else AutoConfig.from_pretrained(encoder)
    config.hidden_dropout_prob = dropout
    config.attention_probs_dropout_prob = attention_dropout
    options: dict[str, Any] = {"add_pooling_layer": False} if _has_pooler_option(config) else {}
    if pretrained and not isinstance(encoder, PreTrainedConfig):
        return AutoModel.from_pretrained(encoder, config=config, dtype=torch.float32, use_safetensors=True, **options)
    return AutoModel.from_config(config, dtype=torch.float32, **options)


def _has_pooler_option(config: PreTrainedConfig) -> bool:
    code = AutoModel._model_mapping[type(config)].__init__.__code__
    return "add_pooling_layer" in code.co_varnames


def max_window_size(encoder: PreTrainedModel) -> int:
    """Tokens that the position table takes: 512 for BERT, and for RoBERTa, whose first pad_id + 1 rows are none."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return encoder.config.max_position_embeddings


def cls_output(
    encoder: PreTrainedModel, embeds_BWD: Tensor, mask_BW: Tensor | None, *, recompute_layers: bool = False
) -> Tensor:
    """The encoder's last hidden state at position 0, [B, D], for embedded tokens [B, W, D].

    `mask_BW` is None where nothing is padded. With `recompute_layers`, a layer's activations are computed again in the
    backward pass instead of being kept. Encoders that are not BERT-shaped are called whole.
    """
    if not _is_bert_shaped(encoder):
        return encoder(inputs_embeds=embeds_BWD, attention_mask=mask_BW).last_hidden_state[:, 0]
    hidden_BWD = encoder.embeddings(inputs_embeds=embeds_BWD)
    mask = create_bidirectional_mask(encoder.config, hidden_BWD, mask_BW) if mask_BW is not None else None
    *layers, last = encoder.encoder.layer
    for layer in layers:
        if recompute_layers:
            hidden_BWD = checkpoint(layer, hidden_BWD, mask, use_reentrant=False)
        else:
            hidden_BWD = layer(hidden_BWD, mask)
    return _cls_of_layer(last, hidden_BWD, mask)


def _is_bert_shaped(encoder: PreTrainedModel) -> bool:
    layers = getattr(getattr(encoder, "encoder", None), "layer", None)
    attention = getattr(layers[0], "attention", None) if layers else None
    return all(hasattr(getattr(attention, "self", None), part) for part in ("query", "key", "value", "scaling"))


def _cls_of_layer(layer: Any, hidden_BWD: Tensor, mask: Tensor | None) -> Tensor:
    """One encoder layer for the query at position 0 alone: a W-th of the feed-forward's work."""
    attention: Any = layer.attention.self
    heads = (*hidden_BWD.shape[:1], -1, attention.num_attention_heads, attention.attention_head_size)
    cls_B1D = hidden_BWD[:, :1]
    query_BH1K = attention.query(cls_B1D).view(heads).transpose(1, 2)
    key_BHWK = attention.key(hidden_BWD).view(heads).transpose(1, 2)
    value_BHWK = attention.value(hidden_BWD).view(heads).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    context, _ = attend(
        attention,
        query_BH1K,
        key_BHWK,
        value_BHWK,
        mask[:, :, :1] if mask is not None else None,
        dropout=attention.dropout.p if attention.training else 0.0,
        scaling=attention.scaling,
    )
    attended_B1D = layer.attention.output(context.reshape(cls_B1D.shape[0], 1, -1), cls_B1D)
    return layer.feed_forward_chunk(attended_B1D)[:, 0]


def use_rotary_positions(encoder: PreTrainedModel) -> None:
    """Give the encoder rotary positions in place of its learned ones, whose table is set to zero and frozen.

    Raises:
        ValueError: the encoder's attention does not go through transformers' attention interface.
    """
    if not _is_bert_shaped(encoder):
        raise ValueError(
            f"position_encoding 'rope' needs a BERT- or RoBERTa-shaped encoder, not {type(encoder).__name__}"
        )
    encoder.set_attn_implementation(ROTARY)
    positions = encoder.embeddings.position_embeddings.weight
    nn.init.zeros_(positions)
    positions.requires_grad_(False)


def _rotate(states_BHWK: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), halves rotated against each other."""
    length, size = states_BHWK.shape[-2:]
    device = states_BHWK.device
    frequency = ROTARY_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    first, second = states_BHWK.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (states_BHWK * angle.cos() + rotated * angle.sin()).to(states_BHWK.dtype)


def _rotary_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA over rotated queries and keys. A lone query is the one at position 0, which rotation leaves as it is."""
    return sdpa_attention_forward(module, _rotate(query), _rotate(key), value, attention_mask, **options)


AttentionInterface.register(ROTARY, _rotary_attention)
AttentionMaskInterface.register(ROTARY, sdpa_mask)
