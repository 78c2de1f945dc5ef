"""Predictions in the order of the data, scores by hand, and a report whose files say the same."""

from __future__ import annotations

import csv
import json
import logging
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import evaluation_utils
from calibration import predicted_labels, probabilities
from data_utils.predictions import harmless
from evaluation_utils import check_share, classification_metrics, evaluate_model, metrics_by_length, predict
from figure_text import display_width
from utils import DataError, ModelError, ReBertaError, TrainingError

NAMES = ["economy", "外交与国防", "=sport, and\ta rather long name for a class of documents, or not"]
FILES = ["class_metrics.png", "confusion_matrix.png", "evaluation_results.txt", "metrics.json", "reliability.png"]


class Hidden(NamedTuple):
    window_failures: torch.Tensor


class Output(NamedTuple):
    logits: torch.Tensor
    hidden_states: Hidden


class Table(nn.Module):
    """Logits and failures by the number of the document, which is its first token."""

    def __init__(self, logits, failures=()):
        super().__init__()
        self.logits = torch.as_tensor(logits).bfloat16()
        self.failures = set(failures)
        self.modes = set()

    def forward(self, input_ids, attention_mask):
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        documents = input_ids[:, 0, 0]
        failed = torch.zeros(input_ids.shape[:2], dtype=torch.bool)
        for row, document in enumerate(documents.tolist()):
            for window in range(input_ids.shape[1]):
                failed[row, window] = (document, window) in self.failures
        return Output(self.logits[documents], Hidden(failed))


