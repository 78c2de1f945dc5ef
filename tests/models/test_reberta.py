"""The model's promises, with numbers, for a RoBERTa-shaped and a BERT-shaped encoder."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    CamembertConfig,
    Data2VecTextConfig,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    MegatronBertConfig,
    MobileBertConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaPreLayerNormConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

import pretrained
from models.output import HiddenStates
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, PAD, SHAPE, VOCABULARY, WIDTH, tiny_encoder, word_tokenizer
from tests.models.conftest import build, documents
from tests.models.twin import twin_logits
from utils import ConfigError

LENGTHS = [[12, 12, 12, 7], [12, 4], [12, 12, 12, 12, 12, 9], [8]]


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
        _assert_same_gradients(model, batch)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_short_window_weighs_as_little_as_it_is_long(encoder_config):
    model = build(encoder_config, carry="none", aggregation="mean")
    hidden = model(*documents([[12, 4]])).hidden_states
    first, last = hidden.window_states[0]
    torch.testing.assert_close(hidden.document_state[0], (12 * first + 4 * last) / 16, atol=1e-6, rtol=0)


@pytest.mark.parametrize("carry", ["gru", "residual", "none"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "distilbert"])
def test_the_mean_of_tokens_equals_the_slow_twins(kind, carry):
    """Logits and gradients; windows of a batch end at different tokens. DistilBERT is called whole."""
    if kind == "distilbert":
        config = DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64)
    else:
        config = tiny_encoder(kind)
    model = build(config, pooling="mean", carry=carry)
    batch = dict(zip(("input_ids", "attention_mask"), documents(LENGTHS), strict=True))
    torch.testing.assert_close(model(**batch).logits, twin_logits(model, **batch), atol=1e-5, rtol=0)
    _assert_same_gradients(model, batch)


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_gradients_equal_the_slow_twins(encoder_config, carry):
    model = build(encoder_config, carry=carry, num_repeats=2)
    _assert_same_gradients(model, dict(zip(("input_ids", "attention_mask"), documents(LENGTHS), strict=True)))


def _assert_same_gradients(model, batch) -> None:
    ours = _gradients(model, lambda: model(**batch).logits)
    theirs = _gradients(model, lambda: twin_logits(model, **batch))
    assert ours.keys() == theirs.keys()
    largest = max(1.0, *(float(gradient.abs().max()) for gradient in theirs.values()))
    for name in ours:
        torch.testing.assert_close(ours[name] / largest, theirs[name] / largest, atol=1e-5, rtol=1e-4, msg=name)


def _gradients(model, forward) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
def test_memory_levels_give_the_same_gradients(encoder_config, carry, dropout):
    model = build(encoder_config, carry=carry, num_repeats=2, dropout=dropout).train()
    input_ids, mask = documents(LENGTHS)
    gradients = []
    for level in (0, 1, 2):
        model.config.memory_level = level
        torch.manual_seed(7)
        gradients.append(_gradients(model, lambda: model(input_ids=input_ids, attention_mask=mask).logits))
    for name, expected in gradients[0].items():
        for other in gradients[1:]:
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


@pytest.mark.parametrize("carry", ["gru", "gated", "residual"])
@pytest.mark.parametrize("aggregation", ["encoder", "transformer", "attention", "mean", "max"])
def test_every_parameter_gets_a_gradient(encoder_config, carry, aggregation):
    model = build(encoder_config, carry=carry, aggregation=aggregation, num_repeats=2)
    input_ids, mask = documents(LENGTHS)
    gradients = _gradients(model, lambda: model(input_ids=input_ids, attention_mask=mask).logits)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    dead = [n for n, g in gradients.items() if not g.abs().sum() > 0 and not n.endswith("key.bias")]
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


def test_rotary_positions_are_relative(encoder_config):
    model = build(encoder_config, position_encoding="rope")
    input_ids, mask = documents(LENGTHS)
    logits, _ = model(input_ids=input_ids, attention_mask=mask)
    torch.testing.assert_close(logits, twin_logits(model, input_ids, mask), atol=1e-5, rtol=0)
    assert model.encoder.embeddings.position_embeddings.weight.abs().sum() == 0
    swapped = input_ids.clone()
    swapped[:, 0, [3, 4]] = swapped[:, 0, [4, 3]]
    assert (model(input_ids=swapped, attention_mask=mask).logits - logits).abs().max() > 1e-4


def test_rotary_attention_scores_depend_on_distance_alone():
    from models.encoder import _rotate

    query, key = torch.randn(2, 1, 1, 1, 8)
    rotated_query, rotated_key = _rotate(query.expand(1, 1, 10, 8)), _rotate(key.expand(1, 1, 10, 8))
    scores = (rotated_query @ rotated_key.transpose(-1, -2))[0, 0]
    for offset in range(1, 5):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert (scores[0, 1] - scores[0, 4]).abs() > 1e-4


@pytest.mark.parametrize(
    ("kind", "changes", "positions"),
    [
        (XLMRobertaConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
        (CamembertConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
        (ElectraConfig, {"max_position_embeddings": 64, "embedding_size": WIDTH}, 64),
        (ElectraConfig, {"max_position_embeddings": 64, "embedding_size": 8}, 64),
        (AlbertConfig, {"max_position_embeddings": 64, "embedding_size": 8, "pad_token_id": PAD}, 64),
        (DistilBertConfig, {"max_position_embeddings": 64}, 64),
        (ModernBertConfig, {"max_position_embeddings": 64, "pad_token_id": PAD, "local_attention": 8}, 64),
        (ErnieConfig, {"max_position_embeddings": 64, "pad_token_id": PAD}, 64),
        (Data2VecTextConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
        # with an attention of their own
        (MPNetConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
        (MegatronBertConfig, {"max_position_embeddings": 64, "pad_token_id": PAD}, 64),
        # whose norms stand before
        (RobertaPreLayerNormConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
        (XLMRobertaXLConfig, {"max_position_embeddings": 66, "pad_token_id": PAD}, 64),
    ],
)
def test_other_encoders_equal_the_slow_twin(kind, changes, positions):
    model = build(kind(initializer_range=0.1, **SHAPE, **changes), num_repeats=2)
    batch = dict(zip(("input_ids", "attention_mask"), documents(LENGTHS), strict=True))
    assert model.positions == positions
    torch.testing.assert_close(model(**batch).logits, twin_logits(model, **batch), atol=1e-5, rtol=0)
    _assert_same_gradients(model, batch)


def test_encoders_that_read_padding_are_refused():
    with pytest.raises(ConfigError, match="what a 'mobilebert' reads depends on padding; use another encoder"):
        build(MobileBertConfig(embedding_size=WIDTH, **SHAPE))


def test_narrow_word_embeddings():
    narrow = AlbertConfig(embedding_size=8, **SHAPE)
    model = RecurrentRoBERTa(num_classes=3, encoder=narrow, window_size=12, num_repeats=2, cls_token_id=CLS)
    scale = model.encoder.get_input_embeddings().weight[CLS].detach().std()
    for norm in (model.window_norm[1], model.global_norm[1]):
        torch.testing.assert_close(norm.weight, scale.expand(8))
    assert model.window_norm[0].weight.detach().std() == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ConfigError, match="carry is 'residual'; this encoder's word embeddings are not as wide"):
        build(narrow, carry="residual")


def test_rotary_positions_are_refused_where_attention_cannot_turn():
    with pytest.raises(
        ConfigError, match="position_encoding is 'rope'; it needs an encoder shaped as BERT, not Distil"
    ):
        build(DistilBertConfig(**SHAPE), position_encoding="rope")


def test_eager_attention_gives_the_same(encoder_config):
    model = build(encoder_config)
    input_ids, mask = documents(LENGTHS)
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    model.encoder.set_attn_implementation("eager")
    got = model(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 65}, "window_size is 65; this encoder takes windows of 4 to 64 tokens"),
        ({"window_size": 16, "max_windows": 63}, "takes at most 62"),
        ({"window_size": 16, "window_overlap": 14}, "window_overlap is 14"),
        ({"window_size": 16, "carry": "open"}, "carry is 'open'"),
        ({"window_size": 16, "encoder_layers": 3}, "encoder_layers is 3; this encoder has 2 layers"),
        ({"window_size": 16, "carry": "none", "num_repeats": 2}, "num_repeats is 2; with carry 'none'"),
    ],
)
def test_what_the_encoder_cannot_do_is_a_config_error(encoder_config, options, message):
    with pytest.raises(ConfigError, match=message):
        RecurrentRoBERTa(num_classes=2, encoder=encoder_config, **options)


def test_documents_beyond_the_encoders_positions_are_refused(encoder_config):
    model = build(encoder_config, window_size=64)
    with pytest.raises(ConfigError, match="windows of 65 tokens; this encoder takes 64"):
        model(*documents([[5]], window_size=65))
    with pytest.raises(ConfigError, match="63 windows; aggregation by this encoder takes at most 62"):
        model(*documents([[5] * 63]))
    build(encoder_config, aggregation="mean")(*documents([[5] * 63]))


def test_a_config_object_stays_as_it_was(encoder_config):
    before = encoder_config.to_dict()
    RecurrentRoBERTa(num_classes=2, encoder=encoder_config, window_size=12, encoder_layers=1, dropout=0.33)
    assert encoder_config.to_dict() == before


def test_dropout_reaches_encoders_of_other_shapes():
    encoder = DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64)
    model = RecurrentRoBERTa(num_classes=2, encoder=encoder, window_size=12, dropout=0.2)
    assert {module.p for module in model.encoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.0, 0.2}


def test_roberta_takes_512_tokens_not_514():
    encoder = tiny_encoder("roberta")
    encoder.max_position_embeddings = 514
    RecurrentRoBERTa(num_classes=2, encoder=encoder, window_size=512, max_windows=510)
    with pytest.raises(ConfigError, match="4 to 512 tokens"):
        RecurrentRoBERTa(num_classes=2, encoder=encoder, window_size=513)
    with pytest.raises(ConfigError, match="at most 510"):
        RecurrentRoBERTa(num_classes=2, encoder=encoder, window_size=512, max_windows=511)


def test_a_document_without_windows_is_refused(encoder_config):
    input_ids, mask = documents([[12], [12]])
    mask[1] = 0
    with pytest.raises(ValueError, match="no window"):
        build(encoder_config)(input_ids=input_ids, attention_mask=mask)


def test_a_pretrained_encoder_by_name_keeps_its_weights(tmp_path, monkeypatch):
    """`roberta-base` below models/pretrained, in the real one's format, and the constructor of the Readme."""
    config = tiny_encoder("roberta")
    config.max_position_embeddings = 514
    original = AutoModel.from_config(config, add_pooling_layer=True)
    original.save_pretrained(tmp_path / "roberta-base")
    word_tokenizer().save_pretrained(tmp_path / "roberta-base")
    monkeypatch.setattr(pretrained, "PRETRAINED", tmp_path)
    model = RecurrentRoBERTa(num_classes=10, window_size=512, max_windows=50, num_repeats=2)
    expected = {name: value for name, value in original.state_dict().items() if not name.startswith("pooler.")}
    assert model.encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.encoder.state_dict()[name], value) for name, value in expected.items())
    scale = original.embeddings.word_embeddings.weight[CLS].std()
    torch.testing.assert_close(model.window_norm.weight, scale.expand(WIDTH))
    assert model.config.cls_token_id == CLS
    lower = RecurrentRoBERTa(num_classes=2, encoder="roberta-base", encoder_layers=1).eval()
    assert lower.encoder.num_parameters() < model.encoder.num_parameters()
    input_ids, mask = documents([[12]])
    with torch.no_grad():
        expected = original.eval()(input_ids[0], mask[0], output_hidden_states=True).hidden_states[1][:, 0]
        state = lower(input_ids, mask).hidden_states.window_states[0]
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)
    with pytest.raises(OSError, match="no-such-encoder"):
        RecurrentRoBERTa(num_classes=2, encoder="/no-such-encoder")
