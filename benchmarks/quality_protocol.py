"""What benchmarks.quality trains and tests: corpora, models, options, grids. Here is where all of it is changed.

- a study: one model with one set of options on one corpus. Its learning rate is tuned on its first run (a fold and a
  seed), beyond its grid where the best one is the last; then it goes through the other runs
- leaderboard: models on corpora, each with the same budget of tuning
- ablations: variants of ReBerta by flag, on one of the synthetic tasks
- synthetic: the tasks of benchmarks.synthetic_suite
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import synthetic_suite
from benchmarks.quality_statistics import rates_to_try, select
from benchmarks.report_tables import Row
from benchmarks.tfidf_svm import OPTIONS as LINEAR_OPTIONS
from utils import ConfigError

LEADERBOARD, ABLATIONS, SYNTHETIC = TABLES = ("leaderboard", "ablations", "synthetic")
OURS, LINEAR = "reberta", "tfidf-svm"

Options = Mapping[str, Any]  # by name without dashes; None takes an option away


class Corpus(NamedTuple):
    """`source` is a corpus of benchmarks.corpora, `long_only` leaves out what one window of 512 tokens can hold.

    `runs` are pairs of fold and seed; the learning rate is tuned on the first.
    """

    source: str
    runs: tuple[tuple[int, int], ...]
    options: Options
    long_only: bool = False


class Model(NamedTuple):
    """`everywhere`: on each corpus, or on SMALLEST alone. It is trained for `longer` times a corpus's epochs."""

    options: Options
    grid: tuple[float | None, ...]
    everywhere: bool = True
    longer: int = 1


ENCODER = "models/pretrained/minilm-l6"
COMMON: Options = {
    "mixed_precision": "true",
    "metric_for_best": "log_loss",
    "batch_size": 4,
    "save_total_limit": 1,
    "log_steps": 50,
    "device": "cpu",
    "window_weights": "equal",  # as all were when these runs were made
}
LRS = (3e-5, 1e-4, 3e-4)
LRS_FROM_SCRATCH = (3e-4, 1e-3, 3e-3)

FOLDS = tuple((fold, 0) for fold in range(5))
SEEDS = tuple((0, seed) for seed in range(3))
# Each window is to tell the label, too: many more examples than there are documents. It lowers the log loss of a probe
# on all three corpora, in cross-validation within training and validation documents of the first fold (docs/LOG.md)
SOME_WINDOWS: Options = {
    "epochs": 8,
    "probe_epochs": 4,
    "window_size": 128,
    "max_windows": 80,
    "train_windows": 8,
    "window_loss": 1,
    "memory_level": 0,
}
# where there is one window, or no state of a window
NO_WINDOW_LOSS: Options = {"window_loss": None}
# What stands for a window, for all models alike: of [CLS] and the mean of tokens, after layers 2, 4, 5 and 6, what
# gives a linear probe of the encoder as it is the lowest log loss on the first fold's validation set (docs/LOG.md).
# None of 8 epochs was better than the probe, at two rates, with a moving average of the weights and without
STYLE: Options = {"pooling": "mean", "encoder_layers": 4, "epochs": 4}
# 8 windows hold most of its documents, which are many
TOPIC: Options = {"pooling": "mean", "probe_epochs": 1, "epochs": 4}
CORPORA = {
    "sotu-era": Corpus("sotu-era", FOLDS, SOME_WINDOWS),
    "brown-15": Corpus("brown-15", FOLDS, {**SOME_WINDOWS, **STYLE}),
    "20news-long": Corpus("20news", SEEDS, {**SOME_WINDOWS, **TOPIC}, long_only=True),
}

