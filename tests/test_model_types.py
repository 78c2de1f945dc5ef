"""Each model type through the command line, in process: trained, gone on with, evaluated, used for prediction."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, XLMConfig

from main import main
from models.checkpoint import load_model_and_config
from models.reberta import RecurrentRoBERTa
from models.registry import freeze_except_last
from models.transformer import TransformerClassifier
from tests.conftest import write_corpus

SMALL = {"head": "--window_size 16", "head_tail": "--window_size 16"}
MANY = "--window_size 12 --max_windows 2"
EXPECTED = {
    "reberta": {"carry": "gru", "aggregation": "encoder", "read": "first", "max_windows": 2},
    "head": {"carry": "none", "aggregation": "mean", "read": "first", "max_windows": 1, "window_size": 16},
    "head_tail": {"carry": "none", "aggregation": "mean", "read": "head_tail", "max_windows": 1, "window_size": 16},
    "random_windows": {"carry": "none", "aggregation": "mean", "read": "random", "max_windows": 2},
    "mean": {"carry": "none", "aggregation": "mean", "read": "first", "max_windows": 2},
    "max": {"carry": "none", "aggregation": "max", "read": "first", "max_windows": 2},
    "tobert": {"carry": "none", "aggregation": "transformer", "read": "first", "max_windows": 2},
    "transformer": {"hidden_size": 128, "num_hidden_layers": 2, "read": "first", "vocab_size": 120, "max_windows": 2},
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", 16)
    write_corpus(tmp_path / "val.jsonl", 8, seed=1)
    return tmp_path


@pytest.fixture
def train(here, encoder_folder, blank_curves):
    """Train four steps of four documents with some flags; gives the run folder."""

    def start(flags: str, name: str, code: int = 0) -> Path:
        paths = f"--train_path train.jsonl --val_path val.jsonl --model_path {encoder_folder} --cache_dir cache"
        budget = "--mode train_steps --total_steps 6 --eval_every 3 --batch_size 4 --learning_rate 1e-3 --log_steps 1"
        assert main(f"{paths} {budget} --device cpu --output_dir logs/{name} {flags}".split()) == code
        return Path("logs") / name

    return start


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-6" / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", EXPECTED)
def test_trains_resumes_evaluates_and_predicts(train, here, model_type):
    """From a checkpoint in mid-epoch with one worker the weights are those of the run that nothing stopped."""
    flags = f"--model_type {model_type} {SMALL.get(model_type, MANY)} --use_augmentation"
    run = train(flags, "run")
    expected = final(run)
    shutil.rmtree(run / "checkpoint-6")
    train(f"{flags} --num_workers 1", "run")
    resumed = final(run)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    saved = Path("models/saved/run")
    model = load_model_and_config(saved).model
    assert type(model) is (TransformerClassifier if model_type == "transformer" else RecurrentRoBERTa)
    assert {name: getattr(model.config, name) for name in EXPECTED[model_type]} == EXPECTED[model_type]
    assert (
        main(f"--mode evaluate --model_path {saved} --test_path val.jsonl --output_dir report --cache_dir c".split())
        == 0
    )
    metrics = json.loads(Path("report/metrics.json").read_text())
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics["accuracy"] == max(row["eval_accuracy"] for row in losses if "eval_accuracy" in row)
    room = 14 if model_type in SMALL else 20
    lengths = [len(json.loads(line)["text"].split()) for line in Path("val.jsonl").read_text().splitlines()]
    assert metrics["coverage"]["tokens_read"] == sum(min(room, length) for length in lengths) < sum(lengths)
    assert (
        main(f"--mode predict --model_path {saved}/model.pt --input_path val.jsonl --output_path out.csv".split()) == 0
    )
    with Path("out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = [json.loads(line)["label"] for line in Path("val.jsonl").read_text().splitlines()]
    right = sum(row["predicted"] == label for row, label in zip(rows, truth, strict=True))
    assert right / len(truth) == metrics["accuracy"]
    assert [int(row["tokens_read"]) for row in rows] == [min(room, length) for length in lengths]


@pytest.mark.parametrize("level", [0, 2])
def test_frozen_layers_stay_what_they_were(train, encoder_folder, level):
    flags = f"--window_size 12 --max_windows 4 --freeze_except_last 1 --memory_level {level} --ema_decay 0.5"
    run = train(flags, "run")
    before, after = load_file(encoder_folder / "model.safetensors"), final(run)
    same = {name for name, value in before.items() if torch.equal(after[f"encoder.{name}"], value)}
    assert {name for name in before if "layer.1." not in name} == same
    state = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)
    moments = sum(len(group["params"]) for group in state["param_groups"])
    assert moments == len(after) - len(same) == len(state["state"])
    shutil.rmtree(run / "checkpoint-6")
    train(flags, "run")
    assert all(torch.equal(final(run)[name], value) for name, value in after.items())


def test_the_last_layer_is_whole_where_its_parts_lie_in_lists_of_their_own():
    encoder = AutoModel.from_config(XLMConfig(vocab_size=20, n_layers=3, n_heads=2, emb_dim=8))
    freeze_except_last(encoder, 1)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in encoder.named_parameters() if name.split(".")[1] == "2"}
    assert {name.split(".")[0] for name in trained} == {"attentions", "layer_norm1", "ffns", "layer_norm2"}


def test_more_layers_than_there_are(train, capsys):
    train(f"{MANY} --freeze_except_last 3", "run", code=2)
    assert "--freeze_except_last 3: the encoder has 2 layers" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_is_refused_where_an_encoder_is_needed(train, capsys):
    train(f"{MANY} --model_type transformer", "run")
    saved = "--model_path models/saved/run"
    assert main(f"--mode export {saved} --output_dir onnx".split()) == 2
    assert main(f"--mode evaluate {saved} --test_path val.jsonl --int8".split()) == 2
    assert main(f"--mode evaluate {saved} --test_path val.jsonl --window_overlap 3".split()) == 2
    train(f"{MANY} --model_type reberta {saved}", "other", code=2)
    said = capsys.readouterr().err
    for part in (
        "--mode export takes models with a window encoder",
        "--int8 is for models with a pretrained encoder",
        "window_overlap is 3; this model reads each token once",
        "models/saved/run has no encoder",
    ):
        assert part in said
    assert json.loads(Path("logs/run/settings.json").read_text())["fresh_lr_factor"] == 1
    for name, model_type in (("further", "--model_type transformer"), ("again", "")):
        train(f"{MANY} {model_type} {saved}", name)
        assert len(final(Path("logs") / name)) == len(final(Path("logs/run")))


def test_training_on_keeps_what_a_saved_model_is(train, capsys):
    train("--model_type mean --window_size 12 --max_windows 20", "mean")
    run = train("--model_path models/saved/mean --train_windows 18", "further")
    kept = {"model_type": "mean", "carry": "none", "aggregation": "mean", "window_size": 12, "max_windows": 20}
    settings = json.loads((run / "settings.json").read_text())
    assert {name: settings[name] for name in kept} == kept
    evaluation = "--mode evaluate --model_path models/saved/further --test_path val.jsonl --output_dir report"
    assert main(f"{evaluation} --model_type mean".split()) == 0
    train("--model_path models/saved/mean --train_windows 21", "more", code=2)
    train("--model_path models/saved/mean --model_type max", "other", code=2)
    said = capsys.readouterr().err
    train("--model_path models/saved/mean --carry gru", "carry", code=2)
    said += capsys.readouterr().err
    assert "was built with --carry none; leave these options out, or train from an encoder" in said
    assert "--train_windows is more than --max_windows" in said
    assert "was built with --aggregation mean; leave --model_type max out, or train from an encoder" in said

    train("--model_type head --window_size 16", "head")
    run = train("--model_type head --model_path models/saved/head", "head-further")
    assert json.loads((run / "settings.json").read_text())["window_size"] == 16
    train("--model_path models/saved/head --max_windows 2", "longer", code=2)
    assert "(as models/saved/head is; --model_type reberta reads otherwise)" in capsys.readouterr().err
    train("--model_path models/saved/head --model_type reberta --max_windows 2 --carry none --aggregation mean", "more")

    train("--window_size 12 --carry residual --alpha 0.7 --num_repeats 2 --global_alpha 0.5", "residual")
    train("--model_path models/saved/residual --alpha 0.7", "residual-further")
    train("--model_path models/saved/residual --model_type transformer", "tokenizer-alone")
    train("--model_path models/saved/residual --carry none", "closed", code=2)
    assert "models/saved/residual was built with --carry residual" in capsys.readouterr().err
