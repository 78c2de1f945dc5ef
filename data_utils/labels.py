"""Labels: their order, their codes, and samples that keep their shares. Whole columns at a time, in Arrow and numpy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_utils.records import ProblemType

_WHOLE_NUMBER = re.compile(r"-?\d+")


def distinct_labels(column: pa.ChunkedArray) -> list[str]:
    """The labels of a column of lists, in their fixed order."""
    return label_order(pc.unique(pc.list_flatten(column)).to_pylist())


def label_order(names: Iterable[str]) -> list[str]:
    """`names` sorted, by value where all are whole numbers."""
    names = list(names)
    if all(_WHOLE_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def encode_labels(
    column: pa.ChunkedArray, label_names: Sequence[str], problem_type: ProblemType
) -> tuple[np.ndarray, np.ndarray]:
    """The labels of n documents by their place in `label_names`, and which documents have only known ones.

    Codes are int64 [n], or 0 and 1 as int8 [n, C] with `multi_label`; known is bool [n]. A document whose label is
    null is not known.
    """
    documents = len(column)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    owners = np.repeat(np.arange(documents), lengths)
    places = pc.index_in(pc.list_flatten(column), value_set=pa.array(label_names, type=pa.string()))
    codes = pc.fill_null(places, -1).to_numpy().astype(np.int64)
    known = pc.is_valid(column).to_numpy().copy()
    known[owners[codes < 0]] = False
    if problem_type == "single_label":
        labels = np.full(documents, -1, dtype=np.int64)
        labels[owners] = codes
    else:
        labels = np.zeros((documents, len(label_names)), dtype=np.int8)
        labels[owners[codes >= 0], codes[codes >= 0]] = 1
    return labels, known


def stratified_sample(labels: np.ndarray | None, documents: int, size: int, seed: int) -> np.ndarray:
    """Places of `size` of `documents` documents, rising; all of them where there are no more.

    Each label (`multi_label`: each combination) keeps its share, rounded by the largest remainder; ties are drawn.
    """
    if size >= documents:
        return np.arange(documents)
    random = np.random.default_rng(seed)
    if labels is None:
        return np.sort(random.choice(documents, size, replace=False))
    _, strata, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
    exact = counts * (size / documents)
    takes = np.floor(exact).astype(np.int64)
    remainder = random.permutation(len(counts))
    remainder = remainder[np.argsort(-(exact - takes)[remainder], kind="stable")]
    takes[remainder[: size - takes.sum()]] += 1
    shuffled = random.permutation(documents)
    by_stratum = shuffled[np.argsort(strata[shuffled], kind="stable")]
    place_in_stratum = np.arange(documents) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_stratum[place_in_stratum < np.repeat(takes, counts)])
