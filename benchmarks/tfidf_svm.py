"""TF-IDF and a linear SVM, which knows words alone.

It is trained on the training set; of C the value with the highest accuracy in documents that were held out, the first
of `C_GRID` among equals. They are those by which a linear probe is chosen (engine/linear_probe.py): the training set's,
in a cross-validation, and the validation set's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import KFold
from sklearn.svm import LinearSVC

from benchmarks.corpora import SPLITS, Document
from engine.linear_probe import FOLDS

C_GRID = (1, 3, 0.3, 10, 0.1, 30, 100)
OPTIONS = {
    "features": "words, sublinear tf, idf, length 1",
    "C": list(C_GRID),
    "folds within training": FOLDS,
    "scikit-learn": sklearn.__version__,
}


class Fitted(NamedTuple):
    """The chosen C, its accuracy in what was held out, and what it says of the test set's documents, in their order."""

    c: float
    held_out_accuracy: float
    predictions: list[str]


def measure(fold: dict[str, list[Document]], words: int | None) -> dict[str, Any]:
    """Figures of `fit`, the seconds that it takes, and `right`: a 1 for each document of the test set, or a 0."""
    start = time.perf_counter()
    fitted = fit(fold, words)
    seconds = time.perf_counter() - start
    truth = labels(fold["test"])
    return {
        "C": fitted.c,
        "held_out_accuracy": fitted.held_out_accuracy,
        "accuracy": accuracy_score(truth, fitted.predictions),
        "f1_macro": float(f1_score(truth, fitted.predictions, average="macro", zero_division=0)),
        "seconds": round(seconds, 1),
        "right": "".join(str(int(said == label)) for said, label in zip(fitted.predictions, truth, strict=True)),
    }


def fit(fold: dict[str, list[Document]], words: int | None) -> Fitted:
    """Train, choose and predict on the first `words` words of each document, or on all of them."""
    train, validation, test = (
        [" ".join(document["text"].split()[:words]) for document in fold[part]] for part in SPLITS
    )
    known = labels(fold["train"])
    said = predict(train, known, [*validation, *test])
    held_out = {c: said[c][: len(validation)] for c in C_GRID}
    truth = labels(fold["validation"])
    for inside, outside in KFold(FOLDS, shuffle=True, random_state=0).split(train):
        found = predict([train[i] for i in inside], [known[i] for i in inside], [train[i] for i in outside])
        held_out = {c: held_out[c] + found[c] for c in C_GRID}
        truth += [known[i] for i in outside]
    scores = {c: accuracy_score(truth, held_out[c]) for c in C_GRID}
    best = max(C_GRID, key=scores.__getitem__)
    return Fitted(best, scores[best], said[best][len(validation) :])


def predict(texts: Sequence[str], known: Sequence[str], asked: Sequence[str]) -> dict[float, list[str]]:
    """For each C, the labels of `asked` after training on `texts`."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    features, wanted = vectorizer.fit_transform(texts), vectorizer.transform(asked)
    return {c: LinearSVC(C=c, random_state=0).fit(features, known).predict(wanted).tolist() for c in C_GRID}


def labels(documents: Sequence[Document]) -> list[str]:
    return [document["label"] for document in documents]
