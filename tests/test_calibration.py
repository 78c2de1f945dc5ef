"""Temperatures and thresholds that are the best there are, and what happens where data say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from scipy.special import expit, softmax

from calibration import (
    PRIOR,
    TEMPERATURES,
    calibration_error,
    claims,
    fit_temperature,
    predicted_labels,
    probabilities,
    tune_thresholds,
)
from calibration import log_losses as reported


def test_probabilities_and_labels():
    logits = np.array([[0.0, 0.0, np.log(2)], [200.0, -200.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(probabilities(logits)[0], [0.25, 0.25, 0.5], rtol=1e-6)
    assert predicted_labels(probabilities(logits)).tolist() == [2, 0]
    scores = probabilities(logits, "multi_label")
    np.testing.assert_allclose(scores[0], [0.5, 0.5, 2 / 3], rtol=1e-6)
    assert predicted_labels(scores, "multi_label").tolist() == [[1, 1, 1], [1, 0, 1]]
    assert predicted_labels(scores, "multi_label", [0.6, 0.5, 0.9]).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_tuned_thresholds_are_the_best_of_all():
    rng = np.random.default_rng(1)
    truth = rng.random((200, 4)) < [0.5, 0.1, 0.02, 0]
    scores = np.clip(0.3 * truth + rng.random((200, 4)) * 0.6, 0, 1)
    thresholds = tune_thresholds(scores, truth)
    for column in range(3):
        best = max(
            sklearn.metrics.f1_score(truth[:, column], scores[:, column] >= candidate)
            for candidate in scores[:, column]
        )
        assert sklearn.metrics.f1_score(truth[:, column], scores[:, column] >= thresholds[column]) == pytest.approx(
            best
        )
    assert thresholds[3] == 0.5  # no document has it
    assert all(type(threshold) is float for threshold in thresholds)


def test_a_tuned_threshold_lies_between_two_scores():
    """New documents of a class score a little lower than the weakest of these."""
    truth = np.array([[1], [1], [0], [0]])
    assert tune_thresholds(np.array([[0.9], [0.6], [0.3], [0.1]]), truth) == [pytest.approx(0.45)]
    assert tune_thresholds(np.array([[0.9], [0.6], [0.7], [0.1]]), truth) == [pytest.approx(0.35)]
    assert tune_thresholds(np.full((4, 1), 0.2), truth) == [pytest.approx(0.1)]  # below all of them, too


def test_calibration_error_by_hand_and_by_definition():
    assert calibration_error(np.array([0.9, 0.9, 0.9, 1.0]), np.array([1, 1, 0, 1]), bins=2) == pytest.approx(0.7 / 4)
    rng = np.random.default_rng(0)
    scores = rng.random(500)
    truth = rng.random(500) < scores**2
    slow = 0.0
    for low in np.arange(15) / 15:
        inside = (scores >= low) & (scores < low + 1 / 15)
        slow += inside.mean() * abs(truth[inside].mean() - scores[inside].mean())
    assert calibration_error(scores, truth) == pytest.approx(slow)


def test_claims():
    scores = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    likely, right = claims(scores, np.array([0, 0, 0]))
    assert likely.tolist() == [0.7, 0.6, 0.9]
    assert right.tolist() == [True, False, True]
    likely, right = claims(scores, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    assert likely.tolist() == [0.7, 0.3, 0.4, 0.6, 0.9, 0.1]
    assert right.tolist() == [True, False, False, False, True, True]


# the temperature


def sample(documents, problem_type, temperature=1.0, sharpness=2.0, seed=0):
    """Logits of four classes, and labels drawn from the probabilities that they give at this temperature."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(documents, 4)) * sharpness
    if problem_type == "multi_label":
        labels = (rng.random(scores.shape) < expit(scores)).astype(np.float32)
    else:
        labels = (scores + rng.gumbel(size=scores.shape)).argmax(1)
    return (scores * temperature).astype(np.float32), labels


