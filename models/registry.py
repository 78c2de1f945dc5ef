"""Which models `--model_type` knows, how each is built from the settings, and which of its weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from config import DEFAULT_ENCODER, Settings
from models.configuration import ReBertaConfig
from models.encoder import load_encoder
from models.reberta import RecurrentRoBERTa
from models.transformer import TransformerClassifier, TransformerConfig
from presets import FIXED
from pretrained import find_encoder
from utils import ConfigError, ModelError, error_handler, logger

ARCHITECTURE = (
    *("num_repeats", "encoder_layers", "pooling", "carry", "alpha", "gate_bias", "aggregation", "global_alpha"),
    *("window_weights", "position_encoding"),
)
READING = ("window_size", "window_overlap", "max_windows", "max_len", "read")
LEARNED = (*READING, "text_column", "label_column", "problem_type")  # of a saved model, where no option says otherwise
WITHOUT = {"read": "first", "model_type": "reberta"}  # what models are that were saved before there were these options
BEHAVIOUR = ("dropout", "memory_level", "window_loss")


def reberta_options(settings: Settings) -> dict[str, Any]:
    """The fields of `ReBertaConfig` that the settings decide."""
    options = {name: getattr(settings, name) for name in ARCHITECTURE + READING + BEHAVIOUR}
    return {**options, "memory_level": _memory_level(settings)}


def label_options(settings: Settings, label_names: list[str]) -> dict[str, Any]:
    """The fields of any transformers configuration that say what is told apart."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        "problem_type": f"{settings.problem_type}_classification",
    }


def learned_settings(written: Mapping[str, Any], settings: Settings, names: Iterable[str] = READING) -> dict[str, Any]:
    """What a checkpoint's settings say of these options where no flag says otherwise.

    Raises:
        ValueError: of pydantic, where they are none; anyone may have written them.
    """
    written = {**WITHOUT, **written}
    learned = {name: written[name] for name in names if name not in settings.model_fields_set}
    return Settings(**learned).model_dump(include=set(learned))


def refuse_other_architecture(source: str, saved: PreTrainedModel, settings: Settings) -> None:
    """Raises ConfigError where options are given that contradict how a checkpoint's model is built."""
    built = built_with(saved)
    changed = [n for n, value in built.items() if n in settings.model_fields_set and getattr(settings, n) != value]
    if changed:
        kept = ", ".join(f"--{name} {built[name]}" for name in changed)
        fixed = FIXED[settings.model_type]
        by_type = all(name in fixed and fixed[name] == getattr(settings, name) for name in changed)
        given = f"--model_type {settings.model_type}" if by_type else "these options"
        raise ConfigError(f"{source} was built with {kept}; leave {given} out, or train from an encoder")


def built_with(model: PreTrainedModel) -> dict[str, Any]:
    """The options that decided how the model is built."""
    return {name: getattr(model.config, name) for name in ARCHITECTURE if hasattr(model.config, name)}


def build_reberta(
    settings: Settings, label_names: list[str], tokenizer: PreTrainedTokenizerBase, start: PreTrainedModel | None
) -> RecurrentRoBERTa:
    """A fresh model around a pretrained encoder, or one with the weights of `start`."""
    options = {**reberta_options(settings), **label_options(settings, label_names)}
    options["cls_token_id"] = tokenizer.cls_token_id
    if start is None:
        return RecurrentRoBERTa(encoder=settings.model_path or DEFAULT_ENCODER, **options)
    model = RecurrentRoBERTa(encoder=_with_encoder(start, settings).config.encoder_config, **options)
    _take_weights(model, start, settings)
    return model


def _with_encoder(start: PreTrainedModel, settings: Settings) -> RecurrentRoBERTa:
    if not isinstance(start, RecurrentRoBERTa):
        raise ConfigError(
            f"{settings.model_path} has no encoder: start from one, or go on with --model_type transformer"
        )
    return start


