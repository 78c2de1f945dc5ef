"""TF-IDF and a linear SVM, which knows words alone; of C the value that is best on the validation set, the first of
`C_GRID` among equals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score
from sklearn.svm import LinearSVC

from benchmarks.corpora import SPLITS, Document

C_GRID = (1, 3, 0.3, 10, 0.1, 30)
OPTIONS = {"features": "words, sublinear tf, idf, length 1", "C": list(C_GRID), "scikit-learn": sklearn.__version__}


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
