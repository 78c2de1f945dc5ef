"""The exported folder against the model: logits, texts end to end, and a machine without torch."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import BertNormalizer
from transformers import AlbertConfig, DistilBertConfig

from calibration import predicted_labels, probabilities
from data_utils.dataset import LongTextDataset
from data_utils.readers import checked_records
from data_utils.records import Columns
from data_utils.windows import cut_windows
from main import main
from models import onnx_runner
from models.checkpoint import save_checkpoint
from models.export import write_folder
from models.onnx_runner import OnnxReBerta
from models.pipeline import ReBertaPipeline
from models.reberta import RecurrentRoBERTa
from tests.conftest import SHAPE, VOCABULARY, WIDTH, tiny_encoder, word_tokenizer
from tests.models.conftest import build, documents

LABELS = ["dull", "bright", "odd"]
MAPS = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
FILES = {
    *("encoder.onnx", "enter.onnx", "carry.onnx", "head.onnx", "embeddings.npy"),
    *("config.json", "tokenizer.json", "runner.py"),
}
TEXTS = [
    "w9 w77 [SEP] w5",
    " ".join(f"w{5 + i * i % 110}" for i in range(45)),
    " ".join(f"w{5 + 7 * i % 110}" for i in range(200)),
]


def exported(model: RecurrentRoBERTa, folder: Path) -> OnnxReBerta:
    write_folder(model, word_tokenizer(), folder)
    return OnnxReBerta(folder, threads=1)


def torch_logits(model: RecurrentRoBERTa, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids, mask).logits.numpy()


@pytest.mark.parametrize(
    ("encoder", "num_repeats", "options"),
    [
        ("roberta", 2, {"carry": "gated", "window_weights": "equal"}),
        ("roberta", 2, {"carry": "gru", "pooling": "mean"}),
        ("bert", 1, {"carry": "gru", "aggregation": "mean"}),
        ("bert", 2, {"carry": "residual", "position_encoding": "rope"}),
        ("bert", 1, {"carry": "none", "aggregation": "attention", "window_weights": "equal"}),
        ("bert", 1, {"carry": "none", "aggregation": "attention"}),
        ("distilbert", 1, {"carry": "residual", "aggregation": "mean"}),
        ("roberta", 1, {"carry": "gated", "aggregation": "max", "position_encoding": "rope"}),
        ("bert", 1, {"carry": "none", "aggregation": "transformer"}),
        ("roberta", 1, {"carry": "none"}),
        ("albert", 2, {"carry": "gru"}),  # whose word embeddings are narrower than its states
    ],
)
def test_logits_are_the_models(tmp_path, encoder, num_repeats, options):
    """Each pair of carry and repeats; documents of one window, of several, of a short last one."""
    if encoder == "distilbert":
        config = DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64)
    elif encoder == "albert":
        config = AlbertConfig(embedding_size=8, **SHAPE)
    else:
        config = tiny_encoder(encoder)
    model = build(config, num_repeats=num_repeats, **options)
    runner = exported(model, tmp_path / "onnx")
    again = {"enter_again.onnx"} if num_repeats > 1 else set()
    absent = {"enter.onnx"} if options["carry"] == "none" else set()
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == FILES - absent | again
    ids, mask = documents([[12, 12, 12, 7], [8], [12, 12], [3], [12, 12, 12, 12, 12, 12, 12, 12]])
    mask[2, 0] = 0  # a window that does not exist may stand before one that does
    ours = np.stack([runner.logits(*pair) for pair in zip(ids.numpy(), mask.numpy(), strict=True)])
    np.testing.assert_allclose(ours, torch_logits(model, ids, mask), atol=1e-5, rtol=0)
    assert ours.std(axis=0).min() > 0.02


@pytest.fixture(scope="module")
def model() -> RecurrentRoBERTa:
    torch.manual_seed(0)
    return build(
        tiny_encoder("roberta"), num_classes=None, window_overlap=2, max_windows=5, calibration_temperature=0.4, **MAPS
    )


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "onnx"
    write_folder(model, word_tokenizer(), folder)
    return folder


@pytest.fixture
def runner(folder) -> OnnxReBerta:
    return OnnxReBerta(folder, threads=1)


def torch_probabilities(model: RecurrentRoBERTa, text: str, problem_type: str = "single_label") -> np.ndarray:
    config = model.config
    reading = {"window_overlap": config.window_overlap, "max_len": config.max_len}
    windows = LongTextDataset.preprocess_single_text(
        word_tokenizer(), text, config.window_size, config.max_windows, **reading
    )
    logits = torch_logits(model, windows["input_ids"][None], windows["attention_mask"][None])
    return probabilities(logits, problem_type, config.calibration_temperature)[0]


def test_texts_get_the_models_label_and_probabilities(model, runner):
    results = runner.predict(TEXTS)
    for text, result in zip(TEXTS, results, strict=True):
        expected = torch_probabilities(model, text)
        assert list(result["probabilities"]) == LABELS
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-5, rtol=0)
        assert result["label"] == LABELS[expected.argmax()]
        assert result["confidence"] == max(result["probabilities"].values())
    room = 10 + 4 * 8  # five windows of 12 tokens that share 2
    assert [(result["tokens"], result["tokens_read"]) for result in results] == [(6, 6), (45, room), (200, room)]


@pytest.mark.parametrize(("read", "max_windows"), [("head_tail", 1), ("head_tail", 3), ("random", 1), ("random", 3)])
def test_what_is_read_of_a_long_text(model, folder, tmp_path, read, max_windows):
    """The runner and transformers' pipeline against the windows of the data set."""
    served = shutil.copytree(folder, tmp_path / "onnx")
    config = {**json.loads((served / "config.json").read_text()), "read": read, "window_overlap": 0, "max_len": 150}
    (served / "config.json").write_text(json.dumps(config | {"max_windows": max_windows}))
    runner, tokenizer = OnnxReBerta(served, threads=1), word_tokenizer()
    changed = {"read": read, "window_overlap": 0, "max_len": 150, "max_windows": max_windows}
    before = {name: getattr(model.config, name) for name in changed}
    try:
        model.config.update(changed)
        piped = ReBertaPipeline(model=model, tokenizer=tokenizer)
        for text in TEXTS:
            windows = LongTextDataset.preprocess_single_text(tokenizer, text, 12, max_windows, max_len=150, read=read)
            [result] = runner.predict([text])
            assert result["tokens_read"] == min(result["tokens"], 10 * max_windows)
            logits = torch_logits(model, windows["input_ids"][None], windows["attention_mask"][None])
            np.testing.assert_allclose(
                list(result["probabilities"].values()), probabilities(logits, temperature=0.4)[0], atol=1e-5, rtol=0
            )
            for name, value in piped.preprocess(text).items():
                assert torch.equal(value[0], windows[name]), text
    finally:
        model.config.update(before)


