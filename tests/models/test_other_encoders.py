"""Encoders of other types, sizes and positions in the model; what it refuses."""

from __future__ import annotations

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
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, PAD, SHAPE, VOCABULARY, WIDTH, tiny_encoder, word_tokenizer
from tests.models.conftest import LENGTHS, build, documents
from tests.models.twin import assert_same_gradients, twin_logits
from utils import ConfigError


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
    assert_same_gradients(model, batch)


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
    assert_same_gradients(model, batch)


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
