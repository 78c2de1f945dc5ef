"""The encoder's fast paths against torch's own: lookups, dropout, attention in bf16, quantised layers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    CanineConfig,
    ConvBertConfig,
    FNetConfig,
    ModernBertConfig,
    NystromformerConfig,
    YosoConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.encoder import Dropout, _token_mean, load_encoder, token_lookup, use_rotary_positions
from models.quantization import quantize_int8
from models.reberta import RecurrentRoBERTa
from tests.conftest import PAD, SHAPE, tiny_encoder
from tests.models.conftest import build, documents
from tests.models.twin import twin_logits
from utils import ConfigError


def batch_of(lengths: list[list[int]]) -> dict[str, torch.Tensor]:
    return dict(zip(("input_ids", "attention_mask"), documents(lengths, window_size=16), strict=True))


def model_of(kind: str = "roberta", **options) -> RecurrentRoBERTa:
    return build(tiny_encoder(kind, initializer_range=0.1), window_size=16, **options)


def relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.float() - expected.float()).detach().norm() / expected.float().detach().norm())


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_lookups_give_the_gradient_of_plain_ones():
    encoder = load_encoder(tiny_encoder("roberta"), 0.0, 0.0)
    weight = encoder.get_input_embeddings().weight
    ids = torch.randint(5, 120, (3, 7))
    scale = torch.randn(3, 7, 32)

    embed = token_lookup(encoder)
    loss = (embed(ids) * scale).sum() + embed(ids[:2]).pow(2).sum() + weight.sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)

    plain = nn.functional.embedding
    expected = torch.autograd.grad(
        (plain(ids, weight) * scale).sum() + plain(ids[:2], weight).pow(2).sum() + weight.sum(), weight
    )
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(again, expected[0])


def test_a_frozen_table_gets_no_gradient():
    encoder = load_encoder(tiny_encoder("roberta"), 0.0, 0.0)
    encoder.get_input_embeddings().requires_grad_(False)
    assert not token_lookup(encoder)(torch.tensor([5, 6])).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype):
    dropout = Dropout(0.1)
    values = torch.ones(400_001, dtype=dtype, requires_grad=True)
    dropped = dropout(values)
    zeros = (dropped == 0).float()
    # five standard deviations of a mean of 100,000 draws of 0.1: each of the four parts of a random number alone
    for part in range(4):
        assert abs(zeros[part::4].mean() - 0.1) < 5 * (0.1 * 0.9 / 100_000) ** 0.5
    assert abs((zeros[:-1] * zeros[1:]).mean() - 0.01) < 5 * (0.01 * 0.99 / 400_000) ** 0.5
    torch.testing.assert_close(dropped[dropped != 0].float().mean(), torch.tensor(1 / 0.9), rtol=4e-3, atol=0)
    dropped.sum().backward()
    assert torch.equal(values.grad == 0, dropped == 0)


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    dropout, values = Dropout(0.5), torch.randn(3, 5, 7)
    torch.manual_seed(7)
    first = dropout(values)
    torch.manual_seed(7)
    assert torch.equal(dropout(values), first)
    assert torch.equal(dropout.eval()(values), values)


def test_a_loaded_encoder_has_our_dropout_and_the_weights_names_of_transformers():
    config = tiny_encoder("bert")
    encoder = load_encoder(config, 0.2, 0.0)
    dropouts = [module for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) > 4
    assert all(type(module) is Dropout for module in dropouts)
    assert {module.p for module in dropouts} == {0.2, 0.0}
    assert encoder.state_dict().keys() == AutoModel.from_config(config, add_pooling_layer=False).state_dict().keys()


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("memory_level", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_encoding": "rope"},
        {"pooling": "mean"},
        {"carry": "gated", "num_repeats": 2},
        {"carry": "residual", "num_repeats": 2},
    ],
)
@pytest.mark.usefixtures("whose_bf16")
def test_bf16_is_close_to_the_slow_twin_in_fp32(kind, memory_level, options):
    model = model_of(kind, memory_level=memory_level, **options)
    batch = batch_of([[16, 16, 9], [16, 16, 16], [5]])
    expected = twin_logits(model, **batch)
    nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2])).backward()
    wanted = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch).logits
        with torch.inference_mode():
            read_only = model(**batch).logits
    nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2])).backward()
    assert relative(logits, expected) < 2e-2
    assert relative(read_only, expected) < 2e-2
    assert relative(gradients(model), wanted) < 2e-2


def test_bf16_with_repeats_of_gru_is_nearer_than_the_twin_in_bf16():
    """A random encoder makes much of rounding here: the twin's own gradients in bf16 are several percent off."""
    errors = dict.fromkeys(("ours", "twin"), 0.0)
    labels = torch.tensor([0, 1, 2])
    batch = batch_of([[16, 16, 9], [16, 16, 16], [5]])
    for _ in range(5):
        model = model_of("bert", carry="gru", num_repeats=2)
        nn.functional.cross_entropy(twin_logits(model, **batch), labels).backward()
        wanted = gradients(model)
        for name, read in (("ours", lambda m: m(**batch).logits), ("twin", lambda m: twin_logits(m, **batch))):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = read(model)
            nn.functional.cross_entropy(logits.float(), labels).backward()
            errors[name] += relative(gradients(model), wanted) / 5
    assert errors["ours"] < errors["twin"]
    assert errors["ours"] < 6e-2


