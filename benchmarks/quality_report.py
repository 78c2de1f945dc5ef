"""docs/results.md from benchmarks/results/quality.json: every number there comes from its rows.

- `answers`: in short; the leaderboard, ReBerta against each model by a paired bootstrap, synthetic tasks, ablations,
  accuracy by length
- `evidence`: machines and commands, details, the search of learning rates cell by cell, the options of each study
- what has no rows yet is left out; what has only some of its runs says how many
- what a person has to say stands in benchmarks/notes: `quality.md` before the answers, `quality-method.md` before the
  evidence; findings belong into docs/LOG.md
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from statistics import mean
from typing import NamedTuple

import numpy as np

from benchmarks.quality_protocol import ABLATIONS, LEADERBOARD, LINEAR, MODELS, OURS, SYNTHETIC
from benchmarks.quality_statistics import (
    Difference,
    Pair,
    chosen_rate,
    counted,
    differences,
    hits_by_fold,
    paired,
    paired_bootstrap,
    rates_to_try,
    search,
    validation_loss,
)
from benchmarks.report_tables import Content, Row, machine_line, markdown_table, number, spread
from evaluation_utils import LENGTH_EDGES

AIM = 0.02  # how much accuracy ReBerta is to be ahead of the best baseline, on average
AIM_P = 0.05


class Key(NamedTuple):
    """Which study."""

    table: str
    corpus: str
    model: str
    variant: str = ""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.model, self.variant)))


def studies(content: Content) -> dict[Key, list[Row]]:
    """All rows by study, in the order of the protocol."""
    found: dict[Key, list[Row]] = {Key(*name.split(" / ")): [] for name in content["runs"]}
    for row in content["rows"]:
        found.setdefault(Key(*(row[name] for name in Key._fields)), []).append(row)
    return {key: rows for key, rows in found.items() if rows}


def distinct(values: Iterable[str]) -> list[str]:
    """In the order in which they first come."""
    return list(dict.fromkeys(values))


class Page:
    """What the sections share: the rows of each study, those that count, and how many there are to be.

    `corpora` and `models` are those of the leaderboard.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.studies = studies(content)
        self.counted = {key: counted(rows, chosen_rate(rows)) for key, rows in self.studies.items()}
        self.corpora = distinct(key.corpus for key in self.of(LEADERBOARD))
        self.models = distinct(key.model for key in self.of(LEADERBOARD))

    def of(self, table: str) -> list[Key]:
        return [key for key in self.counted if key.table == table]

    def planned(self, key: Key) -> int:
        """How many runs the study is to have; as many as there are where the protocol knows it no more."""
        return self.content["runs"].get(" / ".join(key), len(self.counted[key]))

    def is_whole(self, key: Key) -> bool:
        return key in self.counted and len(self.counted[key]) >= self.planned(key)

    def runs(self, key: Key) -> str:
        return f"{len(self.counted[key])} of {self.planned(key)}"

    def score(self, key: Key, name: str = "accuracy") -> str:
        """Mean and deviation over the runs, and how many there are where some are missing."""
        if key not in self.counted:
            return ""
        missing = "" if self.is_whole(key) else f" ({self.runs(key)})"
        return spread([row.get(name) for row in self.counted[key]]) + missing

    def hits(self, key: Key) -> dict[int, np.ndarray]:
        return hits_by_fold(self.counted.get(key, ()))

    def beside(self, model: str) -> dict[str, list[Pair]]:
        """By corpus what ReBerta and a model hit, fold by fold, where both were tested."""
        ours, others = ([self.hits(Key(LEADERBOARD, c, which)) for c in self.corpora] for which in (OURS, model))
        found = dict(zip(self.corpora, map(paired, ours, others), strict=True))
        return {corpus: pairs for corpus, pairs in found.items() if pairs}

    def accuracy(self, key: Key) -> float:
        """Mean over the runs."""
        return mean(row["accuracy"] for row in self.counted[key])

    def overall(self, model: str) -> float | None:
        """Over corpora, of the means over runs; None while something is missing."""
        keys = [Key(LEADERBOARD, corpus, model) for corpus in self.corpora]
        return mean(map(self.accuracy, keys)) if all(map(self.is_whole, keys)) else None

    @property
    def baselines(self) -> dict[str, float]:
        """Mean accuracy of those that have all their runs on all corpora."""
        means = {model: self.overall(model) for model in self.models if model != OURS}
        return {model: value for model, value in means.items() if value is not None}


def answers(page: Page) -> list[str]:
    tables = (in_short, leaderboard, against_each, synthetic, ablations, by_length)
    return [text for text in (table(page) for table in tables) if text]


