"""Saving and loading: the folder, the one file, transformers' own ways, and files from strangers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, ModernBertConfig, PreTrainedTokenizerFast

from data_utils.tokenization import load_tokenizer
from models.checkpoint import (
    is_checkpoint,
    load_all,
    load_checkpoint_tokenizer,
    load_model_and_config,
    load_training_texts,
    save_checkpoint,
)
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, MODEL_CODE, PAD, SEP, SHAPE, word_tokenizer
from tests.models.conftest import build, documents
from utils import ModelError

LABELS = ["dull", "bright", "odd"]
SETTINGS = {"window_size": 12, "problem_type": "single_label", "label_column": "label"}
FILES = {
    *("config.json", "model.safetensors", "model.pt", "settings.json", "tokenizer.json", "tokenizer_config.json"),
    *MODEL_CODE,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def model(encoder_config) -> RecurrentRoBERTa:
    maps = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    reading = {"num_repeats": 2, "window_overlap": 2, "max_len": 33}
    return build(encoder_config, num_classes=None, calibration_temperature=1.7, **reading, **maps)


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> Path:
    return save_checkpoint(model, tokenizer, SETTINGS, tmp_path / "saved" / "run")


@pytest.fixture
def expected(model) -> torch.Tensor:
    torch.manual_seed(3)
    return model(*documents([[12, 12, 9], [7]])).logits


def _logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    return model(*documents([[12, 12, 9], [7]])).logits


def test_the_folder_holds_exactly_these_files(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("form", ["", "model.pt"])
def test_load_gives_the_same_model_settings_and_label_maps(folder, expected, form):
    random_state = torch.get_rng_state()
    model, settings, maps = load_model_and_config(folder / form)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(_logits(model), expected)
    assert model.config.calibration_temperature == 1.7
    assert settings == SETTINGS
    assert maps == {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    assert not model.training


@pytest.mark.parametrize("form", ["", "model.pt"])
def test_the_tokenizer_comes_back(folder, tokenizer, form):
    loaded = load_checkpoint_tokenizer(folder / form)
    assert loaded("w7 w9")["input_ids"] == tokenizer("w7 w9")["input_ids"] == [CLS, 7, 9, SEP]
    assert (loaded.cls_token_id, loaded.sep_token_id, loaded.pad_token_id) == (CLS, SEP, PAD)


@pytest.mark.parametrize("form", ["", "model.pt"])
@pytest.mark.parametrize("texts", [[7, -7], None])
def test_all_at_once_from_a_file_that_is_read_once(model, tokenizer, expected, tmp_path, monkeypatch, form, texts):
    hashes = None if texts is None else np.array(texts)
    path = save_checkpoint(model, tokenizer, SETTINGS, tmp_path / "run", hashes) / form
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: reads.append(file) or load(file, **options))
    (loaded, settings, maps), loaded_tokenizer, training_texts = load_all(path)
    assert reads == ([path] if form else [])
    assert torch.equal(_logits(loaded), expected)
    assert (settings, maps) == load_model_and_config(path)[1:]
    assert loaded_tokenizer.get_vocab() == load_checkpoint_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    for found in (training_texts, load_training_texts(path)):
        assert (None if found is None else found.tolist()) == (None if texts is None else [-7, 7])


def test_the_file_alone_is_enough(folder, tmp_path, expected):
    moved = tmp_path / "elsewhere.pt"
    (folder / "model.pt").rename(moved)
    assert torch.equal(_logits(load_model_and_config(moved).model), expected)
    assert load_checkpoint_tokenizer(moved).cls_token_id == CLS


def test_saving_again_replaces_the_folder_whole(folder, model, tokenizer):
    (folder / "stale").write_text("old")
    save_checkpoint(model, tokenizer, SETTINGS, folder)
    assert {path.name for path in folder.iterdir()} == FILES


def test_transformers_own_ways(folder, expected):
    for loader in (RecurrentRoBERTa, AutoModelForSequenceClassification):
        torch.testing.assert_close(_logits(loader.from_pretrained(folder).eval()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_loads_the_encoder_alone_in_16_bits(folder, expected, tmp_path, dtype):
    model = RecurrentRoBERTa.from_pretrained(folder, dtype=dtype).eval()
    model.save_pretrained(tmp_path / "again")
    for loaded in (model, RecurrentRoBERTa.from_pretrained(tmp_path / "again").eval()):
        types = {name: p.dtype for name, p in loaded.named_parameters()}
        assert {kind for name, kind in types.items() if name.startswith("encoder.")} == {dtype}
        assert {kind for name, kind in types.items() if not name.startswith("encoder.")} == {torch.float32}
        logits = _logits(loaded)
        assert 0 < (logits - expected).norm() < 2e-2 * expected.norm()


def test_pipeline_from_elsewhere(folder, model, tokenizer, tmp_path):
    """In a process that knows nothing of this project but the saved folder, and has a `utils.py` of its own."""
    (tmp_path / "utils.py").write_text("raise RuntimeError('somebody else')")
    text = " ".join(f"w{5 + i % 100}" for i in range(40))
    script = (
        "import json, sys; from transformers import pipeline; from tokenizers.normalizers import BertNormalizer\n"
        "classify = pipeline('text-classification', model=sys.argv[1], trust_remote_code=True)\n"
        "print('RESULT', json.dumps(classify([sys.argv[2], 'w7 w8'], top_k=None)))\n"
        "for text, options in ('w7', {'truncation': True}), (' ', {}), ('w7\\0', {}), ('w7 \\ud800', {}):\n"
        "    try: classify(text, **options)\n"
        "    except ValueError as error: print('REFUSED', error)\n"
        "classify.tokenizer.backend_tokenizer.normalizer = BertNormalizer()\n"
        "try: classify('\\u200b')\n"
        "except ValueError as error: print('REFUSED', error)\n"
        "classify.model.encoder.embeddings.word_embeddings.weight.data[9] = float('nan')\n"
        "classify(' '.join(['w7'] * 12 + ['w9']))\n"
        "try: classify('w9')\n"
        "except ValueError as error: print('REFUSED', error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", script, folder, text], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "33 of a document's 40 tokens are read" in " ".join(run.stderr.split())
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    long, short = json.loads(line.removeprefix("RESULT "))
    words = [int(word[1:]) for word in text.split()][:33]
    windows = [[CLS, *words[start : start + 10], SEP] for start in range(0, 32 + 1, 8)]
    windows = [window for i, window in enumerate(windows) if i == 0 or len(words) > i * 8 + 2]
    ids, mask = torch.full((1, len(windows), 12), PAD), torch.zeros(1, len(windows), 12, dtype=torch.long)
    for i, window in enumerate(windows):
        ids[0, i, : len(window)], mask[0, i, : len(window)] = torch.tensor(window), 1
    probabilities = (model(input_ids=ids, attention_mask=mask).logits / 1.7).softmax(-1)[0]
    assert {entry["label"]: entry["score"] for entry in long} == pytest.approx(
        dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-5
    )
    assert len(short) == 3
    assert "window 1 of a document failed: its state is not finite" in run.stderr
    said = [line.removeprefix("REFUSED ") for line in run.stdout.splitlines() if line.startswith("REFUSED")]
    assert [line.split(":")[0] for line in said] == [
        "leave truncation out",
        "the text is empty",
        "the text holds a NUL character",
        "'utf-8' codec can't encode character '\\ud800' in position 3",
        "the text shows nothing",
        "nothing of the document could be read",
    ]


def test_windows_of_a_model_that_was_saved_before_they_had_weights_count_alike(folder, model):
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("window_weights") == model.config.window_weights == "tokens"
    (folder / "config.json").write_text(json.dumps(config))
    for loaded in (load_model_and_config(folder).model, RecurrentRoBERTa.from_pretrained(folder)):
        assert loaded.config.window_weights == "equal"


def test_is_checkpoint(folder, tmp_path):
    assert is_checkpoint(folder)
    assert is_checkpoint("anything.pt")
    assert not is_checkpoint("roberta-base")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    assert not is_checkpoint(tmp_path)


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "state_dict": Hostile()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(ModelError, match=f"{name}: refused|{name}: is no checkpoint"):
            load_model_and_config(name)
    assert not Path("owned").exists()


def test_rubbish_is_refused(folder, tmp_path):
    rubbish = {"empty.pt": b"", "text.pt": b"not a model", "cut.pt": (folder / "model.pt").read_bytes()[:5000]}
    for name, content in rubbish.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load_model_and_config(tmp_path / name)
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="is no ReBerta checkpoint"):
        load_model_and_config(tmp_path / "other.pt")
    with pytest.raises(ModelError, match="no such checkpoint"):
        load_model_and_config(tmp_path / "missing.pt")
    (folder / "tokenizer_config.json").rename(folder / "gone")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json missing"):
        load_model_and_config(folder)
    (folder / "gone").rename(folder / "tokenizer_config.json")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="is damaged"):
        load_model_and_config(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors missing; give the models/saved/NAME of a run"):
        load_model_and_config(folder)


def test_of_a_misspelt_model_the_nearest_is_named(folder):
    with pytest.raises(ModelError, match=rf"no such checkpoint; did you mean {folder}\?"):
        load_model_and_config(folder.with_name("rnu"))
    with pytest.raises(ModelError, match=r"modle\.pt: there is no such checkpoint; did you mean .*/run/model\.pt\?"):
        load_model_and_config(folder / "modle.pt")
    with pytest.raises(ModelError, match=r"no such checkpoint; --model_path takes"):
        load_model_and_config(folder / "of" / "nothing")
    with pytest.raises(ModelError, match=rf"no tokenizer found.*; did you mean {folder}\?; fetch"):
        load_tokenizer(folder.with_name("rnu"))


def test_a_tokenizer_file_cannot_leave_its_folder(folder, tmp_path):
    content = torch.load(folder / "model.pt", weights_only=True)
    content["tokenizer"] = {"../escaped.json": "{}"}
    torch.save(content, tmp_path / "escape.pt")
    with pytest.raises(ModelError, match="outside of its folder"):
        load_checkpoint_tokenizer(tmp_path / "escape.pt")


def test_weights_that_repeat_one_number_are_refused(folder, tmp_path):
    """A small file would take any amount of memory."""
    content = torch.load(folder / "model.pt", weights_only=True)
    [name] = [name for name in content["state_dict"] if name.endswith("word_embeddings.weight")]
    content["state_dict"][name] = torch.zeros(1).expand(10**7, 32)
    content["config"]["encoder_config"]["vocab_size"] = 10**7
    torch.save(content, tmp_path / "wide.pt")
    with pytest.raises(ModelError, match=r"wide\.pt: refused, since its weights would take 1,28\d,\d+,\d+ bytes, more"):
        load_model_and_config(tmp_path / "wide.pt")


def test_an_encoder_of_which_only_some_layers_are_used(tokenizer, tmp_path):
    """ModernBERT's configuration lists them."""
    config = ModernBertConfig(**{**SHAPE, "num_hidden_layers": 4}, pad_token_id=PAD, local_attention=8)
    model = build(config, encoder_layers=2)
    save_checkpoint(model, tokenizer, SETTINGS, tmp_path / "saved")
    for loaded in (
        *(load_model_and_config(tmp_path / "saved" / form).model for form in ("", "model.pt")),
        RecurrentRoBERTa.from_pretrained(tmp_path / "saved").eval(),
    ):
        torch.testing.assert_close(_logits(loaded), _logits(model))


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    content = torch.load(folder / "model.pt", weights_only=True)
    content["state_dict"].pop("pooler.weight")
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(ModelError, match=r"do not fit its configuration(.|\n)*pooler\.weight"):
        load_model_and_config(tmp_path / "short.pt")