def test_weights_that_lack_a_tensor_are_refused(encoder_folder, tmp_path):
    """They would be random, and nothing but poor scores would tell."""
    folder = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
    load_encoder(folder, 0.0, 0.0)
    weights = load_file(folder / "model.safetensors")
    of_one_layer = {name: value for name, value in weights.items() if "layer.1." not in name}
    by_ddp = {f"module.{name}": value for name, value in weights.items()}
    for saved, missing in (
        (of_one_layer, r"16 of .* such as encoder\.layer\.1"),
        (by_ddp, r"37 of .* such as embeddings"),
    ):
        save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{folder}: its weights lack {missing}"):
            load_encoder(folder, 0.0, 0.0)


def test_bf16_where_padding_sees_nothing_in_local_attention():
    """ModernBERT looks 2 tokens far here, and 9 of a window of 16 are padding."""
    config = ModernBertConfig(
        initializer_range=0.1, max_position_embeddings=64, local_attention=4, pad_token_id=PAD, **SHAPE
    )
    model = build(config, window_size=16)
    batch = batch_of([[16, 7], [16, 16]])
    expected = twin_logits(model, **batch)
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert not output.hidden_states.window_failures.any()
    output.logits.float().square().sum().backward()
    assert relative(output.logits, expected) < 2e-2
    assert relative(gradients(model), wanted) < 2e-2


def test_the_mean_of_tokens_in_bf16_does_not_depend_on_padding():
    hidden = torch.randn(2, 16, 8).bfloat16()
    assert _token_mean(hidden, None).dtype == torch.float32
    torch.testing.assert_close(_token_mean(hidden, None), _token_mean(hidden, torch.ones(2, 16)))


def test_bf16_attention_drops_weights_where_asked():
    model = model_of(attention_dropout=0.5)
    batch = batch_of([[16, 16]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_int8_is_near_fp32():
    model = model_of()
    batch = batch_of([[16, 16, 9]])
    with torch.inference_mode():
        expected = model(**batch).hidden_states
        quantize_int8(model)
        states = model(**batch).hidden_states
    assert not torch.equal(states.window_states, expected.window_states)
    assert relative(states.window_states, expected.window_states) < 3e-2
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert "window_gate" in linear
    assert not [name for name in linear if name.startswith("encoder.")]


def test_bf16_attention_minds_a_causal_mask():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8).bfloat16()
    module = nn.Module()
    module.num_key_value_groups = 1
    ours, _ = ALL_ATTENTION_FUNCTIONS["reberta"](module, query, key, value, None, scaling=0.3, is_causal=True)
    expected = nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=0.3, is_causal=True
    )
    torch.testing.assert_close(ours.float(), expected.transpose(1, 2), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_what_rotary_attention_reads_does_not_depend_on_where_it_stands(kind):
    encoder = load_encoder(tiny_encoder(kind), 0.0, 0.0).eval()
    use_rotary_positions(encoder)
    tokens, before = torch.randn(1, 10, 32), torch.randn(1, 4, 32)
    mask = (torch.arange(14) >= 4).long()[None]
    with torch.no_grad():
        expected = encoder(inputs_embeds=tokens).last_hidden_state
        shifted = encoder(inputs_embeds=torch.cat([before, tokens], 1), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(shifted[:, 4:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [CanineConfig, ConvBertConfig, FNetConfig, NystromformerConfig, YosoConfig])
def test_an_encoder_that_reads_padding_is_refused(kind):
    shape = {name: value for name, value in SHAPE.items() if kind is not CanineConfig or name != "vocab_size"}
    with pytest.raises(ConfigError, match=f"what a '{kind.model_type}' reads depends on padding"):
        build(kind(**shape))