def evidence(page: Page) -> list[str]:
    return [text for text in (table(page) for table in (origin, details, learning_rates, commands)) if text]


def in_short(page: Page) -> str:
    lines = [*verdict(page), *worst_distances(page)]
    return "\n".join(["## In short", "", *lines]) if lines else ""


def verdict(page: Page) -> list[str]:
    """Whether ReBerta has what is aimed at, and which baselines are ahead of it."""
    baselines = page.baselines
    ours = page.overall(OURS) if baselines else None
    if ours is None:
        return []
    best = max(baselines, key=baselines.__getitem__)
    corpora = [*page.beside(best).values()]
    found = paired_bootstrap(corpora)
    difference, interval, p = difference_cells(found)
    reached = found.mean >= AIM and found.p < AIM_P and all(differences(pairs).mean() >= 0 for pairs in corpora)
    lines = [
        f"- Accuracy, the mean of {', '.join(page.corpora)}: **{OURS} {ours:.3f}; the best baseline, {best}, "
        f"{baselines[best]:.3f}**. The difference by documents is {difference} (95 % {interval}, p {p}).",
        f"- The aim, {AIM:.2f} ahead of the best baseline on average, behind it on no corpus, p below {AIM_P:g}: "
        f"**{'reached' if reached else 'not reached'}**.",
    ]
    for corpus in page.corpora:
        own, *others = (page.accuracy(Key(LEADERBOARD, corpus, model)) for model in (OURS, *baselines))
        better = [f"{model} {score:.3f}" for model, score in zip(baselines, others, strict=True) if score > own]
        lines += [f"- On {corpus}, ahead of {OURS}'s {own:.3f}: {', '.join(better)}."] if better else []
    if missing := unfinished(page):
        lines.append(f"- Not among these baselines, since runs are missing: {missing}.")
    return lines


def worst_distances(page: Page) -> list[str]:
    """The synthetic tasks, a line a model, a column a task."""
    keys = page.of(SYNTHETIC)
    tasks = distinct(key.corpus for key in keys)
    if not tasks:
        return []
    scores = {(key.label, key.corpus): worst(page, key) for key in keys}
    labels = distinct(key.label for key in keys)
    lines = [[label, *(scores.get((label, task), "") for task in tasks)] for label in labels]
    table = markdown_table(["synthetic tasks, worst distance", *tasks], lines, left=1)
    return ["- Accuracy on the synthetic tasks at the distance where it is lowest:", "", table]


def worst(page: Page, key: Key) -> str:
    """The least accuracy over distances, each a mean over runs."""
    rows = page.counted[key]
    distances = rows[0]["accuracy_by_distance"]
    return f"{min(mean(row['accuracy_by_distance'][distance] for row in rows) for distance in distances):.3f}"


def origin(page: Page) -> str:
    content = page.content
    done = sum(min(len(rows), page.planned(key)) for key, rows in page.counted.items())
    lines = [", ".join(f"{name} {value}" for name, value in content["versions"].items())]
    rows = Counter(row["session"] for row in content["rows"])
    machine = None
    for session in content["sessions"]:
        if not rows[session["started"]]:
            continue  # all that it measured was measured anew since
        if session["machine"] != machine:
            machine = session["machine"]
            lines.append(f"on {machine_line(machine)}:")
        how = f"{session['jobs']} cells at a time, one thread each; commit {session['commit']}"
        lines.append(f"{session['started']}: `{session['command']}` ({how}; {rows[session['started']]} rows)")
    hours = sum(row["seconds"] for row in content["rows"]) / 3600
    lines.append(
        f"**{done} of {sum(content['runs'].values())} runs are there**; with the search of learning rates they took "
        f"{hours:.1f} hours of one core to train; the next session goes on with the others"
    )
    return "\n".join(f"- {line}" for line in lines)


def leaderboard(page: Page) -> str:
    """A line a model, a column a corpus, and the mean of those; the best mean first, then those that are not whole."""
    if not page.corpora:
        return ""
    means = {model: page.overall(model) for model in page.models}
    lines = []
    for model in sorted(page.models, key=lambda model: means[model] or 0, reverse=True):
        scores = [page.score(Key(LEADERBOARD, corpus, model)) for corpus in page.corpora]
        lines.append([model, *scores, "" if means[model] is None else f"{means[model]:.3f}"])
    about = [corpus_line(page.content, corpus) for corpus in page.corpora]
    table = markdown_table(["accuracy", *page.corpora, "mean"], lines, left=1)
    return "\n\n".join(["## Leaderboard", "\n".join(about), table])