class Documents(Dataset):
    """`windows[i]` windows of four tokens for document i."""

    def __init__(self, labels, windows=None, with_index=True):
        self.labels, self.with_index = labels, with_index
        self.windows = windows if windows is not None else [1 + (5 * i) % 4 for i in range(len(labels))]
        self.ids = [f"doc-{i}" for i in range(len(self.windows))]
        self.token_counts = np.array([400 * n for n in self.windows])

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        item = {
            "input_ids": torch.full((self.windows[i], 4), i),
            "attention_mask": torch.ones(self.windows[i], 4).long(),
        }
        if self.labels is not None:
            item["labels"] = torch.as_tensor(self.labels[i])
        return item | ({"index": i} if self.with_index else {})

    def coverage(self):
        total = int(self.token_counts.sum())
        return {"tokens_total": total, "tokens_read": total // 4, "share": total // 4 / total, "documents_truncated": 7}


def collate(items):
    def padded(key):
        return nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)

    batch = {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask")}
    for key in ("labels", "index"):
        if key in items[0]:
            batch[key] = (
                torch.as_tensor([item[key] for item in items])
                if key == "index"
                else torch.stack([item[key] for item in items])
            )
    return batch


def loader(dataset, batch_size=4, order=None):
    order = np.argsort(dataset.windows, kind="stable")[::-1].tolist() if order is None else order
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


def sample(documents=30, classes=3, seed=0):
    """Labels, and bfloat16 logits that are right in most cases."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, documents)
    logits = rng.normal(size=(documents, classes)) + 2 * np.eye(classes)[labels]
    return labels, logits.astype(np.float32)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reberta"), "propagate", True)
    caplog.set_level(logging.WARNING, "reberta")
    return caplog


# predict


def test_predict_gives_the_order_of_the_data_whatever_the_batches():
    labels, logits = sample()
    model = Table(logits).train()
    prediction = predict(model, loader(Documents(labels)), "cpu")
    slow = [model(torch.full((1, 1, 4), i), torch.ones(1, 1, 4)).logits[0].float().tolist() for i in range(30)]
    assert prediction.logits.tolist() == slow
    assert prediction.logits.dtype == np.float32
    assert prediction.labels.tolist() == labels.tolist()
    assert prediction.index.tolist() == list(range(30))
    assert prediction.windows == sum(Documents(labels).windows)  # padding windows do not count
    assert (prediction.failed_windows, prediction.failures) == (0, [])
    assert model.training
    assert (False, True) in model.modes


def test_predict_without_index_keeps_the_order_of_the_loader():
    labels, logits = sample(6)
    order = [5, 3, 1, 0, 2, 4]
    prediction = predict(Table(logits), loader(Documents(labels, with_index=False), order=order), "cpu")
    assert prediction.labels.tolist() == labels[order].tolist()
    assert prediction.index.tolist() == list(range(6))


def test_predict_a_part_of_the_documents():
    labels, logits = sample(6)
    prediction = predict(Table(logits), loader(Documents(labels), order=[4, 1]), "cpu")
    assert prediction.index.tolist() == [1, 4]
    assert prediction.labels.tolist() == labels[[1, 4]].tolist()


def test_predict_finds_all_failed_windows():
    labels, logits = sample(30)
    dataset = Documents(labels, windows=[2 if i % 2 else 1 for i in range(30)])
    failed = [(i, window) for i in range(30) for window in range(dataset.windows[i])][:25]
    prediction = predict(Table(logits, failed), loader(dataset), "cpu")
    assert prediction.failed_windows == 25
    assert prediction.failures == failed


def test_predict_without_labels():
    assert predict(Table(sample(3)[1]), loader(Documents(None, windows=[1, 2, 1])), "cpu").labels is None


def test_predict_nothing_is_an_error():
    with pytest.raises(DataError, match="no documents to predict"):
        predict(Table(sample(3)[1]), loader(Documents([])), "cpu")


# scores


def test_metrics_by_hand():
    scores = np.array([[0.7, 0.2, 0.1, 0.0], [0.6, 0.3, 0.1, 0.0], [0.1, 0.8, 0.1, 0.0], [0.2, 0.2, 0.6, 0.0]])
    metrics = classification_metrics(np.array([0, 1, 1, 2]), scores, ["a", "b", "c", "d"])
    assert metrics["per_class"] == [
        {"label": "a", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        {"label": "b", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
        {"label": "c", "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1},
        {"label": "d", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},  # in no document: counts as 0
    ]
    assert metrics["accuracy"] == 0.75
    assert metrics["precision_macro"] == 0.625
    assert metrics["recall_macro"] == 0.625
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 4)
    assert metrics["f1_weighted"] == pytest.approx((2 / 3 + 2 * 2 / 3 + 1) / 4)
    assert metrics["log_loss"] == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.6]).mean())
    assert metrics["ece"] == pytest.approx((0.3 + abs(-0.6 + 0.4) + 0.2) / 4)  # 0.6 twice in one bin: one right of two
    json.dumps(metrics, allow_nan=False)  # plain numbers


def test_log_loss_is_that_of_scikit_learn():
    labels, logits = sample(200)
    scores = probabilities(logits * 10)
    metrics = classification_metrics(labels, scores, NAMES)
    assert metrics["log_loss"] == pytest.approx(sklearn.metrics.log_loss(labels, scores, labels=range(3)))


def test_metrics_of_several_labels():
    truth = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=np.float32)
    scores = np.array([[0.9, 0.2, 0.8], [0.1, 0.6, 0.7], [0.9, 0.3, 0.1]])
    metrics = classification_metrics(truth, scores, ["a", "b", "c"], "multi_label")
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # all labels of the document right
    assert metrics["precision_micro"] == 4 / 5
    assert metrics["recall_micro"] == 4 / 5
    assert [row["f1"] for row in metrics["per_class"]] == pytest.approx([1, 2 / 3, 2 / 3])
    assert [row["support"] for row in metrics["per_class"]] == [2, 2, 1]
    assert metrics["log_loss"] == pytest.approx(-np.log(np.where(truth == 1, scores, 1 - scores)).mean())
    tuned = classification_metrics(truth, scores, ["a", "b", "c"], "multi_label", [0.5, 0.3, 0.75])
    assert tuned["accuracy"] == 1.0


def test_metrics_of_one_label_that_a_document_may_have():
    truth, scores = np.array([[1], [1], [0], [0]]), np.array([[0.9], [0.4], [0.2], [0.7]])
    metrics = classification_metrics(truth, scores, ["a"], "multi_label", [0.3])
    expected = {"label": "a", "precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2}
    assert metrics["per_class"] == [expected]
    assert metrics["f1_macro"] == metrics["f1_micro"] == pytest.approx(0.8)
    (row,) = metrics_by_length(truth, predicted_labels(scores, "multi_label", [0.3]), [1, 2, 3, 4])
    assert row["f1_macro"] == pytest.approx(0.8)


def test_metrics_by_length():
    labels, predicted = np.array([0, 1, 1, 0, 2]), np.array([0, 1, 0, 0, 1])
    assert metrics_by_length(labels, predicted, [0, 511, 512, 20_000, 16_384]) == [
        {"from": 0, "to": 512, "documents": 2, "accuracy": 1.0, "f1_macro": 1.0},
        {"from": 512, "to": 1024, "documents": 1, "accuracy": 0.0, "f1_macro": 0.0},
        {"from": 16384, "to": None, "documents": 2, "accuracy": 0.5, "f1_macro": 0.5},
    ]
    several = metrics_by_length(np.eye(3)[labels], np.eye(3, dtype=int)[predicted], [9, 9, 9, 9, 9], edges=(10,))
    assert several == [
        {"from": 0, "to": 10, "documents": 5, "accuracy": 0.6, "f1_macro": pytest.approx((0.8 + 0.5 + 0) / 3)}
    ]
    none = metrics_by_length(np.zeros((1, 3)), np.zeros((1, 3), dtype=int), [9], edges=(10,))
    assert none == [{"from": 0, "to": 10, "documents": 1, "accuracy": 1.0, "f1_macro": 0.0}]


# the report


def test_files_say_the_same(tmp_path):
    labels, logits = sample(60)
    report = tmp_path / "report"
    metrics = evaluate_model(
        Table(logits), loader(Documents(labels)), "cpu", NAMES, report, predictions_path=report / "predictions.csv"
    )
    assert sorted(path.name for path in report.iterdir()) == sorted([*FILES, "predictions.csv"])
    assert json.loads((report / "metrics.json").read_text(encoding="utf-8")) == metrics

    rows = rows_of(report / "predictions.csv")
    assert [row["id"] for row in rows] == [f"doc-{i}" for i in range(60)]
    right = sum(row["label"] == row["predicted"] for row in rows)
    text = (report / "evaluation_results.txt").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert line.split(maxsplit=1)[1] == f"{right / 60:.4f} ({right} of 60 documents)"
    assert metrics["accuracy"] == right / 60
    assert 0.5 < metrics["accuracy"] < 1

    scores = np.array([[float(row[f"prob_{name}"]) for name in NAMES] for row in rows])
    written = [NAMES.index(row["label"].removeprefix("'")) for row in rows]
    assert written == labels.tolist()
    again = classification_metrics(np.array(written), scores, NAMES)
    assert again == {key: metrics[key] for key in again}
    assert [float(row["confidence"]) for row in rows] == scores.max(1).tolist()
    for average in ("macro", "weighted"):
        assert f"F1 {average}" in text
        assert f"{metrics[f'precision_{average}']:.4f}" in text


def test_the_text_is_for_people(tmp_path):
    labels, logits = sample(60)
    dataset = Documents(labels)
    evaluate_model(Table(logits, {(3, 0)}), loader(dataset), "cpu", NAMES, tmp_path)
    text = (tmp_path / "evaluation_results.txt").read_text(encoding="utf-8")
    assert "tokens read        15,000 of 60,000 (25.0%)" in text
    assert "documents cut      7\n" in text
    assert "windows failed     1 of 150" in text
    assert "doc-3, window 0" in text
    facts, by_class, by_length, failures = text.split("\n\n")
    lines = by_class.splitlines()
    assert len(lines) == 2 + 3 + 2
    assert len({display_width(line) for line in lines}) == 1  # aligned, Chinese too
    assert lines[3].startswith("外交与国防  ")
    assert [line.split("  ")[0] for line in by_length.splitlines()[2:]] == [
        "0 to 511",
        "512 to 1,023",
        "1,024 to 2,047",
    ]
    assert facts.startswith("documents          60\n")
    assert failures.startswith("windows that failed\n")


def test_several_labels(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 3)) < 0.4).astype(np.float32)
    logits = (3 * (labels - 0.5) + rng.normal(size=(40, 3))).astype(np.float32)
    thresholds = [0.3, 0.5, 0.7]
    path = tmp_path / "predictions.csv"
    metrics = evaluate_model(
        Table(logits),
        loader(Documents(labels)),
        "cpu",
        ["a", "b", "c"],
        tmp_path,
        problem_type="multi_label",
        thresholds=thresholds,
        predictions_path=path,
    )
    rows = rows_of(path)
    for row, truth in zip(rows, labels, strict=True):
        scores = np.array([float(row[f"prob_{name}"]) for name in "abc"])
        said = scores >= thresholds
        assert row["label"] == "|".join(np.array(["a", "b", "c"])[truth == 1])
        assert row["predicted"] == "|".join(np.array(["a", "b", "c"])[said])
        assert float(row["confidence"]) == pytest.approx(np.where(said, scores, 1 - scores).prod())
    assert metrics["accuracy"] == np.mean([row["label"] == row["predicted"] for row in rows])
    assert metrics["thresholds"] == thresholds
    report = (tmp_path / "evaluation_results.txt").read_text(encoding="utf-8")
    assert "(micro average)" in report
    header, _, *classes = report.split("\n\n")[1].splitlines()[:5]
    assert header.split()[-1] == "threshold"
    assert [float(line.split()[-1]) for line in classes] == thresholds
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*FILES, "predictions.csv"])


@pytest.mark.parametrize("problem_type", ["single_label", "multi_label"])
def test_calibrated_and_not(tmp_path, problem_type):
    """What is written at a temperature is what logits that were divided by it give without one."""
    labels, logits = sample(60)
    truth = np.eye(3, dtype=np.float32)[labels] if problem_type == "multi_label" else labels
    reports = {}
    for name, scale, temperature in (("calibrated", 1, 4.0), ("divided", 4, 1.0), ("raw", 1, 1.0)):
        reports[name] = evaluate_model(
            Table(logits / scale),  # by 4: exact in bfloat16
            loader(Documents(truth)),
            "cpu",
            NAMES,
            tmp_path / name,
            problem_type=problem_type,
            temperature=temperature,
            predictions_path=tmp_path / name / "predictions.csv",
        )
    rows = {name: rows_of(tmp_path / name / "predictions.csv") for name in reports}
    assert rows["calibrated"] == rows["divided"] != rows["raw"]
    calibrated, divided, raw = (reports[name] for name in ("calibrated", "divided", "raw"))
    assert (calibrated["temperature"], raw["temperature"]) == (4.0, 1.0)
    for name in ("log_loss", "ece", "ece_classwise"):
        assert calibrated[name] == divided[name] == divided[f"{name}_uncalibrated"]
        assert calibrated[f"{name}_uncalibrated"] == raw[name] == raw[f"{name}_uncalibrated"] != calibrated[name]
    assert calibrated["accuracy"] == raw["accuracy"]
    text = (tmp_path / "calibrated" / "evaluation_results.txt").read_text(encoding="utf-8")
    assert "temperature        4.0000\n" in text
    for fact, name in (("log loss", "log_loss"), ("calibration error", "ece"), ("error by class", "ece_classwise")):
        assert f"{fact:<19}{calibrated[name]:.4f} (uncalibrated {raw[name]:.4f})\n" in text
    sizes = {name: (tmp_path / name / "reliability.png").stat().st_size for name in reports}
    assert min(sizes.values()) > 20_000
    assert sizes["calibrated"] > sizes["raw"]  # two curves, not one


@pytest.mark.parametrize("number", ["-1", "+1", "-0.5", "12"])
def test_a_number_is_no_formula(number):
    assert harmless(number) == number


def test_different_cells_stay_different():
    cells = ["@x", "'@x", "''@x", "x", "'x", "-1", "'-1"]
    assert len(set(map(harmless, cells))) == len(cells)
    assert harmless("it's") == "it's"


@pytest.mark.parametrize("cell", ["=1+1", "+1+1", "-1-1", "-x", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_is_a_formula(tmp_path, cell):
    dataset = Documents([0, 1])
    dataset.ids = [cell, "x"]
    path = tmp_path / "predictions.csv"
    model = Table([[1.0, 0.0], [0.0, 1.0]])
    evaluate_model(model, loader(dataset), "cpu", [cell, "b"], tmp_path, predictions_path=path)
    first, second = rows_of(path)
    assert first["id"] == first["label"] == first["predicted"] == f"'{cell}"
    assert second["label"] == "b"


def test_predictions_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "predictions.csv"
    path.write_text("old")

    def fail_at_last(cell):
        if cell == "doc-29":
            raise OSError(28, "No space left on device")
        return cell

    monkeypatch.setattr(evaluation_utils, "harmless", fail_at_last)
    labels, logits = sample()
    with pytest.raises(ReBertaError, match="the disk is full"):
        evaluate_model(Table(logits), loader(Documents(labels)), "cpu", NAMES, tmp_path, predictions_path=path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


def test_a_part_of_the_documents_keeps_its_names_and_lengths(tmp_path):
    labels, logits = sample(6)
    dataset = Documents(labels, windows=[1, 1, 1, 1, 9, 1])
    path = tmp_path / "predictions.csv"
    metrics = evaluate_model(
        Table(logits), loader(dataset, order=[4, 1]), "cpu", NAMES, tmp_path, predictions_path=path
    )
    assert [row["id"] for row in rows_of(path)] == ["doc-1", "doc-4"]
    assert [row["from"] for row in metrics["by_length"]] == [0, 2048]


def test_a_data_set_that_knows_nothing_of_itself(tmp_path):
    labels, logits = sample(6)
    dataset = Documents(labels)
    items = [dataset[i] for i in range(6)]
    path = tmp_path / "predictions.csv"
    metrics = evaluate_model(
        Table(logits), DataLoader(items, collate_fn=collate), "cpu", NAMES, tmp_path, predictions_path=path
    )
    assert [row["id"] for row in rows_of(path)] == list("012345")
    assert not {"by_length", "coverage", "thresholds"} & set(metrics)


def test_failed_windows_are_reported_by_name(tmp_path, logged):
    labels, logits = sample(30)
    metrics = evaluate_model(
        Table(logits, {(7, 1), (2, 0)}), loader(Documents(labels)), "cpu", NAMES, tmp_path, max_window_failures=0.03
    )
    assert metrics["failed_windows"] == 2
    assert metrics["windows"] == 73
    assert metrics["window_failures"] == [{"document": "doc-2", "window": 0}, {"document": "doc-7", "window": 1}]
    assert [message for message in logged.messages if message.startswith("doc-")] == [
        "doc-2, window 0: its state is not finite",
        "doc-7, window 1: its state is not finite",
    ]


def test_of_many_failed_windows_some_are_named_and_all_are_listed(tmp_path, logged):
    labels, logits = sample(30)
    failures = {(document, 0) for document in range(25)}
    metrics = evaluate_model(
        Table(logits, failures), loader(Documents(labels)), "cpu", NAMES, tmp_path, max_window_failures=0.5
    )
    assert len(metrics["window_failures"]) == metrics["failed_windows"] == 25
    assert "and 5 more windows: their states are not finite" in logged.messages
    assert "and 5 more, which metrics.json names" in (tmp_path / "evaluation_results.txt").read_text()


def test_what_the_model_carries_is_the_default(tmp_path):
    labels = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    model = Table(np.array([[2.0, -1, -2], [-2, 1, 0.5], [1, 2, -1]]))
    model.config = SimpleNamespace(
        problem_type="multi_label_classification", calibration_temperature=1.7, thresholds=[0.4, 0.5, 0.6]
    )
    metrics = evaluate_model(model, loader(Documents(labels)), "cpu", NAMES, tmp_path)
    assert (metrics["problem_type"], metrics["temperature"]) == ("multi_label", 1.7)
    assert metrics["thresholds"] == [0.4, 0.5, 0.6]


def test_too_many_failed_windows_end_the_run(tmp_path):
    labels, logits = sample(30)
    with pytest.raises(TrainingError, match=r"2 of 73 windows failed.*0.02: doc-2, window 0; doc-7, window 1"):
        evaluate_model(
            Table(logits, {(7, 1), (2, 0)}), loader(Documents(labels)), "cpu", NAMES, tmp_path, max_window_failures=0.02
        )
    assert not list(tmp_path.iterdir())
    for failed, windows, most in (0, 73, 0.0), (2, 100, 0.02):  # as many as may fail
        check_share(failed, windows, most, "")


def test_a_document_without_any_readable_window_ends_the_run(tmp_path):
    labels, logits = sample(30)
    logits[4, 1] = np.nan  # one is enough
    with pytest.raises(TrainingError, match="logits that are not finite in 1 of 30 documents: doc-4; try"):
        evaluate_model(Table(logits), loader(Documents(labels)), "cpu", NAMES, tmp_path)


def test_labels_must_be_those_of_the_model(tmp_path):
    labels, logits = sample(4)
    with pytest.raises(ModelError, match="3 classes, but 2 label names"):
        evaluate_model(Table(logits), loader(Documents(labels)), "cpu", ["a", "b"], tmp_path)
    with pytest.raises(DataError, match="no labels to compare with"):
        evaluate_model(Table(logits), loader(Documents(None, windows=[1] * 4)), "cpu", NAMES, tmp_path)
