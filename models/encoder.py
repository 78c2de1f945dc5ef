"""The window encoder: a thin reader of a transformers encoder's own layers.

- `load_encoder`: an encoder by name, folder or config, without its pooler
- `max_window_size`: how many tokens a window may hold, read off the encoder's position table
- `token_lookup`: word embeddings, whose gradients are gathered in one table
- `pooled_output`: a vector for each of a batch of embedded windows: [CLS], where the last layer computes that row only,
  since nothing else of it is read, or the mean of its tokens; no attention mask where nothing is padded; layer-wise
  recomputation where asked
- `use_rotary_positions`: rotary positions
- attention by device and type, registered with transformers; dropout that draws four numbers at a time on a CPU;
  the linear layers of `models.linear`

Shapes: B documents, W tokens of a window, D hidden size, H heads, K size of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.bert.modeling_bert import eager_attention_forward

from .aggregation import masked_mean
from .gathered import gathered
from .linear import CastWeights, Linear, cast_weights_in_use, using

ATTENTION = "reberta"
ROTARY = "reberta_rotary"
ROTARY_BASE = 10_000.0
BERT_SHAPED = ("bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta")  # `model_type`
READS_PADDING = "canine", "convbert", "fnet", "mobilebert", "nystromformer", "yoso"  # whatever the mask says
# as BERT, DistilBERT and ModernBERT call them
HIDDEN_DROPOUT = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def load_encoder(
    encoder: str | Path | PreTrainedConfig,
    dropout: float,
    attention_dropout: float,
    pretrained: bool = True,
    layers: int | None = None,
) -> PreTrainedModel:
    """Load an encoder (name or folder: with its weights; config object: with random weights), without its pooler and,
    where `layers` is given, without the layers above so many.

    Nothing that a stranger's folder holds is run: weights are read from safetensors only, code never.

    Raises:
        OSError: the name or folder cannot be found (as transformers says it).
        ValueError: it needs code of its own, or its weights are not all there.
    """
    if isinstance(encoder, PreTrainedConfig):
        config = copy.deepcopy(encoder)
    else:
        config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    for names, p in (HIDDEN_DROPOUT, dropout), (ATTENTION_DROPOUT, attention_dropout):
        for name in names:
            if hasattr(config, name):
                setattr(config, name, p)
    options: dict[str, Any] = {"add_pooling_layer": False} if _has_pooler_option(config) else {}
    # some have no other attention than their own, which takes another kind of mask than SDPA does
    options["attn_implementation"] = ATTENTION if _class_of(config)._supports_sdpa else "eager"
    if pretrained and not isinstance(encoder, PreTrainedConfig):
        options |= {"use_safetensors": True, "trust_remote_code": False}
        model, found = AutoModel.from_pretrained(
            encoder, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
        if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
            raise ValueError(
                f"{encoder}: its weights lack {len(missing)} of this architecture's tensors, such as {missing[0]}, "
                "which would be random; give an encoder that was saved whole"
            )
    else:
        model = AutoModel.from_config(config, dtype=torch.get_default_dtype(), **options)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p))
        elif type(module) is nn.Linear:
            module.__class__ = Linear  # which computes the same, and differs in nothing else
    return model


def _has_pooler_option(config: PreTrainedConfig) -> bool:
    return "add_pooling_layer" in _class_of(config).__init__.__code__.co_varnames


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return AutoModel._model_mapping[type(config)]


def max_window_size(encoder: PreTrainedModel) -> int:
    """Tokens that the position table takes: 512 for BERT, and for RoBERTa, whose first pad_id + 1 rows are none."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return encoder.config.max_position_embeddings


