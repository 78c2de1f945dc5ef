"""benchmarks/linear.py through its command line, on a corpus whose answers are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import linear, tfidf_svm
from benchmarks.corpora import Document, write_fold
from benchmarks.linear import main, summary
from benchmarks.tfidf_svm import fit

LABELS = ("war", "peace", "trade")


def document(number: int, words: int, tokens: int) -> Document:
    """The word that says the label comes after `words` words that say nothing."""
    draw = random.Random(number)
    label = LABELS[number % 3]
    filler = " ".join(draw.choices(["the", "of", "and", "union", "states"], k=words))
    return Document(id=str(number), text=f"{filler} {label}", label=label, tokens=tokens)


def make_fold(first: int = 0) -> dict[str, list[Document]]:
    sizes = {"train": 30, "validation": 9, "test": 12}
    starts = {"train": first, "validation": first + 30, "test": first + 39}
    return {
        part: [document(n, words=20, tokens=600 if n % 2 else 100) for n in range(starts[part], starts[part] + size)]
        for part, size in sizes.items()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two folds of `sotu-era`, which lie where they would be made."""
    corpus = tmp_path / "corpora" / "sotu-era"
    corpus.mkdir(parents=True)
    for number in range(2):
        write_fold(corpus / f"fold-{number}", make_fold(100 * number))
    return tmp_path


def test_figures_of_a_corpus_that_is_decided_late(folder, capsys):
    output = folder / "linear.json"
    arguments = ["sotu-era", "--corpora", str(folder / "corpora"), "--words", "20", "--output", str(output)]
    main(arguments)
    table = capsys.readouterr().out
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["options"]["C"] == [1, 3, 0.3, 10, 0.1, 30, 100]
    assert [(row["corpus"], row["fold"], row["words"]) for row in content["rows"]] == [
        ("sotu-era", fold, words) for fold in ("fold-0", "fold-1") for words in ("20", "whole")
    ]
    for row in content["rows"]:
        assert (row["documents"], row["long"]) == (12, 6)
        if row["words"] == "whole":
            assert row["C"] == 1  # all are equal, the first is taken
            assert row["held_out_accuracy"] == row["accuracy"] == row["f1_macro"] == row["accuracy_long"] == 1
        else:
            assert row["accuracy"] < 0.75
    assert "| sotu-era | whole | 2 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 |" in table
    before = output.read_bytes()
    main(arguments)
    assert output.read_bytes() == before


def test_c_is_chosen_on_what_is_held_out_of_training_and_on_validation_data(monkeypatch):
    """With a C near 0 everything is the label that most documents have."""
    fold = make_fold()
    fold["train"] = [d for d in fold["train"] if d["label"] == "war" or int(d["id"]) < 9]
    monkeypatch.setattr(tfidf_svm, "C_GRID", (1e-6, 10))
    assert fit(fold, None)[:2] == (10, 1)
    fold["validation"] = [{**d, "label": "war"} for d in fold["validation"]]
    everything_but_war = len(fold["train"]) - 10
    assert fit(fold, None)[:2] == (1e-6, 1 - everything_but_war / (len(fold["train"]) + 9))  # as 10, the first of them
    fold["validation"] *= 2
    assert fit(fold, None)[2] == ["war"] * 12


def test_no_long_document_no_score_of_them(folder):
    fold = make_fold()
    fold["test"] = [{**d, "tokens": 512} for d in fold["test"]]
    write_fold(folder / "short", fold)
    figures = linear.measure(folder / "short", None)
    assert (figures["long"], figures["accuracy_long"], figures["accuracy"]) == (0, None, 1)


def test_summary_is_mean_and_deviation_over_folds():
    rows = [
        {"corpus": "bbc", "words": words, "accuracy": value, "f1_macro": value / 2, "accuracy_long": long}
        for words, value, long in (("380", 0.5, None), ("380", 0.7, None), ("whole", 0.9, 0.8))
    ]
    assert summary(rows).splitlines()[2:] == [
        "| bbc | 380 | 2 | 0.600 ± 0.141 | 0.300 ± 0.071 |  |",
        "| bbc | whole | 1 | 0.900 | 0.450 | 0.800 |",
    ]
