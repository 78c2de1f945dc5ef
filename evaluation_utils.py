"""Predictions of a model, what they are worth, and the report on them.

- `predict`: logits of a data set in its own order, whatever the order of the batches, and the windows that failed
- `failed_places`, `check_windows` (`check_documents`, `check_share`): windows that failed, and when that ends the run
- `classification_metrics`, `metrics_by_length`: scikit-learn's measures by class, averaged and by document length;
  log loss and calibration error
- `evaluate_model`: all of it, written to a folder as text, JSON, figures and, where asked, `predictions.csv`
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from calibration import calibration_error, claims, confidences, log_losses, predicted_labels, probabilities
from config import Settings
from data_utils.predictions import harmless, label_cell
from evaluation_report import MEASURES, MOST_NAMES, format_report
from files import atomic_path, write_text
from processes import gather, said_once
from utils import DataError, ModelError, TrainingError, error_handler, is_main_process, logger
from visualization_utils import save_class_metrics, save_confusion_matrix, save_reliability

LENGTH_EDGES = (512, 1024, 2048, 4096, 8192, 16384)
MAX_WINDOW_FAILURES: float = Settings.model_fields["max_window_failures"].default


@dataclass(frozen=True)
class Prediction:
    """What a model says of n documents, in the order of the data set."""

    logits: np.ndarray
    """[n, C], float32."""
    labels: np.ndarray | None
    """[n] class indices, or [n, C] 0/1; None if the data have none."""
    index: np.ndarray
    """[n] places in the data set, ascending."""
    windows: int
    failures: list[tuple[int, int]]
    """Place of the document and number of the window, of the windows that failed."""

    @property
    def failed_windows(self) -> int:
        return len(self.failures)


def predict(model: nn.Module, data_loader: DataLoader, device: torch.device | str) -> Prediction:
    """The logits of all documents of `data_loader`, whose batches are dicts such as `collate` makes.

    Batches may come in any order if they carry `index`; otherwise the order is that of the loader. Logits stay on the
    device until the end, so that it never waits for the host. A document all of whose windows failed has NaN logits.
    Several joined processes each have a share of the documents in their loader, and all of them get all predictions.

    Raises:
        DataError: the loader has no documents.
    """
    logits, failures, labels, index = [], [], [], []
    windows = documents = 0
    was_training = model.training
    model.eval()
    for batch in tqdm(data_loader, desc="predict", unit="batch", leave=False, disable=None):
        mask_BNW = batch["attention_mask"]
        with torch.inference_mode():
            output = model(
                input_ids=batch["input_ids"].to(device, non_blocking=True),
                attention_mask=mask_BNW.to(device, non_blocking=True),
            )
        logits.append(output.logits.float())
        failures.append(output.hidden_states.window_failures)
        labels += [batch["labels"]] if "labels" in batch else []
        index.append(batch.get("index", torch.arange(documents, documents + len(mask_BNW))))
        windows += int(mask_BNW.any(-1).sum())
        documents += len(mask_BNW)
    model.train(was_training)
    if not documents:
        raise DataError("there are no documents to predict: the data loader is empty; look at the data path")
    failed = failed_places(index, failures)
    own = (torch.cat(logits).cpu(), torch.cat(index), torch.cat(labels) if labels else None, failed, windows)
    all_logits, all_index, all_labels, all_failed, all_windows = zip(*gather(own), strict=True)
    index_n = torch.cat(all_index)
    order_n = index_n.argsort()
    return Prediction(
        logits=torch.cat(all_logits)[order_n].numpy(),
        labels=torch.cat(all_labels)[order_n].numpy() if labels else None,
        index=index_n[order_n].numpy(),
        windows=sum(all_windows),
        failures=sorted(chain(*all_failed)),
    )


def failed_places(index: Iterable[Tensor], failures: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Place of the document and number of the window, of all that failed: from [B] and [B, N] bool, batch by batch."""
    return [
        (int(index_B[row]), window)
        for index_B, failed_BN in zip(index, failures, strict=True)
        for row, window in failed_BN.nonzero().tolist()
    ]