SMALLEST = "sotu-era"  # in tokens; variants of other models are only tried there
ONE_WINDOW: Options = {"window_size": None, "max_windows": None, "train_windows": None, **NO_WINDOW_LOSS}
AS_MANY_TOKENS = 2  # one window of 512 tokens in place of 8 of 128
MODELS = {
    # at ten times the encoder's rate, the default, a fresh memory or Transformer undoes what the probe brings
    OURS: Model({"model_type": "reberta", "carry": "gru", "fresh_lr_factor": 1}, LRS),
    "mean": Model({"model_type": "mean"}, LRS),
    "tobert": Model({"model_type": "tobert", "fresh_lr_factor": 1}, LRS),
    "head": Model({"model_type": "head", **ONE_WINDOW}, LRS, longer=AS_MANY_TOKENS),
    LINEAR: Model({}, (None,)),
    "max": Model({"model_type": "max", "window_weights": None}, LRS, everywhere=False),
    "head_tail": Model({"model_type": "head_tail", **ONE_WINDOW}, LRS, everywhere=False, longer=AS_MANY_TOKENS),
    "random_windows": Model(
        {"model_type": "random_windows", "max_windows": 4, "train_windows": None},
        LRS,
        everywhere=False,
        longer=AS_MANY_TOKENS,
    ),
    "mean-last-2-layers": Model({"model_type": "mean", "freeze_except_last": 2}, LRS, everywhere=False),
    "transformer": Model(
        {"model_type": "transformer", "fresh_lr_factor": 1, "probe_epochs": None, **NO_WINDOW_LOSS},
        LRS_FROM_SCRATCH,
        everywhere=False,
        longer=3,
    ),
}

SHUFFLED = "windows shuffled"  # of all documents, in training too: they are written so, in runs of RUN words
RUN = 36  # about as many as a window of the ablated task
ABLATED = "chronology"  # order tells the label there, in real sentences; variants are alike where a mean tells it
VARIANTS: dict[str, Options] = {  # repeats last: they take two and three times as long
    "carry residual": {"carry": "residual"},
    "carry residual, alpha 0.5": {"carry": "residual", "alpha": 0.5},
    "aggregation attention": {"aggregation": "attention"},
    "aggregation mean": {"aggregation": "mean"},
    "aggregation max": {"aggregation": "max", "window_weights": None},
    "aggregation transformer": {"aggregation": "transformer"},
    "global_alpha 0.8": {"global_alpha": 0.8},
    "gate_bias -4": {"gate_bias": -4},
    SHUFFLED: {},
    "window_overlap 12": {"window_overlap": 12, "max_windows": 48},
    "window_size 96": {"window_size": 96},
    "window_size 512": {"window_size": 512},
    "position_encoding rope": {"position_encoding": "rope"},
    "fresh_lr_factor 1": {"fresh_lr_factor": 1},
    "num_repeats 2": {"num_repeats": 2},
    "num_repeats 3": {"num_repeats": 3},
}

SYNTHETIC_ENCODER = ENCODER
SYNTHETIC_SUITE = synthetic_suite.Options()  # whose tokenizer is that encoder's
SYNTHETIC_RUNS = ((0, 0),)
SYNTHETIC_OPTIONS: Options = {
    "metric_for_best": "loss",
    "epochs": 2,
    "batch_size": 8,
    "dropout": 0,
    "memory_level": 0,
    "probe_epochs": 0,  # what decides cannot be read off a mean of windows
    "window_size": synthetic_suite.WINDOW_SIZE,
    "max_windows": max(synthetic_suite.DISTANCES) + synthetic_suite.OUTSIDE + 1,
}
OPTIONS_OF_TASKS: dict[str, Options] = {"chronology": {"max_windows": 2 * max(synthetic_suite.DISTANCES)}}
SYNTHETIC_LRS = (5e-5,)
TWO_WINDOWS: Options = {"window_size": 2 * synthetic_suite.WINDOW_SIZE, "max_windows": None}
SYNTHETIC_MODELS: dict[tuple[str, str], Model] = {
    (OURS, ""): Model({"model_type": "reberta", "carry": "gru"}, SYNTHETIC_LRS),
    ("mean", ""): Model({"model_type": "mean"}, SYNTHETIC_LRS),
    ("max", ""): Model({"model_type": "max", "window_weights": None}, SYNTHETIC_LRS),
    ("tobert", ""): Model({"model_type": "tobert"}, SYNTHETIC_LRS),
    ("head", ""): Model({"model_type": "head", **TWO_WINDOWS}, SYNTHETIC_LRS),
    ("head_tail", ""): Model({"model_type": "head_tail", **TWO_WINDOWS}, SYNTHETIC_LRS),
    ("random_windows", ""): Model({"model_type": "random_windows", "max_windows": 4}, SYNTHETIC_LRS),
    ("transformer", ""): Model({"model_type": "transformer", "fresh_lr_factor": 1, "epochs": 10}, (1e-3,)),
    (OURS, "carry none"): Model({"model_type": "reberta", "carry": "none"}, SYNTHETIC_LRS),
    (OURS, "carry gated"): Model({"model_type": "reberta", "carry": "gated"}, SYNTHETIC_LRS),
}


