"""Predictions as rows of a file.

- CSV: several labels joined by "|", one column a class, and no cell that a spreadsheet takes for a formula
- JSON Lines: several labels as a list, the probabilities by class
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run such a cell (OWASP, CSV injection)
MARK = "'"

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


class Row(NamedTuple):
    """What is predicted of a document."""

    id: str
    predicted: np.ndarray
    """A class index, or 0/1 by class with several labels a document."""
    confidence: float
    probabilities: np.ndarray
    """[C]"""
    tokens: int
    tokens_read: int


class Format(NamedTuple):
    """A kind of file: what it begins with, and how rows are written; both take the names of the classes."""

    head: Callable[[Sequence[str]], str]
    lines: Callable[[Iterable[Row], Sequence[str]], str]


def label_names_of(said: np.ndarray, label_names: Sequence[str]) -> list[str]:
    """The labels that a class index, or a row of 0/1, stands for."""
    return [label_names[int(i)] for i in (np.flatnonzero(said) if said.ndim else [said])]


def label_cell(said: np.ndarray, label_names: Sequence[str]) -> str:
    """A document's label or labels in a CSV file."""
    return harmless("|".join(label_names_of(said, label_names)))


def harmless(cell: str) -> str:
    """`cell` with a MARK in front where a spreadsheet would take it for a formula; a number is none.

    One that begins with a MARK gets another, so that different cells stay different.
    """
    return MARK + cell if cell.startswith((MARK, *FORMULA_STARTS)) and not _NUMBER.fullmatch(cell) else cell


def _csv_head(label_names: Sequence[str]) -> str:
    scores = [f"prob_{name}" for name in label_names]
    return _csv_text([["id", "predicted", "confidence", *scores, "tokens", "tokens_read"]])


def _csv_lines(rows: Iterable[Row], label_names: Sequence[str]) -> str:
    return _csv_text(
        [
            *(harmless(row.id), label_cell(row.predicted, label_names), row.confidence),
            *(*row.probabilities.tolist(), row.tokens, row.tokens_read),
        ]
        for row in rows
    )


def _csv_text(table: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    return text.getvalue()


def _json_lines(rows: Iterable[Row], label_names: Sequence[str]) -> str:
    return "".join(json.dumps(_json_row(row, label_names), ensure_ascii=False) + "\n" for row in rows)


def _json_row(row: Row, label_names: Sequence[str]) -> dict[str, object]:
    names = label_names_of(row.predicted, label_names)
    return {
        "id": row.id,
        "predicted": names if row.predicted.ndim else names[0],
        "confidence": row.confidence,
        "probabilities": dict(zip(label_names, row.probabilities.tolist(), strict=True)),
        "tokens": row.tokens,
        "tokens_read": row.tokens_read,
    }


FORMATS = {".csv": Format(_csv_head, _csv_lines), ".jsonl": Format(lambda label_names: "", _json_lines)}
