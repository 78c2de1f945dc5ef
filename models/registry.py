"""Which models `--model_type` knows, and how each is built from the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import DEFAULT_ENCODER, Settings
from models.checkpoint import is_checkpoint, load_model_and_config
from models.reberta import RecurrentRoBERTa
from utils import ConfigError, ModelError, error_handler, logger

ARCHITECTURE = ("num_repeats", "carry", "aggregation", "position_encoding")
READING = ("window_size", "window_overlap", "max_windows", "max_len")
BEHAVIOUR = ("dropout", "alpha", "global_alpha", "gate_bias", "memory_level")


def reberta_options(settings: Settings) -> dict[str, Any]:
    """The fields of `ReBertaConfig` that the settings decide."""
    options = {name: getattr(settings, name) for name in ARCHITECTURE + READING + BEHAVIOUR}
    level = "2" if settings.gradient_checkpointing else settings.memory_level
    return {**options, "memory_level": level if level == "auto" else int(level)}


def build_reberta(settings: Settings, label_names: list[str], tokenizer: PreTrainedTokenizerBase) -> RecurrentRoBERTa:
    """A fresh model around a pretrained encoder, or one that starts from a checkpoint."""
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        "problem_type": f"{settings.problem_type}_classification",
    }
    options = {**reberta_options(settings), **labels, "cls_token_id": tokenizer.cls_token_id}
    source = settings.model_path or DEFAULT_ENCODER
    if not is_checkpoint(source):
        return RecurrentRoBERTa(encoder=source, **options)
    saved = load_model_and_config(source).model
    changed = [name for name in ARCHITECTURE if name in settings.model_fields_set and _differs(saved, settings, name)]
    if changed:
        kept = ", ".join(f"--{name} {getattr(saved.config, name)}" for name in changed)
        raise ConfigError(f"{source} was built with {kept}; leave these options out, or start from an encoder")
    options |= {name: getattr(saved.config, name) for name in ARCHITECTURE}
    model = RecurrentRoBERTa(encoder=saved.config.encoder_config, **options)
    weights = saved.state_dict()
    if saved.config.id2label != model.config.id2label:
        logger.warning("%s knows other labels: its classifier is replaced by a fresh one", source)
        weights = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def _differs(saved: RecurrentRoBERTa, settings: Settings, name: str) -> bool:
    return getattr(saved.config, name) != getattr(settings, name)


MODEL_TYPES: dict[str, Callable[[Settings, list[str], PreTrainedTokenizerBase], PreTrainedModel]] = {
    "reberta": build_reberta,
}


@error_handler(error_type=ModelError)
def build_model(settings: Settings, label_names: list[str], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that `--model_type` names.

    Raises:
        ModelError: the encoder or checkpoint cannot be found or loaded.
        ConfigError: options that this encoder cannot do.
    """
    return MODEL_TYPES[settings.model_type](settings, label_names, tokenizer)
