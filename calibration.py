"""From logits to probabilities that can be taken at their word, and on to labels.

- `fit_temperature`, `tune_thresholds`: what validation data decide; the model's configuration keeps it
- `probabilities`, `predicted_labels`, `confidences`: from logits to one or several labels
- `log_losses`, `claims`, `calibration_error`: what the probabilities say against what is so
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_curve
from torch import nn

TEMPERATURES = (0.05, 20.0)
PRIOR = 10  # terms of the log loss that the prior of a temperature weighs as much as
CALIBRATION_BINS = 15


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number T to divide these logits of validation data by, so that probabilities are right (Guo et al., 2017).

    It minimises the log loss, summed over the documents, or over documents and classes with several labels a document,
    plus PRIOR (1 / T + log T). That is a Gamma(PRIOR + 1, PRIOR) prior on 1 / T: least at T = 1, so that the log loss
    of these documents never rises, and steep near 0, where a few documents that are all predicted right would drive T.
    The sum is convex in 1 / T.

    Args:
        logits: [n, C], finite.
        labels: [n] class indices, or [n, C] 0/1.

    Returns: T, from 0.05 to 20.
    """
    scores = torch.from_numpy(logits).double()
    several = labels.ndim == 2
    truth = torch.from_numpy(labels).double() if several else torch.from_numpy(labels)
    loss = nn.functional.binary_cross_entropy_with_logits if several else nn.functional.cross_entropy

    def cost(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return float(loss(scores / temperature, truth, reduction="sum")) + PRIOR * (1 / temperature + log_temperature)

    low, high = TEMPERATURES
    return math.exp(minimize_scalar(cost, bounds=(math.log(low), math.log(high)), method="bounded").x)


def probabilities(logits: np.ndarray, problem_type: str = "single_label", temperature: float = 1.0) -> np.ndarray:
    """[n, C], float64, of logits / temperature: softmax over the classes, or a sigmoid for each with `multi_label`."""
    scores = torch.from_numpy(logits).double() / temperature
    return (scores.sigmoid() if problem_type == "multi_label" else scores.softmax(-1)).numpy()


def predicted_labels(
    probabilities: np.ndarray, problem_type: str = "single_label", thresholds: Sequence[float] | None = None
) -> np.ndarray:
    """[n] class indices; with `multi_label` [n, C] 0/1, 1 from the class's threshold (0.5 by default) upwards."""
    if problem_type == "multi_label":
        return (probabilities >= (0.5 if thresholds is None else np.asarray(thresholds))).astype(np.int64)
    return probabilities.argmax(-1)


def confidences(probabilities: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[n], the probability of what is predicted; for several labels that of the set, taken as independent."""
    if predicted.ndim == 2:
        return np.where(predicted, probabilities, 1 - probabilities).prod(-1)
    return probabilities.max(-1)


def tune_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """For each class the threshold with the best F1 on these documents (validation data); 0.5 for a class without any.

    Any threshold from a score down to the next lower one, or 0, is as good here; the middle is taken, since new
    documents of the class may score a little lower.

    `probabilities` [n, C], `labels` [n, C] 0/1.
    """
    return [
        _best_threshold(scores, truth) if truth.any() else 0.5
        for scores, truth in zip(probabilities.T, labels.T, strict=True)
    ]


def _best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(f1[:-1].argmax())
    return float(np.append(0.0, thresholds)[best : best + 2].mean())


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n], of documents, for float64 probabilities; with labels [n, C] the mean over classes, of 36 at most for each,
    since so near to 1 they are rounded to it."""
    limits = np.finfo(float)
    if labels.ndim == 2:
        return -np.log(np.where(labels.astype(bool), probabilities, 1 - probabilities).clip(limits.eps)).mean(-1)
    return -np.log(probabilities[np.arange(len(labels)), labels].clip(limits.tiny))


def claims(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that were claimed, and whether it is so: of the likeliest class of each document, [n]; with labels
    [n, C] of each class of each document, [n * C]."""
    if labels.ndim == 2:
        return probabilities.ravel(), labels.ravel().astype(bool)
    return probabilities.max(-1), probabilities.argmax(-1) == labels


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al., 2017, eq. 5): mean gap of probability and frequency over equal bins."""
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(place, weights=outcomes - probabilities)).sum() / len(probabilities))