def log_losses(logits, labels, temperature):
    """Of each document, or of each class of each document."""
    if labels.ndim == 2:
        return np.logaddexp(0, np.where(labels == 1, -1.0, 1.0) * logits / temperature).ravel()
    return -np.log(softmax(logits.astype(np.float64) / temperature, axis=1)[np.arange(len(labels)), labels])


def test_a_model_that_is_too_sure_of_itself_pays_for_it():
    """The log loss that is reported is the one that the temperature lowers, however small a probability."""
    logits = np.array([[8.0, 0.0]] * 99 + [[150.0, 0.0]], dtype=np.float32)
    labels = np.array([0] * 99 + [1])
    temperature = fit_temperature(logits, labels)
    before, after = (reported(probabilities(logits, temperature=t), labels).mean() for t in (1.0, temperature))
    assert before == pytest.approx(log_losses(logits, labels, 1.0).mean())
    assert after == pytest.approx(log_losses(logits, labels, temperature).mean())
    assert after < before


PROBLEMS = pytest.mark.parametrize("problem_type", ["single_label", "multi_label"])


@PROBLEMS
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found_and_calibrates_other_documents(problem_type, temperature):
    found = fit_temperature(*sample(4000, problem_type, temperature))
    assert found == pytest.approx(temperature, rel=0.05)
    logits, labels = sample(20_000, problem_type, temperature, seed=1)
    before, after = (calibration_error(*claims(probabilities(logits, problem_type, t), labels)) for t in (1.0, found))
    assert after < 0.02
    assert before > 0.1 or temperature == 1.0


@PROBLEMS
def test_the_temperature_is_the_least_of_all_and_the_log_loss_never_rises(problem_type):
    candidates = np.geomspace(*TEMPERATURES, 2001)
    found = []
    for seed in range(20):
        logits, labels = sample(2 + 3 * seed, problem_type, (0.2, 1.0, 5.0)[seed % 3], sharpness=1.0 + seed, seed=seed)
        temperature = fit_temperature(logits, labels)
        costs = [log_losses(logits, labels, t).sum() + PRIOR * (1 / t + np.log(t)) for t in candidates]
        assert temperature == pytest.approx(candidates[int(np.argmin(costs))], rel=4e-3)
        assert log_losses(logits, labels, temperature).sum() <= log_losses(logits, labels, 1.0).sum() + 1e-9
        found.append(temperature)
    assert min(found) < 0.65
    assert max(found) > 1.5


def test_documents_that_are_all_right_do_not_drive_it_to_nothing():
    labels = np.arange(50) % 2
    for gap, low, high in ((5, 0.993, 0.9995), (1, 0.88, 0.91), (0.01, 0.5, 0.52)):  # of the probability then
        logits = gap * np.eye(2, dtype=np.float32)[labels]
        temperature = fit_temperature(logits, labels)
        assert low < probabilities(logits, temperature=temperature).max(1)[0] < high, temperature


def test_the_temperature_stays_within_its_bounds():
    labels = np.zeros(100_000, dtype=np.int64)
    right = np.tile(np.array([[0.01, 0.0]], dtype=np.float32), (len(labels), 1))
    assert fit_temperature(right, labels) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert fit_temperature(-1000 * right, labels) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_without_any_evidence_it_is_1():
    assert fit_temperature(np.zeros((7, 3), dtype=np.float32), np.array([0, 1, 2] * 2 + [0])) == pytest.approx(
        1, rel=1e-3
    )


@PROBLEMS
def test_labels_stay_whatever_the_temperature(problem_type):
    """With thresholds that are tuned on the same probabilities, several labels too."""
    logits, labels = sample(200, problem_type)
    said = []
    for temperature in (0.5, 1.0, 3.0):
        scores = probabilities(logits, problem_type, temperature)
        thresholds = tune_thresholds(scores, labels) if problem_type == "multi_label" else None
        said.append(predicted_labels(scores, problem_type, thresholds))
        expected = expit(logits / temperature) if thresholds else softmax(logits / temperature, axis=1)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert (said[0] == said[1]).all()
    assert (said[2] == said[1]).all()
    assert len(np.unique(said[0])) > 1
