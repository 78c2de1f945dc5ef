"""The slow, obvious twin of `RecurrentRoBERTa.forward`: one document, one window, one whole encoder call at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.reberta import RecurrentRoBERTa
from tests.models.conftest import gradients


def twin_logits(model: RecurrentRoBERTa, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    rows = [
        _document(model, [(ids[m == 1]) for ids, m in zip(row, mask, strict=True) if m.any()])
        for row, mask in zip(input_ids, attention_mask, strict=True)
    ]
    return torch.stack(rows)


def assert_same_gradients(model: RecurrentRoBERTa, batch: dict[str, Tensor]) -> None:
    ours = gradients(model, lambda: model(**batch).logits)
    theirs = gradients(model, lambda: twin_logits(model, **batch))
    assert ours.keys() == theirs.keys()
    largest = max(1.0, *(float(gradient.abs().max()) for gradient in theirs.values()))
    for name in ours:
        torch.testing.assert_close(ours[name] / largest, theirs[name] / largest, atol=1e-5, rtol=1e-4, msg=name)


def _document(model: RecurrentRoBERTa, windows: list[Tensor]) -> Tensor:
    document = None
    for _ in range(model.config.num_repeats):
        states, memories = _states(model, windows, document)
        document = _aggregate(model, windows, states)
        if model.config.carry == "gru":
            document = document + model.carry_output(torch.cat([memories[-1], torch.stack(memories).mean(0)]))
    return model.classifier(torch.tanh(model.pooler(document)))


def _states(
    model: RecurrentRoBERTa, windows: list[Tensor], document: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    states: list[Tensor] = []
    memories: list[Tensor] = []
    memory = document if model.config.carry in ("gated", "gru") else None
    for i, window in enumerate(windows):
        if model.config.carry == "none":
            states.append(_pooled(model, model.encoder(input_ids=window[None])))
            continue
        embeds = model.encoder.get_input_embeddings()(window)
        cls = embeds[0]
        entering = memory if i > 0 else document
        if entering is not None:
            gate, norm = (model.window_gate, model.window_norm) if i > 0 else (model.global_gate, model.global_norm)
            injected = norm(entering)
            z = torch.sigmoid(gate(torch.cat([cls, injected])))
            cls = (1 - z) * cls + z * injected
            embeds = torch.cat([cls[None], embeds[1:]])
        state = _pooled(model, model.encoder(inputs_embeds=embeds[None]))
        if entering is not None and model.config.carry == "residual":
            state = model.config.alpha * state + (1 - model.config.alpha) * cls
        if model.config.carry == "gated" and memory is not None:
            keep = torch.sigmoid(model.carry_gate(torch.cat([state, memory])))
            memory = keep * memory + (1 - keep) * state
        elif model.config.carry == "gru":
            memory = _gru(model.carry_cell, state, torch.zeros_like(state) if memory is None else memory)
        else:
            memory = state
        states.append(state)
        memories.append(memory)
    return states, memories


def _pooled(model: RecurrentRoBERTa, output: Any) -> Tensor:
    [hidden] = output.last_hidden_state
    return hidden[0] if model.config.pooling == "cls" else hidden.mean(0)


def _gru(cell: nn.GRUCell, state: Tensor, memory: Tensor) -> Tensor:
    """As torch's documentation of GRUCell has it."""
    from_state = (cell.weight_ih @ state + cell.bias_ih).chunk(3)
    from_memory = (cell.weight_hh @ memory + cell.bias_hh).chunk(3)
    reset = torch.sigmoid(from_state[0] + from_memory[0])
    update = torch.sigmoid(from_state[1] + from_memory[1])
    candidate = torch.tanh(from_state[2] + reset * from_memory[2])
    return (1 - update) * candidate + update * memory


def _aggregate(model: RecurrentRoBERTa, windows: list[Tensor], states: list[Tensor]) -> Tensor:
    stacked = torch.stack(states)
    weights = torch.ones(len(windows))
    if model.config.window_weights == "tokens":
        weights = torch.tensor([float(len(window)) for window in windows])
    weights = weights / weights.sum()
    aggregation: Any = getattr(model, "aggregation", None)
    if model.config.aggregation == "mean":
        return weights @ stacked
    if model.config.aggregation == "max":
        return stacked.amax(0)
    if model.config.aggregation == "attention":
        scores = torch.tanh(aggregation.projection(stacked)) @ aggregation.query
        shares = weights * scores.softmax(0)
        return shares / shares.sum() @ stacked
    if model.config.aggregation == "transformer":
        return weights @ _small_transformer(aggregation, stacked)
    embed = model.encoder.get_input_embeddings()
    sequence = torch.cat([embed(windows[0][:1]), model.window_norm(stacked), embed(windows[0][-1:])])
    g = _pooled(model, model.encoder(inputs_embeds=sequence[None]))
    a = aggregation.alpha
    return a * g + (1 - a) * (weights @ stacked)


def _small_transformer(aggregation: Any, states: Tensor) -> Tensor:
    """Attention head by head, and what Vaswani et al. 2017 put around it, with the norms first."""
    windows, size = states.shape
    places = torch.zeros(windows, size)
    for i in range(windows):
        for j in range(0, size, 2):
            angle = i / 10_000 ** (j / size)
            places[i, j], places[i, j + 1] = math.sin(angle), math.cos(angle)
    hidden = states + places
    for layer in aggregation.layers:
        attention = layer.self_attn
        projected = layer.norm1(hidden) @ attention.in_proj_weight.T + attention.in_proj_bias
        heads = []
        for query, key, value in zip(
            *(part.chunk(attention.num_heads, -1) for part in projected.chunk(3, -1)), strict=True
        ):
            heads.append((query @ key.T / math.sqrt(query.shape[-1])).softmax(-1) @ value)
        hidden = hidden + attention.out_proj(torch.cat(heads, -1))
        hidden = hidden + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(hidden))))
    return hidden - places
