"""Predictions in the order of the data, scores by hand, and which failures end a run."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch

from calibration import predicted_labels, probabilities
from evaluation_utils import check_share, classification_metrics, evaluate_model, metrics_by_length, predict
from tests.evaluated import NAMES, Documents, Table, loader, sample
from utils import DataError, ModelError, TrainingError


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


# what a model carries, and what ends a run


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
