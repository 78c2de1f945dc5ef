"""The model's promises, with numbers, for a RoBERTa-shaped and a BERT-shaped encoder: against a slow twin, its
invariances, what is carried, start values, gates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from models.output import HiddenStates
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, VOCABULARY, WIDTH
from tests.models.conftest import LENGTHS, build, documents, gradients
from tests.models.twin import assert_same_gradients, twin_logits


@pytest.mark.parametrize("num_repeats", [1, 2])
@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
@pytest.mark.parametrize("aggregation", ["encoder", "transformer", "attention", "mean", "max"])
def test_equals_the_slow_twin(encoder_config, carry, aggregation, num_repeats):
    model = build(encoder_config, carry=carry, aggregation=aggregation, num_repeats=num_repeats)
    input_ids, mask = documents(LENGTHS)
    logits, _ = model(input_ids=input_ids, attention_mask=mask)
    torch.testing.assert_close(logits, twin_logits(model, input_ids, mask), atol=1e-5, rtol=0)
    assert logits.std() > 0.05


@pytest.mark.parametrize("num_repeats", [1, 2])
@pytest.mark.parametrize("aggregation", ["encoder", "transformer", "attention", "mean"])
def test_however_windows_are_weighed_the_slow_twin_agrees(encoder_config, aggregation, num_repeats):
    """Logits and gradients."""
    batch = dict(zip(("input_ids", "attention_mask"), documents(LENGTHS), strict=True))
    model = build(encoder_config, aggregation=aggregation, num_repeats=num_repeats)
    logits = []
    for window_weights in ("tokens", "equal"):
        model.config.window_weights = window_weights
        output = model(**batch)
        tokens_BN = batch["attention_mask"].sum(-1)
        counted_BN = tokens_BN if window_weights == "tokens" else tokens_BN > 0
        assert output.hidden_states.window_weights.tolist() == counted_BN.tolist()
        logits.append(output.logits)
        torch.testing.assert_close(logits[-1], twin_logits(model, **batch), atol=1e-5, rtol=0)
        assert_same_gradients(model, batch)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_short_window_weighs_as_little_as_it_is_long(encoder_config):
    model = build(encoder_config, carry="none", aggregation="mean")
    hidden = model(*documents([[12, 4]])).hidden_states
    first, last = hidden.window_states[0]
    torch.testing.assert_close(hidden.document_state[0], (12 * first + 4 * last) / 16, atol=1e-6, rtol=0)


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_gradients_equal_the_slow_twins(encoder_config, carry):
    model = build(encoder_config, carry=carry, num_repeats=2)
    assert_same_gradients(model, dict(zip(("input_ids", "attention_mask"), documents(LENGTHS), strict=True)))


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_logits_do_not_depend_on_batch_padding_or_order(encoder_config, carry):
    model = build(encoder_config, carry=carry, num_repeats=2)
    input_ids, mask = documents(LENGTHS)
    together, hidden = model(input_ids=input_ids, attention_mask=mask)
    for row, lengths in enumerate(LENGTHS):
        windows, width = len(lengths), max(lengths)
        alone, own = model(
            input_ids=input_ids[row : row + 1, :windows, :width], attention_mask=mask[row : row + 1, :windows, :width]
        )
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(own.document_state[0], hidden.document_state[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(own.window_gates[:, 0], hidden.window_gates[:, row, :windows], atol=1e-5, rtol=0)
        torch.testing.assert_close(own.global_gates[:, 0], hidden.global_gates[:, row], atol=1e-5, rtol=0)
    order = [2, 0, 3, 1]
    absent = torch.zeros(4, 3, 12, dtype=torch.long)
    shuffled = model(
        input_ids=torch.cat([input_ids[order], absent], dim=1), attention_mask=torch.cat([mask[order], absent], dim=1)
    )
    torch.testing.assert_close(shuffled.logits, together[order], atol=1e-5, rtol=0)


def test_absent_windows_may_stand_anywhere(encoder_config):
    model = build(encoder_config)
    input_ids, mask = documents([[12, 12, 12]])
    expected = model(input_ids=input_ids, attention_mask=mask)
    gap = torch.zeros(1, 1, 12, dtype=torch.long)
    got = model(
        input_ids=torch.cat([gap, input_ids[:, :1], gap, input_ids[:, 1:]], dim=1),
        attention_mask=torch.cat([gap, mask[:, :1], gap, mask[:, 1:]], dim=1),
    )
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        got.hidden_states.window_states[:, [1, 3, 4]], expected.hidden_states.window_states, atol=1e-5, rtol=0
    )
    assert got.hidden_states.window_states[:, [0, 2]].abs().sum() == 0


def test_one_window_equals_transformers_own_cls(encoder_config):
    model = RecurrentRoBERTa(num_classes=3, encoder=encoder_config, window_size=12).eval()
    input_ids, mask = documents([[12], [9]])
    _, hidden = model(input_ids=input_ids, attention_mask=mask)
    reference = AutoModel.from_config(encoder_config, add_pooling_layer=False).eval()
    reference.load_state_dict(model.encoder.state_dict())
    expected = reference(input_ids=input_ids[:, 0], attention_mask=mask[:, 0]).last_hidden_state[:, 0]
    torch.testing.assert_close(hidden.window_states[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.document_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_what_was_read_reaches_the_last_window(encoder_config, carry):
    model = build(encoder_config, carry=carry)
    before, after = _states_around_a_change(model, window=0)
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_the_last_window_reaches_the_first_only_by_a_repeat(encoder_config, carry):
    before, after = _states_around_a_change(build(encoder_config, carry=carry, num_repeats=1), window=3)
    assert torch.equal(before[0, 0], after[0, 0])
    before, after = _states_around_a_change(build(encoder_config, carry=carry, num_repeats=2), window=3)
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-6


def _states_around_a_change(model, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids, mask = documents([[12, 12, 12, 12]])
    changed = input_ids.clone()
    changed[0, window, 3] = (changed[0, window, 3] + 7) % VOCABULARY
    return tuple(model(input_ids=ids, attention_mask=mask).hidden_states.window_states for ids in (input_ids, changed))


def test_a_gradient_reaches_window_0_from_the_last(encoder_config):
    model = build(encoder_config)
    input_ids, mask = documents([[12, 12, 12, 12]])
    input_ids[0, 0, 4] = 4  # stands nowhere else
    model(input_ids=input_ids, attention_mask=mask).hidden_states.window_states[0, -1, 0].backward()
    assert model.encoder.get_input_embeddings().weight.grad[4].abs().max() > 0


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
@pytest.mark.parametrize("aggregation", ["encoder", "transformer", "attention", "mean", "max"])
def test_every_parameter_gets_a_gradient(encoder_config, carry, aggregation):
    model = build(encoder_config, carry=carry, aggregation=aggregation, num_repeats=2)
    input_ids, mask = documents(LENGTHS)
    found = gradients(model, lambda: model(input_ids=input_ids, attention_mask=mask).logits)
    assert found.keys() == dict(model.named_parameters()).keys()
    dead = [n for n, g in found.items() if not g.abs().sum() > 0 and not n.endswith("key.bias")]
    assert dead == []


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
@pytest.mark.parametrize("aggregation", ["encoder", "transformer", "attention"])
def test_fresh_model_is_its_own_mean_of_windows(encoder_config, carry, aggregation):
    options = {"window_size": 12, "carry": carry, "aggregation": aggregation}
    model = RecurrentRoBERTa(num_classes=3, encoder=encoder_config, **options).eval()
    hidden = model(*documents([[12, 12, 5]])).hidden_states
    mean = torch.tensor([12, 12, 5]) / 29 @ hidden.window_states
    torch.testing.assert_close(hidden.document_state, mean, atol=1e-6, rtol=0)


def test_a_fixed_alpha_of_0_is_no_learned_one(encoder_config):
    model = build(encoder_config, carry="none", aggregation="encoder", global_alpha=0.0, window_weights="equal")
    hidden = model(*documents([[12, 12, 5]])).hidden_states
    torch.testing.assert_close(hidden.document_state, hidden.window_states.mean(1), atol=1e-6, rtol=0)
    assert not list(model.aggregation.parameters())


def test_start_values(encoder_config):
    model = RecurrentRoBERTa(
        num_classes=10,
        encoder=encoder_config,
        window_size=12,
        carry="gated",
        num_repeats=2,
        gate_bias=-2.0,
        cls_token_id=CLS,
    )
    scale = model.encoder.get_input_embeddings().weight[CLS].std()
    for norm in (model.window_norm, model.global_norm):
        torch.testing.assert_close(norm.weight, scale.expand(WIDTH))
        assert norm.bias.abs().sum() == 0
    assert model.window_gate.bias.unique().tolist() == model.global_gate.bias.unique().tolist() == [-2.0]
    assert torch.sigmoid(model.carry_gate.bias).mean().item() == pytest.approx(0.9, abs=0.01)
    assert model.pooler.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.classifier.out_features == 10


def test_window_logits_are_the_heads_of_each_window(encoder_config):
    model = build(encoder_config, window_loss=0.5).train()
    input_ids, mask = documents(LENGTHS)
    hidden = model(input_ids=input_ids, attention_mask=mask).hidden_states
    exists = mask.any(-1)
    expected = model.classifier(torch.tanh(model.pooler(hidden.window_states[exists])))
    torch.testing.assert_close(hidden.window_logits[exists], expected)
    for other in (model.eval(), build(encoder_config).train()):
        assert other(input_ids=input_ids, attention_mask=mask).hidden_states.window_logits is None


def test_dropout_stands_behind_the_pooler_and_not_before_it(encoder_config):
    """Document states lie far from zero and close together: without a number in ten, nothing would be left of them."""
    model = build(encoder_config, dropout=0.5, window_loss=1.0).train()
    seen, dropped = [], []
    model.pooler.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.classifier.register_forward_hook(lambda module, inputs, output: dropped.append(inputs[0] == 0))
    hidden = model(*documents(LENGTHS)).hidden_states
    assert [part.float().mean().item() for part in dropped] == pytest.approx([0.5, 0.5], abs=0.2)
    documents_in, windows_in = sorted(seen, key=lambda states: states.dim())
    assert torch.equal(windows_in, hidden.window_states)
    rows = {tuple(state) for state in hidden.document_state.tolist()}
    assert {tuple(state) for state in documents_in.tolist()} == rows


def test_gates_report_the_mean_weight_of_what_entered(encoder_config):
    model = build(encoder_config, num_repeats=2)
    hidden = model(*documents([[12, 12, 12], [9]])).hidden_states
    assert isinstance(hidden, HiddenStates)
    assert hidden.window_gates.shape == (2, 2, 3)
    assert hidden.global_gates.shape == (2, 2)
    assert not hidden.window_gates.requires_grad
    assert not hidden.global_gates.requires_grad
    assert hidden.window_gates[:, :, 0].abs().sum() == 0
    assert hidden.window_gates[:, 1].abs().sum() == 0
    assert hidden.global_gates[0].abs().sum() == 0
    for gates in (hidden.window_gates[:, 0, 1:], hidden.global_gates[1]):
        assert ((gates > 0) & (gates < 1)).all()


@pytest.mark.parametrize(("carry", "own"), [("gru", ("carry_cell", "carry_output")), ("gated", ("carry_gate",))])
def test_gates_norms_and_aggregation_stay_in_fp32_under_autocast(encoder_config, carry, own):
    model = build(encoder_config, carry=carry, num_repeats=2).train()
    seen: dict[str, list[torch.dtype]] = {"float": [], "encoder": []}
    for name in ("window_gate", "window_norm", "global_gate", "global_norm", *own):
        model.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen["float"].append(out.dtype))
    inner = model.encoder.encoder.layer[0].intermediate
    inner.register_forward_hook(lambda _, inputs, out: seen["encoder"].append(out.dtype))
    input_ids, mask = documents(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, hidden = model(input_ids=input_ids, attention_mask=mask)
    assert set(seen["float"]) == {torch.float32}
    # per repeat: six windows in bf16, then the aggregation in fp32
    assert seen["encoder"] == ([torch.bfloat16] * 6 + [torch.float32]) * 2
    assert hidden.window_states.dtype == hidden.document_state.dtype == torch.float32


def test_a_document_without_windows_is_refused(encoder_config):
    input_ids, mask = documents([[12], [12]])
    mask[1] = 0
    with pytest.raises(ValueError, match="no window"):
        build(encoder_config)(input_ids=input_ids, attention_mask=mask)
