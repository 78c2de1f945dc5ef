"""A window whose state is not finite: left out, reported, and without a trace in the gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.models.conftest import build, documents

POISON = 9


@pytest.fixture(params=["gru", "gated", "residual"])
def poisoned(request, encoder_config):
    """A model that overflows wherever token 9 stands."""
    model = build(encoder_config, carry=request.param, num_repeats=2)
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[POISON] = torch.inf
    return model


def _documents(lengths):
    input_ids, mask = documents(lengths)
    return input_ids.where(input_ids != POISON, POISON + 1), mask


def test_the_document_goes_on_with_its_previous_state(poisoned):
    input_ids, mask = _documents([[12, 12, 12, 12], [12, 9]])
    input_ids[0, 2, 5] = POISON
    logits, hidden = poisoned(input_ids=input_ids, attention_mask=mask)
    assert hidden.window_failures.nonzero().tolist() == [[0, 2]]
    assert torch.equal(hidden.window_states[0, 2], hidden.window_states[0, 1])
    assert logits.isfinite().all()
    healthy = poisoned(input_ids=input_ids[1:], attention_mask=mask[1:]).logits
    torch.testing.assert_close(logits[1:], healthy, atol=1e-5, rtol=0)


def test_a_first_window_that_fails_does_not_exist(poisoned):
    input_ids, mask = _documents([[12, 12, 12]])
    expected = poisoned(input_ids=input_ids[:, 1:], attention_mask=mask[:, 1:]).logits
    input_ids[0, 0, 5] = POISON
    logits, hidden = poisoned(input_ids=input_ids, attention_mask=mask)
    assert hidden.window_failures.tolist() == [[True, False, False]]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_document_of_which_nothing_can_be_read_has_no_logits(poisoned):
    input_ids, mask = _documents([[12, 12], [12, 12]])
    input_ids[0, :, 5] = POISON
    logits, hidden = poisoned(input_ids=input_ids, attention_mask=mask)
    assert hidden.window_failures.tolist() == [[True, True], [False, False]]
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


def test_a_window_that_fails_in_the_second_reading_alone_is_reported_too(encoder_config, monkeypatch):
    model = build(encoder_config, carry="gated")
    input_ids, mask = documents([[12, 12, 12, 12]])
    whole = model._classify
    fails = iter([[1], [2], []])

    def classify(input_ids, attention_mask, skip_BN):
        skip_BN = skip_BN.clone()
        skip_BN[0, next(fails)] = True  # as if dropout had made their states overflow
        return whole(input_ids, attention_mask, skip_BN)

    monkeypatch.setattr(model, "_classify", classify)
    hidden = model(input_ids=input_ids, attention_mask=mask).hidden_states
    assert hidden.window_failures.tolist() == [[False, True, True, False]]
    assert next(fails, None) is None
    assert torch.equal(hidden.window_states[0, 2], hidden.window_states[0, 0])


def test_a_window_that_fails_in_the_first_of_two_repeats_is_left_out(encoder_config, monkeypatch):
    model = build(encoder_config, carry="gated", num_repeats=2)
    whole = model._encode
    calls = itertools.count()

    def encode(*arguments):
        return whole(*arguments) * (torch.nan if next(calls) == 1 else 1)

    monkeypatch.setattr(model, "_encode", encode)
    hidden = model(*documents([[12, 12, 12]])).hidden_states
    assert hidden.window_failures.tolist() == [[False, True, False]]
    assert torch.equal(hidden.window_states[0, 1], hidden.window_states[0, 0])


def test_gradients_stay_finite(poisoned):
    input_ids, mask = _documents([[12, 12, 12, 12], [12, 9]])
    input_ids[0, 0, 5] = input_ids[0, 2, 5] = POISON
    poisoned.train()
    poisoned(input_ids=input_ids, attention_mask=mask).logits.sum().backward()
    gradients = {name: p.grad for name, p in poisoned.named_parameters() if p.grad is not None}
    assert len(gradients) > 30
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
