"""The Transformer from scratch: against a slow twin, its invariances, saved and loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from models.aggregation import sinusoids, transformer_layer
from models.checkpoint import is_checkpoint, load_model_and_config, save_checkpoint
from models.transformer import TransformerClassifier, TransformerConfig
from tests.conftest import CLS, SEP, VOCABULARY, word_tokenizer
from tests.models.conftest import LENGTHS, documents, gradients
from utils import ConfigError


@pytest.fixture
def model() -> TransformerClassifier:
    torch.manual_seed(1)
    model = TransformerClassifier(TransformerConfig(vocab_size=VOCABULARY, num_labels=3, window_size=12, dropout=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def twin(model: TransformerClassifier, input_ids: Tensor, mask: Tensor) -> Tensor:
    """One document at a time, its tokens in a row, through transformer layers that know no padding."""
    logits = []
    for windows, masks in zip(input_ids, mask.bool(), strict=True):
        rows = [window[kept] for window, kept in zip(windows, masks, strict=True) if kept.any()]
        tokens = torch.cat([rows[0][:1], *(row[1:-1] for row in rows)])
        places = 0.02 * sinusoids(torch.arange(len(tokens)), 128)
        hidden = nn.functional.layer_norm(
            model.embeddings(tokens) + places, (128,), model.norm.weight, model.norm.bias
        )[None]
        for layer in model.layers:
            hidden = layer(hidden)
        logits.append(model.classifier(hidden[0].mean(0)))
    return torch.stack(logits)


def test_sinusoids_are_those_of_the_paper():
    places = sinusoids(torch.tensor([0, 3]), 4)
    expected = [[0.0, 1.0, 0.0, 1.0], [0.14112, -0.98999, 0.029996, 0.99955]]  # 3 and 3 / 100
    torch.testing.assert_close(places, torch.tensor(expected), atol=1e-5, rtol=0)


def test_attention_weights_are_not_dropped():
    attention, states = transformer_layer(8, 2, 16, dropout=0.5).self_attn.train(), torch.randn(2, 5, 8)
    first, again = (attention(states, states, states)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("grad", [True, False])
def test_equals_the_slow_twin(model, grad):
    input_ids, mask = documents(LENGTHS)
    with torch.set_grad_enabled(grad):
        logits, hidden = model(input_ids, mask)
    torch.testing.assert_close(logits, twin(model, input_ids, mask), atol=1e-5, rtol=0)
    assert logits.std() > 0.05
    assert hidden.window_states.shape == (4, 6, 128)
    assert (hidden.window_states.abs().sum(-1) > 0).equal(mask.any(-1))
    assert hidden.window_failures.shape == (4, 6)
    assert hidden.window_failures.sum() == 0
    assert (hidden.window_gates.shape, hidden.global_gates.shape) == ((1, 4, 6), (1, 4))


def test_logits_do_not_depend_on_batch_padding_or_order(model):
    input_ids, mask = documents(LENGTHS)
    together = model(input_ids, mask).logits
    for row, lengths in enumerate(LENGTHS):
        cut = (slice(row, row + 1), slice(len(lengths)), slice(max(lengths)))
        torch.testing.assert_close(model(input_ids[cut], mask[cut]).logits[0], together[row], atol=1e-5, rtol=0)
    order, absent = [2, 0, 3, 1], torch.zeros(4, 2, 12, dtype=torch.long)
    shuffled = model(torch.cat([absent, input_ids[order]], dim=1), torch.cat([absent, mask[order]], dim=1))
    torch.testing.assert_close(shuffled.logits, together[order], atol=1e-5, rtol=0)


def test_the_order_of_tokens_matters(model):
    input_ids, mask = documents([[12, 12]])
    assert (model(input_ids.flip(1), mask).logits - model(input_ids, mask).logits).abs().max() > 1e-4


def test_recomputation_gives_the_same_gradients(model):
    model.train()
    input_ids, mask = documents(LENGTHS)
    found = []
    for level in (0, 2):
        model.config.memory_level = level
        torch.manual_seed(7)
        found.append(gradients(model, lambda: model(input_ids, mask).logits))
    assert found[0].keys() == dict(model.named_parameters()).keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-5, msg=name)
        assert expected.abs().sum() > 0, name


@pytest.mark.parametrize("form", ["", "model.pt"])
def test_saved_and_loaded(model, tmp_path, form):
    folder = save_checkpoint(model, word_tokenizer(), {"window_size": 12}, tmp_path / "saved")
    assert is_checkpoint(folder)
    input_ids, mask = documents(LENGTHS)
    loaded = load_model_and_config(folder / form).model
    assert isinstance(loaded, TransformerClassifier)
    assert torch.equal(loaded(input_ids, mask).logits, model(input_ids, mask).logits)
    for dtype in (torch.float32, torch.bfloat16):  # in fp32 all the same, having no encoder
        by_transformers = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        assert torch.equal(by_transformers(input_ids, mask).logits, model(input_ids, mask).logits)


def test_what_it_cannot_read_is_refused(model):
    input_ids, mask = documents([[12], [12]])
    mask[1] = 0
    with pytest.raises(ValueError, match="no window"):
        model(input_ids, mask)
    model.config.window_overlap = 2
    with pytest.raises(ConfigError, match="window_overlap is 2; this model reads each token once"):
        model.check()


def test_pipeline_from_elsewhere(model, tmp_path):
    """In a process that knows nothing of this project but the saved folder."""
    model.config.update({"max_windows": 2, "read": "head_tail"})
    folder = save_checkpoint(model, word_tokenizer(), {}, tmp_path / "saved")
    script = (
        "import sys; from transformers import pipeline\n"
        "classify = pipeline('text-classification', model=sys.argv[1], trust_remote_code=True)\n"
        "print('RESULT', *[row['score'] for row in classify(sys.argv[2], top_k=None, function_to_apply='none')])\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    words = list(range(5, 55))
    run = subprocess.run(
        [sys.executable, "-c", script, folder, " ".join(f"w{word}" for word in words)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    read = [*words[:5], *words[-15:]]
    ids = torch.tensor([[[CLS, *read[:10], SEP], [CLS, *read[10:], SEP]]])
    expected = sorted(model(ids, torch.ones_like(ids)).logits[0].tolist(), reverse=True)
    [line] = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
    assert [float(score) for score in line.split()[1:]] == pytest.approx(expected, abs=1e-5)
