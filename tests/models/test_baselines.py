"""The model without its recurrence, which is what it is compared with."""

from __future__ import annotations

import pytest
import torch
from transformers import AlbertConfig, DistilBertConfig

from models.registry import freeze_except_last
from tests.conftest import PAD, SHAPE, VOCABULARY, WIDTH
from tests.models.conftest import LENGTHS, build, documents, gradients
from tests.models.twin import twin_logits
from utils import ConfigError

POISON = 9
AGGREGATIONS = ["encoder", "transformer", "attention", "mean", "max"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_windows_on_their_own_equal_the_slow_twin(encoder_config, aggregation):
    model = build(encoder_config, carry="none", aggregation=aggregation, window_weights="equal")
    input_ids, mask = documents(LENGTHS)
    ours, theirs = (lambda: model(input_ids, mask).logits), (lambda: twin_logits(model, input_ids, mask))
    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=0)
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name in ours:
        tolerance = 1e-5 * max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0, msg=name)


def test_a_windows_state_is_that_of_the_window_alone(encoder_config):
    model = build(encoder_config, carry="none", aggregation="mean")
    input_ids, mask = documents(LENGTHS)
    hidden = model(input_ids, mask).hidden_states
    for row, lengths in enumerate(LENGTHS):
        for i in range(len(lengths)):
            alone = model(input_ids[row : row + 1, i : i + 1], mask[row : row + 1, i : i + 1]).hidden_states
            torch.testing.assert_close(hidden.window_states[row, i], alone.document_state[0], atol=1e-5, rtol=0)
    assert hidden.window_gates.abs().sum() == hidden.global_gates.abs().sum() == 0
    fresh = {name.split(".")[0] for name, _ in model.named_parameters()} - {"encoder"}
    assert fresh == {"pooler", "classifier"}


@pytest.mark.parametrize("level", [0, 2])
def test_a_window_that_fails_has_the_state_before_it_and_touches_no_other(encoder_config, level):
    model = build(encoder_config, carry="none", aggregation="max", memory_level=level)
    input_ids, mask = documents([[12, 12, 12, 12], [12, 9]])
    input_ids[input_ids == POISON] += 1
    healthy = model(input_ids, mask).hidden_states.window_states
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[POISON] = torch.inf
    input_ids[0, 1, 5] = POISON
    logits, hidden = model.train()(input_ids, mask)
    assert hidden.window_failures.nonzero().tolist() == [[0, 1]]
    assert torch.equal(hidden.window_states[0, 1], hidden.window_states[0, 0])
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(hidden.window_states[0, others], healthy[0, others], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.window_states[1], healthy[1], atol=1e-5, rtol=0)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_logits_do_not_depend_on_batch_padding_or_order(encoder_config, aggregation):
    model = build(encoder_config, carry="none", aggregation=aggregation)
    input_ids, mask = documents(LENGTHS)
    together = model(input_ids, mask).logits
    for row, lengths in enumerate(LENGTHS):
        windows, width = len(lengths), max(lengths)
        cut = (slice(row, row + 1), slice(windows), slice(width))
        torch.testing.assert_close(model(input_ids[cut], mask[cut]).logits[0], together[row], atol=1e-5, rtol=0)
    order, absent = [2, 0, 3, 1], torch.zeros(4, 3, 12, dtype=torch.long)
    shuffled = model(torch.cat([input_ids[order], absent], dim=1), torch.cat([mask[order], absent], dim=1)).logits
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregation", ["mean", "transformer"])
def test_memory_levels_give_the_same_gradients(encoder_config, aggregation):
    model = build(encoder_config, carry="none", aggregation=aggregation, dropout=0.2).train()
    input_ids, mask = documents(LENGTHS)
    found = []
    for level in (0, 1, 2):
        model.config.memory_level = level
        torch.manual_seed(7)
        found.append(gradients(model, lambda: model(input_ids, mask).logits))
    for name, expected in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_the_small_transformer_tells_the_order_of_windows(encoder_config):
    model = build(encoder_config, carry="none", aggregation="transformer")
    input_ids, mask = documents([[12, 12, 12]])
    backwards = model(input_ids.flip(1), mask).logits
    assert (backwards - model(input_ids, mask).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("layers", "trained"), [(0, 0), (1, 16), (2, 32)])
@pytest.mark.parametrize(("carry", "aggregation"), [("gru", "encoder"), ("gated", "encoder"), ("none", "mean")])
def test_frozen_layers_get_no_gradient_and_the_others_the_right_one(
    encoder_config, carry, aggregation, layers, trained
):
    model = build(encoder_config, carry=carry, aggregation=aggregation, dropout=0.2).train()
    input_ids, mask = documents(LENGTHS)

    def forward():
        torch.manual_seed(7)
        return model(input_ids, mask).logits

    expected = gradients(model, forward)
    freeze_except_last(model.encoder, layers)
    for level in (0, 1, 2):
        model.config.memory_level = level
        found = gradients(model, forward)
        in_encoder = {name for name in found if name.startswith("encoder.")}
        assert len(in_encoder) == trained
        assert all(f".layer.{2 - layers}." in name or f".layer.{1}." in name for name in in_encoder)
        assert found.keys() - in_encoder == {name for name in expected if not name.startswith("encoder.")}
        for name, gradient in found.items():
            tolerance = 1e-5 * max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=0, msg=name)


def test_no_more_layers_are_spared_than_there_are(encoder_config):
    with pytest.raises(ConfigError, match="--freeze_except_last 3: the encoder has 2 layers"):
        freeze_except_last(build(encoder_config).encoder, 3)


def test_layers_of_an_encoder_of_another_shape_are_found():
    encoder = DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64)
    model = build(encoder)
    freeze_except_last(model.encoder, 1)
    names = {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
    assert len(names) == 16
    assert all(name.startswith("transformer.layer.1.") for name in names)


def test_layers_that_share_their_weights_are_frozen_together():
    encoder = build(AlbertConfig(**SHAPE, embedding_size=8, pad_token_id=PAD)).encoder
    with pytest.raises(ConfigError, match="--freeze_except_last 1: this encoder's layers share their weights"):
        freeze_except_last(encoder, 1)
    freeze_except_last(encoder, 0)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
