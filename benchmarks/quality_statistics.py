"""Statistics of the leaderboard, from its rows alone.

- which learning rate validation chose for a study, and the rows that count: those with it
- which documents of a corpus a model is right on, seed by seed
- a paired bootstrap, over seeds and documents, of the mean over corpora of the difference between two models

Shapes: S, T seeds of two models, n documents, R resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report_tables import Row

RESAMPLES = 10_000
LADDER: list[float | None] = [float(f"{digit}e{exponent}") for exponent in range(-7, 0) for digit in (1, 3)]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if wanted.items() <= row.items()]


def validation_loss(row: Row) -> float:
    """That by which the epoch was chosen; infinite where there is none."""
    return row.get("validation_loss", math.inf)


def search(rows: Sequence[Row]) -> list[Row]:
    """Of a study's rows those in which its learning rate was looked for, in ascending order of it."""
    first = min((row["fold"], row["seed"]) for row in rows)
    return sorted(select(rows, fold=first[0], seed=first[1]), key=lambda row: row["learning_rate"] or 0)


def chosen_rate(rows: Sequence[Row]) -> float | None:
    """The learning rate of the lowest loss in validation, the smaller one among equals."""
    return min(search(rows), key=validation_loss)["learning_rate"]


def rates_to_try(grid: Sequence[float | None], rows: Sequence[Row]) -> list[float | None]:
    """Of a study with these rows: its grid, and the rates of LADDER beyond it as far as each betters the last."""
    losses = {row["learning_rate"]: validation_loss(row) for row in search(rows)} if rows else {}
    rates = sorted({*grid, *losses}, key=lambda rate: rate or 0)
    if len(rates) > 1 and losses.keys() >= {*grid}:
        best = chosen_rate(rows)
        if best == rates[0] and losses[best] < losses[rates[1]]:
            rates.insert(0, LADDER[LADDER.index(best) - 1])
        elif best == rates[-1]:
            rates.append(LADDER[LADDER.index(best) + 1])
    return rates


def counted(rows: Sequence[Row], rate: float | None) -> list[Row]:
    """Of a study's rows those with this learning rate, in the order of folds and seeds."""
    return sorted(select(rows, learning_rate=rate), key=lambda row: (row["fold"], row["seed"]))


def hits_by_fold(rows: Iterable[Row]) -> dict[int, np.ndarray]:
    """For each fold whether each document was right, in file order: [S, n]."""
    seeds: dict[int, list[list[int]]] = defaultdict(list)
    for row in rows:
        seeds[row["fold"]].append([int(hit) for hit in row["right"]])
    return {fold: np.array(hits) for fold, hits in sorted(seeds.items())}


Pair = tuple[np.ndarray, np.ndarray]
"""The hits of two models in a fold, [S, n] and [T, n]."""


def paired(ours: Mapping[int, np.ndarray], others: Mapping[int, np.ndarray]) -> list[Pair]:
    """Over the folds that both have."""
    return [(ours[fold], others[fold]) for fold in ours if fold in others]


def differences(pairs: Iterable[Pair]) -> np.ndarray:
    """By document: the share of the first model's seeds in which it is right, less the other's."""
    return np.concatenate([ours.mean(0) - others.mean(0) for ours, others in pairs])


class Difference(NamedTuple):
    """How much better one model is than another, with a 95 % interval and a two-sided p."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(corpora: Sequence[Sequence[Pair]], resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The mean over corpora of the mean difference over documents; each corpus is given by its folds.

    Each model's seeds are drawn anew within a fold, and the documents, the same for both models, within a corpus: a
    bootstrap on two levels (Davison and Hinkley 1997, 3.8). With one seed it is that over documents. p is twice the
    share of resamples on the other side of 0 (Efron and Tibshirani 1993, 15.4), the one that was measured counted among
    them.
    """
    generator = np.random.default_rng(seed)
    drawn_R = np.mean([_drawn(pairs, resamples, generator) for pairs in corpora], axis=0)
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    beyond = min(int((drawn_R <= 0).sum()), int((drawn_R >= 0).sum()))
    measured = float(np.mean([differences(pairs).mean() for pairs in corpora]))
    return Difference(measured, float(low), float(high), min(1.0, 2 * (beyond + 1) / (resamples + 1)))


def _drawn(pairs: Sequence[Pair], resamples: int, generator: np.random.Generator) -> np.ndarray:
    """The mean difference in each resample of a corpus, [R]."""

    def times(count: int) -> np.ndarray:
        """How often each of so many is drawn, [R, count]."""
        return generator.multinomial(count, np.full(count, 1 / count), size=resamples)

    differences_Rn = np.hstack(
        [times(len(ours)) @ ours / len(ours) - times(len(others)) @ others / len(others) for ours, others in pairs]
    )
    documents = differences_Rn.shape[1]
    return (times(documents) * differences_Rn).sum(1) / documents
