"""The settings: what each option means, its default, its check. Defaults live here alone.

- `Settings`: one flat, frozen object, made of one group of options after another
- `parse_settings`: from the command line and `--config FILE.yaml|json`; flags win; all faults are reported at once

pydantic does types, ranges and choices; what depends on two options stands in `contradictions`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import reprlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from contradictions import contradictions
from presets import with_preset
from utils import ConfigError

DEFAULT_ENCODER = "roberta-base"
DEFAULT_TEST_PATH = ("data/validation",)
MISSING = object()
"""What stands for the value of a flag that has none."""

Paths = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
MemoryLevel = Annotated[Literal["auto", "0", "1", "2"], BeforeValidator(str)]


class Options(BaseModel):
    """A group of options. Subclasses name the group; a field's description is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )


class RunOptions(Options):
    """run"""

    mode: Literal["train", "train_steps", "evaluate", "train_and_evaluate", "predict", "analyze", "export"] = Field(
        "train",
        description="train by epochs, train by steps, evaluate a checkpoint, both, predict a corpus, look at one, "
        "or export a checkpoint to ONNX",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of weights, order, dropout, masking and sampling")
    output_dir: str | None = Field(
        None, description="folder of the run, the report, the analysis or the export (made up under logs/ if absent)"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="DEBUG also shows the traceback of an expected error"
    )
    log_steps: int = Field(10, ge=1, description="optimizer steps between two lines of the training log")
    device: Literal["cuda", "cpu"] | None = Field(None, description="where to compute (a GPU if there is one)")
    gpu_memory_fraction: float | None = Field(None, gt=0, le=1, description="share of the GPU's memory to use at most")
    max_memory: str | None = Field(
        None,
        pattern=r"^(auto|\d+(\.\d+)?[KMG]i?B)$",
        examples=["12GB", "800MiB", "auto"],
        description="memory that training may use, e.g. 12GB, 800MiB or auto (what is free): it is measured what fits, "
        "and memory level and documents at a time are chosen to suit (no planning if absent)",
    )
    num_workers: int = Field(0, ge=0, description="processes that load data beside the main one (predict has a thread)")
    report_to: Literal["none", "tensorboard", "wandb"] = Field("none", description="where else to log to")


class DataOptions(Options):
    """data"""

    train_path: Paths = Field(("data/train",), description="training files (jsonl, csv, parquet) or folders")
    val_path: Paths = Field(("data/evaluation",), description="validation files or folders")
    test_path: Paths | None = Field(
        None, description="test files or folders (train_and_evaluate: data/validation if absent)"
    )
    input_path: Paths | None = Field(None, description="mode predict: files or folders, labels not needed")
    shard: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$",
        examples=["1/4"],
        description="mode predict: do the I-th of N shares only, e.g. 1/4 (torchrun shares out by itself)",
    )
    sample_data: int | None = Field(None, ge=1, description="take so many documents of each set, stratified by label")
    batch_size: int = Field(8, ge=1, description="documents a batch and process")
    max_windows_per_batch: int | None = Field(None, ge=1, description="cap on the windows of a batch, padding included")
    max_len: int | None = Field(None, ge=1, description="cap on a document's tokens before it is cut into windows")
    text_column: str = Field("text", description="name of the text's column or key")
    label_column: str = Field("label", description="name of the label's column or key")
    problem_type: Literal["single_label", "multi_label"] = Field(
        "single_label", description="one label a document, or a list of labels"
    )
    on_bad_lines: Literal["error", "skip"] = Field(
        "error", description="stop at a bad line, or put it into a quarantine file and count it"
    )
    cache_dir: str = Field("~/.cache/reberta", description="where tokenized documents are kept for the next start")


