"""Statistics of the leaderboard, from its rows alone.

- which learning rate validation chose for a study, and the rows that count: those with it
- documents of a corpus with the share of a model's seeds in which it is right
- a paired bootstrap over documents of the mean over corpora of the difference between two models
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

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


def right_by_fold(rows: Iterable[Row]) -> dict[int, np.ndarray]:
    """For each fold the share of seeds in which each document [n] was right, in file order."""
    seeds: dict[int, list[list[int]]] = defaultdict(list)
    for row in rows:
        seeds[row["fold"]].append([int(hit) for hit in row["right"]])
    return {fold: np.mean(hits, axis=0) for fold, hits in sorted(seeds.items())}


class Difference(NamedTuple):
    """How much better one model is than another, with a 95 % interval and a two-sided p."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(differences: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The mean over corpora of mean differences [n each]; documents are drawn anew within each corpus.

    p is twice the share of resamples on the other side of 0 (Efron and Tibshirani 1993, 15.4), the one that was
    measured counted among them.
    """
    result = bootstrap(
        differences,
        lambda *drawn, axis: np.mean([d.mean(axis) for d in drawn], axis=0),
        n_resamples=resamples,
        batch=500,
        vectorized=True,
        method="percentile",
        rng=seed,
    )
    drawn = result.bootstrap_distribution
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    interval = result.confidence_interval
    measured = float(np.mean([d.mean() for d in differences]))
    return Difference(measured, float(interval.low), float(interval.high), min(1.0, 2 * (beyond + 1) / (resamples + 1)))


def paired_differences(ours: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> np.ndarray:
    """By document, over the folds that both have; empty if there is none."""
    return np.concatenate([np.zeros(0), *(ours[fold] - other[fold] for fold in ours if fold in other)])