class Study(NamedTuple):
    """A model with its options on a corpus, and the runs (fold, seed) that it is to go through.

    `grid` are learning rates for the first run.
    """

    table: str
    corpus: str
    model: str
    variant: str
    encoder: str
    options: str
    grid: tuple[float | None, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("table", "corpus", "model", "variant")}

    @property
    def name(self) -> str:
        return " / ".join(self.identity.values())

    @property
    def how(self) -> dict[str, Any]:
        """On what its figures depend beside fold, seed and learning rate."""
        return {"encoder": self.encoder, "options": self.options}

    def cell(self, run: tuple[int, int], rate: float | None) -> dict[str, Any]:
        return {**self.identity, "fold": run[0], "seed": run[1], "learning_rate": rate, **self.how}

    def tuning(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The cells in which the learning rate is looked for, as far as these rows tell."""
        return [self.cell(self.runs[0], rate) for rate in rates_to_try(self.grid, select(rows, **self.identity))]

    def others(self, rate: float | None) -> list[dict[str, Any]]:
        """The cells that follow once it is known."""
        return [self.cell(run, rate) for run in self.runs[1:]]


def flags(options: Options) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)


def leaderboard_study(corpus: str, model: str) -> Study:
    plan, made = CORPORA[corpus], MODELS[model]
    options = {**COMMON, **plan.options, "epochs": plan.options["epochs"] * made.longer, **made.options}
    text, runs = flags(options), plan.runs
    if model == LINEAR:
        text = ", ".join(f"{name} {value}" for name, value in LINEAR_OPTIONS.items())
        runs = tuple((fold, seed) for fold, seed in runs if seed == 0)  # it draws nothing at random
    return Study(LEADERBOARD, corpus, model, "", ENCODER, text, made.grid, runs)


def synthetic_study(task: str, model: str, variant: str, changes: Options | None = None) -> Study:
    made = SYNTHETIC_MODELS[model, variant]
    options = {**COMMON, **SYNTHETIC_OPTIONS, **OPTIONS_OF_TASKS.get(task, {}), **made.options, **(changes or {})}
    return Study(SYNTHETIC, task, model, variant, SYNTHETIC_ENCODER, flags(options), made.grid, SYNTHETIC_RUNS)


def ablation_study(variant: str) -> Study:
    return synthetic_study(ABLATED, OURS, "", VARIANTS[variant])._replace(table=ABLATIONS, variant=variant)


def studies(tables: Sequence[str] = (), corpora: Sequence[str] = (), models: Sequence[str] = ()) -> list[list[Study]]:
    """The chosen studies in the order of work: groups of one table and corpus each, in which models take turns.

    Empty choices mean everything. The ablations bring the run of ReBerta that they are compared with.
    Raises ConfigError for names that stand nowhere.
    """
    known = {"table": TABLES, "corpus": [*CORPORA, *synthetic_suite.TASKS], "model": list(MODELS)}
    for kind, chosen in (("table", tables), ("corpus", corpora), ("model", models)):
        if unknown := [name for name in chosen if name not in known[kind]]:
            raise ConfigError(f"no {kind} is called {' or '.join(unknown)}, only {', '.join(known[kind])}")
    with_synthetic = not tables or SYNTHETIC in tables
    groups: dict[str, list[list[Study]]] = {
        LEADERBOARD: [
            [leaderboard_study(corpus, name) for name, made in MODELS.items() if made.everywhere or corpus == SMALLEST]
            for corpus in CORPORA
        ],
        ABLATIONS: [
            [
                *([] if with_synthetic else [synthetic_study(ABLATED, OURS, "")]),
                *(ablation_study(variant) for variant in VARIANTS),
            ]
        ],
        SYNTHETIC: [[synthetic_study(task, *which) for which in SYNTHETIC_MODELS] for task in synthetic_suite.TASKS],
    }
    found = [
        [study for study in group if (not corpora or study.corpus in corpora) and (not models or study.model in models)]
        for table in tables or TABLES
        for group in groups[table]
    ]
    return [group for group in found if group]