def classification_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    label_names: Sequence[str],
    problem_type: str = "single_label",
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Plain numbers: `accuracy`, `{precision,recall,f1}_{macro,weighted}`, `log_loss`, `ece`, `ece_classwise`, and
    `per_class`, a list of `label`, `precision`, `recall`, `f1`, `support`.

    `ece` looks at the probability of the predicted class, `ece_classwise` is the mean over classes of the same for
    the class's own probability (Kull et al., 2019). With `multi_label` accuracy wants all labels of a document right,
    there are `*_micro` averages too, and `ece` looks at all classes of all documents. What would divide by zero is 0.

    Args:
        labels: [n] class indices, or [n, C] 0/1.
        probabilities: [n, C].
    """
    multi = problem_type == "multi_label"
    predicted = predicted_labels(probabilities, problem_type, thresholds)
    truth = labels.astype(np.int64)
    classes = _sklearn_labels(np.arange(len(label_names)), truth)
    metrics: dict[str, Any] = {"accuracy": float(accuracy_score(truth, predicted))}
    for average in ("macro", "weighted", "micro")[: 3 if multi else 2]:
        scores = precision_recall_fscore_support(truth, predicted, labels=classes, average=average, zero_division=0)
        metrics |= {f"{measure}_{average}": float(score) for measure, score in zip(MEASURES, scores, strict=False)}
    metrics |= _calibration_metrics(truth, probabilities, multi)
    columns = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    metrics["per_class"] = [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(support)}
        for name, p, r, f, support in zip(label_names, *columns, strict=True)
    ]
    return metrics


def _calibration_metrics(truth: np.ndarray, probabilities: np.ndarray, multi: bool) -> dict[str, float]:
    """`log_loss`, `ece` and `ece_classwise`."""
    truth_nC = truth if multi else np.eye(probabilities.shape[1], dtype=np.int64)[truth]
    return {
        "log_loss": float(log_losses(probabilities, truth).mean()),
        "ece": calibration_error(*claims(probabilities, truth)),
        "ece_classwise": float(np.mean(list(map(calibration_error, probabilities.T, truth_nC.T)))),
    }


def _sklearn_labels(classes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`labels=` for scikit-learn, which takes a single column of 0/1 for two classes."""
    return classes + 1 if truth.shape[1:] == (1,) else classes


def metrics_by_length(
    labels: np.ndarray,
    predicted: np.ndarray,
    token_counts: Sequence[int] | np.ndarray,
    edges: Sequence[int] = LENGTH_EDGES,
) -> list[dict[str, Any]]:
    """Scores of the documents with `from` <= tokens < `to` (None: no limit), for each such range that has documents.

    Macro F1 is over the classes that occur among the documents of the range.
    """
    tokens = np.asarray(token_counts)
    rows = []
    for low, high in zip((0, *edges), (*edges, None), strict=True):
        inside = (tokens >= low) & (tokens < (np.inf if high is None else high))
        if not inside.any():
            continue
        truth, said = labels[inside].astype(np.int64), predicted[inside]
        present = _sklearn_labels(np.flatnonzero(truth.any(0)) if truth.ndim == 2 else np.unique(truth), truth)
        f1 = f1_score(truth, said, labels=present, average="macro", zero_division=0) if len(present) else 0.0
        row = {"from": low, "to": high, "documents": int(inside.sum())}
        rows.append(row | {"accuracy": float(accuracy_score(truth, said)), "f1_macro": float(f1)})
    return rows