def token_lookup(encoder: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A function from token ids [...] to their word embeddings [..., D], to be used for one forward pass.

    The gradients of all its lookups are gathered in one table [V, D]. A plain lookup fills such a table each time: on a
    CPU 21 ms instead of 0.1 for 512 tokens and MiniLM's vocabulary, a tenth of a training step in bf16.
    """
    embedding = encoder.get_input_embeddings()
    if type(embedding) is not nn.Embedding or not (torch.is_grad_enabled() and embedding.weight.requires_grad):
        return embedding
    table_VD, gradients = gathered(embedding.weight, embedding.weight.dtype)
    return lambda ids: _Lookup.apply(ids, table_VD, gradients)


class _Lookup(torch.autograd.Function):
    """Rows of the table."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.gradients = gradients
        ctx.shape = table_VD.shape
        return nn.functional.embedding(ids, table_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if not ctx.gradients:
            ctx.gradients.append(gradient.new_zeros(ctx.shape))
        ctx.gradients[0].index_put_((ids,), gradient, accumulate=True)
        return None, None, None


def pooled_output(
    encoder: PreTrainedModel,
    embeds_BWD: Tensor,
    mask_BW: Tensor | None,
    pooling: str,
    *,
    recompute_layers: bool = False,
) -> Tensor:
    """The encoder's last hidden states as one, [B, D], for embedded tokens [B, W, D].

    `pooling` is `cls`, position 0, or `mean`, of all tokens with [CLS] and [SEP] (Reimers and Gurevych 2019). `mask_BW`
    is None where nothing is padded. With `recompute_layers`, a layer's activations are computed again in the backward
    pass instead of being kept. Encoders that are not BERT-shaped are called whole.
    """
    if not is_bert_shaped(encoder):
        hidden_BWD = encoder(inputs_embeds=embeds_BWD, attention_mask=mask_BW).last_hidden_state
        return hidden_BWD[:, 0] if pooling == "cls" else _token_mean(hidden_BWD, mask_BW)
    batch = len(embeds_BWD)
    hidden_TD = encoder.embeddings(inputs_embeds=embeds_BWD).flatten(0, 1)
    mask = None
    if mask_BW is not None:
        # or a GPU would be waited for, to know whether anything is padded
        may_be_none = embeds_BWD.device.type == "cpu"
        mask = create_bidirectional_mask(encoder.config, embeds_BWD, mask_BW, allow_is_bidirectional_skip=may_be_none)
    *layers, last = encoder.encoder.layer
    for layer in layers if pooling == "cls" else [*layers, last]:
        arguments = layer, hidden_TD, batch, mask
        hidden_TD = recomputed(_read_layer, *arguments) if recompute_layers else _read_layer(*arguments)
    if pooling == "cls":
        return _read_layer(last, hidden_TD, batch, mask, cls_only=True)
    return _token_mean(hidden_TD.unflatten(0, (batch, -1)), mask_BW)


def _token_mean(hidden_BWD: Tensor, mask_BW: Tensor | None) -> Tensor:
    """In fp32."""
    return hidden_BWD.mean(1, dtype=torch.float32) if mask_BW is None else masked_mean(hidden_BWD.float(), mask_BW)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose activations are not kept but computed again in the backward pass.

    A call inside another keeps nothing but autograd's graph: the random state (5 KB) is an argument, so computed again
    too, where `checkpoint` would keep it. Comparing the two computations would take 50 KB a window (4 layers).
    """
    return checkpoint(
        _as_before,
        torch.get_rng_state(),
        cast_weights_in_use(),
        function,
        *arguments,
        use_reentrant=False,
        determinism_check="none",
        preserve_rng_state=torch.accelerator.is_available(),  # an accelerator's own
        context_fn=lambda: (nullcontext(), _RandomStateAsBefore()),
    )


def _as_before(state: Tensor, weights: CastWeights | None, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_rng_state(state)
    with using(weights):
        return function(*arguments)


class _RandomStateAsBefore:
    """Puts the random state back at the end. Unlike `fork_rng()` it can be entered again, by another backward pass."""

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
        del self.state


def is_bert_shaped(encoder: PreTrainedModel) -> bool:
    """Whether `_read_layer` computes what its layers do. Others that name their parts alike put norms elsewhere."""
    of_bert = encoder.config.model_type in BERT_SHAPED
    return of_bert and not hasattr(encoder, "embeddings_project")  # ELECTRA's, where they are narrower than states


def _read_layer(layer: Any, hidden_TD: Tensor, batch: int, mask: Tensor | None, cls_only: bool = False) -> Tensor:
    """One encoder layer over the B x W = T tokens of all windows, [T, D]; with `cls_only` at position 0 alone, [B, D].

    The same as calling the layer; kept flat, it leaves a tenth less of autograd's graph behind for every window.
    """
    attention: Any = layer.attention.self

    def heads(projection: nn.Module, tokens: Tensor) -> Tensor:
        sizes = batch, -1, attention.num_attention_heads, attention.attention_head_size
        return projection(tokens).view(sizes).transpose(1, 2)

    queried = hidden_TD.unflatten(0, (batch, -1))[:, 0] if cls_only else hidden_TD
    # cast once, not for each of the three
    device = hidden_TD.device.type
    tokens_TD = hidden_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_TD
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    context_BWHK, _ = attend(
        attention,
        heads(attention.query, queried if cls_only else tokens_TD),
        heads(attention.key, tokens_TD),
        heads(attention.value, tokens_TD),
        mask[:, :, :1] if cls_only and mask is not None else mask,
        dropout=attention.dropout.p if attention.training else 0.0,
        scaling=attention.scaling,
    )
    attended = layer.attention.output(context_BWHK.reshape(queried.shape), queried)
    first = layer.intermediate
    with_gelu = type(first.dense) is Linear and type(first.intermediate_act_fn) is GELUActivation
    if with_gelu and not torch.is_grad_enabled():
        return layer.output(first.dense.followed_by_gelu(attended), attended)
    return layer.feed_forward_chunk(attended)


def use_rotary_positions(encoder: PreTrainedModel) -> None:
    """Give a BERT-shaped encoder rotary positions in place of its learned ones, whose table is zeroed and frozen."""
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


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA; to train in bf16 on a CPU two products and a softmax, 1.9 to 2.7 times as fast at W of 128 to 512."""
    more = options.get("position_bias") is not None or options.get("is_causal")
    trains_in_bf16 = query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if more or query.device.type != "cpu" or not trains_in_bf16:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    # scaled within the product: a pass over all scores less, in the gradient too
    queries, keys = query.flatten(0, 1), key.flatten(0, 1)
    scores = torch.baddbmm(query.new_empty(1, 1, 1), queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    scores_BHWW = scores.unflatten(0, query.shape[:2])
    if attention_mask is not None:
        # not by -inf: padding far behind a short text sees nothing in ModernBERT's local attention, and would be NaN
        scores_BHWW = scores_BHWW.masked_fill(~attention_mask, torch.finfo(scores_BHWW.dtype).min)
    weights_BHWW = nn.functional.dropout(scores_BHWW.softmax(-1), dropout)
    return (weights_BHWW @ value).transpose(1, 2), None


def _rotary_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Over rotated queries and keys. A lone query is the one at position 0, which rotation leaves as it is."""
    return _attention(module, _rotate(query), _rotate(key), value, attention_mask, **options)


class Dropout(nn.Dropout):
    """Dropout that on a CPU cuts each 64-bit random number into four of 16 bits: 0.35 of nn.Dropout's time.

    `p` is thereby rounded to a multiple of 2**-16, and the scale is that of the rounded one.
    """

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0 or values.device.type != "cpu":
            return super().forward(values)
        dropped = round(self.p * 2**16)
        numbers = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.int16)[: values.numel()].view(values.shape) >= dropped - 2**15
        return torch.addcmul(values.new_zeros(()), values, kept, value=2**16 / (2**16 - dropped))


for _name, _function in ((ATTENTION, _attention), (ROTARY, _rotary_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
