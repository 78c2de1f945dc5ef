"""Temperature and thresholds through the command line: fitted to validation data, and the same wherever they count."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from calibration import calibration_error, claims, fit_temperature, tune_thresholds
from data_utils.dataset import LongTextDataset
from main import main
from models.checkpoint import load_checkpoint_tokenizer, load_model_and_config
from models.pipeline import ReBertaPipeline
from tests.conftest import LABELS


class Trained(NamedTuple):
    """What a run left, and what its model says of the validation set, text by text."""

    several: bool
    model: Path
    validation: Path
    names: list[str]
    logits: np.ndarray
    labels: np.ndarray

    def probabilities(self, temperature: float) -> np.ndarray:
        return expit(self.logits / temperature) if self.several else softmax(self.logits / temperature, axis=1)


def report_of(model: Path, documents: Path, folder: Path) -> tuple[dict, np.ndarray, list[str]]:
    """metrics.json of an evaluation, and probabilities and predicted labels of predictions.csv."""
    paths = f"--model_path {model} --test_path {documents} --output_dir {folder} --cache_dir {folder}/cache"
    assert main(f"--mode evaluate {paths} --save_predictions --device cpu".split()) == 0
    return json.loads((folder / "metrics.json").read_text()), *table(folder / "predictions.csv")


def table(path: Path) -> tuple[np.ndarray, list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [[float(value) for name, value in row.items() if name.startswith("prob_")] for row in rows]
    return np.array(scores), [row["predicted"] for row in rows]


def write_corpus(path: Path, several: bool, seed: int) -> list[dict]:
    """60 documents, in which the word of a label that they have stands more often, but not always."""
    draw = random.Random(seed)
    rows = []
    for number in range(60):
        truth = [number % 2 == 0, number % 2 == 1, number % 3 == 0]
        words = [f"w{draw.choice([10, 11, *(5 + i for i, is_so in enumerate(truth) if is_so)])}" for _ in range(6)]
        names = [name for name, is_so in zip((*LABELS, "rare"), truth, strict=True) if is_so]
        rows.append({"text": " ".join(words * draw.randint(1, 9)), "label": names if several else names[0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module", params=["single_label", "multi_label"])
def trained(request, encoder_folder, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    several = request.param == "multi_label"
    write_corpus(folder / "train.jsonl", several, seed=0)
    rows = write_corpus(folder / "val.jsonl", several, seed=1)
    flags = f"--problem_type {request.param} --epochs 8 --learning_rate 1e-3 --probe_epochs 0"
    reading = "--window_size 12 --max_windows 4"
    paths = f"--train_path {folder}/train.jsonl --val_path {folder}/val.jsonl --model_path {encoder_folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(f"{flags} {reading} {paths} --cache_dir cache --output_dir logs/run --device cpu".split()) == 0
    saved = folder / "models" / "saved" / "run"
    model, _, maps = load_model_and_config(saved)
    tokenizer = load_checkpoint_tokenizer(saved)
    logits = []
    for row in rows:
        windows = LongTextDataset.preprocess_single_text(tokenizer, row["text"], 12, 4)
        with torch.inference_mode():
            logits.append(model(**{name: tensor[None] for name, tensor in windows.items()}).logits[0].numpy())
    names = list(maps["label2id"])
    labels = [[name in row["label"] for name in names] if several else names.index(row["label"]) for row in rows]
    truth = np.array(labels, dtype=np.float32 if several else np.int64)
    return Trained(several, saved, folder / "val.jsonl", names, np.array(logits), truth)


def test_what_validation_data_decide(trained, tmp_path):
    config = json.loads((trained.model / "config.json").read_text())
    temperature = config["calibration_temperature"]
    assert temperature == pytest.approx(fit_temperature(trained.logits, trained.labels), rel=1e-3)
    assert abs(temperature - 1) > 0.02
    metrics, scores, predicted = report_of(trained.model, trained.validation, tmp_path / "report")
    calibrated, raw = trained.probabilities(temperature), trained.probabilities(1)
    np.testing.assert_allclose(scores, calibrated, atol=1e-5)
    assert np.abs(calibrated - raw).max() > 1e-3
    assert metrics["temperature"] == temperature
    assert metrics["log_loss"] < metrics["log_loss_uncalibrated"]
    for name, expected in (("ece", calibrated), ("ece_uncalibrated", raw)):
        assert metrics[name] == pytest.approx(calibration_error(*claims(expected, trained.labels)), abs=1e-4)
    assert (tmp_path / "report" / "reliability.png").stat().st_size > 20_000
    if trained.several:
        thresholds = tune_thresholds(calibrated, trained.labels)
        assert config["thresholds"] == metrics["thresholds"] == pytest.approx(thresholds, abs=1e-5)
        said = scores >= config["thresholds"]
        expected = ["|".join(np.array(trained.names)[row]) for row in said]
    else:
        assert config["thresholds"] is None
        expected = [trained.names[place] for place in raw.argmax(1)]
    assert predicted == expected
    assert len(set(predicted)) > 1


def test_prediction_and_pipeline_say_the_same(trained, tmp_path):
    _, scores, predicted = report_of(trained.model, trained.validation, tmp_path / "report")
    paths = f"--model_path {trained.model}/model.pt --input_path {trained.validation} --output_path {tmp_path}/out.csv"
    assert main(f"--mode predict {paths} --device cpu".split()) == 0
    corpus_scores, corpus_predicted = table(tmp_path / "out.csv")
    np.testing.assert_allclose(corpus_scores, scores, atol=1e-5)
    assert corpus_predicted == predicted
    model = load_model_and_config(trained.model).model
    classify = ReBertaPipeline(model=model, tokenizer=load_checkpoint_tokenizer(trained.model))
    texts = [json.loads(line)["text"] for line in trained.validation.read_text().splitlines()]
    for row, results in zip(scores, classify(texts, top_k=None), strict=True):
        by_name = {result["label"]: result["score"] for result in results}
        np.testing.assert_allclose([by_name[name] for name in trained.names], row, atol=1e-5)


def test_a_model_of_before_is_read_as_it_was(trained, tmp_path):
    metrics, *_ = report_of(trained.model, trained.validation, tmp_path / "new")
    old = Path(shutil.copytree(trained.model, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["calibration_temperature"]
    (old / "config.json").write_text(json.dumps(config))
    before, scores, _ = report_of(old, trained.validation, tmp_path / "report")
    np.testing.assert_allclose(scores, trained.probabilities(1), atol=1e-5)
    assert before["temperature"] == 1
    assert before["log_loss"] == before["log_loss_uncalibrated"] == metrics["log_loss_uncalibrated"]