def corpus_line(content: Content, corpus: str) -> str:
    facts = content["corpora"][corpus]
    sizes = ", ".join(f"{part} {count:,}" for part, count in facts["documents"].items())
    tokens = sorted(chain.from_iterable(lengths(content, corpus).values()))
    return (
        f"- {corpus}: {facts['labels']} labels; documents of the first fold: {sizes}; tokens of tested documents: "
        f"median {tokens[len(tokens) // 2]:,}, longest {tokens[-1]:,}"
    )


def lengths(content: Content, corpus: str) -> dict[int, list[int]]:
    """Tokens of the tested documents by fold, in file order."""
    return {int(fold): [*map(int, text.split())] for fold, text in content["corpora"][corpus]["tokens"].items()}


def against_each(page: Page) -> str:
    """Differences between ReBerta and each other model for the whole, and which baseline is the best."""
    corpora, lines = page.corpora, []
    for model in page.models:
        found = page.beside(model)
        if model != OURS and found:
            whole = {c: all(page.is_whole(Key(LEADERBOARD, c, which)) for which in (OURS, model)) for c in corpora}
            each = [difference_text(found[c], whole[c]) if c in found else "" for c in corpora]
            sure = [pairs for corpus, pairs in found.items() if whole[corpus]]
            cells = difference_cells(paired_bootstrap(sure)) if sure else [""] * 3
            lines.append([model, *each, *cells, f"{sum(len(differences(p)) for p in sure):,}" if sure else ""])
    if not lines:
        return ""
    header = [f"{OURS} less", *corpora, "mean", "95 %", "p", "documents"]
    table = markdown_table(header, lines, left=1)
    return "\n\n".join([f"## {OURS} against each model", table, *best_baselines(page)])


def difference_text(pairs: Sequence[Pair], is_whole: bool) -> str:
    found = differences(pairs)
    return f"{found.mean():+.3f}" + ("" if is_whole else f" ({len(found)} documents)")


def difference_cells(found: Difference) -> list[str]:
    """Mean, interval and p."""
    p = f"{found.p:.4f}" if found.p < 0.01 else f"{found.p:.2f}"
    return [f"{found.mean:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}", p]


def best_baselines(page: Page) -> list[str]:
    """Which it is, with and without the linear model, among those that have all their runs on all corpora."""
    said = []
    for of, left_out in (("all", None), ("those that the engine trains", LINEAR)):
        allowed = {model: value for model, value in page.baselines.items() if model != left_out}
        if allowed:
            best = max(allowed, key=allowed.__getitem__)
            said.append(f"The best baseline of {of}, on average: {best}, {allowed[best]:.3f}.")
    return [" ".join(said)] if said else []


def unfinished(page: Page) -> str:
    """The baselines that are to have more runs than there are."""
    planned = [Key(*name.split(" / ")) for name in page.content["runs"]]
    baselines = [key for key in planned if key.table == LEADERBOARD and key.model != OURS]
    return ", ".join(distinct(key.model for key in baselines if not page.is_whole(key)))


def by_length(page: Page) -> str:
    """Accuracy over documents by their tokens, a table a corpus."""
    parts = []
    for corpus in page.corpora:
        tokens = lengths(page.content, corpus)
        ranges = [*pairwise((0, *LENGTH_EDGES, math.inf))]
        ranges = [(low, high) for low, high in ranges if any(low <= n < high for n in chain(*tokens.values()))]
        lines = []
        for key in of_corpus(page, corpus):
            hits = page.hits(key)
            right = np.concatenate([of_fold.mean(0) for of_fold in hits.values()])
            sizes = np.concatenate([tokens[fold] for fold in hits])
            inside = [(sizes >= low) & (sizes < high) for low, high in ranges]
            cells = [f"{right[chosen].mean():.3f} ({chosen.sum()})" if chosen.any() else "" for chosen in inside]
            lines.append([key.model, *cells])
        parts.append(markdown_table([corpus, *map(range_text, ranges)], lines, left=1))
    said = ["## By length", "Accuracy by tokens of a document, and how many documents."]
    return "\n\n".join([*said, *parts]) if parts else ""


def range_text(limits: tuple[float, float]) -> str:
    low, high = limits
    return f"{low:,} and more" if high == math.inf else f"{low:,} to {high - 1:,}"


def of_corpus(page: Page, corpus: str) -> list[Key]:
    return [key for key in page.of(LEADERBOARD) if key.corpus == corpus]


