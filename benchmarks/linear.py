"""TF-IDF and a linear SVM: what words alone say, on the first of them and on whole documents.

    python -m benchmarks.linear [NAME ...] [--corpora DIR --words 380 --output FILE.json]

- the corpora and folds of benchmarks.corpora; trained on a fold's training set alone
- of C the value that is best on its validation set, the first of `C_GRID` among equals; it is in each row
- `long` documents are those that one window of 512 tokens cannot hold
- a row a corpus, fold and number of words; then means and standard deviations over the folds
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.svm import LinearSVC
from tqdm import tqdm

from benchmarks import common, corpora
from benchmarks.corpora import LONG, SPLITS, Document, load_split
from benchmarks.report_tables import Row, markdown_table, unique

C_GRID = (1, 3, 0.3, 10, 0.1, 30)
OPTIONS = {"features": "words, sublinear tf, idf, length 1", "C": list(C_GRID), "scikit-learn": sklearn.__version__}
WHOLE = "whole"
SCORES = ("accuracy", "f1_macro", "accuracy_long")


class Fitted(NamedTuple):
    """The chosen C, its accuracy in validation, and what it says of the test set's documents, in their order."""

    c: float
    validation_accuracy: float
    predictions: list[str]


def fit(fold: dict[str, list[Document]], words: int | None) -> Fitted:
    """Train, choose and predict on the first `words` words of each document, or on all of them."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train, validation, test = (
        [" ".join(document["text"].split()[:words]) for document in fold[part]] for part in SPLITS
    )
    features = vectorizer.fit_transform(train)
    in_validation = vectorizer.transform(validation)
    machines = {c: LinearSVC(C=c, random_state=0).fit(features, labels(fold["train"])) for c in C_GRID}
    scores = {
        c: accuracy_score(labels(fold["validation"]), machine.predict(in_validation)) for c, machine in machines.items()
    }
    best = max(C_GRID, key=scores.__getitem__)
    return Fitted(best, scores[best], machines[best].predict(vectorizer.transform(test)).tolist())


def labels(documents: Sequence[Document]) -> list[str]:
    return [document["label"] for document in documents]


def measure(folder: Path, words: int | None) -> dict[str, Any]:
    """The figures of one fold; `accuracy_long` is None where no test document is long."""
    fold = {part: load_split(folder, part) for part in SPLITS}
    start = time.perf_counter()
    fitted = fit(fold, words)
    seconds = time.perf_counter() - start
    truth = labels(fold["test"])
    right = [said == is_so for said, is_so in zip(fitted.predictions, truth, strict=True)]
    right_long = [hit for hit, document in zip(right, fold["test"], strict=True) if document["tokens"] > LONG]
    return {
        "C": fitted.c,
        "validation_accuracy": fitted.validation_accuracy,
        "accuracy": statistics.mean(right),
        "f1_macro": float(f1_score(truth, fitted.predictions, average="macro", zero_division=0)),
        "accuracy_long": statistics.mean(right_long) if right_long else None,
        "documents": len(right),
        "long": len(right_long),
        "seconds": round(seconds, 1),
    }


def summary(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the folds, a line a corpus and number of words, in Markdown."""
    lines = []
    for corpus in unique(rows, "corpus"):
        for words in unique(rows, "words"):
            folds = [row for row in rows if row["corpus"] == corpus and row["words"] == words]
            if folds:
                lines.append(
                    [corpus, words, str(len(folds)), *(spread([row[score] for row in folds]) for score in SCORES)]
                )
    return markdown_table(["corpus", "words", "folds", *SCORES], lines, left=1)


def spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    mean = f"{statistics.mean(found):.3f}" if found else ""
    return f"{mean} ± {statistics.stdev(found):.3f}" if len(found) > 1 else mean


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(corpora.CORPORA)} (default all)")
    parser.add_argument("--corpora", type=Path, default=corpora.OUTPUT, help="where they lie (default %(default)s)")
    parser.add_argument("--words", type=int, default=380, help="how many of a document's first words (default 380)")
    options = parser.parse_args(argv)
    names = options.names or list(corpora.CORPORA)
    folders = {
        (name, folder.name): folder
        for name in names
        for folder in sorted(corpora.make_corpus(name, options.corpora).glob("fold-*"))
    }
    results = common.Results("linear", OPTIONS, options.output)
    counts = {str(options.words): options.words, WHOLE: None}
    cells = [{"corpus": name, "fold": fold, "words": words} for name, fold in folders for words in counts]
    pending = results.pending(cells)
    if pending:
        results.start_session(argv)
    for cell in tqdm(pending, disable=None):
        results.add({**cell, **measure(folders[cell["corpus"], cell["fold"]], counts[cell["words"]])})
    results.show()
    print("\n" + summary(results.rows))


if __name__ == "__main__":
    main(sys.argv[1:])