class ModelOptions(Options):
    """model"""

    model_path: str | None = Field(
        None,
        description="training: an encoder (name or folder) or a checkpoint to start from, roberta-base if absent; "
        "evaluation, prediction and export: the checkpoint, a .pt file or a folder",
    )
    model_type: Literal["reberta", "head", "head_tail", "random_windows", "mean", "max", "tobert", "transformer"] = (
        Field("reberta", description="the kind of model to train; all but reberta are baselines that fix some options")
    )
    window_size: int = Field(256, ge=4, description="tokens a window, [CLS] and [SEP] included")
    window_overlap: int = Field(0, ge=0, description="tokens that two neighbouring windows share")
    num_repeats: int = Field(1, ge=1, description="times that the document is read")
    max_windows: int = Field(16, ge=1, description="windows of a document that are read at most")
    read: Literal["first", "head_tail", "random"] = Field(
        "first",
        description="what is read of a document that is longer than its windows: its first tokens; a quarter of the "
        "room from its head and the rest from its tail; or windows drawn at random, each once "
        "before any comes again (evenly spread outside of training)",
    )
    train_windows: int | None = Field(
        None,
        ge=1,
        description="windows that training takes of what is read of a document, drawn anew in each epoch, each once "
        "before any comes again; validation, test and prediction read all",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the encoder's hidden states and of the head")
    encoder_layers: int | None = Field(
        None, ge=1, description="how many of the encoder's layers are used, from below (all if absent)"
    )
    pooling: Literal["cls", "mean"] = Field(
        "cls",
        description="what stands for a window: the encoder's output at its [CLS], or the mean over its tokens, which "
        "many sentence encoders were trained for",
    )
    carry: Literal["gru", "gated", "residual", "none"] = Field(
        "gru",
        description="what a window hears of those before it: a recurrent memory that also counts for the document, "
        "a memory that keeps, the last state, or nothing",
    )
    alpha: float = Field(0.8, gt=0, le=1, description="carry residual: weight of the encoder's output in the state")
    global_alpha: float | None = Field(
        None, ge=0, le=1, description="aggregation encoder: fixed weight of the aggregate (learned from 0 if absent)"
    )
    gate_bias: float = Field(0.0, description="start value of the gates' biases; lower lets less in at first")
    aggregation: Literal["encoder", "transformer", "attention", "mean", "max"] = Field(
        "encoder", description="how window states become the document's state"
    )
    position_encoding: Literal["absolute", "rope"] = Field(
        "absolute", description="the encoder's learned positions, or rotary ones in their place"
    )
    memory_level: MemoryLevel = Field(
        "auto",
        description="0 keeps activations, 1 recomputes two windows at a time, 2 window by window and layer by layer",
    )
    gradient_checkpointing: bool = Field(False, description="the same as --memory_level 2")
    max_window_failures: float = Field(
        0.01, ge=0, le=1, description="share of windows whose state may be not finite before the run ends"
    )


class TrainingOptions(Options):
    """training"""

    epochs: int = Field(3, ge=1, description="passes over the training set (modes train, train_and_evaluate)")
    total_steps: int | None = Field(
        None, ge=1, description="optimizer steps (mode train_steps; train_and_evaluate: in place of --epochs)"
    )
    eval_every: int | None = Field(
        None, ge=1, description="optimizer steps between evaluations, each with a checkpoint (once an epoch if absent)"
    )
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    fresh_lr_factor: float = Field(
        10.0,
        gt=0,
        description="learning rate of what neither the encoder nor a probe brings, as a multiple of --learning_rate",
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay, not on biases and norms")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches an optimizer step")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without gain before training ends")
    metric_for_best: Literal["accuracy", "f1_macro", "loss", "log_loss"] = Field(
        "accuracy",
        description="the validation metric that chooses the best model; loss is that of training, of logits as they "
        "are, log_loss that of probabilities at the temperature which is fitted to them, and must beat a probe's by "
        "more than the standard error of the difference",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights, which is evaluated and saved"
    )
    freeze_except_last: int | None = Field(
        None, ge=0, description="train only the last so many layers of the encoder, besides what it does not bring"
    )
    probe_epochs: int = Field(
        0,
        ge=0,
        description="before training, read the training set so often without training the encoder, and start from the "
        "head that fits it best; pays where documents are few",
    )
    window_loss: float = Field(
        0.0,
        ge=0,
        description="weight of a second loss, in the probe too: each window's state alone must tell the label",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="weigh classes in the loss by the inverse of their frequency"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the loss")
    gradient_clip_val: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    resume: str = Field(
        "auto", description="auto: continue the run in --output_dir; never: refuse; or a checkpoint's path"
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints to keep; the best one is kept besides")


class ScheduleOptions(Options):
    """schedule"""

    scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="shape of the learning rate over the run"
    )
    num_warmup_steps: int | None = Field(
        None, ge=0, description="optimizer steps of warm-up (a tenth of the run if absent; none with constant)"
    )
    optimizer_type: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimizer")


class PrecisionOptions(Options):
    """precision"""

    mixed_precision: bool = Field(False, description="compute in 16 bits where that is safe")
    mixed_precision_type: Literal["fp16", "bf16"] = Field("bf16", description="which 16 bits")
    int8: bool = Field(
        False,
        description="evaluate or predict with the encoder's linear layers in 8 bits (dynamic quantisation, CPU only)",
    )


class AugmentationOptions(Options):
    """augmentation"""

    use_augmentation: bool = Field(False, description="mask tokens of the training documents on the fly")
    random_mask_prob: float = Field(0.15, gt=0, le=1, description="chance of a token (or word) to be masked")
    max_mask_tokens: int | None = Field(None, ge=1, description="tokens of a document that are masked at most")
    whole_word_mask: bool = Field(False, description="mask whole words (Chinese needs the package jieba)")


class OutputOptions(Options):
    """output"""

    save_predictions: bool = Field(False, description="write predictions.csv beside the report")
    output_path: str | None = Field(None, description="mode predict: the file to write, .csv or .jsonl")


GROUPS: tuple[type[Options], ...] = (
    RunOptions,
    DataOptions,
    ModelOptions,
    TrainingOptions,
    ScheduleOptions,
    PrecisionOptions,
    AugmentationOptions,
    OutputOptions,
)


class Settings(
    OutputOptions,
    AugmentationOptions,
    PrecisionOptions,
    ScheduleOptions,
    TrainingOptions,
    ModelOptions,
    DataOptions,
    RunOptions,
):
    """All options of a run, flat and frozen."""


def parse_settings(argv: Sequence[str] | None = None, *, description: str | None = None, **defaults: Any) -> Settings:
    """Settings from `argv` (the process's own if None) over `--config` over `defaults` over the defaults here.

    Raises:
        ConfigError: every unknown or wrong option and every contradiction, in one message.
        SystemExit: `--help`.
    """
    given, unknown = _parser(description).parse_known_args(argv)
    flags = {name: value for name, value in vars(given).items() if value is not None}
    faults = [f"--{name}: its value is missing" for name, value in flags.items() if value in (MISSING, [])]
    flags = {name: value for name, value in flags.items() if value not in (MISSING, [])}
    config_path = flags.pop("config", None)
    faults += [_unknown(word) for word in unknown if word.startswith("--")]
    faults += [f"{word!r} belongs to no option" for word in unknown if not word.startswith("--")][: not faults]
    file_values = _read_config_file(Path(config_path)) if config_path else {}
    for key in sorted(set(file_values) - set(Settings.model_fields)):
        del file_values[key]
        faults.append(f"{config_path}: {_unknown(key)}")
    truths = [key for key, value in file_values.items() if isinstance(value, bool)]
    for key in truths:
        if Settings.model_fields[key].annotation is not bool:
            faults.append(f"{config_path}: {key}: {str(file_values.pop(key)).lower()} is no value of this option")
    values = {**defaults, **file_values, **flags}
    values = {name: None if value in ("none", "None") and _optional(name) else value for name, value in values.items()}
    return _validate(values, {*file_values, *flags}, faults)


def _validate(values: dict[str, Any], said: set[str], faults: list[str]) -> Settings:
    wrong: set[str] = set()
    try:
        settings = Settings(**values)
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors()}
        faults += map(_say, error.errors())
        settings = Settings(**{name: value for name, value in values.items() if name not in wrong})
    settings, refused = with_preset(settings)
    faults += refused
    faults += contradictions(settings, said - wrong) if "mode" not in wrong else []  # which most of them are about
    if faults:
        raise ConfigError("wrong options:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))
    return settings


def _say(fault: ErrorDetails) -> str:
    name, value, message = str(fault["loc"][0]), fault["input"], fault["msg"]
    # aliases of YAML can nest without end
    shown = reprlib.repr(value)[:100] if isinstance(value, (list, dict)) else value
    if fault["type"] == "string_pattern_mismatch":
        message = f"must look like {' or '.join(Settings.model_fields[name].examples or [])}"
    return f"--{name} {shown}: {message[0].lower()}{message[1:]}"


def _unknown(word: str) -> str:
    name = word.lstrip("-").split("=")[0]
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"unknown option {word}" + (f"; did you mean --{close[0]}?" if close else "; --help lists all options")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if twice := _repeated([key.value for key, _ in node.value]):
            raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that stands twice."""
    if twice := _repeated([name for name, _ in pairs]):
        raise ValueError(twice)
    return dict(pairs)


def _repeated(names: Sequence[Any]) -> str | None:
    return next((f"{name!r} stands there twice" for name in names if names.count(name) > 1), None)


def _read_config_file(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config {path}: a .yaml or .json file is needed")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_object) if path.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: is no valid {path.suffix[1:]}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must hold one mapping of option to value")
    return {str(key): value for key, value in values.items()}


def _parser(description: str | None) -> argparse.ArgumentParser:
    """Flags as plain strings, so that the command line and the file go through the same checks."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # before Python 3.14 it takes -1e-3 for an option
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument(
        "--config",
        nargs="?",
        const=MISSING,
        metavar="FILE",
        help="options from a .yaml or .json file; flags win over it",
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        for name, field in group.__annotations__.items():
            info = group.model_fields[name]
            section.add_argument(f"--{name}", help=_help(info), metavar=_metavar(info), **_arity(field, info))
    return parser


def _arity(annotation: str, info: FieldInfo) -> dict[str, Any]:
    if annotation.startswith("Paths"):
        return {"nargs": "*"}
    return {"nargs": "?", "const": "True" if info.annotation is bool else MISSING}


def _choices(info: FieldInfo) -> list[str]:
    members = [info.annotation, *get_args(info.annotation)]
    return [
        str(choice)
        for member in members
        if getattr(member, "__origin__", None) is Literal
        for choice in get_args(member)
    ]


def _metavar(info: FieldInfo) -> str:
    if _choices(info):
        return "/".join(_choices(info))
    if info.annotation is bool:
        return "True/False"
    names = str(info.annotation)
    return "PATH" if "tuple" in names else "INT" if "int" in names else "NUMBER" if "float" in names else "TEXT"


def _help(info: FieldInfo) -> str:
    default = " ".join(info.default) if isinstance(info.default, tuple) else info.default
    shown = "" if info.default is None else f" (default: {default})"
    return f"{info.description}{shown}".replace("%", "%%")


def _optional(name: str) -> bool:
    return name in Settings.model_fields and Settings.model_fields[name].default is None