def test_what_cannot_be_read_is_refused(runner):
    nothing = np.zeros((2, 12), dtype=np.int64)
    with pytest.raises(ValueError, match="the document has no window"):
        runner.logits(nothing, nothing)
    with pytest.raises(ValueError, match="the encoder has 64 positions, not 65"):
        runner.logits(nothing[[0] * 63], nothing[[0] * 63] + 1)
    with pytest.raises(TypeError, match="a list of them, not a single one"):
        runner.predict("w7")
    for text, fault in ("w7\0", "NUL"), ("w7 \ud800", "surrogates"):
        with pytest.raises(ValueError, match=fault):
            runner.predict([text])
    with pytest.raises(ValueError, match="the text is empty"):
        runner.predict([" "])
    runner._tokenizer.normalizer = BertNormalizer()
    with pytest.raises(ValueError, match="the text shows nothing"):
        runner.predict(["\u200b"])
    runner._embeddings_VD = np.full_like(runner._embeddings_VD, np.inf)
    with pytest.raises(ValueError, match="window 0 of the document gives a state that is not finite"):
        runner.logits(nothing, nothing + 1)


@pytest.mark.parametrize("overlap", [0, 3])
def test_windows_are_cut_as_in_training(overlap):
    for tokens in range(40):
        arguments = np.arange(10, 10 + tokens), 9, 2, 3, 1, overlap
        for ours, theirs in zip(onnx_runner.cut_windows(*arguments), cut_windows(*arguments), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{tokens} tokens")


def test_a_text_file_is_read_as_in_prediction(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffTom &amp; Jerry<br />are <b>good</b>, 2 < 3 <!-- x -->\r\n<p>Ünd</p>".encode())
    [record] = checked_records([file], Columns("text", None, needs_label=False), "single_label")
    assert onnx_runner.read_text(file) == record.text == "Tom & Jerry\nare good, 2 < 3 \r\n\nÜnd\n"


@pytest.mark.filterwarnings("ignore")
def test_command_line_and_a_machine_without_torch(tmp_path, monkeypatch, capsys):
    """Exported with one option of the checkpoint's way of reading changed, and run where torch cannot be imported."""
    monkeypatch.chdir(tmp_path)
    options = {"problem_type": "multi_label_classification", "thresholds": [0.3, 0.6, 0.5], "num_repeats": 2, **MAPS}
    options["calibration_temperature"] = 2.5
    model = build(tiny_encoder("bert"), num_classes=None, carry="residual", aggregation="attention", **options)
    save_checkpoint(model, word_tokenizer(), {}, "saved")
    command = "--mode export --model_path saved/model.pt --output_dir served/onnx --max_windows 3 --max_len 25"
    assert main(command.split()) == 0, capsys.readouterr().err
    assert [path.name for path in Path("served").iterdir()] == ["onnx"]
    assert {path.name for path in Path("served/onnx").iterdir()} == FILES | {"enter_again.onnx"}
    for number, text in enumerate(TEXTS):
        Path(f"{number}.txt").write_text(text)
    forbid = "import runpy, sys; sys.modules.update(torch=None, transformers=None); del sys.argv[0]; "
    run = [sys.executable, "-c", forbid + "runpy.run_path(sys.argv[0], run_name='__main__')", "served/onnx/runner.py"]
    done = subprocess.run([*run, "0.txt", "1.txt", "2.txt"], capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    Path("empty.txt").write_text(" ")
    faulty = subprocess.run([*run, "none.txt", "empty.txt", "2.txt"], capture_output=True, text=True, env={})
    assert (faulty.returncode, faulty.stdout) == (1, done.stdout.splitlines(keepends=True)[2])
    assert [line.split(": ")[:2] for line in faulty.stderr.splitlines()] == [
        ["error", "none.txt"],
        ["error", "empty.txt"],
        ["2.txt", "25 of 200 tokens were read"],
    ]
    assert subprocess.run(run, capture_output=True, text=True, env={}).stderr == "usage: python runner.py FILE ...\n"
    model.config.update({"max_windows": 3, "max_len": 25})
    results = OnnxReBerta("served/onnx", threads=1).predict(TEXTS)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 3
    for number, (said, confidence, file) in enumerate(rows):
        scores = torch_probabilities(model, TEXTS[number], "multi_label")
        np.testing.assert_allclose(list(results[number]["probabilities"].values()), scores, atol=1e-5, rtol=0)
        expected = predicted_labels(scores[None], "multi_label", options["thresholds"])[0]
        assert said == "|".join(name for name, is_said in zip(LABELS, expected, strict=True) if is_said)
        assert float(confidence) == pytest.approx(np.where(expected, scores, 1 - scores).prod(), abs=1e-4)
        assert file == f"{number}.txt"
    assert json.loads(Path("served/onnx/config.json").read_text())["max_windows"] == 3
    assert main(command.split()) == 2
    assert "--output_dir served/onnx: is not empty; give another folder" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["--mode", "export", "--model_path", "x.pt", "--output_dir", str(tmp_path / "onnx")]) == 2
    assert "needs onnxscript: run `pip install onnx onnxscript onnxruntime`" in capsys.readouterr().err


def test_graphs_that_compute_something_else_are_refused(model, folder, tmp_path, monkeypatch, capsys):
    """Nothing appears in `--output_dir` then."""
    model = copy.deepcopy(model)
    save_checkpoint(model, word_tokenizer(), {}, tmp_path / "saved")
    monkeypatch.setattr("models.export.write_folder", lambda model, tokenizer, fresh: shutil.copytree(folder, fresh))
    arguments = ["--mode", "export", "--model_path", f"{tmp_path}/saved", "--output_dir", f"{tmp_path}/onnx"]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "onnx")
    with torch.no_grad():
        model.window_gate.bias.add_(1)
    save_checkpoint(model, word_tokenizer(), {}, tmp_path / "saved")
    assert main(arguments) == 4
    assert "do not compute what the model does: logits differ by" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()
