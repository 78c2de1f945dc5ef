"""Baselines, most of them the same model with other options: what a `--model_type` fixes, and other defaults.

- `head`, `head_tail`, `random_windows`: part of the document
- `mean`, `max`, `tobert`: all of its windows, each read on its own
- `transformer`, a small one from scratch (see `models.transformer`): the options of ReBerta that mean nothing to it
"""

from __future__ import annotations

from typing import Any

from config import Settings

_ALONE = {"carry": "none", "num_repeats": 1}

FIXED: dict[str, dict[str, Any]] = {
    "reberta": {},
    "head": {**_ALONE, "aggregation": "mean", "read": "first", "max_windows": 1},
    "head_tail": {**_ALONE, "aggregation": "mean", "read": "head_tail", "max_windows": 1},
    "random_windows": {**_ALONE, "aggregation": "mean", "read": "random"},
    "mean": {**_ALONE, "aggregation": "mean"},
    "max": {**_ALONE, "aggregation": "max"},
    "tobert": {**_ALONE, "aggregation": "transformer"},
    "transformer": {
        **_ALONE,
        "aggregation": "mean",
        "encoder_layers": None,
        "pooling": "mean",
        "window_weights": "equal",
        "position_encoding": "absolute",
        "window_overlap": 0,
        "max_memory": None,
        "freeze_except_last": None,
        "probe_epochs": 0,
        "window_loss": 0.0,
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {"window_size": 512},
    "head_tail": {"window_size": 512},
    "transformer": {"fresh_lr_factor": 1.0},  # all of it is fresh: --learning_rate is what it says
}
TRAINING = ("train", "train_steps", "train_and_evaluate")


def with_preset(settings: Settings) -> tuple[Settings, list[str]]:
    """The settings as `--model_type` has them, and the options given that contradict it.

    Where nothing is trained the checkpoint says what the model is, and nothing changes.
    """
    if settings.mode not in TRAINING:
        return settings, []
    fixed, said = FIXED[settings.model_type], settings.model_fields_set
    faults = [
        f"--{name} {getattr(settings, name)} does not go with --model_type {settings.model_type}"
        + ("" if value is None else f", which has --{name} {value}")
        for name, value in fixed.items()
        if name in said and getattr(settings, name) != value
    ]
    defaults = {name: value for name, value in DEFAULTS.get(settings.model_type, {}).items() if name not in said}
    # what is fixed counts as said, since a saved model that has it otherwise cannot be gone on from; a default does not
    values = {**dict(settings), **defaults, **fixed}
    return Settings.model_construct(said | fixed.keys(), **values), faults