@error_handler()
def evaluate_model(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device | str,
    label_names: Sequence[str],
    log_dir: str | Path,
    *,
    problem_type: str | None = None,
    temperature: float | None = None,
    thresholds: Sequence[float] | None = None,
    max_window_failures: float = MAX_WINDOW_FAILURES,
    predictions_path: str | Path | None = None,
    overlap_with_training: int | None = None,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score `model` on labelled documents and write the report to `log_dir`.

    Writes `evaluation_results.txt`, `metrics.json`, `class_metrics.png`, `confusion_matrix.png`, `reliability.png`, and
    with `predictions_path` a CSV file: id, label, predicted, confidence, one probability a class. Problem type,
    `temperature` and `thresholds` are those that the model's configuration holds, the latter two fitted to its
    validation data (see `calibration`), where nothing else is given. Of the data set `ids`, `token_counts` (of all
    documents, in its order), `coverage()` and `skipped` are reported where it has them. `overlap_with_training` is how
    many of the documents the model was trained on, where that is known. With `about`, which model read what and how,
    the report begins.

    Returns: what metrics.json holds: `classification_metrics` of the calibrated probabilities, `temperature`, and
    `log_loss`, `ece` and `ece_classwise` without it (`*_uncalibrated`); `documents`, `windows`, `failed_windows`,
    `window_failures`, `by_length`, `coverage`, `bad_lines` (which the data set left out), `thresholds`,
    `overlap_with_training`, `about` where they are known.

    Raises:
        DataError: no documents, or none with a label.
        ModelError: as many labels as the model has classes are needed.
        TrainingError: a share of more than `max_window_failures` of the windows failed, or all those of a document.
    """
    dataset: Any = data_loader.dataset
    config = getattr(model, "config", None)
    known = getattr(config, "problem_type", None) or "single_label_classification"
    problem_type = problem_type or known.removesuffix("_classification")
    temperature = getattr(config, "calibration_temperature", 1.0) if temperature is None else temperature
    thresholds = getattr(config, "thresholds", None) if thresholds is None else thresholds

    prediction = predict(model, data_loader, device)
    if not is_main_process():
        return {}
    names = {i: dataset.ids[i] if hasattr(dataset, "ids") else str(i) for i in prediction.index.tolist()}
    labels = _checked_labels(prediction, names, label_names, max_window_failures)
    raw_scores = probabilities(prediction.logits, problem_type)
    scores = probabilities(prediction.logits, problem_type, temperature)
    predicted = predicted_labels(scores, problem_type, thresholds)
    metrics: dict[str, Any] = {} if about is None else {"about": dict(about)}
    metrics |= {"problem_type": problem_type, "documents": len(labels)}
    metrics |= classification_metrics(labels, scores, label_names, problem_type, thresholds)
    uncalibrated = _calibration_metrics(labels, raw_scores, problem_type == "multi_label")
    metrics |= {"temperature": temperature, **{f"{name}_uncalibrated": value for name, value in uncalibrated.items()}}
    metrics |= {"windows": prediction.windows, "failed_windows": prediction.failed_windows}
    metrics["window_failures"] = [{"document": names[i], "window": window} for i, window in prediction.failures]
    if hasattr(dataset, "token_counts"):
        metrics["by_length"] = metrics_by_length(labels, predicted, dataset.token_counts[prediction.index])
    if hasattr(dataset, "coverage"):
        metrics["coverage"] = dataset.coverage()
    if thresholds is not None:
        metrics["thresholds"] = list(thresholds)
    if hasattr(dataset, "skipped"):
        metrics["bad_lines"] = dataset.skipped
    if overlap_with_training is not None:
        metrics["overlap_with_training"] = overlap_with_training

    folder = Path(log_dir)
    if predictions_path is not None:
        _save_predictions(predictions_path, list(names.values()), labels, predicted, scores, label_names)
    write_text(folder / "metrics.json", json.dumps(metrics, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    write_text(folder / "evaluation_results.txt", format_report(metrics))
    save_class_metrics(metrics["per_class"], folder / "class_metrics.png")
    save_confusion_matrix(labels, predicted, folder / "confusion_matrix.png", label_names)
    curves = {
        f"temperature 1: calibration error {uncalibrated['ece']:.3f}": claims(raw_scores, labels),
        f"temperature {temperature:.3g}: calibration error {metrics['ece']:.3f}": claims(scores, labels),
    }
    save_reliability(curves, folder / "reliability.png")
    return metrics


def _checked_labels(
    prediction: Prediction, names: Mapping[int, str], label_names: Sequence[str], max_window_failures: float
) -> np.ndarray:
    """The labels as integers. Raises what `evaluate_model` raises; warns of the windows that failed, by name."""
    if prediction.labels is None:
        raise DataError("the documents have no labels to compare with; give a test set that has a label column")
    classes = prediction.logits.shape[1]
    if classes != len(label_names):
        raise ModelError(f"the model has {classes} classes, but {len(label_names)} label names came with it")
    check_windows(prediction, names, max_window_failures)
    return prediction.labels.astype(np.int64)


def check_windows(
    prediction: Prediction, names: Mapping[int, str] | Sequence[str], most: float, where: str = ""
) -> None:
    """`check_documents` and `check_share` of all that was read; what they say begins with `where`."""
    failures = check_documents(prediction, names, where)
    check_share(prediction.failed_windows, prediction.windows, most, failures, where)


def check_documents(prediction: Prediction, names: Mapping[int, str] | Sequence[str], where: str = "") -> str:
    """Warn of the windows that failed, and name them: MOST_NAMES of them, and how many more there are.

    Raises:
        TrainingError: nothing could be read of a document: its logits are not finite.
    """
    failures = [f"{names[i]}, window {window}" for i, window in prediction.failures[:MOST_NAMES]]
    for failure in failures:
        logger.warning("%s%s: its state is not finite", where, failure)
    if more := prediction.failed_windows - len(failures):
        failures.append(f"and {more:,} more windows")
        logger.warning("%s%s: their states are not finite", where, failures[-1])
    unreadable = prediction.index[~np.isfinite(prediction.logits).all(-1)].tolist()
    if unreadable:
        message = (
            f"{where}logits that are not finite in {len(unreadable)} of {len(prediction.index)} documents: "
            f"{', '.join(names[i] for i in unreadable[:MOST_NAMES])}; "
            "try full precision or --mixed_precision_type bf16, and another checkpoint if that does not help"
        )
        raise said_once(TrainingError(message))
    return "; ".join(failures)


def check_share(failed: int, windows: int, most: float, which: str, where: str = "") -> None:
    """Raise TrainingError if more than the share `most` of the windows failed."""
    if failed > most * windows:
        message = f"{where}{failed} of {windows} windows failed, a share over --max_window_failures {most:g}: {which}"
        raise said_once(TrainingError(message))


def _save_predictions(
    path: str | Path,
    ids: Sequence[str],
    labels: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
    label_names: Sequence[str],
) -> None:
    """One row a document."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", "confidence", *(f"prob_{name}" for name in label_names)])
        for name, truth, said, sure, row in zip(
            ids, labels, predicted, confidences(scores, predicted), scores, strict=True
        ):
            cells = [harmless(name), label_cell(truth, label_names), label_cell(said, label_names)]
            writer.writerow([*cells, float(sure), *row.tolist()])