def build_transformer(
    settings: Settings, label_names: list[str], tokenizer: PreTrainedTokenizerBase, start: PreTrainedModel | None
) -> TransformerClassifier:
    """A small Transformer from scratch, or one with the weights of `start`, where that is one, too."""
    options = {name: getattr(settings, name) for name in (*READING, "dropout")}
    options |= {"memory_level": _memory_level(settings), "vocab_size": len(tokenizer)}
    model = TransformerClassifier(TransformerConfig(**options, **label_options(settings, label_names)))
    if isinstance(start, TransformerClassifier):
        _take_weights(model, start, settings)
    return model


def _take_weights(model: PreTrainedModel, start: PreTrainedModel, settings: Settings) -> None:
    """Copy the weights of `start`; those of its classifier only where it knows the same labels."""
    weights = start.state_dict()
    if start.config.id2label != model.config.id2label:
        logger.warning("%s knows other labels: its classifier is replaced by a fresh one", settings.model_path)
        weights = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    model.load_state_dict({**model.state_dict(), **weights})


def _memory_level(settings: Settings) -> int | str:
    level = "2" if settings.gradient_checkpointing else settings.memory_level
    return level if level == "auto" else int(level)


def freeze_except_last(encoder: PreTrainedModel, layers: int) -> None:
    """Freeze an encoder but for its last layers; its embeddings are frozen too.

    Raises:
        ConfigError: as `last_layers`.
    """
    trained = {id(parameter) for layer in last_layers(encoder, layers) for parameter in layer.parameters()}
    for parameter in encoder.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def last_layers(encoder: PreTrainedModel, layers: int) -> Sequence[nn.Module]:
    """Its last layers; their parts, where it keeps attention and feed-forward in lists of their own, as XLM does.

    Raises:
        ConfigError: it has not so many, or its layers share their weights, as ALBERT's do.
    """
    there = encoder.config.num_hidden_layers
    if layers > there:
        raise ConfigError(f"--freeze_except_last {layers}: the encoder has {there} layers")
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    stacks = [stack for stack in outermost if len(stack) == there]
    if layers and not stacks:
        raise ConfigError(f"--freeze_except_last {layers}: this encoder's layers share their weights; 0 freezes them")
    return [layer for stack in stacks for layer in stack[there - layers :]]


MODEL_TYPES: dict[str, Callable[..., RecurrentRoBERTa | TransformerClassifier]] = {
    **dict.fromkeys(("reberta", "head", "head_tail", "random_windows", "mean", "max", "tobert"), build_reberta),
    "transformer": build_transformer,
}


@error_handler(error_type=ModelError)
def check_encoder(settings: Settings, start: PreTrainedModel | None) -> None:
    """Whether a model can be built around the encoder, which is told from its configuration alone, or that of `start`.

    Raises:
        ModelError, ConfigError: as `build_model`, but before a corpus is read and cut for it.
    """
    if MODEL_TYPES[settings.model_type] is not build_reberta:
        return
    if start is None:
        source = find_encoder(settings.model_path or DEFAULT_ENCODER)
        with torch.device("meta"), no_init_weights():
            encoder = load_encoder(source, 0.0, 0.0, pretrained=False, layers=settings.encoder_layers)
    else:
        encoder = _with_encoder(start, settings).encoder
    ReBertaConfig(**reberta_options(settings)).check(encoder)
    last_layers(encoder, settings.freeze_except_last or 0)


@error_handler(error_type=ModelError)
def build_model(
    settings: Settings,
    label_names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    start: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The model that `--model_type` names; its weights are those of `start`, where training starts from a saved model.

    Raises:
        ModelError: the encoder cannot be found or loaded.
        ConfigError: options that this encoder cannot do.
    """
    model = MODEL_TYPES[settings.model_type](settings, label_names, tokenizer, start)
    if settings.freeze_except_last is not None:
        freeze_except_last(model.encoder, settings.freeze_except_last)
    return model
