"""Models to predict with, the command in this process, and what it leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import predict
from config import Settings
from data_utils.parts import Parts
from main import main
from models.checkpoint import save_checkpoint
from models.reberta import RecurrentRoBERTa
from tests.conftest import CLS, LABELS, word_tokenizer, write_corpus

DOCUMENTS = 23  # in parts of 5: the last one has 3


def save_model(folder: Path, encoder: Path, labels: tuple[str, ...] = LABELS, seed: int = 0, **changes) -> Path:
    """An untrained model that reads 4 windows of 12 tokens."""
    torch.manual_seed(seed)
    reading: dict[str, Any] = {"window_size": 12, "max_windows": 4}
    problem = changes.pop("problem_type", "single_label")
    maps = {"id2label": dict(enumerate(labels)), "label2id": {name: place for place, name in enumerate(labels)}}
    options = {**reading, **maps, "calibration_temperature": 0.6, **changes, "cls_token_id": CLS}
    options["problem_type"] = f"{problem}_classification"
    settings = Settings(**reading, problem_type=problem).model_dump(mode="json")
    model = RecurrentRoBERTa(encoder=str(encoder), **options)
    torch.nn.init.normal_(model.classifier.weight)  # so that confidences differ
    return save_checkpoint(model, word_tokenizer(), settings, folder)


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def objects_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def part_names() -> list[str]:
    return sorted(path.name for path in Path("out.csv.parts").glob("part-*"))


@pytest.fixture(scope="module")
def models(tmp_path_factory, encoder_folder) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "model", encoder_folder)
    save_model(folder / "other", encoder_folder, seed=1)
    several: dict[str, Any] = {"problem_type": "multi_label", "thresholds": [0.4, 0.5, 0.6]}
    save_model(folder / "several", encoder_folder, ("a", "b", "=c"), **several)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a corpus; parts of 5 documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 5)
    write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS)
    return tmp_path


@pytest.fixture
def run(models, capsys):
    """The command in this process: its exit code and console."""

    def run(arguments: str = "", output: str = "out.csv", inputs: str = "corpus.jsonl", model: str = "model"):
        paths = f"--model_path {models / model} --input_path {inputs} --output_path {output}"
        code = main(f"--mode predict {paths} --device cpu {arguments}".split())
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the parts that are written from here on."""
    numbers: list[int] = []
    write = Parts.write

    def spy(self, number, rows, counts):
        numbers.append(number)
        write(self, number, rows, counts)

    monkeypatch.setattr(Parts, "write", spy)
    return numbers
