"""A report whose files say the same, and predictions that any program can read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

import evaluation_utils
from data_utils.predictions import harmless
from evaluation_utils import classification_metrics, evaluate_model
from figure_text import display_width
from tests.evaluated import FILES, NAMES, Documents, Table, collate, loader, rows_of, sample
from utils import ReBertaError


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
