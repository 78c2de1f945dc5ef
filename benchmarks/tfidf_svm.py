"""TF-IDF and a linear SVM, which knows words alone.

It is trained on the training set; of C the value with the highest accuracy in documents that were held out, the first
of `C_GRID` among equals. They are those by which a linear probe is chosen (engine/linear_probe.py): the training set's,
in a cross-validation, and the validation set's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from benchmarks.corpora import SPLITS, Document

C_GRID = (1, 3, 0.3, 10, 0.1, 30, 100)
FOLDS = 5
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


def fit(fold: dict[str, list[Document]], words: int | None) -> Fitted:
    """Train, choose and predict on the first `words` words of each document, or on all of them."""
    train, validation, test = (
        [" ".join(document["text"].split()[:words]) for document in fold[part]] for part in SPLITS
    )
    known, parts = labels(fold["train"]), KFold(FOLDS, shuffle=True, random_state=0)
    machines, scores = {}, {}
    for c in C_GRID:
        machine = make_pipeline(TfidfVectorizer(sublinear_tf=True), LinearSVC(C=c, random_state=0))
        held_out = [*cross_val_predict(machine, train, known, cv=parts)]
        machines[c] = machine.fit(train, known)
        held_out += [*machines[c].predict(validation)]
        scores[c] = accuracy_score([*known, *labels(fold["validation"])], held_out)
    best = max(C_GRID, key=scores.__getitem__)
    return Fitted(best, scores[best], machines[best].predict(test).tolist())


def labels(documents: Sequence[Document]) -> list[str]:
    return [document["label"] for document in documents]
