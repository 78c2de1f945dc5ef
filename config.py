"""The settings: what each option means, its default, its check. Defaults live here alone.

`Settings` is one flat, frozen object, made of one group of options after another. pydantic does types, ranges and
choices; what depends on two options stands in `contradictions`, how they are read in `command_line`.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_ENCODER = "roberta-base"
FEW_DOCUMENTS = 10_000  # up to so many are probed; with more, a random head does no harm, and a probe takes long

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a shell leaves ~ as it is after =
Paths = Annotated[
    tuple[Place, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
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
    output_dir: Place | None = Field(
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
    num_workers: int = Field(
        0,
        ge=0,
        description="processes that load batches in training and in mode evaluate, beside the main one (predict has a "
        "thread)",
    )
    report_to: Literal["none", "tensorboard", "wandb"] = Field("none", description="where else to log to")


class DataOptions(Options):
    """data"""

    train_path: Paths = Field(("data/train",), description="training files (jsonl, csv, parquet) or folders")
    val_path: Paths = Field(("data/evaluation",), description="validation files or folders")
    test_path: Paths | None = Field(
        None, description="test files or folders (train_and_evaluate: data/validation if absent)"
    )
    input_path: Paths | None = Field(None, description="mode predict: files (also .txt) or folders, labels not needed")
    shard: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$",
        examples=["1/4"],
        description="mode predict: do the I-th of N shares only, e.g. 1/4 (torchrun shares out by itself)",
    )
    sample_data: int | None = Field(None, ge=1, description="use so many documents of each set, stratified by label")
    batch_size: int = Field(8, ge=1, description="documents per batch and process")
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
    cache_dir: Place = Field(
        "~/.cache/reberta", validate_default=True, description="where tokenized documents are kept for the next start"
    )


class ModelOptions(Options):
    """model"""

    model_path: Place | None = Field(
        None,
        description="training: an encoder (name or folder) or a checkpoint to start from, roberta-base if absent; "
        "evaluation, prediction and export: the checkpoint, a .pt file or a folder",
    )
    model_type: Literal["reberta", "head", "head_tail", "random_windows", "mean", "max", "tobert", "transformer"] = (
        Field("reberta", description="the kind of model to train; all but reberta are baselines that fix some options")
    )
    window_size: int = Field(256, ge=4, description="tokens a window, [CLS] and [SEP] included")
    window_overlap: int = Field(0, ge=0, description="tokens that two neighbouring windows share")
    num_repeats: int = Field(1, ge=1, description="how many times each document is read")
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
        "before any comes again (not so with --read random); validation, test and prediction read all",
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
    window_weights: Literal["tokens", "equal"] = Field(
        "tokens",
        description="how windows count in the mean of their states and in --window_loss: by their tokens, so that a "
        "short last one says little, or all alike",
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
        description="learning rate of gates, aggregation and, without a probe, head, as a multiple of --learning_rate; "
        "1 for transformer, all of which is fresh, and best where a saved model is trained further on like data",
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay, not on biases and norms")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches an optimizer step")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without gain before training ends")
    metric_for_best: Literal["accuracy", "f1_macro", "loss", "log_loss"] = Field(
        "accuracy",
        description="the validation metric that chooses the best model: loss is that of training, on logits as they "
        "are; log_loss is measured at the fitted temperature, and must beat a probe's by more than the standard error "
        "of the difference",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights, which is evaluated and saved"
    )
    freeze_except_last: int | None = Field(
        None, ge=0, description="train only the last so many layers of the encoder, besides what it does not bring"
    )
    probe_epochs: int | None = Field(
        None,
        ge=0,
        description="before training, read the training set so many times with the encoder as it is, and start from "
        f"the head that fits it best (1 where an encoder is trained on up to {FEW_DOCUMENTS:,} documents, 0 elsewhere, "
        "if absent)",
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
    resume: Place = Field(
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
        description="evaluate or predict with the encoder's linear layers in 8 bits, one document at a time "
        "(dynamic quantisation, CPU only)",
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
    output_path: Place | None = Field(None, description="mode predict: the file to write, .csv or .jsonl")


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

    @property
    def test_files(self) -> tuple[str, ...]:
        """`--test_path`, or its default where a mode does without."""
        return self.test_path or ("data/validation",)


GROUPS: tuple[Any, ...] = Settings.__bases__[::-1]  # in the order of --help
