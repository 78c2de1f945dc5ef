"""ReBerta: Recurrent enhanced RoBERTa, a classifier for documents far longer than its encoder's 512 tokens.

- windows in the encoder's own format, read in order; each document on its own
- a gated [CLS]: what was read enters the next window through its [CLS] word embedding
- `carry`: a recurrent cell (`gru`), a memory that keeps (`gated`), the last state itself (`residual`), or nothing
- the window states are aggregated by the same encoder, a small Transformer, attention, mean or max
- `num_repeats`: the document is read again with what is then known of it
- memory levels: activations are kept, or computed again in the backward pass
- a window whose state is not finite is replaced by the one before it and reported, never skipped in silence

A document's logits do not depend on its batch mates, on padding or on absent windows.

Shapes: B documents, b documents that still have a window, N windows, W tokens of a window, D hidden size, C classes,
R repeats. Documents are sorted by their number of windows, so that those with a window i are the first b rows.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init

from .aggregation import (
    ADDED,
    AttentionAggregation,
    EncoderAggregation,
    TransformerAggregation,
    masked_max,
    masked_mean,
)
from .batch import Batch, plan_batch
from .cell import MemoryCell
from .configuration import ReBertaConfig
from .encoder import (
    Dropout,
    load_encoder,
    max_window_size,
    pooled_output,
    recomputed,
    token_lookup,
    use_rotary_positions,
)
from .linear import cast_weights, using
from .output import INITIALIZER_RANGE, HiddenStates, ReBertaOutput

try:  # as in `configuration`
    if __package__ != "models":
        raise ImportError
    from pretrained import find_encoder
    from utils import ConfigError
except ImportError:
    ConfigError, find_encoder = ValueError, str  # type: ignore[misc, assignment]

KEEP_BIAS = 2.2  # sigmoid(2.2) = 0.9: what a fresh gated memory keeps at each window


def _norm_of_states(size: int, width: int) -> nn.Module:
    """What makes states look like word embeddings, which a few encoders have narrower than their states."""
    norm = nn.LayerNorm(width)
    return norm if width == size else nn.Sequential(nn.Linear(size, width), norm)


class RecurrentRoBERTa(PreTrainedModel):
    """Windows, gates, aggregation, repeats and head.

    Args:
        config: as saved by `save_pretrained`; the encoder then has random weights until a state is loaded.
        num_classes: classes to tell apart, with one of the following in place of `config`.
        encoder: a folder or name (with its pretrained weights; a name is looked for below models/pretrained, then on
            the hub) or a transformers config object (random weights).
        options: fields of `ReBertaConfig`.

    Raises:
        ConfigError: a window longer than the encoder's positions, and whatever else `ReBertaConfig.check` finds.
        OSError: the encoder cannot be found.
    """

    config_class = ReBertaConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    # all but the encoder, when loaded with a dtype of 16 bits
    _keep_in_fp32_modules_strict = (
        *("window_norm", "window_gate", "carry_gate", "carry_cell", "carry_output", "global_norm", "global_gate"),
        *("aggregation", "pooler", "classifier"),
    )

    def __init__(
        self,
        config: ReBertaConfig | None = None,
        *,
        num_classes: int | None = None,
        encoder: str | Path | PreTrainedConfig = "roberta-base",
        **options: Any,
    ) -> None:
        pretrained = config is None
        if config is None:
            if num_classes is not None:
                options["num_labels"] = num_classes
            source = encoder if isinstance(encoder, PreTrainedConfig) else find_encoder(encoder)
            if not isinstance(source, PreTrainedConfig) and "cls_token_id" not in options:
                options["cls_token_id"] = AutoTokenizer.from_pretrained(source, trust_remote_code=False).cls_token_id
            config = ReBertaConfig(**options)
        else:
            source = config.encoder_config
        window_encoder = load_encoder(
            source, config.dropout, config.attention_dropout, pretrained, config.encoder_layers
        )
        config.encoder_config = window_encoder.config
        config.check(window_encoder)
        super().__init__(config)
        self.positions = max_window_size(window_encoder)
        size, width = window_encoder.config.hidden_size, window_encoder.get_input_embeddings().embedding_dim
        self.encoder = window_encoder
        if config.position_encoding == "rope":
            use_rotary_positions(self.encoder)
        if config.carry != "none" or config.aggregation == "encoder":
            self.window_norm = _norm_of_states(size, width)
        if config.carry != "none":
            self.window_gate = nn.Linear(2 * width, width)
        if config.carry == "gated":
            self.carry_gate = nn.Linear(2 * size, size)
        elif config.carry == "gru":
            self.carry_cell = MemoryCell(size, size)
            self.carry_output = nn.Linear(2 * size, size)
        if config.num_repeats > 1:
            self.global_norm = _norm_of_states(size, width)
            self.global_gate = nn.Linear(2 * width, width)
        if config.aggregation == "encoder":
            self.aggregation: nn.Module = EncoderAggregation(config.global_alpha)
        elif config.aggregation == "attention":
            self.aggregation = AttentionAggregation(size)
        elif config.aggregation == "transformer":
            self.aggregation = TransformerAggregation(size, window_encoder.config.num_attention_heads, config.dropout)
        self.pooler = nn.Linear(size, size)
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(size, config.num_labels)
        if pretrained:
            for module in self.encoder.modules():
                module._is_hf_initialized = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All start values of what the encoder does not bring; loaded weights are left alone."""
        name = next(name for name, child in self.named_modules() if child is module)
        if isinstance(module, nn.LayerNorm) and name.startswith(("window_norm", "global_norm")):
            init.constant_(module.weight, self._cls_embedding_scale())
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            biases = {
                "window_gate": self.config.gate_bias,
                "global_gate": self.config.gate_bias,
                "carry_gate": KEEP_BIAS,
            }
            # at first neither memory nor Transformer say anything: the document's state is the mean of its windows
            silent = name == "carry_output" or (name.startswith("aggregation.") and name.endswith(ADDED))
            init.normal_(module.weight, std=0.0 if silent else INITIALIZER_RANGE)
            init.constant_(module.bias, biases.get(name, 0.0))
        elif isinstance(module, nn.GRUCell):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, (EncoderAggregation, AttentionAggregation)):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)

    def _cls_embedding_scale(self) -> float:
        embeddings = self.encoder.get_input_embeddings().weight
        token = self.config.cls_token_id
        return float((embeddings if token is None else embeddings[token]).float().std())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ReBertaOutput:
        """Classify documents.

        Args:
            input_ids: [B, N, W], each window [CLS] ... [SEP] padded on the right.
            attention_mask: [B, N, W], 1 for tokens; a window whose mask is all zero does not exist.

        Raises:
            ValueError: a document without any window.
            ConfigError: more tokens in a window, or more windows, than the encoder takes.
        """
        if attention_mask.shape[-1] > self.positions:
            raise ConfigError(f"windows of {attention_mask.shape[-1]} tokens; this encoder takes {self.positions}")
        failed_BN = torch.zeros_like(attention_mask[:, :, 0], dtype=torch.bool)
        output = self._classify(input_ids, attention_mask, failed_BN)
        # Read again without them: though its state is replaced, a failed window would send NaN gradients back. With
        # dropout, others may fail in the second reading.
        while (output.hidden_states.window_failures & ~failed_BN).any():
            failed_BN = output.hidden_states.window_failures
            exists_BN = attention_mask.any(-1)
            first_read_BN = (exists_BN & ~failed_BN).cumsum(1) > 0
            unreadable_B1 = ~first_read_BN.any(1, keepdim=True)
            readable_BN1 = (first_read_BN | unreadable_B1).unsqueeze(-1)
            logits, hidden = self._classify(input_ids, attention_mask * readable_BN1, failed_BN)
            hidden = hidden._replace(window_failures=failed_BN | hidden.window_failures)
            output = ReBertaOutput(logits.masked_fill(unreadable_B1, torch.nan), hidden)
        return output

    def _classify(self, input_ids: Tensor, attention_mask: Tensor, skip_BN: Tensor) -> ReBertaOutput:
        batch = plan_batch(token_lookup(self.encoder), input_ids, attention_mask.bool(), skip_BN)
        read_BN = weights_BN = batch.exists[:, : len(batch.alive)]
        if self.config.window_weights == "tokens":
            weights_BN = batch.attention_mask[:, : len(batch.alive)].sum(-1)
        weights = cast_weights(self.encoder)
        document_BD: Tensor | None = None
        window_gates, global_gates, failures = [], [], []
        for _ in range(self.config.num_repeats):
            with using(weights):
                states_BND, gates_BN, failed_BN, entered_B, memory_BND = self._read_windows(batch, document_BD)
            document_BD = self._aggregate(batch, states_BND, weights_BN)
            document_BD = self._with_memory(document_BD, memory_BND, read_BN)
            window_gates.append(gates_BN)
            global_gates.append(entered_B)
            failures.append(failed_BN)
        assert document_BD is not None
        window_states_BND = batch.windows_as_given(states_BND)
        hidden_states = HiddenStates(
            window_states=window_states_BND,
            window_weights=batch.windows_as_given(weights_BN),
            document_state=document_BD[batch.place],
            window_gates=torch.stack(list(map(batch.windows_as_given, window_gates))),
            global_gates=torch.stack([entered_B[batch.place] for entered_B in global_gates]),
            window_failures=batch.windows_as_given(torch.stack(failures).any(0)),
            window_logits=self._head(window_states_BND) if self.config.window_loss and self.training else None,
        )
        return ReBertaOutput(self._head(document_BD)[batch.place], hidden_states)

    def _read_windows(
        self, batch: Batch, document_BD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """One pass over the windows: states [B, N, D], gates [B, N], failures [B, N], the global gate [B], and
        gru's memory after each window [B, N, D]."""
        windows = len(batch.alive)
        level = self.memory_level(windows) if torch.is_grad_enabled() else None
        stride = {None: 1, 0: windows, 1: 2, 2: 1}[level]
        carried = document_BD if self.config.carry in ("gated", "gru") else None
        previous: Tensor | None = None
        states: list[Tensor] = []
        gates: list[Tensor] = []
        failed: list[Tensor] = []
        memories: list[Tensor] = []
        for start in range(0, windows, stride):
            chunk = range(start, min(start + stride, windows))
            arguments = (batch, chunk, carried, previous, document_BD, level == 2)
            chunk_states, chunk_gates, chunk_failed, chunk_memories, carried = (
                recomputed(self._read_chunk, *arguments) if level else self._read_chunk(*arguments)
            )
            previous = chunk_states[-1]
            states += chunk_states
            gates += chunk_gates
            failed += chunk_failed
            memories += chunk_memories
        # where no document ends early, pad_sequence would leave 2 KB of autograd's graph a window
        stack = partial(torch.stack, dim=1) if batch.alive[-1] == batch.alive[0] else pad_sequence
        states_BND, memory_BND = stack(states), stack(memories) if memories else None
        gates_BN, failed_BN = pad_sequence(gates), pad_sequence(failed)
        entered_B = gates_BN[:, 0]
        gates_BN = torch.cat([torch.zeros_like(gates_BN[:, :1]), gates_BN[:, 1:]], dim=1)
        return states_BND, gates_BN, failed_BN, entered_B, memory_BND

    def _read_chunk(
        self,
        batch: Batch,
        chunk: range,
        carried: Tensor | None,
        previous: Tensor | None,
        document_BD: Tensor | None,
        recompute_layers: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
        """The windows of `chunk` in order: their states, gates, failures and gru's memory after each, and what is
        carried on."""
        states, gates, failed, memories = [], [], [], []
        for i in chunk:
            b, width = batch.alive[i], batch.widths[i]
            embeds_bWD = batch.embed(batch.input_ids[:b, i, :width])
            mask_bW = batch.attention_mask[:b, i, :width].long() if batch.padded[i] else None
            cls_bD = embeds_bWD[:, 0].float()
            if previous is not None and b < len(previous):  # others have ended
                previous = previous[:b]
                carried = None if carried is None else carried[:b]
            if i > 0 and carried is not None:
                fused_bD, gate_b = self._let_in(cls_bD, carried, self.window_norm, self.window_gate)
            elif document_BD is not None:
                fused_bD, gate_b = self._let_in(cls_bD, document_BD, self.global_norm, self.global_gate)
            else:
                fused_bD, gate_b = cls_bD, torch.zeros_like(cls_bD[:, 0])
            embeds_bWD = embeds_bWD.select_scatter(fused_bD.to(embeds_bWD.dtype), dim=1, index=0)
            state_bD = self._encode(embeds_bWD, mask_bW, recompute_layers).float()
            if carried is not None or document_BD is not None:
                state_bD = self._blend(state_bD, fused_bD)
            finite_b = state_bD.isfinite().all(-1) & ~batch.skip[:b, i]
            fallback_bD = previous if previous is not None else torch.zeros_like(state_bD)
            state_bD = torch.where(finite_b.unsqueeze(-1), state_bD, fallback_bD)
            carried = self._carry_on(carried, state_bD)
            if carried is not None and self.config.carry == "gru":
                memories.append(carried)
            previous = state_bD
            states.append(state_bD)
            gates.append(gate_b.detach())
            failed.append(~finite_b)
        return states, gates, failed, memories, carried

    def _encode(self, embeds_bLD: Tensor, mask_bL: Tensor | None, recompute_layers: bool = False) -> Tensor:
        """h [b, D] of windows, or g of sequences of their states."""
        return pooled_output(self.encoder, embeds_bLD, mask_bL, self.config.pooling, recompute_layers=recompute_layers)

    def _let_in(self, cls_bD: Tensor, carried_bD: Tensor, norm: nn.Module, gate: nn.Module) -> tuple[Tensor, Tensor]:
        """p = norm(s); z = sigmoid(gate([c ; p])); fused = (1 - z) c + z p. Returns fused [b, D] and mean z [b]."""
        with torch.autocast(cls_bD.device.type, enabled=False):
            injected_bD = norm(carried_bD)
            z_bD = torch.sigmoid(gate(torch.cat([cls_bD, injected_bD], dim=-1)))
            return torch.lerp(cls_bD, injected_bD, z_bD), z_bD.mean(-1)

    def _blend(self, output_bD: Tensor, fused_bD: Tensor) -> Tensor:
        """residual: s(i) = alpha h + (1 - alpha) fused. Else s(i) = h: a memory is its own residual."""
        if self.config.carry != "residual":
            return output_bD
        return torch.lerp(fused_bD, output_bD, self.config.alpha)

    def _carry_on(self, carried_bD: Tensor | None, state_bD: Tensor) -> Tensor | None:
        """residual: s(i). gated: m(i) = k m(i-1) + (1 - k) s(i), k = sigmoid(carry_gate([s(i) ; m(i-1)])). gru: a GRU
        cell (Cho et al. 2014) of s(i) and m(i-1)."""
        if self.config.carry == "none":
            return None
        if self.config.carry == "gru":
            with torch.autocast(state_bD.device.type, enabled=False):
                return self.carry_cell(state_bD, carried_bD)
        if carried_bD is None or self.config.carry == "residual":
            return state_bD
        with torch.autocast(state_bD.device.type, enabled=False):
            keep_bD = torch.sigmoid(self.carry_gate(torch.cat([state_bD, carried_bD], dim=-1)))
            return torch.lerp(state_bD, carried_bD, keep_bD)

    def _aggregate(self, batch: Batch, states_BND: Tensor, weights_BN: Tensor) -> Tensor:
        """Document states [B, D], in fp32 under autocast."""
        with torch.autocast(states_BND.device.type, enabled=False):
            if self.config.aggregation == "mean":
                return masked_mean(states_BND, weights_BN)
            if self.config.aggregation == "max":
                return masked_max(states_BND, weights_BN > 0)
            if self.config.aggregation in ("attention", "transformer"):
                return self.aggregation(states_BND, weights_BN)
            if states_BND.shape[1] > self.positions - 2:
                raise ConfigError(
                    f"{states_BND.shape[1]} windows; aggregation by this encoder takes at most {self.positions - 2}: "
                    "use another aggregation or fewer windows"
                )
            first_ids = batch.input_ids[:, 0]
            last_token_B = batch.attention_mask[:, 0].sum(1, keepdim=True) - 1
            cls_B1D = batch.embed(first_ids[:, :1])
            sep_B1D = batch.embed(first_ids.gather(1, last_token_B))
            recompute = torch.is_grad_enabled() and self.memory_level(len(batch.alive)) == 2
            return self.aggregation(
                states_BND,
                self.window_norm(states_BND),
                weights_BN,
                cls_B1D,
                sep_B1D,
                lambda embeds, mask: self._encode(embeds.to(cls_B1D.dtype), mask, recompute),
            )

    def _with_memory(self, document_BD: Tensor, memory_BND: Tensor | None, exists_BN: Tensor) -> Tensor:
        """gru: the memory at the document's end, and its mean on the way, are part of the document's state."""
        if memory_BND is None:
            return document_BD
        with torch.autocast(document_BD.device.type, enabled=False):
            documents = torch.arange(len(exists_BN), device=exists_BN.device)
            end_BD = memory_BND[documents, exists_BN.sum(1) - 1]
            return document_BD + self.carry_output(torch.cat([end_BD, masked_mean(memory_BND, exists_BN)], dim=-1))

    def _head(self, document_BD: Tensor) -> Tensor:
        pooled_BD = torch.tanh(self.pooler(document_BD))
        return self.classifier(self.dropout(pooled_BD))

    def check(self) -> None:
        """Raises ConfigError where the configuration reads a document in a way that the encoder cannot."""
        self.config.check(self.encoder)

    def memory_level(self, windows: int) -> int:
        """The configured level, or by the number of windows: 0 below 8, 1 below 32, then 2."""
        if self.config.memory_level != "auto":
            return int(self.config.memory_level)
        return 0 if windows < 8 else 1 if windows < 32 else 2


AutoConfig.register(ReBertaConfig.model_type, ReBertaConfig, exist_ok=True)
AutoModelForSequenceClassification.register(ReBertaConfig, RecurrentRoBERTa, exist_ok=True)
ReBertaConfig.register_for_auto_class()
RecurrentRoBERTa.register_for_auto_class("AutoModelForSequenceClassification")