def details(page: Page) -> str:
    """What else is known of the leaderboard's runs, a table a corpus."""
    parts = []
    for corpus in page.corpora:
        lines = []
        for key in of_corpus(page, corpus):
            rows = page.counted[key]
            scores = ("f1_macro", "log_loss", "ece", "ece_uncalibrated")
            cells = [page.runs(key), *(spread([row.get(name) for row in rows]) for name in scores)]
            cells += [", ".join(dict.fromkeys(map(rate_text, rows))), f"{mean(row['share_read'] for row in rows):.0%}"]
            cells += [f"{mean(row['seconds'] for row in rows) / 60:.1f}", number(rows[0].get("parameters", ""))]
            epochs = Counter(f"{row['best_epoch']:g}" for row in rows if "best_epoch" in row)
            lines.append([key.model, *cells, ", ".join(f"{epoch} ({n})" for epoch, n in sorted(epochs.items()))])
        header = [corpus, "runs", "macro F1", "log loss", "ECE", "ECE, temperature 1"]
        header += ["learning rate", "tokens read", "minutes to train", "trained parameters", "best epoch (runs)"]
        parts.append(markdown_table(header, lines, left=1))
    return "\n\n".join(["## Details", *parts]) if parts else ""


def rate_text(row: Row) -> str:
    return f"C {row['C']:g}" if row["model"] == LINEAR else f"{row['learning_rate']:g}"


def learning_rates(page: Page) -> str:
    """Every cell in which a rate was looked for."""
    lines = []
    for key, rows in page.studies.items():
        if key.table == ABLATIONS or key.model == LINEAR:
            continue
        tried = search(rows)
        is_whole = key.table != LEADERBOARD or len(tried) == len(rates_to_try(MODELS[key.model].grid, rows))
        for row in tried:
            scores = [f"{validation_loss(row):.3f}", f"{row['validation_accuracy']:.3f}", f"{row['best_epoch']:g}"]
            chosen = row["learning_rate"] == chosen_rate(rows)
            said = ("yes" if is_whole else "so far") if chosen else ""
            lines.append([key.corpus, key.label, rate_text(row), *scores, f"{row['accuracy']:.3f}", said])
    header = ["corpus", "model", "learning rate", "log loss", "accuracy", "best epoch", "accuracy in the test"]
    return "\n\n".join(["## Learning rates", markdown_table([*header, "chosen"], lines, left=2)]) if lines else ""


def synthetic(page: Page) -> str:
    return by_distance(page, "Synthetic tasks", page.of(SYNTHETIC))


def ablations(page: Page) -> str:
    """ReBerta with other options, below those that stand among the synthetic tasks."""
    keys = page.of(ABLATIONS)
    tasks = {key.corpus for key in keys}
    compared = [key for key in page.of(SYNTHETIC) if key.corpus in tasks and key.model == OURS]
    return by_distance(page, "Ablations", [*compared, *keys])


def by_distance(page: Page, title: str, keys: Sequence[Key]) -> str:
    """Accuracy by distance, a table a task."""
    parts = []
    for task in distinct(key.corpus for key in keys):
        of_task = [key for key in keys if key.corpus == task]
        distances = list(page.counted[of_task[0]][0]["accuracy_by_distance"])
        lines = []
        for key in of_task:
            rows = page.counted[key]
            cells = [f"{mean(row['accuracy_by_distance'][distance] for row in rows):.3f}" for distance in distances]
            lines.append([key.label, page.runs(key), *cells, page.score(key)])
        header = [task, "runs", *(f"distance {distance}" for distance in distances), "all"]
        parts.append(markdown_table(header, lines, left=1))
    return "\n\n".join([f"## {title}", "Accuracy by distance in windows.", *parts]) if parts else ""


def commands(page: Page) -> str:
    """The options of each study, without those that all of its table and corpus share."""
    parts = []
    groups: dict[tuple[str, str], dict[Key, list[str]]] = defaultdict(dict)
    for key, rows in page.counted.items():
        if key.model != LINEAR:
            options = f"--model_path {rows[0]['encoder']} {rows[0]['options']}"
            groups[key.table, key.corpus][key] = [f"--{option.strip()}" for option in options.split("--")[1:]]
    for (table, corpus), given in groups.items():
        shared = set.intersection(*map(set, given.values()))
        common = " ".join(option for option in next(iter(given.values())) if option in shared)
        own = {key: " ".join(option for option in options if option not in shared) for key, options in given.items()}
        parts.append(f"{table}, {corpus}, all: `{common}`")
        parts.append(
            markdown_table(["model", "and"], [[key.label, text and f"`{text}`"] for key, text in own.items()], left=2)
        )
    return "\n\n".join(["## Options", *parts]) if parts else ""
