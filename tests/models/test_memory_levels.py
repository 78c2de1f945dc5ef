"""What training computes again, by memory level: the same gradients from fewer activations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.models.conftest import LENGTHS, build, documents, gradients


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_memory_levels_give_the_same_gradients(encoder_config, carry, dropout):
    model = build(encoder_config, carry=carry, num_repeats=2, dropout=dropout).train()
    input_ids, mask = documents(LENGTHS)
    found = []
    for level in (0, 1, 2):
        model.config.memory_level = level
        torch.manual_seed(7)
        found.append(gradients(model, lambda: model(input_ids=input_ids, attention_mask=mask).logits))
    for name, expected in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("level", [1, 2])
def test_recomputation_leaves_the_random_numbers_alone_and_can_be_repeated(encoder_config, level):
    model = build(encoder_config, memory_level=level, dropout=0.2).train()
    input_ids, mask = documents(LENGTHS)
    loss = model(input_ids=input_ids, attention_mask=mask).logits.logsumexp(-1).sum()
    with torch.random.fork_rng(devices=[]):
        next_number = torch.rand(())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    once, again = (torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for _ in range(2))
    assert torch.rand(()) == next_number
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(second, first)


def test_memory_level_auto_goes_by_the_number_of_windows(encoder_config):
    model = build(encoder_config)
    assert [model.memory_level(n) for n in (1, 7, 8, 31, 32, 500)] == [0, 0, 1, 1, 2, 2]


def test_recomputation_keeps_fewer_activations(encoder_config):
    input_ids, mask = documents([[12] * 8])
    saved = {}
    for level in (0, 1, 2):
        model = build(encoder_config, memory_level=level).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        elements = 0

        def pack(tensor, weights=weights):
            nonlocal elements
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
                elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=input_ids, attention_mask=mask)
        saved[level] = elements
    assert saved[1] < saved[0] / 5
    assert saved[2] < saved[1] / 2


@pytest.mark.parametrize(("level", "chunks", "layers"), [(0, 1, 9), (1, 2 * 4, 9 + 8), (2, 2 * 8, 9 + 8 + 9)])
def test_what_is_computed_again(encoder_config, monkeypatch, level, chunks, layers):
    """Chunks, and first layers, of eight windows and their aggregation: at level 1 two windows at a time, at level 2
    one, whose layers come once more."""
    model = build(encoder_config, memory_level=level, aggregation="encoder").train()
    calls: Counter[str] = Counter()
    read_chunk = model._read_chunk
    monkeypatch.setattr(model, "_read_chunk", lambda *arguments: calls.update(["chunk"]) or read_chunk(*arguments))
    first = model.encoder.encoder.layer[0].intermediate
    first.register_forward_hook(lambda module, inputs, output: calls.update(["layer"]))
    model(*documents([[12] * 8])).logits.sum().backward()
    assert calls == {"chunk": chunks, "layer": layers}
