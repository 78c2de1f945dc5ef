"""evaluation_results.txt: what `evaluation_utils.evaluate_model` returns, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from figure_text import display_width, shorten

MEASURES = ("precision", "recall", "f1")
CALIBRATED = {"log_loss": "log loss", "ece": "calibration error", "ece_classwise": "error by class"}
MOST_NAMES = 20  # failures that are named in a log or report; all are counted


def format_report(metrics: Mapping[str, Any]) -> str:
    """Facts, scores by class and by length, and the windows that failed; `metrics` is what metrics.json holds."""
    documents, windows = metrics["documents"], metrics["windows"]
    correct = round(metrics["accuracy"] * documents)
    facts = [
        *metrics.get("about", {}).items(),
        ("documents", f"{documents:,}"),
        ("accuracy", f"{metrics['accuracy']:.4f} ({correct:,} of {documents:,} documents)"),
        *((f"F1 {average}", f"{metrics[f'f1_{average}']:.4f}") for average in _averages(metrics)),
        *_absent_classes(metrics),
        ("temperature", f"{metrics['temperature']:.4f}"),
        *(
            (fact, f"{metrics[name]:.4f} (uncalibrated {metrics[f'{name}_uncalibrated']:.4f})")
            for name, fact in CALIBRATED.items()
        ),
    ]
    if coverage := metrics.get("coverage"):
        read, total = coverage["tokens_read"], coverage["tokens_total"]
        facts.append(("tokens read", f"{read:,} of {total:,} ({coverage['share']:.1%})"))
        facts.append(("documents cut", f"{coverage['documents_truncated']:,}"))
    if metrics.get("bad_lines"):
        facts.append(("bad lines", f"{metrics['bad_lines']:,}, left out of all this"))
    if "overlap_with_training" in metrics:
        facts.append(("trained on too", f"{metrics['overlap_with_training']:,}"))
    facts.append(("windows failed", f"{metrics['failed_windows']:,} of {windows:,}"))
    width = max(len(name) for name, _ in facts)
    parts = ["\n".join(f"{name:<{width}}  {fact}" for name, fact in facts), _class_table(metrics)]
    if by_length := metrics.get("by_length"):
        rows = [(_range(row), f"{row['documents']:,}", *_numbers(row, ("accuracy", "f1_macro"))) for row in by_length]
        parts.append(_table([("tokens", "documents", "accuracy", "F1 of classes present"), *rows]))
    if failures := metrics["window_failures"]:
        lines = [f"{failure['document']}, window {failure['window']}" for failure in failures[:MOST_NAMES]]
        lines += [f"and {more:,} more, which metrics.json names"] if (more := len(failures) - MOST_NAMES) > 0 else []
        parts.append("\n".join(["windows that failed", "-------------------", *lines]))
    return "\n\n".join(parts) + "\n"


def _absent_classes(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What macro averages suffer from in a small test set."""
    absent = [row["label"] for row in metrics["per_class"] if not row["support"]]
    fact = f"{len(absent)} of {len(metrics['per_class'])} have no document here, and count as 0 in macro averages"
    return [("classes absent", fact)] if absent else []


def _averages(metrics: Mapping[str, Any]) -> list[str]:
    return [average for average in ("macro", "weighted", "micro") if f"f1_{average}" in metrics]


def _numbers(row: Mapping[str, float], keys: Sequence[str]) -> list[str]:
    return [f"{row[key]:.4f}" for key in keys]


def _class_table(metrics: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = [("class", "precision", "recall", "F1", "documents")]
    for row in metrics["per_class"]:
        rows.append((shorten(" ".join(row["label"].split()), 60), *_numbers(row, MEASURES), f"{row['support']:,}"))
    no_threshold = [""] if "thresholds" in metrics else []
    if "thresholds" in metrics:
        thresholds = [f"{threshold:.4f}" for threshold in metrics["thresholds"]]
        rows = [(*row, cell) for row, cell in zip(rows, ["threshold", *thresholds], strict=True)]
    for average in _averages(metrics):
        keys = [f"{measure}_{average}" for measure in MEASURES]
        rows.append((f"({average} average)", *_numbers(metrics, keys), f"{metrics['documents']:,}", *no_threshold))
    return _table(rows)


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['from']:,} and more" if row["to"] is None else f"{row['from']:,} to {row['to'] - 1:,}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by what is seen, the first to the left; a rule below the first row."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - display_width(first))]
        cells += [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
