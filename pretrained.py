"""Encoders on this machine: where they lie, and what a folder that anyone may have written must not ask for.

transformers reads such a folder; it follows an index of weights out of the folder, and makes room for whatever number
of labels or layers the configuration names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from utils import ModelError

PRETRAINED = Path(__file__).parent / "models" / "pretrained"
RUN_STATUS = "status.json"
MOST_LAYERS, MOST_LABELS = 1000, 100_000


def find_encoder(name: str | Path) -> str:
    """Where transformers finds an encoder: a folder, else one below models/pretrained, else a name on the hub.

    Raises:
        ModelError: it is a run's folder, or one whose configuration is none, names numbers beyond measure or weights
            elsewhere.
    """
    local = PRETRAINED / name
    found = local if not Path(name).exists() and local.is_dir() else Path(name)
    refuse_run_folder(found)
    if (found / "config.json").is_file():
        _check_config(found / "config.json")
    for index in found.glob("*.index.json"):
        _check_index(index)
    return str(found)


def refuse_run_folder(folder: Path) -> None:
    """Raises ModelError where a run, or one of its checkpoints, is taken for a model."""
    run = folder.resolve().parent if folder.name.startswith("checkpoint-") else folder.resolve()
    if (run / RUN_STATUS).is_file():
        raise ModelError(
            f"{folder}: is the folder of a run or one of its checkpoints; its best model is models/saved/{run.name}"
        )


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> PreTrainedTokenizerBase:
    """The same one. Raises ModelError where windows cannot be made with it."""
    if not tokenizer.is_fast:
        raise ModelError(f"{source}: the tokenizer has no fast form (tokenizer.json); choose an encoder that has one")
    missing = [token for token in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, token) is None]
    if missing:
        raise ModelError(f"{source}: the tokenizer has no {', '.join(missing)}; choose a BERT-like encoder")
    return tokenizer


def _check_config(path: Path) -> None:
    config = _read(path)
    for key, most in (name_of_layer_count(config), MOST_LAYERS), ("num_labels", MOST_LABELS):
        value = config.get(key, 0)
        if not isinstance(value, int) or value > most:
            raise ModelError(f"{path}: refused, since its {key} is {value!r}; an encoder has {most:,} at most")


def name_of_layer_count(config: dict[str, Any]) -> str:
    """What its kind of model calls `num_hidden_layers`: `n_layers`, if it is DistilBERT's."""
    kind = config.get("model_type")
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    return names.get("num_hidden_layers", "num_hidden_layers")


def _check_index(path: Path) -> None:
    names = _read(path).get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{path}: is damaged: it has no weight_map")
    if outside := [name for name in names.values() if Path(str(name)).name != name]:
        raise ModelError(f"{path}: refused, since it takes weights from outside of its folder: {outside[0]}")


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content
