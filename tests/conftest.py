"""Tiny random encoders, a word-level tokenizer, a small corpus and runs on it, for all tests of models and engine."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedConfig, PreTrainedTokenizerFast, RobertaConfig

from command_line import parse_settings
from train import train
from train_by_steps import train_by_steps

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

VOCABULARY = 120
WIDTH = 32
UNK, PAD, CLS, SEP, MASK = range(5)
WORDS = range(5, VOCABULARY)
LABELS = ("early", "late")
TRAINING = 22  # documents of `run`, not a multiple of any batch size there
FLAGS = (
    "--window_size 12 --max_windows 6 --batch_size 4 --epochs 2 --learning_rate 1e-3 --dropout 0 --log_steps 1 "
    "--probe_epochs 0"
)
MODEL_CODE = {
    *("reberta.py", "configuration.py", "encoder.py", "gathered.py", "aggregation.py"),
    *("batch.py", "cell.py", "linear.py", "output.py", "pipeline.py"),
}
"""What is written beside the weights, so that transformers alone can load them."""


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def tiny_encoder(kind: str, **changes) -> PreTrainedConfig:
    """A two-layer encoder config of RoBERTa's or BERT's shape: 64 positions, width 32."""
    shape = {
        **SHAPE,
        "initializer_range": 0.3,  # large, so that what should differ does
        **changes,
    }
    if kind == "roberta":
        return RobertaConfig(max_position_embeddings=66, type_vocab_size=1, pad_token_id=PAD, **shape)
    return BertConfig(max_position_embeddings=64, pad_token_id=PAD, **shape)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w5 ... w119, each its own token, in RoBERTa's format."""
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    vocabulary = {**{word: i for i, word in enumerate(special.values())}, **{f"w{i}": i for i in WORDS}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write_corpus(path: Path, documents: int, seed: int = 0, words: tuple[int, int] = (5, 60)) -> Path:
    """Documents whose label is told by w5 or w6, somewhere among random words."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            label = number % 2
            text = [f"w{draw.choice(WORDS[2:])}" for _ in range(draw.randint(*words))]
            text.insert(draw.randrange(len(text)), f"w{5 + label}")
            row = {"id": f"{path.stem}-{number}", "text": " ".join(text), "label": LABELS[label]}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(params=["roberta", "bert"])
def encoder_config(request) -> PreTrainedConfig:
    return tiny_encoder(request.param)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A tiny RoBERTa with its tokenizer, as `--model_path` takes it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    AutoModel.from_config(tiny_encoder("roberta"), add_pooling_layer=False).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def blank_curves(monkeypatch) -> None:
    """Runs in this process leave an empty file of learning curves, whose drawing is more than half of a tiny run."""
    monkeypatch.setattr("engine.trainer.save_run_curves", lambda rows, path: Path(path).touch())


@pytest.fixture
def run(tmp_path, monkeypatch, encoder_folder, blank_curves):
    """Train in a fresh folder with some flags; gives what `train` gives."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "train.jsonl", TRAINING)
    write_corpus(tmp_path / "val.jsonl", 10, seed=1)

    def start(flags: str, name: str = "run"):
        files = {"--train_path": "train.jsonl", "--val_path": "val.jsonl"}  # where the flags name no others
        paths = " ".join(f"{option} {file}" for option, file in files.items() if option not in flags)
        paths += f" --model_path {encoder_folder} --cache_dir cache"
        argv = f"{FLAGS} {paths} --device cpu --output_dir logs/{name} {flags}".split()
        settings = parse_settings(_last_wins(argv))
        return train(settings) if settings.total_steps is None else train_by_steps(settings)

    return start


def _last_wins(argv: list[str]) -> list[str]:
    """Drop `--epochs` where the test gives a budget in steps."""
    if "--total_steps" in argv:
        at = argv.index("--epochs")
        argv = argv[:at] + argv[at + 2 :] + ["--mode", "train_steps"]
    return argv


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What `setup_logging` opened in a test is closed after it."""
    yield
    logger = logging.getLogger("reberta")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
