"""The leaderboard's statistics beside plain twins, and its page of whole and of partial results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks import quality_report
from benchmarks.quality_statistics import (
    chosen_rate,
    differences,
    hits_by_fold,
    paired,
    paired_bootstrap,
    rates_to_try,
)
from tests.test_benchmarks_quality import row


def plain_bootstrap(corpora, resamples: int) -> tuple[float, float, float]:
    """The same in a plain loop: quantiles and p."""
    draw = np.random.default_rng(1)

    def resampled(pairs) -> float:
        seeds = [tuple(hits[draw.integers(len(hits), size=len(hits))] for hits in pair) for pair in pairs]
        by_document = [
            [ours[:, n].mean() - others[:, n].mean() for n in range(ours.shape[1])] for ours, others in seeds
        ]
        flat = np.concatenate(by_document)
        return draw.choice(flat, len(flat)).mean()

    means = np.array([np.mean([resampled(pairs) for pairs in corpora]) for _ in range(resamples)])
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return (*np.quantile(means, (0.025, 0.975)), min(p, 1.0))


def hits(seeds: int, documents: int, share: float) -> np.ndarray:
    return np.random.default_rng(documents + seeds).random((seeds, documents)) < np.full((seeds, documents), share)


def one_fold(by_document: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """A corpus in which the first model hits so many more, with one seed each."""
    return [(np.array([by_document]), np.zeros((1, len(by_document))))]


def test_bootstrap_equals_a_plain_loop():
    folds = [(hits(1, n, 0.75), hits(1, n + 1, 0.65)[:, :n]) for n in (20, 35)]
    corpora = [folds, [(hits(3, 60, 0.7), hits(2, 61, 0.6)[:, :60])]]
    found = paired_bootstrap(corpora)
    low, high, p = plain_bootstrap(corpora, 4000)
    assert found.mean == pytest.approx(np.mean([differences(pairs).mean() for pairs in corpora]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.p == pytest.approx(p, abs=0.02)
    assert 0.001 < found.p < 0.2
    assert found == paired_bootstrap(corpora)


def test_of_two_models_that_are_exchanged_the_bootstrap_is_mirrored():
    draw = np.random.default_rng(0)
    values = [draw.choice([-1, 0, 1], n, p=[0.15, 0.6, 0.25]) for n in (40, 90, 300)]
    found, mirrored = (paired_bootstrap([one_fold(sign * d) for d in values]) for sign in (1, -1))
    assert (mirrored.low, mirrored.high, mirrored.p) == pytest.approx((-found.high, -found.low, found.p))


def test_seeds_that_differ_widen_the_interval():
    """Of two models with the same documents right on average, the one whose seeds disagree is the less certain."""
    others = np.zeros((2, 100))
    alike = np.tile(np.arange(100) % 2, (2, 1))
    apart = np.array([np.ones(100), np.zeros(100)])
    assert differences([(alike, others)]).mean() == differences([(apart, others)]).mean() == 0.5
    one, two = paired_bootstrap([[(alike, others)]]), paired_bootstrap([[(apart, others)]])
    assert one.high - one.low < 0.25
    assert (two.low, two.high) == (0, 1)


def test_bootstrap_of_equal_models_and_of_one_that_is_always_better():
    assert paired_bootstrap([one_fold([0] * 50), one_fold([0] * 10)]) == (0, 0, 0, 1)
    better = paired_bootstrap([one_fold([1] * 50), one_fold([1] * 10)], resamples=999)
    assert better == (1, 1, 1, 2 / 1000)


def test_corpora_weigh_the_same_whatever_their_size():
    found = paired_bootstrap([one_fold([1] * 10), one_fold([0] * 1000)], resamples=99)
    assert found[:3] == (0.5, 0.5, 0.5)


def test_documents_are_paired_over_the_folds_that_both_have_and_averaged_over_seeds():
    rows = [row("110", seed=seed, fold=fold) for seed in (0, 1) for fold in (0, 1)]
    ours = hits_by_fold([*rows, row("000", seed=2)])
    assert ours[0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert ours[1].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert ours[0].mean(0).tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    other = hits_by_fold([row("011", fold=1), row("111", fold=2)])
    assert differences(paired(ours, other)).tolist() == [1, 0, -1]
    assert paired(ours, {3: np.ones((1, 2))}) == []


def test_the_rate_is_chosen_by_validation_on_the_first_run_alone():
    rows = [
        row("11", 0.6, learning_rate=5e-5),
        row("01", 0.4, learning_rate=2e-4),
        row("11", 0.45, learning_rate=1e-4),
        row("11", 0.1, learning_rate=5e-5, fold=1),
    ]
    assert chosen_rate(rows) == 2e-4
    rows[1]["validation_loss"] = 0.45
    assert chosen_rate(rows) == 1e-4  # the smaller one among equals


def test_a_search_goes_on_where_its_best_is_the_last_and_ends_where_nothing_is_better():
    grid = (3e-5, 1e-4, 3e-4)

    def to_try(*losses: float) -> list[float | None]:
        rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
        return rates_to_try(grid, [row("1", loss, learning_rate=r) for r, loss in zip(rates, losses, strict=False)])

    assert to_try() == to_try(0.5) == to_try(0.5, 0.4) == to_try(0.5, 0.4, 0.4) == [*grid]
    assert to_try(0.5, 0.4, 0.3) == to_try(0.5, 0.4, 0.3, 0.3) == to_try(0.5, 0.4, 0.3, 0.4) == [*grid, 1e-3]
    assert to_try(0.5, 0.4, 0.3, 0.2) == [*grid, 1e-3, 3e-3]
    assert to_try(0.2, 0.3, 0.4) == [1e-5, *grid]
    assert to_try(0.2, 0.2, 0.4) == [*grid]  # both keep the same probe
    assert rates_to_try((1e-3,), [row("1", learning_rate=1e-3)]) == [1e-3]  # no search
    assert rates_to_try((None,), []) == [None]


def content_of(rows: list[dict[str, Any]], **runs: int) -> dict[str, Any]:
    facts = {
        "labels": 5,
        "documents": {"train": 9, "validation": 3, "test": 2},
        "tokens": {"0": "600 9000", "1": "700 800"},
    }
    planned = {
        f"leaderboard / {corpus} / {model} / ": 2
        for corpus in ("sotu-era", "brown-15")
        for model in ("reberta", "mean")
    }
    planned["leaderboard / sotu-era / head / "] = 2
    session = {"command": "python -m benchmarks.quality", "started": "today", "jobs": 2, "commit": "abc"}
    machine = {"cpu": "A CPU", "cores": 2, "memory_gb": 25, "kernels": "AVX512", "amx": False}
    return {
        "benchmark": "quality",
        "versions": {"torch": "2.13"},
        "sessions": [
            {**session, "machine": machine},
            {**session, "started": "tomorrow", "machine": machine | {"cpu": "Another", "amx": True}},
            {**session, "started": "in vain", "machine": machine | {"cpu": "A third"}},
        ],
        "runs": planned | {"ablations / order / reberta / num_repeats 2": 1},
        "corpora": dict.fromkeys(("sotu-era", "brown-15", "order"), facts),
        "rows": rows,
    }


def page_of(rows: list[dict[str, Any]]) -> str:
    page = quality_report.Page(content_of(rows))
    return "\n\n".join([*quality_report.answers(page), *quality_report.evidence(page)])


def test_page_of_one_cell():
    text = page_of([row("10")])
    assert "| reberta | 0.500 (1 of 2) |  |" in text
    session = "`python -m benchmarks.quality` (2 cells at a time, one thread each; commit abc; 1 rows)"
    assert f"- on A CPU, 2 cores, 25 GB, AVX512, no AMX:\n- today: {session}\n- **1" in text
    planned = sum(content_of([])["runs"].values())
    assert planned > 1
    assert f"- **1 of {planned} runs are there**" in text
    assert "| reberta | 1.000 (1) | 0.000 (1) |" in text  # by length
    assert "| 1,234,567 | 3 (1) |" in text
    assert "| sotu-era | 512 to 1,023 | 8,192 to 16,383 |" in text
    assert "| sotu-era | reberta | 0.0001 | 0.500 | 0.600 | 3 | 0.500 | so far |" in text
    assert "leaderboard, sotu-era, all: `--model_path e --epochs 8 --alpha 1`" in text
    for absent in ("against each", "Ablations", "Synthetic", "brown-15 |", "best baseline"):
        assert absent not in text


def test_page_names_the_sessions_whose_rows_it_shows():
    text = page_of([row("10"), row("01", fold=1, session="tomorrow"), row("01", model="mean", session="tomorrow")])
    how = "`python -m benchmarks.quality` (2 cells at a time, one thread each; commit abc"
    assert f"- on A CPU, 2 cores, 25 GB, AVX512, no AMX:\n- today: {how}; 1 rows)" in text
    assert f"- on Another, 2 cores, 25 GB, AVX512, AMX:\n- tomorrow: {how}; 2 rows)" in text
    assert "in vain" not in text
    assert "took 0.1 hours of one core to train" in text  # 90 seconds each


def test_page_without_rows():
    assert "## " not in page_of([])


def test_page_of_whole_and_partial_models():
    rows = [row(right, corpus=c, fold=fold) for c in ("sotu-era", "brown-15") for fold, right in ((0, "11"), (1, "10"))]
    rows += [
        row("10", model="mean", options="--epochs 8 --model_type mean"),
        row("10", 0.9, model="mean", learning_rate=3e-4),
        row("10", 0.8, model="mean", learning_rate=3e-5),
    ]
    rows += [row("11", model="mean", learning_rate=3e-4, fold=1)]  # of a rate that was chosen before
    text = page_of(rows)
    assert "| reberta | 0.750 ± 0.354 | 0.750 ± 0.354 | 0.750 |" in text
    assert "| mean | 0.500 (1 of 2) |  |  |" in text
    assert "| mean | +0.500 (2 documents) |  |  |  |  |  |" in text
    assert "| sotu-era | mean | 0.0001 | 0.500 | 0.600 | 3 | 0.500 | yes |" in text
    assert "| sotu-era | mean | 0.0003 | 0.900 | 0.600 | 3 | 0.500 |  |" in text
    assert "best baseline" not in text
    assert text.index("| reberta | 0.750") < text.index("| mean | 0.500")
    assert "| mean | `--model_type mean` |" in text

    rows += [
        row("10", model="mean", fold=1),
        *(row("01", corpus="brown-15", model="mean", fold=fold) for fold in (0, 1)),
    ]
    text = page_of(rows)
    assert "**reberta 0.750; the best baseline, mean, 0.500**. The difference by documents is +0.250 (95 %" in text
    assert "behind it on no corpus, p below 0.05: **not reached**" in text
    assert "ahead of reberta's" not in text
    assert "The best baseline of all, on average: mean, 0.500." in text
    assert "- Not among these baselines, since runs are missing: head." in text
    assert "| mean | +0.250 | +0.250 | +0.250 |" in text


def test_what_is_aimed_at_may_be_reached_or_missed_on_a_corpus():
    both = [(c, fold) for c in ("sotu-era", "brown-15") for fold in (0, 1)]
    rows = [row("11", corpus=c, fold=fold) for c, fold in both]
    rows += [row("01", corpus=c, model="mean", fold=fold) for c, fold in both]
    assert "p below 0.05: **reached**" in page_of(rows)
    rows[2:4] = [row("00", corpus="brown-15", fold=fold) for fold in (0, 1)]
    text = page_of(rows)
    assert "**not reached**" in text
    assert "- On brown-15, ahead of reberta's 0.000: mean 0.500." in text


def test_page_of_ablations_and_synthetic_tasks():
    by_distance = {"accuracy_by_distance": {"1": 0.75, "16": 0.5}}
    rows = [row("01", table="synthetic", corpus=task, variant="carry none") | by_distance for task in ("order", "more")]
    text = page_of(rows)
    assert "| synthetic tasks, worst distance | order | more |" in text
    assert "| reberta, carry none | 0.500 | 0.500 |" in text
    assert "| order | runs | distance 1 | distance 16 | all |" in text
    assert "Ablations" not in text
    rows += [row("01", table="synthetic", corpus="order", model="mean") | by_distance]
    rows += [row("11", table="ablations", corpus="order", variant="num_repeats 2") | by_distance]
    _, ablations = page_of(rows).split("## Ablations")
    lines = [line for line in ablations.split("## ")[0].splitlines() if line.startswith("| ")]
    assert lines[0] == "| order | runs | distance 1 | distance 16 | all |"
    assert lines[2:] == [
        "| reberta, carry none | 1 of 1 | 0.750 | 0.500 | 0.500 |",
        "| reberta, num_repeats 2 | 1 of 1 | 0.750 | 0.500 | 1.000 |",
    ]
